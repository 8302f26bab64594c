"""Batch norms inside PyTorch: modules and a function whose derivatives of all orders are those of arraybn.

Import this module by its name, ``import arraybn.pytorch``; it needs torch. Tensors on the CPU are served by the kernels
for NumPy, tensors on a GPU by those for CuPy, on the memory of the tensors. The maths is in ``reference.py``; here are
the rules by which the derivatives of a batch norm make each other, and the modules.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch.autograd import forward_ad

from . import reference, sync
from ._arrays.layout import Layout
from ._arrays.namespaces import Array, class_name, is_cupy_array
from ._checks import is_recorded
from .derivatives import batch_norm_double_backward, batch_norm_jvp
from .functional import ALONE, Saved, batch_norm_backward, forward_in
from .kernels import Backend
from .layers import OfRanks
from .reference import Moments
from .sync import Call, Comm, RankPool

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "batch_norm", "convert_sync_batchnorm"]

Tensor: TypeAlias = Any  # torch.Tensor

# ---- Tensors and arrays over the same memory -------------------------------------------------------------------------


def _array(tensor: Tensor) -> Array:
    """Return an array of NumPy or CuPy over the memory of the tensor."""
    tensor = tensor.detach().resolve_neg()
    if tensor.dtype is torch.bfloat16:
        return _array(tensor.view(torch.int16)).view(importlib.import_module("ml_dtypes").bfloat16)
    return _cupy().from_dlpack(tensor) if _is_on_gpu(tensor) else tensor.numpy()


def _tensor(array: Array) -> Tensor:
    """Return a tensor over the memory of an array of NumPy or CuPy."""
    if array.dtype.name == "bfloat16":
        return _tensor(array.view("int16")).view(torch.bfloat16)
    return torch.from_dlpack(array) if is_cupy_array(array) else torch.from_numpy(array)


def _is_on_gpu(tensor: Tensor) -> bool:
    """Return whether the tensor is on a GPU; raise unless arraybn has kernels for the tensor."""
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"input: expected a tensor on a CPU or a CUDA GPU; got one on the device {tensor.device}")
    return tensor.is_cuda  # type: ignore[no-any-return]


def _cupy() -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise ImportError('input: expected CuPy to be installed for a GPU: pip install "arraybn[cuda12]"') from error


@contextmanager
def _on_stream_of(tensor: Tensor) -> Iterator[None]:
    """Let CuPy compute on the device of a tensor on a GPU, on the stream that PyTorch computes on there."""
    if not _is_on_gpu(tensor):
        yield
        return
    cuda, stream = _cupy().cuda, torch.cuda.current_stream(tensor.device)
    with cuda.Device(tensor.device.index), cuda.ExternalStream(stream.cuda_stream, tensor.device.index):
        yield


# ---- The four operations as kernels of PyTorch's dispatcher ----------------------------------------------------------


class _Run:
    """One forward: its settings, and what the derivatives need beside tensors."""

    def __init__(self, eps: float, call: Call | None) -> None:
        self.eps, self.call = eps, call
        self.n: int | None = None  # None for fixed statistics; over all ranks in a call
        self.pool: RankPool | None = None
        self.backend: Backend
        self.number = next(_numbers)
        _runs[self.number] = self

    def saved(self, x: Tensor, weight: Tensor, mean: Tensor, m2: Tensor, rstd: Tensor) -> Saved:
        """Return the memory of the forward, made of the tensors that autograd has kept."""
        array, mean, rstd = _array(x), _array(mean), _array(rstd)
        batch = None if self.n is None else Moments(self.n, mean, _array(m2))
        (weight,) = self.backend.widened(_array(weight))
        layout, pool = Layout.of(array, 1), self.pool
        return Saved(batch, self.backend, layout, array, None, mean, rstd, weight, True, pool, False)


# The dispatcher takes numbers for objects. A number is never used again, so that it cannot mean another run.
_numbers = itertools.count()
_runs: weakref.WeakValueDictionary[int, _Run] = weakref.WeakValueDictionary()
_LIBRARY = torch.library.Library("arraybn", "DEF")
_MEMORY = "Tensor x, Tensor weight, Tensor mean, Tensor m2, Tensor rstd, int run"


def _kernel(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function of tensors and a `_Run`.

    As an operator of PyTorch, the function also works on the tensors that `torch.autograd.grad` has batched
    (is_grads_batched=True): PyTorch calls the function on each tensor of the batch.
    """

    def register(work: Callable[..., Any]) -> Any:
        def kernel(*arguments: Any) -> Any:
            *tensors, number = arguments
            with _on_stream_of(tensors[0]):
                return work(_runs[number], *tensors)

        name = work.__name__.removeprefix("_")
        _LIBRARY.define(f"{name}{schema}")
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        return getattr(torch.ops.arraybn, name).default

    return register


@_kernel(
    "(Tensor x, Tensor weight, Tensor bias, Tensor? mean, Tensor? var, int run) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _forward(
    run: _Run, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None
) -> tuple[Tensor, ...]:
    """(E3) Return y, and mean, m2 and rstd (C,) in the dtype of statistics."""
    y = torch.empty_like(x)
    fixed = {} if mean is None else {"mean": _array(mean), "var": _array(var)}
    arrays = (_array(tensor) for tensor in (x, weight, bias))
    _, saved = forward_in(run.call, *arrays, **fixed, eps=run.eps, channel_axis=1, out=_array(y))
    batch, run.pool, run.backend = saved._moments, saved._pool, saved._backend
    run.n = None if batch is None else batch.n
    m2 = saved._mean.copy() if batch is None else batch.m2
    return y, _tensor(saved._mean), _tensor(m2), _tensor(saved._rstd)


@_kernel(f"(Tensor dy, {_MEMORY}) -> (Tensor, Tensor, Tensor)")
def _backward(run: _Run, dy: Tensor, x: Tensor, weight: Tensor, *statistics: Tensor) -> tuple[Tensor, ...]:
    dx = torch.empty_like(x)
    _, *by_vectors = batch_norm_backward(_array(dy), run.saved(x, weight, *statistics), out=_array(dx))
    return dx, *(_tensor(vector).to(weight.dtype) for vector in by_vectors)


@_kernel(f"(Tensor x_dot, Tensor weight_dot, Tensor bias_dot, {_MEMORY}) -> Tensor")
def _jvp(run: _Run, x_dot: Tensor, weight_dot: Tensor, bias_dot: Tensor, *memory: Tensor) -> Tensor:
    y_dot = torch.empty_like(memory[0])
    arrays = [_array(tangent) for tangent in (weight_dot, bias_dot)]
    batch_norm_jvp(_array(x_dot), run.saved(*memory), *arrays, out=_array(y_dot))
    return y_dot


@_kernel(f"(Tensor v, Tensor v_weight, Tensor v_bias, Tensor dy, {_MEMORY}) -> (Tensor, Tensor, Tensor)")
def _double_backward(
    run: _Run, v: Tensor, v_weight: Tensor, v_bias: Tensor, dy: Tensor, *memory: Tensor
) -> tuple[Tensor, ...]:
    arrays = [_array(cotangent) for cotangent in (v_weight, v_bias)]
    ddy, ddx, ddweight = batch_norm_double_backward(_array(v), _array(dy), run.saved(*memory), *arrays)
    return _tensor(ddy), _tensor(ddx), _tensor(ddweight).to(memory[1].dtype)


# ---- The rules: each operation is linear in its first arguments, and its derivatives are among the four --------------


class _Operation(torch.autograd.Function):
    """An operation whose last arguments are a forward's x, weight, mean, m2, rstd and `_Run`.

    The statistics are given no gradients: the rules for x know of them.
    """

    kernel: Any

    @classmethod
    def forward(cls, *arguments: Any) -> Any:
        *tensors, run = arguments
        return cls.kernel(*tensors, run.number)

    @staticmethod
    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        *tensors, ctx.run = inputs
        _keep(ctx, *tensors)

    @classmethod
    def vmap(cls, info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        """Do all batches of `torch.vmap` at once: their channels become the channels of one batch."""
        size = info.batch_size
        output = cls.apply(*(_folded(t, dim, size) for t, dim in zip(arguments, in_dims, strict=True)))
        if isinstance(output, torch.Tensor):
            return _unfolded(output, size), 1
        return tuple(_unfolded(t, size) for t in output), tuple(min(t.ndim - 1, 1) for t in output)


def _keep(ctx: Any, *tensors: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _folded(argument: Any, dim: int | None, size: int) -> Any:
    """Return `size` tensors (N, C, *S) or (C,), along the axis `dim` or all the same, as (N, size·C, *S)."""
    if not isinstance(argument, torch.Tensor):
        return argument
    t = argument.expand(size, *argument.shape) if dim is None else argument.movedim(dim, 0)
    return t.flatten() if t.ndim == 2 else t.transpose(0, 1).flatten(1, 2)


def _unfolded(t: Tensor, size: int) -> Tensor:
    """Return (N, size·C, *S) as (N, size, C, *S), and (size·C,) as (size, C)."""
    return t.unflatten(min(t.ndim - 1, 1), (size, -1))


def _or_zeros(*pairs: tuple[Tensor | None, Tensor]) -> list[Tensor]:
    """Return the first of each pair, or zeros like the second."""
    return [torch.zeros_like(like) if given is None else given for given, like in pairs]


def _forward_mode(rule: Callable[..., Any]) -> Any:
    """Return a rule of forward mode, of a run, saved tensors and tangents, as PyTorch calls one.

    PyTorch calls a rule with forward mode switched off, and nested `torch.func.jvp` would give 0 without an error.
    """

    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return rule(ctx.run, [forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors], *tangents)

    return staticmethod(jvp)


class _Forward(_Operation):
    """(E3) y of x, weight, bias and, or None, fixed mean and var; and the statistics that the others take."""

    kernel = _forward

    @staticmethod
    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        x, weight, *_, ctx.run = inputs
        ctx.mark_non_differentiable(*output[1:])
        _keep(ctx, x, weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        return *_Backward.apply(dy, *ctx.saved_tensors, ctx.run), None, None, None

    @_forward_mode
    def jvp(run: _Run, memory: Any, x_dot: Any, weight_dot: Any, bias_dot: Any, *_: None) -> Any:  # noqa: N805
        x, weight, *_ = memory
        tangents = _or_zeros((x_dot, x), (weight_dot, weight), (bias_dot, weight))
        return _Jvp.apply(*tangents, *memory, run), None, None, None


class _Backward(_Operation):
    """(E5, E6, E7) dx, dweight and dbias, the gradients of ⟨dy, y⟩ by x, weight and bias; linear in dy."""

    kernel = _backward

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, v_weight: Tensor | None, v_bias: Tensor | None) -> tuple[Any, ...]:
        _, x, weight, *_ = ctx.saved_tensors
        cotangents = _or_zeros((v, x), (v_weight, weight), (v_bias, weight))
        return *_DoubleBackward.apply(*cotangents, *ctx.saved_tensors, ctx.run), *[None] * 4

    @_forward_mode
    def jvp(run: _Run, saved: Any, dy_dot: Any, x_dot: Any, weight_dot: Any, *_: None) -> Any:  # noqa: N805
        dy, *memory = saved
        x, weight, *_ = memory
        dy_dot, x_dot, weight_dot = _or_zeros((dy_dot, dy), (x_dot, x), (weight_dot, weight))
        dx, dweight, dbias = _Backward.apply(dy_dot, *memory, run)
        # E9 is the Hessian of ⟨dy, y⟩ times a vector, and a Hessian is symmetric.
        _, ddx, ddweight = _DoubleBackward.apply(x_dot, weight_dot, torch.zeros_like(weight), *saved, run)
        return dx + ddx, dweight + ddweight, dbias


class _Jvp(_Operation):
    """(E8) y_dot, the change of y along x_dot, weight_dot and bias_dot; linear in these."""

    kernel = _jvp

    @staticmethod
    def backward(ctx: Any, u: Tensor | None) -> tuple[Tensor | None, ...]:
        if u is None:
            return (None,) * 9
        tangents, memory = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        by_tangents = _Backward.apply(u, *memory, ctx.run)
        # ⟨u, y_dot⟩ is ⟨tangents, (E5, E6) of u⟩, whose gradients are E9.
        _, *by_memory = _DoubleBackward.apply(*tangents, u, *memory, ctx.run)
        return *by_tangents, *by_memory, *[None] * 4

    @_forward_mode
    def jvp(run: _Run, saved: Any, *changes: Any) -> Tensor:  # noqa: N805
        *inner, x_dot, weight_dot = _or_zeros(*zip(changes, saved[:5], strict=False))
        # The second derivative of y along two directions multiplies dy in the derivative of ⟨dy, y⟩ along both.
        zero = torch.zeros_like(x_dot)
        along_both = _third(run, (*saved[:3], zero, *saved[3:]), (zero, x_dot, weight_dot))[3]
        return _Jvp.apply(*inner, *saved[3:], run) + along_both


class _DoubleBackward(_Operation):
    """(E9) The gradients of ⟨v, dx⟩ + ⟨v_weight, dweight⟩ + ⟨v_bias, dbias⟩ by dy, x and weight."""

    kernel = _double_backward

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        given = _or_zeros(*zip(cotangents, ctx.saved_tensors[3:], strict=False))
        return *_third(ctx.run, ctx.saved_tensors, given), *[None] * 4

    @_forward_mode
    def jvp(run: _Run, saved: Any, *changes: Any) -> Any:  # noqa: N805
        given = _or_zeros(*zip(changes, saved[:6], strict=False))
        first = _DoubleBackward.apply(*given[:3], *saved[3:], run)
        rest = _third(run, saved, given[3:])[3:]  # E9 is a gradient, so that its derivative is symmetric
        return tuple(a + b for a, b in zip(first, rest, strict=True))


def _third(run: _Run, arguments: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of ⟨cotangents, (E9)⟩ by v, v_weight, v_bias, dy, x and weight.

    PyTorch differentiates the formula of the reference, as often as is asked for.
    """
    if run.pool is not None:
        raise RuntimeError(
            "expected at most two derivatives of a batch norm over several ranks; got a third, which has no exchange of"
            " sums between ranks. Compute a third derivative on one rank"
        )
    *variables, mean, _, rstd = arguments
    _, pull = torch.func.vjp(functools.partial(_second_formula, run, mean, rstd), *variables)
    return pull(tuple(cotangents))  # type: ignore[no-any-return]


def _second_formula(run: _Run, mean: Tensor, rstd: Tensor, *variables: Tensor) -> tuple[Tensor, ...]:
    """(E9) Return ddy, ddx and ddweight, in operations that PyTorch can differentiate."""
    v, v_weight, v_bias, dy, x, weight = variables
    a, b, c = (t.reshape(*t.shape[:2], x.shape[2:].numel()) for t in (v, dy, x))
    gamma, v_gamma, v_beta = (t.to(mean.dtype) for t in (weight, v_weight, v_bias))
    if run.n is None:
        second = functools.partial(reference.evaluation_double_backward, reference, a, b, c, mean)
    else:
        batch = reference.batch_moments(reference, c)
        rstd = reference.batch_rstd(batch.m2, batch.n, run.eps)
        second = functools.partial(reference.double_backward, reference, a, b, c, batch)
    ddy, ddx, ddweight = second(rstd, gamma, v_gamma, v_bias=v_beta)
    return ddy.reshape(x.shape).to(dy.dtype), ddx.reshape(x.shape), ddweight.to(weight.dtype)


# ---- The function ----------------------------------------------------------------------------------------------------


def _opaque(function: Callable[..., Any]) -> Any:
    """Let torch.compile call the function as ordinary Python between two graphs."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return call


@_opaque
def batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize each channel, as `torch.nn.functional.batch_norm` does: y = weight·(x − mean)/√(var + eps) + bias (E3).

    Parameters
    ----------
    input : Tensor (N, C, *S)
        The batch: float16, bfloat16, float32 or float64, in any memory layout, on a CPU or a CUDA GPU.
    running_mean, running_var : Tensor (C,) or None
        In training they take in the batch, in place (E4). Otherwise they are the statistics (E7). Both or neither.
    weight, bias : Tensor (C,), optional
        γ and β, of any of these dtypes; 1 and 0 where None.
    training : bool
        True to use the statistics of the batch.
    momentum : float
        The weight of the batch in the running statistics; 0 leaves them as they are.
    eps : float
        ε ≥ 0, in units of input².

    Returns
    -------
    Tensor (N, C, *S)
        In the dtype and memory format of input.

    Raises
    ------
    TypeError
        The dtype is another one, or the tensor is on another kind of device.
    ValueError
        A shape does not fit, running statistics are missing, or each channel has one value in training. Nothing has
        changed.
    RuntimeError
        Inside `torch.jit.trace`, `torch.export` or make_fx, which cannot record this function.

    Notes
    -----
    The first and second derivatives, in reverse and in forward mode, are E5 to E9, by the kernels of arraybn. PyTorch
    makes further derivatives from the formula E9. `torch.func.grad`, `jvp`, `vmap` and what is made of them work, and
    `torch.compile` calls this function between two graphs. An empty batch leaves the running statistics as they are.

    References
    ----------
    ``torch.nn.functional.batch_norm``, whose third derivative is wrong in PyTorch 2.13 on a CPU.

    Examples
    --------
    >>> import torch, arraybn.pytorch
    >>> x = torch.tensor([[0.0], [0.1], [0.3], [0.7]], dtype=torch.float64, requires_grad=True)
    >>> torch.autograd.gradgradcheck(lambda x: arraybn.pytorch.batch_norm(x, None, None, training=True), x)
    True
    """
    statistics, settings = (running_mean, running_var), (momentum, eps)
    return _batch_norm(None, input, statistics, (weight, bias), training, *settings)[0]


def _batch_norm(
    call: Call | None,
    x: Tensor,
    running: Sequence[Any],
    affine: Sequence[Tensor | None],
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, int | None]:
    """Return y and n, the values of each channel in the batch; as a part of `call`, or alone."""
    if is_recorded(x):
        raise RuntimeError(
            "input: expected a tensor with values; got one of torch.jit.trace, torch.export or make_fx, which cannot"
            " record this batch norm. Record the model with a batch norm of torch.nn, which takes the same state dict"
        )
    _check_vectors(x, running, affine, training)
    run = _Run(eps, call)
    vectors = [
        torch.full(x.shape[1:2], value, device=x.device) if vector is None else vector
        for vector, value in zip(affine, (1.0, 0.0), strict=True)
    ]
    y, mean, m2, _ = _Forward.apply(x, *vectors, *((None, None) if training else running), run)
    if training and run.n == 1:
        if call is not None:
            call.every_rank_raises()
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}."
            " Leave out the last incomplete batch, or use eval()"
        )
    running_mean, running_var = running
    if training and run.n and running_mean is not None and momentum != 0:  # 0·NaN would be NaN
        with torch.no_grad():
            var = Moments(run.n, mean, m2).var(1)
            new = reference.update_running_stats(running_mean, running_var, mean, var, momentum)
            running_mean.copy_(new[0]), running_var.copy_(new[1])
    return y, run.n


def _check_vectors(
    x: Tensor, running: Sequence[Tensor | None], affine: Sequence[Tensor | None], training: bool
) -> None:
    if x.ndim < 2:
        raise ValueError(f"expected at least 2D input (got {x.ndim}D input)")
    names = "running_mean", "running_var", "weight", "bias"
    for name, vector in zip(names, (*running, *affine), strict=True):
        if vector is not None and tuple(vector.shape) != tuple(x.shape[1:2]):
            expected = f"({x.shape[1]},), one value per channel of input"
            raise ValueError(f"{name}: expected shape {expected}; got {tuple(vector.shape)}")
    missing = [name for name, vector in zip(names, running, strict=False) if vector is None]
    if len(missing) == 1 or (missing and not training):
        because = "because the other is given" if training else "because training is False"
        raise ValueError(f"{missing[0]}: expected a tensor, {because}; got None")


# ---- The modules -----------------------------------------------------------------------------------------------------

_TorchBatchNorm: Any = torch.nn.modules.batchnorm._BatchNorm


class _Ours:
    """The forward of the modules, before a class of torch.nn that has all else."""

    @_opaque
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalize input (N, C, *S), with the batch's statistics in training and the running ones in evaluation."""
        return self._normalized(None, input)

    def _normalized(self: Any, call: Call | None, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        tracks = self.training and self.track_running_stats
        running = (self.running_mean, self.running_var) if tracks or not self.training else (None, None)
        count, momentum = self.num_batches_tracked if tracks else None, self.momentum
        if momentum is None:  # the average of all batches so far
            momentum = 0.0 if count is None else 1 / (float(count) + 1)
        affine, training = (self.weight, self.bias), self._uses_batch_statistics()
        y, n = _batch_norm(call, x, running, affine, training, momentum, self.eps)
        if count is not None and n:
            count.add_(1)
        return y

    def _uses_batch_statistics(self: Any) -> bool:
        return self.training or (self.running_mean is None and self.running_var is None)


class BatchNorm1d(_Ours, torch.nn.BatchNorm1d):
    """Batch normalization of tensors (N, C) or (N, C, L): a ``torch.nn.BatchNorm1d`` that arraybn computes.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype, bias : optional
        As in ``torch.nn.BatchNorm1d``, and so are parameters, buffers, state dicts, hooks and repr.

    Notes
    -----
    See `batch_norm` for dtypes, devices and derivatives. An empty batch counts for nothing, a call that raises has
    changed nothing, and a constant channel gives exactly `bias`. Set ``layer.__class__ = BatchNorm1d`` to turn a layer
    of torch.nn into one of these.

    Examples
    --------
    >>> import torch, arraybn.pytorch
    >>> layer = arraybn.pytorch.BatchNorm1d(2)
    >>> layer(torch.tensor([[1.0, 4.0], [3.0, 4.0]])).sum().backward()
    >>> layer.bias.grad
    tensor([2., 2.])
    """


class BatchNorm2d(_Ours, torch.nn.BatchNorm2d):
    """Batch normalization of tensors (N, C, H, W); everything else as `BatchNorm1d`.

    Examples
    --------
    >>> import torch, arraybn.pytorch
    >>> arraybn.pytorch.BatchNorm2d(3)(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """


class BatchNorm3d(_Ours, torch.nn.BatchNorm3d):
    """Batch normalization of tensors (N, C, D, H, W); everything else as `BatchNorm1d`.

    Examples
    --------
    >>> import torch, arraybn.pytorch
    >>> arraybn.pytorch.BatchNorm3d(3)(torch.ones(2, 3, 4, 4, 4)).shape
    torch.Size([2, 3, 4, 4, 4])
    """


class SyncBatchNorm(_Ours, torch.nn.SyncBatchNorm, OfRanks):
    """Batch normalization of tensors (N, C, *S) on CPUs or GPUs with the statistics of all ranks' batches together.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype, bias : optional
        As in ``torch.nn.SyncBatchNorm``.
    process_group : mpi4py communicator, optional
        The ranks that synchronize; None for all ranks.
    timeout : float or None
        Seconds to wait for the other ranks, None for ever.

    Notes
    -----
    Ranks are synchronized by MPI when batch statistics are used. A forward, and each first or second derivative, is
    then a call of all ranks with one exchange. A third derivative is a RuntimeError. Errors on one rank are a
    `arraybn.SyncError` on all, as in `arraybn.SyncBatchNorm`. The gradients of weight and bias are local sums, as in
    PyTorch: add up or average the gradients of the model over the ranks.

    Examples
    --------
    >>> import torch, arraybn.pytorch
    >>> from arraybn.testing import ThreadComm
    >>> def work(comm):
    ...     layer = arraybn.pytorch.SyncBatchNorm(1, process_group=comm)
    ...     return layer(torch.tensor([[1.0], [3.0]]).double() + 4 * comm.rank).detach().numpy().round(2).tolist()
    >>> ThreadComm.run(2, work)
    [[[-1.34], [-0.45]], [[0.45], [1.34]]]
    """

    _path = ""  # path in the model at conversion

    def __init__(self, *arguments: Any, timeout: float | None = sync.TIMEOUT, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.timeout = timeout

    @_opaque
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalize as `BatchNorm1d` does, with the statistics of all ranks; an error is a SyncError on all ranks."""
        call = self._begin() if self._uses_batch_statistics() else None
        with call or ALONE:
            return self._normalized(call, input)

    def _begin(self) -> Call | None:
        exchange = sync.exchange_over("process_group", self.process_group)
        names = "num_features", "eps", "momentum", "affine", "track_running_stats", "training"
        settings = {name: sync.settings_text(getattr(self, name)) for name in names}
        settings["bias"] = str(self.bias is not None)
        layer = f"layer {self._path!r}" if self._path else self
        return sync.begin(exchange, sync.FORWARD, layer, settings, timeout=self.timeout)

    @classmethod
    def convert_sync_batchnorm(cls, module: Any, process_group: Comm | None = None) -> Any:
        """Call `convert_sync_batchnorm`."""
        return convert_sync_batchnorm(module, process_group)


def convert_sync_batchnorm(module: Any, comm: Comm | None = None, *, timeout: float | None = sync.TIMEOUT) -> Any:
    """Turn every batch norm in the module, of torch.nn or of arraybn, into a `SyncBatchNorm`, and return the module.

    Parameters
    ----------
    module : torch.nn.Module
        The model, or one layer. The layers stay the same objects, with their parameters, buffers and hooks.
    comm : mpi4py communicator, optional
        The ranks that synchronize; None for all ranks.
    timeout : float or None
        Seconds that every layer waits for the other ranks, None for ever.

    Returns
    -------
    torch.nn.Module
        The module that was given.

    Raises
    ------
    TypeError, ValueError
        module is no torch.nn.Module; comm is no communicator, is null or an intercommunicator; timeout is no number of
        seconds > 0. Nothing has been changed.

    Examples
    --------
    >>> import torch, arraybn.pytorch
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    >>> type(arraybn.pytorch.convert_sync_batchnorm(model)[0])
    <class 'arraybn.pytorch.SyncBatchNorm'>
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module; got {class_name(module)}")
    sync.check_comm("comm", comm)
    sync.as_timeout(timeout)
    for path, layer in module.named_modules():
        if isinstance(layer, _TorchBatchNorm):
            layer.__class__ = SyncBatchNorm
            layer._path, layer.process_group, layer.timeout = path, comm, timeout
    return module

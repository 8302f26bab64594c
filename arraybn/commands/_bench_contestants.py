"""Who takes part in ``python -m arraybn bench``: batch norms of several libraries, called as their users call them.

Each `…_calls(problem)` runs in the process of its library. It makes what a call needs beforehand, and returns for each
row of the table what may be timed: functions without arguments. "forward", "eval" and "layer" return y; "backward"
and "step" return dx, or a tuple of dx, dweight and dbias.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .._arrays.copies import as_numpy
from ..functional import batch_norm, batch_norm_backward
from ..kernels import threads as _threads
from ..layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ._bench_cases import Array, Case, Problem, parts

Call = Callable[[], Any]


@dataclass(frozen=True)
class Library:
    """Whose process it is, what it needs, how to get that, and the function that prepares its calls."""

    name: str  # as --peers has it
    title: str
    needs: tuple[str, ...]
    pip: str
    build: str  # module:function
    held: int  # arrays like x that it keeps between its turns
    ours: bool = False  # held to the promises of arraybn

    @property
    def missing(self) -> bool:
        """Whether a package that it needs is not installed; none is imported."""
        return any(importlib.util.find_spec(name) is None for name in self.needs)


ARRAYBN = Library("arraybn", "arraybn", ("numpy",), "numpy", f"{__name__}:arraybn_calls", 3, True)
PEERS = (
    Library("reference", "arraybn reference", ("numpy",), "numpy", f"{__name__}:reference_calls", 2, True),
    Library("numpy", "NumPy formulas", ("numpy",), "numpy", f"{__name__}:numpy_calls", 3),
    Library("torch", "PyTorch", ("torch",), "torch", f"{__name__}:torch_calls", 3),
    Library("jax", "JAX", ("jax",), "jax", f"{__name__}:jax_calls", 4),
    Library("tensorflow", "TensorFlow", ("tensorflow",), "tensorflow", f"{__name__}:tensorflow_calls", 3),
)
WORKING = 8  # arrays like x that the greediest has for a while beside what it holds: the reference, in float64


def has_numba() -> bool:
    """Whether arraybn has its compiled kernels; without, it works by its reference."""
    return importlib.util.find_spec("numba") is not None


class Prepared(NamedTuple):
    """The calls by row and by what they do, or a text that says why there is none; and how to read a result like x."""

    rows: dict[str, dict[str, Call] | str]
    read: Callable[[Any], Array]  # (N, C, *S)


def channels_first(case: Case) -> Callable[[Any], Array]:
    """How to read what has the layout and shape of x, or the same values in more axes."""

    def read(array: Any) -> Array:
        result: Array = np.moveaxis(as_numpy("result", array).reshape(case.in_memory), case.channel_axis, 1)
        return result

    return read


# ---- arraybn ---------------------------------------------------------------------------------------------------------


def arraybn_calls(problem: Problem) -> Prepared:
    """Into new arrays and into one that is there already; and the copy that sets the limit."""
    case, x, dy, weight, bias, mean, var, eps = problem
    options: Any = {"eps": eps, "channel_axis": case.channel_axis}
    fixed: Any = {"mean": mean, "var": var}
    out, saved = batch_norm(x, weight, bias, **options)
    new = {
        "forward": lambda: batch_norm(x, weight, bias, **options)[0],
        "backward": lambda: batch_norm_backward(dy, saved),
        "eval": lambda: batch_norm(x, weight, bias, **fixed, **options)[0],
        **_layer_calls(problem),
    }
    given = {
        "forward": lambda: batch_norm(x, weight, bias, out=out, **options)[0],
        "backward": lambda: batch_norm_backward(dy, saved, out=out),
        "eval": lambda: batch_norm(x, weight, bias, **fixed, out=out, **options)[0],
    }
    copy = {"copy": copying(x, out, _threads.get_num_threads())}
    return Prepared({"numpy.copyto": copy, "arraybn, out=": given, "arraybn": new}, channels_first(case))


def _layer_calls(problem: Problem) -> dict[str, Call]:
    case, x, dy = problem[:3]
    kind = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}[len(case.shape)]
    layer = kind(case.shape[1], eps=problem.eps, channel_axis=case.channel_axis, dtype=case.dtype)
    layer.load_state_dict({"weight": problem.weight, "bias": problem.bias}, strict=False)

    def step() -> Any:
        layer(x)
        return layer.backward(dy)

    return {"layer": lambda: layer(x), "step": step}


def copying(source: Array, target: Array, threads: int) -> Call:
    """``numpy.copyto(target, source)``, each thread one contiguous part."""
    pairs = list(zip(parts(target, threads), parts(source, threads), strict=True))
    pool = ThreadPoolExecutor(max(1, threads - 1))

    def copy() -> None:
        others = [pool.submit(np.copyto, *pair) for pair in pairs[1:]]
        np.copyto(*pairs[0])
        for other in others:
            other.result()

    return copy


def reference_calls(problem: Problem) -> Prepared:
    """The generic sweeps, which are the maths as it is read."""
    case, x, dy, weight, bias, mean, var, eps = problem
    options: Any = {"eps": eps, "channel_axis": case.channel_axis, "kernels": "reference"}
    _, saved = batch_norm(x, weight, bias, **options)
    calls = {
        "forward": lambda: batch_norm(x, weight, bias, **options)[0],
        "backward": lambda: batch_norm_backward(dy, saved),
        "eval": lambda: batch_norm(x, weight, bias, mean=mean, var=var, **options)[0],
    }

    def step() -> Any:
        return batch_norm_backward(dy, batch_norm(x, weight, bias, **options)[1])

    return Prepared({"arraybn reference": {**calls, "layer": calls["forward"], "step": step}}, channels_first(case))


# ---- The others ------------------------------------------------------------------------------------------------------


def numpy_calls(problem: Problem) -> Prepared:
    """The formulas in the dtype of x, as they stand in many a notebook."""
    case, x, dy, *vectors = problem[:7]
    axis = tuple(i for i in range(x.ndim) if i != case.channel_axis % x.ndim)
    shape = (1, -1, *[1] * (x.ndim - 2)) if case.channel_axis == 1 else (-1,)
    weight, bias, fixed_mean, fixed_var = (vector.reshape(shape) for vector in vectors)
    eps, n = x.dtype.type(problem.eps), x.size // case.shape[1]

    def forward() -> Any:
        mean, var = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
        return weight * (x - mean) / np.sqrt(var + eps) + bias

    rstd = 1 / np.sqrt(x.var(axis, keepdims=True) + eps)
    xhat = (x - x.mean(axis, keepdims=True)) * rstd  # a forward keeps it for its backward

    def gradients(xhat: Array, rstd: Array) -> Any:
        dbias, dweight = dy.sum(axis, keepdims=True), (dy * xhat).sum(axis, keepdims=True)
        dx = weight * rstd * (dy - dbias / n - xhat * (dweight / n))
        return dx, dweight.ravel(), dbias.ravel()

    def evaluate() -> Any:
        return weight * (x - fixed_mean) / np.sqrt(fixed_var + eps) + bias

    def step() -> Any:
        mean, var = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
        rstd = 1 / np.sqrt(var + eps)
        xhat = (x - mean) * rstd
        _ = weight * xhat + bias
        return gradients(xhat, rstd)

    calls: dict[str, Call] = {"forward": forward, "backward": lambda: gradients(xhat, rstd), "eval": evaluate}
    return Prepared({"NumPy formulas": {**calls, "layer": forward, "step": step}}, channels_first(case))


def torch_calls(problem: Problem) -> Prepared:
    """The function and the module in training with gradients enabled, the backward by autograd."""
    torch = importlib.import_module("torch")
    case, eps = problem.case, problem.eps
    x, dy = (torch.movedim(torch.from_numpy(array), case.channel_axis, 1) for array in (problem.x, problem.dy))
    weight, bias, mean, var = map(torch.from_numpy, problem[3:7])
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def forward() -> Any:
        return torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

    def evaluate() -> Any:
        with torch.no_grad():
            return torch.nn.functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(case.shape)]
    module = getattr(torch.nn, kind)(case.shape[1], eps=eps, dtype=x.dtype)
    module.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    leaves = [x, module.weight, module.bias]
    y = forward()
    calls: dict[str, Call] = {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True),
        "eval": evaluate,
        "layer": lambda: module(x),
        "step": lambda: torch.autograd.grad(module(x), leaves, dy),
    }
    return Prepared({"PyTorch": calls}, lambda result: np.asarray(as_numpy("result", result)))


def jax_calls(problem: Problem) -> Prepared:
    """Formulas of jax.numpy, compiled: the forward with its statistics, the backward of what the forward kept."""
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", problem.case.dtype == "float64")
    case, eps = problem.case, problem.eps
    axis = tuple(i for i in range(problem.x.ndim) if i != case.channel_axis % problem.x.ndim)
    shape = (-1, *[1] * (problem.x.ndim - 2)) if case.channel_axis == 1 else (-1,)
    x, dy, weight, bias, mean, var = map(jax.numpy.asarray, problem[1:7])

    def normalized(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
        mean, scale, bias = (v.reshape(shape) for v in (mean, weight * jax.lax.rsqrt(var + eps), bias))
        return (x - mean) * scale + bias

    def forward(x: Any, weight: Any, bias: Any) -> Any:
        mean, var = x.mean(axis), x.var(axis)
        return normalized(x, mean, var, weight, bias), (mean, var)

    def step(x: Any, weight: Any, bias: Any, dy: Any) -> Any:
        y, pull, stats = jax.vjp(forward, x, weight, bias, has_aux=True)
        return *pull(dy), y, stats

    forward, normalized, step = map(jax.jit, (forward, normalized, step))
    _, pull, _ = jax.jit(lambda *arrays: jax.vjp(forward, *arrays, has_aux=True))(x, weight, bias)
    backward, wait = jax.jit(lambda pull, dy: pull(dy)), jax.block_until_ready
    calls: dict[str, Call] = {
        "forward": lambda: wait(forward(x, weight, bias))[0],
        "backward": lambda: wait(backward(pull, dy)),
        "eval": lambda: wait(normalized(x, mean, var, weight, bias)),
        "layer": lambda: wait(forward(x, weight, bias))[0],
        "step": lambda: wait(step(x, weight, bias, dy))[:3],
    }
    return Prepared({"JAX": calls}, channels_first(case))


def tensorflow_calls(problem: Problem) -> Prepared:
    """The fused op and its gradient, called one by one (eagerly)."""
    case = problem.case
    if case.dtype != "float32":
        return Prepared({"TensorFlow": f"its fused op takes no {case.dtype}"}, channels_first(case))
    tf = importlib.import_module("tensorflow")
    n, c, *s = case.shape
    last = case.layout == "last" or not s
    image = (n, *(s[:1] or [1]), -1, c) if last else (n, c, s[0], -1)
    x, dy = (tf.constant(array.reshape(image)) for array in (problem.x, problem.dy))
    weight, bias, mean, var = map(tf.constant, problem[3:7])
    nothing, ops = tf.constant([], tf.float32), tf.raw_ops
    options = {"epsilon": problem.eps, "data_format": "NHWC" if last else "NCHW"}

    def forward() -> Any:
        return ops.FusedBatchNormV3(
            x=x, scale=weight, offset=bias, mean=nothing, variance=nothing, is_training=True, **options
        )

    def backward(fused: Any) -> Any:
        kept = {f"reserve_space_{i}": getattr(fused, f"reserve_space_{i}") for i in (1, 2, 3)}
        return tuple(
            ops.FusedBatchNormGradV3(y_backprop=dy, x=x, scale=weight, is_training=True, **kept, **options)[:3]
        )

    def evaluate() -> Any:
        return ops.FusedBatchNormV3(
            x=x, scale=weight, offset=bias, mean=mean, variance=var, is_training=False, **options
        ).y

    fused = forward()
    calls: dict[str, Call] = {"forward": lambda: forward().y, "backward": lambda: backward(fused), "eval": evaluate}
    calls |= {"layer": calls["forward"], "step": lambda: backward(forward())}
    return Prepared({"TensorFlow": calls}, channels_first(case))

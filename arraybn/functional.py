"""The functions that users call: validate, choose a backend, call the backend, place the result.

Each function takes arrays and returns arrays, and keeps or changes nothing else. The maths is in ``reference.py``.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

from . import sync
from ._arrays.copies import copied
from ._arrays.devices import on_device_of
from ._arrays.layout import Layout
from ._arrays.memory import overlap, same_memory
from ._arrays.namespaces import Array, Shaped, array_namespace, common_dtype, dtype_name
from ._checks import as_channel_vector, as_eps, as_floating, as_integer, check_home, check_out
from .kernels import Backend, Module, select
from .reference import Moments
from .sync import Call, Comm, RankPool

_ALONE = nullcontext()


@dataclass(slots=True, eq=False, repr=False)
class Saved:
    """The values that a forward hands to its backward; opaque but for `moments`.

    Attributes
    ----------
    moments : Moments or None
        The batch's statistics; None where fixed statistics were given.
    """

    _moments: Moments | None
    _backend: Backend
    _layout: Layout
    _x: Array  # (N, C, *S), the caller's array; None once x is overwritten
    _overwritten: str | None  # the cause, as a clause
    _mean: Array  # (C,); mean, rstd and weight are private copies
    _rstd: Array
    _weight: Array | None
    _has_bias: bool
    _pool: RankPool | None  # the forward's; None where nothing was synchronized
    _shown: Moments | None = None

    @property
    def moments(self) -> Moments | None:
        """The moments of the batch. Their mean is a copy, made at the first access: the caller may change the mean."""
        if self._shown is None and self._moments is not None:
            self._shown = replace(self._moments, mean=copied(self._moments.mean))
        return self._shown

    def __repr__(self) -> str:
        n = self._layout.n if self._moments is None else self._moments.n
        dtype = "" if self._x is None else f" dtype={dtype_name(self._x.dtype)},"
        return f"Saved(shape={self._layout.shape},{dtype} n={n}, backend={self._backend.name!r})"

    def _backward_call(self) -> Call | None:
        return None if self._pool is None else self._pool.call.backward()


def batch_norm(
    x: Shaped,
    weight: Shaped | None = None,
    bias: Shaped | None = None,
    *,
    mean: Shaped | None = None,
    var: Shaped | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    comm: Comm | None = None,
    out: Shaped | None = None,
    kernels: str | Module | None = None,
) -> tuple[Array, Saved]:
    """Normalize each channel of x over its batch: y = weight·(x − mean)/√(var + eps) + bias (E3).

    Parameters
    ----------
    x : array (N, C, *S)
        The batch: float16, bfloat16, float32 or float64, in any memory layout.
    weight, bias : array (C,), optional
        γ and β, of any of these dtypes; 1 and 0 where None.
    mean, var : array (C,), optional
        Fixed statistics, as in evaluation (E7). Without them the batch's own are used, var biased. Both or neither.
    eps : float
        ε ≥ 0, in units of x². With eps = 0 a constant channel has xhat = 0.
    channel_axis : int
        The axis that is kept; -1 for channels-last.
    comm : mpi4py communicator, optional
        Its ranks call this together, each with a part of the batch, which may be empty; the statistics are those of
        the whole. The backward is then a call of all ranks as well. Not used with fixed statistics.
    out : array, optional
        Takes y: of the shape, dtype and device of y, disjoint from the inputs or x itself. A forward in place has no
        backward.
    kernels : str or module, optional
        Forces a kernel module ("reference", "cpu", "cuda", "cuda_fused"); the backward uses its forward's.

    Returns
    -------
    y : array (N, C, *S)
        In the dtype and memory layout of x; `out` where given.
    saved : Saved
        For `batch_norm_backward`. Holds x by reference (changing x before the backward gives wrong gradients, and
        cannot be detected) and copies of all else. `saved.moments` are the batch's `Moments`.

    Raises
    ------
    TypeError
        An argument is no array, of another namespace than x, or of another dtype than the four.
    ValueError
        A shape, device or option does not fit, or `out` partly overlaps an input.
    SyncError
        With `comm`, on every rank: one of these on some rank, or the ranks are not in the same call.

    Notes
    -----
    Statistics are kept in float64 where the namespace has it. The mean is subtracted before anything is scaled:
    E[x²] − E[x]² and x·scale + (bias − mean·scale) would lose every digit when |mean| ≫ std. A constant channel gives
    exactly `bias`. An empty batch gives an empty y.

    Over `comm` the moments of the ranks are pooled in one collective of fixed length, which is exact for parts of any
    size (E2); more than 256 channels take a second. All ranks have the same bits in `saved.moments`.

    References
    ----------
    S. Ioffe, C. Szegedy, Batch Normalization, 2015, algorithm 1.

    Examples
    --------
    >>> import numpy, arraybn
    >>> x = numpy.asarray([[1.0, 7.0], [3.0, 7.0]])
    >>> y, saved = arraybn.batch_norm(x, bias=numpy.asarray([0.0, 0.5]), eps=0)
    >>> y
    array([[-1. ,  0.5],
           [ 1. ,  0.5]])
    >>> dx, dweight, dbias = arraybn.batch_norm_backward(numpy.ones((2, 2)), saved)
    >>> dx, dweight, dbias
    (array([[0., 0.],
           [0., 0.]]), None, array([2., 2.]))
    """
    call = None
    if comm is not None and (mean is None or var is None):  # mean without var is an error, and needs no exchange
        settings = {"eps": sync.settings_text(eps)}
        call = sync.begin(sync.exchange_over("comm", comm), sync.FORWARD, "batch_norm", settings)
    with call or _ALONE, on_device_of(x):
        return forward_in(
            call, x, weight, bias, mean=mean, var=var, eps=eps, channel_axis=channel_axis, out=out, kernels=kernels
        )


def forward_in(
    call: Call | None,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    *,
    mean: Array | None = None,
    var: Array | None = None,
    eps: float,
    channel_axis: int,
    out: Array | None = None,
    kernels: str | Module | None = None,
) -> tuple[Array, Saved]:
    """Carry out `batch_norm` as a part of `call`, or alone."""
    x = as_floating("x", x)
    layout = Layout.of(x, as_integer("channel_axis", channel_axis))
    channels = layout.ncs[1]
    eps = as_eps(eps)
    if (mean is None) != (var is None):
        given, missing = ("mean", "var") if var is None else ("var", "mean")
        raise ValueError(f"{missing}: expected an array, because {given} is given; got None")
    weight, bias = as_channel_vector("weight", weight, x, channels), as_channel_vector("bias", bias, x, channels)
    if mean is not None:
        mean, var = as_channel_vector("mean", mean, x, channels), as_channel_vector("var", var, x, channels)
    if out is not None:
        check_out(out, x, layout.shape, {"x": x, "weight": weight, "bias": bias, "mean": mean, "var": var})
    backend = select(x, kernels)

    view, target = layout.view(x), None if out is None else layout.view(out)
    if mean is not None:
        moments = pool = None
        mean, rstd, weight, y = backend.evaluate(view, mean, var, weight, bias, eps, target)
    else:
        pool = None if call is None else RankPool(call)
        if pool is not None and target is None:  # after the exchange it is too late to find out that memory is short
            target = backend.preallocate_result(view)
        weight, bias = backend.widened(weight, bias)
        moments, rstd, y = backend.forward(view, weight, bias, eps, pool, target)
        mean = moments.mean
    y = _write_result(y, layout, out, target)
    lost = "the forward wrote y over x (out=x)" if out is not None and same_memory(out, x) else None
    kept = x if lost is None else None
    return y, Saved(moments, backend, layout, kept, lost, mean, rstd, weight, bias is not None, pool)


def batch_norm_backward(
    dy: Shaped, saved: Saved, *, out: Shaped | None = None
) -> tuple[Array, Array | None, Array | None]:
    """Return the gradients of a loss by x, weight and bias, from its gradient dy by y (E5, E6; E7 if fixed).

    Parameters
    ----------
    dy : array (N, C, *S)
        Of the shape of x, in any of the four dtypes. Where the dtypes differ, x and dy are both converted, exactly, to
        a dtype that holds both; dx alone is rounded, at the end.
    saved : Saved
        From the forward, whose x must not have been changed since.
    out : array, optional
        Takes dx: of its shape, dtype and device, disjoint from the inputs, or dy or x itself. Over x, this is the last
        backward of that forward.

    Returns
    -------
    dx : array (N, C, *S)
        In the dtype and memory layout of x; sums to zero over each channel, to rounding, where the batch's own
        statistics were used.
    dweight, dbias : array (C,) or None
        Σdy·xhat and Σdy, float64 where the namespace has it; None where the forward had no weight, no bias. After a
        forward with `comm` they are the sums over this rank's part of the batch; dx knows of all parts.

    Raises
    ------
    TypeError
        dy is no array of the namespace of x, or saved does not come from `batch_norm`.
    ValueError
        dy has another shape or device than x, or `out` partly overlaps an input.
    RuntimeError
        x is gone: the forward, or an earlier backward, wrote over it.
    SyncError
        After a forward with `comm`, on every rank: one of these on some rank, or the ranks are not in the same call.

    Examples
    --------
    >>> import numpy, arraybn
    >>> x = numpy.asarray([[1.0], [2.0], [6.0]])
    >>> y, saved = arraybn.batch_norm(x, numpy.ones(1), numpy.zeros(1))
    >>> dx, dweight, dbias = arraybn.batch_norm_backward(numpy.asarray([[1.0], [0.0], [0.0]]), saved)
    >>> bool(abs(dx.sum()) < 1e-15), dbias
    (True, array([1.]))
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved: expected what batch_norm returned beside y; got {type(saved).__name__}")
    call = saved._backward_call()
    with call or _ALONE, on_device_of(dy):
        return backward_in(call, dy, saved, out)


def backward_in(
    call: Call | None, dy: Array, saved: Saved, out: Array | None = None
) -> tuple[Array, Array | None, Array | None]:
    """Carry out `batch_norm_backward` as a part of `call`, or alone."""
    if saved._overwritten is not None:
        raise RuntimeError(
            f"saved: expected a forward whose x is still there; got one without, because {saved._overwritten}."
            f" Pass another array as out, or None"
        )
    layout, x = saved._layout, saved._x
    dy = as_floating("dy", dy)
    check_home("dy", dy, x)
    if tuple(dy.shape) != layout.shape:
        raise ValueError(f"dy: expected shape {layout.shape}, that of x and y; got {tuple(dy.shape)}")
    over_x = False
    if out is not None:
        check_out(out, x, layout.shape, {"dy": dy, "x": x})
        over_x = same_memory(out, x)
    target = None if out is None else layout.view(out)
    wide = None if dy.dtype == x.dtype else common_dtype(dy, x)
    if wide is not None:  # rounding dy first would lose small values of dy, and turn large ones into inf
        dy = array_namespace(dy).astype(dy, wide, copy=False)
    dy, x = layout.view(dy), layout.view(x)
    if wide is None or wide == x.dtype:
        dx, dweight, dbias = _gradients(call, saved, dy, x, target)
    else:
        dx, dweight, dbias = _rounded_gradients(call, saved, dy, x, target)
    dx = _write_result(dx, layout, out, target)
    if over_x:
        saved._x, saved._overwritten = None, "an earlier backward wrote dx over it (out=x)"
    return dx, None if saved._weight is None else dweight, dbias if saved._has_bias else None


def _rounded_gradients(
    call: Call | None, saved: Saved, dy: Array, x: Array, out: Array | None
) -> tuple[Array, Array, Array]:
    """Return dx in the dtype of x, dweight and dbias, computed in the wider dtype of dy."""
    xp = array_namespace(x)
    if call is not None and out is None:  # after the exchange it is too late to find out that memory is short
        out = saved._backend.preallocate_result(x)
    wide, dweight, dbias = _gradients(call, saved, dy, xp.astype(x, dy.dtype), None)
    if out is None:
        return xp.astype(wide, x.dtype), dweight, dbias
    out[...] = xp.astype(wide, x.dtype)
    return out, dweight, dbias


def _gradients(call: Call | None, saved: Saved, dy: Array, x: Array, out: Array | None) -> tuple[Array, Array, Array]:
    """Return dx, dweight and dbias (E5, E6; E7) from dy and x (N, C, S)."""
    backend, rstd, weight = saved._backend, saved._rstd, saved._weight
    if saved._moments is None:
        return backend.evaluation_backward(dy, x, saved._mean, rstd, weight, out)
    pool = None if call is None else RankPool(call, saved._pool)
    if pool is not None and out is None:
        out = backend.preallocate_result(x)
    return backend.backward(dy, x, saved._moments, rstd, weight, pool, out)


def _write_result(result: Array, layout: Layout, out: Array | None, target: Array | None) -> Array:
    """Return `result` in the caller's layout, in `out` where one was given; `target` is `out` as (N, C, S)."""
    if out is None:
        return layout.restore(result)
    if result is not target or not overlap(target, out):  # otherwise the sweep has written into `out`
        out[...] = layout.restore(result)
    return out

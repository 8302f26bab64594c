"""The functions that users call: validate, choose a backend, call the backend, place the result.

Each function takes arrays and returns arrays, and keeps or changes nothing else. The maths is in ``reference.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from . import exact as exact_sums
from . import reference, sync
from ._arrays.copies import copied
from ._arrays.devices import on_device_of
from ._arrays.layout import Layout
from ._arrays.memory import overlap, same_memory
from ._arrays.namespaces import Array, Shaped, array_namespace, common_dtype, dtype_name
from ._checks import (
    as_channel_vector,
    as_eps,
    as_flag,
    as_floating,
    as_integer,
    check_home,
    check_out,
    check_overlap,
    is_plain_like,
)
from ._plan import ALIGNED, CONTIGUOUS, OWNER, Key, Plan, are_same, keep, key_of, place_over
from .kernels import Backend, Module, for_masks
from .reference import Mask, Moments, Totals
from .statistics import Sums, as_moments_of_whole, check_exact, check_sums, mask_of, select_in_mode
from .sync import Call, Comm, RankPool

ALONE = nullcontext()
_LOST_BACKWARD = "an earlier backward wrote dx"
_LOST = "the forward wrote y over x (out=x)"
_PLANS: dict[Key, Plan] = {}
_PARTS = """. A batch in parts takes these calls:
    m = pool(*(moments(p) for p in parts))
    y, saved = batch_norm(p, moments=m)       # for each part p
    s = batch_norm_sums(dy, saved)            # for each part
    dx, dweight, dbias = batch_norm_backward(dy, saved, sums=sum([s, …]))"""


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
    _is_part: bool  # True where the moments of the whole batch were given
    _mask: Mask | None = None  # of batch statistics alone
    _shown: Moments | None = None
    _gradients: tuple[Array, Array] | None = None  # dweight and dbias of all parts, after an exact backward over them

    @property
    def moments(self) -> Moments | None:
        """The moments of the batch. Their mean is a copy, made at the first access: the caller may change the mean."""
        if self._shown is None and self._moments is not None:
            self._shown = replace(self._moments, mean=copied(self._moments.mean))
        return self._shown

    @property
    def _where(self) -> Array | None:
        return None if self._mask is None else self._mask.where

    def __repr__(self) -> str:
        n = self._layout.n if self._moments is None else self._moments.n
        dtype = "" if self._x is None else f" dtype={dtype_name(self._x.dtype)},"
        return f"Saved(shape={self._layout.shape},{dtype} n={n}, backend={self._backend.name!r})"

    def share_of_gradients(self, *own: Array) -> Sequence[list[Array]]:
        """Return the terms of this rank in dweight and dbias of the whole batch, after an exact backward gave `own`.

        The exact sums over all ranks are known on each rank, so the first one has them as its terms, and no other any.
        """
        if self._pool is None or self._gradients is None:
            return [[gradient] for gradient in own]
        first = self._pool.call.exchange.reducer.rank == 0
        return [[gradient] if first else [] for gradient in self._gradients]

    def _backward_call(self, operation: str = sync.BACKWARD) -> Call | None:
        return None if self._pool is None else self._pool.call.backward(operation)


class SavedRows(Saved):
    """A `Saved` of a whole batch whose statistics are rows of one array, which become arrays when they are asked for.

    The rows are mean, m2 (var where statistics are fixed), rstd and weight; further ones are room for the backward.
    """

    __slots__ = ("fixed", "has_weight", "plan", "rows")

    def __init__(
        self,
        backend: Backend,
        layout: Layout,
        x: Array,
        rows: Array,
        affine: tuple[bool, bool],
        *,
        fixed: bool = False,
        plan: Plan | None = None,
    ) -> None:
        self._backend, self._layout, self._x, self.rows = backend, layout, x, rows
        self.has_weight, self._has_bias = affine
        self.fixed, self.plan = fixed, plan
        self._overwritten = self._pool = self._mask = self._shown = self._gradients = None
        self._is_part = False

    def __copy__(self) -> SavedRows:
        return self._of(self._x, self.rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedRows:
        return self._of(copy.deepcopy(self._x, memo), copy.deepcopy(self.rows, memo))

    def _of(self, x: Array, rows: Array) -> SavedRows:
        """Return the same of other arrays."""
        affine = self.has_weight, self._has_bias
        other = SavedRows(self._backend, self._layout, x, rows, affine, fixed=self.fixed, plan=self.plan)
        other._overwritten = self._overwritten
        return other

    _mean = property(lambda self: self.rows[0])
    _rstd = property(lambda self: self.rows[2])
    _weight = property(lambda self: self.rows[3] if self.has_weight else None)
    _moments = property(lambda self: None if self.fixed else Moments(self._layout.n, self.rows[0], self.rows[1]))


def batch_norm(
    x: Shaped,
    weight: Shaped | None = None,
    bias: Shaped | None = None,
    *,
    mean: Shaped | None = None,
    var: Shaped | None = None,
    moments: Moments | None = None,
    where: Shaped | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    comm: Comm | None = None,
    exact: bool = False,
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
    moments : Moments, optional
        Those of the whole batch of which x is a part, as `pool` returns them: of micro-batches, or of the processes of
        another library. Unlike mean and var they depend on x, so the backward takes the sums of all parts. Neither
        with mean and var nor with comm.
    where : array (N, *S) of bool, optional
        A mask, or an array that broadcasts to one: True at the positions that belong to the batch, False at padding.
        The statistics are those of the positions with True, and n is the number of True, over all ranks. y is given
        at every position. No effect with fixed statistics.
    eps : float
        ε ≥ 0, in units of x². With eps = 0 a constant channel has xhat = 0.
    channel_axis : int
        The axis that is kept; -1 for channels-last.
    comm : mpi4py communicator, optional
        Its ranks call this together, each with a part of the batch, which may be empty; the statistics are those of
        the whole. The backward is then a call of all ranks as well. Not used with fixed statistics.
    exact : bool
        True for sums without rounding (E10), here and in the backward, of float16, bfloat16 or float32: y, dx, all
        statistics and gradients have the same bits for any order of the samples, any number of threads and any
        kernels. A split into parts or ranks changes no bit of y, dx or the statistics, nor of dweight and dbias after
        `average_gradients(…, weight=None, exact=True)`. `batch_norm_jvp` and `batch_norm_double_backward` take ordinary
        sums.
    out : array, optional
        Takes y: of the shape, dtype and device of y, disjoint from the inputs or x itself. A forward in place has no
        backward.
    kernels : str or module, optional
        Forces a kernel module ("reference", "cpu", "cuda", "cuda_split", "cuda_cluster"); the backward uses its
        forward's.

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

    A value where `where` is False may be NaN or inf, and changes no result at another position. The backward takes dy
    at every position, because every y depends on the statistics. Let dy be 0 where y is not used: with
    ``numpy.where(mask, dy, 0)``, as ``mask * dy`` keeps a NaN.

    References
    ----------
    Sergey Ioffe and Christian Szegedy, Batch Normalization, 2015, algorithm 1.

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
        settings = {"eps": sync.settings_text(eps), "exact": sync.settings_text(exact)}
        call = sync.begin(sync.exchange_over("comm", comm), sync.FORWARD, "batch_norm", settings)
    with call or ALONE, on_device_of(x):
        return forward_in(
            call,
            x,
            weight,
            bias,
            mean=mean,
            var=var,
            moments=moments,
            where=where,
            eps=eps,
            channel_axis=channel_axis,
            exact=exact,
            out=out,
            kernels=kernels,
        )


def forward_in(
    call: Call | None,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    *,
    mean: Array | None = None,
    var: Array | None = None,
    moments: Moments | None = None,
    where: Array | None = None,
    eps: float,
    channel_axis: int,
    exact: bool = False,
    out: Array | None = None,
    kernels: str | Module | None = None,
) -> tuple[Array, Saved]:
    """Carry out `batch_norm` as a part of `call`, or alone."""
    key = key_of(x, weight, bias, mean, var, channel_axis)
    plan = None if key is None or moments is not None else _PLANS.get(key)
    if plan is None:
        arrays = x, weight, bias, mean, var
        layout, checked = _checked(call, arrays, moments, eps, channel_axis)
        if moments is None and key is not None and are_same(checked, arrays):
            plan = Plan.of(layout, *checked)
            keep(_PLANS, key, plan)
        x, weight, bias, mean, var = checked
    else:
        layout = plan.layout
    eps, vectors = as_eps(eps), (mean, var, weight, bias)
    if plan is not None and call is None and where is None and kernels is None and exact is False:
        if plan.short is None:
            plan.short = _short_way(layout, x, vectors)
        if plan.short and (over := place_over(out, plan.owners, x, None, vectors)) is not None:
            return _forward_shortly(plan, x, vectors, eps, out, over)
    if out is not None:
        check_out(out, x, layout.shape)
        check_overlap(out, {"x": x, "weight": weight, "bias": bias, "mean": mean, "var": var})
    backend, mask = select_in_mode("x", x, kernels, exact), mask_of(where, x, layout)
    if exact and moments is not None and moments.record is None:
        raise ValueError("moments: expected those of moments(…, exact=True), because exact is set; got usual ones")

    view, target = layout.view(x), None if out is None else layout.view(out)
    pool, n = None if call is None else RankPool(call), layout.n if mask is None else mask.n
    batch = None if moments is None else as_moments_of_whole(moments, x, layout.ncs[1], n)
    if mean is not None:
        mask = None
        mean, rstd, weight, y = backend.evaluate(view, mean, var, weight, bias, eps, target)
    else:
        backend = backend if mask is None else for_masks(backend)
        weight, widened_bias = backend.widened(weight, bias)
        batch, rstd, y = _normalized(backend, view, weight, widened_bias, eps, batch, pool, target, mask)
        mean = batch.mean
    y = _write_result(y, layout, out, target)
    lost = _LOST if out is not None and same_memory(out, x) else None
    kept, is_part = x if lost is None else None, moments is not None
    return y, Saved(batch, backend, layout, kept, lost, mean, rstd, weight, bias is not None, pool, is_part, mask)


def _short_way(layout: Layout, x: Array, vectors: Sequence[Array | None]) -> tuple[Backend, Any] | bool:
    """Return the backend and its short way for arrays like these; False where there is none."""
    backend = select_in_mode("x", x, None, False)
    calls = backend.calls(x, layout.ncs, vectors)
    return False if calls is None else (backend, calls)


def _forward_shortly(
    plan: Plan, x: Array, vectors: Sequence[Array | None], eps: float, out: Array | None, over: int
) -> tuple[Array, Saved]:
    """Carry out a forward with mean, var, weight and bias (C,), after all checks; `over` is 1 where `out` is x."""
    (backend, calls), (mean, _, weight, bias) = plan.short, vectors
    y, rows = calls.forward(x, vectors, eps, out, over)
    affine = weight is not None, bias is not None
    saved = SavedRows(backend, plan.layout, x, rows, affine, fixed=mean is not None, plan=plan)
    if over:
        saved._x, saved._overwritten = None, _LOST
    return y, saved


def _checked(
    call: Call | None,
    arrays: Sequence[Array | None],
    moments: Moments | None,
    eps: float,
    channel_axis: int,
) -> tuple[Layout, Sequence[Array | None]]:
    """Return the layout of x, and x, weight, bias, mean and var as plain arrays, after all checks but of `out`."""
    x = as_floating("x", arrays[0])
    layout = Layout.of(x, as_integer("channel_axis", channel_axis))
    as_eps(eps)
    _check_statistics(arrays[3], arrays[4], moments, call)
    named = zip(("weight", "bias", "mean", "var"), arrays[1:], strict=True)
    vectors = [as_channel_vector(name, vector, x, layout.ncs[1]) for name, vector in named]
    return layout, [x, *vectors]


def _normalized(
    backend: Backend,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    batch: Moments | None,
    pool: RankPool | None,
    out: Array | None,
    mask: Mask | None,
) -> tuple[Moments, Array, Array]:
    """Return the moments of the batch, rstd and y; `batch` are the moments of the whole, if they are given."""
    if batch is not None:
        return batch, *backend.forward_of_part(x, batch, weight, bias, eps, out)
    if pool is not None and out is None:  # after the exchange it is too late to find out that memory is short
        out = backend.preallocate_result(x)
    if mask is None:
        return backend.forward(x, weight, bias, eps, pool, out)
    return backend.forward(x, weight, bias, eps, pool, out, mask=mask)


def _check_statistics(mean: Array | None, var: Array | None, moments: Moments | None, call: Call | None) -> None:
    """Raise unless the statistics come from one place."""
    if (mean is None) != (var is None):
        given, missing = ("mean", "var") if var is None else ("var", "mean")
        raise ValueError(f"{missing}: expected an array, because {given} is given; got None")
    if moments is not None and (mean is not None or call is not None):
        other = "mean and var are" if mean is not None else "comm is"
        raise ValueError(f"moments: expected None, because {other} given; got Moments. Pass one of them")


def batch_norm_backward(
    dy: Shaped, saved: Saved, *, sums: Sums | None = None, out: Shaped | None = None
) -> tuple[Array, Array | None, Array | None]:
    """Return the gradients of a loss by x, weight and bias, from its gradient dy by y (E5, E6; E7 if fixed).

    Parameters
    ----------
    dy : array (N, C, *S)
        Of the shape of x, in any of the four dtypes. Where the dtypes differ, x and dy are both converted, exactly, to
        a dtype that holds both; dx alone is rounded, at the end.
    saved : Saved
        From the forward, whose x must not have been changed since.
    sums : Sums, optional
        After a forward with `moments`, and only then: the sum of what `batch_norm_sums` returns for all parts.
    out : array, optional
        Takes dx: of its shape, dtype and device, disjoint from the inputs, or dy or x itself. Over x, this is the last
        backward of that forward.

    Returns
    -------
    dx : array (N, C, *S)
        In the dtype and memory layout of x; sums to zero over each channel, to rounding, where the batch's own
        statistics were used. At a position outside of the batch (`where`) dx is weight·rstd·dy.
    dweight, dbias : array (C,) or None
        Σdy·xhat and Σdy, float64 where the namespace has it; None where the forward had no weight, no bias. After a
        forward with `comm` or `moments` they are the sums over this part of the batch; dx knows of all parts.

    Raises
    ------
    TypeError
        dy is no array of the namespace of x, or saved does not come from `batch_norm`.
    ValueError
        dy has another shape or device than x, `out` partly overlaps an input, or `sums` are missing, not asked for or
        not those of all parts.
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
    call = check_saved(saved)._backward_call()
    with call or ALONE, on_device_of(dy):
        return backward_in(call, dy, saved, out, sums)


def backward_in(
    call: Call | None, dy: Array, saved: Saved, out: Array | None = None, sums: Sums | None = None
) -> tuple[Array, Array | None, Array | None]:
    """Carry out `batch_norm_backward` as a part of `call`, or alone."""
    if type(saved) is SavedRows and call is None and sums is None and (found := _backward_shortly(dy, saved, out)):
        return found
    (dy, x), result = prepared(saved, call, out, dy=dy)
    if saved._backend.exact is not None:
        check_exact("dy", dy)
    totals = totals_of(saved, call, sums)
    weight = saved._weight
    if saved._moments is None:
        dx, dweight, dbias = saved._backend.evaluation_backward(dy, x, saved._mean, saved._rstd, weight, result.place)
    else:
        given = saved._moments, saved._rstd, weight, totals, result.place
        masked = {} if saved._mask is None else {"where": saved._mask.where}
        dx, dweight, dbias = saved._backend.backward(dy, x, *given, **masked)
        if totals is not None and saved._backend.exact is not None:
            saved._gradients = totals.gradients
    dx = result.write(dx, _LOST_BACKWARD)
    return dx, None if weight is None else dweight, dbias if saved._has_bias else None


def _backward_shortly(
    dy: Array, saved: SavedRows, out: Array | None
) -> tuple[Array, Array | None, Array | None] | None:
    """Carry out a backward of arrays that need no slower check; None for others."""
    x, plan = saved._x, saved.plan
    if plan is None or saved.fixed or x is None or x.dtype != plan.dtype:
        return None
    if not is_plain_like(x, x, plan.layout.shape) or not is_plain_like(dy, x, plan.layout.shape):
        return None
    flags = dy.flags.num
    over = place_over(out, plan.owners and flags & OWNER != 0, x, dy)
    if over is None or flags & (CONTIGUOUS | ALIGNED) != CONTIGUOUS | ALIGNED:
        return None
    dx, gradients = plan.short[1].backward(dy, x, saved.rows, out, over)
    if out is x:
        saved._x, saved._overwritten = None, f"{_LOST_BACKWARD} over it (out=x)"
    return dx, gradients[0] if saved.has_weight else None, gradients[1] if saved._has_bias else None


def batch_norm_sums(
    dy: Array, saved: Saved, *, v: Array | None = None, v_weight: Array | None = None, tangent: bool = False
) -> Sums:
    """Return the sums over a part of a batch that the backward of each part needs from all parts (E5).

    Parameters
    ----------
    dy : array (N, C, *S)
        As in `batch_norm_backward`; x_dot, with tangent=True, for the sums that `batch_norm_jvp` needs.
    saved : Saved
        From a forward with `moments`.
    v, v_weight : array (N, C, *S) and array (C,), optional
        With v, the sums are those that `batch_norm_double_backward` needs.
    tangent : bool
        True for the sums of x_dot, which count only where `where` is True; those of dy count everywhere. Without
        `where` both are the same.

    Returns
    -------
    Sums
        Σdy and Σdy·(x − mean) of each channel, and five more with v. The sums of disjoint parts add: ``a + b``,
        ``sum([a, b])``.

    Raises
    ------
    TypeError
        dy or v is no array of the namespace of x, or saved does not come from `batch_norm`.
    ValueError
        A shape or device is not that of x, v_weight is given without v, v with tangent, or the forward had no
        `moments`.
    RuntimeError
        x is gone, as in `batch_norm_backward`.

    Examples
    --------
    >>> import numpy, arraybn
    >>> x, dy = numpy.asarray([[0.0], [2.0], [7.0]]), numpy.asarray([[1.0], [0.0], [0.0]])
    >>> parts = [(x[:1], dy[:1]), (x[1:], dy[1:])]
    >>> whole = arraybn.pool(*(arraybn.moments(part) for part, _ in parts))
    >>> saved = [arraybn.batch_norm(part, moments=whole)[1] for part, _ in parts]
    >>> sums = sum(arraybn.batch_norm_sums(g, s) for (_, g), s in zip(parts, saved))
    >>> dx = [arraybn.batch_norm_backward(g, s, sums=sums)[0] for (_, g), s in zip(parts, saved)]
    >>> alone = arraybn.batch_norm_backward(dy, arraybn.batch_norm(x)[1])[0]
    >>> bool(abs(numpy.concatenate(dx) - alone).max() < 1e-15)
    True
    """
    if not check_saved(saved)._is_part:
        raise ValueError(f"saved: expected the forward of a part, with moments=; got one without{_PARTS}")
    if v is None and v_weight is not None:
        raise ValueError("v: expected an array, because v_weight is given; got None")
    if as_flag("tangent", tangent) and v is not None:
        raise ValueError("v: expected None, because tangent is True; got an array")
    backend, mean, where = saved._backend, saved._mean, saved._where
    n, record = saved._layout.n if saved._mask is None else saved._mask.n, None
    sums: Sequence[Array]
    with on_device_of(dy):
        if v is None and backend.exact is not None and not tangent:
            (dy, x), _ = prepared(saved, None, None, dy=dy)
            check_exact("dy", dy)
            record = exact_sums.products_of(backend.exact, dy, x, mean, where)
            sums = exact_sums.sums_of(backend.exact, record, mean)
        elif v is None:
            (dy, x), _ = prepared(saved, None, None, dy=dy)
            of_dy = reference.gradient_sums
            sums = backend.dots(dy, x, mean, where=where) if tangent else of_dy(backend, dy, x, mean, where)
        else:
            (v, dy, x), _ = prepared(saved, None, None, v=v, dy=dy)
            (v_weight,) = widened_vectors(saved, v_weight=v_weight)
            sums = reference.second_sums(backend, v, dy, x, mean, v_weight, where)
        return Sums(n, array_namespace(x).stack(sums), tangent, record, None if record is None else mean)


# ---- The common steps of all that follows a forward ------------------------------------------------------------------


def check_saved(saved: object) -> Saved:
    """Return `saved`, or raise."""
    if not isinstance(saved, Saved):
        raise TypeError(f"saved: expected what batch_norm returned beside y; got {type(saved).__name__}")
    return saved


def prepared(saved: Saved, call: Call | None, out: Array | None, **given: Array) -> tuple[Sequence[Array], Result]:
    """Return the given arrays and x as (N, C, S), in a dtype that holds the values of all, and the result's place."""
    if saved._overwritten is not None:
        raise RuntimeError(
            f"saved: expected a forward whose x is still there; got one without, because {saved._overwritten}."
            f" Pass another array as out, or None"
        )
    layout, x = saved._layout, saved._x
    given = {name: _like_x(name, array, x, layout) for name, array in given.items()}
    if out is not None:
        check_out(out, x, layout.shape)
        check_overlap(out, {**given, "x": x})
    arrays = [*given.values(), x]
    if len({array.dtype for array in arrays}) > 1:
        wide = common_dtype(*arrays)  # rounding dy first would lose small values of dy, and turn large ones into inf
        arrays = [array_namespace(x).astype(array, wide, copy=False) for array in arrays]
    views = [layout.view(array) for array in arrays]
    return views, Result(saved, call, out, views[-1])


def _like_x(name: str, array: Array, x: Array, layout: Layout) -> Array:
    """Return `array` as a plain array after a check against x."""
    if is_plain_like(array, x, layout.shape):
        return array
    array = as_floating(name, array)
    check_home(name, array, x)
    if tuple(array.shape) != layout.shape:
        raise ValueError(f"{name}: expected shape {layout.shape}, that of x and y; got {tuple(array.shape)}")
    return array


def widened_vectors(saved: Saved, **vectors: Array | None) -> Sequence[Array | None]:
    """Return copies of the vectors (C,) in the dtype of statistics, after a check against x; None stays None."""
    x, channels = saved._x, saved._layout.ncs[1]
    checked = [as_channel_vector(name, vector, x, channels) for name, vector in vectors.items()]
    return saved._backend.widened(*checked)


class Result:
    """The way of a result like x into the caller's layout and `out`; a sweep may write the result into `place`."""

    __slots__ = ("out", "place", "saved", "target")

    def __init__(self, saved: Saved, call: Call | None, out: Array | None, x: Array) -> None:
        self.saved, self.out = saved, out
        self.target = None if out is None else saved._layout.view(out)
        self.place = self.target if x.dtype == saved._x.dtype else None
        if call is not None and self.place is None:  # after the exchange it is too late to find that memory is short
            self.place = saved._backend.preallocate_result(x)

    def write(self, result: Array, cause: str) -> Array:
        """Return the result in the dtype of x; `cause` is the clause that says what is lost where `out` is x."""
        saved, x = self.saved, self.saved._x
        if result.dtype != x.dtype:
            result = array_namespace(x).astype(result, x.dtype)
        result = _write_result(result, saved._layout, self.out, self.target)
        if self.out is not None and same_memory(self.out, x):
            saved._x, saved._overwritten = None, f"{cause} over it (out=x)"
        return result


def totals_of(saved: Saved, call: Call | None, sums: Sums | None, rows: int = 2) -> RankPool | _GivenTotals | None:
    """Return the `rows` sums over all parts: over ranks in a call, or those given; None where x is the whole."""
    if sums is None and saved._is_part:
        raise ValueError(f"sums: expected those of all parts, because the forward had moments=; got None{_PARTS}")
    if sums is not None:
        if not saved._is_part:
            raise ValueError(f"sums: expected None, because the forward had no moments=; got some{_PARTS}")
        return _GivenTotals(sums, saved, rows)
    return None if call is None else RankPool(call, saved._pool)


class _GivenTotals(Totals):
    """The sums over all parts that the caller has added up."""

    gradients: tuple[Array, Array]

    def __init__(self, sums: Sums, saved: Saved, rows: int) -> None:
        assert saved._moments is not None
        self._sums, self._record = check_sums("sums", sums, saved._moments, rows), sums.record
        if saved._backend.exact is not None and rows == 2 and sums.record is None:
            raise ValueError("sums: expected those of exact forwards, with a record; got usual ones")
        self.kept = saved._rstd, saved._moments.mean_low

    def sums(self, *parts: Array) -> Sequence[Array]:
        """Return the given sums."""
        return [self._sums[index, :] for index in range(len(parts))]

    def record(self, part: Array, n: int = 0) -> tuple[Array, int]:
        """Return the given record."""
        assert self._record is not None
        return self._record, n

    def home(self, *vectors: Array) -> Sequence[Array]:
        """Return the vectors, which are on the device already."""
        return vectors


def _write_result(result: Array, layout: Layout, out: Array | None, target: Array | None) -> Array:
    """Return `result` in the caller's layout, in `out` where one was given; `target` is `out` as (N, C, S)."""
    if out is None:
        return layout.restore(result)
    written = result is target and (getattr(target, "base", None) is out or overlap(target, out))
    if not written:  # by the sweep itself
        out[...] = layout.restore(result)
    return out

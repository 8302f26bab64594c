"""The statistics of batches: their moments, pooled, and kept as running averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from array_api_compat import is_jax_array

from . import exact as exact_sums
from . import reference
from ._arrays.copies import as_numpy, copied, widened
from ._arrays.devices import on_device_of
from ._arrays.layout import Layout
from ._arrays.namespaces import Array, Shaped, array_namespace, class_name, dtype_name, namespace_name, wide_dtype
from ._checks import as_channel_vector, as_flag, as_floating, as_integer, as_mask, as_number, check_home, check_like
from .kernels import Backend, Module, for_masks, select, with_exact_sums
from .reference import Mask, Moments


def moments(
    x: Shaped,
    *,
    where: Shaped | None = None,
    channel_axis: int = 1,
    exact: bool = False,
    kernels: str | Module | None = None,
) -> Moments:
    """Return n, mean and m2 of each channel of x (E1).

    Parameters
    ----------
    x : array (N, C, *S)
        float16, bfloat16, float32 or float64, in any memory layout.
    where : array (N, *S) of bool, optional
        True at the positions that count, as in `batch_norm`. n is the number of True.
    channel_axis : int
        The axis that is kept; -1 for channels-last.
    exact : bool
        True for sums without rounding (E10), of float16, bfloat16 or float32: mean and m2 are the correctly rounded
        ones, `pool` of such moments is exact, and all bits are those of any order and any split.
    kernels : str or module, optional
        Forces a kernel module.

    Returns
    -------
    Moments
        `mean` in units of x, `m2` in units of x², float64 where the namespace has it. Of nothing: n = 0 and zeros.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm` for x, where, channel_axis and kernels.

    Notes
    -----
    From float32 data, mean and m2/n are correctly rounded to float32 but for rare ties, up to |mean|/std = 10⁶, where
    the namespace has float64. Without it, n·m2 and the sum of |x| have to stay below the largest float32, 3·10³⁸.

    Examples
    --------
    >>> import numpy, arraybn
    >>> arraybn.moments(numpy.asarray([[1.0, 3.0, 5.0]]), channel_axis=0).mean
    array([3.])
    >>> padded = numpy.asarray([[1.0, 3.0, numpy.nan]])
    >>> arraybn.moments(padded, channel_axis=0, where=numpy.asarray([True, True, False])).mean
    array([2.])
    """
    x = as_floating("x", x)
    layout = Layout.of(x, as_integer("channel_axis", channel_axis))
    backend = select_in_mode("x", x, kernels, exact)
    with on_device_of(x):
        mask = mask_of(where, x, layout)
        if backend.exact is not None:
            return exact_sums.batch_moments(backend.exact, layout.view(x), mask)
        return reference.batch_moments(backend if mask is None else for_masks(backend), layout.view(x), mask)


def mask_of(where: Array | None, x: Array, layout: Layout) -> Mask | None:
    """Return the mask that `where` makes, after a check against x; None where each position of x counts."""
    if where is None:
        return None
    where, positions = as_mask(where, x, layout.positions), math.prod(layout.positions)
    n = positions // math.prod(where.shape) * _trues(where) if positions else 0
    return None if n == layout.n else Mask(layout.view_of_mask(where), n)


def _trues(where: Array) -> int:
    if isinstance(where, np.ndarray) or is_jax_array(where):  # in jax.jit, JAX's own sum would have no value yet
        return int(np.count_nonzero(np.asarray(where)))
    return int(array_namespace(where).count_nonzero(where))


def select_in_mode(name: str, x: Array, kernels: str | Module | None, exact: bool) -> Backend:
    """Return the backend that serves x, in exact mode or not."""
    backend = select(x, kernels)
    if not as_flag("exact", exact):
        return backend
    check_exact(name, x)
    return with_exact_sums(backend)


def check_exact(name: str, array: Array) -> None:
    """Raise unless exact sums can be taken of `array`."""
    if dtype_name(array.dtype) == "float64":
        raise TypeError(
            f"{name}: expected float16, bfloat16 or float32 for exact=True, because the product of two float64 has too"
            " many bits for a float64; got float64"
        )
    if dtype_name(wide_dtype(array)) != "float64":
        raise TypeError(
            f"{name}: expected an array of a namespace with float64 for exact=True;"
            f" got one of {namespace_name(array_namespace(array))}"
        )


def pool(*moments: Moments) -> Moments:
    """Return the moments of disjoint batches together, as if they had been one batch (E2).

    Parameters
    ----------
    *moments : Moments
        At least one; all with the same number of channels, namespace and device. An empty one (n = 0) changes nothing.

    Returns
    -------
    Moments
        pool(a, b) and pool(b, a) have the same bits.

    Raises
    ------
    TypeError
        None were given, one is no `Moments`, or they are of different namespaces.
    ValueError
        The numbers of channels or the devices differ.

    Examples
    --------
    >>> import numpy, arraybn
    >>> x = numpy.asarray([[0.0], [2.0], [7.0]])
    >>> both = arraybn.pool(arraybn.moments(x[:2]), arraybn.moments(x[2:]))
    >>> both.n, both.mean, both.m2
    (3, array([3.]), array([26.]))
    """
    if not moments:
        raise TypeError("moments: expected at least one Moments; got none")
    for index, part in enumerate(moments):
        _check_moments(f"moments[{index}]", part)
        check_home(f"moments[{index}].mean", part.mean, moments[0].mean, "moments[0].mean")
        if part.mean.shape != moments[0].mean.shape:
            raise ValueError(
                f"moments[{index}]: expected {moments[0].mean.shape[0]} channels as moments[0] has;"
                f" got {part.mean.shape[0]}"
            )
    pooled = moments[0]
    with on_device_of(pooled.mean):
        if all(part.record is not None for part in moments):
            return _pooled_records(moments)
        for part in moments[1:]:
            pooled = reference.pool(pooled, part)
    return pooled


def _pooled_records(parts: Sequence[Moments]) -> Moments:
    records: Any = [as_numpy("moments.record", part.record) for part in parts]
    if len({record.shape for record in records}) > 1:
        raise ValueError(f"moments: expected records of one shape; got {[record.shape for record in records]}")
    return exact_sums.moments_of(exact_sums, sum(records), sum(part.n for part in parts), parts[0].mean)


def update_running_stats(
    running_mean: Shaped, running_var: Shaped, moments: Moments, momentum: float, *, correction: int = 1
) -> tuple[Array, Array]:
    """Return the running statistics after one more batch: (1 − momentum)·running + momentum·batch (E4).

    Parameters
    ----------
    running_mean, running_var : array (C,)
        Never written into.
    moments : Moments
        Of the batch. With n = 0 the values stay as they are.
    momentum : float
        The weight of the new batch, PyTorch's convention. A decay d, as in ONNX, Keras and Flax, is 1 − momentum. With
        0 the values stay as they are, also where the batch has a NaN.
    correction : int
        1: the variance enters unbiased, m2/(n − 1), as in PyTorch. 0: biased, m2/n, as in ONNX, Keras and Flax.

    Returns
    -------
    running_mean, running_var : array (C,)
        New arrays, in the dtypes of the arguments.

    Raises
    ------
    TypeError
        An argument is not what is said above.
    ValueError
        A shape does not fit, or 0 < n ≤ correction: that batch has no unbiased variance.

    Examples
    --------
    >>> import numpy, arraybn
    >>> batch = arraybn.moments(numpy.asarray([[1.0], [3.0]]))
    >>> arraybn.update_running_stats(numpy.zeros(1), numpy.ones(1), batch, 0.5)
    (array([1.]), array([1.5]))
    """
    _check_moments("moments", moments)
    channels = moments.mean.shape[0]
    running: dict[str, Array] = {"running_mean": running_mean, "running_var": running_var}
    for name, array in running.items():
        if array is None:
            raise TypeError(f"{name}: expected an array ({channels},); got None")
        running[name] = as_channel_vector(name, array, moments.mean, channels, of="moments.mean")
    momentum = float(as_number("momentum", momentum))
    correction = as_integer("correction", correction, 0)
    if 0 < moments.n <= correction:
        raise ValueError(
            f"moments: expected n > correction = {correction}, or the variance is not defined; got n = {moments.n}"
        )
    if moments.n == 0 or momentum == 0:
        return copied(running["running_mean"]), copied(running["running_var"])
    with on_device_of(moments.mean):
        return update_unchecked(running["running_mean"], running["running_var"], moments, momentum, correction)


def update_unchecked(
    running_mean: Array, running_var: Array, moments: Moments, momentum: float, correction: int = 1
) -> tuple[Array, Array]:
    """(E4) Return the running statistics after one more batch; the arguments are known to be right."""
    update = reference.update_running_stats if moments.record is not None else select(moments.mean).update_running_stats
    return update(running_mean, running_var, moments.mean, moments.var(correction), momentum)


def _check_moments(name: str, value: object) -> None:
    if not isinstance(value, Moments):
        raise TypeError(f"{name}: expected Moments, as arraybn.moments returns; got {type(value).__name__}")
    as_integer(f"{name}.n", value.n, 0)
    as_floating(f"{name}.mean", value.mean)
    if value.mean.ndim != 1:
        raise ValueError(f"{name}.mean: expected shape (C,); got {tuple(value.mean.shape)}")
    check_like(f"{name}.m2", value.m2, value.mean, f"{name}.mean")


def as_moments_of_whole(moments: Moments, x: Array, channels: int, n: int) -> Moments:
    """Return a private copy of the moments of the batch of which x, with n values per channel, is a part."""
    _check_moments("moments", moments)
    parts = {"mean": moments.mean, "m2": moments.m2, "mean_low": moments.mean_low}
    mean, m2, low = (as_channel_vector(f"moments.{name}", part, x, channels) for name, part in parts.items())
    if moments.n < n:
        raise ValueError(
            f"moments: expected those of the whole batch, n ≥ {n}, the values per channel of x; got n = {moments.n}."
            " Pool those of all parts: arraybn.pool(*(arraybn.moments(part) for part in parts))"
        )
    mean, m2, low = widened(mean), widened(m2), None if low is None else widened(low)
    if low is not None and dtype_name(mean.dtype) == "float64":
        mean, low = mean + low, None
    return Moments(moments.n, mean, m2, mean_low=low, record=moments.record)


@dataclass(frozen=True, eq=False)
class Sums:
    """(E5) The sums of a part of a batch, which `batch_norm_sums` returns and `batch_norm_backward` takes.

    The sums of disjoint parts add: ``a + b``, ``sum([a, b, c])``. They can be pickled and sent.

    Attributes
    ----------
    n : int
        How many values each channel was summed over.
    values : array (2, C) or (7, C)
        Σdy and Σdy·(x − mean), float64 where the namespace has it; with v, then the same two of v and of v_weight·dy,
        and Σv·dy.
    tangent : bool
        True for the sums of x_dot, over the positions of the batch alone.
    record : array (rows, C) or None
        In exact mode, the integers of the first two sums, which do not round when they are added (E10).
    mean : array (C,) or None
        In exact mode, that of the whole batch: with it, the values of a total are computed from its record.

    Examples
    --------
    >>> import numpy, arraybn
    >>> x, dy = numpy.asarray([[0.0], [2.0], [7.0]]), numpy.asarray([[1.0], [2.0], [4.0]])
    >>> whole = arraybn.moments(x)
    >>> saved = [arraybn.batch_norm(part, moments=whole)[1] for part in (x[:1], x[1:])]
    >>> sum([arraybn.batch_norm_sums(dy[:1], saved[0]), arraybn.batch_norm_sums(dy[1:], saved[1])])
    Sums(n=3, values=array([[ 7.],
           [11.]]))
    """

    n: int
    values: Array
    tangent: bool = field(default=False, repr=False)
    record: Array | None = field(default=None, repr=False)
    mean: Array | None = field(default=None, repr=False)

    def __add__(self, other: Sums) -> Sums:
        if not isinstance(other, Sums):
            return NotImplemented
        check_like("values", other.values, self.values, "the values of the sums before")
        if self.tangent != other.tangent:
            raise ValueError("tangent: expected the same in all sums; got True and False")
        records: list[Any] = [self.record, other.record]
        with on_device_of(self.values):
            if any(record is None for record in records):
                return replace(self, n=self.n + other.n, values=self.values + other.values, record=None)
            total = sum(records)
            sweeps: Any = with_exact_sums(select(self.values)).exact
            values = array_namespace(self.values).stack(exact_sums.sums_of(sweeps, total, self.mean))
            return replace(self, n=self.n + other.n, values=values, record=total)

    def __radd__(self, other: object) -> Sums:
        """Return these sums for 0 + sums, with which `sum` begins."""
        return self if other == 0 else NotImplemented


def check_sums(name: str, sums: object, whole: Moments, rows: int) -> Array:
    """Return the values (rows, C) of the sums of all parts of the batch, in the dtype of statistics, or raise."""
    if not isinstance(sums, Sums):
        raise TypeError(f"{name}: expected the sum of what batch_norm_sums returned; got {class_name(sums)}")
    values = as_floating(f"{name}.values", sums.values)
    check_home(f"{name}.values", values, whole.mean, "moments.mean")
    if tuple(values.shape) != (expected := (rows, whole.mean.shape[0])):
        with_v = "" if rows == 2 else ". Pass v, and v_weight, to batch_norm_sums"
        raise ValueError(f"{name}.values: expected shape {expected}; got {tuple(values.shape)}{with_v}")
    if as_integer(f"{name}.n", sums.n) != whole.n:
        raise ValueError(f"{name}: expected those of all parts, n = {whole.n} as in moments; got n = {sums.n}")
    return widened(values)

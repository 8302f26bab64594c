"""Sums that do not round (E10), and batch norm with them: a function of its data alone.

A sum of floating-point numbers depends on the order of the additions; a sum of integers does not. Every float16,
bfloat16 and float32 value is an integer times 2⁻¹⁶⁰, and every product of two of them an integer times 2⁻³²⁰. A sum is
kept as *limbs*: the limb k of a sum counts 2^(32·k) of the smallest unit, as an int64. A value adds less than 2³² to a
limb, so 2³¹ values fit before a limb overflows; the limbs of threads and ranks are added limb by limb, in any order.

The record of a batch is an array of limbs (rows, C), on the GPU if CUDA kernels made it, otherwise on the host.
Statistics are computed from a record with exact integers and rounded once. The maps are sequences of float64
operations, each of which rounds alike everywhere.

Source: D. R. Lutz, N. Burgess, A. Neal, on high-precision anchored accumulators, 2017; U. Kulisch, Computer arithmetic
and validity, 2013, section 8.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np

from . import reference
from ._arrays.copies import as_numpy, converted
from ._arrays.namespaces import Array, array_namespace, device, wide_dtype
from .reference import Mask, Moments

BITS = 32  # of a limb
VALUE_LIMBS, VALUE_UNIT = 9, -160  # of Σx: how many, and the exponent of the unit; 2⁻¹⁴⁹ is the last subnormal
PRODUCT_LIMBS, PRODUCT_UNIT = 18, -320  # of Σx² and Σu·x
KINDS = 3  # rows that count the NaNs, the +inf and the −inf of a sum

# The rows of a record: the limbs of a sum of values, those of a sum of products, and the kinds of either.
VALUES = slice(0, VALUE_LIMBS)
PRODUCTS = slice(VALUE_LIMBS, VALUE_LIMBS + PRODUCT_LIMBS)
VALUE_KINDS = slice(PRODUCTS.stop, PRODUCTS.stop + KINDS)
PRODUCT_KINDS = slice(VALUE_KINDS.stop, VALUE_KINDS.stop + KINDS)
ROWS = PRODUCT_KINDS.stop


class ExactSweeps(Protocol):
    """The four sweeps without a rounding that depends on the order: sums as records, and maps of fixed operations."""

    def squares(self, x: Array) -> Array:
        """(E10) Return the record of Σx and Σx²."""

    def products(self, u: Array, x: Array, mean: Array) -> Array:
        """(E10) Return the record of Σu and Σu·x; what is not finite is counted as a part of Σu·(x−mean)."""

    def mean_and_m2(self, record: Array, n: int) -> Array:
        """(E1) Return mean and m2 (2, C) of n values, correctly rounded, where the record is."""

    def sums(self, record: Array, mean: Array) -> Array:
        """(E5) Return Σu and Σu·(x−mean) (2, C), correctly rounded, where the record is."""

    def affine(self, x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
        """(E3, E7) Return a·(x−mean) + c."""

    def affine2(self, u: Array, x: Array, mean: Array, a: Array, b: Array, c: Array, out: Array | None = None) -> Array:
        """(E6) Return a·u + (b·(x−mean) + c)."""


# ---- Records ---------------------------------------------------------------------------------------------------------


def squares(x: Array) -> Array:
    """(E10) The record (rows, C) of Σx and Σx², of x (N, C, S)."""
    wide = _as_float64(x)
    finite, kinds = _finite(wide)
    return _record(finite, finite * finite, kinds, 0 * kinds)


def values(x: Array) -> Array:
    """(E10) The record (VALUE_LIMBS + KINDS, C) of Σx alone, of x (N, C, S)."""
    finite, kinds = _finite(_as_float64(x))
    return np.concatenate([_limbs(finite, VALUE_LIMBS, VALUE_UNIT), kinds])


def products(u: Array, x: Array, mean: Array) -> Array:
    """(E10) The record (rows, C) of Σu and Σu·x, of u and x (N, C, S); mean (C,) is that of x."""
    xp, u, x = array_namespace(x), _as_float64(u), _as_float64(x)
    (finite_u, kinds_u), (finite_x, _) = _finite(u), _finite(x)
    both = xp.isfinite(u) & xp.isfinite(x)
    deviation = xp.where(both & xp.isfinite(mean)[:, None], xp.zeros_like(x), u * (x - mean[:, None]))
    product = xp.where(both, finite_u * finite_x, xp.zeros_like(x))
    return _record(finite_u, product, kinds_u, _finite(deviation)[1])


def _as_float64(x: Array) -> Array:
    return array_namespace(x).astype(x, wide_dtype(x), copy=False)


def _finite(x: Array) -> tuple[Array, Array]:
    """Return x with 0 in the place of NaN and inf, and how many NaN, +inf and −inf each channel has (3, C)."""
    xp = array_namespace(x)
    kinds = [xp.isnan(x), x == float("inf"), x == -float("inf")]
    counts = [xp.sum(xp.astype(kind, xp.int64), axis=(0, 2)) for kind in kinds]
    return xp.where(xp.isfinite(x), x, xp.zeros_like(x)), as_numpy("counts", xp.stack(counts))


def _record(values: Array, products: Array, value_kinds: Array, product_kinds: Array) -> Array:
    sums = [_limbs(values, VALUE_LIMBS, VALUE_UNIT), _limbs(products, PRODUCT_LIMBS, PRODUCT_UNIT)]
    return np.concatenate([*sums, value_kinds, product_kinds])


def _limbs(t: Array, limbs: int, unit: int) -> Array:
    """Return the limbs (limbs, C) of Σt, of finite float64 t (N, C, S): digits, the highest first."""
    xp, digits = array_namespace(t), []
    for k in reversed(range(limbs)):
        exponent = unit + BITS * k
        digit = xp.trunc(t * 2.0**-exponent)
        t = t - digit * 2.0**exponent  # exact: what is taken away are the leading bits of t
        digits.append(xp.sum(xp.astype(digit, xp.int64), axis=(0, 2)))
    return as_numpy("limbs", xp.stack(digits[::-1]))


# ---- From a record to statistics: exact integers, rounded once -------------------------------------------------------


def mean_and_m2(record: Array, n: int) -> Array:
    """(E1) mean and m2 (2, C) of n values, correctly rounded float64, from the record of Σx and Σx²."""
    result = np.zeros((2, record.shape[1]))
    for c, (total, square) in enumerate(_totals(record)) if n else ():
        result[0, c] = _rounded(total, n, VALUE_UNIT)
        result[1, c] = _rounded(n * square - total * total, n, PRODUCT_UNIT)
    return _with_kinds(result, record[VALUE_KINDS], squared=True)


def sums(record: Array, mean: Array) -> Array:
    """(E5) Σu and Σu·(x−mean) (2, C), correctly rounded float64, from the record of Σu and Σu·x and mean (C,)."""
    result, mean = np.zeros((2, record.shape[1])), as_numpy("mean", mean)
    for c, (total, product) in enumerate(_totals(record)):
        result[0, c] = _rounded(total, 1, VALUE_UNIT)
        if np.isfinite(mean[c]):
            top, bottom = float(mean[c]).as_integer_ratio()
            shift = VALUE_UNIT - PRODUCT_UNIT
            result[1, c] = _rounded(product * bottom - (top * total << shift), bottom, PRODUCT_UNIT)
    result[0] = _with_kinds(result[:1], record[VALUE_KINDS])[0]
    result[1] = _with_kinds(result[1:], record[PRODUCT_KINDS])[0]
    return result


def mean_of_values(record: Array, n: int) -> Array:
    """(E10) Σx/n (C,), correctly rounded float64, from the record of Σx alone."""
    limbs, kinds = np.split(record, [VALUE_LIMBS])
    return _with_kinds(np.asarray([[_rounded(total, n, VALUE_UNIT) for total in _integers(limbs)]]), kinds)[0]


def _totals(record: Array) -> list[tuple[int, int]]:
    """Return the two sums of each channel, as integers."""
    return list(zip(_integers(record[VALUES]), _integers(record[PRODUCTS]), strict=True))


def _integers(limbs: Array) -> list[int]:
    """Return the integer of each channel."""
    whole = [0] * limbs.shape[1]
    for row in limbs[::-1].tolist():
        whole = [(number << BITS) + limb for number, limb in zip(whole, row, strict=True)]
    return whole


def _rounded(top: int, bottom: int, exponent: int) -> float:
    """Return top/bottom·2^exponent, correctly rounded, as Python's division of integers is."""
    return top / (bottom << -exponent)


def _with_kinds(rows: Array, kinds: Array, *, squared: bool = False) -> Array:
    """Return `rows` (…, C) with NaN or inf where a NaN or an inf went into the sum; a spread is NaN then."""
    nan, high, low = kinds > 0
    special = np.where(nan | (high & low), np.nan, np.where(high, np.inf, -np.inf))
    some = nan | high | low
    rows[0] = np.where(some, special, rows[0])
    if squared:
        rows[1] = np.where(some, np.nan, rows[1])
    return rows


def _home(rows: Array, like: Array) -> list[Array]:
    """Return float64 rows (C,), of the host or where `like` is, in the namespace and on the device of `like`."""
    if isinstance(like, type(rows)):
        return list(rows)
    xp = array_namespace(like)
    return [converted("statistics", row, xp, device(like), xp.float64) for row in rows]


# ---- The maps: float64 operations in a fixed order, each rounded by itself -------------------------------------------


def affine(x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
    """(E3, E7) a·(x−mean) + c (N, C, S), in the dtype of x."""
    wide = _as_float64(x)
    return _narrowed(a[:, None] * (wide - mean[:, None]) + c[:, None], x)


def affine2(u: Array, x: Array, mean: Array, a: Array, b: Array, c: Array, out: Array | None = None) -> Array:
    """(E6) a·u + (b·(x−mean) + c) (N, C, S), in the dtype of x."""
    u, wide = _as_float64(u), _as_float64(x)
    return _narrowed(a[:, None] * u + (b[:, None] * (wide - mean[:, None]) + c[:, None]), x)


def _narrowed(result: Array, like: Array) -> Array:
    """Round to the dtype of `like`; half precision by way of float32, as processors do."""
    xp = array_namespace(like)
    return xp.astype(xp.astype(result, xp.float32), like.dtype, copy=False)


# ---- Batch norm ------------------------------------------------------------------------------------------------------


class Totals(Protocol):
    """The parts of a batch, whose records add."""

    gradients: tuple[Array, Array]  # dweight and dbias of all parts together

    def record(self, part: Array, n: int = 0) -> tuple[Array, int]:
        """Return the record and n of all parts together."""

    def keep(self, rstd: Array, mean_low: Array | None) -> None:
        """Keep the host's rstd for second derivatives."""


def batch_moments(sweeps: ExactSweeps, x: Array, mask: Mask | None = None) -> Moments:
    """(E1, E10) The moments of x (N, C, S), correctly rounded."""
    return moments_of(sweeps, *_squares_and_n(sweeps, x, mask), x)


def _squares_and_n(sweeps: ExactSweeps, x: Array, mask: Mask | None) -> tuple[Array, int]:
    """(E10) The record of Σx and Σx², and n; a masked x counts as 0, which adds nothing to a sum of integers."""
    if mask is None:
        return sweeps.squares(x), x.shape[0] * x.shape[2]
    xp = array_namespace(x)
    return sweeps.squares(xp.where(mask.where, x, xp.zeros_like(x))), mask.n


def products_of(sweeps: ExactSweeps, dy: Array, x: Array, mean: Array, where: Array | None = None) -> Array:
    """(E10) The record of Σdy and Σdy·x; with a mask, x counts for nothing where dy is 0, as in the usual mode."""
    if where is not None:
        xp = array_namespace(x)
        x = xp.where(dy == 0, xp.zeros_like(x), x)
    return sweeps.products(dy, x, mean)


def moments_of(sweeps: ExactSweeps, record: Array, n: int, like: Array) -> Moments:
    """(E1, E10) The moments that a record of n values stands for, on the device of `like`."""
    return Moments(n, *_home(sweeps.mean_and_m2(record, n), like), record=record)


def dots(sweeps: ExactSweeps, u: Array, x: Array, mean: Array) -> list[Array]:
    """(E5, E10) Σu and Σu·(x−mean), each (C,), correctly rounded."""
    return sums_of(sweeps, sweeps.products(u, x, mean), mean)


def sums_of(sweeps: ExactSweeps, record: Array, mean: Array) -> list[Array]:
    """(E5, E10) Σu and Σu·(x−mean), each (C,), of the record of Σu and Σu·x, where mean is."""
    return _home(sweeps.sums(record, mean), mean)


def forward(
    sweeps: Any,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    pool: Totals | None = None,
    out: Array | None = None,
    *,
    mask: Mask | None = None,
) -> tuple[Moments, Array, Array]:
    """(E1–E3, E10) The moments of the batch, rstd (C,), and y (N, C, S)."""
    if mask is None and (at_once := _own(sweeps, "forward", pool)) and (done := at_once(x, weight, bias, eps, out)):
        return done  # type: ignore[no-any-return]
    record, n = _squares_and_n(sweeps, x, mask)
    if pool is not None:
        record, n = pool.record(as_numpy("record", record), n)
    batch = moments_of(sweeps, record, n, x)
    r, y = reference.forward_of_part(sweeps, x, batch, weight, bias, eps, out)
    if pool is not None:
        pool.keep(as_numpy("rstd", r), None)
    return batch, r, y


def backward(
    sweeps: ExactSweeps,
    dy: Array,
    x: Array,
    batch: Moments,
    rstd: Array,
    weight: Array | None,
    pool: Totals | None = None,
    out: Array | None = None,
    *,
    where: Array | None = None,
) -> tuple[Array, Array, Array]:
    """(E5, E6, E10) dx (N, C, S), and dweight and dbias (C,) of this part of the batch."""
    if (
        where is None
        and (at_once := _own(sweeps, "backward", pool))
        and (done := at_once(dy, x, batch.mean, rstd, weight, out))
    ):
        return done  # type: ignore[no-any-return]
    record = products_of(sweeps, dy, x, batch.mean, where)
    sum_dy, sum_dy_x = sums_of(sweeps, record, batch.mean)
    dweight, dbias = totals = reference.parameter_gradients(sum_dy, sum_dy_x, rstd)
    if pool is not None:
        sum_dy, sum_dy_x = sums_of(sweeps, pool.record(as_numpy("record", record))[0], batch.mean)
        pool.gradients = totals = reference.parameter_gradients(sum_dy, sum_dy_x, rstd)
    a, b, c = reference.input_gradient(*totals, batch.n, rstd, weight)
    if where is None:
        return sweeps.affine2(dy, x, batch.mean, a, b, c, out), dweight, dbias
    xp, zero = array_namespace(x), 0 * a
    inside, outside = sweeps.affine2(dy, x, batch.mean, a, b, c), sweeps.affine(dy, zero, a, zero)
    return xp.where(where, inside, outside), dweight, dbias


def _own(sweeps: Any, name: str, pool: Totals | None) -> Any:
    """Return a composition of the module `sweeps`, for the data that suits it; this module has none."""
    return None if pool is not None or sweeps is sys.modules[__name__] else getattr(sweeps, name, None)

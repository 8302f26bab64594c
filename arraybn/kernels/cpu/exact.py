"""Exact sums in compiled code (E10): the records of ``arraybn.exact``, a block of values at a time.

A block has at most 8192 values of a channel. Adding a power of two that is large enough, a *magic number*, puts a value
on a grid: the bits of the sum, read as an integer, then count grid steps from the bits of the magic number. Integers
add without rounding, in any order, so the compiler may vectorize their sum.

Products t below 2^e go to two grids. The sum u = t + 1.5·2^52·g, with the step g = 2^(e-50), has the multiple of g
nearest to t; M − u, with M = (1.5·2^52 + 6)·g, is exact, and so is t + (M − u) = 6·g + rest, on the grid 2^(e-100).
Values below 2^e are added in fours first, on the grid 2^(e-49). All of that is exact where the exponents of a block
span at most 26 binades. Where they span more, or some value is not finite, the block is gone through once for each
window of so many exponents.
"""

from __future__ import annotations

import functools
import math
import sys
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from ... import exact, reference
from ..._arrays.namespaces import Array
from ...exact import (
    BITS,
    KINDS,
    PRODUCT_KINDS,
    PRODUCT_LIMBS,
    PRODUCT_UNIT,
    PRODUCTS,
    ROWS,
    VALUE_KINDS,
    VALUE_LIMBS,
    VALUE_UNIT,
    VALUES,
)
from ...reference import Moments
from . import _Job
from .entries import (
    _CUT,
    _READ,
    _STORED,
    _WORDS,
    _WRITE,
    Compiled,
    _board,
    _compile,
    _cut_of,
    _do,
    _parts,
    _set_gradients,
    _span,
    _tile,
)
from .half import _conversion, _from_bfloat16, _from_half, wide
from .jobs import BACKWARDS, ONWARDS, borrow, give_back, place, was_borrowed
from .lines import contiguous
from .tiles import (
    LONG,
    _affine2_across,
    _affine2_across_4,
    _affine2_along,
    _affine_across,
    _affine_across_4,
    _affine_along,
    _map_across,
    _map_along,
    _repeat,
    _row,
    named_after,
    plain,
)

CHUNK = 8192  # values of a channel whose grid steps fit an int64: 2^50 steps each
VALUE_WINDOW, PRODUCT_WINDOW = 26, 52  # exponents that one pass holds
VALUE_GRID, PRODUCT_GRID = 49, 50  # binades from the largest number to a grid; the second grid is 50 below the first
WIDTH = 512  # places side by side
LINE = 568  # from line to line of numbers for each place: no two lines begin near one place of a page (`tiles._lines`)
STEPS, NUMBERS = 6, 8  # lines
LANES = 16  # of the vector registers, for several at a time
FEW = 16  # samples; fewer have too few places that lie one below another
_MASK = (1 << BITS) - 1
_V0, _P0 = VALUES.start, PRODUCTS.start
_VK0, _PK0 = VALUE_KINDS.start, PRODUCT_KINDS.start

# ---- Bits ------------------------------------------------------------------------------------------------------------


# Each is given twice, as in ``half.py``: in Python, and as the instruction that Numba makes of a call. Numba's own
# operators would make 64 bits of a uint32, and a vector register would hold half as many numbers.


def _bits(value: Any) -> Any:
    """Return the bits of a float64, as an int64."""
    return np.float64(value).view(np.int64)


def _of_bits(bits: Any) -> Any:
    """Return the float64 of these bits, an int64."""
    return np.int64(bits).view(np.float64)


def _magnitude_bits(value: Any) -> Any:
    """Return the bits of |value| as a float32, a uint32, which order values as their magnitudes do."""
    return np.uint32(int(np.float32(wide(value)).view(np.uint32)) & 0x7FFFFFFF)


def _one_less(bits: Any) -> Any:
    """Return the number less one; of 0 the largest number."""
    return np.uint32((int(bits) - 1) & 0xFFFFFFFF)


def _times_plus(a: Any, b: Any, c: Any) -> Any:
    """Return a·b + c, where a·b is exact, so that one rounding and two are the same."""
    return a * b + c


def _larger(a: Any, b: Any) -> Any:
    return max(a, b)


def _smaller(a: Any, b: Any) -> Any:
    return min(a, b)


_U4, _I32 = types.uint32, ir.IntType(32)
_to_bits = _conversion(types.float64, types.int64, lambda code, value: code.bitcast(value, ir.IntType(64)))
_to_float64 = _conversion(types.int64, types.float64, lambda code, bits: code.bitcast(bits, ir.DoubleType()))
_to_float32_bits = _conversion(types.float32, _U4, lambda code, value: code.bitcast(value, _I32))
_to_magnitude = _conversion(_U4, _U4, lambda code, bits: code.and_(bits, ir.Constant(_I32, 0x7FFFFFFF)))
_to_one_less = _conversion(_U4, _U4, lambda code, bits: code.sub(bits, ir.Constant(_I32, 1)))


def _choice(comparison: str) -> Any:
    """Return a function of compiled code: the one of two uint32 for which the comparison is true."""

    @intrinsic
    def choose(typing_context, a, b):
        return _U4(_U4, _U4), lambda context, code, signature, arguments: code.select(
            code.icmp_unsigned(comparison, *arguments), *arguments
        )

    return choose


@intrinsic
def _fused(typing_context, a, b, c):
    """Make one instruction of a product that is used twice, too, where the processor has the instruction."""

    def code(context, builder, signature, arguments):
        double = ir.DoubleType()
        of_three = ir.FunctionType(double, [double] * 3)
        return builder.call(builder.module.declare_intrinsic("llvm.fmuladd", [double], of_three), arguments)

    return types.float64(*[types.float64] * 3), code


_to_larger, _to_smaller = _choice(">"), _choice("<")
overload(_times_plus, inline="always")(lambda a, b, c: lambda a, b, c: _fused(a, b, c))  # noqa: PLW0108
overload(_bits, inline="always")(lambda value: lambda value: _to_bits(value))  # noqa: PLW0108 (as in half.py)
overload(_of_bits, inline="always")(lambda bits: lambda bits: _to_float64(bits))  # noqa: PLW0108
overload(_one_less, inline="always")(lambda bits: lambda bits: _to_one_less(bits))  # noqa: PLW0108
overload(_larger, inline="always")(lambda a, b: lambda a, b: _to_larger(a, b))  # noqa: PLW0108
overload(_smaller, inline="always")(lambda a, b: lambda a, b: _to_smaller(a, b))  # noqa: PLW0108


@overload(_magnitude_bits, inline="always")
def _magnitude_bits_compiled(value):
    if value == types.int16:
        return lambda value: _to_magnitude(_to_float32_bits(_from_half(value)))
    if value == types.uint16:
        return lambda value: _to_magnitude(_to_float32_bits(_from_bfloat16(value)))
    return lambda value: _to_magnitude(_to_float32_bits(value))


@plain
def _top(high: Any) -> Any:
    """Return e with |value| < 2^e for all values whose largest magnitude has these bits; NaN and inf apart."""
    e: Any = np.int64(high) >> 23
    return int(min(max(e, 1), 254)) - 126


@plain
def _bottom(low: Any) -> Any:
    """Return e of the smallest magnitude but 0, from its bits less one."""
    e: Any = (np.int64(low) + 1) >> 23
    return int(min(max(e, 1), 254)) - 126


@plain
def _power(exponent):
    """Return 2^exponent of a normal number; ldexp takes ten times as long."""
    return _of_bits((exponent + 1023) << 52)


@plain
def _magic(exponent):
    """Return the magic number of the grid 2^exponent."""
    return 1.5 * _power(exponent + 52)


@plain
def _add_steps(record, row, limbs, c, steps, place):
    """Add steps of 2^place units to a number of channel c, which has so many limbs from this row on."""
    if place < 0:  # the last bits are 0: the smallest values are multiples of the unit
        steps = steps >> min(-place, 63)
        place = 0
    k, shift = row + (place >> 5), place & 31
    low, high = (steps & _MASK) << shift, (steps >> BITS) << shift
    record[k, c] += low & _MASK
    if k + 2 < row + limbs:
        record[k + 1, c] += (low >> BITS) + (high & _MASK)
        record[k + 2, c] += high >> BITS
    else:
        record[k + 1, c] += (low >> BITS) + high


# ---- Runs: rows of `width` places, `step` apart; each place has its own sums, in the lines of `steps` ----------------


def _four(squares: bool) -> Any:
    """Return the run that adds the steps of Σu·x (two lines), or Σu², and Σu (a third), four rows at a time."""

    def run(u, x, start, step, rows, width, numbers, steps):
        for r in range(0, rows, 4):
            i0 = np.uintp(start + r * step)
            i1, i2, i3 = i0 + np.uintp(step), i0 + np.uintp(2 * step), i0 + np.uintp(3 * step)
            for j in range(np.uintp(width)):
                v0, v1, v2, v3 = wide(u[i0 + j]), wide(u[i1 + j]), wide(u[i2 + j]), wide(u[i3 + j])
                d0, d1, d2, d3 = v0, v1, v2, v3
                if not squares:
                    d0, d1, d2, d3 = wide(x[i0 + j]), wide(x[i1 + j]), wide(x[i2 + j]), wide(x[i3 + j])
                m1, both, m3 = numbers[j], numbers[LINE + j], numbers[2 * LINE + j]
                s0, s1 = _times_plus(v0, d0, m1), _times_plus(v1, d1, m1)
                s2, s3 = _times_plus(v2, d2, m1), _times_plus(v3, d3, m1)
                w0, w1 = _times_plus(v0, d0, both - s0), _times_plus(v1, d1, both - s1)
                w2, w3 = _times_plus(v2, d2, both - s2), _times_plus(v3, d3, both - s3)
                steps[j] += (_bits(s0) + _bits(s1)) + (_bits(s2) + _bits(s3))
                steps[LINE + j] += (_bits(w0) + _bits(w1)) + (_bits(w2) + _bits(w3))
                steps[2 * LINE + j] += _bits(((v0 + v1) + (v2 + v3)) + m3)

    run.__qualname__ += ".squares" if squares else ".products"
    return plain(run)


_four_squares, _four_products = _four(squares=True), _four(squares=False)


@plain
def _one(u, x, start, step, rows, width, numbers, steps):
    """Add the steps of Σu·x and Σu, of the products and values whose magnitude is between bounds of their place."""
    for r in range(rows):
        first = np.uintp(start + r * step)
        for j in range(np.uintp(width)):
            v = wide(u[first + j])
            t = v * wide(x[first + j])
            t = t if numbers[3 * LINE + j] <= abs(t) < numbers[4 * LINE + j] else 0.0
            v = v if numbers[5 * LINE + j] <= abs(v) < numbers[6 * LINE + j] else 0.0
            s = t + numbers[j]
            steps[j] += _bits(s)
            steps[LINE + j] += _bits(t + (numbers[LINE + j] - s))
            steps[2 * LINE + j] += _bits(v + numbers[2 * LINE + j])


@plain
def _kinds(u, x, start, step, rows, width, numbers, steps):
    """Count NaN, +inf and -inf among u, and among u·(x−mean) where one of the three numbers is not finite."""
    for r in range(rows):
        first = np.uintp(start + r * step)
        for j in range(np.uintp(width)):
            v, d, mean = wide(u[first + j]), wide(x[first + j]), numbers[7 * LINE + j]
            finite = np.isfinite(v) and np.isfinite(d) and np.isfinite(mean)
            t = 0.0 if finite else v * (d - mean)
            for k, value in enumerate((v, t)):
                steps[3 * k * LINE + j] += np.int64(np.isnan(value))
                steps[(3 * k + 1) * LINE + j] += np.int64(value == np.inf)
                steps[(3 * k + 2) * LINE + j] += np.int64(value == -np.inf)


# ---- From row to row -------------------------------------------------------------------------------------------------


def _over(four: Any, one: Any) -> Any:
    """Return the loops over a block of rows of `length` values, `step` apart; they return the number of sums made.

    Rows are taken four at a time by one function, and what is left by another. A row that is a piece of a long plane,
    whose values belong to one channel, is itself cut into four rows.
    """

    @named_after(four)
    def over(u, x, start, step, rows, length, long, numbers, steps):
        outer, piece, sums = rows if long else 1, 4 * WIDTH if long else length, 0
        for r in range(outer):
            for first in range(0, length, piece):
                i, size = start + r * step + first, min(piece, length - first)
                width = size // 4 // LANES * LANES if long else length
                height, down = 4 if long else rows - rows % 4, width if long else step
                four(u, x, i, down, height, width, numbers, steps)
                sums += height // 4 * width
                i += height * down
                height, width = 1 if long else rows % 4, size - 4 * width if long else length
                one(u, x, i, down, height, width, numbers, steps)
                sums += height * width
        return sums

    return over


_windows, _all_kinds = _over(_one, _one), _over(_kinds, _kinds)
_squares_of_rows, _products_of_rows = _over(_four_squares, _one), _over(_four_products, _one)


# ---- Blocks ----------------------------------------------------------------------------------------------------------
# A row of a block has `times` samples side by side, of `channels` channels, of `places` places each.


def _folded(join: Any) -> Any:
    """Return a function that joins the numbers of the places of each channel."""

    @named_after(join)
    def fold(line, places, times, totals):
        channels = totals.size
        for t in range(times):
            sample = line[t * channels * places :]
            if places == 1:
                for j in range(channels):
                    totals[j] = join(totals[j], sample[j])
                continue
            for j in range(channels):
                total, plane = totals[j], sample[j * places :]
                for i in range(places):
                    total = join(total, plane[i])
                totals[j] = total

    return fold


@plain
def _plus(a: Any, b: Any) -> Any:
    return a + b


_fold_larger, _fold_smaller, _fold_sums = _folded(_larger), _folded(_smaller), _folded(_plus)


@plain
def _range_along(x, start, step, rows, length):
    """Return the bits of the largest magnitude, and those of the smallest but 0, less one."""
    high, low = np.uint32(0), np.uint32(0xFFFFFFFF)
    for r in range(rows):
        first = np.uintp(start + r * step)
        for i in range(first, first + np.uintp(length)):
            bits = _magnitude_bits(x[i])
            high = _larger(high, bits)
            low = _smaller(low, _one_less(bits))
    return high, low


@plain
def _range_across(x, start, step, rows, width, lines):
    """Set two lines to the results of `_range_along` for each place; four rows at a time, the last one repeatedly."""
    lines[:width], lines[LINE : LINE + width] = 0, 0xFFFFFFFF
    for r in range(0, rows, 4):
        i0 = np.uintp(start + r * step)
        i1, i2 = np.uintp(start + min(r + 1, rows - 1) * step), np.uintp(start + min(r + 2, rows - 1) * step)
        i3 = np.uintp(start + min(r + 3, rows - 1) * step)
        for j in range(np.uintp(width)):
            b0, b1 = _magnitude_bits(x[i0 + j]), _magnitude_bits(x[i1 + j])
            b2, b3 = _magnitude_bits(x[i2 + j]), _magnitude_bits(x[i3 + j])
            least = _smaller(_smaller(_one_less(b0), _one_less(b1)), _smaller(_one_less(b2), _one_less(b3)))
            lines[j] = _larger(lines[j], _larger(_larger(b0, b1), _larger(b2, b3)))
            lines[LINE + j] = _smaller(lines[LINE + j], least)


@plain
def _set_exponents(high, low, top, bottom):
    """Set the largest and the smallest exponent of each channel; return True if all values are finite."""
    finite = True
    for j in range(high.size):
        top[j], bottom[j] = _top(high[j]), _bottom(low[j])
        finite = finite and high[j] < 0x7F800000
    return finite


@plain
def _least_exponent(bottom):
    """Return k with |value| ≥ 2^k for the smallest magnitude but 0; subnormal ones share one exponent."""
    return -149 if bottom <= -125 else bottom - 1


@plain
def _number_of_windows(exponents, channels, finite):
    """Return the number of windows that hold all values and products; 0 if grids hold all, and all are finite."""
    windows, fits = 1, finite
    for j in range(channels):
        top, bottom, top_x, bottom_x = exponents[0, j], exponents[1, j], exponents[2, j], exponents[3, j]
        fits = fits and top - bottom < VALUE_WINDOW and top_x - bottom_x < VALUE_WINDOW
        products = top + top_x - _least_exponent(bottom) - _least_exponent(bottom_x)
        windows = max(windows, (top - bottom) // VALUE_WINDOW + 1, (products - 1) // PRODUCT_WINDOW + 1)
    return 0 if fits else windows


@plain
def _set_numbers(exponents, window, bounded, means, numbers):
    """Set the magic numbers of each channel, and the bounds of its products and values in this window."""
    for j in range(means.size):
        both = exponents[0, j] + exponents[2, j] - window * PRODUCT_WINDOW
        top = exponents[0, j] - window * VALUE_WINDOW
        numbers[0, j] = _magic(both - PRODUCT_GRID)
        numbers[1, j] = numbers[0, j] + 6 * _power(both - PRODUCT_GRID)
        numbers[2, j] = _magic(top - VALUE_GRID)
        numbers[3, j], numbers[4, j], numbers[5, j], numbers[6, j] = 0.0, np.inf, 0.0, np.inf
        if bounded:
            least = _least_exponent(exponents[1, j]) + _least_exponent(exponents[3, j])
            numbers[3, j] = _power(both - PRODUCT_WINDOW)
            numbers[4, j] = _power(both) if both > least else 0.0
            numbers[5, j] = 0.0 if top - VALUE_WINDOW < -125 else _power(top - VALUE_WINDOW)
            numbers[6, j] = _power(top) if top >= exponents[1, j] else 0.0
        numbers[7, j] = means[j]


@plain
def _add_window(exponents, window, channels, n, fours, sums, record, c):
    """Add the steps of each channel, of n products and of so many fours of values, to the record from c on."""
    for j in range(channels):
        both = exponents[0, j] + exponents[2, j] - window * PRODUCT_WINDOW
        top = exponents[0, j] - window * VALUE_WINDOW
        first = sums[0, j] - n * _bits(_magic(both - PRODUCT_GRID))  # modulo 2^64, which the sums may have gone through
        second = sums[1, j] - n * _bits(6 * _power(both - PRODUCT_GRID))
        values = sums[2, j] - fours * _bits(_magic(top - VALUE_GRID))
        _add_steps(record, _P0, PRODUCT_LIMBS, c + j, first, both - PRODUCT_GRID - PRODUCT_UNIT)
        _add_steps(record, _P0, PRODUCT_LIMBS, c + j, second, both - PRODUCT_GRID - 50 - PRODUCT_UNIT)
        _add_steps(record, _V0, VALUE_LIMBS, c + j, values, top - VALUE_GRID - VALUE_UNIT)


@plain
def _set_lines(values, channels, places, times, numbers, lines):
    """Set the first lines to the numbers of the channel of each place."""
    for k in range(lines):
        _repeat(values[k][:channels], places, times, numbers[k * LINE :])


@plain
def _sum_lines(channels, places, times, lines, steps, sums):
    for k in range(lines):
        sums[k][:channels] = 0
        _fold_sums(steps[k * LINE :], places, times, sums[k][:channels])


@plain
def _clear(width, lines, steps):
    for k in range(lines):
        steps[k * LINE : k * LINE + width] = 0


@plain
def _add_block(u, x, start, step, rows, length, long, places, times, squares, means, record, c, space):
    """Add a block to the record of the channels from c on."""
    channels = means.size
    width, n = times * channels * places, rows * length // channels
    steps, numbers, extremes, exponents, sums, values = space
    lines, high, low, finite = steps.view(np.uint32), extremes[0][:channels], extremes[1][:channels], True
    for k in range(2):
        line = x if k == 1 else u
        if long and (k == 0 or not squares):
            high[0], low[0] = _range_along(line, start, step, rows, length)
        elif k == 0 or not squares:
            _range_across(line, start, step, rows, length, lines)
            high[:], low[:] = 0, 0xFFFFFFFF
            _fold_larger(lines, places, times, high)
            _fold_smaller(lines[LINE:], places, times, low)
        finite = _set_exponents(high, low, exponents[2 * k], exponents[2 * k + 1]) and finite
    windows = _number_of_windows(exponents, channels, finite)
    for window in range(max(windows, 1)):
        _set_numbers(exponents, window, windows > 0, means, values)
        _set_lines(values, channels, places, times, numbers, NUMBERS - 1)
        _clear(width, 3, steps)
        if windows > 0:
            _windows(u, x, start, step, rows, length, long, numbers, steps)
            fours = n
        elif squares:
            fours = _squares_of_rows(u, x, start, step, rows, length, long, numbers, steps) // channels
        else:
            fours = _products_of_rows(u, x, start, step, rows, length, long, numbers, steps) // channels
        _sum_lines(channels, places, times, 3, steps, sums)
        _add_window(exponents, window, channels, n, fours, sums, record, c)
    if not (finite and (squares or np.isfinite(means).all())):
        _set_lines(values, channels, places, times, numbers, NUMBERS)
        _clear(width, STEPS, steps)
        _all_kinds(u, x, start, step, rows, length, long, numbers, steps)
        _sum_lines(channels, places, times, STEPS, steps, sums)
        for k in range(KINDS if squares else 2 * KINDS):
            for j in range(channels):
                record[_VK0 + k, c + j] += sums[k, j]


@plain
def _add_tile(u, x, sample, plane, c0, r0, r1, squares, means, record):
    """Add the rows r0 … r1 - 1 of the channels from c0 on to a record: Σx and Σx² (squares), or Σu and Σu·x."""
    lines, of_channels = np.empty((STEPS + NUMBERS) * LINE, np.int64), np.empty((4 + STEPS, WIDTH), np.int64)
    extremes, values = np.empty((2, WIDTH), np.uint32), np.empty((NUMBERS, WIDTH))
    space = (
        lines[: STEPS * LINE],
        lines[STEPS * LINE :].view(np.float64),
        extremes,
        of_channels[:4],
        of_channels[4:],
        values,
    )
    long, together = plane > WIDTH or (plane >= LONG and r1 - r0 < FEW), max(CHUNK // plane, 1)
    each, times = 1 if long else max(WIDTH // plane, 1), 1
    if not long and means.size * plane == sample and sample <= WIDTH:  # whole samples lie side by side
        each, times = means.size, max(min(WIDTH // sample, (r1 - r0) // 4), 1)
    for r in range(r0, r1, together):
        (row, length), some = _row(r, sample, plane), min(together, r1 - r)
        for j in range(0, means.size, each):
            mean, start = means[j : j + each], row + (c0 + j) * plane
            for rest in range(2):  # samples that are side by side with others, and samples that are not
                beside = 1 if rest else times
                rows = some % times if rest else some // times
                places = min(max(length // 4, 4 * LANES), WIDTH) if long else plane
                if rows > 0:
                    size, c = beside * mean.size * length, c0 + j
                    _add_block(
                        u, x, start, beside * sample, rows, size, long, places, beside, squares, mean, record, c, space
                    )  # fmt: skip
                start += rows * beside * sample


# ---- From limbs to statistics: pairs of float64, in many channels at once --------------------------------------------
# A pair high + low is within 2^-100 of a number, relatively. Where no error of that size changes the nearest float64,
# the result is sure to be correctly rounded. The other channels, few of usual data, are left to Python's integers.

_ERROR = 2.0**-96


@plain
def _two_sum(a, b):
    """Return a + b and the rounding error."""
    total = a + b
    c = total - a
    return total, (a - (total - c)) + (b - c)


@plain
def _two_product(a, b):
    """Return a·b and the rounding error, by Dekker's halves."""
    product, big, other = a * b, a * 134217729.0, b * 134217729.0
    a1, b1 = big - (big - a), other - (other - b)
    a2, b2 = a - a1, b - b1
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


@plain
def _difference(a, a1, a2, b, b1, b2):
    """Return (a + a1 + a2) − (b + b1 + b2) as a pair, and 0 if nothing was lost by rounding."""
    high, c = _two_sum(a, -b)
    low, d = _two_sum(a1, -b1)
    more, e = _two_sum(a2, -b2)
    low, f = _two_sum(low, c)
    low, g = _two_sum(low, more)
    high, low = _two_sum(high, low)
    return high, low, abs(d) + abs(e) + abs(f) + abs(g)


@plain
def _nearest(high, low, error):
    """Return high + low, and True if that is the nearest float64 for every error up to this one."""
    least, most = high + (low - error), high + (low + error)
    return least, least == most


@plain
def _divided(high, low, error, n):
    """Return (high + low)/n as `_nearest` does."""
    first = high / n
    product, rest = _two_product(first, n)
    remainder, lost = _two_sum((high - product) - rest, low)
    second = remainder / n
    product, rest = _two_product(second, n)
    whole = lost == 0.0 and product == remainder and rest == 0.0
    return _nearest(first, second, error / n + (0.0 if whole else abs(first) * _ERROR))


@plain
def _pairs(record, row, limbs, unit, c0, pairs):
    """Set pairs and their errors (3, channels), of numbers of the channels from c0 on, given as limbs.

    The limbs are digits of either sign, which are added. Without a rounding the error is 0, so that ties are sure.
    """
    high, low, error, carry = pairs[0], pairs[1], pairs[2], np.zeros(pairs.shape[1], np.int64)
    pairs[:] = 0.0
    for k in range(limbs + 1):
        scale = math.ldexp(1.0, unit + BITS * k)
        line = record[row + min(k, limbs - 1), c0 : c0 + carry.size]
        for j in range(carry.size):
            total = carry[j] + (line[j] if k < limbs else 0)
            carry[j] = (total + (1 << (BITS - 1))) >> BITS
            high[j], below = _two_sum(high[j], np.float64(total - (carry[j] << BITS)) * scale)
            low[j], lost = _two_sum(low[j], below)
            error[j] += abs(lost)
    for j in range(carry.size):
        high[j], low[j] = _two_sum(high[j], low[j])
        error[j] = 0.0 if error[j] == 0.0 else abs(high[j]) * _ERROR


@plain
def _set_sure(record, c0, sure):
    """Set the channels whose values are finite to True."""
    sure[:] = True
    for k in range(_VK0, ROWS):
        line = record[k, c0 : c0 + sure.size]
        for j in range(sure.size):
            sure[j] &= line[j] == 0


@plain
def _finish_moments(record, c0, c1, n, mean, m2, sure):
    """(E1) Set mean and m2, from the record (rows, C) of Σx and Σx²: m2 = (n·Σx² − (Σx)²)/n."""
    totals, products, number = np.empty((3, c1 - c0)), np.empty((3, c1 - c0)), np.float64(n)
    mean, m2, sure = mean[c0:c1], m2[c0:c1], sure[c0:c1]
    _set_sure(record, c0, sure)
    _pairs(record, _V0, VALUE_LIMBS, VALUE_UNIT, c0, totals)
    _pairs(record, _P0, PRODUCT_LIMBS, PRODUCT_UNIT, c0, products)
    for j in range(mean.size):
        total, low = totals[0, j], totals[1, j]
        mean[j], sure_mean = _divided(total, low, totals[2, j], number)
        scaled, scaled_low = _two_product(products[0, j], number)
        square, square_low = _two_product(total, total)
        (more, lost), (other, also) = _two_product(products[1, j], number), _two_product(2 * total, low)
        spread, rest, rounded = _difference(scaled, scaled_low, more, square, square_low, other)
        exactly = rounded + abs(lost) + abs(also) + abs(low * low) + products[2, j] + totals[2, j] == 0.0
        m2[j], sure_m2 = _divided(spread, rest, 0.0 if exactly else scaled * _ERROR, number)
        sure[j] &= sure_mean & sure_m2


@plain
def _finish_sums(record, c0, c1, mean, s, q, sure):
    """(E5) Set Σu and Σu·(x−mean) = Σu·x − mean·Σu, from the record (rows, C) of Σu and Σu·x."""
    totals, products = np.empty((3, c1 - c0)), np.empty((3, c1 - c0))
    mean, s, q, sure = mean[c0:c1], s[c0:c1], q[c0:c1], sure[c0:c1]
    _set_sure(record, c0, sure)
    _pairs(record, _V0, VALUE_LIMBS, VALUE_UNIT, c0, totals)
    _pairs(record, _P0, PRODUCT_LIMBS, PRODUCT_UNIT, c0, products)
    for j in range(mean.size):
        total, low, product = totals[0, j], totals[1, j], products[0, j]
        s[j], sure_s = _nearest(total, low, totals[2, j])
        (taken, taken_low), (more, lost) = _two_product(mean[j], total), _two_product(mean[j], low)
        spread, rest, rounded = _difference(product, products[1, j], 0.0, taken, taken_low, more)
        exactly = rounded + abs(lost) + products[2, j] + totals[2, j] == 0.0
        q[j], sure_q = _nearest(spread, rest, 0.0 if exactly else (abs(product) + abs(taken)) * _ERROR)
        usual = mean[j] == 0.0 or abs(mean[j]) > 2.0**-230  # otherwise the errors of a product may be 0
        sure[j] &= sure_s & sure_q & usual


# ---- Maps: the runs of ``tiles.py`` without contraction, so that every operation rounds by itself --------------------


def _uncontracted(run: Any) -> Any:
    """Return a run compiled anew, under a name of its own."""
    function = getattr(run, "py_func", run)
    copy = FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.__qualname__ = f"exact{function.__qualname__}"
    return plain(copy)


affine_of_planes = _map_along(_uncontracted(_affine_along))
affine_of_lines = _map_across(_uncontracted(_affine_across), _uncontracted(_affine_across_4))
affine2_of_planes = _map_along(_uncontracted(_affine2_along))
affine2_of_lines = _map_across(_uncontracted(_affine2_across), _uncontracted(_affine2_across_4), True)

# ---- Stages ----------------------------------------------------------------------------------------------------------
# A thread adds its tiles to a record that it borrows: a group has as many as tiles, of which few are ever used.


def _sums(tile, group, u, x, cut, squares, means, borrowed, records):
    """(E10) Add Σx and Σx² (squares), or Σu and Σu·x, to a record."""
    c0, c1, r0, r1 = _tile(cut, group, tile)
    k, new = borrow(borrowed, group * cut.tiles, cut.tiles)
    if new:
        for row in range(ROWS):
            records[k, row, c0:c1] = 0
    _add_tile(u, x, cut.sample, cut.plane, c0, r0, r1, squares, means[c0:c1], records[k])
    give_back(borrowed, group * cut.tiles + k)


@plain
def _add_records(cut, group, c0, c1, borrowed, records, record):
    """Set the record (rows, C) to the sum of those that were borrowed."""
    for k in range(cut.tiles if cut.tiles > 1 else 0):  # one is the record itself
        if was_borrowed(borrowed, group * cut.tiles + k):
            for row in range(ROWS):
                for c in range(c0, c1):
                    record[row, c] = records[k, row, c] + (0 if k == 0 else record[row, c])


def _moments(part, group, cut, borrowed, records, record, mean, m2, sure):
    """(E1, E10) The record of the group; mean and m2."""
    c0, c1 = _span(cut, group, part)
    _add_records(cut, group, c0, c1, borrowed, records, record)
    _finish_moments(record, c0, c1, cut.n, mean, m2, sure)


def _gradients(part, group, cut, borrowed, records, record, mean, rstd, weight, dweight, dbias, sure, a, b, c):
    """(E5, E6) dweight, dbias, and the coefficients of dx."""
    c0, c1 = _span(cut, group, part)
    _add_records(cut, group, c0, c1, borrowed, records, record)
    _finish_sums(record, c0, c1, mean, dbias, dweight, sure)
    _set_gradients(c0, c1, cut.n, rstd, weight, dweight, dbias, a, b, c)


def _total(part, group, cut, borrowed, records, record):
    """(E10) The record of the group."""
    c0, c1 = _span(cut, group, part)
    _add_records(cut, group, c0, c1, borrowed, records, record)


def _affine(tile, group, x, cut, mean, a, c, out, in_place):
    """(E3, E7) a·(x−mean) + c."""
    c0, c1, r0, r1 = _tile(cut, group, tile)
    mean, a, c = mean[c0:c1], a[c0:c1], c[c0:c1]
    if cut.plane >= LONG:
        affine_of_planes(x, x, cut.sample, cut.plane, c0, r0, r1, mean, a, a, c, out, in_place)
    else:
        affine_of_lines(x, x, cut.sample, cut.plane, c0, r0, r1, mean, a, a, c, out, in_place)


def _affine2(tile, group, u, x, cut, mean, a, b, c, out, in_place):
    """(E6) a·u + (b·(x−mean) + c)."""
    c0, c1, r0, r1 = _tile(cut, group, tile)
    mean, a, b, c = mean[c0:c1], a[c0:c1], b[c0:c1], c[c0:c1]
    if cut.plane >= LONG:
        affine2_of_planes(u, x, cut.sample, cut.plane, c0, r0, r1, mean, a, b, c, out, in_place)
    else:
        affine2_of_lines(u, x, cut.sample, cut.plane, c0, r0, r1, mean, a, b, c, out, in_place)


# ---- Jobs ------------------------------------------------------------------------------------------------------------


@plain
def _records(cut, record):
    """Return as many records as there are tiles, and a word for each of every group; the record itself for one tile."""
    borrowed = np.zeros(cut.groups * cut.tiles, np.int64)
    if cut.tiles == 1:
        return borrowed, record.reshape((1, ROWS, cut.channels))
    return borrowed, np.empty((cut.tiles, ROWS, cut.channels), np.int64)


def _sums_alone(at, words, u, x, numbers, squares, means, record):
    cut = _cut_of(numbers)
    work, sums, total = at
    borrowed, records = _records(cut, record)
    board = _board(cut)
    stages = (
        (sums, place((u, x, cut, squares, means, borrowed, records)), cut.tiles, ONWARDS),
        (total, place((cut, borrowed, records, record)), _parts(cut), ONWARDS),
    )
    _do(words, cut, work, stages, board, (borrowed, records))


def _forward(at, words, x, numbers, weight, bias, eps, record, mean, m2, sure, rstd, out, in_place):
    """(E1, E3) Set the record, mean, m2 and rstd, and write y = weight·xhat + bias."""
    cut = _cut_of(numbers)
    work, sums, moments, normalized, affine = at
    borrowed, records = _records(cut, record)
    board, memory = _board(cut), np.empty((2, cut.channels))
    a, c = memory[0], memory[1]
    stages = (
        (sums, place((x, x, cut, True, mean, borrowed, records)), cut.tiles, ONWARDS),
        (moments, place((cut, borrowed, records, record, mean, m2, sure)), _parts(cut), ONWARDS),
        (normalized, place((cut, m2, weight, bias, eps, rstd, a, c)), _parts(cut), ONWARDS),
        (affine, place((x, cut, mean, a, c, out, in_place)), cut.tiles, BACKWARDS),
    )
    _do(words, cut, work, stages, board, (borrowed, records, memory))


def _backward(at, words, dy, x, numbers, mean, rstd, weight, dweight, dbias, sure, out, in_place):
    """(E5, E6) Set dweight and dbias, and write dx."""
    cut = _cut_of(numbers)
    work, sums, gradients, affine2 = at
    record = np.empty((ROWS, cut.channels), np.int64)
    borrowed, records = _records(cut, record)
    board, memory = _board(cut), np.empty((3, cut.channels))
    a, b, c = memory[0], memory[1], memory[2]
    found = (cut, borrowed, records, record, mean, rstd, weight, dweight, dbias, sure, a, b, c)
    stages = (
        (sums, place((dy, x, cut, False, mean, borrowed, records)), cut.tiles, ONWARDS),
        (gradients, place(found), _parts(cut), ONWARDS),
        (affine2, place((dy, x, cut, mean, a, b, c, out, in_place)), cut.tiles, BACKWARDS),
    )
    _do(words, cut, work, stages, board, (borrowed, record, records, memory))


def _all_moments(record, n, mean, m2, sure):
    """(E1) Set mean and m2 of every channel."""
    _finish_moments(record, 0, mean.size, n, mean, m2, sure)


def _all_sums(record, mean, s, q, sure):
    """(E5) Set Σu and Σu·(x−mean) of every channel."""
    _finish_sums(record, 0, mean.size, mean, s, q, sure)


class _Compiled(Compiled):
    """The entries for one dtype, each compiled at its first use."""

    def __init__(self, stored: types.Type) -> None:
        super().__init__(stored)
        x, out, number, numbers = _READ(stored), _WRITE(stored), types.intp, _READ(types.int64)
        given, found = _READ(types.float64), _WRITE(types.float64)
        record, records = _WRITE(types.int64, ndim=2), _WRITE(types.int64, ndim=3)
        sure = _WRITE(types.boolean)
        usual = self._stages, self._jobs
        self._stages = {
            "sums": (_sums, (x, x, _CUT, types.boolean, given, _WORDS, records)),
            "total": (_total, (_CUT, _WORDS, records, record)),
            "moments": (_moments, (_CUT, _WORDS, records, record, found, found, sure)),
            "normalized": usual[0]["normalized"],
            "gradients": (
                _gradients,
                (_CUT, _WORDS, records, record, *(given,) * 3, found, found, sure, *(found,) * 3),
            ),
            "affine": (_affine, usual[0]["affine"][1]),
            "affine2": (_affine2, usual[0]["affine2"][1]),
        }
        self._jobs = {
            "sums": (_sums_alone, (x, x, numbers, types.boolean, given, record), ("sums", "total")),
            "affine": usual[1]["affine"],
            "affine2": usual[1]["affine2"],
            "forward": (
                _forward,
                (x, numbers, given, given, types.float64, record, found, found, sure, found, out, number),
                ("sums", "moments", "normalized", "affine"),
            ),
            "backward": (
                _backward,
                (x, x, numbers, given, given, given, found, found, sure, out, number),
                ("sums", "gradients", "affine2"),
            ),
        }


_compiled = functools.cache(lambda dtype: _Compiled(_STORED[dtype]))
_FOUND, _GIVEN = (*(_WRITE(types.float64),) * 2, _WRITE(types.boolean)), _READ(types.int64, ndim=2)


@functools.cache
def _finishing(name: str) -> Any:
    """Return the entry for records alone."""
    if name == "moments":
        return _compile(_all_moments, (_GIVEN, types.intp, *_FOUND))
    return _compile(_all_sums, (_GIVEN, _READ(types.float64), *_FOUND))


# ---- The sweeps ------------------------------------------------------------------------------------------------------


def squares(x: Array) -> Array:
    """(E10) The record (rows, C) of Σx and Σx², of x (N, C, S)."""
    return _record(_Job(x, entries=_compiled), True, np.zeros(x.shape[1]))


def products(u: Array, x: Array, mean: Array) -> Array:
    """(E10) The record (rows, C) of Σu and Σu·x, of u and x (N, C, S); mean (C,) is that of x."""
    return _record(_Job(x, u, entries=_compiled), False, mean)


def _record(job: _Job, of_squares: bool, mean: Array) -> Array:
    record = np.zeros((ROWS, job.cut.channels), np.int64)
    if job.cut.n:
        job.code.sums(job.words, job.u, job.x, job.numbers, of_squares, mean, record)
    return record


def mean_and_m2(record: Array, n: int) -> Array:
    """(E1) mean and m2 (2, C) of n values, correctly rounded, from the record of Σx and Σx²."""
    result, sure = np.empty((2, record.shape[1])), np.empty(record.shape[1], np.bool_)
    _finishing("moments")(contiguous(record), n, *result, sure)
    if not sure.all():
        result[:, ~sure] = exact.mean_and_m2(record[:, ~sure], n)
    return result


def sums(record: Array, mean: Array) -> Array:
    """(E5) Σu and Σu·(x−mean) (2, C), correctly rounded, from the record of Σu and Σu·x and mean (C,)."""
    result, sure = np.empty((2, record.shape[1])), np.empty(record.shape[1], np.bool_)
    _finishing("sums")(contiguous(record), mean, *result, sure)
    if not sure.all():
        result[:, ~sure] = exact.sums(record[:, ~sure], mean[~sure])
    return result


def affine(x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
    """(E3, E7) a·(x−mean) + c (N, C, S), in the dtype of x, written to `out` where `out` is contiguous."""
    job = _Job(x, entries=_compiled)
    return job.map("affine", x, out, (job.x,), mean, a, c)


def affine2(u: Array, x: Array, mean: Array, a: Array, b: Array, c: Array, out: Array | None = None) -> Array:
    """(E6) a·u + (b·(x−mean) + c) (N, C, S), in the dtype of x, written to `out` where `out` is contiguous."""
    job = _Job(x, u, entries=_compiled)
    return job.map("affine2", x, out, (job.u, job.x), mean, a, b, c)


def forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
) -> tuple[Moments, Array, Array] | None:
    """(E1, E3) The moments of x (N, C, S), rstd (C,) and y; None for no values, and for `out` over x."""
    job = _Job(x, entries=_compiled)
    job.write_to(x, out)
    if not job.cut.n or job.in_place:
        return None
    ones = np.ones(job.cut.channels) if weight is None else weight
    zeros = np.zeros(job.cut.channels) if bias is None else bias
    (mean, m2, rstd), record = job.vectors(3), np.empty((ROWS, job.cut.channels), np.int64)
    sure = np.empty(job.cut.channels, np.bool_)
    found = record, mean, m2, sure, rstd
    job.code.forward(job.words, job.x, job.numbers, ones, zeros, eps, *found, job.y, job.in_place)
    if sure.all():
        return Moments(job.cut.n, mean, m2, record=record), rstd, job.result
    this: Any = sys.modules[__name__]
    batch = exact.moments_of(this, record, job.cut.n, x)
    return batch, *reference.forward_of_part(this, x, batch, weight, bias, eps, job.result)


def backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None = None
) -> tuple[Array, Array, Array] | None:
    """(E5, E6) dx, and dweight and dbias (C,), from dy and x (N, C, S) and the mean of x; None as for a forward.

    None as well where Python's integers are needed.
    """
    job = _Job(x, dy, entries=_compiled)
    job.write_to(x, out)
    if not job.cut.n or job.in_place:
        return None
    weight = np.ones(job.cut.channels) if weight is None else weight
    (dweight, dbias), sure = job.vectors(2), np.empty(job.cut.channels, np.bool_)
    found = dweight, dbias, sure
    job.code.backward(job.words, job.u, job.x, job.numbers, mean, rstd, weight, *found, job.y, job.in_place)
    return (job.result, dweight, dbias) if sure.all() else None

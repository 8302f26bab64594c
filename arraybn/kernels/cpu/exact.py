"""Exact sums in compiled code (E10): the records of ``arraybn.exact``, a chunk of values at a time.

A chunk has at most 4096 values of a channel. Adding a power of two that is large enough, a *magic number*, puts a value
on a grid: the bits of the sum, read as an integer, then count grid steps from the bits of the magic number. Integers
add without rounding, in any order, so the compiler may vectorize their sum.

The grid for values below 2^e has the step 2^(e-51). It holds a value exactly whose exponent is at most 27 below e - 1;
a product of two values, below 2^e, needs two grids, 2^(e-51) and 2^(e-103), and its exponent may be 55 below. Where the
values of a chunk span more, or are not all finite, the chunk is gone through once for each such window of exponents.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
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
from .. import threads
from .entries import _READ, _STORED, _WRITE, _compile
from .half import _conversion, _from_bfloat16, _from_half, narrow, wide
from .lines import line_of, place_of_result
from .tiles import LONG, PIECE, _map_across, _map_along, plain

CHUNK = 4096  # values of a channel whose grid steps fit an int64: 2^51 steps each
VALUE_WINDOW, PRODUCT_WINDOW = 28, 56  # exponents that one pass holds
WIDTH = 512  # places side by side in a chunk of many channels
ROWS_OF_CHUNK = 512  # rows of such a chunk: with 512 places 1 MB, which the second pass finds in cache
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


_to_larger, _to_smaller = _choice(">"), _choice("<")
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
def _magic(exponent):
    """Return the magic number of the grid 2^exponent."""
    return _of_bits(((exponent + 52 + 1023) << 52) | (1 << 51))  # ldexp takes ten times as long


@plain
def _add_steps(limbs, count, magic, steps, exponent, unit):
    """Add to the limbs the grid steps that `count` sums of the magic number have in excess."""
    value = np.int64(steps - count * _bits(magic))  # modulo 2^64, which the sums may have gone through
    place = exponent - unit
    if place < 0:  # the last bits are 0: the smallest values are multiples of the unit
        value = value >> min(-place, 63)
        place = 0
    k, shift = place >> 5, place & 31
    low, high = (value & _MASK) << shift, (value >> BITS) << shift
    limbs[k] += low & _MASK
    if k + 2 < limbs.size:
        limbs[k + 1] += (low >> BITS) + (high & _MASK)
        limbs[k + 2] += high >> BITS
    else:
        limbs[k + 1] += (low >> BITS) + high


@plain
def _count_kind(kinds, value):
    """Count a value that is not finite."""
    if np.isnan(value):
        kinds[0] += 1
    elif value > 0:
        kinds[1] += 1
    else:
        kinds[2] += 1


# ---- Chunks along planes: `rows` runs of `length` values, `step` apart -----------------------------------------------


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
def _squares_along(x, start, step, rows, length, m1, m2, m3):
    a = b = d = np.int64(0)
    for r in range(rows):
        first = np.uintp(start + r * step)
        for i in range(first, first + np.uintp(length)):
            v = wide(x[i])
            t = v * v
            u = t + m1
            a += _bits(u)
            b += _bits((t - (u - m1)) + m2)
            d += _bits(v + m3)
    return a, b, d


@plain
def _products_along(u, x, start, step, rows, length, m1, m2, m3):
    a = b = d = np.int64(0)
    for r in range(rows):
        first = np.uintp(start + r * step)
        for i in range(first, first + np.uintp(length)):
            v = wide(u[i])
            t = v * wide(x[i])
            s = t + m1
            a += _bits(s)
            b += _bits((t - (s - m1)) + m2)
            d += _bits(v + m3)
    return a, b, d


@plain
def _values_in_window(x, start, step, rows, length, low, high, m3):
    d = np.int64(0)
    for r in range(rows):
        first = np.uintp(start + r * step)
        for i in range(first, first + np.uintp(length)):
            v = wide(x[i])
            d += _bits((v if low <= abs(v) < high else 0.0) + m3)
    return d


@plain
def _products_in_window(u, x, start, step, rows, length, low, high, m1, m2):
    a = b = np.int64(0)
    for r in range(rows):
        first = np.uintp(start + r * step)
        for i in range(first, first + np.uintp(length)):
            t = wide(u[i]) * wide(x[i])
            t = t if low <= abs(t) < high else 0.0
            s = t + m1
            a += _bits(s)
            b += _bits((t - (s - m1)) + m2)
    return a, b


@plain
def _add_values_by_windows(x, start, step, rows, length, high, low, limbs):
    """Add Σx of a chunk of any span to the limbs."""
    top, bottom = _top(high), _bottom(low)
    while top >= bottom:
        m3 = _magic(top - 51)
        least = 0.0 if top - VALUE_WINDOW < -125 else math.ldexp(1.0, top - VALUE_WINDOW)
        d = _values_in_window(x, start, step, rows, length, least, math.ldexp(1.0, top), m3)
        _add_steps(limbs, rows * length, m3, d, top - 51, VALUE_UNIT)
        top -= VALUE_WINDOW


@plain
def _add_products_by_windows(u, x, start, step, rows, length, top, bottom, limbs):
    """Add Σu·x of a chunk of any span to the limbs: of products below 2^top that are at least 2^bottom, or 0."""
    while top > bottom:
        m1, m2 = _magic(top - 51), _magic(top - 103)
        least = math.ldexp(1.0, top - PRODUCT_WINDOW)
        a, b = _products_in_window(u, x, start, step, rows, length, least, math.ldexp(1.0, top), m1, m2)
        _add_steps(limbs, rows * length, m1, a, top - 51, PRODUCT_UNIT)
        _add_steps(limbs, rows * length, m2, b, top - 103, PRODUCT_UNIT)
        top -= PRODUCT_WINDOW


@plain
def _squares_of_chunk(x, start, step, rows, length, limbs):
    """Add Σx and Σx² of a chunk to the limbs of its channel (rows of a record)."""
    high, low = _range_along(x, start, step, rows, length)
    top, bottom, n = _top(high), _bottom(low), rows * length
    values, products = limbs[_V0 : _V0 + VALUE_LIMBS], limbs[_P0 : _P0 + PRODUCT_LIMBS]
    if top - bottom < VALUE_WINDOW and high < 0x7F800000:
        m1, m2, m3 = _magic(2 * top - 51), _magic(2 * top - 103), _magic(top - 51)
        a, b, d = _squares_along(x, start, step, rows, length, m1, m2, m3)
        _add_steps(products, n, m1, a, 2 * top - 51, PRODUCT_UNIT)
        _add_steps(products, n, m2, b, 2 * top - 103, PRODUCT_UNIT)
        _add_steps(values, n, m3, d, top - 51, VALUE_UNIT)
        return
    _add_values_by_windows(x, start, step, rows, length, high, low, values)
    least = _least_exponent(bottom)
    _add_products_by_windows(x, x, start, step, rows, length, 2 * top, 2 * least, products)
    if high >= 0x7F800000:
        for r in range(rows):
            for i in range(start + r * step, start + r * step + length):
                v = wide(x[np.uintp(i)])
                if not np.isfinite(v):
                    _count_kind(limbs[_VK0 : _VK0 + KINDS], v)


@plain
def _least_exponent(bottom):
    """Return k with |value| ≥ 2^k for the smallest magnitude but 0; subnormal ones share one exponent."""
    return -149 if bottom <= -125 else bottom - 1


@plain
def _products_of_chunk(u, x, start, step, rows, length, mean, limbs):
    """Add Σu and Σu·x of a chunk to the limbs of its channel."""
    high, low = _range_along(u, start, step, rows, length)
    high_x, low_x = _range_along(x, start, step, rows, length)
    top, bottom, top_x, bottom_x = _top(high), _bottom(low), _top(high_x), _bottom(low_x)
    n, both, finite = rows * length, top + top_x, max(high, high_x) < 0x7F800000
    values, products = limbs[_V0 : _V0 + VALUE_LIMBS], limbs[_P0 : _P0 + PRODUCT_LIMBS]
    if finite and top - bottom < VALUE_WINDOW and top_x - bottom_x < VALUE_WINDOW:
        m1, m2, m3 = _magic(both - 51), _magic(both - 103), _magic(top - 51)
        a, b, d = _products_along(u, x, start, step, rows, length, m1, m2, m3)
        _add_steps(products, n, m1, a, both - 51, PRODUCT_UNIT)
        _add_steps(products, n, m2, b, both - 103, PRODUCT_UNIT)
        _add_steps(values, n, m3, d, top - 51, VALUE_UNIT)
    else:
        _add_values_by_windows(u, start, step, rows, length, high, low, values)
        least = _least_exponent(bottom) + _least_exponent(bottom_x)
        _add_products_by_windows(u, x, start, step, rows, length, both, least, products)
    if not (finite and np.isfinite(mean)):
        _count_kinds(u, x, start, step, rows, length, mean, limbs)


@plain
def _count_kinds(u, x, start, step, rows, length, mean, limbs):
    """Count u and u·(x−mean) that are not finite because one of the three is not."""
    for r in range(rows):
        for i in range(start + r * step, start + r * step + length):
            v, d = wide(u[np.uintp(i)]), wide(x[np.uintp(i)])
            if not np.isfinite(v):
                _count_kind(limbs[_VK0 : _VK0 + KINDS], v)
            if not (np.isfinite(v) and np.isfinite(d) and np.isfinite(mean)):
                t = v * (d - mean)
                if not np.isfinite(t):
                    _count_kind(limbs[_PK0 : _PK0 + KINDS], t)


# ---- Channels along planes -------------------------------------------------------------------------------------------


@plain
def _add_channel_along(u, x, sample, plane, c, n0, n1, mean, squares, limbs):
    """Add the samples n0 … n1 - 1 of channel c to its limbs: Σx and Σx² (squares), or Σu and Σu·x."""
    together = max(CHUNK // plane, 1)  # planes in a chunk
    for n in range(n0, n1, together):
        for first in range(0, plane, CHUNK):
            start, rows = n * sample + c * plane + first, min(together, n1 - n)
            length = min(CHUNK, plane - first)
            if squares:
                _squares_of_chunk(x, start, sample, rows, length, limbs)
            else:
                _products_of_chunk(u, x, start, sample, rows, length, mean, limbs)


# ---- Chunks across channels: rows of `width` places, of which each has sums of its own -------------------------------
# The lines of an array of numbers lie WIDTH apart, a constant, so that the compiler knows that they do not overlap.


@plain
def _range_across(x, start, step, rows, width, lines):
    """Set the lines to the bits of the largest magnitude of each place, and of the smallest but 0, less one."""
    for j in range(width):
        lines[j], lines[WIDTH + j] = np.uint32(0), np.uint32(0xFFFFFFFF)
    for r in range(rows):
        first = np.uintp(start + r * step)
        for j in range(np.uintp(width)):
            bits = _magnitude_bits(x[first + j])
            lines[j] = _larger(lines[j], bits)
            lines[WIDTH + j] = _smaller(lines[WIDTH + j], _one_less(bits))


@plain
def _squares_across(x, start, step, rows, width, magic, steps):
    """Add the steps of Σx² (two lines) and Σx (a third) of each place, four rows at a time."""
    for r in range(0, rows - rows % 4, 4):
        i0 = np.uintp(start + r * step)
        i1, i2, i3 = i0 + np.uintp(step), i0 + np.uintp(2 * step), i0 + np.uintp(3 * step)
        for j in range(np.uintp(width)):
            v0, v1, v2, v3 = wide(x[i0 + j]), wide(x[i1 + j]), wide(x[i2 + j]), wide(x[i3 + j])
            t0, t1, t2, t3 = v0 * v0, v1 * v1, v2 * v2, v3 * v3
            m1, m2, m3 = magic[j], magic[WIDTH + j], magic[2 * WIDTH + j]
            u0, u1, u2, u3 = t0 + m1, t1 + m1, t2 + m1, t3 + m1
            w0, w1 = (t0 - (u0 - m1)) + m2, (t1 - (u1 - m1)) + m2
            w2, w3 = (t2 - (u2 - m1)) + m2, (t3 - (u3 - m1)) + m2
            steps[j] += (_bits(u0) + _bits(u1)) + (_bits(u2) + _bits(u3))
            steps[WIDTH + j] += (_bits(w0) + _bits(w1)) + (_bits(w2) + _bits(w3))
            steps[2 * WIDTH + j] += (_bits(v0 + m3) + _bits(v1 + m3)) + (_bits(v2 + m3) + _bits(v3 + m3))
    rest = rows % 4
    _products_by_row(x, x, start + (rows - rest) * step, step, rest, width, magic, steps)


@plain
def _products_across(u, x, start, step, rows, width, magic, steps):
    """Add the steps of Σu·x (two lines) and Σu (a third) of each place, two rows at a time."""
    for r in range(0, rows - rows % 2, 2):
        i0 = np.uintp(start + r * step)
        i1 = i0 + np.uintp(step)
        for j in range(np.uintp(width)):
            v0, v1 = wide(u[i0 + j]), wide(u[i1 + j])
            t0, t1 = v0 * wide(x[i0 + j]), v1 * wide(x[i1 + j])
            m1, m2, m3 = magic[j], magic[WIDTH + j], magic[2 * WIDTH + j]
            s0, s1 = t0 + m1, t1 + m1
            steps[j] += _bits(s0) + _bits(s1)
            steps[WIDTH + j] += _bits((t0 - (s0 - m1)) + m2) + _bits((t1 - (s1 - m1)) + m2)
            steps[2 * WIDTH + j] += _bits(v0 + m3) + _bits(v1 + m3)
    rest = rows % 2
    _products_by_row(u, x, start + (rows - rest) * step, step, rest, width, magic, steps)


@plain
def _products_by_row(u, x, start, step, rows, width, magic, steps):
    for r in range(rows):
        first = np.uintp(start + r * step)
        for j in range(np.uintp(width)):
            v = wide(u[first + j])
            t = v * wide(x[first + j])
            m1, m2 = magic[j], magic[WIDTH + j]
            s = t + m1
            steps[j] += _bits(s)
            steps[WIDTH + j] += _bits((t - (s - m1)) + m2)
            steps[2 * WIDTH + j] += _bits(v + magic[2 * WIDTH + j])


@plain
def _windows_across(u, x, start, step, rows, width, bounds, magic, steps):
    """As `_products_across`, of the values and products whose magnitude is between two bounds of their place."""
    for r in range(rows):
        first = np.uintp(start + r * step)
        for j in range(np.uintp(width)):
            v = wide(u[first + j])
            t = v * wide(x[first + j])
            t = t if bounds[j] <= abs(t) < bounds[WIDTH + j] else 0.0
            v = v if bounds[2 * WIDTH + j] <= abs(v) < bounds[3 * WIDTH + j] else 0.0
            m1, m2 = magic[j], magic[WIDTH + j]
            s = t + m1
            steps[j] += _bits(s)
            steps[WIDTH + j] += _bits((t - (s - m1)) + m2)
            steps[2 * WIDTH + j] += _bits(v + magic[2 * WIDTH + j])


@plain
def _add_chunk_across(u, x, start, step, rows, width, places, plane, means, squares, record, space):
    """Add a chunk to the record (C, rows): of place j, which is a value of channel j mod `places` div `plane`."""
    ranges, numbers, steps = space
    _range_across(u, start, step, rows, width, ranges)
    if not squares:
        _range_across(x, start, step, rows, width, ranges[2 * WIDTH :])
    passes = 0 if _set_magic(ranges, width, squares, numbers) else 1
    if passes == 0:
        steps[:] = 0
        if squares:
            _squares_across(x, start, step, rows, width, numbers, steps)
        else:
            _products_across(u, x, start, step, rows, width, numbers, steps)
        for j in range(width):
            top, _, top_x, _ = _exponents(ranges, j, squares)
            _add_place(steps, numbers, j, rows, top, top + top_x, True, True, record[j % places // plane])
    while passes and _set_window(ranges, width, squares, passes - 1, numbers):
        steps[:] = 0
        _windows_across(u, x, start, step, rows, width, numbers[3 * WIDTH :], numbers, steps)
        for j in range(width):
            top, _, top_x, _ = _exponents(ranges, j, squares)
            top, both = top - (passes - 1) * VALUE_WINDOW, top + top_x - (passes - 1) * PRODUCT_WINDOW
            value, product = numbers[6 * WIDTH + j] > 0, numbers[4 * WIDTH + j] > 0
            _add_place(steps, numbers, j, rows, top, both, value, product, record[j % places // plane])
        passes += 1
    for j in range(width):
        high = ranges[j] if squares else max(ranges[j], ranges[2 * WIDTH + j])
        c = j % places // plane
        if high >= 0x7F800000 or not np.isfinite(means[c]):
            _count_kinds_of_place(u, x, start + j, step, rows, means[c], squares, record[c])


@plain
def _count_kinds_of_place(u, x, start, step, rows, mean, squares, limbs):
    if not squares:
        _count_kinds(u, x, start, step, rows, 1, mean, limbs)
        return
    for r in range(rows):
        v = wide(x[np.uintp(start + r * step)])
        if not np.isfinite(v):
            _count_kind(limbs[_VK0 : _VK0 + KINDS], v)


@plain
def _exponents(ranges, j, squares):
    """Return the largest and the smallest exponent of u at a place, and those of x."""
    top, bottom = _top(ranges[j]), _bottom(ranges[WIDTH + j])
    if squares:
        return top, bottom, top, bottom
    return top, bottom, _top(ranges[2 * WIDTH + j]), _bottom(ranges[3 * WIDTH + j])


@plain
def _set_magic(ranges, width, squares, numbers):
    """Set the magic numbers of each place; return False if some place needs windows or is not finite."""
    for j in range(width):
        top, bottom, top_x, bottom_x = _exponents(ranges, j, squares)
        high = ranges[j] if squares else max(ranges[j], ranges[2 * WIDTH + j])
        if max(top - bottom, top_x - bottom_x) >= VALUE_WINDOW or high >= 0x7F800000:
            return False
        numbers[j], numbers[WIDTH + j] = _magic(top + top_x - 51), _magic(top + top_x - 103)
        numbers[2 * WIDTH + j] = _magic(top - 51)
    return True


@plain
def _set_window(ranges, width, squares, passes, numbers):
    """Set the magic numbers of each place in this pass, and the bounds of its values; return False if all are done."""
    some = False
    for j in range(width):
        top, bottom, top_x, bottom_x = _exponents(ranges, j, squares)
        both, least = top + top_x - passes * PRODUCT_WINDOW, _least_exponent(bottom) + _least_exponent(bottom_x)
        top -= passes * VALUE_WINDOW
        numbers[j], numbers[WIDTH + j] = _magic(both - 51), _magic(both - 103)
        numbers[2 * WIDTH + j] = _magic(top - 51)
        low, high = numbers[3 * WIDTH : 5 * WIDTH], numbers[5 * WIDTH : 7 * WIDTH]
        low[j] = math.ldexp(1.0, both - PRODUCT_WINDOW)
        low[WIDTH + j] = math.ldexp(1.0, both) if both > least else 0.0
        high[j] = 0.0 if top - VALUE_WINDOW < -125 else math.ldexp(1.0, top - VALUE_WINDOW)
        high[WIDTH + j] = math.ldexp(1.0, top) if top >= bottom else 0.0
        some = some or both > least or top >= bottom
    return some


@plain
def _add_place(steps, numbers, j, rows, top, both, value, product, limbs):
    """Add the steps of a place to the limbs of its channel."""
    if product:
        products = limbs[_P0 : _P0 + PRODUCT_LIMBS]
        _add_steps(products, rows, numbers[j], steps[j], both - 51, PRODUCT_UNIT)
        _add_steps(products, rows, numbers[WIDTH + j], steps[WIDTH + j], both - 103, PRODUCT_UNIT)
    if value:
        values = limbs[_V0 : _V0 + VALUE_LIMBS]
        _add_steps(values, rows, numbers[2 * WIDTH + j], steps[2 * WIDTH + j], top - 51, VALUE_UNIT)


@plain
def _add_channels_across(u, x, sample, plane, c0, n0, n1, means, squares, record):
    """Add samples n0 … n1 - 1 of the channels from c0 on (as many as there are means) to their record."""
    space = np.empty(4 * WIDTH, np.uint32), np.empty(7 * WIDTH), np.empty(3 * WIDTH, np.int64)
    places = means.size * plane
    if places == sample and sample <= WIDTH:  # several samples side by side
        times = WIDTH // sample
        beside = (n1 - n0) // times * times
        _add_rows(u, x, n0 * sample, times * sample, beside // times, times, plane, means, squares, record, space)
        _add_rows(u, x, (n0 + beside) * sample, sample, n1 - n0 - beside, 1, plane, means, squares, record, space)
        return
    each = max(WIDTH // plane, 1)  # channels in a chunk
    for c in range(0, means.size, each):
        start, end = n0 * sample + (c0 + c) * plane, min(c + each, means.size)
        _add_rows(u, x, start, sample, n1 - n0, 1, plane, means[c:end], squares, record[c:end], space)


@plain
def _add_rows(u, x, start, step, rows, times, plane, means, squares, record, space):
    """Add rows of places to the record, a chunk after the other; a row has all channels `times` times."""
    places = means.size * plane
    for r in range(0, rows, ROWS_OF_CHUNK):
        first, some = start + r * step, min(ROWS_OF_CHUNK, rows - r)
        _add_chunk_across(u, x, first, step, some, times * places, places, plane, means, squares, record, space)


# ---- From limbs to statistics: integers of many digits, rounded once -------------------------------------------------
# A number is a sign and its digits of 32 bits, the lowest first, as uint64.


@plain
def _digits(limbs, digits):
    """Set `digits` to the magnitude of a number, given as limbs of either sign; return True where it is negative."""
    carry = np.int64(0)
    for k in range(digits.size):
        total = (limbs[k] if k < limbs.size else np.int64(0)) + carry
        digits[k] = np.uint64(total & _MASK)
        carry = total >> BITS
    if carry >= 0:
        return False
    carry = np.int64(1)
    for k in range(digits.size):
        total = np.int64(_MASK) - np.int64(digits[k]) + carry
        digits[k] = np.uint64(total & _MASK)
        carry = total >> BITS
    return True


@plain
def _multiply(a, b, product):
    """Set `product` to a·b."""
    product[:] = np.uint64(0)
    mask, bits = np.uint64(_MASK), np.uint64(BITS)
    for i in range(a.size):
        if a[i] == np.uint64(0):  # most digits are
            continue
        carry = np.uint64(0)
        for j in range(b.size):
            if i + j < product.size:
                total = a[i] * b[j] + product[i + j] + carry
                product[i + j] = total & mask
                carry = total >> bits
        if i + b.size < product.size:
            product[i + b.size] = carry


@plain
def _subtract(a, b):
    """Subtract b from a in place, where a ≥ b."""
    borrow = np.int64(0)
    for k in range(a.size):
        total = np.int64(a[k]) - (np.int64(b[k]) if k < b.size else np.int64(0)) + borrow
        a[k] = np.uint64(total & _MASK)
        borrow = total >> BITS


@plain
def _quotient(a, n, exponent, space):
    """Return a/n·2^exponent, correctly rounded, for n < 2^32."""
    quotient, rest = space[: a.size + 3], np.uint64(0)  # three digits after the point, so that 64 bits are there
    for i in range(quotient.size):
        k = a.size - 1 - i
        total = (rest << np.uint64(BITS)) | (a[k] if k >= 0 else np.uint64(0))
        if total < n:  # a division takes long, and the first digits are 0
            quotient[k + 3], rest = np.uint64(0), total
            continue
        quotient[k + 3] = total // n
        rest = total - quotient[k + 3] * n
    return _round(quotient, rest != np.uint64(0), exponent - 3 * BITS)


@plain
def _round(digits, rest, exponent):
    """Return digits·2^exponent (and a little more, where `rest` is True) as a correctly rounded float64."""
    last = digits.size - 1
    while last >= 0 and digits[last] == np.uint64(0):
        last -= 1
    if last < 0:
        return 0.0
    empty = 0  # zero bits before the first one, of the last digit
    while digits[last] >> np.uint64(BITS - 1 - empty) == np.uint64(0):
        empty += 1
    high = digits[last] << np.uint64(BITS)
    high |= digits[last - 1] if last > 0 else np.uint64(0)
    below = digits[last - 2] if last > 1 else np.uint64(0)
    top = (high << np.uint64(empty)) | (below >> np.uint64(BITS - empty))  # 64 bits
    rest = rest or (below << np.uint64(empty)) & np.uint64(_MASK) != np.uint64(0)
    for k in range(last - 2):
        rest = rest or digits[k] != np.uint64(0)
    whole, beyond, half = top >> np.uint64(11), top & np.uint64(0x7FF), np.uint64(0x400)
    if beyond > half or (beyond == half and (rest or whole & np.uint64(1) == np.uint64(1))):
        whole += np.uint64(1)
    return math.ldexp(np.float64(np.int64(whole)), BITS * (last - 1) - empty + 11 + exponent)


@plain
def _special(kinds):
    """Return the sum of the values that are not finite; 0 where there is none."""
    if kinds[0] > 0 or (kinds[1] > 0 and kinds[2] > 0):
        return np.nan
    if kinds[1] > 0:
        return np.inf
    return -np.inf if kinds[2] > 0 else 0.0


@plain
def _mean_and_m2(limbs, n, space):
    """(E1) mean and m2 of n < 2^32 values of a channel, correctly rounded: m2 = (n·Σx² − (Σx)²)/n."""
    special = _special(limbs[_VK0 : _VK0 + KINDS])
    if special != 0.0:  # NaN as well
        return special, np.nan
    total, square, number = space[0, : VALUE_LIMBS + 2], space[1, : PRODUCT_LIMBS + 2], space[2, :1]
    negative = _digits(limbs[_V0 : _V0 + VALUE_LIMBS], total)
    _digits(limbs[_P0 : _P0 + PRODUCT_LIMBS], square)
    number[0] = np.uint64(n)
    scaled, of_total = space[3, : PRODUCT_LIMBS + 4], space[4, : PRODUCT_LIMBS + 4]
    _multiply(square, number, scaled)
    _multiply(total, total, of_total)
    _subtract(scaled, of_total)
    mean, m2 = _quotient(total, number[0], VALUE_UNIT, space[5]), _quotient(scaled, number[0], PRODUCT_UNIT, space[5])
    return -mean if negative else mean, m2


@plain
def _sums_of_channel(limbs, mean, space):
    """(E5) Σu and Σu·(x−mean) = Σu·x − mean·Σu of a channel, correctly rounded; 2^-200 ≤ |mean| < 2^128, or 0."""
    total, product = space[0, : VALUE_LIMBS + 2], space[1, : PRODUCT_LIMBS + 2]
    negative = _digits(limbs[_V0 : _V0 + VALUE_LIMBS], total)
    value = _special(limbs[_VK0 : _VK0 + KINDS])
    if value == 0.0:
        value = _round(total, False, VALUE_UNIT)
        value = -value if negative else value
    special = _special(limbs[_PK0 : _PK0 + KINDS])
    if special != 0.0:
        return value, special
    negative_product = _digits(limbs[_P0 : _P0 + PRODUCT_LIMBS], product)
    part, exponent = math.frexp(abs(mean))
    whole = np.int64(math.ldexp(part, 53))
    factor = space[2, :2]
    factor[0], factor[1] = np.uint64(whole & _MASK), np.uint64(whole >> BITS)
    taken = space[3, : VALUE_LIMBS + 4]
    _multiply(total, factor, taken)
    # the unit of `taken` is 2^(exponent - 53 + VALUE_UNIT): bring both to the smaller unit
    shift = exponent - 53 + VALUE_UNIT - PRODUCT_UNIT if mean != 0.0 else 0
    difference = space.view(np.int64)[4]
    difference[:] = 0
    _add_shifted(difference, product, max(-shift, 0), -1 if negative_product else 1)
    _add_shifted(difference, taken, max(shift, 0), 1 if negative != (mean < 0) else -1)
    result = space[5]
    negative = _digits(difference, result)
    spread = _round(result, False, PRODUCT_UNIT + min(shift, 0))
    return value, -spread if negative else spread


@plain
def _add_shifted(limbs, digits, shift, sign):
    """Add sign·digits·2^shift to limbs."""
    place, bits = shift // BITS, np.uint64(shift % BITS)
    for k in range(digits.size):
        low, high = digits[k] << bits, np.int64(0)
        high = np.int64(low >> np.uint64(BITS))
        if k + place < limbs.size:
            limbs[k + place] += sign * np.int64(low & np.uint64(_MASK))
        if k + place + 1 < limbs.size:
            limbs[k + place + 1] += sign * high


SPACE = (6, 32)  # numbers of up to 32 digits


def _all_mean_and_m2(record, n, mean, m2):
    """(E1) Set mean and m2 of every channel, from the record (C, rows)."""
    space = np.empty(SPACE, np.uint64)
    for j in range(mean.size):
        mean[j], m2[j] = _mean_and_m2(record[j], n, space)


def _all_sums(record, mean, s, q):
    """(E5) Set Σu and Σu·(x−mean) of every channel, from the record (C, rows)."""
    space = np.empty(SPACE, np.uint64)
    for j in range(mean.size):
        s[j], q[j] = _sums_of_channel(record[j], mean[j], space)


# ---- Maps: the runs of ``tiles.py`` without contraction, so that every operation rounds by itself --------------------


@plain
def _exact_affine_along(u, x, start, stop, mean, a, b, c, out, o):
    for i in range(start, stop):
        out[i - o] = narrow(a * (wide(x[i]) - mean) + c, out)


@plain
def _exact_affine_across(u, x, start, stop, mean, a, b, c, out, o):
    for j in range(stop - start):
        i = start + j
        out[i - o] = narrow(a[j] * (wide(x[i]) - mean[j]) + c[j], out)


@plain
def _exact_affine2_along(u, x, start, stop, mean, a, b, c, out, o):
    for i in range(start, stop):
        out[i - o] = narrow(a * wide(u[i]) + (b * (wide(x[i]) - mean) + c), out)


@plain
def _exact_affine2_across(u, x, start, stop, mean, a, b, c, out, o):
    for j in range(stop - start):
        i = start + j
        out[i - o] = narrow(a[j] * wide(u[i]) + (b[j] * (wide(x[i]) - mean[j]) + c[j]), out)


_affine_of_planes, _affine_of_lines = _map_along(_exact_affine_along), _map_across(_exact_affine_across)
_affine2_of_planes, _affine2_of_lines = _map_along(_exact_affine2_along), _map_across(_exact_affine2_across)

# ---- Entries ---------------------------------------------------------------------------------------------------------


def _exact_record(u, x, sample, plane, c0, n0, n1, mean, squares, record):
    """(E10) Add samples n0 … n1 - 1 of the channels from c0 on to the record (C, rows) of Σx, Σx² or of Σu, Σu·x."""
    if plane < LONG:
        _add_channels_across(u, x, sample, plane, c0, n0, n1, mean, squares, record)
        return
    for j in range(mean.size):
        _add_channel_along(u, x, sample, plane, c0 + j, n0, n1, mean[j], squares, record[j])


def _exact_affine(x, sample, plane, c0, r0, r1, mean, a, c, out, in_place):
    """(E3, E7) a·(x−mean) + c."""
    if plane >= LONG:
        _affine_of_planes(x, x, sample, plane, c0, r0, r1, mean, a, a, c, out, in_place)
    else:
        _affine_of_lines(x, x, sample, plane, c0, r0, r1, mean, a, a, c, out, in_place)


def _exact_affine2(u, x, sample, plane, c0, r0, r1, mean, a, b, c, out, in_place):
    """(E6) a·u + (b·(x−mean) + c)."""
    if plane >= LONG:
        _affine2_of_planes(u, x, sample, plane, c0, r0, r1, mean, a, b, c, out, in_place)
    else:
        _affine2_of_lines(u, x, sample, plane, c0, r0, r1, mean, a, b, c, out, in_place)


_record_of, _affine_of, _affine2_of = plain(_exact_record), plain(_exact_affine), plain(_exact_affine2)
_batch_rstd, _normalize = plain(reference.batch_rstd), plain(reference.normalize)
_parameter_gradients, _input_gradient = plain(reference.parameter_gradients), plain(reference.input_gradient)


def _exact_forward(x, sample, plane, n, c0, rows, weight, bias, eps, statistics, record, out, in_place):
    """(E1, E3) Set mean, m2 and rstd, which are `statistics` (3, C), and the record, and write y."""
    space, samples = np.empty(SPACE, np.uint64), n // plane
    each = 1 if plane >= LONG else weight.size  # channels: one after the other, so that the map finds them in cache
    a, c = np.empty(weight.size), np.empty(weight.size)
    for first in range(0, weight.size, each):
        last = first + each
        mean, m2, rstd = statistics[0, first:last], statistics[1, first:last], statistics[2, first:last]
        _record_of(x, x, sample, plane, c0 + first, 0, samples, mean, True, record[first:last])
        for j in range(each):
            mean[j], m2[j] = _mean_and_m2(record[first + j], n, space)
            rstd[j] = _batch_rstd(m2[j], n, eps)
            a[first + j], c[first + j] = _normalize(rstd[j], weight[first + j], bias[first + j], None)
        _affine_of(x, sample, plane, c0 + first, 0, rows, mean, a[first:last], c[first:last], out, in_place)


def _exact_backward(dy, x, sample, plane, n, c0, rows, given, gradients, out, in_place):
    """(E5, E6) Set dweight and dbias, which are `gradients` (2, C), from mean, rstd, weight (3, C), and write dx."""
    space, samples, channels = np.empty(SPACE, np.uint64), n // plane, given.shape[1]
    each = 1 if plane >= LONG else channels
    a, b, c = np.empty(channels), np.empty(channels), np.empty(channels)
    record = np.zeros((channels, ROWS), np.int64)
    for first in range(0, channels, each):
        last = first + each
        mean, rstd, weight = given[0, first:last], given[1, first:last], given[2, first:last]
        _record_of(dy, x, sample, plane, c0 + first, 0, samples, mean, False, record[first:last])
        for j in range(each):
            s, q = _sums_of_channel(record[first + j], mean[j], space)
            dweight, dbias = _parameter_gradients(s, q, rstd[j], None)
            gradients[0, first + j], gradients[1, first + j] = dweight, dbias
            coefficients = _input_gradient(dweight, dbias, n, rstd[j], weight[j], None)
            a[first + j], b[first + j], c[first + j] = coefficients
        parts = a[first:last], b[first:last], c[first:last]
        _affine2_of(dy, x, sample, plane, c0 + first, 0, rows, mean, parts[0], parts[1], parts[2], out, in_place)


class _Entries:
    """The entries for one dtype, each compiled at its first use."""

    def __init__(self, dtype: str) -> None:
        data, result = _READ(_STORED[dtype]), _WRITE(_STORED[dtype])
        given, rows = _READ(types.float64), _WRITE(types.float64, ndim=2, layout="A")
        record, place, flag = _WRITE(types.int64, ndim=2), (types.intp,) * 5, types.intp
        vectors, matrix = (given, given, types.float64), _READ(types.float64, ndim=2, layout="A")
        self._signatures = {
            "record": (_exact_record, (data, data, *place, given, types.boolean, record)),
            "affine": (_exact_affine, (data, *place, given, given, given, result, flag)),
            "affine2": (_exact_affine2, (data, data, *place, given, given, given, given, result, flag)),
            "forward": (_exact_forward, (data, *place, *vectors, rows, record, result, flag)),
            "backward": (_exact_backward, (data, data, *place, matrix, rows, result, flag)),
        }

    def __getattr__(self, name: str) -> Any:
        entry = _compile(*self._signatures[name])
        setattr(self, name, entry)
        return entry


_entries = functools.cache(_Entries)
_RECORD, _VECTOR = _READ(types.int64, ndim=2), _WRITE(types.float64)
_NUMBERS = {  # by name: the entries that see no data of the size of x
    "mean_and_m2": (_all_mean_and_m2, (_RECORD, types.intp, _VECTOR, _VECTOR)),
    "sums": (_all_sums, (_RECORD, _READ(types.float64), _VECTOR, _VECTOR)),
}


@functools.cache
def _number_entry(name: str) -> Any:
    return _compile(*_NUMBERS[name])


# ---- The sweeps ------------------------------------------------------------------------------------------------------

PARTS = 16  # of the work on large data
SMALL = 2**18  # values that one thread does at once, and that the second sweep finds in cache
_Item = tuple[int, int, int, int]  # channels c0 … c1 - 1 of samples or rows n0 … n1 - 1


class _Data:
    """The arrays of a call as lines."""

    def __init__(self, x: Array, u: Array | None = None) -> None:
        samples, channels, plane = x.shape
        self.channels, self.plane, self.sample, self.n = channels, plane, channels * plane, samples * plane
        self.samples, self.code = samples, _entries(x.dtype.char)
        self.x = line_of(x)
        self.u = self.x if u is None else line_of(u)
        self.rows = samples * -(-plane // PIECE) if plane >= LONG else samples

    def whole_channels(self) -> list[_Item]:
        """Cut the channels into parts, with all their samples; one part where the channels lie side by side."""
        if self.plane < LONG or self.n * self.channels <= SMALL:
            return [(0, self.channels, 0, self.samples)]
        step = max(self.channels // PARTS, 1)
        return [(c, min(c + step, self.channels), 0, self.samples) for c in range(0, self.channels, step)]

    def samples_too(self, height: int) -> list[_Item]:
        """Cut `height` samples or rows into parts, and the channels along planes too."""
        parts = self.whole_channels()
        if len(parts) >= PARTS // 2 or self.n * self.channels <= SMALL:
            return [(c0, c1, 0, height) for c0, c1, *_ in parts]
        step = max(-(-height // PARTS), 1)
        return [(c0, c1, r, min(r + step, height)) for c0, c1, *_ in parts for r in range(0, height, step)]

    def record(self, mean: Array, squares: bool) -> Array:
        """(E10) Return the record (rows, C)."""
        items = self.samples_too(self.samples) if self.n else []
        parts = [np.zeros((c1 - c0, ROWS), np.int64) for c0, c1, *_ in items]

        def work(index: int) -> None:
            c0, c1, n0, n1 = items[index]
            self.code.record(self.u, self.x, self.sample, self.plane, c0, n0, n1, mean[c0:c1], squares, parts[index])

        threads.run(work, range(len(items)))
        total = np.zeros((self.channels, ROWS), np.int64)
        for (c0, c1, *_), part in zip(items, parts, strict=True):
            total[c0:c1] += part
        return total.T

    def map(self, code: Any, arrays: tuple[Array, ...], vectors: tuple[Array, ...], y: Array, in_place: int) -> None:
        items = self.samples_too(self.rows) if self.n else []

        def work(item: Any) -> None:
            c0, c1, r0, r1 = item
            parts = [vector[c0:c1] for vector in vectors]
            code(*arrays, self.sample, self.plane, c0, r0, r1, *parts, y, in_place)

        threads.run(lambda index: work(items[index]), range(len(items)))


def squares(x: Array) -> Array:
    """(E10) The record (rows, C) of Σx and Σx², of x (N, C, S)."""
    return _Data(x).record(np.zeros(x.shape[1]), squares=True)


def products(u: Array, x: Array, mean: Array) -> Array:
    """(E10) The record (rows, C) of Σu and Σu·x, of u and x (N, C, S); mean (C,) is that of x."""
    return _Data(x, u).record(mean, squares=False)


def mean_and_m2(record: Array, n: int) -> Array:
    """(E1) mean and m2 (2, C) of n values, correctly rounded, from the record of Σx and Σx²."""
    result = np.zeros((2, record.shape[1]))
    if n >= 2**32:
        return exact.mean_and_m2(record, n)
    if n:
        by_channel, entry = np.ascontiguousarray(record.T), _number_entry("mean_and_m2")
        _over_channels(lambda part: entry(by_channel[part], n, *result[:, part]), record.shape[1])
    return result


def sums(record: Array, mean: Array) -> Array:
    """(E5) Σu and Σu·(x−mean) (2, C), correctly rounded, from the record of Σu and Σu·x and mean (C,)."""
    if _is_usual(mean):
        result = np.zeros((2, record.shape[1]))
        by_channel, entry = np.ascontiguousarray(record.T), _number_entry("sums")
        _over_channels(lambda part: entry(by_channel[part], mean[part], *result[:, part]), record.shape[1])
        return result
    return exact.sums(record, mean)


def _over_channels(work: Callable[[slice], None], channels: int) -> None:
    """Call `work` for parts of 256 channels, which take about 60 µs each."""
    threads.run(lambda start: work(slice(start, start + 256)), range(0, channels, 256))


def _is_usual(mean: Array) -> bool:
    """Return True if the compiled digits hold every mean; other means are fixed statistics far from all data."""
    size = np.abs(mean)
    return bool(((size == 0) | ~np.isfinite(size) | ((size >= 2.0**-230) & (size < 2.0**128))).all())


def affine(x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
    """(E3, E7) a·(x−mean) + c (N, C, S), in the dtype of x, written to `out` where `out` is contiguous."""
    data = _Data(x)
    result, y, in_place = place_of_result(x, out, data.x, data.u)
    data.map(data.code.affine, (data.x,), (mean, a, c), y, in_place)
    return result


def affine2(u: Array, x: Array, mean: Array, a: Array, b: Array, c: Array, out: Array | None = None) -> Array:
    """(E6) a·u + (b·(x−mean) + c) (N, C, S), in the dtype of x, written to `out` where `out` is contiguous."""
    data = _Data(x, u)
    result, y, in_place = place_of_result(x, out, data.x, data.u)
    data.map(data.code.affine2, (data.u, data.x), (mean, a, b, c), y, in_place)
    return result


def forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
) -> tuple[Moments, Array, Array] | None:
    """(E1, E3) The moments of x (N, C, S), rstd (C,) and y; None where two sweeps over all data are as fast."""
    data = _Data(x)
    if not _at_once(data):
        return None
    result, y, in_place = place_of_result(x, out, data.x, data.u)
    statistics, record = np.empty((3, data.channels)), np.zeros((data.channels, ROWS), np.int64)
    weight = np.ones(data.channels) if weight is None else weight
    bias = np.zeros(data.channels) if bias is None else bias

    def work(item: Any) -> None:
        c0, c1, *_ = item
        size = data.sample, data.plane, data.n, c0, data.rows
        data.code.forward(
            data.x, *size, weight[c0:c1], bias[c0:c1], eps, statistics[:, c0:c1], record[c0:c1], y, in_place
        )

    parts = data.whole_channels()
    threads.run(lambda index: work(parts[index]), range(len(parts)))
    mean, m2, rstd = statistics
    return Moments(data.n, mean, m2, record=record.T), rstd, result


def backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None = None
) -> tuple[Array, Array, Array] | None:
    """(E5, E6) dx, and dweight and dbias (C,), from dy and x (N, C, S); None where two sweeps are as fast."""
    data = _Data(x, dy)
    if not _at_once(data) or not _is_usual(mean):
        return None
    result, y, in_place = place_of_result(x, out, data.x, data.u)
    given = np.stack([mean, rstd, np.ones(data.channels) if weight is None else weight])
    gradients = np.empty((2, data.channels))

    def work(item: Any) -> None:
        c0, c1, *_ = item
        size = data.sample, data.plane, data.n, c0, data.rows
        data.code.backward(data.u, data.x, *size, given[:, c0:c1], gradients[:, c0:c1], y, in_place)

    parts = data.whole_channels()
    threads.run(lambda index: work(parts[index]), range(len(parts)))
    return result, *gradients


def _at_once(data: _Data) -> bool:
    """Return True if whole channels are parts for all threads, or the data is small."""
    enough = data.plane >= LONG and data.channels >= 2 * threads.get_num_threads()
    return bool(0 < data.n < 2**32 and (enough or data.n * data.channels <= SMALL))

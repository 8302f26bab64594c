"""The loops over data of a batch with a mask, beside those of ``tiles.py``.

`where` is a line of bytes, one for each position (N·S), 0 for a position that is no part of the batch: as many bytes as
a channel has values, read once for all channels of a tile. A value at such a position is read, and left out by a
selection: a product with 0 would keep a NaN.

Over long planes a run has its own piece of `where`. In channels-last a row is a position: rows that do not count are
left out as a whole. Over planes in between, the mask of a sample is repeated for each channel of a run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numba import types

from ... import reference
from ..._arrays.namespaces import Array
from ...reference import Mask, Moments
from .. import threads
from . import tiles
from .entries import (
    _READ,
    _STORED,
    _WRITE,
    _batch_rstd,
    _compile,
    _finish,
    _input_gradient,
    _normalize,
    _parameter_gradients,
)
from .half import narrow, wide
from .lines import line_of, place_of_result
from .tiles import (
    BLOCK,
    LONG,
    PIECE,
    SHORT,
    _add_up,
    _copy,
    _lines,
    _map,
    _pieces,
    _repeat,
    _row,
    _sum,
    _together,
    minus,
    named_after,
    plain,
)

FEW = 16  # channels from which on a row of channels-last data is a run of its own
ROWS = 4 * BLOCK  # rows of channels-last data whose sums are added to each other before the sum of the tile

# ---- Runs ------------------------------------------------------------------------------------------------------------
# `at` is the place in `where` of the value at `start`. `marks` are the bytes of a run across channels, in its order.


@_sum
def _moments_along(u, x, where, start, stop, at, shift):
    s = q = 0.0
    for i in range(stop - start):
        d = minus(wide(x[start + i]), shift)
        d = d if where[at + i] != 0 else 0.0
        s += d
        q += d * d
    return s, q


@_map
def _moments_across(u, x, marks, start, stop, shift, s, q):
    for j in range(stop - start):
        d = wide(x[start + j]) - shift[j]
        d = d if marks[j] != 0 else 0.0
        s[j] += d
        q[j] += d * d


@_map
def _moments_of_8(u, x, starts, size, shift, s, q):
    i0, i1, i2, i3 = starts[0], starts[1], starts[2], starts[3]
    i4, i5, i6, i7 = starts[4], starts[5], starts[6], starts[7]
    for j in range(size):
        m = shift[j]
        d0, d1, d2, d3 = wide(x[i0 + j]) - m, wide(x[i1 + j]) - m, wide(x[i2 + j]) - m, wide(x[i3 + j]) - m
        d4, d5, d6, d7 = wide(x[i4 + j]) - m, wide(x[i5 + j]) - m, wide(x[i6 + j]) - m, wide(x[i7 + j]) - m
        s[j] += ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))
        q[j] = d7 * d7 + (d6 * d6 + (d5 * d5 + (d4 * d4 + (d3 * d3 + (d2 * d2 + (d1 * d1 + (d0 * d0 + q[j])))))))


@_sum
def _dots_along(u, x, where, start, stop, at, mean):
    s = q = 0.0
    for i in range(stop - start):
        v, d = wide(u[start + i]), minus(wide(x[start + i]), mean)
        counts = where[at + i] != 0
        v, d = v if counts else 0.0, d if counts else 0.0
        s += v
        q += v * d
    return s, q


@_map
def _dots_across(u, x, marks, start, stop, mean, s, q):
    for j in range(stop - start):
        v, d = wide(u[start + j]), wide(x[start + j]) - mean[j]
        v, d = v if marks[j] != 0 else 0.0, d if marks[j] != 0 else 0.0
        s[j] += v
        q[j] += v * d


@_map
def _dots_of_4(u, x, starts, size, mean, s, q):
    i0, i1, i2, i3 = starts[0], starts[1], starts[2], starts[3]
    for j in range(size):
        m = mean[j]
        v0, v1, v2, v3 = wide(u[i0 + j]), wide(u[i1 + j]), wide(u[i2 + j]), wide(u[i3 + j])
        s[j] += (v0 + v1) + (v2 + v3)
        first = v1 * (wide(x[i1 + j]) - m) + (v0 * (wide(x[i0 + j]) - m) + q[j])
        q[j] = v3 * (wide(x[i3 + j]) - m) + (v2 * (wide(x[i2 + j]) - m) + first)


# `skip_zeros`: where u is 0, x counts for nothing, though it be NaN.


@plain
def _product(v, d):
    return v * (d if v != 0 else 0.0)


@_sum
def _nonzero_dots_along(u, x, start, stop, mean):
    s = q = 0.0
    for i in range(start, stop):
        v = wide(u[i])
        s += v
        q += _product(v, minus(wide(x[i]), mean))
    return s, q


@_map
def _nonzero_dots_across(u, x, start, stop, mean, s, q):
    for j in range(stop - start):
        v = wide(u[start + j])
        s[j] += v
        q[j] += _product(v, wide(x[start + j]) - mean[j])


@_map
def _nonzero_dots_across_4(u, x, start, step, size, mean, s, q):
    i1 = start + step
    i2 = i1 + step
    i3 = i2 + step
    for j in range(size):
        m = mean[j]
        v0, v1, v2, v3 = wide(u[start + j]), wide(u[i1 + j]), wide(u[i2 + j]), wide(u[i3 + j])
        s[j] += (v0 + v1) + (v2 + v3)
        first = _product(v1, wide(x[i1 + j]) - m) + (_product(v0, wide(x[start + j]) - m) + q[j])
        q[j] = _product(v3, wide(x[i3 + j]) - m) + (_product(v2, wide(x[i2 + j]) - m) + first)


@_map
def _affine2_along(u, x, where, start, stop, at, mean, a, b, c, out, o):
    for i in range(stop - start):
        t = b * (wide(x[start + i]) - mean) + c
        t = t if where[at + i] != 0 else 0.0
        out[start + i - o] = narrow(a * wide(u[start + i]) + t, out)


@_map
def _affine2_across(u, x, marks, start, stop, mean, a, b, c, out, o):
    for j in range(stop - start):
        t = b[j] * (wide(x[start + j]) - mean[j]) + c[j]
        t = t if marks[j] != 0 else 0.0
        out[start + j - o] = narrow(a[j] * wide(u[start + j]) + t, out)


@_map
def _scaled_across(u, start, stop, a, out, o):
    for j in range(stop - start):
        out[start + j - o] = narrow(a[j] * wide(u[start + j]), out)


@_map
def _affine3_along(v, u, x, where, start, stop, at, mean, a, b, c, d, out, o):
    for i in range(stop - start):
        t = b * wide(u[start + i])
        whole = a * wide(v[start + i]) + (t + (c * (wide(x[start + i]) - mean) + d))
        out[start + i - o] = narrow(whole if where[at + i] != 0 else t, out)


@_map
def _affine3_across(v, u, x, marks, start, stop, lines, out, o):
    mean, a, b, c, d = lines[0], lines[1], lines[2], lines[3], lines[4]
    for j in range(stop - start):
        t = b[j] * wide(u[start + j])
        whole = a[j] * wide(v[start + j]) + (t + (c[j] * (wide(x[start + j]) - mean[j]) + d[j]))
        out[start + j - o] = narrow(whole if marks[j] != 0 else t, out)


# ---- Tiles -----------------------------------------------------------------------------------------------------------


@plain
def _place(r, plane):
    """Return the place in `where` of the run of row r over long planes."""
    if plane <= PIECE:
        return r * plane
    n, k = divmod(r, _pieces(plane))
    return n * plane + k * PIECE


@plain
def _set_marks(where, r, samples, channels, plane, marks):
    """Set `marks` to the mask of each value of a run over the short planes of samples r, r + 1, …"""
    for t in range(samples):
        for j in range(channels):
            for i in range(plane):
                marks[np.uintp((t * channels + j) * plane + i)] = where[np.uintp((r + t) * plane + i)]


def _sums_along(run: Any) -> Any:
    """Do as ``tiles._sums_along``."""

    @named_after(run)
    def reduce(u, x, where, sample, plane, c0, r0, r1, mean, s, q):
        s_block, q_block = np.empty(mean.size), np.empty(mean.size)
        s[:] = 0.0
        q[:] = 0.0
        for block in range(r0, r1, BLOCK):
            s_block[:] = 0.0
            q_block[:] = 0.0
            for r in range(block, min(block + BLOCK, r1)):
                row, length = _row(r, sample, plane)
                at = _place(r, plane)
                for j in range(mean.size):
                    start = row + (c0 + j) * plane
                    for first in range(0, length, SHORT):
                        place, stop = np.uintp(start + first), np.uintp(start + min(first + SHORT, length))
                        s_part, q_part = run(u, x, where, place, stop, np.uintp(at + first), mean[j])
                        s_block[j] += s_part
                        q_block[j] += q_part
            s += s_block
            q += q_block

    return reduce


def _sums_across(run: Any) -> Any:
    """Return the loops of a reduction over short planes; `run` adds to two lines of sums what `marks` lets count."""

    @named_after(run)
    def reduce(u, x, where, sample, plane, c0, r0, r1, mean, s, q):
        together, times = _together(mean.size, sample, plane)
        lines, marks = _lines(3, together * times * plane), np.empty(together * times * plane, np.uint8)
        s[:] = 0.0
        q[:] = 0.0
        for j in range(0, mean.size, together):
            k = min(together, mean.size - j)
            size = k * times * plane
            line, s_line, q_line = lines[0, :size], lines[1, :size], lines[2, :size]
            _repeat(mean[j : j + k], plane, times, line)
            for block in range(r0, r1, BLOCK * times):
                s_line[:] = 0.0
                q_line[:] = 0.0
                end = min(block + BLOCK * times, r1)
                for r in range(block, end, times):
                    samples = min(times, end - r)
                    _set_marks(where, r, samples, k, plane, marks)
                    start = np.uintp(r * sample + (c0 + j) * plane)
                    run(u, x, marks, start, start + np.uintp(samples * k * plane), line, s_line, q_line)
                _add_up(s_line, plane, s[j : j + k])
                _add_up(q_line, plane, q[j : j + k])

    return reduce


def _sums_of_rows(run: Any, several: Any, height: int) -> Any:
    """Return the loops of a reduction over the rows of channels-last data that count; `several` adds `height` rows.

    These are rows of as many places in a block, one row after another: memory delivers that faster than neighbours.
    """

    @named_after(several)
    def reduce(u, x, where, sample, c0, r0, r1, mean, s, q):
        lines, found, starts = _lines(2, mean.size), np.empty(ROWS, np.uintp), np.empty(height, np.uintp)
        s_line, q_line = lines[0, : mean.size], lines[1, : mean.size]
        s[:] = 0.0
        q[:] = 0.0
        size = np.uintp(mean.size)
        for block in range(r0, r1, ROWS):
            s_line[:] = 0.0
            q_line[:] = 0.0
            count = 0
            for r in range(block, min(block + ROWS, r1)):
                found[count] = np.uintp(r * sample + c0)
                count += where[np.uintp(r)] != 0
            passes = count // height
            for i in range(passes):
                for k in range(height):
                    starts[k] = found[k * passes + i]
                several(u, x, starts, size, mean, s_line, q_line)
            for i in range(passes * height, count):
                run(u, x, found[i], found[i] + size, mean, s_line, q_line)
            s += s_line
            q += q_line

    return reduce


@plain
def _affine2_of_planes(u, x, where, sample, plane, c0, r0, r1, mean, a, b, c, out, in_place):
    buffer = np.empty(in_place * PIECE, out.dtype)
    target = buffer if in_place else out
    for r in range(r0, r1):
        row, length = _row(r, sample, plane)
        at = np.uintp(_place(r, plane))
        for j in range(mean.size):
            start = np.uintp(row + (c0 + j) * plane)
            stop, o = start + np.uintp(length), start * np.uintp(in_place)
            _affine2_along(u, x, where, start, stop, at, mean[j], a[j], b[j], c[j], target, o)
            if in_place:
                _copy(buffer, start, stop, out)


@plain
def _affine2_of_lines(u, x, where, sample, plane, c0, r0, r1, mean, a, b, c, out, in_place):
    together, times = _together(mean.size, sample, plane)
    lines, marks = _lines(4, together * times * plane), np.empty(together * times * plane, np.uint8)
    buffer = np.empty(in_place * together * times * plane, out.dtype)
    target = buffer if in_place else out
    for j in range(0, mean.size, together):
        k = min(together, mean.size - j)
        _repeat(mean[j : j + k], plane, times, lines[0])
        _repeat(a[j : j + k], plane, times, lines[1])
        _repeat(b[j : j + k], plane, times, lines[2])
        _repeat(c[j : j + k], plane, times, lines[3])
        for r in range(r0, r1, times):
            samples = min(times, r1 - r)
            _set_marks(where, r, samples, k, plane, marks)
            start = np.uintp(r * sample + (c0 + j) * plane)
            stop, o = start + np.uintp(samples * k * plane), start * np.uintp(in_place)
            _affine2_across(u, x, marks, start, stop, lines[0], lines[1], lines[2], lines[3], target, o)
            if in_place:
                _copy(buffer, start, stop, out)


@plain
def _affine2_of_rows(u, x, where, sample, c0, r0, r1, mean, a, b, c, out, in_place):
    size = np.uintp(mean.size)
    buffer = np.empty(in_place * mean.size, out.dtype)
    target = buffer if in_place else out
    for r in range(r0, r1):
        start = np.uintp(r * sample + c0)
        stop, o = start + size, start * np.uintp(in_place)
        if where[np.uintp(r)] != 0:
            tiles._affine2_across(u, x, start, stop, mean, a, b, c, target, o)
        else:
            _scaled_across(u, start, stop, a, target, o)
        if in_place:
            _copy(buffer, start, stop, out)


@plain
def _affine3_of_planes(v, u, x, where, sample, plane, c0, r0, r1, mean, a, b, c, d, out, in_place):
    buffer = np.empty(in_place * PIECE, out.dtype)
    target = buffer if in_place else out
    for r in range(r0, r1):
        row, length = _row(r, sample, plane)
        at = np.uintp(_place(r, plane))
        for j in range(mean.size):
            start = np.uintp(row + (c0 + j) * plane)
            stop, o = start + np.uintp(length), start * np.uintp(in_place)
            _affine3_along(v, u, x, where, start, stop, at, mean[j], a[j], b[j], c[j], d[j], target, o)
            if in_place:
                _copy(buffer, start, stop, out)


@plain
def _affine3_of_lines(v, u, x, where, sample, plane, c0, r0, r1, mean, a, b, c, d, out, in_place):
    together, times = _together(mean.size, sample, plane)
    lines, marks = _lines(5, together * times * plane), np.empty(together * times * plane, np.uint8)
    buffer = np.empty(in_place * together * times * plane, out.dtype)
    target = buffer if in_place else out
    for j in range(0, mean.size, together):
        k = min(together, mean.size - j)
        _repeat(mean[j : j + k], plane, times, lines[0])
        _repeat(a[j : j + k], plane, times, lines[1])
        _repeat(b[j : j + k], plane, times, lines[2])
        _repeat(c[j : j + k], plane, times, lines[3])
        _repeat(d[j : j + k], plane, times, lines[4])
        for r in range(r0, r1, times):
            samples = min(times, r1 - r)
            _set_marks(where, r, samples, k, plane, marks)
            start = np.uintp(r * sample + (c0 + j) * plane)
            stop = start + np.uintp(samples * k * plane)
            _affine3_across(v, u, x, marks, start, stop, lines, target, start * np.uintp(in_place))
            if in_place:
                _copy(buffer, start, stop, out)


_moments_of_planes, _moments_of_lines = _sums_along(_moments_along), _sums_across(_moments_across)
_moments_of_rows = _sums_of_rows(tiles._moments_across, _moments_of_8, 8)
_dots_of_planes, _dots_of_lines = _sums_along(_dots_along), _sums_across(_dots_across)
_dots_of_rows = _sums_of_rows(tiles._dots_across, _dots_of_4, 4)
_nonzero_dots_of_planes = tiles._sums_along(_nonzero_dots_along)
_nonzero_dots_of_lines = tiles._sums_across(_nonzero_dots_across, _nonzero_dots_across_4, 4)


# ---- The sweeps over a tile ------------------------------------------------------------------------------------------


@plain
def _near_mean(x, where, sample, plane, c0, shift):
    """Set `shift` to a value near the mean of each channel: the mean of the first eight values that count."""
    first, total, found = np.empty(shift.size), np.zeros(shift.size), 0
    for p in range(where.size):
        if where[np.uintp(p)] == 0:
            continue
        n, i = divmod(p, plane)
        for j in range(shift.size):
            value = wide(x[np.uintp(n * sample + (c0 + j) * plane + i)])
            if found == 0:
                first[j] = value
            total[j] += minus(value, first[j])
        found += 1
        if found == 8:
            break
    for j in range(shift.size):
        near = first[j] + total[j] / max(found, 1) if found else 0.0
        shift[j] = near if np.isfinite(near) else 0.0


@plain
def _spread(x, where, sample, plane, c0, r0, r1, shift, s, q):
    """(E1) Σd and Σd² with d = x − shift, over `where`."""
    if plane >= LONG:
        _moments_of_planes(x, x, where, sample, plane, c0, r0, r1, shift, s, q)
    elif plane == 1 and shift.size >= FEW:
        _moments_of_rows(x, x, where, sample, c0, r0, r1, shift, s, q)
    else:
        _moments_of_lines(x, x, where, sample, plane, c0, r0, r1, shift, s, q)


@plain
def _dots(u, x, where, sample, plane, c0, r0, r1, mean, s, q):
    """(E8, E9) Σu and Σu·(x−mean), over `where`."""
    if plane >= LONG:
        _dots_of_planes(u, x, where, sample, plane, c0, r0, r1, mean, s, q)
    elif plane == 1 and mean.size >= FEW:
        _dots_of_rows(u, x, where, sample, c0, r0, r1, mean, s, q)
    else:
        _dots_of_lines(u, x, where, sample, plane, c0, r0, r1, mean, s, q)


@plain
def _nonzero_dots(u, x, sample, plane, c0, r0, r1, mean, s, q):
    """(E5) Σu and Σu·(x−mean); where u is 0, x counts for nothing."""
    if plane >= LONG:
        _nonzero_dots_of_planes(u, x, sample, plane, c0, r0, r1, mean, s, q)
    else:
        _nonzero_dots_of_lines(u, x, sample, plane, c0, r0, r1, mean, s, q)


@plain
def _affine2(u, x, where, sample, plane, c0, r0, r1, mean, a, b, c, out, in_place):
    """(E6) a·u + b·(x−mean) + c, or a·u where `where` is 0."""
    if plane >= LONG:
        _affine2_of_planes(u, x, where, sample, plane, c0, r0, r1, mean, a, b, c, out, in_place)
    elif plane == 1 and mean.size >= FEW:
        _affine2_of_rows(u, x, where, sample, c0, r0, r1, mean, a, b, c, out, in_place)
    else:
        _affine2_of_lines(u, x, where, sample, plane, c0, r0, r1, mean, a, b, c, out, in_place)


@plain
def _affine3(v, u, x, where, sample, plane, c0, r0, r1, mean, a, b, c, d, out, in_place):
    """(E9) a·v + b·u + c·(x−mean) + d, or b·u where `where` is 0."""
    if plane >= LONG:
        _affine3_of_planes(v, u, x, where, sample, plane, c0, r0, r1, mean, a, b, c, d, out, in_place)
    else:
        _affine3_of_lines(v, u, x, where, sample, plane, c0, r0, r1, mean, a, b, c, d, out, in_place)


@plain
def _affine(x, sample, plane, c0, r0, r1, mean, a, c, out, in_place):
    """(E3) a·(x−mean) + c."""
    if plane >= LONG:
        tiles.affine_of_planes(x, x, sample, plane, c0, r0, r1, mean, a, a, c, out, in_place)
    else:
        tiles.affine_of_lines(x, x, sample, plane, c0, r0, r1, mean, a, a, c, out, in_place)


@plain
def _forward(x, where, sample, plane, c0, rows, n, weight, bias, eps, mean, m2, rstd, out, in_place):
    """(E1, E3) Set mean, m2 and rstd of whole channels, which are one tile, and write y = weight·xhat + bias."""
    shift, a, c = np.empty(mean.size), np.empty(mean.size), np.empty(mean.size)
    _near_mean(x, where, sample, plane, c0, shift)
    for _ in range(2):
        _spread(x, where, sample, plane, c0, 0, rows, shift, mean, m2)
        if not _finish(n, shift, mean, m2):
            break
    for j in range(mean.size):
        rstd[j] = _batch_rstd(m2[j], n, eps)
        a[j], c[j] = _normalize(rstd[j], weight[j], bias[j], None)
    _affine(x, sample, plane, c0, 0, rows, mean, a, c, out, in_place)


@plain
def _backward(dy, x, where, sample, plane, c0, rows, n, mean, rstd, weight, dweight, dbias, out, in_place):
    """(E5, E6) Set dweight and dbias of whole channels, which are one tile, and write dx."""
    _nonzero_dots(dy, x, sample, plane, c0, 0, rows, mean, dbias, dweight)
    a, b, c = np.empty(mean.size), np.empty(mean.size), np.empty(mean.size)
    for j in range(mean.size):
        dweight[j], dbias[j] = _parameter_gradients(dbias[j], dweight[j], rstd[j], None)
        a[j], b[j], c[j] = _input_gradient(dweight[j], dbias[j], n, rstd[j], weight[j], None)
    _affine2(dy, x, where, sample, plane, c0, 0, rows, mean, a, b, c, out, in_place)


@functools.cache
def _entry(name: str, dtype: str) -> Any:
    """Return a function of this page, compiled for the dtype of that character at the first call."""
    stored = _STORED[dtype]
    data, result, mask = _READ(stored), _WRITE(stored), _READ(types.uint8)
    given, sums, number = _READ(types.float64), _WRITE(types.float64), types.intp
    size, rows = (number,) * 2, (number,) * 3
    signatures = {
        "near_mean": (_near_mean, (data, mask, *size, number, sums)),
        "finish": (_finish, (number, sums, sums, sums)),
        "spread": (_spread, (data, mask, *size, *rows, given, sums, sums)),
        "dots": (_dots, (data, data, mask, *size, *rows, given, sums, sums)),
        "nonzero_dots": (_nonzero_dots, (data, data, *size, *rows, given, sums, sums)),
        "affine": (_affine, (data, *size, *rows, *(given,) * 3, result, number)),
        "affine2": (_affine2, (data, data, mask, *size, *rows, *(given,) * 4, result, number)),
        "forward": (
            _forward,
            (data, mask, *size, *rows[1:], number, given, given, types.float64, sums, sums, sums, result, number),
        ),
        "backward": (
            _backward,
            (data, data, mask, *size, *rows[1:], number, given, given, given, sums, sums, result, number),
        ),
        "affine3": (_affine3, (data, data, data, mask, *size, *rows, *(given,) * 5, result, number)),
    }
    return _compile(*signatures[name])


# ---- The sweeps over a group of channels, and over all groups --------------------------------------------------------


class _Call:
    """The arrays of a call as lines, and how the work on them is cut."""

    def __init__(self, cut: Any, x: Array, *others: Array, where: Array | None = None) -> None:
        self.cut, self.dtype = cut, x.dtype.char
        self.data = [line_of(array) for array in (*others, x)]  # in the order of the sweeps: x last
        self.where = np.zeros(0, np.uint8) if where is None else np.ascontiguousarray(where).reshape(-1).view(np.uint8)
        self.n = max(int(np.count_nonzero(self.where)), 1)
        self.result, self.y, self.in_place = x, self.data[-1], 0

    def write_to(self, x: Array, out: Array | None) -> None:
        """Let the result be `out` where `out` can be written as a line, otherwise a new array like x."""
        self.result, self.y, self.in_place = place_of_result(x, out, *self.data)

    def over_groups(self, work: Callable[..., None], *vectors: Array) -> None:
        """Call `work` with each group and its part of the vectors (C,): groups side by side, or tiles of one group."""
        channels, group, apart = self.cut.channels, self.cut.group, self.cut.height == self.cut.rows

        def one(c: int) -> None:
            part = slice(c, min(c + group, channels))
            work(_Group(self, part, apart), part, *(vector[part] for vector in vectors))

        firsts = range(0, channels, group)
        if apart:
            threads.run(one, firsts)
        else:
            for c in firsts:
                one(c)


class _Group:
    """The sweeps over the channels of one group, with the arguments of ``reference.py``; data is that of the call."""

    shape = (0, 0, 0)  # in place of x, whose n is that of the mask

    def __init__(self, call: _Call, part: slice, apart: bool) -> None:
        self.call, self.first, self.size, self.apart = call, part.start, part.stop - part.start, apart

    def _entry(self, name: str) -> Any:
        entry, cut = _entry(name, self.call.dtype), self.call.cut
        return lambda arrays, *rest: entry(*arrays, cut.sample, cut.plane, self.first, *rest)

    def moments(self, x: Any, where: Array | None = None) -> tuple[Array, Array]:
        """(E1) mean and m2."""
        arrays, shift, spread = (self.call.data[-1], self.call.where), np.empty(self.size), self._entry("spread")
        self._entry("near_mean")(arrays, shift)
        for _ in range(2):  # the second time only where the shift was far from the mean
            mean, m2 = self._add_tiles(lambda r0, r1, s, q: spread(arrays, r0, r1, shift, s, q))
            if not _entry("finish", "d")(self.call.n, shift, mean, m2):
                break
        return mean, m2

    def dots(
        self, u: Any, x: Any, mean: Array, where: Array | None = None, skip_zeros: bool = False
    ) -> tuple[Array, Array]:
        """(E5, E8, E9) Σu and Σu·(x−mean)."""
        entry, arrays = self._entry("nonzero_dots" if skip_zeros else "dots"), self.call.data
        arrays = arrays if skip_zeros else [*arrays, self.call.where]
        return self._add_tiles(lambda r0, r1, s, q: entry(arrays, r0, r1, mean, s, q))

    def affine(self, x: Any, mean: Array, a: Array, c: Array, out: None = None) -> Array:
        """(E3) Write a·(x−mean) + c."""
        return self._map("affine", self.call.data[-1:], mean, a, c)

    def affine2(
        self,
        u: Any,
        x: Any,
        mean: Array,
        a: Array,
        b: Array,
        c: Array,
        out: None = None,
        where: Array | None = None,
    ) -> Array:
        """(E6) Write a·u + b·(x−mean) + c, or a·u."""
        return self._map("affine2", [*self.call.data, self.call.where], mean, a, b, c)

    def affine3(
        self,
        v: Any,
        u: Any,
        x: Any,
        mean: Array,
        a: Array,
        b: Array,
        c: Array,
        d: Array,
        out: None = None,
        where: Array | None = None,
    ) -> Array:
        """(E9) Write a·v + b·u + c·(x−mean) + d, or b·u."""
        return self._map("affine3", [*self.call.data, self.call.where], mean, a, b, c, d)

    def at_once(self, name: str, *given: Any) -> None:
        """Do both sweeps in compiled code, as the group is one tile."""
        call = self.call
        self._entry(name)([*call.data, call.where], call.cut.rows, *given, call.y, call.in_place)

    def _each(self, work: Callable[[int], None], items: Iterable[int]) -> None:
        if self.apart:
            for item in items:
                work(item)
        else:
            threads.run(work, items)

    def _add_tiles(self, sweep: Callable[[int, int, Array, Array], None]) -> tuple[Array, Array]:
        """Return the two sums of what `sweep` finds in each tile, added by halves."""
        rows, height = self.call.cut.rows, self.call.cut.height
        tiles_ = -(-rows // height)
        parts = np.empty((2, tiles_, self.size))
        self._each(lambda t: sweep(t * height, min((t + 1) * height, rows), parts[0, t], parts[1, t]), range(tiles_))
        while tiles_ > 1:
            half = -(-tiles_ // 2)
            parts[:, : tiles_ - half] += parts[:, half:tiles_]
            tiles_ = half
        return parts[0, 0], parts[1, 0]

    def _map(self, name: str, arrays: Sequence[Any], *vectors: Array) -> Array:
        """Write the result for each tile, backwards: the last one is still in cache."""
        rows, height, call, entry = self.call.cut.rows, self.call.cut.height, self.call, self._entry(name)

        def work(r0: int) -> None:
            entry(arrays, r0, min(r0 + height, rows), *vectors, call.y, call.in_place)

        self._each(work, range((rows - 1) // height * height, -1, -height))
        return call.result


def moments(cut: Any, x: Array, where: Array) -> tuple[Array, Array]:
    """(E1) mean and m2 (C,) of x (N, C, S), over `where`."""
    found = np.empty((2, cut.channels))

    def work(group: _Group, part: slice) -> None:
        found[:, part] = group.moments(None)

    _Call(cut, x, where=where).over_groups(work)
    return found[0], found[1]


def dots(cut: Any, u: Array, x: Array, mean: Array, where: Array | None, skip_zeros: bool) -> tuple[Array, Array]:
    """(E5, E8, E9) Σu and Σu·(x−mean), each (C,), over `where`; `skip_zeros` lets 0·NaN be 0."""
    found = np.empty((2, cut.channels))

    def work(group: _Group, part: slice, mean: Array) -> None:
        found[:, part] = group.dots(None, None, mean, skip_zeros=skip_zeros)

    _Call(cut, x, u, where=where).over_groups(work, mean)
    return found[0], found[1]


def affine2(
    cut: Any, u: Array, x: Array, mean: Array, coefficients: Sequence[Array], out: Array | None, where: Array
) -> Array:
    """(E6) a·u + b·(x−mean) + c (N, C, S), or a·u if not `where`."""
    call = _Call(cut, x, u, where=where)
    call.write_to(x, out)
    call.over_groups(lambda group, part, *given: group.affine2(None, None, *given), mean, *coefficients)
    return call.result


def affine3(
    cut: Any, v: Array, u: Array, x: Array, mean: Array, coefficients: Sequence[Array], out: Array | None, where: Array
) -> Array:
    """(E9) a·v + b·u + c·(x−mean) + d (N, C, S), or b·u if not `where`."""
    call = _Call(cut, x, v, u, where=where)
    call.write_to(x, out)
    call.over_groups(lambda group, part, *given: group.affine3(None, None, None, *given), mean, *coefficients)
    return call.result


def forward(
    cut: Any, x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None, mask: Mask
) -> tuple[Moments, Array, Array]:
    """(E1, E3) The moments of x (N, C, S), rstd (C,) and y, a group of channels through both sweeps at a time."""
    call, found = _Call(cut, x, where=mask.where), np.empty((3, cut.channels))
    call.write_to(x, out)
    weight = np.ones(cut.channels) if weight is None else weight
    bias = np.zeros(cut.channels) if bias is None else bias

    def work(group: _Group, part: slice, weight: Array, bias: Array) -> None:
        if group.apart:
            group.at_once("forward", call.n, weight, bias, eps, *found[:, part])
            return
        batch, rstd, _ = reference.forward(group, group, weight, bias, eps, mask=mask)
        found[:, part] = batch.mean, batch.m2, rstd

    call.over_groups(work, weight, bias)
    mean, m2, rstd = found
    return Moments(mask.n, mean, m2), rstd, call.result


def backward(
    cut: Any,
    dy: Array,
    x: Array,
    batch: Moments,
    rstd: Array,
    weight: Array | None,
    *,
    out: Array | None,
    where: Array,
) -> tuple[Array, Array, Array]:
    """(E5, E6) dx, and dweight and dbias (C,), a group of channels through both sweeps at a time."""
    call, found = _Call(cut, x, dy, where=where), np.empty((2, cut.channels))
    call.write_to(x, out)
    weight = np.ones(cut.channels) if weight is None else weight

    def work(group: _Group, part: slice, mean: Array, rstd: Array, weight: Array) -> None:
        if group.apart:
            group.at_once("backward", max(batch.n, 1), mean, rstd, weight, *found[:, part])
            return
        of_group = Moments(batch.n, mean, rstd)  # m2 is not looked at
        _, *found[:, part] = reference.backward(group, group, group, of_group, rstd, weight, where=where)

    call.over_groups(work, batch.mean, rstd, weight)
    return call.result, found[0], found[1]

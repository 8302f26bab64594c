"""Numba's loops over a tile of the data: the work on a run of values, and the loops from run to run.

Data is seen as (N, C, S), contiguous, and addressed as one long line: the value of sample n, channel c, place s is at
n·sample + c·plane + s, where `plane` is S and `sample` is C·S. All arithmetic is in float64, whatever the data's dtype.

Runs are of two kinds. Where a plane (the S values of a sample and channel) is long, a run is a piece of a plane, and
its coefficients are numbers. Where it is short, down to the one value of channels-last, a run goes over the planes of
many channels, and its coefficients are arrays as long as the run.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from .half import narrow, wide

LONG = 32  # planes of this many values are runs of their own
WIDE = 1024  # values in a run of several rows: its coefficients stay in the first-level cache
PART = 2048  # values in a run that is a part of a row: memory delivers longer pieces faster
PIECE = 8192  # values in a run along a long plane
SHORT = 512  # values in one partial sum, some sixteen for each lane of a vector register
BLOCK = 64  # runs whose sums are added to each other before the sum of the tile, which keeps rounding small

# Reassociation lets sums be vectorized. NaN and inf keep their meaning; x − mean is kept out of it by `minus`.
# Dividing by zero gives inf or NaN, as in NumPy.
plain = functools.partial(njit, error_model="numpy")
_sum = functools.partial(njit, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
_map = functools.partial(njit, error_model="numpy", fastmath={"contract"})


def named_after(run: Any) -> Any:
    """Return a decorator that compiles the loops made for the function `run` under a name of their own.

    The linker tells functions apart by their names and types, and by a number that Numba begins anew in every process.
    Of two of one name, kept on disk by two processes, a third would take one for the other.
    """
    function = getattr(run, "py_func", run)

    def compile_(loops: Any) -> Any:
        loops.__qualname__ += f".{function.__module__}.{function.__qualname__}"
        return plain(loops)

    return compile_


class Cut(NamedTuple):
    """Groups of channels, each cut into tiles of rows; the same for every number of threads."""

    sample: int  # values of a sample, C·S
    plane: int  # values of a plane, S
    n: int
    channels: int
    group: int  # channels in a group
    groups: int
    rows: int
    height: int  # rows in a tile
    tiles: int  # of a group


@plain
def minus(x, mean):
    """Return x − mean, not reassociated: Σ(x−mean) could otherwise become Σx − n·mean and lose every digit."""
    return x - mean


# ---- Runs: the work of each sweep on values that lie side by side ----------------------------------------------------
# Indices are unsigned: for a signed index Numba tests at every step whether the index counts from the end. They are
# made by additions alone, because Numba multiplies an unsigned number and a literal in floating point.


@_sum
def _moments_along(u, x, start, stop, shift):
    s = q = 0.0
    for i in range(start, stop):
        d = minus(wide(x[i]), shift)
        s += d
        q += d * d
    return s, q


@_map
def _moments_across(u, x, start, stop, shift, s, q):
    for j in range(stop - start):
        d = wide(x[start + j]) - shift[j]
        s[j] += d
        q[j] += d * d


@_map
def _moments_across_8(u, x, start, step, size, shift, s, q):
    i1 = start + step
    i2 = i1 + step
    i3 = i2 + step
    i4 = i3 + step
    i5 = i4 + step
    i6 = i5 + step
    i7 = i6 + step
    for j in range(size):
        m = shift[j]
        d0, d1, d2, d3 = wide(x[start + j]) - m, wide(x[i1 + j]) - m, wide(x[i2 + j]) - m, wide(x[i3 + j]) - m
        d4, d5, d6, d7 = wide(x[i4 + j]) - m, wide(x[i5 + j]) - m, wide(x[i6 + j]) - m, wide(x[i7 + j]) - m
        s[j] += ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))
        q[j] = d7 * d7 + (d6 * d6 + (d5 * d5 + (d4 * d4 + (d3 * d3 + (d2 * d2 + (d1 * d1 + (d0 * d0 + q[j])))))))


@_sum
def _dots_along(u, x, start, stop, mean):
    s = q = 0.0
    for i in range(start, stop):
        v = wide(u[i])
        s += v
        q += v * minus(wide(x[i]), mean)
    return s, q


@_map
def _dots_across(u, x, start, stop, mean, s, q):
    for j in range(stop - start):
        v = wide(u[start + j])
        s[j] += v
        q[j] += v * (wide(x[start + j]) - mean[j])


@_map
def _dots_across_4(u, x, start, step, size, mean, s, q):
    i1 = start + step
    i2 = i1 + step
    i3 = i2 + step
    for j in range(size):
        m = mean[j]
        v0, v1, v2, v3 = wide(u[start + j]), wide(u[i1 + j]), wide(u[i2 + j]), wide(u[i3 + j])
        s[j] += (v0 + v1) + (v2 + v3)
        first = v1 * (wide(x[i1 + j]) - m) + (v0 * (wide(x[start + j]) - m) + q[j])
        q[j] = v3 * (wide(x[i3 + j]) - m) + (v2 * (wide(x[i2 + j]) - m) + first)


@_map
def _affine_along(u, x, start, stop, mean, a, b, c, out, o):
    for i in range(start, stop):
        out[i - o] = narrow(a * (wide(x[i]) - mean) + c, out)


@_map
def _affine_across(u, x, start, stop, mean, a, b, c, out, o):
    for j in range(stop - start):
        i = start + j
        out[i - o] = narrow(a[j] * (wide(x[i]) - mean[j]) + c[j], out)


@_map
def _affine_across_4(u, x, start, step, size, mean, a, b, c, out):
    i1 = start + step
    i2 = i1 + step
    i3 = i2 + step
    for j in range(size):
        m, scale, shift = mean[j], a[j], c[j]
        d0, d1, d2, d3 = wide(x[start + j]) - m, wide(x[i1 + j]) - m, wide(x[i2 + j]) - m, wide(x[i3 + j]) - m
        out[start + j] = narrow(scale * d0 + shift, out)
        out[i1 + j] = narrow(scale * d1 + shift, out)
        out[i2 + j] = narrow(scale * d2 + shift, out)
        out[i3 + j] = narrow(scale * d3 + shift, out)


@_map
def _affine2_along(u, x, start, stop, mean, a, b, c, out, o):
    for i in range(start, stop):
        out[i - o] = narrow(a * wide(u[i]) + (b * (wide(x[i]) - mean) + c), out)


@_map
def _affine2_across(u, x, start, stop, mean, a, b, c, out, o):
    for j in range(stop - start):
        i = start + j
        out[i - o] = narrow(a[j] * wide(u[i]) + (b[j] * (wide(x[i]) - mean[j]) + c[j]), out)


@_map
def _affine2_across_4(u, x, start, step, size, mean, a, b, c, out):
    i1 = start + step
    i2 = i1 + step
    i3 = i2 + step
    for j in range(size):
        m, first, second, shift = mean[j], a[j], b[j], c[j]
        d0, d1, d2, d3 = wide(x[start + j]) - m, wide(x[i1 + j]) - m, wide(x[i2 + j]) - m, wide(x[i3 + j]) - m
        out[start + j] = narrow(first * wide(u[start + j]) + (second * d0 + shift), out)
        out[i1 + j] = narrow(first * wide(u[i1 + j]) + (second * d1 + shift), out)
        out[i2 + j] = narrow(first * wide(u[i2 + j]) + (second * d2 + shift), out)
        out[i3 + j] = narrow(first * wide(u[i3 + j]) + (second * d3 + shift), out)


@_map
def _affine3_along(v, u, x, start, stop, mean, a, b, c, d, out, o):
    for i in range(start, stop):
        out[i - o] = narrow(a * wide(v[i]) + (b * wide(u[i]) + (c * (wide(x[i]) - mean) + d)), out)


@_map
def _affine3_across(v, u, x, start, stop, lines, out, o):
    mean, a, b, c, d = lines[0], lines[1], lines[2], lines[3], lines[4]
    for j in range(stop - start):
        i = start + j
        out[i - o] = narrow(a[j] * wide(v[i]) + (b[j] * wide(u[i]) + (c[j] * (wide(x[i]) - mean[j]) + d[j])), out)


@plain
def _copy(buffer, start, stop, out):
    for i in range(start, stop):
        out[i] = buffer[i - start]


# ---- Tiles: channels c0, c0 + 1, … (as many as there are coefficients) of rows r0 … r1 - 1 ---------------------------
# A row is a sample, or, of planes longer than PIECE, the k-th piece of a sample's planes: r = n·pieces + k.


@plain
def _pieces(plane: int) -> int:
    """Return the number of rows of a sample."""
    return (plane + PIECE - 1) // PIECE


@plain
def _row(r, sample, plane):
    """Return the start of the run of row r and channel 0, and the length of the runs of that row, for long planes."""
    if plane <= PIECE:
        return r * sample, plane
    n, k = divmod(r, _pieces(plane))
    return n * sample + k * PIECE, min(PIECE, plane - k * PIECE)


@plain
def _together(channels, sample, plane):
    """Return channels and samples per run over short planes."""
    if channels * plane == sample and sample <= WIDE:  # whole samples lie side by side
        return channels, WIDE // sample
    return min(channels, max(1, PART // plane)), 1


@plain
def _lines(number, values):
    """Return an empty array (number, ≥ values) of lines.

    The lines are 2,720 bytes apart, modulo 4,096: a load seems to wait for a store whose address has the same last
    twelve bits, so lines that begin on the same place of a page, which is where malloc puts them, halve the speed.
    """
    return np.empty((number, (values + 511) // 512 * 512 + 340))


@plain
def _repeat(values, plane, times, line):
    """Set `line` to the number of its channel for each value of a run over short planes."""
    if plane == 1:
        for k in range(times):
            for j in range(values.size):
                line[np.uintp(k * values.size + j)] = values[j]
        return
    for k in range(times):
        for j in range(values.size):
            part, value = line[(k * values.size + j) * plane :], values[j]
            for i in range(plane):
                part[i] = value


@plain
def _add_up(line, plane, sums):
    """Add the sums of each position of a run over short planes to the sum of its channel; `line` is overwritten."""
    whole = sums.size * plane
    times = line.size // whole
    while times > 1:  # by halves, as rounding would grow with the number of times
        half = (times + 1) // 2
        for i in range((times - half) * whole):
            line[np.uintp(i)] += line[np.uintp(half * whole + i)]
        times = half
    for j in range(sums.size):
        total = 0.0
        for i in range(plane):
            total += line[np.uintp(j * plane + i)]
        sums[j] += total


def _sums_along(run: Any) -> Any:
    """Return the loops of a reduction over long planes; `run` returns the two sums of a run."""

    @named_after(run)
    def reduce(u, x, sample, plane, c0, r0, r1, mean, s, q):
        s_block, q_block = np.empty(mean.size), np.empty(mean.size)
        s[:] = 0.0
        q[:] = 0.0
        for block in range(r0, r1, BLOCK):
            s_block[:] = 0.0
            q_block[:] = 0.0
            for r in range(block, min(block + BLOCK, r1)):
                row, length = _row(r, sample, plane)
                for j in range(mean.size):
                    start = row + (c0 + j) * plane
                    s_run = q_run = 0.0
                    for first in range(start, start + length, SHORT):
                        last = min(first + SHORT, start + length)
                        s_part, q_part = run(u, x, np.uintp(first), np.uintp(last), mean[j])
                        s_run += s_part
                        q_run += q_part
                    s_block[j] += s_run
                    q_block[j] += q_run
            s += s_block
            q += q_block

    return reduce


def _sums_across(run: Any, several: Any, height: int) -> Any:
    """Return the loops of a reduction over short planes; `run` adds to two lines of sums, `several` adds `height` runs.

    A line of sums is loaded and stored once for all runs of a pass, which takes half the time of one run after another.
    """

    @named_after(run)
    def reduce(u, x, sample, plane, c0, r0, r1, mean, s, q):
        together, times = _together(mean.size, sample, plane)
        lines = _lines(3, together * times * plane)
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
                several_end = end - (end - block) % (height * times)
                for r in range(block, several_end, height * times):
                    start = np.uintp(r * sample + (c0 + j) * plane)
                    several(u, x, start, np.uintp(times * sample), np.uintp(size), line, s_line, q_line)
                for r in range(several_end, end, times):
                    start = np.uintp(r * sample + (c0 + j) * plane)
                    run(u, x, start, start + np.uintp(min(times, end - r) * k * plane), line, s_line, q_line)
                _add_up(s_line, plane, s[j : j + k])
                _add_up(q_line, plane, q[j : j + k])

    return reduce


# A loop that writes over its input is not vectorized, so `in_place` a run is written to a buffer and then copied.


def _map_along(run: Any) -> Any:
    """Return the loops of a map over long planes; `run` writes a run of `out`, from index o on."""

    @named_after(run)
    def map_(u, x, sample, plane, c0, r0, r1, mean, a, b, c, out, in_place):
        buffer = np.empty(in_place * PIECE, out.dtype)
        target = buffer if in_place else out
        for r in range(r0, r1):
            row, length = _row(r, sample, plane)
            for j in range(mean.size):
                start = np.uintp(row + (c0 + j) * plane)
                stop = start + np.uintp(length)
                run(u, x, start, stop, mean[j], a[j], b[j], c[j], target, start * np.uintp(in_place))
                if in_place:
                    _copy(buffer, start, stop, out)

    return map_


def _map_across(run: Any, four: Any, has_b: bool = False) -> Any:
    """Return the loops of a map over short planes; `run` writes a run of `out`, from index o on.

    `four` writes four runs, each a part of a row, whose coefficients are then loaded once; not `in_place`.
    """

    @named_after(run)
    def map_(u, x, sample, plane, c0, r0, r1, mean, a, b, c, out, in_place):
        together, times = _together(mean.size, sample, plane)
        times = min(times, max(1, (r1 - r0) // 16))  # it takes time to repeat coefficients, which pays for many rows
        lines = _lines(4, together * times * plane)
        buffer = np.empty(in_place * together * times * plane, out.dtype)
        target = buffer if in_place else out
        for j in range(0, mean.size, together):
            k = min(together, mean.size - j)
            _repeat(mean[j : j + k], plane, times, lines[0])
            _repeat(a[j : j + k], plane, times, lines[1])
            if has_b:
                _repeat(b[j : j + k], plane, times, lines[2])
            _repeat(c[j : j + k], plane, times, lines[3])
            first = r0
            if not in_place:
                first = r1 - (r1 - r0) % (4 * times)
                for r in range(r0, first, 4 * times):
                    start = np.uintp(r * sample + (c0 + j) * plane)
                    step, size = np.uintp(times * sample), np.uintp(times * k * plane)
                    four(u, x, start, step, size, lines[0], lines[1], lines[2], lines[3], out)
            for r in range(first, r1, times):
                start = np.uintp(r * sample + (c0 + j) * plane)
                stop = start + np.uintp(min(times, r1 - r) * k * plane)
                run(u, x, start, stop, lines[0], lines[1], lines[2], lines[3], target, start * np.uintp(in_place))
                if in_place:
                    _copy(buffer, start, stop, out)

    return map_


moments_of_planes, moments_of_lines = _sums_along(_moments_along), _sums_across(_moments_across, _moments_across_8, 8)
dots_of_planes, dots_of_lines = _sums_along(_dots_along), _sums_across(_dots_across, _dots_across_4, 4)
affine_of_planes, affine_of_lines = _map_along(_affine_along), _map_across(_affine_across, _affine_across_4)
affine2_of_planes, affine2_of_lines = _map_along(_affine2_along), _map_across(_affine2_across, _affine2_across_4, True)


@plain
def affine3_of_planes(v, u, x, sample, plane, c0, r0, r1, mean, a, b, c, d, out, in_place):
    """Do as `_map_along` for the map of four coefficients."""
    buffer = np.empty(in_place * PIECE, out.dtype)
    target = buffer if in_place else out
    for r in range(r0, r1):
        row, length = _row(r, sample, plane)
        for j in range(mean.size):
            start = np.uintp(row + (c0 + j) * plane)
            stop = start + np.uintp(length)
            o = start * np.uintp(in_place)
            _affine3_along(v, u, x, start, stop, mean[j], a[j], b[j], c[j], d[j], target, o)
            if in_place:
                _copy(buffer, start, stop, out)


@plain
def affine3_of_lines(v, u, x, sample, plane, c0, r0, r1, mean, a, b, c, d, out, in_place):
    """Do as `_map_across` for the map of four coefficients."""
    together, times = _together(mean.size, sample, plane)
    lines = _lines(5, together * times * plane)
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
            start = np.uintp(r * sample + (c0 + j) * plane)
            stop = start + np.uintp(min(times, r1 - r) * k * plane)
            _affine3_across(v, u, x, start, stop, lines, target, start * np.uintp(in_place))
            if in_place:
                _copy(buffer, start, stop, out)

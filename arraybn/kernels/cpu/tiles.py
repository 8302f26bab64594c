"""Numba's loops over a tile of the data: the work on a run of values, and the loops from run to run.

Data is seen as (N, C, S), contiguous, and addressed as one long line: the value of sample n, channel c, place s is at
n·sample + c·plane + s, where `plane` is S and `sample` is C·S. All arithmetic is in float64, whatever the data's dtype.

Runs are of two kinds. Where a plane (the S values of a sample and channel) is long, a run is a piece of a plane, and
its coefficients are numbers. Where it is short, down to the one value of channels-last, a run goes over the planes of
many channels, and its coefficients are arrays as long as the run.
"""

from __future__ import annotations

import functools
import zlib
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

# Reassociation lets sums be vectorized. NaN and inf keep their meaning; x − mean is kept out of it by `_pair`.
# Dividing by zero gives inf or NaN, as in NumPy.
plain = functools.partial(njit, error_model="numpy")
inlined = functools.partial(plain, forceinline=True)  # where a call would copy many arguments
_sum = functools.partial(njit, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
_map = functools.partial(njit, error_model="numpy", fastmath={"contract"})


def named_after(run: Any, compile_: Any = plain) -> Any:
    """Return a decorator that compiles the loops made for the function `run` under a name of their own.

    The linker tells functions apart by their names and types, and by a number that Numba begins anew in every process.
    Of two of one name, kept on disk by two processes, a third would take one for the other. The name of `run` is
    shortened, because names are those of files, too.
    """
    function = getattr(run, "py_func", run)

    def decorate(loops: Any) -> Any:
        loops.__qualname__ += f".{zlib.crc32(f'{function.__module__}.{function.__qualname__}'.encode()):x}"
        return compile_(loops)

    return decorate


class Cut(NamedTuple):
    """Groups of channels, each cut into tiles of rows; the same for every number of threads."""

    sample: int  # values of a sample, C·S
    plane: int  # values of a plane, S
    n: int  # values of a channel that count
    channels: int
    group: int  # channels in a group
    groups: int
    rows: int
    height: int  # rows in a tile
    tiles: int  # of a group


# ---- Values: what each sweep does with the values of one position ----------------------------------------------------
# `where` has a byte for each position, 0 for a position that is no part of the batch; loops without a mask do not read
# `where`. A value at such a position is read, and left out by a selection: a product with 0 would keep a NaN.
#
# Indices are unsigned: for a signed index Numba tests at every step whether the index counts from the end. They are
# made by additions alone, because Numba multiplies an unsigned number and a literal in floating point.


def _pair(squares: bool = False, skip_zeros: bool = False, masked: bool = False) -> Any:
    """Return the function that gives v and d of Σv and Σv·d: v is d = x − mean (squares), or u.

    Compiled by itself, without reassociation: Σ(x−mean) could otherwise become Σx − n·mean and lose every digit.
    """

    def pair(u, x, where, i, at, mean):
        d = wide(x[i]) - mean
        v = d if squares else wide(u[i])
        counts = True
        if masked:
            counts = where[at] != 0
        if skip_zeros:  # where u is 0, x counts for nothing, though it be NaN
            counts = v != 0
        return v if counts else 0.0, d if counts else 0.0

    pair.__qualname__ += f".{squares}.{skip_zeros}.{masked}"
    return plain(pair)


def _value(terms: int, masked: bool = False, compile_: Any = _map) -> Any:
    """Return the function that gives c·(x−mean) + d; plus b·u from two terms on; plus a·v with three.

    Where the mask is 0, b·u alone is left.
    """

    def value(data, where, i, at, mean, a, b, c, d):
        v, u, x = data
        total = c * (wide(x[i]) - mean) + d
        counts = where[at] != 0 if masked else True
        if terms > 1:
            total = b * wide(u[i]) + (total if counts else 0.0)
        if terms > 2:
            total = a * wide(v[i]) + total if counts else total
        return total

    value.__qualname__ += f".{terms}.{masked}.{compile_ is plain}"
    return compile_(value)


@plain
def _copy(buffer, start, stop, out):
    for i in range(start, stop):
        out[i] = buffer[i - start]


# ---- Tiles: channels c0 … c1 - 1 of rows r0 … r1 - 1 -----------------------------------------------------------------
# A row is a sample, or, of planes longer than PIECE, the k-th piece of a sample's planes: r = n·pieces + k.


@plain
def tile_of(cut, group, tile):
    """Return the channels c0 … c1 - 1 and the rows r0 … r1 - 1 of a tile."""
    c0, r0 = group * cut.group, tile * cut.height
    return c0, min(c0 + cut.group, cut.channels), r0, min(r0 + cut.height, cut.rows)


@plain
def _row(r, plane):
    """Return the sample of row r of long planes, where in a plane the runs of that row begin, and their length."""
    if plane <= PIECE:
        return r, 0, plane
    n, k = divmod(r, (plane + PIECE - 1) // PIECE)
    return n, k * PIECE, min(PIECE, plane - k * PIECE)


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


@plain
def _set_marks(where, r, samples, channels, plane, marks):
    """Set `marks` to the mask of each value of a run over the short planes of samples r, r + 1, …"""
    for t in range(samples):
        for j in range(channels):
            for i in range(plane):
                marks[np.uintp((t * channels + j) * plane + i)] = where[np.uintp((r + t) * plane + i)]


# ---- Sums: loops that set Σv and Σv·d of a tile ----------------------------------------------------------------------


def _sums_along(pair: Any) -> Any:
    """Return the loops of a reduction over long planes."""

    @named_after(pair, _sum)
    def run(u, x, where, start, stop, at, mean):
        s = q = 0.0
        for i in range(stop - start):
            v, d = pair(u, x, where, start + i, at + i, mean)
            s += v
            q += v * d
        return s, q

    @named_after(pair, inlined)
    def reduce(tile, group, u, x, where, cut, mean, sums):
        c0, c1, r0, r1 = tile_of(cut, group, tile)
        s, q, blocks = sums[0, tile, c0:c1], sums[1, tile, c0:c1], np.empty((2, c1 - c0))
        s_block, q_block = blocks[0], blocks[1]
        s[:] = 0.0
        q[:] = 0.0
        for block in range(r0, r1, BLOCK):
            blocks[:] = 0.0
            for r in range(block, min(block + BLOCK, r1)):
                n, first, length = _row(r, cut.plane)
                at = n * cut.plane + first
                for j in range(c1 - c0):
                    start = n * cut.sample + (c0 + j) * cut.plane + first
                    s_run = q_run = 0.0
                    for k in range(0, length, SHORT):
                        stop = np.uintp(start + min(k + SHORT, length))
                        s_part, q_part = run(u, x, where, np.uintp(start + k), stop, np.uintp(at + k), mean[c0 + j])
                        s_run += s_part
                        q_run += q_part
                    s_block[j] += s_run
                    q_block[j] += q_run
            for j in range(c1 - c0):
                s[j] += s_block[j]
                q[j] += q_block[j]

    return reduce


def _run_across(pair: Any) -> Any:
    """Return the function that adds a run to two lines of sums."""

    @named_after(pair, _map)
    def run(u, x, marks, start, stop, mean, s, q):
        for j in range(stop - start):
            v, d = pair(u, x, marks, start + j, j, mean[j])
            s[j] += v
            q[j] += v * d

    return run


def _several_across(pair: Any, height: int) -> Any:
    """Return the function that adds `height` runs, four or eight, to two lines of sums.

    A line of sums is loaded and stored once for all runs of a pass, which takes half the time of one run after another.
    """

    @functools.partial(_map, inline="always")
    def four(u, x, marks, i0, i1, i2, i3, mean, q):
        (v0, d0), (v1, d1) = pair(u, x, marks, i0, i0, mean), pair(u, x, marks, i1, i1, mean)
        (v2, d2), (v3, d3) = pair(u, x, marks, i2, i2, mean), pair(u, x, marks, i3, i3, mean)
        return (v0 + v1) + (v2 + v3), v3 * d3 + (v2 * d2 + (v1 * d1 + (v0 * d0 + q)))

    @named_after(pair, _map)
    def several(u, x, marks, starts, size, mean, s, q):
        i0, i1, i2, i3 = starts[0], starts[1], starts[2], starts[3]
        i4, i5, i6, i7 = starts[height - 4], starts[height - 3], starts[height - 2], starts[height - 1]
        for j in range(size):
            m = mean[j]
            total, products = four(u, x, marks, i0 + j, i1 + j, i2 + j, i3 + j, m, q[j])
            if height > 4:
                more, products = four(u, x, marks, i4 + j, i5 + j, i6 + j, i7 + j, m, products)
                total += more
            s[j] += total
            q[j] = products

    return several


def _sums_across(run: Any, several: Any, height: int, masked: bool = False) -> Any:
    """Return the loops of a reduction over short planes; with a mask one run after another."""

    @named_after(run, inlined)
    def reduce(tile, group, u, x, where, cut, mean, sums):
        c0, c1, r0, r1 = tile_of(cut, group, tile)
        sample, plane = cut.sample, cut.plane
        together, times = _together(c1 - c0, sample, plane)
        width = together * times * plane
        lines, marks, starts = _lines(3, width), np.empty(masked * width, np.uint8), np.empty(height, np.uintp)
        for c in range(c0, c1, together):
            k = min(together, c1 - c)
            size, s, q = k * times * plane, sums[0, tile, c : c + k], sums[1, tile, c : c + k]
            line, s_line, q_line = lines[0, :size], lines[1, :size], lines[2, :size]
            _repeat(mean[c : c + k], plane, times, line)
            s[:] = 0.0
            q[:] = 0.0
            for block in range(r0, r1, BLOCK * times):
                s_line[:] = 0.0
                q_line[:] = 0.0
                end = min(block + BLOCK * times, r1)
                several_end = block if masked else end - (end - block) % (height * times)
                for r in range(block, several_end, height * times):
                    for i in range(height):
                        starts[i] = np.uintp((r + i * times) * sample + c * plane)
                    several(u, x, marks, starts, np.uintp(size), line, s_line, q_line)
                for r in range(several_end, end, times):
                    samples, start = min(times, end - r), np.uintp(r * sample + c * plane)
                    if masked:
                        _set_marks(where, r, samples, k, plane, marks)
                    run(u, x, marks, start, start + np.uintp(samples * k * plane), line, s_line, q_line)
                _add_up(s_line, plane, s)
                _add_up(q_line, plane, q)

    return reduce


# ---- Maps: loops that write the values of a tile ---------------------------------------------------------------------
# A loop that writes over its input is not vectorized, so `in_place` a run is written to a buffer and then copied.


def _map_along(value: Any) -> Any:
    """Return the loops of a map over long planes."""

    @named_after(value, inlined)
    def run(data, where, start, stop, at, mean, a, b, c, d, out, o):
        for i in range(stop - start):
            out[start + i - o] = narrow(value(data, where, start + i, at + i, mean, a, b, c, d), out)

    @named_after(value, inlined)
    def map_(tile, group, data, where, cut, vectors, out, in_place):
        c0, c1, r0, r1 = tile_of(cut, group, tile)
        mean, a, b, c, d = vectors
        buffer = np.empty(in_place * PIECE, out.dtype)
        target = buffer if in_place else out
        for r in range(r0, r1):
            n, first, length = _row(r, cut.plane)
            at = np.uintp(n * cut.plane + first)
            for j in range(c0, c1):
                start = np.uintp(n * cut.sample + j * cut.plane + first)
                stop, o = start + np.uintp(length), start * np.uintp(in_place)
                run(data, where, start, stop, at, mean[j], a[j], b[j], c[j], d[j], target, o)
                if in_place:
                    _copy(buffer, start, stop, out)

    return map_


def _run_of_map(value: Any) -> Any:
    """Return the function that writes a run across channels, whose coefficients are lines, from index o on."""

    @named_after(value)
    def run(data, marks, start, stop, lines, out, o):
        mean, a, b, c, d = lines[0], lines[1], lines[2], lines[3], lines[4]
        for j in range(stop - start):
            out[start + j - o] = narrow(value(data, marks, start + j, j, mean[j], a[j], b[j], c[j], d[j]), out)

    return run


def _four_of_map(value: Any) -> Any:
    """Return the function that writes four runs across channels, whose coefficients are then loaded once."""

    @named_after(value)
    def four(data, marks, start, step, size, lines, out):
        mean, a, b, c, d = lines[0], lines[1], lines[2], lines[3], lines[4]
        i1 = start + step
        i2 = i1 + step
        i3 = i2 + step
        for j in range(size):
            m, e, f, g, h = mean[j], a[j], b[j], c[j], d[j]
            y0, y1 = value(data, marks, start + j, j, m, e, f, g, h), value(data, marks, i1 + j, j, m, e, f, g, h)
            y2, y3 = value(data, marks, i2 + j, j, m, e, f, g, h), value(data, marks, i3 + j, j, m, e, f, g, h)
            out[start + j], out[i1 + j], out[i2 + j], out[i3 + j] = (
                narrow(y0, out),
                narrow(y1, out),
                narrow(y2, out),
                narrow(y3, out),
            )

    return four


def _map_across(value: Any, terms: int, masked: bool = False) -> Any:
    """Return the loops of a map over short planes; without a mask, four runs at a time share their coefficients."""
    run, four = _run_of_map(value), _four_of_map(value)

    @named_after(value, inlined)
    def map_(tile, group, data, where, cut, vectors, out, in_place):
        c0, c1, r0, r1 = tile_of(cut, group, tile)
        mean, a, b, c, d = vectors
        sample, plane = cut.sample, cut.plane
        together, times = _together(c1 - c0, sample, plane)
        times = min(times, max(1, (r1 - r0) // 16))  # it takes time to repeat coefficients, which pays for many rows
        width = together * times * plane
        lines, marks = _lines(5, width), np.empty(masked * width, np.uint8)
        buffer = np.empty(in_place * width, out.dtype)
        target = buffer if in_place else out
        for j in range(c0, c1, together):
            k = min(together, c1 - j)
            _repeat(mean[j : j + k], plane, times, lines[0])
            if terms > 2:
                _repeat(a[j : j + k], plane, times, lines[1])
            if terms > 1:
                _repeat(b[j : j + k], plane, times, lines[2])
            _repeat(c[j : j + k], plane, times, lines[3])
            _repeat(d[j : j + k], plane, times, lines[4])
            first = r0 if in_place or masked else r1 - (r1 - r0) % (4 * times)
            for r in range(r0, first, 4 * times):
                start = np.uintp(r * sample + j * plane)
                four(data, marks, start, np.uintp(times * sample), np.uintp(times * k * plane), lines, out)
            for r in range(first, r1, times):
                samples, start = min(times, r1 - r), np.uintp(r * sample + j * plane)
                stop = start + np.uintp(samples * k * plane)
                if masked:
                    _set_marks(where, r, samples, k, plane, marks)
                run(data, marks, start, stop, lines, target, start * np.uintp(in_place))
                if in_place:
                    _copy(buffer, start, stop, out)

    return map_


def sums_of(height: int, *, masked: bool = False, **kind: bool) -> tuple[Any, Any]:
    """Return the loops of a reduction over long planes, and over short ones, `height` runs at a time."""
    pair = _pair(masked=masked, **kind)
    return _sums_along(pair), _sums_across(_run_across(pair), _several_across(pair, height), height, masked)


def maps_of(terms: int, masked: bool = False, compile_: Any = _map) -> tuple[Any, Any]:
    """Return the loops of a map of so many terms over long planes, and over short ones."""
    value = _value(terms, masked, compile_)
    return _map_along(value), _map_across(value, terms, masked)


moments_of_planes, moments_of_lines = sums_of(8, squares=True)
dots_of_planes, dots_of_lines = sums_of(4)
affine_of_planes, affine_of_lines = maps_of(1)
affine2_of_planes, affine2_of_lines = maps_of(2)
affine3_of_planes, affine3_of_lines = maps_of(3)

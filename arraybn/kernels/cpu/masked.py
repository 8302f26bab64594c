"""The sweeps of a batch with a mask: stages in place of those of ``entries.py``, and the entries that take a mask.

`where` is a line of bytes, one for each position (N·S), 0 for a position that is no part of the batch: as many bytes as
a channel has values, read once for all channels of a tile.

Over long planes a run has its own piece of `where`. In channels-last a row is a position: rows that do not count are
left out as a whole. Over planes in between, the mask of a sample is repeated for each channel of a run.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import types

from .entries import (
    _READ,
    _STORED,
    Compiled,
    map_tiles,
    mapping,
    masked_backward,
    masked_dots,
    masked_forward,
    masked_moments,
    shifting,
    summing,
)
from .half import narrow, wide
from .tiles import (
    BLOCK,
    _copy,
    _lines,
    _pair,
    _run_across,
    _run_of_map,
    _several_across,
    _value,
    maps_of,
    named_after,
    plain,
    sums_of,
    tile_of,
)

ROWS = 4 * BLOCK  # rows of channels-last data whose sums are added to each other before the sum of the tile


def _sums_of_rows(squares: bool, height: int) -> Any:
    """Return the loops of a reduction over the rows of channels-last data that count, `height` of them at a time.

    These are rows of as many places in a block, one row after another: memory delivers that faster than neighbours.
    """
    pair = _pair(squares)
    run, several = _run_across(pair), _several_across(pair, height)

    @named_after(pair)
    def reduce(tile, group, u, x, where, cut, mean, sums):
        c0, c1, r0, r1 = tile_of(cut, group, tile)
        s, q, mean, size = sums[0, tile, c0:c1], sums[1, tile, c0:c1], mean[c0:c1], np.uintp(c1 - c0)
        lines, found, starts = _lines(2, c1 - c0), np.empty(ROWS, np.uintp), np.empty(height, np.uintp)
        s_line, q_line = lines[0, : c1 - c0], lines[1, : c1 - c0]
        s[:] = 0.0
        q[:] = 0.0
        for block in range(r0, r1, ROWS):
            s_line[:] = 0.0
            q_line[:] = 0.0
            count = 0
            for r in range(block, min(block + ROWS, r1)):
                found[count] = np.uintp(r * cut.sample + c0)
                count += where[np.uintp(r)] != 0
            passes = count // height
            for i in range(passes):
                for k in range(height):
                    starts[k] = found[k * passes + i]
                several(u, x, where, starts, size, mean, s_line, q_line)
            for i in range(passes * height, count):
                run(u, x, where, found[i], found[i] + size, mean, s_line, q_line)
            s += s_line
            q += q_line

    return reduce


@plain
def _scaled(u, start, stop, b, out, o):
    for j in range(stop - start):
        out[start + j - o] = narrow(b[j] * wide(u[start + j]), out)


def _map_of_rows() -> Any:
    """Return the loops of the map of two terms over the rows of channels-last data."""
    whole = _run_of_map(_value(2))

    @named_after(whole)
    def map_(tile, group, data, where, cut, vectors, out, in_place):
        c0, c1, r0, r1 = tile_of(cut, group, tile)
        (_, u, _), lines = data, _lines(5, c1 - c0)
        for k in range(5):
            lines[k, : c1 - c0] = vectors[k][c0:c1]
        buffer = np.empty(in_place * (c1 - c0), out.dtype)
        target = buffer if in_place else out
        for r in range(r0, r1):
            start = np.uintp(r * cut.sample + c0)
            stop, o = start + np.uintp(c1 - c0), start * np.uintp(in_place)
            if where[np.uintp(r)] != 0:
                whole(data, where, start, stop, lines, target, o)
            else:
                _scaled(u, start, stop, lines[2], target, o)
            if in_place:
                _copy(buffer, start, stop, out)

    return map_


_spread = summing(*sums_of(8, squares=True, masked=True), _sums_of_rows(squares=True, height=8))
_dots = summing(*sums_of(4, masked=True), _sums_of_rows(squares=False, height=4))
_nonzero_dots = summing(*sums_of(4, skip_zeros=True))
_affine2, _affine3 = mapping(*maps_of(2, masked=True), _map_of_rows()), mapping(*maps_of(3, masked=True))


def _affine2_alone(at, words, u, x, where, numbers, mean, a, b, c, out, in_place):
    map_tiles(at, words, (x, u, x), where, numbers, (mean, a, a, b, c), out, in_place)


def _affine3_alone(at, words, v, u, x, where, numbers, mean, a, b, c, d, out, in_place):
    map_tiles(at, words, (v, u, x), where, numbers, (mean, a, b, c, d), out, in_place)


class _Compiled(Compiled):
    """The entries for one dtype that take a mask; each is compiled at its first use."""

    def __init__(self, stored: types.Type) -> None:
        super().__init__(stored)
        stages = {
            "shift": shifting(masked=True),
            "spread": _spread,
            "dots": _dots,
            "affine2": _affine2,
            "affine3": _affine3,
        }
        self._stages |= {name: (stage, self._stages[name][1]) for name, stage in stages.items()}
        self._stages["nonzero_dots"] = _nonzero_dots, self._stages["dots"][1]
        usual, numbers = self._jobs, _READ(types.int64)
        self._jobs = {"nonzero_dots": (*usual["dots"][:2], ("nonzero_dots", "total"))}
        jobs = {
            "moments": masked_moments,
            "dots": masked_dots,
            "affine2": _affine2_alone,
            "affine3": _affine3_alone,
            "forward_d": masked_forward,
            "backward": masked_backward,
        }
        for name, job in jobs.items():
            _, arguments, used = usual[name]
            i = arguments.index(numbers)
            self._jobs[name] = job, (*arguments[:i], _READ(types.uint8), *arguments[i:]), used
        self._jobs["backward"] = *self._jobs["backward"][:2], ("nonzero_dots", "gradients", "affine2")


compiled = functools.cache(lambda dtype: _Compiled(_STORED[dtype]))

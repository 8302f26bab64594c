"""The sweeps for NumPy arrays: compiled by Numba, spread over the cores, cut so that data is found in cache again.

A group of channels is taken through both sweeps before the next group, so that main memory sees one read and one write
of the data in a forward. Where one channel is larger than the caches, all threads go through that channel together, and
the second sweep goes backwards, to find in cache the values that the first sweep read last.

Work is cut by data alone, and the sums of tiles are added in a fixed order, so no bit depends on the number of threads.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import config

from ... import reference
from ..._arrays.namespaces import Array
from ...reference import Mask, Moments
from .. import threads
from . import masked
from .entries import compiled, serve
from .half import HALF as HALF
from .lines import contiguous, line_of, place_of_result
from .tiles import BLOCK, LONG, PIECE, Cut

TILE = 2**21  # bytes of a tile at most, so that the second sweep finds the tile in cache
MIN_CONTIGUOUS_BYTES = 2048  # bytes side by side that memory delivers at full speed
CACHED = 2**24  # bytes of x, up to which the last-level cache holds x and y, and rows are not cut
MIN_TILE_BYTES = 2**18  # bytes of a tile at least, so that starting a task does not show
_F8 = np.dtype(np.float64)

# ---- How the work is cut ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _cut(shape: tuple[int, int, int], itemsize: int) -> Cut:
    """Cut (N, C, S) into about sixteen tiles or more, or into fewer where the data is small."""
    samples, channels, plane = shape
    n = samples * plane
    if n == 0:
        return Cut(channels * plane, plane, 0, channels, channels, 1, 0, 1, 1)
    channel, width = n * itemsize, min(plane, PIECE) * itemsize  # bytes of a channel, and of its run in a row
    tile = min(max(channels * channel // 16, MIN_TILE_BYTES), TILE)
    group = min(max(tile // channel, 1), channels)
    rows, least, whole = samples, BLOCK, group * channel <= 2 * tile
    if plane >= LONG:
        rows, least = samples * -(-plane // PIECE), 1
    elif group < min(
        run := -(-MIN_CONTIGUOUS_BYTES // width), channels
    ):  # the values of `run` channels in a row are read at full speed
        whole = channels * channel > CACHED and run * channel <= 2 * TILE and 4 * run <= channels
        group = run if whole else min(8 * run, channels)
    height = rows if whole else min(max(tile // (group * width), least), rows)
    groups, tiles = -(-channels // group), -(-rows // height)
    return Cut(channels * plane, plane, n, channels, group, groups, rows, height, tiles)


@functools.lru_cache(maxsize=1024)
def _numbers(cut: Cut) -> Array:
    numbers = np.array(cut)
    numbers.flags.writeable = False
    return numbers


class _Job:
    """The arrays of a call as lines, how the work on them is cut, and the helpers."""

    __slots__ = ("code", "cut", "in_place", "numbers", "result", "u", "v", "words", "x", "y")

    def __init__(self, x: Array, u: Array | None = None, v: Array | None = None, entries: Any = compiled) -> None:
        self.cut = cut = _cut(x.shape, x.itemsize)
        self.numbers = _numbers(cut)
        self.code = entries(x.dtype.char)
        self.x = line_of(x)
        self.u = self.x if u is None else line_of(u)
        self.v = self.u if v is None else line_of(v)
        shared = cut.groups * cut.tiles > 1 and not config.DISABLE_JIT
        self.words = threads.helpers(serve(), x.nbytes) if shared else threads.ALONE

    def write_to(self, x: Array, out: Array | None) -> None:
        """Let the result be `out` where `out` can be written as a line, otherwise a new array like x."""
        inputs = (self.x,) if self.u is self.x else (self.x, self.u) if self.v is self.u else (self.x, self.u, self.v)
        self.result, self.y, self.in_place = place_of_result(x, out, *inputs)

    def map(self, sweep: str, x: Array, out: Array | None, lines: tuple[Array, ...], *vectors: Array) -> Array:
        """Return the result of that sweep over the lines, with these coefficients (C,)."""
        self.write_to(x, out)
        if self.cut.n:
            getattr(self.code, sweep)(self.words, *lines, self.numbers, *vectors, self.y, self.in_place)
        return self.result

    def vectors(self, number: int) -> Array:
        """Return vectors (C,) to be set, 0 for no data."""
        return (np.empty if self.cut.n else np.zeros)((number, self.cut.channels))


# ---- The sweeps ------------------------------------------------------------------------------------------------------


MASKS = True


def moments(x: Array, where: Array | None = None) -> tuple[Array, Array]:
    """(E1) mean and m2 (C,) of x (N, C, S), float64."""
    if where is not None:
        return masked.moments(_cut(x.shape, x.itemsize), x, where)
    job = _Job(x)
    mean, m2 = job.vectors(2)
    if job.cut.n:
        job.code.moments(job.words, job.x, job.numbers, mean, m2)
    return mean, m2


def dots(u: Array, x: Array, mean: Array, where: Array | None = None, skip_zeros: bool = False) -> tuple[Array, Array]:
    """(E5, E8, E9) Σu and Σu·(x−mean), each (C,) and float64, of u and x (N, C, S)."""
    if where is not None or skip_zeros:
        return masked.dots(_cut(x.shape, x.itemsize), u, x, mean, where, skip_zeros)
    job = _Job(x, u)
    s, q = job.vectors(2)
    if job.cut.n:
        job.code.dots(job.words, job.u, job.x, job.numbers, mean, s, q)
    return s, q


def affine(x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
    """(E3, E7) a·(x−mean) + c (N, C, S), in the dtype of x, written to `out` where `out` is contiguous."""
    job = _Job(x)
    return job.map("affine", x, out, (job.x,), mean, a, c)


def affine2(
    u: Array,
    x: Array,
    mean: Array,
    a: Array,
    b: Array,
    c: Array,
    out: Array | None = None,
    where: Array | None = None,
) -> Array:
    """(E6, E8, E9) a·u + b·(x−mean) + c (N, C, S), in the dtype of x, written to `out` where `out` is contiguous."""
    if where is not None:
        return masked.affine2(_cut(x.shape, x.itemsize), u, x, mean, (a, b, c), out, where)
    job = _Job(x, u)
    return job.map("affine2", x, out, (job.u, job.x), mean, a, b, c)


def affine3(
    v: Array,
    u: Array,
    x: Array,
    mean: Array,
    a: Array,
    b: Array,
    c: Array,
    d: Array,
    out: Array | None = None,
    where: Array | None = None,
) -> Array:
    """(E9) a·v + b·u + c·(x−mean) + d (N, C, S), in the dtype of x, written to `out` where `out` is contiguous."""
    if where is not None:
        return masked.affine3(_cut(x.shape, x.itemsize), v, u, x, mean, (a, b, c, d), out, where)
    job = _Job(x, u, v)
    return job.map("affine3", x, out, (job.v, job.u, job.x), mean, a, b, c, d)


# ---- Two sweeps, a group of channels through both before the next ----------------------------------------------------


def forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """(E1, E3) mean, m2 and rstd (C,) of x (N, C, S), and y = weight·xhat + bias."""
    job = _Job(x)
    job.write_to(x, out)
    channels = job.cut.channels
    weight = np.ones(channels) if weight is None else weight
    bias = np.zeros(channels) if bias is None else bias
    mean, m2, rstd = job.vectors(3)
    if job.cut.n:
        job.code.forward(job.words, job.x, job.numbers, weight, bias, eps, mean, m2, rstd, job.y, job.in_place)
    return mean, m2, rstd, job.result


def backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """(E5, E6) dx, and dweight and dbias (C,), from dy and x (N, C, S)."""
    job = _Job(x, dy)
    job.write_to(x, out)
    weight = np.ones(job.cut.channels) if weight is None else weight
    dweight, dbias = job.vectors(2)
    if job.cut.n:
        job.code.backward(job.words, job.u, job.x, job.numbers, mean, rstd, weight, dweight, dbias, job.y, job.in_place)
    return job.result, dweight, dbias


def evaluate(
    x: Array, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array | None, Array]:
    """(E3, E7) Copies of mean, rstd and weight (C,), and y = weight·xhat + bias, with fixed statistics."""
    job = _Job(x)
    job.write_to(x, out)
    mean, var, weight, bias = widened(mean, var, weight, bias)
    if not job.cut.n:
        return mean, reference.rstd(var, eps), weight, job.result
    rstd = np.empty(mean.size)
    ones = np.ones(mean.size) if weight is None else weight
    zeros = np.zeros(mean.size) if bias is None else bias
    job.code.evaluation(job.words, job.x, job.numbers, mean, var, ones, zeros, eps, rstd, job.y, job.in_place)
    return mean, rstd, weight, job.result


def widened(*vectors: Array | None) -> list[Array | None]:
    """Return float64 copies of vectors (C,); None for None."""
    return [None if vector is None else vector.astype(_F8) for vector in vectors]


def masked_forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None, mask: Mask
) -> tuple[Moments, Array, Array]:
    """(E1, E3) The moments of x (N, C, S) over the mask, rstd (C,) and y."""
    return masked.forward(_cut(x.shape, x.itemsize), x, weight, bias, eps, out, mask)


def masked_backward(
    dy: Array, x: Array, batch: Moments, rstd: Array, weight: Array | None, out: Array | None, where: Array
) -> tuple[Array, Array, Array]:
    """(E5, E6) dx, and dweight and dbias (C,), from dy and x (N, C, S) and a mask."""
    return masked.backward(_cut(x.shape, x.itemsize), dy, x, batch, rstd, weight, out=out, where=where)


def update_running_stats(
    running_mean: Array, running_var: Array, mean: Array, var: Array, momentum: float
) -> tuple[Array, Array]:
    """(E4) The running statistics (C,) after one more batch, in their dtypes."""
    dtype, wide = running_mean.dtype, mean.dtype == var.dtype == _F8
    if dtype.char not in "fd" or not dtype.isnative or running_var.dtype != dtype or not wide:
        return reference.update_running_stats(running_mean, running_var, mean, var, momentum)
    new_mean, new_var = np.empty(mean.size, dtype), np.empty(mean.size, dtype)
    old_mean, old_var, mean, var = map(contiguous, (running_mean, running_var, mean, var))
    compiled(dtype.char).running(old_mean, old_var, mean, var, momentum, new_mean, new_var)
    return new_mean, new_var

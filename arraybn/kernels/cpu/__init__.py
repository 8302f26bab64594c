"""The sweeps for NumPy arrays: compiled by Numba, spread over the cores, cut so that data is found in cache again.

A group of channels is taken through both sweeps before the next, so that main memory sees one read and one write of the
data in a forward. Where one channel is larger than the caches, all threads go through it together, and the second sweep
goes backwards, to find in cache what the first has read last.

Work is cut by data alone, and the sums of tiles are added in a fixed order, so no bit depends on the threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from ... import reference
from ..._arrays.namespaces import Array
from .. import threads
from .entries import compiled
from .tiles import BLOCK, LONG, PIECE
from .values import HALF as HALF

TILE = 2**21  # bytes of a tile at most, so that the second sweep finds it in cache
RUN = 2048  # bytes side by side that are worth going to
LEAST = 2**18  # bytes of a tile at least, so that starting it does not show
_F8 = np.dtype(np.float64)
CACHE = 24 * 2**20  # bytes that all threads together may hope to find in cache again
Run = Callable[[Callable[[int], None], Iterable[int]], None]  # calls a function with each item

# ---- How the work is cut ---------------------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """Groups of channels, each of tiles of rows; the same for every number of threads."""

    sample: int  # values of a sample, C·S
    plane: int  # values of a plane, S
    n: int
    channels: int
    group: int  # channels in a group
    rows: int
    height: int  # rows in a tile
    group_bytes: int


@functools.lru_cache(maxsize=1024)
def _cut(shape: tuple[int, int, int], itemsize: int) -> _Cut:
    """How (N, C, S) is cut: into tiles for some sixteen threads at least, unless starting them would take longer."""
    samples, channels, plane = shape
    n = samples * plane
    if n == 0:
        return _Cut(channels * plane, plane, 0, channels, channels, 0, 1, 0)
    channel, width = n * itemsize, min(plane, PIECE) * itemsize  # bytes of a channel, and of its run in a row
    tile = min(max(channels * channel // 16, LEAST), TILE)
    group = min(max(tile // channel, 1), channels)
    rows, least, whole = samples, BLOCK, group * channel <= 2 * tile
    if plane >= LONG:
        rows, least = samples * -(-plane // PIECE), 1
    elif group < min(
        run := -(-RUN // width), channels
    ):  # the values of so many channels in a row are read at full speed
        whole = run * channel <= 2 * TILE and 4 * run <= channels
        group = run if whole else min(8 * run, channels)
    height = rows if whole else min(max(tile // (group * width), least), rows)
    return _Cut(channels * plane, plane, n, channels, group, rows, height, group * channel)


def _one_after_another(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    for item in items:
        work(item)


def _contiguous(array: Array) -> Array:
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else array.copy()


class _Work:
    """The arrays of a sweep as lines, how the work on them is cut, and the sweeps over one group of channels.

    A sweep gets the first channel c0 of the group, how to `run` over its tiles, and vectors with a number for each of
    its channels.
    """

    __slots__ = ("code", "cut", "in_place", "result", "u", "x", "y")

    def __init__(self, x: Array, u: Array | None = None) -> None:
        self.cut = _cut(x.shape, x.itemsize)
        self.code = compiled(x.dtype.char)
        self.x = self._line(x)
        self.u = self.x if u is None else self._line(u)

    def _line(self, array: Array) -> Array:
        line = _contiguous(array).reshape(-1)
        return line.view(self.code.storage) if self.code.storage else line

    def writes(self, x: Array, out: Array | None) -> None:
        """Let the result be `out` where that can be written as a line, otherwise a new array like x."""
        self.in_place = 0
        if out is not None and out.flags.c_contiguous and out.flags.aligned:
            self.result, self.y = out, self._line(out)
            self.in_place = int(np.may_share_memory(self.y, self.x) or np.may_share_memory(self.y, self.u))
        else:
            self.result = np.empty(x.shape, x.dtype)
            self.y = self._line(self.result)

    def vectors(self, number: int) -> Array:
        """So many vectors (C,) to be set; zeros, if there is nothing to set them from."""
        return (np.empty if self.cut.n else np.zeros)((number, self.cut.channels))

    def over_groups(self, work: Callable[..., None], *vectors: Array) -> None:
        """Call `work` with each group's first channel, how to run over its tiles, and its part of the vectors (C,).

        Either each thread has groups of its own, or all threads are together on the tiles of one group.
        """
        cut = self.cut
        channels, group = cut.channels, cut.group
        if group == channels:
            if cut.n:
                work(0, threads.run, *vectors)
            return
        firsts, count = range(0, channels, group), threads.get_num_threads()
        apart = cut.height == cut.rows or (len(firsts) >= 4 * count and cut.group_bytes * count <= CACHE)
        inner, outer = (_one_after_another, threads.run) if apart else (threads.run, _one_after_another)
        outer(lambda c: work(c, inner, *(vector[c : c + group] for vector in vectors)), firsts)

    def moments(self, c0: int, run: Run, mean: Array, m2: Array) -> None:
        """(E1) Set mean and m2."""
        sample, plane, n, _, _, rows, height, _ = self.cut
        if height == rows:
            self.code.moments(self.x, sample, plane, n, c0, rows, mean, m2)
            return
        shift, spread = np.empty(mean.size), self.code.spread
        self.code.shift(self.x, sample, plane, n, c0, shift)
        for _ in range(2):  # the second time only where the shift was far from the mean
            self._add_tiles(run, lambda r0, r1, s, q: spread(self.x, sample, plane, c0, r0, r1, shift, s, q), mean, m2)
            if not self.code.finish(n, shift, mean, m2):
                return

    def dots(self, c0: int, run: Run, mean: Array, s: Array, q: Array) -> None:
        """(E5) Set s to Σu and q to Σu·(x−mean)."""
        sample, plane, code = *self.cut[:2], self.code.dots
        self._add_tiles(run, lambda r0, r1, s, q: code(self.u, self.x, sample, plane, c0, r0, r1, mean, s, q), s, q)

    def affine(self, c0: int, run: Run, mean: Array, a: Array, c: Array) -> None:
        """(E3, E7) Write a·(x−mean) + c."""
        sample, plane, code, y, in_place = *self.cut[:2], self.code.affine, self.y, self.in_place
        self._each_tile(run, lambda r0, r1: code(self.x, sample, plane, c0, r0, r1, mean, a, c, y, in_place))

    def affine2(self, c0: int, run: Run, mean: Array, a: Array, b: Array, c: Array) -> None:
        """(E6) Write a·u + b·(x−mean) + c."""
        sample, plane, code, y, in_place = *self.cut[:2], self.code.affine2, self.y, self.in_place
        self._each_tile(run, lambda r0, r1: code(self.u, self.x, sample, plane, c0, r0, r1, mean, a, b, c, y, in_place))

    def _add_tiles(self, run: Run, sweep: Callable[[int, int, Array, Array], None], s: Array, q: Array) -> None:
        """Set s and q to the sums of what `sweep` finds in each tile, added by halves."""
        rows, height = self.cut.rows, self.cut.height
        if height >= rows:
            sweep(0, rows, s, q)
            return
        tiles = -(-rows // height)
        parts = np.empty((2, tiles, s.size))
        run(lambda t: sweep(t * height, min((t + 1) * height, rows), parts[0, t], parts[1, t]), range(tiles))
        while tiles > 1:
            half = -(-tiles // 2)
            parts[:, : tiles - half] += parts[:, half:tiles]
            tiles = half
        s[:], q[:] = parts[:, 0]

    def _each_tile(self, run: Run, sweep: Callable[[int, int], None]) -> None:
        """Call `sweep` for each tile, backwards."""
        rows, height = self.cut.rows, self.cut.height
        if height >= rows:
            sweep(0, rows)
        else:
            run(lambda r0: sweep(r0, min(r0 + height, rows)), range((rows - 1) // height * height, -1, -height))


# ---- The sweeps ------------------------------------------------------------------------------------------------------


def moments(x: Array) -> tuple[Array, Array]:
    """(E1) mean and m2 (C,) of x (N, C, S), float64."""
    work = _Work(x)
    mean, m2 = work.vectors(2)
    work.over_groups(work.moments, mean, m2)
    return mean, m2


def dots(u: Array, x: Array, mean: Array) -> tuple[Array, Array]:
    """(E5) Σu and Σu·(x−mean), each (C,) and float64, of u and x (N, C, S)."""
    work = _Work(x, u)
    s, q = work.vectors(2)
    work.over_groups(work.dots, mean, s, q)
    return s, q


def affine(x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
    """(E3, E7) a·(x−mean) + c (N, C, S), in the dtype of x, written to `out` where that is contiguous."""
    work = _Work(x)
    work.writes(x, out)
    work.over_groups(work.affine, mean, a, c)
    return work.result


def affine2(u: Array, x: Array, mean: Array, a: Array, b: Array, c: Array, out: Array | None = None) -> Array:
    """(E6) a·u + b·(x−mean) + c (N, C, S), in the dtype of x, written to `out` where that is contiguous."""
    work = _Work(x, u)
    work.writes(x, out)
    work.over_groups(work.affine2, mean, a, b, c)
    return work.result


# ---- Two sweeps, a group of channels through both before the next ----------------------------------------------------


def forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """(E1, E3) mean, m2 and rstd (C,) of x (N, C, S), and y = weight·xhat + bias."""
    work = _Work(x)
    work.writes(x, out)
    cut, code = work.cut, work.code
    mean, m2, rstd = work.vectors(3)
    weight = np.ones(cut.channels) if weight is None else weight
    bias = np.zeros(cut.channels) if bias is None else bias

    def group(c0: int, run: Run, weight: Array, bias: Array, mean: Array, m2: Array, rstd: Array) -> None:
        if cut.height == cut.rows:
            size = cut.sample, cut.plane, cut.n
            code.forward(work.x, *size, c0, cut.rows, weight, bias, eps, mean, m2, rstd, work.y, work.in_place)
            return
        work.moments(c0, run, mean, m2)
        rstd[:] = reference.rstd(m2 / cut.n, eps)
        work.affine(c0, run, mean, *reference.normalize(rstd, weight, bias))

    work.over_groups(group, weight, bias, mean, m2, rstd)
    return mean, m2, rstd, work.result


def backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """(E5, E6) dx, and dweight and dbias (C,), from dy and x (N, C, S)."""
    work = _Work(x, dy)
    work.writes(x, out)
    cut, code = work.cut, work.code
    dweight, dbias = work.vectors(2)
    weight = np.ones(cut.channels) if weight is None else weight

    def group(c0: int, run: Run, mean: Array, rstd: Array, weight: Array, dweight: Array, dbias: Array) -> None:
        if cut.height == cut.rows:
            size, given = (cut.sample, cut.plane, cut.n), (mean, rstd, weight)
            code.backward(work.u, work.x, *size, c0, cut.rows, *given, dweight, dbias, work.y, work.in_place)
            return
        work.dots(c0, run, mean, dbias, dweight)
        dweight[:], _ = reference.parameter_gradients(dbias, dweight, rstd)
        work.affine2(c0, run, mean, *reference.input_gradient(dweight, dbias, cut.n, rstd, weight))

    work.over_groups(group, mean, rstd, weight, dweight, dbias)
    return work.result, dweight, dbias


def update_running_stats(
    running_mean: Array, running_var: Array, mean: Array, var: Array, momentum: float
) -> tuple[Array, Array]:
    """(E4) The running statistics (C,) after one more batch, in their dtypes."""
    dtype = running_mean.dtype
    if dtype.char not in "fd" or not dtype.isnative or running_var.dtype != dtype or {mean.dtype, var.dtype} != {_F8}:
        update = reference.update_running
        return update(running_mean, mean, momentum), update(running_var, var, momentum)
    new_mean, new_var = np.empty(mean.size, dtype), np.empty(mean.size, dtype)
    old_mean, old_var, mean, var = map(_contiguous, (running_mean, running_var, mean, var))
    compiled(dtype.char).running(old_mean, old_var, mean, var, momentum, new_mean, new_var)
    return new_mean, new_var

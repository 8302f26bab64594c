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

from .._arrays import Array
from . import _cpu_loops as loops
from . import _threads

TILE = 2**20  # bytes of a tile, so that the second sweep finds it in the second-level cache
CACHE = 24 * 2**20  # bytes that all threads together may hope to find in cache again
Run = Callable[[Callable[[int], None], Iterable[int]], None]  # calls a function with each item
Coefficients = Callable[..., tuple[Array, ...]]

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
    channel, width = n * itemsize, min(plane, loops.PIECE) * itemsize  # bytes of a channel, and of its run in a row
    tile = min(max(channels * channel // 16, TILE // 4), TILE)
    group = min(max(tile // channel, 1), channels)
    if plane >= loops.LONG:
        rows, least = samples * -(-plane // loops.PIECE), 1
    else:
        rows, least = samples, loops.BLOCK
        if group < channels and group * width < 2048:  # runs too short to be read at full speed
            group = min(max(16384 // width, 1), channels)
    height = rows if group * channel <= 2 * tile else max(tile // (group * width), least)
    return _Cut(channels * plane, plane, n, channels, group, rows, height, group * channel)


def _one_after_another(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    for item in items:
        work(item)


class _Work:
    """The arrays of a sweep as lines, how the work on them is cut, and the sweeps over one group of channels."""

    def __init__(self, x: Array, u: Array | None = None, out: Array | None = None, *, writes: bool = False) -> None:
        self.cut = _cut(x.shape, x.itemsize)
        self.code = loops.compiled(x.dtype.char)
        self.x = self._line(x)
        self.u = self.x if u is None else self._line(u)
        if writes:
            fits = out is not None and out.flags.c_contiguous and out.flags.aligned
            self.result = out if fits else np.empty(x.shape, x.dtype)
            self.y = self._line(self.result)

    def _line(self, array: Array) -> Array:
        flags = array.flags
        line = (array if flags.c_contiguous and flags.aligned else array.copy()).reshape(-1)
        return line.view(self.code.storage) if self.code.storage else line

    def sums(self) -> Array:
        """Two numbers per channel (2, C), to be set."""
        return np.zeros((2, self.cut.channels))

    def over_groups(self, work: Callable[[slice, Run], None]) -> None:
        """Call `work` with each group of channels, and with how to run over the tiles of the group.

        Either each thread has groups of its own, or all threads are together on the tiles of one group.
        """
        cut = self.cut
        channels, group = cut.channels, cut.group
        if cut.n == 0:
            return
        if group == channels:
            work(slice(0, channels), _threads.run)
            return
        firsts, threads = range(0, channels, group), _threads.get_num_threads()
        whole = cut.height == cut.rows
        if whole or (len(firsts) >= 4 * threads and cut.group_bytes * threads <= CACHE):
            _threads.run(lambda c: work(slice(c, min(c + group, channels)), _one_after_another), firsts)
        else:
            _one_after_another(lambda c: work(slice(c, min(c + group, channels)), _threads.run), firsts)

    def moments(self, channels: slice, run: Run, mean: Array, m2: Array) -> None:
        """(E1) Set the mean and m2 of these channels."""
        sample, plane, n, _, _, rows, height, _ = self.cut
        c0, mean, m2 = channels.start, mean[channels], m2[channels]
        if height == rows:
            self.code.moments(self.x, sample, plane, n, c0, rows, mean, m2)
            return
        shift = np.empty(mean.size)
        self.code.shift(self.x, sample, plane, n, c0, shift)
        spread = self.code.spread
        for _ in range(2):  # the second time only where the shift was far from the mean
            self._add_tiles(run, lambda r0, r1, s, q: spread(self.x, sample, plane, c0, r0, r1, shift, s, q), mean, m2)
            if not self.code.finish(n, shift, mean, m2):
                return
            shift[:] = mean

    def dots(self, channels: slice, run: Run, mean: Array, s: Array, q: Array) -> None:
        """(E5) Set Σu and Σu·(x−mean) of these channels."""
        sample, plane, c0, code, mean = *self.cut[:2], channels.start, self.code.dots, mean[channels]
        self._add_tiles(
            run,
            lambda r0, r1, s, q: code(self.u, self.x, sample, plane, c0, r0, r1, mean, s, q),
            s[channels],
            q[channels],
        )

    def affine(self, channels: slice, run: Run, mean: Array, a: Array, c: Array) -> None:
        """(E3, E7) Write a·(x−mean) + c of these channels."""
        sample, plane, c0, code, mean = *self.cut[:2], channels.start, self.code.affine, mean[channels]
        self._each_tile(run, lambda r0, r1: code(self.x, sample, plane, c0, r0, r1, mean, a, c, self.y))

    def affine2(self, channels: slice, run: Run, mean: Array, a: Array, b: Array, c: Array) -> None:
        """(E6) Write a·u + b·(x−mean) + c of these channels."""
        sample, plane, c0, code, mean = *self.cut[:2], channels.start, self.code.affine2, mean[channels]
        self._each_tile(run, lambda r0, r1: code(self.u, self.x, sample, plane, c0, r0, r1, mean, a, b, c, self.y))

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
    mean, m2 = work.sums()
    work.over_groups(lambda channels, run: work.moments(channels, run, mean, m2))
    return mean, m2


def dots(u: Array, x: Array, mean: Array) -> tuple[Array, Array]:
    """(E5) Σu and Σu·(x−mean), each (C,) and float64, of u and x (N, C, S)."""
    work = _Work(x, u)
    s, q = work.sums()
    work.over_groups(lambda channels, run: work.dots(channels, run, mean, s, q))
    return s, q


def affine(x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
    """(E3, E7) a·(x−mean) + c (N, C, S), in the dtype of x, written to `out` where that is contiguous."""
    work = _Work(x, out=out, writes=True)
    work.over_groups(lambda channels, run: work.affine(channels, run, mean, a[channels], c[channels]))
    return work.result


def affine2(u: Array, x: Array, mean: Array, a: Array, b: Array, c: Array, out: Array | None = None) -> Array:
    """(E6) a·u + b·(x−mean) + c (N, C, S), in the dtype of x, written to `out` where that is contiguous."""
    work = _Work(x, u, out, writes=True)
    work.over_groups(lambda channels, run: work.affine2(channels, run, mean, a[channels], b[channels], c[channels]))
    return work.result


def moments_affine(x: Array, coefficients: Coefficients, out: Array | None = None) -> tuple[Array, Array, Array]:
    """`moments`, then `affine` with the a and c that `coefficients(mean, m2, channels)` gives; mean, m2 and the result.

    `channels` is a slice; mean, m2, a and c are those of these channels alone.
    """
    work = _Work(x, out=out, writes=True)
    mean, m2 = work.sums()

    def both(channels: slice, run: Run) -> None:
        work.moments(channels, run, mean, m2)
        work.affine(channels, run, mean, *coefficients(mean[channels], m2[channels], channels))

    work.over_groups(both)
    return mean, m2, work.result


def dots_affine2(
    u: Array, x: Array, mean: Array, coefficients: Coefficients, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """`dots`, then `affine2` with the a, b and c that `coefficients(Σu, Σu·(x−mean), channels)` gives; sums, result."""
    work = _Work(x, u, out, writes=True)
    s, q = work.sums()

    def both(channels: slice, run: Run) -> None:
        work.dots(channels, run, mean, s, q)
        work.affine2(channels, run, mean, *coefficients(s[channels], q[channels], channels))

    work.over_groups(both)
    return s, q, work.result

"""The sweeps for NumPy arrays: compiled by Numba, spread over the cores, cut so that data is found in cache again.

A group of channels is taken through both sweeps before the next group, so that main memory sees one read and one write
of the data in a forward. Where one channel is larger than the caches, all threads go through that channel together, and
the second sweep goes backwards, to find in cache the values that the first sweep read last.

Work is cut by data alone, and the sums of tiles are added in a fixed order, so no bit depends on the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from ... import reference
from ..._arrays.namespaces import Array
from ...reference import Mask, Moments
from .. import results, threads
from . import masked
from .entries import compiled
from .half import HALF as HALF
from .tiles import BLOCK, LONG, PIECE

TILE = 2**21  # bytes of a tile at most, so that the second sweep finds the tile in cache
MIN_CONTIGUOUS_BYTES = 2048  # bytes side by side that memory delivers at full speed
MIN_TILE_BYTES = 2**18  # bytes of a tile at least, so that starting a task does not show
CACHE = 24 * 2**20  # bytes that all threads together may hope to find in cache again
_F8 = np.dtype(np.float64)
Run = Callable[[Callable[[int], None], Iterable[int]], None]  # calls a function with each item

# ---- How the work is cut ---------------------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """Groups of channels, each cut into tiles of rows; the same for every number of threads."""

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
    """Cut (N, C, S) into about sixteen tiles or more, or into fewer where the data is small."""
    samples, channels, plane = shape
    n = samples * plane
    if n == 0:
        return _Cut(channels * plane, plane, 0, channels, channels, 0, 1, 0)
    channel, width = n * itemsize, min(plane, PIECE) * itemsize  # bytes of a channel, and of its run in a row
    tile = min(max(channels * channel // 16, MIN_TILE_BYTES), TILE)
    group = min(max(tile // channel, 1), channels)
    rows, least, whole = samples, BLOCK, group * channel <= 2 * tile
    if plane >= LONG:
        rows, least = samples * -(-plane // PIECE), 1
    elif group < min(
        run := -(-MIN_CONTIGUOUS_BYTES // width), channels
    ):  # the values of `run` channels in a row are read at full speed
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


class _Group(NamedTuple):
    """A group of channels, in place of x in a sweep; `run` calls a function for each tile of the group."""

    first: int
    shape: tuple[int, int, int]  # n values of each channel: (n, channels, 1)
    run: Run


@functools.lru_cache(maxsize=1024)  # a small call would spend a fiftieth of its time on making one
def _all_channels(n: int, channels: int) -> _Group:
    return _Group(0, (n, channels, 1), threads.run)


class TiledSweeps:
    """The arrays of a call as lines, how the work on them is cut, and the sweeps over one group of channels.

    The sweeps have the arguments of ``reference.py``, with a `_Group` in place of u and x.
    """

    __slots__ = ("code", "cut", "in_place", "result", "u", "v", "x", "y")

    def __init__(self, x: Array, u: Array | None = None, v: Array | None = None) -> None:
        self.cut = _cut(x.shape, x.itemsize)
        self.code = compiled(x.dtype.char)
        self.x = self._line(x)
        self.u = self.x if u is None else self._line(u)
        self.v = self.u if v is None else self._line(v)

    def _line(self, array: Array) -> Array:
        line = _contiguous(array).reshape(-1)
        return line.view(self.code.storage) if self.code.storage else line

    def write_to(self, x: Array, out: Array | None) -> None:
        """Let the result be `out` where `out` can be written as a line, otherwise a new array like x."""
        self.in_place = 0
        if out is not None and out.flags.c_contiguous and out.flags.aligned:
            self.result, self.y = out, self._line(out)
            lines = (self.x, self.u) if self.v is self.u else (self.x, self.u, self.v)
            self.in_place = int(any(np.may_share_memory(self.y, line) for line in lines))
        else:
            self.result = results.empty(x.shape, x.dtype)
            self.y = self._line(self.result)

    def over_groups(self, work: Callable[..., Any], *vectors: Array) -> Any:
        """Call `work` with each group and its part of the vectors (C,); return the result where there is one group.

        Either each thread has groups of its own, or all threads are together on the tiles of one group.
        """
        cut = self.cut
        channels, group = cut.channels, cut.group
        if group == channels:
            return work(_all_channels(cut.n, channels), *vectors) if cut.n else None
        firsts, count = range(0, channels, group), threads.get_num_threads()
        apart = cut.height == cut.rows or (len(firsts) >= 4 * count and cut.group_bytes * count <= CACHE)
        inner, outer = (_one_after_another, threads.run) if apart else (threads.run, _one_after_another)

        def one(c: int) -> None:
            size = min(group, channels - c)
            work(_Group(c, (cut.n, size, 1), inner), *(vector[c : c + size] for vector in vectors))

        return outer(one, firsts)

    def gather(self, number: int, work: Callable[..., Any], *vectors: Array) -> Any:
        """Return the `number` vectors (C,) that `work` finds for each group, as in `over_groups`; zeros for no data."""
        cut = self.cut
        if cut.n and cut.group == cut.channels:
            return work(_all_channels(cut.n, cut.channels), *vectors)
        results = (np.empty if cut.n else np.zeros)((number, cut.channels))

        def one(group: _Group, *parts: Array) -> None:
            results[:, group.first : group.first + group.shape[1]] = work(group, *parts)

        self.over_groups(one, *vectors)
        return results

    def moments(self, x: _Group, where: None = None) -> tuple[Array, Array]:
        """(E1) mean and m2."""
        sample, plane, n, _, _, rows, height, _ = self.cut
        mean, m2 = np.empty((2, x.shape[1]))
        if height == rows:
            self.code.moments(self.x, sample, plane, n, x.first, rows, mean, m2)
            return mean, m2
        shift, spread = np.empty(mean.size), self.code.spread
        self.code.shift(self.x, sample, plane, n, x.first, shift)
        for _ in range(2):  # the second time only where the shift was far from the mean
            mean, m2 = self._add_tiles(
                x, lambda r0, r1, s, q: spread(self.x, sample, plane, x.first, r0, r1, shift, s, q)
            )
            if not self.code.finish(n, shift, mean, m2):
                break
        return mean, m2

    def dots(
        self, u: _Group, x: _Group, mean: Array, where: None = None, skip_zeros: bool = False
    ) -> tuple[Array, Array]:
        """(E5) Σu and Σu·(x−mean)."""
        sample, plane, code = *self.cut[:2], self.code.dots
        return self._add_tiles(x, lambda r0, r1, s, q: code(self.u, self.x, sample, plane, x.first, r0, r1, mean, s, q))

    def affine(self, x: _Group, mean: Array, a: Array, c: Array, out: None = None) -> Array:
        """(E3, E7) Write a·(x−mean) + c."""
        sample, plane, code, y, in_place = *self.cut[:2], self.code.affine, self.y, self.in_place
        self._each_tile(x, lambda r0, r1: code(self.x, sample, plane, x.first, r0, r1, mean, a, c, y, in_place))
        return self.result

    def affine2(
        self,
        u: _Group,
        x: _Group,
        mean: Array,
        a: Array,
        b: Array,
        c: Array,
        out: None = None,
        where: None = None,
    ) -> Array:
        """(E6) Write a·u + b·(x−mean) + c."""
        sample, plane, code, y, in_place = *self.cut[:2], self.code.affine2, self.y, self.in_place
        self._each_tile(
            x, lambda r0, r1: code(self.u, self.x, sample, plane, x.first, r0, r1, mean, a, b, c, y, in_place)
        )
        return self.result

    def affine3(
        self,
        v: _Group,
        u: _Group,
        x: _Group,
        mean: Array,
        a: Array,
        b: Array,
        c: Array,
        d: Array,
        out: None = None,
        where: None = None,
    ) -> Array:
        """(E9) Write a·v + b·u + c·(x−mean) + d."""
        sample, plane, code, data = *self.cut[:2], self.code.affine3, (self.v, self.u, self.x)
        given = mean, a, b, c, d, self.y, self.in_place
        self._each_tile(x, lambda r0, r1: code(*data, sample, plane, x.first, r0, r1, *given))
        return self.result

    def _add_tiles(self, x: _Group, sweep: Callable[[int, int, Array, Array], None]) -> tuple[Array, Array]:
        """Return the two sums of what `sweep` finds in each tile, added by halves."""
        rows, height = self.cut.rows, self.cut.height
        if height >= rows:
            s, q = np.empty((2, x.shape[1]))
            sweep(0, rows, s, q)
            return s, q
        tiles = -(-rows // height)
        parts = np.empty((2, tiles, x.shape[1]))
        x.run(lambda t: sweep(t * height, min((t + 1) * height, rows), parts[0, t], parts[1, t]), range(tiles))
        while tiles > 1:
            half = -(-tiles // 2)
            parts[:, : tiles - half] += parts[:, half:tiles]
            tiles = half
        return parts[0, 0], parts[1, 0]

    def _each_tile(self, x: _Group, sweep: Callable[[int, int], None]) -> None:
        """Call `sweep` for each tile, backwards."""
        rows, height = self.cut.rows, self.cut.height
        if height >= rows:
            sweep(0, rows)
        else:
            x.run(lambda r0: sweep(r0, min(r0 + height, rows)), range((rows - 1) // height * height, -1, -height))


# ---- The sweeps ------------------------------------------------------------------------------------------------------


MASKS = True


def moments(x: Array, where: Array | None = None) -> tuple[Array, Array]:
    """(E1) mean and m2 (C,) of x (N, C, S), float64."""
    if where is not None:
        return masked.moments(_cut(x.shape, x.itemsize), x, where)
    work = TiledSweeps(x)
    mean, m2 = work.gather(2, work.moments)
    return mean, m2


def dots(u: Array, x: Array, mean: Array, where: Array | None = None, skip_zeros: bool = False) -> tuple[Array, Array]:
    """(E5, E8, E9) Σu and Σu·(x−mean), each (C,) and float64, of u and x (N, C, S)."""
    if where is not None or skip_zeros:
        return masked.dots(_cut(x.shape, x.itemsize), u, x, mean, where, skip_zeros)
    work = TiledSweeps(x, u)
    s, q = work.gather(2, lambda group, mean: work.dots(group, group, mean), mean)
    return s, q


def affine(x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
    """(E3, E7) a·(x−mean) + c (N, C, S), in the dtype of x, written to `out` where `out` is contiguous."""
    work = TiledSweeps(x)
    work.write_to(x, out)
    work.over_groups(work.affine, mean, a, c)
    return work.result


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
    work = TiledSweeps(x, u)
    work.write_to(x, out)
    work.over_groups(lambda group, *given: work.affine2(group, group, *given), mean, a, b, c)
    return work.result


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
    work = TiledSweeps(x, u, v)
    work.write_to(x, out)
    work.over_groups(lambda group, *given: work.affine3(group, group, group, *given), mean, a, b, c, d)
    return work.result


# ---- Two sweeps, a group of channels through both before the next ----------------------------------------------------


def forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """(E1, E3) mean, m2 and rstd (C,) of x (N, C, S), and y = weight·xhat + bias."""
    work = TiledSweeps(x)
    work.write_to(x, out)
    cut, code = work.cut, work.code
    weight = np.ones(cut.channels) if weight is None else weight
    bias = np.zeros(cut.channels) if bias is None else bias

    def statistics(group: _Group, weight: Array, bias: Array) -> tuple[Array, Array, Array]:
        if cut.height < cut.rows:
            batch, rstd, _ = reference.forward(work, group, weight, bias, eps)
            return batch.mean, batch.m2, rstd
        mean, m2, rstd = np.empty((3, weight.size))
        size = cut.sample, cut.plane, cut.n
        code.forward(work.x, *size, group.first, cut.rows, weight, bias, eps, mean, m2, rstd, work.y, work.in_place)
        return mean, m2, rstd

    mean, m2, rstd = work.gather(3, statistics, weight, bias)
    return mean, m2, rstd, work.result


def backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """(E5, E6) dx, and dweight and dbias (C,), from dy and x (N, C, S)."""
    work = TiledSweeps(x, dy)
    work.write_to(x, out)
    cut, code = work.cut, work.code
    weight = np.ones(cut.channels) if weight is None else weight

    def gradients(group: _Group, mean: Array, rstd: Array, weight: Array) -> tuple[Array, Array]:
        if cut.height < cut.rows:
            batch = Moments(cut.n, mean, rstd)  # m2 is not looked at
            return reference.backward(work, group, group, batch, rstd, weight)[1:]
        dweight, dbias = np.empty((2, weight.size))
        size, given = (cut.sample, cut.plane, cut.n), (mean, rstd, weight)
        code.backward(work.u, work.x, *size, group.first, cut.rows, *given, dweight, dbias, work.y, work.in_place)
        return dweight, dbias

    dweight, dbias = work.gather(2, gradients, mean, rstd, weight)
    return work.result, dweight, dbias


def evaluate(
    x: Array, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array | None, Array]:
    """(E3, E7) Copies of mean, rstd and weight (C,), and y = weight·xhat + bias, with fixed statistics."""
    mean, var, weight, bias = widened(mean, var, weight, bias)
    rstd, a, c = np.empty((3, mean.size))
    ones = np.ones(mean.size) if weight is None else weight
    zeros = np.zeros(mean.size) if bias is None else bias
    compiled(x.dtype.char).fixed(var, ones, zeros, eps, rstd, a, c)
    return mean, rstd, weight, affine(x, mean, a, c, out)


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
    old_mean, old_var, mean, var = map(_contiguous, (running_mean, running_var, mean, var))
    compiled(dtype.char).running(old_mean, old_var, mean, var, momentum, new_mean, new_var)
    return new_mean, new_var

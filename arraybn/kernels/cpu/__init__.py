"""The sweeps for NumPy arrays: compiled by Numba, spread over the cores, cut so that data is found in cache again.

A group of channels is taken through both sweeps before the next group, so that main memory sees one read and one write
of the data in a forward. Where one channel is larger than the caches, all threads go through that channel together, and
the second sweep goes backwards, to find in cache the values that the first sweep read last.

Work is cut by data alone, and the sums of tiles are added in a fixed order, so no bit depends on the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import config

from ... import reference
from ..._arrays.namespaces import Array
from ...reference import Mask, Moments
from .. import results, threads
from . import masked
from .entries import NOT_GIVEN, compiled, serve
from .half import HALF as HALF
from .lines import STORED_AS, contiguous, line_of, place_of_result
from .tiles import BLOCK, LONG, PIECE, Cut

TILE = 2**21  # bytes of a tile at most, so that the second sweep finds the tile in cache
MIN_CONTIGUOUS_BYTES = 2048  # bytes side by side that memory delivers at full speed
CACHED = 2**24  # bytes of x, up to which the last-level cache holds x and y, and rows are not cut
MIN_TILE_BYTES = 2**18  # bytes of a tile at least, so that starting a task does not show
MIN_HALF_BYTES = 2**16  # bytes of a half at least, where data of less than two tiles is cut into halves
_F8 = np.dtype(np.float64)

# ---- How the work is cut ---------------------------------------------------------------------------------------------


def _cut(shape: tuple[int, int, int], itemsize: int) -> Cut:
    """Cut (N, C, S) into about sixteen tiles or more, or into fewer where the data is small, down to halves."""
    samples, channels, plane = shape
    n = samples * plane
    if n == 0:
        return Cut(channels * plane, plane, 0, channels, channels, 1, 0, 1, 1)
    channel, width = n * itemsize, min(plane, PIECE) * itemsize  # bytes of a channel, and of its run in a row
    half = channels * channel // (1 if channels * channel < 2 * MIN_HALF_BYTES else 2)
    tile = min(max(channels * channel // 16, min(MIN_TILE_BYTES, half)), TILE)
    group = min(max(-(-tile // channel) if tile == half else tile // channel, 1), channels)
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


class _Kind:
    """The cut of the work on arrays of one shape, and all else that can be known before the arrays."""

    __slots__ = ("cut", "nbytes", "numbers", "parts")

    def __init__(self, shape: tuple[int, int, int], itemsize: int) -> None:
        self.cut = cut = _cut(shape, itemsize)
        self.numbers = np.array(cut)
        self.numbers.flags.writeable = False
        self.nbytes = cut.n * cut.channels * itemsize
        self.parts = cut.groups * cut.tiles

    def words(self) -> Array:
        """Return the words that the caller shares with helpers, who are woken if that pays."""
        if self.parts == 1 or config.DISABLE_JIT:
            return threads.ALONE
        return threads.helpers(serve(), self.nbytes, self.parts)


_kind = functools.lru_cache(maxsize=1024)(_Kind)


class _Job:
    """The arrays of a call as lines, how the work on them is cut, and the helpers."""

    __slots__ = ("code", "cut", "in_place", "numbers", "result", "u", "v", "words", "x", "y")
    where: tuple[Array, ...] = ()  # the mask as a line, if there is one

    def __init__(self, x: Array, u: Array | None = None, v: Array | None = None, entries: Any = compiled) -> None:
        kind = _kind(x.shape, x.itemsize)
        self.cut, self.numbers, self.words = kind.cut, kind.numbers, kind.words()
        self.code = entries(x.dtype.char)
        self.x = line_of(x)
        self.u = self.x if u is None else line_of(u)
        self.v = self.u if v is None else line_of(v)

    def write_to(self, x: Array, out: Array | None) -> None:
        """Let the result be `out` where `out` can be written as a line, otherwise a new array like x."""
        inputs = (self.x,) if self.u is self.x else (self.x, self.u) if self.v is self.u else (self.x, self.u, self.v)
        self.result, self.y, self.in_place = place_of_result(x, out, *inputs)

    def map(self, sweep: str, x: Array, out: Array | None, lines: tuple[Array, ...], *vectors: Array) -> Array:
        """Return the result of that sweep over the lines, with these coefficients (C,)."""
        self.write_to(x, out)
        if self.cut.n:
            getattr(self.code, sweep)(self.words, *lines, *self.where, self.numbers, *vectors, self.y, self.in_place)
        return self.result

    def vectors(self, number: int) -> Array:
        """Return vectors (C,) to be set, 0 for no data."""
        return (np.empty if self.cut.n else np.zeros)((number, self.cut.channels))


class _MaskedJob(_Job):
    """The arrays of a call with a mask, over n positions."""

    __slots__ = ("where",)

    def __init__(
        self, where: Array, x: Array, u: Array | None = None, v: Array | None = None, n: int | None = None
    ) -> None:
        super().__init__(x, u, v, masked.compiled)
        self.where, self.numbers = (line_of(where).view(np.uint8),), self.numbers.copy()
        self.numbers[Cut._fields.index("n")] = max(np.count_nonzero(where) if n is None else n, 1)


def _given(dtype: str, *vectors: Array | None) -> list[Array]:
    """Return the vectors (C,), which have that dtype, with an empty one for None."""
    return [NOT_GIVEN[dtype] if vector is None else vector for vector in vectors]


# ---- The sweeps ------------------------------------------------------------------------------------------------------

MASKS = True


def moments(x: Array, where: Array | None = None) -> tuple[Array, Array]:
    """(E1) mean and m2 (C,) of x (N, C, S), float64."""
    job = _Job(x) if where is None else _MaskedJob(where, x)
    mean, m2 = job.vectors(2)
    if job.cut.n:
        job.code.moments(job.words, job.x, *job.where, job.numbers, mean, m2)
    return mean, m2


def dots(u: Array, x: Array, mean: Array, where: Array | None = None, skip_zeros: bool = False) -> tuple[Array, Array]:
    """(E5, E8, E9) Σu and Σu·(x−mean), each (C,) and float64, of u and x (N, C, S)."""
    job = _Job(x, u) if where is None else _MaskedJob(where, x, u)
    s, q = job.vectors(2)
    if job.cut.n and skip_zeros:
        masked.compiled(x.dtype.char).nonzero_dots(job.words, job.u, job.x, job.numbers, mean, s, q)
    elif job.cut.n:
        job.code.dots(job.words, job.u, job.x, *job.where, job.numbers, mean, s, q)
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
    job = _Job(x, u) if where is None else _MaskedJob(where, x, u)
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
    job = _Job(x, u, v) if where is None else _MaskedJob(where, x, u, v)
    return job.map("affine3", x, out, (job.v, job.u, job.x), mean, a, b, c, d)


# ---- Two sweeps, a group of channels through both before the next ----------------------------------------------------


def forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """(E1, E3) mean, m2 and rstd (C,) of x (N, C, S), and y = weight·xhat + bias."""
    return _forward(_Job(x), x, weight, bias, eps, out)


def masked_forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None, mask: Mask
) -> tuple[Moments, Array, Array]:
    """(E1, E3) The moments of x (N, C, S) over the mask, rstd (C,) and y."""
    mean, m2, rstd, y = _forward(_MaskedJob(mask.where, x, n=mask.n), x, weight, bias, eps, out)
    return Moments(mask.n, mean, m2), rstd, y


def _forward(
    job: _Job, x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None
) -> tuple[Array, Array, Array, Array]:
    job.write_to(x, out)
    rows = job.vectors(4)
    if job.cut.n:
        given = *_given("d", weight, bias), eps
        job.code.forward_d(job.words, job.x, *job.where, job.numbers, *given, rows, job.y, job.in_place)
    return rows[0], rows[1], rows[2], job.result


def backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """(E5, E6) dx, and dweight and dbias (C,), from dy and x (N, C, S)."""
    return _backward(_Job(x, dy), x, mean, rstd, weight, out)


def masked_backward(
    dy: Array, x: Array, batch: Moments, rstd: Array, weight: Array | None, out: Array | None, where: Array
) -> tuple[Array, Array, Array]:
    """(E5, E6) dx, and dweight and dbias (C,), from dy and x (N, C, S) and a mask."""
    return _backward(_MaskedJob(where, x, dy, n=batch.n), x, batch.mean, rstd, weight, out)


def _backward(
    job: _Job, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None
) -> tuple[Array, Array, Array]:
    job.write_to(x, out)
    rows, gradients = job.vectors(4), job.vectors(2)
    rows[0], rows[2], rows[3] = mean, rstd, 1.0 if weight is None else weight
    if job.cut.n:
        job.code.backward(job.words, job.u, job.x, *job.where, job.numbers, rows, gradients, job.y, job.in_place)
    return job.result, gradients[0], gradients[1]


def evaluate(
    x: Array, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array | None, Array]:
    """(E3, E7) Copies of mean, rstd and weight (C,), and y = weight·xhat + bias, with fixed statistics."""
    job = _Job(x)
    job.write_to(x, out)
    mean, var, weight, bias = widened(mean, var, weight, bias)
    if not job.cut.n:
        return mean, reference.rstd(var, eps), weight, job.result
    rows = job.vectors(4)
    given = *_given("d", mean, var, weight, bias), eps
    job.code.evaluation_d(job.words, job.x, job.numbers, *given, rows, job.y, job.in_place)
    return mean, rows[2], weight, job.result


class Calls:
    """Forward, evaluation and backward of arrays that have passed all checks, with little Python.

    Arrays are contiguous, of the shape, dtype and dtype of vectors (float32 or float64) for which this object was made.
    `in_place` is 1 where `out` is an input, otherwise 0. The rows (4, C) are mean, m2 (var where statistics are fixed),
    rstd and weight, in float64.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: Any, vector: str) -> None:
        self._kind, self._stored = _kind(shape, dtype.itemsize), STORED_AS.get(dtype.char)
        self._rows, self._gradients, self._vector = (4, shape[1]), (2, shape[1]), vector
        code = compiled(dtype.char)
        self._forward, self._evaluation = getattr(code, f"forward_{vector}"), getattr(code, f"evaluation_{vector}")
        self._code = code

    def _line(self, array: Array) -> Array:
        line = array.reshape(-1)
        return line if self._stored is None else line.view(self._stored)

    def forward(
        self, x: Array, vectors: Sequence[Array | None], eps: float, out: Array | None, in_place: int
    ) -> tuple[Array, Array]:
        """(E1, E3, E7) Return y and the rows, from mean, var, weight and bias, of which each may be None."""
        rows, kind, given = np.empty(self._rows), self._kind, _given(self._vector, *vectors)
        y = results.empty(x.shape, x.dtype) if out is None else out
        entry, given = (self._forward, given[2:]) if vectors[0] is None else (self._evaluation, given)
        line, words = self._line(x), kind.words()
        entry(words, line, kind.numbers, *given, eps, rows, self._line(y), in_place)
        return y, rows

    def backward(self, dy: Array, x: Array, rows: Array, out: Array | None, in_place: int) -> tuple[Array, Array]:
        """(E5, E6) Return dx, and dweight and dbias (2, C)."""
        gradients, kind = np.empty(self._gradients), self._kind
        dx = results.empty(x.shape, x.dtype) if out is None else out
        u, line, words = self._line(dy), self._line(x), kind.words()
        self._code.backward(words, u, line, kind.numbers, rows, gradients, self._line(dx), in_place)
        return dx, gradients


def calls(x: Array, ncs: tuple[int, int, int], vectors: Sequence[Array | None]) -> Calls | None:
    """Return the short way of calls with x and vectors (C,) of this shape, dtype and contiguity; None without one."""
    given = [x, *(vector for vector in vectors if vector is not None)]
    dtypes = {vector.dtype for vector in given[1:]}
    if x.size == 0 or len(dtypes) > 1 or not all(array.flags.c_contiguous and array.flags.aligned for array in given):
        return None
    char = dtypes.pop().char if dtypes else "d"
    return Calls(ncs, x.dtype, char) if char in "fd" else None


def widened(*vectors: Array | None) -> list[Array | None]:
    """Return float64 copies of vectors (C,); None for None."""
    return [None if vector is None else vector.astype(_F8) for vector in vectors]


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

"""The compiled half of ``cpu.py``: Numba's loops over tiles of the data.

Data is seen as (N, C, S), contiguous, and addressed as one long line: the value of sample n, channel c, place s is at
n·sample + c·plane + s, where `plane` is S and `sample` is C·S. All arithmetic is in float64, whatever the data's dtype.
The file has three parts: what is done to a run of values, how runs are strung together to a tile, what Python calls.

Runs are of two kinds. Where a plane (the S values of a sample and channel) is long, a run is a piece of a plane, and
its coefficients are numbers. Where it is short, down to the one value of channels-last, a run goes over the planes of
many channels, and its coefficients are arrays as long as the run.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

from ._cpu_values import narrow, wide

LONG = 32  # planes of this many values are runs of their own
WIDE = 1024  # values in a run over short planes: its coefficients stay in the first-level cache
PIECE = 8192  # values in a run along a long plane
BLOCK = 64  # runs whose sums are added up before they are added to those of the tile, which keeps rounding small

# Reassociation lets sums be vectorized. NaN and inf keep their meaning; x − mean is kept out of it by `_minus`.
_SUM = {"fastmath": {"reassoc", "contract", "nsz"}}
_MAP = {"fastmath": {"contract"}}


@njit
def _minus(x: Any, mean: Any) -> Any:
    """x − mean, as written: were it taken apart, Σ(x−mean) could become Σx − n·mean and lose every digit."""
    return x - mean


# ---- Runs: what each sweep does to values that lie side by side ------------------------------------------------------


@njit(**_SUM)
def _moments_along(u: Any, x: Any, shift: Any) -> Any:
    s = q = 0.0
    for i in range(x.size):
        d = _minus(wide(x[i]), shift)
        s += d
        q += d * d
    return s, q


@njit(**_MAP)
def _moments_across(u: Any, x: Any, shift: Any, s: Any, q: Any) -> None:
    for i in range(x.size):
        d = _minus(wide(x[i]), shift[i])
        s[i] += d
        q[i] += d * d


@njit(**_SUM)
def _dots_along(u: Any, x: Any, mean: Any) -> Any:
    s = q = 0.0
    for i in range(x.size):
        v = wide(u[i])
        s += v
        q += v * _minus(wide(x[i]), mean)
    return s, q


@njit(**_MAP)
def _dots_across(u: Any, x: Any, mean: Any, s: Any, q: Any) -> None:
    for i in range(x.size):
        v = wide(u[i])
        s[i] += v
        q[i] += v * _minus(wide(x[i]), mean[i])


@njit(**_MAP)
def _affine_along(u: Any, x: Any, mean: Any, a: Any, b: Any, c: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = narrow(a * (wide(x[i]) - mean) + c, out)


@njit(**_MAP)
def _affine_across(u: Any, x: Any, mean: Any, a: Any, b: Any, c: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = narrow(a[i] * (wide(x[i]) - mean[i]) + c[i], out)


@njit(**_MAP)
def _affine2_along(u: Any, x: Any, mean: Any, a: Any, b: Any, c: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = narrow(a * wide(u[i]) + (b * (wide(x[i]) - mean) + c), out)


@njit(**_MAP)
def _affine2_across(u: Any, x: Any, mean: Any, a: Any, b: Any, c: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = narrow(a[i] * wide(u[i]) + (b[i] * (wide(x[i]) - mean[i]) + c[i]), out)


# ---- Tiles: channels c0, c0 + 1, … (as many as there are coefficients) of rows r0 … r1 - 1 ---------------------------
# A row is a sample, or, of planes longer than PIECE, the k-th piece of a sample's planes: r = n·pieces + k.


@njit
def _pieces(plane: int) -> int:
    """How many rows a sample is cut into."""
    return (plane + PIECE - 1) // PIECE if plane >= LONG else 1


@njit
def _run(r: int, c: int, sample: int, plane: int) -> tuple[int, int]:
    """Where the run of row r and channel c begins and ends, where planes are long."""
    n, k = divmod(r, _pieces(plane))
    start = n * sample + c * plane + k * PIECE
    return start, start + min(PIECE, plane - k * PIECE)


@njit
def _together(channels: int, sample: int, plane: int) -> tuple[int, int]:
    """Of how many channels, and of how many times, a run over short planes takes the planes."""
    if channels * plane == sample and sample <= WIDE:  # whole times lie side by side
        return channels, WIDE // sample
    return min(channels, max(1, WIDE // plane)), 1


@njit
def _repeated(values: Any, plane: int, times: int) -> Any:
    """A channel's number for each value of a run over short planes."""
    line = np.empty(values.size * plane * times)
    for j in range(values.size):
        line[j * plane : (j + 1) * plane] = values[j]
    width = values.size * plane
    for k in range(1, times):
        line[k * width : (k + 1) * width] = line[:width]
    return line


@njit
def _add_up(line: Any, plane: int, sums: Any) -> None:
    """Add what each place of a run over short planes has gathered to the sum of its channel."""
    for k in range(line.size // (sums.size * plane)):
        for j in range(sums.size):
            start = (k * sums.size + j) * plane
            total = 0.0
            for i in range(start, start + plane):
                total += line[i]
            sums[j] += total


def _sums_along(run: Any) -> Any:
    """The loops of a reduction where planes are long; `run` returns the two sums of a run."""

    @njit
    def reduce(u: Any, x: Any, sample: int, plane: int, c0: int, r0: int, r1: int, mean: Any, s: Any, q: Any) -> None:
        s_block, q_block = np.empty(mean.size), np.empty(mean.size)
        s[:] = 0.0
        q[:] = 0.0
        for block in range(r0, r1, BLOCK):
            s_block[:] = 0.0
            q_block[:] = 0.0
            for r in range(block, min(block + BLOCK, r1)):
                for j in range(mean.size):
                    start, stop = _run(r, c0 + j, sample, plane)
                    s_run, q_run = run(u[start:stop], x[start:stop], mean[j])
                    s_block[j] += s_run
                    q_block[j] += q_run
            s += s_block
            q += q_block

    return reduce


def _sums_across(run: Any) -> Any:
    """The loops of a reduction where planes are short; `run` adds to two lines of sums."""

    @njit
    def reduce(u: Any, x: Any, sample: int, plane: int, c0: int, r0: int, r1: int, mean: Any, s: Any, q: Any) -> None:
        together, times = _together(mean.size, sample, plane)
        s[:] = 0.0
        q[:] = 0.0
        for j in range(0, mean.size, together):
            k = min(together, mean.size - j)
            line = _repeated(mean[j : j + k], plane, times)
            s_line, q_line = np.empty(line.size), np.empty(line.size)
            for block in range(r0, r1, BLOCK * times):
                s_line[:] = 0.0
                q_line[:] = 0.0
                end = min(block + BLOCK * times, r1)
                for r in range(block, end, times):
                    start = r * sample + (c0 + j) * plane
                    stop = start + min(times, end - r) * k * plane
                    run(u[start:stop], x[start:stop], line, s_line, q_line)
                _add_up(s_line, plane, s[j : j + k])
                _add_up(q_line, plane, q[j : j + k])

    return reduce


def _map_along(run: Any) -> Any:
    """The loops of a map where planes are long; `run` writes a run of `out`."""

    @njit
    def map_(
        u: Any, x: Any, sample: int, plane: int, c0: int, r0: int, r1: int, mean: Any, a: Any, b: Any, c: Any, out: Any
    ) -> None:
        for r in range(r0, r1):
            for j in range(mean.size):
                start, stop = _run(r, c0 + j, sample, plane)
                run(u[start:stop], x[start:stop], mean[j], a[j], b[j], c[j], out[start:stop])

    return map_


def _map_across(run: Any) -> Any:
    """The loops of a map where planes are short; `run` writes a run of `out`."""

    @njit
    def map_(
        u: Any, x: Any, sample: int, plane: int, c0: int, r0: int, r1: int, mean: Any, a: Any, b: Any, c: Any, out: Any
    ) -> None:
        together, times = _together(mean.size, sample, plane)
        for j in range(0, mean.size, together):
            k = min(together, mean.size - j)
            means, as_ = _repeated(mean[j : j + k], plane, times), _repeated(a[j : j + k], plane, times)
            bs, cs = _repeated(b[j : j + k], plane, times), _repeated(c[j : j + k], plane, times)
            for r in range(r0, r1, times):
                start = r * sample + (c0 + j) * plane
                stop = start + min(times, r1 - r) * k * plane
                run(u[start:stop], x[start:stop], means, as_, bs, cs, out[start:stop])

    return map_


_moments_of_planes, _moments_of_lines = _sums_along(_moments_along), _sums_across(_moments_across)
_dots_of_planes, _dots_of_lines = _sums_along(_dots_along), _sums_across(_dots_across)
_affine_of_planes, _affine_of_lines = _map_along(_affine_along), _map_across(_affine_across)
_affine2_of_planes, _affine2_of_lines = _map_along(_affine2_along), _map_across(_affine2_across)


# ---- Entries: what Python calls --------------------------------------------------------------------------------------


@njit
def _shift(x: Any, sample: int, plane: int, n: int, c0: int, shift: Any) -> None:
    """Set `shift` to a value near the mean of each channel: that of its first values, exactly if they are all equal."""
    first = min(n, 8)
    for j in range(shift.size):
        start = wide(x[(c0 + j) * plane])
        total = 0.0
        for i in range(1, first):
            total += _minus(wide(x[i // plane * sample + (c0 + j) * plane + i % plane]), start)
        near = start + total / first
        shift[j] = near if np.isfinite(near) else 0.0


@njit
def _spread(x: Any, sample: int, plane: int, c0: int, r0: int, r1: int, shift: Any, s: Any, q: Any) -> None:
    """(E1) Σd and Σd² with d = x − shift."""
    if plane >= LONG:
        _moments_of_planes(x, x, sample, plane, c0, r0, r1, shift, s, q)
    else:
        _moments_of_lines(x, x, sample, plane, c0, r0, r1, shift, s, q)


@njit
def _finish(n: int, shift: Any, s: Any, q: Any) -> bool:
    """Turn Σd and Σd² into mean and m2, in place; return whether some shift was so far off that digits were lost."""
    far = False
    for j in range(s.size):
        d = s[j] / n
        m2 = q[j] - s[j] * d
        far |= s[j] * d > 4 * m2
        s[j] = shift[j] + d
        q[j] = 0.0 if m2 < 0 else m2
    return far


@njit
def _moments(x: Any, sample: int, plane: int, n: int, c0: int, rows: int, mean: Any, m2: Any) -> None:
    """(E1) The moments of whole channels, where they are one tile."""
    shift = np.empty(mean.size)
    _shift(x, sample, plane, n, c0, shift)
    _spread(x, sample, plane, c0, 0, rows, shift, mean, m2)
    if _finish(n, shift, mean, m2):
        shift[:] = mean
        _spread(x, sample, plane, c0, 0, rows, shift, mean, m2)
        _finish(n, shift, mean, m2)


@njit
def _dots(u: Any, x: Any, sample: int, plane: int, c0: int, r0: int, r1: int, mean: Any, s: Any, q: Any) -> None:
    """(E5) Σu and Σu·(x−mean)."""
    if plane >= LONG:
        _dots_of_planes(u, x, sample, plane, c0, r0, r1, mean, s, q)
    else:
        _dots_of_lines(u, x, sample, plane, c0, r0, r1, mean, s, q)


@njit
def _affine(x: Any, sample: int, plane: int, c0: int, r0: int, r1: int, mean: Any, a: Any, c: Any, out: Any) -> None:
    """(E3, E7) a·(x−mean) + c."""
    if plane >= LONG:
        _affine_of_planes(x, x, sample, plane, c0, r0, r1, mean, a, a, c, out)
    else:
        _affine_of_lines(x, x, sample, plane, c0, r0, r1, mean, a, a, c, out)


@njit
def _affine2(
    u: Any, x: Any, sample: int, plane: int, c0: int, r0: int, r1: int, mean: Any, a: Any, b: Any, c: Any, out: Any
) -> None:
    """(E6) a·u + b·(x−mean) + c."""
    if plane >= LONG:
        _affine2_of_planes(u, x, sample, plane, c0, r0, r1, mean, a, b, c, out)
    else:
        _affine2_of_lines(u, x, sample, plane, c0, r0, r1, mean, a, b, c, out)


_READ = functools.partial(types.Array, ndim=1, layout="C", readonly=True)
_WRITE = functools.partial(types.Array, ndim=1, layout="C")
STORED = {"e": types.int16, "E": types.uint16, "f": types.float32, "d": types.float64}  # by the dtype's character


class Compiled:
    """The entries for one dtype, each compiled, or read from Numba's cache, when it is first asked for."""

    def __init__(self, stored: types.Type) -> None:
        self.storage = np.dtype(stored.name) if isinstance(stored, types.Integer) else None  # to be viewed as
        data, result = _READ(stored), _WRITE(stored)
        given, sums = _READ(types.float64), _WRITE(types.float64)
        tile = (types.intp,) * 5  # sample, plane, c0, r0, r1
        self._signatures = {
            "shift": (_shift, (data, *tile[:4], sums)),
            "spread": (_spread, (data, *tile, given, sums, sums)),
            "finish": (_finish, (types.intp, given, sums, sums)),
            "moments": (_moments, (data, *tile, sums, sums)),
            "dots": (_dots, (data, data, *tile, given, sums, sums)),
            "affine": (_affine, (data, *tile, given, given, given, result)),
            "affine2": (_affine2, (data, data, *tile, given, given, given, given, result)),
        }

    def __getattr__(self, name: str) -> Any:
        function, arguments = self._signatures[name]
        entry = _compile(getattr(function, "py_func", function), arguments)
        setattr(self, name, entry)
        return entry


@functools.cache
def compiled(dtype: str) -> Compiled:
    """The entries for the dtype of that character."""
    return Compiled(STORED[dtype])


def _compile(function: Callable[..., Any], arguments: tuple[types.Type, ...]) -> Any:
    """`function`, compiled for these types, from the cache on disk if it is there."""
    try:
        return njit(arguments, nogil=True, cache=True)(function)
    except RuntimeError as error:
        if "no locator" not in str(error):
            raise
    _warn_no_cache()
    return njit(arguments, nogil=True)(function)


@functools.cache
def _warn_no_cache() -> None:
    warnings.warn(
        "arraybn: no folder to keep compiled kernels in, so every process compiles its own, for seconds. Set"
        ' NUMBA_CACHE_DIR to a folder that can be written, or pass kernels="reference"',
        RuntimeWarning,
        stacklevel=2,
    )

"""The compiled functions that Python calls: jobs of one or two sweeps over an array, with the formulas between.

A job takes its data group by group, a group in stages, and a stage in parts that threads share. Each is compiled for a
dtype at its first call, and kept on disk.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numba import config, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.registry import cpu_target
from numba.extending import overload

from ... import exact, reference
from ..._arrays.namespaces import Array
from . import compiling, half, jobs, scalars, tiles
from .half import HALF, wide
from .jobs import AGAIN, BACKWARDS, ONWARDS, address_of, mark, place, program, share
from .tiles import (
    LONG,
    Cut,
    affine2_of_lines,
    affine2_of_planes,
    affine3_of_lines,
    affine3_of_planes,
    affine_of_lines,
    affine_of_planes,
    dots_of_lines,
    dots_of_planes,
    minus,
    moments_of_lines,
    moments_of_planes,
    plain,
)

SPAN = 256  # channels in a part of a stage that goes through channels

# ---- The sweeps over a tile ------------------------------------------------------------------------------------------


@plain
def _near_mean(x, sample, plane, n, c0, shift):
    """Set `shift` to a value near the mean of each channel: the mean of its first values, exact if all are equal."""
    places = min(plane, 8)
    samples = min(n // plane, 8 // places)
    first, total = np.empty(shift.size), np.zeros(shift.size)
    for j in range(shift.size):
        first[j] = wide(x[np.uintp((c0 + j) * plane)])
    for k in range(samples):
        for i in range(places):
            for j in range(shift.size):
                total[j] += minus(wide(x[np.uintp(k * sample + (c0 + j) * plane + i)]), first[j])
    for j in range(shift.size):
        near = first[j] + total[j] / (samples * places)
        shift[j] = near if np.isfinite(near) else 0.0


@plain
def _finish(n, shift, s, q):
    """Turn Σd and Σd² into mean and m2, in place; return True if some shift was so far off that digits were lost.

    A shift that was far off becomes the mean. The other shifts stay, so that their sums have the same bits again.
    """
    some = False
    for j in range(s.size):
        d = s[j] / n
        m2 = q[j] if np.isinf(q[j]) and np.isfinite(d) else q[j] - s[j] * d  # overflow gives inf, as in NumPy
        far = s[j] * d > 4 * m2
        s[j] = shift[j] + d
        q[j] = 0.0 if m2 < 0 else m2
        if far:
            shift[j] = s[j]
            some = True
    return some


# ---- The formulas of ``reference.py``, compiled for the numbers of one channel ---------------------------------------


@overload(reference.rstd, jit_options={"error_model": "numpy"})
def _rstd_compiled(var: Array, eps: float) -> Array:
    return reference.rstd


_rstd, _batch_rstd, _normalize = plain(reference.rstd), plain(reference.batch_rstd), plain(reference.normalize)
_update_running = plain(reference.update_running)
_parameter_gradients, _input_gradient = plain(reference.parameter_gradients), plain(reference.input_gradient)


# ---- Stages: functions of (part, group, *arguments), where a part is a tile of the group, or some channels -----------


@plain
def _tile(cut, group, tile):
    """Return the channels c0 … c1 - 1 and the rows r0 … r1 - 1 of a tile."""
    c0, r0 = group * cut.group, tile * cut.height
    return c0, min(c0 + cut.group, cut.channels), r0, min(r0 + cut.height, cut.rows)


@plain
def _span(cut, group, part):
    """Return the channels c0 … c1 - 1 of a part; none where the group is smaller than others."""
    c0 = group * cut.group
    c1 = min(c0 + cut.group, cut.channels)
    return min(c0 + part * SPAN, c1), min(c0 + (part + 1) * SPAN, c1)


def _shift(part, group, x, cut, shift):
    """Set `shift` to a value near the mean of each channel."""
    c0, c1, _, _ = _tile(cut, group, 0)
    _near_mean(x, cut.sample, cut.plane, cut.n, c0, shift[c0:c1])


def _spread(tile, group, x, cut, shift, sums):
    """(E1) Σd and Σd² with d = x − shift."""
    c0, c1, r0, r1 = _tile(cut, group, tile)
    s, q = sums[0, tile, c0:c1], sums[1, tile, c0:c1]
    if cut.plane >= LONG:
        moments_of_planes(x, x, cut.sample, cut.plane, c0, r0, r1, shift[c0:c1], s, q)
    else:
        moments_of_lines(x, x, cut.sample, cut.plane, c0, r0, r1, shift[c0:c1], s, q)


def _dots(tile, group, u, x, cut, mean, sums):
    """(E5, E8, E9) Σu and Σu·(x−mean)."""
    c0, c1, r0, r1 = _tile(cut, group, tile)
    s, q = sums[0, tile, c0:c1], sums[1, tile, c0:c1]
    if cut.plane >= LONG:
        dots_of_planes(u, x, cut.sample, cut.plane, c0, r0, r1, mean[c0:c1], s, q)
    else:
        dots_of_lines(u, x, cut.sample, cut.plane, c0, r0, r1, mean[c0:c1], s, q)


def _affine(tile, group, x, cut, mean, a, c, out, in_place):
    """(E3, E7) a·(x−mean) + c."""
    c0, c1, r0, r1 = _tile(cut, group, tile)
    mean, a, c = mean[c0:c1], a[c0:c1], c[c0:c1]
    if cut.plane >= LONG:
        affine_of_planes(x, x, cut.sample, cut.plane, c0, r0, r1, mean, a, a, c, out, in_place)
    else:
        affine_of_lines(x, x, cut.sample, cut.plane, c0, r0, r1, mean, a, a, c, out, in_place)


def _affine2(tile, group, u, x, cut, mean, a, b, c, out, in_place):
    """(E6, E8, E9) a·u + b·(x−mean) + c."""
    c0, c1, r0, r1 = _tile(cut, group, tile)
    mean, a, b, c = mean[c0:c1], a[c0:c1], b[c0:c1], c[c0:c1]
    if cut.plane >= LONG:
        affine2_of_planes(u, x, cut.sample, cut.plane, c0, r0, r1, mean, a, b, c, out, in_place)
    else:
        affine2_of_lines(u, x, cut.sample, cut.plane, c0, r0, r1, mean, a, b, c, out, in_place)


def _affine3(tile, group, v, u, x, cut, mean, a, b, c, d, out, in_place):
    """(E9) a·v + b·u + c·(x−mean) + d."""
    c0, c1, r0, r1 = _tile(cut, group, tile)
    mean, a, b, c, d = mean[c0:c1], a[c0:c1], b[c0:c1], c[c0:c1], d[c0:c1]
    if cut.plane >= LONG:
        affine3_of_planes(v, u, x, cut.sample, cut.plane, c0, r0, r1, mean, a, b, c, d, out, in_place)
    else:
        affine3_of_lines(v, u, x, cut.sample, cut.plane, c0, r0, r1, mean, a, b, c, d, out, in_place)


@plain
def _add_tiles(sums, c0, c1, s, q):
    """Set s and q to the sums of all tiles, added by halves."""
    tiles = sums.shape[1]
    while tiles > 1:
        half = (tiles + 1) // 2
        for k in range(2):
            for tile in range(tiles - half):
                for j in range(c0, c1):
                    sums[k, tile, j] += sums[k, half + tile, j]
        tiles = half
    s[c0:c1] = sums[0, 0, c0:c1]
    q[c0:c1] = sums[1, 0, c0:c1]


def _mean_m2(part, group, cut, board, shift, sums, mean, m2):
    """(E1) mean and m2; mark the group where the sums have to be made again."""
    c0, c1 = _span(cut, group, part)
    _add_tiles(sums, c0, c1, mean, m2)
    if _finish(cut.n, shift[c0:c1], mean[c0:c1], m2[c0:c1]):
        mark(board, group)


def _total(part, group, cut, sums, s, q):
    """(E5) The sums of the tiles."""
    c0, c1 = _span(cut, group, part)
    _add_tiles(sums, c0, c1, s, q)


def _normalized(part, group, cut, m2, weight, bias, eps, rstd, a, c):
    """(E3) rstd, and the coefficients of y."""
    c0, c1 = _span(cut, group, part)
    for j in range(c0, c1):
        rstd[j] = _batch_rstd(m2[j], cut.n, eps)
        a[j], c[j] = _normalize(rstd[j], weight[j], bias[j], None)


@plain
def _set_gradients(c0, c1, n, rstd, weight, dweight, dbias, a, b, c):
    """(E5, E6) Turn Σdy·(x−mean) into dweight, beside dbias, and set the coefficients of dx."""
    for j in range(c0, c1):
        dweight[j], dbias[j] = _parameter_gradients(dbias[j], dweight[j], rstd[j], None)
        a[j], b[j], c[j] = _input_gradient(dweight[j], dbias[j], n, rstd[j], weight[j], None)


def _fixed(part, group, cut, var, weight, bias, eps, rstd, a, c):
    """(E3, E7) rstd, and the coefficients of y, for fixed statistics."""
    c0, c1 = _span(cut, group, part)
    for j in range(c0, c1):
        rstd[j] = _rstd(var[j], eps)
        a[j], c[j] = _normalize(rstd[j], weight[j], bias[j], None)


def _gradients(part, group, cut, sums, rstd, weight, dweight, dbias, a, b, c):
    """(E5, E6) dweight, dbias, and the coefficients of dx."""
    c0, c1 = _span(cut, group, part)
    _add_tiles(sums, c0, c1, dbias, dweight)
    _set_gradients(c0, c1, cut.n, rstd, weight, dweight, dbias, a, b, c)


# ---- Jobs: programs of stages, whose functions are given by address --------------------------------------------------
# So the loops over data are compiled once, for all jobs that have them.


@plain
def _do(words, cut, work, stages, board, memory):
    """Do the job; what the arguments of the stages refer to is in `memory`, or belongs to the caller."""
    rows = program(stages)
    share(words, work, place((board, cut, rows)))
    # Numba frees an array after the last line that has its name, and sees no use of an address.
    if board[0] != 0 or len(rows) == len(memory) == 0:
        raise MemoryError


@plain
def _cut_of(numbers):
    """Return the cut whose numbers these are: an array is handed to compiled code in a tenth of the time of a tuple."""
    n = numbers
    return Cut(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8])


@plain
def _parts(cut):
    """Return the number of parts of a stage that goes through the channels of a group."""
    return (cut.group + SPAN - 1) // SPAN


@plain
def _board(cut):
    return np.zeros(1 + cut.groups * (10 + 3 * cut.tiles + 3 * _parts(cut)), np.int64)


@plain
def _work_space(cut, vectors):
    """Return vectors (C,), and two more for each tile."""
    return np.empty((vectors + 2 * cut.tiles, cut.channels))


@plain
def _sums(cut, memory):
    """Return the last vectors as the sums (2, tiles, C) of each tile."""
    return memory[memory.shape[0] - 2 * cut.tiles :].reshape((2, cut.tiles, cut.channels))


@plain
def _widened(vector, row):
    """Return the row, which is set to the vector."""
    row[:] = vector
    return row


def _moments(at, words, x, numbers, mean, m2):
    cut = _cut_of(numbers)
    work, shift, spread, mean_m2 = at
    memory, board = _work_space(cut, 1), _board(cut)
    near, sums = memory[0], _sums(cut, memory)
    tiles, spans = (spread, place((x, cut, near, sums))), (mean_m2, place((cut, board, near, sums, mean, m2)))
    stages = (
        (shift, place((x, cut, near)), 1, ONWARDS),
        (*tiles, cut.tiles, ONWARDS),
        (*spans, _parts(cut), ONWARDS),
        (*tiles, cut.tiles, AGAIN),
        (*spans, _parts(cut), AGAIN),
    )
    _do(words, cut, work, stages, board, memory)


def _dots_alone(at, words, u, x, numbers, mean, s, q):
    cut = _cut_of(numbers)
    work, dots, total = at
    memory, board = _work_space(cut, 0), _board(cut)
    sums = _sums(cut, memory)
    stages = (
        (dots, place((u, x, cut, mean, sums)), cut.tiles, ONWARDS),
        (total, place((cut, sums, s, q)), _parts(cut), ONWARDS),
    )
    _do(words, cut, work, stages, board, memory)


def _affine_alone(at, words, x, numbers, mean, a, c, out, in_place):
    cut = _cut_of(numbers)
    work, affine = at
    board = _board(cut)
    stages = ((affine, place((x, cut, mean, a, c, out, in_place)), cut.tiles, BACKWARDS),)
    _do(words, cut, work, stages, board, mean)


def _affine2_alone(at, words, u, x, numbers, mean, a, b, c, out, in_place):
    cut = _cut_of(numbers)
    work, affine2 = at
    board = _board(cut)
    stages = ((affine2, place((u, x, cut, mean, a, b, c, out, in_place)), cut.tiles, BACKWARDS),)
    _do(words, cut, work, stages, board, mean)


def _affine3_alone(at, words, v, u, x, numbers, mean, a, b, c, d, out, in_place):
    cut = _cut_of(numbers)
    work, affine3 = at
    board = _board(cut)
    stages = ((affine3, place((v, u, x, cut, mean, a, b, c, d, out, in_place)), cut.tiles, BACKWARDS),)
    _do(words, cut, work, stages, board, mean)


def _forward(at, words, x, numbers, weight, bias, eps, rows, out, in_place):
    """(E1, E3) Set the rows mean, m2, rstd and weight, and write y = weight·xhat + bias."""
    cut = _cut_of(numbers)
    work, shift, spread, mean_m2, normalized, affine = at
    memory, board = _work_space(cut, 4), _board(cut)
    near, a, c, sums = memory[0], memory[1], memory[2], _sums(cut, memory)
    mean, m2, rstd = rows[0], rows[1], rows[2]
    weight, bias = _widened(weight, rows[3]), _widened(bias, memory[3])
    tiles, spans = (spread, place((x, cut, near, sums))), (mean_m2, place((cut, board, near, sums, mean, m2)))
    stages = (
        (shift, place((x, cut, near)), 1, ONWARDS),
        (*tiles, cut.tiles, ONWARDS),
        (*spans, _parts(cut), ONWARDS),
        (*tiles, cut.tiles, AGAIN),
        (*spans, _parts(cut), AGAIN),
        (normalized, place((cut, m2, weight, bias, eps, rstd, a, c)), _parts(cut), ONWARDS),
        (affine, place((x, cut, mean, a, c, out, in_place)), cut.tiles, BACKWARDS),
    )
    _do(words, cut, work, stages, board, memory)


def _backward(at, words, dy, x, numbers, rows, gradients_found, out, in_place):
    """(E5, E6) Set the rows dweight and dbias, and write dx; the rows given are those of a forward."""
    cut = _cut_of(numbers)
    work, dots, gradients, affine2 = at
    mean, rstd, weight, dweight, dbias = rows[0], rows[2], rows[3], gradients_found[0], gradients_found[1]
    memory, board = _work_space(cut, 3), _board(cut)
    a, b, c, sums = memory[0], memory[1], memory[2], _sums(cut, memory)
    found = (cut, sums, rstd, weight, dweight, dbias, a, b, c)
    stages = (
        (dots, place((dy, x, cut, mean, sums)), cut.tiles, ONWARDS),
        (gradients, place(found), _parts(cut), ONWARDS),
        (affine2, place((dy, x, cut, mean, a, b, c, out, in_place)), cut.tiles, BACKWARDS),
    )
    _do(words, cut, work, stages, board, memory)


def _evaluation(at, words, x, numbers, mean, var, weight, bias, eps, rows, out, in_place):
    """(E3, E7) Set the rows mean, var, rstd and weight, and write y, with fixed statistics."""
    cut = _cut_of(numbers)
    work, fixed, affine = at
    memory, board = np.empty((3, cut.channels)), _board(cut)
    a, c, rstd = memory[0], memory[1], rows[2]
    mean, var = _widened(mean, rows[0]), _widened(var, rows[1])
    weight, bias = _widened(weight, rows[3]), _widened(bias, memory[2])
    stages = (
        (fixed, place((cut, var, weight, bias, eps, rstd, a, c)), _parts(cut), ONWARDS),
        (affine, place((x, cut, mean, a, c, out, in_place)), cut.tiles, BACKWARDS),
    )
    _do(words, cut, work, stages, board, memory)


def _running(old_mean, old_var, mean, var, momentum, new_mean, new_var):
    """(E4) Set the running statistics after one more batch."""
    new_mean[:] = _update_running(old_mean, mean, momentum)
    new_var[:] = _update_running(old_var, var, momentum)


# ---- Compiling -------------------------------------------------------------------------------------------------------

_READ = functools.partial(types.Array, ndim=1, layout="C", readonly=True)
_WRITE = functools.partial(types.Array, ndim=1, layout="C")
_WORDS, _CUT = types.Array(types.int64, 1, "C"), types.NamedUniTuple(types.intp, len(Cut._fields), Cut)
_STORED = {"e": types.int16, "E": types.uint16, "f": types.float32, "d": types.float64}  # by the dtype's character


class Compiled:
    """The entries for one dtype. Each is compiled, or read from the cache on disk, at its first use."""

    def __init__(self, stored: types.Type) -> None:
        x, out = _READ(stored), _WRITE(stored)
        given, found, sums = _READ(types.float64), _WRITE(types.float64), types.Array(types.float64, 3, "C")
        number, eps, numbers, rows = types.intp, types.float64, _READ(types.int64), _WRITE(types.float64, ndim=2)
        self._stages = {
            "shift": (_shift, (x, _CUT, found)),
            "spread": (_spread, (x, _CUT, found, sums)),
            "mean_m2": (_mean_m2, (_CUT, _WORDS, found, sums, found, found)),
            "dots": (_dots, (x, x, _CUT, given, sums)),
            "total": (_total, (_CUT, sums, found, found)),
            "normalized": (_normalized, (_CUT, found, given, given, eps, found, found, found)),
            "fixed": (_fixed, (_CUT, given, given, given, eps, found, found, found)),
            "affine": (_affine, (x, _CUT, given, given, given, out, number)),
            "gradients": (_gradients, (_CUT, sums, given, given, found, found, found, found, found)),
            "affine2": (_affine2, (x, x, _CUT, given, given, given, given, out, number)),
            "affine3": (_affine3, (x, x, x, _CUT, *(given,) * 5, out, number)),
        }
        self._jobs = {
            "moments": (_moments, (x, numbers, found, found), ("shift", "spread", "mean_m2")),
            "dots": (_dots_alone, (x, x, numbers, given, found, found), ("dots", "total")),
            "affine": (_affine_alone, (x, numbers, given, given, given, out, number), ("affine",)),
            "affine2": (_affine2_alone, (x, x, numbers, given, given, given, given, out, number), ("affine2",)),
            "affine3": (_affine3_alone, (x, x, x, numbers, *(given,) * 5, out, number), ("affine3",)),
            "backward": (_backward, (x, x, numbers, rows, rows, out, number), ("dots", "gradients", "affine2")),
        }
        for kind, vector in (("f", _READ(types.float32)), ("d", given)):  # the dtype of parameters and statistics
            self._jobs[f"forward_{kind}"] = (
                _forward,
                (x, numbers, vector, vector, eps, rows, out, number),
                ("shift", "spread", "mean_m2", "normalized", "affine"),
            )
            self._jobs[f"evaluation_{kind}"] = (
                _evaluation,
                (x, numbers, *(vector,) * 4, eps, rows, out, number),
                ("fixed", "affine"),
            )
        self._others = {"running": (_running, (x, x, given, given, eps, out, out))}

    def __getattr__(self, name: str) -> Any:
        if name in self._others:
            entry = _compile(*self._others[name])
        elif name in self._jobs:
            function, arguments, stages = self._jobs[name]
            at = (_work_address(), *(_address(*self._stages[stage]) for stage in stages))
            entry = functools.partial(
                _compile(function, (types.UniTuple(types.int64, len(at)), _WORDS, *arguments)), at
            )
        else:
            raise AttributeError(name)
        setattr(self, name, entry)
        return entry

    def names(self) -> list[str]:
        """Return the names of the entries."""
        return [*self._jobs, *self._others]


@functools.cache
def compiled(dtype: str) -> Compiled:
    """Return the entries for the dtype of that character."""
    return Compiled(_STORED[dtype])


def compile_all() -> Iterator[str]:
    """Compile every entry for one dtype after another, and yield the names of the dtypes."""
    for dtype, name in {"f": "float32", "d": "float64", "e": "float16", "E": "bfloat16"}.items():
        if dtype == "e" and not HALF:
            continue
        entries = compiled(dtype)
        for entry in entries.names():
            getattr(entries, entry)
        yield name


@functools.cache
def _address(function: Any, arguments: tuple[types.Type, ...]) -> Any:
    """Return the address of a compiled stage."""
    return _compile(address_of(function, arguments), ())()


@functools.cache
def _work_address() -> Any:
    return _address(jobs.work, (_WORDS, _CUT, types.Array(types.int64, 2, "C")))


@functools.cache
def serve() -> Any:
    """Return the compiled function of helper threads."""
    return _compile(jobs.serve, (_WORDS, types.intp, types.intp))


def cache_folder() -> str | None:
    """Return the folder of the compiled entries; None where no folder can be written."""
    try:
        return str(_Cache(_forward, ()).cache_path)
    except RuntimeError:
        return None


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache on disk, made stale by a change of any source; Numba's own looks at this file alone."""

    def __init__(self, function: Any, signature: tuple[types.Type, ...]) -> None:
        super().__init__(function)
        # Each key (signature, processor, sources) has its own files. All keys share the files of Numba's cache, where
        # two processes that write at once can leave the code of one process under the key of the other, for good.
        key = self._index_key(signature, cpu_target.target_context.codegen())
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        self._cache_file = IndexDataCacheFile(
            self._cache_path, f"{self._impl.filename_base}-{name}", self._impl.locator.get_source_stamp()
        )

    def _index_key(self, signature, codegen):
        # Not Numba's key: that has a function's closure, pickled, which is never the same again.
        return signature, codegen.magic_tuple(), self._py_func.__qualname__, _sources()

    def load_overload(self, signature, context):
        """Load as Numba does, but let a file that cannot be read, as after a crash, be compiled anew."""
        found = None
        try:
            found = super().load_overload(signature, context)
        except (EOFError, pickle.UnpicklingError, OSError):
            with suppress(OSError):
                self.flush()
        if found is None:
            compiling.announce(self.cache_path)
        return found

    def turn(self) -> AbstractContextManager[None]:
        """Return the context in which to load or compile: nobody waits for code that is kept already."""
        with suppress(EOFError, pickle.UnpicklingError, OSError):
            if self._cache_file._load_index():
                return nullcontext()
        return compiling.turn(f"{self._cache_file._index_path}.lock")

    def save_overload(self, signature, data):
        """Save as Numba does, but warn and go on where the disk is full."""
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _warn_no_cache(f"they cannot be kept ({error})")


@functools.cache
def _sources() -> str:
    own = (__file__, jobs.__file__, tiles.__file__, half.__file__, scalars.__file__)
    files = (*own, Path(__file__).with_name("exact.py"), reference.__file__, exact.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _compile(function: Any, arguments: tuple[types.Type, ...]) -> Any:
    """Return `function` compiled for these types, from the cache on disk if it is there."""
    if config.DISABLE_JIT:
        return function
    function = getattr(function, "py_func", function)
    entry, turn = plain(nogil=True)(function), nullcontext()
    try:
        entry._cache = _Cache(function, arguments)
        turn = entry._cache.turn()
    except RuntimeError as error:
        if "no locator" not in str(error):
            raise
        _warn_no_cache("there is no folder to keep them in")
    with turn:
        entry.compile(arguments)
    entry.disable_compile()
    return entry


@functools.cache
def _warn_no_cache(why: str) -> None:
    warnings.warn(
        f"arraybn: every process compiles its own kernels, for seconds, because {why}. Set"
        ' NUMBA_CACHE_DIR to a folder that can be written, or pass kernels="reference"',
        RuntimeWarning,
        stacklevel=2,
    )

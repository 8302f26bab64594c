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
from . import compiling, jobs, scalars  # noqa: F401 (scalars is the namespace of the formulas that are compiled)
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
    moments_of_lines,
    moments_of_planes,
    named_after,
    plain,
    tile_of,
)

SPAN = 256  # channels in a part of a stage that goes through channels
FEW = 16  # channels from which on a row of channels-last data with a mask is a run of its own
EVERYWHERE = np.zeros(0, np.uint8)  # in place of a mask
NOT_GIVEN = {char: np.empty(0, char) for char in "fd"}  # in place of a weight or bias, by the dtype's character

# ---- Statistics ------------------------------------------------------------------------------------------------------


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
def _span(cut, group, part):
    """Return the channels c0 … c1 - 1 of a part; none where the group is smaller than others."""
    c0 = group * cut.group
    c1 = min(c0 + cut.group, cut.channels)
    return min(c0 + part * SPAN, c1), min(c0 + (part + 1) * SPAN, c1)


def shifting(masked: bool = False) -> Any:
    """Return the stage that sets `shift` to a value near the mean of each channel, exact if all values are equal.

    That is the mean of the first eight values that count.
    """

    def stage(part, group, x, where, cut, shift):
        c0, c1, _, _ = tile_of(cut, group, 0)
        near, first, total = shift[c0:c1], np.empty(c1 - c0), np.zeros(c1 - c0)
        n = i = found = 0
        for p in range(where.size if masked else min(cut.n, 8)):
            counts = True
            if masked:
                counts = where[np.uintp(p)] != 0
            if counts:
                for j in range(c1 - c0):
                    value = wide(x[np.uintp(n * cut.sample + (c0 + j) * cut.plane + i)])
                    if found == 0:
                        first[j] = value
                    total[j] += value - first[j]
                found += 1
                if found == 8:
                    break
            i += 1
            if i == cut.plane:
                n, i = n + 1, 0
        for j in range(c1 - c0):
            value = first[j] + total[j] / found if found else 0.0
            near[j] = value if np.isfinite(value) else 0.0

    stage.__qualname__ += f".{masked}"
    return stage


def summing(planes: Any, lines: Any, rows: Any = None) -> Any:
    """Return the stage of a reduction by the loops for these layouts; `rows` is for rows of FEW values or more."""
    by_rows = rows is not None

    @named_after(planes)
    def stage(tile, group, u, x, where, cut, mean, sums):
        if cut.plane >= LONG:
            planes(tile, group, u, x, where, cut, mean, sums)
        elif by_rows and cut.plane == 1 and cut.group >= FEW:
            rows(tile, group, u, x, where, cut, mean, sums)
        else:
            lines(tile, group, u, x, where, cut, mean, sums)

    return stage


def mapping(planes: Any, lines: Any, rows: Any = None) -> Any:
    """Return the stage of a map by the loops for these layouts."""
    by_rows = rows is not None

    @named_after(planes)
    def stage(tile, group, data, where, cut, vectors, out, in_place):
        if cut.plane >= LONG:
            planes(tile, group, data, where, cut, vectors, out, in_place)
        elif by_rows and cut.plane == 1 and cut.group >= FEW:
            rows(tile, group, data, where, cut, vectors, out, in_place)
        else:
            lines(tile, group, data, where, cut, vectors, out, in_place)

    return stage


_shift, _spread, _dots = (
    shifting(),
    summing(moments_of_planes, moments_of_lines),
    summing(dots_of_planes, dots_of_lines),
)
_affine, _affine2 = mapping(affine_of_planes, affine_of_lines), mapping(affine2_of_planes, affine2_of_lines)
_affine3 = mapping(affine3_of_planes, affine3_of_lines)


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
    for j in range(c0, c1):
        s[j], q[j] = sums[0, 0, j], sums[1, 0, j]


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
def _widened(vector, row, otherwise):
    """Return the row, which is set to the vector, or to a number where the vector is empty: `NOT_GIVEN`."""
    for j in range(row.size):  # Numba takes seconds to compile an assignment of arrays
        row[j] = vector[j] if vector.size != 0 else otherwise
    return row


# Jobs with a mask take `where` after the data, and the cut has the n of the mask. Jobs without one save an argument,
# whose conversion from Python takes longer than a stage of little data.


def masked_moments(at, words, x, where, numbers, mean, m2):
    cut = _cut_of(numbers)
    work, shift, spread, mean_m2 = at
    memory, board = _work_space(cut, 1), _board(cut)
    near, sums = memory[0], _sums(cut, memory)
    tiles, spans = (spread, place((x, x, where, cut, near, sums))), (mean_m2, place((cut, board, near, sums, mean, m2)))
    stages = (
        (shift, place((x, where, cut, near)), 1, ONWARDS),
        (*tiles, cut.tiles, ONWARDS),
        (*spans, _parts(cut), ONWARDS),
        (*tiles, cut.tiles, AGAIN),
        (*spans, _parts(cut), AGAIN),
    )
    _do(words, cut, work, stages, board, memory)


def masked_dots(at, words, u, x, where, numbers, mean, s, q):
    cut = _cut_of(numbers)
    work, dots, total = at
    memory, board = _work_space(cut, 0), _board(cut)
    sums = _sums(cut, memory)
    stages = (
        (dots, place((u, x, where, cut, mean, sums)), cut.tiles, ONWARDS),
        (total, place((cut, sums, s, q)), _parts(cut), ONWARDS),
    )
    _do(words, cut, work, stages, board, memory)


@plain
def map_tiles(at, words, data, where, numbers, vectors, out, in_place):
    """Write the result of a map, backwards: the last tile of the sweep before is still in cache."""
    cut = _cut_of(numbers)
    work, sweep = at
    board = _board(cut)
    stages = ((sweep, place((data, where, cut, vectors, out, in_place)), cut.tiles, BACKWARDS),)
    _do(words, cut, work, stages, board, vectors[0])


def masked_forward(at, words, x, where, numbers, weight, bias, eps, rows, out, in_place):
    """(E1, E3) Set the rows mean, m2, rstd and weight, and write y = weight·xhat + bias."""
    cut = _cut_of(numbers)
    work, shift, spread, mean_m2, normalized, affine = at
    memory, board = _work_space(cut, 4), _board(cut)
    near, a, c, sums = memory[0], memory[1], memory[2], _sums(cut, memory)
    mean, m2, rstd = rows[0], rows[1], rows[2]
    weight, bias = _widened(weight, rows[3], 1.0), _widened(bias, memory[3], 0.0)
    tiles, spans = (spread, place((x, x, where, cut, near, sums))), (mean_m2, place((cut, board, near, sums, mean, m2)))
    stages = (
        (shift, place((x, where, cut, near)), 1, ONWARDS),
        (*tiles, cut.tiles, ONWARDS),
        (*spans, _parts(cut), ONWARDS),
        (*tiles, cut.tiles, AGAIN),
        (*spans, _parts(cut), AGAIN),
        (normalized, place((cut, m2, weight, bias, eps, rstd, a, c)), _parts(cut), ONWARDS),
        (affine, place(((x, x, x), where, cut, (mean, a, a, a, c), out, in_place)), cut.tiles, BACKWARDS),
    )
    _do(words, cut, work, stages, board, memory)


def masked_backward(at, words, dy, x, where, numbers, rows, gradients_found, out, in_place):
    """(E5, E6) Set the rows dweight and dbias, and write dx; the rows given are those of a forward."""
    cut = _cut_of(numbers)
    work, dots, gradients, affine2 = at
    mean, rstd, weight, dweight, dbias = rows[0], rows[2], rows[3], gradients_found[0], gradients_found[1]
    memory, board = _work_space(cut, 3), _board(cut)
    a, b, c, sums = memory[0], memory[1], memory[2], _sums(cut, memory)
    found = (cut, sums, rstd, weight, dweight, dbias, a, b, c)
    stages = (
        (dots, place((dy, x, where, cut, mean, sums)), cut.tiles, ONWARDS),
        (gradients, place(found), _parts(cut), ONWARDS),
        (affine2, place(((x, dy, x), where, cut, (mean, a, a, b, c), out, in_place)), cut.tiles, BACKWARDS),
    )
    _do(words, cut, work, stages, board, memory)


_inserted = functools.partial(plain, inline="always")  # compiled once, as a part of the job without a mask
_moments_of, _dots_of = _inserted(masked_moments), _inserted(masked_dots)
_forward_of, _backward_of = _inserted(masked_forward), _inserted(masked_backward)


def _moments(at, words, x, numbers, mean, m2):
    _moments_of(at, words, x, EVERYWHERE, numbers, mean, m2)


def dots_alone(at, words, u, x, numbers, mean, s, q):
    _dots_of(at, words, u, x, EVERYWHERE, numbers, mean, s, q)


def affine_alone(at, words, x, numbers, mean, a, c, out, in_place):
    map_tiles(at, words, (x, x, x), EVERYWHERE, numbers, (mean, a, a, a, c), out, in_place)


def affine2_alone(at, words, u, x, numbers, mean, a, b, c, out, in_place):
    map_tiles(at, words, (x, u, x), EVERYWHERE, numbers, (mean, a, a, b, c), out, in_place)


def _affine3_alone(at, words, v, u, x, numbers, mean, a, b, c, d, out, in_place):
    map_tiles(at, words, (v, u, x), EVERYWHERE, numbers, (mean, a, b, c, d), out, in_place)


def _forward(at, words, x, numbers, weight, bias, eps, rows, out, in_place):
    _forward_of(at, words, x, EVERYWHERE, numbers, weight, bias, eps, rows, out, in_place)


def _backward(at, words, dy, x, numbers, rows, gradients, out, in_place):
    _backward_of(at, words, dy, x, EVERYWHERE, numbers, rows, gradients, out, in_place)


def _evaluation(at, words, x, numbers, mean, var, weight, bias, eps, rows, out, in_place):
    """(E3, E7) Set the rows mean, var, rstd and weight, and write y, with fixed statistics."""
    cut = _cut_of(numbers)
    work, fixed, affine = at
    memory, board = np.empty((3, cut.channels)), _board(cut)
    a, c, rstd = memory[0], memory[1], rows[2]
    mean, var = _widened(mean, rows[0], 0.0), _widened(var, rows[1], 1.0)
    weight, bias = _widened(weight, rows[3], 1.0), _widened(bias, memory[2], 0.0)
    stages = (
        (fixed, place((cut, var, weight, bias, eps, rstd, a, c)), _parts(cut), ONWARDS),
        (affine, place(((x, x, x), EVERYWHERE, cut, (mean, a, a, a, c), out, in_place)), cut.tiles, BACKWARDS),
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
        where = _READ(types.uint8)
        summed = x, x, where, _CUT, given, sums
        mapped = types.UniTuple(x, 3), where, _CUT, types.UniTuple(given, 5), out, number
        self._stages = {
            "shift": (_shift, (x, where, _CUT, found)),
            "spread": (_spread, summed),
            "mean_m2": (_mean_m2, (_CUT, _WORDS, found, sums, found, found)),
            "dots": (_dots, summed),
            "total": (_total, (_CUT, sums, found, found)),
            "normalized": (_normalized, (_CUT, found, given, given, eps, found, found, found)),
            "fixed": (_fixed, (_CUT, given, given, given, eps, found, found, found)),
            "affine": (_affine, mapped),
            "gradients": (_gradients, (_CUT, sums, given, given, found, found, found, found, found)),
            "affine2": (_affine2, mapped),
            "affine3": (_affine3, mapped),
        }
        self._jobs = {
            "moments": (_moments, (x, numbers, found, found), ("shift", "spread", "mean_m2")),
            "dots": (dots_alone, (x, x, numbers, given, found, found), ("dots", "total")),
            "affine": (affine_alone, (x, numbers, given, given, given, out, number), ("affine",)),
            "affine2": (affine2_alone, (x, x, numbers, given, given, given, given, out, number), ("affine2",)),
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
    files = *sorted(Path(__file__).parent.glob("*.py")), Path(reference.__file__), Path(exact.__file__)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


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

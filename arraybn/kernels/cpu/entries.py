"""The compiled functions that Python calls: the sweeps over a tile, and two sweeps with the formulas between.

Each is compiled for a dtype at its first call, and kept on disk.
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
from . import compiling, half, scalars, tiles
from .half import HALF, wide
from .tiles import (
    LONG,
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

# ---- The sweeps --------------------------------------------------------------------------------------


@plain
def _shift(x, sample, plane, n, c0, shift):
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
def _spread(x, sample, plane, c0, r0, r1, shift, s, q):
    """(E1) Σd and Σd² with d = x − shift."""
    if plane >= LONG:
        moments_of_planes(x, x, sample, plane, c0, r0, r1, shift, s, q)
    else:
        moments_of_lines(x, x, sample, plane, c0, r0, r1, shift, s, q)


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


@plain
def _moments(x, sample, plane, n, c0, rows, mean, m2):
    """(E1) Set mean and m2 of whole channels, which are one tile."""
    shift = np.empty(mean.size)
    _shift(x, sample, plane, n, c0, shift)
    for _ in range(2):
        _spread(x, sample, plane, c0, 0, rows, shift, mean, m2)
        if not _finish(n, shift, mean, m2):
            return


@plain
def _dots(u, x, sample, plane, c0, r0, r1, mean, s, q):
    """(E5, E8, E9) Σu and Σu·(x−mean)."""
    if plane >= LONG:
        dots_of_planes(u, x, sample, plane, c0, r0, r1, mean, s, q)
    else:
        dots_of_lines(u, x, sample, plane, c0, r0, r1, mean, s, q)


@plain
def _affine(x, sample, plane, c0, r0, r1, mean, a, c, out, in_place):
    """(E3, E7) a·(x−mean) + c."""
    if plane >= LONG:
        affine_of_planes(x, x, sample, plane, c0, r0, r1, mean, a, a, c, out, in_place)
    else:
        affine_of_lines(x, x, sample, plane, c0, r0, r1, mean, a, a, c, out, in_place)


@plain
def _affine2(u, x, sample, plane, c0, r0, r1, mean, a, b, c, out, in_place):
    """(E6, E8, E9) a·u + b·(x−mean) + c."""
    if plane >= LONG:
        affine2_of_planes(u, x, sample, plane, c0, r0, r1, mean, a, b, c, out, in_place)
    else:
        affine2_of_lines(u, x, sample, plane, c0, r0, r1, mean, a, b, c, out, in_place)


@plain
def _affine3(v, u, x, sample, plane, c0, r0, r1, mean, a, b, c, d, out, in_place):
    """(E9) a·v + b·u + c·(x−mean) + d."""
    if plane >= LONG:
        affine3_of_planes(v, u, x, sample, plane, c0, r0, r1, mean, a, b, c, d, out, in_place)
    else:
        affine3_of_lines(v, u, x, sample, plane, c0, r0, r1, mean, a, b, c, d, out, in_place)


# ---- Two sweeps over whole channels that are one tile, with the formulas of ``reference.py`` between -----------------
# The formulas are compiled for the numbers of one channel.


@overload(reference.rstd, jit_options={"error_model": "numpy"})
def _rstd_compiled(var: Array, eps: float) -> Array:
    return reference.rstd


_rstd, _batch_rstd, _normalize = plain(reference.rstd), plain(reference.batch_rstd), plain(reference.normalize)
_update_running = plain(reference.update_running)
_parameter_gradients, _input_gradient = plain(reference.parameter_gradients), plain(reference.input_gradient)


def _forward(x, sample, plane, n, c0, rows, weight, bias, eps, mean, m2, rstd, out, in_place):
    """(E1, E3) Set mean, m2 and rstd, and write y = weight·xhat + bias."""
    _moments(x, sample, plane, n, c0, rows, mean, m2)
    a, c = np.empty(mean.size), np.empty(mean.size)
    for j in range(mean.size):
        rstd[j] = _batch_rstd(m2[j], n, eps)
        a[j], c[j] = _normalize(rstd[j], weight[j], bias[j], None)
    _affine(x, sample, plane, c0, 0, rows, mean, a, c, out, in_place)


def _backward(dy, x, sample, plane, n, c0, rows, mean, rstd, weight, dweight, dbias, out, in_place):
    """(E5, E6) Set dweight and dbias, and write dx."""
    _dots(dy, x, sample, plane, c0, 0, rows, mean, dbias, dweight)
    a, b, c = np.empty(mean.size), np.empty(mean.size), np.empty(mean.size)
    for j in range(mean.size):
        dweight[j], dbias[j] = _parameter_gradients(dbias[j], dweight[j], rstd[j], None)
        a[j], b[j], c[j] = _input_gradient(dweight[j], dbias[j], n, rstd[j], weight[j], None)
    _affine2(dy, x, sample, plane, c0, 0, rows, mean, a, b, c, out, in_place)


def _fixed(var, weight, bias, eps, rstd, a, c):
    """(E3) Set rstd, a and c for fixed statistics."""
    for j in range(rstd.size):
        rstd[j] = _rstd(var[j], eps)
        a[j], c[j] = _normalize(rstd[j], weight[j], bias[j], None)


def _running(old_mean, old_var, mean, var, momentum, new_mean, new_var):
    """(E4) Set the running statistics after one more batch."""
    new_mean[:] = _update_running(old_mean, mean, momentum)
    new_var[:] = _update_running(old_var, var, momentum)


# ---- Compiling -------------------------------------------------------------------------------------------------------

_READ = functools.partial(types.Array, ndim=1, layout="C", readonly=True)
_WRITE = functools.partial(types.Array, ndim=1, layout="C")
_STORED = {"e": types.int16, "E": types.uint16, "f": types.float32, "d": types.float64}  # by the dtype's character


class Compiled:
    """The entries for one dtype. Each is compiled, or read from the cache on disk, at its first use."""

    def __init__(self, stored: types.Type) -> None:
        self.storage = (
            np.dtype(stored.name) if isinstance(stored, types.Integer) else None
        )  # the dtype that data is viewed as
        data, result = _READ(stored), _WRITE(stored)
        given, sums = _READ(types.float64), _WRITE(types.float64)
        place, in_place, eps = (types.intp,) * 5, types.intp, types.float64
        self._signatures = {
            "shift": (_shift, (data, *place[:4], sums)),
            "spread": (_spread, (data, *place, given, sums, sums)),
            "finish": (_finish, (types.intp, sums, sums, sums)),
            "moments": (_moments, (data, *place, sums, sums)),
            "dots": (_dots, (data, data, *place, given, sums, sums)),
            "affine": (_affine, (data, *place, given, given, given, result, in_place)),
            "affine2": (_affine2, (data, data, *place, given, given, given, given, result, in_place)),
            "affine3": (_affine3, (data, data, data, *place, *(given,) * 5, result, in_place)),
            "forward": (_forward, (data, *place, given, given, eps, sums, sums, sums, result, in_place)),
            "backward": (_backward, (data, data, *place, given, given, given, sums, sums, result, in_place)),
            "fixed": (_fixed, (given, given, given, eps, sums, sums, sums)),
            "running": (_running, (data, data, given, given, eps, result, result)),
        }

    def __getattr__(self, name: str) -> Any:
        if name not in self._signatures:
            raise AttributeError(name)
        entry = _compile(*self._signatures[name])
        setattr(self, name, entry)
        return entry

    def names(self) -> list[str]:
        """Return the names of the entries."""
        return list(self._signatures)


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
        return *super()._index_key(signature, codegen), _sources()

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
    files = (__file__, tiles.__file__, half.__file__, scalars.__file__, reference.__file__, exact.__file__)
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

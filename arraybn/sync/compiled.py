"""The reduction of two frames, compiled by Numba to a C function that MPI calls without Python.

The twin of `frames.combine`: the same bits, so a rank with Numba and a rank without may meet.
"""

from __future__ import annotations

import functools
import hashlib
from collections import namedtuple
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, config, njit, types
from numba.core.ccallback import CFunc
from numba.extending import overload

from .. import reference
from ..kernels.cpu.entries import _Cache
from ..reference import Moments
from . import frames

_plain = functools.partial(njit, error_model="numpy")  # no fastmath: the bits are those of NumPy
_Channel = namedtuple("_Channel", ("n", "mean", "m2", "mean_low"))  # plain, which Numba knows


@overload(Moments)
def _moments_of_a_channel(n, mean, m2, mean_low=None):
    return lambda n, mean, m2, mean_low=None: _Channel(n, mean, m2, 0.0)


@overload(reference._low)
def _low_of_a_channel(m):
    return lambda m: 0.0


_pool = _plain(reference.pool)  # (E2)

_FIELDS = len(frames.FIELDS)
_FLAGS, _ROOM, _N, _BODY = 2 * _FIELDS, 2 * _FIELDS + 1, _FIELDS + 1, _FIELDS + 2  # _FLAGS and _ROOM are 32 bits wide
_OPERATION, _FORWARD = frames.FIELDS.index("operation"), frames.code(frames.FORWARD)


@_plain
def _agree(a, b):
    """Set the flags of both headers in b, and one for each field that differs; return True if there is none."""
    flags = a.view(np.int32)[_FLAGS] | b.view(np.int32)[_FLAGS]
    for index in range(_FIELDS):
        flags |= (a[index] != b[index]) << index
    b.view(np.int32)[_FLAGS] = flags
    return flags == 0


@_plain
def _canonical(number):
    return np.nan if np.isnan(number) else number


def combine(a: Any, b: Any, count: Any, datatype: Any) -> None:
    """Do for pointers to frames what `frames.combine` does; MPI gives a count of 0 for a part of a cut message."""
    if count[0] == 0:
        return
    room = carray(b, _BODY).view(np.int32)[_ROOM]
    words = _BODY + 2 * room
    ours, theirs = carray(a, words), carray(b, words)
    n_a, n_b = float(ours[_N]), float(theirs[_N])
    if not _agree(ours[:_BODY], theirs[:_BODY]):
        theirs[_N] = 0
        return
    theirs[_N] += ours[_N]
    p, q = ours[_BODY:].view(np.float64), theirs[_BODY:].view(np.float64)
    if theirs[_OPERATION] == _FORWARD:
        for i in range(room):
            both = _pool(_Channel(n_a, p[i], p[i + room], 0.0), _Channel(n_b, q[i], q[i + room], 0.0))
            q[i], q[i + room] = _canonical(both.mean), _canonical(both.m2)
    else:
        for i in range(2 * room):
            q[i] = _canonical(q[i] + p[i])


class _FramesCache(_Cache):
    """The cache of the kernels, which a change of the frames makes stale as well."""

    def _index_key(self, signature, codegen):
        sources = b"".join(Path(file).read_bytes() for file in (__file__, frames.__file__))
        return *super()._index_key(signature, codegen), hashlib.sha256(sources).hexdigest()


@functools.cache
def callback() -> Any:
    """Return `combine` as a C function, whose `address` is valid as long as the object; None if Numba may not compile.

    The C function is kept on disk, as the kernels are.
    """
    if config.DISABLE_JIT:
        return None
    words, count = types.CPointer(types.int64), types.CPointer(types.int32)
    arguments = words, words, count, types.voidptr
    entry: Any = CFunc(combine, (arguments, types.void), {}, {"error_model": "numpy"})
    with suppress(RuntimeError):  # there is no folder to keep it in
        entry._cache = _FramesCache(combine, arguments)
    entry.compile()
    return entry

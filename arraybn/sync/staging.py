"""Staging: the way of vectors (C,) to the host, where MPI can read them, and home to their device.

A device pointer never reaches MPI, because an MPI that was not built for this GPU would end all processes. Data of a
GPU goes through pinned host memory, on the array's stream, and the host waits for that stream once.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .._arrays.copies import as_numpy, converted
from .._arrays.namespaces import Array, array_namespace, device, is_cupy_array


class Staging(Protocol):
    """The two ways between a device and the host, for vectors of one length, dtype and device."""

    def host(self, *vectors: Array) -> Sequence[Array]:
        """Return vectors (C,) of the device in host memory, to be read before the next call."""

    def home(self, *rows: Array) -> Sequence[Array]:
        """Return rows (C,) of the host in the namespace and dtype and on the device of the vectors."""


def staging_for(like: Array, rows: int) -> Staging:
    """Return the staging of vectors like `like` (C,), with memory for the `rows` that come home.

    Call this before the exchange: afterwards it is too late to find out that memory is short.
    """
    if type(like) is np.ndarray:
        return _NO_STAGING
    return _GpuStaging(like, rows) if is_cupy_array(like) else _CopyStaging(like)


class _NoStaging:
    """For NumPy, whose vectors are on the host."""

    def host(self, *vectors: Array) -> Sequence[Array]:
        return vectors

    def home(self, *rows: Array) -> Sequence[Array]:
        return rows


_NO_STAGING = _NoStaging()


class _CopyStaging:
    """For namespaces that exchange arrays with NumPy."""

    def __init__(self, like: Array) -> None:
        self._like = like

    def host(self, *vectors: Array) -> Sequence[Array]:
        return [as_numpy("moments", vector) for vector in vectors]

    def home(self, *rows: Array) -> Sequence[Array]:
        like = self._like
        xp, where = array_namespace(like), device(like)
        with np.errstate(all="ignore"):  # in float32 a moment may be infinite
            return [converted("moments", row, xp, where, like.dtype) for row in rows]


class _GpuStaging:
    """For CuPy, whose current device has to be that of the vectors until they are home."""

    def __init__(self, like: Array, rows: int) -> None:
        shape = rows, like.shape[0]
        self._room = array_namespace(like).empty(shape, dtype=np.float64)
        self._pinned = _pinned_of_this_stream(self._room.size)
        away, back = self._pinned.away, self._pinned.back
        self._away, self._back = (memory[: self._room.size].reshape(shape) for memory in (away, back))

    def host(self, *vectors: Array) -> Sequence[Array]:
        room: Array = self._room[: len(vectors)]
        away: Sequence[Array] = self._away[: len(vectors)]
        for row, vector in zip(room, vectors, strict=True):
            row[...] = vector
        room.get(self._pinned.stream, out=away, blocking=False)
        self._pinned.stream.synchronize()
        return away

    def home(self, *rows: Array) -> Sequence[Array]:
        room, back = self._room[: len(rows)], self._back[: len(rows)]
        np.stack(rows, out=back)
        room.set(back, self._pinned.stream)
        return list(room)


class _Pinned:
    """Host memory that a GPU copies to and from without the processor, for one stream and one thread.

    Copies on a stream come one after the other, and `_GpuStaging.host` waits for all of them before the memory is
    written to again.
    """

    def __init__(self, stream: Any, size: int) -> None:
        self.stream = stream
        self.away, self.back = (importlib.import_module("cupyx").empty_pinned((size,), np.float64) for _ in range(2))


class _PinnedOfThread(threading.local):
    def __init__(self) -> None:
        self.by_stream: dict[tuple[int, int], _Pinned] = {}


_pinned_of_thread = _PinnedOfThread()


def _pinned_of_this_stream(size: int) -> _Pinned:
    """Return pinned memory for at least `size` numbers, of the current stream of the current device."""
    cuda = importlib.import_module("cupy").cuda
    stream = cuda.get_current_stream()
    key = cuda.runtime.getDevice(), stream.ptr
    found = _pinned_of_thread.by_stream.get(key)
    if found is None or found.away.size < size:
        if found is not None:
            stream.synchronize()  # a copy from the smaller memory may be under way
        found = _pinned_of_thread.by_stream[key] = _Pinned(stream, max(size, 1024))
    return found

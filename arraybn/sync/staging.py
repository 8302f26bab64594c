"""The way of a few numbers per channel to the host, where MPI can read them, and back.

A device pointer never reaches MPI: where MPI was not built for the GPU at hand, that ends all processes. From a GPU the
numbers go through pinned host memory, on the array's stream, and the host waits for them once.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from .._arrays.copies import as_numpy, converted
from .._arrays.namespaces import Array, array_namespace, device, is_cupy_array


class Staging:
    """Room for the `rows` of numbers (C,) that come back, beside the vectors `like` (C,).

    It is made before ranks exchange what it brings, because afterwards it is too late to find out that memory is short.
    On a GPU its device has to be the current one, from here to `home`.
    """

    def __init__(self, like: Array, rows: int) -> None:
        self._like, self._pinned = like, None
        if is_cupy_array(like):
            shape = rows, like.shape[0]
            self._room = array_namespace(like).empty(shape, dtype=np.float64)
            self._pinned = _pinned_of_this_stream(self._room.size)
            away, back = self._pinned.away, self._pinned.back
            self._away, self._back = (memory[: self._room.size].reshape(shape) for memory in (away, back))

    def host(self, *vectors: Array) -> Array:
        """The vectors (C,) as rows (k, C), float64 in host memory."""
        if self._pinned is None:
            return np.stack([np.asarray(as_numpy("moments", vector), np.float64) for vector in vectors])
        rows = self._away[: len(vectors)]
        for row, vector in zip(rows, vectors, strict=True):
            vector.astype(np.float64, copy=False).get(self._pinned.stream, out=row, blocking=False)
        self._pinned.stream.synchronize()
        return np.array(rows)

    def home(self, *rows: Array) -> Sequence[Array]:
        """The host's rows (C,) in the namespace and dtype and on the device of `like`."""
        like = self._like
        if type(like) is np.ndarray:
            return rows
        if self._pinned is None:
            xp, where = array_namespace(like), device(like)
            with np.errstate(all="ignore"):  # in float32 a moment may be infinite
                return [converted("moments", row, xp, where, like.dtype) for row in rows]
        room, back = self._room[: len(rows)], self._back[: len(rows)]
        np.stack(rows, out=back)
        room.set(back, self._pinned.stream)
        return list(room)


class _Pinned:
    """Host memory that a GPU copies to and from without the processor, for one stream and one thread.

    Copies on a stream come one after the other, and `Staging.host` waits for all of them before the memory is written
    to again.
    """

    def __init__(self, stream: Any, size: int) -> None:
        self.stream = stream
        self.away, self.back = (importlib.import_module("cupyx").empty_pinned((size,), np.float64) for _ in range(2))


class _Kept(threading.local):
    def __init__(self) -> None:
        self.by_stream: dict[tuple[int, int], _Pinned] = {}


_kept = _Kept()


def _pinned_of_this_stream(size: int) -> _Pinned:
    """At least `size` numbers for the current stream of the current device."""
    cuda = importlib.import_module("cupy").cuda
    stream = cuda.get_current_stream()
    key = cuda.runtime.getDevice(), stream.ptr
    found = _kept.by_stream.get(key)
    if found is None or found.away.size < size:
        if found is not None:
            stream.synchronize()  # it may still be copied from
        found = _kept.by_stream[key] = _Pinned(stream, max(size, 1024))
    return found

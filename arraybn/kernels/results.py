"""Memory for new results of the CPU kernels, used again once the results before are gone.

The system clears every page of a large new array, which takes longer than a batch norm. So a result from 4 MB up lies
in a block that comes back, and then serves the next result of its size. The limit bounds the blocks that wait.

A block belongs to an owner, the base of the array that is returned. A view, a tensor of ``torch.from_numpy``, a DLPack
capsule and a memoryview all hold the array or its base, so that the owner lives as long as any of them. (The end of the
array itself would be too early: a view outlives it.)
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from typing import Any

import numpy as np

from .._arrays.namespaces import Array
from .._checks import as_integer

LEAST = 2**22  # bytes of a result; below, the C library has memory at hand, and NumPy asks for no huge pages
UNIT = 2**21  # bytes of a huge page: the sizes of blocks are multiples, so that similar results share them
LIMIT = 2**30  # bytes
LINE = 64  # bytes of a cache line, on which blocks begin


def set_memory_limit(limit: int) -> int:
    """Set the bytes that may wait for new results of the CPU kernels; 0 switches the reuse of memory off.

    The memory of a large result (4 MB or more) of `batch_norm`, `batch_norm_backward` and the layers on NumPy arrays is
    kept, once nothing uses the result any more, for the next result of the same size.

    Parameters
    ----------
    limit : int
        In bytes; 2**30 at the start. Memory above the limit is given back at once, the oldest first.

    Returns
    -------
    int
        The limit until now.

    Raises
    ------
    TypeError, ValueError
        `limit` is no integer, or negative.

    Notes
    -----
    Results that are in use do not count. A result in such memory is an array with a `base`: ``y.flags.owndata`` is
    False, and ``y.resize`` an error. Each process has memory of its own, so a forked child starts with none.

    Examples
    --------
    >>> import arraybn
    >>> before = arraybn.set_memory_limit(0)  # every result in new memory
    >>> arraybn.set_memory_limit(before)
    0
    """
    return _store.set_limit(as_integer("limit", limit, 0))


def free_memory() -> int:
    """Give the memory that waits for new results of the CPU kernels back to the system.

    Returns
    -------
    int
        How many bytes have been given back.

    Examples
    --------
    >>> import arraybn
    >>> arraybn.free_memory() >= 0
    True
    >>> arraybn.free_memory()
    0
    """
    return _store.free()


def empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """Return a new array whose values are not set."""
    nbytes = math.prod(shape) * dtype.itemsize
    if not LEAST <= nbytes <= _store.limit:
        return np.empty(shape, dtype)
    owner = _Owner(_store.take(-(-nbytes // UNIT) * UNIT))
    line = np.asarray(owner)
    del owner.__array_interface__
    return line[:nbytes].view(dtype).reshape(shape)


class _Store:
    """The blocks that wait.

    An owner may end at any moment, also while this thread works here: the collection of garbage comes between two lines
    of Python. So a block comes back through a queue, and whoever has the lock empties the queue.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.forget()

    def forget(self) -> None:
        """Start with no blocks, as in a forked child, where another thread of the parent may hold the lock for ever."""
        self._lock = threading.Lock()
        self._returned: deque[Array] = deque()
        self._waiting: dict[int, Array] = {}  # the oldest first

    def take(self, size: int) -> Array:
        """Return a block of `size` bytes."""
        try:
            with self._lock:
                self._drain()
                for key in reversed(self._waiting):
                    if self._waiting[key].nbytes == size:
                        return self._waiting.pop(key)
        finally:
            self._settle()
        memory = np.empty(size + LINE, np.uint8)
        first = -memory.ctypes.data % LINE
        return memory[first : first + size]

    def give(self, block: Array) -> None:
        """Take a block back, from any thread."""
        self._returned.append(block)
        self._settle()

    def set_limit(self, limit: int) -> int:
        with self._lock:
            before, self.limit = self.limit, limit
            self._drain()
        self._settle()
        return before

    def free(self) -> int:
        with self._lock:
            self._drain()
            freed, self._waiting = self._waiting, {}
        self._settle()
        return sum(block.nbytes for block in freed.values())

    def _settle(self) -> None:
        """Empty the queue, unless somebody else is here, who will."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def _drain(self) -> None:
        """Move the blocks of the queue to those that wait, and drop the oldest above the limit; under the lock."""
        while self._returned:
            block = self._returned.popleft()
            self._waiting[id(block)] = block
        total = sum(block.nbytes for block in self._waiting.values())
        while total > self.limit:
            total -= self._waiting.pop(next(iter(self._waiting))).nbytes


_store = _Store(LIMIT)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_store.forget)


class _Owner:
    """The base of a result: while anything refers to it, the block is in use.

    One array is made of an owner, and then no other can be. Otherwise, where an owner is part of a cycle of garbage,
    another finalizer of the cycle could make an array after `__del__`.
    """

    __slots__ = ("__array_interface__", "_block")

    def __init__(self, block: Array) -> None:
        self._block = block
        place = block.ctypes.data, False
        self.__array_interface__ = {"version": 3, "shape": block.shape, "typestr": "|u1", "data": place}

    def __del__(self) -> None:
        _store.give(self._block)

"""The thread pool of the CPU kernels. The number of threads is the one global of arraybn; it changes no bits."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

from .._checks import as_integer


def get_num_threads() -> int:
    """Return the number of threads that the CPU kernels use.

    Returns
    -------
    int
        Unless set: the cores that this process may run on, at most the machine's shared among the ranks that mpirun has
        put on it, and at most OMP_NUM_THREADS where that is set.

    Examples
    --------
    >>> import arraybn
    >>> arraybn.get_num_threads() >= 1
    True
    """
    if _pool.threads is None:
        _pool.threads = _default_threads()
    return _pool.threads


def set_num_threads(threads: int) -> None:
    """Set the number of threads that the CPU kernels use in this process. No bit of a result depends on this number.

    Parameters
    ----------
    threads : int
        At least 1, which is the calling thread alone.

    Raises
    ------
    TypeError, ValueError
        `threads` is no integer, or below 1.

    Examples
    --------
    >>> import arraybn
    >>> before = arraybn.get_num_threads()
    >>> arraybn.set_num_threads(1)
    >>> arraybn.get_num_threads()
    1
    >>> arraybn.set_num_threads(before)
    """
    _pool.resize(as_integer("threads", threads, 1))


def run(work: Callable[[int], None], items: Iterable[int]) -> None:
    """Call `work` once with each item, in that order but on all threads at once; raise the first error of `work`.

    The calling thread works too and never waits for a helper that has not begun, so any number of threads may call.
    """
    items = list(items)
    helpers = min(get_num_threads(), len(items)) - 1
    if helpers < 1:
        for item in items:
            work(item)
        return
    queue = iter(items)  # next() of a list's iterator is one step under the GIL

    def drain() -> None:
        try:
            for item in queue:
                work(item)
        except BaseException:
            for _ in queue:  # drain the queue so that the helpers stop
                pass
            raise

    futures = _pool.submit(drain, helpers)
    try:
        drain()
    finally:
        running = [future for future in futures if not future.cancel()]
        wait(running)
    for future in running:
        future.result()


class _Pool:
    """The helper threads: one thread fewer than the kernels use."""

    def __init__(self) -> None:
        self.threads: int | None = None
        self.forget()

    def forget(self) -> None:
        """Start with no threads, as in a forked child, where the threads of the parent do not exist."""
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._size = 0

    def resize(self, threads: int) -> None:
        """Use `threads` threads from now on; running calls keep their threads."""
        with self._lock:
            self.threads = threads
            if self._executor is not None and threads - 1 != self._size:
                self._executor.shutdown(wait=False)
                self._executor = None

    def submit(self, function: Callable[[], None], copies: int) -> list[Future[None]]:
        with self._lock:
            if self._executor is None or self._size < copies:
                if self._executor is not None:
                    self._executor.shutdown(wait=False)
                self._size = max(copies, get_num_threads() - 1)
                self._executor = ThreadPoolExecutor(self._size, "arraybn")
            futures: list[Future[None]] = []
            with suppress(RuntimeError):  # at the end of the interpreter, or where the system has no more threads
                futures.extend(self._executor.submit(function) for _ in range(copies))
            return futures


_pool = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.forget)


def _default_threads() -> int:
    """Return the cores of this process, or its share of the machine's cores where several ranks run on the machine."""
    machine = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    ranks = _positive("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE") or 1
    limit = _positive("OMP_NUM_THREADS") or mine
    return max(1, min(mine, machine // ranks, limit))


def _positive(*names: str) -> int | None:
    """Return the first of these environment variables that is a number ≥ 1."""
    for value in map(os.environ.get, names):
        if value is not None and value.isdecimal() and int(value) >= 1:
            return int(value)
    return None

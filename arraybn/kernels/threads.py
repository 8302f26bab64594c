"""The threads of the CPU kernels. Their number is the one global of arraybn; it changes no bits.

A helper thread waits for jobs in compiled code, without the GIL, and begins one half a microsecond after a caller has
made the job known; to wake a thread takes a hundred times as long. Once it has waited for `SPIN` seconds in vain, a
helper sleeps. The hand-over itself is in ``cpu/jobs.py``.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from .._arrays.namespaces import Array
from .._checks import as_integer

SPIN = 100e-6  # seconds; with 50e-6 helpers slept through most calls on 2 MB of data in a loop
WAKE = 2**19  # bytes of data from which it pays to wake helpers, who begin some 35 µs later
CLOSE = 1.2  # times SPIN: a helper that is woken when a job begins is still awake when the next one does
# The words of memory that the threads share: BUSY and RUNNING, which many threads write, have cache lines of their own.
BUSY, OPEN, STOP, FUNCTION, ARGUMENTS, JOBS, CREW, RUNNING, ASLEEP = 0, 8, 9, 10, 11, 12, 13, 16, 24
ALONE = np.zeros(0, np.int64)  # the words of a caller without helpers
Serve = Callable[[Array, int, int], bool]


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
    if _state.threads is None:
        _state.threads = _default_threads()
    return _state.threads


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
    _state.threads = as_integer("threads", threads, 1)


def helpers(serve: Serve, size: int, parts: int) -> Array:
    """Return the words that a caller shares with its helpers; wake a helper for each part but the first, if that pays.

    Helpers are woken if the job has `size` bytes enough, or if the latest job began so shortly before that helpers who
    spin will be there for the next ones, although they come too late for this one.

    `serve(words, me, looks)` is compiled. Thread `me` does its part of jobs there until none was found at so many looks
    in a row, and then sets its word after `ASLEEP` and returns True; or until `STOP` is set, and returns False.
    """
    crew = _state.crew
    if crew is None or crew.size != get_num_threads() - 1:
        crew = _state.renew(serve)
    now = time.perf_counter()
    if size >= WAKE or now - crew.latest < crew.close:
        crew.wake(parts - 1)
    crew.latest = now
    return crew.words


class _Crew:
    """Helper threads and the words that they share with their callers."""

    def __init__(self, serve: Serve, size: int) -> None:
        self.size, self.words, self.latest = size, ALONE, 0.0
        spin = SPIN if get_num_threads() * _ranks() <= _cores() else 0.0
        self.close = CLOSE * spin
        self._gates: list[Any] = []
        self._threads: list[threading.Thread] = []
        if size == 0:
            return
        words = np.zeros(ASLEEP + size + 9, np.int64)
        self.words = words[-words.ctypes.data % 64 // 8 :]  # from the beginning of a cache line on
        self.words[CREW] = size + 1
        looks = _looks(serve, spin)
        with suppress(RuntimeError):  # at the end of the interpreter, or where the system has no more threads
            for me in range(1, size + 1):
                gate = threading.Lock()
                gate.acquire()
                thread = threading.Thread(target=self._help, args=(serve, me, looks, gate), daemon=True)
                thread.start()
                self._gates.append(gate)
                self._threads.append(thread)

    def _help(self, serve: Serve, me: int, looks: int, gate: Any) -> None:
        while serve(self.words, me, looks):
            gate.acquire()

    def wake(self, number: int) -> None:
        """Let the first helpers, as many as that, look for jobs again if they sleep."""
        for word, gate in enumerate(self._gates[:number], ASLEEP + 1):
            if self.words[word]:
                self.words[word] = 0
                with suppress(RuntimeError):  # another caller was faster
                    gate.release()

    def stop(self) -> None:
        """Wait until the helpers have done what they are at, and have ended."""
        if self.size:
            self.words[STOP] = 1
        for thread in self._threads:
            while thread.is_alive():
                self.wake(self.size)
                thread.join(1e-3)


class _State:
    """The number of threads, None until asked for, and the helpers, who are there from the first job on."""

    threads: int | None = None

    def __init__(self) -> None:
        self.forget()
        self._ended = False

    def forget(self) -> None:
        """Start without helpers, as in a forked child, where the threads of the parent do not exist."""
        self._lock = threading.Lock()
        self.crew: _Crew | None = None

    def renew(self, serve: Serve) -> _Crew:
        """Return as many helpers as there should be now, and stop those of another number."""
        with self._lock:
            size = 0 if self._ended else get_num_threads() - 1
            old = self.crew
            if old is None or old.size != size:
                self.crew = _Crew(serve, size)
                if old is not None:
                    old.stop()
            assert self.crew is not None
            return self.crew

    def end(self) -> None:
        """Stop the helpers before the interpreter takes away their compiled code."""
        with self._lock:
            self._ended = True
            if self.crew is not None:
                self.crew.stop()
                self.crew = _Crew(lambda *_: False, 0)


_state = _State()
atexit.register(_state.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_state.forget)


def _looks(serve: Serve, seconds: float) -> int:
    """Return the number of looks that take so long."""
    words, times = np.zeros(ASLEEP + 1, np.int64), []
    serve(words, 0, 1)  # perhaps compiled now
    for _ in range(10):  # the fastest counts: other threads may interrupt this one
        start = time.perf_counter()
        serve(words, 0, 500)
        times.append(time.perf_counter() - start)
    return 1 + int(500 * seconds / min(times))


def _default_threads() -> int:
    """Return the cores of this process, or its share of the machine's cores where several ranks run on the machine."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _cores()
    limit = _positive("OMP_NUM_THREADS") or mine
    return max(1, min(mine, _cores() // _ranks(), limit))


def _cores() -> int:
    return os.cpu_count() or 1


def _ranks() -> int:
    """Return the number of ranks that mpirun has put on this machine."""
    return _positive("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE") or 1


def _positive(*names: str) -> int | None:
    """Return the first of these environment variables that is a number ≥ 1."""
    for value in map(os.environ.get, names):
        if value is not None and value.isdecimal() and int(value) >= 1:
            return int(value)
    return None

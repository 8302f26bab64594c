"""mpi4py: a channel beside the user's communicator, and waiting with a time limit. No other file imports it.

Importing it initializes MPI, so this happens in the first synchronized call and not before.
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .._arrays.namespaces import Array, class_name
from . import FORKED, Comm, SyncError, frames

# How launchers tell a process how many of them there are.
LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PALS_SIZE")


def _mpi() -> Any:
    """mpi4py.MPI, initialized; None where it is missing."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # RuntimeError: mpi4py is there, and no MPI library
        return None
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise SyncError("MPI has been finalized, or has not been initialized; synchronizing needs it")
    return MPI


def world() -> Comm | None:
    """All ranks, or None without MPI."""
    mpi = _mpi()
    if mpi is None:
        _check_alone("mpi4py cannot be imported")
        return None
    return mpi.COMM_WORLD


def check(name: str, comm: object) -> None:
    """Raise unless `comm` is a communicator that can be synchronized over."""
    if not (hasattr(comm, "Idup") and hasattr(comm, "Iallreduce")):
        raise TypeError(f"{name}: expected an mpi4py communicator, or None for the world; got {class_name(comm)}")
    mpi = _mpi()
    if comm == mpi.COMM_NULL or comm.Is_inter():  # type: ignore[attr-defined]
        kind = "COMM_NULL" if comm == mpi.COMM_NULL else "an intercommunicator"
        raise ValueError(f"{name}: expected an intracommunicator; got {kind}. Only None means the world")


def _check_alone(reason: str) -> None:
    """Raise if a launcher says that there are several processes."""
    for name in LAUNCHERS:
        if (size := os.environ.get(name, "")).isdigit() and int(size) > 1:
            raise SyncError(
                f"synchronizing over {size} processes ({name}={size}), but {reason}: each would train alone."
                " Install mpi4py for the MPI whose mpirun starts the processes (python -m arraybn info shows both),"
                " or use the mpirun of the MPI that mpi4py was built for"
            )


def channel(name: str, comm: Comm, make: Callable[[Reducer], Any]) -> Any:
    """What `make` made of our own duplicate of `comm`, cached on it; None if it has one rank.

    Nothing of ours travels on the user's communicator, where it could meet a collective of the user's.
    """
    if not hasattr(comm, "Get_attr") or comm == _mpi().COMM_NULL:
        check(name, comm)
    if (found := comm.Get_attr(_key())) is None:
        check(name, comm)
        found = _alone(comm) if comm.size == 1 else _duplicated(comm, make)
    return None if found is _ALONE else found


def _alone(comm: Comm) -> object:
    mpi = _mpi()
    if mpi.COMM_WORLD.size == 1 and mpi.Comm.Compare(comm, mpi.COMM_SELF) != mpi.IDENT:
        _check_alone("MPI's world has one rank here, because mpi4py was built for another MPI")
    comm.Set_attr(_key(), _ALONE)
    return _ALONE


def _duplicated(comm: Comm, make: Callable[[Reducer], Any]) -> Any:
    if FORKED:
        raise SyncError(
            "this is a forked child of a process that had initialized MPI, and is no rank; synchronize in that process"
            " alone, or start others with multiprocessing's spawn"
        )
    with _creating:
        if (found := comm.Get_attr(_key())) is None:
            duplicate, request = comm.Idup()
            found = make(Reducer(duplicate, request, comm.rank, comm.size))
            comm.Set_attr(_key(), found)
    return found


_ALONE = object()  # in the place of a channel
_creating = threading.RLock()


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    """`make`, which is called once, also where two threads ask at the same time."""
    made: list[Any] = []

    @functools.wraps(make)
    def get() -> Any:
        with _creating:
            if not made:
                made.append(make())
        return made[0]

    return get


@_once
def _key() -> int:
    """The key of our attribute on communicators; a user's own duplicate does not inherit it."""
    return int(_mpi().Comm.Create_keyval(delete_fn=_freed))


def _freed(comm: Comm, key: int, channel: Any) -> None:
    """The user frees a communicator."""
    if channel is not _ALONE:
        channel.reducer.free()


@_once
def _op() -> Any:
    """`frames.combine` as MPI's operation: one for all frames, because mpi4py has room for few in a process.

    Declared not commutative, so that MPI combines in the order of the ranks, the same in every run, and does not choose
    an algorithm that cuts a message into parts, of which we have one. All ranks then have the same bits, as the MPI
    standard asks, with every algorithm of Open MPI and MPICH but one that must be asked for: MPICH's recexch with
    k > 2. The next call would notice it, by the checksum of results in the header.
    """
    return _mpi().Op.Create(_combine, commute=False)


# ---- Interrupts, which an exchange holds back ------------------------------------------------------------------------

_interrupts: list[BaseException] = []  # of the main thread, which alone runs handlers of signals


def _note(number: int, stack: object) -> None:
    _interrupts.append(KeyboardInterrupt())


def _hold_interrupts() -> bool:
    """Have Ctrl-C noted instead of raised, because it may come just as MPI calls `_combine`.

    False in other threads than the main one, and where its handler is not Python's own.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, _note):
        return False
    signal.signal(signal.SIGINT, _note)
    return True


def _raise_interrupt() -> None:
    """Raise what was held back, in the thread that it came to."""
    if _interrupts and threading.current_thread() is threading.main_thread():
        interrupt = _interrupts.pop()
        _interrupts.clear()
        raise interrupt


def _combine(a: Any, b: Any, datatype: Any) -> None:
    """An exception in here would end the job, so what handlers of signals raise waits until the exchange is over."""
    if len(b) == 0:  # of a message that was cut: its other parts have no bytes
        return
    theirs, together = np.frombuffer(b, np.uint8), None
    while together is None:
        try:
            together = frames.combine(a, theirs.copy())
        except BaseException as interrupt:  # Ctrl-C, SystemExit on SIGTERM, …
            if isinstance(interrupt, MemoryError) or len(_interrupts) > 99:  # no interrupt: it would come for ever
                raise
            _interrupts.append(interrupt)
    theirs[:] = together


@functools.lru_cache(maxsize=64)
def _whole(length: int) -> Any:
    """A datatype of so many bytes, so that MPI cannot cut a frame into pieces."""
    return _mpi().BYTE.Create_contiguous(length).Commit()


_yield: Callable[[], object] = getattr(os, "sched_yield", lambda: time.sleep(0))


class Reducer:
    """What the protocol needs of MPI, each under a time limit: TimeoutError, or ConnectionError if MPI fails."""

    def __init__(self, comm: Comm, request: Any, rank: int, size: int) -> None:
        self._comm, self._duplicating = comm, request
        self.rank, self.size = rank, size
        self._holding = False  # whether Ctrl-C is noted only

    def open(self, deadline: float | None) -> None:
        """Wait, once, until all ranks have duplicated the communicator; from now on Ctrl-C is held back."""
        self._holding = _hold_interrupts()
        if self._duplicating is not None:
            self._run(lambda: self._duplicating, deadline)
            self._duplicating = None
            self._comm.Set_errhandler(_mpi().ERRORS_RETURN)

    def allreduce(self, frame: Array, deadline: float | None) -> None:
        """Replace the frame by that of all ranks together."""
        mpi = _mpi()
        message = [frame, 1, _whole(frame.nbytes)]
        self._run(lambda: self._comm.Iallreduce(mpi.IN_PLACE, message, _op()), deadline, frame)

    def add(self, numbers: Array, deadline: float | None) -> None:
        """Replace float64 numbers by their sums over the ranks."""
        self._run(lambda: self._comm.Iallreduce(_mpi().IN_PLACE, numbers, _mpi().SUM), deadline, numbers)

    def broadcast(self, octets: Array, deadline: float | None) -> None:
        """Replace bytes by those of rank 0."""
        self._run(lambda: self._comm.Ibcast(octets, 0), deadline, octets)

    def allgather(self, text: bytes, deadline: float | None) -> list[bytes]:
        """The texts of all ranks, which are of one length."""
        found = bytearray(len(text) * self.size)
        self._run(lambda: self._comm.Iallgather(text, found), deadline, text, found)
        return [bytes(found[start : start + len(text)]) for start in range(0, len(found), len(text))]

    def _run(self, start: Callable[[], Any], deadline: float | None, *buffers: Any) -> None:
        """Poll, giving the processor away at first and sleeping after 5 ms.

        With more ranks than cores a bare loop keeps the rank that is waited for from running. A request that is given
        up is kept alive with its buffers, because MPI may still write into them.
        """
        kept: list[Any] = [buffers]
        _under_way[id(kept)] = kept  # before MPI hears of them: an interrupt may come as soon as it does
        try:
            started, request = time.monotonic(), start()
            kept.append(request)
            while not request.Test():
                now = time.monotonic()
                if deadline is not None and now > deadline:
                    raise TimeoutError
                if now - started < 0.005:
                    _yield()
                else:
                    if now - started > 0.5:  # the others may have been about to come, and nothing would be lost
                        _raise_interrupt()
                    time.sleep(min((now - started) / 100, 0.001))
        except BaseException as error:
            failed = isinstance(error, _mpi().Exception)
            if failed and len(kept) == 1:
                del _under_way[id(kept)]  # MPI has refused to begin
            else:
                _give_up(kept)
            if failed:
                raise ConnectionError(str(error)) from error
            raise
        del _under_way[id(kept)]

    def close(self) -> None:
        """Raise an interrupt that came meanwhile; Ctrl-C raises again."""
        if self._holding:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._holding = False
        _raise_interrupt()

    def free(self) -> None:
        """Free the duplicate, when the user frees the communicator."""
        if self._duplicating is None and not _given_up:
            self._comm.Free()


_under_way: dict[int, Any] = {}  # requests and their buffers, by id
_given_up: list[Any] = []


def _give_up(kept: Any) -> None:
    """Keep a request that will not complete, with its buffers, and see to it that the job ends with this process.

    mpi4py does not keep the buffers of all requests alive: an Iallreduce into an array that was dropped writes into
    whatever has taken its place.
    """
    if not _given_up:
        atexit.register(_end_job, os.getpid())
    _given_up.append(kept)


def _end_job(pid: int) -> None:
    """MPI_Finalize would wait for the missing rank for ever."""
    from mpi4py import MPI

    if os.getpid() == pid and not MPI.Is_finalized():
        sys.stdout.flush()
        print("arraybn: a synchronized call was given up; ending all ranks", file=sys.stderr, flush=True)
        time.sleep(0.2)  # for the launcher to pass on what was printed, before it ends everything
        MPI.COMM_WORLD.Abort(1)

"""MPI through mpi4py: an exchange beside the user's communicator, and waiting with a time limit.

No other file imports mpi4py. Importing mpi4py.MPI initializes MPI, so `_mpi` does it in the first synchronized call.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._arrays.namespaces import Array, class_name
from . import frames, roll, ulfm
from .errors import SyncError
from .exchange import Comm, Exchange
from .process import check_alone, check_not_forked, check_rank
from .roll import RollCallError


def _mpi() -> Any:
    """Return mpi4py.MPI, initialized; None where mpi4py or its MPI library is missing."""
    check_rank()  # before the import, which ends a child
    mpi: Any = sys.modules.get("mpi4py.MPI")  # faster than an import
    if mpi is None:
        try:
            mpi = importlib.import_module("mpi4py.MPI")
        except (ImportError, RuntimeError):  # mpi4py raises a RuntimeError where there is no MPI library
            return None
    if not mpi.Is_initialized() or mpi.Is_finalized():
        raise SyncError("MPI has been finalized, or has not been initialized; synchronizing needs it")
    return mpi


def world() -> Comm | None:
    """Return the communicator of all ranks, or None without MPI."""
    mpi = _mpi()
    if mpi is None:
        check_alone("mpi4py cannot be imported")
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


def is_failure(error: BaseException) -> bool:
    """Return True for an exception that MPI has raised."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and isinstance(error, mpi.Exception)


# ---- The exchange of a communicator, kept as an attribute of the communicator ----------------------------------------


def exchange_over(name: str, comm: Comm) -> Exchange | None:
    """Return the exchange over our own duplicate of `comm`, made in the first call; None where `comm` has one rank.

    Nothing of ours travels on the user's communicator, where a frame could meet a collective of the user's.
    """
    if not hasattr(comm, "Get_attr") or comm == _mpi().COMM_NULL:
        check(name, comm)
    if (found := comm.Get_attr(_key())) is None:
        check(name, comm)
        found = _alone(comm) if comm.size == 1 else _duplicated(comm)
    return None if found is _ALONE else found


def _alone(comm: Comm) -> object:
    mpi = _mpi()
    if mpi.COMM_WORLD.size == 1 and mpi.Comm.Compare(comm, mpi.COMM_SELF) != mpi.IDENT:
        check_alone("MPI's world has one rank here, because mpi4py was built for another MPI")
    comm.Set_attr(_key(), _ALONE)
    return _ALONE


def _duplicated(comm: Comm) -> Any:
    check_not_forked()
    with _creating:
        if (found := comm.Get_attr(_key())) is None:
            _op()  # compile before the time limit of the first call begins
            found = Exchange(Reducer(comm))
            comm.Set_attr(_key(), found)
    return found


_ALONE = object()  # in the place of an exchange
_creating = threading.RLock()


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that calls `make` once and keeps the result, also where two threads ask at the same time."""
    made: list[Any] = []

    @functools.wraps(make)
    def get() -> Any:
        if made:
            return made[0]
        with _creating:
            if not made:
                made.append(make())
        return made[0]

    return get


@_once
def _key() -> int:
    """Return the key of our attribute on communicators, which a duplicate made by the user does not inherit."""
    return int(_mpi().Comm.Create_keyval(delete_fn=_freed))


def _freed(comm: Comm, key: int, exchange: Any) -> None:
    if exchange is not _ALONE:
        exchange.reducer.free()


@_once
def _op() -> Any:
    """Return `frames.combine` as an operation of MPI: one for all frames, because mpi4py allows 32 in a process.

    The operation is declared not commutative. MPI then combines in the order of the ranks, the same in every run, and
    chooses no algorithm that cuts a message into parts, since a frame is a message of one element. All ranks then have
    the same bits, as the MPI standard asks, with every algorithm of Open MPI and MPICH except MPICH's recexch with
    k > 2, which a user must choose. The next call would notice different bits by the checksum in the header.

    Without Numba, MPI calls Python, with the same bits.
    """
    return _compiled_op() or _mpi().Op.Create(_combine, commute=False)


_kept: list[Any] = []  # the compiled function, which MPI calls


def _compiled_op() -> Any:
    """Return the compiled twin of `frames.combine` as an operation; None without Numba or with an unusual MPI.

    mpi4py makes operations of functions in Python only. So the library that mpi4py has loaded is called here, and
    writes the handle of the new operation into an object of mpi4py.
    """
    mpi = _mpi()
    try:
        from . import compiled

        create = ctypes.CDLL(mpi.__file__).MPI_Op_create  # a symbol is looked for in the libraries behind a file too
    except (ImportError, OSError, AttributeError):
        return None
    if (combine := compiled.callback()) is None:
        return None
    op = mpi.Op()
    create.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
    if create(combine.address, 0, mpi._addressof(op)) != mpi.SUCCESS:
        return None
    _kept.append(combine)
    return op


# ---- Interrupts, held back during an exchange ------------------------------------------------------------------------

_interrupts: list[BaseException] = []  # of the main thread, the only one that runs handlers of signals


# In `signal`, each call looks for a name of the handler, which costs more than an allreduce.
_signal: Any = importlib.import_module("_signal" if importlib.util.find_spec("_signal") else "signal")
_SIGINT = int(signal.SIGINT)


def _note(number: int, stack: object) -> None:
    _interrupts.append(KeyboardInterrupt())


def _hold_interrupts() -> bool:
    """Note Ctrl-C instead of raising, because an exception while MPI calls `_combine` would end the job.

    Return False, and change nothing, in a thread that is not the main one and where the handler is not Python's own.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return False
    if _signal.getsignal(_SIGINT) not in (signal.default_int_handler, _note):
        return False
    _signal.signal(_SIGINT, _note)
    return True


def _raise_interrupt() -> None:
    """Raise the interrupt that was held back, in the main thread alone."""
    if _interrupts and threading.current_thread() is threading.main_thread():
        interrupt = _interrupts.pop()
        _interrupts.clear()
        raise interrupt


def _combine(a: Any, b: Any, datatype: Any) -> None:
    """Combine frames for MPI. An exception would end the job, so interrupts wait until the exchange is over."""
    if len(b) == 0:  # a part of a message that MPI has cut: one part has all bytes
        return
    theirs, together = np.frombuffer(b, np.uint8), None
    while together is None:
        try:
            together = frames.combine(a, theirs.copy())
        except BaseException as interrupt:  # Ctrl-C, SystemExit on SIGTERM, …
            if isinstance(interrupt, MemoryError) or len(_interrupts) > 99:  # an error that would be raised for ever
                raise
            _interrupts.append(interrupt)
    theirs[:] = together


@functools.lru_cache(maxsize=64)
def _whole(length: int) -> Any:
    """Return a datatype of `length` bytes, so that a frame is one element, which MPI cannot cut."""
    return _mpi().BYTE.Create_contiguous(length).Commit()


_yield: Callable[[], object] = getattr(os, "sched_yield", lambda: time.sleep(0))


def _wait(request: Any, deadline: float | None, listen: Callable[[], bool]) -> bool:
    """Poll, giving the processor away at first; after 5 ms sleep, and `listen` for a roll call. Return True after that.

    Where there are more ranks than cores, a bare loop would keep the awaited rank from running.
    """
    started, slept = time.monotonic(), False
    while not (request.Test() or request.Test() or request.Test()):
        now = time.monotonic()
        if deadline is not None and now > deadline:
            raise TimeoutError
        if now - started < 0.005:
            _yield()
            continue
        if listen():
            raise RollCallError(late=not slept)
        slept = True
        if now - started > 0.5:  # before, the awaited ranks may still come, and then no call is lost
            _raise_interrupt()
        time.sleep(min((now - started) / 100, 0.001))
    return slept


_ROLL_CALL = 1  # the tag of its messages


_HINT = (
    f"Under Open MPI, started as {ulfm.COMMAND}, the other ranks can go on when a rank dies (docs/how-to/lost-rank.md)"
)


@_once
def _fault_tolerant() -> bool:
    """Return True where the other ranks can go on when a rank dies; prepare the end of this process for that."""
    if found := ulfm.is_on(_mpi()):
        ulfm.end_without_finalize(_mpi())
    return found


@_once
def _looks_twice() -> bool:
    """Return True where the first look for a message may only fetch the message, as with MPICH."""
    return "Open MPI" not in _mpi().Get_library_version()


class Reducer:
    """The operations of the protocol over MPI, which are polled until a deadline."""

    def __init__(self, users: Comm) -> None:
        self._comm: Comm
        self._duplicating: Any
        self.rank, self.size = users.rank, users.size
        self.recovery = self if _fault_tolerant() else None
        self.hint = _HINT if self.recovery is None else ""
        self._holding = False  # True while Ctrl-C is held back
        self._frame: Any = None  # the last one, and what an Iallreduce of it is called with
        self._message: Any = None
        self._any_rank = _mpi().ANY_SOURCE
        self._agreed = False  # True where this rank has taken part in an agreement that failed
        self._users = users
        try:
            self._comm, self._duplicating = users.Idup()
        except _mpi().Exception as error:
            if self.recovery is None:
                raise
            self._comm, self._duplicating = None, error

    def open(self, deadline: float | None) -> None:
        """Hold Ctrl-C back; the first time, wait until all ranks have duplicated the communicator."""
        self._holding = _hold_interrupts()
        if self._duplicating is not None:
            self._run(self._duplicate, deadline)
            self._comm.Set_errhandler(_mpi().ERRORS_RETURN)
            if self.recovery is not None:
                self.agree(deadline)  # or a rank could wait on a duplicate that another rank does not have
            self._duplicating = None

    def _duplicate(self) -> Any:
        if isinstance(self._duplicating, Exception):
            raise self._duplicating
        return self._duplicating

    def allreduce(self, frame: Array, deadline: float | None) -> None:
        """Replace the frame by that of all ranks together."""
        if frame is not self._frame:  # an exchange has one frame for all layers of at most 256 channels
            self._message = _mpi().IN_PLACE, [frame, 1, _whole(frame.nbytes)], _op()
            self._frame = frame
        self._run(self._start_frame, deadline, frame)

    def _start_frame(self) -> Any:
        return self._comm.Iallreduce(*self._message)

    def add(self, numbers: Array, deadline: float | None) -> None:
        """Replace float64 numbers by their sums over the ranks."""
        self._run(lambda: self._comm.Iallreduce(_mpi().IN_PLACE, numbers, _mpi().SUM), deadline, numbers)

    def broadcast(self, octets: Array, deadline: float | None) -> None:
        """Replace bytes by those of rank 0."""
        self._run(lambda: self._comm.Ibcast(octets, 0), deadline, octets)

    def allgather(self, text: bytes, deadline: float | None) -> list[bytes]:
        """Return the texts of all ranks, which have one length."""
        found = bytearray(len(text) * self.size)
        self._run(lambda: self._comm.Iallgather(text, found), deadline, text, found)
        return [bytes(found[start : start + len(text)]) for start in range(0, len(found), len(text))]

    def _run(self, start: Callable[[], Any], deadline: float | None, *buffers: Any) -> None:
        """Start a request and wait. If the wait fails, keep the request and its buffers: MPI may still write there."""
        kept: list[Any] = [buffers]
        _under_way[id(kept)] = kept  # before the request starts: an interrupt may follow at once
        try:
            kept.append(request := start())
            slept = not request.Test() and _wait(request, deadline, self._hears_roll_call)
            if self._duplicating is None:  # there is a channel
                # Ranks that gave up had sent their part, so nothing else tells of them.
                look, any_rank = self._comm.Iprobe, self._any_rank
                if look(any_rank, _ROLL_CALL) or (_looks_twice() and look(any_rank, _ROLL_CALL)):
                    raise RollCallError(late=not slept)
        except BaseException as error:
            failed = isinstance(error, _mpi().Exception)
            if failed and len(kept) == 1:
                del _under_way[id(kept)]  # MPI has refused to start the request
            elif not (failed and self.recovery):
                _give_up(kept)
            if failed:
                raise ConnectionError(str(error)) from error
            raise
        del _under_way[id(kept)]

    def _hears_roll_call(self) -> bool:
        """Return True if another rank has called the roll; False as long as there is no channel.

        An agreement is not disturbed: its result is the same on all ranks, and must not become an error on one.
        """
        return self._duplicating is None and not self._agreed and self._comm.Iprobe(self._any_rank, _ROLL_CALL)

    def call_roll(self, answer: bytes, seconds: float) -> dict[int, bytes]:
        """Tell all ranks that this rank gives up; return the answers that come within `seconds`, with its own."""
        if self._duplicating is not None:
            return {}
        mpi, found, until = _mpi(), {self.rank: answer}, time.monotonic() + seconds
        with contextlib.suppress(mpi.Exception):  # then what has been heard has to do
            _given_up.append(answer)
            others = set(range(self.size)) - {self.rank}
            _given_up.extend(self._comm.Isend([answer, mpi.BYTE], rank, _ROLL_CALL) for rank in others)
            while len(found) < self.size:
                if heard := self._heard():
                    found.update([heard])
                    until = min(until, time.monotonic() + roll.seconds_of(heard[1]))
                elif time.monotonic() > until:
                    break
                else:
                    _raise_interrupt()
                    time.sleep(0.001)
        return found

    def _heard(self) -> tuple[int, bytes] | None:
        """Return the rank and the text of an answer that has come, or None."""
        mpi = _mpi()
        status, octets = mpi.Status(), bytearray(roll.LENGTH)
        if not self._comm.Iprobe(mpi.ANY_SOURCE, _ROLL_CALL, status):
            return None
        self._comm.Recv([octets, mpi.BYTE], status.Get_source(), _ROLL_CALL)
        return status.Get_source(), bytes(octets)

    def close(self) -> None:
        """Let Ctrl-C raise again, and raise an interrupt that was held back."""
        if self._holding:
            _signal.signal(_SIGINT, signal.default_int_handler)
            self._holding = False
        if _interrupts:
            _raise_interrupt()

    def free(self) -> None:
        """Free the duplicate, because the user frees the communicator."""
        if self._duplicating is None and not _given_up and not self._comm_is_revoked():
            self._comm.Free()

    # ---- A lost rank ----

    def agree(self, deadline: float | None) -> None:
        """Return on all ranks where every rank has come here without a failure, or raise on all ranks."""
        flag, comm = np.ones(1, np.intc), self._agreeing()
        self._agreed = True
        self._run(lambda: comm.Iagree(flag), deadline, flag)
        if not flag[0]:
            raise ConnectionError("the call failed on another rank")
        self._agreed = False

    def revoke(self) -> None:
        """Let every call of every rank over these ranks raise, those on the user's communicator too."""
        for comm in (self._users, self._agreeing()):
            with contextlib.suppress(_mpi().Exception):  # the user may have freed the communicator
                comm.Revoke()

    def recover(self, limit: float | None) -> tuple[Sequence[int], Comm]:
        """Return the ranks that have died, and a communicator of those that are left; a call of all that are left."""
        mpi, comm = _mpi(), self._agreeing()
        with ulfm.watched(limit, f"rank {self.rank}: to find out which ranks are left"):
            left = ulfm.shrunk(mpi, comm, self._agreed)
        return ulfm.missing(mpi, comm, left), left

    def _agreeing(self) -> Comm:
        """Return the communicator of agreements: the user's until all ranks have the duplicate."""
        return self._comm if self._duplicating is None else self._users

    def _comm_is_revoked(self) -> bool:
        return self.recovery is not None and bool(self._comm.Is_revoked())


_under_way: dict[int, Any] = {}  # requests and their buffers, by id
_given_up: list[Any] = []


def _give_up(kept: Any) -> None:
    """Keep a request that may not complete, with its buffers, and let the job end when this process exits.

    mpi4py does not keep the buffers of all requests alive: an Iallreduce into an array that was freed writes into the
    array that now has its memory.
    """
    if not _given_up:
        atexit.register(_end_job, os.getpid())
    _given_up.append(kept)


def _end_job(pid: int) -> None:
    """End all ranks, because MPI_Finalize would wait for the missing rank for ever."""
    from mpi4py import MPI

    if os.getpid() == pid and not MPI.Is_finalized():
        sys.stdout.flush()
        who = "this rank" if _fault_tolerant() else "all ranks"
        print(f"arraybn: a synchronized call was given up; ending {who}", file=sys.stderr, flush=True)
        if _fault_tolerant():
            ulfm.end(failed=True)  # the other ranks notice, and go on
        time.sleep(0.2)  # for the launcher to pass the printed line on before it ends all ranks
        MPI.COMM_WORLD.Abort(1)

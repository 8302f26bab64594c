"""The synchronized mode: the numbers per channel that a batch norm needs, pooled over the ranks of a communicator.

Every call is one exchange of frames (``frames.py``). Before it, everything that can fail has been done, and an error
goes to all ranks instead of the numbers; the same reduced header tells each of them whether they are in the same call.
MPI itself is in ``mpi.py``, which the first synchronized call imports; `arraybn.testing.ThreadComm` goes through the
same protocol.
"""

from __future__ import annotations

import numbers
import os
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np

from .._arrays.namespaces import Array
from . import frames
from .pooling import RankPool

Comm: TypeAlias = Any  # mpi4py.MPI.Intracomm, what wraps one, or a rank of arraybn.testing.ThreadComm
FORWARD, BACKWARD, AVERAGE, BROADCAST = frames.OPERATIONS
TIMEOUT = 600.0  # seconds, as in torch.distributed


class SyncError(RuntimeError):
    """Something is wrong on some rank; every rank of the communicator raises the same, and none has changed its state.

    The message names the ranks. On the rank where it happened, ``__cause__`` is the error itself.

    Examples
    --------
    >>> import numpy, arraybn
    >>> from arraybn.testing import ThreadComm
    >>> def work(comm):
    ...     shape = (2, 3) if comm.rank == 0 else (3,)
    ...     try:
    ...         arraybn.batch_norm(numpy.ones(shape), comm=comm)
    ...     except arraybn.SyncError as error:
    ...         return str(error)
    >>> for text in ThreadComm.run(2, work):
    ...     print(text)
    rank 1: x: expected at least 2 dimensions, (N, C, *S); got shape (3,)
    rank 1: x: expected at least 2 dimensions, (N, C, *S); got shape (3,)
    """


class SyncTimeoutError(SyncError, TimeoutError):
    """A rank did not come to a synchronized call within the time limit; the communicator cannot be used for more.

    The others may be waiting still. Over MPI all ranks are therefore ended (``MPI_Abort``) when this process exits.

    Examples
    --------
    >>> import numpy, arraybn
    >>> from arraybn.testing import ThreadComm
    >>> layer = arraybn.SyncBatchNorm(3, timeout=0.1)
    >>> def work(comm):
    ...     if comm.rank == 0:
    ...         layer.process_group = comm
    ...         layer(numpy.ones((2, 3)))
    >>> ThreadComm.run(2, work, leave=False)
    Traceback (most recent call last):
    ...
    arraybn.sync.SyncTimeoutError: rank 0 of 2 waited 0.1 s for the other ranks in ...
    """


class Reducer(Protocol):
    """What the protocol needs of MPI or of threads. All but the first two wait until `deadline`, on time.monotonic.

    They raise a TimeoutError then, and a ConnectionError where the other ranks cannot be reached.
    """

    rank: int
    size: int

    def open(self, deadline: float | None) -> None:
        """Wait until the ranks are connected; called before each exchange."""

    def allreduce(self, frame: Array, deadline: float | None) -> None:
        """Replace the frame by `frames.combine` over all ranks."""

    def add(self, numbers: Array, deadline: float | None) -> None:
        """Replace float64 numbers by their sums over all ranks."""

    def broadcast(self, octets: Array, deadline: float | None) -> None:
        """Replace bytes by those of rank 0."""

    def allgather(self, text: bytes, deadline: float | None) -> list[bytes]:
        """The texts of all ranks, which are of one length."""

    def close(self) -> None:
        """Raise an interrupt that was held back; called after each exchange."""


FORKED: list[int] = []  # this process, where it is a forked child of one that had imported mpi4py.MPI
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: FORKED.extend([os.getpid()] * ("mpi4py.MPI" in sys.modules)))
After: TypeAlias = Callable[[Reducer, float | None], Array]  # sends more in the same call, and returns the result


class Channel:
    """The calls on one communicator, one after the other."""

    def __init__(self, reducer: Reducer) -> None:
        self.reducer = reducer
        self.calls = 0
        self._bits = 0  # a checksum of all results, which have to be the same bits on all ranks
        self._broken = ""  # why no call can be made any more
        self._untold = ""  # the same, which the other ranks have yet to be told
        self._lock = threading.Lock()  # one thread at a time
        self._process = os.getpid()
        self._named = 0  # how many layers there have been, which does not depend on when they are collected
        self._layers: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()

    def check(self) -> None:
        """Raise if no call can be made."""
        if os.getpid() != self._process:
            raise SyncError(
                f"rank {self.reducer.rank}: this is a forked child, which is no rank; synchronize in process"
                f" {self._process} alone, or start others with multiprocessing's spawn"
            )
        if self._broken:
            raise SyncError(f"{self._broken}. Nothing more can be synchronized over this communicator")

    def name_of(self, layer: object) -> str:
        """What a layer without a path is called: its order of first use."""
        if layer not in self._layers:
            self._named += 1
            self._layers[layer] = self._named
        return f"unnamed layer {self._layers[layer]}"

    def fail_later(self, call: Call, error: BaseException) -> None:
        """After a failure behind the exchange, or an interrupt before it: the next frame tells the other ranks."""
        what = frames.text_of_error(error).rstrip(b"\0").decode(errors="ignore")[1:]
        if call.number:
            self._untold = f"after the exchange in {call} this rank alone failed, so that its state differs: {what}"
        else:
            self._untold = f"before the exchange in {call} this rank was interrupted: {what}"

    def exchange(
        self, call: Call, rows: Array, n: int = 0, error: BaseException | None = None, after: After | None = None
    ) -> tuple[Array, int]:
        """`rows` (2, C) and n of all ranks together, or an error on all of them; `after` goes on in the same call."""
        me, limit = f"rank {self.reducer.rank}", call.timeout
        deadline = None if limit is None else time.monotonic() + limit
        if not self._lock.acquire(timeout=-1 if limit is None else limit):
            raise SyncTimeoutError(f"{me}: another thread did not leave its call within {limit:g} s, in {call}")
        try:
            self.check()
            self.reducer.open(deadline)
            result = self._exchange(call, rows, n, error, after, deadline)
        except TimeoutError as late:
            self._broken = f"{me} gave up {call}"
            raise SyncTimeoutError(
                f"{me} of {self.reducer.size} waited {limit:g} s for the other ranks in {call}. Likely causes: a rank"
                " is in evaluation, has skipped this layer or its backward, has a batch less, was given another"
                " process_group, or has ended"
            ) from late
        except ConnectionError as failure:
            self._broken = f"{me}: {call} failed: {failure}"
            raise SyncError(self._broken) from failure
        except SyncError:
            raise
        except BaseException as failure:  # Ctrl-C while waiting
            self._broken = f"{me}: {type(failure).__name__} ended {call}"
            raise
        finally:
            try:
                self.reducer.close()
            finally:
                self._lock.release()
        return result

    def _exchange(
        self,
        call: Call,
        rows: Array,
        n: int,
        error: BaseException | None,
        after: After | None,
        deadline: float | None,
    ) -> tuple[Array, int]:
        reducer, channels = self.reducer, rows.shape[1]
        fields = call.fields(self.calls + 1, channels, self._bits)
        if self._untold:
            error = SyncError(self._untold)
        flags = (frames.ERROR if error else 0) | (frames.BROKEN if self._untold else 0)
        frame = frames.frame(fields, flags, n, rows[:, : frames.CHANNELS])
        reducer.allreduce(frame, deadline)
        self.calls += 1
        call.number = self.calls
        flags, total = frames.flags_and_n(frame)
        if flags:
            self._disagree(call, flags, channels, error, deadline)
        result = self._result(frame)[:, :channels]
        if channels > frames.CHANNELS:
            frame = frames.frame(fields, 0, n, rows[:, frames.CHANNELS :], channels - frames.CHANNELS)
            reducer.allreduce(frame, deadline)
            result = np.concatenate([result, self._result(frame)], axis=1)
        if after is not None:
            self._bits = zlib.crc32(after(reducer, deadline), self._bits)
        return result, total

    def _result(self, frame: Array) -> Array:
        numbers = frames.body(frame)
        frames.canonical(numbers)
        self._bits = zlib.crc32(frame, self._bits)
        return numbers

    def _disagree(
        self, call: Call, flags: int, channels: int, error: BaseException | None, deadline: float | None
    ) -> None:
        """Hear what every rank has to say, and raise it: the same on all."""
        length = frames.length_of_text(flags)
        own = frames.text_of_call(call.description(self.calls, channels, self._bits), length)
        texts = self.reducer.allgather(frames.text_of_error(error, length) if error else own, deadline)
        text = frames.message(texts, flags)
        call.alike = True
        if flags & frames.BROKEN:
            self._broken, self._untold = text, ""
        raise SyncError(text)


class Call:
    """One synchronized call, as a context: an error in it goes to all ranks, or breaks the channel if it is too late.

    `settings` are what the ranks have to agree on, by name. `of` is the number of the forward that a backward belongs
    to.
    """

    def __init__(
        self,
        channel: Channel,
        operation: str,
        layer: str,
        settings: Mapping[str, Any],
        *,
        batches: int | None = None,
        timeout: float | None = TIMEOUT,
        of: int = 0,
    ) -> None:
        self.channel, self.operation, self.layer = channel, operation, layer
        self.settings, self.batches, self.timeout, self.of = settings, batches, timeout, of
        self.number = 0  # of the exchange, once it has been made
        self.alike = False  # whether an error from now on is one that every rank sees

    def __str__(self) -> str:
        number = self.number or self.channel.calls + 1
        return f"the {self.operation} of {self.layer} (call {number} on this communicator)"

    def backward(self) -> Call:
        """The call of the backward of this forward."""
        options: dict[str, Any] = {"batches": self.batches, "timeout": self.timeout, "of": self.number}
        return Call(self.channel, BACKWARD, self.layer, self.settings, **options)

    def fields(self, number: int, channels: int, bits: int) -> tuple[int, ...]:
        """What the header says, in the order of `frames.FIELDS`."""
        settings = frames.word("\n".join(f"{name} {value}" for name, value in self.settings.items()))
        batches = -1 if self.batches is None else self.batches
        layer, operation = frames.word(self.layer), frames.code(self.operation)
        return frames.FORMAT, number, operation, layer, channels, settings, batches, self.of, bits

    def description(self, number: int, channels: int, bits: int) -> dict[str, Any]:
        """The same for people."""
        return {
            "operation": self.operation,
            "layer": self.layer,
            "channels": channels,
            **self.settings,
            "num_batches_tracked": self.batches,
            "call of the forward": self.of,
            "call": number,
            "checksum of all results": bits,
        }

    def __enter__(self) -> Call:
        self.channel.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or self.alike or isinstance(error, SyncError):
            return
        if self.number or not isinstance(error, Exception):
            self.channel.fail_later(self, error)
            return
        try:
            self.channel.exchange(self, np.zeros((2, 0)), error=error)
        except SyncError as told:
            raise told from error

    def pool(self, forward: RankPool | None = None) -> RankPool:
        """Return the pool of this call's ranks, with the host's statistics of the forward where there was one."""
        return RankPool(self, forward)

    def exchange(self, rows: Array, n: int = 0) -> tuple[Array, int]:
        """Return the rows (2, C) and n of all ranks together: moments pooled, other numbers summed."""
        return self.channel.exchange(self, rows, n)

    def broadcast(self, octets: Array) -> None:
        """Replace the bytes by those of rank 0."""

        def after(reducer: Reducer, deadline: float | None) -> Array:
            reducer.broadcast(octets, deadline)
            return octets

        self.channel.exchange(self, np.zeros((2, 0)), after=after)

    def add(self, weight: float, numbers: Array) -> float:
        """Replace the float64 numbers by their sums over all ranks; returns the sum of the weights."""

        def after(reducer: Reducer, deadline: float | None) -> Array:
            reducer.add(numbers, deadline)
            frames.canonical(numbers)
            return numbers

        rows, _ = self.channel.exchange(self, np.full((2, 1), weight), after=after)
        return float(rows[0, 0])


def said(value: Any) -> Any:
    """What is said of a value: a number as Python's float, so that 1 and numpy.float64(1) read the same on all ranks.

    Never an error, which would be one of this rank alone.
    """
    try:
        plain = isinstance(value, bool) or not isinstance(value, numbers.Real)
        return str(value if plain else float(value))
    except Exception:  # 10**400, or what cannot be printed
        return f"<{type(value).__name__}>"


def check_comm(name: str, comm: Comm | None) -> None:
    """Raise unless one can synchronize over `comm`, or it is None for the world."""
    if comm is not None and not isinstance(getattr(comm, "channel", None), Channel):
        from . import mpi

        mpi.check(name, comm)


def channel_of(name: str, comm: Comm | None) -> Channel | None:
    """The channel of a communicator, of the world where it is None; None where there is but one rank."""
    channel = getattr(comm, "channel", None)  # of a thread's
    if not isinstance(channel, Channel):
        from . import mpi

        if comm is None and (comm := mpi.world()) is None:
            return None
        channel = mpi.channel(name, comm, Channel)
    return None if channel is None or channel.reducer.size == 1 else channel


def begin(
    channel: Channel | None, operation: str, layer: object, settings: Mapping[str, Any], **options: Any
) -> Call | None:
    """A call of all ranks of a channel; None where there is but one. `layer` is a path, or a layer without one."""
    if channel is None:
        return None
    channel.check()
    return Call(channel, operation, layer if isinstance(layer, str) else channel.name_of(layer), settings, **options)

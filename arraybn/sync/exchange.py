"""The protocol: how the ranks of a communicator make one call together, and what becomes of an error on one of them.

A call is one exchange of frames (``frames.py``). Everything that can fail is done before it, and an error is sent to
all ranks in the place of the numbers. The reduced header of the frames tells every rank whether all ranks are in the
same call. A `Reducer` carries the frames, over MPI (``mpi.py``) or between threads (`arraybn.testing.ThreadComm`).
"""

from __future__ import annotations

import numbers
import os
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from .._arrays.namespaces import Array
from .._checks import as_number
from . import frames, roll
from .errors import RankLostError, SyncError, SyncTimeoutError
from .process import forked_child

Comm: TypeAlias = Any  # mpi4py.MPI.Intracomm or a wrapper of one, or a rank of arraybn.testing.ThreadComm
TIMEOUT = 600.0  # seconds, as in torch.distributed


def as_timeout(seconds: Any) -> float | None:
    """Return a time limit in seconds, or None for none; raise unless `seconds` is one."""
    if seconds is not None and not 0 < as_number("timeout", seconds) <= threading.TIMEOUT_MAX:
        raise ValueError(
            f"timeout: expected a number of seconds > 0 and ≤ {threading.TIMEOUT_MAX:g}, or None to wait for ever;"
            f" got {seconds!r}"
        )
    return None if seconds is None else float(seconds)


class Reducer(Protocol):
    """The operations that the protocol needs of MPI or of threads.

    Each may wait until `deadline`, on the clock time.monotonic, and then raises a TimeoutError. It raises a
    ConnectionError where a rank cannot be reached.
    """

    rank: int
    size: int
    hint: str  # a sentence that says how to get `recovery`; '' where it is there, or cannot be

    @property
    def recovery(self) -> Recovery | None:
        """The further operations under fault tolerance; None where the other ranks cannot go on when a rank dies."""

    def open(self, deadline: float | None) -> None:
        """Wait until the ranks are connected; called before each exchange."""

    def allreduce(self, frame: Array, deadline: float | None) -> None:
        """Replace the frame by `frames.combine` over all ranks."""

    def add(self, numbers: Array, deadline: float | None) -> None:
        """Replace float64 numbers by their sums over all ranks."""

    def broadcast(self, octets: Array, deadline: float | None) -> None:
        """Replace bytes by those of rank 0."""

    def allgather(self, text: bytes, deadline: float | None) -> list[bytes]:
        """Return the texts of all ranks, which have one length."""

    def call_roll(self, answer: bytes, seconds: float) -> dict[int, bytes]:
        """Tell all ranks that this rank gives up; return the answers that come within `seconds`, with its own.

        The result is empty where the ranks are not connected yet. In the other ranks, the call that waits, and every
        later one, raises a RollCallError.
        """

    def close(self) -> None:
        """Raise an interrupt that was held back; called after each exchange, and never waits."""


class Recovery(Protocol):
    """The further operations of a `Reducer` under fault tolerance."""

    def agree(self, deadline: float | None) -> None:
        """Return on all ranks where every rank has come here without a failure, or raise on all ranks."""

    def revoke(self) -> None:
        """Let every call of every rank over these ranks raise, except `recover`."""

    def recover(self, limit: float | None) -> tuple[Sequence[int], Comm]:
        """Return the ranks that have died, and a communicator of those that are left; a call of all that are left."""


E = TypeVar("E", bound=SyncError)
More: TypeAlias = Callable[[Reducer, float | None], Array]  # sends more in the same call, and returns the result


class OpenStep:
    """A step under way (`arraybn.sync.step`): the calls of all ranks that are undone together if a rank dies."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange  # over all ranks of the step
        self.used = {exchange}  # and over parts of them
        self.ends = False  # True in the call at its end, which alone the ranks agree on
        self.lost = False


STEP: ContextVar[OpenStep | None] = ContextVar("STEP", default=None)


class Exchange:
    """The calls over one communicator, one after the other."""

    def __init__(self, reducer: Reducer) -> None:
        self.reducer = reducer
        self.calls = 0
        self._checksum = 0  # of all reduced frames, whose bits have to be the same on all ranks
        self._broken = ""  # the reason why no further call can be made
        self._unreported_failure = ""  # of this rank alone; its next frame reports it to all ranks
        self._lock = threading.Lock()  # one thread at a time
        self._frame = frames.frame([0] * len(frames.FIELDS), 0, 0)  # the first frame of every call
        self._numbers = tuple(frames.body(self._frame))  # its two rows
        self._used = 0  # channels of the frame that may be other than 0
        self._process = os.getpid()
        self._layers: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._layers_seen = 0  # counted apart, because a layer that is collected leaves the dictionary

    def check(self) -> None:
        """Raise if no call can be made."""
        if os.getpid() != self._process:
            raise forked_child(f"rank {self.reducer.rank}: ")
        if self._broken:
            raise SyncError(f"{self._broken}. Nothing more can be synchronized over this communicator")

    def name_of(self, layer: object) -> str:
        """Return the name of a layer without a path: its place in the order of first use."""
        if layer not in self._layers:
            self._layers_seen += 1
            self._layers[layer] = self._layers_seen
        return f"unnamed layer {self._layers[layer]}"

    def report_later(self, call: Call, error: BaseException) -> None:
        """Let the next frame tell all ranks of a failure after the exchange, or of an interrupt before it."""
        text = frames.read_text(frames.text_of_error(error))[1:]
        if call.number:
            text = f"after the exchange in {call} this rank alone failed, so that its state differs: {text}"
        else:
            text = f"before the exchange in {call} this rank was interrupted: {text}"
        self._unreported_failure = text

    def carry_out(
        self,
        call: Call,
        rows: frames.Rows,
        n: int = 0,
        error: BaseException | None = None,
        more: More | None = None,
    ) -> tuple[Array, int]:
        """Return two `rows` (C,) and n of all ranks together, or raise a SyncError on all of them.

        `error` is what this rank sends in the place of its numbers; `more` is sent after them, in the same call.
        """
        deadline = None if call.timeout is None else time.monotonic() + call.timeout
        if not self._lock.acquire(False):
            self._wait_for_other_thread(call)
        try:
            self.check()
            self.reducer.open(deadline)
            found = self._carry_out(call, rows, n, error, more, deadline)
            if self.reducer.recovery is not None:
                self._agree(self.reducer.recovery, deadline)
            return found
        except SyncError:
            raise
        except TimeoutError as failure:
            raise self._give_up(call, failure, deadline) from failure
        except ConnectionError as failure:
            raise self.unreachable(call, failure, call.timeout) from failure
        except BaseException as failure:  # Ctrl-C while waiting
            self._broken = f"rank {self.reducer.rank}: {type(failure).__name__} ended {call}"
            raise
        finally:
            try:
                self.reducer.close()
            finally:
                self._lock.release()

    def _wait_for_other_thread(self, call: Call) -> None:
        limit = call.timeout
        if not self._lock.acquire(timeout=-1 if limit is None else limit):
            raise SyncTimeoutError(
                f"rank {self.reducer.rank}: another thread did not leave its call within {limit:g} s, in {call}"
            )

    def _carry_out(
        self,
        call: Call,
        rows: frames.Rows,
        n: int,
        error: BaseException | None,
        more: More | None,
        deadline: float | None,
    ) -> tuple[frames.Rows, int]:
        channels = len(rows[0])
        fields = call.fields(self.calls + 1, channels, self._checksum)
        flags = frames.ERROR if error else 0
        if self._unreported_failure:
            error, flags = SyncError(self._unreported_failure), frames.ERROR | frames.BROKEN
        self._fill_frame(rows, channels)
        frames.write_header(self._frame, fields, flags, n)
        self.reducer.allreduce(self._frame, deadline)
        self.calls = call.number = self.calls + 1
        flags, total = frames.flags_and_n(self._frame)
        if flags:
            self._used = frames.FIRST_FRAME_CHANNELS  # the numbers may be those of another rank
            self._raise_on_all_ranks(call, flags, channels, error, deadline)
        self._checksum = zlib.crc32(self._frame, self._checksum)
        first, second = self._numbers
        result = first[:channels].copy(), second[:channels].copy()
        if more is None and (beyond := channels - frames.FIRST_FRAME_CHANNELS) > 0:
            frame = frames.frame(fields, 0, n, [row[-beyond:] for row in rows], beyond)
            self.reducer.allreduce(frame, deadline)
            self._checksum = zlib.crc32(frame, self._checksum)
            first, second = (np.concatenate(both) for both in zip(result, frames.body(frame), strict=True))
            result = first, second
        if more is not None:
            self._checksum = zlib.crc32(more(self.reducer, deadline), self._checksum)
        return result, total

    def _fill_frame(self, rows: frames.Rows, channels: int) -> None:
        """Write the first channels into the frame of this exchange, and 0 where an earlier call left numbers."""
        (first, second), (a, b) = self._numbers, rows
        if channels > frames.FIRST_FRAME_CHANNELS:
            channels = frames.FIRST_FRAME_CHANNELS
            a, b = a[:channels], b[:channels]
        first[:channels], second[:channels] = a, b
        if channels < self._used:
            first[channels:] = second[channels:] = 0
        self._used = channels

    def _raise_on_all_ranks(
        self, call: Call, flags: int, channels: int, error: BaseException | None, deadline: float | None
    ) -> None:
        """Gather a text from every rank, and raise the SyncError that they make: the same on all ranks."""
        length = frames.length_of_text(flags)
        if error is None:
            text = frames.text_of_call(call.description(self.calls, channels, self._checksum), length)
        else:
            text = frames.text_of_error(error, length)
        texts = self.reducer.allgather(text, deadline)
        message = frames.message(texts, flags)
        call.every_rank_raises()
        if flags & frames.BROKEN:
            self._broken, self._unreported_failure = message, ""
        raised = SyncError(message)
        for note in frames.notes(texts):
            raised.add_note(note)
        raise raised

    def _give_up(self, call: Call, failure: TimeoutError, deadline: float | None) -> SyncTimeoutError:
        """Call the roll, or answer; return the error of this rank alone, after which no further call can be made."""
        rank = f"rank {self.reducer.rank}"
        self._broken = f"{rank} gave up {call}"
        late = isinstance(failure, roll.RollCallError) and failure.late
        seconds = roll.seconds_for(call.timeout)
        answer = roll.answer(roll.LATE if late else roll.WAITS, call.place(), seconds)
        answers = self.reducer.call_roll(answer, seconds)
        if late:
            did = f"came to {call} when the time limit of another rank was over"
        elif deadline is not None and time.monotonic() >= deadline:
            did = f"waited {call.timeout:g} s for the other ranks in {call}"
        else:
            did = f"gave up {call}, because the time limit of another rank was over"
        text = f"{rank} of {self.reducer.size} {did}. Likely causes: {_CAUSES}"
        text = f"{text}\n{roll.sentence(answers, self.reducer.size)}" if answers else text
        return self._with_hint(SyncTimeoutError(text))

    def _with_hint(self, error: E) -> E:
        if self.reducer.hint:
            error.add_note(self.reducer.hint)
        return error

    # ---- A lost rank ----

    def _agree(self, recovery: Recovery, deadline: float | None) -> None:
        """Raise on all ranks that are left if this call has failed on one; within a step, only at the step's end."""
        step = STEP.get()
        if step is not None:
            step.used.add(self)
        if step is None or step.ends:
            recovery.agree(deadline)

    def unreachable(self, doing: object, failure: BaseException, limit: float | None) -> SyncError:
        """Return the error where a rank cannot be reached: a RankLostError where the other ranks can go on.

        No further call can be made over these ranks, nor over others that the step has used.
        """
        self._broken = f"rank {self.reducer.rank}: {doing} failed: {failure}"
        step = STEP.get() or OpenStep(self)
        whole = step.exchange.reducer
        if (recovery := whole.recovery) is None:
            return self._with_hint(SyncError(self._broken))
        step.lost = True
        step.used.add(self)
        for exchange in step.used:
            if exchange.reducer.recovery is not None:
                exchange.reducer.recovery.revoke()
        lost, survivors = recovery.recover(limit)
        if not lost:
            return SyncError(self._broken)
        who = frames.ranks_text(lost)
        for exchange in step.used:
            exchange._broken = f"{who} died; go on over the communicator RankLostError.survivors"
        undone = "the call has changed nothing" if STEP.get() is None else "the step is undone"
        return RankLostError(
            f"{who} of {whole.size} died, as rank {whole.rank} noticed in {doing}; {undone}. The other {survivors.size}"
            " can go on over the communicator RankLostError.survivors",
            lost,
            survivors,
        )


_CAUSES = (
    "a rank is in evaluation, has skipped this layer or its backward, has a batch less, was given another"
    " process_group, or has ended"
)


class Call:
    """One synchronized call, as a context: an error inside goes to all ranks, now or with the next call.

    `settings` are what the ranks have to agree on, by name; `batches` is the layer's num_batches_tracked, and
    `forward_number` the number of the forward that a backward belongs to.
    """

    def __init__(
        self,
        exchange: Exchange,
        operation: str,
        layer: str,
        settings: Mapping[str, Any],
        *,
        batches: int | None = None,
        timeout: float | None = TIMEOUT,
        forward_number: int = 0,
    ) -> None:
        self.exchange, self.operation, self.layer, self.settings = exchange, operation, layer, settings
        self.batches, self.timeout, self.forward_number = batches, timeout, forward_number
        self.number = 0  # set by the exchange
        self._settings_hash: int | None = None
        self._same_error_everywhere = False

    def __str__(self) -> str:
        return f"{self.place()[:-1]} on this communicator)"

    def place(self) -> str:
        """Return "the forward of layer '1' (call 7)"."""
        return f"the {self.operation} of {self.layer} (call {self.number or self.exchange.calls + 1})"

    def backward(self, operation: str = frames.BACKWARD) -> Call:
        """Return the call of the backward of this forward, or of another derivative."""
        options: dict[str, Any] = {"batches": self.batches, "timeout": self.timeout, "forward_number": self.number}
        call = Call(self.exchange, operation, self.layer, self.settings, **options)
        call._settings_hash = self._settings_hash
        return call

    def fields(self, number: int, channels: int, checksum: int) -> tuple[int, ...]:
        """Return the fields of the header, in the order of `frames.FIELDS`."""
        if (settings := self._settings_hash) is None:
            text = "\n".join([f"{name} {value}" for name, value in self.settings.items()])
            settings = self._settings_hash = frames.hash64(text)
        batches = -1 if self.batches is None else self.batches
        layer, operation = frames.hash64(self.layer), frames.code(self.operation)
        return frames.FORMAT, number, operation, layer, channels, settings, batches, self.forward_number, checksum

    def description(self, number: int, channels: int, checksum: int) -> dict[str, Any]:
        """Return the same fields by name, for people."""
        return {
            "operation": self.operation,
            "layer": self.layer,
            "channels": channels,
            **self.settings,
            "num_batches_tracked": self.batches,
            "call of the forward": self.forward_number,
            "call": number,
            "checksum of all results": checksum,
        }

    def __enter__(self) -> Call:
        if self.exchange._broken:
            self.exchange.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or self._same_error_everywhere or isinstance(error, SyncError):
            return
        if self.number or not isinstance(error, Exception):
            self.exchange.report_later(self, error)
            return
        try:
            self.exchange.carry_out(self, frames.NO_ROWS, error=error)
        except SyncError as raised:
            raise raised from error

    def every_rank_raises(self) -> None:
        """Promise that all ranks raise the error that follows, so that none has to be told."""
        self._same_error_everywhere = True

    def combine(self, rows: frames.Rows, n: int = 0) -> tuple[frames.Rows, int]:
        """Return two rows (C,) and n of all ranks together: moments pooled (E2) in a forward, else sums."""
        return self.exchange.carry_out(self, rows, n)

    def add_records(self, record: Array, n: int = 0) -> tuple[Array, int]:
        """(E10) Return the record (rows, C) of integers and n of all ranks together."""
        total = np.array(record, order="C")

        def more(reducer: Reducer, deadline: float | None) -> Array:
            reducer.add(total, deadline)
            return total

        _, n = self.exchange.carry_out(self, np.zeros((2, record.shape[1])), n, more=more)
        return total, n

    def broadcast(self, octets: Array) -> None:
        """Replace the bytes by those of rank 0."""

        def more(reducer: Reducer, deadline: float | None) -> Array:
            reducer.broadcast(octets, deadline)
            return octets

        self.exchange.carry_out(self, frames.NO_ROWS, more=more)

    def add(self, weight: float, numbers: Array) -> float:
        """Replace the float64 numbers by their sums over all ranks, and return the sum of the weights."""

        def more(reducer: Reducer, deadline: float | None) -> Array:
            reducer.add(numbers, deadline)
            frames.canonical(numbers)
            return numbers

        rows, _ = self.exchange.carry_out(self, ((weight,), (weight,)), more=more)
        return float(rows[0][0])


def begin(
    exchange: Exchange | None, operation: str, layer: object, settings: Mapping[str, Any], **options: Any
) -> Call | None:
    """Return a call of all ranks, or None where there is one rank; `layer` is a path, or a layer without a path."""
    if exchange is None:
        return None
    return Call(exchange, operation, layer if isinstance(layer, str) else exchange.name_of(layer), settings, **options)


def settings_text(value: Any) -> str:
    """Return a setting as text: a number as Python's float, so that 1 and numpy.float64(1) agree between ranks.

    This never raises, because the error would be one of this rank alone.
    """
    try:
        plain = isinstance(value, bool) or not isinstance(value, numbers.Real)
        return str(value if plain else float(value))
    except Exception:  # 10**400, or an object that cannot be printed
        return f"<{type(value).__name__}>"

"""Ranks as threads of one process: the synchronized mode without MPI, for tests and notebooks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from .._arrays.namespaces import Array
from .._checks import as_integer
from ..sync import frames
from ..sync.errors import SyncError
from ..sync.exchange import Exchange
from ..sync.roll import RollCallError

T = TypeVar("T")


class ThreadComm:
    """One rank of a communicator whose ranks are threads, made by `ThreadComm.run` and accepted wherever `comm` is.

    Attributes
    ----------
    rank, size : int
        The number of this rank, and the number of ranks.

    Notes
    -----
    The protocol, its frames and its errors are those of MPI. Python runs one thread at a time, so threads are for
    trials and tests; for speed use ``mpirun``.

    Examples
    --------
    >>> import numpy, arraybn
    >>> from arraybn.testing import ThreadComm
    >>> x = numpy.asarray([[0.0], [2.0], [7.0]])
    >>> def work(comm):
    ...     part = x[:1] if comm.rank == 0 else x[1:]
    ...     y, saved = arraybn.batch_norm(part, comm=comm)
    ...     return saved.moments.n, saved.moments.mean
    >>> ThreadComm.run(2, work)
    [(3, array([3.])), (3, array([3.]))]
    """

    def __init__(self, rank: int, table: _Table) -> None:
        self.rank, self.size = rank, table.size
        self.exchange = Exchange(_ThreadReducer(rank, table))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: rank {self.rank} of {self.size}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> ThreadComm:
        return self

    @classmethod
    def run(cls, size: int, work: Callable[[ThreadComm], T], *, leave: bool = True) -> list[T]:
        """Call `work(comm)` on each rank, and return the results in the order of the ranks.

        Parameters
        ----------
        size : int
            The number of ranks.
        work : callable
            A function that takes the `ThreadComm` of its rank; the ranks run at the same time.
        leave : bool
            If True, a rank that waits for one that has returned raises at once. If False, it waits until the time
            limit, as under MPI.

        Raises
        ------
        Exception
            The error that `work` raised, with a note of the rank. A `SyncError` comes last, because it may only repeat
            the error of another rank.

        Examples
        --------
        >>> from arraybn.testing import ThreadComm
        >>> ThreadComm.run(3, lambda comm: comm.rank)
        [0, 1, 2]
        """
        table = _Table(as_integer("size", size, 1))
        results: list[Any] = [None] * size
        errors: dict[int, BaseException] = {}

        def rank(index: int) -> None:
            try:
                results[index] = work(cls(index, table))
            except BaseException as error:
                error.add_note(f"on rank {index} of {size}")
                errors[index] = error
            finally:
                if leave:
                    table.leave(index)

        threads = [threading.Thread(target=rank, args=(index,), daemon=True) for index in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise min(errors.items(), key=lambda item: (isinstance(item[1], SyncError), item[0]))[1]
        return results


class _Table:
    """The values that the ranks send; the last rank to come combines them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: dict[int, Any] = {}
        self._left: set[int] = set()
        self._round = 0
        self._result: Any = None
        self._roll: dict[int, bytes] = {}  # the answers to a roll call
        self._news = threading.Condition()

    def leave(self, rank: int) -> None:
        """Note that this rank sends nothing more."""
        with self._news:
            self._left.add(rank)
            self._news.notify_all()

    def meet(self, rank: int, value: Any, together: Callable[[list[Any]], Any], deadline: float | None) -> Any:
        """Return `together` of the values of all ranks, the same object on each rank."""
        with self._news:
            now, self._values[rank] = self._round, value
            if len(self._values) == self.size:
                self._result = together([self._values[index] for index in range(self.size)])
                self._values = {}
                self._round += 1
                self._news.notify_all()
            waited = False
            while self._round == now:
                if self._roll:
                    raise RollCallError(late=not waited)
                waited = True
                if missing := self._left - set(self._values):
                    raise ConnectionError(f"rank {min(missing)} has ended")
                if not self._news.wait(None if deadline is None else max(0, deadline - time.monotonic())):
                    raise TimeoutError
            if self._roll:
                raise RollCallError(late=not waited)
            return self._result

    def call_roll(self, rank: int, answer: bytes, seconds: float) -> dict[int, bytes]:
        """Give the answer of this rank to all others, and return what has come within `seconds`."""
        with self._news:
            self._roll[rank] = answer
            self._news.notify_all()
            self._news.wait_for(lambda: len(self._roll) == self.size, seconds)
            return dict(self._roll)


class _ThreadReducer:
    """The operations of `arraybn.sync.exchange.Reducer` over a table."""

    recovery, hint = None, ""

    def __init__(self, rank: int, table: _Table) -> None:
        self.rank, self.size, self._table = rank, table.size, table

    def open(self, deadline: float | None) -> None:
        """Do nothing: threads are connected."""

    def call_roll(self, answer: bytes, seconds: float) -> dict[int, bytes]:
        return self._table.call_roll(self.rank, answer, seconds)

    def close(self) -> None:
        """Do nothing: interrupts go to the main thread, which is no rank."""

    def allreduce(self, frame: Array, deadline: float | None) -> None:
        frame[:] = self._table.meet(self.rank, frame, _combined, deadline)

    def add(self, numbers: Array, deadline: float | None) -> None:
        numbers[:] = self._table.meet(self.rank, numbers, lambda values: sum(values[1:], values[0]), deadline)

    def broadcast(self, octets: Array, deadline: float | None) -> None:
        octets[:] = self._table.meet(self.rank, octets, lambda values: values[0].copy(), deadline)

    def allgather(self, text: bytes, deadline: float | None) -> list[bytes]:
        return list(self._table.meet(self.rank, text, list, deadline))


def _combined(parts: list[Array]) -> Array:
    """Combine the two halves, each combined in the same way, as MPI does over a tree."""
    if len(parts) == 1:
        return parts[0].copy()
    half = len(parts) // 2
    return np.asarray(frames.combine(_combined(parts[:half]), _combined(parts[half:])))

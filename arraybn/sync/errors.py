"""The errors of the synchronized mode. Their printed names are those of the package, where users find them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class SyncError(RuntimeError):
    """An error on some rank, raised on every rank with the same message; no rank has changed its state.

    The message names the ranks. On the rank where it happened, ``__cause__`` is the original error.

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

    __module__ = "arraybn.sync"


class SyncTimeoutError(SyncError, TimeoutError):
    """A rank did not join a synchronized call within the time limit; the communicator cannot be used any more.

    Other ranks may still be waiting. Over MPI all ranks are therefore ended (``MPI_Abort``) when this process exits.

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

    __module__ = "arraybn.sync"


class RankLostError(SyncError):
    """The process of a rank has died, and the other ranks can go on without that rank: over `survivors`.

    Every rank that is left raises this error. The call has changed nothing; within `arraybn.sync.step`, the state is
    that before the step. The communicator of the call cannot be used any more. This needs an MPI that tolerates faults:
    Open MPI, started as ``mpirun --with-ft ulfm``.

    Attributes
    ----------
    lost : tuple of int
        The ranks that have died, numbered as in the communicator of the call or of the step.
    survivors : mpi4py communicator
        The ranks that are left, in their order, with new numbers from 0.

    See Also
    --------
    arraybn.sync.step, arraybn.sync.continue_with

    Examples
    --------
    >>> import arraybn
    >>> from arraybn.testing import ThreadComm
    >>> def work(comm):
    ...     error = arraybn.RankLostError("rank 3 has died", lost=[3], survivors=comm)
    ...     return error.lost, error.survivors.size, isinstance(error, arraybn.SyncError)
    >>> ThreadComm.run(3, work)[0]
    ((3,), 3, True)
    """

    __module__ = "arraybn.sync"

    def __init__(self, message: str, lost: Iterable[int], survivors: Any) -> None:
        super().__init__(message)
        self.lost, self.survivors = tuple(lost), survivors

"""The way from a user's communicator, of MPI or of threads, to the exchange over it."""

from __future__ import annotations

from . import mpi
from .exchange import Comm, Exchange


def check_comm(name: str, comm: Comm | None) -> None:
    """Raise unless `comm` is a communicator that can be synchronized over, or None for the world."""
    if comm is not None and not isinstance(getattr(comm, "exchange", None), Exchange):
        mpi.check(name, comm)


def exchange_over(name: str, comm: Comm | None) -> Exchange | None:
    """Return the exchange over a communicator, or over the world for None; None where there is a single rank."""
    if comm is None and (comm := mpi.world()) is None:
        return None
    if hasattr(comm, "Get_attr") or not isinstance(exchange := getattr(comm, "exchange", None), Exchange):
        return mpi.exchange_over(name, comm)
    return None if exchange.reducer.size == 1 else exchange  # of an arraybn.testing.ThreadComm

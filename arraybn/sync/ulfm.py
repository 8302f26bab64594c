"""A lost rank as MPI sees it: the fault tolerance ULFM, which Open MPI has under ``mpirun --with-ft ulfm``.

When a process dies by a signal, calls with its rank raise an exception on some of the other ranks. These *revoke* the
communicator, so that calls on it raise on all of them. Then they *agree* that nobody is left in an older call, and
*shrink* the communicator to the ranks that are left. MPI_Finalize and MPI_Abort may hang afterwards.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

COMMAND = "mpirun --with-ft ulfm"
_VARIABLE = "OMPI_MCA_mpi_ft_enable"  # which that command sets


def is_on(mpi: Any) -> bool:
    """Return True where the launcher lets the other ranks go on when one dies."""
    return os.environ.get(_VARIABLE, "0") not in ("", "0", "false") and hasattr(mpi.Comm, "Iagree")


def shrunk(mpi: Any, comm: Any, agreed: bool) -> Any:
    """Return a communicator of the ranks of `comm` that are left; a call of all of them.

    `comm` is revoked. `agreed` is True on a rank that has taken part in the agreement at the end of the last call.
    Without it, the rank takes part here, and tells the ranks that wait there that the call has failed.
    """
    if not agreed:
        with contextlib.suppress(mpi.Exception):
            comm.Agree(0)
    while True:
        new, together = None, False
        with contextlib.suppress(mpi.Exception):
            new = comm.Shrink()
        with contextlib.suppress(mpi.Exception):  # raised on all ranks, if a rank has died in the meantime
            comm.Ack_failed()
            together = bool(comm.Agree(int(new is not None)))
        if together and new is not None:
            new.Set_errhandler(mpi.ERRORS_RETURN)
            return new
        if new is not None:
            new.Revoke()


def missing(mpi: Any, old: Any, new: Any) -> tuple[int, ...]:
    """Return the ranks of `old` that are not in `new`. `Get_failed` may be empty on a rank that was told by others."""
    found = mpi.Group.Translate_ranks(old.Get_group(), range(old.size), new.Get_group())
    return tuple(rank for rank, there in enumerate(found) if there == mpi.UNDEFINED)


@contextlib.contextmanager
def watched(seconds: float | None, doing: str) -> Iterator[None]:
    """End this process if the block takes longer, because a blocking call of MPI cannot be given up."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, _end_late, (f"arraybn: {doing} has not ended within {seconds:g} s",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_late(text: str) -> None:
    print(f"{text}: a rank is left that makes no synchronized call. Ending this process", file=sys.stderr)
    end(failed=True)


# ---- The end of a process under fault tolerance ----------------------------------------------------------------------

_statuses: list[int] = []  # of ``python -m mpi4py``, after an error or sys.exit


def end_without_finalize(mpi: Any) -> None:
    """Let this process end without MPI_Finalize, which would wait for ever for a rank that dies."""
    mpi._set_abort_status = _statuses.append  # instead of MPI_Abort at exit, after which other ranks run on
    atexit.register(_at_exit, os.getpid())


def _at_exit(pid: int) -> None:
    if os.getpid() == pid:
        atexit.unregister(_at_exit)
        atexit._run_exitfuncs()  # those that were registered before
        end(failed=bool(_statuses) or getattr(sys, "last_value", None) is not None)


def end(failed: bool) -> None:
    """End this process at once: after an error by a signal, which is all that the other ranks notice."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if failed:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0)

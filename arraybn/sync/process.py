"""The process itself: a rank, which a launcher started, or the child of one, which is no rank.

A child inherits the launcher's variables, whichever way it was started. With them, MPI would take the child for its
parent: MPICH ends it, and Open MPI makes it a second process of the same rank. So the process of a rank leaves its
number in a variable of its own, which says to every child that the rank is another process.
"""

from __future__ import annotations

import os
import stat
import sys

from .errors import SyncError

# Environment variables in which launchers give the number of processes they started.
LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PALS_SIZE")
RANK_PROCESS = "ARRAYBN_RANK_PROCESS"  # number of the process that is the rank, and its place in the launcher's job
# Variables that tell one place of a job from another, so that a launcher inside a rank starts ranks, not children.
_PLACE = ("PMI_RANK", "PMI_FD", "PMIX_NAMESPACE", "PMIX_RANK", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID")

FORKED: list[int] = []  # the number of this process, if it is a forked child of one that had imported mpi4py.MPI
_suspected: list[int] = []  # the number of this process, if it was a child when it was looked at last


def _several() -> tuple[str, int] | None:
    """Return the variable in which a launcher says that it started several processes, and their number."""
    sizes = ((name, os.environ.get(name, "")) for name in LAUNCHERS)
    return next(((name, int(size)) for name, size in sizes if size.isdigit() and int(size) > 1), None)


def _in_job() -> bool:
    """Return True where MPI would look for a launcher; MPICH does so for PMI_FD, also in a job of one rank."""
    return "PMI_FD" in os.environ or _several() is not None


def _place() -> str:
    """Return the place of this process in the launcher's job, '' for a process that cannot be a rank.

    A child of a process under MPICH does not inherit the socket PMI_FD, unless it is forked.
    """
    place = [os.environ.get(name, "") for name in _PLACE]
    if descriptor := os.environ.get("PMI_FD"):
        try:
            found = os.fstat(int(descriptor))
        except (ValueError, OSError):
            return ""
        if not stat.S_ISSOCK(found.st_mode):
            return ""
        place.append(str(found.st_ino))  # a launcher inside a rank often gives its sockets the same numbers
    return ":".join(place)


def _is_child() -> bool:
    """Return True for a child that has the launcher's variables of its parent."""
    if not _in_job():
        return False
    here = _place()
    pid, _, place = os.environ.get(RANK_PROCESS, "").partition(" ")
    return not here or (place == here and pid != str(os.getpid()))


def _look() -> None:
    """Find out whether this process is a child; if it is a rank, say so to its children."""
    if _is_child():
        _suspected.append(os.getpid())
    elif _in_job():
        from multiprocessing import parent_process

        parent = parent_process()  # the rank, which has not imported this file
        os.environ[RANK_PROCESS] = f"{parent.pid if parent else os.getpid()} {_place()}"
        if parent:
            _suspected.append(os.getpid())


def _after_fork() -> None:
    (FORKED if "mpi4py.MPI" in sys.modules else _suspected).append(os.getpid())


_look()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_REMEDY = (
    "synchronize in the process that the launcher started. A child may use layers in evaluation, and plain layers"
    " (SyncBatchNorm.revert_sync_batchnorm)"
)


def check_rank() -> None:
    """Raise in the child of a rank, unless the launcher's variables were removed since the child was started."""
    if _suspected and _is_child():
        raise SyncError(
            f"this process is a child of a rank, and is no rank itself; {_REMEDY}. As a job of its own it needs an"
            " environment without the launcher's variables (see docs/synchronized.md, Child processes)"
        )


def check_not_forked() -> None:
    """Raise in a forked child of a process that had imported mpi4py.MPI."""
    if FORKED:
        raise forked_child()


def forked_child(rank: str = "") -> SyncError:
    """Return the error of a forked child; `rank` is 'rank 1: ' where the rank of its parent is known."""
    return SyncError(f"{rank}this is a forked child of a rank, and is no rank itself; {_REMEDY}")


def check_alone(reason: str) -> None:
    """Raise if a launcher has started several processes; `reason` says why they cannot find each other."""
    if several := _several():
        name, size = several
        raise SyncError(
            f"synchronizing over {size} processes ({name}={size}), but {reason}: each would train alone."
            " Install mpi4py for the MPI whose mpirun starts the processes (python -m arraybn info shows both),"
            " or use the mpirun of the MPI that mpi4py was built for"
        )

"""The process itself: one of several that a launcher started, or the forked child of a rank, which is no rank."""

from __future__ import annotations

import os
import sys

from .errors import SyncError

# Environment variables in which launchers give the number of processes they started.
LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PALS_SIZE")

FORKED: list[int] = []  # the number of this process, if it is a forked child of one that had imported mpi4py.MPI
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: FORKED.extend([os.getpid()] * ("mpi4py.MPI" in sys.modules)))


def check_alone(reason: str) -> None:
    """Raise if a launcher has started several processes; `reason` says why they cannot find each other."""
    for name in LAUNCHERS:
        if (size := os.environ.get(name, "")).isdigit() and int(size) > 1:
            raise SyncError(
                f"synchronizing over {size} processes ({name}={size}), but {reason}: each would train alone."
                " Install mpi4py for the MPI whose mpirun starts the processes (python -m arraybn info shows both),"
                " or use the mpirun of the MPI that mpi4py was built for"
            )


def check_not_forked() -> None:
    """Raise in a forked child of a process that had imported mpi4py.MPI."""
    if FORKED:
        raise SyncError(
            "this is a forked child of a process that had initialized MPI, and is no rank; synchronize in that process"
            " alone, or start others with multiprocessing's spawn"
        )

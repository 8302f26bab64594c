"""A child of a process that has not imported arraybn: mpirun -n 2 python [-m mpi4py] stranger.py WAY."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

CODE = "import stranger; stranger.child()"


def child() -> None:
    import numpy

    import arraybn

    try:
        arraybn.SyncBatchNorm(3)(numpy.eye(3))
    except arraybn.SyncError as error:
        assert "this process is a child of a rank" in str(error), error
    else:
        raise AssertionError("nobody was told")
    assert "mpi4py.MPI" not in sys.modules


if __name__ == "__main__":
    if sys.argv[1] == "spawn":
        process = multiprocessing.get_context("spawn").Process(target=child)
        process.start()
        process.join(40)
        assert process.exitcode == 0, process.exitcode
    else:
        subprocess.run([sys.executable, "-c", CODE], timeout=40, check=True)
    from mpi4py import MPI

    MPI.COMM_WORLD.Barrier()
    if MPI.COMM_WORLD.rank == 0:
        print("passed", *sys.argv[1:])

"""Children of a rank: mpirun -n 2 python [-m mpi4py] children.py KIND [WHEN]. Run by tests/test_mpi.py.

A child makes a synchronized call, is told that it is no rank, and does what the message recommends. With WHEN "before",
the parent makes its first synchronized call after the child has ended. mpi4py is imported late, because a child started
by spawn imports this file.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import subprocess
import sys

sys.modules["numba"] = None  # type: ignore[assignment]  # importing it takes longer than all of this

import numpy as np

import arraybn

LIMIT = 40
X = np.asarray([[1.0, 2.0, 3.0], [3.0, 4.0, 7.0]])
LAUNCHERS = ("PMI", "HYDI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PALS_", "SLURM_")  # as in docs/synchronized.md
FORKED = r"rank \d: this is a forked child of a rank, and is no rank itself; synchronize in the process that .*"
CHILD = r"this process is a child of a rank, and is no rank itself; synchronize in the process that .*"

ALONE = """
import numpy, arraybn
print(arraybn.SyncBatchNorm(3)(numpy.eye(3)).shape)
from mpi4py import MPI
assert MPI.COMM_WORLD.size == 1
"""
RANKS = ALONE.replace("size == 1", "size == 2")


def work(pickled: bytes) -> str:
    """Do in the child what fails, and then what the message recommends."""
    model = pickle.loads(pickled)
    before = "mpi4py.MPI" in sys.modules  # in a forked child
    for call in (model, lambda _: arraybn.broadcast_state(model, None)):
        try:
            call(X)
        except arraybn.SyncError as error:
            assert re.fullmatch(FORKED if before else CHILD, str(error)), error
        else:
            raise AssertionError("nobody was told")
    assert ("mpi4py.MPI" in sys.modules) == before
    model.eval()(X)
    expected = arraybn.BatchNorm1d(3)(X).tobytes()
    plain = arraybn.SyncBatchNorm.revert_sync_batchnorm(pickle.loads(pickled))
    assert plain(X).tobytes() == expected
    if not before:  # a job of its own
        for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
            del os.environ[name]
        assert model.train()(X).tobytes() == expected
        assert "mpi4py.MPI" in sys.modules
    return "done"


def by_process(kind: str, pickled: bytes) -> None:
    child = multiprocessing.get_context(kind).Process(target=work, args=(pickled,))
    child.start()
    child.join(LIMIT)
    assert child.exitcode == 0, child.exitcode


def by_pool(pickled: bytes) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(work, [pickled]).get(LIMIT) == "done"


def by_loky(pickled: bytes) -> None:
    import joblib

    assert joblib.Parallel(n_jobs=2, backend="loky", timeout=LIMIT)(joblib.delayed(work)(pickled) for _ in range(2))


def by_subprocess(pickled: bytes) -> None:
    """Run a script as the child; then a job of its own, and a launcher, whose processes are ranks."""
    subprocess.run([sys.executable, __file__, "child"], input=pickled, timeout=LIMIT, check=True)
    own = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    subprocess.run([sys.executable, "-c", ALONE], env=own, timeout=LIMIT, check=True)
    for env in (own, None):
        command = [os.environ["MPIRUN"], "-n", "2", sys.executable, "-c", RANKS]
        subprocess.run(command, env=env, timeout=LIMIT, check=True)


def main(kind: str, when: str = "after") -> None:
    if kind == "child":
        work(sys.stdin.buffer.read())
        return
    model = arraybn.SyncBatchNorm.convert_sync_batchnorm(arraybn.Sequential(arraybn.BatchNorm1d(3)))
    pickled = pickle.dumps(model)
    if when == "after":
        model(X)
    {"pool": by_pool, "loky": by_loky, "subprocess": by_subprocess}.get(kind, lambda p: by_process(kind, p))(pickled)
    model(X)  # the ranks themselves go on
    from mpi4py import MPI

    assert MPI.COMM_WORLD.size == 2
    MPI.COMM_WORLD.Barrier()
    if MPI.COMM_WORLD.rank == 0:
        print("passed", *sys.argv[1:])


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The training of ``demo --lose-a-rank`` without a loss: mpirun -n P python -m mpi4py digits.py FILE EPOCHS.

The first job, on 4 ranks, makes FILE before the step in which the demonstration loses a rank. The second job, on 3
ranks, goes on from FILE and prints the checksum of the end. Run by tests/test_lost.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mpi4py import MPI
from threadpoolctl import threadpool_limits

import arraybn
from arraybn.commands import _demo_lost

WORLD = MPI.COMM_WORLD


def main(path: Path, epochs: int) -> None:
    options = argparse.Namespace(seed=0, device="cpu", data_parallel=2, epochs=epochs)
    training = _demo_lost.Training(options, WORLD, 4)
    arraybn.broadcast_state(training.network, WORLD)
    if not path.exists():
        training.train(_demo_lost.AT - 1)
        if WORLD.rank == 0:
            model, optimizer = training.network.state_dict("model."), training.optimizer.state_dict("sgd.")
            arraybn.save({**model, **optimizer}, path)
        return
    state = arraybn.load(path)
    training.network.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("model.")})
    training.optimizer.load_state_dict(state, "sgd.")
    training.index = _demo_lost.AT - 1
    training.train(len(training.batches))
    assert len(set(WORLD.allgather(training.checksum()))) == 1
    if WORLD.rank == 0:
        print("checksum", training.checksum(), flush=True)


if __name__ == "__main__":
    with threadpool_limits(1):
        main(Path(sys.argv[1]), int(sys.argv[2]))

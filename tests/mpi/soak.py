"""Training over ranks with random splits and faults, beside one process: mpirun -n 3 python -m mpi4py soak.py STEPS."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

if os.environ.get("ARRAYBN_TEST_KERNELS") == "reference":
    sys.modules["numba"] = None  # type: ignore[assignment]

import faults
import numpy as np
import whole
from mpi4py import MPI

import arraybn

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
WIDTH = 6


def network(seed: int) -> Any:
    """Return two linear layers, each with a batch norm, in float64."""
    linear = [arraybn.network.Linear(4, WIDTH), arraybn.network.Linear(WIDTH, 2)]
    norms = [arraybn.BatchNorm1d(WIDTH), arraybn.BatchNorm1d(2, momentum=None)]
    model = arraybn.Sequential(linear[0], norms[0], arraybn.network.ReLU(), linear[1], norms[1]).to(dtype="float64")
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.3 * rng.standard_normal(parameter.data.shape)
    return model


def descend(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data - 0.05 * parameter.grad
    model.zero_grad()


def step(model: Any, x: Any, target: Any, scale: float) -> None:
    """Set the gradients of scale·Σ(y − target)²/2."""
    model.zero_grad()
    model.backward(scale * (model(x) - target))


def wrong_step(model: Any, x: Any, target: Any, kind: int, mine: bool) -> None:
    """Take a step with a fault on one rank; every rank has to be told."""
    try:
        if kind == 0:
            model(x[:, :3].copy() if mine else x)  # Linear refuses, and the batch norm of this rank never comes
        elif kind == 1:
            model[1](np.ones((3, WIDTH + mine)))
        elif kind == 2:
            model[1](np.ones((3, WIDTH)).astype("i4" if mine else "f8"))
        else:
            y = model(x)
            model[4].backward(y[:, :1] if mine else y)
    except arraybn.SyncError as error:
        assert "rank" in str(error)
        return
    raise SystemExit("a fault was not noticed")


def memory() -> int:
    """Return the resident bytes of this process; 0 where the system does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


def main(steps: int) -> None:
    alone, model = network(0), network(RANK)
    arraybn.broadcast_state(alone, WORLD)
    if RANK == 0:
        model = copy.deepcopy(alone)
    arraybn.SyncBatchNorm.convert_sync_batchnorm(model, WORLD)
    arraybn.broadcast_state(model, WORLD)
    shared = np.random.default_rng(1)  # the same on all ranks
    weights = shared.standard_normal((4, 2))
    before = 0
    for index in range(steps):
        samples = int(shared.integers(2, 20))
        x = shared.standard_normal((samples, 4)) + 1
        target = np.tanh(x @ weights)
        cuts = whole.cut(shared, samples, SIZE)
        if shared.random() < 0.1:
            kind, who = int(shared.integers(1, 4)), int(shared.integers(SIZE))
            wrong_step(model, np.ones((3, 4)), None, kind, who == RANK)
            if kind == 3:  # its forward was right and has been taken in
                alone(np.ones((3 * SIZE, 4)))
        step(alone, x, target, 1 / samples)
        descend(alone)
        mine = slice(cuts[RANK], cuts[RANK + 1])
        step(model, x[mine], target[mine], SIZE / samples)  # of one scale on all ranks, so that these have weight 1
        arraybn.average_gradients(model, WORLD, weight=1)
        descend(model)
        if index == steps // 3:
            before = memory()
    grown = memory() - before
    state = faults.state(model)
    del state["remembered"]
    assert len(set(WORLD.allgather(tuple(sorted(state.items()))))) == 1, "the ranks differ"
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value, alone.state_dict()[name], rtol=1e-7, atol=1e-9, err_msg=name)
    assert model[1].num_batches_tracked >= steps
    assert grown < 2 * 2**20, f"{grown} bytes more"
    if RANK == 0:
        print("passed", steps, "steps; memory grew by", grown, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

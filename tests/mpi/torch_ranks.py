"""A PyTorch model over MPI's ranks on CPUs beside one process: mpirun -n P python -m mpi4py torch_ranks.py step.

A step of torch.optim, with a gradient penalty in the loss, has to be that of one process with the whole batch. Run by
tests/test_pytorch_module.py.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from mpi4py import MPI

import arraybn
import arraybn.pytorch

COMM = MPI.COMM_WORLD


def model() -> Any:
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(4)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), norm, torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(16, 2)
    )


def loss(network: Any, x: Any) -> Any:
    """Return Σy² plus a gradient penalty, whose gradients take the double backward."""
    x = x.clone().requires_grad_()
    y = network(x)
    (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    return (y**2).sum() + (dx**2).sum()


def close(mine: Any, other: Any) -> None:
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


def step() -> None:
    samples = 3 * COMM.size - 1
    whole = torch.randn(samples, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    part = whole.tensor_split(COMM.size)[COMM.rank]
    alone, ranks = model().double(), model().double()
    arraybn.pytorch.convert_sync_batchnorm(ranks, COMM, timeout=60)
    for network, batch in ((alone, whole), (ranks, part)):
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss(network, batch).backward()
            if network is ranks:
                for parameter in network.parameters():
                    COMM.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())
            optimizer.step()
    for mine, other in zip(ranks.state_dict().values(), alone.state_dict().values(), strict=True):
        close(mine, other)
        same = COMM.allgather(mine.numpy().tobytes())
        assert len(set(same)) == 1
    close(ranks.eval()(part), alone.eval()(part))  # a rank alone may evaluate
    try:  # the control
        close(1.001 * ranks[1].weight, alone[1].weight)
    except AssertionError:
        return
    raise AssertionError("a difference of a thousandth was not found")


def forward_mode() -> None:
    """Compare E8 and E9 in forward mode, which PyTorch has once in a process, so that threads cannot."""
    batch = torch.randn(2, 3 * COMM.size - 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, part = (list(t.unbind()) for t in (batch, batch.tensor_split(COMM.size, 1)[COMM.rank]))
    options = {"track_running_stats": False, "dtype": torch.float64}
    alone, ranks = arraybn.pytorch.BatchNorm1d(2, **options), arraybn.pytorch.SyncBatchNorm(2, timeout=60, **options)

    def along(layer: Any, x: Any, direction: Any) -> Any:
        first = torch.func.jvp(layer, (x,), (direction,))[1]
        second = torch.func.jvp(torch.func.grad(lambda x: (layer(x) ** 3).sum()), (x,), (direction,))[1]
        return torch.stack([first, second], 1)

    close(along(ranks, *part), along(alone, *whole).tensor_split(COMM.size)[COMM.rank])


def wrong() -> None:
    layer = arraybn.pytorch.SyncBatchNorm(2, timeout=60)
    try:
        layer(torch.ones(2) if COMM.rank == 1 else torch.ones(2, 2))
    except arraybn.SyncError as error:
        assert str(error) == "rank 1: expected at least 2D input (got 1D input)"
        return
    raise AssertionError("rank 1 had another number of dimensions")


if __name__ == "__main__":
    for part in sys.argv[1:]:
        globals()[part]()
    COMM.Barrier()
    if COMM.rank == 0:
        print("passed", *sys.argv[1:])

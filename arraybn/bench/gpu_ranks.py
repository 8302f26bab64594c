"""A synchronized layer beside a local one on MPI ranks, on one GPU or several.

``python -m mpi4py -m arraybn.bench.gpu_ranks FILE TURNS DEVICE SECONDS SHAPE …`` under mpirun writes what it found.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .._arrays.copies import as_numpy
from ..layers import BatchNorm1d, BatchNorm2d, SyncBatchNorm
from . import jobs
from .cases import EPS, RESNET, Case
from .device import HostDevice
from .sync_ranks import Comm, Timed, calibrate_calls, layer_calls, seconds_of
from .truth import PROMISED, make_problems, truths, worst

SHAPES = ((64, 128), *RESNET[1:])
CHECKED = ((6, 5, 3, 4), (4, 2))  # the whole batch; the samples of each of two ranks
LOCAL, SYNC = "local", "synchronized"
MOST = 200  # calls of a sample


def measure(comm: Comm, device: Any, turns: int, seconds: float, shapes: Sequence[tuple[int, ...]]) -> jobs.Found:
    """On all ranks: first whether it is right, then the samples of every call; the result is that of rank 0."""
    start, rows, left = time.perf_counter(), [], []
    problem = check(comm, device)
    for shape in shapes if not problem else ():
        if comm.bcast(time.perf_counter() - start > seconds):
            left.append(shape)
            continue
        for (scheme, operation), call in _calls(comm, device, shape).items():
            count = calibrate_calls(comm, call, device, MOST)
            samples = [seconds_of(comm, call, count, device) for _ in range(turns)]
            rows.append({"shape": shape, "scheme": scheme, "what": operation, "seconds": samples})
    return {"ranks": comm.size, "device": device.describe(), "wrong": problem, "rows": rows, "left": left}


def _layer(scheme: str, comm: Comm, device: Any, shape: tuple[int, ...]) -> Any:
    if scheme == SYNC:
        return SyncBatchNorm(shape[1], eps=EPS, process_group=comm).to(xp=device.xp)
    return (BatchNorm1d if len(shape) == 2 else BatchNorm2d)(shape[1], eps=EPS).to(xp=device.xp)


def _calls(comm: Comm, device: Any, shape: tuple[int, ...]) -> dict[tuple[str, str], Timed]:
    rng = np.random.default_rng(comm.rank)
    x, dy = (device.array(rng.standard_normal(shape).astype(np.float32)) for _ in range(2))
    calls = {scheme: layer_calls(_layer(scheme, comm, device, shape), x, dy) for scheme in (LOCAL, SYNC)}
    return {(scheme, operation): call for scheme, both in calls.items() for operation, call in both.items()}


def check(comm: Comm, device: Any) -> str:
    """Describe what is wrong with a synchronized layer over uneven parts, by the truth of the whole batch; or ''."""
    shape, counts = CHECKED
    (whole,) = make_problems(HostDevice(), Case(shape), seed=comm.bcast(int(time.time())))
    truth = truths(np, whole)
    first = min(sum(counts[: comm.rank]), shape[0])
    part = slice(first, shape[0] if comm.rank == comm.size - 1 else min(first + counts[comm.rank], shape[0]))
    layer = _layer(SYNC, comm, device, shape)
    layer.weight.data, layer.bias.data = device.array(whole.weight), device.array(whole.bias)
    y = layer(device.array(whole.x[part]))
    dx = layer.backward(device.array(whole.dy[part]))
    problem = ""
    for got, (name, exact, units) in ((y, truth["forward"][0]), (dx, truth["backward"][0])):
        values, limit = np.asarray(as_numpy(name, got), exact.dtype), PROMISED[name]
        error = worst(np, values, exact[part], units[part], "float32")
        if not error <= limit:
            problem = problem or f"rank {comm.rank}: {name} is off by {error:.3g} ulp, {limit:g} are allowed"
    return "; ".join(filter(None, comm.allgather(problem)))


def main(file: str, turns: str, build: str, seconds: str, *shapes: str) -> None:
    """Measure on the ranks of this job, each on the GPU of its number on its machine."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    module, _, name = build.partition(":")
    device = getattr(importlib.import_module(module), name)(comm.Split_type(MPI.COMM_TYPE_SHARED).rank)
    wanted = [tuple(map(int, shape.split(","))) for shape in shapes]
    found = measure(comm, device, int(turns), float(seconds), wanted)
    found["mpi"] = " ".join(MPI.Get_library_version().partition("\n")[0].split()[:3]).rstrip(",")
    jobs.write(comm, file, found)


if __name__ == "__main__":
    main(*sys.argv[1:])

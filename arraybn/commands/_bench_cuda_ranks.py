"""What ``bench --device cuda`` runs on two MPI ranks: a synchronized layer beside a local one, on one GPU or several.

``python -m mpi4py -m arraybn.commands._bench_cuda_ranks FILE TURNS BUILD SECONDS`` under mpirun writes what it found.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._arrays.copies import as_numpy
from ..layers import BatchNorm1d, BatchNorm2d, SyncBatchNorm
from ._bench_cases import RESNET
from ._bench_cuda_cases import GpuCase
from ._bench_cuda_check import truths, worst
from ._bench_cuda_device import Device

SHAPES = ((64, 128), *RESNET[1:])
CHECKED = ((6, 5, 3, 4), (4, 2))  # the whole batch; the samples of each of two ranks
LOCAL, SYNC = "local", "synchronized"
LAYER, STEP = "layer", "step"
SAMPLE, MOST = 0.01, 200  # seconds that a sample takes at least, and calls at most
EPS = 2.0**-10
LIMITS = {"y": 4.0, "dx": 12.0}  # ulp of float32 at the largest term: promise N2

Comm = Any  # mpi4py's


def measure(comm: Comm, device: Device, turns: int, seconds: float, shapes: Sequence[tuple[int, ...]]) -> Any:
    """On all ranks: first whether it is right, then the samples of every call; the result is that of rank 0."""
    start, rows, left = time.perf_counter(), [], []
    problem = check(comm, device)
    for shape in shapes if not problem else ():
        if comm.bcast(time.perf_counter() - start > seconds):
            left.append(shape)
            continue
        for (scheme, what), call in _calls(comm, device, shape).items():
            count = _often(comm, device, call)
            samples = [_seconds(comm, device, call, count) for _ in range(turns)]
            rows.append({"shape": shape, "scheme": scheme, "what": what, "seconds": samples})
    return {"ranks": comm.size, "device": device.describe(), "wrong": problem, "rows": rows, "left": left}


def _layer(scheme: str, comm: Comm, device: Device, shape: tuple[int, ...]) -> Any:
    if scheme == SYNC:
        return SyncBatchNorm(shape[1], eps=EPS, process_group=comm).to(xp=device.xp)
    return (BatchNorm1d if len(shape) == 2 else BatchNorm2d)(shape[1], eps=EPS).to(xp=device.xp)


def _calls(comm: Comm, device: Device, shape: tuple[int, ...]) -> dict[tuple[str, str], Callable[[], object]]:
    """Both layers, and what each does."""
    rng = np.random.default_rng(comm.rank)
    x, dy = (device.array(rng.standard_normal(shape).astype(np.float32)) for _ in range(2))
    found: dict[tuple[str, str], Callable[[], object]] = {}
    for scheme in (LOCAL, SYNC):
        layer = _layer(scheme, comm, device, shape)

        def forward(layer: Any = layer) -> None:
            layer(x)

        def step(layer: Any = layer) -> None:
            layer(x)
            layer.backward(dy)

        found |= {(scheme, LAYER): forward, (scheme, STEP): step}
    return found


def check(comm: Comm, device: Device) -> str:
    """What is wrong with a synchronized layer over uneven parts, by float64 on the whole batch; '' if nothing is."""
    shape, counts = CHECKED
    rng = np.random.default_rng(comm.bcast(int(time.time())))
    whole = {name: rng.standard_normal(shape).astype(np.float32) for name in ("x", "dy")}
    vectors = {name: rng.uniform(0.5, 2, shape[1]).astype(np.float32) for name in ("weight", "bias", "mean", "var")}
    truth = truths(np, GpuCase(shape), {**whole, **vectors}, EPS)
    first = min(sum(counts[: comm.rank]), shape[0])
    part = slice(first, shape[0] if comm.rank == comm.size - 1 else min(first + counts[comm.rank], shape[0]))
    layer = _layer(SYNC, comm, device, shape)
    for name in ("weight", "bias"):
        getattr(layer, name).data = device.array(vectors[name])
    y = layer(device.array(whole["x"][part]))
    dx = layer.backward(device.array(whole["dy"][part]))
    problem = ""
    for got, (name, exact, units) in ((y, truth["forward"][0]), (dx, truth["backward"][0])):
        values = np.asarray(as_numpy(name, got), np.float64)
        error = worst(np, values, exact[part], units[part], "float32")
        if not error <= LIMITS[name]:
            problem = problem or f"rank {comm.rank}: {name} is off by {error:.3g} ulp, {LIMITS[name]:g} are allowed"
    return "; ".join(filter(None, comm.allgather(problem)))


def _often(comm: Comm, device: Device, call: Callable[[], object]) -> int:
    """Calls in a sample, the same on all ranks; the first compile what must be compiled."""
    for _ in range(2):
        _seconds(comm, device, call, 2)
    second = max(_seconds(comm, device, call, 3), 1e-7)
    return int(comm.bcast(min(MOST, max(1, math.ceil(SAMPLE / second)))))


def _seconds(comm: Comm, device: Device, call: Callable[[], object], calls: int) -> float:
    """Of one call until the device is done with it, on the average of `calls`, for the slowest rank."""
    device.synchronize()
    comm.Barrier()
    start = device.clock()
    for _ in range(calls):
        call()
    device.synchronize()
    slowest: float = max(comm.allgather((device.clock() - start) / calls))
    return slowest


def main(file: str, turns: str, build: str, seconds: str, *shapes: str) -> None:
    """Measure on the ranks of this job, each on the GPU of its number on its machine."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    module, _, name = build.partition(":")
    local = comm.Split_type(MPI.COMM_TYPE_SHARED).rank
    device = getattr(importlib.import_module(module), name)(local)
    wanted = [tuple(map(int, shape.split(","))) for shape in shapes]
    found = measure(comm, device, int(turns), float(seconds), wanted)
    found["mpi"] = " ".join(MPI.Get_library_version().partition("\n")[0].split()[:3]).rstrip(",")
    if comm.rank == 0:
        Path(file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

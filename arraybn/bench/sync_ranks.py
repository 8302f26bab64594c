"""Synchronized calls on the ranks of ``python -m arraybn bench sync``, and an all-gather scheme beside them.

``mpirun -n P python -m mpi4py -m arraybn.bench.sync_ranks FILE TURNS`` writes what rank 0 has found. The all-gather
scheme is PyTorch's: each rank sends mean, 1/std and count in float32 to all others, each of which pools them; the
backward is an allreduce of two sums. Both schemes wait in the same way, giving the processor away meanwhile.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import sync
from ..kernels.threads import set_num_threads
from ..layers import BatchNorm1d, SyncBatchNorm
from ..reference import Moments
from . import jobs

CHANNELS = (64, 128, 256, 512, 1024, 2048)
ROWS = 2  # of x on each rank: what is timed is the synchronization, not the sweeps
SAMPLE = 0.01  # seconds that a sample takes at least
EPS = 1e-5
OURS, GATHER = "arraybn", "all-gather"
FORWARD, BACKWARD = "forward", "backward"  # the exchange alone
LAYER, STEP = "layer", "step"  # layer(x); layer(x) and layer.backward(dy)

Array = np.ndarray[Any, Any]
Comm = Any  # mpi4py's


class Traffic(NamedTuple):
    """The traffic of one call: collectives, the bytes that a rank puts into them, and those that it gets back."""

    collectives: int
    sent: int
    received: int


class Counted:
    """A communicator or reducer whose collectives are counted."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.traffic = inner, Traffic(0, 0, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _count(self, sent: Array, received: Array) -> None:
        done = self.traffic
        self.traffic = Traffic(done.collectives + 1, done.sent + sent.nbytes, done.received + received.nbytes)

    def allreduce(self, frame: Array, deadline: float | None) -> None:
        self._count(frame, frame)
        self.inner.allreduce(frame, deadline)

    def Iallgather(self, sent: Array, received: Array) -> Any:  # noqa: N802, mpi4py's name
        self._count(sent, received)
        return self.inner.Iallgather(sent, received)

    def Iallreduce(self, in_place: Any, numbers: Array) -> Any:  # noqa: N802, mpi4py's name
        self._count(numbers, numbers)
        return self.inner.Iallreduce(in_place, numbers)


class Ours:
    """The exchange of arraybn, with its agreement."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def _begin(self, operation: str) -> sync.Call:
        call = sync.begin(sync.exchange_over("comm", self.comm), operation, "bench", {"eps": EPS})
        assert call is not None
        return call

    def forward(self, moments: Moments) -> tuple[Array, Array]:
        with self._begin(sync.FORWARD) as call:
            pooled = sync.RankPool(call).moments(moments)
        return pooled.mean, pooled.m2

    def backward(self, a: Array, b: Array) -> tuple[Array, Array]:
        with self._begin(sync.BACKWARD) as call:
            a, b = sync.RankPool(call).sums(a, b)
        return a, b

    def traffic(self, work: Callable[[], object]) -> Traffic:
        return _counted(sync.exchange_over("comm", self.comm), "reducer", work)


class AllGather:
    """The exchange of PyTorch's SyncBatchNorm, plainly."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm.Dup()

    def forward(self, moments: Moments) -> tuple[Array, Array]:
        c = len(moments.mean)
        sent = np.empty(2 * c + 1, np.float32)
        sent[:c], sent[c:-1], sent[-1] = moments.mean, 1 / np.sqrt(moments.m2 / moments.n + EPS), moments.n
        all_ranks = np.empty((self.comm.size, 2 * c + 1), np.float32)
        _wait(self.comm.Iallgather(sent, all_ranks))
        means, invstds, counts = all_ranks[:, :c], all_ranks[:, c:-1], all_ranks[:, -1:]
        mean = (counts * means).sum(axis=0) / counts.sum()
        return mean, (counts * (1 / invstds**2 - EPS + (means - mean) ** 2)).sum(axis=0)

    def backward(self, a: Array, b: Array) -> tuple[Array, Array]:
        from mpi4py import MPI

        sums = np.concatenate([a, b]).astype(np.float32)
        _wait(self.comm.Iallreduce(MPI.IN_PLACE, sums))
        return sums[: len(a)], sums[len(a) :]

    def traffic(self, work: Callable[[], object]) -> Traffic:
        return _counted(self, "comm", work)


def _counted(owner: Any, name: str, work: Callable[[], object]) -> Traffic:
    """Return what `work` sends through an attribute of its owner."""
    counted = Counted(getattr(owner, name))
    setattr(owner, name, counted)
    try:
        work()
    finally:
        setattr(owner, name, counted.inner)
    return counted.traffic


def _wait(request: Any) -> None:
    while not request.Test():
        os.sched_yield()


@dataclass
class TimedCall:
    """A call and its samples, in seconds."""

    scheme: str
    operation: str
    call: Callable[[], object]
    traffic: Traffic | None = None
    seconds: list[float] = field(default_factory=list)

    def as_json(self, channels: int) -> dict[str, Any]:
        traffic = None if self.traffic is None else self.traffic._asdict()
        names = {"channels": channels, "scheme": self.scheme, "what": self.operation}
        return {**names, "seconds": self.seconds, "traffic": traffic}


def measure(comm: Comm, turns: int, channels: tuple[int, ...] = CHANNELS) -> jobs.Found:
    """On all ranks: the samples of every call for every number of channels; the result is that of rank 0."""
    from mpi4py import MPI

    set_num_threads(1)  # the ranks share the cores
    rows: list[dict[str, Any]] = []
    for c in channels:
        calls = [(one, calibrate_calls(comm, one.call)) for one in _timed_calls(comm, c)]
        for _ in range(turns):
            for one, count in calls:
                one.seconds.append(seconds_of(comm, one.call, count))
        rows += [one.as_json(c) for one, _ in calls]
    named = re.match(r"(\D*?)[\s:]*(?:Version[\s:]*)?v?(\d[\w.]*)", MPI.Get_library_version())
    library = " ".join(named.groups()) if named else "unknown MPI"
    return {"ranks": comm.size, "mpi": library, "rows": rows}


def _timed_calls(comm: Comm, c: int) -> list[TimedCall]:
    """Return everything that is timed for c channels. With one rank that is the layer, which then is a plain one."""
    rng = np.random.default_rng(comm.rank)
    x, dy = (rng.standard_normal((ROWS, c)).astype(np.float32) for _ in range(2))
    layer = BatchNorm1d(c) if comm.size == 1 else SyncBatchNorm(c, process_group=comm)

    def step() -> None:
        layer(x)
        layer.backward(dy)

    works = [TimedCall(OURS, LAYER, lambda: layer(x)), TimedCall(OURS, STEP, step)]
    if comm.size == 1:
        return works
    a, b = x.sum(axis=0, dtype=np.float64), dy.sum(axis=0, dtype=np.float64)
    mean = a / ROWS
    moments = Moments(ROWS, mean, ((x - mean) ** 2).sum(axis=0))
    results = []
    schemes: dict[str, Ours | AllGather] = {OURS: Ours(comm), GATHER: AllGather(comm)}
    for name, scheme in schemes.items():
        calls = {FORWARD: partial(scheme.forward, moments), BACKWARD: partial(scheme.backward, a, b)}
        works += [TimedCall(name, operation, call, scheme.traffic(call)) for operation, call in calls.items()]
        results.append([*calls[FORWARD](), *calls[BACKWARD]()])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)  # they do the same
    return works


def fastest(row: Mapping[str, Any]) -> float:
    """Return the seconds of the fastest turn. A rank that loses its core to another program keeps all waiting."""
    return float(min(row["seconds"]))


def calibrate_calls(comm: Comm, call: Callable[[], object], device: Any = None, most: float = math.inf) -> int:
    """Return the calls of a sample, the same on all ranks; the first ones compile what must be compiled."""
    calls = 1
    for _ in range(3):
        seconds = max(seconds_of(comm, call, min(100, calls), device), 1e-7)
        calls = comm.bcast(max(1, math.ceil(min(most, SAMPLE / seconds))))
    return calls


def seconds_of(comm: Comm, call: Callable[[], object], calls: int, device: Any = None) -> float:
    """Return the time of one call until the device is done with it, on the average of `calls`, for the slowest rank."""
    clock, wait = (time.perf_counter, lambda: None) if device is None else (device.clock, device.synchronize)
    wait()
    calls = comm.bcast(calls)
    start = clock()
    for _ in range(calls):
        call()
    wait()
    return float(max(comm.allgather((clock() - start) / calls)))


def main(file: str, turns: str) -> None:
    from mpi4py import MPI

    jobs.write(MPI.COMM_WORLD, file, measure(MPI.COMM_WORLD, int(turns)))


if __name__ == "__main__":
    main(*sys.argv[1:])

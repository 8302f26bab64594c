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
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from .. import exact as exact_sums
from .. import sync
from ..kernels.threads import set_num_threads
from ..layers import BatchNorm1d, SyncBatchNorm
from ..reference import Moments
from . import jobs
from .device import HostDevice

CHANNELS = (64, 128, 256, 512, 1024, 2048)
ROWS = 2  # of x on each rank: what is timed is the synchronization, not the sweeps
SAMPLE = 0.01  # seconds that a sample takes at least
EPS = 1e-5
OURS, EXACT, GATHER = "arraybn", "exact", "all-gather"
BARE, POLLED = "Allreduce", "Iallreduce + Test"  # a predefined sum of as many bytes as arraybn sends, and nothing else
FORWARD, BACKWARD = "forward", "backward"  # the exchange alone
LAYER, STEP = "layer", "step"  # layer(x); layer(x) and layer.backward(dy)

Array = np.ndarray[Any, Any]
Comm = Any  # mpi4py's
Timed = Callable[[], object]
COLLECTIVES = ("allreduce", "add", "Iallgather", "Iallreduce")
HOST = HostDevice()


class Counted:
    """A communicator or reducer whose collectives are counted, with the bytes that a rank sends and receives."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.traffic = inner, {"collectives": 0, "sent": 0, "received": 0}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        return partial(self._count, found) if name in COLLECTIVES else found

    def _count(self, collective: Callable[..., Any], *arguments: Any) -> Any:
        sent, *_, received = 2 * [one for one in arguments if isinstance(one, np.ndarray)]  # one is sent and received
        for name, more in (("collectives", 1), ("sent", sent.nbytes), ("received", received.nbytes)):
            self.traffic[name] += more
        return collective(*arguments)


class Ours:
    """The exchange of arraybn, with its agreement."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.counted = sync.exchange_over("comm", comm), "reducer"

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

    def add(self, operation: str, record: Array, n: int) -> tuple[Array, int]:
        """Add records, as exact mode does."""
        with self._begin(operation) as call:
            return sync.RankPool(call).record(record, n)


class AllGather:
    """The exchange of PyTorch's SyncBatchNorm, plainly."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm.Dup()
        self.counted = self, "comm"

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


class Bare:
    """MPI's own sum of as many float64 numbers as a call of arraybn sends, blocking or polled."""

    def __init__(self, comm: Comm, length: int) -> None:
        self.comm, self.numbers = comm.Dup(), np.zeros(length // 8)

    def blocking(self) -> None:
        from mpi4py import MPI

        self.comm.Allreduce(MPI.IN_PLACE, self.numbers)

    def polled(self) -> None:
        from mpi4py import MPI

        _wait(self.comm.Iallreduce(MPI.IN_PLACE, self.numbers))


def _wait(request: Any) -> None:
    while not request.Test():
        os.sched_yield()


def traffic(scheme: Ours | AllGather, call: Timed) -> dict[str, int]:
    """Return the collectives of a call of the scheme, and the bytes that a rank puts into them and gets back."""
    owner, name = scheme.counted
    counted = Counted(getattr(owner, name))
    setattr(owner, name, counted)
    try:
        call()
    finally:
        setattr(owner, name, counted.inner)
    return counted.traffic


def measure(comm: Comm, turns: int, channels: tuple[int, ...] = CHANNELS) -> jobs.Found:
    """On all ranks: the samples of every call for every number of channels; the result is that of rank 0."""
    from mpi4py import MPI

    set_num_threads(1)  # the ranks share the cores
    rows: list[dict[str, Any]] = []
    for c in channels:
        timed = [(call, calibrate_calls(comm, call), row) for call, row in _timed_calls(comm, c)]
        for _ in range(turns):
            for call, count, row in timed:
                row["seconds"].append(seconds_of(comm, call, count))
        rows += [row for _, _, row in timed]
    named = re.match(r"(\D*?)[\s:]*(?:Version[\s:]*)?v?(\d[\w.]*)", MPI.Get_library_version())
    library = " ".join(named.groups()) if named else "unknown MPI"
    return {"ranks": comm.size, "mpi": library, "rows": rows}


def layer_calls(layer: Any, x: Any, dy: Any) -> dict[str, Timed]:
    def step() -> None:
        layer(x)
        layer.backward(dy)

    return {LAYER: partial(layer, x), STEP: step}


def _timed_calls(comm: Comm, c: int) -> list[tuple[Timed, dict[str, Any]]]:
    """Return the calls for c channels, and their rows. With one rank that is the layer, which then is a plain one."""
    rng = np.random.default_rng(comm.rank)
    x, dy = (rng.standard_normal((ROWS, c)).astype(np.float32) for _ in range(2))
    found: list[tuple[Timed, dict[str, Any]]] = []

    def add(scheme: str, operation: str, call: Timed, sent: dict[str, int] | None = None) -> None:
        names = {"channels": c, "scheme": scheme, "what": operation}
        found.append((call, {**names, "seconds": [], "traffic": sent}))

    layer = BatchNorm1d(c) if comm.size == 1 else SyncBatchNorm(c, process_group=comm)
    for operation, call in layer_calls(layer, x, dy).items():
        add(OURS, operation, call)
    if comm.size == 1:
        return found
    a, b = x.sum(axis=0, dtype=np.float64), dy.sum(axis=0, dtype=np.float64)
    moments = Moments(ROWS, a / ROWS, ((x - a / ROWS) ** 2).sum(axis=0))
    record = exact_sums.squares(x[:, :, None])
    ours, gather = Ours(comm), AllGather(comm)
    calls: dict[tuple[str, str], tuple[Any, Timed]] = {
        (OURS, FORWARD): (ours, partial(ours.forward, moments)),
        (OURS, BACKWARD): (ours, partial(ours.backward, a, b)),
        (EXACT, FORWARD): (ours, partial(ours.add, sync.FORWARD, record, ROWS)),
        (EXACT, BACKWARD): (ours, partial(ours.add, sync.BACKWARD, record, 0)),
        (GATHER, FORWARD): (gather, partial(gather.forward, moments)),
        (GATHER, BACKWARD): (gather, partial(gather.backward, a, b)),
    }
    for key, (scheme, timed) in calls.items():
        add(*key, timed, traffic(scheme, timed))
    bare = Bare(comm, traffic(*calls[OURS, FORWARD])["received"])
    add(BARE, FORWARD, bare.blocking)
    add(POLLED, FORWARD, bare.polled)
    _check_alike({key: timed() for key, (_, timed) in calls.items()})
    return found


def _check_alike(results: dict[tuple[str, str], Any]) -> None:
    """Raise unless the schemes have the same results."""
    for operation in (FORWARD, BACKWARD):
        np.testing.assert_allclose(results[OURS, operation], results[GATHER, operation], rtol=1e-4, atol=1e-4)
    moments = exact_sums.mean_and_m2(*results[EXACT, FORWARD])
    np.testing.assert_allclose(moments, results[OURS, FORWARD], rtol=1e-6, atol=1e-6)


def fastest(row: Mapping[str, Any]) -> float:
    """Return the seconds of the fastest turn. A rank that loses its core to another program keeps all waiting."""
    return float(min(row["seconds"]))


def calibrate_calls(comm: Comm, call: Timed, device: HostDevice = HOST, most: float = math.inf) -> int:
    """Return the calls of a sample, the same on all ranks; the first ones compile what must be compiled."""
    calls = 1
    for _ in range(3):
        seconds = max(seconds_of(comm, call, min(100, calls), device), 1e-7)
        calls = comm.bcast(max(1, math.ceil(min(most, SAMPLE / seconds))))
    return calls


def seconds_of(comm: Comm, call: Timed, calls: int, device: HostDevice = HOST) -> float:
    """Return the time of one call until the device is done with it, on the average of `calls`, for the slowest rank."""
    _, seconds = device.host_seconds(call, comm.bcast(calls))
    return float(max(comm.allgather(seconds)))


def main(file: str, turns: str) -> None:
    from mpi4py import MPI

    jobs.write(MPI.COMM_WORLD, file, measure(MPI.COMM_WORLD, int(turns)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The process that works on the GPU for ``bench --device cuda``; it waits for questions, as `_bench_worker` does.

``python -m arraybn.commands._bench_cuda_worker MODULE:FUNCTION`` makes a device by that function and answers. It is a
process of its own because a fault on a GPU leaves it unusable for the process, and a kernel that hangs cannot be ended.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

from . import _bench_machine as machine
from ._bench_cuda_cases import GpuCase
from ._bench_cuda_check import Truth, fault, truths
from ._bench_cuda_contestants import (
    CONTESTANTS,
    LAYERS,
    Buffers,
    Calls,
    Contestant,
    make_buffers,
    memory_needed,
    sets,
)
from ._bench_cuda_device import LONGEST_HOLD, Device, NoDeviceError
from ._bench_worker import Answer, serve

CUDA = "arraybn.commands._bench_cuda_device:CudaDevice"
SAMPLE, MOST = 5e-4, 32  # seconds that a sample takes at least, and calls at most
OWN_SAMPLE, OWN_MOST = 5e-3, 200  # for a library that is timed from the host, waiting included
HOLD = 1e-4  # seconds beside those that the calls take the host
COPY, COPIES = 2**30, 9  # bytes; samples
LAUNCHES = 500
HOST_CALLS = 100


class Rotated:
    """A call on one set of buffers after the other. The last result of each is kept, so that results rotate as well."""

    def __init__(self, contestant: str, what: str, buffers: Buffers, function: Callable[[int], Any]) -> None:
        self.contestant, self.what, self.case, self.function = contestant, what, buffers.case, function
        self.count = len(buffers.slots)
        self.kept: dict[int, Any] = {}
        self._turn = 0

    def __call__(self) -> None:
        self._turn = (self._turn + 1) % self.count
        self.kept[self._turn] = self.function(self._turn)


class Work:
    """What the process holds between two questions."""

    def __init__(self, build: str) -> None:
        self.build = build
        self.device: Device
        self.buffers: Buffers | None = None
        self.truth: Truth = {}
        self.contestants = {contestant.name: contestant for contestant in CONTESTANTS}
        self.calls: dict[str, Calls] = {}
        self.hosts: dict[str, dict[str, Callable[[], Any]]] = {}
        self.rotated: Rotated | None = None

    def start(self) -> Answer:
        """Find the device, or say that there is none."""
        module, _, name = self.build.partition(":")
        try:
            self.device = getattr(importlib.import_module(module), name)()
        except NoDeviceError as error:
            return {"none": str(error)}
        return {"device": self.device.describe()}

    def join(self, contestants: list[str]) -> Answer:
        """Import what they need; for each its version and why it cannot take part, if so."""
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the memory is for everyone
        found = {}
        for name in contestants:
            one = self.contestants[name]
            try:
                importlib.import_module(one.package)
                absent = one.absent(self.device)
            except Exception as error:
                absent = f"cannot be used: {error}"
            found[name] = {"title": one.title, "version": machine.version(one.package), "absent": absent}
        return {"contestants": found}

    def alive(self) -> Answer:
        """Whether the device still works; the error if not."""
        self.device.synchronize()
        self.device.nothing()
        self.device.synchronize()
        return {}

    # ---- Ceilings ----

    def ceilings(self) -> Answer:
        """What the device can do at best: copies in memory and in L2, and launches."""
        device, l2 = self.device, self.device.describe()["l2"]
        large = int(min(COPY, device.free_memory() // 4))
        found: Answer = {"copy": self._copied(large, 4), "l2_copy": self._copied(max(4096, l2 // 4), 32, flush=False)}
        self._times(device.nothing, LAUNCHES, 3)
        queued = statistics.median(self._times(device.nothing, LAUNCHES, COPIES))
        found["launch"] = {"queued": queued, "host": self._host(device.nothing, LAUNCHES)[0]}
        found["launch"]["waited"] = statistics.median(self._host(device.nothing, 1)[1] for _ in range(50))
        return found

    def _copied(self, nbytes: int, calls: int, flush: bool = True) -> Answer:
        source, target = (self.device.empty((nbytes,), "u1") for _ in range(2))
        source[...] = 123
        seconds = self._times(lambda: self.device.copy(target, source), calls, COPIES + 2, flush)[2:]
        return {"bytes": nbytes, "seconds": seconds, "gb_per_s": 2 * nbytes / statistics.median(seconds) / 1e9}

    def _times(self, call: Callable[[], object], calls: int, samples: int, flush: bool = True) -> list[float]:
        hold = 2 * self._host(call, calls)[0] * calls + HOLD
        return [self.device.timed(call, calls, hold, flush)[0] for _ in range(samples)]

    def _host(self, call: Callable[[], object], calls: int) -> tuple[float, float]:
        """Seconds of a call until the host has queued it; and until all are done."""
        clock = self.device.clock
        self.device.synchronize()
        start = clock()
        for _ in range(calls):
            call()
        queued = clock()
        self.device.synchronize()
        return (queued - start) / calls, (clock() - start) / calls

    # ---- The table ----

    def open(self, case: GpuCase, seed: int) -> Answer:
        """Make the buffers of a case, and what every call ought to return."""
        self.close()
        count = sets(case, self.device)
        needed, free = memory_needed(case, count), self.device.free_memory()
        if needed > free:
            text = f"skipped: needs about {needed / 1e9:.1f} GB of the GPU, {free / 1e9:.1f} GB are free"
            return {"skipped": text, "sets": 0}
        self.buffers = make_buffers(self.device, case, count, seed)
        arrays = {"x": self.buffers.slots[0].x, "dy": self.buffers.slots[0].dy, **self.buffers.vectors}
        self.truth = truths(self.device.xp, case, arrays, self.buffers.eps)
        return {"skipped": "", "sets": count}

    def close(self) -> Answer:
        """Forget the case, so that never two are in memory."""
        self.buffers, self.truth, self.rotated, self.calls, self.hosts = None, {}, None, {}, {}
        gc.collect()
        return {}

    def check(self, contestant: str) -> Answer:
        """For each thing that it does, what is wrong with the results, and what was chosen inside."""
        assert self.buffers is not None
        one, case = self.contestants[contestant], self.buffers.case
        built = self.calls[contestant] = one.build(self.device, self.buffers)
        self.device.synchronize()
        faults = {what: self._fault(one, built, what) for what in case.whats}
        backend = {what: built.backend.get(what) for what in case.whats}
        return {"faults": faults, "backend": backend, "clock": "device" if built.wait is None else "host"}

    def _fault(self, one: Contestant, built: Calls, what: str) -> str:
        assert self.buffers is not None
        built.poison()
        result = built.calls[what](0)
        if built.wait is not None:
            built.wait(result)
        self.device.synchronize()
        arrays = [built.read(array) for array in (result if isinstance(result, tuple | list) else (result,))]
        return fault(self.device.xp, arrays, self.truth[what], self.buffers.case, ours=one.ours)

    def prepare(self, contestant: str, what: str) -> Answer:
        """Call it until it is warm; how often a sample calls it, and how long the stream is held for that."""
        built = self.calls[contestant]
        call = self._rotated(contestant, what)
        if built.wait is not None:
            self._own(contestant, what, 2)
            seconds = self._own(contestant, what, 3)
            return {"calls": min(OWN_MOST, math.ceil(OWN_SAMPLE / seconds)), "hold": 0.0}
        for _ in range(2):
            self._host(call, 2)
        host = self._host(call, 3)[0]
        seconds = self.device.timed(call, 3, min(LONGEST_HOLD, 6 * host + HOLD))[0]
        calls = max(1, min(MOST, math.ceil(SAMPLE / max(seconds, 1e-9)), int(LONGEST_HOLD / 2 / max(host, 1e-9))))
        return {"calls": calls, "hold": 2 * host * calls + HOLD}

    def _rotated(self, contestant: str, what: str) -> Rotated:
        """The call on one set of buffers after the other; what the last contestant has left is forgotten."""
        assert self.buffers is not None
        self.rotated = Rotated(contestant, what, self.buffers, self.calls[contestant].calls[what])
        return self.rotated

    def time(self, contestant: str, what: str, calls: int, hold: float) -> Answer:
        """Seconds that one call took on the device; and whether that had to wait for the host."""
        if self.calls[contestant].wait is not None:
            return {"seconds": self._own(contestant, what, calls), "late": False}
        seconds, late = self.device.timed(self._rotated(contestant, what), calls, hold)
        return {"seconds": seconds, "late": late}

    def _own(self, contestant: str, what: str, calls: int) -> float:
        """Seconds of a call of a library with a stream of its own: by the host's clock, until all are done."""
        call, wait = self._rotated(contestant, what), self.calls[contestant].wait
        assert wait is not None
        self.device.synchronize()
        start = self.device.clock()
        for _ in range(calls):
            call()
        wait(list(call.kept.values()))
        return (self.device.clock() - start) / calls

    def release(self, contestant: str) -> Answer:
        """Forget a contestant that is not timed."""
        self.calls.pop(contestant, None)
        return {}

    # ---- Host time ----

    def layer(self, row: str, case: GpuCase) -> Answer:
        """Make a layer and warm it up."""
        self.buffers = self.buffers or make_buffers(self.device, case, 1, 0)
        self.hosts[row] = LAYERS[row](self.device, self.buffers)
        for what in case.whats:
            self._host(self.hosts[row][what], 20)
        return {}

    def host(self, row: str, what: str) -> Answer:
        """Seconds of a call for the host, back to back without waiting; and until the device is done with it."""
        queued, done = self._host(self.hosts[row][what], HOST_CALLS)
        return {"seconds": queued, "done": done}


if __name__ == "__main__":
    serve(Work(sys.argv[1]), GpuCase)

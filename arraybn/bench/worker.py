"""The work of a bench process between two questions: for one library on the CPU, for all of them on a GPU.

The GPU has a process of its own too: a fault there leaves the GPU unusable for the process, and a kernel that hangs
cannot be ended.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from . import machine
from .cases import Case
from .contestants import Call, Calls, Contestant
from .contestants.registry import GPU_CONTESTANTS, GPU_LAYERS, why_absent
from .device import LONGEST_HOLD, CudaDevice, HostDevice, NoDeviceError
from .timing import calibrate_calls, rest, seconds_of
from .truth import Problem, Truth, fault, make_problems, truths

Answer = dict[str, Any]

# ---- The CPU ---------------------------------------------------------------------------------------------------------


class Work:
    """The contestants of a library, and the arrays of one case."""

    device: Any = HostDevice()
    fault_of = " of {}"  # the operation in the text of a fault, which on the CPU costs all operations

    def __init__(self, contestants: Sequence[Contestant], packages: Sequence[str] = ()) -> None:
        self.contestants, self.packages = {one.name: one for one in contestants}, packages
        self.problems: list[Problem] = []
        self.truth: Truth = {}
        self.calls: dict[str, list[Calls]] = {}  # for each problem
        self.kept: dict[str, deque[Any]] = {}  # the latest results of each contestant

    def start(self) -> Answer:
        for name in self.packages:
            importlib.import_module(name)
        return {}

    def open(self, case: Case, seed: int = 0, count: int = 1) -> Answer:
        self.close()
        self.problems = make_problems(self.device, case, count, seed)
        return {"skipped": ""}

    def close(self) -> None:
        """Forget the case, so that never two are in memory."""
        self.problems, self.truth, self.calls, self.kept = [], {}, {}, {}
        gc.collect()

    def built(self, name: str) -> list[Calls]:
        if name not in self.calls:
            self.calls[name] = [self.contestants[name].build(self.device, one, name) for one in self.problems]
        return self.calls[name]

    def check(self, contestant: str) -> Answer:
        """Return, for each operation, what is wrong with the results and what was chosen inside."""
        one, first, case = self.contestants[contestant], self.built(contestant)[0], self.problems[0].case
        self.truth = self.truth or truths(self.device.xp, self.problems[0])
        self.device.synchronize()
        operations = [operation for operation in case.operations if operation in one.operations]
        faults = {operation: self._fault(one, first, operation) for operation in operations}
        backend = {operation: first.backend.get(operation) for operation in operations}
        return {"faults": faults, "backend": backend, "clock": "device" if first.wait is None else "host"}

    def _fault(self, one: Contestant, first: Calls, operation: str) -> str:
        first.poison()
        result = first.operations[operation]()
        if first.wait is not None:
            first.wait(result)
        self.device.synchronize()
        got = [first.read(array) for array in (result if isinstance(result, tuple | list) else (result,))]
        truth = self.truth[operation][: len(got) if operation == "step" else None]
        of = self.fault_of.format(operation)
        return fault(self.device.xp, got, truth, self.problems[0].case, ours=one.ours, of=of)

    def prepare(self, contestant: str, operation: str) -> Answer:
        """Call it until it is warm; return how a sample is taken."""
        self.kept.setdefault(contestant, deque(maxlen=self.problems[0].case.alive))
        calls, warm = calibrate_calls(self.built(contestant)[0].operations[operation], self.kept[contestant])
        return {"calls": calls, "warm": warm}

    def time(self, contestant: str, operation: str, calls: int, warm: int) -> float:
        """Return the seconds that one call took, on the average."""
        seconds = seconds_of(self.calls[contestant][0].operations[operation], calls, warm, self.kept[contestant])
        rest()
        return seconds


# ---- A GPU -----------------------------------------------------------------------------------------------------------

SETS = 4  # problems that calls take turns with, at least
SAMPLE, MOST = 5e-4, 32  # seconds that a sample takes at least, and calls at most
OWN_SAMPLE, OWN_MOST = 5e-3, 200  # for a library that is timed from the host, waiting included
HOLD = 1e-4  # seconds beside those that the calls take the host
COPY, COPIES = 2**30, 9  # bytes; samples
LAUNCHES, HOST_CALLS = 500, 100


def problem_count(case: Case, device: Any) -> int:
    """Return how many problems the calls take turns with."""
    return max(SETS, -int(-max(device.together, 4.0 * device.describe()["l2"]) // case.nbytes))


def memory_needed(case: Case, count: int) -> float:
    """Return about how many bytes they take, with the results of a library beside ours and the truth in float64."""
    return count * 6.0 * case.nbytes + 20 * 8.0 * case.elements


class Rotated:
    """A call on one problem after the other. The last result of each is kept, so that results rotate as well."""

    def __init__(self, contestant: str, operation: str, case: Case, calls: Sequence[Call]) -> None:
        self.contestant, self.operation, self.case = contestant, operation, case
        self.kept: deque[Any] = deque(maxlen=len(calls))
        self._calls = itertools.cycle(calls)

    def __call__(self) -> None:
        self.kept.append(next(self._calls)())


class GpuWork(Work):
    """All contestants on one GPU."""

    fault_of = ""

    def __init__(self, make_device: Callable[[], Any] = CudaDevice) -> None:
        super().__init__(GPU_CONTESTANTS)
        self.make_device = make_device
        self.layers: dict[str, dict[str, Call]] = {}
        self.rotated: Rotated | None = None

    def start(self) -> Answer:
        """Find the device, or say that there is none."""
        try:
            self.device = self.make_device()
        except NoDeviceError as error:
            return {"none": str(error)}
        return {"device": self.device.describe()}

    def join(self, contestant: str) -> Answer:
        """Import what a contestant needs; return its version, and why it cannot take part, if so."""
        one = self.contestants[contestant]
        try:
            importlib.import_module(one.package)
            absent = why_absent(one, self.device)
        except Exception as error:
            absent = f"cannot be used: {error}"
        return {"title": one.row, "version": machine.version(one.package), "absent": absent}

    def alive(self) -> None:
        """Raise if the device no longer works."""
        self.device.synchronize()
        self.device.nothing()
        self.device.synchronize()

    def ceilings(self) -> Answer:
        """Return what the device can do at best: copies in memory and in L2, and launches."""
        device, l2 = self.device, self.device.describe()["l2"]
        large = int(min(COPY, device.free_memory() // 4))
        found: Answer = {"copy": self._copied(large, 4), "l2_copy": self._copied(max(4096, l2 // 4), 32, flush=False)}
        self._times(device.nothing, LAUNCHES, 3)
        queued = statistics.median(self._times(device.nothing, LAUNCHES, COPIES))
        found["launch"] = {"queued": queued, "host": device.host_seconds(device.nothing, LAUNCHES)[0]}
        found["launch"]["waited"] = statistics.median(device.host_seconds(device.nothing, 1)[1] for _ in range(50))
        return found

    def _copied(self, nbytes: int, calls: int, flush: bool = True) -> Answer:
        source, target = (self.device.empty((nbytes,), "u1") for _ in range(2))
        source[...] = 123
        seconds = self._times(lambda: self.device.copy(target, source), calls, COPIES + 2, flush)[2:]
        return {"bytes": nbytes, "seconds": seconds, "gb_per_s": 2 * nbytes / statistics.median(seconds) / 1e9}

    def _times(self, call: Call, calls: int, samples: int, flush: bool = True) -> list[float]:
        hold = 2 * self.device.host_seconds(call, calls)[0] * calls + HOLD
        return [self.device.timed(call, calls, hold, flush)[0] for _ in range(samples)]

    def open(self, case: Case, seed: int = 0, count: int = 0) -> Answer:
        """Make the arrays of a case, or say why it is skipped."""
        self.close()
        count = count or problem_count(case, self.device)
        needed, free = memory_needed(case, count), self.device.free_memory()
        if needed > free:
            text = f"skipped: needs about {needed / 1e9:.1f} GB of the GPU, {free / 1e9:.1f} GB are free"
            return {"skipped": text}
        found = super().open(case, seed, count)
        self.truth = truths(self.device.xp, self.problems[0])
        return found

    def close(self) -> None:
        self.rotated, self.layers = None, {}
        super().close()

    def prepare(self, contestant: str, operation: str) -> Answer:
        """Call it until it is warm; return the calls of a sample, and how long the stream is held for them."""
        if self.calls[contestant][0].wait is not None:
            self.time_on_device(contestant, operation, 2)
            seconds = self.time_on_device(contestant, operation, 3)["seconds"]
            return {"calls": min(OWN_MOST, math.ceil(OWN_SAMPLE / seconds)), "hold": 0.0}
        call = self._rotate(contestant, operation)
        for _ in range(2):
            self.device.host_seconds(call, 2)
        host, _ = self.device.host_seconds(call, 3)
        seconds, _ = self.device.timed(call, 3, min(LONGEST_HOLD, 6 * host + HOLD))
        calls = max(1, min(MOST, math.ceil(SAMPLE / max(seconds, 1e-9)), int(LONGEST_HOLD / 2 / max(host, 1e-9))))
        return {"calls": calls, "hold": 2 * host * calls + HOLD}

    def _rotate(self, contestant: str, operation: str) -> Rotated:
        """Return the call on one problem after the other; what the last contestant has left is forgotten."""
        calls = [one.operations[operation] for one in self.calls[contestant]]
        self.rotated = Rotated(contestant, operation, self.problems[0].case, calls)
        return self.rotated

    def time_on_device(self, contestant: str, operation: str, calls: int, hold: float = 0.0) -> Answer:
        """Return the seconds that one call took, and whether the device had to wait for the host.

        They are by the host's clock, waiting included, where the library has a stream of its own.
        """
        call, wait = self._rotate(contestant, operation), self.calls[contestant][0].wait
        if wait is not None:
            _, seconds = self.device.host_seconds(call, calls, lambda: wait(list(call.kept)))
            return {"seconds": seconds, "late": False}
        seconds, late = self.device.timed(call, calls, hold)
        return {"seconds": seconds, "late": late}

    def release(self, contestant: str) -> None:
        """Forget a contestant that is not timed."""
        self.calls.pop(contestant, None)

    def layer(self, contestant: str, case: Case) -> None:
        self.problems = self.problems or make_problems(self.device, case)
        self.layers[contestant] = GPU_LAYERS[contestant](self.device, self.problems[0])
        for operation in case.operations:
            self.device.host_seconds(self.layers[contestant][operation], 20)

    def time_on_host(self, contestant: str, operation: str) -> Answer:
        """Return the seconds of a call for the host, back to back, and until the device is done with it."""
        queued, done = self.device.host_seconds(self.layers[contestant][operation], HOST_CALLS)
        return {"seconds": queued, "done": done}

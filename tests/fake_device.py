"""A device for ``bench --device cuda`` where there is none: NumPy arrays, and a clock that goes by the bytes.

Processes that the tests start find it by the name of this module.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from arraybn import reference
from arraybn.bench.device import HostDevice, NoDeviceError

SPEED, L2, LAUNCH, TICK = 2e7, 2**10, 2e-6, 0.01  # bytes a second; bytes; seconds
OF_FLOOR = {"fused": 0.9, "split": 0.6, "reference": 0.05, "masked": 0.5, "exact": 0.5, "torch": 0.4, "native": 0.2}


def scaled(factor: float) -> Any:
    """Kernels whose y and dx are too large by a factor."""

    def affine(x: Any, mean: Any, a: Any, c: Any, out: Any = None) -> Any:
        return _into(out, (reference.affine(x, mean, a, c) * factor).astype(x.dtype))

    def affine2(u: Any, x: Any, mean: Any, a: Any, b: Any, c: Any, out: Any = None) -> Any:
        return _into(out, (reference.affine2(u, x, mean, a, b, c) * factor).astype(x.dtype))

    return SimpleNamespace(moments=reference.moments, dots=reference.dots, affine=affine, affine2=affine2)


def _into(out: Any, values: Any) -> Any:
    if out is None:
        return values
    out[...] = values
    return out


def named(call: Any) -> str:
    """The contestant whose call it is; '' if it is another call."""
    return getattr(call, "contestant", "")


class FakeDevice(HostDevice):
    """As `Device`: what is queued is done at once, and takes as long as its bytes say."""

    together, free = 6e3, 10**7  # bytes

    def __init__(self, index: int = 0) -> None:
        self.now, self.index = 0.0, index
        self.kernels: dict[str, Any] = {"fused": scaled(1.0), "split": reference, "reference": "reference"}
        self.flushes = 0

    def describe(self) -> dict[str, Any]:
        return {"name": "a fake", "memory": 2**30, "l2": L2}

    def array(self, host: Any) -> Any:
        return np.array(host)

    def share_stream(self, library: Any) -> None:
        library.set_num_threads(1)  # the cores may be busy

    def free_memory(self) -> int:
        return self.free

    def clock(self) -> float:
        self.now += TICK
        return self.now

    def copy(self, target: Any, source: Any) -> None:
        np.copyto(target, source)
        self.now += 2 * source.nbytes / (SPEED if source.nbytes > 4 * L2 else 3 * SPEED)

    def nothing(self) -> None:
        self.now += LAUNCH

    def timed(self, call: Callable[[], object], calls: int, hold: float, flush: bool = True) -> tuple[float, bool]:
        self.flushes += flush
        before = self.now
        for _ in range(calls):
            call()
            self.work(call)
        return (self.now - before) / calls, hold > 1

    def work(self, call: Any) -> None:
        """Let the time pass that such a call takes."""
        if named(call):
            self.now += call.case.moved(call.operation) / SPEED / OF_FLOOR[call.contestant]


class NoDevice(FakeDevice):
    def __init__(self, index: int = 0) -> None:
        raise NoDeviceError("there is no GPU in this fake")


class WrongDevice(FakeDevice):
    """Fused is wrong by 0.1 %."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.kernels["fused"] = scaled(1.001)


class WrongPeerDevice(FakeDevice):
    """PyTorch is wrong by 1 %."""

    def share_stream(self, library: Any) -> None:
        if not hasattr(library.nn.functional, "right"):
            library.nn.functional.right = library.nn.functional.batch_norm
        library.nn.functional.batch_norm = lambda *a, **k: 1.01 * library.nn.functional.right(*a, **k)


class CrashingDevice(FakeDevice):
    """Fused ends the process when its backward is timed."""

    def work(self, call: Any) -> None:
        if (named(call), getattr(call, "operation", "")) == ("fused", "backward"):
            os._exit(3)
        super().work(call)


class BrokenDevice(FakeDevice):
    """Once split has been timed, nothing works any more, as after a wrong address."""

    broken = False

    def work(self, call: Any) -> None:
        super().work(call)
        if named(call) == "split":
            self.broken = True
            raise RuntimeError("an illegal memory access was encountered")

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")


class HangingDevice(FakeDevice):
    """Fused never ends."""

    def work(self, call: Any) -> None:
        if named(call) == "fused":
            time.sleep(1000)
        super().work(call)

"""The device of a bench: NumPy arrays on the host, or a GPU, where `CudaDevice` alone touches stream and clock.

A test has another device with the methods of `CudaDevice`, on NumPy arrays and a clock of its own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from .._install import requirement

Array = Any
LONGEST_HOLD = 0.05  # seconds
SOURCE = r"""
extern "C" __global__ void nothing() {}

static __device__ unsigned long long nanoseconds() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// Keeps the stream busy, so that the host can queue the work that is to be timed before any of it begins.
extern "C" __global__ void hold(unsigned long long length) {
    const unsigned long long start = nanoseconds();
    while (nanoseconds() - start < length) {}
}
"""


class NoDeviceError(Exception):
    """There is no GPU to work with; the text says why, and what brings one."""


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python from collecting garbage, which would be timed too."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class HostDevice:
    """NumPy arrays, and what is done at once."""

    xp: Any = np  # the namespace of its arrays
    platform = "cpu"  # as JAX calls it
    kernels: ClassVar[Mapping[str, Any]] = {}  # by contestant, the kernels= of batch_norm

    def array(self, host: np.ndarray[Any, Any]) -> Array:
        return host

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self.xp.empty(shape, dtype)

    def share_stream(self, library: Any) -> None:
        """Let PyTorch queue its work on our stream."""

    def synchronize(self) -> None:
        """Wait for everything that is queued, other libraries' streams included."""

    def clock(self) -> float:
        return time.perf_counter()

    def host_seconds(
        self, call: Callable[[], object], calls: int, wait: Callable[[], object] | None = None
    ) -> tuple[float, float]:
        """Return the seconds of a call until the host has queued it, and until the device is done with all."""
        self.synchronize()
        start = self.clock()
        for _ in range(calls):
            call()
        queued = self.clock()
        (wait or self.synchronize)()
        return (queued - start) / calls, (self.clock() - start) / calls


class CudaDevice(HostDevice):
    """A GPU by CuPy; its methods are for the thread that made it. `index` may be larger than there are GPUs."""

    platform = "gpu"
    together = 200e6  # bytes of x that calls rotate over, at least, so that nothing is found in L2 by luck
    kernels: ClassVar[Mapping[str, Any]] = {"fused": "cuda", "split": "cuda_split", "reference": "reference"}

    def __init__(self, index: int = 0) -> None:
        try:
            self.xp: Any = importlib.import_module("cupy")
        except ImportError as error:
            raise NoDeviceError(
                f"cupy cannot be imported ({error}):  pip install {requirement('cuda13')}, or cuda12"
            ) from error
        self._runtime = self.xp.cuda.runtime
        try:
            count = self._runtime.getDeviceCount()
        except self._runtime.CUDARuntimeError as error:
            raise NoDeviceError(f"CUDA finds no GPU: {error}") from error
        if count < 1:
            raise NoDeviceError("CUDA finds no GPU")
        self.xp.cuda.Device(index % count).use()
        self.stream = self.xp.cuda.Stream(non_blocking=True)
        self.stream.use()
        module = self.xp.RawModule(code=SOURCE)
        self._nothing, self._hold = (module.get_function(name) for name in ("nothing", "hold"))
        self._properties = self._runtime.getDeviceProperties(index % count)
        self._scratch = self.xp.empty(2 * max(self._properties["l2CacheSize"], 2**20), np.uint8)

    def describe(self) -> dict[str, Any]:
        """Return name, memory, L2, multiprocessors, compute capability and the versions of CUDA."""
        found = self._properties
        return {
            "name": found["name"].decode(),
            "memory": found["totalGlobalMem"],
            "l2": found["l2CacheSize"],
            "multiprocessors": found["multiProcessorCount"],
            "capability": f"{found['major']}.{found['minor']}",
            "driver": self._runtime.driverGetVersion(),
            "runtime": self._runtime.runtimeGetVersion(),
        }

    def array(self, host: np.ndarray[Any, Any]) -> Array:
        return self.xp.asarray(host)

    def share_stream(self, library: Any) -> None:
        library.cuda.set_stream(library.cuda.ExternalStream(self.stream.ptr))

    def free_memory(self) -> int:
        """Return the bytes that can still be had, once CuPy and PyTorch have given back what they had put by."""
        self.xp.get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
        free: int = self._runtime.memGetInfo()[0]
        return free

    def synchronize(self) -> None:
        self._runtime.deviceSynchronize()

    def copy(self, target: Array, source: Array) -> None:
        """Queue a copy of all bytes of a contiguous array."""
        kind = self._runtime.memcpyDeviceToDevice
        self._runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, kind, self.stream.ptr)

    def nothing(self) -> None:
        self._nothing((1,), (1,), ())

    def timed(self, call: Callable[[], object], calls: int, hold: float, flush: bool = True) -> tuple[float, bool]:
        """Return the seconds of one of `calls` calls on the device, and whether the device had to wait for the host.

        The stream is held until the host has queued them all; with `flush`, nothing of before is left in L2.
        """
        start, stop = (self.xp.cuda.Event() for _ in range(2))
        self.synchronize()
        with no_collection():
            if flush:
                self._runtime.memsetAsync(self._scratch.data.ptr, 1, self._scratch.nbytes, self.stream.ptr)
            self._hold((1,), (1,), (np.uint64(min(hold, LONGEST_HOLD) * 1e9),))
            start.record(self.stream)
            for _ in range(calls):
                call()
            late = bool(start.done)  # the hold is over, and not all was queued
            stop.record(self.stream)
            stop.synchronize()
        return self.xp.cuda.get_elapsed_time(start, stop) / 1e3 / calls, late

"""Building and launching kernels: everything that touches CuPy.

`Launcher` knows what a launch needs: a function built for the device, room for the sums of parts, one packed struct.
`CuPy` has the few calls that reach the GPU. ``tests/cuda/shim.py`` puts others in their place, which run the same
source on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import struct
import threading
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from ..._arrays.namespaces import Array

# CuPy adds -ftz=true, so float32 numbers below 2⁻¹²⁶ count as 0. Without -fmad=false each compiler would choose which
# products and sums it fuses; where fusing matters, the source asks for it.
OPTIONS = ("-std=c++17", "-fmad=false")
SWEEPS = ("values.cuh", "formulas.cuh", "sweeps.cu")

PORTABLE = 8  # blocks of a cluster, which every GPU with clusters holds

# The fields of struct Parameters in values.cuh.
POINTERS = (
    "x", "u", "out", "mean", "m2", "rstd", "shift", "weight", "bias", "kept_weight", "dweight", "dbias",
    "a", "b", "c", "d", "v", "where", "first", "second", "new_first", "new_second", "partials", "tickets",
)  # fmt: skip
FLOATS = ("eps", "momentum")
NUMBERS = (
    "n", "channels", "groups", "parts", "items", "part", "plane", "stride", "columns", "ahead",
    "parameter_kind", "state_kind", "by_groups", "by_plane",
)  # fmt: skip
_STRUCT = struct.Struct(f"={len(POINTERS)}Q{len(FLOATS)}d{len(NUMBERS) - 2}qQqQq")  # a divisor has two numbers


class Kernel(NamedTuple):
    """A kernel of the source `files`, for a dtype and a number of values that one load brings."""

    name: str
    dtype: str
    width: int
    files: tuple[str, ...] = SWEEPS
    dynamic: bool = False  # True where a launch states the size of its shared memory
    blocks: int = 1  # in a cluster

    @property
    def entry(self) -> str:
        """The kernel's name in the compiled code."""
        return f"{self.name}_{self.dtype}_{self.width}"


class Grid(NamedTuple):
    """The blocks and threads of a launch, and the memory that the launch needs beside its arguments."""

    blocks: int
    threads: int
    partials: int = 0  # bytes for the sums of parts
    tickets: int = 0  # counters
    shared: int = 0  # bytes of shared memory that the launch states


class Device(NamedTuple):
    """The properties of a GPU on which the choice of a kernel depends; memory in bytes."""

    multiprocessors: int
    cache: int  # L2
    shared: int  # shared memory of one block at most
    shared_in_all: int  # shared memory of all blocks of a multiprocessor together
    capability: int = 9  # the first number of the compute capability: from 9 on there are bulk copies


@functools.cache
def _text(file: str) -> str:
    return (Path(__file__).parent / file).read_text(encoding="utf-8")


def source(*kernels: Kernel) -> str:
    """Return the CUDA source that defines the entries of these kernels, all from the same files."""
    files = [f'#line 1 "{file}"\n{_text(file)}' for file in kernels[0].files]
    return "\n".join([*files, *(f"ENTRY({k.name}, {k.dtype}, {k.width})" for k in kernels), ""])


class _Room(NamedTuple):
    """The workspace of a stream: its arrays, their addresses, and their sizes in bytes."""

    arrays: tuple[Array, Array]
    addresses: tuple[int, int]
    partials: int
    tickets: int


class _Packed(threading.local):
    """A thread's buffer for the parameters of a launch, which the driver copies before the launch returns."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(_STRUCT.size)
        self.arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self.buffer))
        self.address = ctypes.addressof(self.arguments)


class Launcher(ABC):
    """The launcher: it builds a kernel at the kernel's first launch on a device, and keeps a workspace for each stream.

    A workspace is zeroed once; a kernel leaves its counters at zero. Launches on one stream follow each other, so they
    share it. A CUDA graph has that of the stream it was captured on, and must not run at the same time as another one,
    or as a launch on that stream. During a capture none is made: it would be zeroed when the graph runs, not before.
    """

    def __init__(self) -> None:
        self._functions: dict[tuple[Kernel, int], tuple[int, Any]] = {}
        self._rooms: dict[tuple[int, int, int], _Room] = {}
        self._outgrown: list[_Room] = []  # a captured graph may still point to them
        self._lock = threading.Lock()
        self._packed = _Packed()

    # The calls that reach the GPU

    @abstractmethod
    def on(self, array: Array) -> AbstractContextManager[Any]:
        """Return a context in which the device of `array` is the current device."""

    @abstractmethod
    def at(self, device: int) -> AbstractContextManager[Any]:
        """Return a context in which the device of that number is the current device."""

    @abstractmethod
    def current(self) -> tuple[int, int]:
        """Return the number of the current device, and the address of its current stream."""

    def capturing(self, stream: int) -> bool:
        """Return whether a CUDA graph is being captured on this stream of the current device."""
        return False

    @abstractmethod
    def device(self) -> Device:
        """Return the properties of the current device."""

    @abstractmethod
    def holds_cluster(self, blocks: int) -> bool:
        """Return True if the current device runs a cluster of blocks that have all the shared memory they may have."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new array on the current device."""

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new array of zeros on the current device."""

    @abstractmethod
    def pointer(self, array: Array) -> int:
        """Return the address of the first value."""

    @abstractmethod
    def build(self, kernel: Kernel) -> tuple[int, Any]:
        """Return the kernel's address on the current device, and the object that keeps the kernel loaded."""

    @abstractmethod
    def start(self, function: int, grid: Grid, stream: int, arguments: int) -> None:
        """Launch `function` with the addresses of its arguments at `arguments`."""

    # The launch

    def launch(
        self,
        kernel: Kernel,
        grid: Grid,
        pointers: tuple[int, ...],
        numbers: tuple[float, ...],
        where: tuple[int, int] | None = None,
    ) -> None:
        """Launch `kernel` with all pointers but the two of the workspace, and all numbers.

        `where` is what `current` returns, where the caller has asked already.
        """
        device, stream = where or self.current()
        try:
            function = (self._functions.get((kernel, device)) or self._built(kernel, device))[0]
            room = self._room(device, stream, grid)
            packed = self._packed
            _STRUCT.pack_into(packed.buffer, 0, *pointers, *room, *numbers)
            self.start(function, grid, stream, packed.address)
        except Exception as error:
            with self._lock:  # the state of its counters is not known now
                self._outgrown += [self._rooms.pop(key) for key in list(self._rooms) if key[0] == device]
            raise RuntimeError(f"the CUDA kernel {kernel.entry} could not be launched: {error}") from error

    def _built(self, kernel: Kernel, device: int) -> tuple[int, Any]:
        with self._lock:
            if (kernel, device) not in self._functions:
                self._functions[kernel, device] = self.build(kernel)
            return self._functions[kernel, device]

    def _room(self, device: int, stream: int, grid: Grid) -> tuple[int, int]:
        """Return the addresses of the sums of parts and of the counters."""
        if not grid.tickets:
            return 0, 0
        thread = threading.get_ident() if stream == 2 else 0  # the default streams of all threads have one address
        key = device, stream, thread
        room = self._rooms.get(key)
        if room is None or room.partials < grid.partials or room.tickets < grid.tickets:
            room = self._grown(key, grid)
        return room.addresses

    def _grown(self, key: tuple[int, int, int], grid: Grid) -> _Room:
        if self.capturing(key[1]):
            raise RuntimeError("a graph is captured on this stream, where no such call was made before; make one first")
        with self._lock:
            old = self._rooms.get(key)
            sizes = [grid.partials, grid.tickets] if old is None else [old.partials, old.tickets]
            partials, tickets = max(2 * sizes[0], grid.partials, 2**16), max(2 * sizes[1], grid.tickets, 2**10)
            arrays = self.empty((partials // 8,), "f8"), self.zeros((tickets,), "u4")
            if old is not None:
                self._outgrown.append(old)
            room = self._rooms[key] = _Room(
                arrays, (self.pointer(arrays[0]), self.pointer(arrays[1])), partials, tickets
            )
            return room


class _Contexts(threading.local):
    """The devices for which a thread has a context."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_ATTRIBUTES = (16, 38, 97, 81, 75)  # the fields of Device, as cudaDeviceAttr numbers them
_NON_PORTABLE = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
_PROBE = 'extern "C" __global__ void __cluster_dims__({}, 1, 1) probe() {{}}'


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig, for a kernel that states the size of its clusters itself."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("number", ctypes.c_uint),
    )


class CuPy(Launcher):
    """The calls of CuPy that reach the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self._cupy = importlib.import_module("cupy")
        self._driver = importlib.import_module("cupy_backends.cuda.api.driver")
        self._runtime = importlib.import_module("cupy_backends.cuda.api.runtime")
        self._devices: dict[int, Device] = {}
        self._holds: dict[tuple[int, int], bool] = {}
        self._contexts = _Contexts()

    def on(self, array: Array) -> AbstractContextManager[Any]:
        """Return a context in which the device of `array` is the current device."""
        return self.at(array.data.device_id)

    def at(self, device: int) -> AbstractContextManager[Any]:
        """Return a context in which the device of that number is the current device."""
        return nullcontext() if device == self._runtime.getDevice() else self._cupy.cuda.Device(device)

    def current(self) -> tuple[int, int]:
        """Return the number of the current device, and the address of its current stream."""
        device = self._runtime.getDevice()
        if (
            device not in self._contexts.devices
        ):  # a new thread has no context, and the driver cannot launch without one
            self._runtime.memGetInfo()  # creates the context; a pooled allocation would not
            self._contexts.devices.add(device)
        return device, self._cupy.cuda.get_current_stream().ptr

    def capturing(self, stream: int) -> bool:
        """Return whether a CUDA graph is being captured on this stream of the current device."""
        return stream > 1 and bool(
            self._runtime.streamIsCapturing(stream)
        )  # the legacy default streams, 0 and 1, are never captured

    def device(self) -> Device:
        """Return the properties of the current device."""
        number = self._runtime.getDevice()
        if number not in self._devices:
            self._devices[number] = Device(*(self._runtime.deviceGetAttribute(a, number) for a in _ATTRIBUTES))
        return self._devices[number]

    def holds_cluster(self, blocks: int) -> bool:
        """Return True if the current device runs a cluster of blocks that have all the shared memory they may have."""
        key = self.current()[0], blocks
        if key not in self._holds:
            self._holds[key] = self.device().capability >= 9 and self._active_clusters(blocks) > 0
        return self._holds[key]

    def _active_clusters(self, blocks: int) -> int:
        """Ask the driver itself, because CuPy does not have this question of the driver."""
        probe, shared = self._cupy.RawKernel(_PROBE.format(blocks), "probe", OPTIONS), self.device().shared
        probe.max_dynamic_shared_size_bytes = shared
        self._driver.funcSetAttribute(probe.kernel.ptr, _NON_PORTABLE, 1)
        config, found = _LaunchConfig((blocks, 1, 1), (512, 1, 1), shared), ctypes.c_int()
        try:
            ask = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuOccupancyMaxActiveClusters
        except (OSError, AttributeError):  # a driver of before CUDA 11.8
            return 0
        refused = ask(ctypes.byref(found), ctypes.c_void_p(probe.kernel.ptr), ctypes.byref(config))
        return 0 if refused else found.value

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new array on the current device."""
        return self._cupy.ndarray(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new array of zeros on the current device."""
        return self._cupy.zeros(shape, dtype)

    def pointer(self, array: Array) -> int:
        """Return the address of the first value."""
        return int(array.data.ptr)

    def build(self, kernel: Kernel) -> tuple[int, Any]:
        """Return the kernel's address and the object that keeps the kernel loaded; CuPy keeps the code on disk."""
        function = self._cupy.RawKernel(source(kernel), kernel.entry, OPTIONS)
        if kernel.dynamic:
            function.max_dynamic_shared_size_bytes = self.device().shared - function.shared_size_bytes
            function.preferred_shared_memory_carveout = (
                100  # per cent of the memory, so that as many blocks as possible are resident
            )
        if kernel.blocks > PORTABLE:
            self._driver.funcSetAttribute(function.kernel.ptr, _NON_PORTABLE, 1)
        return function.kernel.ptr, function

    def start(self, function: int, grid: Grid, stream: int, arguments: int) -> None:
        """Launch `function` with the addresses of its arguments at `arguments`."""
        self._driver.launchKernel(function, grid.blocks, 1, 1, grid.threads, 1, 1, grid.shared, stream, arguments, 0)


@functools.cache
def launcher() -> Launcher:
    """Return the launcher of this process."""
    return CuPy()

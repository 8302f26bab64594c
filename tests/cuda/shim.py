"""The CUDA kernels on the CPU: the package's source, compiled by g++ behind shim.h, for NumPy arrays."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import itertools
import os
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from arraybn import kernels as kernel_modules
from arraybn._arrays.namespaces import FLOATS
from arraybn.kernels import cuda
from arraybn.kernels.cuda import exact, fused, launch, table
from arraybn.kernels.cuda.launch import Device, Grid, Kernel

HERE = Path(__file__).parent
GUARD = 64  # bytes before and behind an array, to which no kernel may write
PATTERN = 0xA5
POISON = 0xFF  # what a new array is full of: NaN in every dtype
H200 = Device(multiprocessors=132, cache=60 * 2**20, shared=227 * 2**10, shared_in_all=228 * 2**10)
WITH_MASK = ("moments_masked", "dots_masked", "dots_nonzero", "affine2_masked", "affine3_masked")
BOTH_WITH_MASK = ("forward_masked", "backward_masked")
_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def all_kernels() -> list[Kernel]:
    """Return every kernel of the sweeps over planes, for every dtype and width."""
    kernels = [
        Kernel(f"{sweep}_planes", dtype, width)
        for sweep, dtype in itertools.product((*kernel_modules.SWEEPS, *WITH_MASK, "affine_fixed"), _ITEMSIZE)
        for width in table.WIDTHS[_ITEMSIZE[dtype]]
    ]
    vectors = [Kernel("vectors", dtype, 1) for dtype in _ITEMSIZE]
    return [*kernels, *vectors, *(Kernel("running", dtype, 1) for dtype in ("float32", "float64"))]


def row_kernels(way: str) -> tuple[Kernel, ...]:
    """Return every kernel over whole rows, for every dtype and width; `way` is "rows" or "ring"."""
    return tuple(
        Kernel(f"{sweep}_{way}", dtype, width, cuda.ROWS, True)
        for sweep, dtype in itertools.product((*cuda.INPUTS, *WITH_MASK, *BOTH_WITH_MASK, "affine_fixed"), _ITEMSIZE)
        for width in table.WIDTHS[_ITEMSIZE[dtype]]
    )


def ring_kernels() -> tuple[Kernel, ...]:
    """Return every kernel of the maps of channels-first data by the ring, for every dtype."""
    names = itertools.product(("affine", "affine2", "affine3", "affine_fixed"), _ITEMSIZE)
    return tuple(
        Kernel(f"{sweep}_ring_planes", dtype, 16 // _ITEMSIZE[dtype], cuda.ROWS, True) for sweep, dtype in names
    )


def fused_kernels(direction: str) -> tuple[Kernel, ...]:
    """Return every fused kernel of a direction, "forward" or "backward", for every dtype and width."""
    ways = (("resident", "planes"), ("resident", "lines"), ("pipeline", "planes"))
    names = ((*way, dtype) for way in ways for dtype in FLOATS)
    return tuple(
        Kernel(f"{direction}_{way}_{layout}", dtype, width, fused.FILES, True)
        for way, layout, dtype in names
        for width in _fused_widths(way, layout, _ITEMSIZE[dtype])
    )


def exact_kernels(layout: str) -> tuple[Kernel, ...]:
    """Return every kernel of exact mode for a layout, "planes" or "rows", and for every dtype and width."""
    files = (*launch.SWEEPS, exact.FILE) if layout == "planes" else (*cuda.ROWS, exact.FILE)
    ways = ("planes",) if layout == "planes" else ("rows", "ring")
    names = [f"{sweep}_{way}" for sweep in ("exact_affine", "exact_affine2") for way in ways]
    found = []
    for dtype in FLOATS[:-1]:
        widths = table.WIDTHS[_ITEMSIZE[dtype]]
        summed = widths if layout == "planes" else [width for width in widths if width <= exact.WIDEST]
        found += [Kernel(f"{sweep}_{layout}", dtype, w, files) for sweep in ("squares", "products") for w in summed]
        found += [Kernel(name, dtype, width, files, layout == "rows") for name in names for width in widths]
    of_records = ("moments_of_record", "dots_of_record") if layout == "planes" else ()
    return (*found, *(Kernel(name, "float32", 1, files) for name in of_records))


def _fused_widths(way: str, layout: str, itemsize: int) -> tuple[int, ...]:
    """Return the numbers of values that a thread takes at once."""
    if itemsize == 8 and (way == "pipeline" or layout == "lines"):
        return (1,) if way == "resident" else ()
    return table.WIDTHS[itemsize] if layout == "planes" else (table.SIDES[itemsize] // itemsize, 1)


def cluster_kernels() -> tuple[Kernel, ...]:
    """Return every kernel of clusters, for every dtype."""
    names = itertools.product(("forward", "backward"), table.CLUSTERS, _ITEMSIZE)
    return tuple(
        Kernel(f"{direction}_cluster_{blocks}", dtype, width, fused.CLUSTER_FILES, True, blocks)
        for direction, blocks, dtype in names
        for width in (16 // _ITEMSIZE[dtype], 1)
    )


def libraries() -> list[Path]:
    """Return the shared libraries of all kernels, made two at a time."""
    kernels = [row_kernels("rows"), (*row_kernels("ring"), *ring_kernels()), tuple(all_kernels())]
    kernels += [fused_kernels("forward"), fused_kernels("backward"), cluster_kernels()]
    kernels += [exact_kernels("planes"), exact_kernels("rows")]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, kernels))


def compiler() -> str | None:
    """Return the path of g++, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def build(kernels: tuple[Kernel, ...], *options: str, changed: tuple[str, str] | None = None) -> Path:
    """Return the shared library of these kernels, made once for a source. `changed`: old and new text in the source."""
    text = launch.source(*kernels)
    if changed is not None:
        assert text.count(changed[0]) == 1, f"{changed[0]!r} stands {text.count(changed[0])} times in the source"
        text = text.replace(*changed)
    command = [compiler() or "g++", "-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"]
    command += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", *options]
    header = (HERE / "shim.h").read_text()
    name = hashlib.sha256("\n".join([*command, header, text]).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"arraybn-shim-{os.getuid()}"
    library = folder / f"{name}.so"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} belongs to somebody else"
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((folder / f"{name}.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of the tests wait, and find the library made
        if library.exists():
            return library
        work = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        source = Path(work) / "kernels.cpp"
        source.write_text(f'#include "{HERE / "shim.h"}"\n{text}')
        made = Path(work) / "kernels.so"
        run = subprocess.run([*command, "-o", made, source], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[:4000]
        made.replace(library)
    return library


def guarded(shape: tuple[int, ...], dtype: Any, offset: int = 0) -> Any:
    """Return a poisoned array between guards, `offset` bytes behind a multiple of 64."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    room = np.full(size + 2 * GUARD + 64 + offset, PATTERN, np.uint8)
    start = GUARD + -(room.ctypes.data + GUARD) % 64 + offset
    inner = room[start : start + size]
    inner[:] = POISON
    return inner.view(dtype).reshape(shape) if offset % dtype.itemsize == 0 else np.ndarray(shape, dtype, inner)


def owner(array: Any) -> Any:
    """Return the array that owns the memory of an array of `guarded`, and lives as long as any part of the memory."""
    while array.base is not None:
        array = array.base
    return array


def assert_guards(array: Any) -> None:
    """Assert that nobody wrote before or behind an array of `guarded`."""
    assert_outside(owner(array), array.ctypes.data - owner(array).ctypes.data, array.nbytes)


def assert_outside(room: Any, start: int, size: int) -> None:
    """Assert that nobody wrote into `room` before or behind those bytes."""
    outside = np.concatenate([room[:start], room[start + size :]])
    assert np.all(outside == PATTERN), "a kernel wrote outside its array"


class Shim(launch.Launcher):
    """A launcher of kernels on the CPU, for NumPy arrays, that pretends to be the GPU that a test describes."""

    def __init__(self, *libraries: Path, has: Device = H200, resident: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.has = has
        self.libraries = [ctypes.CDLL(str(library)) for library in libraries]
        for library in self.libraries:
            library.shim_launch.restype = ctypes.c_char_p
            library.shim_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_uint] * 6]
        self.names: dict[int, str] = {}  # of functions, and the library of each
        self._home: dict[int, Any] = {}
        self._clusters: dict[int, int] = {}  # how many blocks are in a cluster of each function
        self.largest = 16  # blocks of a cluster
        self.resident, self.seed = resident, seed  # blocks alive at a time; the order in which they begin
        self.launches: list[tuple[str, Grid]] = []
        self._turn = threading.Lock()
        self._arrays: weakref.WeakSet[Any] = weakref.WeakSet()
        self._made: list[tuple[weakref.ref[Any], int, int]] = []

    def on(self, array: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def at(self, device: int) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def current(self) -> tuple[int, int]:
        return 0, 1

    def device(self) -> Device:
        return self.has

    def holds_cluster(self, blocks: int) -> bool:
        return blocks <= self.largest

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        array = guarded(shape, dtype)
        room = owner(array)
        made = weakref.ref(room), array.ctypes.data - room.ctypes.data, array.nbytes
        self._made = [other for other in self._made if other[0]() is not None] + [made]
        return array

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def pointer(self, array: Any) -> int:
        return int(array.ctypes.data)

    def build(self, kernel: Kernel) -> tuple[int, Any]:
        library = next((one for one in self.libraries if hasattr(one, kernel.entry)), self.libraries[0])
        function = getattr(library, kernel.entry)
        address = ctypes.cast(function, ctypes.c_void_p).value or 0
        self.names[address], self._home[address] = kernel.entry, library
        self._clusters[address] = 1
        if hasattr(library, f"{kernel.entry}_blocks"):
            self._clusters[address] = ctypes.c_uint.in_dll(library, f"{kernel.entry}_blocks").value
        return address, function

    def start(self, function: int, grid: Grid, stream: int, arguments: int) -> None:
        packed = ctypes.c_void_p.from_address(arguments).value
        with self._turn:
            self.launches.append((self.names[function], grid))
            size = grid.blocks, grid.threads, grid.shared
            order = self.resident, self.seed, self._clusters[function]
            if order[2] > self.largest:
                raise RuntimeError("CUDA_ERROR_INVALID_CLUSTER_SIZE")
            said = self._home[function].shim_launch(function, packed, *size, *order)
            if said:
                raise RuntimeError(said.decode())
        for made, start, size in self._made:
            if (room := made()) is not None:
                assert_outside(room, start, size)
        for room in self._rooms.values():
            assert not room.arrays[1].any(), "a kernel left its counters behind"


@contextlib.contextmanager
def install(*libraries: Path, **options: int) -> Iterator[Shim]:
    """Let arraybn.kernels.cuda take NumPy arrays and run on the CPU."""
    shim = Shim(*(libraries or [build(tuple(all_kernels()))]), **options)  # type: ignore[arg-type]
    with mock.patch.object(launch, "launcher", lambda: shim):  # noqa: PT008, a mock takes longer than the kernel
        yield shim

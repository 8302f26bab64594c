"""The sweeps for CuPy arrays: CUDA kernels, built for the current device at their first use.

A forward is two launches, and so is a backward: the sums, whose last block to arrive applies the formulas to each
channel, and the map, which goes over the data backwards, to find in the cache what the sums read last. No launch waits
for the GPU, so a call can be captured in a CUDA graph, once a call like it on that stream has built the kernels and the
workspace. float64 has one launch more, whose sums are about the mean of the first.

A mask chooses other kernels of the same source, which add in the same order. They read the mask beside the data, a byte
a position, and count its values.

Channels-first, work is cut into parts of a channel (sweeps.cu) by shape, dtype and alignment of the data alone.
Channels-last, it is cut into chunks of whole rows (rows.cu), with a share for each multiprocessor; so are maps of
channels-first data by the ring, where that is asked for. Parts are pooled in a fixed order. So results have the same
bits each time on GPUs of one kind.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from ... import reference
from ..._arrays.namespaces import Array
from ...reference import Mask, Moments
from . import launch, table
from .launch import Device, Grid, Kernel

ROWS = (*launch.SWEEPS, "rows.cu")
ALIKE = 16  # beside the last four bits of all addresses: they are the same, though not 0
KINDS = {"d": 0, "f": 1, "e": 2, "E": 3}  # of a vector, as struct Parameters numbers the types
DTYPES = {"e": "float16", "E": "bfloat16", "f": "float32", "d": "float64"}  # by the dtype's character

# ---- How the work is cut ---------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """The cut of (N, C, S) into the work of blocks."""

    layout: str  # "planes" or "ring_planes"; "rows" or "ring" where a plane has one value
    width: int  # values in an item
    grid: Grid
    numbers: tuple[int, ...]  # in the order of `launch.NUMBERS`, divisors in two


def width_of(shape: tuple[int, int, int], itemsize: int, address: int) -> int:
    """Return how many values a thread takes at once; `address` as `LaunchArguments.address` returns it."""
    samples, channels, plane = shape
    run = samples * plane if channels == 1 else plane if plane > 1 else channels  # values side by side
    return next(w for w in table.WIDTHS[itemsize] if run % w == 0 and address % (w * itemsize) == 0)


def has_rows(shape: tuple[int, int, int]) -> bool:
    """Return True where the channels of a sample lie side by side."""
    return shape[2] == 1 < shape[1]


def by_ring(asked: bool, itemsize: int) -> bool:
    """Return True if maps of channels-first data shall take the ring."""
    return asked or itemsize in table.RING_MAPS


@functools.lru_cache(maxsize=1024)
def cut(
    sweep: str, shape: tuple[int, int, int], itemsize: int, address: int, device: Device, ring: bool = False
) -> Cut:
    """Cut data of that shape for a sweep. `ring` asks for the ring in maps of channels-first data, where that fits."""
    samples, channels, plane = shape
    width = width_of(shape, itemsize, address)
    if has_rows(shape):
        return _cut_rows(sweep, samples, channels, width, itemsize, address, device)
    if channels == 1:
        samples, plane = 1, samples * plane
    chunks = _ring_planes(sweep, samples, channels, plane, itemsize, address, device) if ring else None
    if chunks is not None:
        return chunks
    most = table.MAP_PART if sweep.startswith("affine") else table.PART
    found = _cut_planes(samples, channels, plane, width, itemsize, most)
    if sweep != "moments_masked":
        return found
    return found._replace(grid=found.grid._replace(partials=2 * found.grid.partials))  # the numbers of values as well


def _cut_planes(samples: int, channels: int, plane: int, width: int, itemsize: int, most: int) -> Cut:
    """Cut each channel into parts of its own, of `most` bytes or about MIN_BLOCK_BYTES."""
    items, item = samples * plane // width, width * itemsize
    target = min(max(channels * items * item // table.BLOCKS, table.MIN_BLOCK_BYTES), most)
    parts = max(items * item // target, 1)
    part = -(-items // parts)
    parts = -(-items // part)
    most_threads = table.THREADS if parts > 1 else min(table.ALONE, table.THREADS)
    threads = min(max(power_of_two(part // table.UNDER_WAY), table.WARP), most_threads)
    grid = _grid(channels, parts, threads)
    shape = (items, part, plane // width, channels * plane, 1)
    return Cut("planes", width, grid, numbers_of(samples * plane, channels, channels, parts, shape))


def _cut_rows(sweep: str, rows: int, channels: int, width: int, itemsize: int, address: int, device: Device) -> Cut:
    """Cut tiles of at most THREADS·width channels into shares, and those into chunks of whole rows."""
    inputs, sums = INPUTS[sweep.partition("_")[0]], not sweep.startswith("affine")
    counts = sweep in ("moments_masked", "forward_masked")
    columns = min(power_of_two(-(-channels // width)), table.MOST_THREADS)
    groups = -(-channels // (columns * width))
    row = min(channels, columns * width) * itemsize  # bytes of a row in a tile
    shares, down = max(device.multiprocessors // groups, 1), table.MOST_THREADS // columns
    height = max(min(table.CHUNK // row, -(-rows // (4 * shares)), table.MOST_ROWS * down), down)
    even = 16 // math.gcd(16, row)  # rows whose bytes are a multiple of 16, as bulk copies need them
    height = -(-height // even) * even
    shares = min(shares, -(-rows // height))
    stages = min(table.STAGES[inputs], (device.shared - table.ROOM) // (inputs * height * row))
    aligned = address % 16 == 0 and (groups == 1 or row % 16 == channels * itemsize % 16 == 0)
    ring = device.capability >= 9 and aligned and stages > 1
    of_sums = 24 * table.MOST_THREADS * width * sums  # of all threads
    shared = max(stages * inputs * height * row * ring, of_sums)
    units = groups * shares
    partials = 16 * units * (columns * width * sums + counts)
    grid = Grid(units, table.MOST_THREADS + table.WARP * ring, partials, 6 * sums, shared)
    shape = (rows, height, 1, channels, columns)
    numbers = numbers_of(rows, channels, groups, shares, shape, stages)
    return Cut("ring" if ring else "rows", width, grid, numbers)


def _ring_planes(
    sweep: str, samples: int, channels: int, plane: int, itemsize: int, address: int, device: Device
) -> Cut | None:
    """Cut data into chunks of items of 16 bytes, without its first and last values, for a map by the ring."""
    width, inputs = 16 // itemsize, INPUTS.get(sweep.removesuffix("_fixed"))
    items = (samples * channels * plane - (-address % 16) // itemsize) // width
    aligned = address % 16 == 0 or address >= ALIKE
    if inputs is None or not sweep.startswith("affine") or not aligned or plane < width or items < 1:
        return None
    if max(samples * channels, plane) >= 2**31:
        return None
    of_maps = channels * table.COEFFICIENTS[inputs] * max(itemsize, 4)  # bytes
    smaller = device._replace(shared=device.shared - of_maps)
    found = _cut_rows(sweep, items, width, width, itemsize, 0, smaller)
    if found.layout != "ring":
        return None
    (parts, _, part), ahead = found.numbers[3:6], found.numbers[9]
    shape = (items, part, plane, width, 1)
    numbers = numbers_of(samples * plane, channels, 1, parts, shape, ahead)
    return Cut("ring_planes", width, found.grid._replace(shared=found.grid.shared + of_maps), numbers)


def _grid(channels: int, parts: int, threads: int) -> Grid:
    """Return one block for each part of each channel, with two sums for each part."""
    several = parts > 1
    return Grid(channels * parts, threads, several * 16 * channels * parts, several * channels)


def numbers_of(
    n: int, channels: int, groups: int, parts: int, shape: tuple[int, ...], ahead: int = 0
) -> tuple[int, ...]:
    """Return the numbers of a launch, in the order of `launch.NUMBERS`, for parameters and state in float64."""
    return n, channels, groups, parts, *shape, ahead, 0, 0, *divisor(groups), *divisor(shape[2])


def with_kinds(numbers: tuple[int, ...], parameters: int, state: int) -> tuple[int, ...]:
    """Return the numbers of a launch for other types of parameters and state."""
    place = launch.NUMBERS.index("parameter_kind")
    return *numbers[:place], parameters, state, *numbers[place + 2 :]


def power_of_two(number: int) -> int:
    """Return the smallest power of two ≥ number."""
    return int(1 << max(number - 1, 0).bit_length())


def divisor(number: int) -> tuple[int, int]:
    """Return multiplier and shift: v // number is v·multiplier >> 64 >> shift for 0 ≤ v < 2⁶³.

    Source: T. Granlund, P. L. Montgomery, Division by invariant integers using multiplication, 1994, theorem 4.2.
    """
    bits = (number - 1).bit_length()
    if number == 1 << bits:
        return 0, bits
    return -(-(1 << (63 + bits)) // number), bits - 1


# ---- A call ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def plan_sweep(
    sweep: str,
    shape: tuple[int, int, int],
    dtype: str,
    itemsize: int,
    address: int,
    device: Device,
    ring: bool = False,
) -> tuple[Kernel, Cut]:
    """Return the kernel of a sweep over data of that shape, and the cut of the data, as `cut` makes it."""
    found = cut(sweep, shape, itemsize, address, device, ring)
    planes = found.layout == "planes"
    files = launch.SWEEPS if planes else ROWS
    return Kernel(f"{sweep}_{found.layout}", DTYPES[dtype], found.width, files, not planes), found


def _usable(array: Array, address: int) -> bool:
    return bool(array.flags.c_contiguous) and address % array.itemsize == 0


class LaunchArguments:
    """The arrays of a call and their addresses. An array that kernels cannot read in place is copied."""

    __slots__ = ("dtype", "gpu", "kept", "n", "shape", "size", "u", "where", "x", "y")
    plan = staticmethod(plan_sweep)
    ring = False  # True where maps of channels-first data shall take the ring

    def __init__(
        self, gpu: launch.Launcher, x: Array, u: Array | None = None, where: Array | None = None, n: int | None = None
    ) -> None:
        """`n` is the number of values of a channel, where they are not all of x."""
        self.gpu, self.shape, self.dtype = gpu, x.shape, x.dtype
        self.size = x.size
        self.kept: list[Array] = []
        self.x = self.data(x)
        self.u = 0 if u is None else self.data(u)
        self.where = 0 if where is None else self.data(where)
        self.n = n if n is None else max(n, 1)
        self.y = 0

    def data(self, array: Array) -> int:
        """Return the address of an array like x or of a mask, or of its copy."""
        address = self.gpu.pointer(array)
        if _usable(array, address):
            return address
        copy = self.gpu.empty(array.shape, array.dtype)
        copy[...] = array
        self.kept.append(copy)
        return self.gpu.pointer(copy)

    def vector(self, vector: Array | None) -> int:
        """Return the address of a vector (C,) in float64; 0 for None."""
        if vector is None:
            return 0
        if vector.dtype.char == "d" and vector.flags.c_contiguous:
            return self.gpu.pointer(vector)
        copy = self.gpu.empty(vector.shape, "f8")
        copy[...] = vector
        self.kept.append(copy)
        return self.gpu.pointer(copy)

    def vectors(self, number: int) -> Array:
        """Return `number` vectors (C,) for the kernels to set; zeros where x is empty."""
        make = self.gpu.empty if self.size else self.gpu.zeros
        return make((number, self.shape[1]), "f8")

    def writes(self, out: Array | None) -> Array:
        """Return the array for the result: `out` where kernels can write into `out`, otherwise a new array like x."""
        if out is not None and _usable(out, self.gpu.pointer(out)):
            result = out
        else:
            result = self.gpu.empty(self.shape, self.dtype)
        self.y = self.gpu.pointer(result)
        return result

    def alike(self, *vectors: Array | None) -> tuple[list[int], int]:
        """Return the addresses of vectors (C,), of float64 copies unless all have one dtype; and their kind."""
        found = {vector.dtype.char if vector.flags.c_contiguous else "" for vector in vectors if vector is not None}
        kind = KINDS.get(found.pop()) if len(found) == 1 else None
        if kind is None:
            return [self.vector(vector) for vector in vectors], 0
        return [0 if vector is None else self.gpu.pointer(vector) for vector in vectors], kind

    def run(
        self, sweep: str, *, eps: float = 0.0, parameter_kind: int = 0, state_kind: int = 0, **vectors: int
    ) -> None:
        """Launch one sweep, unless x is empty; with a mask, the masked sweep of that name where there is one."""
        if not self.size:
            return
        y = 0 if sweep.startswith(("moments", "dots")) else self.y
        sweep = f"{sweep}_masked" if self.where and sweep in WITH_MASK else sweep
        given = self.shape, self.dtype.char, self.dtype.itemsize, self.address(y, vectors.get("v", 0))
        kernel, found = self.plan(sweep, *given, self.gpu.device(), by_ring(self.ring, self.dtype.itemsize))
        numbers = with_kinds(found.numbers, parameter_kind, state_kind)
        self.launch(kernel, found._replace(numbers=numbers), y, eps, vectors)

    def address(self, y: int, v: int = 0) -> int:
        """Return the last four bits of all addresses together, and `ALIKE` where they are the same but not 0.

        As many marks as values are loaded at once, each of one byte.
        """
        found = int((self.x | self.u | y | v | self.where * self.dtype.itemsize) % 16)
        if found and all(not address or address % 16 == found for address in (self.x, self.u, y, v)):
            return found + ALIKE
        return found

    def launch(self, kernel: Kernel, found: Any, y: int, eps: float, vectors: dict[str, int]) -> None:
        """Launch a kernel over data cut so."""
        vectors["where"] = self.where
        numbers = found.numbers if self.n is None else (self.n, *found.numbers[1:])
        pointers = (self.x, self.u, y, *map(vectors.get, VECTORS, NO_VECTORS))
        self.gpu.launch(kernel, found.grid, pointers, (eps, 0.0, *numbers))

    def moments(self, mean: int, m2: int, rstd: int = 0, eps: float = 0.0) -> None:
        """(E1, E3) Set mean and m2, and rstd where its address is given."""
        shift = 0
        if self.dtype.itemsize == 8:  # float64 keeps its digits only in sums about a mean that is nearly right
            self.run("moments", mean=mean, m2=m2)
            shift = mean
        self.run("moments", shift=shift, mean=mean, m2=m2, rstd=rstd, eps=eps)

    def normalize(self, m2: int, eps: float, **given: int) -> None:
        """(E1, E3) Set m2, and mean and rstd among the given, and write y."""
        self.moments(given["mean"], m2, given["rstd"], eps)
        self.run("affine", **given)

    def differentiate(self, **given: int) -> None:
        """(E5, E6) Set dweight and dbias among the given, and write dx."""
        self.run("dots_nonzero" if self.where else "dots", **given)
        self.run("affine2", **given)


WITH_MASK = ("moments", "dots", "affine2", "affine3", "forward", "backward")
INPUTS = {"moments": 1, "dots": 2, "affine": 1, "affine2": 2, "affine3": 3, "forward": 1, "backward": 2}
VECTORS = launch.POINTERS[3:-2]
NO_VECTORS = (0,) * len(VECTORS)


# ---- The sweeps, and two of them with the formulas of ``reference.py`` where the first one ends ---------------------

MASKS = True


class Sweeps:
    """The operations for which a class of arguments chooses the kernels."""

    def __init__(self, arguments: type[LaunchArguments]) -> None:
        self._arguments = arguments

    def moments(self, x: Array, where: Array | None = None) -> tuple[Array, Array]:
        """(E1) mean and m2 (C,) of x (N, C, S), float64, over `where`."""
        gpu = launch.launcher()
        with gpu.on(x):
            work = self._arguments(gpu, x, where=where)
            mean, m2 = work.vectors(2)
            work.moments(gpu.pointer(mean), gpu.pointer(m2))
            return mean, m2

    def dots(
        self, u: Array, x: Array, mean: Array, where: Array | None = None, skip_zeros: bool = False
    ) -> tuple[Array, Array]:
        """(E5, E8, E9) Σu and Σu·(x−mean), each (C,) and float64, over `where`; `skip_zeros` lets 0·NaN be 0."""
        gpu = launch.launcher()
        with gpu.on(x):
            work = self._arguments(gpu, x, u, where)
            s, q = work.vectors(2)
            sweep = "dots_nonzero" if skip_zeros else "dots"
            work.run(sweep, mean=work.vector(mean), dbias=gpu.pointer(s), dweight=gpu.pointer(q))
            return s, q

    def affine(self, x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
        """(E3, E7) a·(x−mean) + c (N, C, S), in the dtype of x, written to `out` where `out` is contiguous."""
        gpu = launch.launcher()
        with gpu.on(x):
            work = self._arguments(gpu, x)
            result = work.writes(out)
            work.run("affine", mean=work.vector(mean), a=work.vector(a), c=work.vector(c))
            return result

    def affine2(
        self,
        u: Array,
        x: Array,
        mean: Array,
        a: Array,
        b: Array,
        c: Array,
        out: Array | None = None,
        where: Array | None = None,
    ) -> Array:
        """(E6, E8, E9) a·u + b·(x−mean) + c (N, C, S), or a·u if not `where`, written to a contiguous `out`."""
        gpu = launch.launcher()
        with gpu.on(x):
            work = self._arguments(gpu, x, u, where)
            result = work.writes(out)
            work.run("affine2", mean=work.vector(mean), a=work.vector(a), b=work.vector(b), c=work.vector(c))
            return result

    def affine3(
        self,
        v: Array,
        u: Array,
        x: Array,
        mean: Array,
        a: Array,
        b: Array,
        c: Array,
        d: Array,
        out: Array | None = None,
        where: Array | None = None,
    ) -> Array:
        """(E9) a·v + b·u + c·(x−mean) + d (N, C, S), or b·u if not `where`, written to a contiguous `out`."""
        gpu = launch.launcher()
        with gpu.on(x):
            work = self._arguments(gpu, x, u, where)
            result = work.writes(out)
            vectors = {"mean": mean, "a": a, "b": b, "c": c, "d": d}
            work.run("affine3", v=work.data(v), **{name: work.vector(vector) for name, vector in vectors.items()})
            return result

    def forward(
        self, x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """(E1, E3) mean, m2 and rstd (C,) of x (N, C, S), and y = weight·xhat + bias."""
        return self._forward(x, weight, bias, eps, out)

    def backward(
        self, dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """(E5, E6) dx, and dweight and dbias (C,), from dy and x (N, C, S)."""
        return self._backward(dy, x, mean, rstd, weight, out)

    def masked_forward(
        self, x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None, mask: Mask
    ) -> tuple[Moments, Array, Array]:
        """(E1, E3) The moments of x (N, C, S) over the mask, rstd (C,) and y."""
        mean, m2, rstd, y = self._forward(x, weight, bias, eps, out, mask)
        return Moments(mask.n, mean, m2), rstd, y

    def masked_backward(
        self, dy: Array, x: Array, batch: Moments, rstd: Array, weight: Array | None, out: Array | None, where: Array
    ) -> tuple[Array, Array, Array]:
        """(E5, E6) dx, and dweight and dbias (C,), from dy, x (N, C, S) and a mask."""
        return self._backward(dy, x, batch.mean, rstd, weight, out, Mask(where, batch.n))

    def evaluate(
        self,
        x: Array,
        mean: Array,
        var: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        out: Array | None = None,
    ) -> tuple[Array, Array, Array | None, Array]:
        """(E3, E7) Copies of mean, rstd and weight (C,) in float64, and y = weight·xhat + bias, with fixed statistics.

        One launch, which reads statistics and parameters in their own dtypes.
        """
        gpu = launch.launcher()
        with gpu.on(x):
            work = self._arguments(gpu, x)
            y = work.writes(out)
            if not x.size:
                mean, var, weight = widened(mean, var, weight)
                return mean, reference.rstd(var, eps), weight, y
            (first, second), state_kind = work.alike(mean, var)
            (w, b), parameter_kind = work.alike(weight, bias)
            kept = gpu.empty((3, mean.size), "f8")
            place, row = gpu.pointer(kept), 8 * mean.size  # bytes
            rows = {"mean": place, "rstd": place + row, "kept_weight": place + 2 * row}
            given = {"first": first, "second": second, "weight": w, "bias": b, **rows}
            work.run("affine_fixed", eps=eps, parameter_kind=parameter_kind, state_kind=state_kind, **given)
            return kept[0], kept[1], None if weight is None else kept[2], y

    def _forward(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        out: Array | None,
        mask: Mask | None = None,
    ) -> tuple[Array, Array, Array, Array]:
        gpu = launch.launcher()
        with gpu.on(x):
            work = self._arguments(gpu, x, None, *(mask or (None, None)))
            y = work.writes(out)
            mean, m2, rstd = work.vectors(3)
            given = {"mean": gpu.pointer(mean), "rstd": gpu.pointer(rstd)}
            work.normalize(gpu.pointer(m2), eps, weight=work.vector(weight), bias=work.vector(bias), **given)
            return mean, m2, rstd, y

    def _backward(
        self,
        dy: Array,
        x: Array,
        mean: Array,
        rstd: Array,
        weight: Array | None,
        out: Array | None,
        mask: Mask | None = None,
    ) -> tuple[Array, Array, Array]:
        gpu = launch.launcher()
        with gpu.on(x):
            work = self._arguments(gpu, x, dy, *(mask or (None, None)))
            dx = work.writes(out)
            dweight, dbias = work.vectors(2)
            work.differentiate(
                mean=work.vector(mean),
                rstd=work.vector(rstd),
                weight=work.vector(weight),
                dweight=gpu.pointer(dweight),
                dbias=gpu.pointer(dbias),
            )
            return dx, dweight, dbias


_split = Sweeps(LaunchArguments)
moments, dots, affine, affine2, affine3 = _split.moments, _split.dots, _split.affine, _split.affine2, _split.affine3
forward, backward, evaluate = _split.forward, _split.backward, _split.evaluate
masked_forward, masked_backward = _split.masked_forward, _split.masked_backward


# ---- Vectors ---------------------------------------------------------------------------------------------------------


def update_running_stats(
    running_mean: Array, running_var: Array, mean: Array, var: Array, momentum: float
) -> tuple[Array, Array]:
    """(E4) The running statistics (C,) after one more batch, in their dtypes."""
    dtype, size = running_mean.dtype, running_mean.size
    if dtype.char not in "fd" or running_var.dtype != dtype or {mean.dtype, var.dtype} != {np.dtype("f8")}:
        return reference.update_running_stats(running_mean, running_var, mean, var, momentum)
    gpu = launch.launcher()
    with gpu.on(running_mean):
        work = LaunchArguments(gpu, running_mean, running_var)
        new = gpu.empty((2, size), dtype)
        pointers = dict.fromkeys(VECTORS, 0) | {"mean": work.vector(mean), "m2": work.vector(var)}
        numbers = numbers_of(0, size, 1, 1, (0, 0, 1, 0, 1))
        grid = Grid(-(-size // table.THREADS), table.THREADS)
        kernel = Kernel("running", DTYPES[dtype.char], 1)
        gpu.launch(kernel, grid, (work.x, work.u, gpu.pointer(new), *pointers.values()), (0.0, momentum, *numbers))
        new_mean, new_var = new
        return new_mean, new_var


def widened(*vectors: Array | None) -> list[Array | None]:
    """Return float64 copies of up to four vectors (C,), by one launch where all have one dtype; None for None."""
    rows = _rows(vectors + (None,) * (4 - len(vectors)))
    if rows is None:
        return [None if vector is None else vector.astype("f8") for vector in vectors]
    return [None if vector is None else rows[index] for index, vector in enumerate(vectors)]


def _rows(vectors: tuple[Array | None, ...]) -> Array | None:
    """Return the four vectors as rows of float64; None where their dtypes differ."""
    there = [vector for vector in vectors if vector is not None]
    if not there or any(v.dtype != there[0].dtype or not v.flags.c_contiguous for v in there):
        return None
    gpu, size = launch.launcher(), there[0].size
    with gpu.on(there[0]):
        rows = gpu.empty((4, size), "f8")
        x, u, weight, bias = (0 if vector is None else gpu.pointer(vector) for vector in vectors)
        out = gpu.pointer(rows)
        pointers = dict.fromkeys(VECTORS, 0) | {"weight": weight, "bias": bias}
        grid, numbers = Grid(-(-size // table.THREADS), table.THREADS), numbers_of(0, size, 1, 1, (0, 0, 1, 0, 1))
        kernel = Kernel("vectors", DTYPES[there[0].dtype.char], 1)
        gpu.launch(kernel, grid, (x, u, out, *pointers.values()), (0.0, 0.0, *numbers))
        return rows

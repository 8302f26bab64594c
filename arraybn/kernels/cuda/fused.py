"""Forward and backward for CuPy arrays in one launch each; the launch reads every value from main memory once.

The sweeps are those of ``cuda/__init__.py``. `plan` chooses one of three ways for a forward or a backward:

- **resident**: a block keeps one channel (channels-first), or a few neighbouring channels (channels-last), in its
  shared memory from the first sweep to the second. `plan` takes this way where the channels fit, and either there are
  blocks for at least half of the multiprocessors or a block keeps few bytes;
- **pipeline**: blocks draw tasks. The map of a part follows the sums of that part closely enough to find the values in
  the L2 cache. Tasks are drawn in an order in which no block waits for a task that has not begun, so the blocks need
  not all run at once. `plan` takes this way where the values between the sums and the map fit into the fraction
  `L2_FRACTION` of the cache. float64 does not go this way, because its sums need a second look at the values;
- **split**: the two launches of ``cuda/__init__.py``, for all other cases: few channels in channels-last order of large
  images.

Where x has b bytes, this many bytes move between the GPU and its main memory (L2 here: the values that a sweep
happens to find in the cache):

==========  =====================  =====================  ============================================
way         forward                backward               and from the L2 cache
==========  =====================  =====================  ============================================
resident    b read, b written      2b read, b written     nothing
pipeline    b read, b written      2b read, b written     b in a forward, 2b in a backward
split       2b read, b written     4b read, b written     up to L2 of the last b or 2b instead of memory
==========  =====================  =====================  ============================================

Means found by two ways agree to rounding, not to the bit. The way depends on the shape, the dtype, the alignment and
the GPU alone, so results have the same bits each time on GPUs of one kind. The sizes below are estimates that were made
before anything was measured; docs/gpu.md has what an H200 measured.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from ..._arrays.namespaces import Array
from . import (
    DTYPES,
    MIN_BLOCK_BYTES,
    NO_VECTORS,
    THREADS,
    UNDER_WAY,
    VECTORS,
    WARP,
    LaunchArguments,
    affine,
    affine2,
    affine3,
    backward_by,
    cut,
    dots,
    evaluate,
    forward_by,
    moments,
    numbers_of,
    power_of_two,
    update_running_stats,
    widened,
)
from .launch import SWEEPS, Device, Grid, Kernel

__all__ = [
    "affine",
    "affine2",
    "affine3",
    "backward",
    "dots",
    "evaluate",
    "forward",
    "moments",
    "update_running_stats",
    "widened",
]

FILES = (*SWEEPS, "fused.cu")
ROWS_KEPT = (64, 32)  # bytes side by side that a resident block takes of a row: memory is read in pieces of 32
ROWS_DRAWN = (128, 64, 32)  # the same for a task of the pipeline
SINGLE_BLOCK_BYTES = 2**16  # bytes that one block reads in the time that a second launch takes to start
ITEMS = 16  # items of each thread of a resident block
ROOM = 2**12 + 2**10  # bytes of shared memory of a block beside the values: for the sums, and for the system
TASK = 3 * 2**14  # bytes that a task of the pipeline reads, about
BLOCKS = 3  # blocks on each multiprocessor that draw tasks
SIDE = 8  # bytes of a row that a thread takes at once: the sums of more channels would fill its registers
ROUNDS = {1: 4, 2: 2}  # rounds of loads that fit into a block of the pipeline, by the number of inputs
L2_FRACTION = 0.6  # fraction of the L2 cache in which values are found again


class Plan(NamedTuple):
    """One launch that does a forward or backward of (N, C, S)."""

    kernel: Kernel
    grid: Grid
    numbers: tuple[int, ...]  # as `cuda.Cut` has them


class _Data(NamedTuple):
    """The inputs of a launch, as items that a thread loads at once."""

    dtype: str
    channels: int
    items: int  # items of a channel; for lines, rows
    plane: int  # items in a plane
    lines: bool
    width: int
    item: int  # bytes of an item, of all inputs
    inputs: int

    def columns(self, row: int) -> int:
        """Return the number of neighbouring threads that read `row` bytes of each input."""
        if not self.lines:
            return 1
        return min(power_of_two(self.channels // self.width), max(row * self.inputs // self.item, 1))

    def groups(self, columns: int) -> int:
        """Return the number of groups of channels."""
        return -(-self.channels // (columns * self.width)) if self.lines else self.channels

    def kernel(self, way: str) -> Kernel:
        """Return the kernel of that way."""
        name = f"{'forward' if self.inputs == 1 else 'backward'}_{way}_{'lines' if self.lines else 'planes'}"
        return Kernel(name, self.dtype, self.width, FILES, dynamic=True)

    def threads(self, items: int, columns: int, each: int) -> int:
        """Return the threads of a block, for about `each` items a thread."""
        least = columns * self.width if self.lines else 1
        return min(max(power_of_two(items * columns // each), least, WARP), THREADS)

    def numbers(self, groups: int, parts: int, part: int, columns: int, ahead: int = 0) -> tuple[int, ...]:
        """Return the numbers of a launch, in the order of `launch.NUMBERS`."""
        n = self.items * (1 if self.lines else self.width)
        stride = self.channels * (1 if self.lines else self.plane * self.width)
        return numbers_of(n, self.channels, groups, parts, (self.items, part, self.plane, stride, columns), ahead)


@functools.lru_cache(maxsize=1024)
def plan(shape: tuple[int, int, int], dtype: Any, address: int, inputs: int, device: Device) -> Plan | None:
    """Return the one launch over x, or over x and dy (two inputs), of that shape; None where two launches do better.

    `address` has the last four bits of every address of data.
    """
    samples, channels, plane = shape
    if channels == 1:
        samples, plane = 1, samples * plane
    found = cut(shape, dtype.itemsize, address)
    lines, width = found.layout == "lines", found.width
    if lines and width > 1:
        width = SIDE // dtype.itemsize
    items, plane = (samples, 1) if lines else (samples * plane // width, plane // width)
    item = width * dtype.itemsize * inputs
    data = _Data(DTYPES[dtype.char], channels, items, plane, lines, width, item, inputs)
    if (kept := _resident(data, device)) is not None:
        return kept
    return None if dtype.itemsize == 8 else _pipeline(data, device)


def _resident(data: _Data, device: Device) -> Plan | None:
    """Plan one block for each group of channels; the block keeps all values of its group in shared memory."""
    for row in ROWS_KEPT if data.lines else ROWS_KEPT[:1]:
        columns = data.columns(row)
        groups, kept = data.groups(columns), data.items * columns * data.item
        crowded = 2 * (kept + ROOM) > device.shared_in_all or groups < device.multiprocessors
        if data.lines and crowded and row > ROWS_KEPT[-1]:
            continue  # narrower groups let more blocks in
        if kept + ROOM > device.shared or (2 * groups < device.multiprocessors and kept > SINGLE_BLOCK_BYTES):
            continue
        grid = Grid(groups, data.threads(data.items, columns, ITEMS), shared=kept)
        numbers = data.numbers(groups, 1, data.items, columns)
        return Plan(data.kernel("resident"), grid, numbers)
    return None


def _pipeline(data: _Data, device: Device) -> Plan | None:
    """Plan tasks, each of one part of a group of channels, which all resident blocks draw in turn."""
    for row in ROWS_DRAWN if data.lines else ROWS_DRAWN[:1]:
        columns = data.columns(row)
        groups = data.groups(columns)
        most = BLOCKS * device.multiprocessors
        task = min(max(groups * data.items * columns * data.item // most, MIN_BLOCK_BYTES), TASK)
        parts = max(data.items * columns * data.item // task, 1)
        part = -(-data.items // parts)
        parts = -(-data.items // part)
        ahead = min(
            parts + 3 * most // 4, groups * parts
        )  # sums lead by one group plus ¾ of the blocks, so that no block waits
        threads = data.threads(part, columns, UNDER_WAY)
        ring = ROUNDS[data.inputs] * UNDER_WAY * (1 if data.width > 1 else 2) * threads * data.item
        if ahead * part * columns * data.item > L2_FRACTION * device.cache or ring + ROOM > device.shared:
            continue
        slots = columns * data.width if data.lines else 1
        partials = 16 * groups * parts * slots if parts > 1 else 0
        grid = Grid(min(most, 2 * groups * parts), threads, partials, 2 * groups + 2, ring)
        numbers = data.numbers(groups, parts, part, columns, ahead)
        return Plan(data.kernel("pipeline"), grid, numbers)
    return None


class FusedArguments(LaunchArguments):
    """The arguments of a call that takes one launch where `plan` finds one, otherwise two."""

    __slots__ = ()

    def normalize(self, m2: int, eps: float, **given: int) -> None:
        """(E1, E3) Set m2, mean and rstd, and write y."""
        if not self.fuse(m2=m2, eps=eps, **given):
            super().normalize(m2, eps, **given)

    def differentiate(self, **given: int) -> None:
        """(E5, E6) Set dweight and dbias, and write dx."""
        if not self.fuse(**given):
            super().differentiate(**given)

    def fuse(self, *, eps: float = 0.0, **vectors: int) -> bool:
        """Do the whole call with one launch; return False where no plan exists."""
        if not self.size:
            return True
        address = (self.x | self.u | self.y) % 16
        found = plan(self.shape, self.dtype, address, 2 if self.u else 1, self.gpu.device())
        if found is None:
            return False
        pointers = (self.x, self.u, self.y, *map(vectors.get, VECTORS, NO_VECTORS))
        self.gpu.launch(found.kernel, found.grid, pointers, (eps, 0.0, *found.numbers))
        return True


def forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """(E1, E3) mean, m2 and rstd (C,) of x (N, C, S), and y = weight·xhat + bias."""
    return forward_by(FusedArguments, x, weight, bias, eps, out)


def backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """(E5, E6) dx, and dweight and dbias (C,), from dy and x (N, C, S)."""
    return backward_by(FusedArguments, dy, x, mean, rstd, weight, out)

"""Forward and backward for CuPy arrays in one launch each; the launch reads every value from main memory once.

The sweeps are those of ``cuda/__init__.py``. `plan` chooses one of these ways for a forward or a backward, by the
shape, the dtype, the alignment and the GPU alone:

- **resident**: a block keeps one channel (channels-first), or a few neighbouring channels (channels-last), in its
  shared memory from the first sweep to the second. `plan` takes this way where the channels fit, and either there are
  blocks for at least half of the multiprocessors or a block keeps few bytes. Channels-last, two blocks have to fit into
  a multiprocessor, or whole rows are faster;
- **cluster**, channels-first on Hopper and later: the blocks of a cluster, 1 to 8, or 16 where the GPU holds so many,
  keep a channel in their shared memory together (cluster.cu). Bulk copies take planes whose bytes are a multiple of 16,
  or 2, 4 or 8 planes side by side that are so together. `plan` takes this way where a sketch was measured to be faster
  (`IN_CLUSTERS`, `UNASKED`; not of planes side by side), unless two resident blocks fit into a multiprocessor, or more
  than half of the multiprocessors would be idle. `arraybn.kernels.cuda.cluster` takes it wherever the channel fits;
- **ring** and **rows**, all other channels-last data: whole rows, both sweeps in one launch (rows.cu). The ring takes
  bulk copies, so Hopper or later, and rows on multiples of 16 bytes; both give the same bits;
- **pipeline**, other channels-first data: blocks draw tasks. The map of a part follows the sums of that part closely
  enough to find the values in the L2 cache. Tasks are drawn in an order in which no block waits for a task that has not
  begun, so the blocks need not all run at once. `plan` takes this way where the values between the sums and the map fit
  into the fraction `L2_FRACTION` of the cache. float64 does not go this way, because its sums need a second look;
- **split**: the two launches of ``cuda/__init__.py`` (three for float64), for what is left.

With a mask, channels-last data goes by ring or rows, and channels-first data by split.

Where x has b bytes, this many bytes move between the GPU and its main memory (L2 here: the values that a sweep
happens to find in the cache):

============  =====================  =====================  ============================================
way           forward                backward               and from the L2 cache
============  =====================  =====================  ============================================
resident      b read, b written      2b read, b written     nothing
cluster       b read, b written      2b read, b written     nothing
pipeline      b read, b written      2b read, b written     b in a forward, 2b in a backward
ring, rows    2b read, b written     4b read, b written     up to L2 of the last b or 2b instead of memory
split         2b read, b written     4b read, b written     up to L2 of the last b or 2b instead of memory
============  =====================  =====================  ============================================

Means found by two ways agree to rounding, not to the bit; results have the same bits each time on GPUs of one kind.
``table.py`` has the constants.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from . import (
    DTYPES,
    MASKS,
    LaunchArguments,
    Sweeps,
    affine,
    affine2,
    affine3,
    by_ring,
    dots,
    evaluate,
    has_rows,
    moments,
    numbers_of,
    plan_sweep,
    power_of_two,
    table,
    update_running_stats,
    widened,
    width_of,
    with_kinds,
)
from .launch import PORTABLE, SWEEPS, Device, Grid, Kernel, Launcher
from .training import Launch, Trainer

__all__ = [
    "MASKS",
    "affine",
    "affine2",
    "affine3",
    "backward",
    "dots",
    "evaluate",
    "forward",
    "masked_backward",
    "masked_forward",
    "moments",
    "trainer",
    "update_running_stats",
    "widened",
]

FILES = (*SWEEPS, "fused.cu")
CLUSTER_FILES = (*SWEEPS, "cluster.cu")


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
        name = f"{self.direction}_{way}_{'lines' if self.lines else 'planes'}"
        return Kernel(name, self.dtype, self.width, FILES, dynamic=True)

    @property
    def direction(self) -> str:
        return "forward" if self.inputs == 1 else "backward"

    def threads(self, items: int, columns: int, each: int) -> int:
        """Return the threads of a block, for about `each` items a thread."""
        least = columns * self.width if self.lines else 1
        return min(max(power_of_two(items * columns // each), least, table.WARP), table.THREADS)

    def numbers(self, groups: int, parts: int, part: int, columns: int, ahead: int = 0) -> tuple[int, ...]:
        """Return the numbers of a launch, in the order of `launch.NUMBERS`."""
        n = self.items * (1 if self.lines else self.width)
        stride = self.channels * (1 if self.lines else self.plane * self.width)
        return numbers_of(n, self.channels, groups, parts, (self.items, part, self.plane, stride, columns), ahead)


@functools.lru_cache(maxsize=1024)
def plan(
    shape: tuple[int, int, int], dtype: Any, address: int, inputs: int, device: Device, clusters: int = 0
) -> Plan | None:
    """Return the one launch over x, or over x and dy (two inputs), of that shape; None where two launches do better.

    `address` has the last four bits of every address of data. `clusters` asks for clusters of that many blocks at most
    wherever a channel fits; 0 asks for none.
    """
    samples, channels, plane = shape
    if channels == 1:
        samples, plane = 1, samples * plane
    lines, width = has_rows(shape), width_of(shape, dtype.itemsize, address)
    if lines and width > 1:
        width = table.SIDES[dtype.itemsize] // dtype.itemsize
    items, plane = (samples, 1) if lines else (samples * plane // width, plane // width)
    item = width * dtype.itemsize * inputs
    data = _Data(DTYPES[dtype.char], channels, items, plane, lines, width, item, inputs)
    if (kept := _cluster(data, address, device, clusters) or _resident(data, device)) is not None:
        return kept
    if lines:
        kernel, found = plan_sweep(data.direction, shape, dtype.char, dtype.itemsize, address, device)
        return Plan(kernel, found.grid, found.numbers)
    return None if dtype.itemsize == 8 else _pipeline(data, device)


def _resident(data: _Data, device: Device) -> Plan | None:
    """Plan one block for each group of channels; the block keeps all values of its group in shared memory."""
    for row in table.ROWS_KEPT if data.lines else table.ROWS_KEPT[:1]:
        columns = data.columns(row)
        groups, kept = data.groups(columns), data.items * columns * data.item
        crowded = 2 * (kept + table.ROOM) > device.shared_in_all or groups < device.multiprocessors
        if data.lines and crowded and row > table.ROWS_KEPT[-1]:
            continue  # narrower groups let more blocks in
        if data.lines and kept > table.SINGLE_BLOCK_BYTES and 2 * (kept + table.ROOM) > device.shared_in_all:
            continue  # whole rows are faster: 25.0 against 28.2 µs at (32,1024,14,14) float32 on an H200
        few = 2 * groups < device.multiprocessors and kept > table.SINGLE_BLOCK_BYTES
        if kept + table.ROOM > device.shared or few:
            continue
        grid = Grid(groups, data.threads(data.items, columns, table.ITEMS), shared=kept)
        numbers = data.numbers(groups, 1, data.items, columns)
        return Plan(data.kernel("resident"), grid, numbers)
    return None


def _cluster(data: _Data, address: int, device: Device, asked: int) -> Plan | None:
    """Plan clusters; the blocks of a cluster keep all values of a channel, or of some channels side by side."""
    itemsize, n = data.item // (data.inputs * data.width), data.items * data.width
    plane = data.plane * data.width  # values
    side = 16 // math.gcd(16, plane * itemsize)  # channels whose planes are a multiple of 16 bytes together
    if device.capability < 9 or data.lines or address % 16 or data.channels % side:
        return None
    width, warps, unit = (16 // itemsize, table.WARPS, 1) if side == 1 else (1, table.SIDE_WARPS, side * plane)
    items, groups = side * n // width, data.channels // side
    for blocks in [number for number in table.CLUSTERS if number <= (asked or table.UNASKED)]:
        part = -(-items // (blocks * warps * table.PIECES * unit)) * unit
        shared = warps * table.PIECES * part * width * itemsize * data.inputs
        if shared + table.ROOM <= device.shared:
            break
    else:
        return None
    chosen = itemsize in table.IN_CLUSTERS[data.inputs] and side == 1 and 2 * blocks * groups >= device.multiprocessors
    if not asked and (not chosen or 2 * (data.items * data.item + table.ROOM) <= device.shared_in_all):
        return None
    at_once = max(table.WAVES[blocks] * device.multiprocessors // blocks, 1) if side == 1 else groups
    clusters = -(-groups // -(-groups // at_once))
    kernel = Kernel(f"{data.direction}_cluster_{blocks}", data.dtype, width, CLUSTER_FILES, True, blocks)
    shape = (items, part, side * plane // width, data.channels * plane, side)
    numbers = numbers_of(n, data.channels, groups, 1, shape, table.PIECES)
    return Plan(kernel, Grid(clusters * blocks, warps * table.WARP, shared=shared), numbers)


def _pipeline(data: _Data, device: Device) -> Plan | None:
    """Plan tasks, each of one part of a channel, which all resident blocks draw in turn."""
    most, groups = table.DRAWING * device.multiprocessors, data.channels
    task = min(max(groups * data.items * data.item // most, table.MIN_BLOCK_BYTES), table.TASK)
    parts = max(data.items * data.item // task, 1)
    part = -(-data.items // parts)
    parts = -(-data.items // part)
    ahead = min(parts + 3 * most // 4, groups * parts)  # one channel plus 3/4 of the blocks, so that no block waits
    threads = data.threads(part, 1, table.UNDER_WAY)
    ring = table.ROUNDS[data.inputs] * table.UNDER_WAY * (1 if data.width > 1 else 2) * threads * data.item
    if ahead * part * data.item > table.L2_FRACTION * device.cache or ring + table.ROOM > device.shared:
        return None
    partials = 16 * groups * parts if parts > 1 else 0
    grid = Grid(min(most, 2 * groups * parts), threads, partials, 2 * groups + 2, ring)
    return Plan(data.kernel("pipeline"), grid, data.numbers(groups, parts, part, 1, ahead))


def launches(
    shape: tuple[int, int, int],
    dtype: Any,
    address: int,
    inputs: int,
    device: Device,
    kinds: tuple[int, int],
    *,
    clusters: int = 0,
) -> tuple[Launch, ...]:
    """Return the launches of a forward (one input) or a backward, for parameters and state of those kinds."""
    found = plan(shape, dtype, address, inputs, device, clusters)
    if found is not None:
        return (Launch(found.kernel, found.grid, with_kinds(found.numbers, *kinds)),)
    sweeps = [("dots", False), ("affine2", False)] if inputs == 2 else [("moments", False), ("affine", False)]
    if inputs == 1 and dtype.itemsize == 8:
        sweeps.insert(1, ("moments", True))
    made, ring = [], by_ring(clusters > 0, dtype.itemsize)
    for sweep, about_mean in sweeps:
        given = sweep, shape, dtype.char, dtype.itemsize, address, device, ring
        kernel, (_, _, grid, numbers) = plan_sweep(*given)
        made.append(Launch(kernel, grid, with_kinds(numbers, *kinds), about_mean))
    return tuple(made)


trainer = functools.partial(Trainer, launches)


def allowed(gpu: Launcher, blocks: int) -> int:
    """Return how many blocks a cluster may have, where it shall have no more than `blocks`."""
    return blocks if blocks <= PORTABLE or gpu.holds_cluster(blocks) else PORTABLE


class FusedArguments(LaunchArguments):
    """The arguments of a call that takes one launch where `plan` finds one, otherwise two."""

    __slots__ = ()
    clusters = 0  # blocks of a cluster at most, where clusters are asked for

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
        if self.where:
            if has_rows(self.shape):
                self.run("backward" if self.u else "forward", eps=eps, **vectors)
            return has_rows(self.shape)
        clusters = allowed(self.gpu, self.clusters)
        given = self.address(self.y), 2 if self.u else 1, self.gpu.device(), clusters
        found = plan(self.shape, self.dtype, *given)
        if found is not None:
            self.launch(found.kernel, found, self.y, eps, vectors)
        return found is not None


_fused = Sweeps(FusedArguments)
forward, backward = _fused.forward, _fused.backward
masked_forward, masked_backward = _fused.masked_forward, _fused.masked_backward

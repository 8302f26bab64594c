"""Exact mode for CuPy arrays (E10): records of integers, and maps whose operations round by themselves (exact.cu).

A record (rows, C) lies on the GPU. Blocks add to it by atomics, in any order, because integers do not round.
"""

from __future__ import annotations

import functools

import numpy as np

from ... import exact
from ..._arrays.copies import as_numpy
from ..._arrays.namespaces import Array
from ...reference import Moments
from . import (
    DTYPES,
    NO_VECTORS,
    ROWS,
    VECTORS,
    Cut,
    LaunchArguments,
    cut,
    has_rows,
    launch,
    numbers_of,
    power_of_two,
    table,
    width_of,
)
from . import plan_sweep as usual_plan
from .launch import Device, Grid, Kernel

FILE = "exact.cu"
MOST_VALUES = 2**32  # of a channel: numbers by which the GPU divides
TILE = 64  # channels at most whose limbs a block keeps, channels-last; 17 KB
TILE_PART = 2**18  # bytes of a tile of each input that a block sums at most
TILE_THREADS = 128  # of a block, channels-last: three blocks on a multiprocessor leave 168 registers to a thread
WIDEST = 4  # values that a thread takes at once at most, channels-last: each has three sums


@functools.lru_cache(maxsize=4096)
def plan_sweep(
    sweep: str, shape: tuple[int, int, int], dtype: str, itemsize: int, address: int, device: Device, ring: bool
) -> tuple[Kernel, Cut]:
    """Return the kernel of a map over data of that shape, and the cut of the data; channels-first, without the ring."""
    kernel, found = usual_plan(sweep, shape, dtype, itemsize, address, device)
    return kernel._replace(name=f"exact_{kernel.name}", files=(*kernel.files, FILE)), found


@functools.lru_cache(maxsize=4096)
def plan_record(
    sweep: str, shape: tuple[int, int, int], dtype: str, itemsize: int, address: int, device: Device
) -> tuple[Kernel, Cut]:
    """Return the kernel of a record, and the cut of the data."""
    rows = has_rows(shape)
    found = _cut_rows(shape, itemsize, address) if rows else cut("moments", shape, itemsize, address, device)
    name = f"{sweep}_{'rows' if rows else 'planes'}"
    files = ROWS if rows else launch.SWEEPS  # rows.cu gives a thread more registers
    kernel = Kernel(name, DTYPES[dtype], found.width, (*files, FILE))
    return kernel, found._replace(grid=Grid(found.grid.blocks, found.grid.threads))


def _cut_rows(shape: tuple[int, int, int], itemsize: int, address: int) -> Cut:
    """Cut rows into tiles of at most TILE channels, and those into parts."""
    rows, channels, _ = shape
    width = min(width_of(shape, itemsize, address), WIDEST)
    columns = min(power_of_two(-(-channels // width)), TILE // width)
    groups, row = -(-channels // (columns * width)), columns * width * itemsize
    target = min(max(groups * rows * row // table.BLOCKS, table.MIN_BLOCK_BYTES), TILE_PART)
    part = max(target // row, TILE_THREADS // columns)
    parts = -(-rows // part)
    numbers = numbers_of(rows, channels, groups, parts, (rows, part, 1, channels, columns))
    return Cut("rows", width, Grid(groups * parts, TILE_THREADS), numbers)


class ExactArguments(LaunchArguments):
    """The arguments of a call in exact mode."""

    __slots__ = ()
    plan = staticmethod(plan_sweep)

    def record(self, sweep: str, mean: int = 0) -> Array:
        """(E10) Return the record of Σx and Σx² ("squares"), or of Σu and Σu·x ("products")."""
        record = self.gpu.zeros((exact.ROWS, self.shape[1]), "i8")
        if self.size:
            given = self.shape, self.dtype.char, self.dtype.itemsize, self.address(0), self.gpu.device()
            self.launch(*plan_record(sweep, *given), self.gpu.pointer(record), 0.0, {"mean": mean})
        return record


def _finish(gpu: launch.Launcher, name: str, record: Array, n: int, eps: float = 0.0, **vectors: int) -> None:
    """Set the statistics of a record: "moments_of_record" or "dots_of_record"."""
    channels = record.shape[1]
    grid, numbers = Grid(-(-channels // table.WARP), table.WARP), numbers_of(n, channels, 1, 1, (0, 0, 1, 0, 1))
    pointers = (gpu.pointer(record), 0, 0, *map(vectors.get, VECTORS, NO_VECTORS))
    gpu.launch(Kernel(name, "float32", 1, (*launch.SWEEPS, FILE)), grid, pointers, (eps, 0.0, *numbers))


# ---- The sweeps ------------------------------------------------------------------------------------------------------


def squares(x: Array) -> Array:
    """(E10) The record (rows, C) of Σx and Σx², of x (N, C, S), on the GPU."""
    gpu = launch.launcher()
    with gpu.on(x):
        return ExactArguments(gpu, x).record("squares")


def products(u: Array, x: Array, mean: Array) -> Array:
    """(E10) The record (rows, C) of Σu and Σu·x, of u and x (N, C, S), on the GPU; mean (C,) is that of x."""
    gpu = launch.launcher()
    with gpu.on(x):
        work = ExactArguments(gpu, x, u)
        return work.record("products", work.vector(mean))


def mean_and_m2(record: Array, n: int) -> Array:
    """(E1) mean and m2 (2, C) of n values, correctly rounded, where the record of Σx and Σx² is."""
    if isinstance(record, np.ndarray) or not 0 < n < MOST_VALUES:  # records that ranks have added are on the host
        return exact.mean_and_m2(as_numpy("record", record), n)
    gpu = launch.launcher()
    with gpu.on(record):
        rows = gpu.empty((2, record.shape[1]), "f8")
        _finish(gpu, "moments_of_record", record, n, mean=gpu.pointer(rows[0]), m2=gpu.pointer(rows[1]))
        return rows


def sums(record: Array, mean: Array) -> Array:
    """(E5) Σu and Σu·(x−mean) (2, C), correctly rounded, from the record of Σu and Σu·x and mean (C,)."""
    if isinstance(record, np.ndarray):
        return exact.sums(record, mean)
    gpu = launch.launcher()
    with gpu.on(record):
        work, rows = ExactArguments(gpu, record), gpu.empty((2, record.shape[1]), "f8")
        given = {"mean": work.vector(mean), "dbias": gpu.pointer(rows[0]), "dweight": gpu.pointer(rows[1])}
        _finish(gpu, "dots_of_record", record, 0, **given)
        return rows


def affine(x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
    """(E3, E7) a·(x−mean) + c (N, C, S), in the dtype of x, written to `out` where `out` is contiguous."""
    return _map("affine", out, x, None, mean=mean, a=a, c=c)


def affine2(u: Array, x: Array, mean: Array, a: Array, b: Array, c: Array, out: Array | None = None) -> Array:
    """(E6) a·u + (b·(x−mean) + c) (N, C, S), in the dtype of x, written to `out` where `out` is contiguous."""
    return _map("affine2", out, x, u, mean=mean, a=a, b=b, c=c)


def _map(sweep: str, out: Array | None, x: Array, u: Array | None, **vectors: Array) -> Array:
    gpu = launch.launcher()
    with gpu.on(x):
        work = ExactArguments(gpu, x, u)
        result = work.writes(out)
        work.run(sweep, **{name: work.vector(vector) for name, vector in vectors.items()})
        return result


# ---- Both sweeps, with the formulas of ``reference.py`` between them, and nothing on the host ------------------------


def forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
) -> tuple[Moments, Array, Array] | None:
    """(E1, E3) The moments of x (N, C, S), rstd (C,) and y; None where `mean_and_m2` is the host's."""
    gpu, n = launch.launcher(), x.shape[0] * x.shape[2]
    if not 0 < n < MOST_VALUES:
        return None
    with gpu.on(x):
        work = ExactArguments(gpu, x)
        y = work.writes(out)
        mean, m2, rstd = work.vectors(3)
        record = work.record("squares")
        given = {"mean": gpu.pointer(mean), "rstd": gpu.pointer(rstd)}
        _finish(gpu, "moments_of_record", record, n, eps, m2=gpu.pointer(m2), **given)
        work.run("affine", weight=work.vector(weight), bias=work.vector(bias), **given)
        return Moments(n, mean, m2, record=record), rstd, y


def backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None = None
) -> tuple[Array, Array, Array] | None:
    """(E5, E6) dx, and dweight and dbias (C,), from dy and x (N, C, S); None where x is empty."""
    gpu, n = launch.launcher(), x.shape[0] * x.shape[2]
    if n == 0:
        return None
    with gpu.on(x):
        work = ExactArguments(gpu, x, dy)
        dx = work.writes(out)
        dweight, dbias = work.vectors(2)
        given = {"mean": work.vector(mean), "rstd": work.vector(rstd)}
        given |= {"dweight": gpu.pointer(dweight), "dbias": gpu.pointer(dbias)}
        _finish(gpu, "dots_of_record", work.record("products", given["mean"]), n, **given)
        work.run("affine2", weight=work.vector(weight), **given)
        return dx, dweight, dbias

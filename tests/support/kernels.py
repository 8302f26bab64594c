"""The kernel modules under test: how each runs here, the cuts of its data, and how far its results may be off.

The CUDA kernels run on the CPU, compiled by g++ (tests/cuda/shim.py).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import shim

from arraybn import functional, reference
from arraybn._arrays.namespaces import FLOATS
from arraybn.kernels import cuda, select
from arraybn.kernels.cuda import cluster, fused, launch, table
from arraybn.kernels.cuda import exact as exact_sums
from arraybn.kernels.cuda.launch import Device

from .libraries import REQUIRED, need

COMPILED = os.environ.get("NUMBA_DISABLE_JIT") != "1"
Shape = tuple[int, int, int]  # (N, C, S)

# ---- Data ------------------------------------------------------------------------------------------------------------


def data(shape: tuple[int, ...], dtype: str, seed: int = 0, offset: float = 3.0) -> Any:
    values = np.random.default_rng(seed).standard_normal(shape) + offset
    return values.astype(need("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)


def coefficients(channels: int, number: int = 4) -> Any:
    return np.random.default_rng(9).standard_normal((number, channels))


def exact_of(*arrays: Any) -> list[Any]:
    """Return the arrays in long double, in which no value of theirs is rounded."""
    return [array.astype(np.float64).astype(np.longdouble) for array in arrays]


# ---- How far results may be off --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounding:
    """Bounds of the rounding errors of a module for one dtype."""

    total: float  # error of a sum, times the sum of the absolute values of its terms
    m2: float  # relative error
    scale: float  # error of a map before its last rounding, times its largest term
    last: float  # last rounding of a map, times the result
    smallest: float = 0.0  # half the distance of the smallest numbers of the dtype, or more


# On the CPU sums are float64. Between two numbers that are added stand at most 600 other additions: PIECE/32 in a run
# of 32 sums at once, BLOCK runs, some rows of blocks, halves of tiles. Each rounds by 2⁻⁵³ of what has been added up.
# Maps are float64 too, rounded once.
_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
_HALF = {"float16": 2.0**-25, "bfloat16": 2.0**-25}
ON_CPU = {
    dtype: Rounding(600 * 2.0**-53, 2400 * 2.0**-53, 4 * 2.0**-53, 0.51 * eps, _HALF.get(dtype, 0.0))
    for dtype, eps in _EPS.items()
}
# On a GPU half precision is summed up to 32 values at a time in float32, after x − mean was rounded to float32; the
# rest is float64, with at most some hundred additions between two numbers. Maps calculate in the dtype itself, half
# precision in float32: four roundings of the largest term, and the last.
SUM = {"float16": 40 * 2.0**-24, "bfloat16": 40 * 2.0**-24, "float32": 300 * 2.0**-53, "float64": 300 * 2.0**-53}
_LAST = {"float16": 1.01 * 2.0**-11, "bfloat16": 1.01 * 2.0**-8}
ON_GPU = {
    dtype: Rounding(total, 8 * total, 4 * 2.0**-53 if dtype == "float64" else 4 * 2.0**-24, _LAST.get(dtype, 0.0))
    for dtype, total in SUM.items()
}
ON_GPU |= {dtype: replace(ON_GPU[dtype], smallest=smallest) for dtype, smallest in _HALF.items()}

# ---- The cuts: (N, C, S), and sizes of the module that cut so, where its own sizes need larger data ------------------

Cuts = dict[str, tuple[Shape, dict[str, Any]]]
WHOLE: Cuts = {
    "one value a channel": ((1, 3, 1), {}),
    "one channel": ((37, 1, 9), {}),
    "lines": ((150, 24, 1), {}),
    "planes": ((9, 3, 49), {}),
}
CPU_CUTS: Cuts = {
    "one value a channel": ((1, 3, 1), {}),
    "one channel": ((37, 1, 9), {}),
    "one channel, one value a row": ((70, 1, 1), {}),
    "rows side by side, and some left over": ((67, 5, 3), {}),
    "more short planes than a run takes": ((5, 350, 7), {}),
    "channels-last": ((150, 24, 1), {}),
    "channels-last in tiles": ((600, 24, 1), {"MIN_TILE_BYTES": 4096, "TILE": 4096}),
    "channels-last in groups": (
        (30, 40, 1),
        {"MIN_TILE_BYTES": 512, "TILE": 4096, "MIN_CONTIGUOUS_BYTES": 16, "CACHED": 0},
    ),
    "channels-last, wide rows": ((11, 2100, 1), {"MIN_HALF_BYTES": 2**20}),
    "planes": ((9, 3, 49), {}),
    "planes in groups": ((9, 7, 33), {"MIN_TILE_BYTES": 2048, "TILE": 4096}),
    "planes in tiles": ((150, 3, 40), {"MIN_TILE_BYTES": 512, "TILE": 2048}),
    "long planes, cut into pieces": ((2, 2, 8200), {"MIN_HALF_BYTES": 2**20}),
    "long planes in tiles": ((1, 2, 16500), {"MIN_TILE_BYTES": 4096, "TILE": 4096}),
}
if not COMPILED:  # the same cuts of less data, because every step is one of Python, and is counted by coverage
    CPU_CUTS |= {
        "channels-last": ((20, 24, 1), {}),
        "channels-last, wide rows": ((5, 1030, 1), {}),
        "channels-last in tiles": ((40, 24, 1), {"MIN_TILE_BYTES": 1024, "TILE": 1024}),
        "more short planes than a run takes": ((3, 350, 7), {}),
        "planes in tiles": ((20, 3, 40), {"MIN_TILE_BYTES": 512, "TILE": 1024}),
        "long planes, cut into pieces": ((2, 2, 72), {}),
        "long planes in tiles": ((1, 2, 330), {"MIN_TILE_BYTES": 256, "TILE": 256}),
    }
FEW_STAGES: Any = {"CHUNK": 12288, "STAGES": {1: 3, 2: 2, 3: 2}}  # so that a stage is used again
NO_RING: Any = {"STAGES": {1: 1, 2: 1, 3: 1}}
IN_RING: Any = {"RING_MAPS": (2, 4, 8)}
CUDA_CUTS: Cuts = {
    "one value a channel": ((1, 3, 1), {}),
    "one channel": ((37, 1, 9), {}),
    "one channel, one value a row": ((70, 1, 1), {}),
    "two channels": ((45, 2, 1), {}),
    "channels-last": ((150, 16, 1), {}),
    "channels-last, odd": ((83, 5, 1), {}),
    "channels-last, few rows": ((3, 16, 1), {}),
    "channels-last in tiles": ((9, 2304, 1), {}),
    "channels-last, odd, in tiles": ((6, 517, 1), {}),
    "channels-last in parts": ((303, 16, 1), {}),
    "channels-last, odd, in parts": ((203, 5, 1), {"CHUNK": 256}),
    "channels-last in parts, before Hopper": ((303, 16, 1), NO_RING),
    "channels-last, odd, in parts, before Hopper": ((203, 5, 1), {"CHUNK": 256, **NO_RING}),
    "short planes": ((9, 6, 5), {}),
    "planes": ((9, 3, 64), {}),
    "planes of an odd size": ((9, 3, 49), {}),
    "planes that are no multiple of 16 bytes": ((5, 3, 36), {}),
    "planes in rounds": ((40, 2, 49), {"THREADS": 32}),
    "planes in parts": ((7, 3, 64), {"MIN_BLOCK_BYTES": 256, "PART": 256, "MAP_PART": 256}),
    "odd planes in parts": ((7, 3, 49), {"MIN_BLOCK_BYTES": 128, "PART": 128, "MAP_PART": 128}),
    "a long plane in parts": ((1, 2, 2052), {"MIN_BLOCK_BYTES": 1024, "PART": 1024, "MAP_PART": 1024, "THREADS": 32}),
    "planes in a ring": ((9, 3, 64), IN_RING),
    "one channel in a ring": ((37, 1, 9), IN_RING),
    "odd planes in a ring": ((37, 5, 13), IN_RING),
}

H200 = shim.H200
NARROW = H200._replace(shared_in_all=0)  # never room for a second block
SMALL = Device(multiprocessors=2, cache=2**40, shared=72 * 2**10, shared_in_all=0)
LONELY = SMALL._replace(multiprocessors=1)


FEW_WARPS: Any = {"WARPS": 2, "SIDE_WARPS": 2, "PIECES": 3}


class FusedCut(NamedTuple):
    """The way that data of this shape goes on a GPU, with sizes of the module that make it go so."""

    way: str
    shape: Shape
    has: Device
    sizes: dict[str, Any]


FUSED_CUTS: dict[str, FusedCut] = {
    name: FusedCut(*cut)
    for name, cut in {
        "one value a channel": ("resident", (1, 3, 1), H200, {}),
        "one channel": ("resident", (37, 1, 9), H200, {}),
        "short planes": ("resident", (9, 6, 5), H200, {}),
        "planes": ("resident", (9, 3, 64), H200, {}),
        "planes of an odd size": ("resident", (9, 3, 49), H200, {}),
        "planes that are no multiple of 16 bytes": ("resident", (5, 3, 36), H200, {}),
        "planes in rounds": ("resident", (3, 2, 1024), H200, {"THREADS": 32}),
        "odd planes in rounds": ("resident", (40, 2, 49), H200, {"THREADS": 32}),
        "channels-last": ("resident", (150, 24, 1), H200, {}),
        "channels-last, narrow": ("resident", (150, 24, 1), NARROW, {}),
        "channels-last, few rows": ("resident", (3, 16, 1), H200, {}),
        "channels-last, odd": ("resident", (83, 5, 1), H200, {}),
        "channels-last in groups": ("resident", (21, 76, 1), H200, {}),
        "channels-last in rounds": ("resident", (300, 24, 1), NARROW, {"THREADS": 32}),
        "planes in parts": ("pipeline", (7, 3, 64), SMALL, {"MIN_BLOCK_BYTES": 256, "TASK": 256}),
        "odd planes in parts": ("pipeline", (7, 3, 49), SMALL, {"MIN_BLOCK_BYTES": 128, "TASK": 128}),
        "a long plane in parts": (
            "pipeline",
            (1, 2, 2052),
            SMALL,
            {"MIN_BLOCK_BYTES": 1024, "TASK": 1024, "THREADS": 32},
        ),
        "a part in rounds": ("pipeline", (3, 2, 1024), SMALL, {"MIN_BLOCK_BYTES": 2**20, "THREADS": 32}),
        "one channel in parts": ("pipeline", (64, 1, 9), SMALL, {"MIN_BLOCK_BYTES": 256, "TASK": 256}),
        "one part a channel": ("pipeline", (4, 19, 16), SMALL, {"MIN_BLOCK_BYTES": 2**20}),
        "few ahead": ("pipeline", (7, 5, 64), LONELY, {"MIN_BLOCK_BYTES": 512, "TASK": 512, "DRAWING": 1}),
        "all ahead": ("pipeline", (7, 2, 64), SMALL, {"MIN_BLOCK_BYTES": 512, "TASK": 512, "DRAWING": 64}),
        "rows in a ring": ("ring", (1500, 24, 1), SMALL, FEW_STAGES),
        "odd rows in a ring": ("ring", (333, 5, 1), SMALL, {"CHUNK": 256}),
        "few rows in a ring": ("ring", (3, 16, 1), SMALL, {}),
        "two channels in a ring": ("ring", (1045, 2, 1), SMALL, {"CHUNK": 512}),
        "tiles in a ring": ("ring", (24, 2304, 1), SMALL, {"CHUNK": 2**14, "STAGES": FEW_STAGES["STAGES"]}),
        "rows": ("rows", (1500, 24, 1), SMALL, {**FEW_STAGES, **NO_RING}),
        "rows in five shares": (
            "rows",
            (1500, 24, 1),
            SMALL._replace(multiprocessors=5),
            {"CHUNK": 512, **NO_RING},
        ),
        "odd rows": ("rows", (333, 5, 1), SMALL, {"CHUNK": 256, **NO_RING}),
        "odd rows in tiles": ("rows", (21, 517, 1), SMALL, {}),
        "one block": ("cluster", (9, 3, 64), SMALL, FEW_WARPS),
        "two blocks": ("cluster", (9, 5, 64), SMALL, {**FEW_WARPS, "CLUSTERS": (2,)}),
        "short pieces": ("cluster", (37, 1, 16), SMALL, {**FEW_WARPS, "CLUSTERS": (4,)}),
        "a long plane in a cluster": ("cluster", (1, 2, 2056), SMALL, {**FEW_WARPS, "CLUSTERS": (8,)}),
        "sixteen blocks": ("cluster", (37, 2, 64), SMALL, {**FEW_WARPS, "CLUSTERS": (16,)}),
        "blocks without values": ("cluster", (3, 2, 16), LONELY, {**FEW_WARPS, "CLUSTERS": (8,)}),
        "planes side by side": ("cluster", (37, 16, 9), SMALL, {**FEW_WARPS, "CLUSTERS": (2,)}),
        "odd planes side by side": ("cluster", (9, 24, 49), LONELY, FEW_WARPS),
        "the fewest blocks that fit": ("cluster", (40, 2, 512), SMALL._replace(shared=48 * 2**10), FEW_WARPS),
        "many rows a thread": ("rows", (1160, 24, 1), LONELY, {"CHUNK": 2**16, **NO_RING}),
        "neither": ("split", (40, 3, 64), SMALL._replace(cache=0), {}),
        "chunks in a ring": ("split", (39, 3, 256), SMALL._replace(cache=0), {"CHUNK": 8192, **IN_RING}),
        "odd planes, chunks in a ring": ("split", (171, 3, 49), SMALL._replace(cache=0), {"CHUNK": 8192, **IN_RING}),
    }.items()
}

# ---- The modules -----------------------------------------------------------------------------------------------------


class _Reference:
    """The sweeps of ``reference.py``, with its compositions under the arguments of a kernel module."""

    moments, dots = staticmethod(reference.moments), staticmethod(reference.dots)
    affine, affine2 = staticmethod(reference.affine), staticmethod(reference.affine2)
    affine3 = staticmethod(reference.affine3)

    @staticmethod
    def forward(x: Any, weight: Any, bias: Any, eps: float, out: Any = None) -> Any:
        batch, rstd, y = reference.forward(reference, x, weight, bias, eps)
        return batch.mean, batch.m2, rstd, y

    @staticmethod
    def backward(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, out: Any = None) -> Any:
        batch = reference.Moments(x.shape[0] * x.shape[2], mean, mean)
        return reference.backward(reference, dy, x, batch, rstd, weight)


@dataclass
class Case:
    """A kernel module that serves NumPy arrays, and data of one cut."""

    kind: str
    ops: Any  # the module
    cut: str
    shape: Shape
    gpu: Any = None  # the Shim

    @property
    def on_gpu(self) -> bool:
        return self.gpu is not None

    @property
    def way(self) -> str:
        return FUSED_CUTS[self.cut].way

    def rounding(self, dtype: str) -> Rounding:
        return (ON_GPU if self.on_gpu else ON_CPU)[dtype]

    def again(self, **options: Any) -> Any:
        """Return a context in which the kernels run on another stand-in for the same GPU."""
        return installed(**{"has": self.gpu.has, **options})


KINDS = ("reference", "cpu", "cuda", "fused")
MODULE_CUTS: dict[str, Any] = {"reference": WHOLE, "cpu": CPU_CUTS, "cuda": CUDA_CUTS, "fused": FUSED_CUTS}


def cuts_of(*kinds: str) -> list[Any]:
    """Return a parameter for every cut of these modules."""
    return [pytest.param((kind, cut), id=f"{kind}-{cut}") for kind in kinds for cut in MODULE_CUTS[kind]]


def dtypes_of(kind: str) -> tuple[str, ...]:
    return ("float32",) if kind == "cpu" and not COMPILED else tuple(FLOATS)


@contextlib.contextmanager
def case_of(kind: str, cut: str | None = None) -> Iterator[Case]:
    """Let a kernel module take NumPy arrays; with a cut, set the sizes of the module that cut so."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        forget_cuts()
        stack.callback(forget_cuts)
        if kind == "reference":
            yield Case(kind, _Reference, cut or "", WHOLE[cut or "planes"][0])
        elif kind == "cpu":
            need("numba")
            cpu = importlib.import_module("arraybn.kernels.cpu")
            if not COMPILED:
                shorten_runs(patch)
            shape, sizes = CPU_CUTS[cut or "planes"]
            set_sizes(patch, cpu, sizes)
            yield Case(kind, cpu, cut or "", shape)
        elif kind == "cuda":
            gpu = stack.enter_context(installed())
            shape, sizes = CUDA_CUTS[cut or "planes"]
            set_sizes(patch, cuda, sizes)
            yield Case(kind, cuda, cut or "", shape, gpu)
        else:
            way, shape, has, sizes = FUSED_CUTS[cut or "planes"]
            gpu = stack.enter_context(installed(has=has))
            set_way(patch, way, sizes)
            yield Case(kind, cluster if way == "cluster" else fused, cut or "", shape, gpu)


def shorten_runs(patch: pytest.MonkeyPatch) -> None:
    """Cut runs and blocks of the CPU kernels shorter, where every step is one of Python."""
    cpu, tiles = (importlib.import_module(f"arraybn.kernels.cpu{name}") for name in ("", ".tiles"))
    for module in (cpu, tiles):
        patch.setattr(module, "PIECE", 64)
        patch.setattr(module, "BLOCK", 4)


def set_sizes(patch: pytest.MonkeyPatch, module: Any, sizes: dict[str, Any]) -> None:
    for name, value in sizes.items():
        patch.setattr(module if hasattr(module, name) else table, name, value)
    forget_cuts()


def set_way(patch: pytest.MonkeyPatch, way: str, sizes: dict[str, Any]) -> None:
    """Set sizes of the fused kernels, and let no channel be resident or in a cluster where the way is another."""
    for other in {"resident", "cluster"} - {way}:
        patch.setattr(fused, f"_{other}", lambda *_: None)
    set_sizes(patch, fused, sizes)


def forget_cuts() -> None:
    """Let every cut be made anew, because sizes have changed."""
    functional._PLANS.clear()
    cuda.cut.cache_clear()
    cuda.plan_sweep.cache_clear()
    fused.plan.cache_clear()
    exact_sums.plan_sweep.cache_clear()
    exact_sums.plan_record.cache_clear()
    with contextlib.suppress(ImportError):
        importlib.import_module("arraybn.kernels.cpu")._kind.cache_clear()


@functools.cache
def libraries() -> tuple[Any, ...]:
    """Return the shared libraries of all CUDA kernels; skip where there is no g++ to compile them."""
    if shim.compiler() is None and "g++" not in REQUIRED:
        pytest.skip("there is no g++ to compile the kernels for the CPU")
    return tuple(shim.libraries())


@contextlib.contextmanager
def installed(*given: Any, **options: Any) -> Iterator[shim.Shim]:
    """Let the CUDA kernels take NumPy arrays: those of the given libraries, otherwise of all."""
    gpu = shim.Shim(*(given or libraries()), **options)
    with mock.patch.object(launch, "launcher", lambda: gpu):  # noqa: PT008, a mock takes longer than the kernel
        yield gpu


def serve_all_by(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Let `module` serve NumPy arrays wherever no other kernels are asked for."""
    patch.setattr("arraybn.functional._PLANS", {})
    patch.setattr(
        "arraybn.statistics.select", lambda x, kernels=None: select(x, module if kernels is None else kernels)
    )


# ---- Assertions ------------------------------------------------------------------------------------------------------


def assert_sum(got: Any, terms: Any, rounding: Rounding) -> None:
    """Assert that `got` (C,) is the sum of `terms` (N, C, S), long double."""
    assert got.dtype == np.float64
    scale, exact = np.abs(terms).sum(axis=(0, 2)), terms.sum(axis=(0, 2))
    assert np.all(np.abs(got - exact) <= rounding.total * scale)
    assert np.all(scale == 0) or np.any(np.abs(got + 1e-3 * scale - exact) > rounding.total * scale)  # wrong by 0.1 %


def assert_map(got: Any, exact: Any, scale: Any, dtype: Any, rounding: Rounding) -> None:
    """Assert that `got` is `exact`, long double, from terms no larger than `scale`."""
    assert got.dtype == dtype
    bound = rounding.scale * scale + rounding.last * np.abs(exact) + rounding.smallest
    assert np.all(np.abs(exact_of(got)[0] - exact) <= bound)
    assert not np.any(exact) or np.any(
        np.abs(exact_of(got)[0] * 1.05 - exact) > bound
    )  # the control; bfloat16 has three digits


def assert_moments(mean: Any, m2: Any, exact_x: Any, rounding: Rounding) -> None:
    """(E1) Assert that mean and m2 (C,) are those of `exact_x` (N, C, S), long double."""
    n = exact_x.shape[0] * exact_x.shape[2]
    exact_mean = exact_x.sum(axis=(0, 2)) / n
    assert np.all(np.abs(mean - exact_mean) <= rounding.total * np.minimum(np.abs(exact_x).max(axis=(0, 2)), 4))
    exact_m2 = ((exact_x - exact_mean[:, None]) ** 2).sum(axis=(0, 2))
    assert np.all(np.abs(m2 - exact_m2) <= rounding.m2 * exact_m2)
    wrong = np.abs(1.001 * m2 - exact_m2) > rounding.m2 * exact_m2
    assert n == 1 or np.all(wrong | (exact_m2 == 0))  # the control


def assert_sums(case: Case, dtype: str) -> None:
    """(E1, E5) Assert that `moments` and `dots` are right for data of this case."""
    u, x = data(case.shape, dtype, 1, 0.5), data(case.shape, dtype)
    exact_u, exact_x = exact_of(u, x)
    mean, m2 = case.ops.moments(x)
    assert_moments(mean, m2, exact_x, case.rounding(dtype))
    s, q = case.ops.dots(u, x, mean)
    assert_sum(s, exact_u, case.rounding(dtype))
    assert_sum(q, exact_u * (exact_x - mean[:, None]), case.rounding(dtype))


def assert_maps(case: Case, dtype: str) -> None:
    """(E3, E6, E9) Assert that `affine`, `affine2` and `affine3` are right for data of this case."""
    u, x = data(case.shape, dtype, 1, 0.5), data(case.shape, dtype)
    exact_u, exact_x = exact_of(u, x)
    mean, a, b, c = (vector[:, None] for vector in coefficients(case.shape[1]))
    d, rounding = exact_x - mean, case.rounding(dtype)
    got = case.ops.affine(x, mean[:, 0], a[:, 0], c[:, 0])
    assert_map(got, a * d + c, abs(a * d) + abs(c), x.dtype, rounding)
    got = case.ops.affine2(u, x, mean[:, 0], a[:, 0], b[:, 0], c[:, 0])
    assert_map(got, a * exact_u + b * d + c, abs(a * exact_u) + abs(b * d) + abs(c), x.dtype, rounding)
    v = data(case.shape, dtype, 2, -0.5)
    terms = [b * exact_of(v)[0], c * exact_u, a * d, mean]
    vectors = (vector[:, 0] for vector in (mean, b, c, a, mean))
    assert_map(case.ops.affine3(v, u, x, *vectors), sum(terms), sum(map(abs, terms)), x.dtype, rounding)


def assert_forward(case: Case, dtype: str) -> None:
    """(E1, E3) Assert that a forward of data of this case is exact to rounding."""
    n, eps, (weight, bias) = case.shape[0] * case.shape[2], 1e-5, coefficients(case.shape[1])[:2]
    x = data(case.shape, dtype)
    (exact_x,) = exact_of(x)
    mean, m2, rstd, y = case.ops.forward(x, weight, bias, eps)
    assert_moments(mean, m2, exact_x, case.rounding(dtype))
    np.testing.assert_array_equal(rstd, reference.rstd(m2 / n, eps))
    d = exact_x - mean[:, None]
    a, c = (vector[:, None] for vector in reference.normalize(rstd, weight, bias))
    assert_map(y, a * d + c, abs(a * d) + abs(c), x.dtype, case.rounding(dtype))


def assert_backward(case: Case, dtype: str) -> None:
    """(E5, E6) Assert that a backward of data of this case is exact to rounding."""
    n, weight = case.shape[0] * case.shape[2], coefficients(case.shape[1])[0]
    dy, x = data(case.shape, dtype, 1, 0.5), data(case.shape, dtype)
    exact_dy, exact_x = exact_of(dy, x)
    mean = x.astype("f8").mean(axis=(0, 2))
    rstd = reference.rstd(x.astype("f8").var(axis=(0, 2)), 1e-5)
    dx, dweight, dbias = case.ops.backward(dy, x, mean, rstd, weight)
    d, rounding = exact_x - mean[:, None], case.rounding(dtype)
    assert_sum(dbias, exact_dy, rounding)
    a, b, c = (vector[:, None] for vector in reference.input_gradient(dweight, dbias, n, rstd, weight))
    if n > 1:
        assert_sum(dweight / rstd, exact_dy * d, rounding)
        assert_map(dx, a * exact_dy + b * d + c, abs(a * exact_dy) + abs(b * d) + abs(c), x.dtype, rounding)
    else:
        assert np.all(abs(dx.astype("f8")) <= 2.0**-20 * abs(a))


@dataclass
class Masked:
    """Data with a mask: u is 0, and v and x are `fill`, at the positions that the mask leaves out."""

    where: Any  # (N, 1, S)
    u: Any
    v: Any
    x: Any

    @property
    def n(self) -> int:
        return int(np.count_nonzero(self.where))


MASKS = ("half", "padding", "one", "none")


def with_mask(case: Case, dtype: str, mask: str, fill: float = np.nan) -> Masked:
    """Return data of this case, half masked, the last samples and ends of planes, all but one position, or all."""
    samples, _, plane = case.shape
    places = np.arange(samples * plane).reshape(samples, 1, plane)
    where = {
        "half": np.random.default_rng(4).random(places.shape) < 0.5,
        "padding": (places // plane < max(samples * 2 // 3, 1)) & (places % plane <= plane // 2),
        "one": places == samples * plane - 1,
        "none": places < 0,
    }[mask]
    u, v, x = (data(case.shape, dtype, seed, offset) for seed, offset in ((1, 0.5), (2, -0.5), (0, 3.0)))
    fills = (u, 0.0), (v, fill), (x, fill)
    return Masked(where, *(np.where(where, array, array.dtype.type(value)) for array, value in fills))


def all_of(case: Case, t: Masked) -> list[Any]:
    """Return the results of all sweeps, and of a forward and a backward, of data with a mask."""
    ops, (mean, a, b, c) = case.ops, coefficients(case.shape[1])
    batch, rstd, y = ops.masked_forward(t.x, a, b, 1e-5, None, reference.Mask(t.where, t.n))
    return [
        *ops.moments(t.x, where=t.where),
        *ops.dots(t.v, t.x, mean, where=t.where),
        *ops.dots(t.u, t.x, mean, skip_zeros=True),
        ops.affine2(t.u, t.x, mean, a, b, c, where=t.where),
        ops.affine3(t.v, t.u, t.x, mean, a, b, c, mean, where=t.where),
        batch.mean,
        batch.m2,
        rstd,
        y,
        *ops.masked_backward(t.u, t.x, batch, rstd, a, None, t.where),
    ]


def assert_masked(case: Case, dtype: str, mask: str = "padding") -> None:
    """(E1, E5, E6, E9) Assert that the sweeps with a mask are right for data of this case."""
    t, rounding = with_mask(case, dtype, mask), case.rounding(dtype)
    found = all_of(case, t)
    u, v, x = exact_of(*(np.where(t.where, array, array.dtype.type(0)) for array in (t.u, t.v, t.x)))
    kept = np.moveaxis(x, 1, -1)[t.where[:, 0]][:, :, None]
    if t.n:
        assert_moments(*found[:2], kept, rounding)
    else:
        assert not np.any(found[:2])
    mean, a, b, c = (vector[:, None] for vector in coefficients(case.shape[1]))
    d = np.where(t.where, x - mean, 0)
    for got, terms in zip(found[2:6], (v, v * d, u, u * d), strict=True):
        assert_sum(got, terms, rounding)
    terms = [a * u, b * d, np.where(t.where, c, 0) + 0 * u]
    assert_map(found[6], sum(terms), sum(map(abs, terms)), t.x.dtype, rounding)
    terms = [a * v, b * u, c * d, np.where(t.where, mean, 0) + 0 * u]
    assert_map(found[7], sum(terms), sum(map(abs, terms)), t.x.dtype, rounding)


def assert_far_from_zero(case: Case, dtype: str) -> None:
    """(E1) Assert that m2 keeps its digits where the first values are masked and |mean| is 1000 standard deviations."""
    x = data(case.shape, dtype, offset=1000.0)
    places = np.arange(case.shape[0] * case.shape[2]).reshape(case.shape[0], 1, case.shape[2])
    where = (places >= places.size * 3 // 5) & ((places % 3 > 0) | (places == places.size - 1))
    m2 = case.ops.moments(np.where(where, x, x.dtype.type(np.nan)), where=where)[1]
    kept = np.moveaxis(exact_of(x)[0], 1, -1)[where[:, 0]]
    exact = ((kept - kept.mean(axis=0)) ** 2).sum(axis=0)
    assert np.all(np.abs(m2 - exact) <= case.rounding(dtype).m2 * exact)


def both(case: Case, dtype: str, ops: Any = None) -> list[Any]:
    """Return mean, m2, rstd, y, dx, dweight and dbias of data of this case."""
    ops = ops or case.ops
    dy, x = data(case.shape, dtype, 1, 0.5), data(case.shape, dtype)
    weight, bias = coefficients(case.shape[1])[:2]
    mean, m2, rstd, y = ops.forward(x, weight, bias, 1e-5)
    return [mean, m2, rstd, y, *ops.backward(dy, x, mean, rstd, weight)]

"""What only the fused CUDA kernels have, run on the CPU by cuda/shim.h: ways, plans, shared memory and flags."""

from __future__ import annotations

import itertools
import mmap
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import shim
from support import kernels
from support.compiling import ARCHITECTURES, compiled, every_kernel_for, in_local_memory, resources
from support.kernels import H200, LONELY, NARROW, SMALL, SUM, Case, both, coefficients, cuts_of, data

from arraybn._arrays.namespaces import FLOATS
from arraybn.kernels import cuda
from arraybn.kernels.cuda import cluster, fused, table
from arraybn.kernels.cuda import launch as launching
from arraybn.kernels.cuda.launch import Device, Grid, Kernel

ROOT = Path(__file__).parents[1]
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's


@pytest.fixture
def gpu() -> Iterator[shim.Shim]:
    """Let the fused kernels take NumPy arrays."""
    with kernels.case_of("fused") as case:
        yield case.gpu


@pytest.fixture(params=cuts_of("fused"))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Yield data that goes each way."""
    with kernels.case_of(*request.param) as made:
        yield made


@pytest.mark.parametrize("dtype", FLOATS)
def test_each_cut_goes_the_way_that_the_table_says(case: Case, dtype: str) -> None:
    both(case, dtype)
    names = [name for name, _ in case.gpu.launches]
    sweeps = {"forward": ["moments", "moments", "affine"][dtype != "float64" :], "backward": ["dots", "affine2"]}
    expected = []
    for direction, of_direction in sweeps.items():
        split = case.way == "split" or (case.way == "pipeline" and dtype == "float64")
        expected += of_direction if split else [f"{direction}_{case.way}"]
    assert [re.sub(f"(_planes|_lines|_ring_planes|_\\d+)?_{dtype}_.*", "", name) for name in names] == expected


@pytest.mark.parametrize("dtype", FLOATS)
def test_results_are_those_of_the_split_sweeps_to_rounding(case: Case, dtype: str) -> None:
    last = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 1e-6, "float64": 1e-14}[dtype]
    for got, want in zip(both(case, dtype), both(case, dtype, cuda), strict=True):
        tolerance = last if got.ndim == 3 else 4 * SUM[dtype]
        scale = max(1.0, float(abs(want.astype("f8")).max()))
        np.testing.assert_allclose(got.astype("f8"), want.astype("f8"), rtol=tolerance, atol=tolerance * scale)


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["planes", "channels-last", "planes in parts"])
def test_the_alignment_decides_how_many_values_a_fused_kernel_loads_at_once(dtype: str, name: str) -> None:
    with kernels.case_of("fused", name) as case:
        assert_widths(case, dtype)


def assert_widths(case: Case, dtype: str) -> None:
    shape, gpu = case.shape, case.gpu
    values, weight = data(shape, dtype), coefficients(shape[1])[0]
    mean, _, rstd, y = fused.forward(values, weight, None, 1e-5)
    dx = fused.backward(values, values, mean, rstd, weight)[0]
    itemsize = values.itemsize
    tolerance = {2: 2.0**-7, 4: 1e-6, 8: 1e-14}[itemsize]
    for offset in (itemsize, 8):
        x, out = shim.guarded(shape, values.dtype, offset), shim.guarded(shape, values.dtype, 16 - offset)
        x[...] = values
        gpu.launches.clear()
        for backward, want in [(False, y), (True, dx)]:
            if backward:
                result = fused.backward(x, x, mean, rstd, weight, out)[0]
            else:
                result = fused.forward(x, weight, None, 1e-5, out)[3]
            assert result is out
            shim.assert_guards(out)
            np.testing.assert_allclose(result.astype("f8"), want.astype("f8"), rtol=tolerance, atol=4 * tolerance)
        width = next(w for w in table.WIDTHS[itemsize] if offset % (w * itemsize) == 0)
        if case.cut == "channels-last" and width > 1:
            width = table.SIDES[itemsize] // itemsize
        assert {name.rpartition("_")[2] for name, _ in gpu.launches} == {str(width)}


@pytest.mark.parametrize(
    ("way", "shape"), [("resident", (3, 2, 16)), ("resident", (3, 16, 1)), ("pipeline", (3, 2, 16))]
)
def test_strides_beyond_2_31_are_followed_each_way(
    way: str, shape: tuple[int, int, int], gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.set_way(monkeypatch, way, {})
    stride = 2**31 + 64  # values from a sample to the next: the rest of a sample is never looked at
    size = 2 * (2 * stride + 64)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    line = np.frombuffer(memory, np.float16)
    where = np.arange(3)[:, None] * stride + np.arange(shape[1] * shape[2])
    x = data(shape, "float16")
    line[where] = x.reshape(3, -1)
    plan = fused.plan(shape, x.dtype, 0, 1, H200)
    assert plan is not None
    assert way in plan.kernel.name
    place = launching.NUMBERS.index("stride")
    numbers = (*plan.numbers[:place], stride, *plan.numbers[place + 1 :])
    mean, m2, rstd, y = fused.forward(x, None, None, 1e-5)
    got = np.zeros((3, shape[1]))
    vectors = dict(zip(("mean", "m2", "rstd"), (gpu.pointer(vector) for vector in got), strict=True))
    pointers = tuple(vectors.get(vector, 0) for vector in launching.POINTERS[3:-2])
    address = gpu.pointer(line)
    gpu.launch(plan.kernel, plan.grid, (address, 0, address, *pointers), (1e-5, 0.0, *numbers))
    np.testing.assert_allclose(got, [mean, m2, rstd], rtol=1e-6)
    np.testing.assert_allclose(line[where].reshape(shape), y, rtol=2e-3, atol=2e-3)
    del line
    memory.close()


def test_cupy_is_asked_for_the_shared_memory_that_a_block_may_have(
    gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = data((4, 3, 64), "float32")
    weight, bias = coefficients(3)[:2]
    expected = fused.forward(x, weight, bias, 1e-5)[3]
    attributes = {
        16: H200.multiprocessors,
        38: H200.cache,
        97: H200.shared,
        81: H200.shared_in_all,
        75: 9,
    }  # cudaDeviceAttr
    built, launched = [], []

    def raw_kernel(code: str, name: str, options: tuple[str, ...]) -> Any:
        assert code.count("DEVICE void resident(") == 1
        kernel = next(k for k in (*shim.fused_kernels("forward"), *shim.fused_kernels("backward")) if k.entry == name)
        built.append(SimpleNamespace(shared_size_bytes=4096, kernel=SimpleNamespace(ptr=gpu.build(kernel)[0])))
        return built[-1]

    def launch(function: int, *given: int) -> None:
        launched.append((gpu.names[function], given[6]))
        gpu.start(function, Grid(given[0], given[3], shared=given[6]), given[7], given[8])

    runtime = SimpleNamespace(
        getDevice=lambda: 0,
        memGetInfo=lambda: None,
        streamIsCapturing=lambda stream: False,
        deviceGetAttribute=lambda number, device: attributes[number],
    )
    stream = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=7))
    cupy = SimpleNamespace(cuda=stream, RawKernel=raw_kernel)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api.runtime", runtime)
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api.driver", SimpleNamespace(launchKernel=launch))
    launcher = launching.CuPy()
    for name in ("on", "empty", "zeros", "pointer"):
        monkeypatch.setattr(launcher, name, getattr(gpu, name))
    monkeypatch.setattr(launching, "launcher", lambda: launcher)
    y = fused.forward(x, weight, bias, 1e-5)[3]
    assert launcher.device() == H200
    np.testing.assert_array_equal(y, expected)
    assert launched == [("forward_resident_planes_float32_4", x.nbytes // 3)]
    assert built[0].max_dynamic_shared_size_bytes == H200.shared - 4096
    assert built[0].preferred_shared_memory_carveout == 100


# ---- The choice ------------------------------------------------------------------------------------------------------

# On an H200, at 32 images: what becomes of a forward and a backward, channels-first and channels-last. KiB of a channel
# (or of 32 bytes of each row) decide whether a block keeps it: it has 227, of which the sums take 5. A cluster of 2, 4
# or 8 blocks has so many times 222.
RESNET = {
    # channels, side, bytes of a value: channels-first forward, backward; channels-last forward, backward
    (64, 112, 4): "cluster pipeline ring ring",  # 1568 KiB; channels-last 32 bytes of all rows are 12 MiB, or 25
    (256, 56, 4): "cluster pipeline ring ring",  # 392 KiB
    (512, 28, 4): "resident resident ring ring",  # 98 KiB and 196; channels-last 784
    (1024, 14, 4): "resident resident ring ring",  # 24.5 and 49 KiB; channels-last 196 and 392
    (2048, 7, 4): "resident resident resident resident",  # 6 and 12 KiB; channels-last 49 and 98
    (64, 112, 2): "cluster pipeline ring ring",  # 784 KiB
    (256, 56, 2): "cluster pipeline ring ring",  # 196 and 392 KiB
    (512, 28, 2): "resident resident ring ring",  # 49 and 98 KiB; channels-last 784
    (1024, 14, 2): "resident resident ring ring",  # channels-last 196 KiB, but only 64 blocks for 132
    (2048, 7, 2): "resident resident resident resident",  # channels-last 49 and 98 KiB, 128 blocks
}


@pytest.mark.parametrize("key", RESNET)
def test_the_way_of_the_resnet_shapes_on_an_h200(key: tuple[int, int, int]) -> None:
    channels, side, itemsize = key
    images, lines = (32, channels, side * side), (32 * side * side, channels, 1)
    ways = []
    for shape, inputs in itertools.product((images, lines), (1, 2)):
        plan = fused.plan(shape, np.dtype(f"f{itemsize}"), 0, inputs, H200)
        ways.append("split" if plan is None else plan.kernel.name.split("_")[1])
    assert " ".join(ways) == RESNET[key]


# Blocks of a cluster forward and backward, and how many clusters, where clusters are asked for.
IN_CLUSTERS = {
    (64, 112, 4): "8×32, 16×16",  # 16 × 222 KiB hold 3136
    (256, 56, 4): "2×64, 4×64",
    (512, 28, 4): "1×128, 1×128",
    (1024, 14, 4): "1×128, 1×128",
    (2048, 7, 4): "1×512, 1×512",  # four planes of 196 bytes side by side: bulk copies are of 16 bytes
    (64, 112, 2): "4×64, 8×32",
    (256, 56, 2): "1×128, 2×64",
    (512, 28, 2): "1×128, 1×128",
    (1024, 14, 2): "1×512, 1×512",  # two planes of 392 bytes
    (2048, 7, 2): "1×256, 1×256",  # eight planes of 98 bytes
    (2044, 7, 2): "resident, resident",  # no multiple of eight channels
    (64, 112, 8): "16×16, pipeline",  # split, as there is no pipeline for float64
    (256, 56, 8): "4×64, 8×32",
}


@pytest.mark.parametrize("key", IN_CLUSTERS)
def test_the_clusters_of_the_resnet_shapes_on_an_h200(key: tuple[int, int, int]) -> None:
    channels, side, itemsize = key
    shape, kind, found = (32, channels, side * side), np.dtype(f"f{itemsize}"), []
    for inputs in (1, 2):
        plan = fused.plan(shape, kind, 0, inputs, H200, clusters=16)
        if plan is not None and "cluster" in plan.kernel.name:
            blocks = plan.kernel.blocks
            found.append(f"{blocks}×{plan.grid.blocks // blocks}")
            if blocks < 16:
                assert fused.plan(shape, kind, 0, inputs, H200, clusters=8) == plan
        else:
            found.append("pipeline" if plan is None else plan.kernel.name.split("_")[1])
        older = fused.plan(shape, kind, 0, inputs, H200._replace(capability=8), clusters=16)
        assert older is None or "cluster" not in older.kernel.name
    assert ", ".join(found) == IN_CLUSTERS[key]


def test_few_channels_get_no_clusters_that_leave_half_of_the_gpu_idle() -> None:
    for channels, way in ((8, "pipeline"), (9, "cluster")):  # clusters of 8 blocks for 132 multiprocessors
        plan = fused.plan((32, channels, 112 * 112), np.dtype("f4"), 0, 1, H200)
        assert plan is not None
        assert plan.kernel.name.split("_")[1] == way


def test_sixteen_blocks_are_taken_only_where_asked_for_where_eight_are_too_few_and_where_the_gpu_holds_them() -> None:
    apart = "moments_planes affine_planes"
    with kernels.case_of("fused", "one block") as case:
        for largest, ops, each, ways in [
            (16, cluster, 2**12, "forward_cluster_16"),
            (16, cluster, 2**13, "forward_cluster_8"),
            (8, cluster, 2**12, apart),  # refused
            (16, fused, 2**12, apart),
        ]:
            case.gpu.has, case.gpu.largest = SMALL._replace(shared=table.ROOM + each), largest
            case.gpu.launches.clear()
            kernels.assert_forward(replace(case, ops=ops, shape=(9, 4, 1024)), "float32")  # 36 KiB a channel
            assert [name.removesuffix("_float32_4") for name, _ in case.gpu.launches] == ways.split()


def test_a_step_of_two_launches_maps_by_the_ring_where_clusters_are_asked_for() -> None:
    with kernels.case_of("fused", "neither") as case:
        for clusters, way in ((0, "planes"), (8, "ring_planes")):
            given = (39, 3, 256), np.dtype("f4"), 0, 2, case.gpu.has, (1, 1)
            names = [launch.kernel.name for launch in fused.launches(*given, clusters=clusters)]
            assert names == ["dots_planes", f"affine2_{way}"]


def test_small_blocks_share_a_multiprocessor_and_large_shapes_fill_the_gpu() -> None:
    for channels, side, itemsize in RESNET:
        for inputs in (1, 2):
            plan = fused.plan((32, channels, side * side), np.dtype(f"f{itemsize}"), 0, inputs, H200)
            assert plan is not None  # channels-first
            if "cluster" in plan.kernel.name:
                assert plan.grid.threads == 512
                assert 128 <= plan.grid.blocks <= 2 * 132
            elif "resident" in plan.kernel.name:
                together = H200.shared_in_all // (plan.grid.shared + table.ROOM)
                assert together >= (2 if plan.grid.shared < 100 * 2**10 else 1)
                assert min(together, 2048 // plan.grid.threads) * plan.grid.threads >= 256
            else:
                assert plan.grid.blocks == table.DRAWING * 132
                assert H200.shared_in_all // (plan.grid.shared + table.ROOM) >= table.DRAWING


def assert_rows_are_whole(plan: fused.Plan, shape: kernels.Shape, itemsize: int, has: Device) -> None:
    """Assert that every row has a share, and that a share has the memory it needs; `itemsize` is that of all inputs."""
    n, channels, groups, shares, items, height, _, stride, columns, stages = plan.numbers[:10]
    inputs = 1 + plan.kernel.name.startswith("backward")
    tile, is_ring = columns * plan.kernel.width, "ring" in plan.kernel.name
    assert (n, channels, items, stride) == (shape[0], shape[1], shape[0], shape[1])
    assert groups * tile >= channels > (groups - 1) * tile
    assert columns & columns - 1 == 0 < columns <= 256
    assert shares <= -(-items // height) < items + 1  # no share is empty
    assert plan.grid.blocks == groups * shares <= max(has.multiprocessors, groups)
    assert plan.grid.threads == 256 + 32 * is_ring
    assert plan.grid.partials == 16 * groups * shares * tile
    assert has.shared - table.ROOM >= plan.grid.shared >= 16 * 256 * plan.kernel.width
    if is_ring:
        assert 2 <= stages <= 16
        assert height * min(channels, tile) * itemsize // inputs % 16 == 0  # bytes of an input in a stage
        assert plan.grid.shared >= stages * height * min(channels, tile) * itemsize


def assert_clusters_are_whole(plan: fused.Plan, shape: kernels.Shape, itemsize: int, has: Device) -> None:
    """Assert that every item of a channel has a place, and every channel a cluster; `itemsize` is of all inputs."""
    n, channels, groups, parts, items, part, plane, stride, side, pieces = plan.numbers[:10]
    width, blocks = plan.kernel.width, plan.kernel.blocks
    assert plan.kernel.name.endswith(f"_cluster_{blocks}")
    assert (n, channels, groups * side, parts) == (shape[0] * shape[2], shape[1], shape[1], 1)
    assert items * width == n * side
    assert stride == plane * width * (groups if channels > 1 else 1)
    assert plane * width * itemsize % 16 == part * width * itemsize % 16 == 0
    assert (side, part % plane) == (1, part % plane) if width > 1 else (side in (2, 4, 8), part % plane == 0)
    warps = table.WARPS if side == 1 else table.SIDE_WARPS
    assert (pieces, plan.grid.threads) == (table.PIECES, 32 * warps)
    assert blocks * warps * pieces * (part - plane) < items <= blocks * warps * pieces * part
    assert plan.grid.shared == warps * pieces * part * width * itemsize <= has.shared - table.ROOM
    clusters = plan.grid.blocks // blocks
    assert plan.grid.blocks == clusters * blocks
    most = groups if side > 1 else max(table.WAVES[blocks] * has.multiprocessors // blocks, 1)
    assert 1 <= clusters <= min(groups, most)
    assert (plan.grid.partials, plan.grid.tickets) == (0, 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_shape_has_a_plan_that_is_whole_and_cannot_wait_for_ever(dtype: str) -> None:
    rng = np.random.default_rng(3)
    kind = data((1,), dtype).dtype
    found = dict.fromkeys(("resident", "cluster", "pipeline", "ring", "rows", "split"), 0)
    for _ in range(4000):
        shape = tuple(int(2 ** rng.uniform(0, high)) for high in (14, 13, 16))
        shape = shape if rng.random() < 0.5 else (*shape[:2], -(-shape[2] // 8) * 8)  # multiples of 16 bytes
        shape = shape if rng.random() < 0.6 else (shape[0] * shape[2], shape[1], 1)
        inputs, has = int(rng.integers(1, 3)), [H200, SMALL, LONELY, NARROW][rng.integers(4)]
        address = int(rng.choice([0, kind.itemsize, 8]))
        has, clusters = has._replace(capability=int(rng.integers(8, 10))), int(rng.choice([0, 0, 0, 8, 16]))
        plan = fused.plan.__wrapped__(shape, kind, address, inputs, has, clusters)
        if plan is None:
            found["split"] += 1
            continue
        n, channels, groups, parts, items, part, plane, stride, columns, ahead = plan.numbers[:10]
        blocks, threads, partials, tickets, shared = plan.grid
        way = plan.kernel.name.split("_")[1]
        found[way] += 1
        if way in ("ring", "rows"):
            assert_rows_are_whole(plan, shape, kind.itemsize * inputs, has)
            continue
        if way == "cluster":
            assert_clusters_are_whole(plan, shape, kind.itemsize * inputs, has)
            assert plan.kernel.blocks <= (clusters or table.UNASKED)
            continue
        width, lines = plan.kernel.width, plan.kernel.name.endswith("lines")
        slots = columns * width if lines else 1
        assert (n, channels) == (shape[0] * shape[2], shape[1])
        assert groups * slots >= channels > (groups - 1) * slots
        assert items * (1 if lines else width) == n
        assert (parts - 1) * part < items <= parts * part
        assert threads in (32, 64, 128, 256)
        assert threads % slots == 0
        assert stride == (channels if lines else plane * width * (channels if channels > 1 else 1))
        if "resident" in plan.kernel.name:
            assert (blocks, parts, tickets, partials) == (groups, 1, 0, 0)
            assert shared == inputs * items * columns * width * kind.itemsize <= has.shared - table.ROOM
        else:
            rounds = {1: 4, 2: 2}[inputs] * (4 if width > 1 else 8)  # as the source has them
            assert shared == rounds * threads * width * kind.itemsize * inputs <= has.shared - table.ROOM
            assert shared & shared - 1 == 0
            assert groups * parts >= ahead >= parts  # so the sums of a group come before its maps
            assert tickets == 2 * groups + 2
            assert partials == (16 * groups * parts * slots if parts > 1 else 0)
            assert ahead * part * columns * width * kind.itemsize * inputs <= table.L2_FRACTION * has.cache
            assert 0 < blocks <= table.DRAWING * has.multiprocessors
    assert min(found[way] for way in found if (way, dtype) != ("pipeline", "float64")) > 50, found


# ---- The shim finds what it is there to find -------------------------------------------------------------------------

# What is changed in the source, and where it shows
PLANTED: dict[str, tuple[str, str, str]] = {
    "a map does not wait for its sums": ("            wait_for(ready(p, step));\n", "", "planes in parts"),
    "the first part of a group publishes": ("if (last) publish(", "publish(", "planes in parts"),
    "a map of the next group": (
        "task_of(p, step.group,", "task_of(p, (step.group + !step.sums) % (uint32)p.groups,", "one part a channel"
    ),
    "another part": ("task - step.group * parts;", "(task - step.group * parts) & ~1u;", "planes in parts"),
    "a task is left out": ("task -= tasks;", "task = (task - tasks) & ~1u;", "odd planes in parts"),
    "a map comes before its sums": ("ahead = (uint32)p.ahead,", "ahead = (uint32)p.ahead / 2,", "few ahead"),
    "the flags stay": ("p.tickets[p.groups + i] = 0;", "(void)i;", "one part a channel"),
    "sums of what has not arrived": ("wait_for_rounds<ROUNDS>();\n        if", "if", "planes in rounds"),
    "sums wait for a round too few": (
        "wait_for_rounds<ROUNDS>();\n        if", "wait_for_rounds<ROUNDS + 1>();\n        if", "planes in rounds"
    ),
    "a map of what has not arrived": ("wait_for_rounds<ROUNDS>();\n        }", "}", "a part in rounds"),
    "a ring that is too short": ("RING = (ROUNDS + 1) * ", "RING = (ROUNDS + 1) / 2 * ", "a part in rounds"),
    "dy lies over x in the ring": ("stage * INPUTS + input)", "stage * INPUTS)", "rows in a ring"),
    "a chunk is read before it is there": ("        wait_for_phase(full + stage, phase);\n", "", "rows in a ring"),
    "a stage is filled before it is free": ("wait_for_phase(empty + stage, phase);", "", "rows in a ring"),
    "a phase is not turned": ("            phase ^= 1;\n", "", "rows in a ring"),
    "fewer bytes are expected": ("(INPUTS * pieces * copied)", "(INPUTS * pieces * copied - 16)", "tiles in a ring"),
    "a map of rows does not wait": ("    if (ready) wait_until(ready, when);", "    (void)ready, (void)when;", "rows"),
    "slices do not wait": ("            wait_until(counts + SUMMED, units);\n", "", "rows in five shares"),
    "dy lies over x": ("behind + (slot & mask)]", "slot & mask]", "planes"),
    "values are kept a place on": ("(&kept.x(place.slot),", "(&kept.x(place.slot + 1),", "planes of an odd size"),
    "no barrier before the map": ("    __syncthreads();\n    map_of_part", "    map_of_part", "planes"),
    "another number of values": ("+ threads - 1) / threads : 0;", "+ threads) / threads : 0;", "channels-last"),
    "no barrier of the cluster": ("    wait_for_cluster();\n    const double", "    const double", "two blocks"),
    "blocks that may not have begun": ("    wait_for_cluster();  // all", "    // all", "two blocks"),
    "no barrier of the block": ("    __syncthreads();\n    if (warp == 0) {", "    if (warp == 0) {", "two blocks"),
    "the sums of another rank": ("of_blocks[rank], s, q)", "of_blocks[0], s, q)", "two blocks"),
    "sums that stay at home": ("store_in_block(lane,", "store_in_block(cluster_rank(),", "two blocks"),
    "in the place of another rank": ("of_blocks + cluster_rank(), b", "of_blocks + lane, b", "two blocks"),
    "one place for both turns": ("of_blocks + turn * MOST_BLOCKS", "of_blocks", "two blocks"),
    "places for eight blocks": ("MOST_BLOCKS = 16 };", "MOST_BLOCKS = 8 };", "sixteen blocks"),
    "pieces of another phase": ("phase ^= 1) {", "phase ^= 0) {", "two blocks"),
    "a piece is read before it is there": ("    wait_for_phase(pieces.full + k, phase);\n", "", "one block"),
    "bytes of a whole piece are expected": ("(end - begin) * sizeof(Kept)));", "bytes()));", "short pieces"),
    "a plane too few": ("plane * p.plane < end; plane", "plane * p.plane + p.plane <= end; plane", "one block"),
    "dy is not copied behind x": ("&item(k, 1, (int)(from", "&item(k, 0, (int)(from", "two blocks"),
    "a piece is filled before it is mapped": (
        "            map_piece<T, WIDTH>(pieces, channel, k, map);\n", "", "two blocks"
    ),
    "empty blocks count": ("        if (n > 0) Sums::pool(n, origin, of_b", "        Sums::pool(n, origin, of_b",
                           "blocks without values"),
    "another channel of the group": ("(int)(channel % p.columns) * plane", "0", "planes side by side"),
    "a run too short": ("item += run - plane;", "item += run - plane - 1;", "planes side by side"),
    "values of a whole group": ("values / p.columns : values", "values : values", "odd planes side by side"),
    "a channel too far": ("(start.inside && start.row < Place", "(start.row < Place", "channels-last in groups"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_of_the_fused_kernels_is_found(planted: str) -> None:
    old, new, name = PLANTED[planted]
    inputs, check = (2, kernels.assert_backward) if "dy" in planted else (1, kernels.assert_forward)
    with kernels.case_of("fused", name) as case:
        plan = fused.plan(case.shape, np.dtype("f4"), 0, inputs, case.gpu.has, 16 * (case.way == "cluster"))
        assert plan is not None
        library = shim.build((plan.kernel,), "-O0", changed=(old, new))
        found = 0
        for seed, resident in ((1, 9), (2, 1), (4, 2)):  # copies that arrive at once, and as late as they may
            order = {"has": case.gpu.has, "seed": seed, "resident": resident}
            with kernels.installed(**order):
                check(case, "float32")  # right without it
            with kernels.installed(library, **order):
                try:
                    check(case, "float32")
                except (AssertionError, RuntimeError):
                    found += 1
        assert found


SANITIZED = """
    import sys
    sys.path[:0] = [{tests!r}, {root!r}]
    from pathlib import Path
    import numpy as np
    from cuda import shim
    from arraybn.kernels.cuda import cluster, fused, table
    from arraybn.kernels.cuda import launch as launching
    table.MIN_BLOCK_BYTES = table.TASK = 512
    resident = fused._resident
    table.WARPS, table.PIECES, table.CLUSTERS = 2, 3, (2,)
    with shim.install(*map(Path, sys.argv[1:])) as installed:
        installed.device = lambda: launching.Device(3, 2**40, 2**18, 2**18)
        for fused._resident in (resident, lambda *_: None):
            fused.plan.cache_clear()
            lines = [(203, 24, 1), (203, 5, 1)] if fused._resident is resident else []
            for shape in [(9, 3, 64), (9, 3, 49), *lines, (7, 4, 196)]:
                size = int(np.prod(shape))
                x, dy = (np.random.default_rng(k).standard_normal(size).astype("f4").reshape(shape) for k in (0, 1))
                mean, m2, rstd, y = fused.forward(x, None, None, 1e-5)
                if len(sys.argv) == 3:
                    fused.backward(dy, x, mean, rstd, None)
                    cluster.forward(x, None, None, 1e-5)
                    cluster.backward(dy, x, mean, rstd, None)
    print("clean", len(set(name for name, _ in installed.launches)))
"""


@pytest.mark.parametrize("changed", [None, ("slots = task.count * columns;", "slots = (task.count + 1) * columns;")])
def test_address_sanitizer_finds_nothing_in_the_fused_kernels_but_what_is_planted(
    changed: tuple[str, str] | None,
) -> None:
    command = [str(shim.compiler()), "-print-file-name=libasan.so"]
    asan = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip("g++ has no libasan here")
    chosen = [shim.fused_kernels("forward")]
    if changed is None:
        in_clusters = tuple(kernel for kernel in shim.cluster_kernels() if kernel.name.endswith("_2"))
        chosen = [chosen[0] + shim.fused_kernels("backward"), in_clusters]
    libraries = [
        shim.build(tuple(k for k in some if k.dtype == "float32"), "-O0", "-fsanitize=address", changed=changed)
        for some in chosen
    ]
    code = textwrap.dedent(SANITIZED).format(tests=str(ROOT / "tests"), root=str(ROOT))
    environment = {**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-c", code, *map(str, libraries)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    if changed is None:
        assert (run.returncode, run.stdout.strip()) == (0, "clean 14"), run.stderr[-3000:]
    else:
        assert run.returncode != 0
        assert "AddressSanitizer: heap-buffer-overflow" in run.stderr or "out of place" in run.stderr


# ---- Compiled for GPUs -----------------------------------------------------------------------------------------------


# Those that were nearest to a spill; all of them, which takes a minute, where `every_kernel_for`.
COMPILED = [
    Kernel("backward_resident_lines", "float16", 4, fused.FILES),
    Kernel("backward_resident_lines", "float32", 4, fused.FILES),
    Kernel("forward_resident_lines", "float32", 4, fused.FILES),
    Kernel("backward_pipeline_planes", "bfloat16", 8, fused.FILES),
    Kernel("forward_resident_planes", "float64", 2, fused.FILES),
]
REGISTERS = 65536 // (3 * 256)  # of a thread, so that three blocks of 256 threads fit into a multiprocessor


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fused_kernels_compile_and_keep_to_their_registers(architecture: str, tmp_path: Path) -> None:
    everything = every_kernel_for(architecture)
    chosen = [*shim.fused_kernels("forward"), *shim.fused_kernels("backward")] if everything else COMPILED
    found = resources(compiled(launching.source(*chosen), architecture, tmp_path))
    assert set(found) == {kernel.entry for kernel in chosen}
    assert in_local_memory(found) == []
    assert max(of["registers"] for of in found.values()) <= REGISTERS


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_the_kernels_of_clusters_compile_and_keep_to_their_registers(architecture: str, tmp_path: Path) -> None:
    """All of them where `every_kernel_for`; otherwise those of one size, because the sizes have one body."""
    chosen = list(shim.cluster_kernels())
    if not every_kernel_for(architecture):
        chosen = [kernel for kernel in chosen if kernel.name.endswith("_16") and kernel.dtype != "bfloat16"]
    found = resources(compiled(launching.source(*chosen), architecture, tmp_path))
    assert set(found) == {kernel.entry for kernel in chosen}
    assert in_local_memory(found) == []
    assert max(of["registers"] for of in found.values()) <= 65536 // (32 * table.WARPS)


def test_the_fused_source_includes_nothing_and_has_no_ptx() -> None:
    for file in ("fused.cu", "cluster.cu"):
        text = launching._text(file)
        assert text.isascii()
        assert not re.search(r"^\s*#\s*include|\basm\b", text, re.MULTILINE)
        assert max(map(len, text.splitlines())) <= 120

"""What only the CUDA kernels have, run on the CPU by cuda/shim.h: parts and tickets, addresses, and the launcher."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import shim
from support import kernels
from support.kernels import CUDA_CUTS, coefficients, data, exact_of, set_sizes

import arraybn
from arraybn._arrays.namespaces import FLOATS
from arraybn.kernels import cuda
from arraybn.kernels.cuda import launch, table
from arraybn.kernels.cuda.launch import Grid

ROOT = Path(__file__).parents[1]
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[shim.Shim]:
    """Let NumPy arrays go through the CUDA kernels unless another module is asked for."""
    with kernels.case_of("cuda") as case:
        kernels.serve_all_by(cuda, monkeypatch)
        yield case.gpu


# ---- What the sweeps give --------------------------------------------------------------------------------------------


def test_e1_the_first_value_as_shift_of_all_would_cost_float16_its_digits() -> None:
    x = np.ones((2**15, 1, 1), np.float16)
    x[0] = 60000.0
    x[1:] += np.float16(2.0**-10)  # so that x − 60000 is no float32
    (exact,) = exact_of(x)
    m2 = float(((exact - exact.mean()) ** 2).sum())
    assert abs(cuda.moments(x)[1][0] / m2 - 1) < 2.0**-14
    d = (x.astype("f4") - np.float32(60000)).reshape(-1, 32)
    s, q = d.sum(axis=1).astype("f8").sum(), (d * d).sum(axis=1).astype("f8").sum()
    assert abs((q - s * s / x.size) / m2 - 1) > 2.0**-12  # the control


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_e6_the_slope_of_affine2_may_be_beyond_float32(dtype: str) -> None:
    x = data((50, 4, 1), "float32", offset=0.0)
    for power in (-60, 60):
        scaled = (x.astype("f8") * 2.0**power).astype(data((1,), dtype).dtype) if dtype != "float16" else x
        b = np.array([1e-39, 1e39, -3e-42, 7.0]) if power > 0 else np.array([2e38, -1e40, 5e36, 0.0])
        b = b if dtype != "float16" else np.array([1e-39, 3e-39, 0.0, 9.0])
        zero = np.zeros(4)
        got = cuda.affine2(scaled, scaled, zero, zero, b, zero).astype("f8")
        exact = b[:, None] * scaled.astype("f8")
        inside = (abs(exact) < 3e38) & (abs(exact) > 1e-36)
        np.testing.assert_allclose(got[inside], exact[inside], rtol=2e-7 if dtype == "float32" else 2.0**-8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_e9_the_slope_of_affine3_may_be_beyond_float32(dtype: str) -> None:
    x, zero = data((50, 4, 1), "float32", offset=0.0), np.zeros(4)
    for power in (-50, 50):
        scaled = (x.astype("f8") * 2.0**power).astype(data((1,), dtype).dtype)
        c = np.array([1e-45, 1e42, -3e-50, 7.0]) if power > 0 else np.array([2e38, -1e50, 5e45, 0.0])
        got = cuda.affine3(scaled, scaled, scaled, zero, zero, zero, c, zero).astype("f8")
        exact = c[:, None] * scaled.astype("f8")
        inside = (abs(exact) < 3e38) & (abs(exact) > 1e-36)
        assert inside.any()
        np.testing.assert_allclose(got[inside], exact[inside], rtol=2e-7 if dtype == "float32" else 2.0**-8)


def test_the_four_sweeps_of_a_batch_norm_go_through_the_kernels(gpu: shim.Shim) -> None:
    x = data((8, 4, 49), "float32")
    _, saved = arraybn.batch_norm(x, *coefficients(4)[:2].astype("f4"))
    arraybn.batch_norm_backward(x, saved)
    names = [name for name, _ in gpu.launches]
    sweeps = [f"{name}_planes_float32_1" for name in ("moments", "affine", "dots", "affine2")]
    assert names == ["vectors_float32_1", *sweeps]


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5, 3, 64), (70, 24, 1)])
def test_the_alignment_of_the_values_decides_how_many_are_loaded_at_once(
    dtype: str, shape: tuple[int, int, int], gpu: shim.Shim
) -> None:
    expected = data(shape, dtype)
    y = cuda.forward(expected, None, None, 1e-5)[3]
    itemsize = expected.itemsize
    for offset in (0, itemsize, 8, 16):
        x, out = shim.guarded(shape, expected.dtype, offset), shim.guarded(shape, expected.dtype, 16 - offset)
        x[...] = expected
        gpu.launches.clear()
        result = cuda.forward(x, None, None, 1e-5, out)[3]
        assert result is out
        shim.assert_guards(out)
        tolerance = 2.0**-7 if itemsize == 2 else 1e-6 if itemsize == 4 else 1e-14
        np.testing.assert_allclose(result.astype("f8"), y.astype("f8"), rtol=tolerance, atol=tolerance)
        width = next(w for w in table.WIDTHS[itemsize] if offset % (w * itemsize) == 0)
        assert {name.rpartition("_")[2] for name, _ in gpu.launches} == {str(width)}


def of_maps(shape: tuple[int, int, int], dtype: str, offset: int) -> list[Any]:
    """Return the results of all maps of arrays that begin `offset` bytes behind a multiple of 16."""
    arrays = [shim.guarded(shape, data((1,), dtype).dtype, offset) for _ in range(4)]
    for seed, array in enumerate(arrays):
        array[...] = data(shape, dtype, seed)
    v, u, x, out = arrays
    mean, a, b, c = coefficients(shape[1])
    found = []
    for sweep, inputs, vectors in (
        (cuda.affine, (x,), (mean, a, c)),
        (cuda.affine2, (u, x), (mean, a, b, c)),
        (cuda.affine3, (v, u, x), (mean, a, b, c, mean)),
        (lambda *given, out: cuda.evaluate(*given, out)[3], (x,), (mean, abs(a), b, c, 1e-5)),
    ):
        assert sweep(*inputs, *vectors, out=out) is out
        shim.assert_guards(out)
        found.append(out.copy())
        out[...] = np.nan
    return found


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(9, 3, 64), (9, 5, 49), (3, 1, 19), (1, 3, 8), (29, 7, 11)])
def test_maps_by_the_ring_have_the_bits_of_the_others_at_any_address(
    shape: tuple[int, int, int], dtype: str, gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets = range(0, 16, data((1,), dtype).itemsize)
    expected = [of_maps(shape, dtype, offset) for offset in offsets]
    set_sizes(monkeypatch, cuda, kernels.IN_RING)
    gpu.launches.clear()
    for offset, wanted in zip(offsets, expected, strict=True):
        for got, want in zip(of_maps(shape, dtype, offset), wanted, strict=True):
            np.testing.assert_array_equal(got, want)
    assert {name.split("_" + dtype)[0] for name, _ in gpu.launches} == {
        f"{sweep}_ring_planes" for sweep in ("affine", "affine2", "affine3", "affine_fixed")
    }


@pytest.mark.parametrize(
    "changed",
    [
        ("nullptr, 0, head);", "nullptr, 0);"),
        ("(int)threadIdx.x < head + tail)", "(int)threadIdx.x < tail)"),
        ("q.u = (const Stored*)p.u + head;", "(void)q;"),
    ],
)
def test_a_planted_error_of_maps_at_odd_addresses_is_found(
    changed: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = of_maps((9, 5, 49), "float32", 4)
    assert all(map(np.array_equal, of_maps((9, 5, 49), "float32", 4), expected))
    of_ring = tuple(kernel for kernel in shim.ring_kernels() if kernel.dtype == "float32")
    library = shim.build(of_ring, "-O0", changed=changed)
    set_sizes(monkeypatch, cuda, kernels.IN_RING)
    with kernels.installed(library):
        try:
            found = of_maps((9, 5, 49), "float32", 4)
        except (AssertionError, RuntimeError):
            return
    assert not all(map(np.array_equal, found, expected))


@pytest.mark.parametrize("shape", [(5, 3, 64), (70, 16, 1)])
def test_a_mask_is_read_at_any_address_with_gaps_and_of_any_bytes(shape: tuple[int, int, int], gpu: shim.Shim) -> None:
    x = data(shape, "float32")
    where = np.random.default_rng(1).random((shape[0], 1, shape[2])) < 0.5
    want = cuda.moments(x, where=where)
    odd, gaps = shim.guarded(where.shape, "?", 1), np.full((2 * shape[0], 3, 2 * shape[2]), True)
    odd[...] = gaps[::2, 1:2, ::2] = where
    for mask in (odd, gaps[::2, 1:2, ::2], np.where(where, np.uint8(0xF0), np.uint8(0)).view("?")):
        gpu.launches.clear()
        for got, exact in zip(cuda.moments(x, where=mask), want, strict=True):
            np.testing.assert_allclose(got, exact, rtol=1e-13)
        assert gpu.launches[0][0].endswith("_1" if mask is odd else "_4")


@pytest.mark.parametrize("name", ["planes", "lines"])
@pytest.mark.parametrize("width", [1, 8])
def test_strides_beyond_2_31_are_followed(gpu: shim.Shim, name: str, width: int) -> None:
    stride = 2**31 + 64  # values from a sample to the next: the rest of a sample is never looked at
    shape = (3, 2, 16) if name == "planes" else (3, 16, 1)
    size = 2 * (2 * stride + 64)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    line = np.frombuffer(memory, np.float16)
    where = np.arange(3)[:, None] * stride + np.arange(32 if name == "planes" else 16)
    x = data(shape, "float16")
    line[where] = x.reshape(3, -1)
    cut = cuda.cut("moments", shape, 2, 0 if width > 1 else 2, shim.H200)
    assert cut.width == width
    place = launch.NUMBERS.index("stride")
    numbers, grid = (*cut.numbers[:place], stride, *cut.numbers[place + 1 :]), cut.grid
    if name == "lines":  # one share, of three chunks of one row
        numbers, grid = (*numbers[:3], 1, numbers[4], 1, *numbers[6:]), grid._replace(blocks=1)
    mean, m2, rstd, y = cuda.forward(x, None, None, 1e-5)
    got = np.zeros((3, shape[1]))
    vectors = dict(zip(("mean", "m2", "rstd"), (gpu.pointer(vector) for vector in got), strict=True))
    for sweep in ("moments", "affine"):
        pointers = tuple(vectors.get(vector, 0) for vector in launch.POINTERS[3:-2])
        address, dtype = gpu.pointer(line), x.dtype
        kernel, _ = cuda.plan_sweep(sweep, shape, dtype.char, 2, 0 if width > 1 else 2, shim.H200)
        gpu.launch(kernel, grid, (address, 0, address, *pointers), (1e-5, 0.0, *numbers))
    np.testing.assert_allclose(got, [mean, m2, rstd], rtol=1e-6)
    np.testing.assert_allclose(line[where].reshape(shape), y, rtol=2e-3, atol=2e-3)
    del line
    memory.close()


# ---- How the work is cut ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CUDA_CUTS)
def test_the_table_has_every_cut_of_the_sweeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, sizes = CUDA_CUTS[name]
    set_sizes(monkeypatch, cuda, sizes)
    cut = cuda.cut("moments", shape, 4, 0, shim.H200)
    numbers = dict(zip(launch.NUMBERS, cut.numbers[:9], strict=False))
    assert (cut.layout in ("rows", "ring")) == (shape[2] == 1 < shape[1])
    of_map = cuda.cut("affine", shape, 4, 0, shim.H200, cuda.by_ring(False, 4))
    assert (of_map.layout == "ring_planes") == ("in a ring" in name)
    assert (numbers["groups"] > 1) == ((cut.layout == "planes" and shape[1] > 1) or "in tiles" in name)
    assert (cut.width == 1) == bool(re.search("odd|short|one|two|planes in rounds", name))
    if cut.layout != "planes":
        assert (cut.layout == "rows") == bool(re.search("before Hopper|odd, in tiles", name))
        assert (numbers["parts"] > 1) >= ("in parts" in name)
        return
    assert (numbers["parts"] > 1) == (cut.grid.tickets > 0) == ("in parts" in name)
    under_way = cut.grid.threads * (4 if cut.width > 1 else 8) // numbers["columns"]
    assert (numbers["part"] > 2 * under_way) == ("rounds" in name or name == "a long plane in parts") or "parts" in name


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_any_shape_is_cut_into_parts_that_are_all_there_and_not_too_large(itemsize: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(2000):
        shape = tuple(int(2 ** rng.uniform(0, limit)) for limit in (24, 13, 24))
        if np.prod(shape, dtype=float) > 2**44:  # 2⁴⁷ bytes, more than any GPU has
            continue
        if cuda.has_rows(shape):  # tests/test_cuda_fused.py has those
            continue
        cut = cuda.cut.__wrapped__("moments", shape, itemsize, int(rng.choice([0, itemsize, 8])), shim.H200)
        n, channels, groups, parts, items, part, plane, stride, columns = cut.numbers[:9]
        blocks, threads, partials, tickets, _ = cut.grid
        assert (n, channels) == (shape[0] * shape[2], shape[1])
        assert blocks == groups * parts < 2**31
        assert (parts - 1) * part < items <= parts * part  # no part is empty, none is missing
        assert threads in ((32, 64, 128) if parts == 1 else (32, 64, 128, 256))
        assert (partials, tickets) == ((16 * blocks, groups) if parts > 1 else (0, 0))
        assert (items * cut.width, columns) == (n, 1)
        assert stride == (plane * cut.width * channels if channels > 1 else n)
        assert part * cut.width * itemsize <= max(2 * table.PART, 2 * table.MIN_BLOCK_BYTES)
        assert cut.numbers[9:] == (0, 0, 0, *cuda.divisor(groups), *cuda.divisor(plane))


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_any_map_of_planes_by_the_ring_is_whole_and_fits(itemsize: int) -> None:
    rng, found, width = np.random.default_rng(4), 0, 16 // itemsize
    sweeps = ("affine", "affine2", "affine3", "affine_fixed")
    for _ in range(2000):
        shape = tuple(int(2 ** rng.uniform(0, limit)) for limit in (12, 13, 18))
        sweep, address = str(rng.choice(sweeps)), int(rng.choice([0, itemsize, cuda.ALIKE + itemsize]))
        has = [shim.H200, kernels.SMALL][rng.integers(2)]
        cut = cuda.cut.__wrapped__(sweep, shape, itemsize, address, has, True)
        if cut.layout != "ring_planes":
            continue
        found += 1
        n, channels, groups, parts, items, part, plane, stride, columns, stages = cut.numbers[:10]
        assert address != itemsize
        assert (n, channels, groups, columns) == (shape[0] * shape[2], shape[1], 1, 1)
        assert (plane, cut.width, stride) == (shape[2] if channels > 1 else n, width, width)
        assert plane >= width
        head, size = (16 - itemsize if address else 0) // itemsize, int(np.prod(shape))
        assert 0 <= size - head - items * width < width  # the tail
        assert (parts - 1) * part < items
        assert cut.grid == Grid(parts, 288, shared=cut.grid.shared)
        assert parts <= has.multiprocessors
        inputs = cuda.INPUTS[sweep.removesuffix("_fixed")]
        bytes_of_map = {1: 4, 2: 6, 3: 9}[inputs] * max(itemsize, 4)
        assert cut.grid.shared == 16 * part * inputs * stages + bytes_of_map * channels <= has.shared - table.ROOM
        assert 2 <= stages <= 16
        assert cut.numbers[-4:] == (*cuda.divisor(1), *cuda.divisor(plane))
    assert found > 100


def test_maps_of_planes_take_the_ring_only_where_asked_for_and_where_it_fits() -> None:
    def layout(shape: tuple[int, int, int], address: int = 0, sweep: str = "affine", **of_device: int) -> str:
        return cuda.cut.__wrapped__(sweep, shape, 4, address, shim.H200._replace(**of_device), True).layout

    assert table.RING_MAPS == ()
    assert cuda.cut("affine", (32, 64, 3136), 4, 0, shim.H200).layout == "planes"  # the ring is not measured there
    assert layout((32, 64, 3136)) == layout((32, 64, 49), cuda.ALIKE + 4) == "ring_planes"
    assert layout((32, 64, 49), 4) == layout((32, 64, 3)) == "planes"
    assert layout((1, 1, 3)) == layout((2, 14_000, 49)) == "planes"  # no item; coefficients of 224 KB
    assert layout((32, 64, 3136), capability=8) == layout((32, 64, 3136), sweep="affine2_masked") == "planes"
    assert layout((32, 64, 1)) == "ring"


def test_large_data_has_enough_blocks_for_a_large_gpu() -> None:
    images = [(32, 64, 112 * 112), (32, 256, 56 * 56), (32, 512, 28 * 28), (32, 1024, 14 * 14), (32, 2048, 49)]
    for shape in images:
        for itemsize in (2, 4):
            assert 350 <= cuda.cut("moments", shape, itemsize, 0, shim.H200).grid.blocks <= 4096, shape


def test_large_rows_keep_every_multiprocessor_of_a_large_gpu_busy() -> None:
    for rows, channels in [(401408, 64), (100352, 256), (25088, 512), (6272, 1024), (1568, 2048)]:
        for itemsize, sweep in itertools.product((2, 4, 8), cuda.INPUTS):
            cut = cuda.cut(sweep, (rows, channels, 1), itemsize, 0, shim.H200)
            assert cut.layout == "ring"
            assert cut.grid.blocks > 128
            assert cut.grid.shared > (120 * 2**10 if rows * channels > 10**7 else 2**15)  # under way


def test_a_divisor_divides() -> None:
    rng = np.random.default_rng(5)
    numbers = [1, 2, 3, 5, 7, 49, 64, 196, 2**31 - 1, 2**31, 2**40 + 1, 2**62 - 1]
    numbers += [int(2 ** rng.uniform(0, 62)) for _ in range(300)]
    for number in numbers:
        multiplier, shift = cuda.divisor(number)
        assert 0 <= multiplier < 2**64
        near = [k * number + d for k in (0, 1, 2, 2**63 // number - 1) for d in (-1, 0, 1)]
        for value in [v for v in near + [int(2 ** rng.uniform(0, 63)) for _ in range(20)] + [2**63 - 1] if v >= 0]:
            assert (value * multiplier >> 64 >> shift if multiplier else value >> shift) == value // number


# ---- The launcher ----------------------------------------------------------------------------------------------------


def test_the_parameters_are_packed_as_the_source_has_them() -> None:
    text = (ROOT / "arraybn" / "kernels" / "cuda" / "values.cuh").read_text()
    body = re.search(r"struct Parameters \{(.*?)\n\};", text, re.DOTALL)[1]
    fields = re.findall(r"^    (.+?[ *])(\w+);", body, re.MULTILINE)
    assert tuple(name for _, name in fields) == launch.POINTERS + launch.FLOATS + launch.NUMBERS
    kinds = {"double ": "d", "int64 ": "q", "Divisor ": "Qq"}
    assert "=" + "".join(kinds.get(kind, "Q") for kind, _ in fields) == re.sub(
        r"(\d+)(\w)", lambda match: int(match[1]) * match[2], launch._STRUCT.format
    )


def test_a_kernel_that_cannot_be_built_or_launched_is_named_and_leaves_a_layer_as_it_was(
    gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_sizes(monkeypatch, cuda, {"MIN_BLOCK_BYTES": 64, "PART": 64, "MAP_PART": 64})
    x = data((6, 4, 7, 7), "float32")
    layer = arraybn.BatchNorm2d(4)
    y = layer(x)
    before = {name: np.array(value) for name, value in layer.state_dict().items()}
    rooms = dict(gpu._rooms)
    assert rooms
    original = gpu.start

    def fail(*arguments: Any) -> None:
        raise ValueError("CUDA_ERROR_LAUNCH_FAILED")

    monkeypatch.setattr(gpu, "start", fail)
    with pytest.raises(RuntimeError, match="the CUDA kernel vectors_float32_1 could not be launched: CUDA_E") as e:
        layer(x)
    assert isinstance(e.value.__cause__, ValueError)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    assert not gpu._rooms  # what is in the counters is not known
    monkeypatch.setattr(gpu, "start", original)
    np.testing.assert_array_equal(arraybn.BatchNorm2d(4)(x), y)

    gpu._functions.clear()
    monkeypatch.setattr(gpu, "build", fail)
    with pytest.raises(RuntimeError, match="the CUDA kernel vectors_float32_1 could not"):
        layer(x)


def test_a_kernel_is_built_once_for_a_device(gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    build, where = gpu.build, [0]
    monkeypatch.setattr(gpu, "build", lambda kernel: (built.append(kernel.entry), build(kernel))[1])
    monkeypatch.setattr(gpu, "current", lambda: (where[0], 1))
    for device in (0, 0, 1, 1, 0):
        where[0] = device
        cuda.moments(data((6, 4, 7), "float32"))
    assert built == ["moments_planes_float32_1"] * 2


def test_each_device_and_stream_has_a_workspace_of_its_own(gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    set_sizes(monkeypatch, cuda, {"MIN_BLOCK_BYTES": 64, "PART": 64, "MAP_PART": 64})
    places = [(0, 1), (0, 7), (1, 7), (0, 2)]
    for place in places:
        monkeypatch.setattr(gpu, "current", lambda place=place: place)
        cuda.moments(data((6, 4, 7), "float32"))
    with ThreadPoolExecutor(1) as pool:  # stream 2 is another one in each thread
        pool.submit(cuda.moments, data((6, 4, 7), "float32")).result()
    assert sorted(key[:2] for key in gpu._rooms) == sorted([*places, (0, 2)])
    assert len({gpu.pointer(room.arrays[1]) for room in gpu._rooms.values()}) == 5


def test_a_workspace_grows_and_the_old_one_stays_for_captured_graphs(
    gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_sizes(monkeypatch, cuda, {"MIN_BLOCK_BYTES": 64, "PART": 64, "MAP_PART": 64})
    cuda.moments(data((6, 4, 7), "float32"))
    (first,) = gpu._rooms.values()
    x = data((3, 1500, 16), "float32")
    mean, _ = cuda.moments(x)
    (second,) = gpu._rooms.values()
    assert second.tickets >= 1500 > first.tickets
    assert any(room is first for room in gpu._outgrown)
    np.testing.assert_allclose(mean, x.astype("f8").mean(axis=(0, 2)), rtol=1e-14)


def test_n4_several_callers_on_one_gpu_get_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    set_sizes(monkeypatch, cuda, {"MIN_BLOCK_BYTES": 64, "PART": 64, "MAP_PART": 64})
    batches = [data((4, 3, 20 + k), "float32", k) for k in range(8)]
    alone = [arraybn.batch_norm(x)[0] for x in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: arraybn.batch_norm(x)[0], batches))
    for y, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(y, expected)


class OnDevice(np.ndarray):
    """A NumPy array with the attributes of a CuPy array that the launcher reads."""

    device_id = 0

    @property
    def data(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(ptr=self.ctypes.data, device_id=self.device_id)


class StandIn:
    """The part of CuPy that `launch.CuPy` calls, with the kernels of a Shim."""

    def __init__(self, gpu: shim.Shim) -> None:
        self.gpu, self.device, self.stream, self.log = gpu, 0, 1234, []
        self.cuda = SimpleNamespace(Device=self.on_device, get_current_stream=lambda: SimpleNamespace(ptr=self.stream))
        self.contexts: set[tuple[int, int]] = set()  # of threads, on devices
        self.captured = False

    def memGetInfo(self) -> None:  # noqa: N802
        self.contexts.add((threading.get_ident(), self.device))

    def streamIsCapturing(self, stream: int) -> bool:  # noqa: N802
        assert stream == self.stream > 1, "an error for the legacy default stream"
        return self.captured

    def getDevice(self) -> int:  # noqa: N802, CuPy's name
        return self.device

    @contextlib.contextmanager
    def on_device(self, number: int) -> Iterator[None]:
        before, self.device = self.device, number
        yield
        self.device = before

    def ndarray(self, shape: Any, dtype: Any) -> Any:
        return self.gpu.empty(shape, dtype).view(OnDevice)

    def deviceGetAttribute(self, attribute: int, device: int) -> int:  # noqa: N802
        return dict(zip(launch._ATTRIBUTES, shim.H200, strict=True))[attribute]

    def zeros(self, shape: Any, dtype: Any) -> Any:
        return self.gpu.zeros(shape, dtype).view(OnDevice)

    def RawKernel(self, code: str, name: str, options: tuple[str, ...]) -> Any:  # noqa: N802
        assert code.count("ENTRY(") == 2  # its definition, and one
        self.log.append((self.device, name, options))
        kernel = next(kernel for kernel in shim.all_kernels() if kernel.entry == name)
        return SimpleNamespace(kernel=SimpleNamespace(ptr=self.gpu.build(kernel)[0]))

    def launchKernel(self, function: int, *size_stream_and_arguments: int) -> None:  # noqa: N802
        bx, by, bz, tx, ty, tz, shared, stream, arguments, extra = size_stream_and_arguments
        assert (by, bz, ty, tz, shared, extra) == (1, 1, 1, 1, 0, 0)
        if (threading.get_ident(), self.device) not in self.contexts:
            raise RuntimeError("CUDA_ERROR_INVALID_CONTEXT")
        self.log.append((self.device, self.gpu.names[function], stream))
        self.gpu.start(function, Grid(bx, tx), stream, arguments)


def stand_in(gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch) -> tuple[StandIn, launch.CuPy]:
    cupy = StandIn(gpu)
    for name in ("cupy", "cupy_backends.cuda.api.driver", "cupy_backends.cuda.api.runtime"):
        monkeypatch.setitem(sys.modules, name, cupy)
    launcher = launch.CuPy()
    monkeypatch.setattr(launch, "launcher", lambda: launcher)
    return cupy, launcher


def test_cupy_is_asked_for_the_right_things(gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    set_sizes(monkeypatch, cuda, {"MIN_BLOCK_BYTES": 64, "PART": 64, "MAP_PART": 64})
    x, dy = (data((4, 3, 20), "float32", seed) for seed in (0, 1))
    vectors = coefficients(3)
    mean, m2, rstd, y = cuda.forward(x, *vectors[:2], 1e-5)
    expected = (mean, m2, rstd, y, *cuda.backward(dy, x, mean, rstd, vectors[0]))

    cupy, launcher = stand_in(gpu, monkeypatch)
    x, dy, weight, bias = (array.copy().view(OnDevice) for array in (x, dy, *vectors[:2]))
    kernels = [f"{sweep}_planes_float32_4" for sweep in ("moments", "affine", "dots", "affine2")]
    for device in (0, 0, 1):
        x.device_id = device
        cupy.log.clear()
        mean, m2, rstd, y = cuda.forward(x, weight, bias, 1e-5)
        for got, want in zip((mean, m2, rstd, y, *cuda.backward(dy, x, mean, rstd, weight)), expected, strict=True):
            assert isinstance(got, OnDevice)
            np.testing.assert_array_equal(got, want)
        assert [entry for entry in cupy.log if entry[2] == 1234] == [(device, kernel, 1234) for kernel in kernels]
        built = [entry for entry in cupy.log if entry[2] == ("-std=c++17", "-fmad=false")]
        assert [entry[:2] for entry in built] == ([(device, kernel) for kernel in kernels] if len(cupy.log) > 4 else [])
        assert cupy.device == 0
    assert len(cupy.log) == 8  # built once more, for the other device
    assert sorted(launcher._rooms) == [(0, 1234, 0), (1, 1234, 0)]


def test_the_driver_is_asked_once_whether_the_gpu_holds_a_cluster(
    gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy, _ = stand_in(gpu, monkeypatch)
    asked: list[Any] = []

    def ask(found: Any, function: Any, config: Any) -> int:
        given = config._obj
        asked.append((*given.grid, *given.block, given.shared, given.stream, given.number, function.value))
        found._obj.value = 7
        return status

    kernel = SimpleNamespace(kernel=SimpleNamespace(ptr=77), shared_size_bytes=0)
    cupy.RawKernel = lambda code, name, options: kernel
    cupy.funcSetAttribute = lambda *given: asked.append(given)
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: SimpleNamespace(cuOccupancyMaxActiveClusters=ask))
    asks = [(77, 14, 1), (16, 1, 1, 512, 1, 1, shim.H200.shared, None, 0, 77)]
    for answer, holds in ((0, True), (912, False)):  # CUDA_ERROR_INVALID_CLUSTER_SIZE
        launcher, status = launch.CuPy(), answer
        assert [launcher.holds_cluster(16) for _ in range(2)] == [holds] * 2
        assert asked == asks
        assert kernel.max_dynamic_shared_size_bytes == shim.H200.shared
        asked.clear()
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: SimpleNamespace())  # a driver of before CUDA 11.8
    assert not launch.CuPy().holds_cluster(16)
    asked.clear()
    for blocks in (8, 16):
        launcher.build(launch.Kernel("forward_cluster", "float32", 4, dynamic=True, blocks=blocks))
    assert asked == [(77, 14, 1)]  # of 16 blocks alone


def test_a_new_thread_is_given_the_context_of_each_device(gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver launches nothing without a context, and memory from CuPy's pool makes no context."""
    cupy, _ = stand_in(gpu, monkeypatch)
    x = data((4, 3, 20), "float32").view(OnDevice)

    def work() -> Any:
        for x.device_id in (0, 1, 0):
            mean, _ = cuda.moments(x)
        return mean

    expected = work()
    with ThreadPoolExecutor(1) as pool:
        np.testing.assert_array_equal(pool.submit(work).result(), expected)
    assert len(cupy.contexts) == 4  # two threads, two devices


def test_a_capture_needs_a_workspace_that_was_zeroed_before(gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the graph zeroed the counters, calls after the capture would find random counters."""
    set_sizes(monkeypatch, cuda, {"MIN_BLOCK_BYTES": 64, "PART": 64, "MAP_PART": 64})
    cupy, launcher = stand_in(gpu, monkeypatch)
    x = data((4, 3, 20), "float32").view(OnDevice)
    for stream in (1234, 0):  # the old default stream cannot be captured, and must not be asked
        cupy.stream, cupy.captured = stream, stream > 0
        if stream:
            with pytest.raises(
                RuntimeError, match=r"moments_planes_float32_4 .*: a graph is captured .* make one first"
            ):
                cuda.moments(x)
            assert not launcher._rooms
            cupy.captured = False
        expected = cuda.moments(x)
    cupy.stream, cupy.captured = 1234, True
    np.testing.assert_array_equal(cuda.moments(x), expected)


def test_importing_the_module_builds_nothing_and_needs_no_cupy() -> None:
    code = "import sys, arraybn.kernels.cuda; print('cupy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "False"


# ---- The shim finds what it is there to find -------------------------------------------------------------------------

# What is changed in the source, where it shows, and in which sweeps
PLANTED: dict[str, tuple[str, str, str, str]] = {
    "the next plane begins a value late": (
        "offset += next_plane;",
        "offset += next_plane + 1;",
        "planes of an odd size",
        "maps",
    ),
    "the last item is left out": ("int64 left = p.items -", "int64 left = p.items - 1 -", "planes", "sums"),
    "an item too many": ("left : p.part);", "left : p.part + 1);", "planes", "maps"),
    "the counter stays": ("if (ticket == parts - 1) *tickets = 0;", "", "planes in parts", "sums"),
    "a warp is left out of a sum": ("row < rows; ++row", "row < rows - (rows > 1); ++row", "planes", "sums"),
    "a part is left out": ("first = thread / slots;", "first = 1 + thread / slots;", "planes in parts", "sums"),
    "a thread misses the barrier": (
        "    s = q = 0;\n",
        "    s = q = 0;\n    if (thread == 7) __syncthreads();\n",
        "planes",
        "sums",
    ),
    "a row too far": ("row = threadIdx.x / threads;", "row = threadIdx.x / threads + 1;", "channels-last, odd", "sums"),
    "a share is left out": (
        "share = thread / SLICE;",
        "share = 1 + thread / SLICE;",
        "channels-last in parts",
        "sums",
    ),
    "the last bytes of the rows are left out": ("k < rest /", "k < 0 * rest /", "channels-last, odd", "maps"),
    "counters of shares stay": ("p.tickets[threadIdx.x] = 0;", "(void)p;", "channels-last", "sums"),
    "a store off by one value": ("store_near(out + offset[k])", "store_near(out + offset[k] + 1)", "planes", "maps"),
    # With a mask
    "the mask is read a position late": ("Word*)where)[item];", "Word*)where)[item + 1];", "planes", "affine2_masked"),
    "the mask of a chunk is read at its number": (
        "p.where + chunk * p.part;",
        "p.where + chunk;",
        "channels-last in parts",
        "moments_masked",
    ),
    # Maps of planes by the ring
    "the channel of the plane before": (
        "table[at.channel + 1 == channels ? 0 : at.channel + 1]",
        "table[at.channel]",
        "odd planes in a ring",
        "maps",
    ),
    "the channel after the last": ("== channels ? 0 :", "== channels ? at.channel :", "odd planes in a ring", "maps"),
    "a plane ends a value late": ("at.place + j == plane", "at.place + j == plane + 1", "odd planes in a ring", "maps"),
    "the last values are left out": ("- last.place : 0;", "- last.place - 1 : 0;", "one channel in a ring", "maps"),
    "the channel of the last values": ("InPlane(p, value).channel", "0", "odd planes in a ring", "maps"),
    "the next item is in the same plane": ("            ++at.channel;\n", "", "odd planes, chunks in a ring", "maps"),
    "the coefficients lie in the ring": ("memory + p.ahead *", "memory + (p.ahead - 1) *", "chunks in a ring", "maps"),
    "the mask of a row is that of the next": (
        "(where[row] != 0) << k;",
        "(where[row + 1] != 0) << k;",
        "channels-last",
        "affine2_masked",
    ),
    "the mask stays at the first rows in the sums": (
        "        if (CHOICE == MASKED) marks >>= AT_ONCE;\n    }\n#pragma",
        "    }\n#pragma",
        "many rows a thread",
        "dots_masked",
    ),
    "the mask stays at the first rows in the map": (
        "            if (CHOICE == MASKED) marks >>= AT_ONCE;\n",
        "",
        "many rows a thread",
        "affine2_masked",
    ),
    "a sum multiplies by 0": ("counts ? x - shift : 0;", "(x - shift) * (Summed)counts;", "planes", "moments_masked"),
    "a sum of products multiplies by 0": ("counts ? centre.from(x) : 0;", "centre.from(x);", "planes", "dots_nonzero"),
    "a sum of dy multiplies by 0": ("counts ? given : 0,", "given * (Summed)counts,", "planes", "dots_masked"),
    "a map multiplies by 0": (
        "fused(a, u, counts ? rest : 0)",
        "fused(a, u, rest * (Value)counts)",
        "planes",
        "affine2_masked",
    ),
    "a map of three multiplies by 0": (
        "counts ? fused(a, of_v * v, without) : without",
        "fused(a, of_v * v * (Value)counts, without)",
        "planes",
        "affine3_masked",
    ),
    "where dy is 0, x counts": ("CHOICE == ALL || of_w != 0;", "true;", "planes", "dots_nonzero"),
    "where dy is 0, x counts in rows": ("CHOICE != NONZERO || of_u != 0", "true", "channels-last", "dots_nonzero"),
    "all values are counted": (
        "if (COUNTS) taken += counts;",
        "if (COUNTS) taken += 1;",
        "planes in parts",
        "moments_masked",
    ),
    "the number of a part is lost": (
        "counts[task.part].first = n;",
        "counts[task.part].first = 1;",
        "planes in parts",
        "moments_masked",
    ),
    "the number of a share is lost": (
        "[unit.share].first = *counted;",
        "[unit.share].first = 1;",
        "channels-last in parts",
        "moments_masked",
    ),
    "the shift of a thread that has none": (
        "(taken ? threadIdx.x : MOST_THREADS,",
        "(threadIdx.x,",
        "planes in parts",
        "shifts",
    ),
    "the shift of rows that have none": ("if (taken_by[row]) giver = row;", "", "channels-last", "shifts"),
    "the origin of a part that has none": (
        "partials + all.first * slots + slot",
        "partials + slot",
        "planes in parts",
        "shifts",
    ),
    "the origin of a share that has none": (
        "load_shared(partials + all.first * slots)",
        "load_shared(partials)",
        "channels-last in parts",
        "shifts",
    ),
}
CHECKS = {
    "sums": (kernels.assert_sums, ("moments", "dots")),
    "maps": (kernels.assert_maps, ("affine", "affine2", "affine3")),
    "shifts": (kernels.assert_far_from_zero, ("moments_masked",)),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_of_the_sweeps_is_found(planted: str) -> None:
    old, new, name, sweeps = PLANTED[planted]
    check, names = CHECKS.get(sweeps, (kernels.assert_masked, (sweeps,)))
    with kernels.case_of("cuda" if name in CUDA_CUTS else "fused", name) as case:
        given = case.shape, "f", 4, 0, case.gpu.has, cuda.by_ring(False, 4)
        changed = tuple(cuda.plan_sweep(sweep, *given)[0] for sweep in names)
        library = shim.build(changed, changed=(old, new))
        check(case, "float32")  # right without it
        with (
            kernels.installed(library, *kernels.libraries(), has=case.gpu.has),
            pytest.raises((AssertionError, RuntimeError)),
        ):
            check(case, "float32")


WAITS: dict[str, tuple[str, str] | None] = {
    "nothing": None,
    "a chunk is read before it is there": ("        wait_for_phase(full + stage, phase);\n", ""),
    "a stage is filled before it is free": ("wait_for_phase(empty + stage, phase);", ""),
    "a phase is not turned": ("            phase ^= 1;\n", ""),
    "fewer bytes are expected": ("(INPUTS * pieces * copied)", "(INPUTS * pieces * copied - 16)"),
    "inputs lie over each other": ("stage * INPUTS + input)", "stage * INPUTS)"),
    "a thread's next item is another one": ("step(given, (int64)row.rows * WIDTH)", "step(given, row.rows)"),
}


@pytest.mark.parametrize("planted", WAITS)
def test_a_planted_error_of_the_ring_of_planes_is_found(planted: str) -> None:
    kernels_of_maps = tuple(kernel for kernel in shim.ring_kernels() if kernel.dtype == "float32")
    library = shim.build(kernels_of_maps, "-O0", changed=WAITS[planted])
    found = 0
    with kernels.case_of("fused", "odd planes, chunks in a ring") as case:
        for seed, resident in ((1, 9), (2, 1), (4, 2)):  # copies that arrive at once, and as late as they may
            with kernels.installed(library, *kernels.libraries(), has=case.gpu.has, seed=seed, resident=resident):
                try:
                    kernels.assert_maps(case, "float32")
                except (AssertionError, RuntimeError):
                    found += 1
    assert (found > 0) == (planted != "nothing")


SANITIZED = """
    import sys
    sys.path[:0] = [{tests!r}, {root!r}]
    from pathlib import Path
    import numpy as np
    from cuda import shim
    from arraybn.kernels import cuda
    from arraybn.kernels.cuda import table
    from arraybn.reference import Moments
    table.MIN_BLOCK_BYTES = table.PART = table.MAP_PART = 512
    with shim.install(Path(sys.argv[1])):
        for dtype in (np.float32, np.float16):
            for shape in [(9, 3, 64), (9, 3, 49), (7, 4, 196)]:
                size = int(np.prod(shape))
                x, dy = (np.random.default_rng(k).standard_normal(size).astype(dtype).reshape(shape) for k in (0, 1))
                assert x.nbytes > 1024  # less, NumPy keeps to itself when it is freed
                mean, m2, rstd, y = cuda.forward(x, None, None, 1e-5)
                cuda.backward(dy, x, mean, rstd, None)
                where = np.random.default_rng(2).random((shape[0], 1, shape[2])) < 0.5
                cuda.affine3(dy, dy, x, *[mean] * 5, where=where), cuda.moments(x, where)
                cuda.masked_backward(dy, x, Moments(9, mean, m2), rstd, None, None, where)
    print("clean")
"""


@pytest.mark.parametrize("changed", [None, ("left < p.part ? left :", "left < p.part ? left + 1 :")])
def test_address_sanitizer_finds_nothing_in_the_sweeps_but_what_is_planted(changed: tuple[str, str] | None) -> None:
    command = [str(shim.compiler()), "-print-file-name=libasan.so"]
    asan = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip("g++ has no libasan here")
    kernels = tuple(kernel for kernel in shim.all_kernels() if kernel.dtype in ("float32", "float16"))
    library = shim.build(kernels, "-O0", "-fsanitize=address", changed=changed)
    code = textwrap.dedent(SANITIZED).format(tests=str(ROOT / "tests"), root=str(ROOT))
    environment = {**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-c", code, str(library)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    if changed is None:
        assert (run.returncode, run.stdout.strip()) == (0, "clean"), run.stderr[-3000:]
    else:  # the planted error: a row, or an item, too many
        assert "ERROR: AddressSanitizer: heap-buffer-overflow" in run.stderr
        assert run.returncode != 0

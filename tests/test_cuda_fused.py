"""Forward and backward in one launch, run on the CPU by cuda/shim.h: every way, dtype and order of blocks."""

from __future__ import annotations

import itertools
import mmap
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import test_accuracy
import test_cuda_kernels
from cuda import shim
from support.compiling import ARCHITECTURES, compiled, in_local_memory, resources
from test_cuda_kernels import NO_RESERVE, SUM, assert_map, assert_sum, coefficients, data, exact_of

import arraybn
from arraybn import reference
from arraybn._arrays.namespaces import FLOATS
from arraybn.kernels import cuda, select
from arraybn.kernels.cuda import fused
from arraybn.kernels.cuda import launch as launching
from arraybn.kernels.cuda.launch import Device, Grid, Kernel

ROOT = Path(__file__).parents[1]
H200 = shim.H200
NARROW = H200._replace(shared_in_all=0)  # never room for a second block
SMALL = Device(multiprocessors=2, cache=2**40, shared=72 * 2**10, shared_in_all=0)
LONELY = SMALL._replace(multiprocessors=1)

# The way; (N, C, S); the GPU; and the sizes that make the cut what the name says, where the real ones need larger data
CASES: dict[str, tuple[str, tuple[int, int, int], Device, dict[str, int]]] = {
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
    "planes in parts": ("pipeline", (7, 3, 64), SMALL, {"LEAST": 256, "TASK": 256}),
    "odd planes in parts": ("pipeline", (7, 3, 49), SMALL, {"LEAST": 128, "TASK": 128}),
    "a long plane in parts": ("pipeline", (1, 2, 2052), SMALL, {"LEAST": 1024, "TASK": 1024, "THREADS": 32}),
    "a part in rounds": ("pipeline", (3, 2, 1024), SMALL, {"LEAST": 2**20, "THREADS": 32}),
    "lines in rounds": ("pipeline", (700, 8, 1), SMALL, {"LEAST": 2**20, "THREADS": 32}),
    "one channel in parts": ("pipeline", (64, 1, 9), SMALL, {"LEAST": 256, "TASK": 256}),
    "one part a channel": ("pipeline", (4, 19, 16), SMALL, {"LEAST": 2**20}),
    "few ahead": ("pipeline", (7, 5, 64), LONELY, {"LEAST": 512, "TASK": 512, "BLOCKS": 1}),
    "all ahead": ("pipeline", (7, 2, 64), SMALL, {"LEAST": 512, "TASK": 512, "BLOCKS": 64}),
    "lines in parts": ("pipeline", (203, 24, 1), SMALL, {"LEAST": 1024, "TASK": 1024}),
    "lines in short parts": ("pipeline", (11, 16, 1), SMALL, {"LEAST": 128, "TASK": 128}),
    "odd lines in parts": ("pipeline", (203, 5, 1), SMALL, {"LEAST": 256, "TASK": 256}),
    "groups of lines in parts": ("pipeline", (60, 136, 1), LONELY, {"LEAST": 512, "TASK": 512, "BLOCKS": 2}),
    "neither": ("split", (40, 3, 64), SMALL._replace(cache=0), {}),
}


@pytest.fixture(scope="module")
def libraries() -> list[Path]:
    return shim.libraries()


def installed(libraries: list[Path], **options: Any) -> Any:
    """Within it, NumPy arrays go through the fused kernels."""
    return mock.patch.object(launching, "launcher", mock.Mock(return_value=shim.Shim(*libraries, **options)))


@pytest.fixture(autouse=True)
def gpu(libraries: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[shim.Shim]:
    def by_default(x: Any, kernels: Any = None) -> Any:
        return select(x, fused if kernels is None else kernels)

    monkeypatch.setattr("arraybn.functional.select", by_default)
    monkeypatch.setattr("arraybn.statistics.select", by_default)
    with installed(libraries):
        yield launching.launcher()
    fused.plan.cache_clear()


def set_case(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[int, int, int], Device]:
    """The shape and the GPU of a case; its sizes are set."""
    way, shape, has, sizes = CASES[name]
    set_sizes(monkeypatch, sizes, way)
    return shape, has


def set_sizes(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], way: str) -> None:
    """Set sizes of the module, and let nothing be resident where the way is another."""
    for size, value in sizes.items():
        monkeypatch.setattr(fused, size, value)
    if way != "resident":
        monkeypatch.setattr(fused, "_resident", lambda *_: None)
    fused.plan.cache_clear()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(N, C, S), which goes the way that the table says."""
    shape, gpu.has = set_case(request.param, monkeypatch)
    return shape


def both(shape: tuple[int, int, int], dtype: str, kernels: Any = fused) -> list[Any]:
    """mean, m2, rstd, y, dx, dweight and dbias."""
    dy, x = data(shape, dtype, 1, 0.5), data(shape, dtype)
    weight, bias = coefficients(shape[1])[:2]
    mean, m2, rstd, y = kernels.forward(x, weight, bias, 1e-5)
    return [mean, m2, rstd, y, *kernels.backward(dy, x, mean, rstd, weight)]


def assert_forward(shape: tuple[int, int, int], dtype: str) -> None:
    """A forward of such data is exact to rounding."""
    n, eps, (weight, bias) = shape[0] * shape[2], 1e-5, coefficients(shape[1])[:2]
    x = data(shape, dtype)
    (exact_x,) = exact_of(x)
    mean, m2, rstd, y = fused.forward(x, weight, bias, eps)
    exact_mean = exact_x.sum(axis=(0, 2)) / n
    assert np.all(np.abs(mean - exact_mean) <= SUM[dtype] * 4 + 2.0**-50)
    exact_m2 = ((exact_x - exact_mean[:, None]) ** 2).sum(axis=(0, 2))
    assert np.all(np.abs(m2 - exact_m2) <= 8 * SUM[dtype] * exact_m2)
    assert n == 1 or np.all(np.abs(1.001 * m2 - exact_m2) > 8 * SUM[dtype] * exact_m2)  # the control
    np.testing.assert_array_equal(rstd, reference.rstd(m2 / n, eps))
    d = exact_x - mean[:, None]
    a, c = (vector[:, None] for vector in reference.normalize(rstd, weight, bias))
    assert_map(y, a * d + c, abs(a * d) + abs(c), dtype)


def assert_backward(shape: tuple[int, int, int], dtype: str) -> None:
    """A backward of such data is exact to rounding."""
    n, weight = shape[0] * shape[2], coefficients(shape[1])[0]
    dy, x = data(shape, dtype, 1, 0.5), data(shape, dtype)
    exact_dy, exact_x = exact_of(dy, x)
    mean = x.astype("f8").mean(axis=(0, 2))
    rstd = reference.rstd(x.astype("f8").var(axis=(0, 2)), 1e-5)
    dx, dweight, dbias = fused.backward(dy, x, mean, rstd, weight)
    d = exact_x - mean[:, None]
    assert_sum(dbias, exact_dy, dtype)
    a, b, c = (vector[:, None] for vector in reference.input_gradient(dweight, dbias, n, rstd, weight))
    if n > 1:
        assert_sum(dweight / rstd, exact_dy * d, dtype)
        assert_map(dx, a * exact_dy + b * d + c, abs(a * exact_dy) + abs(b * d) + abs(c), dtype)
    else:
        assert np.all(abs(dx.astype("f8")) <= 2.0**-20 * abs(a))


# ---- What they give --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_each_way_is_exact_to_rounding(case: Any, dtype: str, gpu: shim.Shim) -> None:
    assert_forward(case, dtype)
    assert_backward(case, dtype)
    names = [name for name, _ in gpu.launches]
    way = next(way for way, shape, has, _ in CASES.values() if (shape, has) == (case, gpu.has))
    layout = "lines" if case[2] == 1 < case[1] else "planes"
    sweeps = {"forward": ["moments", "moments", "affine"][dtype != "float64" :], "backward": ["dots", "affine2"]}
    expected = []
    for direction, names_of_it in sweeps.items():
        split = way == "split" or (way == "pipeline" and dtype == "float64")
        expected += names_of_it if split else [f"{direction}_{way}"]
    assert [re.sub(f"_{layout}_{dtype}_.*", "", name) for name in names] == expected


@pytest.mark.parametrize("dtype", FLOATS)
def test_it_is_the_split_sweeps_to_rounding(case: Any, dtype: str) -> None:
    for got, want in zip(both(case, dtype), both(case, dtype, cuda), strict=True):
        last = (
            2.0**-7
            if dtype == "bfloat16"
            else 2.0**-10
            if dtype == "float16"
            else 1e-6
            if dtype == "float32"
            else 1e-14
        )
        tolerance = last if got.ndim == 3 else 4 * SUM[dtype]
        scale = max(1.0, float(abs(want.astype("f8")).max()))
        np.testing.assert_allclose(got.astype("f8"), want.astype("f8"), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_bits_are_the_same_each_time_whichever_blocks_run_first(
    case: Any, dtype: str, gpu: shim.Shim, libraries: list[Path]
) -> None:
    results = []
    for seed, resident in [(0, 3), (1, 1), (2, 9), (3, 2)]:
        with installed(libraries, has=gpu.has, seed=seed, resident=resident):
            runs = [both(case, dtype) for _ in range(1 + (seed == 0))]
            results += [[array.tobytes() for array in run] for run in runs]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_result_in_place_has_the_same_bits(case: Any, dtype: str) -> None:
    dy, x = data(case, dtype, 1, 0.5), data(case, dtype)
    mean, _, rstd, y = fused.forward(x, None, None, 1e-5)
    dx = fused.backward(dy, x, mean, rstd, None)[0]
    for target in ("dy", "x"):
        inputs = {"dy": dy.copy(), "x": x.copy()}
        result = fused.backward(**inputs, mean=mean, rstd=rstd, weight=None, out=inputs[target])[0]
        assert result is inputs[target]
        np.testing.assert_array_equal(result, dx)
    target = x.copy()
    assert fused.forward(target, None, None, 1e-5, target)[3] is target
    np.testing.assert_array_equal(target, y)


@pytest.mark.parametrize("dtype", FLOATS)
def test_outliers_among_the_first_values_cost_no_digit_that_is_promised(case: Any, dtype: str) -> None:
    x = data(case, dtype, offset=0.0)
    x[:1, :, :8] = 1e4  # the shift of some threads and blocks
    (exact,) = exact_of(x)
    exact_m2 = ((exact - (exact.sum(axis=(0, 2)) / (case[0] * case[2]))[:, None]) ** 2).sum(axis=(0, 2))
    error = np.abs(fused.forward(x, None, None, 1e-5)[1] - exact_m2)
    assert np.all(error <= 8 * SUM[dtype] * exact_m2)
    if dtype == "float64":
        assert np.all(error <= 4 * np.spacing(exact_m2.astype(np.float64)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_n3_constant_channels_give_exactly_bias(case: Any, dtype: str) -> None:
    x = np.broadcast_to(np.linspace(-3.3, 1e4, case[1])[:, None], case).astype(data((1,), dtype).dtype)
    bias = coefficients(case[1])[0]
    mean, m2, _, y = fused.forward(x, None, bias, 1e-5)
    np.testing.assert_array_equal(mean, x[0, :, 0].astype("f8"))
    np.testing.assert_array_equal(m2, 0)
    rounded = bias if dtype == "float64" else bias.astype("f4")
    np.testing.assert_array_equal(y, np.broadcast_to(rounded.astype(x.dtype)[:, None], case))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_and_inf_stay_in_their_channel(case: Any, dtype: str) -> None:
    x = data(case, dtype)
    clean = fused.forward(x, None, None, 1e-5)
    for place, value in itertools.product((0, -1), (np.nan, np.inf, -np.inf)):
        spoiled = x.copy()
        spoiled[place, 0, place] = value
        mean, m2, _, y = fused.forward(spoiled, None, None, 1e-5)
        np.testing.assert_array_equal(mean[0], value)
        assert np.isnan(m2[0])
        assert np.all(np.isnan(y[:, 0]))
        np.testing.assert_array_equal(mean[1:], clean[0][1:])
        np.testing.assert_array_equal(y[:, 1:], clean[3][:, 1:])


# ---- N1 and N2, as for the other kernels, by each way ----------------------------------------------------------------


@pytest.fixture(params=["resident", "pipeline"])
def way(request: pytest.FixtureRequest, gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "pipeline":
        gpu.has = SMALL
        set_sizes(monkeypatch, {"LEAST": 1024, "TASK": 1024}, request.param)
    yield
    assert any(f"_{request.param}_" in name for name, _ in gpu.launches)


@pytest.mark.usefixtures("way")
class TestPromises:
    """Of the library, through `batch_norm`."""

    @pytest.mark.parametrize(("shape", "scale"), test_accuracy.CASES)
    def test_n1_n2_float32(self, shape: str, scale: str) -> None:
        test_accuracy.test_n1_float32_statistics_are_within_one_ulp(shape, scale)
        test_accuracy.test_n2_float32_y_is_within_4_ulp_and_dx_within_12(shape, scale)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("shape", ["small", "tall", "images", "two values"])
    def test_n2_half_precision(self, dtype: str, shape: str) -> None:
        test_accuracy.test_n2_half_precision_is_within_an_ulp_more_than_rounding(dtype, shape)

    @pytest.mark.parametrize("scale", ["small std", "large std"])
    @pytest.mark.parametrize("shape", [(16, 3, 64), (16, 3, 512), (16, 3, 49), (150, 16, 1)])
    def test_n2_bfloat16_keeps_its_range(self, shape: tuple[int, int, int], scale: str) -> None:
        test_cuda_kernels.test_n2_bfloat16_keeps_its_range(shape, scale)


@pytest.mark.parametrize(("shape", "scale"), test_accuracy.CASES)
def test_n2_float64(shape: str, scale: str, gpu: shim.Shim) -> None:
    test_accuracy.test_n2_float64_is_within_16_and_32_ulp_of_the_channel(shape, scale)
    names = {name for name, _ in gpu.launches if not name.startswith("vectors")}  # copies of weight and bias
    assert names
    assert all("_resident_" in name for name in names)


@pytest.mark.parametrize("axis", [1, -1])
def test_a_layer_trains_and_evaluates_as_with_the_reference(axis: int, gpu: shim.Shim) -> None:
    shape = (6, 4, 7, 7) if axis == 1 else (6, 7, 7, 4)
    results = []
    for kernels in (fused, reference):
        with pytest.MonkeyPatch.context() as patch:
            for room in ("functional", "statistics"):
                patch.setattr(f"arraybn.{room}.select", lambda x, _=None, kernels=kernels: kernels)
            layer = arraybn.BatchNorm2d(4, channel_axis=axis)
            y = layer(data(shape, "float32", 0))
            dx = layer.backward(data(shape, "float32", 9, 0.5))
            layer.eval()
            z = layer(data(shape, "float32", 5))
            results.append([y, dx, z, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    names = [re.split("_(planes|lines|float)", name)[0] for name, _ in gpu.launches]
    assert names == ["vectors", "forward_resident", "running", "backward_resident", "vectors", "affine"]


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["planes", "channels-last", "planes in parts", "lines in parts"])
def test_any_alignment_of_the_values_will_do(
    dtype: str, name: str, gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, gpu.has = set_case(name, monkeypatch)
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
        width = next(w for w in cuda.WIDTHS[itemsize] if offset % (w * itemsize) == 0)
        if name == "lines in parts" and width > 1 and itemsize < 8:
            width = fused.SIDE // itemsize
        assert {name.rpartition("_")[2] for name, _ in gpu.launches} == {str(width)}


def test_arrays_that_a_kernel_cannot_take_as_they_are_give_the_same_bits() -> None:
    x = data((6, 4, 40), "float32")
    mean, _, rstd, y = fused.forward(x, None, None, 1e-5)
    strided = np.repeat(x, 2, axis=2)[:, :, ::2]
    np.testing.assert_array_equal(fused.forward(strided, None, None, 1e-5)[3], y)
    want = fused.backward(x, x, mean, rstd, None)
    for got, expected in zip(fused.backward(strided, strided, mean, rstd, None), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_nothing_in_gives_nothing_out(gpu: shim.Shim) -> None:
    for shape in [(0, 3, 5), (4, 3, 0), (0, 3, 1)]:
        x = np.empty(shape, np.float32)
        mean, m2, _, y = fused.forward(x, None, None, 1e-5)
        dx, dweight, dbias = fused.backward(x, x, mean, mean, None)
        assert y.shape == dx.shape == x.shape
        for vector in (mean, m2, dweight, dbias):
            np.testing.assert_array_equal(vector, np.zeros(3))
    assert not gpu.launches


@pytest.mark.parametrize("way", ["resident", "pipeline"])
@pytest.mark.parametrize("shape", [(3, 2, 16), (3, 16, 1)])
def test_places_beyond_2_31_are_reached(
    way: str, shape: tuple[int, int, int], gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_sizes(monkeypatch, {}, way)
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
    gpu: shim.Shim, libraries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = data((4, 3, 64), "float32")
    expected = both((4, 3, 64), "float32")
    attributes = {16: H200.multiprocessors, 38: H200.cache, 97: H200.shared, 81: H200.shared_in_all}  # cudaDeviceAttr
    kernels, launched = [], []

    def raw_kernel(code: str, name: str, options: tuple[str, ...]) -> Any:
        assert code.count("DEVICE void resident(") == 1
        kernel = next(k for k in (*shim.fused_kernels("forward"), *shim.fused_kernels("backward")) if k.entry == name)
        kernels.append(SimpleNamespace(shared_size_bytes=4096, kernel=SimpleNamespace(ptr=gpu.build(kernel)[0])))
        return kernels[-1]

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
    weight, bias = coefficients(3)[:2]
    y = fused.forward(x, weight, bias, 1e-5)[3]
    assert launcher.device() == H200
    np.testing.assert_array_equal(y, expected[3])
    assert launched == [("forward_resident_planes_float32_4", x.nbytes // 3)]
    assert kernels[0].max_dynamic_shared_size_bytes == H200.shared - 4096
    assert kernels[0].preferred_shared_memory_carveout == 100


# ---- The choice ------------------------------------------------------------------------------------------------------

# On an H200, at 32 images: what becomes of a forward and a backward, channels-first and channels-last. KiB of a channel
# (or of 32 bytes of each row) decide whether a block keeps it: it has 227, of which the sums take 5.
RESNET = {
    # channels, side, bytes of a value: channels-first forward, backward; channels-last forward, backward
    (64, 112, 4): "pipeline pipeline pipeline split",  # 1568 KiB; channels-last 32 bytes of all rows are 12 MiB, or 25
    (256, 56, 4): "pipeline pipeline pipeline pipeline",  # 392 KiB
    (512, 28, 4): "resident resident pipeline pipeline",  # 98 KiB and 196; channels-last 784
    (1024, 14, 4): "resident resident resident pipeline",  # 24.5 and 49 KiB; channels-last 196 and 392
    (2048, 7, 4): "resident resident resident resident",  # 6 and 12 KiB; channels-last 49 and 98
    (64, 112, 2): "pipeline pipeline pipeline split",  # 784 KiB
    (256, 56, 2): "resident pipeline pipeline pipeline",  # 196 and 392 KiB
    (512, 28, 2): "resident resident pipeline pipeline",  # 49 and 98 KiB; channels-last 784
    (1024, 14, 2): "resident resident pipeline pipeline",  # channels-last 196 KiB, but only 64 blocks for 132
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


def test_small_blocks_share_a_multiprocessor_and_large_shapes_fill_the_gpu() -> None:
    for channels, side, itemsize in RESNET:
        for inputs in (1, 2):
            plan = fused.plan((32, channels, side * side), np.dtype(f"f{itemsize}"), 0, inputs, H200)
            assert plan is not None
            if "resident" in plan.kernel.name:
                together = H200.shared_in_all // (plan.grid.shared + fused.ROOM)
                assert together >= (2 if plan.grid.shared < 100 * 2**10 else 1)
                assert min(together, 2048 // plan.grid.threads) * plan.grid.threads >= 256
            else:
                assert plan.grid.blocks == fused.BLOCKS * 132
                assert H200.shared_in_all // (plan.grid.shared + fused.ROOM) >= fused.BLOCKS


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_shape_has_a_plan_that_is_whole_and_cannot_wait_for_ever(dtype: str) -> None:
    rng = np.random.default_rng(3)
    kind, found = data((1,), dtype).dtype, {"resident": 0, "pipeline": 0, "split": 0}
    for _ in range(1500):
        shape = tuple(int(2 ** rng.uniform(0, high)) for high in (14, 13, 16))
        shape = shape if rng.random() < 0.6 else (shape[0] * shape[2], shape[1], 1)
        inputs, has = int(rng.integers(1, 3)), [H200, SMALL, LONELY, NARROW][rng.integers(4)]
        address = int(rng.choice([0, kind.itemsize, 8]))
        plan = fused.plan.__wrapped__(shape, kind, address, inputs, has)
        if plan is None:
            found["split"] += 1
            continue
        n, channels, groups, parts, items, part, plane, stride, columns, ahead = plan.numbers[:10]
        blocks, threads, partials, tickets, shared = plan.grid
        width, lines = plan.kernel.width, plan.kernel.name.endswith("lines")
        slots = columns * width if lines else 1
        assert (n, channels) == (shape[0] * shape[2], shape[1])
        assert groups * slots >= channels > (groups - 1) * slots
        assert items * (1 if lines else width) == n
        assert (parts - 1) * part < items <= parts * part
        assert threads in (32, 64, 128, 256)
        assert threads % slots == 0
        assert stride == (channels if lines else plane * width * (channels if channels > 1 else 1))
        found[plan.kernel.name.split("_")[1]] += 1
        if "resident" in plan.kernel.name:
            assert (blocks, parts, tickets, partials) == (groups, 1, 0, 0)
            assert shared == inputs * items * columns * width * kind.itemsize <= has.shared - fused.ROOM
        else:
            rounds = {1: 4, 2: 2}[inputs] * (4 if width > 1 else 8)  # as the source has them
            assert shared == rounds * threads * width * kind.itemsize * inputs <= has.shared - fused.ROOM
            assert shared & shared - 1 == 0
            assert groups * parts >= ahead >= parts  # so the sums of a group come before its maps
            assert tickets == 2 * groups + 2
            assert partials == (16 * groups * parts * slots if parts > 1 else 0)
            assert ahead * part * columns * width * kind.itemsize * inputs <= fused.KEPT * has.cache
            assert 0 < blocks <= fused.BLOCKS * has.multiprocessors
    assert min(found[way] for way in found if (way, dtype) != ("pipeline", "float64")) > 50, found


# ---- The shim finds what it is there to find -------------------------------------------------------------------------

# What is changed in the source, and where it shows
PLANTED: dict[str, tuple[str, str, str]] = {
    "a map does not wait for its sums": ("            wait_for(ready(p, step));\n", "", "planes in parts"),
    "the first part of a group publishes": ("if (last) publish(", "publish(", "planes in parts"),
    "a map of the next group": (
        "task_of(p, step.group,", "task_of(p, (step.group + !step.sums) % (uint32)p.groups,", "one part a channel"
    ),
    "another part": ("task - step.group * parts;", "(task - step.group * parts) & ~1u;", "lines in parts"),
    "a task is left out": ("task -= tasks;", "task = (task - tasks) & ~1u;", "odd lines in parts"),
    "a map comes before its sums": ("ahead = (uint32)p.ahead,", "ahead = (uint32)p.ahead / 2,", "few ahead"),
    "the flags stay": ("p.tickets[p.groups + i] = 0;", "(void)i;", "one part a channel"),
    "sums of what has not arrived": ("wait_for_rounds<ROUNDS>();\n        if", "if", "planes in rounds"),
    "sums wait for a round too few": (
        "wait_for_rounds<ROUNDS>();\n        if", "wait_for_rounds<ROUNDS + 1>();\n        if", "planes in rounds"
    ),
    "a map of what has not arrived": ("wait_for_rounds<ROUNDS>();\n        }", "}", "a part in rounds"),
    "a ring that is too short": ("RING = (ROUNDS + 1) * ", "RING = (ROUNDS + 1) / 2 * ", "lines in rounds"),
    "dy lies over x": ("behind + (slot & mask)]", "slot & mask]", "planes"),
    "values are kept a place on": ("(&kept.x(place.slot),", "(&kept.x(place.slot + 1),", "planes of an odd size"),
    "no barrier before the map": ("    __syncthreads();\n    map_of_part", "    map_of_part", "planes"),
    "another number of values": ("+ threads - 1) / threads : 0;", "+ threads) / threads : 0;", "channels-last"),
    "a channel too far": ("(start.inside && start.row < Place", "(start.row < Place", "channels-last in groups"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_found(
    planted: str, libraries: list[Path], gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, name = PLANTED[planted]
    shape, gpu.has = set_case(name, monkeypatch)
    inputs, check = (2, assert_backward) if "dy" in planted else (1, assert_forward)
    plan = fused.plan(shape, np.dtype("f4"), 0, inputs, gpu.has)
    assert plan is not None
    library = shim.build((plan.kernel,), "-O0", changed=(old, new))
    found = 0
    for seed, resident in ((1, 9), (2, 1)):  # copies that arrive at once, and as late as they may
        with installed(libraries, has=gpu.has, seed=seed, resident=resident):
            check(shape, "float32")  # right without it
        with installed([library], has=gpu.has, seed=seed, resident=resident):
            try:
                check(shape, "float32")
            except (AssertionError, RuntimeError):
                found += 1
    assert found


SANITIZED = """
    import sys
    sys.path[:0] = [{tests!r}, {root!r}]
    from pathlib import Path
    import numpy as np
    from cuda import shim
    from arraybn.kernels.cuda import fused
    from arraybn.kernels.cuda import launch as launching
    fused.LEAST = fused.TASK = 512
    resident = fused._resident
    with shim.install(Path(sys.argv[1])) as installed:
        installed.device = lambda: launching.Device(3, 2**40, 2**18, 2**18)
        for fused._resident in (resident, lambda *_: None):
            fused.plan.cache_clear()
            for shape in [(9, 3, 64), (9, 3, 49), (203, 24, 1), (203, 5, 1), (7, 4, 196)]:
                size = int(np.prod(shape))
                x, dy = (np.random.default_rng(k).standard_normal(size).astype("f4").reshape(shape) for k in (0, 1))
                mean, m2, rstd, y = fused.forward(x, None, None, 1e-5)
                if len(sys.argv) == 2:
                    fused.backward(dy, x, mean, rstd, None)
    print("clean", len(set(name for name, _ in installed.launches)))
"""


@pytest.mark.parametrize("changed", [None, ("slots = task.count * columns;", "slots = (task.count + 1) * columns;")])
def test_address_sanitizer_finds_nothing_but_what_is_planted(changed: tuple[str, str] | None) -> None:
    command = [str(shim.compiler()), "-print-file-name=libasan.so"]
    asan = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip("g++ has no libasan here")
    kernels = shim.fused_kernels("forward") + (shim.fused_kernels("backward") if changed is None else ())
    kernels = tuple(kernel for kernel in kernels if kernel.dtype == "float32")
    library = shim.build(kernels, "-O0", "-fsanitize=address", changed=changed)
    code = textwrap.dedent(SANITIZED).format(tests=str(ROOT / "tests"), root=str(ROOT))
    environment = {**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-c", code, str(library), *(["forward"] if changed else [])]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    if changed is None:
        assert (run.returncode, run.stdout.strip()) == (0, "clean 16"), run.stderr[-3000:]
    else:
        assert run.returncode != 0
        assert "AddressSanitizer: heap-buffer-overflow" in run.stderr or "out of place" in run.stderr


# ---- Compiled for GPUs -----------------------------------------------------------------------------------------------


# Those that were nearest to a spill; all of them, which takes a minute, where ARRAYBN_COMPILE=all.
COMPILED = [
    Kernel("backward_pipeline_lines", "float16", 4, fused.FILES),
    Kernel("backward_pipeline_lines", "float32", 2, fused.FILES),
    Kernel("backward_pipeline_planes", "bfloat16", 8, fused.FILES),
    Kernel("forward_resident_planes", "float64", 2, fused.FILES),
]
REGISTERS = 65536 // (3 * 256)  # of a thread, so that three blocks of 256 threads fit into a multiprocessor


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_compile_and_keep_to_their_registers(architecture: str, tmp_path: Path) -> None:
    everything = os.environ.get("ARRAYBN_COMPILE") == "all"
    kernels = [*shim.fused_kernels("forward"), *shim.fused_kernels("backward")] if everything else COMPILED
    found = resources(compiled(launching.source(*kernels), architecture, tmp_path))
    assert set(found) == {kernel.entry for kernel in kernels}
    assert in_local_memory(found) == []
    assert max(of["registers"] for of in found.values()) <= REGISTERS


def test_the_source_includes_nothing_and_keeps_ptx_in_one_place() -> None:
    text = launching._text("fused.cu")
    assert text.isascii()
    assert not re.search(r"^\s*#\s*include|\basm\b", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 120

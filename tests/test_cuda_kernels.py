"""The CUDA kernels, run on the CPU by cuda/shim.h: every way that data can be cut, dtypes, memory, and the launcher."""

from __future__ import annotations

import contextlib
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
import test_accuracy
from cuda import shim
from support.libraries import REQUIRED, need

import arraybn
from arraybn import reference
from arraybn._arrays.namespaces import FLOATS
from arraybn.kernels import cuda, select
from arraybn.kernels.cuda import launch
from arraybn.kernels.cuda.launch import Grid, Kernel
from arraybn.testing import check_batch_norm, scenarios, ulp, worst

ROOT = Path(__file__).parents[1]
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's

if shim.compiler() is None and "g++" not in REQUIRED:
    pytest.skip("there is no g++ to compile the kernels for the CPU", allow_module_level=True)

# (N, C, S), and the sizes of cuda.py that make the cut what the name says, where the real ones need larger data
CUTS: dict[str, tuple[tuple[int, int, int], dict[str, int]]] = {
    "one value a channel": ((1, 3, 1), {}),
    "one channel": ((37, 1, 9), {}),
    "one channel, one value a row": ((70, 1, 1), {}),
    "two channels": ((45, 2, 1), {}),
    "channels-last": ((150, 16, 1), {}),
    "channels-last, odd": ((83, 5, 1), {}),
    "channels-last in groups": ((21, 72, 1), {}),
    "channels-last in rounds": ((300, 16, 1), {"THREADS": 64, "LEAST": 2**20}),
    "channels-last in parts": ((203, 16, 1), {"LEAST": 1024, "BLOCKS": 2**30}),
    "channels-last, odd, in parts": ((203, 5, 1), {"LEAST": 256, "BLOCKS": 2**30}),
    "short planes": ((9, 6, 5), {}),
    "planes": ((9, 3, 64), {}),
    "planes of an odd size": ((9, 3, 49), {}),
    "planes that are no multiple of 16 bytes": ((5, 3, 36), {}),
    "planes in rounds": ((40, 2, 49), {"THREADS": 32}),
    "planes in parts": ((7, 3, 64), {"LEAST": 256, "PART": 256}),
    "odd planes in parts": ((7, 3, 49), {"LEAST": 128, "PART": 128}),
    "a long plane in parts": ((1, 2, 2052), {"LEAST": 1024, "PART": 1024, "THREADS": 32}),
}


@pytest.fixture(scope="module")
def library() -> Path:
    return shim.build(tuple(shim.all_kernels()))


@pytest.fixture(autouse=True)
def gpu(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[shim.Shim]:
    """NumPy arrays go through the CUDA kernels unless another module is asked for."""

    def by_default(x: Any, kernels: Any = None) -> Any:
        return select(x, cuda if kernels is None else kernels)

    monkeypatch.setattr("arraybn.functional.select", by_default)
    monkeypatch.setattr("arraybn.statistics.select", by_default)
    with shim.install(library) as installed:
        yield installed
    forget_cuts()


def set_sizes(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]) -> None:
    for name, value in sizes.items():
        monkeypatch.setattr(cuda, name, value)
    forget_cuts()


def forget_cuts() -> None:
    cuda.cut.cache_clear()
    cuda._plan.cache_clear()


@pytest.fixture(params=CUTS)
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, gpu: shim.Shim) -> Any:
    """(N, C, S), cut as the name says."""
    shape, sizes = CUTS[request.param]
    set_sizes(monkeypatch, sizes)
    return shape


def data(shape: tuple[int, ...], dtype: str, seed: int = 0, offset: float = 3.0) -> Any:
    values = np.random.default_rng(seed).standard_normal(shape) + offset
    return values.astype(need("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)


def coefficients(channels: int) -> Any:
    return np.random.default_rng(9).standard_normal((4, channels))


def exact_of(*arrays: Any) -> list[Any]:
    return [array.astype(np.float64).astype(np.longdouble) for array in arrays]


# Half precision is summed up to 32 values at a time in float32, after x − mean was rounded to it; the rest is float64,
# where between two numbers stand at most some hundred additions.
SUM = {"float16": 40 * 2.0**-24, "bfloat16": 40 * 2.0**-24, "float32": 300 * 2.0**-53, "float64": 300 * 2.0**-53}
# The maps calculate in the dtype itself, half precision in float32; four roundings of the largest term, and the last.
MAP = {"float16": 4 * 2.0**-24, "bfloat16": 4 * 2.0**-24, "float32": 4 * 2.0**-24, "float64": 4 * 2.0**-53}
LAST = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0, "float64": 0.0}


def assert_sum(got: Any, terms: Any, dtype: str) -> None:
    """`got` (C,) is the sum of `terms` (N, C, S), long double."""
    assert got.dtype == np.float64
    bound = SUM[dtype] * np.abs(terms).sum(axis=(0, 2))
    exact = terms.sum(axis=(0, 2))
    assert np.all(np.abs(got - exact) <= bound)
    assert np.any(np.abs(got + 1e-3 * abs(terms).sum(axis=(0, 2)) - exact) > bound)  # the control: wrong by 0.1 %


def assert_map(got: Any, exact: Any, scale: Any, dtype: str) -> None:
    """`got` is `exact`, long double, from terms no larger than `scale`."""
    assert got.dtype == data((1,), dtype).dtype
    bound = MAP[dtype] * scale + 1.01 * LAST[dtype] * np.abs(exact) + 2.0**-25 * (LAST[dtype] > 0)
    assert np.all(np.abs(exact_of(got)[0] - exact) <= bound)
    assert np.any(np.abs(exact_of(got)[0] * 1.05 - exact) > bound)  # the control; bfloat16 has three digits


def assert_sums(shape: tuple[int, int, int], dtype: str) -> None:
    """`moments` and `dots` are right for data of this shape."""
    u, x = data(shape, dtype, 1, 0.5), data(shape, dtype)
    exact_u, exact_x = exact_of(u, x)
    n = shape[0] * shape[2]
    mean, m2 = cuda.moments(x)
    exact_mean = (exact_x.sum(axis=(0, 2)) / n)[:, None]
    assert np.all(np.abs(mean - exact_mean[:, 0]) <= SUM[dtype] * 4 + 2.0**-50)
    exact_m2 = ((exact_x - exact_mean) ** 2).sum(axis=(0, 2))
    assert np.all(np.abs(m2 - exact_m2) <= 8 * SUM[dtype] * exact_m2)
    assert n == 1 or np.all(np.abs(1.001 * m2 - exact_m2) > 8 * SUM[dtype] * exact_m2)  # the control

    s, q = cuda.dots(u, x, mean)
    assert_sum(s, exact_u, dtype)
    if n > 1:
        assert_sum(q, exact_u * (exact_x - mean[:, None]), dtype)


def assert_maps(shape: tuple[int, int, int], dtype: str) -> None:
    """`affine` and `affine2` are right for data of this shape."""
    u, x = data(shape, dtype, 1, 0.5), data(shape, dtype)
    exact_u, exact_x = exact_of(u, x)
    mean, a, b, c = (vector[:, None] for vector in coefficients(shape[1]))
    d = exact_x - mean
    assert_map(cuda.affine(x, mean[:, 0], a[:, 0], c[:, 0]), a * d + c, abs(a * d) + abs(c), dtype)
    got = cuda.affine2(u, x, mean[:, 0], a[:, 0], b[:, 0], c[:, 0])
    assert_map(got, a * exact_u + b * d + c, abs(a * exact_u) + abs(b * d) + abs(c), dtype)


# ---- What the sweeps give --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_sweeps_are_exact_to_rounding_however_the_data_is_cut(shape: Any, dtype: str) -> None:
    assert_sums(shape, dtype)
    assert_maps(shape, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_two_sweeps_at_once_are_one_after_the_other(shape: Any, dtype: str) -> None:
    dy, x = data(shape, dtype, 1, 0.5), data(shape, dtype)
    n, eps = shape[0] * shape[2], 1e-5
    for weight, bias in [(None, None), coefficients(shape[1])[:2]]:
        mean, m2, rstd, y = cuda.forward(x, weight, bias, eps)
        assert all(map(np.array_equal, (mean, m2), cuda.moments(x)))
        np.testing.assert_array_equal(rstd, reference.rstd(m2 / n, eps))
        np.testing.assert_array_equal(y, cuda.affine(x, mean, *reference.normalize(rstd, weight, bias)))

        dx, dweight, dbias = cuda.backward(dy, x, mean, rstd, weight)
        sums = reference.parameter_gradients(*cuda.dots(dy, x, mean), rstd)
        assert all(map(np.array_equal, (dweight, dbias), sums))
        expected = cuda.affine2(dy, x, mean, *reference.input_gradient(dweight, dbias, n, rstd, weight))
        np.testing.assert_array_equal(dx, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_bits_are_the_same_each_time_whichever_block_is_last(shape: Any, dtype: str, library: Path) -> None:
    dy, x = data(shape, dtype, 1, 0.5), data(shape, dtype)
    weight, bias = coefficients(shape[1])[:2]
    results = []
    for seed, resident in [(0, 3), (0, 3), (1, 1), (2, 7), (3, 2)]:
        with shim.install(library, seed=seed, resident=resident):
            mean, m2, rstd, y = cuda.forward(x, weight, bias, 1e-5)
            gradients = cuda.backward(dy, x, mean, rstd, weight)
            results.append([array.tobytes() for array in (mean, m2, rstd, y, *gradients)])
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_result_in_place_has_the_same_bits(shape: Any, dtype: str) -> None:
    dy, x = data(shape, dtype, 1, 0.5), data(shape, dtype)
    mean, _, rstd, y = cuda.forward(x, None, None, 1e-5)
    dx = cuda.backward(dy, x, mean, rstd, None)[0]
    for target in ("dy", "x"):
        inputs = {"dy": dy.copy(), "x": x.copy()}
        result = cuda.backward(**inputs, mean=mean, rstd=rstd, weight=None, out=inputs[target])[0]
        assert result is inputs[target]
        np.testing.assert_array_equal(result, dx)
    target = x.copy()
    assert cuda.forward(target, None, None, 1e-5, target)[3] is target
    np.testing.assert_array_equal(target, y)


@pytest.mark.parametrize("dtype", FLOATS)
def test_outliers_among_the_first_values_cost_no_digit_that_is_promised(shape: Any, dtype: str) -> None:
    x = data(shape, dtype, offset=0.0)
    x[:1, :, :8] = 1e4  # the shift of some threads and blocks
    (exact,) = exact_of(x)
    n = shape[0] * shape[2]
    exact_m2 = ((exact - (exact.sum(axis=(0, 2)) / n)[:, None]) ** 2).sum(axis=(0, 2))
    error = np.abs(cuda.moments(x)[1] - exact_m2)
    assert np.all(error <= 8 * SUM[dtype] * exact_m2)
    if dtype == "float64":
        assert np.all(error <= 4 * np.spacing(exact_m2.astype(np.float64)))


def test_the_first_value_as_shift_of_all_would_cost_float16_its_digits() -> None:
    x = np.ones((2**15, 1, 1), np.float16)
    x[0] = 60000.0
    x[1:] += np.float16(2.0**-10)  # so that x − 60000 is no float32
    (exact,) = exact_of(x)
    m2 = float(((exact - exact.mean()) ** 2).sum())
    assert abs(cuda.moments(x)[1][0] / m2 - 1) < 2.0**-14
    d = (x.astype("f4") - np.float32(60000)).reshape(-1, 32)
    s, q = d.sum(axis=1).astype("f8").sum(), (d * d).sum(axis=1).astype("f8").sum()
    assert abs((q - s * s / x.size) / m2 - 1) > 2.0**-12  # the control


@pytest.mark.parametrize("dtype", FLOATS)
def test_constant_channels_have_their_value_as_mean_and_no_spread(shape: Any, dtype: str) -> None:
    values = np.linspace(-3.3, 1e4, shape[1])
    x = np.broadcast_to(values[:, None], shape).astype(data((1,), dtype).dtype)
    bias = coefficients(shape[1])[0]
    mean, m2, _, y = cuda.forward(x, None, bias, 1e-5)
    np.testing.assert_array_equal(mean, x[0, :, 0].astype("f8"))
    np.testing.assert_array_equal(m2, 0)
    rounded = bias if dtype == "float64" else bias.astype("f4")
    np.testing.assert_array_equal(y, np.broadcast_to(rounded.astype(x.dtype)[:, None], shape))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_and_inf_stay_in_their_channel(shape: Any, dtype: str) -> None:
    if shape[1] == 1:
        pytest.skip("there is no other channel")
    x = data(shape, dtype)
    clean = cuda.forward(x, None, None, 1e-5)
    for place in (0, -1):
        for value in (np.nan, np.inf, -np.inf):
            spoiled = x.copy()
            spoiled[place, 0, place] = value
            mean, m2, _, y = cuda.forward(spoiled, None, None, 1e-5)
            np.testing.assert_array_equal(mean[0], value)
            assert np.isnan(m2[0])
            assert np.all(np.isnan(y[:, 0]))
            np.testing.assert_array_equal(mean[1:], clean[0][1:])
            np.testing.assert_array_equal(y[:, 1:], clean[3][:, 1:])


def test_squares_beyond_float64_are_inf_as_in_numpy(shape: Any) -> None:
    if shape[0] * shape[2] == 1:
        pytest.skip("one value has no spread")
    for place in (0, -1):
        x = data(shape, "float64")
        x[place, 0, place] = 1e200
        assert cuda.moments(x)[1][0] == np.inf


@pytest.mark.parametrize("shape", [(2**14, 1, 4), (2**16, 1, 1), (1, 1, 2**16), (2**13, 8, 1)])
@pytest.mark.parametrize("order", ["halves", "random"])
def test_n2_float64_of_two_values_whose_sums_round_the_same_way(shape: tuple[int, int, int], order: str) -> None:
    n, channels = shape[0] * shape[2], shape[1]
    high = np.arange(np.prod(shape)) < n * channels // 2 if order == "halves" else None
    high = (np.random.default_rng(0).random(shape) < 0.5) if high is None else high.reshape(shape)
    x = np.where(high, 0.1, 0.0)
    count = high.sum(axis=(0, 2)).astype(np.longdouble)  # so mean and m2 need no sum
    mean = count * np.longdouble(0.1) / n
    m2 = count * (np.longdouble(0.1) - mean) ** 2 + (n - count) * mean**2
    got = cuda.moments(x)
    assert np.all(abs(got[0] - mean) <= 8 * np.spacing(0.1))
    assert np.all(abs(got[1] / m2 - 1) <= 16 * 2.0**-52)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("columns", [1, 8])
def test_every_half_precision_number_is_read_and_rounded_as_by_numpy(dtype: str, columns: int) -> None:
    kind = data((1,), dtype).dtype
    x = np.arange(2**16, dtype=np.uint16).view(kind).reshape(-1, columns, 1)
    one, zero = np.ones(columns), np.zeros(columns)
    y = cuda.affine(x, zero, one, zero)
    with np.errstate(over="ignore", invalid="ignore"):
        tiny = (dtype == "bfloat16") & (abs(x.astype("f4")) < 2.0**-126)  # nothing, to a GPU
        np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
        np.testing.assert_array_equal(y.astype("f4")[~np.isnan(x)], np.where(tiny, 0, x.astype("f4"))[~np.isnan(x)])
        third = np.float32(1 / 3)
        expected = (x.astype(np.float32) * third).astype(kind).astype("f4")
    got = cuda.affine(x, zero, one * float(third), zero).astype("f4")
    normal = (abs(expected) >= 2.0**-125) | (dtype == "float16") | np.isnan(expected)
    np.testing.assert_array_equal(got[normal], expected[normal])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_slope_of_affine2_may_be_beyond_float32(dtype: str) -> None:
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


# ---- N1 to N3, as for the other kernels ------------------------------------------------------------------------------

test_n1_float32 = test_accuracy.test_n1_float32_statistics_are_within_one_ulp
test_n1_outliers = test_accuracy.test_n1_statistics_with_outliers_and_in_order_are_within_one_ulp
test_n1_correctly_rounded = test_accuracy.test_n1_statistics_are_correctly_rounded_in_999_of_1000_channels
test_n2_float32 = test_accuracy.test_n2_float32_y_is_within_4_ulp_and_dx_within_12
test_n2_half_precision = test_accuracy.test_n2_half_precision_is_within_an_ulp_more_than_rounding
test_n2_float64 = test_accuracy.test_n2_float64_is_within_16_and_32_ulp_of_the_channel
test_n3_constant_float64 = test_accuracy.test_n3_constant_float64_channels_give_exactly_bias
test_n3_eps_zero = test_accuracy.test_eps_zero_leaves_constant_channels_at_bias_and_others_normalized
test_nan_and_inf_as_in_numpy = test_accuracy.test_nan_and_inf_stay_in_their_channel_and_propagate_as_in_numpy


@pytest.mark.parametrize("layout", ["planes", "lines"])
@pytest.mark.parametrize(("shape", "scale"), test_accuracy.CASES)
def test_n1_n2_hold_in_both_layouts_with_many_blocks(
    shape: str, scale: str, layout: str, monkeypatch: pytest.MonkeyPatch, gpu: shim.Shim
) -> None:
    set_sizes(monkeypatch, {"LEAST": 64, "PART": 64, "BLOCKS": 2**30})
    if layout == "lines":
        batch = scenarios.make(shape, scale)
        x, dy = (np.moveaxis(array, 1, 2).reshape(-1, array.shape[1], 1) for array in batch[:2])
        monkeypatch.setattr(scenarios, "make", lambda *_: batch._replace(x=x, dy=dy))
    test_accuracy.test_n1_float32_statistics_are_within_one_ulp(shape, scale)
    test_accuracy.test_n2_float32_y_is_within_4_ulp_and_dx_within_12(shape, scale)
    test_accuracy.test_n2_float64_is_within_16_and_32_ulp_of_the_channel(shape, scale)
    if shape in ("small", "tall", "images"):
        assert max(grid.tickets for _, grid in gpu.launches) > 0  # some channel had several blocks


@pytest.mark.parametrize("scale", ["small std", "large std"])
@pytest.mark.parametrize("shape", [(16, 3, 64), (16, 3, 36), (16, 3, 49), (150, 16, 1)])
def test_n2_bfloat16_keeps_its_range(shape: tuple[int, int, int], scale: str) -> None:
    # The squares of x − shift are near the ends of float32, where some shifts are 4 std off. Not with the |mean|/std of
    # the scenario, 1000, where bfloat16 has hardly two values left.
    kind = data((1,), "bfloat16").dtype
    std = scenarios.SCALES[scale][1]
    batch = scenarios.normal(shape, 0.0, std, seed=3)
    x = batch.x.astype(kind)
    x[0] = 4 * std
    truth = test_accuracy.exact(x, batch, batch.eps)
    y, _, dx, _, _ = test_accuracy.run(x, batch, batch.eps)
    for got, exact, terms in ((y, truth.y, truth.y_scale), (dx, truth.dx, truth.dx_scale)):
        largest = np.maximum(terms, abs(exact))
        assert worst(got.astype("f8"), exact, largest, kind) <= 1.5
        assert worst(got.astype("f8") * 1.02, exact, largest, kind) > 1.5  # the control


def test_they_went_through_the_kernels(gpu: shim.Shim) -> None:
    test_accuracy.test_n2_float32_y_is_within_4_ulp_and_dx_within_12("images", "far")
    names = [name for name, _ in gpu.launches]
    sweeps = [f"{name}_planes_float32_1" for name in ("moments", "affine", "dots", "affine2")]
    assert names == ["vectors_float32_1", *sweeps]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_n3_constant_channels_give_exactly_bias(dtype: str) -> None:
    values = np.asarray([3e7, 0.1, -1e-30, 0.0, 1 / 3, 7e6], "f4").astype(dtype)
    bias = np.asarray([0.1, -2.0, 3.0, 1e-9, 0.7, 5.0], "f4")
    weight = np.asarray([1.0, -3.0, 1e3, 2.0, 0.3, 1e-3], "f4")
    x = np.tile(values[None, :, None], (7, 1, 13))
    for eps in (0.0, 1e-46, 1e-30, 1e-5):
        y, saved = arraybn.batch_norm(x, weight, bias, eps=eps)
        assert (y == bias[None, :, None]).all()
        assert (saved.moments.m2 == 0).all()
        assert (saved.moments.mean == values).all()


@pytest.mark.parametrize(("shape", "scale"), test_accuracy.CASES)
def test_n3_dx_sums_to_zero_per_channel(shape: str, scale: str) -> None:
    batch = scenarios.make(shape, scale)
    x = batch.x.astype("f4")
    dx = test_accuracy.run(x, batch, 1e-5)[2]
    # a, b and c are rounded to float32, and x − mean twice, b·(x − mean) + c and dx once
    terms = ulp(test_accuracy.exact(x, batch, 1e-5).dx_scale, np.dtype("f4")).sum(axis=(0, 2))
    total = abs(dx.astype(np.longdouble).sum(axis=(0, 2)))
    assert (total <= 3.5 * terms).all()
    assert (total + 1e-3 * 2**23 * terms > 3.5 * terms).all()  # the control: wrong by 0.1 %


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_property_of_a_batch_norm_holds(dtype: str) -> None:
    def forward(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return arraybn.batch_norm(x, weight, bias, eps=eps)[0]

    def backward(dy: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        _, saved = arraybn.batch_norm(x, weight, bias, eps=eps)
        return arraybn.batch_norm_backward(dy, saved)

    def update(running_mean: Any, running_var: Any, x: Any, momentum: float) -> Any:
        return arraybn.update_running_stats(running_mean, running_var, arraybn.moments(x), momentum)

    check_batch_norm(forward, backward, update, dtype=dtype, examples=5)


# ---- Running statistics, and layers ----------------------------------------------------------------------------------


def test_running_statistics_have_the_bits_of_the_reference(gpu: shim.Shim) -> None:
    for channels in (11, 300):
        vectors = coefficients(channels)
        for old_mean, old_var in [("f4", "f4"), ("f8", "f8"), ("f4", "f8"), ("f2", "f2")]:
            mean, var = vectors[0].astype(old_mean), vectors[1].astype(old_var)
            wide = np.repeat(vectors[2:], 2, axis=1)[:, ::2]  # not contiguous
            gpu.launches.clear()
            got = cuda.update_running_stats(mean, var, *wide, 0.1)
            expected = (reference.update_running(mean, wide[0], 0.1), reference.update_running(var, wide[1], 0.1))
            assert len(gpu.launches) == (old_mean == old_var != "f2")
            for new, want, old in zip(got, expected, (mean, var), strict=True):
                assert new.dtype == old.dtype
                assert new is not old
                np.testing.assert_array_equal(new, want)


@pytest.mark.parametrize("axis", [1, -1])
def test_a_layer_trains_and_evaluates_as_with_the_reference(axis: int, gpu: shim.Shim) -> None:
    shape = (6, 4, 7, 7) if axis == 1 else (6, 7, 7, 4)
    results = []
    for kernels in (cuda, reference):
        with pytest.MonkeyPatch.context() as patch:
            for room in ("functional", "statistics"):
                patch.setattr(f"arraybn.{room}.select", lambda x, _=None, kernels=kernels: kernels)
            layer = arraybn.BatchNorm2d(4, channel_axis=axis)
            for step in range(3):
                y = layer(data(shape, "float32", step))
                dx = layer.backward(data(shape, "float32", step + 9, 0.5))
            layer.eval()
            z = layer(data(shape, "float32", 5))
            dz = layer.backward(data(shape, "float32", 6))
            results.append([y, dx, z, dz, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    names = [re.split("_(planes|lines|float)", name)[0] for name, _ in gpu.launches]
    assert names == ["vectors", "moments", "affine", "running", "dots", "affine2"] * 3 + [
        *("vectors", "affine", "dots", "affine")
    ]


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_arrays_that_a_kernel_cannot_take_as_they_are_give_the_same_bits() -> None:
    for dtype in FLOATS:
        x = data((6, 4, 40), dtype)
        y = cuda.forward(x, None, None, 1e-5)[3]
        unaligned = shim.guarded(x.shape, x.dtype, 1)
        strided = np.repeat(x, 2, axis=2)[:, :, ::2]
        for array in (unaligned, strided):
            array[...] = x
            assert not (array.flags.aligned and array.flags.c_contiguous)
            np.testing.assert_array_equal(cuda.forward(array, None, None, 1e-5)[3], y)
            target = np.empty_like(strided) if array is strided else unaligned
            assert arraybn.batch_norm(x, eps=1e-5, out=target)[0] is target
            np.testing.assert_array_equal(target, y)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5, 3, 64), (70, 24, 1)])
def test_any_alignment_of_the_values_will_do(dtype: str, shape: tuple[int, int, int], gpu: shim.Shim) -> None:
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
        width = next(w for w in cuda.WIDTHS[itemsize] if offset % (w * itemsize) == 0)
        assert {name.rpartition("_")[2] for name, _ in gpu.launches} == {str(width)}


def test_nothing_in_gives_nothing_out(gpu: shim.Shim) -> None:
    for shape in [(0, 3, 5), (4, 3, 0), (0, 3, 1)]:
        x = np.empty(shape, np.float32)
        mean, m2, _, y = cuda.forward(x, None, None, 1e-5)
        dx, dweight, dbias = cuda.backward(x, x, mean, mean, None)
        assert y.shape == dx.shape == x.shape
        for vector in (mean, m2, dweight, dbias, *cuda.dots(x, x, mean)):
            np.testing.assert_array_equal(vector, np.zeros(3))
        out = np.empty_like(x)
        y, saved = arraybn.batch_norm(x, out=out)
        assert y is out
        assert arraybn.batch_norm_backward(x, saved, out=out)[0] is out
    assert not gpu.launches


@pytest.mark.parametrize("name", ["planes", "lines"])
@pytest.mark.parametrize("width", [1, 8])
def test_places_beyond_2_31_are_reached(gpu: shim.Shim, name: str, width: int) -> None:
    stride = 2**31 + 64  # values from a sample to the next: the rest of a sample is never looked at
    shape = (3, 2, 16) if name == "planes" else (3, 16, 1)
    size = 2 * (2 * stride + 64)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    line = np.frombuffer(memory, np.float16)
    where = np.arange(3)[:, None] * stride + np.arange(32 if name == "planes" else 16)
    x = data(shape, "float16")
    line[where] = x.reshape(3, -1)
    cut = cuda.cut(shape, 2, 0 if width > 1 else 2)
    assert cut.width == width
    place = launch.NUMBERS.index("stride")
    numbers = (*cut.numbers[:place], stride, *cut.numbers[place + 1 :])
    mean, m2, rstd, y = cuda.forward(x, None, None, 1e-5)
    got = np.zeros((3, shape[1]))
    vectors = dict(zip(("mean", "m2", "rstd"), (gpu.pointer(vector) for vector in got), strict=True))
    for sweep in ("moments", "affine"):
        pointers = tuple(vectors.get(vector, 0) for vector in launch.POINTERS[3:-2])
        kernel, address = Kernel(f"{sweep}_{name}", "float16", width), gpu.pointer(line)
        gpu.launch(kernel, cut.grid, (address, 0, address, *pointers), (1e-5, 0.0, *numbers))
    np.testing.assert_allclose(got, [mean, m2, rstd], rtol=1e-6)
    np.testing.assert_allclose(line[where].reshape(shape), y, rtol=2e-3, atol=2e-3)
    del line
    memory.close()


# ---- How the work is cut ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CUTS)
def test_the_table_has_every_way_of_cutting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, sizes = CUTS[name]
    set_sizes(monkeypatch, sizes)
    cut = cuda.cut(shape, 4, 0)
    numbers = dict(zip(launch.NUMBERS, cut.numbers[:9], strict=False))
    assert (cut.layout == "lines") == (shape[2] == 1 < shape[1])
    assert (numbers["parts"] > 1) == (cut.grid.tickets > 0) == ("in parts" in name)
    assert (numbers["groups"] > 1) == ((cut.layout == "planes" and shape[1] > 1) or "in groups" in name)
    under_way = cut.grid.threads * (4 if cut.width > 1 else 8) // numbers["columns"]
    assert (numbers["part"] > 2 * under_way) == ("rounds" in name or name == "a long plane in parts") or "parts" in name
    assert (cut.width == 1) == bool(re.search("odd|short|one|two|planes in rounds", name))


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_any_shape_is_cut_into_parts_that_are_all_there_and_not_too_large(itemsize: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(2000):
        shape = tuple(int(2 ** rng.uniform(0, limit)) for limit in (24, 13, 24))
        shape = shape if rng.random() < 0.6 else (*shape[:2], 1)
        if np.prod(shape, dtype=float) > 2**44:  # 2⁴⁷ bytes, more than any GPU has
            continue
        cut = cuda.cut.__wrapped__(shape, itemsize, int(rng.choice([0, itemsize, 8])))
        n, channels, groups, parts, items, part, plane, stride, columns = cut.numbers[:9]
        blocks, threads, partials, tickets, _ = cut.grid
        assert (n, channels) == (shape[0] * shape[2], shape[1])
        assert blocks == groups * parts < 2**31
        assert (parts - 1) * part < items <= parts * part  # no part is empty, none is missing
        assert threads in (32, 64, 128, 256)
        slots = 1 if cut.layout == "planes" else columns * cut.width
        assert (partials, tickets) == ((16 * blocks * slots, groups) if parts > 1 else (0, 0))
        if cut.layout == "planes":
            assert items * cut.width == n
            assert stride == (plane * cut.width * channels if channels > 1 else n)
            assert part * cut.width * itemsize <= max(2 * cuda.PART, 2 * cuda.LEAST)
        else:
            assert (items, stride) == (n, channels)
            assert groups * slots >= channels > (groups - 1) * slots
            assert threads % slots == 0
            assert part <= 2 * cuda.MOST_ROWS
        assert cut.numbers[9:] == (0, *cuda.divisor(groups), *cuda.divisor(plane))


def test_large_data_has_enough_blocks_for_a_large_gpu() -> None:
    images = [(32, 64, 112 * 112), (32, 256, 56 * 56), (32, 512, 28 * 28), (32, 1024, 14 * 14), (32, 2048, 49)]
    for samples, channels, plane in images:
        for shape in ((samples, channels, plane), (samples * plane, channels, 1)):
            for itemsize in (2, 4):
                assert 350 <= cuda.cut(shape, itemsize, 0).grid.blocks <= 4096, shape


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
    set_sizes(monkeypatch, {"LEAST": 64, "PART": 64})
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
    set_sizes(monkeypatch, {"LEAST": 64, "PART": 64})
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
    set_sizes(monkeypatch, {"LEAST": 64, "PART": 64})
    cuda.moments(data((6, 4, 7), "float32"))
    (first,) = gpu._rooms.values()
    x = data((3, 1500, 16), "float32")
    mean, _ = cuda.moments(x)
    (second,) = gpu._rooms.values()
    assert second.tickets >= 1500 > first.tickets
    assert any(room is first for room in gpu._outgrown)
    np.testing.assert_allclose(mean, x.astype("f8").mean(axis=(0, 2)), rtol=1e-14)


def test_several_callers_at_once_get_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    set_sizes(monkeypatch, {"LEAST": 64, "PART": 64})
    batches = [data((4, 3, 20 + k), "float32", k) for k in range(8)]
    alone = [arraybn.batch_norm(x)[0] for x in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: arraybn.batch_norm(x)[0], batches))
    for y, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(y, expected)


class OnDevice(np.ndarray):
    """An array with the attributes of CuPy's that are asked for."""

    device_id = 0

    @property
    def data(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(ptr=self.ctypes.data, device_id=self.device_id)


class StandIn:
    """What `launch.CuPy` calls of CuPy, with the kernels of a Shim."""

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

    def empty(self, shape: Any, dtype: Any) -> Any:
        return self.gpu.empty(shape, dtype).view(OnDevice)

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
    set_sizes(monkeypatch, {"LEAST": 64, "PART": 64})
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


def test_a_new_thread_is_given_the_context_of_each_device(gpu: shim.Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver launches nothing without one, and memory that CuPy has put by makes none."""
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
    """Zeroed in the graph, the counters of calls behind the capture would hold anything."""
    set_sizes(monkeypatch, {"LEAST": 64, "PART": 64})
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
    "a row too far": ("row = thread / threads;", "row = thread / threads + 1;", "channels-last, odd", "sums"),
    "the last item is left out": ("int64 left = p.items -", "int64 left = p.items - 1 -", "planes", "sums"),
    "an item too many": ("left : p.part);", "left : p.part + 1);", "channels-last, odd", "maps"),
    "the counter stays": ("if (ticket == parts - 1) *tickets = 0;", "", "planes in parts", "sums"),
    "a warp is left out of a sum": ("row < rows; ++row", "row < rows - (rows > 1); ++row", "channels-last", "sums"),
    "a part is left out": ("first = thread / slots;", "first = 1 + thread / slots;", "channels-last in parts", "sums"),
    "a thread misses the barrier": (
        "    s = q = 0;\n",
        "    s = q = 0;\n    if (thread == 7) __syncthreads();\n",
        "planes",
        "sums",
    ),
    "a store off by one value": ("store(out + offset[k])", "store(out + offset[k] + 1)", "planes", "maps"),
}
CHECKS = {"sums": (assert_sums, ("moments", "dots")), "maps": (assert_maps, ("affine", "affine2"))}


def planted_library(planted: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernels that show the error, cut so that they do."""
    old, new, name, sweeps = PLANTED[planted]
    shape, sizes = CUTS[name]
    set_sizes(monkeypatch, sizes)
    cut = cuda.cut(shape, 4, 0)
    kernels = tuple(Kernel(f"{sweep}_{cut.layout}", "float32", cut.width) for sweep in CHECKS[sweeps][1])
    return shim.build(kernels, changed=(old, new))


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_found(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = planted_library(planted, monkeypatch)
    check, shape = CHECKS[PLANTED[planted][3]][0], CUTS[PLANTED[planted][2]][0]
    check(shape, "float32")  # right without it
    with shim.install(library), pytest.raises((AssertionError, RuntimeError)):
        check(shape, "float32")


SANITIZED = """
    import sys
    sys.path[:0] = [{tests!r}, {root!r}]
    from pathlib import Path
    import numpy as np
    from cuda import shim
    from arraybn.kernels import cuda
    cuda.LEAST = cuda.PART = 512
    with shim.install(Path(sys.argv[1])):
        for dtype in (np.float32, np.float16):
            for shape in [(9, 3, 64), (9, 3, 49), (203, 24, 1), (203, 5, 1), (7, 4, 196)]:
                size = int(np.prod(shape))
                x, dy = (np.random.default_rng(k).standard_normal(size).astype(dtype).reshape(shape) for k in (0, 1))
                assert x.nbytes > 1024  # less, NumPy keeps to itself when it is freed
                mean, m2, rstd, y = cuda.forward(x, None, None, 1e-5)
                cuda.backward(dy, x, mean, rstd, None)
    print("clean")
"""


@pytest.mark.parametrize("changed", [None, ("left < p.part ? left :", "left < p.part ? left + 1 :")])
def test_address_sanitizer_finds_nothing_but_what_is_planted(changed: tuple[str, str] | None) -> None:
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

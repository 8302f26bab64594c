"""N1 to N3, by every kernel module: how far results may be from the exact ones.

The bounds are those of the promises. No bound may be changed to let a test pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support import kernels
from support.libraries import need

import arraybn
from arraybn import reference
from arraybn.testing import exact_batch_norm, exact_moments, scenarios, ulp, worst
from arraybn.testing.oracle import LONG, Exact, as_long

F32, F64 = np.dtype("f4"), np.dtype("f8")
CASES = [(shape, scale) for shape in scenarios.SHAPES if shape != "one value" for scale in scenarios.SCALES]
PARTS = {"MIN_BLOCK_BYTES": 64, "PART": 64, "BLOCKS": 2**30}  # bytes and blocks of a cut with many blocks for a channel


LINES = ("tall", "two values", (150, 16, 1))  # shapes (N, C, 1)
KINDS = {"parts": "cuda", "parts of lines": "cuda", "resident": "fused", "pipeline": "fused", "cluster": "fused"}
CUTS = {"pipeline": "planes in parts", "cluster": "two blocks"}  # whose sizes are taken


@pytest.fixture(params=["reference", "cpu", "cuda", *KINDS])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[kernels.Case]:
    """Let NumPy arrays be served by a kernel module, the CUDA kernels in each way that data can go."""
    way = request.param
    with kernels.case_of(KINDS.get(way, way), CUTS.get(way)) as case:
        case.cut = way
        kernels.serve_all_by(reference if way == "reference" else case.ops, monkeypatch)
        if way.startswith("parts"):
            kernels.set_sizes(monkeypatch, case.ops, PARTS)
        if way in RESHAPED:
            make = scenarios.make
            monkeypatch.setattr(scenarios, "make", lambda *chosen: RESHAPED[way](make(*chosen)))
        yield case
    if case.on_gpu:
        assert_went(case, way, request.node)


def assert_went(case: kernels.Case, way: str, test: Any) -> None:
    """Assert that data went through the kernels, in that way."""
    names = {name for name, _ in case.gpu.launches if not name.startswith("vectors")}  # copies of weight and bias
    assert names
    shape = test.callspec.params.get("shape")
    if case.kind == "fused" and not any("float64" in name for name in names):  # the pipeline has no kernels for float64
        ways = ("ring", "rows") if way == "pipeline" and shape in LINES else (way,)  # lines have a way of their own
        if way != "cluster" or isinstance(shape, str):  # the planes of scenarios alone have been made long enough
            assert any(f"_{one}_" in name for name in names for one in ways)
    if way.startswith("parts") and (shape in ("tall", "images") or (shape == "small" and "float64" in test.name)):
        assert max(grid.tickets for _, grid in case.gpu.launches) > 0  # some channel had several blocks


def as_lines(batch: scenarios.Batch) -> scenarios.Batch:
    """Return the batch as (N·S, C, 1), as channels-last memory is seen."""
    x, dy = (np.moveaxis(array, 1, 2).reshape(-1, array.shape[1], 1) for array in batch[:2])
    return batch._replace(x=x, dy=dy)


def as_long_planes(batch: scenarios.Batch) -> scenarios.Batch:
    """Return the batch with each plane eight times, so that the bytes of a plane are a multiple of 16."""
    return batch._replace(x=np.tile(batch.x, (1, 1, 8)), dy=np.tile(batch.dy, (1, 1, 8)))


RESHAPED: dict[str, Any] = {"parts of lines": as_lines, "cluster": as_long_planes}


def run(x: Any, batch: scenarios.Batch, eps: float) -> tuple[Any, ...]:
    """Return y, moments, dx, dweight, dbias."""
    y, saved = arraybn.batch_norm(x, batch.weight, batch.bias, eps=eps)
    dx, dweight, dbias = arraybn.batch_norm_backward(batch.dy.astype(x.dtype), saved)
    return y, saved.moments, dx, dweight, dbias


def exact(x: Any, batch: scenarios.Batch, eps: float) -> Exact:
    """Return the exact results for the very x and dy that were given."""
    return exact_batch_norm(x, batch.weight, batch.bias, batch.dy.astype(x.dtype), eps=eps)


def statistics_errors(moments: arraybn.Moments, truth: Exact) -> tuple[float, float]:
    """Return the errors of mean and var after rounding to float32, in the units of N1."""
    floor = np.maximum(abs(truth.mean), np.ldexp(np.sqrt(truth.var), -20))
    mean, var = moments.mean.astype("f4"), (moments.m2 / moments.n).astype("f4")
    return worst(mean, truth.mean, floor, F32), worst(var, truth.var, truth.var, F32)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("shape", "scale"), CASES)
def test_n1_float32_statistics_are_within_one_ulp(shape: str, scale: str) -> None:
    batch = scenarios.make(shape, scale)
    x = batch.x.astype("f4")
    truth = exact(x, batch, 1e-5)
    moments = arraybn.moments(x)
    for found in (moments, arraybn.batch_norm(x)[1].moments):
        assert max(statistics_errors(found, truth)) <= 1
    off = arraybn.Moments(moments.n, moments.mean * (1 + 2.0**-20), moments.m2 * (1 + 2.0**-20))
    assert min(statistics_errors(off, truth)) > 1  # the control


@pytest.mark.usefixtures("served")
def test_n1_statistics_with_outliers_and_in_order_are_within_one_ulp() -> None:
    x = scenarios.outliers().astype("f4")
    truth = exact_batch_norm(x, np.ones(3), np.zeros(3), x, eps=1e-5)
    for moments in (arraybn.moments(x), arraybn.batch_norm(x)[1].moments):
        assert max(statistics_errors(moments, truth)) <= 1


@functools.cache
def many_channels() -> tuple[Any, Any, Any]:
    """Return 2000 channels of random |mean|/std up to 10⁶, and mean and var, correctly rounded."""
    rng = np.random.default_rng(1)
    ratios = 10 ** rng.uniform(-2, 6, 2000)
    x = (rng.standard_normal((23, 2000, 3)) + ratios[:, None]).astype("f4")
    truth = [exact_moments(x[:, c, :]) for c in range(2000)]
    mean = np.array([as_long(mean) for mean, _ in truth]).astype("f4")
    return x, mean, np.array([as_long(m2 / (23 * 3)) for _, m2 in truth]).astype("f4")


@pytest.mark.usefixtures("served")
def test_n1_statistics_are_correctly_rounded_in_999_of_1000_channels() -> None:
    x, mean, var = many_channels()
    for moments in (arraybn.moments(x), arraybn.batch_norm(x)[1].moments):
        assert np.mean(moments.mean.astype("f4") == mean) >= 0.999
        assert np.mean(moments.var().astype("f4") == var) >= 0.999
    assert np.mean(x.mean(axis=(0, 2)) == mean) < 0.999  # the control: sums in float32
    assert np.mean(x.var(axis=(0, 2)) == var) < 0.999


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("shape", "scale"), CASES)
def test_n2_float32_y_is_within_4_ulp_and_dx_within_12(shape: str, scale: str) -> None:
    batch = scenarios.make(shape, scale)
    x, eps = batch.x.astype("f4"), batch.eps
    truth = exact(x, batch, eps)
    y, _, dx, dweight, dbias = run(x, batch, eps)
    assert y.dtype == dx.dtype == F32
    assert worst(y, truth.y, truth.y_scale, F32) <= 4
    assert worst(dx, truth.dx, truth.dx_scale, F32) <= 12
    assert worst(y + 1e-3 * truth.y_scale, truth.y, truth.y_scale, F32) > 4  # the control: wrong by 0.1 %
    assert worst(dx + 1e-3 * truth.dx_scale, truth.dx, truth.dx_scale, F32) > 12
    terms = np.abs(batch.dy.astype("f4") * truth.xhat).sum(axis=(0, 2)), np.abs(batch.dy).sum(axis=(0, 2))
    assert worst(dweight, truth.dweight, terms[0], F32) <= 1
    assert worst(dbias, truth.dbias, terms[1], F32) <= 1


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", ["small", "tall", "images", "two values"])
def test_n2_half_precision_is_within_an_ulp_more_than_rounding(dtype: str, shape: str) -> None:
    half = np.dtype(dtype) if dtype == "float16" else np.dtype(need("ml_dtypes").bfloat16)
    batch = scenarios.make(shape, "shifted")
    x = batch.x.astype(half)
    truth = exact(x, batch, 1e-3)
    y, _, dx, _, _ = run(x, batch, 1e-3)
    assert y.dtype == dx.dtype == half
    assert worst(y.astype("f8"), truth.y, truth.y_scale, half) <= 1.5
    assert worst(dx.astype("f8"), truth.dx, truth.dx_scale, half) <= 1.5
    assert worst(y.astype("f8") * 1.02, truth.y, truth.y_scale, half) > 1.5  # the control


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("scale", ["small std", "large std"])
@pytest.mark.parametrize("shape", [(16, 3, 64), (16, 3, 512), (16, 3, 36), (16, 3, 49), (150, 16, 1)])
def test_n2_bfloat16_keeps_its_range(shape: tuple[int, int, int], scale: str) -> None:
    # The squares of x − shift are near the ends of float32, where some shifts are 4 std off. Not with the |mean|/std of
    # the scenario, 1000, where bfloat16 has hardly two values left.
    kind, std = np.dtype(need("ml_dtypes").bfloat16), scenarios.SCALES[scale][1]
    batch = scenarios.normal(shape, 0.0, std, seed=3)
    x = batch.x.astype(kind)
    x[0] = 4 * std
    truth = exact(x, batch, batch.eps)
    y, _, dx, _, _ = run(x, batch, batch.eps)
    for got, value, terms in ((y, truth.y, truth.y_scale), (dx, truth.dx, truth.dx_scale)):
        assert worst(got.astype("f8"), value, terms, kind) <= 1.5
        assert worst(got.astype("f8") * 1.02, value, terms, kind) > 1.5  # the control


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize(
    ("x_dtype", "dy_dtype"), [("float16", "f4"), ("bfloat16", "f4"), ("float16", "f8"), ("f4", "f8")]
)
def test_n2_a_wider_dy_is_summed_before_dx_is_rounded(x_dtype: str, dy_dtype: str, scale: float) -> None:
    kind = np.dtype(need("ml_dtypes").bfloat16) if x_dtype == "bfloat16" else np.dtype(x_dtype)
    batch = scenarios.make("images", "shifted")
    x, dy, weight = batch.x.astype(kind), (batch.dy * scale).astype(dy_dtype), batch.weight * min(1 / scale, 1e3)
    truth = exact_batch_norm(x, weight, batch.bias, dy, eps=1e-3)
    _, saved = arraybn.batch_norm(x, weight, batch.bias, eps=1e-3)
    dx, dweight, dbias = arraybn.batch_norm_backward(dy, saved)
    assert dx.dtype == kind
    bound, spoiled = 12 if kind == F32 else 1.5, dx.astype("f8") + 0.2 * np.maximum(truth.dx_scale, abs(truth.dx))
    assert worst(dx.astype("f8"), truth.dx, truth.dx_scale, kind) <= bound
    assert worst(spoiled, truth.dx, truth.dx_scale, kind) > bound  # the control
    terms = np.abs(dy * truth.xhat).sum(axis=(0, 2)), np.abs(dy).sum(axis=(0, 2))
    for found, exactly, size in ((dweight, truth.dweight, terms[0]), (dbias, truth.dbias, terms[1])):
        assert worst(found, exactly, size, F32) <= 1
        assert worst(found + 1e-3 * size, exactly, size, F32) > 1  # the control: wrong by 0.1 %


@pytest.mark.parametrize(("shape", "scale"), CASES)
def test_n2_float64_is_within_16_and_32_ulp_of_the_channel(shape: str, scale: str, served: kernels.Case) -> None:
    batch = scenarios.make(shape, scale)
    eps = batch.eps
    truth = exact(batch.x, batch, eps)
    y, _, dx, _, _ = run(batch.x, batch, eps)
    ratio = 1 + abs(truth.mean) / np.sqrt(truth.var)
    for got, value, scale_of, bound in ((y, truth.y, truth.y_scale, 16), (dx, truth.dx, truth.dx_scale, 32)):
        channel = scale_of.max(axis=(0, 2), keepdims=True)
        error = abs(got.astype(LONG) - value) / ulp(channel, F64)
        assert (error.max(axis=(0, 2)) <= bound * ratio).all()
        spoiled = abs(got + 1e-3 * channel - value) / ulp(channel, F64)
        assert (spoiled.max(axis=(0, 2)) > bound * ratio).all()  # the control
    if served.cut == "resident":
        names = [name for name, _ in served.gpu.launches if not name.startswith("vectors")]
        assert all("_resident_" in name for name in names)


@pytest.mark.parametrize("shape", ["images", "tall"])
@pytest.mark.parametrize("scale", ["standard", "far", "very far"])
def test_n1_n2_without_float64_the_mean_is_kept_in_two_parts(shape: str, scale: str) -> None:
    # x − mean is rounded to float32, by at most half an ulp, and so the mean of the differences by half an ulp of std.
    # var, rstd and weight·rstd take a few roundings each: at most 2 ulp for var, 8 for y, 16 for dx. A mean of one
    # float32 would cost up to |mean|/std/2 ulp, 5·10⁵ in the last scenario: that is the control.
    xp = need("array_api_strict")
    device = xp.Device("no_float64")
    batch = scenarios.make(shape, scale)
    x = batch.x.astype("f4")
    truth = exact(x, batch, 1e-5)
    arrays = [xp.asarray(a.astype("f4"), device=device) for a in (x, batch.weight, batch.bias, batch.dy)]
    y, saved = arraybn.batch_norm(*arrays[:3])
    dx, _, _ = arraybn.batch_norm_backward(arrays[3], saved)
    y, dx, mean, low, m2 = (
        np.asarray(a.to_device(xp.Device("CPU_DEVICE")))
        for a in (y, dx, saved.moments.mean, saved.moments.mean_low, saved.moments.m2)
    )
    std = np.sqrt(truth.var)
    assert worst(mean.astype("f8") + low, truth.mean, std, F32) <= 1
    assert worst(m2.astype("f8") / saved.moments.n, truth.var, truth.var, F32) <= 2
    assert worst(y, truth.y, truth.y_scale, F32) <= 8
    assert worst(dx, truth.dx, truth.dx_scale, F32) <= 16
    assert mean.dtype == low.dtype == F32
    if scale == "very far":
        assert worst(mean.astype("f8"), truth.mean, std, F32) > 1e4


def test_n3_constant_channels_give_exactly_bias(home: Any) -> None:
    values = np.asarray([3e7, 0.1, -1e-30, 0.0, 1 / 3, 7e6], "f4")
    x = np.tile(values[None, :, None], (7, 1, 13))
    bias = np.asarray([0.1, -2.0, 3.0, 1e-9, 0.7, 5.0], "f4")
    weight = np.asarray([1.0, -3.0, 1e3, 2.0, 0.3, 1e-3], "f4")
    y, saved = arraybn.batch_norm(home.array(x), home.array(weight), home.array(bias))
    assert (home.numpy(y) == bias[None, :, None]).all()
    assert (home.numpy(saved.moments.m2) == 0).all()
    assert (home.numpy(saved.moments.mean).astype("f4") == values).all()
    nearly = x.copy()
    nearly[0, :, 0] = np.nextafter(values, np.float32(np.inf))  # the control: one value one ulp off
    y, saved = arraybn.batch_norm(home.array(nearly), home.array(weight), home.array(bias), eps=0)
    assert (home.numpy(y)[0, [0, 1, 4, 5], 0] != bias[[0, 1, 4, 5]]).all()


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("eps", [0.0, 1e-46, 1e-30, 1e-5])
def test_n3_constant_channels_give_exactly_bias_by_every_module(dtype: str, eps: float) -> None:
    values = np.asarray([3e7, 0.1, -1e-30, 0.0, 1 / 3, 7e6], "f4").astype(dtype)
    bias = np.asarray([0.1, -2.0, 3.0, 1e-9, 0.7, 5.0], "f4")
    weight = np.asarray([1.0, -3.0, 1e3, 2.0, 0.3, 1e-3], "f4")
    x = np.tile(values[None, :, None], (7, 1, 13))
    y, saved = arraybn.batch_norm(x, weight, bias, eps=eps)
    assert (y == bias[None, :, None]).all()
    assert (saved.moments.m2 == 0).all()
    assert (saved.moments.mean == values).all()


@pytest.mark.parametrize("eps", [0.0, 1e-46, 1e-40, 1e-30])
def test_n3_constant_channels_give_exactly_bias_whatever_eps(home: Any, eps: float) -> None:
    x, bias = home.array(np.full((8, 1), 3.0, "f4")), home.array(np.asarray([0.7], "f4"))
    assert (home.numpy(arraybn.batch_norm(x, None, bias, eps=eps)[0]) == np.float32(0.7)).all()


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("value", [0.1, 1 / 3, 3e7, 1e300, 1e-300])
@pytest.mark.parametrize("n", [3, 7, 1000, 99_991])
def test_n3_constant_float64_channels_give_exactly_bias(value: float, n: int) -> None:
    y, saved = arraybn.batch_norm(np.full((n, 1), value), np.full(1, 3.0), np.full(1, 0.7))
    assert (y == 0.7).all()
    assert saved.moments.mean[0] == value
    assert saved.moments.m2[0] == 0


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_e3_n3_eps_zero_leaves_constant_channels_at_bias_and_others_normalized(eps: float) -> None:
    x = np.asarray([[1.0, 5.0], [3.0, 5.0]])
    y, saved = arraybn.batch_norm(x, np.ones(2), np.asarray([0.25, 0.5]), eps=eps)
    assert (y[:, 1] == 0.5).all()
    assert y[:, 0] == pytest.approx([-0.75, 1.25], abs=1e-4)
    dx, dweight, dbias = arraybn.batch_norm_backward(np.asarray([[1.0, 2.0], [0.0, 3.0]]), saved)
    assert np.isfinite(dx).all()
    assert (dweight[1], dbias[1]) == (0, 5)


@pytest.mark.parametrize(("shape", "scale"), CASES)
def test_n3_dx_sums_to_zero_per_channel(shape: str, scale: str, served: kernels.Case) -> None:
    batch = scenarios.make(shape, scale)
    x = batch.x.astype("f4")
    _, _, dx, _, _ = run(x, batch, 1e-5)
    terms = ulp(exact(x, batch, 1e-5).dx_scale, F32).sum(axis=(0, 2))
    # Each dx is rounded to float32 once, by at most half an ulp of the largest term of its formula. On a GPU a, b and c
    # are rounded to float32 as well, x − mean twice, b·(x − mean) + c and dx once.
    bound = (3.5 if served.on_gpu else 0.5) * terms
    total = abs(dx.astype(LONG).sum(axis=(0, 2)))
    assert (total <= bound).all()
    assert (total + 1e-3 * 2**23 * terms > bound).all()  # the control: wrong by 0.1 %
    assert abs(dx).max() > 0
    if not served.on_gpu:
        dx[0, 0, 0] += 1e-3 * float(abs(batch.dy[:, 0] * batch.weight[0]).max() / batch.x[:, 0].std())  # one element
        assert abs(dx.astype(LONG).sum(axis=(0, 2)))[0] > bound[0]


@pytest.mark.usefixtures("served")
def test_nan_and_inf_stay_in_their_channel_and_propagate_as_in_numpy() -> None:
    x = np.random.default_rng(0).standard_normal((6, 4))
    x[1, 0], x[2, 1], x[3, 2], x[4, 2] = np.nan, np.inf, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        y, saved = arraybn.batch_norm(x)
        mean, var = x.mean(axis=0), x.var(axis=0)
    np.testing.assert_array_equal(np.isnan(saved.moments.mean), np.isnan(mean))
    np.testing.assert_array_equal(np.isinf(saved.moments.mean), np.isinf(mean))
    np.testing.assert_array_equal(np.isnan(saved.moments.var()), np.isnan(var))
    assert np.isnan(y[:, :3]).all()
    np.testing.assert_allclose(y[:, 3], (x[:, 3] - mean[3]) / np.sqrt(var[3] + 1e-5), rtol=1e-14)

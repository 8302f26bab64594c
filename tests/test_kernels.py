"""The contract of every kernel module, however data is cut: sums, maps, forward and backward, layouts, layers.

What only one module has, such as threads or tickets, is tested in a file of that module. test_accuracy.py has the
promises of the library, N1 to N3, by each of these modules.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import shim
from support import kernels
from support.kernels import COMPILED, Case, assert_map, both, coefficients, cuts_of, data, exact_of

import arraybn
from arraybn import reference
from arraybn._arrays.namespaces import FLOATS
from arraybn.kernels import cuda
from arraybn.testing import check_batch_norm

ALL, CUT, GPU = kernels.KINDS, ("cpu", "cuda", "fused"), ("cuda", "fused")


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Yield a module that serves NumPy arrays, by (kind, cut) or by its kind alone."""
    given = (request.param,) if isinstance(request.param, str) else request.param
    with kernels.case_of(*given) as made:
        yield made


def of_cuts(*kinds: str) -> Any:
    return pytest.mark.parametrize("case", cuts_of(*kinds), indirect=True)


def of_modules(*kinds: str) -> Any:
    return pytest.mark.parametrize("case", kinds, indirect=True)


@pytest.fixture(params=FLOATS)
def dtype(request: pytest.FixtureRequest, case: Case) -> str:
    """Return each dtype that the module is tested with."""
    if request.param not in kernels.dtypes_of(case.kind):
        pytest.skip("one dtype shows the loops, without the compiler")
    return str(request.param)


@pytest.fixture
def masked_dtype(dtype: str, case: Case) -> str:
    """Return each dtype, on the CPU but bfloat16, which takes half a minute to compile, and is read as float16 is."""
    if dtype == "bfloat16" and case.kind == "cpu":
        pytest.skip("bfloat16 takes long to compile")
    return dtype


# ---- Accuracy: as long double has it, to rounding --------------------------------------------------------------------


@of_cuts("reference", "cpu", "cuda")
def test_e1_e5_sums_are_exact_to_rounding_however_the_data_is_cut(case: Case, dtype: str) -> None:
    kernels.assert_sums(case, dtype)


@of_cuts("reference", "cpu", "cuda")
def test_e3_e6_maps_are_exact_to_rounding_however_the_data_is_cut(case: Case, dtype: str) -> None:
    kernels.assert_maps(case, dtype)


@of_cuts(*ALL)
def test_e1_e3_a_forward_is_exact_to_rounding(case: Case, dtype: str) -> None:
    kernels.assert_forward(case, dtype)


@of_cuts(*ALL)
def test_e5_e6_a_backward_is_exact_to_rounding(case: Case, dtype: str) -> None:
    kernels.assert_backward(case, dtype)


@of_cuts("cpu", "cuda")
def test_e3_e6_two_sweeps_at_once_have_the_bits_of_one_after_the_other(case: Case, dtype: str) -> None:
    dy, x = data(case.shape, dtype, 1, 0.5), data(case.shape, dtype)
    n, eps, ops = case.shape[0] * case.shape[2], 1e-5, case.ops
    for weight, bias in [(None, None), coefficients(case.shape[1])[:2]]:
        mean, m2, rstd, y = ops.forward(x, weight, bias, eps)
        assert all(map(np.array_equal, (mean, m2), ops.moments(x)))
        np.testing.assert_array_equal(rstd, reference.rstd(m2 / n, eps))
        np.testing.assert_array_equal(y, ops.affine(x, mean, *reference.normalize(rstd, weight, bias)))

        dx, dweight, dbias = ops.backward(dy, x, mean, rstd, weight)
        sums = reference.parameter_gradients(*ops.dots(dy, x, mean), rstd)
        assert all(map(np.array_equal, (dweight, dbias), sums))
        expected = ops.affine2(dy, x, mean, *reference.input_gradient(dweight, dbias, n, rstd, weight))
        np.testing.assert_array_equal(dx, expected)


@of_cuts(*CUT)
def test_sweeps_with_a_mask_are_exact_to_rounding_however_the_data_is_cut(case: Case, masked_dtype: str) -> None:
    for mask in kernels.MASKS if case.kind != "fused" else ("padding",):
        kernels.assert_masked(case, masked_dtype, mask)


@of_cuts("cpu", "cuda")
def test_e1_masked_first_values_cost_no_digit(case: Case) -> None:
    for wide in set(kernels.dtypes_of(case.kind)) & {"float32", "float64"}:
        kernels.assert_far_from_zero(case, wide)


@of_cuts("cpu")
def test_e1_outliers_among_the_first_values_that_count_cost_no_digit(case: Case) -> None:
    t = kernels.with_mask(case, "float32", "half")
    places, positions = np.nonzero(t.where[:, 0])
    t.x[places[:8], :, positions[:8]] = 1e4  # the shift of the first attempt
    kept = np.moveaxis(exact_of(t.x)[0], 1, -1)[t.where[:, 0]]
    exact_m2 = ((kept - kept.sum(axis=0) / max(t.n, 1)) ** 2).sum(axis=0)
    batch, _, _ = case.ops.masked_forward(t.x, None, None, 1e-5, None, reference.Mask(t.where, t.n))
    for m2 in (batch.m2, case.ops.moments(t.x, where=t.where)[1]):
        assert np.all(np.abs(m2 - exact_m2) <= case.rounding("float32").m2 * exact_m2)


@of_cuts("cpu")
def test_n4_a_masked_result_in_place_has_the_same_bits(case: Case) -> None:
    t = kernels.with_mask(case, "float32", "half")
    batch, rstd, y = case.ops.masked_forward(t.x, None, None, 1e-5, None, reference.Mask(t.where, t.n))
    dx = case.ops.masked_backward(t.u, t.x, batch, rstd, None, None, t.where)[0]
    for target in ("dy", "x"):
        inputs = {"dy": t.u.copy(), "x": t.x.copy()}
        found = case.ops.masked_backward(*inputs.values(), batch, rstd, None, inputs[target], t.where)[0]
        assert found is inputs[target]
        np.testing.assert_array_equal(found, dx)
    place = t.x.copy()
    assert case.ops.masked_forward(place, None, None, 1e-5, place, reference.Mask(t.where, t.n))[2] is place
    np.testing.assert_array_equal(place, y)


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, where nothing is compiled
@of_cuts(*CUT)
def test_whatever_is_masked_changes_no_bit_of_the_rest(case: Case, masked_dtype: str) -> None:
    first, *others = (kernels.with_mask(case, masked_dtype, "half", fill) for fill in (0.0, np.nan, -np.inf))
    kept, want = np.broadcast_to(first.where, case.shape), kernels.all_of(case, first)
    for found in (kernels.all_of(case, t) for t in others):
        for got, exact in zip(found, want, strict=True):
            chosen = kept if got.ndim == 3 else ...
            assert got[chosen].tobytes() == exact[chosen].tobytes()
            assert np.isfinite(got[chosen].astype("f8")).all()


@of_cuts("cuda")
def test_a_mask_of_all_true_has_the_bits_of_no_mask_in_each_sweep(case: Case, dtype: str) -> None:
    u, x, v = (data(case.shape, dtype, seed, offset) for seed, offset in ((1, 0.5), (0, 3.0), (2, -0.5)))
    true, ops, (mean, a, b, c) = np.ones((case.shape[0], 1, case.shape[2]), bool), case.ops, coefficients(case.shape[1])
    for with_mask, without in (
        (ops.moments(x, where=true), ops.moments(x)),
        (ops.dots(u, x, mean, where=true), ops.dots(u, x, mean)),
        (ops.dots(u, x, mean, skip_zeros=True), ops.dots(u, x, mean)),
        (ops.affine2(u, x, mean, a, b, c, where=true), ops.affine2(u, x, mean, a, b, c)),
        (ops.affine3(v, u, x, mean, a, b, c, a, where=true), ops.affine3(v, u, x, mean, a, b, c, a)),
    ):
        assert np.asarray(with_mask).tobytes() == np.asarray(without).tobytes()


@of_cuts(*CUT)
def test_two_masked_sweeps_at_once_have_the_bits_of_one_after_the_other(case: Case, masked_dtype: str) -> None:
    t, ops = kernels.with_mask(case, masked_dtype, "half"), case.ops
    weight, bias = coefficients(case.shape[1])[:2]
    mask = reference.Mask(t.where, t.n)
    batch, rstd, y = ops.masked_forward(t.x, weight, bias, 1e-5, None, mask)
    dx, dweight, dbias = ops.masked_backward(t.u, t.x, batch, rstd, weight, None, t.where)
    other, other_rstd, other_y = reference.forward(ops, t.x, weight, bias, 1e-5, mask=mask)
    others = reference.backward(ops, t.u, t.x, batch, rstd, weight, where=t.where)
    pairs = zip(
        (batch.mean, batch.m2, rstd, y, dx, dweight, dbias),
        (other.mean, other.m2, other_rstd, other_y, *others),
        strict=True,
    )
    assert batch.n == t.n
    assert all(got.tobytes() == want.tobytes() for got, want in pairs)


@of_cuts(*ALL)
def test_e1_outliers_among_the_first_values_cost_no_digit_that_is_promised(case: Case, dtype: str) -> None:
    x = data(case.shape, dtype, offset=0.0)
    x[:1, :, :8] = 1e4  # the shift of the first attempt, or of some threads and blocks
    (exact,) = exact_of(x)
    n = case.shape[0] * case.shape[2]
    exact_m2 = ((exact - (exact.sum(axis=(0, 2)) / n)[:, None]) ** 2).sum(axis=(0, 2))
    found = [case.ops.forward(x, None, None, 1e-5)[1]] + ([case.ops.moments(x)[1]] if case.kind != "fused" else [])
    for m2 in found:
        assert np.all(np.abs(m2 - exact_m2) <= case.rounding(dtype).m2 * exact_m2)
        if dtype == "float64" and case.on_gpu:
            assert np.all(np.abs(m2 - exact_m2) <= 4 * np.spacing(exact_m2.astype(np.float64)))


@of_cuts(*ALL)
def test_n3_constant_channels_give_exactly_bias_however_cut(case: Case, dtype: str) -> None:
    values = np.linspace(-3.3, 1e4, case.shape[1])
    x = np.broadcast_to(values[:, None], case.shape).astype(data((1,), dtype).dtype)
    bias = coefficients(case.shape[1])[0]
    mean, m2, _, y = case.ops.forward(x, None, bias, 1e-5)
    np.testing.assert_array_equal(mean, x[0, :, 0].astype("f8"))
    np.testing.assert_array_equal(m2, 0)
    rounded = bias if dtype == "float64" else bias.astype("f4")  # half precision is rounded to by way of float32
    np.testing.assert_array_equal(y, np.broadcast_to(rounded.astype(x.dtype)[:, None], case.shape))


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy: of the reference, and where nothing is compiled
@of_cuts(*ALL)
@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_nan_and_inf_stay_in_their_channel(case: Case, wide: str) -> None:
    x = data(case.shape, wide)
    clean = case.ops.forward(x, None, None, 1e-5)
    for place, value in itertools.product((0, -1), (np.nan, np.inf, -np.inf)):
        spoiled = x.copy()
        spoiled[place, 0, place] = value
        mean, m2, _, y = case.ops.forward(spoiled, None, None, 1e-5)
        np.testing.assert_array_equal(mean[0], value)
        assert np.isnan(m2[0])
        assert np.all(np.isnan(y[:, 0]))
        np.testing.assert_array_equal(mean[1:], clean[0][1:])
        np.testing.assert_array_equal(y[:, 1:], clean[3][:, 1:])


@pytest.mark.filterwarnings("ignore:overflow")  # of NumPy: of the reference, and where nothing is compiled
@of_cuts("reference", "cpu", "cuda")
def test_e1_squares_beyond_float64_are_inf_as_in_numpy(case: Case) -> None:
    if case.shape[0] * case.shape[2] == 1:
        pytest.skip("one value has no spread")
    for place in (0, -1):
        x = data(case.shape, "float64")
        x[place, 0, place] = 1e200
        assert case.ops.moments(x)[1][0] == np.inf


@of_modules("cpu", "cuda")
@pytest.mark.parametrize("order", ["halves", "random"])
@pytest.mark.parametrize("shape", ["samples", "one plane", "planes", "lines"])
def test_n2_float64_of_two_values_whose_sums_round_the_same_way(case: Case, shape: str, order: str) -> None:
    if not COMPILED:
        pytest.skip("so many values take too long without the compiler")
    many = 2**22 if case.kind == "cpu" else 2**16
    short = 16 if case.kind == "cpu" else 4
    sizes = {"samples": (many, 1, 1), "one plane": (1, 1, many)}
    sizes |= {"planes": (many // short, 1, short), "lines": (many // 8, 8, 1)}
    samples, channels, plane = sizes[shape]
    n = samples * plane
    high = np.arange(n * channels).reshape(sizes[shape]) < n * channels // 2
    if order == "random":
        high = np.random.default_rng(0).random(sizes[shape]) < 0.5
    x = np.where(high, 0.1, 0.0)
    count = high.sum(axis=(0, 2)).astype(np.longdouble)  # so mean and m2 need no sum
    mean = count * np.longdouble(0.1) / n
    m2 = count * (np.longdouble(0.1) - mean) ** 2 + (n - count) * mean**2
    got = case.ops.moments(x)
    assert np.all(abs(got[0] - mean) <= 8 * np.spacing(0.1))
    assert np.all(abs(got[1] / m2 - 1) <= (16 * 2.0**-52 if case.on_gpu else case.rounding("float64").m2))
    rstd = 1 / np.sqrt(m2 / n + np.longdouble(1e-5))
    exact = (x - mean[:, None]) * rstd[:, None]
    scale = abs(exact).max(axis=(0, 2))
    error = abs(arraybn.batch_norm(x, kernels=case.ops)[0] - exact).max(axis=(0, 2)) / np.spacing(scale.astype("f8"))
    assert np.all(error <= 16 * (1 + mean / np.sqrt(m2 / n)))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # of NumPy, where nothing is compiled
@of_modules("cpu", "cuda")
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("columns", [1, 2, 8])
def test_every_half_precision_number_is_read_and_rounded_as_by_numpy(case: Case, half: str, columns: int) -> None:
    kind, affine = data((1,), half).dtype, case.ops.affine
    x = np.arange(0, 2**16, 1 if COMPILED else 128, dtype=np.uint16).view(kind).reshape(-1, columns, 1)
    one, zero = np.ones(columns), np.zeros(columns)
    flushed = case.on_gpu and half == "bfloat16"  # numbers below 2⁻¹²⁶ are 0 on a GPU, as they are in float32
    y = affine(x, zero, one, zero)
    tiny = flushed & (abs(x.astype("f4")) < 2.0**-126)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    np.testing.assert_array_equal(y.astype("f4")[~np.isnan(x)], np.where(tiny, 0, x.astype("f4"))[~np.isnan(x)])
    third = np.float32(1 / 3) if case.on_gpu else np.float64(1 / 3)
    expected = (x.astype(third.dtype) * third).astype("f4").astype(kind).astype("f4")
    got = affine(x, zero, one * float(third), zero).astype("f4")
    normal = (abs(expected) >= 2.0**-125) | (not flushed) | np.isnan(expected)
    np.testing.assert_array_equal(got[normal], expected[normal])
    wide, nothing = np.array([70000.0, 3.4e38, 65519.9, 65520.0, 1e-8, -1e-8]), np.zeros((1, 1, 1), kind)
    rounded = [affine(nothing, zero[:1], one[:1], value).item() for value in wide.reshape(-1, 1)]
    np.testing.assert_array_equal(rounded, wide.astype(np.float32).astype(kind).astype("f4"))


@of_modules("cpu", "cuda")
def test_bfloat16_ties_go_to_even(case: Case) -> None:
    kind = data((1,), "bfloat16").dtype
    x, one, zero = np.ones((1, 1, 1), kind), np.ones(1), np.zeros(1)
    for step, rounded in [(2.0**-8, 1.0), (3 * 2.0**-8, 1.0 + 2.0**-6)]:  # halfway between two neighbours
        assert float(case.ops.affine(x, zero, one, np.array([step])).item()) == rounded


# ---- The same bits ---------------------------------------------------------------------------------------------------


@of_cuts(*CUT)
def test_n4_a_result_in_place_has_the_same_bits(case: Case, dtype: str) -> None:
    dy, x = data(case.shape, dtype, 1, 0.5), data(case.shape, dtype)
    mean, _, rstd, y = case.ops.forward(x, None, None, 1e-5)
    dx = case.ops.backward(dy, x, mean, rstd, None)[0]
    for target in ("dy", "x"):
        inputs = {"dy": dy.copy(), "x": x.copy()}
        result = case.ops.backward(**inputs, mean=mean, rstd=rstd, weight=None, out=inputs[target])[0]
        assert result is inputs[target]
        np.testing.assert_array_equal(result, dx)
    target = x.copy()
    assert case.ops.forward(target, None, None, 1e-5, target)[3] is target
    np.testing.assert_array_equal(target, y)


@of_cuts(*GPU)
def test_n4_no_bit_depends_on_the_order_of_blocks(case: Case, dtype: str) -> None:
    results = []
    for seed, resident in [(0, 3), (0, 3), (1, 1), (2, 7), (3, 2), (2, 9)]:
        with case.again(seed=seed, resident=resident):
            results += [[array.tobytes() for array in both(case, dtype)] for _ in range(1 + (seed == 0))]
    assert all(result == results[0] for result in results)


@of_modules(*CUT)
def test_arrays_that_a_kernel_cannot_take_as_they_are_give_the_same_bits(case: Case, dtype: str) -> None:
    x, ops = data((6, 4, 40), dtype), case.ops
    mean, _, rstd, y = ops.forward(x, None, None, 1e-5)
    want = ops.backward(x, x, mean, rstd, None)
    unaligned, strided, frozen = shim.guarded(x.shape, x.dtype, 1), np.repeat(x, 2, axis=2)[:, :, ::2], x.copy()
    unaligned[...] = x
    frozen.flags.writeable = False
    for array in (unaligned, strided, frozen):
        assert not (array.flags.aligned and array.flags.c_contiguous and array.flags.writeable)
        np.testing.assert_array_equal(ops.forward(array, None, None, 1e-5)[3], y)
        for got, expected in zip(ops.backward(array, array, mean, rstd, None), want, strict=True):
            np.testing.assert_array_equal(got, expected)
    for target in (unaligned, np.empty_like(strided)):
        assert arraybn.batch_norm(x, eps=1e-5, out=target, kernels=ops)[0] is target
        np.testing.assert_array_equal(target, y)


@of_modules(*CUT)
def test_nothing_in_gives_nothing_out(case: Case) -> None:
    for shape in [(0, 3, 5), (4, 3, 0), (0, 3, 1)]:
        x = np.empty(shape, np.float32)
        mean, m2, _, y = case.ops.forward(x, None, None, 1e-5)
        dx, dweight, dbias = case.ops.backward(x, x, mean, mean, None)
        assert y.shape == dx.shape == x.shape
        for vector in (mean, m2, dweight, dbias, *case.ops.dots(x, x, mean)):
            np.testing.assert_array_equal(vector, np.zeros(3))
        out = np.empty_like(x)
        y, saved = arraybn.batch_norm(x, out=out, kernels=case.ops)
        assert y is out
        assert arraybn.batch_norm_backward(x, saved, out=out)[0] is out
    assert not case.on_gpu or not case.gpu.launches


# ---- Running statistics, layers and properties -----------------------------------------------------------------------


@of_modules(*CUT)
@pytest.mark.parametrize("channels", [11, 300])
def test_e4_running_statistics_have_the_bits_of_the_reference(case: Case, channels: int) -> None:
    vectors = coefficients(channels)
    for old_mean, old_var in [("f4", "f4"), ("f8", "f8"), ("f4", "f8"), ("f2", "f2")]:
        mean, var = vectors[0].astype(old_mean), vectors[1].astype(old_var)
        wide = np.repeat(vectors[2:], 2, axis=1)[:, ::2]  # not contiguous
        launches = len(case.gpu.launches) if case.on_gpu else 0
        got = case.ops.update_running_stats(mean, var, *wide, 0.1)
        expected = (reference.update_running(mean, wide[0], 0.1), reference.update_running(var, wide[1], 0.1))
        assert not case.on_gpu or len(case.gpu.launches) - launches == (old_mean == old_var != "f2")
        for new, want, old in zip(got, expected, (mean, var), strict=True):
            assert new.dtype == old.dtype
            assert new is not old
            np.testing.assert_array_equal(new, want)


@of_cuts("cuda")
def test_e3_e7_an_evaluation_is_one_launch_that_reads_vectors_in_their_dtypes(case: Case, dtype: str) -> None:
    x, vectors = data(case.shape, dtype), abs(coefficients(case.shape[1])) + 0.5
    (exact_x,) = exact_of(x)
    for state, parameters in [("f4", "f4"), ("f8", "f4"), ("f4", "f2"), ("f2", "f8"), ("f4", "")]:
        mean, var = vectors[:2].astype(state)
        weight, bias = vectors[2:].astype(parameters or "f4")
        weight = None if not parameters else np.repeat(weight, 2)[::2] if parameters == "f8" else weight  # with gaps
        case.gpu.launches.clear()
        kept_mean, rstd, kept_weight, y = case.ops.evaluate(x, mean, var, weight, bias, 1e-5)
        assert len(case.gpu.launches) == 1
        np.testing.assert_array_equal(kept_mean, mean.astype("f8"))
        np.testing.assert_array_equal(rstd, reference.rstd(var.astype("f8"), 1e-5))
        if weight is None:
            assert kept_weight is None
        else:
            np.testing.assert_array_equal(kept_weight, weight.astype("f8"))
        a, d = rstd if weight is None else rstd * weight.astype("f8"), exact_x - mean.astype("f8")[:, None]
        c = bias.astype("f8")[:, None]
        terms = abs(a[:, None] * d) + abs(c)
        assert_map(y, a[:, None] * d + c, terms, x.dtype, case.rounding(dtype))
    empty = case.ops.evaluate(x[:0], mean, var, weight, bias, 1e-5)
    np.testing.assert_array_equal(empty[1], reference.rstd(var.astype("f8"), 1e-5))
    assert empty[3].shape == x[:0].shape


STEP, EVALUATION = (
    {  # what is launched in a step of training, and in an evaluation with its backward
        "cuda": ["vectors", "moments", "affine", "running", "dots", "affine2"],
        "fused": ["vectors", "forward_resident", "running", "backward_resident"],
    },
    ["affine_fixed", "dots", "affine"],
)


@of_modules(*CUT)
@pytest.mark.parametrize("axis", [1, -1])
def test_a_layer_trains_and_evaluates_as_with_the_reference(
    case: Case, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (6, 4, 7, 7) if axis == 1 else (6, 7, 7, 4)
    results = []
    for module in (case.ops, reference):
        kernels.serve_all_by(module, monkeypatch)
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
    if case.on_gpu:
        names = [re.split("_(planes|lines|rows|ring|float)", name)[0] for name, _ in case.gpu.launches]
        assert names == STEP[case.kind] * 3 + EVALUATION


@of_modules(*ALL)
@pytest.mark.parametrize("narrow", ["float16", "float32"])
def test_every_property_of_a_batch_norm_holds(case: Case, narrow: str) -> None:
    module = reference if case.kind == "reference" else case.ops

    def forward(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return arraybn.batch_norm(x, weight, bias, eps=eps, kernels=module)[0]

    def backward(dy: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        _, saved = arraybn.batch_norm(x, weight, bias, eps=eps, kernels=module)
        return arraybn.batch_norm_backward(dy, saved)

    def update(running_mean: Any, running_var: Any, x: Any, momentum: float) -> Any:
        batch = arraybn.moments(x, kernels=module)
        return arraybn.update_running_stats(running_mean, running_var, batch, momentum)

    check_batch_norm(forward, backward, update, dtype=narrow, examples=5)


def test_each_module_was_tested_with_each_dtype() -> None:
    assert {kernels.dtypes_of(kind) for kind in ALL if COMPILED or kind != "cpu"} == {tuple(FLOATS)}
    assert cuda.DTYPES.keys() == {data((1,), name).dtype.char for name in FLOATS}

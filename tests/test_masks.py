"""Masks: `where` in every function and layer, on every namespace, and over ranks and parts."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.homes import Home
from support.kernels import case_of
from support.libraries import need

import arraybn
from arraybn import kernels, reference
from arraybn.testing import BatchNormError, ThreadComm, assert_close, check_batch_norm, exact_batch_norm
from arraybn.testing.properties import PROPERTIES, WITH_MASK
from arraybn.testing.strategies import LAYOUTS, layouts

NAMES = ("y", "dx", "dweight", "dbias", "y_dot", "ddy", "ddx", "ddweight")
AWFUL = (np.nan, np.inf, -np.inf, 3e38)


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Yield each backend for NumPy arrays; the CUDA kernels run on the CPU."""
    if request.param == "cuda":
        with case_of("fused") as case:
            yield case.ops
        return
    if request.param == "cpu":
        need("numba")
    yield request.param


def drawn(shape: tuple[int, ...], seed: int = 0, share: float = 0.6) -> SimpleNamespace:
    """Return a batch with a mask, and all that derivatives are given, in float64."""
    rng = np.random.default_rng(seed)
    x, dy, v, x_dot = rng.normal(size=(4, *shape))
    weight, bias, v_weight, v_bias = rng.normal(size=(4, shape[1]))
    where = rng.random((shape[0], *shape[2:])) < share
    names = {"x": 2 * x + 3, "dy": dy, "v": v, "x_dot": x_dot, "weight": weight, "bias": bias}
    return SimpleNamespace(**names, v_weight=v_weight, v_bias=v_bias, where=where)


def all_results(t: SimpleNamespace, eps: float = 1e-3, **options: Any) -> tuple[Any, ...]:
    """Return y, and what every derivative of the library returns, in the order of `NAMES`."""
    y, saved = arraybn.batch_norm(t.x, t.weight, t.bias, where=t.where, eps=eps, **options)
    gradients = arraybn.batch_norm_backward(t.dy, saved)
    y_dot = arraybn.batch_norm_jvp(t.x_dot, saved, t.v_weight, t.v_bias)
    return (y, *gradients, y_dot, *arraybn.batch_norm_double_backward(t.v, t.dy, saved, t.v_weight, t.v_bias))


def written_out(x: Any, weight: Any, bias: Any, where: Any, eps: float) -> Any:
    """Return y by the definition, in PyTorch: x (N, C, S), where (N, 1, S) of 0 and 1."""
    n = where.sum()
    mean = (x * where).sum((0, 2), keepdim=True) / n
    var = ((x - mean) ** 2 * where).sum((0, 2), keepdim=True) / n
    return weight[:, None] * (x - mean) / (var + eps).sqrt() + bias[:, None]


def by_autograd(t: SimpleNamespace, eps: float) -> list[Any]:
    """Return the results in the order of `NAMES`, by PyTorch's autograd on `written_out`, in float64."""
    torch = need("torch")
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in vars(t).items()}
    g = SimpleNamespace(**tensors)
    where = g.where[:, None]
    leaves = [leaf.requires_grad_() for leaf in (g.x, g.weight, g.bias, g.dy)]
    y = written_out(*leaves[:3], where, eps)
    dx, dweight, dbias = torch.autograd.grad(y, leaves[:3], g.dy, create_graph=True)
    penalty = (g.v * dx).sum() + (g.v_weight * dweight).sum() + (g.v_bias * dbias).sum()
    ddy, ddx, ddweight = torch.autograd.grad(penalty, (g.dy, g.x, g.weight))
    u = torch.zeros_like(g.dy, requires_grad=True)  # u·y_dot is the derivative along the tangents, and linear in u
    pulled = torch.autograd.grad(written_out(*leaves[:3], where, eps), leaves[:3], u, create_graph=True)
    along = sum((a * b).sum() for a, b in zip(pulled, (g.x_dot, g.v_weight, g.v_bias), strict=True))
    (y_dot,) = torch.autograd.grad(along, u)
    return [result.detach().numpy() for result in (y, dx, dweight, dbias, y_dot, ddy, ddx, ddweight)]


def same_bits(got: Any, want: Any) -> bool:
    """Return True if two NumPy arrays have the same shape, dtype and bytes, in C order."""
    return bool(got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes())


# ---- The formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("shape", [(5, 3, 7), (2, 4, 40), (40, 2, 1), (3, 2, 9000)])
def test_e5_e6_e8_e9_are_those_of_autograd_on_the_written_out_formula(
    shape: tuple[int, ...], eps: float, backend: Any
) -> None:
    t = drawn(shape)
    for name, got, want in zip(NAMES, all_results(t, eps, kernels=backend), by_autograd(t, eps), strict=True):
        bound = 1e-13 * abs(want).max()  # a few hundred ulp of float64: both sum up to 18,000 values
        assert abs(got - want).max() <= bound, name
        assert not abs(1.001 * got - want).max() <= bound, name


def test_without_weight_and_bias_the_gradients_are_those_of_weight_one() -> None:
    t = drawn((6, 3, 4))
    t.weight, t.bias = np.ones(3), np.zeros(3)
    want = all_results(t)
    _, saved = arraybn.batch_norm(t.x, where=t.where, eps=1e-3)
    dx, dweight, dbias = arraybn.batch_norm_backward(t.dy, saved)
    assert dweight is None
    assert dbias is None
    assert same_bits(dx, want[1])


def test_every_namespace_gives_what_the_oracle_gives(home: Home) -> None:
    t = drawn((8, 3, 9), seed=1)
    x, dy, weight, bias = (np.asarray(array, "f4") for array in (t.x, t.dy, t.weight, t.bias))
    x = np.where(t.where[:, None], x, np.nan).astype("f4")
    dy[np.isnan(x)] = 0
    exact = exact_batch_norm(x, weight, bias, dy, eps=1e-5, where=t.where)
    arrays = [home.array(array, "float32") for array in (x, weight, bias)]
    y, saved = arraybn.batch_norm(*arrays, where=home.array(t.where))
    dx, dweight, dbias = arraybn.batch_norm_backward(home.array(dy, "float32"), saved)
    assert saved.moments.n == np.count_nonzero(t.where)
    wide = home.wide == "float64"
    for got, want, scale, ulp in (
        (y, exact.y, exact.y_scale, 4 if wide else 64),
        (dx, exact.dx, exact.dx_scale, 12 if wide else 64),
        (dweight, exact.dweight, abs(dy).sum((0, 2)) * 4, 2 if wide else 64),
        (dbias, exact.dbias, abs(dy).sum((0, 2)), 2 if wide else 64),
    ):
        got = np.asarray(home.numpy(got), "f4")
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        finite = ~np.isnan(want)
        got, want, scale = got[finite], want[finite], np.broadcast_to(scale, finite.shape)[finite]
        assert_close(got, want, ulp=ulp, scale=scale)
        with pytest.raises(AssertionError):
            assert_close(got + np.float32(1e-3) * abs(got).max(), want, ulp=ulp, scale=scale)


def test_further_derivatives_on_every_namespace(home: Home) -> None:
    t = drawn((4, 3, 5), seed=2)
    want = all_results(t)
    arrays = {name: home.array(value, None if name == "where" else "float32") for name, value in vars(t).items()}
    for name, got, exact in zip(NAMES, all_results(SimpleNamespace(**arrays)), want, strict=True):
        got = np.asarray(home.numpy(got), "f8")
        bound = 64 * 2.0**-23 * abs(exact).max()  # inputs and result rounded to float32, and sums in float32 at worst
        assert abs(got - exact).max() <= bound, name
        assert not abs(1.001 * got - exact).max() <= bound, name


# ---- Masking out is leaving out --------------------------------------------------------------------------------------


def left_out(t: SimpleNamespace) -> Any:
    """Return the values of the batch alone, (n, C)."""
    return np.moveaxis(t.x, 1, -1)[t.where]


shapes = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 40))
dtypes = st.sampled_from(["float16", "float32", "float64"])
served = st.sampled_from(["reference", "cpu"])


@given(shapes, dtypes, layouts(), layouts(), served, st.integers(0, 2**16), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_masking_out_is_leaving_out(
    shape: tuple[int, ...], dtype: str, layout: Any, mask_layout: Any, chosen: str, seed: int, share: float
) -> None:
    if chosen == "cpu":
        need("numba")
    t = drawn(shape, seed, share)
    t.x = t.x.astype(dtype)
    values, where = left_out(t), mask_layout(t.where[:, None])[:, 0]
    spoiled = layout(np.where(t.where[:, None], t.x, np.asarray(np.nan, dtype)))
    got = arraybn.moments(spoiled, where=where, kernels=chosen)
    want = arraybn.moments(values, kernels="reference")
    assert got.n == want.n == len(values)
    ulp = 8 * np.finfo("f8").eps  # sums of at most 360 values, in another order
    size = abs(values).max(0, initial=0.0).astype("f8")
    assert (abs(got.mean - want.mean) <= ulp * size).all()
    assert (abs(got.m2 - want.m2) <= ulp * (want.m2 + got.n * size * ulp * size)).all()
    y, saved = arraybn.batch_norm(spoiled, where=where, kernels=chosen)
    alone, _ = arraybn.batch_norm(values, kernels="reference")
    np.testing.assert_allclose(
        np.moveaxis(y, 1, -1)[t.where].astype("f8"), alone, rtol=4 * np.finfo(dtype).eps, atol=4 * np.finfo(dtype).eps
    )
    assert y.dtype == dtype
    assert y.strides == arraybn.batch_norm(spoiled, kernels=chosen)[0].strides
    assert repr(saved).endswith(f"n={got.n}, backend={chosen!r})") or chosen == "cpu"


@pytest.mark.parametrize("channel_axis", [0, 1, 2, 3, -1])
def test_the_mask_has_the_shape_of_x_without_the_channels(channel_axis: int, backend: Any) -> None:
    t = drawn((4, 3, 2, 5))
    want = all_results(t, kernels=backend)
    for name in ("x", "dy", "v", "x_dot"):
        setattr(t, name, np.moveaxis(getattr(t, name), 1, channel_axis))
    got = all_results(t, channel_axis=channel_axis, kernels=backend)
    for name, a, b in zip(NAMES, got, want, strict=True):
        if a.ndim == 4:
            a = np.moveaxis(a, channel_axis, 1)
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout_of_x_and_of_the_mask_gives_the_same_statistics(layout: str, backend: Any) -> None:
    t = drawn((4, 3, 6))
    want = all_results(t, kernels=backend)
    for name in ("x", "dy", "v", "x_dot"):
        setattr(t, name, LAYOUTS[layout](getattr(t, name)))
    t.where = LAYOUTS[layout](t.where)
    for name, got, exact in zip(NAMES, all_results(t, kernels=backend), want, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-11, atol=1e-12, err_msg=name)


MANY_TILES = [(20, 64, 784), (2000, 70, 20), (30000, 24, 1), (6000, 600, 1), (5, 3, 100000), (70000, 5, 1)]


@pytest.mark.parametrize("shape", MANY_TILES)
def test_many_tiles_on_any_number_of_threads_give_what_the_reference_gives(shape: tuple[int, ...]) -> None:
    need("numba")
    t = drawn(shape, share=0.5)
    kept = np.broadcast_to(t.where[:, None], shape)
    for name in ("x", "dy", "v", "x_dot"):
        setattr(t, name, np.asarray(getattr(t, name), "f4"))
    t.x, t.dy = np.where(kept, t.x, np.float32(np.nan)), np.where(kept, t.dy, np.float32(0))
    results, threads = [], arraybn.get_num_threads()
    try:
        for number in (1, 3):
            arraybn.set_num_threads(number)
            results.append(all_results(t, kernels="cpu"))
    finally:
        arraybn.set_num_threads(threads)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    for name, got, want in zip(NAMES, results[0], all_results(t, kernels="reference"), strict=True):
        finite = np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(got), finite)
        assert abs(got - want)[finite].max() <= 1e-6 * abs(want[finite]).max(), name


@pytest.mark.parametrize("shape", [(2, 2, 2**17), (2**17, 16, 1), (2**15, 2, 8)])
def test_e1_a_shift_that_was_far_off_is_tried_again(shape: tuple[int, ...]) -> None:
    need("numba")
    t = drawn(shape, share=0.5)
    samples, places = (indices[:8] for indices in np.nonzero(t.where))
    t.x[samples, :, places] = 1e6  # the first values that count
    exact = left_out(t).astype(np.longdouble)
    exact_m2 = ((exact - exact.mean(0)) ** 2).sum(0)
    y, saved = arraybn.batch_norm(np.where(t.where[:, None], t.x, np.nan), where=t.where, kernels="cpu")
    for found in (saved.moments, arraybn.moments(t.x, where=t.where, kernels="cpu")):
        assert (abs(found.m2 - exact_m2) <= 100 * 2.0**-53 * exact_m2).all()  # with the first shift some 1e4·2⁻⁵³
    assert not np.isnan(y[np.broadcast_to(t.where[:, None], shape)]).any()


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5), (4, 1), (1, 1), (3, 4, 5)])
def test_a_mask_is_broadcast_to_the_positions(shape: tuple[int, ...], backend: Any) -> None:
    where = np.random.default_rng(0).random(shape) < 0.7
    t = drawn((2, 3, 3, 4, 5) if len(shape) == 3 else (4, 3, 5))
    positions = t.where.shape
    t.where = where
    got = all_results(t, kernels=backend)
    t.where = np.broadcast_to(where, positions).copy()
    assert all(same_bits(a, b) for a, b in zip(got, all_results(t, kernels=backend), strict=True))


# ---- What changes nothing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(5, 3, 7), (9, 4, 1), (2, 3, 600), (2, 300, 5), (70, 1, 3)])
def test_what_is_masked_changes_no_other_bit(shape: tuple[int, ...], dtype: str, backend: Any) -> None:
    t = drawn(shape, share=0.5)
    kept = np.broadcast_to(t.where[:, None], shape)
    t.dy = np.where(kept, t.dy, 0)
    for name in ("x", "dy", "v", "x_dot"):
        setattr(t, name, getattr(t, name).astype(dtype))
    first = all_results(t, kernels=backend)
    moments = arraybn.moments(t.x, where=t.where, kernels=backend)
    rng = np.random.default_rng(3)
    for value in (*AWFUL, None):
        for name in ("x", "x_dot", "v"):
            filled = rng.normal(size=shape) * 100 if value is None else value
            with np.errstate(over="ignore"):
                setattr(t, name, np.where(kept, getattr(t, name), filled).astype(dtype))
        with np.errstate(all="ignore"):  # at the masked positions themselves
            results = all_results(t, kernels=backend)
        for name, got, want in zip(NAMES, results, first, strict=True):
            assert same_bits(got[kept], want[kept]) if got.ndim > 1 else same_bits(got, want), (name, value)
        again = arraybn.moments(t.x, where=t.where, kernels=backend)
        assert same_bits(again.mean, moments.mean)
        assert same_bits(again.m2, moments.m2)
    assert np.isfinite(np.concatenate([result.ravel() for result in first])).all()


def test_what_is_masked_changes_no_other_bit_on_any_namespace(home: Home) -> None:
    t = drawn((4, 3, 6), share=0.5)
    kept = np.broadcast_to(t.where[:, None], t.x.shape)
    results = []
    for filling in (0.0, *AWFUL):
        x = home.array(np.where(kept, t.x, filling), "float32")
        dy = home.array(np.where(kept, t.dy, 0), "float32")
        y, saved = arraybn.batch_norm(x, where=home.array(t.where))
        dx, _, _ = arraybn.batch_norm_backward(dy, saved)
        results.append([home.numpy(array)[kept] for array in (y, dx)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_dx_of_a_masked_position_is_that_of_a_constant_scale() -> None:
    t = drawn((5, 3, 7))
    t.x = np.where(t.where[:, None], t.x, np.nan)
    t.dy = np.where(t.where[:, None], t.dy, 0)
    _, saved = arraybn.batch_norm(t.x, t.weight, where=t.where)
    dx, _, _ = arraybn.batch_norm_backward(t.dy, saved)
    assert (dx[~np.broadcast_to(t.where[:, None], dx.shape)] == 0).all()
    assert abs(dx.sum((0, 2))).max() < 1e-13


@given(shapes, dtypes, layouts(), served, st.integers(0, 2**16))
def test_a_mask_of_all_true_is_no_mask(shape: tuple[int, ...], dtype: str, layout: Any, chosen: str, seed: int) -> None:
    if chosen == "cpu":
        need("numba")
    t = drawn(shape, seed)
    for name in ("x", "dy", "v", "x_dot"):
        setattr(t, name, layout(getattr(t, name).astype(dtype)))
    t.where = np.ones_like(t.where)
    got = all_results(t, kernels=chosen)
    t.where = None
    assert all(same_bits(a, b) for a, b in zip(got, all_results(t, kernels=chosen), strict=True))


def test_the_sweeps_of_the_reference_do_the_same_with_a_mask_of_all_true() -> None:
    t = drawn((5, 3, 7))
    true, coefficients = np.ones((5, 1, 7), bool), (t.weight, t.bias, t.v_weight, t.v_bias)
    mean = np.zeros(3)
    for got, want in (
        (reference.moments(t.x, true), reference.moments(t.x)),
        (reference.dots(t.dy, t.x, mean, true), reference.dots(t.dy, t.x, mean)),
        (reference.dots(t.dy, t.x, mean, skip_zeros=True), reference.dots(t.dy, t.x, mean)),
        (
            [reference.affine2(t.dy, t.x, mean, *coefficients[:3], where=true)],
            [reference.affine2(t.dy, t.x, mean, *coefficients[:3])],
        ),
        (
            [reference.affine3(t.v, t.dy, t.x, mean, *coefficients, where=true)],
            [reference.affine3(t.v, t.dy, t.x, mean, *coefficients)],
        ),
    ):
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@given(shapes, served, st.integers(0, 2**16))
def test_a_permutation_of_masked_values_changes_nothing(shape: tuple[int, ...], chosen: str, seed: int) -> None:
    if chosen == "cpu":
        need("numba")
    t = drawn(shape, seed, 0.5)
    first = arraybn.moments(t.x, where=t.where, kernels=chosen)
    lines = np.moveaxis(t.x, 1, -1).copy()
    lines[~t.where] = np.random.default_rng(seed).permutation(lines[~t.where])
    again = arraybn.moments(np.moveaxis(lines, -1, 1), where=t.where, kernels=chosen)
    permuted = np.ascontiguousarray(np.moveaxis(lines, -1, 1))
    assert same_bits(arraybn.moments(permuted, where=t.where, kernels=chosen).m2, first.m2)
    np.testing.assert_allclose(again.mean, first.mean, rtol=1e-13, atol=1e-13)


def test_only_the_values_of_the_mask_count_and_not_its_bytes(backend: Any) -> None:
    t = drawn((4, 3, 6))
    want = all_results(t, kernels=backend)
    bytes_ = np.where(t.where, np.arange(1, 25).reshape(4, 6), 0).astype("u1")  # any byte but 0 is True
    gaps = np.full((8, 12), 255, "u1").view(bool)
    gaps[::2, ::2] = t.where
    for where in (bytes_.view(bool), gaps[::2, ::2], np.asfortranarray(t.where)):
        t.where = where
        assert all(same_bits(a, b) for a, b in zip(all_results(t, kernels=backend), want, strict=True))


@pytest.mark.parametrize("value", [3e7, 0.1, -1.0 / 3])
def test_n3_a_channel_that_is_constant_over_the_mask_gives_exactly_bias(value: float, backend: Any) -> None:
    t = drawn((7, 3, 11), share=0.5)
    t.x = np.where(t.where[:, None], value, t.x)
    y, saved = arraybn.batch_norm(t.x, t.weight, t.bias, where=t.where, kernels=backend)
    assert (np.moveaxis(y, 1, -1)[t.where] == t.bias).all()
    assert (saved.moments.m2 == 0).all()
    assert (saved.moments.mean == value).all()


def test_a_forward_keeps_a_mask_of_its_own(backend: Any) -> None:
    t = drawn((4, 3, 6))
    want = all_results(t, kernels=backend)
    mask = t.where.copy()
    _, saved = arraybn.batch_norm(t.x, t.weight, t.bias, where=mask, eps=1e-3, kernels=backend)
    mask[...] = ~mask
    assert same_bits(arraybn.batch_norm_backward(t.dy, saved)[0], want[1])


def test_the_mask_and_other_arguments_stay_as_they_are(backend: Any) -> None:
    t = drawn((4, 3, 6))
    before = copy.deepcopy(vars(t))
    all_results(t, kernels=backend)
    assert all(same_bits(value, before[name]) for name, value in vars(t).items())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_go_into_out_and_over_x_and_dy(dtype: str, backend: Any) -> None:
    t = drawn((4, 3, 50))
    x, dy = t.x.astype(dtype), t.dy.astype(dtype)
    want = arraybn.batch_norm(x, where=t.where, kernels=backend)
    dx = arraybn.batch_norm_backward(dy, want[1])[0]
    for place in (np.empty_like(x), dy.copy()):
        dy_or_place = place if place.tobytes() == dy.tobytes() else dy
        assert arraybn.batch_norm_backward(dy_or_place, want[1], out=place)[0] is place
        assert same_bits(place, dx)
    out = np.full_like(x, 7)
    assert arraybn.batch_norm(x, where=t.where, kernels=backend, out=out)[0] is out
    assert same_bits(out, want[0])
    assert arraybn.batch_norm(x, where=t.where, kernels=backend, out=x)[0] is x
    assert same_bits(x, want[0])


def test_a_wide_dy_is_not_rounded_before_its_sums() -> None:
    t = drawn((6, 3, 4))
    x, dy = t.x.astype("f2"), (1e-9 * t.dy).astype("f4")
    _, saved = arraybn.batch_norm(x, np.ones(3), where=t.where)
    _, want = arraybn.batch_norm(x.astype("f8"), np.ones(3), where=t.where)
    got, exact = (arraybn.batch_norm_backward(dy, one)[1] for one in (saved, want))
    assert got.any()
    np.testing.assert_allclose(got, exact, rtol=1e-12)


# ---- Few values, and fixed statistics --------------------------------------------------------------------------------


def test_no_true_at_all_is_an_empty_batch(home: Home) -> None:
    t = drawn((4, 3, 6))
    nothing = home.array(np.zeros((4, 6), bool))
    x = home.array(t.x, "float32")
    moments = arraybn.moments(x, where=nothing)
    assert moments.n == 0
    assert not home.numpy(moments.mean).any()
    assert not home.numpy(moments.m2).any()
    y, saved = arraybn.batch_norm(x, where=nothing, eps=0.25)
    np.testing.assert_allclose(home.numpy(y), 2 * t.x, rtol=1e-6)  # mean 0, var 0
    dx, _, _ = arraybn.batch_norm_backward(x, saved)
    np.testing.assert_allclose(home.numpy(dx), 2 * t.x, rtol=1e-6)
    running = home.array(np.ones(3), "float32")
    for got in arraybn.update_running_stats(running, running, moments, 0.5):
        assert home.numpy(got).tolist() == [1, 1, 1]


def test_evaluation_does_not_look_at_the_mask(backend: Any) -> None:
    t = drawn((4, 3, 6))
    fixed = {"mean": t.v_weight, "var": abs(t.v_bias), "kernels": backend}
    y, saved = arraybn.batch_norm(t.x, t.weight, where=t.where, **fixed)
    want, other = arraybn.batch_norm(t.x, t.weight, **fixed)
    assert same_bits(y, want)
    for got, exact in zip(
        arraybn.batch_norm_backward(t.dy, saved)[:2], arraybn.batch_norm_backward(t.dy, other)[:2], strict=True
    ):
        assert same_bits(got, exact)


# ---- Parts and ranks -------------------------------------------------------------------------------------------------


def parts_of(t: SimpleNamespace, cuts: list[int]) -> list[SimpleNamespace]:
    """Return consecutive parts of the batch; the vectors (C,) are shared."""
    arrays = {name: value for name, value in vars(t).items() if name in ("x", "dy", "v", "x_dot", "where")}
    return [
        SimpleNamespace(**{**vars(t), **{name: value[a:b] for name, value in arrays.items()}})
        for a, b in itertools.pairwise(cuts)
    ]


def together(results: list[Any]) -> list[Any]:
    """Return what the parts give as one: arrays like x one after another, vectors (C,) added up."""
    return [
        np.concatenate(found) if found[0].ndim > 1 else np.sum(found, axis=0) for found in zip(*results, strict=True)
    ]


def check_as_one(results: list[Any], t: SimpleNamespace, eps: float = 1e-3) -> None:
    """Check that the parts give what one call on the whole batch gives, but for rounding."""
    for name, got, want in zip(NAMES, together(results), all_results(t, eps), strict=True):
        bound = 1e-12 * abs(want).max()
        assert abs(got - want).max() <= bound, name
        assert not abs(1.001 * got - want).max() <= bound, name


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_ranks_with_random_masks_give_what_one_rank_gives(size: int, numpy_kernels: None) -> None:
    t = drawn((12, 3, 5), seed=size)
    rng = np.random.default_rng(size)
    cuts = [0, *sorted(rng.integers(0, 13, size - 1).tolist()), 12]
    t.where[cuts[0] : cuts[1]] = False  # a rank without any
    t.where[cuts[-2] :] = True  # a rank that gives no mask
    parts = parts_of(t, cuts)
    parts[-1].where = None

    def work(comm: ThreadComm) -> Any:
        part = parts[comm.rank]
        _, saved = arraybn.batch_norm(part.x, where=part.where, eps=1e-3, comm=comm)
        return all_results(part, comm=comm), saved.moments

    t.v_weight_of_all = None
    found = ThreadComm.run(size, work)
    assert {moments.n for _, moments in found} == {np.count_nonzero(t.where)}
    assert len({moments.mean.tobytes() + moments.m2.tobytes() for _, moments in found}) == 1
    del t.v_weight_of_all
    check_as_one([results for results, _ in found], t)


def test_float32_namespaces_over_ranks_pool_masked_moments() -> None:
    strict = need("array_api_strict")
    t = drawn((8, 3, 4))
    one = all_results(t)
    device = strict.Device("no_float64")

    def work(comm: ThreadComm) -> Any:
        part = slice(comm.rank * 4, comm.rank * 4 + 4)
        x = strict.asarray(t.x[part].astype("f4"), device=device)
        y, _ = arraybn.batch_norm(x, where=strict.asarray(t.where[part], device=device), eps=1e-3, comm=comm)
        return np.asarray(y.to_device(strict.Device("CPU_DEVICE")))

    t.weight, t.bias = np.ones(3), np.zeros(3)
    one = all_results(t)
    np.testing.assert_allclose(np.concatenate(ThreadComm.run(2, work)), one[0], rtol=1e-5, atol=1e-5)


def test_parts_with_masks_give_what_the_whole_gives(backend: Any) -> None:
    t = drawn((9, 3, 4))
    t.where[:2] = False
    parts = parts_of(t, [0, 2, 2, 7, 9])
    whole = arraybn.pool(*(arraybn.moments(p.x, where=p.where, kernels=backend) for p in parts))
    assert whole.n == np.count_nonzero(t.where)
    options = {"moments": whole, "eps": 1e-3, "kernels": backend}
    forwards = [arraybn.batch_norm(p.x, p.weight, p.bias, where=p.where, **options) for p in parts]
    pairs = [(p, saved) for p, (_, saved) in zip(parts, forwards, strict=True)]
    sums = sum(arraybn.batch_norm_sums(p.dy, saved) for p, saved in pairs)
    tangents = sum(arraybn.batch_norm_sums(p.x_dot, saved, tangent=True) for p, saved in pairs)
    second = sum(arraybn.batch_norm_sums(p.dy, saved, v=p.v, v_weight=p.v_weight) for p, saved in pairs)
    results = [
        (
            y,
            *arraybn.batch_norm_backward(p.dy, saved, sums=sums),
            arraybn.batch_norm_jvp(p.x_dot, saved, p.v_weight, p.v_bias, sums=tangents),
            *arraybn.batch_norm_double_backward(p.v, p.dy, saved, p.v_weight, p.v_bias, sums=second),
        )
        for p, (y, saved) in zip(parts, forwards, strict=True)
    ]
    check_as_one(results, t)


def test_sums_of_x_dot_and_of_dy_are_told_apart() -> None:
    t = drawn((6, 3, 4))
    whole = arraybn.moments(t.x, where=t.where)
    _, saved = arraybn.batch_norm(t.x, where=t.where, moments=whole)
    sums, tangents = (arraybn.batch_norm_sums(t.x_dot, saved, tangent=flag) for flag in (False, True))
    assert not np.allclose(sums.values, tangents.values)
    with pytest.raises(ValueError, match=r"sums: expected those of batch_norm_sums\(x_dot, saved, tangent=True\)"):
        arraybn.batch_norm_jvp(t.x_dot, saved, sums=sums)
    with pytest.raises(ValueError, match="tangent: expected the same in all sums; got True and False"):
        sums + tangents
    _, plain = arraybn.batch_norm(t.x, moments=arraybn.moments(t.x))  # without a mask both are the same
    a, b = (arraybn.batch_norm_sums(t.x_dot, plain, tangent=flag) for flag in (False, True))
    assert same_bits(a.values, b.values)
    assert same_bits(*(arraybn.batch_norm_jvp(t.x_dot, plain, sums=found) for found in (a, b)))


# ---- Layers ----------------------------------------------------------------------------------------------------------


def layer_of(kind: Any, *shape: int, **options: Any) -> Any:
    return kind(*shape, **options).to(dtype="float64")


def test_a_layer_takes_a_mask_in_training(numpy_kernels: None) -> None:
    t = drawn((6, 3, 5))
    layer = layer_of(arraybn.BatchNorm1d, 3)
    y = layer(t.x, where=t.where)
    dx = layer.backward(t.dy)
    want, saved = arraybn.batch_norm(t.x, np.ones(3), np.zeros(3), where=t.where)
    assert same_bits(y, want)
    assert same_bits(dx, arraybn.batch_norm_backward(t.dy, saved)[0])
    values = left_out(t)
    np.testing.assert_allclose(layer.running_mean, 0.1 * values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, 0.9 + 0.1 * values.var(0, ddof=1), rtol=1e-12)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize(("kind", "shape"), [("1d", (6, 3)), ("2d", (2, 3, 4, 5)), ("3d", (2, 3, 2, 4, 5))])
def test_every_layer_takes_a_mask(kind: str, shape: tuple[int, ...]) -> None:
    t = drawn(shape, share=0.9)
    layer = getattr(arraybn, f"BatchNorm{kind}")(3, affine=False)
    assert same_bits(layer(t.x, where=t.where), arraybn.batch_norm(t.x, where=t.where)[0])
    assert same_bits(layer.forward(t.x, where=t.where), arraybn.batch_norm(t.x, where=t.where)[0])


def test_in_evaluation_a_mask_has_no_effect() -> None:
    t = drawn((6, 3, 5))
    layer = layer_of(arraybn.BatchNorm1d, 3).eval()
    assert same_bits(layer(t.x, where=t.where), layer(t.x))
    without = layer_of(arraybn.BatchNorm1d, 3, track_running_stats=False).eval()  # the batch's own statistics
    assert same_bits(without(t.x, where=t.where), arraybn.batch_norm(t.x, np.ones(3), np.zeros(3), where=t.where)[0])
    with pytest.raises(ValueError, match="where: expected shape"):
        layer(t.x, where=t.where[:, :2])


def test_a_layer_keeps_its_state_if_nothing_counts_and_refuses_one_value() -> None:
    t = drawn((6, 3, 5))
    layer = layer_of(arraybn.BatchNorm1d, 3)
    before = {name: np.copy(value) for name, value in layer.state_dict().items()}
    y = layer(t.x, where=np.zeros((6, 5), bool))
    assert y.shape == t.x.shape
    layer.backward(np.zeros_like(y))
    one = np.zeros((6, 5), bool)
    one[2, 3] = True
    text = "Expected more than 1 value per channel when training, got input size (6, 3, 5) with one True in where."
    with pytest.raises(ValueError, match=re.escape(text)):
        layer(t.x, where=one)
    assert all(same_bits(np.asarray(value), before[name]) for name, value in layer.state_dict().items())
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("size", [2, 3])
def test_sync_batch_norm_with_masks_gives_what_one_layer_gives(size: int, numpy_kernels: None) -> None:
    t = drawn((12, 3, 5))
    t.where[:2] = False
    cuts = [0, 2, 9, 12] if size == 3 else [0, 2, 12]
    parts = parts_of(t, cuts)

    def work(comm: ThreadComm) -> Any:
        layer = layer_of(arraybn.SyncBatchNorm, 3, comm=comm)
        part = parts[comm.rank]
        y = layer(part.x, where=part.where)
        dx = layer.backward(part.dy)
        return y, dx, layer.running_mean, layer.running_var, layer.num_batches_tracked

    layer = layer_of(arraybn.BatchNorm1d, 3)
    want = layer(t.x, where=t.where), layer.backward(t.dy)
    found = ThreadComm.run(size, work)
    for index in (0, 1):
        np.testing.assert_allclose(np.concatenate([f[index] for f in found]), want[index], rtol=1e-11, atol=1e-12)
    for _, _, mean, var, count in found:
        np.testing.assert_allclose(mean, layer.running_mean, rtol=1e-13)
        np.testing.assert_allclose(var, layer.running_var, rtol=1e-13)
        assert count == 1
    assert len({mean.tobytes() + var.tobytes() for _, _, mean, var, _ in found}) == 1


def test_a_wrong_mask_on_one_rank_is_an_error_on_all() -> None:
    t = drawn((4, 3, 5))

    def work(comm: ThreadComm) -> Any:
        layer = layer_of(arraybn.SyncBatchNorm, 3, comm=comm)
        where = t.where[:, :2] if comm.rank else t.where
        with pytest.raises(arraybn.SyncError, match=r"rank 1: where: expected shape \(4, 5\)"):
            layer(t.x, where=where)
        return layer(t.x, where=t.where)  # all go on together

    first, second = ThreadComm.run(2, work)
    assert same_bits(first, second)


def test_one_true_over_all_ranks_is_the_plain_error_on_each() -> None:
    t = drawn((4, 3, 5))
    one = np.zeros((4, 5), bool)
    one[1, 1] = True

    def work(comm: ThreadComm) -> None:
        layer = layer_of(arraybn.SyncBatchNorm, 3, comm=comm)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            layer(t.x, where=one & (comm.rank == 0))
        assert layer.num_batches_tracked == 0

    ThreadComm.run(2, work)


# ---- Kernel modules --------------------------------------------------------------------------------------------------


def test_a_kernel_module_without_masks_is_replaced_by_the_reference() -> None:
    t = drawn((4, 3, 5))
    own = SimpleNamespace(
        moments=lambda x, /: reference.moments(x),
        dots=lambda u, x, mean, /: reference.dots(u, x, mean),
        affine=reference.affine,
        affine2=lambda u, x, mean, a, b, c, out=None: reference.affine2(u, x, mean, a, b, c, out),
    )
    want = all_results(t, kernels="reference")
    assert all(same_bits(a, b) for a, b in zip(all_results(t, kernels=own), want, strict=True))
    t.where = None
    want = all_results(t, kernels="reference")
    assert all(same_bits(a, b) for a, b in zip(all_results(t, kernels=own), want, strict=True))
    assert kernels.for_masks(kernels.select(t.x, own)).name == "reference"


def test_a_kernel_module_with_masks_is_used() -> None:
    t, calls = drawn((4, 3, 5)), []

    def noting(name: str) -> Any:
        def sweep(*given: Any, **options: Any) -> Any:
            calls.append((name, options.get("where") is not None or bool(options.get("skip_zeros"))))
            return getattr(reference, name)(*given, **options)

        return sweep

    own = SimpleNamespace(MASKS=True, **{name: noting(name) for name in kernels.SWEEPS})
    want = all_results(t, kernels="reference")
    assert all(same_bits(a, b) for a, b in zip(all_results(t, kernels=own), want, strict=True))
    assert {("moments", True), ("dots", True), ("affine2", True), ("affine3", True)} <= set(calls)


# ---- JAX and PyTorch -------------------------------------------------------------------------------------------------


def test_a_mask_of_known_values_works_inside_jit_and_a_traced_one_is_an_error() -> None:
    jax, jnp = need("jax"), need("jax.numpy")
    t = drawn((4, 3, 5))
    x, where = jnp.asarray(t.x), jnp.asarray(t.where)

    def forward(x: Any, where: Any) -> Any:
        y, saved = arraybn.batch_norm(x, where=where)
        return y, arraybn.batch_norm_backward(x, saved)[0]

    for got, want in zip(jax.jit(lambda x: forward(x, where))(x), forward(x, where), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="where: expected a mask with values, because they are counted; got a JAX"):
        jax.jit(forward)(x, where)


# ---- The kit knows masks ---------------------------------------------------------------------------------------------


def forward(x: Any, weight: Any, bias: Any, eps: float, where: Any) -> Any:
    return arraybn.batch_norm(x, weight, bias, eps=eps, where=where)[0]


def backward(dy: Any, x: Any, weight: Any, bias: Any, eps: float, where: Any) -> Any:
    return arraybn.batch_norm_backward(dy, arraybn.batch_norm(x, weight, bias, eps=eps, where=where)[1])


def update(mean: Any, var: Any, x: Any, momentum: float, where: Any) -> Any:
    return arraybn.update_running_stats(mean, var, arraybn.moments(x, where=where), momentum)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_kit_passes_our_functions(dtype: str) -> None:
    accuracy = "sums" if dtype == "float64" else "full"  # there is no wider dtype for the sums of float64
    verdict = check_batch_norm(forward, backward, update, dtype=dtype, accuracy=accuracy, where=True, examples=5)
    assert verdict.checked == len(PROPERTIES) + len(WITH_MASK)
    assert not verdict.faults


def test_the_kit_passes_our_functions_in_another_namespace_and_of_other_shapes() -> None:
    check_batch_norm(forward, backward, xp=need("torch"), where=True, examples=2)

    def of_lines(x: Any, weight: Any, bias: Any, eps: float, where: Any) -> Any:
        assert x.ndim == 2
        assert where.shape == x.shape[:1]
        return forward(x, weight, bias, eps, where)

    assert "(N, C) alone" in str(check_batch_norm(of_lines, where=True, examples=2))


def written(x: Any, where: Any, eps: float, n: float) -> tuple[Any, Any, Any]:
    """Return mean and rstd (C, 1), and the mask (N, 1, S), in float64; NaN in the padding stays out."""
    kept = where[:, None]
    x = np.where(kept, x.astype("f8"), 0)
    mean = x.sum((0, 2), keepdims=True)[0] / n
    return mean, 1 / np.sqrt((np.where(kept, x - mean, 0) ** 2).sum((0, 2), keepdims=True)[0] / n + eps), kept


def y_with(n: Any = lambda where: where.sum(), spreads: bool = False, zero: bool = False) -> Any:
    """Return a forward with a fault: another n, a NaN that spreads, or 0 at masked positions."""

    def forward(x: Any, weight: Any, bias: Any, eps: float, where: Any) -> Any:
        mean, rstd, kept = written(x, where, eps, n(where))
        mean = mean + (0 * x.astype("f8")).sum((0, 2), keepdims=True)[0] if spreads else mean
        y = weight[:, None] * ((x - mean) * rstd) + bias[:, None]
        return np.where(kept, y, 0 if zero else y).astype(x.dtype)

    return forward


def dx_with(masked_sums: bool = False, everywhere: bool = False, spreads: bool = False) -> Any:
    """Return a backward with a fault: sums over the mask alone, statistics everywhere, or a NaN that spreads."""

    def backward(dy: Any, x: Any, weight: Any, bias: Any, eps: float, where: Any) -> Any:
        mean, rstd, kept = written(x, where, eps, where.sum())
        xhat, g = (x - mean) * rstd, dy.astype("f8")
        of_sum = np.where(kept, g, 0) if masked_sums else g
        terms = of_sum * xhat if spreads else np.where(of_sum == 0, 0, of_sum * xhat)
        dweight, dbias = terms.sum((0, 2)), of_sum.sum((0, 2))
        through = (dbias[:, None] + xhat * dweight[:, None]) / where.sum()
        dx = weight[:, None] * rstd * (g - (through if everywhere else np.where(kept, through, 0)))
        return dx.astype(x.dtype), dweight, dbias

    return backward


FAULTS = {
    "n of all positions": ((y_with(n=lambda where: where.size),), "y with a mask is what the definition gives"),
    "a NaN spreads": ((y_with(spreads=True),), "a NaN in the padding changes no other y"),
    "0 at masked positions": ((y_with(zero=True),), "y with a mask is what the definition gives"),
    "sums over the mask": ((forward, dx_with(masked_sums=True)), "dweight with a mask is the sum of dy·xhat"),
    "statistics everywhere": ((forward, dx_with(everywhere=True)), "dx with a mask is what the definition gives"),
    "0·NaN": ((forward, dx_with(spreads=True)), "a NaN in the padding changes no gradient"),
    "biased": (
        (forward, None, lambda m, v, x, a, w: arraybn.update_running_stats(
            m, v, arraybn.moments(x, where=w), a, correction=0 if w.sum() < w.size else 1)),
        "running_var takes in the unbiased variance of the mask",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_the_kit_finds_faults_of_masks(name: str) -> None:
    functions, text = FAULTS[name]
    with np.errstate(all="ignore"), pytest.raises(BatchNormError) as caught:
        check_batch_norm(*functions, where=True, examples=0)
    assert text in str(caught.value)
    assert any(failure.batch.where is not None for failure in caught.value.failures)
    assert all(failure.batch.where is not None for failure in caught.value.failures)


def test_the_faultless_forms_of_these_functions_pass() -> None:
    with np.errstate(all="ignore"):
        check_batch_norm(y_with(), dx_with(), where=True, examples=3)


def test_the_kit_says_what_a_function_with_a_mask_looks_like() -> None:
    text = r"forward: expected a function of \(x, weight, bias, eps, where\) that returns y; got <?lambda"
    with pytest.raises(TypeError, match=text):
        check_batch_norm(lambda x, weight, bias, eps: x, where=True)


# ---- Beside other libraries ------------------------------------------------------------------------------------------


def padded() -> SimpleNamespace:
    """Return a channels-last batch (N, L, C) in float32 with lengths, and its mask (N, L)."""
    rng = np.random.default_rng(5)
    x, dy = rng.normal(1, 2, (2, 4, 6, 3)).astype("f4")
    return SimpleNamespace(x=x, dy=dy, where=np.arange(6) < np.asarray([6, 1, 4, 3])[:, None])


def with_flax(x: Any, dy: Any, where: Any) -> tuple[Any, Any]:
    """Return y and dx of Flax."""
    jax, jnp, linen = need("jax"), need("jax.numpy"), need("flax.linen")
    layer = linen.BatchNorm(use_running_average=False, use_bias=False, use_scale=False, epsilon=1e-5)
    variables, mask = layer.init(jax.random.key(0), x), jnp.asarray(where)[..., None]
    y, pull = jax.vjp(lambda x: layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[0], jnp.asarray(x))
    return np.asarray(y), np.asarray(pull(dy)[0])


def with_keras(x: Any, dy: Any, where: Any) -> tuple[Any, Any]:
    """Return y and dx of Keras, on TensorFlow or on JAX."""
    keras = need("keras")
    layer = keras.layers.BatchNormalization(epsilon=1e-5, center=False, scale=False)
    layer.build(x.shape)
    if keras.backend.backend() == "tensorflow":
        tf = need("tensorflow")
        with tf.GradientTape() as tape:
            given = tf.Variable(x)
            y = layer(given, training=True, mask=tf.constant(where))
        return y.numpy(), tape.gradient(y, given, dy).numpy()
    jax, state = need("jax"), [variable.value for variable in layer.non_trainable_variables]
    y, pull = jax.vjp(lambda x: layer.stateless_call([], state, x, training=True, mask=where)[0], x)
    return np.asarray(y), np.asarray(pull(dy)[0])


LIBRARIES = [with_flax, with_keras]


def ours(t: SimpleNamespace) -> tuple[Any, Any]:
    y, saved = arraybn.batch_norm(t.x, where=t.where, channel_axis=-1)
    return y, arraybn.batch_norm_backward(t.dy, saved)[0]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras with JAX on NumPy 2
def test_flax_and_keras_give_the_same_y_and_dx(library: Any) -> None:
    t = padded()
    results = library(t.x, t.dy, t.where)
    for got, want in zip(results, ours(t), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # Flax and Keras sum in float32
    t.where[...] = True
    assert not np.allclose(ours(t)[0], results[0], rtol=1e-2)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_nan_in_the_padding_spreads_in_their_backward_and_not_in_ours(library: Any) -> None:
    t = padded()
    t.x[~t.where] = np.nan
    t.dy[~t.where] = 0
    y, dx = library(t.x, t.dy, t.where)
    np.testing.assert_allclose(y[t.where], ours(t)[0][t.where], rtol=1e-5, atol=1e-5)
    assert np.isnan(dx[t.where]).all()
    assert np.isfinite(ours(t)[1]).all()


@pytest.mark.parametrize(("library", "numbers"), [(with_flax, False), (with_keras, True)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_without_any_true_flax_gives_nan_and_keras_what_we_give(library: Any, numbers: bool) -> None:
    t = padded()
    t.where[...] = False
    y, _ = library(t.x, t.dy, t.where)
    assert np.isnan(y).all() == (not numbers)
    if numbers:
        np.testing.assert_allclose(y, ours(t)[0], rtol=1e-5)

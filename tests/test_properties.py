"""Properties of every batch norm, whatever the batch. Each test has a control, a small fault that must fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import arraybn

U = 2.0**-53  # rounding in float64
EPS = 1e-5


@st.composite
def batches(draw: st.DrawFn, least: int = 2) -> Any:
    """X (N, C, S) in float64, n ≥ `least`, each channel with an offset and a scale of its own, none constant."""
    n, c, s = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    assume(n * s >= least)
    values = st.floats(-1, 1, width=32, allow_subnormal=False)
    x = draw(hnp.arrays("f8", (n, c, s), elements=values, fill=st.nothing()))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    x = x + rng.uniform(-0.5, 0.5, x.shape)
    scale = 2.0 ** rng.integers(-30, 30, c)
    return (x + 10 ** rng.uniform(-1, 3, c)[:, None]) * scale[:, None]


seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def parameters(rng: np.random.Generator, c: int) -> tuple[Any, Any]:
    """Draw a weight away from zero, and a bias."""
    return rng.uniform(0.5, 2, c) * rng.choice([-1, 1], c), rng.uniform(-2, 2, c)


def std(x: Any) -> Any:
    return x.std(axis=(0, 2))


def slack(x: Any) -> Any:
    """(C,) bound of the rounding of xhat: the mean to U·|mean|, sums of n terms to log₂ n + a few U, twice over."""
    n = x.shape[0] * x.shape[2]
    return 16 * U * (abs(x).max(axis=(0, 2)) / std(x) + np.log2(n) + 4) * np.sqrt(n)


def same_moments(a: arraybn.Moments, b: arraybn.Moments, x: Any) -> bool:
    """Return True where two moments of the values of x agree but for the order of additions."""
    close = abs(a.mean - b.mean) <= slack(x) * std(x)
    return a.n == b.n and bool((close & (abs(a.m2 - b.m2) <= 8 * slack(x) * b.m2)).all()) and bool(b.m2.min() > 0)


def off(y: Any) -> Any:
    """Y with one element wrong by 0.1 % of the largest."""
    y = y.copy()
    y[0, 0, 0] += 1e-3 * max(1e-3, abs(y[:, 0]).max())
    return y


@given(batches(), seeds)
def test_permuting_the_batch_permutes_y_and_changes_no_statistic(x: Any, rng: Any) -> None:
    weight, bias = parameters(rng, x.shape[1])
    order = rng.permutation(x.shape[0])
    y, saved = arraybn.batch_norm(x, weight, bias)
    z, permuted = arraybn.batch_norm(x[order], weight, bias)
    bound = (slack(x) * abs(weight) + 8 * U * abs(bias))[:, None] * np.sqrt(y.size)
    assert (abs(z - y[order]) <= bound).all()
    assert not (abs(off(z) - y[order]) <= bound).all()
    assert same_moments(permuted.moments, saved.moments, x)
    assert not same_moments(permuted.moments, arraybn.moments(x + 1e-3 * std(x)[:, None]), x)
    assert not same_moments(permuted.moments, arraybn.moments(x * 1.001), x)


@given(batches(), st.data())
def test_e2_splitting_and_pooling_changes_nothing(x: Any, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, x.shape[0]), max_size=4)))
    parts = [arraybn.moments(part) for part in np.split(x, cuts) if len(part) or data.draw(st.booleans())]
    whole, pooled = arraybn.moments(x), arraybn.pool(*parts)
    assert pooled.n == whole.n
    assert same_moments(pooled, whole, x)
    assert not same_moments(arraybn.pool(whole, arraybn.moments(x[:1])), whole, x)  # one sample counted twice
    assert not same_moments(arraybn.Moments(whole.n, pooled.mean + 1e-3 * std(x), pooled.m2), whole, x)
    assert not same_moments(arraybn.Moments(whole.n, pooled.mean, 1.001 * pooled.m2), whole, x)


@given(batches(), st.data())
def test_e2_n4_pool_is_commutative_to_the_bit(x: Any, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, x.shape[0]))
    a, b = arraybn.moments(x[:cut]), arraybn.moments(x[cut:])
    for first, second in ((a, b), (arraybn.moments(x), arraybn.moments(-0.37 * x))):  # the second pair has equal n
        ab, ba = arraybn.pool(first, second), arraybn.pool(second, first)
        assert ab.n == ba.n
        assert ab.mean.tobytes() == ba.mean.tobytes()
        assert ab.m2.tobytes() == ba.m2.tobytes()
        assert abs(ab.mean).min() > 0


def test_e2_pooling_a_far_outlier_keeps_the_digits_of_the_larger_batch() -> None:
    many, one = arraybn.moments(np.ones((999, 1))), arraybn.moments(np.full((1, 1), 1e16))
    exact = 1e13 + 0.999
    for pooled in (arraybn.pool(many, one), arraybn.pool(one, many)):
        assert abs(pooled.mean[0] - exact) <= 2 * np.spacing(exact)
    assert abs((1e16 + (1 - 1e16) * 0.999) - exact) > 2 * np.spacing(exact)  # the control: starting from the smaller


def test_e2_pool_without_its_ordering_is_not_commutative() -> None:
    """The control of the test above: for many pairs the plain formula has other bits when the batches are swapped."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1000))
    assert np.mean(a + (b - a) * (3 / 5) != b + (a - b) * (2 / 5)) > 0.1


@given(batches(), st.integers(-20, 20), seeds)
def test_e3_scaling_x_by_a_power_of_two_and_eps_by_its_square_leaves_y(x: Any, power: int, rng: Any) -> None:
    weight, bias = parameters(rng, x.shape[1])
    y, _ = arraybn.batch_norm(x, weight, bias, eps=EPS)
    scaled, _ = arraybn.batch_norm(2.0**power * x, weight, bias, eps=4.0**power * EPS)
    np.testing.assert_array_equal(scaled, y)
    flipped, _ = arraybn.batch_norm(-(2.0**power) * x, weight, eps=4.0**power * EPS)
    plain, _ = arraybn.batch_norm(x, weight, eps=EPS)
    np.testing.assert_array_equal(flipped, -plain)
    assert abs(plain).max() > 0
    unscaled, _ = arraybn.batch_norm(16 * x, weight, bias, eps=EPS * 2**50)  # the control: eps left out
    assert (unscaled != arraybn.batch_norm(x, weight, bias, eps=EPS * 2**50)[0]).any()


@given(batches(), seeds)
def test_e3_y_has_mean_bias_and_variance_weight_squared_var_over_var_plus_eps(x: Any, rng: Any) -> None:
    weight, bias = parameters(rng, x.shape[1])
    y, saved = arraybn.batch_norm(x, weight, bias)
    var = saved.moments.var()
    expected = weight**2 * var / (var + EPS)

    def holds(y: Any) -> bool:
        mean, variance = y.mean(axis=(0, 2)), y.var(axis=(0, 2))
        close = abs(mean - bias) <= slack(x) * abs(weight) + 64 * U * abs(bias)
        # bias is added before rounding, so that a small variance is known to U·(|bias| + |weight|) a value
        spread = 8 * np.sqrt(expected) * (slack(x) * np.sqrt(expected) + U * (abs(bias) + abs(weight)))
        return bool(close.all() and (abs(variance - expected) <= spread + (U * bias) ** 2 + 1e-300).all())

    assert holds(y)
    assert not holds(off(y))


@given(batches(), seeds)
def test_e6_n3_dx_sums_to_zero_per_channel_and_against_xhat_as_the_equation_says(x: Any, rng: Any) -> None:
    weight, bias = parameters(rng, x.shape[1])
    dy = rng.standard_normal(x.shape) + 0.5
    _, saved = arraybn.batch_norm(x, weight, bias)
    dx, dweight, _ = arraybn.batch_norm_backward(dy, saved)
    n, var = saved.moments.n, saved.moments.var()
    rstd = 1 / np.sqrt(var + EPS)
    xhat = (x - saved.moments.mean[:, None]) * rstd[:, None]
    term = abs(weight) * rstd * abs(dy).max(axis=(0, 2))  # the size of the terms that cancel
    expected = weight * rstd * dweight * EPS / (var + EPS)

    def holds(dx: Any) -> bool:
        bound = n * slack(x) * term * 4
        along = (dx * xhat).sum(axis=(0, 2))
        return bool((abs(dx.sum(axis=(0, 2))) <= bound).all() and (abs(along - expected) <= 2 * bound).all())

    assert holds(dx)
    wrong = dx.copy()
    wrong[0, 0, 0] += 1e-3 * term[0]
    assert not holds(wrong)


@given(batches(), seeds)
def test_e6_backward_is_linear_in_dy(x: Any, rng: Any) -> None:
    weight, bias = parameters(rng, x.shape[1])
    _, saved = arraybn.batch_norm(x, weight, bias)
    u, v = rng.standard_normal((2, *x.shape))
    results = [arraybn.batch_norm_backward(g, saved) for g in (u, v, 2 * u - 3 * v)]
    rstd = 1 / np.sqrt(saved.moments.var() + EPS)
    for (a, b, c), unit in zip(zip(*results, strict=True), (abs(weight) * rstd, 1.0, 1.0), strict=True):
        unit = np.broadcast_to(unit, x.shape[1])[:, None] if a.ndim == 3 else unit
        bound = 64 * U * (abs(a).max() + abs(b).max() + 8 * x.size * unit * abs(u).max())
        assert (abs(c - (2 * a - 3 * b)) <= bound).all()
        assert not (abs(c - (2 * a - 3 * b) + 1e-3 * unit) <= bound).all()


@given(seeds, st.integers(2, 40), st.floats(-(2.0**99), 2.0**99, width=32))
def test_n3_constant_channels_give_bias_and_nearly_constant_ones_do_not(rng: Any, n: int, value: float) -> None:
    assume(value == 0 or abs(value) > 1e-30)
    x = np.full((n, 2, 3), value, "f4")
    x[0, 1, 0] = np.nextafter(np.float32(value), np.float32(np.inf))
    weight, bias = (array.astype("f4") for array in parameters(rng, 2))
    y, saved = arraybn.batch_norm(x, weight, bias, eps=0)
    assert (y[:, 0] == bias[0]).all()
    assert (saved.moments.m2[0], saved.moments.m2[1] > 0) == (0, True)
    assert (y[:, 1] != bias[1]).any()


@given(batches(), seeds)
def test_e4_after_one_batch_with_momentum_1_evaluation_uses_its_mean_and_unbiased_variance(x: Any, rng: Any) -> None:
    layer = arraybn.BatchNorm1d(x.shape[1], eps=0, momentum=1.0, dtype="float64")
    layer.weight.data, layer.bias.data = parameters(rng, x.shape[1])
    trained = layer(x)
    y = layer.eval()(x)
    moments = arraybn.moments(x)
    var = moments.m2 / (moments.n - 1)
    centred = x - moments.mean[:, None]
    expected = (layer.weight.data / np.sqrt(var))[:, None] * centred + layer.bias.data[:, None]
    np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-13 * abs(expected).max())
    assert (abs(y - trained).max(axis=(0, 2)) > 1e-4).all()  # n − 1 is not n
    assert not np.allclose(off(y), expected, rtol=1e-13, atol=1e-13 * abs(expected).max())


@given(batches(), seeds, st.sampled_from([1.0, 1e9, np.inf, np.nan]))
def test_channels_do_not_see_each_others_values(x: Any, rng: Any, scale: float) -> None:
    """The values of one channel decide the bits of that channel. (Their number may choose the order of sums.)"""
    channels = x.shape[1]
    weight, bias = parameters(rng, channels)
    dy = rng.standard_normal(x.shape)
    c = rng.integers(channels)
    others = np.arange(channels) != c

    def results(x: Any, weight: Any, bias: Any, dy: Any) -> list[Any]:
        y, saved = arraybn.batch_norm(x, weight, bias)
        dx, dweight, dbias = arraybn.batch_norm_backward(dy, saved)
        return [y[:, c], dx[:, c], dweight[c], dbias[c], saved.moments.mean[c], saved.moments.m2[c]]

    before = results(x, weight, bias, dy)
    for array in (weight, bias):
        array[others] *= scale
    for array in (x, dy):
        array[:, others] += rng.standard_normal(array[:, others].shape)
        array[0, others] *= scale  # so that a first guess of their mean is far off
    with np.errstate(all="ignore"):
        after = results(x, weight, bias, dy)
        x[0, c, 0] += 1e-3 * std(x)[c]
        control = results(x, weight, bias, dy)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    assert control[4] != after[4]


@given(batches(), seeds, st.floats(0, 0.999))
def test_e4_running_statistics_follow_the_onnx_definition_with_decay_and_biased_variance(
    x: Any, rng: Any, decay: float
) -> None:
    running_mean, running_var = rng.standard_normal(x.shape[1]), rng.uniform(0.5, 2, x.shape[1]) * x.var(axis=(0, 2))
    mean, var = arraybn.update_running_stats(running_mean, running_var, arraybn.moments(x), 1 - decay, correction=0)
    decay = 1 - (1 - decay)  # as the function can know it
    expected = running_mean * decay + x.mean(axis=(0, 2)) * (1 - decay)
    assert (abs(mean - expected) <= 1e-14 * (abs(running_mean) + abs(x).max(axis=(0, 2)))).all()
    np.testing.assert_allclose(var, running_var * decay + x.var(axis=(0, 2)) * (1 - decay), rtol=1e-9)
    unbiased = arraybn.update_running_stats(running_mean, running_var, arraybn.moments(x), 1 - decay)[1]
    assert (unbiased > var * (1 + 1e-6)).all()  # the control: PyTorch's convention is another


@pytest.mark.parametrize("momentum", [0.1, None])
def test_e4_running_statistics_of_many_batches_are_the_recurrence_and_the_plain_average(momentum: float | None) -> None:
    rng = np.random.default_rng(0)
    layer = arraybn.BatchNorm1d(3, momentum=momentum, dtype="float64")
    mean, var, means = np.zeros(3), np.ones(3), []
    for step in range(1, 8):
        x = rng.standard_normal((5 + step, 3)) * [1, 2, 3] + [4, 5, 6]
        layer(x)
        factor = 1 / step if momentum is None else momentum
        mean = (1 - factor) * mean + factor * x.mean(axis=0)
        var = (1 - factor) * var + factor * x.var(axis=0, ddof=1)
        means.append(x.mean(axis=0))
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-13)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-13)
    assert layer.num_batches_tracked == 7
    is_average = np.allclose(layer.running_mean, np.mean(means, axis=0), rtol=1e-13)
    assert is_average == (momentum is None)

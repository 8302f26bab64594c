"""The same batch norm on every namespace and device, and results stay in that namespace and on that device."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import array_api_compat
import numpy as np
import pytest
from support.homes import Home
from support.libraries import need

import arraybn
from arraybn._arrays.devices import on_device, on_device_of
from arraybn.testing import exact_moments, scenarios

SHAPES = [shape for shape in scenarios.SHAPES if shape != "one value"]


def on_numpy(batch: scenarios.Batch, dtype: str, **options: Any) -> tuple[Any, ...]:
    y, saved = arraybn.batch_norm(batch.x.astype(dtype), batch.weight, batch.bias, **options)
    return (y, *arraybn.batch_norm_backward(batch.dy.astype(dtype), saved))


def close(got: Any, expected: Any, wide: str, scale: float, ulps: int = 4) -> bool:
    """Assert agreement: with float64 the sums have one order, so only √ and division may differ, by an ulp or two.

    Without it, some roundings to float32 of terms of the size `scale` add up.
    """
    bound = ulps * float(np.finfo(got.dtype).eps) if wide == "float64" else 64 * 2.0**-24
    return bool((abs(got - expected) <= bound * scale).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fixed", [False, True])
def test_functions_agree_with_numpy(home: Home, shape: str, fixed: bool) -> None:
    for dtype in {"float32", home.wide}:
        functions_agree_with_numpy(home, shape, dtype, fixed)


def functions_agree_with_numpy(home: Home, shape: str, dtype: str, fixed: bool) -> None:
    batch = scenarios.make(shape, "shifted")
    c = batch.weight.shape[0]
    statistics = {"mean": np.linspace(25, 35, c).astype("f4"), "var": np.linspace(1, 2, c).astype("f4")}
    statistics = statistics if fixed else {}
    expected = on_numpy(batch, dtype, **statistics)
    x, dy = home.array(batch.x, dtype), home.array(batch.dy, dtype)
    here = {name: home.array(value) for name, value in statistics.items()}
    y, saved = arraybn.batch_norm(x, home.array(batch.weight), home.array(batch.bias), **here)
    dx, dweight, dbias = arraybn.batch_norm_backward(dy, saved)
    got = [home.numpy(array) for array in (y, dx, dweight, dbias)]
    var = statistics["var"] if fixed else arraybn.moments(batch.x).var()
    term = abs(batch.dy).max()  # of dx, where two values may cancel
    ulps = 4
    if home.name.endswith("cuda"):  # these add in another order and map in float32: what is promised of dx (N2)
        term, ulps = term * (abs(batch.weight) / np.sqrt(var + 1e-5)).max(), 12
    assert [array.dtype.name for array in got] == [dtype, dtype, home.wide, home.wide]
    for one, other in zip(got, expected, strict=True):
        scale = max(abs(other).max(), term if one.ndim == 3 else 0)
        assert close(one, other, home.wide, scale, ulps)
        assert not close(one + 1e-3 * scale, other, home.wide, scale, ulps)


def test_e1_e2_e4_moments_pool_and_running_statistics_agree_with_numpy(home: Home) -> None:
    batch = scenarios.make("images", "far")
    x = batch.x.astype("f4")
    expected = arraybn.pool(arraybn.moments(x[:3]), arraybn.moments(x[3:]))
    pooled = arraybn.pool(*(arraybn.moments(home.array(part)) for part in (x[:3], x[3:])))
    assert pooled.n == expected.n
    mean, m2, var = (home.numpy(array) for array in (pooled.mean, pooled.m2, pooled.var(1)))
    assert mean.dtype.name == m2.dtype.name == home.wide
    np.testing.assert_allclose(mean, expected.mean, rtol=1e-14 if home.wide == "float64" else 1e-7)
    np.testing.assert_allclose(m2, expected.m2, rtol=1e-13 if home.wide == "float64" else 1e-6)
    np.testing.assert_allclose(var, expected.m2 / (expected.n - 1), rtol=1e-6)
    running = [np.linspace(1, 2, 4).astype("f4"), np.linspace(2, 3, 4).astype("f4")]
    updated = arraybn.update_running_stats(*map(home.array, running), pooled, 0.25)
    for got, want in zip(updated, arraybn.update_running_stats(*running, expected, 0.25), strict=True):
        assert home.numpy(got).dtype == np.float32
        np.testing.assert_allclose(home.numpy(got), want, rtol=1e-6)
    nothing = arraybn.moments(home.array(x[:0]))
    assert arraybn.pool(nothing, pooled, nothing).mean is pooled.mean
    assert not home.numpy(nothing.mean).any()


def test_e2_n4_pool_is_commutative_to_the_bit_without_float64_too(home: Home) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 300)).astype("f4") + 1000
    parts = [arraybn.moments(home.array(part)) for part in x]
    pooled, swapped = arraybn.pool(*parts), arraybn.pool(*reversed(parts))
    for name in ("mean", "m2") + (("mean_low",) if home.wide == "float32" else ()):
        one, other = home.numpy(getattr(pooled, name)), home.numpy(getattr(swapped, name))
        assert one.tobytes() == other.tobytes()
        assert one.any()


def test_e2_the_low_part_of_a_pooled_mean_is_that_of_the_whole_batch(home: Home) -> None:
    x = (np.random.default_rng(0).standard_normal((40, 30)) + 1e5).astype("f4")
    pooled = arraybn.pool(*(arraybn.moments(home.array(part)) for part in np.split(x, [13, 29])))
    low = 0 if pooled.mean_low is None else home.numpy(pooled.mean_low).astype("f8")
    mean = home.numpy(pooled.mean).astype("f8") + low
    exact = np.asarray([float(exact_moments(x[:, c])[0]) for c in range(30)])
    assert (abs(mean - exact) <= 2.0**-22).all()  # a few roundings to float32 of x − mean, which is of size 1
    if home.wide == "float32":
        assert abs(home.numpy(pooled.mean).astype("f8") - exact).max() > 2.0**-10  # the control


def test_e2_pooling_infinities_keeps_them(home: Home) -> None:
    x = home.array(np.asarray([[np.inf, 1.0], [np.inf, 2.0]]), "float32")
    with np.errstate(invalid="ignore"):
        pooled = arraybn.pool(arraybn.moments(x[:1, ...]), arraybn.moments(x[1:, ...]))
    assert home.numpy(pooled.mean).tolist() == [np.inf, 1.5]


def test_functions_work_inside_jax_transformations_and_layers_say_that_they_do_not() -> None:
    jax = need("jax")
    x, weight = jax.numpy.asarray(np.random.default_rng(0).standard_normal((6, 3)), "float32"), jax.numpy.ones(3)

    def forward(x: Any) -> Any:
        return arraybn.batch_norm(x, weight)[0]

    y, dy = forward(x), x**2
    np.testing.assert_allclose(jax.jit(forward)(x), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(forward)(x[None])[0], y, rtol=1e-5, atol=1e-6)
    _, vjp = jax.vjp(forward, x)
    dx, _, _ = arraybn.batch_norm_backward(dy, arraybn.batch_norm(x, weight)[1])
    np.testing.assert_allclose(vjp(dy)[0], dx, rtol=1e-4, atol=1e-5)  # JAX's own derivative of our forward
    layer = arraybn.BatchNorm1d(3, xp=jax.numpy)
    with pytest.raises(TypeError, match=r"x: expected an array with values.*got a JAX tracer.*call arraybn.batch_norm"):
        jax.jit(layer)(x)
    assert layer.num_batches_tracked == 0


def test_e2_n4_pool_is_commutative_where_only_the_low_parts_of_the_means_differ() -> None:
    xp = need("array_api_strict")
    where = {"device": xp.Device("no_float64"), "dtype": xp.float32}
    rng = np.random.default_rng(0)
    for _ in range(20):
        low = [xp.asarray((1e-5 * rng.standard_normal(50)).tolist(), **where) for _ in range(2)]
        a, b = (arraybn.Moments(7, xp.full(50, 1000.0, **where), xp.ones(50, **where), mean_low=part) for part in low)
        ab, ba = arraybn.pool(a, b), arraybn.pool(b, a)
        for name in ("mean", "m2", "mean_low"):
            assert bool(xp.all(getattr(ab, name) == getattr(ba, name)))


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_a_layer_trains_and_evaluates(home: Home, channel_axis: int) -> None:
    batch = scenarios.make("images")
    x, dy = (a.astype("f4") for a in (batch.x, batch.dy))
    if channel_axis == -1:
        x, dy = (np.ascontiguousarray(np.swapaxes(a, 1, 2)) for a in (x, dy))
    options = {"channel_axis": channel_axis, "momentum": 0.3}
    layer = arraybn.BatchNorm1d(4, **options, xp=home.xp, device=home.device)
    other = arraybn.BatchNorm1d(4, **options)
    for step in range(4):
        if step == 3:
            layer.eval(), other.eval()
        y, dx = layer(home.array(x)), layer.backward(home.array(dy))
        z, dz = other(x), other.backward(dy)
        for got, want in ((y, z), (dx, dz), (layer.weight.grad, other.weight.grad), (layer.bias.grad, other.bias.grad)):
            assert close(home.numpy(got), want, "float32", abs(want).max())
    np.testing.assert_allclose(home.numpy(layer.running_mean), other.running_mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(home.numpy(layer.running_var), other.running_var, rtol=1e-6)
    assert layer.num_batches_tracked == other.num_batches_tracked == 3


def test_a_layer_moves_there_and_back_with_all_its_state(home: Home) -> None:
    layer = arraybn.BatchNorm1d(3)
    layer(np.random.default_rng(0).standard_normal((5, 3)))
    layer.backward(np.ones((5, 3)))
    before = {name: value.copy() for name, value in layer.state_dict().items()}
    gradient = layer.bias.grad.copy()
    layer(np.ones((5, 3)))
    before = layer.state_dict()
    assert layer.to(xp=home.xp, device=home.device) is layer
    with pytest.raises(RuntimeError, match="expected a forward before it"):
        layer.backward(home.array(np.ones((5, 3), "f4")))
    for name in ("running_mean", "running_var"):
        np.testing.assert_array_equal(home.numpy(getattr(layer, name)), before[name])
    np.testing.assert_array_equal(home.numpy(layer.bias.grad), gradient)
    assert home.numpy(layer(home.array(np.ones((4, 3), "f4")))).shape == (4, 3)
    layer.reset_parameters()
    assert home.numpy(layer.running_var).tolist() == [1, 1, 1]
    layer.load_state_dict(before)
    host = arraybn.BatchNorm1d(3)
    host.load_state_dict(layer.state_dict())
    layer.to(xp=np, device="cpu")
    for state in (layer.state_dict(), host.state_dict()):
        for name, value in before.items():
            np.testing.assert_array_equal(state[name], value)


def test_state_dicts_and_copies_stay_here(home: Home) -> None:
    layer = arraybn.BatchNorm1d(3, xp=home.xp, device=home.device)
    layer(home.array(np.random.default_rng(0).standard_normal((5, 3)), "float32"))
    twin = arraybn.BatchNorm1d(3, xp=home.xp, device=home.device)
    state = layer.state_dict()
    assert repr(twin.load_state_dict(state)) == "<All keys matched successfully>"
    clones = [twin, copy.deepcopy(layer)]
    if home.name in ("numpy", "torch") or home.name.startswith("cupy"):
        with on_device(home.device):  # where CuPy unpickles
            clones.append(pickle.loads(pickle.dumps(layer)))
    for clone in clones:
        np.testing.assert_array_equal(home.numpy(clone.running_mean), home.numpy(layer.running_mean))
        assert clone.num_batches_tracked == 1
        clone(home.array(np.ones((4, 3)), "float32"))
        assert layer.num_batches_tracked == 1
        assert home.numpy(clone.running_mean).tolist() != home.numpy(layer.running_mean).tolist()
    assert int(state["num_batches_tracked"]) == 1


def test_bfloat16_and_float16_where_the_namespace_has_them(home: Home) -> None:
    for dtype in ("float16", "bfloat16"):
        if not hasattr(home.xp, dtype):
            continue
        x = home.array(scenarios.make("small").x, "float32")
        with on_device_of(x):
            x = home.xp.astype(x, getattr(home.xp, dtype))
        y, saved = arraybn.batch_norm(x)
        dx, _, _ = arraybn.batch_norm_backward(x, saved)
        assert y.dtype == dx.dtype == x.dtype
        assert home.numpy(saved.moments.mean).dtype.name == home.wide


def test_mixed_namespaces_are_refused_with_the_remedy(home: Home) -> None:
    other = scenarios.make("small")
    x = home.array(other.x, "float32")
    if home.name.startswith("numpy"):
        strict = need("array_api_strict")
        weight = strict.asarray(other.weight)
    else:
        weight = other.weight
    with pytest.raises(TypeError, match=r"weight: expected a .* array as x is; got a .*layer.to\(xp="):
        arraybn.batch_norm(x, weight)
    _, saved = arraybn.batch_norm(x)
    with pytest.raises(TypeError, match=r"dy: expected a .* array as x is"):
        arraybn.batch_norm_backward(weight, saved)


def test_mixed_devices_are_refused_with_the_remedy() -> None:
    xp = need("array_api_strict")
    x, weight = xp.ones((4, 3), device=xp.Device("device1")), xp.ones(3, device=xp.Device("device2"))
    with pytest.raises(ValueError, match=r"weight: expected on .*device1.* as x is; got one on .*device2"):
        arraybn.batch_norm(x, weight)
    layer = arraybn.BatchNorm1d(3, xp=xp, device=xp.Device("device2"))
    with pytest.raises(ValueError, match=r"layer.to\(device=…\)"):
        layer(x)
    assert layer.num_batches_tracked == 0
    assert layer.to(device=xp.Device("device1"))(x).device == xp.Device("device1")


def test_jax_without_and_with_x64_differ_in_the_dtype_of_statistics() -> None:
    jax = need("jax")
    for x64, wide in ((False, "float32"), (True, "float64"), (False, "float32")):
        with jax.enable_x64(x64):
            assert arraybn.moments(jax.numpy.ones((3, 2), "float32")).mean.dtype == wide


def test_tensors_that_require_grad_are_refused_unless_autograd_is_off() -> None:
    torch = need("torch")
    x = torch.ones(4, 3, requires_grad=True)
    with pytest.raises(TypeError, match=r"x: expected a tensor without requires_grad.*x.detach\(\)"):
        arraybn.batch_norm(x)
    layer = arraybn.BatchNorm1d(3, xp=torch)
    with torch.no_grad():
        y = layer(x)
    dx = layer.backward(torch.ones(4, 3))
    assert not any(tensor.requires_grad for tensor in (y, dx, layer.weight.grad, layer.running_mean))


def test_the_namespace_of_every_result_is_that_of_x(home: Home) -> None:
    x = home.array(scenarios.make("small").x, "float32")
    y, saved = arraybn.batch_norm(x, eps=0)
    results = [
        y,
        *arraybn.batch_norm_backward(x, saved)[:1],
        saved.moments.mean,
        saved.moments.m2,
        saved.moments.var(99),
    ]
    for result in results:
        assert array_api_compat.array_namespace(result) is array_api_compat.array_namespace(x)
        assert array_api_compat.device(result) == array_api_compat.device(x)

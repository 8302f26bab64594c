"""Forward mode (E8) and double backward (E9): differences, other libraries, the oracle, parts, ranks, third order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mpi import twice
from support.homes import Home
from support.kernels import case_of
from support.libraries import need

import arraybn
from arraybn import kernels, reference
from arraybn.testing import ThreadComm, exact_double_backward, exact_jvp, scenarios, worst

SHAPES = [(6, 3), (5, 2, 7), (4, 3, 2, 3), (2, 2, 2, 3, 2), (2, 4), (1, 3, 4), (70, 5), (3, 2, 40)]
EPS = 0.1


class Given:
    """A batch with tangents and cotangents, in float64."""

    def __init__(self, shape: tuple[int, ...], channel_axis: int = 1, shift: float = 3.0) -> None:
        rng = np.random.default_rng(list(shape))
        channels = shape[channel_axis]
        self.x = rng.standard_normal(shape) * 2 + shift
        self.dy, self.v, self.x_dot = rng.standard_normal((3, *shape)) + 0.5
        self.weight, self.bias, self.weight_dot, self.bias_dot, self.v_weight, self.v_bias = rng.uniform(
            0.5, 2, (6, channels)
        )
        self.channels = channels


FIXED = {
    "batch statistics": lambda channels: {},
    "fixed statistics": lambda channels: {"mean": np.linspace(-1, 1, channels), "var": np.linspace(0.5, 2, channels)},
}


def slope(function: Callable[[float], Any], step: float = 6e-6) -> Any:
    """Return the derivative at 0, by central differences."""
    return (function(step) - function(-step)) / (2 * step)


def close(got: Any, want: Any, size: Any, tolerance: float) -> bool:
    return bool((abs(np.asarray(got) - want) <= tolerance * size).all())


def assert_with_control(got: Any, want: Any, tolerance: float, size: Any = None) -> None:
    """Assert agreement, and that a result wrong by 0.1 % would not agree."""
    size = abs(np.asarray(want)).max() if size is None else size
    assert close(got, want, size, tolerance)
    assert not close(1.001 * np.asarray(got), want, size, tolerance)


# ---- Differences, in float64 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["reference", "cpu"])
@pytest.mark.parametrize("fixed", FIXED)
@pytest.mark.parametrize("shape", SHAPES)
def test_e8_the_change_of_y_along_a_tangent(shape: tuple[int, ...], fixed: str, module: str) -> None:
    if module == "cpu":
        need("numba")
    b = Given(shape)
    options = {**FIXED[fixed](b.channels), "eps": EPS, "kernels": module}
    _, saved = arraybn.batch_norm(b.x, b.weight, b.bias, **options)
    y_dot = arraybn.batch_norm_jvp(b.x_dot, saved, b.weight_dot, b.bias_dot)

    def moved(t: float) -> Any:
        vectors = b.weight + t * b.weight_dot, b.bias + t * b.bias_dot
        return arraybn.batch_norm(b.x + t * b.x_dot, *vectors, **options)[0]

    assert_with_control(y_dot, slope(moved), 1e-8)


@pytest.mark.parametrize("module", ["reference", "cpu"])
@pytest.mark.parametrize("fixed", FIXED)
@pytest.mark.parametrize("shape", SHAPES)
def test_e9_the_change_of_the_gradients_along_random_directions(
    shape: tuple[int, ...], fixed: str, module: str
) -> None:
    if module == "cpu":
        need("numba")
    b, rng = Given(shape), np.random.default_rng(1)
    options = {**FIXED[fixed](b.channels), "eps": EPS, "kernels": module}

    def loss(x: Any, weight: Any, dy: Any) -> float:
        dx, dweight, dbias = arraybn.batch_norm_backward(dy, arraybn.batch_norm(x, weight, b.bias, **options)[1])
        return float((b.v * dx).sum() + (b.v_weight * dweight).sum() + (b.v_bias * dbias).sum())

    _, saved = arraybn.batch_norm(b.x, b.weight, b.bias, **options)
    ddy, ddx, ddweight = arraybn.batch_norm_double_backward(b.v, b.dy, saved, b.v_weight, b.v_bias)
    for _ in range(3):
        along_x, along_dy, along_weight = rng.standard_normal((2, *shape))[0], rng.standard_normal(shape), b.weight_dot
        for written, along, moved in (
            (ddx, along_x, lambda t, d=along_x: loss(b.x + t * d, b.weight, b.dy)),
            (ddy, along_dy, lambda t, d=along_dy: loss(b.x, b.weight, b.dy + t * d)),
            (ddweight, along_weight, lambda t, d=along_weight: loss(b.x, b.weight + t * d, b.dy)),
        ):
            product = abs(written * along)
            assert_with_control((written * along).sum(), slope(moved), 1e-8, product.max())


# ---- Other libraries -------------------------------------------------------------------------------------------------


def plain(jax: Any, x: Any, weight: Any, bias: Any) -> Any:
    """Return the definition (E3), for JAX to differentiate."""
    mean = x.mean(0)
    return weight * (x - mean) / jax.numpy.sqrt(((x - mean) ** 2).mean(0) + EPS) + bias


@pytest.fixture
def jax() -> Any:
    library = need("jax")
    with library.enable_x64(True):
        yield library


def test_e8_e9_agree_with_jax(jax: Any) -> None:
    b = Given((9, 4))
    _, saved = arraybn.batch_norm(b.x, b.weight, b.bias, eps=EPS)
    tangents = (b.x_dot, b.weight_dot, b.bias_dot)
    _, y_dot = jax.jvp(lambda *a: plain(jax, *a), (b.x, b.weight, b.bias), tangents)
    assert_with_control(arraybn.batch_norm_jvp(b.x_dot, saved, b.weight_dot, b.bias_dot), y_dot, 1e-13)

    def gradients(x: Any, weight: Any, dy: Any) -> Any:
        return jax.vjp(lambda *a: plain(jax, *a), x, weight, b.bias)[1](dy)

    _, pull = jax.vjp(gradients, b.x, b.weight, b.dy)
    by_x, by_weight, by_dy = pull((b.v, b.v_weight, b.v_bias))
    ddy, ddx, ddweight = arraybn.batch_norm_double_backward(b.v, b.dy, saved, b.v_weight, b.v_bias)
    for got, want in ((ddy, by_dy), (ddx, by_x), (ddweight, by_weight)):
        assert_with_control(got, want, 1e-12)


@pytest.mark.parametrize("fixed", FIXED)
def test_e9_agrees_with_the_double_backward_of_pytorch(fixed: str) -> None:
    torch = need("torch")
    b = Given((9, 4, 3))
    statistics = FIXED[fixed](4)
    x, weight, bias, dy = (torch.tensor(a, requires_grad=True) for a in (b.x, b.weight, b.bias, b.dy))
    running = [torch.tensor(statistics[name]) for name in statistics] or [None, None]
    y = torch.nn.functional.batch_norm(x, *running, weight, bias, training=not statistics, eps=EPS)
    first = torch.autograd.grad(y, (x, weight, bias), dy, create_graph=True)
    loss = sum((torch.tensor(v) * g).sum() for v, g in zip((b.v, b.v_weight, b.v_bias), first, strict=True))
    by_dy, by_x, by_weight = torch.autograd.grad(loss, (dy, x, weight))
    _, saved = arraybn.batch_norm(b.x, b.weight, b.bias, eps=EPS, **statistics)
    found = arraybn.batch_norm_double_backward(b.v, b.dy, saved, b.v_weight, b.v_bias)
    for got, want in zip(found, (by_dy, by_x, by_weight), strict=True):
        assert_with_control(got, want.numpy(), 1e-12)


def test_the_third_derivative_is_that_of_the_definition(jax: Any) -> None:
    """Differentiate ours by JAX, with JAX's derivative of the definition as the oracle."""
    b = Given((5, 2))
    along, again = np.random.default_rng(3).standard_normal((2, *b.x.shape))

    def ours(x: Any) -> Any:
        _, saved = arraybn.batch_norm(x, jax.numpy.asarray(b.weight), jax.numpy.asarray(b.bias), eps=EPS)
        return arraybn.batch_norm_double_backward(jax.numpy.asarray(b.v), jax.numpy.asarray(b.dy), saved)[1]

    def first(x: Any) -> Any:
        return (b.dy * plain(jax, x, b.weight, b.bias)).sum()

    def second(x: Any) -> Any:
        return jax.grad(lambda x: (b.v * jax.grad(first)(x)).sum())(x)

    got = jax.jvp(ours, (jax.numpy.asarray(b.x),), (jax.numpy.asarray(along),))[1]
    want = jax.jvp(second, (jax.numpy.asarray(b.x),), (jax.numpy.asarray(along),))[1]
    assert_with_control((np.asarray(got) * again).sum(), (np.asarray(want) * again).sum(), 1e-11)
    assert_with_control(got, want, 1e-11)


# ---- The exact oracle ------------------------------------------------------------------------------------------------

ULPS = {"float16": 1.5, "float32": 24.0, "float64": 64.0}


@pytest.fixture(params=["reference", "cpu", "cuda"])
def served(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Yield the options of a call that a module serves; CUDA runs on the CPU, in the stand-in of the tests."""
    with case_of(request.param) as case:
        yield {"kernels": reference if request.param == "reference" else case.ops}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("scale", ["standard", "shifted", "far", "small std", "large std"])
@pytest.mark.parametrize("shape", ["images", "tall", "wide", "small"])
def test_errors_are_within_24_ulp_of_the_largest_term(
    shape: str, scale: str, dtype: str, served: dict[str, Any]
) -> None:
    if dtype == "float16" and scale not in ("standard", "shifted"):
        return
    batch = scenarios.make(shape, scale)
    kind, std = np.dtype(dtype), batch.x.std()
    x, dy = batch.x.astype(kind), batch.dy.astype(kind)
    rng = np.random.default_rng(7)
    v, x_dot = (rng.standard_normal((2, *x.shape)) + 0.5).astype(kind)
    if "std" in scale:
        v, x_dot = v * kind.type(std), x_dot * kind.type(std)  # in the units of x
    weight_dot, bias_dot, v_weight, v_bias = rng.uniform(-2, 2, (4, x.shape[1])).astype("f4")
    _, saved = arraybn.batch_norm(x, batch.weight, batch.bias, eps=batch.eps, **served)
    y_dot = arraybn.batch_norm_jvp(x_dot, saved, weight_dot, bias_dot)
    ddy, ddx, ddweight = arraybn.batch_norm_double_backward(v, dy, saved, v_weight, v_bias)
    want, largest = exact_jvp(x, batch.weight, x_dot, weight_dot, bias_dot, eps=batch.eps)
    truth = exact_double_backward(x, batch.weight, dy, v, v_weight, v_bias, eps=batch.eps)
    ratio = 1 + abs(batch.x.mean()) / std if dtype == "float64" else 1
    results = (y_dot, want, largest), (ddy, truth.ddy, truth.ddy_scale), (ddx, truth.ddx, truth.ddx_scale)
    for got, exactly, term in results:
        assert got.dtype == kind
        if dtype == "float64":  # as N2: in units of the channel's scale
            term = np.broadcast_to(term.max(axis=(0, 2), keepdims=True), term.shape)
        term = np.maximum(term, abs(exactly))
        assert worst(got, exactly, term, dtype) <= ULPS[dtype] * ratio
        assert worst(got + kind.type(0.02) * got, exactly, term, dtype) > ULPS[dtype] * ratio  # the control
    unit, ulps = ("float64", 64 * ratio) if dtype == "float64" else ("float32", 4)
    assert worst(ddweight, truth.ddweight, truth.ddweight_scale, unit) <= ulps
    assert worst(ddweight + 1e-3 * truth.ddweight_scale, truth.ddweight, truth.ddweight_scale, unit) > ulps


@pytest.mark.parametrize("scale", ["standard", "far", "very far"])
def test_without_float64_the_mean_in_two_parts_enters_the_derivatives(scale: str) -> None:
    xp = need("array_api_strict")
    device, batch = xp.Device("no_float64"), scenarios.make("images", scale)
    rng = np.random.default_rng(7)
    x, dy, v = (a.astype("f4") for a in (batch.x, batch.dy, rng.standard_normal(batch.x.shape) + 0.5))
    vectors = batch.weight, *rng.uniform(-2, 2, (2, 4)).astype("f4")
    here = [xp.asarray(a, device=device) for a in (x, dy, v, *vectors)]
    _, saved = arraybn.batch_norm(here[0], here[3], eps=batch.eps)
    found = [
        arraybn.batch_norm_jvp(here[2], saved, *here[4:]),
        *arraybn.batch_norm_double_backward(here[2], here[1], saved, *here[4:]),
    ]
    found = [np.asarray(array.to_device(xp.Device("CPU_DEVICE"))) for array in found]
    y_dot, y_dot_scale = exact_jvp(x, vectors[0], v, *vectors[1:], eps=batch.eps)
    truth = exact_double_backward(x, vectors[0], dy, v, *vectors[1:], eps=batch.eps)
    # roundings to float32 of sums of 392 values, and of a few coefficients: the 24 of the promise for float64 suffice
    for got, want, largest in (
        (found[0], y_dot, y_dot_scale),
        (found[1], truth.ddy, truth.ddy_scale),
        (found[2], truth.ddx, truth.ddx_scale),
        (found[3], truth.ddweight, truth.ddweight_scale),
    ):
        assert worst(got, want, largest, "float32") <= 24
        assert worst(got + np.float32(1e-3) * largest.astype("f4"), want, largest, "float32") > 24


def test_the_oracle_of_derivatives_knows_a_wrong_one() -> None:
    b = Given((7, 2))
    truth = exact_double_backward(b.x, b.weight, b.dy, b.v, b.v_weight, b.v_bias, eps=EPS)
    n, rstd = 7, 1 / np.sqrt(b.x.var(0) + EPS)
    xhat = (b.x - b.x.mean(0)) * rstd
    projected = b.v - b.v.mean(0) - xhat * (b.v * xhat).mean(0)
    by_dy = b.weight * rstd * projected + b.v_weight * xhat + b.v_bias
    assert worst(by_dy, truth.ddy, truth.ddy_scale, "float64") < 32
    assert worst(by_dy - xhat * b.v_weight / n, truth.ddy, truth.ddy_scale, "float64") > 1e12
    moved = np.moveaxis(b.x, 1, 0), b.weight, np.moveaxis(b.dy, 1, 0), np.moveaxis(b.v, 1, 0), b.v_weight, b.v_bias
    again = exact_double_backward(*moved, eps=EPS, channel_axis=0)
    assert (np.moveaxis(again.ddx, 0, 1) == truth.ddx).all()


# ---- Namespaces, dtypes, layouts, out --------------------------------------------------------------------------------


def test_every_namespace_agrees_with_numpy(home: Home) -> None:
    b = Given((5, 3, 4))
    names = ("x", "weight", "bias", "x_dot", "weight_dot", "bias_dot", "v", "dy", "v_weight", "v_bias")
    given = {name: getattr(b, name).astype("f4") for name in names}

    def results(a: dict[str, Any]) -> list[Any]:
        found = []
        for fixed in ({}, {"mean": a["bias"], "var": a["weight"]}):
            _, saved = arraybn.batch_norm(a["x"], a["weight"], a["bias"], eps=EPS, **fixed)
            found.append(arraybn.batch_norm_jvp(a["x_dot"], saved, a["weight_dot"], a["bias_dot"]))
            found += arraybn.batch_norm_double_backward(a["v"], a["dy"], saved, a["v_weight"], a["v_bias"])
        return found

    got = [home.numpy(array) for array in results({name: home.array(array) for name, array in given.items()})]
    for one, want in zip(got, results(given), strict=True):
        assert one.dtype.name == ("float32" if one.ndim == 3 else home.wide)
        assert close(one, want, abs(want).max(), 64 * 2.0**-24)
        assert not close(1.001 * one, want, abs(want).max(), 64 * 2.0**-24)


@pytest.mark.parametrize("dtypes", [("f2", "f4", "f2"), ("f4", "f8", "f4"), ("f2", "f2", "f8")])
def test_operands_of_other_dtypes_are_not_rounded_before_their_sums(dtypes: tuple[str, str, str]) -> None:
    b = Given((8, 3))
    x, dy, v = b.x.astype(dtypes[0]), (1e-9 * b.dy).astype(dtypes[1]), b.v.astype(dtypes[2])
    _, saved = arraybn.batch_norm(x, b.weight, eps=EPS)
    ddy, ddx, ddweight = arraybn.batch_norm_double_backward(v, dy, saved)
    truth = exact_double_backward(x, b.weight, dy, v, 0 * b.weight, 0 * b.bias, eps=EPS)
    assert ddy.dtype == ddx.dtype == x.dtype
    assert worst(ddweight, truth.ddweight, truth.ddweight_scale, "float32") <= 1
    assert worst(ddy, truth.ddy, np.maximum(truth.ddy_scale, abs(truth.ddy)), x.dtype) <= 2
    small = arraybn.batch_norm_jvp(dy, saved)
    want, largest = exact_jvp(x, b.weight, dy, 0 * b.weight, 0 * b.bias, eps=EPS)
    assert worst(small, want, np.maximum(largest, abs(want)), x.dtype) <= 2


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed view", "strided", "reversed"])
def test_every_layout_gives_the_values_of_a_contiguous_array(layout: str) -> None:
    b = Given((6, 3, 5))
    view: dict[str, Callable[[Any], Any]] = {
        "contiguous": lambda a: a,
        "channels last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
        "transposed view": lambda a: np.ascontiguousarray(a.T).T,
        "strided": lambda a: np.repeat(a, 2, axis=0)[::2],
        "reversed": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    }
    found = []
    for change in (view["contiguous"], view[layout]):
        _, saved = arraybn.batch_norm(change(b.x), b.weight, b.bias)
        found.append((arraybn.batch_norm_jvp(change(b.x_dot), saved, b.weight_dot, b.bias_dot),))
        found[-1] += arraybn.batch_norm_double_backward(change(b.v), change(b.dy), saved, b.v_weight, b.v_bias)
    for got, want in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
    swapped = [np.moveaxis(a, 1, -1) for a in (b.x, b.x_dot, b.v, b.dy)]
    _, saved = arraybn.batch_norm(swapped[0], b.weight, b.bias, channel_axis=-1)
    y_dot = arraybn.batch_norm_jvp(swapped[1], saved, b.weight_dot, b.bias_dot)
    np.testing.assert_allclose(np.moveaxis(y_dot, -1, 1), found[0][0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("module", ["reference", "cpu"])
def test_e8_writes_into_out_over_x_dot_and_over_x(module: str) -> None:
    if module == "cpu":
        need("numba")
    for shape in ((6, 3, 40), (6, 3), (9, 70)):
        b = Given(shape)
        _, saved = arraybn.batch_norm(b.x, b.weight, b.bias, kernels=module)
        want = arraybn.batch_norm_jvp(b.x_dot, saved, b.weight_dot, b.bias_dot)
        out = np.empty_like(b.x)
        assert arraybn.batch_norm_jvp(b.x_dot, saved, b.weight_dot, b.bias_dot, out=out) is out
        np.testing.assert_array_equal(out, want)
        over = b.x_dot.copy()
        np.testing.assert_array_equal(arraybn.batch_norm_jvp(over, saved, b.weight_dot, b.bias_dot, out=over), want)
        np.testing.assert_array_equal(arraybn.batch_norm_jvp(b.x_dot, saved, b.weight_dot, b.bias_dot, out=b.x), want)
        with pytest.raises(RuntimeError, match="an earlier batch_norm_jvp wrote y_dot over it"):
            arraybn.batch_norm_double_backward(b.v, b.dy, saved)


def test_missing_vectors_count_as_zero_and_a_missing_weight_as_one() -> None:
    b = Given((6, 3))
    one, zero = np.ones(3), np.zeros(3)
    _, bare = arraybn.batch_norm(b.x)
    _, saved = arraybn.batch_norm(b.x, one)
    np.testing.assert_array_equal(
        arraybn.batch_norm_jvp(b.x_dot, bare), arraybn.batch_norm_jvp(b.x_dot, saved, zero, zero)
    )
    ddy, ddx, ddweight = arraybn.batch_norm_double_backward(b.v, b.dy, bare)
    assert ddweight is None
    want = arraybn.batch_norm_double_backward(b.v, b.dy, saved, zero, zero)
    np.testing.assert_array_equal(ddy, want[0])
    np.testing.assert_array_equal(ddx, want[1])


def test_an_empty_batch_and_a_constant_channel_have_derivatives() -> None:
    empty = np.zeros((0, 3))
    _, saved = arraybn.batch_norm(empty, np.ones(3))
    assert arraybn.batch_norm_jvp(empty, saved).shape == (0, 3)
    ddy, ddx, ddweight = arraybn.batch_norm_double_backward(empty, empty, saved)
    assert ddy.shape == ddx.shape == (0, 3)
    assert ddweight.tolist() == [0, 0, 0]
    x, v = np.full((4, 1), 3e7), np.arange(4.0)[:, None]
    _, saved = arraybn.batch_norm(x, eps=0)
    for result in (arraybn.batch_norm_jvp(v, saved), *arraybn.batch_norm_double_backward(v, v, saved)[:2]):
        assert not result.any()


def test_a_module_without_affine3_takes_that_of_the_reference() -> None:
    b = Given((6, 3))
    own = SimpleNamespace(**{name: getattr(reference, name) for name in kernels.REQUIRED})
    results = [
        arraybn.batch_norm_double_backward(b.v, b.dy, arraybn.batch_norm(b.x, kernels=module)[1])[1]
        for module in (own, "reference")
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("module", ["reference", "cpu"])
def test_after_an_exact_forward_the_sums_are_usual_ones_alone_over_ranks_and_in_parts(module: str) -> None:
    if module == "cpu":
        need("numba")
    case = twice.Case(2, 3)
    for name in ("x", "dy", "v", "x_dot"):
        setattr(case, name, getattr(case, name).astype("f4"))

    def check(found: list[Any]) -> None:
        twice.check(case, found, tolerance=2.0**-21)

    options = {"kernels": module, "exact": True}
    check(ThreadComm.run(2, lambda comm: twice.step(case, comm, **options)))
    whole = arraybn.pool(*(arraybn.moments(case.part(rank)["x"], **options) for rank in (0, 1)))
    parts = [case.part(rank) for rank in (0, 1)]
    saved = [arraybn.batch_norm(p["x"], case.weight, case.bias, moments=whole, **options)[1] for p in parts]
    first = sum(arraybn.batch_norm_sums(p["x_dot"], s) for p, s in zip(parts, saved, strict=True))
    second = sum(
        arraybn.batch_norm_sums(p["dy"], s, v=p["v"], v_weight=case.v_weight) for p, s in zip(parts, saved, strict=True)
    )
    vectors = (case.v_weight, case.v_bias)
    check(
        [
            [
                arraybn.batch_norm_jvp(p["x_dot"], s, case.weight_dot, case.bias_dot, sums=first),
                *arraybn.batch_norm_double_backward(p["v"], p["dy"], s, *vectors, sums=second),
            ]
            for p, s in zip(parts, saved, strict=True)
        ]
    )
    case.cuts = [0, 8]
    check([twice.step(case, SimpleNamespace(rank=0), alone=True, **options)])


# ---- Parts and ranks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(0, 2, 9), (0, 0, 4, 9), (0, 9)])
def test_parts_with_the_sums_of_all_agree_with_the_whole(cuts: tuple[int, ...]) -> None:
    b = Given((9, 3, 2))
    parts = [slice(a, z) for a, z in itertools.pairwise(cuts)]
    whole = arraybn.pool(*(arraybn.moments(b.x[p]) for p in parts))
    saved = [arraybn.batch_norm(b.x[p], b.weight, b.bias, moments=whole, eps=EPS)[1] for p in parts]
    sums = sum(arraybn.batch_norm_sums(b.x_dot[p], s) for p, s in zip(parts, saved, strict=True))
    y_dot = [
        arraybn.batch_norm_jvp(b.x_dot[p], s, b.weight_dot, b.bias_dot, sums=sums)
        for p, s in zip(parts, saved, strict=True)
    ]
    sums = sum(
        arraybn.batch_norm_sums(b.dy[p], s, v=b.v[p], v_weight=b.v_weight) for p, s in zip(parts, saved, strict=True)
    )
    found = [
        arraybn.batch_norm_double_backward(b.v[p], b.dy[p], s, b.v_weight, b.v_bias, sums=sums)
        for p, s in zip(parts, saved, strict=True)
    ]
    _, alone = arraybn.batch_norm(b.x, b.weight, b.bias, eps=EPS)
    assert_with_control(np.concatenate(y_dot), arraybn.batch_norm_jvp(b.x_dot, alone, b.weight_dot, b.bias_dot), 1e-13)
    want = arraybn.batch_norm_double_backward(b.v, b.dy, alone, b.v_weight, b.v_bias)
    for index in (0, 1):
        assert_with_control(np.concatenate([part[index] for part in found]), want[index], 1e-13)
    assert_with_control(sum(part[2] for part in found), want[2], 1e-13)


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("module", ["reference", "cpu"])
@pytest.mark.parametrize("channels", [3, 100])  # 100: the sums of E9 need a second frame
def test_ranks_agree_with_one_rank(ranks: int, module: str, channels: int) -> None:
    if module == "cpu":
        need("numba")
    case = twice.Case(ranks, channels)
    twice.check(case, ThreadComm.run(ranks, lambda comm: twice.step(case, comm, kernels=module)))


def test_ranks_without_float64_agree_with_one_rank() -> None:
    xp = need("array_api_strict")
    case = twice.Case(3, 3)
    like = xp.zeros(1, dtype=xp.float32, device=xp.Device("no_float64"))
    twice.check(case, ThreadComm.run(3, lambda comm: twice.step(case, comm, like=like)), tolerance=64 * 2.0**-24)


def test_the_control_of_ranks_that_do_not_exchange_fails() -> None:
    case = twice.Case(3, 3)
    with pytest.raises(AssertionError):
        twice.check(case, ThreadComm.run(3, lambda comm: twice.step(case, comm, alone=True)))


def test_an_error_on_one_rank_is_raised_on_all_and_the_next_call_works() -> None:
    case = twice.Case(2, 3)

    def work(comm: ThreadComm) -> list[str]:
        part = case.part(comm.rank)
        _, saved = arraybn.batch_norm(part["x"], case.weight, case.bias, comm=comm)
        said = []
        for wrong in (
            lambda v: arraybn.batch_norm_jvp(v, saved),
            lambda v: arraybn.batch_norm_double_backward(v, part["dy"], saved),
        ):
            with pytest.raises(arraybn.SyncError) as caught:
                wrong(part["v"][:, :2] if comm.rank else part["v"])
            said.append(str(caught.value))
        arraybn.batch_norm_jvp(part["v"], saved)
        differing = arraybn.batch_norm_jvp if comm.rank else arraybn.batch_norm_backward
        with pytest.raises(arraybn.SyncError) as caught:
            differing(part["v"], saved)
        said.append(str(caught.value))
        arraybn.batch_norm_double_backward(part["v"], part["dy"], saved)
        return said

    found = ThreadComm.run(2, work)
    assert found[0] == found[1]
    assert found[0][0].startswith("rank 1: x_dot: expected shape ")
    assert found[0][1].startswith("rank 1: v: expected shape ")
    assert "operation: backward of batch_norm on rank 0 and jvp of batch_norm on rank 1" in found[0][2]


def test_cotangents_of_the_parameters_may_differ_between_ranks() -> None:
    """v_weight of a rank belongs to the dweight of that rank, as in the autograd of each process."""
    case = twice.Case(2, 3)
    vectors = np.random.default_rng(0).standard_normal((2, 3))

    def loss(x: Any) -> float:
        def work(comm: ThreadComm) -> float:
            rows = slice(case.cuts[comm.rank], case.cuts[comm.rank + 1])
            _, saved = arraybn.batch_norm(x[rows], case.weight, case.bias, comm=comm)
            dx, dweight, _ = arraybn.batch_norm_backward(case.dy[rows], saved)
            return float((case.v[rows] * dx).sum() + (vectors[comm.rank] * dweight).sum())

        return sum(ThreadComm.run(2, work))

    def second(comm: ThreadComm) -> Any:
        part = case.part(comm.rank)
        _, saved = arraybn.batch_norm(part["x"], case.weight, case.bias, comm=comm)
        return arraybn.batch_norm_double_backward(part["v"], part["dy"], saved, vectors[comm.rank])[1]

    ddx = np.concatenate(ThreadComm.run(2, second))
    along = np.random.default_rng(1).standard_normal(ddx.shape)
    assert_with_control((ddx * along).sum(), slope(lambda t: loss(case.x + t * along)), 1e-7, abs(ddx * along).max())

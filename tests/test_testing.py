"""The testing kit: right batch norms pass, and each planted fault is found and named."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import find, given, settings
from support.libraries import need

import arraybn
from arraybn.bench.truth import worst as bench_worst
from arraybn.testing import (
    AccuracyError,
    BatchNormError,
    assert_close,
    check_batch_norm,
    check_vjp,
    exact_batch_norm,
    exact_moments,
    named_batches,
    oracle,
    scenarios,
    strategies,
    sums,
    ulp,
    worst,
)
from arraybn.testing.properties import PROPERTIES

Functions = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


# ---- A batch norm in float64 with a part to exchange ----


def make(
    *,
    wide: Any = np.float64,
    axes: tuple[int, ...] = (0, 2),
    var: Callable[..., Any] = lambda x, mean, axes: ((x - mean) ** 2).mean(axis=axes, keepdims=True),
    mean_of: Callable[..., Any] = lambda x, axes: x.mean(axis=axes, keepdims=True),
    root: Callable[..., Any] = lambda var, eps: np.sqrt(var + eps),
    scale: Callable[..., Any] = lambda xhat, w, b: w * xhat + b,
    dx: Callable[..., Any] = lambda g, xhat, w, r, sums, n: w * r * (g - sums[1] / n - xhat * sums[0] / n),
    sums: Callable[..., Any] = lambda g, x, mean, xhat, w: ((g * xhat).sum((0, 2)), g.sum((0, 2))),
    new: Callable[..., Any] = lambda old, value, momentum: (1 - momentum) * old + momentum * value,
    correct: Callable[..., Any] = lambda var, n: var * n / max(n - 1, 1),
) -> Functions:
    """Return forward, backward and update from the definition, in numbers of the dtype `wide`."""

    def parts(x: Any, w: Any, eps: float) -> Any:
        x = x.astype(wide)
        mean = mean_of(x, axes)
        r = 1 / root(var(x, mean, axes), wide(eps))
        return x, mean, r, (x - mean) * r, w.astype(wide)[:, None]

    def forward(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        *_, xhat, w = parts(x, weight, eps)
        return scale(xhat, w, bias.astype(wide)[:, None]).astype(x.dtype)

    def backward(dy: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        x64, mean, r, xhat, w = parts(x, weight, eps)
        g, n = dy.astype(wide), x.shape[0] * x.shape[2]
        dweight, dbias = sums(g, x64, mean, xhat, w)
        right = [s[:, None] for s in ((g * xhat).sum((0, 2)), g.sum((0, 2)))]
        return dx(g, xhat, w, r, right, n).astype(dy.dtype), dweight, dbias

    def update(running_mean: Any, running_var: Any, x: Any, momentum: float) -> Any:
        x64, mean, *_ = parts(x, np.ones(x.shape[1]), 0.0)
        n = x.shape[0] * x.shape[2]
        unbiased = correct(var(x64, mean, axes).ravel(), n)
        mean, unbiased = new(running_mean, mean.ravel(), momentum), new(running_var, unbiased, momentum)
        return mean.astype("f4"), unbiased.astype("f4")

    return forward, backward, update


def one_pass(x: Any, mean: Any, axes: Any) -> Any:
    return (x * x).mean(axis=axes, keepdims=True) - mean**2


def spoiled_input(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    y = make()[0](x, weight, bias, eps)
    x -= x.mean()
    return y


def nan_spreads(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    y = make()[0](x, weight, bias, eps)
    return y + 0 * y.sum()


def nan_hides(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return make()[0](np.nan_to_num(x, posinf=0, neginf=0), weight, bias, eps)


class Remembers:
    """A faulty batch norm that shifts by the mean of the last call."""

    def __init__(self) -> None:
        self.shift = 0.0

    def __call__(self, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        y = make()[0](x, weight, bias, eps) + np.float32(self.shift)
        self.shift = float(np.sin(np.nan_to_num(x).sum()))
        return y


def folded(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    mean, var = x.mean((0, 2), dtype="f8"), x.var((0, 2), dtype="f8")
    a = (weight / np.sqrt(var + eps)).astype("f4")
    return x * a[:, None] + (bias - mean * a).astype("f4")[:, None]


class Reuses:
    """A faulty batch norm that returns the same memory each time."""

    def __call__(self, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        self.memory = getattr(self, "memory", {})
        y = self.memory.setdefault(x.shape, np.zeros_like(x))
        y[...] = make()[0](x, weight, bias, eps)
        return y


def of_equal_blocks(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Normalize by the average of the means of blocks, as if the last block were as long as the rest."""

    def mean_of(x: Any, axes: Any) -> Any:
        flat = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
        blocks = [flat[:, i : i + 1000].mean(axis=1) for i in range(0, flat.shape[1], 1000)]
        return np.mean(blocks, axis=0)[None, :, None]

    return make(mean_of=mean_of)[0](x, weight, bias, eps)


def first_channels(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Leave channels from 32 on as they are."""
    y = make()[0](x, weight, bias, eps)
    y[:, 32:] = x[:, 32:]
    return y


def noisy_half(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return make()[0](x, weight, bias, eps) * np.float32(1.004)


def in_half(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return make()[0](x, weight, bias, eps).astype("f2").astype(x.dtype)


NEAR, Y, DX, MEAN, VAR = ("near", "y is what", "dx is what", "running_mean takes", "running_var takes")

# what is planted, which property must fail, and what must be said of the cause
PLANTED: dict[str, tuple[Functions | Callable[..., Any], str, str]] = {
    "unbiased variance": (
        make(var=lambda x, m, a: x.var(axis=a, keepdims=True, ddof=1)),
        Y,
        "divided by n − 1; in the forward it is biased",
    ),
    "eps outside the root": (make(root=lambda v, e: np.sqrt(v) + e), Y, "eps stands outside the root"),
    "no eps": (make(root=lambda v, e: np.sqrt(v)), Y, "eps is left out"),
    "no root": (make(root=lambda v, e: v + e), Y, "the root is missing"),
    "no weight": (make(scale=lambda xhat, w, b: xhat + b), Y, "weight is left out"),
    "no bias": (make(scale=lambda xhat, w, b: w * xhat), Y, "bias is left out"),
    "exchanged": (make(scale=lambda xhat, w, b: b * xhat + w), Y, "weight and bias are exchanged"),
    "eps fixed": (lambda x, w, b, eps: make()[0](x, w, b, 1e-5), Y, "eps is 1e-5 whatever is asked for"),
    "eps as least": (make(root=lambda v, e: np.sqrt(np.maximum(v, e))), Y, "eps is the least that var can be"),
    "1 + weight": (make(scale=lambda xhat, w, b: (1 + w) * xhat + b), Y, "weight is taken as 1 + weight"),
    "reused memory": (Reuses(), "a call leaves nothing behind", ""),
    "equal blocks": (of_equal_blocks, Y, ""),
    "first channels": (first_channels, Y, ""),
    "0.4 % too large": (noisy_half, Y, ""),
    "bias scaled": (make(scale=lambda xhat, w, b: w * (xhat + b)), Y, "weight multiplies bias too"),
    "layer norm": (make(axes=(1, 2)), Y, "over each sample, as in layer norm"),
    "instance norm": (make(axes=(2,)), Y, "as in instance norm"),
    "samples alone": (make(axes=(0,)), Y, "over the samples alone"),
    "all channels": (make(axes=(0, 1, 2)), Y, "over all channels together"),
    "one pass in float32": (make(wide=np.float32, var=one_pass), "y keeps its digits where", "E[x²] − E[x]²"),
    "one pass, never negative": (
        make(wide=np.float32, var=lambda x, m, a: np.maximum(one_pass(x, m, a), 0)),
        "y keeps its digits where",
        "E[x²] − E[x]²",
    ),
    "folded": (folded, "y keeps its digits where", "folded into the bias"),
    "mean in float32": (
        make(mean_of=lambda x, a: x.mean(axis=a, keepdims=True).astype("f4")),
        "y keeps its digits where",
        "same for all values of a channel",
    ),
    "half precision": (in_half, Y, "half precision"),
    "input written": (spoiled_input, "forward leaves its arguments", ""),
    "NaN spreads": (nan_spreads, "a NaN stays in its channel", ""),
    "NaN hides": (nan_hides, "a NaN stays in its channel", ""),
    "remembers": (Remembers(), "a call leaves nothing behind", ""),
    "no dbias term": (
        make(dx=lambda g, xhat, w, r, s, n: w * r * (g - xhat * s[0] / n)),
        DX,
        "term dbias/n of (E6) is missing",
    ),
    "no dweight term": (
        make(dx=lambda g, xhat, w, r, s, n: w * r * (g - s[1] / n)),
        DX,
        "term xhat·dweight/n of (E6) is missing",
    ),
    "fixed statistics": (make(dx=lambda g, xhat, w, r, s, n: w * r * g), DX, "both sums of (E6) are missing"),
    "no weight in dx": (
        make(dx=lambda g, xhat, w, r, s, n: r * (g - s[1] / n - xhat * s[0] / n)),
        DX,
        "weight is left out of dx",
    ),
    "sign": (make(dx=lambda g, xhat, w, r, s, n: w * r * (g + s[1] / n + xhat * s[0] / n)), DX, "sign of the sums"),
    "dweight of x": (make(sums=lambda g, x, m, xhat, w: ((g * x).sum((0, 2)), g.sum((0, 2)))), "dweight is", "dy·x;"),
    "mean gradients": (
        make(sums=lambda g, x, m, xhat, w: ((g * xhat).sum((0, 2)), g.mean((0, 2)))),
        "dbias is",
        "dbias is a mean",
    ),
    "momentum reversed": (
        make(new=lambda old, value, a: a * old + (1 - a) * value),
        MEAN,
        "momentum is the weight of the old value",
    ),
    "biased running_var": (make(correct=lambda v, n: v), VAR, "enters biased"),
    "two passes in float32": (
        make(wide=np.float32, var=lambda x, m, a: x.var(axis=a, keepdims=True)),
        "running_var keeps",
        "mean that is taken away is itself rounded",
    ),
    "exchanged statistics": (
        (make()[0], make()[1], lambda *a: make()[2](*a)[::-1]),
        MEAN,
        "running_mean and running_var are exchanged",
    ),
    "eps of the forward alone": (
        (make()[0], lambda dy, x, w, b, eps: make()[1](dy, x, w, b, 0.0), make()[2]),
        DX,
        "eps is left out of the backward",
    ),
    "dx in float64": (
        (make()[0], lambda dy, x, w, b, eps: make()[1](dy.astype("f8"), x, w, b, eps), make()[2]),
        "dx is of the dtype",
        "",
    ),
    "Keras": (
        make(new=lambda old, v, a: a * old + (1 - a) * v, correct=lambda v, n: v),
        VAR,
        "and the variance enters biased",
    ),
    "standard deviation": (make(correct=lambda v, n: np.sqrt(v * n / max(n - 1, 1))), VAR, "the standard deviation"),
}

ROUGH = ("folded", "mean in float32", "two passes in float32")  # the formula is right, in too few digits


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_fault_is_found_and_named(name: str) -> None:
    functions, broken, cause = PLANTED[name]
    functions = functions if isinstance(functions, tuple) else (functions, None, None)
    with pytest.raises(BatchNormError) as caught:
        check_batch_norm(*functions, examples=5)
    assert isinstance(caught.value, AccuracyError) == (name in ROUGH)
    failures = {failure.property: failure for failure in caught.value.failures}
    found = [failure for asked, failure in failures.items() if asked.startswith(broken)]
    assert found, f"{broken!r} holds; what fails: {list(failures)}"
    assert cause in found[0].cause, found[0].cause
    assert bool(cause) == bool(found[0].cause), found[0].cause  # a wrong cause is worse than none
    assert found[0].property in str(caught.value)
    assert found[0].error > found[0].limit
    if cause and broken == Y and "half" not in cause:
        assert found[0].batch.x.size <= 12  # made small


def test_a_fault_in_one_place_leaves_the_other_properties_standing() -> None:
    with pytest.raises(BatchNormError) as caught:
        check_batch_norm(*make(correct=lambda v, n: v), examples=5)
    assert all(failure.property.startswith("running_var") for failure in caught.value.failures)
    assert str(caught.value).startswith(f"{len(caught.value.failures)} of {len(PROPERTIES)} properties of a batch norm")


def ours(xp: Any = None, kernels: str | None = None) -> Functions:
    """arraybn's own."""

    def forward(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return arraybn.batch_norm(x, weight, bias, eps=eps, kernels=kernels)

    def backward(dy: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return arraybn.batch_norm_backward(dy, forward(x, weight, bias, eps)[1])

    def update(running_mean: Any, running_var: Any, x: Any, momentum: float) -> Any:
        return arraybn.update_running_stats(running_mean, running_var, arraybn.moments(x), momentum)

    return forward, backward, update


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_arraybn_passes(dtype: str, kernels: str) -> None:
    if dtype == "bfloat16":
        need("ml_dtypes")
    seen: list[str] = []
    max_ratio = 1e6 if dtype == "float32" else 100.0
    check_batch_norm(
        *ours(kernels=kernels), dtype=dtype, max_ratio=max_ratio, report=lambda name, failure: seen.append(name)
    )
    assert seen == [asked.name for asked in PROPERTIES]


def test_the_definition_in_float64_passes() -> None:
    check_batch_norm(*make())


@pytest.mark.parametrize("var", [None, lambda x, m, a: x.var(axis=a, keepdims=True)])
def test_float32_throughout_passes_near_zero_mean_and_not_far_from_it(var: Any) -> None:
    functions = make(wide=np.float32, **({} if var is None else {"var": var}))
    check_batch_norm(*functions, tolerance=32, max_ratio=1)
    with pytest.raises(AccuracyError, match="y keeps its digits where the mean is far from zero"):
        check_batch_norm(*functions, tolerance=32)


# ---- Accuracy of sums, apart from faults ----

PLAIN = {  # the formulas as they stand in a book, in the dtype of x
    "x.var": make(wide=np.float32, var=lambda x, m, a: x.var(axis=a, keepdims=True)),
    "Σ(x−mean)²": make(wide=np.float32),
    "one after the other": make(
        wide=np.float32, mean_of=lambda x, a: np.add.accumulate(as_rows(x), 1)[None, :, -1:] / np.float32(count(x))
    ),
}


def as_rows(x: Any) -> Any:
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


def count(x: Any) -> int:
    return int(x.shape[0] * x.shape[2])


@pytest.mark.parametrize("name", PLAIN)
def test_the_formulas_in_float32_have_a_verdict_of_their_own(name: str) -> None:
    with pytest.raises(AccuracyError) as caught:
        check_batch_norm(*PLAIN[name])
    text = str(caught.value)
    assert text.startswith("the formula is right; accuracy is that of float32 sums: ")
    assert all(failure.rough for failure in caught.value.failures)
    worst_of_all = max(caught.value.failures, key=lambda one: (one.ratio < np.inf, one.error))
    assert f" {worst_of_all.error:.2g} ulp at |mean|/std = {worst_of_all.ratio:.2g}\n" in text
    assert worst_of_all.ratio > 1e4
    told: dict[str, Any] = {}
    verdict = check_batch_norm(*PLAIN[name], accuracy="sums", report=told.__setitem__)
    assert str(verdict) == text
    assert set(told.values()) == {None}


@pytest.mark.parametrize("name", ROUGH)
def test_the_right_formula_in_too_few_digits_is_accepted_as_sums(name: str) -> None:
    functions = PLANTED[name][0]
    check_batch_norm(*(functions if isinstance(functions, tuple) else (functions,)), accuracy="sums", examples=5)


@pytest.mark.parametrize("name", ["unbiased variance", "one pass in float32", "half precision", "0.4 % too large"])
def test_sums_in_the_dtype_of_x_are_no_excuse_for_a_fault(name: str) -> None:
    functions = PLANTED[name][0]
    with pytest.raises(BatchNormError) as caught:
        check_batch_norm(*(functions if isinstance(functions, tuple) else (functions,)), accuracy="sums", examples=0)
    assert any(failure.property.startswith(PLANTED[name][1]) for failure in caught.value.verdict.faults)


def test_faults_in_float32_are_told_first_and_rough_results_after_them() -> None:
    functions = make(wide=np.float32, dx=lambda g, xhat, w, r, s, n: w * r * (g - s[1] / np.float32(n)))
    with pytest.raises(BatchNormError) as caught:
        check_batch_norm(*functions, examples=5)
    assert {failure.property.split()[0] for failure in caught.value.verdict.faults} == {"dx"}
    text = str(caught.value)
    assert 0 < text.index("usual cause: the term xhat·dweight/n") < text.index("besides, accuracy is that of float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_bounds_of_sums_hold_for_sums_and_not_for_one_permille(dtype: str) -> None:
    if dtype == "bfloat16":
        need("ml_dtypes")
    kind = scenarios.numpy_dtype(dtype)
    for ratio in (0.0, 30.0):
        batch = scenarios.normal((5, 3, 4), ratio, 1.0, seed=2)
        batch = batch._replace(x=batch.x.astype(kind), dy=batch.dy.astype(kind))
        truth = exact_batch_norm(batch.x, batch.weight, batch.bias, batch.dy, eps=batch.eps)
        forward, backward, _ = make(wide=kind.type)
        arrays = (batch.x, batch.weight, batch.bias, batch.eps)
        found = dict(zip(("dx", "dweight", "dbias"), backward(batch.dy, *arrays), strict=True)) | {
            "y": forward(*arrays)
        }
        for name, bound in sums.bounds_of_sums(batch, truth, dtype).items():
            exact = getattr(truth, name)
            assert (abs(found[name].astype(oracle.LONG) - exact) <= bound).all(), name
            if dtype == "float32" and ratio == 0:
                assert (bound < 1e-3 * abs(exact).max()).all(), name


def test_a_cause_is_told_once_on_its_smallest_batch_with_all_that_it_breaks() -> None:
    unbiased = make(var=lambda x, m, a: x.var(axis=a, keepdims=True, ddof=1))[0]
    with pytest.raises(BatchNormError) as caught:
        check_batch_norm(unbiased)
    text, names = str(caught.value), [failure.property for failure in caught.value.failures]
    assert text.count("usual cause") == text.count("on x = ") == 1
    assert re.search(r"on x = .*\n     of shape \((1, 1, 2|2, 1, 1)\)", text)
    assert text.partition("it breaks:\n")[2].split("\n") == [f"    {name}" for name in names]
    assert len(names) > 1
    assert not any(name.startswith(("a NaN", "an infinity", "channels", "the order")) for name in names)


def test_a_fault_is_not_blamed_for_what_rounding_does_to_a_constant_channel() -> None:
    unbiased = make(wide=np.float32, var=lambda x, m, a: x.var(axis=a, keepdims=True, ddof=1))[0]
    with pytest.raises(BatchNormError) as caught:
        check_batch_norm(unbiased, examples=0)
    (constant,) = (failure for failure in caught.value.failures if failure.property.startswith("a constant"))
    assert constant.rough
    assert constant not in caught.value.verdict.faults
    assert "divided by n" not in constant.cause


def test_two_causes_are_told_apart() -> None:
    unbiased = make(var=lambda x, m, a: x.var(axis=a, keepdims=True, ddof=1))[0]
    backward = make(dx=lambda g, xhat, w, r, s, n: w * r * (g - s[1] / n))[1]
    with pytest.raises(BatchNormError, match="; 2 causes:") as caught:
        check_batch_norm(unbiased, backward, examples=0)
    assert str(caught.value).count("usual cause") == 2


# ---- Shapes and arguments of the functions ----


def of_lines(x: Any, gamma: Any, beta: Any, eps: float) -> Any:
    """The batch norm of a book, of (N, C) alone."""
    mean, var = x.mean(axis=0, dtype="f8"), x.var(axis=0, dtype="f8")
    return (gamma * (x - mean) / np.sqrt(var + eps) + beta).astype(x.dtype)


def of_lines_backward(dy: Any, x: Any, gamma: Any, beta: Any, eps: float) -> Any:
    assert x.ndim == 2
    return tuple(part.reshape(x.shape) if part.ndim == 3 else part for part in _lines(dy, x, gamma, beta, eps))


def _lines(dy: Any, x: Any, gamma: Any, beta: Any, eps: float) -> Any:
    return make()[1](dy[:, :, None], x[:, :, None], gamma, beta, eps)


def of_lines_update(mean: Any, var: Any, x: Any, momentum: float) -> Any:
    assert x.ndim == 2
    return make()[2](mean, var, x[:, :, None], momentum)


def of_images(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    n, c, _, _ = x.shape
    return make()[0](x.reshape(n, c, -1), weight, bias, eps).reshape(x.shape)


def test_functions_of_n_c_alone_are_checked_and_told_so() -> None:
    verdict = check_batch_norm(of_lines, of_lines_backward, of_lines_update)
    assert str(verdict) == (
        f"all {len(PROPERTIES)} properties of a batch norm hold\n\nchecked with x of shape (N, C) alone, which is what"
        " forward and backward and update can take: positions are further samples"
    )
    images = str(check_batch_norm(of_images, make()[1], examples=5))
    assert "x of shape (N, C, H, W) alone, which is what forward can take: W is 1" in images
    assert "alone" not in str(check_batch_norm(*make(), examples=0))  # (N, C, S)


def test_a_fault_of_a_function_of_n_c_alone_is_shown_on_such_a_batch() -> None:
    def unbiased(x: Any, gamma: Any, beta: Any, eps: float) -> Any:
        n = len(x)
        return of_lines(x, gamma, beta, eps) if n < 2 else _unbiased(x, gamma, beta, eps)

    def _unbiased(x: Any, gamma: Any, beta: Any, eps: float) -> Any:
        mean, var = x.mean(axis=0, dtype="f8"), x.var(axis=0, dtype="f8", ddof=1)
        return (gamma * (x - mean) / np.sqrt(var + eps) + beta).astype(x.dtype)

    with pytest.raises(BatchNormError, match=r"of shape \(2, 1\)") as caught:
        check_batch_norm(unbiased)
    assert "divided by n − 1" in caught.value.failures[0].cause
    assert "checked with x of shape (N, C) alone" in str(caught.value)


# ---- The unit of half precision ----


def rounded(values: Any, dtype: str) -> Any:
    """Return longdoubles, correctly rounded."""
    unit = ulp(np.where(np.isfinite(values), values, 1), dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.rint(values / unit) * unit).astype(scenarios.numpy_dtype(dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_n2h_the_correctly_rounded_result_of_every_scenario_passes(dtype: str) -> None:
    if dtype == "bfloat16":
        need("ml_dtypes")
    limit = 0.5 if "16" in dtype else 2.0  # dx may be three times its largest term, so an ulp of dx is 4 of the term
    kind, larger = scenarios.numpy_dtype(dtype), 0
    for batch in named_batches().values():
        with np.errstate(over="ignore"):
            x, dy = batch.x.astype(kind), batch.dy.astype(kind)
        truth = exact_batch_norm(x, batch.weight, batch.bias, dy, eps=batch.eps)
        terms = {"y": truth.y_scale, "dx": truth.dx_scale}
        terms |= {
            "dweight": np.abs(dy.astype("g") * truth.xhat).sum((0, 2)),
            "dbias": np.abs(dy.astype("g")).sum((0, 2)),
        }
        for name, scale in terms.items():
            exact = getattr(truth, name)
            right = rounded(exact, dtype)
            assert_close(right, exact, ulp=limit, scale=scale)
            assert worst(right, exact, scale, dtype) <= limit
            larger += int((abs(exact) > scale).sum())
            if np.isfinite(exact).all() and np.isfinite(right).all():
                off = right.astype("g") + (limit + 1) * ulp(np.maximum(scale, abs(exact)), dtype)
                assert worst(off, exact, scale, dtype) > limit  # the control
                with pytest.raises(AssertionError, match="values differ by more than"):
                    assert_close(rounded(off, dtype), exact, ulp=limit, scale=scale)
    assert larger > 100  # results that are larger than each of their terms


def test_n2h_a_rounding_seen_on_a_gpu_counts_less_than_half_an_ulp() -> None:
    got, exact, term = np.asarray([1.0029296875]), np.asarray([1.00246956]), np.asarray([0.4867])
    assert worst(got, exact, term, "float16") == pytest.approx(0.471, abs=1e-3)
    assert worst(got, exact, term, "float32") > 1000  # single precision has the unit of the term
    assert bench_worst(np, got, exact, term, "float16") == pytest.approx(0.471, abs=1e-3)


def rounded_oracle(dtype: str, off: float = 0.0) -> Functions:
    """Return forward, backward that are correctly rounded; `off` ulp wrong in y, three times as much in dx."""

    def wrong(values: Any, largest: Any, share: float) -> Any:
        return rounded(values + share * ulp(np.where(np.isfinite(largest), largest, 1), dtype), dtype)

    def forward(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        truth = exact_batch_norm(x, weight, bias, x, eps=eps)
        return wrong(truth.y, np.maximum(truth.y_scale, abs(truth.y)), off)

    def backward(dy: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        truth = exact_batch_norm(x, weight, bias, dy, eps=eps)
        dx = wrong(truth.dx, np.maximum(truth.dx_scale, abs(truth.dx)), 3 * off)
        return dx, rounded(truth.dweight, dtype), rounded(truth.dbias, dtype)

    return forward, backward, backward


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_n2h_correct_rounding_passes_the_check_and_a_little_more_than_allowed_does_not(dtype: str) -> None:
    if dtype == "bfloat16":
        need("ml_dtypes")
    check_batch_norm(*rounded_oracle(dtype)[:2], dtype=dtype)
    check_batch_norm(*rounded_oracle(dtype)[:2], dtype=dtype, tolerance=0.5 if "16" in dtype else 2.0, examples=0)
    with pytest.raises(BatchNormError) as caught:
        check_batch_norm(*rounded_oracle(dtype, off=5.5)[:2], dtype=dtype, tolerance=4.0, examples=0)
    names = {failure.property for failure in caught.value.failures}
    assert {"y is what the definition gives", "dx is what the definition gives"} <= names


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dtype": "int8"}, ValueError, "dtype: expected 'float16', 'bfloat16', 'float32' or 'float64'; got 'int8'"),
        ({"accuracy": "some"}, ValueError, "accuracy: expected 'full' or 'sums'; got 'some'"),
        ({"tolerance": 0}, ValueError, "tolerance: expected a number > 0; got 0"),
        ({"tolerance": float("nan")}, ValueError, "tolerance: expected a finite number; got nan"),
        ({"max_ratio": float("inf")}, ValueError, "max_ratio: expected a finite number; got inf"),
        ({"max_ratio": 0.5}, ValueError, "max_ratio: expected a number from 1 to 1e6; got 0.5"),
        ({"examples": -1}, ValueError, "examples: expected an integer ≥ 0; got -1"),
        ({"xp": pytest}, TypeError, "xp: expected an array namespace"),
    ],
)
def test_options_are_checked_first(options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        check_batch_norm(make()[0], **options)


def test_what_a_function_raises_is_told_once() -> None:
    def forward(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        raise KeyError("scale")

    with pytest.raises(BatchNormError) as caught:
        check_batch_norm(forward, examples=0)
    text = str(caught.value)
    assert text.count("raised KeyError") == text.count("'scale'") == 1
    assert "; 1 cause:" in text
    listed = text.partition("it breaks:\n")[2].splitlines()
    assert sorted(map(str.strip, listed)) == sorted(one.property for one in caught.value.failures)
    assert len(listed) == sum(prop.needs == "forward" for prop in PROPERTIES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arraybn_passes_on_torch_tensors(dtype: str) -> None:
    check_batch_norm(*ours(), xp=need("torch"), dtype=dtype, examples=5)


def test_pytorch_itself_keeps_its_digits_near_zero_mean_and_loses_them_far_from_it() -> None:
    torch = need("torch")

    def forward(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

    with pytest.raises(BatchNormError) as caught:
        check_batch_norm(forward, xp=torch, tolerance=64, examples=0)
    assert "y keeps its digits where the mean is far from zero" in [f.property for f in caught.value.failures]
    assert "y is what the definition gives" not in [f.property for f in caught.value.failures]


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (lambda x, weight, bias, eps: x[:1], r"y is float32 \(1, 1, 1\); expected float32 \(2, 1, 1\)"),
        (lambda x, weight, bias, eps: x.astype(int), "y has dtype int64; expected real floating numbers"),
        (lambda x, weight, bias, eps: None, "raised TypeError: y: expected what numpy.asarray or DLPack takes"),
        (lambda x, weight, bias, eps: x.astype("f8"), r"y is float64 \(1, 1, 2\); expected float32 \(1, 1, 2\)"),
    ],
)
def test_what_is_no_batch_norm_at_all_is_told_so(forward: Any, text: str) -> None:
    with pytest.raises(BatchNormError, match=text):
        check_batch_norm(forward, examples=0)


# ---- The parts ----


def test_the_oracle_is_exact_where_sums_of_floats_are_not() -> None:
    mean, m2 = exact_moments(np.asarray([1e16, 1.0, -1e16]))
    assert mean * 3 == 1
    assert m2 == 2 * 10**32 + 1 - mean
    assert float(np.asarray([1e16, 1.0, -1e16]).mean()) == 0  # the control
    tiny = exact_moments(np.asarray([5e-324, 1e308]))
    assert tiny[0] * 2 == Fraction(1e308) + Fraction(5e-324)
    huge = np.asarray([[1.3e308], [-1.3e308]])
    assert exact_batch_norm(huge, [1.0], [0.0], huge, eps=0).y.astype(float).tolist() == [[1], [-1]]


def test_the_oracle_gives_the_textbook_numbers_and_every_channel_axis() -> None:
    x = np.asarray([[1.0, 10.0], [3.0, 30.0]])
    for axis, values in ((1, x), (0, x.T)):
        exact = exact_batch_norm(values, [2.0, 1.0], [0.0, 5.0], values, eps=0.0, channel_axis=axis)
        y = np.moveaxis(exact.y, axis, 1).astype(float)
        assert y.tolist() == [[-2, 4], [2, 6]]
        assert exact.mean.astype(float).tolist() == [2, 20]
        assert exact.dbias.astype(float).tolist() == [4, 40]
        assert abs(exact.dx).max() < 1e-17


def test_the_oracle_of_nothing_and_of_what_is_not_finite() -> None:
    assert exact_batch_norm(np.zeros((0, 2)), np.ones(2), np.ones(2), np.zeros((0, 2)), eps=1).y.shape == (0, 2)
    x = np.asarray([[1.0, np.nan], [2.0, 1.0]])
    exact = exact_batch_norm(x, np.ones(2), np.ones(2), x, eps=1)
    assert np.isnan(exact.y).tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize(("dtype", "one", "small"), [("float16", 2**-10, 2**-24), ("float32", 2**-23, 2**-149)])
def test_ulp_is_the_distance_of_neighbours(dtype: str, one: float, small: float) -> None:
    assert [float(u) for u in ulp([1.0, 0.0, 1.999], dtype)] == [one, small, one]
    values = np.abs(np.random.default_rng(0).standard_normal(100)).astype(dtype)
    np.testing.assert_array_equal(ulp(values, dtype).astype(float), np.spacing(values).astype(float))


def test_worst_counts_nan_as_right_only_where_it_is_due() -> None:
    nan, one = np.asarray([np.nan]), np.asarray([1.0])
    assert worst(nan, nan, one, "float32") == 0
    assert worst(one, nan, one, "float32") == worst(nan, one, one, "float32") == np.inf


def test_assert_close_tells_kind_and_value_apart() -> None:
    strict = need("array_api_strict")
    a = np.asarray([1.0, 2.0], "f4")
    assert_close(a, a.astype(np.longdouble), ulp=0, dtype="float32")
    assert_close(np.asarray([np.nan, np.inf]), np.asarray([np.nan, np.inf]), ulp=0)
    for actual, desired, options, text in (
        (a, a[:1], {}, r"expected shape \(1,\); got \(2,\)"),
        (a, a.astype("f8"), {}, "expected dtype float64; got float32"),
        (a, a.astype(np.longdouble), {"dtype": "float64"}, "expected dtype float64; got float32"),
        (a, strict.asarray(a), {}, "expected a array_api_strict array; got a numpy array"),
        (strict.ones(2, device=strict.Device("device1")), strict.ones(2), {}, "expected on .*CPU.*; got on .*device1"),
        ([1.0], a, {}, "expected an array; got list"),
        (a, np.nextafter(a, np.float32(9)), {}, r"2 of 2 values differ by more than 0.5 ulp of float32: by 1 at index"),
        (np.asarray([np.nan]), np.asarray([1.0]), {}, "by inf"),
        (a, a, {"ulp": float("nan")}, "2 of 2 values differ"),
        (np.asarray([np.inf]), np.asarray([-np.inf]), {}, "by inf"),
    ):
        with pytest.raises(AssertionError, match=text):
            assert_close(actual, desired, **{"ulp": 0.5, **options})
    assert_close(a, np.nextafter(a, np.float32(9)), ulp=1)
    assert_close(a + np.float32(1e-3), a, ulp=1, scale=1e5)


def test_check_vjp_tells_a_gradient_that_is_off_by_a_tenth_of_a_percent() -> None:
    x, dy = np.linspace(1, 2, 6).reshape(2, 3), np.linspace(-1, 1, 6).reshape(2, 3)
    check_vjp(np.sin, [x], dy, [dy * np.cos(x)])
    with pytest.raises(AssertionError, match=r"argument 0: by differences .*, by the backward"):
        check_vjp(np.sin, [x], dy, [1.001 * dy * np.cos(x)])
    with pytest.raises(AssertionError, match=r"argument 0: expected a gradient of shape \(2, 3\); got \(3, 2\)"):
        check_vjp(np.sin, [x], dy, [(dy * np.cos(x)).T])
    for gradients, options in (([], {}), ([dy], {"directions": 0})):
        with pytest.raises(ValueError, match="gradients, directions: expected at least one of each"):
            check_vjp(np.sin, [x], dy, gradients, **options)
    with pytest.raises(ValueError, match=r"dy: expected shape \(2, 3\), that of the function's result; got \(3,\)"):
        check_vjp(np.sin, [x], dy[0], [dy])


@pytest.mark.parametrize("options", [{"kinds": ["norml"]}, {"dtype": "int8"}, {"least": 100}, {"max_ratio": 0.1}])
def test_strategies_refuse_what_they_do_not_know(options: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        find(strategies.batches(**options), lambda batch: True)


@pytest.mark.parametrize("kind", strategies.KINDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_strategies_draw_what_they_say(kind: str, dtype: str) -> None:
    seen: list[Any] = []

    @settings(max_examples=20)
    @given(strategies.batches(kinds=[kind], dtype=dtype, max_ratio=1e3, least=2))
    def draw(batch: Any) -> None:
        x = batch.x
        seen.append(x.astype("f8"))
        n, c, s = x.shape
        assert x.dtype == batch.dy.dtype == scenarios.numpy_dtype(dtype)
        x = x.astype("f8")
        assert batch.weight.shape == batch.bias.shape == (c,)
        assert n * s >= 2
        spread = [len(np.unique(x[:, i])) for i in range(c)]
        at_the_end = kind == "huge" and n * s == 2  # of the range, where two values may be cut to one
        assert (max(spread) == 1) == (kind == "constant") or dtype in ("float16", "bfloat16") or at_the_end
        assert np.isfinite(x).all() == (kind not in ("nan", "inf"))
        if kind == "tiny":
            assert abs(x).max() <= 2.0 ** (oracle.SMALLEST_EXPONENT[dtype] + 1)

    draw()
    assert len({x.shape for x in seen}) > 3
    if kind == "huge":
        assert max(abs(x).max() for x in seen) > oracle.largest_number(dtype) / 4


@given(strategies.batches(), strategies.layouts())
def test_layouts_change_no_value_and_no_result_beyond_rounding(batch: Any, layout: Any) -> None:
    x = layout(batch.x)
    assert (x == batch.x).all()
    y, _ = arraybn.batch_norm(x, batch.weight, batch.bias, eps=batch.eps)
    exact = exact_batch_norm(batch.x, batch.weight, batch.bias, batch.dy, eps=batch.eps)
    assert_close(y, exact.y, ulp=4, scale=exact.y_scale, dtype="float32")


def test_the_table_has_every_kind_of_batch() -> None:
    table = named_batches()
    assert {"images, very far", "one value, standard", "outliers", "constant", "nearly constant"} <= set(table)
    assert all(batch.x.shape[1] == len(batch.weight) for batch in table.values())

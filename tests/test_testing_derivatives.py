"""The testing kit on forward mode and double backward: right ones pass, and each planted fault is found and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.libraries import need

import arraybn
from arraybn.testing import AccuracyError, BatchNormError, check_batch_norm, exact_double_backward, exact_jvp, scenarios
from arraybn.testing.derivatives import DERIVATIVES
from arraybn.testing.oracle import LONG
from arraybn.testing.properties import PROPERTIES, tangents
from arraybn.testing.sums import bounds_of_derivatives


class Parts:
    """The numbers of E8 and E9 in the dtype `wide`; vectors are (C, 1)."""

    def __init__(self, wide: Any, x: Any, *arrays: Any, eps: float) -> None:
        x = x.astype(wide)
        centred = x - self.mean(x)
        self.r = 1 / np.sqrt(self.mean(centred * centred) + wide(eps))
        self.xhat, self.n = centred * self.r, x[:, 0].size
        self.arrays = [a.astype(wide) if a.ndim == 3 else a.astype(wide)[:, None] for a in arrays]

    @staticmethod
    def mean(t: Any) -> Any:
        return t.mean((0, 2), keepdims=True)

    def p(self, t: Any) -> Any:
        return t - self.mean(t) - self.xhat * self.mean(t * self.xhat)


def definition_jvp(part: Parts, u: Any, w: Any, slope: Any, constant: Any) -> Any:
    return w * part.r * part.p(u) + slope * part.xhat + constant


def definition_ddx(part: Parts, v: Any, g: Any, w: Any, v_weight: Any) -> Any:
    q, v1, g1 = part.mean(v * part.p(g)), part.mean(v * part.xhat), part.mean(g * part.xhat)
    second = part.xhat * q + part.p(v) * g1 + part.p(g) * v1
    return -w * part.r**2 * second + v_weight * part.r * part.p(g)


def definition_ddweight(part: Parts, v: Any, g: Any, w: Any) -> Any:
    return part.n * part.r * part.mean(v * part.p(g))


def make_jvp(y_dot: Any = definition_jvp, wide: Any = np.float64) -> Callable[..., Any]:
    def jvp(x_dot: Any, x: Any, weight: Any, weight_dot: Any, bias_dot: Any, eps: float) -> Any:
        part = Parts(wide, x, x_dot, weight, weight_dot, bias_dot, eps=eps)
        return y_dot(part, *part.arrays).astype(x.dtype)

    return jvp


def make_double(
    ddy: Any = definition_jvp, ddx: Any = definition_ddx, ddweight: Any = definition_ddweight, wide: Any = np.float64
) -> Callable[..., Any]:
    def double(v: Any, dy: Any, x: Any, weight: Any, v_weight: Any, v_bias: Any, eps: float) -> Any:
        part = Parts(wide, x, v, dy, weight, v_weight, v_bias, eps=eps)
        v, g, w, v_weight, v_bias = part.arrays
        by_dy, by_x = ddy(part, v, w, v_weight, v_bias), ddx(part, v, g, w, v_weight)
        return by_dy.astype(x.dtype), by_x.astype(x.dtype), ddweight(part, v, g, w).reshape(-1)

    return double


def backward(dy: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return arraybn.batch_norm_backward(dy, forward_saved(x, weight, eps))


def forward_saved(x: Any, weight: Any, eps: float) -> Any:
    return arraybn.batch_norm(x, weight, 0 * weight, eps=eps)[1]


def forward(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return arraybn.batch_norm(x, weight, bias, eps=eps)[0]


def ours(kernels: str) -> dict[str, Any]:
    def saved(x: Any, weight: Any, eps: float) -> Any:
        return arraybn.batch_norm(x, weight, 0 * weight, eps=eps, kernels=kernels)[1]

    return {
        "jvp": lambda x_dot, x, weight, weight_dot, bias_dot, eps: arraybn.batch_norm_jvp(
            x_dot, saved(x, weight, eps), weight_dot, bias_dot
        ),
        "double_backward": lambda v, dy, x, weight, v_weight, v_bias, eps: arraybn.batch_norm_double_backward(
            v, dy, saved(x, weight, eps), v_weight, v_bias
        ),
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_arraybn_passes(dtype: str, kernels: str) -> None:
    for library in {"cpu": ["numba"], "reference": []}[kernels] + (["ml_dtypes"] if dtype == "bfloat16" else []):
        need(library)
    seen: list[str] = []
    max_ratio = 1e4 if dtype == "float32" else 100.0
    verdict = check_batch_norm(
        forward,
        backward,
        **ours(kernels),
        dtype=dtype,
        max_ratio=max_ratio,
        examples=5,
        report=lambda name, failure: seen.append(name),
    )
    assert verdict.failures == []
    update = [prop.name for prop in PROPERTIES if prop.needs == "update"]
    assert seen == [prop.name for prop in (*PROPERTIES, *DERIVATIVES) if prop.name not in update]


def test_the_definition_in_float64_passes_and_in_float32_is_right_but_rough() -> None:
    check_batch_norm(forward, backward, jvp=make_jvp(), double_backward=make_double(), examples=5)
    plain = {"jvp": make_jvp(wide=np.float32), "double_backward": make_double(wide=np.float32)}
    with pytest.raises(AccuracyError, match="ddx keeps its digits where the mean is far from zero"):
        check_batch_norm(forward, backward, **plain, examples=5)
    verdict = check_batch_norm(forward, backward, **plain, examples=5, accuracy="sums")
    assert verdict.faults == []
    assert verdict.failures


def test_the_functions_may_take_lines_only() -> None:
    def as_lines(function: Any) -> Any:
        def called(*arguments: Any) -> Any:
            assert all(a.ndim < 3 for a in arguments[:-1])
            *arrays, eps = arguments
            found = function(*(a[:, :, None] if a.ndim == 2 else a for a in arrays), eps)
            parts = found if isinstance(found, tuple) else (found,)
            parts = tuple(a[..., 0] if a.ndim == 3 else a for a in parts)
            return parts if isinstance(found, tuple) else parts[0]

        return called

    verdict = check_batch_norm(forward, jvp=as_lines(make_jvp()), double_backward=as_lines(make_double()), examples=0)
    assert "of shape (N, C) alone, which is what jvp and double_backward can take" in str(verdict)


# ---- Planted faults --------------------------------------------------------------------------------------------------

m = Parts.mean


def terms(part: Parts, v: Any, g: Any, w: Any, v_weight: Any) -> tuple[Any, ...]:
    """Return the three terms of E9 with weight, and the one with v_weight."""
    v1, g1, scale = m(v * part.xhat), m(g * part.xhat), -w * part.r**2
    products = part.xhat * m(v * part.p(g)), part.p(v) * g1, part.p(g) * v1
    return *(scale * product for product in products), v_weight * part.r * part.p(g)


def of_terms(change: Callable[..., Any]) -> Any:
    return lambda p, v, g, w, v_weight: change(*terms(p, v, g, w, v_weight), p, v, g, w)


TANGENTS = {  # of y_dot, and of ddy
    "a sign": (
        lambda p, u, w, s, c: w * p.r * (u - m(u) + p.xhat * m(u * p.xhat)) + s * p.xhat + c,
        "the sign of xhat·⟨",
    ),
    "a missing mean": (
        lambda p, u, w, s, c: w * p.r * (u - p.xhat * m(u * p.xhat)) + s * p.xhat + c,
        "of P is missing",
    ),
    "a missing projection": (lambda p, u, w, s, c: w * p.r * (u - m(u)) + s * p.xhat + c, "·xhat⟩ of P is missing"),
    "statistics as constants": (
        lambda p, u, w, s, c: w * p.r * u + s * p.xhat + c,
        "statistics are treated as constants",
    ),
    "n − 1": (
        lambda p, u, w, s, c: w * p.r * (u - (u - p.p(u)) * p.n / max(p.n - 1, 1)) + s * p.xhat + c,
        "n − 1 stands for n in P",
    ),
    "sums for means": (lambda p, u, w, s, c: w * p.r * (u - p.n * (u - p.p(u))) + s * p.xhat + c, "not divided by n"),
    "weight twice": (lambda p, u, w, s, c: w * w * p.r * p.p(u) + s * p.xhat + c, "twice"),
    "no weight": (lambda p, u, w, s, c: p.r * p.p(u) + s * p.xhat + c, "weight is left out of"),
    "no slope": (lambda p, u, w, s, c: w * p.r * p.p(u) + c, "·xhat is left out"),
    "no constant": (lambda p, u, w, s, c: w * p.r * p.p(u) + s * p.xhat, "is left out"),
}

DDX = {
    "no Q": (of_terms(lambda q, v, g, b, *_: v + g + b), "xhat·Q of (E9) is missing"),
    "no P(v)": (of_terms(lambda q, v, g, b, *_: q + g + b), "P(v)·⟨dy·xhat⟩ of (E9) is missing"),
    "no P(g)": (of_terms(lambda q, v, g, b, *_: q + v + b), "P(dy)·⟨v·xhat⟩ of (E9) is missing"),
    "no v_weight": (of_terms(lambda q, v, g, b, *_: q + v + g), "v_weight·rstd·P(dy) of (E9) is missing"),
    "a sign": (of_terms(lambda q, v, g, b, *_: v + g + b - q), "sign of xhat·Q in (E9) is wrong"),
    "signs": (of_terms(lambda q, v, g, b, *_: b - v - g - q), "sign of the terms with weight"),
    "V₁ for V₀": (
        of_terms(
            lambda q, _, g, b, p, v, dy, w: q - w * p.r**2 * m(dy * p.xhat) * (v - m(v * p.xhat) * (1 + p.xhat)) + g + b
        ),
        "⟨v·xhat⟩ stands for ⟨v⟩",
    ),
    "n − 1": (of_terms(lambda q, v, g, b, p, *_: (q + v + g) * p.n / max(p.n - 1, 1) + b), "n − 1 stands for n"),
    "weight twice": (of_terms(lambda q, v, g, b, p, v_, g_, w: w * (q + v + g) + b), "weight enters ddx twice"),
    "statistics as constants": (
        lambda p, v, g, w, v_weight: v_weight * p.r * g,
        "statistics are treated as constants: ddx",
    ),
    "Q alone": (
        of_terms(lambda q, v, g, b, p, v_, g_, w: v + g + b - w * p.r**2 * p.xhat * m(v_ * g_)),
        "Q is ⟨v·dy⟩ alone",
    ),
}
DDWEIGHT = {
    "a mean": (lambda p, v, g, w: p.r * m(v * p.p(g)), "ddweight is a mean"),
    "constants": (lambda p, v, g, w: p.n * p.r * m(v * g), "ddweight is rstd·Σv·dy"),
    "weight": (lambda p, v, g, w: w * p.n * p.r * m(v * p.p(g)), "a factor weight too many"),
}
PLANTED = {
    **{f"y_dot: {name}": (make_jvp(f), "jvp", "y_dot", cause) for name, (f, cause) in TANGENTS.items()},
    **{f"ddy: {name}": (make_double(ddy=f), "double_backward", "ddy", c) for name, (f, c) in TANGENTS.items()},
    **{f"ddx: {name}": (make_double(ddx=f), "double_backward", "ddx", c) for name, (f, c) in DDX.items()},
    **{f"ddweight: {n}": (make_double(ddweight=f), "double_backward", "ddweight", c) for n, (f, c) in DDWEIGHT.items()},
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_fault_is_found_and_named(name: str) -> None:
    function, role, result, cause = PLANTED[name]
    with pytest.raises(BatchNormError) as caught:
        check_batch_norm(forward, **{role: function}, examples=0)
    assert not isinstance(caught.value, AccuracyError)
    failures = {failure.property: failure for failure in caught.value.failures}
    found = failures[f"{result} is what the definition gives"]
    assert cause in found.cause, found.cause
    assert found.batch.x.size <= 24  # made small
    text = str(caught.value)
    assert "     v = [" in text
    assert ("     dy = [" in text) == (role == "double_backward")
    others = {"y_dot", "ddy", "ddx", "ddweight"} - {result}
    assert not any(one.startswith(tuple(others)) for one in failures), list(failures)


def not_linear(p: Parts, v: Any, g: Any, w: Any, v_weight: Any) -> Any:
    return definition_ddx(p, v, g, w, v_weight) + 0.1 * p.r * v**2


def not_symmetric(p: Parts, v: Any, g: Any, w: Any, v_weight: Any) -> Any:
    return of_terms(lambda q, of_v, of_g, b, *_: q + of_v + 3 * of_g + b)(p, v, g, w, v_weight)


def with_a_sum(p: Parts, v: Any, g: Any, w: Any, v_weight: Any) -> Any:
    return definition_ddx(p, v, g, w, v_weight) + 0.1 * w * p.r * p.r * m(v * v)


RULES = {  # broken by faults that are not in the tables
    "double_backward is linear": (not_linear, "double_backward"),
    "ddx is symmetric in v": (not_symmetric, "double_backward"),
    "ddx sums to zero": (with_a_sum, "double_backward"),
    "y_dot sums to n·bias_dot": (lambda p, u, w, s, c: definition_jvp(p, u, w, s, c) + 0.1, "jvp"),
    "y_dot is linear": (lambda p, u, w, s, c: definition_jvp(p, u, w, s, c) + 0.1 * u * s, "jvp"),
    "jvp is the transpose": (lambda p, u, w, s, c: definition_jvp(p, u, w, 1.1 * s, c), "jvp"),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_can_be_broken(rule: str) -> None:
    fault, role = RULES[rule]
    function = make_jvp(fault) if role == "jvp" else make_double(ddx=fault)
    with pytest.raises(BatchNormError) as caught:
        check_batch_norm(forward, backward, **{role: function}, examples=0)
    assert any(failure.property.startswith(rule) for failure in caught.value.verdict.faults)
    assert not any(failure.cause for failure in caught.value.failures)  # a wrong cause is worse than none


def test_arguments_that_are_written_into_and_wrong_dtypes_are_found() -> None:
    def spoils(x_dot: Any, *rest: Any) -> Any:
        y_dot = make_jvp()(x_dot, *rest)
        x_dot *= 2
        return y_dot

    def wide(*arguments: Any) -> Any:
        ddy, ddx, ddweight = make_double()(*arguments)
        return ddy, ddx.astype("f8"), ddweight

    with pytest.raises(BatchNormError) as caught:
        check_batch_norm(forward, jvp=spoils, double_backward=wide, examples=0)
    broken = [failure.property for failure in caught.value.failures]
    assert broken == ["ddx is of the dtype and shape of x", "jvp leaves its arguments as they are"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_bounds_of_sums_hold_for_sums_and_not_for_one_permille(dtype: str) -> None:
    kind = np.dtype(dtype)
    for ratio in (0.0, 30.0):
        batch = scenarios.normal((5, 3, 4), ratio, 1.0, seed=2)
        batch = batch._replace(x=batch.x.astype(kind), dy=batch.dy.astype(kind))
        t, w = tangents(batch), batch.weight
        found = {"y_dot": make_jvp(wide=kind.type)(t["x_dot"], batch.x, w, t["weight_dot"], t["bias_dot"], batch.eps)}
        given = t["v"], batch.dy, batch.x, w, t["v_weight"], t["v_bias"], batch.eps
        found |= dict(zip(("ddy", "ddx", "ddweight"), make_double(wide=kind.type)(*given), strict=True))
        truth = exact_double_backward(batch.x, w, batch.dy, t["v"], t["v_weight"], t["v_bias"], eps=batch.eps)
        y_dot = exact_jvp(batch.x, w, t["x_dot"], t["weight_dot"], t["bias_dot"], eps=batch.eps)[0]
        exact = {"y_dot": y_dot, "ddy": truth.ddy, "ddx": truth.ddx, "ddweight": truth.ddweight}
        for name, bound in bounds_of_derivatives(batch, t, dtype).items():
            assert (abs(found[name].astype(LONG) - exact[name]) <= bound).all(), name
            if dtype == "float32" and ratio == 0:
                assert (bound < 1e-3 * abs(exact[name]).max()).all(), name

"""The cause of a failure: a comparison of the results with those of batch norms with one known fault each."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import scenarios, suspects
from .oracle import MANTISSA_BITS, exact_batch_norm
from .properties import GROWING, MOMENTUM, Property, Subject, running, tangents
from .scenarios import Batch

ONE_PASS = (
    "the error grows with the square of |mean|/std: the variance is computed as E[x²] − E[x]², which loses every digit"
    " when the mean is far from zero; take the mean away first (E1)"
)
FOLDED = (
    "the error grows with |mean|/std, and differs from value to value: the mean is folded into the bias, as in"
    " x·scale + (bias − mean·scale), or sums are in too few digits; take x − mean first (E3)"
)
ROUNDED = (
    "the error grows with |mean|/std, and is the same for all values of a channel: the mean is rounded to the precision"
    " of x; keep it in float64, or as the sum of two numbers (E3)"
)
ROUNDED_VAR = (
    "the mean that is taken away is itself rounded, so that Σ(x−mean)² has n times the square of its error in it; take"
    " (Σ(x−mean))²/n away, or keep the mean in float64 (E1)"
)
HALF = "the error is that of half precision: something between x and the result is kept in fewer digits than x"

OF_SUMS = (FOLDED, ROUNDED, ROUNDED_VAR)  # too few digits, but the formula is right


def cause_of(prop: Property, subject: Subject) -> str:
    """Return the usual cause of a failure, or ''."""
    try:
        with np.errstate(all="ignore"):
            return _known_fault(prop, subject) or (_growth(prop, subject) if prop.measure in GROWING else "")
    except Exception:  # the functions do not run on this batch; the failure has the reason
        return ""


def _known_fault(prop: Property, subject: Subject) -> str:
    """Compare with the faulty batch norms, on a batch on which eps, mean, weight and bias matter, and N is not n."""
    batch, std, eps = scenarios.normal((5, 3, 4), 0.7, 1.0, seed=11), (1.5, 1.2, 1.8), 0.3
    if prop.needs == "forward":
        std, eps = (0.03, 0.01, 0.06), 5e-4  # eps matters most if var is about as large
    weight, bias = np.asarray([1.5, -0.6, 0.8], "f4"), np.asarray([0.9, 0.4, -1.1], "f4")
    batch = Batch(batch.x * np.asarray(std)[:, None], batch.dy, weight, bias, eps)
    batch = subject.rounded(batch)
    x, dy = batch.x.astype("f8"), batch.dy.astype("f8")
    w, b = (array.astype("f8")[None, :, None] for array in (weight, bias))
    if prop.needs == "forward":
        return suspects.match(subject.y(batch), suspects.forwards(x, w, b, eps))
    if prop.needs in ("jvp", "double_backward"):
        return _known_fault_of_derivative(prop.name.partition(" ")[0], subject, batch)
    if prop.needs == "backward":
        results: tuple[Any, ...] = subject.gradients(batch)
        tables = {"dx": suspects.input_gradients(dy, x, w, eps), **suspects.parameter_gradients(dy, x, w, eps)}
    else:
        mean, var = (array.astype("f8") for array in running(batch))
        results, tables = subject.running_statistics(batch), suspects.updates((mean, var), x, MOMENTUM, eps)
    name = prop.name.partition(" ")[0]
    return suspects.match(dict(zip(tables, results, strict=True))[name], tables[name])


def _known_fault_of_derivative(name: str, subject: Subject, batch: Batch) -> str:
    """Compare the result of that name with those of the faulty derivatives."""
    x, dy, t = batch.x.astype("f8"), batch.dy.astype("f8"), tangents(batch)
    u, v = t["x_dot"].astype("f8"), t["v"].astype("f8")
    w, weight_dot, bias_dot, v_weight, v_bias = (
        vector.astype("f8")[None, :, None]
        for vector in (batch.weight, t["weight_dot"], t["bias_dot"], t["v_weight"], t["v_bias"])
    )
    if name == "y_dot":
        faulty = suspects.tangents(u, x, w, weight_dot, bias_dot, batch.eps, "y_dot x_dot weight_dot bias_dot")
        return suspects.match(subject.tangent(batch), faulty)
    results = dict(zip(("ddy", "ddx", "ddweight"), subject.second_gradients(batch), strict=True))
    tables = {
        "ddy": suspects.tangents(v, x, w, v_weight, v_bias, batch.eps, "ddy v v_weight v_bias"),
        "ddx": suspects.second_input_gradients(v, dy, x, w, v_weight, batch.eps),
        "ddweight": suspects.second_weight_gradients(v, dy, x, w, batch.eps),
    }
    return suspects.match(results[name], tables[name])


def _growth(prop: Property, subject: Subject) -> str:
    """Return the cause that follows from the growth of the error with |mean|/std, or ''."""
    ratios = 10.0 ** np.arange(0, 7)
    errors = [prop.error(subject, _batch_at(float(ratio)))[0] for ratio in ratios]
    digits = MANTISSA_BITS[subject.dtype.name]  # an error of 2**digits ulp leaves no correct digit
    if np.isfinite(errors).all() and digits > 20 and min(errors) > 2.0 ** (digits - 13) > max(errors) / 100:
        return HALF if _is_noise(subject) else ""
    seen = [(r, e) for r, e in zip(ratios, errors, strict=True) if prop.limit(subject) < e < 2.0 ** (digits - 2)]
    if prop.needs == "update":
        return "" if not seen else ONE_PASS if max(e / r**2 for r, e in seen) > 0.01 else ROUNDED_VAR
    if len(seen) < 2:
        return ""
    slope = float(np.polyfit(np.log10([r for r, _ in seen]), np.log10([e for _, e in seen]), 1)[0])
    if slope > 1.5:
        return ONE_PASS
    return "" if slope < 0.5 else FOLDED if prop.needs == "backward" or _is_noise(subject, 1e4) else ROUNDED


def _batch_at(ratio: float) -> Batch:
    return scenarios.normal((8, 3, 9), ratio, 1.0, seed=5)


def _is_noise(subject: Subject, ratio: float = 0.0) -> bool:
    """Return False if a shift and a scale of each channel explain the error of y."""
    batch = subject.rounded(_batch_at(ratio))
    exact = exact_batch_norm(batch.x, batch.weight, batch.bias, batch.dy, eps=batch.eps).y.astype("f8")
    error, left = subject.y(batch).astype("f8") - exact, 0.0
    for c in range(error.shape[1]):
        e, y = error[:, c].ravel(), exact[:, c].ravel()
        left += float(np.sum((e - np.polyval(np.polyfit(y, e, 1), y)) ** 2))
    return left > 0.04 * float(np.sum(error**2))

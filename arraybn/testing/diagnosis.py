"""The cause of a failure: a comparison of the results with those of batch norms with one known fault each."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import scenarios, suspects
from .oracle import exact_batch_norm
from .properties import GROWING, MOMENTUM, Property, Subject, running
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


def diagnostic_batch(subject: Subject, std: tuple[float, float, float] = (1.5, 1.2, 1.8), eps: float = 0.3) -> Batch:
    """Return a batch on which every known fault shows: eps, mean, weight and bias all matter, and N is not n."""
    batch = scenarios.normal((5, 3, 4), 0.7, 1.0, seed=11)
    weight, bias = np.asarray([1.5, -0.6, 0.8], "f4"), np.asarray([0.9, 0.4, -1.1], "f4")
    return subject.rounded(batch._replace(x=batch.x * np.asarray(std)[:, None], weight=weight, bias=bias, eps=eps))


def cause_of(prop: Property, subject: Subject) -> str:
    """Return the usual cause of a failure, or ''."""
    try:
        with np.errstate(all="ignore"):
            causes = {"forward": _cause_in_y, "backward": _cause_in_gradients, "update": _cause_in_update}
            found = causes[prop.needs](prop, subject)
            return found or (_growth(prop, subject) if prop.measure in GROWING else "")
    except Exception:  # the functions do not run on this batch; the failure has the reason
        return ""


def _wide(batch: Batch) -> tuple[Any, Any, Any, Any]:
    """Return x, dy (N, C, S), weight and bias (1, C, 1) in float64."""
    w, b = (array.astype("f8")[None, :, None] for array in (batch.weight, batch.bias))
    return batch.x.astype("f8"), batch.dy.astype("f8"), w, b


def _cause_in_y(prop: Property, subject: Subject) -> str | None:
    batch = diagnostic_batch(subject, (0.03, 0.01, 0.06), 5e-4)  # eps matters most if var is about as large
    x, _, w, b = _wide(batch)
    return suspects.match(subject.y(batch), suspects.forwards(x, w, b, batch.eps))


def _cause_in_gradients(prop: Property, subject: Subject) -> str | None:
    batch = diagnostic_batch(subject)
    x, dy, w, _ = _wide(batch)
    got = dict(zip(("dx", "dweight", "dbias"), subject.gradients(batch), strict=True))
    tables = {"dx": suspects.input_gradients(dy, x, w, batch.eps), **suspects.parameter_gradients(dy, x, w, batch.eps)}
    name = prop.name.partition(" ")[0]
    return suspects.match(got[name], tables[name])


def _cause_in_update(prop: Property, subject: Subject) -> str | None:
    batch = diagnostic_batch(subject)
    mean, var = (array.astype("f8") for array in running(batch))
    tables = suspects.updates((mean, var), _wide(batch)[0], MOMENTUM, batch.eps)
    got = dict(zip(("running_mean", "running_var"), subject.running_statistics(batch), strict=True))
    name = prop.name.partition(" ")[0]
    return suspects.match(got[name], tables[name])


def _growth(prop: Property, subject: Subject) -> str:
    """Return the cause that follows from the growth of the error with |mean|/std, or ''."""
    ratios = 10.0 ** np.arange(0, 7)
    errors = [prop.error(subject, _batch_at(float(ratio)))[0] for ratio in ratios]
    digits = int(np.finfo(subject.dtype).nmant)  # an error of 2**digits ulp leaves no correct digit
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

"""Why a property does not hold: the stranger's results beside those of batch norms that are wrong in one known way."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import scenarios, suspects
from .properties import MOMENTUM, Property, Subject, running
from .scenarios import Batch

ONE_PASS = (
    "the error grows with the square of |mean|/std: the variance is computed as E[x²] − E[x]², which loses every digit"
    " when the mean is far from zero; take the mean away first (E1)"
)
FOLDED = (
    "the error grows with |mean|/std: the mean is rounded to the precision of x or folded into the bias, as in"
    " x·scale + (bias − mean·scale); take x − mean first, and keep the mean in more digits (E3)"
)
HALF = "the error is that of half precision: something between x and y is kept in fewer digits than x"


def telling(subject: Subject) -> Batch:
    """A batch on which every known fault shows: eps, mean, weight and bias all matter, and N is not n."""
    batch = scenarios.normal((5, 3, 4), 0.7, 1.5, seed=11)
    weight, bias = np.asarray([1.5, -0.6, 0.8], "f4"), np.asarray([0.9, 0.4, -1.1], "f4")
    return subject.rounded(batch._replace(weight=weight, bias=bias, eps=0.3))


def cause_of(asked: Property, subject: Subject) -> str:
    """The usual cause, or ''."""
    batch = telling(subject)
    wide = batch._replace(x=batch.x.astype("f8"), dy=batch.dy.astype("f8"))
    x, dy = wide.x, wide.dy
    w, b = (array.astype("f8")[None, :, None] for array in (batch.weight, batch.bias))
    try:
        with np.errstate(all="ignore"):
            if asked.needs == "forward":
                found = suspects.match(subject.y(batch), suspects.forwards(x, w, b, batch.eps))
                return found or _growth(asked, subject)
            if asked.needs == "backward":
                return _of_gradients(asked, subject, batch, (dy, x, w))
            old_mean, old_var = (array.astype("f8") for array in running(batch))
            tables = suspects.updates((old_mean, old_var), x, MOMENTUM, batch.eps)
            name = asked.name.partition(" ")[0]
            got = dict(zip(("running_mean", "running_var"), subject.updated(batch), strict=True))
            found = suspects.match(got[name], tables[name])
            return found or _growth(asked, subject)
    except Exception:  # the functions do not even run here; the failure says so
        return ""


def _of_gradients(asked: Property, subject: Subject, batch: Batch, arrays: tuple[Any, Any, Any]) -> str:
    dx, dweight, dbias = subject.gradients(batch)
    dy, x, w = arrays
    name = asked.name.partition(" ")[0]
    if name == "dx":
        return suspects.match(dx, suspects.input_gradients(dy, x, w, batch.eps)) or _growth(asked, subject)
    tables = suspects.parameter_gradients(dy, x, w, batch.eps)
    return suspects.match({"dweight": dweight, "dbias": dbias}.get(name, dx), tables.get(name, {})) or ""


def _growth(asked: Property, subject: Subject) -> str:
    """What the growth of the error with |mean|/std tells."""
    ratios = 10.0 ** np.arange(0, 7)
    errors = [asked.error(subject, scenarios.normal((8, 3, 9), float(r), 1.0, seed=5))[0] for r in ratios]
    lost = float(2.0 ** np.finfo(subject.dtype).nmant)  # an error of this many ulp leaves no digit
    if not np.isfinite(errors).all():
        return ONE_PASS
    if subject.dtype.itemsize > 2 and min(errors) > 2.0 ** (np.finfo(subject.dtype).nmant - 13) > max(errors) / 100:
        return HALF
    seen = [(r, e) for r, e in zip(ratios, errors, strict=True) if asked.limit(subject) < e < lost / 4]
    if len(seen) < 2:
        return ONE_PASS if len(seen) == 1 and max(errors) > lost / 4 else ""
    slope = float(np.polyfit(np.log10([r for r, _ in seen]), np.log10([e for _, e in seen]), 1)[0])
    return ONE_PASS if slope > 1.5 else FOLDED if slope > 0.5 else ""

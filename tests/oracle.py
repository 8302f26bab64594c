"""The answer by definition: exact rational statistics, the rest in 80-bit arithmetic. Shares no code with arraybn.

Everything is for x (N, C, S). Where a bound is given in ulp, they are those of the largest term of the formula, because
no formula can be more accurate than the rounding of its largest term.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

LONG = np.longdouble
assert np.finfo(LONG).nmant >= 63, "the oracle needs 80-bit arithmetic"


@dataclass(frozen=True)
class Exact:
    """What the definition gives for one batch; arrays of longdouble."""

    mean: list[Fraction]
    m2: list[Fraction]
    xhat: Any
    y: Any
    y_scale: Any  # the largest term of y, elementwise
    dx: Any
    dx_scale: Any
    dweight: Any
    dbias: Any


def batch_norm(x: Any, weight: Any, bias: Any, dy: Any, eps: float) -> Exact:
    """E1, E3, E5 and E6 of x and dy (N, C, S), weight and bias (C,)."""
    n, c, s = x.shape
    count = n * s
    out = {name: np.zeros(x.shape, LONG) for name in ("xhat", "y", "y_scale", "dx", "dx_scale")}
    sums = {name: np.zeros(c, LONG) for name in ("dweight", "dbias")}
    means, m2s = [], []
    for channel in range(c):
        mean, m2 = moments(x[:, channel, :])
        means.append(mean)
        m2s.append(m2)
        rstd = 1 / np.sqrt(long(m2 / count + Fraction(eps)))
        centred = centre(x[:, channel, :], mean)
        xhat, g = centred * rstd, dy[:, channel, :].astype(LONG)
        gamma, beta = LONG(weight[channel]), LONG(bias[channel])
        dweight, dbias = np.sum(g * xhat), np.sum(g)
        terms = [gamma * rstd * g, gamma * rstd * dbias / count, gamma * rstd * xhat * dweight / count]
        out["xhat"][:, channel, :] = xhat
        out["y"][:, channel, :] = gamma * xhat + beta
        out["y_scale"][:, channel, :] = np.maximum(abs(gamma * xhat), abs(beta))
        out["dx"][:, channel, :] = terms[0] - terms[1] - terms[2]
        out["dx_scale"][:, channel, :] = np.maximum(np.maximum(abs(terms[0]), abs(terms[1])), abs(terms[2]))
        sums["dweight"][channel], sums["dbias"][channel] = dweight, dbias
    return Exact(means, m2s, **out, **sums)


def moments(values: Any) -> tuple[Fraction, Fraction]:
    """The exact mean and Σ(x−mean)² of the values."""
    exact = [Fraction(float(value)) for value in np.ravel(values)]
    mean = Fraction(sum(exact), len(exact))
    return mean, sum(((value - mean) ** 2 for value in exact), Fraction(0))


def centre(values: Any, mean: Fraction) -> Any:
    """`values` − mean, the mean taken away in two parts."""
    high = float(mean)
    return (values.astype(LONG) - LONG(high)) - LONG(float(mean - Fraction(high)))


def long(value: Fraction) -> Any:
    """A rational as a longdouble, in two parts."""
    high = float(value)
    return LONG(high) + LONG(float(value - Fraction(high)))


def ulp(values: Any, dtype: Any) -> Any:
    """The distance of neighbours in `dtype` at abs(values), at least that at the smallest normal number."""
    finfo = np.finfo(dtype) if dtype.kind == "f" else _finfo(dtype)
    exponent = np.frexp(np.maximum(abs(np.asarray(values, LONG)), LONG(finfo.smallest_normal)))[1]
    return np.ldexp(LONG(1), exponent - 1 - finfo.nmant)


def _finfo(dtype: Any) -> Any:
    import ml_dtypes

    return ml_dtypes.finfo(dtype)


def worst(got: Any, exact: Any, scale: Any, dtype: Any) -> float:
    """The largest error of `got`, in ulp of `dtype` at `scale`."""
    if got.size == 0:
        return 0.0
    return float(np.max(abs(np.asarray(got).astype(LONG) - exact) / ulp(scale, np.dtype(dtype))))

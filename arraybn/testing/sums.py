"""Bounds of the errors that a batch norm has if all its sums are in the dtype of x."""

from __future__ import annotations

from typing import Any

import numpy as np

from .oracle import LONG, MANTISSA_BITS, Array, Exact, ulp
from .scenarios import Batch


def bounds_of_sums(batch: Batch, truth: Exact, dtype: str) -> dict[str, Array]:
    """Return the largest errors of y, dx, dweight and dbias if all is computed in `dtype`, in any order of summation.

    With u = 2⁻ᵖ, half the distance of neighbours at 1, and to first order in e, for E1, E3, E5 and E6 as they stand:

    - mean: each value goes through at most n − 1 additions, so the error is n·u·⟨|x|⟩; in units of xhat it is at most
      t = n·u·(1 + r·⟨|x|⟩), which grows with |mean|/std.
    - Σ(x−mean)²/n: the sum has n·u, the mean t², which is at most t; half of both enter rstd. Products, differences
      and the root round 8 times. So xhat is off by e·max(1, |xhat|), e = 3·t + 8·u, and y by as much.
      ⟨x²⟩ − ⟨x⟩² has an error of t·r·⟨|x|⟩ instead: it does not keep within this bound where the mean is far from zero.
    - dx: three terms, each with the error of r, and two with those of xhat and of a sum: 8·e at most.
    - dweight: e for xhat and at most e for the sum; dbias: n·u.

    No sum knows the terms that cancel in it, so y is measured at max(|weight|·max(1, |xhat|), |bias|), dx at
    |weight|·rstd·max(|dy|, max(1, |xhat|)·rms(dy)), dweight at Σ|dy|·max(1, |xhat|), dbias at Σ|dy|.
    With a mask ⟨|x|⟩ is over its n positions, and Σ|dy|·max(1, |xhat|)/n may be larger than rms(dy).
    """
    u, axes = np.ldexp(LONG(1), -1 - MANTISSA_BITS[dtype]), (0, 2)
    weight, bias = (abs(vector.astype(LONG))[:, None] for vector in (batch.weight, batch.bias))
    x, dy, n = abs(batch.x.astype(LONG)), abs(batch.dy.astype(LONG)), batch.x[:, 0].size
    rstd = 1 / np.sqrt(truth.var + LONG(batch.eps))[:, None]
    kept = np.ones(x[:, 0].shape, bool) if batch.where is None else batch.where
    t = n * u * (1 + rstd * (x * kept[:, None]).sum(axes)[:, None] / np.count_nonzero(kept))
    e, at_least_1 = 3 * t + 8 * u, np.maximum(1, abs(truth.xhat))
    rms = np.sqrt((dy * dy).mean(axes))[:, None]
    if batch.where is not None:
        rms = np.maximum(rms, (dy * at_least_1).sum(axes)[:, None] / np.count_nonzero(kept))
    bounds = {
        "y": e * np.maximum(weight * at_least_1, bias),
        "dx": 8 * e * weight * rstd * np.maximum(dy, at_least_1 * rms),
        "dweight": 2 * e[:, 0] * (dy * at_least_1).sum(axes),
        "dbias": e[:, 0] * dy.sum(axes),
    }
    return {name: np.maximum(bound, ulp(0, dtype)) for name, bound in bounds.items()}


def bounds_of_update(batch: Batch, truth: Exact, old: Any) -> dict[str, Array]:
    """Return the largest errors of running_mean and running_var if all is computed in float32 (`bounds_of_sums`)."""
    u, n = np.ldexp(LONG(1), -1 - MANTISSA_BITS["float32"]), batch.x[:, 0].size
    size, var = abs(batch.x.astype(LONG)).mean((0, 2)), truth.var * n / max(n - 1, 1)
    return {
        "running_mean": (n + 8) * u * np.maximum(abs(old), size),
        "running_var": (n + 8) * u * np.maximum(abs(old), var) + 2 * (n * u * size) ** 2,
    }


def bounds_of_derivatives(batch: Batch, tangents: dict[str, Array], dtype: str) -> dict[str, Array]:
    """Return the largest errors of y_dot, ddy, ddx and ddweight if all is computed in `dtype` (`bounds_of_sums`).

    With the e of `bounds_of_sums`, P(u) has an error of 8·e·p(u), p(u) = max(|u|, max(1, |xhat|)·rms(u)), as in dx. A
    term of ddx is a product of two numbers of that kind, or of one and of a mean: 16·e times its largest value.
    """
    u, axes, n = np.ldexp(LONG(1), -1 - MANTISSA_BITS[dtype]), (0, 2), batch.x[:, 0].size
    t = {name: abs(array.astype(LONG)) for name, array in tangents.items()}
    x, g, weight = batch.x.astype(LONG), abs(batch.dy.astype(LONG)), abs(batch.weight.astype(LONG))[:, None]
    centred = x - x.mean(axes)[:, None]
    rstd = 1 / np.sqrt((centred**2).mean(axes) + LONG(batch.eps))[:, None]
    e = 3 * n * u * (1 + rstd * abs(x).mean(axes)[:, None]) + 8 * u
    at_least_1 = np.maximum(1, abs(centred * rstd))

    def rms(t: Array) -> Array:
        return np.asarray(np.sqrt((t * t).mean(axes))[:, None])

    def p(t: Array) -> Array:
        return np.asarray(np.maximum(t, at_least_1 * rms(t)))

    def of_tangent(t: Array, slope: Array, constant: Array) -> Array:
        return np.asarray(8 * e * (weight * rstd * p(t) + slope[:, None] * at_least_1 + constant[:, None]))

    v, products = t["v"], rms(t["v"]) * rms(g)
    of_q = at_least_1 * products + p(v) * rms(g) + p(g) * rms(v)
    bounds = {
        "y_dot": of_tangent(t["x_dot"], t["weight_dot"], t["bias_dot"]),
        "ddy": of_tangent(v, t["v_weight"], t["v_bias"]),
        "ddx": 16 * e * (weight * rstd**2 * of_q + t["v_weight"][:, None] * rstd * p(g)),
        "ddweight": (16 * e * n * rstd * products)[:, 0],
    }
    return {name: np.maximum(bound, ulp(0, dtype)) for name, bound in bounds.items()}

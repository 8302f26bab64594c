"""Batch norms with one known fault each, in float64: a result that equals one of them has its fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_AXES = (0, 2)


def _statistics(x: Array, eps: float) -> tuple[Array, Array, Array]:
    """Return mean and var (1, C, 1), and xhat (N, C, S)."""
    mean, var = x.mean(axis=_AXES, keepdims=True), x.var(axis=_AXES, keepdims=True)
    return mean, var, (x - mean) / np.sqrt(var + eps)


def _normalized_over(x: Array, eps: float, axes: tuple[int, ...]) -> Array:
    result: Array = (x - x.mean(axis=axes, keepdims=True)) / np.sqrt(x.var(axis=axes, keepdims=True) + eps)
    return result


def forwards(x: Array, w: Array, b: Array, eps: float) -> dict[str, Callable[[], Array]]:
    """Return faulty y by cause; x (N, C, S), w and b (1, C, 1)."""
    mean, var, xhat = _statistics(x, eps)
    n = x.shape[0] * x.shape[2]
    return {
        "the variance is divided by n − 1; in the forward it is biased, divided by n (E3)": lambda: (
            w * (x - mean) / np.sqrt(var * n / (n - 1) + eps) + b
        ),
        "eps stands outside the root: it is 1/√(var + eps), not 1/(√var + eps) (E3)": lambda: (
            w * (x - mean) / (np.sqrt(var) + eps) + b
        ),
        "eps is left out (E3)": lambda: w * (x - mean) / np.sqrt(var) + b,
        "eps is 1e-5 whatever is asked for (E3)": lambda: w * (x - mean) / np.sqrt(var + 1e-5) + b,
        "eps is 1e-3 whatever is asked for (E3)": lambda: w * (x - mean) / np.sqrt(var + 1e-3) + b,
        "eps is the least that var can be; it is added to var (E3)": lambda: (
            w * (x - mean) / np.sqrt(np.maximum(var, eps)) + b
        ),
        "weight is taken as 1 + weight (E3)": lambda: (1 + w) * xhat + b,
        "eps is squared (E3)": lambda: w * (x - mean) / np.sqrt(var + eps**2) + b,
        "the root is missing: x − mean is divided by var + eps (E3)": lambda: w * (x - mean) / (var + eps) + b,
        "the mean is not taken away (E3)": lambda: w * x / np.sqrt(var + eps) + b,
        "the variance is ⟨x²⟩, of the values and not of x − mean (E1)": lambda: (
            w * (x - mean) / np.sqrt(var + mean**2 + eps) + b
        ),
        "weight is left out (E3)": lambda: xhat + b,
        "bias is left out (E3)": lambda: w * xhat,
        "weight and bias are exchanged (E3)": lambda: b * xhat + w,
        "weight multiplies bias too: weight·(xhat + bias) (E3)": lambda: w * (xhat + b),
        "the statistics are taken over each sample, as in layer norm": lambda: w * _normalized_over(x, eps, (1, 2)) + b,
        "the statistics are taken over each sample and channel, as in instance norm": lambda: (
            w * _normalized_over(x, eps, (2,)) + b
        ),
        "the statistics are taken over the samples alone, each position by itself": lambda: (
            w * _normalized_over(x, eps, (0,)) + b
        ),
        "the statistics are taken over all channels together": lambda: w * _normalized_over(x, eps, (0, 1, 2)) + b,
    }


def input_gradients(dy: Array, x: Array, w: Array, eps: float) -> dict[str, Callable[[], Array]]:
    """Return faulty dx by cause; dy and x (N, C, S), w (1, C, 1)."""
    _, var, xhat = _statistics(x, eps)
    n, r = x.shape[0] * x.shape[2], 1 / np.sqrt(var + eps)
    dbias, dweight = dy.sum(axis=_AXES, keepdims=True), (dy * xhat).sum(axis=_AXES, keepdims=True)
    return {
        "the term dbias/n of (E6) is missing: the mean depends on x": lambda: w * r * (dy - xhat * dweight / n),
        "the term xhat·dweight/n of (E6) is missing: the variance depends on x": lambda: w * r * (dy - dbias / n),
        "both sums of (E6) are missing: that is (E7), for fixed statistics": lambda: w * r * dy,
        "weight is left out of dx (E6)": lambda: r * (dy - dbias / n - xhat * dweight / n),
        "rstd is left out of dx (E6)": lambda: w * (dy - dbias / n - xhat * dweight / n),
        "the sums of (E6) are not divided by n": lambda: w * r * (dy - dbias - xhat * dweight),
        "n of (E6) is N, without the positions S": lambda: w * r * (dy - (dbias + xhat * dweight) / x.shape[0]),
        "n − 1 stands for n beside xhat·dweight in (E6)": lambda: w * r * (dy - dbias / n - xhat * dweight / (n - 1)),
        "n − 1 stands for n in (E6)": lambda: w * r * (dy - (dbias + xhat * dweight) / (n - 1)),
        "eps is left out of the backward, or is not the forward's (E6)": lambda: _dx_with(dy, x, w, var),
        "the variance is unbiased in the backward (E6)": lambda: _dx_with(dy, x, w, var * n / (n - 1) + eps),
        "weight enters dx twice (E6)": lambda: w * w * r * (dy - dbias / n - xhat * dweight / n),
        "the sign of dbias/n in (E6) is wrong": lambda: w * r * (dy + dbias / n - xhat * dweight / n),
        "the sign of xhat·dweight/n in (E6) is wrong": lambda: w * r * (dy - dbias / n + xhat * dweight / n),
        "the sign of the sums in (E6) is wrong": lambda: w * r * (dy + dbias / n + xhat * dweight / n),
        "dx has the wrong sign (E6)": lambda: -w * r * (dy - dbias / n - xhat * dweight / n),
    }


def _dx_with(dy: Array, x: Array, w: Array, total: Array) -> Array:
    """(E6) with `total` in place of var + eps."""
    n, r = x.shape[0] * x.shape[2], 1 / np.sqrt(total)
    xhat = (x - x.mean(axis=_AXES, keepdims=True)) * r
    dbias, dweight = dy.sum(axis=_AXES, keepdims=True), (dy * xhat).sum(axis=_AXES, keepdims=True)
    result: Array = w * r * (dy - dbias / n - xhat * dweight / n)
    return result


def parameter_gradients(dy: Array, x: Array, w: Array, eps: float) -> dict[str, dict[str, Callable[[], Array]]]:
    """Return faulty dweight and dbias (C,) by cause."""
    mean, _, xhat = _statistics(x, eps)
    n = x.shape[0] * x.shape[2]
    dweight, dbias = (dy * xhat).sum(axis=_AXES), dy.sum(axis=_AXES)
    return {
        "dweight": {
            "dweight is the sum of dy·x; it is that of dy·xhat (E5)": lambda: (dy * x).sum(axis=_AXES),
            "rstd is left out of dweight: it is the sum of dy·xhat (E5)": lambda: (dy * (x - mean)).sum(axis=_AXES),
            "dweight is a mean; it is a sum (E5)": lambda: dweight / n,
            "dweight is divided by N; it is a sum (E5)": lambda: dweight / x.shape[0],
            "dweight has a factor weight too many (E5)": lambda: dweight * w.ravel(),
            "dweight and dbias are exchanged": lambda: dbias,
        },
        "dbias": {
            "dbias is a mean; it is a sum (E5)": lambda: dbias / n,
            "dbias is divided by N; it is a sum (E5)": lambda: dbias / x.shape[0],
            "dbias has a factor weight too many (E5)": lambda: dbias * w.ravel(),
            "dweight and dbias are exchanged": lambda: dweight,
        },
    }


def updates(
    running: tuple[Array, Array], x: Array, momentum: float, eps: float
) -> dict[str, dict[str, Callable[[], Array]]]:
    """Return faulty running_mean and running_var (C,) by cause."""
    n = x.shape[0] * x.shape[2]
    mean, biased = x.mean(axis=_AXES), x.var(axis=_AXES)
    unbiased = biased * n / max(n - 1, 1)
    (old_mean, old_var), keep = running, 1 - momentum
    decay = "momentum is the weight of the old value; in PyTorch it is that of the new batch (E4)"
    return {
        "running_mean": {
            decay: lambda: momentum * old_mean + keep * mean,
            "running_mean and running_var are exchanged": lambda: keep * old_var + momentum * unbiased,
            "running_mean is replaced by the batch's; momentum is not used (E4)": lambda: mean,
            "running_mean is not updated (E4)": lambda: old_mean,
            "the batch's mean is added without taking momentum·running_mean away (E4)": lambda: (
                old_mean + momentum * mean
            ),
        },
        "running_var": {
            "the batch's variance enters biased, divided by n; PyTorch's is divided by n − 1 (E4)": lambda: (
                keep * old_var + momentum * biased
            ),
            decay: lambda: momentum * old_var + keep * unbiased,
            f"{decay}, and the variance enters biased": lambda: momentum * old_var + keep * biased,
            "running_mean and running_var are exchanged": lambda: keep * old_mean + momentum * mean,
            "the variance is multiplied by (n − 1)/n; it is by n/(n − 1) (E4)": lambda: (
                keep * old_var + momentum * biased * (n - 1) / n
            ),
            "the variance is corrected with N; it is with n, positions and all (E4)": lambda: (
                keep * old_var + momentum * biased * x.shape[0] / (x.shape[0] - 1)
            ),
            "running_var takes in the standard deviation; it is the variance (E4)": lambda: (
                keep * old_var + momentum * np.sqrt(unbiased)
            ),
            "eps is added to running_var; it belongs to the normalization (E3)": lambda: (
                keep * old_var + momentum * (unbiased + eps)
            ),
            "running_var is replaced by the batch's; momentum is not used (E4)": lambda: unbiased,
            "running_var is not updated (E4)": lambda: old_var,
        },
    }


def match(got: Array, candidates: dict[str, Callable[[], Array]]) -> str | None:
    """Return the cause whose result equals `got`, up to 10⁻⁴ of its largest value; None if none does."""
    with np.errstate(all="ignore"):
        for cause, candidate in candidates.items():
            wrong = candidate()
            size = float(np.max(abs(wrong), initial=0))
            if got.shape == wrong.shape and bool((abs(got - wrong) <= 1e-4 * size).all()):
                return cause
    return None

"""Batch norms with one known fault each, in float64: a result that equals one of them has its fault."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array = np.ndarray[Any, Any]
Faulty: TypeAlias = dict[str, Array]  # results by cause


def _over(axes: tuple[int, ...], x: Array, eps: float) -> Array:
    result: Array = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)
    return result


def forwards(x: Array, w: Array, b: Array, eps: float) -> Faulty:
    """Return faulty y by cause; x (N, C, S), w and b (1, C, 1)."""
    n = x.shape[0] * x.shape[2]
    mean, var, xhat = x.mean((0, 2), keepdims=True), x.var((0, 2), keepdims=True), _over((0, 2), x, eps)

    def y(total: Array) -> Array:
        """(E3) with `total` in place of var + eps."""
        result: Array = w * (x - mean) / np.sqrt(total) + b
        return result

    return {
        "the variance is divided by n − 1; in the forward it is biased, divided by n (E3)": y(var * n / (n - 1) + eps),
        "eps stands outside the root: it is 1/√(var + eps), not 1/(√var + eps) (E3)": y((np.sqrt(var) + eps) ** 2),
        "eps is left out (E3)": y(var),
        "eps is 1e-5 whatever is asked for (E3)": y(var + 1e-5),
        "eps is 1e-3 whatever is asked for (E3)": y(var + 1e-3),
        "eps is the least that var can be; it is added to var (E3)": y(np.maximum(var, eps)),
        "weight is taken as 1 + weight (E3)": (1 + w) * xhat + b,
        "eps is squared (E3)": y(var + eps**2),
        "the root is missing: x − mean is divided by var + eps (E3)": y((var + eps) ** 2),
        "the mean is not taken away (E3)": w * x / np.sqrt(var + eps) + b,
        "the variance is ⟨x²⟩, of the values and not of x − mean (E1)": y(var + mean**2 + eps),
        "weight is left out (E3)": xhat + b,
        "bias is left out (E3)": w * xhat,
        "weight and bias are exchanged (E3)": b * xhat + w,
        "weight multiplies bias too: weight·(xhat + bias) (E3)": w * (xhat + b),
        "the statistics are taken over each sample, as in layer norm": w * _over((1, 2), x, eps) + b,
        "the statistics are taken over each sample and channel, as in instance norm": w * _over((2,), x, eps) + b,
        "the statistics are taken over the samples alone, each position by itself": w * _over((0,), x, eps) + b,
        "the statistics are taken over all channels together": w * _over((0, 1, 2), x, eps) + b,
    }


def input_gradients(dy: Array, x: Array, w: Array, eps: float) -> Faulty:
    """Return faulty dx by cause; dy and x (N, C, S), w (1, C, 1)."""
    n, var = x.shape[0] * x.shape[2], x.var((0, 2), keepdims=True)
    r, xhat = 1 / np.sqrt(var + eps), _over((0, 2), x, eps)
    dbias, dweight = dy.sum((0, 2), keepdims=True), (dy * xhat).sum((0, 2), keepdims=True)
    means, through_var = dbias / n, xhat * dweight / n
    dx = w * r * (dy - means - through_var)
    return {
        "the term dbias/n of (E6) is missing: the mean depends on x": w * r * (dy - through_var),
        "the term xhat·dweight/n of (E6) is missing: the variance depends on x": w * r * (dy - means),
        "both sums of (E6) are missing: that is (E7), for fixed statistics": w * r * dy,
        "weight is left out of dx (E6)": r * (dy - means - through_var),
        "rstd is left out of dx (E6)": w * (dy - means - through_var),
        "the sums of (E6) are not divided by n": w * r * (dy - dbias - xhat * dweight),
        "n of (E6) is N, without the positions S": w * r * (dy - (dbias + xhat * dweight) / x.shape[0]),
        "n − 1 stands for n beside xhat·dweight in (E6)": w * r * (dy - means - xhat * dweight / (n - 1)),
        "n − 1 stands for n in (E6)": w * r * (dy - (dbias + xhat * dweight) / (n - 1)),
        "eps is left out of the backward, or is not the forward's (E6)": _dx_with(dy, x, w, var),
        "the variance is unbiased in the backward (E6)": _dx_with(dy, x, w, var * n / (n - 1) + eps),
        "weight enters dx twice (E6)": w * dx,
        "the sign of dbias/n in (E6) is wrong": w * r * (dy + means - through_var),
        "the sign of xhat·dweight/n in (E6) is wrong": w * r * (dy - means + through_var),
        "the sign of the sums in (E6) is wrong": w * r * (dy + means + through_var),
        "dx has the wrong sign (E6)": -dx,
    }


def _dx_with(dy: Array, x: Array, w: Array, total: Array) -> Array:
    """(E6) with `total` in place of var + eps, and dbias/n and dweight/n as means."""
    xhat = (x - x.mean((0, 2), keepdims=True)) / np.sqrt(total)
    mean_dbias, mean_dweight = dy.mean((0, 2), keepdims=True), (dy * xhat).mean((0, 2), keepdims=True)
    result: Array = w / np.sqrt(total) * (dy - mean_dbias - xhat * mean_dweight)
    return result


def parameter_gradients(dy: Array, x: Array, w: Array, eps: float) -> dict[str, Faulty]:
    """Return faulty dweight and dbias (C,) by cause."""
    n, centred = x.shape[0] * x.shape[2], x - x.mean((0, 2), keepdims=True)
    dweight, dbias = (dy * _over((0, 2), x, eps)).sum((0, 2)), dy.sum((0, 2))
    return {
        "dweight": {
            "dweight is the sum of dy·x; it is that of dy·xhat (E5)": (dy * x).sum((0, 2)),
            "rstd is left out of dweight: it is the sum of dy·xhat (E5)": (dy * centred).sum((0, 2)),
            "dweight is a mean; it is a sum (E5)": dweight / n,
            "dweight is divided by N; it is a sum (E5)": dweight / x.shape[0],
            "dweight has a factor weight too many (E5)": dweight * w.ravel(),
            "dweight and dbias are exchanged": dbias,
        },
        "dbias": {
            "dbias is a mean; it is a sum (E5)": dbias / n,
            "dbias is divided by N; it is a sum (E5)": dbias / x.shape[0],
            "dbias has a factor weight too many (E5)": dbias * w.ravel(),
            "dweight and dbias are exchanged": dweight,
        },
    }


def updates(running: tuple[Array, Array], x: Array, momentum: float, eps: float) -> dict[str, Faulty]:
    """Return faulty running_mean and running_var (C,) by cause."""
    n = x.shape[0] * x.shape[2]
    (old_mean, old_var), mean, biased = running, x.mean((0, 2)), x.var((0, 2))
    var = biased * n / (n - 1)

    def new(old: Array, value: Array, momentum: float = momentum) -> Array:
        """(E4)"""
        return (1 - momentum) * old + momentum * value

    decay = "momentum is the weight of the old value; in PyTorch it is that of the new batch (E4)"
    added = "the batch's mean is added without taking momentum·running_mean away (E4)"
    correction = "the variance is corrected with N; it is with n, positions and all (E4)"
    return {
        "running_mean": {
            decay: new(old_mean, mean, 1 - momentum),
            "running_mean and running_var are exchanged": new(old_var, var),
            "running_mean is replaced by the batch's; momentum is not used (E4)": mean,
            "running_mean is not updated (E4)": old_mean,
            added: old_mean + momentum * mean,
        },
        "running_var": {
            "the batch's variance enters biased, divided by n; PyTorch's is divided by n − 1 (E4)": new(
                old_var, biased
            ),
            decay: new(old_var, var, 1 - momentum),
            f"{decay}, and the variance enters biased": new(old_var, biased, 1 - momentum),
            "running_mean and running_var are exchanged": new(old_mean, mean),
            "the variance is multiplied by (n − 1)/n; it is by n/(n − 1) (E4)": new(old_var, biased * (n - 1) / n),
            correction: new(old_var, biased * x.shape[0] / (x.shape[0] - 1)),
            "running_var takes in the standard deviation; it is the variance (E4)": new(old_var, np.sqrt(var)),
            "eps is added to running_var; it belongs to the normalization (E3)": new(old_var, var + eps),
            "running_var is replaced by the batch's; momentum is not used (E4)": var,
            "running_var is not updated (E4)": old_var,
        },
    }


def match(got: Array, faulty: Faulty) -> str:
    """Return the cause whose result equals `got`, up to 10⁻⁴ of its largest value; '' if none does."""
    for cause, wrong in faulty.items():
        if got.shape == wrong.shape and bool((abs(got - wrong) <= 1e-4 * np.max(abs(wrong), initial=0)).all()):
            return cause
    return ""

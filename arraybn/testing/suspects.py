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


class _Parts:
    """Means and projections of (N, C, S), each (1, C, 1) or like x."""

    def __init__(self, x: Array, eps: float) -> None:
        self.n, self.r = x.shape[0] * x.shape[2], 1 / np.sqrt(x.var((0, 2), keepdims=True) + eps)
        self.xhat = _over((0, 2), x, eps)

    def mean(self, t: Array) -> Array:
        result: Array = t.mean((0, 2), keepdims=True)
        return result

    def along(self, t: Array) -> Array:
        """Return ⟨t·xhat⟩."""
        return self.mean(t * self.xhat)

    def p(self, t: Array) -> Array:
        result: Array = t - self.mean(t) - self.xhat * self.along(t)
        return result


def tangents(t: Array, x: Array, w: Array, slope: Array, constant: Array, eps: float, names: str) -> Faulty:
    """Return faulty y_dot (E8) or ddy (E9) by cause; t and x (N, C, S), the vectors (1, C, 1).

    `names` are those of y_dot, t, slope and constant.
    """
    result, of_x, of_weight, of_bias = names.split()
    of = _Parts(x, eps)
    n, r, xhat, mean, along = of.n, of.r, of.xhat, of.mean(t), of.xhat * of.along(t)
    rest, right = slope * xhat + constant, w * r * (t - mean - along)
    label = "(E8)" if result == "y_dot" else "(E9)"
    return {
        f"the statistics are treated as constants: P({of_x}) is {of_x} less two terms {label}": w * r * t + rest,
        f"the term ⟨{of_x}⟩ of P is missing {label}": w * r * (t - along) + rest,
        f"the term xhat·⟨{of_x}·xhat⟩ of P is missing {label}": w * r * (t - mean) + rest,
        f"the sign of xhat·⟨{of_x}·xhat⟩ is wrong {label}": w * r * (t - mean + along) + rest,
        f"the sums of P are not divided by n {label}": w * r * (t - n * mean - n * along) + rest,
        f"n − 1 stands for n in P {label}": w * r * (t - (mean + along) * n / (n - 1)) + rest,
        f"weight is left out of {result} {label}": r * (t - mean - along) + rest,
        f"weight enters {result} twice {label}": w * right + rest,
        f"rstd is left out of {result} {label}": w * (t - mean - along) + rest,
        f"the term {of_weight}·xhat is left out {label}": right + constant,
        f"{of_bias} is left out {label}": right + slope * xhat,
        f"{result} has the wrong sign {label}": -right - rest,
        f"{result} lacks the terms of {of_weight} and {of_bias} {label}": right,
    }


def second_input_gradients(v: Array, g: Array, x: Array, w: Array, v_weight: Array, eps: float) -> Faulty:
    """Return faulty ddx (E9) by cause; v, g = dy and x (N, C, S), w and v_weight (1, C, 1)."""
    of, scale = _Parts(x, eps), -w / (x.var((0, 2), keepdims=True) + eps)
    g1, v1, by_weight = of.along(g), of.along(v), v_weight * of.r * of.p(g)
    of_q, of_v, of_g = scale * of.xhat * of.mean(v * of.p(g)), scale * of.p(v) * g1, scale * of.p(g) * v1
    second, exchanged = of_q + of_v + of_g, scale * g1 * (v - v1 - of.xhat * v1)
    return {
        "the term xhat·Q of (E9) is missing: rstd depends on x": of_v + of_g + by_weight,
        "the term P(v)·⟨dy·xhat⟩ of (E9) is missing": of_q + of_g + by_weight,
        "the term P(dy)·⟨v·xhat⟩ of (E9) is missing": of_q + of_v + by_weight,
        "the statistics are treated as constants: only v_weight·rstd·P(dy) is there (E9)": by_weight,
        "the statistics are treated as constants: ddx is v_weight·rstd·dy (E9)": v_weight * of.r * g,
        "the term v_weight·rstd·P(dy) of (E9) is missing": second,
        "the sign of xhat·Q in (E9) is wrong": second - 2 * of_q + by_weight,
        "the sign of the terms with weight in (E9) is wrong": by_weight - second,
        "⟨v·xhat⟩ stands for ⟨v⟩ in P(v) (E9)": of_q + exchanged + of_g + by_weight,
        "v stands for P(v), and dy for P(dy), in (E9)": of_q + scale * (v * g1 + g * v1) + by_weight,
        "Q is ⟨v·dy⟩ alone (E9)": scale * of.xhat * of.mean(v * g) + of_v + of_g + by_weight,
        "n − 1 stands for n in the means of (E9)": second * of.n / (of.n - 1) + by_weight,
        "weight enters ddx twice (E9)": w * second + by_weight,
        "weight is left out of ddx (E9)": second / w + by_weight,
        "rstd stands for its square in (E9)": second / of.r + by_weight,
        "ddx has the wrong sign (E9)": -second - by_weight,
    }


def second_weight_gradients(v: Array, g: Array, x: Array, w: Array, eps: float) -> Faulty:
    """Return faulty ddweight (C,) by cause (E9); v, g = dy and x (N, C, S), w (1, C, 1)."""
    of = _Parts(x, eps)
    inner, means, along = of.n * of.mean(v * g), of.n * of.mean(v) * of.mean(g), of.n * of.along(v) * of.along(g)
    ddweight = of.r * (inner - means - along)
    faulty = {
        "ddweight is a mean; it is a sum, n·rstd·Q (E9)": ddweight / of.n,
        "the statistics are treated as constants: ddweight is rstd·Σv·dy (E9)": of.r * inner,
        "the product ⟨v⟩⟨dy⟩ is not taken away in Q (E9)": of.r * (inner - along),
        "the product ⟨v·xhat⟩⟨dy·xhat⟩ is not taken away in Q (E9)": of.r * (inner - means),
        "ddweight has a factor weight too many (E9)": ddweight * w,
        "rstd is left out of ddweight (E9)": ddweight / of.r,
        "ddweight has the wrong sign (E9)": -ddweight,
    }
    return {cause: result.ravel() for cause, result in faulty.items()}


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

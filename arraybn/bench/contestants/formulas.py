"""The formulas in NumPy, as they stand in many a notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...testing.scenarios import Batch
from ..device import Array, HostDevice
from ..truth import Problem
from . import Calls, Results


def _normalize(x: Array, eps: Any, axis: Any, variance: Callable[..., Any] = np.var) -> tuple[Array, ...]:
    """Return mean, var, rstd and xhat."""
    mean, var = x.mean(axis, keepdims=True), variance(x, axis=axis, keepdims=True)
    rstd = 1 / np.sqrt(var + eps)
    return mean, var, rstd, (x - mean) * rstd


def _gradients(dy: Array, xhat: Array, rstd: Array, weight: Array, axis: Any) -> tuple[Array, ...]:
    dbias, dweight = dy.sum(axis, keepdims=True), (dy * xhat).sum(axis, keepdims=True)
    n = dy.size // dbias.size
    dx = weight * rstd * (dy - dbias / n - xhat * (dweight / n))
    return dx, dweight.ravel(), dbias.ravel()


def host_calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the formulas in the dtype of x."""
    x, dy, *vectors = problem.inputs
    weight, bias, fixed_mean, fixed_var = (vector.reshape(problem.case.vector_shape) for vector in vectors)
    axis, eps = problem.case.reduced_axes, x.dtype.type(problem.eps)

    def forward() -> Any:
        mean, var = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
        return weight * (x - mean) / np.sqrt(var + eps) + bias

    def step() -> Any:
        _, _, rstd, xhat = _normalize(x, eps, axis)
        _ = weight * xhat + bias
        return _gradients(dy, xhat, rstd, weight, axis)

    _, _, rstd, xhat = _normalize(x, eps, axis)  # a forward keeps them for its backward
    calls = {
        "forward": forward,
        "backward": lambda: _gradients(dy, xhat, rstd, weight, axis),
        "eval": lambda: weight * (x - fixed_mean) / np.sqrt(fixed_var + eps) + bias,
    }
    return Calls({**calls, "layer": forward, "step": step}, np.asarray)


def one_pass_var(x: Array, **over: Any) -> Any:
    """E[x²] − E[x]², which cancels."""
    return (x * x).mean(**over) - x.mean(**over) ** 2


def measured(variance: Callable[..., Any]) -> Callable[[Batch], Results]:
    """Return the formulas with a variance of one pass or of two."""

    def call(batch: Batch) -> Results:
        weight, bias, axis = batch.weight[:, None], batch.bias[:, None], (0, 2)
        mean, var, rstd, xhat = _normalize(batch.x, np.float32(batch.eps), axis, variance)
        dx, *_ = _gradients(batch.dy, xhat, rstd, weight, axis)
        return {"mean": mean, "var": var, "y": weight * xhat + bias, "dx": dx}

    return call

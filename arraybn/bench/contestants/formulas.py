"""The formulas in NumPy, as they stand in many a notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...testing.scenarios import Batch
from ..device import Array, HostDevice
from ..truth import Problem
from . import Calls, Results


def host_calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the formulas in the dtype of x."""
    case, x, dy, _, *vectors = problem[:8]
    axis, n = case.reduced_axes, x.size // case.shape[1]
    weight, bias, fixed_mean, fixed_var = (vector.reshape(case.vector_shape) for vector in vectors)
    eps = x.dtype.type(problem.eps)

    def forward() -> Any:
        mean, var = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
        return weight * (x - mean) / np.sqrt(var + eps) + bias

    rstd = 1 / np.sqrt(x.var(axis, keepdims=True) + eps)
    xhat = (x - x.mean(axis, keepdims=True)) * rstd  # a forward keeps it for its backward

    def gradients(xhat: Array, rstd: Array) -> Any:
        dbias, dweight = dy.sum(axis, keepdims=True), (dy * xhat).sum(axis, keepdims=True)
        dx = weight * rstd * (dy - dbias / n - xhat * (dweight / n))
        return dx, dweight.ravel(), dbias.ravel()

    def evaluate() -> Any:
        return weight * (x - fixed_mean) / np.sqrt(fixed_var + eps) + bias

    def step() -> Any:
        mean, var = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
        rstd = 1 / np.sqrt(var + eps)
        xhat = (x - mean) * rstd
        _ = weight * xhat + bias
        return gradients(xhat, rstd)

    calls = {"forward": forward, "backward": lambda: gradients(xhat, rstd), "eval": evaluate}
    return Calls({**calls, "layer": forward, "step": step}, np.asarray)


def measured(one_pass: bool) -> Callable[[Batch], Results]:
    """Return the formulas with the variance of two passes or of one."""

    def variance(x: Array, **over: Any) -> Any:
        return (x * x).mean(**over) - x.mean(**over) ** 2 if one_pass else x.var(**over)

    def call(batch: Batch) -> Results:
        x, dy, weight, bias, eps = batch
        over: Any = {"axis": (0, 2), "keepdims": True}
        mean, var = x.mean(**over), variance(x, **over)
        rstd = 1 / np.sqrt(var + np.float32(eps))
        xhat = (x - mean) * rstd
        dx = weight[:, None] * rstd * (dy - dy.mean(**over) - xhat * (dy * xhat).mean(**over))
        return {"mean": mean.ravel(), "var": var.ravel(), "y": weight[:, None] * xhat + bias[:, None], "dx": dx}

    return call

"""Whether a contestant of ``python -m arraybn bench`` is right, before anyone looks at how fast it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..testing.oracle import LONG, exact_batch_norm, worst
from ._bench_cases import Array, Case, Problem, make_problem

# ulp of the dtype at the largest term of the formula. arraybn: its promise N2, of which the factor 1 + |mean|/std of
# float64 is less than 2 for these batches. Others: float32 throughout; a result wrong by 0.1 % is off by 8,000 or more.
OURS = {"float32": (4.0, 12.0), "float64": (32.0, 64.0)}  # y; dx, dweight and dbias
OTHERS = (256.0, 256.0)
GRADIENTS = ("backward", "step")
Truth = dict[str, list[tuple[str, Array, Array]]]  # what → name, exact values, units


def limits(dtype: str, ours: bool) -> tuple[float, float]:
    """How many ulp y, and how many the gradients, may be off."""
    return OURS[dtype] if ours else OTHERS


def truths(case: Case) -> Truth:
    """What every call ought to return, arrays like x as (N, C, *S)."""
    problem = make_problem(case)
    x, dy = (np.moveaxis(array, case.channel_axis, 1) for array in (problem.x, problem.dy))
    exact = exact_batch_norm(x, problem.weight, problem.bias, dy, eps=problem.eps)
    axis = tuple(i for i in range(x.ndim) if i != 1)
    g = abs(dy.astype(LONG))
    forward = [("y", exact.y, exact.y_scale)]
    backward = [
        ("dx", exact.dx, exact.dx_scale),
        ("dweight", exact.dweight, (g * abs(exact.xhat)).sum(axis)),
        ("dbias", exact.dbias, g.sum(axis)),
    ]
    evaluation = [("y", *_evaluated(problem, x))]
    return {"forward": forward, "layer": forward, "backward": backward, "step": backward, "eval": evaluation}


def _evaluated(problem: Problem, x: Array) -> tuple[Array, Array]:
    """(E3) y and its largest term, with the fixed statistics, in 80-bit arithmetic."""
    shape = (-1, *[1] * (x.ndim - 2))
    weight, bias, mean, var = (vector.astype(LONG).reshape(shape) for vector in problem[3:7])
    scaled = weight * ((x.astype(LONG) - mean) / np.sqrt(var + problem.eps))
    return scaled + bias, np.maximum(abs(scaled), abs(bias))


def fault(results: Any, truth: Truth, case: Case, *, ours: bool) -> str:
    """What is wrong with the results of one row, by what they are of; '' if nothing is."""
    for what, arrays in results.items():
        if isinstance(arrays, str):
            return f"{what}: {arrays}"
        limit = limits(case.dtype, ours)[what in GRADIENTS]
        for (shape, values), (name, exact, units) in zip(arrays, truth[what], strict=False):
            if tuple(shape) != exact.shape:
                return f"wrong: {name} of {what} has shape {tuple(shape)}, not {exact.shape}"
            error = worst(np.asarray(values).reshape(exact.shape), exact, units, case.dtype)
            if not error <= limit:
                return f"wrong: {name} of {what} is off by {error:.3g} ulp of {case.dtype}, {limit:g} are allowed"
    return ""

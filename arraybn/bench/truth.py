"""Random arrays on any device, what a batch norm of them is, and how far from that a contestant may be.

Promises N1 and N2 have their numbers here, for the CPU, the GPU, the ranks, and `check`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..testing.oracle import MANTISSA_BITS, SMALLEST_EXPONENT, size_of_unit
from .cases import EPS, HALVES, Case
from .device import Array, HostDevice

BLOCK = 2**22 - 3  # random values made on the host; all arrays repeat them, never beginning at the same place
# Limits in ulp at `size_of_unit`. N1: mean and var. N2: y; dx, dweight and dbias. The factor 1 + |mean|/std that N2 has
# in float64 is 2 or less in most channels of a random problem, and 3 at most.
N1 = 1.0
N2 = {"float16": (1.5, 1.5), "bfloat16": (1.5, 1.5), "float32": (4.0, 12.0), "float64": (32.0, 64.0)}
# Limits of everyone else, who computes in float32 throughout; a result wrong by 0.1 % is off by 8,000 in float32.
OTHERS = {"float16": 4.0, "bfloat16": 4.0, "float32": 256.0, "float64": 256.0}
PROMISED = {"mean": N1, "var": N1, "y": N2["float32"][0], "dx": N2["float32"][1]}  # of float32
SLOPE = 5e-4  # halves, whose ulp is 0.1 % or more: how far the best factor between result and truth may be from 1
Expected = list[tuple[str, Array, Array]]  # name, exact values, units
Truth = dict[str, Expected]  # by operation


class Problem(NamedTuple):
    """The arrays of a case: x, dy and out as a user has them; all vectors (C,)."""

    case: Case
    x: Array
    dy: Array
    out: Array
    weight: Array
    bias: Array
    mean: Array  # this and var: the fixed statistics of an evaluation
    var: Array
    eps: float = EPS

    @property
    def inputs(self) -> tuple[Array, ...]:
        """All arrays but `out`: x, dy, weight, bias, mean, var."""
        return (*self[1:3], *self[4:8])


def make_problems(device: HostDevice, case: Case, count: int = 1, seed: int = 0) -> list[Problem]:
    """Return problems that differ in x and dy, the same ones for the same seed; each channel has a mean of its own."""
    rng, xp = np.random.default_rng(seed), device.xp
    block = device.array(rng.standard_normal(min(BLOCK, 4 * case.elements + 1)).astype(case.vectors))
    ends = {"weight": (0.5, 2), "bias": (-2, 2), "mean": (-2, 2), "var": (0.5, 2), "shift": (-2, 2)}
    vectors = {name: device.array(rng.uniform(*one, case.shape[1]).astype(case.vectors)) for name, one in ends.items()}
    shift = vectors.pop("shift").reshape(case.vector_shape)
    found = []
    for _ in range(count):
        x, dy = (_repeated(device, block, case, int(rng.integers(len(block)))) for _ in range(2))
        x += shift
        x, dy = (narrowed(xp, array, case.dtype) for array in (x, dy))
        found.append(Problem(case, x, dy, xp.empty_like(x), **vectors))
    device.synchronize()
    return found


def _repeated(device: HostDevice, block: Array, case: Case, first: int) -> Array:
    """Return the values of the block from `first` on, again and again: random numbers take longer than batch norms."""
    array = device.empty((case.elements,), block.dtype)
    done = 0
    while done < case.elements:
        part = block[first : first + case.elements - done]
        array[done : done + len(part)] = part
        done, first = done + len(part), 0
    return array.reshape(case.in_memory)


def widened(xp: Any, array: Array, dtype: Any) -> Array:
    """Return an array in a wider dtype; a bfloat16 one by its bits, because not every operation knows the type."""
    if "bfloat16" in str(array.dtype):
        array = xp.left_shift(array.view(xp.uint16).astype(xp.uint32), 16).view(xp.float32)
    return array.astype(dtype)


def narrowed(xp: Any, array: Array, dtype: str) -> Array:
    """Return a finite array in `dtype`, rounded to nearest, ties to even; bfloat16 is made of float32."""
    if dtype != "bfloat16":
        return array.astype(dtype, copy=False)
    import ml_dtypes

    bits = array.view(xp.uint32)
    odd = xp.bitwise_and(xp.right_shift(bits, 16), 1)
    return xp.right_shift(bits + 0x7FFF + odd, 16).astype(xp.uint16).view(ml_dtypes.bfloat16)


# ---- The truth -------------------------------------------------------------------------------------------------------


def truths(xp: Any, problem: Problem) -> Truth:
    """Return what every operation ought to return, as it lies in memory: on NumPy in 80 bits, else in float64."""
    case, wide = problem.case, np.longdouble if xp is np else xp.float64
    axis, line, n = case.reduced_axes, case.vector_shape, case.elements // case.shape[1]
    x, dy = (widened(xp, array, wide) for array in (problem.x, problem.dy))
    weight, bias, mean, var = (v.astype(wide).reshape(line) for v in (problem.weight, problem.bias, *problem[6:8]))
    evaluation = [_y(xp, (x - mean) / xp.sqrt(var + problem.eps), weight, bias)]
    x -= x.mean(axis, keepdims=True)
    x -= x.mean(axis, keepdims=True)  # what rounding left of it
    rstd = 1 / xp.sqrt((x * x).mean(axis, keepdims=True) + problem.eps)
    xhat = x * rstd
    forward = [_y(xp, xhat, weight, bias)]
    dweight, dbias = ((dy * xhat).sum(axis, keepdims=True), dy.sum(axis, keepdims=True))
    terms = [weight * rstd * term for term in (dy, dbias / n, xhat * (dweight / n))]
    largest = xp.maximum(xp.maximum(abs(terms[0]), abs(terms[1])), abs(terms[2]))
    backward = [
        ("dx", terms[0] - terms[1] - terms[2], largest),
        ("dweight", dweight.ravel(), abs(dy * xhat).sum(axis)),
        ("dbias", dbias.ravel(), abs(dy).sum(axis)),
    ]
    return {"forward": forward, "layer": forward, "backward": backward, "step": backward, "eval": evaluation}


def _y(xp: Any, xhat: Array, weight: Array, bias: Array) -> tuple[str, Array, Array]:
    """(E3) y and its largest term."""
    scaled = weight * xhat
    return "y", scaled + bias, xp.maximum(abs(scaled), abs(bias))


def fault(xp: Any, got: list[Array], truth: Expected, case: Case, *, ours: bool, of: str = "") -> str:
    """Describe the first wrong result, or return ''. `of`, as in " of forward", follows the name of a result."""
    if len(got) < len(truth):
        return f"wrong: {len(got)} results, not {len(truth)}"
    for array, (name, exact, units) in zip(got, truth, strict=False):
        if tuple(array.shape) != tuple(exact.shape):
            return f"wrong: {name}{of} has shape {tuple(array.shape)}, not {tuple(exact.shape)}"
        dtype = case.dtype if exact.ndim > 1 or case.dtype not in HALVES else "float32"
        values, most = widened(xp, array, exact.dtype), N2[dtype][name != "y"] if ours else OTHERS[dtype]
        error = worst(xp, values, exact, units, dtype)
        if not error <= most:
            return f"wrong: {name}{of} is off by {error:.3g} ulp of {dtype}, {most:g} are allowed"
        if dtype in HALVES:
            slope = float((values * exact).sum() / (exact * exact).sum()) - 1
            # independent roundings leave a share
            most = SLOPE + 2.0 ** -MANTISSA_BITS[dtype] / math.sqrt(case.elements)
            if not abs(slope) <= most:
                return f"wrong: {name}{of} is {slope:+.3%} too large on the whole, {most:.3%} is allowed"
    return ""


def worst(xp: Any, values: Array, exact: Array, units: Array, dtype: str) -> float:
    """Return the largest error, in ulp of `dtype` at `size_of_unit`; infinite where anything is no number."""
    largest = xp.frexp(size_of_unit(units, exact, dtype, xp))[1]
    exponents = xp.maximum(largest, SMALLEST_EXPONENT[dtype] + 1) - 1 - MANTISSA_BITS[dtype]
    errors = abs(values - exact) / xp.ldexp(xp.ones(units.shape, xp.float64), exponents)
    found = float(xp.where(xp.isnan(errors), np.inf, errors).max())
    return math.inf if math.isnan(found) else found

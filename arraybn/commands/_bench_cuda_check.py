"""Whether a contestant of ``bench --device cuda`` is right: float64 on the device itself, by plain array operations.

So the very shapes that are timed are checked, and with them the very kernels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..testing.oracle import MANTISSA_BITS, SMALLEST_EXPONENT
from ._bench_cuda_cases import HALVES, GpuCase

Array = Any
Truth = dict[str, list[tuple[str, Array, Array]]]  # what → name, values in float64, units

# ulp at the largest term of the formula: of the dtype of x for what is like x, at least float32 for sums. arraybn: its
# promise N2. Others: computed in float32 throughout, and rounded; a result wrong by 0.1 % is off by 8,000 in float32.
OURS = {"float16": (1.5, 1.5), "bfloat16": (1.5, 1.5), "float32": (4.0, 12.0), "float64": (32.0, 64.0)}
OTHERS = {"float16": 4.0, "bfloat16": 4.0, "float32": 256.0, "float64": 256.0}
SUMS = (12.0, 256.0)  # dweight and dbias: arraybn, others
SLOPE = 5e-4  # halves, whose ulp is 0.1 % or more: how far the best factor between result and truth may be from 1


def widened(xp: Any, array: Array, dtype: str) -> Array:
    """An array in float64; a bfloat16 one by its bits, because not every operation knows the type."""
    if dtype == "bfloat16":
        return xp.left_shift(array.view(xp.uint16).astype(xp.uint32), 16).view(xp.float32).astype(xp.float64)
    return array.astype(xp.float64)


def narrowed(xp: Any, array: Array, dtype: str) -> Array:
    """A finite float32 array in `dtype`, rounded to nearest, ties to even."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    import ml_dtypes

    bits = array.view(xp.uint32)
    odd = xp.bitwise_and(xp.right_shift(bits, 16), 1)
    return xp.right_shift(bits + 0x7FFF + odd, 16).astype(xp.uint16).view(ml_dtypes.bfloat16)


def truths(xp: Any, case: GpuCase, arrays: dict[str, Array], eps: float) -> Truth:
    """What every call ought to return. `arrays` has x and dy as they lie in memory; weight, bias, mean, var (C,)."""
    axis = tuple(i for i in range(len(case.shape)) if i != case.channel_axis % len(case.shape))
    line = tuple(-1 if i not in axis else 1 for i in range(len(case.shape)))
    x, dy = (widened(xp, arrays[name], case.dtype) for name in ("x", "dy"))
    weight, bias, mean, var = (arrays[name].astype("f8").reshape(line) for name in ("weight", "bias", "mean", "var"))
    found: Truth = {"eval": [("y", *_mapped(xp, (x - mean) / xp.sqrt(var + eps), weight, bias))]}
    x -= x.mean(axis, keepdims=True)
    x -= x.mean(axis, keepdims=True)  # what rounding left of it
    rstd = 1 / xp.sqrt((x * x).mean(axis, keepdims=True) + eps)
    xhat = x * rstd
    found["forward"] = [("y", *_mapped(xp, xhat, weight, bias))]
    n = case.elements // case.shape[1]
    dweight, dbias = ((dy * xhat).sum(axis, keepdims=True), dy.sum(axis, keepdims=True))
    terms = [weight * rstd * term for term in (dy, dbias / n, xhat * (dweight / n))]
    largest = xp.maximum(xp.maximum(abs(terms[0]), abs(terms[1])), abs(terms[2]))
    found["backward"] = [
        ("dx", terms[0] - terms[1] - terms[2], largest),
        ("dweight", dweight.ravel(), abs(dy * xhat).sum(axis)),
        ("dbias", dbias.ravel(), abs(dy).sum(axis)),
    ]
    return found


def _mapped(xp: Any, xhat: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """(E3) y and its largest term."""
    scaled = weight * xhat
    return scaled + bias, xp.maximum(abs(scaled), abs(bias))


def fault(xp: Any, got: list[Array], truth: list[tuple[str, Array, Array]], case: GpuCase, *, ours: bool) -> str:
    """What is wrong with what a call returned, as it lies in memory; '' if nothing is."""
    if len(got) < len(truth):
        return f"wrong: {len(got)} results, not {len(truth)}"
    for array, (name, exact, units) in zip(got, truth, strict=False):
        dtype = case.dtype if exact.ndim > 1 or case.dtype not in HALVES else "float32"
        if tuple(array.shape) != tuple(exact.shape):
            return f"wrong: {name} has shape {tuple(array.shape)}, not {tuple(exact.shape)}"
        values = widened(xp, array, "bfloat16" if "bfloat16" in str(array.dtype) else str(array.dtype))
        limit = _limit(case, name, ours=ours)
        # in halves most of the error is the rounding of the result, which may be larger than its terms
        error = worst(xp, values, exact, xp.maximum(units, abs(exact)) if dtype in HALVES else units, dtype)
        if not error <= limit:
            return f"wrong: {name} is off by {error:.3g} ulp of {dtype}, {limit:g} are allowed"
        if dtype in HALVES:
            slope, limit = float((values * exact).sum() / (exact * exact).sum()) - 1, _slope(case, dtype)
            if not abs(slope) <= limit:
                return f"wrong: {name} is {slope:+.3%} too large on the whole, {limit:.3%} is allowed"
    return ""


def _slope(case: GpuCase, dtype: str) -> float:
    """What the factor may be off: `SLOPE`, and what roundings that are independent leave of an ulp on the average."""
    return SLOPE + 2.0 ** -MANTISSA_BITS[dtype] / math.sqrt(case.elements)


def _limit(case: GpuCase, name: str, *, ours: bool) -> float:
    if name in ("dweight", "dbias") and case.dtype != "float64":
        return SUMS[0 if ours else 1]
    return OURS[case.dtype][name != "y"] if ours else OTHERS[case.dtype]


def worst(xp: Any, values: Array, exact: Array, units: Array, dtype: str) -> float:
    """The largest error, in ulp of `dtype` at `units`; infinite where anything is no number."""
    least = xp.frexp(units)[1]
    least = xp.maximum(least, SMALLEST_EXPONENT[dtype] + 1)
    errors = abs(values - exact) / xp.ldexp(xp.ones(units.shape, xp.float64), least - 1 - MANTISSA_BITS[dtype])
    found = float(xp.where(xp.isnan(errors), np.inf, errors).max())
    return math.inf if math.isnan(found) else found

"""Properties of forward mode (E8) and double backward (E9)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from . import scenarios
from .oracle import LONG, exact_double_backward, exact_jvp
from .properties import (
    FAR,
    NEAR,
    Array,
    Measured,
    Property,
    Subject,
    compared,
    compared_type,
    far,
    inputs_stay,
    one_batch,
    ordinary,
    tangents,
)
from .scenarios import Batch
from .sums import bounds_of_derivatives

Truth = dict[str, tuple[Array, Array]]  # exact results and their largest terms, by name


def _truth(batch: Batch) -> Truth:
    t, x, w = tangents(batch), batch.x, batch.weight
    double = exact_double_backward(x, w, batch.dy, t["v"], t["v_weight"], t["v_bias"], eps=batch.eps)
    names = ("ddy", "ddx", "ddweight")
    return {
        "y_dot": exact_jvp(x, w, t["x_dot"], t["weight_dot"], t["bias_dot"], eps=batch.eps),
        **{name: (getattr(double, name), getattr(double, f"{name}_scale")) for name in names},
    }


def _results(subject: Subject, batch: Batch, name: str, **others: Array) -> Array:
    """Return the result of that name."""
    if name == "y_dot":
        return subject.tangent(batch, **others)
    return dict(zip(("ddy", "ddx", "ddweight"), subject.second_gradients(batch, **others), strict=True))[name]


def _defined(subject: Subject, batch: Batch, name: str) -> Measured:
    want, scale = _truth(batch)[name]
    bound = bounds_of_derivatives(batch, tangents(batch), subject.dtype.name)[name]
    return compared(name, _results(subject, batch, name), want, scale, subject.dtype, bound)


def _type(subject: Subject, batch: Batch, name: str) -> Measured:
    return compared_type(name, _results(subject, batch, name), batch.x)


def _sums(subject: Subject, batch: Batch, name: str) -> Measured:
    """Compare Σy_dot with n·bias_dot, or Σddx with 0."""
    _, scale = _truth(batch)[name]
    n, bias_dot = batch.x[:, 0].size, tangents(batch)["bias_dot"].astype(LONG)
    want = n * bias_dot if name == "y_dot" else 0 * bias_dot
    got = _results(subject, batch, name).astype(LONG).sum((0, 2))
    bound = bounds_of_derivatives(batch, tangents(batch), subject.dtype.name)[name].sum((0, 2))
    return compared(f"Σ{name}", got, want, scale.sum((0, 2)), subject.dtype, bound)


def _linear(subject: Subject, batch: Batch, names: tuple[str, ...], first: str) -> Measured:
    """Compare the result of all tangents with half that of the doubled ones, and with the sum of results of parts.

    The parts are `first` alone and the rest alone.
    """
    truth, found = _truth(batch), []
    bounds = bounds_of_derivatives(batch, tangents(batch), subject.dtype.name)
    twice = {name: 2 * array for name, array in tangents(batch).items()}
    nothing = {name: 0 * array for name, array in tangents(batch).items()}
    alone = {name: array for name, array in nothing.items() if name not in (first, "x_dot", "v")}
    for name in names:
        others: list[dict[str, Array]] = [{}, twice, {first: nothing[first]}, alone]
        whole, doubled, *parts = (_results(subject, batch, name, **some).astype(LONG) for some in others)
        given = truth[name][1], subject.dtype, 3 * bounds[name]
        found += [compared(name, whole, result, *given) for result in (doubled / 2, parts[0] + parts[1])]
    return max(found)


def _transposed(subject: Subject, batch: Batch) -> Measured:
    """Compare Σv·y_dot with Σdx·x_dot + dweight·weight_dot + dbias·bias_dot, of the backward with dy = v."""
    t = {name: array.astype(LONG) for name, array in tangents(batch).items()}
    y_dot = subject.tangent(batch).astype(LONG)
    dx, dweight, dbias = (array.astype(LONG) for array in subject.gradients(batch._replace(dy=tangents(batch)["v"])))
    want = (dx * t["x_dot"]).sum((0, 2)) + dweight * t["weight_dot"] + dbias * t["bias_dot"]
    scale = (abs(t["v"]) * _truth(batch)["y_dot"][1]).sum((0, 2))
    bound = bounds_of_derivatives(batch, tangents(batch), subject.dtype.name)["y_dot"]
    return compared("Σv·y_dot", (t["v"] * y_dot).sum((0, 2)), want, scale, subject.dtype, 2 * bound.sum((0, 2)))


def _symmetric(subject: Subject, batch: Batch) -> Measured:
    """Compare Σu·ddx(v) with Σv·ddx(u), without v_weight and v_bias: ddx(v) is the Hessian of Σdy·y times v."""
    t = tangents(batch)
    u, v, none = np.roll(t["v"], 1, axis=0), t["v"], 0 * t["v_weight"]
    u = (u.astype("f8") + 0.5).astype(v.dtype)
    products, scales = [], []
    for one, other in ((u, v), (v, u)):
        ddx = _results(subject, batch, "ddx", v=one, v_weight=none, v_bias=none)
        exact = exact_double_backward(batch.x, batch.weight, batch.dy, one, none, none, eps=batch.eps)
        products.append((other.astype(LONG) * ddx.astype(LONG)).sum((0, 2)))
        scales.append((abs(other.astype(LONG)) * exact.ddx_scale).sum((0, 2)))
    bounds = bounds_of_derivatives(batch, {**t, "v": u}, subject.dtype.name)["ddx"].sum((0, 2))
    return compared("Σu·ddx", products[0], products[1], np.maximum(*scales), subject.dtype, 4 * bounds)


def _two_batches(subject: Subject) -> list[Batch]:
    """Return a batch near zero, where sums in every dtype are so exact that a small fault shows, and a usual one."""
    return [scenarios.make("small"), *one_batch(subject)]


def _property(name: str, measure: Callable[..., Measured], **options: Any) -> Property:
    """Return a property of the function that gives the first word of its name."""
    needs = "jvp" if name.startswith(("y_dot", "jvp")) else "double_backward"
    return Property(name, needs, measure, **{"batches": _two_batches, "factor": 3.0, **options})


_of = {name: partial(_defined, name=name) for name in ("y_dot", "ddy", "ddx", "ddweight")}
_FACTORS = {"y_dot": 3.0, "ddy": 3.0, "ddx": 6.0, "ddweight": 3.0}  # 3 and 5 terms, and 10 of ddx
DERIVATIVES = [
    *(
        _property(f"{name} is of the dtype and shape of x", partial(_type, name=name))
        for name in ("y_dot", "ddy", "ddx")
    ),
    *(
        _property(f"{name} is what the definition gives", _of[name], batches=ordinary, kinds=NEAR, factor=factor)
        for name, factor in _FACTORS.items()
    ),
    *(
        _property(
            f"{name} keeps its digits where the mean is far from zero",
            _of[name],
            batches=far,
            kinds=FAR[:1],
            factor=_FACTORS[name],
        )
        for name in ("y_dot", "ddy", "ddx")
    ),
    _property("y_dot sums to n·bias_dot over each channel", partial(_sums, name="y_dot")),
    _property("y_dot is linear in the tangents", partial(_linear, names=("y_dot",), first="x_dot"), factor=6.0),
    _property("jvp is the transpose of backward", _transposed, factor=6.0, also="backward"),
    _property("jvp leaves its arguments as they are", partial(inputs_stay, function="jvp")),
    _property("ddx sums to zero over each channel", partial(_sums, name="ddx"), factor=6.0),
    _property(
        "double_backward is linear in v, v_weight and v_bias",
        partial(_linear, names=("ddy", "ddx"), first="v"),
        factor=12.0,
    ),
    _property("ddx is symmetric in v, as a second derivative by x is", _symmetric, factor=6.0),
    _property("double_backward leaves its arguments as they are", partial(inputs_stay, function="double_backward")),
]

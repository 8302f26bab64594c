"""Properties of every batch norm. Each measures an error, in ulp, of the functions under test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .._arrays.copies import as_numpy, converted
from .._arrays.namespaces import (
    Namespace,
    array_namespace,
    as_dtype,
    as_namespace,
    dtype_name,
    is_array_api_obj,
    namespace_name,
)
from . import scenarios
from .forms import ANY, CALLS, FORMS, LIKE_X, Form
from .oracle import LONG, Exact, errors_in, exact_batch_norm, worst
from .scenarios import Batch
from .sums import bounds_of_sums, bounds_of_update

Array = np.ndarray[Any, Any]
MOMENTUM = 0.25


class Measured(NamedTuple):
    """The error of a result."""

    error: float  # in ulp
    detail: str = ""  # a text if the result is no array of numbers
    excess: float = np.inf  # the error in units of that which sums in the dtype of x may have; see `sums`


@dataclass(frozen=True)
class Subject:
    """The functions under test, and the options of `check_batch_norm`."""

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    update: Callable[..., Any] | None
    dtype: np.dtype[Any]
    xp: Namespace | None
    tolerance: float
    max_ratio: float
    jvp: Callable[..., Any] | None = None
    double_backward: Callable[..., Any] | None = None

    masks: bool = False  # True for functions that take a mask, after the other arguments

    forms: dict[str, Form] = field(default_factory=dict)  # by function; see `find_forms`

    def to_namespace(self, array: Array) -> Any:
        """Return a copy of `array` in the namespace of the functions."""
        if self.xp is None or (xp := as_namespace(self.xp)) is as_namespace(np):
            return array.copy()
        if array.dtype == bool:
            return converted("array", array, xp, None, xp.bool)
        return converted("array", array, xp, None, as_dtype(array.dtype.name, xp))

    def rounded(self, batch: Batch) -> Batch:
        """Return the batch with x and dy in the dtype under test."""
        with np.errstate(over="ignore"):
            return batch._replace(x=batch.x.astype(self.dtype), dy=batch.dy.astype(self.dtype))

    def form(self, role: str) -> Form:
        """Return the shape of x that a function takes."""
        return self.forms.get(role, ANY)

    def arguments(self, role: str, batch: Batch, **others: Array) -> tuple[list[Array], list[Any]]:
        """Return the arrays, of which `others` replace some; then the number, and the mask for functions with masks."""
        arrays = {"x": batch.x, "dy": batch.dy, "weight": batch.weight, "bias": batch.bias}
        arrays |= dict(zip(("running_mean", "running_var"), running(batch), strict=True))
        arrays |= tangents(batch) | others
        names, pack = CALLS[role][0].split(", ")[:-1], self.form(role).pack
        values = [pack(arrays[name]) if arrays[name].ndim == 3 else arrays[name] for name in names]
        rest: list[Any] = [MOMENTUM if role == "update" else batch.eps]
        if self.masks:
            where = np.ones(batch.x[:, 0].shape, bool) if batch.where is None else batch.where
            rest.append(self.to_namespace(pack(where[:, None])[:, 0]))
        return values, rest

    def call(self, role: str, batch: Batch, **others: Array) -> Any:
        """Return the result of a function, in its namespace."""
        arrays, rest = self.arguments(role, batch, **others)
        return getattr(self, role)(*map(self.to_namespace, arrays), *rest)

    def raw_y(self, batch: Batch) -> Any:
        """Return y of forward, in the namespace of the functions."""
        result = self.call("forward", batch)
        return result[0] if isinstance(result, tuple) else result

    def y(self, batch: Batch) -> Array:
        """Return y of forward, as a NumPy array."""
        return self.form("forward").unpack(_copied("y", self.raw_y(batch)), batch.x.shape)

    def gradients(self, batch: Batch) -> tuple[Array, Array, Array]:
        """Return dx, dweight and dbias of backward."""
        dx, dweight, dbias = self.call("backward", batch)
        dx = self.form("backward").unpack(_copied("dx", dx), batch.x.shape)
        return dx, _copied("dweight", dweight), _copied("dbias", dbias)

    def running_statistics(self, batch: Batch) -> tuple[Array, Array]:
        """Return running_mean and running_var after an update of `running(batch)` with the batch."""
        mean, var = self.call("update", batch)
        return _copied("running_mean", mean), _copied("running_var", var)

    def tangent(self, batch: Batch, **others: Array) -> Array:
        """Return y_dot of jvp."""
        return self.form("jvp").unpack(_copied("y_dot", self.call("jvp", batch, **others)), batch.x.shape)

    def second_gradients(self, batch: Batch, **others: Array) -> tuple[Array, Array, Array]:
        """Return ddy, ddx and ddweight of double_backward."""
        ddy, ddx, ddweight = self.call("double_backward", batch, **others)
        form, shape = self.form("double_backward"), batch.x.shape
        ddy, ddx = form.unpack(_copied("ddy", ddy), shape), form.unpack(_copied("ddx", ddx), shape)
        return ddy, ddx, _copied("ddweight", ddweight)

    def find_forms(self) -> None:
        """Find the shape of x that each function takes: the first for which its results have the right shapes."""
        batch = self.rounded(scenarios.make("small"))
        calls: dict[str, Callable[[Batch], Any]] = {
            "forward": lambda batch: [self.y(batch)],
            "backward": self.gradients,
            "update": self.running_statistics,
            "jvp": lambda batch: [self.tangent(batch)],
            "double_backward": self.second_gradients,
        }
        for role, call in calls.items():
            names = CALLS[role][1].split(", ")
            wanted = [batch.x.shape if name in LIKE_X else batch.weight.shape for name in names]
            for form in FORMS if getattr(self, role) is not None else ():
                self.forms[role] = form
                with suppress(Exception), np.errstate(all="ignore"):
                    if [result.shape for result in call(batch)] == wanted:
                        break
            else:
                self.forms[role] = ANY


def _copied(name: str, array: Any) -> Array:
    """Return a NumPy array that the next call cannot write into."""
    found = np.array(as_numpy(name, array))  # of PyTorch's bfloat16 in float32
    narrow = dtype_name(getattr(array, "dtype", found.dtype)) == "bfloat16"
    return found.astype(scenarios.numpy_dtype("bfloat16")) if narrow else found


def running(batch: Batch) -> tuple[Array, Array]:
    """Return running statistics (C,) before the batch, in float32, as large as the values of x."""
    c = batch.x.shape[1]
    with np.errstate(all="ignore"):
        size = np.nanmax(abs(batch.x.astype("f8")), axis=(0, 2), initial=1.0).astype("f4")
    return size * np.linspace(0.5, 1, c, dtype="f4"), np.linspace(2, 3, c, dtype="f4")


def tangents(batch: Batch) -> dict[str, Array]:
    """Return tangents and cotangents for the batch; those of a part of the batch are parts of them."""
    v = (np.cos(3 * batch.dy.astype("f8")) + 0.25).astype(batch.dy.dtype)
    weight, bias = batch.weight, batch.bias
    vectors = {"weight_dot": 0.75 - bias, "bias_dot": weight + 0.3, "v_weight": bias + 0.5, "v_bias": weight / 2 - 0.25}
    return {"x_dot": batch.dy, "v": v, **{name: vector.astype(weight.dtype) for name, vector in vectors.items()}}


@dataclass(frozen=True)
class Property:
    """A statement about the functions under test, and the measurement of its error."""

    name: str  # the statement, as a sentence
    needs: str  # "forward", "backward", "update", "jvp" or "double_backward"
    measure: Callable[[Subject, Batch], Measured]
    batches: Callable[[Subject], Iterable[Batch]]
    kinds: tuple[str, ...] = ()  # kinds of random channels, of `strategies.KINDS`
    factor: float = 1.0  # the limit in units of the tolerance
    shrinks: bool = True  # False if `measure` needs the whole batch
    also: str = ""  # a second function that `measure` calls

    def limit(self, subject: Subject) -> float:
        """Return the largest allowed error in ulp."""
        return self.factor * subject.tolerance

    def error(self, subject: Subject, batch: Batch) -> Measured:
        """Measure the error; an exception of the functions counts as an infinite error."""
        try:
            with np.errstate(all="ignore"):
                return self.measure(subject, subject.rounded(batch))
        except Exception as error:
            return Measured(np.inf, f"raised {type(error).__name__}: {error}")


# ---- Batches --------------------------------------------------------------------------------------------------------


def ordinary(subject: Subject) -> list[Batch]:
    """Return batches of all kinds of shapes, with means near zero."""
    near = [scenarios.make(shape) for shape in ("small", "tall", "wide", "images", "one channel")]
    # more values and more channels than fit into a block or a tile of a kernel
    near += [scenarios.normal(shape, 0.0, 1.0, seed=1) for shape in ((3, 2, 1367), (2, 131, 3), (1031, 2, 1))]
    return [*(batch._replace(eps=eps) for eps in (1e-5, 0.5) for batch in near), scenarios.make("two values")]


def far(subject: Subject) -> list[Batch]:
    """Return batches whose mean is far from zero."""
    ratios = [ratio for ratio in (30.0, 1e3, 1e4, 1e5, 1e6) if ratio <= subject.max_ratio]
    batches = [scenarios.normal((8, 3, 9), sign * ratio, 1.0, seed=3) for ratio in ratios for sign in (1, -1)]
    if batches and subject.dtype.itemsize > 2:  # beyond the range of float16
        batches += [scenarios.make("small", scale)._replace(eps=1e-5) for scale in ("small std", "large std")]
    return batches


def _outliers(subject: Subject) -> list[Batch]:
    return [scenarios.named_batches()["outliers"]] if subject.max_ratio >= 1e6 else []


def _constant(subject: Subject) -> list[Batch]:
    batch = scenarios.named_batches()["constant"]
    x = np.where(batch.x == 3e7, 6e4, batch.x) if subject.dtype.name == "float16" else batch.x
    if subject.max_ratio < 1e6:  # |mean|/std of a constant is infinite, so take constants with exact sums
        x = np.broadcast_to(np.asarray([1.0, -2.0, 0.5])[None, :, None], batch.x.shape)
    return [batch._replace(x=x[:n], dy=batch.dy[:n]) for n in (64, 7)]


def one_batch(subject: Subject) -> list[Batch]:
    """Return one small batch."""
    return [scenarios.make("small", "shifted" if subject.max_ratio >= 30 else "standard")]


def _masked(subject: Subject) -> list[Batch]:
    return [scenarios.with_mask(batch, share) for batch in ordinary(subject) for share in (0.3, 0.8)]


def _one_masked(subject: Subject) -> list[Batch]:
    return [scenarios.with_mask(batch) for batch in one_batch(subject)]


def _with_value(subject: Subject, value: float) -> list[Batch]:
    batch = scenarios.make("small")
    batch.x[1, 1, 2] = value
    return [batch]


# ---- Measurements ---------------------------------------------------------------------------------------------------


def _truth(batch: Batch) -> Exact:
    return exact_batch_norm(batch.x, batch.weight, batch.bias, batch.dy, eps=batch.eps, where=batch.where)


def compared(name: str, got: Array, want: Any, scale: Any, dtype: Any, bound: Any = None) -> Measured:
    """Return the error of a result, and the error in units of `bound`."""
    if got.shape != want.shape:
        return Measured(np.inf, f"{name} has shape {got.shape}; expected {want.shape}")
    if got.dtype.kind not in "fV":
        return Measured(np.inf, f"{name} has dtype {got.dtype.name}; expected real floating numbers")
    excess = np.inf if bound is None else np.max(errors_in(bound, got.astype(LONG), want.astype(LONG)), initial=0)
    return Measured(worst(got, want, scale, dtype), "", float(excess))


def _y(subject: Subject, batch: Batch) -> Measured:
    truth = _truth(batch)
    bound = bounds_of_sums(batch, truth, subject.dtype.name)["y"]
    return compared("y", subject.y(batch), truth.y, truth.y_scale, subject.dtype, bound)


def _gradient(subject: Subject, batch: Batch, name: str) -> Measured:
    truth, got = _truth(batch), dict(zip(("dx", "dweight", "dbias"), subject.gradients(batch), strict=True))
    dy = batch.dy.astype(LONG)
    largest = {
        "dx": truth.dx_scale,
        "dweight": np.abs(dy * truth.xhat).sum(axis=(0, 2)),
        "dbias": np.abs(dy).sum(axis=(0, 2)),
    }
    bound = bounds_of_sums(batch, truth, subject.dtype.name)[name]
    return compared(name, got[name], getattr(truth, name), largest[name], subject.dtype, bound)


def _y_type(subject: Subject, batch: Batch) -> Measured:
    if subject.xp is not None:
        given, result = subject.to_namespace(batch.x), subject.raw_y(batch)
        names = [namespace_name(array_namespace(array)) for array in (given, result) if is_array_api_obj(array)]
        if len(names) == 2 and names[0] != names[1]:
            return Measured(np.inf, f"y is a {names[1]} array; expected a {names[0]} array")
    return compared_type("y", subject.y(batch), batch.x)


def _dx_type(subject: Subject, batch: Batch) -> Measured:
    return compared_type("dx", subject.gradients(batch)[0], batch.x)


def compared_type(name: str, got: Array, x: Array) -> Measured:
    """Return 0 if the result has the shape and dtype of x, else infinity."""
    if got.shape != x.shape or got.dtype != x.dtype:
        return Measured(np.inf, f"{name} is {got.dtype.name} {got.shape}; expected {x.dtype.name} {x.shape}")
    return Measured(0.0)


def _repeated_call(subject: Subject, batch: Batch) -> Measured:
    raw = subject.raw_y(batch)
    first = _copied("y", raw)
    subject.y(batch._replace(x=(3 * batch.x + 1).astype(subject.dtype)))
    if as_numpy("y", raw).tobytes() != as_numpy("y", first).astype(as_numpy("y", raw).dtype).tobytes():
        return Measured(np.inf, "y was written into by the next call: both share their memory")
    return Measured(worst(_copied("y", subject.raw_y(batch)), first, first, subject.dtype))


def _reversed_samples(subject: Subject, batch: Batch) -> Measured:
    y, turned, truth = subject.y(batch), subject.y(batch._replace(x=batch.x[::-1].copy())), _truth(batch)
    bound = 2 * bounds_of_sums(batch, truth, subject.dtype.name)["y"][::-1]
    return compared("y", turned, y[::-1], truth.y_scale[::-1], subject.dtype, bound)


def _separate_channels(subject: Subject, batch: Batch) -> Measured:
    spoiled = batch.x.copy()
    spoiled[:, 1] = 1000 * spoiled[:, 1] + 7
    y, other = subject.y(batch), subject.y(batch._replace(x=spoiled))
    return Measured(worst(other[:, [0, 2]], y[:, [0, 2]], y[:, [0, 2]], subject.dtype))


def _non_finite(subject: Subject, batch: Batch) -> Measured:
    """Compare with the same functions on finite values, so that no other fault of theirs counts."""
    finite = batch.x.copy()
    finite[~np.isfinite(finite)] = 0
    y, other = subject.y(batch), subject.y(batch._replace(x=finite))
    if numbers := np.count_nonzero(~np.isnan(y[:, 1])):
        return Measured(np.inf, f"y has {numbers} numbers in the channel that has lost its mean")
    return compared("y", y[:, [0, 2]], other[:, [0, 2]], abs(other[:, [0, 2]]), subject.dtype)


def _padding(subject: Subject, batch: Batch, function: str) -> Measured:
    """Compare the results on batches that differ in masked values alone, where dy is 0."""
    assert batch.where is not None
    kept = np.broadcast_to(batch.where[:, None], batch.x.shape)
    batch = batch._replace(dy=np.where(kept, batch.dy, batch.dy.dtype.type(0)))
    spoiled = batch._replace(x=np.where(kept, batch.x, np.asarray(np.nan, batch.x.dtype)))
    results = [[subject.y(one)] if function == "forward" else subject.gradients(one) for one in (batch, spoiled)]
    errors = [
        worst(got[kept] if got.ndim > 1 else got, want[kept] if want.ndim > 1 else want, 1.0, subject.dtype)
        for want, got in zip(*results, strict=True)
    ]
    return Measured(max(errors))


def inputs_stay(subject: Subject, batch: Batch, function: str) -> Measured:
    """Return 0 if a call leaves its arguments as they are, else infinity."""
    arrays, rest = subject.arguments(function, batch)
    given = [subject.to_namespace(array) for array in arrays]
    getattr(subject, function)(*given, *rest)
    for index, (array, after) in enumerate(zip(arrays, given, strict=True)):
        if _copied("argument", after).tobytes() != array.tobytes():
            return Measured(np.inf, f"argument {index} was written into")
    return Measured(0.0)


def _running(subject: Subject, batch: Batch, index: int) -> Measured:
    """Measure running_mean (index 0) or running_var (1), in ulp of float32 at the larger of old and new."""
    truth, old = _truth(batch), running(batch)[index].astype(LONG)
    n = batch.x[:, 0].size if batch.where is None else np.count_nonzero(batch.where)
    new = truth.mean if index == 0 else truth.var * n / max(n - 1, 1)
    want, scale = (1 - MOMENTUM) * old + MOMENTUM * new, np.maximum(abs(old), abs(new))
    name = ("running_mean", "running_var")[index]
    bound = bounds_of_update(batch, truth, old)[name]
    return compared(name, subject.running_statistics(batch)[index], want, scale, np.dtype("f4"), bound)


_dx, _dweight, _dbias = (partial(_gradient, name=name) for name in ("dx", "dweight", "dbias"))
_running_mean, _running_var = partial(_running, index=0), partial(_running, index=1)
_with_nan, _with_infinity = partial(_with_value, value=np.nan), partial(_with_value, value=np.inf)
_padded = {name: partial(_padding, function=name) for name in ("forward", "backward")}
_keeps_inputs = {name: partial(inputs_stay, function=name) for name in ("forward", "backward", "update")}

NEAR, FAR = ("normal", "sorted"), ("far", "outlier", "nearly constant")

GROWING = (_y, _dx, _running_mean, _running_var)  # measurements whose error may grow with |mean|/std
PROPERTIES = [
    Property("y is of the dtype and shape of x", "forward", _y_type, one_batch),
    Property("y is what the definition gives", "forward", _y, ordinary, NEAR),
    Property("y keeps its digits where the mean is far from zero", "forward", _y, far, FAR[:1]),
    Property("y keeps its digits beside an outlier", "forward", _y, _outliers),
    Property("a constant channel gives bias", "forward", _y, _constant),
    Property("the order of the samples does not matter", "forward", _reversed_samples, one_batch, NEAR, factor=2),
    Property("channels do not see each other", "forward", _separate_channels, one_batch, factor=0, shrinks=False),
    Property("a NaN stays in its channel", "forward", _non_finite, _with_nan, shrinks=False),
    Property("an infinity stays in its channel", "forward", _non_finite, _with_infinity, shrinks=False),
    Property("a call leaves nothing behind for the next", "forward", _repeated_call, one_batch, factor=0),
    Property("forward leaves its arguments as they are", "forward", _keeps_inputs["forward"], one_batch),
    Property("dx is of the dtype and shape of x", "backward", _dx_type, one_batch),
    Property("dx is what the definition gives", "backward", _dx, ordinary, NEAR, factor=3),
    Property("dx keeps its digits where the mean is far from zero", "backward", _dx, far, FAR[:1], factor=3),
    Property("dweight is the sum of dy·xhat", "backward", _dweight, ordinary, NEAR),
    Property("dbias is the sum of dy", "backward", _dbias, ordinary, NEAR),
    Property("backward leaves its arguments as they are", "backward", _keeps_inputs["backward"], one_batch),
    Property("update leaves its arguments as they are", "update", _keeps_inputs["update"], one_batch),
    Property("running_mean takes in the batch's mean", "update", _running_mean, ordinary, NEAR),
    Property("running_var takes in the batch's unbiased variance", "update", _running_var, ordinary, NEAR),
    Property("running_var keeps its digits where the mean is far from zero", "update", _running_var, far, FAR[:1]),
]
WITH_MASK = [
    Property("y with a mask is what the definition gives", "forward", _y, _masked),
    Property("a NaN in the padding changes no other y", "forward", _padded["forward"], _one_masked, factor=0),
    Property("dx with a mask is what the definition gives", "backward", _dx, _masked, factor=3),
    Property("dweight with a mask is the sum of dy·xhat over all positions", "backward", _dweight, _masked),
    Property("dbias with a mask is the sum of dy over all positions", "backward", _dbias, _masked),
    Property("a NaN in the padding changes no gradient", "backward", _padded["backward"], _one_masked, factor=0),
    Property("running_mean takes in the mean of the mask", "update", _running_mean, _masked),
    Property("running_var takes in the unbiased variance of the mask", "update", _running_var, _masked),
]

"""Properties of every batch norm. Each measures an error, in ulp, of the functions under test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .._arrays.copies import as_numpy
from .._arrays.namespaces import Namespace, array_namespace, as_namespace, is_array_api_obj, namespace_name
from . import scenarios
from .oracle import LONG, Exact, exact_batch_norm, worst
from .scenarios import Batch

Array = np.ndarray[Any, Any]
Measured = tuple[float, str]  # error in ulp; a text if the result is no array of numbers, else ''
MOMENTUM = 0.25


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

    def to_namespace(self, array: Array) -> Any:
        """Return a copy of `array` in the namespace of the functions."""
        return array.copy() if self.xp is None else as_namespace(self.xp).asarray(array.copy())

    def rounded(self, batch: Batch) -> Batch:
        """Return the batch with x and dy in the dtype under test."""
        return batch._replace(x=batch.x.astype(self.dtype), dy=batch.dy.astype(self.dtype))

    def y(self, batch: Batch) -> Array:
        """Return y of forward, as a NumPy array."""
        return _copied("y", self.raw_y(batch))

    def raw_y(self, batch: Batch) -> Any:
        """Return y of forward, in the namespace of the functions."""
        result = self.forward(*map(self.to_namespace, (batch.x, batch.weight, batch.bias)), batch.eps)
        return result[0] if isinstance(result, tuple) else result

    def gradients(self, batch: Batch) -> tuple[Array, Array, Array]:
        """Return dx, dweight and dbias of backward."""
        assert self.backward is not None
        arrays = map(self.to_namespace, (batch.dy, batch.x, batch.weight, batch.bias))
        dx, dweight, dbias = self.backward(*arrays, batch.eps)
        return _copied("dx", dx), _copied("dweight", dweight), _copied("dbias", dbias)

    def running_statistics(self, batch: Batch) -> tuple[Array, Array]:
        """Return running_mean and running_var after an update of `running(batch)` with the batch."""
        assert self.update is not None
        mean, var = self.update(*map(self.to_namespace, (*running(batch), batch.x)), MOMENTUM)
        return _copied("running_mean", mean), _copied("running_var", var)


def _copied(name: str, array: Any) -> Array:
    """Return a NumPy array that the next call cannot write into."""
    return np.array(as_numpy(name, array))


def running(batch: Batch) -> tuple[Array, Array]:
    """Return running statistics (C,) before the batch, in float32, as large as the values of x."""
    c = batch.x.shape[1]
    with np.errstate(all="ignore"):
        size = np.nanmax(abs(batch.x), axis=(0, 2), initial=1.0).astype("f4")
    return size * np.linspace(0.5, 1, c, dtype="f4"), np.linspace(2, 3, c, dtype="f4")


@dataclass(frozen=True)
class Property:
    """A statement about the functions under test, and the measurement of its error."""

    name: str  # the statement, as a sentence
    needs: str  # "forward", "backward" or "update"
    measure: Callable[[Subject, Batch], Measured]
    batches: Callable[[Subject], Iterable[Batch]]
    kinds: tuple[str, ...] = ()  # kinds of random channels, of `strategies.KINDS`
    factor: float = 1.0  # the limit in units of the tolerance
    shrinks: bool = True  # False if `measure` needs the whole batch

    def limit(self, subject: Subject) -> float:
        """Return the largest allowed error in ulp."""
        return self.factor * subject.tolerance

    def error(self, subject: Subject, batch: Batch) -> Measured:
        """Measure the error; an exception of the functions counts as an infinite error."""
        try:
            with np.errstate(all="ignore"):
                return self.measure(subject, subject.rounded(batch))
        except Exception as error:
            return np.inf, f"raised {type(error).__name__}: {error}"


# ---- Batches --------------------------------------------------------------------------------------------------------


def _ordinary(subject: Subject) -> list[Batch]:
    near = [scenarios.make(shape) for shape in ("small", "tall", "wide", "images", "one channel")]
    # more values and more channels than fit into a block or a tile of a kernel
    near += [scenarios.normal(shape, 0.0, 1.0, seed=1) for shape in ((3, 2, 1367), (2, 131, 3), (1031, 2, 1))]
    return [*(batch._replace(eps=eps) for eps in (1e-5, 0.5) for batch in near), scenarios.make("two values")]


def _far(subject: Subject) -> list[Batch]:
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


def _one_batch(subject: Subject) -> list[Batch]:
    return [scenarios.make("small", "shifted" if subject.max_ratio >= 30 else "standard")]


def _with_value(subject: Subject, value: float) -> list[Batch]:
    batch = scenarios.make("small")
    batch.x[1, 1, 2] = value
    return [batch]


# ---- Measurements ---------------------------------------------------------------------------------------------------


def _truth(batch: Batch) -> Exact:
    return exact_batch_norm(batch.x, batch.weight, batch.bias, batch.dy, eps=batch.eps)


def _compared(name: str, got: Array, want: Any, scale: Any, dtype: Any) -> Measured:
    if got.shape != want.shape:
        return np.inf, f"{name} has shape {got.shape}; expected {want.shape}"
    if got.dtype.kind not in "fV":
        return np.inf, f"{name} has dtype {got.dtype.name}; expected real floating numbers"
    return worst(got, want, scale, dtype), ""


def _y(subject: Subject, batch: Batch) -> Measured:
    truth = _truth(batch)
    return _compared("y", subject.y(batch), truth.y, truth.y_scale, subject.dtype)


def _gradient(subject: Subject, batch: Batch, name: str) -> Measured:
    truth, got = _truth(batch), dict(zip(("dx", "dweight", "dbias"), subject.gradients(batch), strict=True))
    largest = {
        "dx": truth.dx_scale,
        "dweight": np.abs(batch.dy * truth.xhat).sum(axis=(0, 2)),
        "dbias": np.abs(batch.dy.astype(LONG)).sum(axis=(0, 2)),
    }
    return _compared(name, got[name], getattr(truth, name), largest[name], subject.dtype)


def _y_type(subject: Subject, batch: Batch) -> Measured:
    if subject.xp is not None:
        given, result = subject.to_namespace(batch.x), subject.raw_y(batch)
        names = [namespace_name(array_namespace(array)) for array in (given, result) if is_array_api_obj(array)]
        if len(names) == 2 and names[0] != names[1]:
            return np.inf, f"y is a {names[1]} array; expected a {names[0]} array"
    return _compared_type("y", subject.y(batch), batch.x)


def _dx_type(subject: Subject, batch: Batch) -> Measured:
    return _compared_type("dx", subject.gradients(batch)[0], batch.x)


def _compared_type(name: str, got: Array, x: Array) -> Measured:
    if got.shape != x.shape or got.dtype != x.dtype:
        return np.inf, f"{name} is {got.dtype.name} {got.shape}; expected {x.dtype.name} {x.shape}"
    return 0.0, ""


def _repeated_call(subject: Subject, batch: Batch) -> Measured:
    raw = subject.raw_y(batch)
    first = _copied("y", raw)
    subject.y(batch._replace(x=3 * batch.x + 1))
    if as_numpy("y", raw).tobytes() != first.tobytes():
        return np.inf, "y was written into by the next call: both share their memory"
    return worst(subject.y(batch), first, first, subject.dtype), ""


def _reversed_samples(subject: Subject, batch: Batch) -> Measured:
    y, turned, truth = subject.y(batch), subject.y(batch._replace(x=batch.x[::-1].copy())), _truth(batch)
    return _compared("y", turned, y[::-1], truth.y_scale[::-1], subject.dtype)


def _separate_channels(subject: Subject, batch: Batch) -> Measured:
    spoiled = batch.x.copy()
    spoiled[:, 1] = 1000 * spoiled[:, 1] + 7
    y, other = subject.y(batch), subject.y(batch._replace(x=spoiled))
    return worst(other[:, [0, 2]], y[:, [0, 2]], y[:, [0, 2]], subject.dtype), ""


def _non_finite(subject: Subject, batch: Batch) -> Measured:
    truth, y = _truth(batch), subject.y(batch)
    if numbers := np.count_nonzero(~np.isnan(y[:, 1])):
        return np.inf, f"y has {numbers} numbers in the channel that has lost its mean"
    return _compared("y", y[:, [0, 2]], truth.y[:, [0, 2]], truth.y_scale[:, [0, 2]], subject.dtype)


def _inputs_stay(subject: Subject, batch: Batch, function: str) -> Measured:
    inputs: dict[str, tuple[tuple[Array, ...], float]] = {
        "forward": ((batch.x, batch.weight, batch.bias), batch.eps),
        "backward": ((batch.dy, batch.x, batch.weight, batch.bias), batch.eps),
        "update": ((*running(batch), batch.x), MOMENTUM),
    }
    arrays, option = inputs[function]
    given = [subject.to_namespace(array) for array in arrays]
    getattr(subject, function)(*given, option)
    for index, (array, after) in enumerate(zip(arrays, given, strict=True)):
        if as_numpy("argument", after).tobytes() != array.tobytes():
            return np.inf, f"argument {index} was written into"
    return 0.0, ""


def _running(subject: Subject, batch: Batch, index: int) -> Measured:
    """Measure running_mean (index 0) or running_var (1), in ulp of float32 at the larger of old and new."""
    truth, old = _truth(batch), running(batch)[index].astype(LONG)
    n = batch.x.shape[0] * batch.x.shape[2]
    new = truth.mean if index == 0 else truth.var * n / max(n - 1, 1)
    want, scale = (1 - MOMENTUM) * old + MOMENTUM * new, np.maximum(abs(old), abs(new))
    name = ("running_mean", "running_var")[index]
    return _compared(name, subject.running_statistics(batch)[index], want, scale, np.dtype("f4"))


_dx, _dweight, _dbias = (partial(_gradient, name=name) for name in ("dx", "dweight", "dbias"))
_running_mean, _running_var = partial(_running, index=0), partial(_running, index=1)
_with_nan, _with_infinity = partial(_with_value, value=np.nan), partial(_with_value, value=np.inf)
_keeps_inputs = {name: partial(_inputs_stay, function=name) for name in ("forward", "backward", "update")}

NEAR, FAR = ("normal", "sorted"), ("far", "outlier", "nearly constant")

GROWING = (_y, _dx, _running_mean, _running_var)  # measurements whose error may grow with |mean|/std
PROPERTIES = [
    Property("y is of the dtype and shape of x", "forward", _y_type, _one_batch),
    Property("y is what the definition gives", "forward", _y, _ordinary, NEAR),
    Property("y keeps its digits where the mean is far from zero", "forward", _y, _far, FAR[:1]),
    Property("y keeps its digits beside an outlier", "forward", _y, _outliers),
    Property("a constant channel gives bias", "forward", _y, _constant),
    Property("the order of the samples does not matter", "forward", _reversed_samples, _one_batch, NEAR, factor=2),
    Property("channels do not see each other", "forward", _separate_channels, _one_batch, factor=0, shrinks=False),
    Property("a NaN stays in its channel", "forward", _non_finite, _with_nan, shrinks=False),
    Property("an infinity stays in its channel", "forward", _non_finite, _with_infinity, shrinks=False),
    Property("a call leaves nothing behind for the next", "forward", _repeated_call, _one_batch, factor=0),
    Property("forward leaves its arguments as they are", "forward", _keeps_inputs["forward"], _one_batch),
    Property("dx is of the dtype and shape of x", "backward", _dx_type, _one_batch),
    Property("dx is what the definition gives", "backward", _dx, _ordinary, NEAR, factor=3),
    Property("dx keeps its digits where the mean is far from zero", "backward", _dx, _far, FAR[:1], factor=3),
    Property("dweight is the sum of dy·xhat", "backward", _dweight, _ordinary, NEAR),
    Property("dbias is the sum of dy", "backward", _dbias, _ordinary, NEAR),
    Property("backward leaves its arguments as they are", "backward", _keeps_inputs["backward"], _one_batch),
    Property("update leaves its arguments as they are", "update", _keeps_inputs["update"], _one_batch),
    Property("running_mean takes in the batch's mean", "update", _running_mean, _ordinary, NEAR),
    Property("running_var takes in the batch's unbiased variance", "update", _running_var, _ordinary, NEAR),
    Property("running_var keeps its digits where the mean is far from zero", "update", _running_var, _far, FAR[:1]),
]

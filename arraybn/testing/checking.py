"""`check_batch_norm`: all properties of a batch norm, checked on the user's functions."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .._arrays.namespaces import Namespace, as_namespace
from .._checks import as_integer, as_number
from .diagnosis import cause_of
from .oracle import check_longdouble
from .properties import MOMENTUM, PROPERTIES, Property, Subject, running
from .scenarios import Batch

FEW = (1, 2, 3, 5, 8)  # samples, positions or digits of a smaller batch


@dataclass(frozen=True)
class Failure:
    """A property that does not hold.

    Attributes
    ----------
    property : str
        The property, as a sentence.
    batch : Batch
        The smallest batch found on which the property does not hold.
    error, limit : float
        In ulp of the dtype under test, at the largest term of the formula; the error is infinite if the result is
        missing, is no array of numbers, or has the wrong shape or dtype.
    detail : str
        A description of the result where no error can be measured, else ''.
    cause : str
        The usual cause; '' if unknown.
    """

    property: str
    batch: Batch
    error: float
    limit: float
    detail: str
    cause: str

    def __str__(self) -> str:
        text, batch = partial(np.array2string, threshold=16), self.batch
        x = text(batch.x, separator=", ").replace("\n", "\n         ")
        lines = [
            f"{self.property}: " + (self.detail or f"off by {self.error:.4g} ulp, {self.limit:g} are allowed"),
            f"  on x = {x}",
            f"     of shape {batch.x.shape}, with eps = {batch.eps:g},",
            f"     weight = {text(batch.weight)}, bias = {text(batch.bias)}",
        ]
        if self.property.startswith("d"):
            lines.append(f"     dy = {text(batch.dy.ravel())}, flattened")
        if self.property.startswith("running"):
            mean, var = map(text, running(batch))
            lines.append(f"     running_mean = {mean}, running_var = {var}, momentum = {MOMENTUM}")
        if self.cause:
            lines += textwrap.wrap(f"usual cause: {self.cause}", 110, initial_indent="  ", subsequent_indent="    ")
        return "\n".join(lines)


class BatchNormError(AssertionError):
    """The error of `check_batch_norm`; `failures` are the properties that do not hold."""

    def __init__(self, failures: list[Failure], checked: int) -> None:
        texts, told = [f"{len(failures)} of {checked} properties of a batch norm do not hold"], set[str]()
        for failure in failures:
            texts.append(f"{failure.property}: the same" if failure.detail and failure.detail in told else str(failure))
            told.add(failure.detail)
        super().__init__("\n\n".join(texts))
        self.failures = failures


def check_batch_norm(
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    update: Callable[..., Any] | None = None,
    *,
    tolerance: float = 4.0,
    max_ratio: float = 1e6,
    dtype: str = "float32",
    xp: Namespace | None = None,
    examples: int = 25,
    report: Callable[[str, Failure | None], object] | None = None,
) -> None:
    """Check all properties of a batch norm on these functions; report each failure, its batch and its usual cause.

    Parameters
    ----------
    forward : callable
        ``forward(x, weight, bias, eps)`` returns y, or a tuple that begins with y. x and y (N, C, S), weight and bias
        (C,); the batch's own statistics are used.
    backward : callable, optional
        ``backward(dy, x, weight, bias, eps)`` returns dx in the dtype of x, and dweight and dbias, which are checked
        with the precision of `dtype`.
    update : callable, optional
        ``update(running_mean, running_var, x, momentum)`` returns the new running_mean and running_var, in PyTorch's
        convention: momentum is the weight of the new batch, whose variance enters unbiased.
    tolerance : float
        The largest allowed error of y, in ulp of `dtype` at the largest term of its formula; three times as much for
        dx, the sum of three terms. A limit of 4 requires float64 or compensated sums; pure float32 needs about 32.
    max_ratio : float
        The largest |mean|/std that is checked, from 1 to 10⁶. Use 1 for functions that only work near zero mean.
    dtype : str
        The dtype of x and dy: "float16", "float32" or "float64".
    xp : module, optional
        The namespace of the arrays that the functions take; NumPy if None.
    examples : int
        Number of random batches for each property, in addition to the named batches; needs hypothesis.
    report : callable, optional
        Called after each property with its name and its failure, or None.

    Raises
    ------
    TypeError, ValueError
        An option has another type or value than stated above.
    BatchNormError
        An AssertionError that lists, for each property that does not hold, the smallest batch found, the error in ulp,
        and the usual cause.
    RuntimeError
        numpy.longdouble has less than 64 bits of mantissa here, which the oracle needs.
    ImportError
        examples > 0 without hypothesis.

    Examples
    --------
    >>> import numpy
    >>> def forward(x, weight, bias, eps):
    ...     x64 = x.astype(numpy.float64)
    ...     mean, var = x64.mean((0, 2), keepdims=True), x64.var((0, 2), ddof=1, keepdims=True)
    ...     y = weight[:, None] * ((x64 - mean) / numpy.sqrt(var + eps)) + bias[:, None]
    ...     return y.astype(x.dtype)
    >>> check_batch_norm(forward, examples=0)
    Traceback (most recent call last):
        ...
    arraybn.testing.checking.BatchNormError: ... properties of a batch norm do not hold
    <BLANKLINE>
    y is what the definition gives: off by ... ulp, 4 are allowed
    ...
      usual cause: the variance is divided by n − 1; in the forward it is biased, divided by n (E3)
    ...
    """
    if dtype not in ("float16", "float32", "float64"):
        raise ValueError(f"dtype: expected 'float16', 'float32' or 'float64'; got {dtype!r}")
    if not as_number("tolerance", tolerance) > 0:
        raise ValueError(f"tolerance: expected a number > 0; got {tolerance!r}")
    if not 1 <= as_number("max_ratio", max_ratio) <= 1e6:
        raise ValueError(f"max_ratio: expected a number from 1 to 1e6; got {max_ratio!r}")
    as_integer("examples", examples, 0)
    if xp is not None:
        as_namespace(xp)
    check_longdouble()
    if examples:
        importlib.import_module(".strategies", __package__)  # raises ImportError without hypothesis
    subject = Subject(forward, backward, update, dtype=np.dtype(dtype), xp=xp, tolerance=tolerance, max_ratio=max_ratio)
    properties = [prop for prop in PROPERTIES if getattr(subject, prop.needs) is not None]
    failures = []
    for prop in properties:
        if failure := _first_failure(prop, subject, examples):
            failures.append(failure)
        if report is not None:
            report(prop.name, failure)
    if failures:
        raise BatchNormError(failures, len(properties))


def _first_failure(prop: Property, subject: Subject, examples: int) -> Failure | None:
    """Return the first failure, on the smallest part of its batch; None if the property holds on all batches."""
    limit = prop.limit(subject)

    def fails_alike(part: Batch) -> bool:
        """Return True if the property fails again, with a number as before, or with a text as before."""
        part_error, part_detail = prop.error(subject, part)
        return not part_error <= limit and bool(part_detail) == bool(detail)

    for batch in _batches(prop, subject, examples):
        error, detail = prop.error(subject, batch)
        if not error <= limit:
            smallest = _smallest(batch, fails_alike) if prop.shrinks else batch
            error, detail = prop.error(subject, smallest)
            return Failure(prop.name, smallest, error, limit, detail, "" if detail else cause_of(prop, subject))
    return None


def _batches(prop: Property, subject: Subject, examples: int) -> Iterator[Batch]:
    """Yield the named batches, then random batches."""
    yield from prop.batches(subject)
    kinds = [kind for kind in prop.kinds if kind != "far" or subject.max_ratio >= 30]
    if not (examples and kinds):
        return
    from hypothesis import Phase, given, settings

    from .strategies import batches

    drawn: list[Batch] = []

    def draw(batch: Batch) -> None:
        drawn.append(batch)

    strategy = batches(dtype=subject.dtype.name, kinds=kinds, max_ratio=max(subject.max_ratio, 1.0))
    quiet = settings(max_examples=examples, database=None, derandomize=True, deadline=None, phases=[Phase.generate])
    quiet(given(strategy)(draw))()
    yield from drawn


def _smallest(batch: Batch, fails: Callable[[Batch], bool]) -> Batch:
    """Return a part of the batch that still fails, with fewer samples, positions, channels and digits."""
    varied = np.ptp(batch.x) > 0  # the part must vary too: a constant batch may fail for another reason
    for smaller in (_fewer_samples, _fewer_positions, _fewer_channels, _fewer_digits):
        parts = (part for part in smaller(batch) if part.x[:, 0].size > 1 and (np.ptp(part.x) > 0) >= varied)
        batch = next((part for part in parts if fails(part)), batch)
    return batch


def _fewer_samples(batch: Batch) -> list[Batch]:
    return [batch._replace(x=batch.x[:n], dy=batch.dy[:n]) for n in FEW if n < len(batch.x)]


def _fewer_positions(batch: Batch) -> list[Batch]:
    return [batch._replace(x=batch.x[..., :s], dy=batch.dy[..., :s]) for s in FEW if s < batch.x.shape[2]]


def _fewer_channels(batch: Batch) -> list[Batch]:
    c = batch.x.shape[1]
    some = [slice(i, i + count) for count in (1, 2) for i in range(c + 1 - count)]
    return [Batch(batch.x[:, at], batch.dy[:, at], batch.weight[at], batch.bias[at], batch.eps) for at in some]


def _fewer_digits(batch: Batch) -> list[Batch]:
    arrays = ("x", "dy", "weight", "bias")
    return [batch._replace(**{name: _rounded(getattr(batch, name), digits) for name in arrays}) for digits in FEW]


def _rounded(array: Any, digits: int) -> Any:
    """Return the values rounded to `digits` significant decimal digits, in the array's dtype."""
    values = [float(f"{value:.{digits - 1}e}") for value in array.ravel().tolist()]
    return np.asarray(values, array.dtype).reshape(array.shape)

"""`check_batch_norm`: everything that is true of a batch norm, asked of somebody else's."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._arrays.namespaces import Namespace, as_namespace
from .._checks import as_integer, as_number
from .diagnosis import cause_of
from .oracle import LONG
from .properties import MOMENTUM, PROPERTIES, Property, Subject, running
from .scenarios import Batch


@dataclass(frozen=True)
class Failure:
    """A property that does not hold.

    Attributes
    ----------
    property : str
        What ought to be true, as a sentence.
    batch : Batch
        The smallest batch on which it was seen not to be.
    error, limit : float
        In ulp of the dtype under test, at the largest term of the formula; infinite where the result is no number, of
        the wrong kind, or none.
    detail : str
        What came, where it was no number.
    cause : str
        What usually causes it; '' if unknown.
    """

    property: str
    batch: Batch
    error: float
    limit: float
    detail: str
    cause: str

    def __str__(self) -> str:
        lines = [f"{self.property}: off by {self.error:.4g} ulp, {self.limit:g} are allowed"]
        if self.detail:
            lines = [f"{self.property}: {self.detail}"]
        x = np.array2string(self.batch.x, threshold=16, separator=", ").replace("\n", "\n         ")
        lines.append(f"  on x = {x}")
        lines.append(f"     of shape {self.batch.x.shape}, with eps = {self.batch.eps:g},")
        weight, bias = (np.array2string(array, threshold=16) for array in (self.batch.weight, self.batch.bias))
        lines.append(f"     weight = {weight}, bias = {bias}")
        if self.property.startswith("d"):
            lines.append(f"     dy = {np.array2string(self.batch.dy.ravel(), threshold=16)}, flattened")
        if self.property.startswith("running"):
            mean, var = (np.array2string(array, threshold=16) for array in running(self.batch))
            lines.append(f"     running_mean = {mean}, running_var = {var}, momentum = {MOMENTUM}")
        if self.cause:
            lines += textwrap.wrap(f"usual cause: {self.cause}", 110, initial_indent="  ", subsequent_indent="    ")
        return "\n".join(lines)


class BatchNormError(AssertionError):
    """What `check_batch_norm` raises; `failures` are the properties that do not hold."""

    def __init__(self, failures: list[Failure], checked: int) -> None:
        details = [failure.detail for failure in failures]
        texts = [
            f"{failure.property}: the same" if failure.detail and failure.detail in details[:index] else str(failure)
            for index, failure in enumerate(failures)
        ]
        super().__init__(
            f"{len(failures)} of {checked} properties of a batch norm do not hold\n\n" + "\n\n".join(texts)
        )
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
    """Ask everything that is true of a batch norm of these functions, and say what is not, where, and why.

    Parameters
    ----------
    forward : callable
        ``forward(x, weight, bias, eps)`` returns y, or a tuple that begins with y. x and y (N, C, S), weight and bias
        (C,); the batch's own statistics are used.
    backward : callable, optional
        ``backward(dy, x, weight, bias, eps)`` returns dx in the dtype of x, dweight and dbias, which are asked for in
        the precision of `dtype`.
    update : callable, optional
        ``update(running_mean, running_var, x, momentum)`` returns the new running_mean and running_var, in PyTorch's
        convention: momentum is the weight of the new batch, whose variance enters unbiased.
    tolerance : float
        The largest error of y, in ulp of `dtype` at the largest term of its formula. dx, the sum of three terms, may be
        three times as far off. 4 takes float64 or compensated sums; float32 throughout needs about 32.
    max_ratio : float
        The largest |mean|/std that must be right, from 1 to 10⁶. 1 for functions that are to work near zero mean.
    dtype : str
        Of x and dy: "float16", "float32" or "float64".
    xp : module, optional
        The namespace of the arrays that the functions take; NumPy if None.
    examples : int
        How many random batches are tried for a property, beside the named ones; needs hypothesis.
    report : callable, optional
        Called with each property and its failure, or None, as soon as it is known.

    Raises
    ------
    TypeError, ValueError
        An option is not as said.
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
    if np.finfo(LONG).nmant < 63:
        raise RuntimeError("the oracle needs a numpy.longdouble of 64 bits of mantissa; this platform's has fewer")
    if examples:
        importlib.import_module(".strategies", __package__)  # needs hypothesis, and says so
    subject = Subject(forward, backward, update, dtype=np.dtype(dtype), xp=xp, tolerance=tolerance, max_ratio=max_ratio)
    asked = [p for p in PROPERTIES if getattr(subject, p.needs) is not None]
    failures = []
    for asking in asked:
        failure = _failure(asking, subject, examples)
        if report is not None:
            report(asking.name, failure)
        if failure is not None:
            failures.append(failure)
    if failures:
        raise BatchNormError(failures, len(asked))


def _failure(asking: Property, subject: Subject, examples: int) -> Failure | None:
    """What is wrong, on the smallest batch; None if the property holds on all of them."""
    limit = asking.limit(subject)
    for batch in _batches(asking, subject, examples):
        error, detail = asking.error(subject, batch)
        if not error <= limit:
            smallest = _smallest(batch, _fails_alike(asking, subject, bool(detail))) if asking.shrinks else batch
            error, detail = asking.error(subject, smallest)
            cause = "" if detail else cause_of(asking, subject)
            return Failure(asking.name, smallest, error, limit, detail, cause)
    return None


def _fails_alike(asking: Property, subject: Subject, detailed: bool) -> Callable[[Batch], bool]:
    """Whether the property fails on a batch, and with a number or a text as before."""

    def fails(part: Batch) -> bool:
        error, detail = asking.error(subject, part)
        return not error <= asking.limit(subject) and bool(detail) == detailed

    return fails


def _batches(asking: Property, subject: Subject, examples: int) -> Iterator[Batch]:
    """The named ones, then random ones."""
    yield from asking.batches(subject)
    kinds = [kind for kind in asking.kinds if kind != "far" or subject.max_ratio >= 30]
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
    """A part of the batch, in fewer digits, that still fails: in each respect the first that does."""
    varied = np.ptp(batch.x) > 0  # and is to stay so: a constant batch may fail for a reason of its own
    for smaller in (_fewer_samples, _fewer_positions, _fewer_channels, _fewer_digits):
        parts = (part for part in smaller(batch) if part.x[:, 0].size > 1 and (np.ptp(part.x) > 0) >= varied)
        batch = next((part for part in parts if fails(part)), batch)
    return batch


def _fewer_samples(batch: Batch) -> Iterator[Batch]:
    return (batch._replace(x=batch.x[:n], dy=batch.dy[:n]) for n in (1, 2, 3, 5, 8) if n < len(batch.x))


def _fewer_positions(batch: Batch) -> Iterator[Batch]:
    sizes = (s for s in (1, 2, 3, 5, 8) if s < batch.x.shape[2])
    return (batch._replace(x=batch.x[..., :s], dy=batch.dy[..., :s]) for s in sizes)


def _fewer_channels(batch: Batch) -> Iterator[Batch]:
    c = batch.x.shape[1]
    for some in [slice(i, i + 1) for i in range(c)] + [slice(i, i + 2) for i in range(c - 1)]:
        yield Batch(batch.x[:, some], batch.dy[:, some], batch.weight[some], batch.bias[some], batch.eps)


def _fewer_digits(batch: Batch) -> Iterator[Batch]:
    for digits in (1, 2, 3, 5, 8):
        x, dy, weight, bias = (_rounded(array, digits) for array in batch[:4])
        yield Batch(x, dy, weight, bias, batch.eps)


def _rounded(array: Any, digits: int) -> Any:
    """The values in that many significant decimal digits, in the array's dtype."""
    return np.asarray([float(f"{value:.{digits - 1}e}") for value in array.ravel().tolist()], array.dtype).reshape(
        array.shape
    )

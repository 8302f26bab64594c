"""`check_batch_norm`: all properties of a batch norm, checked on the user's functions."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .._arrays.namespaces import Namespace, as_dtype, as_namespace
from .._checks import as_flag, as_integer, as_number
from .derivatives import DERIVATIVES
from .diagnosis import HALF, OF_SUMS, ONE_PASS, cause_of
from .forms import ANY, Form, as_lines, check_call
from .oracle import LONG, MANTISSA_BITS, check_longdouble
from .properties import MOMENTUM, PROPERTIES, WITH_MASK, Measured, Property, Subject, running, tangents
from .scenarios import Batch, numpy_dtype, random_batches

FEW = (1, 2, 3, 5, 8)  # samples, positions or digits of a smaller batch


@dataclass(frozen=True)
class Failure:
    """A property that does not hold.

    Attributes
    ----------
    property : str
        The property, as a sentence.
    batch : Batch
        The smallest batch found on which the property does not hold; if `rough`, the batch with the largest error.
    error, limit : float
        In ulp of the dtype under test, at the largest term of the formula; the error is infinite if the result is
        missing, is no array of numbers, or has the wrong shape or dtype.
    detail : str
        A description of the result where no error can be measured, else ''.
    cause : str
        The usual cause; '' if unknown.
    rough : bool
        True if the error is one that sums in the dtype of x may have: the formula is right.
    ratio : float
        The largest |mean|/std of a channel of the batch.
    """

    property: str
    batch: Batch
    error: float
    limit: float
    detail: str
    cause: str
    rough: bool = False
    ratio: float = 0.0
    form: Form = field(default=ANY, repr=False)
    kind: str = field(default="", repr=False)  # the same for failures that may have one cause

    def __str__(self) -> str:
        text, batch = partial(np.array2string, threshold=16), self.batch
        values = self.form.pack(batch.x)
        x = text(values, separator=", ").replace("\n", "\n         ")
        lines = [
            f"{self.property}: " + (self.detail or f"off by {self.error:.4g} ulp, {self.limit:g} are allowed"),
            f"  on x = {x}",
            f"     of shape {values.shape}, with eps = {batch.eps:g},",
            f"     weight = {text(batch.weight)}, bias = {text(batch.bias)}",
        ]
        named = {"dy": batch.dy} if self.property.startswith("d") else {}
        if self.property.startswith(("y_dot", "jvp", "dd", "double")):
            named |= tangents(batch)
        lines += [f"     {name} = {text(array.ravel())}, flattened" for name, array in named.items()]
        if batch.where is not None:
            lines.append(f"     where = {text(batch.where.astype(int), separator=', ')}".replace("\n", "\n" + " " * 13))
        if self.property.startswith("running"):
            mean, var = map(text, running(batch))
            lines.append(f"     running_mean = {mean}, running_var = {var}, momentum = {MOMENTUM}")
        return "\n".join([*lines, *_cause_lines(self)])


def _cause_lines(failure: Failure) -> list[str]:
    if not failure.cause:
        return []
    return textwrap.wrap(f"usual cause: {failure.cause}", 110, initial_indent="  ", subsequent_indent="    ")


@dataclass(frozen=True)
class Verdict:
    """The result of `check_batch_norm`; its text is that of ``str``.

    Attributes
    ----------
    checked : int
        Number of properties.
    failures : list of Failure
        The properties that do not hold, or hold only as far as sums in the dtype of x allow.
    dtype : str
        The dtype of x.
    notes : tuple of str
        Further sentences: the shape of x that the functions take, if it is not (N, C, S).
    """

    checked: int
    failures: list[Failure]
    dtype: str
    notes: tuple[str, ...] = ()

    @property
    def faults(self) -> list[Failure]:
        """Failures that no rounding explains."""
        return [failure for failure in self.failures if not failure.rough]

    def __str__(self) -> str:
        parts = [] if self.failures else [f"all {self.checked} properties of a batch norm hold"]
        if faults := self.faults:
            groups = _by_cause(faults)
            causes = "1 cause" if len(groups) == 1 else f"{len(groups)} causes"
            parts = [f"{len(faults)} of {self.checked} properties of a batch norm do not hold; {causes}:"]
            parts += map(_as_text, groups)
        if rough := [failure for failure in self.failures if failure.rough]:
            parts.append(self._of_rough(rough, also=bool(faults)))
        return "\n\n".join([*parts, *self.notes])

    __repr__ = __str__

    def _of_rough(self, rough: list[Failure], *, also: bool) -> str:
        """Return the text on errors of sums in the dtype of x."""
        start = "besides, " if also else "the formula is right; "
        sizes = [f"{one.error:.2g} ulp at |mean|/std = {one.ratio:.2g}" for one in rough]
        most = max(range(len(rough)), key=lambda i: (np.isfinite(rough[i].ratio), rough[i].error))
        lines = [f"{start}accuracy is that of {self.dtype} sums: {sizes[most]}"]
        lines += [f"  {one.property}: {size}; {one.limit:g} allowed" for one, size in zip(rough, sizes, strict=True)]
        for group in _by_cause([one for one in rough if one.cause]):
            lines += _cause_lines(group[0])
        return "\n".join(lines)


def _by_cause(failures: Sequence[Failure]) -> list[list[Failure]]:
    """Return failures in groups of one cause, each with its smallest batch first on which the error is no rounding."""
    groups: dict[str, list[Failure]] = {}
    for failure in failures:
        groups.setdefault(failure.cause or failure.kind, []).append(failure)
    return [sorted(group, key=lambda one: (one.error <= 16 * one.limit, one.batch.x.size)) for group in groups.values()]


def _as_text(group: Sequence[Failure]) -> str:
    """Return the text of failures with one cause: that with the smallest batch, and the names of all."""
    if len(group) == 1:
        return str(group[0])
    return "\n".join([str(group[0]), "  it breaks:", *(f"    {failure.property}" for failure in group)])


class BatchNormError(AssertionError):
    """The error of `check_batch_norm`; `failures` are the properties that do not hold, `verdict` has their text."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(str(verdict))
        self.verdict = verdict
        self.failures = verdict.failures


class AccuracyError(BatchNormError):
    """The error of `check_batch_norm` if the formula is right, with the accuracy of sums in the dtype of x."""


def check_batch_norm(
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    update: Callable[..., Any] | None = None,
    *,
    jvp: Callable[..., Any] | None = None,
    double_backward: Callable[..., Any] | None = None,
    tolerance: float = 4.0,
    max_ratio: float = 1e6,
    dtype: str = "float32",
    accuracy: str = "full",
    where: bool = False,
    xp: Namespace | None = None,
    examples: int = 25,
    report: Callable[[str, Failure | None], object] | None = None,
) -> Verdict:
    """Check all properties of a batch norm on these functions; report each failure, its batch and its usual cause.

    Parameters
    ----------
    forward : callable
        ``forward(x, weight, bias, eps)`` returns y, or a tuple that begins with y. x and y (N, C, S), weight and bias
        (C,); the batch's own statistics are used. A function that takes only (N, C), or only (N, C, H, W), is called
        with such arrays.
    backward : callable, optional
        ``backward(dy, x, weight, bias, eps)`` returns dx in the dtype of x, and dweight and dbias, which are checked
        with the precision of `dtype`.
    update : callable, optional
        ``update(running_mean, running_var, x, momentum)`` returns the new running_mean and running_var, in PyTorch's
        convention: momentum is the weight of the new batch, whose variance enters unbiased.
    jvp : callable, optional
        ``jvp(x_dot, x, weight, weight_dot, bias_dot, eps)`` returns y_dot in the dtype of x (E8).
    double_backward : callable, optional
        ``double_backward(v, dy, x, weight, v_weight, v_bias, eps)`` returns ddy and ddx in the dtype of x, and
        ddweight (E9). v, v_weight and v_bias are the gradients of a loss by dx, dweight and dbias.
    tolerance : float
        The largest allowed error of y, in ulp of `dtype` at the largest term of its formula; three times as much for
        dx, the sum of three terms, for y_dot, ddy and ddweight, and six times for ddx. A limit of 4 requires float64 or
        compensated sums.
    max_ratio : float
        The largest |mean|/std that is checked, from 1 to 10⁶. Use 1 for functions that only work near zero mean.
    dtype : str
        The dtype of x and dy: "float16", "bfloat16" (needs ml_dtypes), "float32" or "float64".
    accuracy : str
        "full": each result is within `tolerance`, up to `max_ratio`. "sums": larger errors are accepted if they are
        within the bounds of sums in the dtype of x, which grow with n and with |mean|/std. Other errors are not.
    where : bool
        True for functions that take a mask as their last argument: ``forward(x, weight, bias, eps, where)``, with where
        (N, S) of bool, True at the positions that belong to the batch. Masked batches are then checked too, with y at
        all positions, dy that is not 0 at masked ones, and NaN in the padding.
    xp : module, optional
        The namespace of the arrays that the functions take; NumPy if None.
    examples : int
        Number of random batches for each property, in addition to the named batches.
    report : callable, optional
        Called after each property with its name and its failure, or None.

    Returns
    -------
    Verdict
        Its text says that all properties hold, or how far, and the shape of x if it is not (N, C, S).

    Raises
    ------
    TypeError, ValueError
        An option has another type or value than stated above, or a function takes other arguments.
    BatchNormError
        An AssertionError that lists, for each cause, the smallest batch found, the error in ulp, and the properties
        that do not hold.
    AccuracyError
        A BatchNormError: the formula is right, but `accuracy` is "full", and that of the result is less.
    RuntimeError
        numpy.longdouble has less than 64 bits of mantissa here, which the oracle needs.
    ImportError
        dtype "bfloat16" without ml_dtypes.

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
    arraybn.testing.checking.BatchNormError: ... properties of a batch norm do not hold; 1 cause:
    <BLANKLINE>
    y is what the definition gives: off by ... ulp, 4 are allowed
    ...
      usual cause: the variance is divided by n − 1; in the forward it is biased, divided by n (E3)
    ...
    """
    check_options(tolerance, max_ratio, dtype, accuracy, examples, xp)
    functions: dict[str, Any] = {"forward": forward, "backward": backward, "update": update}
    functions |= {"jvp": jvp, "double_backward": double_backward}
    masks = as_flag("where", where)
    for role, function in functions.items():
        if function is not None or role == "forward":
            check_call(role, function, masks)
    options = numpy_dtype(dtype), xp, tolerance, max_ratio
    subject = Subject(forward, backward, update, *options, jvp, double_backward, masks)
    subject.find_forms()
    there = {"", *(role for role, function in functions.items() if function is not None)}
    known = (*PROPERTIES, *DERIVATIVES, *(WITH_MASK if masks else ()))
    properties = [prop for prop in known if {prop.needs, prop.also} <= there]
    failures = []
    for prop in properties:
        if failure := _failure(prop, subject, examples):
            failures.append(failure)
        if report is not None:
            report(prop.name, None if failure and failure.rough and accuracy == "sums" else failure)
    verdict = Verdict(len(properties), failures, dtype, _notes(subject))
    if verdict.faults:
        raise BatchNormError(verdict)
    if failures and accuracy == "full":
        raise AccuracyError(verdict)
    return verdict


def check_options(
    tolerance: float, max_ratio: float, dtype: str, accuracy: str, examples: int, xp: Namespace | None
) -> None:
    """Raise unless all options of `check_batch_norm` have values that it knows, on a platform with an oracle."""
    if dtype not in MANTISSA_BITS:
        raise ValueError(f"dtype: expected 'float16', 'bfloat16', 'float32' or 'float64'; got {dtype!r}")
    if accuracy not in ("full", "sums"):
        raise ValueError(f"accuracy: expected 'full' or 'sums'; got {accuracy!r}")
    if not as_number("tolerance", tolerance) > 0:
        raise ValueError(f"tolerance: expected a number > 0; got {tolerance!r}")
    if not 1 <= as_number("max_ratio", max_ratio) <= 1e6:
        raise ValueError(f"max_ratio: expected a number from 1 to 1e6; got {max_ratio!r}")
    as_integer("examples", examples, 0)
    if xp is not None and as_namespace(xp) is not as_namespace(np):
        as_dtype(dtype, as_namespace(xp))
    check_longdouble()


def _notes(subject: Subject) -> tuple[str, ...]:
    """Return a sentence for each shape of x that is not the usual one."""
    roles: dict[str, list[str]] = {}
    for role, form in subject.forms.items():
        roles.setdefault(form.name, []).append(role)
    how = {"(N, C)": "positions are further samples", "(N, C, H, W)": "W is 1"}
    return tuple(
        f"checked with x of shape {name} alone, which is what {' and '.join(names)} can take: {how[name]}"
        for name, names in roles.items()
        if name in how
    )


def _failure(prop: Property, subject: Subject, examples: int) -> Failure | None:
    """Return the first fault, on the smallest part of its batch; else the largest error of sums; else None."""
    limit, rough = prop.limit(subject), list[tuple[float, Batch]]()
    for batch in _batches(prop, subject, examples):
        found = prop.error(subject, batch)
        if not found.error <= limit:
            if not found.excess <= 1:
                return _fault(prop, subject, batch)
            rough.append((found.error, batch))
    if not rough:
        return None
    cause = cause_of(prop, subject)
    error, batch = max(rough, key=lambda one: one[0])
    if cause in (ONE_PASS, HALF):
        return _fault(prop, subject, batch)
    cause = cause if cause in OF_SUMS else ""  # another fault would break this property beyond rounding
    ratio = _ratio(subject.rounded(batch))
    return Failure(prop.name, batch, error, limit, "", cause, True, ratio, subject.form(prop.needs))


def _fault(prop: Property, subject: Subject, batch: Batch) -> Failure:
    """Return the failure on the smallest part of the batch that fails alike."""
    limit, first = prop.limit(subject), prop.error(subject, batch)

    def fails_alike(part: Batch) -> bool:
        """Return True if the property fails again, with a number as before, or with a text as before."""
        found = prop.error(subject, part)
        beyond = found.excess > 1 or first.excess <= 1
        return not found.error <= limit and beyond and bool(found.detail) == bool(first.detail)

    smallest = _smallest(batch, fails_alike) if prop.shrinks else batch
    found = prop.error(subject, smallest)
    return Failure(
        prop.name,
        smallest,
        found.error,
        limit,
        found.detail,
        "" if found.detail else cause_of(prop, subject),
        ratio=_ratio(subject.rounded(smallest)),
        form=subject.form(prop.needs),
        kind=_kind(prop, found),
    )


def _kind(prop: Property, found: Measured) -> str:
    """Return a text that failures of unknown but equal cause share: that of the result, without its numbers."""
    if found.detail:
        return re.sub(r"\(.*?\)|[\d.]+", "", found.detail)
    return str(prop.measure)


def _ratio(batch: Batch) -> float:
    """Return the largest |mean|/std of a channel; infinite for a constant one."""
    x = batch.x.astype(LONG)
    with np.errstate(all="ignore"):
        ratios = abs(x.mean((0, 2))) / x.std((0, 2))
    return float(np.max(np.where(np.ptp(x, (0, 2)) == 0, np.inf, ratios)))


def _batches(prop: Property, subject: Subject, examples: int) -> Iterator[Batch]:
    """Yield the named batches, then random batches."""
    lines = subject.form(prop.needs).name == "(N, C)" and prop.shrinks  # so that a small batch looks like the user's

    def kept(batch: Batch) -> Batch:
        if not lines:
            return batch
        where = None if batch.where is None else batch.where.reshape(-1, 1)
        return batch._replace(x=as_lines(batch.x)[..., None], dy=as_lines(batch.dy)[..., None], where=where)

    kinds = [kind for kind in prop.kinds if kind != "far" or subject.max_ratio >= 30]
    yield from map(kept, prop.batches(subject))
    if kinds:
        yield from map(kept, random_batches(examples, kinds, subject.max_ratio, subject.dtype.name))


def _smallest(batch: Batch, fails: Callable[[Batch], bool]) -> Batch:
    """Return a part of the batch that still fails, with fewer samples, positions, channels and digits."""
    varied = _varies(batch)  # the part must vary too: a constant batch may fail for another reason
    for smaller in (_fewer_samples, _fewer_positions, _fewer_channels, _fewer_digits):
        parts = (part for part in smaller(batch) if _number(part) > 1 and _varies(part) >= varied)
        batch = next((part for part in parts if fails(part)), batch)
    return batch


def _number(batch: Batch) -> int:
    return int(batch.x[:, 0].size if batch.where is None else np.count_nonzero(batch.where))


def _varies(batch: Batch) -> bool:
    return bool(np.ptp(batch.x.astype("f8")) > 0)


def _fewer_samples(batch: Batch) -> list[Batch]:
    return [_part(batch, slice(n), slice(None)) for n in FEW if n < len(batch.x)]


def _fewer_positions(batch: Batch) -> list[Batch]:
    return [_part(batch, slice(None), slice(s)) for s in FEW if s < batch.x.shape[2]]


def _part(batch: Batch, samples: slice, positions: slice) -> Batch:
    where = None if batch.where is None else batch.where[samples, positions]
    x, dy = batch.x[samples, :, positions], batch.dy[samples, :, positions]
    return batch._replace(x=x, dy=dy, where=where)


def _fewer_channels(batch: Batch) -> list[Batch]:
    c = batch.x.shape[1]
    some = [slice(i, i + count) for count in (1, 2) for i in range(c + 1 - count)]
    arrays = [(batch.x[:, at], batch.dy[:, at], batch.weight[at], batch.bias[at]) for at in some]
    return [Batch(*of_some, batch.eps, batch.where) for of_some in arrays]


def _fewer_digits(batch: Batch) -> list[Batch]:
    arrays = ("x", "dy", "weight", "bias")
    return [batch._replace(**{name: _rounded(getattr(batch, name), digits) for name in arrays}) for digits in FEW]


def _rounded(array: Any, digits: int) -> Any:
    """Return the values rounded to `digits` significant decimal digits, in the array's dtype."""
    values = [float(f"{value:.{digits - 1}e}") for value in array.astype("f8").ravel().tolist()]
    return np.asarray(values, array.dtype).reshape(array.shape)

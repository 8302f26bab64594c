"""The errors of every batch norm installed here, against exact results.

Units are those of the promises (``tests/test_accuracy.py``): ulp of float32, of mean at max(|mean|, 2⁻²⁰·std), of var
at var (at eps where var is 0), of y and dx at the largest term of their formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..bench.cases import EPS
from ..bench.contestants import Measured, Results
from ..bench.process import PeerError, Worker, first_line
from ..bench.truth import PROMISED
from ..testing import Batch, scenarios, worst
from ..testing.oracle import LONG, Exact

F32 = np.dtype("f4")
SHAPES = {"images": (8, 16, 49), "tall": (101, 2, 1), "large": (16, 3, 784)}
QUICK = (64, 3, 4)  # that of the outliers and constant channels: JAX compiles for each shape
RATIOS = {"ordinary": (0.0, 3.0), "1e2": (1e2,), "1e4": (1e4,), "1e6": (1e6,)}
GROUPS = (*RATIOS, "outliers", "constant")
CURVE = 10.0 ** np.arange(0, 6.1, 0.5)
QUANTITIES = ("mean", "var", "y", "dx")


class Scenario(NamedTuple):
    """A batch, and the group that its errors are shown in; '' if in the picture alone."""

    group: str
    ratio: float  # |mean|/std
    batch: Batch


def make_scenarios(quick: bool, curve: bool, seed: int) -> list[Scenario]:
    """Return the batches of the table, and those of the picture."""
    shapes = (QUICK,) if quick else tuple(SHAPES.values())
    found = [
        Scenario(group, ratio, scenarios.normal(shape, sign * ratio, 1.0, seed=[seed, index, int(ratio)]))
        for group, ratios in RATIOS.items()
        for ratio in (ratios[-1:] if quick else ratios)
        for index, (shape, sign) in enumerate(zip(shapes, (1, -1, 1), strict=False))
    ]
    if curve:  # the same batch each time, but for its mean
        found += [
            Scenario("", ratio, scenarios.normal(SHAPES["images"], ratio, 1.0, seed=[seed, 99])) for ratio in CURVE
        ]
    named = scenarios.named_batches()
    found += [
        Scenario("outliers", 0.0, named["outliers"]._replace(x=scenarios.outliers(seed))),
        Scenario("constant", math.inf, named["constant"]),
    ]
    return [one._replace(batch=_in_float32(one.batch)) for one in found]


def _in_float32(batch: Batch) -> Batch:
    x, dy, weight, bias = (array.astype(F32) for array in batch[:4])
    return Batch(x, dy, weight, bias, EPS)


@dataclass
class Row:
    """The largest error of a contestant in each quantity and group, in ulp."""

    contestant: Measured
    unusable: str = ""
    failed: str = ""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # quantity → group → ulp
    curve: dict[float, float] = field(default_factory=dict)  # |mean|/std → ulp of y
    broken: list[str] = field(default_factory=list)  # promises

    def worst(self, quantity: str) -> float | None:
        """Return the largest error of all groups; None if the contestant does not give the quantity."""
        return max(self.errors[quantity].values()) if quantity in self.errors else None

    @property
    def kept(self) -> bool | None:
        """True if the promise is kept; None if there is none, or the contestant cannot be started here."""
        if self.contestant.promise is None or self.unusable:
            return None
        return not (self.failed or self.broken)


def make_row(contestant: Measured, answer: Answer, asked: Sequence[Scenario], truths: Sequence[Exact]) -> Row:
    """Return the errors of a contestant's results."""
    row = Row(contestant, answer.unusable, answer.failed)
    for scenario, truth, results in zip(asked, truths, answer.results, strict=False):
        errors = _errors(results, truth, _units(scenario.batch, truth))
        if scenario.group:
            for quantity, error in errors.items():
                groups = row.errors.setdefault(quantity, dict.fromkeys(GROUPS, 0.0))
                groups[scenario.group] = max(groups[scenario.group], error)
        else:
            row.curve[scenario.ratio] = errors["y"]
        row.broken += _broken(contestant, scenario, truth, results, errors)
    return row


def _errors(results: Results, truth: Exact, units: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: worst(results[name], getattr(truth, name), units[name], F32) for name in QUANTITIES if name in results
    }


def _units(batch: Batch, truth: Exact) -> dict[str, Any]:
    """Return the sizes at which the promises take an ulp."""
    mean = np.maximum(abs(truth.mean), np.ldexp(np.sqrt(truth.var), -20))
    var = np.where(truth.var > 0, truth.var, batch.eps)
    return {"mean": mean, "var": var, "y": truth.y_scale, "dx": truth.dx_scale}


def _broken(
    contestant: Measured, scenario: Scenario, truth: Exact, results: Results, errors: Mapping[str, float]
) -> list[str]:
    """Return the promises that were not kept."""
    if contestant.promise is None:
        return []
    batch, limits = scenario.batch, PROMISED
    if contestant.promise == "float32 only":
        limits = bounds(batch.x.shape[0] * batch.x.shape[2])
        errors = _errors(results, truth, _units_of_bounds(batch, truth))
    where = scenario.group if not scenario.group[:1].isdigit() and scenario.group else f"|mean|/std {scenario.ratio:g}"
    found = [
        f"{name} {errors[name]:.3g} > {limit:.3g} ulp ({where})"
        for name, limit in limits.items()
        if not errors[name] <= limit
    ]
    if scenario.group == "constant" and not (results["y"] == batch.bias[:, None]).all():
        found.append("y of a constant channel is not exactly bias")
    return found


def bounds(n: int) -> dict[str, float]:
    """Return the bounds in ulp that float32 alone can promise for n values.

    They are L + 3, L + 6, 2·L + 10 and 4·L + 32 with L = log₂ n + 2. To first order in u = 2⁻²⁴ (an ulp is at least u
    of the value), and for L·u·|mean|/std ≤ 1: each value of a sum goes through at most L additions, so

    - mean, as the sum of two float32: (L + 2)·u·std from the sum of x − mean, 1 from putting both together;
    - var: L·u from the sum, 5·u from the two subtractions, the square and the division, 1 from the shift of the mean;
    - y: half of var's by rstd, (L + 2)·u·weight from the mean, 6 from the products, the sum and the low part of mean;
    - dx: (L + 1) and (L + 8) from the sums of dy and dy·xhat, and rstd, half of var's and 5 more, in each of 3 terms.

    No sum knows the terms that cancel in it, so the units are larger than the promises': mean at max(|mean|, std), y at
    max(|weight|·max(1, |xhat|), |bias|), dx at |weight|·rstd·max(|dy|, max(1, |xhat|)·rms(dy)).
    """
    depth = math.log2(n) + 2
    return {"mean": depth + 3, "var": depth + 6, "y": 2 * depth + 10, "dx": 4 * depth + 32}


def _units_of_bounds(batch: Batch, truth: Exact) -> dict[str, Any]:
    """Return the sizes at which `bounds` take an ulp."""
    weight, bias = abs(batch.weight.astype(LONG))[:, None], abs(batch.bias.astype(LONG))[:, None]
    rstd, at_least_1 = 1 / np.sqrt(truth.var + batch.eps)[:, None], np.maximum(1, abs(truth.xhat))
    rms = np.sqrt(np.mean(batch.dy.astype(LONG) ** 2, axis=(0, 2)))[:, None]
    return {
        **_units(batch, truth),
        "mean": np.maximum(abs(truth.mean), np.sqrt(truth.var)),
        "y": np.maximum(weight * at_least_1, bias),
        "dx": weight * rstd * np.maximum(abs(batch.dy), at_least_1 * rms),
    }


# ---- Asking them, each library in a process --------------------------------------------------------------------------


@dataclass
class Answer:
    """The results of a contestant for each batch, or why there are none."""

    results: list[Results] = field(default_factory=list)
    unusable: str = ""  # it cannot be started here
    failed: str = ""  # it raised, crashed or took too long


class Work:
    """The work of the process of a library between two questions."""

    def __init__(self, contestants: Sequence[Measured]) -> None:
        self.contestants = {one.name: one for one in contestants}
        self.calls: dict[str, Callable[[Batch], Results]] = {}

    def start(self) -> None:
        """Nothing is needed before the first build."""

    def build(self, name: str) -> str:
        """Make a contestant ready; return why it cannot be, or ''."""
        try:
            self.calls[name] = self.contestants[name].build()
        except Exception as error:
            return first_line(error)
        return ""

    def results(self, name: str, batch: Batch) -> Results:
        """Return what a contestant makes of a batch, in the shapes of the batch."""
        shapes = {"mean": batch.weight.shape, "var": batch.weight.shape, "y": batch.x.shape, "dx": batch.x.shape}
        with np.errstate(all="ignore"):
            found = self.calls[name](batch)
        return {key: np.asarray(value).reshape(shapes[key]) for key, value in found.items()}


def ask(chosen: Sequence[Measured], batches: Sequence[Batch], progress: Callable[[], object]) -> list[Answer]:
    """Return what each of the chosen makes of the batches; all libraries work at the same time.

    `progress` is called for each batch that a contestant is done with, from several threads.
    """
    groups: dict[str, list[Measured]] = {}
    for one in chosen:
        groups.setdefault(one.library, []).append(one)
    found: dict[str, Answer] = {}
    with ExitStack() as stack, ThreadPoolExecutor(len(groups)) as pool:
        work = []
        for group in groups.values():
            worker = Worker(partial(Work, group), {"TF_CPP_MIN_LOG_LEVEL": "3"})
            stack.callback(worker.stop)
            work.append(pool.submit(_ask_library, worker, [one.name for one in group], batches, progress))
        for future in work:
            found |= future.result()
    return [found[one.name] for one in chosen]


def _ask_library(
    worker: Worker, names: Sequence[str], batches: Sequence[Batch], progress: Callable[[], object]
) -> dict[str, Answer]:
    """Return the answers from one process, by name; a process that ends has failed in all of them."""
    answers = {name: Answer() for name in names}
    with suppress(PeerError):
        worker.answer()
    for name, answer in answers.items():
        try:
            answer.unusable = worker.ask("build", name=name)
            for batch in batches if not answer.unusable else ():
                answer.results.append(worker.ask("results", name=name, batch=batch))
                progress()
        except PeerError as error:
            answer.failed = str(error)
    for answer in answers.values():
        answer.failed = answer.failed or worker.failed
        answer.results = [] if answer.failed else answer.results
    return answers

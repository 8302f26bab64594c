"""``python -m arraybn bench --ladder``: how the speed was reached, one idea a step."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ..functional import batch_norm, batch_norm_backward
from ..kernels import threads as _threads
from ._bench_cases import Case, Problem
from ._bench_clock import Result
from ._bench_contestants import Call, Library, Prepared, channels_first, copying, numpy_calls

CASE = Case((32, 64, 112, 112), whats=("forward", "backward"))
LADDER = Library("ladder", "ladder", ("numpy",), "numpy", f"{__name__}:ladder_calls", 6)
COPIES = {True: "numpy.copyto, one thread", False: "numpy.copyto, all threads"}


class Traffic(NamedTuple):
    """What goes from and to memory, in units of the bytes of x, where x is much larger than the caches.

    `cleared` is what the system writes for us: it hands out no page of a new array that it has not set to zero. What a
    store first reads because its cache line is not there is not counted; some stores do without.
    """

    reads: float
    writes: float
    cleared: float
    reason: str

    @property
    def total(self) -> float:
        """All of it."""
        return self.reads + self.writes + self.cleared


class Step(NamedTuple):
    """A row of the ladder; x, y and dx are float32, and the reference works in float64, twice as large."""

    row: str
    alone: bool  # on one thread
    forward: Traffic
    backward: Traffic


# NumPy makes a new array for each operation, unless both operands are alike and one of them is a temporary that nobody
# else can see. `_sum` of the reference adds the halves of a float64 array, then the halves of those: r4 w2, all new.
STEPS = (
    Step(
        "plain NumPy formulas",
        True,
        Traffic(9, 6, 5, "mean r1; var: its mean r1, x−mean r1 w1, squared r1 w1, summed r1; y: 4 maps of r1 w1"),
        Traffic(9, 5, 4, "dbias r1; dweight: dy·xhat r2 w1, summed r1; dx: 3 maps of r1 w1, a difference r2 w1"),
    ),
    Step(
        "arraybn reference",
        True,
        Traffic(
            28, 23, 23, "in float64. moments: to it r1 w2, 3 sums r4 w2, 3 maps r2 w2; affine: r1 w2, 3 × r2 w2, r2 w1"
        ),
        Traffic(32, 27, 23, "in float64. dots: to it 2 × r1 w2, 2 maps r6 w4, 2 sums r4 w2; affine2: r14 w14, r2 w1"),
    ),
    Step(
        "compiled sweeps, one thread",
        True,
        Traffic(2, 1, 1, "moments r1; affine r1 w1 into a new array"),
        Traffic(4, 1, 1, "dots r2; affine2 r2 w1 into a new array"),
    ),
    Step(
        "compiled sweeps, all threads",
        False,
        Traffic(2, 1, 1, "the same bytes, by more cores"),
        Traffic(4, 1, 1, "the same bytes, by more cores"),
    ),
    Step(
        "both sweeps group by group",
        False,
        Traffic(1, 1, 1, "the second sweep finds the group of channels in cache"),
        Traffic(2, 1, 1, "the second sweep finds the group of channels in cache"),
    ),
    Step(
        "into an array that exists (out=)",
        False,
        Traffic(1, 1, 0, "no new page"),
        Traffic(2, 1, 0, "no new page"),
    ),
)


def ladder_calls(problem: Problem) -> Prepared:
    """Every step, and the copies that predict it."""
    case, x, dy, weight, bias = problem[:5]
    options: Any = {"eps": problem.eps, "channel_axis": case.channel_axis}
    out = np.zeros_like(x)

    def calls(kernels: Any = None, target: Any = None) -> dict[str, Call]:
        _, saved = batch_norm(x, weight, bias, kernels=kernels, **options)
        return {
            "forward": lambda: batch_norm(x, weight, bias, kernels=kernels, out=target, **options)[0],
            "backward": lambda: batch_norm_backward(dy, saved, out=target),
        }

    def built(row: str) -> dict[str, Call]:
        if row == STEPS[0].row:
            formulas = numpy_calls(problem).rows["NumPy formulas"]
            assert not isinstance(formulas, str)
            return {what: formulas[what] for what in ("forward", "backward")}
        if row == STEPS[1].row:
            return calls("reference")
        if row == STEPS[2].row:
            return {what: _alone(call) for what, call in calls(_sweeps_only()).items()}
        if row == STEPS[3].row:
            return calls(_sweeps_only())
        return calls() if row == STEPS[4].row else calls(target=out)

    copies: dict[str, dict[str, Call] | str] = {
        COPIES[alone]: {"copy": copying(x, out, 1 if alone else _threads.get_num_threads())} for alone in (True, False)
    }
    return Prepared(copies | {step.row: built(step.row) for step in STEPS}, channels_first(case))


def _sweeps_only() -> Any:
    """The compiled kernels, but without the driver that takes a group of channels through two sweeps."""
    cpu = importlib.import_module("arraybn.kernels.cpu")
    return SimpleNamespace(moments=cpu.moments, dots=cpu.dots, affine=cpu.affine, affine2=cpu.affine2)


def _alone(call: Call) -> Call:
    """The call on one thread."""

    def alone() -> Any:
        before = _threads.get_num_threads()
        _threads.set_num_threads(1)
        try:
            return call()
        finally:
            _threads.set_num_threads(before)

    return alone


NOTE = (
    "predicted: these bytes at the speed of numpy.copyto by as many threads (NumPy and the reference use one). Where"
    " much more is measured than predicted, it is arithmetic that takes the time, not memory."
)


class Rung(NamedTuple):
    """A step in one direction, in figures."""

    row: str
    what: str
    moved: float  # bytes
    predicted: float | None  # seconds, at the speed of the copy by as many threads
    measured: float | None
    failed: str
    reason: str


def rungs(result: Result) -> list[Rung]:
    """All of them, forward first."""
    found = []
    copies = {alone: result.median(row, "copy") for alone, row in COPIES.items()}
    failures = {cell.row: cell.failed for cell in result.cells if cell.failed}
    everything = failures.get(LADDER.title, result.skipped)
    for what in CASE.whats:
        for step in STEPS:
            traffic = step.forward if what == "forward" else step.backward
            copy = copies[step.alone]
            predicted = None if copy is None else traffic.total / 2 * copy
            failed = failures.get(step.row, everything)
            measured = result.median(step.row, what)
            moved = traffic.total * result.case.nbytes
            found.append(Rung(step.row, what, moved, predicted, measured, failed, traffic.reason))
    return found


def table(results: Sequence[Result]) -> str:
    """What each step moves, what that predicts, and what was measured."""
    lines = []
    for result in results:
        lines += [f"\nThe ladder: {result.case}, {result.case.nbytes / 1e6:.1f} MB; bytes in units of those of x"]
        for row in COPIES.values():
            if (median := result.median(row, "copy")) is not None:
                lines.append(f"  {row}: {median * 1e3:.2f} ms, {result.case.moved('copy') / median / 1e9:.1f} GB/s")
        for rung in rungs(result):
            if rung.row == STEPS[0].row:
                title = f"  {rung.what}"
                lines += ["", f"{title:<38}{'bytes':>6}{'predicted':>13}{'measured':>12}"]
            figures = f"{rung.moved / result.case.nbytes:>6g}{_ms(rung.predicted):>13}{_ms(rung.measured):>12}"
            lines.append(f"    {rung.row:<34}{figures}   {rung.failed}".rstrip())
    return "\n".join([*lines, "", *_reasons(), "", textwrap.fill(NOTE, 110)])


def _reasons() -> list[str]:
    """Where the bytes come from."""
    lines = ["Bytes, as reads + writes + pages of new arrays that the system sets to zero (r1: x is read once):"]
    for what in CASE.whats:
        for step in STEPS:
            traffic = step.forward if what == "forward" else step.backward
            sums = f"{traffic.reads:g} + {traffic.writes:g} + {traffic.cleared:g}"
            lines.append(
                textwrap.fill(
                    f"{what}, {step.row}: {sums}: {traffic.reason}", 110, initial_indent="  ", subsequent_indent="    "
                )
            )
    return lines


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.1f} ms"

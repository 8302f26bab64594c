"""``python -m arraybn bench --ladder``: how the speed was reached, one idea a step."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ..functional import batch_norm, batch_norm_backward
from ..kernels.results import set_memory_limit
from ..kernels.threads import get_num_threads, set_num_threads
from .cases import Case
from .contestants import Call, Calls, Contestant, Library, formulas, ours
from .device import HostDevice
from .output import Column, entries, headings, paragraphs
from .timing import Result
from .truth import Problem

COPIES = {True: "numpy.copyto, one thread", False: "numpy.copyto, all threads"}


class Traffic(NamedTuple):
    """Memory traffic in units of the bytes of x, where x is much larger than the caches.

    `cleared` is written by the system: it hands out no page of a new array that it has not set to zero. The read of a
    cache line that a store needs is not counted; some stores do without.
    """

    reads: float
    writes: float
    cleared: float
    reason: str

    @property
    def total(self) -> float:
        return self.reads + self.writes + self.cleared


class Step(NamedTuple):
    """A row of the ladder; x, y and dx are float32, and the reference works in float64, twice as large."""

    row: str
    alone: bool  # on one thread
    forward: Traffic
    backward: Traffic


# NumPy makes a new array for each operation, unless both operands are alike and one of them is a temporary that nobody
# else can see. `_sum` of the reference adds the halves of a float64 array, then the halves of those: r4 w2, all new.
PLAIN = (
    Traffic(9, 6, 5, "mean r1; var: its mean r1, x−mean r1 w1, squared r1 w1, summed r1; y: 4 maps of r1 w1"),
    Traffic(9, 5, 4, "dbias r1; dweight: dy·xhat r2 w1, summed r1; dx: 3 maps of r1 w1, a difference r2 w1"),
)
SUMS = "in float64. moments: to it r1 w2, 3 sums r4 w2, 3 maps r2 w2; affine: r1 w2, 3 × r2 w2, r2 w1"
DOTS = "in float64. dots: to it 2 × r1 w2, 2 maps r6 w4, 2 sums r4 w2; affine2: r14 w14, r2 w1"
MORE, CACHED = "the same bytes, by more cores", "the second sweep finds the group of channels in cache"
FORWARD, BACKWARD = "moments r1; affine r1 w1 into a new array", "dots r2; affine2 r2 w1 into a new array"
STEPS = (
    Step("plain NumPy formulas", True, *PLAIN),
    Step("arraybn reference", True, Traffic(28, 23, 23, SUMS), Traffic(32, 27, 23, DOTS)),
    Step("compiled sweeps, one thread", True, Traffic(2, 1, 1, FORWARD), Traffic(4, 1, 1, BACKWARD)),
    Step("compiled sweeps, all threads", False, Traffic(2, 1, 1, MORE), Traffic(4, 1, 1, MORE)),
    Step("both sweeps group by group", False, Traffic(1, 1, 1, CACHED), Traffic(2, 1, 1, CACHED)),
    Step("in memory of results that are gone", False, Traffic(1, 1, 0, "no new page"), Traffic(2, 1, 0, "no new page")),
    Step("into an array that exists (out=)", False, Traffic(1, 1, 0, "the same"), Traffic(2, 1, 0, "the same")),
)


def calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the calls of a step, or a copy that predicts steps."""
    case, x, _, out, weight, bias = problem[:6]
    if name in COPIES.values():
        return Calls({"copy": ours.copying(x, out, 1 if name == COPIES[True] else get_num_threads())}, np.asarray)
    if name == STEPS[0].row:
        return formulas.host_calls(device, problem, name)
    kernels: Any = {STEPS[1].row: "reference", STEPS[2].row: sweeps_only(), STEPS[3].row: sweeps_only()}.get(name)
    target = out if name == STEPS[6].row else None
    options: Any = {"eps": problem.eps, "channel_axis": case.channel_axis, "kernels": kernels}
    _, saved = batch_norm(x, weight, bias, **options)
    found: dict[str, Call] = {
        "forward": lambda: batch_norm(x, weight, bias, out=target, **options)[0],
        "backward": lambda: batch_norm_backward(problem.dy, saved, out=target),
    }
    if name == STEPS[2].row:
        found = {operation: on_one_thread(call) for operation, call in found.items()}
    if name != STEPS[5].row:
        found = {operation: in_new_memory(call) for operation, call in found.items()}
    return Calls(found, np.asarray)


def sweeps_only() -> Any:
    """Return the compiled kernels without the driver that takes a group of channels through two sweeps."""
    cpu = importlib.import_module("arraybn.kernels.cpu")
    return SimpleNamespace(moments=cpu.moments, dots=cpu.dots, affine=cpu.affine, affine2=cpu.affine2)


def on_one_thread(call: Call) -> Call:
    def alone() -> Any:
        before = get_num_threads()
        set_num_threads(1)
        try:
            return call()
        finally:
            set_num_threads(before)

    return alone


def in_new_memory(call: Call) -> Call:
    def fresh() -> Any:
        before = set_memory_limit(0)
        try:
            return call()
        finally:
            set_memory_limit(before)

    return fresh


def _rows() -> Iterator[Contestant]:
    for row in COPIES.values():
        yield Contestant(row, row, "ladder", calls, operations=("copy",))
    for step in STEPS:
        library = "other" if step is STEPS[0] else "arraybn"  # whose limits hold
        yield Contestant(step.row, step.row, library, calls, operations=CASE.operations)


CASE = Case((32, 64, 112, 112), operations=("forward", "backward"))
LADDER = Library("ladder", "ladder", ("numpy",), "numpy", 6, tuple(_rows()))

NOTE = (
    "predicted: these bytes at the speed of numpy.copyto by as many threads (NumPy and the reference use one). Where"
    " much more is measured than predicted, it is arithmetic that takes the time, not memory."
)


def rungs(result: Result) -> list[dict[str, Any]]:
    """Return the figures of all steps, forward first: bytes, and seconds."""
    return [_rung(result, step, operation) for operation in CASE.operations for step in STEPS]


def _rung(result: Result, step: Step, operation: str) -> dict[str, Any]:
    traffic, copy = getattr(step, operation), result.median(COPIES[step.alone], "copy")
    failures = [cell.failed for cell in result.cells if cell.row == step.row and cell.failed]
    return {
        "row": step.row,
        "what": operation,
        "moved": traffic.total * result.case.nbytes,
        "predicted": None if copy is None else traffic.total / 2 * copy,  # a copy reads x and writes as much
        "measured": result.median(step.row, operation),
        "failed": failures[-1] if failures else result.skipped,
        "reason": traffic.reason,
    }


COLUMNS: tuple[Column, ...] = (
    ("bytes", 6, lambda rung: f"{rung['moved'] / CASE.nbytes:g}"),
    ("predicted", 13, lambda rung: _ms(rung["predicted"])),
    ("measured", 12, lambda rung: _ms(rung["measured"])),
)


def table(results: Sequence[Result]) -> str:
    """Return the bytes that each step moves, the time that they predict, and the time that was measured."""
    lines = []
    for result in results:
        lines += [f"\nThe ladder: {result.case}, {result.case.nbytes / 1e6:.1f} MB; bytes in units of those of x"]
        for row in COPIES.values():
            if (median := result.median(row, "copy")) is not None:
                lines.append(f"  {row}: {median * 1e3:.2f} ms, {result.case.moved('copy') / median / 1e9:.1f} GB/s")
        for rung in rungs(result):
            if rung["row"] == STEPS[0].row:
                lines += ["", f"{'  ' + rung['what']:<38}{headings(COLUMNS)}"]
            lines.append(f"    {rung['row']:<34}{entries(COLUMNS, rung)}   {rung['failed']}".rstrip())
    lines += ["", "Bytes, as reads + writes + pages of new arrays that the system sets to zero (r1: x is read once):"]
    for operation in CASE.operations:
        for step in STEPS:
            one = getattr(step, operation)
            text = f"{operation}, {step.row}: {one.reads:g} + {one.writes:g} + {one.cleared:g}: {one.reason}"
            lines.append(textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="    "))
    return "\n".join([*lines, paragraphs(NOTE)])


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.1f} ms"

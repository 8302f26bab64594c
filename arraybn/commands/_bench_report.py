"""What ``python -m arraybn bench`` shows of its results: the lines at the top, the blocks of the table, the JSON."""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from ._bench_cases import SMALL_WHATS
from ._bench_check import OURS, limits
from ._bench_clock import COPYTO, FEWEST, Cell, Result
from ._check_target import RefusedError

OUR_ROW = "arraybn"
TITLES = {
    "forward": "forward (training)",
    "backward": "backward",
    "eval": "forward (evaluation)",
    "layer": "layer(x)",
    "step": "layer(x), layer.backward(dy)",
}


# ---- A run of the command --------------------------------------------------------------------------------------------


class Run(Protocol):
    """A run that can be interrupted, and still says what it has measured."""

    interrupted: bool

    def measure(self) -> None:
        """Do the work."""

    def finish(self) -> None:
        """Print what is not yet printed, write the files."""

    def wrong(self) -> bool:
        """Whether anything of arraybn has failed."""


def carry_out(bench: Run) -> int:
    """Measure, print, write what was asked for; 1 if arraybn is wrong, 130 after Ctrl-C."""
    try:
        bench.measure()
    except KeyboardInterrupt:
        bench.interrupted = True
    try:
        bench.finish()
    except OSError as error:  # a full disk, a folder that went away
        if isinstance(error, BrokenPipeError):
            raise
        raise RefusedError(f"cannot write: {error}") from error
    if bench.interrupted:
        print("interrupted; the figures are of what was measured before", file=sys.stderr)
        return 130
    return int(bench.wrong())


# ---- The figures -----------------------------------------------------------------------------------------------------


def figures(result: Result, cell: Cell) -> dict[str, Any]:
    """The samples of a cell and what follows from them; None where it cannot be said."""
    q1, median, q3 = cell.quartiles if cell.seconds else (None, None, None)
    ours, copy = result.median(OUR_ROW, cell.what), result.median(COPYTO, "copy")
    moved = result.case.moved(cell.what)
    return {
        "library": cell.library,
        "row": cell.row,
        "what": cell.what,
        "calls": cell.calls,
        "seconds": cell.seconds,
        "median": median,
        "q1": q1,
        "q3": q3,
        "ratio": _quotient(median, ours),
        "bytes": moved,
        "gb_per_s": _quotient(moved / 1e9, median),
        "copy_fraction": _quotient(moved / result.case.moved("copy") * copy if copy else None, median),
        "copy_ratio": _quotient(median, copy),
        "failed": cell.failed or None,
    }


def _quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def as_json(result: Result) -> dict[str, Any]:
    """A case and its cells."""
    cells = [figures(result, cell) for cell in result.cells]
    return {**result.case.as_json(), "bytes_of_x": result.case.nbytes, "skipped": result.skipped or None, "rows": cells}


# ---- The blocks ------------------------------------------------------------------------------------------------------


def block(result: Result, threads: int) -> str:
    """One case: for each thing that is done a heading, and under it the rows."""
    case = result.case
    lines = ["", f"{case}, {case.nbytes / 1e6:.1f} MB" if case.nbytes >= 1e5 else str(case)]
    if result.skipped:
        return "\n".join([*lines, f"  {result.skipped}"])
    small = set(case.whats) <= set(SMALL_WHATS)
    copy = result.cell(COPYTO, "copy")
    if copy is not None and copy.seconds and not small:
        speed = case.moved("copy") / copy.quartiles[1] / 1e9
        lines.append(
            f"  {COPYTO} of x, {_threads(threads)}: {_ms(copy.quartiles[1])} ms ({_spread(copy)}), {speed:.1f} GB/s"
        )
    for what in case.whats:
        shown = [cell for cell in result.cells if cell.what == what]
        lines += ["", _heading(TITLES[what], small), *(_line(result, cell, small) for cell in shown)]
    return "\n".join(lines)


def _heading(title: str, small: bool) -> str:
    columns = f"{'µs' if small else 'ms':>10}{'quartiles':>16}{'× arraybn':>11}"
    return f"  {title:<30}{columns}" + ("" if small else f"{'GB/s':>8}{'of copy':>9}{'× copyto':>10}")


def _line(result: Result, cell: Cell, small: bool) -> str:
    name = f"    {cell.row:<28}"
    if not cell.seconds:
        return f"{name}   {cell.failed or '–'}"
    found, scale = figures(result, cell), 1e6 if small else 1e3
    text = f"{_ms(found['median'], scale):>10}{_spread(cell, scale):>16}{_plain(found['ratio']):>11}"
    if not small:
        fraction = "–" if found["copy_fraction"] is None else f"{found['copy_fraction']:.0%}"
        text += f"{found['gb_per_s']:>8.1f}{fraction:>9}{_plain(found['copy_ratio']):>10}"
    few = f"  {len(cell.seconds)} turns" if len(cell.seconds) < FEWEST else ""
    return f"{name}{text}{few}" + (f"  then {cell.failed}" if cell.failed else "")


def _ms(seconds: float, scale: float = 1e3) -> str:
    """In three digits or so."""
    value = seconds * scale
    return f"{value:.3f}" if value < 0.9995 else f"{value:.2f}" if value < 99.95 else f"{value:.0f}"


def _spread(cell: Cell, scale: float = 1e3) -> str:
    q1, _, q3 = cell.quartiles
    return f"{_ms(q1, scale)}–{_ms(q3, scale)}"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 99.5 else f"{value:.0f}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


# ---- Above and below the table ---------------------------------------------------------------------------------------


def head(machine: Mapping[str, Any], versions: Mapping[str, str], limit: Cell | None, nbytes: int, command: str) -> str:
    """The machine, the versions, the speed of a copy, and how to get the same table."""
    cores = f"{machine['cores']} core{'s' if machine['cores'] != 1 else ''}"
    lines = [
        f"{machine['processor']}, {cores}, arraybn uses {_threads(machine['threads'])}; {machine['system']}",
        *textwrap.wrap(", ".join(f"{name} {version}".strip() for name, version in versions.items()), 110),
    ]
    if limit is None or not limit.seconds:
        lines.append(f"copy limit: not measured{f': {limit.failed}' if limit and limit.failed else ''}")
    else:
        median = limit.quartiles[1]
        by = f"{_threads(machine['threads'])}, {nbytes / 1e6:.1f} MB: {_ms(median)} ms ({_spread(limit)})"
        lines.append(f"copy limit: {2 * nbytes / median / 1e9:.1f} GB/s ({COPYTO} by {by})")
    return "\n".join([*lines, f"again: {command}"])


def command(arguments: argparse.Namespace) -> str:
    """The command line that asks for the same."""
    words = ["python", "-m", "arraybn", "bench"] + (["--device", "cuda"] if arguments.device == "cuda" else [])
    for name in ("quick", "ladder"):
        words += [f"--{name}"] if getattr(arguments, name) else []
    if arguments.shapes is not None:
        words += ["--shapes", *(",".join(map(str, shape)) for shape in arguments.shapes)]
    for name in ("layout", "dtype", "what", "peers"):
        if (values := getattr(arguments, name)) is not None:
            words += [f"--{name}", *values]
    for name in ("repeats", "growth", "json", "plot"):
        if (value := getattr(arguments, name)) is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def notes(small: bool, dtypes: Sequence[str], checked: int) -> str:
    """What the columns mean, and what was checked before."""
    ours = " and ".join(f"{OURS[dtype][0]:g} (y) and {OURS[dtype][1]:g} (gradients) in {dtype}" for dtype in dtypes)
    batches = "a small batch" if checked == 1 else f"{checked} small batches"
    texts = [
        f"Checked first, on {batches}, against exact and 80-bit results: arraybn may be off by {ours}, all others by"
        f" {limits(dtypes[0], False)[0]:g}, in ulp of the largest term. Who is wrong is not timed.",
        "Medians over turns taken one after another, each library in a process of its own. × arraybn: the time divided"
        " by that of arraybn into a new array, as the others work; out=: into an array that is there already.",
    ]
    if not small:
        texts.append(
            "GB/s: the bytes that must be moved (forward: reads x, writes y; backward: reads dy and x, writes dx) by"
            f" the time. of copy: that, by the GB/s of {COPYTO} of the same x; × copyto: the time by that of this copy."
        )
    return "\n".join(["", *(textwrap.fill(text, 110) for text in texts)])


def company(others: float | None, cores: int) -> str:
    """A warning, if other programs worked meanwhile; otherwise ''."""
    if others is None or others < 0.1 * cores:
        return ""
    text = f"NOT ALONE: meanwhile other programs kept {others:.1f} of {cores} cores busy, so these figures are"
    return "\n" + textwrap.fill(f"{text} worse than need be, most of all those of libraries that use every core.", 110)


def progress_bar(total: int, unit: str = "round") -> AbstractContextManager[Any]:
    """tqdm's, or None where it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext()
    bar: AbstractContextManager[Any] = tqdm(total=total, unit=unit, leave=False, disable=None)
    return bar

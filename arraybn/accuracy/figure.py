"""The accuracy of every batch norm: the table, the JSON, and the picture of error against |mean|/std."""

from __future__ import annotations

import argparse
import itertools
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._plotting import FAMILIES, GREY, INK, Axes, draw_picture
from .._version import __version__
from ..bench import machine
from ..bench.contestants import Measured
from ..bench.output import Column, entries, headings
from ..bench.truth import PROMISED
from .errors import GROUPS, QUANTITIES, Row


def table(rows: Sequence[Row], count: int, *, by_scenario: bool) -> str:
    """Return the largest errors over all scenarios, or for each quantity those of each group."""
    if not by_scenario:
        lines = [f"Worst error over {count} batches, in ulp of float32", ""]
        return "\n".join([*lines, *_section(rows, "", [_column(name, name) for name in QUANTITIES], promises=True)])
    lines = ["Worst error in each group of batches, in ulp of float32 (ratio: |mean|/std)"]
    for name in QUANTITIES:
        columns = [_column(f"ratio {group}" if group[0].isdigit() else group, name, group) for group in GROUPS]
        lines += ["", *_section(rows, name, columns, promises=False)]
    return "\n".join(lines)


def _column(heading: str, quantity: str, group: str | None = None) -> Column:
    def text(row: Row) -> str:
        return _figure(row.worst(quantity) if group is None else row.errors.get(quantity, {}).get(group))

    return heading, 11, text


def _section(rows: Sequence[Row], title: str, columns: Sequence[Column], *, promises: bool) -> list[str]:
    """Return a heading, and under each family its rows."""
    width = max(len(row.contestant.name) for row in rows) + 4
    lines, family = [f"{title:<{width}}{headings(columns)}"], ""
    for row in rows:
        if row.contestant.family != family:
            family = row.contestant.family
            lines.append(f"{family} {version(row.contestant)}".rstrip())
        text = entries(columns, row)
        if row.unusable or row.failed:
            text = f"   cannot be used: {row.unusable}" if row.unusable else f"   failed: {row.failed}"
        if promises and row.kept is not None:
            text += "  kept" if row.kept else "  BROKEN"
        lines.append(f"  {row.contestant.name:<{width - 2}}{text}")
    return lines


def _figure(error: float | None) -> str:
    """Return an error in two or three digits."""
    if error is None:
        return "–"
    if not math.isfinite(error):
        return "no number"
    if error < 9.995:
        return f"{error:.2f}"
    return f"{error:.0f}" if error < 9999.5 else f"{error:.1e}".replace("e+0", "e").replace("e+", "e")


def version(contestant: Measured) -> str:
    return __version__ if contestant.family == "arraybn" else machine.version(contestant.library)


def notes(
    rows: Sequence[Row], bounds: Callable[[int], dict[str, float]], n: int, missing: Mapping[str, Sequence[str]]
) -> str:
    """Return what the figures mean, which promises are broken, and what is not installed."""
    lines = [
        "",
        "Ulp of mean: at max(|mean|, 2⁻²⁰·std); of var: at var, at eps where it is 0; of y and dx: at the largest term",
        "of their formulas. An error of 2²⁴ = 1.7e7 ulp leaves no digit. –: not given.",
        f"arraybn promises {_limits(PROMISED)}, and exactly bias for a constant channel.",
    ]
    if any(row.contestant.promise == "float32 only" for row in rows):
        lines += [
            "Without float64: mean ≤ L+3, var ≤ L+6, y ≤ 2·L+10, dx ≤ 4·L+32 ulp, L = log₂ n + 2, std among the terms;",
            f"for n = {n}: {_limits(bounds(n))} (units and derivation: arraybn.accuracy.errors.bounds).",
        ]
    for row in rows:
        broken = [*row.broken[:5], *([f"and {len(row.broken) - 5} more"] if len(row.broken) > 5 else [])]
        lines += [f"BROKEN by {row.contestant.name}: {'; '.join(broken)}"] if broken else []
    if missing:
        lines += ["", "Not installed, left out:"]
        lines += [f"  {', '.join(needs)}: pip install {pip}" for pip, needs in missing.items()]
    return "\n".join(lines)


def _limits(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name} ≤ {limit:.3g}" for name, limit in limits.items())


def as_json(
    rows: Sequence[Row], missing: Mapping[str, Sequence[str]], arguments: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """Return what --json writes; a quantity that a contestant does not give is left out, no number is null."""
    return {
        "arraybn": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seed": arguments.seed,
        "quick": arguments.quick,
        "seconds": round(seconds, 1),
        "unit": "ulp of float32",
        "groups": list(GROUPS),
        "rows": [
            {
                "family": row.contestant.family,
                "name": row.contestant.name,
                "version": version(row.contestant),
                "worst": {name: _number(row.worst(name)) for name in row.errors},
                "errors": {name: {g: _number(e) for g, e in groups.items()} for name, groups in row.errors.items()},
                "y_by_ratio": [[ratio, _number(error)] for ratio, error in row.curve.items()],
                "promise": row.contestant.promise,
                "kept": row.kept,
                "broken": row.broken,
                "failed": row.failed or row.unusable or None,
            }
            for row in rows
        ],
        "missing": [f"pip install {pip}" for pip in missing],
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


MARKS = "os^vDPX*<>hp"
LOST, LOW, TOP = 2.0**24, 0.4, 1e10  # ulp
FEW = 6  # lines whose names fit below the axes


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the error of y against |mean|/std into a PNG file, which is complete or not there at all."""
    drawn = [row for row in rows if _finite(row)[1]]
    top = min(TOP, max((10 * max(_finite(row)[1]) for row in drawn), default=TOP))  # no empty half above
    drawn.sort(key=lambda row: -max(_finite(row)[1]))  # highest first, as in the picture

    def fill(figure: Any) -> None:
        axes = figure.subplots()
        _set_up(axes, top)
        for row, mark in zip(drawn, itertools.cycle(MARKS), strict=False):
            _draw_line(axes, row, mark)
        if len(drawn) <= FEW:
            figure.legend(loc="outside lower left", ncols=2, frameon=False)
        else:
            figure.legend(loc="outside right center", frameon=False)

    subtitle = "Largest error of y, in ulp of float32, when the mean of the data lies further and further from zero"
    draw_picture(path, (11.5, 7.0), "How many digits does a batch norm have left?", subtitle, fill)


def _set_up(axes: Axes, top: float) -> None:
    axes.set(
        xscale="log", yscale="log", xlim=(1, 1.1e6), ylim=(LOW, top), xlabel="|mean|/std of the data (std 1, float32)"
    )
    axes.axhspan(min(LOST, top), top, color="#f3f3f3", linewidth=0, zorder=0)

    def write(x: float, y: float, text: str, align: str) -> None:
        if y * 2 * len(text.splitlines()) < top:  # else the text would be above the axes
            axes.text(x, y, text, color=GREY, fontsize=8.5, va="bottom", ha=align)

    write(1.15, LOST * 1.3, "no digit is right", "left")
    for digits, x, align in ((2, 1.15, "left"), (4, 8.7e5, "right"), (6, 8.7e5, "right")):
        axes.axhline(LOST / 10**digits, color="#e0e0e0", linewidth=0.8, zorder=0)
        write(x, LOST / 10**digits * 1.15, f"{digits} digits are right", align)
    write(9, 2e4, "variance as E[x²] − E[x]²:\nthe error grows with the square", "center")
    write(3e4, 5e3, "mean rounded to float32:\nthe error grows in proportion", "center")


def _finite(row: Row) -> tuple[list[float], list[float]]:
    """Return the ratios, and the errors at them that are numbers."""
    ratios = [ratio for ratio, error in row.curve.items() if math.isfinite(error)]
    return ratios, [row.curve[ratio] for ratio in ratios]


def _draw_line(axes: Axes, row: Row, mark: str) -> None:
    """Draw a line up to the last number."""
    family, (ratios, errors) = row.contestant.family, _finite(row)
    style: Any = {"color": FAMILIES.get(family, INK), "zorder": 3 if family == "arraybn" else 2}
    label, errors = f"{family}: {row.contestant.name}", np.clip(errors, LOW, TOP).tolist()
    if len(ratios) < len(row.curve):
        label += "\n(to the cross, then no number at all)"
        axes.plot(ratios[-1], errors[-1], "x", markersize=13, markeredgewidth=2, **style)
    width = 2.2 if family == "arraybn" else 1.6
    axes.plot(ratios, errors, marker=mark, markersize=6, linewidth=width, clip_on=False, label=label, **style)

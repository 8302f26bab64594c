"""The accuracy of every batch norm: the table, the JSON, and the picture of error against |mean|/std."""

from __future__ import annotations

import argparse
import math
import platform
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .._plotting import FAMILIES, GREY, INK, STYLE, Axes, save, spread_apart
from .._version import __version__
from ..bench.contestants import Measured
from ..bench.truth import PROMISED
from .errors import GROUPS, QUANTITIES, Row

Ends = dict[str, list[tuple[float, str]]]  # family → where its lines end, and their names

WIDTH = 11
TITLES = {"1e2": "ratio 1e2", "1e4": "ratio 1e4", "1e6": "ratio 1e6"}


# ---- The table ----


def table(rows: Sequence[Row], count: int, *, by_scenario: bool) -> str:
    """Return the largest errors over all scenarios, or for each quantity those of each group."""
    if not by_scenario:
        lines = [f"Worst error over {count} batches, in ulp of float32", ""]
        return "\n".join([*lines, *_section(rows, "", {name: _over_all(name) for name in QUANTITIES}, promises=True)])
    lines = ["Worst error in each group of batches, in ulp of float32 (ratio: |mean|/std)"]
    for name in QUANTITIES:
        columns = {TITLES.get(group, group): _in_group(name, group) for group in GROUPS}
        lines += ["", *_section(rows, name, columns, promises=False)]
    return "\n".join(lines)


def _over_all(quantity: str) -> Any:
    return lambda row: row.worst(quantity)


def _in_group(quantity: str, group: str) -> Any:
    return lambda row: row.errors.get(quantity, {}).get(group)


def _section(rows: Sequence[Row], title: str, columns: Mapping[str, Any], *, promises: bool) -> list[str]:
    """Return a heading, and under each family its rows."""
    width = max(len(row.contestant.name) for row in rows) + 4
    lines, family = [f"{title:<{width}}" + "".join(f"{name:>{WIDTH}}" for name in columns)], ""
    for row in rows:
        if row.contestant.family != family:
            family = row.contestant.family
            lines.append(f"{family} {version(row.contestant)}".rstrip())
        text = "".join(f"{_figure(column(row)):>{WIDTH}}" for column in columns.values())
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
    """Return the version of arraybn itself, or of the library."""
    if contestant.family == "arraybn":
        return __version__
    name = metadata.packages_distributions().get(contestant.library, [contestant.library])[0]
    return metadata.version(name)


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


# ---- The picture ----

DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
ALONE = " without float64"
LOST, LOW, TOP = 2.0**24, 0.4, 1e10  # ulp


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the error of y against |mean|/std into a PNG file, which is complete or not there at all."""
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure

    with rc_context({**rcParamsDefault, **STYLE}):
        figure = Figure(figsize=(11.5, 7), dpi=160, facecolor="white")
        axes = figure.subplots()
        figure.subplots_adjust(left=0.06, right=0.67, top=0.875, bottom=0.085)
        figure.text(0.06, 0.945, "How many digits does a batch norm have left?", fontsize=18, weight="bold")
        text = "Largest error of y, in ulp of float32, when the mean of the data lies further and further from zero"
        figure.text(0.06, 0.908, text, color=GREY)
        _set_up(axes)
        ends: Ends = {}
        for index, row in enumerate(rows):
            if row.curve:
                _draw_line(axes, row, sum(row.contestant.family == one.contestant.family for one in rows[:index]), ends)
        _label(axes, ends)
        save(figure, path)


def _set_up(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log", xlim=(1, 1e6), ylim=(LOW, TOP))
    axes.set_xlabel("|mean|/std of the data (std 1, float32)")
    axes.axhspan(LOST, TOP, color="#f3f3f3", linewidth=0, zorder=0)
    note: Any = {"color": GREY, "fontsize": 8.5, "va": "bottom"}
    axes.text(1.15, LOST * 1.3, "no digit is right", **note)
    for digits, x, align in ((2, 1.15, "left"), (4, 8.7e5, "right"), (6, 8.7e5, "right")):
        axes.axhline(LOST / 10**digits, color="#e0e0e0", linewidth=0.8, zorder=0)
        axes.text(x, LOST / 10**digits * 1.15, f"{digits} digits are right", ha=align, **note)
    axes.text(9, 2e4, "variance as E[x²] − E[x]²:\nthe error grows with the square", ha="center", **note)
    axes.text(3e4, 5e3, "mean rounded to float32:\nthe error grows in proportion", ha="center", **note)
    axes.minorticks_off()


def _draw_line(axes: Axes, row: Row, index: int, ends: Ends) -> None:
    """Draw a line up to the last number, and its end for the labels."""
    family, name, ours = row.contestant.family, row.contestant.name, row.contestant.family == "arraybn"
    finite = [(ratio, error) for ratio, error in row.curve.items() if math.isfinite(error)]
    ratios, errors = (np.asarray(values) for values in zip(*finite, strict=True))
    errors = np.clip(errors, LOW, TOP)
    style = {"color": FAMILIES.get(family, INK), "linewidth": 2.6 if ours else 1.6, "zorder": 3 if ours else 2}
    axes.plot(ratios, errors, linestyle="-" if ours else DASHES[index % len(DASHES)], **style)
    if len(finite) == len(row.curve):
        short = name.removesuffix(ALONE)
        ends.setdefault(family if short == name else family + ALONE, []).append((float(errors[-1]), short))
        return
    axes.plot(ratios[-1], errors[-1], "X", markersize=9, markeredgecolor="white", **style)
    offset: Any = {"xytext": (-12, 4), "textcoords": "offset points", "ha": "right", "va": "bottom"}
    text = f"{family}: {name}\nthen no number at all"
    axes.annotate(text, (ratios[-1], errors[-1]), color=style["color"], **offset)


def _label(axes: Axes, ends: Ends) -> None:
    """Write the family and the names of lines that end within a factor of ten, with a thin line to their ends."""
    labels = []
    for family, found in ends.items():
        group: list[tuple[float, str]] = []
        for end, name in sorted(found):
            if group and end > 10 * group[0][0]:
                labels.append(_joined(family, group))
                group = []
            group.append((end, name))
        labels.append(_joined(family, group))
    labels.sort()
    to_axes = axes.transData + axes.transAxes.inverted()
    starts = np.asarray([to_axes.transform((1e6, end))[1] for end, _, _ in labels])
    for start, height, (_, family, names) in zip(starts, spread_apart(starts, 0.073), labels, strict=True):
        style: Any = {
            "transform": axes.transAxes,
            "color": FAMILIES.get(family.removesuffix(ALONE), INK),
            "clip_on": False,
        }
        axes.plot((1.005, 1.025, 1.035), (start, height, height), linewidth=0.8, **style)
        axes.text(1.042, height + 0.013, family, va="center", weight="bold", **style)
        axes.text(1.042, height - 0.003, textwrap.fill(names, 60), va="top", fontsize=8, **style)


def _joined(family: str, group: Sequence[tuple[float, str]]) -> tuple[float, str, str]:
    """Return the height of a label (the geometric mean), and its words."""
    return math.exp(sum(math.log(end) for end, _ in group) / len(group)), family, "; ".join(name for _, name in group)

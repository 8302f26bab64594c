"""The pictures of the benches: the table of the CPU and of a GPU, the growth, the ladder, and the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._plotting import BOLD, FAMILIES, GREY, INK, LIGHT, Array, Axes, add_legend, draw_picture, plain_numbers
from . import growth, ladder, networks
from .cases import LARGE_OPERATIONS, LAYOUTS, OPERATIONS, SMALL_OPERATIONS
from .contestants.registry import COPYTO
from .report import TITLES, floors
from .sync_ranks import BACKWARD, EXACT, FORWARD, GATHER, OURS, fastest
from .timing import Result

STYLES = {  # colour, mark, filled; the later ones lie below
    "arraybn, out=": (FAMILIES["arraybn"], "D", False),
    "arraybn": (FAMILIES["arraybn"], "o", True),
    "arraybn fused": (FAMILIES["arraybn"], "o", True),
    "arraybn split": (FAMILIES["arraybn"], "D", False),
    "PyTorch": (FAMILIES["PyTorch"], "^", True),
    "PyTorch native": (FAMILIES["PyTorch"], "^", False),
    "PyTorch operators": (FAMILIES["PyTorch"], "s", False),
    "JAX": (FAMILIES["JAX"], "v", True),
    "TensorFlow": (FAMILIES["TensorFlow"], "P", True),
    "arraybn reference": ("#56b4e9", "s", True),
    "NumPy formulas": (FAMILIES["NumPy"], "X", True),
}
DASHED: Any = {"color": INK, "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1}
Line = tuple[str, Result]  # the operation, and its case
Panels = dict[tuple[str, str], list[Line]]  # by row and column


def draw_table(results: Sequence[Result], processor: str, path: Path) -> None:
    """Draw a panel for each operation in each layout; large inputs in units of a copy, small ones in µs."""

    def scale(operation: str, result: Result, seconds: Array) -> Array:
        return seconds / (1e-6 if operation in SMALL_OPERATIONS else result.median(COPYTO, "copy") or math.nan)

    def finish(axes: Axes, lines: Sequence[Line]) -> None:
        operation, small = lines[0][0], lines[0][0] in SMALL_OPERATIONS
        axes.set_yticks(range(len(lines)), [_shape(result) for _, result in lines], color=INK)
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        if not small:
            axes.axvline(1, **DASHED)
        axes.set_title(f"{TITLES[operation]}{_layout(lines)} [{'µs' if small else f'× {COPYTO}'}]", **BOLD)

    subtitle = f"{processor}. Large inputs: time in units of {COPYTO} of x (dashed: 1); less is faster; bars: quartiles"
    panels = make_panels(results, OPERATIONS, lambda operation, _: operation)
    _draw_panels(panels, path, ("Batch norms on this machine", subtitle), scale, finish)


def draw_gpu(results: Sequence[Result], device: str, speed: float | None, path: Path) -> bool:
    """Draw a panel for each dtype and layout: the fractions of the floor. Return False if there is nothing to draw."""
    panels = make_panels(results, LARGE_OPERATIONS, lambda _, result: result.case.dtype)
    if speed is None or not panels:
        return False

    def scale(operation: str, result: Result, seconds: Array) -> Array:
        return (floors(result.case, operation, speed)[0] or math.nan) / seconds

    def finish(axes: Axes, lines: Sequence[Line]) -> None:
        labels = [f"{operation.replace('eval', 'evaluation')}  {_shape(result)}" for operation, result in lines]
        axes.set_yticks(range(len(lines)), labels, color=INK)
        twice = [result.case.moved(operation) / result.case.moved_twice(operation) for operation, result in lines]
        tick: Any = {"color": GREY, "markersize": 10, "markeredgewidth": 1.6, "linestyle": "", "zorder": 1}
        axes.axvline(1, label="floor: read once", **DASHED)
        axes.plot(twice, range(len(lines)), "|", label="read twice", **tick)
        axes.set_xlim(0, max(1.08, axes.get_xlim()[1]))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_title(f"{lines[0][1].case.dtype}{_layout(lines)}", **BOLD)

    subtitle = f"{device}: of the time that a copy of the same bytes takes, if x is read once. Further right is faster"
    _draw_panels(panels, path, ("How near batch norms come to the speed of memory", subtitle), scale, finish)
    return True


def make_panels(results: Sequence[Result], operations: Sequence[str], row: Callable[[str, Result], str]) -> Panels:
    """Return the lines that have samples, by row and layout."""
    found: Panels = {}
    for operation in operations:
        for result in results:
            if any(cell.operation == operation and cell.seconds for cell in result.cells):
                found.setdefault((row(operation, result), result.case.layout), []).append((operation, result))
    return found


def _draw_panels(panels: Panels, path: Path, words: tuple[str, str], scale: Any, finish: Any) -> None:
    """Draw panels with a line for each case, on it a mark for each contestant; `finish` sets up the axes of a panel."""
    rows, columns = (list(dict.fromkeys(key[i] for key in panels)) for i in range(2))
    heights = [max(len(lines) for key, lines in panels.items() if key[0] == row) + 1 for row in rows]
    size = 13.0 if len(columns) == 2 else 8.8, 1.6 + 0.29 * sum(heights) + 0.6 * len(rows)

    def fill(figure: Any) -> None:
        grid = figure.subplots(len(rows), len(columns), squeeze=False, height_ratios=heights)
        for axes, key in zip(grid.flat, [(row, column) for row in rows for column in columns], strict=True):
            axes.set_visible(key in panels)
            if lines := panels.get(key):
                _draw_marks(axes, lines, scale)
                axes.set_ylim(len(lines) - 0.4, -0.6)
                axes.grid(axis="y", color=LIGHT)
                finish(axes, lines)
        add_legend(figure, ncols=len(columns) * 4)

    draw_picture(path, size, *words, fill)


def _draw_marks(axes: Axes, lines: Sequence[Line], scale: Any) -> None:
    """Draw median and quartiles of all contestants, a line for each case."""
    for order, (row, (color, mark, filled)) in enumerate(STYLES.items()):
        found = []
        for y, (operation, result) in enumerate(lines):
            cell = result.cell(row, operation)
            if cell is not None and cell.seconds:
                found.append((y, *sorted(scale(operation, result, np.asarray(cell.quartiles)))))
        if found:
            y, low, median, high = np.asarray(found).T
            style: Any = {"color": color, "markerfacecolor": color if filled else "white", "zorder": 20 - order}
            error = median - low, high - median
            axes.errorbar(median, y, xerr=error, fmt=mark, markersize=6.5, markeredgewidth=1.4, label=row, **style)


def _layout(lines: Sequence[Line]) -> str:
    case = lines[0][1].case
    return "" if all(len(result.case.shape) == 2 for _, result in lines) else f", channels-{case.layout}"


def _shape(result: Result) -> str:
    return "×".join(map(str, result.case.shape)) + ("" if result.case.dtype == "float32" else f" {result.case.dtype}")


def draw_growth(results: Sequence[Result], processor: str, path: Path) -> None:
    """Draw nanoseconds per element against elements: a column for each axis, a row for a direction in a layout."""
    rows = [(operation, layout) for operation in growth.OPERATIONS for layout in LAYOUTS]

    def fill(figure: Any) -> None:
        grid = figure.subplots(len(rows), len(growth.AXES), sharex=True, sharey="row")
        for line, (operation, layout) in zip(grid, rows, strict=True):
            for axes, axis in zip(line, growth.AXES, strict=True):
                _draw_growth(axes, growth.along(axis, layout, results), operation, [COPYTO, *growth.rows(results)])
                axes.set_title(f"{TITLES[operation]}, channels-{layout}, along {axis}", **BOLD)
            line[0].set_ylabel("nanoseconds per element")
        for axes in grid[-1]:
            axes.set_xlabel("elements of x")
        add_legend(figure, ncols=6)

    subtitle = f"{processor}, float32, (N, C, S) from (10, 10, 10) on, one axis growing. Medians; bands: quartiles"
    draw_picture(path, (13.0, 15.0), "Time per element of a batch norm", subtitle, fill)


def _draw_growth(axes: Axes, along: Sequence[Result], operation: str, rows: Sequence[str]) -> None:
    for name in rows:
        cells = [(one.case.elements, one.cell(name, "copy" if name == COPYTO else operation)) for one in along]
        found = [(elements, *cell.quartiles) for elements, cell in cells if cell is not None and cell.seconds]
        if found:
            elements, *quartiles = np.asarray(found).T
            first, median, third = np.asarray(quartiles) / elements * 1e9
            color = INK if name == COPYTO else STYLES.get(name, (GREY,))[0]
            dashes = {"arraybn, out=": "--", COPYTO: ":"}.get(name, "-")
            axes.fill_between(elements, first, third, color=color, alpha=0.15, linewidth=0)
            axes.plot(elements, median, dashes, color=color, linewidth=2, label=name)
    axes.set(xscale="log", yscale="log")
    axes.grid(axis="y", color=LIGHT)


def draw_set(results: Sequence[Result], processor: str, path: Path) -> None:
    """Draw the quotient of arraybn and its rival against elements: a panel for each operation."""
    rival = networks.rival(results)

    def fill(figure: Any) -> None:
        panels = figure.subplots(1, len(LARGE_OPERATIONS), sharey=True)
        for axes, operation in zip(panels, LARGE_OPERATIONS, strict=True):
            for layout, mark in zip(LAYOUTS, "os", strict=True):
                found = [one for one in results if one.case.layout == layout]
                ratios = [networks.ratio(one, operation, rival) or math.nan for one in found]
                style: Any = {"markersize": 5, "alpha": 0.7, "label": f"channels-{layout}"}
                axes.plot([one.case.elements for one in found], ratios, mark, **style)
            axes.axhline(1, **DASHED)
            axes.set(xscale="log", yscale="log", xlabel="elements of x")
            axes.set_title(TITLES[operation], **BOLD)
            plain_numbers(axes.yaxis)
        add_legend(figure, ncols=2)

    words = f"{networks.OURS} divided by {rival}", f"{processor}, {results[0].case.dtype}. Below 1 arraybn is faster"
    draw_picture(path, (13.0, 4.8), *words, fill)


def draw_ladder(results: Sequence[Result], processor: str, path: Path) -> None:
    operations, steps = ladder.CASE.operations, [step.row for step in ladder.STEPS]

    def fill(figure: Any) -> None:
        grid = figure.subplots(1, len(operations), sharey=True)
        for axes, operation in zip(grid, operations, strict=True):
            _draw_ladder(axes, [rung for rung in ladder.rungs(results[0]) if rung["what"] == operation])
            axes.set_title(TITLES[operation], **BOLD)
        grid[0].set_yticks(range(len(steps)), steps, color=INK)
        grid[0].invert_yaxis()

    subtitle = f"{processor}, {results[0].case}. Dot: measured; line: its bytes at the speed of {COPYTO}"
    draw_picture(path, (12.0, 4.6), "One idea a step", subtitle, fill)


def _draw_ladder(axes: Axes, rungs: Sequence[Mapping[str, Any]]) -> None:
    places = range(len(rungs))
    predicted, measured = (np.asarray([rung[key] for rung in rungs], float) * 1e3 for key in ("predicted", "measured"))
    axes.hlines(places, predicted, measured, color="#8cc5e8", linewidth=4, zorder=1)
    axes.plot(predicted, places, "|", color="#003f66", markersize=16, markeredgewidth=2.2)
    axes.plot(measured, places, "o", color=FAMILIES["arraybn"], markersize=8)
    for y in np.flatnonzero(np.isfinite(measured)):
        end = np.fmax(predicted, measured)[y]
        axes.annotate(f"{measured[y]:.3g} ms", (end, y), (9, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set(xscale="log", xlabel="milliseconds")
    axes.margins(0.2, 0.1)
    axes.grid(axis="y", color=LIGHT)
    plain_numbers(axes.xaxis)


CHANNELS: Any = {256: "-o", 2048: "--s"}  # those that are drawn, and how
SCHEME_COLORS = {OURS: FAMILIES["arraybn"], EXACT: STYLES["arraybn reference"][0], GATHER: FAMILIES["PyTorch"]}


def draw_sync(jobs: Sequence[Mapping[str, Any]], here: Mapping[str, Any], path: Path) -> None:
    """Draw the times of the exchanges and the bytes that a rank receives, against the number of ranks."""

    def microseconds(rows: Sequence[Mapping[str, Any]]) -> float:
        return sum(fastest(row) * 1e6 for row in rows if row["what"] in (FORWARD, BACKWARD))

    def received(rows: Sequence[Mapping[str, Any]]) -> float:
        return next(float(row["traffic"]["received"]) for row in rows if row["what"] == FORWARD)

    def fill(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        _draw_sync(left, jobs, microseconds)
        left.set_title("forward and backward, ranks share cores [µs]", **BOLD)
        _draw_sync(right, jobs, received)
        right.set_title("bytes that a rank receives, forward", **BOLD)
        add_legend(figure, ncols=3, handlelength=3.2)

    subtitle = f"{here['processor']}, {here['cores']} cores, {jobs[0]['mpi']}. The exchanges of one layer"
    draw_picture(path, (10.5, 5.0), "What synchronizing over ranks costs", subtitle, fill)


def _draw_sync(axes: Axes, jobs: Sequence[Mapping[str, Any]], value: Callable[[Any], float]) -> None:
    found = {job["ranks"]: job["rows"] for job in jobs if job["ranks"] > 1}
    for scheme, color in SCHEME_COLORS.items():
        for channels, style in CHANNELS.items():
            wanted = channels, scheme
            values = [
                value([row for row in rows if (row["channels"], row["scheme"]) == wanted]) for rows in found.values()
            ]
            axes.plot(list(found), values, style, color=color, label=f"{scheme}, C = {channels}")
    axes.set(xscale="log", yscale="log", xlabel="ranks")
    axes.set_xticks(list(found), [f"{count:,}" for count in found], minor=False)
    axes.set_xticks([], minor=True)
    plain_numbers(axes.yaxis)
    axes.grid(axis="y", color=LIGHT)

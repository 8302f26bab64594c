"""The pictures of the benches: the table of the CPU and of a GPU, the growth, the ladder, and the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._plotting import FAMILIES, GREY, INK, LIGHT, Axes, draw_picture, spread_apart
from . import growth, ladder
from .cases import LARGE_OPERATIONS, OPERATIONS, SMALL_OPERATIONS
from .contestants.registry import COPYTO
from .report import TITLES, floors
from .sync_ranks import BACKWARD, FORWARD, GATHER, OURS, fastest
from .timing import Result

STYLES = {  # colour, mark, filled; the later ones lie below
    "arraybn, out=": (FAMILIES["arraybn"], "D", False),
    "arraybn": (FAMILIES["arraybn"], "o", True),
    "arraybn fused": (FAMILIES["arraybn"], "o", True),
    "arraybn split": (FAMILIES["arraybn"], "D", False),
    "PyTorch": (FAMILIES["PyTorch"], "^", True),
    "PyTorch native": (FAMILIES["PyTorch"], "^", False),
    "JAX": (FAMILIES["JAX"], "v", True),
    "TensorFlow": (FAMILIES["TensorFlow"], "P", True),
    "arraybn reference": ("#56b4e9", "s", True),
    "NumPy formulas": (FAMILIES["NumPy"], "X", True),
}
SHORT = {"forward": "forward", "backward": "backward", "eval": "evaluation"}
BOLD: Any = {"loc": "left", "fontsize": 10, "color": INK, "weight": "bold"}
DASHED: Any = {"color": INK, "linewidth": 0.9, "linestyle": (0, (4, 3))}
TICK = "#9a9a9a"
Line = tuple[str, Result]  # the operation, and its case
Panels = dict[tuple[str, str], list[Line]]  # by row and column


# ---- The tables ------------------------------------------------------------------------------------------------------


def draw_table(results: Sequence[Result], processor: str, path: Path) -> None:
    """Draw a panel for each operation in each layout; large inputs in units of a copy, small ones in µs."""
    panels: Panels = {}
    for operation in OPERATIONS:
        for result in results:
            if _has(result, operation):
                panels.setdefault((operation, result.case.layout), []).append((operation, result))

    def scale(operation: str, result: Result) -> Callable[[float], float]:
        unit = 1e-6 if operation in SMALL_OPERATIONS else result.median(COPYTO, "copy") or math.nan
        return lambda seconds: seconds / unit

    def finish(axes: Axes, lines: Sequence[Line], highest: float) -> None:
        operation, small = lines[0][0], lines[0][0] in SMALL_OPERATIONS
        axes.set_xscale("log")
        _plain_ticks(axes)
        if not small:
            axes.axvline(1, zorder=1, **DASHED)
        axes.set_title(f"{TITLES[operation]}{_where(lines)} [{'µs' if small else f'× {COPYTO}'}]", **BOLD)

    subtitle = f"{processor}. Large inputs: time in units of {COPYTO} of x (dashed: 1); less is faster; bars: quartiles"
    _draw_panels(panels, path, ("Batch norms on this machine", subtitle), scale, finish)


def draw_gpu(results: Sequence[Result], device: str, speed: float | None, path: Path) -> bool:
    """Draw a panel for each dtype and layout: the fractions of the floor. Return False if there is nothing to draw."""
    panels = gpu_panels(results)
    if speed is None or not panels:
        return False

    def scale(operation: str, result: Result) -> Callable[[float], float]:
        return lambda seconds: (floors(result.case, operation, speed)[0] or math.nan) / seconds

    def finish(axes: Axes, lines: Sequence[Line], highest: float) -> None:
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        heights, named = _heights(lines), ""
        for y, (operation, result) in zip(heights, lines, strict=True):
            ratio = result.case.moved(operation) / result.case.moved_twice(operation)
            axes.plot([ratio] * 2, (y - 0.32, y + 0.32), color=TICK, linewidth=1.4, zorder=1)
            if operation != named:
                style: Any = {"color": GREY, "fontsize": 9, "va": "center", "transform": axes.get_yaxis_transform()}
                axes.text(0.008, y - 0.86, SHORT[operation], **style)
                named = operation
        axes.set(ylim=(heights[-1] + 0.7, -1.5), xlim=(0, max(1.08, 1.05 * highest)))
        axes.axvline(1, zorder=1, **DASHED)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_title(f"{lines[0][1].case.dtype}{_where(lines)}", **BOLD)

    subtitle = f"{device}: of the time that a copy of the same bytes takes, if x is read once. Further right is faster"
    words = "How near batch norms come to the speed of memory", subtitle
    tick = {"color": TICK, "marker": "|", "markersize": 10, "markeredgewidth": 1.6, "linestyle": ""}
    _draw_panels(panels, path, words, scale, finish, {"floor: read once": DASHED, "read twice": tick})
    return True


def gpu_panels(results: Sequence[Result]) -> Panels:
    """Return what has samples, by dtype and layout."""
    found: Panels = {}
    for operation in LARGE_OPERATIONS:
        for result in results:
            if _has(result, operation):
                found.setdefault((result.case.dtype, result.case.layout), []).append((operation, result))
    return found


def _draw_panels(
    panels: Panels, path: Path, words: tuple[str, str], scale: Any, finish: Any, more: Mapping[str, Any] | None = None
) -> None:
    """Draw panels with a line for each case, on it a mark for each contestant; `finish` sets up the axes of a panel."""
    rows, columns = (list(dict.fromkeys(key[i] for key in panels)) for i in range(2))
    heights = [0.29 * max(_heights(lines)[-1] + 1.6 for key, lines in panels.items() if key[0] == row) for row in rows]
    width, top, bottom, between = 13.0 if len(columns) == 2 else 8.8, 1.75, 0.6, 0.75  # inches
    height = top + bottom + sum(heights) + between * (len(rows) - 1)
    ends: Any = {"left": 2.0 / width, "right": 1 - 0.3 / width, "top": 1 - top / height, "bottom": bottom / height}

    def fill(figure: Any) -> None:
        grid = figure.subplots(len(rows), len(columns), squeeze=False, height_ratios=heights)
        figure.subplots_adjust(hspace=between / (sum(heights) / len(heights)), wspace=0.46, **ends)
        for axes, key in zip(grid.ravel(), [(row, column) for row in rows for column in columns], strict=True):
            if lines := panels.get(key):
                places = _heights(lines)
                marks = [_draw_marks(axes, y, line, scale(*line)) for y, line in zip(places, lines, strict=True)]
                axes.set_yticks(places, [_label(result, rows) for _, result in lines], color=INK)
                axes.set_ylim(places[-1] + 0.6, -0.6)
                finish(axes, lines, max(marks))
            else:
                axes.set_visible(False)
        _legend(figure, [result for lines in panels.values() for _, result in lines], 1 - 0.97 / height, more or {})

    draw_picture(path, (width, height), *words, fill)


def _has(result: Result, operation: str) -> bool:
    return any(cell.operation == operation and cell.seconds for cell in result.cells)


def _heights(lines: Sequence[Line]) -> list[float]:
    """Return the height of each line; a new operation begins a gap below, where its name has room."""
    heights, y = [], 0.0
    for i, (operation, _) in enumerate(lines):
        y += 0.0 if i == 0 else 1.0 if operation == lines[i - 1][0] else 2.0
        heights.append(y)
    return heights


def _where(lines: Sequence[Line]) -> str:
    case = lines[0][1].case
    return "" if all(len(result.case.shape) == 2 for _, result in lines) else f", channels-{case.layout}"


def _label(result: Result, rows: Sequence[str]) -> str:
    """Return the shape, and the dtype where no row of panels and no habit says it."""
    shape, dtype = "×".join(map(str, result.case.shape)), result.case.dtype
    return shape if dtype in ("float32", *rows) else f"{shape} {dtype}"


def _draw_marks(axes: Axes, y: float, line: Line, scale: Callable[[float], float]) -> float:
    """Draw median and quartiles of all contestants on a line; return the largest quartile."""
    axes.axhline(y, color=LIGHT, linewidth=0.8, zorder=0)
    highest = 0.0
    for order, (row, (color, marker, filled)) in enumerate(STYLES.items()):
        cell = line[1].cell(row, line[0])
        if cell is not None and cell.seconds:
            low, middle, high = map(scale, cell.quartiles)
            highest = max(highest, low, high)
            style: Any = {"color": color, "zorder": 20 - order}
            axes.plot((low, high), (y, y), linewidth=1.6, alpha=0.6, **style)
            face = color if filled else "white"
            axes.plot(middle, y, marker, markersize=6.5, markeredgewidth=1.4, markerfacecolor=face, **style)
    return highest


def _plain_ticks(axes: Axes) -> None:
    """Write 1, 2, 5, 10 … as they are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, results: Sequence[Result], height: float, more: Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D

    shown = {cell.row for result in results for cell in result.cells if cell.seconds}
    styles = {row: style for row, style in STYLES.items() if row in shown}
    handles = [
        Line2D([], [], color=color, marker=mark, linestyle="", markerfacecolor=color if filled else "white", label=row)
        for row, (color, mark, filled) in styles.items()
    ] + [Line2D([], [], label=name, **style) for name, style in more.items()]
    columns = len(handles) if figure.get_figwidth() > 10 else 4
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.022, height), ncols=columns, frameon=False)


# ---- The growth ------------------------------------------------------------------------------------------------------


def draw_growth(results: Sequence[Result], processor: str, path: Path) -> None:
    """Draw nanoseconds per element against elements: a column for each axis, a row for each direction."""
    rows = [COPYTO, *growth.rows(results)]

    def fill(figure: Any) -> None:
        grid = figure.subplots(len(growth.OPERATIONS), len(growth.AXES), sharex=True, sharey="row", squeeze=False)
        figure.subplots_adjust(left=0.06, right=0.885, top=0.85, bottom=0.07, hspace=0.22, wspace=0.08)
        for line, operation in zip(grid, growth.OPERATIONS, strict=True):
            for axes, axis in zip(line, growth.AXES, strict=True):
                _draw_growth(axes, results, axis, operation, rows)
            line[0].set_ylabel("nanoseconds per element")
            _label_ends(line[-1], rows)
        for axes in grid[-1]:
            axes.set_xlabel("elements of x")

    subtitle = f"{processor}, float32, (N, C, S) from (10, 10, 10) on, one axis growing. Medians; bands: quartiles"
    draw_picture(path, (13.0, 8.2), "Time per element of a batch norm", subtitle, fill)


def _draw_growth(axes: Axes, results: Sequence[Result], axis: str, operation: str, rows: Sequence[str]) -> None:
    by_shape = {result.case.shape: result for result in results}
    along = [by_shape[shape] for shape in growth.shapes(axis, growth.LAST * 100) if shape in by_shape]
    for name in rows:
        cells = [(one.case.elements, one.cell(name, "copy" if name == COPYTO else operation)) for one in along]
        found = [(elements, cell.quartiles) for elements, cell in cells if cell is not None and cell.seconds]
        if found:
            elements = np.asarray([count for count, _ in found])
            low, middle, high = np.asarray([quartiles for _, quartiles in found]).T / elements * 1e9
            dashes: Any = (0, (4, 2)) if name == "arraybn, out=" else (0, (1, 1.2)) if name == COPYTO else "-"
            axes.fill_between(elements, low, high, color=_color(name), alpha=0.15, linewidth=0)
            width = 2.0 if name.startswith("arraybn") else 1.5
            axes.plot(elements, middle, linestyle=dashes, color=_color(name), linewidth=width, gid=name)
    axes.set(xscale="log", yscale="log")
    axes.grid(axis="y", color="#ececec", linewidth=0.8)
    axes.set_title(f"{TITLES[operation]}, along {axis}", **BOLD)


def _color(row: str) -> str:
    return INK if row == COPYTO else STYLES[row][0] if row in STYLES else GREY


def _label_ends(axes: Axes, rows: Sequence[str]) -> None:
    lines = {line.get_gid(): line for line in axes.get_lines() if line.get_gid() in rows}
    axes.figure.canvas.draw_idle()
    to_axes = axes.transData + axes.transAxes.inverted()
    last = {name: (line.get_xdata()[-1], line.get_ydata()[-1]) for name, line in lines.items()}
    ends = sorted((float(to_axes.transform(point)[1]), name) for name, point in last.items())
    for (_, name), height in zip(ends, spread_apart(np.asarray([end for end, _ in ends]), 0.065), strict=True):
        style: Any = {"va": "center", "color": _color(name), "fontsize": 9, "weight": "bold"}
        axes.text(1.02, height, name, transform=axes.transAxes, **style)


# ---- The ladder ------------------------------------------------------------------------------------------------------


def draw_ladder(results: Sequence[Result], processor: str, path: Path) -> None:
    operations, steps = ladder.CASE.operations, ladder.STEPS

    def fill(figure: Any) -> None:
        grid = figure.subplots(1, len(operations), sharey=True, squeeze=False)[0]
        figure.subplots_adjust(left=0.2, right=0.97, top=0.74, bottom=0.13, wspace=0.1)
        for axes, operation in zip(grid, operations, strict=True):
            _draw_ladder(axes, [rung for rung in ladder.rungs(results[0]) if rung.what == operation])
            axes.set_title(TITLES[operation], **BOLD)
        grid[0].set_yticks(range(len(steps)), [step.row for step in steps], color=INK)
        grid[0].set_ylim(len(steps) - 0.4, -0.6)

    subtitle = f"{processor}, {results[0].case}. Dot: measured; line: its bytes at the speed of {COPYTO}"
    draw_picture(path, (12.0, 4.6), "One idea a step", subtitle, fill)


def _draw_ladder(axes: Axes, found: Sequence[ladder.Rung]) -> None:
    ends = [[1e3 * value for value in (rung.predicted, rung.measured) if value is not None] for rung in found]
    for height, (rung, both) in enumerate(zip(found, ends, strict=True)):
        axes.axhline(height, color=LIGHT, linewidth=0.8, zorder=0)
        axes.plot(both, [height] * len(both), color="#8cc5e8", linewidth=4, zorder=1)
        if rung.measured is not None:
            axes.plot(rung.measured * 1e3, height, "o", color=FAMILIES["arraybn"], markersize=8, zorder=3)
            text: Any = {"textcoords": "offset points", "xytext": (9, 0), "va": "center", "fontsize": 9}
            axes.annotate(f"{rung.measured * 1e3:.3g} ms", (max(both), height), **text)
        if rung.predicted is not None:
            tick: Any = {"color": "#003f66", "linewidth": 2.2, "zorder": 2}
            axes.plot([rung.predicted * 1e3] * 2, (height - 0.3, height + 0.3), **tick)
    values = [value for both in ends for value in both] or [1.0, 10.0]
    axes.set(xscale="log", xlim=(min(values) / 2, max(values) * 2), xlabel="milliseconds")
    _plain_ticks(axes)


# ---- The ranks -------------------------------------------------------------------------------------------------------

CHANNELS: Any = {256: ("-", "o"), 2048: ((0, (4, 2)), "s")}  # those that are drawn, and how
SCHEME_COLORS = {OURS: FAMILIES["arraybn"], GATHER: FAMILIES["PyTorch"]}


def draw_sync(jobs: Sequence[Mapping[str, Any]], here: Mapping[str, Any], path: Path) -> None:
    """Draw the times of the exchanges and the bytes that a rank receives, against the number of ranks."""
    found = [job for job in jobs if job["ranks"] > 1]

    def microseconds(rows: Sequence[Mapping[str, Any]]) -> float:
        return sum(fastest(row) * 1e6 for row in rows if row["what"] in (FORWARD, BACKWARD))

    def received(rows: Sequence[Mapping[str, Any]]) -> float:
        return next(float(row["traffic"]["received"]) for row in rows if row["what"] == FORWARD)

    def fill(figure: Any) -> None:
        from matplotlib.lines import Line2D

        panels = {"forward and backward, ranks share cores [µs]": microseconds}
        panels["bytes that a rank receives, forward"] = received
        figure.subplots_adjust(left=0.07, right=0.98, top=0.7, bottom=0.12, wspace=0.24)
        for axes, (heading, value) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            _draw_sync(axes, found, heading, value)
        handles = [Line2D([], [], color=color, linewidth=2, label=name) for name, color in SCHEME_COLORS.items()]
        for c, (dashes, mark) in CHANNELS.items():
            handles.append(Line2D([], [], color=INK, linestyle=dashes, marker=mark, label=f"C = {c}"))
        place: Any = {"loc": "upper left", "bbox_to_anchor": (0.022, 0.835), "handlelength": 3.2}
        figure.legend(handles=handles, ncols=4, frameon=False, **place)

    subtitle = f"{here['processor']}, {here['cores']} cores, {jobs[0]['mpi']}. The exchanges of one layer"
    draw_picture(path, (10.5, 5.0), "What synchronizing over ranks costs", subtitle, fill)


def _draw_sync(axes: Axes, jobs: Sequence[Mapping[str, Any]], heading: str, value: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    ranks = [job["ranks"] for job in jobs]
    for channels, (dashes, mark) in CHANNELS.items():
        for scheme, color in SCHEME_COLORS.items():
            wanted = channels, scheme
            rows = [[row for row in job["rows"] if (row["channels"], row["scheme"]) == wanted] for job in jobs]
            axes.plot(ranks, list(map(value, rows)), mark, linestyle=dashes, color=color, linewidth=1.6, markersize=6)
    axes.set(xscale="log", yscale="log", xlabel="ranks")
    axes.set_xticks(ranks, [f"{count:,}" for count in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    axes.set_title(heading, **BOLD)

"""The pictures of ``python -m arraybn bench``: one for the table, one for the growth, one for the ladder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._plotting import GREY, INK, STYLE
from .._plotting import save as _save
from .._plotting import spread_apart as _apart
from . import _bench_growth as growth
from ._bench_cases import SMALL_WHATS, WHATS
from ._bench_clock import COPYTO, Result
from ._bench_ladder import CASE, STEPS, rungs
from ._bench_report import TITLES
from ._check_figure import COLORS as FAMILIES

Axes = Any  # matplotlib's: the library is imported only when a picture is drawn

COLORS = {
    "arraybn": FAMILIES["arraybn"],
    "arraybn, out=": FAMILIES["arraybn"],
    "arraybn reference": "#56b4e9",
    "NumPy formulas": FAMILIES["NumPy"],
    **{name: FAMILIES[name] for name in ("PyTorch", "JAX", "TensorFlow")},
    COPYTO: INK,
}
MARKERS = {"arraybn": "o", "arraybn, out=": "D", "arraybn reference": "s", "NumPy formulas": "X", "PyTorch": "^"}
MARKERS |= {"JAX": "v", "TensorFlow": "P"}
LAYOUT = {"first": "channels-first", "last": "channels-last"}


def _picture(path: Path, size: tuple[float, float], title: str, subtitle: str, fill: Callable[[Any], None]) -> None:
    """A figure in our style, filled by `fill`, in a PNG file that is complete or not there at all."""
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure

    with rc_context({**rcParamsDefault, **STYLE}):
        figure = Figure(figsize=size, dpi=160, facecolor="white")
        height = size[1]
        figure.text(0.03, 1 - 0.45 / height, title, fontsize=17, weight="bold")
        figure.text(0.03, 1 - 0.75 / height, subtitle, color=GREY)
        fill(figure)
        _save(figure, path)


# ---- The table -------------------------------------------------------------------------------------------------------


def draw_table(results: Sequence[Result], processor: str, path: Path) -> None:
    """A panel for each thing that is done, in each layout; large inputs in units of a copy, small ones in µs."""
    panels = [
        (what, layout, chosen)
        for what in WHATS
        for layout in LAYOUT
        if (chosen := [r for r in results if r.case.layout == layout and _has(r, what)])
    ]
    rows = [name for name in COLORS if any(result.median(name, what) for what, _, found in panels for result in found)]
    columns = min(2, max(1, len({layout for _, layout, _ in panels})))
    lines = -(-len(panels) // columns)
    heights = [max(len(found) for *_, found in panels[i : i + columns]) for i in range(0, len(panels), columns)]
    size = (13.0 if columns == 2 else 9.6, 1.95 + sum(0.34 * height + 0.95 for height in heights))

    def fill(figure: Any) -> None:
        grid = figure.subplots(lines, columns, squeeze=False, height_ratios=[height + 0.6 for height in heights])
        top, bottom = 1 - 1.75 / size[1], 0.55 / size[1]
        left, right = (0.175, 0.975) if columns == 2 else (0.24, 0.95)
        mean = sum(0.34 * height + 0.2 for height in heights) / lines  # inches
        figure.subplots_adjust(left=left, right=right, top=top, bottom=bottom, hspace=0.85 / mean, wspace=0.5)
        for axes, panel in zip(grid.ravel(), panels, strict=False):
            _draw_panel(axes, *panel, rows)
        for axes in grid.ravel()[len(panels) :]:
            axes.set_visible(False)
        _legend(figure, rows, 1 - 0.95 / size[1])

    subtitle = f"{processor}. Large inputs: time in units of {COPYTO} of x (dashed: 1); less is faster; bars: quartiles"
    _picture(path, size, "Batch norms on this machine", subtitle, fill)


def _has(result: Result, what: str) -> bool:
    return any(cell.what == what and cell.seconds for cell in result.cells)


def _draw_panel(axes: Axes, what: str, layout: str, results: Sequence[Result], rows: Sequence[str]) -> None:
    """For each case a line, on it a mark for each contestant."""
    small = what in SMALL_WHATS
    for height, result in enumerate(results):
        axes.axhline(height, color="#e8e8e8", linewidth=0.8, zorder=0)
        copy = result.median(COPYTO, "copy")
        for name in rows:
            cell = result.cell(name, what)
            if cell is None or not cell.seconds or (copy is None and not small):
                continue
            unit = 1e6 if small else 1 / (copy or 1.0)
            low, middle, high = (value * unit for value in cell.quartiles)
            ours = name.startswith("arraybn") and name in MARKERS and "reference" not in name
            style: Any = {"color": COLORS[name], "zorder": 4 if ours else 3}
            axes.plot((low, high), (height, height), linewidth=1.6, alpha=0.6, **style)
            fill = "white" if name == "arraybn, out=" else COLORS[name]
            axes.plot(middle, height, MARKERS[name], markersize=7 if ours else 6, markerfacecolor=fill, **style)
    axes.set_xscale("log")
    _plain_ticks(axes)
    axes.set_yticks(range(len(results)), [_label(result) for result in results], color=INK)
    axes.set_ylim(len(results) - 0.4, -0.6)
    if not small:
        axes.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    unit_text = "µs" if small else f"× {COPYTO}"
    where = "" if all(len(result.case.shape) == 2 for result in results) else f", {LAYOUT[layout]}"
    axes.set_title(f"{TITLES[what]}{where} [{unit_text}]", loc="left", fontsize=10, color=INK, weight="bold")


def _label(result: Result) -> str:
    shape = "×".join(map(str, result.case.shape))
    return shape if result.case.dtype == "float32" else f"{shape} {result.case.dtype}"


def _plain_ticks(axes: Axes) -> None:
    """1, 2, 5, 10 … as they are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(10, subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, rows: Sequence[str], height: float) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            marker=MARKERS[name],
            linestyle="",
            color=COLORS[name],
            markerfacecolor="white" if name == "arraybn, out=" else COLORS[name],
            label=name,
        )
        for name in rows
        if name in MARKERS
    ]
    columns = len(handles) if figure.get_figwidth() > 10 else 5
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.022, height), ncols=columns, frameon=False)


# ---- The growth ------------------------------------------------------------------------------------------------------


def draw_growth(results: Sequence[Result], processor: str, path: Path) -> None:
    """Nanoseconds per element against elements: a column for each axis, a row for each direction."""
    size = (13.0, 8.2)
    rows = [COPYTO, *growth.rows(results)]

    def fill(figure: Any) -> None:
        grid = figure.subplots(len(growth.WHATS), len(growth.AXES), sharex=True, sharey="row", squeeze=False)
        figure.subplots_adjust(left=0.06, right=0.885, top=0.85, bottom=0.07, hspace=0.22, wspace=0.08)
        for line, what in zip(grid, growth.WHATS, strict=True):
            for axes, axis in zip(line, growth.AXES, strict=True):
                _draw_growth(axes, results, axis, what, rows)
            line[0].set_ylabel("nanoseconds per element")
            _label_ends(line[-1], rows)
        for axes in grid[-1]:
            axes.set_xlabel("elements of x")

    subtitle = f"{processor}, float32, (N, C, S) from (10, 10, 10) on, one axis growing. Medians; bands: quartiles"
    _picture(path, size, "Time per element of a batch norm", subtitle, fill)


def _draw_growth(axes: Axes, results: Sequence[Result], axis: str, what: str, rows: Sequence[str]) -> None:
    shapes = growth.shapes(axis, growth.LAST * 100)
    for name in rows:
        cells = [
            (result.case.elements, cell.quartiles)
            for shape in shapes
            for result in results
            if result.case.shape == shape
            and (cell := result.cell(name, "copy" if name == COPYTO else what)) is not None
            and cell.seconds
        ]
        if not cells:
            continue
        elements = np.asarray([count for count, _ in cells])
        low, middle, high = (np.asarray(values) / elements * 1e9 for values in zip(*(q for _, q in cells), strict=True))
        ours = name.startswith("arraybn")
        dashes: Any = (0, (4, 2)) if name == "arraybn, out=" else (0, (1, 1.2)) if name == COPYTO else "-"
        color = COLORS.get(name, GREY)
        axes.fill_between(elements, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(elements, middle, linestyle=dashes, color=color, linewidth=2.0 if ours else 1.5, label=name, gid=name)
    axes.set(xscale="log", yscale="log")
    axes.grid(axis="y", color="#ececec", linewidth=0.8)
    axes.set_title(f"{TITLES[what]}, along {axis}", loc="left", fontsize=10, weight="bold", color=INK)


def _label_ends(axes: Axes, rows: Sequence[str]) -> None:
    """Each line's name beside its end."""
    lines = {line.get_gid(): line for line in axes.get_lines() if line.get_gid() in rows}
    if not lines:
        return
    axes.figure.canvas.draw_idle()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(
        (float(to_axes.transform((line.get_xdata()[-1], line.get_ydata()[-1]))[1]), name)
        for name, line in lines.items()
    )
    for (_, name), height in zip(ends, _apart(np.asarray([end for end, _ in ends]), 0.065), strict=True):
        color = COLORS.get(name, GREY)
        axes.text(1.02, height, name, transform=axes.transAxes, va="center", color=color, fontsize=9, weight="bold")


# ---- The ladder ------------------------------------------------------------------------------------------------------


def draw_ladder(results: Sequence[Result], processor: str, path: Path) -> None:
    """What was measured, and what the bytes alone would take."""
    size = (12.0, 4.6)

    def fill(figure: Any) -> None:
        grid = figure.subplots(1, len(CASE.whats), sharey=True, squeeze=False)[0]
        figure.subplots_adjust(left=0.2, right=0.97, top=0.74, bottom=0.13, wspace=0.1)
        for axes, what in zip(grid, CASE.whats, strict=True):
            _draw_ladder(axes, [rung for rung in rungs(results[0]) if rung.what == what])
            axes.set_title(TITLES[what], loc="left", fontsize=10, weight="bold", color=INK)
        grid[0].set_yticks(range(len(STEPS)), [step.row for step in STEPS], color=INK)
        grid[0].set_ylim(len(STEPS) - 0.4, -0.6)

    subtitle = f"{processor}, {results[0].case}. Dot: measured; line: its bytes at the speed of {COPYTO}"
    _picture(path, size, "One idea a step", subtitle, fill)


def _draw_ladder(axes: Axes, found: Sequence[Any]) -> None:
    for height, rung in enumerate(found):
        axes.axhline(height, color="#e8e8e8", linewidth=0.8, zorder=0)
        ends = [value * 1e3 for value in (rung.predicted, rung.measured) if value is not None]
        axes.plot(ends, [height] * len(ends), color="#8cc5e8", linewidth=4, zorder=1)
        if rung.measured is not None:
            axes.plot(rung.measured * 1e3, height, "o", color=COLORS["arraybn"], markersize=8, zorder=3)
            text: Any = {"textcoords": "offset points", "xytext": (9, 0), "va": "center", "fontsize": 9}
            axes.annotate(f"{rung.measured * 1e3:.3g} ms", (max(ends), height), **text)
        if rung.predicted is not None:
            axes.plot(
                [rung.predicted * 1e3] * 2, (height - 0.3, height + 0.3), color="#003f66", linewidth=2.2, zorder=2
            )
    axes.set_xscale("log")
    low = min((v * 1e3 for rung in found for v in (rung.measured, rung.predicted) if v), default=1.0)
    high = max((v * 1e3 for rung in found for v in (rung.measured, rung.predicted) if v), default=10.0)
    axes.set_xlim(low / 2, high * 2)
    _plain_ticks(axes)
    axes.set_xlabel("milliseconds")

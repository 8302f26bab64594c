"""The picture of ``bench --device cuda``: for each dtype a panel per layout, how near everyone comes to the floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._plotting import GREY, INK
from ._bench_cases import LARGE_WHATS
from ._bench_clock import Result
from ._bench_cuda_cases import GpuCase
from ._bench_cuda_report import floors
from ._bench_figure import LAYOUT, _picture
from ._check_figure import COLORS as FAMILIES

Axes = Any  # matplotlib's: the library is imported only when a picture is drawn
Line = tuple[str, Result]  # what is done, and in which case

STYLES = {  # colour, mark, filled; the later ones lie below
    "arraybn fused": (FAMILIES["arraybn"], "o", True),
    "arraybn split": (FAMILIES["arraybn"], "D", False),
    "PyTorch": (FAMILIES["PyTorch"], "^", True),
    "PyTorch native": (FAMILIES["PyTorch"], "^", False),
    "JAX": (FAMILIES["JAX"], "v", True),
    "arraybn reference": ("#56b4e9", "s", True),
}
SHORT = {"forward": "forward", "backward": "backward", "eval": "evaluation"}
STEP, GAP = 0.27, 1.0  # inches for a line; lines between two things that are done, for the name of the second


def draw(results: Sequence[Result], device: str, speed: float | None, path: Path) -> bool:
    """Draw it into a PNG file, which is complete or not there at all; False if there is nothing to draw.

    Parameters
    ----------
    results : sequence of Result
        Of the table.
    device : str
        Where it was measured.
    speed : float or None
        Bytes a second of a copy there; without it there are no floors.
    path : Path
        Where to. A file that is there already is replaced once the new one is complete.
    """
    panels = _panels(results)
    if speed is None or not panels:
        return False
    dtypes, layouts = (list(dict.fromkeys(key[i] for key in panels)) for i in range(2))
    heights = [STEP * max(_height(panels.get((dtype, layout), [])) for layout in layouts) for dtype in dtypes]
    width = 13.0 if len(layouts) == 2 else 8.4
    top, bottom, between = 1.75, 0.75, 0.85  # inches
    size = (width, top + bottom + sum(heights) + between * (len(dtypes) - 1))

    def fill(figure: Any) -> None:
        grid = figure.subplots(len(dtypes), len(layouts), squeeze=False, height_ratios=heights)
        figure.subplots_adjust(
            left=1.95 / width,
            right=1 - 0.3 / width,
            top=1 - top / size[1],
            bottom=bottom / size[1],
            hspace=between / (sum(heights) / len(heights)),
            wspace=2.0 * len(layouts) / width,
        )
        for row, dtype in zip(grid, dtypes, strict=True):
            for axes, layout in zip(row, layouts, strict=True):
                if lines := panels.get((dtype, layout)):
                    _draw_panel(axes, lines, speed)
                    axes.set_title(_title(dtype, lines[0][1].case), loc="left", fontsize=10, color=INK, weight="bold")
                else:
                    axes.set_visible(False)
        _legend(figure, results, 1 - 0.98 / size[1])

    subtitle = f"{device}: of the time that a copy of the same bytes takes, if x is read once. Further right is faster"
    _picture(path, size, "How near batch norms come to the speed of memory", subtitle, fill)
    return True


def _panels(results: Sequence[Result]) -> dict[tuple[str, str], list[Line]]:
    """What has samples, by dtype and layout."""
    found: dict[tuple[str, str], list[Line]] = {}
    for what in LARGE_WHATS:
        for result in results:
            if any(cell.what == what and cell.seconds for cell in result.cells):
                found.setdefault((result.case.dtype, result.case.layout), []).append((what, result))
    return found


def _heights(lines: Sequence[Line]) -> list[float]:
    """Where each line is: those that do another thing than the last begin a gap below."""
    heights, y = [], 0.0
    for i, (what, _) in enumerate(lines):
        y += 0.0 if i == 0 else 1.0 if what == lines[i - 1][0] else 1.0 + GAP
        heights.append(y)
    return heights


def _height(lines: Sequence[Line]) -> float:
    return _heights(lines)[-1] + 2.2 if lines else 1.0


def _title(dtype: str, case: Any) -> str:
    return dtype if len(case.shape) == 2 else f"{dtype}, {LAYOUT[case.layout]}"


def _draw_panel(axes: Axes, lines: Sequence[Line], speed: float) -> None:
    """For each thing and shape a line, on it a mark for each contestant and a tick at the floor of two reads."""
    heights, highest = _heights(lines), 1.0
    for y, (what, result) in zip(heights, lines, strict=True):
        assert isinstance(result.case, GpuCase)
        one, two = floors(result.case, what, speed)
        assert one is not None
        assert two is not None
        axes.axhline(y, color="#e8e8e8", linewidth=0.8, zorder=0)
        axes.plot([one / two] * 2, (y - 0.32, y + 0.32), color="#9a9a9a", linewidth=1.4, zorder=1)
        for order, (name, (color, marker, filled)) in enumerate(STYLES.items()):
            cell = result.cell(name, what)
            if cell is None or not cell.seconds:
                continue
            low, middle, high = (one / value for value in cell.quartiles)
            highest = max(highest, low)
            style: Any = {"color": color, "zorder": 10 - order}
            axes.plot((low, high), (y, y), linewidth=1.6, alpha=0.6, **style)
            face = color if filled else "white"
            axes.plot(middle, y, marker, markersize=6.5, markeredgewidth=1.4, markerfacecolor=face, **style)
    labels = ["×".join(map(str, result.case.shape)) for _, result in lines]
    axes.set_yticks(heights, labels, color=INK)
    axes.set_ylim(heights[-1] + 0.7, -1.5)
    axes.set_xlim(0, max(1.08, 1.05 * highest))
    axes.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for what in dict.fromkeys(what for what, _ in lines):
        first = next(y for y, (one, _) in zip(heights, lines, strict=True) if one == what)
        axes.text(
            0.008, first - 0.86, SHORT[what], color=GREY, fontsize=9, va="center", transform=axes.get_yaxis_transform()
        )


def _legend(figure: Any, results: Sequence[Result], height: float) -> None:
    from matplotlib.lines import Line2D

    shown = {cell.row for result in results for cell in result.cells if cell.seconds}
    handles = [
        Line2D(
            [], [], color=color, marker=marker, linestyle="", markerfacecolor=color if filled else "white", label=name
        )
        for name, (color, marker, filled) in STYLES.items()
        if name in shown
    ]
    handles += [
        Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label="floor: read once"),
        Line2D(
            [], [], color="#9a9a9a", marker="|", markersize=10, markeredgewidth=1.6, linestyle="", label="read twice"
        ),
    ]
    columns = len(handles) if figure.get_figwidth() > 10 else 4
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.022, height), ncols=columns, frameon=False)

"""The picture of ``python -m arraybn demo --data-parallel``: does it train as one process does?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._plotting import GREY, INK, STYLE, Axes, save
from ._demo_figure import COLOR, _write_heading

if TYPE_CHECKING:
    from ._demo_ranks import Training

# One process is a broad line that synchronized training, dashed, is drawn on top of.
LINES: Any = (
    {"color": "#a9cfe8", "linewidth": 7},
    {"color": "#003f66", "linewidth": 1.8, "linestyle": (0, (3, 2))},
    {"color": COLOR[False], "linewidth": 1.8},
)


def draw(trainings: Sequence[Training], ranks: int, each: int, path: Path) -> None:
    """Draw losses, accuracies and differences into a PNG file, which is complete or not there at all.

    Parameters
    ----------
    trainings : sequence of Training
        One process, synchronized, local.
    ranks, each : int
        How many ranks, and how many images of each in a step.
    path : Path
        Where to. A file that is there already is replaced once the new one is complete.
    """
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure

    with rc_context({**rcParamsDefault, **STYLE}):
        figure = Figure(figsize=(12.4, 4.6), dpi=120, facecolor="white")
        row = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.045, right=0.985, top=0.66, bottom=0.11, wspace=0.2)
        figure.text(0.025, 0.915, "Training over MPI ranks", fontsize=17, weight="bold")
        text = f"Handwritten digits, {ranks} ranks with {each} images each in a step, against one process with all"
        figure.text(0.025, 0.85, f"{text} {ranks * each}: the same weights at the start, the same images", color=GREY)
        _draw_curves(row[0], "training loss", [training.losses for training in trainings])
        accuracies = [100 * np.asarray(training.accuracies) for training in trainings]
        _draw_curves(row[1], "test accuracy [%]", accuracies)
        _draw_apart(row[2], trainings)
        _write_legend(figure, trainings, ranks, each)
        save(figure, path)


def _draw_curves(axes: Axes, heading: str, curves: Sequence[Any]) -> None:
    for values, line in zip(curves, LINES, strict=True):
        axes.plot(range(1, len(values) + 1), values, **line)
    _finish(axes, heading, len(curves[0]))


def _draw_apart(axes: Axes, trainings: Sequence[Training]) -> None:
    """How far each is from one process, on a log scale that has room for rounding."""
    for training, line in list(zip(trainings, LINES, strict=True))[1:]:
        axes.plot(range(1, len(training.apart) + 1), np.maximum(training.apart, 1e-17), **line)
    axes.set(yscale="log", ylim=(1e-17, 30))
    axes.axhline(2**-52, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)
    words: Any = {"textcoords": "offset points", "color": GREY, "fontsize": 8.5}
    axes.annotate("rounding of 1 in float64", (1, 2**-52), (3, -11), **words)
    _finish(axes, "difference of parameters from one process", len(trainings[0].losses))


def _finish(axes: Axes, heading: str, epochs: int) -> None:
    axes.set(xlim=(1, max(epochs, 2)), xlabel="epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _write_heading(axes, heading, INK)


def _write_legend(figure: Any, trainings: Sequence[Training], ranks: int, each: int) -> None:
    from matplotlib.lines import Line2D

    from ._demo_ranks import title

    handles = [
        Line2D([], [], label=title(training, ranks, each), **line)
        for training, line in zip(trainings, LINES, strict=True)
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.018, 0.83), ncols=3, frameon=False, handlelength=3
    )

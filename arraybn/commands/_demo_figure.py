"""The picture of ``python -m arraybn demo``: three questions, one row each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .._plotting import GREY, INK, STYLE, Array, Axes, save, spread_apart
from ._demo_training import Run, Statistics, network_name

# Okabe and Ito's blue and vermilion, which colour-blind readers tell apart; a curve is darker the higher its rate.
COLOR = {True: "#0072b2", False: "#d55e00"}
SHADES = {
    True: ("#8cc5e8", "#3d9bd4", "#0072b2", "#003f66"),
    False: ("#f5b78a", "#ec8a45", "#d55e00", "#7d3700"),
}
LAYER_COLORS = ("#3d9bd4", "#003f66")
LAYER_LABELS = {"after Conv2d": ((9, -2), "left"), "after Linear": ((4, -16), "right")}  # offset in points


def draw(runs: Sequence[Run], best: Run, statistics: Sequence[Statistics], path: Path) -> None:
    """Draw the picture into a PNG file, which is complete or not there at all.

    Parameters
    ----------
    runs : sequence of Run
        All trainings, with and without batch norm.
    best : Run
        The run whose network `statistics` describe.
    statistics : sequence of Statistics
        One for each batch norm of that network.
    path : Path
        The file. An existing file is replaced once the new one is complete.
    """
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure

    with rc_context({**rcParamsDefault, **STYLE}):
        figure = Figure(figsize=(10, 12), dpi=160, facecolor="white")
        rows = figure.subplots(3, 2)
        figure.subplots_adjust(left=0.07, right=0.885, top=0.842, bottom=0.05, hspace=0.8, wspace=0.36)
        figure.text(0.07, 0.966, "Batch normalization on handwritten digits", fontsize=20, weight="bold")
        same = "the same initial weights and the same batches, with and without batch norm"
        figure.text(0.07, 0.946, f"One small convolutional network, {same}", color=GREY)
        _draw_losses(rows[0], runs)
        _draw_spreads(rows[1], runs)
        _draw_statistics(rows[2], best, statistics)
        save(figure, path)


# ---- Row 1: the loss of every run ----


def _draw_losses(row: Sequence[Axes], runs: Sequence[Run]) -> None:
    subtitle = "Training loss at each learning rate → accuracy on the test digits after the last epoch"
    _write_title(row, "Does it learn?", subtitle)
    lowest = min(_losses(run).min() for run in runs)
    epochs = max(len(_losses(run)) - 1 for run in runs)
    for axes, batch_norm in zip(row, (True, False), strict=True):
        axes.set(xlim=(0, max(epochs, 1)), ylim=(min(0.7 * lowest, 0.1), 4), yscale="log", xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.axhline(np.log(10), color=GREY, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)
        _draw_curves(axes, [run for run in runs if run.batch_norm == batch_norm], SHADES[batch_norm])
    _share_values(row)
    style = {"ha": "right", "color": GREY, "fontsize": 8.5}
    row[0].annotate("guessing", (epochs, np.log(10)), (0, 3), textcoords="offset points", **style)


def _draw_curves(axes: Axes, runs: Sequence[Run], colors: Sequence[str]) -> None:
    ends = []
    for run, color in zip(runs, colors, strict=True):
        losses = _losses(run)
        axes.plot(losses, color=color, linewidth=2)
        axes.plot(len(losses) - 1, losses[-1], "o", color=color, markersize=5, clip_on=False)
        ends.append((losses[-1], f"{run.lr:g}", f"→ {run.outcome}"))
    _label_ends(axes, ends)


def _losses(run: Run) -> Array:
    """Return the loss before the first step, then the mean loss of each epoch."""
    return np.asarray([run.history.losses[0], *run.history.epoch_losses])


# ---- Row 2: the distribution of the input of the hidden ReLU, over time ----


def _draw_spreads(row: Sequence[Axes], runs: Sequence[Run]) -> None:
    lr = min((run for run in runs if not run.batch_norm), key=lambda run: run.final_loss).lr
    subtitle = (
        f"Percentiles over units and images at learning rate {lr:g}, where the network without batch norm did best"
    )
    _write_title(row, "What enters the hidden ReLU?", subtitle)
    shown = {run.batch_norm: _thinned(np.asarray(run.history.spreads)) for run in runs if run.lr == lr}
    reach = 1.1 * max(np.nanmax(np.abs(spreads), initial=1) for _, spreads in shown.values())
    for axes, batch_norm in zip(row, (True, False), strict=True):
        steps, (p5, p25, p50, p75, p95) = shown[batch_norm]
        axes.set(xscale="log", xlim=(1, steps[-1]), xlabel="step", ylim=(-reach, reach))
        axes.fill_between(steps, p5, p95, color=COLOR[batch_norm], alpha=0.18, linewidth=0)
        axes.fill_between(steps, p25, p75, color=COLOR[batch_norm], alpha=0.36, linewidth=0)
        axes.plot(steps, p50, color=COLOR[batch_norm], linewidth=2)
        ends = zip((p5, p25, p50, p75, p95), ("5%", "25%", "median", "75%", "95%"), strict=True)
        _label_ends(axes, [(band[-1], name, "") for band, name in ends])
    _share_values(row)


def _thinned(spreads: Array) -> tuple[Any, Any]:
    """Return steps that are evenly spaced on a log scale, and the mean percentiles (5, steps) around each step."""
    edges = np.unique(np.geomspace(1, len(spreads) + 1, 60).round().astype(int))
    means = [spreads[low - 1 : high - 1].mean(axis=0) for low, high in pairwise(edges)]
    return edges[:-1], np.asarray(means).T


# ---- Row 3: running statistics against true ones ----


def _draw_statistics(row: Sequence[Axes], best: Run, statistics: Sequence[Statistics]) -> None:
    subtitle = f"Each dot is one channel of the saved network, after its last step at learning rate {best.lr:g}"
    _write_title(row, "Do the running statistics tell the truth?", subtitle)
    row[1].set(xscale="log", yscale="log")
    for (layer, true), color, place in zip(statistics, LAYER_COLORS, LAYER_LABELS, strict=True):
        dots = {"linestyle": "", "marker": "o", "markersize": 6, "color": color, "markeredgecolor": "white"}
        row[0].plot(true.mean, layer.running_mean, **dots, markeredgewidth=0.6, zorder=-layer.num_features)
        row[1].plot(true.var(1), layer.running_var, **dots, markeredgewidth=0.6)
        corner = np.max(true.var(1)), np.min(np.asarray(layer.running_var))  # of the dots, the lower right one
        offset, align = LAYER_LABELS[place]
        row[1].annotate(place, corner, offset, textcoords="offset points", color=color, ha=align)
    apart = [np.abs(layer.running_mean - true.mean) / np.sqrt(true.var(1)) for layer, true in statistics]
    ratio = [np.abs(layer.running_var / true.var(1) - 1) for layer, true in statistics]
    _finish_comparison(row[0], "mean", f"at most {np.max(np.concatenate(apart)):.2f} standard deviations apart")
    _finish_comparison(row[1], "var", f"at most {np.max(np.concatenate(ratio)):.0%} apart")


def _finish_comparison(axes: Axes, name: str, verdict: str) -> None:
    """Give both axes the same range, and draw the diagonal and the texts."""
    low, high = min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot((low, high), (low, high), color="#b0b0b0", linewidth=0.8, zorder=-1000)
    axes.set(xlim=(low, high), ylim=(low, high), xlabel=f"{name} over the whole training set")
    write_heading(axes, f"running_{name}", INK)
    _write_plain_numbers(axes)
    axes.text(0.04, 0.93, verdict, transform=axes.transAxes, va="top")


# ---- Words ----


def _write_title(row: Sequence[Axes], title: str, subtitle: str) -> None:
    box, figure = row[0].get_position(), row[0].figure
    figure.text(box.x0, box.y1 + 0.058, title, fontsize=13, weight="bold")
    figure.text(box.x0, box.y1 + 0.041, subtitle, color=GREY)


def write_heading(axes: Axes, text: str, color: str) -> None:
    axes.set_title(text, loc="left", color=color, fontsize=10.5, weight="bold", pad=10)


def _share_values(row: Sequence[Axes]) -> None:
    """Write the headings of the two networks, and the numbers of the shared vertical axis once."""
    for axes, batch_norm in zip(row, (True, False), strict=True):
        write_heading(axes, network_name(batch_norm), COLOR[batch_norm])
        _write_plain_numbers(axes)
    row[1].tick_params(labelleft=False)


def _write_plain_numbers(axes: Axes) -> None:
    """Write 0.1 rather than 10⁻¹ on log axes, and no number between powers of ten."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write two texts beside the end of each curve, moved apart where texts would touch."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = np.clip([to_axes.transform((axes.get_xlim()[1], value))[1] for value, _, _ in ends], 0, 1)
    for index, height in zip(np.argsort(heights), spread_apart(np.sort(heights), 0.08), strict=True):
        for x, text in zip((1.03, 1.13), ends[index][1:], strict=True):
            axes.text(x, height, text, transform=axes.transAxes, va="center")

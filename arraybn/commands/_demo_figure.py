"""The picture of ``python -m arraybn demo``: three questions, one row each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .._plotting import GREY, INK, Array, Axes, draw_picture
from ..reference import Moments
from ._demo_training import Run, batch_norms

# Okabe and Ito's blue and vermilion, which colour-blind readers tell apart; a curve is darker the higher its rate.
SHADES = {
    True: ("#8cc5e8", "#3d9bd4", "#0072b2", "#003f66"),
    False: ("#f5b78a", "#ec8a45", "#d55e00", "#7d3700"),
}
DOTTED: Any = {"color": GREY, "linewidth": 0.8, "linestyle": (0, (1, 3)), "zorder": 0}
BESIDE: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "handlelength": 1.2, "frameon": False}  # of a legend


def draw(runs: Sequence[Run], best: Run, true: Sequence[Moments], path: Path) -> None:
    """Draw the picture into a PNG file; `true` are the moments that the batch norms of the best run should have."""
    lr = min((run for run in runs if not run.batch_norm), key=lambda run: run.final_loss).lr
    questions = {
        "Does it learn?": "Training loss at each learning rate → accuracy on the test digits after the last epoch",
        "What enters the hidden ReLU?": (
            f"Percentiles over units and images at learning rate {lr:g}, where the network without batch norm did best"
        ),
        "Do the running statistics tell the truth?": (
            f"Each dot is one channel of the saved network, after its last step at learning rate {best.lr:g}"
        ),
    }

    def fill(figure: Any) -> None:
        figure.set_layout_engine("constrained", rect=(0.02, 0.01, 0.96, 0.91), wspace=0.04)
        rows = figure.subfigures(3, 1, hspace=0.04)
        for row, (title, subtitle) in zip(rows, questions.items(), strict=True):
            row.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=13, weight="bold", linespacing=1.6)
            row.text(0.01, 0.865, subtitle, color=GREY)
        _draw_losses(rows[0].subplots(1, 2, sharey=True), runs)
        _draw_spreads(rows[1].subplots(1, 2, sharey=True), [run for run in runs if run.lr == lr])
        _draw_statistics(rows[2].subplots(1, 2), best, true)

    same = "the same initial weights and the same batches, with and without batch norm"
    title = "Batch normalization on handwritten digits"
    draw_picture(path, (10, 12), title, f"One small convolutional network, {same}", fill)


def _draw_losses(row: Sequence[Axes], runs: Sequence[Run]) -> None:
    lowest = min(min(run.losses) for run in runs)
    for axes, (batch_norm, shades) in zip(row, SHADES.items(), strict=True):
        shown = [run for run in runs if run.batch_norm == batch_norm]
        for run, color in zip(shown, shades, strict=True):
            label = f"{run.lr:g} → {run.outcome}"
            axes.plot(run.losses, label=label, color=color, linewidth=2, marker="o", markevery=[-1], clip_on=False)
        axes.axhline(np.log(10), label="guessing", **DOTTED)
        axes.set(xlim=0, ylim=(min(0.7 * lowest, 0.1), 4), yscale="log", xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(**BESIDE)
        write_heading(axes, shown[0].name, shades[2])


def _draw_spreads(row: Sequence[Axes], runs: Sequence[Run]) -> None:
    reach = 0.0
    for axes, run in zip(row, runs, strict=True):
        color = SHADES[run.batch_norm][2]
        steps, (p5, p25, p50, p75, p95) = _thinned(np.asarray(run.spreads))
        axes.fill_between(steps, p5, p95, label="5% to 95%", color=color, alpha=0.18, linewidth=0)
        axes.fill_between(steps, p25, p75, label="25% to 75%", color=color, alpha=0.36, linewidth=0)
        axes.plot(steps, p50, label="median", color=color, linewidth=2)
        reach = max(reach, 1.1 * np.nanmax(np.abs([p5, p95]), initial=1))
        axes.set(xscale="log", xlim=(1, steps[-1]), xlabel="step", ylim=(-reach, reach))
        axes.legend(**BESIDE)
        write_heading(axes, run.name, color)


def _thinned(spreads: Array) -> tuple[Array, Array]:
    """Return steps that are evenly spaced on a log scale, and the mean percentiles (5, steps) around each step."""
    edges = np.unique(np.geomspace(1, len(spreads) + 1, 60).round().astype(int))
    means = [spreads[low - 1 : high - 1].mean(axis=0) for low, high in pairwise(edges)]
    return edges[:-1], np.asarray(means).T


def _draw_statistics(row: Sequence[Axes], best: Run, true: Sequence[Moments]) -> None:
    """Draw running statistics against true ones, on equal axes with the diagonal."""
    layers, colors, names = batch_norms(best.network), ("#3d9bd4", "#003f66"), ("after Conv2d", "after Linear")
    for layer, exact, color, name in zip(layers, true, colors, names, strict=True):
        style = {"color": color, "label": name, "edgecolor": "white", "linewidth": 0.6, "zorder": -layer.num_features}
        row[0].scatter(exact.mean, layer.running_mean, **style)
        row[1].scatter(exact.var(1), layer.running_var, **style)
    pairs = list(zip(layers, true, strict=True))
    apart = max(np.max(np.abs(layer.running_mean - exact.mean) / np.sqrt(exact.var(1))) for layer, exact in pairs)
    ratio = max(np.max(np.abs(layer.running_var / exact.var(1) - 1)) for layer, exact in pairs)
    row[1].set(xscale="log", yscale="log")
    verdicts = f"at most {apart:.2f} standard deviations apart", f"at most {ratio:.0%} apart"
    for axes, name, verdict in zip(row, ("mean", "var"), verdicts, strict=True):
        low, high = np.min([axes.get_xlim(), axes.get_ylim()]), np.max([axes.get_xlim(), axes.get_ylim()])
        axes.plot((low, high), (low, high), color="#b0b0b0", linewidth=0.8, zorder=-1000)
        axes.set(xlim=(low, high), ylim=(low, high), xlabel=f"{name} over the whole training set")
        axes.legend(loc="upper left", frameon=False)
        write_heading(axes, f"running_{name}: {verdict}", INK)


def write_heading(axes: Axes, text: str, color: str) -> None:
    """Write the heading, and numbers such as 0.1, not 10⁻¹, at the powers of ten of log axes."""
    axes.set_title(text, loc="left", color=color, fontsize=10.5, weight="bold")
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")

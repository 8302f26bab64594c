"""The picture of ``python -m arraybn bench sync``: what was measured, the model of it, and the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._plotting import GREY, INK
from . import _bench_sync_model as model
from ._bench_figure import COLORS, _picture
from ._bench_sync_ranks import BACKWARD, FORWARD, GATHER, OURS

Axes = Any  # matplotlib's: the library is imported only when a picture is drawn

CHANNELS = {256: (0, ()), 2048: (0, (4, 2))}  # those that are drawn, and how
COLOR = {OURS: COLORS["arraybn"], GATHER: COLORS["PyTorch"], model.RING: "#999999"}


def draw(jobs: Sequence[Mapping[str, Any]], fitted: model.Model, processor: str, path: Path) -> None:
    """Draw three panels into a PNG file, which is complete or not there at all.

    Parameters
    ----------
    jobs : sequence of mapping
        What the ranks have found, a job for each number of them.
    fitted : Model
        The model of it.
    processor : str
        Where it was measured.
    path : Path
        Where to. A file that is there already is replaced once the new one is complete.
    """

    def fill(figure: Any) -> None:
        row = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.055, right=0.985, top=0.7, bottom=0.12, wspace=0.24)
        _draw_measured(row[0], jobs, fitted)
        _draw_model(row[1], fitted)
        _draw_bytes(row[2], jobs)
        _legend(figure)

    subtitle = f"{processor}, {fitted.cores} cores, {jobs[0]['mpi']}. Forward and backward exchange of one layer"
    _picture(path, (13.0, 5.0), "What synchronizing over ranks costs", subtitle, fill)


def _draw_measured(axes: Axes, jobs: Sequence[Mapping[str, Any]], fitted: model.Model) -> None:
    """Dots with the fit as a line."""
    from ._bench_sync import fastest

    found = [job for job in jobs if job["ranks"] > 1]
    ranks = [job["ranks"] for job in found]
    for channels, dashes in CHANNELS.items():
        for scheme in (OURS, GATHER):
            medians = [
                sum(
                    fastest(row) * 1e6
                    for row in job["rows"]
                    if (row["channels"], row["scheme"]) == (channels, scheme) and row["what"] in (FORWARD, BACKWARD)
                )
                for job in found
            ]
            lines = [fitted.seconds(scheme, count, channels, cores=fitted.cores) * 1e6 for count in ranks]
            axes.plot(ranks, lines, color=COLOR[scheme], linestyle=dashes, linewidth=1.2, alpha=0.6)
            axes.plot(ranks, medians, "o" if channels == 256 else "s", color=COLOR[scheme], markersize=6)
    _finish(axes, "measured, ranks share cores [µs]", ranks)


def _draw_model(axes: Axes, fitted: model.Model) -> None:
    for channels, dashes in CHANNELS.items():
        for scheme in model.SCHEMES:
            values = [fitted.seconds(scheme, ranks, channels) * 1e6 for ranks in model.RANKS]
            axes.plot(model.RANKS, values, color=COLOR[scheme], linestyle=dashes, linewidth=2)
    axes.set_facecolor("#f6f6f2")
    axes.text(0.04, 0.93, "MODEL, not measured", transform=axes.transAxes, va="top", color=INK, weight="bold")
    axes.text(0.04, 0.86, "o + rounds·α + bytes·β", transform=axes.transAxes, va="top", color=GREY)
    _finish(axes, "model, a core for each rank [µs]", model.RANKS[::2])


def _draw_bytes(axes: Axes, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Counted as far as there were ranks, then by the formula."""
    ranks = [2**power for power in range(1, 15)]
    for channels, dashes in CHANNELS.items():
        constant = model.effort(OURS, FORWARD, 2, channels).nbytes
        axes.plot(ranks, [constant for _ in ranks], color=COLOR[OURS], linestyle=dashes, linewidth=2)
        gathered = [count * 4 * (2 * channels + 1) for count in ranks]
        axes.plot(ranks, gathered, color=COLOR[GATHER], linestyle=dashes, linewidth=2)
        for job in jobs:
            for row in job["rows"]:
                if row["channels"] == channels and row["what"] == FORWARD:
                    mark = "o" if channels == 256 else "s"
                    axes.plot(job["ranks"], row["traffic"]["received"], mark, color=COLOR[row["scheme"]], markersize=6)
    _finish(axes, "bytes that a rank receives, forward", ranks[::3])


def _finish(axes: Axes, heading: str, ranks: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    axes.set(xscale="log", yscale="log", xlabel="ranks")
    axes.set_xticks(ranks, [f"{count:,}" for count in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_title(heading, loc="left", fontsize=10, weight="bold", color=INK)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D

    names = {OURS: "arraybn", GATHER: "all-gather, log₂P rounds", model.RING: "all-gather on a ring"}
    handles = [Line2D([], [], color=COLOR[scheme], linewidth=2, label=name) for scheme, name in names.items()]
    handles += [
        Line2D([], [], color=INK, linestyle=dashes, marker="o" if c == 256 else "s", label=f"C = {c}")
        for c, dashes in CHANNELS.items()
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.022, 0.835), ncols=5, frameon=False, handlelength=3.2
    )

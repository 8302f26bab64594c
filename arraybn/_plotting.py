"""The style of all pictures. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Axes = Any  # matplotlib's
Figure = Any

INK, GREY, LIGHT = "#222222", "#6e6e6e", "#e8e8e8"
FAMILIES = {  # Okabe and Ito's colours, which colour-blind readers tell apart
    "arraybn": "#0072b2",
    "NumPy": GREY,
    "PyTorch": "#d55e00",
    "JAX": "#009e73",
    "TensorFlow": "#e69f00",
    "ONNX Runtime": "#cc79a7",
}
BOLD: Any = {"loc": "left", "fontsize": 10, "color": INK, "weight": "bold"}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.axisbelow": True,
    "axes.edgecolor": "#a0a0a0",
    "axes.labelcolor": GREY,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
}


def draw_picture(path: Path, size: tuple[float, float], title: str, subtitle: str, fill: Callable[[Any], None]) -> None:
    """Draw a figure in the common style, filled by `fill`, into a PNG file."""
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context({**rcParamsDefault, **STYLE}):
        inch = 1 / size[1]
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1, rect=(0, 0, 1, 1 - 0.85 * inch))
        figure = Figure(figsize=size, dpi=160, facecolor="white", layout=layout)
        figure.text(0.02, 1 - 0.2 * inch, title, va="top", fontsize=17, weight="bold")
        figure.text(0.02, 1 - 0.58 * inch, subtitle, va="top", color=GREY)
        fill(figure)
        save(figure, path)


def add_legend(figure: Figure, **options: Any) -> None:
    """Write below the axes what each of their labels looks like, once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower left", frameon=False, **options)


def plain_numbers(axis: Any) -> None:
    """Write 1, 2, 5, 10 … on a logarithmic axis as they are."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))  # more would overlap
    axis.set_major_formatter("{x:,.10g}")
    axis.set_minor_locator(LogLocator(subs=()))


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file that is complete or not there at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

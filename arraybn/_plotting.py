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
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
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

    with rc_context({**rcParamsDefault, **STYLE}):
        figure = Figure(figsize=size, dpi=160, facecolor="white")
        height = size[1]
        figure.text(0.03, 1 - 0.45 / height, title, fontsize=17, weight="bold")
        figure.text(0.03, 1 - 0.75 / height, subtitle, color=GREY)
        fill(figure)
        save(figure, path)


def spread_apart(heights: Array, gap: float) -> Array:
    """Push ascending heights away from their neighbours until there is the gap between them."""
    for _ in range(100):
        overlap = np.maximum(gap - np.diff(heights), 0) / 2
        heights = heights + np.append(0, overlap) - np.append(overlap, 0)
    return heights


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file that is complete or not there at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

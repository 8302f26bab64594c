"""The kernels of ``fused.py``, with clusters of blocks wherever a channel fits into the shared memory of a cluster.

``kernels="cuda_cluster"`` asks for these: they serve the cases for which no GPU has been measured yet, backward and
float64. What clusters cannot take goes the ways of ``fused.py``.
"""

from __future__ import annotations

import functools

from ..._arrays.namespaces import Array
from . import (
    affine,
    affine2,
    affine3,
    backward_by,
    dots,
    evaluate,
    forward_by,
    moments,
    update_running_stats,
    widened,
)
from .fused import FusedArguments, launches
from .training import Trainer

__all__ = [
    "affine",
    "affine2",
    "affine3",
    "backward",
    "dots",
    "evaluate",
    "forward",
    "moments",
    "trainer",
    "update_running_stats",
    "widened",
]

trainer = functools.partial(Trainer, functools.partial(launches, clusters=True))


class ClusterArguments(FusedArguments):
    """The arguments of a call that takes clusters where they fit."""

    __slots__ = ()
    clusters = True


def forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """(E1, E3) mean, m2 and rstd (C,) of x (N, C, S), and y = weight·xhat + bias."""
    return forward_by(ClusterArguments, x, weight, bias, eps, out)


def backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """(E5, E6) dx, and dweight and dbias (C,), from dy and x (N, C, S)."""
    return backward_by(ClusterArguments, dy, x, mean, rstd, weight, out)

"""The kernels of ``fused.py``, with clusters of blocks wherever a channel fits into the shared memory of a cluster.

``kernels="cuda_cluster"`` asks for these: clusters then serve the cases, too, for which no GPU has been measured yet.
What clusters cannot take goes the ways of ``fused.py``.
"""

from __future__ import annotations

import functools
from typing import Any

from ..._arrays.namespaces import Array
from .. import cuda
from . import fused, launch
from .training import Launch, Trainer

MOST = 16  # blocks of a cluster, where the GPU holds so many; otherwise 8


class ClusterArguments(fused.FusedArguments):
    """The arguments of a call that takes clusters where they fit."""

    __slots__ = ()
    clusters = MOST


moments, dots, affine, affine2, affine3 = cuda.moments, cuda.dots, cuda.affine, cuda.affine2, cuda.affine3
evaluate, update_running_stats, widened = cuda.evaluate, cuda.update_running_stats, cuda.widened
MASKS, masked_forward, masked_backward = fused.MASKS, fused.masked_forward, fused.masked_backward


def launches(*given: Any) -> tuple[Launch, ...]:
    """Return the launches of a forward or a backward, as `fused.launches` does."""
    return fused.launches(*given, clusters=fused.allowed(launch.launcher(), MOST))


trainer = functools.partial(Trainer, launches)


def forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """(E1, E3) mean, m2 and rstd (C,) of x (N, C, S), and y = weight·xhat + bias."""
    return cuda.forward_by(ClusterArguments, x, weight, bias, eps, out)


def backward(
    dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """(E5, E6) dx, and dweight and dbias (C,), from dy and x (N, C, S)."""
    return cuda.backward_by(ClusterArguments, dy, x, mean, rstd, weight, out)

"""The kernels of ``fused.py``, with all that is built for Hopper and later wherever that fits.

``kernels="cuda_cluster"`` asks for these. Clusters of blocks and, for maps of channels-first data, the ring of bulk
copies then serve the cases, too, for which no GPU has been measured yet. What they cannot take goes the ways of
``fused.py``.
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
    """The arguments of a call that takes clusters, and the ring for maps, where they fit."""

    __slots__ = ()
    clusters = MOST
    ring = True


moments, dots, update_running_stats, widened = cuda.moments, cuda.dots, cuda.update_running_stats, cuda.widened
affine, affine2, affine3, evaluate = (
    functools.partial(sweep, ClusterArguments)
    for sweep in (cuda.affine_by, cuda.affine2_by, cuda.affine3_by, cuda.evaluate_by)
)
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

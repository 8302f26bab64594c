"""The kernels of ``fused.py``, with all that is built for Hopper and later wherever that fits.

``kernels="cuda_cluster"`` asks for these. Clusters of blocks and, for maps of channels-first data, the ring of bulk
copies then serve the cases, too, for which no GPU has been measured yet. What they cannot take goes the ways of
``fused.py``.
"""

from __future__ import annotations

import functools
from typing import Any

from .. import cuda
from . import fused, launch
from .training import Launch, Trainer

MOST = 16  # blocks of a cluster, where the GPU holds so many; otherwise 8


class ClusterArguments(fused.FusedArguments):
    """The arguments of a call that takes clusters, and the ring for maps, where they fit."""

    __slots__ = ()
    clusters = MOST
    ring = True


_cluster = cuda.Sweeps(ClusterArguments)
moments, dots, affine, affine2 = _cluster.moments, _cluster.dots, _cluster.affine, _cluster.affine2
affine3, forward, backward, evaluate = _cluster.affine3, _cluster.forward, _cluster.backward, _cluster.evaluate
masked_forward, masked_backward = _cluster.masked_forward, _cluster.masked_backward
MASKS, update_running_stats, widened = cuda.MASKS, cuda.update_running_stats, cuda.widened


def launches(*given: Any) -> tuple[Launch, ...]:
    """Return the launches of a forward or a backward, as `fused.launches` does."""
    return fused.launches(*given, clusters=fused.allowed(launch.launcher(), MOST))


trainer = functools.partial(Trainer, launches)

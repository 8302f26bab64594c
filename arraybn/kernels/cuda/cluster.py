"""The kernels of ``fused.py``, with clusters of blocks wherever a channel fits into the shared memory of a cluster.

``kernels="cuda_cluster"`` asks for these: clusters then serve the cases, too, for which no GPU has been measured yet.
What clusters cannot take goes the ways of ``fused.py``.
"""

from __future__ import annotations

import functools

from .. import cuda
from . import fused
from .training import Trainer


class ClusterArguments(fused.FusedArguments):
    """The arguments of a call that takes clusters where they fit."""

    __slots__ = ()
    clusters = True


moments, dots, affine, affine2, affine3 = cuda.moments, cuda.dots, cuda.affine, cuda.affine2, cuda.affine3
evaluate, update_running_stats, widened = cuda.evaluate, cuda.update_running_stats, cuda.widened
MASKS, masked_forward, masked_backward = fused.MASKS, fused.masked_forward, fused.masked_backward
forward = functools.partial(cuda.forward_by, ClusterArguments)
backward = functools.partial(cuda.backward_by, ClusterArguments)
trainer = functools.partial(Trainer, functools.partial(fused.launches, clusters=True))

"""arraybn: batch normalization that people can read, trust and run anywhere."""

from . import interchange, network, testing
from ._version import __version__ as __version__
from .checkpoint import load, save
from .functional import batch_norm, batch_norm_backward
from .kernels.threads import get_num_threads, set_num_threads
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from .modules import Module, Parameter, Sequential
from .reference import Moments
from .statistics import moments, pool, update_running_stats
from .sync import RankLostError, SyncError, SyncTimeoutError, average_gradients, broadcast_state

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Module",
    "Moments",
    "Parameter",
    "RankLostError",
    "Sequential",
    "SyncBatchNorm",
    "SyncError",
    "SyncTimeoutError",
    "average_gradients",
    "batch_norm",
    "batch_norm_backward",
    "broadcast_state",
    "get_num_threads",
    "interchange",
    "load",
    "moments",
    "network",
    "pool",
    "save",
    "set_num_threads",
    "testing",
    "update_running_stats",
]

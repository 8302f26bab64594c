"""arraybn: batch normalization that people can read, trust and run anywhere."""

from . import interchange, network, testing
from ._version import __version__ as __version__
from .checkpoint import load, save
from .derivatives import batch_norm_double_backward, batch_norm_jvp
from .functional import batch_norm, batch_norm_backward, batch_norm_sums
from .kernels.results import free_memory, set_memory_limit
from .kernels.threads import get_num_threads, set_num_threads
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm, fold
from .modules import Module, Parameter, Sequential, inference_mode
from .recompute import recompute_running_stats
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
    "batch_norm_double_backward",
    "batch_norm_jvp",
    "batch_norm_sums",
    "broadcast_state",
    "fold",
    "free_memory",
    "get_num_threads",
    "inference_mode",
    "interchange",
    "load",
    "moments",
    "network",
    "pool",
    "recompute_running_stats",
    "save",
    "set_memory_limit",
    "set_num_threads",
    "testing",
    "update_running_stats",
]

"""Tools for users to check *their* batch norm: an exact oracle, batches, comparisons, and `check_batch_norm` for all.

`strategies` needs hypothesis (extra ``test``) and is imported at its first use; the other modules need NumPy only
(and ml_dtypes for bfloat16).
"""

from __future__ import annotations

import importlib
from typing import Any

from .checking import AccuracyError, BatchNormError, Failure, Verdict, check_batch_norm
from .close import assert_close, check_vjp
from .oracle import (
    Exact,
    ExactDouble,
    exact_batch_norm,
    exact_double_backward,
    exact_jvp,
    exact_moments,
    ulp,
    worst,
)
from .scenarios import Batch, named_batches
from .threads import ThreadComm

__all__ = [
    "AccuracyError",
    "Batch",
    "BatchNormError",
    "Exact",
    "ExactDouble",
    "Failure",
    "ThreadComm",
    "Verdict",
    "assert_close",
    "check_batch_norm",
    "check_vjp",
    "exact_batch_norm",
    "exact_double_backward",
    "exact_jvp",
    "exact_moments",
    "named_batches",
    "ulp",
    "worst",
]


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module(f"{__name__}.strategies")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

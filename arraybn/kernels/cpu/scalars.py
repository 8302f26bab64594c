"""The array API for one number: the namespace of the formulas of ``reference.py``, which are compiled for a channel.

`astype` alone takes arrays.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload

from ..._arrays.namespaces import array_namespace

sqrt = np.sqrt


@njit
def where(condition: Any, x: Any, y: Any) -> Any:
    """Do for numbers what the array API does for arrays."""
    return x if condition else y


@njit
def zeros_like(x: Any) -> float:
    """Do for numbers what the array API does for arrays."""
    return 0.0


@njit
def ones_like(x: Any) -> float:
    """Do for numbers what the array API does for arrays."""
    return 1.0


def astype(x: Any, dtype: Any, copy: bool = True) -> Any:
    """Convert as the array API does."""
    return x.astype(dtype)


@overload(astype)
def _astype_compiled(x, dtype, copy=True):
    return lambda x, dtype, copy=True: x.astype(dtype)


@overload(array_namespace, inline="always")
def _array_namespace_compiled(array):
    this = sys.modules[__name__]
    return lambda array: this

"""Devices: contexts that make a device CuPy's current one, and the check that a device exists."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from array_api_compat import is_cupy_namespace, to_device

from .namespaces import Array, Namespace, array_namespace, device, is_cupy_array, namespace_name

_UNCHANGED: AbstractContextManager[object] = nullcontext()


def on_device_of(array: Any) -> AbstractContextManager[object]:
    """Return a context for computing with `array`: CuPy computes and creates arrays on its current device only."""
    if type(array) is np.ndarray or not is_cupy_array(array):
        return _UNCHANGED
    return array.device  # type: ignore[no-any-return]


def on_device(target: Any) -> AbstractContextManager[object]:
    """Return a context for creating arrays on the device `target`: CuPy ignores the argument `device`."""
    is_cupys = type(target).__module__.partition(".")[0] == "cupy"
    return target if is_cupys else _UNCHANGED


def check_device(xp: Namespace, target: Any) -> None:
    """Raise unless `target` is None or a device that `xp` has on this machine."""
    if target is None:
        return
    kind = ", a cupy.cuda.Device" if is_cupy_namespace(xp) else ""
    try:
        if kind and on_device(target) is not target:
            raise TypeError(target)
        with on_device(target):
            xp.empty(0, device=target)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        remedy = ". For a GPU, use xp=cupy" if namespace_name(xp) == "numpy" else ""
        raise ValueError(
            f"device: expected one that {namespace_name(xp)} has here{kind}; got {target!r}{remedy}"
        ) from error


def on_default_device(array: Array) -> Array:
    """Return `array` on the default device of its namespace."""
    default = array_namespace(array).__array_namespace_info__().default_device()
    return array if default is None or device(array) == default else to_device(array, default)

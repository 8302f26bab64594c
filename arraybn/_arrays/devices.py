"""Devices: the contexts in which CuPy computes, and the check that a device exists."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from array_api_compat import is_cupy_namespace, to_device

from .namespaces import Array, Namespace, array_namespace, device, is_cupy_array, namespace_name

_ANYWHERE: AbstractContextManager[object] = nullcontext()


def on_device_of(array: Any) -> AbstractContextManager[object]:
    """A context for computing with `array`: CuPy computes, and makes arrays, on its current device alone."""
    if type(array) is np.ndarray or not is_cupy_array(array):
        return _ANYWHERE
    return array.device  # type: ignore[no-any-return]


def on_device(where: Any) -> AbstractContextManager[object]:
    """A context for making arrays on the device `where`: CuPy's functions do not heed their argument `device`."""
    is_cupys = type(where).__module__.partition(".")[0] == "cupy"
    return where if is_cupys else _ANYWHERE


def check_device(xp: Namespace, where: Any) -> None:
    """Raise unless `where` is None or a device that `xp` has here."""
    if where is None:
        return
    kind = ", a cupy.cuda.Device" if is_cupy_namespace(xp) else ""
    try:
        if kind and on_device(where) is not where:
            raise TypeError(where)
        with on_device(where):
            xp.empty(0, device=where)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device: expected one that {namespace_name(xp)} has here{kind}; got {where!r}") from error


def on_default_device(array: Array) -> Array:
    """`array` where its namespace puts arrays by default, which is the host where there is one."""
    default = array_namespace(array).__array_namespace_info__().default_device()
    return array if default is None or device(array) == default else to_device(array, default)

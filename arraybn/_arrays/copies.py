"""Copies of arrays, in another dtype, on another device or in another namespace."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import is_torch_array, to_device

from .devices import check_device, on_default_device, on_device_of
from .namespaces import (
    FLOATS,
    Array,
    Namespace,
    array_namespace,
    as_dtype,
    as_namespace,
    class_name,
    device,
    dtype_name,
    is_array_api_obj,
    is_cupy_array,
    wide_dtype,
)


def widened(array: Array) -> Array:
    """Return a new array with the values of `array` in `wide_dtype`."""
    if isinstance(array, np.ndarray):
        return array.astype(np.float64)
    return array_namespace(array).astype(array, wide_dtype(array), copy=True)


def add_as(total: Array | None, array: Array, dtype: Any) -> Array:
    """Return a new array: `total` + `array` in `dtype`, or `array` in `dtype` if `total` is None."""
    if isinstance(array, np.ndarray):
        array = array.astype(dtype)
        return array if total is None else total + array
    with on_device_of(array):
        array = array_namespace(array).astype(array, dtype)
        return array if total is None else total + array


def filled(array: Array, value: float) -> Array:
    """Return a new array like `array` with `value` everywhere."""
    with on_device_of(array):
        return array_namespace(array).full_like(array, value)


def copied(array: Array) -> Array:
    """Return a new array with the values of `array`."""
    if isinstance(array, np.ndarray):
        return array.copy()
    with on_device_of(array):
        return array_namespace(array).asarray(array, copy=True)


def as_numpy(name: str, value: Any) -> Any:
    """Return `value` as a NumPy array in host memory; raise a TypeError with `name` if that is impossible."""
    try:
        if is_torch_array(value):
            value = value.detach().cpu()
            return (value.float() if dtype_name(value.dtype) == "bfloat16" else value).numpy()
        if is_cupy_array(value):
            return value.get()
        if is_array_api_obj(value) and not isinstance(value, np.ndarray):
            value = on_default_device(value)
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise TypeError(f"{name}: expected what numpy.asarray or DLPack takes; got {class_name(value)}") from error
    if array.dtype.kind == "O":
        raise TypeError(f"{name}: expected what numpy.asarray or DLPack takes; got {class_name(value)}")
    return array


def converted(name: str, value: Array, xp: Namespace, target: Any, dtype: Any) -> Array:
    """Return a copy of `value` in `xp`, on the device `target` (None: the default of `xp`), in `dtype`."""
    if array_namespace(value) is not xp:
        value = as_numpy(name, value).astype("float32" if dtype_name(dtype) == "bfloat16" else dtype_name(dtype))
        return xp.asarray(value, dtype=dtype, device=target)
    if target is not None and device(value) != target:
        value = to_device(value, target)
    if is_torch_array(value):
        value = value.detach()
    with on_device_of(value):
        return xp.astype(value, dtype, copy=True)


def moved(name: str, array: Array, xp: Namespace | None, target: Any, dtype: Any) -> Array:
    """Return a copy of `array` in `xp`, on the device `target`, in `dtype`; None keeps that of `array`."""
    old = array_namespace(array)
    xp = old if xp is None else as_namespace(xp)
    check_device(xp, target)
    if target is None and xp is old:
        target = device(array)
    if (own := dtype_name(array.dtype)) not in FLOATS:  # indices and masks keep their dtype
        return converted(name, array, xp, target, getattr(xp, own))
    return converted(name, array, xp, target, as_dtype(own if dtype is None else dtype, xp))

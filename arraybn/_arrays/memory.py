"""The memory of arrays: addresses, strides and overlaps."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from array_api_compat import is_torch_array

from .namespaces import Array, is_cupy_array


def strides_of(array: Array) -> tuple[int, ...] | None:
    """Return the bytes between neighbours on each axis, or None if they are unknown."""
    if is_torch_array(array):
        return tuple(int(step) * int(array.element_size()) for step in array.stride())
    return getattr(array, "strides", None)


def footprint(array: Array) -> Array | None:
    """Return a NumPy array over the same addresses, never to be read; None if the addresses are unknown."""
    if isinstance(array, np.ndarray):
        return array
    if is_torch_array(array):
        pointer, itemsize = array.data_ptr(), array.element_size()
    elif is_cupy_array(array):
        pointer, itemsize = array.data.ptr, array.itemsize
    else:
        return None
    if pointer == 0:
        return None
    shape, strides = tuple(array.shape), strides_of(array)
    interface = {"version": 3, "data": (pointer, False), "shape": shape, "strides": strides, "typestr": f"|V{itemsize}"}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def same_memory(a: Array, b: Array) -> bool:
    """Return True if each element of `a` has the same memory as that of `b`."""
    if a is b:
        return True
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and not np.may_share_memory(a, b):
        return False
    a, b = footprint(a), footprint(b)
    if a is None or b is None or a.size == 0:
        return False
    if a.__array_interface__["data"][0] != b.__array_interface__["data"][0]:
        return False
    steps = [[step for step, size in zip(t.strides, t.shape, strict=True) if size > 1] for t in (a, b)]
    return steps[0] == steps[1] and (a.shape, a.itemsize) == (b.shape, b.itemsize)


def overlap(a: Array, b: Array) -> bool:
    """Return True if `a` and `b` share a byte, or if that cannot be found out quickly; False for unknown addresses."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and not np.may_share_memory(a, b):
        return False
    if is_cupy_array(a) and is_cupy_array(b) and a.flags.c_contiguous and b.flags.c_contiguous:  # the usual case
        return bool(a.data.ptr < b.data.ptr + b.nbytes and b.data.ptr < a.data.ptr + a.nbytes)
    a, b = footprint(a), footprint(b)
    if a is None or b is None:
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=10_000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:  # an exact answer would take long: the safe one is True
        return True

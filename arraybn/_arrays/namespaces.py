"""Namespaces and dtypes of arrays, for any array library."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Protocol, TypeAlias

import array_api_compat
import array_api_compat.numpy
import numpy as np
from array_api_compat import device as device
from array_api_compat import is_array_api_obj as is_array_api_obj
from array_api_compat import is_cupy_array as is_cupy_array
from array_api_compat import is_cupy_namespace

Array: TypeAlias = Any  # an array of any namespace: numpy.ndarray, cupy.ndarray, torch.Tensor, jax.Array, …
Namespace: TypeAlias = Any  # the module that array_api_compat.array_namespace(array) returns


class Shaped(Protocol):
    """An array as type checkers see the arguments of users: a list has no shape, and is an error before any run."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...


FLOATS = ("float16", "bfloat16", "float32", "float64")


def array_namespace(array: Array) -> Namespace:
    """Return the array API namespace of `array`."""
    if type(array) is np.ndarray:  # a fast path: array_api_compat takes a third of the time of a small batch norm
        return array_api_compat.numpy
    return cupy_namespace() if is_cupy_array(array) else array_api_compat.array_namespace(array)


@functools.cache
def cupy_namespace() -> Namespace:
    return importlib.import_module("array_api_compat.cupy")


def namespace_name(xp: Namespace) -> str:
    """Return 'numpy' for array_api_compat.numpy, 'jax.numpy' for jax.numpy."""
    return str(xp.__name__).removeprefix("array_api_compat.")


def dtype_name(dtype: Any) -> str:
    """Return 'float32' for 'float32', numpy.float32, numpy.dtype('float32'), torch.float32 and the like."""
    return getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).rpartition(".")[2]


def class_name(value: object) -> str:
    """Return the name of the value's class, such as 'list' or 'torch.Tensor'."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def wide_dtype(array: Array) -> Any:
    """Return the dtype of statistics: float64 if the namespace and device of `array` have float64, else float32."""
    if isinstance(array, np.ndarray) or is_cupy_array(array):
        return np.dtype("f8")
    xp = array_namespace(array)
    found = xp.__array_namespace_info__().dtypes(device=device(array), kind="real floating")
    return found.get("float64", xp.float32)


def common_dtype(*arrays: Array) -> Any:
    """Return the narrowest dtype that holds all values of arrays of different floating dtypes."""
    name = "float64" if "float64" in {dtype_name(array.dtype) for array in arrays} else "float32"
    return getattr(array_namespace(arrays[0]), name)


def as_namespace(xp: Namespace) -> Namespace:
    """Return the array API namespace of a module such as numpy or torch."""
    try:
        return cupy_namespace() if is_cupy_namespace(xp) else array_namespace(xp.asarray(0.0))
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"xp: expected an array namespace such as numpy, cupy, torch or jax.numpy; got {xp!r}"
        ) from error


def as_dtype(dtype: Any, xp: Namespace) -> Any:
    """Return `dtype`, a dtype of `xp` or its name, as a dtype of `xp`."""
    name = {"float": "float64"}.get(found := dtype_name(dtype), found)  # Python's float, as in NumPy
    if name not in FLOATS or not hasattr(xp, name):
        raise TypeError(f"dtype: expected a real floating dtype of {namespace_name(xp)}; got {dtype!r}")
    if name == "float64" and name not in xp.__array_namespace_info__().dtypes(kind="real floating"):
        raise TypeError(f"dtype: expected float32, because {namespace_name(xp)} has no float64 here; got {dtype!r}")
    return getattr(xp, name)


def check_dtype(dtype: Any) -> None:
    """Raise unless `dtype` is None or a floating dtype of some namespace."""
    if dtype is not None and dtype_name(dtype) not in FLOATS:
        raise TypeError(f"dtype: expected a real floating dtype; got {dtype!r}")

"""What arraybn has to know about an array: its namespace, device, dtype and memory.

Everything that tells one array library from another is in this file, so that the rest can be written once against the
array API.
"""

from __future__ import annotations

import functools
import importlib
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import array_api_compat
import array_api_compat.numpy
import numpy as np
from array_api_compat import device as device
from array_api_compat import is_array_api_obj as is_array_api_obj
from array_api_compat import is_cupy_array as is_cupy_array
from array_api_compat import is_cupy_namespace, is_torch_array, to_device

Array: TypeAlias = Any  # any array of the standard: numpy.ndarray, cupy.ndarray, torch.Tensor, jax.Array, …
Namespace: TypeAlias = Any  # the module that array_api_compat.array_namespace(array) returns

FLOATS = ("float16", "bfloat16", "float32", "float64")


def array_namespace(array: Array) -> Namespace:
    """The array API namespace of `array`."""
    if type(array) is np.ndarray:  # a small batch norm spends a third of its time on this question
        return array_api_compat.numpy
    return _cupy() if is_cupy_array(array) else array_api_compat.array_namespace(array)


@functools.cache
def _cupy() -> Namespace:
    return importlib.import_module("array_api_compat.cupy")


def namespace_name(xp: Namespace) -> str:
    """'numpy' for array_api_compat.numpy, 'jax.numpy' for jax.numpy."""
    return str(xp.__name__).removeprefix("array_api_compat.")


def dtype_name(dtype: Any) -> str:
    """'float32' for 'float32', numpy.dtype('float32'), numpy.float32, torch.float32 and array_api_strict.float32."""
    return getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).rpartition(".")[2]


def class_name(value: object) -> str:
    """'list' or 'torch.Tensor'."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def wide_dtype(array: Array) -> Any:
    """float64 where the namespace and device of `array` have it, else float32: what statistics are kept in."""
    if isinstance(array, np.ndarray) or is_cupy_array(array):
        return np.dtype("f8")
    xp = array_namespace(array)
    found = xp.__array_namespace_info__().dtypes(device=device(array), kind="real floating")
    return found.get("float64", xp.float32)


# ---- Devices ---------------------------------------------------------------------------------------------------------

_ANYWHERE: AbstractContextManager[object] = nullcontext()


def at(array: Any) -> AbstractContextManager[object]:
    """A context for computing with `array`: CuPy computes, and makes arrays, on its current device alone."""
    if type(array) is np.ndarray or not is_cupy_array(array):
        return _ANYWHERE
    return array.device  # type: ignore[no-any-return]


def on(where: Any) -> AbstractContextManager[object]:
    """A context for making arrays on the device `where`: CuPy's functions do not heed their argument `device`."""
    is_cupys = type(where).__module__.partition(".")[0] == "cupy"
    return where if is_cupys else _ANYWHERE


def check_device(xp: Namespace, where: Any) -> None:
    """Raise unless `where` is None or a device that `xp` has here."""
    kind = ", a cupy.cuda.Device" if is_cupy_namespace(xp) else ""
    try:
        if kind and where is not None and on(where) is not where:
            raise TypeError(where)
        with on(where):
            xp.empty(0, device=where)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device: expected one that {namespace_name(xp)} has here{kind}; got {where!r}") from error


def _on_default_device(array: Array) -> Array:
    """`array` where its namespace puts arrays by default, which is the host where there is one."""
    default = array_namespace(array).__array_namespace_info__().default_device()
    return array if default is None or device(array) == default else to_device(array, default)


# ---- Copies ----------------------------------------------------------------------------------------------------------


def widened(array: Array) -> Array:
    """`array` in `wide_dtype`: a new array, never the caller's own."""
    if isinstance(array, np.ndarray):
        return array.astype(np.float64)
    return array_namespace(array).astype(array, wide_dtype(array), copy=True)


def added(total: Array | None, array: Array, dtype: Any) -> Array:
    """A new array with the values of `array` in `dtype`, added to `total` if there is one."""
    if isinstance(array, np.ndarray):
        array = array.astype(dtype)
        return array if total is None else total + array
    with at(array):
        array = array_namespace(array).astype(array, dtype)
        return array if total is None else total + array


def filled(array: Array, value: float) -> Array:
    """A new array like `array`, full of `value`."""
    with at(array):
        return array_namespace(array).full_like(array, value)


def copied(array: Array) -> Array:
    """A new array with the values of `array`."""
    if isinstance(array, np.ndarray):
        return array.copy()
    with at(array):
        return array_namespace(array).asarray(array, copy=True)


def as_numpy(name: str, value: Any) -> Any:
    """`value` in host memory as a NumPy array, or one TypeError that names it."""
    try:
        if is_torch_array(value):
            value = value.detach().cpu()
            return (value.float() if dtype_name(value.dtype) == "bfloat16" else value).numpy()
        if is_cupy_array(value):
            return value.get()
        if is_array_api_obj(value) and not isinstance(value, np.ndarray):
            value = _on_default_device(value)
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise TypeError(f"{name}: expected what numpy.asarray or DLPack takes; got {class_name(value)}") from error
    if array.dtype.kind == "O":
        raise TypeError(f"{name}: expected what numpy.asarray or DLPack takes; got {class_name(value)}")
    return array


def as_namespace(xp: Namespace) -> Namespace:
    """The array API namespace behind a module such as numpy or torch."""
    try:
        return _cupy() if is_cupy_namespace(xp) else array_namespace(xp.asarray(0.0))
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"xp: expected an array namespace such as numpy, cupy, torch or jax.numpy; got {xp!r}"
        ) from error


def as_dtype(dtype: Any, xp: Namespace) -> Any:
    """`dtype`, one of `xp` or the name of one, as a dtype of `xp`."""
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


def converted(name: str, value: Array, xp: Namespace, where: Any, dtype: Any) -> Array:
    """A copy of the array `value` in the namespace `xp` on the device `where` (None: its default), of that dtype."""
    if array_namespace(value) is not xp:
        value = as_numpy(name, value).astype("float32" if dtype_name(dtype) == "bfloat16" else dtype_name(dtype))
        return xp.asarray(value, dtype=dtype, device=where)
    if where is not None and device(value) != where:
        value = to_device(value, where)
    if is_torch_array(value):
        value = value.detach()
    with at(value):
        return xp.astype(value, dtype, copy=True)


def moved(name: str, array: Array, xp: Namespace | None, where: Any, dtype: Any) -> Array:
    """A copy of `array` with what is not None changed."""
    old = array_namespace(array)
    xp = old if xp is None else as_namespace(xp)
    check_device(xp, where)
    if where is None and xp is old:
        where = device(array)
    if (own := dtype_name(array.dtype)) not in FLOATS:  # indices and masks keep their dtype
        return converted(name, array, xp, where, getattr(xp, own))
    return converted(name, array, xp, where, as_dtype(own if dtype is None else dtype, xp))


@dataclass(slots=True, eq=False)
class Layout:
    """How an array of any layout is seen as (N, C, S), and how a result is put back into that layout.

    The axes are first brought into the order they have in memory, so that a transposed view of contiguous memory
    is not copied and the result lies in memory as the input does.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...] | None  # the axes from the slowest to the fastest in memory; None: as they are
    ncs: tuple[int, int, int]

    @classmethod
    def of(cls, x: Array, channel_axis: int) -> Layout:
        """The layout of `x` (N, C, *S), whose channels are on `channel_axis`."""
        shape, ndim = tuple(x.shape), x.ndim
        if ndim < 2:
            raise ValueError(f"x: expected at least 2 dimensions, (N, C, *S); got shape {shape}")
        if not -ndim <= channel_axis < ndim:
            raise ValueError(
                f"channel_axis: expected {-ndim} … {ndim - 1} for x of {ndim} dimensions; got {channel_axis}"
            )
        axis = int(channel_axis) % ndim
        if shape[axis] == 0:
            raise ValueError(f"x: expected at least one channel on axis {channel_axis}; got shape {shape}")
        order, memory_shape = _memory_order(x), shape
        if order is not None:
            memory_shape, axis = tuple(shape[i] for i in order), order.index(axis)
        before, after = math.prod(memory_shape[:axis]), math.prod(memory_shape[axis + 1 :])
        return cls(shape, order, (before, memory_shape[axis], after))

    @property
    def n(self) -> int:
        """How many values each channel has."""
        return self.ncs[0] * self.ncs[2]

    def view(self, array: Array) -> Array:
        """`array`, of the user's shape, as (N, C, S)."""
        if self.order is not None:
            array = array_namespace(array).permute_dims(array, self.order)
        return _reshaped(array, self.ncs)

    def restore(self, array: Array) -> Array:
        """`array` (N, C, S) in the user's shape and axis order."""
        if self.order is None:
            return _reshaped(array, self.shape)
        array = _reshaped(array, tuple(self.shape[i] for i in self.order))
        return array_namespace(array).permute_dims(array, tuple(self.order.index(i) for i in range(len(self.order))))


def _reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    if isinstance(array, np.ndarray):
        return array.reshape(shape)
    return array_namespace(array).reshape(array, shape)


def _strides(array: Array) -> tuple[int, ...] | None:
    """Bytes between neighbours on each axis, or None where the namespace keeps them to itself."""
    if is_torch_array(array):
        return tuple(int(step) * int(array.element_size()) for step in array.stride())
    return getattr(array, "strides", None)


def _memory_order(array: Array) -> tuple[int, ...] | None:
    if isinstance(array, np.ndarray) and array.flags.c_contiguous:
        return None
    strides = _strides(array)
    if strides is None:
        return None
    order = tuple(sorted(range(len(strides)), key=lambda axis: -abs(strides[axis])))
    return None if order == tuple(range(len(order))) else order


def footprint(array: Array) -> Array | None:
    """A NumPy array over the same addresses, for arithmetic on them alone; None where they are not told."""
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
    shape, strides = tuple(array.shape), _strides(array)
    interface = {"version": 3, "data": (pointer, False), "shape": shape, "strides": strides, "typestr": f"|V{itemsize}"}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def same_memory(a: Array, b: Array) -> bool:
    """Whether `a` and `b` are element for element the same memory."""
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
    """Whether some byte of `a` is one of `b`, as far as can be seen."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and not np.may_share_memory(a, b):
        return False
    if is_cupy_array(a) and is_cupy_array(b) and a.flags.c_contiguous and b.flags.c_contiguous:  # told quickly
        return bool(a.data.ptr < b.data.ptr + b.nbytes and b.data.ptr < a.data.ptr + a.nbytes)
    a, b = footprint(a), footprint(b)
    if a is None or b is None:
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=10_000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:  # strides so tangled that the answer would take long: be safe
        return True

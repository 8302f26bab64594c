"""Checks of arguments, once for each public call. An error names the argument, the expected and the given value."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

import numpy as np
from array_api_compat import is_jax_array, is_torch_array, is_writeable_array

from ._arrays.memory import footprint, overlap, same_memory
from ._arrays.namespaces import (
    FLOATS,
    Array,
    array_namespace,
    class_name,
    device,
    dtype_name,
    is_array_api_obj,
    is_cupy_array,
    namespace_name,
)

_NUMPY_FLOATS = {np.dtype(name).num for name in ("float16", "float32", "float64")}


def _is_plain(array: Any) -> bool:
    """Return True for a usual NumPy or CuPy array, which needs no slower check."""
    if type(array) is np.ndarray:
        return array.dtype.num in _NUMPY_FLOATS and array.dtype.isnative
    return is_cupy_array(array) and array.dtype.num in _NUMPY_FLOATS


def as_floating(name: str, array: Array) -> Array:
    """Return `array` as a plain array of native byte order; a TypeError says how to convert other values."""
    if _is_plain(array):
        return array
    if isinstance(array, np.ndarray):
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{name}: expected a plain array; got MaskedArray, whose mask would be lost."
                " Leave out the samples with masked values, or fill these values with the mean of their channel"
                " (zeros would shift it)"
            )
        if isinstance(array, np.matrix):
            raise TypeError(f"{name}: expected a plain array; got matrix. Convert it with numpy.asarray({name})")
        array = np.asarray(array)  # numpy.memmap and other subclasses
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
    elif not is_array_api_obj(array):
        raise TypeError(
            f"{name}: expected an array (NumPy, CuPy, torch, JAX or any array API namespace); got {class_name(array)}."
            f" {_remedy(name, array)}"
        )
    if dtype_name(array.dtype) not in FLOATS:
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64; got {dtype_name(array.dtype)}."
            f" Convert it, for example with {_cast(name, array)}"
        )
    return _as_plain_tensor(name, array) if is_torch_array(array) else array


def _as_plain_tensor(name: str, tensor: Array) -> Array:
    """Return `tensor` detached from autograd."""
    torch = sys.modules["torch"]
    if tensor.is_meta:
        raise TypeError(f"{name}: expected a tensor with values; got one on the meta device")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name}: expected a tensor without requires_grad, because the gradients here are written by hand and"
            f" autograd would record them for nothing; got one with it. Pass {name}.detach()"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor; got {tensor.layout}. Pass {name}.to_dense()")
    return tensor.detach() if tensor.requires_grad else tensor


def check_lasting(name: str, array: Array, own: Array | None) -> None:
    """Raise unless a layer with the array `own` can keep `array`: on the same device, and outside of transforms."""
    if own is not None:
        check_home(name, array, own, "this layer")
    check_values(name, array)


def check_values(name: str, array: Any) -> None:
    """Raise where `array` stands for values that a layer cannot keep: in JAX's and PyTorch's transforms and traces."""
    if is_jax_array(array) and isinstance(array, sys.modules["jax"].core.Tracer):
        raise TypeError(
            f"{name}: expected an array with values, which a layer remembers; got a JAX tracer."
            " Inside jax.jit, vmap and grad, call arraybn.batch_norm"
        )
    if is_torch_array(array) and _is_transformed(array):
        raise TypeError(
            f"{name}: expected a tensor with values, which a layer remembers; got one of a transform or a trace."
            " Inside torch.func.vmap, jvp, make_fx and torch.export, call arraybn.batch_norm"
        )


def _is_transformed(tensor: Array) -> bool:
    """Return True inside vmap, jvp, functionalize, make_fx, FakeTensorMode, torch.export and torch.jit.trace.

    PyTorch has no public question for this. torch.compile is not among them: it leaves a layer's call to Python.
    """
    return bool(sys.modules["torch"]._C._functorch.is_functorch_wrapped_tensor(tensor)) or is_recorded(tensor)


def is_recorded(tensor: Array) -> bool:
    """Return True where PyTorch runs a program to record its operations, with values or without."""
    torch = sys.modules["torch"]
    inner, fake = torch._C, sys.modules.get("torch._subclasses.fake_tensor")
    keys = inner._TorchDispatchModeKey
    return bool(
        (fake is not None and isinstance(tensor, fake.FakeTensor))
        or any(inner._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))
        or torch.jit.is_tracing()
    )


def _cast(name: str, array: Array) -> str:
    """Return the expression that converts `array` to float32 in its library."""
    if is_torch_array(array):
        return f"{name}.to(torch.float32)"
    library = namespace_name(array_namespace(array))
    method = is_jax_array(array) or isinstance(array, np.ndarray)
    return f"{name}.astype({library}.float32)" if method else f"{library}.astype({name}, {library}.float32)"


def _remedy(name: str, value: object) -> str:
    if hasattr(value, "data") and hasattr(value, "grad"):  # a Parameter
        return f"Pass {name}.data"
    return f"Convert it, for example with numpy.asarray({name}, dtype=numpy.float32)"


def check_home(name: str, array: Array, like: Array, like_name: str = "x") -> None:
    """Raise unless `array` has the namespace and the device of `like`."""
    if isinstance(array, np.ndarray) and isinstance(like, np.ndarray):
        return
    if type(array) is not type(like):
        ours, theirs = namespace_name(array_namespace(array)), namespace_name(array_namespace(like))
        if ours != theirs:
            if {ours, theirs} == {"numpy", "cupy"}:
                to, moved = theirs if like_name == "x" else ours, "cupy.asarray(…) or cupy.asnumpy(…)"
            else:
                to, moved = "…", "numpy.asarray or from_dlpack"
            raise TypeError(
                f"{name}: expected a {theirs} array as {like_name} is; got a {ours} array."
                f" Move one of them (a layer with layer.to(xp={to}), an array with {moved})"
            )
    here, there = device(array), device(like)
    if here != there and None not in (here, there):  # inside jax.jit an array has no device yet
        moved = f"`with {like_name}.device: cupy.asarray({name})`" if is_cupy_array(array) else "to_device"
        raise ValueError(
            f"{name}: expected on {there} as {like_name} is; got one on {here}."
            f" Move one of them (a layer with layer.to(device=…), an array with {moved})"
        )


def as_channel_vector(name: str, array: Array | None, x: Array, channels: int, *, of: str = "x") -> Array | None:
    """Return `array` (C,) after a check against `x`; None stays None."""
    if array is None or (_is_plain(array) and type(array) is type(x) is np.ndarray and array.shape == (channels,)):
        return array
    array = as_floating(name, array)
    check_home(name, array, x, of)
    if tuple(array.shape) != (channels,):
        raise ValueError(
            f"{name}: expected shape ({channels},), one value per channel of {of}; got {tuple(array.shape)}"
        )
    return array


def as_mask(where: Any, x: Array, positions: tuple[int, ...]) -> Array:
    """Return `where`, copied if it can be written into, after a check against x and its shape (N, *S), `positions`."""
    if not is_array_api_obj(where) or isinstance(where, np.ma.MaskedArray | np.matrix):
        raise TypeError(f"where: expected a boolean array, True where a value counts; got {class_name(where)}")
    if dtype_name(where.dtype) not in ("bool", "bool_"):
        raise TypeError(
            f"where: expected bool, True where a value counts; got {dtype_name(where.dtype)}."
            " Compare it, for example where != 0"
        )
    check_home("where", where, x)
    if is_jax_array(where) and isinstance(where, sys.modules["jax"].core.Tracer):
        raise TypeError(
            "where: expected a mask with values, because they are counted; got a JAX tracer. Make the mask outside of"
            " jax.jit, from numbers that are known there"
        )
    shape = tuple(where.shape)
    sizes = zip(reversed(shape), reversed(positions), strict=False)
    if len(shape) > len(positions) or any(own not in (1, size) for own, size in sizes):
        without = ", x without its channels" if len(shape) <= len(positions) else ", without an axis of channels"
        raise ValueError(f"where: expected shape {positions}{without}, or one that broadcasts to it; got {shape}")
    if isinstance(where, np.ndarray):  # True may be any byte but 0, if the mask is a view of other memory
        return np.ascontiguousarray(where).view(np.uint8) != 0
    return where if is_jax_array(where) else array_namespace(where).asarray(where, copy=True)


def as_number(name: str, value: Any) -> Any:
    """Return `value` unchanged if `value` is a finite real number, else raise."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name}: expected a number; got {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a finite number; got one beyond the range of float") from None
    if not finite:
        raise ValueError(f"{name}: expected a finite number; got {value!r}")
    return value


def as_flag(name: str, value: Any) -> bool:
    """Return a bool of Python or NumPy as a bool; raise for "False", None and 0, which are usually mistakes."""
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool):
        raise TypeError(f"{name}: expected True or False; got {value!r}")
    return bool(value)


def as_eps(value: Any) -> float:
    """Return ε as a float if it is a finite number ≥ 0, else raise."""
    if as_number("eps", value) < 0:
        raise ValueError(f"eps: expected a number ≥ 0; got {value!r}")
    return float(value)


def as_integer(name: str, value: Any, least: int | None = None) -> int:
    """Return `value` as an int if it is an integer ≥ `least`, else raise."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise TypeError(f"{name}: expected an integer; got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected an integer ≥ {least}; got {value!r}")
    return int(value)


def check_like(name: str, array: Any, like: Array, like_name: str) -> None:
    """Raise unless `array` has the namespace, device and shape of `like`."""
    if type(array) is not np.ndarray and not is_array_api_obj(array):
        raise TypeError(f"{name}: expected an array like {like_name}; got {class_name(array)}")
    if type(array) is not type(like):
        check_home(name, array, like, like_name)
    if array.shape != like.shape:
        raise ValueError(f"{name}: expected shape {tuple(like.shape)}, that of {like_name}; got {tuple(array.shape)}")


def is_plain_like(array: Any, x: Array, shape: tuple[int, ...]) -> bool:
    """Return True for a usual NumPy array that has the dtype of x, and `shape`: no slower check would object."""
    return type(array) is type(x) is np.ndarray and array.dtype == x.dtype and array.shape == shape


def check_out(out: Any, x: Array, shape: tuple[int, ...]) -> None:
    """Raise unless `out` fits a result like x of `shape`."""
    if is_plain_like(out, x, shape) and out.flags.c_contiguous and out.flags.writeable:
        return
    plain = type(out) is np.ndarray
    if not plain and (not is_array_api_obj(out) or isinstance(out, np.ma.MaskedArray)):
        raise TypeError(f"out: expected a {namespace_name(array_namespace(x))} array; got {class_name(out)}")
    check_home("out", out, x)
    if not plain and is_jax_array(out):
        raise TypeError("out: expected an array that can be written into; got a JAX array. Leave out=None")
    if tuple(out.shape) != shape or out.dtype != x.dtype:
        raise ValueError(
            f"out: expected shape {shape} and dtype {dtype_name(x.dtype)}, those of the result;"
            f" got {tuple(out.shape)} and {getattr(out.dtype, 'str', dtype_name(out.dtype))}"
        )
    if not (out.flags.writeable if plain else is_writeable_array(out)):
        raise ValueError("out: expected a writeable array; got a read-only one")
    if not plain and is_torch_array(out):
        _as_plain_tensor("out", out)
    memory = footprint(out)
    strides = () if memory is None or memory.size == 0 else memory.strides
    if any(step == 0 and size > 1 for step, size in zip(strides, shape, strict=False)):
        raise ValueError(f"out: expected memory of its own for every value; got strides {strides}")


def check_overlap(out: Array, inputs: dict[str, Array | None]) -> None:
    """Raise unless `out` shares with each input no memory, or all of it."""
    for name, array in inputs.items():
        if array is None or array is out or not overlap(out, array):
            continue
        if tuple(array.shape) != tuple(out.shape) or not same_memory(out, array):
            raise ValueError(
                f"out: expected memory disjoint from {name}, or {name} itself; got a partial overlap."
                f" Pass a fresh array, for example xp.empty_like({name})"
            )

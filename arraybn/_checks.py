"""Arguments, checked once, at the public edge. Every error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

import numpy as np
from array_api_compat import is_jax_array, is_torch_array, is_writeable_array

from ._arrays import (
    FLOATS,
    Array,
    array_namespace,
    class_name,
    device,
    dtype_name,
    footprint,
    is_array_api_obj,
    namespace_name,
    overlap,
    same_memory,
)


def as_floating(name: str, array: Array) -> Array:
    """`array` as a plain array of native byte order, or a TypeError that says how to make it one."""
    if isinstance(array, np.ndarray):
        if isinstance(array, np.ma.MaskedArray | np.matrix):
            raise TypeError(
                f"{name}: expected a plain array; got {type(array).__name__}, whose mask or shape rules would be lost."
                f" Convert it, for example with numpy.asarray({name})"
            )
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
            f" Convert it, for example with xp.astype({name}, xp.float32)"
        )
    if is_torch_array(array) and array.requires_grad and sys.modules["torch"].is_grad_enabled():
        raise TypeError(
            f"{name}: expected a tensor without requires_grad, because the gradients here are written by hand and"
            f" autograd would record them for nothing; got one with it. Pass {name}.detach()"
        )
    return array


def _remedy(name: str, value: object) -> str:
    if hasattr(value, "data") and hasattr(value, "grad"):  # a Parameter, which holds an array
        return f"Pass {name}.data"
    return f"Convert it, for example with numpy.asarray({name}, dtype=numpy.float32)"


def check_home(name: str, array: Array, like: Array, like_name: str = "x") -> None:
    """Raise unless `array` is of the namespace and on the device of `like`."""
    ours, theirs = namespace_name(array_namespace(array)), namespace_name(array_namespace(like))
    if ours != theirs:
        raise TypeError(
            f"{name}: expected a {theirs} array as {like_name} is; got a {ours} array."
            f" Move one of them (a layer with layer.to(xp=…), an array with numpy.asarray or from_dlpack)"
        )
    if device(array) != device(like):
        raise ValueError(
            f"{name}: expected on {device(like)} as {like_name} is; got one on {device(array)}."
            f" Move one of them (a layer with layer.to(device=…), an array with to_device)"
        )


def as_channel_vector(name: str, array: Array | None, x: Array, channels: int, *, of: str = "x") -> Array | None:
    """`array` (C,), checked against `x`; None stays None."""
    if array is None:
        return None
    array = as_floating(name, array)
    check_home(name, array, x, of)
    if tuple(array.shape) != (channels,):
        raise ValueError(
            f"{name}: expected shape ({channels},), one value per channel of {of}; got {tuple(array.shape)}"
        )
    return array


def as_number(name: str, value: Any) -> Any:
    """`value` as it is, if it is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number; got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number; got {value!r}")
    return value


def as_eps(value: Any) -> float:
    """ε as a float, if it is a finite number ≥ 0."""
    if as_number("eps", value) < 0:
        raise ValueError(f"eps: expected a number ≥ 0; got {value!r}")
    return float(value)


def as_integer(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int, if it is an integer and not below `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer; got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected an integer ≥ {least}; got {value!r}")
    return int(value)


def check_out(out: Any, x: Array, shape: tuple[int, ...], inputs: dict[str, Array | None]) -> None:
    """Raise unless `out` can take a result like x of that shape: disjoint from `inputs`, or the same as one of them."""
    if out is None:
        return
    if not is_array_api_obj(out):
        raise TypeError(f"out: expected a {namespace_name(array_namespace(x))} array; got {class_name(out)}")
    check_home("out", out, x)
    if is_jax_array(out):
        raise TypeError("out: JAX arrays are immutable, so a result cannot be written into one; leave out=None")
    if tuple(out.shape) != shape or out.dtype != x.dtype:
        raise ValueError(
            f"out: expected shape {shape} and dtype {dtype_name(x.dtype)}, those of the result;"
            f" got {tuple(out.shape)} and {getattr(out.dtype, 'str', dtype_name(out.dtype))}"
        )
    if not is_writeable_array(out):
        raise ValueError("out: expected a writeable array; got a read-only one")
    memory = footprint(out)
    if memory is not None and any(step == 0 and size > 1 for step, size in zip(memory.strides, shape, strict=True)):
        raise ValueError(f"out: expected memory of its own for every value; got strides {memory.strides}")
    for name, array in inputs.items():
        if array is not None and not (tuple(array.shape) == shape and same_memory(out, array)) and overlap(out, array):
            raise ValueError(
                f"out: expected memory disjoint from {name}, or {name} itself; got a partial overlap."
                f" Pass a fresh array, for example xp.empty_like({name})"
            )

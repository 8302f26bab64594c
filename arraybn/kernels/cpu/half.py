"""The elements of data in compiled code: float64 in all arithmetic, whatever the dtype of the array.

float16 travels as int16 and bfloat16 as uint16, because Numba knows neither. `wide` and `narrow` are given twice: in
Python, which says what they mean and runs where compiling is switched off, and as the code that Numba makes of a call.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, types
from numba.extending import intrinsic, overload


def _has_half() -> bool:
    """Return whether the processor converts float16. Without that LLVM ends the process."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    features = config.CPU_FEATURES
    return "+f16c" in (get_host_cpu_features().flatten() if features is None else features).split(",")


HALF = _has_half()


def wide(value: Any) -> Any:
    """Return the value of an element as float64."""
    if isinstance(value, np.int16):
        return np.float64(value.view(np.float16))
    if isinstance(value, np.uint16):
        return np.float64((np.uint32(value) << np.uint32(16)).view(np.float32))
    return np.float64(value)


def narrow(value: Any, out: Any) -> Any:
    """Return `value` (float64) as an element of the array `out`; float16 and bfloat16 are rounded by way of float32."""
    if out.dtype == np.int16:
        return np.float16(np.float32(value)).view(np.int16)
    if out.dtype == np.uint16:
        return _as_bfloat16(np.float32(value))
    return out.dtype.type(value)


def _as_bfloat16(value: Any) -> Any:
    bits = int(value.view(np.uint32))
    return np.uint16(bits >> 16 | 0x40 if np.isnan(value) else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def _conversion(source: types.Type, target: types.Type, build: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Any:
    """Return a function of compiled code, given by its instructions."""

    @intrinsic
    def convert(typing_context, value):
        return target(source), lambda context, builder, signature, arguments: build(builder, arguments[0])

    return convert


def _build_to_bfloat16(code: ir.IRBuilder, value: ir.Value) -> ir.Value:
    def i32(number: int) -> ir.Value:
        return ir.Constant(ir.IntType(32), number)

    bits = code.bitcast(value, ir.IntType(32))
    high = code.lshr(bits, i32(16))
    rounded = code.lshr(code.add(bits, code.add(i32(0x7FFF), code.and_(high, i32(1)))), i32(16))
    is_nan = code.fcmp_unordered("uno", value, value)
    return code.trunc(code.select(is_nan, code.or_(high, i32(0x40)), rounded), ir.IntType(16))


_from_half = _conversion(
    types.int16, types.float32, lambda code, bits: code.fpext(code.bitcast(bits, ir.HalfType()), ir.FloatType())
)
_to_half = _conversion(
    types.float32, types.int16, lambda code, value: code.bitcast(code.fptrunc(value, ir.HalfType()), ir.IntType(16))
)
_from_bfloat16 = _conversion(
    types.uint16,
    types.float32,
    lambda code, bits: code.bitcast(
        code.shl(code.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16)), ir.FloatType()
    ),
)
_to_bfloat16 = _conversion(types.float32, types.uint16, _build_to_bfloat16)


@overload(wide)
def _wide_compiled(value):
    if value == types.int16:
        return lambda value: np.float64(_from_half(value))
    if value == types.uint16:
        return lambda value: np.float64(_from_bfloat16(value))
    return lambda value: np.float64(value)  # noqa: PLW0108 (Numba wants a function of Python)


@overload(narrow)
def _narrow_compiled(value, out):
    if out.dtype == types.int16:
        return lambda value, out: _to_half(np.float32(value))
    if out.dtype == types.uint16:
        return lambda value, out: _to_bfloat16(np.float32(value))
    return lambda value, out: value

"""A fake CuPy over NumPy memory, so that what arraybn does with a GPU's arrays is tested without a GPU.

It has what arraybn and array-api-compat use, under CuPy's names and signatures, which tests/test_cupy_paths.py compares
with the real package where that is installed. `cupy._fake` has the log of what a GPU would have been asked to do.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as _np

from . import _fake
from . import cuda as cuda
from . import fft as fft
from . import linalg as linalg
from ._fake import ndarray

__version__ = "14.2.0"

_SAME = """
bool_ complex64 complex128 complexfloating dtype e finfo float16 float32 float64 floating iinfo inf int8 int16 int32
int64 integer intp issubdtype nan newaxis number pi signedinteger uint8 uint16 uint32 uint64 unsignedinteger
"""
_FUNCTIONS = """
abs add all any arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort bitwise_and bitwise_or
bitwise_xor broadcast_arrays ceil clip concatenate conj copysign cos count_nonzero cross cumprod cumsum diff
divide einsum equal exp expand_dims expm1 flip floor greater greater_equal invert isfinite isin isinf isnan left_shift
less less_equal linspace log log1p logical_and logical_not logical_or matmul max maximum mean meshgrid min minimum
moveaxis multiply negative nonzero not_equal outer power prod repeat right_shift roll round searchsorted sign
sin sort sqrt square stack std subtract sum swapaxes take take_along_axis tan tanh tensordot tile trunc unique var
where broadcast_to arange eye frexp ldexp
"""
_VIEWS = {"moveaxis", "swapaxes", "expand_dims", "broadcast_to", "broadcast_arrays", "flip"}


def _function(name: str) -> Any:
    numpys = getattr(_np, name)

    def function(*arguments: Any, **options: Any) -> Any:
        if name in _VIEWS:
            first, *rest = arguments
            return first._view(numpys(first._array, *rest, **options))
        return _fake.launch(name, numpys, *arguments, **options)

    function.__name__ = name
    return function


for _name in _SAME.split():
    globals()[_name] = getattr(_np, _name)
for _name in _FUNCTIONS.split():
    globals()[_name] = _function(_name)
del _name


def array(
    obj: Any,
    dtype: Any = None,
    copy: Any = True,
    order: str = "K",
    subok: bool = False,
    ndmin: int = 0,
    *,
    blocking: bool = False,
) -> ndarray:
    if isinstance(obj, ndarray):
        here = obj._device_id == _fake.current_device()
        same = dtype is None or obj.dtype == dtype
        if here and same and not copy:
            return obj
        obj = obj if here else obj.copy()
        return obj.astype(obj.dtype if dtype is None else dtype, order=order, copy=copy or not same)
    if isinstance(obj, list | tuple) and any(isinstance(part, ndarray) for part in obj):
        return globals()["stack"]([array(part) for part in obj])
    values = _np.array(obj, dtype, order=order, ndmin=ndmin)
    if values.dtype.kind in "OSUV" and values.dtype.name != "bfloat16":
        raise ValueError(f"Unsupported dtype {values.dtype}")
    _fake.log.append("copy to the device")
    return ndarray._of(values.astype(values.dtype.newbyteorder("="), copy=False), _fake.current_device())


def asarray(a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None, blocking: bool = False) -> ndarray:
    return array(a, dtype, copy=bool(copy), order=order or "K", blocking=blocking)


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    a = asarray(a, dtype)
    return a if a.flags.c_contiguous else a.copy()


def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> Any:
    if isinstance(a, ndarray):
        return a.get(stream, order, out, blocking)
    return _np.asarray(a)


def astype(x: ndarray, dtype: Any, /, *, copy: bool = True) -> ndarray:
    return x.astype(dtype, copy=copy)


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, float if dtype is None else dtype, order=order)


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    return _fake.launch("fill", _np.full, shape, fill_value, dtype, order)


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    _fake.log.append("memset")
    return ndarray._of(_np.zeros(shape, dtype, order), _fake.current_device())


def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 1, dtype or float, order)


def empty_like(prototype: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    like = _np.empty_like(prototype._array, dtype, order, shape=shape)
    return ndarray._of(like, _fake.current_device())


def full_like(
    a: Any, fill_value: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None
) -> ndarray:
    result = empty_like(a, dtype, order, subok, shape)
    result.fill(fill_value)
    return result


def zeros_like(a: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    result = empty_like(a, dtype, order, subok, shape)
    result._array[...] = 0
    _fake.log.append("memset")
    return result


def ones_like(a: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    return full_like(a, 1, dtype, order, subok, shape)


def reshape(a: ndarray, newshape: Any, order: str = "C", *, copy: Any = None) -> ndarray:
    return a.reshape(newshape, order=order)


def transpose(a: ndarray, axes: Any = None) -> ndarray:
    return a.transpose(axes)


def copyto(dst: ndarray, src: Any, casting: str = "same_kind", where: Any = None) -> None:
    dst[...] = src


def get_array_module(*args: Any) -> Any:
    return sys.modules[__name__] if any(isinstance(arg, ndarray) for arg in args) else _np


def from_dlpack(array: Any, *, device: Any = None, copy: Any = None) -> ndarray:
    return ndarray._of(_np.from_dlpack(array), _fake.current_device())


def may_share_memory(a: ndarray, b: ndarray, max_work: Any = None) -> bool:
    return bool(_np.may_share_memory(a._array, b._array))


def shares_memory(a: ndarray, b: ndarray, max_work: Any = None) -> bool:
    return bool(_np.shares_memory(a._array, b._array))

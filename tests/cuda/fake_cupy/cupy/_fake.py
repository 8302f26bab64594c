"""What stands behind the fake: devices, streams, a log of what a GPU would be asked to do, and the array class.

It is as strict as CuPy, or stricter: a NumPy array in a computation is a TypeError, an array of another device than the
current one a ValueError, copies that do not block arrive when the stream is synchronized, and nothing in host memory
that a copy is still reading may change meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

DEVICES = 2


def count(kind: str) -> int:
    """Return the number of log entries that begin with this text."""
    return sum(entry.startswith(kind) for entry in log)


class CUDARuntimeError(RuntimeError):
    """An error that the CUDA runtime reports."""


# ---- Devices ---------------------------------------------------------------------------------------------------------


class _Thread(threading.local):
    def __init__(self) -> None:
        self.quiet = False
        self.device = 0
        self.streams: dict[int, Stream] = {}  # the current one of each device


_thread = _Thread()


class _Log(list[str]):
    def append(self, entry: str) -> None:
        if not _thread.quiet:
            super().append(entry)


counted: Counter[str] = Counter()  # allocations, views, and questions for a device, a stream or a pointer
log = _Log()  # "launch add", "synchronize stream", "copy to the host", …, in order


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Let a test read an array on any device without an entry in the log."""
    _thread.quiet = True
    try:
        yield
    finally:
        _thread.quiet = False


class Device:
    """`cupy.cuda.Device`; the fake has two devices."""

    def __init__(self, device: Any = None) -> None:
        counted["device"] += 1
        if device is None:
            device = _thread.device
        self.id = device.id if isinstance(device, Device) else operator.index(device)
        self._before: list[int] = []

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    __hash__ = None  # type: ignore[assignment]

    def use(self) -> None:
        if not 0 <= self.id < DEVICES:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        _thread.device = self.id

    def __enter__(self) -> Device:
        before = _thread.device
        self.use()
        self._before.append(before)
        return self

    def __exit__(self, *error: object) -> None:
        _thread.device = self._before.pop()

    def synchronize(self) -> None:
        log.append("synchronize device")
        for stream in _streams:
            if stream.device_id == self.id:
                stream._flush()

    @property
    def compute_capability(self) -> str:
        return "90"

    @property
    def mem_info(self) -> tuple[int, int]:
        return 2**33, 2**34


def current_device() -> int:
    counted["device"] += 1
    return _thread.device


# ---- Streams ---------------------------------------------------------------------------------------------------------

_streams: list[Stream] = []


class Stream:
    """`cupy.cuda.Stream`: work on it is done at once, copies to the host when it is synchronized."""

    null: Stream

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        self.ptr = 0 if null else 0x1000 + 16 * len(_streams)
        self.device_id = _thread.device
        self.is_non_blocking = non_blocking
        self._arriving: list[tuple[Any, Any]] = []  # host memory, and what it will hold
        self._leaving: list[tuple[Any, Any]] = []  # host memory, and what it has to hold still
        self._before: list[Stream] = []
        _streams.append(self)

    def __enter__(self) -> Stream:
        self._before.append(get_current_stream())
        return self.use()

    def __exit__(self, *error: object) -> None:
        _thread.streams[_thread.device] = self._before.pop()

    def use(self) -> Stream:
        _thread.streams[_thread.device] = self
        return self

    def synchronize(self) -> None:
        log.append("synchronize stream")
        self._flush()

    def _flush(self) -> None:
        for memory, values in self._arriving:
            memory[...] = values
        leaving, self._leaving, self._arriving = self._leaving, [], []
        for memory, values in leaving:
            assert memory.tobytes() == values, "host memory was written to while it was being copied from"

    def wait_event(self, event: Event) -> None:
        """Work is done at once, so there is nothing to wait for."""

    def record(self, event: Event | None = None) -> Event:
        return Event() if event is None else event

    @property
    def done(self) -> bool:
        return not self._arriving and not self._leaving


class ExternalStream(Stream):
    """`cupy.cuda.ExternalStream`: a stream of another library."""

    def __init__(self, ptr: int, device_id: int = -1) -> None:
        super().__init__()
        self.ptr = ptr


_null = [None] * DEVICES


def get_current_stream(device_id: int = -1) -> Stream:
    counted["stream"] += 1
    device_id = _thread.device if device_id < 0 else device_id
    if device_id not in _thread.streams:
        _thread.streams[device_id] = default_stream(device_id)
    return _thread.streams[device_id]


def default_stream(device_id: int) -> Stream:
    """Return the null stream of a device, the same in all threads."""
    if _null[device_id] is None:
        _null[device_id] = stream = Stream(null=True)
        stream.device_id = device_id
    return _null[device_id]


class Event:
    """`cupy.cuda.Event`."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.done = True

    def record(self, stream: Stream | None = None) -> None:
        """Work is done at once."""

    def synchronize(self) -> None:
        log.append("synchronize event")


# ---- Arrays ----------------------------------------------------------------------------------------------------------


class MemoryPointer:
    """`cupy.cuda.MemoryPointer`: where an array begins, and on which device."""

    def __init__(self, ptr: int, device_id: int) -> None:
        counted["pointer"] += 1
        self.ptr, self.device_id = ptr, device_id

    @property
    def device(self) -> Device:
        return Device(self.device_id)

    def memset(self, value: int, size: int) -> None:
        log.append("memset")
        ctypes.memset(self.ptr, value, size)


class Flags:
    """`cupy.ndarray.flags`, which have no entry for writing or alignment."""

    def __init__(self, flags: Any) -> None:
        self.c_contiguous, self.f_contiguous, self.owndata = flags.c_contiguous, flags.f_contiguous, flags.owndata
        self.forc, self.fnc = flags.forc, flags.fnc


SCALARS = (bool, int, float, complex, np.generic)


def launch(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Do as NumPy does, as one entry in the log; arrays have to be on the current device, and so is the result."""
    log.append(f"launch {name}")
    options = {key: _inside(value) for key, value in options.items()}
    return _wrapped(function(*map(_inside, arguments), **options))


def _inside(value: Any) -> Any:
    """Return the NumPy array inside a fake array."""
    if isinstance(value, ndarray):
        if value._device_id != _thread.device and not _thread.quiet:
            raise ValueError(
                "Array device must be same as the current device: array device ="
                f" {value._device_id} while current = {_thread.device}"
            )
        return value._array
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, list | tuple):
        return type(value)(map(_inside, value))
    return value


def _wrapped(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        counted["allocation"] += 1
        return ndarray._of(np.asarray(value), _thread.device)
    if isinstance(value, list | tuple):
        return type(value)(map(_wrapped, value))
    return value


class ndarray:  # noqa: N801
    """`cupy.ndarray` over NumPy memory."""

    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None, order: str = "C"
    ) -> None:
        if memptr is not None or strides is not None:
            raise NotImplementedError("the fake makes no arrays over given memory")
        counted["allocation"] += 1
        array = np.empty(shape, dtype, order=order)
        array.view(np.uint8).fill(0xA5) if array.ndim else None  # what nobody has written
        self._array, self._device_id = array, _thread.device

    @classmethod
    def _of(cls, array: Any, device_id: int) -> ndarray:
        self = cls.__new__(cls)
        self._array, self._device_id = array, device_id
        return self

    def _view(self, array: Any) -> ndarray:
        counted["view"] += 1
        return ndarray._of(array, self._device_id)

    # ---- What it is ----

    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)
    strides = property(lambda self: self._array.strides)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    itemsize = property(lambda self: self._array.itemsize)
    nbytes = property(lambda self: self._array.nbytes)
    flags = property(lambda self: Flags(self._array.flags))
    device = property(lambda self: Device(self._device_id))
    data = property(lambda self: MemoryPointer(self._array.ctypes.data if self.size else 0, self._device_id))
    T = property(lambda self: self._view(self._array.T))

    @property
    def base(self) -> ndarray | None:
        return None if self._array.base is None else self._view(self._array.base)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = dict(self._array.__array_interface__)
        return interface | {"stream": 1, "version": 3, "data": (self.data.ptr, False)}

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed."
            " Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__":
            raise TypeError(f"{ufunc.__name__}.{method} is not supported")
        return launch(ufunc.__name__, ufunc, *inputs, **options)

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} of a CuPy array: call the function of cupy")

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Any:
        return (self[index] for index in range(len(self)))

    # ---- To the host and back ----

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> Any:
        stream = get_current_stream(self._device_id) if stream is None else stream
        if out is None:
            out = np.empty(self.shape, self.dtype, order=order)
        elif not isinstance(out, np.ndarray):
            raise TypeError(f"Only numpy.ndarray can be obtained from cupy.ndarray; got {type(out)}")
        elif out.dtype != self.dtype or out.shape != self.shape:
            raise ValueError("Shape or dtype mismatch")
        elif not out.flags.c_contiguous:
            raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")
        log.append("copy to the host")
        stream._arriving.append((out, self._array.copy()))
        if blocking:
            stream.synchronize()
        else:
            out.reshape(-1).view(np.uint8).fill(0xA5)  # not there yet
        return out

    def set(self, arr: Any, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError("Shape mismatch")
        if not self.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        log.append("copy to the device")
        self._array[...] = arr
        if stream is not None:
            stream._leaving.append((arr, arr.tobytes()))

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()  # another library has no fake device

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def tobytes(self, order: str = "C") -> bytes:
        return self.get().tobytes(order)

    def __repr__(self) -> str:
        return repr(self.get())

    def __str__(self) -> str:
        return str(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get().item() if self.ndim == 0 else self.get(), spec)

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __reduce__(self) -> Any:
        return _from_host, (self.get(),)

    def __deepcopy__(self, memo: Any) -> ndarray:
        with self.device:
            return self.copy()

    # ---- Views ----

    def __getitem__(self, index: Any) -> ndarray:
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, np.ndarray) and part.ndim for part in parts):
            raise IndexError("Unsupported type <class 'numpy.ndarray'>")
        if any(isinstance(part, ndarray | list) for part in parts):
            return launch("take", lambda array, index: array[index], self, index)
        return self._view(np.asarray(self._array[index]) if Ellipsis in parts else self._basic(index))

    def _basic(self, index: Any) -> Any:
        return self._array[(*(index if isinstance(index, tuple) else (index,)), Ellipsis)]

    def __setitem__(self, index: Any, value: Any) -> None:
        def write(array: Any, index: Any, value: Any) -> None:
            array[index] = value

        launch("copy", write, self, index, value)

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        result = self._array.reshape(*shape, order=order)
        if np.may_share_memory(result, self._array) or not self.size:
            return self._view(result)
        return launch("copy", lambda array: result, self)

    def transpose(self, *axes: Any) -> ndarray:
        return self._view(self._array.transpose(*axes))

    def swapaxes(self, a: int, b: int) -> ndarray:
        return self._view(self._array.swapaxes(a, b))

    def view(self, dtype: Any = None, type: Any = None) -> ndarray:  # noqa: A002
        return self._view(self._array.view() if dtype is None else self._array.view(dtype))

    def ravel(self, order: str = "C") -> ndarray:
        return self.reshape(-1, order=order)

    def squeeze(self, axis: Any = None) -> ndarray:
        return self._view(self._array.squeeze(axis))

    # ---- Copies ----

    def astype(
        self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True
    ) -> ndarray:
        if not copy and np.dtype(dtype) == self.dtype:
            return self
        return launch("astype", lambda array: array.astype(dtype, order=order), self)

    def copy(self, order: str = "C") -> ndarray:
        if self._device_id != _thread.device:  # copies go to the current device
            log.append("launch copy between devices")
            return ndarray._of(self._array.copy(order), _thread.device)
        return launch("copy", lambda array: array.copy(order), self)

    def fill(self, value: Any) -> None:
        self[...] = value


def _from_host(array: Any) -> ndarray:
    log.append("copy to the device")
    return ndarray._of(array.copy(), _thread.device)


def _operator(name: str, reflected: bool = False) -> Callable[..., Any]:
    function = getattr(operator, name)

    def method(self: ndarray, other: Any) -> Any:
        if not isinstance(other, (ndarray, np.ndarray, *SCALARS)):
            return NotImplemented
        return launch(name, function, other, self) if reflected else launch(name, function, self, other)

    return method


def _in_place(name: str) -> Callable[..., Any]:
    def method(self: ndarray, other: Any) -> ndarray:
        launch(name, getattr(operator, name), self, other)
        return self

    return method


def _method(name: str) -> Callable[..., Any]:
    def method(self: ndarray, *arguments: Any, **options: Any) -> Any:
        return launch(name, getattr(np.ndarray, name), self, *arguments, **options)

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    _full = _name + "_" if _name in ("and", "or") else _name
    setattr(ndarray, f"__{_name}__", _operator(_full))
    setattr(ndarray, f"__r{_name}__", _operator(_full, reflected=True))
    if _name in ("add", "sub", "mul", "truediv", "and", "or"):
        setattr(ndarray, f"__i{_name}__", _in_place(f"i{_name.rstrip('_')}" if _full == _name else f"i{_name}"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(ndarray, f"__{_name}__", _operator(_name))
for _name in ("neg", "abs", "invert", "pos"):
    setattr(ndarray, f"__{_name}__", lambda self, name=_name: launch(name, getattr(operator, name), self))
for _name in ("sum", "mean", "max", "min", "any", "all", "argmax", "argmin", "prod", "var", "std", "cumsum", "take"):
    setattr(ndarray, _name, _method(_name))
ndarray.__module__ = "cupy"

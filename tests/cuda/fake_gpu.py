"""The CUDA kernels on the arrays of the fake CuPy: the package's source, compiled by g++, on its two devices."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import shim

from arraybn.kernels.cuda import launch
from arraybn.kernels.cuda.launch import Grid


class FakeGpu(shim.Shim):
    """A launcher of kernels on the CPU, for arrays of the fake CuPy; each launch is an entry of the log."""

    def __init__(self, *libraries: Path, **options: int) -> None:
        super().__init__(*libraries, **options)  # type: ignore[arg-type]
        self._cupy = importlib.import_module("cupy")

    def on(self, array: Any) -> contextlib.AbstractContextManager[Any]:
        return array.device

    def at(self, device: int) -> contextlib.AbstractContextManager[Any]:
        return self._cupy.cuda.Device(device)

    def current(self) -> tuple[int, int]:
        return self._cupy.cuda.get_device_id(), self._cupy.cuda.get_current_stream().ptr

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        self._cupy._fake.counted["allocation"] += 1
        return self._cupy.ndarray._of(super().empty(shape, dtype), self._cupy._fake._thread.device)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        self._cupy._fake.log.append("memset")
        array = self.empty(shape, dtype)
        array._array[...] = 0
        return array

    def pointer(self, array: Any) -> int:
        assert array._device_id == self._cupy._fake._thread.device, "an array of another device than the current one"
        return int(array.data.ptr)

    def start(self, function: int, grid: Grid, stream: int, arguments: int) -> None:
        self._cupy._fake.log.append(f"launch {self.names[function]}")
        with self._lock, self._cupy._fake.unlogged():  # the shim looks at arrays itself, and at all streams' room
            super().start(function, grid, stream, arguments)


@contextlib.contextmanager
def install(**options: int) -> Iterator[FakeGpu]:
    """Let arraybn.kernels.cuda and cuda_fused take arrays of the fake CuPy."""
    gpu = FakeGpu(*shim.libraries(), **options)
    with mock.patch.object(launch, "launcher", return_value=gpu):
        yield gpu

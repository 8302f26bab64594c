"""The namespaces and devices that every test of the core runs on."""

from __future__ import annotations

import contextlib
import importlib
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from .gpu import cupy_here
from .libraries import need


@dataclass
class Home:
    """A namespace and one of its devices, with conversions from and to NumPy."""

    name: str
    xp: Any
    device: Any
    wide: str  # the dtype of its statistics

    def array(self, values: Any, dtype: str | None = None) -> Any:
        """Return `values` (NumPy) as an array of this namespace, on this device."""
        values = np.asarray(values, dtype)
        return self.xp.asarray(values, device=self.device, copy=True)

    def numpy(self, array: Any) -> Any:
        """Return `array`, which must belong to this namespace and device, as a NumPy array."""
        import array_api_compat

        assert array_api_compat.array_namespace(array) is array_api_compat.array_namespace(self.array(0.0, "float32"))
        if self.device is not None:
            assert array.device == self.device, f"{array.device} is not {self.device}"
        if array_api_compat.is_torch_array(array):
            return array.numpy()
        if array_api_compat.is_cupy_array(array):
            return array.get()
        if self.device is not None:
            array = array.to_device(self.xp.Device("CPU_DEVICE"))
        return np.asarray(array)


def _homes() -> dict[str, Callable[[contextlib.ExitStack], Home]]:
    def strict(device: str, wide: str) -> Callable[[contextlib.ExitStack], Home]:
        def make(_: contextlib.ExitStack) -> Home:
            xp = need("array_api_strict")
            return Home(f"strict {device}", xp, xp.Device(device), wide)

        return make

    def jax(x64: bool) -> Callable[[contextlib.ExitStack], Home]:
        def make(stack: contextlib.ExitStack) -> Home:
            stack.enter_context(need("jax").enable_x64(x64))
            return Home(f"jax x64={x64}", need("jax.numpy"), None, "float64" if x64 else "float32")

        return make

    def cupy(device: int, kernels: str) -> Callable[[contextlib.ExitStack], Home]:
        def make(stack: contextlib.ExitStack) -> Home:
            xp = stack.enter_context(cupy_here(kernels))
            if device >= xp.cuda.runtime.getDeviceCount():
                pytest.skip("there is one GPU")
            compat = importlib.import_module("array_api_compat.cupy")
            return Home(f"cupy {device}, {kernels}", compat, xp.cuda.Device(device), "float64")

        return make

    def without_numba(stack: contextlib.ExitStack) -> Home:
        stack.enter_context(unittest.mock.patch("arraybn.kernels._has_numba", return_value=False))
        stack.enter_context(unittest.mock.patch("arraybn.functional._PLANS", {}))
        return Home("numpy without numba", np, None, "float64")

    return {
        "numpy": lambda _: Home("numpy", np, None, "float64"),
        "numpy-reference": without_numba,
        "strict": strict("CPU_DEVICE", "float64"),
        "strict-device1": strict("device1", "float64"),
        "strict-no_float64": strict("no_float64", "float32"),
        "torch": lambda _: Home("torch", need("array_api_compat.torch"), None, "float64"),
        "jax": jax(False),
        "jax-x64": jax(True),
        "cupy": cupy(0, "reference"),
        "cupy-device1": cupy(1, "reference"),
        "cupy-kernels": cupy(1, "cuda"),
    }


HOMES = _homes()

"""Fixtures: the namespaces that every test of the core runs on."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "cuda")]

hypothesis.settings.register_profile("default", deadline=None, max_examples=60)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

collect_ignore = [
    "mpi",
    "cuda",
]  # scripts that test_mpi.py starts under mpirun; a stand-in for CuPy, and what runs CUDA

REQUIRED = set(filter(None, os.environ.get("ARRAYBN_REQUIRE", "").split(",")))


def need(name: str) -> Any:
    """The module, or a skip; a failure where ARRAYBN_REQUIRE promises that it is there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if name in REQUIRED:
            raise
        pytest.skip(f"{name} is not installed")


@dataclass
class Home:
    """A namespace and a device of it, with the ways in and out."""

    name: str
    xp: Any
    device: Any
    wide: str  # the dtype of its statistics

    def array(self, values: Any, dtype: str | None = None) -> Any:
        """`values` (NumPy) here."""
        values = np.asarray(values, dtype)
        return self.xp.asarray(values, device=self.device, copy=True)

    def numpy(self, array: Any) -> Any:
        """`array`, which must be one of here, in NumPy."""
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


FAKE_CUPY = Path(__file__).parent / "cuda" / "fake_cupy"


@functools.cache
def _real_cupy() -> Any:
    """CuPy where it is installed and finds a GPU, otherwise None."""
    if importlib.util.find_spec("cupy") is None:
        return None
    code = "import cupy; cupy.cuda.runtime.getDeviceCount(); cupy.zeros(1)"
    if subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=False).returncode:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of where it finds CUDA, or not
        return importlib.import_module("cupy")


_fake_modules: dict[str, Any] = {}


@contextlib.contextmanager
def cupy_here(kernels: str = "reference") -> Iterator[Any]:
    """The real CuPy where it finds a GPU; otherwise the fake one, which other tests do not see.

    It is imported once, because array-api-compat keeps what it has found under that name. With `kernels` "cuda" its
    arrays get the CUDA kernels, which g++ has compiled.
    """
    if (real := _real_cupy()) is not None:
        has = unittest.mock.patch("arraybn.kernels._is_recent", return_value=kernels == "cuda")
        with has:
            yield real
        return
    sys.path.insert(0, str(FAKE_CUPY))
    try:
        sys.modules.update(_fake_modules)
        cupy, _ = importlib.import_module("cupy"), importlib.import_module("cupyx")
        cupy._fake.log.clear()
        with _kernels(kernels):
            yield cupy
    finally:
        sys.path.remove(str(FAKE_CUPY))
        for name in [name for name in sys.modules if name.partition(".")[0] in ("cupy", "cupyx")]:
            _fake_modules[name] = sys.modules.pop(name)


@contextlib.contextmanager
def _kernels(kernels: str) -> Iterator[None]:
    """Those that serve the arrays of the fake CuPy."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(unittest.mock.patch("arraybn.kernels._is_recent", return_value=kernels == "cuda"))
        if kernels == "cuda":
            if shutil.which(os.environ.get("CXX", "g++")) is None:
                pytest.skip("there is no g++")
            stack.enter_context(importlib.import_module("fake_gpu").install())
        yield


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


@pytest.fixture(params=["reference", "cpu"])
def numpy_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy arrays are served by the reference, as without numba, and by the compiled kernels."""
    if request.param == "cpu":
        need("numba")
    else:
        monkeypatch.setattr("arraybn.kernels._has_numba", lambda: False)


@pytest.fixture(params=list(HOMES))
def home(request: pytest.FixtureRequest) -> Iterator[Home]:
    """Each namespace and device."""
    with contextlib.ExitStack() as stack:
        yield HOMES[request.param](stack)

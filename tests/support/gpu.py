"""CuPy for tests: the real one where there is a GPU, otherwise the fake one in tests/cuda."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FAKE_CUPY = Path(__file__).parents[1] / "cuda" / "fake_cupy"


@functools.cache
def real_cupy() -> Any:
    """Return CuPy where it is installed and finds a GPU, otherwise None."""
    if importlib.util.find_spec("cupy") is None:
        return None
    code = "import cupy; cupy.cuda.runtime.getDeviceCount(); cupy.zeros(1)"
    if subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=False).returncode:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy warns where it finds no CUDA
        return importlib.import_module("cupy")


_fake_modules: dict[str, Any] = {}


@contextlib.contextmanager
def cupy_here(kernels: str = "reference") -> Iterator[Any]:
    """Yield the real CuPy where it finds a GPU, otherwise the fake CuPy, hidden from other tests.

    The fake is imported once, because array-api-compat caches what it finds under the name "cupy". With `kernels`
    "cuda", its arrays are served by the CUDA kernels, which g++ has compiled.
    """
    if (real := real_cupy()) is not None:
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
    """Let the arrays of the fake CuPy be served by these kernels."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(unittest.mock.patch("arraybn.kernels._is_recent", return_value=kernels == "cuda"))
        if kernels == "cuda":
            if shutil.which(os.environ.get("CXX", "g++")) is None:
                pytest.skip("there is no g++")
            stack.enter_context(importlib.import_module("fake_gpu").install())
        yield

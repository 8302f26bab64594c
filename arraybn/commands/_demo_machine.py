"""The requirements of the demo: libraries, a folder to write to, and the host or a GPU to train on."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .._arrays.namespaces import Array, Namespace, array_namespace
from ..modules import Module

DEVICES = ("cpu", "cuda")


def missing_libraries(plot: bool) -> str:
    """Return the libraries of the demo extra that cannot be imported, and the command that installs them; or ''."""
    needed = {"scikit-learn": "sklearn.datasets", "tqdm": "tqdm", "matplotlib": "matplotlib.figure"}
    if not plot:
        del needed["matplotlib"]
    problems = []
    for name, module in needed.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            problems.append(f"{name} ({error})")
    return f'{", ".join(problems)}: {sys.executable} -m pip install "arraybn[demo]"' if problems else ""


def folder_problem(folder: Path) -> str:
    """Create the folder; return the reason if no file can be written there, else ''."""
    try:
        if folder.exists() and not folder.is_dir():
            return f"--out {folder}: expected a folder; this is a file"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"--out {folder}: cannot write there: {error.strerror or error}"


def device_problem(device: str) -> str:
    """Return the reason if this device cannot be used, else ''."""
    if device == "cpu":
        return ""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        install = f'{sys.executable} -m pip install "arraybn[cuda12]" (for CUDA 13: cuda13)'
        return f"--device cuda: expected CuPy, which cannot be imported ({error}). Run: {install}"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:  # CuPy's own class
        return f"--device cuda: expected a GPU; CuPy finds none: {error}"
    return ""


def namespace(device: str, comm: Any = None) -> Namespace:
    """Return the namespace of the arrays to train with, and make the GPU of this rank the current one.

    The ranks of a machine take its GPUs in turn; with more ranks than GPUs, several ranks share a GPU.
    """
    if device == "cpu":
        return np
    cupy, local = importlib.import_module("cupy"), 0
    if comm is not None:
        local = comm.Split_type(importlib.import_module("mpi4py.MPI").COMM_TYPE_SHARED).rank
    cupy.cuda.Device(local % cupy.cuda.runtime.getDeviceCount()).use()
    return cupy


def device_text(xp: Namespace) -> str:
    """Return ' on NVIDIA H200, CUDA device 0', or '' for the host."""
    if xp is np:
        return ""
    index = xp.cuda.runtime.getDevice()
    return f" on {xp.cuda.runtime.getDeviceProperties(index)['name'].decode()}, CUDA device {index}"


def to_network_device(network: Module, array: Array) -> Array:
    """Return the host's array in the namespace and on the device of the network."""
    like = next(iter(network.parameters())).data
    return array if isinstance(like, np.ndarray) else array_namespace(like).asarray(array)

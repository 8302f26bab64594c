"""The requirements of the demo: libraries, a folder to write to, and the host or a GPU to train on."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .._arrays.namespaces import Array, Namespace, array_namespace
from ..modules import Module

DEVICES = ("cpu", "cuda")


def problem_with(arguments: argparse.Namespace, *, writes: bool) -> str:
    """Return the first requirement that is missing, or ''; create the folder if this process `writes` there."""
    problem = _missing_libraries(not arguments.no_plot)
    if arguments.device == "cuda":
        problem = problem or _gpu_problem()
    return problem or (_folder_problem(arguments.out) if writes else "")


def refuse(problem: str) -> int:
    """Print the problem; return the exit status."""
    print(f"demo: {problem}", file=sys.stderr)
    return 1


def _missing_libraries(plot: bool) -> str:
    needed = [("scikit-learn", "sklearn.datasets"), ("tqdm", "tqdm"), ("matplotlib", "matplotlib.figure")]
    problems = []
    for name, module in needed if plot else needed[:-1]:
        try:
            importlib.import_module(module)
        except ImportError as error:
            problems.append(f"{name} ({error})")
    return f'{", ".join(problems)}: {sys.executable} -m pip install "arraybn[demo]"' if problems else ""


def _gpu_problem() -> str:
    try:
        importlib.import_module("cupy").cuda.runtime.getDeviceCount()
    except ImportError as error:
        install = f'{sys.executable} -m pip install "arraybn[cuda12]" (for CUDA 13: cuda13)'
        return f"--device cuda: expected CuPy, which cannot be imported ({error}). Run: {install}"
    except RuntimeError as error:  # CuPy's own class
        return f"--device cuda: expected a GPU; CuPy finds none: {error}"
    return ""


def _folder_problem(folder: Path) -> str:
    try:
        if folder.exists() and not folder.is_dir():
            return f"--out {folder}: expected a folder; this is a file"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"--out {folder}: cannot write there: {error.strerror or error}"


def namespace(device: str, comm: Any = None) -> tuple[Namespace, str]:
    """Return the namespace to train with and ' on NVIDIA H200, CUDA device 0', or NumPy and ''.

    The GPU of this rank becomes the current one. The ranks of a machine take its GPUs in turn; with more ranks than
    GPUs, several ranks share a GPU.
    """
    if device == "cpu":
        return np, ""
    cupy, local = importlib.import_module("cupy"), 0
    if comm is not None:
        local = comm.Split_type(importlib.import_module("mpi4py.MPI").COMM_TYPE_SHARED).rank
    index = local % cupy.cuda.runtime.getDeviceCount()
    cupy.cuda.Device(index).use()
    return cupy, f" on {cupy.cuda.runtime.getDeviceProperties(index)['name'].decode()}, CUDA device {index}"


def to_network_device(network: Module, array: Array) -> Array:
    """Return the host's array in the namespace and on the device of the network."""
    like = next(iter(network.parameters())).data
    return array if isinstance(like, np.ndarray) else array_namespace(like).asarray(array)

"""Where the demo trains: on the host, or with CuPy on a GPU."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np

from .._arrays.namespaces import Array, Namespace, array_namespace
from ..modules import Module

DEVICES = ("cpu", "cuda")


def problem(device: str) -> str:
    """Why one cannot train there, or ''."""
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
    """Of the arrays to train with. Each rank takes the GPU of its number on this machine, before it allocates.

    Where there are more ranks than GPUs, several share one.
    """
    if device == "cpu":
        return np
    cupy, local = importlib.import_module("cupy"), 0
    if comm is not None:
        local = comm.Split_type(importlib.import_module("mpi4py.MPI").COMM_TYPE_SHARED).rank
    cupy.cuda.Device(local % cupy.cuda.runtime.getDeviceCount()).use()
    return cupy


def name(xp: Namespace) -> str:
    """' on NVIDIA H200, CUDA device 0', or '' for the host."""
    if xp is np:
        return ""
    index = xp.cuda.runtime.getDevice()
    return f" on {xp.cuda.runtime.getDeviceProperties(index)['name'].decode()}, CUDA device {index}"


def beside(network: Module, array: Array) -> Array:
    """The host's array where the network is."""
    like = next(iter(network.parameters())).data
    return array if isinstance(like, np.ndarray) else array_namespace(like).asarray(array)

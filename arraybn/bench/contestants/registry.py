"""The contestants of the bench on the CPU, of the bench on a GPU, and of `check`."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import numpy as np

from ..._install import requirement
from ...kernels import MODULES
from ..cases import LARGE_OPERATIONS
from ..device import HostDevice
from . import Contestant, Library, Measured, formulas, jax, onnx, ours, pytorch, tensorflow

# ---- The CPU: a process for each library -----------------------------------------------------------------------------

COPYTO, OPERATORS = "numpy.copyto", "aten"
WORKING = 8  # arrays like x that the greediest has for a while beside what it holds: the reference, in float64
_OURS = (
    Contestant("copy", COPYTO, "arraybn", ours.copy_calls, operations=("copy",)),
    Contestant("out", "arraybn, out=", "arraybn", ours.function_calls, operations=LARGE_OPERATIONS),
    Contestant("new", "arraybn", "arraybn", ours.host_calls),
)
ARRAYBN = Library("arraybn", "arraybn", ("numpy",), "numpy", 3, _OURS)


def _peer(name: str, title: str, package: str, held: int, build: Any, **options: Any) -> Library:
    return Library(name, title, (package,), package, held, (Contestant(name, title, name, build, **options),))


EXACT, MASKED = ON_REQUEST = ("exact", "masked")  # take part where they are asked for
PEERS = (
    _peer("reference", "arraybn reference", "numpy", 2, ours.reference_calls),
    _peer("numpy", "NumPy formulas", "numpy", 3, formulas.host_calls),
    _peer("torch", "PyTorch", "torch", 3, pytorch.host_calls),
    _peer(OPERATORS, "PyTorch operators", "torch", 3, pytorch.operator_calls, operations=LARGE_OPERATIONS),
    _peer("jax", "JAX", "jax", 4, jax.host_calls),
    _peer("tensorflow", "TensorFlow", "tensorflow", 3, tensorflow.host_calls),
    _peer(EXACT, "arraybn exact, out=", "numpy", 2, ours.exact_calls, operations=LARGE_OPERATIONS),
    _peer(MASKED, "arraybn masked, out=", "numpy", 2, ours.masked_calls, operations=LARGE_OPERATIONS),
)


def has_numba() -> bool:
    """Return whether arraybn has its compiled kernels; without, it works by its reference."""
    return importlib.util.find_spec("numba") is not None


# ---- A GPU: one process, which all contestants share -----------------------------------------------------------------

GPU_CONTESTANTS = (
    Contestant("fused", "arraybn fused", "arraybn", ours.function_calls),
    Contestant("split", "arraybn split", "arraybn", ours.function_calls),
    Contestant("reference", "arraybn reference", "reference", ours.function_calls),
    Contestant(EXACT, "arraybn exact", EXACT, ours.exact_calls),
    Contestant(MASKED, "arraybn masked", MASKED, ours.masked_calls),
    Contestant("torch", "PyTorch", "torch", pytorch.device_calls, "torch"),
    Contestant("native", "PyTorch native", "torch", pytorch.device_calls, "torch"),
    Contestant("jax", "JAX", "jax", jax.device_calls, "jax"),
)
# As --peers has them, and what each needs
GPU_PEERS = {"reference": "cupy", MASKED: "cupy", EXACT: "cupy", "torch": "torch", "jax": "jax"}
GPU_LAYERS = {"arraybn": ours.layer_calls, "PyTorch": pytorch.layer_calls}  # whose time on the host is taken


def why_absent(one: Contestant, device: HostDevice) -> str:
    """Return why a contestant cannot take part on the device, or ''."""
    kernels = device.kernels.get(one.name)
    if isinstance(kernels, str) and (kernels not in MODULES or importlib.util.find_spec(MODULES[kernels]) is None):
        return f"this arraybn has no kernels {kernels!r}"
    peers = {"torch": ("PyTorch", pytorch.finds_gpu), "jax": ("JAX", jax.finds_gpu)}
    title, finds_gpu = peers.get(one.library, ("", None))
    return "" if finds_gpu is None or device.platform != "gpu" or finds_gpu() else f"this {title} finds no GPU"


# ---- Accuracy: a process for each library ----------------------------------------------------------------------------

_DOUBLE, _SINGLE = "N1–N3", "float32 only"
_NAMESPACES = (  # label, module, extra (x64 of JAX, device of array-api-strict), pip, promise
    ("NumPy", "numpy", None, "numpy", _DOUBLE),
    ("CuPy", "cupy", None, requirement("cuda12"), _DOUBLE),
    ("PyTorch", "torch", None, "torch", _DOUBLE),
    ("JAX", "jax.numpy", True, "jax", _DOUBLE),
    ("JAX without float64", "jax.numpy", False, "jax", _SINGLE),
    ("array-api-strict", "array_api_strict", None, "array-api-strict", _DOUBLE),
    ("array-api-strict without float64", "array_api_strict", "no_float64", "array-api-strict", _SINGLE),
)
_KERNELS = {"cpu": ("NumPy", "numba"), "cuda": ("CuPy", "cupy"), "cuda_split": ("CuPy", "cupy")}  # arrays, needs


def measured() -> list[Measured]:
    """Return everyone, installed or not."""
    return [*_measured_ours(), *_measured_peers()]


def _measured_ours() -> list[Measured]:
    """Return every kernel module with every namespace that it takes."""
    found = []
    for kernels, path in MODULES.items():
        takes, needs = _KERNELS.get(kernels, (None, None))
        for label, module, extra, pip, promise in _NAMESPACES:
            if importlib.util.find_spec(path) and (kernels == "reference" or label == takes):
                packages = tuple(dict.fromkeys(filter(None, (module.partition(".")[0], needs))))
                name = f"{label}, {kernels} kernels" if takes else label
                how = requirement("cpu") if kernels == "cpu" else pip
                build = partial(ours.measured, kernels, module, extra)
                found.append(Measured("arraybn", name, packages, how, build, promise))
    return found


def _measured_peers() -> list[Measured]:
    first, last = (partial(pytorch.measured, name) for name in ("contiguous_format", "channels_last"))
    fast, exact = (partial(jax.measured_flax, fast) for fast in (True, False))
    tf = ("tensorflow",)
    return [
        Measured("NumPy", "x.mean(), x.var()", ("numpy",), "numpy", partial(formulas.measured, np.var)),
        Measured("NumPy", "E[x²] − E[x]²", ("numpy",), "numpy", partial(formulas.measured, formulas.one_pass_var)),
        Measured("PyTorch", "batch_norm, channels-first", ("torch",), "torch", first),
        Measured("PyTorch", "batch_norm, channels-last", ("torch",), "torch", last),
        Measured("JAX", "flax BatchNorm", ("jax", "flax"), "flax", fast),
        Measured("JAX", "flax, use_fast_variance=False", ("jax", "flax"), "flax", exact),
        Measured("JAX", "jax.nn.standardize", ("jax",), "jax", jax.measured_standardize),
        Measured("TensorFlow", "fused_batch_norm", tf, "tensorflow", tensorflow.measured_fused),
        Measured("TensorFlow", "moments, batch_normalization", tf, "tensorflow", tensorflow.measured_moments),
        Measured("ONNX Runtime", "BatchNormalization", ("onnxruntime", "onnx"), "onnxruntime onnx", onnx.measured),
    ]

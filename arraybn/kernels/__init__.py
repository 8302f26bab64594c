"""The speed: who does the four sweeps over the data.

A kernel module offers the sweeps of ``arraybn.reference`` under the same names and signatures, for one kind of array.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Protocol, cast

import numpy as np

from .. import reference
from .._arrays.namespaces import FLOATS, Array, array_namespace, dtype_name, is_cupy_array, namespace_name


class Kernels(Protocol):
    """The four sweeps. u and x are (N, C, S); mean, a, b, c and the sums are (C,), in `arraybn._arrays.wide_dtype`.

    `out`, where given, is an array like x that the module may write into; the result is what is returned. A module may
    offer more, which is used where no rank is waited for (or have None under these names):

    - `forward`, `backward`, as in ``kernels/cpu.py``: two sweeps with the formulas of ``reference.py`` between, so that
      it can take a few channels through both before the next;
    - `evaluate(x, mean, var, weight, bias, eps, out) -> mean, rstd, weight, y`: with fixed statistics (E7), of any
      dtype, of which it returns copies in that dtype;
    - `update_running_stats(running_mean, running_var, mean, var, momentum) -> running_mean, running_var` (E4);
    - `widened(*vectors)`: copies of the vectors (C,) in that dtype, None for None, where one call for all costs less.
    """

    def moments(self, x: Array) -> tuple[Array, Array]:
        """(E1) mean and m2."""

    def dots(self, u: Array, x: Array, mean: Array) -> tuple[Array, Array]:
        """(E5) Σu and Σu·(x−mean)."""

    def affine(self, x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
        """(E3, E7) a·(x−mean) + c, in the dtype of x."""

    def affine2(self, u: Array, x: Array, mean: Array, a: Array, b: Array, c: Array, out: Array | None = None) -> Array:
        """(E6) a·u + b·(x−mean) + c, in the dtype of x."""


SWEEPS = ("moments", "dots", "affine", "affine2")
MODULES = {  # imported when first used
    "reference": "arraybn.reference",
    "cpu": "arraybn.kernels.cpu",
    "cuda": "arraybn.kernels.cuda",
    "cuda_fused": "arraybn.kernels.cuda.fused",
}


def select(x: Array, kernels: str | Kernels | None = None) -> Kernels:
    """The kernel module that serves the array `x`: the one asked for, otherwise the fastest that takes such arrays.

    "cpu" takes NumPy arrays, where numba is installed; float16 needs a processor that converts it (F16C), as
    nearly all do. "cuda" takes CuPy arrays of the four dtypes on NVIDIA's GPUs since Volta, and so does "cuda_fused",
    which has to be asked for. "reference" takes all arrays.
    """
    if kernels is None:
        if isinstance(x, np.ndarray):
            return _module("cpu") if _has_numba() and (x.dtype.char != "e" or _has_half()) else reference
        return _module("cuda") if _has_cuda(x) and dtype_name(x.dtype) in FLOATS else reference
    if isinstance(kernels, str):
        if kernels not in MODULES:
            raise ValueError(f"kernels: expected one of {sorted(MODULES)} or a kernel module; got {kernels!r}")
        if kernels == "cpu":
            _check_cpu(x)
        elif kernels != "reference":
            _check_cuda(x, kernels)
        return _module(kernels)
    if missing := [name for name in SWEEPS if not callable(getattr(kernels, name, None))]:
        raise TypeError(
            f"kernels: expected a module with the sweeps {', '.join(SWEEPS)};"
            f" got {kernels!r} without {', '.join(missing)}"
        )
    return kernels


@functools.cache
def _module(name: str) -> Kernels:
    return cast(Kernels, importlib.import_module(MODULES[name]))


@functools.cache
def _has_numba() -> bool:
    """Whether numba can be used: one that was not made for this NumPy cannot be imported."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        importlib.import_module("numba")
    except ImportError as error:
        text = f"arraybn: numba cannot be imported ({error}), so NumPy arrays are served by the reference"
        warnings.warn(f"{text}, which is many times slower", RuntimeWarning, stacklevel=2)
        return False
    return True


def _has_half() -> bool:
    return bool(_module("cpu").HALF)  # type: ignore[attr-defined]


def _has_cuda(x: Array) -> bool:
    """Whether `x` is a CuPy array on a GPU that takes the CUDA kernels."""
    return is_cupy_array(x) and _is_recent(x.device.id)


@functools.cache
def _is_recent(number: int) -> bool:
    """Whether that GPU is one of NVIDIA's (CuPy can be built for AMD's, whose language is HIP) since Volta."""
    cuda = importlib.import_module("cupy").cuda
    return not cuda.runtime.is_hip and int(cuda.Device(number).compute_capability) >= 70


def _check_cuda(x: Array, kernels: str) -> None:
    """Raise unless the CUDA kernels can take `x`."""
    name = namespace_name(array_namespace(x))
    if not is_cupy_array(x):
        move = ". Move it there with cupy.asarray" if name == "numpy" else ""
        raise TypeError(f'kernels: expected a CuPy array for "{kernels}"; got a {name} array{move}')
    if not _has_cuda(x):
        raise TypeError(
            f'kernels: expected a GPU of NVIDIA of compute capability 7.0 or more for "{kernels}"; got another.'
            f" Leave kernels=None"
        )


def _check_cpu(x: Array) -> None:
    """Raise unless the CPU kernels can take `x`."""
    if not isinstance(x, np.ndarray):
        name = namespace_name(array_namespace(x))
        move = ". Move it to the host with cupy.asnumpy" if name == "cupy" else ""
        raise TypeError(f'kernels: expected a NumPy array for "cpu"; got a {name} array{move}')
    if not _has_numba():
        raise ImportError(
            'kernels: expected numba to be installed for "cpu". Install it with: pip install "arraybn[cpu]"'
        )
    if x.dtype.char == "e" and not _has_half():
        raise TypeError('kernels: expected another dtype for "cpu", because this processor lacks F16C; got float16')

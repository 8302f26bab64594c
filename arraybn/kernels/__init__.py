"""The speed: the backends, which do the sweeps over the data, and the one function that chooses among them.

A kernel module offers the sweeps of ``arraybn.reference`` under the same names and with the same arguments, for one
kind of array. A `Backend` completes a module: it takes each operation that a batch norm needs from the module, or
composes the operation, as ``reference.py`` does, from the module's sweeps.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

from .. import exact, reference
from .._arrays.copies import widened
from .._arrays.namespaces import FLOATS, Array, array_namespace, dtype_name, is_cupy_array, namespace_name
from .._install import requirement
from ..reference import Mask, Moments, Pool, Sweeps, Totals
from . import results

Module: TypeAlias = Any  # a module, or any object, with the first four sweeps
SWEEPS = ("moments", "dots", "affine", "affine2", "affine3")
REQUIRED = SWEEPS[:4]  # of a user's module; second derivatives take affine3 of the reference where there is none
MODULES = {  # imported when first used
    "reference": "arraybn.reference",
    "cpu": "arraybn.kernels.cpu",
    "cuda_split": "arraybn.kernels.cuda",
    "cuda_fused": "arraybn.kernels.cuda.fused",  # the name of before "cuda" chose these kernels
    "cuda": "arraybn.kernels.cuda.fused",
    "cuda_cluster": "arraybn.kernels.cuda.cluster",
}


# The modules of exact mode; ``arraybn.exact`` has the sweeps for other arrays.
EXACT = {name: f"arraybn.kernels.{name.partition('_')[0]}.exact" for name in MODULES if name != "reference"}
LARGE = 1_000_000  # values, from which on the missing numba is worth a hint


@dataclass(frozen=True, slots=True, eq=False)
class Backend:
    """Every operation that batch norm needs, for one kind of array. u, x, dy and y are (N, C, S), vectors are (C,).

    `out`, where given, is an array like x that may be written into; the result is the array that is returned. The
    vectors that sweeps are given are in `arraybn._arrays.namespaces.wide_dtype`.
    """

    name: str
    masks: bool  # True where the sweeps take `where`; the reference serves masks otherwise
    moments: Callable[..., tuple[Array, Array]]  # the five sweeps, as in ``reference.py``
    dots: Callable[..., tuple[Array, Array]]
    affine: Callable[..., Array]
    affine2: Callable[..., Array]
    affine3: Callable[..., Array]
    forward: Callable[..., tuple[Moments, Array, Array]]  # (x, weight, bias, eps, pool, out, *, mask) -> batch, rstd, y
    forward_of_part: Callable[..., tuple[Array, Array]]  # (x, batch, weight, bias, eps, out) -> rstd, y
    backward: Callable[..., tuple[Array, Array, Array]]  # (dy, x, batch, rstd, weight, pool, out, *, where) -> dx, …
    evaluate: Callable[..., tuple[Array, Array, Array | None, Array]]
    evaluation_backward: Callable[..., tuple[Array, Array, Array]]
    jvp: Callable[..., Array]  # these four as in ``reference.py``, without their first argument
    double_backward: Callable[..., tuple[Array, Array, Array]]
    evaluation_jvp: Callable[..., Array]
    evaluation_double_backward: Callable[..., tuple[Array, Array, Array]]
    update_running_stats: Callable[..., tuple[Array, Array]]  # (running_mean, running_var, mean, var, momentum)
    widened: Callable[..., Sequence[Any]]  # copies of vectors in the dtype of statistics; None stays None
    trainer: Callable[..., Any]  # (x, (N, C, S), an array of the layer, eps) -> `cuda.training.Trainer`, or None
    calls: Callable[..., Any]  # (x, (N, C, S), vectors) -> `cpu.Calls`, or None
    preallocate_result: Callable[[Array], Array | None]  # memory like x, for `out`; None where results are new arrays
    exact: exact.ExactSweeps | None = None  # the sweeps of exact mode, where this backend is one of exact mode


def as_backend(module: Module, name: str) -> Backend:
    """Return the backend that a kernel module makes.

    Beside the sweeps the module may offer:

    - `forward(x, weight, bias, eps, out) -> mean, m2, rstd, y` and `backward(dy, x, mean, rstd, weight, out) -> dx,
      dweight, dbias`, used where no other rank is waited for, so that a few channels may go through both sweeps before
      the next channels;
    - `evaluate`, as in ``reference.py``, without its first argument;
    - `update_running_stats`, `widened`, `trainer` and `calls`, as in `Backend`;
    - `MASKS = True`: its sweeps take `where`, and `dots` takes `skip_zeros`. A batch with a mask goes to the reference
      otherwise;
    - `masked_forward(x, weight, bias, eps, out, mask) -> batch, rstd, y` and `masked_backward(dy, x, batch, rstd,
      weight, out, where) -> dx, dweight, dbias`, like `forward` and `backward`.
    """
    masks = bool(getattr(module, "MASKS", False))
    sweeps: Any = SimpleNamespace(**{name: _sweep(module, name, masks) for name in SWEEPS})
    return Backend(
        name,
        masks,
        **vars(sweeps),
        forward=_forward(sweeps, _offered(module, "forward"), _offered(module, "masked_forward")),
        forward_of_part=functools.partial(reference.forward_of_part, sweeps),
        backward=_backward(sweeps, _offered(module, "backward"), _offered(module, "masked_backward")),
        evaluate=_offered(module, "evaluate") or functools.partial(reference.evaluate, sweeps),
        evaluation_backward=functools.partial(reference.evaluation_backward, sweeps),
        jvp=functools.partial(reference.jvp, sweeps),
        double_backward=functools.partial(reference.double_backward, sweeps),
        evaluation_jvp=functools.partial(reference.evaluation_jvp, sweeps),
        evaluation_double_backward=functools.partial(reference.evaluation_double_backward, sweeps),
        update_running_stats=_offered(module, "update_running_stats") or reference.update_running_stats,
        widened=_offered(module, "widened") or _widened,
        trainer=_offered(module, "trainer") or _none,
        calls=_offered(module, "calls") or _none,
        preallocate_result=_none if module is reference else _preallocate_result,
    )


def _sweep(module: Module, name: str, masks: bool) -> Callable[..., Any]:
    """Return a sweep of the module, or of the reference; `where` is always among the arguments."""
    sweep: Callable[..., Any] = _offered(module, name) or getattr(reference, name)

    def without_masks(*given: Any, where: None = None) -> Any:
        return sweep(*given)

    return sweep if masks or module is reference else without_masks


@functools.cache
def with_exact_sums(backend: Backend) -> Backend:
    """Return the backend of exact mode (E10) for the same arrays; second derivatives keep the usual sums."""
    sweeps: Any = importlib.import_module(EXACT[backend.name]) if backend.name in EXACT else exact
    as_sweeps = SimpleNamespace(dots=functools.partial(exact.dots, sweeps), affine=sweeps.affine)
    return replace(
        backend,
        name=f"{backend.name}, exact",
        forward=functools.partial(exact.forward, sweeps),
        forward_of_part=functools.partial(reference.forward_of_part, sweeps),
        backward=functools.partial(exact.backward, sweeps),
        evaluate=functools.partial(reference.evaluate, sweeps),
        evaluation_backward=functools.partial(reference.evaluation_backward, as_sweeps),
        update_running_stats=reference.update_running_stats,
        widened=_widened,
        exact=sweeps,
    )


def _offered(module: Module, name: str) -> Any:
    """Return a kernel module's own operation; the reference has its compositions under the same names."""
    return None if module is reference else getattr(module, name, None)


def _forward(sweeps: Sweeps, fused: Any, masked: Any) -> Callable[..., tuple[Moments, Array, Array]]:
    """Return the forward that is fused where no other rank is waited for."""
    composed = functools.partial(reference.forward, sweeps)
    if fused is None:
        return composed

    def forward(
        x: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        pool: Pool | None,
        out: Array | None,
        *,
        mask: Mask | None = None,
    ) -> tuple[Moments, Array, Array]:
        if pool is not None or (mask is not None and masked is None):
            return composed(x, weight, bias, eps, pool, out, mask=mask)
        if mask is not None:
            return masked(x, weight, bias, eps, out, mask)  # type: ignore[no-any-return]
        mean, m2, rstd, y = fused(x, weight, bias, eps, out)
        return Moments(x.shape[0] * x.shape[2], mean, m2), rstd, y

    return forward


def _backward(sweeps: Sweeps, fused: Any, masked: Any) -> Callable[..., tuple[Array, Array, Array]]:
    """Return the backward that is fused where no other rank is waited for."""
    composed = functools.partial(reference.backward, sweeps)
    if fused is None:
        return composed

    def backward(
        dy: Array,
        x: Array,
        batch: Moments,
        rstd: Array,
        weight: Array | None,
        pool: Totals | None,
        out: Array | None,
        *,
        where: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        if pool is not None or (where is not None and masked is None):
            return composed(dy, x, batch, rstd, weight, pool, out, where=where)
        if where is not None:
            return masked(dy, x, batch, rstd, weight, out, where)  # type: ignore[no-any-return]
        return fused(dy, x, batch.mean, rstd, weight, out)  # type: ignore[no-any-return]

    return backward


def _widened(*vectors: Array | None) -> list[Array | None]:
    return [vector if vector is None else widened(vector) for vector in vectors]


def _none(*given: object) -> None:
    return None


def _preallocate_result(x: Array) -> Array | None:
    if isinstance(x, np.ndarray):
        return results.empty(x.shape, x.dtype)
    return array_namespace(x).empty(x.shape, dtype=x.dtype) if is_cupy_array(x) else None


def select(x: Array, kernels: str | Module | None = None) -> Backend:
    """Return the backend that serves the array `x`: the one asked for, otherwise the fastest that takes x.

    "cpu" takes NumPy arrays, where numba is installed; float16 needs a processor that converts float16 (F16C), as
    nearly all do. "cuda" takes CuPy arrays of the four dtypes on NVIDIA's GPUs since Volta. So do "cuda_split", two
    launches each way, and "cuda_cluster", clusters of blocks and a ring of bulk copies wherever they fit; both have to
    be asked for. "reference" takes all arrays.
    """
    if kernels is None:
        if isinstance(x, np.ndarray):
            if x.size >= LARGE and not _has_numba():
                _recommend_numba()
            return backend("cpu" if _has_numba() and (x.dtype.char != "e" or _has_half()) else "reference")
        return backend("cuda" if _has_cuda(x) and dtype_name(x.dtype) in FLOATS else "reference")
    if isinstance(kernels, str):
        if kernels not in MODULES:
            raise ValueError(f"kernels: expected one of {sorted(MODULES)} or a kernel module; got {kernels!r}")
        if kernels == "cpu":
            _check_cpu(x)
        elif kernels.startswith("cuda"):
            _check_cuda(x, kernels)
        return backend(kernels)
    if isinstance(kernels, Backend):
        return kernels
    if missing := [name for name in REQUIRED if not callable(getattr(kernels, name, None))]:
        raise TypeError(
            f"kernels: expected a module with the sweeps {', '.join(REQUIRED)};"
            f" got {kernels!r} without {', '.join(missing)}"
        )
    name = getattr(kernels, "__name__", type(kernels).__name__)
    own = {path: short for short, path in MODULES.items()}.get(name)
    return as_backend(kernels, name) if own is None else backend(own)


def for_masks(found: Backend) -> Backend:
    """Return the backend for a batch with a mask: `found` where its sweeps take masks, otherwise the reference."""
    if found.masks:
        return found
    return backend("reference") if found.exact is None else with_exact_sums(backend("reference"))


@functools.cache
def backend(name: str) -> Backend:
    """Return the backend of that name, one of `MODULES`; its module is imported now."""
    return as_backend(importlib.import_module(MODULES[name]), name)


@functools.cache
def _has_numba() -> bool:
    """Return whether numba can be imported: a numba that was not made for this NumPy cannot."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        importlib.import_module("numba")
    except ImportError as error:
        text = f"arraybn: numba cannot be imported ({error}), so NumPy arrays are served by the reference"
        warnings.warn(f"{text}, which is many times slower", RuntimeWarning, stacklevel=2)
        return False
    return True


@functools.cache
def _recommend_numba() -> None:
    """Warn, once a process, that numba is not installed; a numba that cannot be imported has its own warning."""
    if importlib.util.find_spec("numba") is None:
        text = "arraybn: without numba, large NumPy arrays take many times as long. Install it with: pip install"
        text = f'{text} {requirement("cpu")}, or pass kernels="reference"'
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def _has_half() -> bool:
    return bool(importlib.import_module(MODULES["cpu"]).HALF)


def _has_cuda(x: Array) -> bool:
    """Return whether `x` is a CuPy array on a GPU that runs the CUDA kernels."""
    return is_cupy_array(x) and _is_recent(x.device.id)


@functools.cache
def _is_recent(number: int) -> bool:
    """Return whether that GPU is NVIDIA's, Volta or later. (CuPy can also be built for AMD's GPUs, in HIP.)"""
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
            f'kernels: expected numba to be installed for "cpu". Install it with: pip install {requirement("cpu")}'
        )
    if x.dtype.char == "e" and not _has_half():
        raise TypeError('kernels: expected another dtype for "cpu", because this processor lacks F16C; got float16')

"""arraybn: its functions and layers on any device; and the copy that sets the limit."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from array_api_compat import to_device

from ..._arrays.copies import as_numpy
from ..._arrays.layout import Layout
from ...functional import batch_norm, batch_norm_backward
from ...kernels import for_masks, select
from ...kernels.threads import get_num_threads
from ...layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ...reference import Mask
from ...testing.scenarios import Batch
from ..device import Array, HostDevice
from ..process import UnsupportedError
from ..truth import Problem
from . import Call, Calls, Results


def function_calls(device: HostDevice, problem: Problem, name: str, kernels: Any = None, exact: bool = False) -> Calls:
    """Return the calls of the functions with the kernels of that name; "new" makes new arrays, others use `out`."""
    case, x, dy, target, weight, bias, mean, var, eps = problem
    out = None if name == "new" else target
    kernels = kernels or device.kernels.get(name)
    options: Any = {"out": out, "eps": eps, "channel_axis": case.channel_axis, "kernels": kernels, "exact": exact}
    _, saved = batch_norm(x, weight, bias, **options)

    def poison() -> None:
        target.view(device.xp.uint8)[...] = 0xFF  # NaN in every type
        kept = [device.xp.full(case.shape[1], np.nan) for _ in range(4)]
        kept.clear()  # the pool hands these blocks out next

    calls = {
        "forward": lambda: batch_norm(x, weight, bias, **options)[0],
        "backward": lambda: batch_norm_backward(dy, saved, out=out),
        "eval": lambda: batch_norm(x, weight, bias, mean=mean, var=var, **options)[0],
        "step": lambda: batch_norm_backward(dy, batch_norm(x, weight, bias, **options)[1], out=out),
    }
    return Calls({**calls, "layer": calls["forward"]}, lambda result: result, poison)


def host_calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the calls of the functions and the layer."""
    found = function_calls(device, problem, name)
    return Calls({**found.operations, **layer_calls(device, problem)}, found.read, found.poison)


def reference_calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the calls of the generic sweeps, which are the maths as it is read."""
    return function_calls(device, problem, "new", "reference")


def exact_calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the calls of the functions in exact mode."""
    if problem.case.dtype == "float64":
        raise UnsupportedError("its sums take no float64")
    return function_calls(device, problem, name, exact=True)


def masked_calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the calls of the kernels with a mask of all True, which the functions would take for no mask."""
    case, x, dy, target, weight, bias, _, _, eps = problem
    found, layout = function_calls(device, problem, name), Layout.of(x, case.channel_axis)
    backend = for_masks(select(x, device.kernels.get("fused")))
    view, given, out = (layout.view(array) for array in (x, dy, target))
    scale, shift = backend.widened(weight, bias)
    mask = Mask(layout.view_of_mask(device.xp.ones(layout.positions, dtype=bool)), layout.n)
    batch, rstd, _ = backend.forward(view, scale, shift, eps, None, out, mask=mask)

    def backward() -> tuple[Any, ...]:
        dx, *gradients = backend.backward(given, view, batch, rstd, scale, None, out, where=mask.where)
        return layout.restore(dx), *gradients

    def forward() -> Any:
        return layout.restore(backend.forward(view, scale, shift, eps, None, out, mask=mask)[2])

    return Calls({**found.operations, "forward": forward, "backward": backward}, found.read, found.poison)


def layer_calls(device: HostDevice, problem: Problem) -> dict[str, Call]:
    """Return the calls of a layer in training."""
    case, x, dy = problem[:3]
    kind = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}[len(case.shape)]
    layer = kind(case.shape[1], eps=problem.eps, channel_axis=case.channel_axis, dtype=case.vectors).to(xp=device.xp)
    for name in ("weight", "bias"):
        getattr(layer, name).data = getattr(problem, name)

    def step() -> Any:
        layer(x)
        return layer.backward(dy)

    return {"layer": lambda: layer(x), "step": step}


def copy_calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the copy by all threads."""
    return Calls({"copy": copying(problem.x, problem.out, get_num_threads())}, lambda result: result)


def copying(source: Array, target: Array, threads: int) -> Call:
    """Return ``numpy.copyto(target, source)``, each thread copying one contiguous part."""
    pairs = list(zip(parts(target, threads), parts(source, threads), strict=True))
    pool = ThreadPoolExecutor(max(1, threads - 1))

    def copy() -> None:
        others = [pool.submit(np.copyto, *pair) for pair in pairs[1:]]
        np.copyto(*pairs[0])
        for other in others:
            other.result()

    return copy


def parts(array: Array, count: int) -> list[Array]:
    """Cut the array, as a line, into contiguous pieces, none empty."""
    return [piece for piece in np.array_split(array.reshape(-1), count) if piece.size]


def measured(kernels: str, module: str, extra: Any) -> Callable[[Batch], Results]:
    """Return the functions on arrays of a namespace; `extra`: x64 of JAX, or a device of array-api-strict."""
    xp = importlib.import_module(module)
    x64 = importlib.import_module("jax").enable_x64 if module == "jax.numpy" else None
    where = {} if module != "array_api_strict" or extra is None else {"device": xp.Device(extra)}
    xp.asarray(np.zeros(1, "f4"), **where)  # where there is no device, as without a GPU, nothing can be measured

    def host(array: Any) -> Any:
        return as_numpy("result", to_device(array, xp.Device("CPU_DEVICE")) if where else array)

    def call(batch: Batch) -> Results:
        with contextlib.nullcontext() if x64 is None else x64(extra):
            x, dy, weight, bias = (xp.asarray(array, **where) for array in batch[:4])
            y, saved = batch_norm(x, weight, bias, eps=batch.eps, kernels=kernels)
            dx, _, _ = batch_norm_backward(dy, saved)
            moments = saved.moments
            assert moments is not None
            mean, var = host(moments.mean).astype("f8"), host(moments.m2).astype("f8") / moments.n
            mean = mean if moments.mean_low is None else mean + host(moments.mean_low)
            return {"mean": mean.astype("f4"), "var": var.astype("f4"), "y": host(y), "dx": host(dx)}

    return call

"""JAX: formulas of jax.numpy, compiled; the backward of what the forward kept. Flax for its accuracy."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...testing.scenarios import Batch
from ..cases import Case
from ..device import Array, HostDevice
from ..truth import Problem
from . import Calls, Results, on_images


@functools.cache  # all problems of a case share what is compiled
def _compiled(case: Case, eps: float) -> SimpleNamespace:
    """Return the functions in float32, or float64 with x."""
    jax = importlib.import_module("jax")
    wide = jax.numpy.float64 if case.dtype == "float64" else jax.numpy.float32
    line = (-1, *[1] * (len(case.shape) - 2)) if case.channel_axis == 1 else (-1,)

    def evaluate(x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        scale = weight * jax.lax.rsqrt(var + eps)
        mean, scale, bias = (vector.reshape(line) for vector in (mean, scale, bias))
        return ((x.astype(wide) - mean) * scale + bias).astype(x.dtype)

    def forward(x: Any, weight: Any, bias: Any) -> Any:
        w = x.astype(wide)
        mean, var = w.mean(case.reduced_axes), w.var(case.reduced_axes)
        return evaluate(x, weight, bias, mean, var), (mean, var)

    def step(x: Any, weight: Any, bias: Any, dy: Any) -> Any:
        y, pull, stats = jax.vjp(forward, x, weight, bias, has_aux=True)
        return *pull(dy), y, stats

    return SimpleNamespace(
        forward=jax.jit(forward),
        evaluate=jax.jit(evaluate),
        step=jax.jit(step),
        pulled=jax.jit(lambda *arrays: jax.vjp(forward, *arrays, has_aux=True)[1]),
        pull=jax.jit(lambda kept, dy: kept(dy)),
    )


def _shared(jax: Any, array: Array) -> Any:
    """Return the same memory as an array of JAX; a copy of bfloat16."""
    if "bfloat16" not in str(array.dtype):
        return jax.dlpack.from_dlpack(array)
    return jax.lax.bitcast_convert_type(jax.dlpack.from_dlpack(array.view(np.int16)), jax.numpy.bfloat16)


def _reader(jax: Any, device: HostDevice) -> Callable[[Any], Array]:
    def read(array: Any) -> Array:
        if array.dtype != jax.numpy.bfloat16:
            return device.xp.from_dlpack(array)
        import ml_dtypes

        bits = jax.block_until_ready(jax.lax.bitcast_convert_type(array, jax.numpy.int16))
        return device.xp.from_dlpack(bits).view(ml_dtypes.bfloat16)

    return read


def host_calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the compiled formulas, each waited for."""
    found = device_calls(device, problem, name)
    wait = importlib.import_module("jax").block_until_ready
    calls = {one: lambda call=call: wait(call()) for one, call in found.operations.items()}
    return Calls({**calls, "layer": calls["forward"]}, np.asarray)


def device_calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the compiled formulas, queued on a stream of JAX's own."""
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", problem.case.dtype == "float64")  # without, JAX makes all arrays float32
    x, dy, weight, bias, mean, var = (_shared(jax, array) for array in problem.inputs)
    found = _compiled(problem.case, problem.eps)
    kept = found.pulled(x, weight, bias)

    def poison() -> None:
        jax.block_until_ready([jax.numpy.full_like(x, np.nan) for _ in range(3)])

    calls = {
        "forward": lambda: found.forward(x, weight, bias)[0],
        "backward": lambda: found.pull(kept, dy),
        "eval": lambda: found.evaluate(x, weight, bias, mean, var),
        "step": lambda: found.step(x, weight, bias, dy)[:3],
    }
    return Calls(calls, _reader(jax, device), poison, dict.fromkeys(calls, "XLA"), jax.block_until_ready)


def finds_gpu() -> bool:
    return bool(importlib.import_module("jax").default_backend() == "gpu")


def measured_flax(use_fast_variance: bool) -> Callable[[Batch], Results]:
    """Return the layer of Flax."""
    linen = importlib.import_module("flax.linen")

    def forward(x: Any, weight: Any, bias: Any, eps: float) -> tuple[Any, Any]:
        layer = linen.BatchNorm(False, momentum=0.0, epsilon=eps, use_fast_variance=use_fast_variance)
        stats = {"mean": bias * 0, "var": bias * 0}  # momentum 0 leaves nothing of them
        variables = {"params": {"scale": weight, "bias": bias}, "batch_stats": stats}
        y, new = layer.apply(variables, x, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return _trained(forward)


def measured_standardize() -> Callable[[Batch], Results]:
    """Return the function of jax.nn."""
    jax = importlib.import_module("jax")

    def forward(x: Any, weight: Any, bias: Any, eps: float) -> tuple[Any, Any]:
        return weight * jax.nn.standardize(x, axis=(0, 1, 2), epsilon=eps) + bias, {}

    return _trained(forward)


def _trained(forward: Callable[..., tuple[Any, Any]]) -> Callable[[Batch], Results]:
    """Return forward and backward compiled as one, as in a training step."""
    jax = importlib.import_module("jax")

    def step(x: Any, dy: Any, weight: Any, bias: Any, eps: float) -> Any:
        y, pull, stats = jax.vjp(lambda x: forward(x, weight, bias, eps), x, has_aux=True)
        return y, pull(dy)[0], stats

    return on_images(jax.jit(step, static_argnums=4))

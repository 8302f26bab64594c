"""TensorFlow: the fused op and its gradient, called one by one (eagerly)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ...testing.scenarios import Batch
from ..device import HostDevice
from ..process import UnsupportedError
from ..truth import Problem
from . import Calls, Results, on_images


def _fused(x: Any, dy: Any, weight: Any, bias: Any, **options: Any) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """Return the op, whose statistics may be fixed, and its gradient, which takes what the op has returned."""
    tf = importlib.import_module("tensorflow")
    nothing, ops = tf.constant([], tf.float32), tf.raw_ops

    def forward(mean: Any = nothing, variance: Any = nothing, is_training: bool = True) -> Any:
        statistics = {"mean": mean, "variance": variance, "is_training": is_training}
        return ops.FusedBatchNormV3(x=x, scale=weight, offset=bias, **statistics, **options)

    def backward(fused: Any) -> Any:
        kept = {f"reserve_space_{i}": getattr(fused, f"reserve_space_{i}") for i in (1, 2, 3)}
        return ops.FusedBatchNormGradV3(y_backprop=dy, x=x, scale=weight, is_training=True, **kept, **options)[:3]

    return forward, backward


def host_calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the calls of the op; one call that takes a layout takes it without a copy."""
    case = problem.case
    if case.dtype != "float32":
        raise UnsupportedError(f"its fused op takes no {case.dtype}")
    tf = importlib.import_module("tensorflow")
    n, c, *s = case.shape
    last = case.layout == "last" or not s
    image = (n, *(s[:1] or [1]), -1, c) if last else (n, c, s[0], -1)
    x, dy = (tf.constant(array.reshape(image)) for array in problem[1:3])
    weight, bias, mean, var = map(tf.constant, problem[4:8])
    forward, backward = _fused(x, dy, weight, bias, epsilon=problem.eps, data_format="NHWC" if last else "NCHW")

    def read(array: Any) -> Any:
        found = np.asarray(array)
        return found if found.ndim == 1 else found.reshape(case.in_memory)

    fused = forward()
    calls = {
        "forward": lambda: forward().y,
        "backward": lambda: tuple(backward(fused)),
        "eval": lambda: forward(mean, var, is_training=False).y,
        "step": lambda: tuple(backward(forward())),
    }
    return Calls({**calls, "layer": calls["forward"]}, read)


def measured_fused() -> Callable[[Batch], Results]:
    """Return the fused op."""
    tf = importlib.import_module("tensorflow")

    def step(x: Any, dy: Any, weight: Any, bias: Any, eps: float) -> Any:
        forward, backward = _fused(*map(tf.constant, (x, dy, weight, bias)), epsilon=eps)
        fused, n = forward(), x.size // x.shape[-1]
        return fused.y, backward(fused)[0], {"mean": fused.batch_mean, "var": fused.batch_variance * (1 - 1 / n)}

    return on_images(step)


def measured_moments() -> Callable[[Batch], Results]:
    """Return the two functions that many a model is made of."""
    tf = importlib.import_module("tensorflow")

    def step(x: Any, dy: Any, weight: Any, bias: Any, eps: float) -> Any:
        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            mean, var = tf.nn.moments(x, axes=[0, 1, 2])
            y = tf.nn.batch_normalization(x, mean, var, bias, weight, eps)
        return y, tape.gradient(y, x, output_gradients=tf.constant(dy)), {"mean": mean, "var": var}

    return on_images(step)

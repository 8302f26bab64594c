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
from . import Calls, Results, channels_first, channels_last


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
    nothing, ops = tf.constant([], tf.float32), tf.raw_ops
    options = {"epsilon": problem.eps, "data_format": "NHWC" if last else "NCHW"}
    inputs = {"x": x, "scale": weight, "offset": bias, **options}

    def forward() -> Any:
        return ops.FusedBatchNormV3(mean=nothing, variance=nothing, is_training=True, **inputs)

    def backward(fused: Any) -> Any:
        kept = {f"reserve_space_{i}": getattr(fused, f"reserve_space_{i}") for i in (1, 2, 3)}
        return ops.FusedBatchNormGradV3(y_backprop=dy, x=x, scale=weight, is_training=True, **kept, **options)[:3]

    def read(array: Any) -> Any:
        found = np.asarray(array)
        return found if found.ndim == 1 else found.reshape(case.in_memory)

    fused = forward()
    calls = {
        "forward": lambda: forward().y,
        "backward": lambda: tuple(backward(fused)),
        "eval": lambda: ops.FusedBatchNormV3(mean=mean, variance=var, is_training=False, **inputs).y,
        "step": lambda: tuple(backward(forward())),
    }
    return Calls({**calls, "layer": calls["forward"]}, read)


def measured_fused() -> Callable[[Batch], Results]:
    """Return the fused op."""
    tf = importlib.import_module("tensorflow")

    def call(batch: Batch) -> Results:
        x, n = tf.constant(channels_last(batch.x)), batch.x.size // batch.x.shape[1]
        with tf.GradientTape() as tape:
            tape.watch(x)
            fused = tf.compat.v1.nn.fused_batch_norm(x, batch.weight, batch.bias, epsilon=batch.eps)
        dx = tape.gradient(fused[0], x, output_gradients=tf.constant(channels_last(batch.dy)))
        y, mean, var = (np.asarray(result) for result in fused)  # var unbiased
        return {"mean": mean, "var": var * (1 - 1 / n), "y": channels_first(y), "dx": channels_first(dx)}

    return call


def measured_moments() -> Callable[[Batch], Results]:
    """Return the two functions that many a model is made of."""
    tf = importlib.import_module("tensorflow")

    def call(batch: Batch) -> Results:
        x = tf.constant(channels_last(batch.x))
        with tf.GradientTape() as tape:
            tape.watch(x)
            mean, var = tf.nn.moments(x, axes=[0, 1, 2])
            y = tf.nn.batch_normalization(x, mean, var, batch.bias, batch.weight, batch.eps)
        dx = tape.gradient(y, x, output_gradients=tf.constant(channels_last(batch.dy)))
        return {"mean": mean.numpy(), "var": var.numpy(), "y": channels_first(y), "dx": channels_first(dx)}

    return call

"""ONNX Runtime: the operator in training mode, which has no backward."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ...testing.scenarios import Batch
from . import Results, image


def measured() -> Callable[[Batch], Results]:
    """Return the operator."""
    onnxruntime, helper = (importlib.import_module(name) for name in ("onnxruntime", "onnx.helper"))
    single = importlib.import_module("onnx").TensorProto.FLOAT
    inputs, outputs = ("x", "scale", "bias", "old_mean", "old_var"), ("y", "mean", "var")

    def call(batch: Batch) -> Results:
        options: Any = {"epsilon": batch.eps, "momentum": 0.0, "training_mode": 1}
        node = helper.make_node("BatchNormalization", inputs, outputs, **options)
        declared = [
            [helper.make_tensor_value_info(name, single, None) for name in names] for names in (inputs, outputs)
        ]
        graph = helper.make_graph([node], "batch_norm", *declared)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        old = np.zeros_like(batch.weight), np.ones_like(batch.weight)  # momentum 0 leaves nothing of them
        feed = dict(zip(inputs, (image(batch.x), batch.weight, batch.bias, *old), strict=True))
        return dict(zip(outputs, session.run(outputs, feed), strict=True))

    return call

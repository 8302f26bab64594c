"""ONNX's BatchNormalization (decay momentum, biased variance) from its own reference implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.libraries import need

import arraybn


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2, 3)])
@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_e3_e4_onnx_training_and_inference_are_reproduced(shape: tuple[int, ...], decay: float) -> None:
    helper, reference = need("onnx.helper"), need("onnx.reference")
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype("f4") + 2
    weight, bias, mean, var = (rng.uniform(0.5, 2, 3).astype("f4") for _ in range(4))

    def run(training: int) -> Any:
        inputs = ["x", "weight", "bias", "mean", "var"]
        outputs = ["y", "new_mean", "new_var"] if training else ["y"]
        node = helper.make_node(
            "BatchNormalization", inputs, outputs, epsilon=1e-5, momentum=decay, training_mode=training
        )
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            [node], "g", [info(name, 1, None) for name in inputs], [info(name, 1, None) for name in outputs]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
        feed = dict(zip(inputs, (x, weight, bias, mean, var), strict=True))
        return reference.ReferenceEvaluator(model).run(None, feed)

    y, new_mean, new_var = run(training=1)
    ours, saved = arraybn.batch_norm(x, weight, bias)
    np.testing.assert_allclose(ours, y, rtol=1e-5, atol=1e-5)
    ours_mean, ours_var = arraybn.update_running_stats(mean, var, saved.moments, 1 - decay, correction=0)
    np.testing.assert_allclose(ours_mean, new_mean, rtol=1e-6)
    np.testing.assert_allclose(ours_var, new_var, rtol=1e-6)
    unbiased = arraybn.update_running_stats(mean, var, saved.moments, 1 - decay)[1]
    assert abs(unbiased / new_var - 1).max() > 1e-3  # the control: PyTorch's convention is another
    np.testing.assert_allclose(
        arraybn.batch_norm(x, weight, bias, mean=mean, var=var)[0], run(training=0)[0], rtol=1e-5, atol=1e-5
    )

"""Lines of docs/conventions.md that no other test holds, and the table of libraries, compared with these libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.libraries import need

import arraybn
from arraybn.testing import ThreadComm

X = np.asarray([[1.0], [3.0], [5.0]], "f4")  # mean 3, m2 8: the variance is 8/3, or 4 unbiased
ZERO, ONE = np.zeros(1, "f4"), np.ones(1, "f4")


def of_pytorch() -> tuple[Any, Any]:
    torch = need("torch")
    layer = torch.nn.BatchNorm1d(1)
    layer(torch.asarray(X))
    return layer.running_mean.numpy(), layer.running_var.numpy()


def of_keras() -> tuple[Any, Any]:
    layer = need("keras").layers.BatchNormalization()
    layer(X, training=True)
    return layer.get_weights()[2:]


def of_flax_linen() -> tuple[Any, Any]:
    layer = need("flax").linen.BatchNorm(use_running_average=False)
    _, after = layer.apply(layer.init(need("jax").random.key(0), X), X, mutable=["batch_stats"])
    return after["batch_stats"]["mean"], after["batch_stats"]["var"]


def of_flax_nnx() -> tuple[Any, Any]:
    need("flax")
    nnx = need("flax.nnx")  # `import flax` alone does not bring it
    layer = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    layer(X)
    return layer.mean[...], layer.var[...]


def of_onnx() -> tuple[Any, Any]:
    helper, reference = need("onnx.helper"), need("onnx.reference")
    node = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y", "mean", "var"], training_mode=1)
    info = [helper.make_tensor_value_info(name, 1, None) for name in [*node.input, *node.output]]
    graph = helper.make_graph([node], "g", info[:5], info[5:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
    values = {"x": X, "s": ONE, "b": ZERO, "m": ZERO, "v": ONE}
    return tuple(reference.ReferenceEvaluator(model).run(None, values)[1:])


def of_tensorflow() -> tuple[Any, Any]:
    fused = need("tensorflow").compat.v1.nn.fused_batch_norm
    options = {"mean": ZERO, "variance": ONE, "is_training": True, "exponential_avg_factor": 0.25}
    _, mean, var = fused(X.reshape(3, 1, 1, 1), ONE, ZERO, **options)
    return mean.numpy(), var.numpy()


TABLE: dict[str, tuple[Callable[[], tuple[Any, Any]], float, int]] = {  # momentum and correction in arraybn
    "PyTorch": (of_pytorch, 0.1, 1),
    "Keras": (of_keras, 1 - 0.99, 0),
    "Flax linen": (of_flax_linen, 1 - 0.99, 0),
    "Flax nnx": (of_flax_nnx, 1 - 0.99, 0),
    "ONNX": (of_onnx, 1 - 0.9, 0),
    "TensorFlow": (of_tensorflow, 0.25, 1),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras with JAX on NumPy 2
@pytest.mark.parametrize("library", TABLE)
def test_e4_a_library_weighs_and_corrects_as_the_table_says(library: str) -> None:
    ask, momentum, correction = TABLE[library]
    mean, var = (np.asarray(value).reshape(1) for value in ask())

    def ours(momentum: float, correction: int) -> tuple[Any, Any]:
        return arraybn.update_running_stats(ZERO, ONE, arraybn.moments(X), momentum, correction=correction)

    def alike(one: tuple[Any, Any]) -> bool:
        return all(np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(one, (mean, var), strict=True))

    assert alike(ours(momentum, correction))
    assert not alike(ours(1 - momentum, correction))
    assert not alike(ours(momentum, 1 - correction))


def test_e4_n3_one_value_is_bias_in_the_functions_and_has_no_unbiased_variance() -> None:
    x, bias = np.asarray([[3.0, -7e8]]), np.asarray([0.5, 2.0])
    y, saved = arraybn.batch_norm(x, np.ones(2), bias)
    assert y.tolist() == [bias.tolist()]
    running = np.zeros(2), np.ones(2)
    with pytest.raises(ValueError, match="expected n > correction = 1"):
        arraybn.update_running_stats(*running, saved.moments, 0.1)
    mean, var = arraybn.update_running_stats(*running, saved.moments, 1.0, correction=0)
    assert mean.tolist() == x[0].tolist()
    assert var.tolist() == [0, 0]


def test_evaluation_without_buffers_is_synchronized() -> None:
    x = np.random.default_rng(0).normal(3, 2, (6, 2))
    whole = arraybn.BatchNorm1d(2, track_running_stats=False).eval()(x)

    def work(comm: Any) -> Any:
        layer = arraybn.SyncBatchNorm(2, track_running_stats=False, process_group=comm).eval()
        return layer(x[:2] if comm.rank == 0 else x[2:])

    parts = ThreadComm.run(2, work)
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-13)
    alone = arraybn.BatchNorm1d(2, track_running_stats=False).eval()(x[:2])
    assert abs(parts[0] - alone).max() > 0.1


def test_a_state_dict_holds_no_settings() -> None:
    state = arraybn.BatchNorm1d(2, eps=0.5, momentum=0.9, channel_axis=-1).state_dict()
    other = arraybn.BatchNorm1d(2)
    other.load_state_dict(state)
    assert (other.eps, other.momentum, other.channel_axis, other.training) == (1e-5, 0.1, 1, True)
    assert set(state) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def test_a_state_dict_without_bias_loads_when_it_need_not_be_strict() -> None:
    state = arraybn.BatchNorm1d(2).state_dict()
    del state["bias"]
    layer = arraybn.BatchNorm1d(2)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == ["bias"]
    assert layer.bias.data.tolist() == [0, 0]


def test_a_backward_is_that_of_the_latest_forward() -> None:
    rng = np.random.default_rng(0)
    first, second, dy = rng.normal(size=(3, 5, 2))
    layer = arraybn.BatchNorm1d(2)
    layer(first)
    layer.eval()(second)
    rstd = 1 / np.sqrt(layer.running_var + layer.eps)
    np.testing.assert_allclose(layer.backward(dy), rstd * dy, rtol=1e-6)  # of an evaluation (E7)

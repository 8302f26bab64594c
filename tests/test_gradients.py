"""Every hand-written backward against central differences of its forward, in float64, in random directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import arraybn
from arraybn import network
from arraybn.testing import check_vjp


def with_control(function: Callable[..., Any], arguments: list[Any], dy: Any, gradients: list[Any]) -> None:
    """Run the check, and assert that the check fails for each gradient that is wrong by 0.1 %."""
    check_vjp(function, arguments, dy, gradients)
    for index, gradient in enumerate(gradients):
        wrong = [1.001 * g if i == index else g for i, g in enumerate(gradients)]
        assert abs(gradient).max() > 0
        with pytest.raises(AssertionError, match=f"argument {index}: by differences"):
            check_vjp(function, arguments, dy, wrong)


SHAPES = [(6, 3), (5, 2, 7), (4, 3, 2, 3), (2, 2, 2, 3, 2), (2, 4), (1, 3, 4)]


def draw(shape: tuple[int, ...], channels: int) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(list(shape))
    x = rng.standard_normal(shape) * 2 + 3
    return x, rng.uniform(0.5, 2, channels), rng.standard_normal(channels), rng.standard_normal(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_e5_e6_gradients_of_the_batch_statistics(shape: tuple[int, ...], eps: float) -> None:
    x, weight, bias, dy = draw(shape, shape[1])
    _, saved = arraybn.batch_norm(x, weight, bias, eps=eps)
    gradients = list(arraybn.batch_norm_backward(dy, saved))
    if shape != (2, 4) or eps > 0.1:
        with_control(lambda *a: arraybn.batch_norm(*a, eps=eps)[0], [x, weight, bias], dy, gradients)
    else:  # with two values dx is about eps, so the test sees that dx is small, and dweight, dbias
        check_vjp(lambda w, b: arraybn.batch_norm(x, w, b, eps=eps)[0], [weight, bias], dy, gradients[1:])
        assert abs(gradients[0]).max() < 1e-3


@pytest.mark.parametrize("channel_axis", [0, 1, 2, -1])
def test_e6_gradients_whatever_the_channel_axis(channel_axis: int) -> None:
    shape = (4, 5, 3)
    x, weight, bias, dy = draw(shape, shape[channel_axis])
    _, saved = arraybn.batch_norm(x, weight, bias, channel_axis=channel_axis)
    gradients = list(arraybn.batch_norm_backward(dy, saved))
    with_control(lambda *a: arraybn.batch_norm(*a, channel_axis=channel_axis)[0], [x, weight, bias], dy, gradients)


@pytest.mark.parametrize("shape", SHAPES)
def test_e7_gradients_of_fixed_statistics(shape: tuple[int, ...]) -> None:
    x, weight, bias, dy = draw(shape, shape[1])
    fixed = {"mean": np.linspace(-1, 1, shape[1]), "var": np.linspace(0.5, 2, shape[1])}
    _, saved = arraybn.batch_norm(x, weight, bias, **fixed)
    assert saved.moments is None
    gradients = list(arraybn.batch_norm_backward(dy, saved))
    with_control(lambda *a: arraybn.batch_norm(*a, **fixed)[0], [x, weight, bias], dy, gradients)


def test_e5_gradients_without_weight_or_bias_are_none() -> None:
    x, weight, bias, dy = draw((5, 3), 3)
    for given in ({}, {"weight": weight}, {"bias": bias}):
        _, saved = arraybn.batch_norm(x, **given)
        dx, dweight, dbias = arraybn.batch_norm_backward(dy, saved)
        assert (dweight is not None, dbias is not None) == ("weight" in given, "bias" in given)
        check_vjp(lambda x, given=given: arraybn.batch_norm(x, **given)[0], [x], dy, [dx])


def test_e5_layers_add_to_gradients_until_they_are_zeroed() -> None:
    x, _, _, dy = draw((6, 3), 3)
    layer = arraybn.BatchNorm1d(3, dtype="float64")
    for times in (1, 2):
        layer(x)
        layer.backward(dy)
        np.testing.assert_allclose(layer.bias.grad, times * dy.sum(axis=0), rtol=1e-14)
    layer.zero_grad()
    assert layer.weight.grad is None


def linear() -> arraybn.Module:
    return network.Linear(4, 3, rng=np.random.default_rng(0))


def convolution(padding: int) -> arraybn.Module:
    return network.Conv2d(2, 3, 3, padding=padding, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (linear(), (5, 4)),
        (network.Linear(4, 3, bias=False), (5, 4)),
        (convolution(0), (2, 2, 5, 4)),
        (convolution(1), (2, 2, 5, 4)),
        (convolution(2), (2, 2, 3, 4)),
        (network.Conv2d(2, 3, 1, bias=False), (2, 2, 3, 4)),
        (network.Conv2d(1, 2, 4), (2, 1, 5, 5)),
        (network.Conv2d(1, 2, 5, padding=3), (2, 1, 2, 8)),
        (network.ReLU(), (5, 4)),
        (network.Flatten(), (5, 2, 2)),
        (
            arraybn.Sequential(
                network.Conv2d(1, 2, 3, padding=1),
                arraybn.BatchNorm2d(2),
                network.ReLU(),
                network.Flatten(),
                network.Linear(32, 3),
                arraybn.BatchNorm1d(3),
            ),
            (6, 1, 4, 4),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, arraybn.Module) else str(value),
)
def test_gradients_of_modules(module: arraybn.Module, shape: tuple[int, ...]) -> None:
    module.to(dtype="float64")
    rng = np.random.default_rng(1)
    x = rng.standard_normal(shape)
    parameters = list(module.parameters())

    def function(x: Any, *values: Any) -> Any:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        return module(x)

    arguments = [x, *(parameter.data for parameter in parameters)]
    y = function(*arguments)
    dy = rng.standard_normal(y.shape)
    dx = module.backward(dy)
    # a bias before a batch norm has no effect on y: its gradient is rounding, and no direction tells more
    used = [i for i, p in enumerate(parameters) if abs(p.grad).max() > 1e-12]
    kept = [p.grad for p in parameters]

    def of_used(x: Any, *values: Any) -> Any:
        everything = list(arguments[1:])
        for i, value in zip(used, values, strict=True):
            everything[i] = value
        return function(x, *everything)

    assert len(parameters) - len(used) == (2 if isinstance(module, arraybn.Sequential) else 0)
    with_control(of_used, [x, *(arguments[1 + i] for i in used)], dy, [dx, *(kept[i] for i in used)])


def test_gradient_of_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((5, 4)) * 3, np.asarray([0, 3, 1, 1, 2])
    _, dlogits = network.cross_entropy(logits, labels)
    with_control(lambda z: np.asarray(network.cross_entropy(z, labels)[0]), [logits], np.asarray(1.0), [dlogits])
    far, gradient = network.cross_entropy(np.asarray([[1e4, -1e4]]), np.asarray([1]))  # no overflow, no log 0
    assert far == pytest.approx(2e4)
    np.testing.assert_array_equal(gradient, [[1, -1]])

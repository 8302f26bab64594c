"""Batch norms folded into their neighbours, and as a scale and a shift."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.libraries import need

import arraybn
from arraybn.network import Conv2d, Flatten, Identity, Linear, ReLU, fold_batch_norms

RNG = np.random.default_rng(0)


def trained(model: Any, x: Any) -> Any:
    """Return the model in evaluation, with weights and statistics that are not the initial ones."""
    for layer in model.modules():
        if isinstance(layer, arraybn.BatchNorm1d | arraybn.BatchNorm2d | arraybn.SyncBatchNorm) and layer.affine:
            layer.weight.data = RNG.uniform(-2, 2, layer.num_features).astype(np.float32)
            if layer.bias is not None:
                layer.bias.data = RNG.normal(size=layer.num_features).astype(np.float32)
    model(x), model(2 * x + 1)
    return model.eval()


def norms_of(model: Any) -> list[str]:
    return [path for path, layer in model.named_modules() if hasattr(layer, "running_mean")]


@pytest.mark.parametrize("affine", [{}, {"affine": False}, {"bias": False}])
def test_e3_scale_and_shift_are_the_layer_in_evaluation(affine: dict[str, Any]) -> None:
    x = RNG.normal(3, 2, (16, 4))
    layer = trained(arraybn.BatchNorm1d(4, dtype="float64", **affine), x)
    scale, shift = arraybn.fold(layer)
    assert scale.dtype == shift.dtype == np.float64
    np.testing.assert_allclose(scale * x + shift, layer(x), rtol=1e-12, atol=1e-12)


def test_e3_scale_and_shift_are_on_the_layers_namespace() -> None:
    torch = need("torch")
    scale, shift = arraybn.fold(arraybn.BatchNorm1d(2, xp=torch).eval())
    assert isinstance(scale, torch.Tensor)
    assert scale.dtype == shift.dtype == torch.float64


@pytest.mark.parametrize(
    ("layer", "error", "text"),
    [
        (3, TypeError, "layer: expected a batch norm; got int"),
        (arraybn.BatchNorm1d(2), ValueError, r"in evaluation with running statistics; got one in training. Call lay"),
        (arraybn.BatchNorm1d(2, track_running_stats=False).eval(), ValueError, "got one without running statistics"),
    ],
)
def test_a_layer_that_has_no_fixed_statistics_is_refused(layer: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        arraybn.fold(layer)


IMAGES = RNG.normal(1, 2, (8, 3, 6, 6)).astype(np.float32)
ROWS = RNG.normal(1, 2, (32, 3)).astype(np.float32)
MODELS = {  # model, input, the norms that stay
    "after a convolution": (lambda: [Conv2d(3, 4, 3, padding=1, rng=RNG), arraybn.BatchNorm2d(4)], IMAGES, []),
    "after one without bias": (lambda: [Conv2d(3, 4, 3, bias=False, rng=RNG), arraybn.BatchNorm2d(4)], IMAGES, []),
    "before a convolution": (lambda: [arraybn.BatchNorm2d(3), Conv2d(3, 4, 3, rng=RNG)], IMAGES, []),
    "before one that pads": (lambda: [arraybn.BatchNorm2d(3), Conv2d(3, 4, 3, padding=1, rng=RNG)], IMAGES, ["0"]),
    "after a linear": (lambda: [Linear(3, 4, rng=RNG), arraybn.BatchNorm1d(4)], ROWS, []),
    "before a linear": (lambda: [arraybn.BatchNorm1d(3), Linear(3, 4, bias=False, rng=RNG)], ROWS, []),
    "after and before": (lambda: [Linear(3, 4, rng=RNG), arraybn.BatchNorm1d(4), Linear(4, 2, rng=RNG)], ROWS, []),
    "two in a row": (lambda: [Linear(3, 4, rng=RNG), arraybn.BatchNorm1d(4), arraybn.BatchNorm1d(4)], ROWS, []),
    "nothing beside": (lambda: [ReLU(), arraybn.BatchNorm1d(3), ReLU()], ROWS, ["1"]),
    "over a flatten": (lambda: [Conv2d(3, 1, 6, rng=RNG), Flatten(), arraybn.BatchNorm1d(1)], IMAGES, ["2"]),
    "nested": (
        lambda: [arraybn.Sequential(Linear(3, 4, rng=RNG)), arraybn.Sequential(arraybn.BatchNorm1d(4), ReLU())],
        ROWS,
        [],
    ),
    "synchronized": (lambda: [Linear(3, 4, rng=RNG), arraybn.SyncBatchNorm(4)], ROWS, []),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_model_gives_the_same(name: str) -> None:
    make, x, stay = MODELS[name]
    model = trained(arraybn.Sequential(*make()), x)
    before = {key: np.array(value) for key, value in model.state_dict().items()}
    folded = fold_batch_norms(model)
    assert norms_of(folded) == stay
    exact, y = model(x).astype(np.float64), folded(x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
    assert all(np.array_equal(value, before[key]) for key, value in model.state_dict().items()), "the model changed"
    folded.backward(np.ones_like(y))


def test_folding_a_norm_into_a_convolution_that_pads_would_be_wrong() -> None:
    """The reason for the one that stays: the same fold, done by hand, differs at the border and only there."""
    model = trained(arraybn.Sequential(arraybn.BatchNorm2d(3), Conv2d(3, 4, 3, padding=1, rng=RNG)), IMAGES)
    inside = fold_batch_norms(arraybn.Sequential(model[0], Conv2d(3, 4, 3, rng=RNG)).eval())
    inside[1].weight.data = model[1].weight.data * arraybn.fold(model[0])[0][None, :, None, None].astype(np.float32)
    shift = np.einsum("ocij,c->o", model[1].weight.data, arraybn.fold(model[0])[1]) + model[1].bias.data
    inside[1].bias.data, inside[1].padding = shift.astype(np.float32), 1
    wrong, right = inside(IMAGES), model(IMAGES)
    np.testing.assert_allclose(wrong[..., 1:-1, 1:-1], right[..., 1:-1, 1:-1], rtol=1e-3, atol=1e-4)
    assert np.abs(wrong - right)[..., 0, :].max() > 0.01


def test_modules_that_are_used_twice_stay() -> None:
    shared = Linear(3, 3, rng=RNG)
    model = trained(arraybn.Sequential(shared, arraybn.BatchNorm1d(3), shared), ROWS)
    assert norms_of(fold_batch_norms(model)) == ["1"]


def test_a_norm_of_another_number_or_axis_of_channels_stays() -> None:
    model = arraybn.Sequential(Conv2d(3, 6, 1, rng=RNG), arraybn.BatchNorm2d(6, channel_axis=-1)).eval()
    assert norms_of(fold_batch_norms(model)) == ["1"]


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        (3, TypeError, "model: expected a Module; got int"),
        (arraybn.Sequential(ReLU(), arraybn.BatchNorm1d(2)), ValueError, "model: at '1', layer: .*in training"),
        (arraybn.BatchNorm1d(2, track_running_stats=False).eval(), ValueError, "model: at 'the top', .*without run"),
    ],
)
def test_a_model_that_cannot_be_folded_says_why(model: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        fold_batch_norms(model)


def test_pytorch_folds_to_the_same_weights() -> None:
    torch = need("torch")
    model = trained(arraybn.Sequential(Conv2d(3, 4, 3, rng=RNG), arraybn.BatchNorm2d(4)), IMAGES)
    theirs = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    theirs.load_state_dict({key: torch.asarray(np.array(value)) for key, value in model.state_dict().items()})
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(*theirs)
    ours = fold_batch_norms(model)[0]
    np.testing.assert_allclose(ours.weight.data, fused.weight.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.bias.data, fused.bias.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_an_identity_is_no_place_for_state() -> None:
    assert list(Identity().state_dict()) == []
    assert Identity().backward(ROWS) is ROWS

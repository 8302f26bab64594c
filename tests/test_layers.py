"""The state of layers: calls that change the state, calls that do not, and calls that raise."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import re
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import arraybn
from arraybn import layers
from arraybn.layers import _BatchNorm, _NormBase

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 3)).astype("f4") + np.asarray([1.0, 2.0, 3.0])
LAYERS = {
    arraybn.BatchNorm1d: [(4, 3), (4, 3, 5)],
    arraybn.BatchNorm2d: [(4, 3, 2, 2)],
    arraybn.BatchNorm3d: [(2, 3, 2, 2, 2)],
}


def state(layer: arraybn.Module) -> dict[str, bytes]:
    """Return everything that a call could have changed, to the bit."""
    values = {name: np.asarray(value).tobytes() for name, value in layer.state_dict().items()}
    for name, parameter in layer.named_parameters():
        values[f"{name}.grad"] = b"" if parameter.grad is None else parameter.grad.tobytes()
    values["remembered"] = repr([id(module._remembered) for module in layer.modules()]).encode()
    return values


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_takes_its_dimensions_and_refuses_others_in_pytorchs_words(layer: type[arraybn.BatchNorm1d]) -> None:
    words = {"1": "2D or 3D", "2": "4D", "3": "5D"}[layer.__name__[-2]]
    for ndim in range(1, 7):
        shape = next((s for shapes in LAYERS.values() for s in shapes if len(s) == ndim), (3,) * ndim)
        if shape in LAYERS[layer]:
            assert layer(3)(RNG.standard_normal(shape)).shape == shape
        else:
            with pytest.raises(ValueError, match=rf"^expected {words} input \(got {ndim}D input\)$"):
                layer(3)(np.zeros(shape))


def test_the_classes_stand_as_in_pytorch() -> None:
    for layer in LAYERS:
        assert layer.__mro__[1:4] == (_BatchNorm, _NormBase, arraybn.Module)
    assert _NormBase._version == 2
    with pytest.raises(NotImplementedError):
        _NormBase(3)._check_input_dim(X)


@pytest.mark.parametrize(("affine", "track"), list(itertools.product([True, False], repeat=2)))
def test_parameters_and_buffers_of_every_combination_of_flags(affine: bool, track: bool) -> None:
    layer = arraybn.BatchNorm1d(3, affine=affine, track_running_stats=track)
    present = {
        "weight": affine,
        "bias": affine,
        "running_mean": track,
        "running_var": track,
        "num_batches_tracked": track,
    }
    assert {name: getattr(layer, name) is not None for name in present} == present
    assert list(layer.state_dict()) == [name for name, there in present.items() if there]
    y = layer(X)
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-6)
    layer.backward(np.ones_like(X))
    assert (layer.weight is None) == (not affine)
    np.testing.assert_array_equal(layer.eval()(X) == y, not track)  # without buffers evaluation is like training


def test_training_updates_and_evaluation_uses_the_buffers() -> None:
    layer = arraybn.BatchNorm1d(3, momentum=0.25, dtype="float64")
    layer(X)
    np.testing.assert_allclose(layer.running_mean, 0.25 * X.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, 0.75 + 0.25 * X.var(axis=0, ddof=1), rtol=1e-12)
    assert layer.num_batches_tracked == 1
    before = state(layer.eval())
    y = layer(X)
    np.testing.assert_allclose(y, (X - layer.running_mean) / np.sqrt(layer.running_var + 1e-5), rtol=1e-6)
    layer._forget()
    before["remembered"] = state(layer)["remembered"]
    assert state(layer) == before


def test_updates_replace_buffers_and_never_write_into_them() -> None:
    layer = arraybn.BatchNorm1d(3)
    mean, weight = layer.running_mean, layer.weight.data
    mean.flags.writeable = weight.flags.writeable = False
    layer(X)
    layer.backward(X)
    layer.reset_parameters()
    assert layer.running_mean is not mean
    assert (mean.tolist(), weight.tolist()) == ([0, 0, 0], [1, 1, 1])


def test_e7_evaluation_backward_uses_the_statistics_of_its_forward() -> None:
    layer = arraybn.BatchNorm1d(3, dtype="float64").eval()
    layer(X)
    saved = layer._remembered
    expected = arraybn.batch_norm_backward(X, saved)[0]
    layer.running_var *= 16  # even a live buffer written into
    layer.running_mean = np.ones(3)
    np.testing.assert_array_equal(layer.backward(X), expected)
    layer(X)
    assert (layer.backward(X) != expected).any()  # the control


@pytest.mark.parametrize("momentum", [0, 0.0, -0.0])
def test_e4_momentum_zero_leaves_the_buffers_alone_whatever_the_batch(momentum: float) -> None:
    layer = arraybn.BatchNorm1d(3, momentum=momentum)
    layer.running_mean, layer.running_var = np.asarray([-0.0, 1.5, np.nan], "f4"), np.asarray([2, np.inf, 0], "f4")
    before = [layer.running_mean.tobytes(), layer.running_var.tobytes()]
    x = X.copy()
    x[0] = np.nan, np.inf, 1
    with np.errstate(invalid="ignore"):
        moments = arraybn.moments(x)
        layer(x)
    assert [layer.running_mean.tobytes(), layer.running_var.tobytes()] == before
    assert layer.num_batches_tracked == 1
    found = arraybn.update_running_stats(layer.running_mean, layer.running_var, moments, momentum)
    assert [array.tobytes() for array in found] == before
    assert found[0] is not layer.running_mean
    layer.momentum = 0.1
    with np.errstate(invalid="ignore"):
        layer(x)
    assert np.isnan(layer.running_mean[0])  # the control


def test_a_forward_during_another_ones_is_an_error_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, compute, states = arraybn.BatchNorm1d(3), layers.forward_in, []

    def forward_in(*given: Any, **options: Any) -> Any:
        monkeypatch.undo()
        result = compute(*given, **options)
        thread = threading.Thread(target=layer, args=(2 * X,))
        thread.start()
        thread.join()
        states.append(state(layer))
        return result

    monkeypatch.setattr(layers, "forward_in", forward_in)
    with pytest.raises(RuntimeError, match=r"^BatchNorm1d.forward: expected one thread at a time.*; got a change"):
        layer(X)
    assert states == [state(layer)]
    assert layer.num_batches_tracked == 1
    layer(X)  # the next one works
    assert layer.num_batches_tracked == 2


def test_a_layer_trained_from_eight_threads_at_once_loses_no_count() -> None:
    layer, start = arraybn.BatchNorm1d(3), threading.Barrier(8)

    def work(_: int) -> int:
        start.wait()
        done = 0
        for _ in range(200):
            with contextlib.suppress(RuntimeError):
                layer(X)
                done += 1
        return done

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) == layer.num_batches_tracked
    finally:
        sys.setswitchinterval(interval)
    layer.eval()
    with ThreadPoolExecutor(8) as pool:  # several threads may evaluate one layer
        for y in pool.map(layer, [X] * 100):
            np.testing.assert_array_equal(y, layer(X))


def test_e4_momentum_none_is_the_average_of_all_batches_and_without_a_counter_nothing() -> None:
    layer = arraybn.BatchNorm1d(3, momentum=None, dtype="float64")
    batches = [X * scale for scale in (1, 2, 5)]
    for x in batches:
        layer(x)
    np.testing.assert_allclose(layer.running_mean, np.mean([x.mean(axis=0) for x in batches], axis=0), rtol=1e-12)
    layer.num_batches_tracked = None
    before = layer.running_mean.copy()
    layer(100 * X)
    np.testing.assert_array_equal(layer.running_mean, before)
    assert layer.num_batches_tracked is None


def test_what_decides_in_evaluation_is_the_buffers_not_the_flag() -> None:
    layer = arraybn.BatchNorm1d(3)
    layer(X)
    layer.track_running_stats = False
    before = layer.state_dict()
    layer(5 * X)
    assert layer.num_batches_tracked == 1
    np.testing.assert_array_equal(layer.running_mean, before["running_mean"])
    with_buffers = layer.eval()(X)
    layer.running_mean = layer.running_var = None
    assert abs(layer(X) - with_buffers).max() > 0.1
    layer.track_running_stats = True
    layer(X)
    assert layer.num_batches_tracked == 1  # batch statistics, but in evaluation
    layer.running_mean = np.zeros(3)
    for mode in (True, False):
        with pytest.raises(
            ValueError, match="running_mean and running_var: expected either both or neither to be None"
        ):
            layer.train(mode)(X)
    untracked = arraybn.BatchNorm1d(3, track_running_stats=False)
    untracked.track_running_stats = True
    untracked(X)
    assert untracked.running_mean is None


def test_one_value_per_channel_is_pytorchs_error_and_changes_nothing() -> None:
    for layer in (arraybn.BatchNorm1d(3), arraybn.BatchNorm1d(3, track_running_stats=False).eval()):
        before = state(layer)
        for shape in ((1, 3), (1, 3, 1)):
            with pytest.raises(
                ValueError,
                match=r"^Expected more than 1 value per channel when training, got input size \(1, 3.*\)\. Leave out",
            ):
                layer(np.ones(shape))
        assert state(layer) == before
    assert arraybn.BatchNorm1d(3).eval()(np.ones((1, 3))).shape == (1, 3)


def test_remedies_fit_the_case() -> None:
    untracked = arraybn.BatchNorm1d(3, track_running_stats=False)
    for layer, remedy in ((untracked, "or use eval()"), (copy.copy(untracked).eval(), "or keep running statistics")):
        with pytest.raises(ValueError, match=rf"{re.escape(remedy)}$"):
            layer(np.ones((1, 3)))
    images = np.zeros((2, 4, 4, 3))
    with pytest.raises(
        ValueError, match=r"got 4, in shape .*\. For channels-last, build the layer with channel_axis=-1$"
    ):
        arraybn.BatchNorm2d(3)(images)
    with pytest.raises(ValueError, match=r"got 4, in shape \(2, 4, 4, 3\)$"):
        arraybn.BatchNorm2d(5)(images)


def test_an_empty_batch_counts_for_nothing_and_its_gradients_are_zero() -> None:
    layer = arraybn.BatchNorm1d(3)
    before = layer.state_dict()
    y = layer(np.zeros((0, 3), "f4"))
    assert y.shape == (0, 3)
    assert y.dtype == np.float32
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    assert layer.backward(y).shape == (0, 3)
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"affine": False, "track_running_stats": False}])
@pytest.mark.parametrize("shape", [(4, 2), (0, 2), (4, 5, 3)])
def test_the_number_of_channels_is_always_checked(options: dict[str, bool], shape: tuple[int, ...]) -> None:
    layer = arraybn.BatchNorm1d(3, **options)
    for mode in (True, False):
        with pytest.raises(
            ValueError, match=rf"x: expected 3 channels \(num_features\) on axis 1; got {shape[1]}, in shape"
        ):
            layer.train(mode)(np.zeros(shape))
    last = arraybn.BatchNorm1d(3, channel_axis=-1)
    assert last(RNG.standard_normal((4, 5, 3))).shape == (4, 5, 3)
    with pytest.raises(ValueError, match=r"x: expected an axis 2 \(channel_axis\); got shape \(4, 3\)"):
        arraybn.BatchNorm1d(3, channel_axis=2)(X[:4])


@pytest.mark.parametrize(
    "bad", [X.tolist(), X.astype(int), X[:, :2], X[:1], X[None, None], None, X.astype("c8")], ids=str
)
def test_a_forward_that_raises_changes_nothing_and_keeps_the_last_one(bad: Any) -> None:
    layer = arraybn.BatchNorm1d(3)
    layer(X)
    before = state(layer)
    with pytest.raises((TypeError, ValueError)):
        layer(bad)
    assert state(layer) == before
    assert abs(layer.backward(X)).max() > 0


def test_a_forward_that_fails_in_its_last_step_changes_nothing() -> None:
    layer = arraybn.BatchNorm1d(3)
    layer(X)
    for name, value in (("momentum", "fast"), ("eps", -1), ("running_var", np.ones(2, "f4"))):
        good = getattr(layer, name)
        setattr(layer, name, value)
        before = state(layer)
        with pytest.raises((TypeError, ValueError), match=name):
            layer(X)
        assert state(layer) == before
        setattr(layer, name, good)
    layer(X)
    assert layer.num_batches_tracked == 2


def test_a_backward_needs_a_forward_of_its_own_and_one_that_raises_changes_nothing() -> None:
    layer = arraybn.BatchNorm1d(3)
    missing = (
        r"BatchNorm1d.backward: expected a forward before it, one for each backward; got none.*batch_norm_backward"
    )
    with pytest.raises(RuntimeError, match=missing):
        layer.backward(X)
    layer(X)
    before = state(layer)
    for bad in (X[:2], X.tolist(), X.astype(int)):
        with pytest.raises((TypeError, ValueError), match="dy: expected"):
            layer.backward(bad)
        assert state(layer) == before
    layer.backward(X)
    with pytest.raises(RuntimeError, match=missing):
        layer.backward(X)


def test_copies_and_pickles_are_independent_and_drop_the_forward() -> None:
    model = arraybn.Sequential(arraybn.BatchNorm1d(3), arraybn.BatchNorm1d(3, momentum=None))
    model(X)
    for clone in (copy.copy(model[0]), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repr(clone) == repr(model if isinstance(clone, arraybn.Sequential) else model[0])
        with pytest.raises(RuntimeError, match="expected a forward before it"):
            clone.backward(X)
    before = state(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        clone(9 * X)
        clone.backward(X)
        clone.reset_parameters() if hasattr(clone, "reset_parameters") else clone[0].reset_parameters()
        clone[0].weight.data = np.zeros(3)
        assert state(model) == before
    assert abs(model.backward(X)).max() > 0


def test_one_parameter_in_two_layers_stays_one_in_copies() -> None:
    a, b = arraybn.BatchNorm1d(3), arraybn.BatchNorm1d(3)
    b.weight = a.weight
    model = arraybn.Sequential(a, b)
    assert len(list(model.parameters())) == 3
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(dtype="float64")):
        assert clone[0].weight is clone[1].weight
    model(X)
    model.backward(X)
    assert a.weight.grad.shape == (3,)


def test_resets() -> None:
    layer = arraybn.BatchNorm1d(3)
    layer(X)
    layer.weight.data, layer.bias.data = layer.weight.data * 3, layer.bias.data + 2
    layer.reset_running_stats()
    assert (layer.running_mean.tolist(), layer.running_var.tolist()) == ([0] * 3, [1] * 3)
    assert layer.num_batches_tracked == 0
    assert layer.weight.data.tolist() == [3] * 3
    layer.reset_parameters()
    assert (layer.weight.data.tolist(), layer.bias.data.tolist()) == ([1] * 3, [0] * 3)
    bare = arraybn.BatchNorm1d(3, affine=False, track_running_stats=False)
    bare.reset_parameters()
    assert not bare.state_dict()


def test_repr_is_pytorchs_and_adds_only_what_is_not_the_default() -> None:
    assert (
        repr(arraybn.BatchNorm2d(3)) == "BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)"
    )
    other = arraybn.BatchNorm1d(4, 0.5, None, False, channel_axis=-1, dtype=np.float64)
    assert repr(other) == (
        "BatchNorm1d(4, eps=0.5, momentum=None, affine=False, track_running_stats=True, channel_axis=-1, dtype=float64)"
    )


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_features": 0}, ValueError, "num_features: expected an integer ≥ 1; got 0"),
        ({"num_features": -1}, ValueError, "num_features: expected an integer ≥ 1; got -1"),
        ({"num_features": 3.0}, TypeError, "num_features: expected an integer; got 3.0"),
        ({"num_features": True}, TypeError, "num_features: expected an integer; got True"),
        ({"eps": -1e-5}, ValueError, "eps: expected a number ≥ 0; got -1e-05"),
        ({"eps": float("nan")}, ValueError, "eps: expected a finite number; got nan"),
        ({"eps": None}, TypeError, "eps: expected a number; got None"),
        ({"momentum": "0.1"}, TypeError, "momentum: expected a number; got '0.1'"),
        ({"momentum": float("inf")}, ValueError, "momentum: expected a finite number; got inf"),
        ({"channel_axis": None}, TypeError, "channel_axis: expected an integer; got None"),
        (
            {"dtype": "float16"},
            TypeError,
            "dtype: expected float32 or float64, because running averages drift in float16",
        ),
        ({"dtype": np.float16}, TypeError, "dtype: expected float32 or float64"),
        ({"dtype": int}, TypeError, "dtype: expected a real floating dtype of numpy; got <class 'int'>"),
        ({"dtype": "complex64"}, TypeError, "dtype: expected a real floating dtype of numpy; got 'complex64'"),
        ({"xp": "numpy"}, TypeError, "xp: expected an array namespace such as numpy, .*; got 'numpy'"),
    ],
    ids=str,
)
def test_wrong_constructor_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        arraybn.BatchNorm1d(**{"num_features": 3, **arguments})


def test_eps_zero_is_allowed() -> None:
    y = arraybn.BatchNorm1d(2, eps=0)(np.asarray([[1.0, 5.0], [3.0, 5.0]]))
    assert y.tolist() == [[-1, 0], [1, 0]]


def test_input_of_another_floating_dtype_than_the_layer_is_allowed() -> None:
    for layer_dtype, x_dtype in itertools.product(["float32", "float64"], ["f2", "f4", "f8"]):
        layer = arraybn.BatchNorm1d(3, dtype=layer_dtype)
        x = X.astype(x_dtype)
        assert layer(x).dtype == layer.backward(x).dtype == x.dtype
        for array in (layer.running_mean, layer.running_var, layer.weight.grad):
            assert array.dtype == layer_dtype


def test_to_below_float32_is_refused_and_the_whole_model_stays() -> None:
    model = arraybn.Sequential(arraybn.network.Linear(3, 3), arraybn.BatchNorm1d(3))
    before = state(model)
    with pytest.raises(
        TypeError, match="dtype: expected float32 or float64, because running averages drift in float16"
    ):
        model.to(dtype="float16")
    assert state(model) == before
    model.to(dtype=np.float64)
    assert {value.dtype.name for value in model.state_dict().values()} == {"float64", "int64"}


# ---- State dicts -----------------------------------------------------------------------------------------------------


def test_state_dict_has_pytorchs_keys_order_and_version_and_is_a_copy() -> None:
    model = arraybn.Sequential(OrderedDict(norm=arraybn.BatchNorm1d(3), act=arraybn.network.ReLU()))
    model(X)
    saved = model.state_dict()
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(saved) == [f"norm.{name}" for name in names]
    assert dict(saved._metadata) == {"": {"version": 1}, "norm": {"version": 2}, "act": {"version": 1}}
    counter = saved["norm.num_batches_tracked"]
    assert (counter.shape, counter.dtype, int(counter)) == ((), np.int64, 1)
    before = state(model)
    for value in saved.values():
        value[...] = 9
    assert state(model) == before
    prefixed = model.state_dict(prefix="m.")
    assert next(iter(prefixed)) == "m.norm.weight"
    assert list(prefixed._metadata) == ["m", "m.norm", "m.act"]


@pytest.mark.parametrize("version", [None, 1, 2])
def test_old_state_dicts_without_a_counter_load_it_as_zero(version: int | None) -> None:
    layer, source = arraybn.BatchNorm1d(3), arraybn.BatchNorm1d(3)
    layer(X)
    old = source.state_dict()
    del old["num_batches_tracked"]
    if version is None:
        old = dict(old)
    else:
        old._metadata[""]["version"] = version
    keys = list(old)
    if version == 2:
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "num_batches_tracked". '):
            layer.load_state_dict(old)
        assert layer.num_batches_tracked == 1
    else:
        layer.load_state_dict(old)
        assert layer.num_batches_tracked == 0
    assert list(old) == keys
    untracked = arraybn.BatchNorm1d(3, track_running_stats=False)
    assert untracked.load_state_dict({"weight": X[0], "bias": X[1]}).missing_keys == []


def test_every_wrong_key_is_listed_in_one_error_and_nothing_is_loaded() -> None:
    model = arraybn.Sequential(arraybn.BatchNorm1d(3), arraybn.BatchNorm1d(2))
    wrong = model.state_dict()
    wrong["0.weight"] = np.full(3, 7.0)  # right, but must not be loaded
    del wrong["0.bias"], wrong["1.running_mean"]
    wrong["0.extra"] = wrong["more"] = wrong["1"] = wrong["1.weight.deep"] = np.zeros(1)
    wrong["1.weight"], wrong["1.num_batches_tracked"] = np.zeros(3), np.zeros(2, int)
    before = state(model)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(wrong)
    assert str(caught.value) == (
        "Error(s) in loading state_dict for Sequential:\n"
        '\tMissing key(s) in state_dict: "0.bias", "1.running_mean". \n'
        '\tUnexpected key(s) in state_dict: "more", "1", "0.extra", "1.weight.deep". \n'
        "\tsize mismatch for 1.weight: copying a param with shape (3,) from checkpoint,"
        " the shape in current model is (2,).\n"
        "\tsize mismatch for 1.num_batches_tracked: copying a param with shape (2,) from checkpoint,"
        " the shape in current model is ()."
    )
    assert state(model) == before
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(wrong, strict=False)
    assert state(model) == before
    del wrong["1.weight"], wrong["1.num_batches_tracked"]
    keys = model.load_state_dict(wrong, strict=False)
    assert keys.missing_keys == ["0.bias", "1.weight", "1.running_mean", "1.num_batches_tracked"]
    assert repr(keys).startswith("IncompatibleKeys(missing_keys=['0.bias'")
    assert model[0].weight.data.tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("bias", object(), "bias: expected what numpy.asarray or DLPack takes; got object"),
        ("bias", [1, [2]], "bias: expected what numpy.asarray or DLPack takes; got list"),
        ("bias", np.zeros(3, "c8"), "bias: expected real numbers; got complex64"),
        ("bias", ["a", "b", "c"], "bias: expected real numbers; got str"),
        ("num_batches_tracked", np.asarray(1.5), "num_batches_tracked: expected a whole number of batches ≥ 0"),
        ("num_batches_tracked", np.asarray(-1), "num_batches_tracked: expected a whole number of batches ≥ 0"),
        ("num_batches_tracked", np.asarray(np.nan), "num_batches_tracked: expected a whole number of batches ≥ 0"),
        ("num_batches_tracked", "many", "num_batches_tracked: expected a whole number of batches ≥ 0"),
    ],
)
def test_values_that_are_no_numbers_are_one_type_error_that_names_the_key(key: str, value: Any, text: str) -> None:
    layer = arraybn.BatchNorm1d(3)
    given = {**layer.state_dict(), "weight": np.full(3, 7.0), key: value}
    before = state(layer)
    with pytest.raises(TypeError, match=text):
        layer.load_state_dict(given)
    assert state(layer) == before


def test_any_values_that_numpy_takes_are_loaded_and_cast() -> None:
    layer = arraybn.BatchNorm1d(3)
    given = {
        "weight": [1, 2, 3],
        "bias": np.arange(3.0),
        "running_mean": (0.5, 0, 0),
        "running_var": X[0].astype(">f8"),
    }
    layer.load_state_dict({**given, "num_batches_tracked": 4.0})
    assert layer.weight.data.dtype == layer.running_mean.dtype == layer.running_var.dtype == np.float32
    assert layer.weight.data.tolist() == [1, 2, 3]
    assert layer.running_var.dtype.isnative
    assert layer.num_batches_tracked == 4
    assert type(layer.num_batches_tracked) is int
    for wrong, text in ((7, "expected a mapping"), ({1: X}, "expected names as keys; got 1")):
        with pytest.raises(TypeError, match=f"state_dict: {text}"):
            layer.load_state_dict(wrong)


def test_values_that_only_speak_dlpack_are_loaded() -> None:
    class Capsule:
        def __init__(self, array: Any) -> None:
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

    layer = arraybn.BatchNorm1d(3)
    layer.load_state_dict({"weight": Capsule(np.asarray([1.0, 2.0, 3.0]))}, strict=False)
    assert layer.weight.data.tolist() == [1, 2, 3]


def test_an_overridden_load_can_translate_and_fail_without_harm() -> None:
    class Renamed(arraybn.BatchNorm1d):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
            if prefix + "gamma" in state_dict:
                state_dict[prefix + "weight"] = state_dict.pop(prefix + "gamma")
            super()._load_from_state_dict(state_dict, prefix, *others)
            if prefix + "trap" in state_dict:
                raise KeyError("trap")

    model = arraybn.Sequential(Renamed(3))
    given = {key.replace("weight", "gamma"): value for key, value in model.state_dict().items()}
    given["0.gamma"] = np.full(3, 5.0)
    model.load_state_dict(given)
    assert "0.gamma" in given
    assert model[0].weight.data.tolist() == [5, 5, 5]
    before = state(model)
    with pytest.raises(KeyError, match="trap"):
        model.load_state_dict({**given, "0.gamma": np.zeros(3), "0.trap": np.zeros(1)})
    assert state(model) == before


def test_loading_invalidates_nothing_that_was_remembered() -> None:
    layer = arraybn.BatchNorm1d(3)
    layer(X)
    expected = copy.deepcopy(layer)
    expected(X)
    layer.load_state_dict(arraybn.BatchNorm1d(3).state_dict())
    np.testing.assert_array_equal(layer.backward(X), expected.backward(X))


def test_a_shallow_copy_shares_parameters_but_has_buffers_of_its_own() -> None:
    layer = arraybn.BatchNorm1d(3)
    clone = copy.copy(layer)
    clone(X)
    assert layer.num_batches_tracked == 0
    assert clone.num_batches_tracked == 1
    assert clone.weight is layer.weight


@pytest.mark.parametrize("count", [np.asarray([7]), np.asarray([7.0]), [7]], ids=repr)
def test_a_count_of_shape_1_is_loaded_as_the_number(count: Any) -> None:
    layer = arraybn.BatchNorm1d(3)
    layer.load_state_dict({**layer.state_dict(), "num_batches_tracked": count})
    assert layer.num_batches_tracked == 7
    assert type(layer.num_batches_tracked) is int
    with pytest.raises(RuntimeError, match=r"size mismatch for num_batches_tracked.*shape \(2,\)"):
        layer.load_state_dict({**layer.state_dict(), "num_batches_tracked": np.asarray([7, 8])})


@pytest.mark.parametrize("value", [-0.5, np.nan])
def test_a_variance_that_is_none_is_loaded_with_a_warning_that_names_the_key(value: float) -> None:
    model = arraybn.Sequential(arraybn.BatchNorm1d(3))
    state = model.state_dict()
    state["0.running_var"][1] = value
    with pytest.warns(RuntimeWarning, match=r"^0\.running_var: expected variances ≥ 0; got 1 that are") as caught:
        model.load_state_dict(state)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(model[0].running_var, state["0.running_var"])
    before = model[0].running_mean
    state["0.running_mean"][...] = 5
    with pytest.raises(RuntimeWarning):  # a warning that is an error leaves everything as it was
        model.load_state_dict(state)
    assert model[0].running_mean is before

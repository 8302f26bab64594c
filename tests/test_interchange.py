"""State dicts of Flax, Keras and ONNX: libraries and arraybn predict the same, both ways; errors name misfits."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.libraries import need

import arraybn
from arraybn import interchange

NAMES = ["weight", "bias", "running_mean", "running_var"]
C, EPS = 5, 1e-3


def values(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0.5, 2, C).astype("f4") for name in NAMES}


def layer(affine: bool = True, **options: Any) -> arraybn.BatchNorm1d:
    """Return a layer that has learned something, with channels last as in Flax and Keras."""
    made = arraybn.BatchNorm1d(C, eps=EPS, affine=affine, channel_axis=-1, **options)
    state = values()
    made.running_mean, made.running_var = state["running_mean"], state["running_var"]
    made.num_batches_tracked = 7
    if affine:
        made.weight.data, made.bias.data = state["weight"], state["bias"]
    return made


def batch() -> Any:
    return np.random.default_rng(1).standard_normal((16, C)).astype("f4") * 3 + 1


def assert_like(got: Any, wanted: Any) -> None:
    """Assert 8 float32 ulp of the largest output: difference, root, quotient, product and sum round, on two sides."""
    wanted = np.asarray(wanted)
    scale = np.spacing(np.abs(wanted).max())
    np.testing.assert_allclose(got, wanted, rtol=0, atol=8 * scale)
    with pytest.raises(AssertionError):  # the control
        np.testing.assert_allclose(1.001 * got, wanted, rtol=0, atol=8 * scale)


def assert_same(state: Any, wanted: Any) -> None:
    assert list(state) == list(wanted)
    for name in state:
        np.testing.assert_array_equal(state[name], wanted[name], strict=True)


# ---- The libraries ----


def flax_layer(training: bool = False, **options: Any) -> Any:
    return need("flax").linen.BatchNorm(use_running_average=not training, epsilon=EPS, momentum=0.9, **options)


def keras_layer(weights: Any, **options: Any) -> Any:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("KERAS_HOME", tempfile.gettempdir())
    made = need("keras").layers.BatchNormalization(epsilon=EPS, momentum=0.9, **options)
    made.build((None, C))
    if weights is not None:
        made.set_weights(weights)
    return made


def onnx_model(inputs: Any, training: int = 0) -> bytes:
    helper, numpy_helper, names = need("onnx.helper"), need("onnx.numpy_helper"), list(inputs)
    outputs = ["y", "mean", "var"] if training else ["y"]
    options = {"epsilon": EPS, "momentum": 0.9} | ({"training_mode": 1} if training else {})
    node = helper.make_node("BatchNormalization", ["x", *names], outputs, **options)
    info = [helper.make_tensor_value_info(name, 1, None) for name in ["x", *outputs]]
    weights = [numpy_helper.from_array(value, name) for name, value in inputs.items()]
    graph = helper.make_graph([node], "g", info[:1], info[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8).SerializeToString()


# Keras with JAX on NumPy 2
KERAS = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
FLAGS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(("scale", "bias"), FLAGS)
def test_flax_predicts_as_we_do_with_its_variables(scale: bool, bias: bool) -> None:
    theirs, given, x = flax_layer(use_scale=scale, use_bias=bias), values(), batch()
    params = {name: given[ours] for name, ours, there in (("scale", "weight", scale), ("bias", "bias", bias)) if there}
    variables = {"params": params, "batch_stats": {"mean": given["running_mean"], "var": given["running_var"]}}
    wanted = theirs.init(need("jax").random.key(0), x)
    structure = need("jax").tree_util.tree_structure
    shaped = variables if params else {"batch_stats": variables["batch_stats"]}
    assert structure(shaped) == structure(dict(wanted))  # what a user of Flax has
    ours = arraybn.BatchNorm1d(C, eps=EPS, affine=scale or bias, channel_axis=-1).eval()
    ours.load_state_dict(interchange.from_flax(shaped))
    assert_like(ours(x), theirs.apply(shaped, x))
    back = interchange.to_flax(ours.state_dict(), scale=scale, bias=bias)
    assert structure(back) == structure(shaped)
    assert_like(ours(x), theirs.apply(back, x))


def test_flax_predicts_as_our_layer_does() -> None:
    x = batch()
    for affine in (True, False):
        ours = layer(affine).eval()
        theirs = flax_layer(use_scale=affine, use_bias=affine)
        assert_like(theirs.apply(interchange.to_flax(ours.state_dict()), x), ours(x))


def test_a_weight_without_bias_goes_to_flax_with_a_bias_of_0_or_without_one() -> None:
    x, ours = batch(), arraybn.BatchNorm1d(C, eps=EPS, channel_axis=-1, bias=False)
    ours.load_state_dict({**values(), "num_batches_tracked": 1}, strict=False)
    for bias in (True, False):
        variables = interchange.to_flax(ours.state_dict(), bias=bias)
        assert ("bias" in variables["params"]) == bias
        assert_like(flax_layer(use_bias=bias).apply(variables, x), ours.eval()(x))
    np.testing.assert_array_equal(interchange.to_onnx(ours.state_dict())["B"], np.zeros(C))


def test_flax_trains_on_with_the_biased_variance() -> None:
    x, ours = batch(), layer(momentum=1 - 0.9)
    variables = interchange.to_flax(ours.state_dict())
    _, after = flax_layer(training=True).apply(variables, x, mutable=["batch_stats"])
    assert_training_on(ours, x, after["batch_stats"]["mean"], after["batch_stats"]["var"])


@KERAS
@pytest.mark.parametrize(("scale", "center"), FLAGS)
def test_keras_predicts_as_we_do_with_its_weights(scale: bool, center: bool) -> None:
    given, x = values(), batch()
    weights = [given[name] for name, there in zip(NAMES, (scale, center, True, True), strict=True) if there]
    theirs = keras_layer(weights, scale=scale, center=center)
    ours = arraybn.BatchNorm1d(C, eps=EPS, affine=scale or center, channel_axis=-1).eval()
    ours.load_state_dict(interchange.from_keras(theirs.get_weights(), scale=scale, center=center))
    wanted = np.asarray(theirs(x, training=False))
    assert_like(ours(x), wanted)
    back = interchange.to_keras(ours.state_dict(), scale=scale, center=center)
    fresh = keras_layer(back, scale=scale, center=center)
    np.testing.assert_array_equal(np.asarray(fresh(x, training=False)), wanted)


@KERAS
def test_keras_names_its_weights_in_the_order_that_we_say() -> None:
    names = [weight.name for weight in keras_layer(None).weights]
    assert names == ["gamma", "beta", "moving_mean", "moving_variance"]


@KERAS
def test_keras_trains_on_with_the_biased_variance() -> None:
    x, ours = batch(), layer(momentum=1 - 0.9)
    theirs = keras_layer(interchange.to_keras(ours.state_dict()))
    theirs(x, training=True)
    assert_training_on(ours, x, *theirs.get_weights()[2:])


def assert_training_on(ours: Any, x: Any, mean: Any, var: Any) -> None:
    """Assert that `mean` and `var`, after another library's batch, are those of the table in the docstring."""
    before = ours.running_var
    ours(x)
    np.testing.assert_allclose(ours.running_mean, mean, rtol=1e-6)
    n, unbiased = len(x), (ours.running_var - 0.9 * before) / 0.1
    np.testing.assert_allclose(0.9 * before + 0.1 * unbiased * (n - 1) / n, var, rtol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(ours.running_var, var, rtol=1e-3)


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx.reference"])
@pytest.mark.parametrize("affine", [True, False])
def test_onnx_predicts_as_our_layer_does(runtime: str, affine: bool) -> None:
    ours, x, module = layer(affine).eval(), batch(), need(runtime)
    model = onnx_model(interchange.to_onnx(ours.state_dict()))
    if runtime == "onnxruntime":
        session = module.InferenceSession(model, providers=["CPUExecutionProvider"])
    else:
        session = module.ReferenceEvaluator(need("onnx").load_from_string(model))
    assert_like(session.run(None, {"x": x})[0], ours(x))


def test_onnx_weights_load() -> None:
    onnx, given = need("onnx"), values()
    theirs = dict(zip(("s", "b", "m", "v"), given.values(), strict=True))
    graph = onnx.load_from_string(onnx_model(theirs)).graph
    arrays = {tensor.name: need("onnx.numpy_helper").to_array(tensor) for tensor in graph.initializer}
    spec = onnx.defs.get_schema("BatchNormalization", 15)
    names = [entry.name for entry in spec.inputs][1:]
    assert names == ["scale", "B", "input_mean", "input_var"]
    state = interchange.from_onnx(dict(zip(names, map(arrays.get, graph.node[0].input[1:]), strict=True)))
    assert_same({name: state[name] for name in NAMES}, given)


def test_onnx_trains_on_with_the_biased_variance() -> None:
    x, ours = batch(), layer(momentum=1 - 0.9)
    model = need("onnx").load_from_string(onnx_model(interchange.to_onnx(ours.state_dict()), training=1))
    _, mean, var = need("onnx.reference").ReferenceEvaluator(model).run(None, {"x": x})
    assert_training_on(ours, x, mean, var)


# ---- Without the libraries ----


def to_from(library: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return getattr(interchange, f"to_{library}"), getattr(interchange, f"from_{library}")


LIBRARIES = ["flax", "keras", "onnx"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("prefix", ["", "bn1", "bn1."])
def test_there_and_back_is_the_same_but_for_the_counter(library: str, prefix: str) -> None:
    there, back = to_from(library)
    state = layer().state_dict(prefix="bn1." if prefix else "")
    network = {**state, "fc.weight": np.ones(3), "bn10.weight": np.ones(2)} if prefix else state
    counter = next(key for key in state if key.endswith("num_batches_tracked"))
    got = back(there(network, prefix=prefix), prefix=prefix)
    assert_same(got, {**state, counter: np.asarray(0)})
    assert got._metadata == {"bn1" if prefix else "": {"version": 2}}
    for array in got.values():
        assert not any(np.shares_memory(array, other) for other in network.values())
    del state[counter]
    assert_same(back(there(state, prefix=prefix), prefix=prefix), got)  # the counter has no counterpart


def test_without_affine_there_is_no_weight_and_no_bias() -> None:
    state = layer(affine=False).state_dict()
    wanted = {**state, "num_batches_tracked": np.asarray(0)}
    assert_same(interchange.from_flax(interchange.to_flax(state)), wanted)
    assert list(interchange.to_flax(state)) == ["batch_stats"]
    assert_same(interchange.from_keras(interchange.to_keras(state), scale=False, center=False), wanted)
    inputs = interchange.to_onnx(state)
    assert list(inputs) == ["scale", "B", "input_mean", "input_var"]
    assert inputs["scale"].tolist() == [1] * C
    assert inputs["B"].tolist() == [0] * C
    assert inputs["scale"].dtype == np.float32


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "bfloat16"])
def test_dtypes_and_bits_are_kept(dtype: str) -> None:
    numbers = need("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    given = {name: np.asarray([1.5, np.nan, -0.0]).astype(numbers) for name in NAMES}
    for library in LIBRARIES:
        there, back = to_from(library)
        got = back(there(given))
        for name in NAMES:
            assert (got[name].dtype, got[name].tobytes()) == (given[name].dtype, given[name].tobytes())


def test_arrays_of_other_namespaces_are_taken() -> None:
    torch = need("torch")
    weights = interchange.to_keras(torch.nn.BatchNorm1d(3).state_dict())
    assert [type(weight) for weight in weights] == [np.ndarray] * 4
    assert interchange.from_keras([torch.ones(3, requires_grad=True)] * 4)["weight"].tolist() == [1, 1, 1]


def flax(**changes: Any) -> Any:
    """Return the variables of a Flax batch norm with entries changed, or left out for None."""
    tree: dict[str, Any] = interchange.to_flax(layer().state_dict())
    for path, value in changes.items():
        group, _, name = path.partition("__")
        tree[group][name] = value
    return {group: {name: v for name, v in entries.items() if v is not None} for group, entries in tree.items()}


def onnx(**changes: Any) -> Any:
    inputs = {**interchange.to_onnx(layer().state_dict()), **changes}
    return {name: value for name, value in inputs.items() if value is not None}


def ours(**changes: Any) -> Any:
    state = {**layer().state_dict(), **changes}
    return {name: value for name, value in state.items() if value is not None}


ONE, FOUR = np.ones(C, "f4"), [np.ones(C, "f4")] * 4
FROM_FLAX, FROM_KERAS, FROM_ONNX = interchange.from_flax, interchange.from_keras, interchange.from_onnx
TO_FLAX, TO_KERAS, TO_ONNX = interchange.to_flax, interchange.to_keras, interchange.to_onnx
WRONG = [
    (FROM_FLAX, [3], {}, TypeError, "variables: expected a mapping of names to arrays; got int"),
    (FROM_FLAX, [{"params": 3}], {}, TypeError, "variables['params']: expected a mapping of names to arrays; got int"),
    (FROM_FLAX, [{"weights": {}}], {}, ValueError,
     "variables: expected the groups params and batch_stats; got 'weights'"),
    (FROM_FLAX, [{}], {}, ValueError,
     "batch_stats/var: expected an array (C,), of a layer with running statistics; got []"),
    (FROM_FLAX, [flax(batch_stats__mean=None)], {}, ValueError, "batch_stats/mean: expected an array (C,), of a layer"),
    (FROM_FLAX, [flax(params__kernel=ONE)], {}, ValueError,
     "params/kernel: expected none but params/scale, params/bias"),
    (FROM_FLAX, [flax(params__scale=ONE[:2])], {}, ValueError,
     "params/scale: expected shape (5,), that of batch_stats/mean; got (2,)"),
    (FROM_FLAX, [flax(batch_stats__var=ONE[:2])], {}, ValueError, "batch_stats/var: expected shape (5,)"),
    (FROM_FLAX, [flax(params__scale="text")], {}, TypeError,
     "params/scale: expected an array of real floating numbers; got str of <U4"),
    (FROM_FLAX, [flax(params__scale=object())], {}, TypeError,
     "params/scale: expected what numpy.asarray or DLPack takes; got object"),
    (FROM_FLAX, [flax(params__scale=np.ones(C, int))], {}, TypeError, "got numpy.ndarray of int64"),
    (FROM_FLAX, [flax(params__scale=np.ones(C, complex))], {}, TypeError, "got numpy.ndarray of complex128"),
    (FROM_KERAS, [3], {}, TypeError,
     "weights: expected a list of arrays, gamma, beta, moving_mean, moving_variance; got int"),
    (FROM_KERAS, ["text"], {}, TypeError, "weights: expected a list of arrays"),
    (FROM_KERAS, [FOUR[:3]], {}, ValueError,
     "weights: expected 4 arrays, gamma, beta, moving_mean, moving_variance; got 3."),
    (FROM_KERAS, [FOUR], {"scale": False}, ValueError,
     "weights: expected 3 arrays, beta, moving_mean, moving_variance; got 4"),
    (FROM_KERAS, [[*FOUR[:3], ONE[:2]]], {}, ValueError,
     "moving_variance: expected shape (5,), that of moving_mean; got (2,)"),
    (FROM_KERAS, [[np.float32(1)] * 4], {}, ValueError, "gamma: expected shape (C,); got ()"),
    (FROM_KERAS, [[np.ones((2, 2))] * 4], {}, ValueError, "gamma: expected shape (C,); got (2, 2)"),
    (FROM_KERAS, [[*FOUR[:3], None]], {}, TypeError,
     "moving_variance: expected what numpy.asarray or DLPack takes; got None"),
    (FROM_ONNX, [[ONE] * 4], {}, TypeError, "inputs: expected a mapping of names to arrays; got list"),
    (FROM_ONNX, [onnx(B=None)], {}, ValueError,
     "inputs: expected scale, B, input_mean, input_var; 'B' is missing, got ["),
    (FROM_ONNX, [onnx(X=ONE)], {}, ValueError,
     "X: expected none but scale, B, input_mean, input_var, of one batch norm"),
    (FROM_ONNX, [onnx(input_var=ONE[:1])], {}, ValueError,
     "input_var: expected shape (5,), that of input_mean; got (1,)"),
    (TO_FLAX, [layer()], {}, TypeError,
     "state_dict: expected a mapping of names to arrays; got arraybn.layers.BatchNorm1d"),
    (TO_FLAX, [{}], {}, ValueError, "running_var: expected an array (C,), of a layer with running statistics; got []"),
    (TO_FLAX, [ours(running_mean=None)], {}, ValueError,
     "running_mean: expected an array (C,), of a layer with running"),
    (TO_FLAX, [ours(weight=None)], {}, ValueError, "weight: expected a weight beside 'bias'; got none"),
    (TO_FLAX, [ours()], {"scale": False}, ValueError, "weight: expected 1 in every channel, to be left out; got [1."),
    (TO_KERAS, [ours()], {"center": False}, ValueError, "bias: expected 0 in every channel, to be left out; got ["),
    (TO_KERAS, [ours()], {"prefix": "bn1"}, ValueError, "bn1.running_var: expected an array (C,)"),
    (TO_KERAS, [ours(extra=ONE)], {}, ValueError, "extra: expected none but weight, bias, running_mean, running_var"),
    (TO_ONNX, [ours(weight=ONE[:3])], {}, ValueError, "weight: expected shape (5,), that of running_mean; got (3,)"),
    (TO_ONNX, [ours(weight=[[1]])], {}, TypeError,
     "weight: expected an array of real floating numbers; got list of int64"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "arguments", "options", "error", "text"), WRONG)
def test_what_does_not_fit_is_named(
    call: Callable[..., Any], arguments: list[Any], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    assert text in str(caught.value)


def test_it_imports_none_of_the_libraries() -> None:
    tree = ast.parse(Path(interchange.__file__).read_text())
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    found |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert found <= set(sys.stdlib_module_names) | {"numpy", "collections.abc", "__future__"}


NEGATIVE = np.asarray([1.0, -0.25, 2.0])
ONE = np.ones(3)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: interchange.from_keras([ONE, ONE, ONE, NEGATIVE]),
            "moving_variance: expected variances ≥ 0, in the order gamma",
        ),
        (
            lambda: interchange.from_onnx({"scale": ONE, "B": ONE, "input_mean": ONE, "input_var": NEGATIVE}),
            "input_var: expected",
        ),
        (lambda: interchange.from_flax({"batch_stats": {"mean": ONE, "var": NEGATIVE}}), "batch_stats/var: expected"),
    ],
)
def test_a_negative_variance_is_an_order_that_is_wrong(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"{text}.*; got -0.25$"):
        call()


class Named(np.ndarray):
    """An array with a name, as a Keras variable has."""

    name = ""


def named(name: str) -> Any:
    array = np.ones(3).view(Named)
    array.name = name
    return array


@pytest.mark.parametrize("form", ["{}", "bn1/{}:0"])
def test_names_of_keras_variables_are_compared(form: str) -> None:
    names = ["gamma", "beta", "moving_mean", "moving_variance"]
    right = [named(form.format(name)) for name in names]
    assert len(interchange.from_keras(right)) == 5
    assert len(interchange.from_keras([named("kernel_1"), *right[1:]])) == 5  # a name of its own says nothing
    with pytest.raises(ValueError, match=r"gamma: expected the order gamma, .*; got 'moving_mean' in this place"):
        interchange.from_keras([*right[2:], *right[:2]])


def test_interchange_is_there_after_import_arraybn() -> None:
    code = "import arraybn; arraybn.interchange.from_keras"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

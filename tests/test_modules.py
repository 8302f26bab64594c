"""Modules: names, trees, modes, printing, and refused assignments and registrations."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import operator
import pickle
import tracemalloc
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.libraries import need

import arraybn
from arraybn import network


def tree() -> tuple[arraybn.Sequential, arraybn.Module]:
    """Return a model in which one layer stands in two places."""
    shared = arraybn.BatchNorm1d(3)
    return arraybn.Sequential(OrderedDict(a=shared, b=arraybn.Sequential(network.ReLU(), shared))), shared


def test_names_of_a_tree_come_in_order_and_shared_modules_once() -> None:
    model, shared = tree()
    assert [name for name, _ in model.named_modules()] == ["", "a", "b", "b.0"]
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == ["", "a", "b", "b.0", "b.1"]
    assert list(model.modules())[1] is shared
    assert [name for name, _ in model.named_children()] == ["a", "b"]
    assert [name for name, _ in model.named_parameters()] == ["a.weight", "a.bias"]
    assert [name for name, _ in model.named_parameters(recurse=False)] == []
    assert [name for name, _ in model.named_parameters(prefix="m")] == ["m.a.weight", "m.a.bias"]
    assert list(model.parameters()) == [shared.weight, shared.bias]
    assert [name for name, _ in model.named_buffers()] == ["a.running_mean", "a.running_var", "a.num_batches_tracked"]
    assert list(model.buffers())[2] == 0
    assert list(model.state_dict())[5:7] == ["b.1.weight", "b.1.bias"]
    assert [type(child).__name__ for child in model.children()] == ["BatchNorm1d", "Sequential"]


def test_a_shared_layer_prints_and_loads_in_both_places() -> None:
    model, shared = tree()
    assert repr(model) == (
        "Sequential(\n"
        "  (a): BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)\n"
        "  (b): Sequential(\n"
        "    (0): ReLU()\n"
        "    (1): BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)\n"
        "  )\n"
        ")"
    )
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert shared.num_batches_tracked == 1
    assert repr(arraybn.Sequential()) == "Sequential()"


def test_modes_reach_the_whole_tree() -> None:
    model, _ = tree()
    assert model.eval() is model
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())
    with pytest.raises(ValueError, match="training mode is expected to be boolean; got 1"):
        model.train(1)


def test_a_child_that_overrides_train_keeps_its_word() -> None:
    class Frozen(arraybn.BatchNorm1d):
        def train(self, mode: bool = True) -> Any:
            return super().train(False)

    model = arraybn.Sequential(Frozen(3), network.ReLU()).train()
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


def test_to_leaves_integer_buffers_integers() -> None:
    module = Custom()
    module.register_buffer("index", np.arange(3))
    module.to(dtype="float32")
    assert module.index.dtype.kind == "i"
    assert module.table.dtype == np.float32


def test_a_sequence_is_indexed_sliced_and_iterated_with_repeats() -> None:
    relu = network.ReLU()
    model = arraybn.Sequential(relu, network.Flatten(), relu)
    assert len(model) == 3
    assert list(model) == [relu, model[1], relu]
    assert model[-1] is relu
    assert list(model[1:]) == [model[1], relu]
    assert type(type("Named", (arraybn.Sequential,), {})(relu, relu)[:1]).__name__ == "Named"
    assert [name for name, _ in model[1:].named_modules()] == ["", "1", "2"]


class Custom(arraybn.Module):
    """A module with a parameter, a buffer, and a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = arraybn.Parameter(np.ones(2))
        self.register_parameter("absent", None)
        self.register_buffer("count", 0)
        self.register_buffer("table", np.zeros(2))
        self.child = network.ReLU()
        self.plain = "text"


def test_attributes_find_their_place() -> None:
    module = Custom()
    assert list(module.state_dict()) == ["scale", "count", "table"]
    module.absent = arraybn.Parameter(np.zeros(1))
    assert list(module.state_dict()) == ["scale", "absent", "count", "table"]
    for value in (np.int64(3), np.asarray(3)):
        module.count = value
        assert (type(module.count), module.count) == (int, 3)
    module.table = module.child = None
    assert list(module.children()) == []
    module.plain = arraybn.Parameter(np.ones(1))
    assert "plain" in dict(module.named_parameters())
    assert "plain" not in vars(module)
    del module.plain, module.count, module.child
    module.note = 1
    del module.note
    for name in ("plain", "count", "child", "note"):
        with pytest.raises(AttributeError, match=f"'Custom' object has no attribute '{name}'"):
            getattr(module, name)
    with pytest.raises(AttributeError):
        del module.nothing


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda m: setattr(m, "scale", np.ones(2)),
            TypeError,
            r"cannot assign 'ndarray' to 'scale' \(Parameter or None",
        ),
        (lambda m: setattr(m, "child", 3), TypeError, r"cannot assign 'int' to 'child' \(Module or None"),
        (lambda m: setattr(m, "table", [0, 1]), TypeError, "cannot assign 'list' to buffer 'table'"),
        (lambda m: setattr(m, "count", True), TypeError, "cannot assign 'bool' to buffer 'count'"),
        (lambda m: m.register_buffer("b", "x"), TypeError, "cannot assign 'str' to buffer 'b'"),
        (lambda m: m.register_buffer("plain", 1), KeyError, "attribute 'plain' already exists"),
        (lambda m: m.register_parameter("count", None), KeyError, "attribute 'count' already exists"),
        (lambda m: m.register_parameter("p", np.ones(1)), TypeError, "cannot assign 'ndarray' to 'p'"),
        (lambda m: m.register_parameter("a.b", None), KeyError, "parameter name can't contain a dot"),
        (lambda m: m.add_module("", None), KeyError, "module name can't be empty string"),
        (lambda m: m.add_module(1, None), TypeError, "module name should be a string. Got int"),
        (lambda m: m.add_module("x", 1), TypeError, "int is not a Module subclass"),
        (lambda m: m(1), NotImplementedError, "Custom has no forward"),
        (lambda m: m.backward(1), NotImplementedError, "Custom has no backward"),
        (lambda m: arraybn.Sequential(m, None), TypeError, "NoneType is not a Module subclass"),
        (lambda m: arraybn.Parameter([1.0]), TypeError, r"data: expected an array \(.*\); got list"),
        (lambda m: m.to(xp=3), TypeError, "xp: expected an array namespace"),
        (lambda m: m.to(dtype="int8"), TypeError, "dtype: expected a real floating dtype of numpy; got 'int8'"),
    ],
)
def test_wrong_use_is_refused_and_changes_nothing(call: Any, error: type[Exception], text: str) -> None:
    module = Custom()
    before = {name: value.copy() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=text):
        call(module)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all((after[name] == value).all() for name, value in before.items())


def test_a_module_that_forgot_its_super_init_says_so() -> None:
    class Forgetful(arraybn.Module):
        def __init__(self) -> None:
            self.child = network.ReLU()

    with pytest.raises(AttributeError, match=r"cannot assign 'child' before Module.__init__\(\) call"):
        Forgetful()

    class Early(arraybn.Module):
        def __init__(self) -> None:
            self.size = 3
            super().__init__()

    assert Early().size == 3


def test_parameters_print_and_add_up() -> None:
    parameter = arraybn.Parameter(np.ones(2, "f4"))
    assert repr(parameter) == "Parameter(array([1., 1.], dtype=float32))"
    parameter.accumulate(np.asarray([1.0, 2.0]))
    first = parameter.grad
    parameter.accumulate(np.asarray([1.0, 2.0]))
    assert (first.tolist(), parameter.grad.tolist()) == ([1, 2], [2, 4])
    assert parameter.grad.dtype == np.float32


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: network.Linear(0, 1), "in_features: expected an integer ≥ 1; got 0"),
        (lambda: network.Linear(2, 1)(np.zeros((1, 3))), r"x: expected shape \(N, 2\); got \(1, 3\)"),
        (lambda: network.Conv2d(1, 1, 3, padding=3), "padding: expected less than kernel_size = 3; got 3"),
        (
            lambda: network.Conv2d(1, 1, 3)(np.zeros((1, 2, 4, 4))),
            r"x: expected shape \(N, 1, H, W\); got \(1, 2, 4, 4\)",
        ),
        (lambda: network.Conv2d(1, 1, 3)(np.zeros((1, 1, 2, 4))), "x: expected at least 3 rows and columns, padding"),
        (
            lambda: network.cross_entropy(np.zeros((2, 3)), np.zeros(3, int)),
            r"labels: expected shape \(2,\), one per row",
        ),
    ],
)
def test_wrong_use_of_the_network_pieces(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_sgd_follows_its_formula_and_leaves_what_has_no_gradient() -> None:
    p, q = arraybn.Parameter(np.asarray([1.0])), arraybn.Parameter(np.asarray([1.0]))
    sgd = network.SGD([p, q], lr=0.1, momentum=0.5)
    for gradient in (1.0, 2.0):
        p.grad = np.asarray([gradient])
        sgd.step()
    assert p.data[0] == pytest.approx(1 - 0.1 * 1 - 0.1 * (0.5 + 2))
    assert q.data[0] == 1
    sgd.zero_grad()
    assert p.grad is None
    single = arraybn.Parameter(np.ones(1, "f4"))
    single.grad = np.ones(1, "f4")
    network.SGD([single], lr=np.float64(0.5), momentum=np.float64(0.5)).step()
    assert single.data.dtype == np.float32


def test_tab_completion_knows_parameters_buffers_and_children() -> None:
    layer, model = arraybn.BatchNorm1d(3), arraybn.Sequential({"bn": arraybn.BatchNorm1d(3), "1": network.ReLU()})
    assert {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "forward"} <= set(dir(layer))
    assert "bn" in dir(model)
    assert "1" not in dir(model)  # no name that can be typed
    assert dir(layer) == sorted(dir(layer))


BINARY = [
    getattr(operator, name)
    for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "le", "gt", "ge", "eq", "ne"]
]


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
def test_a_parameter_is_an_array_in_operators_and_in_numpy(library: str) -> None:
    xp = need(library)
    array, other = xp.asarray([1.0, 2.0, 4.0]), xp.asarray([3.0, 2.0, 0.5])
    p = arraybn.Parameter(array)
    for function in BINARY:
        for right in (other, 2.0, arraybn.Parameter(other)):
            plain = right.data if isinstance(right, arraybn.Parameter) else right
            found = function(p, right)
            assert type(found) is type(function(array, plain))
            assert (found == function(array, plain)).all()
            assert (function(right, p) == function(plain, array)).all()
    for function in (operator.neg, operator.pos, abs):
        assert (function(p) == function(array)).all()
    assert (p @ other == array @ other).all()
    assert (other @ p == other @ array).all()
    assert p[1] == 2
    assert [float(value) for value in p] == [1, 2, 4]
    assert p.data is array
    seen = np.asarray(p)
    assert seen.tolist() == [1, 2, 4]
    assert np.asarray(p, dtype="f8").dtype == np.float64
    assert np.array(p, copy=True) is not seen
    assert np.sqrt(arraybn.Parameter(xp.asarray([4.0, 9.0]))).tolist() == [2, 3]
    if library == "numpy":
        assert np.asarray(p, copy=False) is array
        with pytest.raises(ValueError, match="copy"):
            np.asarray(p, dtype="f4", copy=False)
    else:
        with pytest.raises(ValueError, match=r"data: expected a NumPy array for copy=False; got .*\.data"):
            np.asarray(p, copy=False)


def test_a_parameter_stays_a_parameter() -> None:
    p = arraybn.Parameter(np.asarray([1.0, 2.0]))
    p.grad = np.ones(2)
    for twin in (copy.deepcopy(p), copy.copy(p), pickle.loads(pickle.dumps(p))):
        assert type(twin) is arraybn.Parameter
        assert twin.data.tolist() == [1, 2]
        assert twin.grad.tolist() == [1, 1]
    assert {p: 1}[p] == 1
    assert hash(p) != hash(copy.copy(p))
    assert bool(p)
    with pytest.raises(AttributeError, match=r"no attribute 'mean'\. Its array is \.data: use \.data\.mean$"):
        p.mean()
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        p.nonsense  # noqa: B018
    layer = arraybn.BatchNorm1d(2)
    layer.weight.data = layer.weight * 3  # as a step of an optimizer
    assert layer.weight.data.tolist() == [3, 3]


def test_reprs_say_what_a_user_asks() -> None:
    sgd = network.SGD(arraybn.BatchNorm1d(3).parameters(), lr=0.1, momentum=0.9)
    assert repr(sgd) == "SGD(2 parameters, lr=0.1, momentum=0.9)"
    x = np.random.default_rng(0).standard_normal((4, 3, 5)).astype("f4")
    for options in ({}, {"mean": np.zeros(3), "var": np.ones(3)}):
        saved = arraybn.batch_norm(x, kernels="reference", **options)[1]
        assert repr(saved) == "Saved(shape=(4, 3, 5), dtype=float32, n=20, backend='reference')"
    assert (
        repr(arraybn.batch_norm(x, out=x, kernels="reference")[1])
        == "Saved(shape=(4, 3, 5), n=20, backend='reference')"
    )


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
def test_mean_squared_error_has_the_value_and_the_gradient_of_the_formula(library: str) -> None:
    xp, rng = need(library), np.random.default_rng(0)
    p, t = rng.standard_normal((2, 5, 3)).astype("f4")
    loss, gradient = network.mean_squared_error(xp.asarray(p), xp.asarray(t))
    assert isinstance(loss, float)
    assert loss == pytest.approx(float(((p - t).astype("f8") ** 2).mean()), rel=1e-6)
    np.testing.assert_allclose(np.asarray(gradient), 2 * (p - t) / 15, rtol=1e-6)
    moved = p.copy()
    moved[2, 1] += 1e-2
    step = (network.mean_squared_error(xp.asarray(moved), xp.asarray(t))[0] - loss) / 1e-2
    assert step == pytest.approx(float(gradient[2, 1]) + 1e-2 / 15, rel=1e-2, abs=1e-4)


def _training(steps: range, model: arraybn.Module, sgd: network.SGD) -> None:
    for step in steps:
        x, t = np.random.default_rng(step).standard_normal((2, 8, 3)).astype("f4")
        sgd.zero_grad()
        model.backward(network.mean_squared_error(model(x), t)[1])
        sgd.step()


def _network() -> tuple[arraybn.Module, network.SGD]:
    model = arraybn.Sequential(network.Linear(3, 3, rng=np.random.default_rng(0)), arraybn.BatchNorm1d(3))
    return model, network.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("momentum", [True, False], ids=["with its state", "control"])
def test_a_run_with_momentum_resumes_bit_for_bit(suffix: str, momentum: bool, tmp_path: Path) -> None:
    if suffix == "safetensors":
        need("safetensors")
    model, sgd = _network()
    _training(range(5), model, sgd)
    sgd.lr = 0.05
    path = tmp_path / f"run.{suffix}"
    arraybn.save({**model.state_dict("model."), **sgd.state_dict("sgd.")}, path)
    _training(range(5, 9), model, sgd)
    again, other = _network()
    state = arraybn.load(path)
    again.load_state_dict({key[6:]: value for key, value in state.items() if key.startswith("model.")})
    other.lr = 0.05
    if momentum:
        other.lr = 7.0
        other.load_state_dict(state, "sgd.")
    _training(range(5, 9), again, other)
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(one.tobytes() == two.tobytes() for one, two in pairs) == momentum


def test_an_optimizers_state_dict_is_its_own_and_a_wrong_one_changes_nothing() -> None:
    model, sgd = _network()
    assert list(sgd.state_dict()) == ["lr", "momentum"]
    _training(range(2), model, sgd)
    state = sgd.state_dict("s.")
    assert list(state) == ["s.lr", "s.momentum", *(f"s.velocity.{i}" for i in range(4))]
    state["s.velocity.0"][...] = np.nan  # a copy
    assert np.isfinite(sgd.state_dict()["velocity.0"]).all()
    before = {key: value.tobytes() for key, value in sgd.state_dict().items()}
    good = sgd.state_dict()
    wrong = [
        ({**good, "velocity.0": np.ones(2)}, ValueError, r"velocity.0: expected shape \(3, 3\)"),
        ({**good, "velocity.4": np.ones(2)}, ValueError, "'velocity.4'"),
        ({**good, "lr": -1.0}, ValueError, "lr: expected a number ≥ 0"),
        ({"momentum": 0.9}, ValueError, "lr: expected .*; got none"),
        ([], TypeError, "state_dict: expected a mapping"),
    ]
    for given, error, text in wrong:
        with pytest.raises(error, match=text):
            sgd.load_state_dict(given)
        assert {key: value.tobytes() for key, value in sgd.state_dict().items()} == before
    sgd.load_state_dict({"lr": 0.5, "momentum": 0.0})
    assert list(sgd.state_dict()) == ["lr", "momentum"]
    assert (sgd.lr, sgd.momentum) == (0.5, 0.0)


# ---- inference_mode ----


def deep() -> Any:
    rng = np.random.default_rng(0)
    pieces = [arraybn.BatchNorm2d(2), network.Conv2d(2, 2, 1, rng=rng), network.ReLU(), network.Flatten()]
    return arraybn.Sequential(*pieces, network.Linear(8, 2, rng=rng)).eval()


IMAGES = np.random.default_rng(0).normal(size=(4, 2, 2, 2)).astype(np.float32)


def test_inference_remembers_nothing_and_changes_no_result() -> None:
    model = deep()
    wanted = model(IMAGES)
    with arraybn.inference_mode():
        np.testing.assert_array_equal(model(IMAGES), wanted)
        with pytest.raises(RuntimeError, match=r"expected a forward before it.*In inference_mode\(\) forwards rem"):
            model.backward(wanted)
    for module in model.modules():
        if not isinstance(module, arraybn.Sequential):
            with pytest.raises(RuntimeError, match="expected a forward before it"):
                module.backward(wanted)
    model(IMAGES), model.backward(wanted)


def test_ten_evaluated_layers_hold_no_memory_after_inference() -> None:
    layers = [arraybn.BatchNorm1d(1024).eval() for _ in range(10)]
    held = []
    for mode in (contextlib.nullcontext, arraybn.inference_mode):
        for layer in layers:
            layer(np.ones((2, 1024), np.float32))
        x = np.ones((1024, 1024), np.float32)
        tracemalloc.start()
        with mode():
            for layer in layers:
                x = layer(x)
        del x
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert held[0] > 9 * 2**22  # the control: nine inputs
    assert held[1] < 2**16


def test_training_in_inference_mode_still_updates_the_statistics() -> None:
    layer = arraybn.BatchNorm2d(2)
    with arraybn.inference_mode():
        layer(IMAGES)
    assert layer.num_batches_tracked == 1


def test_inference_mode_is_of_one_thread_and_of_one_task() -> None:
    def remembers() -> bool:
        layer = arraybn.BatchNorm2d(2).eval()
        layer(IMAGES)
        return layer._remembered is not None

    async def other(inside: asyncio.Event) -> bool:
        await inside.wait()
        return remembers()

    async def main() -> list[bool]:
        inside = asyncio.Event()
        task = asyncio.create_task(other(inside))
        with arraybn.inference_mode():
            inside.set()
            return [await task, remembers()]

    assert asyncio.run(main()) == [True, False]
    with arraybn.inference_mode(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(remembers).result()
        assert not remembers()
    assert remembers()


def test_inference_mode_ends_with_the_outer_block_and_after_an_error() -> None:
    layer = arraybn.BatchNorm2d(2).eval()
    with arraybn.inference_mode():
        with pytest.raises(ZeroDivisionError), arraybn.inference_mode():
            raise ZeroDivisionError
        layer(IMAGES)
        assert layer._remembered is None
    layer(IMAGES)
    assert layer._remembered is not None


def test_generators_whose_blocks_cross_leave_no_mode_behind() -> None:
    def generate() -> Any:
        with arraybn.inference_mode():
            yield

    first, second, layer = generate(), generate(), arraybn.BatchNorm2d(2).eval()
    next(first), next(second), next(first, None)
    layer(IMAGES)
    assert layer._remembered is None  # the second is open
    next(second, None)
    layer(IMAGES)
    assert layer._remembered is not None


def test_inference_mode_decorates_functions_that_run_at_once() -> None:
    layer = arraybn.BatchNorm2d(2).eval()

    @arraybn.inference_mode()
    def evaluate() -> Any:
        return layer(IMAGES), layer._remembered

    def generate() -> Any:
        yield

    async def coroutine() -> None:
        pass

    async def stream() -> Any:
        yield

    assert evaluate()[1] is None
    for function in (generate, coroutine, stream):
        with pytest.raises(TypeError, match="inference_mode: expected a plain function; got"):
            arraybn.inference_mode()(function)

"""Modules: names, trees, modes, printing, and refused assignments and registrations."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

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

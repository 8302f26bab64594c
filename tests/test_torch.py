"""PyTorch beside us, in float64 and float32: forward, gradients, running statistics, call sequences, state dicts."""

from __future__ import annotations

import copy
import importlib
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.libraries import need

import arraybn

FLAGS = list(itertools.product([True, False], [True, False], [0.1, 1.0, 0.0, None]))
SHAPES = {1: [(8, 3), (4, 3, 6)], 2: [(3, 3, 4, 5)], 3: [(2, 3, 2, 3, 4)]}
CASES = [(dims, shape) for dims, shapes in SHAPES.items() for shape in shapes]


@pytest.fixture
def torch() -> Any:
    return need("torch")


def pair(torch: Any, dims: int, dtype: str, **options: Any) -> tuple[Any, Any]:
    """Return arraybn's layer and PyTorch's, with the same random weight and bias."""
    ours = getattr(arraybn, f"BatchNorm{dims}d")(3, dtype=dtype, **options)
    theirs = getattr(torch.nn, f"BatchNorm{dims}d")(3, dtype=getattr(torch, dtype), **options)
    if ours.affine:
        rng = np.random.default_rng(0)
        values = {"weight": rng.uniform(-2, 2, 3).astype(dtype), "bias": rng.uniform(-2, 2, 3).astype(dtype)}
        ours.load_state_dict(values, strict=False)
        theirs.load_state_dict({name: torch.tensor(value) for name, value in values.items()}, strict=False)
    return ours, theirs


def same(ours: Any, theirs: Any, dtype: str, factor: float = 1.0) -> bool:
    """Assert agreement to a few hundred roundings of the largest value: PyTorch adds in another order."""
    theirs = theirs.detach().numpy() * factor
    scale = max(1.0, abs(theirs).max()) if theirs.size else 1.0
    return ours.shape == theirs.shape and bool((abs(ours - theirs) <= 512 * np.finfo(dtype).eps * scale).all())


def assert_same_state(ours: Any, theirs: Any, dtype: str) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert mine._metadata == other._metadata
    for name, value in mine.items():
        assert value.dtype.name == str(other[name].dtype).removeprefix("torch.")
        assert same(value, other[name], dtype), name


@pytest.mark.parametrize(("dims", "shape"), CASES)
@pytest.mark.parametrize(("affine", "track", "momentum"), FLAGS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_e3_to_e7_forward_gradients_and_running_statistics(
    torch: Any, dims: int, shape: tuple[int, ...], affine: bool, track: bool, momentum: float | None, dtype: str
) -> None:
    ours, theirs = pair(torch, dims, dtype, affine=affine, track_running_stats=track, momentum=momentum)
    rng = np.random.default_rng(1)
    for step in range(4):
        mode = step != 2
        ours.train(mode), theirs.train(mode)
        x, dy = (rng.standard_normal(shape).astype(dtype) * 2 + 1 for _ in range(2))
        tx = torch.tensor(x, requires_grad=True)
        y, ty = ours(x), theirs(tx)
        ty.backward(torch.tensor(dy))
        pairs = [(y, ty), (ours.backward(dy), tx.grad)]
        if affine:  # both add up over the steps
            pairs += [(ours.weight.grad, theirs.weight.grad), (ours.bias.grad, theirs.bias.grad)]
        for mine, other in pairs:
            assert mine.dtype == dtype
            assert same(mine, other, dtype)
            assert not same(mine, other, dtype, factor=1.001)  # the control
        assert_same_state(ours, theirs, dtype)


class Calls:
    """The calls of a random sequence, each made on both layers."""

    def __init__(self, torch: Any, options: dict[str, Any]) -> None:
        self.torch, (self.ours, self.theirs) = torch, pair(torch, 1, "float64", **options)
        self.saved = self.ours.state_dict(), self.theirs.state_dict()
        self.saved = self.saved[0], {name: value.clone() for name, value in self.saved[1].items()}

    def forward(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        x, dy = rng.standard_normal((2, 5, 3))
        tx = self.torch.tensor(x, requires_grad=True)
        y, ty = self.ours(x), self.theirs(tx)
        ty.backward(self.torch.tensor(dy))
        assert same(y, ty, "float64")
        assert same(self.ours.backward(dy), tx.grad, "float64")

    def train(self, seed: int) -> None:
        self.ours.train(seed % 2 == 0), self.theirs.train(seed % 2 == 0)

    def reset(self, seed: int) -> None:
        for layer in (self.ours, self.theirs):
            layer.reset_parameters() if seed % 2 else layer.reset_running_stats()

    def load(self, seed: int) -> None:
        self.ours.load_state_dict(self.saved[0])
        self.theirs.load_state_dict(self.saved[1])

    def remember(self, seed: int) -> None:
        self.saved = self.ours.state_dict(), {n: v.clone() for n, v in self.theirs.state_dict().items()}

    def track(self, seed: int) -> None:
        if self.ours.running_mean is None:  # PyTorch's reset and load would fail on a flag without buffers
            return
        self.ours.track_running_stats = self.theirs.track_running_stats = seed % 2 == 0

    def zero_grad(self, seed: int) -> None:
        self.ours.zero_grad(), self.theirs.zero_grad()


@given(st.sampled_from(FLAGS), st.data())
def test_random_sequences_of_calls(flags: Any, data: st.DataObject) -> None:
    names = ["forward", "train", "forward", "reset", "load", "remember", "track", "zero_grad"]
    calls = Calls(need("torch"), dict(zip(("affine", "track_running_stats", "momentum"), flags, strict=True)))
    for name, seed in data.draw(st.lists(st.tuples(st.sampled_from(names), st.integers(0, 99)), max_size=12)):
        getattr(calls, name)(seed)
        assert_same_state(calls.ours, calls.theirs, "float64")


def test_state_dicts_go_both_ways(torch: Any) -> None:
    x = np.random.default_rng(0).standard_normal((6, 3, 4, 4)).astype("f4")
    ours, theirs = pair(torch, 2, "float32")
    theirs(torch.tensor(5 * x))
    ours.load_state_dict(theirs.state_dict())
    assert_same_state(ours, theirs, "float32")
    assert same(ours.eval()(x), theirs.eval()(torch.tensor(x)), "float32")
    ours.train()(x + 1)
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in ours.state_dict().items()})
    assert_same_state(ours, theirs, "float32")
    assert ours.num_batches_tracked == 2
    assert same(ours.eval()(x), theirs.eval()(torch.tensor(x)), "float32")
    model = arraybn.Sequential(arraybn.BatchNorm2d(3), arraybn.network.Flatten(), arraybn.network.Linear(48, 2))
    peer = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(48, 2))
    model.load_state_dict(peer.state_dict())
    assert same(model.eval()(x), peer.eval()(torch.tensor(x)), "float32")
    with tempfile.TemporaryDirectory() as folder:
        model[0].to(xp=torch)
        torch.save(model[0].state_dict(), f"{folder}/norm.pt")
        peer[0].load_state_dict(torch.load(f"{folder}/norm.pt"))  # which refuses classes that it does not know
    half = {name: value.bfloat16() for name, value in theirs.state_dict().items()}
    ours.load_state_dict(half)
    assert same(ours.weight.data, half["weight"].float(), "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_input_of_a_float32_layer(torch: Any, dtype: str) -> None:
    half = np.dtype(dtype) if dtype == "float16" else np.dtype(need("ml_dtypes").bfloat16)
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(half)
    ours, theirs = pair(torch, 1, "float32")
    y = ours(x)
    tx = torch.tensor(x.astype("f4")).to(getattr(torch, dtype))
    ty = theirs(tx)
    assert y.dtype == half
    assert abs(y.astype("f4") - ty.float().detach().numpy()).max() <= 2 * 2.0 ** (-10 if dtype == "float16" else -7) * 4
    assert_same_state(ours, theirs, "float32")


def test_the_words_of_errors_are_pytorchs(torch: Any) -> None:
    calls = [
        (dims, call)
        for dims in SHAPES
        for call in (
            lambda layer, wrap: layer(wrap(np.zeros((3,) * 6, "f4"))),
            lambda layer, wrap: layer(wrap(np.zeros((3,), "f4"))),
            lambda layer, wrap: layer.load_state_dict(
                {"weight": wrap(np.zeros(3, "f4")), "x": wrap(np.zeros(1, "f4"))}
            ),
            lambda layer, wrap: layer.train("yes"),
        )
    ]
    for dims, call in calls:
        ours, theirs = pair(torch, dims, "float32")
        with pytest.raises((ValueError, RuntimeError)) as mine:
            call(ours, np.asarray)
        with pytest.raises(type(mine.value)) as other:
            call(theirs, torch.from_numpy)
        assert str(mine.value).startswith(str(other.value).rstrip("\n"))


def test_repr_of_a_model_is_pytorchs_tree(torch: Any) -> None:
    ours = arraybn.Sequential(
        arraybn.BatchNorm2d(3), arraybn.Sequential(arraybn.network.ReLU(), arraybn.BatchNorm2d(3, affine=False))
    )
    theirs = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm2d(3, affine=False))
    )
    assert repr(ours) == repr(theirs).replace(" bias=True,", "").replace(" bias=False,", "")


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_weight_without_bias_is_pytorchs(torch: Any, dims: int) -> None:
    x = np.random.default_rng(dims).standard_normal((6, 3, 4, 4, 2)[: dims + 2])
    ours, theirs = pair(torch, dims, "float64", bias=False)
    assert ours.bias is None
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs).replace(")", ", dtype=float64)")
    other = torch.tensor(x, requires_grad=True)
    y = theirs(other)
    assert same(ours(x), y, "float64")
    y.backward(torch.tensor(x**2))
    assert same(ours.backward(x**2), other.grad, "float64")
    assert same(ours.weight.grad, theirs.weight.grad, "float64")
    assert_same_state(ours, theirs, "float64")
    theirs.load_state_dict({name: torch.as_tensor(value) for name, value in ours.state_dict().items()})
    ours.load_state_dict(theirs.state_dict())
    assert_same_state(ours, theirs, "float64")
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        pair(torch, dims, "float64")[0].load_state_dict(ours.state_dict())


def test_without_affine_there_is_no_bias_whatever_the_argument(torch: Any) -> None:
    for bias in (True, False):
        ours, theirs = arraybn.BatchNorm1d(3, affine=False, bias=bias), torch.nn.BatchNorm1d(3, affine=False, bias=bias)
        assert ours.weight is ours.bias is theirs.bias is None


def test_network_pieces_agree_with_pytorch(torch: Any) -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((5, 2, 6, 6)).astype("f4"), np.asarray([0, 3, 1, 1, 2])
    ours = arraybn.Sequential(
        arraybn.network.Conv2d(2, 4, 3, padding=1),
        arraybn.BatchNorm2d(4),
        arraybn.network.ReLU(),
        arraybn.network.Flatten(),
        arraybn.network.Linear(144, 4),
    )
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(144, 4),
    )
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in ours.state_dict().items()})
    optimizer = arraybn.network.SGD(ours.parameters(), lr=0.05, momentum=0.9)
    other = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        loss, dlogits = arraybn.network.cross_entropy(ours(x), labels)
        optimizer.zero_grad()
        ours.backward(dlogits)
        optimizer.step()
        their_loss = torch.nn.functional.cross_entropy(theirs(torch.tensor(x)), torch.tensor(labels))
        other.zero_grad()
        their_loss.backward()
        other.step()
        assert loss == pytest.approx(their_loss.item(), rel=1e-5)
    for name, value in ours.state_dict().items():
        np.testing.assert_allclose(value, theirs.state_dict()[name], rtol=2e-3, atol=2e-5)


def make_fx(f: Any, mode: str) -> Any:
    def function(x: Any) -> Any:  # make_fx does not take methods
        return f(x)

    return importlib.import_module("torch.fx.experimental.proxy_tensor").make_fx(function, tracing_mode=mode)


def in_fake_mode(torch: Any, f: Any, x: Any) -> Any:
    with importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode(allow_non_fake_inputs=True):
        return f(torch.ones(x.shape, dtype=x.dtype))


def as_module(torch: Any, f: Any) -> Any:
    module = type("AsModule", (torch.nn.Module,), {"forward": lambda _, x: f(x)})
    return module()


TRANSFORMS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "vmap": lambda torch, f, x: torch.func.vmap(f)(torch.stack([x, x + 1])),
    "jvp": lambda torch, f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "functionalize": lambda torch, f, x: torch.func.functionalize(f)(x),
    "make_fx": lambda torch, f, x: make_fx(f, "real")(x),
    "make_fx fake": lambda torch, f, x: make_fx(f, "fake")(x),
    "make_fx symbolic": lambda torch, f, x: make_fx(f, "symbolic")(x),
    "fake": in_fake_mode,
    "export": lambda torch, f, x: torch.export.export(as_module(torch, f), (x,)),
    "jit.trace": lambda torch, f, x: torch.jit.trace(as_module(torch, f), x, check_trace=False),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of its own transforms
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_a_layer_refuses_a_transform_and_keeps_its_state(torch: Any, name: str, operation: str, tmp_path: Path) -> None:
    x = torch.asarray(np.random.default_rng(0).standard_normal((4, 3)))
    layer = arraybn.BatchNorm1d(3, xp=torch, dtype="float64")
    layer(x)
    layer.backward(x)
    layer(x)
    before, remembered = {key: value.clone() for key, value in layer.state_dict().items()}, layer._remembered
    gradients = [layer.weight.grad, layer.bias.grad]
    with pytest.raises(TypeError, match=r"^d?[xy]: expected a tensor with values, .*call arraybn\.batch_norm$"):
        TRANSFORMS[name](torch, getattr(layer, operation), x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert layer._remembered is remembered
    assert layer.weight.grad is gradients[0]
    assert layer.bias.grad is gradients[1]
    layer.backward(x)
    assert np.isfinite(copy.deepcopy(layer).to(xp=np)(x.numpy())).all()
    arraybn.save(layer, tmp_path / "layer.npz")
    assert layer.load_state_dict(arraybn.load(tmp_path / "layer.npz"))


TRANSFORMS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "vmap": lambda torch, f, x: torch.func.vmap(f)(torch.stack([x, x + 1])),
    "jvp": lambda torch, f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "functionalize": lambda torch, f, x: torch.func.functionalize(f)(x),
    "make_fx": lambda torch, f, x: make_fx(f, "real")(x),
    "make_fx fake": lambda torch, f, x: make_fx(f, "fake")(x),
    "make_fx symbolic": lambda torch, f, x: make_fx(f, "symbolic")(x),
    "fake": in_fake_mode,
    "export": lambda torch, f, x: torch.export.export(as_module(torch, f), (x,)),
    "jit.trace": lambda torch, f, x: torch.jit.trace(as_module(torch, f), x, check_trace=False),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of its own transforms
def test_functions_work_inside_torch_vmap_and_jvp(torch: Any) -> None:
    x, dx = (torch.asarray(np.random.default_rng(k).standard_normal((5, 4, 3))) for k in (0, 1))

    def forward(x: Any) -> Any:
        return arraybn.batch_norm(x)[0]

    for found, part in zip(torch.func.vmap(forward)(x), x, strict=True):
        assert torch.allclose(found, forward(part), rtol=1e-12, atol=1e-12)
    y, tangent = torch.func.jvp(forward, (x[0],), (dx[0],))
    assert torch.equal(y, forward(x[0]))
    step = (forward(x[0] + 1e-6 * dx[0]) - forward(x[0] - 1e-6 * dx[0])) / 2e-6
    assert torch.allclose(tangent, step, rtol=1e-6, atol=1e-6)

"""arraybn.pytorch beside PyTorch's own judges of derivatives, its samples and its layers, alone and over ranks."""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.gpu import cupy_here
from support.libraries import need
from support.ranks import mpi_of, passes

import arraybn
from arraybn.testing import ThreadComm

# of torch.func.jvp itself, the first time
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
KINDS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
SHAPES = [(4, 3), (4, 3, 2), (2, 3, 2, 2)]
ROOT = Path(__file__).parents[1]
EPS = 1e-2
STRICT = {"rtol": 1e-5, "atol": 1e-7}  # of differences in float64; PyTorch's own would not see a thousandth


@pytest.fixture
def torch() -> Any:
    return need("torch")


@pytest.fixture
def ours(torch: Any) -> Any:
    return importlib.import_module("arraybn.pytorch")


def draw(torch: Any, shape: tuple[int, ...], seed: int = 0, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(**options)


def arguments(torch: Any, shape: tuple[int, ...]) -> list[Any]:
    """Return x, weight and bias that want gradients."""
    drawn = [draw(torch, shape), 1 + draw(torch, (3,), 1), draw(torch, (3,), 2)]
    return [t.requires_grad_() for t in drawn]


def functions(torch: Any, ours: Any, training: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return our function of x, weight and bias, and the plain formula, which PyTorch differentiates."""
    mean, var = draw(torch, (3,), 3), draw(torch, (3,), 4).square() + 0.5

    def function(x: Any, weight: Any, bias: Any) -> Any:
        running = (None, None) if training else (mean, var)
        return ours.batch_norm(x, *running, weight, bias, training=training, eps=EPS)

    def formula(x: Any, weight: Any, bias: Any) -> Any:
        axes, line = [0, *range(2, x.ndim)], (-1, *[1] * (x.ndim - 2))
        m = x.mean(axes) if training else mean
        v = x.var(axes, correction=0) if training else var
        m, v, weight, bias = (t.reshape(line) for t in (m, v, weight, bias))
        return weight * (x - m) / torch.sqrt(v + EPS) + bias

    return function, formula


# ---- Derivatives, judged by PyTorch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # PyTorch calls us once for each batch
def test_e5_to_e9_pass_pytorchs_own_checks(torch: Any, ours: Any, shape: tuple[int, ...], training: bool) -> None:
    function, _ = functions(torch, ours, training)
    given = arguments(torch, shape)
    options = {"check_batched_grad": True, **STRICT}
    assert torch.autograd.gradcheck(function, given, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert torch.autograd.gradgradcheck(function, given, check_fwd_over_rev=True, check_rev_over_rev=True, **options)


@pytest.mark.parametrize("rule", ["_Backward", "_DoubleBackward", "_Jvp"])
def test_pytorchs_checks_find_a_rule_that_is_wrong_by_a_thousandth(
    torch: Any, ours: Any, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = getattr(ours, rule).kernel

    def wrong(*given: Any) -> Any:
        found = kernel(*given)
        return 1.001 * found if rule == "_Jvp" else tuple(1.001 * t for t in found)

    monkeypatch.setattr(getattr(ours, rule), "kernel", staticmethod(wrong))
    function, _ = functions(torch, ours, True)
    given = arguments(torch, (4, 3, 2))
    judge = torch.autograd.gradgradcheck if rule == "_DoubleBackward" else torch.autograd.gradcheck
    options = {"check_forward_ad": True} if rule == "_Jvp" else {}
    assert not judge(function, given, raise_exception=False, **options, **STRICT)


def names(order: int) -> Iterator[tuple[str, ...]]:
    return itertools.product(["jacfwd", "jacrev"], repeat=order)


def nested(torch: Any, modes: tuple[str, ...], function: Callable[..., Any]) -> Callable[..., Any]:
    for mode in modes:
        function = getattr(torch.func, mode)(function)
    return function


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("modes", [*names(2), *names(3)], ids="-".join)
def test_second_and_third_derivatives_in_every_mode_are_those_of_the_formula(
    torch: Any, ours: Any, modes: tuple[str, ...], training: bool
) -> None:
    """PyTorch itself gives 0 for jvp of jvp of a Function whose jvp is made of its operations."""
    results = []
    x, weight, bias = (t.detach() for t in arguments(torch, (3, 3)))
    for function in functions(torch, ours, training):

        def loss(x: Any, function: Any = function) -> Any:
            return (function(x, weight * (1 + x[0]), bias * x[1]) ** 3).sum()

        results.append(nested(torch, modes, loss)(x))
    mine, formula = results
    scale = formula.abs().max()
    assert scale > 0.1
    assert (mine - formula).abs().max() <= 1e-11 * scale
    assert (1.001 * mine - formula).abs().max() > 1e-11 * scale  # the control


def test_derivatives_of_any_order_are_right_also_where_those_of_pytorch_are_wrong(torch: Any, ours: Any) -> None:
    x = torch.tensor([[0.0], [0.1], [0.3], [0.7]], dtype=torch.float64, requires_grad=True)

    def derivatives(batch_norm: Any) -> list[float]:
        found, result = [], batch_norm(x)[0, 0]
        for _ in range(5):
            result = torch.autograd.grad(result, x, create_graph=True)[0][0, 0]
            found.append(float(result.detach()))
        return found

    mine = derivatives(lambda x: ours.batch_norm(x, None, None, training=True))
    formula = derivatives(lambda x: (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5))
    assert mine == pytest.approx(formula, rel=1e-11)
    assert mine[2] == pytest.approx(10.707832777381645, rel=1e-12)  # by JAX: docs/how-to/jax.md


@pytest.mark.parametrize("wanted", [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)], ids=str)
def test_any_of_x_weight_and_bias_may_want_a_gradient(torch: Any, ours: Any, wanted: tuple[int, ...]) -> None:
    results = []
    for function in functions(torch, ours, True):
        given = [t.detach() for t in arguments(torch, (4, 3, 2))]
        leaves = [given[index].requires_grad_() for index in wanted]
        first = torch.autograd.grad((function(*given) ** 3).sum(), leaves, create_graph=True)
        assert all(t.grad is None for t in given)
        penalty = sum((t**2).sum() for t in first)
        results.append([*first, *torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)])
    for mine, formula in zip(*results, strict=True):
        torch.testing.assert_close(mine, formula, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore")  # of PyTorch's test suite
def test_pytorchs_own_samples(torch: Any, ours: Any) -> None:
    need("expecttest")  # which torch.testing._internal imports
    database = importlib.import_module("torch.testing._internal.common_methods_invocations").op_db
    info = next(info for info in database if info.name == "nn.functional.batch_norm")
    theirs, done = torch.nn.functional.batch_norm, 0
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tolerance = 64 * torch.finfo(dtype).eps
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            results = []
            if sample.input.ndim < 2:  # PyTorch takes an empty line
                with pytest.raises(ValueError, match="expected at least 2D input"):
                    ours.batch_norm(sample.input, *sample.args, **sample.kwargs)
                continue
            for function in (ours.batch_norm, theirs):
                given = [None if t is None else t.detach().clone() for t in (sample.input, *sample.args)]
                leaves = [t.requires_grad_() for t in (given[0], *given[3:]) if t is not None]
                y = function(*given, **sample.kwargs)
                gradients = torch.autograd.grad(y.float().pow(2).sum(), leaves)
                results.append([y, *gradients, *(t for t in given[1:3] if t is not None)])
            for mine, other in zip(*results, strict=True):
                scale = max(1.0, float(other.abs().max()))
                torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * scale)
            if dtype is torch.float64:
                given = [t.detach().requires_grad_() for t in (sample.input, *sample.args[2:]) if t is not None]
                running = [None if t is None else t.detach().clone() for t in sample.args[:2]]
                still = {**sample.kwargs, "momentum": 0.0}  # or every call would change the running statistics

                def function(x: Any, *affine: Any, running: Any = running, still: Any = still) -> Any:
                    return ours.batch_norm(x, *running, *affine, **still)

                assert torch.autograd.gradcheck(function, given, check_forward_ad=True, **STRICT)
                assert torch.autograd.gradgradcheck(function, given, **STRICT)
            done += 1
    assert done >= 32


def test_vmap_is_a_loop(torch: Any, ours: Any) -> None:
    x, weights = draw(torch, (6, 5, 3, 2), 7), draw(torch, (6, 3), 8)

    def function(x: Any, weight: Any) -> Any:
        return ours.batch_norm(x, None, None, weight, training=True)

    for dims in [(0, 0), (0, None), (None, 0), (1, None)]:
        given = x if dims[0] == 0 else x[0] if dims[0] is None else x.movedim(0, 1)
        weight = weights[0] if dims[1] is None else weights
        found = torch.func.vmap(function, in_dims=dims)(given, weight)
        for index in range(6):
            one = function(x[0] if dims[0] is None else x[index], weights[0] if dims[1] is None else weights[index])
            torch.testing.assert_close(found[index], one, rtol=1e-13, atol=1e-13)


# ---- The layers beside those of PyTorch ------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 1.0},
    {"affine": False},
    {"track_running_stats": False},
    {"bias": False},
    {"eps": 0.1, "dtype": "float64"},
]


def pair(torch: Any, ours: Any, ndim: int, **options: Any) -> tuple[Any, Any]:
    options = {name: getattr(torch, v) if name == "dtype" else v for name, v in options.items()}
    mine, other = (getattr(module, KINDS[ndim])(3, **options) for module in (ours, torch.nn))
    if mine.weight is not None:
        with torch.no_grad():
            mine.weight.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    other.load_state_dict(mine.state_dict())
    return mine, other


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 4), (4, 3, 4, 5), (2, 3, 2, 3, 4)])
def test_a_layer_is_that_of_torch_nn(torch: Any, ours: Any, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    mine, other = pair(torch, ours, len(shape), **options)
    assert isinstance(mine, type(other))
    assert repr(mine) == repr(other)
    calls = []
    mine.register_forward_hook(lambda *_: calls.append("forward"))
    mine.register_full_backward_hook(lambda *_: calls.append("backward"))
    dtype = options.get("dtype", "float32")
    for step in range(4):
        mine.train(step != 2), other.train(step != 2)
        results = []
        for layer in (mine, other):
            x = (draw(torch, shape, step, dtype=getattr(torch, dtype)) * 2 + 1).requires_grad_()
            y = layer(x)
            (y**3).sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.state_dict().values()])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            atol = 256 * torch.finfo(getattr(torch, dtype)).eps * float(b.abs().max())
            a, b = a.double(), b.double()
            torch.testing.assert_close(a, b, rtol=0, atol=max(atol, 1e-6))
            assert not b.any() or not torch.allclose(1.001 * a, b, rtol=0, atol=max(atol, 1e-6))  # the control
    assert calls == ["forward", "backward"] * 4
    other.load_state_dict(mine.state_dict())
    mine.load_state_dict(other.state_dict())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("last", [False, True])
def test_dtype_and_memory_format_stay(torch: Any, ours: Any, dtype: str, last: bool) -> None:
    layer, theirs = pair(torch, ours, 4)
    wanted = torch.channels_last if last else torch.contiguous_format
    x = draw(torch, (4, 3, 5, 6), dtype=getattr(torch, dtype)).to(memory_format=wanted).requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y.float().pow(3).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.float().pow(2).sum(), x)
    for t in (y, dx, ddx):
        assert t.dtype == x.dtype
        assert t.is_contiguous(memory_format=wanted)
    wide = theirs(x.detach().float())
    torch.testing.assert_close(y.float(), wide, rtol=0, atol=4 * max(torch.finfo(x.dtype).eps, 1e-6))


def test_kernels_work_on_the_memory_of_the_tensors(torch: Any, ours: Any) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for tensor in (torch.ones(4, 3, dtype=dtype), torch.ones(3, 4, dtype=dtype, requires_grad=True).T):
            array = ours._array(tensor)
            assert array.ctypes.data == tensor.data_ptr()
            assert array.dtype.name == str(dtype).removeprefix("torch.")
            back = ours._tensor(array)
            assert back.data_ptr() == tensor.data_ptr()
            assert (back.dtype, back.stride()) == (tensor.dtype, tensor.stride())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_cupy_works_on_the_same_memory_and_stream(
    torch: Any, ours: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of a CPU stand for those of a GPU; so this says which way is taken, and not that a GPU goes along."""
    x, wanted = draw(torch, (4, 3, 2), dtype=getattr(torch, dtype)), torch.float32
    layers = [ours.BatchNorm1d(3), ours.BatchNorm1d(3)]

    def work(layer: Any) -> list[Any]:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (dx,) = torch.autograd.grad((y.float() ** 3).sum(), leaf, create_graph=True)
        (dx.float() ** 2).sum().backward()
        return [t.detach().to(wanted) for t in (y, dx, leaf.grad, layer.weight.grad, layer.running_var)]

    expected = work(layers[0])
    with cupy_here("cuda") as cupy:
        if not hasattr(cupy, "_fake"):
            pytest.skip("a GPU is here")
        streams = []
        forward = ours.forward_in
        monkeypatch.setattr(
            ours,
            "forward_in",
            lambda *a, **k: (streams.append(cupy.cuda.get_current_stream().ptr), forward(*a, **k))[1],
        )
        monkeypatch.setattr(ours, "_is_on_gpu", lambda tensor: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0x77))
        found = work(layers[1])
        log = list(cupy._fake.log)
    assert streams == [0x77]
    assert any(entry.startswith("launch") for entry in log)
    assert [entry for entry in log if entry.startswith(("copy", "synchronize"))] == []
    tolerance = 16 * torch.finfo(getattr(torch, dtype)).eps
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_autocast_and_the_two_ways_without_gradients(torch: Any, ours: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), ours.BatchNorm2d(3))
    x = draw(torch, (4, 3, 6, 6), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        y.float().pow(2).sum().backward()
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert not model(x).requires_grad
    with torch.inference_mode():
        assert model(x).is_inference()
    assert int(model[1].num_batches_tracked) == 3


def test_an_empty_batch_counts_for_nothing(torch: Any, ours: Any) -> None:
    layer = ours.BatchNorm2d(3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    y = layer(x)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    dx.sum().backward()
    assert y.shape == dx.shape == x.grad.shape == x.shape
    assert not layer.weight.grad.any()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


WRONG: dict[str, tuple[Callable[[Any, Any, Any], Any], type[Exception], str]] = {
    "one value": (lambda _, layer, x: layer(x[:1]), ValueError, "Expected more than 1 value per channel when training"),
    "dimensions": (lambda _, layer, x: layer(x[None, None]), ValueError, "expected 2D or 3D input"),
    "channels": (
        lambda _, layer, x: layer(x[:, :2]),
        ValueError,
        r"running_mean: expected shape \(2,\), .* got \(3,\)",
    ),
    "integers": (lambda _, layer, x: layer(x.int()), TypeError, "x: expected float16, .* or float64; got int32"),
    "device": (lambda _, layer, x: layer(x.to("meta")), TypeError, "input: expected a tensor on a CPU or .* meta"),
    "a half": (lambda ours, _, x: ours.batch_norm(x, x[0], None), ValueError, "running_var: expected a tensor"),
    "none": (lambda ours, _, x: ours.batch_norm(x, None, None), ValueError, "running_mean: .* training is False"),
    "one axis": (lambda ours, _, x: ours.batch_norm(x[0], x[0], x[0]), ValueError, "expected at least 2D input"),
    "a trace": (
        lambda ours, layer, x: ours.torch.jit.trace(layer, x),
        RuntimeError,
        "input: expected a .* with values",
    ),
    "no module": (lambda ours, _, x: ours.convert_sync_batchnorm(3), TypeError, "module: expected a .*; got int"),
    "no comm": (lambda ours, layer, _: ours.convert_sync_batchnorm(layer, 3), TypeError, "^comm: "),
    "no time": (lambda ours, layer, _: ours.convert_sync_batchnorm(layer, timeout=0), ValueError, "^timeout: "),
    "no group": (lambda ours, *_: ours.SyncBatchNorm(3, process_group=3), TypeError, "^process_group: "),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.trace
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_told_and_changes_nothing(torch: Any, ours: Any, name: str) -> None:
    call, kind, text = WRONG[name]
    layer = ours.BatchNorm1d(3)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(kind, match=text):
        call(ours, layer, torch.ones(4, 3))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert type(layer) is ours.BatchNorm1d


def test_a_change_of_x_before_the_backward_is_found(torch: Any, ours: Any) -> None:
    leaf = draw(torch, (4, 3)).requires_grad_()
    x = leaf * 1
    y = ours.BatchNorm1d(3)(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_e7_the_backward_of_an_evaluation_has_the_statistics_of_its_forward(torch: Any, ours: Any) -> None:
    layer, x = ours.BatchNorm1d(3).eval(), draw(torch, (4, 3)).requires_grad_()
    y = layer(x)
    layer.running_var.fill_(100)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.full_like(dx, (1 + 1e-5) ** -0.5))


@pytest.mark.filterwarnings("ignore")  # the compiler's
def test_torch_compile_leaves_the_call_to_python(torch: Any, ours: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), ours.BatchNorm1d(3), torch.nn.ReLU()).double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    for step in range(3):
        x = draw(torch, (6, 3), step)
        compiled(x).sum().backward(), twin(x).sum().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert int(model[1].num_batches_tracked) == 3


def test_a_layer_of_torch_nn_becomes_ours_and_keeps_all(torch: Any, ours: Any) -> None:
    layer = torch.nn.BatchNorm2d(3)
    kept = layer.weight, layer.running_mean
    layer.__class__ = ours.BatchNorm2d
    x = draw(torch, (4, 3, 2, 2), dtype=torch.float32)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), torch.nn.BatchNorm2d(3)(x))
    assert layer.weight is kept[0]
    assert layer.running_mean is kept[1]


# ---- Over ranks ------------------------------------------------------------------------------------------------------

SIZES = [5, 0, 2]


def model_of(torch: Any, ours: Any, kind: str) -> Any:
    torch.manual_seed(0)
    norm = (torch.nn if kind == "theirs" else ours).BatchNorm1d(3)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), norm, torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()


def penalized(torch: Any, model: Any, x: Any) -> Any:
    """Return a loss with a gradient penalty, whose gradients need the double backward."""
    x = x.clone().requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    return (y**2).sum() + (dx**2).sum()


def test_ranks_with_parts_of_a_batch_are_one_process_with_all_of_it(torch: Any, ours: Any) -> None:
    whole = draw(torch, (sum(SIZES), 4), 5)
    parts = list(whole.split(SIZES))
    alone = model_of(torch, ours, "theirs")
    models = [model_of(torch, ours, "ours") for _ in SIZES]
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.01)

    def work(comm: Any) -> None:
        ours.convert_sync_batchnorm(models[comm.rank], comm)
        penalized(torch, models[comm.rank], parts[comm.rank]).backward()

    for _ in range(2):
        optimizer.zero_grad()
        penalized(torch, alone, whole).backward()
        optimizer.step()
        for model in models:
            model.zero_grad()
        ThreadComm.run(3, work)
        sums = [sum(p.grad for p in parameters) for parameters in zip(*(m.parameters() for m in models), strict=True)]
        for model in models:
            for parameter, total in zip(model.parameters(), sums, strict=True):
                parameter.grad = total.clone()
            torch.optim.SGD(model.parameters(), lr=0.01).step()
    for model in models:
        for (name, mine), other in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10, msg=name)
            first = models[0].state_dict()[name]
            assert torch.equal(mine, first)  # the same bits on all ranks


def test_a_third_derivative_over_ranks_is_refused(torch: Any, ours: Any) -> None:
    whole = draw(torch, (7, 3), 5)

    def work(comm: Any) -> None:
        layer = ours.SyncBatchNorm(3, process_group=comm, dtype=torch.float64)
        x = whole.split(SIZES)[comm.rank].clone().requires_grad_()
        (dx,) = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad((dx**2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="expected at most two derivatives of a batch norm over several ranks"):
            torch.autograd.grad((ddx**2).sum(), x)

    ThreadComm.run(3, work)


def test_an_error_on_one_rank_is_an_error_on_all_and_changes_nothing(torch: Any, ours: Any) -> None:
    said: dict[int, list[str]] = {0: [], 1: []}

    def work(comm: Any) -> None:
        model = ours.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), comm)
        good, bad = torch.ones(2, 3, 2, 2), torch.ones(2)
        for x in (bad if comm.rank else good, good[:1, :, :1, :1] if comm.rank else good[:0]):
            with pytest.raises((arraybn.SyncError, ValueError)) as caught:
                model(x)
            said[comm.rank].append(str(caught.value))
        assert int(model[0].num_batches_tracked) == 0
        model(good)
        model[0].eps = 0.5 + comm.rank
        with pytest.raises(arraybn.SyncError, match="layer '0'"):
            model(good)

    ThreadComm.run(2, work)
    assert said[0][0] == said[1][0] == "rank 1: expected at least 2D input (got 1D input)"
    assert all(texts[1].startswith("Expected more than 1 value per channel") for texts in said.values())


def test_conversion_keeps_the_layers_and_copies_share_the_communicator(torch: Any, ours: Any) -> None:
    shared = torch.nn.BatchNorm1d(3)
    model = torch.nn.Sequential(shared, ours.BatchNorm2d(3), torch.nn.Sequential(shared), torch.nn.InstanceNorm1d(3))
    comm, before = ThreadComm.run(1, lambda comm: comm)[0], list(model.modules())
    assert ours.SyncBatchNorm.convert_sync_batchnorm(model, comm) is model
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert [type(layer) for layer in model][:2] == [ours.SyncBatchNorm] * 2
    assert type(model[3]) is torch.nn.InstanceNorm1d
    assert copy.deepcopy(model)[0].process_group is comm
    assert pickle.loads(pickle.dumps(model))[0].process_group is None
    torch.save(model, io.BytesIO())
    assert ours.convert_sync_batchnorm(model[1], comm, timeout=7).timeout == 7


def test_two_processes_of_mpi_are_one_with_the_whole_batch(torch: Any) -> None:
    need("mpi4py")
    mpi = mpi_of(sys.executable)
    if mpi is None:
        pytest.skip("there is no mpirun")
    passes(mpi, 2, "torch_ranks.py", "step", "forward_mode", "wrong")


def test_every_public_name_has_its_sections_and_is_in_the_reference(ours: Any) -> None:
    page = (ROOT / "docs" / "reference" / "pytorch.md").read_text()
    for name in ours.__all__:
        text = getattr(ours, name).__doc__
        assert f"arraybn.pytorch.{name}\n" in page
        assert "Examples\n    --------" in text
        assert ("Raises\n    ------" in text) == name.islower()

"""Running statistics of whole data sets."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from support.libraries import need

import arraybn
from arraybn import network
from arraybn.testing import ThreadComm

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(50, 3)) * [1, 5, 0.1] + [0, 100, -3]).astype(np.float32)


def parts_of(x: Any, *cuts: int) -> list[Any]:
    return np.split(x, cuts)


def state_of(model: Any) -> dict[str, Any]:
    return {name: np.array(value) for name, value in model.state_dict().items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key], equal_nan=True) for key in a)


def two_norms() -> Any:
    rng = np.random.default_rng(1)
    first, second = network.Linear(3, 4, rng=rng), network.Linear(4, 2, rng=rng)
    return arraybn.Sequential(first, arraybn.BatchNorm1d(4), network.ReLU(), second, arraybn.BatchNorm1d(2))


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("cuts", [(), (1,), (20, 40, 49), (0, 7, 7)])
def test_one_layer_gets_the_statistics_of_all_batches(layer_by_layer: bool, cuts: tuple[int, ...]) -> None:
    layer = arraybn.BatchNorm1d(3)
    arraybn.recompute_running_stats(layer, parts_of(X, *cuts), layer_by_layer=layer_by_layer)
    wide = X.astype(np.float64)
    np.testing.assert_array_max_ulp(layer.running_mean, wide.mean(0).astype(np.float32), 1)
    np.testing.assert_array_max_ulp(layer.running_var, wide.var(0, ddof=1).astype(np.float32), 1)


def test_sorted_data_mislead_a_momentum_average_and_not_this() -> None:
    x = np.sort(np.random.default_rng(0).normal(size=(640, 1)).astype(np.float32), axis=0)
    average, exact = arraybn.BatchNorm1d(1), arraybn.BatchNorm1d(1)
    for part in parts_of(x, *range(32, 640, 32)):
        average(part)
    arraybn.recompute_running_stats(exact, parts_of(x, *range(32, 640, 32)))
    assert abs(average.running_var[0] / x.var(ddof=1) - 1) > 0.5
    assert abs(exact.running_var[0] / x.var(ddof=1) - 1) < 1e-6


def test_layer_by_layer_gives_the_statistics_of_what_each_layer_gets_in_evaluation() -> None:
    model = two_norms()
    model[0].weight.data = model[0].weight.data * np.float32(10)  # batches differ
    once = copy.deepcopy(model)
    parts = parts_of(X, 3, 30)
    arraybn.recompute_running_stats(model, parts, layer_by_layer=True)
    arraybn.recompute_running_stats(once, parts)
    model.eval()
    inputs = arraybn.Sequential(*list(model)[:4])(X).astype(np.float64)
    np.testing.assert_allclose(model[4].running_mean, inputs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model[4].running_var, inputs.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_array_equal(once[1].running_mean, model[1].running_mean)  # the first layer is the same
    assert not np.allclose(once[4].running_var, inputs.var(0, ddof=1), rtol=1e-3)  # the second is not


def test_one_pass_agrees_with_pytorch_where_batches_are_equal() -> None:
    torch = need("torch")
    ours, weights = two_norms(), two_norms().state_dict()
    theirs = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)
    )
    theirs.load_state_dict({key: torch.asarray(value) for key, value in weights.items()})
    torch.optim.swa_utils.update_bn([torch.asarray(X)], theirs)
    arraybn.recompute_running_stats(ours, [(X, "labels")])
    for layer in (1, 4):
        np.testing.assert_allclose(ours[layer].running_mean, theirs[layer].running_mean.numpy(), rtol=2e-5)
        np.testing.assert_allclose(ours[layer].running_var, theirs[layer].running_var.numpy(), rtol=2e-5)


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_all_else_stays(layer_by_layer: bool, training: bool) -> None:
    model = two_norms().train(training)
    model[1].eval()
    model(X)
    model.backward(np.ones((50, 2), np.float32))
    before, gradients = state_of(model), [parameter.grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    arraybn.recompute_running_stats(model, [X], layer_by_layer=layer_by_layer)
    changed = {key for key, value in state_of(model).items() if not np.array_equal(value, before[key])}
    assert changed == {f"{layer}.running_{name}" for layer in (1, 4) for name in ("mean", "var")}
    assert [module.training for module in model.modules()] == modes
    assert all(a is b for a, b in zip([p.grad for p in model.parameters()], gradients, strict=True))
    with pytest.raises(RuntimeError, match="expected a forward"):
        model.backward(np.ones((50, 2), np.float32))
    model.train()(X)  # and no layer hands its moments over any more
    assert model[1].num_batches_tracked == 1 + before["1.num_batches_tracked"]


class Two(arraybn.Module):
    """Calls its first norm twice, and its second never."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.unused = arraybn.BatchNorm1d(3), arraybn.BatchNorm1d(3)
        self.bare = arraybn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Any) -> Any:
        return self.bare(self.shared(x) + self.shared(10 * x))


def test_a_layer_that_is_called_twice_pools_both_and_one_that_is_not_called_stays() -> None:
    model = Two()
    before = model.unused.running_var
    arraybn.recompute_running_stats(model, [X])
    both = np.concatenate([X, 10 * X]).astype(np.float64)
    np.testing.assert_allclose(model.shared.running_mean, both.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.shared.running_var, both.var(0, ddof=1), rtol=1e-6)
    assert model.unused.running_var is before


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_a_call_that_raises_has_changed_nothing(layer_by_layer: bool) -> None:
    model = two_norms()
    before = state_of(model)
    for bad in ([X, X[:, :2]], [X, None], [X[0]], [(X, 1), ()]):
        with pytest.raises((TypeError, ValueError)):
            arraybn.recompute_running_stats(model, bad, layer_by_layer=layer_by_layer)
        assert same(state_of(model), before)
        assert all(module.training for module in model.modules())


def test_an_error_in_a_later_pass_gives_back_the_first_layers_statistics() -> None:
    passes = iter([X, X[:, :1]])

    class Batches:
        def __iter__(self) -> Any:
            return iter([next(passes)])

    model = two_norms()
    before = state_of(model)
    with pytest.raises(ValueError, match="shape"):
        arraybn.recompute_running_stats(model, Batches(), layer_by_layer=True)
    assert same(state_of(model), before)


@pytest.mark.parametrize(
    ("model", "batches", "options", "error", "text"),
    [
        (3, [X], {}, TypeError, "model: expected a Module; got int"),
        (network.ReLU(), [X], {}, ValueError, "model: expected a batch norm with running statistics; got none"),
        (arraybn.BatchNorm1d(3), X, {}, TypeError, r"batches: expected an iterable of arrays, such as \[x\]; got nump"),
        (arraybn.BatchNorm1d(3), 3, {}, TypeError, "batches: expected an iterable of arrays, .*; got int"),
        (arraybn.BatchNorm1d(3), [], {}, ValueError, "batches: expected values for a batch norm of the model; got no"),
        (arraybn.BatchNorm1d(3), [X[:0]], {}, ValueError, "batches: expected values for a batch norm of the model; "),
        (arraybn.BatchNorm1d(3), [X[:1]], {}, ValueError, "batches: expected more than 1 value per channel for layer"),
        (arraybn.BatchNorm1d(3), iter([X]), {"layer_by_layer": True}, ValueError, "batches: expected an iterable tha"),
        (arraybn.BatchNorm1d(3), [X], {"layer_by_layer": 1}, TypeError, "layer_by_layer: expected True or False"),
        (arraybn.BatchNorm1d(3), [X], {"comm": 3}, TypeError, "comm: expected"),
    ],
)
def test_a_wrong_call_says_what_was_expected(model: Any, batches: Any, options: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        arraybn.recompute_running_stats(model, batches, **options)


# ---- Over ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(17,), (0,), (1, 49), (10, 10, 30, 45)])
def test_ranks_with_uneven_batches_agree_with_one_process(cuts: tuple[int, ...]) -> None:
    alone = arraybn.BatchNorm1d(3)
    arraybn.recompute_running_stats(alone, [X])

    def work(comm: Any) -> dict[str, Any]:
        layer = arraybn.BatchNorm1d(3)
        part = parts_of(X, *cuts)[comm.rank]
        arraybn.recompute_running_stats(layer, [part[:5], part[5:]] if len(part) else [], comm=comm)
        return state_of(layer)

    results = ThreadComm.run(1 + len(cuts), work)
    assert all(same(result, results[0]) for result in results)
    for name in ("running_mean", "running_var"):
        np.testing.assert_array_max_ulp(results[0][name], getattr(alone, name), 1)


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_synchronized_layers_pool_over_their_own_group(layer_by_layer: bool) -> None:
    alone = two_norms()
    arraybn.recompute_running_stats(alone, [X[:20], X[20:]], layer_by_layer=layer_by_layer)

    def work(comm: Any) -> dict[str, Any]:
        model = arraybn.SyncBatchNorm.convert_sync_batchnorm(two_norms(), comm)
        part = X[:20] if comm.rank == 0 else X[20:]
        arraybn.recompute_running_stats(model, [part], layer_by_layer=layer_by_layer)
        return state_of(model)

    results = ThreadComm.run(2, work)
    assert same(*results)
    for key, value in state_of(alone).items():
        np.testing.assert_allclose(results[0][key], value, rtol=1e-6)


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("bad", [[X, X[:, :2]], 3, []])
def test_an_error_on_one_rank_is_an_error_on_all_and_changes_nothing(layer_by_layer: bool, bad: Any) -> None:
    def work(comm: Any) -> tuple[str, bool]:
        model, error = two_norms(), ""
        before = state_of(model)
        try:
            batches = bad if comm.rank == 1 else [X]
            arraybn.recompute_running_stats(model, batches, comm=comm, layer_by_layer=layer_by_layer)
        except arraybn.SyncError as raised:
            error = str(raised)
        return error, same(state_of(model), before)

    results = ThreadComm.run(3, work)
    if bad == [] and not layer_by_layer:  # a rank without batches is a part of the whole
        assert [error for error, _ in results] == [""] * 3
    else:
        assert all(error and unchanged for error, unchanged in results), results
        assert len({error for error, _ in results}) == 1


def test_too_few_values_in_all_are_the_same_error_on_every_rank() -> None:
    def work(comm: Any) -> str:
        with pytest.raises(ValueError, match="more than 1 value") as caught:
            arraybn.recompute_running_stats(arraybn.BatchNorm1d(3), [X[: comm.rank]], comm=comm)
        arraybn.recompute_running_stats(arraybn.BatchNorm1d(3), [X], comm=comm)  # and the ranks go on together
        return str(caught.value)

    assert len(set(ThreadComm.run(2, work))) == 1


def test_several_groups_need_a_communicator() -> None:
    def work(comm: Any) -> None:
        other = comm
        model = arraybn.Sequential(
            arraybn.SyncBatchNorm(3, process_group=other), arraybn.SyncBatchNorm(3, process_group=None)
        )
        with pytest.raises(ValueError, match="comm: expected a communicator, because the layers have several"):
            arraybn.recompute_running_stats(model, [X])

    ThreadComm.run(2, work)

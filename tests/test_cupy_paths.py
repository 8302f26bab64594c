"""The library end to end on the arrays of a fake CuPy: launches, copies, waits, and the device of each result.

Numbers are compared in tests/test_namespaces.py, which runs on the fake as well; on a real GPU in tests/test_gpu.py.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from support.commands import as_installed
from support.gpu import FAKE_CUPY, cupy_here
from support.kernels import FUSED_CUTS, serve_all_by, set_sizes
from support.libraries import need
from support.ranks import mpi_of, passes, variables

import arraybn
from arraybn import kernels
from arraybn._arrays.copies import as_numpy
from arraybn._arrays.namespaces import FLOATS
from arraybn.commands import info
from arraybn.kernels.cuda import cluster, fused, table
from arraybn.testing import ThreadComm

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(3)
X = (RNG.standard_normal((6, 3, 4, 5)) + 2).astype("f4")
DY = RNG.standard_normal(X.shape).astype("f4")


@pytest.fixture(params=["reference", "cuda"])
def cupy(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Yield the fake CuPy, whose arrays are served by these kernels."""
    with cupy_here(request.param) as found:
        if not hasattr(found, "_fake"):
            pytest.skip("a GPU is here, so that tests/test_gpu.py says more")
        found.kernels = request.param
        yield found


def logged(cupy: Any, call: Any, *arguments: Any) -> tuple[Any, list[str]]:
    """Return the result of a call, and the requests to the GPU."""
    cupy._fake.log.clear()
    result = call(*arguments)
    return result, list(cupy._fake.log)


def launches(log: list[str]) -> int:
    return sum(entry.startswith(("launch", "memset")) for entry in log)


def waits(log: list[str]) -> list[str]:
    return [entry for entry in log if entry.startswith(("synchronize", "copy"))]


def state(model: Any) -> dict[str, Any]:
    values = {name: as_numpy(name, value).tobytes() for name, value in model.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.get().tobytes() for name, p in model.named_parameters()}
    return {**values, "grads": grads, "remembered": id(model._remembered)}


# ---- How much a GPU is asked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "axis"), [("float32", 1), ("float16", -1)])
def test_a_layer_call_waits_for_nothing_and_launches_little(cupy: Any, dtype: str, axis: int) -> None:
    """A launch takes about 5 µs of the host's time."""
    x = cupy.asarray(np.ascontiguousarray(np.moveaxis(X, 1, axis)).astype(dtype))
    layer = arraybn.BatchNorm2d(3, xp=cupy, channel_axis=axis)
    for mode in (False, True):  # kernels are built, and room is made, once
        layer.train(mode)(x), layer.backward(x), layer.zero_grad()
    _, forward = logged(cupy, layer, x)
    _, backward = logged(cupy, layer.backward, x)
    _, evaluation = logged(cupy, layer.eval(), x)
    layer.zero_grad()
    _, back = logged(cupy, layer.backward, x)
    for log in (forward, backward, evaluation, back):
        assert waits(log) == []
    if cupy.kernels == "cuda":
        assert [launches(log) for log in (forward, backward, evaluation)] == [1, 1, 1]
        assert launches(back) <= 7
    with pytest.raises(AssertionError):
        assert waits(logged(cupy, lambda: float(x.sum()))[1]) == []  # the control


def python_calls(call: Any, *arguments: Any) -> int:
    """Return how many functions of arraybn and array-api-compat a call enters."""
    entered = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal entered
        file = frame.f_code.co_filename
        entered += event == "call" and ("array_api_compat" in file or file.startswith(str(ROOT / "arraybn")))

    sys.setprofile(count)
    try:
        call(*arguments)
    finally:
        sys.setprofile(None)
    return entered


# Launches; arrays made, views; questions for a device, a stream and the address of an array; functions entered.
ASKED = {
    "forward": (1, 3, 2, 1, 1, 8, 26),  # y, the statistics and the running statistics, whose two rows are views
    "backward": (1, 2, 0, 1, 1, 7, 26),  # dx, and the gradients
    "backward that adds": (1, 2, 0, 1, 1, 9, 30),
}


@pytest.mark.parametrize(("dtype", "axis"), [("float32", 1), ("float16", -1)])
def test_a_training_step_asks_for_one_launch_each_way_and_for_nothing_that_nobody_needs(
    cupy: Any, dtype: str, axis: int
) -> None:
    if cupy.kernels == "reference":
        pytest.skip("the reference makes an array in each operation")
    x = cupy.asarray(np.ascontiguousarray(np.moveaxis(X, 1, axis)).astype(dtype))
    layer = arraybn.BatchNorm2d(3, xp=cupy, channel_axis=axis)
    for _ in range(2):  # the first call makes the checks, the second chooses the kernels
        layer(x), layer.backward(x), layer.zero_grad()
    for name, call in {
        "forward": layer,
        "backward": layer.backward,
        "": layer,
        "backward that adds": layer.backward,
    }.items():
        cupy._fake.counted.clear()
        entered, log = logged(cupy, python_calls, call, x)
        counted = [cupy._fake.counted[kind] for kind in ("allocation", "view", "device", "stream", "pointer")]
        *expected, most = ASKED[name or "forward"]
        assert ([launches(log), *counted], entered <= most) == (expected, True), (name, entered)
    fresh = arraybn.BatchNorm2d(3, xp=cupy, channel_axis=axis)
    assert python_calls(fresh, x) > 5 * ASKED["forward"][-1]  # the control: a call that makes all checks


@pytest.mark.parametrize("axis", [1, -1])
def test_a_mask_costs_one_wait_for_its_number_and_one_launch_each_way_more_at_most(cupy: Any, axis: int) -> None:
    x, where = cupy.asarray(np.ascontiguousarray(np.moveaxis(X, 1, axis))), cupy.asarray(X[:, 0] > 1)
    forward = functools.partial(arraybn.batch_norm, where=where, channel_axis=axis)
    y, saved = forward(x)
    (_, saved), there = logged(cupy, forward, x)
    _, back = logged(cupy, arraybn.batch_norm_backward, y, saved)
    assert waits(there) == ["copy to the host", "synchronize stream"]
    assert waits(back) == []
    if cupy.kernels == "cuda":
        kernels = ["forward_masked_ring", "backward_masked_ring"]
        if axis == 1:
            kernels = ["moments_masked_planes", "affine_planes", "dots_nonzero_planes", "affine2_masked_planes"]
        names = [entry for entry in there + back if entry.startswith("launch ") and "float32" in entry]
        assert [re.sub("launch |_float32_.*", "", name) for name in names] == kernels


@contextlib.contextmanager
def all_checks() -> Iterator[None]:
    """Let every call of a layer make all checks, and go all further ways."""
    with mock.patch("arraybn.layers._Repeat.of", return_value=None):
        yield


STEPS: tuple[dict[str, Any], ...] = (
    {}, {"affine": False}, {"bias": False}, {"momentum": None}, {"dtype": "float64"}, {"eps": 0.5}
)  # fmt: skip


@pytest.mark.parametrize("given", STEPS)
def test_a_short_step_has_the_bits_of_one_with_all_checks_and_writes_into_no_old_array(
    cupy: Any, given: dict[str, Any]
) -> None:
    assert_short_steps(cupy, given)


def test_a_step_in_clusters_is_one_launch_each_way(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if cupy.kernels == "reference":
        pytest.skip("the reference has no clusters")
    serve_all_by(cluster, monkeypatch)
    set_sizes(monkeypatch, fused, {"WARPS": 2, "PIECES": 2, "CLUSTERS": (2,)})
    cupy._fake.log.clear()
    for given in STEPS:
        assert_short_steps(cupy, given)
    log = [re.sub(r"_\d_float.*", "", entry) for entry in cupy._fake.log if entry.startswith("launch")]
    assert log.count("launch forward_cluster") == log.count("launch backward_cluster") == 2 * 4 * len(STEPS)
    steps = sum(pair == ("launch forward_cluster", "launch backward_cluster") for pair in itertools.pairwise(log))
    assert steps == 3 * len(STEPS)  # the short ones; the first call of a layer makes the checks
    layer = arraybn.BatchNorm2d(3, xp=cupy).eval()
    cupy._fake.log.clear()
    y = layer(cupy.asarray(X))
    assert [entry for entry in cupy._fake.log if "affine" in entry] == ["launch affine_fixed_ring_planes_float32_4"]
    np.testing.assert_allclose(y.get(), X / np.sqrt(1 + 1e-5), rtol=1e-6)


def assert_short_steps(cupy: Any, given: dict[str, Any]) -> None:
    found: list[list[Any]] = []
    for context in (contextlib.nullcontext(), all_checks()):
        layer, results, kept = arraybn.BatchNorm2d(3, xp=cupy, **given), [], []
        with context:
            for step in range(4):
                results += [layer(cupy.asarray(X + step)), layer.backward(cupy.asarray(DY * (step + 1)))]
                kept += [layer.running_mean, layer.running_var, *(p.grad for p in layer.parameters())]
                results += [value.copy() for value in kept]
        found.append([*results, *layer.state_dict().values()])
    assert len(found[0]) == len(found[1]) > 30
    for short, checked in zip(*found, strict=True):
        assert short.dtype == checked.dtype
        np.testing.assert_array_equal(short.get(), checked.get())


def with_terms(parameter: Any, gradient: Any) -> None:
    """Give the parameter a gradient that has a term, as an exact backward does."""
    parameter.grad = None
    parameter.accumulate(gradient, [gradient])
    assert parameter.terms


CHANGES: dict[str, Any] = {  # between two steps
    "a weight of an optimizer": lambda layer, cupy: setattr(layer.weight, "data", layer.weight.data * 2),
    "a weight of another dtype": lambda layer, cupy: setattr(layer.weight, "data", cupy.full(3, 2.0)),
    "a bias with gaps": lambda layer, cupy: setattr(layer.bias, "data", cupy.asarray(np.arange(6, dtype="f4"))[::2]),
    "no bias": lambda layer, cupy: setattr(layer, "bias", None),
    "eps": lambda layer, cupy: setattr(layer, "eps", 0.3),
    "momentum": lambda layer, cupy: setattr(layer, "momentum", 0.7),
    "momentum 0": lambda layer, cupy: setattr(layer, "momentum", 0.0),
    "exact": lambda layer, cupy: setattr(layer, "exact", True),
    "a mask": lambda layer, cupy: layer(cupy.asarray(X), where=cupy.asarray(X[:, 0] > 2)),
    "evaluation": lambda layer, cupy: layer.eval(),
    "no tracking": lambda layer, cupy: setattr(layer, "track_running_stats", False),
    "other statistics": lambda layer, cupy: setattr(layer, "running_var", cupy.full(3, 2.0)),
    "loaded": lambda layer, cupy: layer.load_state_dict(arraybn.BatchNorm2d(3, eps=7).state_dict()),
    "a gradient": lambda layer, cupy: setattr(layer.weight, "grad", cupy.full(3, 2, dtype="f4")),
    "a wide gradient": lambda layer, cupy: setattr(layer.weight, "grad", cupy.full(3, 2.0)),
    "a gradient with terms": lambda layer, cupy: with_terms(layer.weight, cupy.full(3, 2, dtype="f4")),
    "a shared bias": lambda layer, cupy: setattr(layer, "bias", layer.weight),
    "another size": lambda layer, cupy: layer(cupy.asarray(X[:2])),
    "another dtype": lambda layer, cupy: layer(cupy.asarray(X.astype("f2"))),
    "float64": lambda layer, cupy: layer.to(dtype="float64"),
    "channels-last": lambda layer, cupy: layer(cupy.asarray(np.moveaxis(X, 1, -1).copy()).transpose(0, 3, 1, 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_between_two_steps_is_seen(cupy: Any, change: str) -> None:
    found: list[list[Any]] = []
    for context in (contextlib.nullcontext(), all_checks()):
        layer, results = arraybn.BatchNorm2d(3, xp=cupy), []
        with context:
            for step in range(4):
                results += [layer(cupy.asarray(X + step)), layer.backward(cupy.asarray(DY))]
                if step == 1:
                    CHANGES[change](layer, cupy)
        grads = [p.grad for p in layer.parameters()]
        assert all(p.terms is None for p in layer.parameters())
        found.append([*results, *layer.state_dict().values(), *grads])
    for short, checked in zip(*found, strict=True):
        assert (short.dtype, short.strides) == (checked.dtype, checked.strides)
        np.testing.assert_allclose(short.get(), checked.get(), rtol=1e-6, atol=1e-6)


def test_an_exact_layer_takes_no_short_step(cupy: Any) -> None:
    x = cupy.asarray((X * 1e3).astype("f4"))
    layer = arraybn.BatchNorm2d(3, xp=cupy, exact=True)
    for _ in range(3):
        y, dx = layer(x), layer.backward(cupy.asarray(DY))
        want, saved = arraybn.batch_norm(x, layer.weight.data, layer.bias.data, exact=True)
        np.testing.assert_array_equal(y.get(), want.get())
        np.testing.assert_array_equal(dx.get(), arraybn.batch_norm_backward(cupy.asarray(DY), saved)[0].get())
        assert layer._repeat is None


@pytest.mark.parametrize("shape", [(6, 3, 20), (50, 3)])
def test_exact_mode_stays_on_the_gpu_and_its_records_pool_on_the_host(cupy: Any, shape: tuple[int, ...]) -> None:
    x, dy = np.resize(X * 1e3, shape).astype("f4"), np.resize(DY, shape)
    want, twin = arraybn.batch_norm(x, exact=True)
    wanted = arraybn.batch_norm_backward(dy, twin)
    given = cupy.asarray(x), cupy.asarray(dy)
    for _ in range(2):  # the kernels are built once
        (y, saved), forward = logged(cupy, functools.partial(arraybn.batch_norm, exact=True), given[0])
        (dx, *_), backward = logged(cupy, arraybn.batch_norm_backward, given[1], saved)
    np.testing.assert_array_equal(y.get(), want)
    np.testing.assert_array_equal(dx.get(), wanted[0])
    if cupy.kernels == "cuda":
        assert [waits(log) for log in (forward, backward)] == [[], []]
        assert [launches(log) for log in (forward, backward)] == [4, 4]  # zeros, sums, their statistics, a map
    parts = [arraybn.moments(part, exact=True) for part in (given[0][:2], given[0][2:])]
    for pooled in (arraybn.pool(*parts), arraybn.pool(saved.moments)):
        np.testing.assert_array_equal(pooled.mean.get(), twin.moments.mean)
        np.testing.assert_array_equal(pooled.m2.get(), twin.moments.m2)

    def work(comm: Any) -> Any:
        part = slice(0, 2) if comm.rank == 0 else slice(2, None)
        layer = arraybn.SyncBatchNorm(3, exact=True, affine=False, xp=cupy, process_group=comm)
        return [layer(given[0][part]).get(), layer.backward(given[1][part]).get()]

    for found, whole in zip(zip(*ThreadComm.run(2, work), strict=True), (want, wanted[0]), strict=True):
        np.testing.assert_array_equal(np.concatenate(found), whole)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_a_short_forward_has_a_backward_with_all_checks(cupy: Any, dtype: str) -> None:
    layer, twin, dy = arraybn.BatchNorm2d(3, xp=cupy), arraybn.BatchNorm2d(3), DY.astype(dtype)
    for _ in range(3):
        layer(cupy.asarray(X)), twin(X)
        np.testing.assert_allclose(layer.backward(cupy.asarray(dy)).get(), twin.backward(dy), rtol=1e-4, atol=1e-5)
        assert layer(cupy.asarray(X)) is not None
        layer._forget()
    np.testing.assert_allclose(layer.weight.grad.get(), twin.weight.grad, rtol=1e-4)


def test_a_wrong_state_is_the_error_of_a_call_with_all_checks(cupy: Any) -> None:
    layer, x = arraybn.BatchNorm2d(3, xp=cupy), cupy.asarray(X)
    layer(x), layer(x), layer.backward(x), layer(x)
    for name, wrong, error in [
        ("running_mean", np.ones(3, "f4"), "running_mean: expected a cupy array"),
        ("running_var", cupy.ones(4, dtype="f4"), r"running_var: expected shape \(3,\)"),
        ("num_batches_tracked", -1, "num_batches_tracked: expected an integer ≥ 0"),
        ("eps", -1.0, "eps: expected a number ≥ 0"),
        ("momentum", float("nan"), "momentum: expected a finite number"),
        ("training", 1, "training: expected True or False"),
    ]:
        before, old = state(layer), getattr(layer, name)
        setattr(layer, name, wrong)
        with pytest.raises((TypeError, ValueError), match=error):
            layer(x)
        setattr(layer, name, old)
        assert state(layer) == before
    with pytest.raises(ValueError, match="dy: expected shape"):
        layer.backward(x[:3])
    layer.backward(x)
    with pytest.raises(RuntimeError, match="expected a forward before it"):
        layer.backward(x)


def test_threads_that_meet_in_a_short_step_are_an_error(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = arraybn.BatchNorm2d(3, xp=cupy), cupy.asarray(X)
    layer(x)
    if layer._repeat is None:
        pytest.skip("the reference has no short step")
    forward = layer._repeat.trainer.forward

    def meanwhile(*arguments: Any) -> Any:
        layer.num_batches_tracked = 7
        return forward(*arguments)

    layer._repeat.trainer.forward = meanwhile
    mean = layer.running_mean
    with pytest.raises(RuntimeError, match="expected one thread at a time"):
        layer(x)
    assert layer.running_mean is mean


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"dtype": "float64"}]
)
def test_the_other_layers_wait_for_nothing_either_and_agree_with_numpy(cupy: Any, options: dict[str, Any]) -> None:
    layer, twin = arraybn.BatchNorm2d(3, xp=cupy, **options), arraybn.BatchNorm2d(3, **options)
    for step in range(4):
        if step == 3:
            layer.eval(), twin.eval()
        x, dy = cupy.asarray(X + step), cupy.asarray(DY)
        y, log = logged(cupy, layer, x)
        dx, back = logged(cupy, layer.backward, dy)
        assert waits(log) == waits(back) == []
        np.testing.assert_allclose(y.get(), twin(X + step), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dx.get(), twin.backward(DY), rtol=1e-4, atol=1e-5)
    for name, value in twin.state_dict().items():
        np.testing.assert_allclose(layer.state_dict()[name].get(), value, rtol=1e-6)
    assert repr(layer) == repr(twin)[:-1] + ", xp=cupy)"


def test_the_moments_that_are_shown_are_a_copy(cupy: Any) -> None:
    y, saved = arraybn.batch_norm(cupy.asarray(X))
    assert saved.moments is saved.moments
    before = [saved.moments.mean.get(), arraybn.batch_norm_backward(y, saved)[0].get()]
    saved.moments.mean[...] = 100
    np.testing.assert_array_equal(arraybn.batch_norm_backward(y, saved)[0].get(), before[1])
    assert saved.moments.mean.get().tolist() == [100] * 3 != before[0].tolist()


def test_the_script_for_compute_sanitizer_runs_every_kernel(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if cupy.kernels == "reference":
        pytest.skip("the reference has no kernels")
    import every_kernel

    assert every_kernel.run(cupy, tuple(FLOATS)) == []
    monkeypatch.delitem(FUSED_CUTS, "sixteen blocks")  # the control
    names = [f"{direction}_cluster_16_float32_4" for direction in ("backward", "forward")]
    assert every_kernel.run(cupy, ("float32",)) == names
    monkeypatch.setattr(every_kernel, "runs", lambda gpu, kernel: kernel.blocks < 16)
    assert every_kernel.run(cupy, ("float32",)) == []


def test_tuning_finds_the_fastest_constants_and_takes_no_wrong_one(
    cupy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if cupy.kernels == "reference":
        pytest.skip("the reference has no constants")
    from arraybn.bench import tune

    monkeypatch.delitem(tune.CHOICES, "SIDES")  # another width, for which g++ has compiled no kernel
    present = {name: getattr(module, name) for name, (module, _) in tune.CHOICES.items()}
    backward = fused.backward

    def wrong_with_few_tasks(*arguments: Any) -> Any:
        if table.PIECES == 2:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE")
        dx, *rest = backward(*arguments)
        dx[0] *= 1.0 + (present["TASK"] > table.TASK)
        return dx, *rest

    def timed(call: Any, calls: int, hold: float) -> tuple[float, bool]:
        call()
        return (0.5 if table.CHUNK == 2**14 or present["TASK"] > table.TASK else 1.0), False

    monkeypatch.setattr(fused, "backward", wrong_with_few_tasks)
    affine = fused.affine
    monkeypatch.setattr(fused, "affine", lambda *given: affine(*given) * (2 if table.RING_MAPS else 1))
    device = SimpleNamespace(xp=cupy, array=cupy.asarray, together=0, timed=timed)
    best = tune.tune(device, sys.stdout, ((2, 8, 3, 4),), 1)
    assert best == {**present, "CHUNK": 2**14}
    assert {name: getattr(module, name) for name, (module, _) in tune.CHOICES.items()} == present
    printed = capsys.readouterr().out
    assert re.search(r"\nCHUNK +16384 +forward 0.500, backward 0.500, evaluation 0.500", printed)
    assert len(re.findall(r"    CHUNK +16384 +forward 0.500", printed)) == 4  # two layouts, two dtypes
    assert "    CHUNK                32768" not in printed
    assert re.search(r"TASK +32768 +wrong", printed)
    assert re.search(r"RING_MAPS +\(2, 4, 8\) +wrong", printed)
    assert re.search(r"PIECES +2 +wrong", printed)
    assert re.search(r"TASK +49152 +best", printed)


# ---- Which kernels ---------------------------------------------------------------------------------------------------


def test_kernels_are_chosen_by_stated_conditions(cupy: Any) -> None:
    from ml_dtypes import bfloat16

    for dtype in ("float16", bfloat16, "float32", "float64"):
        x = cupy.empty((2, 3), dtype=dtype)
        assert kernels.select(x).name == cupy.kernels
    assert kernels.select(cupy.empty(3, dtype="int32")).name == "reference"
    assert kernels.select(x, "reference").name == "reference"
    assert list(kernels.MODULES) == ["reference", "cpu", "cuda_split", "cuda_fused", "cuda", "cuda_cluster"]
    with pytest.raises(TypeError, match=r'kernels: expected a NumPy array for "cpu"; got a cupy array.*cupy.asnumpy'):
        arraybn.batch_norm(x, kernels="cpu")
    for name in ("cuda", "cuda_fused", "cuda_split", "cuda_cluster"):
        with pytest.raises(TypeError, match=rf'expected a CuPy array for "{name}"; got a numpy array.*cupy.asarray'):
            arraybn.moments(X, kernels=name)
    if cupy.kernels == "reference":  # as on GPUs that do not take the kernels
        with pytest.raises(
            TypeError, match=r'a GPU of NVIDIA of compute capability 7.0 or more for "cuda"; got another'
        ):
            arraybn.moments(x, kernels="cuda")


@pytest.mark.parametrize(("is_hip", "capability", "name"), [(True, "90", "reference"), (False, "61", "reference"),
    (False, "70", "cuda"), (False, "100", "cuda")])  # fmt: skip
def test_amds_gpus_and_those_before_volta_get_the_reference(
    cupy: Any, monkeypatch: pytest.MonkeyPatch, is_hip: bool, capability: str, name: str
) -> None:
    found = importlib.util.find_spec("arraybn.kernels")
    again = importlib.util.module_from_spec(found)  # its `_is_recent` is not replaced by a test
    found.loader.exec_module(again)
    monkeypatch.setattr(cupy.cuda.runtime, "is_hip", is_hip)
    monkeypatch.setattr(cupy.cuda.Device, "compute_capability", capability)
    assert again.select(cupy.asarray(X)).name == name


# ---- Two homes -------------------------------------------------------------------------------------------------------


def test_numpy_and_cupy_together_are_an_error_that_says_how_to_move_one(cupy: Any) -> None:
    here, there = cupy.asarray(X), X
    vector, host = cupy.ones(3, dtype="f4"), np.ones(3, "f4")
    saved, saved_host = arraybn.batch_norm(here)[1], arraybn.batch_norm(there)[1]
    fixed = {"mean": vector, "var": host}
    calls = {
        "weight": lambda: arraybn.batch_norm(here, host),
        "bias": lambda: arraybn.batch_norm(there, None, vector),
        "var": lambda: arraybn.batch_norm(here, **fixed),
        "mean": lambda: arraybn.batch_norm(there, **fixed),
        "out": lambda: arraybn.batch_norm(here, out=np.empty_like(X)),
        "dy": lambda: arraybn.batch_norm_backward(DY, saved),
        " dy": lambda: arraybn.batch_norm_backward(cupy.asarray(DY), saved_host),
        " out": lambda: arraybn.batch_norm_backward(cupy.asarray(DY), saved, out=np.empty_like(X)),
        "x": lambda: arraybn.BatchNorm2d(3)(here),
        " x": lambda: arraybn.BatchNorm2d(3, xp=cupy)(there),
        "running_mean": lambda: arraybn.update_running_stats(host, vector, saved.moments, 0.1),
        r"moments\[1\].mean": lambda: arraybn.pool(saved.moments, saved_host.moments),
        "grad": lambda: setattr(arraybn.Parameter(vector), "grad", host),
        "labels": lambda: arraybn.network.cross_entropy(vector[None, :], np.zeros(1, int)),
    }
    for name, call in calls.items():
        move = r"layer.to\(xp=(numpy|cupy)\), an array with cupy.asarray\(…\) or cupy.asnumpy\(…\)"
        with pytest.raises(TypeError, match=rf"^{name.strip()}: expected a (numpy|cupy) array as .*{move}"):
            call()


def test_a_layer_that_was_refused_is_as_it_was(cupy: Any) -> None:
    layer = arraybn.BatchNorm2d(3, xp=cupy)
    layer(cupy.asarray(X))
    first = layer._remembered
    with pytest.raises(TypeError, match="x: expected a cupy array as this layer is"):
        layer(X)
    with pytest.raises(TypeError, match="dy: expected a cupy array as x is"):
        layer.backward(DY)
    assert layer._remembered is first
    layer.running_var = np.ones(3, "f4")
    with pytest.raises(TypeError, match="running_var: expected a cupy array as x is"):
        layer(cupy.asarray(X))
    layer.running_var = cupy.ones(3, dtype="f4")
    layer.to(xp=np)(X)
    layer.to(xp=cupy)(cupy.asarray(X))
    assert layer.num_batches_tracked == 3
    assert layer._remembered is not first


def unless(name: str, fails: Any, launch: Any, kernel: Any, *rest: Any) -> Any:
    """Launch every kernel but the one of that name."""
    return fails() if kernel.name.startswith(name) else launch(kernel, *rest)


def test_a_kernel_that_fails_leaves_the_layer_as_it_was(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = arraybn.BatchNorm2d(3, xp=cupy), cupy.asarray(X)
    layer(x)
    before = state(layer)

    def fails(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("the CUDA kernel is gone")

    kernel_names = ("moments", "running") if cupy.kernels == "reference" else ("forward",)
    for name in kernel_names:
        with monkeypatch.context() as patch:
            if cupy.kernels == "reference":
                patch.setattr("arraybn.reference." + {"moments": name, "running": "update_running"}[name], fails)
                patch.setattr(kernels, "backend", functools.cache(kernels.backend.__wrapped__))  # a record made anew
            else:
                from arraybn.kernels.cuda import launch

                launcher = launch.launcher()
                patch.setattr(launcher, "launch", functools.partial(unless, name, fails, launcher.launch))
            with pytest.raises(RuntimeError, match="CUDA kernel"):
                layer(x)
        assert state(layer) == before
    layer(x)
    assert state(layer) != before


def test_everything_stays_on_the_device_of_x_whatever_the_current_one_is(cupy: Any) -> None:
    second = cupy.cuda.Device(1)
    layer = arraybn.BatchNorm2d(3, xp=cupy, device=second)
    with second:
        x, other = cupy.asarray(X), cupy.ones(3)
    y, dx = layer(x), layer.backward(x)
    layer.reset_parameters()
    y, saved = arraybn.batch_norm(x, other)
    dx, dweight, _ = arraybn.batch_norm_backward(y, saved, out=y)
    clone = copy.deepcopy(layer)
    made = [y, dx, dweight, saved.moments.mean, saved.moments.m2, saved.moments.var(1), arraybn.moments(x).var(1000)]
    made += [*layer.state_dict().values(), *clone.state_dict().values(), layer.weight.grad, layer.running_var]
    made += arraybn.update_running_stats(other, other, saved.moments, 0.5)
    made += [arraybn.pool(saved.moments, saved.moments).m2]
    assert {array.device.id for array in made} == {1}
    assert cupy.cuda.Device().id == 0
    moved = layer.to(device=cupy.cuda.Device(0))
    assert {value.device.id for value in moved.state_dict().values()} == {0}
    assert moved(cupy.asarray(X)).device.id == 0


def test_arrays_of_two_devices_are_an_error_that_names_both(cupy: Any) -> None:
    with cupy.cuda.Device(1):
        there = cupy.asarray(X)
    here = cupy.ones(3)
    with pytest.raises(ValueError, match=r"weight: expected on <CUDA Device 1> as x is; got one on <CUDA Device 0>"):
        arraybn.batch_norm(there, here)
    with pytest.raises(
        ValueError, match=r"x: .*CUDA Device 0> as this layer is; got one on <CUDA Device 1>.*layer.to\("
    ):
        arraybn.BatchNorm2d(3, xp=cupy)(there)
    with pytest.raises(
        ValueError, match=r"out: .*<CUDA Device 1>.*<CUDA Device 0>.*with x.device: cupy.asarray\(out\)"
    ):
        arraybn.batch_norm(there, out=cupy.empty_like(there))


@pytest.mark.parametrize("device", [7, "cuda:0", 1])
def test_a_device_that_is_none_is_refused(cupy: Any, device: Any) -> None:
    device = cupy.cuda.Device(device) if device == 7 else device
    with pytest.raises(ValueError, match=r"device: expected one that cupy has here, a cupy.cuda.Device; got"):
        arraybn.BatchNorm1d(3, xp=cupy, device=device)


# ---- In and out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_state_goes_to_files_and_comes_back(cupy: Any, tmp_path: Path, suffix: str) -> None:
    if suffix == "safetensors":
        need("safetensors")
    layer, path = arraybn.BatchNorm2d(3, xp=cupy), tmp_path / f"state.{suffix}"
    layer(cupy.asarray(X))
    arraybn.save(layer, path)
    loaded = arraybn.load(path)
    assert {type(value) for value in loaded.values()} == {np.ndarray}
    host, twin = arraybn.BatchNorm2d(3), arraybn.BatchNorm2d(3, xp=cupy, device=cupy.cuda.Device(1))
    host.load_state_dict(loaded), twin.load_state_dict(loaded)
    pickled = pickle.loads(pickle.dumps(layer))
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(host.state_dict()[name], value.get())
        for other in (twin, pickled, arraybn.BatchNorm2d(3).to(xp=cupy)):
            assert type(other.state_dict()[name]) is cupy.ndarray
        np.testing.assert_array_equal(twin.state_dict()[name].get(), value.get())
        np.testing.assert_array_equal(pickled.state_dict()[name].get(), value.get())
    assert twin.running_mean.device.id == 1
    layer.load_state_dict(host.state_dict())
    assert type(layer.running_mean) is cupy.ndarray
    layer.num_batches_tracked = cupy.asarray(5)
    assert layer.num_batches_tracked == 5


def test_out_is_written_and_checked(cupy: Any) -> None:
    x = cupy.asarray(X)
    want = arraybn.batch_norm(x)[0].get()
    out = cupy.empty_like(x)
    y, saved = arraybn.batch_norm(x, out=out)
    assert y is out
    np.testing.assert_array_equal(y.get(), want)
    dy = cupy.asarray(DY)
    dx, _, _ = arraybn.batch_norm_backward(dy, saved, out=dy)
    assert dx is dy
    room = cupy.empty((7, 3, 4, 5), dtype="f4")
    room[:6] = x
    with pytest.raises(ValueError, match="out: expected memory disjoint from x, or x itself; got a partial overlap"):
        arraybn.batch_norm(room[:6], out=room[1:])
    arraybn.batch_norm(room[:3], out=room[3:6])
    lines = cupy.asarray(np.ascontiguousarray(np.moveaxis(X, 1, -1))).transpose(0, 3, 1, 2)
    y, _ = arraybn.batch_norm(lines, out=cupy.empty(X.shape, dtype="f4"))
    np.testing.assert_allclose(y.get(), want, rtol=1e-5, atol=1e-6)
    assert arraybn.batch_norm(lines)[0].strides == lines.strides
    y, _ = arraybn.batch_norm(x, out=x)
    assert y is x
    np.testing.assert_allclose(x.get(), want, rtol=1e-5, atol=1e-6)


# ---- Ranks -----------------------------------------------------------------------------------------------------------


def parts(rank: int, size: int) -> slice:
    """Return uneven parts; of three parts one is empty."""
    return {2: (slice(0, 4), slice(4, 6)), 3: (slice(0, 5), slice(0, 0), slice(5, 6))}[size][rank]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_with_the_whole_batch_and_wait_once_for_the_gpu(cupy: Any, size: int) -> None:
    whole = arraybn.BatchNorm2d(3)
    y, dx = whole(X), whole.backward(DY)

    def work(comm: Any) -> Any:
        with cupy.cuda.Device(comm.rank % 2):
            layer = arraybn.SyncBatchNorm(3, process_group=comm, xp=cupy)
            x, dy = (cupy.asarray(array[parts(comm.rank, size)]) for array in (X, DY))
            for _ in range(3):  # pinned memory is used again
                y, dx = layer(x), layer.backward(dy)
            assert y.device.id == dx.device.id == layer.weight.grad.device.id == comm.rank % 2
            return y.get(), dx.get(), layer.running_var.get(), layer.bias.grad.get()

    cupy._fake.log.clear()
    ys, dxs, variances, dbiases = zip(*ThreadComm.run(size, work), strict=True)
    calls, gets = 2 * 3 * size, 4 * size
    assert sum(entry == "synchronize stream" for entry in cupy._fake.log) == calls + gets
    np.testing.assert_allclose(np.concatenate(ys), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(dxs), dx, rtol=1e-4, atol=1e-5)
    assert len({variance.tobytes() for variance in variances}) == 1
    np.testing.assert_allclose(sum(dbiases), 3 * whole.bias.grad, rtol=1e-5)
    for _ in range(2):
        whole(X)
    np.testing.assert_allclose(variances[0], whole.running_var, rtol=1e-6)


@pytest.mark.parametrize("channels", [3, 300])
def test_a_synchronized_call_copies_once_each_way_and_waits_once(cupy: Any, channels: int) -> None:
    x = RNG.standard_normal((4, channels)).astype("f4")

    def entries(steps: int) -> Counter[str]:
        def work(comm: Any) -> None:
            layer, part = arraybn.SyncBatchNorm(channels, process_group=comm, xp=cupy), cupy.asarray(x)
            for _ in range(steps):
                layer(part), layer.backward(part)

        cupy._fake.log.clear()
        ThreadComm.run(2, work)
        return Counter(cupy._fake.log)

    one, three = entries(1), entries(3)
    calls = 2 * 2 * 2  # of two ranks: two more steps, forward and backward
    for entry in ("copy to the host", "copy to the device", "synchronize stream"):
        assert three[entry] - one[entry] == calls, entry


def test_layers_of_several_sizes_share_the_pinned_memory(cupy: Any) -> None:
    x = (RNG.standard_normal((4, 700)) + 1).astype("f4")
    sizes = (16, 64, 700, 3)  # 700 channels: more than a frame, and more memory than there was

    def work(comm: Any) -> Any:
        layers = [arraybn.SyncBatchNorm(size, process_group=comm, xp=cupy) for size in sizes]
        part = cupy.asarray(x[2 * comm.rank : 2 * comm.rank + 2])
        for _ in range(2):
            ys = [layer(part[:, :size]) for layer, size in zip(layers, sizes, strict=True)]
            for layer, y in zip(reversed(layers), reversed(ys), strict=True):
                layer.backward(y)
        return [y.get() for y in ys]

    for size, *parts in zip(sizes, *ThreadComm.run(2, work), strict=True):
        np.testing.assert_allclose(np.concatenate(parts), arraybn.BatchNorm1d(size)(x[:, :size]), rtol=1e-5, atol=1e-6)


def test_what_runs_short_of_memory_is_found_before_the_exchange(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if cupy.kernels == "reference":
        pytest.skip("the reference makes its results itself, after the exchange")
    empty, full = cupy.empty, set()

    def scarce(shape: Any, *rest: Any, **options: Any) -> Any:
        if threading.get_ident() in full and np.size(shape) == 3:  # the room for a result
            raise MemoryError("the GPU is full")
        return empty(shape, *rest, **options)

    def work(comm: Any) -> None:
        layer, x = arraybn.SyncBatchNorm(3, process_group=comm, xp=cupy), cupy.asarray(X)
        layer(x)
        before = state(layer)
        full.update([threading.get_ident()] * (comm.rank == 1))
        for call in (layer, layer.backward):
            with pytest.raises(arraybn.SyncError, match=r"^rank 1: MemoryError: the GPU is full"):
                call(x)
            assert state(layer) == before
        full.clear() if comm.rank == 1 else None
        layer.backward(x), layer(x)
        assert layer.num_batches_tracked == 2

    monkeypatch.setattr(cupy, "empty", scarce)
    ThreadComm.run(2, work)


def test_parameters_and_gradients_travel_through_the_host(cupy: Any) -> None:
    def work(comm: Any) -> Any:
        with cupy.cuda.Device(comm.rank % 2):
            layer = arraybn.BatchNorm2d(3, xp=cupy)
            layer.weight.data = cupy.full(3, comm.rank + 1, dtype="f4")
            arraybn.broadcast_state(layer, comm)
            layer.bias.grad = cupy.full(3, comm.rank * 4.0, dtype="f4")
            arraybn.average_gradients(layer, comm, weight=1 + 2 * comm.rank)
            assert layer.weight.data.device.id == layer.bias.grad.device.id == comm.rank % 2
            return layer.weight.data.tolist(), layer.bias.grad.tolist(), layer.weight.grad

    assert ThreadComm.run(2, work) == [([1.0] * 3, [3.0] * 3, None)] * 2


def test_exact_gradients_of_ranks_have_the_bits_of_the_host(cupy: Any) -> None:
    x, dy = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)

    def work(comm: Any, xp: Any = np) -> Any:
        with cupy.cuda.Device(comm.rank % 2):
            layer = arraybn.SyncBatchNorm(3, exact=True, comm=comm, xp=xp)
            part = slice(0, 2) if comm.rank == 0 else slice(2, None)
            for _ in range(2):
                layer(xp.asarray(x[part]))
                layer.backward(xp.asarray(dy[part]))
            arraybn.average_gradients(layer, comm, weight=None, exact=True)
            assert xp is np or layer.bias.grad.device.id == comm.rank % 2
            return layer.weight.grad.tolist(), layer.bias.grad.tolist()

    assert ThreadComm.run(2, lambda comm: work(comm, cupy)) == ThreadComm.run(2, work)


@pytest.mark.parametrize("served", ["reference", "cuda"])
def test_everything_holds_under_mpirun_on_three_ranks_that_share_two_gpus(served: str) -> None:
    need("mpi4py")
    if served == "cuda" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no g++")
    mpi = mpi_of(sys.executable)
    if mpi is None:
        pytest.skip("there is no mpirun")
    path = os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "cuda", FAKE_CUPY]))
    passes(mpi, 3, "cupy_ranks.py", served, limit=120, PYTHONPATH=path)


# ---- Commands --------------------------------------------------------------------------------------------------------


def on_fake(*command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command of arraybn in a process that finds the fake CuPy; the reference serves the arrays."""
    path = os.pathsep.join([str(ROOT), str(FAKE_CUPY)])
    env = {**os.environ, "PYTHONPATH": path, "ARRAYBN_FAKE_HIP": "1", **variables}
    run = [sys.executable, "-m", "arraybn", *command]
    return subprocess.run(run, capture_output=True, text=True, timeout=120, check=False, env=env, cwd=folder)


def test_the_demo_trains_on_a_gpu_and_says_which(tmp_path: Path) -> None:
    for name in ("sklearn", "tqdm", "threadpoolctl"):
        need(name)
    run = on_fake("demo", "--device", "cuda", "--epochs", "1", "--no-plot", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "epochs: 1 on Fake GPU 0, CUDA device 0" in run.stdout
    assert "gives the same bits" in run.stdout
    host = subprocess.run(
        [sys.executable, "-m", "arraybn", "demo", "--epochs", "1", "--no-plot"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=tmp_path,
    )
    rows = [
        [line.split()[:5] for line in text.splitlines() if line.startswith("with")]
        for text in (run.stdout, host.stdout)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 8


def test_the_demo_trains_on_ranks_that_each_have_a_gpu(tmp_path: Path) -> None:
    for name in ("sklearn", "tqdm", "threadpoolctl", "mpi4py"):
        need(name)
    mpi = mpi_of(sys.executable)
    if mpi is None:
        pytest.skip("there is no mpirun")
    env = variables(PYTHONPATH=os.pathsep.join([str(ROOT), str(FAKE_CUPY)]), ARRAYBN_FAKE_HIP="1")
    ranks = [mpi.mpirun, "-n", "2", mpi.python, "-m", "mpi4py", "-m", "arraybn", "demo", "--data-parallel", "8"]
    command = [*ranks, "--device", "cuda", "--epochs", "1", "--no-plot"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False, env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "on Fake GPU 0, CUDA device 0" in run.stdout
    assert "synchronized, the same bits on all ranks" in run.stdout


def test_the_demo_refuses_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    none = on_fake("demo", "--device", "cuda", folder=tmp_path, ARRAYBN_FAKE_GPUS="0")
    assert none.returncode == 1
    assert none.stderr.startswith("demo: --device cuda: expected a GPU; CuPy finds none: cudaErrorInsufficientDriver")
    if importlib.util.find_spec("cupy") is None:
        absent = on_fake("demo", "--device", "cuda", folder=tmp_path, PYTHONPATH=str(ROOT))
        assert absent.returncode == 1
        assert re_line(
            as_installed(absent.stderr), "demo: --device cuda: expected CuPy", 'pip install "arraybn[cuda12]"'
        )
    assert not (tmp_path / "arraybn-demo").exists()


def re_line(text: str, *pieces: str) -> bool:
    return any(all(piece in line for piece in pieces) for line in text.splitlines())


def probed(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Any:
    """Return the answer to info's question to CuPy, and the rows that info makes of the answer."""
    with monkeypatch.context() as patch:
        patch.setattr(info, "TIME_LIMIT", 60)
        for name, value in {"PYTHONPATH": str(FAKE_CUPY), **variables}.items():
            patch.setenv(name, value)
        answer = info._ask([sys.executable, "-c", info._CUPY_PROBE])
    return [row.text for row in info._gpus({"cupy": answer})], info._cuda_kernels(answer).text


def test_info_tells_of_gpus_and_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, kernels = probed(monkeypatch, CUPY_CACHE_DIR=str(tmp_path))
    assert kernels == f"CuPy arrays; compiled when first used, kept in {tmp_path}"
    assert gpus == [
        "Fake GPU 0, 16384 MiB, compute capability 9.0",
        "Fake GPU 1, 16384 MiB, compute capability 9.0",
        "driver 13.1, runtime 13.0",
    ]
    for name, content in {"a": b"..moments_planes_float32_4..", "b": b"cupy_add", "c": b"dots_lines_"}.items():
        (tmp_path / f"{name}.cubin").write_bytes(content)
    assert (
        probed(monkeypatch, CUPY_CACHE_DIR=str(tmp_path))[1] == f"CuPy arrays; 2 kernels compiled, kept in {tmp_path}"
    )
    (gpu,), kernels = probed(monkeypatch, ARRAYBN_FAKE_GPUS="0")
    assert re.match(r"failed: .*cudaErrorInsufficientDriver", gpu)
    assert re.match(r"cannot be used: .*cudaErrorInsufficientDriver", kernels)
    assert info._cuda_kernels(None).version == "missing"


# ---- The fake itself -------------------------------------------------------------------------------------------------

_NAMES = r"""
import inspect, json, re, sys, types
import cupy, cupyx, cupy.cuda.runtime
found = {}
places = {"cupy": cupy, "cupy.cuda": cupy.cuda, "cupy.cuda.runtime": cupy.cuda.runtime, "cupyx": cupyx,
          "ndarray": cupy.ndarray, "Stream": cupy.cuda.Stream, "Event": cupy.cuda.Event, "Device": cupy.cuda.Device,
          "MemoryPointer": cupy.cuda.MemoryPointer, "cupy.linalg": cupy.linalg, "cupy.fft": cupy.fft}
for place, thing in places.items():
    for name in dir(thing):
        if name.startswith("_") and (isinstance(thing, types.ModuleType) or not name.endswith("__")):
            continue
        value = getattr(thing, name)
        try:
            parameters = list(inspect.signature(value).parameters) if callable(value) else None
        except (TypeError, ValueError):  # a method in C, whose documentation begins with its signature
            said = re.match(r"[\w.]+[(](self[^()]*)[)]", value.__doc__ or "")
            parameters = re.findall(r"(?:^|, )(\w+)", said[1]) if said else None
        found[f"{place}.{name}"] = parameters
found["hash"] = [cupy.cuda.Device.__hash__ is None, cupy.ndarray.__hash__ is None]
print(json.dumps(found))
"""


def names(**env: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-c", _NAMES]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ, **env})
    return dict(json.loads(run.stdout))


def test_the_fake_has_no_name_and_no_argument_that_cupy_has_not() -> None:
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    ours, theirs = names(PYTHONPATH=str(FAKE_CUPY)), names()
    own = {"annotations", "Any", "DEVICES", "default_stream", "os", "sys", "np", "__annotations__"}
    own |= set(dir(type("Class", (), {})))
    missing = [name for name in ours if name not in theirs and name.rpartition(".")[2] not in own]
    assert missing == []
    assert ours["hash"] == theirs["hash"]
    both = {name for name in ours if ours[name] and theirs.get(name) and "__" not in name}
    assert len(both) > 100
    in_c = {"ndarray.swapaxes", "ndarray.transpose", "ndarray.reshape", "MemoryPointer.memset"}  # types, not names
    kept = in_c | {"cupy.ndarray"} | {name for name in both if ours[name][-2:] == ["arguments", "options"]}
    assert {name: ours[name] for name in both - kept} == {name: theirs[name] for name in both - kept}
    assert {"cupy.asarray", "ndarray.get", "ndarray.set", "cupyx.empty_pinned"} <= both - kept


def test_the_fake_refuses_what_cupy_refuses(cupy: Any) -> None:
    array = cupy.asarray(X)
    with pytest.raises(TypeError, match="Implicit conversion to a NumPy array is not allowed"):
        np.asarray(array)
    with pytest.raises(TypeError, match="Unsupported type"):
        array + X
    with pytest.raises(TypeError):
        X + array
    with pytest.raises(TypeError, match="Unsupported type"):
        array[...] = X
    with cupy.cuda.Device(1), pytest.raises(ValueError, match="Array device must be same as the current device"):
        array + 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(cupy.cuda.Device(0))
    assert (np.float64(2) * array).dtype == np.float64
    stream, out = cupy.cuda.get_current_stream(), np.zeros(X.shape, "f4")
    array.get(out=out, blocking=False)
    assert not np.array_equal(out, X)
    stream.synchronize()
    np.testing.assert_array_equal(out, X)
    array.set(out, stream)
    out[...] = 0
    with pytest.raises(AssertionError, match="host memory was written to while"):
        stream.synchronize()
    assert inspect.isclass(cupy.ndarray)

"""Tests that need a real GPU: python -m pytest -m gpu

Without one these tests are skipped, or fail where ARRAYBN_REQUIRE names cupy. ARRAYBN_TEST_GPU=fake runs them on the
fake CuPy, with the kernels compiled by g++, to see that the tests themselves work; then sizes are smaller, and what the
fake cannot do is skipped.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gpu import FAKE_CUPY, cupy_here, real_cupy
from support.libraries import REQUIRED
from support.ranks import mpi_of, passes

import arraybn
from arraybn.kernels import MODULES
from arraybn.testing import ThreadComm, exact_batch_norm, scenarios, ulp, worst
from arraybn.testing.oracle import LONG, Exact

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]
ON_FAKE = os.environ.get("ARRAYBN_TEST_GPU") == "fake"
KERNELS = [name for name in MODULES if name != "cpu" and importlib.util.find_spec(MODULES[name]) is not None]
FAST = [name for name in KERNELS if name != "reference"]
DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("first", "last", "every second")
CASES = [(shape, scale) for shape in scenarios.SHAPES if shape != "one value" for scale in scenarios.SCALES]
RNG = np.random.default_rng(20)


@pytest.fixture(scope="module")
def cupy() -> Iterator[Any]:
    """Yield CuPy with a GPU; without a GPU skip, or fail where CuPy is promised."""
    if real_cupy() is None and not ON_FAKE:
        assert "cupy" not in REQUIRED, "CuPy finds no GPU, or is not installed"
        pytest.skip("CuPy finds no GPU, or is not installed")
    with cupy_here("cuda") as found:
        yield found
        found.cuda.Device().synchronize()


def real(cupy: Any, what: str) -> None:
    """Skip on the fake, which cannot do that."""
    if hasattr(cupy, "_fake"):
        pytest.skip(f"the fake has no {what}")


@functools.cache
def as_dtype(name: str) -> Any:
    if name == "bfloat16":
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    return np.dtype(name)


def placed(cupy: Any, array: Any, layout: str) -> Any:
    """(N, C, S) on the GPU, as contiguous memory with the channels first or last, or with gaps."""
    if layout == "first":
        return cupy.asarray(array)
    if layout == "last":
        return cupy.asarray(np.ascontiguousarray(np.moveaxis(array, 1, -1))).transpose(0, 2, 1)
    room = np.zeros((*array.shape[:2], 2 * array.shape[2]), array.dtype)
    room[..., ::2] = array
    return cupy.asarray(room)[..., ::2]


def poisoned(cupy: Any, like: Any) -> Any:
    """Return a new array full of NaN in the layout of `like`."""
    out = cupy.empty_like(like)
    out.data.memset(0xFF, out.nbytes)
    assert np.isnan(out.get().astype("f4")).all()
    return out


def bits(*arrays: Any) -> bytes:
    return b"".join(b"" if array is None else array.get().tobytes() for array in arrays)


# ---- Exact mode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:-1])
def test_x2_exact_mode_gives_the_bits_of_the_host(cupy: Any, dtype: str, layout: str) -> None:
    for shape in ((9, 70, 20), (30, 3, 49), (3, 5, 1), (700, 16, 1), (2, 2, 70_000)):
        size = shape if not hasattr(cupy, "_fake") else (*shape[:2], min(shape[2], 500))
        for data in (RNG.normal(3, 1, size), RNG.normal(size=size) * 2.0 ** RNG.integers(-140, 120, size)):
            with np.errstate(over="ignore"):
                x, dy = data.astype(as_dtype(dtype)), np.flip(data).astype(as_dtype(dtype))
            vectors = RNG.normal(size=(2, size[1]))
            with np.errstate(all="ignore"):
                y, saved = arraybn.batch_norm(x, *vectors, exact=True, kernels="reference")
                dx, dweight, dbias = arraybn.batch_norm_backward(dy, saved)
            given = placed(cupy, x, layout), *map(cupy.asarray, vectors)
            found, ours = arraybn.batch_norm(*given, exact=True)
            gradients = arraybn.batch_norm_backward(placed(cupy, dy, layout), ours)
            wanted = [y, dx, dweight, dbias, saved.moments.mean, saved.moments.m2]
            for got, want in zip([found, *gradients, ours.moments.mean, ours.moments.m2], wanted, strict=True):
                np.testing.assert_array_equal(got.get(), want)
                assert np.array_equal(np.signbit(got.get()), np.signbit(want)) or np.isnan(want.astype("f8")).any()


# ---- Accuracy --------------------------------------------------------------------------------------------------------


@functools.cache
def truth(shape: str, scale: str, dtype: str) -> tuple[Any, Any, Exact]:
    """Return x and dy of that dtype, and the exact results."""
    batch = scenarios.make(shape, scale)
    with np.errstate(over="ignore"):
        x, dy = (array.astype(as_dtype(dtype)) for array in (batch.x, batch.dy))
    return x, dy, exact_batch_norm(x, batch.weight, batch.bias, dy, eps=batch.eps)


def assert_kept(dtype: str, exact: Exact, y: Any, dx: Any, mean: Any, var: Any) -> None:
    """(N1, N2) Assert the promises for results in host memory."""
    kind = as_dtype(dtype)
    assert y.dtype == dx.dtype == kind
    if dtype == "float64":
        ratio = 1 + abs(exact.mean) / np.sqrt(exact.var)
        for got, want, scale, bound in ((y, exact.y, exact.y_scale, 16), (dx, exact.dx, exact.dx_scale, 32)):
            error = abs(got.astype(LONG) - want) / ulp(scale.max(axis=(0, 2), keepdims=True), kind)
            assert (error.max(axis=(0, 2)) <= bound * ratio).all()
        return
    y, dx = y.astype("f8"), dx.astype("f8")
    assert worst(y, exact.y, exact.y_scale, kind) <= (4 if dtype == "float32" else 1.5)
    assert worst(dx, exact.dx, exact.dx_scale, kind) <= (12 if dtype == "float32" else 1.5)
    floor, single = np.maximum(abs(exact.mean), np.ldexp(np.sqrt(exact.var), -20)), np.dtype("f4")
    assert worst(mean.astype(single), exact.mean, floor, single) <= 1
    assert worst(var.astype(single), exact.var, exact.var, single) <= 1


def usable(dtype: str, scale: str) -> bool:
    """Return False for half precision far from zero: channels would be constant, which another test covers, or inf."""
    return dtype in ("float32", "float64") or scale in ("standard", "shifted")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_n1_n2_hold_over_the_table(cupy: Any, kernels: str, dtype: str, layout: str) -> None:
    for shape, scale in [case for case in CASES if usable(dtype, case[1])][:: 5 if ON_FAKE else 1]:
        batch, (x, dy, exact) = scenarios.make(shape, scale), truth(shape, scale, dtype)
        here, weight, bias = placed(cupy, x, layout), cupy.asarray(batch.weight), cupy.asarray(batch.bias)
        there = placed(cupy, dy, layout)
        y, saved = arraybn.batch_norm(here, weight, bias, eps=batch.eps, kernels=kernels, out=poisoned(cupy, here))
        dx, dweight, dbias = arraybn.batch_norm_backward(there, saved, out=poisoned(cupy, here))
        moments = saved.moments
        assert_kept(dtype, exact, y.get(), dx.get(), moments.mean.get(), moments.var().get())
        terms = abs(dy.astype("f8") * exact.xhat.astype("f8")).sum(axis=(0, 2)), abs(dy.astype("f8")).sum(axis=(0, 2))
        assert worst(dweight.get(), exact.dweight, terms[0], np.dtype("f4")) <= 1
        assert worst(dbias.get(), exact.dbias, terms[1], np.dtype("f4")) <= 1
        spoiled = (y.get().astype("f8") * 1.02).astype(as_dtype(dtype))
        with pytest.raises(AssertionError):  # the control: wrong by 2 %
            assert_kept(dtype, exact, spoiled, dx.get(), moments.mean.get(), moments.var().get())


@pytest.mark.parametrize("kernels", KERNELS)
def test_n3_constant_channels_are_exactly_bias_and_others_do_not_mind_nan(cupy: Any, kernels: str) -> None:
    values = np.asarray([3e7, 0.1, -1e-30, 0.0, 1 / 3, np.nan, np.inf], "f4")
    bias = np.asarray([0.1, -2.0, 3.0, 1e-9, 0.7, 5.0, 6.0], "f4")
    x = np.tile(values[None, :, None], (70, 1, 131))
    for layout in LAYOUTS:
        with np.errstate(all="ignore"):  # on the fake
            y, saved = arraybn.batch_norm(placed(cupy, x, layout), None, cupy.asarray(bias), kernels=kernels)
        assert (y.get()[:, :5] == bias[None, :5, None]).all()
        assert np.isnan(y.get()[:, 5:]).all()
        assert (saved.moments.m2.get()[:5] == 0).all()


SHAPES = {  # several blocks in a channel, many channels, odd planes, few values
    "(N, C, H, W) of a stem": (2, 64, 112 * 112),
    "odd planes": (32, 512, 49),
    "few channels, long": (3, 3, 200_003),
    "channels for clusters of 2 to 8 blocks": (5, 9, 40_000),
    "channels for clusters of 4 to 16 blocks": (5, 3, 100_000),
    "lines": (50_000, 48, 1),
    "wide lines": (70, 2048, 1),
    "two values": (2, 4099, 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", FAST)
@pytest.mark.parametrize("name", SHAPES)
def test_n1_n4_large_batches_are_right_and_the_same_bits_each_time(
    cupy: Any, name: str, kernels: str, dtype: str
) -> None:
    n, c, s = SHAPES[name]
    if ON_FAKE:
        n, c, s = (max(1, size // 16) if size > 4 else size for size in (n, c, s))
    x, dy = ((RNG.standard_normal((n, c, s)) + 3).astype(as_dtype(dtype)) for _ in range(2))
    weight = RNG.uniform(0.5, 2, c).astype("f4")
    wide = x.astype(LONG)
    mean, var = wide.mean(axis=(0, 2)), wide.var(axis=(0, 2))
    arrays = [cupy.asarray(array) for array in (x, weight, -weight, dy)]

    def once() -> tuple[Any, ...]:
        y, saved = arraybn.batch_norm(*arrays[:3], eps=1e-3, kernels=kernels, out=poisoned(cupy, arrays[0]))
        dx, dweight, dbias = arraybn.batch_norm_backward(arrays[3], saved, out=poisoned(cupy, arrays[0]))
        return y, dx, dweight, dbias, saved.moments.mean, saved.moments.m2

    results = once()
    assert {bits(*once()) for _ in range(3)} == {bits(*results)}
    y, dx, dweight, dbias, got_mean, got_m2 = (array.get().astype("f8") for array in results)
    eps = float(np.finfo("f4").eps)
    np.testing.assert_allclose(got_mean, mean.astype("f8"), rtol=eps)
    half = dtype in ("float16", "bfloat16")  # whose values are added in float32, a few at a time
    np.testing.assert_allclose(got_m2 / (n * s), var.astype("f8"), rtol=8 * eps if half else eps)
    a, g = (weight / np.sqrt(var + 1e-3))[:, None], dy.astype(LONG)
    xhat = (wide - mean[:, None]) / np.sqrt(var + 1e-3)[:, None]
    sums = (g * xhat).sum(axis=(0, 2)), g.sum(axis=(0, 2))
    want_dx = a * (g - sums[1][:, None] / (n * s) - xhat * (sums[0] / (n * s))[:, None])
    kind = as_dtype(dtype)
    relative = 4 * {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-23, "float64": 2.0**-46}[kind.name]
    for got, want in ((y, weight[:, None] * xhat - weight[:, None]), (dx, want_dx)):
        scale = abs(want).max(axis=(0, 2), keepdims=True) + abs(a)[None]
        assert (abs(got - want) <= 3 * relative * scale).all()
    for got, want, terms in ((dweight, sums[0], abs(g * xhat)), (dbias, sums[1], abs(g))):
        assert (abs(got - want) <= eps * terms.sum(axis=(0, 2))).all()


def test_more_than_2_31_values(cupy: Any) -> None:
    """The places of the last values need more than 32 bits."""
    real(cupy, "such memory")
    length = 2**29 + 8
    if cupy.cuda.Device().mem_info[0] < 14 * 4 * length:
        pytest.skip("this GPU has not the memory")
    row = cupy.arange(length, dtype="f4")
    row = (cupy.sin(row * 0.7) + 2).astype("f2")
    x = cupy.empty((2, 2, length), "f2")
    x[...] = row
    x[1, 1, -8:] = 5
    wide = row.astype("f8")
    sums = [2 * wide.sum(), wide.sum() + wide[:-8].sum() + 40]
    squares = [2 * (wide**2).sum(), (wide**2).sum() + (wide[:-8] ** 2).sum() + 200]
    mean = np.asarray([float(total) for total in sums]) / (2 * length)
    var = np.asarray([float(total) for total in squares]) / (2 * length) - mean**2
    del wide
    for kernels in FAST:
        y, saved = arraybn.batch_norm(x, kernels=kernels)
        np.testing.assert_allclose(saved.moments.mean.get(), mean, rtol=1e-9)
        np.testing.assert_allclose(saved.moments.var().get(), var, rtol=1e-6)
        for part in (np.s_[0, 0, :9], np.s_[1, 1, -16:]):
            channel = part[1]
            want = (x[part].get().astype("f8") - mean[channel]) / np.sqrt(var[channel] + 1e-5)
            np.testing.assert_allclose(y[part].get(), want, rtol=2e-3, atol=2e-3)
        dx, _, dbias = arraybn.batch_norm_backward(x, saved, out=y)
        assert dbias is None
        assert bool(cupy.isfinite(dx[1, 1, -16:]).all())


# ---- Streams, devices, graphs, threads -------------------------------------------------------------------------------


def results_of(cupy: Any, x: Any, dy: Any, kernels: str) -> tuple[Any, ...]:
    weight = cupy.full(x.shape[1], 1.5, dtype="f4")
    y, saved = arraybn.batch_norm(x, weight, weight, kernels=kernels)
    return y, *arraybn.batch_norm_backward(dy, saved), saved.moments.mean


def some(cupy: Any, *shape: int) -> list[Any]:
    return [cupy.asarray((RNG.standard_normal(shape) + 2).astype("f4")) for _ in range(2)]


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", FAST)
@pytest.mark.parametrize("name", list(SHAPES)[:-1])
def test_a_mask_gives_the_same_bits_each_time_and_what_the_reference_gives(
    cupy: Any, name: str, kernels: str, dtype: str, layout: str
) -> None:
    shape = tuple(max(1, size // 16) if ON_FAKE and size > 4 else size for size in SHAPES[name])
    x, dy = (RNG.standard_normal(shape, dtype="f4").astype(as_dtype(dtype)) for _ in range(2))
    where = RNG.random((shape[0], shape[2])) < 0.7
    where[0, 0] = True  # the fake has few
    kept = where[:, None]
    given = [
        placed(cupy, np.where(kept, array, as_dtype(dtype).type(fill)), layout)
        for array, fill in ((x, np.nan), (dy, 0))
    ]

    def results(chosen: str) -> list[Any]:
        y, saved = arraybn.batch_norm(given[0], where=cupy.asarray(where), kernels=chosen)
        return [y, arraybn.batch_norm_backward(given[1], saved)[0], saved.moments.mean, saved.moments.m2]

    found = results(kernels)
    assert len({bits(*results(kernels)) for _ in range(1 if ON_FAKE else 20)} | {bits(*found)}) == 1
    unit = np.finfo("f4").eps if as_dtype(dtype).itemsize > 2 else 2.0**-8
    term = abs(dy.astype("f8")).max() / np.sqrt(found[3].get().min() / np.count_nonzero(where) + 1e-5)  # of dx (N2)
    for got, want, largest in zip(found, results("reference"), (0, term, 0, 0), strict=True):
        chosen = np.broadcast_to(kept, got.shape) if got.ndim == 3 else ...
        got, want = (array.get().astype("f8")[chosen] for array in (got, want))
        assert abs(got - want).max() <= 12 * unit * max(largest, abs(want).max())


@pytest.mark.parametrize("kernels", FAST)
def test_n4_any_stream_and_several_threads_give_the_same_bits(cupy: Any, kernels: str) -> None:
    arrays = some(cupy, 4, 8, 3000)
    want = bits(*results_of(cupy, *arrays, kernels))
    cupy.cuda.Device().synchronize()
    found = []

    def work(stream: Any) -> None:
        with stream:
            found.extend(bits(*results_of(cupy, *arrays, kernels)) for _ in range(2 if ON_FAKE else 20))
            stream.synchronize()

    threads = [threading.Thread(target=work, args=(cupy.cuda.Stream(non_blocking=i % 2 == 1),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * (2 if ON_FAKE else 20)
    assert set(found) == {want}


@pytest.mark.parametrize("kernels", FAST)
def test_a_new_thread_launches_although_nothing_has_made_it_a_context(cupy: Any, kernels: str) -> None:
    """Memory from CuPy's pool makes no context."""
    x = some(cupy, 4, 8, 3000)[0]

    def work() -> bytes:
        y, saved = arraybn.batch_norm(x, kernels=kernels)
        return bits(y, saved.moments.m2)

    want, found = work(), []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    assert found == [want]


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_second_gpu_serves_its_own_arrays(cupy: Any, kernels: str) -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU")
    arrays = some(cupy, 4, 8, 300)
    with cupy.cuda.Device(1):
        there = [cupy.asarray(array.get()) for array in arrays]
    here = cupy.cuda.Device().id
    y, saved = arraybn.batch_norm(there[0], kernels=kernels)
    dx, _, _ = arraybn.batch_norm_backward(there[1], saved)
    assert y.device.id == dx.device.id == saved.moments.mean.device.id == 1
    assert cupy.cuda.Device().id == here
    want, saved = arraybn.batch_norm(arrays[0], kernels=kernels)
    assert bits(y, dx) == bits(want, arraybn.batch_norm_backward(arrays[1], saved)[0])
    with pytest.raises(ValueError, match=r"weight: expected on <CUDA Device 1> as x is; got one on <CUDA Device 0>"):
        arraybn.batch_norm(there[0], cupy.ones(8))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kernels", FAST)
def test_a_captured_graph_does_it_again_and_nothing_waits_for_the_gpu(cupy: Any, kernels: str, training: bool) -> None:
    """Waiting for the GPU, or allocating outside CuPy's pool, would end the capture with an error."""
    real(cupy, "graphs")
    x, dy = some(cupy, 8, 16, 3136)
    weight = cupy.full(16, 1.5, dtype="f4")
    fixed = {} if training else {"mean": cupy.full(16, 2.0), "var": cupy.full(16, 1.5)}
    out, dx = cupy.empty_like(x), cupy.empty_like(x)

    def step() -> Any:
        _, saved = arraybn.batch_norm(x, weight, weight, **fixed, kernels=kernels, out=out)
        return arraybn.batch_norm_backward(dy, saved, out=dx)[1:]

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        step()  # kernels are built, pools filled
        stream.synchronize()
        stream.begin_capture()
        gradients = step()
        graph = stream.end_capture()
        for _ in range(3):
            x[...], dy[...] = some(cupy, 8, 16, 3136)
            graph.launch(stream)
            stream.synchronize()
            got = bits(out, dx, *gradients)
            assert got == bits(out, dx, *step())
    other = cupy.cuda.Stream(non_blocking=True)
    with other:  # a stream without calls so far
        other.begin_capture()
        with pytest.raises(RuntimeError, match="make one first"):  # its workspace would be zeroed by the graph alone
            step()
        other.end_capture()
    with stream:  # the control: CuPy's own error
        stream.begin_capture()
        with pytest.raises(RuntimeError):
            float(x.sum())
        with contextlib.suppress(RuntimeError):
            stream.end_capture()


# ---- Layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}])
def test_a_layer_trains_evaluates_and_travels_as_on_the_host(
    cupy: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    layer, twin = arraybn.BatchNorm2d(6, xp=cupy, **options), arraybn.BatchNorm2d(6, **options)
    for step in range(5):
        if step == 4:
            layer.eval(), twin.eval()
        x, dy = ((RNG.standard_normal((4, 6, 7, 9)) + step).astype("f4") for _ in range(2))
        y, dx = layer(cupy.asarray(x)), layer.backward(cupy.asarray(dy))
        np.testing.assert_allclose(y.get(), twin(x), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dx.get(), twin.backward(dy), rtol=1e-3, atol=1e-5)
    want = twin.state_dict()
    arraybn.save(layer, tmp_path / "state.npz")
    loaded = arraybn.BatchNorm2d(6, **options)
    loaded.load_state_dict(arraybn.load(tmp_path / "state.npz"))
    clones = [layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(loaded).to(xp=cupy)]
    for name, value in want.items():
        np.testing.assert_allclose(loaded.state_dict()[name], value, rtol=1e-5)
        assert len({bits(clone.state_dict()[name]) for clone in clones}) == 1
    layer.load_state_dict(want)
    assert layer.to(xp=np).state_dict().keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(layer.state_dict()[name], value)


def test_wrong_input_is_refused_and_leaves_the_layer_as_it_was(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, (x, _) = arraybn.BatchNorm2d(6, xp=cupy), some(cupy, 4, 6, 5, 5)
    layer(x)
    before = bits(*layer.state_dict().values())

    def refused(kind: Any, text: str, call: Callable[..., Any], *arguments: Any) -> None:
        with pytest.raises(kind, match=text):
            call(*arguments)
        assert bits(*layer.state_dict().values()) == before

    refused(TypeError, r"x: expected a cupy array as this layer is.*layer.to\(xp=numpy\)", layer, x.get())
    refused(TypeError, r"dy: expected a cupy array as x is.*cupy.asarray", layer.backward, x.get())
    refused(TypeError, r"x: expected float16, bfloat16, float32 or float64", layer, x.astype("i4"))
    refused(TypeError, r"weight: expected a cupy array as x is", arraybn.batch_norm, x, np.ones(6))
    refused(ValueError, r"expected 4D input \(got 3D input\)", layer, x[0])
    room = cupy.zeros((5, 6, 5, 5), dtype="f4")
    refused(ValueError, r"out: .*partial overlap", lambda: arraybn.batch_norm(room[:4], out=room[1:]))

    from arraybn.kernels.cuda import launch

    def gone(*arguments: Any) -> None:
        raise RuntimeError("an illegal address")

    with monkeypatch.context() as patch:
        patch.setattr(type(launch.launcher()), "start", gone)
        refused(RuntimeError, r"the CUDA kernel \w+ could not be launched: an illegal address", layer, x)
    layer.backward(x)
    y, saved = arraybn.batch_norm(x)
    np.testing.assert_array_equal(layer(x).get(), y.get())
    want = bits(arraybn.batch_norm_backward(x, saved)[0])
    assert bits(arraybn.batch_norm_backward(x, saved, out=x)[0]) == want


# ---- Ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_as_threads_agree_with_the_whole_batch(cupy: Any, size: int) -> None:
    x, dy = ((RNG.standard_normal((7, 300, 4, 4)) + 2).astype("f4") for _ in range(2))  # more than 256 channels
    whole = arraybn.BatchNorm2d(300)
    y, dx = whole(x), whole.backward(dy)
    parts = [slice(0, 5), slice(5, 7), slice(7, 7)][:size]

    def work(comm: Any) -> Any:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            layer = arraybn.SyncBatchNorm(300, process_group=comm, xp=cupy)
            mine = [cupy.asarray(array[parts[comm.rank]]) for array in (x, dy)]
            got = layer(mine[0]), layer.backward(mine[1]), layer.running_var
            stream.synchronize()
            return [array.get() for array in got]

    ys, dxs, variances = zip(*ThreadComm.run(size, work), strict=True)
    np.testing.assert_allclose(np.concatenate(ys), y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(dxs), dx, rtol=1e-3, atol=1e-5)
    assert len({variance.tobytes() for variance in variances}) == 1


@pytest.mark.parametrize("kernels", ["reference", "cuda"])
def test_ranks_under_mpirun_share_the_gpu(cupy: Any, kernels: str) -> None:
    pytest.importorskip("mpi4py")
    mpi = mpi_of(sys.executable)
    if mpi is None:
        pytest.skip("there is no mpirun")
    path = [ROOT, ROOT / "tests", ROOT / "tests" / "cuda", *([FAKE_CUPY] if hasattr(cupy, "_fake") else [])]
    more = os.environ.get("PYTHONPATH", "")
    passes(mpi, 3, "cupy_ranks.py", kernels, limit=120, PYTHONPATH=os.pathsep.join([*map(str, path), more]))


# ---- Commands --------------------------------------------------------------------------------------------------------


def test_the_demo_trains_on_the_gpu(cupy: Any, tmp_path: Path) -> None:
    for name in ("sklearn", "tqdm", "threadpoolctl"):
        pytest.importorskip(name)
    path = [str(ROOT), *([str(FAKE_CUPY)] if hasattr(cupy, "_fake") else []), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "ARRAYBN_FAKE_HIP": "1"}
    command = [sys.executable, "-m", "arraybn", "demo", "--device", "cuda", "--epochs", "1", "--no-plot"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False, env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "CUDA device 0" in run.stdout
    assert "gives the same bits" in run.stdout

"""Exact mode: sums that do not round (E10), the same bits for any split and on every backend (X1, X2)."""

from __future__ import annotations

import contextlib
import importlib
import math
import operator
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.libraries import need

import arraybn
from arraybn import exact
from arraybn.commands._demo_exact import checksum, trained
from arraybn.commands._demo_training import load_digits
from arraybn.testing import ThreadComm

PACKAGE = Path(arraybn.__file__).parent
SHAPES = [(5, 3, 40), (3, 2, 5000), (700, 3), (6, 5, 7), (40, 600), (9, 70, 20)]


def kinds(rng: Any, shape: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Yield data that is hard to add, by name."""
    n, signs = rng.normal(size=shape), rng.choice([-1.0, 1.0], shape)
    yield "normal", n
    yield "mean far from zero", 1e3 + 1e-3 * n
    yield "mean very far", np.float32(1e30) * (1 + 1e-7 * n)
    yield "60 binades", n * 2.0 ** rng.integers(-60, 0, shape)
    yield "all binades", n * 2.0 ** rng.integers(-160, 120, shape)
    yield "subnormal", n * 1e-44
    yield "near overflow beside tiny", np.where(rng.random(shape) < 0.1, 3e38 * signs, n * 1e-40)
    yield "signed zeros", 0 * n * signs
    yield "constant", 0 * n + 1.999
    yield "cancels", np.concatenate([n, -n])[: shape[0]] if shape[0] % 2 == 0 else n - n[::-1]
    yield "one outlier", np.where(np.arange(n.size).reshape(shape) == n.size // 2, 1e30, n)
    yield "a tie that the last bit breaks", np.resize([1.0, 2.0**-53, 2.0**-113, 0.0], shape)
    yield "a subnormal beside the largest", np.where(np.arange(n.size).reshape(shape) % 7, -3e38, -(2.0**-145))
    for binades in (26, 27, 28, 29):  # as many as a pass of a backend holds, and one more
        yield (
            f"{binades} binades",
            np.where(rng.random(shape) < 0.5, 2.0, 2.0 ** (2 - binades)) * rng.uniform(0.5, 1, shape),
        )


def not_finite(rng: Any, shape: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    for name, values in {
        "NaN": [np.nan],
        "inf": [np.inf, np.inf],
        "-inf": [-np.inf],
        "both": [np.inf, -np.inf],
    }.items():
        x = rng.normal(size=shape)
        x.reshape(-1)[rng.choice(x.size, len(values), replace=False)] = values
        yield name, x


def run(x: Any, dy: Any, weight: Any, bias: Any, **options: Any) -> list[Any]:
    """Return y, dx, dweight, dbias, mean and m2 in exact mode."""
    with np.errstate(all="ignore"):
        y, saved = arraybn.batch_norm(x, weight, bias, exact=True, **options)
        dx, dweight, dbias = arraybn.batch_norm_backward(dy, saved)
    return [np.asarray(a) for a in (y, dx, dweight, dbias, saved.moments.mean, saved.moments.m2)]


def drawn(seed: int, shape: tuple[int, ...], data: Any, dtype: Any = np.float32) -> tuple[Any, ...]:
    """Return x, dy, weight and bias."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        x, dy = data.astype(dtype), 0.3 * rng.permutation(data.reshape(-1)).reshape(shape)
        return x, dy.astype(dtype), rng.uniform(-2, 2, shape[1]).astype(np.float32), rng.normal(size=shape[1])


@contextlib.contextmanager
def served_by(kernels: str, *libraries: Any) -> Iterator[Any]:
    """Yield what `kernels=` takes for NumPy arrays; the CUDA kernels run on the CPU (tests/cuda/shim.py)."""
    if kernels != "cuda":
        yield kernels
        return
    with importlib.import_module("support.kernels").installed(*libraries):
        yield importlib.import_module("arraybn.kernels.cuda")


def same(ours: list[Any], others: list[Any]) -> bool:
    return all(
        (a.dtype == b.dtype and a.tobytes() == b.tobytes()) or np.array_equal(a, b, equal_nan=True)
        for a, b in zip(ours, others, strict=True)
    )


def nearest(value: Fraction) -> float:
    """Return the float64 nearest to a rational number; on a tie the even one, as Python divides integers."""
    return value.numerator / value.denominator


# ---- X1: correctly rounded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["reference", "cpu", "cuda"])
@pytest.mark.parametrize("shape", [(5, 3, 40), (30, 4), (7, 3, 5), (1, 2), (2, 2, 1)])
def test_x1_statistics_and_gradients_are_the_rational_ones_rounded_once(kernels: str, shape: Any) -> None:
    need("numba")
    rng = np.random.default_rng(0)
    for name, data in kinds(rng, shape):
        x, dy, _, _ = drawn(1, shape, data)
        dy = dy.astype(np.float32)
        with served_by(kernels) as module:
            dx, dweight, dbias, mean, m2 = run(x, dy, np.ones(shape[1]), np.zeros(shape[1]), kernels=module)[1:]
        del dx
        for c in range(shape[1]):
            values, gradients = ([Fraction(float(v)) for v in a[:, c].reshape(-1)] for a in (x, dy))
            exact_mean = sum(values) / len(values)
            assert mean[c] == nearest(exact_mean), name
            assert m2[c] == nearest(sum((v - exact_mean) ** 2 for v in values)), name
            assert dbias[c] == nearest(sum(gradients, Fraction(0))), name
            spread = nearest(sum(g * (v - Fraction(mean[c])) for g, v in zip(gradients, values, strict=True)))
            rstd = 1 / np.sqrt(m2[c] / len(values) + 1e-5)
            assert abs(dweight[c] - rstd * spread) <= 2 * np.spacing(abs(rstd * spread)), name


def test_x1_ten_million_values_are_correctly_rounded() -> None:
    need("numba")
    x = np.random.default_rng(0).normal(1000, 1, (1, 1, 10_000_000)).astype(np.float32)
    integers = np.round(x.astype(np.float64) * 2**20).astype(np.int64)  # float32 near 1000 are multiples of 2^-14
    assert np.array_equal(integers / 2**20, x)
    total, n = int(integers.sum()), x.size
    high, low = integers >> 16, integers & 0xFFFF
    squares = (int((high * high).sum()) << 32) + (int((high * low).sum()) << 17) + int((low * low).sum())
    found = arraybn.moments(x, exact=True)
    assert found.mean[0] == nearest(Fraction(total, n << 20))
    assert found.m2[0] == nearest(Fraction(n * squares - total * total, n << 40))


# ---- X2: the same bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, "float32") for shape in SHAPES), *product(SHAPES[::2], ["float16", "bfloat16"])],
)
def test_x2_each_backend_and_both_layouts_give_the_same_bits(shape: Any, dtype: str) -> None:
    need("numba")
    of_array = need("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    rng = np.random.default_rng(0)
    with served_by("cuda") as cuda:
        for name, data in [*kinds(rng, shape), *not_finite(rng, shape)]:
            x, dy, weight, bias = drawn(1, shape, data, of_array)
            wanted = run(x, dy, weight, bias, kernels="reference")
            last = [np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy)]
            for module in ("cpu", cuda):
                assert same(run(x, dy, weight, bias, kernels=module), wanted), (name, module)
                y, dx, *rest = run(*last, weight, bias, kernels=module, channel_axis=-1)
                assert same([np.moveaxis(y, -1, 1), np.moveaxis(dx, -1, 1), *rest], wanted), (name, module)


@pytest.mark.parametrize("namespace", ["torch", "array_api_strict"])
def test_x2_other_namespaces_give_the_same_bits(namespace: str) -> None:
    xp = need(namespace)
    for name, data in kinds(np.random.default_rng(0), (6, 5, 7)):
        arrays = drawn(1, (6, 5, 7), data)
        theirs = [xp.asarray(a) for a in arrays]
        y, saved = arraybn.batch_norm(theirs[0], *theirs[2:], exact=True)
        dx, dweight, dbias = arraybn.batch_norm_backward(theirs[1], saved)
        found = [np.asarray(a) for a in (y, dx, dweight, dbias, saved.moments.mean, saved.moments.m2)]
        if "subnormal" in name or "tiny" in name or "all" in name:  # torch may flush subnormal float32 to zero
            continue
        assert same(found, run(*arrays)), name


def test_x2_sums_of_as_many_grid_steps_as_can_be_are_exact() -> None:
    """Each product is half a step of the coarse grid above an even one: 4096 of these are 2⁶³ steps of a fine grid."""
    u = np.full((1, 1, 4096), 2.0**-2 + 2.0**-25, np.float32)
    x = u.copy()
    u[0, 0, 0], x[0, 0, 0] = x[0, 0, 1], u[0, 0, 1] = 1 + 2.0**-23, 2.0**-4 + 2.0**-27  # which choose the grids
    need("numba")
    for name in ("cpu", "cuda"):
        with served_by(name):
            found = importlib.import_module(f"arraybn.kernels.{name}.exact").products(u, x, np.zeros(1))
        assert exact._totals(found) == exact._totals(exact.products(u, x, np.zeros(1))), name


def state(layer: Any) -> list[Any]:
    return [np.asarray(value) for value in layer.state_dict().values()]


def gradients(model: Any, comm: Any) -> list[Any]:
    """Return the gradients of the whole batch."""
    arraybn.average_gradients(model, comm, weight=None, exact=True)
    return [parameter.grad for parameter in model.parameters()]


@settings(max_examples=30)  # each runs on several backends, thread counts and ranks
@given(st.data())
def test_x2_any_order_split_threads_and_backend_give_the_same_bits(data: st.DataObject) -> None:
    need("numba")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    samples = data.draw(st.integers(2, 40))
    shape = (samples, *data.draw(st.sampled_from([(3,), (2, 50), (4, 3, 3)])))
    name, values = data.draw(st.sampled_from(list(kinds(rng, shape))))
    x, dy, weight, bias = drawn(1, shape, values)
    bias = bias.astype(np.float32)  # the gradient of a float64 parameter is no sum of float32 terms
    order = np.asarray(data.draw(st.permutations(range(samples))))
    cuts = sorted(data.draw(st.lists(st.integers(0, samples), max_size=4)))
    wanted = run(x, dy, weight, bias)
    with served_by(data.draw(st.sampled_from(["reference", "cpu", "cuda"]))) as module:
        y, dx, *rest = run(x[order], dy[order], weight, bias, kernels=module)
        assert same([y, dx, *rest], [wanted[0][order], wanted[1][order], *wanted[2:]]), (name, module)

    threads = arraybn.get_num_threads()
    arraybn.set_num_threads(data.draw(st.integers(1, 5)))
    try:
        assert same(run(x, dy, weight, bias), wanted), name
    finally:
        arraybn.set_num_threads(threads)

    parts = list(zip(np.split(x[order], cuts), np.split(dy[order], cuts), strict=True))  # the seam in public
    whole = arraybn.pool(*(arraybn.moments(part, exact=True) for part, _ in parts))
    done = [arraybn.batch_norm(part, weight, bias, moments=whole, exact=True) for part, _ in parts]
    sums = sum(arraybn.batch_norm_sums(g, saved) for (_, g), (_, saved) in zip(parts, done, strict=True))
    dxs = [arraybn.batch_norm_backward(g, s, sums=sums)[0] for (_, g), (_, s) in zip(parts, done, strict=True)]
    dbias, dweight = sums.values  # of which the second is without rstd
    dweight = dweight * (1 / np.sqrt(whole.var() + 1e-5))
    found = [np.concatenate([y for y, _ in done]), np.concatenate(dxs), dweight, dbias, whole.mean, whole.m2]
    assert same(found, [wanted[0][order], wanted[1][order], *wanted[2:]]), name

    def work(comm: Any) -> list[Any]:
        part, g = parts[comm.rank]
        layer = arraybn.SyncBatchNorm(shape[1], exact=True, process_group=comm)
        layer.weight.data, layer.bias.data = weight, bias
        with np.errstate(over="ignore"):  # of the running variance, and of gradients in float32
            return [layer(part), layer.backward(g), *state(layer), *gradients(layer, comm)]

    results = ThreadComm.run(len(parts), work)
    y, dx = (np.concatenate([result[index] for result in results]) for index in (0, 1))
    assert same([y, dx], [wanted[0][order], wanted[1][order]]), name
    alone = arraybn.BatchNorm1d(shape[1], exact=True) if x.ndim < 4 else arraybn.BatchNorm2d(shape[1], exact=True)
    alone.weight.data, alone.bias.data = weight, bias
    with np.errstate(over="ignore"):
        alone(x)
        alone.backward(dy)
        wanted = [*state(alone), *gradients(alone, None)]
        assert same(wanted[-2:], [gradient.astype(np.float32) for gradient in run(x, dy, weight, bias)[2:4]])
    assert all(same(result[2:], wanted) for result in results), name


@pytest.mark.parametrize("name", ["normal", "a tie that the last bit breaks"])  # the tie is for Python's integers
def test_x2_a_result_over_an_input_has_the_same_bits(name: str) -> None:
    need("numba")
    for shape in ((5, 3, 40), (300, 6)):
        x, dy, weight, bias = drawn(1, shape, dict(kinds(np.random.default_rng(0), shape))[name])
        wanted = run(x, dy, weight, bias)
        _, saved = arraybn.batch_norm(x, weight, bias, exact=True)
        dx, *_ = arraybn.batch_norm_backward(dy, saved, out=dy)
        y, _ = arraybn.batch_norm(x, weight, bias, exact=True, out=x)
        assert same([y, dx], wanted[:2])


def test_sums_of_usual_data_are_sure_and_not_left_to_the_integers_of_python(monkeypatch: Any) -> None:
    """As float64 has 53 bits and many a sum needs one more, a tie is usual: 2^10 + 2^-43 is one."""
    need("numba")
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(8, 50, 32)), rng.normal(3, 1, (8, 50, 32))]).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    x[:, 0], x[:2, 0, 0] = 0, [2.0**10, 2.0**-43]
    dy[:, 0], dy[:2, 0, 0] = 0, [1.1 * 2.0**10, 2.0**-43]
    wanted = run(x, dy, None, None)

    def refuse(*_: Any) -> None:
        raise AssertionError

    for name in ("mean_and_m2", "sums"):
        monkeypatch.setattr(exact, name, refuse)
    assert same(run(x, dy, None, None), wanted)
    with pytest.raises(AssertionError):  # the control
        run(np.asarray([[1], [2.0**-53], [2.0**-113], [0]], np.float32), np.ones((4, 1), np.float32), None, None)


def test_a_thread_borrows_a_record_that_no_other_thread_has() -> None:
    need("numba")
    from arraybn.kernels.cpu import jobs

    words = np.zeros(4, np.int64)
    assert [jobs.borrow(words, 1, 2), jobs.borrow(words, 1, 2)] == [(0, True), (1, True)]
    jobs.give_back(words, 2)
    assert jobs.borrow(words, 1, 2) == (1, False)
    assert [jobs.was_borrowed(words, i) for i in range(4)] == [False, True, True, False]


def test_x2_control_the_usual_mode_depends_on_the_order() -> None:
    """Most orders of a batch change a bit of its usual m2 or mean, so the tests above could fail."""
    rng, differ = np.random.default_rng(0), 0
    x = rng.normal(size=(301, 1)).astype(np.float32)
    first = arraybn.moments(x)
    for _ in range(50):
        other = arraybn.moments(rng.permutation(x))
        differ += not same([first.mean, first.m2], [other.mean, other.m2])
    assert differ > 10


def test_x2_one_bit_of_one_value_is_seen() -> None:
    x = np.random.default_rng(0).normal(size=(301, 1)).astype(np.float32)
    before = arraybn.moments(x, exact=True)
    seen = 0
    for index in range(x.size):
        other = x.copy()
        other.view(np.int32)[index] ^= 1
        seen += exact._totals(arraybn.moments(other, exact=True).record) != exact._totals(before.record)
    assert seen == x.size


@pytest.mark.parametrize("evaluation", [False, True])
def test_x2_fixed_statistics_give_the_same_bits_on_each_backend(evaluation: bool) -> None:
    need("numba")
    x, dy, weight, bias = drawn(1, (9, 70, 20), np.random.default_rng(0).normal(size=(9, 70, 20)))
    fixed = {"mean": np.linspace(-1, 1e300 if evaluation else 1, 70), "var": np.linspace(0, 5, 70)}
    results = []
    for kernels in ("reference", "cpu", "cuda"):
        with np.errstate(over="ignore"), served_by(kernels) as module:
            y, saved = arraybn.batch_norm(x, weight, bias, **fixed, exact=True, kernels=module)
            results.append([y, *arraybn.batch_norm_backward(dy, saved)])
    assert all(same(found, results[0]) for found in results[1:])


def test_x2_a_training_has_the_same_bits_on_one_to_five_ranks(monkeypatch: Any) -> None:
    need("numba")
    need("sklearn")
    digits = load_digits(0)
    digits = digits._replace(train_images=digits.train_images[:60], train_labels=digits.train_labels[:60])

    def work(comm: Any) -> str:
        return checksum(trained(digits, 0, 1, comm.rank, comm.size, comm))

    sums = {
        checksum(trained(digits, 0, 1, 0, 1, None)),
        *(one for size in (2, 3, 5) for one in ThreadComm.run(size, work)),
    }
    assert len(sums) == 1
    other = digits._replace(train_images=digits.train_images + np.float32(1e-6))
    assert checksum(trained(other, 0, 1, 0, 1, None)) not in sums  # the control

    def rounded(model: Any, comm: Any, **options: Any) -> None:
        arraybn.average_gradients(model, comm, weight=None)

    monkeypatch.setattr("arraybn.commands._demo_exact.average_gradients", rounded)
    assert not sums.intersection(ThreadComm.run(3, work))


@settings(max_examples=30)
@given(st.data())
def test_x2_a_mask_leaves_out_exactly_for_any_split(data: st.DataObject) -> None:
    need("numba")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = (data.draw(st.integers(1, 20)), *data.draw(st.sampled_from([(3,), (2, 40), (4, 3, 3)])))
    name, values = data.draw(st.sampled_from(list(kinds(rng, shape))))
    x, dy, weight, bias = drawn(1, shape, values)
    where = rng.random((shape[0], *shape[2:])) < 0.6
    kept = np.broadcast_to(where[:, None], shape)
    alone = [np.moveaxis(a, 1, -1)[where] for a in (x, dy)]  # (n, C): what the mask keeps
    wanted = arraybn.moments(alone[0], exact=True)
    spoiled = np.where(kept, x, np.float32(np.nan))
    found = arraybn.moments(spoiled, where=where, exact=True)
    assert found.n == wanted.n
    assert same([found.mean, found.m2], [wanted.mean, wanted.m2]), name

    results = []
    for kernels in ("reference", "cpu", "cuda"):
        with served_by(kernels) as module:
            results.append(run(x, dy, weight, bias, where=where, kernels=module))
    assert all(same(found, results[0]) for found in results[1:]), name
    if where.any():
        y = np.moveaxis(results[0][0], 1, -1)[where]
        assert same([y], run(*alone, weight, bias)[:1]), name
    spoiled_dy = np.where(kept, dy, np.float32(0))
    y, dx, *rest = run(spoiled, spoiled_dy, weight, bias, where=where)
    clean_y, clean_dx, *clean = run(x, spoiled_dy, weight, bias, where=where)
    assert same([y[kept], dx, *rest], [clean_y[kept], clean_dx, *clean]), name  # a NaN in the padding reaches nothing

    cut = data.draw(st.integers(0, shape[0]))

    def work(comm: Any) -> list[Any]:
        part = [a[:cut] if comm.rank == 0 else a[cut:] for a in (x, dy, where)]
        with np.errstate(all="ignore"):
            y, saved = arraybn.batch_norm(part[0], weight, bias, exact=True, where=part[2], comm=comm)
            return [y, arraybn.batch_norm_backward(part[1], saved)[0], saved.moments.mean, saved.moments.m2]

    first, second = ThreadComm.run(2, work)
    together = [np.concatenate([a, b]) for a, b in zip(first[:2], second[:2], strict=True)]
    assert same([*together, *first[2:]], [*results[0][:2], *results[0][4:]]), name


def test_exact_mode_with_a_mask_agrees_with_the_usual_mode() -> None:
    x, dy, weight, bias = drawn(1, (50, 3, 40), np.random.default_rng(0).normal(3, 1, (50, 3, 40)))
    where = np.random.default_rng(1).random((50, 40)) < 0.5
    y, saved = arraybn.batch_norm(x, weight, bias, where=where)
    usual = [y, *arraybn.batch_norm_backward(dy, saved)]
    for ours, theirs in zip(run(x, dy, weight, bias, where=where), usual, strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_x2_running_statistics_take_no_backend_that_may_fuse_a_product_and_a_sum(monkeypatch: Any) -> None:
    x = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
    exact_moments, usual = arraybn.moments(x, exact=True), arraybn.moments(x)
    running = np.zeros(2, np.float32), np.ones(2, np.float32)

    def refuse(array: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("arraybn.statistics.select", refuse)
    mean, var = arraybn.update_running_stats(*running, exact_moments, 0.1)
    assert np.array_equal(mean, (0.1 * exact_moments.mean).astype(np.float32))
    assert np.array_equal(var, (0.9 + 0.1 * exact_moments.var(1)).astype(np.float32))
    with pytest.raises(AssertionError):  # the control
        arraybn.update_running_stats(*running, usual, 0.1)


# ---- Gradients over ranks --------------------------------------------------------------------------------------------


def averaged(parts: list[Any], weights: list[Any], *, exact: bool = True) -> list[Any]:
    """Return the gradient on each rank after an average of `parts`, one for each rank; None is no gradient."""

    def work(comm: Any) -> Any:
        layer = arraybn.BatchNorm1d(4)
        layer.bias.grad = parts[comm.rank]
        with np.errstate(all="ignore"):
            arraybn.average_gradients(layer, comm, weight=weights[comm.rank], exact=exact)
        return layer.bias.grad

    return ThreadComm.run(len(parts), work)


def test_x2_gradients_are_added_exactly_for_any_order_of_ranks() -> None:
    rng, differ, none = np.random.default_rng(0), 0, [None] * 5
    for _ in range(10):
        parts = (rng.normal(size=(5, 4)) * 2.0 ** rng.integers(-60, 60, (5, 4))).astype(np.float32)
        weights = rng.integers(1, arraybn.sync.replicas.MOST_SAMPLES, 5, endpoint=True)
        columns = [[Fraction(value) for value in column] for column in parts.astype(float).T]
        means = [sum(map(operator.mul, weights.tolist(), column)) / int(weights.sum()) for column in columns]
        for wanted, counts in ((map(sum, columns), none), (means, weights)):
            rounded = np.asarray([nearest(value) for value in wanted]).astype(np.float32)
            for order in (range(5), rng.permutation(5)):
                assert same(averaged([parts[i] for i in order], [counts[i] for i in order]), [rounded] * 5)
        cancelling = [*parts[:2], -parts[0], *parts[2:4]]
        orders = [cancelling, cancelling[::-1]]
        differ += not same(*(averaged(order, none, exact=False) for order in orders))
        assert same(*(averaged(order, none) for order in orders))
    assert differ  # a bit of the usual sums


def test_gradients_that_are_none_weightless_or_not_finite_count_as_in_the_usual_mode() -> None:
    one, bad = np.asarray([1.0, 2.0, -0.0, 3e38], np.float32), np.asarray([np.nan, np.inf, -np.inf, 3e38], np.float32)
    for parts, weights in [
        ([one, None, bad], [None] * 3),
        ([one, None, bad], [1, 2, 0]),
        ([one, bad, -bad], [1, 2, 3]),
        ([None, None], [1, 1]),
        ([one, one], [0, 0]),
    ]:
        for ours, theirs in zip(averaged(parts, weights), averaged(parts, weights, exact=False), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("options", [{"exact": (True, False)}, {"weight": (1, None)}])
def test_ranks_agree_on_the_way_in_which_gradients_are_added(options: dict[str, Any]) -> None:
    def work(comm: Any) -> str:
        own = {"weight": 1, **{name: values[comm.rank] for name, values in options.items()}}
        with pytest.raises(arraybn.SyncError) as caught:
            arraybn.average_gradients(arraybn.BatchNorm1d(2), comm, **own)
        return str(caught.value)

    (name,) = options
    assert all(f"disagree on {name}" in text for text in ThreadComm.run(2, work))


def test_x2_gradients_of_several_backwards_are_those_of_one_rank() -> None:
    """Three batches, their gradients added up: each sum and each sum of sums is independent of the split."""
    x, dy, weight, bias = drawn(1, (30, 3), np.random.default_rng(0).normal(size=(30, 3)))

    def work(comm: Any, halve: bool = False) -> Any:
        layer = arraybn.SyncBatchNorm(3, exact=True, process_group=comm)
        layer.weight.data, layer.bias.data = weight, bias.astype(np.float32)
        rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
        for start in (0, 10, 20):
            mine = np.array_split(np.arange(start, start + 10), size)[rank]
            layer(x[mine])
            layer.backward(dy[mine])
        if halve:
            layer.bias.grad = layer.bias.grad / 2
            assert layer.bias.terms is None
        return gradients(layer, comm)

    wanted = work(None)
    assert all(same(found, wanted) for size in (2, 3, 11) for found in ThreadComm.run(size, work))
    for found in ThreadComm.run(2, lambda comm: work(comm, halve=True)):  # a gradient that the user has changed counts
        assert same(found[:1], wanted[:1])
        np.testing.assert_allclose(found[1], wanted[1] / 2, rtol=1e-6)


def test_terms_go_where_a_gradient_comes_without_them() -> None:
    parameter = arraybn.Parameter(np.zeros(2, np.float32))
    one = np.ones(2)
    parameter.accumulate(one, [one, 0 * one])
    parameter.accumulate(one, [])
    assert [term.tolist() for term in parameter.terms] == [[1, 1], [0, 0]]
    assert pickle.loads(pickle.dumps(parameter)).grad.tolist() == [2, 2]
    parameter.accumulate(one)
    assert parameter.terms is None
    parameter.accumulate(one, [one])  # the terms would not be all of the gradient
    assert parameter.terms is None
    parameter.grad = None
    parameter.accumulate(one, [one])
    assert len(parameter.terms) == 1


# ---- NaN and infinity: as in the usual mode --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 2, 40), (30, 3)])
def test_what_is_not_finite_spreads_as_in_the_usual_mode(shape: Any) -> None:
    rng = np.random.default_rng(0)
    for name, data in not_finite(rng, shape):
        x, dy, weight, bias = drawn(1, shape, rng.normal(size=shape))
        for bad_x, bad_dy in ((data.astype(np.float32), dy), (x, data.astype(np.float32))):
            found = run(bad_x, bad_dy, weight, bias)
            with np.errstate(all="ignore"):
                y, saved = arraybn.batch_norm(bad_x, weight, bias, kernels="reference")
                usual = [y, *arraybn.batch_norm_backward(bad_dy, saved), saved.moments.mean, saved.moments.m2]
            for ours, theirs in zip(found, usual, strict=True):
                np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs), err_msg=name)
                np.testing.assert_array_equal(np.isposinf(ours), np.isposinf(theirs), err_msg=name)


# ---- The interface ---------------------------------------------------------------------------------------------------


def test_exact_mode_is_as_accurate_as_the_usual_one() -> None:
    x, dy, weight, bias = drawn(1, (50, 3, 40), np.random.default_rng(0).normal(3, 1, (50, 3, 40)))
    y, saved = arraybn.batch_norm(x, weight, bias)
    usual = [y, *arraybn.batch_norm_backward(dy, saved)]
    for ours, theirs in zip(run(x, dy, weight, bias), usual, strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_e10_pool_of_exact_moments_is_exact_and_associative() -> None:
    x = (np.random.default_rng(0).normal(size=(90, 2)) * 10.0 ** np.arange(-40, 50)[:, None] / 1e13).astype(np.float32)
    a, b, c = (arraybn.moments(part, exact=True) for part in np.split(x, [20, 50]))
    whole = arraybn.moments(x, exact=True)
    for pooled in (arraybn.pool(arraybn.pool(a, b), c), arraybn.pool(a, arraybn.pool(b, c)), arraybn.pool(c, b, a)):
        assert pooled.n == whole.n
        assert same([pooled.mean, pooled.m2], [whole.mean, whole.m2])
        assert exact._totals(pooled.record) == exact._totals(whole.record)
    mixed = arraybn.pool(a, arraybn.moments(x[20:]))
    assert mixed.record is None
    again = pickle.loads(pickle.dumps(whole))
    assert same([again.record], [whole.record])


def test_second_derivatives_after_an_exact_forward_take_usual_sums() -> None:
    x, dy, weight, bias = drawn(1, (6, 3), np.random.default_rng(0).normal(size=(6, 3)))
    for options in ({}, {"mean": np.zeros(3), "var": np.ones(3)}):
        _, saved = arraybn.batch_norm(x, weight, bias, exact=True, **options)
        _, usual = arraybn.batch_norm(x, weight, bias, **options)
        np.testing.assert_allclose(arraybn.batch_norm_jvp(dy, saved), arraybn.batch_norm_jvp(dy, usual), rtol=1e-4)
        ours, theirs = (arraybn.batch_norm_double_backward(x, dy, s)[1] for s in (saved, usual))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)

    def work(comm: Any) -> Any:
        _, saved = arraybn.batch_norm(x[3 * comm.rank :][:3], weight, bias, exact=True, comm=comm)
        return arraybn.batch_norm_jvp(dy[3 * comm.rank :][:3], saved)

    _, saved = arraybn.batch_norm(x, weight, bias)
    np.testing.assert_allclose(np.concatenate(ThreadComm.run(2, work)), arraybn.batch_norm_jvp(dy, saved), rtol=1e-4)


X32 = np.ones((3, 2), np.float32)
WRONG = [
    (
        lambda: arraybn.batch_norm(np.ones((3, 2)), exact=True),
        TypeError,
        "x: expected float16, bfloat16 or float32 for e",
    ),
    (lambda: arraybn.moments(np.ones((3, 2)), exact=True), TypeError, "x: expected float16, .*got float64"),
    (lambda: arraybn.batch_norm(X32, exact=1), TypeError, "exact: expected True or False; got 1"),
    (lambda: arraybn.BatchNorm1d(2, exact=None), TypeError, "exact: expected True or False; got None"),
    (
        lambda: arraybn.batch_norm_backward(np.ones((3, 2)), arraybn.batch_norm(X32, exact=True)[1]),
        TypeError,
        "dy: expected float16, bfloat16 or float32 for exact=True",
    ),
    (
        lambda: arraybn.batch_norm(X32, moments=arraybn.moments(X32), exact=True),
        ValueError,
        "moments: expected those of",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), WRONG)
def test_a_wrong_call_says_what_was_expected(call: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_sums_of_usual_forwards_are_refused_in_exact_mode() -> None:
    whole = arraybn.moments(X32, exact=True)
    _, exact_saved = arraybn.batch_norm(X32, moments=whole, exact=True)
    _, usual = arraybn.batch_norm(X32, moments=whole)
    with pytest.raises(ValueError, match="sums: expected those of exact forwards"):
        arraybn.batch_norm_backward(X32, exact_saved, sums=arraybn.batch_norm_sums(X32, usual))


def test_a_layer_in_exact_mode_shows_it_and_ranks_agree_on_it() -> None:
    assert "exact=True" in repr(arraybn.BatchNorm1d(2, exact=True))

    def work(comm: Any) -> str:
        layer = arraybn.SyncBatchNorm(2, exact=comm.rank == 0, process_group=comm)
        with pytest.raises(arraybn.SyncError) as caught:
            layer(X32)
        return str(caught.value)

    assert "exact" in ThreadComm.run(2, work)[0]


def test_an_empty_batch_and_one_value_are_as_in_the_usual_mode() -> None:
    y, saved = arraybn.batch_norm(X32[:0], exact=True)
    assert y.shape == (0, 2)
    assert saved.moments.n == 0
    assert np.array_equal(saved.moments.mean, [0, 0])
    dx, _, dbias = arraybn.batch_norm_backward(X32[:0], arraybn.batch_norm(X32[:0], bias=np.ones(2), exact=True)[1])
    assert dx.shape == (0, 2)
    assert np.array_equal(dbias, [0, 0])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        arraybn.BatchNorm1d(2, exact=True)(X32[:1])


# ---- Planted faults: each makes a check above fail -------------------------------------------------------------------


def agrees() -> bool:
    """Return whether the compiled sums are those of the reference on all kinds, in both layouts."""
    from arraybn.kernels.cpu import exact as compiled

    rng = np.random.default_rng(0)
    for shape in ((3, 1, 3000), (2, 1, 40), (40, 2, 3)):
        for name, data in kinds(rng, shape):
            if math.prod(shape) > 5000 and name not in ("normal", "constant"):  # without compiling, each takes a second
                continue
            x, n = data.astype(np.float32), shape[0] * shape[2]
            with np.errstate(over="ignore"):  # sums of bits, modulo 2^64
                ours, wanted = compiled.squares(x), exact.squares(x)
                found = compiled.mean_and_m2(ours, n)
            if exact._totals(ours) != exact._totals(wanted) or not same([found], [exact.mean_and_m2(wanted, n)]):
                return False
    return True


FAULTS = {  # name: (the text in kernels/cpu/exact.py, its replacement)
    "a grid one bit too coarse": ("VALUE_GRID, PRODUCT_GRID = 49, 50", "VALUE_GRID, PRODUCT_GRID = 48, 50"),
    "a grid of products too coarse": ("VALUE_GRID, PRODUCT_GRID = 49, 50", "VALUE_GRID, PRODUCT_GRID = 49, 47"),
    "a carry lost": ("record[k + 1, c] += (low >> BITS) + (high & _MASK)", "record[k + 1, c] += high & _MASK"),
    "a window of 27 exponents": ("VALUE_WINDOW, PRODUCT_WINDOW = 26, 52", "VALUE_WINDOW, PRODUCT_WINDOW = 27, 54"),
    "a block too long": ("CHUNK = 8192", "CHUNK = 16384"),
    "a slow path never taken": ("return 0 if fits else windows", "return 0"),
    "an error that is not looked at": ("_ERROR = 2.0**-96", "_ERROR = 0.0"),
}  # fmt: skip


def test_e10_the_compiled_sums_agree_with_the_reference() -> None:
    need("numba")
    assert agrees()


@pytest.mark.parametrize("name", FAULTS)
def test_e10_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    need("numba")
    package = tmp_path / "arraybn"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = package / "kernels" / "cpu" / "exact.py"
    text, (old, new) = source.read_text(encoding="utf-8"), FAULTS[name]
    assert text.count(old) == 1
    source.write_text(text.replace(old, new), encoding="utf-8")
    code = "import test_exact; print('agrees' if test_exact.agrees() else 'differs')"
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "differs", done.stderr


# ---- Planted faults in the CUDA source -------------------------------------------------------------------------------

_UNFUSED = "a * (float_to_double(x) - mean) + c"
_UNFUSED2 = "a * float_to_double(u) + (b * (float_to_double(x) - mean) + c)"
CUDA_FAULTS = {  # name: (the text in kernels/cuda/exact.cu, its replacement)
    "a carry lost": ("(low >> 32) + (last", "(last"),
    "a grid that holds 28 exponents": ("Span { enum { EXPONENTS = 27 }; };", "Span { enum { EXPONENTS = 28 }; };"),
    "more steps than an int64 holds": ("MOST_STEPS = 8160", "MOST_STEPS = 81600"),
    "a slow path never taken": ("if (__any_sync(ALL_LANES, !fits || count", "if (__any_sync(ALL_LANES, count"),
    "lanes left out": ("step >= columns; step /= 2) steps +=", "step > columns; step /= 2) steps +="),
    "a subnormal number counted twice": ("top < -125 ? 0 : power_of_two(top)", "power_of_two(top)"),
    "a rest that is not looked at": ("rest = rest || (*this)[i];", "rest = rest;"),
    "a product and a sum fused": (_UNFUSED, "fma(a, float_to_double(x) - mean, c)"),
    "the other product fused": (_UNFUSED2, "fma(a, float_to_double(u), b * (float_to_double(x) - mean) + c)"),
}


def cuda_agrees(changed: tuple[str, str] | None = None) -> bool:
    """Return whether the CUDA kernels, with a text of their source changed, agree with the reference."""
    import shim

    from arraybn.kernels.cuda import exact as compiled

    few = [k for k in shim.exact_kernels("planes") if k.entry.endswith(("float32_4", "squares_planes_float16_8", "_1"))]
    few = [k for k in few if k.width > 1 or "record" in k.name]
    library = shim.build(tuple(few), "-O0", changed=changed)
    rng, shape, zero = np.random.default_rng(0), (2, 1, 40), np.zeros(1)
    with served_by("cuda", library) as cuda, pytest.MonkeyPatch.context() as patch:
        for _, data in kinds(rng, shape):
            x, dy, weight, bias = drawn(1, shape, data)
            dy[0, 0, :4] = 1.0, 2.0**-53, 2.0**-100, 0.0  # a tie of Σdy that the last bit breaks
            dy[0, 0, 4:] = dy[1] = 0.0
            if not same(run(x, dy, weight, bias, kernels=cuda), run(x, dy, weight, bias, kernels="reference")):
                return False
            if exact._totals(compiled.squares(x)) != exact._totals(exact.squares(x)):
                return False
        a, x = rng.normal(size=1), rng.normal(size=shape).astype(np.float32)
        x[...] = x[0, 0, 0]  # the products below are rounded, and nothing but their rounding would be left
        c = -a * x[0, 0, 0]
        if np.any(compiled.affine(x, zero, a, c)) or np.any(compiled.affine2(x, x, zero, a, zero, c)):
            return False
        importlib.import_module("support.kernels").set_sizes(patch, cuda, {"PART": 2**20, "MIN_BLOCK_BYTES": 2**20})
        large = np.full((1, 1, 140_000), 65504, np.float16)
        return exact._totals(compiled.squares(large)) == exact._totals(exact.squares(large))


def test_e10_the_cuda_sums_agree_with_the_reference() -> None:
    assert cuda_agrees()


@pytest.mark.parametrize("name", CUDA_FAULTS)
def test_e10_a_planted_fault_in_the_cuda_source_is_found(name: str) -> None:
    assert not cuda_agrees(CUDA_FAULTS[name])

"""The compiled kernels for NumPy arrays: every way that data can be cut, threads, memory, and the cache on disk.

``test_the_kernels_are_right_uncompiled_as_well`` runs the first part again without the compiler, so that coverage sees
the loops and an index out of range is an error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.libraries import need

import arraybn
from arraybn import reference
from arraybn._arrays.namespaces import FLOATS

need("numba")
from arraybn.kernels import cpu  # noqa: E402, needs numba
from arraybn.kernels import threads as pool  # noqa: E402, needs numba
from arraybn.kernels.cpu import entries, tiles  # noqa: E402

ROOT = Path(__file__).parents[1]
COMPILED = os.environ.get("NUMBA_DISABLE_JIT") != "1"
DTYPES = ["float16", "bfloat16", "float32", "float64"] if COMPILED else ["float32"]

# (N, C, S), and the sizes of cpu.py that make the cut what the name says, where the real ones need larger data
CUTS: dict[str, tuple[tuple[int, int, int], dict[str, int]]] = {
    "one value a channel": ((1, 3, 1), {}),
    "one channel": ((37, 1, 9), {}),
    "one channel, one value a row": ((70, 1, 1), {}),
    "rows side by side, and some left over": ((67, 5, 3), {}),
    "more short planes than a run takes": ((5, 350, 7), {}),
    "channels-last": ((150, 24, 1), {}),
    "channels-last in tiles": ((600, 24, 1), {"LEAST": 4096, "TILE": 4096}),
    "channels-last in groups": ((30, 40, 1), {"LEAST": 512, "TILE": 4096, "RUN": 16}),
    "planes": ((9, 3, 49), {}),
    "planes in groups": ((9, 7, 33), {"LEAST": 2048, "TILE": 4096}),
    "planes in tiles": ((150, 3, 40), {"LEAST": 512, "TILE": 2048}),
    "long planes, cut into pieces": ((2, 2, 8200), {}),
    "long planes in tiles": ((1, 2, 16500), {"LEAST": 4096, "TILE": 4096}),
}


if not COMPILED:  # the same cuts of less data, because every step is one of Python, and is counted
    tiles.PIECE = cpu.PIECE = 64
    tiles.BLOCK = cpu.BLOCK = 4
    CUTS |= {
        "channels-last": ((20, 24, 1), {}),
        "channels-last in tiles": ((40, 24, 1), {"LEAST": 1024, "TILE": 1024}),
        "more short planes than a run takes": ((3, 350, 7), {}),
        "planes in tiles": ((20, 3, 40), {"LEAST": 512, "TILE": 1024}),
        "long planes, cut into pieces": ((2, 2, 72), {}),
        "long planes in tiles": ((1, 2, 330), {"LEAST": 256, "TILE": 256}),
    }


@pytest.fixture(params=CUTS)
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(N, C, S), cut as the name says."""
    shape, sizes = CUTS[request.param]
    for name, value in sizes.items():
        monkeypatch.setattr(cpu, name, value)
    cpu._cut.cache_clear()
    yield shape
    cpu._cut.cache_clear()


def data(shape: tuple[int, ...], dtype: str, seed: int = 0, offset: float = 3.0) -> Any:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) + offset
    return values.astype(need("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)


def coefficients(channels: int) -> Any:
    return np.random.default_rng(9).standard_normal((4, channels))


# Between two numbers that are added stand at most so many other additions: PIECE/32 in a run of 32 sums at once, BLOCK
# runs, some rows of blocks, halves of tiles. Each rounds by 2⁻⁵³ of what has been added up.
SUM = 600 * 2.0**-53


def assert_sum(got: Any, terms: Any) -> None:
    """`got` (C,) is the sum of `terms` (N, C, S), long double."""
    assert got.dtype == np.float64
    bound = SUM * np.abs(terms).sum(axis=(0, 2))
    exact = terms.sum(axis=(0, 2))
    assert np.all(np.abs(got - exact) <= bound)
    wrong = np.abs(got * 1.001 + 1e-3 * bound - exact) <= bound
    assert not np.all(wrong) or np.all(exact == 0)  # the control: wrong by 0.1 %


def assert_map(got: Any, exact: Any, scale: Any, dtype: Any) -> None:
    """`got` is `exact`, long double, rounded once from float64 arithmetic on terms no larger than `scale`."""
    assert got.dtype == dtype
    spacing = float(need("ml_dtypes").finfo(dtype).eps)
    wide = got.astype(np.float64).astype(np.longdouble)
    bound = 4 * 2.0**-53 * scale + 0.51 * spacing * np.abs(exact) + 2.0**-25
    assert np.all(np.abs(wide - exact) <= bound)
    assert np.any(np.abs(wide * 1.05 - exact) > bound)  # the control; bfloat16 has three digits


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sweeps_are_exact_to_rounding_however_the_data_is_cut(shape: Any, dtype: str) -> None:
    u, x = data(shape, dtype, 1, 0.5), data(shape, dtype)
    exact_u, exact_x = (array.astype(np.float64).astype(np.longdouble) for array in (u, x))
    n, channels = shape[0] * shape[2], shape[1]
    mean, m2 = cpu.moments(x)
    exact_mean = (exact_x.sum(axis=(0, 2)) / n)[:, None]
    assert np.all(np.abs(mean - exact_mean[:, 0]) <= SUM * np.abs(exact_x).max(axis=(0, 2)))
    exact_m2 = ((exact_x - exact_mean) ** 2).sum(axis=(0, 2))
    assert np.all(np.abs(m2 - exact_m2) <= 4 * SUM * exact_m2)
    assert n == 1 or np.all(np.abs(1.001 * m2 - exact_m2) > 4 * SUM * exact_m2)  # the control

    s, q = cpu.dots(u, x, mean)
    assert_sum(s, exact_u)
    assert_sum(q, exact_u * (exact_x - mean[:, None]))

    a, b, c, _ = (vector[:, None] for vector in coefficients(channels))
    d = exact_x - mean[:, None]
    assert_map(cpu.affine(x, mean, a[:, 0], c[:, 0]), a * d + c, abs(a * d) + abs(c), x.dtype)
    exact = a * exact_u + b * d + c
    got = cpu.affine2(u, x, mean, a[:, 0], b[:, 0], c[:, 0])
    assert_map(got, exact, abs(a * exact_u) + abs(b * d) + abs(c), x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_sweeps_at_once_have_the_bits_of_one_after_the_other(shape: Any, dtype: str) -> None:
    dy, x = data(shape, dtype, 1, 0.5), data(shape, dtype)
    n, eps = shape[0] * shape[2], 1e-5
    for weight, bias in [(None, None), coefficients(shape[1])[:2]]:
        mean, m2, rstd, y = cpu.forward(x, weight, bias, eps)
        assert all(map(np.array_equal, (mean, m2), cpu.moments(x)))
        np.testing.assert_array_equal(rstd, reference.rstd(m2 / n, eps))
        np.testing.assert_array_equal(y, cpu.affine(x, mean, *reference.normalize(rstd, weight, bias)))

        dx, dweight, dbias = cpu.backward(dy, x, mean, rstd, weight)
        sums = reference.parameter_gradients(*cpu.dots(dy, x, mean), rstd)
        assert all(map(np.array_equal, (dweight, dbias), sums))
        expected = cpu.affine2(dy, x, mean, *reference.input_gradient(dweight, dbias, n, rstd, weight))
        np.testing.assert_array_equal(dx, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_in_place_has_the_same_bits(shape: Any, dtype: str) -> None:
    dy, x = data(shape, dtype, 1, 0.5), data(shape, dtype)
    mean, _, rstd, y = cpu.forward(x, None, None, 1e-5)
    dx = cpu.backward(dy, x, mean, rstd, None)[0]
    for target in ("dy", "x"):
        inputs = {"dy": dy.copy(), "x": x.copy()}
        result = cpu.backward(**inputs, mean=mean, rstd=rstd, weight=None, out=inputs[target])[0]
        assert result is inputs[target]
        np.testing.assert_array_equal(result, dx)
    target = x.copy()
    assert cpu.forward(target, None, None, 1e-5, target)[3] is target
    np.testing.assert_array_equal(target, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_digit_is_lost_where_the_first_values_are_far_from_the_mean(shape: Any, dtype: str) -> None:
    x = data(shape, dtype, offset=0.0)
    x[:1, :, :8] = 1e4  # the shift of the first attempt
    exact = x.astype(np.float64).astype(np.longdouble)
    _, m2 = cpu.moments(x)
    m2_exact = ((exact - (exact.sum(axis=(0, 2)) / (shape[0] * shape[2]))[:, None]) ** 2).sum(axis=(0, 2))
    assert np.all(np.abs(m2 - m2_exact) <= 4 * SUM * m2_exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_channel_that_is_summed_again_changes_no_bit_of_the_others(shape: Any, dtype: str) -> None:
    if shape[1] == 1:
        pytest.skip("there is no other channel")
    x = data(shape, dtype)
    mean, m2 = cpu.moments(x)
    x[:1, 0, :8] = 1e4
    other_mean, other_m2 = cpu.moments(x)
    np.testing.assert_array_equal(other_mean[1:], mean[1:])
    np.testing.assert_array_equal(other_m2[1:], m2[1:])


def test_the_shift_is_tried_again_only_where_it_was_far() -> None:
    sums = {"near": (np.array([1.0]), np.array([10.0])), "far": (np.array([90.0]), np.array([1000.0]))}
    for name, (s, q) in sums.items():
        assert entries.compiled("d").finish(10, np.array([7.0]), s, q) == (name == "far")
        assert s == 7 + {"near": 0.1, "far": 9.0}[name]
    both = np.array([90.0, 1.0]), np.array([1000.0, 10.0])
    assert entries.compiled("d").finish(10, np.array([7.0, 7.0]), *both)  # the near one does not hide the far one
    for s, q, m2 in [(2.0, 0.4 - 1e-16, 0.0), (np.nan, 1.0, np.nan), (np.inf, np.inf, np.nan)]:
        vectors = np.array([s]), np.array([q])
        with np.errstate(invalid="ignore"):  # said by NumPy alone, where nothing is compiled
            entries.compiled("d").finish(10, np.array([0.0]), *vectors)
        np.testing.assert_array_equal(vectors[1], [m2])  # never negative, and NaN stays NaN


@pytest.mark.skipif(not COMPILED, reason="so many values take too long without the compiler")
@pytest.mark.parametrize("shape", [(2**22, 1, 1), (2**16, 1, 64), (1, 1, 2**22), (2**21, 2, 1)])
def test_rounding_hardly_grows_with_the_number_of_values(shape: tuple[int, int, int]) -> None:
    x = data(shape, "float64")
    exact = x.astype(np.longdouble)
    mean, m2 = cpu.moments(x)
    exact_m2 = ((exact - exact.mean(axis=(0, 2), keepdims=True)) ** 2).sum(axis=(0, 2))
    s, _ = cpu.dots(x * x, x, mean)
    # Added one after the other, 2²² numbers of one sign are wrong by some 300·2⁻⁵³; in blocks of blocks, by a few.
    assert np.all(np.abs(m2 / exact_m2 - 1) <= 16 * 2.0**-53)
    assert np.all(np.abs(s / ((x * x).astype(np.longdouble)).sum(axis=(0, 2)) - 1) <= 16 * 2.0**-53)
    running = np.add.accumulate(((x - mean[:, None]) ** 2)[:, 0].ravel())[-1]
    assert abs(running / exact_m2[0] - 1) > 16 * 2.0**-53  # the control: one after the other


def test_nan_and_inf_stay_in_their_channel(shape: Any) -> None:
    if shape[1] == 1:
        pytest.skip("there is no other channel")
    x = data(shape, "float32")
    clean = cpu.forward(x, None, None, 1e-5)
    for value in (np.nan, np.inf, -np.inf):
        x[-1, 0, -1] = value
        with np.errstate(invalid="ignore"):  # said by NumPy alone, where nothing is compiled
            mean, m2, _, y = cpu.forward(x, None, None, 1e-5)
        np.testing.assert_array_equal(mean[0], value)
        assert np.isnan(m2[0])
        assert np.all(np.isnan(y[:, 0]))
        np.testing.assert_array_equal(mean[1:], clean[0][1:])
        np.testing.assert_array_equal(y[:, 1:], clean[3][:, 1:])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_precision_number_is_read_and_rounded_as_by_numpy(dtype: str) -> None:
    kind = data((1,), dtype).dtype
    x = np.arange(0, 2**16, 1 if COMPILED else 128, dtype=np.uint16).view(kind).reshape(-1, 2, 1)
    one, zero = np.ones(2), np.zeros(2)
    with np.errstate(invalid="ignore"):
        y = cpu.affine(x, zero, one, zero)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
        np.testing.assert_array_equal(y.astype("f4")[~np.isnan(x)], x.astype("f4")[~np.isnan(x)])
        third = cpu.affine(x, zero, one / 3, zero)
        with np.errstate(over="ignore"):
            expected = (x.astype(np.float64) / 3).astype(np.float32).astype(kind)
    np.testing.assert_array_equal(third.astype("f4"), expected.astype("f4"))
    if not COMPILED:
        return
    wide = np.array([70000.0, 3.4e38, 65519.9, 65520.0, 1e-8, -1e-8]).reshape(-1, 1, 1)
    with np.errstate(over="ignore"):
        c = wide.astype(np.float32).astype(kind)
    nothing = np.zeros((1, 1, 1), kind)
    got = [cpu.affine(nothing, zero[:1], one[:1], value).item() for value in wide.reshape(-1, 1)]
    np.testing.assert_array_equal(got, c.ravel().astype("f4"))


def test_running_statistics_have_the_bits_of_the_reference() -> None:
    vectors = coefficients(11)
    for old_mean, old_var in [("float32", "float32"), ("float64", "float64"), ("float32", "float64"), ("float16",) * 2]:
        mean, var = vectors[0].astype(old_mean), vectors[1].astype(old_var)
        wide = np.repeat(vectors[2:], 2, axis=1)[:, ::2]  # not contiguous
        got = cpu.update_running_stats(mean, var, *wide, 0.1)
        expected = (reference.update_running(mean, wide[0], 0.1), reference.update_running(var, wide[1], 0.1))
        for new, want, old in zip(got, expected, (mean, var), strict=True):
            assert new.dtype == old.dtype
            assert new is not old
            np.testing.assert_array_equal(new, want)


def test_arrays_that_a_kernel_cannot_take_as_they_are_give_the_same_bits() -> None:
    x = data((6, 4, 40), "float32")
    y = cpu.forward(x, None, None, 1e-5)[3]
    unaligned = np.frombuffer(b"_" + x.tobytes(), np.float32, offset=1).reshape(x.shape)
    strided = np.repeat(x, 2, axis=2)[:, :, ::2]
    for array in (unaligned, strided):
        assert not (array.flags.aligned and array.flags.c_contiguous)
        np.testing.assert_array_equal(cpu.forward(array, None, None, 1e-5)[3], y)
        target = array.copy() if array is strided else np.frombuffer(bytearray(x.nbytes + 1), np.float32, offset=1)
        target = target.reshape(x.shape)
        assert arraybn.batch_norm(x, eps=1e-5, out=target)[0] is target
        np.testing.assert_array_equal(target, y)
    frozen = x.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(cpu.forward(frozen, None, None, 1e-5)[3], y)


def test_nothing_in_gives_nothing_out() -> None:
    x = np.empty((0, 3, 5), np.float32)
    mean, m2, _, y = cpu.forward(x, None, None, 1e-5)
    dx, dweight, dbias = cpu.backward(x, x, mean, mean, None)
    assert y.shape == dx.shape == x.shape
    for vector in (mean, m2, dweight, dbias, *cpu.dots(x, x, mean)):
        np.testing.assert_array_equal(vector, np.zeros(3))


# ---- How the work is cut ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
def test_the_table_has_every_way_of_cutting(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, sizes = CUTS[cut]
    for name, value in sizes.items():
        monkeypatch.setattr(cpu, name, value)
    found = cpu._cut.__wrapped__(shape, 4)
    assert (found.group < shape[1]) == ("groups" in cut or "planes in tiles" in cut)
    assert (found.height < found.rows) == ("in tiles" in cut)
    assert (found.rows > shape[0]) == ("long planes" in cut)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_any_shape_is_cut_into_pieces_of_bounded_size(itemsize: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(2000):
        samples, channels, plane = (int(2 ** rng.uniform(0, limit)) for limit in (24, 13, 24))
        cut = cpu._cut.__wrapped__((samples, channels, plane), itemsize)
        assert 1 <= cut.group <= channels
        assert 1 <= cut.height <= cut.rows
        assert cut.n == samples * plane
        width = min(plane, tiles.PIECE) * itemsize
        tile = cut.group * min(cut.height, cut.rows) * width
        assert tile <= max(4 * cpu.TILE, cut.group * tiles.BLOCK * width if plane < tiles.LONG else width)
        partial_sums = -(-cut.rows // cut.height) * 16 * channels
        assert cut.height >= cut.rows or partial_sums <= samples * channels * plane * itemsize / 4


def test_large_data_has_more_tasks_than_threads() -> None:
    for shape in [(32, 64, 112 * 112), (32, 2048, 49), (32 * 112 * 112, 64, 1), (32 * 49, 2048, 1), (1, 1, 10**8)]:
        cut = cpu._cut.__wrapped__(shape, 4)
        apart = -(-cut.channels // cut.group)
        assert max(apart, -(-cut.rows // cut.height)) >= 4


@pytest.mark.skipif(not COMPILED, reason="4 GiB take too long without the compiler")
@pytest.mark.parametrize("shape", [(2**31 + 2**12, 1, 1), (3, 2, 2**29), (2**21, 2**10 + 8, 1)])
def test_places_beyond_2_31_are_reached(shape: tuple[int, int, int]) -> None:
    x = np.zeros(shape, np.float16)  # of pages that are not there until they are written
    x[-1, -1, -1] = 4.0
    mean, m2 = cpu.moments(x)
    n = shape[0] * shape[2]
    np.testing.assert_array_equal(mean, [*[0.0] * (shape[1] - 1), 4.0 / n])
    np.testing.assert_allclose(m2[-1], 16.0 - 16.0 / n, rtol=1e-12)
    cut, code = cpu._cut(shape, 2), entries.compiled("e")
    line, vector = x.reshape(-1).view(np.int16), np.ones(1)
    last = shape[1] - 1, cut.rows - 1, cut.rows
    code.affine(line, cut.sample, cut.plane, *last, 0 * vector, vector, vector, line, 1)
    assert x[-1, -1, -1] == 5.0
    assert x[0, 0, 0] == 0.0


# ---- Threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Any:
    """Leaves the number of threads as it was."""
    before = arraybn.get_num_threads()
    yield arraybn.set_num_threads
    arraybn.set_num_threads(before)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_n4_no_bit_depends_on_the_number_of_threads(axis: int, dtype: str, threads: Any) -> None:
    shapes = [(8, 40, 60, 50), (2, 3, 300, 300), (64, 9, 40, 3)]
    for shape in shapes if axis == 1 else [(40, 50, 30, 24), (300, 5, 5, 700)]:
        x, dy = data(shape, dtype), data(shape, dtype, 1)
        results = []
        for number in (1, 2, 3, 8):
            threads(number)
            y, saved = arraybn.batch_norm(x, channel_axis=axis)
            dx, _, _ = arraybn.batch_norm_backward(dy, saved)
            results.append([y.tobytes(), dx.tobytes(), saved.moments.mean.tobytes(), saved.moments.m2.tobytes()])
        assert results[0] == results[1] == results[2] == results[3]


@pytest.mark.parametrize("shape", [(8, 64, 80, 80), (2, 1, 1500, 1500)])
def test_two_threads_really_run(shape: tuple[int, ...], threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads(2)
    seen, meeting = set(), threading.Barrier(2, timeout=30)
    code = entries.compiled("f")
    entry = "forward" if shape[1] > 1 else "spread"  # of whole channels, or of tiles of one
    original = getattr(code, entry)

    def watched(*arguments: Any) -> Any:
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            meeting.wait()  # the first call of each thread waits for that of the other
        return original(*arguments)

    monkeypatch.setattr(code, entry, watched)
    arraybn.batch_norm(data(shape, "float32"))
    assert len(seen) == 2


def test_several_callers_at_once_get_the_bits_of_one(threads: Any) -> None:
    threads(3)
    batches = [data((4, 32, 70, 70 + k), "float32", k) for k in range(8)]
    alone = [arraybn.batch_norm(x)[0] for x in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            together = list(pool.map(lambda x: arraybn.batch_norm(x)[0], batches))
            for y, expected in zip(together, alone, strict=True):
                np.testing.assert_array_equal(y, expected)


def test_what_work_raises_is_raised_and_the_rest_is_left(threads: Any) -> None:
    for number in (1, 3):
        threads(number)
        done: list[int] = []

        def work(item: int, done: list[int] = done) -> None:
            if item == 5:
                raise ValueError("five")
            done.append(item)

        with pytest.raises(ValueError, match="five"):
            pool.run(work, range(1000))
        assert len(done) < 1000
        assert set(range(5)) <= set(done)
        done.clear()
        pool.run(done.append, range(1000))
        assert sorted(done) == list(range(1000))


def test_an_error_on_a_helper_stops_the_others_too(threads: Any) -> None:
    threads(2)
    caller, done = threading.get_ident(), []

    def work(item: int) -> None:
        time.sleep(0.001)
        if threading.get_ident() != caller:
            raise ValueError("helper")
        done.append(item)

    with pytest.raises(ValueError, match="helper"):
        pool.run(work, range(1000))
    assert len(done) < 500


def test_a_call_never_waits_for_helpers_that_are_busy_elsewhere(threads: Any) -> None:
    threads(2)
    release, held, done = threading.Event(), [threading.Event(), threading.Event()], []

    def hold(item: int) -> None:
        held[item].set()
        release.wait(30)

    first = threading.Thread(target=pool.run, args=(hold, range(2)))
    first.start()
    assert all(event.wait(30) for event in held)  # the only helper is one of them
    second = threading.Thread(target=pool.run, args=(done.append, range(10)))
    second.start()
    second.join(30)
    assert sorted(done) == list(range(10))
    release.set()
    first.join()


def test_the_number_of_threads_is_set_and_checked(threads: Any) -> None:
    threads(5)
    assert arraybn.get_num_threads() == 5
    for wrong, error in [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)]:
        with pytest.raises(error, match="threads: expected an integer"):
            arraybn.set_num_threads(wrong)  # type: ignore[arg-type]
        assert arraybn.get_num_threads() == 5


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, lambda cores: cores),
        ({"OMP_NUM_THREADS": "1"}, lambda cores: 1),
        ({"OMP_NUM_THREADS": "nonsense"}, lambda cores: cores),
        ({"OMP_NUM_THREADS": "100000"}, lambda cores: cores),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, lambda cores: max(1, min(cores, (os.cpu_count() or 1) // 2))),
        ({"MPI_LOCALNRANKS": "1000"}, lambda cores: 1),
    ],
)
def test_a_rank_takes_its_share_of_the_cores(
    variables: dict[str, str], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert pool._default_threads() == expected(cores)


def python(code: str, *arguments: str, **env: str) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_threads_of_its_own() -> None:
    code = """
        import os, threading, warnings
        import numpy, arraybn
        warnings.simplefilter("ignore")  # fork and threads: that is the point
        arraybn.set_num_threads(3)
        x = numpy.random.default_rng(0).standard_normal((8, 64, 50, 50)).astype("f4")
        y = arraybn.batch_norm(x)[0]
        assert threading.active_count() > 1
        child = os.fork()
        same = (arraybn.batch_norm(x)[0] == y).all() and threading.active_count() > 1
        if child == 0:
            os._exit(0 if same else 1)
        print(os.waitpid(child, 0)[1], same)
    """
    assert python(code).split() == ["0", "True"]


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of resident memory is read from /proc")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 64, 400, 320), (409600, 80)])
def test_t3_no_temporary_is_as_large_as_x(dtype: str, shape: tuple[int, ...]) -> None:
    code = """
        import json, sys
        import numpy, arraybn
        if sys.argv[2] == "bfloat16":
            import ml_dtypes
        def peak():
            with open("/proc/self/status") as file:
                return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024
        def calls(x, dy, y, dx):
            saved = arraybn.batch_norm(x, out=y)[1]
            arraybn.batch_norm_backward(dy, saved, out=dx)
            arraybn.batch_norm_backward(dy, saved, out=dy)
            mean = saved.moments.mean
            arraybn.batch_norm(x, mean=mean, var=mean, out=x)
            return saved.moments
        shape, dtype = json.loads(sys.argv[1]), numpy.dtype(sys.argv[2])
        calls(*(numpy.ones((4, *shape[1:]), dtype) for _ in range(4)))  # compiled, and the pool is there
        calls(*(numpy.ones((4, shape[1], 4), dtype) for _ in range(4)))
        arrays = [numpy.ones(shape, dtype) for _ in range(4)]
        before = peak()
        calls(*arrays)
        called = peak()
        y, saved = arraybn.batch_norm(arrays[0])
        print(json.dumps([arrays[0].nbytes, called - before, peak() - called]))
    """
    size, with_out, without = json.loads(python(code, json.dumps(shape), dtype))
    assert with_out < 0.2 * size
    assert 0.9 * size < without + with_out < 1.2 * size  # the result alone


# ---- Compiled code on disk -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_a_processor_without_float16_gets_the_reference_for_it() -> None:
    code = """
        import numpy, arraybn
        x = numpy.arange(6, dtype=numpy.float16).reshape(6, 1)
        print(arraybn.moments(x).mean, arraybn.moments(x.astype("f4")).mean)
    """
    assert python(code, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="").split() == ["[2.5]", "[2.5]"]


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_without_a_folder_for_the_cache_it_says_so_once_and_works() -> None:
    code = """
        import warnings
        import numba.core.caching, numpy
        numba.core.caching.CacheImpl._locator_classes = []
        import arraybn
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(arraybn.moments(numpy.asarray([[1.0], [3.0]])).mean, end=" ")
            arraybn.batch_norm(numpy.asarray([[1.0], [3.0]]))
        from arraybn.kernels.cpu.entries import cache_folder
        print(len(caught), caught[0].category.__name__, "NUMBA_CACHE_DIR" in str(caught[0].message), cache_folder())
    """
    assert python(code).split() == ["[2.]", "1", "RuntimeWarning", "True", "None"]


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_compiled_code_is_kept_elsewhere_where_the_package_cannot_be_written(tmp_path: Path) -> None:
    code = """
        import numpy, arraybn
        from arraybn.kernels.cpu.entries import cache_folder
        arraybn.moments(numpy.ones((2, 1)))
        print(cache_folder())
    """
    folder = Path(python(code, NUMBA_CACHE_DIR=str(tmp_path)).strip())
    assert folder.is_relative_to(tmp_path)
    assert list(folder.glob("entries._moments*.nbc"))


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_a_change_of_the_formulas_makes_compiled_code_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    class Codegen:
        @staticmethod
        def magic_tuple() -> tuple[str]:
            return ("cpu",)

    cache = entries._Cache(entries._forward, ())
    key = cache._index_key("signature", Codegen())
    assert key == cache._index_key("signature", Codegen())
    original = Path.read_bytes
    for changed in ("reference.py", "values.py", "tiles.py", "entries.py"):
        entries._sources.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, name=changed: original(path) + b"#" * (path.name == name))
            assert cache._index_key("signature", Codegen()) != key
    entries._sources.cache_clear()


@pytest.mark.skipif(not COMPILED, reason="it is the run that is started here")
def test_the_kernels_are_right_uncompiled_as_well() -> None:
    names = " or ".join(
        ["sweeps", "bits", "bit_of", "digit", "shift", "channel", "half", "running", "nothing", "array"]
    )
    first_part = f"({names}) and not callers and not beyond"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", first_part, "-p", "no:cacheprovider"]
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


def test_the_dtypes_are_all_of_them() -> None:
    assert {data((1,), name).dtype.char for name in FLOATS} == set(entries._STORED)


# ---- From the review of the kernels ----


@pytest.mark.skipif(not COMPILED, reason="so many values take too long without the compiler")
@pytest.mark.parametrize("shape", [(2**22, 1, 1), (1, 1, 2**22), (2**18, 1, 16), (2**19, 8, 1)])
@pytest.mark.parametrize("order", ["halves", "random"])
def test_n2_float64_of_two_values_whose_sums_round_the_same_way(shape: tuple[int, int, int], order: str) -> None:
    n, channels = shape[0] * shape[2], shape[1]
    high = np.arange(np.prod(shape)) < n * channels // 2 if order == "halves" else None
    high = (np.random.default_rng(0).random(shape) < 0.5) if high is None else high.reshape(shape)
    x = np.where(high, 0.1, 0.0)
    count = high.sum(axis=(0, 2)).astype(np.longdouble)  # so mean and m2 need no sum
    mean = count * np.longdouble(0.1) / n
    m2 = count * (np.longdouble(0.1) - mean) ** 2 + (n - count) * mean**2
    rstd = 1 / np.sqrt(m2 / n + np.longdouble(1e-5))
    exact = (x - mean[:, None]) * rstd[:, None]
    scale = abs(exact).max(axis=(0, 2))
    error = abs(arraybn.batch_norm(x)[0] - exact).max(axis=(0, 2)) / np.spacing(scale.astype("f8"))
    assert np.all(error <= 16 * (1 + mean / np.sqrt(m2 / n)))


@pytest.mark.parametrize("how", ["threading.Thread(target=work).start()", "atexit.register(work)"])
def test_a_call_while_the_interpreter_ends_does_without_helpers(how: str) -> None:
    code = f"""
        import atexit, threading, time
        import numpy, arraybn
        arraybn.set_num_threads(2)
        x = numpy.ones((8, 64, 80, 80), "f4")
        arraybn.batch_norm(x)
        def work():
            for _ in range(5):
                arraybn.batch_norm(x)
                time.sleep(0.05)  # so that the main thread has ended
            print("done")
        {how}
    """
    assert python(code).strip() == "done"


def test_running_statistics_take_moments_of_any_floating_dtype() -> None:
    for mean, var in [("f4", "f4"), (">f8", ">f8"), ("f2", "f2"), ("f8", "f4")]:
        batch = arraybn.Moments(5, np.ones(2, mean), np.full(2, 4.0, var))
        new_mean, new_var = arraybn.update_running_stats(np.zeros(2), np.ones(2), batch, 0.5)
        assert new_mean.dtype == new_var.dtype == np.float64
        np.testing.assert_allclose([new_mean, new_var], [[0.5] * 2, [1.0] * 2])


def test_an_empty_batch_takes_out() -> None:
    x = np.empty((0, 3, 5), np.float32)
    out = np.empty_like(x)
    y, saved = arraybn.batch_norm(x, out=out)
    assert y is out
    assert arraybn.batch_norm_backward(x, saved, out=out)[0] is out


def test_squares_beyond_float64_are_inf_as_in_numpy(shape: Any) -> None:
    if shape[0] * shape[2] == 1:
        pytest.skip("one value has no spread")
    x = data(shape, "float64")
    x[-1, 0, -1] = 1e200
    with np.errstate(over="ignore"):  # said by NumPy alone, where nothing is compiled
        assert cpu.moments(x)[1][0] == np.inf
    with np.errstate(over="ignore"):
        assert reference.moments(x)[1][0] == np.inf


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_two_dtypes_that_are_kept_at_once_do_not_take_each_others_files(tmp_path: Path) -> None:
    code = """
        import sys, time
        import numba.core.caching as caching
        index, data, name = caching.IndexDataCacheFile._save_index, caching.IndexDataCacheFile._save_data, sys.argv[1]
        early, late = {"f": (1, 5), "d": (3, 0)}[name]  # both read the index before one writes it
        caching.IndexDataCacheFile._save_index = lambda *a: (time.sleep(early), index(*a))[1]
        caching.IndexDataCacheFile._save_data = lambda *a: (time.sleep(late), data(*a))[1]
        from arraybn.kernels.cpu.entries import compiled
        compiled(name).running
    """
    env = {"NUMBA_CACHE_DIR": str(tmp_path)}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: python(code, name, **env), "fd"))
    code = """
        import numpy, arraybn
        batch = arraybn.Moments(5, numpy.ones(1), numpy.ones(1))
        for name in ("f4", "f8"):
            print(arraybn.update_running_stats(numpy.zeros(1, name), numpy.ones(1, name), batch, 1.0)[0].dtype)
    """
    assert python(code, **env).split() == ["float32", "float64"]
    for path in tmp_path.rglob("*.nb?"):
        path.write_bytes(b"")  # as after a crash
    assert python(code, **env).split() == ["float32", "float64"]


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_what_different_processes_have_compiled_is_right_together(tmp_path: Path) -> None:
    code = """
        import sys
        import numpy as np
        from arraybn import reference
        from arraybn.kernels import cpu
        for plane in (40, 3):
            u, x = np.random.default_rng(0).standard_normal((2, 5, 4, plane))
            mean, a, b, c = np.random.default_rng(1).standard_normal((4, 4))
            for name in sys.argv[1:]:
                arguments = {"affine": (x, mean, a, c), "affine2": (u, x, mean, a, b, c)}[name]
                print(np.allclose(getattr(cpu, name)(*arguments), getattr(reference, name)(*arguments)))
    """
    for names in (["affine"], ["affine2"], ["affine", "affine2"]):
        assert set(python(code, *names, NUMBA_CACHE_DIR=str(tmp_path)).split()) == {"True"}, names


def test_loops_have_names_of_their_own() -> None:
    loops = [getattr(tiles, name) for name in dir(tiles) if name.endswith(("_of_planes", "_of_lines"))]
    assert len({getattr(loop, "py_func", loop).__qualname__ for loop in loops}) == len(loops) == 8


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_a_full_disk_is_a_warning(tmp_path: Path) -> None:
    code = """
        import resource, warnings
        import numpy, arraybn
        import arraybn.kernels.cpu
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mean = arraybn.moments(numpy.asarray([[1.0], [3.0]])).mean
        print(mean, caught[0].category.__name__)
    """
    assert python(code, NUMBA_CACHE_DIR=str(tmp_path)).split() == ["[2.]", "RuntimeWarning"]


def test_a_numba_that_cannot_be_imported_leaves_the_reference(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text('raise ImportError("Numba needs NumPy 2.4 or less")\n')
    code = """
        import warnings
        import numpy, arraybn
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(arraybn.moments(numpy.asarray([[1.0], [3.0]])).mean, "Numba needs" in str(caught[0].message))
    """
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)  # noqa: PLW1510
    assert run.stdout.split() == ["[2.]", "True"]


def test_bfloat16_ties_go_to_even() -> None:
    kind = need("ml_dtypes").bfloat16
    x, one, zero = np.ones((1, 1, 1), kind), np.ones(1), np.zeros(1)
    for step, rounded in [(2.0**-8, 1.0), (3 * 2.0**-8, 1.0 + 2.0**-6)]:  # halfway between two neighbours
        assert float(cpu.affine(x, zero, one, np.array([step])).item()) == rounded

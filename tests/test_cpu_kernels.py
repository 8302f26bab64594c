"""What only the compiled kernels for NumPy arrays have: the cuts of data, threads, memory, and the cache on disk.

``test_the_kernels_are_right_uncompiled_as_well`` runs test_kernels.py and the first part of this file again without the
compiler, so that coverage sees the loops and an index out of range is an error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import kernels
from support.kernels import COMPILED, Case, cuts_of, data
from support.libraries import need

import arraybn
from arraybn._arrays.namespaces import FLOATS

need("numba")
from numba import types  # noqa: E402

from arraybn.kernels import cpu  # noqa: E402, needs numba
from arraybn.kernels import threads as pool  # noqa: E402, needs numba
from arraybn.kernels.cpu import entries, exact, jobs, masked, tiles  # noqa: E402, needs numba

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=cuts_of("cpu"))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Yield data of each cut."""
    with kernels.case_of(*request.param) as made:
        yield made


# ---- Sums are made again where their shift was far off ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", kernels.dtypes_of("cpu"))
def test_a_channel_that_is_summed_again_changes_no_bit_of_the_others(case: Case, dtype: str) -> None:
    if case.shape[1] == 1:
        pytest.skip("there is no other channel")
    x = data(case.shape, dtype)
    mean, m2 = cpu.moments(x)
    x[:1, 0, :8] = 1e4
    other_mean, other_m2 = cpu.moments(x)
    np.testing.assert_array_equal(other_mean[1:], mean[1:])
    np.testing.assert_array_equal(other_m2[1:], m2[1:])


def test_the_shift_is_tried_again_only_where_it_was_far() -> None:
    sums = {"near": (np.array([1.0]), np.array([10.0])), "far": (np.array([90.0]), np.array([1000.0]))}
    for name, (s, q) in sums.items():
        assert entries._finish(10, np.array([7.0]), s, q) == (name == "far")
        assert s == 7 + {"near": 0.1, "far": 9.0}[name]
    both = np.array([90.0, 1.0]), np.array([1000.0, 10.0])
    assert entries._finish(10, np.array([7.0, 7.0]), *both)  # the near one does not hide the far one
    for s, q, m2 in [(2.0, 0.4 - 1e-16, 0.0), (np.nan, 1.0, np.nan), (np.inf, np.inf, np.nan)]:
        vectors = np.array([s]), np.array([q])
        with np.errstate(invalid="ignore"):  # said by NumPy alone, where nothing is compiled
            entries._finish(10, np.array([0.0]), *vectors)
        np.testing.assert_array_equal(vectors[1], [m2])  # never negative, and NaN stays NaN


@pytest.mark.skipif(not COMPILED, reason="so many values take too long without the compiler")
@pytest.mark.parametrize("shape", [(2**22, 1, 1), (2**16, 1, 64), (1, 1, 2**22), (2**21, 2, 1)])
def test_e1_e5_rounding_hardly_grows_with_the_number_of_values(shape: tuple[int, int, int]) -> None:
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


# ---- How the work is cut ---------------------------------------------------------------------------------------------


def test_the_table_has_every_way_of_cutting(case: Case) -> None:
    found = cpu._cut(case.shape, 4)
    assert (found.group < case.shape[1]) == ("groups" in case.cut or "planes in tiles" in case.cut)
    assert (found.height < found.rows) == ("in tiles" in case.cut)
    assert (found.rows > case.shape[0]) == ("long planes" in case.cut)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_any_shape_is_cut_into_pieces_of_bounded_size(itemsize: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(2000):
        samples, channels, plane = (int(2 ** rng.uniform(0, limit)) for limit in (24, 13, 24))
        cut = cpu._cut((samples, channels, plane), itemsize)
        assert 1 <= cut.group <= channels
        assert 1 <= cut.height <= cut.rows
        assert cut.n == samples * plane
        width = min(plane, tiles.PIECE) * itemsize
        tile = cut.group * min(cut.height, cut.rows) * width
        assert tile <= max(4 * cpu.TILE, cut.group * tiles.BLOCK * width if plane < tiles.LONG else width)
        partial_sums = -(-cut.rows // cut.height) * 16 * channels
        assert cut.height >= cut.rows or partial_sums <= samples * channels * plane * itemsize / 4


def test_small_data_is_cut_into_halves_and_smaller_data_not_at_all() -> None:
    parts = {}
    for shape in [(64, 128, 1), (1, 32, 784), (1, 512, 196), (1, 2048, 49), (2, 17, 1024), (49, 2048, 1)]:
        cut = cpu._cut(shape, 4)
        parts[shape] = cut.groups * cut.tiles
    assert list(parts.values()) == [1, 1, 2, 2, 2, 2]


def test_large_data_has_more_tasks_than_threads() -> None:
    for shape in [(32, 64, 112 * 112), (32, 2048, 49), (32 * 112 * 112, 64, 1), (32 * 49, 2048, 1), (1, 1, 10**8)]:
        cut = cpu._cut(shape, 4)
        apart = -(-cut.channels // cut.group)
        assert max(apart, -(-cut.rows // cut.height)) >= 4


@pytest.mark.skipif(not COMPILED, reason="4 GiB take too long without the compiler")
@pytest.mark.parametrize("shape", [(2**31 + 2**12, 1, 1), (3, 2, 2**29), (2**21, 2**10 + 8, 1)])
def test_places_beyond_2_31_of_an_array_are_reached(shape: tuple[int, int, int]) -> None:
    x = np.zeros(shape, np.float16)  # of pages that are not there until they are written
    x[-1, -1, -1] = 4.0
    mean, m2 = cpu.moments(x)
    n = shape[0] * shape[2]
    np.testing.assert_array_equal(mean, [*[0.0] * (shape[1] - 1), 4.0 / n])
    np.testing.assert_allclose(m2[-1], 16.0 - 16.0 / n, rtol=1e-12)
    cut = cpu._cut(shape, 2)
    cut, last = cut._replace(group=1, height=1), (cut.rows - 1, shape[1] - 1)  # the last row of the last channel
    line, vector = x.reshape(-1).view(np.int16), np.ones(shape[1])
    entries._affine(*last, (line,) * 3, entries.EVERYWHERE, cut, (0 * vector, *(vector,) * 4), line, 1)
    assert x[-1, -1, -1] == 5.0
    assert x[0, 0, 0] == 0.0


# ---- Threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Any:
    """Yield the function that sets the number of threads; restore the number."""
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


@tiles.plain
def meet(me: int, crew: int, words: Any) -> None:
    """Come together: each thread marks its word, counts itself, and waits for a second thread, or for the end."""
    jobs._store(words, 1 + me, 1)
    jobs._add(words, 0, 1)
    while jobs._load(words, 0) < 2:
        jobs._rest(0)


@tiles.plain
def spoil(part: int, group: int, done: Any) -> None:
    jobs._add(done, 0, 1)
    if part == 5:
        raise MemoryError


@pytest.fixture(scope="module")
def meeting() -> Any:
    """Return the function that shares the job `meet`."""
    address = jobs.address_of(meet, (entries._WORDS,))

    @tiles.plain(nogil=True)
    def share(words: Any, shared: Any) -> None:
        jobs.share(words, address(), jobs.place((shared,)))
        jobs._add(shared, 0, 0)  # so that the array lives until here

    return share


def crew_of(number: int) -> Any:
    """Return the words of a caller that has `number` - 1 helpers, all awake."""
    arraybn.set_num_threads(number)
    return pool.helpers(entries.serve(), 2**30, number)


def wake_until(done: Any) -> None:
    """Wake the helpers again and again: one may go to sleep just before a job is there, and a caller does not wait."""
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        pool.helpers(entries.serve(), 2**30, 64)
        time.sleep(0.001)


@pytest.mark.skipif(not COMPILED, reason="without the compiler nobody helps")
def test_a_helper_that_sleeps_comes_when_it_is_woken(meeting: Any, threads: Any) -> None:
    for seconds in (0.0, 0.0, 0.2, 0.0):
        time.sleep(seconds)
        met = np.zeros(3, np.int64)
        caller = threading.Thread(target=meeting, args=(crew_of(2), met))
        caller.start()
        wake_until(lambda caller=caller: not caller.is_alive())  # it ends when two threads have come
        assert met[1:].tolist() == [1, 1]  # a helper that is woken again may come twice before the caller has left


@pytest.mark.skipif(not COMPILED, reason="without the compiler nobody helps")
def test_small_jobs_wake_helpers_only_where_they_follow_each_other_closely(
    threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_cores", lambda: 3)  # helpers of more threads than cores do not spin, and are not woken
    words, first = crew_of(3), slice(pool.ASLEEP + 1, pool.ASLEEP + 3)

    def small(times: int) -> None:
        while words[first].tolist() != [1, 1]:
            time.sleep(0.001)
        time.sleep(2 * pool.CLOSE * pool.SPIN)
        for _ in range(times):
            pool.helpers(entries.serve(), 2**17, 2)

    small(1)
    time.sleep(0.01)
    assert words[first].tolist() == [1, 1]
    found, end = [1, 1], time.monotonic() + 60
    while found == [1, 1] and time.monotonic() < end:
        small(2)  # the system may keep this thread waiting between the two
        found = words[first].tolist()
    assert found == [0, 1]  # the first one alone, as there are two parts


@pytest.mark.skipif(not COMPILED, reason="without the compiler nobody helps")
def test_helpers_who_do_not_spin_are_not_woken_for_small_jobs(threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_cores", lambda: 1)
    words = crew_of(2)
    while words[pool.ASLEEP + 1] == 0:
        time.sleep(0.001)
    for _ in range(100):
        pool.helpers(entries.serve(), 2**17, 2)
        assert words[pool.ASLEEP + 1] == 1


@pytest.mark.skipif(not COMPILED, reason="without the compiler nobody helps")
@pytest.mark.parametrize("shape", [(8, 64, 80, 80), (2, 1, 1500, 1500), (4, 64, 50, 50)])
def test_data_of_more_than_one_tile_is_shared_with_the_helpers(shape: tuple[int, ...], threads: Any) -> None:
    words = crew_of(2)
    before = words[pool.JOBS]
    _, saved = arraybn.batch_norm(data(shape, "float32"))
    assert words[pool.JOBS] == before + 1
    arraybn.batch_norm_backward(data(shape, "float32"), saved)
    assert words[pool.JOBS] == before + 2
    arraybn.batch_norm(data((64, 128), "float32"))  # takes less time than to share
    assert words[pool.JOBS] == before + 2


def test_n4_several_callers_at_once_get_the_bits_of_one(threads: Any) -> None:
    threads(3)
    batches = [data((4, 32, 70, 70 + k), "float32", k) for k in range(8)]
    alone = [arraybn.batch_norm(x)[0] for x in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            together = list(pool.map(lambda x: arraybn.batch_norm(x)[0], batches))
            for y, expected in zip(together, alone, strict=True):
                np.testing.assert_array_equal(y, expected)


@pytest.mark.skipif(not COMPILED, reason="without the compiler nobody helps")
def test_a_part_that_fails_on_any_thread_is_an_error_of_the_caller_and_the_next_job_is_done(threads: Any) -> None:
    address = jobs.address_of(spoil, (entries._WORDS,))
    work = jobs.address_of(jobs.work, (entries._WORDS, entries._CUT, types.Array(types.int64, 2, "C")))

    @tiles.plain(nogil=True)
    def call(words: Any, cut: Any, parts: int, done: Any) -> None:
        stages = ((address(), jobs.place((done,)), parts, jobs.ONWARDS),)
        entries._do(words, cut, work(), stages, np.zeros(3 + parts + 1, np.int64), done)

    cut = tiles.Cut(1, 1, 64, 1, 1, 1, 64, 1, 64)
    for number in (1, 3):
        for _ in range(20):
            done = np.zeros(1, np.int64)
            with pytest.raises(MemoryError):
                call(crew_of(number), cut, 64, done)
            assert done[0] == 64  # nobody waits for a part in vain
            call(crew_of(number), cut, 5, done)
            assert done[0] == 69


@pytest.mark.skipif(not COMPILED, reason="without the compiler nobody helps")
def test_a_call_never_waits_for_helpers_that_are_busy_elsewhere(meeting: Any, threads: Any) -> None:
    x, met = data((8, 64, 80, 80), "float32"), np.asarray([-1, 0, 0])  # a third thread is waited for
    y = arraybn.batch_norm(x)[0]
    first = threading.Thread(target=meeting, args=(crew_of(2), met))
    first.start()
    wake_until(lambda: met[0] == 1)  # the caller and the only helper are there
    np.testing.assert_array_equal(arraybn.batch_norm(x)[0], y)
    assert first.is_alive()
    met[0] = 2
    first.join()


@pytest.mark.skipif(not COMPILED, reason="without the compiler nobody helps")
def test_helpers_do_not_spin_where_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    seconds: list[float] = []
    monkeypatch.setattr(pool, "_looks", lambda serve, wait: seconds.append(wait) or 1)
    for ranks, cores in [(1, 2), (2, 4), (2, 3), (1, 1)]:
        monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", str(ranks))
        monkeypatch.setattr(pool, "_cores", lambda cores=cores: cores)
        crew_of(1), crew_of(2)
    assert seconds == [pool.SPIN, pool.SPIN, 0.0, 0.0]


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
    """Return the output of a process that runs `code`."""
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
@pytest.mark.parametrize("dtype", kernels.dtypes_of("cpu"))
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
            arraybn.batch_norm_jvp(dy, saved, out=dx)
            mean = saved.moments.mean
            arraybn.batch_norm(x, mean=mean, var=mean, out=x)
            return saved.moments
        shape, dtype = json.loads(sys.argv[1]), numpy.dtype(sys.argv[2])
        few = (1 if len(shape) > 2 else 4, *shape[1:])
        calls(*(numpy.ones(few, dtype) for _ in range(4)))  # compiled, and the pool is there
        calls(*(numpy.ones((4, shape[1], 4), dtype) for _ in range(4)))
        for small in (numpy.ones(few, dtype), numpy.ones((4, shape[1], 4), dtype)):
            arraybn.batch_norm_double_backward(small, small, arraybn.batch_norm(small)[1])
        arrays = [numpy.ones(shape, dtype) for _ in range(4)]
        before = peak()
        calls(*arrays)
        called = peak()
        y, saved = arraybn.batch_norm(arrays[0])
        alone = peak() - called
        results = arraybn.batch_norm_double_backward(y, arrays[1], saved)  # while y is there: what is freed is not seen
        print(json.dumps([y.nbytes, called - before, alone, peak() - called - alone]))
    """
    size, with_out, without, twice = json.loads(python(code, json.dumps(shape), dtype))
    assert with_out < 0.2 * size
    assert 0.9 * size < without + with_out < 1.2 * size  # the result alone
    assert 1.9 * size < twice + without + with_out - size < 2.2 * size  # two results


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
            batch = arraybn.Moments(5, numpy.ones(1), numpy.ones(1))
            arraybn.update_running_stats(numpy.zeros(1), numpy.ones(1), batch, 0.5)  # a second entry, soon compiled
        from arraybn.kernels.cpu.entries import cache_folder
        print(len(caught), caught[0].category.__name__, "NUMBA_CACHE_DIR" in str(caught[0].message), cache_folder())
    """
    assert python(code).split() == ["[2.]", "1", "RuntimeWarning", "True", "None"]


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_compiled_code_is_kept_elsewhere_where_the_package_cannot_be_written(tmp_path: Path) -> None:
    code = """
        import numpy, arraybn
        from arraybn.kernels.cpu.entries import cache_folder
        batch = arraybn.Moments(5, numpy.ones(1), numpy.ones(1))
        arraybn.update_running_stats(numpy.zeros(1), numpy.ones(1), batch, 0.5)  # soon compiled
        print(cache_folder())
    """
    folder = Path(python(code, NUMBA_CACHE_DIR=str(tmp_path)).strip())
    assert folder.is_relative_to(tmp_path)
    assert list(folder.glob("entries._running*.nbc"))


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_stages_of_one_name_in_two_modules_are_kept_apart() -> None:
    """One of them contracts, the other must not: the code of one under the key of the other would change bits."""
    found = [jobs.address_of(module._affine, (types.int64,)).py_func.__qualname__ for module in (entries, exact)]
    assert found[0] != found[1]


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
    own = ("half.py", "scalars.py", "tiles.py", "jobs.py", "entries.py", "masked.py", "exact.py")
    for changed in ("reference.py", *own):
        entries._sources.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, name=changed: original(path) + b"#" * (path.name == name))
            assert cache._index_key("signature", Codegen()) != key
    entries._sources.cache_clear()


@pytest.mark.skipif(not COMPILED, reason="it is the run that is started here")
def test_the_kernels_are_right_uncompiled_as_well() -> None:
    # Of test_kernels.py the tests whose parameter is "cpu"; of this file those before the cuts.
    chosen = "cpu and not layer and not property and not beyond and not python"
    first_part = [
        f"{__file__}::{name}"
        for name in (
            "test_a_channel_that_is_summed_again_changes_no_bit_of_the_others",
            "test_the_shift_is_tried_again_only_where_it_was_far",
            "test_the_table_has_every_way_of_cutting",
        )
    ]
    files = [str(ROOT / "tests" / "test_kernels.py"), *first_part]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", chosen, "-p", "no:cacheprovider"]
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


@pytest.mark.skipif(not COMPILED, reason="the other run is this one")
def test_masks_and_exact_sums_are_right_without_compiling() -> None:
    """Run the loops in Python, where coverage sees them, beside the reference."""
    code = """
        import numpy, arraybn
        rng = numpy.random.default_rng(0)
        def results(x, dy, kernels, tangent, **options):
            w, b = numpy.linspace(1, 2, x.shape[1]), numpy.linspace(-1, 1, x.shape[1])
            y, saved = arraybn.batch_norm(x, w, b, kernels=kernels, **options)
            found = [y, saved.moments.mean, saved.moments.m2, *arraybn.batch_norm_backward(dy, saved)]
            if tangent:
                found += [arraybn.batch_norm_jvp(dy, saved), *arraybn.batch_norm_double_backward(dy, x, saved)]
            return found
        for shape in ((3, 2, 40), (6, 3, 5), (40, 20), (90, 3)):
            x, dy = (rng.normal(1, 1, shape).astype("f4") for _ in range(2))
            where = rng.random((shape[0], *shape[2:])) < 0.7
            far = numpy.where(rng.random(shape) < 0.5, x, x * numpy.float32(1e-20))
            far.flat[0] = numpy.inf
            masked, exact = {"where": where}, {"exact": True}
            for data, options in [(x, masked), (x, {**masked, **exact}), (x, exact), (far, exact)]:
                with numpy.errstate(all="ignore"):
                    ours, theirs = (results(data, dy, k, options is masked, **options) for k in ("cpu", "reference"))
                for a, b in zip(ours, theirs):
                    if options is masked:
                        numpy.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
                    else:
                        assert numpy.array_equal(a, b, equal_nan=True), (shape, options)
        print("right")
    """
    assert python(code, NUMBA_DISABLE_JIT="1").strip() == "right"


def test_the_dtypes_are_all_of_them() -> None:
    assert {data((1,), name).dtype.char for name in FLOATS} == set(entries._STORED)


# ---- From the review of the kernels ----


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


def test_e4_running_statistics_take_moments_of_any_floating_dtype() -> None:
    for mean, var in [("f4", "f4"), (">f8", ">f8"), ("f2", "f2"), ("f8", "f4")]:
        batch = arraybn.Moments(5, np.ones(2, mean), np.full(2, 4.0, var))
        new_mean, new_var = arraybn.update_running_stats(np.zeros(2), np.ones(2), batch, 0.5)
        assert new_mean.dtype == new_var.dtype == np.float64
        np.testing.assert_allclose([new_mean, new_var], [[0.5] * 2, [1.0] * 2])


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_two_dtypes_that_are_kept_at_once_do_not_take_each_others_files(tmp_path: Path) -> None:
    code = """
        import pathlib, sys, time
        import numba.core.caching as caching
        name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
        index, data = caching.IndexDataCacheFile._save_index, caching.IndexDataCacheFile._save_data
        def done(step):
            (folder / step).touch()
        def wait_for(step):
            end = time.monotonic() + 120
            while not (folder / step).exists():
                assert time.monotonic() < end, step
                time.sleep(0.01)
        def save_index(*arguments):  # both have read the index before one writes an index; then f before d
            done(f"{name} has read")
            wait_for({"f": "d has read", "d": "f has an index"}[name])
            index(*arguments)
            done(f"{name} has an index")
        def save_data(*arguments):  # d before f
            if name == "f":
                wait_for("d has data")
            data(*arguments)
            done(f"{name} has data")
        caching.IndexDataCacheFile._save_index, caching.IndexDataCacheFile._save_data = save_index, save_data
        from arraybn.kernels.cpu.entries import compiled
        compiled(name).running
    """
    cache, steps = tmp_path / "cache", tmp_path / "steps"
    steps.mkdir()
    env = {"NUMBA_CACHE_DIR": str(cache)}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: python(code, name, str(steps), **env), "fd"))
    assert len(list(steps.iterdir())) == 6
    code = """
        import numpy, arraybn
        batch = arraybn.Moments(5, numpy.ones(1), numpy.ones(1))
        for name in ("f4", "f8"):
            print(arraybn.update_running_stats(numpy.zeros(1, name), numpy.ones(1, name), batch, 1.0)[0].dtype)
    """
    assert python(code, **env).split() == ["float32", "float64"]
    for path in cache.rglob("*.nb?"):
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
    assert len({getattr(loop, "py_func", loop).__qualname__ for loop in loops}) == len(loops) == 10
    tables = [made("f")._stages for made in (entries.compiled, masked.compiled, exact._compiled)]
    stages = {getattr(stage, "py_func", stage) for table in tables for stage, _ in table.values()}
    assert len({(stage.__module__, stage.__qualname__) for stage in stages}) == len(stages) == 23


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_a_full_disk_is_a_warning(tmp_path: Path) -> None:
    code = """
        import resource, warnings
        import numpy, arraybn
        import arraybn.kernels.cpu
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batch = arraybn.Moments(5, numpy.full(1, 2.0), numpy.ones(1))
            mean, _ = arraybn.update_running_stats(numpy.zeros(1), numpy.ones(1), batch, 1.0)  # soon compiled
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


# ---- Evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 0.0, 1e-300])
@pytest.mark.parametrize("given", ["", "weight", "bias", "weight bias"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_statistics_of_an_evaluation_have_the_bits_of_the_reference(eps: float, given: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 200)).astype(dtype)
    vectors = {name: rng.uniform(-2, 2, 200).astype(dtype) for name in given.split()}
    mean, var = rng.uniform(-2, 2, 200).astype(dtype), np.r_[0.0, 1e-300, rng.uniform(1e-9, 2, 198)].astype(dtype)
    with np.errstate(all="ignore"):
        _, saved = arraybn.batch_norm(x, **vectors, mean=mean, var=var, eps=eps, kernels="cpu")
        _, wanted = arraybn.batch_norm(x, **vectors, mean=mean, var=var, eps=eps, kernels="reference")
    for name in ("_mean", "_rstd", "_weight"):
        found, right = getattr(saved, name), getattr(wanted, name)
        assert (found is None) == (right is None)
        if right is not None:
            assert (found.dtype, found.tobytes()) == (np.dtype("f8"), right.tobytes())
            assert not any(np.shares_memory(found, one) for one in (mean, var, *vectors.values()))

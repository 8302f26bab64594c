"""The memory of large results of the CPU kernels: used again, never while anything can see it, and within a limit."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.libraries import need

import arraybn
from arraybn.kernels import results
from arraybn.testing import ThreadComm

need("numba")

SHAPE = (64, 16, 32, 32)  # of float32: 4 MB, the least that is kept
UNIT = results.UNIT


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Let each test find no memory that waits, the limit of the start, and no helper that still holds a result."""
    threads = arraybn.get_num_threads()
    arraybn.set_num_threads(1)
    arraybn.free_memory()
    before = arraybn.set_memory_limit(results.LIMIT)
    yield
    arraybn.set_memory_limit(before)
    arraybn.free_memory()
    arraybn.set_num_threads(threads)


def an_x(shape: tuple[int, ...] = SHAPE, dtype: str = "float32") -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


X = an_x()


def result() -> Any:
    return arraybn.batch_norm(X)[0]


# ---- Memory is used again, and nothing else changes ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_result_takes_the_memory_of_one_that_is_gone_and_has_the_same_bits(dtype: str) -> None:
    if dtype == "bfloat16":
        need("ml_dtypes")
        import ml_dtypes  # noqa: F401, makes NumPy know the name
    x = an_x((64, 16, 64, 64), dtype)
    arraybn.set_memory_limit(0)
    wanted, saved = arraybn.batch_norm(x)
    wanted_dx, *_ = arraybn.batch_norm_backward(x, saved)
    arraybn.set_memory_limit(results.LIMIT)
    y, saved = arraybn.batch_norm(x)
    place = address(y)
    assert (y.tobytes(), y.dtype, y.shape, y.strides) == (wanted.tobytes(), x.dtype, x.shape, x.strides)
    assert y.flags.writeable
    assert y.flags.aligned
    assert place % 64 == 0
    del y
    dx, *_ = arraybn.batch_norm_backward(x, saved)
    assert address(dx) == place
    assert dx.tobytes() == wanted_dx.tobytes()


def test_small_results_and_out_are_arrays_as_ever() -> None:
    y, _ = arraybn.batch_norm(X[:63])
    assert y.flags.owndata or y.base.flags.owndata
    out = np.empty_like(X)
    assert arraybn.batch_norm(X, out=out)[0] is out
    assert arraybn.free_memory() == 0


def test_results_that_live_at_once_never_share_memory() -> None:
    kept = [result() for _ in range(5)]
    assert len({address(y) for y in kept}) == 5
    assert not any(np.shares_memory(a, b) for a in kept for b in kept if a is not b)


def test_a_transposed_result_and_one_of_ranks_are_kept_too() -> None:
    x = np.moveaxis(an_x((64, 32, 32, 16)), -1, 1)
    y, _ = arraybn.batch_norm(x)
    assert y.strides == x.strides
    place = address(y)
    del y

    def work(comm: Any) -> tuple[int, Any]:
        y, _ = arraybn.batch_norm(X, comm=comm)
        return address(y), y

    found = ThreadComm.run(2, work)
    assert place in [where for where, _ in found]


# ---- Never while anything can see it ---------------------------------------------------------------------------------


class Holder:
    """A node of a cycle."""

    def __init__(self, value: Any) -> None:
        self.value, self.me = value, self


def by_torch(y: Any) -> Any:
    return need("torch").from_numpy(y)


def by_dlpack(y: Any) -> Any:
    return need("torch").from_dlpack(y)


def by_ctypes(y: Any) -> Any:
    return (ctypes.c_float * y.size).from_buffer(y)


KEEPERS: dict[str, Callable[[Any], Any]] = {
    "a view": lambda y: y[1:],
    "a view of a view": lambda y: y[1:].reshape(-1)[5:].view("u4"),
    "the flat iterator": lambda y: y.flat,
    "memoryview": memoryview,
    "part of a memoryview": lambda y: memoryview(y)[3:],
    "frombuffer": lambda y: np.frombuffer(y, "f4"),
    "a pickle's buffer": pickle.PickleBuffer,
    "NumPy's DLPack": np.from_dlpack,
    "torch.from_numpy": by_torch,
    "a view of a tensor": lambda y: by_torch(y)[2:],
    "torch.from_dlpack": by_dlpack,
    "ctypes": by_ctypes,
    "the base": lambda y: y.base,
    "the base of all bases": lambda y: bases(y)[-1],
    "a layer's next x": lambda y: arraybn.batch_norm(y)[1],
    "a generator": lambda y: (row for row in y),
}


def bases(array: Any) -> list[Any]:
    found = [array]
    while getattr(found[-1], "base", None) is not None:
        found.append(found[-1].base)
    return found


def memory_is_kept(keep: Callable[[Any], Any]) -> bool:
    """Return whether `keep` keeps the memory of a result from the results after it."""
    y = result()
    place, kept = address(y), keep(y)
    del y
    gc.collect()
    later = [result() for _ in range(3)]
    reused = place in [address(one) for one in later]
    del kept, later
    gc.collect()
    again = [result() for _ in range(4)]
    assert place in [address(one) for one in again], "the memory did not come back"
    return not reused


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
def test_whatever_sees_a_result_keeps_its_memory_and_then_gives_it_back(keep: Callable[[Any], Any]) -> None:
    assert memory_is_kept(keep)


def test_a_cycle_keeps_the_memory_until_it_is_collected() -> None:
    gc.disable()
    try:
        y = result()
        place = address(y)
        Holder(y)
        del y
        later = [result() for _ in range(2)]
        assert place not in [address(one) for one in later]
        gc.collect()
        assert address(result()) == place
    finally:
        gc.enable()


def test_an_owner_that_is_part_of_a_cycle_gives_no_second_array_of_its_memory() -> None:
    """The collector runs the finalizers of a cycle in any order: an array may be made after the memory is back."""
    made = []

    class Late(Holder):
        def __del__(self) -> None:
            made.append(np.asarray(self.value))

    y = result()
    place, owner = address(y), bases(y)[-1]
    assert type(owner).__name__ == "_Owner"
    del y
    Late(owner)
    del owner
    gc.collect()
    assert [array.dtype for array in made] == [object]
    made.clear()
    assert address(result()) == place


def test_the_check_finds_memory_that_is_given_back_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a finalizer on the array, which a view outlives."""

    def unsafe(shape: tuple[int, ...], dtype: Any) -> Any:
        block = results._store.take(2 * UNIT)
        y = block.view(dtype).reshape(shape)
        weakref.finalize(y, results._store.give, block)
        return y

    monkeypatch.setattr(results, "empty", unsafe)
    assert not memory_is_kept(lambda y: y[1:])


# ---- The limit, and the switch ---------------------------------------------------------------------------------------


def waiting() -> int:
    """Return the bytes that wait, and free them."""
    return arraybn.free_memory()


def test_what_waits_stays_within_the_limit_and_the_oldest_goes_first() -> None:
    arraybn.set_memory_limit(2 * 2 * UNIT)
    kept = [result() for _ in range(4)]
    places = [address(y) for y in kept]
    while kept:
        del kept[0]
    again = [result() for _ in range(2)]
    assert {address(y) for y in again} == set(places[2:])
    del again
    assert waiting() == 2 * 2 * UNIT


def test_a_lower_limit_frees_at_once_and_zero_is_the_switch() -> None:
    kept = [result() for _ in range(3)]
    del kept
    assert arraybn.set_memory_limit(2 * UNIT) == results.LIMIT
    assert waiting() == 2 * UNIT
    y = result()
    assert arraybn.set_memory_limit(0) == 2 * UNIT
    del y  # came from the store, and is not kept
    assert waiting() == 0
    y = result()
    assert bases(y)[-1].flags.owndata
    del y
    assert waiting() == 0


def test_a_result_above_the_limit_is_an_array_as_ever() -> None:
    arraybn.set_memory_limit(2 * UNIT - 1)
    y = result()
    assert bases(y)[-1].flags.owndata


def test_free_memory_leaves_what_is_in_use_alone() -> None:
    y, gone = result(), result()
    before = y.copy()
    del gone
    assert arraybn.free_memory() == 2 * UNIT
    assert arraybn.free_memory() == 0
    later = [result() for _ in range(2)]
    assert address(y) not in [address(one) for one in later]
    np.testing.assert_array_equal(y, before)


def test_a_size_between_takes_the_next_multiple_of_a_huge_page() -> None:
    y, _ = arraybn.batch_norm(an_x((65, 16, 32, 32)))
    place = address(y)
    del y
    y, _ = arraybn.batch_norm(an_x((95, 16, 32, 32)))  # both are under three units
    assert address(y) == place
    del y
    assert waiting() == 3 * UNIT


# ---- Threads, the collector in the middle, fork, the end -------------------------------------------------------------


def test_threads_share_the_memory_and_never_the_same_at_once() -> None:
    x = [an_x((64, 16, 32, 32)) + number for number in range(4)]
    wanted = [arraybn.batch_norm(one, bias=np.full(16, float(n)))[0] for n, one in enumerate(x)]

    def work(number: int) -> None:
        bias = np.full(16, float(number))
        for _ in range(15):
            y, saved = arraybn.batch_norm(x[number], bias=bias)
            view = y[:]
            del y
            dx, *_ = arraybn.batch_norm_backward(x[number], saved)
            assert address(dx) != address(view)
            np.testing.assert_array_equal(view, wanted[number])

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(work, range(4)))
    assert waiting() <= 4 * 3 * 2 * UNIT


def test_an_owner_that_ends_while_its_thread_has_the_lock_neither_waits_nor_is_lost() -> None:
    """As when the collector of garbage runs in the middle of `take`."""
    y = result()
    done = threading.Event()

    def work() -> None:
        nonlocal y
        with results._store._lock:
            y = None
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(10), "a deadlock"
    results._store._settle()
    assert waiting() == 2 * UNIT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_starts_with_none_even_where_a_thread_held_the_lock() -> None:
    y = result()
    before, gone = y.copy(), result()
    del gone
    with warnings.catch_warnings(), results._store._lock:
        warnings.simplefilter("ignore")  # fork and threads: that is the point
        child = os.fork()
        if child == 0:
            status = 1
            try:
                own = result()
                same = bool((own == before).all() and (y == before).all())
                place = address(own)
                del own
                status = 0 if same and waiting() == 2 * UNIT and place != address(y) else 2
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(y, before)
    assert waiting() == 2 * UNIT  # the parent's


def test_results_that_live_at_the_end_of_the_interpreter_cause_no_word() -> None:
    code = (
        "import sys, numpy, arraybn\n"
        "x = numpy.ones((64, 16, 32, 32), 'f4')\n"
        "kept = [arraybn.batch_norm(x)[0] for _ in range(3)]\n"
        "kept.append(kept)\n"
        "import arraybn.kernels.results as module\n"
        "sys.modules_kept, sys.kept = [module], arraybn.batch_norm(x)[0]\n"  # whose names are gone before
        "class Late:\n    def __del__(self, y=arraybn.batch_norm(x)[0]): y[:1].sum()\n"
        "sys.late = Late()\n"
        "del kept\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(arraybn.__file__).parents[1])}
    options: Any = {"capture_output": True, "text": True, "timeout": 60, "env": environment}
    run = subprocess.run([sys.executable, "-c", code], check=False, **options)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")

"""Plans: a call like one that has passed all checks skips them, and no other call does."""

from __future__ import annotations

import copy
import functools
import gc
import tracemalloc
import unittest.mock
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.libraries import need

import arraybn
from arraybn import _plan, functional
from arraybn._arrays.namespaces import FLOATS

X = np.random.default_rng(0).standard_normal((6, 5, 4)).astype("f4")
DY = X[::-1].copy()
W, B, M, V = (np.linspace(0.5, 2.0, 5).astype("f4") + shift for shift in range(4))


@pytest.fixture(autouse=True)
def _no_plans() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    functional._PLANS.clear()


def outcome_of_long_way(call: Callable[[], Any]) -> Any:
    """Return the outcome of a call without a plan, which makes all checks and converts in Python."""
    forget()
    with unittest.mock.patch.object(functional, "_short_way", return_value=False):
        found = outcome(call)
    forget()
    return found


def outcome(call: Callable[[], Any]) -> Any:
    """Return the bits of all results, or the error."""
    try:
        found = call()
    except Exception as error:
        return type(error), str(error)
    return [(array.tobytes(), array.dtype, array.shape, array.strides) for array in found if array is not None]


def forward(x: Any, *vectors: Any, **options: Any) -> Any:
    y, saved = arraybn.batch_norm(x, *vectors, **options)
    return y, saved._mean, saved._rstd, saved._x


def backward(dy: Any, saved: Any, **options: Any) -> Any:
    return arraybn.batch_norm_backward(dy, saved, **options)


def make_plans() -> None:
    """Make right calls of every kind on arrays like the ones here."""
    for fixed in ({}, {"mean": M, "var": V}):
        for vectors in ((), (W,), (W, B)):
            for out in (None, np.empty_like(X)):
                _, saved = arraybn.batch_norm(X.copy(), *vectors, out=out, **fixed)
                arraybn.batch_norm_backward(DY.copy(), saved, out=out)


def shifted() -> tuple[Any, Any]:
    """Return an x and an `out` that overlap in part."""
    line = np.arange(X.size + 3, dtype="f4")
    return line[: X.size].reshape(X.shape), line[3:].reshape(X.shape)


def unaligned(array: Any) -> Any:
    found = np.zeros(array.nbytes + 1, "u1")[1:].view(array.dtype).reshape(array.shape)
    found[...] = array
    return found


def readonly(array: Any) -> Any:
    found = array.copy()
    found.flags.writeable = False
    return found


def mapped(array: Any, folder: Path) -> Any:
    found = np.memmap(folder / "mapped", array.dtype, "w+", shape=array.shape)
    found[...] = array
    return found


def part_of(line: Any) -> Any:
    """Return a vector in the memory of an `out`."""
    return line.reshape(-1)[:5]


def sums_of_a_part() -> Any:
    return arraybn.batch_norm_sums(DY, arraybn.batch_norm(X, W, B, moments=arraybn.moments(X))[1])


OUT = np.empty_like(X)
FORWARDS: dict[str, Callable[[Path], Any]] = {
    "the same": lambda _: forward(X, W, B),
    "another dtype": lambda _: forward(X.astype("f8"), W, B),
    "another order of bytes": lambda _: forward(X.astype(">f4"), W, B),
    "a weight in another order of bytes": lambda _: forward(X, W.astype(">f4"), B),
    "integers": lambda _: forward(X.astype("i4"), W, B),
    "other strides": lambda _: forward(np.asfortranarray(X), W, B),
    "turned around": lambda _: forward(X[::-1, :, ::-1], W, B),
    "no strides": lambda _: forward(np.broadcast_to(X[:1], X.shape), W, B),
    "another shape": lambda _: forward(X[:3], W, B),
    "empty": lambda _: forward(X[:0], W, B),
    "unaligned": lambda _: forward(unaligned(X), W, B),
    "read-only": lambda _: forward(readonly(X), W, B),
    "a memmap": lambda folder: forward(mapped(X, folder), W, B),
    "a weight that is a memmap": lambda folder: forward(X, mapped(W, folder), B),
    "a masked array": lambda _: forward(np.ma.masked_array(X), W, B),
    "a list": lambda _: forward(X.tolist(), W, B),
    "a weight that is a list": lambda _: forward(X, W.tolist(), B),
    "a weight of another shape": lambda _: forward(X, W[:4], B),
    "a bias of another shape": lambda _: forward(X, W, B[:, None]),
    "a bias of integers": lambda _: forward(X, W, B.astype(int)),
    "a weight of another dtype": lambda _: forward(X, W.astype("f8"), B),
    "var without mean": lambda _: forward(X, W, B, var=V),
    "mean without var": lambda _: forward(X, W, B, mean=M),
    "mean of another shape": lambda _: forward(X, W, B, mean=M[:4], var=V),
    "var of another shape": lambda _: forward(X, W, B, mean=M, var=V[:4]),
    "moments beside mean": lambda _: forward(X, W, B, mean=M, var=V, moments=arraybn.moments(X)),
    "moments": lambda _: forward(X, W, B, moments=arraybn.moments(X)),
    "moments of others": lambda _: forward(X, W, B, moments=arraybn.moments(X[:, :4])),
    "a negative eps": lambda _: forward(X, W, B, eps=-1.0),
    "eps that is no number": lambda _: forward(X, W, B, eps="1"),
    "eps that is NaN": lambda _: forward(X, W, B, eps=float("nan")),
    "an axis that is a bool": lambda _: forward(X, W, B, channel_axis=True),
    "an axis of NumPy": lambda _: forward(X, W, B, channel_axis=np.int64(1)),
    "another axis": lambda _: forward(X, W, B, channel_axis=2),
    "kernels": lambda _: forward(X, W, B, kernels="reference"),
    "other kernels": lambda _: forward(X, W, B, kernels="none"),
    "out": lambda _: forward(X, W, B, out=OUT),
    "out that is x": lambda _: forward(x := X.copy(), W, B, out=x),
    "out that is x by another name": lambda _: forward(x := X.copy(), W, B, out=x[:]),
    "out that is not writeable": lambda _: forward(X, W, B, out=readonly(X)),
    "out of another dtype": lambda _: forward(X, W, B, out=OUT.astype("f8")),
    "out of another shape": lambda _: forward(X, W, B, out=OUT[:5]),
    "out of other strides": lambda _: forward(X, W, B, out=np.empty((4, 5, 6), "f4").T),
    "out without strides": lambda _: forward(X, W, B, out=np.lib.stride_tricks.as_strided(OUT, X.shape, (0, 16, 4))),
    "out that overlaps x": lambda _: forward(*(pair := shifted())[:1], W, B, out=pair[1]),
    "out that holds the weight": lambda _: forward(X, part_of(OUT), B, out=OUT),
    "out that holds the bias": lambda _: forward(X, W, part_of(OUT), out=OUT),
    "out that holds mean": lambda _: forward(X, W, B, mean=part_of(OUT), var=V, out=OUT),
    "out that holds var": lambda _: forward(X, W, B, mean=M, var=part_of(OUT), out=OUT),
    "out that is a memmap": lambda folder: forward(X, W, B, out=mapped(X, folder)),
    "out that is a list": lambda _: forward(X, W, B, out=OUT.tolist()),
}
BACKWARDS: dict[str, Callable[[Any, Path], Any]] = {
    "the same": lambda saved, _: backward(DY, saved),
    "another dtype": lambda saved, _: backward(DY.astype("f8"), saved),
    "a narrower dtype": lambda saved, _: backward(DY.astype("f2"), saved),
    "another order of bytes": lambda saved, _: backward(DY.astype(">f4"), saved),
    "integers": lambda saved, _: backward(DY.astype(int), saved),
    "other strides": lambda saved, _: backward(np.asfortranarray(DY), saved),
    "another shape": lambda saved, _: backward(DY[:5], saved),
    "turned": lambda saved, _: backward(DY.T, saved),
    "unaligned": lambda saved, _: backward(unaligned(DY), saved),
    "a list": lambda saved, _: backward(DY.tolist(), saved),
    "a masked array": lambda saved, _: backward(np.ma.masked_array(DY), saved),
    "a memmap": lambda saved, folder: backward(mapped(DY, folder), saved),
    "out": lambda saved, _: backward(DY, saved, out=OUT),
    "out that is dy": lambda saved, _: backward(dy := DY.copy(), saved, out=dy),
    "out that is x": lambda saved, _: backward(DY, saved, out=saved._x),
    "out that is not writeable": lambda saved, _: backward(DY, saved, out=readonly(X)),
    "out of another dtype": lambda saved, _: backward(DY, saved, out=OUT.astype("f8")),
    "out of another shape": lambda saved, _: backward(DY, saved, out=OUT[:5]),
    "out of other strides": lambda saved, _: backward(DY, saved, out=np.empty((4, 5, 6), "f4").T),
    "out that overlaps dy": lambda saved, _: backward((pair := shifted())[0], saved, out=pair[1]),
    "sums that were not asked for": lambda saved, _: backward(DY, saved, sums=sums_of_a_part()),
    "out that is x by another name": lambda saved, _: (*backward(DY, saved, out=saved._x[:]), saved._x),
}


RIGHT = {  # the others raise
    *("the same", "another dtype", "another order of bytes", "a weight in another order of bytes", "other strides"),
    *("turned around", "no strides", "another shape", "empty", "unaligned", "read-only", "a memmap", "moments"),
    *("a weight that is a memmap", "a weight of another dtype", "an axis of NumPy", "kernels", "a narrower dtype"),
    *("out", "out that is x", "out that is x by another name", "out of other strides", "out that is a memmap"),
    "out that is dy",
}


def test_the_calls_are_right_and_wrong_ones(tmp_path: Path) -> None:
    raised = {name for name, call in FORWARDS.items() if isinstance(outcome(lambda call=call: call(tmp_path)), tuple)}
    assert raised == set(FORWARDS) - RIGHT
    wanted, *_ = backward(DY, arraybn.batch_norm(X, W, B)[1])
    for name, call in BACKWARDS.items():
        saved = arraybn.batch_norm(X.copy(), W, B)[1]
        if name not in RIGHT or name == "another shape":
            with pytest.raises((TypeError, ValueError), match=r"^(dy|out|saved|sums): expected "):
                call(saved, tmp_path)
        else:
            np.testing.assert_allclose(call(saved, tmp_path)[0], wanted, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("call", FORWARDS.values(), ids=FORWARDS)
def test_a_forward_comes_out_the_same_with_and_without_plans(call: Callable[[Path], Any], tmp_path: Path) -> None:
    wanted = outcome_of_long_way(lambda: call(tmp_path))
    for _ in range(2):  # the second time, this very call may have made a plan
        make_plans()
        assert outcome(lambda: call(tmp_path)) == wanted


@pytest.mark.parametrize("call", BACKWARDS.values(), ids=BACKWARDS)
def test_a_backward_comes_out_the_same_with_and_without_plans(call: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    def fresh() -> Any:
        saved = arraybn.batch_norm(X.copy(), W, B)[1]
        return call(saved, tmp_path)

    wanted = outcome_of_long_way(fresh)
    for _ in range(2):
        make_plans()
        assert outcome(fresh) == wanted


VECTORS = [(), (W,), (None, B), (W, B), (W.astype("f8"), B.astype("f8")), (W, B, M, V), (None, None, M, V)]


@pytest.mark.parametrize(
    "vectors", VECTORS, ids=lambda vectors: "".join("-" if v is None else v.dtype.char for v in vectors)
)
@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_usual_calls_take_the_short_way_with_the_bits_of_the_long_way(dtype: str, over: bool, vectors: Any) -> None:
    need("numba")
    kind = need("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    fixed = dict(zip(("mean", "var"), vectors[2:], strict=False))

    def call(way: type) -> Any:
        x, dy, again = X.astype(kind), DY.astype(kind), X.astype(kind)
        y, saved = arraybn.batch_norm(x, *vectors[:2], **fixed)
        assert type(saved) is way
        dx, *gradients = arraybn.batch_norm_backward(DY.astype(kind), saved, out=x if over else dy)
        z, lost = arraybn.batch_norm(again, *vectors[:2], **fixed, out=again if over else None)
        if over:
            for gone, cause in ((saved, "an earlier backward wrote dx over it"), (lost, "the forward wrote y over x")):
                with pytest.raises(RuntimeError, match=cause):
                    arraybn.batch_norm_backward(dy, gone)
        over_dy, *_ = arraybn.batch_norm_backward(dy, arraybn.batch_norm(y, *vectors[:2], **fixed)[1], out=dy)
        return [y, saved._mean, saved._rstd, dx.copy(), *gradients, z, over_dy]

    wanted = outcome_of_long_way(functools.partial(call, functional.Saved))
    assert len(wanted) > 5
    for _ in range(2):
        assert outcome(functools.partial(call, functional.SavedRows)) == wanted


def test_an_x_that_was_changed_in_shape_or_dtype_is_not_read_beyond_its_end() -> None:
    x = X.copy()
    _, saved = arraybn.batch_norm(x, W, B)
    x.resize((3, 5, 4), refcheck=False)
    for dy in (DY[:3], DY):
        with pytest.raises(ValueError, match=r"reshape|shape"):
            arraybn.batch_norm_backward(dy, saved)
    x.dtype = "f8"
    x.resize(X.shape, refcheck=False)
    x[...] = X
    dx, *_ = arraybn.batch_norm_backward(DY.astype("f8"), saved)
    np.testing.assert_allclose(dx, arraybn.batch_norm_backward(DY, arraybn.batch_norm(X, W, B)[1])[0], atol=1e-6)


def test_memory_under_another_name_is_seen() -> None:
    line = X.copy()
    _, saved = arraybn.batch_norm(line[:], W, B)
    arraybn.batch_norm_backward(DY, saved, out=line)
    with pytest.raises(RuntimeError, match="an earlier backward wrote dx over it"):
        arraybn.batch_norm_backward(DY, saved)
    x, weight = X[:1, :, 0].copy(), W.copy()
    for _ in range(2):
        with pytest.raises(ValueError, match="out: expected memory disjoint from weight"):
            arraybn.batch_norm(x, weight, B, out=weight[None])


def test_unaligned_memory_takes_the_long_way() -> None:
    need("numba")
    for given in ((unaligned(X), W, B), (X, unaligned(W), B)):
        assert type(arraybn.batch_norm(*given)[1]) is functional.Saved
    assert type(arraybn.batch_norm(X, W, B)[1]) is functional.SavedRows
    _, saved = arraybn.batch_norm(X, W, B, out=unaligned(OUT))
    assert type(saved) is functional.Saved


@pytest.mark.parametrize("fixed", [{}, {"mean": M, "var": V}], ids=["batch", "fixed"])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_saved_forward_can_be_copied(duplicate: Any, fixed: Any) -> None:
    x = X.copy()
    _, saved = arraybn.batch_norm(x, W, **fixed)
    other = duplicate(saved)
    wanted = outcome(lambda: backward(DY, saved))
    if duplicate is copy.deepcopy:
        x[...] = 0
    assert outcome(lambda: backward(DY, other)) == wanted
    assert repr(other) == repr(saved)
    x = X.copy()
    _, lost = arraybn.batch_norm(x, W, **fixed, out=x)
    with pytest.raises(RuntimeError, match="because the forward wrote y over x"):
        arraybn.batch_norm_backward(DY, duplicate(lost))


class CheckedError(Exception):
    """A call was checked."""


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which a check is an error."""

    def refuse(*arguments: Any) -> Any:
        raise CheckedError

    def forbid() -> None:
        monkeypatch.setattr(functional, "_checked", refuse)

    return forbid


def test_calls_alike_are_checked_once_and_others_again(checked: Callable[[], None]) -> None:
    make_plans()
    checked()
    for out in (None, OUT):
        arraybn.batch_norm(X + 1, W + 1, B + 1, eps=0.1, out=out)
        arraybn.batch_norm(X, W, B, mean=M, var=V, out=out)
    for call in (
        lambda: arraybn.batch_norm(np.asfortranarray(X), W, B),
        lambda: arraybn.batch_norm(X, W, B.astype("f8")),
        lambda: arraybn.batch_norm(X[::-1], W, B),
        lambda: arraybn.batch_norm(X, W, B, mean=M, var=V.astype("f8")),
        lambda: arraybn.batch_norm(X, W, B, channel_axis=-2),
    ):
        with pytest.raises(CheckedError):
            call()


def test_a_call_that_fails_or_converts_leaves_no_plan() -> None:
    for call in (
        lambda: forward(X, W[:4]),
        lambda: forward(X, eps=-1.0),
        lambda: forward(X.astype(">f4")),
        lambda: forward(X, W.astype(">f4")),
    ):
        outcome(call)
    assert functional._PLANS == {}


def test_a_plan_keeps_no_array_alive() -> None:
    arrays = [array.copy() for array in (X, DY, W, B, OUT)]
    x, dy, w, b, out = arrays
    saved = arraybn.batch_norm(x, w, b, out=out)[1]
    arraybn.batch_norm_backward(dy, saved, out=out)
    there = [weakref.ref(array) for array in arrays]
    del arrays, x, dy, w, b, out, saved
    gc.collect()
    assert functional._PLANS
    assert [one() for one in there] == [None] * 5


def test_plans_keep_little_memory() -> None:
    def call(channels: int) -> None:
        x, weight = np.zeros((2, channels), "f4"), np.ones(channels, "f4")
        for vectors in ((), (weight, weight)):
            arraybn.batch_norm_backward(x, arraybn.batch_norm(x, *vectors)[1])

    call(49_000)
    tracemalloc.start()
    try:
        for channels in range(50_000, 50_020):
            call(channels)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 200_000  # the memory of one vector (C,) in float32
    finally:
        tracemalloc.stop()


def test_a_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan, "SIZE", 4)
    for n in range(2, 30):
        x = np.ones((n, 3), "f4")
        arraybn.batch_norm(x)
        assert 1 <= len(functional._PLANS) <= 4


def test_threads_with_right_and_wrong_calls_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan, "SIZE", 3)  # the table begins anew all the time
    parts = {n: X[:n] for n in range(2, 7)}
    wanted = {n: outcome(functools.partial(forward, part, W, B)) for n, part in parts.items()}
    wrong = outcome(lambda: forward(X, W[:4], B))

    def work(number: int) -> None:
        for turn in range(100):
            n = 2 + (number + turn) % 5
            assert outcome(functools.partial(forward, parts[n], W, B)) == wanted[n]
            assert outcome(lambda: forward(X, W[:4], B)) == wrong

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(work, range(4)))

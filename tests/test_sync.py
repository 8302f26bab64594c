"""The synchronized mode on threads: results are exact, the ranks agree, and every rank learns of every error."""

from __future__ import annotations

import copy
import ctypes
import importlib
import os
import pickle
import re
import subprocess
import sys
import threading
import types
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mpi import faults, whole
from support.homes import HOMES
from support.libraries import need

import arraybn
from arraybn import SyncBatchNorm, reference
from arraybn.sync import frames, roll
from arraybn.testing import ThreadComm, exact_moments, strategies, worst
from arraybn.testing.oracle import as_long

RANKS = (2, 3, 4, 5, 7)
PLAIN = {2: arraybn.BatchNorm1d, 3: arraybn.BatchNorm1d, 4: arraybn.BatchNorm2d, 5: arraybn.BatchNorm3d}

# ---- Frames: how two become one --------------------------------------------------------------------------------------

numbers = hnp.arrays("f8", (2, 3), elements=st.floats(-1e9, 1e9) | st.sampled_from([0.0, -0.0, np.inf, np.nan]))


@st.composite
def drawn_frames(draw: st.DrawFn, operation: str = "forward") -> Any:
    fields = [frames.FORMAT, 1, frames.code(operation), *(0,) * (len(frames.FIELDS) - 3)]
    rows = draw(numbers)
    n = draw(st.integers(0, 5))
    if operation == "forward":
        rows = np.stack([rows[0], abs(rows[1])]) if n else np.zeros((2, 3))
    return frames.frame(fields, 0, n, rows)


def together(a: Any, b: Any) -> bytes:
    result = frames.combine(a, b.copy())
    frames.canonical(frames.body(result))
    return result.tobytes()


@given(st.sampled_from(["forward", "backward"]), st.data())
def test_e2_n4_two_frames_give_the_same_bits_in_either_order(operation: str, data: st.DataObject) -> None:
    a, b = data.draw(drawn_frames(operation)), data.draw(drawn_frames(operation))
    assert together(a, b) == together(b, a)


def test_e2_n4_without_the_ordering_the_bits_depend_on_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def unordered(a: arraybn.Moments, b: arraybn.Moments) -> arraybn.Moments:
        n, delta = a.n + b.n, b.mean - a.mean
        return arraybn.Moments(n, a.mean + delta * (b.n / n), a.m2 + b.m2 + delta**2 * (a.n * b.n / n))

    rng = np.random.default_rng(0)
    fields = [frames.FORMAT, *(0,) * (len(frames.FIELDS) - 1)]
    a, b = (frames.frame(fields, 0, n, rng.standard_normal((2, 256)) ** 2) for n in (3, 4))
    assert together(a, b) == together(b, a)
    monkeypatch.setattr(reference, "pool", unordered)
    assert together(a, b) != together(b, a)


def tree(draw: Any, parts: list[Any]) -> Any:
    """Return the frames combined in a drawn order."""
    parts = [part.copy() for part in parts]
    while len(parts) > 1:
        a = parts.pop(draw(st.integers(0, len(parts) - 1)))
        b = parts.pop(draw(st.integers(0, len(parts) - 1)))
        parts.append(frames.combine(a, b))
    return parts[0]


# ---- The compiled reduction, the twin of frames.combine ----


def compiled_combine(a: Any, b: Any, count: int = 1) -> Any:
    """Replace the frame b by that of a and b together, as MPI does, and return b."""
    words, number = ctypes.POINTER(ctypes.c_int64), ctypes.c_int32(count)
    function = importlib.import_module("arraybn.sync.compiled").callback().ctypes
    function(a.ctypes.data_as(words), b.ctypes.data_as(words), ctypes.byref(number), None)
    return b


def fuzzed_frame(rng: np.random.Generator, operation: str, header: Sequence[int], room: int) -> Any:
    """Return a frame of numbers of all sizes, ties, zeros of both signs, inf and NaN."""
    ties = rng.random() < 0.3
    rows = np.round(rng.standard_normal((2, room)), 1) if ties else rng.standard_normal((2, room))
    rows *= 10.0 ** rng.integers(-300, 300, rows.shape) if rng.random() < 0.5 else 1
    odd = rng.random(rows.shape) < 0.1
    rows[odd] = rng.choice([0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, 1.7e308], odd.sum())
    rows.view(np.int64)[np.isnan(rows)] ^= rng.integers(0, 2**50)  # NaNs of several bits
    n = int(rng.choice([0, 1, 2, 2, 3, 10**6, 10**8 + 1, 2**31, 2**53 + 1, 2**59]))
    frame = frames.frame(header, 0, n, rows, room)
    if rng.random() < 0.1:
        frame.view(np.int64)[rng.integers(9)] ^= 1 << rng.integers(63)  # another call
    if rng.random() < 0.1:
        frame.view(np.int32)[18] = rng.choice([frames.ERROR, frames.BROKEN])
    return frame


@pytest.mark.parametrize("ranks", RANKS)
def test_the_compiled_reduction_has_the_bits_of_the_one_in_python(ranks: int) -> None:
    need("numba")
    rng = np.random.default_rng(ranks)
    for index in range(400):
        operation = str(rng.choice(["forward", "forward", "backward", "average_gradients"]))
        header = [frames.FORMAT, index, frames.code(operation), *rng.integers(-(2**62), 2**62, 6).tolist()]
        room = 256 if index % 3 else int(rng.integers(1, 2000))
        parts = [fuzzed_frame(rng, operation, header, room) for _ in range(ranks)]
        both = []
        for combine in (frames.combine, compiled_combine):
            whole = [part.copy() for part in parts]
            order = np.random.default_rng(index)
            while len(whole) > 1:
                i = int(order.integers(len(whole) - 1))  # neighbours, as MPI does
                whole[i : i + 2] = [combine(whole[i], whole[i + 1])]
            both.append(whole[0].tobytes())
        assert both[0] == both[1], f"{operation} {index}, room {room}"


def test_the_compiled_reduction_leaves_a_part_of_a_cut_message_alone_and_sees_what_differs() -> None:
    need("numba")
    fields = [frames.FORMAT, *(0,) * 8]
    one, other = (frames.frame(fields, 0, 2, np.full((2, 256), value)) for value in (1.0, 3.0))
    assert compiled_combine(one, other.copy(), count=0).tobytes() == other.tobytes()
    mean, m2 = frames.body(compiled_combine(one, other.copy()))
    assert (mean == 2).all()
    assert (m2 == 1 + 3 + 4).all()  # 2·2/4·(3 − 1)² between the parts
    fields[4] = 1
    assert frames.flags_and_n(compiled_combine(one, frames.frame(fields, 0, 2))) == (1 << 4, 0)


def test_without_numba_there_is_no_compiled_reduction() -> None:
    code = "import sys; sys.modules['numba'] = None; import arraybn.sync\ntry: import arraybn.sync.compiled"
    assert python(f"{code}\nexcept ImportError: print('none')").stdout.strip() == "none"
    code = "import arraybn.sync.compiled; print(arraybn.sync.compiled.callback())"
    need("numba")
    assert python(code, NUMBA_DISABLE_JIT="1").stdout.strip() == "None"


@given(st.lists(st.lists(st.integers(0, 1), min_size=9, max_size=9), min_size=2, max_size=6), st.data())
def test_a_disagreement_is_seen_whatever_the_order_and_agreement_is_not_a_disagreement(
    headers: Any, data: st.DataObject
) -> None:
    flags = [data.draw(st.sampled_from([0, 0, 0, frames.ERROR, frames.BROKEN])) for _ in headers]
    expected = 0
    for index in range(9):
        expected |= (len({header[index] for header in headers}) > 1) << index
    for flag in flags:
        expected |= flag
    parts = [frames.frame(header, flag, 1) for header, flag in zip(headers, flags, strict=True)]
    results = [frames.flags_and_n(tree(data.draw, parts)) for _ in range(3)]
    assert {flags for flags, _ in results} == {expected}
    assert results[0][1] == (0 if expected else len(headers))


@settings(max_examples=30)
@given(strategies.batches(kinds=["normal", "far", "outlier", "constant", "nearly constant"]), st.data())
def test_n1_every_order_of_pooling_keeps_the_digits(batch: Any, data: st.DataObject) -> None:
    samples, c, _ = batch.x.shape
    cuts = sorted(data.draw(st.lists(st.integers(0, samples), max_size=6)))
    parts = [arraybn.moments(part) for part in np.split(batch.x, cuts)]
    sent = [frames.frame([frames.FORMAT, *(0,) * 8], 0, m.n, np.stack([m.mean, m.m2])) for m in parts]
    result = tree(data.draw, sent)
    n = frames.flags_and_n(result)[1]
    mean, m2 = frames.body(result)[:, :c]
    for channel in range(c):
        exact_mean, exact_m2 = exact_moments(batch.x[:, channel])
        var = as_long(exact_m2 / n)
        floor = max(abs(as_long(exact_mean)), np.ldexp(np.sqrt(var), -20))
        assert worst(mean[channel].astype("f4"), as_long(exact_mean), floor, "float32") <= 1
        assert worst((m2[channel] / n).astype("f4"), var, var, "float32") <= 1


def called(**values: Any) -> bytes:
    return frames.text_of_call({"operation": "forward", "layer": "layer '1'", "eps": 1e-5, "channels": 3, **values})


def test_the_first_cause_is_the_message_and_the_rest_are_notes() -> None:
    said = "the ranks are not in the same call; they disagree on "
    backward = called(operation="backward", layer="layer '2'", eps=1, channels=4)
    texts = [called(), backward, called()]
    assert frames.message(texts, 2) == (
        f"{said}operation: forward of layer '1' on ranks 0, 2 and backward of layer '2' on rank 1\n"
        "Likely reason: a rank is in evaluation, or has skipped a layer, its backward or another call"
    )
    assert frames.notes(texts) == [
        "they also disagree on layer: layer '1' on ranks 0, 2 and layer '2' on rank 1",
        "they also disagree on eps: 1e-05 on ranks 0, 2 and 1 on rank 1",
        "they also disagree on channels: 3 on ranks 0, 2 and 4 on rank 1",
    ]
    order = ["operation", "layer", "call of the forward", "eps", "channels", "num_batches_tracked", "call"]
    other = dict.fromkeys(order, "other")
    while order:  # without the first cause, the next one is the first
        first = order.pop(0)
        assert frames.message([called(), called(**other)], 2).startswith(f"{said}{first}: ")
        assert len(frames.notes([called(), called(**other)])) == len(order)
        del other[first]
    assert frames.message([called(eps=1), called()], 2).splitlines()[0].endswith(", in the forward of layer '1'")


def test_a_message_of_many_ranks_has_three_short_lines() -> None:
    texts = [called(**{f"{index}.weight": f"{'float32 ' * 40}{rank}" for index in range(50)}) for rank in range(99)]
    message = frames.message(texts, 2)
    assert "on rank 2 and 96 other values, in the forward" in message
    assert len(message.splitlines()) <= 3
    assert len(message) < 500
    texts = [called(eps=rank % 2) for rank in range(99)]
    message = frames.message(texts, 2)
    assert "0 on ranks 0, 2, 4, 6, 8, 10, 12, 14, … (50 ranks) and 1 on ranks 1, 3," in message
    assert len(message) < 400


def test_messages_name_ranks_and_group_what_is_alike() -> None:
    texts = [frames.text_of_error(ValueError(text)) for text in ("a", "b", "a", "a", "a")]
    assert frames.message(texts, frames.ERROR) == "ranks 0, 2–4: a\nrank 1: b"
    calls = [frames.text_of_call({"layer": "x", "eps": 1, "call": call}) for call in (7, 7, 8)]
    assert frames.message([*calls, texts[1]], 0) == "rank 3: b"  # an error explains a disagreement
    assert frames.message(calls, 2) == (
        "the ranks are not in the same call; they disagree on call: 7 on ranks 0–1 and 8 on rank 2\n"
        "Likely reason: a rank has lost a call by an interrupt"
    )
    assert frames.notes(calls) == frames.notes([*calls, texts[1]]) == []
    assert frames.message(calls[:2], 0b100000001).endswith("they disagree on format, bits")
    long = frames.text_of_error(MemoryError("ü" * 5000))
    assert len(long) == frames.TEXT
    assert frames.message([long], 1).startswith("rank 0: MemoryError: üü")
    assert frames.message([frames.text_of_error(ValueError("a file \udc80"))], 1) == "rank 0: a file ?"


# ---- One batch over several ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_together_are_one_rank_on_the_whole_batch(ranks: int) -> None:
    rng = np.random.default_rng(ranks)
    for index in range(0, 48, 1 if ranks == 3 else 5):
        case = whole.case(rng, ranks, index)
        whole.check(case, ThreadComm.run(ranks, partial(whole.step, case)))


def test_layers_that_are_not_synchronized_fail_the_same_check() -> None:
    rng = np.random.default_rng(0)
    for index in range(0, 48, 7):
        case = whole.case(rng, 2, index)
        case = whole.without(case, cuts=(0, 2, len(case.x)))
        found = ThreadComm.run(2, partial(whole.step, case, kind=PLAIN[case.x.ndim]))
        with pytest.raises(AssertionError):
            whole.check(case, found)


def test_the_check_sees_a_result_that_is_wrong_by_a_thousandth() -> None:
    case = whole.case(np.random.default_rng(0), 2, 1)
    found = ThreadComm.run(2, partial(whole.step, case))
    whole.check(case, found)
    for name in ("y", "dx", "dweight", "mean", "m2", "running_mean", "running_var"):
        spoiled = [{**one, name: one[name] * one[name].dtype.type(1.001)} for one in found]
        with pytest.raises(AssertionError):
            whole.check(case, spoiled)
    spoiled = [found[0], {**found[1], "mean": np.nextafter(found[1]["mean"], 9)}]
    with pytest.raises(AssertionError, match=r"mean differs between ranks"):
        whole.check_same_bits(spoiled)


@settings(max_examples=40)
@given(strategies.batches(kinds=["normal", "far", "outlier", "constant"]), st.data())
def test_no_split_of_any_batch_changes_anything(batch: Any, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(2, 5))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(batch.x)), min_size=ranks - 1, max_size=ranks - 1)))
    case = whole.Case(batch.x, batch.dy, batch.weight, batch.bias, (0, *cuts, len(batch.x)), eps=batch.eps)
    found = ThreadComm.run(ranks, partial(whole.step, case))
    whole.check(case, found)
    constant = (batch.x == batch.x[:1, :, :1]).all(axis=(0, 2))
    y = np.concatenate([part["y"] for part in found])
    assert (y[:, constant] == batch.bias[constant][:, None]).all()  # N3


@settings(max_examples=30)
@given(strategies.batches(kinds=["normal", "far"]), st.data())
def test_the_order_of_the_ranks_changes_nothing_beyond_rounding(batch: Any, data: st.DataObject) -> None:
    parts = np.split(batch.x, sorted(data.draw(st.lists(st.integers(0, len(batch.x)), min_size=3, max_size=3))))
    order = data.draw(st.permutations(range(4)))

    def moments(parts: list[Any]) -> Any:
        return ThreadComm.run(4, lambda comm: arraybn.batch_norm(parts[comm.rank], comm=comm)[1].moments)[0]

    one, other = moments(parts), moments([parts[index] for index in order])
    std = np.sqrt(one.m2 / one.n)
    assert one.n == other.n
    assert (abs(one.mean - other.mean) <= 8 * 2.0**-53 * (abs(one.mean) + std)).all()
    assert (abs(one.m2 - other.m2) <= 1e-9 * one.m2).all()


@pytest.mark.parametrize("ranks", [2, 5])
def test_pytorch_on_the_whole_batch_agrees(ranks: int) -> None:
    torch = need("torch")
    rng = np.random.default_rng(1)
    for index in (8, 9, 10, 11, 26, 27):  # float64, all numbers of dimensions
        case = whole.without(whole.case(rng, ranks, index), channel_axis=1, training=True, momentum=0.3)
        case = whole.without(case, affine=True, track=True)
        if case.x.shape[1] != len(case.weight):
            case = whole.without(case, x=np.moveaxis(case.x, -1, 1), dy=np.moveaxis(case.dy, -1, 1))
        found = ThreadComm.run(ranks, partial(whole.step, case))
        theirs = getattr(torch.nn, PLAIN[case.x.ndim].__name__)(case.channels, momentum=0.3).double()
        with torch.no_grad():
            theirs.weight[:], theirs.bias[:] = torch.asarray(case.weight), torch.asarray(case.bias)
            theirs.running_mean[:] = 0.5
        x = torch.asarray(case.x).requires_grad_()
        y = theirs(x)
        y.backward(torch.asarray(case.dy))
        close = partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-7)  # theirs has |mean|/std up to 30 here
        close(np.concatenate([part["y"] for part in found]), y.detach().numpy())
        close(np.concatenate([part["dx"] for part in found]), x.grad.numpy())
        close(sum(part["dweight"] for part in found), theirs.weight.grad.numpy(), rtol=1e-5, atol=1e-5)  # ours: float32
        close(found[0]["running_var"], theirs.running_var.numpy(), rtol=1e-6)
        close(found[0]["running_mean"], theirs.running_mean.numpy(), rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 256, 257, 600])
def test_more_channels_than_a_frame_has_room_for(channels: int) -> None:
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 9, channels))
    y, saved = arraybn.batch_norm(x)
    dx, _, _ = arraybn.batch_norm_backward(dy, saved)
    cuts = (0, 2, 2, 9)

    def work(comm: Any) -> Any:
        mine = slice(cuts[comm.rank], cuts[comm.rank + 1])
        y, saved = arraybn.batch_norm(x[mine], comm=comm)
        return y, arraybn.batch_norm_backward(dy[mine], saved)[0]

    found = ThreadComm.run(3, work)
    np.testing.assert_allclose(np.concatenate([part[0] for part in found]), y, rtol=0, atol=1e-14)
    np.testing.assert_allclose(np.concatenate([part[1] for part in found]), dx, rtol=0, atol=1e-14)


class Counting:
    """A reducer that notes every exchange."""

    def __init__(self, reducer: Any) -> None:
        self._reducer, self.calls = reducer, []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._reducer, name)
        if name not in ("allreduce", "add", "broadcast", "allgather"):
            return method

        def counted(what: Any, deadline: Any) -> Any:
            self.calls.append((name, len(what)))
            return method(what, deadline)

        return counted


def test_one_collective_of_one_length_each_way_and_two_beyond_256_channels() -> None:
    def work(comm: Any) -> Any:
        comm.exchange.reducer = counting = Counting(comm.exchange.reducer)
        found = []
        for channels in (1, 64, 256, 257, 2048):
            layer = SyncBatchNorm(channels, process_group=comm)
            for call in (layer, layer.backward):
                counting.calls.clear()
                call(np.ones((2, channels)) + comm.rank)
                found.append(list(counting.calls))
        return found

    frame = ("allreduce", frames.LENGTH)
    assert frames.LENGTH < 4300
    more = [("allreduce", frames.LENGTH - 16 * (256 - beyond)) for beyond in (1, 1792)]
    expected = [[frame]] * 6 + [[frame, more[0]]] * 2 + [[frame, more[1]]] * 2
    for ranks in (2, 5):
        assert ThreadComm.run(ranks, work) == [expected] * ranks


def test_all_ranks_empty_one_value_in_all_and_one_value_on_each() -> None:
    def work(comm: Any, sizes: Any) -> Any:
        layer = faults.layer_on(comm)
        before, x = faults.state(layer), np.full((sizes[comm.rank], 3), 1.0 + comm.rank)
        if sum(sizes) == 1:
            with pytest.raises(ValueError, match=r"Expected more than 1 value") as caught:
                layer(x)
            assert not isinstance(caught.value, arraybn.SyncError)
            assert faults.state(layer) == before
            faults.good(layer, comm)
            return str(caught.value)
        y = layer(x)
        assert layer.backward(y).shape == x.shape
        return layer.num_batches_tracked, layer.running_mean.tolist(), layer.bias.grad.tolist()

    empty = ThreadComm.run(3, partial(work, sizes=(0, 0, 0)))
    assert empty == [(0, [0, 0, 0], [0, 0, 0])] * 3
    texts = ThreadComm.run(3, partial(work, sizes=(0, 1, 0)))
    for text, rows in zip(texts, (0, 1, 0), strict=True):
        assert text.startswith(f"Expected more than 1 value per channel when training, got input size ({rows}, 3)")
    each = ThreadComm.run(2, partial(work, sizes=(1, 1)))
    assert each[0][:2] == each[1][:2] == (1, [np.float32(0.15)] * 3)


@pytest.mark.parametrize("name", ["numpy", "torch", "strict", "strict-no_float64"])
def test_other_namespaces_are_synchronized_too(name: str) -> None:
    home = HOMES[name](None)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((2, 9, 3)) + 1e4).astype("f4")
    y, saved = arraybn.batch_norm(home.array(x))
    dx, _, _ = arraybn.batch_norm_backward(home.array(dy), saved)
    cuts = (0, 4, 4, 9)

    def work(comm: Any) -> Any:
        mine = slice(cuts[comm.rank], cuts[comm.rank + 1])
        y, saved = arraybn.batch_norm(home.array(x[mine]), comm=comm)
        dx, _, _ = arraybn.batch_norm_backward(home.array(dy[mine]), saved)
        low = saved.moments.mean_low
        return *(home.numpy(a) for a in (y, dx, saved.moments.mean)), None if low is None else home.numpy(low)

    found = ThreadComm.run(3, work)
    assert found[0][2].dtype == home.wide
    assert (found[0][3] is None) == (home.wide == "float64")
    assert len({part[2].tobytes() for part in found}) == 1
    np.testing.assert_allclose(np.concatenate([part[0] for part in found]), home.numpy(y), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(np.concatenate([part[1] for part in found]), home.numpy(dx), rtol=1e-5, atol=2e-2)


def test_fixed_statistics_take_no_part() -> None:
    def work(comm: Any) -> Any:
        if comm.rank == 0:
            mean, var = np.zeros(2), np.ones(2)
            y, saved = arraybn.batch_norm(np.ones((2, 2)), mean=mean, var=var, comm=comm)
            arraybn.batch_norm_backward(y, saved)
            layer = faults.layer_on(comm).eval()
            layer.backward(layer(np.ones((2, 3))))
            with pytest.raises(RuntimeError, match=r"^SyncBatchNorm.backward: expected a forward"):
                layer.backward(np.ones((2, 3)))
        return comm.exchange.calls

    assert ThreadComm.run(2, work) == [0, 0]


@pytest.mark.parametrize(("given", "other"), [("mean", "var"), ("var", "mean")])
def test_half_of_fixed_statistics_is_an_error_on_all_ranks(given: str, other: str) -> None:
    def work(comm: Any) -> str:
        x = np.ones((2, 2)) + comm.rank
        with pytest.raises(arraybn.SyncError) as caught:
            arraybn.batch_norm(x, comm=comm, **({given: np.ones(2)} if comm.rank == 0 else {}))
        assert arraybn.batch_norm(x, comm=comm)[1].moments.mean.tolist() == [1.5, 1.5]
        return str(caught.value)

    texts = ThreadComm.run(2, work)
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"rank 0: {other}: expected an array, because {given} is given")


def test_out_is_written_into_also_over_ranks() -> None:
    x = np.random.default_rng(0).standard_normal((6, 3, 2))
    y, saved = arraybn.batch_norm(x)
    dx, _, _ = arraybn.batch_norm_backward(x, saved)

    def work(comm: Any) -> None:
        mine = x[: 2 if comm.rank == 0 else 6][0 if comm.rank == 0 else 2 :].copy()
        out = np.empty_like(mine)
        got, saved = arraybn.batch_norm(mine, comm=comm, out=out)
        assert got is out
        got, _, _ = arraybn.batch_norm_backward(mine.copy(), saved, out=mine)
        assert got is mine
        rows = slice(0, 2) if comm.rank == 0 else slice(2, 6)
        np.testing.assert_allclose(out, y[rows], atol=1e-14)
        np.testing.assert_allclose(mine, dx[rows], atol=1e-14)

    ThreadComm.run(2, work)


@pytest.mark.parametrize("given", [True, False], ids=["out", "no out"])
def test_a_wider_dy_is_summed_before_dx_is_rounded_also_over_ranks(given: bool) -> None:
    x, dy = np.random.default_rng(0).standard_normal((2, 6, 3, 2))
    x, dy = x.astype("f2"), (1e-9 * dy).astype("f4")
    weight = np.full(3, 1e9)
    _, saved = arraybn.batch_norm(x.astype("f4"), weight)
    expected = arraybn.batch_norm_backward(dy, saved)
    assert abs(expected[1]).min() > 0

    def work(comm: Any) -> Any:
        rows = slice(0, 2) if comm.rank == 0 else slice(2, 6)
        with np.errstate(over="ignore"):  # in y
            _, saved = arraybn.batch_norm(x[rows], weight, comm=comm)
        out = np.empty_like(x[rows]) if given else None
        dx, dweight, _ = arraybn.batch_norm_backward(dy[rows], saved, out=out)
        assert dx.dtype == np.float16
        assert out is None or dx is out
        np.testing.assert_allclose(dx, expected[0][rows], rtol=2**-10, atol=2**-24)
        return dweight

    np.testing.assert_allclose(sum(ThreadComm.run(2, work)), expected[1], rtol=1e-6)


# ---- Errors are agreed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", [*faults.FORWARD, *faults.BACKWARD])
def test_a_fault_on_one_rank_is_an_error_on_all_and_the_next_step_works(name: str, ranks: int) -> None:
    found = ThreadComm.run(ranks, partial(faults.run_fault, name=name))
    expected = ThreadComm.run(ranks, faults.run_without)
    assert len({text for text, _ in found}) == 1
    assert [state for _, state in found] == expected


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", list(faults.DISAGREE))
def test_ranks_that_disagree_are_told_on_what(name: str, ranks: int) -> None:
    assert len(set(ThreadComm.run(ranks, partial(faults.run_disagreement, name=name)))) == 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_out_of_step_are_told(ranks: int) -> None:
    texts = ThreadComm.run(ranks, faults.run_sequences)
    assert len({tuple(one) for one in texts}) == 1
    expected = [
        "operation: backward of layer 'a' on rank",
        "layer: layer 'a' on rank",
        "layer: layer 'b' on rank",
        "call of the forward: ",
        "layer: layer 'a' on rank",
        "operation: average_gradients of the model on rank",
        "layer: unnamed layer ",
    ]
    for text, words in zip(texts[0], expected, strict=True):
        assert text.startswith(f"the ranks are not in the same call; they disagree on {words}")
        assert len(text.splitlines()) == 2


def test_a_rank_in_evaluation_that_meets_another_call_is_told_in_two_lines() -> None:
    def work(comm: Any) -> Any:
        model = arraybn.Sequential(arraybn.BatchNorm1d(3), arraybn.BatchNorm1d(3))
        SyncBatchNorm.convert_sync_batchnorm(model, comm)
        if comm.rank == 1:
            model.eval()
            model(faults.X[..., 0])
        with pytest.raises(arraybn.SyncError) as caught:
            arraybn.average_gradients(model, comm, weight=1) if comm.rank == 1 else model(faults.X[..., 0])
        return str(caught.value), "\n".join(caught.value.__notes__)

    found = ThreadComm.run(3, work)
    assert len(set(found)) == 1
    message, notes = found[0]
    assert message == (
        "the ranks are not in the same call; they disagree on operation: forward of layer '0' on ranks 0, 2 and"
        " average_gradients of the model on rank 1\n"
        "Likely reason: a rank is in evaluation, or has skipped a layer, its backward or another call"
    )
    assert "they also disagree on eps: 1e-05 on ranks 0, 2 and not said on rank 1" in notes
    assert "they also disagree on 1.weight: not said on ranks 0, 2 and float32 (3,) on rank 1" in notes


def test_errors_of_several_ranks_and_of_the_functions() -> None:
    def work(comm: Any) -> Any:
        x, dy = np.ones((2, 3)), np.ones((2, 3))
        _, saved = arraybn.batch_norm(x, comm=comm)
        texts = []
        for call in (
            lambda: arraybn.batch_norm(x if comm.rank == 0 else [1.0], comm=comm),
            lambda: arraybn.batch_norm(x if comm.rank == 2 else x[0], comm=comm),
            lambda: arraybn.batch_norm(x, None if comm.rank else np.ones(4), comm=comm),
            lambda: arraybn.batch_norm(x, comm=comm, out=None if comm.rank else x[:1]),
            lambda: arraybn.batch_norm(x if comm.rank else x[:, :2].copy(), comm=comm),
            lambda: arraybn.batch_norm_backward(dy if comm.rank else dy[:1], saved),
        ):
            with pytest.raises(arraybn.SyncError) as caught:
                call()
            texts.append(str(caught.value))
        _, saved = arraybn.batch_norm(x * comm.rank, comm=comm)
        assert saved.moments.mean.tolist() == [1, 1, 1]
        return texts

    found = ThreadComm.run(3, work)
    assert found[0] == found[1] == found[2]
    assert found[0][0].startswith("ranks 1–2: x: expected an array")
    assert found[0][1].startswith("ranks 0–1: x: expected at least 2 dimensions")
    assert found[0][2].startswith("rank 0: weight: expected shape (3,)")
    assert found[0][3].startswith("rank 0: out: expected shape (2, 3)")
    assert found[0][4] == (
        "the ranks are not in the same call; they disagree on channels: 2 on rank 0 and 3 on ranks 1–2, in the"
        " forward of batch_norm\nLikely reason: the inputs of the ranks do not have the same number of channels"
    )
    assert found[0][5].startswith("rank 0: dy: expected shape (2, 3)")


def failing(sweep: str, error: BaseException) -> Any:
    """Return the reference sweeps, of which one raises."""

    def fail(*arguments: Any) -> None:
        raise error

    sweeps = {name: getattr(reference, name) for name in ("moments", "dots", "affine", "affine2")}
    return types.SimpleNamespace(**{**sweeps, sweep: fail})


def test_a_failure_before_the_exchange_is_told_and_one_after_it_breaks_the_channel() -> None:
    def work(comm: Any) -> Any:
        x = np.ones((2, 3)) + comm.rank

        def call(sweep: str = "", error: BaseException | None = None) -> str:
            kernels = failing(sweep, error) if sweep and comm.rank == 1 else "reference"
            try:
                arraybn.batch_norm(x, comm=comm, kernels=kernels)
            except (arraybn.SyncError, MemoryError, KeyboardInterrupt) as caught:
                return f"{type(caught).__name__}: {caught}"
            return "fine"

        return [call("moments", MemoryError("full")), call(), call("affine", MemoryError("full")), call(), call()]

    zero, one = ThreadComm.run(2, work)
    told = "SyncError: rank 1: MemoryError: full"
    assert (zero[:3], one[:3]) == ([told, "fine", "fine"], [told, "fine", "MemoryError: full"])
    assert zero[3] == one[3]
    assert zero[3] == (
        "SyncError: rank 1: after the exchange in the forward of batch_norm (call 3 on this communicator) this rank"
        " alone failed, so that its state differs: MemoryError: full"
    )
    assert zero[4] == one[4] == zero[3] + ". Nothing more can be synchronized over this communicator"


def test_an_interrupt_before_the_exchange_is_told_with_the_next_call() -> None:
    def work(comm: Any) -> Any:
        layer, found = faults.layer_on(comm), []
        faults.good(layer, comm)
        kernels = failing("moments", KeyboardInterrupt()) if comm.rank == 1 else "reference"
        if comm.rank == 1:
            with pytest.raises(KeyboardInterrupt):
                arraybn.batch_norm(np.ones((2, 3)), comm=comm, kernels=kernels)
        for _ in range(2):
            with pytest.raises(arraybn.SyncError) as caught:
                layer(faults.part(faults.X, comm))
            found.append(str(caught.value))
        return found

    zero, one = ThreadComm.run(2, work)
    assert zero == one
    assert "KeyboardInterrupt" in zero[0]
    assert zero[1].startswith(zero[0])


def test_an_interrupt_while_waiting_breaks_the_channel_of_that_rank() -> None:
    def work(comm: Any) -> Any:
        layer = faults.layer_on(comm)
        layer.timeout = 0.3
        if comm.rank == 1:

            def pressed(frame: Any, deadline: Any) -> None:
                raise KeyboardInterrupt

            comm.exchange.reducer.allreduce = pressed
            with pytest.raises(KeyboardInterrupt):
                layer(np.ones((2, 3)))
            with pytest.raises(arraybn.SyncError, match=r"^rank 1: KeyboardInterrupt ended the"):
                layer(np.ones((2, 3)))
        else:
            with pytest.raises(arraybn.SyncTimeoutError):
                layer(np.ones((2, 3)))

    ThreadComm.run(2, work, leave=False)


def test_a_layer_commits_nothing_when_it_fails_after_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(comm: Any) -> Any:
        layer = faults.layer_on(comm)
        before = faults.state(layer)
        if comm.rank == 1:

            def fails(*arguments: Any) -> Any:
                raise OSError("gone")

            object.__setattr__(layer, "_tracked", fails)
            with pytest.raises(OSError, match=r"gone"):
                layer(faults.part(faults.X, comm))
            assert faults.state(layer) == before
        else:
            layer(faults.part(faults.X, comm))
            assert faults.state(layer) != before
        with pytest.raises(arraybn.SyncError, match=r"rank 1: after the exchange.*OSError: gone"):
            layer(faults.part(faults.X, comm))

    ThreadComm.run(2, work)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_does_not_come_is_a_timeout_on_the_others(ranks: int) -> None:
    def work(comm: Any) -> Any:
        layer = faults._named(faults.layer_on(comm), "blocks.0.norm")
        layer.timeout = 0.2
        faults.good(layer, comm)
        if comm.rank == 1:
            layer.eval()
            layer(faults.part(faults.X, comm))
            return None
        before = faults.state(layer)
        with pytest.raises(arraybn.SyncTimeoutError) as caught:
            layer(faults.part(faults.X, comm))
        assert isinstance(caught.value, TimeoutError)
        assert faults.state(layer) == before
        with pytest.raises(arraybn.SyncError) as again:
            layer(faults.part(faults.X, comm))
        return str(caught.value), str(again.value)

    first, again = ThreadComm.run(ranks, work, leave=False)[0]
    assert first == (
        f"rank 0 of {ranks} waited 0.2 s for the other ranks in the forward of layer 'blocks.0.norm' (call 3 on this"
        " communicator). Likely causes: a rank is in evaluation, has skipped this layer or its backward, has a batch"
        " less, was given another process_group, or has ended\n"
        f"rank{'s 0, 2 wait' if ranks == 3 else ' 0 waits'} in the forward of layer 'blocks.0.norm' (call 3); rank 1"
        " does not answer: it has ended, or does something else"
    )
    assert again == (
        "rank 0 gave up the forward of layer 'blocks.0.norm' (call 3 on this communicator)."
        " Nothing more can be synchronized over this communicator"
    )


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_that_wait_answer_the_roll_call_and_a_late_one_hears_it(ranks: int) -> None:
    gave_up = threading.Barrier(ranks)

    def work(comm: Any) -> str:
        layer = faults._named(faults.layer_on(comm), "norm")
        faults.good(layer, comm)
        layer.timeout = 0.5 if comm.rank == 0 else 30 if comm.rank % 2 else None
        if comm.rank == 1:
            gave_up.wait()
        before = faults.state(layer)
        with pytest.raises(arraybn.SyncTimeoutError) as caught:
            layer(faults.part(faults.X, comm))
        assert faults.state(layer) == before
        with pytest.raises(arraybn.SyncError, match=rf"^rank {comm.rank} gave up .*\. Nothing more"):
            layer(faults.part(faults.X, comm))
        if comm.rank != 1:
            gave_up.wait()
        return str(caught.value)

    found, call = ThreadComm.run(ranks, work, leave=False), "the forward of layer 'norm' (call 3"
    waiting = {2: "rank 0 waits in", 3: "ranks 0, 2 wait in", 7: "ranks 0, 2–6 wait in"}[ranks]
    did = {0: "waited 0.5 s for the other ranks in {}", 1: "came to {} when the time limit of another rank was over"}
    end = {1: f"rank 1 came too late to {call})"}
    for rank, text in enumerate(found):
        first, second = text.splitlines()
        here = did.get(rank, "gave up {}, because the time limit of another rank was over")
        assert first.startswith(f"rank {rank} of {ranks} {here.format(f'{call} on this communicator)')}. Likely causes")
        missing = "rank 1 does not answer: it has ended, or does something else"
        assert second == f"{waiting} {call}); {end.get(rank, missing)}"


def test_the_sentence_of_a_roll_call() -> None:
    def said(size: int, calls: dict[int, str]) -> str:
        return roll.sentence({rank: roll.answer(roll.WAITS, call, 1) for rank, call in calls.items()}, size)

    assert said(4, {3: "A", 0: "A"}) == (
        "ranks 0, 3 wait in A; ranks 1–2 do not answer: they have ended, or do something else"
    )
    assert said(3, {0: "A", 1: "B", 2: "A"}) == "ranks 0, 2 wait in A; rank 1 waits in B"
    many = said(9, dict(enumerate("ABCDDEFG")))
    assert many.startswith(
        "rank 0 waits in A; rank 1 waits in B; rank 2 waits in C; ranks 3–7 wait in other calls; rank 8"
    )
    assert len(roll.answer(roll.LATE, "ü" * 500, 1)) == roll.LENGTH
    assert said(1, {0: "ü" * 500}).endswith("üü")
    assert [roll.seconds_for(limit) for limit in (2.0, 50.0, 600.0, None)] == [0.2, 5, 5, 5]


@pytest.mark.parametrize("name", ["average_gradients", "broadcast_state"])
def test_the_helpers_have_a_time_limit_of_their_own(name: str) -> None:
    call = {
        "average_gradients": partial(arraybn.average_gradients, weight=1),
        "broadcast_state": arraybn.broadcast_state,
    }

    def work(comm: Any) -> Any:
        layer = faults.layer_on(comm)
        with pytest.raises(arraybn.SyncError) as caught:
            call[name](layer, comm, timeout=-1 if comm.rank == 1 else 5)
        call[name](layer, comm, timeout=None)
        if comm.rank == 0:
            with pytest.raises(arraybn.SyncTimeoutError, match=rf"waited 0.2 s .* in the {name} of the model \(call 3"):
                call[name](layer, comm, timeout=0.2)
        return str(caught.value)

    texts = ThreadComm.run(2, work, leave=False)
    assert texts[0] == texts[1]
    assert texts[0].startswith("rank 1: timeout: expected a number of seconds > 0")


def test_comm_is_another_name_for_process_group() -> None:
    def work(comm: Any) -> Any:
        layer = SyncBatchNorm(1, comm=comm)
        assert layer.process_group is comm
        assert SyncBatchNorm(1, process_group=comm, comm=None).process_group is comm
        with pytest.raises(TypeError, match=r"^comm: expected process_group or comm, two names .* got both$"):
            SyncBatchNorm(1, process_group=comm, comm=comm)
        layer(np.asarray([[1.0], [3.0]]) + 4 * comm.rank)
        return layer.running_mean.tolist()

    assert ThreadComm.run(2, work) == [[np.float32(0.4)]] * 2


def test_a_backward_that_a_rank_skips_is_a_timeout_by_the_limit_of_that_moment() -> None:
    def work(comm: Any) -> None:
        layer = faults.layer_on(comm)
        layer(faults.part(faults.X, comm))
        layer.timeout = 0.2
        if comm.rank == 0:
            with pytest.raises(
                arraybn.SyncTimeoutError, match=r"waited 0.2 s .* the backward of unnamed layer 1 \(call 2"
            ):
                layer.backward(faults.part(faults.DY, comm))

    ThreadComm.run(2, work, leave=False)


def test_texts_have_a_time_limit_too() -> None:
    def work(comm: Any) -> Any:
        layer = faults.layer_on(comm)
        layer.timeout = 0.2
        if comm.rank == 1:  # it takes part in the frame, and is gone before the texts
            fields = [frames.FORMAT, *(0,) * 8]
            comm.exchange.reducer.allreduce(frames.frame(fields, frames.ERROR, 0), None)
            return
        with pytest.raises(arraybn.SyncTimeoutError, match=r"rank 0 of 2 waited 0.2 s .* \(call 1 on this"):
            layer(np.ones((2, 3)))

    ThreadComm.run(2, work, leave=False)


def test_ranks_that_have_ended_are_named_without_waiting() -> None:
    def work(comm: Any) -> Any:
        if comm.rank == 1:
            raise RuntimeError("a bug of the user's")
        with pytest.raises(
            arraybn.SyncError, match=r"rank 0: the forward of unnamed layer 1 .* failed: rank 1 has ended"
        ):
            faults.layer_on(comm)(np.ones((2, 3)))

    with pytest.raises(RuntimeError, match=r"a bug of the user's") as caught:
        ThreadComm.run(2, work)
    assert caught.value.__notes__ == ["on rank 1 of 2"]


def test_n4_results_that_differ_between_ranks_are_noticed_by_the_next_call() -> None:
    def work(comm: Any) -> Any:
        layer = faults.layer_on(comm)
        allreduce = comm.exchange.reducer.allreduce

        def off(frame: Any, deadline: Any) -> None:
            allreduce(frame, deadline)
            if comm.rank == 1:
                body = frames.body(frame)
                body[0, 0] = np.nextafter(body[0, 0], 9)

        comm.exchange.reducer.allreduce = off
        layer(faults.part(faults.X, comm))
        comm.exchange.reducer.allreduce = allreduce
        with pytest.raises(arraybn.SyncError, match=r"they disagree on checksum of all results: .* on rank 0"):
            layer.backward(faults.part(faults.DY, comm))

    ThreadComm.run(2, work)


@pytest.mark.parametrize("kind", ["a second frame", "gradients"])
def test_so_are_differences_in_what_goes_after_the_first_frame(kind: str) -> None:
    def work(comm: Any) -> None:
        layer, x = faults.layer_on(comm), faults.part(faults.X, comm)
        name = "add" if kind == "gradients" else "allreduce"
        original = getattr(comm.exchange.reducer, name)

        def off(numbers: Any, deadline: Any) -> None:
            original(numbers, deadline)
            if comm.rank == 1 and len(numbers) != frames.LENGTH:
                last = numbers[-1:] if kind == "gradients" else frames.body(numbers)[0, -1:]
                last[:] = np.nextafter(last, 9)

        layer.bias.grad = np.ones(3, "f4")
        setattr(comm.exchange.reducer, name, off)
        if kind == "gradients":
            arraybn.average_gradients(layer, comm, weight=1)
        else:
            arraybn.batch_norm(np.ones((2, 300)), comm=comm)
        setattr(comm.exchange.reducer, name, original)
        with pytest.raises(arraybn.SyncError, match=r"they disagree on checksum of all results: .* on rank 0"):
            layer(x)

    ThreadComm.run(2, work)


def test_n4_nan_has_the_same_bits_whichever_came_first() -> None:
    quiet = np.frombuffer(np.asarray([0x7FF8000000000001, -0x0007FFFFFFFFFFFE], "i8").tobytes(), "f8")

    def work(comm: Any) -> Any:
        x = np.full((2, 300), quiet[comm.rank % 2])
        _, saved = arraybn.batch_norm(x, comm=comm, kernels="reference")
        arraybn.batch_norm_backward(x, saved)
        layer = arraybn.BatchNorm1d(300, dtype="float64")
        layer.bias.grad = x[0]
        arraybn.average_gradients(layer, comm, weight=1)
        return saved.moments.mean.tobytes(), layer.bias.grad.tobytes()

    assert ThreadComm.run(4, work) == [(np.full(300, np.nan).tobytes(),) * 2] * 4


def test_one_thread_at_a_time_and_another_is_told_when_it_takes_too_long() -> None:
    def work(comm: Any) -> Any:
        layer = faults.layer_on(comm)
        layer.timeout = 0.2
        with (
            comm.exchange._lock,
            pytest.raises(arraybn.SyncTimeoutError, match=rf"rank {comm.rank}: another thread did"),
        ):
            layer(np.ones((2, 3)))
        faults.good(layer, comm)

    ThreadComm.run(2, work)


def test_a_forked_child_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(comm: Any) -> Any:
        comm.exchange._process = -1
        with pytest.raises(arraybn.SyncError, match=rf"^rank {comm.rank}: this is a forked child of a rank, and is no"):
            faults.layer_on(comm)(np.ones((2, 3)))

    ThreadComm.run(2, work)


# ---- One rank, or none -----------------------------------------------------------------------------------------------

WITHOUT_MPI = """
import sys
sys.modules["mpi4py"] = None
import arraybn, numpy
layer = arraybn.SyncBatchNorm(3).eval()
layer.backward(layer(numpy.ones((2, 3))))
print("evaluation")
y = layer.train()(numpy.asarray([[1.0, 2, 3], [3, 4, 7]]))
print(y.tobytes() == arraybn.BatchNorm1d(3)(numpy.asarray([[1.0, 2, 3], [3, 4, 7]])).tobytes())
"""


def python(code: str, **environment: str) -> Any:
    home = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PMI_", "OMPI_", "PMIX_"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**env, "PYTHONPATH": home, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def test_without_mpi_it_is_the_plain_layer_unless_a_launcher_says_that_there_are_more() -> None:
    run = python(WITHOUT_MPI)
    assert run.stdout.split() == ["evaluation", "True"], run.stderr
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        run = python(WITHOUT_MPI, **{name: "2"})
        assert run.stdout.split() == ["evaluation"]
        words = f"arraybn.sync.SyncError: synchronizing over 2 processes ({name}=2), but mpi4py cannot be imported:"
        assert run.stderr.strip().splitlines()[-1].startswith(words)


def test_evaluation_does_not_import_mpi4py() -> None:
    code = "import sys, numpy, arraybn; arraybn.SyncBatchNorm(3).eval()(numpy.ones((2, 3)));"
    assert python(code + "print('mpi4py' in sys.modules)").stdout.strip() == "False"


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}]
)
def test_one_rank_is_the_plain_layer_bit_for_bit(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)

    def work(comm: Any) -> None:
        for plain in (arraybn.BatchNorm2d(3, **options), arraybn.BatchNorm2d(3, dtype="float64", **options)):
            model = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain), comm)
            for training in (True, False, True):
                x, dy = rng.standard_normal((2, 4, 3, 2, 2)).astype("f4")
                results = [(layer.train(training)(x), layer.backward(dy)) for layer in (plain, model)]
                for one, other in zip(*results, strict=True):
                    assert one.tobytes() == other.tobytes()
                states = [{**faults.state(layer), "remembered": b""} for layer in (plain, model)]
                assert states[0] == states[1]
        x = rng.standard_normal((4, 3))
        assert arraybn.batch_norm(x, comm=comm)[0].tobytes() == arraybn.batch_norm(x)[0].tobytes()
        arraybn.broadcast_state(plain, comm)
        arraybn.average_gradients(plain, comm, weight=3)
        assert comm.exchange.calls == 0

    ThreadComm.run(1, work)


# ---- The layer, and conversion ---------------------------------------------------------------------------------------


def network() -> arraybn.Sequential:
    torso = arraybn.Sequential(arraybn.BatchNorm2d(3, momentum=0.3), arraybn.network.ReLU())
    head = arraybn.Sequential(arraybn.BatchNorm1d(4, affine=False, channel_axis=-1), arraybn.BatchNorm3d(2, eps=0.5))
    return arraybn.Sequential(torso, head, arraybn.network.Flatten())


def test_conversion_replaces_in_place_shares_parameters_and_buffers_and_goes_back() -> None:
    model = network()
    model[1].eval()
    model[0][0].qconfig = "8 bits"
    before, tree = dict(model.named_parameters()), repr(model)
    buffers, old, children = dict(model.named_buffers()), model[0][0], [model[0], model[1]]
    converted = SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    assert [model[0], model[1]] == children
    norms = [module for module in model.modules() if isinstance(module, SyncBatchNorm)]
    assert len(norms) == 3
    assert [norm._path for norm in norms] == ["0.0", "1.0", "1.1"]
    assert [norm.training for norm in norms] == [True, False, False]
    assert [norm.channel_axis for norm in norms] == [1, -1, 1]
    assert norms[0].qconfig == "8 bits"
    assert not hasattr(norms[1], "qconfig")
    assert repr(model) == re.sub(r"BatchNorm\dd", "SyncBatchNorm", tree)
    assert list(before) == [name for name, _ in model.named_parameters()]
    assert all(value is before[name] for name, value in model.named_parameters())
    assert all(value is buffers[name] for name, value in model.named_buffers())
    assert type(old) is arraybn.BatchNorm2d
    SyncBatchNorm.revert_sync_batchnorm(model)
    assert repr(model) == tree
    assert all(value is before[name] for name, value in model.named_parameters())
    assert vars(model[0][0]).keys() == vars(old).keys()
    assert model[0][0].qconfig == "8 bits"
    model[0](np.ones((2, 3, 1, 1)))


def test_conversion_of_bare_layers_shared_layers_subclasses_and_layers_that_are_synchronized() -> None:
    class Own(arraybn.BatchNorm1d):
        scale = 3

    bare = Own(3)
    bare.note = "mine"
    new = SyncBatchNorm.convert_sync_batchnorm(bare)
    assert (type(new), type(bare), new.weight is bare.weight) == (SyncBatchNorm, Own, True)
    back = SyncBatchNorm.revert_sync_batchnorm(new)
    assert (type(back), back.scale, back.note, back.weight is bare.weight) == (Own, 3, "mine", True)
    assert type(new) is SyncBatchNorm
    linear = arraybn.network.Linear(2, 2)
    assert SyncBatchNorm.convert_sync_batchnorm(linear) is SyncBatchNorm.revert_sync_batchnorm(linear) is linear

    shared = arraybn.Sequential(bare, arraybn.Sequential(bare), bare)
    SyncBatchNorm.convert_sync_batchnorm(shared)
    assert shared[0] is shared[2] is shared[1][0]
    SyncBatchNorm.revert_sync_batchnorm(shared)
    assert type(shared[0]) is Own
    assert shared[0] is shared[2] is shared[1][0]

    def work(comm: Any) -> None:
        model = arraybn.Sequential(arraybn.BatchNorm1d(3), SyncBatchNorm(3, timeout=5))
        SyncBatchNorm.convert_sync_batchnorm(model, comm)
        first = list(model)
        SyncBatchNorm.convert_sync_batchnorm(model, None)
        assert [layer.process_group for layer in (*first, *model)] == [comm, comm, None, None]
        assert [layer.timeout for layer in model] == [600, 5]
        with pytest.raises(ValueError, match=r"^timeout: expected a number of seconds > 0"):
            SyncBatchNorm.convert_sync_batchnorm(model, comm, timeout=0)
        assert [layer.process_group for layer in model] == [None, None]
        for limit in (7, None):
            SyncBatchNorm.convert_sync_batchnorm(model, timeout=limit)
            assert [layer.timeout for layer in model] == [limit, limit]
        bare = SyncBatchNorm.convert_sync_batchnorm(arraybn.BatchNorm1d(3), timeout=2.5)
        assert bare.timeout == 2.5
        before = list(model)
        with pytest.raises(
            ValueError, match=r"^module: expected layers that convert_.* got one at '1' that was built as"
        ):
            SyncBatchNorm.revert_sync_batchnorm(model)
        assert list(model) == before

    ThreadComm.run(1, work)
    with pytest.raises(ValueError, match=r"got one at 'the top' that was built"):
        SyncBatchNorm.revert_sync_batchnorm(SyncBatchNorm(3))


def test_a_converted_model_gives_the_results_of_the_whole_batch() -> None:
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 9, 3, 2, 2))
    plain = arraybn.BatchNorm2d(3, dtype="float64")
    expected = plain(x), plain.backward(dy)

    def work(comm: Any) -> Any:
        model = SyncBatchNorm.convert_sync_batchnorm(arraybn.Sequential(arraybn.BatchNorm2d(3, dtype="float64")), comm)
        rows = slice(0, 3) if comm.rank == 0 else slice(3, 9)
        copied = copy.deepcopy(model)
        assert copied[0].process_group is copy.copy(model[0]).process_group is comm
        assert copied[0]._path == "0"
        for each in (copied, model):
            np.testing.assert_allclose(each(x[rows]), expected[0][rows], atol=1e-13)
            np.testing.assert_allclose(each.backward(dy[rows]), expected[1][rows], atol=1e-13)
        pickled = pickle.loads(pickle.dumps(model))
        assert pickled[0].process_group is None
        assert model[0].process_group is comm
        return repr(pickled) == repr(model)

    assert ThreadComm.run(2, work) == [True, True]


def test_the_layer_prints_as_pytorchs_and_has_its_arguments_in_its_order() -> None:
    layer = SyncBatchNorm(3, 0.5, None, False, True, None, timeout=5)
    text = "SyncBatchNorm(3, eps=0.5, momentum=None, affine=False, track_running_stats=True"
    assert repr(layer) == text + ", timeout=5.0)"
    layer.timeout = 600
    assert repr(layer) == text + ")"
    layer.timeout = None
    assert layer.timeout is None
    assert SyncBatchNorm.__mro__[1] is arraybn.layers._BatchNorm


def test_groups_are_independent_of_each_other() -> None:
    def work(comm: Any) -> Any:
        def pair(half: Any) -> Any:
            x = np.full((2, 1), 10.0 * comm.rank + half.rank) + np.arange(2)[:, None]
            _, saved = arraybn.batch_norm(x, comm=half)
            return saved.moments.n, saved.moments.mean[0]

        return ThreadComm.run(2, pair)[0]

    assert ThreadComm.run(2, work) == [(4, 1.0), (4, 11.0)]


# ---- Copies of a model on all ranks ----------------------------------------------------------------------------------


def test_broadcast_gives_every_rank_the_state_of_rank_0() -> None:
    def work(comm: Any) -> Any:
        rng = np.random.default_rng(comm.rank)
        model = arraybn.Sequential(arraybn.network.Linear(3, 2), arraybn.BatchNorm1d(2, dtype="float64"))
        model(rng.standard_normal((4, 3)).astype("f4"))
        if comm.rank:
            model(rng.standard_normal((4, 3)).astype("f4"))
        for parameter in model.parameters():
            parameter.data = parameter.data + parameter.data.dtype.type(comm.rank)
        own, weight = model.state_dict(), model[1].weight.data
        arraybn.broadcast_state(model, comm)
        assert (weight == 1 + comm.rank).all()  # replaced, not written into
        if comm.rank == 0:
            assert all((value == own[name]).all() for name, value in model.state_dict().items())
        return {name: (value.dtype, value.tobytes()) for name, value in model.state_dict().items()}

    for ranks in (2, 3):
        found = ThreadComm.run(ranks, work)
        assert all(state == found[0] for state in found)
        assert found[0]["1.num_batches_tracked"][1] == np.int64(1).tobytes()


def test_models_that_differ_are_not_broadcast_over() -> None:
    def work(comm: Any) -> Any:
        model = arraybn.Sequential(arraybn.BatchNorm1d(3), arraybn.BatchNorm1d(2 + comm.rank))
        before, texts = faults.state(model), []
        for call in (
            lambda: arraybn.broadcast_state(model, comm),
            lambda: arraybn.average_gradients(model, comm, weight=1),
            lambda: arraybn.average_gradients(model[0], comm, weight=comm.rank - 1),
            lambda: arraybn.average_gradients(model[0], comm, weight=float("nan") if comm.rank else "1"),
        ):
            with pytest.raises(arraybn.SyncError) as caught:
                call()
            texts.append("\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])]))
        assert faults.state(model) == before
        arraybn.broadcast_state(model[0], comm)
        return texts

    zero, one = ThreadComm.run(2, work)
    assert zero == one
    lines = zero[0].splitlines()
    assert lines[0].endswith(
        "they disagree on 1.weight: float32 (2,) on rank 0 and float32 (3,) on rank 1,"
        " in the broadcast_state of the model"
    )
    assert lines[1] == "Likely reason: the ranks have not built their models alike, or one has changed its model"
    assert lines[2:] == [
        f"they also disagree on 1.{name}: float32 (2,) on rank 0 and float32 (3,) on rank 1"
        for name in ("bias", "running_mean", "running_var")
    ]
    assert zero[1].splitlines()[2:] == lines[2:3]
    assert zero[2] == "rank 0: weight: expected a number of samples ≥ 0; got -1"
    assert zero[3] == ("rank 0: weight: expected a number; got '1'\nrank 1: weight: expected a finite number; got nan")


def test_gradients_are_averaged_by_weight_and_none_counts_as_zero() -> None:
    gradients = [np.asarray([4.0, 8.0], "f4"), None, np.asarray([np.nan, 1.0], "f4"), np.asarray([1.0, 0.0], "f4")]
    weights = [1, 2, 0, 5]

    def work(comm: Any) -> Any:
        model = arraybn.Sequential(arraybn.BatchNorm1d(2), arraybn.BatchNorm1d(2))
        model[0].weight.grad = gradients[comm.rank]
        if comm.rank == 3:
            model[1].bias.grad = np.ones(2, "f4")
        given = model[0].weight.grad
        arraybn.average_gradients(model, comm, weight=weights[comm.rank])
        assert given is None or given.tobytes() == gradients[comm.rank].tobytes()
        arraybn.average_gradients(model[0], comm, weight=0)
        return [None if p.grad is None else (p.grad.dtype.name, p.grad.tolist()) for p in model.parameters()]

    found = ThreadComm.run(4, work)
    assert found == [[("float32", [0, 0]), None, None, ("float32", [5 / 8, 5 / 8])]] * 4

    def once(comm: Any) -> Any:
        layer = arraybn.BatchNorm1d(2)
        layer.weight.grad = gradients[comm.rank]
        arraybn.average_gradients(layer, comm, weight=weights[comm.rank])
        return layer.weight.grad.tolist()

    assert ThreadComm.run(4, once) == [[9 / 8, 1.0]] * 4


def test_a_model_that_differs_in_its_last_layer_is_told_where() -> None:
    def work(comm: Any) -> str:
        layers = [arraybn.network.Linear(3, 3 + comm.rank * (index == 39)) for index in range(40)]
        with pytest.raises(arraybn.SyncError) as caught:
            arraybn.broadcast_state(arraybn.Sequential(*layers), comm)
        return str(caught.value)

    told = "39.weight: float32 (3, 3) on rank 0 and float32 (4, 3) on rank 1"
    assert all(told in text for text in ThreadComm.run(2, work))


def test_a_state_goes_over_byte_orders() -> None:
    def work(comm: Any) -> Any:
        model = arraybn.Module()
        model.register_buffer("own", np.arange(3 + comm.rank)[-3:].astype("<f4" if comm.rank else ">f4"))
        arraybn.broadcast_state(model, comm)
        return model.own.tolist()

    assert ThreadComm.run(2, work) == [[0, 1, 2]] * 2


def test_no_model_on_one_rank_is_an_error_on_all() -> None:
    def work(comm: Any) -> list[str]:
        layer, texts = arraybn.BatchNorm1d(3), []
        for call in (arraybn.broadcast_state, partial(arraybn.average_gradients, weight=1)):
            with pytest.raises(arraybn.SyncError) as caught:
                call(layer if comm.rank == 0 else None, comm)
            texts.append(str(caught.value))
            call(layer, comm)
        return texts

    assert ThreadComm.run(2, work) == [["rank 1: model: expected a Module; got NoneType"] * 2] * 2


def test_helpers_refuse_what_is_no_model_and_no_communicator() -> None:
    for call in (arraybn.broadcast_state, partial(arraybn.average_gradients, weight=1)):
        with pytest.raises(TypeError, match=r"model: expected a Module; got list"):
            call([], None)
        with pytest.raises(TypeError, match=r"comm: expected an mpi4py communicator, or None for the world; got int"):
            call(arraybn.BatchNorm1d(2), 3)


# ---- ThreadComm itself -----------------------------------------------------------------------------------------------


def test_thread_comm_runs_ranks_at_the_same_time_and_raises_what_they_raise() -> None:
    barrier = threading.Barrier(3, timeout=10)

    def work(comm: Any) -> Any:
        barrier.wait()
        assert repr(comm) == f"<ThreadComm: rank {comm.rank} of 3>"
        return comm.rank, comm.size

    assert ThreadComm.run(3, work) == [(0, 3), (1, 3), (2, 3)]
    with pytest.raises(ValueError, match=r"size: expected an integer ≥ 1; got 0"):
        ThreadComm.run(0, work)
    with pytest.raises(ZeroDivisionError):
        ThreadComm.run(2, lambda comm: comm.rank / 0)


def test_only_one_file_imports_mpi4py() -> None:
    found = {
        path.name
        for path in Path(arraybn.__file__).parent.rglob("*.py")
        if path.parent.name not in ("bench", "commands")  # which start ranks of their own
        and re.search(r"^ *(from|import) mpi4py", path.read_text(), re.MULTILINE)
    }
    assert found == {"mpi.py"}

"""A batch in parts: each part, given the moments and sums of all, gets what one call on the whole batch gives."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.homes import Home
from support.libraries import need

import arraybn
from arraybn.testing import assert_close, exact_batch_norm, scenarios

CUTS = {"three": (0, 3, 4, 8), "with empty ones": (0, 0, 5, 5, 8), "one": (0, 8)}
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "parts.md"


def in_parts(parts: Any, weight: Any, bias: Any, **options: Any) -> list[Any]:
    """Return y, dx, dweight and dbias of each part (x, dy)."""
    whole = arraybn.pool(*(arraybn.moments(x, **{k: v for k, v in options.items() if k != "eps"}) for x, _ in parts))
    forwards = [arraybn.batch_norm(x, weight, bias, moments=whole, **options) for x, _ in parts]
    sums = sum(arraybn.batch_norm_sums(dy, saved) for (_, dy), (_, saved) in zip(parts, forwards, strict=True))
    return [
        (y, *arraybn.batch_norm_backward(dy, saved, sums=sums))
        for (_, dy), (y, saved) in zip(parts, forwards, strict=True)
    ]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("shift", ["standard", "far"])
def test_parts_give_what_the_whole_gives_on_every_namespace(home: Home, shift: str, cuts: str) -> None:
    batch = scenarios.make("small", shift)
    x, dy = batch.x.astype("f4"), batch.dy.astype("f4")
    x, dy = np.concatenate([x] * 8)[:8], np.concatenate([dy] * 8)[:8]
    exact = exact_batch_norm(x, batch.weight, batch.bias, dy, eps=batch.eps)
    edges = CUTS[cuts]
    parts = [(home.array(x[a:b], "float32"), home.array(dy[a:b], "float32")) for a, b in itertools.pairwise(edges)]
    weight, bias = home.array(batch.weight, "float32"), home.array(batch.bias, "float32")
    results = in_parts(parts, weight, bias, eps=batch.eps)
    y, dx = (np.concatenate([home.numpy(result[i]) for result in results]) for i in (0, 1))
    wide = home.wide == "float64"
    for got, want, scale, ulp in (
        (y, exact.y, exact.y_scale, 4 if wide else 64),
        (dx, exact.dx, exact.dx_scale, 12 if wide else 64),
    ):
        assert_close(got, want, ulp=ulp, scale=scale)
        with pytest.raises(AssertionError):
            assert_close(got + np.float32(1e-3) * abs(got).max(), want, ulp=ulp, scale=scale)
    for index, want in ((2, exact.dweight), (3, exact.dbias)):
        total = sum(home.numpy(result[index]) for result in results)
        assert_close(np.asarray(total, "f4"), want, ulp=2 if wide else 64, scale=abs(dy).sum((0, 2)) * 4)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_parts_in_every_dtype_and_layout_give_what_the_whole_gives(kernels: str, dtype: str, channel_axis: int) -> None:
    if kernels == "cpu":
        need("numba")
    rng = np.random.default_rng(1)
    x, dy = (np.moveaxis(rng.normal(3, 1, (9, 4, 40)).astype(dtype), 1, channel_axis) for _ in range(2))
    weight, bias = rng.normal(size=(2, 4))
    options = {"channel_axis": channel_axis, "kernels": kernels}
    y, saved = arraybn.batch_norm(x, weight, bias, **options)
    whole = y, *arraybn.batch_norm_backward(dy, saved)
    results = in_parts([(x[:2], dy[:2]), (x[2:], dy[2:])], weight, bias, **options)
    found = [np.concatenate([result[i] for result in results]) for i in (0, 1)]
    found += [results[0][i] + results[1][i] for i in (2, 3)]
    for got, want in zip(found, whole, strict=True):
        assert got.dtype == want.dtype
        ulps = 4 if dtype != "float64" else 32 * (1 + 3)  # N2, with |mean|/std = 3
        scale = abs(want).max() if want.ndim > 1 else abs(dy).astype("f8").sum()  # the means may differ by an ulp
        bound = ulps * np.finfo(want.dtype).eps * scale
        assert (abs(got - want) <= bound).all()
        assert not (abs(got * 1.05 - want) <= bound).all()


def test_a_part_writes_into_out_and_takes_a_wider_dy() -> None:
    rng = np.random.default_rng(2)
    x, dy = rng.normal(size=(6, 3)).astype("f2"), 1e-9 * rng.normal(size=(6, 3)).astype("f4")
    whole = arraybn.moments(x)
    outs = np.empty_like(x), np.empty_like(x)
    y, saved = arraybn.batch_norm(x, np.ones(3), moments=whole, out=outs[0])
    dx, dweight, _ = arraybn.batch_norm_backward(dy, saved, sums=arraybn.batch_norm_sums(dy, saved), out=outs[1])
    assert y is outs[0]
    assert dx is outs[1]
    _, alone = arraybn.batch_norm(x, np.ones(3))
    np.testing.assert_allclose(dweight, arraybn.batch_norm_backward(dy, alone)[1], rtol=1e-12)
    assert dweight.any()


def test_a_forward_keeps_moments_of_its_own_and_shows_those_of_the_whole() -> None:
    x = np.asarray([[0.0], [2.0], [7.0]])
    whole = arraybn.moments(x)
    _, saved = arraybn.batch_norm(x[:1], moments=whole)
    whole.mean[:] = 99.0
    assert saved.moments.n == 3
    assert saved.moments.mean == 3.0
    assert repr(saved).startswith("Saved(shape=(1, 1), dtype=float64, n=3, ")


def test_the_moments_of_another_dtype_and_with_a_low_part_are_taken_as_they_are() -> None:
    x = np.asarray([[16777217.0], [16777219.0]])
    low = arraybn.Moments(2, np.float32([16777216]), np.float32([2]), mean_low=np.float32([2]))
    y, _ = arraybn.batch_norm(x, moments=low, eps=0)
    assert y.tolist() == [[-1.0], [1.0]]


def test_sums_add_in_any_grouping_and_can_be_sent() -> None:
    x, dy = np.random.default_rng(3).normal(size=(2, 6, 2))
    whole = arraybn.moments(x)
    a, b, c = (
        arraybn.batch_norm_sums(dy[i : i + 2], arraybn.batch_norm(x[i : i + 2], moments=whole)[1]) for i in (0, 2, 4)
    )
    assert sum([a, b, c]).values.tobytes() == (a + b + c).values.tobytes()
    assert (a + b).values.tobytes() == (b + a).values.tobytes()
    assert (a + (b + c)).n == 6
    for sent in (pickle.loads(pickle.dumps(a)), copy.deepcopy(a)):
        assert (sent + b).values.tobytes() == (a + b).values.tobytes()
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(TypeError):
        sum([a], 1)
    with pytest.raises(ValueError, match="values: expected shape"):
        a + dataclasses.replace(b, values=b.values[:, :1])


def test_parts_work_inside_jax_jit() -> None:
    jax = need("jax")
    x, dy = np.random.default_rng(4).normal(size=(2, 6, 3)).astype("f4")

    @jax.jit
    def gradients(x: Any, dy: Any) -> Any:
        return [result[1] for result in in_parts([(x[:2], dy[:2]), (x[2:], dy[2:])], None, None)]

    dx = np.concatenate(gradients(x, dy))
    want = arraybn.batch_norm_backward(dy, arraybn.batch_norm(x)[1])[0]
    assert abs(dx - want).max() < 1e-5 * abs(want).max()


# ---- The page: the synchronized layer in twenty lines, over processes ------------------------------------------------

PROCESSES = """
import multiprocessing
import sys

import numpy as np

def work(rank, pipes, x, dy, results):
    def gather(value):
        for pipe in pipes.values():
            pipe.send(value)
        values = {other: pipe.recv() for other, pipe in pipes.items()} | {rank: value}
        return [values[index] for index in sorted(values)]

    layer = SyncedBatchNorm(gather, np.asarray([1.5, -0.5]), np.asarray([0.0, 1.0]))
    y = layer.forward(x)
    results.put((rank, y, *layer.backward(dy), layer.saved.moments.mean))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    data, size = np.load("data.npy"), int(sys.argv[1])
    pipes = [{} for _ in range(size)]
    for a in range(size):
        for b in range(a):
            pipes[a][b], pipes[b][a] = context.Pipe()
    cuts = [0, 0, *range(3, 3 * size, 3)][:size] + [len(data[0])]  # rank 0 has nothing
    results = context.Queue()
    ranks = [
        context.Process(target=work, args=(r, pipes[r], *data[:, cuts[r]:cuts[r + 1]], results)) for r in range(size)
    ]
    for rank in ranks:
        rank.start()
    found = sorted((results.get(timeout=100) for _ in ranks), key=lambda result: result[0])
    for rank in ranks:
        rank.join()
    assert len({mean.tobytes() for *_, mean in found}) == 1
    np.savez("found.npz", y=np.concatenate([r[1] for r in found]), dx=np.concatenate([r[2] for r in found]),
             dweight=sum(r[3] for r in found), dbias=sum(r[4] for r in found))
"""


def layer_of_the_page() -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (found,) = [block for block in blocks if "class SyncedBatchNorm" in block]
    return found


def test_the_layer_of_the_page_has_twenty_lines() -> None:
    assert len(layer_of_the_page().strip().splitlines()) <= 20


@pytest.mark.parametrize("size", [2, 3])
def test_processes_that_carry_moments_and_sums_themselves_agree_with_one(size: int, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(layer_of_the_page() + PROCESSES)
    data = np.random.default_rng(5).normal(4, 2, (2, 11, 2))
    np.save(tmp_path / "data.npy", data)
    run = subprocess.run(
        [sys.executable, "script.py", str(size)], cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False
    )
    assert run.returncode == 0, run.stderr
    found = np.load(tmp_path / "found.npz")
    y, saved = arraybn.batch_norm(data[0], np.asarray([1.5, -0.5]), np.asarray([0.0, 1.0]))
    for name, want in zip(
        ("y", "dx", "dweight", "dbias"), (y, *arraybn.batch_norm_backward(data[1], saved)), strict=True
    ):
        np.testing.assert_allclose(found[name], want, rtol=1e-11, atol=1e-12)

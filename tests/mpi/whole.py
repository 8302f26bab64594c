"""One batch over several ranks, against the definition on the whole batch: the check that every transport has to pass.

Used by threads and by MPI scripts, so it needs arraybn and NumPy alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import arraybn
from arraybn.testing import exact_batch_norm, ulp, worst
from arraybn.testing.oracle import LONG

SHAPES = [(9, 3), (7, 2, 5), (6, 3, 2, 2), (5, 2, 2, 1, 2)]
RATIOS = [0.0, 30.0, 1e6]  # |mean|/std


@dataclass(frozen=True)
class Case:
    """A whole batch, the cut into parts, and the arguments of the layer."""

    x: Any
    dy: Any
    weight: Any
    bias: Any
    cuts: tuple[int, ...]  # rank r has the samples cuts[r] … cuts[r + 1]
    channel_axis: int = 1
    eps: float = 1e-5
    momentum: float | None = 0.25
    affine: bool = True
    track: bool = True
    training: bool = True

    def part(self, array: Any, rank: int) -> Any:
        return array[self.cuts[rank] : self.cuts[rank + 1]]

    @property
    def channels(self) -> int:
        return self.x.shape[self.channel_axis]


def cut(rng: np.random.Generator, samples: int, ranks: int) -> tuple[int, ...]:
    """Return a random cut: uneven, often with empty ranks."""
    return 0, *sorted(rng.integers(0, samples + 1, ranks - 1).tolist()), samples


def case(rng: np.random.Generator, ranks: int, index: int) -> Case:
    """Return the index-th of all combinations, with random values and a random cut."""
    shape = SHAPES[index % 4]
    axis = -1 if index // 4 % 2 else 1
    dtype = "f8" if index // 8 % 2 else "f4"
    ratio = RATIOS[index // 16 % 3]
    c = shape[1]
    x = np.moveaxis(
        (rng.standard_normal(shape).swapaxes(1, -1) + ratio * rng.choice([-1, 1], c)).swapaxes(1, -1), 1, axis
    )
    dy = rng.standard_normal(x.shape) + 0.5
    weight, bias = (rng.uniform(-2, 2, c).astype("f4") for _ in range(2))
    flags = {"affine": index % 3 > 0, "track": index % 5 > 0, "momentum": None if index % 7 == 0 else 0.25}
    flags["training"] = flags["track"] or index % 2 == 0
    return Case(x.astype(dtype), dy.astype(dtype), weight, bias, cut(rng, shape[0], ranks), axis, **flags)


def layer_of(given: Case, comm: Any, kind: Any = arraybn.SyncBatchNorm) -> Any:
    """Return the layer, with running statistics that have changed since the start."""
    layer = kind(given.channels, given.eps, given.momentum, given.affine, given.track, channel_axis=given.channel_axis)
    if kind is arraybn.SyncBatchNorm:
        layer.process_group, layer.timeout = comm, 60
    if given.affine:
        layer.weight.data, layer.bias.data = given.weight, given.bias
    if given.track:
        layer.running_mean, layer.num_batches_tracked = np.full(given.channels, 0.5, "f4"), 3
    return layer.train(given.training)


def step(given: Case, comm: Any, kind: Any = arraybn.SyncBatchNorm) -> dict[str, Any]:
    """Return the results of one rank after a forward and a backward of the layer, and compare the functions' bits."""
    layer, rank = layer_of(given, comm, kind), comm.rank
    y = layer(given.part(given.x, rank))
    moments = layer._remembered.moments
    dx = layer.backward(given.part(given.dy, rank))
    found = {"y": y, "dx": dx, "n": moments.n, "mean": moments.mean, "m2": moments.m2}
    found |= {name: getattr(layer, name) for name in ("running_mean", "running_var", "num_batches_tracked")}
    if given.affine:
        found |= {"dweight": layer.weight.grad, "dbias": layer.bias.grad}
    if kind is arraybn.SyncBatchNorm:
        vectors = (given.weight, given.bias) if given.affine else (None, None)
        options = {"eps": given.eps, "channel_axis": given.channel_axis, "comm": comm}
        again, saved = arraybn.batch_norm(given.part(given.x, rank), *vectors, **options)
        again_dx, _, _ = arraybn.batch_norm_backward(given.part(given.dy, rank), saved)
        assert (again.tobytes(), again_dx.tobytes()) == (y.tobytes(), dx.tobytes())
        assert saved.moments.mean.tobytes() == moments.mean.tobytes()
    return found


SHARED = ("n", "mean", "m2", "running_mean", "running_var", "num_batches_tracked")


def check_same_bits(found: list[dict[str, Any]]) -> None:
    """(N4) Assert that every rank has the same bits of the shared results."""
    for name in SHARED:
        bits = {None if one[name] is None else np.asarray(one[name]).tobytes() for one in found}
        assert len(bits) == 1, f"{name} differs between ranks"


def check(given: Case, found: list[dict[str, Any]]) -> None:
    """Assert that the ranks together have the results of the definition for the whole batch, to N1, N2 and N4."""
    check_same_bits(found)
    weight, bias = (given.weight, given.bias) if given.affine else (np.ones(given.channels), np.zeros(given.channels))
    truth = exact_batch_norm(given.x, weight, bias, given.dy, eps=given.eps, channel_axis=given.channel_axis)
    n = given.x.size // given.channels
    one = found[0]
    assert one["n"] == n
    mean, var = one["mean"].astype("f4"), (one["m2"] / n).astype("f4")
    floor = np.maximum(abs(truth.mean), np.ldexp(np.sqrt(truth.var), -20))
    assert worst(mean, truth.mean, floor, "float32") <= 1
    if given.x.dtype == np.float32:
        assert worst(var, truth.var, truth.var, "float32") <= 1
    y, dx = (np.concatenate([part[name] for part in found]) for name in ("y", "dx"))
    check_elements(given, "y", y, truth.y, truth.y_scale, 4, 16)
    check_elements(given, "dx", dx, truth.dx, truth.dx_scale, 12, 32)
    axes = tuple(axis for axis in range(given.x.ndim) if axis != given.channel_axis % given.x.ndim)
    if given.affine:  # each rank rounds its sum to float32, and the sum of these rounds again: 1 ulp of all terms
        ranks = len(found)
        for name, terms in (("dweight", given.dy * truth.xhat), ("dbias", given.dy)):
            total = np.sum([part[name].astype("f8") for part in found], axis=0)
            assert worst(total, getattr(truth, name), abs(terms).sum(axis=axes), "float32") <= (ranks + 1) / 2, name
    check_running(given, one, truth, n)


def check_elements(given: Case, name: str, got: Any, exact: Any, scale: Any, single: float, double: float) -> None:
    """(N2) Assert the error in ulp of the largest term; in float64 of the channel's, times 1 + |mean|/std."""
    assert got.dtype == given.x.dtype
    if got.dtype == np.float32:
        assert worst(got, exact, scale, "float32") <= single, name
        return
    errors, scale, x = (
        np.moveaxis(array, given.channel_axis, 0).reshape(given.channels, -1)
        for array in (got.astype(LONG) - exact, scale, given.x)
    )
    ratio = 1 + abs(x.mean(axis=1)) / x.std(axis=1)
    assert (abs(errors).max(axis=1) / ulp(scale.max(axis=1), "float64") <= double * ratio).all(), name


def check_running(given: Case, one: dict[str, Any], truth: Any, n: int) -> None:
    """(E4) with the unbiased variance of the whole batch, in two roundings of float32."""
    if not given.track:
        assert one["running_mean"] is None
        assert one["num_batches_tracked"] is None
        return
    assert one["num_batches_tracked"] == 4
    factor = 0.25  # which is 1/4 as well, where momentum is None
    for name, old, new in (("running_mean", 0.5, truth.mean), ("running_var", 1.0, truth.var * n / (n - 1))):
        exact = (1 - factor) * LONG(old) + factor * new
        assert worst(one[name], exact, np.maximum(abs(factor * new), old), "float32") <= 1, name


def without(given: Case, **changes: Any) -> Case:
    return replace(given, **changes)

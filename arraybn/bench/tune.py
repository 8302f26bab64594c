"""``python -m arraybn bench --device cuda --tune``: the constants of the CUDA kernels, one changed at a time.

Each case has a line with its µs forward, backward and in evaluation, and a line for each value of a constant that
changes one of these by more than 3 %: the times as multiples of those with the present value. At the end each value has
a line with the geometric means over all cases. A value is shown as wrong, and is no choice, where a result is wrong or
a kernel cannot be launched.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TextIO

import numpy as np

from ..kernels import cuda
from ..kernels.cuda import fused, table
from .device import CudaDevice, NoDeviceError
from .output import RefusedError

_WAVES = (1, 1, 1, 1, 1), (1, 1, 2, 2, 2), (2, 2, 2, 2, 3)
CHOICES: dict[str, tuple[Any, tuple[Any, ...]]] = {  # the module that has the constant, and values to try
    "CHUNK": (table, (2**13, 2**14, 2**15, 3 * 2**14)),
    "STAGES": (table, ({1: 1, 2: 1, 3: 1}, {1: 4, 2: 2, 3: 2}, {1: 6, 2: 3, 3: 2}, {1: 12, 2: 6, 3: 4})),
    "PART": (table, (2**14, 2**15, 2**16, 2**17)),
    "RING_MAPS": (table, ((), (2, 4, 8))),
    "MAP_PART": (table, (2**13, 2**14, 2**15, 2**16)),
    "THREADS": (table, (128, 256)),
    "ALONE": (table, (128, 256)),
    "SIDES": (table, ({2: 8, 4: 8, 8: 8}, {2: 8, 4: 16, 8: 8})),
    "SINGLE_BLOCK_BYTES": (table, (2**15, 2**16, 2**17)),
    "ITEMS": (table, (8, 16, 32)),
    "TASK": (table, (2**15, 3 * 2**14, 2**16)),
    "DRAWING": (table, (2, 3, 4)),
    "clusters": (fused.FusedArguments, (0, 8, 16)),  # wherever they fit
    "CLUSTERS": (table, ((1, 2, 4, 8, 16), (2, 4, 8, 16), (4, 8, 16), (8, 16))),
    "IN_CLUSTERS": (table, ({1: (), 2: ()}, {1: (2, 4), 2: ()}, {1: (2, 4, 8), 2: (2, 4, 8)})),
    "WARPS": (table, (8, 16)),
    "SIDE_WARPS": (table, (4, 8)),
    "PIECES": (table, (2, 4, 8)),
    "WAVES": (table, tuple(dict(zip((1, 2, 4, 8, 16), waves, strict=True)) for waves in _WAVES)),
    "L2_FRACTION": (table, (0.4, 0.6, 0.8)),
}
SHAPES = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
_FEW = 3  # sets of arrays that calls rotate over, at least
_NOISE = 0.03  # of a ratio
_OPERATIONS = ("forward", "backward", "evaluation")
_TOLERANCE = {"float16": 2e-2, "float32": 1e-4}


class _Data(NamedTuple):
    """The arrays of a case: x, dy, and room for the results, (N, C, S) each, in sets that calls rotate over."""

    name: str
    sets: list[tuple[Any, Any, Any, Any]]


def tune(device: Any, out: TextIO, shapes: tuple[tuple[int, ...], ...] = SHAPES, repeats: int = 7) -> dict[str, Any]:
    """Print the time of every value of every constant; return the best value of each."""
    ratios: dict[tuple[str, int], list[list[float]]] = {}
    for shape, layout, dtype in itertools.product(shapes, ("first", "last"), _TOLERANCE):
        made = _data(device, shape, layout, dtype)
        expected, present = _measured(device, made, repeats, None)
        print(f"{made.name}: {', '.join(f'{1e6 * time:.1f}' for time in present)} µs", file=out, flush=True)
        for name, (module, values) in CHOICES.items():
            for place, value in enumerate(values):
                if value == getattr(module, name):
                    continue
                with _changed(module, name, value):
                    tried = _tried(device, made, repeats, expected)
                found = [time / now for time, now in zip(tried, present, strict=True)]
                ratios.setdefault((name, place), []).append(found)
                if any(abs(ratio - 1) > _NOISE for ratio in found):
                    print(f"    {name:<20} {value!s:<24} {_said(found)}", file=out, flush=True)
    return {name: _best(name, module, values, ratios, out) for name, (module, values) in CHOICES.items()}


def _tried(device: Any, data: _Data, repeats: int, expected: Any) -> list[float]:
    """Return the seconds of `_measured`; inf where a kernel could not be launched."""
    try:
        return _measured(device, data, repeats, expected)[1]
    except RuntimeError:
        return [math.inf] * 3


def _said(ratios: list[float]) -> str:
    """Return the text of the ratios of the three operations."""
    if math.inf in ratios:
        return "wrong"
    return ", ".join(f"{name} {ratio:.3f}" for name, ratio in zip(_OPERATIONS, ratios, strict=True))


def _best(name: str, module: Any, values: tuple[Any, ...], ratios: dict[Any, list[list[float]]], out: TextIO) -> Any:
    """Print a line for each value, and return the best one."""
    best = getattr(module, name), 1.0
    for place, value in enumerate(values):
        of_operations = zip(*ratios.get((name, place), [[1.0] * 3]), strict=True)
        means = [statistics.geometric_mean(found) for found in of_operations]
        mean = statistics.geometric_mean(means)
        state = "present" if value == getattr(module, name) else _said(means)
        print(f"{name:<20} {value!s:<24} {state}", file=out, flush=True)
        best = (value, mean) if mean < best[1] else best
    print(f"{name:<20} {best[0]!s:<24} best", file=out, flush=True)
    return best[0]


@contextmanager
def _changed(module: Any, name: str, value: Any) -> Iterator[None]:
    """Give a constant another value; every cut is made anew before and after."""
    before = getattr(module, name)
    try:
        setattr(module, name, value)
        _forget()
        yield
    finally:
        setattr(module, name, before)
        _forget()


def _forget() -> None:
    for cached in (cuda.cut, cuda.plan_sweep, fused.plan):
        cached.cache_clear()


def _data(device: Any, shape: tuple[int, ...], layout: str, dtype: str) -> _Data:
    samples, channels, plane = shape[0], shape[1], math.prod(shape[2:])
    ncs = (samples, channels, plane) if layout == "first" else (samples * plane, channels, 1)
    rng, xp = np.random.default_rng(0), device.xp
    x, dy = (device.array(rng.standard_normal(ncs, dtype=np.float32).astype(dtype)) for _ in range(2))
    number = max(_FEW, math.ceil(device.together / x.nbytes))
    sets = [(x.copy(), dy.copy(), xp.empty_like(x), xp.empty_like(x)) for _ in range(number)]
    return _Data(f"{shape} {dtype} {layout}", sets)


def _measured(device: Any, data: _Data, repeats: int, expected: Any) -> tuple[Any, list[float]]:
    """Return the results, and seconds forward, backward and in evaluation; inf where a result is not as expected."""
    x, dy, y, dx = data.sets[0]
    xp, (mean, _, rstd, _) = device.xp, fused.forward(x, None, None, 1e-5, y)
    results = [y.astype("f4"), fused.backward(dy, x, mean, rstd, None, dx)[0].astype("f4")]
    results.append(fused.affine(x, mean, rstd, mean, y).astype("f4"))
    for result, other in zip(results, expected or results, strict=True):
        near = xp.abs(result - other) <= _TOLERANCE[x.dtype.name] * (1 + xp.abs(other))
        if not bool(near.all()):
            return results, [math.inf] * 3
    operations: tuple[Callable[..., object], ...] = (
        lambda x, dy, y, dx: fused.forward(x, None, None, 1e-5, y),
        lambda x, dy, y, dx: fused.backward(dy, x, mean, rstd, None, dx),
        lambda x, dy, y, dx: fused.affine(x, mean, rstd, mean, y),
    )
    return results, [_timed(device, operation, data, repeats) for operation in operations]


def _timed(device: Any, operation: Callable[..., object], data: _Data, repeats: int) -> float:
    turns = itertools.cycle(data.sets)
    samples = [device.timed(lambda: operation(*next(turns)), 8, 2e-3)[0] for _ in range(repeats)]
    return float(statistics.median(samples))


def run(device: str) -> int:
    """Tune on this machine's first GPU; a `RefusedError` says why not."""
    if device != "cuda":
        raise RefusedError("--tune: expected --device cuda, of whose kernels these are the constants")
    try:
        gpu = CudaDevice()
    except NoDeviceError as error:
        raise RefusedError(f"--tune: {error}") from error
    tune(gpu, sys.stdout)
    return 0

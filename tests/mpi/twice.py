"""Derivatives (E8, E9) of one batch over several ranks, against one rank: the check that every transport has to pass.

Used by threads and by MPI scripts, so it needs arraybn and NumPy alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import arraybn


class Case:
    """A whole batch with tangents and cotangents, and its cut into parts, of which the first is empty."""

    def __init__(self, ranks: int, channels: int) -> None:
        rng = np.random.default_rng([ranks, channels])
        self.x, self.dy, self.v, self.x_dot = rng.standard_normal((4, 4 * ranks, channels)) + 0.5
        vectors = rng.uniform(0.5, 2, (6, channels))
        self.weight, self.bias, self.weight_dot, self.bias_dot, self.v_weight, self.v_bias = vectors
        inner = np.sort(rng.integers(1, 4 * ranks, ranks - 2)) if ranks > 2 else []
        self.cuts = [0, 0, *map(int, inner), 4 * ranks] if ranks > 2 else [0, 3, 8]

    def part(self, rank: int) -> dict[str, Any]:
        rows = slice(self.cuts[rank], self.cuts[rank + 1])
        return {name: getattr(self, name)[rows] for name in ("x", "dy", "v", "x_dot")}


def step(case: Case, comm: Any, *, alone: bool = False, like: Any = None, **options: Any) -> list[Any]:
    """Return y_dot, ddy, ddx and ddweight of one rank, as of arrays like `like`, or of NumPy."""
    import array_api_compat

    def here(array: Any) -> Any:
        if like is None:
            return array
        xp = array_api_compat.array_namespace(like)
        return xp.asarray(array, dtype=like.dtype, device=like.device)

    def back(array: Any) -> Any:
        return array if like is None else np.asarray(array.to_device(type(like.device)("CPU_DEVICE")))

    part = {name: here(array) for name, array in case.part(comm.rank).items()}
    weight, bias, weight_dot, bias_dot, v_weight, v_bias = (
        here(getattr(case, name)) for name in ("weight", "bias", "weight_dot", "bias_dot", "v_weight", "v_bias")
    )
    over = {} if alone else {"comm": comm}
    _, saved = arraybn.batch_norm(part["x"], weight, bias, **over, **options)
    y_dot = arraybn.batch_norm_jvp(part["x_dot"], saved, weight_dot, bias_dot)
    found = [y_dot, *arraybn.batch_norm_double_backward(part["v"], part["dy"], saved, v_weight, v_bias)]
    return [back(array) for array in found]


def check(case: Case, found: list[Any], tolerance: float = 1e-12) -> None:
    """Assert that the ranks together have the results of one rank."""
    _, saved = arraybn.batch_norm(case.x, case.weight, case.bias, kernels="reference")
    want = [arraybn.batch_norm_jvp(case.x_dot, saved, case.weight_dot, case.bias_dot)]
    want += arraybn.batch_norm_double_backward(case.v, case.dy, saved, case.v_weight, case.v_bias)
    for index, name in enumerate(("y_dot", "ddy", "ddx", "ddweight")):
        results = [part[index] for part in found]
        got = sum(results) if name == "ddweight" else np.concatenate(results)
        size = abs(want[index]).max() * (10 if name == "ddweight" else 1)
        assert (abs(got - want[index]) <= tolerance * size).all(), name

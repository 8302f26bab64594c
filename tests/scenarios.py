"""One table of batches. Every implementation is driven by it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """x and dy (N, C, S) in float64, weight and bias (C,) in float32."""

    x: Any
    dy: Any
    weight: Any
    bias: Any


SHAPES = {
    "small": (4, 3, 5),
    "tall": (101, 2, 1),
    "wide": (1, 3, 77),
    "images": (8, 4, 49),
    "two values": (2, 5, 1),
    "one channel": (16, 1, 9),
    "one value": (1, 3, 1),
}

# |mean|/std, and std
SCALES = {
    "standard": (0.0, 1.0),
    "shifted": (30.0, 1.0),
    "far": (1e4, 1.0),
    "very far": (1e6, 1.0),
    "very far below": (-1e6, 3e-3),
    "small std": (1e3, 2.0**-60),
    "large std": (1e3, 2.0**60),
}


def make(shape: str, scale: str = "standard", seed: int = 0) -> Batch:
    """The batch of that name."""
    rng = np.random.default_rng([seed, *map(ord, shape + scale)])
    ratio, std = SCALES[scale]
    size = SHAPES[shape]
    x = (rng.standard_normal(size) + ratio) * std
    dy = rng.standard_normal(size) + 0.5
    weight = rng.uniform(-2, 2, size[1]).astype("f4")
    return Batch(x, dy, weight, rng.uniform(-2, 2, size[1]).astype("f4"))


def outliers(seed: int = 0) -> Any:
    """(64, 3, 4): a channel whose first value, one whose last value is 10⁶ standard deviations off, and one sorted."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, 3, 4))
    x[0, 0, 0] = 1e6
    x[-1, 1, -1] = -1e6
    x[:, 2, :] = np.sort(x[:, 2, :].ravel()).reshape(64, 4)
    return x

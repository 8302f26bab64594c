"""The table of named batches, on which every implementation is tested."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .oracle import SMALLEST_EXPONENT, largest_number

Array = np.ndarray[Any, Any]


class Batch(NamedTuple):
    """A batch with the other arguments of a batch norm.

    Attributes
    ----------
    x, dy : array (N, C, S)
        In float64; to be rounded to the dtype under test.
    weight, bias : array (C,)
        In float32.
    eps : float
        ε, smaller than the variance of x but large enough to matter.
    where : array (N, S) of bool, or None
        True at the positions that belong to the batch; None where all do.
    """

    x: Array
    dy: Array
    weight: Array
    bias: Array
    eps: float = 1e-5
    where: Array | None = None


SHAPES = {
    "small": (4, 3, 5),
    "tall": (101, 2, 1),
    "wide": (1, 3, 77),
    "images": (8, 4, 49),
    "two values": (2, 5, 1),
    "one channel": (16, 1, 9),
    "one value": (1, 3, 1),
}

SCALES = {  # |mean|/std, and std
    "standard": (0.0, 1.0),
    "shifted": (30.0, 1.0),
    "far": (1e4, 1.0),
    "very far": (1e6, 1.0),
    "very far below": (-1e6, 3e-3),
    "small std": (1e3, 2.0**-60),
    "large std": (1e3, 2.0**60),
}


def make(shape: str, scale: str = "standard", seed: int = 0) -> Batch:
    """Return the batch of a shape in `SHAPES` and a scale in `SCALES`; the same batch at each call.

    Examples
    --------
    >>> make("small", "far").x.shape
    (4, 3, 5)
    """
    return normal(SHAPES[shape], *SCALES[scale], seed=[seed, *map(ord, shape + scale)])


def normal(shape: tuple[int, ...], ratio: float, std: float, *, seed: Any) -> Batch:
    """Return a batch of normally distributed values with |mean|/std = `ratio`."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) + ratio) * std
    dy = rng.standard_normal(shape) + 0.5
    weight, bias = (rng.uniform(-2, 2, shape[1]).astype("f4") for _ in range(2))
    return Batch(x, dy, weight, bias, eps=1e-5 * std**2)


def with_mask(batch: Batch, share: float = 0.6, seed: int = 0) -> Batch:
    """Return the batch with a random mask, in which about that share of the positions is True, and at least two are.

    Examples
    --------
    >>> int(with_mask(make("small")).where.sum())
    10
    """
    rng, positions = np.random.default_rng(seed), batch.x[:, 0].shape
    where = rng.random(positions) < share
    where.ravel()[rng.permutation(where.size)[:2]] = True
    return batch._replace(where=where)


def outliers(seed: int = 0) -> Array:
    """Return x (64, 3, 4): a first or last value 10⁶ standard deviations off, and a channel in ascending order.

    Examples
    --------
    >>> float(outliers()[0, 0, 0])
    1000000.0
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, 3, 4))
    x[0, 0, 0] = 1e6
    x[-1, 1, -1] = -1e6
    x[:, 2, :] = np.sort(x[:, 2, :].ravel()).reshape(64, 4)
    return x


def named_batches() -> dict[str, Batch]:
    """Return all batches by name: shapes × scales, outliers, constant and nearly constant channels.

    Examples
    --------
    >>> "images, very far" in named_batches()
    True
    """
    table = {f"{shape}, {scale}": make(shape, scale) for shape in SHAPES for scale in SCALES}
    like = normal((64, 3, 4), 0, 1, seed=7)
    constant = np.tile(np.asarray([3e7, 0.1, -1.0])[None, :, None], (64, 1, 4))
    nearly = constant.copy()
    nearly[0, :, 0] = np.nextafter(nearly[0, :, 0].astype("f4"), np.float32(np.inf))
    table["outliers"] = like._replace(x=outliers())
    table["constant"] = like._replace(x=constant)
    table["nearly constant"] = like._replace(x=nearly)
    return table


# ---- Random batches --------------------------------------------------------------------------------------------------

KINDS = ("normal", "far", "outlier", "constant", "nearly constant", "sorted", "tiny", "huge", "nan", "inf")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of that name; raise an ImportError with the remedy if "bfloat16" needs ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        bfloat16: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError as error:
        raise ImportError('dtype: bfloat16 needs ml_dtypes: pip install "arraybn[cpu]"') from error
    return bfloat16


def _channel(kind: str, n: int, ratio: float, dtype: str, rng: np.random.Generator) -> Array:
    """Return n values of a channel of that kind, in float64."""
    values, kept = rng.standard_normal(n), numpy_dtype(dtype).type
    if kind == "far":
        values = values + ratio * rng.choice([-1, 1])
    elif kind == "outlier":
        values[rng.integers(n)] = ratio
    elif kind in ("constant", "nearly constant"):
        values = np.full(n, rng.standard_normal() * ratio).astype(kept).astype("f8")
        if kind == "nearly constant":
            values[0] = np.nextafter(values[0].astype(kept), kept(np.inf))
    elif kind == "sorted":
        values = np.sort(values)
    elif kind == "tiny":  # mostly subnormal
        values = values * 2.0 ** (SMALLEST_EXPONENT[dtype] - 2)
    elif kind == "huge":  # within a factor of two of the largest number
        values = np.clip(values, -1, 1) * float(largest_number(dtype)) * 0.75
    elif kind in ("nan", "inf"):
        values[rng.integers(n)] = np.nan if kind == "nan" else np.inf * rng.choice([-1, 1])
    return values


def of_kinds(
    kinds: Sequence[str], shape: tuple[int, int, int], ratio: float, dtype: str, rng: np.random.Generator
) -> Batch:
    """Return a random batch whose x has `dtype`, with a channel of each kind; `ratio` is the |mean|/std of "far"."""
    n = shape[0] * shape[2]
    columns = [_channel(kind, n, ratio, dtype, rng) if n else np.zeros(0) for kind in kinds]
    with np.errstate(over="ignore"):
        x = np.stack(columns).reshape(shape[1], shape[0], shape[2]).transpose(1, 0, 2).astype(numpy_dtype(dtype))
    dy = rng.standard_normal(shape) + 0.5
    weight, bias = (rng.uniform(-2, 2, shape[1]).astype("f4") for _ in range(2))
    return Batch(x, dy, weight, bias)


def random_batches(count: int, kinds: Sequence[str], max_ratio: float, dtype: str) -> Iterator[Batch]:
    """Yield random batches of 2 to 81 values in each channel; the same ones at each call."""
    rng = np.random.default_rng(0)
    most = np.log10(min(max_ratio, float(largest_number(dtype)) / 16))
    for _ in range(count):
        n, c, s = (int(size) for size in rng.integers(1, 10, 3))
        shape = (max(n, 2) if s == 1 else n, c, s)
        batch = of_kinds(rng.choice(kinds, c).tolist(), shape, 10.0 ** rng.uniform(0, most), dtype, rng)
        yield batch._replace(eps=float(rng.choice([1e-5, 1e-3, 0.5])))

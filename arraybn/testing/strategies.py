"""Hypothesis strategies: batches on which batch norms fail, and layouts of arrays in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._install import requirement

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(f"arraybn.testing.strategies needs hypothesis: pip install {requirement('test')}") from error

from .scenarios import Array, Batch

KINDS = ("normal", "far", "outlier", "constant", "nearly constant", "sorted", "tiny", "huge", "nan", "inf")


def _channel(kind: str, n: int, ratio: float, dtype: Any, rng: np.random.Generator) -> Array:
    """Return n values of a channel of that kind."""
    values = rng.standard_normal(n)
    limits = np.finfo(dtype)
    if kind == "far":
        values = values + ratio * rng.choice([-1, 1])
    elif kind == "outlier":
        values[rng.integers(n)] = ratio
    elif kind in ("constant", "nearly constant"):
        values = np.full(n, rng.standard_normal() * ratio).astype(dtype).astype("f8")
        if kind == "nearly constant":
            values[0] = np.nextafter(values[0].astype(dtype), dtype(np.inf))
    elif kind == "sorted":
        values = np.sort(values)
    elif kind == "tiny":  # mostly subnormal
        values = values * float(limits.smallest_normal) / 4
    elif kind == "huge":  # within a factor of two of the largest number
        values = np.clip(values, -1, 1) * float(limits.max) * 0.75
    elif kind in ("nan", "inf"):
        values[rng.integers(n)] = np.nan if kind == "nan" else np.inf * rng.choice([-1, 1])
    return values


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    dtype: str = "float32",
    kinds: Sequence[str] = KINDS[:6],
    max_ratio: float = 1e6,
    least: int = 2,
    most: int = 9,
) -> Batch:
    """Draw batches (N, C, S) of `dtype`, each channel of some kind; they shrink to few and ordinary values.

    Parameters
    ----------
    dtype : str
        The dtype of x and dy: "float16", "float32" or "float64".
    kinds : sequence of str
        Some of `KINDS`: "normal", "far" (|mean|/std up to max_ratio), "outlier", "constant", "nearly constant" (one
        value is the next larger number), "sorted", "tiny" (subnormal), "huge" (near overflow), "nan", "inf".
    max_ratio : float
        The largest |mean|/std, outlier or constant.
    least, most : int
        The smallest number of values in a channel (0 allows empty batches), and the largest N, C and S.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(batches(kinds=["constant"]))
    ... def test_constant_channels_have_no_variance(batch):
    ...     assert (batch.x == batch.x[:1, :, :1]).all()
    >>> test_constant_channels_have_no_variance()
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"kinds: expected some of {KINDS}; got {unknown[0]!r}")
    if dtype not in ("float16", "float32", "float64"):
        raise ValueError(f"dtype: expected 'float16', 'float32' or 'float64'; got {dtype!r}")
    if not (0 <= least <= most**2 and max_ratio >= 1):
        raise ValueError(f"expected 0 ≤ least ≤ most² and max_ratio ≥ 1; got {least}, {most} and {max_ratio}")
    max_ratio = min(max_ratio, float(np.finfo(dtype).max) / 16)
    shape = draw(
        st.tuples(*(st.integers(low, most) for low in (min(least, 1), 1, min(least, 1)))).filter(
            lambda shape: shape[0] * shape[2] >= least
        )
    )
    n, scalar = shape[0] * shape[2], np.dtype(dtype).type
    channels = draw(st.lists(st.sampled_from(kinds), min_size=shape[1], max_size=shape[1]))
    exponent = draw(st.floats(0, float(np.log10(max_ratio))))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    columns = [_channel(kind, n, 10.0**exponent, scalar, rng) if n else np.zeros(0) for kind in channels]
    with np.errstate(over="ignore"):
        x = np.stack(columns).reshape(shape[1], shape[0], shape[2]).transpose(1, 0, 2).astype(dtype)
    dy = (rng.standard_normal(shape) + 0.5).astype(dtype)
    weight, bias = (rng.uniform(-2, 2, shape[1]).astype("f4") for _ in range(2))
    return Batch(x, dy, weight, bias, draw(st.sampled_from([1e-5, 1e-3, 0.5])))


def _read_only(array: Array) -> Array:
    array = array.copy()
    array.flags.writeable = False
    return array


def _unaligned(array: Array) -> Array:
    memory: Array = np.zeros(array.nbytes + 1, "u1")[1:].view(array.dtype).reshape(array.shape)
    memory[...] = array
    return memory


def _spread(array: Array) -> Array:
    memory = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    memory[..., ::2] = array
    return memory[..., ::2]


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "channels last": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1),
    "channels first": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, 0)), 0, 1),
    "reversed": lambda x: x[::-1].copy()[::-1],
    "spread": _spread,
    "read-only": _read_only,
    "unaligned": _unaligned,
}


def layouts() -> st.SearchStrategy[Callable[[Array], Array]]:
    """Draw functions that return an equal array with another memory layout.

    Examples
    --------
    >>> from hypothesis import given
    >>> import numpy
    >>> @given(layouts())
    ... def test_layouts_change_no_value(layout):
    ...     assert (layout(numpy.ones((2, 3, 4))) == 1).all()
    >>> test_layouts_change_no_value()
    """
    return st.sampled_from(list(LAYOUTS.values()))

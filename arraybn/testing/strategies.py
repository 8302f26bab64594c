"""Hypothesis strategies: batches on which batch norms fail, and layouts of arrays in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .._install import requirement

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(f"arraybn.testing.strategies needs hypothesis: pip install {requirement('test')}") from error

from .oracle import MANTISSA_BITS, largest_number
from .scenarios import KINDS, Array, Batch, numpy_dtype, of_kinds


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
        The dtype of x and dy: "float16", "bfloat16" (needs ml_dtypes), "float32" or "float64".
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
    if dtype not in MANTISSA_BITS:
        raise ValueError(f"dtype: expected one of {', '.join(MANTISSA_BITS)}; got {dtype!r}")
    if not (0 <= least <= most**2 and max_ratio >= 1):
        raise ValueError(f"expected 0 ≤ least ≤ most² and max_ratio ≥ 1; got {least}, {most} and {max_ratio}")
    max_ratio = min(max_ratio, float(largest_number(dtype)) / 16)
    shape = draw(
        st.tuples(*(st.integers(low, most) for low in (min(least, 1), 1, min(least, 1)))).filter(
            lambda shape: shape[0] * shape[2] >= least
        )
    )
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=shape[1], max_size=shape[1]))
    exponent = draw(st.floats(0, float(np.log10(max_ratio))))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    eps = draw(st.sampled_from([1e-5, 1e-3, 0.5]))
    batch = of_kinds(chosen, shape, 10.0**exponent, dtype, rng)._replace(eps=eps)
    return batch._replace(dy=batch.dy.astype(numpy_dtype(dtype)))


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

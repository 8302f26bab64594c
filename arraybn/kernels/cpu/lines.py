"""Arrays as the lines of values that compiled code takes, and the places of results."""

from __future__ import annotations

import numpy as np

from ..._arrays.namespaces import Array
from .. import results

STORED_AS = {"e": np.dtype(np.int16), "E": np.dtype(np.uint16)}  # Numba knows neither float16 nor bfloat16


def contiguous(array: Array) -> Array:
    """Return the array, or a copy where its memory is not contiguous and aligned."""
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else array.copy()


def line_of(array: Array) -> Array:
    """Return all values of the array as one line."""
    line = contiguous(array).reshape(-1)
    stored = STORED_AS.get(array.dtype.char)
    return line if stored is None else line.view(stored)


def place_of_result(x: Array, out: Array | None, *inputs: Array) -> tuple[Array, Array, int]:
    """Return the result, which is `out` if `out` can be written as a line, its line, and 1 if it lies over an input."""
    if out is None or not (out.flags.c_contiguous and out.flags.aligned):
        out = results.empty(x.shape, x.dtype)
        return out, line_of(out), 0
    y = line_of(out)
    return out, y, int(any(np.may_share_memory(y, line) for line in inputs))

"""Values that == compares to the bit, to see that a call has changed nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

import arraybn
from arraybn import network
from arraybn.functional import Saved


def bits(value: Any) -> Any:  # noqa: PLR0911
    """Return an equivalent of `value` that == compares to the bit; objects without values by their identity."""
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, arraybn.Moments):
        return bits((value.n, value.mean, value.m2))
    if isinstance(value, arraybn.Parameter):
        return id(value), bits((value.data, value.grad))
    if isinstance(value, arraybn.Module):
        return [(path, id(module), bits(vars(module))) for path, module in value.named_modules()]
    if isinstance(value, Saved):
        return id(value), [bits(getattr(value, name)) for name in Saved.__slots__]
    if isinstance(value, network.SGD):
        return bits(vars(value))
    if isinstance(value, dict):
        return [(key, bits(part)) for key, part in value.items() if key != "_modules"]
    if isinstance(value, list | tuple):
        return [bits(part) for part in value]
    if isinstance(value, bool | int | float | str | None):
        return type(value), repr(value)
    return id(value)

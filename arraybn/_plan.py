"""Calls that have passed all checks: a call with arguments alike needs none of these checks again.

Nearly all checks of a call look at types, dtypes, shapes and strides alone. These are the key of a table. After a call
has passed every check, the table keeps a plan, which is what the checks have found out; a later call with an equal key
takes the plan, in a fraction of the time. A call without a plan goes through all checks, so that every error has its
text; a call that fails leaves no plan.

Each call looks at what a key cannot tell: the value of eps, and `out`, which may share memory with an input. Only calls
with a plain NumPy array x have a key. A key holds no array. A full table begins anew. Each step of a dict is one step
for all threads. (A backward needs no plan: that dy has the type, dtype and shape of x says everything.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np

from ._arrays.namespaces import Array

Key: TypeAlias = tuple[Any, ...]
P = TypeVar("P")
SIZE = 1024  # plans in a table


def key_of(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    mean: Array | None,
    var: Array | None,
    channel_axis: object,
) -> Key | None:
    """Return the key of a call; None if it has none."""
    if type(x) is not np.ndarray or type(channel_axis) is not int:  # True and 1 are equal
        return None
    try:
        return (
            channel_axis,
            x.dtype,
            x.shape,
            x.strides,
            type(weight),
            weight is not None and (weight.dtype, weight.shape),
            type(bias),
            bias is not None and (bias.dtype, bias.shape),
            type(mean),
            mean is not None and (mean.dtype, mean.shape),
            type(var),
            var is not None and (var.dtype, var.shape),
        )
    except AttributeError:  # a list
        return None


def are_same(checked: Sequence[object], given: Sequence[object]) -> bool:
    """Return True if the checks have converted nothing, so that a plan may take the given arrays as they are."""
    return all(one is other for one, other in zip(checked, given, strict=True))


def keep(table: dict[Key | None, P], key: Key | None, plan: P) -> None:
    """Keep the plan of a call that has passed all checks."""
    if key is not None:
        if len(table) >= SIZE:
            table.clear()
        table[key] = plan

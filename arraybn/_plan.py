"""Calls that have passed all checks: a call with arguments alike needs none of these checks again.

Nearly all checks of a call look at types, dtypes, shapes and strides alone. These are the key of a table. After a call
has passed every check, the table keeps a plan, which is what the checks have found out; a later call with an equal key
takes the plan, in a fraction of the time. A call without a plan goes through all checks, so that every error has its
text; a call that fails leaves no plan.

Each call looks at what a key cannot tell: the value of eps, and `out`, which may share memory with an input. Only calls
with a plain NumPy array x have a key. Keys and plans hold no array of a caller. A full table begins anew. Each step of
a dict is one step for all threads.

A plan may also hold a short way, which takes the arrays as they are: see `kernels.cpu.Calls`. A backward takes the
short way of its forward's plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ._arrays.layout import Layout
from ._arrays.namespaces import Array

# Bits of `flags.num` of a NumPy array; an array that owns its memory shares the memory with no other owner.
CONTIGUOUS, OWNER, ALIGNED, WRITEABLE = 0x1, 0x4, 0x100, 0x400
Key: TypeAlias = tuple[Any, ...]
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
            x.flags.num,
            type(weight),
            weight is not None and (weight.dtype, weight.shape, weight.flags.num),
            type(bias),
            bias is not None and (bias.dtype, bias.shape, bias.flags.num),
            type(mean),
            mean is not None and (mean.dtype, mean.shape, mean.flags.num),
            type(var),
            var is not None and (var.dtype, var.shape, var.flags.num),
        )
    except AttributeError:  # a list
        return None


@dataclass(slots=True, eq=False)
class Plan:
    """The findings of a call: layout and dtype of x, whether all inputs own their memory, and the short way, if any."""

    layout: Layout
    dtype: Any
    owners: bool
    short: Any = None  # False where there is no short way; None while nobody has looked

    @classmethod
    def of(cls, layout: Layout, x: Array, *vectors: Array | None) -> Plan:
        """Return the plan for calls with arrays like these."""
        owners = all(array is None or array.flags.owndata for array in (x, *vectors))
        return cls(layout, x.dtype, owners)


def place_over(
    out: Array | None, owners: bool, x: Array, dy: Array | None = None, vectors: Sequence[Array | None] = ()
) -> int | None:
    """Return 1 where `out` is an input, 0 where `out` is None or apart from all, None where slower checks have to look.

    `owners` is True where all inputs own their memory.
    """
    if out is None:
        return 0
    if type(out) is not np.ndarray or out.dtype != x.dtype or out.shape != x.shape:
        return None
    flags = out.flags.num
    if flags & (CONTIGUOUS | ALIGNED | WRITEABLE) != CONTIGUOUS | ALIGNED | WRITEABLE:
        return None
    if owners and flags & OWNER:
        return int(out is x or out is dy)
    over = 0
    for one in (x, dy, *vectors):
        if one is out:
            over = 1
        elif one is not None and np.may_share_memory(out, one):
            return None
    return over


def are_same(checked: Sequence[object], given: Sequence[object]) -> bool:
    """Return True if the checks have converted nothing, so that a plan may take the given arrays as they are."""
    return all(one is other for one, other in zip(checked, given, strict=True))


def keep(table: dict[Key, Plan], key: Key, plan: Plan) -> None:
    """Keep the plan of a call that has passed all checks."""
    if len(table) >= SIZE:
        table.clear()
    table[key] = plan

"""The layout of an array, with its axes in any order, and the view of the array as (N, C, S)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .memory import strides_of
from .namespaces import Array, array_namespace


@dataclass(slots=True, eq=False)
class Layout:
    """The way from an array of any layout to (N, C, S), and of a result back to that layout.

    The axes are first put in their order in memory. So a transposed view of contiguous memory is not copied, and the
    result has the same memory layout as the input.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...] | None  # axes from the slowest to the fastest in memory; None if they are in this order
    ncs: tuple[int, int, int]
    channel_axis: int  # of `shape`

    @classmethod
    def of(cls, x: Array, channel_axis: int) -> Layout:
        """Return the layout of `x` (N, C, *S) with its channels on `channel_axis`."""
        shape, ndim = tuple(x.shape), x.ndim
        if ndim < 2:
            raise ValueError(f"x: expected at least 2 dimensions, (N, C, *S); got shape {shape}")
        if not -ndim <= channel_axis < ndim:
            raise ValueError(
                f"channel_axis: expected {-ndim} … {ndim - 1} for x of {ndim} dimensions; got {channel_axis}"
            )
        axis = int(channel_axis) % ndim
        if shape[axis] == 0:
            raise ValueError(f"x: expected at least one channel on axis {channel_axis}; got shape {shape}")
        order, memory_shape, channel_axis = _memory_order(x), shape, axis
        if order is not None:
            memory_shape, axis = tuple(shape[i] for i in order), order.index(axis)
        before, after = math.prod(memory_shape[:axis]), math.prod(memory_shape[axis + 1 :])
        return cls(shape, order, (before, memory_shape[axis], after), channel_axis)

    @property
    def n(self) -> int:
        """Number of values in each channel."""
        return self.ncs[0] * self.ncs[2]

    def view(self, array: Array) -> Array:
        """Return `array`, of the user's shape, as (N, C, S)."""
        if self.order is not None:
            array = array_namespace(array).permute_dims(array, self.order)
        return _reshaped(array, self.ncs)

    @property
    def positions(self) -> tuple[int, ...]:
        """The shape without the channels, (N, *S)."""
        return self.shape[: self.channel_axis] + self.shape[self.channel_axis + 1 :]

    def view_of_mask(self, where: Array) -> Array:
        """Return `where`, of a shape that broadcasts to (N, *S), as (N, 1, S)."""
        xp = array_namespace(where)
        where = xp.expand_dims(xp.broadcast_to(where, self.positions), axis=self.channel_axis)
        if self.order is not None:
            where = xp.permute_dims(where, self.order)
        return _reshaped(where, (self.ncs[0], 1, self.ncs[2]))

    def restore(self, array: Array) -> Array:
        """Return `array` (N, C, S) in the user's shape and axis order."""
        if self.order is None:
            return _reshaped(array, self.shape)
        array = _reshaped(array, tuple(self.shape[i] for i in self.order))
        return array_namespace(array).permute_dims(array, tuple(self.order.index(i) for i in range(len(self.order))))


def _reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    if isinstance(array, np.ndarray):
        return array.reshape(shape)
    return array_namespace(array).reshape(array, shape)


def _memory_order(array: Array) -> tuple[int, ...] | None:
    """Return the axes from the slowest to the fastest in memory; None if they are in this order, or unknown."""
    if isinstance(array, np.ndarray) and array.flags.c_contiguous:
        return None
    strides = strides_of(array)
    if strides is None:
        return None
    order = tuple(sorted(range(len(strides)), key=lambda axis: -abs(strides[axis])))
    return None if order == tuple(range(len(order))) else order

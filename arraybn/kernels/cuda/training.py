"""A training layer's forward and backward with little on the host: one launch each, and no array but the results.

A layer makes a `Trainer` for one kind of input, after a call that made all checks, and asks the trainer again for
inputs of that kind. So a call here allocates, fills in the parameters of a launch, and launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..._arrays.namespaces import Array
from . import NO_VECTORS, VECTORS, launch
from .launch import Grid, Kernel

KINDS = {"d": 0, "f": 1}  # as struct Parameters numbers the types of parameters and state
ROWS = ("mean", "m2", "rstd", "kept_weight", "dweight", "dbias")  # of the statistics that a forward leaves, (C,) each
_AT = {name: place for place, name in enumerate(VECTORS)}


class Launch(NamedTuple):
    """One launch of a forward or backward."""

    kernel: Kernel
    grid: Grid
    numbers: tuple[int, ...]  # as `cuda.Cut` has them
    about_mean: bool = False  # True where the sums are about the mean that an earlier launch has set


class Trainer:
    """One launch forward and one backward for a layer, for inputs of one class, shape and dtype on one device."""

    def __init__(
        self, launches: Callable[..., tuple[Launch, ...]], x: Array, ncs: tuple[int, int, int], like: Array, eps: float
    ) -> None:
        """`like` is an array (C,) of the layer: parameters and state have the dtype of `like`."""
        self._choose = launches
        self.gpu = launch.launcher()
        self.kind = type(x) if like.dtype.char in KINDS else None
        self.shape, self.dtype = x.shape, x.dtype
        self.device: int = x.data.device_id
        self.state_dtype, self.state_shape = like.dtype, like.shape
        self._ncs, self._eps = ncs, eps
        self._row = 8 * ncs[1]  # bytes
        self._pair = 2, ncs[1]
        self._state_row = ncs[1] * like.dtype.itemsize
        self._launches: dict[tuple[int, int], tuple[Launch, ...]] = {}

    def input(self, x: Array) -> int:
        """Return the address of an input like that for which the trainer was made; -1 for any other array."""
        if type(x) is self.kind and x.shape == self.shape and x.dtype == self.dtype and x.flags.c_contiguous:
            return self._address(x)
        return -1

    def vector(self, vector: Array) -> int:
        """Return the address of a vector (C,) of the layer; -1 for a vector that the kernels cannot take."""
        same = type(vector) is self.kind and vector.shape == self.state_shape and vector.dtype == self.state_dtype
        return self._address(vector) if same and vector.flags.c_contiguous else -1

    def _address(self, array: Array) -> int:
        memory = array.data
        return memory.ptr if memory.device_id == self.device else -1

    def row(self, rows: Array, index: int) -> int:
        """Return the address of a row of an array (2, C) that `backward` made; -1 where it was made for another layer.

        A parameter that two layers share has the gradient of either.
        """
        same = rows.dtype == self.state_dtype and rows.shape[1:] == self.state_shape
        address = self._address(rows) if same else -1
        return address if address == -1 else address + index * self._state_row

    def forward(self, x: int, parameters: tuple[int, int], state: tuple[int, int], momentum: float) -> Any:
        """(E1, E3, E4) Return y, the statistics (6, C) with the rows `ROWS`, and the new running mean and var (2, C).

        Inputs are given by their addresses, here and in `backward`.
        """
        return self._on_device(self._forward, x, parameters, state, momentum)

    def backward(self, dy: int, x: int, statistics: Array, gradients: tuple[int, int]) -> Any:
        """(E5, E6) Return dx, and the gradients of weight and bias (2, C), added to those that are there."""
        return self._on_device(self._backward, dy, x, statistics, gradients)

    def _on_device(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call `work` with the device and its stream; the device is made the current one if another one is."""
        where = self.gpu.current()
        if where[0] == self.device:
            return work(where, *arguments)
        with self.gpu.at(self.device):
            return work(self.gpu.current(), *arguments)

    def _forward(
        self, where: tuple[int, int], x: int, parameters: tuple[int, int], state: tuple[int, int], momentum: float
    ) -> tuple[Array, Array, Array]:
        empty, channels = self.gpu.empty, self._ncs[1]
        y, statistics, new = (
            empty(self.shape, self.dtype),
            empty((6, channels), "f8"),
            empty(self._pair, self.state_dtype),
        )
        vectors = self._vectors(statistics, state, new, 4)
        vectors[_AT["weight"]], vectors[_AT["bias"]] = parameters
        self._run(where, (x, 0, self.gpu.pointer(y)), vectors, momentum)
        return y, statistics, new

    def _backward(
        self, where: tuple[int, int], dy: int, x: int, statistics: Array, gradients: tuple[int, int]
    ) -> tuple[Array, Array]:
        dx, new = self.gpu.empty(self.shape, self.dtype), self.gpu.empty(self._pair, self.state_dtype)
        vectors = self._vectors(statistics, gradients, new, 6)
        vectors[_AT["weight"]] = vectors[_AT["kept_weight"]]
        self._run(where, (x, dy, self.gpu.pointer(dx)), vectors, 0.0)
        return dx, new

    def _vectors(self, statistics: Array, before: tuple[int, int], after: Array, rows: int) -> list[int]:
        """Return the addresses of `VECTORS`: the first rows of the statistics, and state before and after."""
        vectors = list(NO_VECTORS)
        address, place = self.gpu.pointer(statistics), self.gpu.pointer(after)
        for row in range(rows):
            vectors[_AT[ROWS[row]]] = address + row * self._row
        vectors[_AT["first"]], vectors[_AT["second"]] = before
        vectors[_AT["new_first"]], vectors[_AT["new_second"]] = place, place + self._state_row
        return vectors

    def _run(self, where: tuple[int, int], data: tuple[int, int, int], vectors: list[int], momentum: float) -> None:
        x, u, y = data
        inputs, address = 2 if u else 1, (x | u | y) % 16
        found = self._launches.get((inputs, address))
        if found is None:
            state = KINDS[self.state_dtype.char]
            kinds = (0, state) if u else (state, state)
            found = self._choose(self._ncs, self.dtype, address, inputs, self.gpu.device(), kinds)
            self._launches[inputs, address] = found
        for kernel, grid, numbers, about_mean in found:
            vectors[_AT["shift"]] = vectors[_AT["mean"]] if about_mean else 0
            self.gpu.launch(kernel, grid, (*data, *vectors), (self._eps, momentum, *numbers), where)

"""The cases of the benches: shapes, layouts, dtypes, operations, and the bytes that must be moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

# Times that memory must see an array like x, at least. The numbers per channel are nothing beside it.
PASSES = {
    "copy": 2,  # reads x, writes its copy
    "forward": 2,  # reads x, writes y
    "backward": 3,  # reads dy and x, writes dx
    "eval": 2,  # reads x, writes y
    "layer": 2,  # a forward
    "step": 5,  # a forward and a backward
}
TWO_READS = {"forward": 3, "backward": 5, "eval": 2}  # the same, where the sums and the map each read everything
OPERATIONS = tuple(PASSES)[1:]
LARGE_OPERATIONS, SMALL_OPERATIONS = ("forward", "backward", "eval"), ("layer", "step")
LAYOUTS, DTYPES, HALVES = ("first", "last"), ("float32", "float64"), ("float16", "bfloat16")
GPU_DTYPES = ("float32", *HALVES)
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
SMALL = 2**16  # elements; up to here, the call of a layer is timed
ALIVE, ALIVE_BYTES = (2, 16), 2**28  # results of a contestant that stay alive: at least, at most; and their bytes

RESNET = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
TINY = ((64, 128), (1, 64, 8, 8))
QUICK = (((32, 64, 112, 112), ("first",)), ((32, 1024, 14, 14), LAYOUTS))
DOUBLE = ((32, 512, 28, 28), (32, 2048, 7, 7))  # of which the full run takes float64 too: 103 and 26 MB
CHECKED = {2: (30, 6), 3: (8, 6, 7), 4: (8, 6, 7, 5), 5: (4, 6, 3, 7, 5)}  # by number of axes; no two axes alike
GPU_QUICK_SHAPES, GPU_QUICK_DTYPES, HOST_SHAPES = (RESNET[0], RESNET[3]), ("float32", "float16"), (*TINY, RESNET[3])

Shapes = Sequence[tuple[int, ...]] | None
Names = Sequence[str] | None
EPS = 2.0**-10  # a number in every dtype, and above the least that TensorFlow takes


@dataclass(frozen=True)
class Case:
    """One block of the table. `shape` is (N, C, *S), whatever the layout."""

    shape: tuple[int, ...]
    layout: str = "first"
    dtype: str = "float32"
    operations: tuple[str, ...] = LARGE_OPERATIONS

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return self.elements * ITEMSIZE[self.dtype]

    @property
    def alive(self) -> int:
        """Results of a contestant that stay alive while more are made."""
        least, most = ALIVE
        return max(least, min(most, ALIVE_BYTES // self.nbytes))

    @property
    def vectors(self) -> str:
        """The dtype of weight and bias: float32 beside halves, as mixed training has it."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def in_memory(self) -> tuple[int, ...]:
        """The shape of a user's array: (N, C, *S) or (N, *S, C)."""
        n, c, *s = self.shape
        return (n, *s, c) if self.layout == "last" else self.shape

    @property
    def channel_axis(self) -> int:
        return -1 if self.layout == "last" else 1

    @property
    def reduced_axes(self) -> tuple[int, ...]:
        """The axes of a user's array that sums go over."""
        return tuple(i for i in range(len(self.shape)) if i != self.channel_axis % len(self.shape))

    @property
    def vector_shape(self) -> tuple[int, ...]:
        """The shape in which a vector (C,) meets a user's array."""
        return tuple(1 if i in self.reduced_axes else -1 for i in range(len(self.shape)))

    @property
    def is_small(self) -> bool:
        """True if only calls of layers are timed, which are shown in microseconds."""
        return set(self.operations) <= set(SMALL_OPERATIONS)

    @property
    def checked(self) -> Case:
        """The small case that contestants are checked on before this one is timed on the CPU."""
        return replace(self, shape=CHECKED[len(self.shape)])

    def moved(self, operation: str) -> int:
        """Bytes that must go from or to memory, at least."""
        return PASSES[operation] * self.nbytes

    def moved_twice(self, operation: str) -> int:
        """Bytes that go from or to memory if the map cannot use what the sums have read."""
        return TWO_READS[operation] * self.nbytes

    def as_json(self) -> dict[str, Any]:
        return {"shape": self.shape, "layout": self.layout, "dtype": self.dtype, "whats": self.operations}

    def __str__(self) -> str:
        layout = "" if len(self.shape) == 2 else f", channels-{self.layout}"
        return f"{self.shape} {self.dtype}{layout}"


def choose(
    *, shapes: Shapes = None, layouts: Names = None, dtypes: Names = None, operations: Names = None, quick: bool = False
) -> list[Case]:
    """Return the cases that the options ask for on the CPU; each None leaves the choice to us."""
    if shapes is not None:
        return product(shapes, layouts or ("first",), dtypes or ("float32",), operations)
    large, types = QUICK if quick else tuple((shape, LAYOUTS) for shape in RESNET), dtypes or ("float32",)
    cases = [case for shape, usual in large for case in product([shape], layouts or usual, types, operations)]
    if dtypes is None and not quick:
        cases += product(DOUBLE, layouts or LAYOUTS, ("float64",), operations)
    return cases + product(TINY, layouts or ("first",), types, operations)


def product(
    shapes: Iterable[tuple[int, ...]], layouts: Iterable[str], dtypes: Sequence[str], operations: Names
) -> list[Case]:
    """Return every shape in every layout and dtype, once; two axes have one layout."""
    found = []
    for shape in shapes:
        usual = LARGE_OPERATIONS if math.prod(shape) > SMALL else SMALL_OPERATIONS
        for layout in layouts if len(shape) > 2 else ("first",):
            found += [Case(shape, layout, dtype, tuple(operations or usual)) for dtype in dtypes]
    return list(dict.fromkeys(found))


def choose_gpu(
    *, shapes: Shapes = None, layouts: Names = None, dtypes: Names = None, operations: Names = None, quick: bool = False
) -> list[Case]:
    """Return the cases of the table of a GPU, the most telling first, because time may run out."""
    wanted = tuple(one for one in LARGE_OPERATIONS if operations is None or one in operations)
    if not wanted:
        return []
    if shapes is not None:
        layouts, dtypes = layouts or LAYOUTS[:1], dtypes or GPU_DTYPES[:1]
    found = [
        Case(shape, layout if len(shape) > 2 else "first", dtype, wanted)
        for dtype in dtypes or (GPU_QUICK_DTYPES if quick else GPU_DTYPES)
        for layout in layouts or LAYOUTS
        for shape in shapes or (GPU_QUICK_SHAPES if quick else RESNET)
    ]
    return list(dict.fromkeys(found))


def choose_host(operations: Names, shapes: Shapes) -> list[Case]:
    """Return the cases whose calls of layers are timed on the host of a GPU."""
    wanted = tuple(one for one in SMALL_OPERATIONS if operations is None or one in operations)
    if not wanted:
        return []
    if shapes is not None and operations is None:
        shapes = [shape for shape in shapes if math.prod(shape) <= SMALL]
    return [Case(shape, operations=wanted) for shape in (HOST_SHAPES if shapes is None else shapes)]

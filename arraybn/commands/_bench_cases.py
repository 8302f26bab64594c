"""What ``python -m arraybn bench`` times: shapes, layouts, dtypes, the data, and the bytes that must be moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

# How often memory must see an array like x, at least. The numbers per channel are nothing beside it.
PASSES = {
    "copy": 2,  # reads x, writes its copy
    "forward": 2,  # reads x, writes y
    "backward": 3,  # reads dy and x, writes dx
    "eval": 2,  # reads x, writes y
    "layer": 2,  # a forward
    "step": 5,  # a forward and a backward
}
WHATS = tuple(PASSES)[1:]
LARGE_WHATS, SMALL_WHATS = ("forward", "backward", "eval"), ("layer", "step")
LAYOUTS, DTYPES = ("first", "last"), ("float32", "float64")
SMALL = 2**16  # elements; up to so many, the call of a layer is timed

RESNET = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
TINY = ((64, 128), (1, 64, 8, 8))
QUICK = (((32, 64, 112, 112), ("first",)), ((32, 1024, 14, 14), LAYOUTS))
DOUBLE = ((32, 512, 28, 28), (32, 2048, 7, 7))  # of which the full run takes float64 too: 103 and 26 MB
CHECKED = {2: (30, 6), 3: (8, 6, 7), 4: (8, 6, 7, 5), 5: (4, 6, 3, 7, 5)}  # by number of axes; no two axes alike

EPS = 2.0**-10  # a number in every dtype, and above the least that TensorFlow takes


@dataclass(frozen=True)
class Case:
    """What is timed in one block of the table. `shape` is (N, C, *S), whatever the layout."""

    shape: tuple[int, ...]
    layout: str = "first"
    dtype: str = "float32"
    whats: tuple[str, ...] = LARGE_WHATS

    @property
    def elements(self) -> int:
        """How many values x has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of x."""
        return self.elements * np.dtype(self.dtype).itemsize

    @property
    def in_memory(self) -> tuple[int, ...]:
        """The shape of the array that a user has: (N, C, *S) or (N, *S, C)."""
        n, c, *s = self.shape
        return (n, *s, c) if self.layout == "last" else self.shape

    @property
    def channel_axis(self) -> int:
        """Of the array that a user has."""
        return -1 if self.layout == "last" else 1

    @property
    def checked(self) -> Case:
        """The small case that contestants are checked on before this one is timed."""
        return Case(CHECKED[len(self.shape)], self.layout, self.dtype, self.whats)

    def moved(self, what: str) -> int:
        """The bytes that must go from or to memory, at least."""
        return PASSES[what] * self.nbytes

    def as_json(self) -> dict[str, Any]:
        """As `Case.of` takes it."""
        return asdict(self)

    @classmethod
    def of(cls, found: dict[str, Any]) -> Case:
        """What `as_json` gave, after JSON has made lists of its tuples."""
        return cls(tuple(found["shape"]), found["layout"], found["dtype"], tuple(found["whats"]))

    def __str__(self) -> str:
        layout = "" if len(self.shape) == 2 else f", channels-{self.layout}"
        return f"{self.shape} {self.dtype}{layout}"


# ---- Which cases -----------------------------------------------------------------------------------------------------


def choose(
    *,
    shapes: Sequence[tuple[int, ...]] | None = None,
    layouts: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    whats: Sequence[str] | None = None,
    quick: bool = False,
) -> list[Case]:
    """The cases that the options ask for; each None leaves the choice to us."""
    if shapes is not None:
        return _product(shapes, layouts or ("first",), dtypes or ("float32",), whats)
    large, types = QUICK if quick else tuple((shape, LAYOUTS) for shape in RESNET), dtypes or ("float32",)
    cases = [case for shape, usual in large for case in _product([shape], layouts or usual, types, whats)]
    if dtypes is None and not quick:
        cases += _product(DOUBLE, layouts or LAYOUTS, ("float64",), whats)
    return cases + _product(TINY, layouts or ("first",), types, whats)


def _product(
    shapes: Iterable[tuple[int, ...]], layouts: Iterable[str], dtypes: Sequence[str], whats: Sequence[str] | None
) -> list[Case]:
    """Every shape in every layout and dtype, once; two axes have one layout."""
    found = []
    for shape in shapes:
        usual = LARGE_WHATS if math.prod(shape) > SMALL else SMALL_WHATS
        for layout in layouts if len(shape) > 2 else ("first",):
            found += [Case(shape, layout, dtype, tuple(whats or usual)) for dtype in dtypes]
    return list(dict.fromkeys(found))


# ---- The data --------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """The arrays of a case: x and dy as a user has them, all else (C,); everything in the dtype of the case."""

    case: Case
    x: Array
    dy: Array
    weight: Array
    bias: Array
    mean: Array  # this and var: the fixed statistics of an evaluation
    var: Array
    eps: float = EPS


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Normally distributed, the same each time."""
    rng, channels, dtype = np.random.default_rng(seed), case.shape[1], np.dtype(case.dtype)
    block = rng.standard_normal((2, min(case.elements, 2**20))).astype(dtype)
    x, dy = (_filled(case.in_memory, line) for line in block)
    weight, bias, mean = (rng.uniform(low, 2, channels).astype(dtype) for low in (0.5, -2, -2))
    return Problem(case, x, dy, weight, bias, mean, rng.uniform(0.5, 2, channels).astype(dtype))


def _filled(shape: tuple[int, ...], values: Array) -> Array:
    """`values`, again and again: random numbers take longer to make than the batch norms of them."""
    array = np.empty(shape, values.dtype)
    line = array.reshape(-1)
    for start in range(0, line.size, values.size):
        part = line[start : start + values.size]
        part[:] = values[: part.size]
    return array


def parts(array: Array, count: int) -> list[Array]:
    """The array as a line, cut into so many contiguous pieces, none empty."""
    line = array.reshape(-1)
    return [piece for piece in np.array_split(line, count) if piece.size]

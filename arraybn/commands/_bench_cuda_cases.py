"""What ``bench --device cuda`` times: the cases, how often memory must see an array, and the shares of the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ._bench_cases import LARGE_WHATS, LAYOUTS, RESNET, SMALL, SMALL_WHATS, TINY, Case

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
DTYPES = ("float32", "float16", "bfloat16")  # of the full run
HALVES = ("float16", "bfloat16")
TWO_READS = {"forward": 3, "backward": 5, "eval": 2}  # times x: the sums read everything, and so does the map
QUICK_SHAPES, QUICK_DTYPES = (RESNET[0], RESNET[3]), ("float32", "float16")
HOST_SHAPES = (*TINY, RESNET[3])

TOTAL, QUICK_TOTAL = 480.0, 90.0  # seconds
SHARES = {"start": 0.12, "ceilings": 0.05, "table": 0.63, "host": 0.07, "ranks": 0.13}


@dataclass(frozen=True)
class GpuCase(Case):
    """A case whose dtype may be one that NumPy has not. The names per channel are float32, or float64 with x."""

    @property
    def nbytes(self) -> int:
        """The bytes of x."""
        return self.elements * ITEMSIZE[self.dtype]

    @property
    def vectors(self) -> str:
        """The dtype of weight and bias: float32 beside halves, as mixed training has it."""
        return "float64" if self.dtype == "float64" else "float32"

    def moved_twice(self, what: str) -> int:
        """The bytes that go from or to memory if the map cannot use what the sums have read."""
        return TWO_READS[what] * self.nbytes


def choose(
    *,
    shapes: Sequence[tuple[int, ...]] | None = None,
    layouts: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    whats: Sequence[str] | None = None,
    quick: bool = False,
) -> list[GpuCase]:
    """The cases of the table, the most telling first, because time may run out."""
    wanted = tuple(what for what in LARGE_WHATS if whats is None or what in whats)
    if not wanted:
        return []
    if shapes is not None:
        layouts, dtypes = layouts or LAYOUTS[:1], dtypes or DTYPES[:1]
    found = [
        GpuCase(shape, layout, dtype, wanted)
        for dtype in dtypes or (QUICK_DTYPES if quick else DTYPES)
        for layout in layouts or LAYOUTS
        for shape in shapes or (QUICK_SHAPES if quick else RESNET)
    ]
    flat = [GpuCase(case.shape, "first", case.dtype, wanted) if len(case.shape) == 2 else case for case in found]
    return list(dict.fromkeys(flat))


def choose_host(whats: Sequence[str] | None, shapes: Sequence[tuple[int, ...]] | None) -> list[GpuCase]:
    """The cases of which the time on the host is taken."""
    wanted = tuple(what for what in SMALL_WHATS if whats is None or what in whats)
    if not wanted:
        return []
    if shapes is not None and whats is None:
        shapes = [shape for shape in shapes if GpuCase(shape).elements <= SMALL]
    return [GpuCase(shape, whats=wanted) for shape in (HOST_SHAPES if shapes is None else shapes)]


@dataclass
class Budget:
    """Until when each section may work: what one does not use, the next ones have."""

    total: float
    clock: Callable[[], float] = time.perf_counter
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def used(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self.start

    def left(self, section: str) -> float:
        """Seconds that the section still has."""
        names = list(SHARES)
        share = sum(SHARES[name] for name in names[: names.index(section) + 1])
        return share * self.total - self.used

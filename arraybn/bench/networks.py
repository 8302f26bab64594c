"""``python -m arraybn bench --set``: the layers of networks at small batches, where data is found in cache.

Each case is a line: the times of arraybn with ``out=`` and of a rival, and the first divided by the second.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from .cases import LARGE_OPERATIONS, LAYOUTS, Case, Names, product
from .contestants.registry import COPYTO
from .report import TITLES, duration, quotient
from .timing import Result

OURS, RIVAL = "arraybn, out=", "PyTorch operators"
BATCHES = (1, 4, 8, 32)
LAYERS = {  # channels, and height = width, of every batch norm
    "resnet18": ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7)),
    "resnet50": (
        *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
        *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
    ),
    "mobilenet": (  # version 2
        *((32, 112), (16, 112), (96, 112), (96, 56), (24, 56), (144, 56), (144, 28), (32, 28), (192, 28), (192, 14)),
        *((64, 14), (384, 14), (96, 14), (576, 14), (576, 7), (160, 7), (960, 7), (320, 7), (1280, 7)),
    ),
}
CACHE = ((64, 128), (8, 64, 32, 32), (32, 256, 14, 14), (32, 2048, 7, 7), (32, 1024, 14, 14))
SETS = ("cache", *LAYERS)


def cases(names: Sequence[str], layouts: Names = None, dtypes: Names = None, operations: Names = None) -> list[Case]:
    """Return the cases of these sets, each once."""
    shapes: list[tuple[int, ...]] = [*CACHE] if "cache" in names else []
    for name in names:
        shapes += [(n, c, s, s) for n in BATCHES for c, s in LAYERS.get(name, ())]
    return product(shapes, layouts or LAYOUTS, dtypes or ("float32",), operations or LARGE_OPERATIONS)


def rival(results: Sequence[Result]) -> str | None:
    """Return the row that arraybn is compared with: PyTorch's operators, otherwise the first that is not ours."""
    rows = dict.fromkeys(cell.row for result in results for cell in result.cells)
    others = [row for row in rows if row not in (COPYTO, OURS, "arraybn")]
    return RIVAL if RIVAL in others else next(iter(others), None)


def ratio(result: Result, operation: str, other: str | None) -> float | None:
    """Return the time of arraybn divided by that of the rival."""
    return quotient(result.median(OURS, operation), result.median(other or "", operation))


def heading(operations: Sequence[str], rivals: Sequence[str]) -> str:
    other = RIVAL if RIVAL in rivals else next(iter(rivals), "nobody")
    title = f"{OURS} beside {other} [µs, medians], and the first divided by the second"
    return f"\n{title}\n{'':<42}" + "".join(f"{TITLES[one]:>28}" for one in operations)


def line(result: Result) -> str:
    """Return the times of a case and their quotients."""
    other, texts = rival([result]), []
    for operation in result.case.operations:
        ours, theirs = (result.median(row or "", operation) for row in (OURS, other))
        times = ("–" if time is None else duration(time, 1e6) for time in (ours, theirs))
        found = ratio(result, operation, other)
        texts.append("{:>12}{:>9}{:>7}".format(*times, "–" if found is None else f"{found:.2f}"))
    failures = {f"  {cell.row}: {cell.failed}" for cell in result.cells if cell.failed}
    return "\n".join([f"{result.case!s:<42}" + ("".join(texts) if not result.skipped else result.skipped), *failures])


def summary(results: Sequence[Result]) -> str:
    """Return, for each operation and layout, the quotients of all cases in short."""
    other = rival(results)
    lines = ["", f"{OURS}, divided by {other or 'nobody'}: median, cases above 1, and the largest"]
    for operation, layout in itertools.product(LARGE_OPERATIONS, LAYOUTS):
        cases = {str(one.case): ratio(one, operation, other) for one in results if one.case.layout == layout}
        if found := {case: value for case, value in cases.items() if value is not None}:
            where = max(found, key=lambda case: found[case])
            behind, median = sum(value > 1 for value in found.values()), statistics.median(found.values())
            text = f"{median:6.2f}{f'{behind} of {len(found)}':>12}{found[where]:8.2f} at {where}"
            lines.append(f"  {TITLES[operation]:<22}channels-{layout:<6}{text}")
    return "\n".join(lines)

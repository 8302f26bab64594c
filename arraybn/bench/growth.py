"""``python -m arraybn bench --growth``: time per element, from 10³ elements on, along N, C, S, in both layouts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from .cases import LAYOUTS, Case
from .contestants.registry import COPYTO
from .output import Column, entries, headings
from .timing import Result

FIRST, LAST = 10**3, 10**8  # elements
AXES = "NCS"
OPERATIONS = ("forward", "backward")
ROWS = ("arraybn, out=", "arraybn", "PyTorch operators", "PyTorch")


def cases(last: int) -> list[Case]:
    """Return (N, C, S) from (10, 10, 10) on, one of the three growing by √10 at a time, up to `last` elements."""
    wanted = ((shape, layout) for layout in LAYOUTS for axis in AXES for shape in shapes(axis, last))
    return list(dict.fromkeys(Case(*one, operations=OPERATIONS) for one in wanted))


def shapes(axis: str, last: int) -> list[tuple[int, ...]]:
    steps = math.floor(2 * math.log10(last / FIRST) + 1e-9)
    sizes = [round(10 * 10 ** (step / 2)) for step in range(steps + 1)]
    return [tuple(size if name == axis else 10 for name in AXES) for size in sizes]


def along(axis: str, layout: str, results: Sequence[Result]) -> list[Result]:
    """Return the results of a layout whose other two axes are 10."""
    others = [index for index, name in enumerate(AXES) if name != axis]
    found = [result for result in results if all(result.case.shape[index] == 10 for index in others)]
    return [result for result in found if result.case.layout == layout]


def rows(results: Sequence[Result]) -> list[str]:
    """Return the rows that were timed, ours first."""
    there = [cell.row for result in results for cell in result.cells if cell.row != COPYTO]
    return list(dict.fromkeys([row for row in ROWS if row in there] + there))


def table(results: Sequence[Result]) -> str:
    """Return nanoseconds per element, a block for each axis in each layout."""
    names = [(row, operation) for operation in OPERATIONS for row in rows(results)]
    columns = [_column(COPYTO, "copy", 15), *(_column(*name, 19) for name in names)]
    lines = []
    for axis, layout in itertools.product(AXES, LAYOUTS):
        lines += ["", f"Growth along {axis}: float32, channels-{layout}, nanoseconds per element (median)"]
        lines.append(f"{'(N, C, S)':<22}{'elements':>10}{headings(columns)}")
        lines.append(" " * 47 + "".join(f"{operation:>19}" for _, operation in names))
        for result in along(axis, layout, results):
            elements = f"{result.case.elements:.1e}".replace("e+0", "e")
            figures = f"   {result.skipped}" if result.skipped else entries(columns, result)
            lines.append(f"{result.case.shape!s:<22}{elements:>10}{figures}".rstrip())
    failures = {(cell.row, cell.failed) for result in results for cell in result.cells if cell.failed}
    return "\n".join([*lines, *(f"  {row}: {text}" for row, text in sorted(failures))])


def _column(row: str, operation: str, width: int) -> Column:
    def nanoseconds(result: Result) -> str:
        seconds = result.median(row, operation)
        return "–" if seconds is None else f"{seconds / result.case.elements * 1e9:.3g}"

    return row, width, nanoseconds

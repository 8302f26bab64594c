"""Samples: who gives them, in which turn, and what a call takes."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .cases import Case
from .device import no_collection
from .process import PeerError, first_line

FEWEST = 3  # turns of a cell, before its budget ends them
SAMPLE = 0.002  # seconds that a sample takes at least, so that the clock is no part of it
CHEAP = 0.05  # seconds; a call up to this is made once before those that are timed
Call = Callable[[], Any]


@dataclass
class Cell:
    """The samples of one contestant at one operation, in seconds; or the reason why there are none."""

    library: str
    row: str
    operation: str
    name: str = ""  # of the contestant
    calls: int = 1  # in a sample
    warm: int = 0  # calls before it
    seconds: list[float] = field(default_factory=list)
    failed: str = ""
    # on a GPU
    left: str = ""  # why it was left out, which is no fault
    backend: str | None = None  # chosen by the library
    clock: str = "device"
    hold: float = 0.0  # seconds that the stream is held while the calls are queued
    late: int = 0  # samples in which the device waited for the host
    done: list[float] = field(default_factory=list)  # seconds until the device was done, where `seconds` is the host's

    @property
    def quartiles(self) -> tuple[float, float, float]:
        first, median, third = np.quantile(self.seconds, (0.25, 0.5, 0.75)).tolist()
        return first, median, third

    @property
    def median(self) -> float | None:
        return self.quartiles[1] if self.seconds else None

    def prepare(self, ask: Callable[..., dict[str, Any]]) -> None:
        """Ask the process of the contestant how a sample is taken."""
        found = ask("prepare", contestant=self.name, operation=self.operation)
        self.calls, self.warm, self.hold = found["calls"], found.get("warm", 0), found.get("hold", 0.0)


@dataclass
class Result:
    """The cells of a case; `skipped` says why there are none."""

    case: Case
    cells: list[Cell] = field(default_factory=list)
    skipped: str = ""

    @property
    def has_news(self) -> bool:
        """True if there is a figure or a reason to print."""
        return bool(self.skipped) or any(cell.seconds or cell.failed or cell.left for cell in self.cells)

    def cell(self, row: str, operation: str) -> Cell | None:
        return next((cell for cell in self.cells if (cell.row, cell.operation) == (row, operation)), None)

    def median(self, row: str, operation: str) -> float | None:
        """Return the median of that cell, in seconds; None without samples."""
        cell = self.cell(row, operation)
        return None if cell is None else cell.median


@contextlib.contextmanager
def failing(*cells: Cell) -> Iterator[None]:
    """Let a `PeerError` be the failure of these cells, unless they have failed before."""
    try:
        yield
    except PeerError as error:
        for cell in cells:
            cell.failed = cell.failed or str(error)


def interleave(
    cells: Sequence[Cell],
    take: Callable[[Cell], float],
    *,
    rounds: int,
    budget: float | None = None,
    done: Callable[[], object] = lambda: None,
) -> None:
    """Give each cell a turn, and all of them the next only then; each round begins one cell further on.

    A cell whose turn fails gets no more. A cell that has used up the `budget` in seconds has turns enough. `done` is
    called after every round.
    """
    for index in range(rounds):
        first = index % len(cells) if cells else 0
        for cell in (*cells[first:], *cells[:first]):
            used = sum(cell.seconds) * (cell.calls + cell.warm)
            enough = budget is not None and len(cell.seconds) >= FEWEST and used > budget
            if not (cell.failed or enough):
                with failing(cell):
                    cell.seconds.append(take(cell))
        done()


def calibrate_calls(call: Call, kept: deque[Any]) -> tuple[int, int]:
    """Return the calls of a sample and the calls before it, having called until it no longer gets faster."""
    times: list[float] = []
    try:
        while len(times) < 2 or (len(times) < 10 and times[-1] < 0.8 * min(times[:-1]) and sum(times) < 1):
            times.append(seconds_of(call, 1, 0, kept))
        if min(times) < SAMPLE:
            times.append(seconds_of(call, 10, 3, kept))
    except Exception as error:
        raise PeerError(first_line(error)) from error
    calls = max(1, math.ceil(SAMPLE / min(times)))
    return calls, math.ceil(calls / 10) if min(times) < CHEAP else 0


def seconds_of(call: Call, calls: int, warm: int, kept: deque[Any]) -> float:
    """Return the time of one call. The latest results stay in `kept`, as those of a network wait for its backward.

    With one result alive the memory of the one before is there again, which no network finds.
    """
    for _ in range(warm):
        kept.append(call())
    with no_collection():
        start = time.perf_counter()
        for _ in itertools.repeat(None, calls):
            kept.append(call())
        return (time.perf_counter() - start) / calls


def rest() -> None:
    """Wait until the threads of the library no longer spin, at most a quarter of a second."""
    deadline = time.perf_counter() + 0.25
    while time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(0.002)
        if time.process_time() - before < 0.0005:
            return

"""The dialogue of ``bench --device cuda`` with the process that works on the GPU, which may be lost on the way.

A wrong address or a kernel that never ends costs the process, but no figure that was taken before: it is started again
without the contestant that was at work.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .cases import Case
from .contestants.registry import GPU_CONTESTANTS, GPU_LAYERS
from .device import CudaDevice
from .output import Progress, RefusedError
from .process import PeerError, Worker
from .timing import Cell, Result, failing, interleave
from .worker import Answer, GpuWork

TIME_LIMIT, START_LIMIT = 60.0, 150.0  # seconds for one question
CRASHES, RESTARTS = 2, 6  # of a contestant, and in all, until no more is tried
PEER_SHARE = 0.25  # fraction of the time of the table that preparing one peer may take
NO_TIME = "no time left"
CONTESTANTS = {one.name: one for one in GPU_CONTESTANTS}
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}  # the memory is for everyone

TOTAL, QUICK_TOTAL = 480.0, 90.0  # seconds
SHARES = {"start": 0.12, "ceilings": 0.05, "table": 0.63, "host": 0.07, "ranks": 0.13}
ENDS = dict(zip(SHARES, itertools.accumulate(SHARES.values()), strict=True))


class Budget:
    """Until when each section may work: the time that one does not use, the next ones have."""

    def __init__(self, total: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.total, self.clock, self.start = total, clock, clock()

    @property
    def used(self) -> float:
        return self.clock() - self.start

    def left(self, section: str) -> float:
        return ENDS[section] * self.total - self.used


class BrokenError(Exception):
    """The process is lost, or its device is; `contestant` was at work."""

    def __init__(self, contestant: str, text: str) -> None:
        super().__init__(text)
        self.contestant = contestant


class OutOfTimeError(Exception):
    """The section has used its time."""


def gpu_worker(make_device: Callable[[], Any] = CudaDevice) -> Worker:
    return Worker(partial(GpuWork, make_device), ENVIRONMENT, START_LIMIT)


@dataclass
class GpuSession:
    """The process at work; a context manager, which ends it."""

    contestants: Sequence[str]
    rounds: int
    budget: Budget
    make: Callable[[], Worker]
    progress: Progress
    seed: int
    worker: Worker | None = None
    barred: dict[str, str] = field(default_factory=dict)  # contestant → why it is no longer asked
    absent: dict[str, str] = field(default_factory=dict)  # row → why it never took part
    versions: dict[str, str] = field(default_factory=dict)
    device: Answer = field(default_factory=dict)
    gave_up: str = ""
    crashes: list[str] = field(default_factory=list)  # contestants that were at work
    spent: dict[str, float] = field(default_factory=dict)  # seconds of preparing each contestant

    def __enter__(self) -> GpuSession:
        """Start the process; a `RefusedError` says that there is no GPU."""
        self.progress.status("starting")
        try:
            self._start()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, PeerError):
                raise RefusedError(f"the GPU cannot be used: {error}") from error
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self.worker is not None:
            self.worker.stop()
            self.worker = None

    def _start(self) -> None:
        self.worker = self.make()
        self.worker.limit = START_LIMIT
        answer = self.worker.answer()
        if "none" in answer:
            raise RefusedError(f"--device cuda: {answer['none']}")
        self.device = answer["device"]
        for name in self.contestants:
            if name not in self.barred:
                self.progress.status(f"importing {CONTESTANTS[name].row}")
                found = self.worker.ask("join", contestant=name)
                self.versions[found["title"]] = found["version"]
                if found["absent"]:
                    self.barred[name] = self.absent[found["title"]] = found["absent"]
        self.worker.limit = TIME_LIMIT

    def ask(self, method: str, /, **question: Any) -> Answer:
        """Return the answer. A `PeerError` says why there is none; a `BrokenError`, that there will be no other."""
        if self.worker is None:
            raise BrokenError("", self.gave_up or "the process on the GPU has ended")
        try:
            found: Answer = self.worker.ask(method, **question)
        except PeerError as error:
            try:
                self.worker.ask("alive")
            except PeerError:
                raise BrokenError(question.get("contestant", ""), str(error)) from error
            raise
        return found

    def _restart(self, contestant: str, problem: str) -> None:
        """Note who was at work, and start again without those who were too often."""
        self.__exit__()
        self.crashes.append(contestant)
        if self.crashes.count(contestant) >= CRASHES:
            self.barred[contestant] = f"left out: it cost the process {CRASHES} times ({problem})"
        if len(self.crashes) > RESTARTS:
            self.gave_up = f"the process on the GPU was lost {len(self.crashes)} times, at last by: {problem}"
            return
        self.progress.status("starting again")
        try:
            self._start()
        except (PeerError, RefusedError) as error:
            self.__exit__()
            self.gave_up = f"after {problem} the GPU could not be used: {error}"

    def _within(self, section: str) -> None:
        if self.budget.left(section) <= 0:
            raise OutOfTimeError

    def ceilings(self) -> Answer:
        """Return what the device can do at best; "failed" says why it cannot be said."""
        self.progress.status("ceilings")
        try:
            return self.ask("ceilings")
        except (PeerError, BrokenError) as error:
            if isinstance(error, BrokenError):
                self._restart("ceilings", str(error))
            return {"failed": str(error)}

    def measure(self, result: Result) -> None:
        """Check everyone on the case, then time it in turns; `result` has it from the first turn on."""
        problem = ""
        try:
            self._within("table")
            while not self.gave_up:
                try:
                    self._round(result)
                    break
                except BrokenError as error:
                    for cell in result.cells:
                        if cell.name == error.contestant:
                            cell.failed = cell.failed or str(error)
                    self._restart(error.contestant, str(error))
                    if not error.contestant:  # while data were made
                        result.skipped = str(error)
                        break
            problem = self.gave_up
        except OutOfTimeError:
            problem = NO_TIME
        if not any(cell.seconds for cell in result.cells):
            result.skipped = result.skipped or problem
        if result.cells:
            for name in self.contestants:
                self._cells(result, name, self.barred.get(name, NO_TIME))
            for cell in result.cells:
                if not (cell.seconds or cell.failed or cell.left):
                    cell.left = self.gave_up or NO_TIME

    def _cells(self, result: Result, name: str, left: str = "") -> list[Cell]:
        """Return the cells of a contestant, new ones if it has none; `left` is the reason why it is left out."""
        row = CONTESTANTS[name].row
        if row not in self.absent and not any(cell.name == name for cell in result.cells):
            result.cells += [Cell("gpu", row, one, name, left=left) for one in result.case.operations]
        return [cell for cell in result.cells if cell.name == name]

    def _round(self, result: Result) -> None:
        """Open the case, prepare everyone, and take turns."""
        self.progress.status(f"{result.case}: random data")
        try:
            result.skipped = self.ask("open", case=result.case, seed=self.seed)["skipped"]
        except PeerError as error:
            result.skipped = str(error)
        if result.skipped:
            return
        for name in self.contestants:
            self._within("table")
            self._prepare(name, self._cells(result, name, self.barred.get(name, "")), result.case)
        self.progress.status(str(result.case))
        cells = [cell for cell in result.cells if not cell.left]
        interleave(cells, self._take, rounds=self.rounds, done=lambda: self._within("table"))

    def _prepare(self, name: str, cells: Sequence[Cell], case: Case) -> None:
        """Check a contestant, warm it up; its cells say what is wrong with it."""
        failed_before = any(cell.failed for cell in cells) and not any(cell.seconds for cell in cells)
        if name in self.barred or failed_before:
            return
        start = time.perf_counter()
        self.progress.status(f"{case}: checking {CONTESTANTS[name].row}")
        with failing(*cells):
            answer = self.ask("check", contestant=name)
            for cell in cells:
                cell.backend, cell.clock = answer["backend"][cell.operation], answer["clock"]
                cell.failed = cell.failed or answer["faults"][cell.operation]
                if not cell.failed:
                    with failing(cell):
                        cell.prepare(self.ask)
        if all(cell.failed for cell in cells):
            self.ask("release", contestant=name)
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start
        if not CONTESTANTS[name].ours and self.spent[name] > PEER_SHARE * SHARES["table"] * self.budget.total:
            self.barred[name] = f"left out: preparing it has taken {self.spent[name]:.0f} s"

    def _take(self, cell: Cell) -> float:
        question: Any = {"contestant": cell.name, "operation": cell.operation, "calls": cell.calls, "hold": cell.hold}
        answer = self.ask("time_on_device", **question)
        if answer["late"]:
            cell.late += 1
            cell.hold *= 1.5
        return float(answer["seconds"])

    def measure_host(self, result: Result) -> None:
        """Take the time of a layer's call for the host."""
        if self.gave_up:
            result.skipped = self.gave_up
            return
        try:
            self._within("host")
            self.ask("close")
            for row in GPU_LAYERS:
                if row != "PyTorch" or ("torch" in self.contestants and "torch" not in self.barred):
                    cells = [Cell("gpu", row, one, row, clock="host") for one in result.case.operations]
                    result.cells += cells
                    with failing(*cells):
                        self.ask("layer", contestant=row, case=result.case)
            interleave(list(result.cells), self._take_host, rounds=self.rounds, done=lambda: self._within("host"))
        except OutOfTimeError:
            result.skipped = "" if any(cell.seconds for cell in result.cells) else NO_TIME
        except PeerError as error:
            result.skipped = str(error)
        except BrokenError as error:
            result.skipped = f"the process on the GPU was lost: {error}"
            self._restart(error.contestant or "layer", str(error))

    def _take_host(self, cell: Cell) -> float:
        answer = self.ask("time_on_host", contestant=cell.name, operation=cell.operation)
        cell.done.append(float(answer["done"]))
        return float(answer["seconds"])

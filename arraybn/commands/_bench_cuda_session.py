"""How ``bench --device cuda`` asks the process that works on the GPU, and goes on when that process is lost.

A wrong address or a kernel that never ends costs the process, but no figure that was taken before: it is started again
without the contestant that was at work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from ._bench_clock import Cell, PeerError, Result, Worker, interleave
from ._bench_contestants import Library
from ._bench_cuda_cases import SHARES, Budget, GpuCase
from ._bench_cuda_contestants import CONTESTANTS, LAYERS
from ._bench_cuda_worker import CUDA
from ._check_target import RefusedError

TIME_LIMIT, START_LIMIT = 60.0, 150.0  # seconds for one question
CRASHES, RESTARTS = 2, 6  # of a contestant, and in all, until no more is tried
PEER_SHARE = 0.25  # of the time of the table, which preparing one of the others may take
NO_TIME = "no time left"
TITLES = {contestant.name: contestant.title for contestant in CONTESTANTS}
OURS = {contestant.name for contestant in CONTESTANTS if contestant.ours}

Answer = dict[str, Any]


class Asked(Protocol):
    """Who answers: a `GpuWorker`."""

    limit: float
    failed: str

    def ask(self, do: str, **question: Any) -> Answer:
        """The answer; a `PeerError` says why there is none."""

    def answer(self) -> Answer:
        """The answer to "start", which is asked by itself."""

    def stop(self) -> None:
        """End it."""


class GpuWorker(Worker):
    """The process of `_bench_cuda_worker`."""

    module = "_bench_cuda_worker"
    environment: ClassVar[dict[str, str]] = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}

    def __init__(self, build: str = CUDA, limit: float = START_LIMIT) -> None:
        super().__init__(Library("gpu", "GPU", (), "cupy", build, 0), limit)


class BrokenError(Exception):
    """The process is lost, or its device is; `contestant` was at work."""

    def __init__(self, contestant: str, text: str) -> None:
        super().__init__(text)
        self.contestant = contestant


class OutOfTimeError(Exception):
    """The section has used its time."""


@dataclass
class GpuCell(Cell):
    """A cell with what was chosen inside, how often the device waited for the host, and why it was left out."""

    name: str = ""  # of the contestant
    backend: str | None = None
    clock: str = "device"
    late: int = 0
    hold: float = 0.0
    left: str = ""
    done: list[float] = field(default_factory=list)  # host time: seconds until the device was done as well


@dataclass
class Settings:
    """Who takes part, how often, and where to say what is going on."""

    contestants: Sequence[str]
    rounds: int
    budget: Budget
    say: Callable[[str], object] = lambda text: None
    done: Callable[[], object] = lambda: None
    seed: int = 0


class Session:
    """The process at work; a context manager, which ends it."""

    def __init__(self, settings: Settings, make: Callable[[], Asked]) -> None:
        self.settings, self.make = settings, make
        self.worker: Asked | None = None
        self.barred: dict[str, str] = {}  # contestant → why it is no longer asked
        self.absent: dict[str, str] = {}  # title → why it never took part
        self.versions: dict[str, str] = {}
        self.device: Answer = {}
        self.gave_up = ""
        self.crashes: list[str] = []  # what was at work
        self._spent: dict[str, float] = {}

    def __enter__(self) -> Session:
        """Start the process; a `RefusedError` says that there is no GPU."""
        self.settings.say("starting")
        try:
            self._start()
        except PeerError as error:
            self._stop()
            raise RefusedError(f"the GPU cannot be used: {error}") from error
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def _stop(self) -> None:
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
        for name in self.settings.contestants:
            if name not in self.barred:
                self.settings.say(f"importing {TITLES[name]}")
                found = self.worker.ask("join", contestants=[name])["contestants"][name]
                self.versions[found["title"]] = found["version"]
                if found["absent"]:
                    self.barred[name] = self.absent[found["title"]] = found["absent"]
        self.worker.limit = TIME_LIMIT

    def ask(self, who: str, do: str, /, **question: Any) -> Answer:
        """The answer. A `PeerError` says why there is none; a `BrokenError`, that there will be no other.

        `who` is the contestant that is asked for it, '' for none.
        """
        if self.worker is None:
            raise BrokenError("", self.gave_up or "the process on the GPU has ended")
        try:
            return self.worker.ask(do, **question)
        except PeerError as error:
            if self.worker.failed or not self._alive():
                raise BrokenError(who, str(error)) from error
            raise

    def _alive(self) -> bool:
        assert self.worker is not None
        try:
            self.worker.ask("alive")
        except PeerError:
            return False
        return True

    def _crashed(self, error: BrokenError) -> None:
        """Note who was at work, and start again without those who were too often."""
        self._stop()
        self.crashes.append(error.contestant)
        if self.crashes.count(error.contestant) >= CRASHES:
            self.barred[error.contestant] = f"left out: it cost the process {CRASHES} times ({error})"
        if len(self.crashes) > RESTARTS:
            self.gave_up = f"the process on the GPU was lost {len(self.crashes)} times, at last by: {error}"
            return
        self.settings.say("starting again")
        try:
            self._start()
        except (PeerError, RefusedError) as problem:
            self._stop()
            self.gave_up = f"after {error} the GPU could not be used: {problem}"

    # ---- Ceilings ----

    def ceilings(self) -> Answer | None:
        """What the device can do at best; None if it would not say."""
        self.settings.say("ceilings")
        try:
            return self.ask("ceilings", "ceilings")
        except PeerError as error:
            return {"failed": str(error)}
        except BrokenError as error:
            self._crashed(error)
            return {"failed": str(error)}

    # ---- The table ----

    def measure(self, result: Result) -> None:
        """Check everyone on the case, then time it in turns; `result` has it from the first turn on."""
        try:
            self._within("table")
            self._measure(result)
        except OutOfTimeError:
            result.skipped = "" if any(cell.seconds for cell in result.cells) else NO_TIME
        if result.cells:
            self._left(result)

    def _left(self, result: Result) -> None:
        """Say of everyone without a figure why there is none."""
        for name in self.settings.contestants:
            self._leave_out(name, result, self.barred.get(name, NO_TIME))
        for cell in result.cells:
            if isinstance(cell, GpuCell) and not (cell.seconds or cell.failed or cell.left):
                cell.left = self.gave_up or NO_TIME

    def _within(self, section: str) -> None:
        if self.settings.budget.left(section) <= 0:
            raise OutOfTimeError

    def _measure(self, result: Result) -> None:
        while True:
            if self.gave_up:
                result.skipped = "" if any(cell.seconds for cell in result.cells) else self.gave_up
                return
            try:
                self._round(result)
                return
            except BrokenError as error:
                for cell in result.cells:
                    if isinstance(cell, GpuCell) and cell.name == error.contestant and not cell.failed:
                        cell.failed = str(error)
                self._crashed(error)
                if not error.contestant:  # while data were made
                    result.skipped = str(error)
                    return

    def _round(self, result: Result) -> None:
        """Open the case, prepare everyone, and take turns."""
        self.settings.say(f"{result.case}: random data")
        try:
            result.skipped = self.ask("", "open", case=result.case.as_json(), seed=self.settings.seed)["skipped"]
        except PeerError as error:
            result.skipped = str(error)
        if result.skipped:
            return
        for name in self.settings.contestants:
            self._within("table")
            self._prepare(name, result)
        self.settings.say(str(result.case))
        cells = [cell for cell in result.cells if isinstance(cell, GpuCell) and not cell.left]
        interleave(cells, self._take, rounds=self.settings.rounds, done=lambda: self._within("table"))

    def _prepare(self, name: str, result: Result) -> None:
        """Check a contestant, warm it up; its cells say what is wrong with it."""
        if name in self.barred:
            self._leave_out(name, result, self.barred[name])
            return
        cells = [cell for cell in result.cells if isinstance(cell, GpuCell) and cell.name == name]
        if not cells:
            cells = [GpuCell("gpu", TITLES[name], what, name=name) for what in result.case.whats]
            result.cells += cells
        if any(cell.failed for cell in cells) and not any(cell.seconds for cell in cells):
            return
        start = time.perf_counter()
        try:
            self.settings.say(f"{result.case}: checking {TITLES[name]}")
            answer = self.ask(name, "check", contestant=name)
            self._prepare_cells(name, cells, answer)
        except PeerError as error:
            for cell in cells:
                cell.failed = cell.failed or str(error)
        if all(cell.failed for cell in cells):
            self.ask(name, "release", contestant=name)
        self._spend(name, time.perf_counter() - start)

    def _prepare_cells(self, name: str, cells: Sequence[GpuCell], answer: Answer) -> None:
        for cell in cells:
            cell.backend = answer["backend"][cell.what]
            cell.clock = answer["clock"]
            cell.failed = cell.failed or answer["faults"][cell.what]
            if not cell.failed:
                try:
                    found = self.ask(name, "prepare", contestant=name, what=cell.what)
                except PeerError as error:
                    cell.failed = str(error)
                else:
                    cell.calls, cell.hold = found["calls"], found["hold"]

    def _leave_out(self, name: str, result: Result, left: str) -> None:
        """Cells that say why, but for a contestant that has some, or was never here."""
        if TITLES[name] not in self.absent and not any(getattr(cell, "name", "") == name for cell in result.cells):
            result.cells += [GpuCell("gpu", TITLES[name], what, name=name, left=left) for what in result.case.whats]

    def _spend(self, name: str, seconds: float) -> None:
        self._spent[name] = self._spent.get(name, 0.0) + seconds
        share = PEER_SHARE * SHARES["table"] * self.settings.budget.total
        if name not in OURS and self._spent[name] > share:
            self.barred[name] = f"left out: preparing it has taken {self._spent[name]:.0f} s"

    def _take(self, cell: Cell) -> float:
        assert isinstance(cell, GpuCell)
        answer = self.ask(cell.name, "time", contestant=cell.name, what=cell.what, calls=cell.calls, hold=cell.hold)
        if answer["late"]:
            cell.late += 1
            cell.hold *= 1.5
        return float(answer["seconds"])

    # ---- Host time ----

    def measure_host(self, result: Result) -> None:
        """The time of a layer's call for the host."""
        assert isinstance(result.case, GpuCase)
        if self.gave_up:
            result.skipped = self.gave_up
            return
        try:
            self._within("host")
            self.ask("", "close")
            for row in LAYERS:
                self._layer(row, result)
            cells = list(result.cells)
            interleave(cells, self._take_host, rounds=self.settings.rounds, done=lambda: self._within("host"))
        except OutOfTimeError:
            result.skipped = "" if any(cell.seconds for cell in result.cells) else NO_TIME
        except PeerError as error:
            result.skipped = str(error)
        except BrokenError as error:
            result.skipped = f"the process on the GPU was lost: {error}"
            self._crashed(BrokenError(error.contestant or "layer", str(error)))

    def _layer(self, row: str, result: Result) -> None:
        if row == "PyTorch" and ("torch" not in self.settings.contestants or "torch" in self.barred):
            return
        cells = [GpuCell("gpu", row, what, name=row, clock="host") for what in result.case.whats]
        result.cells += cells
        try:
            self.ask(row, "layer", row=row, case=result.case.as_json())
        except PeerError as error:
            for cell in cells:
                cell.failed = str(error)

    def _take_host(self, cell: Cell) -> float:
        assert isinstance(cell, GpuCell)
        answer = self.ask(cell.name, "host", row=cell.row, what=cell.what)
        cell.done.append(float(answer["done"]))
        return float(answer["seconds"])

"""The bench on the CPU: each library in a process of its own, because the threads of some spin and disturb others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from .cases import Case
from .contestants import Library
from .contestants.registry import WORKING
from .machine import available_memory
from .output import Progress
from .process import TIME_LIMIT, PeerError, Worker
from .timing import Cell, Result, failing, interleave
from .worker import Work

BUDGET = 1.0  # seconds; a cell that has spent them has turns enough
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}


class Session:
    """The libraries at work; a context manager, which ends their processes."""

    def __init__(
        self,
        libraries: Sequence[Library],
        rounds: int,
        *,
        budget: float | None = BUDGET,
        limit: float = TIME_LIMIT,
        progress: Progress | None = None,
    ) -> None:
        self.libraries, self.rounds, self.budget, self.limit = libraries, rounds, budget, limit
        self.progress = progress or Progress()
        self.faults: dict[tuple[str, str], str] = {}  # row and small case → what is wrong
        self.workers: dict[str, Worker] = {}
        self._checked: set[Case] = set()

    def __enter__(self) -> Session:
        self.progress.status("starting")
        try:
            for library in self.libraries:
                work = partial(Work, library.contestants, library.needs)
                self.workers[library.name] = Worker(work, ENVIRONMENT, self.limit)
            for worker in self.workers.values():
                try:
                    worker.answer()
                except PeerError as error:
                    worker.failed = worker.failed or f"cannot be used: {error}"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers.values():
            worker.stop()

    def measure(self, result: Result) -> Result:
        """Check everyone on a small case, then time the case; `result` has the samples from the first turn on."""
        case = result.case
        needed, free = memory_needed(case, self.libraries), available_memory()
        if free is not None and needed > free:
            result.skipped = f"skipped: needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are available"
            for _ in range(self.rounds):
                self.progress.step()
            return result
        self.check(case.checked)
        result.cells += [cell for library in self.libraries for cell in self._prepared(library, case)]
        self.progress.status(str(case))
        interleave(result.cells, self._take, rounds=self.rounds, budget=self.budget, done=self.progress.step)
        return result

    def _take(self, cell: Cell) -> float:
        question = {"contestant": cell.name, "operation": cell.operation, "calls": cell.calls, "warm": cell.warm}
        return float(self.workers[cell.library].ask("time", **question))

    def check(self, case: Case) -> None:
        """Note what is wrong with whom on a small case, once."""
        if case in self._checked or not case.operations:
            return
        self._checked.add(case)
        for library in self.libraries:
            self.progress.status(f"checking {library.title}")
            worker = self.workers[library.name]
            for one in library.contestants:
                try:
                    worker.ask("open", case=case)
                    found = next(filter(None, worker.ask("check", contestant=one.name)["faults"].values()), "")
                except PeerError as error:
                    found = str(error)
                if found:
                    self.faults[one.row, str(case)] = found

    def _prepared(self, library: Library, case: Case) -> list[Cell]:
        """Return the cells of a library; those that cannot be timed say why."""
        self.progress.status(f"{case}: preparing {library.title}")
        cells = [
            Cell(library.name, one.row, operation, one.name, failed=self.faults.get((one.row, str(case.checked)), ""))
            for one in library.contestants
            for operation in ("copy", *case.operations)
            if operation in one.operations
        ]
        with failing(*cells):
            self.workers[library.name].ask("open", case=case)
        for cell in cells:
            if not cell.failed:
                with failing(cell):
                    cell.prepare(self.workers[library.name].ask)
        return cells


def memory_needed(case: Case, libraries: Sequence[Library]) -> int:
    """Return about how many bytes the case takes: all that libraries hold, and the temporaries of the greediest."""
    return case.nbytes * (sum(library.held + case.alive for library in libraries) + WORKING)

"""How ``python -m arraybn bench`` times: each library in a process of its own, one turn after the other."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ._bench_cases import Case
from ._bench_check import Truth, fault, truths
from ._bench_contestants import WORKING, Library
from ._bench_machine import available_memory

TIME_LIMIT = 120.0  # seconds for one question
BUDGET = 1.0  # seconds; who has spent so much on a row has turns enough, if there were at least FEWEST
FEWEST = 3
COPYTO = "numpy.copyto"


class PeerError(Exception):
    """A library gave no answer; the text says why."""


class Worker:
    """The process of a library, as `_bench_worker` runs it."""

    module = "_bench_worker"
    environment: ClassVar[dict[str, str]] = {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }

    def __init__(self, library: Library, limit: float = TIME_LIMIT) -> None:
        self.library, self.limit, self.failed = library, limit, ""
        home = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", f"{__package__}.{self.module}", library.build, *library.needs]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, `stop` closes it
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", **self.environment},
            encoding="utf-8",
            start_new_session=os.name == "posix",  # Ctrl-C is for us
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._send({"do": "start"})

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _send(self, question: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError:  # it has ended; `answer` says how
            return

    def ask(self, do: str, **question: Any) -> dict[str, Any]:
        """The answer; a `PeerError` says that there is none, and `failed` if there will be no other."""
        if self.failed:
            raise PeerError(self.failed)
        self._send({"do": do, **question})
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The answer to what was sent."""
        try:
            line = self._answers.get(timeout=self.limit)
        except queue.Empty:
            self._process.kill()
            self.failed = f"no answer within {self.limit:g} s"
            raise PeerError(self.failed) from None
        if not line:
            self.failed = self._ending(self._process.wait())
            raise PeerError(self.failed)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _ending(self, status: int) -> str:
        """How the process came to its end."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        if status < 0:
            return f"ended by signal {-status}"
        return lines[-1] if status and lines else f"ended early, exit status {status}"

    def stop(self) -> None:
        """End the process: by the end of its questions if it hears of it, otherwise whatever it is doing."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(0 if self.failed else 5.0)
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            try:
                assert file is not None
                file.close()
            except OSError:  # what was not yet sent has no reader
                continue


# ---- Cells: a row of a block, and what it does -----------------------------------------------------------------------


@dataclass
class Cell:
    """The samples of one row and one thing that it does, in seconds; or why there are none."""

    library: str
    row: str
    what: str
    calls: int = 1  # in a sample
    warm: int = 0  # before it
    seconds: list[float] = field(default_factory=list)
    failed: str = ""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The first quartile, the median and the third."""
        first, median, third = np.quantile(self.seconds, (0.25, 0.5, 0.75)).tolist()
        return first, median, third

    @property
    def median(self) -> float | None:
        """None if there are no samples."""
        return self.quartiles[1] if self.seconds else None


@dataclass
class Result:
    """What came of a case; `skipped` says why nothing."""

    case: Case
    cells: list[Cell] = field(default_factory=list)
    skipped: str = ""

    def cell(self, row: str, what: str) -> Cell | None:
        """The one of that name."""
        return next((cell for cell in self.cells if (cell.row, cell.what) == (row, what)), None)

    def median(self, row: str, what: str) -> float | None:
        """Of that cell, in seconds; None where it has no samples or is not there."""
        cell = self.cell(row, what)
        return None if cell is None else cell.median


def interleave(
    cells: Sequence[Cell],
    take: Callable[[Cell], float],
    *,
    rounds: int,
    budget: float | None = None,
    done: Callable[[], object] = lambda: None,
) -> None:
    """Give each cell a turn, and all of them the next only then; each round begins one cell further on.

    A cell whose turn fails gets no more. With a `budget` in seconds, one that has used it up has turns enough.
    `done` is called after every round.
    """
    for index in range(rounds):
        first = index % len(cells) if cells else 0
        for cell in (*cells[first:], *cells[:first]):
            used = sum(cell.seconds) * (cell.calls + cell.warm)
            enough = budget is not None and len(cell.seconds) >= FEWEST and used > budget
            if not (cell.failed or enough):
                try:
                    cell.seconds.append(take(cell))
                except PeerError as error:
                    cell.failed = str(error)
        done()


# ---- The session -----------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """How long and how often."""

    rounds: int
    budget: float | None = BUDGET
    limit: float = TIME_LIMIT
    say: Callable[[str], object] = lambda text: None  # what is going on
    done: Callable[[], object] = lambda: None  # a round is over


class Session:
    """The libraries at work; a context manager, which ends their processes."""

    def __init__(self, libraries: Sequence[Library], settings: Settings, results: list[Result] | None = None) -> None:
        self.libraries, self.settings = libraries, settings
        self.results = [] if results is None else results
        self.faults: dict[tuple[str, str], str] = {}  # row and small case → what is wrong
        self.workers: dict[str, Worker] = {}
        self._checked: set[Case] = set()

    def __enter__(self) -> Session:
        """Start all of them at once."""
        self.settings.say("starting")
        try:
            for library in self.libraries:
                self.workers[library.name] = Worker(library, self.settings.limit)
            for worker in self.workers.values():
                self._started(worker)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers.values():
            worker.stop()

    @staticmethod
    def _started(worker: Worker) -> None:
        try:
            worker.answer()
        except PeerError as error:
            worker.failed = worker.failed or f"cannot be used: {error}"

    def measure(self, case: Case) -> Result:
        """Check everyone on a small case, then time the case; `results` has it from the first turn on."""
        result = Result(case)
        self.results.append(result)
        needed = memory_needed(case, self.libraries)
        free = available_memory()
        if free is not None and needed > free:
            result.skipped = f"skipped: needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are available"
            for _ in range(self.settings.rounds):
                self.settings.done()
            return result
        self._check(case.checked)
        result.cells += [cell for library in self.libraries for cell in self._prepared(library, case)]
        self.settings.say(str(case))
        interleave(
            result.cells, self._take, rounds=self.settings.rounds, budget=self.settings.budget, done=self.settings.done
        )
        return result

    def _take(self, cell: Cell) -> float:
        answer = self.workers[cell.library].ask("time", row=cell.row, what=cell.what, calls=cell.calls, warm=cell.warm)
        return float(answer["seconds"])

    def _check(self, case: Case) -> None:
        if case in self._checked:
            return
        self._checked.add(case)
        truth = truths(case)
        for library in self.libraries:
            self.settings.say(f"checking {library.title}")
            self._check_library(library, case, truth)

    def _check_library(self, library: Library, case: Case, truth: Truth) -> None:
        try:
            rows = self.workers[library.name].ask("check", case=case.as_json())["rows"]
        except PeerError as error:
            self.faults[library.title, str(case)] = str(error)
            return
        for row, results in rows.items():
            text = results if isinstance(results, str) else fault(results, truth, case, ours=library.ours)
            if text:
                self.faults[row, str(case)] = text

    def _prepared(self, library: Library, case: Case) -> list[Cell]:
        """The cells of a library; those that cannot be timed say why."""
        self.settings.say(f"{case}: preparing {library.title}")
        key = str(case.checked)
        try:
            if text := self.faults.get((library.title, key)):
                raise PeerError(text)
            rows = self.workers[library.name].ask("prepare", case=case.as_json())["rows"]
        except PeerError as error:
            return [Cell(library.name, library.title, what, failed=str(error)) for what in case.whats]
        cells = []
        for row, found in rows.items():
            text = found if isinstance(found, str) else self.faults.get((row, key), "")
            if text:
                cells += [Cell(library.name, row, what, failed=text) for what in case.whats]
            else:
                cells += [_cell(library.name, row, what, often) for what, often in found.items()]
        return cells


def _cell(library: str, row: str, what: str, often: Any) -> Cell:
    if isinstance(often, str):
        return Cell(library, row, what, failed=often)
    return Cell(library, row, what, *often)


def memory_needed(case: Case, libraries: Sequence[Library]) -> int:
    """About how many bytes the case takes: what all libraries hold, and what the greediest has for a while."""
    return case.nbytes * (sum(library.held for library in libraries) + WORKING)

"""``python -m arraybn bench --device cuda``: every batch norm installed here, on this GPU.

Ceilings first, so that floors are of this machine; then each contestant is checked and timed; then the time that calls
take the host; then two MPI ranks. In the JSON, times are in seconds, and what cannot be said is null.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from . import _bench_cuda_report as report
from . import _bench_machine as machine
from . import info
from ._bench_clock import Result
from ._bench_cuda_cases import QUICK_TOTAL, SHARES, TOTAL, Budget, GpuCase, choose, choose_host
from ._bench_cuda_contestants import CONTESTANTS, OURS
from ._bench_cuda_ranks import SHAPES
from ._bench_cuda_session import OURS as OUR_NAMES
from ._bench_cuda_session import Asked, GpuCell, GpuWorker, Session, Settings
from ._bench_cuda_worker import CUDA
from ._bench_report import carry_out, progress_bar
from ._bench_sync import _job, under_mpirun
from ._check_target import RefusedError

ROUNDS, QUICK_ROUNDS = 25, 9
RANKS, RANK_TURNS, LEAST = 2, 9, 15.0  # ranks need so many seconds to start at all
PEERS = {"reference": "cupy", "torch": "torch", "jax": "jax"}  # as --peers has them, and what each needs
NOT_HERE = ("numpy", "tensorflow")


@dataclass
class Plan:
    """Who takes part, and in what."""

    contestants: list[str]
    cases: list[GpuCase]
    host: list[GpuCase]
    ranks: list[tuple[int, ...]]  # shapes
    missing: list[str]


def plan(arguments: argparse.Namespace) -> Plan:
    """What is to be done; a `RefusedError` says why it cannot be."""
    if arguments.subject is not None:
        raise RefusedError("--device cuda: expected no sync, because two MPI ranks are a part of it")
    for option in ("growth", "ladder"):
        if getattr(arguments, option):
            raise RefusedError(f"--{option}: expected --device cpu, of which it is told")
    if importlib.util.find_spec("cupy") is None:
        raise RefusedError(
            '--device cuda needs cupy:  pip install "arraybn[cuda13]", or cuda12 for a driver of CUDA 12'
        )
    libraries, missing = peers(arguments.peers, arguments.quick)
    contestants = [one.name for one in CONTESTANTS if one.library in (OURS, *libraries)]
    options = {"shapes": arguments.shapes, "whats": arguments.what}
    cases = choose(**options, layouts=arguments.layout, dtypes=arguments.dtype, quick=arguments.quick)
    shapes = [shape for shape in arguments.shapes or SHAPES if len(shape) in (2, 4)] if arguments.what is None else []
    return Plan(contestants, cases, choose_host(arguments.what, arguments.shapes), shapes, missing)


def peers(names: Sequence[str] | None, quick: bool) -> tuple[list[str], list[str]]:
    """The libraries beside arraybn that take part, and those that are not installed."""
    missing = [name for name, package in PEERS.items() if importlib.util.find_spec(package) is None]
    if names is None:
        return [name for name in PEERS if name not in missing and not (quick and name != "torch")], missing
    if "none" in names:
        if set(names) != {"none"}:
            raise RefusedError(f"--peers: expected none alone, or names without it; got {' '.join(names)}")
        return [], []
    for name in names:
        if name in NOT_HERE:
            raise RefusedError(f"--peers: expected some of {', '.join(PEERS)}, or none, on a GPU; got {name}")
        if name in missing:
            where = f"{sys.executable} -m pip install {PEERS[name]}"
            raise RefusedError(f"--peers: expected libraries that are installed; {name} is not:  {where}")
    return list(names), []


def run(arguments: argparse.Namespace, command: str) -> int:
    """Measure, print, write what was asked for; 1 if arraybn is wrong, 130 after Ctrl-C."""
    return carry_out(GpuBench(arguments, plan(arguments), command))


class GpuBench:
    """A run of the command: what is found, and what has been said."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        plan: Plan,
        command: str,
        make: Callable[[], Asked] = GpuWorker,
        build: str = CUDA,
    ) -> None:
        self.arguments, self.plan, self.command, self.make, self.build = arguments, plan, command, make, build
        self.rounds = arguments.repeats or (QUICK_ROUNDS if arguments.quick else ROUNDS)
        self.budget = Budget(QUICK_TOTAL if arguments.quick else TOTAL)
        self.interrupted, self.seed = False, secrets.randbits(32)
        self.ceilings: dict[str, Any] | None = None
        self.device: dict[str, Any] = {}
        self.table: list[Result] = []
        self.host: list[Result] = []
        self.ranks: dict[str, Any] | None = None
        self.session: Session | None = None
        self._bar: Any = None

    @property
    def speed(self) -> float | None:
        """Bytes a second of a copy."""
        return report.rate(self.ceilings)

    def say(self, text: str) -> None:
        """Print it, above the progress bar if there is one; nothing if stdout is for the JSON."""
        if self.arguments.json != "-":
            (print if self._bar is None else self._bar.write)(text, file=sys.stdout)
            sys.stdout.flush()

    def wrong(self) -> bool:
        """Whether anything of arraybn has failed."""
        cells = [cell for result in (*self.table, *self.host) for cell in result.cells if isinstance(cell, GpuCell)]
        ours = any(cell.failed for cell in cells if cell.name in OUR_NAMES or cell.name == OURS)
        return ours or bool((self.ranks or {}).get("wrong"))

    # ---- The work ----

    def measure(self) -> None:
        """The sections, one after another."""
        with progress_bar(len(self.plan.cases) + len(self.plan.host) + 1, "case") as bar:
            self._bar = bar
            try:
                self._measure()
                if self.plan.ranks:
                    self._status("two MPI ranks")
                    self.ranks = self._measure_ranks()
                    self.say(report.ranks_table(self.ranks))
            finally:
                self._bar = None

    def _measure(self) -> None:
        settings = Settings(self.plan.contestants, self.rounds, self.budget, self._status, seed=self.seed)
        self.session = Session(settings, self.make)
        with self.session as session:
            self.device = session.device
            self.ceilings = session.ceilings()
            self.say(report.head(self.device, self.versions(), self.ceilings or {}, self.command))
            for title, text in session.absent.items():
                self.say(f"{title}: {text}")
            for case in self.plan.cases:
                self.table.append(Result(case))
                try:
                    session.measure(self.table[-1])
                finally:
                    self._show(self.table[-1])
                self._done()
            for case in self.plan.host:
                self.host.append(Result(case))
                session.measure_host(self.host[-1])
                self._done()
        if self.host:
            self.say(report.host_table(self.host))

    def _show(self, result: Result) -> None:
        if result.skipped or any(isinstance(c, GpuCell) and (c.seconds or c.failed or c.left) for c in result.cells):
            self.say(report.block(result, self.speed))

    def _measure_ranks(self) -> dict[str, Any]:
        """What two ranks have found; why they have not, under "skipped"."""
        left, launcher = self.budget.left("ranks"), info.launcher()
        if under_mpirun():
            return {"skipped": "this is a rank already; run the command without mpirun"}
        if importlib.util.find_spec("mpi4py") is None or launcher is None:
            return {"skipped": 'mpirun or mpi4py is missing:  pip install "arraybn[mpi]"'}
        if left < LEAST:
            return {"skipped": f"{max(left, 0):.0f} s of the time are left, they need {LEAST:g}"}
        words = (self.build, str(left / 2), *(",".join(map(str, shape)) for shape in self.plan.ranks))
        try:
            return _job(launcher, RANKS, RANK_TURNS, *words, module="_bench_cuda_ranks", limit=left)
        except RefusedError as problem:
            return {"skipped": str(problem)}

    def _status(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description(text)

    def _done(self) -> None:
        if self._bar is not None:
            self._bar.update()

    # ---- What is said of it ----

    def versions(self) -> dict[str, str]:
        """Of arraybn and those who take part."""
        found = {"arraybn": __version__, "CuPy": machine.version("cupy")}
        others = self.session.versions if self.session else {}
        return found | {title: others[title] for title in ("PyTorch", "JAX") if title in others}

    def finish(self) -> None:
        """Print what follows, write the files."""
        timed = [result for result in self.table if result.cells]
        if timed:
            self.say(report.notes(list(dict.fromkeys(result.case.dtype for result in timed))))
            if text := report.summary(timed, self.speed):
                self.say(text)
        if late := self.unmeasured():
            self.say("\nNot measured, because the time was used up:\n" + "\n".join(f"  {line}" for line in late))
        for name in self.plan.missing:
            self.say(f"\n{name}: not installed, left out:  pip install {PEERS[name]}")
        if self.arguments.json is not None:
            text = json.dumps(self.as_json(), indent=1, allow_nan=False)
            if self.arguments.json == "-":
                print(text)
            else:
                Path(self.arguments.json).write_text(f"{text}\n", encoding="utf-8")
        if self.arguments.plot is not None:
            self._draw(Path(self.arguments.plot))

    def unmeasured(self) -> list[str]:
        """The cases that were never begun, or not with everyone."""
        planned = [("table", case) for case in self.plan.cases] + [("host", case) for case in self.plan.host]
        begun = {("table", one.case) for one in self.table} | {("host", one.case) for one in self.host}
        lines = [f"{section}: {case}" for section, case in planned if (section, case) not in begun]
        for section, results in (("table", self.table), ("host", self.host)):
            for result in results:
                rows = {cell.row for cell in result.cells if isinstance(cell, GpuCell) and cell.left}
                if result.skipped or rows:
                    lines.append(f"{section}: {result.case}: {result.skipped or ', '.join(sorted(rows))}")
        return lines

    def _draw(self, path: Path) -> None:
        from ._bench_cuda_figure import draw

        stream = sys.stderr if self.arguments.json == "-" else sys.stdout
        if draw(self.table, self.device.get("name", ""), self.speed, path):
            print(f"\n{path}: the table", file=stream)
        else:
            print("bench: no picture: nothing was measured", file=sys.stderr)

    def as_json(self) -> dict[str, Any]:
        """What --json writes."""
        session = self.session
        return {
            "arraybn": __version__,
            "python": platform.python_version(),
            "machine": {"processor": machine.processor(), "system": f"{platform.system()} {platform.machine()}"},
            "device": self.device or None,
            "versions": self.versions(),
            "absent": {} if session is None else session.absent,
            "command": self.command,
            "seed": self.seed,
            "interrupted": self.interrupted,
            "seconds": round(self.budget.used, 1),
            "budget": {"seconds": self.budget.total, "shares": SHARES},
            "ceilings": self.ceilings,
            "table": [report.as_json(result, self.speed) for result in self.table],
            "verdict": report.verdict(self.table) if self.table else None,
            "host": [report.host_json(result) for result in self.host],
            "ranks": self.ranks,
            "lost": [] if session is None else session.crashes,
            "not_measured": self.unmeasured(),
        }

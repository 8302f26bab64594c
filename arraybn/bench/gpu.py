"""``python -m arraybn bench --device cuda``: every batch norm installed here, on this GPU.

Ceilings first, so that floors are of this machine; then each contestant is checked and timed; then the time that calls
take the host; then two MPI ranks. In the JSON, times are in seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._install import requirement
from .._version import __version__
from . import jobs, machine, report
from .cases import Case, choose_gpu, choose_host
from .contestants.registry import GPU_CONTESTANTS, GPU_PEERS, ON_REQUEST
from .gpu_ranks import SHAPES
from .gpu_session import QUICK_TOTAL, SHARES, TOTAL, Budget, GpuSession, gpu_worker
from .output import RefusedError, Run, check_peers
from .process import Worker
from .timing import Result

ROUNDS, QUICK_ROUNDS = 25, 9
RANKS, RANK_TURNS, LEAST = 2, 9, 15.0  # LEAST: seconds that the ranks need to start
CUDA = "arraybn.bench.device:CudaDevice"


@dataclass
class Plan:
    """The contestants, and the cases of each section."""

    contestants: list[str]
    cases: list[Case]
    host: list[Case]
    ranks: list[tuple[int, ...]]  # shapes
    missing: list[str]


def plan(arguments: argparse.Namespace) -> Plan:
    """Return what is to be done; a `RefusedError` says why it cannot be."""
    if arguments.subject is not None:
        raise RefusedError("--device cuda: expected no sync, because two MPI ranks are a part of it")
    for option in ("growth", "ladder", "set"):
        if getattr(arguments, option):
            raise RefusedError(f"--{option}: expected --device cpu, of which it is told")
    if importlib.util.find_spec("cupy") is None:
        how = f"pip install {requirement('cuda13')}, or cuda12 for a driver of CUDA 12"
        raise RefusedError(f"--device cuda needs cupy:  {how}")
    libraries, missing = peers(arguments.peers, arguments.quick)
    contestants = [one.name for one in GPU_CONTESTANTS if one.library in ("arraybn", *libraries)]
    options = {"shapes": arguments.shapes, "operations": arguments.what}
    cases = choose_gpu(**options, layouts=arguments.layout, dtypes=arguments.dtype, quick=arguments.quick)
    shapes = [shape for shape in arguments.shapes or SHAPES if len(shape) in (2, 4)] if arguments.what is None else []
    return Plan(contestants, cases, choose_host(arguments.what, arguments.shapes), shapes, missing)


def peers(names: Sequence[str] | None, quick: bool) -> tuple[list[str], list[str]]:
    """Return the libraries beside arraybn that take part, and those that are not installed."""
    missing = [name for name, package in GPU_PEERS.items() if importlib.util.find_spec(package) is None]
    if names is None:
        left_out = set(GPU_PEERS) - {"torch"} if quick else set(ON_REQUEST)
        return [name for name in GPU_PEERS if name not in (*missing, *left_out)], missing
    for name in names:
        if name not in (*GPU_PEERS, "none"):
            raise RefusedError(f"--peers: expected some of {', '.join(GPU_PEERS)}, or none, on a GPU; got {name}")
    check_peers(names, {name: GPU_PEERS[name] for name in missing})
    return [name for name in names if name != "none"], []


class GpuBench(Run):
    """A run on a GPU; `device` is that of the ranks."""

    def __init__(
        self, arguments: argparse.Namespace, make: Callable[[], Worker] = gpu_worker, device: str = CUDA
    ) -> None:
        super().__init__(arguments)
        self.plan, self.rank_device = plan(arguments), device
        rounds = arguments.repeats or (QUICK_ROUNDS if arguments.quick else ROUNDS)
        budget = Budget(QUICK_TOTAL if arguments.quick else TOTAL)
        self.session = GpuSession(self.plan.contestants, rounds, budget, make, self, secrets.randbits(32))
        self.ceilings: dict[str, Any] | None = None
        self.table: list[Result] = []
        self.host: list[Result] = []
        self.ranks: dict[str, Any] | None = None

    @property
    def speed(self) -> float | None:
        return report.rate(self.ceilings)

    def wrong(self) -> bool:
        ours = {"arraybn", *(one.name for one in GPU_CONTESTANTS if one.ours)}
        cells = [cell for result in (*self.table, *self.host) for cell in result.cells if cell.name in ours]
        return any(cell.failed for cell in cells) or bool((self.ranks or {}).get("wrong"))

    def measure(self) -> None:
        with self.progress(len(self.plan.cases) + len(self.plan.host) + 1, "case"):
            with self.session as session:
                self._measure_cases(session)
            if self.host:
                self.say(report.host_table(self.host))
            if self.plan.ranks:
                self.status("two MPI ranks")
                self.ranks = self.measure_ranks()
                self.say(report.ranks_table(self.ranks))

    def _measure_cases(self, session: GpuSession) -> None:
        self.ceilings = session.ceilings()
        self.say(report.gpu_head(session.device, self.versions(), self.ceilings, self.arguments.command_line))
        for title, text in session.absent.items():
            self.say(f"{title}: {text}")
        for case in self.plan.cases:
            self.table.append(Result(case))
            try:
                session.measure(self.table[-1])
            finally:
                if self.table[-1].has_news:
                    self.say(report.gpu_block(self.table[-1], self.speed))
            self.step()
        for case in self.plan.host:
            self.host.append(Result(case))
            session.measure_host(self.host[-1])
            self.step()

    def measure_ranks(self) -> dict[str, Any]:
        """Return what two ranks have found, or under "skipped" why they have not."""
        left, launcher = self.session.budget.left("ranks"), jobs.launcher()
        if jobs.under_mpirun():
            return {"skipped": "this is a rank already; run the command without mpirun"}
        if importlib.util.find_spec("mpi4py") is None or launcher is None:
            return {"skipped": f"mpirun or mpi4py is missing:  pip install {requirement('mpi')}"}
        if left < LEAST:
            return {"skipped": f"{max(left, 0):.0f} s of the time are left, they need {LEAST:g}"}
        words = (self.rank_device, str(left / 2), *(",".join(map(str, shape)) for shape in self.plan.ranks))
        try:
            return jobs.start(launcher, RANKS, "arraybn.bench.gpu_ranks", str(RANK_TURNS), *words, limit=left)
        except RefusedError as problem:
            return {"skipped": str(problem)}

    def versions(self) -> dict[str, str]:
        found = {"arraybn": __version__, "CuPy": machine.version("cupy")}
        return found | {name: text for name, text in self.session.versions.items() if name in ("PyTorch", "JAX")}

    def report(self) -> None:
        timed = [result for result in self.table if result.cells]
        if timed:
            self.say(report.gpu_notes(list(dict.fromkeys(result.case.dtype for result in timed))))
            if text := report.summary(timed, self.speed):
                self.say(text)
        if late := self.unmeasured():
            self.say("\nNot measured, because the time was used up:\n" + "\n".join(f"  {line}" for line in late))
        for name in self.plan.missing:
            self.say(f"\n{name}: not installed, left out:  pip install {GPU_PEERS[name]}")

    def unmeasured(self) -> list[str]:
        """Return the cases that were never begun, or not with everyone."""
        sections = ("table", self.plan.cases, self.table), ("host", self.plan.host, self.host)
        lines = [f"{name}: {case}" for name, cases, results in sections for case in cases[len(results) :]]
        for name, _, results in sections:
            for result in results:
                rows = {cell.row for cell in result.cells if cell.left}
                if result.skipped or rows:
                    lines.append(f"{name}: {result.case}: {result.skipped or ', '.join(sorted(rows))}")
        return lines

    def draw(self, path: Path) -> None:
        from .figure import draw_gpu

        if draw_gpu(self.table, self.session.device.get("name", ""), self.speed, path):
            print(f"\n{path}: the table", file=self.stream)
        else:
            print("bench: no picture: nothing was measured", file=sys.stderr)

    def as_json(self) -> dict[str, Any]:
        session = self.session
        return {
            "arraybn": __version__,
            "python": platform.python_version(),
            "machine": {"processor": machine.processor(), "system": f"{platform.system()} {platform.machine()}"},
            "device": session.device or None,
            "versions": self.versions(),
            "absent": session.absent,
            "command": self.arguments.command_line,
            "seed": session.seed,
            "interrupted": self.interrupted,
            "seconds": round(session.budget.used, 1),
            "budget": {"seconds": session.budget.total, "shares": SHARES},
            "ceilings": self.ceilings,
            "table": [report.as_json(result, report.gpu_figures, self.speed) for result in self.table],
            "verdict": report.verdict(self.table) if self.table else None,
            "host": [report.as_json(result, report.host_figures) for result in self.host],
            "ranks": self.ranks,
            "lost": session.crashes,
            "not_measured": self.unmeasured(),
        }

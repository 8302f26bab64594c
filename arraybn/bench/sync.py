"""``python -m arraybn bench sync``: what a synchronized call costs over MPI ranks, and an all-gather scheme beside it.

Under ``mpirun -n P`` it measures on those P ranks; otherwise it starts mpirun itself, for each of RANKS.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._install import requirement
from .._version import __version__
from . import jobs, machine
from .output import RefusedError, Run
from .sync_ranks import BACKWARD, BARE, EXACT, FORWARD, GATHER, LAYER, OURS, POLLED, ROWS, STEP, fastest, measure

RANKS = (1, 2, 4, 8)
TURNS, QUICK_TURNS = 9, 3
ALONE = ("shapes", "layout", "dtype", "what", "peers", "growth", "ladder", "set")  # options that are not for this
MODULE = "arraybn.bench.sync_ranks"


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; return 130 after Ctrl-C."""
    for option in ALONE:
        if getattr(arguments, option) not in (None, False):
            raise RefusedError(f"--{option}: expected no such option with sync, which times the exchange alone")
    if importlib.util.find_spec("mpi4py") is None:
        raise RefusedError(f"sync needs mpi4py:  {sys.executable} -m pip install {requirement('mpi')}")
    bench = SyncBench(arguments)
    if not jobs.under_mpirun():
        return bench.carry_out()
    from mpi4py import MPI

    bench.jobs.append(measure(MPI.COMM_WORLD, bench.turns))
    return bench.carry_out() if MPI.COMM_WORLD.rank == 0 else 0


class SyncBench(Run):
    """A run over ranks."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.turns = arguments.repeats or (QUICK_TURNS if arguments.quick else TURNS)
        self.jobs: list[jobs.Found] = []
        self.machine = {**machine.describe(), "system": platform.platform()}
        self.foreign_load, self.others = machine.ForeignLoad(), None if jobs.under_mpirun() else 0.0

    def measure(self) -> None:
        """Start one job after another, unless these are ranks already."""
        if self.jobs:
            return
        launcher = jobs.launcher()
        if launcher is None:
            raise RefusedError(f"sync needs mpirun:  pip install {requirement('mpi')}, or an MPI of the system")
        with self.progress(len(RANKS), "job"):
            for ranks in RANKS:
                self.status(f"{ranks} rank{'s' * (ranks > 1)}")
                self.jobs.append(jobs.start(launcher, ranks, MODULE, str(self.turns)))
                self.step()

    def report(self) -> None:
        if self.others is not None:  # sibling ranks would count as foreign load
            self.others = self.foreign_load.cores()
        if self.jobs:
            self.say(report(self.machine, self.jobs))
            if (self.others or 0) > 0.1 * self.machine["cores"]:
                cores = f"{self.others:.1f} of {self.machine['cores']} cores"
                self.say(f"\nNOT ALONE: meanwhile other programs kept {cores} busy.")

    def as_json(self) -> dict[str, Any]:
        rows = [
            [{**row, "fastest": fastest(row), "median": statistics.median(row["seconds"])} for row in job["rows"]]
            for job in self.jobs
        ]
        return {
            "arraybn": __version__,
            "python": platform.python_version(),
            "machine": self.machine,
            "others": self.others,
            "interrupted": self.interrupted,
            "jobs": [{**job, "rows": rows} for job, rows in zip(self.jobs, rows, strict=True)],
        }

    def draw(self, path: Path) -> None:
        if len({job["ranks"] for job in self.jobs} - {1}) < 2:
            print("bench: no picture: it needs two numbers of ranks, so run it without mpirun", file=sys.stderr)
            return
        from .figure import draw_sync

        draw_sync(self.jobs, self.machine, path)
        print(f"\n{path}: times, and bytes received", file=self.stream)


NOTES = f"""Whole layer: of x ({ROWS}, C) on each rank, float32; with one rank a plain one. The next columns are
exchanges: what is between the two sweeps of a forward or a backward. Arraybn's frames are float64, with a header and
agreement on errors. Exact: a record of integers follows the frame, in the same call. All-gather, as in PyTorch: mean,
1/std and count of all ranks in float32, pooled by each of them; its backward is an allreduce. Sum: MPI's own
allreduce of as many float64 numbers as arraybn sends, and nothing else; blocking (Allreduce), or polled as all
schemes do (Iallreduce and Test). All wait in the same way, and make one collective each way; arraybn two beyond 256
channels, and in exact mode. The fastest turn is shown: where ranks share cores, one that loses its core to another
program keeps all waiting."""


def report(here: Mapping[str, Any], found: Sequence[jobs.Found]) -> str:
    """Return the table, and what it means."""
    turns = len(found[0]["rows"][0]["seconds"])
    both = f"{FORWARD:>9}{BACKWARD:>9}"
    lines = [
        f"{here['processor']}, {here['cores']} cores; {found[0]['mpi']}; microseconds, the fastest of {turns} turns",
        "",
        f"{'whole layer':>30}{OURS:>18}{EXACT:>18}{GATHER:>18}{'sum of MPI':>16}{'bytes received':>25}",
        f"ranks    C layer(x) + backward{3 * both} blocking polled{OURS:>9}{EXACT:>8}{'gather':>8}",
    ]
    for job in found:
        lines += [_line(job, channels) for channels in dict.fromkeys(row["channels"] for row in job["rows"])] + [""]
    return "\n".join([*lines, *textwrap.wrap(" ".join(NOTES.split()), 110)])


def _line(job: jobs.Found, channels: int) -> str:
    rows = {(row["scheme"], row["what"]): row for row in job["rows"] if row["channels"] == channels}
    micro = {key: f"{fastest(row) * 1e6:.0f}" for key, row in rows.items()}
    text = f"{job['ranks']:>5}{channels:>5}{micro[OURS, LAYER]:>9}{micro[OURS, STEP]:>11}"
    for scheme in (OURS, EXACT, GATHER):
        text += f"{micro.get((scheme, FORWARD), '–'):>9}{micro.get((scheme, BACKWARD), '–'):>9}"
    text += f"{micro.get((BARE, FORWARD), '–'):>9}{micro.get((POLLED, FORWARD), '–'):>7}"
    for scheme, width in ((OURS, 9), (EXACT, 8), (GATHER, 8)):
        row = rows.get((scheme, FORWARD))
        text += f"{'–' if row is None else format(row['traffic']['received'], ','):>{width}}"
    return text

"""``python -m arraybn bench``: every batch norm installed here, on the CPU. In the JSON, times are in seconds."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._install import requirement
from .._version import __version__
from ..kernels.threads import get_num_threads
from . import growth, ladder, machine, networks, report
from .cases import PASSES, RESNET, Case, choose
from .contestants import Library
from .contestants.registry import ARRAYBN, COPYTO, ON_REQUEST, OPERATORS, PEERS, has_numba
from .output import RefusedError, Run, check_peers
from .session import BUDGET, Session, memory_needed
from .timing import Result

ROUNDS, QUICK_ROUNDS, LIMIT_ROUNDS = 15, 5, 9
QUICK_BUDGET = 0.4  # seconds


@dataclass
class Section:
    """The table, the growth or the ladder: its contestants, its cases, and their results."""

    name: str
    libraries: list[Library]
    cases: list[Case]
    results: list[Result] = field(default_factory=list)


def plan(arguments: argparse.Namespace) -> list[Section]:
    """Return what is to be done; a `RefusedError` says why it cannot be."""
    if "bfloat16" in (arguments.dtype or ()) and importlib.util.find_spec("ml_dtypes") is None:
        raise RefusedError(f"--dtype bfloat16 needs ml_dtypes:  pip install {requirement('cpu')}")
    instead = arguments.growth is not None or arguments.ladder
    for option in ("shapes", "layout", "dtype", "what"):
        if instead and getattr(arguments, option) is not None:
            raise RefusedError(f"--{option} belongs to the table, which --growth and --ladder take the place of")
    if arguments.set is not None and (instead or arguments.shapes is not None):
        raise RefusedError("--set: expected neither --shapes nor --growth nor --ladder beside it; got one of them")
    if arguments.ladder and arguments.growth is None and arguments.peers is not None:
        raise RefusedError("--peers belongs to the table and to --growth; the ladder is arraybn's alone")
    if arguments.ladder and not has_numba():
        text = "--ladder needs numba, which most of its steps are made of"
        raise RefusedError(f"{text}:  pip install {requirement('cpu')}")
    usual = [peer.name for peer in PEERS if peer.name == OPERATORS and not peer.missing] or ["none"]
    if arguments.set is not None:
        cases = networks.cases(arguments.set, arguments.layout, arguments.dtype, arguments.what)
        return [Section("set", [ARRAYBN, *peers(arguments.peers or usual)], cases)]
    if not instead:
        options = {"shapes": arguments.shapes, "layouts": arguments.layout, "dtypes": arguments.dtype}
        cases = choose(**options, operations=arguments.what, quick=arguments.quick)
        return [Section("table", [ARRAYBN, *peers(arguments.peers, arguments.quick)], cases)]
    sections = []
    if arguments.growth is not None:
        libraries = [ARRAYBN, *peers(arguments.peers or usual)]
        sections.append(Section("growth", libraries, growth.cases(arguments.growth)))
    return sections + ([Section("ladder", [ladder.LADDER], [ladder.CASE])] if arguments.ladder else [])


def peers(names: Sequence[str] | None, quick: bool = False) -> list[Library]:
    """Return those named, or all that are installed but `ON_REQUEST`; the reference takes too long for a quick run."""
    if names is None:
        dull = quick or not has_numba()  # without Numba, arraybn is its reference
        left_out = {*ON_REQUEST, "reference"} if dull else {*ON_REQUEST}
        return [peer for peer in PEERS if not peer.missing and peer.name not in left_out]
    check_peers(names, {peer.name: peer.pip for peer in PEERS if peer.missing})
    return [peer for peer in PEERS if peer.name in names]


class Bench(Run):
    """A run on the CPU."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.sections = plan(arguments)
        self.rounds = arguments.repeats or (QUICK_ROUNDS if arguments.quick else ROUNDS)
        self.budget = None if arguments.repeats else QUICK_BUDGET if arguments.quick else BUDGET
        self.start, self.foreign_load = time.perf_counter(), machine.ForeignLoad()
        self.others: float | None = None
        self.limit = Result(Case(RESNET[0], operations=()))
        self.machine = {**machine.describe(), "threads": get_num_threads()}
        self.machine["system"] = f"{platform.system()} {platform.machine()}"

    def wrong(self) -> bool:
        cells = (cell for section in self.sections for result in section.results for cell in result.cells)
        return any(cell.failed for cell in cells if cell.library in (ARRAYBN.name, ladder.LADDER.name))

    def measure(self) -> None:
        """Measure the copy limit, then the sections."""
        with self.progress(self.rounds * sum(len(section.cases) for section in self.sections), "round"):
            self._measure_limit()
            self.say(self._head())
            for section in self.sections:
                if section.name == "set":
                    names = [library.title for library in section.libraries[1:]]
                    self.say(networks.heading(section.cases[0].operations, names))
                with Session(section.libraries, self.rounds, budget=self.budget, progress=self) as session:
                    for case in section.cases:
                        section.results.append(Result(case))
                        try:
                            session.measure(section.results[-1])
                        finally:
                            self._say_case(section)

    def _say_case(self, section: Section) -> None:
        result = section.results[-1]
        if section.name == "table" and result.has_news:
            self.say(report.cpu_block(result, self.machine["threads"]))
        elif section.name == "set" and result.has_news:
            self.say(networks.line(result))

    def _measure_limit(self) -> None:
        """Time the copy of an array that is not in any cache, if memory has room for it."""
        free, case = machine.available_memory(), self.limit.case
        while free is not None and memory_needed(case, [ARRAYBN]) > free and case.shape[0] > 1:
            case = Case((case.shape[0] // 2, *case.shape[1:]), operations=())
        with Session([ARRAYBN], LIMIT_ROUNDS) as session:
            self.limit = session.measure(Result(case))

    def _head(self) -> str:
        copy, nbytes = self.limit.cell(COPYTO, "copy"), self.limit.case.nbytes
        text = report.head(self.machine, self.versions(), copy, nbytes, self.arguments.command_line)
        if not has_numba():
            text += f"\nnumba is missing, so arraybn is measured by its reference:  pip install {requirement('cpu')}"
        return text

    def versions(self) -> dict[str, str]:
        packages = {"NumPy": "numpy", "Numba": "numba"}
        libraries = [one for section in self.sections for one in section.libraries if one.needs != ("numpy",)]
        packages |= {library.title: library.needs[0] for library in libraries}
        found = {title: machine.version(name) for title, name in packages.items()}
        return {"arraybn": __version__, **{title: version for title, version in found.items() if version}}

    def report(self) -> None:
        for section in self.sections:
            if section.results and section.name == "table":
                self._report_table([result.case for result in section.results])
            elif section.results:
                tables = {"growth": growth.table, "ladder": ladder.table, "set": networks.summary}
                self.say(tables[section.name](section.results))
        self.others = self.foreign_load.cores()
        if warning := report.company(self.others, os.cpu_count() or 1):
            self.say(warning)

    def _report_table(self, cases: Sequence[Case]) -> None:
        dtypes = list(dict.fromkeys(case.dtype for case in cases))
        self.say(report.notes(all(case.is_small for case in cases), dtypes, len({case.checked for case in cases})))
        if (missing := [peer for peer in PEERS if peer.missing]) and self.arguments.peers is None:
            self.say("\nNot installed, left out:")
            self.say("\n".join(f"  {peer.title}: pip install {peer.pip}" for peer in missing))

    def draw(self, path: Path) -> None:
        """Draw a picture for each section; that of the second has the section's name in its own."""
        from . import figure

        for index, section in enumerate(one for one in self.sections if one.results):
            target = path if index == 0 else path.with_stem(f"{path.stem}-{section.name}")
            getattr(figure, f"draw_{section.name}")(section.results, self.machine["processor"], target)
            print(f"\n{target}: the {section.name}", file=self.stream)

    def as_json(self) -> dict[str, Any]:
        copy = self.limit.cell(COPYTO, "copy")
        found: dict[str, Any] = {
            "arraybn": __version__,
            "python": platform.python_version(),
            "machine": self.machine,
            "versions": self.versions(),
            "numba": has_numba(),
            "command": self.arguments.command_line,
            "interrupted": self.interrupted,
            "seconds": round(time.perf_counter() - self.start, 1),
            "passes": PASSES,
            "copy_limit": None if copy is None else report.figures(self.limit, copy),
        }
        for section in self.sections:
            found[section.name] = [report.as_json(result, report.figures) for result in section.results]
            if section.name == "ladder":
                found["rungs"] = [rung for result in section.results for rung in ladder.rungs(result)]
        return {**found, "others": self.others}

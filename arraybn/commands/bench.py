"""``python -m arraybn bench``: how fast every batch norm installed here is, on this machine.

Each contestant is checked first, on small batches, and then timed, one turn after another, each library in a process of
its own. In the JSON, times are in seconds, and what cannot be said is null.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__
from ..kernels import threads as _threads
from . import _bench_growth as growth
from . import _bench_ladder as ladder
from . import _bench_machine as machine
from . import _bench_report as report
from ._bench_cases import DTYPES, LAYOUTS, PASSES, RESNET, SMALL_WHATS, WHATS, Case, choose
from ._bench_clock import BUDGET, COPYTO, Cell, Result, Session, Settings, memory_needed
from ._bench_contestants import ARRAYBN, PEERS, Library, has_numba
from ._bench_cuda_cases import HALVES
from ._bench_report import command
from ._check_target import RefusedError

HELP = "how fast every batch norm installed here is, on this machine"
DESCRIPTION = """Check every batch norm installed here, then time them in turns: training forward, backward, evaluation,
on the shapes of ResNet-50 in both layouts, and the calls of layers on small inputs."""
EPILOG = """examples
  python -m arraybn bench --quick
  python -m arraybn bench --shapes 32,64,112,112 64,128 --layout first last --dtype float32 float64
  python -m arraybn bench --peers torch --what forward backward --json bench.json --plot bench.png
  python -m arraybn bench --growth --plot growth.png
  python -m arraybn bench --ladder
  python -m arraybn bench sync --plot sync.png
  python -m arraybn bench --device cuda --json gpu.json --plot gpu.png

A shape is N,C,… whatever the layout; channels-last has the array (N, …, C). layer: the call of a layer in training;
step: that, and its backward; both are what is timed up to 65,536 elements, unless --what says otherwise.
Ctrl-C prints what has been measured so far.

exit status: 0; 1 if arraybn is wrong; 2 if what was asked cannot be done; 130 after Ctrl-C."""

HELP_DEVICE = "cuda: on the GPU, with CuPy; ceilings, table, host time, two MPI ranks: under 9 minutes (cpu)"
HELP_DTYPE = "(float32, and float64 for some shapes; cuda: float32 float16 bfloat16)"
ROUNDS, QUICK_ROUNDS, LIMIT_ROUNDS = 15, 5, 9
QUICK_BUDGET = 0.4  # seconds
PEER_NAMES = [peer.name for peer in PEERS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    help_ = "instead: what synchronizing over MPI ranks costs; starts mpirun, or measures on the ranks it is run on"
    parser.add_argument("subject", nargs="?", choices=["sync"], help=help_)
    what = parser.add_argument_group("what is timed")
    what.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=HELP_DEVICE)
    what.add_argument("--quick", action="store_true", help="fewer shapes and turns: under a minute")
    help_ = "these shapes instead of those of ResNet-50"
    what.add_argument("--shapes", nargs="+", type=_shape, metavar="N,C,…", help=help_)
    what.add_argument("--layout", nargs="+", choices=LAYOUTS, help="where the channels are (both; --shapes: first)")
    what.add_argument("--dtype", nargs="+", choices=[*DTYPES, *HALVES], help=HELP_DTYPE)
    what.add_argument("--what", nargs="+", choices=WHATS, help="(forward backward eval; small inputs: layer step)")
    what.add_argument(
        "--peers",
        nargs="+",
        type=_peer,
        metavar="NAME",
        help=f"{', '.join(PEER_NAMES)}; or none (all that are installed; --quick: but for the reference)",
    )
    what.add_argument(
        "--repeats",
        type=_repeats,
        metavar="TURNS",
        help=f"of each contestant ({ROUNDS}; fewer, at least 3, for one that has had {BUDGET:g} s)",
    )
    other = parser.add_argument_group("instead of the table")
    other.add_argument(
        "--growth",
        nargs="?",
        type=_elements,
        const=growth.LAST,
        metavar="ELEMENTS",
        help="time per element along N, C and S, up to so many elements (1e8)",
    )
    other.add_argument("--ladder", action="store_true", help="how the speed was reached, one idea a step")
    files = parser.add_argument_group("files")
    files.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the figures there, or to stdout")
    files.add_argument(
        "--plot", nargs="?", const="arraybn-bench.png", metavar="FILE", help="draw a PNG (default arraybn-bench.png)"
    )


def _shape(text: str) -> tuple[int, ...]:
    words = text.split(",")
    shape = tuple(int(word) for word in words if word.isascii() and word.isdigit())
    if not (2 <= len(shape) == len(words) <= 5 and all(shape)):
        raise argparse.ArgumentTypeError(f"expected two to five integers ≥ 1, as in 32,64,112,112; got {text!r}")
    if Case(shape).elements == shape[1]:
        raise argparse.ArgumentTypeError(f"expected more than one value per channel, or there is no std; got {text!r}")
    return shape


def _peer(text: str) -> str:
    if text not in (*PEER_NAMES, "none"):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PEER_NAMES)}, or none; got {text!r}")
    return text


def _repeats(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"expected an integer ≥ 1; got {text!r}")
    return int(text)


def _elements(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not growth.FIRST <= value <= 1e10:
        raise argparse.ArgumentTypeError(f"expected a number of elements from 1e3 to 1e10; got {text!r}")
    return int(value)


# ---- The plan: checked before any work -------------------------------------------------------------------------------


@dataclass
class Section:
    """The table, the growth or the ladder: who takes part, on what, and what came of it."""

    name: str
    libraries: list[Library]
    cases: list[Case]
    results: list[Result] = field(default_factory=list)


def plan(arguments: argparse.Namespace) -> list[Section]:
    """What is to be done; a `RefusedError` says why it cannot be."""
    if half := [dtype for dtype in arguments.dtype or () if dtype in HALVES]:
        raise RefusedError(f"--dtype: expected some of {', '.join(DTYPES)}, or --device cuda; got {' '.join(half)}")
    instead = arguments.growth is not None or arguments.ladder
    for option in ("shapes", "layout", "dtype", "what"):
        if instead and getattr(arguments, option) is not None:
            raise RefusedError(f"--{option} belongs to the table, which --growth and --ladder take the place of")
    if arguments.ladder and arguments.growth is None and arguments.peers is not None:
        raise RefusedError("--peers belongs to the table and to --growth; the ladder is arraybn's alone")
    if arguments.ladder and not has_numba():
        raise RefusedError('--ladder needs numba, which most of its steps are made of:  pip install "arraybn[cpu]"')
    if not instead:
        options = {"shapes": arguments.shapes, "layouts": arguments.layout, "dtypes": arguments.dtype}
        cases = choose(**options, whats=arguments.what, quick=arguments.quick)
        return [Section("table", [ARRAYBN, *peers(arguments.peers, arguments.quick)], cases)]
    sections = []
    if arguments.growth is not None:
        usual = [peer.name for peer in PEERS if peer.name == "torch" and not peer.missing] or ["none"]
        libraries = [ARRAYBN, *peers(arguments.peers or usual)]
        sections.append(Section("growth", libraries, growth.cases(arguments.growth)))
    return sections + ([Section("ladder", [ladder.LADDER], [ladder.CASE])] if arguments.ladder else [])


def peers(names: Sequence[str] | None, quick: bool = False) -> list[Library]:
    """Those named, or all that are installed; the reference takes too long for a quick run."""
    if names is None:
        dull = quick or not has_numba()  # without Numba, arraybn is its reference
        return [peer for peer in PEERS if not peer.missing and not (dull and peer.name == "reference")]
    if "none" in names:
        if set(names) != {"none"}:
            raise RefusedError(f"--peers: expected none alone, or names without it; got {' '.join(names)}")
        return []
    chosen = [peer for peer in PEERS if peer.name in names]
    for peer in chosen:
        if peer.missing:
            raise RefusedError(
                f"--peers: expected libraries that are installed; {peer.name} is not:"
                f"  {sys.executable} -m pip install {peer.pip}"
            )
    return chosen


def check_files(arguments: argparse.Namespace) -> None:
    """Refuse, before any work, what could not be drawn or written after it."""
    if arguments.plot is not None:
        try:
            importlib.import_module("matplotlib.figure")
        except ImportError as error:
            raise RefusedError(
                f'--plot needs matplotlib ({error}): install with  pip install "arraybn[demo]"'
            ) from error
    for option, name in (("--plot", arguments.plot), ("--json", arguments.json)):
        if name not in (None, "-") and (Path(name).is_dir() or not Path(name).absolute().parent.is_dir()):
            raise RefusedError(f"{option} {name}: expected a file in a folder that is there")


# ---- The work --------------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write what was asked for; 1 if arraybn is wrong, 130 after Ctrl-C."""
    try:
        check_files(arguments)
        if arguments.device == "cuda":
            from . import _bench_cuda

            return _bench_cuda.run(arguments, command(arguments))
        if arguments.subject == "sync":
            from . import _bench_sync

            return _bench_sync.run(arguments)
        return report.carry_out(Bench(arguments, plan(arguments)))
    except RefusedError as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 2


class Bench:
    """A run of the command: what is found, and what has been said."""

    def __init__(self, arguments: argparse.Namespace, sections: list[Section]) -> None:
        self.arguments, self.sections = arguments, sections
        self.rounds = arguments.repeats or (QUICK_ROUNDS if arguments.quick else ROUNDS)
        self.budget = None if arguments.repeats else QUICK_BUDGET if arguments.quick else BUDGET
        self.start, self.interrupted = time.perf_counter(), False
        self.machine: dict[str, Any] = {
            "processor": machine.processor(),
            "cores": machine.cores(),
            "threads": _threads.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
        }
        self.others = machine.Others()
        self.limit = Result(Case(RESNET[0], whats=()))
        self._bar: Any = None
        self._shown = 0  # blocks

    def say(self, text: str) -> None:
        """Print it, above the progress bar if there is one; nothing if stdout is for the JSON."""
        if self.arguments.json != "-":
            (print if self._bar is None else self._bar.write)(text, file=sys.stdout)
            sys.stdout.flush()

    def cells(self) -> list[Cell]:
        """All that were to be measured."""
        return [cell for section in self.sections for result in section.results for cell in result.cells]

    def wrong(self) -> bool:
        """Whether anything of arraybn has failed."""
        return any(cell.failed for cell in self.cells() if cell.library in (ARRAYBN.name, ladder.LADDER.name))

    def measure(self) -> None:
        """The copy limit, then the sections."""
        total = self.rounds * sum(len(section.cases) for section in self.sections)
        with report.progress_bar(total) as bar:
            self._bar = bar
            try:
                self._measure_limit()
                self.say(self._head())
                for section in self.sections:
                    self._measure_section(section)
            finally:
                self._bar = None

    def _measure_limit(self) -> None:
        """How fast memory is copied, by an array that is not in any cache, if memory has room for it."""
        free = machine.available_memory()
        case = self.limit.case
        while free is not None and memory_needed(case, [ARRAYBN]) > free and case.shape[0] > 1:
            case = Case((case.shape[0] // 2, *case.shape[1:]), whats=())
        with Session([ARRAYBN], Settings(LIMIT_ROUNDS, say=self._status)) as session:
            self.limit = session.measure(case)

    def _measure_section(self, section: Section) -> None:
        settings = Settings(self.rounds, self.budget, say=self._status, done=self._done)
        with Session(section.libraries, settings, section.results) as session:
            for case in section.cases:
                session.measure(case)
                if section.name == "table":
                    self._show_blocks(section)

    def _show_blocks(self, section: Section) -> None:
        for result in section.results[self._shown :]:
            if result.skipped or any(cell.seconds or cell.failed for cell in result.cells):
                self.say(report.block(result, self.machine["threads"]))
        self._shown = len(section.results)

    def _status(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description(text)

    def _done(self) -> None:
        if self._bar is not None:
            self._bar.update()

    # ---- What is said of it ----

    def _head(self) -> str:
        cell = self.limit.cell(COPYTO, "copy")
        text = report.head(self.machine, self.versions(), cell, self.limit.case.nbytes, command(self.arguments))
        if not has_numba():
            text += '\nnumba is missing, so arraybn is measured by its reference:  pip install "arraybn[cpu]"'
        return text

    def versions(self) -> dict[str, str]:
        """Of arraybn, NumPy, Numba, and those who take part."""
        packages = {"NumPy": "numpy", "Numba": "numba"}
        packages |= {library.title: library.needs[0] for section in self.sections for library in section.libraries}
        ours = {ARRAYBN.title, ladder.LADDER.title, *(peer.title for peer in PEERS if peer.needs == ("numpy",))}
        found = {title: machine.version(name) for title, name in packages.items() if title not in ours}
        return {"arraybn": __version__, **{title: version for title, version in found.items() if version}}

    def finish(self) -> None:
        """Print what is not yet printed, write the files."""
        for section in self.sections:
            if section.results:
                self._finish_section(section)
        arguments, others = self.arguments, self.others.cores()
        if warning := report.company(others, os.cpu_count() or 1):
            self.say(warning)
        if arguments.json is not None:
            text = json.dumps({**self.as_json(), "others": others}, indent=1, allow_nan=False)
            print(text) if arguments.json == "-" else Path(arguments.json).write_text(f"{text}\n", encoding="utf-8")
        if arguments.plot is not None:
            self._draw(Path(arguments.plot))

    def _finish_section(self, section: Section) -> None:
        if section.name == "table":
            self._show_blocks(section)
            cases = [result.case for result in section.results]
            small = all(set(case.whats) <= set(SMALL_WHATS) for case in cases)
            checked = len({case.checked for case in cases})
            self.say(report.notes(small, list(dict.fromkeys(case.dtype for case in cases)), checked))
            if (missing := [peer for peer in PEERS if peer.missing]) and self.arguments.peers is None:
                self.say("\nNot installed, left out:")
                self.say("\n".join(f"  {peer.title}: pip install {peer.pip}" for peer in missing))
        else:
            self.say((growth if section.name == "growth" else ladder).table(section.results))

    def _draw(self, path: Path) -> None:
        """The picture of each section; that of the second has the section's name in its own."""
        from . import _bench_figure as figure

        for index, section in enumerate(one for one in self.sections if one.results):
            target = path if index == 0 else path.with_stem(f"{path.stem}-{section.name}")
            draw: Callable[[Sequence[Result], str, Path], None] = getattr(figure, f"draw_{section.name}")
            draw(section.results, self.machine["processor"], target)
            print(f"\n{target}: the {section.name}", file=sys.stderr if self.arguments.json == "-" else sys.stdout)

    def as_json(self) -> dict[str, Any]:
        """What --json writes."""
        copy = self.limit.cell(COPYTO, "copy")
        found: dict[str, Any] = {
            "arraybn": __version__,
            "python": platform.python_version(),
            "machine": self.machine,
            "versions": self.versions(),
            "numba": has_numba(),
            "command": command(self.arguments),
            "interrupted": self.interrupted,
            "seconds": round(time.perf_counter() - self.start, 1),
            "passes": PASSES,
            "copy_limit": None if copy is None else report.figures(self.limit, copy),
        }
        for section in self.sections:
            found[section.name] = [report.as_json(result) for result in section.results]
            if section.name == "ladder":
                found["rungs"] = [rung._asdict() for result in section.results for rung in ladder.rungs(result)]
        return found

"""``python -m arraybn bench sync``: what a synchronized call costs over MPI ranks, and an all-gather scheme beside it.

Under ``mpirun -n P`` it measures on those P ranks; otherwise it starts mpirun itself, for each of RANKS.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from . import _bench_machine as machine
from . import _bench_sync_model as model
from . import info
from ._bench_report import progress_bar
from ._bench_sync_ranks import BACKWARD, FORWARD, GATHER, LAYER, OURS, ROWS, STEP, measure
from ._check_target import RefusedError

RANKS = (1, 2, 4, 8)
TURNS, QUICK_TURNS = 9, 3
TIME_LIMIT = 600.0  # seconds for each number of ranks
MODULE = "_bench_sync_ranks"
PREDICTED = (256, 2048)  # channels
ALONE = ("shapes", "layout", "dtype", "what", "peers", "growth")  # options that are not for this

Measured = dict[str, Any]  # what the ranks of one job have found


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write what was asked for; 130 after Ctrl-C."""
    for option in ALONE:
        if getattr(arguments, option) is not None:
            raise RefusedError(f"--{option}: expected no such option with sync, which times the exchange alone")
    if arguments.ladder:
        raise RefusedError("--ladder: expected no such option with sync, which times the exchange alone")
    if importlib.util.find_spec("mpi4py") is None:
        raise RefusedError(f'sync needs mpi4py:  {sys.executable} -m pip install "arraybn[mpi]"')
    turns = arguments.repeats or (QUICK_TURNS if arguments.quick else TURNS)
    others, jobs, interrupted = machine.Others(), [], False
    if under_mpirun():
        from mpi4py import MPI

        found = measure(MPI.COMM_WORLD, turns)
        if MPI.COMM_WORLD.rank != 0:
            return 0
        jobs = [found]
    else:
        try:
            jobs.extend(_launched(turns))
        except KeyboardInterrupt:
            interrupted = True
    try:
        return _finish(arguments, jobs, others, interrupted)
    except OSError as error:  # a full disk, a folder that went away
        if isinstance(error, BrokenPipeError):
            raise
        raise RefusedError(f"cannot write: {error}") from error


def under_mpirun() -> bool:
    """Whether a launcher says that it has started this process."""
    from ..sync.process import LAUNCHERS

    return any(os.environ.get(name, "").isdigit() for name in LAUNCHERS)


# ---- Starting ranks --------------------------------------------------------------------------------------------------


def _launched(turns: int) -> Iterator[Measured]:
    """One job after another, under a progress bar."""
    launcher = info.launcher()
    if launcher is None:
        raise RefusedError('sync needs mpirun:  pip install "arraybn[mpi]", or an MPI of the system')
    with progress_bar(len(RANKS), "job") as bar:
        for ranks in RANKS:
            if bar is not None:
                bar.set_description(f"{ranks} rank{'s' * (ranks > 1)}")
            yield _job(launcher, ranks, turns)
            if bar is not None:
                bar.update()


def _job(
    launcher: str, ranks: int, turns: int, *words: str, module: str = MODULE, limit: float | None = None
) -> Measured:
    """What so many ranks have found; an error with the last words of those that have not."""
    limit = TIME_LIMIT if limit is None else limit
    home = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    env = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", **os.environ, "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        file = Path(folder) / "found.json"
        script = [sys.executable, "-m", "mpi4py", "-m", f"{__package__}.{module}", str(file), str(turns), *words]
        command = [launcher, "-n", str(ranks), *script]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=env, start_new_session=True, **streams)
        try:
            status = process.wait(limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise RefusedError(f"mpirun -n {ranks} has not ended within {limit:g} s") from error
        if status or not file.exists():
            output.seek(0)
            text = output.read().decode(errors="replace").replace("\0", "").strip()
            raise RefusedError(f"mpirun -n {ranks} ended with status {status}:\n{text[-2000:]}")
        found: Measured = json.loads(file.read_text(encoding="utf-8"))
        return found


# ---- What follows from it --------------------------------------------------------------------------------------------


def fastest(row: Mapping[str, Any]) -> float:
    """Seconds of the fastest turn. A rank that loses its core to another program keeps all of them waiting."""
    return float(min(row["seconds"]))


def points(jobs: Sequence[Measured]) -> dict[tuple[str, str], list[tuple[int, int, float]]]:
    """(ranks, channels, seconds) of the exchanges, by scheme and direction."""
    found: dict[tuple[str, str], list[tuple[int, int, float]]] = {}
    for job in jobs:
        for row in job["rows"]:
            if row["what"] in (FORWARD, BACKWARD):
                point = job["ranks"], row["channels"], fastest(row)
                found.setdefault((row["scheme"], row["what"]), []).append(point)
    return found


def _finish(arguments: argparse.Namespace, jobs: list[Measured], others: machine.Others, interrupted: bool) -> int:
    here: dict[str, Any] = {"processor": machine.processor(), "cores": machine.cores(), "system": platform.platform()}
    fitted = model.fitted(points(jobs), here["cores"])
    busy = others.cores()
    if arguments.json is not None:
        content = {
            "arraybn": __version__,
            "python": platform.python_version(),
            "machine": here,
            "others": None if under_mpirun() else busy,  # other ranks are others
            "interrupted": interrupted,
            "jobs": [{**job, "rows": [_row(row) for row in job["rows"]]} for job in jobs],
            "model": None if fitted is None else fitted.as_json(PREDICTED),
        }
        text = json.dumps(content, indent=1, allow_nan=False)
        print(text) if arguments.json == "-" else Path(arguments.json).write_text(f"{text}\n", encoding="utf-8")
    if arguments.json != "-" and jobs:
        print(report(here, jobs, fitted))
        if not under_mpirun() and (busy or 0) > 0.1 * here["cores"]:
            print(f"\nNOT ALONE: meanwhile other programs kept {busy:.1f} of {here['cores']} cores busy.")
    if arguments.plot is not None and fitted is not None:
        from ._bench_sync_figure import draw

        draw(jobs, fitted, here["processor"], Path(arguments.plot))
        print(f"\n{arguments.plot}: measured, and the model", file=sys.stderr if arguments.json == "-" else sys.stdout)
    elif arguments.plot is not None:
        print("bench: no picture: the model needs two numbers of ranks, so run it without mpirun", file=sys.stderr)
    if interrupted:
        print("interrupted; the figures are of what was measured before", file=sys.stderr)
    return 130 if interrupted else 0


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "fastest": fastest(row), "median": statistics.median(row["seconds"])}


# ---- Words -----------------------------------------------------------------------------------------------------------


NOTES = f"""Whole layer: of x ({ROWS}, channels) on each rank, float32; with one rank a plain one. Exchange: what is
between the two sweeps of a forward or a backward. Arraybn's frames are float64, with a header and agreement on errors.
All-gather, as in PyTorch: mean, 1/std and count of all ranks in float32, pooled by each of them; its backward is an
allreduce. Both schemes wait in the same way, and make one collective each way; arraybn two beyond 256 channels. The
fastest turn is shown: where ranks share cores, one that loses its core to another program keeps all waiting."""


def report(here: Mapping[str, Any], jobs: Sequence[Measured], fitted: model.Model | None) -> str:
    """The table, what it means, and what the model says."""
    turns = len(jobs[0]["rows"][0]["seconds"])
    both = f"{FORWARD:>14}{BACKWARD:>10}"
    lines = [
        f"{here['processor']}, {here['cores']} cores; {jobs[0]['mpi']}; microseconds, the fastest of {turns} turns",
        "",
        f"{'':14}{'whole layer':>22}{'exchange of arraybn':>24}{'all-gather':>24}{'bytes received, forward':>26}",
        f"{'ranks':>5}{'channels':>9}{'layer(x)':>11}{'+ backward':>11}{both}{both}{OURS:>13}{GATHER:>13}",
    ]
    for job in jobs:
        lines += [_line(job, channels) for channels in dict.fromkeys(row["channels"] for row in job["rows"])] + [""]
    lines += textwrap.wrap(" ".join(NOTES.split()), 110)
    return "\n".join(lines if fitted is None else [*lines, "", predictions(fitted)])


def _line(job: Measured, channels: int) -> str:
    rows = {(row["scheme"], row["what"]): row for row in job["rows"] if row["channels"] == channels}

    def micro(scheme: str, what: str) -> str:
        row = rows.get((scheme, what))
        return "–" if row is None else f"{fastest(row) * 1e6:.0f}"

    text = f"{job['ranks']:>5}{channels:>9}{micro(OURS, LAYER):>11}{micro(OURS, STEP):>11}"
    for scheme in (OURS, GATHER):
        text += f"{micro(scheme, FORWARD):>14}{micro(scheme, BACKWARD):>10}"
    received = [
        f"{rows[scheme, FORWARD]['traffic']['received']:,}" if (scheme, FORWARD) in rows else "–"
        for scheme in (OURS, GATHER)
    ]
    return f"{text}{received[0]:>13}{received[1]:>13}"


def predictions(fitted: model.Model) -> str:
    """What the model says, and that it is one."""
    lines = [
        "MODEL, not measured: time = s·(o + rounds·α + bytes·β), s = max(1, ranks / cores); fitted to these figures:",
        f"{'':<24}{'o [µs]':>9}{'α [µs]':>9}{'β [ns]':>9}{'median error':>14}",
    ]
    for (scheme, what), one in fitted.fits.items():
        numbers = f"{one.overhead * 1e6:>9.1f}{one.alpha * 1e6:>9.1f}{one.beta * 1e9:>9.2f}{one.error:>14.0%}"
        lines.append(f"  {f'{scheme}, {what}':<22}{numbers}")
    heads = "".join(f"{f'C = {c}':>{13 * len(model.SCHEMES)}}" for c in PREDICTED)
    names = "".join(f"{name:>13}" for _ in PREDICTED for name in (OURS, GATHER, "on a ring"))
    lines += ["", f"forward + backward [µs], a core for each rank\n{'ranks':>7}{heads}", f"{'':>7}{names}"]
    for ranks in model.RANKS:
        values = [fitted.seconds(scheme, ranks, c) * 1e6 for c in PREDICTED for scheme in model.SCHEMES]
        lines.append(f"{ranks:>7}" + "".join(f"{value:>13,.0f}" for value in values))
    text = (
        "o, α and β are those of this machine; over a network α and β are others. What stays is the growth: log₂P for"
        " an allreduce, P for what an all-gather receives."
    )
    return "\n".join([*lines, textwrap.fill(text, 110)])

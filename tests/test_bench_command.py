"""``python -m arraybn bench``: what it times, in which order, what follows from the samples, and who is left out.

No test asserts a time.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import as_installed, bare
from support.libraries import need

import arraybn
from arraybn import reference
from arraybn.__main__ import main
from arraybn.bench import cases, cpu, growth, ladder, machine, networks, report
from arraybn.bench import session as session_module
from arraybn.bench import truth as check
from arraybn.bench.cases import Case
from arraybn.bench.contestants import Calls, Contestant, Library, formulas
from arraybn.bench.contestants import ours as contestants
from arraybn.bench.contestants.registry import ARRAYBN, PEERS
from arraybn.bench.device import HostDevice
from arraybn.bench.output import Progress
from arraybn.bench.process import PeerError, Worker
from arraybn.bench.session import ENVIRONMENT, Session, memory_needed
from arraybn.bench.timing import Cell, Result, interleave
from arraybn.bench.truth import Problem, make_problems
from arraybn.bench.worker import Work
from arraybn.commands import bench
from arraybn.kernels import SWEEPS
from arraybn.kernels import threads as _threads

ALL = ("forward", "backward", "eval", "layer", "step")
FAKES = """
import os, signal, sys, time
from arraybn.bench.contestants import Calls
from arraybn.bench.contestants.formulas import host_calls

def build(device, problem, name):
    found = host_calls(device, problem, name)
    return Calls({one: CHANGES[name](call, problem) for one, call in found.operations.items()}, found.read)

def times(factor):
    def change(call, problem):
        def scaled():
            result = call()
            return tuple(factor * one for one in result) if isinstance(result, tuple) else factor * result
        return scaled
    return change

def when_timed(act):  # the cases of the checks are smaller
    return lambda call, problem: act if problem.x.size > 1000 else call

def crash():
    print("on its way out", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def leave():
    print("Fatal: no such luck", file=sys.stderr, flush=True)
    os._exit(3)

def explode():
    raise MemoryError("no room")

CHANGES = {
    "right": times(1),
    "wrong": times(1.001),
    "crashing": when_timed(crash),
    "leaving": when_timed(leave),
    "exploding": when_timed(explode),
    "hanging": when_timed(lambda: time.sleep(1000)),
    "talking": lambda call, problem: lambda: (print("a word"), call())[1],
}
"""


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


def run(*arguments: str, cwd: Path, preparation: str = "", limit: float = 90) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which has executed `preparation` first."""
    code = f"import sys\n{preparation}\nfrom arraybn.__main__ import main\nsys.exit(main({['bench', *arguments]!r}))"
    start = ["-c", code] if preparation else ["-m", "arraybn", "bench", *arguments]
    return subprocess.run(
        [sys.executable, *start],
        capture_output=True,
        encoding="utf-8",
        timeout=limit,
        cwd=cwd,
        env=environment(),
        check=False,
    )


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(Path(arraybn.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a library of a change in FAKES."""
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fakes", raising=False)
    build = importlib.import_module("fakes").build

    def made(name: str, title: str = "", needs: tuple[str, ...] = ("numpy",)) -> Library:
        return Library(name, title or name, needs, "numpy", 3, (Contestant(name, title or name, name, build),))

    yield made
    del sys.modules["fakes"]


def make_problem(case: Case) -> Problem:
    return make_problems(HostDevice(), case)[0]


# ---- Arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--shapes", "32x64"],
            "argument --shapes: expected two to five integers ≥ 1, as in 32,64,112,112; got '32x64'",
        ),
        (["--shapes", "8,4", "7"], "expected two to five integers ≥ 1, as in 32,64,112,112; got '7'"),
        (["--shapes", "8,0"], "got '8,0'"),
        (["--shapes", "8,,4"], "got '8,,4'"),
        (["--shapes", "1,2,3,4,5,6"], "got '1,2,3,4,5,6'"),
        (["--shapes", "1,64,1"], "expected more than one value per channel, or there is no std; got '1,64,1'"),
        (
            ["--peers", "pytorch"],
            "expected some of reference, numpy, torch, aten, jax, tensorflow, exact, masked, or none; got 'pytorch'",
        ),
        (["--repeats", "0"], "argument --repeats: expected an integer ≥ 1; got '0'"),
        (["--growth", "10"], "argument --growth: expected a number of elements from 1e3 to 1e10; got '10'"),
        (["--growth", "much"], "got 'much'"),
        (["--set", "alexnet"], "argument --set: invalid choice: 'alexnet'"),
        (["--layout", "middle"], "argument --layout: invalid choice: 'middle'"),
        (["--dtype", "complex64"], "argument --dtype: invalid choice: 'complex64'"),
        (["--what", "forwards"], "argument --what: invalid choice: 'forwards'"),
    ],
)
def test_a_bad_option_is_named_with_what_was_expected(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--growth", "--shapes", "8,4"],
            "--shapes belongs to the table, which --growth and --ladder take the place of",
        ),
        (["--ladder", "--dtype", "float64"], "--dtype belongs to the table"),
        (
            ["--ladder", "--peers", "none"],
            "--peers belongs to the table and to --growth; the ladder is arraybn's alone",
        ),
        (["--peers", "none", "numpy"], "--peers: expected none alone, or names without it; got none numpy"),
        (["--set", "cache", "--shapes", "8,4"], "--set: expected neither --shapes nor --growth nor --ladder beside it"),
        (["--set", "cache", "--growth"], "--set: expected neither --shapes nor --growth nor --ladder beside it"),
        (["--json", "."], "--json .: expected a file in a folder that is there"),
        (["--json", "nowhere/found.json"], "--json nowhere/found.json: expected a file in a folder that is there"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench: ")
    assert message in err


def test_a_peer_that_is_missing_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Library("jax", "JAX", ("no_such_package",), "jax", 4, ())
    monkeypatch.setattr(cpu, "PEERS", (PEERS[0], absent))
    assert main(["bench", "--peers", "jax"]) == 2
    assert re.search(
        r"--peers: expected libraries that are installed; jax is not:  \S+ -m pip install jax", capsys.readouterr().err
    )
    assert [peer.name for peer in cpu.peers(None)] == ["reference"]


def test_a_plot_without_matplotlib_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--plot", "some.png"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r'bench: --plot needs matplotlib .*pip install "arraybn\[demo\]"', as_installed(err))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--quick --peers torch jax --plot a.png",
        "--shapes 32,64,112,112 64,128 --layout first last --dtype float32 float64 --what forward step --repeats 4",
        "--growth 2000000 --ladder --json 'a file.json'",
        "--device cuda --dtype bfloat16 --json gpu.json",
    ],
)
def test_the_command_that_is_printed_asks_for_the_same(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(bench, "run", lambda arguments: seen.append(arguments) or 0)
    main(["bench", *shlex.split(line)])
    words = shlex.split(seen[0].command_line)
    assert words[:4] == ["python", "-m", "arraybn", "bench"]
    assert vars(parsed(*words[4:])).items() <= vars(seen[0]).items()


# ---- Cases -----------------------------------------------------------------------------------------------------------


def test_the_full_run_has_the_resnet_shapes_in_both_layouts_and_the_small_ones() -> None:
    found = cases.choose()
    for shape in ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7)):
        assert {case.layout for case in found if case.shape == shape and case.dtype == "float32"} == {"first", "last"}
    assert {case.layout for case in found if case.dtype == "float64"} == {"first", "last"}
    small = [case for case in found if case.elements <= cases.SMALL]
    assert [(case.shape, case.operations) for case in small] == [
        ((64, 128), ("layer", "step")),
        ((1, 64, 8, 8), ("layer", "step")),
    ]
    assert {case.operations for case in found if case not in small} == {("forward", "backward", "eval")}


def test_quick_is_two_large_shapes_and_the_small_ones_without_the_reference() -> None:
    (section,) = cpu.plan(parsed("--quick"))
    assert [str(case) for case in section.cases] == [
        "(32, 64, 112, 112) float32, channels-first",
        "(32, 1024, 14, 14) float32, channels-first",
        "(32, 1024, 14, 14) float32, channels-last",
        "(64, 128) float32",
        "(1, 64, 8, 8) float32, channels-first",
    ]
    names = [library.name for library in section.libraries]
    assert names == [
        "arraybn",
        *(p.name for p in PEERS if p.name not in ("exact", "masked", "reference") and not p.missing),
    ]


def test_exact_mode_takes_part_where_it_is_asked_for() -> None:
    need("numba")
    for name in ("exact", "masked"):
        (section,) = cpu.plan(parsed(*["--shapes", "20,6", "--peers", name]))
        assert [library.name for library in section.libraries] == ["arraybn", name]
        assert name not in [peer.name for peer in cpu.peers(None)]


def test_shapes_layouts_dtypes_and_whats_are_multiplied_and_no_case_comes_twice() -> None:
    line = "--shapes 8,4,5 8,4 8,4,5 --layout first last --dtype float64 float32 --what backward --peers none"
    arguments = parsed(*shlex.split(line))
    (section,) = cpu.plan(arguments)
    assert [(case.shape, case.layout, case.dtype) for case in section.cases] == [
        ((8, 4, 5), "first", "float64"),
        ((8, 4, 5), "first", "float32"),
        ((8, 4, 5), "last", "float64"),
        ((8, 4, 5), "last", "float32"),
        ((8, 4), "first", "float64"),  # two axes have one layout
        ((8, 4), "first", "float32"),
    ]
    assert {case.operations for case in section.cases} == {("backward",)}
    assert [library.name for library in section.libraries] == ["arraybn"]


@pytest.mark.parametrize(("what", "arrays"), [("forward", 2), ("backward", 3), ("eval", 2), ("step", 5), ("copy", 2)])
def test_the_bytes_are_those_of_what_must_be_read_and_written(what: str, arrays: int) -> None:
    assert Case((4, 3, 5, 7), dtype="float32").moved(what) == arrays * 420 * 4
    assert Case((4, 3, 5, 7), dtype="float64").moved(what) == arrays * 420 * 8


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_a_problem_is_as_its_case_says_and_the_same_each_time(layout: str, dtype: str) -> None:
    case = Case((7, 3, 5, 4), layout, dtype)
    problem, again = make_problem(case), make_problem(case)
    assert problem.x.shape == problem.dy.shape == ((7, 3, 5, 4) if layout == "first" else (7, 5, 4, 3))
    assert {array.dtype.name for array in problem[1:8]} == {dtype}
    assert {array.shape for array in problem[4:8]} == {(3,)}
    assert problem.x.tobytes() == again.x.tobytes() != problem.dy.tobytes()
    assert json.loads(json.dumps(case.as_json())) == {
        "shape": [7, 3, 5, 4],
        "layout": layout,
        "dtype": dtype,
        "whats": ["forward", "backward", "eval"],
    }


def test_large_data_repeats_and_parts_are_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "BLOCK", 1001)
    dy = make_problem(Case((3, 2000))).dy.ravel()
    np.testing.assert_array_equal(dy[1001:], dy[: dy.size - 1001])
    assert len(np.unique(dy)) == 1001
    x = dy
    for count in (1, 2, 3, 7):
        pieces = contestants.parts(x[:5], count)
        assert np.concatenate(pieces).tolist() == x[:5].tolist()
        assert all(piece.size for piece in pieces)


def test_the_copy_copies_everything() -> None:
    for threads in (1, 2, 5):
        source, target = np.arange(12.0).reshape(3, 4), np.zeros((3, 4))
        contestants.copying(source, target, threads)()
        np.testing.assert_array_equal(source, target)


# ---- Interleaving ----------------------------------------------------------------------------------------------------


def test_everyone_has_a_turn_before_anyone_has_the_next_and_each_begins_a_round_once() -> None:
    table = [Cell("a", "a", what) for what in ("copy", "forward", "backward")]
    order, rounds = [], []

    def take(cell: Cell) -> float:
        order.append(cell.operation)
        return 1.0

    interleave(table, take, rounds=3, done=lambda: rounds.append(len(order)))
    assert order == ["copy", "forward", "backward", "forward", "backward", "copy", "backward", "copy", "forward"]
    assert rounds == [3, 6, 9]
    assert [len(cell.seconds) for cell in table] == [3, 3, 3]


def test_who_fails_has_no_more_turns_and_the_rest_goes_on() -> None:
    good, bad = Cell("a", "good", "forward"), Cell("b", "bad", "forward")

    def take(cell: Cell) -> float:
        if cell is bad and len(cell.seconds) == 2:
            raise PeerError("gone")
        return 0.5

    interleave([good, bad], take, rounds=6)
    assert (len(good.seconds), len(bad.seconds), bad.failed) == (6, 2, "gone")
    interleave([], take, rounds=2)  # nobody is left


def test_a_budget_takes_turns_from_the_slow_alone_and_never_below_three() -> None:
    quick, slow = Cell("a", "quick", "forward", calls=10), Cell("b", "slow", "forward")
    times = {"quick": 0.001, "slow": 2.0}
    interleave([quick, slow], lambda cell: times[cell.row], rounds=20, budget=1.0)
    assert (len(quick.seconds), len(slow.seconds)) == (20, 3)


def test_quartiles_are_of_all_samples() -> None:
    assert Cell("a", "a", "copy", seconds=[4.0, 1.0, 3.0, 2.0, 5.0]).quartiles == (2.0, 3.0, 4.0)
    assert Cell("a", "a", "copy").median is None


# ---- The check, and those who do not come through --------------------------------------------------------------------


def session(*libraries: Library, rounds: int = 3, limit: float = 60) -> Session:
    return Session(libraries, rounds, limit=limit)


def measure(running: Session, case: Case) -> Result:
    return running.measure(Result(case))


@pytest.fixture(scope="module")
def ours() -> Iterator[Session]:
    with session(ARRAYBN, PEERS[0], PEERS[1]) as running:
        yield running


@pytest.mark.parametrize("shape", [(40, 30), (40, 6, 7), (8, 6, 7, 5), (4, 6, 3, 7, 5)])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_arraybn_its_reference_and_plain_formulas_pass_the_check(
    ours: Session, shape: tuple[int, ...], layout: str, dtype: str
) -> None:
    result = measure(ours, Case(shape, layout, dtype, ALL))
    assert ours.faults == {}
    assert [cell.failed for cell in result.cells] == [""] * len(result.cells)
    assert {(cell.row, cell.operation) for cell in result.cells} == {
        ("numpy.copyto", "copy"),
        *(("arraybn, out=", what) for what in ("forward", "backward", "eval")),
        *((row, what) for row in ("arraybn", "arraybn reference", "NumPy formulas") for what in ALL),
    }
    assert {len(cell.seconds) for cell in result.cells} == {3}


REFUSED = {"tensorflow": "its fused op takes no float64", "exact": "its sums take no float64"}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("torch", "PyTorch"),
        ("aten", "PyTorch operators"),
        ("jax", "JAX"),
        ("tensorflow", "TensorFlow"),
        ("exact", "arraybn exact, out="),
        ("masked", "arraybn masked, out="),
    ],
)
def test_a_peer_passes_the_check_in_every_layout_and_dtype_that_it_takes(name: str, row: str) -> None:
    (peer,) = [peer for peer in PEERS if peer.name == name]
    if peer.missing:
        need(peer.needs[0])
    operations = tuple(one for one in ALL if one in peer.contestants[0].operations)
    with session(peer, rounds=1) as running:
        for case in (Case((20, 6), operations=ALL), *(Case((4, 6, 5), one, "float64", ALL) for one in cases.LAYOUTS)):
            result = measure(running, case)
            refused = case.dtype == "float64" and REFUSED.get(name)
            assert {cell.failed for cell in result.cells} == {refused or ""}
            assert {(cell.row, cell.operation) for cell in result.cells} == {(row, what) for what in operations}
        running.check(Case(cases.CHECKED[4], "last", operations=ALL))
        assert {text for text in running.faults.values() if "no float64" not in text} == set()


def test_a_result_wrong_by_a_thousandth_is_found_out_and_not_timed(fakes: Any) -> None:
    with session(fakes("right"), fakes("wrong")) as running:
        for dtype in cases.DTYPES:
            result = measure(running, Case((40, 30), dtype=dtype, operations=ALL))
            right, wrong = ([cell for cell in result.cells if cell.row == row] for row in ("right", "wrong"))
            assert [len(cell.seconds) for cell in right] == [3] * len(ALL)
            assert [cell.seconds for cell in wrong] == [[]] * len(ALL)
            assert all(
                re.fullmatch(rf"wrong: y of forward is off by \S+ ulp of {dtype}, 256 are allowed", cell.failed)
                for cell in wrong
            )
            assert f"    wrong{'':<23}   wrong: y of forward" in report.cpu_block(result, 2)


@pytest.mark.parametrize("what", ALL)
@pytest.mark.parametrize("ours", [True, False])
def test_each_result_wrong_by_a_thousandth_is_a_fault(what: str, ours: bool) -> None:
    case = Case(cases.CHECKED[3], "last", operations=(what,))
    truth = check.truths(np, make_problem(case))[what]
    exact = [exact.astype("f4") for _, exact, _ in truth]

    def fault(got: list[Any]) -> str:
        return check.fault(np, got, truth, case, ours=ours, of=f" of {what}")

    assert fault(exact) == ""
    for index, (name, _, _) in enumerate(truth):
        spoiled = [values * np.float32(1 + 1e-3 * (i == index)) for i, values in enumerate(exact)]
        assert f"wrong: {name} of {what} is off by" in fault(spoiled)
    assert "has shape (336,), not (8, 7, 6)" in fault([exact[0].ravel(), *exact[1:]])


def test_who_crashes_leaves_raises_or_hangs_costs_only_its_rows(fakes: Any) -> None:
    names = ("right", "crashing", "leaving", "exploding", "hanging", "talking")
    with session(*map(fakes, names)) as running:
        running.workers["hanging"].limit = 0.5
        large = measure(running, Case((400, 30), operations=("forward",)))
        after = measure(running, Case((20, 4), operations=("forward",)))
    assert running.faults == {}  # all of them are right
    failed = {cell.row: cell.failed for cell in large.cells}
    assert failed == {
        "right": "",
        "crashing": "ended by signal 9",
        "leaving": "Fatal: no such luck",
        "exploding": "MemoryError: no room",
        "hanging": "no answer within 0.5 s",
        "talking": "",  # what a library prints is no answer
    }
    timed = {cell.row: len(cell.seconds) for cell in after.cells}
    assert timed == {"right": 3, "crashing": 0, "leaving": 0, "exploding": 3, "hanging": 0, "talking": 3}


def test_a_library_that_cannot_be_imported_costs_only_its_rows(fakes: Any) -> None:
    with session(fakes("needy", "Needy", ("no_such_package",)), fakes("right")) as running:
        result = measure(running, Case((20, 4), operations=("forward",)))
    assert [(cell.row, len(cell.seconds)) for cell in result.cells] == [("Needy", 0), ("right", 3)]
    assert "ModuleNotFoundError: No module named 'no_such_package'" in result.cells[0].failed


def test_a_worker_that_waits_uses_no_processor_time() -> None:
    worker = Worker(functools.partial(Work, ARRAYBN.contestants), ENVIRONMENT)
    try:
        assert worker.answer() == {}
        worker.ask("open", case=Case((300, 4, 100), operations=("forward",)))
        worker.ask("prepare", contestant="new", operation="forward")
        worker.ask("time", contestant="new", operation="forward", calls=3, warm=0)
        times = Path(f"/proc/{worker._process.pid}/stat")
        if not times.exists():
            pytest.skip("this system does not tell how long another process has worked")
        before = ticks(times)
        time.sleep(0.5)
        assert ticks(times) - before <= 2  # of some fifty
    finally:
        worker.stop()


def ticks(stat: Path) -> int:
    """How long a process has worked, as Linux counts."""
    return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))


def test_a_case_that_memory_has_no_room_for_is_skipped_with_a_word(monkeypatch: pytest.MonkeyPatch, fakes: Any) -> None:
    monkeypatch.setattr(session_module, "available_memory", lambda: 10**6)
    rounds: list[int] = []
    progress = Progress()
    monkeypatch.setattr(progress, "step", lambda: rounds.append(1))
    with Session([fakes("right")], 2, progress=progress) as running:
        result = measure(running, Case((1000, 1000)))
        small = measure(running, Case((20, 4), operations=("forward",)))
    assert result.skipped == "skipped: needs about 0.1 GB of memory, 0.0 GB are available"
    assert (result.cells, len(rounds)) == ([], 4)
    assert result.skipped in report.cpu_block(result, 2)
    assert [len(cell.seconds) for cell in small.cells] == [2]
    assert memory_needed(Case((1000, 1000)), [ARRAYBN, *PEERS[1:3]]) == (3 * (3 + 16) + 8) * 4 * 10**6


# ---- What follows from the samples -----------------------------------------------------------------------------------


def made_up() -> Result:
    case = Case((32, 64, 10, 10))
    seconds = {"numpy.copyto": 1e-4, "arraybn, out=": 1.5e-4, "arraybn": 2e-4, "PyTorch": 8e-4}
    found = [
        Cell("x", row, what, seconds=[value * f for f in (0.9, 1.0, 1.2)])
        for row, value in seconds.items()
        for what in (("copy",) if row == "numpy.copyto" else ("forward", "eval"))
    ]
    return Result(case, [*found, Cell("y", "JAX", "forward", failed="ended by signal 9")])


def test_ratios_and_speeds_follow_from_medians_and_bytes() -> None:
    result = made_up()
    found = {(one["row"], one["what"]): one for one in report.as_json(result, report.figures)["rows"]}
    bytes_of_x = 32 * 64 * 100 * 4
    forward = found["PyTorch", "forward"]
    assert (forward["ratio"], forward["copy_ratio"]) == (pytest.approx(4), pytest.approx(8))
    assert forward["gb_per_s"] == pytest.approx(2 * bytes_of_x / 8e-4 / 1e9)
    assert forward["copy_fraction"] == pytest.approx(1 / 8)
    assert found["numpy.copyto", "copy"]["copy_fraction"] == pytest.approx(1)
    assert (found["JAX", "forward"]["median"], found["JAX", "forward"]["failed"]) == (None, "ended by signal 9")


def test_a_block_has_a_heading_for_each_what_and_a_line_for_each_row() -> None:
    lines = report.cpu_block(made_up(), 2).splitlines()
    assert lines[1] == "(32, 64, 10, 10) float32, channels-first, 0.8 MB"
    assert lines[2].startswith("  numpy.copyto of x, 2 threads: 0.100 ms (0.095–0.110), 16.4 GB/s")
    headings = [line.split("  ")[1].strip() for line in lines if "quartiles" in line]
    assert headings == ["forward (training)", "backward", "forward (evaluation)"]
    (torch,) = [line for line in lines[: lines.index("", 4)] if line.startswith("    PyTorch")]
    assert torch.split()[1:] == ["0.800", "0.760–0.880", "4.00", "2.0", "12%", "8.00"]
    assert "    JAX                            ended by signal 9" in lines


@pytest.mark.parametrize(("others", "warned"), [(None, False), (0.0, False), (0.1, False), (0.9, True)])
def test_a_machine_that_others_use_is_warned_of(others: float | None, warned: bool) -> None:
    assert ("other programs kept 0.9 of 2 cores busy" in report.company(others, 2)) == warned


def test_the_work_of_others_is_seen_and_ours_is_not_taken_for_it() -> None:
    watch = machine.ForeignLoad()
    end = time.perf_counter() + 0.4
    while time.perf_counter() < end:
        sum(range(1000))
    busy = watch.cores()
    assert busy is None or 0 <= busy < (os.cpu_count() or 1) + 0.1
    assert machine.processor()
    assert machine.cores() >= 1
    assert machine.version("numpy") == np.__version__
    assert machine.version("no_such_package") == ""


def test_the_memory_of_a_container_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert machine.container_memory(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.container_memory(tmp_path) is None
    free = machine.available_memory()
    assert free is None or free > 0


# ---- The command -----------------------------------------------------------------------------------------------------


SMALL = shlex.split(
    "--shapes 24,6,5,4 40,30 --layout first last --dtype float32 float64 --peers numpy reference --repeats 3"
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Any, Path]:
    """One run for all who look at it: what it printed, what is in its JSON, and where its files are."""
    folder = tmp_path_factory.mktemp("table")
    plot = ["--plot", "bench.png"] if has_matplotlib() else []
    result = run(*SMALL, "--what", *ALL, "--json", "found.json", *plot, cwd=folder)
    assert (result.returncode, result.stderr) == (0, "")
    return result, json.loads((folder / "found.json").read_text(encoding="utf-8")), folder


def has_matplotlib() -> bool:
    try:
        need("matplotlib")
    except pytest.skip.Exception:
        return False
    return True


def test_the_head_says_where_with_what_and_how_to_get_it_again(table: Any) -> None:
    head = table[0].stdout.split("\n\n")[0]
    assert re.search(r", \d+ cores?, arraybn uses \d+ threads?; ", head)
    assert f"arraybn {arraybn.__version__}, NumPy {np.__version__}" in head
    assert re.search(r"^copy limit: [\d.]+ GB/s \(numpy.copyto by \d+ threads?, [\d.]+ MB: ", head, re.MULTILINE)
    assert re.search(rf"^again: python -m arraybn bench {' '.join(SMALL[:3])} ", head, re.MULTILINE)


def test_every_case_and_row_is_in_the_table_and_in_the_json(table: Any) -> None:
    result, found, _ = table
    for case in (Case(tuple(one["shape"]), one["layout"], one["dtype"]) for one in found["table"]):
        assert f"\n{case}" in result.stdout
    assert len(found["table"]) == 6
    for one in found["table"]:
        rows = [row["row"] for row in one["rows"] if row["what"] == "forward"]
        assert rows == ["arraybn, out=", "arraybn", "arraybn reference", "NumPy formulas"]
        assert all(len(row["seconds"]) == 3 and row["failed"] is None for row in one["rows"])
    assert re.search(r"Checked first, on 6 small batches, .* 4 \(y\) and 12\s\(gradients\)\sin\sfloat32", result.stdout)


def test_the_figures_of_the_json_can_be_computed_again(table: Any) -> None:
    found = table[1]
    for one in found["table"]:
        medians = {(row["row"], row["what"]): float(np.median(row["seconds"])) for row in one["rows"]}
        copy = medians["numpy.copyto", "copy"]
        for row in one["rows"]:
            median = medians[row["row"], row["what"]]
            moved = found["passes"][row["what"]] * one["bytes_of_x"]
            assert row["median"] == pytest.approx(median)
            assert row["gb_per_s"] == pytest.approx(moved / median / 1e9)
            assert row["copy_ratio"] == pytest.approx(median / copy)
            assert row["copy_fraction"] == pytest.approx(moved / (2 * one["bytes_of_x"]) * copy / median)
            ours = medians.get(("arraybn", row["what"]))
            assert row["ratio"] == (None if ours is None else pytest.approx(median / ours))
    assert found["copy_limit"]["gb_per_s"] > 0
    assert found["interrupted"] is False


def test_the_picture_is_there_and_not_empty(table: Any) -> None:
    need("matplotlib")
    assert_picture(table[2] / "bench.png")
    assert "bench.png: the table" in table[0].stdout


def assert_picture(path: Path) -> None:
    picture = path.read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 1000
    assert height > 500
    assert 20_000 < len(picture) < 1_000_000


def test_growth_and_ladder_are_tables_and_pictures_of_their_own(tmp_path: Path) -> None:
    need("numba")
    need("matplotlib")
    small = (
        "import arraybn.bench.ladder as l\n"
        "l.CASE = l.Case((4, 8, 10, 10), operations=('forward', 'backward'))\nsys.modules['tqdm'] = None"
    )
    options = shlex.split("--growth 1e4 --ladder --peers none --repeats 3 --json - --plot both.png")
    result = run(*options, cwd=tmp_path, preparation=small)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)  # and nothing else is there
    shapes = [(10, 10, 10), (32, 10, 10), (100, 10, 10), (10, 32, 10), (10, 100, 10), (10, 10, 32), (10, 10, 100)]
    for layout in cases.LAYOUTS:
        assert [tuple(one["shape"]) for one in found["growth"] if one["layout"] == layout] == shapes
    (case,) = found["ladder"]
    copies = {row["row"]: row["median"] for row in case["rows"] if row["what"] == "copy"}
    assert [(rung["row"], rung["what"]) for rung in found["rungs"]] == [
        (step.row, what) for what in ("forward", "backward") for step in ladder.STEPS
    ]
    for rung in found["rungs"]:
        (step,) = [step for step in ladder.STEPS if step.row == rung["row"]]
        total = getattr(step, rung["what"]).total
        assert rung["moved"] == total * 4 * 8 * 100 * 4
        assert rung["predicted"] == pytest.approx(total / 2 * copies[ladder.COPIES[step.alone]])
        (row,) = [row for row in case["rows"] if (row["row"], row["what"]) == (rung["row"], rung["what"])]
        assert rung["measured"] == row["median"] is not None
    assert_picture(tmp_path / "both.png")
    assert_picture(tmp_path / "both-ladder.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both-ladder.png", "both.png"]


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT can be sent to one process")
def test_ctrl_c_prints_what_was_measured_and_leaves_no_process_behind(tmp_path: Path) -> None:
    options = ["--shapes", "40,30", "20000,30", "--peers", "none", "--repeats", "1000000", "--json", "found.json"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits one that is ignored
    try:
        command = [sys.executable, "-m", "arraybn", "bench", *options]
        child = subprocess.Popen(command, cwd=tmp_path, env=environment(), **pipes)
    finally:
        signal.signal(signal.SIGINT, before)
    with child:
        try:
            assert child.stdout is not None
            assert any(line.startswith("again: ") for line in child.stdout)
            time.sleep(12)  # the first case lasts for minutes, and its worker needs seconds to start on a busy machine
            child.send_signal(signal.SIGINT)
            stdout, stderr = child.communicate(timeout=30)
        finally:
            child.kill()
    assert child.returncode == 130
    assert stderr == "interrupted; the figures are of what was measured before\n"
    assert re.search(r"^    arraybn +[\d.]+ +[\d.]+–[\d.]+ +1\.00$", stdout, re.MULTILINE)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["interrupted"] is True
    assert [one["shape"] for one in found["table"]] == [[40, 30]]
    workers = [path for path in Path("/proc").glob("[0-9]*/environ") if environment_is_of(path, child.pid)]
    assert workers == []


def environment_is_of(path: Path, parent: int) -> bool:
    """Whether the process is a child of that one."""
    try:
        return f"PPid:\t{parent}\n" in (path.parent / "status").read_text()
    except OSError:
        return False


def test_it_works_without_any_peer_numba_tqdm_and_matplotlib(bare_site: Path) -> None:
    result = bare(bare_site, "bench", "--shapes", "40,30", "--repeats", "3")
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert 'numba is missing, so arraybn is measured by its reference:  pip install "arraybn[cpu]"' in result.stdout
    assert re.search(r"^    arraybn +[\d.]+ +[\d.]+–[\d.]+ +1\.00$", result.stdout, re.MULTILINE)
    assert "  PyTorch: pip install torch" in result.stdout
    assert "arraybn reference" not in result.stdout
    for option, missing in (("--ladder", "--ladder needs numba"), ("--plot", "--plot needs matplotlib")):
        refused = bare(bare_site, "bench", option)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert missing in refused.stderr


# ---- Growth and ladder: the pieces -----------------------------------------------------------------------------------


def test_growth_goes_from_a_thousand_to_as_many_elements_as_are_asked_for_along_each_axis() -> None:
    for axis, index in zip("NCS", range(3), strict=True):
        shapes = growth.shapes(axis, 10**8)
        assert shapes[0] == (10, 10, 10)
        assert np.prod(shapes[-1]) == 10**8
        assert all(shape[i] == 10 for shape in shapes for i in range(3) if i != index)
        assert [int(np.prod(shape)) for shape in shapes][::2] == [10**power for power in range(3, 9)]
    assert len(growth.cases(10**8)) == 2 * (3 * 11 - 2)  # (10, 10, 10) once in each layout
    assert growth.cases(10**3) == [Case((10, 10, 10), one, operations=("forward", "backward")) for one in cases.LAYOUTS]


def test_growth_along_an_axis_is_time_by_elements() -> None:
    results = [Result(case, [Cell("a", "arraybn", "forward", seconds=[1e-3])]) for case in growth.cases(10**4)]
    results[-1] = Result(results[-1].case, skipped="skipped: needs about 3.0 GB of memory, 2.0 GB are available")
    lines = growth.table(results).splitlines()
    along = [line for line in lines if line.startswith("(10, 10, ")]
    assert [line.split()[3:] for line in along if "skipped" not in line] == [
        *[["1.0e3", "–", "1e+03", "–"]] * 5,  # the first of each axis is the same case
        ["3.2e3", "–", "312", "–"],
        ["1.0e4", "–", "100", "–"],
        ["1.0e3", "–", "1e+03", "–"],
        ["3.2e3", "–", "312", "–"],
    ]
    assert sum("channels-first" in line for line in lines) == sum("channels-last" in line for line in lines) == 3
    assert f"(10, 10, 100)              1.0e4   {results[-1].skipped}" in lines


class Counted(np.ndarray[Any, Any]):
    """An array that counts what NumPy reads and writes of large arrays, in bytes."""

    reads = writes = 0
    large = 0

    @classmethod
    def count(cls, sources: Any, targets: Any) -> None:
        once = {id(one): one for one in sources}.values()  # x·x reads x once
        cls.reads += sum(one.nbytes for one in once if isinstance(one, np.ndarray) and one.nbytes > cls.large)
        cls.writes += sum(one.nbytes for one in targets if isinstance(one, np.ndarray) and one.nbytes > cls.large)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        plain = [one.view(np.ndarray) if isinstance(one, Counted) else one for one in inputs]
        if out is not None:
            options["out"] = tuple(one.view(np.ndarray) if isinstance(one, Counted) else one for one in out)
        result = getattr(ufunc, method)(*plain, **options)
        self.count(inputs, [result])
        return result.view(Counted) if isinstance(result, np.ndarray) else result

    def astype(self, dtype: Any, *, copy: bool = True, **options: Any) -> Any:
        if not copy and self.dtype == dtype:
            return self
        result = self.view(np.ndarray).astype(dtype, **options)
        self.count([self], [result])
        return result.view(Counted)


@pytest.fixture
def counted() -> Any:
    """A problem whose x and dy are counted, and a function that counts in units of x what a call moves."""
    problem = make_problem(Case((64, 4, 32, 32)))
    Counted.large = problem.x.nbytes // 1000
    problem = problem._replace(x=problem.x.view(Counted), dy=problem.dy.view(Counted))

    def count(call: Any) -> tuple[float, float]:
        Counted.reads = Counted.writes = 0
        call()
        return Counted.reads / problem.x.nbytes, Counted.writes / problem.x.nbytes

    return problem, count


def test_the_bytes_of_plain_formulas_are_those_that_numpy_moves(counted: Any) -> None:
    problem, count = counted
    calls = formulas.host_calls(HostDevice(), problem, "").operations
    for what, traffic in (("forward", ladder.STEPS[0].forward), ("backward", ladder.STEPS[0].backward)):
        assert count(calls[what]) == (traffic.reads, traffic.writes)


def test_the_bytes_of_the_reference_are_those_that_numpy_moves(counted: Any) -> None:
    problem, count = counted
    x, dy = (array.reshape(64, 4, 1024) for array in (problem.x, problem.dy))
    one = np.ones(4)

    def forward() -> None:
        mean, _ = reference.moments(x)
        reference.affine(x, np.asarray(mean), one, one)

    def backward() -> None:
        reference.dots(dy, x, one)
        reference.affine2(dy, x, one, one, one, one)

    for call, traffic in ((forward, ladder.STEPS[1].forward), (backward, ladder.STEPS[1].backward)):
        assert count(call) == (pytest.approx(traffic.reads, rel=0.02), pytest.approx(traffic.writes, rel=0.02))


def test_each_later_step_of_the_ladder_moves_fewer_bytes_down_to_what_must_be() -> None:
    for what in ("forward", "backward"):
        totals = [getattr(step, what).total for step in ladder.STEPS[2:]]
        assert totals == sorted(totals, reverse=True)
        assert totals[-1] == cases.PASSES[what]
        assert getattr(ladder.STEPS[4], what).total == cases.PASSES[what] + 1  # the pages of the result
        inputs = cases.PASSES[what] - 1  # which two sweeps read twice
        assert getattr(ladder.STEPS[2], what).total == cases.PASSES[what] + 1 + inputs


def test_the_sweeps_of_the_ladder_do_without_the_driver_and_alone_means_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need("numba")
    from arraybn import kernels
    from arraybn.kernels import cpu

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("the driver")

    for name, value in list(vars(cpu).items()):
        if inspect.isfunction(value) and value.__module__ == cpu.__name__ and name not in SWEEPS and name[0] != "_":
            monkeypatch.setattr(cpu, name, refuse)
    monkeypatch.setattr(kernels, "backend", functools.cache(kernels.backend.__wrapped__))  # a record made anew
    x = make_problem(Case((40, 6))).x
    with pytest.raises(AssertionError, match="the driver"):
        arraybn.batch_norm(x, kernels="cpu")
    y, saved = arraybn.batch_norm(x, kernels=ladder.sweeps_only())
    dx, _, _ = arraybn.batch_norm_backward(y, saved)
    assert dx.shape == y.shape == x.shape
    before = _threads.get_num_threads()
    assert ladder.on_one_thread(_threads.get_num_threads)() == 1
    assert _threads.get_num_threads() == before


# ---- Sets: the layers of networks ------------------------------------------------------------------------------------


def test_the_layers_of_a_network_come_at_four_batches_in_both_layouts() -> None:
    (section,) = cpu.plan(parsed("--set", "resnet18", "resnet50", "--peers", "none"))
    found = [(case.shape, case.layout) for case in section.cases]
    assert len(found) == len(set(found)) == 12 * 4 * 2  # ResNet-50 has every layer that ResNet-18 has
    assert {shape[0] for shape, _ in found} == {1, 4, 8, 32}
    assert {layout for _, layout in found} == {"first", "last"}
    assert ((1, 2048, 7, 7), "last") in found
    assert {case.operations for case in section.cases} == {("forward", "backward", "eval")}
    (section,) = cpu.plan(parsed(*shlex.split("--set cache --layout last --dtype bfloat16 --what eval --peers none")))
    assert [(case.shape, case.layout, case.operations) for case in section.cases] == [
        (shape, "first" if len(shape) == 2 else "last", ("eval",)) for shape in networks.CACHE
    ]


@pytest.mark.parametrize(("line", "names"), [("--set cache", ["arraybn", "aten"]), ("--growth", ["arraybn", "aten"])])
def test_a_set_and_growth_stand_beside_the_operators_of_pytorch(line: str, names: list[str]) -> None:
    (section,) = cpu.plan(parsed(*shlex.split(line)))
    present = [peer.name for peer in PEERS if not peer.missing]
    assert [library.name for library in section.libraries] == [one for one in names if one in ("arraybn", *present)]


def test_a_set_tells_how_many_times_the_time_of_its_rival_arraybn_takes() -> None:
    def result(batch: int, layout: str, *seconds: float) -> Result:
        rows = ("arraybn, out=", "arraybn", "JAX", "PyTorch operators")
        cells = [Cell("x", row, "forward", seconds=[time]) for row, time in zip(rows, seconds, strict=True)]
        return Result(Case((batch, 4, 7, 7), layout, operations=("forward",)), cells)

    results = [result(1, "first", 1e-5, 9, 9, 2e-5), result(4, "first", 3e-5, 9, 9, 2e-5)]
    results += [result(8, "first", 1e-5, 9, 9, 1e-5), result(1, "last", 5e-5, 9, 9, 2e-5)]
    line = re.sub(" +", " ", networks.line(results[1]))
    assert line == "(4, 4, 7, 7) float32, channels-first 30.00 20.00 1.50"
    text = networks.summary(results)
    worst = "1.50 at (4, 4, 7, 7) float32, channels-first"
    assert re.search(rf"forward \(training\) +channels-first +1\.00 +1 of 3 +{re.escape(worst)}$", text, re.MULTILINE)
    assert re.search(
        r"channels-last +2\.50 +1 of 1 +2\.50 at \(1, 4, 7, 7\) float32, channels-last$", text, re.MULTILINE
    )
    assert networks.rival([Result(results[0].case, results[0].cells[:3])]) == "JAX"
    assert networks.rival([]) is None
    results[0].cells[3].failed, results[0].cells[3].seconds = "wrong: y", []
    assert networks.line(results[0]).endswith("–      –\n  PyTorch operators: wrong: y")


def test_a_set_is_measured_printed_and_drawn(tmp_path: Path) -> None:
    need("matplotlib")
    small = "import arraybn.bench.networks as n\nn.CACHE = ((64, 128), (4, 6, 5, 5))\nsys.modules['tqdm'] = None"
    options = shlex.split("--set cache --peers numpy --repeats 3 --json found.json --plot set.png")
    result = run(*options, cwd=tmp_path, preparation=small)
    assert (result.returncode, result.stderr) == (0, "")
    assert "arraybn, out= beside NumPy formulas [µs, medians]" in result.stdout
    assert (
        len(re.findall(r"^\(4, 6, 5, 5\) float32, channels-(?:first|last) +([\d.]+ *){9}$", result.stdout, re.M)) == 2
    )
    assert len(json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["set"]) == 3
    assert_picture(tmp_path / "set.png")


def test_the_latest_results_stay_alive_while_more_are_made() -> None:
    """Otherwise the memory of a new array is the one that the result before has just given back."""
    made: list[weakref.ref[Any]] = []

    def build(device: HostDevice, problem: Problem, name: str) -> Calls:
        def forward() -> Any:
            result = np.zeros_like(problem.x)
            made.append(weakref.ref(result))
            return result

        return Calls({"forward": forward}, lambda result: result)

    work = Work([Contestant("new", "new", "numpy", build)])
    work.open(case := Case((8, 4), operations=("forward",)))
    work.prepare("new", "forward")
    work.time("new", "forward", calls=40, warm=2)
    assert [one() is not None for one in made[-case.alive - 1 :]] == [False, *[True] * case.alive]
    assert (case.alive, Case((32, 64, 112, 112)).alive, Case((32, 512, 14, 14)).alive) == (16, 2, 16)
    work.close()
    assert all(one() is None for one in made)


@pytest.mark.parametrize(
    ("words", "program", "absent"),
    [(["bench", "sync", "--help"], "bench sync", "--ladder"), (["bench", "-h"], "bench", "with 1, 2, 4, 8 ranks")],
)
def test_bench_sync_has_a_help_of_its_own(
    words: list[str], program: str, absent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(words)
    out = capsys.readouterr().out
    assert out.startswith(f"usage: python -m arraybn {program} [-h]")
    assert absent not in out
    assert all(option in out for option in ("--quick", "--repeats", "--json", "--plot"))
    assert ("with 1, 2, 4, 8 ranks" in " ".join(out.split())) == ("sync" in words)

"""The first call: one line while kernels are compiled, and one process that compiles for all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.commands import Result, environment, python
from support.kernels import COMPILED
from support.libraries import need

need("numba")

from arraybn.kernels.cpu import compiling, entries  # noqa: E402

pytestmark = pytest.mark.skipif(not COMPILED, reason="nothing is compiled")

FIRST_CALL = """
import numpy, arraybn
batch = arraybn.Moments(5, numpy.ones(1), numpy.ones(1))
arraybn.update_running_stats(numpy.zeros(1), numpy.ones(1), batch, 0.5)  # soon compiled
"""
SECOND_DTYPE = "arraybn.update_running_stats(numpy.zeros(1, 'f4'), numpy.ones(1, 'f4'), batch, 0.5)"
LINE = "arraybn: compiling the kernels for NumPy arrays takes some seconds, once; they are kept in "


def two_calls(cache: Path) -> Result:
    code = f"{FIRST_CALL}{SECOND_DTYPE}"
    result = python("-c", code, cwd=cache.parent, NUMBA_CACHE_DIR=str(cache), ARRAYBN_QUIET="")
    assert (result.returncode, result.stdout) == (0, "")
    return result


# ---- The line ----


def test_one_line_says_that_kernels_are_compiled_and_none_that_they_are_loaded(tmp_path: Path) -> None:
    cold = two_calls(tmp_path / "cache")
    assert cold.stderr.startswith(LINE + str(tmp_path / "cache"))
    assert cold.stderr.count("\n") == 1
    assert two_calls(tmp_path / "cache").stderr == ""


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        ("", {"ARRAYBN_QUIET": "1"}),
        ("import logging; logging.getLogger('arraybn').setLevel(logging.ERROR)", {}),
        ("import logging; logging.getLogger('arraybn').addHandler(logging.NullHandler())", {}),
    ],
)
def test_the_line_is_switched_off(before: str, changes: dict[str, str], tmp_path: Path) -> None:
    code = f"{before}\nfrom arraybn.kernels.cpu import compiling\ncompiling.announce('folder')"
    result = python("-c", code, cwd=tmp_path, **{"ARRAYBN_QUIET": "", **changes})
    assert (result.returncode, result.stderr) == (0, "")


# ---- One process for all ----


def test_of_processes_that_start_together_one_compiles(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys, time
from arraybn.kernels.cpu import entries
save = entries._Cache.save_overload
def counted(*arguments):
    print("compiled")
    save(*arguments)
entries._Cache.save_overload = counted
ready = pathlib.Path({str(tmp_path)!r})
(ready / f"{{sys.argv[1]}}.ready").touch()
while len(list(ready.glob("*.ready"))) < 3:
    time.sleep(0.001)
{FIRST_CALL}
print("done")
"""
    cache = tmp_path / "cache"

    def start(name: str) -> str:
        return python("-c", code, name, cwd=tmp_path, NUMBA_CACHE_DIR=str(cache)).stdout

    with ThreadPoolExecutor(3) as pool:
        printed = sorted(pool.map(start, "abc"))
    assert printed == ["compiled\ndone\n", "done\n", "done\n"]
    assert not list(cache.rglob("*.lock"))


def waits(_: float) -> None:
    raise AssertionError("it waits")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the lock until it is killed."""
    pytest.importorskip("fcntl")
    code = "import sys, time\nfrom arraybn.kernels.cpu.compiling import turn\n"
    code += "with turn(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_process_that_compiles_for_ever_is_not_waited_for(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    monkeypatch.setattr(compiling.time, "sleep", naps.append)
    monkeypatch.setattr(compiling.time, "monotonic", lambda: 10.0 * len(naps))
    with compiling.turn(str(tmp_path / "lock")):
        assert len(naps) == compiling.PATIENCE / 10.0


def test_a_process_that_died_while_it_compiled_is_not_waited_for(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / "lock").exists()
    monkeypatch.setattr(compiling.time, "sleep", waits)
    with compiling.turn(str(tmp_path / "lock")):
        pass
    assert not (tmp_path / "lock").exists()


def test_where_nothing_can_be_locked_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.time, "sleep", waits)
    with compiling.turn(str(tmp_path / "missing" / "lock")):
        pass

    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    for lock in (None, type("fcntl", (), {"LOCK_EX": 2, "LOCK_NB": 4, "LOCK_UN": 8, "flock": staticmethod(refuse)})):
        monkeypatch.setattr(compiling, "fcntl", lock)
        with compiling.turn(str(tmp_path / "lock")):
            pass


def test_the_lock_ends_with_its_turn_even_if_a_forked_child_lives_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fcntl")
    path = str(tmp_path / "lock")
    held = []

    def keep(file: Any) -> bool:
        held.append(os.dup(file.fileno()))  # as a fork does
        return lock(file)

    lock = compiling._lock
    monkeypatch.setattr(compiling, "_lock", keep)
    with compiling.turn(path):
        os.link(path, tmp_path / "same file")
    monkeypatch.setattr(compiling.time, "sleep", waits)
    with compiling.turn(str(tmp_path / "same file")):
        pass
    for number in held:
        os.close(number)


# ---- The demonstration ----


def test_the_demo_compiles_before_it_looks_at_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sklearn", "tqdm", "threadpoolctl"):
        need(module)
    from arraybn.commands import _demo_training as demo

    events: list[str] = []
    make, clock = entries._compile, demo.time.perf_counter

    def compile_(*arguments: Any) -> Any:
        events.append("compile")
        return make(*arguments)

    def perf_counter() -> float:
        events.append("clock")
        return clock()

    fresh = entries.Compiled(entries._STORED["f"])
    monkeypatch.setattr(entries, "_compile", compile_)
    monkeypatch.setattr("arraybn.kernels.cpu.compiled", lambda dtype: fresh)
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=perf_counter))  # helpers look, too
    monkeypatch.setattr(demo, "LEARNING_RATES", (0.1,))
    digits = demo.Digits(*(part[:64] for part in demo.load_digits(0)))
    demo.train_all(digits, 1, 0, np)
    assert events[0] == "compile"
    clocks = [index for index, event in enumerate(events) if event == "clock"]
    assert len(clocks) == 4
    for start, end in zip(clocks[::2], clocks[1::2], strict=True):
        assert end == start + 1, events

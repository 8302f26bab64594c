"""The process of one library in ``python -m arraybn bench``; it waits for questions, and its threads rest meanwhile.

``python -m arraybn.commands._bench_worker MODULE:FUNCTION PACKAGE …`` reads questions from stdin and writes answers to
stdout, each a line of JSON: "start" imports the packages, "check" returns the results of a small case, "prepare" makes
the arrays of a case and calls everything until it is compiled, "time" measures, and the end of stdin is the end.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .._arrays.copies import as_numpy
from ._bench_cases import Case, make_problem
from ._bench_contestants import Call, Prepared

SAMPLE = 0.002  # seconds that a sample takes at least, so that the clock is no part of it
CHEAP = 0.05  # seconds; a call up to this is made once before those that are timed
Answer = dict[str, Any]


class Work:
    """What the process holds between two questions."""

    def __init__(self, build: str, packages: list[str]) -> None:
        self.build, self.packages = build, packages
        self.prepared: Prepared | None = None

    def start(self) -> Answer:
        """Import everything."""
        for name in self.packages:
            importlib.import_module(name)
        self._builder()
        return {}

    def _builder(self) -> Callable[..., Prepared]:
        module, _, name = self.build.partition(":")
        found: Callable[..., Prepared] = getattr(importlib.import_module(module), name)
        return found

    def check(self, case: Case) -> Answer:
        """What every call returns: for each row and what it does, its arrays, those like x as (N, C, *S)."""
        prepared = self._builder()(make_problem(case))
        return {
            "rows": {
                name: calls
                if isinstance(calls, str)
                else {what: _outcome(calls[what], prepared.read) for what in case.whats if what in calls}
                for name, calls in prepared.rows.items()
            }
        }

    def prepare(self, case: Case) -> Answer:
        """Make the calls and warm them up; for each row and what it does, how often a sample calls it."""
        self.prepared = None  # so that never two cases are in memory
        gc.collect()
        self.prepared = self._builder()(make_problem(case))
        wanted = ("copy", *case.whats)
        return {
            "rows": {
                name: calls
                if isinstance(calls, str)
                else {what: _often(calls[what]) for what in wanted if what in calls}
                for name, calls in self.prepared.rows.items()
            }
        }

    def time(self, row: str, what: str, calls: int, warm: int) -> Answer:
        """Seconds that one call took, on the average of `calls`."""
        assert self.prepared is not None
        found = self.prepared.rows[row]
        assert not isinstance(found, str)
        seconds = _seconds(found[what], calls, warm)
        _rest()
        return {"seconds": seconds}


def _outcome(call: Call, read: Callable[[Any], Any]) -> Any:
    """The arrays that it returns, as [shape, values]; or why it returns none."""
    try:
        with np.errstate(all="ignore"):
            result = call()
        arrays = [as_numpy("result", one) for one in (result if isinstance(result, tuple) else (result,))]
        arrays = [array if array.ndim == 1 else read(array) for array in arrays]
    except Exception as error:
        return _text(error)
    return [[array.shape, array.ravel().astype("f8").tolist()] for array in arrays]


def _often(call: Call) -> Any:
    """Calls in a sample and calls before it, after calling it until it is no longer getting faster; or why not."""
    times: list[float] = []
    try:
        while len(times) < 2 or (len(times) < 10 and times[-1] < 0.8 * min(times[:-1]) and sum(times) < 1):
            times.append(_seconds(call, 1, 0))
        if min(times) < SAMPLE:
            times.append(_seconds(call, 10, 3))
    except Exception as error:
        return _text(error)
    calls = max(1, math.ceil(SAMPLE / min(times)))
    return [calls, math.ceil(calls / 10) if min(times) < CHEAP else 0]


def _seconds(call: Call, calls: int, warm: int) -> float:
    """The time of one call. A result is there until the clock has stopped, or the next one has come."""
    for _ in range(warm):
        call()
    collecting = gc.isenabled()
    gc.disable()
    try:
        result = None
        start = time.perf_counter()
        for _ in itertools.repeat(None, calls):
            result = call()
        seconds = (time.perf_counter() - start) / calls
        del result
    finally:
        if collecting:
            gc.enable()
    return seconds


def _rest() -> None:
    """Wait until the threads of the library no longer spin, at most a quarter of a second."""
    deadline = time.perf_counter() + 0.25
    while time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(0.002)
        if time.process_time() - before < 0.0005:
            return


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def main(build: str, packages: list[str]) -> None:
    """Answer until nobody asks any more."""
    serve(Work(build, packages), Case)


def serve(work: Any, kind: type[Case]) -> None:
    """Answer each question by the method of `work` that it names; a case in it is of that kind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")  # for the answers alone
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        if "case" in question:
            question["case"] = kind.of(question["case"])
        try:
            answer = getattr(work, question.pop("do"))(**question)
        except Exception as error:
            answer = {"error": _text(error)}
        print(json.dumps(answer), file=channel, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

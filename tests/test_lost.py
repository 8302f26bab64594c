"""Ranks that die, under Open MPI with fault tolerance: the scenarios of tests/mpi/lost.py, each with a time limit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi import faults
from support.commands import arraybn_command
from support.libraries import REQUIRED
from support.ranks import ROOT, Job, Mpi, mpi_of, variables

import arraybn
from arraybn.network import SGD, Linear
from arraybn.sync import lost
from arraybn.testing import ThreadComm

ULFM = ("--with-ft", "ulfm")
LIMIT = 60  # seconds, for each job; its ranks end themselves after 50


@pytest.fixture(scope="module")
def open_mpi() -> Mpi:
    python = os.environ.get("ARRAYBN_OPENMPI_PYTHON", "")
    if not python:
        pytest.skip("ARRAYBN_OPENMPI_PYTHON names no Python with Open MPI")
    found = mpi_of(python)
    if found is None:
        assert "mpi4py" not in REQUIRED, "no mpirun"
        pytest.skip("there is no mpirun")
    return found


def said(mpi: Mpi, folder: Path, scenario: str, module: bool = True) -> tuple[dict[int, list[str]], str]:
    """Return the lines that each rank has written in a scenario, and the text of the job."""
    job = Job(mpi, 4, "lost.py", scenario, str(folder), module=module, options=ULFM)
    _, text = job.ended(LIMIT)  # the status of this mpirun says nothing about its ranks
    assert "Signal: Alarm clock" not in text, text
    return {int(file.name): file.read_text().splitlines() for file in sorted(folder.iterdir())}, text


LEFT = {  # the ranks that are left, of 4, and what each says of the loss
    "one-forward": (
        {0, 1, 3},
        r"lost 2 in step 5: rank 2 of 4 died, as rank \d noticed in the forward of layer '1' .*",
    ),
    "one-backward": ({0, 1, 3}, r"lost 2 in step 5: .* in the backward of layer '1' .*; the step is undone\. .*"),
    "one-average": (  # rank 2 has done its backward; another rank may notice its end while still in that backward
        {0, 1, 3},
        r"lost 2 in step 5: .* in the (average_gradients of the model|backward of layer '1') .*",
    ),
    "one-own": ({0, 1, 3}, r"lost 2 in step 5: .* in the step; the step is undone\. .*"),
    "one-update": ({0, 1, 3}, r"lost 2 in step 5: .* in the end of the step .*; the step is undone\. .*"),
    "one-end": ({0, 1, 3}, r"lost 2 in step 5: .* in the end of the step .*; the step is undone\. .*"),
    "zero": ({1, 2, 3}, r"lost 0 in step 5: .*"),
    "two": ({0, 2}, r"lost 1 3 in step 5: ranks 1, 3 of 4 died, .*|lost [123] in step [56]: .*"),
    "two-late": ({0, 2}, r"lost 1 3 in step 5: .*|lost [123] in step 5: .*"),
    "three": ({2}, r"lost 0 1 3 in step 5: ranks 0–1, 3 of 4 died, .*|lost [0-3 ]+ in step 5: .*"),
    "recovery-begin": ({0, 2}, r"lost 1 3 in step 5: .*"),
    "recovery-agreed": ({0, 2}, r"lost 1 3 in step 5: .*"),
    "recovery-shrunk": ({0, 2}, r"lost 1 3 in step 5: .*"),
    "recovery-done": ({0, 2}, r"lost 3 in step 5: rank 3 of 4 .*|lost 1 in step 5: rank 1 of 3 .*"),
    "broadcast": ({0, 1, 3}, r"lost 2 in step 0: .* in the broadcast_state of .*; the call has changed nothing\. .*"),
    "broadcast-again": ({0, 1, 3}, r"lost 2 in step 0: .*; the call has changed nothing\. .*"),
    "split": ({0, 1, 3}, r"lost 2 in step 5: .* in the end of the step .*; the step is undone\. .*"),
    "split-call": ({0, 1, 3}, r"lost 2 in step 0: .* in the broadcast_state of .*; the call has changed nothing\. .*"),
    "errs": ({0, 2, 3}, r"lost 1 in step 5: .*"),
    "exits": ({0, 2, 3}, r"lost 1 in step 5: .*"),
}


@pytest.mark.parametrize("scenario", LEFT)
def test_the_step_is_done_again_with_the_bits_of_a_run_that_had_the_ranks_left(
    open_mpi: Mpi, scenario: str, tmp_path: Path
) -> None:
    ranks, loss = LEFT[scenario]
    lines, text = said(open_mpi, tmp_path, scenario)
    assert set(lines) == ranks, text
    for own in lines.values():
        assert len(own) >= 3, text
        assert all(re.fullmatch(loss, line) for line in own[:-2]), own
        assert re.fullmatch(rf"end: {len(ranks)} ranks, 12 batches, \w{{64}}", own[-2])
        assert own[-1] == "the bits of a run with these ranks"
    assert len({own[-2] for own in lines.values()}) == 1  # the same state on all


def test_a_call_that_is_no_step_is_done_by_all_ranks_or_by_none(open_mpi: Mpi, tmp_path: Path) -> None:
    lines, text = said(open_mpi, tmp_path, "without")
    assert set(lines) == {0, 1, 3}, text
    assert len({own[0].partition(":")[0] for own in lines.values()}) == 1  # lost in the same call
    assert len({own[1] for own in lines.values()}) == 1
    assert lines[0][1].startswith("end: 3 ranks, 59 batches, ")


def test_layers_over_groups_of_ranks_notice_as_well(open_mpi: Mpi, tmp_path: Path) -> None:
    lines, text = said(open_mpi, tmp_path, "groups")
    assert set(lines) == {0, 1, 3}, text
    for own in lines.values():
        assert own[0].startswith("lost 2 in step 5: rank 2 of 4 died, ")
        assert own[1].startswith("end: 3 ranks, 6 batches")


def test_the_last_rank_goes_on_alone(open_mpi: Mpi, tmp_path: Path) -> None:
    lines, text = said(open_mpi, tmp_path, "down-to-one")
    assert lines[1][-1].startswith("end: 1 ranks, 12 batches"), text
    assert [line.partition(":")[0] for line in lines[1][:-1]] == [
        "lost 0 in step 5",
        "lost 1 in step 6",
        "lost 1 in step 8",
    ]


def test_a_rank_that_ends_with_an_error_without_mpi4py_run_is_lost_too(open_mpi: Mpi, tmp_path: Path) -> None:
    lines, text = said(open_mpi, tmp_path, "errs", module=False)
    assert set(lines) == {0, 2, 3}
    assert "ValueError: a bug of the user's" in text


def test_an_error_that_nobody_catches_ends_every_rank(open_mpi: Mpi, tmp_path: Path) -> None:
    lines, text = said(open_mpi, tmp_path, "uncaught")
    assert lines == {}
    assert text.count("arraybn.sync.RankLostError: rank 2 of 4 died") == 3


def test_who_gives_up_is_lost_to_the_rank_that_comes_late(open_mpi: Mpi, tmp_path: Path) -> None:
    lines, text = said(open_mpi, tmp_path, "gives-up")
    assert lines == {1: ["lost 0 2 3 alone"]}, text
    assert text.count("arraybn: a synchronized call was given up; ending this rank") == 3


def test_a_recovery_that_does_not_end_ends_the_ranks_that_wait(open_mpi: Mpi, tmp_path: Path) -> None:
    lines, text = said(open_mpi, tmp_path, "stuck")
    assert lines == {1: ["slept"]}, text
    ended = "to find out which ranks are left has not ended within 1 s: a rank is left that makes no synchronized call"
    assert text.count(ended) == 2


def test_the_script_of_the_page_goes_on_without_the_rank_that_dies(open_mpi: Mpi, tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how-to/lost-rank.md").read_text(), re.DOTALL)
    dies = "        if index == 30 and MPI.COMM_WORLD.rank == 2:\n            signal.raise_signal(signal.SIGKILL)\n"
    place = "        index += 1\n"
    assert script.count(place) == 1
    script = script.replace("model.npz", str(tmp_path / "model.npz"))
    (tmp_path / "train.py").write_text("import signal\n" + script.replace(place, place + dies))
    _, text = Job(open_mpi, 4, str(tmp_path / "train.py"), options=ULFM).ended(LIMIT)
    assert len(re.findall(r"^rank 2 of 4 died, as rank \d noticed in .*; the step is undone", text, re.MULTILINE)) == 3
    assert "92 steps, 3 ranks at the end" in text
    assert arraybn.load(tmp_path / "model.npz")["1.num_batches_tracked"] == 92


def test_a_long_training_with_random_deaths_and_restarts(open_mpi: Mpi, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "soak.py"), str(tmp_path), "--python", open_mpi.python]
    words = ("--steps", "120", "--longest", "60", "--seed", "6")
    run = subprocess.run(
        ["timeout", "-k", "5", "150", *command, *words], capture_output=True, text=True, env=variables(), check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    deaths = re.findall(
        r"^passed 120 steps: \{'jobs': \d+, 'crashed': \d+, 'losses': \d+, 'deaths': (\d+)\}", run.stdout, re.MULTILINE
    )
    assert int(deaths[0]) >= 1


# ---- Without MPI -----------------------------------------------------------------------------------------------------


class Recovering:
    """A reducer of threads under fault tolerance, where rank 2 has died when the ranks agree."""

    def __init__(self, reducer: Any, survivors: Any) -> None:
        self._reducer, self.survivors, self.revoked = reducer, survivors, 0
        self.recovery = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def agree(self, deadline: float | None) -> None:
        raise ConnectionError("rank 2 has died")

    def revoke(self) -> None:
        self.revoked += 1

    def recover(self, limit: float | None) -> tuple[list[int], Any]:
        return [2], self.survivors


def test_a_step_that_is_undone_leaves_every_part_as_it_was() -> None:
    def work(comm: Any) -> None:
        survivors = ThreadComm.run(1, lambda one: one)[0]
        comm.exchange.reducer = Recovering(comm.exchange.reducer, survivors)
        model: Any = arraybn.Sequential(Linear(3, 2, rng=np.random.default_rng(0)), arraybn.BatchNorm1d(2))
        model[0].weight.grad = np.full_like(model[0].weight.data, 0.5)
        optimizer, rng = SGD(model.parameters(), 0.1, momentum=0.5), np.random.default_rng(1)
        optimizer.step()
        before = faults.state(model), {**optimizer.state_dict()}, rng.bit_generator.state

        def change() -> None:
            with arraybn.sync.step(model, optimizer, rng, comm=comm):
                model(rng.standard_normal((4, 3)))
                model.zero_grad()
                model[0].weight.data *= 2  # in place
                model[0].weight.grad = np.ones_like(model[0].weight.data)
                optimizer.step()
                optimizer.lr = 0.7

        with pytest.raises(arraybn.RankLostError) as caught:
            change()
        assert (caught.value.lost, caught.value.survivors) == ((2,), survivors)
        assert faults.state(model) == before[0]
        assert rng.bit_generator.state == before[2]
        for name, value in optimizer.state_dict().items():
            np.testing.assert_array_equal(value, before[1][name], strict=True)
        assert comm.exchange.reducer.revoked == 1
        with pytest.raises(arraybn.SyncError, match=r"^rank 2 died; go on over the communicator RankLostError\.surv"):
            arraybn.broadcast_state(model, comm)

    ThreadComm.run(2, work)


def test_a_step_within_a_step_is_refused() -> None:
    def work(comm: Any) -> None:
        comm.exchange.reducer = Recovering(comm.exchange.reducer, comm)
        with arraybn.sync.step(comm=comm), arraybn.sync.step(comm=comm):
            pass

    with pytest.raises(RuntimeError, match="step: expected no step within a step; got one"):
        ThreadComm.run(2, work)


def test_without_fault_tolerance_a_step_copies_and_sends_nothing() -> None:
    def work(comm: Any) -> int:
        model: Any = Linear(3, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lost, "_restorer", None)  # would fail
            with arraybn.sync.step(model, comm=comm):
                model.weight.data *= 2
        return int(comm.exchange.calls)

    assert ThreadComm.run(2, work) == [0, 0]


def test_what_is_no_state_or_no_communicator_is_refused() -> None:
    with pytest.raises(TypeError, match=r"state: expected a Module, a numpy\.random\.Generator, or .*; got list"):
        arraybn.sync.step([1], comm=None).__enter__()
    with pytest.raises(ValueError, match="timeout: expected a number of seconds"):
        arraybn.sync.step(comm=None, timeout=0).__enter__()
    layer = arraybn.SyncBatchNorm(2)
    with pytest.raises(TypeError, match="model: expected a Module; got int"):
        arraybn.sync.continue_with(1, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="survivors: expected the communicator of a RankLostError; got None"):
        arraybn.sync.continue_with(layer, None)
    with pytest.raises(TypeError, match="survivors: expected an mpi4py communicator, or None for the world; got int"):
        arraybn.sync.continue_with(layer, 3)
    assert layer.process_group is None


def test_every_synchronized_layer_gets_the_survivors() -> None:
    comm = ThreadComm.run(1, lambda one: one)[0]
    model = arraybn.Sequential(arraybn.SyncBatchNorm(2), arraybn.Sequential(arraybn.SyncBatchNorm(2)), Linear(2, 2))
    arraybn.sync.continue_with(model, comm)
    groups = [getattr(module, "process_group", "none") for module in model.modules()]
    assert groups == [
        "none",
        comm,
        "none",
        comm,
        "none",
    ]


# ---- The demonstration -----------------------------------------------------------------------------------------------

DEMO = ("demo", "--data-parallel", "--lose-a-rank", "--epochs", "1")


@pytest.fixture
def with_digits(open_mpi: Mpi) -> Mpi:
    """Return Open MPI in an environment that has the digits."""
    code = "import sklearn, tqdm, threadpoolctl"
    if subprocess.run([open_mpi.python, "-c", code], capture_output=True, timeout=60, check=False).returncode:
        assert "sklearn" not in REQUIRED, "scikit-learn is not beside Open MPI"
        pytest.skip("scikit-learn is not beside Open MPI")
    return open_mpi


def test_the_demonstration_ends_with_the_bits_of_two_jobs_without_a_loss(with_digits: Mpi, tmp_path: Path) -> None:
    file = str(tmp_path / "before.npz")
    status, text = Job(with_digits, 4, "digits.py", file, "1").ended(180)
    assert (status, Path(file).exists()) == (0, True), text
    status, text = Job(with_digits, 3, "digits.py", file, "1").ended(180)
    (expected,) = re.findall(r"checksum (\w{64})", text)
    _, text = Job(with_digits, 4, "-m", "arraybn", *DEMO, options=ULFM).ended(180)
    assert re.findall(r"SHA-256 of the state, every rank: (.*)", text) == [expected], text
    assert "step 50: rank 2 of 4 died, as rank 0 noticed in the backward of layer '5'" in text
    assert "on 3 ranks from step 50 on, ends with the same bits" in text


def test_the_command_that_can_lose_a_rank_is_named(open_mpi: Mpi, tmp_path: Path) -> None:
    alone = arraybn_command("demo", "--lose-a-rank", cwd=tmp_path)
    assert (alone.returncode, alone.stdout) == (1, "")
    assert "--lose-a-rank: expected --data-parallel beside it" in alone.stderr
    assert "mpirun --with-ft ulfm -n 4" in alone.stderr
    status, text = Job(open_mpi, 2, "-m", "arraybn", *DEMO).ended(60)
    assert status != 0
    assert text.count("--lose-a-rank needs an MPI that goes on when a rank dies") == 1
    assert "mpirun --with-ft ulfm -n 4" in text
    status, text = Job(open_mpi, 2, "-m", "arraybn", *DEMO, options=ULFM).ended(60)
    assert text.count("--lose-a-rank: expected 3 ranks or more; got 2") == 1

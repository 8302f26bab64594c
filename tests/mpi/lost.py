"""A training in which ranks die: mpirun --with-ft ulfm -n P python -m mpi4py lost.py SCENARIO FOLDER.

Every rank that is left writes into FOLDER/RANK: a line for each RankLostError, and its state at the end. Each rank ends
itself after LIMIT seconds, so that nothing can hang. Run by tests/test_lost.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.modules["numba"] = None  # type: ignore[assignment]  # importing it takes longer than all of this

import numpy as np
from mpi4py import MPI

import arraybn
from arraybn.network import SGD, Linear, ReLU
from arraybn.sync import mpi, ulfm

LIMIT, STEPS, SAMPLES, FATAL = 50, 12, 24, 5  # seconds, steps, samples of a step, the step in which ranks die
WORLD = MPI.COMM_WORLD
ME = WORLD.rank
DATA = np.random.default_rng(7)
X, TARGET = DATA.standard_normal((STEPS, SAMPLES, 4)), DATA.standard_normal((STEPS, SAMPLES, 2))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def say(text: object) -> None:
    """Write a line into the file of this rank."""
    with (Path(sys.argv[2]) / str(ME)).open("a") as file:
        print(text, file=file)


class Training:
    """A model with its optimizer and its random numbers, over ranks that may become fewer."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.index, self.rng = comm, 0, np.random.default_rng(3)
        weights = np.random.default_rng(comm.rank)
        layers = Linear(4, 6, rng=weights), arraybn.BatchNorm1d(6), ReLU(), Linear(6, 2, rng=weights)
        self.model: Any = arraybn.Sequential(*layers).to(dtype="float64")
        arraybn.SyncBatchNorm.convert_sync_batchnorm(self.model, comm)
        self.optimizer = SGD(self.model.parameters(), 0.1, momentum=0.9)

    def step(self, at: Callable[[str], object] = lambda place: None) -> None:
        """Do the step of this index; `at` is told the places where a rank may die."""
        x = X[self.index] + self.rng.standard_normal(X[self.index].shape)  # noise, the same on all ranks
        mine = np.array_split(np.arange(SAMPLES), self.comm.size)[self.comm.rank]
        at("forward")
        dy = (self.model(x[mine]) - TARGET[self.index][mine]) * (self.comm.size / SAMPLES)
        self.optimizer.zero_grad()
        at("backward")
        self.model.backward(dy)
        at("average")
        arraybn.average_gradients(self.model, self.comm, weight=1)
        at("own")
        self.comm.allreduce(1)  # of the user's, beside ours
        at("update")
        for parameter in self.model.parameters():
            parameter.data *= 0.999  # writes into the array, as users do
        self.optimizer.step()
        at("end")

    def until(self, last: int, at: Callable[[str], object] = lambda place: None) -> None:
        """Train up to the step of that index, and go on with the ranks that are left when some die."""
        while self.index < last:
            try:
                with arraybn.sync.step(self.model, self.optimizer, self.rng, comm=self.comm):
                    self.step(at if self.index == FATAL else lambda place: None)
                self.index += 1
            except arraybn.RankLostError as error:
                self.go_on(error)

    def go_on(self, error: arraybn.RankLostError) -> None:
        say(f"lost {' '.join(map(str, error.lost))} in step {self.index}: {error}")
        self.comm = error.survivors
        arraybn.sync.continue_with(self.model, self.comm)

    def state(self) -> dict[str, Any]:
        """Return copies of everything that a step changes."""
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        grads = {name: None if p.grad is None else p.grad.copy() for name, p in self.model.named_parameters()}
        return {"model": model, "optimizer": optimizer, "rng": self.rng.bit_generator.state, "grads": grads}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.bit_generator.state = state["rng"]


def digest(state: Any) -> str:
    """Return a hash of arrays and numbers in nested dictionaries, to the bit."""
    if isinstance(state, dict):
        return hashlib.sha256("".join(f"{name}={digest(value)};" for name, value in state.items()).encode()).hexdigest()
    return np.asarray(state).tobytes().hex() if not isinstance(state, int | str | None) else repr(state)


def finish(training: Training, before: dict[str, Any]) -> None:
    """Train to the end, and compare with a training that had these ranks from the fatal step on."""
    training.until(STEPS)
    other = Training(training.comm.Dup())
    other.load(before)
    other.index = FATAL
    while other.index < STEPS:  # without `step`, and with the calls of the comparison alone
        other.step()
        other.index += 1
    ours, theirs = digest(training.state()), digest(other.state())
    say(f"end: {training.comm.size} ranks, {training.model[1].num_batches_tracked} batches, {ours}")
    say("the bits of a run with these ranks" if ours == theirs else f"OTHER BITS than {theirs}")


# ---- Death at a place within a step ----


def dies(*ranks: int, place: str, late: float = 0.0) -> None:
    """Let these ranks die at that place of the fatal step."""

    def at(here: str) -> None:
        if here == place and ME in ranks and WORLD.size == training.comm.size:
            time.sleep(late * ranks.index(ME))
            die()

    training = Training(WORLD)
    arraybn.broadcast_state(training.model, WORLD)
    training.until(FATAL)
    before = training.state()
    training.until(FATAL + 1, at)
    finish(training, before)


def sees_an_error_alone(training: Training) -> None:
    """Let rank 2 die when the next frame is complete, and rank 1 alone see an error, as MPI gives it to some ranks."""
    allreduce = mpi.Reducer.allreduce

    def split(*arguments: Any) -> None:
        allreduce(*arguments)
        if training.comm.size == WORLD.size and ME == 2:
            die()
        if training.comm.size == WORLD.size and ME == 1:
            raise ConnectionError("seen by this rank alone")

    mpi.Reducer.allreduce = split  # type: ignore[method-assign]


def split_step() -> None:
    training = Training(WORLD)
    arraybn.broadcast_state(training.model, WORLD)
    training.until(FATAL)
    before = training.state()
    training.until(FATAL + 1, lambda place: sees_an_error_alone(training) if place == "end" else None)
    finish(training, before)


def split_call() -> None:
    training = Training(WORLD)
    arraybn.broadcast_state(training.model, WORLD)
    sees_an_error_alone(training)
    broadcast_until_done(training)
    finish_from_the_start(training)


def in_recovery(when: str) -> None:
    """Let rank 3 die in the backward, and rank 1 in the recovery from that."""
    if ME == 1:
        shrunk = ulfm.shrunk

        def dying(module: Any, comm: Any, agreed: bool) -> Any:
            with contextlib.suppress(MPI.Exception):
                if when in ("agreed", "shrunk"):
                    comm.Agree(0)
                if when == "shrunk":
                    comm.Shrink()
            if when == "done":  # the others have recovered, and their first call over the survivors fails
                shrunk(module, comm, agreed)
            die()

        ulfm.shrunk = dying
    dies(3, place="backward")


# ---- Death outside a step ----


def in_broadcast() -> None:
    """Let rank 2 die before the very first call, so that there is no duplicate."""
    training = Training(WORLD)
    broadcast_until_done(training, ME == 2)
    finish_from_the_start(training)


def between_broadcasts() -> None:
    training = Training(WORLD)
    arraybn.broadcast_state(training.model, WORLD)
    training.model[0].weight.data = training.model[0].weight.data + ME
    broadcast_until_done(training, ME == 2)
    weights = training.comm.allgather(training.model[0].weight.data)
    assert all(np.array_equal(weights[0], other) for other in weights)
    finish_from_the_start(training)


def broadcast_until_done(training: Training, dead: bool = False) -> None:
    while True:
        own = digest(training.state())
        try:
            if dead:
                die()
            arraybn.broadcast_state(training.model, training.comm)
            return
        except arraybn.RankLostError as error:
            assert digest(training.state()) == own, "a call that raises has changed something"
            training.go_on(error)


def finish_from_the_start(training: Training) -> None:
    training.until(FATAL)
    finish(training, training.state())


def without_a_step() -> None:
    """Let rank 2 die between calls that are no step: every call is done by all ranks or by none."""
    training = Training(WORLD)
    arraybn.broadcast_state(training.model, WORLD)
    layer, comm, done, x = training.model[1], WORLD, 0, np.ones((3, 6)) + ME
    for index in range(60):
        if index == 20 and ME == 2:
            die()
        before = layer.num_batches_tracked, layer.running_mean.tobytes()
        try:
            layer(x)
            done += 1
        except arraybn.RankLostError as error:
            assert (layer.num_batches_tracked, layer.running_mean.tobytes()) == before
            say(f"lost {error.lost[0]} in step {index}: {error}")
            comm = error.survivors
            arraybn.sync.continue_with(training.model, comm)
    say(f"end: {comm.size} ranks, {layer.num_batches_tracked} batches, {digest(training.state())}")
    assert done == layer.num_batches_tracked == 59


def groups() -> None:
    """Let rank 2 die where the layers synchronize over pairs of ranks."""
    training = Training(WORLD)
    arraybn.broadcast_state(training.model, WORLD)
    arraybn.SyncBatchNorm.convert_sync_batchnorm(training.model, WORLD.Split(ME // 2, ME))
    training.until(FATAL + 1, lambda place: die() if place == "backward" and ME == 2 and WORLD.size == 4 else None)
    say(f"end: {training.comm.size} ranks, {training.model[1].num_batches_tracked} batches, ")


# ---- The end of a process ----


def down_to_one() -> None:
    """Let one rank after the other die, until one is left."""
    training = Training(WORLD)
    arraybn.broadcast_state(training.model, WORLD)
    training.until(FATAL)
    while training.index < STEPS:
        dead = {FATAL: 0, FATAL + 1: 2, FATAL + 3: 3}.get(training.index)
        if dead == ME:
            die()
        training.until(training.index + 1)
    say(f"end: {training.comm.size} ranks, {training.model[1].num_batches_tracked} batches, ")


def errs() -> None:
    """Let rank 1 raise an error that nobody catches; the other ranks go on."""
    training = Training(WORLD)
    arraybn.broadcast_state(training.model, WORLD)

    def at(place: str) -> None:
        if place == "backward" and ME == 1:
            raise ValueError("a bug of the user's")

    training.until(FATAL)
    before = training.state()
    training.until(FATAL + 1, at)
    finish(training, before)


def exits() -> None:
    """Let rank 1 leave by sys.exit; the other ranks go on."""
    training = Training(WORLD)
    arraybn.broadcast_state(training.model, WORLD)
    training.until(FATAL)
    before = training.state()
    training.until(FATAL + 1, lambda place: sys.exit("wrong data") if place == "backward" and ME == 1 else None)
    finish(training, before)


def uncaught() -> None:
    """Catch no RankLostError: every rank ends with it."""
    training = Training(WORLD)
    arraybn.broadcast_state(training.model, WORLD)
    with arraybn.sync.step(training.model, comm=WORLD):
        training.step(lambda place: die() if place == "average" and ME == 2 else None)


def gives_up() -> None:
    """Let rank 1 skip a call: the other ranks give up, and then end, and rank 1 goes on alone."""
    training = Training(WORLD)
    arraybn.broadcast_state(training.model, WORLD)
    training.model[1].timeout = 1.0
    if ME == 1:
        time.sleep(3)
    try:
        training.model[1](np.ones((2, 6)))
    except arraybn.RankLostError as error:
        say(f"lost {' '.join(map(str, error.lost))} alone")


def stuck() -> None:
    """Let rank 1 make no further call, so that the recovery of the others cannot end."""
    training = Training(WORLD)
    arraybn.broadcast_state(training.model, WORLD)
    if ME == 1:
        time.sleep(8)
        say("slept")
        ulfm.end(failed=False)
    with arraybn.sync.step(training.model, comm=WORLD, timeout=1.0):
        training.model[1].timeout = 1.0
        if ME == 2:
            die()
        training.step()


PLACES = "forward", "backward", "average", "own", "update", "end"
SCENARIOS: dict[str, Callable[[], object]] = {
    **{f"one-{place}": (lambda place=place: dies(2, place=place)) for place in PLACES},
    "zero": lambda: dies(0, place="backward"),
    "two": lambda: dies(1, 3, place="update"),
    "two-late": lambda: dies(1, 3, place="backward", late=0.02),
    "three": lambda: dies(0, 1, 3, place="average"),
    **{f"recovery-{when}": (lambda when=when: in_recovery(when)) for when in ("begin", "agreed", "shrunk", "done")},
    "split": split_step,
    "split-call": split_call,
    "broadcast": in_broadcast,
    "broadcast-again": between_broadcasts,
    "without": without_a_step,
    "groups": groups,
    "down-to-one": down_to_one,
    "errs": errs,
    "exits": exits,
    "uncaught": uncaught,
    "gives-up": gives_up,
    "stuck": stuck,
}

if __name__ == "__main__":
    signal.alarm(LIMIT)
    SCENARIOS[sys.argv[1]]()

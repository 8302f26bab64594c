"""``python -m arraybn demo --data-parallel``: the same training on ranks, with synchronized and local batch norm.

Three trainings run side by side, epoch by epoch: rank 0 alone with the whole batch, and all ranks with a part of the
batch each, once with `SyncBatchNorm` and once with layers that see their own part only. They use float64, so that
differences from rounding are far smaller than real differences.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import sync
from .._arrays.copies import as_numpy
from .._install import requirement
from .._plotting import INK, Array, draw_picture
from ..bench.jobs import launcher
from ..kernels.threads import set_num_threads
from ..layers import SyncBatchNorm
from ..modules import Sequential
from ..network import SGD, cross_entropy
from ..sync import average_gradients, broadcast_state
from ._demo_figure import DOTTED, SHADES, write_heading
from ._demo_training import Digits, accuracy, build_network, load_digits, namespace, to_network_device

LEARNING_RATE = 0.1
NAMES = ("one process", "synchronized", "local")  # the trainings

Comm = Any  # mpi4py's

# In the picture one process is a broad line, with dashed synchronized training on top.
LINES: Any = (
    {"color": "#a9cfe8", "linewidth": 7},
    {"color": SHADES[True][3], "linewidth": 1.8, "linestyle": (0, (3, 2))},
    {"color": SHADES[False][2], "linewidth": 1.8},
)


def train(arguments: argparse.Namespace, comm: Comm) -> str:
    """Train on all ranks, print tables and draw on rank 0; return the problem or ''."""
    trainings = _train_all(arguments, comm)
    sums = comm.gather([training.checksum() for training in trainings[1:]])
    if comm.rank != 0:
        return ""
    same = [len(set(column)) == 1 for column in zip(*sums, strict=True)]
    together, local = ("the same bits on all ranks" if equal else "not the same on all ranks" for equal in same)
    print(f"\n{_table(trainings)}\n")
    print(f"Parameters and running statistics: synchronized, {together}; local, {local}.")
    if arguments.no_plot:
        return ""
    picture = arguments.out / "ranks.png"
    try:
        _draw(trainings, comm.size, arguments.data_parallel, picture)
    except OSError as error:  # a full disk or a deleted folder
        return f"cannot write: {error}"
    print(f"{picture}: losses, test accuracies, and how far the parameters are from those of one process")
    return ""


def world() -> Comm:
    """Return the communicator of all ranks; raise a RuntimeError or ImportError if there are fewer than two ranks."""
    try:
        importlib.import_module("mpi4py")
    except ImportError as error:
        install = f"{sys.executable} -m pip install {requirement('mpi')}"
        raise ImportError(f"--data-parallel needs mpi4py ({error}): {install}") from error
    if sync.exchange_over("comm", None) is None:  # raises SyncError where each of several processes is its own world
        mpirun = launcher() or "mpirun"
        command = f"{mpirun} -n 4 {sys.executable} -m mpi4py -m arraybn demo --data-parallel"
        raise RuntimeError(f"--data-parallel: expected 2 ranks or more; this is one process. Run:\n  {command}")
    from mpi4py import MPI

    return MPI.COMM_WORLD


# ---- The trainings ----


@dataclass
class Training:
    """A network, the ranks that train it, and the measurements of rank 0 after each epoch."""

    title: str
    network: Sequential
    comm: Comm | None  # None: this process alone
    losses: list[float] = field(default_factory=list)  # mean over the steps of an epoch and over the ranks
    accuracies: list[float] = field(default_factory=list)  # on the test set, with rank 0's running statistics
    apart: list[float] = field(default_factory=list)  # the largest difference of a parameter from one process

    def epoch(self, digits: Digits, batches: Array) -> float:
        """Train once on every batch, a row of this rank's indices; return the mean loss of this rank's images."""
        losses = []
        optimizer = SGD(self.network.parameters(), LEARNING_RATE)
        self.network.train()
        for batch in batches:
            images, labels = digits.train_images[batch].astype(np.float64), digits.train_labels[batch]
            logits = self.network(to_network_device(self.network, images))
            loss, dlogits = cross_entropy(logits, to_network_device(self.network, labels))
            optimizer.zero_grad()
            self.network.backward(dlogits)
            if self.comm is not None:
                average_gradients(self.network, self.comm, weight=len(batch))
            optimizer.step()
            losses.append(loss)
        return float(np.mean(losses))

    def difference(self, other: Training, *, running: bool = False) -> float:
        """Return the largest difference of a parameter or, with `running`, of a running statistic."""
        ours, theirs = self.host_state(), other.host_state()
        names = [name for name in ours if "batches" not in name and ("running" in name) == running]
        return max(float(np.max(np.abs(ours[name] - theirs[name]))) for name in names)

    def host_state(self) -> dict[str, Array]:
        return {name: as_numpy(name, value) for name, value in self.network.state_dict().items()}

    def checksum(self) -> str:
        return hashlib.sha256(b"".join(value.tobytes() for value in self.host_state().values())).hexdigest()


def _start(comm: Comm, each: int, weights: np.random.Generator, xp: Any) -> list[Training]:
    """Return the three trainings, with the same initial weights, on arrays of `xp`."""
    alone, together, local = (build_network(True, np.random.default_rng(comm.rank)) for _ in NAMES)
    first = build_network(True, weights).state_dict()
    for network in (alone, together, local):
        network.to(xp=xp, dtype="float64")
        if comm.rank == 0:
            network.load_state_dict(first)
    SyncBatchNorm.convert_sync_batchnorm(together, comm)
    for network in (together, local):
        broadcast_state(network, comm)
    return [
        Training(f"one process, batches of {comm.size * each}", alone, None),
        Training(f"{comm.size} ranks × {each}, synchronized batch norm", together, comm),
        Training(f"{comm.size} ranks × {each}, local batch norm", local, comm),
    ]


def _train_all(arguments: argparse.Namespace, comm: Comm) -> list[Training]:
    """Train all three; only rank 0 measures, and shows a progress bar with the losses of about ten epochs above."""
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    digits, epochs, each = load_digits(arguments.seed), arguments.epochs or 12, arguments.data_parallel
    xp, place = namespace(arguments.device, comm)
    if comm.rank == 0:
        ranks = f"ranks: {comm.size}; images of a rank in a step: {each}"
        print(f"Handwritten digits: {digits.sizes}; {ranks}{place}\n")
        print("loss in epoch" + "".join(f"  {name:>14}" for name in NAMES), flush=True)
    set_num_threads(1)  # the ranks share the cores; results do not depend on the number of threads
    weights, shuffler = np.random.default_rng(arguments.seed).spawn(2)
    trainings = _start(comm, each, weights, xp)
    whole = comm.size * each
    hidden = True if comm.rank else None  # None: hidden without a terminal
    with threadpool_limits(1), tqdm(total=epochs, unit="epoch", leave=False, disable=hidden) as bar:
        for number in range(1, epochs + 1):
            order = shuffler.permutation(len(digits.train_images))  # the same on all ranks
            _train_epoch(comm, trainings, digits, order[: len(order) // whole * whole].reshape(-1, whole))
            if comm.rank == 0 and (number in (1, epochs) or number % max(1, epochs // 10) == 0):
                tqdm.write(f"{number:>13}" + "".join(f"  {training.losses[-1]:>14.10f}" for training in trainings))
                sys.stdout.flush()
            bar.update()
    return trainings


def _train_epoch(comm: Comm, trainings: Sequence[Training], digits: Digits, batches: Array) -> None:
    """Train once on every batch, a row of indices, of which each rank takes its part; measure on rank 0."""
    mine = np.split(batches, comm.size, axis=1)[comm.rank]
    for training in trainings:
        if training.comm is not None:
            training.losses.append(comm.allreduce(training.epoch(digits, mine)) / comm.size)
        elif comm.rank == 0:
            training.losses.append(training.epoch(digits, batches))
    if comm.rank == 0:  # in evaluation a SyncBatchNorm does not communicate
        for training in trainings:
            test = digits.test_images.astype(np.float64), digits.test_labels
            training.accuracies.append(accuracy(training.network, *test))
            training.apart.append(training.difference(trainings[0]))


# ---- The results ----


def _table(trainings: Sequence[Training]) -> str:
    lines = [
        "                                                               largest difference from one process in",
        f"{'training':<36}  final loss  test accuracy  {'loss':>10}  {'parameters':>10}  running statistics",
    ]
    alone = trainings[0]
    for training in trainings:
        line = f"{training.title:<36}  {training.losses[-1]:>10.4f}  {training.accuracies[-1]:>13.1%}"
        if training is not alone:
            loss = np.max(np.abs(np.subtract(training.losses, alone.losses)))
            running = training.difference(alone, running=True)
            line += f"  {loss:>10.1e}  {training.apart[-1]:>10.1e}  {running:>18.1e}"
        lines.append(line)
    return "\n".join(lines)


def _draw(trainings: Sequence[Training], ranks: int, each: int, path: Path) -> None:
    """Draw losses, accuracies and differences into a PNG file, which is complete or not there at all."""
    curves: dict[str, list[Any]] = {
        "training loss": [training.losses for training in trainings],
        "test accuracy [%]": [[100 * value for value in training.accuracies] for training in trainings],
        "difference of parameters from one process": [np.maximum(training.apart, 1e-17) for training in trainings],
    }

    def fill(figure: Any) -> None:
        figure.set_layout_engine("constrained", rect=(0.02, 0.02, 0.96, 0.71), wspace=0.06)
        row = figure.subplots(1, 3)
        for axes, (heading, values) in zip(row, curves.items(), strict=True):
            for training, numbers, line in zip(trainings, values, LINES, strict=True):
                axes.plot(range(1, len(numbers) + 1), numbers, label=training.title, **line)
            axes.set(xlim=(1, max(2, len(trainings[0].losses))), xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            write_heading(axes, heading, INK)
        figure.legend(handles=row[0].lines, loc="upper left", bbox_to_anchor=(0.022, 0.835), ncols=3, frameon=False)
        row[2].lines[0].remove()  # one process does not differ from itself
        rounding = row[2].axhline(2**-52, label="rounding of 1 in float64", **DOTTED)
        row[2].set(yscale="log", ylim=(1e-17, 30))
        row[2].legend(handles=[rounding], loc="center right", frameon=False)

    text = f"Handwritten digits, {ranks} ranks with {each} images each in a step, against one process with all"
    text = f"{text} {ranks * each}: the same weights at the start, the same images"
    draw_picture(path, (12.4, 5), "Training over MPI ranks", text, fill)

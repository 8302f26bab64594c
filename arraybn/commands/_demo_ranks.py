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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import sync
from .._arrays.copies import as_numpy
from .._plotting import GREY, INK, STYLE, save
from ..kernels.threads import set_num_threads
from ..layers import SyncBatchNorm
from ..modules import Sequential
from ..network import SGD, cross_entropy
from ..sync import average_gradients, broadcast_state
from . import _demo_machine, info
from ._demo_figure import COLOR, write_heading
from ._demo_machine import to_network_device
from ._demo_training import Digits, accuracy, build_network, load_digits

LEARNING_RATE = 0.1
ALONE, TOGETHER, LOCAL = "one process", "synchronized", "local"  # the trainings
COMMAND = "{mpirun} -n 4 {python} -m mpi4py -m arraybn demo --data-parallel"

Array = np.ndarray[Any, Any]
Comm = Any  # mpi4py's
Axes = Any  # matplotlib's: the library is imported only when a picture is drawn

# In the picture one process is a broad line, with dashed synchronized training on top.
LINES: Any = (
    {"color": "#a9cfe8", "linewidth": 7},
    {"color": "#003f66", "linewidth": 1.8, "linestyle": (0, (3, 2))},
    {"color": COLOR[False], "linewidth": 1.8},
)


# ---- The trainings ---------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """A network, the ranks that train it, and the measurements of rank 0 after each epoch."""

    name: str
    network: Sequential
    comm: Comm | None  # None: this process alone
    losses: list[float] = field(default_factory=list)  # mean over the steps of an epoch and over the ranks
    accuracies: list[float] = field(default_factory=list)  # on the test set, with rank 0's running statistics
    apart: list[float] = field(default_factory=list)  # the largest difference of a parameter from one process

    def epoch(self, images: Array, labels: Array, batches: Array) -> float:
        """Train once on every batch, a row of this rank's indices; return the mean loss of this rank's images."""
        losses = []
        optimizer = SGD(self.network.parameters(), LEARNING_RATE)
        self.network.train()
        for batch in batches:
            logits = self.network(to_network_device(self.network, images[batch]))
            loss, dlogits = cross_entropy(logits, to_network_device(self.network, labels[batch]))
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
        """Return the network's state on this rank, in host memory."""
        return {name: as_numpy(name, value) for name, value in self.network.state_dict().items()}

    def checksum(self) -> str:
        """Return the SHA-256 of the network's state."""
        return hashlib.sha256(b"".join(value.tobytes() for value in self.host_state().values())).hexdigest()


def start(comm: Comm, seed: int, xp: Any = np) -> list[Training]:
    """Return the three trainings, with the same initial weights, on arrays of `xp`."""
    weights, _ = np.random.default_rng(seed).spawn(2)
    others = [build_network(True, np.random.default_rng(comm.rank)) for _ in range(3)]
    networks = [network.to(xp=xp, dtype="float64") for network in others]
    if comm.rank == 0:
        state = build_network(True, weights).state_dict()
        for network in networks:
            network.load_state_dict(state)
    SyncBatchNorm.convert_sync_batchnorm(networks[1], comm)
    for network in networks[1:]:
        broadcast_state(network, comm)
    names = (ALONE, TOGETHER, LOCAL)
    return [Training(*one) for one in zip(names, networks, (None, comm, comm), strict=True)]


def train(
    comm: Comm,
    digits: Digits,
    *,
    each: int,
    epochs: int,
    seed: int,
    progress: Callable[[list[Training], int], object],
    xp: Any = np,
) -> list[Training]:
    """Train all three; only rank 0 has the complete measurements.

    Parameters
    ----------
    comm : mpi4py communicator
    digits : Digits
    each : int
        Images of a rank in a step. Images that do not fill the last step of an epoch are left out.
    epochs, seed : int
    progress : callable
        Called on rank 0 after each epoch, with the trainings and the epoch's number.
    xp : namespace
        The namespace of the arrays.
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
        if comm.rank == 0:  # in evaluation a SyncBatchNorm does not communicate
            for training in trainings:
                test = digits.test_images.astype(np.float64), digits.test_labels
                training.accuracies.append(accuracy(training.network, *test))
                training.apart.append(training.difference(trainings[0]))
            progress(trainings, number)
    return trainings


def title(training: Training, ranks: int, each: int) -> str:
    """Describe a training, as in 'one process, batches of 8'."""
    if training.comm is None:
        return f"one process, batches of {ranks * each}"
    return f"{ranks} ranks × {each}, {training.name} batch norm"


# ---- The picture: does it train as one process does? ---------------------------------------------------------------


def draw(trainings: Sequence[Training], ranks: int, each: int, path: Path) -> None:
    """Draw losses, accuracies and differences into a PNG file, which is complete or not there at all.

    Parameters
    ----------
    trainings : sequence of Training
        One process, synchronized, local.
    ranks, each : int
        The number of ranks, and the number of images of each rank in a step.
    path : Path
        The file. An existing file is replaced once the new one is complete.
    """
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure

    with rc_context({**rcParamsDefault, **STYLE}):
        figure = Figure(figsize=(12.4, 4.6), dpi=120, facecolor="white")
        row = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.045, right=0.985, top=0.66, bottom=0.11, wspace=0.2)
        figure.text(0.025, 0.915, "Training over MPI ranks", fontsize=17, weight="bold")
        text = f"Handwritten digits, {ranks} ranks with {each} images each in a step, against one process with all"
        figure.text(0.025, 0.85, f"{text} {ranks * each}: the same weights at the start, the same images", color=GREY)
        _draw_curves(row[0], "training loss", [training.losses for training in trainings])
        accuracies = [100 * np.asarray(training.accuracies) for training in trainings]
        _draw_curves(row[1], "test accuracy [%]", accuracies)
        _draw_apart(row[2], trainings)
        _write_legend(figure, trainings, ranks, each)
        save(figure, path)


def _draw_curves(axes: Axes, heading: str, curves: Sequence[Any]) -> None:
    for values, line in zip(curves, LINES, strict=True):
        axes.plot(range(1, len(values) + 1), values, **line)
    _finish(axes, heading, len(curves[0]))


def _draw_apart(axes: Axes, trainings: Sequence[Training]) -> None:
    """Draw the distances from one process, on a log scale that reaches down to rounding errors."""
    for training, line in list(zip(trainings, LINES, strict=True))[1:]:
        axes.plot(range(1, len(training.apart) + 1), np.maximum(training.apart, 1e-17), **line)
    axes.set(yscale="log", ylim=(1e-17, 30))
    axes.axhline(2**-52, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)
    words: Any = {"textcoords": "offset points", "color": GREY, "fontsize": 8.5}
    axes.annotate("rounding of 1 in float64", (1, 2**-52), (3, -11), **words)
    _finish(axes, "difference of parameters from one process", len(trainings[0].losses))


def _finish(axes: Axes, heading: str, epochs: int) -> None:
    axes.set(xlim=(1, max(epochs, 2)), xlabel="epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    write_heading(axes, heading, INK)


def _write_legend(figure: Any, trainings: Sequence[Training], ranks: int, each: int) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=title(training, ranks, each), **line)
        for training, line in zip(trainings, LINES, strict=True)
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.018, 0.83), ncols=3, frameon=False, handlelength=3
    )


# ---- The command -----------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Train on all ranks, print tables and draw on rank 0; return 1 if a requirement is missing."""
    plot: bool = not arguments.no_plot
    arguments.epochs = arguments.epochs or 12
    try:
        comm = world()
        problem = _demo_machine.missing_libraries(plot) or _demo_machine.device_problem(arguments.device)
        if comm.rank == 0:
            problem = problem or _demo_machine.folder_problem(arguments.out)
        problem = next(filter(None, comm.allgather(problem)), "")
    except (RuntimeError, ImportError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    if problem:
        if comm.rank == 0:
            print(f"demo: {problem}", file=sys.stderr)
        return 1
    digits = load_digits(arguments.seed)
    xp = _demo_machine.namespace(arguments.device, comm)
    trainings = _train_and_show(comm, digits, arguments, xp)
    sums = comm.gather([training.checksum() for training in trainings[1:]])
    if comm.rank != 0:
        return 0
    print(f"\n{table(trainings, comm.size, arguments.data_parallel)}\n\n{_bits(sums)}")
    try:
        return _draw(trainings, comm.size, arguments.data_parallel, arguments.out) if plot else 0
    except OSError as error:  # a full disk or a deleted folder
        print(f"demo: cannot write: {error}", file=sys.stderr)
        return 1


def world() -> Comm:
    """Return the communicator of all ranks; raise a RuntimeError or ImportError if there are fewer than two ranks."""
    command = COMMAND.format(mpirun=info.launcher() or "mpirun", python=sys.executable)
    try:
        importlib.import_module("mpi4py")
    except ImportError as error:
        raise ImportError(
            f'--data-parallel needs mpi4py ({error}): {sys.executable} -m pip install "arraybn[mpi]"'
        ) from error
    if sync.exchange_over("comm", None) is None:  # raises SyncError where each of several processes is its own world
        raise RuntimeError(f"--data-parallel: expected 2 ranks or more; this is one process. Run:\n  {command}")
    from mpi4py import MPI

    return MPI.COMM_WORLD


def _train_and_show(comm: Comm, digits: Digits, arguments: argparse.Namespace, xp: Any) -> list[Training]:
    """Train; rank 0 shows a progress bar, and the losses of about ten epochs above the bar."""
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    epochs, each = arguments.epochs, arguments.data_parallel
    if comm.rank == 0:
        sizes = f"{len(digits.train_labels)} to train on, {len(digits.test_labels)} to test on"
        ranks = f"ranks: {comm.size}; images of a rank in a step: {each}"
        print(f"Handwritten digits: {sizes}; {ranks}{_demo_machine.device_text(xp)}", flush=True)
        print(f"\nloss in epoch  {ALONE:>14}  {TOGETHER:>14}  {LOCAL:>14}", flush=True)

    def progress(trainings: list[Training], number: int) -> None:
        if number in (1, epochs) or number % max(1, epochs // 10) == 0:
            losses = "".join(f"  {training.losses[-1]:>14.10f}" for training in trainings)
            tqdm.write(f"{number:>13}{losses}")
            sys.stdout.flush()
        bar.update()

    set_num_threads(1)  # the ranks share the cores; results do not depend on the number of threads
    hidden = True if comm.rank else None  # None: hidden without a terminal
    with threadpool_limits(1), tqdm(total=epochs, unit="epoch", leave=False, disable=hidden) as bar:
        return train(comm, digits, each=each, epochs=epochs, seed=arguments.seed, progress=progress, xp=xp)


def table(trainings: Sequence[Training], ranks: int, each: int) -> str:
    """Return the table of losses, accuracies and differences, one line for each training."""
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
    """Return a sentence that says if all ranks have the same bits."""
    together, local = (len(set(column)) == 1 for column in zip(*sums, strict=True))
    same = {True: "the same bits on all ranks", False: "not the same on all ranks"}
    return f"Parameters and running statistics: synchronized, {same[together]}; local, {same[local]}."


def _draw(trainings: Sequence[Training], ranks: int, each: int, out: Path) -> int:
    picture = out / "ranks.png"
    draw(trainings, ranks, each, picture)
    print(f"{picture}: losses, test accuracies, and how far the parameters are from those of one process")
    return 0

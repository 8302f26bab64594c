"""``python -m arraybn demo``: a small network learns to read handwritten digits, with and without batch norm."""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import checkpoint
from .._arrays.copies import as_numpy
from ..layers import BatchNorm1d, BatchNorm2d
from ..modules import Module, Sequential
from ..network import SGD, Conv2d, Flatten, Linear, ReLU, cross_entropy
from ..reference import Moments
from ..statistics import moments
from . import _demo_device
from ._demo_device import DEVICES, beside

HELP = "train on handwritten digits with and without batch norm: a table, a picture, a saved network"
DESCRIPTION = (
    "Train one small convolutional network on scikit-learn's 1,797 handwritten digits, with and without batch norm, at"
    " several learning rates. Prints a table, draws demo.png, and saves the network with batch norm that has the lowest"
    " training loss as best.npz."
)

LEARNING_RATES = (0.01, 0.1, 0.5, 2.0)
BATCH = 32  # images in a step
PERCENTILES = (5, 25, 50, 75, 95)  # of what enters the hidden ReLU, recorded at every step

Array = np.ndarray[Any, Any]


# ---- Data and network ----


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8), float32 in 0 … 1, and labels (N,), 0 … 9."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array


def load_digits(seed: int) -> Digits:
    """scikit-learn's bundled digits, a fifth of each class held out for the test."""
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = model_selection.train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    train_images, test_images, train_labels, test_labels = parts
    return Digits(train_images, train_labels, test_images, test_labels)


def build_network(batch_norm: bool, rng: np.random.Generator) -> Sequential:
    """The network; with or without its two batch norms the other weights that `rng` draws are the same."""
    convolution = Conv2d(1, 16, 3, padding=1, rng=rng)
    hidden = Linear(16 * 8 * 8, 64, rng=rng)
    output = Linear(64, 10, rng=rng)
    if batch_norm:
        return Sequential(convolution, BatchNorm2d(16), ReLU(), Flatten(), hidden, BatchNorm1d(64), ReLU(), output)
    return Sequential(convolution, ReLU(), Flatten(), hidden, ReLU(), output)


# ---- Training and evaluation ----


@dataclass
class History:
    """What was seen at each step of a training."""

    steps: int  # in an epoch
    losses: list[float] = field(default_factory=list)  # of the batch
    spreads: list[Array] = field(default_factory=list)  # PERCENTILES of what enters the hidden ReLU

    @property
    def diverged(self) -> bool:
        """Whether the loss is no longer a number."""
        return not np.isfinite(self.losses[-1])

    @property
    def epoch_losses(self) -> Array:
        """The mean loss of each epoch that came to its end."""
        complete = len(self.losses) // self.steps * self.steps
        means: Array = np.reshape(self.losses[:complete], (-1, self.steps)).mean(axis=1)
        return means


def train(
    network: Sequential,
    images: Array,
    labels: Array,
    *,
    lr: float,
    epochs: int,
    rng: np.random.Generator,
    progress: Callable[[], object],
) -> History:
    """Train the network by plain gradient descent; stop early once the loss is no longer finite.

    Parameters
    ----------
    network : Sequential
        Changed in place; its last two layers are the hidden ReLU and the output.
    images : array (N, 1, 8, 8)
    labels : array (N,)
    lr : float
        The learning rate.
    epochs : int
        How many times each image is used.
    rng : numpy.random.Generator
        Shuffles the images before each epoch.
    progress : callable
        Called without arguments after each epoch.

    Returns
    -------
    History
    """
    history = History(steps=-(-len(images) // BATCH))
    optimizer = SGD(network.parameters(), lr)
    until_hidden, after_hidden = network[:-2], network[-2:]  # cut before the hidden ReLU, to see what enters it
    network.train()
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(images), BATCH):
            batch = order[start : start + BATCH]
            hidden = until_hidden(beside(network, images[batch]))
            loss, dlogits = cross_entropy(after_hidden(hidden), beside(network, labels[batch]))
            optimizer.zero_grad()
            network.backward(dlogits)
            optimizer.step()
            history.losses.append(loss)
            history.spreads.append(np.percentile(as_numpy("hidden", hidden), PERCENTILES))
            if history.diverged:
                return history
        progress()
    return history


def accuracy(network: Module, images: Array, labels: Array) -> float:
    """The fraction of the images that the network, in evaluation mode, reads rightly, all of them as one batch."""
    logits = as_numpy("logits", network.eval()(beside(network, images)))
    return float(np.mean(logits.argmax(axis=1) == labels))


def with_batch_statistics(network: Sequential) -> Sequential:
    """A copy in evaluation mode whose batch norms have no running statistics, so that they use those of the batch."""
    network = copy.deepcopy(network).eval()
    for layer in batch_norms(network):
        layer.running_mean = layer.running_var = None
    return network


def batch_norms(network: Sequential) -> list[BatchNorm1d | BatchNorm2d]:
    """The batch norms of the network, in order."""
    return [layer for layer in network if isinstance(layer, BatchNorm1d | BatchNorm2d)]


class Statistics(NamedTuple):
    """A batch norm, which has its running statistics, and the moments of its input that they stand for."""

    layer: BatchNorm1d | BatchNorm2d
    true: Moments


def true_statistics(network: Sequential, images: Array) -> list[Statistics]:
    """Of each batch norm, over all images as one batch."""
    statistics, x = [], images
    for layer, exact in zip(network, with_batch_statistics(network), strict=True):
        if isinstance(layer, BatchNorm1d | BatchNorm2d):
            statistics.append(Statistics(layer, moments(x)))
        x = exact(x)
    return statistics


# ---- The runs ----


@dataclass(frozen=True)
class Run:
    """One training and what came of it."""

    batch_norm: bool
    lr: float
    network: Sequential
    history: History
    accuracy_batch: float | None  # on the test set with batch statistics; None without batch norm
    accuracy_running: float  # with running statistics
    seconds: float

    @property
    def final_loss(self) -> float:
        """The mean over the last epoch; infinite if diverged."""
        return float("inf") if self.history.diverged else float(self.history.epoch_losses[-1])

    @property
    def outcome(self) -> str:
        """The accuracy with running statistics, in words."""
        return "diverged" if self.history.diverged else f"{self.accuracy_running:.1%}"


def train_one(
    digits: Digits, xp: Any, *, batch_norm: bool, lr: float, epochs: int, seed: int, progress: Callable[[], object]
) -> Run:
    """One run with arrays of `xp`; the same seed gives the same weights and batches, with and without batch norm."""
    weights, batches = np.random.default_rng(seed).spawn(2)
    network = build_network(batch_norm, weights).to(xp=xp)
    training, test = (digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels)
    start = time.perf_counter()
    with np.errstate(over="ignore", invalid="ignore"):  # a run may diverge; the table says so
        history = train(network, *training, lr=lr, epochs=epochs, rng=batches, progress=progress)
        seconds = time.perf_counter() - start
        accuracy_batch = accuracy(with_batch_statistics(network), *test) if batch_norm else None
        accuracy_running = accuracy(network, *test)
    return Run(batch_norm, lr, network.to(xp=np), history, accuracy_batch, accuracy_running, seconds)


def train_all(digits: Digits, epochs: int, seed: int, xp: Any = np) -> list[Run]:
    """Every network at every learning rate, under one progress bar."""
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    plan = [(batch_norm, lr) for batch_norm in (True, False) for lr in LEARNING_RATES]
    runs: list[Run] = []
    # One thread: matrices this small gain nothing from more, and the sums do not depend on the number of cores.
    with threadpool_limits(1), tqdm(total=len(plan) * epochs, unit="epoch", leave=False, disable=None) as bar:
        for batch_norm, lr in plan:
            bar.set_description(f"{_name(batch_norm)}, learning rate {lr:g}")
            run = train_one(digits, xp, batch_norm=batch_norm, lr=lr, epochs=epochs, seed=seed, progress=bar.update)
            runs.append(run)
            bar.update(len(runs) * epochs - bar.n)  # the epochs that a diverged run has left out
    return runs


def best_of(runs: list[Run]) -> Run:
    """The run with batch norm that ended with the lowest training loss; the test set has no say in the choice."""
    return min((run for run in runs if run.batch_norm), key=lambda run: run.final_loss)


# ---- The command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `demo`."""
    parser.add_argument("--seed", type=_seed, default=0, help="of the split, the weights and the batches (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("arraybn-demo"), help="folder for the files (default arraybn-demo)"
    )
    parser.add_argument("--epochs", type=_epochs, help="passes over the training set (30; --data-parallel: 12)")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="cuda: on a GPU, with CuPy (default cpu)")
    parser.add_argument("--no-plot", action="store_true", help="draw no picture; needs no matplotlib")
    parser.add_argument(
        "--data-parallel",
        nargs="?",
        type=_images,
        const=2,
        metavar="IMAGES",
        help="under mpirun: train on all ranks, each with so many images in a step (2), with synchronized and with"
        " local batch norm, beside one process with all of them; draws ranks.png",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, print the table, save; 1 if something is missing or the saved network is not the same."""
    if arguments.data_parallel is not None:
        from . import _demo_ranks

        return _demo_ranks.run(arguments)
    plot: bool = not arguments.no_plot
    arguments.epochs = arguments.epochs or 30
    if problem := missing_libraries(plot) or _demo_device.problem(arguments.device) or unusable(arguments.out):
        print(f"demo: {problem}", file=sys.stderr)
        return 1
    digits = load_digits(arguments.seed)
    sizes = f"{len(digits.train_labels)} to train on, {len(digits.test_labels)} to test on"
    xp = _demo_device.namespace(arguments.device)
    print(f"Handwritten digits: {sizes}; epochs: {arguments.epochs}{_demo_device.name(xp)}\n", flush=True)
    runs = train_all(digits, arguments.epochs, arguments.seed, xp)
    print(_table(runs), end="\n\n")
    try:
        return _save(runs, digits, arguments.out, plot)
    except OSError as error:  # a full disk, a folder that went away
        print(f"demo: cannot write: {error}", file=sys.stderr)
        return 1


def _save(runs: list[Run], digits: Digits, out: Path, plot: bool) -> int:
    """Write the files and say what is in them; 1 if the saved network is not the same."""
    best, saved, picture = best_of(runs), out / "best.npz", out / "demo.png"
    checkpoint.save(best.network, saved)
    if not _same_when_loaded(best, saved, digits.test_images):
        print(f"demo: loaded from {saved}, the network gives other logits than the one saved", file=sys.stderr)
        return 1
    bits = f"loaded into a fresh network it gives the same bits, all {len(digits.test_labels)} × 10 test logits"
    print(f"{saved}: the network with batch norm of the lowest training loss (learning rate {best.lr:g});")
    print(f"  the test set had no say in the choice; {bits}")
    if plot:
        from ._demo_figure import draw

        draw(runs, best, true_statistics(best.network, digits.train_images), picture)
        print(f"{picture}: losses, what enters the hidden ReLU, running statistics against true ones")
    print(f"\n{_what_to_look_at(runs)}")
    return 0


def _same_when_loaded(best: Run, path: Path, images: Array) -> bool:
    """Whether a fresh network of other weights, once it has loaded the file, gives the same bits."""
    fresh = build_network(best.batch_norm, np.random.default_rng())
    fresh.load_state_dict(checkpoint.load(path))
    return bool(fresh.eval()(images).tobytes() == best.network.eval()(images).tobytes())


def _name(batch_norm: bool) -> str:
    return "with batch norm" if batch_norm else "without batch norm"


def _table(runs: list[Run]) -> str:
    lines = [
        "                                               test accuracy with",
        "network             learning rate  final loss  batch stats  running stats  seconds",
    ]
    for run in runs:
        loss = "diverged" if run.history.diverged else f"{run.final_loss:.4f}"
        batch = "–" if run.accuracy_batch is None or run.history.diverged else f"{run.accuracy_batch:.1%}"
        running = "–" if run.history.diverged else f"{run.accuracy_running:.1%}"
        columns = f"{loss:>10}  {batch:>11}  {running:>13}  {run.seconds:>7.1f}"
        lines.append(f"{_name(run.batch_norm):<18}  {run.lr:>13g}  {columns}")
    return "\n".join(lines)


def _what_to_look_at(runs: list[Run]) -> str:
    lr = max(LEARNING_RATES)
    outcome = {run.batch_norm: run.outcome for run in runs if run.lr == lr}
    return (
        f"Look first at learning rate {lr:g}, test accuracy: with batch norm {outcome[True]}, without {outcome[False]}."
    )


# ---- Checked before any training ----


def _seed(text: str) -> int:
    return _integer(text, 0, 2**32 - 1)  # what scikit-learn takes


def _epochs(text: str) -> int:
    return _integer(text, 1, 10_000)


def _images(text: str) -> int:
    return _integer(text, 2, 100)  # of one image, a local BatchNorm1d has no variance


def _integer(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}; got {text!r}")
    return value


def missing_libraries(plot: bool) -> str:
    """What of the demo extra cannot be imported, with the command that installs it; or ''."""
    needed = {"scikit-learn": "sklearn.datasets", "tqdm": "tqdm", "matplotlib": "matplotlib.figure"}
    if not plot:
        del needed["matplotlib"]
    problems = []
    for name, module in needed.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            problems.append(f"{name} ({error})")
    return f'{", ".join(problems)}: {sys.executable} -m pip install "arraybn[demo]"' if problems else ""


def unusable(folder: Path) -> str:
    """Why no files can be written there, or ''; the folder is made."""
    try:
        if folder.exists() and not folder.is_dir():
            return f"--out {folder}: expected a folder; this is a file"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"--out {folder}: cannot write there: {error.strerror or error}"

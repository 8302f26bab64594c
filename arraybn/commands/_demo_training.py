"""The training of ``python -m arraybn demo``: a small network, with and without batch norm, at several rates."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .._arrays.copies import as_numpy
from ..layers import BatchNorm1d, BatchNorm2d
from ..modules import Module, Sequential
from ..network import SGD, Conv2d, Flatten, Linear, ReLU, cross_entropy
from ..reference import Moments
from ..statistics import moments
from ._demo_machine import to_network_device

LEARNING_RATES = (0.01, 0.1, 0.5, 2.0)
BATCH = 32  # images in a step
PERCENTILES = (5, 25, 50, 75, 95)  # of the input of the hidden ReLU, recorded at every step

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
    """Return scikit-learn's bundled digits, a fifth of each class held out for the test."""
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = model_selection.train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    train_images, test_images, train_labels, test_labels = parts
    return Digits(train_images, train_labels, test_images, test_labels)


def build_network(batch_norm: bool, rng: np.random.Generator) -> Sequential:
    """Return the network. `rng` draws the same weights with batch norm and without."""
    convolution = Conv2d(1, 16, 3, padding=1, rng=rng)
    hidden = Linear(16 * 8 * 8, 64, rng=rng)
    output = Linear(64, 10, rng=rng)
    if batch_norm:
        return Sequential(convolution, BatchNorm2d(16), ReLU(), Flatten(), hidden, BatchNorm1d(64), ReLU(), output)
    return Sequential(convolution, ReLU(), Flatten(), hidden, ReLU(), output)


# ---- Training and evaluation ----


@dataclass
class History:
    """Losses and activations at each step of a training."""

    steps: int  # steps in an epoch
    losses: list[float] = field(default_factory=list)  # of the batch, at each step
    spreads: list[Array] = field(default_factory=list)  # PERCENTILES of the input of the hidden ReLU

    @property
    def diverged(self) -> bool:
        """True once the loss is infinite or NaN."""
        return not np.isfinite(self.losses[-1])

    @property
    def epoch_losses(self) -> Array:
        """Mean loss of each complete epoch."""
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
        Number of passes over the images.
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
    until_hidden, after_hidden = network[:-2], network[-2:]  # cut before the hidden ReLU, to record its input
    network.train()
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(images), BATCH):
            batch = order[start : start + BATCH]
            hidden = until_hidden(to_network_device(network, images[batch]))
            loss, dlogits = cross_entropy(after_hidden(hidden), to_network_device(network, labels[batch]))
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
    """Return the fraction of correctly classified images, with the network in evaluation mode and one batch of all."""
    logits = as_numpy("logits", network.eval()(to_network_device(network, images)))
    return float(np.mean(logits.argmax(axis=1) == labels))


def with_batch_statistics(network: Sequential) -> Sequential:
    """Return a copy in evaluation mode without running statistics, whose batch norms use those of the batch."""
    network = copy.deepcopy(network).eval()
    for layer in batch_norms(network):
        layer.running_mean = layer.running_var = None
    return network


def batch_norms(network: Sequential) -> list[BatchNorm1d | BatchNorm2d]:
    """Return the batch norms of the network, in order."""
    return [layer for layer in network if isinstance(layer, BatchNorm1d | BatchNorm2d)]


class Statistics(NamedTuple):
    """A batch norm with its running statistics, and the true moments of its input."""

    layer: BatchNorm1d | BatchNorm2d
    true: Moments


def true_statistics(network: Sequential, images: Array) -> list[Statistics]:
    """Return each batch norm with the moments of its input over all images as one batch."""
    statistics, x = [], images
    for layer, exact in zip(network, with_batch_statistics(network), strict=True):
        if isinstance(layer, BatchNorm1d | BatchNorm2d):
            statistics.append(Statistics(layer, moments(x)))
        x = exact(x)
    return statistics


# ---- The runs ----


def network_name(batch_norm: bool) -> str:
    return "with batch norm" if batch_norm else "without batch norm"


@dataclass(frozen=True)
class Run:
    """One training and its results."""

    batch_norm: bool
    lr: float
    network: Sequential
    history: History
    accuracy_batch: float | None  # on the test set with batch statistics; None without batch norm
    accuracy_running: float  # with running statistics
    seconds: float

    @property
    def final_loss(self) -> float:
        """Mean loss of the last epoch; infinite if diverged."""
        return float("inf") if self.history.diverged else float(self.history.epoch_losses[-1])

    @property
    def outcome(self) -> str:
        """Accuracy with running statistics, as text."""
        return "diverged" if self.history.diverged else f"{self.accuracy_running:.1%}"


def train_one(
    digits: Digits, xp: Any, *, batch_norm: bool, lr: float, epochs: int, seed: int, progress: Callable[[], object]
) -> Run:
    """Train one network on arrays of `xp`. A seed gives the same weights and batches with batch norm and without."""
    weights, batches = np.random.default_rng(seed).spawn(2)
    network = build_network(batch_norm, weights).to(xp=xp)
    training, test = (digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels)
    start = time.perf_counter()
    with np.errstate(over="ignore", invalid="ignore"):  # a run may diverge, which the table shows
        history = train(network, *training, lr=lr, epochs=epochs, rng=batches, progress=progress)
        seconds = time.perf_counter() - start
        accuracy_batch = accuracy(with_batch_statistics(network), *test) if batch_norm else None
        accuracy_running = accuracy(network, *test)
    return Run(batch_norm, lr, network.to(xp=np), history, accuracy_batch, accuracy_running, seconds)


def train_all(digits: Digits, epochs: int, seed: int, xp: Any = np) -> list[Run]:
    """Train every network at every learning rate, under one progress bar."""
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    plan = [(batch_norm, lr) for batch_norm in (True, False) for lr in LEARNING_RATES]
    runs: list[Run] = []
    # One thread: matrices this small gain nothing from more, and the sums do not depend on the number of cores.
    with threadpool_limits(1), tqdm(total=len(plan) * epochs, unit="epoch", leave=False, disable=None) as bar:
        for batch_norm, lr in plan:
            bar.set_description(f"{network_name(batch_norm)}, learning rate {lr:g}")
            run = train_one(digits, xp, batch_norm=batch_norm, lr=lr, epochs=epochs, seed=seed, progress=bar.update)
            runs.append(run)
            bar.update(len(runs) * epochs - bar.n)  # count the epochs that a diverged run left out
    return runs


def best_of(runs: list[Run]) -> Run:
    """Return the run with batch norm of the lowest final training loss; the test set does not influence the choice."""
    return min((run for run in runs if run.batch_norm), key=lambda run: run.final_loss)

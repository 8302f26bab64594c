"""The training of ``python -m arraybn demo``: a small network, with and without batch norm, at several rates."""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from .._arrays.copies import as_numpy
from .._arrays.namespaces import Namespace, array_namespace
from ..layers import BatchNorm1d, BatchNorm2d
from ..modules import Module, Sequential
from ..network import SGD, Conv2d, Flatten, Linear, ReLU, cross_entropy
from ..reference import Moments
from ..statistics import moments

LEARNING_RATES = (0.01, 0.1, 0.5, 2.0)
BATCH = 32  # images in a step
PERCENTILES = (5, 25, 50, 75, 95)  # of the input of the hidden ReLU, recorded at every step

Array = np.ndarray[Any, Any]


# ---- Data and network ----


class Digits(NamedTuple):
    """Images (N, 1, 8, 8), float32 in 0 … 1, and labels (N,), 0 … 9."""

    train_images: Array
    test_images: Array
    train_labels: Array
    test_labels: Array

    @property
    def sizes(self) -> str:
        return f"{len(self.train_labels)} to train on, {len(self.test_labels)} to test on"


def load_digits(seed: int) -> Digits:
    """Return scikit-learn's bundled digits, a fifth of each class held out for the test."""
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    split = model_selection.train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    return Digits(*split)


def build_network(batch_norm: bool, rng: np.random.Generator) -> Sequential:
    """Return the network. `rng` draws the same weights with batch norm and without."""
    convolution = Conv2d(1, 16, 3, padding=1, rng=rng)
    hidden, output = Linear(16 * 8 * 8, 64, rng=rng), Linear(64, 10, rng=rng)
    layers = (convolution, BatchNorm2d(16), ReLU(), Flatten(), hidden, BatchNorm1d(64), ReLU(), output)
    return Sequential(*(layer for layer in layers if batch_norm or not isinstance(layer, BatchNorm1d | BatchNorm2d)))


# ---- The host or a GPU ----


def namespace(device: str, comm: Any = None) -> tuple[Namespace, str]:
    """Return the namespace to train with and ' on NVIDIA H200, CUDA device 0', or NumPy and ''.

    The GPU of this rank becomes the current one. The ranks of a machine take its GPUs in turn; with more ranks than
    GPUs, several ranks share a GPU.
    """
    if device == "cpu":
        return np, ""
    cupy, local = importlib.import_module("cupy"), 0
    if comm is not None:
        local = comm.Split_type(importlib.import_module("mpi4py.MPI").COMM_TYPE_SHARED).rank
    index = local % cupy.cuda.runtime.getDeviceCount()
    cupy.cuda.Device(index).use()
    return cupy, f" on {cupy.cuda.runtime.getDeviceProperties(index)['name'].decode()}, CUDA device {index}"


def to_network_device(network: Module, array: Array) -> Array:
    """Return the host's array in the namespace and on the device of the network."""
    like = next(iter(network.parameters())).data
    return array if isinstance(like, np.ndarray) else array_namespace(like).asarray(array)


# ---- Evaluation ----


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


def true_statistics(network: Sequential, images: Array) -> list[Moments]:
    """Return the moments of the input of each batch norm, over all images as one batch."""
    found, x = [], images
    for layer in with_batch_statistics(network):
        if isinstance(layer, BatchNorm1d | BatchNorm2d):
            found.append(moments(x))
        x = layer(x)
    return found


# ---- Training ----


@dataclass
class Run:
    """A training, its measurements at each step or epoch, and its results."""

    batch_norm: bool
    lr: float
    network: Sequential
    losses: list[float] = field(default_factory=list)  # before the first step, then the mean of each epoch
    spreads: list[Array] = field(default_factory=list)  # PERCENTILES of the input of the hidden ReLU, at each step
    diverged: bool = False
    accuracy_batch: float | None = None  # on the test set with batch statistics; None without batch norm
    accuracy_running: float = 0.0  # with running statistics
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return "with batch norm" if self.batch_norm else "without batch norm"

    @property
    def final_loss(self) -> float:
        """Mean loss of the last epoch; infinite if diverged."""
        return float("inf") if self.diverged else self.losses[-1]

    @property
    def outcome(self) -> str:
        """Accuracy with running statistics, as text."""
        return "diverged" if self.diverged else f"{self.accuracy_running:.1%}"

    def train(self, digits: Digits, epochs: int, rng: np.random.Generator, progress: Callable[[], object]) -> None:
        """Train by plain gradient descent; stop early once the loss is infinite or NaN."""
        network, optimizer = self.network.train(), SGD(self.network.parameters(), self.lr)
        until_hidden, after_hidden = network[:-2], network[-2:]  # cut before the hidden ReLU, to record its input
        count = len(digits.train_images)
        for _ in range(epochs):
            losses = []
            for batch in np.split(rng.permutation(count), range(BATCH, count, BATCH)):
                hidden = until_hidden(to_network_device(network, digits.train_images[batch]))
                labels = to_network_device(network, digits.train_labels[batch])
                loss, dlogits = cross_entropy(after_hidden(hidden), labels)
                optimizer.zero_grad()
                network.backward(dlogits)
                optimizer.step()
                losses.append(loss)
                self.losses = self.losses or [loss]
                self.spreads.append(np.percentile(as_numpy("hidden", hidden), PERCENTILES))
                self.diverged = not np.isfinite(loss)
                if self.diverged:
                    return
            self.losses.append(float(np.mean(losses)))
            progress()


def train_all(digits: Digits, epochs: int, seed: int, xp: Any) -> list[Run]:
    """Train every network at every learning rate on arrays of `xp`, under one progress bar."""
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    plan = list(product((True, False), LEARNING_RATES))
    test = digits.test_images, digits.test_labels
    _warm_up(digits, xp)
    runs: list[Run] = []
    # One thread: matrices this small gain nothing from more, and the sums do not depend on the number of cores.
    with threadpool_limits(1), tqdm(total=len(plan) * epochs, unit="epoch", leave=False, disable=None) as bar:
        for batch_norm, lr in plan:
            weights, batches = np.random.default_rng(seed).spawn(2)  # the same with batch norm and without
            run = Run(batch_norm, lr, build_network(batch_norm, weights).to(xp=xp))
            bar.set_description(f"{run.name}, learning rate {lr:g}")
            start = time.perf_counter()
            with np.errstate(over="ignore", invalid="ignore"):  # a run may diverge, which the table shows
                run.train(digits, epochs, batches, bar.update)
                run.seconds = time.perf_counter() - start
                if batch_norm:
                    run.accuracy_batch = accuracy(with_batch_statistics(run.network), *test)
                run.accuracy_running = accuracy(run.network, *test)
            run.network.to(xp=np)
            runs.append(run)
            bar.update(len(runs) * epochs - bar.n)  # count the epochs that a diverged run left out
    return runs


def _warm_up(digits: Digits, xp: Any) -> None:
    """Take one step with a network of its own, so that the seconds of no training contain those of the compiler."""
    run = Run(True, LEARNING_RATES[0], build_network(True, np.random.default_rng(0)).to(xp=xp))
    run.train(Digits(*(part[:BATCH] for part in digits)), 1, np.random.default_rng(0), lambda: None)

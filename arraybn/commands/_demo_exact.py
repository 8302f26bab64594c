"""``python -m arraybn demo --data-parallel --exact``: a training that has the same bits for any number of ranks.

The batch norms are `SyncBatchNorm(exact=True)`. All other sums of a network depend on the order too: a layer with
weights here treats each image by itself, and gives the gradients of each image to `average_gradients(exact=True)`.
"""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

import numpy as np

from .. import sync
from .._arrays.copies import as_numpy
from .._plotting import Array
from ..kernels.threads import set_num_threads
from ..layers import SyncBatchNorm
from ..modules import Module, Sequential
from ..network import SGD, Conv2d, Flatten, Linear, ReLU, cross_entropy
from ..sync import Comm, average_gradients
from . import _demo_ranks
from ._demo_training import Digits, accuracy, load_digits

BATCH, RATE, EPOCHS = 30, 0.1, 2  # images of all ranks in a step


class EachSample(Module):
    """A module that treats every sample by itself, so that no bit depends on the samples beside it."""

    def __init__(self, inner: Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Array) -> Array:
        """Return the outputs of all samples."""
        self._remember(x)
        return np.concatenate([self.inner(x[i : i + 1]) for i in range(len(x))])

    def backward(self, dy: Array) -> Array:
        """Return the gradients by all samples; those by the parameters are terms of an exact sum."""
        x, parameters, gradients = self._recall(), list(self.inner.parameters()), []
        terms: list[list[Any]] = [[] for _ in parameters]
        for i in range(len(x)):
            self.inner(x[i : i + 1])
            gradients.append(self.inner.backward(dy[i : i + 1]))
            for found, parameter in zip(terms, parameters, strict=True):
                found.append(parameter.grad)
                parameter.grad = None
        for parameter, found in zip(parameters, terms, strict=True):
            parameter.accumulate(np.sum(found, axis=0), found)
        self._forget()
        return np.concatenate(gradients)


def ranks(arguments: argparse.Namespace) -> Comm | None:
    """Return the communicator of all ranks; None for a single process. A RuntimeError says which option is missing."""
    if arguments.data_parallel is None or arguments.device != "cpu":
        raise RuntimeError("--exact: expected --data-parallel beside it, and --device cpu")
    return None if sync.exchange_over("comm", None) is None else _demo_ranks.world()


def build(seed: int, comm: Comm | None) -> Sequential:
    """Return the network of the demo, with batch norms in exact mode."""
    rng = np.random.default_rng(seed)
    options: Any = {"exact": True, "process_group": comm}
    convolution, hidden, output = Conv2d(1, 8, 3, padding=1, rng=rng), Linear(512, 32, rng=rng), Linear(32, 10, rng=rng)
    first, second = SyncBatchNorm(8, **options), SyncBatchNorm(32, **options)
    hidden_part = EachSample(hidden), second, ReLU(), EachSample(output)
    return Sequential(EachSample(convolution), first, ReLU(), Flatten(), *hidden_part)


def step(network: Sequential, optimizer: SGD, images: Array, labels: Array, whole: int, comm: Comm | None) -> None:
    """Take one step on this rank's part of a batch of `whole` images."""
    logits = network(images)
    rows = [cross_entropy(logits[i : i + 1], labels[i : i + 1])[1] for i in range(len(images))]
    optimizer.zero_grad()
    network.backward(np.concatenate(rows) / np.float32(whole))
    average_gradients(network, comm, weight=None, exact=True)
    optimizer.step()


def train(arguments: argparse.Namespace, comm: Comm | None) -> str:
    """Train on all ranks, and print the checksum of the parameters and running statistics."""
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
    digits, epochs = load_digits(arguments.seed), arguments.epochs or EPOCHS
    set_num_threads(1)  # the ranks share the cores
    network = trained(digits, arguments.seed, epochs, rank, size, comm)
    if rank == 0:
        shares = f"batches of {BATCH} on {size} rank{'s' * (size > 1)}"
        score = accuracy(network, digits.test_images, digits.test_labels)
        print(f"Handwritten digits: {digits.sizes}; epochs: {epochs}; {shares}; test accuracy {score:.1%}")
        print(f"SHA-256 of the parameters and running statistics, for any number of ranks:\n{checksum(network)}")
    return ""


def trained(digits: Digits, seed: int, epochs: int, rank: int, ranks: int, comm: Comm | None) -> Sequential:
    """Return the network after training this rank's part of each batch."""
    network, shuffler = build(seed, comm), np.random.default_rng(seed)
    optimizer = SGD(network.parameters(), RATE)
    for _ in range(epochs):
        order = shuffler.permutation(len(digits.train_images))
        for batch in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
            mine = np.array_split(batch, ranks)[rank]
            step(network, optimizer, digits.train_images[mine], digits.train_labels[mine], BATCH, comm)
    return network


def checksum(network: Sequential) -> str:
    """Return the SHA-256 of all parameters and running statistics."""
    state = [as_numpy(name, value).tobytes() for name, value in network.state_dict().items()]
    return hashlib.sha256(b"".join(state)).hexdigest()

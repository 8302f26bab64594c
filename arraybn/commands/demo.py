"""``python -m arraybn demo``: a small network learns to read handwritten digits, with and without batch norm."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import checkpoint
from . import _demo_machine
from ._demo_training import (
    LEARNING_RATES,
    Digits,
    Run,
    best_of,
    build_network,
    load_digits,
    network_name,
    train_all,
    true_statistics,
)

HELP = "train on handwritten digits with and without batch norm: a table, a picture, a saved network"
DESCRIPTION = (
    "Train one small convolutional network on scikit-learn's 1,797 handwritten digits, with and without batch norm, at"
    " several learning rates. Prints a table, draws demo.png, and saves the network with batch norm that has the lowest"
    " training loss as best.npz."
)

Array = np.ndarray[Any, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    seeds, epochs = partial(_integer, low=0, high=2**32 - 1), partial(_integer, low=1, high=10_000)
    images = partial(_integer, low=2, high=100)  # one image gives a local BatchNorm1d no variance
    parser.add_argument("--seed", type=seeds, default=0, help="of the split, the weights and the batches (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("arraybn-demo"), help="folder for the files (default arraybn-demo)"
    )
    parser.add_argument("--epochs", type=epochs, help="passes over the training set (30; --data-parallel: 12)")
    parser.add_argument(
        "--device", choices=_demo_machine.DEVICES, default="cpu", help="cuda: on a GPU, with CuPy (default cpu)"
    )
    parser.add_argument("--no-plot", action="store_true", help="draw no picture; needs no matplotlib")
    parser.add_argument(
        "--data-parallel",
        nargs="?",
        type=images,
        const=2,
        metavar="IMAGES",
        help="under mpirun: train on all ranks, each with so many images in a step (2), with synchronized and with"
        " local batch norm, beside one process with all of them; draws ranks.png",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, print the table and save; return 1 if a requirement is missing or the saved network loads differently."""
    if arguments.data_parallel is not None:
        from . import _demo_ranks

        return _demo_ranks.run(arguments)
    plot: bool = not arguments.no_plot
    arguments.epochs = arguments.epochs or 30
    problem = _demo_machine.missing_libraries(plot) or _demo_machine.device_problem(arguments.device)
    problem = problem or _demo_machine.folder_problem(arguments.out)
    if problem:
        print(f"demo: {problem}", file=sys.stderr)
        return 1
    digits = load_digits(arguments.seed)
    sizes = f"{len(digits.train_labels)} to train on, {len(digits.test_labels)} to test on"
    xp = _demo_machine.namespace(arguments.device)
    print(f"Handwritten digits: {sizes}; epochs: {arguments.epochs}{_demo_machine.device_text(xp)}\n", flush=True)
    runs = train_all(digits, arguments.epochs, arguments.seed, xp)
    print(_table(runs), end="\n\n")
    try:
        return _save(runs, digits, arguments.out, plot)
    except OSError as error:  # a full disk or a deleted folder
        print(f"demo: cannot write: {error}", file=sys.stderr)
        return 1


def _save(runs: list[Run], digits: Digits, out: Path, plot: bool) -> int:
    """Write the files and print their contents; return 1 if the saved network differs when loaded."""
    best, saved, picture = best_of(runs), out / "best.npz", out / "demo.png"
    checkpoint.save(best.network, saved)
    if not _same_when_loaded(best, saved, digits.test_images):
        print(f"demo: loaded from {saved}, the network gives other logits than the one saved", file=sys.stderr)
        return 1
    bits = f"loaded into a fresh network it gives the same bits, all {len(digits.test_labels)} × 10 test logits"
    print(f"{saved}: the network with batch norm of the lowest training loss (learning rate {best.lr:g});")
    print(f"  the test set had no say in the choice; {bits}")
    if plot:
        from . import _demo_figure

        _demo_figure.draw(runs, best, true_statistics(best.network, digits.train_images), picture)
        print(f"{picture}: losses, what enters the hidden ReLU, running statistics against true ones")
    print(f"\n{_advice(runs)}")
    return 0


def _same_when_loaded(best: Run, path: Path, images: Array) -> bool:
    """Return True if a new network with other weights gives the same bits after loading the file."""
    fresh = build_network(best.batch_norm, np.random.default_rng())
    fresh.load_state_dict(checkpoint.load(path))
    return bool(fresh.eval()(images).tobytes() == best.network.eval()(images).tobytes())


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
        lines.append(f"{network_name(run.batch_norm):<18}  {run.lr:>13g}  {columns}")
    return "\n".join(lines)


def _advice(runs: list[Run]) -> str:
    lr = max(LEARNING_RATES)
    outcome = {run.batch_norm: run.outcome for run in runs if run.lr == lr}
    return (
        f"Look first at learning rate {lr:g}, test accuracy: with batch norm {outcome[True]}, without {outcome[False]}."
    )


def _integer(text: str, low: int, high: int) -> int:
    """Return the value of an option."""
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}; got {text!r}")
    return value

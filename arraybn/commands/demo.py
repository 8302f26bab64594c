"""``python -m arraybn demo``: a small network learns to read handwritten digits, with and without batch norm."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from .. import checkpoint
from . import _demo_machine
from ._demo_training import Digits, Run, best_of, build_network, load_digits, train_all, true_statistics

HELP = "train on handwritten digits with and without batch norm: a table, a picture, a saved network"
DESCRIPTION = (
    "Train one small convolutional network on scikit-learn's 1,797 handwritten digits, with and without batch norm, at"
    " several learning rates. Prints a table, draws demo.png, and saves the network with batch norm that has the lowest"
    " training loss as best.npz."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    seeds, epochs = partial(_integer, low=0, high=2**32 - 1), partial(_integer, low=1, high=10_000)
    images = partial(_integer, low=2, high=100)  # one image gives a local BatchNorm1d no variance
    add, devices, folder = parser.add_argument, _demo_machine.DEVICES, Path("arraybn-demo")
    add("--seed", type=seeds, default=0, help="of the split, the weights and the batches (default 0)")
    add("--out", type=Path, default=folder, help="folder for the files (default arraybn-demo)")
    add("--epochs", type=epochs, help="passes over the training set (30; --data-parallel: 12)")
    add("--device", choices=devices, default="cpu", help="cuda: on a GPU, with CuPy (default cpu)")
    add("--no-plot", action="store_true", help="draw no picture; needs no matplotlib")
    text = (
        "under mpirun: train on all ranks, each with so many images in a step (2), with synchronized and with"
        " local batch norm, beside one process with all of them; draws ranks.png"
    )
    add("--data-parallel", nargs="?", type=images, const=2, metavar="IMAGES", help=text)


def _integer(text: str, low: int, high: int) -> int:
    """Return the value of an option."""
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}; got {text!r}")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Train, print the table and save; return 1 if a requirement is missing or the saved network loads differently."""
    if arguments.data_parallel is not None:
        from . import _demo_ranks

        return _demo_ranks.run(arguments)
    if problem := _demo_machine.problem_with(arguments, writes=True):
        return _demo_machine.refuse(problem)
    epochs, digits = arguments.epochs or 30, load_digits(arguments.seed)
    xp, place = _demo_machine.namespace(arguments.device)
    print(f"Handwritten digits: {digits.sizes}; epochs: {epochs}{place}\n", flush=True)
    runs = train_all(digits, epochs, arguments.seed, xp)
    print(_table(runs), end="\n\n")
    try:
        return _save(runs, digits, arguments.out, not arguments.no_plot)
    except OSError as error:  # a full disk or a deleted folder
        return _demo_machine.refuse(f"cannot write: {error}")


def _table(runs: list[Run]) -> str:
    lines = [
        "                                               test accuracy with",
        "network             learning rate  final loss  batch stats  running stats  seconds",
    ]
    for run in runs:
        columns = "diverged", "–", "–"
        if not run.diverged:
            batch = "–" if run.accuracy_batch is None else f"{run.accuracy_batch:.1%}"
            columns = f"{run.final_loss:.4f}", batch, f"{run.accuracy_running:.1%}"
        loss, batch, running = columns
        lines.append(f"{run.name:<18}  {run.lr:>13g}  {loss:>10}  {batch:>11}  {running:>13}  {run.seconds:>7.1f}")
    return "\n".join(lines)


def _save(runs: list[Run], digits: Digits, out: Path, plot: bool) -> int:
    """Write the files and print their contents; return 1 if the saved network gives other logits when loaded."""
    best, saved, picture = best_of(runs), out / "best.npz", out / "demo.png"
    checkpoint.save(best.network, saved)
    fresh = build_network(best.batch_norm, np.random.default_rng())
    fresh.load_state_dict(checkpoint.load(saved))
    if fresh.eval()(digits.test_images).tobytes() != best.network.eval()(digits.test_images).tobytes():
        return _demo_machine.refuse(f"loaded from {saved}, the network gives other logits than the one saved")
    bits = f"loaded into a fresh network it gives the same bits, all {len(digits.test_labels)} × 10 test logits"
    print(f"{saved}: the network with batch norm of the lowest training loss (learning rate {best.lr:g});")
    print(f"  the test set had no say in the choice; {bits}")
    if plot:
        from . import _demo_figure

        _demo_figure.draw(runs, best, true_statistics(best.network, digits.train_images), picture)
        print(f"{picture}: losses, what enters the hidden ReLU, running statistics against true ones")
    lr = max(run.lr for run in runs)
    with_it, without = (run.outcome for run in runs if run.lr == lr)
    print(f"\nLook first at learning rate {lr:g}, test accuracy: with batch norm {with_it}, without {without}.")
    return 0

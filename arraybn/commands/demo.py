"""``python -m arraybn demo``: a small network learns to read handwritten digits, with and without batch norm."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import checkpoint
from .._install import requirement
from . import _demo_exact, _demo_figure, _demo_lost, _demo_ranks
from ._demo_training import Digits, Run, build_network, load_digits, namespace, train_all, true_statistics

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
    add, folder = parser.add_argument, Path("arraybn-demo")
    add("--seed", type=seeds, default=0, help="of the split, the weights and the batches (default 0)")
    add("--out", type=Path, default=folder, help="folder for the files (default arraybn-demo)")
    add("--epochs", type=epochs, help="passes over the training set (30; --data-parallel: 12)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: on a GPU, with CuPy (default cpu)")
    add("--no-plot", action="store_true", help="draw no picture; needs no matplotlib")
    text = (
        "under mpirun: train on all ranks, each with so many images in a step (2), with synchronized and with"
        " local batch norm, beside one process with all of them; draws ranks.png"
    )
    add("--data-parallel", nargs="?", type=images, const=2, metavar="IMAGES", help=text)
    one = parser.add_mutually_exclusive_group().add_argument
    text = (
        "under mpirun --with-ft ulfm: kill a rank in step 50, go on with the others, and compare with a training that"
        " had only them from that step on; draws nothing"
    )
    one("--lose-a-rank", action="store_true", help=text)
    text = "with --data-parallel: train with exact sums, and print a checksum, the same for 1, 2, 3, … ranks"
    one("--exact", action="store_true", help=text)


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
    """Train, print tables, save and draw; return 1 if a requirement is missing or a result cannot be kept."""
    comm = None
    try:
        if arguments.exact:
            comm = _demo_exact.ranks(arguments)
        elif arguments.data_parallel is not None:
            comm = _demo_ranks.world()
        problem = _missing(arguments, comm)
    except (RuntimeError, ImportError) as error:  # no ranks
        problem = str(error)
    problem = problem or _trained(arguments, comm)
    if problem and (comm is None or comm.rank == 0):
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if problem else 0


def _trained(arguments: argparse.Namespace, comm: Any) -> str:
    """Train as the options say; return the problem or ''."""
    if arguments.exact:
        return _demo_exact.train(arguments, comm)
    if arguments.lose_a_rank:
        return _demo_lost.train(arguments, comm)
    return _train(arguments) if comm is None else _demo_ranks.train(arguments, comm)


# ---- The requirements ----


def _missing(arguments: argparse.Namespace, comm: Any) -> str:
    """Return the first requirement that is missing on any rank, or ''; create the folder."""
    problem = _demo_lost.problem(comm) if arguments.lose_a_rank else ""
    problem = problem or _missing_libraries(not (arguments.no_plot or arguments.lose_a_rank))
    if arguments.device == "cuda":
        problem = problem or _gpu_problem()
    if comm is None or comm.rank == 0:
        problem = problem or _folder_problem(arguments.out)
    return problem if comm is None else next(filter(None, comm.allgather(problem)), "")


def _missing_libraries(plot: bool) -> str:
    needed = [("scikit-learn", "sklearn.datasets"), ("tqdm", "tqdm"), ("matplotlib", "matplotlib.figure")]
    problems = []
    for name, module in needed if plot else needed[:-1]:
        try:
            importlib.import_module(module)
        except ImportError as error:
            problems.append(f"{name} ({error})")
    return f"{', '.join(problems)}: {sys.executable} -m pip install {requirement('demo')}" if problems else ""


def _gpu_problem() -> str:
    try:
        importlib.import_module("cupy").cuda.runtime.getDeviceCount()
    except ImportError as error:
        install = f"{sys.executable} -m pip install {requirement('cuda12')} (for CUDA 13: cuda13)"
        return f"--device cuda: expected CuPy, which cannot be imported ({error}). Run: {install}"
    except RuntimeError as error:  # CuPy's own class
        return f"--device cuda: expected a GPU; CuPy finds none: {error}"
    return ""


def _folder_problem(folder: Path) -> str:
    try:
        if folder.exists() and not folder.is_dir():
            return f"--out {folder}: expected a folder; this is a file"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"--out {folder}: cannot write there: {error.strerror or error}"


# ---- The training ----


def _train(arguments: argparse.Namespace) -> str:
    """Train with and without batch norm, print the table and save; return the problem or ''."""
    epochs, digits = arguments.epochs or 30, load_digits(arguments.seed)
    xp, place = namespace(arguments.device)
    print(f"Handwritten digits: {digits.sizes}; epochs: {epochs}{place}\n", flush=True)
    runs = train_all(digits, epochs, arguments.seed, xp)
    print(_table(runs), end="\n\n")
    try:
        return _save(runs, digits, arguments.out, not arguments.no_plot)
    except OSError as error:  # a full disk or a deleted folder
        return f"cannot write: {error}"


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


def _save(runs: list[Run], digits: Digits, out: Path, plot: bool) -> str:
    """Write the files and print their contents; return a problem if the saved network loads differently."""
    saved, picture = out / "best.npz", out / "demo.png"
    best = min((run for run in runs if run.batch_norm), key=lambda run: run.final_loss)
    checkpoint.save(best.network, saved)
    fresh = build_network(best.batch_norm, np.random.default_rng())
    fresh.load_state_dict(checkpoint.load(saved))
    if fresh.eval()(digits.test_images).tobytes() != best.network.eval()(digits.test_images).tobytes():
        return f"loaded from {saved}, the network gives other logits than the one saved"
    bits = f"loaded into a fresh network it gives the same bits, all {len(digits.test_labels)} × 10 test logits"
    print(f"{saved}: the network with batch norm of the lowest training loss (learning rate {best.lr:g});")
    print(f"  the test set had no say in the choice; {bits}")
    if plot:
        _demo_figure.draw(runs, best, true_statistics(best.network, digits.train_images), picture)
        print(f"{picture}: losses, what enters the hidden ReLU, running statistics against true ones")
    lr = max(run.lr for run in runs)
    with_it, without = (run.outcome for run in runs if run.lr == lr)
    print(f"\nLook first at learning rate {lr:g}, test accuracy: with batch norm {with_it}, without {without}.")
    return ""

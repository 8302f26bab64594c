"""``python -m arraybn check``: how accurate every batch norm installed here is; or whether yours is right."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..accuracy import figure
from ..accuracy.errors import ask, bounds, make_row, make_scenarios
from ..bench.contestants.registry import measured
from ..bench.output import RefusedError, check_files, progress_bar, write_json
from ..testing import AccuracyError, BatchNormError, Failure, check_batch_norm, exact_batch_norm
from ..testing.oracle import LONG, MANTISSA_BITS

FURTHER = ("backward", "update", "jvp", "double_backward")  # functions to check beside the forward
HELP = "how accurate every batch norm installed here is; or whether yours is right"
DESCRIPTION = """Without a target: a table of the errors of every batch norm installed here, against exact results.
With a target: run everything that is true of a batch norm against your functions, and say what is not, and why."""
EPILOG = """your functions, on arrays of --xp (x, y, dy, dx: (N, C, S), or (N, C) or (N, C, H, W) for functions that
take only that; all else: (C,); momentum and eps: numbers):
  forward(x, weight, bias, eps) -> y, or a tuple that begins with y; the batch's own statistics are used
  backward(dy, x, weight, bias, eps) -> dx, dweight, dbias
  update(running_mean, running_var, x, momentum) -> running_mean, running_var; as in PyTorch, momentum is the
      weight of the new batch, whose variance enters unbiased
  jvp(x_dot, x, weight, weight_dot, bias_dot, eps) -> y_dot
  double_backward(v, dy, x, weight, v_weight, v_bias, eps) -> ddy, ddx, ddweight

example: mine.py in this folder
  import numpy as np
  def forward(x, weight, bias, eps):
      x64 = x.astype(np.float64)
      centred = x64 - x64.mean(axis=(0, 2), keepdims=True)
      xhat = centred / np.sqrt((centred**2).mean(axis=(0, 2), keepdims=True) + eps)
      return (weight[:, None] * xhat + bias[:, None]).astype(x.dtype)
and then
  python -m arraybn check mine:forward

exit status: 0; 1 if arraybn breaks a promise, or a property of your functions does not hold; 2 if what was asked
cannot be done; 3 if the formula of your functions is right, but they are only as accurate as sums in the dtype of x.

more strict: --tolerance 1. Less: --accuracy sums accepts what sums in the dtype of x give (status 0 for 3); --max-ratio
1 asks for nothing where the mean is far from zero; --tolerance 32 accepts a fixed error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `check`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("target", nargs="?", metavar="module:forward", help="a function of yours to check")
    table = parser.add_argument_group("the table")
    table.add_argument("--by-scenario", action="store_true", help="show the errors of each group of scenarios")
    table.add_argument("--quick", action="store_true", help="fewer scenarios")
    table.add_argument("--seed", type=_count, default=0, help="of the random batches (default 0)")
    table.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the figures there, or to stdout")
    help_ = "draw a PNG (default arraybn-check.png)"
    table.add_argument("--plot", nargs="?", const="arraybn-check.png", metavar="FILE", help=help_)
    yours = parser.add_argument_group("your functions")
    yours.add_argument("--backward", metavar="module:function")
    yours.add_argument("--update", metavar="module:function")
    yours.add_argument("--jvp", metavar="module:function", help="forward mode")
    yours.add_argument("--double-backward", metavar="module:function", help="the backward of the backward")
    help_ = "of y (4); dx may be three times as far off"
    yours.add_argument("--tolerance", type=float, default=4.0, metavar="ULP", help=help_)
    yours.add_argument("--max-ratio", type=float, default=1e6, metavar="R", help="largest |mean|/std (1e6)")
    yours.add_argument("--dtype", choices=tuple(MANTISSA_BITS), default="float32", help="of x (float32)")
    help_ = "full: within --tolerance (default); sums: as far off as sums in the dtype of x may be"
    yours.add_argument("--accuracy", choices=("full", "sums"), default="full", help=help_)
    yours.add_argument("--xp", default="numpy", metavar="NAMESPACE", help="numpy, torch, jax.numpy or cupy (numpy)")
    yours.add_argument("--examples", type=_count, default=25, metavar="N", help="random batches for each property (25)")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected an integer ≥ 0; got {text!r}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Print the table, or what is true of the target."""
    try:
        if np.finfo(LONG).nmant < 63:
            raise RefusedError("the oracle needs a numpy.longdouble of 64 bits of mantissa; this platform's has fewer")
        given = [f"--{role.replace('_', '-')}" for role in FURTHER if getattr(arguments, role)]
        if arguments.target is None and given:
            raise RefusedError(f"expected a target, module:forward, before {' and '.join(given)}; got none")
        return _print_table(arguments) if arguments.target is None else check_target(arguments)
    except BrokenPipeError:
        raise
    except (RefusedError, OSError) as problem:
        print(f"check: {problem}", file=sys.stderr)
        return 2


def _print_table(arguments: argparse.Namespace) -> int:
    """Print the table, write what was asked for; return 1 if arraybn breaks a promise."""
    start = time.perf_counter()
    plot, file = arguments.plot, arguments.json
    check_files(plot, file)
    chosen = [one for one in measured() if not one.missing]
    missing = {one.pip: one.needs for one in measured() if one.missing}
    asked = make_scenarios(arguments.quick, plot is not None, arguments.seed)
    batches = [one.batch for one in asked]
    with progress_bar(len(chosen) * len(asked), "batch") as bar, ThreadPoolExecutor(1) as pool:
        computed = pool.submit(lambda: [exact_batch_norm(b.x, b.weight, b.bias, b.dy, eps=b.eps) for b in batches])
        answers = ask(chosen, batches, (lambda: None) if bar is None else bar.update)
        truths = computed.result()
    rows = [make_row(one, answer, asked, truths) for one, answer in zip(chosen, answers, strict=True)]
    if file != "-":
        print(figure.table(rows, len(asked), by_scenario=arguments.by_scenario))
        print(figure.notes(rows, bounds, max(b.x.size // b.x.shape[1] for b in batches), missing))
    if file is not None:
        write_json(file, figure.as_json(rows, missing, arguments, time.perf_counter() - start))
    if plot is not None:
        figure.draw(rows, Path(plot))
        print(f"\n{plot}: error of y against |mean|/std", file=sys.stderr if file == "-" else sys.stdout)
    return int(any(row.kept is False for row in rows))


# ---- A target --------------------------------------------------------------------------------------------------------


def check_target(arguments: argparse.Namespace) -> int:
    """Say of each property whether it holds, then of each that does not why; 1 if there are any."""
    for option in ("by_scenario", "quick", "json", "plot"):
        if getattr(arguments, option):
            raise RefusedError(f"--{option.replace('_', '-')} belongs to the table, which is printed without a target")
    sys.path.insert(0, "")
    names = {"forward": arguments.target} | {role: getattr(arguments, role) for role in FURTHER}
    functions: Any = {role: None if name is None else load(name) for role, name in names.items()}
    xp = None if arguments.xp == "numpy" else _imported(arguments.xp)
    if arguments.xp == "jax.numpy" and arguments.dtype == "float64":
        importlib.import_module("jax").config.update("jax_enable_x64", True)
    options = {name: getattr(arguments, name) for name in ("tolerance", "max_ratio", "dtype", "accuracy", "examples")}
    try:
        verdict, status = check_batch_norm(**functions, **options, xp=xp, report=_print_property), 0
    except (TypeError, ValueError, ImportError) as error:  # what the functions raise is reported with the properties
        raise RefusedError(str(error)) from error
    except BatchNormError as error:
        verdict, status = error.verdict, 3 if isinstance(error, AccuracyError) else 1
    print(f"\n{verdict}")
    if status == 3:
        print("\naccept this with --accuracy sums; see --help")
    return status


def _print_property(name: str, failure: Failure | None) -> None:
    print(f"{'ok   ' if failure is None else 'rough' if failure.rough else 'FAILS'}  {name}", flush=True)


def load(target: str) -> Any:
    """Return the function behind package.module:function, or a `RefusedError` that says what is wrong with it."""
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise RefusedError(f"expected package.module:function; got {target!r}")
    if "/" in module_name or "\\" in module_name or module_name.endswith(".py"):
        dotted = module_name.removesuffix(".py").strip("./\\").replace("\\", "/").replace("/", ".")
        raise RefusedError(f"expected package.module:function, as in {dotted}:{path}; got {target!r}, a file")
    found = _imported(module_name)
    for name in path.split("."):
        if not hasattr(found, name):
            there = ", ".join(key for key, value in vars(found).items() if callable(value) and key[0] != "_")
            raise RefusedError(f"{target}: {module_name} has no {path!r}; it has {there or 'no functions'}")
        found = getattr(found, name)
    if not callable(found):
        raise RefusedError(f"{target}: expected a function; it is of type {type(found).__name__}")
    return found


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise RefusedError(f"no module named {missing!r} in this folder ({Path.cwd()}) or installed") from error
        raise RefusedError(f"importing {name} raised {type(error).__name__}: {error}") from error

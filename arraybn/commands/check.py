"""``python -m arraybn check``: how accurate every batch norm installed here is; or whether yours is right.

Units are those of the promises (``tests/test_accuracy.py``): ulp of float32, of mean at max(|mean|, 2⁻²⁰·std), of var
at var (at eps where var is 0), of y and dx at the largest term of their formulas. In the JSON, a quantity that a
contestant does not give is left out, and one that is no number is null.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._version import __version__
from ..testing import Batch, exact_batch_norm, scenarios, worst
from ..testing.oracle import LONG, Exact
from ._check_contestants import Answer, Contestant, Results, ask, contestants
from ._check_target import RefusedError, check_target

HELP = "how accurate every batch norm installed here is; or whether yours is right"
DESCRIPTION = """Without a target: a table of the errors of every batch norm installed here, against exact results.
With a target: run everything that is true of a batch norm against your functions, and say what is not, and why."""
EPILOG = """your functions, on arrays of --xp (x, y, dy, dx: (N, C, S); all else: (C,); momentum and eps: numbers):
  forward(x, weight, bias, eps) -> y, or a tuple that begins with y; the batch's own statistics are used
  backward(dy, x, weight, bias, eps) -> dx, dweight, dbias
  update(running_mean, running_var, x, momentum) -> running_mean, running_var; as in PyTorch, momentum is the
      weight of the new batch, whose variance enters unbiased

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
cannot be done."""

F32 = np.dtype("f4")
EPS = 2.0**-10  # a float32, and above the least that TensorFlow takes
SHAPES = {"images": (8, 16, 49), "tall": (101, 2, 1), "large": (16, 3, 784)}
QUICK = (64, 3, 4)  # that of the outliers and constant channels: JAX compiles for each shape
RATIOS = {"ordinary": (0.0, 3.0), "1e2": (1e2,), "1e4": (1e4,), "1e6": (1e6,)}
GROUPS = (*RATIOS, "outliers", "constant")
CURVE = 10.0 ** np.arange(0, 6.1, 0.5)
QUANTITIES = ("mean", "var", "y", "dx")
PROMISED = {"mean": 1.0, "var": 1.0, "y": 4.0, "dx": 12.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `check`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("target", nargs="?", metavar="module:forward", help="a function of yours to check")
    table = parser.add_argument_group("the table")
    table.add_argument("--by-scenario", action="store_true", help="show the errors of each group of scenarios")
    table.add_argument("--quick", action="store_true", help="fewer scenarios")
    table.add_argument("--seed", type=_count, default=0, help="of the random batches (default 0)")
    table.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the figures there, or to stdout")
    table.add_argument(
        "--plot", nargs="?", const="arraybn-check.png", metavar="FILE", help="draw a PNG (default arraybn-check.png)"
    )
    yours = parser.add_argument_group("your functions")
    yours.add_argument("--backward", metavar="module:function")
    yours.add_argument("--update", metavar="module:function")
    yours.add_argument(
        "--tolerance", type=float, default=4.0, metavar="ULP", help="of y (4); dx may be three times as far off"
    )
    yours.add_argument("--max-ratio", type=float, default=1e6, metavar="R", help="largest |mean|/std (1e6)")
    yours.add_argument("--dtype", choices=("float16", "float32", "float64"), default="float32", help="of x (float32)")
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
        if arguments.target is None and (arguments.backward or arguments.update):
            raise RefusedError("expected a target, module:forward, before --backward and --update; got none")
        return _check_everything(arguments) if arguments.target is None else check_target(arguments)
    except BrokenPipeError:
        raise
    except (RefusedError, OSError) as problem:
        print(f"check: {problem}", file=sys.stderr)
        return 2


# ---- The table ----


class Scenario(NamedTuple):
    """A batch, and the group that its errors are shown in; '' if in the picture alone."""

    group: str
    ratio: float  # |mean|/std
    batch: Batch


def make_scenarios(quick: bool, curve: bool, seed: int) -> list[Scenario]:
    """The batches of the table, and those of the picture."""
    shapes = (QUICK,) if quick else tuple(SHAPES.values())
    found = [
        Scenario(group, ratio, scenarios.normal(shape, sign * ratio, 1.0, seed=[seed, index, int(ratio)]))
        for group, ratios in RATIOS.items()
        for ratio in (ratios[-1:] if quick else ratios)
        for index, (shape, sign) in enumerate(zip(shapes, (1, -1, 1), strict=False))
    ]
    if curve:  # the same batch each time, but for its mean
        found += [
            Scenario("", ratio, scenarios.normal(SHAPES["images"], ratio, 1.0, seed=[seed, 99])) for ratio in CURVE
        ]
    named = scenarios.named_batches()
    found += [
        Scenario("outliers", 0.0, named["outliers"]._replace(x=scenarios.outliers(seed))),
        Scenario("constant", math.inf, named["constant"]),
    ]
    return [one._replace(batch=_float32(one.batch)) for one in found]


def _float32(batch: Batch) -> Batch:
    x, dy, weight, bias = (array.astype(F32) for array in batch[:4])
    return Batch(x, dy, weight, bias, EPS)


@dataclass
class Row:
    """A contestant and what came of it: the largest error of each quantity in each group, in ulp."""

    contestant: Contestant
    unusable: str = ""
    failed: str = ""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # quantity → group → ulp
    curve: dict[float, float] = field(default_factory=dict)  # |mean|/std → ulp of y
    broken: list[str] = field(default_factory=list)  # promises

    def worst(self, quantity: str) -> float | None:
        """Over all groups; None if it does not give the quantity."""
        return max(self.errors[quantity].values()) if quantity in self.errors else None

    @property
    def kept(self) -> bool | None:
        """Whether it keeps its promise; None if it gave none, or cannot be started here."""
        if self.contestant.promise is None or self.unusable:
            return None
        return not (self.failed or self.broken)


def make_row(contestant: Contestant, answer: Answer, asked: Sequence[Scenario], truths: Sequence[Exact]) -> Row:
    """The errors of its results."""
    row = Row(contestant, answer.unusable, answer.failed)
    for scenario, truth, results in zip(asked, truths, answer.results, strict=False):
        errors = _errors(results, truth, _units(scenario.batch, truth))
        if scenario.group:
            for quantity, error in errors.items():
                groups = row.errors.setdefault(quantity, dict.fromkeys(GROUPS, 0.0))
                groups[scenario.group] = max(groups[scenario.group], error)
        else:
            row.curve[scenario.ratio] = errors["y"]
        row.broken += _broken(contestant, scenario, truth, results, errors)
    return row


def _errors(results: Results, truth: Exact, units: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: worst(results[name], getattr(truth, name), units[name], F32) for name in QUANTITIES if name in results
    }


def _units(batch: Batch, truth: Exact) -> dict[str, Any]:
    """The sizes at which an ulp is taken, as the promises have them."""
    mean = np.maximum(abs(truth.mean), np.ldexp(np.sqrt(truth.var), -20))
    var = np.where(truth.var > 0, truth.var, batch.eps)
    return {"mean": mean, "var": var, "y": truth.y_scale, "dx": truth.dx_scale}


def _broken(
    contestant: Contestant, scenario: Scenario, truth: Exact, results: Results, errors: Mapping[str, float]
) -> list[str]:
    """What it promised and did not keep."""
    if contestant.promise is None:
        return []
    batch, limits = scenario.batch, PROMISED
    if contestant.promise == "float32 only":
        limits = bounds(batch.x.shape[0] * batch.x.shape[2])
        errors = _errors(results, truth, _units_of_bounds(batch, truth))
    where = scenario.group if not scenario.group[:1].isdigit() and scenario.group else f"|mean|/std {scenario.ratio:g}"
    found = [
        f"{name} {errors[name]:.3g} > {limit:.3g} ulp ({where})"
        for name, limit in limits.items()
        if not errors[name] <= limit
    ]
    if scenario.group == "constant" and not (results["y"] == batch.bias[:, None]).all():
        found.append("y of a constant channel is not exactly bias")
    return found


def bounds(n: int) -> dict[str, float]:
    """What float32 alone can promise for n values, in ulp: L + 3, L + 6, 2·L + 10, 4·L + 32 with L = log₂ n + 2.

    To first order in u = 2⁻²⁴ (an ulp is at least u of the value), and for L·u·|mean|/std ≤ 1: each value of a sum goes
    through at most L additions, so

    - mean, as the sum of two float32: (L + 2)·u·std from the sum of x − mean, 1 from putting both together;
    - var: L·u from the sum, 5·u from the two subtractions, the square and the division, 1 from the shift of the mean;
    - y: half of var's by rstd, (L + 2)·u·weight from the mean, 6 from the products, the sum and the low part of mean;
    - dx: (L + 1) and (L + 8) from the sums of dy and dy·xhat, and rstd, half of var's and 5 more, in each of 3 terms.

    No sum knows the terms that cancel in it, so the units are larger than the promises': mean at max(|mean|, std), y at
    max(|weight|·max(1, |xhat|), |bias|), dx at |weight|·rstd·max(|dy|, max(1, |xhat|)·rms(dy)).
    """
    depth = math.log2(n) + 2
    return {"mean": depth + 3, "var": depth + 6, "y": 2 * depth + 10, "dx": 4 * depth + 32}


def _units_of_bounds(batch: Batch, truth: Exact) -> dict[str, Any]:
    """The sizes at which an ulp of `bounds` is taken."""
    weight, bias = abs(batch.weight.astype(LONG))[:, None], abs(batch.bias.astype(LONG))[:, None]
    rstd, at_least_1 = 1 / np.sqrt(truth.var + batch.eps)[:, None], np.maximum(1, abs(truth.xhat))
    rms = np.sqrt(np.mean(batch.dy.astype(LONG) ** 2, axis=(0, 2)))[:, None]
    return {
        **_units(batch, truth),
        "mean": np.maximum(abs(truth.mean), np.sqrt(truth.var)),
        "y": np.maximum(weight * at_least_1, bias),
        "dx": weight * rstd * np.maximum(abs(batch.dy), at_least_1 * rms),
    }


def _check_everything(arguments: argparse.Namespace) -> int:
    """Print the table, write what was asked for; 1 if arraybn breaks a promise."""
    start = time.perf_counter()
    plot, file = arguments.plot, arguments.json
    _check_files(plot, None if file == "-" else file)
    chosen = [one for one in contestants() if not one.missing]
    missing = {one.pip: one.needs for one in contestants() if one.missing}
    asked = make_scenarios(arguments.quick, plot is not None, arguments.seed)
    batches = [one.batch for one in asked]
    with _progress_bar(len(chosen) * len(asked)) as bar, ThreadPoolExecutor(1) as pool:
        answers = pool.submit(ask, chosen, batches, (lambda: None) if bar is None else bar.update)
        truths = [exact_batch_norm(b.x, b.weight, b.bias, b.dy, eps=b.eps) for b in batches]
        rows = [make_row(one, answer, asked, truths) for one, answer in zip(chosen, answers.result(), strict=True)]
    from . import _check_figure as figure

    if file != "-":
        print(figure.table(rows, len(asked), by_scenario=arguments.by_scenario))
        print(figure.notes(rows, bounds, max(b.x.size // b.x.shape[1] for b in batches), missing))
    if file is not None:
        text = json.dumps(_report(rows, missing, arguments, time.perf_counter() - start), indent=1, allow_nan=False)
        print(text) if file == "-" else Path(file).write_text(f"{text}\n", encoding="utf-8")
    if plot is not None:
        figure.draw(rows, Path(plot))
        print(f"\n{plot}: error of y against |mean|/std", file=sys.stderr if file == "-" else sys.stdout)
    return int(any(row.kept is False for row in rows))


def _check_files(plot: str | None, file: str | None) -> None:
    """Refuse, before any work, what could not be drawn or written after it."""
    if plot is not None:
        try:
            importlib.import_module("matplotlib.figure")
        except ImportError as error:
            raise RefusedError(
                f'--plot needs matplotlib ({error}): install with  pip install "arraybn[demo]"'
            ) from error
    for option, name in (("--plot", plot), ("--json", file)):
        if name is not None and (Path(name).is_dir() or not Path(name).absolute().parent.is_dir()):
            raise RefusedError(f"{option} {name}: expected a file in a folder that is there")


def _progress_bar(total: int) -> AbstractContextManager[Any]:
    """tqdm's, or None where it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext()
    bar: AbstractContextManager[Any] = tqdm(total=total, unit="batch", leave=False, disable=None)
    return bar


def _report(
    rows: Sequence[Row], missing: Mapping[str, Sequence[str]], arguments: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """What --json writes."""
    from ._check_figure import version

    return {
        "arraybn": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seed": arguments.seed,
        "quick": arguments.quick,
        "seconds": round(seconds, 1),
        "unit": "ulp of float32",
        "groups": list(GROUPS),
        "rows": [
            {
                "family": row.contestant.family,
                "name": row.contestant.name,
                "version": version(row.contestant),
                "worst": {name: _number(row.worst(name)) for name in row.errors},
                "errors": {name: {g: _number(e) for g, e in groups.items()} for name, groups in row.errors.items()},
                "y_by_ratio": [[ratio, _number(error)] for ratio, error in row.curve.items()],
                "promise": row.contestant.promise,
                "kept": row.kept,
                "broken": row.broken,
                "failed": row.failed or row.unusable or None,
            }
            for row in rows
        ],
        "missing": [f"pip install {pip}" for pip in missing],
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

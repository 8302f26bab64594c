"""``python -m arraybn check module:function``: whether somebody's batch norm is right."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from ..testing import BatchNormError, Failure, check_batch_norm


class RefusedError(Exception):
    """What was asked cannot be done; the text says why."""


def check_target(arguments: argparse.Namespace) -> int:
    """Say of each property whether it holds, then of each that does not why; 1 if there are any."""
    for option in ("by_scenario", "quick", "json", "plot"):
        if getattr(arguments, option):
            raise RefusedError(f"--{option.replace('_', '-')} belongs to the table, which is printed without a target")
    sys.path.insert(0, "")
    names = {"forward": arguments.target, "backward": arguments.backward, "update": arguments.update}
    functions = {role: None if name is None else load(name) for role, name in names.items()}
    xp = None if arguments.xp == "numpy" else _namespace(arguments.xp, arguments.dtype)
    try:
        check_batch_norm(
            **functions,  # type: ignore[arg-type]
            tolerance=arguments.tolerance,
            max_ratio=arguments.max_ratio,
            dtype=arguments.dtype,
            xp=xp,
            examples=_examples(arguments.examples),
            report=_print_property,
        )
    except (TypeError, ValueError) as error:  # an option; what the functions raise is reported with the properties
        raise RefusedError(str(error)) from error
    except BatchNormError as error:
        print(f"\n{error}")
        return 1
    print("\nall of them hold")
    return 0


def _print_property(name: str, failure: Failure | None) -> None:
    print(f"{'ok   ' if failure is None else 'FAILS'}  {name}", flush=True)


def load(target: str) -> Any:
    """The function behind package.module:function, or a `RefusedError` that says what is wrong with it."""
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
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise RefusedError(f"no module named {error.name!r} in this folder ({Path.cwd()}) or installed") from error
        raise RefusedError(f"importing {name} raised {type(error).__name__}: {error}") from error
    except (Exception, SystemExit) as error:
        raise RefusedError(f"importing {name} raised {type(error).__name__}: {error}") from error


def _namespace(name: str, dtype: str) -> Any:
    xp = _imported(name)
    if name == "jax.numpy" and dtype == "float64":
        importlib.import_module("jax").config.update("jax_enable_x64", True)
    return xp


def _examples(count: int) -> int:
    """`count`, or 0 where there is no hypothesis to make random batches."""
    try:
        importlib.import_module("hypothesis")
    except ImportError:
        print('the named batches alone; for random ones and small failures:  pip install "arraybn[test]"')
        return 0
    return count

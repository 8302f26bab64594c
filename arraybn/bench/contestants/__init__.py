"""Batch norms of several libraries, called as their users call them; a file for each library, for all commands.

A file offers `host_calls` and `device_calls(device, problem, name)`, which prepare the calls that are timed on the CPU
and on a GPU; `layer_calls`, those of layers; and `measured…`, which `check` measures the accuracy of. Functions import
the library. `registry` lists the contestants of each command.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...testing.scenarios import Batch
from ..cases import OPERATIONS
from ..device import Array, HostDevice
from ..truth import Problem

Call = Callable[[], Any]


@dataclass
class Calls:
    """The calls of one contestant on one problem, by operation.

    "forward", "eval" and "layer" return y, "backward" dx, dweight and dbias, "step" these or dx alone.
    """

    operations: Mapping[str, Call]
    read: Callable[[Any], Array]  # turns a result into an array of the device, as x lies in memory; or (C,)
    poison: Callable[[], object] = lambda: None  # puts NaN where results are going to be
    backend: Mapping[str, str] = field(default_factory=dict)  # chosen by the library, by operation
    wait: Callable[[Any], object] | None = None  # for a library with a stream of its own: until these results are there


@dataclass(frozen=True)
class Contestant:
    """A row of the table of times."""

    name: str
    row: str
    library: str  # as --peers has it
    build: Callable[[HostDevice, Problem, str], Calls]
    package: str = "arraybn"
    operations: tuple[str, ...] = OPERATIONS

    @property
    def ours(self) -> bool:
        """True if the promises of arraybn hold for this row."""
        return self.library in OURS


OURS = ("arraybn", "exact", "masked", "reference")  # libraries that keep the promises of arraybn


class Installable:
    """Something that needs packages, which may not be installed."""

    needs: tuple[str, ...]

    @property
    def missing(self) -> bool:
        return any(importlib.util.find_spec(name) is None for name in self.needs)


@dataclass(frozen=True)
class Library(Installable):
    """A process on the CPU: its contestants, the packages that it needs, and how to get them."""

    name: str  # as --peers has it
    title: str
    needs: tuple[str, ...]
    pip: str
    held: int  # arrays like x that it keeps between its turns
    contestants: tuple[Contestant, ...]


Results = dict[str, Array]  # some of mean and var (C,), y and dx (N, C, S), in NumPy


@dataclass(frozen=True)
class Measured(Installable):
    """A batch norm whose accuracy is measured. `build` imports its library, and returns the function to call."""

    family: str
    name: str
    needs: tuple[str, ...]  # the first is the library, in whose process it works
    pip: str
    build: Callable[[], Callable[[Batch], Results]]
    promise: str | None = None  # of arraybn: "N1–N3" or "float32 only"

    @property
    def library(self) -> str:
        return self.needs[0]


def image(array: Any) -> Any:
    """Return (N, C, S) as (N, C, H, W)."""
    return array.reshape(*array.shape[:2], math.isqrt(array.shape[2]), -1)


def on_images(step: Callable[..., tuple[Any, Any, Mapping[str, Any]]]) -> Callable[[Batch], Results]:
    """Return the function of a batch whose `step` takes and returns (N, H, W, C): y, dx, and the statistics."""

    def call(batch: Batch) -> Results:
        x, dy = (np.ascontiguousarray(np.moveaxis(image(array), 1, -1)) for array in (batch.x, batch.dy))
        y, dx, statistics = step(x, dy, batch.weight, batch.bias, batch.eps)
        return {"y": np.moveaxis(np.asarray(y), -1, 1), "dx": np.moveaxis(np.asarray(dx), -1, 1), **statistics}

    return call

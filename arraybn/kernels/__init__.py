"""The speed: who does the four sweeps over the data.

A kernel module offers the sweeps of ``arraybn.reference`` under the same names and signatures, for one kind of array.
"""

from __future__ import annotations

from typing import Protocol

from .. import reference
from .._arrays import Array


class Kernels(Protocol):
    """The four sweeps. u and x are (N, C, S); mean, a, b, c and the sums are (C,), in `arraybn._arrays.wide_dtype`.

    `out`, where given, is an array like x that the module may write into; the result is what is returned.
    """

    def moments(self, x: Array) -> tuple[Array, Array]:
        """(E1) mean and m2."""

    def dots(self, u: Array, x: Array, mean: Array) -> tuple[Array, Array]:
        """(E5) Σu and Σu·(x−mean)."""

    def affine(self, x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
        """(E3, E7) a·(x−mean) + c, in the dtype of x."""

    def affine2(self, u: Array, x: Array, mean: Array, a: Array, b: Array, c: Array, out: Array | None = None) -> Array:
        """(E6) a·u + b·(x−mean) + c, in the dtype of x."""


SWEEPS = ("moments", "dots", "affine", "affine2")
MODULES: dict[str, Kernels] = {"reference": reference}


def select(x: Array, kernels: str | Kernels | None = None) -> Kernels:
    """The kernel module that serves the array `x`: the one asked for, otherwise the fastest that takes such arrays."""
    if kernels is None:
        return reference
    if isinstance(kernels, str):
        if kernels not in MODULES:
            raise ValueError(f"kernels: expected one of {sorted(MODULES)} or a kernel module; got {kernels!r}")
        return MODULES[kernels]
    if missing := [name for name in SWEEPS if not callable(getattr(kernels, name, None))]:
        raise TypeError(
            f"kernels: expected a module with the sweeps {', '.join(SWEEPS)};"
            f" got {kernels!r} without {', '.join(missing)}"
        )
    return kernels

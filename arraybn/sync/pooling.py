"""The pool of ranks, which ``reference.forward`` and ``reference.backward`` are given between reduction and map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .._arrays.namespaces import Array, dtype_name
from ..reference import Moments
from .staging import Staging


class Call(Protocol):
    """A synchronized call, which exchanges vectors once, and the call of its backward."""

    def exchange(self, rows: Array, n: int = 0) -> tuple[Array, int]:
        """Return the rows (2, C) and n of all ranks together: moments pooled, other numbers summed."""

    def backward(self) -> Any:
        """Return the call of the backward of this forward."""


class RankPool:
    """The ranks of one call. Vectors (C,) are staged to the host, exchanged in float64, and staged home."""

    kept: tuple[Array, Array | None]  # rstd and mean_low on the host, from a forward to its backward

    def __init__(self, call: Call, forward: RankPool | None = None) -> None:
        self.call = call
        if forward is not None:
            self.kept = forward.kept

    def moments(self, part: Moments) -> Moments:
        """(E2) Return the moments of all parts together, on the host."""
        mean, m2, low = part.mean, part.m2, part.mean_low
        self._staging, self._wide = Staging(mean, 4), dtype_name(mean.dtype) == "float64"
        rows = self._staging.host(mean, m2, *([] if low is None else [low]))
        if low is not None:
            rows[0] += rows[2]
        (mean, m2), n = self.call.exchange(rows[:2], part.n)
        return Moments(n, mean, m2)

    def sums(self, *parts: Array) -> Array:
        """Return the sum of each vector over all parts, on the host."""
        self._staging = Staging(parts[0], 3)
        rows, _ = self.call.exchange(self._staging.host(*parts))
        return rows

    def split(self, mean: Array) -> tuple[Array, Array | None]:
        """Return the host's mean in the dtype of the part's statistics, and the rest; None where nothing is lost."""
        if self._wide:
            return mean, None
        with np.errstate(all="ignore"):  # in float32 a mean may be infinite
            high = mean.astype(np.float32)
            return high, np.where(np.isfinite(mean), mean - high, 0.0)

    def keep(self, rstd: Array, mean_low: Array | None) -> None:
        """Keep the host's statistics for the backward."""
        self.kept = rstd, mean_low

    def home(self, *vectors: Array) -> Sequence[Array]:
        """Return the host's vectors on the device and in the dtype of the part's statistics."""
        return self._staging.home(*vectors)

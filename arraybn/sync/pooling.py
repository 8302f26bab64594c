"""The pool of ranks, which ``reference.forward`` and ``reference.backward`` are given between reduction and map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .._arrays.namespaces import Array, dtype_name
from ..reference import Moments, Pool
from .exchange import Call
from .staging import Staging, staging_for

_NUMPY_FLOAT64 = type(np.dtype(np.float64))  # whose name takes NumPy long


class RankPool(Pool):
    """The ranks of one call: vectors (C,) are staged to the host, exchanged in float64, and staged home."""

    kept: tuple[Array, Array | None]  # rstd and mean_low on the host, from a forward to its backward
    gradients: tuple[Array, Array]  # dweight and dbias of all parts, after an exact backward
    _staging: Staging

    def __init__(self, call: Call, forward: RankPool | None = None) -> None:
        self.call = call
        if forward is not None:
            self.kept = forward.kept

    def moments(self, part: Moments) -> Moments:
        """(E2) Return the moments of all parts together, on the host."""
        self._staging = staging_for(part.mean, 4)
        dtype = part.mean.dtype
        self._wide = type(dtype) is _NUMPY_FLOAT64 or dtype_name(dtype) == "float64"
        if part.mean_low is None:
            mean, m2 = self._staging.host(part.mean, part.m2)
        else:
            mean, m2, low = self._staging.host(part.mean, part.m2, part.mean_low)
            mean = np.add(mean, low, dtype=np.float64)
        (mean, m2), n = self.call.combine((mean, m2), part.n)
        return Moments(n, mean, m2)

    def sums(self, *parts: Array) -> Sequence[Array]:
        """Return the sum of each vector over all parts, on the host; a frame has two rows for all vectors."""
        self._staging = staging_for(parts[0], max(3, len(parts)))
        vectors = self._staging.host(*parts)
        if len(parts) == 2:
            both: Sequence[Array] = self.call.combine(vectors)[0]
            return both
        channels = parts[0].shape[0]
        rows: Array = np.zeros((2, (len(parts) + 1) // 2 * channels))
        rows.reshape(-1, channels)[: len(parts)] = vectors
        together: Array = np.stack(self.call.combine(rows)[0])
        return list(together.reshape(-1, channels)[: len(parts)])

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

    def record(self, part: Array, n: int = 0) -> tuple[Array, int]:
        """(E10) Return the record (rows, C) of integers and n of all parts together, which are on the host."""
        return self.call.add_records(part, n)

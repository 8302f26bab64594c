"""A model of synchronized calls, fitted to what ``python -m arraybn bench sync`` has measured.

    time = s · (o + rounds·α + bytes·β),   s = max(1, ranks / cores)

o is what a call costs on any rank, α a round of messages, β a byte, s how many ranks share a core. An allreduce goes
by recursive doubling: log₂P rounds, in each the whole message. An all-gather takes log₂P rounds at best (P − 1 on a
ring), and always receives the messages of all others. The work on what is received is part of α and β. They are ≥ 0,
and fitted to each scheme and direction by least squares of relative errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ._bench_sync_ranks import BACKWARD, FORWARD, GATHER, OURS

RANKS = tuple(2**power for power in range(4, 15))
HEADER, ROOM = 88, 256  # bytes of the header of a frame, and the channels in the first one
RING = "all-gather on a ring"
SCHEMES = (OURS, GATHER, RING)


class Effort(NamedTuple):
    """What goes over the network for one call of one rank."""

    rounds: float
    nbytes: float


class Fit(NamedTuple):
    """The coefficients in seconds, and the median of abs(model / measured − 1)."""

    overhead: float
    alpha: float
    beta: float
    error: float

    def seconds(self, effort: Effort) -> float:
        """With a core for each rank."""
        return self.overhead + effort.rounds * self.alpha + effort.nbytes * self.beta


def effort(scheme: str, what: str, ranks: int, channels: int) -> Effort:
    """Rounds, and bytes that a rank receives."""
    doubling = math.ceil(math.log2(ranks))
    if scheme == OURS:
        frames = 1 if channels <= ROOM else 2
        nbytes = HEADER * frames + 16 * max(channels, ROOM)
        return Effort(frames * doubling, doubling * nbytes)
    if what == BACKWARD:
        return Effort(doubling, doubling * 8 * channels)
    return Effort(ranks - 1 if scheme == RING else doubling, (ranks - 1) * 4 * (2 * channels + 1))


def fit(scheme: str, what: str, points: Sequence[tuple[int, int, float]], cores: int) -> Fit:
    """The fit to points (ranks, channels, seconds), of which there are several numbers of ranks."""
    shares = np.asarray([max(1.0, ranks / cores) for ranks, _, _ in points])
    efforts = np.asarray([(1.0, *effort(scheme, what, ranks, channels)) for ranks, channels, _ in points])
    seconds = np.asarray([measured for _, _, measured in points])
    matrix = efforts * (shares / seconds)[:, None]  # times the coefficients, this should be 1
    best, least = np.zeros(3), math.inf
    for chosen in (set_ for size in (1, 2, 3) for set_ in combinations(range(3), size)):
        columns = list(chosen)
        found, *_ = np.linalg.lstsq(matrix[:, columns], np.ones(len(points)), rcond=None)
        coefficients = np.zeros(3)
        coefficients[columns] = found
        loss = float(np.sum((matrix @ coefficients - 1) ** 2))
        if found.min() >= 0 and loss < least:
            best, least = coefficients, loss
    overhead, alpha, beta = best.tolist()
    return Fit(overhead, alpha, beta, float(np.median(np.abs(matrix @ best - 1))))


class Model(NamedTuple):
    """The four fits, by scheme and direction; a ring has those of the all-gather."""

    fits: Mapping[tuple[str, str], Fit]
    cores: int

    def seconds(self, scheme: str, ranks: int, channels: int, *, cores: int | None = None) -> float:
        """Of a forward and a backward exchange, with a core for each rank, or on so many."""
        share = 1.0 if cores is None else max(1.0, ranks / cores)
        base = GATHER if scheme == RING else scheme
        return share * sum(
            self.fits[base, what].seconds(effort(scheme, what, ranks, channels)) for what in (FORWARD, BACKWARD)
        )

    def as_json(self, channels: Sequence[int]) -> dict[str, Any]:
        """The coefficients and the predictions."""
        return {
            "formula": "max(1, ranks / cores) * (overhead + rounds * alpha + bytes * beta)",
            "cores": self.cores,
            "fits": [{"scheme": scheme, "what": what, **one._asdict()} for (scheme, what), one in self.fits.items()],
            "predictions": [
                {"ranks": ranks, "channels": c, "scheme": scheme, "seconds": self.seconds(scheme, ranks, c)}
                for c in channels
                for ranks in RANKS
                for scheme in SCHEMES
            ],
        }


def fitted(points: Mapping[tuple[str, str], Sequence[tuple[int, int, float]]], cores: int) -> Model | None:
    """The model of what was measured, by scheme and direction; None from one number of ranks, which cannot tell."""
    wanted = [(scheme, what) for scheme in (OURS, GATHER) for what in (FORWARD, BACKWARD)]
    if any(len({ranks for ranks, _, _ in points.get(key, ())}) < 2 for key in wanted):
        return None
    return Model({key: fit(*key, points[key], cores) for key in wanted}, cores)

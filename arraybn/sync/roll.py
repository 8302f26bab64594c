"""The roll call: a rank whose time limit is over tells all ranks where it waits, and every rank that hears it answers.

The answers name the ranks that wait. All further ranks have ended, or do something else.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from .frames import LISTED, ranks_by_text, ranks_text

_HEAD = struct.Struct("=d")  # seconds for which the sender collects answers
LENGTH = 256  # bytes of an answer, few enough for an MPI to send them without the receiver
WAITS, LATE = "waits in", "came too late to"


class RollCallError(TimeoutError):
    """Another rank has called the roll; `late` is True where this rank had just come."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late


def seconds_for(limit: float | None) -> float:
    """Return the seconds for which a rank with that time limit collects answers."""
    return 5.0 if limit is None else min(limit / 10, 5.0)


def answer(doing: str, call: str, seconds: float) -> bytes:
    """Return what a rank tells the others: WAITS or LATE, the call, and for how long it collects answers."""
    return (_HEAD.pack(seconds) + f"{doing} {call}".encode(errors="replace"))[:LENGTH].ljust(LENGTH, b"\0")


def seconds_of(octets: bytes) -> float:
    """Return for how long the sender of an answer collects answers."""
    return float(_HEAD.unpack_from(octets)[0])


def sentence(answers: Mapping[int, bytes], size: int) -> str:
    """Return who waits where, and which of `size` ranks do not answer."""
    texts = {
        rank: octets[_HEAD.size :].rstrip(b"\0").decode(errors="ignore") for rank, octets in sorted(answers.items())
    }
    groups = list(ranks_by_text(texts).items())
    parts = [f"{ranks_text(ranks)} {_verb(text, len(ranks))}" for text, ranks in groups[:LISTED]]
    if rest := [rank for _, ranks in groups[LISTED:] for rank in ranks]:
        parts.append(f"{ranks_text(rest)} {_verb(WAITS, len(rest))} other calls")
    if missing := [rank for rank in range(size) if rank not in answers]:
        one = len(missing) == 1
        verbs = "does not answer: it has ended, or does" if one else "do not answer: they have ended, or do"
        parts.append(f"{ranks_text(missing)} {verbs} something else")
    return "; ".join(parts)


def _verb(text: str, ranks: int) -> str:
    return text if ranks == 1 else text.replace(WAITS, "wait in", 1)

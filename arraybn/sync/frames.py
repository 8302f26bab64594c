"""What travels in the synchronized mode: frames of one length, how two of them become one, how ranks disagree.

A frame is a header and room for two numbers for each of 256 channels. The header says which call this is; ranks that
are not in the same call leave a flag in the reduced header, which then is the same on all of them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import reference
from .._arrays.namespaces import Array
from ..reference import Moments

CHANNELS = 256  # whose numbers go into the first frame of a call
TEXT = 1024  # bytes of what a rank says when something is wrong
OPERATIONS = ("forward", "backward", "average_gradients", "broadcast_state")  # the header has the index

# What all ranks have to agree on, in the order of the header; `bits` is a checksum of all results so far.
FIELDS = ("format", "call", "operation", "layer", "channels", "settings", "num_batches_tracked", "of call", "bits")
FORMAT = int.from_bytes(b"arraybn1", "big")  # changes whenever what is sent changes
_HEADER = struct.Struct(f"={len(FIELDS)}qqq")  # the fields, flags, n
LENGTH = _HEADER.size + 16 * CHANNELS
ERROR, BROKEN = 1 << len(FIELDS), 2 << len(FIELDS)  # flags beside one for each field

# ---- Frames ----------------------------------------------------------------------------------------------------------


def code(operation: str) -> int:
    """The number of an operation in the header."""
    return OPERATIONS.index(operation)


def word(text: str) -> int:
    """64 bits that stand for `text`."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big", signed=True)


def frame(fields: Sequence[int], flags: int, n: int, rows: Array | None = None, room: int = CHANNELS) -> Array:
    """A frame, in bytes, with room for (2, room) numbers, of which `rows` (2, ≤ room) are set."""
    buffer: Any = np.zeros(_HEADER.size + 16 * room, np.uint8)
    _HEADER.pack_into(buffer, 0, *fields, flags, n)
    if rows is not None:
        body(buffer)[:, : rows.shape[1]] = rows
    return buffer


def body(buffer: Any) -> Array:
    """The numbers (2, room) in a frame, as a view."""
    return np.frombuffer(buffer, np.float64, offset=_HEADER.size).reshape(2, -1)


def flags_and_n(buffer: Any) -> tuple[int, int]:
    """What a reduced frame says."""
    *_, flags, n = _HEADER.unpack_from(buffer)
    return flags, n


def combine(a: Any, b: Any) -> Any:
    """The frame b, made what a and b are together: moments pooled (E2), other numbers summed.

    combine(a, b) and combine(b, a) have the same bits where the headers agree, so that it does not matter which of two
    ranks does it. The flags that disagreeing headers leave are the same for every order of the ranks.
    """
    *fields_a, flags_a, n_a = _HEADER.unpack_from(a)
    *fields_b, flags_b, n_b = _HEADER.unpack_from(b)
    flags = flags_a | flags_b
    if fields_a != fields_b:
        flags |= sum((p != q) << index for index, (p, q) in enumerate(zip(fields_a, fields_b, strict=True)))
    _HEADER.pack_into(b, 0, *fields_b, flags, 0 if flags else n_a + n_b)
    if flags:
        return b  # nobody will read the numbers, which may mean different things
    ours, theirs = body(a), body(b)
    with np.errstate(all="ignore"):  # a warning may have been made an error, and an error here would end the job
        if fields_b[2] == code("forward"):
            pooled = reference.pool(Moments(n_a, ours[0], ours[1]), Moments(n_b, theirs[0], theirs[1]))
            theirs[0], theirs[1] = pooled.mean, pooled.m2
        else:
            theirs += ours
    return b


def canonical(numbers: Array) -> None:
    """Give every NaN the same bits: which of two NaNs an addition keeps depends on their order."""
    numbers[np.isnan(numbers)] = np.nan


# ---- What the ranks say when something is wrong ----------------------------------------------------------------------


def length_of_text(flags: int) -> int:
    """How many bytes each rank says: the settings of a model are a line for each parameter.

    All ranks see the same flags.
    """
    return 64 * TEXT if flags >> FIELDS.index("settings") & 1 else TEXT


def text_of_error(error: BaseException, length: int = TEXT) -> bytes:
    """The message of an error, or its class where the message alone would not tell."""
    text = str(error)
    if not text or not isinstance(error, TypeError | ValueError | RuntimeError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return _cut("!" + text, length)


def text_of_call(description: Mapping[str, Any], length: int = TEXT) -> bytes:
    """What a rank without an error was doing, name by name."""
    return _cut("\n".join(f"{name}\t{value}" for name, value in description.items()), length)


def _cut(text: str, length: int) -> bytes:
    return text.encode(errors="replace")[:length].ljust(length, b"\0")


def message(texts: Sequence[bytes], flags: int) -> str:
    """What is wrong, from the texts of all ranks: the errors, or what they disagree on."""
    read = [text.rstrip(b"\0").decode(errors="ignore") for text in texts]
    if errors := _by_text({rank: text[1:] for rank, text in enumerate(read) if text.startswith("!")}):
        return "\n".join(f"{_ranks(ranks)}: {text}" for text, ranks in errors.items())
    said = [dict(line.split("\t", 1) for line in text.split("\n") if "\t" in line) for text in read]
    lines = []
    for name in {name: None for description in said for name in description}:
        values = _by_text({rank: description.get(name, "not said") for rank, description in enumerate(said)})
        if len(values) > 1:
            lines.append(f"{name}: " + " and ".join(f"{value} on {_ranks(ranks)}" for value, ranks in values.items()))
    if not lines:
        lines = [", ".join(name for index, name in enumerate(FIELDS) if flags >> index & 1)]
    return "the ranks are not in the same call; they disagree on " + "; ".join(lines)


def _by_text(texts: Mapping[int, str]) -> dict[str, list[int]]:
    """The ranks that say the same."""
    found: dict[str, list[int]] = {}
    for rank, text in texts.items():
        found.setdefault(text, []).append(rank)
    return found


def _ranks(ranks: Sequence[int]) -> str:
    """'rank 1', 'ranks 0, 2–5'."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    parts = ["–".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"

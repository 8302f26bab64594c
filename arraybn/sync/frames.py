"""The data that ranks send: frames of one length, the reduction of two frames to one, and the texts of errors.

A frame is a header and room for two numbers for each of 256 channels. The header identifies the call. Where the
headers of two ranks differ, the reduction sets a flag, and the reduced header has the same flags on every rank.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from .. import reference
from .._arrays.namespaces import Array
from ..reference import Moments

FIRST_FRAME_CHANNELS = 256  # channels of a call that fit its first frame
TEXT = 1024  # bytes of the text that a rank sends after an error or a disagreement
VALUE, LISTED, RUNS = 60, 3, 8  # in a message: characters of a value, values of a name, runs of ranks
# The header holds the index of the operation.
OPERATIONS = ("forward", "backward", "average_gradients", "broadcast_state", "jvp", "double backward", "end")
FORWARD, BACKWARD, AVERAGE, BROADCAST, JVP, DOUBLE_BACKWARD, END = OPERATIONS

# The fields on which all ranks have to agree, in the order of the header; `bits` is a checksum of all results so far.
FIELDS = ("format", "call", "operation", "layer", "channels", "settings", "num_batches_tracked", "of call", "bits")
FORMAT = int.from_bytes(b"arraybn2", "big")  # a new number whenever the data that ranks send changes
_TAIL = struct.Struct("=iiq")  # flags, room, n
_HEADER = struct.Struct(f"={len(FIELDS)}q{_TAIL.format[1:]}")
LENGTH = _HEADER.size + 16 * FIRST_FRAME_CHANNELS
ERROR, BROKEN = 1 << len(FIELDS), 2 << len(FIELDS)  # flags, after one flag for each field
Rows: TypeAlias = Any  # two vectors of one length, as a tuple, or as one array
NO_ROWS: Rows = ((), ())

# ---- Frames ----------------------------------------------------------------------------------------------------------


code = {operation: index for index, operation in enumerate(OPERATIONS)}.__getitem__  # the number in the header


@functools.lru_cache(maxsize=4096)
def hash64(text: str) -> int:
    """Return a hash of `text` as a signed number of 64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big", signed=True)


def frame(
    fields: Sequence[int],
    flags: int,
    n: int,
    rows: Rows | None = None,
    room: int = FIRST_FRAME_CHANNELS,
) -> Array:
    """Return a frame in bytes, with room for (2, room) numbers, which begin with those of two rows."""
    buffer = np.zeros(_HEADER.size + 16 * room, np.uint8)
    write_header(buffer, fields, flags, n)
    if rows is not None:
        numbers, used = body(buffer), len(rows[0])
        numbers[0, :used], numbers[1, :used] = rows
    return buffer


def write_header(buffer: Any, fields: Sequence[int], flags: int, n: int) -> None:
    _HEADER.pack_into(buffer, 0, *fields, flags, (len(buffer) - _HEADER.size) // 16, n)


def body(buffer: Any) -> Array:
    """Return the numbers (2, room) of a frame, as a view."""
    return np.ndarray((2, (len(buffer) - _HEADER.size) // 16), np.float64, buffer, _HEADER.size)


def flags_and_n(buffer: Any) -> tuple[int, int]:
    """Return the flags and n of a reduced frame."""
    flags, _, n = _TAIL.unpack_from(buffer, _HEADER.size - _TAIL.size)
    return flags, n


def combine(a: Any, b: Any) -> Any:
    """Replace the frame b by that of a and b together, and return b: moments pooled (E2) in a forward, else sums.

    combine(a, b) and combine(b, a) have the same bits where the headers agree, so that either of two ranks may combine.
    The flags that different headers set are the same for every order of the ranks.
    """
    *fields_a, flags_a, room, n_a = _HEADER.unpack_from(a)
    *fields_b, flags_b, _, n_b = _HEADER.unpack_from(b)
    flags = flags_a | flags_b
    if fields_a != fields_b:
        flags |= sum((p != q) << index for index, (p, q) in enumerate(zip(fields_a, fields_b, strict=True)))
    _HEADER.pack_into(b, 0, *fields_b, flags, room, 0 if flags else n_a + n_b)
    if flags:
        return b  # the numbers, which may mean different things, will not be read
    ours, theirs = body(a), body(b)
    counts: Any = float(n_a), float(n_b)  # for the bits of the compiled twin, whose integers have 64 bits
    with np.errstate(all="ignore"):  # where warnings are errors, an error here would end the job
        if fields_b[2] == code(FORWARD):
            pooled = reference.pool(Moments(counts[0], *ours), Moments(counts[1], *theirs))
            theirs[0], theirs[1] = pooled.mean, pooled.m2
        else:
            theirs += ours
    canonical(theirs)
    return b


def canonical(numbers: Array) -> None:
    """Give every NaN the same bits, because the NaN that an addition of two NaNs keeps depends on their order."""
    nan = np.isnan(numbers)
    if np.count_nonzero(nan):  # a look costs less than the assignment
        numbers[nan] = np.nan


# ---- Texts after an error or a disagreement --------------------------------------------------------------------------


def length_of_text(flags: int) -> int:
    """Return the bytes of the text of each rank: more for settings, which are a line for each parameter of a model.

    The number is the same on all ranks, because the reduced flags are.
    """
    return 64 * TEXT if flags >> FIELDS.index("settings") & 1 else TEXT


def text_of_error(error: BaseException, length: int = TEXT) -> bytes:
    """Return the message of an error, after its class where the message alone would be unclear."""
    text = str(error)
    if not text or not isinstance(error, TypeError | ValueError | RuntimeError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return _cut("!" + text, length)


def text_of_call(description: Mapping[str, Any], length: int = TEXT) -> bytes:
    """Return the description of a call, a line for each name, from a rank without an error."""
    return _cut("\n".join(f"{name}\t{value}" for name, value in description.items()), length)


def _cut(text: str, length: int) -> bytes:
    return text.encode(errors="replace")[:length].ljust(length, b"\0")


def read_text(text: bytes) -> str:
    """Return the text that a rank has sent; the text of an error begins with "!"."""
    return text.rstrip(b"\0").decode(errors="ignore")


def message(texts: Sequence[bytes], flags: int) -> str:
    """Return the errors in the texts of all ranks, or the first cause of a disagreement with its likely reason."""
    read = [read_text(text) for text in texts]
    if errors := ranks_by_text({rank: text[1:] for rank, text in enumerate(read) if text.startswith("!")}):
        return "\n".join(f"{ranks_text(ranks)}: {text}" for text, ranks in errors.items())
    calls = [_call(text) for text in read]
    if differences := _differences(calls):
        name, line = differences[0]
        cause = f"{line}{_common_call(calls)}\nLikely reason: {_REASONS.get(name, _OTHER_MODEL)}"
    else:  # the fields that differ are not in the texts
        cause = ", ".join(name for index, name in enumerate(FIELDS) if flags >> index & 1)
    return f"the ranks are not in the same call; they disagree on {cause}"


def notes(texts: Sequence[bytes]) -> list[str]:
    """Return a line for each further name on which the ranks disagree, after the first cause."""
    read = [read_text(text) for text in texts]
    if any(text.startswith("!") for text in read):
        return []
    return [f"they also disagree on {line}" for _, line in _differences([_call(text) for text in read])[1:]]


_FIRST = (
    "operation",
    "layer",
    "call of the forward",
)  # before the settings, because ranks in other calls differ in those
_LAST = ("channels", "num_batches_tracked", "call", "checksum of all results")
_REASONS = {
    "operation": "a rank is in evaluation, or has skipped a layer, its backward or another call",
    "layer": "a rank is in evaluation, has skipped a layer, or calls its layers in another order",
    "call of the forward": "a rank has skipped a backward, or has gone back by the forward of another batch",
    "training": "a rank is in evaluation",
    "channels": "the inputs of the ranks do not have the same number of channels",
    "num_batches_tracked": "a rank has trained alone or loaded another file; broadcast_state makes the states equal",
    "call": "a rank has lost a call by an interrupt",
    "checksum of all results": "the MPI has given two ranks different bits of one result",
}
_OTHER_MODEL = "the ranks have not built their models alike, or one has changed its model"


def _call(text: str) -> dict[str, str]:
    return dict(line.split("\t", 1) for line in text.split("\n") if "\t" in line)


def _common_call(calls: Sequence[Mapping[str, str]]) -> str:
    """Return ", in the forward of layer '1'" where all ranks are in that, otherwise ''."""
    if len({(call.get("operation"), call.get("layer")) for call in calls}) > 1 or "operation" not in calls[0]:
        return ""
    return f", in the {calls[0]['operation']} of {calls[0]['layer']}"


def _differences(calls: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Return name and line of all in which the calls of the ranks differ, the likely cause first."""
    lines = []
    for name in sorted({name: None for call in calls for name in call}, key=_place):
        values = dict(enumerate(call.get(name, "not said") for call in calls))
        if len(set(values.values())) == 1:
            continue
        if name == "operation":
            values = {rank: f"{value} of {calls[rank].get('layer')}" for rank, value in values.items()}
        lines.append((name, f"{name}: {_listed(ranks_by_text(values))}"))
    return lines


def _place(name: str) -> int:
    """Return the place of a name among the causes: a difference explains those of the names after it."""
    if name in _FIRST:
        return _FIRST.index(name)
    return len(_FIRST) + (1 + _LAST.index(name) if name in _LAST else 0)


def _listed(values: Mapping[str, Sequence[int]]) -> str:
    """Return each value with its ranks; of many or long values, the beginning."""
    parts = [f"{_shortened(value)} on {ranks_text(ranks)}" for value, ranks in values.items()]
    rest = [f"{len(parts) - LISTED} other values"] if len(parts) > LISTED else []
    *before, last = parts[:LISTED] + rest
    return f"{', '.join(before)} and {last}"


def _shortened(value: str) -> str:
    return value if len(value) <= VALUE else f"{value[: VALUE - 1]}…"


def ranks_by_text(texts: Mapping[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, text in texts.items():
        found.setdefault(text, []).append(rank)
    return found


def ranks_text(ranks: Sequence[int]) -> str:
    """'rank 1', 'ranks 0, 2–5'."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    parts = ["–".join(map(str, run)) for run in runs]
    if len(parts) > RUNS:
        parts[RUNS:] = [f"… ({len(ranks)} ranks)"]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"

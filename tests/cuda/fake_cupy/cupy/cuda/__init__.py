"""`cupy.cuda`, as far as arraybn uses it."""

from __future__ import annotations

from typing import Any

from .._fake import DEVICES, Device, Event, ExternalStream, MemoryPointer, Stream, default_stream, get_current_stream
from . import device as device
from . import runtime as runtime

__all__ = [
    "Device",
    "Event",
    "ExternalStream",
    "MemoryPointer",
    "Stream",
    "get_current_stream",
    "get_device_id",
    "is_available",
]

Stream.null = default_stream(0)


def is_available() -> bool:
    return DEVICES > 0


def get_device_id() -> int:
    return Device().id


def get_elapsed_time(start_event: Any, end_event: Any) -> float:
    raise NotImplementedError("the fake measures no time")

"""`cupy.cuda.runtime`, as far as arraybn uses it."""

from __future__ import annotations

import os
from typing import Any

from .. import _fake
from .._fake import CUDARuntimeError as CUDARuntimeError

is_hip = os.environ.get("ARRAYBN_FAKE_HIP") == "1"  # then arrays get the reference


def getDeviceCount() -> int:  # noqa: N802
    """Return 2; with ARRAYBN_FAKE_GPUS=0 fail as on a machine without a driver."""
    if os.environ.get("ARRAYBN_FAKE_GPUS") == "0":
        raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
    return _fake.DEVICES


def getDevice() -> int:  # noqa: N802
    return _fake.current_device()


def setDevice(device: int) -> None:  # noqa: N802
    _fake.Device(device).use()


def deviceSynchronize() -> None:  # noqa: N802
    _fake.Device().synchronize()


def getDeviceProperties(device: int) -> dict[str, Any]:  # noqa: N802
    return {
        "name": f"Fake GPU {device}".encode(),
        "totalGlobalMem": 2**34,
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 4,
        "l2CacheSize": 2**22,
    }


def driverGetVersion() -> int:  # noqa: N802
    return 13010


def runtimeGetVersion() -> int:  # noqa: N802
    return 13000

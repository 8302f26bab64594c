"""The machine: its processor, cores, memory and foreign load; and the versions installed."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    return {"processor": processor(), "cores": cores()}


def processor() -> str:
    """Return the name of the CPU, or of its kind where the system tells no more."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=5, check=True).stdout.strip()
    return platform.processor() or platform.machine() or "unknown processor"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """Return the bytes that can still be had, within the limit of a container; None if unreported."""
    found = [bytes_ for bytes_ in (system_memory(), container_memory()) if bytes_ is not None]
    return min(found, default=None)


def system_memory() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def container_memory(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what control groups (version 2) leave, counting as free the pages of files that can be dropped."""
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - used + next((int(value) for name, value in lines if name == "inactive_file"), 0)
    return None


def version(package: str) -> str:
    """Return the version of the distribution that brings the package, or ''."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    found = metadata.packages_distributions().get(package, [])
    return metadata.version(found[0]) if found else ""


class ForeignLoad:
    """The cores that other programs keep busy, from when this is made on."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), _all_work(), _our_work()

    def cores(self) -> float | None:
        """Return the cores on the average; None if unreported. Subtracts our children that have ended."""
        start, everyone, ours = self._start
        now, elapsed = _all_work(), time.perf_counter() - start
        if now is None or everyone is None or elapsed <= 0:
            return None
        return max(0.0, (now - everyone - (_our_work() - ours)) / elapsed)


def _all_work() -> float | None:
    """Return the seconds that all cores have worked since the system started."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        numbers = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")
    return None


def _our_work() -> float:
    """Return the seconds that this process and its children, as far as they have ended, have worked."""
    return sum(os.times()[:4])

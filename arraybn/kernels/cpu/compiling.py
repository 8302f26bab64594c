"""Compiling once for all processes of a machine, and the one line that says why the first call takes seconds."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows, where every process compiles
    fcntl = None  # type: ignore[assignment]

PATIENCE = 30.0  # seconds of waiting for another process, several times the time that one entry takes


@functools.cache
def announce(folder: str) -> None:
    """Log, once a process, that kernels are being compiled; without handlers logging writes the line to stderr."""
    if not os.environ.get("ARRAYBN_QUIET"):
        text = "arraybn: compiling the kernels for NumPy arrays takes some seconds, once; they are kept in %s"
        logging.getLogger("arraybn").warning(text, folder)


@contextmanager
def turn(path: str) -> Iterator[None]:
    """Wait until no other process or thread holds the lock file `path`, but not longer than PATIENCE, and hold it.

    The operating system frees the lock when its holder dies. Where nothing can be locked, nobody waits.
    """
    try:
        file = open(path, "ab")  # noqa: SIM115
    except OSError:
        yield
        return
    with file:
        end = time.monotonic() + PATIENCE
        while not _lock(file) and time.monotonic() < end:
            time.sleep(0.02)
        try:
            yield
        finally:
            with suppress(OSError):
                os.unlink(path)  # a process that still waits for this file then finds the compiled code
            _unlock(file)


def _lock(file: IO[Any]) -> bool:
    """Lock the file; return False if another holds the lock."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _unlock(file: IO[Any]) -> None:
    """Free the lock, which would outlast the closing of the file in a child that was forked meanwhile."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)

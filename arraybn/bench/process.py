"""A process that does the work of an object: it waits for questions, and its threads rest meanwhile.

One that crashes, hangs or talks costs its own answers alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIME_LIMIT = 120.0  # seconds for one question
SPAWN = multiprocessing.get_context("spawn")


class PeerError(Exception):
    """A process gave no answer; the text says why."""


class UnsupportedError(Exception):
    """A library does not take such arrays; the text says why."""


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if isinstance(error, PeerError | UnsupportedError) else f"{type(error).__name__}: {text}"


class Worker:
    """A process that makes an object and calls its methods; "start" is asked at once, and read by `answer`."""

    def __init__(self, make: Callable[[], Any], environment: Mapping[str, str], limit: float = TIME_LIMIT) -> None:
        self.limit, self.failed = limit, ""
        with tempfile.NamedTemporaryFile(delete=False) as file:
            self._errors = Path(file.name)
        self._connection, theirs = SPAWN.Pipe()
        arguments = theirs, self._errors, dict(environment), make
        self._process = SPAWN.Process(target=serve, args=arguments, daemon=True)
        with _ignoring_interrupts():
            self._process.start()
        theirs.close()
        self._send("start", {})

    def _send(self, method: str, question: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has ended; `answer` says how
            self._connection.send((method, question))

    def ask(self, method: str, /, **question: Any) -> Any:
        """Return the answer; a `PeerError` says that there is none, and `failed` if there will be no other."""
        if self.failed:
            raise PeerError(self.failed)
        self._send(method, question)
        return self.answer()

    def answer(self) -> Any:
        try:
            if not self._connection.poll(self.limit):
                self._process.kill()
                self.failed = f"no answer within {self.limit:g} s"
                raise PeerError(self.failed)
            found = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            self.failed = self._ending(self._process.exitcode or 0)
            raise PeerError(self.failed) from None
        if isinstance(found, PeerError):
            raise found
        return found

    def _ending(self, status: int) -> str:
        if status < 0:
            return f"ended by signal {-status}"
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return lines[-1] if status and lines else f"ended early, exit status {status}"

    def stop(self) -> None:
        """End the process: by the end of its questions if it hears of it, otherwise whatever it is doing."""
        self._connection.close()
        self._process.join(0 if self.failed else 5.0)
        self._process.kill()
        self._process.join()
        self._process.close()
        self._errors.unlink(missing_ok=True)


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Let a process that is started meanwhile inherit that Ctrl-C, which is for its parent, is ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def serve(connection: Connection, errors: Path, environment: Mapping[str, str], make: Callable[[], Any]) -> None:
    """Answer each question by the method that it names, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = os.open(errors, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):  # what a library prints is no answer
        os.dup2(descriptor, stream)
    os.environ.update(environment)
    work = make()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            method, question = connection.recv()
            try:
                answer = getattr(work, method)(**question)
            except Exception as error:
                answer = PeerError(first_line(error))
            connection.send(answer)

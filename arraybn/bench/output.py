"""Parts of all measuring commands: refusals, files, the progress bar, and an end that Ctrl-C does not spoil."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from .._install import requirement

Column = tuple[str, int, Callable[[Any], str]]  # heading, width, text of a row's figures


class RefusedError(Exception):
    """The command cannot be carried out; the text says why."""


def headings(columns: Sequence[Column]) -> str:
    return "".join(f"{heading:>{width}}" for heading, width, _ in columns)


def entries(columns: Sequence[Column], figures: Any) -> str:
    return "".join(f"{text(figures):>{width}}" for _, width, text in columns)


def paragraphs(*texts: str) -> str:
    return "\n".join(["", *(textwrap.fill(text, 110) for text in texts)])


def check_files(plot: str | None, file: str | None) -> None:
    """Refuse, before any work, a picture that cannot be drawn and files that cannot be written after it."""
    if plot is not None:
        try:
            importlib.import_module("matplotlib.figure")
        except ImportError as error:
            text = f"--plot needs matplotlib ({error}): install with  pip install {requirement('demo')}"
            raise RefusedError(text) from error
    for option, name in (("--plot", plot), ("--json", file)):
        if name not in (None, "-") and (Path(name).is_dir() or not Path(name).absolute().parent.is_dir()):
            raise RefusedError(f"{option} {name}: expected a file in a folder that is there")


def check_peers(names: Sequence[str], missing: Mapping[str, str]) -> None:
    """Refuse "none" beside names, and libraries that are not installed; `missing` has what pip installs."""
    if "none" in names and set(names) != {"none"}:
        raise RefusedError(f"--peers: expected none alone, or names without it; got {' '.join(names)}")
    for name in names:
        if name in missing:
            how = f"{sys.executable} -m pip install {missing[name]}"
            raise RefusedError(f"--peers: expected libraries that are installed; {name} is not:  {how}")


def write_json(file: str | None, content: Any) -> None:
    """Write the figures to the file, to stdout where it is "-", or nowhere where it is None."""
    if file is not None:
        text = json.dumps(content, indent=1, allow_nan=False)
        print(text) if file == "-" else Path(file).write_text(f"{text}\n", encoding="utf-8")


def progress_bar(total: int, unit: str) -> AbstractContextManager[Any]:
    """Return tqdm's bar, or None where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext()
    bar: AbstractContextManager[Any] = tqdm(total=total, unit=unit, leave=False, disable=None)
    return bar


class Progress:
    """The current activity, shown in a progress bar if there is one."""

    _bar: Any = None

    def status(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description(text)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()


class Run(Progress):
    """A run of a bench: `measure` does the work, `report` prints the rest of it; Ctrl-C ends the first alone."""

    measure: Callable[[], None]
    report: Callable[[], None]
    as_json: Callable[[], dict[str, Any]]
    draw: Callable[[Path], None]

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.interrupted = arguments, False

    def wrong(self) -> bool:
        return False

    @property
    def stream(self) -> Any:
        """The stream for what is no figure: stdout, unless that is for the JSON."""
        return sys.stderr if self.arguments.json == "-" else sys.stdout

    def say(self, text: str) -> None:
        """Print a part of the report, above the progress bar; nothing where stdout is for the JSON."""
        if self.arguments.json != "-":
            (print if self._bar is None else self._bar.write)(text, file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def progress(self, total: int, unit: str) -> Iterator[None]:
        with progress_bar(total, unit) as bar:
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def finish(self) -> None:
        """Print the rest of the report, write the files."""
        self.report()
        if self.arguments.json is not None:
            write_json(self.arguments.json, self.as_json())
        if self.arguments.plot is not None:
            self.draw(Path(self.arguments.plot))

    def carry_out(self) -> int:
        """Measure and finish. Return 1 if arraybn is wrong, 130 after Ctrl-C."""
        try:
            self.measure()
        except KeyboardInterrupt:
            self.interrupted = True
        try:
            self.finish()
        except OSError as error:  # a full disk, a folder that went away
            if isinstance(error, BrokenPipeError):
                raise
            raise RefusedError(f"cannot write: {error}") from error
        if self.interrupted:
            print("interrupted; the figures are of what was measured before", file=sys.stderr)
            return 130
        return int(self.wrong())

"""The command line ``python -m arraybn``, or ``arraybn``, which calls the modules in ``arraybn.commands``."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ._version import __version__
from .commands import bench, check, demo, info

COMMANDS = {"info": info, "demo": demo, "check": check, "bench": bench}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (by default, of the command line) and return its exit status."""
    program = "arraybn" if Path(sys.argv[0]).stem == "arraybn" else "python -m arraybn"
    text = "Batch normalization that people can read, trust and run anywhere."
    parser = argparse.ArgumentParser(prog=program, description=text)
    parser.add_argument("--version", action="version", version=f"arraybn {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="command")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.DESCRIPTION)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(words)
    arguments.command_line = shlex.join(["python", "-m", "arraybn", *words])
    if not hasattr(arguments, "run"):
        parser.print_help(sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "–" must not lose the result
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, perhaps `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

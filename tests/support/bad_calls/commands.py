"""Wrong commands."""

from __future__ import annotations

import contextlib
import io

from arraybn.__main__ import main

from .texts import Bad


class CommandError(Exception):
    """A command ended with another status than 0; the text is the last line on stderr."""


def run(*argv: str) -> None:
    """Run `python -m arraybn` with these arguments."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            status = main(argv)
        except SystemExit as end:  # argparse
            status = end.code
    if status:
        raise CommandError(stderr.getvalue().strip().splitlines()[-1])


ERROR = r"python -m arraybn(?: demo)?: error: "

COMMANDS = [
    Bad(
        "run('nope')", CommandError, ERROR + r"argument command: invalid choice: 'nope' \(choose from .*\)", "command"
    )._replace(pattern=True),
    Bad("run('--nope')", CommandError, ERROR + "unrecognized arguments: --nope", "--nope", pattern=True),
    Bad("run('info', 'more')", CommandError, ERROR + "unrecognized arguments: more", "more", pattern=True),
    *[
        Bad(
            f"run('demo', '--{option}', '{value}')",
            CommandError,
            f"python -m arraybn demo: error: argument --{option}: expected an integer from {span}; got '{value}'",
            f"--{option}",
        )
        for option, span in {"epochs": "1 to 10000", "seed": "0 to 4294967295"}.items()
        for value in ("-1", "1.5", "many", "99999999999")
    ],
    Bad(
        "run('check', 'mine:forward', '--accuracy', 'some')",
        CommandError,
        r"python -m arraybn check: error: argument --accuracy: invalid choice: 'some' \(choose from .*\)",
        "--accuracy",
        pattern=True,
    ),
    Bad(
        "run('demo', '--epochs')",
        CommandError,
        "python -m arraybn demo: error: argument --epochs: expected one argument",
        "--epochs",
    ),
    Bad(
        "run('demo', '--no-plot', '--out', 'here')",
        CommandError,
        "demo: --out here: expected a folder; this is a file",
        "--out",
        setup="Path('here').write_text('')",
        needs="sklearn",
    ),
]

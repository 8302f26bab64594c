"""Run ``python -m arraybn`` as a person does, in this Python or in one that has nothing but the requirements."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import arraybn

PACKAGE = Path(arraybn.__file__).parent

NAMED = re.compile(r'"[^"\s]+\[(\w+)\]"')  # a requirement of arraybn with an extra

Result = subprocess.CompletedProcess[str]


def environment(**changes: str) -> dict[str, str]:
    """Return an environment in which a child finds this arraybn from any folder and prints UTF-8."""
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", **changes}


def as_installed(text: str) -> str:
    """Return the text with the requirements that users of an installed arraybn read: of a checkout they are a path."""
    return NAMED.sub(r'"arraybn[\1]"', text)


def python(*arguments: str, limit: float = 60, cwd: Path, **changes: str) -> Result:
    command = [sys.executable, *arguments]
    env = environment(**changes)
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=limit, cwd=cwd, env=env, check=False)


def arraybn_command(*arguments: str, cwd: Path, limit: float = 60, **changes: str) -> Result:
    return python("-m", "arraybn", *arguments, cwd=cwd, limit=limit, **changes)


def after(preparation: str, *arguments: str, cwd: Path) -> Result:
    """Run the command in a Python that has executed `preparation` first."""
    code = f"import sys\n{preparation}\nfrom arraybn.__main__ import main\nsys.exit(main({list(arguments)!r}))"
    return python("-c", code, cwd=cwd)


def make_bare_site(home: Path) -> Path:
    """Make a Python in `home` whose packages, arraybn and its requirements alone, are links; return their folder."""
    venv.create(home, symlinks=os.name != "nt")
    site = next(home.rglob("site-packages"))
    (site / "arraybn").symlink_to(PACKAGE)
    for name in ("numpy", "array-api-compat"):
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return site


def bare(site: Path, *arguments: str, **changes: str) -> Result:
    """Run `python -m arraybn` in that Python, with nothing on PATH."""
    home = next(parent for parent in site.parents if (parent / "pyvenv.cfg").exists())
    program = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PATH": str(site), "PYTHONIOENCODING": "utf-8", **changes}
    command = [str(program), *(arguments if arguments[0] == "-c" else ("-m", "arraybn", *arguments))]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=60, cwd=site.parent, env=env, check=False
    )


@contextlib.contextmanager
def added(site: Path, files: dict[str, str]) -> Iterator[None]:
    """Add files of further packages or programs to the site, as long as the context lasts."""
    tops = {site / Path(name).parts[0] for name in files}
    assert not any(top.exists() for top in tops)
    try:
        for name, text in files.items():
            (site / name).parent.mkdir(exist_ok=True)
            (site / name).write_text(text)
            (site / name).chmod(0o755)
        yield
    finally:
        for top in tops:
            shutil.rmtree(top) if top.is_dir() else top.unlink()

"""The requirement that pip takes to install an extra of arraybn, as texts for users name it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def requirement(extra: str) -> str:
    """Return ``"arraybn[cpu]"``, in quotes, or the same with the path of the checkout that arraybn is imported from.

    In a checkout that was not installed, pip would look for arraybn in an index. ``"."`` is the current folder.
    """
    root = Path(__file__).parents[1]
    installed = any(found.read_text("RECORD") for found in metadata.distributions(name="arraybn"))
    if installed or not (root / "setup.cfg").exists():
        return f'"arraybn[{extra}]"'
    return f'".[{extra}]"' if root == Path.cwd() else f'"{root}[{extra}]"'

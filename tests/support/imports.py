"""The imports among the modules of a package, drawn from their syntax trees: none is executed."""

from __future__ import annotations

import ast
from pathlib import Path


def module_files(package: Path) -> dict[str, Path]:
    """Return the file of every module of the package, by dotted name."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports_among(package: Path) -> dict[str, set[str]]:
    """Return, for each module of the package, the modules of the package that its import statements name.

    Each statement counts: at the top of a file, in a function, and under TYPE_CHECKING.
    """
    files = module_files(package)
    return {name: _imported(name, path, set(files)) for name, path in files.items()}


def _imported(name: str, path: Path, modules: set[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {_module_in(alias.name, modules) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, name, is_package=path.name == "__init__.py")
            found |= {_module_in(f"{base}.{alias.name}", modules) for alias in node.names}
    return found - {""}


def _base(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    """Return the dotted name of what stands between `from` and `import`."""
    if node.level == 0:
        return node.module or ""
    parts = name.split(".")
    package = parts[: len(parts) - node.level + is_package]
    return ".".join([*package, *filter(None, [node.module])])


def _module_in(name: str, modules: set[str]) -> str:
    """Return the module that `name` is, or is an attribute of; '' where that is of another package."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name

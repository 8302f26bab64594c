"""The order among the tests: what a test file may import, and the equations and promises in the names of tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def imported_tests(source: str) -> set[str]:
    """Return the test files, and the conftest, that some Python source imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[-1].startswith(("test_", "conftest"))}


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_test_file_imports_from_another(path: Path) -> None:
    assert imported_tests(path.read_text()) == set()


@pytest.mark.parametrize(
    "planted",
    [
        "import test_arrays",
        "from test_arrays import data",
        "from conftest import need",
        "from . import test_arrays",
        "def work():\n    from tests.test_arrays import data",
        "if TYPE_CHECKING:\n    import numpy, test_arrays as arrays",
    ],
)
def test_a_planted_import_is_found(planted: str) -> None:
    assert len(imported_tests(f"import pytest\nfrom support.libraries import need\n{planted}\n")) == 1


def test_every_equation_and_promise_stands_in_the_name_of_a_test() -> None:
    root = TESTS.parent
    source = "".join(path.read_text() for path in (root / "arraybn").rglob("*.py"))
    promises = re.findall(r"^\| ([NT]\d) ", (root / "docs" / "numerics.md").read_text(), re.MULTILINE)
    labels = {*re.findall(r"\bE\d+\b", source), *promises}
    assert {"E1", "E7", "N1", "N4"} <= labels
    text = "".join(path.read_text() for path in TESTS.glob("test_*.py"))
    names = [f"{name}_" for name in re.findall(r"^ *def (test_\w+)", text, re.MULTILINE)]
    assert [label for label in labels if not any(f"_{label.lower()}_" in name for name in names)] == []

"""The pages of the docs: every block runs and prints what stands below it, every link and every test is there."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import re
import shlex
import textwrap
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.libraries import need

import arraybn
from arraybn import __main__ as command_line
from arraybn import interchange, network, testing

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "CONTRIBUTING.md"]
REFERENCE = "".join(path.read_text() for path in sorted((DOCS / "reference").glob("*.md")))
LANGUAGES = {"python", "pycon", "sh", "text", ""}  # and {directives} of MyST; "" is a command or what it prints

NOT_RUN = {  # page, how often, and what the comment before the block says
    ("synchronized.md", "needs ranks"): 4,
    ("synchronized.md", "needs a GPU"): 1,
    ("how-to/mpirun.md", "needs ranks"): 1,
    ("how-to/lost-rank.md", "needs ranks"): 1,
    ("how-to/inside-pytorch.md", "needs ranks"): 1,
    ("how-to/install.md", "needs a GPU"): 1,
}
# pages whose blocks need more than the tests do
PEERS = {"how-to/pytorch.md": "torch", "how-to/inside-pytorch.md": "torch", "how-to/jax.md": "jax"}


class Block(NamedTuple):
    language: str
    text: str
    line: int
    reason: str  # why it is not run


def name_of(path: Path) -> str:
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def blocks(path: Path) -> list[Block]:
    fence = r"(?:^<!-- not run: (.*?) -->\n+)?^( *)```([^\n]*)\n(.*?)^\2```$"
    text = path.read_text()
    found = re.finditer(fence, text, re.MULTILINE | re.DOTALL)
    return [Block(m[3], textwrap.dedent(m[4]), text[: m.start(4)].count("\n"), m[1] or "") for m in found]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_blocks_say_what_they_are(path: Path) -> None:
    for block in blocks(path):
        assert block.language in LANGUAGES or block.language.startswith("{"), f"{path.name}:{block.line}"
        assert not block.reason or block.language == "python", f"{path.name}:{block.line}: nothing to run"
    assert path.read_text().count("<!-- not run") == sum(bool(block.reason) for block in blocks(path))


def test_what_is_not_run_is_listed() -> None:
    seen: dict[tuple[str, str], int] = {}
    for path in PAGES:
        for block in blocks(path):
            if block.reason:
                compile(block.text, path.name, "exec")
                key = (name_of(path), block.reason.split(":")[0])
                seen[key] = seen.get(key, 0) + 1
    listed = {key: count for key, count in NOT_RUN.items() if (DOCS / key[0]).exists()}
    assert seen == listed


def run(path: Path) -> None:
    """Run the page's blocks in order, in one namespace; what a block prints is the text block that follows it."""
    space: dict[str, Any] = {"__name__": "page"}
    found = [block for block in blocks(path) if block.language in LANGUAGES]
    for block, after in zip(found, [*found[1:], None], strict=True):
        where = f"{path.name}:{block.line}"
        if block.language == "pycon":
            test = doctest.DocTestParser().get_doctest(block.text, space, where, str(path), block.line)
            flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
            assert not doctest.DocTestRunner(optionflags=flags).run(test, clear_globs=False).failed, where
            space.update(test.globs)
        if block.language == "python" and not block.reason:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * block.line + block.text, str(path), "exec"), space)
            if printed.getvalue():
                assert after is not None, where
                assert after.language in ("text", ""), where
                lines = [line.rstrip() for line in printed.getvalue().rstrip().splitlines()]
                assert lines == after.text.rstrip().splitlines(), where


@pytest.mark.parametrize(
    "path", [p for p in PAGES if {"python", "pycon"} & {b.language for b in blocks(p)}], ids=name_of
)
def test_code_runs_and_prints_what_the_page_says(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name_of(path) in PEERS:
        need(PEERS[name_of(path)])
    monkeypatch.chdir(tmp_path)
    run(path)


def test_a_wrong_block_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n2\n```\n\n```pycon\n>>> x\n1\n```\n"
    )
    run(page)
    right = page.read_text()
    for old, new in (("text\n2", "text\n3"), (">>> x\n1", ">>> x\n2"), ("x = 1", "x = 1; assert x == 2")):
        page.write_text(right.replace(old, new))
        with pytest.raises(AssertionError):
            run(page)


def commands(path: Path) -> list[list[str]]:
    text = "\n".join(block.text for block in blocks(path) if block.language in ("sh", "")).replace("\\\n", " ")
    found = re.findall(
        r"-m arraybn\b(.*)", text + "\n" + "\n".join(re.findall(r"`([^`\n]*-m arraybn[^`\n]*)`", path.read_text()))
    )
    return [shlex.split(arguments, comments=True) for arguments in found]


def test_the_options_of_commands_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in command_line.COMMANDS.values():
        monkeypatch.setattr(command, "run", lambda arguments: 0)
    count = 0
    for path in [*PAGES, ROOT / "README.md"]:
        for arguments in filter(None, commands(path)):
            try:
                status = command_line.main(arguments)
            except SystemExit as stop:  # of argparse: 2, or 0 for --help
                status = stop.code or 0
            assert status == 0, f"{path.name}: python -m arraybn {' '.join(arguments)}"
            count += 1
    assert count > 10
    with pytest.raises(SystemExit):
        command_line.main(["bench", "--fast"])


# ---- Links, and the tests that pages name ----------------------------------------------------------------------------


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as code hosts and MyST make them."""
    text = re.sub(r"^( *)```.*?^\1```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = [title.replace("`", "").lower() for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md", *(ROOT / "notebooks").glob("*.md")], ids=name_of)
def test_links_lead_to_a_file_and_a_heading(path: Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), target
        assert not anchor or place.suffix != ".md" or anchor in anchors(place), target


def test_every_page_can_be_reached() -> None:
    """A reader gets to each page from the front page; Sphinx warns of a page that is in no table of contents."""
    reached, todo = set(), [DOCS / "index.md"]
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md" or not page.exists():
            continue
        reached.add(page)
        todo += [(page.parent / file).resolve() for file in re.findall(r"\]\(([^)#:\s]+)", page.read_text())]
    assert {path for path in PAGES if path.is_relative_to(DOCS) and path.name != "gpu.md"} <= reached


@cache
def functions_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_tests_that_a_page_names_exist(path: Path) -> None:
    for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", path.read_text()):
        assert name.startswith("test_")
        assert name in functions_in(ROOT / file), f"{file}::{name}"
    for file in re.findall(r"`(tests/[\w/]+\.py)\b", path.read_text()):
        assert (ROOT / file).exists(), file


def test_every_line_of_the_conventions_names_its_test() -> None:
    text = (DOCS / "conventions.md").read_text()
    tables = [table for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE) if "held by" in table]
    rows = [row for table in tables for row in table.splitlines()[2:]]
    assert len(rows) > 40
    for row in rows:
        assert re.search(r"`tests/test_\w+\.py::test_\w+` \|$", row), row


def test_the_table_of_accuracy_is_that_of_the_readme() -> None:
    tables = [
        re.search(r"^ +mean +var.*?(?=^```)", p.read_text(), re.M | re.S)
        for p in (ROOT / "README.md", DOCS / "numerics.md")
    ]
    assert all(tables)
    assert tables[0][0] == tables[1][0]  # type: ignore[index]


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", text, re.MULTILINE)[1] == arraybn.__version__  # type: ignore[index]
    assert re.search(r"^license: (.*)$", text, re.MULTILINE)[1] in (ROOT / "setup.cfg").read_text()  # type: ignore[index]


# ---- The reference ---------------------------------------------------------------------------------------------------


def public() -> list[tuple[str, Any]]:
    found = []
    for module in (arraybn, testing, importlib.import_module("arraybn.testing.strategies"), interchange, network):
        names = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
        ]
        found += [(f"{module.__name__}.{name}", getattr(module, name)) for name in names if not name.startswith("_")]
    return [(name, value) for name, value in found if not inspect.ismodule(value)]


@pytest.mark.parametrize(("name", "value"), public(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_public_name_is_in_the_reference_with_an_example(name: str, value: Any) -> None:
    short = name.removeprefix("arraybn.")
    assert re.search(rf"^\.\. auto(function|class|exception|data):: (arraybn\.)?{re.escape(short)}$", REFERENCE, re.M)
    used = rf"^[^`#]*\b{value.__name__}\b" if hasattr(value, "__name__") else ""
    in_blocks = "".join(b.text for p in (DOCS / "reference").glob("*.md") for b in blocks(p) if b.language == "python")
    assert ">>>" in (inspect.getdoc(value) or "") or (used and re.search(used, in_blocks, re.M))

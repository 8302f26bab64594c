"""The lessons: each has the required parts and runs as it is kept, and a claim made false is found."""

from __future__ import annotations

import ast
import copy
import functools
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.libraries import need

ROOT = Path(__file__).parents[1]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIDY = ROOT / "notebooks" / "tidy.py"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELLS, LINES, CLAIMS, SIZE = 40, 10, 8, 400_000  # at most, at most, at least, bytes at most
MIMES = {"text/plain", "image/png"}  # what is shown alike by Jupyter, VS Code, Colab and the site
FOREIGN = r"(?<![\w.])/(?:home|mnt|opt|private|root|tmp|usr|Users|var|work)/|site-packages|[A-Z]:\\\\?Users"
STAMP = r"\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d"
ADDRESS = r"\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b"
NEEDED = ("nbclient", "ipykernel", "ipyparallel", "matplotlib", "numba", "sklearn")  # beside the library's own needs
TIME_LIMIT = 600  # seconds for a lesson, on a machine that does other things as well
Notebook = dict[str, Any]
Cell = dict[str, Any]

each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def read(path: Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: Cell) -> str:
    return "".join(cell["source"])


def code(notebook: Notebook) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def texts(notebook: Notebook) -> list[str]:
    """Return all text of the lesson, cell by cell, outputs too."""
    return [source(cell) for cell in notebook["cells"]] + [text(out) for c in code(notebook) for out in c["outputs"]]


def text(output: Cell) -> str:
    """Return the text of an output; "" for a picture alone."""
    shown = output.get("text") or output.get("data", {}).get("text/plain") or output.get("traceback") or ""
    return "".join(shown)


def parsed(cell: Cell) -> ast.Module | None:
    """Return the syntax tree; None where the cell is not plain Python, as under a magic."""
    try:
        return ast.parse(source(cell))
    except SyntaxError:
        return None


def answers(notebook: Notebook) -> list[str]:
    """Return the code in the answers to the exercises, one text for each block."""
    folded = [source(cell) for cell in notebook["cells"] if "<details>" in source(cell)]
    return [block for cell in folded for block in re.findall(r"```python\n(.*?)```", cell, re.DOTALL)]


def pictures(cell: Cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))


def at_top(tree: ast.Module | None) -> Iterator[ast.AST]:
    """Return the nodes that run with the cell: everything but the bodies of functions and classes."""
    waiting: list[ast.AST] = [] if tree is None else [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def claims(tree: ast.Module | None) -> list[ast.Assert]:
    """Return the asserts that run with the cell and test a named value."""
    found = [node for node in at_top(tree) if isinstance(node, ast.Assert)]
    return [claim for claim in found if any(isinstance(node, ast.Name) for node in ast.walk(claim.test))]


# ---- What a lesson must have: each rule yields what is wrong ---------------------------------------------------------


def opening(number: int, notebook: Notebook) -> Iterator[str]:
    """Check that the opening says what you will do, learn and need, and how to get the requirements."""
    first = notebook["cells"][0]
    if first["cell_type"] != "markdown" or not source(first).startswith(f"# Lesson {number}: "):
        yield f"does not open with '# Lesson {number}: …'"
    wanted = ("**You will do", "**You will learn", "**You need", '".[notebooks]"', "%pip install", "minutes")
    for words in wanted:
        if words not in source(first):
            yield f"the opening lacks {words!r}"


def short(number: int, notebook: Notebook) -> Iterator[str]:
    """Check that there are few cells, of few lines."""
    if len(notebook["cells"]) > CELLS:
        yield f"{len(notebook['cells'])} cells, more than {CELLS}"
    for cell in code(notebook):
        if (lines := sum(map(bool, map(str.strip, source(cell).splitlines())))) > LINES:
            yield f"{cell['id']} has {lines} lines of code, more than {LINES}"


def kept_with_outputs(number: int, notebook: Notebook) -> Iterator[str]:
    """Check that the printed and drawn outputs are kept, from a run in order and without errors."""
    for place, cell in enumerate(code(notebook), 1):
        if cell["execution_count"] != place:
            yield f"{cell['id']} was run as number {cell['execution_count']}, and is number {place}"
        calls = [ast.unparse(node.func) for node in at_top(parsed(cell)) if isinstance(node, ast.Call)]
        if "print" in calls and not any(map(text, cell["outputs"])):
            yield f"{cell['id']} prints, but nothing is kept"
        if calls.count("plt.show") > pictures(cell):
            yield f"{cell['id']} draws, but no picture is kept"
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"{cell['id']} ends in an error"
            if output.get("name") == "stderr":
                yield f"{cell['id']} writes to stderr"
            if foreign := set(output.get("data", {})) - MIMES:
                yield f"{cell['id']} shows {sorted(foreign)}, which not everything shows"
    if not any(map(pictures, code(notebook))):
        yield "has no picture"


def of_no_machine(number: int, notebook: Notebook) -> Iterator[str]:
    """Check that no output shows the machine or the time of the run."""
    host = re.escape(socket.gethostname())
    patterns = {"a path": FOREIGN, "a time": STAMP, "an address": ADDRESS, "a host": rf"\b{host}\b"}
    if len(host) < 4 or host == "localhost":
        del patterns["a host"]
    for shown in texts(notebook):
        for what, pattern in patterns.items():
            if match := re.search(pattern, shown):
                yield f"holds {what} of a machine: {match[0]!r}"


def stripped(number: int, notebook: Notebook) -> Iterator[str]:
    """Check for the least metadata, and for readable ids that no two cells share."""
    if notebook["metadata"] != METADATA or (notebook["nbformat"], notebook["nbformat_minor"]) != (4, 5):
        yield "has more metadata than the kernel's name, or another format than 4.5"
    ids = [cell.get("id", "") for cell in notebook["cells"]]
    for cell, name in zip(notebook["cells"], ids, strict=True):
        if cell["metadata"] or any(output.get("metadata") for output in cell.get("outputs", ())):
            yield f"{name} has metadata"
        if not re.fullmatch(rf"l{number}-[a-z0-9-]+", name) or ids.count(name) > 1:
            yield f"{name!r} is no id like l{number}-digits, or is another cell's too"


def asserted(number: int, notebook: Notebook) -> Iterator[str]:
    """Check that asserts follow claims."""
    if (found := sum(len(claims(parsed(cell))) for cell in code(notebook))) < CLAIMS:
        yield f"{found} asserts, fewer than {CLAIMS}"


def closing(number: int, notebook: Notebook) -> Iterator[str]:
    """Check for three exercises with answers that unfold, a summary, and the next lesson."""
    written = [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    folded = [cell for cell in written if "<details>" in cell]
    if not any(cell.startswith("## Exercises") for cell in written) or len(folded) != 3:
        yield f"{len(folded)} exercises with an answer under '## Exercises', not 3"
    for cell in folded:
        blocks = re.findall(r"```python\n(.*?)```", cell, re.DOTALL)
        if not re.search(r"<details>\s*<summary>Answer</summary>\n\n.*\n\n?</details>", cell, re.DOTALL):
            yield f"an answer that does not unfold: {cell[:40]!r}"
        if not any(isinstance(node, ast.Assert) for block in blocks for node in ast.walk(ast.parse(block))):
            yield f"an answer without an assert: {cell[:40]!r}"
    if not any("## What to remember" in cell for cell in written):
        yield "does not say what to remember"
    if number < 8 and not re.search(rf"\]\({number + 1}-[a-z0-9-]+\.ipynb\)", written[-1]):
        yield f"the last words do not lead to lesson {number + 1}"


def linked(number: int, notebook: Notebook) -> Iterator[str]:
    """Check that links within the repository lead somewhere."""
    written = [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    for link in re.findall(r"\]\(([^)#:\s]+)\)", "\n".join(written)):
        if not (ROOT / "notebooks" / link).exists():
            yield f"leads to {link}, which is not there"


RULES = (opening, short, kept_with_outputs, of_no_machine, stripped, asserted, closing, linked)


def faults(number: int, notebook: Notebook) -> list[str]:
    return [fault for rule in RULES for fault in rule(number, notebook)]


@each_lesson
def test_a_lesson_has_what_it_must_have(path: Path) -> None:
    assert re.fullmatch(r"[1-8](-[a-z0-9]+)+", path.stem)
    assert path.stat().st_size <= SIZE
    assert faults(int(path.stem[0]), read(path)) == []


def as_written(notebook: Notebook) -> str:
    """Check that nbformat would write the same file: keys in order, and a line for each line of a source."""
    lines = [{**cell, "source": source(cell).splitlines(keepends=True)} for cell in notebook["cells"]]
    return json.dumps({**notebook, "cells": lines}, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


@each_lesson
def test_a_lesson_is_kept_as_tidy_writes_it(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == as_written(read(path))


def test_there_are_eight_lessons_and_the_readme_names_each() -> None:
    assert [path.stem[0] for path in LESSONS] == list("12345678")
    listed = re.findall(r"^(\d)\. \[.*?\]\((.*?)\)", (ROOT / "notebooks/README.md").read_text(), re.MULTILINE)
    assert [name for _, name in listed] == [path.name for path in LESSONS]


def test_sources_are_clean() -> None:
    need("ruff")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "notebooks"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


# ---- A lesson that keeps the rules, and what breaks each -------------------------------------------------------------


def sample() -> Notebook:
    """Return a lesson as small as the rules allow, in the form of the kept lessons."""

    def markdown(name: str, words: str) -> Cell:
        return {"cell_type": "markdown", "id": f"l8-{name}", "metadata": {}, "source": words.splitlines(keepends=True)}

    def python(name: str, lines: str, count: int, outputs: list[Cell]) -> Cell:
        return {**markdown(name, lines), "cell_type": "code", "execution_count": count, "outputs": outputs}

    intro = '# Lesson 8: A\n\n**You will do** a **You will learn** b **You need** c, `pip install ".[notebooks]"`,'
    answer = "<details><summary>Answer</summary>\n\nThis.\n\n```python\nassert a == {}\na += 1\n```\n\n</details>"
    picture = {"image/png": "iVBORw0KGgo=", "text/plain": ["<Figure size 720x288 with 1 Axes>"]}
    printed = {"name": "stdout", "output_type": "stream", "text": ["1\n"]}
    drawing = "import matplotlib.pyplot as plt\n\nplt.plot([a])\nplt.show()"
    cells = [
        markdown("opening", f"{intro} in Colab `%pip install …`. 5 minutes."),
        python("claims", "a = 1\n" + "assert a == 1\n" * CLAIMS + "print(a)", 1, [printed]),
        python("picture", drawing, 2, [{"data": picture, "metadata": {}, "output_type": "display_data"}]),
        markdown("exercises", "## Exercises"),
        *(markdown(f"exercise-{i}", f"**{i}.** What?\n\n{answer.format(i)}") for i in (1, 2, 3)),
        markdown("remember", "## What to remember\n\n- a\n\n[All lessons](README.md)"),
    ]
    return {"cells": cells, "metadata": copy.deepcopy(METADATA), "nbformat": 4, "nbformat_minor": 5}


def put(place: int, key: str, value: Any) -> Callable[[Notebook], None]:
    return lambda notebook: notebook["cells"][place].__setitem__(key, value)


def say(place: int, old: str, new: str) -> Callable[[Notebook], None]:
    """Replace what a cell says."""

    def change(notebook: Notebook) -> None:
        assert old in source(notebook["cells"][place])
        notebook["cells"][place]["source"] = [source(notebook["cells"][place]).replace(old, new)]

    return change


def printed(shown: str, name: str = "stdout") -> Callable[[Notebook], None]:
    return put(1, "outputs", [{"name": name, "output_type": "stream", "text": [shown]}])


BROKEN: dict[str, tuple[Callable[[Notebook], None], str]] = {
    "another lesson's title": (say(0, "Lesson 8", "Lesson 6"), "does not open with"),
    "no word on what is needed": (say(0, "**You need", "**Have"), "the opening lacks"),
    "too many cells": (lambda notebook: notebook["cells"].extend(sample()["cells"] * 5), "more than 40"),
    "a long cell": (say(1, "a = 1", "a = 1\n" * 10), "more than 10"),
    "run out of order": (put(2, "execution_count", 5), "was run as number 5"),
    "never run": (put(1, "execution_count", None), "was run as number None"),
    "what was printed is gone": (put(1, "outputs", []), "prints, but nothing is kept"),
    "the picture is gone": (put(2, "outputs", []), "draws, but no picture"),
    "no picture at all": (lambda notebook: notebook["cells"].pop(2), "has no picture"),
    "an error": (put(1, "outputs", [{"output_type": "error", "traceback": ["no"]}]), "ends in an error"),
    "a warning": (printed("careful\n", "stderr"), "writes to stderr"),
    "a widget": (
        put(1, "outputs", [{"output_type": "display_data", "data": {"text/html": "<b>", "text/plain": "b"}}]),
        "not everything shows",
    ),
    "a temporary file": (printed("/tmp/x.npy\n"), "a path of a machine"),
    "a file of the installation": (printed("lib/site-packages/numpy\n"), "a path of a machine"),
    "a file of a user": (say(1, "print(a)", "print('/home/me/x')"), "a path of a machine"),
    "a time": (printed("2026-01-31 10:00\n"), "a time of a machine"),
    "an address": (printed("tcp 10.0.0.1\n"), "an address of a machine"),
    "an editor's settings": (put(1, "metadata", {"collapsed": True}), "has metadata"),
    "a kernel of one's own": (lambda notebook: notebook["metadata"].update(vscode={}), "more metadata"),
    "an id from chance": (put(1, "id", "8f3a01bc"), "is no id like"),
    "one id for two": (put(1, "id", "l8-picture"), "is no id like"),
    "fewer claims": (say(1, "assert a == 1\n", ""), "0 asserts"),
    "claims of nothing": (say(1, "assert a == 1", "assert True"), "0 asserts"),
    "a claim that never runs": (say(1, "assert a == 1", "lambda: a"), "0 asserts"),
    "two exercises": (lambda notebook: notebook["cells"].pop(4), "2 exercises"),
    "an answer in sight": (say(4, "<summary>Answer</summary>", ""), "does not unfold"),
    "an answer that claims nothing": (say(5, "assert ", ""), "without an assert"),
    "nothing to remember": (say(7, "## What to remember", ""), "what to remember"),
    "a dead link": (say(7, "README.md", "9-more.ipynb"), "which is not there"),
}


def test_a_lesson_that_keeps_the_rules_has_no_faults() -> None:
    assert faults(8, sample()) == []


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_rule_is_found(what: str) -> None:
    change, fault = BROKEN[what]
    notebook = sample()
    change(notebook)
    assert any(fault in found for found in faults(8, notebook)), faults(8, notebook)


def test_a_lesson_that_does_not_lead_to_the_next_is_found() -> None:
    assert list(closing(8, sample())) == []
    assert list(closing(3, sample())) == ["the last words do not lead to lesson 4"]


# ---- Running ---------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return an environment with this arraybn, and without progress bars in the output of a lesson."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def python(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    limits: dict[str, Any] = {"timeout": TIME_LIMIT, "env": environment(), "cwd": ROOT / "notebooks"}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, **limits)


def run(notebook: Notebook, path: Path) -> subprocess.CompletedProcess[str]:
    """Run a copy of it at `path` as its author does."""
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return python(TIDY, path)


def with_answers(notebook: Notebook) -> Notebook:
    """Return the lesson followed by the code of the answers."""
    result = copy.deepcopy(notebook)
    for block in answers(notebook):
        result["cells"].append({"cell_type": "code", "metadata": {}, "source": block, "outputs": []})
        result["cells"][-1] |= {"execution_count": None, "id": f"answer-{len(result['cells'])}"}
    return result


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Any]]:
    """Run every chosen lesson with the answers, two at a time."""
    for name in NEEDED:
        need(name)
    folder = tmp_path_factory.mktemp("lessons")
    wanted = [
        item.callspec.params["path"] for item in request.session.items if item.name.startswith("test_a_lesson_runs")
    ]
    with ThreadPoolExecutor(2) as pool:
        futures: dict[Path, Future[Any]] = {
            path: pool.submit(run, with_answers(read(path)), folder / path.name) for path in wanted
        }
        yield lambda path: (futures[path].result(), folder / path.name)


@each_lesson
def test_a_lesson_runs_as_it_is_kept_and_so_do_its_answers(path: Path, runs: Callable[[Path], Any]) -> None:
    done, copied = runs(path)
    assert done.returncode == 0, done.stderr
    now = read(copied)
    assert list(kept_with_outputs(int(path.stem[0]), now)) == []
    assert changed(read(path), now) == []


def changed(kept: Notebook, now: Notebook) -> list[str]:
    """Return the cells whose kinds of outputs differ from the kept ones; numbers may differ from machine to machine."""

    def kinds(cell: Cell) -> list[list[str]]:
        return [[output["output_type"], *sorted(output.get("data", ()))] for output in cell["outputs"]]

    return [old["id"] for old, new in zip(code(kept), code(now), strict=False) if kinds(old) != kinds(new)]


def test_outputs_of_another_run_are_found() -> None:
    other = sample()
    put(2, "outputs", other["cells"][1]["outputs"])(other)
    assert changed(sample(), sample()) == []
    assert changed(sample(), other) == ["l8-picture"]


def falsified(cell: Cell) -> str:
    """Return the cell with one of the claims negated."""
    tree = parsed(cell)
    assert tree is not None
    claim = claims(tree)[0]
    claim.test = ast.UnaryOp(ast.Not(), claim.test)
    return ast.unparse(ast.fix_missing_locations(tree))


@functools.cache
def up_to_a_false_claim(path: Path) -> str:
    """Return the lesson as a program up to the first cell with a claim, with that claim made false."""
    cells = code(read(path))
    place = next(i for i, cell in enumerate(cells) if claims(parsed(cell)))
    before = "\n".join(map(source, cells[:place])) + "\n"
    return before + falsified(cells[place])


@each_lesson
def test_a_falsified_claim_fails_where_the_lesson_runs(path: Path) -> None:
    for name in NEEDED:
        need(name)
    run = "import matplotlib; matplotlib.use('agg'); exec(open(0, encoding='utf-8').read())"
    done = python("-c", run, stdin=up_to_a_false_claim(path))  # the true claim runs as a part of the whole lesson
    assert done.returncode == 1, done.stderr
    assert "AssertionError" in done.stderr


def test_what_is_tidied_keeps_the_rules_and_stays_as_it_is_when_run_again(tmp_path: Path) -> None:
    need("nbclient")
    need("ipykernel")
    path = tmp_path / "8-sample.ipynb"
    notebook = sample()
    for change in ("never run", "an editor's settings", "a kernel of one's own", "an id from chance"):
        BROKEN[change][0](notebook)
    put(2, "outputs", [])(notebook)
    say(1, "print(a)", "print(a)\nimport time\ntime.sleep(0.2)\nprint(2)")(notebook)
    assert faults(8, notebook)
    assert (done := run(notebook, path)).returncode == 0, done.stderr
    assert list(short(8, read(path)))  # ours is one line too long, which running cannot mend
    assert [fault for fault in faults(8, read(path)) if "lines" not in fault] == []
    assert [text(output) for output in code(read(path))[0]["outputs"]] == ["1\n2\n"]
    first = path.read_bytes()
    assert python(TIDY, path).returncode == 0
    assert path.read_bytes() == first


@pytest.mark.parametrize("place", ["a cell", "an answer"])
def test_a_false_claim_stops_the_run_and_nothing_is_written(place: str, tmp_path: Path) -> None:
    need("nbclient")
    need("ipykernel")
    notebook, path = sample(), tmp_path / "8-sample.ipynb"
    say(1 if place == "a cell" else 6, "assert a == ", "assert a == 4")(notebook)
    done = run(with_answers(notebook), path)
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
    assert "8-sample.ipynb" in done.stderr
    assert read(path) == with_answers(notebook)


# ---- Copies without answers ------------------------------------------------------------------------------------------


def test_a_copy_for_students_has_all_but_the_answers(tmp_path: Path) -> None:
    need("nbformat")
    before = [path.read_bytes() for path in LESSONS]
    done = python(TIDY, "--without-answers", tmp_path / "class", *LESSONS)
    assert done.returncode == 0, done.stderr
    assert [path.read_bytes() for path in LESSONS] == before
    for path in LESSONS:
        lesson, copied = read(path), read(tmp_path / "class" / path.name)
        shown = "\n".join(texts(copied))
        assert "<summary>" not in shown
        assert len(answers(lesson)) >= 3
        assert not any(block in shown for block in answers(lesson))
        questions = [source(cell).partition("<details>")[0].rstrip() for cell in lesson["cells"]]
        given = [source(cell) for cell in copied["cells"]]
        assert [words for words in given if words != "# your answer"] == questions
        places = [i for i, cell in enumerate(lesson["cells"]) if "<details>" in source(cell)]
        assert [given[i + gap + 1] for gap, i in enumerate(places)] == ["# your answer"] * 3
        kept = [cell for cell in code(copied) if source(cell) != "# your answer"]
        assert kept == code(lesson)
        assert list(stripped(int(path.stem[0]), copied)) == []


def test_a_copy_never_overwrites_the_lesson(tmp_path: Path) -> None:
    need("nbformat")
    path = tmp_path / "8-sample.ipynb"
    path.write_text(json.dumps(sample()), encoding="utf-8")
    done = python(TIDY, "--without-answers", tmp_path / "x" / "..", path)
    assert done.returncode == 2
    assert "expected another folder" in done.stderr
    assert read(path) == sample()

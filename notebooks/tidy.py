"""Run lessons from a fresh kernel and write them in a fixed form, so that a changed lesson is a small difference.

    python notebooks/tidy.py notebooks/1-*.ipynb            # run, strip and write in place
    python notebooks/tidy.py --no-run notebooks/1-*.ipynb   # only strip and write
    python notebooks/tidy.py --without-answers students notebooks/*.ipynb   # write copies for a class into students/

The kernel is that of the running Python, whatever other kernels are installed. If a cell raises, the error is shown and
nothing is written. Execution times, the editor's settings and all traces of the machine are removed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
TIME_LIMIT = 300  # seconds for one cell; the first cell may have much to compile
ANSWER = r"<details>\s*<summary>Answer</summary>.*?</details>"
COLOURS = r"\x1b\[[0-9;]*m"  # of IPython's tracebacks


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Execute the cells in `folder`, in a fresh kernel of this Python; raise at the first cell that fails."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    os.environ.pop("MPLBACKEND", None)  # with another backend there would be no pictures
    with tempfile.TemporaryDirectory() as profile:
        os.environ["IPYTHONDIR"] = profile  # ignores the user's own settings
        manager = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        where = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, km=manager, timeout=TIME_LIMIT, resources=where, record_timing=False).execute()


def tidy(notebook: nbformat.NotebookNode, prefix: str) -> None:
    """Remove metadata that no reader needs, and give each cell without an id a readable one, like l3-momentum."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    taken: set[str] = set()
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        cell.source = "\n".join(line.rstrip() for line in cell.source.strip("\n").split("\n"))
        cell.pop("attachments", None)
        old = cell.get("id", "")
        cell["id"] = unique(old if old.startswith(f"{prefix}-") else f"{prefix}-{slug(cell.source)}", taken)
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Return the outputs without metadata; join printed parts, because the parts differ from run to run."""
    result: list[nbformat.NotebookNode] = []
    for output in outputs:
        if "metadata" in output:
            output.metadata = nbformat.from_dict({})
        last = result[-1] if result else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            result.append(output)
    return result


def remove_answers(notebook: nbformat.NotebookNode) -> None:
    """Remove the answers to the exercises, and put an empty cell of code below each question."""
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        question = re.sub(ANSWER, "", cell.source, flags=re.DOTALL)
        if question != cell.source:
            cell.source = question.strip("\n")
            cells.append(nbformat.v4.new_code_cell("# your answer"))
    notebook.cells = cells


def slug(source: str) -> str:
    """Return the first words of a cell, in the letters that an id may have."""
    return "-".join(re.findall(r"[a-z][a-z0-9]+", source.lower())[:3])[:24].strip("-") or "cell"


def unique(name: str, taken: set[str]) -> str:
    """Return the name, with a number if the name is taken."""
    number, result = 1, name
    while result in taken:
        number += 1
        result = f"{name}-{number}"
    taken.add(result)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--no-run", action="store_true", help="keep the outputs as they are")
    help_ = "run nothing, and write copies without the answers to the exercises into this folder"
    parser.add_argument("--without-answers", type=Path, metavar="DIR", help=help_)
    options = parser.parse_args(arguments)
    copies = options.without_answers
    if copies and copies.resolve() in [path.resolve().parent for path in options.notebooks]:
        parser.error(f"--without-answers: expected another folder than that of the lessons; got {copies}")
    failed = 0
    for path in options.notebooks:
        notebook = nbformat.read(path, as_version=4)
        try:
            if copies:
                remove_answers(notebook)
            elif not options.no_run:
                run(notebook, path.parent)
        except Exception as error:
            print(f"{path.name}: {re.sub(COLOURS, '', str(error))}", file=sys.stderr)
            failed = 1
            continue
        tidy(notebook, f"l{path.name.split('-')[0]}")
        nbformat.validate(notebook)
        if copies:
            copies.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, copies / path.name if copies else path)
    return failed


if __name__ == "__main__":
    sys.exit(main())

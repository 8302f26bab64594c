"""What the docs show runs: the notebook, the README's example, and the links."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[str]:
    content = json.loads(path.read_text())
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_and_a_falsified_claim_fails(path: Path) -> None:
    sources, space = cells(path), {}
    assert sources
    for source in sources:
        exec(source, space)
    claims = [line for source in sources for line in source.splitlines() if line.startswith("assert ")]
    assert claims
    for claim in claims:
        eval(compile(claim, str(path), "exec"), space)
        with pytest.raises(AssertionError):
            exec(re.sub("^assert (.*?)(  #.*)?$", r"assert not (\1)", claim), space)


def test_the_example_of_the_readme_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})
    shown = re.findall(r"print\(.*\)  # (.*)", blocks[0])
    assert shown
    assert capsys.readouterr().out.splitlines() == shown


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert len(links) > 5
    for page, link in links:
        assert (page.parent / link).exists(), f"{page.name}: {link}"

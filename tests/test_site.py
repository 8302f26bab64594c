"""The site is built without a warning, has every page and lesson, and needs nothing from elsewhere to be read."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.libraries import need

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("sphinx", "myst_nb", "furo", "sphinxcontrib.katex", "ziamath", "py_mini_racer"):
        if importlib.util.find_spec(name) is None:  # not imported here: their warnings are not ours
            need(name)
    built = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        built / "trees",
        "docs",
        built / "html",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return built / "html"


def test_every_page_and_lesson_is_there(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    lessons = [Path("tutorials", path.with_suffix(".html").name) for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert len(pages) > 20
    for page in [*pages, *lessons]:
        assert (site / page).is_file(), page


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = path.read_text()
        loaded = re.findall(r"(?:<script|<img|<iframe)[^>]*\bsrc=\"([^\"]+)", text)
        loaded += re.findall(r"<link(?![^>]*canonical)[^>]*\bhref=\"([^\"]+)", text)
        loaded += re.findall(r"url\(['\"]?([^)'\"]+)", text) if path.suffix == ".css" else []
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], path.name


def test_formulas_are_formulas(site: Path) -> None:
    text = (site / "maths.html").read_text()
    assert text.count("<math ") > 50
    assert "katex-error" not in text
    assert (site / "_static" / "STIXTwoMath-Regular.ttf").is_file()


def test_the_reference_and_its_tables_are_made(site: Path) -> None:
    assert 'id="arraybn.batch_norm"' in (site / "reference" / "functions.html").read_text()
    assert "--data-parallel" in (site / "reference" / "commands.html").read_text()
    table = (site / "reference" / "capabilities.html").read_text()
    assert table.count("✓") > 20
    assert "strict-no_float64" in table


def test_search_finds_the_conventions(site: Path) -> None:
    index = (site / "searchindex.js").read_text()
    assert "conventions" in index
    assert "chainer" in index

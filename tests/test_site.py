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
REPOSITORY = "https://code.example/arraybn"


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
        "-D",
        f"repository={REPOSITORY}",
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


def test_grouped_names_stay_together_and_nothing_is_said_twice(site: Path) -> None:
    pages = {page.stem: page.read_text() for page in (site / "reference").glob("*.html")}
    assert "<strong>weight, bias</strong> (<em>Parameter (C,) or None</em>) – γ and β.</p>" in pages["layers"]
    for page, text in pages.items():
        assert not re.search(r"\(<em>[\w, ]*,</em>\)", text), page  # as in "bias (weight,)"
        assert '<ol class="upperalpha' not in text, page  # docutils reads "C." and "S. Ioffe" as items of a list
        for entries in re.findall(r'<dd class="field-\w+"><ul class="simple">(.*?)\n</ul>', text, re.DOTALL):
            said = re.findall(r"–\s*(.*?)</li>", entries, re.DOTALL)
            assert len(set(said)) == len(said), (page, said)


def test_search_finds_the_conventions(site: Path) -> None:
    index = (site / "searchindex.js").read_text()
    assert "conventions" in index
    assert "chainer" in index


def test_a_table_of_errors_names_its_columns_in_each_cell(site: Path) -> None:
    table = re.search(r'<table class="[^"]*\bstacked\b.*?</table>', (site / "synchronized.html").read_text(), re.DOTALL)
    assert table is not None
    assert table[0].count("what to do: ") == table[0].count("<tr") - 1 > 5
    styles = (site / "_static" / "site.css").read_text()
    assert "span.head { display: none; }" in styles  # until the cells stand below each other


def test_every_page_has_the_icon_and_leads_to_the_repository(site: Path) -> None:
    assert "<svg " in (site / "_static" / "favicon.svg").read_text()
    for page in [site / "index.html", *(site / "reference").glob("*.html")]:
        text = page.read_text()
        assert re.search(r'<link rel="[^"]*icon" href="[^"]*_static/favicon.svg"', text), page
        assert f'href="{REPOSITORY}"' in text, page


@pytest.mark.parametrize(
    ("metadata", "address"),
    [
        ("name = arraybn", ""),
        ("url = https://code.example/a", "https://code.example/a"),
        (
            "url = https://a.example\nproject_urls =\n    Repository = https://code.example/a=b",
            "https://code.example/a=b",
        ),
        (
            "project_urls =\n    Documentation = https://a.example\n    Source = https://code.example",
            "https://code.example",
        ),
    ],
)
def test_the_address_of_the_repository_comes_from_the_metadata(site: Path, metadata: str, address: str) -> None:
    code = "import runpy, sys; print(runpy.run_path('docs/conf.py')['repository_in'](sys.argv[1]))"
    command = [sys.executable, "-W", "ignore", "-c", code, f"[metadata]\n{metadata}\n"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == address, done.stderr

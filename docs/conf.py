"""Settings of Sphinx, which makes the site from these pages: ``python -m sphinx -W --keep-going docs build/site``.

The pages are plain Markdown, so a code host can show them too. This file copies the lessons from notebooks/, turns
formulas into MathML, which a browser draws without script or network, and makes the capability table from tests/.
"""

from __future__ import annotations

import argparse
import configparser
import importlib.util
import re
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import sphinxcontrib.katex
import ziamath
from docutils import nodes
from py_mini_racer import JSEvalException, MiniRacer
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LESSONS = DOCS / "tutorials"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(DOCS)]

from arraybn import __version__  # noqa: E402
from arraybn.__main__ import COMMANDS  # noqa: E402

SHOWN = re.findall(r"literalinclude\} \.\./\.\./(\S+)", (DOCS / "reference" / "source.md").read_text())


def repository_in(setup: str) -> str:
    """Return the address of the repository from the text of a setup.cfg; "" where the text has none."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read_string(setup)
    metadata = settings["metadata"] if settings.has_section("metadata") else {}
    lines = metadata.get("project_urls", "").splitlines()
    urls = {name.strip().lower(): url.strip() for name, _, url in (line.partition("=") for line in lines)}
    return urls.get("repository") or urls.get("source") or metadata.get("url", "")


QUOTED = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}  # pages whose text is in a file beside docs/

project = "arraybn"
author = "The arraybn developers"
copyright = "the arraybn developers, BSD 3-Clause"  # noqa: A001
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["build", "**/.ipynb_checkpoints"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
nb_execution_mode = "off"  # the notebooks hold their outputs, and tests run the notebooks
nb_merge_streams = True

default_role = "code"  # `x` in docstrings
autodoc_member_order = "bysource"
autodoc_mock_imports = [] if importlib.util.find_spec("torch") else ["torch"]  # the page of arraybn.pytorch needs none
autodoc_typehints = "none"  # the docstrings state the shapes; types do not
napoleon_google_docstring = False
napoleon_use_param = False  # `weight, bias : array` stays one entry
napoleon_custom_sections = [("Attributes", "params_style")]  # in the form of the parameters
napoleon_use_rtype = False
python_display_short_literal_types = True
add_module_names = False

html_theme = "furo"
html_title = "arraybn"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static", str(Path(ziamath.__file__).with_name("fonts") / "STIXTwoMath-Regular.ttf")]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"


def bring_lessons() -> None:
    """Copy notebooks/*.ipynb into docs/tutorials/, which git ignores: Sphinx reads nothing outside docs/."""
    lessons = {path.name: path for path in (ROOT / "notebooks").glob("*.ipynb")}
    for old in LESSONS.glob("*.ipynb"):
        if old.name not in lessons:
            old.unlink()
    for name, path in lessons.items():
        text = path.read_text().replace("](../", "](../../").replace("](README.md", "](index.md")
        new = LESSONS / name
        if not new.exists() or new.read_text() != text:
            new.write_text(text)


def links_within_the_site(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn links to files of the repository into links to pages of the site."""
    up = "../" * docname.count("/")
    if docname in QUOTED:
        source[0] = (ROOT / QUOTED[docname]).read_text().replace("](", "](../")
    if not (DOCS / "gpu.md").exists():
        source[0] = source[0].replace("\ngpu*\n", "\n")
    if app.config.repository and docname == app.config.root_doc:
        source[0] = source[0].replace("\ncontributing\n", f"\nRepository <{app.config.repository}>\ncontributing\n")
    pages = {
        r"notebooks/([\w-]+\.ipynb)": r"tutorials/\1",
        r"notebooks/(?:README\.md)?": "tutorials/index.md",
        r"CONTRIBUTING\.md": "contributing.md",
        r"CHANGELOG\.md": "changelog.md",
        r"docs/([\w/-]+\.md)": r"\1",
    }
    for old, new in pages.items():
        link = rf"\]\({re.escape(up)}\.\./{old}(#[\w-]*)?\)"
        source[0] = re.sub(link, lambda m, new=new: f"]({up}{m.expand(new)}{m[m.re.groups] or ''})", source[0])
    for path in SHOWN:
        anchor = path.replace("/", "").replace(".", "")
        source[0] = source[0].replace(f"]({up}../{path})", f"]({up}reference/source.md#{anchor})")


@cache
def katex() -> MiniRacer:
    """Return KaTeX in a JavaScript machine of its own; KaTeX supports more of LaTeX than the Python packages do."""
    machine = MiniRacer()
    machine.eval("self = this;" + Path(sphinxcontrib.katex.__file__).with_name("katex.min.js").read_text())
    machine.eval("mathml = (text, block) => katex.renderToString(text, {output: 'mathml', displayMode: block})")
    return machine


def as_mathml(self: Any, node: nodes.Element) -> None:
    """Write a formula as MathML; warn of a formula that cannot be parsed."""
    block = isinstance(node, nodes.math_block)
    try:
        mathml = katex().call("mathml", node.astext(), block)
    except JSEvalException as error:
        what = re.search(r"KaTeX parse error.*", str(error))
        logging.getLogger(__name__).warning("%s", what[0] if what else error, location=node)
        mathml = node.astext()
    self.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def names_of_tests_break(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Allow line breaks in the long names of tests."""
    for literal in doctree.findall(nodes.literal):
        if (text := literal.astext()).startswith("tests/"):
            broken = re.sub(r"(_|::)", r"\1<wbr>", text)
            literal.replace_self(nodes.raw("", f'<code class="literal">{broken}</code>', format="html"))


def tables_fit_a_phone(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Mark the tables whose cells stand below each other on a phone, and repeat the head of the column in the cells."""
    for table in doctree.findall(nodes.table):
        head, *rows = ([*row.findall(nodes.entry)] for row in table.findall(nodes.row))
        names = [entry.astext() for entry in head]
        if "held by" in names:
            table["classes"] += ["stacked", "held"]
        elif "what to do" in names:
            table["classes"].append("stacked")
            for entry, name in ((row[i], name) for row in rows for i, name in enumerate(names) if i):
                entry[0].insert(0, nodes.inline("", f"{name}: ", classes=["head"]))


def formulas_are_no_markup(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape (N, C, *S), |mean| and "C. Szegedy": docutils reads emphasis, a substitution, an item of a list."""
    starred = (re.sub(r"(?<![\\\w`*])\*(?=S\b)", r"\\*", line) for line in lines)
    barred = (re.sub(r"\|([\w·]+)\|", r"\\|\1\\|", line) for line in starred)
    lines[:] = [re.sub(r"^(\s*[A-Z])\.(?= |$)", r"\1\.", line) for line in barred]


class CommandHelp(SphinxDirective):
    """The directive ``command-help``: the text that ``--help`` of each command prints."""

    def run(self) -> list[nodes.Node]:
        """Return one block for each command."""
        made: list[nodes.Node] = []
        for name, command in COMMANDS.items():
            parser = argparse.ArgumentParser(f"python -m arraybn {name}", description=command.DESCRIPTION)
            parser.formatter_class = partial(argparse.HelpFormatter, width=88)
            command.add_arguments(parser)
            made.append(nodes.literal_block("", parser.format_help(), language="text"))
        return made


class CapabilityTable(SphinxDirective):
    """The directive ``capability-table``: the cases of tests/test_capabilities.py."""

    def run(self) -> list[nodes.Node]:
        """Return the table, parsed from Markdown."""
        import test_capabilities  # imports hypothesis and pytest

        head, rows = test_capabilities.table()
        functions = ", ".join(test_capabilities.FUNCTIONS)
        lines = [f"✓: {functions}.", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| `{row[0]}` | {row[1]} | {' | '.join(row[2:])} |" for row in rows]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> None:
    """Connect everything above; Sphinx calls this function first."""
    bring_lessons()
    app.add_config_value("repository", repository_in((ROOT / "setup.cfg").read_text()), "env", str)
    app.add_html_math_renderer("mathml", (as_mathml, None), (as_mathml, None))
    app.add_directive("command-help", CommandHelp)
    app.add_directive("capability-table", CapabilityTable)
    app.connect("source-read", links_within_the_site)
    app.connect("doctree-resolved", names_of_tests_break)
    app.connect("doctree-resolved", tables_fit_a_phone)
    app.connect("autodoc-process-docstring", formulas_are_no_markup, priority=900)

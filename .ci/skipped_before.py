"""A pytest plugin for .ci/run: which tests were skipped for want of a library, so that they alone run once it is there.

``-p skipped_before`` notes them in the file that SKIPPED_BEFORE names; with ``--skipped-before`` those alone run.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NOTES = Path(os.environ["SKIPPED_BEFORE"])


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption("--skipped-before", action="store_true", help="only what was skipped in the run before")
    parser.addoption("--and-all-of", action="append", default=[], metavar="FILE", help="but all tests of these files")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test that was skipped."""
    if report.skipped and not hasattr(report, "wasxfail"):
        _note(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a file that was skipped as a whole."""
    if report.skipped:
        _note(report.nodeid)


def _note(name: str) -> None:
    with NOTES.open("a", encoding="utf-8") as file:
        file.write(f"{name}\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that are noted."""
    if not config.getoption("skipped_before"):
        return
    noted, whole = set(NOTES.read_text(encoding="utf-8").splitlines()), tuple(config.getoption("and_all_of"))
    kept = [
        item
        for item in items
        if item.nodeid in noted or item.nodeid.split("::")[0] in noted or item.nodeid.startswith(whole)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept

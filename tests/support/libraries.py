"""Optional libraries: skip a test that needs one, or fail it where the library is promised."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

REQUIRED = set(filter(None, os.environ.get("ARRAYBN_REQUIRE", "").split(",")))


def need(name: str) -> Any:
    """Return the module, or skip the test; fail the test where ARRAYBN_REQUIRE names the module."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if name in REQUIRED:
            raise
        pytest.skip(f"{name} is not installed")

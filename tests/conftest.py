"""Fixtures that several test files use, and the settings of Hypothesis."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "cuda")]
pytest.register_assert_rewrite("support")

from support import commands  # noqa: E402
from support.homes import HOMES, Home  # noqa: E402
from support.libraries import need  # noqa: E402

hypothesis.settings.register_profile("default", deadline=None, max_examples=60)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

os.environ.setdefault("ARRAYBN_QUIET", "1")  # the line of the compiler would be in the stderr that tests look at

# torch imports Triton, of no use without a GPU, whose LLVM ends a process that has loaded TensorFlow's before.
sys.modules.setdefault("triton", None)  # type: ignore[arg-type]  # an import of it is then an ImportError

# Scripts that test_mpi.py starts under mpirun, stand-ins for CuPy and a GPU, and helpers: none has tests.
collect_ignore = ["mpi", "cuda", "support"]


@pytest.fixture(params=["reference", "cpu"])
def numpy_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let NumPy arrays be served by the reference, as without numba, and by the compiled kernels."""
    if request.param == "cpu":
        need("numba")
    else:
        monkeypatch.setattr("arraybn.kernels._has_numba", lambda: False)
        monkeypatch.setattr("arraybn.functional._PLANS", {})


@pytest.fixture(params=list(HOMES))
def home(request: pytest.FixtureRequest) -> Iterator[Home]:
    """Yield each namespace and device."""
    with contextlib.ExitStack() as stack:
        yield HOMES[request.param](stack)


@pytest.fixture(scope="module")
def bare_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Python that has arraybn and its requirements alone; return the folder of its packages."""
    return commands.make_bare_site(tmp_path_factory.mktemp("bare"))

"""The installed package: its command, the texts that say how to install more, and the archive of its source."""

from __future__ import annotations

import configparser
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from support.commands import PACKAGE, added, bare, environment
from support.libraries import need

import arraybn

ROOT = PACKAGE.parent
GENERATED = ("__pycache__", "*.nb[ic]", "*.egg-info", ".*_cache", ".coverage*", ".hypothesis", ".venv", ".git", "build")


# ---- The command ----


def test_the_command_arraybn_is_python_m_arraybn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, target = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, function = target.split(":")
    main = getattr(importlib.import_module(module), function)
    for program, shown in ((name, "arraybn"), (f"{name}.exe", "arraybn"), ("__main__.py", "python -m arraybn")):
        monkeypatch.setattr(sys, "argv", [os.path.join("somewhere", program), "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            main()
        assert capsys.readouterr().out.startswith(f"usage: {shown} [-h]")


# ---- How to install more ----

REQUIREMENT = "from arraybn._install import requirement; print(requirement('cpu'))"


def required(site: Path, **changes: str) -> str:
    result = bare(site, "-c", REQUIREMENT, **changes)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.strip()


def test_an_installed_arraybn_names_itself_and_a_checkout_its_folder(bare_site: Path) -> None:
    assert required(bare_site) == '"arraybn[cpu]"'
    assert required(bare_site, PYTHONPATH=str(ROOT)) == f'"{ROOT}[cpu]"'
    folder = "arraybn-0.1.0.dist-info"  # of an editable install, too
    with added(bare_site, {f"{folder}/METADATA": "Name: arraybn\n", f"{folder}/RECORD": "arraybn/__init__.py,,\n"}):
        assert required(bare_site, PYTHONPATH=str(ROOT)) == '"arraybn[cpu]"'
    with added(bare_site, {"arraybn.egg-info/PKG-INFO": "Name: arraybn\n"}):  # left by a build, unknown to pip
        assert required(bare_site, PYTHONPATH=str(ROOT)) == f'"{ROOT}[cpu]"'
    here = f"import os; os.chdir({str(ROOT)!r}); {REQUIREMENT}"
    assert bare(bare_site, "-c", here, PYTHONPATH=str(ROOT)).stdout.strip() == '".[cpu]"'


LARGE_CALLS = """
import numpy, arraybn, warnings
{filter}
arraybn.batch_norm(numpy.ones((999_999, 1), 'f4'))
arraybn.batch_norm(numpy.ones((1_000_000, 1), 'f4'), kernels="reference")
print("small")
for _ in range(2):
    arraybn.batch_norm(numpy.ones((1_000_000, 1), 'f4'))
"""


def test_without_numba_one_warning_recommends_it_for_large_arrays(bare_site: Path) -> None:
    found = bare(bare_site, "-c", LARGE_CALLS.format(filter=""))
    assert (found.returncode, found.stdout) == (0, "small\n")
    assert found.stderr.count("Warning") == 1
    assert "RuntimeWarning: arraybn: without numba, large NumPy arrays take many times as long." in found.stderr
    assert 'pip install "arraybn[cpu]", or pass kernels="reference"' in found.stderr
    strict = bare(bare_site, "-c", LARGE_CALLS.format(filter="warnings.simplefilter('error')"))
    assert (strict.returncode, strict.stdout) == (1, "small\n")
    quiet = "warnings.filterwarnings('ignore', message='arraybn: without numba')"
    assert bare(bare_site, "-c", LARGE_CALLS.format(filter=quiet)).stderr == ""


def test_where_numba_is_installed_nothing_is_recommended() -> None:
    need("numba")
    arraybn.batch_norm(importlib.import_module("numpy").ones((1_000_000, 1), "f4"))  # a warning would be an error


# ---- The archive of the source ----


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_source_archive_has_every_file_and_runs_its_tests(tmp_path: Path) -> None:
    setuptools = need("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("pyproject.toml asks for setuptools 77")
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*GENERATED, "*.log", "arraybn-demo", "dist", "shared"))
    for lesson in (copy / "docs" / "tutorials").glob("*.ipynb"):  # copies, for the site
        lesson.unlink()
    before = files_of(copy)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True, timeout=60)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"arraybn-{arraybn.__version__}"
    added_by_setuptools = {name for name in files_of(unpacked) if name == "PKG-INFO" or ".egg-info/" in name}
    assert files_of(unpacked) - added_by_setuptools == before - {".gitignore"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_public_api.py", "-k", "public_names"]
    variables = {**environment(), "PYTHONPATH": str(unpacked), "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, cwd=unpacked, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout


# ---- The types of arguments ----

TYPED = """
from typing import Any
import numpy as np
import arraybn

class Tensor:  # of any library
    shape: tuple[int, ...]
    @property
    def dtype(self) -> object: ...

x: np.ndarray[Any, np.dtype[np.float32]] = np.ones((4, 2), np.float32)
unknown: Any = x
layer = arraybn.BatchNorm1d(2)
y, saved = arraybn.batch_norm(x, np.ones(2), out=x)
arraybn.batch_norm_backward(y, saved)
arraybn.batch_norm(Tensor(), weight=Tensor())
arraybn.batch_norm(unknown)
arraybn.moments(x).mean + 1
layer.backward(layer(x) + 1)
"""
SETTINGS = """
[mypy]
strict = True
[mypy-torch.*,jax.*,flax.*,tensorflow.*,keras.*,onnx.*,onnxruntime.*,matplotlib.*,numba.*,hypothesis.*,mpi4py.*]
follow_imports = skip
ignore_missing_imports = True
"""  # reading these libraries would take half a minute
WRONG = (
    "arraybn.batch_norm([1, 2])",
    "arraybn.batch_norm(x, weight=[1.0, 1.0])",
    "arraybn.batch_norm_backward([1.0], saved)",
    "arraybn.moments(3.0)",
    "arraybn.update_running_stats([0.0], x, saved.moments or arraybn.moments(x), 0.1)",
    "layer([[1.0, 2.0]])",
    "layer(x, where=[True])",
)


def test_arrays_of_any_library_have_the_right_type_and_lists_do_not(tmp_path: Path) -> None:
    need("mypy")
    (tmp_path / "user.py").write_text(TYPED + "\n".join(WRONG) + "\n")
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "user.py"]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=170, check=False
    )
    first = TYPED.count("\n") + 1
    found = [int(line.split(":")[1]) for line in run.stdout.splitlines()]
    assert found == list(range(first, first + len(WRONG))), run.stdout + run.stderr
    assert run.stdout.count('expected "Shaped') == len(WRONG)

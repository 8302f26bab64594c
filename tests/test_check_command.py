"""``python -m arraybn check``: the table can tell right from wrong, and so can the check of a stranger's functions."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import as_installed
from support.libraries import need

import arraybn
from arraybn.accuracy import errors as check
from arraybn.accuracy import figure
from arraybn.bench.contestants.registry import measured as contestants

Result = subprocess.CompletedProcess[str]

RIGHT = """
import numpy as np

def forward(x, weight, bias, eps):
    x64 = x.astype(np.float64)
    centred = x64 - x64.mean(axis=(0, 2), keepdims=True)
    centred = centred - centred.mean(axis=(0, 2), keepdims=True)
    xhat = centred / np.sqrt((centred**2).mean(axis=(0, 2), keepdims=True) + eps)
    return (weight[:, None] * xhat + bias[:, None]).astype(x.dtype)

def unbiased(x, weight, bias, eps):
    x64 = x.astype(np.float64)
    n = x.shape[0] * x.shape[2]
    centred = x64 - x64.mean(axis=(0, 2), keepdims=True)
    xhat = centred / np.sqrt((centred**2).sum(axis=(0, 2), keepdims=True) / (n - 1) + eps)
    return (weight[:, None] * xhat + bias[:, None]).astype(x.dtype)

def forgetful(dy, x, weight, bias, eps):
    dy, x = dy.astype(np.float64), x.astype(np.float64)
    centred = x - x.mean(axis=(0, 2), keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(axis=(0, 2), keepdims=True) + eps)
    dweight, dbias = (dy * centred * rstd).sum(axis=(0, 2)), dy.sum(axis=(0, 2))
    n = x.shape[0] * x.shape[2]
    return (weight[:, None] * rstd * (dy - dbias[:, None] / n)).astype(np.float32), dweight, dbias

def plain(x, weight, bias, eps):
    centred = x - x.mean(axis=(0, 2), keepdims=True)
    rstd = 1 / np.sqrt(x.var(axis=(0, 2), keepdims=True) + np.float32(eps))
    return weight[:, None] * (centred * rstd) + bias[:, None]

def one_pass(x, weight, bias, eps):
    mean = x.mean(axis=(0, 2), keepdims=True)
    var = (x * x).mean(axis=(0, 2), keepdims=True) - mean * mean
    return weight[:, None] * (x - mean) / np.sqrt(var + np.float32(eps)) + bias[:, None]

def lines(x, gamma, beta, eps):
    mean, var = x.mean(axis=0, dtype=np.float64), x.var(axis=0, dtype=np.float64)
    return (gamma * (x - mean) / np.sqrt(var + eps) + beta).astype(x.dtype)

def three(x, weight, bias):
    return x

class Norm:
    pass

number = 3
"""


def run(*arguments: str, cwd: Path, preparation: str = "", limit: float = 60) -> Result:
    """The command in a process of its own, which has executed `preparation` first."""
    home = str(Path(arraybn.__file__).parents[1])
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    code = f"import sys\n{preparation}\nfrom arraybn.__main__ import main\nsys.exit(main({['check', *arguments]!r}))"
    start = ["-c", code] if preparation else ["-m", "arraybn", "check", *arguments]
    command = [sys.executable, *start]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=limit, cwd=cwd, env=env, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Any]:
    """One run for all who look at the figures: what it printed, and what is in its JSON."""
    folder = tmp_path_factory.mktemp("quick")
    result = run("--quick", "--json", "found.json", cwd=folder)
    return result, json.loads((folder / "found.json").read_text(encoding="utf-8"))


def row(found: Any, family: str, name: str) -> Any:
    (match,) = [row for row in found["rows"] if (row["family"], row["name"]) == (family, name)]
    return match


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with a stranger's module in it."""
    (tmp_path / "mine.py").write_text(RIGHT)
    return tmp_path


# ---- The table ----


def test_backward_and_update_need_a_target(tmp_path: Path) -> None:
    for given, text in (
        (("--backward", "mine:backward", "--update", "mine:update"), "--backward and --update"),
        (("--jvp", "mine:jvp", "--double-backward", "mine:double"), "--jvp and --double-backward"),
    ):
        result = run(*given, cwd=tmp_path)
        assert result.returncode == 2
        assert f"expected a target, module:forward, before {text}; got none" in result.stderr


def test_forward_mode_and_double_backward_are_checked_too(mine: Path) -> None:
    (mine / "twice.py").write_text(
        "import arraybn\n"
        "def saved(x, weight, eps):\n    return arraybn.batch_norm(x, weight, eps=eps, kernels='reference')[1]\n"
        "def jvp(x_dot, x, weight, weight_dot, bias_dot, eps):\n"
        "    return arraybn.batch_norm_jvp(x_dot, saved(x, weight, eps), weight_dot)\n"
        "def double(v, dy, x, weight, v_weight, v_bias, eps):\n"
        "    return arraybn.batch_norm_double_backward(v, dy, saved(x, weight, eps), v_weight, v_bias)\n"
    )
    functions = ("mine:forward", "--jvp", "twice:jvp", "--double-backward", "twice:double")
    result = run(*functions, "--examples", "0", cwd=mine)
    assert result.returncode == 1
    assert "FAILS  y_dot is what the definition gives" in result.stdout
    assert "usual cause: bias_dot is left out (E8)" in result.stdout
    assert "ok     ddx is what the definition gives" in result.stdout


def test_the_table_has_a_row_for_everything_installed(quick: tuple[Result, Any]) -> None:
    result, found = quick
    assert (result.returncode, result.stderr) == (0, "")
    here = [(one.family, one.name) for one in contestants() if not one.missing]
    assert [(row["family"], row["name"]) for row in found["rows"]] == here
    for family, name in here:
        assert f"  {name} " in result.stdout, family
    for one in contestants():
        assert (as_installed(f"pip install {one.pip}") in as_installed(result.stdout)) == any(
            other.missing for other in contestants() if other.pip == one.pip
        )


def test_every_contestant_that_starts_gives_figures(quick: tuple[Result, Any]) -> None:
    for one in quick[1]["rows"]:
        if one["name"] != "CuPy":  # installed, it still needs a GPU
            assert one["failed"] is None, one
            assert set(one["worst"]) >= {"y"}
            assert set(one["errors"]["y"]) == set(check.GROUPS)


def test_arraybn_keeps_its_promises_in_the_table(quick: tuple[Result, Any]) -> None:
    ours = [one for one in quick[1]["rows"] if one["family"] == "arraybn" and one["failed"] is None]
    assert [one["kept"] for one in ours] == [True] * len(ours)
    numpy = row(quick[1], "arraybn", "NumPy")
    for name, limit in {"mean": 1, "var": 1, "y": 4, "dx": 12}.items():
        assert 0 < numpy["worst"][name] <= limit
    assert numpy["errors"]["y"]["constant"] == 0  # N3


def test_the_table_can_tell_plain_formulas_from_arraybn(quick: tuple[Result, Any]) -> None:
    plain, ours = row(quick[1], "NumPy", "x.mean(), x.var()"), row(quick[1], "arraybn", "NumPy")
    for name in ("var", "y"):
        assert plain["errors"][name]["1e6"] > 1000 * ours["errors"][name]["1e6"]
    one_pass = row(quick[1], "NumPy", "E[x²] − E[x]²")
    assert one_pass["errors"]["var"]["1e2"] > 100 * plain["errors"]["var"]["1e2"]
    assert plain["kept"] is None


@pytest.mark.parametrize("peer", ["torch", "jax", "flax", "tensorflow", "onnxruntime"])
def test_a_peer_that_is_installed_is_near_in_ordinary_batches_and_far_at_1e6(
    quick: tuple[Result, Any], peer: str
) -> None:
    peers = {one.name for one in contestants() if peer in one.needs and one.family != "arraybn" and not one.missing}
    if not peers:
        need(peer)  # skips, or fails where it is promised
    for one in (one for one in quick[1]["rows"] if one["name"] in peers):
        assert one["errors"]["y"]["ordinary"] < 1000  # called as it should be: the right formula
        assert one["errors"]["dx"]["ordinary"] < 1000 if "dx" in one["errors"] else one["family"] == "ONNX Runtime"
        assert one["errors"]["y"]["1e6"] is None or one["errors"]["y"]["1e6"] > 1000


def test_a_broken_promise_and_a_failure_are_in_their_rows_and_in_the_exit_status(tmp_path: Path) -> None:
    spoil = """
import arraybn.commands.check as c, dataclasses, os
ours = [one for one in c.measured() if one.name == "NumPy"]
def spoiled():
    call = ours[0].build()
    return lambda batch: {**call(batch), "y": call(batch)["y"] * (1 + 1e-3)}
def crash():
    os.kill(os.getpid(), 9)
def explode(batch): raise ValueError("no such luck")
def exploding():
    return explode
spoil = [dataclasses.replace(ours[0], build=spoiled),
    dataclasses.replace(ours[0], family="NumPy", name="bad", promise=None, build=exploding),
    dataclasses.replace(ours[0], name="crash", needs=("json",), build=crash)]
"""
    (tmp_path / "spoil.py").write_text(spoil)  # a module, so that the processes find the functions
    preparation = "sys.path.insert(0, '.')\nimport spoil\nspoil.c.measured = lambda: spoil.spoil"
    result = run("--quick", cwd=tmp_path, preparation=preparation)
    assert result.returncode == 1, result.stderr
    assert re.search(r"^  NumPy .* BROKEN$", result.stdout, re.MULTILINE)
    assert re.search(r"BROKEN by NumPy: y \S+ > 4 ulp \(ordinary\)", result.stdout)
    assert re.search(r"^  bad +failed: ValueError: no such luck$", result.stdout, re.MULTILINE)
    assert re.search(r"^  crash +failed: ended by signal 9  BROKEN$", result.stdout, re.MULTILINE)


def test_json_alone_prints_nothing_else_and_the_plot_is_a_picture(tmp_path: Path) -> None:
    need("matplotlib")
    few = "lambda all=c.measured: [one for one in all() if 'numpy' in one.needs]"
    here = f"import arraybn.commands.check as c\nc.measured = {few}"
    result = run("--quick", "--seed", "5", "--json", "--plot", cwd=tmp_path, preparation=here)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["seed"], found["quick"]) == (5, True)
    picture = (tmp_path / "arraybn-check.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 1200
    assert height > 800
    assert 30_000 < len(picture) < 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["arraybn-check.png"]
    curve = dict(row(found, "NumPy", "x.mean(), x.var()")["y_by_ratio"])
    assert curve[1e6] > 1000 * curve[1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "missing/a.png"], "--plot missing/a.png: expected a file in a folder that is there"),
        (["--json", "."], "--json .: expected a file in a folder that is there"),
    ],
)
def test_files_that_cannot_be_written_are_named_before_the_work(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    need("matplotlib")
    result = run(*arguments, cwd=tmp_path, limit=10)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_negative_seed_is_refused(tmp_path: Path) -> None:
    result = run("--seed", "-1", cwd=tmp_path, limit=10)
    assert (result.returncode, result.stdout) == (2, "")
    assert "--seed" in result.stderr


def test_a_missing_matplotlib_is_named_before_the_work(tmp_path: Path) -> None:
    result = run("--plot", cwd=tmp_path, preparation="sys.modules['matplotlib'] = None", limit=10)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(
        r'check: --plot needs matplotlib .*pip install "arraybn\[demo\]"\n', as_installed(result.stderr)
    )


@pytest.mark.parametrize("n", [1, 2, 256, 12544])
def test_the_bounds_without_float64_grow_with_log_n(n: int) -> None:
    for name, slope in {"mean": 1, "var": 1, "y": 2, "dx": 4}.items():
        assert check.bounds(2 * n)[name] - check.bounds(n)[name] == pytest.approx(slope)


# ---- Your functions ----


def test_a_right_function_passes(mine: Path) -> None:
    result = run("mine:forward", "--examples", "5", cwd=mine)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert result.stdout.count("ok  ") >= 10
    assert "FAILS" not in result.stdout


def test_a_planted_fault_is_named_with_its_cause(mine: Path) -> None:
    result = run("mine:unbiased", "--examples", "5", cwd=mine)
    assert result.returncode == 1, result.stderr
    assert "FAILS  y is what the definition gives\n" in result.stdout
    assert "ok     y is of the dtype and shape of x\n" in result.stdout
    assert re.search(r"y is what the definition gives: off by \S+ ulp, 4 are allowed\n  on x = ", result.stdout)
    assert "usual cause: the variance is divided by n − 1" in result.stdout


def test_a_fault_of_the_backward_is_named_with_its_cause(mine: Path) -> None:
    result = run("mine:forward", "--backward", "mine:forgetful", "--max-ratio", "1", "--examples", "0", cwd=mine)
    assert result.returncode == 1, result.stderr
    assert re.findall("FAILS  (.*)", result.stdout) == ["dx is what the definition gives"]
    assert "usual cause: the term xhat·dweight/n of (E6) is missing" in result.stdout


def test_float32_sums_have_a_verdict_and_a_status_of_their_own(mine: Path) -> None:
    result = run("mine:plain", "--examples", "5", cwd=mine)
    assert (result.returncode, result.stderr) == (3, "")
    verdict = r"^the formula is right; accuracy is that of float32 sums: \S+ ulp at \|mean\|/std = \S+$"
    assert re.search(verdict, result.stdout, re.MULTILINE)
    assert "rough  y keeps its digits where the mean is far from zero\n" in result.stdout
    assert "FAILS" not in result.stdout
    assert "--accuracy sums" in result.stdout.splitlines()[-1]
    accepted = run("mine:plain", "--examples", "5", "--accuracy", "sums", cwd=mine)
    assert (accepted.returncode, accepted.stderr) == (0, "")
    assert re.search(verdict, accepted.stdout, re.MULTILINE)
    near = run("mine:plain", "--examples", "0", "--max-ratio", "1", "--tolerance", "32", cwd=mine)
    assert near.returncode == 0, near.stdout


@pytest.mark.parametrize("name", ["unbiased", "one_pass"])
def test_a_fault_is_one_whatever_accuracy_is_accepted(mine: Path, name: str) -> None:
    result = run(f"mine:{name}", "--examples", "0", "--accuracy", "sums", cwd=mine)
    assert result.returncode == 1, result.stdout
    assert result.stdout.count("usual cause") == 1
    assert "the formula is right" not in result.stdout


def test_an_unbiased_variance_is_told_once_and_not_blamed_on_nan(mine: Path) -> None:
    result = run("mine:unbiased", cwd=mine)
    assert "ok     a NaN stays in its channel\n" in result.stdout
    assert result.stdout.count("usual cause") == result.stdout.count("on x = ") == 1
    failing = re.findall("^FAILS  (.*)$", result.stdout, re.MULTILINE)
    assert result.stdout.partition("it breaks:\n")[2].split("\n") == [f"    {name}" for name in failing] + [""]


def test_functions_of_n_c_alone_are_accepted_and_told_so(mine: Path) -> None:
    result = run("mine:lines", "--examples", "5", cwd=mine)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert "checked with x of shape (N, C) alone, which is what forward can take" in result.stdout


def test_the_check_leaves_nothing_in_the_folder(mine: Path) -> None:
    before = sorted(path.name for path in mine.iterdir())
    run("mine:forward", cwd=mine)
    assert sorted(path.name for path in mine.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize(("target", "got"), [("three", "three(x, weight, bias)"), ("Norm", "the class Norm. Write a")])
def test_other_arguments_are_refused_in_one_line(mine: Path, target: str, got: str) -> None:
    result = run(f"mine:{target}", cwd=mine)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    expected = "check: forward: expected a function of (x, weight, bias, eps) that returns y; got "
    assert result.stderr.startswith(expected + got)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mine", "expected package.module:function; got 'mine'"),
        ("./mine.py:forward", "expected package.module:function, as in mine:forward; got './mine.py:forward', a file"),
        ("nine:forward", "no module named 'nine' in this folder"),
        (
            "mine:backwards",
            "mine has no 'backwards'; it has forward, unbiased, forgetful, plain, one_pass, lines, three, Norm",
        ),
        ("mine:number", "mine:number: expected a function; it is of type int"),
        ("broken:f", "importing broken raised ZeroDivisionError: division by zero"),
        ("needy:f", "importing needy raised ModuleNotFoundError: No module named 'nowhere'"),
        ("quits:f", "importing quits raised SystemExit: 0"),
    ],
)
def test_a_bad_target_is_refused(mine: Path, target: str, message: str) -> None:
    (mine / "broken.py").write_text("1 / 0")
    (mine / "needy.py").write_text("import nowhere")
    (mine / "quits.py").write_text("raise SystemExit(0)")
    result = run(target, cwd=mine)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("check: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_options_of_the_table_are_refused_beside_a_target(mine: Path) -> None:
    result = run("mine:forward", "--quick", cwd=mine)
    assert result.returncode == 2
    assert "--quick belongs to the table" in result.stderr


def test_the_help_shows_the_signatures_and_its_example_passes(tmp_path: Path) -> None:
    text = run("--help", cwd=tmp_path).stdout
    for signature in ("forward(x, weight, bias, eps)", "backward(dy, x, weight, bias, eps)", "update(running_mean, "):
        assert signature in text
    start, end = text.index("  import numpy"), text.index("and then")
    (tmp_path / "mine.py").write_text(re.sub("^  ", "", text[start:end], flags=re.MULTILINE))
    result = run("mine:forward", "--examples", "0", cwd=tmp_path)
    assert result.returncode == 0, result.stdout


def test_a_library_that_is_needed_twice_is_named_once() -> None:
    for one in contestants():
        assert len(set(one.needs)) == len(one.needs), one.name


def drawn(rows: list[check.Row], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the axes of the picture, laid out."""
    made = need("matplotlib.figure").Figure(figsize=(11.5, 7.0), layout="constrained")
    monkeypatch.setattr(figure, "draw_picture", lambda path, size, title, subtitle, fill: fill(made))
    figure.draw(rows, Path("unused.png"))
    made.draw_without_rendering()
    return made.axes[0]


@pytest.mark.parametrize(("worst", "few"), [(1.0, True), (5e6, True), (1e9, False)])
def test_the_picture_has_no_empty_quarter(worst: float, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [check.Row(one, curve={1.0: 1.0, 1e3: worst, 1e6: worst / 2}) for one in contestants()[: 3 if few else 12]]
    axes = drawn(rows, monkeypatch)
    decades = math.log10(axes.get_ylim()[1] / worst)
    assert decades >= 0.5
    assert not few or decades < 1.1  # a decade, so that the highest line is seen
    assert (axes.get_position().width > 0.85) == few
    window = axes.get_window_extent()
    for text in axes.texts:
        assert text.get_window_extent().y1 <= window.y1, text.get_text()
    assert ("no digit is right" in [text.get_text() for text in axes.texts]) == (worst > 1e6)

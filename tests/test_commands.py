"""``python -m arraybn``, run as a person runs the command, and the output that a person sees."""

from __future__ import annotations

import configparser
import os
import re
import signal
import struct
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import PACKAGE, Result, added, after, arraybn_command, as_installed, bare, environment, python
from support.libraries import need

import arraybn

MODULES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
ROW = re.compile(
    r"^(?P<network>with(?:out)? batch norm) +(?P<lr>\S+) +(?P<loss>\S+) +(?P<batch>\S+) +(?P<running>\S+) +[\d.]+$",
    re.MULTILINE,
)


def table(result: Result) -> list[dict[str, str]]:
    """Return the rows, without the seconds."""
    return [match.groupdict() for match in ROW.finditer(result.stdout)]


def is_clean(result: Result) -> bool:
    """Return True unless stderr has a traceback or a warning."""
    return not re.search(r"Traceback|Warning|Exception", result.stderr)


def line(result: Result, start: str) -> str:
    """Return the one line of the report that starts with this text."""
    found = [text for text in result.stdout.splitlines() if text.strip().startswith(start)]
    assert len(found) == 1, f"{start!r} starts {len(found)} lines of\n{result.stdout}"
    return found[0]


# ---- Dispatching ----


def test_help_lists_every_command_with_what_it_does(tmp_path: Path) -> None:
    result = arraybn_command("--help", cwd=tmp_path)
    assert result.returncode == 0
    for name in ("info", "demo"):
        assert re.search(rf"^ +{name} +\w+", result.stdout, re.MULTILINE)


def test_no_command_prints_the_help_and_exits_2(tmp_path: Path) -> None:
    result = arraybn_command(cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "info" in result.stderr
    assert "demo" in result.stderr


def test_an_unknown_command_is_named(tmp_path: Path) -> None:
    result = arraybn_command("dmeo", cwd=tmp_path)
    assert result.returncode == 2
    assert "'dmeo'" in result.stderr


def test_dispatching_imports_nothing_optional(tmp_path: Path) -> None:
    optional = ("sklearn", "matplotlib", "tqdm", "torch", "jax", "cupy", "numba", "mpi4py", "ml_dtypes")
    code = f"import sys, arraybn.__main__; print([name for name in {optional} if name in sys.modules])"
    assert python("-c", code, cwd=tmp_path).stdout.strip() == "[]"


# ---- info ----


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Run `info` in this environment, without a setting of JAX that a person may have made."""
    return arraybn_command("info", cwd=tmp_path_factory.mktemp("info"), limit=30, JAX_ENABLE_X64="0")


def test_info_reports_the_versions_that_are_installed(report: Result) -> None:
    result = report
    assert (result.returncode, result.stderr) == (0, "")
    assert f"arraybn {arraybn.__version__}\n" in result.stdout
    assert ".".join(map(str, sys.version_info[:3])) in line(result, "Python ")
    assert metadata.version("numpy") in line(result, "NumPy")
    assert metadata.version("array-api-compat") in line(result, "array-api-compat")
    assert "reference" in result.stdout


@pytest.mark.parametrize(
    ("module", "dtypes"),
    [
        ("numpy", "float16, bfloat16, float32, float64"),
        ("torch", "float16, bfloat16, float32, float64"),
        ("jax.numpy", "float16, bfloat16, float32  "),  # no float64, unless it is enabled
        ("array_api_strict", "float32, float64"),
    ],
)
def test_info_lists_the_dtypes_of_a_namespace(report: Result, module: str, dtypes: str) -> None:
    top = need("ml_dtypes" if module == "numpy" else module.partition(".")[0])
    version = np.__version__ if module == "numpy" else top.__version__
    reported = line(report, module)
    assert re.search(rf"{re.escape(version)} +{dtypes}", reported + "  "), reported


def test_info_starts_mpi(report: Result) -> None:
    need("mpi4py")
    built_for = re.search(r"mpi4py +[\d.]+ +starts, built for (MPICH|Open MPI)$", report.stdout, re.MULTILINE)
    assert built_for
    assert re.search(r"library +(MPICH|Open MPI|Intel)", report.stdout)
    assert line(report, "launcher").endswith(f", of {built_for[1]}")


MPICH, OPEN_MPI = "MPICH Version: 5.0.2", "Open MPI v5.0.11, package: Open MPI"
HYDRA, PRTE = ["HYDRA build details:", "Version: 5.0.2"], ["mpirun (Open MPI) 5.0.11"]


@pytest.mark.parametrize(
    ("library", "started_by", "says"),
    [
        (MPICH, HYDRA, "/bin/mpirun, of MPICH"),
        (OPEN_MPI, PRTE, "/bin/mpirun, of Open MPI"),
        ("Intel(R) MPI Library 2021.9", HYDRA, "/bin/mpirun, of MPICH"),
        (OPEN_MPI, HYDRA, "/bin/mpirun, of MPICH; mpi4py was built for Open MPI, so each rank would be alone."),
        (MPICH, PRTE, "/bin/mpirun, of Open MPI; mpi4py was built for MPICH, so each rank would be alone."),
        (MPICH, ["slurm 23.02"], "/bin/mpirun"),
        (MPICH, None, "/bin/mpirun"),
    ],
)
def test_info_says_whether_mpirun_is_of_the_mpi_that_mpi4py_was_built_for(
    library: str, started_by: list[str] | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arraybn.commands import info

    monkeypatch.setattr(info, "launcher", lambda: "/bin/mpirun")
    rows = info._mpi(([library, "started"], ""), None if started_by is None else (started_by, ""))
    assert rows[-1].text.startswith(says)
    assert ("alone" in rows[-1].text) == ("alone" in says)


def test_info_takes_itself_for_no_rank_when_a_launcher_starts_it(tmp_path: Path) -> None:
    need("mpi4py")
    from arraybn.commands import info

    launcher = info.launcher()
    assert launcher is not None
    command = [launcher, "-n", "1", sys.executable, "-m", "arraybn", "info"]
    env = environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    result = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=60, cwd=tmp_path, env=env, check=False
    )
    assert result.returncode == 0
    assert re.search(r"mpi4py +[\d.]+ +starts, built for (MPICH|Open MPI)$", result.stdout, re.MULTILINE)


def test_info_names_what_brings_the_missing(bare_site: Path) -> None:
    result = bare(bare_site, "info")
    assert (result.returncode, result.stderr) == (0, "")
    assert metadata.version("numpy") in line(result, "numpy ")
    assert 'pip install "arraybn[cpu]"' in line(result, "numpy ")  # for bfloat16
    for start, remedy in {
        "cupy": 'pip install "arraybn[cuda12]"',
        "torch": "pip install torch",
        "jax.numpy": "pip install jax",
        "array_api_strict": "pip install array-api-strict",
        "mpi4py": 'pip install "arraybn[mpi]"',
        "launcher": 'pip install "arraybn[mpi]"',
        "demo": 'matplotlib, numba, safetensors, scikit-learn, tqdm: pip install "arraybn[demo]"',
    }.items():
        assert "missing" in line(result, start)
        assert remedy in line(result, start)
    kernels, extra = (row for row in result.stdout.splitlines() if row.startswith("  cpu "))
    assert kernels.endswith('missing  pip install "arraybn[cpu]"')
    assert extra.endswith('missing  numba, ml_dtypes: pip install "arraybn[cpu]"')
    assert "none found" in result.stdout


def test_info_compile_needs_numba_and_says_what_it_has_compiled(bare_site: Path, tmp_path: Path) -> None:
    result = bare(bare_site, "info", "--compile")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == '--compile: expected numba; it is not installed. Run: pip install "arraybn[cpu]"\n'
    need("numba")
    result = arraybn_command("info", "--compile", cwd=tmp_path, limit=300)
    assert result.returncode == 0
    for name in ("float32", "float64", "float16", "bfloat16"):
        assert re.search(rf"^compiled, or found compiled, for {name} after \d+\.\d s$", result.stdout, re.MULTILINE)
    assert re.search(
        r"^  cpu +numba .* NumPy arrays; \d+ threads?, compiled once and kept in ", result.stdout, re.MULTILINE
    )


def test_info_names_only_extras_that_exist() -> None:
    from arraybn.commands import info

    settings = configparser.ConfigParser()
    if not settings.read(PACKAGE.parent / "setup.cfg"):
        pytest.skip("arraybn is installed, and its settings are elsewhere")
    extras = settings["options.extras_require"]
    for name, brought in info.EXTRAS.items():
        assert set(brought) <= set(extras[name].split()), name


def test_info_survives_an_mpi_that_ends_the_process(bare_site: Path) -> None:
    files = {"mpi4py/__init__.py": "class rc: pass", "mpi4py/MPI.py": "import os; os.abort()"}
    with added(bare_site, files):
        result = bare(bare_site, "info")
    assert result.returncode == 0
    assert "does not start: ended by signal 6" in line(result, "mpi4py")


def test_info_gives_up_on_an_mpi_that_hangs(bare_site: Path) -> None:
    hang = "def Get_library_version(): return 'Slow MPI 1.0, at home'\ndef Init():\n import time; time.sleep(60)"
    code = "import argparse\nfrom arraybn.commands import info\ninfo.TIME_LIMIT = 2.0\n"
    code += "info.run(argparse.Namespace(compile=False))"
    with added(bare_site, {"mpi4py/__init__.py": "class rc: pass", "mpi4py/MPI.py": hang}):
        start = time.monotonic()
        result = bare(bare_site, "-c", code)
    assert result.returncode == 0
    assert time.monotonic() - start < 30
    assert "does not start: no answer within 2 s" in line(result, "mpi4py")
    assert line(result, "library").endswith("  Slow MPI 1.0")


def test_info_says_why_a_namespace_cannot_be_used(bare_site: Path) -> None:
    with added(bare_site, {"torch/__init__.py": "raise ImportError('libtorch.so: no such file')"}):
        result = bare(bare_site, "info")
    assert result.returncode == 0
    assert "cannot be used: ImportError: libtorch.so: no such file" in line(result, "torch")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA H200, 143771 MiB, 570.86'", r"nvidia-smi +NVIDIA H200, 143771 MiB, 570\.86"),
        ("echo 'cannot reach the driver'; exit 9", r"nvidia-smi +failed: cannot reach the driver"),
    ],
)
def test_info_reports_what_nvidia_smi_says(bare_site: Path, script: str, expected: str) -> None:
    with added(bare_site, {"nvidia-smi": f"#!/bin/sh\n{script}\n"}):
        result = bare(bare_site, "info")
    assert result.returncode == 0
    assert re.search(expected, result.stdout)
    assert "none found" not in result.stdout


# ---- demo: what it makes ----


@pytest.fixture(scope="module")
def demo_libraries() -> None:
    for module in MODULES:
        need(module)


@pytest.fixture(scope="module")
def full(demo_libraries: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """Run the demo without options; return the result and the folder."""
    folder = tmp_path_factory.mktemp("full")
    return arraybn_command("demo", cwd=folder, limit=240), folder


@pytest.fixture(scope="module")
def short(demo_libraries: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """Run two epochs without a picture."""
    folder = tmp_path_factory.mktemp("short")
    return arraybn_command("demo", "--epochs", "2", "--no-plot", "--out", "here/there", cwd=folder), folder


def test_batch_norm_learns_at_every_rate_and_the_network_without_it_does_not(full: tuple[Result, Path]) -> None:
    result, _ = full
    assert (result.returncode, result.stderr) == (0, "")
    rows = table(result)
    learned = {
        name: [float(row["running"].rstrip("%")) for row in rows if row["network"] == name]
        for name in ("with batch norm", "without batch norm")
    }
    assert len(learned["with batch norm"]) == len(learned["without batch norm"]) >= 4
    assert min(learned["with batch norm"]) >= 97
    assert min(learned["without batch norm"]) < 50
    assert max(learned["with batch norm"]) > max(learned["without batch norm"])


def test_batch_and_running_statistics_agree_after_training(full: tuple[Result, Path]) -> None:
    for row in table(full[0]):
        if row["network"] == "without batch norm":
            assert row["batch"] == "–"
        else:
            assert abs(float(row["batch"].rstrip("%")) - float(row["running"].rstrip("%"))) < 2


def test_the_picture_is_large_and_has_both_colours(full: tuple[Result, Path]) -> None:
    picture = full[1] / "arraybn-demo" / "demo.png"
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 1000 <= width <= 3000
    assert 1000 <= height <= 3000
    assert 50_000 < len(data) < 2_000_000
    pixels = need("matplotlib.image").imread(picture)[..., :3]
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (abs(pixels * 255 - color).max(axis=-1) < 3).sum() > 500, f"hardly any {color}"
    assert 0.7 < (pixels.min(axis=-1) > 0.99).mean() < 0.98  # white paper, neither blank nor covered


def test_the_files_are_named_and_no_others_are_there(full: tuple[Result, Path], short: tuple[Result, Path]) -> None:
    for (result, folder), out, names in (
        (full, Path("arraybn-demo"), ["best.npz", "demo.png"]),
        (short, Path("here/there"), ["best.npz"]),
    ):
        assert sorted(path.name for path in (folder / out).iterdir()) == names
        for name in names:
            assert str(out / name) in result.stdout
    assert "demo.png" not in short[0].stdout


def test_pytorch_reads_the_test_digits_with_the_saved_network_as_well(full: tuple[Result, Path]) -> None:
    torch = need("torch")
    from arraybn.commands import _demo_training as demo

    result, folder = full
    nn = torch.nn
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        nn.Linear(1024, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    state = arraybn.load(folder / "arraybn-demo" / "best.npz")
    network.load_state_dict({name: torch.asarray(value) for name, value in state.items()})
    digits = demo.load_digits(0)
    with torch.no_grad():
        read = network.eval()(torch.asarray(digits.test_images)).argmax(dim=1).numpy()
    lr = re.search(r"learning rate (\S+)\);", result.stdout)
    assert lr is not None
    (reported,) = (row for row in table(result) if row["network"] == "with batch norm" and row["lr"] == lr[1])
    assert f"{np.mean(read == digits.test_labels):.1%}" == reported["running"]


def test_the_saved_network_is_the_one_of_the_lowest_loss(full: tuple[Result, Path]) -> None:
    losses = {row["lr"]: float(row["loss"]) for row in table(full[0]) if row["network"] == "with batch norm"}
    assert f"learning rate {min(losses, key=losses.__getitem__)});" in full[0].stdout


def test_the_same_seed_gives_the_same_table_on_any_number_of_cores(short: tuple[Result, Path], tmp_path: Path) -> None:
    options = ("demo", "--epochs", "2", "--no-plot")
    again = arraybn_command(*options, cwd=tmp_path, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    other = arraybn_command(*options, "--seed", "1", cwd=tmp_path)
    assert len(table(again)) == 8
    assert table(again) == table(short[0])
    assert table(other) != table(short[0])


def test_a_diverged_run_is_said_to_be_so_and_spoils_nothing(demo_libraries: None, tmp_path: Path) -> None:
    rates = "from arraybn.commands import _demo_training\n_demo_training.LEARNING_RATES = (0.1, 0.2, 0.5, 1e30)"
    result = after(rates, "demo", "--epochs", "1", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert [row["loss"] == "diverged" for row in table(result)] == 2 * [False, False, False, True]
    assert {row["running"] for row in table(result) if row["loss"] == "diverged"} == {"–"}
    assert (tmp_path / "arraybn-demo" / "demo.png").stat().st_size > 50_000


def test_a_network_that_comes_back_changed_is_a_failure(demo_libraries: None, tmp_path: Path) -> None:
    spoil = """
import numpy
from arraybn import checkpoint
load = checkpoint.load
def spoiled(path):
    state = load(path)
    state["7.bias"] = numpy.nextafter(state["7.bias"], numpy.float32(9))
    return state
checkpoint.load = spoiled
"""
    result = after(spoil, "demo", "--epochs", "1", "--no-plot", cwd=tmp_path)
    assert result.returncode == 1
    assert "other logits" in result.stderr
    assert is_clean(result)


# ---- demo: the pieces ----


def test_both_networks_start_from_the_same_weights() -> None:
    from arraybn.commands import _demo_training as demo

    networks = [demo.build_network(batch_norm, np.random.default_rng(0)) for batch_norm in (True, False)]
    kinds = (arraybn.network.Conv2d, arraybn.network.Linear)
    layers = [[layer for layer in network if isinstance(layer, kinds)] for network in networks]
    assert len(layers[0]) == len(layers[1]) == 3
    for one, other in zip(*layers, strict=True):
        np.testing.assert_array_equal(one.weight.data, other.weight.data)
        np.testing.assert_array_equal(one.bias.data, other.bias.data)
    assert [len(demo.batch_norms(network)) for network in networks] == [2, 0]


def test_evaluating_with_batch_statistics_leaves_the_network_as_it_is() -> None:
    from arraybn.commands import _demo_training as demo

    rng = np.random.default_rng(0)
    network, images = demo.build_network(True, rng), rng.random((40, 1, 8, 8), dtype=np.float32)
    before = {name: value.tobytes() for name, value in network.state_dict().items()}
    copied = demo.with_batch_statistics(network)
    logits = copied(images)
    assert {name: value.tobytes() for name, value in network.state_dict().items()} == before
    np.testing.assert_array_equal(logits, network.train()(images))  # training uses batch statistics
    assert abs(logits - network.eval()(images)).max() > 0.01  # the running ones are far from them yet


def test_accuracy_is_that_of_evaluation_with_the_running_statistics() -> None:
    from arraybn.commands import _demo_training as demo

    rng = np.random.default_rng(0)
    network, images = demo.build_network(True, rng), rng.random((200, 1, 8, 8), dtype=np.float32)
    labels = network.eval()(images).argmax(axis=1)
    labels[:20] = 9 - labels[:20]
    before = {name: value.tobytes() for name, value in network.state_dict().items()}
    assert demo.accuracy(network.train(), images, labels) == 0.9
    assert {name: value.tobytes() for name, value in network.state_dict().items()} == before
    assert demo.accuracy(demo.with_batch_statistics(network), images, labels) != 0.9


def test_true_statistics_are_those_of_the_inputs_in_one_batch() -> None:
    from arraybn.commands import _demo_training as demo

    rng = np.random.default_rng(0)
    network, images = demo.build_network(True, rng), rng.random((40, 1, 8, 8), dtype=np.float32)
    true = demo.true_statistics(network.eval(), images)
    layers = demo.batch_norms(network)
    for layer in layers:
        layer.momentum = 1.0  # so that the running statistics are those of the batch
    network.train()(images)
    assert [exact.n for exact in true] == [40 * 64, 40]
    for layer, exact in zip(layers, true, strict=True):
        np.testing.assert_allclose(layer.running_mean, exact.mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(layer.running_var, exact.var(1), rtol=1e-6)


def test_the_split_is_stratified_seeded_and_loses_nothing(demo_libraries: None) -> None:
    from arraybn.commands import _demo_training as demo

    digits, again, other = demo.load_digits(0), demo.load_digits(0), demo.load_digits(1)
    assert len(digits.train_images) + len(digits.test_images) == 1797
    assert abs(np.bincount(digits.train_labels) / 4 - np.bincount(digits.test_labels)).max() <= 2
    assert digits.test_images.tobytes() == again.test_images.tobytes() != other.test_images.tobytes()
    assert (digits.train_images.dtype, digits.train_images.min(), digits.train_images.max()) == ("float32", 0, 1)


# ---- demo: what is refused, and being interrupted ----


@pytest.mark.parametrize("option", [("--epochs", "0"), ("--epochs", "x"), ("--seed", "-1"), ("--seed", "1.5")])
def test_bad_options_are_named(option: tuple[str, str], tmp_path: Path) -> None:
    result = arraybn_command("demo", f"{option[0]}={option[1]}", cwd=tmp_path)
    assert result.returncode == 2
    assert f"argument {option[0]}: expected an integer from" in result.stderr
    assert f"'{option[1]}'" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_missing_library_is_named_with_the_command_that_installs_it(bare_site: Path, tmp_path: Path) -> None:
    result = bare(bare_site, "demo", "--out", str(tmp_path / "out"))
    assert (result.returncode, result.stdout) == (1, "")
    assert all(name in result.stderr for name in MODULES.values())
    assert 'pip install "arraybn[demo]"' in result.stderr
    assert is_clean(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", MODULES)
def test_one_missing_library_is_named_before_any_training(demo_libraries: None, module: str, tmp_path: Path) -> None:
    result = after(f"sys.modules[{module!r}] = None", "demo", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert [name in result.stderr for name in MODULES.values()] == [name == module for name in MODULES]
    assert 'pip install "arraybn[demo]"' in as_installed(result.stderr)


def test_no_plot_needs_no_matplotlib(demo_libraries: None, tmp_path: Path) -> None:
    result = after("sys.modules['matplotlib'] = None", "demo", "--epochs", "1", "--no-plot", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(table(result)) == 8


def test_a_terminal_without_dashes_costs_no_result(demo_libraries: None, tmp_path: Path) -> None:
    result = arraybn_command("demo", "--epochs", "1", "--no-plot", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert [row["batch"] for row in table(result)][4:] == 4 * ["?"]


@pytest.mark.parametrize(("out", "reason"), [("file", "expected a folder"), ("file/below", "cannot write there")])
def test_a_folder_that_cannot_be_is_refused_before_any_training(
    demo_libraries: None, tmp_path: Path, out: str, reason: str
) -> None:
    (tmp_path / "file").write_text("mine")
    result = arraybn_command("demo", "--out", out, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"--out {Path(out)}: {reason}" in result.stderr
    assert is_clean(result)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written_is_refused_before_any_training(demo_libraries: None, tmp_path: Path) -> None:
    refuse = "def refuse(**_): raise PermissionError(13, 'Permission denied')"
    result = after(f"import tempfile\n{refuse}\ntempfile.TemporaryFile = refuse", "demo", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "cannot write there: Permission denied" in result.stderr


def test_a_full_disk_is_an_error_in_words(demo_libraries: None, tmp_path: Path) -> None:
    full_disk = "import os\ndef replace(*_): raise OSError(28, 'No space left on device')\nos.replace = replace"
    result = after(full_disk, "demo", "--epochs", "1", cwd=tmp_path)
    assert result.returncode == 1
    assert "cannot write" in result.stderr
    assert "No space left on device" in result.stderr
    assert is_clean(result)
    assert list((tmp_path / "arraybn-demo").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT can be sent to one process")
def test_ctrl_c_ends_it_cleanly(demo_libraries: None, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "arraybn", "demo", "--epochs", "10000"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits one that is ignored
    try:
        child = subprocess.Popen(command, cwd=tmp_path, env=environment(), **pipes)
    finally:
        signal.signal(signal.SIGINT, before)
    with child:
        try:
            assert child.stdout is not None
            assert "epochs: 10000" in child.stdout.readline()  # the training starts
            time.sleep(1)
            assert child.poll() is None
            child.send_signal(signal.SIGINT)
            _, stderr = child.communicate(timeout=30)
        finally:
            child.kill()
    assert child.returncode == 130
    assert stderr.strip() == "interrupted"
    assert list((tmp_path / "arraybn-demo").iterdir()) == []


def test_the_version_and_a_reader_who_leaves_early(tmp_path: Path) -> None:
    result = arraybn_command("--version", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, f"arraybn {arraybn.__version__}\n")
    code = "import sys; sys.stdin.readline()"
    command = [sys.executable, "-m", "arraybn", "info"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=tmp_path, env=environment()) as info:
        subprocess.run([sys.executable, "-c", code], stdin=info.stdout, timeout=60, check=True)
        info.stdout.close()
        assert info.stderr.read() == b""

"""``demo --data-parallel``, ``bench sync`` and the script of docs/synchronized.md, under the mpirun of this Python."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import after, arraybn_command, as_installed, environment
from support.libraries import REQUIRED, need

import arraybn
from arraybn.__main__ import main
from arraybn.bench import jobs
from arraybn.bench.output import RefusedError
from arraybn.commands import info
from arraybn.testing import ThreadComm

ROOT = Path(__file__).parents[1]
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
LIMIT = 120.0  # seconds, for each job
Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def mpirun() -> str:
    """The launcher beside this Python."""
    need("mpi4py")
    launcher = info.launcher()
    if launcher is None:
        assert "mpi4py" not in REQUIRED, "no mpirun"
        pytest.skip("there is no mpirun")
    return launcher


def on_ranks(mpirun: str, ranks: int, *words: str, cwd: Path) -> Result:
    """`python -m mpi4py` with these words on so many ranks; all of it is ended if it takes too long."""
    command = [mpirun, "-n", str(ranks), sys.executable, "-m", "mpi4py", *words]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        job = subprocess.Popen(command, cwd=cwd, env=environment(**OPEN_MPI), start_new_session=True, **streams)
        try:
            status = job.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
            pytest.fail(f"{command} has not ended within {LIMIT:g} s")
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace").replace("\0", ""))
    return subprocess.CompletedProcess(command, status, *texts)


def number(text: str) -> float:
    return float(text.rstrip("%"))


# ---- demo --data-parallel --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(mpirun: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """One epoch on two ranks, and the folder it was run in."""
    for module in ("sklearn", "matplotlib", "tqdm"):
        need(module)
    folder = tmp_path_factory.mktemp("ranks")
    words = ("-m", "arraybn", "demo", "--data-parallel", "4", "--epochs", "2")
    return on_ranks(mpirun, 2, *words, cwd=folder), folder


def rows(result: Result) -> dict[str, list[str]]:
    """The numbers of each training: final loss, accuracy, and what is apart from one process."""
    pattern = r"^(one process|.*, synchronized|.*, local)(?:, batches of 8| batch norm) +(.*)$"
    return {name.split(", ")[-1]: rest.split() for name, rest in re.findall(pattern, result.stdout, re.MULTILINE)}


def test_synchronized_training_is_that_of_one_process_and_local_training_is_not(trained: tuple[Result, Path]) -> None:
    result, _ = trained
    assert (result.returncode, result.stderr) == (0, "")
    found = rows(result)
    assert len(found) == 3, result.stdout
    assert found["synchronized"][:2] == found["one process"]
    for apart in found["synchronized"][2:]:
        assert 0 <= number(apart) < 1e-10  # rounding in float64, a few hundred steps long
    for apart in found["local"][2:]:
        assert number(apart) > 1e-3  # the control
    assert number(found["one process"][1]) > 90


def test_every_loss_on_the_way_is_that_of_one_process(trained: tuple[Result, Path]) -> None:
    lines = re.findall(r"^ +(\d+)  +([\d.]+)  +([\d.]+)  +([\d.]+)$", trained[0].stdout, re.MULTILINE)
    assert [epoch for epoch, *_ in lines] == ["1", "2"]
    for _, alone, together, local in lines:
        assert alone == together != local


def test_one_rank_speaks_and_the_ranks_hold_the_same_bits(trained: tuple[Result, Path]) -> None:
    text = trained[0].stdout
    assert text.count("Handwritten digits") == text.count("ranks.png") == 1
    assert "synchronized, the same bits on all ranks; local, not the same on all ranks" in text


def test_the_picture_of_the_ranks_is_drawn_and_small(trained: tuple[Result, Path]) -> None:
    files = list((trained[1] / "arraybn-demo").iterdir())
    assert [file.name for file in files] == ["ranks.png"]
    assert 30_000 < files[0].stat().st_size < 200_000
    pixels = need("matplotlib.image").imread(files[0])[..., :3]
    for color in ((0x00, 0x3F, 0x66), (0xD5, 0x5E, 0x00), (0xA9, 0xCF, 0xE8)):
        assert (abs(pixels * 255 - color).max(axis=-1) < 3).sum() > 300, f"hardly any {color}"


def test_a_folder_that_cannot_be_is_told_once_and_all_ranks_end(mpirun: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = on_ranks(mpirun, 2, "-m", "arraybn", "demo", "--data-parallel", "--out", "file", cwd=tmp_path)
    assert result.returncode != 0
    assert result.stdout == ""
    assert result.stderr.count("--out file: expected a folder; this is a file") == 1
    assert "Traceback" not in result.stderr


def test_exact_training_prints_one_checksum_for_any_number_of_ranks(mpirun: str, tmp_path: Path) -> None:
    need("sklearn")
    need("tqdm")
    words = ("-m", "arraybn", "demo", "--data-parallel", "--exact", "--no-plot", "--epochs", "1")
    results = [arraybn_command(*words[2:], cwd=tmp_path), *(on_ranks(mpirun, n, *words, cwd=tmp_path) for n in (2, 3))]
    assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 3
    sums = [re.findall(r"^[0-9a-f]{64}$", result.stdout, re.MULTILINE) for result in results]
    assert [len(found) for found in sums] == [1, 1, 1]
    assert sums[0] == sums[1] == sums[2]
    result = arraybn_command("demo", "--exact", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "demo: --exact: expected --data-parallel beside it, and --device cpu\n"


def test_one_process_is_told_the_command_that_starts_ranks(tmp_path: Path) -> None:
    need("mpi4py")
    result = arraybn_command("demo", "--data-parallel", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "expected 2 ranks or more; this is one process" in result.stderr
    assert f"-n 4 {sys.executable} -m mpi4py -m arraybn demo --data-parallel" in as_installed(result.stderr)
    assert "Traceback" not in result.stderr


def test_processes_that_believe_to_be_alone_do_not_train(tmp_path: Path) -> None:
    need("mpi4py")
    result = arraybn_command("demo", "--data-parallel", cwd=tmp_path, OMPI_COMM_WORLD_SIZE="2")
    assert (result.returncode, result.stdout) == (1, "")
    assert "demo: synchronizing over 2 processes (OMPI_COMM_WORLD_SIZE=2), but" in result.stderr


def test_without_mpi4py_the_command_that_installs_it_is_named(tmp_path: Path) -> None:
    result = after("sys.modules['mpi4py'] = None", "demo", "--data-parallel", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "--data-parallel needs mpi4py" in result.stderr
    assert 'pip install "arraybn[mpi]"' in as_installed(result.stderr)


def test_one_image_is_too_few_for_a_local_batch_norm(tmp_path: Path) -> None:
    result = arraybn_command("demo", "--data-parallel", "1", cwd=tmp_path)
    assert result.returncode == 2
    assert "argument --data-parallel: expected an integer from 2 to 100; got '1'" in result.stderr


# ---- bench sync ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timed(mpirun: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """One turn on 1, 2 and 3 ranks, and the folder it was run in."""
    need("matplotlib")
    folder = tmp_path_factory.mktemp("timed")
    fewer = f"import os; os.environ |= {OPEN_MPI}\nfrom arraybn.bench import sync\nsync.RANKS = (1, 2, 3)"
    options = ("--repeats", "1", "--json", "sync.json", "--plot", "sync.png")
    return after(fewer, "bench", "sync", *options, cwd=folder), folder


def test_every_exchange_is_timed_and_counted(timed: tuple[Result, Path]) -> None:
    result, folder = timed
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads((folder / "sync.json").read_text())
    assert [job["ranks"] for job in found["jobs"]] == [1, 2, 3]
    for job in found["jobs"]:
        kinds = {(row["scheme"], row["what"]) for row in job["rows"]}
        exchanges = {
            (scheme, what) for scheme in ("arraybn", "exact", "all-gather") for what in ("forward", "backward")
        }
        exchanges |= {("Allreduce", "forward"), ("Iallreduce + Test", "forward")}  # of as many bytes, and nothing else
        assert kinds == {("arraybn", "layer"), ("arraybn", "step")} | (exchanges if job["ranks"] > 1 else set())
        for row in job["rows"]:
            assert len(row["seconds"]) == 1
            assert row["seconds"][0] == row["fastest"] == row["median"] > 0
            if row["traffic"] is not None:
                collectives, c, ranks = row["traffic"]["collectives"], row["channels"], job["ranks"]
                two = row["scheme"] == "exact" or (row["scheme"] == "arraybn" and c > 256)
                assert collectives == (2 if two else 1)
                if row["scheme"] == "arraybn":
                    assert row["traffic"]["received"] == 88 * collectives + 16 * max(c, 256)
                elif row["scheme"] == "exact":
                    assert row["traffic"]["received"] == 88 + 16 * 256 + 33 * 8 * c
                elif row["what"] == "forward":
                    assert row["traffic"]["received"] == ranks * row["traffic"]["sent"] == ranks * 4 * (2 * c + 1)


def test_the_table_and_the_picture_are_there(timed: tuple[Result, Path]) -> None:
    result, folder = timed
    assert (
        len(re.findall(r"^ +whole layer .* sum of MPI |^ranks .* blocking +polled ", result.stdout, re.MULTILINE)) == 2
    )
    assert max(map(len, result.stdout.splitlines())) <= 125
    assert len(re.findall(r"^ +[123] +(?:64|128|256|512|1024|2048) .*\d$", result.stdout, re.MULTILINE)) == 12
    assert (folder / "sync.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (folder / "sync.png").stat().st_size > 30_000


def test_under_mpirun_it_measures_those_ranks(mpirun: str, tmp_path: Path) -> None:
    words = ("-m", "arraybn", "bench", "sync", "--repeats", "1", "--json", "--plot", "sync.png")
    result = on_ranks(mpirun, 2, *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [job["ranks"] for job in found["jobs"]] == [2]
    assert result.stderr.count("it needs two numbers of ranks") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("preparation", "options", "message"),
    [
        ("", ("--peers", "none"), "--peers: expected no such option with sync"),
        ("", ("--ladder",), "--ladder: expected no such option with sync"),
        ("", ("--set", "cache"), "--set: expected no such option with sync"),
        ("sys.modules['mpi4py'] = None", (), 'sync needs mpi4py:  {python} -m pip install "arraybn[mpi]"'),
        ("from arraybn.bench import jobs; jobs.launcher = lambda: None", (), "sync needs mpirun:  pip install"),
        ("from arraybn.bench import jobs; jobs.launcher = lambda: 'false'", (), "mpirun -n 1 ended with status 1"),
    ],
)
def test_what_cannot_be_measured_is_said(preparation: str, options: Any, message: str, tmp_path: Path) -> None:
    if "mpi4py" not in preparation:
        need("mpi4py")
    result = after(preparation, "bench", "sync", *options, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"bench: {message.format(python=sys.executable)}" in as_installed(result.stderr)
    assert "Traceback" not in result.stderr


def test_a_job_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "mpirun"
    program.write_text("#!/bin/sh\nsleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(jobs, "TIME_LIMIT", 0.3)
    with pytest.raises(RefusedError, match=r"mpirun -n 2 has not ended within 0\.3 s"):
        jobs.start(str(program), 2, "arraybn.bench.sync_ranks", "1")


def test_ctrl_c_prints_what_was_measured_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], timed: tuple[Result, Path]
) -> None:
    found = json.loads((timed[1] / "sync.json").read_text())["jobs"]

    def start(launcher: str, ranks: int, module: str, turns: str) -> Any:
        if ranks == 4:
            raise KeyboardInterrupt
        return found[ranks - 1]

    monkeypatch.setattr(jobs, "start", start)
    assert main(["bench", "sync"]) == 130
    out, err = capsys.readouterr()
    assert len(re.findall(r"^ +[12] +(?:64|2048) ", out, re.MULTILINE)) == 4
    assert err.endswith("interrupted; the figures are of what was measured before\n")


# ---- The docs --------------------------------------------------------------------------------------------------------


def test_the_script_of_the_docs_trains_alike_on_any_number_of_ranks(mpirun: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "synchronized.md").read_text()
    (script, *_) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (shown,) = re.findall(r"```text\n(epoch 10.*?)```", text, re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    for ranks in (1, 2):
        result = on_ranks(mpirun, ranks, "train.py", cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert len(result.stdout.splitlines()) == 11
        assert result.stdout.endswith(shown)
    assert arraybn.load(tmp_path / "model.npz")["1.num_batches_tracked"] == 240


def test_a_rank_without_samples_takes_part_as_the_docs_say() -> None:
    x = np.random.default_rng(0).standard_normal((4, 3))

    def work(comm: ThreadComm) -> Any:
        network = arraybn.network
        weights = [np.random.default_rng(seed) for seed in (1, 2)]
        layers = network.Linear(3, 5, rng=weights[0]), arraybn.BatchNorm1d(5), network.ReLU()
        net = arraybn.Sequential(*layers, network.Linear(5, 2, rng=weights[1]))
        arraybn.SyncBatchNorm.convert_sync_batchnorm(net, comm)
        mine = x if comm.rank == 0 else x[:0]
        y = net(mine)
        net.backward(y)
        arraybn.average_gradients(net, comm, weight=1)
        return len(y), [parameter.grad for parameter in net.parameters()]

    (four, ours), (none, theirs) = ThreadComm.run(2, work)
    assert (four, none) == (4, 0)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)

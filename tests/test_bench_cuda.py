"""``python -m arraybn bench --device cuda``, on a device that is none: what it checks, times and says.

No test asserts a time that passed; the fake device has a clock of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_device
import ml_dtypes
import numpy as np
import pytest
from support.commands import as_installed
from support.gpu import cupy_here
from support.libraries import need

import arraybn
from arraybn import reference
from arraybn.__main__ import main
from arraybn.bench import cases, device, figure, jobs, report, worker
from arraybn.bench import gpu as command
from arraybn.bench import gpu_ranks as ranks
from arraybn.bench import gpu_session as session
from arraybn.bench import truth as check
from arraybn.bench.cases import Case
from arraybn.bench.gpu_session import Budget, gpu_worker
from arraybn.bench.process import PeerError, first_line
from arraybn.bench.timing import Cell, Result
from arraybn.bench.worker import GpuWork
from arraybn.commands import bench
from arraybn.testing.oracle import exact_batch_norm, worst

SMALL = ["--shapes", "6,5,4,3"]
OURS = ["fused", "split", "reference"]


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["--device", "cuda", *arguments], argparse.Namespace(command_line="the command"))


class Direct:
    """A worker in this process; what is asked and answered is pickled, as it would be."""

    def __init__(self, name: str) -> None:
        self.limit, self.failed, self.asked = 0.0, "", []
        self.work = GpuWork(getattr(fake_device, name))

    def ask(self, method: str, /, **question: Any) -> Any:
        self.asked.append((method, question.get("contestant")))
        question = pickle.loads(pickle.dumps(question))
        try:
            return pickle.loads(pickle.dumps(getattr(self.work, method)(**question)))
        except Exception as error:
            raise PeerError(first_line(error)) from error

    def answer(self) -> Any:
        return self.ask("start")

    def stop(self) -> None:
        self.failed = "stopped"


@pytest.fixture(autouse=True)
def an_installed_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for it finds it; nothing of it is used."""
    find = importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: "here" if name == "cupy" else find(name))
    monkeypatch.setattr(worker, "HOST_CALLS", 5)
    monkeypatch.setattr(worker, "LAUNCHES", 20)


def made(name: str = "FakeDevice", *arguments: str, make: Any = None, peers: str = "none") -> command.GpuBench:
    """A bench on that device, before it is run."""
    parsed_ = parsed("--peers", peers, "--repeats", "3", *(arguments or SMALL))
    found = command.GpuBench(parsed_, make=make or (lambda: Direct(name)), device=f"fake_device:{name}")
    found.plan.ranks = []
    return found


def measured(*args: Any, **kwargs: Any) -> command.GpuBench:
    """And after."""
    made_ = made(*args, **kwargs)
    made_.measure()
    return made_


# ---- The plan --------------------------------------------------------------------------------------------------------


def test_the_full_run_has_every_shape_dtype_and_layout_the_most_telling_first() -> None:
    found = command.plan(parsed())
    assert len(found.cases) == 30
    assert {case.shape for case in found.cases} == set(cases.RESNET)
    assert {(case.dtype, case.layout) for case in found.cases} == {
        (dtype, layout) for dtype in ("float32", "float16", "bfloat16") for layout in ("first", "last")
    }
    assert str(found.cases[0]) == "(32, 64, 112, 112) float32, channels-first"
    assert {case.operations for case in found.cases} == {("forward", "backward", "eval")}
    assert [case.shape for case in found.host] == [(64, 128), (1, 64, 8, 8), (32, 1024, 14, 14)]
    assert found.contestants[:3] == OURS
    assert found.ranks == list(ranks.SHAPES)


def test_options_choose_and_a_quick_run_is_smaller() -> None:
    line = "--shapes 8,4,5 8,4 --layout first last --dtype float16 --what backward"
    found = command.plan(parsed(*line.split()))
    assert [str(case) for case in found.cases] == [
        "(8, 4, 5) float16, channels-first",
        "(8, 4) float16",
        "(8, 4, 5) float16, channels-last",
    ]
    assert {case.operations for case in found.cases} == {("backward",)}
    assert (found.host, found.ranks) == ([], [])
    assert command.plan(parsed("--what", "layer")).cases == []
    quick = command.plan(parsed("--quick"))
    assert len(quick.cases) == 8
    assert set(quick.contestants) <= {"fused", "split", "torch", "native"}
    assert "masked" not in command.plan(parsed()).contestants
    assert "masked" in command.plan(parsed("--peers", "masked")).contestants
    assert command.GpuBench(parsed("--quick")).session.budget.total < session.TOTAL


def test_exact_mode_takes_part_where_it_is_asked_for() -> None:
    assert "exact" not in command.plan(parsed()).contestants
    assert command.plan(parsed("--peers", "exact")).contestants == ["fused", "split", "exact"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sync"], "--device cuda: expected no sync, because two MPI ranks are a part of it"),
        (["--ladder"], "--ladder: expected --device cpu"),
        (["--growth"], "--growth: expected --device cpu"),
        (["--set", "cache"], "--set: expected --device cpu"),
        (
            ["--peers", "tensorflow"],
            "--peers: expected some of reference, masked, exact, torch, jax, or none, on a GPU; got tensorflow",
        ),
        (["--peers", "none", "torch"], "--peers: expected none alone, or names without it; got none torch"),
    ],
)
def test_what_cannot_be_done_on_a_gpu_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--device", "cuda", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"bench: {message}")


def test_without_cupy_it_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--device", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(r'bench: --device cuda needs cupy:  pip install "arraybn\[cuda13\]", or cuda12', as_installed(err))


def test_without_a_gpu_it_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.GpuBench.__init__, "__defaults__", (lambda: Direct("NoDevice"), command.CUDA))
    assert main(["bench", "--device", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "bench: --device cuda: there is no GPU in this fake\n"


def test_the_process_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        if importlib.import_module("cupy").cuda.runtime.getDeviceCount():
            pytest.skip("there is a GPU")
    except Exception:  # no CuPy, or no driver
        assert main(["bench", "--device", "cuda"]) == 2
        assert re.match("bench: --device cuda: (cupy cannot be imported|CUDA finds no GPU)", capsys.readouterr().err)


# ---- The check -------------------------------------------------------------------------------------------------------


def problem(dtype: str, layout: str = "first", shape: tuple[int, ...] = (6, 5, 4, 3)) -> tuple[Case, Any, Any]:
    case, fake = Case(shape, layout, dtype), fake_device.FakeDevice()
    first, _ = check.make_problems(fake, case, 2, seed=1)
    return case, first, check.truths(np, first)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_the_truth_is_that_of_the_oracle(dtype: str, layout: str) -> None:
    case, first, truth = problem(dtype, layout)
    x, dy = (np.moveaxis(array, case.channel_axis, 1).astype("f8") for array in first[1:3])
    weight, bias, mean, var = (vector.astype("f8") for vector in first[4:8])
    exact = exact_batch_norm(x, weight, bias, dy, eps=first.eps)
    wanted = {"forward": [exact.y], "backward": [exact.dx, exact.dweight, exact.dbias]}
    column = (slice(None), None, None)
    xhat = (x - mean[column]) / np.sqrt(var[column] + first.eps)
    wanted["eval"] = [weight[column] * xhat + bias[column]]
    for what, arrays in wanted.items():
        for (name, values, units), right in zip(truth[what], arrays, strict=True):
            got, scale = (np.moveaxis(a, case.channel_axis, 1) if a.ndim > 1 else a for a in (values, units))
            assert worst(got, right, np.maximum(scale, abs(right)), "float64") < 64, (what, name)


def test_errors_are_counted_in_the_units_of_the_oracle() -> None:
    rng = np.random.default_rng(0)
    exact, units = rng.standard_normal(100), np.exp2(rng.uniform(-150, 150, 100))
    for dtype in ("float16", "bfloat16", "float32"):
        got = exact + 1e-3 * units
        assert math.isclose(check.worst(np, got, exact, units, dtype), worst(got, exact, units, dtype), rel_tol=1e-9)
    got[3] = np.nan
    assert check.worst(np, got, exact, units, "float32") == math.inf


def test_bfloat16_is_widened_and_narrowed_as_ml_dtypes_does() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype("f4")
    ties = np.ldexp(np.float32(1), -8) * np.arange(200, 900, dtype="f4")
    for array in (values, ties):
        wanted = array.astype(ml_dtypes.bfloat16)
        found = check.narrowed(np, array, "bfloat16")
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found.view("u2"), wanted.view("u2"))
        np.testing.assert_array_equal(check.widened(np, wanted, "f8"), wanted.astype("f8"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("ours", [True, False])
def test_right_results_pass_and_each_wrong_one_is_named(dtype: str, ours: bool) -> None:
    case, _, truth = problem(dtype, shape=(30, 6, 8, 8))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype

    def fault(change: Callable[[str, Any], Any], what: str = "backward") -> str:
        got = [change(name, exact) for name, exact, _ in truth[what]]
        got = [a.astype(kind if a.ndim > 1 else case.vectors) for a in got]
        return check.fault(np, got, truth[what], case, ours=ours)

    assert fault(lambda name, a: a) == fault(lambda name, a: a, "forward") == ""
    for wrong in ("dx", "dweight", "dbias"):
        found = fault(lambda name, a, wrong=wrong: a * 1.001 if name == wrong else a)
        assert found.startswith(f"wrong: {wrong} is "), found
    for bad in (np.nan, np.inf):
        holed = fault(lambda name, a, bad=bad: np.where(np.arange(a.size).reshape(a.shape) == a.size - 1, bad, a))
        assert holed.startswith("wrong: dx is off by inf")
    assert fault(lambda name, a: a[..., :-1]).startswith("wrong: dx has shape (30, 6, 8, 7), not (30, 6, 8, 8)")
    assert check.fault(np, [truth["backward"][0][1]], truth["backward"], case, ours=ours) == "wrong: 1 results, not 3"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_element_that_is_not_written_is_found(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Direct("FakeDevice")
    fake.ask("start")

    def affine(x: Any, mean: Any, a: Any, c: Any, out: Any = None) -> Any:
        if out is not None:
            out[:-1] = reference.affine(x, mean, a, c)[:-1]
        return reference.affine(x, mean, a, c) if out is None else out

    lazy = SimpleNamespace(**{**vars(fake_device.scaled(1.0)), "affine": affine})
    fake.work.device.kernels["split"] = lazy
    fake.ask("open", case=Case((6, 5, 4, 3), dtype=dtype), seed=1)
    faults = fake.ask("check", contestant="split")["faults"]
    assert faults["forward"].startswith("wrong: y is off by inf ulp")
    assert faults["backward"] == ""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_cuda_source_passes_the_check(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arrays are those of a CuPy, the real one or a fake, which has no name that CuPy has not."""
    with cupy_here("cuda") as cupy:

        class Device(fake_device.FakeDevice):
            xp, array, empty = cupy, staticmethod(cupy.asarray), staticmethod(cupy.empty)

        monkeypatch.setattr(fake_device, "OnCuPy", Device, raising=False)
        found = Direct("OnCuPy")
        found.ask("start")
        found.work.device.kernels = device.CudaDevice.kernels
        for layout in ("first", "last"):
            found.ask("open", case=Case((4, 6, 7, 5), layout, dtype), seed=1)
            for name in ("split", "reference", "masked", "exact")[: 3 if dtype == "float64" else 4]:
                assert set(found.ask("check", contestant=name)["faults"].values()) == {""}, (layout, name)
                assert (
                    found.ask("time_on_device", contestant=name, operation="backward", calls=2, hold=0.0)["seconds"] > 0
                )
        found.ask("close")
        found.ask("layer", contestant="arraybn", case=Case((4, 6), operations=("layer", "step")))
        assert found.ask("time_on_host", contestant="arraybn", operation="step")["done"] > 0


# ---- Data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_buffers_are_random_of_the_dtype_and_differ_from_set_to_set(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "BLOCK", 1000)  # so that it is repeated
    case = Case((4, 300, 5), "last", dtype)
    problems = check.make_problems(fake_device.FakeDevice(), case, 2, seed=1)
    assert [str(one.x.dtype) for one in problems] == [dtype] * 2
    assert {one.x.shape for one in problems} == {case.in_memory}
    arrays = [array.astype("f8") for one in problems for array in one[1:3]]
    for i, one in enumerate(arrays):
        assert 0.5 < one.std() < 2
        assert len(np.unique(one)) > 100
        assert not any((one == other).all() for other in arrays[:i])
    assert arrays[0].mean((0, 1)).std() > 0.5  # each channel has a mean of its own
    assert {str(vector.dtype) for vector in problems[0][4:8]} == {"float32"}
    other = check.make_problems(fake_device.FakeDevice(), case, 1, seed=2)[0].x
    assert not (other.astype("f8") == arrays[0]).all()


def test_the_sets_are_more_than_l2_can_hold() -> None:
    h200 = SimpleNamespace(together=200e6, describe=lambda: {"l2": 60 * 2**20})
    for case in command.plan(parsed()).cases:
        count = worker.problem_count(case, h200)
        assert count >= 4
        assert count * case.nbytes > max(200e6, 60 * 2**20)
        assert worker.memory_needed(case, count) < 20e9


def test_calls_go_over_the_sets_in_turn_and_keep_the_last_results() -> None:
    fake = Direct("FakeDevice")
    fake.ask("start")
    fake.ask("open", case=Case((6, 5, 4, 3)), seed=1)
    fake.ask("check", contestant="split")
    count, seen = worker.problem_count(Case((6, 5, 4, 3)), fake.work.device), []
    for i, calls in enumerate(fake.work.calls["split"]):
        calls.operations = {"forward": lambda i=i: (seen.append(i), i)[1]}
    fake.ask("time_on_device", contestant="split", operation="forward", calls=2 * count, hold=0.0)
    assert count > 4
    assert seen == [*range(count)] * 2
    assert fake.work.rotated is not None
    assert set(fake.work.rotated.kept) == set(range(count))


# ---- The whole command -----------------------------------------------------------------------------------------------


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("torch")
    line = ["--dtype", "float32", "bfloat16", "--layout", "first", "last", *SMALL, "--json", str(tmp_path / "f.json")]
    found = measured("FakeDevice", *line, "--plot", str(tmp_path / "f.png"), peers="torch")
    found.finish()
    out = capsys.readouterr().out
    assert not found.wrong()
    data = json.loads((tmp_path / "f.json").read_text())
    assert data["device"]["name"] == "a fake"
    assert math.isclose(data["ceilings"]["copy"]["gb_per_s"], fake_device.SPEED / 1e9, rel_tol=0.01)
    assert math.isclose(data["ceilings"]["l2_copy"]["gb_per_s"], 3 * fake_device.SPEED / 1e9, rel_tol=0.01)
    assert math.isclose(data["ceilings"]["launch"]["queued"], fake_device.LAUNCH)
    assert [(case["dtype"], case["layout"]) for case in data["table"]] == [
        ("float32", "first"),
        ("float32", "last"),
        ("bfloat16", "first"),
        ("bfloat16", "last"),
    ]
    for case in data["table"]:
        assert len(case["rows"]) == 4 * 3  # fused, split, PyTorch and its own
        for row in case["rows"]:
            assert (row["failed"], row["left"], len(row["seconds"])) == (None, None, 3)
    fractions = {row["row"]: row["of_one_read"] for row in data["table"][0]["rows"] if row["what"] == "backward"}
    wanted = {"arraybn fused": 0.9, "arraybn split": 0.6, "PyTorch": 0.4, "PyTorch native": 0.2}
    assert fractions == pytest.approx(wanted, rel=0.01)
    backward = [row for row in data["table"][0]["rows"] if row["what"] == "backward"]
    assert [row["of_two_reads"] / row["of_one_read"] for row in backward] == pytest.approx([5 / 3] * 4)
    assert backward[2]["backend"] == "Native"
    assert len(data["host"][0]["rows"]) == 4
    assert data["verdict"]["compared"] == len(data["verdict"]["fused_ahead"]) == 12
    assert (data["interrupted"], data["not_measured"], data["lost"]) == (False, [], [])
    assert re.search(r"arraybn fused +\d+ .*90%", out)
    assert re.search(r"PyTorch \(Native\) +\d+ .* 2\.25 .*40%", out)
    assert "fused 90%  2.25 ×" in out
    assert "fused slower than split: 0 of 12" in out
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_jax_is_timed_by_the_clock_of_the_host() -> None:
    jax = need("jax")
    x64 = jax.config.jax_enable_x64
    try:
        found = measured("FakeDevice", *SMALL, "--dtype", "bfloat16", "--what", "forward", "backward", peers="jax")
    finally:
        jax.config.update("jax_enable_x64", x64)
    cells = [cell for cell in found.table[0].cells if cell.row == "JAX"]
    assert [(cell.failed, cell.backend, cell.clock, len(cell.seconds)) for cell in cells] == [
        ("", "XLA", "host", 3)
    ] * 2
    assert "by the host's clock" in report.gpu_block(found.table[0], found.speed)


def test_a_wrong_contestant_of_ours_is_not_timed_and_the_status_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(
        command.GpuBench.__init__, "__defaults__", (lambda: Direct("WrongDevice"), "fake_device:FakeDevice")
    )
    line = [*SMALL, "--what", "forward", "--peers", "none", "--json", str(tmp_path / "f.json")]
    assert main(["bench", "--device", "cuda", *line]) == 1
    rows = json.loads((tmp_path / "f.json").read_text())["table"][0]["rows"]
    assert [(row["row"], bool(row["seconds"])) for row in rows] == [("arraybn fused", False), ("arraybn split", True)]
    assert re.fullmatch(r"wrong: y is off by [\d.e+]+ ulp of float32, 4 are allowed", rows[0]["failed"])
    assert rows[0]["median"] is rows[0]["gb_per_s"] is rows[0]["of_one_read"] is None
    assert re.search("arraybn fused +wrong: y is off by", capsys.readouterr().out)


def test_a_wrong_peer_is_shown_as_wrong_and_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = need("torch")
    monkeypatch.setattr(torch.nn.functional, "batch_norm", torch.nn.functional.batch_norm)
    found = measured("WrongPeerDevice", *SMALL, "--what", "forward", peers="torch")
    cells = {cell.row: cell for cell in found.table[0].cells}
    assert cells["PyTorch"].failed.startswith("wrong: y is off by")
    assert cells["PyTorch"].seconds == []
    assert len(cells["arraybn split"].seconds) == 3
    assert not found.wrong()


def test_a_pytorch_that_does_not_tell_its_backend_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(need("torch")._C, "_select_batch_norm_backend")
    found = measured("FakeDevice", *SMALL, "--what", "eval", peers="torch")
    cells = {cell.row: cell for cell in found.table[0].cells}
    assert (cells["PyTorch"].backend, len(cells["PyTorch"].seconds)) == ("backend unknown", 3)


def test_kernels_that_are_not_there_are_said_once_and_are_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    class Without(Direct):
        def answer(self) -> Any:
            found = super().answer()
            self.work.device.kernels = {**self.work.device.kernels, "fused": "cuda_of_tomorrow"}
            return found

    found = measured("FakeDevice", *SMALL, make=lambda: Without("FakeDevice"))
    assert {cell.row for cell in found.table[0].cells} == {"arraybn split"}
    assert not found.wrong()
    assert capsys.readouterr().out.count("arraybn fused: this arraybn has no kernels 'cuda_of_tomorrow'") == 1
    assert found.as_json()["absent"] == {"arraybn fused": "this arraybn has no kernels 'cuda_of_tomorrow'"}


def test_a_case_that_does_not_fit_is_skipped_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_device.FakeDevice, "free", 100_000)
    found = measured()
    assert re.fullmatch(r"skipped: needs about 0\.0 GB of the GPU, 0\.0 GB are free", found.table[0].skipped)
    assert found.as_json()["table"][0]["rows"] == []
    assert found.unmeasured()


# ---- Time, and what may go wrong -------------------------------------------------------------------------------------


def test_what_a_section_does_not_use_the_next_ones_have() -> None:
    now = [100.0]
    budget = Budget(200.0, clock=lambda: now[0])
    assert math.isclose(sum(session.SHARES.values()), 1.0)
    assert session.TOTAL < 9 * 60
    assert math.isclose(budget.left("ranks"), 200)
    now[0] += 10
    assert math.isclose(budget.left("start"), 200 * session.SHARES["start"] - 10)
    table = sum(session.SHARES[name] for name in ("start", "ceilings", "table"))
    assert math.isclose(budget.left("table"), 200 * table - 10)
    now[0] += 200
    assert budget.left("ranks") < 0


class Clock:
    """Goes on by a second with each question of a kind."""

    def __init__(self, kind: str, step: float = 1.0) -> None:
        self.now, self.kind, self.step = 0.0, kind, step

    def __call__(self) -> float:
        return self.now

    def made(self) -> Any:
        clock = self

        class Slow(Direct):
            def ask(self, method: str, /, **question: Any) -> Any:
                clock.now += clock.step * (method == clock.kind)
                return super().ask(method, **question)

        return lambda: Slow("FakeDevice")


def test_when_the_time_is_used_up_nothing_is_dropped_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock("check", 27.0)
    found = made("FakeDevice", *SMALL, "--dtype", "float32", "float16", "bfloat16", make=clock.made())
    found.session.budget = Budget(100.0, clock=clock)
    found.measure()
    found.finish()
    first, second, third = found.table
    assert all(len(cell.seconds) == 3 for cell in first.cells)
    assert [(cell.row, cell.left) for cell in second.cells if cell.operation == "eval"] == [
        ("arraybn fused", "no time left"),
        ("arraybn split", "no time left"),
    ]
    assert third.skipped == "no time left"
    assert found.host[0].cells  # it had time of its own
    out = capsys.readouterr().out
    assert len(found.unmeasured()) == 2
    assert all(f"\n  {line}" in out for line in found.unmeasured())


def test_a_peer_that_takes_too_long_to_prepare_is_left_out_of_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    need("torch")
    monkeypatch.setattr(session, "PEER_SHARE", 0.0)
    found = measured("FakeDevice", *SMALL, "--dtype", "float32", "float16", "--what", "eval", peers="torch")
    cells = {(result.case.dtype, cell.row): cell for result in found.table for cell in result.cells}
    assert cells["float32", "PyTorch"].seconds
    assert re.fullmatch(r"left out: preparing it has taken \d+ s", cells["float16", "PyTorch"].left)
    assert cells["float16", "arraybn split"].seconds
    assert not found.wrong()


def test_ctrl_c_prints_and_writes_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Stopped(Direct):
        def ask(self, method: str, /, **question: Any) -> Any:
            if method == "time_on_device" and self.asked.count((method, "fused")) == 2:
                raise KeyboardInterrupt
            return super().ask(method, **question)

    monkeypatch.setattr(command.GpuBench.__init__, "__defaults__", (lambda: Stopped("FakeDevice"), command.CUDA))
    files = ["--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "f.png")]
    line = [*SMALL, "--dtype", "float32", "float16", "--what", "forward", "--peers", "none", *files]
    assert main(["bench", "--device", "cuda", *line]) == 130
    data = json.loads((tmp_path / "f.json").read_text())
    assert data["interrupted"]
    assert [len(row["seconds"]) for row in data["table"][0]["rows"]] == [2, 2]
    assert data["not_measured"][0] == "table: (6, 5, 4, 3) float16, channels-first"
    out, err = capsys.readouterr()
    assert "arraybn fused" in out
    assert err == "interrupted; the figures are of what was measured before\n"
    assert (tmp_path / "f.png").exists()


def test_a_fault_of_the_device_costs_the_process_and_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Direct] = []

    def make() -> Direct:
        started.append(Direct("BrokenDevice"))
        return started[-1]

    found = measured("BrokenDevice", *SMALL, "--dtype", "float32", "float16", "bfloat16", "--what", "eval", make=make)
    cells = {(result.case.dtype, cell.row): cell for result in found.table for cell in result.cells}
    assert cells["float32", "arraybn split"].failed == "RuntimeError: an illegal memory access was encountered"
    assert all(len(cells[dtype, "arraybn fused"].seconds) >= 3 for dtype in ("float32", "float16", "bfloat16"))
    assert cells["bfloat16", "arraybn split"].left.startswith("left out: it cost the process 2 times")
    assert len(started) == 1 + session.CRASHES
    assert found.as_json()["lost"] == ["split", "split"]
    assert found.wrong()


def test_when_the_device_is_lost_for_good_the_rest_is_skipped_with_a_word() -> None:
    class Once(Direct):
        count = 0

        def answer(self) -> Any:
            Once.count += 1
            if Once.count > 1:
                raise PeerError("no device any more")
            return super().answer()

    line = [*SMALL, "--dtype", "float32", "float16", "--what", "eval", "layer"]
    found = measured("BrokenDevice", *line, make=lambda: Once("BrokenDevice"))
    assert found.table[1].skipped.endswith("the GPU could not be used: no device any more")
    assert found.host[0].skipped == found.table[1].skipped
    assert found.as_json()["table"][1]["skipped"]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Makes the process of a fake device."""
    path = [str(Path(__file__).parent), str(Path(arraybn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    return lambda name: lambda: gpu_worker(getattr(fake_device, name))


def test_a_process_that_ends_is_started_again_without_the_contestant(processes: Any) -> None:
    found = measured("CrashingDevice", *SMALL, "--what", "forward", "backward", make=processes("CrashingDevice"))
    cells = {(cell.row, cell.operation): cell for cell in found.table[0].cells}
    assert cells["arraybn fused", "backward"].failed == "ended early, exit status 3"
    assert len(cells["arraybn split", "backward"].seconds) >= 3
    assert found.session.crashes == ["fused"]


def test_a_kernel_that_never_ends_is_given_up(processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "TIME_LIMIT", 1.0)
    found = measured("HangingDevice", *SMALL, "--what", "forward", make=processes("HangingDevice"))
    cells = {cell.row: cell for cell in found.table[0].cells}
    assert cells["arraybn fused"].failed == "no answer within 1 s"
    assert len(cells["arraybn split"].seconds) == 3


# ---- Ranks -----------------------------------------------------------------------------------------------------------


def test_two_ranks_are_started_and_checked(processes: Any) -> None:
    need("mpi4py")
    if jobs.launcher() is None:
        pytest.skip("there is no mpirun")
    found = made()
    found.plan.ranks = [(6, 5, 4, 3)]
    result = found.measure_ranks()
    assert "skipped" not in result, result
    assert (result["ranks"], result["wrong"], result["left"]) == (2, "", [])
    assert [(row["scheme"], row["what"]) for row in result["rows"]] == [
        ("local", "layer"),
        ("local", "step"),
        ("synchronized", "layer"),
        ("synchronized", "step"),
    ]
    assert all(len(row["seconds"]) == command.RANK_TURNS for row in result["rows"])
    text = report.ranks_table(result)
    assert re.search(r"6×5×4×3 step +[\d.]+ +[\d.]+", text)


class One:
    """A communicator of one rank."""

    rank, size = 0, 1

    def bcast(self, value: Any) -> Any:
        return value

    def allgather(self, value: Any) -> list[Any]:
        return [value]


def test_a_wrong_synchronized_layer_is_said_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_device.FakeDevice()
    monkeypatch.setattr(ranks, "SyncBatchNorm", lambda c, process_group, eps: arraybn.BatchNorm2d(c, eps=eps))
    assert ranks.check(One(), fake) == ""
    monkeypatch.setattr(ranks, "SyncBatchNorm", lambda c, process_group, eps: arraybn.BatchNorm2d(c, eps=1.01 * eps))
    found = ranks.measure(One(), fake, 3, 60.0, [(6, 5, 4, 3)])
    assert re.fullmatch(r"rank 0: y is off by [\d.]+ ulp, 4 are allowed", found["wrong"])
    assert found["rows"] == []
    assert "WRONG: rank 0" in report.ranks_table({**found, "mpi": ""})
    made_ = made()
    made_.ranks = found
    assert made_.wrong()


def test_ranks_that_cannot_be_are_skipped_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made()
    monkeypatch.setattr(jobs, "launcher", lambda: None)
    assert "mpirun or mpi4py is missing" in found.measure_ranks()["skipped"]
    monkeypatch.setattr(jobs, "launcher", lambda: shutil.which("true"))
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name)
    assert "ended with status 0" in found.measure_ranks()["skipped"]
    found.session.budget = Budget(1.0)
    assert found.measure_ranks()["skipped"] == "1 s of the time are left, they need 15"
    assert "skipped: 1 s" in report.ranks_table(found.measure_ranks())
    monkeypatch.setenv("PMI_SIZE", "2")
    assert "this is a rank already" in found.measure_ranks()["skipped"]


# ---- The report and the picture --------------------------------------------------------------------------------------


@pytest.fixture
def made_up() -> list[Result]:
    """Figures of a device that does not exist, for every case."""
    rng, found = np.random.default_rng(0), []
    for case in cases.choose_gpu():
        result = Result(case)
        for what in case.operations:
            for name, share in {"arraybn fused": 0.88, "arraybn split": 0.62, "PyTorch": 0.3, "JAX": 0.2}.items():
                seconds = case.moved(what) / 4e12 / share * rng.uniform(0.98, 1.03, 9)
                result.cells.append(Cell("gpu", name, what, name, seconds=seconds.tolist()))
        found.append(result)
    return found


def test_the_picture_has_a_panel_for_each_dtype_and_layout(made_up: list[Result], tmp_path: Path) -> None:
    need("matplotlib")
    panels = figure.make_panels(made_up, cases.LARGE_OPERATIONS, lambda _, result: result.case.dtype)
    assert set(panels) == {(d, layout) for d in cases.GPU_DTYPES for layout in ("first", "last")}
    assert {len(lines) for lines in panels.values()} == {15}
    assert figure.draw_gpu(made_up, "made up", 4e12, tmp_path / "a.png")
    assert figure.draw_gpu(made_up[:3], "made up", 4e12, tmp_path / "b.png")
    image = need("matplotlib.image").imread(tmp_path / "a.png")
    assert image.shape[1] == 2080
    assert not figure.draw_gpu(made_up, "made up", None, tmp_path / "c.png")
    assert not figure.draw_gpu([], "made up", 4e12, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_the_summary_says_where_each_is_ahead(made_up: list[Result]) -> None:
    for cell in made_up[0].cells:  # there PyTorch is fastest, and fused slower than split
        share = {"PyTorch": 0.5, "arraybn fused": 0.7}.get(cell.row, 1.0)
        cell.seconds = [share * value * (2 if cell.row == "arraybn fused" else 1) for value in cell.seconds]
    for cell in made_up[0].cells:
        cell.seconds = [value / 2.5 for value in cell.seconds] if cell.row == "PyTorch" else cell.seconds
    found = report.verdict(made_up)
    first = [f"{what} {made_up[0].case}" for what in ("forward", "backward", "eval")]
    assert found["peer_ahead"] == first
    assert set(first).isdisjoint(found["fused_ahead"])
    assert len(found["fused_ahead"]) == 87
    text = report.summary(made_up, 4e12)
    assert "PyTorch's choice faster than both: 3 of 90: forward (32, 64, 112, 112) float32, channels-first" in text
    assert re.search(r"\(32, 256, 56, 56\) float32, channels-first +fused 8\d%  2\.\d+ ×", text)


def test_without_ceilings_nothing_is_said_of_floors(made_up: list[Result]) -> None:
    row = report.as_json(made_up[0], report.gpu_figures, None)["rows"][0]
    assert row["floor_one_read"] is row["of_one_read"] is row["of_two_reads"] is None
    assert row["gb_per_s"] > 0
    assert "floor" not in report.gpu_block(made_up[0], None).splitlines()[3]
    assert "ceilings: not measured: it broke" in report.gpu_head(
        {"name": "x", "memory": 1, "l2": 1}, {}, {"failed": "it broke"}, ""
    )


def test_the_floors_of_the_page_are_what_its_code_prints_and_what_the_bench_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(arraybn.__file__).parents[1] / "docs" / "gpu.md").read_text()
    ((code, shown),) = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == shown
    rows = [re.split(r" +", line) for line in shown.splitlines()[2:]]
    for row, (shape, what) in zip(rows, ((s, w) for s in cases.RESNET for w in ("forward", "backward")), strict=True):
        single, half = (report.floors(Case(shape, dtype=d), what, 4.3e12) for d in ("float32", "bfloat16"))
        assert [f"{1e6 * value:.1f}" for value in (*single, *half)] == row[-4:]  # type: ignore[operator]


def test_floors_follow_from_the_speed_of_the_copy() -> None:
    case = Case((32, 64, 112, 112))
    one, two = report.floors(case, "forward", 4.3e12)
    assert (round(one * 1e6, 1), round(two * 1e6, 1)) == (47.8, 71.7)  # type: ignore[operator]
    one, two = report.floors(case, "backward", 4.3e12)
    assert (round(one * 1e6, 1), round(two * 1e6, 1)) == (71.7, 119.5)  # type: ignore[operator]
    half = Case(case.shape, dtype="bfloat16")
    assert report.floors(half, "eval", 4.3e12)[0] == report.floors(half, "eval", 4.3e12)[1]
    assert half.nbytes * 2 == case.nbytes


# ---- The real device, as far as it can be without one ----------------------------------------------------------------


def test_every_name_of_cupy_that_is_used_exists() -> None:
    cupy = need("cupy")
    if "fake" in str(getattr(cupy, "__file__", "")):
        pytest.skip("not the real CuPy")
    for name in ("asarray", "empty", "RawModule", "get_default_memory_pool", "frexp", "ldexp", "from_dlpack"):
        assert callable(getattr(cupy, name)), name
    runtime = cupy.cuda.runtime
    names = "getDeviceCount getDeviceProperties driverGetVersion runtimeGetVersion memGetInfo memsetAsync memcpyAsync"
    for name in [*names.split(), "deviceSynchronize", "CUDARuntimeError", "memcpyDeviceToDevice"]:
        assert hasattr(runtime, name), name
    for kind, names in ((cupy.cuda.Stream, "use ptr"), (cupy.cuda.Event, "record synchronize done")):
        assert all(hasattr(kind, name) or name == "ptr" for name in names.split())
    assert callable(cupy.cuda.get_elapsed_time)
    assert callable(cupy.cuda.Device.use)


def test_the_real_device_has_every_method_and_its_kernels_compile(tmp_path: Path) -> None:
    real = device.CudaDevice
    methods = {name for name in dir(real) if not name.startswith("_") and callable(getattr(real, name))}
    assert len(methods) == 11
    assert methods <= set(dir(fake_device.FakeDevice))
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    (tmp_path / "k.cu").write_text(device.SOURCE)
    words = [nvcc, "-arch=sm_90", "-cubin", "-o", str(tmp_path / "k.cubin"), str(tmp_path / "k.cu")]
    subprocess.run(words, check=True, timeout=120)


class Standin:
    """As much of CuPy as the device uses; `log` has what was asked of it."""

    def __init__(self, gpus: int = 1) -> None:
        self.log, self.gpus, self.ms = [], gpus, 3.0
        self.asarray, self.empty, self.cuda = np.array, self._empty, self
        self.runtime = self
        self.CUDARuntimeError, self.memcpyDeviceToDevice = OSError, 3

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: (self.log.append((name, *args)), self)[1]

    def _empty(self, shape: Any, dtype: Any) -> Any:
        array = np.empty(shape, dtype)
        return SimpleNamespace(data=SimpleNamespace(ptr=array.ctypes.data), nbytes=array.nbytes)

    ptr, done = 77, True

    def getDeviceCount(self) -> int:  # noqa: N802
        if self.gpus < 0:
            raise OSError("no driver")
        return self.gpus

    def getDeviceProperties(self, index: int) -> Any:  # noqa: N802
        found = {"name": b"a stand-in", "totalGlobalMem": 2**35, "l2CacheSize": 2**20, "multiProcessorCount": 3}
        return {**found, "major": 9, "minor": 0}

    def get_function(self, name: str) -> Any:
        return lambda *args: self.log.append((name, *args))

    def get_elapsed_time(self, start: Any, stop: Any) -> float:
        return self.ms

    def memGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return 5, 10


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Standin:
    """In the place of CuPy."""
    found = Standin(2)
    monkeypatch.setitem(sys.modules, "cupy", found)  # type: ignore[arg-type]
    return found


def test_the_real_device_holds_the_stream_while_the_host_queues(standin: Standin) -> None:
    gpu = device.CudaDevice(3)
    assert ("Device", 1) in standin.log  # of two
    assert gpu.describe()["name"] == "a stand-in"
    assert gpu.free_memory() == 5
    standin.log.clear()
    seconds, late = gpu.timed(lambda: standin.log.append(("call",)), 3, hold=1.0)
    assert (seconds, late) == (1e-3, True)
    names = [entry[0] for entry in standin.log if entry[0] != "Event"]
    assert names == [
        "deviceSynchronize",
        "memsetAsync",
        "hold",
        "record",
        "call",
        "call",
        "call",
        "record",
        "synchronize",
    ]
    (held,) = [entry for entry in standin.log if entry[0] == "hold"]
    assert held[3][0] == device.LONGEST_HOLD * 1e9
    standin.log.clear()
    gpu.timed(gpu.nothing, 1, hold=0.0, flush=False)
    assert "memsetAsync" not in {entry[0] for entry in standin.log}
    gpu.copy(gpu.empty((4,), "f4"), source := gpu.empty((4,), "f4"))
    assert standin.log[-1][3:] == (16, 3, 77)
    assert standin.log[-1][2] == source.data.ptr
    torch = Standin()
    gpu.share_stream(torch)
    assert torch.log[0] == ("ExternalStream", 77)
    assert torch.log[1][0] == "set_stream"


@pytest.mark.parametrize(("gpus", "message"), [(0, "CUDA finds no GPU"), (-1, "CUDA finds no GPU: no driver")])
def test_no_gpu_is_said_plainly(standin: Standin, gpus: int, message: str) -> None:
    standin.gpus = gpus
    assert GpuWork().start() == {"none": message}


def test_a_cupy_that_cannot_be_imported_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    answer = as_installed(GpuWork().start()["none"])
    assert re.match(r'cupy cannot be imported .*pip install "arraybn\[cuda13\]", or cuda12', answer)

"""Files: what is saved is loaded to the bit, writing is all or nothing, and other files are refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arraybn


def model() -> arraybn.Module:
    net = arraybn.Sequential(arraybn.network.Linear(4, 3), arraybn.BatchNorm1d(3))
    net(np.random.default_rng(0).standard_normal((6, 4)).astype("f4"))
    return net


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_saved_model_loads_to_the_same_bits_with_its_versions(tmp_path: Path, as_path: Any) -> None:
    path = as_path(tmp_path / "net.npz")
    net, fresh = model(), model()
    fresh[1].reset_parameters()
    arraybn.save(net, path)
    state = arraybn.load(path)
    assert list(state) == list(net.state_dict())
    assert state._metadata == net.state_dict()._metadata
    fresh.load_state_dict(state)
    for name, value in net.state_dict().items():
        assert fresh.state_dict()[name].tobytes() == value.tobytes()
    x = np.ones((2, 4), "f4")
    assert fresh.eval()(x).tobytes() == net.eval()(x).tobytes()
    del state["1.num_batches_tracked"]
    with pytest.raises(RuntimeError, match="Missing key"):  # it is of version 2
        fresh.load_state_dict(state)
    with np.load(path) as archive:
        np.testing.assert_array_equal(archive["0.weight"], net[0].weight.data)


def test_any_mapping_of_arrays_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "any.npz"
    arraybn.save({"file": np.arange(3), "half": np.ones(2, "f2"), "list": [1.0]}, path)
    state = arraybn.load(path)
    assert {name: value.tolist() for name, value in state.items()} == {"file": [0, 1, 2], "half": [1, 1], "list": [1]}
    assert state["half"].dtype == np.float16


@pytest.mark.parametrize(
    ("state", "error", "text"),
    [
        (3, TypeError, "state: expected a Module or a mapping of names to arrays; got int"),
        ({"a": object()}, TypeError, "a: expected what numpy.asarray or DLPack takes; got object"),
        ({"a": ["text"]}, TypeError, "a: expected a dtype that .npz files have; got str"),
        ({"_metadata": np.ones(1)}, ValueError, "state: expected names other than '_metadata' as keys"),
        ({1: np.ones(1)}, ValueError, "state: expected names other than '_metadata' as keys; got 1"),
    ],
)
def test_what_cannot_be_saved_leaves_the_old_file(
    tmp_path: Path, state: Any, error: type[Exception], text: str
) -> None:
    path = tmp_path / "net.npz"
    arraybn.save(model(), path)
    before = path.read_bytes()
    with pytest.raises(error, match=text):
        arraybn.save(state, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.npz"
    arraybn.save(model(), path)
    before, calls = path.read_bytes(), []

    def full(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError("No space left on device")
        write(*arguments, **options)

    write = np.lib.format.write_array
    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(OSError, match="No space left"):
        arraybn.save(model(), path)
    assert len(calls) == 3
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.npz"
    arraybn.save(model(), path)
    whole = path.read_bytes()
    npy = tmp_path / "array.npy"
    np.save(npy, np.ones(3))
    for content in (b"", whole[:100], whole[:-30], b"text", pickle.dumps({"a": 1}), npy.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"net.npz: expected a state dict in an .npz archive; the file is damaged"):
            arraybn.load(path)
    np.savez(path, a=np.asarray([object()], dtype=object))
    with pytest.raises(ValueError, match="the file is damaged or another kind"):
        arraybn.load(path)
    for call in (lambda: arraybn.load("net.pt"), lambda: arraybn.save(model(), "net.pkl")):
        with pytest.raises(ValueError, match=r"path: expected a name that ends in .npz; got 'net.p"):
            call()
    with pytest.raises(FileNotFoundError):
        arraybn.load(tmp_path / "nothing.npz")

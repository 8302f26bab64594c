"""Files: a saved state is loaded to the bit, writing is all or nothing, and other files are refused."""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.libraries import need

import arraybn

SUFFIXES = [".npz", ".safetensors"]


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == ".safetensors":
        need("safetensors")
    return tmp_path / f"net{request.param}"


def model() -> arraybn.Module:
    net = arraybn.Sequential(arraybn.network.Linear(4, 3), arraybn.BatchNorm1d(3))
    net(np.random.default_rng(0).standard_normal((6, 4)).astype("f4"))
    return net


def small() -> arraybn.Module:
    layer = arraybn.BatchNorm1d(2)
    layer(np.random.default_rng(0).standard_normal((6, 2)).astype("f4"))
    return layer


def assert_same(a: Any, b: Any) -> None:
    assert list(a) == list(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


# ---- What is saved is loaded ----


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_saved_model_loads_to_the_same_bits_with_its_versions(path: Path, as_path: Any) -> None:
    path = as_path(path)
    net, fresh = model(), model()
    fresh[1].reset_parameters()
    arraybn.save(net, path)
    state = arraybn.load(path)
    assert_same(state, net.state_dict())
    assert (
        state._metadata == net.state_dict()._metadata == {"": {"version": 1}, "0": {"version": 1}, "1": {"version": 2}}
    )
    fresh.load_state_dict(state)
    assert_same(fresh.state_dict(), net.state_dict())
    x = np.ones((2, 4), "f4")
    assert fresh.eval()(x).tobytes() == net.eval()(x).tobytes()
    del state["1.num_batches_tracked"]
    with pytest.raises(RuntimeError, match="Missing key"):  # it is of version 2
        fresh.load_state_dict(state)


def test_numpy_reads_an_npz_of_ours(tmp_path: Path) -> None:
    net = model()
    arraybn.save(net, tmp_path / "net.npz")
    with np.load(tmp_path / "net.npz") as archive:
        np.testing.assert_array_equal(archive["0.weight"], net[0].weight.data)
        assert json.loads(str(archive["_metadata"]))["1"] == {"version": 2}


def test_every_kind_of_array_keeps_its_bits_and_place(path: Path) -> None:
    nan = np.asarray([0x7FC00001, 0xFFC12345, 0x80000000, 1], "u4").view("f4")  # payloads, −0 and a subnormal
    base = np.arange(24.0).reshape(2, 3, 4)
    state = {
        "z": nan, "file": np.arange(3), "half": np.ones(2, "f2"), "list": [1.0], "int": 3, "flag": np.asarray(True),
        "empty": np.zeros((0, 3)), "fortran": np.asfortranarray(base), "view": base[:, ::-2, 1], "bool": base > 3,
        "bytes": np.arange(5, dtype="u1"), "complex": np.asarray([1 + 2j], "c8"), "a/b": np.ones(1), "γ": np.ones(1),
    }  # fmt: skip
    arraybn.save(state, path)
    loaded = arraybn.load(path)
    assert_same(loaded, {name: np.asarray(value) for name, value in state.items()})
    assert loaded._metadata == {}
    assert all(array.flags.writeable for array in loaded.values())
    arraybn.save({}, path)
    assert arraybn.load(path) == {}


@pytest.mark.parametrize("order", [">f4", "<f4"])
def test_a_foreign_byte_order_keeps_its_values(path: Path, order: str) -> None:
    arraybn.save({"a": np.arange(3, dtype=order)}, path)
    np.testing.assert_array_equal(arraybn.load(path)["a"], np.arange(3, dtype="f4"))


def test_equal_states_make_equal_files(path: Path) -> None:
    arraybn.save(small(), path)
    before = path.read_bytes()
    arraybn.save(small().state_dict(), path)
    assert path.read_bytes() == before


def test_bfloat16_goes_into_safetensors_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("safetensors")
    bfloat16, path = need("ml_dtypes").bfloat16, tmp_path / "a.safetensors"
    state = {"a": np.asarray([1, -0.0, 3e38, np.nan]).astype(bfloat16), "b": np.ones((), bfloat16)}
    arraybn.save(state, path)
    assert_same(arraybn.load(path), state)
    with pytest.raises(
        TypeError, match=r"a: expected a dtype that .npz files have; got bfloat16. Save it as .safetens"
    ):
        arraybn.save(state, tmp_path / "a.npz")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"a: bfloat16 needs ml_dtypes: pip install \"\S+\[cpu\]\""):
        arraybn.load(path)


def test_without_the_library_the_command_to_install_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (lambda: arraybn.load(path), lambda: arraybn.save(model(), tmp_path / "b.safetensors")):
        with pytest.raises(ImportError, match=r"safetensors >= 0.8: pip install \"\S+\[demo\]\""):
            call()
    assert list(tmp_path.iterdir()) == [path]


# ---- PyTorch, both ways ----


def twins() -> tuple[Any, Any]:
    torch = need("torch")
    need("safetensors")
    theirs = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    return theirs, arraybn.Sequential(arraybn.network.Linear(4, 3), arraybn.BatchNorm1d(3))


def predictions(theirs: Any, ours: Any) -> tuple[Any, Any]:
    x = np.random.default_rng(1).standard_normal((5, 4)).astype("f4")
    torch = need("torch")
    with torch.no_grad():
        return theirs.eval()(torch.from_numpy(x)).numpy(), ours.eval()(x)


def test_a_state_dict_from_pytorch_loads(tmp_path: Path) -> None:
    theirs, ours = twins()
    torch, save_file = need("torch"), need("safetensors.torch").save_file
    theirs(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    save_file(theirs.state_dict(), tmp_path / "net.safetensors")
    state = arraybn.load(tmp_path / "net.safetensors")
    assert state._metadata == {}
    ours.load_state_dict(state)
    assert_same(ours.state_dict(), {name: value.numpy() for name, value in theirs.state_dict().items()})
    wanted, got = predictions(theirs, ours)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=8 * np.spacing(np.abs(wanted).max()))  # two roundings a layer
    arraybn.save(theirs.state_dict(), tmp_path / "net.npz")  # its order and its versions
    assert list(arraybn.load(tmp_path / "net.npz")) == list(theirs.state_dict())
    assert arraybn.load(tmp_path / "net.npz")._metadata == theirs.state_dict()._metadata


def test_pytorch_loads_a_file_of_ours(tmp_path: Path) -> None:
    theirs, ours = twins()
    ours(np.random.default_rng(0).standard_normal((8, 4)).astype("f4"))
    arraybn.save(ours, tmp_path / "net.safetensors")
    theirs.load_state_dict(need("safetensors.torch").load_file(tmp_path / "net.safetensors"))
    assert_same({name: value.numpy() for name, value in theirs.state_dict().items()}, ours.state_dict())
    wanted, got = predictions(theirs, ours)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=8 * np.spacing(np.abs(wanted).max()))


def test_bfloat16_goes_to_pytorch_and_back(tmp_path: Path) -> None:
    torch, path = need("torch"), tmp_path / "a.safetensors"
    need("safetensors")
    need("ml_dtypes")
    tensor = torch.linspace(-3, 3, 7).to(torch.bfloat16)
    arraybn.save({"a": tensor}, path)
    assert arraybn.load(path)["a"].dtype.name == "bfloat16"
    assert torch.equal(need("safetensors.torch").load_file(path)["a"], tensor)


# ---- What cannot be saved ----


BAD_STATES = [
    (3, TypeError, "state: expected a Module or a mapping of names to arrays; got int"),
    ({"a": object()}, TypeError, "a: expected what numpy.asarray or DLPack takes; got object"),
    ({"a": ["text"]}, TypeError, r"a: expected a dtype that \.\w+ files have; got str"),
    ({"a": np.zeros(2, "M8[s]")}, TypeError, r"a: expected a dtype that \.\w+ files have; got datetime64"),
    ({"a": np.zeros(2, "i4,f4")}, TypeError, r"a: expected a dtype that \.\w+ files have; got void"),
    ({"_metadata": np.ones(1)}, ValueError, "state: expected names other than '_metadata' and '__metadata__' as keys"),
    ({"__metadata__": np.ones(1)}, ValueError, "state: expected names other than '_metadata' and '__metadata__'"),
    ({1: np.ones(1)}, ValueError, "state: expected names other than .* as keys; got 1"),
    ({"": np.ones(1)}, ValueError, "state: expected names of 1 to 1000 printable characters"),
    ({"../a": np.ones(1)}, ValueError, "state: expected names of .* without .*'..' as a part; got '../a'"),
    ({"/a": np.ones(1)}, ValueError, "state: expected names of .* got '/a'"),
    ({"a\\b": np.ones(1)}, ValueError, "state: expected names of .* without a backslash"),
    ({"a\0b": np.ones(1)}, ValueError, "state: expected names of .* printable"),
    ({"\ud800": np.ones(1)}, ValueError, "state: expected names of .* printable"),
    ({"a" * 1001: np.ones(1)}, ValueError, "state: expected names of 1 to 1000"),
]


@pytest.mark.parametrize(("state", "error", "text"), BAD_STATES)
def test_what_cannot_be_saved_leaves_the_old_file(path: Path, state: Any, error: type[Exception], text: str) -> None:
    arraybn.save(model(), path)
    before = path.read_bytes()
    with pytest.raises(error, match=text):
        arraybn.save(state, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "versions", [3, {"a": 3}, {"a": {"version": "2"}}, {1: {"version": 2}}, {"a": {"version": True}}]
)
def test_versions_that_are_none_are_not_saved(path: Path, versions: Any) -> None:
    state = model().state_dict()
    state._metadata = versions
    with pytest.raises(TypeError, match="_metadata: expected whole numbers as versions, by module; got"):
        arraybn.save(state, path)
    assert not path.exists()


@pytest.mark.parametrize("dtype", ["c16", "g"])
def test_what_only_numpy_has_goes_into_npz_only(tmp_path: Path, dtype: str) -> None:
    need("safetensors")
    state = {"a": np.ones(2, dtype)}
    arraybn.save(state, tmp_path / "a.npz")
    assert_same(arraybn.load(tmp_path / "a.npz"), state)
    with pytest.raises(TypeError, match=r"a: expected a dtype that .safetensors files have; got"):
        arraybn.save(state, tmp_path / "a.safetensors")


def test_no_more_names_are_saved_than_are_loaded(path: Path) -> None:
    state = {f"{i:05}{'x' * 900}": np.zeros((), "u1") for i in range(5000)}
    with pytest.raises(ValueError, match=r"names"):
        arraybn.save(state, path)
    assert list(path.parent.iterdir()) == []
    state = {f"{i:05}": np.zeros((), "u1") for i in range(1000)}
    arraybn.save(state, path)
    assert_same(arraybn.load(path), state)


def test_paths_are_checked() -> None:
    for call in (lambda: arraybn.load("net.pt"), lambda: arraybn.save(model(), "net.pkl"), lambda: arraybn.load("npz")):
        with pytest.raises(ValueError, match=r"path: expected a name that ends in .npz or .safetensors; got 'n"):
            call()
    for wrong in (3, b"net.npz", None):
        with pytest.raises(TypeError, match=r"path: expected a str or a path; got"):
            arraybn.load(wrong)


# ---- Writing is all or nothing ----


def test_a_missing_folder_is_named(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there.net\.\w+'$"):
        arraybn.save(model(), path.parent / "there" / path.name)
    with pytest.raises(FileNotFoundError):
        arraybn.load(path)
    path.mkdir()
    with pytest.raises(ValueError, match="expected a file; got a folder or a device"):
        arraybn.load(path)
    with pytest.raises(OSError, match=path.name):
        arraybn.save(model(), path)
    assert list(path.parent.iterdir()) == [path]


FULL_DISK = """
import errno, resource, signal, sys, numpy, arraybn
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    arraybn.save({"a": numpy.ones(100), "b": numpy.ones(10_000)}, sys.argv[1])
except OSError as error:
    assert error.errno == errno.EFBIG and error.filename == sys.argv[1], repr(error)
    print("refused")
"""


def test_a_disk_that_is_full_leaves_the_old_file(path: Path) -> None:
    arraybn.save(small(), path)
    before = path.read_bytes()
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout == "refused\n"
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_stop_before_the_end_leaves_the_old_file(
    path: Path, step: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    arraybn.save(small(), path)
    before = path.read_bytes()

    def stop(*_: Any) -> None:
        written = [other for other in path.parent.iterdir() if other != path]
        assert len(written) == 1
        assert written[0].stat().st_size > len(before)
        raise error

    monkeypatch.setattr(os, step, stop)
    with pytest.raises(type(error)):
        arraybn.save(model(), path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    arraybn.save(model(), path)
    assert path.read_bytes() != before


def test_what_is_put_in_place_is_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    arraybn.save(small(), path)
    assert calls == ["fsync", "replace"]


def test_a_killed_process_leaves_the_old_file(path: Path) -> None:
    arraybn.save(small(), path)
    before = path.read_bytes()
    code = "import os, sys, arraybn; os.replace = lambda *_: os._exit(9); arraybn.save({'a': 1}, sys.argv[1])"
    assert subprocess.run([sys.executable, "-c", code, path], timeout=60, check=False).returncode == 9
    assert path.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="permissions and links are POSIX's")
def test_permissions_are_kept_and_links_followed(path: Path) -> None:
    mask = os.umask(0o027)
    try:
        arraybn.save(small(), path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        link = path.with_name(f"link{path.suffix}")
        link.symlink_to(path.name)
        arraybn.save({"a": np.ones(1)}, link)
    finally:
        os.umask(mask)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert_same(arraybn.load(path), {"a": np.ones(1)})
    assert_same(arraybn.load(link), {"a": np.ones(1)})
    assert len(list(path.parent.iterdir())) == 2


def test_readers_see_one_whole_file_while_others_write(path: Path) -> None:
    states = [{"a": np.full(1000, i), "b": np.full((1000, i + 1), i)} for i in range(2)]
    arraybn.save(states[0], path)
    stop, failures, seen = threading.Event(), [], set()

    def read() -> None:
        try:
            while not stop.is_set():
                state = arraybn.load(path)
                assert_same(state, states[int(state["a"][0])])
                seen.add(int(state["a"][0]))
        except BaseException as error:
            failures.append(error)

    def write() -> None:
        try:
            for i in range(60):
                arraybn.save(states[i % 2], path)
        except BaseException as error:
            failures.append(error)

    readers, writers = [[threading.Thread(target=work) for _ in range(2)] for work in (read, write)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert failures == []
    assert seen == {0, 1}
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_replaced_between_check_and_reading_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, path, other = need("safetensors"), tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    arraybn.save({"a": np.zeros(1)}, path)
    arraybn.save({"a": np.ones(1)}, other)
    damaged = bytearray(other.read_bytes())
    damaged[-1] ^= 1
    real, opened = library.safe_open, []

    def replaced(*arguments: Any, **options: Any) -> Any:
        if not opened:
            other.write_bytes(damaged)
            other.replace(path)
        opened.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(library, "safe_open", replaced)
    with pytest.raises(ValueError, match="SHA-256"):  # of the new file
        arraybn.load(path)


# ---- Damaged files ----


def refused(path: Path, text: str = "") -> None:
    """Assert that the file is refused, with an error that names the file and the format, and then says `text`."""
    with pytest.raises(ValueError, match="expected a whole state dict") as caught:
        arraybn.load(path)
    start = f"{path}: expected a whole state dict in the {path.suffix} format; got "
    assert str(caught.value).startswith(start)
    assert re.search(text, str(caught.value)[len(start) :]), str(caught.value)


def test_a_file_cut_at_any_byte_is_refused(path: Path) -> None:
    arraybn.save(small(), path)
    whole = path.read_bytes()
    for size in reversed(range(len(whole))):
        os.truncate(path, size)
        refused(path)
    path.write_bytes(whole)
    assert_same(arraybn.load(path), small().state_dict())


def test_a_file_with_bytes_appended_or_before_it_is_refused(path: Path) -> None:
    arraybn.save(small(), path)
    whole = path.read_bytes()
    for content in (whole + b"\0", whole + whole, b"\0" + whole, whole[:50] + b" " + whole[50:]):
        path.write_bytes(content)
        refused(path)


def test_a_file_with_any_byte_changed_is_refused(path: Path) -> None:
    arraybn.save(small(), path)
    whole = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for i, byte in enumerate(whole):
            for changed in (byte ^ 0xFF, byte ^ 1 << i % 8, byte ^ 0x20):
                file.seek(i)
                file.write(bytes([changed]))
                try:
                    arraybn.load(path)
                except ValueError:
                    continue
                pytest.fail(f"byte {i} of {len(whole)}, {byte:#x}, was changed to {changed:#x}, and the file loaded")
            file.seek(i)
            file.write(bytes([byte]))
    assert_same(arraybn.load(path), small().state_dict())


def without_checksum(path: Path) -> None:
    """Give the checksum in the file another name, so that the file has none."""
    path.write_bytes(path.read_bytes().replace(b"arraybn-sha256", b"arraybn-sha512"))


def test_a_file_of_ours_without_its_checksum_is_refused(path: Path) -> None:
    arraybn.save(small(), path)
    without_checksum(path)
    refused(path, "its checksum is missing. Copy it again, or save it again")


def test_a_foreign_npz_is_refused_where_its_own_checksums_see_it(tmp_path: Path) -> None:
    path = tmp_path / "net.npz"
    state = small().state_dict()
    np.savez(path, **state)
    assert_same(arraybn.load(path), state)
    whole = path.read_bytes()
    start = whole.index(np.asarray(state["running_var"]).tobytes())
    path.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
    refused(path, "CRC")
    for i, byte in enumerate(whole):  # anything may be refused, nothing may be wrong or raise another error
        with open(path, "r+b", buffering=0) as file:
            file.write(whole[:i] + bytes([byte ^ 1 << i % 8]))
        try:
            loaded = arraybn.load(path)
        except ValueError:
            continue
        for name in set(loaded) & set(state):
            assert loaded[name].tobytes() == state[name].tobytes()


# ---- Hostile files ----


def zipped(path: Path, members: list[tuple[str, bytes]], **options: Any) -> None:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)


def npy(array: Any = None, header: str | None = None, version: bytes = b"\x01\x00") -> bytes:
    """Return a .npy of `array`, or 16 bytes behind the declared `header`."""
    if header is not None:
        text = header.encode().ljust(117) + b"\n"
        length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
        return b"\x93NUMPY" + version + length + text + bytes(16)
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ones(2) if array is None else np.asarray(array))
    return file.getvalue()


def declares(descr: str, shape: str, **options: Any) -> bytes:
    return npy(header=f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}", **options)


BAD_MEMBERS = {
    "a huge shape": (declares("'<f8'", f"({2**61},)"), "declares float64"),
    "a huge product": (declares("'<f8'", f"({2**40}, {2**40})"), "declares float64"),
    "a large shape": (declares("'<f8'", f"({2**33},)"), "in 16 bytes are expected"),
    "a zero beside a huge number": (declares("'<f8'", f"(0, {2**62})"), "in 16 bytes are expected"),
    "too few": (declares("'<f8'", "(1,)"), "in 16 bytes are expected"),
    "a negative shape": (declares("'<f8'", "(-2, -1)"), "declares float64"),
    "no numbers in the shape": (declares("'<f8'", "('a',)"), "shape is not valid"),
    "objects": (declares("'|O'", "(2,)"), "declares object"),
    "objects inside": (declares("[('a', '|O'), ('b', '<i8')]", "(1,)"), "where numbers"),
    "fields": (declares("[('a', '<f4'), ('b', [('c', '<f4'), ('d', '<f8')])]", "(1,)"), "where numbers"),
    "subarrays": (declares("('<f8', (2,))", "(1,)"), "where numbers"),
    "dates": (declares("'<M8[s]'", "(2,)"), "where numbers"),
    "raw bytes": (declares("'|V16'", "(1,)"), "where numbers"),
    "text": (npy(["text"]), "where numbers are expected"),
    "version 3": (declares("'<f8'", "(2,)", version=b"\x03\x00"), "version"),
    "version 9": (declares("'<f8'", "(2,)", version=b"\x09\x00"), "version"),
    "code in the header": (npy(header="__import__('os').system('echo run')"), ""),
    "a deep header": (npy(header="(" * 8000), ""),
    "a large header": (npy(header="{" + "1," * 6000 + "}"), "large"),
    "a header of 4 GB": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"{" * 100, ""),
    "nothing": (b"", ""),
    "no npy": (b"text, and more than a magic number is long", "magic"),
    "a pickle": (pickle.dumps(np.ones(2)), "magic"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_a_hostile_member_is_refused(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, text = BAD_MEMBERS[case]
    zipped(tmp_path / "a.npz", [("fine.npy", npy()), ("a.npy", content)])
    refused(tmp_path / "a.npz", text)
    assert capfd.readouterr().out == ""


def test_a_good_member_made_in_the_same_way_loads(tmp_path: Path) -> None:
    for member in (npy(), declares("'<f8'", "(2,)"), declares("'>f8'", "(2,)", version=b"\x02\x00")):
        zipped(tmp_path / "a.npz", [("a.npy", member)])
        assert arraybn.load(tmp_path / "a.npz")["a"].shape == (2,)


def torch_archive(path: Path) -> None:
    zipped(path, [("net/data.pkl", pickle.dumps({"a": 1})), ("net/data/0", bytes(8))])


def encrypted(path: Path) -> None:
    zipped(path, [("a.npy", npy())])
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)


def patched(field: int, value: bytes, before: bytes = b"PK\1\2") -> Callable[[Path], None]:
    """Return an archive of two arrays with a field of the central directory (or another record) overwritten."""

    def make(path: Path) -> None:
        zipped(path, [("a.npy", npy()), ("b.npy", npy())])
        content = bytearray(path.read_bytes())
        start = content.rindex(before) + field
        content[start : start + len(value)] = value
        path.write_bytes(content)

    return make


def twice(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        zipped(path, [("a.npy", npy()), ("a.npy", npy())])


BAD_ARCHIVES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a PyTorch file": (torch_archive, "a PyTorch archive with a pickle, which could run code"),
    "a bomb": (
        lambda p: zipped(p, [("a.npy", npy(np.zeros(10**6)))], compression=zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "a bomb (lzma)": (
        lambda p: zipped(p, [("a.npy", npy(np.zeros(10**6)))], compression=zipfile.ZIP_LZMA),
        "compressed",
    ),
    "numpy.savez_compressed": (lambda p: np.savez_compressed(p, a=np.ones(2)), "Write it with numpy.savez"),
    "an encrypted member": (encrypted, "encrypted"),
    "two members of a name": (twice, "two members of one name"),
    "overlapping members": (patched(42, struct.pack("<I", 20)), "overlaps another member"),
    "the same member twice": (patched(42, struct.pack("<I", 0)), "overlaps another member"),
    "a member after the end": (patched(42, struct.pack("<I", 2**31)), "its members claim"),
    "more bytes than there are": (patched(20, struct.pack("<II", 2**31, 2**31)), "its members claim"),
    "compressed to the same size": (patched(10, struct.pack("<H", zipfile.ZIP_DEFLATED)), "is compressed"),
    "more bytes unpacked than packed": (patched(24, struct.pack("<I", 2**31)), "is compressed"),
    "a directory larger than the file": (patched(12, struct.pack("<I", 2**22), b"PK\5\6"), ""),
    "a huge directory": (patched(12, struct.pack("<I", 2**31), b"PK\5\6"), ""),
    "a directory before the file": (patched(16, struct.pack("<I", 2**31), b"PK\5\6"), ""),
    "something else": (lambda p: zipped(p, [("a.txt", b"text")]), "only arrays"),
    "a folder": (lambda p: zipped(p, [("a/", b"")]), "only arrays"),
    "a path upwards": (lambda p: zipped(p, [("../../a.npy", npy())]), r"'..' as a part; got '../../a'"),
    "a path from the root": (lambda p: zipped(p, [("/etc/a.npy", npy())]), "a / at the start"),
    "versions without a checksum": (lambda p: zipped(p, [("_metadata.npy", npy('{"": {"version": 2}}'))]), "checksum"),
    "versions that are numbers": (lambda p: zipped(p, [("_metadata.npy", npy())]), "expected names other than"),
    "too many members": (
        lambda p: zipped(p, [(f"{i:0>999}.npy", b"") for i in range(4100)]),
        "at most 4194304 are read",
    ),
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_a_hostile_archive_is_refused(case: str, tmp_path: Path) -> None:
    make, text = BAD_ARCHIVES[case]
    make(tmp_path / "a.npz")
    refused(tmp_path / "a.npz", text)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.npz"]


def sealed(header: str, data: bytes = b"") -> bytes:
    """Return a .safetensors file; @ in the header is replaced by the right checksum."""
    text = header.replace("@", "0" * 64).encode()
    content = struct.pack("<Q", len(text)) + text + data
    hole = 8 + header.index("@")
    digest = hashlib.sha256(content[:hole] + content[hole + 64 :]).hexdigest().encode()
    return content[:hole] + digest + content[hole + 64 :]


def entry(dtype: str = "F32", shape: str = "[1]", offsets: str = "[0,4]", more: str = "") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{more}}}'


def raw(header: str | bytes, data: bytes = bytes(4), length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


DEEP = ',"x":' + "[" * 10**5 + "]" * 10**5


def claims(ours: Any) -> bytes:
    """Return a file with a right checksum, as anyone can compute one, and `ours` in the metadata of arraybn."""
    text = json.dumps(json.dumps({"arraybn-sha256": "@", **ours}))
    return sealed(f'{{"__metadata__":{{"arraybn":{text}}},"a":{entry()}}}', bytes(4))


BAD_SAFETENSORS = {
    "nothing": (b"", "it has 0 bytes"),
    "a huge header length": (raw("{}", b"", 2**62), "it has 10 bytes and says that its header has 4611686018427387904"),
    "the hugest header length": (raw("{}", b"", 2**64 - 1), "says that its header has"),
    "a header of 5 MB": (raw(b" " * (5 << 20), b""), "at most 4194304 are read"),
    "a header that is not JSON": (raw("text"), "JSON"),
    "a header that is not UTF-8": (raw(b'{"\xff":1}'), ""),
    "a deep header": (raw("[" * 10**6), ""),
    "a deep header in an entry": (raw(f'{{"a":{entry(more=DEEP)}}}'), "recursion limit"),
    "a huge shape": (raw(f'{{"a":{entry(shape=f"[{2**62},4]")}}}'), "overflow"),
    "a large shape": (raw(f'{{"a":{entry(shape=f"[{2**33}]")}}}'), ""),
    "a zero beside a huge number": (raw(f'{{"a":{entry(shape=f"[0,{2**62}]", offsets="[0,0]")}}}', b""), ""),
    "a negative shape": (raw(f'{{"a":{entry(shape="[-1]")}}}'), ""),
    "too many dimensions": (raw(f'{{"a":{entry(shape="[" + ",".join("1" * 99) + "]")}}}'), "dimension"),
    "huge offsets": (raw(f'{{"a":{entry(shape=f"[{2**40}]", offsets=f"[0,{2**42}]")}}}'), ""),
    "offsets in reverse": (raw(f'{{"a":{entry(offsets="[4,0]")}}}'), ""),
    "an overlap": (raw(f'{{"a":{entry()},"b":{entry()}}}'), "offset"),
    "a hole": (raw(f'{{"a":{entry(offsets="[4,8]")}}}', bytes(8)), ""),
    "bytes at the end": (raw(f'{{"a":{entry()}}}', bytes(5)), "not fully covered"),
    "bytes missing": (raw(f'{{"a":{entry()}}}', bytes(3)), "not fully covered"),
    "two of a name": (raw(f'{{"a":{entry()},"a":{entry()}}}'), "two entries of one name"),
    "two of a name and other dtypes": (raw(f'{{"a":{entry()},"a":{entry("I32")}}}'), "two entries of one name"),
    "an unknown dtype": (raw(f'{{"a":{entry("F99")}}}'), "unknown variant"),
    "objects": (raw(f'{{"a":{entry("OBJECT")}}}'), "unknown variant"),
    "a path upwards": (raw(f'{{"../a":{entry()}}}'), "'..' as a part"),
    "numbers as metadata": (raw(f'{{"__metadata__":{{"a":1}},"a":{entry()}}}'), "JSON"),
    "our key without a checksum": (claims({"versions": {}, "order": ["a"]}).replace(b"sha256", b"sha265"), "missing"),
    "our key with something else": (raw(f'{{"__metadata__":{{"arraybn":"[]x"}},"a":{entry()}}}'), ""),
    "a name too many": (claims({"versions": {}, "order": ["a", "b"]}), ""),
    "a name too few": (claims({"versions": {}, "order": []}), "its list of names is not that of its arrays"),
    "no names": (claims({"versions": {}, "order": [1]}), ""),
    "versions of text": (claims({"versions": {"": {"version": "2"}}, "order": ["a"]}), "expected whole numbers"),
    "no versions": (claims({"order": ["a"]}), "versions"),
    "a pickle": (pickle.dumps({"a": 1}), "a pickle, which could run code"),
    "a .npy": (npy(), "a single array"),
    "an archive": (b"PK\3\4" + bytes(100), "a file that is not, or no longer, one"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_a_hostile_safetensors_file_is_refused(case: str, tmp_path: Path) -> None:
    need("safetensors")
    content, text = BAD_SAFETENSORS[case]
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(tmp_path / "a.safetensors", text)


def test_a_good_safetensors_file_made_in_the_same_way_loads(tmp_path: Path) -> None:
    need("safetensors")
    (tmp_path / "a.safetensors").write_bytes(raw(f'{{"__metadata__":{{"format":"pt"}},"a":{entry()}}}'))
    assert arraybn.load(tmp_path / "a.safetensors")["a"].tolist() == [0]
    (tmp_path / "a.safetensors").write_bytes(claims({"versions": {"": {"version": 2}}, "order": ["a"]}))
    assert arraybn.load(tmp_path / "a.safetensors")._metadata == {"": {"version": 2}}


class Canary:
    def __reduce__(self) -> Any:
        return (builtins.exec, ("raise SystemExit('code in a file was run')",))


def test_no_kind_of_pickle_is_run(path: Path) -> None:
    with pytest.raises(SystemExit):  # the control: the pickle does run
        pickle.loads(pickle.dumps(Canary()))
    path.write_bytes(pickle.dumps(Canary()))
    refused(path, "a pickle, which could run code")
    objects = np.asarray([Canary()], dtype=object)
    with open(path, "wb") as file:
        np.savez(file, a=objects)
    refused(path, "declares object" if path.suffix == ".npz" else "")
    with open(path, "wb") as file:
        np.save(file, objects)
    refused(path, r"a single array \(\.npy\)")


def test_a_torch_pt_file_is_refused(path: Path) -> None:
    torch = need("torch")
    torch.save({"a": torch.ones(2)}, path)
    refused(path, "a PyTorch archive with a pickle, which could run code")


def test_a_refused_file_leaves_the_module_as_it_was(path: Path) -> None:
    net = small()
    before = net.state_dict()
    arraybn.save(arraybn.BatchNorm1d(2), path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match="expected a whole state dict"):
        net.load_state_dict(arraybn.load(path))
    assert_same(net.state_dict(), before)
    arraybn.save(OrderedDict(before, running_var=np.ones(3)), path)
    with pytest.raises(RuntimeError, match="size mismatch for running_var"):
        net.load_state_dict(arraybn.load(path))
    assert_same(net.state_dict(), before)


# ---- Memory ----


PEAK = """
import re, sys, arraybn
if sys.argv[1].endswith("safetensors"):
    import safetensors.numpy

def high():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])

before = high()
for path in sys.argv[1:]:
    try:
        print(sum(array.nbytes for array in arraybn.load(path).values()) >> 20, end=" ")
    except ValueError:
        print("refused", end=" ")
print((high() - before) >> 10)
"""


CROWD = ',"x":[' + "[]," * 10**7 + "[]]"  # 30 MB, which take 600 as Python objects


def crowded() -> bytes:
    """Return an archive of 20 MB whose directory lists one member 400 000 times."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", npy())
    content = file.getvalue()
    start, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    entries = content[start:end] * 400_000
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(entries), start, 0)
    return content[:start] + entries + tail


def peak(*paths: Path) -> list[str]:
    """Return the output of a new process for each file, then the MiB that the process took in addition."""
    run = subprocess.run([sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, timeout=60, check=True)
    return run.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_good_file_takes_the_memory_of_its_arrays(path: Path) -> None:
    arraybn.save({str(i): np.ones(2**21) for i in range(4)}, path)  # 64 MiB
    loaded, taken = peak(path)
    assert loaded == "64"
    assert 60 <= int(taken) <= 64 + 16  # and not twice as much


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_hostile_files_take_little_memory(path: Path) -> None:
    paths = []
    cases = BAD_ARCHIVES if path.suffix == ".npz" else BAD_SAFETENSORS
    for number, case in enumerate(cases):
        paths.append(path.with_name(f"{number}{path.suffix}"))
        made = cases[case][0]
        made(paths[-1]) if callable(made) else paths[-1].write_bytes(made)
    for number, (content, _) in enumerate(BAD_MEMBERS.values() if path.suffix == ".npz" else []):
        paths.append(path.with_name(f"member{number}.npz"))
        zipped(paths[-1], [("a.npy", content)])
    paths.append(path)
    path.write_bytes(crowded() if path.suffix == ".npz" else raw(f'{{"a":{entry(more=CROWD)}}}'))
    *results, taken = peak(*paths)
    assert results == ["refused"] * len(paths)
    assert int(taken) <= 50

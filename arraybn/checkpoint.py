"""State dicts to and from files, ``.safetensors`` and ``.npz``, bit for bit. Never pickle: no code in a file is run.

A file that `save` wrote holds the SHA-256 of all its other bytes, in the metadata of a ``.safetensors`` file and in the
archive comment of an ``.npz`` file, so that `load` sees every changed bit. Everything that a file declares is compared
with the size of the file before memory is taken for it.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import io
import json
import math
import os
import re
import secrets
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._arrays.copies import as_numpy
from ._arrays.namespaces import class_name, dtype_name
from .modules import Module, StateDict

_LIMIT = 2**22  # bytes of names and shapes (some 20 000 arrays), which Python objects hold in up to 20 times as many
_SEAL = {".npz": rb"arraybn-sha256:([0-9a-f]{64})\Z", ".safetensors": rb'arraybn-sha256\\": \\"([0-9a-f]{64})'}
_BLANK = "0" * 64  # where the checksum goes once the rest is written
_SAFETENSORS_DTYPES = r"bool|u?int(8|16|32|64)|b?float16|float(32|64)|complex64"
_KINDS = {b"\x80": "a pickle, which could run code", b"\x93NUMPY": "a single array (.npy)", b"\x89HDF": "an HDF5 file"}


def save(state: Module | Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a module's parameters and buffers, or a state dict, to a file, which is complete or not there at all.

    Parameters
    ----------
    state : Module or mapping of str to array
        What is saved, from any namespace; values are brought to the host.
    path : str or path
        Ends in ``.safetensors`` or ``.npz``. A file that is there is replaced in one step, once the new one is complete
        and on the disk, which takes over its permissions. A symbolic link is followed.

    Raises
    ------
    TypeError
        `state` is neither, or a value is no array of numbers that the file format has.
    ValueError
        `path` has another ending, or a name is not one that a file can have.
    ImportError
        The safetensors library, which ``.safetensors`` files need, is not there.
    OSError
        The file cannot be written; one that was there is as before.

    Notes
    -----
    Equal states make equal files. Both formats keep the order of the names; bfloat16 needs ``.safetensors``. A process
    that is killed while it writes can leave a hidden file ``.….part`` behind, never a damaged one under `path`.

    Examples
    --------
    >>> import arraybn, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "layer.npz")
    >>> arraybn.save(arraybn.BatchNorm1d(3), path)
    >>> arraybn.BatchNorm1d(3).load_state_dict(arraybn.load(path))
    <All keys matched successfully>
    """
    path = _checked_path(path)
    if isinstance(state, Module):
        state = state.state_dict()
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a Module or a mapping of names to arrays; got {class_name(state)}")
    versions = _checked_versions(getattr(state, "_metadata", {}))
    arrays = {_checked_name(name): _as_saved(name, value, path.suffix) for name, value in state.items()}
    _replace(path, _write_npz if path.suffix == ".npz" else _write_safetensors, arrays, json.dumps(versions))


def load(path: str | os.PathLike[str]) -> StateDict:
    """The state dict in a file, as NumPy arrays, with the versions of the modules in `_metadata`.

    Parameters
    ----------
    path : str or path
        Ends in ``.safetensors`` (of `save`, PyTorch or anything else) or ``.npz`` (of `save` or ``numpy.savez``).

    Returns
    -------
    dict of str to numpy.ndarray
        For `Module.load_state_dict`. In a file that `save` did not write, `_metadata` is empty.

    Raises
    ------
    ValueError
        `path` has another ending, or the file is cut short, damaged, of another kind (a pickle, a PyTorch ``.pt``),
        compressed, or declares what it does not hold. Nothing in it was run.
    ImportError
        A library is not there: safetensors, or ml_dtypes for bfloat16.
    OSError
        The file cannot be read.

    Notes
    -----
    A file of `save` is refused if any bit of it has changed. Another's file has no such checksum: in a ``.safetensors``
    file a bit that flipped inside the numbers cannot be seen, in an ``.npz`` file it can. The memory taken is that of
    the arrays, which the file itself holds in full; names and shapes may take up 4 MiB of it.

    Examples
    --------
    >>> import arraybn, numpy, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "any.npz")
    >>> numpy.savez(path, weight=numpy.ones(2))
    >>> arraybn.load(path)["weight"]
    array([1., 1.])
    """
    path = _checked_path(path)
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: expected a file; got a folder or a device")
    with _Reader(path) as file:
        try:
            sealed = _is_sealed(file, path.suffix)
            state, versions = (_read_npz if path.suffix == ".npz" else _read_safetensors)(path, file)
            if versions and not sealed:
                raise ValueError("its checksum is missing. Copy it again, or save it again")
            state._metadata = _checked_versions(json.loads(versions or "{}"))
            return state
        except ImportError:
            raise
        except _ReplacedError:
            return load(path)
        except Exception as error:  # whatever the parsers of the two formats say about a file that is not right
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a place before the file's start
                raise
            raise ValueError(
                f"{path}: expected a whole state dict in the {path.suffix} format; got {_kind(file)}: {error}"
            ) from error


def _checked_path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"path: expected a str or a path; got {class_name(path)}")
    if (checked := Path(path)).suffix not in _SEAL:
        raise ValueError(f"path: expected a name that ends in .npz or .safetensors; got {os.fspath(path)!r}")
    return checked


def _checked_name(name: Any) -> str:
    """`name` if it can stand in both formats, and leads nowhere if someone unpacks the file."""
    if not isinstance(name, str) or name in ("_metadata", "__metadata__"):
        raise ValueError(f"state: expected names other than '_metadata' and '__metadata__' as keys; got {name!r}")
    parts = name.split("/")
    if not 0 < len(name) <= 1000 or not name.isprintable() or "\\" in name or not parts[0] or ".." in parts:
        raise ValueError(
            "state: expected names of 1 to 1000 printable characters, without a backslash, a / at the start or '..'"
            f" as a part; got {name[:80]!r}"
        )
    return name


def _checked_versions(versions: Any) -> OrderedDict[str, dict[str, int]]:
    """`versions` if it is what `_metadata` is: {path: {"version": whole number}}."""
    if not isinstance(versions, Mapping) or not all(
        isinstance(path, str) and isinstance(local, Mapping) and all(type(number) is int for number in local.values())
        for path, local in versions.items()
    ):
        raise TypeError(f"_metadata: expected whole numbers as versions, by module; got {str(versions)[:80]}")
    return OrderedDict((path, dict(local)) for path, local in versions.items())


def _as_saved(name: str, value: Any, suffix: str) -> Any:
    """`value` as a NumPy array that the format can hold."""
    array = as_numpy(name, value)
    if dtype_name(getattr(value, "dtype", array.dtype)) == "bfloat16" and array.dtype.name != "bfloat16":
        array = array.astype(_bfloat16(name))  # PyTorch's came as float32, which is exact
    dtype = array.dtype.name
    if not (array.dtype.kind in "biufc" if suffix == ".npz" else re.fullmatch(_SAFETENSORS_DTYPES, dtype)):
        remedy = ". Save it as .safetensors" if dtype == "bfloat16" else ""
        raise TypeError(f"{name}: expected a dtype that {suffix} files have; got {dtype}{remedy}")
    if suffix == ".npz":
        return array
    return np.asarray(array, order="C", dtype=array.dtype.newbyteorder("<"))


def _bfloat16(name: str) -> Any:
    try:
        return importlib.import_module("ml_dtypes").bfloat16
    except ImportError as error:
        raise ImportError(f'{name}: bfloat16 needs ml_dtypes: pip install "arraybn[cpu]"') from error


def _safetensors() -> Any:
    """The library, where it is one that reads without mapping the file into memory."""
    try:
        importlib.import_module("safetensors.numpy")
        importlib.import_module("safetensors").TensorSpec  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise ImportError('.safetensors files need safetensors >= 0.8: pip install "arraybn[demo]"') from error
    return importlib.import_module("safetensors")


def _replace(path: Path, write: Callable[..., None], *content: Any) -> None:
    """Have `write` make a file beside `path`, seal it, and put it in place of `path` in one step."""
    target = Path(os.path.realpath(path))  # through a symbolic link
    temporary = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        temporary.touch(exist_ok=False)
        mode = (target if target.exists() else temporary).stat().st_mode & 0o777  # a new file's is what umask leaves
        write(temporary, *content)
        with _Reader(temporary, "r+b") as file:
            hole, _ = _checksum(file, path.suffix)
            digest = _digest(file, hole)
            file.seek(hole)
            file.write(digest)
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # safetensors has made it 0o600
        os.replace(temporary, target)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _write_npz(temporary: Path, arrays: dict[str, Any], versions: str) -> None:
    with zipfile.ZipFile(temporary, "w") as archive:
        for name, array in {"_metadata": np.asarray(versions), **arrays}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        archive.comment = f"arraybn-sha256:{_BLANK}".encode()
        if sum(100 + len(name.encode()) for name in arrays) > _LIMIT:
            raise ValueError(f"state: expected names of {_LIMIT} bytes in all at most; got {len(arrays)} names")


def _write_safetensors(temporary: Path, arrays: dict[str, Any], versions: str) -> None:
    library = _safetensors()
    ours = {"arraybn-sha256": _BLANK, "versions": json.loads(versions), "order": list(arrays)}
    try:
        library.numpy.save_file(arrays, temporary, metadata={"arraybn": json.dumps(ours)})
    except library.SafetensorError as error:  # its OSErrors come as text
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error), str(temporary)) from error


class _Reader(io.FileIO):
    """A file that refuses to hand out much at once, so that no number in it can ask for more."""

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes."""
        if size is not None and size > _LIMIT:
            raise ValueError(f"it has {size} bytes of names and shapes in one piece, where at most {_LIMIT} are read")
        return super().read(-1 if size is None else size) or b""

    @property
    def size(self) -> int:
        """In bytes."""
        return os.fstat(self.fileno()).st_size


def _digest(file: _Reader, hole: int) -> bytes:
    """SHA-256 of all but the 64 bytes at `hole`, in hexadecimal."""
    digest = hashlib.sha256()
    for start, stop in ((0, hole), (hole + 64, file.size)):
        file.seek(start)
        while piece := file.read(min(2**18, stop - file.tell())):
            digest.update(piece)
    return digest.hexdigest().encode()


def _checksum(file: _Reader, suffix: str) -> tuple[int, bytes]:
    """Where the checksum stands, and what it is; (0, b"") in a file without one."""
    start = 8 if suffix == ".safetensors" else file.seek(max(0, file.size - 79))
    found = re.search(_SEAL[suffix], _header(file) if suffix == ".safetensors" else file.read())
    return (start + found.start(1), found[1]) if found else (0, b"")


def _is_sealed(file: _Reader, suffix: str) -> bool:
    """Whether there is a checksum, which then is right."""
    hole, digest = _checksum(file, suffix)
    if digest and _digest(file, hole) != digest:
        raise ValueError("its bytes are not those that were written (SHA-256). Copy it again, or save it again")
    return bool(digest)


def _header(file: _Reader) -> bytes:
    """The JSON text at the start of a .safetensors file."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > file.size - 8:
        raise ValueError(f"it has {file.size} bytes and says that its header has {length}")
    return file.read(length)


def _read_npz(path: Path, file: _Reader) -> tuple[StateDict, str]:
    """The arrays and the text about versions; that is empty where the file is not one of ours."""
    state, versions = StateDict(), ""
    with zipfile.ZipFile(file) as archive:
        _check_members(archive)
        for info in archive.infolist():
            name, array = info.filename.removesuffix(".npy"), _read_member(archive, info)
            if name == "_metadata" and array.dtype.kind == "U":
                versions = str(array)
            elif array.dtype.kind not in "biufc":
                raise ValueError(f"{name} holds {array.dtype}, where numbers are expected")
            else:
                state[_checked_name(name)] = array
    return state, versions


def _check_members(archive: zipfile.ZipFile) -> None:
    """Raise unless the members are what numpy.savez writes: uncompressed arrays, one after the other."""
    end, members = 0, archive.infolist()
    for info in sorted(members, key=lambda info: info.header_offset):
        if not info.filename.endswith(".npy"):
            raise ValueError(f"it has a member {info.filename[:80]!r}, where only arrays (.npy) are expected")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"{info.filename[:80]} is compressed. Write it with numpy.savez, not savez_compressed")
        if info.header_offset < end:
            raise ValueError(f"{info.filename[:80]} overlaps another member")
        end = info.header_offset + 30 + len(info.filename) + info.file_size  # 30 bytes and the name come before it
    if end > archive.start_dir:
        raise ValueError(f"its members claim {end} bytes, of which it has {archive.start_dir}")
    if len({info.filename for info in members}) != len(members):
        raise ValueError("it has two members of one name")


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """The array in a member, once its shape and dtype are seen to need as many bytes as the member has."""
    with archive.open(info) as member:
        if (version := np.lib.format.read_magic(member)) not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is of .npy version {version}, where (1, 0) or (2, 0) is expected")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        held = info.file_size - member.tell()
        if dtype.kind not in "biufcU" or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
            raise ValueError(f"{info.filename} declares {dtype} {shape}, where numbers in {held} bytes are expected")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _read_safetensors(path: Path, file: _Reader) -> tuple[StateDict, str]:
    """The arrays and the text about versions; that is empty where the file is not one of ours."""
    with _safetensors().safe_open(path, framework="np", backend="pread") as archive:
        if not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            raise _ReplacedError
        json.loads(_header(file), object_pairs_hook=_unique)  # of two entries the library takes the last
        ours = json.loads((archive.metadata() or {}).get("arraybn", "{}"))
        state = StateDict()
        for name in ours.get("order", archive.keys()):
            if archive.get_slice(name).get_dtype() == "BF16":
                _bfloat16(name)
            state[_checked_name(name)] = archive.get_tensor(name)
        if sorted(state) != sorted(archive.keys()):
            raise ValueError("its list of names is not that of its arrays")
    return state, json.dumps(ours["versions"]) if ours else ""


class _ReplacedError(Exception):
    """The file is not the one any more whose checksum was looked at."""


def _unique(pairs: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("it has two entries of one name")


def _kind(file: _Reader) -> str:
    """What the first bytes say that the file is."""
    file.seek(0)
    head = file.read(100)
    if b"/data.pkl" in head:
        return "a PyTorch archive with a pickle, which could run code"
    return next(
        (kind for magic, kind in _KINDS.items() if head.startswith(magic)), "a file that is not, or no longer, one"
    )

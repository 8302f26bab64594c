"""State dicts to and from files, ``.safetensors`` and ``.npz``, bit for bit. No pickle: no code in a file is run.

A file of `save` contains the SHA-256 of all its other bytes, in the metadata of a ``.safetensors`` file or the archive
comment of an ``.npz`` file, so that `load` detects every changed bit. Declared sizes are compared with the size of the
file before memory is allocated.
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
from ._install import requirement
from .modules import Module, StateDict

_LIMIT = 2**22  # bytes of names and shapes (some 20 000 arrays); as Python objects they need up to 20 times as many
_SEAL = {".npz": rb"arraybn-sha256:([0-9a-f]{64})\Z", ".safetensors": rb'arraybn-sha256\\": \\"([0-9a-f]{64})'}
_BLANK = "0" * 64  # the place of the checksum until all other bytes are written
_SAFETENSORS_DTYPES = r"bool|u?int(8|16|32|64)|b?float16|float(32|64)|complex64"
_KINDS = {b"\x80": "a pickle, which could run code", b"\x93NUMPY": "a single array (.npy)", b"\x89HDF": "an HDF5 file"}


def save(state: Module | Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a module's parameters and buffers, or a state dict, to a file, completely or not at all.

    Parameters
    ----------
    state : Module or mapping of str to array
        The state, with arrays of any namespace; they are copied to the host.
    path : str or path
        Ends in ``.safetensors`` or ``.npz``. An existing file is replaced in one step once the new file is complete and
        on the disk; the new file takes over the permissions. A symbolic link is followed.

    Raises
    ------
    TypeError
        `state` is no module and no mapping, or a value is no array of a dtype that the file format has.
    ValueError
        `path` has another ending, or the file format cannot have one of the names.
    ImportError
        The safetensors library, which ``.safetensors`` files need, is not installed.
    OSError
        The file cannot be written; an existing file is unchanged.

    Notes
    -----
    Equal states give equal files. Both formats keep the order of the names; bfloat16 needs ``.safetensors``. A process
    that is killed while writing can leave a hidden file ``.….part``, but never a damaged file at `path`.

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
    """Return the state dict in a file, as NumPy arrays, with the versions of the modules in `_metadata`.

    Parameters
    ----------
    path : str or path
        Ends in ``.safetensors`` (of `save`, PyTorch or another program) or ``.npz`` (of `save` or ``numpy.savez``).

    Returns
    -------
    dict of str to numpy.ndarray
        For `Module.load_state_dict`. `_metadata` is empty for a file that `save` did not write.

    Raises
    ------
    ValueError
        `path` has another ending, or the file is cut short, damaged, compressed, of another kind (a pickle, a PyTorch
        ``.pt``), or declares data that it does not have. Nothing in the file was run.
    ImportError
        A library is not installed: safetensors, or ml_dtypes for bfloat16.
    OSError
        The file cannot be read.

    Notes
    -----
    A file of `save` is refused if any bit has changed. Files of other programs have no checksum of all bytes: a flipped
    bit inside the numbers is detected in an ``.npz`` file, but not in a ``.safetensors`` file. The memory needed is
    that of the arrays; names and shapes may have up to 4 MiB in the file.

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
            _, written, checksum = _checksum(file, path.suffix)
            if written != checksum:
                raise ValueError("its bytes are not those that were written (SHA-256). Copy it again, or save it again")
            state, versions = (_read_npz if path.suffix == ".npz" else _read_safetensors)(path, file)
            if versions and not written:
                raise ValueError("its checksum is missing. Copy it again, or save it again")
            state._metadata = _checked_versions(json.loads(versions or "{}"))
            return state
        except ImportError:
            raise
        except _ReplacedError:
            return load(path)
        except Exception as error:  # the parsers of the two formats raise many types for a damaged file
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek before the file's start
                raise
            expected = f"expected a whole state dict in the {path.suffix} format"
            raise ValueError(f"{path}: {expected}; got {_kind(file)}: {error}") from error


def _checked_path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"path: expected a str or a path; got {class_name(path)}")
    if (checked := Path(path)).suffix not in _SEAL:
        raise ValueError(f"path: expected a name that ends in .npz or .safetensors; got {os.fspath(path)!r}")
    return checked


def _checked_name(name: Any) -> str:
    """Return `name` if both formats can have it, and unpacking the file writes nothing outside its folder."""
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
    """Return a copy of `versions` if it has the form of `_metadata`, {path: {"version": whole number}}."""
    if not isinstance(versions, Mapping) or not all(
        isinstance(path, str) and isinstance(local, Mapping) and all(type(number) is int for number in local.values())
        for path, local in versions.items()
    ):
        raise TypeError(f"_metadata: expected whole numbers as versions, by module; got {str(versions)[:80]}")
    return OrderedDict((path, dict(local)) for path, local in versions.items())


def _as_saved(name: str, value: Any, suffix: str) -> Any:
    """Return `value` as a NumPy array of a dtype that the file format has."""
    array = as_numpy(name, value)
    if dtype_name(getattr(value, "dtype", array.dtype)) == "bfloat16" and array.dtype.name != "bfloat16":
        array = array.astype(_bfloat16(name))  # as_numpy returns PyTorch's as float32, which is exact
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
        raise ImportError(f"{name}: bfloat16 needs ml_dtypes: pip install {requirement('cpu')}") from error


def _safetensors() -> Any:
    """Return the library, in a version that can read without mapping the file into memory."""
    try:
        importlib.import_module("safetensors.numpy")
        library = importlib.import_module("safetensors")
        library.TensorSpec  # noqa: B018
        return library
    except (ImportError, AttributeError) as error:
        raise ImportError(f".safetensors files need safetensors >= 0.8: pip install {requirement('demo')}") from error


def _replace(path: Path, write: Callable[..., None], *content: Any) -> None:
    """Call `write` for a file in the folder of `path`, add the checksum, and rename the file to `path`."""
    target = Path(os.path.realpath(path))  # through a symbolic link
    temporary = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        temporary.touch(exist_ok=False)
        mode = (target if target.exists() else temporary).stat().st_mode & 0o777  # umask sets that of a new file
        write(temporary, *content)
        with _Reader(temporary, "r+b") as file:
            place, _, checksum = _checksum(file, path.suffix)
            file.seek(place)
            file.write(checksum)
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # safetensors creates files with 0o600
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
    except library.SafetensorError as error:  # safetensors turns an OSError into text
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error), str(temporary)) from error


class _Reader(io.FileIO):
    """A file with a limit for one read, so that no number in a damaged file can demand much memory."""

    def read(self, size: int | None = -1) -> bytes:
        """Return at most `size` bytes."""
        if size is not None and size > _LIMIT:
            raise ValueError(f"it has {size} bytes of names and shapes in one piece, where at most {_LIMIT} are read")
        return super().read(-1 if size is None else size) or b""


def _checksum(file: _Reader, suffix: str) -> tuple[int, bytes, bytes]:
    """Return the place of the checksum, the checksum there, and the SHA-256 of all other bytes, b"" without one."""
    start = 8 if suffix == ".safetensors" else file.seek(max(0, _size(file) - 79))
    found = re.search(_SEAL[suffix], _header(file) if suffix == ".safetensors" else file.read())
    if found is None:
        return 0, b"", b""
    place, digest = start + found.start(1), hashlib.sha256()
    for begin, end in ((0, place), (place + 64, _size(file))):
        file.seek(begin)
        while piece := file.read(min(2**18, end - file.tell())):
            digest.update(piece)
    return place, found[1], digest.hexdigest().encode()


def _size(file: _Reader) -> int:
    return os.fstat(file.fileno()).st_size


def _header(file: _Reader) -> bytes:
    """Return the JSON text at the start of a .safetensors file."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > _size(file) - 8:
        raise ValueError(f"it has {_size(file)} bytes and says that its header has {length}")
    return file.read(length)


def _read_npz(path: Path, file: _Reader) -> tuple[StateDict, str]:
    """Return the arrays and the JSON text of the versions, which is empty if `save` did not write the file."""
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
    """Raise unless the members are like those of numpy.savez: uncompressed arrays, one after the other."""
    end, members = 0, archive.infolist()
    for info in sorted(members, key=lambda info: info.header_offset):
        if not info.filename.endswith(".npy"):
            raise ValueError(f"it has a member {info.filename[:80]!r}, where only arrays (.npy) are expected")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"{info.filename[:80]} is compressed. Write it with numpy.savez, not savez_compressed")
        if info.header_offset < end:
            raise ValueError(f"{info.filename[:80]} overlaps another member")
        end = info.header_offset + 30 + len(info.filename) + info.file_size  # 30 bytes and the name begin a member
    if end > archive.start_dir:
        raise ValueError(f"its members claim {end} bytes, of which it has {archive.start_dir}")
    if len({info.filename for info in members}) != len(members):
        raise ValueError("it has two members of one name")


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """Return the array in a member, after a check that its shape and dtype need as many bytes as the member has."""
    with archive.open(info) as member:
        if (version := np.lib.format.read_magic(member)) not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is of .npy version {version}, where (1, 0) or (2, 0) is expected")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        held = info.file_size - member.tell()
        if dtype.kind not in "biufcU" or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
            raise ValueError(f"{info.filename} declares {dtype} {shape}, where numbers in {held} bytes are expected")
        member.seek(0)
        return np.lib.format.read_array(member, allow_pickle=False)


def _read_safetensors(path: Path, file: _Reader) -> tuple[StateDict, str]:
    """Return the arrays and the JSON text of the versions, which is empty if `save` did not write the file."""
    with _safetensors().safe_open(path, framework="np", backend="pread") as archive:
        if not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            raise _ReplacedError
        json.loads(_header(file), object_pairs_hook=_unique)  # the library would take the last of two equal names
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
    """Another file has replaced the file whose checksum was checked."""


def _unique(pairs: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("it has two entries of one name")


def _kind(file: _Reader) -> str:
    """Return the kind of the file, according to its first bytes."""
    file.seek(0)
    head = file.read(100)
    if b"/data.pkl" in head:
        return "a PyTorch archive with a pickle, which could run code"
    kinds = [kind for magic, kind in _KINDS.items() if head.startswith(magic)]
    return kinds[0] if kinds else "a file that is not, or no longer, one"

"""State dicts to and from files: ``.npz`` archives, which ``numpy.load`` reads too. Never pickle."""

from __future__ import annotations

import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._arrays import as_numpy
from ._state import StateDict
from .modules import Module

_VERSIONS = "_metadata"  # the member that holds the versions of the modules, as JSON text


def save(state: Module | Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a module's parameters and buffers, or a state dict, to a file, which is complete or not there at all.

    Parameters
    ----------
    state : Module or mapping of str to array
        What is saved, from any namespace; values are brought to the host.
    path : str or path
        Ends in ``.npz``. A file that is there already is replaced once the new one is complete.

    Raises
    ------
    TypeError
        `state` is neither, or a value is no array of numbers that the file format has.
    ValueError
        `path` has another ending, or a name is the one that the file keeps for itself.
    OSError
        The file cannot be written; one that was there is as before.

    Examples
    --------
    >>> import arraybn, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "layer.npz")
    >>> arraybn.save(arraybn.BatchNorm1d(3), path)
    >>> arraybn.BatchNorm1d(3).load_state_dict(arraybn.load(path))
    <All keys matched successfully>
    """
    path = _npz(path)
    if isinstance(state, Module):
        state = state.state_dict()
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a Module or a mapping of names to arrays; got {type(state).__name__}")
    members = {_VERSIONS: np.asarray(json.dumps(getattr(state, "_metadata", {})))}
    for name, value in state.items():
        if not isinstance(name, str) or name == _VERSIONS:
            raise ValueError(f"state: expected names other than {_VERSIONS!r} as keys; got {name!r}")
        members[name] = as_numpy(name, value)
        if members[name].dtype.kind not in "biufc":
            raise TypeError(f"{name}: expected a dtype that .npz files have; got {members[name].dtype.name}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, array in members.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> StateDict:
    """The state dict in a file that `save` wrote, as NumPy arrays, with the versions of the modules in `_metadata`.

    Parameters
    ----------
    path : str or path
        Ends in ``.npz``.

    Returns
    -------
    dict of str to numpy.ndarray
        For `Module.load_state_dict`.

    Raises
    ------
    ValueError
        `path` has another ending, or the file is damaged or of another kind.
    OSError
        The file cannot be read.

    Examples
    --------
    See `save`.
    """
    path = _npz(path)
    state = StateDict()
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    state[name.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
        versions = json.loads(str(state.pop(_VERSIONS, "{}")))
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, MemoryError) as error:
        raise ValueError(
            f"{path}: expected a state dict in an .npz archive; the file is damaged or another kind"
        ) from error
    state._metadata = OrderedDict(versions)
    return state


def _npz(path: str | os.PathLike[str]) -> Path:
    if (checked := Path(path)).suffix != ".npz":
        raise ValueError(f"path: expected a name that ends in .npz; got {str(path)!r}")
    return checked

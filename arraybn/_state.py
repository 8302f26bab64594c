"""State dicts: the values of a tree of modules by path, out of it and back in, all or nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._arrays.copies import as_numpy, converted, copied
from ._arrays.devices import on_device_of
from ._arrays.namespaces import Array, array_namespace, class_name, device, dtype_name, is_array_api_obj
from ._checks import as_flag

if TYPE_CHECKING:
    from .modules import Module


class IncompatibleKeys(NamedTuple):
    """What ``load_state_dict(strict=False)`` could not match."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return f"IncompatibleKeys(missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys})"


if TYPE_CHECKING:

    class StateDict(OrderedDict[str, Any]):
        """An ordered dict of arrays that also carries the versions of the modules it came from, as in PyTorch."""

        _metadata: OrderedDict[str, dict[str, int]]
else:
    StateDict = OrderedDict  # which torch.load unpickles by default, unlike a class of ours


def as_buffer(name: str, value: Any, current: Any = None) -> Any:
    """`value` if a buffer can hold it (an array, an int, None), integers as int; otherwise a TypeError.

    A buffer that is an int stays one: PyTorch's habit is to assign a 0-d tensor.
    """
    if isinstance(current, int) and is_array_api_obj(value):
        return _count(name, value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        if value is not None and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: expected an integer of 64 bits; got {value}")
        return value
    if isinstance(value, np.integer):
        return int(value)
    if not is_array_api_obj(value):
        raise TypeError(f"cannot assign {type(value).__name__!r} to buffer {name!r} (array, int or None expected)")
    return value


def own_values(module: Module) -> dict[str, Any]:
    """The arrays and ints that belong to `module` itself: parameters' data, then buffers."""
    values = {name: None if p is None else p.data for name, p in module._parameters.items()}
    return {name: value for name, value in {**values, **module._buffers}.items() if value is not None}


def export(module: Module, prefix: str) -> StateDict:
    """`Module.state_dict`."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a string; got {prefix!r}")
    state = StateDict()
    state._metadata = OrderedDict()
    for path, child in module.named_modules(remove_duplicate=False):
        path = prefix + (f"{path}." if path else "")  # noqa: PLW2901
        state._metadata[path[:-1]] = {"version": child._version}
        values = own_values(child)
        like = next((value for value in values.values() if not isinstance(value, int)), None)
        for name, value in values.items():
            state[path + name] = _copy(value, like)
    return state


def _copy(value: Any, like: Array | None) -> Array:
    """A copy of an array; a count as a 0-d int64 beside `like`, or in NumPy where that has no int64."""
    if not isinstance(value, int):
        return copied(value)
    if like is not None:
        xp, where = array_namespace(like), device(like)
        if "int64" in xp.__array_namespace_info__().dtypes(device=where, kind="signed integer"):
            return xp.asarray(value, dtype=xp.int64, device=where)
    return np.asarray(value, dtype=np.int64)


def load(module: Module, state_dict: Mapping[str, Any], strict: bool) -> IncompatibleKeys:
    """`Module.load_state_dict`."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping of names to arrays; got {type(state_dict).__name__}")
    for key in state_dict:
        if not isinstance(key, str):
            raise TypeError(f"state_dict: expected names as keys; got {key!r}")
    strict, versions = as_flag("strict", strict), _versions(state_dict)
    given = OrderedDict(state_dict)  # the modules may change it to translate an old version
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    before = _snapshot(module.modules())
    try:
        for path, child in module.named_modules(remove_duplicate=False):
            prefix, version = (f"{path}." if path else ""), versions.get(path, {})
            child._load_from_state_dict(given, prefix, version, strict, missing, unexpected, errors)
        if strict:
            errors = _key_lines("Missing", missing) + _key_lines("Unexpected", unexpected) + errors
        if errors:
            raise RuntimeError(f"Error(s) in loading state_dict for {type(module).__name__}:\n\t" + "\n\t".join(errors))
    except BaseException:
        _restore(before)
        raise
    return IncompatibleKeys(missing, unexpected)


def _versions(state_dict: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The versions of the modules by path that `state_dict` carries, if any."""
    metadata = getattr(state_dict, "_metadata", None) or {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"state_dict._metadata: expected a mapping of paths to versions; got {metadata!r}")
    for path, local in metadata.items():
        if not isinstance(local, Mapping) or not isinstance(local.get("version"), int | None):
            raise TypeError(f"state_dict._metadata[{path!r}]: expected {{'version': an integer}}; got {local!r}")
    return metadata


def load_own(
    module: Module,
    given: Mapping[str, Any],
    prefix: str,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Take over from `given` what belongs to `module` itself; what does not fit goes into the three lists."""
    own = own_values(module)
    for name, value in own.items():
        if (key := prefix + name) not in given:
            missing.append(key)
        elif (loaded := _fitted(key, given[key], value, errors)) is None:
            continue
        elif name in module._parameters:
            module._parameters[name].data = loaded
        else:
            module._buffers[name] = loaded
    for key in given:
        if key.startswith(prefix):
            name, dot, _ = key[len(prefix) :].partition(".")
            if name not in (module._modules if dot else own):
                unexpected.append(key)


def _fitted(key: str, value: Any, current: Any, errors: list[str]) -> Any:
    """`value` as what `current` is, an int or an array of that home and dtype; wrong-sized: None, a line in errors."""
    shape = () if isinstance(current, int) else tuple(current.shape)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{key}: expected a plain array; got {class_name(value)}. Convert it with numpy.asarray")
    if not is_array_api_obj(value):
        value = as_numpy(key, value)
    if tuple(value.shape) != shape:
        errors.append(
            f"size mismatch for {key}: copying a param with shape {tuple(value.shape)} from checkpoint,"
            f" the shape in current model is {shape}."
        )
        return None
    if isinstance(current, int):
        return _count(key, value)
    if (name := dtype_name(value.dtype)).startswith(
        ("complex", "str", "bytes", "object", "void", "datetime", "timedelta")
    ):
        raise TypeError(f"{key}: expected real numbers; got {name}")
    return converted(key, value, array_namespace(current), device(current), current.dtype)


def _count(key: str, value: Array) -> int:
    """The 0-d `value` as a number of batches."""
    try:
        count = int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # complex, text, inf, a tensor without values
        count = -1
    with on_device_of(value):
        whole = 0 <= count < 2**63 and bool(value == count)
    if not whole:
        raise TypeError(f"{key}: expected a whole number of batches ≥ 0; got {value!r}")
    return count


def _key_lines(kind: str, keys: list[str]) -> list[str]:
    return [f"{kind} key(s) in state_dict: " + ", ".join(f'"{key}"' for key in keys) + ". "] if keys else []


def _snapshot(modules: Iterable[Module]) -> list[tuple[Module, dict[str, Any], list[tuple[Any, Array]]]]:
    """References, not copies: nothing is ever written into an array."""
    return [
        (module, dict(module._buffers), [(p, p.data) for p in module._parameters.values() if p is not None])
        for module in modules
    ]


def _restore(before: list[tuple[Module, dict[str, Any], list[tuple[Any, Array]]]]) -> None:
    for module, buffers, parameters in before:
        module._buffers.update(buffers)
        for parameter, data in parameters:
            parameter.data = data

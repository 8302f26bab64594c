"""Modules: parameters and buffers in a tree, with names, modes and state dicts, as in ``torch.nn``.

Values are replaced, never written into. A module remembers its latest forward for one backward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from . import _state
from ._arrays.copies import add_as, moved
from ._arrays.namespaces import Array, Namespace, check_dtype, is_array_api_obj
from ._checks import as_floating, as_integer, check_like

M = TypeVar("M", bound="Module")


class Parameter:
    """An array that is learned, and the gradient that has been added up for it.

    Parameters
    ----------
    data : array
        The values.

    Attributes
    ----------
    data : array
        Replaced by an optimizer's step.
    grad : array or None
        In the shape and dtype of `data`; None until a backward adds to it.

    Examples
    --------
    >>> import numpy, arraybn
    >>> arraybn.Parameter(numpy.ones(2))
    Parameter(array([1., 1.]))
    """

    __slots__ = ("data", "grad")

    def __init__(self, data: Array) -> None:
        self.data = data
        self.grad: Array | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            value = as_floating("data", value)
        elif name == "grad" and value is not None:
            check_like("grad", value, self.data, "data")
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Parameter({self.data!r})"

    def plus(self, gradient: Array) -> Array:
        """`grad` with `gradient`, of the shape of `data`, added to it, in the dtype of `data`."""
        check_like("gradient", gradient, self.data, "data")
        return add_as(self.grad, gradient, self.data.dtype)

    def accumulate(self, gradient: Array) -> None:
        """Make `plus(gradient)` the new `grad`."""
        self.grad = self.plus(gradient)


class Module:
    """A node of a network: parameters, buffers and child modules by name, a forward and a hand-written backward.

    Subclasses write `forward(x)`, which calls `_remember` with what the backward needs, and `backward(dy)`, which calls
    `_recall` for it, adds to the gradients of the parameters and returns the gradient by x.

    Examples
    --------
    >>> import numpy, arraybn
    >>> class Twice(arraybn.Module):
    ...     def forward(self, x):
    ...         return 2 * x
    >>> Twice()(numpy.ones(2))
    array([2., 2.])
    """

    _version: int = 1
    training: bool
    _parameters: dict[str, Any]  # Parameter or None
    _buffers: dict[str, Any]  # array, int or None
    _modules: dict[str, Any]  # Module or None
    _remembered: Any

    def __init__(self) -> None:
        for name in ("_parameters", "_buffers", "_modules"):
            object.__setattr__(self, name, {})
        object.__setattr__(self, "_remembered", None)
        object.__setattr__(self, "training", True)

    def forward(self, x: Array) -> Array:
        """The output for the input x."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, dy: Array) -> Array:
        """The gradient by the input of the latest forward, from the gradient dy by its output."""
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def extra_repr(self) -> str:
        """The arguments, as they show in the printed tree."""
        return ""

    def __call__(self, x: Array) -> Array:
        """`forward(x)`."""
        return self.forward(x)

    # ---- One forward, one backward ----

    def _remember(self, value: Any) -> None:
        object.__setattr__(self, "_remembered", value)

    def _recall(self) -> Any:
        """What the latest forward remembered; `_forget` it once the backward has succeeded."""
        if self._remembered is None:
            raise RuntimeError(
                f"{type(self).__name__}.backward: expected a forward before it, one for each backward;"
                " got none. To use one layer twice in a pass, call arraybn.batch_norm and batch_norm_backward"
            )
        return self._remembered

    def _forget(self) -> None:
        object.__setattr__(self, "_remembered", None)

    def _finish_backward(self, *gradients: tuple[Parameter | None, Array | None]) -> None:
        """Add to the gradients of the parameters, all or none if one does not fit, and forget the forward."""
        sums = [(p, p.plus(gradient)) for p, gradient in gradients if p is not None and gradient is not None]
        self._forget()
        for parameter, total in sums:
            parameter.grad = total

    def __getstate__(self) -> dict[str, Any]:
        """Tables of its own for a copy, and no remembered forward in a copy or a pickle."""
        tables = {name: dict(self.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")}
        return {**self.__dict__, **tables, "_remembered": None}

    # ---- Attributes: parameters, buffers and modules live in three dictionaries ----

    def __getattr__(self, name: str) -> Any:
        for table in ("_parameters", "_buffers", "_modules"):
            if name in (found := self.__dict__.get(table, {})):
                return found[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if "_modules" not in self.__dict__:
            if isinstance(value, Parameter | Module):
                raise AttributeError(f"cannot assign {name!r} before Module.__init__() call")
            object.__setattr__(self, name, value)
            return
        parameters, buffers, modules = self._parameters, self._buffers, self._modules
        if isinstance(value, Parameter):
            self._move_name(name, parameters, value)
        elif isinstance(value, Module) and name not in parameters:
            self._move_name(name, modules, value)
        elif name in parameters or name in modules:
            kind, table = ("Parameter", parameters) if name in parameters else ("Module", modules)
            if value is not None:
                raise TypeError(f"cannot assign {type(value).__name__!r} to {name!r} ({kind} or None expected)")
            table[name] = None
        elif name in buffers:
            buffers[name] = _state.as_buffer(name, value, buffers[name])
        else:
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        for table in (self._parameters, self._buffers, self._modules):
            if name in table:
                del table[name]
                return
        object.__delattr__(self, name)

    def _move_name(self, name: str, table: dict[str, Any], value: Any) -> None:
        for other in (self.__dict__, self._parameters, self._buffers, self._modules):
            if other is not table:
                other.pop(name, None)
        table[name] = value

    def _check_new_name(self, kind: str, name: str, table: dict[str, Any]) -> None:
        if not isinstance(name, str):
            raise TypeError(f"{kind} name should be a string. Got {type(name).__name__}")
        if not name or "." in name:
            raise KeyError(f"{kind} name can't {'contain a dot' if name else 'be empty string'}; got {name!r}")
        if hasattr(self, name) and name not in table:
            raise KeyError(f"attribute {name!r} already exists")

    def register_parameter(self, name: str, parameter: Parameter | None) -> None:
        """Add a parameter, or None to hold its place."""
        self._check_new_name("parameter", name, self._parameters)
        if parameter is not None and not isinstance(parameter, Parameter):
            raise TypeError(f"cannot assign {type(parameter).__name__!r} to {name!r} (Parameter or None expected)")
        self._parameters[name] = parameter

    def register_buffer(self, name: str, value: Array | int | None) -> None:
        """Add an array that is state but is not learned; an int, which a state dict holds as a 0-d int64; or None."""
        self._check_new_name("buffer", name, self._buffers)
        self._buffers[name] = _state.as_buffer(name, value)

    def add_module(self, name: str, module: Module | None) -> None:
        """Add a child module."""
        self._check_new_name("module", name, self._modules)
        if module is not None and not isinstance(module, Module):
            raise TypeError(f"{type(module).__name__} is not a Module subclass")
        self._modules[name] = module

    # ---- Walking the tree ----

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of each direct child, each module once."""
        seen: set[int] = set()
        for name, module in self._modules.items():
            if module is not None and id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def children(self) -> Iterator[Module]:
        """Each direct child, once."""
        return (module for _, module in self.named_children())

    def named_modules(
        self, memo: set[int] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """(path, module) of this module and all below it; each module once, unless told otherwise."""
        memo = set() if memo is None else memo
        if remove_duplicate:
            if id(self) in memo:
                return
            memo.add(id(self))
        yield prefix, self
        for name, module in self._modules.items():
            if module is not None:
                yield from module.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def modules(self) -> Iterator[Module]:
        """Each of this module and all below it, once."""
        return (module for _, module in self.named_modules())

    def _named_values(self, table: str, prefix: str, recurse: bool) -> Iterator[tuple[str, Any]]:
        seen = {id(None)}
        for path, module in self.named_modules(prefix=prefix) if recurse else [(prefix, self)]:
            for name, value in getattr(module, table).items():
                if id(value) not in seen:
                    if not isinstance(value, int):
                        seen.add(id(value))
                    yield f"{path}.{name}" if path else name, value

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Parameter]]:
        """(path, parameter), each parameter once."""
        return self._named_values("_parameters", prefix, recurse)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Each parameter, once."""
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Array | int]]:
        """(path, buffer), each array once."""
        return self._named_values("_buffers", prefix, recurse)

    def buffers(self, recurse: bool = True) -> Iterator[Array | int]:
        """Each buffer, arrays once."""
        return (buffer for _, buffer in self.named_buffers(recurse=recurse))

    def train(self: M, mode: bool = True) -> M:
        """Put this module and all below it in training mode (or, with False, in evaluation mode)."""
        if not isinstance(mode, bool):
            raise ValueError(f"training mode is expected to be boolean; got {mode!r}")
        self.training = mode
        for child in self.children():  # through their own train, which may be overridden to keep statistics frozen
            child.train(mode)
        return self

    def eval(self: M) -> M:
        """Put this module and all below it in evaluation mode."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Set the gradient of every parameter to None."""
        for parameter in self.parameters():
            parameter.grad = None

    def to(self: M, *, xp: Namespace | None = None, device: Any = None, dtype: Any = None) -> M:
        """Move every parameter, gradient and buffer, in place, drop the remembered forwards, and return this module.

        `xp` is a namespace such as numpy or torch; `device` and `dtype` are as it names them, a dtype also "float64".
        """
        modules, parameters = list(self.modules()), list(self.parameters())
        for module in modules:
            module._check_to(dtype)
        values = [(name, value) for name, p in self.named_parameters() for value in (p.data, p.grad)]
        values += self.named_buffers()
        new = {id(value): moved(name, value, xp, device, dtype) for name, value in values if is_array_api_obj(value)}
        check_dtype(dtype)  # where there is no array to move
        for module in modules:
            module._forget()
            for name, value in module._buffers.items():
                module._buffers[name] = new.get(id(value), value)
        for parameter in parameters:
            parameter.data, parameter.grad = new[id(parameter.data)], new.get(id(parameter.grad))
        return self

    def _check_to(self, dtype: Any) -> None:
        """Raise if this module cannot be of that dtype."""

    # ---- State dicts ----

    def state_dict(self, prefix: str = "") -> OrderedDict[str, Array]:
        """A copy of all parameters and buffers by path, with the versions of the modules in `_metadata`."""
        return _state.export(self, prefix)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> _state.IncompatibleKeys:
        """Take over the values of a state dict, converted to the namespace, device and dtype that this module has.

        The values of `state_dict` are anything that numpy.asarray or DLPack takes; it is left as it is. With `strict`,
        missing and unexpected keys are errors; they are returned otherwise. Raises a TypeError where a value is no real
        array, and one RuntimeError that lists every wrong key; then nothing has been loaded.
        """
        return _state.load(self, state_dict, strict)

    def _load_from_state_dict(
        self,
        state_dict: OrderedDict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load what is this module's own and not its children's; overridden to translate an old version.

        `state_dict` is the load's own copy, which may be changed.
        """
        _state.load_own(self, state_dict, prefix, missing_keys, unexpected_keys, error_msgs)

    def __repr__(self) -> str:
        lines = [f"({name}): {module!r}".replace("\n", "\n  ") for name, module in self._modules.items()]
        extra = self.extra_repr()
        if not lines:
            return f"{type(self).__name__}({extra})"
        return f"{type(self).__name__}(\n  " + "\n  ".join([extra] * bool(extra) + lines) + "\n)"


class Sequential(Module):
    """Modules one after the other; the backward goes through them in reverse.

    Parameters
    ----------
    *modules : Module
        Named "0", "1", …; or one mapping of names to modules.

    Examples
    --------
    >>> import arraybn
    >>> arraybn.Sequential(arraybn.BatchNorm1d(3), arraybn.BatchNorm1d(3, affine=False))
    Sequential(
      (0): BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
      (1): BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=False, track_running_stats=True)
    )
    """

    def __init__(self, *modules: Module | Mapping[str, Module]) -> None:
        super().__init__()
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            named = dict(modules[0])
        else:
            named = {str(index): module for index, module in enumerate(modules)}  # type: ignore[misc]
        for name, module in named.items():
            if module is None:
                raise TypeError("NoneType is not a Module subclass")
            self.add_module(name, module)

    def forward(self, x: Array) -> Array:
        """The output of the last module."""
        for module in self:
            x = module(x)
        return x

    def backward(self, dy: Array) -> Array:
        """The gradient by the input of the first module."""
        for module in reversed(list(self)):
            dy = module.backward(dy)
        return dy

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules.values())

    def __getitem__(self, index: int | slice) -> Module:
        if isinstance(index, slice):
            return type(self)(dict(list(self._modules.items())[index]))
        if not -len(self) <= as_integer("index", index) < len(self):
            raise IndexError(f"index: expected {-len(self)} … {len(self) - 1}, for {len(self)} modules; got {index}")
        return list(self)[index]

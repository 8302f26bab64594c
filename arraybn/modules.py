"""Modules: parameters and buffers in a tree, with names, modes and state dicts, as in ``torch.nn``.

A new value replaces an old one; no array is ever written into. A module remembers its latest forward for one backward.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from ._arrays.copies import add_as, as_numpy, converted, copied, moved
from ._arrays.devices import on_device_of
from ._arrays.namespaces import (
    Array,
    Namespace,
    Shaped,
    array_namespace,
    check_dtype,
    class_name,
    device,
    dtype_name,
    is_array_api_obj,
)
from ._checks import as_flag, as_floating, as_integer, check_like, check_values

M = TypeVar("M", bound="Module")
F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:

    class StateDict(OrderedDict[str, Any]):
        """An ordered dict of arrays that also carries the versions of the modules it came from, as in PyTorch."""

        _metadata: OrderedDict[str, dict[str, int]]
else:
    StateDict = OrderedDict  # torch.load unpickles an OrderedDict by default, and no class of ours


class IncompatibleKeys(NamedTuple):
    """The keys that ``load_state_dict(strict=False)`` could not match."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return f"IncompatibleKeys(missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys})"


_Operator: TypeAlias = Callable[["Parameter", Any], Array]


def _operators(function: Callable[[Any, Any], Any]) -> tuple[_Operator, _Operator]:
    """Return the methods for a Parameter on the left and on the right of an operator; their result is an array."""

    def left(self: Parameter, other: Any) -> Array:
        return function(self.data, other.data if isinstance(other, Parameter) else other)

    def right(self: Parameter, other: Any) -> Array:
        return function(other, self.data)

    return left, right


class Row(NamedTuple):
    """A row of an array, which becomes an array of its own when somebody asks for the row."""

    array: Array
    row: int


class Parameter:
    """An array that training changes, and its gradient.

    Operators, comparisons and indices work as with `data`, and so does numpy.asarray; their results are arrays. All
    else that an array can do, `data` does.

    Parameters
    ----------
    data : array
        The values.

    Attributes
    ----------
    data : array
        The values; the step of an optimizer replaces them.
    grad : array or None
        The sum of the gradients since the last `zero_grad`, in the shape and dtype of `data`; None before the first.
    terms : list of arrays or None
        In exact mode, arrays like `data`: the sum of the terms of all ranks, without rounding, is the gradient of the
        whole batch. `average_gradients(…, exact=True)` adds them. A new `grad` has none.

    Examples
    --------
    >>> import numpy, arraybn
    >>> arraybn.Parameter(numpy.ones(2))
    Parameter(array([1., 1.]))
    >>> arraybn.Parameter(numpy.ones(2)) + 1
    array([2., 2.])
    """

    __slots__ = ("_grad", "data", "terms")
    _grad: Array | Row | None
    terms: list[Array] | None

    def __init__(self, data: Array) -> None:
        self.data = data
        self.grad = None

    @property
    def grad(self) -> Array | None:
        """The sum of the gradients since the last `zero_grad`, in the shape and dtype of `data`; None before one."""
        if type(self._grad) is Row:
            self._grad = self._grad.array[self._grad.row]
        return self._grad

    @grad.setter
    def grad(self, gradient: Array | None) -> None:
        if gradient is not None:
            check_like("grad", gradient, self.data, "data")
        self._grad, self.terms = gradient, None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            value = as_floating("data", value)
        object.__setattr__(self, name, value)

    def __getstate__(self) -> tuple[None, dict[str, Array | None]]:
        """Return the attributes for a copy or a pickle."""
        return None, {"data": self.data, "grad": self.grad}

    def __repr__(self) -> str:
        return f"Parameter({self.data!r})"

    __add__, __radd__ = _operators(operator.add)
    __sub__, __rsub__ = _operators(operator.sub)
    __mul__, __rmul__ = _operators(operator.mul)
    __truediv__, __rtruediv__ = _operators(operator.truediv)
    __floordiv__, __rfloordiv__ = _operators(operator.floordiv)
    __mod__, __rmod__ = _operators(operator.mod)
    __pow__, __rpow__ = _operators(operator.pow)
    __matmul__, __rmatmul__ = _operators(operator.matmul)
    __lt__ = _operators(operator.lt)[0]
    __le__ = _operators(operator.le)[0]
    __gt__ = _operators(operator.gt)[0]
    __ge__ = _operators(operator.ge)[0]
    __eq__ = _operators(operator.eq)[0]
    __ne__ = _operators(operator.ne)[0]
    __hash__ = object.__hash__  # a Parameter is a key by identity, as in PyTorch

    def __neg__(self) -> Array:
        return -self.data

    def __pos__(self) -> Array:
        return +self.data

    def __abs__(self) -> Array:
        return abs(self.data)

    def __getitem__(self, index: Any) -> Array:
        return self.data[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("Parameter: expected a new array for .data, which is never written into; got an assignment")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Return `data` as a NumPy array; with copy=False, only memory of NumPy can be shared."""
        if copy is False and not isinstance(self.data, np.ndarray):
            raise ValueError(f"data: expected a NumPy array for copy=False; got {class_name(self.data)}. Use .data")
        return np.array(as_numpy("data", self.data), dtype=dtype, copy=copy)

    def __getattr__(self, name: str) -> Any:
        text = f"'Parameter' object has no attribute {name!r}"
        if name not in ("data", "grad") and not name.startswith("_"):
            text += f". Its array is .data: use .data.{name}" if hasattr(self.data, name) else ""
        raise AttributeError(text)

    def plus(self, gradient: Array) -> Array:
        """Return the sum of `grad` and `gradient`, in the shape and dtype of `data`."""
        check_like("gradient", gradient, self.data, "data")
        if type(gradient) is not np.ndarray:
            check_values("gradient", gradient)
        return add_as(self.grad, gradient, self.data.dtype)

    def plus_terms(self, terms: Iterable[Array] | None) -> list[Array] | None:
        """Return `terms` after those that are there; None where a gradient came without terms."""
        before = [] if self._grad is None else self.terms
        if terms is None or before is None:
            return None
        return [*before, *(add_as(None, term, self.data.dtype) for term in terms)]

    def accumulate(self, gradient: Array, terms: Iterable[Array] | None = None) -> None:
        """Add `gradient`, of the shape of `data`, to `grad`, and `terms` of the same shape to `terms`."""
        total, together = self.plus(gradient), self.plus_terms(terms)
        self.grad, self.terms = total, together


_inference_depth: ContextVar[int] = ContextVar("arraybn.inference_mode", default=0)


class inference_mode(ContextDecorator):  # noqa: N801 - used as a function, as in PyTorch
    """Let forwards remember nothing for a backward: a context (``with inference_mode():``) or a decorator.

    Results do not change, nor does the mode of a module: call `eval()` for running statistics. A backward after such a
    forward is the RuntimeError of a module that has had no forward.

    Raises
    ------
    TypeError
        As the decorator of a generator or a coroutine, whose body runs later: write the block inside.

    Notes
    -----
    The context belongs to the current thread or asyncio task; a new thread starts outside. A generator shares the
    context of its caller: leave the block before each ``yield``.

    References
    ----------
    ``torch.inference_mode``.

    Examples
    --------
    >>> import numpy, arraybn
    >>> layer = arraybn.BatchNorm1d(1).eval()
    >>> with arraybn.inference_mode():
    ...     y = layer(numpy.ones((2, 1)))
    >>> layer.backward(numpy.ones((2, 1)))
    Traceback (most recent call last):
    RuntimeError: BatchNorm1d.backward: expected a forward before it, ...
    """

    def __enter__(self) -> None:
        _inference_depth.set(_inference_depth.get() + 1)  # a depth, because contexts of generators may cross

    def __exit__(self, *error: object) -> None:
        _inference_depth.set(_inference_depth.get() - 1)

    def __call__(self, function: F) -> F:
        """Return a function that does the same inside this context."""
        if (
            inspect.isgeneratorfunction(function)
            or inspect.iscoroutinefunction(function)
            or (inspect.isasyncgenfunction(function))
        ):
            name = getattr(function, "__name__", function)
            raise TypeError(f"inference_mode: expected a plain function; got {name}. Write the block inside its body")
        return super().__call__(function)


class Module:
    """A node of a network: parameters, buffers and child modules by name, a forward and a hand-written backward.

    Subclasses write `forward(x)`, which saves the values for the backward with `_remember`, and `backward(dy)`, which
    gets these values from `_recall`, adds to the gradients of the parameters and returns the gradient by x.

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
        """Return the output for the input x."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, dy: Array) -> Array:
        """Return the gradient by the input of the latest forward, from the gradient dy by its output."""
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def extra_repr(self) -> str:
        """Return the arguments, as the printed tree shows them."""
        return ""

    def __call__(self, x: Shaped) -> Array:
        """Return `forward(x)`."""
        return self.forward(x)

    # ---- One forward, one backward ----

    def _remember(self, value: Any) -> None:
        object.__setattr__(self, "_remembered", None if _inference_depth.get() else value)

    def _recall(self) -> Any:
        """Return the value of the latest `_remember`; call `_forget` once the backward has succeeded."""
        if self._remembered is None:
            raise RuntimeError(
                f"{type(self).__name__}.backward: expected a forward before it, one for each backward;"
                " got none. To use one layer twice in a pass, call arraybn.batch_norm and batch_norm_backward"
                + (". In inference_mode() forwards remember nothing" if _inference_depth.get() else "")
            )
        return self._remembered

    def _forget(self) -> None:
        object.__setattr__(self, "_remembered", None)

    def _finish_backward(
        self, *gradients: tuple[Parameter | None, Array | None], terms: Sequence[Iterable[Array] | None] = ()
    ) -> None:
        """Add to the gradients of the parameters, all or none if one does not fit, and forget the forward."""
        sums = [
            (p, p.plus(gradient), p.plus_terms(own))
            for (p, gradient), own in itertools.zip_longest(gradients, terms)
            if p is not None and gradient is not None
        ]
        self._forget()
        for parameter, total, together in sums:
            parameter.grad, parameter.terms = total, together

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a copy or a pickle: new tables, so that a copy shares none, and no forward."""
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
            buffers[name] = _as_buffer(name, value, buffers[name])
        else:
            object.__setattr__(self, name, value)

    def __dir__(self) -> list[str]:
        own = (name for table in (self._parameters, self._buffers, self._modules) for name in table)
        return sorted({*super().__dir__(), *(name for name in own if name.isidentifier())})

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
        """Add state that is not trained: an array, an int (0-d int64 in a state dict) or None."""
        self._check_new_name("buffer", name, self._buffers)
        self._buffers[name] = _as_buffer(name, value)

    def add_module(self, name: str, module: Module | None) -> None:
        """Add a child module."""
        self._check_new_name("module", name, self._modules)
        if module is not None and not isinstance(module, Module):
            raise TypeError(f"{type(module).__name__} is not a Module subclass")
        self._modules[name] = module

    # ---- Walking the tree ----

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Yield (name, module) of each direct child, each module once."""
        seen: set[int] = set()
        for name, module in self._modules.items():
            if module is not None and id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def children(self) -> Iterator[Module]:
        """Yield each direct child, once."""
        return (module for _, module in self.named_children())

    def named_modules(
        self, memo: set[int] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """Yield (path, module) of this module and all below it; with `remove_duplicate`, each module once."""
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
        """Yield this module and all below it, each once."""
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
        """Yield (path, parameter), each parameter once."""
        return self._named_values("_parameters", prefix, recurse)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield each parameter, once."""
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Array | int]]:
        """Yield (path, buffer), each array once."""
        return self._named_values("_buffers", prefix, recurse)

    def buffers(self, recurse: bool = True) -> Iterator[Array | int]:
        """Yield each buffer, arrays once."""
        return (buffer for _, buffer in self.named_buffers(recurse=recurse))

    def train(self: M, mode: bool = True) -> M:
        """Put this module and all below it in training mode (or, with False, in evaluation mode)."""
        if not isinstance(mode, bool):
            raise ValueError(f"training mode is expected to be boolean; got {mode!r}")
        self.training = mode
        for child in self.children():  # by their own train: a subclass may override it to keep statistics frozen
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
        """Move every parameter, gradient and buffer, in place, forget the latest forwards, and return this module.

        `xp` is a namespace such as numpy or torch; `device` and `dtype` are those of this namespace. A dtype can also
        be a name such as "float64".
        """
        modules, parameters = list(self.modules()), list(self.parameters())
        for module in modules:
            module._check_to(dtype)
        values = [(name, value) for name, p in self.named_parameters() for value in (p.data, p.grad)]
        values += self.named_buffers()
        new = {id(value): moved(name, value, xp, device, dtype) for name, value in values if is_array_api_obj(value)}
        check_dtype(dtype)  # in a network without arrays nothing has checked `dtype`
        for module in modules:
            module._forget()
            for name, value in module._buffers.items():
                module._buffers[name] = new.get(id(value), value)
        for parameter in parameters:
            parameter.data, parameter.grad = new[id(parameter.data)], new.get(id(parameter.grad))
        return self

    def _check_to(self, dtype: Any) -> None:
        """Raise if this module cannot have that dtype."""

    # ---- State dicts ----

    def state_dict(self, prefix: str = "") -> OrderedDict[str, Array]:
        """Return a copy of all parameters and buffers by path, with the versions of the modules in `_metadata`."""
        if not isinstance(prefix, str):
            raise TypeError(f"prefix: expected a string; got {prefix!r}")
        state = StateDict()
        state._metadata = OrderedDict()
        for path, module in self.named_modules(remove_duplicate=False):
            path = prefix + (f"{path}." if path else "")  # noqa: PLW2901
            state._metadata[path[:-1]] = {"version": module._version}
            values = module._own_values()
            like = next((value for value in values.values() if not isinstance(value, int)), None)
            for name, value in values.items():
                state[path + name] = _exported(value, like)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Take over the values of a state dict, converted to the namespace, device and dtype of this module.

        The values of `state_dict` are anything that numpy.asarray or DLPack takes; `state_dict` itself does not change.
        With `strict`, missing and unexpected keys are errors; otherwise they are returned. Raises a TypeError where a
        value is no real array, and one RuntimeError that lists every wrong key; then nothing has been loaded.
        """
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
        before = _snapshot(self.modules())
        try:
            for path, module in self.named_modules(remove_duplicate=False):
                prefix, version = (f"{path}." if path else ""), versions.get(path, {})
                module._load_from_state_dict(given, prefix, version, strict, missing, unexpected, errors)
            if strict:
                errors = _key_lines("Missing", missing) + _key_lines("Unexpected", unexpected) + errors
            if errors:
                lines = "\n\t".join(errors)
                raise RuntimeError(f"Error(s) in loading state_dict for {type(self).__name__}:\n\t{lines}")
        except BaseException:
            _restore(before)
            raise
        return IncompatibleKeys(missing, unexpected)

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
        """Load the values of this module, not of its children; add the keys that do not fit to the three lists.

        Subclasses override this method to translate an old version. `state_dict` is a copy that they may change.
        """
        own = self._own_values()
        for name, value in own.items():
            if (key := prefix + name) not in state_dict:
                missing_keys.append(key)
            elif (loaded := _fitted(key, state_dict[key], value, error_msgs)) is None:
                continue
            elif name in self._parameters:
                self._parameters[name].data = loaded
            else:
                self._buffers[name] = loaded
        for key in state_dict:
            if key.startswith(prefix):
                name, dot, _ = key[len(prefix) :].partition(".")
                if name not in (self._modules if dot else own):
                    unexpected_keys.append(key)

    def _own_values(self) -> dict[str, Any]:
        """Return the arrays and ints of this module, without its children: data of parameters, then buffers."""
        values = {name: None if p is None else p.data for name, p in self._parameters.items()}
        return {name: value for name, value in {**values, **self._buffers}.items() if value is not None}

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
        """Return the output of the last module."""
        for module in self:
            x = module(x)
        return x

    def backward(self, dy: Array) -> Array:
        """Return the gradient by the input of the first module."""
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


# ---- Buffers and state dicts ----


def _as_buffer(name: str, value: Any, current: Any = None) -> Any:
    """Return `value`, an array, an int or None, as a buffer holds it; raise a TypeError for other types.

    A 0-d array that is assigned to an int (a habit from PyTorch) becomes an int.
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


def _exported(value: Any, like: Array | None) -> Array:
    """Copy an array; turn an int into a 0-d int64 on the device of `like`, or of NumPy if `like` has no int64."""
    if not isinstance(value, int):
        return copied(value)
    if like is not None:
        xp, target = array_namespace(like), device(like)
        if "int64" in xp.__array_namespace_info__().dtypes(device=target, kind="signed integer"):
            return xp.asarray(value, dtype=xp.int64, device=target)
    return np.asarray(value, dtype=np.int64)


def _versions(state_dict: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return the versions of the modules by path, from the `_metadata` of `state_dict`; {} without `_metadata`."""
    metadata = getattr(state_dict, "_metadata", None) or {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"state_dict._metadata: expected a mapping of paths to versions; got {metadata!r}")
    for path, local in metadata.items():
        if not isinstance(local, Mapping) or not isinstance(local.get("version"), int | None):
            raise TypeError(f"state_dict._metadata[{path!r}]: expected {{'version': an integer}}; got {local!r}")
    return metadata


def _fitted(key: str, value: Any, current: Any, errors: list[str]) -> Any:
    """Convert `value` to the kind and dtype of `current`; return None and add to `errors` if the sizes differ."""
    shape = () if isinstance(current, int) else tuple(current.shape)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{key}: expected a plain array; got {class_name(value)}. Convert it with numpy.asarray")
    if not is_array_api_obj(value):
        value = as_numpy(key, value)
    if shape == () and tuple(value.shape) == (1,):  # as other libraries write a number; PyTorch loads it, too
        value = value[0, ...]
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
    """Return the 0-d `value` as an int ≥ 0."""
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
    """Keep references to all values; copies are not needed, as no array is ever written into."""
    return [
        (module, dict(module._buffers), [(p, p.data) for p in module._parameters.values() if p is not None])
        for module in modules
    ]


def _restore(before: list[tuple[Module, dict[str, Any], list[tuple[Any, Array]]]]) -> None:
    for module, buffers, parameters in before:
        module._buffers.update(buffers)
        for parameter, data in parameters:
            parameter.data = data

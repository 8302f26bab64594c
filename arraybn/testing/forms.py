"""The calls of the functions under test: their arguments, and the shapes of x that they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

CALLS = {  # the arguments and results of each function
    "forward": ("x, weight, bias, eps", "y"),
    "backward": ("dy, x, weight, bias, eps", "dx, dweight, dbias"),
    "update": ("running_mean, running_var, x, momentum", "running_mean, running_var"),
    "jvp": ("x_dot, x, weight, weight_dot, bias_dot, eps", "y_dot"),
    "double_backward": ("v, dy, x, weight, v_weight, v_bias, eps", "ddy, ddx, ddweight"),
}
LIKE_X = ("y", "dx", "y_dot", "ddy", "ddx")  # the results (N, C, S); all other results are (C,)
REMEDY = "Write a function that makes the layer, sets its weight and bias, and calls it"


class Form(NamedTuple):
    """A shape of x that functions take, and the way there from (N, C, S)."""

    name: str
    pack: Callable[[Array], Array]

    def unpack(self, array: Array, shape: tuple[int, ...]) -> Array:
        """Return a result as an array of `shape` (N, C, S); as it is if that is impossible."""
        n, c, s = shape
        if self.name == "(N, C)" and array.shape == (n * s, c):
            return np.moveaxis(array.reshape(n, s, c), 2, 1)
        return array[..., 0] if self.name == "(N, C, H, W)" and array.shape == (*shape, 1) else array


def as_lines(array: Array) -> Array:
    """Return (N, C, S) as (N·S, C)."""
    return np.moveaxis(array, 1, 2).reshape(-1, array.shape[1])


ANY = Form("(N, C, S)", lambda array: array)
FORMS = (ANY, Form("(N, C)", as_lines), Form("(N, C, H, W)", lambda array: array[..., None]))


def check_call(role: str, function: Any, masks: bool = False) -> None:
    """Raise a TypeError if the function cannot be called with the arguments of its role, a mask among them or not."""
    arguments, results = CALLS[role]
    arguments += ", where" if masks else ""
    expected = f"{role}: expected a function of ({arguments}) that returns {results}; got"
    if inspect.isclass(function):
        raise TypeError(f"{expected} the class {function.__name__}. {REMEDY}")
    if not callable(function):
        raise TypeError(f"{expected} an object of type {type(function).__name__}")
    inner = next((found for name in ("forward", "call") if callable(found := getattr(function, name, None))), None)
    for called in filter(None, (function, inner)):  # a layer of PyTorch or Keras is called with anything
        try:
            signature = inspect.signature(called)
        except (TypeError, ValueError):  # built in
            continue
        try:
            signature.bind(*arguments.split(", "))
        except TypeError:
            if inner is not None:
                raise TypeError(f"{expected} a layer of type {type(function).__name__}. {REMEDY}") from None
            name = getattr(function, "__name__", type(function).__name__)
            raise TypeError(f"{expected} {'lambda' if name == '<lambda>' else name}{signature}") from None

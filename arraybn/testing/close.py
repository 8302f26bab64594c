"""Comparisons of arrays, and of gradients with differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._arrays.copies import as_numpy
from .._arrays.namespaces import array_namespace, device, dtype_name, is_array_api_obj, namespace_name
from . import oracle


def assert_close(actual: Any, desired: Any, *, ulp: float, scale: Any = None, dtype: Any = None) -> None:
    """Assert that two arrays have the same namespace, dtype, shape and device, and values within some ulp.

    Parameters
    ----------
    actual : array
        The result, of any namespace.
    desired : array
        The expected result. A numpy.longdouble array, as the oracle returns, fits any namespace, device and dtype.
    ulp : float
        The largest allowed error, in units of the distance of neighbouring numbers of the dtype of `actual` at `scale`.
        Where `desired` is NaN or infinite, `actual` must have the same value.
    scale : array, optional
        The largest term of the sum that `actual` is; abs(desired) if None. In float16 and bfloat16, abs(desired) where
        that is larger.
    dtype : optional
        The dtype (or its name) that `actual` must have. If None, that of `desired`, unless `desired` is a longdouble.

    Raises
    ------
    AssertionError
        Names the difference: its index, its size in ulp, and the number of values that differ.

    Examples
    --------
    >>> import numpy
    >>> assert_close(numpy.asarray([1.0]), numpy.asarray([1.0 + 2**-52]), ulp=1)
    >>> assert_close(numpy.asarray([1.0]), numpy.asarray([1.0 + 2**-50]), ulp=1)
    Traceback (most recent call last):
        ...
    AssertionError: 1 of 1 values differ by more than 1 ulp of float64: by 4 at index (0,), ...
    """
    _assert_same_kind(actual, desired, dtype)
    name = dtype_name(actual.dtype)
    got, want = (as_numpy(label, array) for label, array in (("actual", actual), ("desired", desired)))
    got, want = got.astype(oracle.LONG), want.astype(oracle.LONG)
    errors = oracle.ulp_errors(got, want, abs(want) if scale is None else scale, name)
    if (wrong := ~(errors <= ulp)).any():
        index = tuple(int(i) for i in np.unravel_index(np.argmax(errors), errors.shape))
        raise AssertionError(
            f"{int(wrong.sum())} of {errors.size} values differ by more than {ulp:g} ulp of {name}:"
            f" by {float(errors[index]):.4g} at index {index}, {got[index]!s} instead of {want[index]!s}"
        )


def _assert_same_kind(actual: Any, desired: Any, dtype: Any) -> None:
    if not is_array_api_obj(actual):
        raise AssertionError(f"expected an array; got {type(actual).__name__}")
    exact = isinstance(desired, np.ndarray) and desired.dtype == oracle.LONG
    if not exact:
        names = [namespace_name(array_namespace(array)) for array in (actual, desired)]
        if names[0] != names[1]:
            raise AssertionError(f"expected a {names[1]} array; got a {names[0]} array")
        if device(actual) != device(desired):
            raise AssertionError(f"expected on {device(desired)}; got on {device(actual)}")
        dtype = desired.dtype if dtype is None else dtype
    if dtype is not None and dtype_name(actual.dtype) != dtype_name(dtype):
        raise AssertionError(f"expected dtype {dtype_name(dtype)}; got {dtype_name(actual.dtype)}")
    if tuple(actual.shape) != tuple(desired.shape):
        raise AssertionError(f"expected shape {tuple(desired.shape)}; got {tuple(actual.shape)}")


def check_vjp(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    dy: Any,
    gradients: Sequence[Any],
    *,
    tolerance: float = 1e-8,
    step: float = 6e-6,
    directions: int = 3,
    seed: int = 0,
) -> None:
    """Assert that a hand-written backward agrees with central differences of the forward, in random directions.

    Parameters
    ----------
    function : callable
        The forward: it takes `arguments` and returns an array like `dy`.
    arguments : sequence of numpy.ndarray
        The arguments, in float64, at which the gradients were computed.
    dy : numpy.ndarray
        The gradient of a loss by the result.
    gradients : sequence of numpy.ndarray
        The gradients by the first arguments, one for each.
    tolerance : float
        The largest allowed error of Σ gradient·v, relative to the product of the lengths of both vectors. The default
        is about a hundred times the error that `step` causes.
    step : float
        The step of the differences, relative to the largest argument. The default is (machine epsilon)^(1/3), for
        which the errors of truncation and of rounding are about equal.
    directions : int
        Number of random directions v for each argument.
    seed : int
        The seed of the directions.

    Raises
    ------
    ValueError
        No gradient or no direction is given, or dy has not the shape of the result.
    AssertionError
        Names the argument and both numbers.

    Examples
    --------
    >>> import numpy
    >>> x, dy = numpy.asarray([1.0, 2.0]), numpy.asarray([1.0, -1.0])
    >>> check_vjp(lambda x: x**2, [x], dy, [2 * x * dy])
    """
    if not gradients or directions < 1:
        raise ValueError("gradients, directions: expected at least one of each; got none, so nothing would be checked")
    if np.shape(dy) != (shape := np.shape(function(*arguments))):
        raise ValueError(f"dy: expected shape {shape}, that of the function's result; got {np.shape(dy)}")
    rng = np.random.default_rng(seed)
    for index, gradient in enumerate(gradients):
        if np.shape(gradient) != np.shape(arguments[index]):
            raise AssertionError(
                f"argument {index}: expected a gradient of shape {np.shape(arguments[index])}; got {np.shape(gradient)}"
            )
        for _ in range(directions):
            v = rng.standard_normal(np.shape(gradient))
            size = step * max(1.0, abs(arguments[index]).max()) / abs(v).max()
            ends = [
                function(*arguments[:index], arguments[index] + sign * size * v, *arguments[index + 1 :])
                for sign in (1, -1)
            ]
            numeric = float(np.sum(dy * (ends[0] - ends[1])) / (2 * size))
            written = float(np.sum(gradient * v))
            scale = float(np.sqrt(np.sum(np.square(gradient)) * np.sum(v * v)))
            if not abs(numeric - written) <= tolerance * scale:
                raise AssertionError(
                    f"argument {index}: by differences {numeric!r}, by the backward {written!r}; they may differ by"
                    f" {tolerance * scale:.3g}"
                )

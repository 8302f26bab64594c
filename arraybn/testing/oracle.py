"""The oracle: batch norm by definition, with exact rational statistics, then 80-bit arithmetic.

The oracle shares no code with the library. Errors are measured in ulp of the largest term of a formula, because no
formula can be more accurate than the rounding of its largest term; `size_of_unit` has the rule. The oracle needs a
``numpy.longdouble`` of 64 bits of mantissa or more, as on x86-64 and Arm Linux.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from .._arrays.namespaces import dtype_name

Array = np.ndarray[Any, Any]
LONG = np.longdouble
MANTISSA_BITS = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}
_ARRAYS, _VECTORS = ("xhat", "y", "y_scale", "dx", "dx_scale"), ("mean", "var", "dweight", "dbias")  # of `Exact`
_RATIONALS = ("exact_mean", "exact_m2")
SMALLEST_EXPONENT = {"float16": -14, "bfloat16": -126, "float32": -126, "float64": -1022}


@dataclass(frozen=True)
class Exact:
    """The exact results for one batch: longdouble arrays, within 2⁻⁶⁰ of their largest term.

    Attributes
    ----------
    mean, var : array (C,)
        Correctly rounded to longdouble from the exact rational; var is biased.
    xhat, y, y_scale : array (N, C, *S)
        `y_scale` is the largest term of y, max(|weight·xhat|, |bias|).
    dx, dx_scale : array (N, C, *S)
        `dx_scale` is the largest of the three terms of (E6).
    dweight, dbias : array (C,)
        (E5).
    """

    mean: Array
    var: Array
    xhat: Array
    y: Array
    y_scale: Array
    dx: Array
    dx_scale: Array
    dweight: Array
    dbias: Array
    exact_mean: list[Fraction] = field(repr=False)
    exact_m2: list[Fraction] = field(repr=False)


def exact_batch_norm(
    x: Any, weight: Any, bias: Any, dy: Any, *, eps: float, where: Any = None, channel_axis: int = 1
) -> Exact:
    """Return the results of E1, E3, E5 and E6 by definition.

    Parameters
    ----------
    x, dy : array (N, C, *S)
        NumPy arrays of any floating dtype. If x has a NaN or an infinity in a channel, the results there are NaN.
    weight, bias : array (C,)
    eps : float
        ε, the exact value of the float.
    where : array (N, *S) of bool, optional
        True at the positions that belong to the batch. Where `where` is False, x may be NaN; if dy is 0 there too, the
        position counts for nothing in dweight.
    channel_axis : int
        The axis of the channels in x and dy.

    Returns
    -------
    Exact

    Raises
    ------
    RuntimeError
        numpy.longdouble has less than 64 bits of mantissa here.

    Examples
    --------
    >>> import numpy
    >>> x = numpy.asarray([[1.0], [3.0]])
    >>> exact_batch_norm(x, numpy.ones(1), numpy.zeros(1), x, eps=0).y.astype(float)
    array([[-1.],
           [ 1.]])
    """
    check_longdouble()
    x, dy = (np.moveaxis(np.asarray(array), channel_axis, 1) for array in (x, dy))
    shape, channels = x.shape, range(x.shape[1])
    kept = np.ones(x[:, 0].size, bool) if where is None else np.broadcast_to(where, x[:, 0].shape).ravel()
    rows = [_channel(x[:, c].ravel(), weight[c], bias[c], dy[:, c].ravel(), eps, kept) for c in channels]
    results: dict[str, Any] = {name: [row[name] for row in rows] for name in (*_ARRAYS, *_VECTORS, *_RATIONALS)}
    for name in _ARRAYS:
        values = np.stack(results[name]).reshape(len(rows), shape[0], *shape[2:])
        results[name] = np.moveaxis(np.moveaxis(values, 0, 1), 1, channel_axis)
    for name in _VECTORS:
        results[name] = np.asarray(results[name], LONG)
    return Exact(**results)


def exact_jvp(
    x: Any, weight: Any, x_dot: Any, weight_dot: Any, bias_dot: Any, *, eps: float, channel_axis: int = 1
) -> tuple[Array, Array]:
    """Return y_dot (E8) and its largest term, like x, by definition.

    Parameters
    ----------
    x, x_dot : array (N, C, *S)
        Finite NumPy arrays of any floating dtype; x_dot is the tangent of x.
    weight, weight_dot, bias_dot : array (C,)
    eps : float
        ε, the exact value of the float.
    channel_axis : int
        The axis of the channels in x and x_dot.

    Returns
    -------
    y_dot, y_dot_scale : array (N, C, *S)
        Longdouble, within 2⁻⁶⁰ of the largest term.

    Examples
    --------
    >>> import numpy
    >>> x, one = numpy.asarray([[1.0], [3.0]]), numpy.ones(1)
    >>> exact_jvp(x, one, x, 0 * one, one, eps=0)[0].astype(float)
    array([[1.],
           [1.]])
    """

    def channel(x: Array, x_dot: Array, weight: Any, weight_dot: Any, bias_dot: Any) -> tuple[Array, Array]:
        return _sum_and_largest(_tangent_terms(*_standardized(x, eps), x_dot, weight, weight_dot, bias_dot))

    y_dot, scale = _over_channels(channel, channel_axis, (x, x_dot), (weight, weight_dot, bias_dot))
    return y_dot, scale


@dataclass(frozen=True)
class ExactDouble:
    """The exact results of a double backward (E9): longdouble arrays, within 2⁻⁶⁰ of their largest term.

    Attributes
    ----------
    ddy, ddy_scale, ddx, ddx_scale : array (N, C, *S)
        The gradients by dy and by x, and the largest terms of their formulas.
    ddweight, ddweight_scale : array (C,)
        The gradient by weight, and rstd·Σ|v·dy| or a larger term.

    Examples
    --------
    >>> import numpy
    >>> x, one = numpy.asarray([[1.0], [3.0]]), numpy.ones(1)
    >>> truth = exact_double_backward(x, one, x, one * [[1.0], [0.0]], one, one, eps=0)
    >>> isinstance(truth, ExactDouble), truth.ddx.shape, truth.ddweight.shape
    (True, (2, 1), (1,))
    """

    ddy: Array
    ddy_scale: Array
    ddx: Array
    ddx_scale: Array
    ddweight: Array
    ddweight_scale: Array


def exact_double_backward(
    x: Any, weight: Any, dy: Any, v: Any, v_weight: Any, v_bias: Any, *, eps: float, channel_axis: int = 1
) -> ExactDouble:
    """Return the gradients of Σv·dx + Σv_weight·dweight + Σv_bias·dbias by dy, x and weight (E9), by definition.

    Parameters
    ----------
    x, dy, v : array (N, C, *S)
        Finite NumPy arrays of any floating dtype.
    weight, v_weight, v_bias : array (C,)
    eps : float
        ε, the exact value of the float.
    channel_axis : int
        The axis of the channels in x, dy and v.

    Returns
    -------
    ExactDouble

    Examples
    --------
    >>> import numpy
    >>> x, one = numpy.asarray([[1.0], [3.0]]), numpy.ones(1)
    >>> exact_double_backward(x, one, x, 0 * x, one, 0 * one, eps=0).ddy.astype(float)  # xhat
    array([[-1.],
           [ 1.]])
    """

    def channel(x: Array, dy: Array, v: Array, weight: Any, v_weight: Any, v_bias: Any) -> tuple[Array, ...]:
        return _second_gradients(*_standardized(x, eps), dy, v, weight, v_weight, v_bias)

    return ExactDouble(*_over_channels(channel, channel_axis, (x, dy, v), (weight, v_weight, v_bias)))


def _second_gradients(
    xhat: Array, rstd: Any, g: Array, v: Array, weight: Any, v_weight: Any, v_bias: Any
) -> tuple[Array, ...]:
    """Return the fields of `ExactDouble` for one channel, g = dy and v (n,)."""
    n, scale = xhat.size, -weight * rstd * rstd
    mean_g, mean_v, mean_vg = np.sum(g) / n, np.sum(v) / n, np.sum(v * g) / n
    g1, v1 = np.sum(g * xhat) / n, np.sum(v * xhat) / n
    of_q = [mean_vg, -mean_v * mean_g, -v1 * g1]
    terms = [scale * xhat * term for term in of_q]
    terms += [scale * g1 * term for term in (v, -mean_v, -xhat * v1)]
    terms += [scale * v1 * term for term in (g, -mean_g, -xhat * g1)]
    terms += [v_weight * rstd * term for term in (g, -mean_g, -xhat * g1)]
    by_weight = sum(of_q) * n * rstd, np.maximum(np.sum(abs(v * g)), n * max(abs(mean_v * mean_g), abs(v1 * g1))) * rstd
    by_g = _sum_and_largest(_tangent_terms(xhat, rstd, v, weight, v_weight, v_bias))
    return *by_g, *_sum_and_largest(terms), *by_weight


def _tangent_terms(xhat: Array, rstd: Any, x_dot: Array, weight: Any, weight_dot: Any, bias_dot: Any) -> list[Array]:
    """Return the terms of E8 for one channel."""
    n, scale = xhat.size, weight * rstd
    projected = [scale * x_dot, -scale * np.sum(x_dot) / n, -scale * xhat * (np.sum(x_dot * xhat) / n)]
    return [*projected, weight_dot * xhat, bias_dot + 0 * xhat]


def _sum_and_largest(terms: list[Array]) -> tuple[Array, Array]:
    return sum(terms[1:], terms[0]), np.max(abs(np.stack(np.broadcast_arrays(*terms))), axis=0)


def _standardized(x: Array, eps: float) -> tuple[Array, Any]:
    """Return xhat (n,) and rstd of the values x of one channel."""
    mean, m2 = exact_moments(x)
    total = m2 / x.size + Fraction(eps)
    rstd = 1 / np.sqrt(as_long(total)) if total else LONG(0)
    return centred(x, mean) * rstd, rstd


def _over_channels(function: Any, channel_axis: int, arrays: Any, vectors: Any) -> list[Array]:
    """Return the results of `function` of the values and numbers of each channel, as arrays (N, C, *S) or (C,)."""
    check_longdouble()
    arrays = [np.moveaxis(np.asarray(array), channel_axis, 0) for array in arrays]
    rows = [
        function(*(array[c].ravel().astype(LONG) for array in arrays), *(LONG(vector[c]) for vector in vectors))
        for c in range(len(arrays[0]))
    ]
    results = [np.stack(column) for column in zip(*rows, strict=True)]
    return [r if r.ndim == 1 else np.moveaxis(r.reshape(arrays[0].shape), 0, channel_axis) for r in results]


def check_longdouble() -> None:
    """Raise a RuntimeError if numpy.longdouble is too short for the oracle."""
    if np.finfo(LONG).nmant < 63:
        raise RuntimeError("the oracle needs a numpy.longdouble of 64 bits of mantissa; this platform's has fewer")


def _channel(x: Array, weight: Any, bias: Any, dy: Array, eps: float, kept: Array) -> dict[str, Any]:
    """Return the results of one channel, x, dy and the mask `kept` of one length."""
    n = int(np.count_nonzero(kept))
    if x.size == 0 or not np.isfinite(x[kept].astype(LONG)).all():
        nothing, value = np.full(x.size, np.nan, LONG), LONG(0 if x.size == 0 else np.nan)
        empty: dict[str, Any] = dict.fromkeys(_ARRAYS, nothing)
        return empty | dict.fromkeys(_VECTORS, value) | dict.fromkeys(_RATIONALS, Fraction(0))
    mean, m2 = exact_moments(x[kept]) if n else (Fraction(0), Fraction(0))
    n = max(n, 1)
    var = m2 / n + Fraction(eps)
    rstd = 1 / np.sqrt(as_long(var)) if var else LONG(0)
    xhat, g, gamma, beta = centred(x, mean) * rstd, dy.astype(LONG), LONG(weight), LONG(bias)
    dweight, dbias = np.sum((g * xhat)[kept | (g != 0)]), np.sum(g)
    means = [gamma * rstd * dbias / n, gamma * rstd * xhat * dweight / n]
    terms = [gamma * rstd * g, *(np.where(kept, mean, 0) for mean in means)]
    return {
        "xhat": xhat,
        "y": gamma * xhat + beta,
        "y_scale": np.maximum(abs(gamma * xhat), abs(beta)),
        "dx": terms[0] - terms[1] - terms[2],
        "dx_scale": np.maximum(np.maximum(abs(terms[0]), abs(terms[1])), abs(terms[2])),
        "dweight": dweight,
        "dbias": dbias,
        "mean": as_long(mean),
        "var": as_long(m2 / n),
        "exact_mean": mean,
        "exact_m2": m2,
    }


def exact_moments(values: Any) -> tuple[Fraction, Fraction]:
    """Return the exact mean and Σ(x−mean)² (E1) of finite values of any floating dtype up to float64.

    Examples
    --------
    >>> import numpy
    >>> exact_moments(numpy.asarray([0.5, 1.0]))
    (Fraction(3, 4), Fraction(1, 8))
    """
    mantissas, exponents = np.frexp(np.ravel(np.asarray(values)).astype("f8"))
    least, n = int(exponents.min()), mantissas.size
    shifts = (exponents - least).tolist()
    whole = [int(m) << s for m, s in zip(np.ldexp(mantissas, 53).astype("i8").tolist(), shifts, strict=True)]
    total = sum(whole)  # in units of 2**(least − 53), in which all values are integers
    squares = sum((n * value - total) ** 2 for value in whole)
    unit = Fraction(2) ** (least - 53)
    return Fraction(total, n) * unit, Fraction(squares, n * n) * unit**2


def as_long(value: Fraction) -> Any:
    """Return a rational as a longdouble, rounded at most twice."""
    power = value.numerator.bit_length() - value.denominator.bit_length()
    value /= Fraction(2) ** power  # near 1, so that float() neither overflows nor underflows
    high = float(value)
    return np.ldexp(LONG(high) + LONG(float(value - Fraction(high))), power)


def centred(values: Array, mean: Fraction) -> Array:
    """Return `values` − mean in longdouble, with the mean as a sum of two longdoubles."""
    high = as_long(mean)
    rest = mean - Fraction(*high.as_integer_ratio())
    result: Array = (values.astype(LONG) - high) - as_long(rest)
    return result


def ulp(values: Any, dtype: Any) -> Array:
    """Return the distance of neighbours in `dtype` (or its name) at abs(values); at least that of normal numbers.

    Examples
    --------
    >>> [float(u) for u in ulp([1.0, 3.0], "float16")]
    [0.0009765625, 0.001953125]
    """
    name = _name_of(dtype)
    smallest = np.ldexp(LONG(1), SMALLEST_EXPONENT[name])
    exponents = np.frexp(np.maximum(abs(np.asarray(values, LONG)), smallest))[1]
    result: Array = np.ldexp(LONG(1), exponents - 1 - MANTISSA_BITS[name])
    return result


def _name_of(dtype: Any) -> str:
    return dtype_name(np.dtype(dtype) if isinstance(dtype, type) else dtype)


def size_of_unit(largest: Any, exact: Any, dtype: str, xp: Any = np) -> Any:
    """(N2h) Return the size whose ulp is the unit of an error: the largest term; in halves max(largest term, |exact|).

    In half precision, most of the error is the rounding of the result, which may be larger than each of its terms.
    """
    return xp.maximum(largest, abs(exact)) if MANTISSA_BITS[dtype] < MANTISSA_BITS["float32"] else largest


def largest_number(dtype: str) -> Any:
    """Return the largest finite number of a dtype, a longdouble."""
    return np.ldexp(2 - np.ldexp(LONG(1), -MANTISSA_BITS[dtype]), 1 - SMALLEST_EXPONENT[dtype])


def errors_in(unit: Any, got: Array, exact: Array) -> Array:
    """Return the errors of longdoubles, in units; infinite for a NaN or an infinity that `exact` has not."""
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = abs(got - exact) / unit
    same = (got == exact) | (np.isnan(got) & np.isnan(exact))
    result: Array = np.where(same, 0, np.where(np.isnan(errors), np.inf, errors))
    return result


def ulp_errors(got: Any, exact: Any, largest: Any, dtype: Any) -> Array:
    """Return the errors in ulp of `dtype` at `size_of_unit`; 0 where `got` is the infinity that `exact` rounds to."""
    got, exact, name = np.asarray(got).astype(LONG), np.asarray(exact, LONG), _name_of(dtype)
    size = size_of_unit(largest, exact, name)
    most = largest_number(name)
    too_large = abs(exact) >= most + ulp(most, name) / 2
    exact = np.where(too_large & (got == np.copysign(np.inf, exact)), got, exact)
    return errors_in(ulp(np.where(np.isfinite(size), size, 1), name), got, exact)


def worst(got: Any, exact: Any, scale: Any, dtype: Any) -> float:
    """Return the largest error of `got`, in ulp of `dtype` at `scale`. A NaN is correct only if `exact` is NaN.

    In float16 and bfloat16 an ulp is that of max(`scale`, abs(`exact`)): the correctly rounded result is never off by
    more than half an ulp.

    Examples
    --------
    >>> import numpy
    >>> worst(numpy.asarray([1.25]), numpy.asarray([1.0]), 1.0, "float16")
    256.0
    """
    return float(np.max(ulp_errors(got, exact, scale, dtype), initial=0))

"""The functions users call: validate, choose the kernels, reduce, pool, map.

Each takes arrays and returns arrays; none keeps or changes anything. The maths is in ``reference.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from . import reference
from ._arrays import FLOATS, Array, Layout, array_namespace, dtype_name, is_array_api_obj, same_memory, widened
from ._checks import as_channel_vector, as_eps, as_floating, as_integer, as_number, check_home, check_like, check_out
from .kernels import Kernels, select
from .reference import Moments


@dataclass(slots=True, eq=False)
class Saved:
    """What a forward hands to its backward; opaque but for `moments`.

    Attributes
    ----------
    moments : Moments or None
        The batch's statistics; None where fixed statistics were given.
    """

    moments: Moments | None
    _kernels: Kernels = field(repr=False)
    _layout: Layout = field(repr=False)
    _x: Array = field(repr=False)  # (N, C, *S), the caller's own; None once it is overwritten
    _overwritten: str | None = field(repr=False)  # by what
    _mean: Array = field(repr=False)  # (C,), and so are the next two: copies of the forward's
    _rstd: Array = field(repr=False)
    _weight: Array | None = field(repr=False)
    _has_bias: bool = field(repr=False)


def batch_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    mean: Array | None = None,
    var: Array | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: Array | None = None,
    kernels: str | Kernels | None = None,
) -> tuple[Array, Saved]:
    """Normalize each channel of x over its batch: y = weight·(x − mean)/√(var + eps) + bias (E3).

    Parameters
    ----------
    x : array (N, C, *S)
        The batch: float16, bfloat16, float32 or float64, in any memory layout.
    weight, bias : array (C,), optional
        γ and β, of any of these dtypes; 1 and 0 where None.
    mean, var : array (C,), optional
        Fixed statistics, as in evaluation (E7). Without them the batch's own are used, var biased. Both or neither.
    eps : float
        ε ≥ 0, in units of x². With eps = 0 a constant channel has xhat = 0.
    channel_axis : int
        The axis that is kept; -1 for channels-last.
    out : array, optional
        Takes y: of the shape, dtype and device of y, disjoint from the inputs or x itself. A forward in place has no
        backward.
    kernels : str or module, optional
        Forces a kernel module ("reference"); the backward uses its forward's.

    Returns
    -------
    y : array (N, C, *S)
        In the dtype and memory layout of x; `out` where given.
    saved : Saved
        For `batch_norm_backward`. Holds x by reference (changing x before the backward gives wrong gradients, and
        cannot be detected) and copies of all else. `saved.moments` are the batch's `Moments`.

    Raises
    ------
    TypeError
        An argument is no array, of another namespace than x, or of another dtype than the four.
    ValueError
        A shape, device or option does not fit, or `out` partly overlaps an input.

    Notes
    -----
    Statistics are kept in float64 where the namespace has it, and x − mean is taken before anything is scaled: neither
    E[x²] − E[x]² nor x·scale + (bias − mean·scale), which lose every digit when |mean| ≫ std. A constant channel gives
    exactly `bias`. An empty batch gives an empty y.

    References
    ----------
    S. Ioffe, C. Szegedy, Batch Normalization, 2015, algorithm 1.

    Examples
    --------
    >>> import numpy, arraybn
    >>> x = numpy.asarray([[1.0, 7.0], [3.0, 7.0]])
    >>> y, saved = arraybn.batch_norm(x, bias=numpy.asarray([0.0, 0.5]), eps=0)
    >>> y
    array([[-1. ,  0.5],
           [ 1. ,  0.5]])
    >>> dx, dweight, dbias = arraybn.batch_norm_backward(numpy.ones((2, 2)), saved)
    >>> dx, dweight, dbias
    (array([[0., 0.],
           [0., 0.]]), None, array([2., 2.]))
    """
    x = as_floating("x", x)
    layout = Layout.of(x, as_integer("channel_axis", channel_axis))
    channels = layout.ncs[1]
    eps = as_eps(eps)
    if (mean is None) != (var is None):
        given, missing = ("mean", "var") if var is None else ("var", "mean")
        raise ValueError(f"{missing}: expected an array, because {given} is given; got None")
    vectors = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    vectors = {name: as_channel_vector(name, array, x, channels) for name, array in vectors.items()}
    check_out(out, x, layout.shape, {"x": x, **vectors})
    ops = select(x, kernels)
    weight, bias, mean, var = (None if array is None else widened(array) for array in vectors.values())

    view, moments, mean_low = layout.view(x), None, None
    if mean is None:
        moments = _moments(ops, view, layout.n)
        # The synchronized mode pools the moments of all ranks here (E2), between the reduction and the map.
        mean_low, var = moments.mean_low, moments.m2 / max(moments.n, 1)
        mean = array_namespace(x).asarray(moments.mean, copy=True)  # the caller sees moments, and may change them
    rstd = reference.rstd(var, eps)
    a, c = reference.normalize(rstd, weight, bias, mean_low)
    y = _place(ops.affine(view, mean, a, c, None if out is None else layout.view(out)), layout, out)
    lost = "the forward wrote y over x (out=x)" if out is not None and same_memory(out, x) else None
    kept = x if lost is None else None
    return y, Saved(moments, ops, layout, kept, lost, mean, rstd, weight, bias is not None)


def batch_norm_backward(
    dy: Array, saved: Saved, *, out: Array | None = None
) -> tuple[Array, Array | None, Array | None]:
    """The gradients of a loss by x, weight and bias, from its gradient dy by y (E5, E6; E7 with fixed statistics).

    Parameters
    ----------
    dy : array (N, C, *S)
        Of the shape of x; another real floating dtype than that of x is converted to it.
    saved : Saved
        From the forward, whose x must not have been changed since.
    out : array, optional
        Takes dx: of its shape, dtype and device, disjoint from the inputs, or dy or x itself. Over x, this is the last
        backward of that forward.

    Returns
    -------
    dx : array (N, C, *S)
        In the dtype and memory layout of x; sums to zero over each channel, to rounding, where the batch's own
        statistics were used.
    dweight, dbias : array (C,) or None
        Σdy·xhat and Σdy, float64 where the namespace has it; None where the forward had no weight, no bias.

    Raises
    ------
    TypeError
        dy is no array of the namespace of x, or saved does not come from `batch_norm`.
    ValueError
        dy has another shape or device than x, or `out` partly overlaps an input.
    RuntimeError
        x is gone: the forward, or an earlier backward, wrote over it.

    Examples
    --------
    >>> import numpy, arraybn
    >>> x = numpy.asarray([[1.0], [2.0], [6.0]])
    >>> y, saved = arraybn.batch_norm(x, numpy.ones(1), numpy.zeros(1))
    >>> dx, dweight, dbias = arraybn.batch_norm_backward(numpy.asarray([[1.0], [0.0], [0.0]]), saved)
    >>> bool(abs(dx.sum()) < 1e-15), dbias
    (True, array([1.]))
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved: expected what batch_norm returned beside y; got {type(saved).__name__}")
    if saved._overwritten is not None:
        raise RuntimeError(
            f"saved: expected a forward whose x is still there; got one without, because {saved._overwritten}."
            f" Pass another array as out, or None"
        )
    ops, layout, x, mean, rstd = saved._kernels, saved._layout, saved._x, saved._mean, saved._rstd
    dy = as_floating("dy", dy)
    check_home("dy", dy, x)
    if tuple(dy.shape) != layout.shape:
        raise ValueError(f"dy: expected shape {layout.shape}, that of x and y; got {tuple(dy.shape)}")
    check_out(out, x, layout.shape, {"dy": dy, "x": x})
    over_x = out is not None and same_memory(out, x)
    if dy.dtype != x.dtype:
        dy = array_namespace(dy).astype(dy, x.dtype)

    dy_view, x_view, out_view = layout.view(dy), layout.view(x), None if out is None else layout.view(out)
    moments = saved.moments
    mean_low = None if moments is None else moments.mean_low
    sum_dy, sum_dy_x = ops.dots(dy_view, x_view, mean)
    dweight, dbias = reference.parameter_gradients(sum_dy, sum_dy_x, rstd, mean_low)
    if moments is None:
        zero = array_namespace(rstd).zeros_like(rstd)
        a, _ = reference.normalize(rstd, saved._weight, None)
        dx = ops.affine(dy_view, zero, a, zero, out_view)  # (E7)
    else:
        # The synchronized mode sums dweight and dbias over all ranks here, for dx alone.
        coefficients = reference.input_gradient(dweight, dbias, max(moments.n, 1), rstd, saved._weight, mean_low)
        dx = ops.affine2(dy_view, x_view, mean, *coefficients, out_view)  # (E6)
    dx = _place(dx, layout, out)
    if over_x:
        saved._x, saved._overwritten = None, "an earlier backward wrote dx over it (out=x)"
    return dx, None if saved._weight is None else dweight, dbias if saved._has_bias else None


def moments(x: Array, *, channel_axis: int = 1, kernels: str | Kernels | None = None) -> Moments:
    """n, mean and m2 of each channel of x (E1).

    Parameters
    ----------
    x : array (N, C, *S)
        float16, bfloat16, float32 or float64, in any memory layout.
    channel_axis : int
        The axis that is kept; -1 for channels-last.
    kernels : str or module, optional
        Forces a kernel module.

    Returns
    -------
    Moments
        `mean` in units of x, `m2` in units of x², float64 where the namespace has it. Of nothing: n = 0 and zeros.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm` for x, channel_axis and kernels.

    Notes
    -----
    From float32 data, mean and m2/n are correctly rounded to float32 but for rare ties, up to |mean|/std = 10⁶, where
    the namespace has float64. Without it, n·m2 and the sum of |x| have to stay below the largest float32, 3·10³⁸.

    Examples
    --------
    >>> import numpy, arraybn
    >>> arraybn.moments(numpy.asarray([[1.0, 3.0, 5.0]]), channel_axis=0).mean
    array([3.])
    """
    x = as_floating("x", x)
    layout = Layout.of(x, as_integer("channel_axis", channel_axis))
    return _moments(select(x, kernels), layout.view(x), layout.n)


def _moments(ops: Kernels, x: Array, n: int) -> Moments:
    """(E1) of x (N, C, S), with the low part of the mean where float32 is the widest dtype."""
    mean, m2 = ops.moments(x)
    if n == 0 or dtype_name(mean.dtype) == "float64":
        return Moments(n, mean, m2)
    xp = array_namespace(x)
    _, rest = ops.dots(xp.ones_like(x), x, mean)
    return Moments(n, mean, m2, mean_low=xp.where(xp.isfinite(mean), rest / n, xp.zeros_like(mean)))


def pool(*moments: Moments) -> Moments:
    """The moments of disjoint batches taken together, as if they had been one batch (E2).

    Parameters
    ----------
    *moments : Moments
        At least one; all with the same number of channels, namespace and device. An empty one (n = 0) changes nothing.

    Returns
    -------
    Moments
        pool(a, b) and pool(b, a) have the same bits.

    Raises
    ------
    TypeError
        None were given, one is no `Moments`, or they are of different namespaces.
    ValueError
        The numbers of channels or the devices differ.

    Examples
    --------
    >>> import numpy, arraybn
    >>> x = numpy.asarray([[0.0], [2.0], [7.0]])
    >>> both = arraybn.pool(arraybn.moments(x[:2]), arraybn.moments(x[2:]))
    >>> both.n, both.mean, both.m2
    (3, array([3.]), array([26.]))
    """
    if not moments:
        raise TypeError("moments: expected at least one Moments; got none")
    for index, part in enumerate(moments):
        _check_moments(f"moments[{index}]", part)
        check_home(f"moments[{index}].mean", part.mean, moments[0].mean, "moments[0].mean")
        if part.mean.shape != moments[0].mean.shape:
            raise ValueError(
                f"moments[{index}]: expected {moments[0].mean.shape[0]} channels as moments[0] has;"
                f" got {part.mean.shape[0]}"
            )
    pooled = moments[0]
    for part in moments[1:]:
        pooled = reference.pool(pooled, part)
    return pooled


def update_running_stats(
    running_mean: Array, running_var: Array, moments: Moments, momentum: float, *, correction: int = 1
) -> tuple[Array, Array]:
    """The running statistics after one more batch: (1 − momentum)·running + momentum·batch (E4).

    Parameters
    ----------
    running_mean, running_var : array (C,)
        Never written into.
    moments : Moments
        Of the batch. With n = 0 the values stay as they are.
    momentum : float
        The weight of the new batch, PyTorch's convention. A decay d, as in ONNX, Keras and Flax, is 1 − momentum.
    correction : int
        1: the variance enters unbiased, m2/(n − 1), as in PyTorch. 0: biased, m2/n, as in ONNX, Keras and Flax.

    Returns
    -------
    running_mean, running_var : array (C,)
        New arrays, in the dtypes of the arguments.

    Raises
    ------
    TypeError
        An argument is not what is said above.
    ValueError
        A shape does not fit, or 0 < n ≤ correction: that batch has no unbiased variance.

    Examples
    --------
    >>> import numpy, arraybn
    >>> batch = arraybn.moments(numpy.asarray([[1.0], [3.0]]))
    >>> arraybn.update_running_stats(numpy.zeros(1), numpy.ones(1), batch, 0.5)
    (array([1.]), array([1.5]))
    """
    _check_moments("moments", moments)
    channels = moments.mean.shape[0]
    running = {"running_mean": running_mean, "running_var": running_var}
    for name, array in running.items():
        if array is None:
            raise TypeError(f"{name}: expected an array ({channels},); got None")
        running[name] = as_channel_vector(name, array, moments.mean, channels, of="moments.mean")
    momentum = float(as_number("momentum", momentum))
    correction = as_integer("correction", correction, 0)
    if 0 < moments.n <= correction:
        raise ValueError(
            f"moments: expected n > correction = {correction}, or the variance is not defined; got n = {moments.n}"
        )
    if moments.n == 0:
        xp = array_namespace(moments.mean)
        return tuple(xp.asarray(array, copy=True) for array in running.values())
    mean, var = running.values()
    return (
        reference.update_running(mean, moments.mean, momentum),
        reference.update_running(var, moments.var(correction), momentum),
    )


def _place(result: Array, layout: Layout, out: Array | None) -> Array:
    """The sweep's `result` in the caller's layout, in `out` where one was given."""
    result = layout.restore(result)
    if out is None:
        return result
    out[...] = result
    return out


def _check_moments(name: str, value: object) -> None:
    if not isinstance(value, Moments):
        raise TypeError(f"{name}: expected Moments, as arraybn.moments returns; got {type(value).__name__}")
    as_integer(f"{name}.n", value.n, 0)
    if not is_array_api_obj(value.mean) or dtype_name(value.mean.dtype) not in FLOATS:
        as_floating(f"{name}.mean", value.mean)  # says what is wrong with it
    if value.mean.ndim != 1:
        raise ValueError(f"{name}.mean: expected shape (C,); got {tuple(value.mean.shape)}")
    check_like(f"{name}.m2", value.m2, value.mean, f"{name}.mean")

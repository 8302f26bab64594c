"""Further derivatives that users call: forward mode (E8) and double backward (E9).

Both use the statistics and the x that the forward has saved. The maths is in ``reference.py``.
"""

from __future__ import annotations

from . import sync
from ._arrays.devices import on_device_of
from ._arrays.namespaces import Array
from .functional import ALONE, Result, Saved, check_saved, prepared, totals_of, widened_vectors
from .statistics import Sums


def batch_norm_jvp(
    x_dot: Array,
    saved: Saved,
    weight_dot: Array | None = None,
    bias_dot: Array | None = None,
    *,
    sums: Sums | None = None,
    out: Array | None = None,
) -> Array:
    """Return the change of y if x, weight and bias change by x_dot, weight_dot and bias_dot (E8).

    y_dot = weight·rstd·P(x_dot) + weight_dot·xhat + bias_dot, with P(t) = t − ⟨t⟩ − xhat·⟨t·xhat⟩, and P(t) = t with
    fixed statistics.

    Parameters
    ----------
    x_dot : array (N, C, *S)
        The tangent of x, in any of the four dtypes.
    saved : Saved
        From the forward, whose x must not have been changed since.
    weight_dot, bias_dot : array (C,), optional
        The tangents of weight and bias; 0 where None. A forward without weight counts as one with weight 1.
    sums : Sums, optional
        After a forward with `moments`, and only then: the sum of ``batch_norm_sums(x_dot, saved, tangent=True)`` over
        all parts.
    out : array, optional
        Takes y_dot: of the shape, dtype and device of x, disjoint from the inputs, or x_dot or x itself. Over x, this
        is the last use of that forward.

    Returns
    -------
    y_dot : array (N, C, *S)
        In the dtype and memory layout of x.

    Raises
    ------
    TypeError
        An argument is no array of the namespace of x, or saved does not come from `batch_norm`.
    ValueError
        A shape or device is not that of x, `out` partly overlaps an input, or `sums` are missing, not asked for or not
        those of all parts.
    RuntimeError
        x is gone: something wrote over it.
    SyncError
        After a forward with `comm`, whose ranks call this together: one of these on some rank, or the ranks are not in
        the same call.

    Notes
    -----
    x_dot and x are converted to a dtype that holds both, and y_dot is rounded at the end. Over `comm` there is one
    exchange, of the two sums Σx_dot and Σx_dot·(x − mean). After an exact forward these sums are usual ones, which
    round.

    References
    ----------
    The derivation is in docs/maths.md, E8.

    Examples
    --------
    >>> import numpy, arraybn
    >>> x = numpy.asarray([[1.0], [2.0], [6.0]])
    >>> y, saved = arraybn.batch_norm(x)
    >>> along, step = numpy.asarray([[1.0], [0.0], [0.0]]), 1e-6
    >>> y_dot = arraybn.batch_norm_jvp(along, saved)
    >>> change = arraybn.batch_norm(x + step * along)[0] - arraybn.batch_norm(x - step * along)[0]
    >>> bool(abs(change / (2 * step) - y_dot).max() < 1e-9)
    True
    """
    call = check_saved(saved)._backward_call(sync.JVP)
    with call or ALONE, on_device_of(x_dot):
        (x_dot, x), result = prepared(saved, call, out, x_dot=x_dot)
        weight_dot, bias_dot = widened_vectors(saved, weight_dot=weight_dot, bias_dot=bias_dot)
        backend, totals, out = saved._backend, totals_of(saved, call, sums), result.place
        given = saved._rstd, saved._weight, weight_dot, bias_dot
        if saved._mask is not None and sums is not None and not sums.tangent:
            raise ValueError(
                "sums: expected those of batch_norm_sums(x_dot, saved, tangent=True), because the forward had where=;"
                " got sums without tangent=True"
            )
        if saved._moments is None:
            y_dot = backend.evaluation_jvp(x_dot, x, saved._mean, *given, out=out)
        else:
            y_dot = backend.jvp(x_dot, x, saved._moments, *given, pool=totals, out=out, where=saved._where)
        return result.write(y_dot, "an earlier batch_norm_jvp wrote y_dot")


def batch_norm_double_backward(
    v: Array,
    dy: Array,
    saved: Saved,
    v_weight: Array | None = None,
    v_bias: Array | None = None,
    *,
    sums: Sums | None = None,
) -> tuple[Array, Array, Array | None]:
    """Return the gradients, by dy, x and weight, of a loss that contains the results of `batch_norm_backward` (E9).

    Parameters
    ----------
    v : array (N, C, *S)
        The gradient of the loss by dx, in any of the four dtypes.
    dy : array (N, C, *S)
        The dy of the backward.
    saved : Saved
        From the forward, whose x must not have been changed since.
    v_weight, v_bias : array (C,), optional
        The gradients of the loss by dweight and dbias; 0 where None.
    sums : Sums, optional
        After a forward with `moments`, and only then: the sum of ``batch_norm_sums(dy, saved, v=v, v_weight=v_weight)``
        over all parts.

    Returns
    -------
    ddy, ddx : array (N, C, *S)
        The gradients by dy and by x, in the dtype and memory layout of x.
    ddweight : array (C,) or None
        The gradient by weight, in the dtype of statistics; None where the forward had no weight. After a forward with
        `comm` or `moments`, the part of this rank or part: they add up to the gradient, as those of dweight do.

    Raises
    ------
    TypeError
        An argument is no array of the namespace of x, or saved does not come from `batch_norm`.
    ValueError
        A shape or device is not that of x, or `sums` are missing, not asked for or not those of all parts.
    RuntimeError
        x is gone: something wrote over it.
    SyncError
        After a forward with `comm`, whose ranks call this together: one of these on some rank, or the ranks are not in
        the same call.

    Notes
    -----
    Where the dtypes of x, dy and v differ, all are converted, exactly, to one that holds all; ddy and ddx are rounded
    at the end. Over `comm` there is one exchange. The bias has no gradient here: nothing depends on it.

    v_weight and v_bias may differ between ranks or parts: those of a part belong to the dweight and dbias of the part.
    After an exact forward the sums here are usual ones, which round.

    References
    ----------
    The derivation is in docs/maths.md, E9.

    Examples
    --------
    The gradient of the penalty Σdx²/2 by x, beside differences:

    >>> import numpy, arraybn
    >>> x, dy = numpy.asarray([[1.0], [2.0], [6.0]]), numpy.asarray([[1.0], [0.0], [0.0]])
    >>> def penalty(x):
    ...     return (arraybn.batch_norm_backward(dy, arraybn.batch_norm(x)[1])[0] ** 2).sum() / 2
    >>> _, saved = arraybn.batch_norm(x)
    >>> dx, _, _ = arraybn.batch_norm_backward(dy, saved)
    >>> ddy, ddx, _ = arraybn.batch_norm_double_backward(dx, dy, saved)
    >>> along, step = numpy.asarray([[0.0], [1.0], [0.0]]), 1e-6
    >>> slope = (penalty(x + step * along) - penalty(x - step * along)) / (2 * step)
    >>> bool(abs(slope - (ddx * along).sum()) < 1e-9)
    True
    """
    call = check_saved(saved)._backward_call(sync.DOUBLE_BACKWARD)
    with call or ALONE, on_device_of(dy):
        (v, dy, x), by_x = prepared(saved, call, None, v=v, dy=dy)
        by_dy = Result(saved, call, None, x)
        v_weight, v_bias = widened_vectors(saved, v_weight=v_weight, v_bias=v_bias)
        backend, totals = saved._backend, totals_of(saved, call, sums, rows=7)
        given, options = (saved._rstd, saved._weight, v_weight), {"v_bias": v_bias}
        if saved._moments is None:
            ddy, ddx, ddweight = backend.evaluation_double_backward(v, dy, x, saved._mean, *given, **options)
        else:
            options |= {"pool": totals, "out": (by_dy.place, by_x.place), "where": saved._where}
            ddy, ddx, ddweight = backend.double_backward(v, dy, x, saved._moments, *given, **options)
        return by_dy.write(ddy, ""), by_x.write(ddx, ""), None if saved._weight is None else ddweight

"""The statistics of batches: their moments, pooled, and kept as running averages."""

from __future__ import annotations

from . import reference
from ._arrays.copies import copied
from ._arrays.devices import on_device_of
from ._arrays.layout import Layout
from ._arrays.namespaces import Array, Shaped
from ._checks import as_channel_vector, as_floating, as_integer, as_number, check_home, check_like
from .kernels import Module, select
from .reference import Moments


def moments(x: Shaped, *, channel_axis: int = 1, kernels: str | Module | None = None) -> Moments:
    """Return n, mean and m2 of each channel of x (E1).

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
    with on_device_of(x):
        return reference.batch_moments(select(x, kernels), layout.view(x))


def pool(*moments: Moments) -> Moments:
    """Return the moments of disjoint batches together, as if they had been one batch (E2).

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
    with on_device_of(pooled.mean):
        for part in moments[1:]:
            pooled = reference.pool(pooled, part)
    return pooled


def update_running_stats(
    running_mean: Shaped, running_var: Shaped, moments: Moments, momentum: float, *, correction: int = 1
) -> tuple[Array, Array]:
    """Return the running statistics after one more batch: (1 − momentum)·running + momentum·batch (E4).

    Parameters
    ----------
    running_mean, running_var : array (C,)
        Never written into.
    moments : Moments
        Of the batch. With n = 0 the values stay as they are.
    momentum : float
        The weight of the new batch, PyTorch's convention. A decay d, as in ONNX, Keras and Flax, is 1 − momentum. With
        0 the values stay as they are, also where the batch has a NaN.
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
    running: dict[str, Array] = {"running_mean": running_mean, "running_var": running_var}
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
    if moments.n == 0 or momentum == 0:
        return copied(running["running_mean"]), copied(running["running_var"])
    with on_device_of(moments.mean):
        return update_unchecked(running["running_mean"], running["running_var"], moments, momentum, correction)


def update_unchecked(
    running_mean: Array, running_var: Array, moments: Moments, momentum: float, correction: int = 1
) -> tuple[Array, Array]:
    """(E4) Return the running statistics after one more batch; the arguments are known to be right."""
    update = select(moments.mean).update_running_stats
    return update(running_mean, running_var, moments.mean, moments.var(correction), momentum)


def _check_moments(name: str, value: object) -> None:
    if not isinstance(value, Moments):
        raise TypeError(f"{name}: expected Moments, as arraybn.moments returns; got {type(value).__name__}")
    as_integer(f"{name}.n", value.n, 0)
    as_floating(f"{name}.mean", value.mean)
    if value.mean.ndim != 1:
        raise ValueError(f"{name}.mean: expected shape (C,); got {tuple(value.mean.shape)}")
    check_like(f"{name}.m2", value.m2, value.mean, f"{name}.mean")

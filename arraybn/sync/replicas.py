"""Copies of one model on all ranks: equal state before training, and the gradients of all batches together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from .. import exact as exact_sums
from .._arrays.copies import as_numpy, converted
from .._arrays.namespaces import Array, array_namespace, device, dtype_name
from .._checks import as_flag, as_integer, as_number
from ..modules import Module, Parameter
from . import frames
from .communicators import exchange_over
from .exchange import TIMEOUT, Comm, as_timeout, begin, settings_text

MOST_SAMPLES = 2**20  # of a rank in an exact mean: the limbs of 2,048 ranks with as many have room in 64 bits


def broadcast_state(model: Module, comm: Comm | None, *, timeout: float | None = TIMEOUT) -> None:
    """Give every rank the parameters, buffers and counters of rank 0.

    Parameters
    ----------
    model : Module
        A model of the same structure on all ranks. Its values are replaced, never written into; gradients stay.
    comm : mpi4py communicator or None
        The ranks; None for all ranks.
    timeout : float or None
        Seconds to wait for the other ranks, None for ever.

    Raises
    ------
    TypeError, ValueError
        model is no Module; comm is no communicator, is null or an intercommunicator; timeout is no number of
        seconds > 0.
    SyncError
        On every rank: the models differ in names, shapes or dtypes, or the ranks are not in the same call.
    SyncTimeoutError
        A rank did not join this call within the time limit.

    Examples
    --------
    >>> import arraybn
    >>> from arraybn.testing import ThreadComm
    >>> def work(comm):
    ...     layer = arraybn.BatchNorm1d(2)
    ...     layer.num_batches_tracked = 5 + comm.rank
    ...     arraybn.broadcast_state(layer, comm)
    ...     return layer.num_batches_tracked
    >>> ThreadComm.run(2, work)
    [5, 5]
    """
    state = list(_state(model)) if isinstance(model, Module) else []
    settings = {name: _dtype_and_shape(value) for name, _, value in state}
    call = begin(exchange_over("comm", comm), frames.BROADCAST, "the model", settings)
    if call is None:
        _check_module(model)
        as_timeout(timeout)
        return
    with call:  # an error inside goes to all ranks
        call.timeout = as_timeout(timeout)
        _check_module(model)
        own = [_native(as_numpy(name, value)) for name, _, value in state]
        octets = np.concatenate([np.zeros(0, np.uint8), *(array.reshape(-1).view(np.uint8) for array in own)])
        call.broadcast(octets)
        parts = _split(octets, [array.nbytes for array in own])
        arrays = [part.view(array.dtype).reshape(array.shape) for part, array in zip(parts, own, strict=True)]
        _replace(state, [_like(name, array, value) for array, (name, _, value) in zip(arrays, state, strict=True)])


def average_gradients(
    model: Module, comm: Comm | None, *, weight: float | None, exact: bool = False, timeout: float | None = TIMEOUT
) -> None:
    """Replace every gradient by Σw·g / Σw over the ranks, w being the weight of each; by Σg if w is None.

    Parameters
    ----------
    model : Module
        A model with the same parameters on all ranks.
    comm : mpi4py communicator or None
        The ranks; None for all ranks.
    weight : float or None
        This rank's w ≥ 0, the number of samples behind its gradients. With 0 its gradients are not read. None, on all
        ranks, adds the gradients up.
    exact : bool
        True for sums without rounding (E10), of float16, bfloat16 or float32; w is None or an integer ≤ 2²⁰.
    timeout : float or None
        Seconds to wait for the other ranks, None for ever.

    Raises
    ------
    TypeError, ValueError
        model is no Module, or has float64 parameters where exact is set; comm is no communicator, is null or an
        intercommunicator; weight or timeout is not what is said above.
    SyncError
        On every rank: one of these on some rank, the parameters differ in names, shapes or dtypes, or the ranks are not
        in the same call.
    SyncTimeoutError
        A rank did not join this call within the time limit.

    Notes
    -----
    A gradient that is None counts as 0, and stays None if it is None on every rank. Where all weights are 0 the
    gradients become 0, but with one rank, or without MPI, they stay as they are. The sums are taken in float64.

    Where each rank has the gradients of the mean loss over its batch, and the size of its batch as weight, the result
    is the gradient of the mean loss over all batches, as long as no rank's output depends on the batch of another rank.
    With `SyncBatchNorm` every output does. The loss gradients that enter `backward` then need one scale on all ranks:
    divide the loss of each rank by the size of all batches together, not by the size of its own. The gradients of the
    ranks then have to be added up: use `weight=None`. With batches of one size there is no difference.

    With exact=True the order of the ranks changes no bit: the sum is rounded once, to float64 and then to the dtype of
    the parameter. With weight=None the split of a batch into ranks, and their number, change no bit either of a
    parameter that has `Parameter.terms`. The layers with exact=True give their parameters terms; the gradient of any
    other layer is a rounded sum over the batch of a rank. A rank sends 96 bytes for each number of a gradient.

    Examples
    --------
    >>> import numpy, arraybn
    >>> from arraybn.testing import ThreadComm
    >>> def work(comm):
    ...     layer = arraybn.BatchNorm1d(1)
    ...     layer.bias.grad = numpy.asarray([4.0 * comm.rank])
    ...     arraybn.average_gradients(layer, comm, weight=1 + 2 * comm.rank)
    ...     return layer.bias.grad.tolist(), layer.weight.grad
    >>> ThreadComm.run(2, work)
    [([3.0], None), ([3.0], None)]
    """
    parameters = dict(model.named_parameters()) if isinstance(model, Module) else {}
    settings: dict[str, Any] = {name: _dtype_and_shape(parameter.data) for name, parameter in parameters.items()}
    settings |= {"exact": settings_text(exact), "weights": weight is not None}
    call = begin(exchange_over("comm", comm), frames.AVERAGE, "the model", settings)
    with call or nullcontext():  # an error inside goes to all ranks
        timeout = as_timeout(timeout)
        if call is not None:
            call.timeout = timeout
        _check_module(model)
        weight = _as_weight(weight, as_flag("exact", exact))
        for name, parameter in parameters.items():
            _check_exact(name, parameter, exact)
        if call is None and (weight is not None or not exact):
            return
        part: Any = _record if exact else _weighted
        there = _there(parameters.values(), exact)
        own = [part(name, parameter, weight) for name, parameter in parameters.items()]
        numbers = np.ascontiguousarray(np.concatenate([there, *own], axis=-1))
        total = 0 if call is None else call.add(weight or 0, numbers)
        together: Any = exact_sums.mean_of_values if exact else np.divide
        means = together(numbers[..., len(own) :], int(total) or 1 if exact else total or 1)
        parts = zip(parameters.items(), _split(means, [array.shape[-1] for array in own]), strict=True)
        new = [
            (parameter, _like(name, mean.reshape(parameter.data.shape), parameter.data))
            for ((name, parameter), mean), ranks in zip(parts, numbers.reshape(-1), strict=False)
            if ranks
        ]
        for parameter, gradient in new:
            parameter.grad = gradient


def _there(parameters: Iterable[Parameter], exact: bool) -> Array:
    """Return 1 for each parameter with a gradient, else 0, as a vector, or in each row of a record if `exact`."""
    found = np.asarray([parameter.grad is not None for parameter in parameters], np.int64)
    rows = (exact_sums.VALUE_LIMBS + exact_sums.KINDS,) if exact else ()
    return np.broadcast_to(found, (*rows, found.size))


def _check_module(model: object) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a Module; got {type(model).__name__}")


def _check_exact(name: str, parameter: Parameter, exact: bool) -> None:
    if exact and (dtype := dtype_name(parameter.data.dtype)) == "float64":
        raise TypeError(f"{name}: expected float16, bfloat16 or float32 for exact=True; got {dtype}")


def _as_weight(weight: Any, exact: bool) -> Any:
    if weight is None:
        return None
    if as_number("weight", weight) < 0:
        raise ValueError(f"weight: expected a number of samples ≥ 0; got {weight!r}")
    if exact and as_integer("weight", weight) > MOST_SAMPLES:
        raise ValueError(f"weight: expected at most {MOST_SAMPLES:,} samples for exact=True; got {weight!r}")
    return int(weight) if exact else float(weight)


def _weighted(name: str, parameter: Parameter, weight: float | None) -> Array:
    """Return w·g as a float64 vector on the host; 0 without a gradient or with w = 0, even where g is NaN."""
    if parameter.grad is None or weight == 0:
        return np.zeros(math.prod(parameter.data.shape))
    with np.errstate(all="ignore"):
        return (1 if weight is None else weight) * _on_host(name, parameter.grad).astype(np.float64)


def _record(name: str, parameter: Parameter, weight: int | None) -> Array:
    """(E10) Return the record (rows, size) of w·g, or that of the terms of g for a sum; 0 as above."""
    terms = parameter.terms if weight is None else None
    if parameter.grad is None or weight == 0:
        terms = []
    elif terms is None:
        terms = [parameter.grad]
    rows = np.asarray([_on_host(name, term) for term in terms])
    record = exact_sums.values(rows.reshape(len(terms), math.prod(parameter.data.shape), 1))
    return record if weight is None else weight * record


def _on_host(name: str, gradient: Array) -> Array:
    return as_numpy(name, gradient).reshape(-1)


def _state(model: Module) -> Iterator[tuple[str, Module, Any]]:
    """Return path, module and value of each parameter and each buffer."""
    for path, module in model.named_modules():
        parameters = {name: p.data for name, p in module._parameters.items() if p is not None}
        for name, value in {**parameters, **module._buffers}.items():
            if value is not None:
                yield f"{path}.{name}" if path else name, module, value


def _replace(state: Sequence[tuple[str, Module, Any]], values: Sequence[Any]) -> None:
    for (path, module, _), value in zip(state, values, strict=True):
        name = path.rpartition(".")[2]
        if name in module._parameters:
            module._parameters[name].data = value
        else:
            module._buffers[name] = value


def _split(vector: Array, sizes: Sequence[int]) -> list[Array]:
    """Return the consecutive parts of a vector, as views, which have these sizes and fill the vector."""
    return np.split(vector, np.cumsum(sizes, dtype=int))[:-1]


def _native(array: Array) -> Array:
    """Return `array` in native byte order, in which every rank reads its bytes."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _dtype_and_shape(value: Any) -> str:
    """Return 'float32 (3,)', or 'count' for an int."""
    return "count" if isinstance(value, int) else f"{dtype_name(value.dtype)} {tuple(value.shape)}"


def _like(name: str, numbers: Array, value: Any) -> Any:
    """Return the host's `numbers` as an int, or in the namespace and dtype and on the device of `value`."""
    if isinstance(value, int):
        return int(numbers)
    return converted(name, numbers, array_namespace(value), device(value), value.dtype)

"""A training that goes on when a rank dies: steps that are done by all ranks or undone on all, and the way on."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .._arrays.copies import copied
from .._arrays.namespaces import class_name
from ..modules import Module
from . import frames, mpi
from .communicators import check_comm, exchange_over
from .exchange import STEP, TIMEOUT, Comm, OpenStep, as_timeout, begin


@contextlib.contextmanager
def step(*state: Any, comm: Comm | None, timeout: float | None = TIMEOUT) -> Iterator[None]:
    """Do a training step on all ranks, or undo all of the step if a rank dies: a context.

    At its end all ranks agree that each of them has done the step. If a rank dies before that, every other rank raises
    a `RankLostError`, with `state` as before the step. The step can then be done again over its `survivors`.

    Parameters
    ----------
    *state : Module, optimizer or numpy.random.Generator
        The state that the step changes: the model, and whatever else has ``state_dict`` and ``load_state_dict``.
    comm : mpi4py communicator or None
        All ranks that take part in the step; None for all ranks of the job.
    timeout : float or None
        Seconds to wait for the other ranks, None for ever.

    Raises
    ------
    TypeError, ValueError
        A part of `state` is of another kind; comm is no communicator, is null or an intercommunicator; timeout is no
        number of seconds > 0.
    RuntimeError
        A step is under way.
    RankLostError
        On every rank that is left: the process of a rank has died. `state` is as before the step.
    SyncError, SyncTimeoutError
        The ranks are not at the end of the same step, or a rank did not come within the time limit.

    Notes
    -----
    Without fault tolerance in the MPI, or with one rank, this context does nothing. With fault tolerance it copies
    `state` at its start, and adds one small exchange at its end. Any other error leaves the state as it is.

    An error of MPI in a call of your own, such as ``comm.allreduce``, is a lost rank as well within a step.

    Examples
    --------
    A training loop that goes on without the ranks that die. A step that is undone does not count::

        index = 0
        while index < steps:
            try:
                with arraybn.sync.step(model, optimizer, comm=comm):
                    train_on(np.array_split(batches[index], comm.size)[comm.rank])
                index += 1
            except arraybn.RankLostError as error:
                comm = error.survivors
                arraybn.sync.continue_with(model, comm)

    >>> import numpy, arraybn
    >>> from arraybn.testing import ThreadComm
    >>> def work(comm):
    ...     model = arraybn.SyncBatchNorm(1, comm=comm)
    ...     with arraybn.sync.step(model, comm=comm):
    ...         model(numpy.ones((2, 1)))
    ...     return model.num_batches_tracked
    >>> ThreadComm.run(2, work)
    [1, 1]
    """
    exchange, limit = exchange_over("comm", comm), as_timeout(timeout)
    for part in state:
        _check_part(part)
    if exchange is None or exchange.reducer.recovery is None:
        yield
        return
    if STEP.get() is not None:
        raise RuntimeError("step: expected no step within a step; got one")
    restore = [_restorer(part) for part in state]
    opened = OpenStep(exchange)
    token = STEP.set(opened)
    try:
        yield
        _end(opened, limit)
    except Exception as error:
        if mpi.is_failure(error):
            raise exchange.unreachable("the step", error, limit) from error
        raise
    finally:
        STEP.reset(token)
        if opened.lost:
            for part in restore:
                part()


def _end(opened: OpenStep, limit: float | None) -> None:
    """Agree that every rank has done the step."""
    opened.ends = True
    call = begin(opened.exchange, frames.END, "the step", {}, timeout=limit)
    assert call is not None
    with call:
        call.combine(frames.NO_ROWS)


def _check_part(part: object) -> None:
    stateful = hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
    if not (isinstance(part, np.random.Generator) or stateful):
        raise TypeError(
            "state: expected a Module, a numpy.random.Generator, or an optimizer with state_dict and load_state_dict;"
            f" got {class_name(part)}"
        )


def _restorer(part: Any) -> Callable[[], object]:
    """Return a function that gives `part` the state that `part` has now."""
    if isinstance(part, Module):
        return _restorer_of_module(part)
    if isinstance(part, np.random.Generator):
        before = part.bit_generator.state
        return lambda: setattr(part.bit_generator, "state", before)
    state = copy.deepcopy(part.state_dict())  # PyTorch's holds the arrays themselves
    return lambda: part.load_state_dict(state)


def _restorer_of_module(model: Module) -> Callable[[], None]:
    """Return a function that restores parameters, gradients, buffers and the remembered forwards of a model.

    The arrays are copied, because code of the user's may write into them.
    """
    values = [(p, _copied(p.data), _copied(p.grad)) for p in model.parameters()]
    tables = [
        (module, {name: _copied(value) for name, value in module._buffers.items()}, module._remembered)
        for module in model.modules()
    ]

    def restore() -> None:
        for parameter, data, grad in values:
            parameter.data, parameter.grad = data, grad
        for module, buffers, remembered in tables:
            module._buffers.update(buffers)
            module._remember(remembered)

    return restore


def _copied(value: Any) -> Any:
    return value if value is None or isinstance(value, int) else copied(value)


def continue_with(model: Module, survivors: Comm) -> None:
    """Let every synchronized layer of a model synchronize over the ranks that are left.

    Parameters
    ----------
    model : Module
        The model. Its values stay: all ranks have the same.
    survivors : mpi4py communicator
        That of the `RankLostError`, or a part of that communicator.

    Raises
    ------
    TypeError, ValueError
        model is no Module; survivors is no communicator, is null or an intercommunicator. Nothing has been changed.

    Examples
    --------
    >>> import arraybn
    >>> from arraybn.testing import ThreadComm
    >>> def work(comm):
    ...     model = arraybn.Sequential(arraybn.SyncBatchNorm(3), arraybn.SyncBatchNorm(3))
    ...     arraybn.sync.continue_with(model, comm)
    ...     return [layer.process_group is comm for layer in model]
    >>> ThreadComm.run(2, work)[0]
    [True, True]
    """
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a Module; got {type(model).__name__}")
    if survivors is None:
        raise TypeError("survivors: expected the communicator of a RankLostError; got None")
    check_comm("survivors", survivors)
    for module in model.modules():
        if hasattr(module, "process_group"):
            module.process_group = survivors

"""Running statistics of whole data sets: exactly pooled, in the place of the average that training has kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from . import reference, sync
from ._arrays.copies import filled, widened
from ._arrays.devices import on_device_of
from ._arrays.namespaces import Array, array_namespace, class_name, is_array_api_obj
from ._checks import as_flag
from .layers import SyncBatchNorm, _BatchNorm
from .modules import Module, inference_mode
from .reference import Moments
from .sync import Call, Comm, RankPool

_NAME = "recompute_running_stats"


def recompute_running_stats(
    model: Module, batches: Iterable[Any], *, comm: Comm | None = None, layer_by_layer: bool = False
) -> None:
    """Set running_mean and running_var of every layer to those of all batches together, exactly pooled (E1, E2).

    Parameters
    ----------
    model : Module
        A model, or one batch norm. Layers without running statistics, and layers that no batch reaches, stay as they
        are, and so do the modes of all modules, the gradients and num_batches_tracked.
    batches : iterable of arrays (N, C, *S)
        The inputs, of any sizes; or tuples and lists with the input first, such as (x, labels). With layer_by_layer a
        list, or another iterable that starts anew each time.
    comm : mpi4py communicator, optional
        Its ranks call this function together, each with batches of its own, of any number and size. None: the ranks
        of the model's SyncBatchNorm layers; without such layers, this process alone.
    layer_by_layer : bool
        False: one pass over the batches. Each layer normalizes a batch with the statistics of that batch, as in
        training, so the input of a later layer is that of training, not that of evaluation. True: one pass for each
        layer. Earlier layers then use their new statistics, so that every layer gets the exact statistics of its
        input in evaluation. For one batch norm both are the same.

    Raises
    ------
    TypeError, ValueError
        An argument is not as said; the model has no running statistics; no batch norm got more than one value per
        channel.
    SyncError
        Over ranks, on every rank: one of these on some rank, or the ranks are not in the same call.

    Notes
    -----
    Use this after weight averaging, and before evaluation where a momentum average is too old or too noisy: an average
    with momentum 0.1 is made of some twenty batches. Other modules, such as a dropout, run in the mode they are in.
    A call that raises has changed nothing.

    References
    ----------
    Y. Wu, J. Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3. ``torch.optim.swa_utils.update_bn``.

    Examples
    --------
    >>> import numpy, arraybn
    >>> layer = arraybn.BatchNorm1d(1)
    >>> arraybn.recompute_running_stats(layer, [numpy.asarray([[0.0], [2.0]]), numpy.asarray([[7.0]])])
    >>> layer.running_mean, layer.running_var
    (array([3.], dtype=float32), array([13.], dtype=float32))
    """
    layers = dict(_tracking_layers(model))
    exchange = sync.exchange_over("comm", comm) if comm is not None else _exchange_of(layers)
    calls = _Calls(exchange, layers)
    with calls.first or nullcontext():
        _check(model, layers, batches, as_flag("layer_by_layer", layer_by_layer))
        with _restored_on_error(layers), inference_mode():
            if not layer_by_layer:
                found = _gathered(model, layers, batches, calls)
                numbers = [_replace(path, layer, found.get(path), calls) for path, layer in layers.items()]
            else:
                numbers = list(_each_in_turn(model, layers, batches, calls))
            if max(numbers, default=0) == 0:
                calls.every_rank_raises()
                raise ValueError("batches: expected values for a batch norm of the model; got none")


class _Calls:
    """The calls of all ranks, one for each layer; the first call is open before there are numbers."""

    def __init__(self, exchange: sync.Exchange | None, layers: dict[str, _BatchNorm]) -> None:
        self._exchange, self._settings = exchange, {path: str(layer.num_features) for path, layer in layers.items()}
        self.first = self.current = self._new()

    def _new(self) -> Call | None:
        return sync.begin(self._exchange, sync.FORWARD, _NAME, self._settings)

    def every_rank_raises(self) -> None:
        """Promise that all ranks raise the error that follows."""
        if self.first is not None:
            self.first.every_rank_raises()

    def pooled(self, path: str, part: Moments) -> Moments:
        """(E2) Return the moments of all ranks' parts together, for the layer of that path."""
        if (call := self.current) is None:
            return part
        call.layer = f"{_NAME} for layer {path!r}"
        ranks = RankPool(call)
        whole = ranks.moments(part)
        self.current = self._new()
        return Moments(whole.n, *ranks.home(whole.mean, whole.m2))

    def no_layer(self) -> None:
        """Agree that no further layer has got a batch on any rank."""
        if self.current is not None:
            self.current.combine(np.zeros((2, 0)))


def _tracking_layers(model: object) -> Iterator[tuple[str, _BatchNorm]]:
    """Return path and layer of each batch norm with running statistics."""
    for path, layer in model.named_modules() if isinstance(model, Module) else ():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None:
            yield path, layer


def _exchange_of(layers: dict[str, _BatchNorm]) -> sync.Exchange | None:
    """Return the exchange of the SyncBatchNorm layers; None without such layers."""
    groups = {id(group): group for layer in layers.values() if isinstance(layer, SyncBatchNorm)
              for group in [layer.process_group]}  # fmt: skip
    if len(groups) > 1:
        raise ValueError("comm: expected a communicator, because the layers have several process groups; got None")
    return sync.exchange_over("process_group", *groups.values()) if groups else None


def _check(model: object, layers: dict[str, _BatchNorm], batches: object, several: bool) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a Module; got {type(model).__name__}")
    if not layers:
        raise ValueError("model: expected a batch norm with running statistics; got none")
    if is_array_api_obj(batches) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of arrays, such as [x]; got {class_name(batches)}")
    if several and isinstance(batches, Iterator):
        raise ValueError(
            "batches: expected an iterable that starts anew for each layer, such as a list, because layer_by_layer is"
            f" set; got {class_name(batches)}"
        )


@contextmanager
def _restored_on_error(layers: dict[str, _BatchNorm]) -> Iterator[None]:
    """Let every layer have the buffers that it had, if the block raises."""
    before = [(layer, dict(layer._buffers)) for layer in layers.values()]
    try:
        yield
    except BaseException:
        for layer, buffers in before:
            layer._buffers.update(buffers)
        raise


def _gathered(
    model: Module, layers: dict[str, _BatchNorm], batches: Iterable[Any], calls: _Calls, first_only: bool = False
) -> dict[str, Moments]:
    """Return the moments of all batches for each layer that was called, or for the first such layer alone."""
    found: dict[str, Moments] = {}
    with calls.current or nullcontext():  # an error inside goes to all ranks
        _hand_over(model, layers, batches, found, first_only)
    return found


def _hand_over(
    model: Module, layers: dict[str, _BatchNorm], batches: Iterable[Any], found: dict[str, Moments], first_only: bool
) -> None:
    """Run the model on all batches, and add the moments that its layers hand over to `found`."""

    def gatherer(path: str) -> Callable[[Moments], None]:
        def gather(batch: Moments) -> None:
            if path in found:
                with on_device_of(batch.mean):
                    found[path] = reference.pool(found[path], batch)
            elif not (first_only and found):
                found[path] = batch

        return gather

    try:
        for path, layer in layers.items():
            layer._gather = gatherer(path)
        for batch in batches:
            model(batch[0] if isinstance(batch, tuple | list) and batch else batch)
    finally:
        for layer in layers.values():
            layer._gather = None


def _each_in_turn(model: Module, layers: dict[str, _BatchNorm], batches: Iterable[Any], calls: _Calls) -> Iterator[int]:
    """Replace the statistics of one layer after another, in the order of their calls; return the numbers of values."""
    modes, left = {path: layer.training for path, layer in layers.items()}, dict(layers)
    try:
        for layer in layers.values():  # once its statistics are new, a layer has to use them
            layer.training = False
        while left and (found := _gathered(model, left, batches, calls, first_only=True)):
            ((path, part),) = found.items()
            yield _replace(path, left.pop(path), part, calls)
        calls.no_layer()
    finally:
        for path, layer in layers.items():
            layer.training = modes[path]


def _replace(path: str, layer: _BatchNorm, part: Moments | None, calls: _Calls) -> int:
    """Replace the running statistics of a layer by those of all ranks' parts; return the number of values."""
    mean, var = layer.running_mean, layer.running_var
    with on_device_of(mean):
        if part is None:
            zero = filled(widened(mean), 0.0)
            part = Moments(0, zero, zero)
        whole = calls.pooled(path, part)
        if whole.n == 1:
            calls.every_rank_raises()
            raise ValueError(f"batches: expected more than 1 value per channel for layer {path!r}; got 1")
        if whole.n > 1:
            layer.running_mean, layer.running_var = _as(mean, whole.mean), _as(var, whole.var(1))
    return whole.n


def _as(like: Array, values: Array) -> Array:
    return array_namespace(like).astype(values, like.dtype, copy=False)

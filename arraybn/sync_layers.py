"""The synchronized layer, and the conversion of models to it and back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from . import sync
from ._arrays.devices import at
from ._arrays.namespaces import Array, Namespace, dtype_name
from ._checks import as_number, check_like
from .layers import _BatchNorm
from .modules import Module
from .sync import Call, Comm

M = TypeVar("M", bound=Module)


class _Group:
    """A communicator, which copies share, and in place of which a pickle has the world."""

    __slots__ = ("comm",)

    def __init__(self, comm: Comm | None = None) -> None:
        self.comm = comm

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        return self

    def __reduce__(self) -> tuple[type[_Group], tuple[()]]:
        return _Group, ()


class SyncBatchNorm(_BatchNorm):
    """Batch normalization of (N, C, *S) with the statistics of all ranks' batches together (E2, E3).

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, channel_axis, dtype, device, xp : optional
        As in `BatchNorm1d`.
    process_group : mpi4py communicator, optional
        The ranks that synchronize; None for all of them.
    timeout : float or None
        Seconds to wait for the other ranks, None for ever.

    Attributes
    ----------
    weight, bias, running_mean, running_var, num_batches_tracked
        As in `BatchNorm1d`. The gradients of weight and bias are local sums, as in PyTorch.
    process_group, timeout
        As given; both may be changed.

    Raises
    ------
    TypeError, ValueError
        An argument is not as said; a process_group that is null or an intercommunicator.

    Notes
    -----
    Ranks are synchronized when batch statistics are used: in training, and in evaluation without running statistics. A
    forward or backward is then a call of all ranks, with one collective for up to 256 channels. A rank may have an
    empty batch. With one rank, or without MPI, this is `BatchNorm1d` bit for bit.

    An error on one rank is a `SyncError` on all of them, and no state has changed. A rank that does not come is a
    `SyncTimeoutError` on those that wait for it.

    Copies share the communicator. A pickle has none: after unpickling, the world is synchronized. A layer made by
    `convert_sync_batchnorm` is known to the other ranks by its path; others by the order of their first use.

    On GPUs each rank takes the one of its number on the machine, before it allocates; several ranks may share one::

        local = comm.Split_type(MPI.COMM_TYPE_SHARED).rank
        cupy.cuda.Device(local % cupy.cuda.runtime.getDeviceCount()).use()

    The numbers of the ranks go through host memory, so that every MPI will do, and the host waits for the GPU once in a
    forward and once in a backward.

    References
    ----------
    ``torch.nn.SyncBatchNorm``.

    Examples
    --------
    >>> import numpy, arraybn
    >>> from arraybn.testing import ThreadComm
    >>> def work(comm):
    ...     layer = arraybn.SyncBatchNorm(1, process_group=comm)
    ...     return layer(numpy.asarray([[1.0], [3.0]]) + 4 * comm.rank).round(2).tolist()
    >>> ThreadComm.run(2, work)
    [[[-1.34], [-0.45]], [[0.45], [1.34]]]
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Comm | None = None,
        *,
        channel_axis: int = 1,
        dtype: Any = None,
        device: Any = None,
        xp: Namespace | None = None,
        timeout: float | None = sync.TIMEOUT,
    ) -> None:
        home = {"channel_axis": channel_axis, "dtype": dtype, "device": device, "xp": xp}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **home)
        self.process_group = process_group
        self.timeout = timeout
        self._path = ""  # in the model that it was converted in
        self._converted_from: type[_BatchNorm] | None = None

    @property
    def process_group(self) -> Comm | None:
        """The communicator; None for the world."""
        return self._group.comm

    @process_group.setter
    def process_group(self, comm: Comm | None) -> None:
        sync.check_comm("process_group", comm)
        self._group = _Group(comm)

    @property
    def timeout(self) -> float | None:
        """Seconds to wait for the other ranks; None for ever."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        if seconds is not None and not 0 < as_number("timeout", seconds) <= threading.TIMEOUT_MAX:
            raise ValueError(
                f"timeout: expected a number of seconds > 0 and ≤ {threading.TIMEOUT_MAX:g}, or None to wait for ever;"
                f" got {seconds!r}"
            )
        self._timeout = None if seconds is None else float(seconds)

    def _check_input_dim(self, x: Array) -> None:
        if x.ndim < 2:
            raise ValueError(f"expected at least 2D input (got {x.ndim}D input)")

    # ---- Forward and backward as calls of all ranks ----

    def forward(self, x: Array) -> Array:
        """As `BatchNorm1d.forward`, with the statistics of all ranks; raises a SyncError on all of them.

        Each channel having one value over all ranks is the plain layer's ValueError, on every rank.
        """
        call = self._begin(sync.FORWARD) if self._uses_batch_statistics() else None
        if call is None:
            return super().forward(x)
        with call, at(x):
            return self._forward(x, call)

    def backward(self, dy: Array) -> Array:
        """As `BatchNorm1d.backward`; dx knows of all ranks, weight.grad and bias.grad of this one's batch alone."""
        if self._remembered is not None:
            call = self._remembered._backward_call()
            if call is not None:
                call.timeout = self.timeout  # it may have been changed
        else:  # an error, which the others have to hear of if they are waiting
            call = self._begin(sync.BACKWARD) if self._uses_batch_statistics() else None
        if call is None:
            return super().backward(dy)
        with call, at(dy):
            for parameter in (self.weight, self.bias):
                if parameter is not None:  # otherwise this would fail after the exchange
                    check_like("gradient", self._recall()._mean, parameter.data, "data")
            return self._backward(dy, call)

    def _uses_batch_statistics(self) -> bool:
        evaluation = isinstance(self.training, bool | np.bool_) and not self.training  # anything else is an error
        return not evaluation or (self.running_mean is None and self.running_var is None)

    def _begin(self, operation: str) -> Call | None:
        if (exchange := sync.exchange_over("process_group", self.process_group)) is None:
            return None
        count, array = self.num_batches_tracked, self._an_array()
        settings = {
            "num_features": sync.settings_text(self.num_features).removesuffix(".0"),
            "eps": sync.settings_text(self.eps),
            "momentum": sync.settings_text(self.momentum),
            "affine": self.weight is not None,
            "track_running_stats": sync.settings_text(self.track_running_stats),
            "running statistics": self.running_mean is not None,
            "training": sync.settings_text(self.training),
            "dtype": None if array is None else dtype_name(array.dtype),
        }
        options = {"batches": count if isinstance(count, int) else None, "timeout": self.timeout}
        return sync.begin(exchange, operation, self._path or self, settings, **options)

    def extra_repr(self) -> str:
        """As PyTorch prints it, and the time limit where it is not the default."""
        text = super().extra_repr()
        return text if self.timeout == sync.TIMEOUT else f"{text}, timeout={self.timeout}"

    # ---- Conversion ----

    @classmethod
    def convert_sync_batchnorm(cls, module: M, process_group: Comm | None = None) -> M:
        """The module with every batch norm layer in it replaced by a SyncBatchNorm, in place.

        A bare layer is returned as a new one. Parameters and buffers are handed over, not copied; an existing
        SyncBatchNorm is replaced too, to get the new group. A layer that is registered twice becomes one layer. A
        subclass with a forward, backward or train of its own loses them until `revert_sync_batchnorm`.

        Parameters
        ----------
        module : Module
            The model, or one layer.
        process_group : mpi4py communicator, optional
            The ranks that synchronize; None for all of them.

        Raises
        ------
        TypeError, ValueError
            module is no Module; process_group is no communicator, is null or an intercommunicator.

        Examples
        --------
        >>> import arraybn
        >>> arraybn.SyncBatchNorm.convert_sync_batchnorm(arraybn.Sequential(arraybn.BatchNorm2d(3)))
        Sequential(
          (0): SyncBatchNorm(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
        )
        """
        sync.check_comm("process_group", process_group)

        def convert(path: str, layer: _BatchNorm) -> Module:
            if isinstance(layer, SyncBatchNorm):
                new = _as_class(type(layer), layer)
            else:
                new = _as_class(cls, layer)
                new.timeout, new._converted_from = sync.TIMEOUT, type(layer)
            new._path, new.process_group = path, process_group
            return new

        return _replaced(module, _BatchNorm, convert)

    @classmethod
    def revert_sync_batchnorm(cls, module: M) -> M:
        """The module with every SyncBatchNorm in it replaced by what it was converted from, in place.

        Parameters
        ----------
        module : Module
            The model, or one layer, which is returned as a new one.

        Raises
        ------
        TypeError
            module is no Module.
        ValueError
            A layer was built as a SyncBatchNorm, so that its dimensions are not known. Nothing has been replaced.

        Examples
        --------
        >>> import arraybn
        >>> model = arraybn.SyncBatchNorm.convert_sync_batchnorm(arraybn.Sequential(arraybn.BatchNorm2d(3)))
        >>> arraybn.SyncBatchNorm.revert_sync_batchnorm(model)
        Sequential(
          (0): BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
        )
        """

        def revert(path: str, layer: SyncBatchNorm) -> Module:
            if layer._converted_from is None:
                raise ValueError(
                    f"module: expected layers that convert_sync_batchnorm made; got one at {path or 'the top'!r} that"
                    " was built as a SyncBatchNorm. Replace it by a BatchNorm1d, 2d or 3d, as its inputs are"
                )
            old = _as_class(layer._converted_from, layer)
            for name in ("_group", "_timeout", "_path", "_converted_from"):
                object.__delattr__(old, name)
            return old

        return _replaced(module, SyncBatchNorm, revert)


N = TypeVar("N", bound=_BatchNorm)


def _as_class(kind: type[N], layer: _BatchNorm) -> N:
    """A layer of that class with all attributes of `layer`: its parameters themselves, its buffers, its training."""
    new = kind.__new__(kind)
    new.__dict__.update(layer.__getstate__())
    return new


def _replaced(module: M, kind: type[Any], new: Callable[[str, Any], Module]) -> M:
    """`module` with every layer of that class replaced; all of the new layers are made before one is put in place."""
    if not isinstance(module, Module):
        raise TypeError(f"module: expected a Module; got {type(module).__name__}")
    made = {id(found): new(path, found) for path, found in module.named_modules() if isinstance(found, kind)}
    for parent in [*(kept for kept in module.modules() if id(kept) not in made), *made.values()]:
        for name, child in parent._modules.items():
            parent._modules[name] = made.get(id(child), child)
    return made.get(id(module), module)  # type: ignore[return-value]

"""The layers: batch norm with its state, under the names and with the semantics of ``torch.nn.BatchNorm*``.

The state of a batch norm lives here and nowhere else. Every stateful call validates, then computes, then commits: one
that raises has changed nothing.
"""

from __future__ import annotations

import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any, TypeAlias, TypeVar

import numpy as np

from . import reference, sync
from ._arrays.copies import filled, widened
from ._arrays.devices import check_device, on_device, on_device_of
from ._arrays.namespaces import (
    Array,
    Namespace,
    Shaped,
    array_namespace,
    as_dtype,
    as_namespace,
    class_name,
    dtype_name,
    namespace_name,
)
from ._checks import (
    as_channel_vector,
    as_eps,
    as_flag,
    as_floating,
    as_integer,
    as_number,
    check_lasting,
    check_like,
    check_values,
)
from .functional import Saved, SavedRows, backward_in, forward_in
from .modules import Module, Parameter, Row
from .reference import Moments
from .statistics import update_unchecked
from .sync import Call, Comm

M = TypeVar("M", bound=Module)
N = TypeVar("N", bound="_BatchNorm")


class _NormBase(Module):
    """The parameters and buffers of a batch norm."""

    _version = 2
    weight: Parameter  # None with affine=False, bias also with bias=False: an Optional is in the way of type checkers
    bias: Parameter
    running_mean: Array | None
    running_var: Array | None
    num_batches_tracked: int | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        exact: bool = False,
        channel_axis: int = 1,
        dtype: Any = None,
        device: Any = None,
        xp: Namespace | None = None,
    ) -> None:
        super().__init__()
        self.num_features = as_integer("num_features", num_features, 1)
        self.eps = as_eps(eps)
        self.momentum = None if momentum is None else as_number("momentum", momentum)
        self.affine = as_flag("affine", affine)
        self.track_running_stats = as_flag("track_running_stats", track_running_stats)
        bias, self.exact = as_flag("bias", bias), as_flag("exact", exact)
        self.channel_axis = as_integer("channel_axis", channel_axis)
        xp = as_namespace(np if xp is None else xp)
        self._check_to(dtype)
        check_device(xp, device)
        home = {"dtype": as_dtype("float32" if dtype is None else dtype, xp), "device": device}
        shape = (self.num_features,)
        with on_device(device):
            self.register_parameter("weight", Parameter(xp.ones(shape, **home)) if self.affine else None)
            self.register_parameter("bias", Parameter(xp.zeros(shape, **home)) if self.affine and bias else None)
            self.register_buffer("running_mean", xp.zeros(shape, **home) if self.track_running_stats else None)
            self.register_buffer("running_var", xp.ones(shape, **home) if self.track_running_stats else None)
        self.register_buffer("num_batches_tracked", 0 if self.track_running_stats else None)

    def reset_running_stats(self) -> None:
        """Set running_mean 0, running_var 1 and num_batches_tracked 0, where they are tracked."""
        if not self.track_running_stats:
            return
        if self.running_mean is not None:
            self.running_mean = filled(self.running_mean, 0.0)
        if self.running_var is not None:
            self.running_var = filled(self.running_var, 1.0)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked = 0

    def reset_parameters(self) -> None:
        """Reset the running statistics, and set weight 1 and bias 0."""
        self.reset_running_stats()
        if self.weight is not None:
            self.weight.data = filled(self.weight.data, 1.0)
        if self.bias is not None:
            self.bias.data = filled(self.bias.data, 0.0)

    def _check_input_dim(self, x: Array) -> None:
        """Raise a ValueError unless x has a number of dimensions that this layer takes."""
        raise NotImplementedError(f"{type(self).__name__} does not say which inputs it takes")

    def extra_repr(self) -> str:
        """Return the arguments as PyTorch prints them, then further arguments that are not the default."""
        weight, bias = self._own_parameters()
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"
        text += ", bias=False" if bias is None and weight is not None else ""
        text += f", track_running_stats={self.track_running_stats}"
        if self.exact:
            text += ", exact=True"
        if self.channel_axis != 1:
            text += f", channel_axis={self.channel_axis}"
        if (array := self._an_array()) is not None:
            xp, name = array_namespace(array), dtype_name(array.dtype)
            text += f", dtype={name}" if name != "float32" else ""
            text += f", xp={namespace_name(xp)}" if namespace_name(xp) != "numpy" else ""
        return text

    def _own_parameters(self) -> tuple[Parameter | None, Parameter | None]:
        """Return weight and bias, without the detour of `Module.__getattr__`."""
        return self._parameters["weight"], self._parameters["bias"]

    def _an_array(self) -> Array | None:
        """Return one of this layer's arrays, all of one namespace and device; None if there is none."""
        for parameter in self._own_parameters():
            if parameter is not None:
                return parameter.data
        mean = self._buffers["running_mean"]
        return self._buffers["running_var"] if mean is None else mean

    def _check_to(self, dtype: Any) -> None:
        if dtype is not None and (name := dtype_name(dtype)) in ("float16", "bfloat16"):
            raise TypeError(
                f"dtype: expected float32 or float64, because running averages drift in {name}; got {name}."
                " Inputs may be of any floating dtype whatever the layer's"
            )

    def _load_from_state_dict(
        self,
        state_dict: OrderedDict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        version, key = local_metadata.get("version"), prefix + "num_batches_tracked"
        if (version is None or version < 2) and self.num_batches_tracked is not None:
            state_dict.setdefault(key, 0)  # version 1 did not count
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if (key := prefix + "running_var") in state_dict and self.running_var is not None:
            _warn_of_variance(key, self.running_var)


def _warn_of_variance(key: str, var: Array) -> None:
    with on_device_of(var):
        xp = array_namespace(var)
        number = int(xp.sum(xp.astype(~(var >= 0), xp.int32)))
    if number:
        warnings.warn(
            f"{key}: expected variances ≥ 0; got {number} that are negative or NaN. They are loaded, as in PyTorch;"
            " evaluation gives NaN in these channels",
            RuntimeWarning,
            stacklevel=4,
        )


# Mean and var before a batch, the weight of the batch in both, and the number of batches after the batch.
_Tracking: TypeAlias = tuple[Array | None, Array | None, float, int | None]


class _BatchNorm(_NormBase):
    """Forward and backward of a batch norm."""

    _gather: Callable[[Moments], None] | None = None  # takes the moments of each batch, in place of the buffers
    _repeat: _Repeat | None = None  # the short way for inputs like the latest one

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a copy or a pickle."""
        state = super().__getstate__()
        state.pop("_repeat", None)
        return state

    def __call__(self, x: Shaped, *, where: Shaped | None = None) -> Array:
        """Return `forward(x)`, or `forward(x, where=where)`."""
        return self.forward(x) if where is None else self.forward(x, where=where)

    def forward(self, x: Array, *, where: Array | None = None) -> Array:
        """Normalize x (N, C, *S), with the batch's statistics in training and the running ones in evaluation.

        Returns y in the dtype and memory layout of x. In training the running statistics take in the batch.

        `where` (N, *S) is a mask, True at the positions that belong to the batch, as in `arraybn.batch_norm`; y and
        dx are given at all positions. In evaluation with running statistics a mask has no effect.

        Raises
        ------
        TypeError
            x or where is no array of this layer's namespace, x is not of a real floating dtype, where is not boolean.
        ValueError
            The dimensions or channels of x are not those of this layer, where has another shape, or each channel has
            one value, which is no statistic.
        """
        if type(x) is np.ndarray:  # without the detour
            return self._forward(x, None, where)
        if where is None and self._repeat is not None and (y := self._repeat.forward(self, x)) is not None:
            return y
        with on_device_of(x):
            return self._forward(x, None, where)

    def _forward(self, x: Array, call: Call | None, where: Array | None) -> Array:
        """Carry out `forward` as a part of `call`, or alone."""
        x = as_floating("x", x)
        if type(x) is not np.ndarray or type(self._an_array()) is not np.ndarray:
            check_lasting("x", x, self._an_array())
        self._check_input_dim(x)
        self._check_channels(x)
        fixed, tracking = self._fixed_statistics(x), self._tracking(x)
        weight, bias = self._own_parameters()
        weight, bias = None if weight is None else weight.data, None if bias is None else bias.data
        options: dict[str, Any] = {"eps": self.eps, "channel_axis": self.channel_axis, "exact": self.exact}
        y, saved = forward_in(call, x, weight, bias, where=where, **fixed, **options)
        if (moments := saved._moments) is not None:
            if call is not None and moments.n == 1:
                call.every_rank_raises()
            self._buffers.update(self._tracked(moments, x, tracking, where is not None))
        self._remember(saved)
        if call is None and type(x) is not np.ndarray:
            object.__setattr__(self, "_repeat", _Repeat.of(self, x, saved))
        return y

    def backward(self, dy: Array) -> Array:
        """Return the gradient by x of the latest forward, from dy (N, C, *S); adds to weight.grad and bias.grad.

        Raises
        ------
        RuntimeError
            There was no forward since the last backward.
        TypeError, ValueError
            dy is not like y.
        """
        if type(dy) is np.ndarray:
            return self._backward(dy, None)
        if self._repeat is not None and (dx := self._repeat.backward(self, dy)) is not None:
            return dx
        with on_device_of(dy):
            return self._backward(dy, None)

    def _backward(self, dy: Array, call: Call | None) -> Array:
        """Carry out `backward` as a part of `call`, or alone."""
        if type(dy) is not np.ndarray:
            check_values("dy", dy)
        saved = self._recall()
        dx, dweight, dbias = backward_in(call, dy, saved)
        weight, bias = self._own_parameters()
        terms = saved.share_of_gradients(dweight, dbias) if self.exact else ()
        self._finish_backward((weight, dweight), (bias, dbias), terms=terms)
        return dx

    def _check_channels(self, x: Array) -> None:
        if not -x.ndim <= as_integer("channel_axis", self.channel_axis) < x.ndim:
            raise ValueError(f"x: expected an axis {self.channel_axis} (channel_axis); got shape {tuple(x.shape)}")
        if (channels := x.shape[self.channel_axis]) != self.num_features:
            as_integer("num_features", self.num_features, 1)
            last = x.shape[-1] == self.num_features and self.channel_axis != -1
            raise ValueError(
                f"x: expected {self.num_features} channels (num_features) on axis {self.channel_axis};"
                f" got {channels}, in shape {tuple(x.shape)}"
                + (". For channels-last, build the layer with channel_axis=-1" if last else "")
            )

    def _raise_not_alone(self) -> None:
        raise RuntimeError(
            f"{type(self).__name__}.forward: expected one thread at a time in training; got a change of"
            " num_batches_tracked during the forward, by another thread. Nothing of this batch is kept. Give each"
            " thread a layer of its own (copy.deepcopy), or hold a lock around forward and backward"
        )

    def _fixed_statistics(self, x: Array) -> dict[str, Array]:
        """Return the running statistics, by name, where x is to be normalized with them; otherwise no item."""
        as_flag("training", self.training)
        as_flag("track_running_stats", self.track_running_stats)
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        if (mean is None) != (var is None):
            which = "running_mean" if mean is None else "running_var"
            raise ValueError(
                f"running_mean and running_var: expected either both or neither to be None; got None for {which} alone"
            )
        if self.training or mean is None or self._gather is not None:
            return {}
        as_channel_vector("running_mean", mean, x, self.num_features)  # `batch_norm` would name a wrong array "mean"
        as_channel_vector("running_var", var, x, self.num_features)
        return {"mean": mean, "var": var}

    def _tracking(self, x: Array) -> _Tracking | None:
        """Return the buffers and momentum for the batch x, checked before there is a result; None without tracking."""
        if not (self.training and self.track_running_stats) or self._gather is not None:
            return None
        buffers, momentum = self._buffers, self.momentum
        count, mean, var = buffers["num_batches_tracked"], buffers["running_mean"], buffers["running_var"]
        if count is not None:
            count = as_integer("num_batches_tracked", count, 0) + 1
        if mean is None:
            return None, None, 0.0, count
        if momentum is None:  # the average of all batches so far
            momentum = 1 / count if count else 0.0
        mean = as_channel_vector("running_mean", mean, x, self.num_features)
        var = as_channel_vector("running_var", var, x, self.num_features)
        return mean, var, as_number("momentum", momentum), count

    def _tracked(self, moments: Moments, x: Array, tracking: _Tracking | None, masked: bool) -> dict[str, Any]:
        """Return the buffers that this batch changes, by name."""
        if self._gather is not None:
            self._gather(moments)
            return {}
        if moments.n == 1:
            remedy = "or use eval()" if self.training else "or keep running statistics"
            true = " with one True in where" if masked else ""
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}{true}."
                f" Leave out the last incomplete batch, {remedy}"
            )
        if tracking is None or moments.n == 0:
            return {}
        mean, var, momentum, count = tracking
        changed = {"num_batches_tracked": count}
        if mean is not None and momentum != 0:  # 0·NaN would be NaN
            changed["running_mean"], changed["running_var"] = update_unchecked(mean, var, moments, momentum)
        # Python changes threads when a function is called; after this comparison, only `dict.update` is.
        if count is not None and self._buffers["num_batches_tracked"] != count - 1:
            self._raise_not_alone()
        return changed


class _Repeat:
    """A training step for inputs like one that passed all checks: one launch forward and one backward, on CuPy.

    Each method returns None where anything is not as it was, so that the checks and the further ways serve that call.
    """

    __slots__ = ("backend", "layout", "settings", "trainer")

    def __init__(self, layer: _BatchNorm, x: Array, saved: Saved) -> None:
        self.backend, self.layout, self.settings = saved._backend, saved._layout, self._settings(layer)
        self.trainer = self.backend.trainer(x, self.layout.ncs, layer._buffers["running_mean"], layer.eps)

    @classmethod
    def of(cls, layer: _BatchNorm, x: Array, saved: Saved) -> _Repeat | None:
        """Return the short way for inputs like x, if the step that gave `saved` has one."""
        if saved._moments is None or saved._moments.n < 2 or saved._layout.order is not None:
            return None
        tracks = layer.training is True and layer.track_running_stats is True and layer.momentum != 0
        if not tracks or layer.exact is not False or layer._buffers["running_mean"] is None:
            return None
        self = cls(layer, x, saved)
        return self if self.trainer is not None and self.trainer.input(x) != -1 else None

    @staticmethod
    def _settings(layer: _BatchNorm) -> tuple[Any, ...]:
        statistics = layer.training, layer.track_running_stats, layer.momentum, layer.exact
        return *statistics, layer.eps, layer.channel_axis, layer.num_features

    def forward(self, layer: _BatchNorm, x: Array) -> Array | None:
        """Return y, and replace the running statistics."""
        trainer, buffers, (weight, bias) = self.trainer, layer._buffers, layer._own_parameters()
        count, momentum = buffers["num_batches_tracked"], layer.momentum
        same = all(map(operator.is_, self.settings, self._settings(layer)))
        if not (same and type(count) is int and count >= 0 and layer._gather is None):
            return None
        data, state = (
            trainer.input(x),
            (trainer.vector(buffers["running_mean"]), trainer.vector(buffers["running_var"])),
        )
        parameters = (
            0 if weight is None else trainer.vector(weight.data),
            0 if bias is None else trainer.vector(bias.data),
        )
        if -1 in (data, *parameters, *state):
            return None
        momentum = 1 / (count + 1) if momentum is None else float(momentum)
        y, rows, (mean, var) = trainer.forward(data, parameters, state, momentum)
        saved = SavedRows(self.backend, self.layout, x, rows, (weight is not None, bias is not None))
        changed = {"running_mean": mean, "running_var": var, "num_batches_tracked": count + 1}
        if buffers["num_batches_tracked"] != count:
            layer._raise_not_alone()
        buffers.update(changed)
        layer._remember(saved)
        return y

    def backward(self, layer: _BatchNorm, dy: Array) -> Array | None:
        """Return dx, and add to the gradients of the parameters."""
        trainer, saved, parameters = self.trainer, layer._remembered, layer._own_parameters()
        if type(saved) is not SavedRows or saved._layout is not self.layout:
            return None
        if (parameters[0] is not None, parameters[1] is not None) != (saved.has_weight, saved._has_bias):
            return None
        data, before = (trainer.input(dy), trainer.input(saved._x)), tuple(map(self._gradient, parameters))
        if -1 in (*data, *before):
            return None
        dx, gradients = trainer.backward(*data, saved.rows, before)
        layer._forget()
        for index, parameter in enumerate(parameters):
            if parameter is not None:
                object.__setattr__(parameter, "_grad", Row(gradients, index))
        return dx

    def _gradient(self, parameter: Parameter | None) -> int:
        """Return the address of the gradient that is there; 0 for none, -1 for one that the kernels cannot take."""
        if parameter is None or parameter.terms is not None or self.trainer.vector(parameter.data) == -1:
            return 0 if parameter is None else -1
        gradient = parameter._grad
        if gradient is None:
            return 0
        found: int = self.trainer.row(*gradient) if type(gradient) is Row else self.trainer.vector(gradient)
        return found


class BatchNorm1d(_BatchNorm):
    """Batch normalization of (N, C) or (N, C, L): y = weight·(x − mean)/√(var + eps) + bias (E3).

    Parameters
    ----------
    num_features : int
        The number of channels, C.
    eps : float
        ε ≥ 0, in units of x².
    momentum : float or None
        The weight of a new batch in the running statistics (E4); None for the average of all batches, 0 to leave
        mean and variance exactly as they are.
    affine : bool
        True for a layer with weight and bias; with False both are None.
    track_running_stats : bool
        True for a layer that keeps running statistics. Without them, evaluation uses the statistics of the batch, as
        training does.
    bias : bool
        False for a layer with weight and without bias.
    channel_axis : int
        The axis of the channels; -1 for channels-last.
    dtype : optional
        The dtype of parameters and buffers: float32 (the default) or float64.
    device : optional
        The device of parameters and buffers, as their namespace names it, for example a ``cupy.cuda.Device``.
    xp : module, optional
        The namespace of parameters and buffers, such as numpy (the default), cupy, torch or jax.numpy.

    Attributes
    ----------
    weight, bias : Parameter (C,) or None
        γ and β.
    running_mean, running_var : array (C,) or None
        The running statistics. A batch replaces these arrays, and never writes into them. The variance is unbiased.
    num_batches_tracked : int or None
        The number of batches in the running statistics.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type or value.

    Notes
    -----
    The gradients are in the dtype of the parameters, and local sums. Differences from ``torch.nn.BatchNorm1d``, on
    purpose: the input may be of another floating dtype than the layer; an empty batch counts for nothing; a constant
    channel gives exactly `bias`; the backward of an evaluation uses the statistics of its forward.

    In training a layer belongs to one thread at a time: its backward is that of its latest forward, from whichever
    thread. Forwards that meet in the running statistics are a RuntimeError in all threads but one. In evaluation
    several threads may call a layer forward.

    References
    ----------
    Sergey Ioffe and Christian Szegedy, Batch Normalization, 2015. ``torch.nn.BatchNorm1d``.

    Examples
    --------
    >>> import numpy, arraybn
    >>> layer = arraybn.BatchNorm1d(2)
    >>> layer(numpy.asarray([[1.0, 4.0], [3.0, 4.0]])).round(3)
    array([[-1.,  0.],
           [ 1.,  0.]])
    >>> layer.running_mean, layer.running_var
    (array([0.2, 0.4], dtype=float32), array([1.1, 0.9], dtype=float32))
    >>> layer.backward(numpy.ones((2, 2)))
    array([[0., 0.],
           [0., 0.]])
    >>> layer.bias.grad
    array([2., 2.], dtype=float32)
    """

    def _check_input_dim(self, x: Array) -> None:
        if x.ndim not in (2, 3):
            raise ValueError(f"expected 2D or 3D input (got {x.ndim}D input)")


class BatchNorm2d(_BatchNorm):
    """Batch normalization of (N, C, H, W); everything else as `BatchNorm1d`.

    Examples
    --------
    >>> import numpy, arraybn
    >>> arraybn.BatchNorm2d(3, channel_axis=-1)(numpy.ones((2, 4, 4, 3))).shape
    (2, 4, 4, 3)
    """

    def _check_input_dim(self, x: Array) -> None:
        if x.ndim != 4:
            raise ValueError(f"expected 4D input (got {x.ndim}D input)")


class BatchNorm3d(_BatchNorm):
    """Batch normalization of (N, C, D, H, W); everything else as `BatchNorm1d`.

    Examples
    --------
    >>> import numpy, arraybn
    >>> arraybn.BatchNorm3d(3)(numpy.ones((2, 3, 2, 2, 2))).shape
    (2, 3, 2, 2, 2)
    """

    def _check_input_dim(self, x: Array) -> None:
        if x.ndim != 5:
            raise ValueError(f"expected 5D input (got {x.ndim}D input)")


def fold(layer: _BatchNorm) -> tuple[Array, Array]:
    """Return scale and shift (C,), so that the layer in evaluation is y = scale·x + shift (E3).

    Parameters
    ----------
    layer : BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm
        In evaluation, with running statistics.

    Returns
    -------
    scale, shift : array (C,)
        weight·rstd and bias − scale·running_mean, float64 where the namespace has it.

    Raises
    ------
    TypeError
        layer is no batch norm.
    ValueError
        The layer is in training, or has no running statistics: its statistics change with each batch.

    Notes
    -----
    Use the result to fold the layer into its neighbour (`arraybn.network.fold_batch_norms`). Evaluated as written, in
    the dtype of the data, it loses the digits that scale·x and shift have in common: about log₁₀(|mean|/std) of them.

    References
    ----------
    ``torch.nn.utils.fusion.fuse_conv_bn_eval``.

    Examples
    --------
    >>> import numpy, arraybn
    >>> layer = arraybn.BatchNorm1d(1, eps=0).eval()
    >>> layer.running_mean, layer.running_var = numpy.asarray([3.0]), numpy.asarray([4.0])
    >>> arraybn.fold(layer)
    (array([0.5]), array([-1.5]))
    """
    if not isinstance(layer, _BatchNorm):
        raise TypeError(f"layer: expected a batch norm; got {class_name(layer)}")
    if layer.training or layer.running_mean is None or layer.running_var is None:
        got = "in training. Call layer.eval()" if layer.training else "without running statistics"
        raise ValueError(f"layer: expected a batch norm in evaluation with running statistics; got one {got}")
    with on_device_of(layer.running_mean):
        mean, var, weight, bias = _widened(layer)
        scale, shift = reference.normalize(reference.rstd(var, layer.eps), weight, bias)
        return scale, shift - scale * mean


def _widened(layer: _BatchNorm) -> list[Array | None]:
    parameters = [None if parameter is None else parameter.data for parameter in layer._own_parameters()]
    vectors = [layer.running_mean, layer.running_var, *parameters]
    return [None if vector is None else widened(vector) for vector in vectors]


# ---- Synchronized over ranks, and the conversion of models -----------------------------------------------------------


class _Group:
    """A communicator. Copies share the communicator; a pickle holds the world in its place."""

    __slots__ = ("comm",)

    def __init__(self, comm: Comm | None = None) -> None:
        self.comm = comm

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        return self

    def __reduce__(self) -> tuple[type[_Group], tuple[()]]:
        return _Group, ()


class OfRanks:
    """The communicator and the time limit of a synchronized layer, checked when they are set."""

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
        self._timeout = sync.as_timeout(seconds)


class SyncBatchNorm(_BatchNorm, OfRanks):
    """Batch normalization of (N, C, *S) with the statistics of all ranks' batches together (E2, E3).

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, bias, exact, channel_axis, dtype, device, xp : optional
        As in `BatchNorm1d`.
    process_group : mpi4py communicator, optional
        The ranks that synchronize; None for all ranks.
    comm : mpi4py communicator, optional
        Another name for process_group, as in the functions.
    timeout : float or None
        Seconds to wait for the other ranks, None for ever.

    Attributes
    ----------
    weight, bias, running_mean, running_var, num_batches_tracked
        As in `BatchNorm1d`. The gradients of weight and bias are local sums, as in PyTorch; `average_gradients` adds
        those of all ranks, with exact=True in both places without rounding.
    process_group, timeout
        As given; both may be changed.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type or value; both process_group and comm are given; a process_group that is null or an
        intercommunicator.

    Notes
    -----
    Ranks are synchronized when batch statistics are used: in training, and in evaluation without running statistics. A
    forward or backward is then a call of all ranks, with one collective for up to 256 channels. A rank may have an
    empty batch. With one rank, or without MPI, this is `BatchNorm1d` bit for bit.

    An error on one rank is a `SyncError` on all of them, and no state has changed. A rank that does not come is a
    `SyncTimeoutError` on those that wait for it.

    A child process of a rank is no rank: there, a layer works in evaluation, and a synchronized call is a `SyncError`.

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
    ...     layer = arraybn.SyncBatchNorm(1, comm=comm)
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
        comm: Comm | None = None,
        bias: bool = True,
        exact: bool = False,
        channel_axis: int = 1,
        dtype: Any = None,
        device: Any = None,
        xp: Namespace | None = None,
        timeout: float | None = sync.TIMEOUT,
    ) -> None:
        home = {"channel_axis": channel_axis, "dtype": dtype, "device": device, "xp": xp}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, bias=bias, exact=exact, **home)
        sync.check_comm("comm", comm)
        if comm is not None and process_group is not None:
            raise TypeError("comm: expected process_group or comm, two names for the same communicator; got both")
        self.process_group = process_group if comm is None else comm
        self.timeout = timeout
        self._path = ""  # path in the model at conversion
        self._converted_from: type[_BatchNorm] | None = None

    def _check_input_dim(self, x: Array) -> None:
        if x.ndim < 2:
            raise ValueError(f"expected at least 2D input (got {x.ndim}D input)")

    # ---- Forward and backward as calls of all ranks ----

    def forward(self, x: Array, *, where: Array | None = None) -> Array:
        """Normalize x as `BatchNorm1d` does, with the statistics of all ranks; an error is a SyncError on all ranks.

        Each channel having one value over all ranks is the plain layer's ValueError, on every rank. A rank may give a
        mask or None, and a mask without any True: the values are counted over all ranks.
        """
        call = self._begin(sync.FORWARD) if self._uses_batch_statistics() else None
        if call is None:
            return super().forward(x, where=where)
        with call, on_device_of(x):
            return self._forward(x, call, where)

    def backward(self, dy: Array) -> Array:
        """Return dx over all ranks; weight.grad and bias.grad get the sums over this rank's batch alone."""
        if self._remembered is not None:
            call = self._remembered._backward_call()
            if call is not None:
                call.timeout = self.timeout  # it may have been changed
        else:  # an error; the other ranks may be waiting and have to hear of it
            call = self._begin(sync.BACKWARD) if self._uses_batch_statistics() else None
        if call is None:
            return super().backward(dy)
        with call, on_device_of(dy):
            for parameter in (self.weight, self.bias):
                if parameter is not None:  # otherwise this would fail after the exchange
                    check_like("gradient", self._recall()._mean, parameter.data, "data")
            return self._backward(dy, call)

    def _uses_batch_statistics(self) -> bool:
        if self._gather is not None:  # the ranks pool what they have gathered, at the end
            return False
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
            "bias": self.bias is not None,
            "exact": sync.settings_text(self.exact),
            "track_running_stats": sync.settings_text(self.track_running_stats),
            "running statistics": self.running_mean is not None,
            "training": sync.settings_text(self.training),
            "dtype": None if array is None else dtype_name(array.dtype),
        }
        options = {"batches": count if isinstance(count, int) else None, "timeout": self.timeout}
        layer = f"layer {self._path!r}" if self._path else self
        return sync.begin(exchange, operation, layer, settings, **options)

    def extra_repr(self) -> str:
        """Return the arguments as PyTorch prints them, and the time limit unless it is the default."""
        text = super().extra_repr()
        return text if self.timeout == sync.TIMEOUT else f"{text}, timeout={self.timeout}"

    # ---- Conversion ----

    @classmethod
    def convert_sync_batchnorm(
        cls, module: M, process_group: Comm | None = None, *, timeout: float | EllipsisType | None = ...
    ) -> M:
        """Replace every batch norm layer in the module by a SyncBatchNorm, in place, and return the module.

        A bare layer is returned as a new one. Parameters and buffers are handed over, not copied; an existing
        SyncBatchNorm is replaced too, to get the new group. A layer that is registered twice becomes one layer. A
        subclass with a forward, backward or train of its own loses them until `revert_sync_batchnorm`.

        Parameters
        ----------
        module : Module
            The model, or one layer.
        process_group : mpi4py communicator, optional
            The ranks that synchronize; None for all ranks.
        timeout : float or None, optional
            Seconds that every layer waits for the other ranks, None for ever. Without this argument, a new layer waits
            600 s, and an existing SyncBatchNorm keeps its own limit.

        Raises
        ------
        TypeError, ValueError
            module is no Module; process_group is no communicator, is null or an intercommunicator; timeout is no number
            of seconds > 0. Nothing has been replaced.

        Examples
        --------
        >>> import arraybn
        >>> arraybn.SyncBatchNorm.convert_sync_batchnorm(arraybn.Sequential(arraybn.BatchNorm2d(3)))
        Sequential(
          (0): SyncBatchNorm(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
        )
        """
        sync.check_comm("process_group", process_group)
        limit = timeout if isinstance(timeout, EllipsisType) else sync.as_timeout(timeout)

        def convert(path: str, layer: _BatchNorm) -> Module:
            if isinstance(layer, SyncBatchNorm):
                new = _as_class(type(layer), layer)
            else:
                new = _as_class(cls, layer)
                new.timeout, new._converted_from = sync.TIMEOUT, type(layer)
            new._path, new.process_group = path, process_group
            if not isinstance(limit, EllipsisType):
                new.timeout = limit
            return new

        return _replaced(module, _BatchNorm, convert)

    @classmethod
    def revert_sync_batchnorm(cls, module: M) -> M:
        """Replace every SyncBatchNorm in the module by the layer class that it was converted from, in place.

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


def _as_class(kind: type[N], layer: _BatchNorm) -> N:
    """Return a layer of that class that shares all attributes of `layer`: parameters, buffers, training."""
    new = kind.__new__(kind)
    new.__dict__.update(layer.__getstate__())
    return new


def _replaced(module: M, kind: type[Any], new: Callable[[str, Any], Module]) -> M:
    """Replace every layer of that class in `module`; all new layers are made before the first is put in place."""
    if not isinstance(module, Module):
        raise TypeError(f"module: expected a Module; got {type(module).__name__}")
    made = {id(found): new(path, found) for path, found in module.named_modules() if isinstance(found, kind)}
    for parent in [*(kept for kept in module.modules() if id(kept) not in made), *made.values()]:
        for name, child in parent._modules.items():
            parent._modules[name] = made.get(id(child), child)
    return made.get(id(module), module)  # type: ignore[return-value]

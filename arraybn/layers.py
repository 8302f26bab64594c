"""The layers: batch norm with its state, under the names and with the semantics of ``torch.nn.BatchNorm*``.

The state of a batch norm lives here and nowhere else. Every stateful call validates, then computes, then commits: one
that raises has changed nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ._arrays.copies import filled
from ._arrays.devices import at, check_device, on
from ._arrays.namespaces import Array, Namespace, array_namespace, as_dtype, as_namespace, dtype_name, namespace_name
from ._checks import as_channel_vector, as_eps, as_flag, as_floating, as_integer, as_number, check_lasting
from .functional import backward_in, forward_in
from .modules import Module, Parameter
from .reference import Moments
from .statistics import updated

if TYPE_CHECKING:
    from .sync import Call


class _NormBase(Module):
    """The parameters and buffers of a batch norm."""

    _version = 2
    weight: Parameter | None
    bias: Parameter | None
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
        self.channel_axis = as_integer("channel_axis", channel_axis)
        xp = as_namespace(np if xp is None else xp)
        self._check_to(dtype)
        check_device(xp, device)
        home = {"dtype": as_dtype("float32" if dtype is None else dtype, xp), "device": device}
        shape = (self.num_features,)
        with on(device):
            self.register_parameter("weight", Parameter(xp.ones(shape, **home)) if self.affine else None)
            self.register_parameter("bias", Parameter(xp.zeros(shape, **home)) if self.affine else None)
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
        """The arguments as PyTorch prints them, then those of ours that are not the default."""
        text = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine},"
            f" track_running_stats={self.track_running_stats}"
        )
        if self.channel_axis != 1:
            text += f", channel_axis={self.channel_axis}"
        if (array := self._an_array()) is not None:
            xp, name = array_namespace(array), dtype_name(array.dtype)
            text += f", dtype={name}" if name != "float32" else ""
            text += f", xp={namespace_name(xp)}" if namespace_name(xp) != "numpy" else ""
        return text

    def _own_parameters(self) -> tuple[Parameter | None, Parameter | None]:
        """Weight and bias, without the detour of `Module.__getattr__`."""
        return self._parameters["weight"], self._parameters["bias"]

    def _an_array(self) -> Array | None:
        """One of this layer's arrays, which all are of one home; None if there is none."""
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


# Mean and var before a batch, the weight that it will have in them, and how many batches there will have been.
_Tracking: TypeAlias = tuple[Array | None, Array | None, float, int | None]


class _BatchNorm(_NormBase):
    """Forward and backward of a batch norm."""

    def forward(self, x: Array) -> Array:
        """Normalize x (N, C, *S), with the batch's statistics in training and the running ones in evaluation.

        Returns y in the dtype and memory layout of x. In training the running statistics take in the batch.

        Raises
        ------
        TypeError
            x is no array of this layer's namespace, or not of a real floating dtype.
        ValueError
            The dimensions or channels of x are not those of this layer, or each channel has one value, which is no
            statistic.
        """
        if type(x) is np.ndarray:  # without the detour
            return self._forward(x, None)
        with at(x):
            return self._forward(x, None)

    def _forward(self, x: Array, call: Call | None) -> Array:
        """`forward` as a part of `call`, or alone."""
        x = as_floating("x", x)
        if type(x) is not np.ndarray or type(self._an_array()) is not np.ndarray:
            check_lasting("x", x, self._an_array())
        self._check_input_dim(x)
        self._check_channels(x)
        fixed, tracking = self._fixed_statistics(x), self._tracking(x)
        weight, bias = self._own_parameters()
        weight, bias = weight and weight.data, bias and bias.data
        y, saved = forward_in(call, x, weight, bias, **fixed, eps=self.eps, channel_axis=self.channel_axis)
        if (moments := saved._moments) is not None:
            if call is not None and moments.n == 1:
                call.every_rank_raises()
            self._buffers.update(self._tracked(moments, x, tracking))
        self._remember(saved)
        return y

    def backward(self, dy: Array) -> Array:
        """The gradient by x of the latest forward, from dy (N, C, *S); adds to weight.grad and bias.grad.

        Raises
        ------
        RuntimeError
            There was no forward since the last backward.
        TypeError, ValueError
            dy is not like y.
        """
        if type(dy) is np.ndarray:
            return self._backward(dy, None)
        with at(dy):
            return self._backward(dy, None)

    def _backward(self, dy: Array, call: Call | None) -> Array:
        """`backward` as a part of `call`, or alone."""
        dx, dweight, dbias = backward_in(call, dy, self._recall())
        weight, bias = self._own_parameters()
        self._finish_backward((weight, dweight), (bias, dbias))
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

    def _fixed_statistics(self, x: Array) -> dict[str, Array]:
        """The running statistics where they are to be used as they are for x, otherwise nothing."""
        as_flag("training", self.training)
        as_flag("track_running_stats", self.track_running_stats)
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        if (mean is None) != (var is None):
            which = "running_mean" if mean is None else "running_var"
            raise ValueError(
                f"running_mean and running_var: expected either both or neither to be None; got None for {which} alone"
            )
        if self.training or mean is None:
            return {}
        as_channel_vector("running_mean", mean, x, self.num_features)  # `batch_norm` would refuse it as "mean"
        as_channel_vector("running_var", var, x, self.num_features)
        return {"mean": mean, "var": var}

    def _tracking(self, x: Array) -> _Tracking | None:
        """How the buffers will take in the batch x, checked before there is a result; None if they will not."""
        if not (self.training and self.track_running_stats):
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

    def _tracked(self, moments: Moments, x: Array, tracking: _Tracking | None) -> dict[str, Any]:
        """The buffers after this batch, by name: nothing where they stay as they are."""
        if moments.n == 1:
            remedy = "or use eval()" if self.training else "or keep running statistics"
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}."
                f" Leave out the last incomplete batch, {remedy}"
            )
        if tracking is None or moments.n == 0:
            return {}
        mean, var, momentum, count = tracking
        if mean is None:
            return {"num_batches_tracked": count}
        mean, var = updated(mean, var, moments, momentum)
        return {"running_mean": mean, "running_var": var, "num_batches_tracked": count}


class BatchNorm1d(_BatchNorm):
    """Batch normalization of (N, C) or (N, C, L): y = weight·(x − mean)/√(var + eps) + bias (E3).

    Parameters
    ----------
    num_features : int
        C.
    eps : float
        ε ≥ 0, in units of x².
    momentum : float or None
        The weight of a new batch in the running statistics (E4); None for the average of all batches.
    affine : bool
        Whether weight and bias are learned; otherwise both are None.
    track_running_stats : bool
        Whether the running statistics are kept. Without them the batch's own are used in evaluation as well.
    channel_axis : int
        The axis of the channels; -1 for channels-last.
    dtype, device, xp : optional
        Of parameters and buffers: float32 or float64, a device as the namespace names it (a ``cupy.cuda.Device``), a
        namespace such as numpy, cupy, torch or jax.numpy.

    Attributes
    ----------
    weight, bias : Parameter (C,) or None
        γ and β.
    running_mean, running_var : array (C,) or None
        Replaced, never written into. The variance is unbiased.
    num_batches_tracked : int or None
        How many batches the running statistics have taken in.

    Raises
    ------
    TypeError, ValueError
        An argument is not as said.

    Notes
    -----
    The gradients are in the dtype of the parameters, and local sums. Differences from ``torch.nn.BatchNorm1d``, on
    purpose: the input may be of another floating dtype than the layer; an empty batch counts for nothing; a constant
    channel gives exactly `bias`; the backward of an evaluation uses the statistics of its forward.

    References
    ----------
    S. Ioffe, C. Szegedy, Batch Normalization, 2015. ``torch.nn.BatchNorm1d``.

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

"""A small network library to train around a batch norm, for examples; each backward is written by hand."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from ._arrays.copies import as_numpy, converted, copied, widened
from ._arrays.namespaces import Array, array_namespace, class_name, device, dtype_name, is_array_api_obj
from ._checks import as_flag, as_floating, as_integer, as_number, check_home, check_like, check_values
from .layers import SyncBatchNorm, _BatchNorm, fold
from .modules import Module, Parameter, Sequential

_Model = TypeVar("_Model", bound=Module)


class Linear(Module):
    """y = x·weightᵀ + bias.

    Parameters
    ----------
    in_features, out_features : int
        The sizes of x (N, in_features) and y (N, out_features).
    bias : bool
        True to add a bias.
    rng : numpy.random.Generator, optional
        Draws weight and bias from U(−k, k), k = 1/√in_features, as PyTorch; a new one if None.

    Examples
    --------
    >>> import numpy, arraybn
    >>> arraybn.network.Linear(4, 2)(numpy.ones((3, 4), dtype=numpy.float32)).shape
    (3, 2)
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, rng: np.random.Generator | None = None
    ) -> None:
        super().__init__()
        self.in_features = as_integer("in_features", in_features, 1)
        self.out_features = as_integer("out_features", out_features, 1)
        bias, rng = as_flag("bias", bias), _generator(rng)
        self.weight = Parameter(_uniform(rng, (out_features, in_features), in_features))
        self.bias = Parameter(_uniform(rng, (out_features,), in_features)) if bias else None

    def forward(self, x: Array) -> Array:
        """Return y (N, out_features) of x (N, in_features)."""
        x = _as_input(x, self.weight)
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x: expected shape (N, {self.in_features}); got {tuple(x.shape)}")
        y = x @ self.weight.data.T
        self._remember(x)
        return y if self.bias is None else y + self.bias.data

    def backward(self, dy: Array) -> Array:
        """Return dx (N, in_features) from dy (N, out_features)."""
        x = self._recall()
        dy = _as_gradient(dy, x, (x.shape[0], self.out_features))
        dx, dweight, dbias = dy @ self.weight.data, dy.T @ x, array_namespace(dy).sum(dy, axis=0)
        self._finish_backward((self.weight, dweight), (self.bias, dbias))
        return dx

    def extra_repr(self) -> str:
        """Return the arguments as PyTorch prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Conv2d(Module):
    """Cross-correlation with stride 1: y[n, o] = Σ_c weight[o, c] ⋆ x[n, c] + bias[o].

    Parameters
    ----------
    in_channels, out_channels, kernel_size : int
        The sizes of weight (out_channels, in_channels, kernel_size, kernel_size).
    padding : int
        Number of rows and columns of zeros on each side, less than kernel_size.
    bias : bool
        True to add a bias.
    rng : numpy.random.Generator, optional
        Draws weight and bias from U(−k, k), k = 1/√(in_channels·kernel_size²), as PyTorch; a new one if None.

    Examples
    --------
    >>> import numpy, arraybn
    >>> arraybn.network.Conv2d(1, 5, 3, padding=1)(numpy.ones((2, 1, 8, 8), dtype=numpy.float32)).shape
    (2, 5, 8, 8)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        padding: int = 0,
        bias: bool = True,
        *,
        rng: np.random.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = as_integer("in_channels", in_channels, 1)
        self.out_channels = as_integer("out_channels", out_channels, 1)
        self.kernel_size = as_integer("kernel_size", kernel_size, 1)
        self.padding = as_integer("padding", padding, 0)
        if padding >= kernel_size:
            raise ValueError(f"padding: expected less than kernel_size = {kernel_size}; got {padding}")
        bias, rng = as_flag("bias", bias), _generator(rng)
        fan_in = in_channels * kernel_size**2
        self.weight = Parameter(_uniform(rng, (out_channels, in_channels, kernel_size, kernel_size), fan_in))
        self.bias = Parameter(_uniform(rng, (out_channels,), fan_in)) if bias else None

    def forward(self, x: Array) -> Array:
        """Return y (N, out_channels, H', W') of x (N, in_channels, H, W), H' = H + 2·padding − kernel_size + 1."""
        x = _as_input(x, self.weight)
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected shape (N, {self.in_channels}, H, W); got {tuple(x.shape)}")
        y, patches = _correlate(x, self.weight.data, self.padding)
        self._remember((patches, tuple(y.shape)))
        return y if self.bias is None else y + self.bias.data[:, None, None]

    def backward(self, dy: Array) -> Array:
        """Return dx, the correlation of dy with the weight turned by 180°."""
        (patches, shape), weight = self._recall(), self.weight.data
        dy = _as_gradient(dy, patches, shape)
        xp = array_namespace(dy)
        flat = xp.reshape(dy, (dy.shape[0], dy.shape[1], dy.shape[2] * dy.shape[3]))
        dweight = xp.sum(flat @ xp.matrix_transpose(patches), axis=0)
        turned = xp.flip(xp.permute_dims(weight, (1, 0, 2, 3)), axis=(2, 3))
        dx, _ = _correlate(dy, turned, self.kernel_size - 1 - self.padding)
        dweight, dbias = xp.reshape(dweight, weight.shape), xp.sum(dy, axis=(0, 2, 3))
        self._finish_backward((self.weight, dweight), (self.bias, dbias))
        return dx

    def extra_repr(self) -> str:
        """Return the arguments."""
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{sizes}, padding={self.padding}, bias={self.bias is not None}"


def _correlate(x: Array, weight: Array, padding: int) -> tuple[Array, Array]:
    """Return y (N, O, H', W') of x (N, C, H, W) and weight (O, C, K, K), and the patches of x (N, C·K·K, H'·W')."""
    xp, size = array_namespace(x), weight.shape[-1]
    for axis in (2, 3) if padding else ():
        shape = tuple(padding if i == axis else size for i, size in enumerate(x.shape))
        edge = xp.zeros(shape, dtype=x.dtype, device=device(x))
        x = xp.concat([edge, x, edge], axis=axis)
    n, c, height, width = x.shape[0], x.shape[1], x.shape[2] - size + 1, x.shape[3] - size + 1
    if height < 1 or width < 1:
        raise ValueError(f"x: expected at least {size} rows and columns, padding included; got shape {tuple(x.shape)}")
    shifted = [x[:, :, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    patches = xp.reshape(xp.stack(shifted, axis=2), (n, c * size * size, height * width))
    y = xp.reshape(weight, (weight.shape[0], -1)) @ patches
    return xp.reshape(y, (n, weight.shape[0], height, width)), patches


class ReLU(Module):
    """max(x, 0).

    Examples
    --------
    >>> import numpy, arraybn
    >>> arraybn.network.ReLU()(numpy.asarray([-1.0, 2.0]))
    array([0., 2.])
    """

    def forward(self, x: Array) -> Array:
        """Return y, of the shape of x."""
        x = _as_lasting(x)
        xp = array_namespace(x)
        self._remember(x)
        return xp.where(x < 0, xp.zeros_like(x), x)

    def backward(self, dy: Array) -> Array:
        """Return dx = dy where x > 0, else 0."""
        x = self._recall()
        dy = _as_gradient(dy, x, tuple(x.shape))
        xp = array_namespace(dy)
        dx = xp.where(x > 0, dy, xp.zeros_like(dy))
        self._forget()
        return dx


class Flatten(Module):
    """(N, …) → (N, product of the other sizes).

    Examples
    --------
    >>> import numpy, arraybn
    >>> arraybn.network.Flatten()(numpy.ones((2, 3, 4))).shape
    (2, 12)
    """

    def forward(self, x: Array) -> Array:
        """Return y (N, product)."""
        x = _as_lasting(x)
        if x.ndim < 1:
            raise ValueError(f"x: expected at least 1 dimension, (N, …); got shape {tuple(x.shape)}")
        y = array_namespace(x).reshape(x, (x.shape[0], math.prod(x.shape[1:])))
        self._remember(x)
        return y

    def backward(self, dy: Array) -> Array:
        """Return dy in the shape of x."""
        x = self._recall()
        dy = _as_gradient(dy, x, (x.shape[0], math.prod(x.shape[1:])))
        dx = array_namespace(dy).reshape(dy, x.shape)
        self._forget()
        return dx


class Identity(Module):
    """y = x: the place of a module that was taken out.

    Examples
    --------
    >>> import arraybn
    >>> arraybn.network.Identity()(3.0)
    3.0
    """

    def forward(self, x: Array) -> Array:
        """Return x."""
        return x

    def backward(self, dy: Array) -> Array:
        """Return dy."""
        return dy


def fold_batch_norms(model: _Model) -> _Model:
    """Return a copy of the model in which batch norms are part of the `Linear` or `Conv2d` beside them (E3).

    Parameters
    ----------
    model : Module
        In evaluation. The function looks at modules that are neighbours in a `Sequential`, nested ones included.

    Returns
    -------
    Module
        A deep copy. A batch norm after a Linear or Conv2d, or before a Linear or a Conv2d without padding, is an
        `Identity` now. All other batch norms stay: zeros that a convolution adds at the border are not normalized, so
        a batch norm before such a convolution cannot be folded into the convolution.

    Raises
    ------
    TypeError
        model is no Module.
    ValueError
        A batch norm is in training, or has no running statistics.

    Notes
    -----
    Weights and biases are computed in float64 and rounded once. The result differs from the unfolded one by roundings:
    a folded weight carries the factor weight·rstd, and a large mean, which a batch norm subtracts exactly, is lost in
    the rounding of scale·x + shift. Compare both on your data.

    References
    ----------
    ``torch.nn.utils.fusion.fuse_conv_bn_eval`` and ``fuse_linear_bn_eval``.

    Examples
    --------
    >>> import arraybn
    >>> from arraybn.network import Linear
    >>> arraybn.network.fold_batch_norms(arraybn.Sequential(Linear(4, 2, bias=False), arraybn.BatchNorm1d(2)).eval())
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
      (1): Identity()
    )
    """
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a Module; got {class_name(model)}")
    for path, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            _check_foldable(path, layer)
    model = copy.deepcopy(model)
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for chain in [module for module in model.modules() if _is_chain(module)]:
        while _fold_one(chain, uses):
            pass
    return model


def _check_foldable(path: str, layer: _BatchNorm) -> None:
    try:
        fold(layer)
    except ValueError as error:
        raise ValueError(f"model: at {path or 'the top'!r}, {error}") from error


def _is_chain(module: Module) -> bool:
    return isinstance(module, Sequential) and type(module).forward is Sequential.forward


def _links(chain: Module) -> Iterator[tuple[Module, str, Module]]:
    """Return parent, name and module of each link of a chain, in the order of their calls, without identities."""
    for name, module in chain._modules.items():
        if _is_chain(module):
            yield from _links(module)
        elif type(module) is not Identity:
            yield chain, name, module


def _fold_one(chain: Module, uses: Mapping[int, int]) -> bool:
    """Fold the first batch norm of the chain that can be folded; return False if there is none."""
    links = list(_links(chain))
    for before in (False, True):  # into the module before the batch norm, rather than into the one after
        for first, second in itertools.pairwise(links):
            (parent, name, norm), (_, _, host) = (first, second) if before else (second, first)
            alone = uses[id(norm)] == uses[id(host)] == 1
            if alone and isinstance(norm, _BatchNorm) and _fits(norm, host, before):
                _absorb(host, *fold(norm), before)
                parent._modules[name] = Identity()
                return True
    return False


def _fits(norm: _BatchNorm, host: Module, before: bool) -> bool:
    """Return True if the channels of `norm` are inputs (before) or outputs of `host`, and no zeros come between."""
    if type(norm).forward not in (_BatchNorm.forward, SyncBatchNorm.forward):
        return False
    if type(host) is Linear:
        features, axes = host.in_features if before else host.out_features, (1, -1)
    elif type(host) is Conv2d and not (before and host.padding):
        features, axes = host.in_channels if before else host.out_channels, (1, -3)
    else:
        return False
    return norm.num_features == features and norm.channel_axis in axes


def _absorb(host: Module, scale: Array, shift: Array, before: bool) -> None:
    """Let `host` compute with scale·x + shift of its input (before), or give scale·y + shift of its output y."""
    weight, dtype = widened(host.weight.data), host.weight.data.dtype
    xp, beside = array_namespace(weight), (1,) * (weight.ndim - 2)
    place = (1, -1, *beside) if before else (-1, 1, *beside)
    if before:
        moved = xp.sum(weight * xp.reshape(shift, place), axis=tuple(range(1, weight.ndim)))
        bias = moved if host.bias is None else widened(host.bias.data) + moved
    else:
        bias = shift if host.bias is None else scale * widened(host.bias.data) + shift
    host.weight = Parameter(xp.astype(weight * xp.reshape(scale, place), dtype))
    host.bias = Parameter(xp.astype(bias, dtype))


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Return −log softmax(logits)[label], averaged over the batch, and its gradient by the logits.

    Parameters
    ----------
    logits : array (N, K)
    labels : array of integers (N,)
        The correct classes, 0 ≤ label < K.

    Returns
    -------
    loss : float
    dlogits : array (N, K)

    Examples
    --------
    >>> import numpy, arraybn
    >>> loss, dlogits = arraybn.network.cross_entropy(numpy.zeros((1, 2)), numpy.asarray([0]))
    >>> round(loss, 4), dlogits
    (0.6931, array([[-0.5,  0.5]]))
    """
    logits = as_floating("logits", logits)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits: expected shape (N, K), neither of them 0; got {tuple(logits.shape)}")
    _check_labels(labels, logits)
    xp, n = array_namespace(logits), logits.shape[0]
    shifted = logits - xp.max(logits, axis=1, keepdims=True)
    powers = xp.exp(shifted)
    total = xp.sum(powers, axis=1, keepdims=True)
    chosen = xp.astype(labels[:, None] == xp.arange(logits.shape[1], dtype=labels.dtype)[None, :], logits.dtype)
    loss = float(xp.sum(chosen * (xp.log(total) - shifted))) / n
    return loss, (powers / total - chosen) / n


def mean_squared_error(predictions: Array, targets: Array) -> tuple[float, Array]:
    """Return (prediction − target)², averaged over all values, and its gradient by the predictions.

    Parameters
    ----------
    predictions, targets : array
        Of the same shape, at least one value; targets of another real floating dtype are converted.

    Returns
    -------
    loss : float
    dpredictions : array, like predictions

    Raises
    ------
    TypeError, ValueError
        An argument is no array of a real floating dtype, the shapes differ, or there is no value.

    Examples
    --------
    >>> import numpy, arraybn
    >>> loss, dpredictions = arraybn.network.mean_squared_error(numpy.asarray([1.0, 5.0]), numpy.asarray([1.0, 3.0]))
    >>> loss, dpredictions
    (2.0, array([0., 2.]))
    """
    predictions, targets = as_floating("predictions", predictions), as_floating("targets", targets)
    check_like("targets", targets, predictions, "predictions")
    size = math.prod(predictions.shape)
    if size == 0:
        raise ValueError(f"predictions: expected at least one value; got shape {tuple(predictions.shape)}")
    xp = array_namespace(predictions)
    difference = predictions - xp.astype(targets, predictions.dtype, copy=False)
    return float(xp.sum(difference * difference)) / size, difference * (2 / size)


class SGD:
    """Stochastic gradient descent: velocity ← momentum·velocity + grad, data ← data − lr·velocity, as in PyTorch.

    Parameters
    ----------
    parameters : iterable of Parameter
        The parameters to train. Parameters without a gradient do not change.
    lr : float
        The learning rate.
    momentum : float
        0 for plain gradient descent.

    Examples
    --------
    >>> import numpy, arraybn
    >>> p = arraybn.Parameter(numpy.ones(1))
    >>> p.grad = numpy.ones(1)
    >>> arraybn.network.SGD([p], lr=0.25).step()
    >>> p.data
    array([0.75])
    """

    def __init__(self, parameters: Iterable[Parameter], lr: float, momentum: float = 0.0) -> None:
        if not isinstance(parameters, Iterable) or isinstance(parameters, Parameter):
            raise TypeError(
                f"parameters: expected several Parameters, as module.parameters() gives; got {class_name(parameters)}"
            )
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("parameters: expected at least one; got none")
        for index, parameter in enumerate(self.parameters):
            if not isinstance(parameter, Parameter):
                raise TypeError(f"parameters[{index}]: expected a Parameter; got {class_name(parameter)}")
        self.lr, self.momentum = lr, momentum
        self._check_rates()
        self._velocity: list[Array | None] = [None] * len(self.parameters)

    def __repr__(self) -> str:
        return f"SGD({len(self.parameters)} parameters, lr={self.lr}, momentum={self.momentum})"

    def zero_grad(self) -> None:
        """Set every gradient to None."""
        for parameter in self.parameters:
            parameter.grad = None

    def _check_rates(self) -> tuple[float, float]:
        """Return lr and momentum as floats: a NumPy scalar would turn float32 parameters into float64."""
        for name in ("lr", "momentum"):
            if as_number(name, value := getattr(self, name)) < 0:
                raise ValueError(f"{name}: expected a number ≥ 0; got {value!r}")
        return float(self.lr), float(self.momentum)

    def step(self) -> None:
        """Update every parameter once."""
        lr, momentum = self._check_rates()
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            velocity = self._velocity[index]
            velocity = parameter.grad if velocity is None else momentum * velocity + parameter.grad
            self._velocity[index] = velocity
            parameter.data = parameter.data - lr * velocity

    def state_dict(self, prefix: str = "") -> OrderedDict[str, Array]:
        """Return lr, momentum and copies of the velocities, by the numbers of their parameters.

        With a prefix, a model and its optimizer go into one file:
        ``arraybn.save({**model.state_dict("model."), **sgd.state_dict("sgd.")}, path)``.
        """
        state = OrderedDict(
            (prefix + name, np.asarray(rate))
            for name, rate in zip(("lr", "momentum"), self._check_rates(), strict=True)
        )
        for index, velocity in enumerate(self._velocity):
            if velocity is not None:
                state[f"{prefix}velocity.{index}"] = copied(velocity)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Take over the values whose names start with `prefix`; where one is wrong, nothing has been loaded.

        A run that goes on from the state of its model and its optimizer has the same bits as one without a break.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping of names to arrays; got {class_name(state_dict)}")
        given = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        lr, momentum = (_rate(prefix + name, given.pop(prefix + name, None)) for name in ("lr", "momentum"))
        velocity: list[Array | None] = [None] * len(self.parameters)
        for index, parameter in enumerate(self.parameters):
            if (key := f"{prefix}velocity.{index}") in given:
                velocity[index] = _velocity_like(parameter.data, key, given.pop(key))
        if given:
            raise ValueError(
                f"state_dict: expected lr, momentum and the velocities of {len(velocity)} parameters;"
                f" got {next(iter(given))!r} as well"
            )
        self.lr, self.momentum, self._velocity = lr, momentum, velocity


def _rate(key: str, value: Any) -> float:
    """Return a number or an array () as a float ≥ 0."""
    if value is None:
        raise ValueError(f"{key}: expected a number, as SGD.state_dict has it; got none")
    rate = as_number(key, as_numpy(key, value).item() if is_array_api_obj(value) and value.ndim == 0 else value)
    if rate < 0:
        raise ValueError(f"{key}: expected a number ≥ 0; got {rate!r}")
    return float(rate)


def _velocity_like(data: Array, key: str, value: Any) -> Array:
    """Return a copy of `value` in the namespace, device and dtype of `data`."""
    value = as_floating(key, value if is_array_api_obj(value) else as_numpy(key, value))
    if tuple(value.shape) != tuple(data.shape):
        raise ValueError(f"{key}: expected shape {tuple(data.shape)}, that of its parameter; got {tuple(value.shape)}")
    return converted(key, value, array_namespace(data), device(data), data.dtype)


def _as_lasting(x: Array) -> Array:
    x = as_floating("x", x)
    check_values("x", x)
    return x


def _as_input(x: Array, weight: Parameter) -> Array:
    x = _as_lasting(x)
    check_home("weight", weight.data, x)
    return x


def _as_gradient(dy: Array, x: Array, shape: tuple[int, ...]) -> Array:
    dy = as_floating("dy", dy)
    check_home("dy", dy, x)
    if tuple(dy.shape) != shape:
        raise ValueError(f"dy: expected shape {shape}, that of y; got {tuple(dy.shape)}")
    return dy


def _check_labels(labels: Array, logits: Array) -> None:
    if not is_array_api_obj(labels):
        raise TypeError(f"labels: expected an array of integers; got {class_name(labels)}")
    check_home("labels", labels, logits, "logits")
    xp, (n, k) = array_namespace(labels), logits.shape
    if not xp.isdtype(labels.dtype, "integral"):
        raise TypeError(f"labels: expected an array of integers; got {dtype_name(labels.dtype)}")
    if tuple(labels.shape) != (n,):
        raise ValueError(f"labels: expected shape ({n},), one per row of logits; got {tuple(labels.shape)}")
    low, high = int(xp.min(labels)), int(xp.max(labels))
    if low < 0 or high >= k:
        raise ValueError(f"labels: expected 0 … {k - 1}, the columns of logits; got {low if low < 0 else high}")


def _generator(rng: np.random.Generator | None) -> np.random.Generator:
    if rng is not None and not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng: expected a numpy.random.Generator; got {rng!r}. Pass numpy.random.default_rng(seed)")
    return np.random.default_rng() if rng is None else rng


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> Array:
    return rng.uniform(-(fan_in**-0.5), fan_in**-0.5, shape).astype(np.float32)

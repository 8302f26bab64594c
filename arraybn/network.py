"""Just enough network to train around a batch norm, each backward written by hand. For examples, not a library."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ._arrays import Array, array_namespace
from ._checks import as_integer
from .modules import Module, Parameter


class Linear(Module):
    """y = x·weightᵀ + bias.

    Parameters
    ----------
    in_features, out_features : int
        The sizes of x (N, in_features) and y (N, out_features).
    bias : bool
        Whether there is one.
    rng : numpy.random.Generator, optional
        Draws weight and bias from U(−k, k), k = 1/√in_features, as PyTorch does; a new one if None.

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
        rng = np.random.default_rng() if rng is None else rng
        self.weight = Parameter(_uniform(rng, (out_features, in_features), in_features))
        self.bias = Parameter(_uniform(rng, (out_features,), in_features)) if bias else None

    def forward(self, x: Array) -> Array:
        """y (N, out_features) of x (N, in_features)."""
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x: expected shape (N, {self.in_features}); got {tuple(x.shape)}")
        y = x @ self.weight.data.T
        self._remember(x)
        return y if self.bias is None else y + self.bias.data

    def backward(self, dy: Array) -> Array:
        """dx (N, in_features) from dy (N, out_features)."""
        x = self._recall()
        dx, dweight = dy @ self.weight.data, dy.T @ x
        self._forget()
        self.weight.accumulate(dweight)
        if self.bias is not None:
            self.bias.accumulate(array_namespace(dy).sum(dy, axis=0))
        return dx

    def extra_repr(self) -> str:
        """As PyTorch prints it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Conv2d(Module):
    """Cross-correlation with stride 1: y[n, o] = Σ_c weight[o, c] ⋆ x[n, c] + bias[o].

    Parameters
    ----------
    in_channels, out_channels, kernel_size : int
        weight is (out_channels, in_channels, kernel_size, kernel_size).
    padding : int
        Rows and columns of zeros on each side, less than kernel_size.
    bias : bool
        Whether there is one.
    rng : numpy.random.Generator, optional
        Draws weight and bias from U(−k, k), k = 1/√(in_channels·kernel_size²), as PyTorch does; a new one if None.

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
        rng = np.random.default_rng() if rng is None else rng
        fan_in = in_channels * kernel_size**2
        self.weight = Parameter(_uniform(rng, (out_channels, in_channels, kernel_size, kernel_size), fan_in))
        self.bias = Parameter(_uniform(rng, (out_channels,), fan_in)) if bias else None

    def forward(self, x: Array) -> Array:
        """y (N, out_channels, H', W') of x (N, in_channels, H, W), H' = H + 2·padding − kernel_size + 1."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected shape (N, {self.in_channels}, H, W); got {tuple(x.shape)}")
        y, patches = _correlate(x, self.weight.data, self.padding)
        self._remember(patches)
        return y if self.bias is None else y + self.bias.data[:, None, None]

    def backward(self, dy: Array) -> Array:
        """dx from dy: the correlation of dy with the weight turned by 180°."""
        patches, weight, xp = self._recall(), self.weight.data, array_namespace(dy)
        flat = xp.reshape(dy, (dy.shape[0], dy.shape[1], -1))
        dweight = xp.sum(flat @ xp.matrix_transpose(patches), axis=0)
        turned = xp.flip(xp.permute_dims(weight, (1, 0, 2, 3)), axis=(2, 3))
        dx, _ = _correlate(dy, turned, self.kernel_size - 1 - self.padding)
        self._forget()
        self.weight.accumulate(xp.reshape(dweight, weight.shape))
        if self.bias is not None:
            self.bias.accumulate(xp.sum(dy, axis=(0, 2, 3)))
        return dx

    def extra_repr(self) -> str:
        """The arguments."""
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{sizes}, padding={self.padding}, bias={self.bias is not None}"


def _correlate(x: Array, weight: Array, padding: int) -> tuple[Array, Array]:
    """(N, O, H', W') of x (N, C, H, W) and weight (O, C, K, K); and the patches (N, C·K·K, H'·W') of x it used."""
    xp, size = array_namespace(x), weight.shape[-1]
    for axis in (2, 3):
        if padding:
            edge = xp.zeros_like(x[:, :, :padding, :] if axis == 2 else x[:, :, :, :1])
            edge = edge if axis == 2 and edge.shape[2] == padding else xp.concat([edge] * padding, axis=axis)
            x = xp.concat([edge, x, edge], axis=axis)
    n, c, height, width = x.shape[0], x.shape[1], x.shape[2] - size + 1, x.shape[3] - size + 1
    if height < 1 or width < 1:
        raise ValueError(f"x: expected at least {size} rows and columns, padding included; got {x.shape[2:]}")
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
        """y, of the shape of x."""
        xp = array_namespace(x)
        self._remember(x)
        return xp.where(x < 0, xp.zeros_like(x), x)

    def backward(self, dy: Array) -> Array:
        """dx = dy where x > 0, else 0."""
        x, xp = self._recall(), array_namespace(dy)
        dx = xp.where(x > 0, dy, xp.zeros_like(dy))
        self._forget()
        return dx


class Flatten(Module):
    """(N, …) → (N, the product of the others).

    Examples
    --------
    >>> import numpy, arraybn
    >>> arraybn.network.Flatten()(numpy.ones((2, 3, 4))).shape
    (2, 12)
    """

    def forward(self, x: Array) -> Array:
        """y (N, product)."""
        self._remember(tuple(x.shape))
        return array_namespace(x).reshape(x, (x.shape[0], -1))

    def backward(self, dy: Array) -> Array:
        """dy in the shape of x."""
        dx = array_namespace(dy).reshape(dy, self._recall())
        self._forget()
        return dx


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """−log softmax(logits)[label], averaged over the batch, and its gradient by the logits.

    Parameters
    ----------
    logits : array (N, K)
    labels : array of integers (N,)
        0 ≤ label < K.

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
    if logits.ndim != 2 or tuple(labels.shape) != (logits.shape[0],):
        raise ValueError(
            f"labels: expected shape ({logits.shape[0]},), one per row of logits; got {tuple(labels.shape)}"
        )
    xp, n = array_namespace(logits), logits.shape[0]
    shifted = logits - xp.max(logits, axis=1, keepdims=True)
    powers = xp.exp(shifted)
    total = xp.sum(powers, axis=1, keepdims=True)
    chosen = xp.astype(labels[:, None] == xp.arange(logits.shape[1], dtype=labels.dtype)[None, :], logits.dtype)
    loss = float(xp.sum(chosen * (xp.log(total) - shifted))) / n
    return loss, (powers / total - chosen) / n


class SGD:
    """Stochastic gradient descent: velocity ← momentum·velocity + grad, data ← data − lr·velocity, as in PyTorch.

    Parameters
    ----------
    parameters : iterable of Parameter
        Those without a gradient are left as they are.
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
        self.parameters = list(parameters)
        self.lr, self.momentum = lr, momentum
        self._velocity: list[Array | None] = [None] * len(self.parameters)

    def zero_grad(self) -> None:
        """Set every gradient to None."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """Move every parameter against its gradient."""
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            velocity = self._velocity[index]
            velocity = parameter.grad if velocity is None else self.momentum * velocity + parameter.grad
            self._velocity[index] = velocity
            parameter.data = parameter.data - self.lr * velocity


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> Array:
    return rng.uniform(-(fan_in**-0.5), fan_in**-0.5, shape).astype(np.float32)

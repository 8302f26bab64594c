"""The maths of batch normalization, E1 to E9, as pure functions of arrays.

This file and ``docs/maths.md`` are all that a reader needs. The file has four parts:

1. batch norm itself: `forward`, `backward`, evaluation and further derivatives, which read from top to bottom as the
   paper does;
2. the five sweeps, which alone touch data of the size of x;
3. the moments of a batch, their pooling and their running average;
4. the formulas for the vectors (C,) that the sweeps are given.

Nothing here writes into an array, chooses a backend or branches on a value in an array. The calls are those of the
Python array API, so the same lines run on NumPy, CuPy, torch, JAX, … Faster sweeps come from ``arraybn.kernels``;
``kernels/cpu`` compiles the formulas of the fourth part for the numbers of one channel.

Shapes: data is seen as (N, C, S), a number per channel as (C,). ``mean[:, None]`` places the mean of a channel beside
the values of that channel. A mask, `where` (N, 1, S), is True at the positions that belong to the batch.

Statistics are kept in float64 where the namespace has float64. Elsewhere the mean is kept as the unevaluated sum
``mean + mean_low`` of two float32 numbers: a mean rounded to the precision of the data would shift every ``x - mean``
of a channel by the same amount, up to |mean|/std·2⁻²⁴ standard deviations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ._arrays.copies import widened
from ._arrays.devices import on_device_of
from ._arrays.namespaces import Array, array_namespace, dtype_name, wide_dtype


class Sweeps(Protocol):
    """The five sweeps over data (N, C, S) that the functions below share, under the same names as in this file.

    Where `where` is False, values may be NaN or anything else, and change nothing in the results at other positions.
    """

    def moments(self, x: Array, where: Array | None = None) -> tuple[Array, Array]:
        """(E1) Return mean and m2, of the values where `where` is True."""

    def dots(
        self, u: Array, x: Array, mean: Array, where: Array | None = None, skip_zeros: bool = False
    ) -> tuple[Array, Array]:
        """(E5, E8, E9) Return Σu and Σu·(x−mean), over `where`; `skip_zeros` lets 0·NaN be 0."""

    def affine(self, x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
        """(E3, E7) Return a·(x−mean) + c, in the dtype of x, perhaps written into `out`."""

    def affine2(
        self,
        u: Array,
        x: Array,
        mean: Array,
        a: Array,
        b: Array,
        c: Array,
        out: Array | None = None,
        where: Array | None = None,
    ) -> Array:
        """(E6, E8, E9) Return a·u + b·(x−mean) + c, or a·u where `where` is False, as `affine` does."""

    def affine3(
        self,
        v: Array,
        u: Array,
        x: Array,
        mean: Array,
        a: Array,
        b: Array,
        c: Array,
        d: Array,
        out: Array | None = None,
        where: Array | None = None,
    ) -> Array:
        """(E9) Return a·v + b·u + c·(x−mean) + d, or b·u where `where` is False, as `affine` does."""


class Mask(NamedTuple):
    """The positions that belong to the batch, and the number of them."""

    where: Array  # (N, 1, S), boolean
    n: int


class Totals(Protocol):
    """The sums over a batch that is in parts. Where ranks hold the parts, their vectors (C,) meet on the host."""

    kept: tuple[Array, Array | None]  # rstd and mean_low of the forward, where the sums are

    def sums(self, *parts: Array) -> Sequence[Array]:
        """Return the sum of each vector over all parts, perhaps on the host."""

    def home(self, *vectors: Array) -> Sequence[Array]:
        """Return vectors from there on the device and in the dtype of the part's statistics."""


class Pool(Totals, Protocol):
    """The ranks that hold the parts of a batch. Their vectors (C,) meet on the host, in float64."""

    def moments(self, part: Moments) -> Moments:
        """(E2) Return the moments of all parts together, on the host."""

    def split(self, mean: Array) -> tuple[Array, Array | None]:
        """Return the host's mean, in the dtype of the part's statistics, and the rounding error or None."""

    def keep(self, rstd: Array, mean_low: Array | None) -> None:
        """Keep the host's statistics for the backward."""


# ---- Batch norm ------------------------------------------------------------------------------------------------------


def forward(
    sweeps: Sweeps,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    pool: Pool | None = None,
    out: Array | None = None,
    *,
    mask: Mask | None = None,
) -> tuple[Moments, Array, Array]:
    """(E1–E3) The moments of the batch, rstd (C,), and y = weight·xhat + bias (N, C, S), masked positions included."""
    batch = batch_moments(sweeps, x, mask)  # (E1)
    if pool is None:
        return batch, *forward_of_part(sweeps, x, batch, weight, bias, eps, out)
    batch, r = _pooled(batch, eps, pool)  # (E2, E3)
    return batch, r, _normalized(sweeps, x, batch, r, weight, bias, out)


def forward_of_part(
    sweeps: Sweeps,
    x: Array,
    batch: Moments,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """(E3) rstd (C,), and y of x (N, C, S), a part of the batch or the whole, from the moments of the batch."""
    r = batch_rstd(batch.m2, batch.n, eps)
    return r, _normalized(sweeps, x, batch, r, weight, bias, out)


def _normalized(
    sweeps: Sweeps,
    x: Array,
    batch: Moments,
    rstd: Array,
    weight: Array | None,
    bias: Array | None,
    out: Array | None,
) -> Array:
    """(E3) y = weight·xhat + bias."""
    return sweeps.affine(x, batch.mean, *normalize(rstd, weight, bias, batch.mean_low), out)


def backward(
    sweeps: Sweeps,
    dy: Array,
    x: Array,
    batch: Moments,
    rstd: Array,
    weight: Array | None,
    pool: Totals | None = None,
    out: Array | None = None,
    *,
    where: Array | None = None,
) -> tuple[Array, Array, Array]:
    """(E5, E6) dx (N, C, S), and dweight and dbias (C,), which are sums over this part of the batch alone."""
    sums = gradient_sums(sweeps, dy, x, batch.mean, where)
    dweight, dbias = parameter_gradients(*sums, rstd, batch.mean_low)  # (E5)
    if pool is None:
        a, b, c = input_gradient(dweight, dbias, batch.n, rstd, weight, batch.mean_low)  # (E6)
    else:
        a, b, c = _pooled_input_gradient(sums, batch.n, weight, pool)
    return sweeps.affine2(dy, x, batch.mean, a, b, c, out, where=where), dweight, dbias


def gradient_sums(sweeps: Sweeps, dy: Array, x: Array, mean: Array, where: Array | None) -> tuple[Array, Array]:
    """(E5) Σdy and Σdy·(x−mean) (C,), masked positions included, as their y depends on the statistics too.

    A masked x may be NaN, and then counts for nothing if dy is 0 there.
    """
    return sweeps.dots(dy, x, mean) if where is None else sweeps.dots(dy, x, mean, skip_zeros=True)


def evaluate(
    sweeps: Sweeps,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array | None = None,
) -> tuple[Array, Array, Array | None, Array]:
    """(E3, E7) Copies of mean, rstd and weight (C,) in the dtype of statistics, and y, with fixed statistics."""
    mean, var = widened(mean), widened(var)
    weight, bias = (vector if vector is None else widened(vector) for vector in (weight, bias))
    r = rstd(var, eps)
    return mean, r, weight, sweeps.affine(x, mean, *normalize(r, weight, bias), out)


def evaluation_backward(
    sweeps: Sweeps, dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """(E5, E7) dx = weight·rstd·dy (N, C, S), and dweight and dbias (C,), with fixed statistics."""
    dweight, dbias = parameter_gradients(*sweeps.dots(dy, x, mean), rstd)  # (E5)
    a, zero = normalize(rstd, weight, None)
    return sweeps.affine(dy, zero, a, zero, out), dweight, dbias  # (E7)


def jvp(
    sweeps: Sweeps,
    x_dot: Array,
    x: Array,
    batch: Moments,
    rstd: Array,
    weight: Array | None,
    weight_dot: Array | None,
    bias_dot: Array | None,
    *,
    pool: Totals | None = None,
    out: Array | None = None,
    where: Array | None = None,
) -> Array:
    """(E8) y_dot = weight·rstd·P(x_dot) + weight_dot·xhat + bias_dot (N, C, S)."""
    sums, low = sweeps.dots(x_dot, x, batch.mean, where=where), batch.mean_low
    if pool is None:
        projected = input_gradient(*parameter_gradients(*sums, rstd, low), batch.n, rstd, weight, low)
    else:
        projected = _pooled_input_gradient(sums, batch.n, weight, pool)
    return sweeps.affine2(x_dot, x, batch.mean, *tangent(*projected, rstd, weight_dot, bias_dot, low), out)


def double_backward(
    sweeps: Sweeps,
    v: Array,
    dy: Array,
    x: Array,
    batch: Moments,
    rstd: Array,
    weight: Array | None,
    v_weight: Array | None,
    *,
    v_bias: Array | None = None,
    pool: Totals | None = None,
    out: tuple[Array | None, Array | None] = (None, None),
    where: Array | None = None,
) -> tuple[Array, Array, Array]:
    """(E9) ddy and ddx (N, C, S), and ddweight (C,), which is a sum over this part of the batch alone."""
    n, mean, low = batch.n, batch.mean, batch.mean_low
    part = second_sums(sweeps, v, dy, x, mean, v_weight, where)
    whole = part if pool is None else pool.home(*pool.sums(*part))
    g, t, by_weight = (parameter_gradients(whole[i], whole[i + 1], rstd, low) for i in (0, 2, 4))
    projected = input_gradient(*t, n, rstd, weight, low)
    ddy = sweeps.affine2(v, x, mean, *tangent(*projected, rstd, v_weight, v_bias, low), out[0])
    a, b, c, d = second_input_gradient(inner_product(whole[6], g, t, n), g, t, by_weight, n, rstd, weight, v_weight)
    ddx = sweeps.affine3(v, dy, x, mean, a, b, c, d if low is None else d - c * low, out[1], where=where)
    own = parameter_gradients(part[0], part[1], rstd, low)
    return ddy, ddx, rstd * inner_product(part[6], own, t, n)


def second_sums(
    sweeps: Sweeps, v: Array, dy: Array, x: Array, mean: Array, v_weight: Array | None, where: Array | None = None
) -> tuple[Array, ...]:
    """(E9) Σu and Σu·(x−mean) of u = dy, v and v_weight·dy, and Σv·dy, each (C,), of v, dy and x (N, C, S).

    Those of v are over `where`; dy, and with it v·dy, is summed over all positions, as in E5.
    """
    zero = array_namespace(mean).zeros_like(mean)
    of_dy, scale = gradient_sums(sweeps, dy, x, mean, where), zero if v_weight is None else v_weight
    _, v_dy = gradient_sums(sweeps, dy, v, zero, where)
    return *of_dy, *sweeps.dots(v, x, mean, where=where), scale * of_dy[0], scale * of_dy[1], v_dy


def evaluation_jvp(
    sweeps: Sweeps,
    x_dot: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    weight_dot: Array | None,
    bias_dot: Array | None,
    *,
    out: Array | None = None,
) -> Array:
    """(E8) y_dot = weight·rstd·x_dot + weight_dot·xhat + bias_dot (N, C, S), with fixed statistics."""
    a, zero = normalize(rstd, weight, None)
    return sweeps.affine2(x_dot, x, mean, *tangent(a, zero, zero, rstd, weight_dot, bias_dot), out)


def evaluation_double_backward(
    sweeps: Sweeps,
    v: Array,
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    v_weight: Array | None,
    *,
    v_bias: Array | None = None,
) -> tuple[Array, Array, Array]:
    """(E9) ddy and ddx (N, C, S), and ddweight (C,), with fixed statistics."""
    ddy = evaluation_jvp(sweeps, v, x, mean, rstd, weight, v_weight, v_bias)
    zero = array_namespace(mean).zeros_like(mean)
    ddx = sweeps.affine(dy, zero, zero if v_weight is None else v_weight * rstd, zero)
    return ddy, ddx, rstd * sweeps.dots(v, dy, zero)[1]


def _pooled(part: Moments, eps: float, pool: Pool) -> tuple[Moments, Array]:
    """(E2, E3) The moments of all ranks, and rstd, which is computed from them on the host."""
    batch = pool.moments(part)  # (E2)
    r, (mean, low) = batch_rstd(batch.m2, batch.n, eps), pool.split(batch.mean)  # (E3)
    pool.keep(r, low)
    if low is not None:
        mean, m2, r, low = pool.home(mean, batch.m2, r, low)
    else:
        mean, m2, r = pool.home(mean, batch.m2, r)
    return Moments(batch.n, mean, m2, mean_low=low), r


def _pooled_input_gradient(
    sums: tuple[Array, Array], n: int, weight: Array | None, pool: Totals
) -> tuple[Array, Array, Array]:
    """(E6) a, b and c of dx: for weight 1 on the host, then, as all three are linear in it, times the weight."""
    (sum_dy, sum_dy_x), (r, low) = pool.sums(*sums), pool.kept
    totals = parameter_gradients(sum_dy, sum_dy_x, r, low)
    a, b, c = pool.home(*input_gradient(*totals, n, r, None, low))
    return (a, b, c) if weight is None else (weight * a, weight * b, weight * c)


# ---- The sweeps: all that ever touches data of the size of x ---------------------------------------------------------

MASKS = True  # these sweeps take `where`


def moments(x: Array, where: Array | None = None) -> tuple[Array, Array]:
    """(E1) mean and m2 (C,) of x (N, C, S), in two passes with a correction between them.

    The first mean carries the rounding of a large sum. That error shows as the mean of x − mean, where it can be
    measured and taken away. So a constant channel has exactly its value as mean, and exactly 0 as m2.
    Source: T. F. Chan, G. H. Golub, R. J. LeVeque, Algorithms for computing the sample variance, 1983, eq. (1.7).
    """
    xp, n = array_namespace(x), _number(x, where)
    x = xp.astype(x, wide_dtype(x), copy=False)
    mean = _sum(_masked(x, where)) / n
    x = _masked(x - mean[:, None], where)
    error = _sum(x) / n
    x = _masked(x - error[:, None], where)
    corrected = xp.where(xp.isfinite(mean), mean + error, mean)  # inf − inf is no correction
    return corrected, _sum(x * x)


def dots(u: Array, x: Array, mean: Array, where: Array | None = None, skip_zeros: bool = False) -> tuple[Array, Array]:
    """(E5, E8, E9) Σu and Σu·(x−mean), each (C,), of u and x (N, C, S), over `where`; `skip_zeros` lets 0·NaN be 0."""
    xp = array_namespace(x)
    u, x = xp.astype(u, mean.dtype, copy=False), xp.astype(x, mean.dtype, copy=False)
    u, x = _masked(u, where), _masked(x - mean[:, None], u != 0 if skip_zeros else where)
    return _sum(u), _sum(u * x)


def affine(x: Array, mean: Array, a: Array, c: Array, out: Array | None = None) -> Array:
    """(E3, E7) a·(x−mean) + c (N, C, S), in the dtype of x; `out` is left alone, the result is a new array."""
    xp = array_namespace(x)
    wide = xp.astype(x, mean.dtype, copy=False)
    return xp.astype(a[:, None] * (wide - mean[:, None]) + c[:, None], x.dtype, copy=False)


def affine2(
    u: Array,
    x: Array,
    mean: Array,
    a: Array,
    b: Array,
    c: Array,
    out: Array | None = None,
    where: Array | None = None,
) -> Array:
    """(E6, E8, E9) a·u + b·(x−mean) + c (N, C, S), or a·u if not `where`, in the dtype of x; `out` is left alone."""
    xp = array_namespace(x)
    u, wide = xp.astype(u, mean.dtype, copy=False), xp.astype(x, mean.dtype, copy=False)
    result = a[:, None] * u + _masked(b[:, None] * (wide - mean[:, None]) + c[:, None], where)
    return xp.astype(result, x.dtype, copy=False)


def affine3(
    v: Array,
    u: Array,
    x: Array,
    mean: Array,
    a: Array,
    b: Array,
    c: Array,
    d: Array,
    out: Array | None = None,
    where: Array | None = None,
) -> Array:
    """(E9) a·v + b·u + c·(x−mean) + d (N, C, S), or b·u if not `where`, in the dtype of x; `out` is left alone."""
    xp = array_namespace(x)
    v, u, wide = (xp.astype(t, mean.dtype, copy=False) for t in (v, u, x))
    slope = _masked(c[:, None] * (wide - mean[:, None]) + d[:, None], where)
    result = _masked(a[:, None] * v, where) + (b[:, None] * u + slope)
    return xp.astype(result, x.dtype, copy=False)


def _masked(t: Array, where: Array | None) -> Array:
    """t (N, C, S) where `where` is True, and 0 elsewhere; t·where would keep a NaN."""
    xp = array_namespace(t)
    return t if where is None else xp.where(where, t, xp.zeros_like(t))


def _number(x: Array, where: Array | None) -> Array | int:
    """n of x (N, C, S), at least 1."""
    if where is None:
        return max(x.shape[0] * x.shape[2], 1)
    xp = array_namespace(x)
    number = xp.count_nonzero(where)
    return xp.astype(xp.maximum(number, xp.ones_like(number)), wide_dtype(x))


def _sum(t: Array) -> Array:
    """Σ over N and S: (N, C, S) → (C,), by adding halves, then halves of those, …

    Every value goes through about log₂ n additions, so the error grows with log n, and the order of the additions is
    the same in every namespace.
    """
    xp = array_namespace(t)
    if t.shape[0] * t.shape[2] <= 1:  # of one value, t itself would be returned, in the caller's memory
        return xp.sum(t, axis=(0, 2))
    return _sum_last(_sum_last(xp.permute_dims(t, (1, 2, 0))))


def _sum_last(t: Array) -> Array:
    """Σ over the last axis, which is lost."""
    odd = None
    while (size := t.shape[-1]) > 1:
        if size % 2:
            odd = t[..., -1] if odd is None else odd + t[..., -1]
        t = t[..., : size // 2] + t[..., size // 2 : size // 2 * 2]
    return t[..., 0] if odd is None else t[..., 0] + odd


# ---- Moments: what a batch is reduced to -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moments:
    """(E1) What batch norm has to know of a batch: n, mean and m2 = Σ(x−mean)² of each channel.

    Parameters
    ----------
    n : int
        How many values each channel was reduced over.
    mean : array (C,)
        Σx / n, float64 where the namespace has it; 0 where n is 0.
    m2 : array (C,)
        Σ(x−mean)², in the dtype of `mean`.
    mean_low : array (C,), optional
        What is left of the mean below the precision of `mean`. Only where the namespace has no float64.
    record : array (rows, C), optional
        The sums that did not round (E10), of which mean and m2 are made. Only in exact mode.

    Examples
    --------
    >>> import numpy, arraybn
    >>> batch = arraybn.moments(numpy.asarray([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]]))
    >>> batch.n, batch.mean, batch.m2
    (3, array([3., 5.]), array([14.,  0.]))
    >>> batch.var(correction=1)
    array([7., 0.])
    """

    n: int
    mean: Array
    m2: Array
    mean_low: Array | None = field(default=None, repr=False, kw_only=True)
    record: Array | None = field(default=None, repr=False, kw_only=True)

    def var(self, correction: int = 0) -> Array:
        """m2 / (n − correction) (C,): biased by default, unbiased with 1, NaN where n ≤ correction."""
        if self.n <= correction:
            with on_device_of(self.m2):
                return array_namespace(self.m2).full_like(self.m2, float("nan"))
        with on_device_of(self.m2):
            return self.m2 / (self.n - correction)


def batch_moments(sweeps: Sweeps, x: Array, mask: Mask | None = None) -> Moments:
    """(E1) The moments of x (N, C, S), with the low part of the mean where float32 is the widest dtype."""
    where, n = (None, x.shape[0] * x.shape[2]) if mask is None else mask
    mean, m2 = sweeps.moments(x, where=where)
    if n == 0 or dtype_name(mean.dtype) == "float64":
        return Moments(n, mean, m2)
    xp = array_namespace(x)
    _, rest = sweeps.dots(xp.ones_like(x), x, mean, where=where)
    return Moments(n, mean, m2, mean_low=xp.where(xp.isfinite(mean), rest / n, xp.zeros_like(mean)))


def pool(a: Moments, b: Moments) -> Moments:
    """(E2) The moments of two disjoint batches together; pool(a, b) and pool(b, a) have the same bits.

    Source: T. F. Chan, G. H. Golub, R. J. LeVeque, Updating formulae and a pairwise algorithm, 1979, eq. (2.1).
    """
    if a.n == 0 or b.n == 0:
        return b if a.n == 0 else a
    xp, n = array_namespace(a.mean), a.n + b.n
    if a.n < b.n:
        a, b = b, a
    mean_a, mean_b, low_a, low_b = a.mean, b.mean, _low(a), _low(b)
    if a.n == b.n:  # the smaller mean first, so that the order of the arguments does not matter
        swap = (mean_a > mean_b) | ((mean_a == mean_b) & (low_a > low_b))
        mean_a, mean_b = xp.where(swap, mean_b, mean_a), xp.where(swap, mean_a, mean_b)
        low_a, low_b = xp.where(swap, low_b, low_a), xp.where(swap, low_a, low_b)
    same = mean_a == mean_b  # inf − inf would be NaN
    delta = xp.where(same, xp.zeros_like(mean_a), mean_b - mean_a) + (low_b - low_a)
    step = delta * (b.n / n)
    m2 = (a.m2 + b.m2) + delta * delta * (a.n * b.n / n)
    mean = mean_a + step
    if a.mean_low is None and b.mean_low is None:
        return Moments(n, mean, m2)
    return Moments(n, mean, m2, mean_low=low_a + ((mean_a - mean) + step))


def _low(m: Moments) -> Array:
    return array_namespace(m.mean).zeros_like(m.mean) if m.mean_low is None else m.mean_low


def update_running_stats(
    running_mean: Array, running_var: Array, mean: Array, var: Array, momentum: float
) -> tuple[Array, Array]:
    """(E4) The running mean and variance (C,) after one more batch."""
    return update_running(running_mean, mean, momentum), update_running(running_var, var, momentum)


def update_running(running: Array, value: Array, momentum: float) -> Array:
    """(E4) (1−momentum)·running + momentum·value (C,), in the dtype of `running`."""
    xp = array_namespace(running)
    average = (1 - momentum) * xp.astype(running, value.dtype) + momentum * value
    return xp.astype(average, running.dtype, copy=False)


# ---- The formulas: the vectors (C,) that the sweeps are given --------------------------------------------------------


def rstd(var: Array, eps: float) -> Array:
    """(E3) 1/√(var+eps) (C,); 0 where var and eps are both 0, so that xhat of a constant channel is 0."""
    xp, total = array_namespace(var), var + eps
    if eps >= 2.0**-126:  # below, float32 may have no such number
        return 1 / xp.sqrt(total)
    zero = total == 0
    return xp.where(zero, xp.zeros_like(total), 1 / xp.sqrt(xp.where(zero, xp.ones_like(total), total)))


def batch_rstd(m2: Array, n: int, eps: float) -> Array:
    """(E3) 1/√(m2/n + eps) (C,), from the biased variance of a batch; an empty batch has variance 0."""
    return rstd(m2 / max(n, 1), eps)


def normalize(
    rstd: Array, weight: Array | None, bias: Array | None, mean_low: Array | None = None
) -> tuple[Array, Array]:
    """(E3) a and c (C,) of y = weight·xhat + bias = a·(x−mean) + c."""
    a = rstd if weight is None else weight * rstd
    c = array_namespace(rstd).zeros_like(rstd) if bias is None else bias
    return a, c if mean_low is None else c - a * mean_low


def parameter_gradients(
    sum_dy: Array, sum_dy_x: Array, rstd: Array, mean_low: Array | None = None
) -> tuple[Array, Array]:
    """(E5) dweight = Σdy·xhat and dbias = Σdy (C,), from Σdy and Σdy·(x−mean)."""
    if mean_low is not None:
        sum_dy_x = sum_dy_x - mean_low * sum_dy
    return rstd * sum_dy_x, sum_dy


def input_gradient(
    dweight: Array, dbias: Array, n: int, rstd: Array, weight: Array | None, mean_low: Array | None = None
) -> tuple[Array, Array, Array]:
    """(E6) a, b and c (C,) of dx = weight·rstd·(dy − dbias/n − xhat·dweight/n) = a·dy + b·(x−mean) + c."""
    a, n = rstd if weight is None else weight * rstd, max(n, 1)
    b = -a * rstd * (dweight / n)
    c = -a * (dbias / n)
    return a, b, c if mean_low is None else c - b * mean_low


def tangent(
    a: Array,
    b: Array,
    c: Array,
    rstd: Array,
    weight_dot: Array | None,
    bias_dot: Array | None,
    mean_low: Array | None = None,
) -> tuple[Array, Array, Array]:
    """(E8, E9) a, b and c (C,) of a·u + b·(x−mean) + c + weight_dot·xhat + bias_dot."""
    if weight_dot is not None:
        slope = weight_dot * rstd
        b, c = b + slope, c if mean_low is None else c - slope * mean_low
    return a, b, c if bias_dot is None else c + bias_dot


def inner_product(v_dy: Array, g: tuple[Array, Array], t: tuple[Array, Array], n: int) -> Array:
    """(E9) n·Q = Σv·P(dy) (C,), from Σv·dy, and Σu·xhat and Σu of u = dy (g) and of u = v (t)."""
    return v_dy - (g[0] * t[0] + g[1] * t[1]) / max(n, 1)


def second_input_gradient(
    product: Array,
    g: tuple[Array, Array],
    t: tuple[Array, Array],
    by_weight: tuple[Array, Array],
    n: int,
    rstd: Array,
    weight: Array | None,
    v_weight: Array | None,
) -> tuple[Array, Array, Array, Array]:
    """(E9) a, b, c and d (C,) of ddx = a·v + b·dy + c·(x−mean) + d.

    g, t and by_weight are Σu·xhat and Σu of u = dy, v and v_weight·dy; product is n·Q.
    """
    n = max(n, 1)
    scale = -rstd * rstd if weight is None else -weight * rstd * rstd
    a, b = scale * (g[0] / n), scale * (t[0] / n)
    c = scale * (product / n) - (a * t[0] + b * g[0] + rstd * by_weight[0]) / n
    d = -(a * t[1] + b * g[1] + rstd * by_weight[1]) / n
    return a, b if v_weight is None else b + v_weight * rstd, c * rstd, d

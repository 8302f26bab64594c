"""Wrong calls of the functions: arrays in, arrays out."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from arraybn import kernels

from .texts import ASTYPE, CONVERT, MOVE, SHAPE_3, Bad, no_array, no_float, other_home


def with_grad(name: str) -> str:
    return (
        f"{name}: expected a tensor without requires_grad, because the gradients here are written by hand and autograd"
        f" would record them for nothing; got one with it. Pass {name}.detach()"
    )


def masked(name: str) -> str:
    return (
        f"{name}: expected a plain array; got MaskedArray, whose mask would be lost."
        " Leave out the samples with masked values, or fill these values with the mean of their channel"
        " (zeros would shift it)"
    )


def no_mask(got: str) -> str:
    return f"where: expected a boolean array, True where a value counts; got {got}"


def no_bool(got: str) -> str:
    return f"where: expected bool, True where a value counts; got {got}. Compare it, for example where != 0"


def shape_of_mask(expected: str, got: str, hint: str = "x without its channels") -> str:
    return f"where: expected shape {expected}, {hint}, or one that broadcasts to it; got {got}"


def channels_of_mask(expected: str, got: str) -> str:
    return shape_of_mask(expected, got, "without an axis of channels")


OVERWRITTEN = (
    "saved: expected a forward whose x is still there; got one without, because {}. Pass another array as out, or None"
)

SWEEPS = "kernels: expected a module with the sweeps moments, dots, affine, affine2; got {}"

NO_OUT = "out: expected shape (4, 3) and dtype float32, those of the result; got {}"

OVERLAP = (
    "out: expected memory disjoint from {0}, or {0} itself; got a partial overlap."
    " Pass a fresh array, for example xp.empty_like({0})"
)

SAVED = "saved = batch_norm(X, W, W)[1]"
PART = "saved = batch_norm(X[:2], W, moments=M)[1]; sums = batch_norm_sums(DY[:2], saved)"
PARTS = """. A batch in parts takes these calls:
    m = pool(*(moments(p) for p in parts))
    y, saved = batch_norm(p, moments=m)       # for each part p
    s = batch_norm_sums(dy, saved)            # for each part
    dx, dweight, dbias = batch_norm_backward(dy, saved, sums=sum([s, …]))"""


class Frame:
    """An object that converts to an array but is none, like a data frame of pandas."""

    shape, ndim = (4, 3), 2

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.ones((4, 3), dtype)


FUNCTIONS = [
    # x
    Bad("batch_norm([[1.0, 2.0]])", TypeError, no_array("x", "list"), "x", CONVERT),
    Bad("batch_norm(None)", TypeError, no_array("x", "NoneType"), "x", CONVERT),
    Bad("batch_norm(1.0)", TypeError, no_array("x", "float"), "x", CONVERT),
    Bad("batch_norm('x')", TypeError, no_array("x", "str"), "x", CONVERT),
    Bad("batch_norm(row for row in X)", TypeError, no_array("x", "generator"), "x", CONVERT),
    Bad("batch_norm(Frame())", TypeError, no_array("x", f"{Frame.__module__}.Frame"), "x", CONVERT),
    Bad("batch_norm(X.astype(int))", TypeError, no_float("x", "int64"), "x", ASTYPE),
    Bad("batch_norm(X > 0)", TypeError, no_float("x", "bool"), "x", ASTYPE),
    Bad("batch_norm(X + 1j)", TypeError, no_float("x", "complex64"), "x", ASTYPE),
    Bad("batch_norm(X.astype(object))", TypeError, no_float("x", "object"), "x", ASTYPE),
    Bad("batch_norm(np.zeros((4, 3), [('a', 'f4')]))", TypeError, no_float("x", "void32"), "x", ASTYPE),
    Bad("batch_norm(np.zeros((4, 3), 'M8[s]'))", TypeError, no_float("x", "datetime64[s]"), "x", ASTYPE),
    Bad("batch_norm(np.ma.masked_array(X, X > 2))", TypeError, masked("x"), "x", "Leave out the samples"),
    Bad(
        "batch_norm(Parameter(X))",
        TypeError,
        "x: expected an array (NumPy, CuPy, torch, JAX or any array API namespace); got arraybn.modules.Parameter."
        " Pass x.data",
        "x",
        "Pass x.data",
    ),
    Bad("batch_norm(X[0])", ValueError, "x: expected at least 2 dimensions, (N, C, *S); got shape (3,)", "x"),
    Bad("batch_norm(np.float32(1))", ValueError, "x: expected at least 2 dimensions, (N, C, *S); got shape ()", "x"),
    Bad("batch_norm(X[:, :0])", ValueError, "x: expected at least one channel on axis 1; got shape (4, 0)", "x"),
    Bad("batch_norm(torch.ones(4, 3, requires_grad=True))", TypeError, with_grad("x"), "x", "x.detach()", "", "torch"),
    Bad(
        "batch_norm(torch.ones(4, 3).to_sparse())",
        TypeError,
        "x: expected a dense tensor; got torch.sparse_coo. Pass x.to_dense()",
        "x",
        "Pass x.to_dense()",
        needs="torch",
    ),
    Bad(
        "batch_norm(torch.ones(4, 3, dtype=torch.float8_e5m2))",
        TypeError,
        no_float("x", "float8_e5m2").replace("astype(numpy.", "to(torch."),
        "x",
        ASTYPE,
        needs="torch",
    ),
    # weight, bias, mean, var
    Bad("batch_norm(X, [1, 1, 1])", TypeError, no_array("weight", "list"), "weight", CONVERT),
    Bad("batch_norm(X, 1.0)", TypeError, no_array("weight", "float"), "weight", CONVERT),
    Bad("batch_norm(X, W[:2])", ValueError, SHAPE_3.format("weight", "x", "(2,)"), "weight"),
    Bad("batch_norm(X, W[None])", ValueError, SHAPE_3.format("weight", "x", "(1, 3)"), "weight"),
    Bad("batch_norm(X, np.float32(1))", ValueError, SHAPE_3.format("weight", "x", "()"), "weight"),
    Bad("batch_norm(X, W.astype(int))", TypeError, no_float("weight", "int64"), "weight", ASTYPE),
    Bad("batch_norm(X, np.ma.masked_array(W))", TypeError, masked("weight"), "weight", "Leave out the samples"),
    Bad("batch_norm(X, W, 0)", TypeError, no_array("bias", "int"), "bias", CONVERT),
    Bad("batch_norm(X, W, W[1:])", ValueError, SHAPE_3.format("bias", "x", "(2,)"), "bias"),
    Bad(
        "batch_norm(X, strict.ones(3))",
        TypeError,
        other_home("weight", "numpy", "array_api_strict"),
        "weight",
        MOVE,
        needs="array_api_strict",
    ),
    Bad(
        "batch_norm(a, b)",
        ValueError,
        r"weight: expected on .*CPU.* as x is; got one on .*device1.*\. Move one of them \(a layer with"
        r" layer\.to\(device=…\), an array with to_device\)",
        "weight",
        MOVE,
        "a = strict.ones((4, 3)); b = strict.ones(3, device=strict.Device('device1'))",
        "array_api_strict",
        True,
    ),
    Bad(
        "batch_norm(torch.ones(4, 3), torch.nn.Parameter(torch.ones(3)))",
        TypeError,
        with_grad("weight"),
        "weight",
        "weight.detach()",
        needs="torch",
    ),
    Bad("batch_norm(X, mean=W)", ValueError, "var: expected an array, because mean is given; got None", "var"),
    Bad("batch_norm(X, var=W)", ValueError, "mean: expected an array, because var is given; got None", "mean"),
    Bad("batch_norm(X, mean=0.0, var=W)", TypeError, no_array("mean", "float"), "mean", CONVERT),
    Bad("batch_norm(X, mean=W, var=W[:1])", ValueError, SHAPE_3.format("var", "x", "(1,)"), "var"),
    # eps, channel_axis, kernels
    Bad("batch_norm(X, eps=-1e-5)", ValueError, "eps: expected a number ≥ 0; got -1e-05", "eps"),
    Bad("batch_norm(X, eps=float('nan'))", ValueError, "eps: expected a finite number; got nan", "eps"),
    Bad("batch_norm(X, eps=np.inf)", ValueError, "eps: expected a finite number; got inf", "eps"),
    Bad(
        "batch_norm(X, eps=10**400)",
        ValueError,
        "eps: expected a finite number; got one beyond the range of float",
        "eps",
    ),
    Bad("batch_norm(X, eps='1e-5')", TypeError, "eps: expected a number; got '1e-5'", "eps"),
    Bad("batch_norm(X, eps=None)", TypeError, "eps: expected a number; got None", "eps"),
    Bad("batch_norm(X, eps=True)", TypeError, "eps: expected a number; got True", "eps"),
    Bad("batch_norm(X, eps=np.True_)", TypeError, "eps: expected a number; got np.True_", "eps"),
    Bad("batch_norm(X, eps=np.asarray(0.5))", TypeError, "eps: expected a number; got array(0.5)", "eps"),
    Bad("batch_norm(X, eps=1j)", TypeError, "eps: expected a number; got 1j", "eps"),
    Bad(
        "batch_norm(X, channel_axis=2)",
        ValueError,
        "channel_axis: expected -2 … 1 for x of 2 dimensions; got 2",
        "channel_axis",
    ),
    Bad(
        "batch_norm(X, channel_axis=-3)",
        ValueError,
        "channel_axis: expected -2 … 1 for x of 2 dimensions; got -3",
        "channel_axis",
    ),
    Bad("batch_norm(X, channel_axis=1.0)", TypeError, "channel_axis: expected an integer; got 1.0", "channel_axis"),
    Bad("batch_norm(X, channel_axis=True)", TypeError, "channel_axis: expected an integer; got True", "channel_axis"),
    Bad("batch_norm(X, channel_axis=(1,))", TypeError, "channel_axis: expected an integer; got (1,)", "channel_axis"),
    Bad(
        "batch_norm(X, channel_axis=np.asarray(1))",
        TypeError,
        "channel_axis: expected an integer; got array(1)",
        "channel_axis",
    ),
    Bad(
        "batch_norm(X, kernels='gpu')",
        ValueError,
        f"kernels: expected one of {sorted(kernels.MODULES)} or a kernel module; got 'gpu'",
        "kernels",
    ),
    Bad("batch_norm(X, kernels=0)", TypeError, SWEEPS.format("0 without moments, dots, affine, affine2"), "kernels"),
    Bad(
        "moments(X, kernels=['reference'])",
        TypeError,
        SWEEPS.format("['reference'] without moments, dots, affine, affine2"),
        "kernels",
    ),
    Bad(
        "moments(X, kernels=arraybn)",
        TypeError,
        re.escape(SWEEPS.format("<module 'arraybn' from ")) + ".*> without dots, affine, affine2",
        "kernels",
        pattern=True,
    ),
    # out
    Bad("batch_norm(X, out=[0.0])", TypeError, "out: expected a numpy array; got list", "out"),
    Bad("batch_norm(X, out=True)", TypeError, "out: expected a numpy array; got bool", "out"),
    Bad(
        "batch_norm(X, out=np.ma.masked_array(OUT, X > 2))",
        TypeError,
        "out: expected a numpy array; got numpy.ma.MaskedArray",
        "out",
    ),
    Bad("batch_norm(X, out=OUT[:2])", ValueError, NO_OUT.format("(2, 3) and <f4"), "out"),
    Bad("batch_norm(X, out=np.zeros((4, 3)))", ValueError, NO_OUT.format("(4, 3) and <f8"), "out"),
    Bad("batch_norm(X, out=np.zeros((4, 3), '>f4'))", ValueError, NO_OUT.format("(4, 3) and >f4"), "out"),
    Bad("batch_norm(X, out=F)", ValueError, "out: expected a writeable array; got a read-only one", "out"),
    Bad(
        "batch_norm(X, out=np.lib.stride_tricks.as_strided(OUT, (4, 3), (12, 0)))",
        ValueError,
        "out: expected memory of its own for every value; got strides (12, 0)",
        "out",
    ),
    Bad("batch_norm(X, out=X[::-1])", ValueError, OVERLAP.format("x"), "out", "Pass a fresh array"),
    Bad(
        "batch_norm(X, LONG[:3], out=LONG.reshape(4, 3))",
        ValueError,
        OVERLAP.format("weight"),
        "out",
        "Pass a fresh array",
    ),
    Bad(
        "batch_norm(X, out=strict.zeros((4, 3), dtype=strict.float32))",
        TypeError,
        other_home("out", "numpy", "array_api_strict"),
        "out",
        MOVE,
        needs="array_api_strict",
    ),
    Bad(
        "batch_norm(torch.ones(4, 3), out=torch.zeros(4, 3, requires_grad=True))",
        TypeError,
        with_grad("out"),
        "out",
        "Pass out.detach()",
        needs="torch",
    ),
    Bad(
        "batch_norm(jax.numpy.ones((4, 3)), out=jax.numpy.ones((4, 3)))",
        TypeError,
        "out: expected an array that can be written into; got a JAX array. Leave out=None",
        "out",
        "Leave out=None",
        needs="jax",
    ),
    # moments, pool, update_running_stats
    Bad("moments([1.0])", TypeError, no_array("x", "list"), "x", CONVERT),
    Bad("moments(X, channel_axis=None)", TypeError, "channel_axis: expected an integer; got None", "channel_axis"),
    Bad("pool()", TypeError, "moments: expected at least one Moments; got none", "moments"),
    Bad(
        "pool([M, M])",
        TypeError,
        "moments[0]: expected Moments, as arraybn.moments returns; got list",
        "moments[0]",
    ),
    Bad("pool(M, X)", TypeError, "moments[1]: expected Moments, as arraybn.moments returns; got ndarray", "moments[1]"),
    Bad(
        "pool(M, moments(X[:, :2]))",
        ValueError,
        "moments[1]: expected 3 channels as moments[0] has; got 2",
        "moments[1]",
    ),
    Bad(
        "pool(M, moments(strict.ones((4, 3))))",
        TypeError,
        other_home("moments[1].mean", "numpy", "array_api_strict", "moments[0].mean"),
        "moments[1].mean",
        MOVE,
        needs="array_api_strict",
    ),
    Bad("pool(Moments('4', W, W), M)", TypeError, "moments[0].n: expected an integer; got '4'", "moments[0].n"),
    Bad("pool(Moments(2.5, W, W), M)", TypeError, "moments[0].n: expected an integer; got 2.5", "moments[0].n"),
    Bad("pool(M, Moments(-1, W, W))", ValueError, "moments[1].n: expected an integer ≥ 0; got -1", "moments[1].n"),
    Bad("pool(Moments(1, [1.0], [1.0]))", TypeError, no_array("moments[0].mean", "list"), "moments[0].mean", CONVERT),
    Bad(
        "pool(Moments(1, W.astype(int), W), M)",
        TypeError,
        no_float("moments[0].mean", "int64"),
        "moments[0].mean",
        ASTYPE,
    ),
    Bad("pool(Moments(1, X, X), M)", ValueError, "moments[0].mean: expected shape (C,); got (4, 3)", "moments[0].mean"),
    Bad(
        "pool(M, Moments(1, W, W[:2]))",
        ValueError,
        "moments[1].m2: expected shape (3,), that of moments[1].mean; got (2,)",
        "moments[1].m2",
    ),
    Bad(
        "pool(M, Moments(1, W, 1.0))",
        TypeError,
        "moments[1].m2: expected an array like moments[1].mean; got float",
        "moments[1].m2",
    ),
    Bad(
        "update_running_stats(W, W, X, 0.1)",
        TypeError,
        "moments: expected Moments, as arraybn.moments returns; got ndarray",
        "moments",
    ),
    Bad(
        "update_running_stats(W, W, Moments(1.5, W, W), 0.1)",
        TypeError,
        "moments.n: expected an integer; got 1.5",
        "moments.n",
    ),
    Bad(
        "update_running_stats(W, W, Moments(3, 1.0, 1.0), 0.1)",
        TypeError,
        no_array("moments.mean", "float"),
        "moments.mean",
        CONVERT,
    ),
    Bad(
        "update_running_stats(None, W, M, 0.1)",
        TypeError,
        "running_mean: expected an array (3,); got None",
        "running_mean",
    ),
    Bad(
        "update_running_stats(W, [1, 1, 1], M, 0.1)",
        TypeError,
        no_array("running_var", "list"),
        "running_var",
        CONVERT,
    ),
    Bad(
        "update_running_stats(W, W[:2], M, 0.1)",
        ValueError,
        SHAPE_3.format("running_var", "moments.mean", "(2,)"),
        "running_var",
    ),
    Bad(
        "update_running_stats(W.astype(int), W, M, 0.1)",
        TypeError,
        no_float("running_mean", "int64"),
        "running_mean",
        ASTYPE,
    ),
    Bad("update_running_stats(W, W, M, None)", TypeError, "momentum: expected a number; got None", "momentum"),
    Bad("update_running_stats(W, W, M, '0.1')", TypeError, "momentum: expected a number; got '0.1'", "momentum"),
    Bad("update_running_stats(W, W, M, np.nan)", ValueError, "momentum: expected a finite number; got nan", "momentum"),
    Bad(
        "update_running_stats(W, W, M, 0.1, correction=-1)",
        ValueError,
        "correction: expected an integer ≥ 0; got -1",
        "correction",
    ),
    Bad(
        "update_running_stats(W, W, M, 0.1, correction=0.5)",
        TypeError,
        "correction: expected an integer; got 0.5",
        "correction",
    ),
    Bad(
        "update_running_stats(W, W, M, 0.1, correction=4)",
        ValueError,
        "moments: expected n > correction = 4, or the variance is not defined; got n = 4",
        "moments",
    ),
    # where
    Bad("batch_norm(X, where=[1, 1, 0, 0])", TypeError, no_mask("list"), "where"),
    Bad("batch_norm(X, where=True)", TypeError, no_mask("bool"), "where"),
    Bad("moments(X, where='all')", TypeError, no_mask("str"), "where"),
    Bad("batch_norm(X, where=np.ma.masked_array(L > 0, L > 1))", TypeError, no_mask("numpy.ma.MaskedArray"), "where"),
    Bad("batch_norm(X, where=L)", TypeError, no_bool("int64"), "where", "where != 0"),
    Bad("batch_norm(X, where=X[:, 0])", TypeError, no_bool("float32"), "where", "where != 0"),
    Bad("moments(X, where=L.astype('u1'))", TypeError, no_bool("uint8"), "where", "where != 0"),
    Bad("batch_norm(X, where=L[:3] > 0)", ValueError, shape_of_mask("(4,)", "(3,)"), "where"),
    Bad(
        "batch_norm(X, where=X > 1)",
        ValueError,
        channels_of_mask("(4,)", "(4, 3)"),
        "where",
    ),
    Bad(
        "batch_norm(X, where=(L > 0)[:, None])",
        ValueError,
        channels_of_mask("(4,)", "(4, 1)"),
        "where",
    ),
    Bad(
        "moments(X, where=L > 0, channel_axis=0)",
        ValueError,
        shape_of_mask("(3,)", "(4,)"),
        "where",
    ),
    Bad(
        "batch_norm(X[:, :, None], where=np.ones((4, 2), bool))",
        ValueError,
        shape_of_mask("(4, 1)", "(4, 2)"),
        "where",
    ),
    Bad("batch_norm(X, mean=W, var=W, where=L)", TypeError, no_bool("int64"), "where", "where != 0"),
    Bad(
        "batch_norm(X, where=strict.ones(4, dtype=strict.bool))",
        TypeError,
        other_home("where", "numpy", "array_api_strict"),
        "where",
        MOVE,
        needs="array_api_strict",
    ),
    Bad(
        "batch_norm(a, where=b)",
        ValueError,
        r"where: expected on .*CPU.* as x is; got one on .*device1.*\. Move one of them \(a layer with"
        r" layer\.to\(device=…\), an array with to_device\)",
        "where",
        MOVE,
        "a = strict.ones((4, 3)); b = strict.ones(4, dtype=strict.bool, device=strict.Device('device1'))",
        "array_api_strict",
        True,
    ),
    Bad(
        "jax.jit(lambda where: batch_norm(jax.numpy.ones((4, 3)), where=where))(jax.numpy.ones(4, bool))",
        TypeError,
        "where: expected a mask with values, because they are counted; got a JAX tracer. Make the mask outside of"
        " jax.jit, from numbers that are known there",
        "where",
        "Make the mask outside",
        needs="jax",
    ),
    Bad(
        "batch_norm(X, where=L > 0, moments=arraybn.Moments(1, W, W))",
        ValueError,
        "moments: expected those of the whole batch, n ≥ 2, the values per channel of x; got n = 1."
        " Pool those of all parts: arraybn.pool(*(arraybn.moments(part) for part in parts))",
        "moments",
        "Pool those",
    ),
]

BACKWARD = [
    Bad("batch_norm_backward(None, saved)", TypeError, no_array("dy", "NoneType"), "dy", CONVERT, SAVED),
    Bad("batch_norm_backward(DY > 0, saved)", TypeError, no_float("dy", "bool"), "dy", ASTYPE, SAVED),
    Bad(
        "batch_norm_backward(DY[:2], saved)",
        ValueError,
        "dy: expected shape (4, 3), that of x and y; got (2, 3)",
        "dy",
        setup=SAVED,
    ),
    Bad(
        "batch_norm_backward(strict.ones((4, 3)), saved)",
        TypeError,
        other_home("dy", "numpy", "array_api_strict"),
        "dy",
        MOVE,
        SAVED,
        "array_api_strict",
    ),
    Bad(
        "batch_norm_backward(DY, batch_norm(X))",
        TypeError,
        "saved: expected what batch_norm returned beside y; got tuple",
        "saved",
    ),
    Bad(
        "batch_norm_backward(saved, DY)",
        TypeError,
        "saved: expected what batch_norm returned beside y; got ndarray",
        "saved",
        setup=SAVED,
    ),
    Bad("batch_norm_backward(DY, saved, out=0)", TypeError, "out: expected a numpy array; got int", "out", setup=SAVED),
    Bad(
        "batch_norm_backward(DY, saved, out=np.zeros((4, 3)))",
        ValueError,
        NO_OUT.format("(4, 3) and <f8"),
        "out",
        setup=SAVED,
    ),
    Bad(
        "batch_norm_backward(DY, saved, out=DY[::-1])",
        ValueError,
        OVERLAP.format("dy"),
        "out",
        "Pass a fresh array",
        SAVED,
    ),
    Bad(
        "batch_norm_backward(DY, saved)",
        RuntimeError,
        OVERWRITTEN.format("the forward wrote y over x (out=x)"),
        "saved",
        "Pass another array as out",
        "saved = batch_norm(X, out=X)[1]",
    ),
    Bad(
        "batch_norm_backward(DY, saved)",
        RuntimeError,
        OVERWRITTEN.format("an earlier backward wrote dx over it (out=x)"),
        "saved",
        "Pass another array as out",
        f"{SAVED}; batch_norm_backward(DY, saved, out=X)",
    ),
    # a batch in parts
    Bad(
        "batch_norm(X, moments=X)",
        TypeError,
        "moments: expected Moments, as arraybn.moments returns; got ndarray",
        "moments",
    ),
    Bad(
        "batch_norm(X, mean=W, var=W, moments=M)",
        ValueError,
        "moments: expected None, because mean and var are given; got Moments. Pass one of them",
        "moments",
        "Pass one of them",
    ),
    Bad(
        "batch_norm(X[:, :2], moments=M)",
        ValueError,
        "moments.mean: expected shape (2,), one value per channel of x; got (3,)",
        "moments",
    ),
    Bad(
        "batch_norm(strict.ones((4, 3)), moments=M)",
        TypeError,
        other_home("moments.mean", "array_api_strict", "numpy"),
        "moments",
        MOVE,
        needs="array_api_strict",
    ),
    Bad(
        "batch_norm(X, moments=moments(X[:3]))",
        ValueError,
        "moments: expected those of the whole batch, n ≥ 4, the values per channel of x; got n = 3."
        " Pool those of all parts: arraybn.pool(*(arraybn.moments(part) for part in parts))",
        "moments",
        "Pool those of all parts",
    ),
    Bad(
        "batch_norm_sums(DY, saved)",
        ValueError,
        f"saved: expected the forward of a part, with moments=; got one without{PARTS}",
        "saved",
        "sums=sum(",
        SAVED,
    ),
    Bad(
        "batch_norm_sums(DY, None)",
        TypeError,
        "saved: expected what batch_norm returned beside y; got NoneType",
        "saved",
    ),
    Bad(
        "batch_norm_sums(DY, saved)",
        ValueError,
        "dy: expected shape (2, 3), that of x and y; got (4, 3)",
        "dy",
        setup=PART,
    ),
    Bad(
        "batch_norm_backward(DY[:2], saved)",
        ValueError,
        f"sums: expected those of all parts, because the forward had moments=; got None{PARTS}",
        "sums",
        "sums=sum(",
        PART,
    ),
    Bad(
        "batch_norm_backward(DY, whole, sums=sums)",
        ValueError,
        f"sums: expected None, because the forward had no moments=; got some{PARTS}",
        "sums",
        "sums=sum(",
        f"{PART}; whole = batch_norm(X)[1]",
    ),
    Bad(
        "batch_norm_backward(DY[:2], saved, sums=sums)",
        ValueError,
        "sums: expected those of all parts, n = 4 as in moments; got n = 2",
        "sums",
        setup=PART,
    ),
    Bad(
        "batch_norm_backward(DY[:2], saved, sums=(1, 2))",
        TypeError,
        "sums: expected the sum of what batch_norm_sums returned; got tuple",
        "sums",
        setup=PART,
    ),
    Bad(
        "batch_norm_sums(DY[:2], saved, v=DY[:2], tangent=True)",
        ValueError,
        "v: expected None, because tangent is True; got an array",
        "v",
        setup=PART,
    ),
    Bad(
        "batch_norm_sums(DY[:2], saved, tangent=1)",
        TypeError,
        "tangent: expected True or False; got 1",
        "tangent",
        "",
        PART,
    ),
    Bad(
        "sums + batch_norm_sums(DY[:2], saved, tangent=True)",
        ValueError,
        "tangent: expected the same in all sums; got True and False",
        "tangent",
        setup=PART,
    ),
    Bad(
        "batch_norm_jvp(X, saved, sums=batch_norm_sums(X, saved))",
        ValueError,
        "sums: expected those of batch_norm_sums(x_dot, saved, tangent=True), because the forward had where=;"
        " got sums without tangent=True",
        "sums",
        "tangent=True",
        "saved = batch_norm(X, moments=moments(X, where=L > 0), where=L > 0)[1]",
    ),
    Bad(
        "batch_norm_sums(DY[:2], saved, v_weight=W)",
        ValueError,
        "v: expected an array, because v_weight is given; got None",
        "v",
        setup=PART,
    ),
    # further derivatives
    Bad("batch_norm_jvp(None, saved)", TypeError, no_array("x_dot", "NoneType"), "x_dot", CONVERT, SAVED),
    Bad(
        "batch_norm_jvp(X, None)",
        TypeError,
        "saved: expected what batch_norm returned beside y; got NoneType",
        "saved",
    ),
    Bad(
        "batch_norm_jvp(X[:2], saved)",
        ValueError,
        "x_dot: expected shape (4, 3), that of x and y; got (2, 3)",
        "x_dot",
        setup=SAVED,
    ),
    Bad(
        "batch_norm_jvp(X, saved, W[:2])",
        ValueError,
        SHAPE_3.format("weight_dot", "x", "(2,)"),
        "weight_dot",
        setup=SAVED,
    ),
    Bad("batch_norm_jvp(X, saved, None, 1.0)", TypeError, no_array("bias_dot", "float"), "bias_dot", CONVERT, SAVED),
    Bad("batch_norm_jvp(X, saved, out=LONG)", ValueError, NO_OUT.format("(12,) and <f4"), "out", setup=SAVED),
    Bad(
        "batch_norm_jvp(X[:2], saved)",
        ValueError,
        f"sums: expected those of all parts, because the forward had moments=; got None{PARTS}",
        "sums",
        "sums=sum(",
        PART,
    ),
    Bad("batch_norm_double_backward(None, DY, saved)", TypeError, no_array("v", "NoneType"), "v", CONVERT, SAVED),
    Bad("batch_norm_double_backward(X, DY > 0, saved)", TypeError, no_float("dy", "bool"), "dy", ASTYPE, SAVED),
    Bad(
        "batch_norm_double_backward(X, DY[:, :2], saved)",
        ValueError,
        "dy: expected shape (4, 3), that of x and y; got (4, 2)",
        "dy",
        setup=SAVED,
    ),
    Bad(
        "batch_norm_double_backward(X, DY, saved, X)",
        ValueError,
        SHAPE_3.format("v_weight", "x", "(4, 3)"),
        "v_weight",
        setup=SAVED,
    ),
    Bad(
        "batch_norm_double_backward(X, DY, saved, W, strict.ones(3))",
        TypeError,
        other_home("v_bias", "numpy", "array_api_strict"),
        "v_bias",
        MOVE,
        SAVED,
        "array_api_strict",
    ),
    Bad(
        "batch_norm_double_backward(X[:2], DY[:2], saved, sums=sums + rest)",
        ValueError,
        "sums.values: expected shape (7, 3); got (2, 3). Pass v, and v_weight, to batch_norm_sums",
        "sums",
        "to batch_norm_sums",
        f"{PART}; rest = batch_norm_sums(DY[2:], batch_norm(X[2:], moments=M)[1])",
    ),
    Bad(
        "batch_norm_double_backward(X, DY, saved)",
        RuntimeError,
        OVERWRITTEN.format("an earlier batch_norm_jvp wrote y_dot over it (out=x)"),
        "saved",
        "Pass another array as out",
        f"{SAVED}; batch_norm_jvp(DY, saved, out=X)",
    ),
]

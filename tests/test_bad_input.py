"""Wrong calls, in one table: the error of each, its exact text, and that nothing has changed after it.

A row is source code, as a user would type it. `setup` runs first; then everything in the namespace is written down to
the bit, `call` has to raise, and everything has to be as it was.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.bits import bits
from support.libraries import need

import arraybn
from arraybn import kernels, network
from arraybn.__main__ import main
from arraybn.layers import _BatchNorm, _NormBase


class CommandError(Exception):
    """A command that ended with another status than 0; the text is the last line it printed to stderr."""


def run(*argv: str) -> None:
    """`python -m arraybn` with these arguments."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            status = main(argv)
        except SystemExit as end:  # argparse
            status = end.code
    if status:
        raise CommandError(stderr.getvalue().strip().splitlines()[-1])


class Bad(NamedTuple):
    """A wrong call and what is promised of its error."""

    call: str
    error: type[Exception]
    text: str  # all of it; a pattern for all of it where `pattern` is set
    name: str  # of the argument, as it stands in the text
    remedy: str = ""  # where there is one
    setup: str = ""
    needs: str = ""  # a library
    pattern: bool = False


def no_array(name: str, got: str) -> str:
    return (
        f"{name}: expected an array (NumPy, CuPy, torch, JAX or any array API namespace); got {got}."
        f" Convert it, for example with numpy.asarray({name}, dtype=numpy.float32)"
    )


def no_float(name: str, got: str) -> str:
    return (
        f"{name}: expected float16, bfloat16, float32 or float64; got {got}."
        f" Convert it, for example with {name}.astype(numpy.float32)"
    )


def other_home(name: str, expected: str, got: str, like: str = "x") -> str:
    return (
        f"{name}: expected a {expected} array as {like} is; got a {got} array."
        " Move one of them (a layer with layer.to(xp=…), an array with numpy.asarray or from_dlpack)"
    )


def with_grad(name: str) -> str:
    return (
        f"{name}: expected a tensor without requires_grad, because the gradients here are written by hand and autograd"
        f" would record them for nothing; got one with it. Pass {name}.detach()"
    )


def masked(name: str) -> str:
    return (
        f"{name}: expected a plain array; got MaskedArray, whose mask would be lost."
        f" Leave the masked samples out, or fill them, for example with {name}.filled(0.0)"
    )


def no_forward(layer: str) -> str:
    return (
        f"{layer}.backward: expected a forward before it, one for each backward; got none."
        " To use one layer twice in a pass, call arraybn.batch_norm and batch_norm_backward"
    )


def loading(*lines: str) -> str:
    return "Error(s) in loading state_dict for BatchNorm1d:\n\t" + "\n\t".join(lines)


def one_value(shape: str) -> str:
    return (
        f"Expected more than 1 value per channel when training, got input size {shape}."
        " Leave out the last incomplete batch, or use eval()"
    )


CONVERT, ASTYPE, MOVE = (
    "Convert it, for example with numpy.asarray(",
    "Convert it, for example with ",
    "Move one of them (a layer",
)
OVERWRITTEN = (
    "saved: expected a forward whose x is still there; got one without, because {}. Pass another array as out, or None"
)
SHAPE_3 = "{}: expected shape (3,), one value per channel of {}; got {}"
SWEEPS = "kernels: expected a module with the sweeps moments, dots, affine, affine2; got {}"
LOW_DTYPE = (
    "dtype: expected float32 or float64, because running averages drift in {0}; got {0}."
    " Inputs may be of any floating dtype whatever the layer's"
)
NAMESPACE = "xp: expected an array namespace such as numpy, cupy, torch or jax.numpy; got {}"
VALUES = "{}: expected what numpy.asarray or DLPack takes; got {}"
COUNT = "num_batches_tracked: expected a whole number of batches ≥ 0; got {}"
SIZE = "size mismatch for {}: copying a param with shape {} from checkpoint, the shape in current model is {}."
NO_OUT = "out: expected shape (4, 3) and dtype float32, those of the result; got {}"
OVERLAP = (
    "out: expected memory disjoint from {0}, or {0} itself; got a partial overlap."
    " Pass a fresh array, for example xp.empty_like({0})"
)
BOTH = "running_mean and running_var: expected either both or neither to be None; got None for {} alone"

FUNCTIONS = [
    # x
    Bad("batch_norm([[1.0, 2.0]])", TypeError, no_array("x", "list"), "x", CONVERT),
    Bad("batch_norm(None)", TypeError, no_array("x", "NoneType"), "x", CONVERT),
    Bad("batch_norm(1.0)", TypeError, no_array("x", "float"), "x", CONVERT),
    Bad("batch_norm('x')", TypeError, no_array("x", "str"), "x", CONVERT),
    Bad("batch_norm(row for row in X)", TypeError, no_array("x", "generator"), "x", CONVERT),
    Bad("batch_norm(Frame())", TypeError, no_array("x", f"{__name__}.Frame"), "x", CONVERT),
    Bad("batch_norm(X.astype(int))", TypeError, no_float("x", "int64"), "x", ASTYPE),
    Bad("batch_norm(X > 0)", TypeError, no_float("x", "bool"), "x", ASTYPE),
    Bad("batch_norm(X + 1j)", TypeError, no_float("x", "complex64"), "x", ASTYPE),
    Bad("batch_norm(X.astype(object))", TypeError, no_float("x", "object"), "x", ASTYPE),
    Bad("batch_norm(np.zeros((4, 3), [('a', 'f4')]))", TypeError, no_float("x", "void32"), "x", ASTYPE),
    Bad("batch_norm(np.zeros((4, 3), 'M8[s]'))", TypeError, no_float("x", "datetime64[s]"), "x", ASTYPE),
    Bad("batch_norm(np.ma.masked_array(X, X > 2))", TypeError, masked("x"), "x", "x.filled(0.0)"),
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
    Bad("batch_norm(X, np.ma.masked_array(W))", TypeError, masked("weight"), "weight", "weight.filled(0.0)"),
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
]

SAVED = "saved = batch_norm(X, W, W)[1]"
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
]

CONSTRUCTORS = [
    Bad("BatchNorm1d(0)", ValueError, "num_features: expected an integer ≥ 1; got 0", "num_features"),
    Bad("BatchNorm2d(-1)", ValueError, "num_features: expected an integer ≥ 1; got -1", "num_features"),
    Bad("BatchNorm3d(3.0)", TypeError, "num_features: expected an integer; got 3.0", "num_features"),
    Bad("BatchNorm1d('3')", TypeError, "num_features: expected an integer; got '3'", "num_features"),
    Bad("BatchNorm1d(None)", TypeError, "num_features: expected an integer; got None", "num_features"),
    Bad("BatchNorm1d(True)", TypeError, "num_features: expected an integer; got True", "num_features"),
    Bad("BatchNorm1d(3, -1)", ValueError, "eps: expected a number ≥ 0; got -1", "eps"),
    Bad("BatchNorm1d(3, None)", TypeError, "eps: expected a number; got None", "eps"),
    Bad("BatchNorm1d(3, float('inf'))", ValueError, "eps: expected a finite number; got inf", "eps"),
    Bad("BatchNorm1d(3, momentum='0.1')", TypeError, "momentum: expected a number; got '0.1'", "momentum"),
    Bad("BatchNorm1d(3, momentum=True)", TypeError, "momentum: expected a number; got True", "momentum"),
    Bad("BatchNorm1d(3, momentum=np.nan)", ValueError, "momentum: expected a finite number; got nan", "momentum"),
    Bad("BatchNorm1d(3, affine='False')", TypeError, "affine: expected True or False; got 'False'", "affine"),
    Bad("BatchNorm1d(3, affine=1)", TypeError, "affine: expected True or False; got 1", "affine"),
    Bad("BatchNorm1d(3, affine=None)", TypeError, "affine: expected True or False; got None", "affine"),
    Bad(
        "BatchNorm1d(3, affine=X > 0)", TypeError, r"(?s)affine: expected True or False; got array\(.*", "affine"
    )._replace(pattern=True),
    Bad(
        "BatchNorm1d(3, track_running_stats='no')",
        TypeError,
        "track_running_stats: expected True or False; got 'no'",
        "track_running_stats",
    ),
    Bad("BatchNorm1d(3, channel_axis='1')", TypeError, "channel_axis: expected an integer; got '1'", "channel_axis"),
    Bad("BatchNorm1d(3, dtype='float16')", TypeError, LOW_DTYPE.format("float16"), "dtype", "Inputs may be of any"),
    Bad(
        "BatchNorm1d(3, dtype=int)",
        TypeError,
        "dtype: expected a real floating dtype of numpy; got <class 'int'>",
        "dtype",
    ),
    Bad("BatchNorm1d(3, dtype=32)", TypeError, "dtype: expected a real floating dtype of numpy; got 32", "dtype"),
    Bad("BatchNorm1d(3, device='gpu')", ValueError, "device: expected one that numpy has here; got 'gpu'", "device"),
    Bad(
        "BatchNorm1d(3, device='cpu', xp=strict)",
        ValueError,
        "device: expected one that array_api_strict has here; got 'cpu'",
        "device",
        needs="array_api_strict",
    ),
    Bad(
        "BatchNorm1d(3, device='nowhere', xp=torch)",
        ValueError,
        "device: expected one that torch has here; got 'nowhere'",
        "device",
        needs="torch",
    ),
    Bad("BatchNorm1d(3, xp='numpy')", TypeError, NAMESPACE.format("'numpy'"), "xp", "such as numpy, cupy"),
    Bad("BatchNorm1d(3, xp=1)", TypeError, NAMESPACE.format("1"), "xp", "such as numpy, cupy"),
]

# Parameters, gradients, buffers, a count and a remembered forward: everything that could be lost.
LAYER = "layer = BatchNorm1d(3); layer(X); layer.backward(DY); layer(X)"
FRESH = "layer = BatchNorm1d(3)"
LAYERS = [
    Bad("layer(X.tolist())", TypeError, no_array("x", "list"), "x", CONVERT, LAYER),
    Bad("layer(X.astype(int))", TypeError, no_float("x", "int64"), "x", ASTYPE, LAYER),
    Bad("layer(X[0])", ValueError, "expected 2D or 3D input (got 1D input)", "input", setup=LAYER),
    Bad("layer(X[None, None])", ValueError, "expected 2D or 3D input (got 4D input)", "input", setup=LAYER),
    Bad("layer(X)", ValueError, "expected 4D input (got 2D input)", "input", setup="layer = BatchNorm2d(3)"),
    Bad("layer(X)", ValueError, "expected 5D input (got 2D input)", "input", setup="layer = BatchNorm3d(3)"),
    Bad(
        "layer(X[:, :2])",
        ValueError,
        "x: expected 3 channels (num_features) on axis 1; got 2, in shape (4, 2)",
        "x",
        setup=LAYER,
    ),
    Bad(
        "layer(X[:0, :2])",
        ValueError,
        "x: expected 3 channels (num_features) on axis 1; got 2, in shape (0, 2)",
        "x",
        setup=LAYER,
    ),
    Bad(
        "layer(X)",
        ValueError,
        "x: expected 2 channels (num_features) on axis -1; got 3, in shape (4, 3)",
        "x",
        setup="layer = BatchNorm1d(2, affine=False, channel_axis=-1).eval()",
    ),
    Bad(
        "layer(X)",
        ValueError,
        "x: expected an axis 2 (channel_axis); got shape (4, 3)",
        "x",
        setup="layer = BatchNorm1d(3, channel_axis=2)",
    ),
    Bad("layer(X[:1])", ValueError, one_value("(1, 3)"), "input size", "use eval()", LAYER),
    Bad(
        "layer(X[:1, :, None])",
        ValueError,
        one_value("(1, 3, 1)").replace("use eval()", "keep running statistics"),
        "input size",
        "keep running statistics",
        "layer = BatchNorm1d(3, track_running_stats=False).eval()",
    ),
    Bad(
        "layer(strict.ones((4, 3)))",
        TypeError,
        other_home("x", "numpy", "array_api_strict", "this layer"),
        "x",
        MOVE,
        LAYER,
        "array_api_strict",
    ),
    Bad(
        "layer(strict.ones((4, 3)))",
        TypeError,
        other_home("x", "numpy", "array_api_strict", "this layer"),
        "x",
        MOVE,
        "layer = BatchNorm1d(3, affine=False).eval()",
        "array_api_strict",
    ),
    Bad("layer(X)", NotImplementedError, "_BatchNorm does not say which inputs it takes", "inputs")._replace(
        setup="layer = _BatchNorm(3)"
    ),
    Bad("layer(X)", NotImplementedError, "_NormBase has no forward", "forward", setup="layer = _NormBase(3)"),
    # backward
    Bad("layer.backward(DY)", RuntimeError, no_forward("BatchNorm1d"), "backward", "call arraybn.batch_norm", FRESH),
    Bad(
        "layer.backward(DY)",
        RuntimeError,
        no_forward("BatchNorm1d"),
        "backward",
        "call arraybn.batch_norm",
        f"{LAYER}; layer.backward(DY)",
    ),
    Bad("layer.backward(None)", TypeError, no_array("dy", "NoneType"), "dy", CONVERT, LAYER),
    Bad("layer.backward(DY.astype(int))", TypeError, no_float("dy", "int64"), "dy", ASTYPE, LAYER),
    Bad(
        "layer.backward(DY[:, :2])",
        ValueError,
        "dy: expected shape (4, 3), that of x and y; got (4, 2)",
        "dy",
        setup=LAYER,
    ),
    Bad(
        "layer.backward(DY)",
        ValueError,
        "gradient: expected shape (2,), that of data; got (3,)",
        "gradient",
        setup=f"{LAYER}; layer.zero_grad(); layer.bias.data = np.ones(2)",
    ),
    # attributes
    Bad("layer(X)", TypeError, "eps: expected a number; got 'a'", "eps", setup=f"{LAYER}; layer.eps = 'a'"),
    Bad("layer(X)", ValueError, "eps: expected a number ≥ 0; got -1", "eps", setup=f"{LAYER}; layer.eps = -1"),
    Bad(
        "layer(X)",
        TypeError,
        "momentum: expected a number; got 'a'",
        "momentum",
        setup=f"{LAYER}; layer.momentum = 'a'",
    ),
    Bad(
        "layer(X)",
        ValueError,
        "momentum: expected a finite number; got nan",
        "momentum",
        setup=f"{LAYER}; layer.momentum = np.nan",
    ),
    Bad(
        "layer(X)",
        TypeError,
        "training: expected True or False; got 'no'",
        "training",
        setup=f"{LAYER}; layer.training = 'no'",
    ),
    Bad(
        "layer(X)",
        TypeError,
        "training: expected True or False; got None",
        "training",
        setup=f"{LAYER}; layer.training = None",
    ),
    Bad(
        "layer(X)",
        TypeError,
        "track_running_stats: expected True or False; got 'no'",
        "track_running_stats",
        setup=f"{LAYER}; layer.track_running_stats = 'no'",
    ),
    Bad(
        "layer(X)",
        TypeError,
        "num_features: expected an integer; got '3'",
        "num_features",
        setup=f"{LAYER}; layer.num_features = '3'",
    ),
    Bad(
        "layer(X)",
        TypeError,
        "channel_axis: expected an integer; got None",
        "channel_axis",
        setup=f"{LAYER}; layer.channel_axis = None",
    ),
    Bad(
        "layer(X)",
        TypeError,
        "channel_axis: expected an integer; got 1.0",
        "channel_axis",
        setup=f"{LAYER}; layer.channel_axis = 1.0",
    ),
    Bad(
        "layer(X)",
        ValueError,
        "num_batches_tracked: expected an integer ≥ 0; got -5",
        "num_batches_tracked",
        setup=f"{LAYER}; layer.num_batches_tracked = -5",
    ),
    Bad(
        "layer.num_batches_tracked = np.ones(2)",
        TypeError,
        COUNT.format("array([1., 1.])"),
        "num_batches_tracked",
        setup=LAYER,
    ),
    Bad(
        "layer.to(dtype='int8')",
        TypeError,
        "dtype: expected a real floating dtype; got 'int8'",
        "dtype",
        setup="layer = network.ReLU()",
    ),
    Bad(
        "layer.num_batches_tracked = 1.5",
        TypeError,
        "cannot assign 'float' to buffer 'num_batches_tracked' (array, int or None expected)",
        "num_batches_tracked",
        setup=LAYER,
    ),
    Bad(
        "layer.num_batches_tracked = 2**63",
        ValueError,
        "num_batches_tracked: expected an integer of 64 bits; got 9223372036854775808",
        "num_batches_tracked",
        setup=LAYER,
    ),
    Bad(
        "layer.running_mean = [0, 0, 0]",
        TypeError,
        "cannot assign 'list' to buffer 'running_mean' (array, int or None expected)",
        "running_mean",
        setup=LAYER,
    ),
    Bad("layer(X)", ValueError, BOTH.format("running_mean"), "running_mean")._replace(
        setup=f"{LAYER}; layer.running_mean = None"
    ),
    Bad("layer(X)", ValueError, BOTH.format("running_var"), "running_var")._replace(
        setup=f"{LAYER}; layer.eval(); layer.running_var = None"
    ),
    Bad(
        "layer(X)",
        ValueError,
        SHAPE_3.format("running_var", "x", "(2,)"),
        "running_var",
        setup=f"{LAYER}; layer.running_var = np.ones(2)",
    ),
    Bad(
        "layer(X)",
        ValueError,
        SHAPE_3.format("running_var", "x", "(2,)"),
        "running_var",
        setup=f"{LAYER}; layer.eval(); layer.running_var = np.ones(2)",
    ),
    Bad(
        "layer(X)",
        TypeError,
        no_float("running_mean", "int64"),
        "running_mean",
        ASTYPE,
        f"{LAYER}; layer.eval(); layer.running_mean = np.zeros(3, int)",
    ),
    Bad(
        "layer(X)",
        TypeError,
        no_array("running_mean", "int"),
        "running_mean",
        CONVERT,
        f"{LAYER}; layer.eval(); layer.running_mean = 0",
    ),
    Bad(
        "layer.weight = W",
        TypeError,
        "cannot assign 'ndarray' to 'weight' (Parameter or None expected)",
        "weight",
        setup=LAYER,
    ),
    Bad(
        "layer.weight = network.ReLU()",
        TypeError,
        "cannot assign 'ReLU' to 'weight' (Parameter or None expected)",
        "weight",
        setup=LAYER,
    ),
    Bad(
        "layer(X)",
        ValueError,
        SHAPE_3.format("weight", "x", "(2,)"),
        "weight",
        setup=f"{LAYER}; layer.weight = Parameter(np.ones(2))",
    ),
    Bad("layer.weight.data = None", TypeError, no_array("data", "NoneType"), "data", CONVERT, LAYER),
    Bad("layer.weight.data = [1, 1, 1]", TypeError, no_array("data", "list"), "data", CONVERT, LAYER),
    Bad("layer.weight.grad = 'x'", TypeError, "grad: expected an array like data; got str", "grad", setup=LAYER),
    Bad(
        "layer.weight.grad = np.ones((7, 3))",
        ValueError,
        "grad: expected shape (3,), that of data; got (7, 3)",
        "grad",
        setup=LAYER,
    ),
    Bad("layer.weights", AttributeError, "'BatchNorm1d' object has no attribute 'weights'", "weights", setup=LAYER),
    # train, to
    Bad("layer.train('yes')", ValueError, "training mode is expected to be boolean; got 'yes'", "mode", setup=LAYER),
    Bad("layer.train(0)", ValueError, "training mode is expected to be boolean; got 0", "mode", setup=LAYER),
    Bad("layer.to(dtype='bfloat16')", TypeError, LOW_DTYPE.format("bfloat16"), "dtype", "Inputs may be of any", LAYER),
    Bad(
        "layer.to(dtype='int8')",
        TypeError,
        "dtype: expected a real floating dtype of numpy; got 'int8'",
        "dtype",
        setup=LAYER,
    ),
    Bad("layer.to(xp='torch')", TypeError, NAMESPACE.format("'torch'"), "xp", "such as numpy, cupy", LAYER),
    Bad(
        "layer.to(device='cuda')",
        ValueError,
        "device: expected one that numpy has here; got 'cuda'",
        "device",
        setup=LAYER,
    ),
    Bad(
        "BatchNorm1d(3, xp=torch, device='meta')",
        TypeError,
        "data: expected a tensor with values; got one on the meta device",
        "data",
        needs="torch",
    ),
    Bad(
        "layer(torch.ones((4, 3), device='meta'))",
        TypeError,
        "x: expected a tensor with values; got one on the meta device",
        "x",
        setup="layer = BatchNorm1d(3, xp=torch)",
        needs="torch",
    ),
]

STATE = f"{LAYER}; given = dict(layer.state_dict())"
STATE_DICTS = [
    Bad(
        "layer.load_state_dict(None)",
        TypeError,
        "state_dict: expected a mapping of names to arrays; got NoneType",
        "state_dict",
        setup=LAYER,
    ),
    Bad(
        "layer.load_state_dict('net.npz')",
        TypeError,
        "state_dict: expected a mapping of names to arrays; got str",
        "state_dict",
        setup=LAYER,
    ),
    Bad(
        "layer.load_state_dict(BatchNorm1d(3))",
        TypeError,
        "state_dict: expected a mapping of names to arrays; got BatchNorm1d",
        "state_dict",
        setup=LAYER,
    ),
    Bad(
        "layer.load_state_dict({1: W})",
        TypeError,
        "state_dict: expected names as keys; got 1",
        "state_dict",
        setup=LAYER,
    ),
    Bad(
        "layer.load_state_dict(given, strict='no')",
        TypeError,
        "strict: expected True or False; got 'no'",
        "strict",
        setup=STATE,
    ),
    Bad(
        "layer.load_state_dict({})",
        RuntimeError,
        loading('Missing key(s) in state_dict: "weight", "bias", "running_mean", "running_var". '),
        "running_var",
        setup=LAYER,
    ),
    Bad(
        "layer.load_state_dict(given)",
        RuntimeError,
        loading('Unexpected key(s) in state_dict: "more". '),
        "more",
        setup=f"{STATE}; given['more'] = W",
    ),
    Bad(
        "layer.load_state_dict(given)",
        RuntimeError,
        loading(SIZE.format("bias", "(2,)", "(3,)"), SIZE.format("running_var", "()", "(3,)")),
        "running_var",
        setup=f"{STATE}; given |= dict(weight=7 * W, bias=W[:2], running_var=1.0)",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        VALUES.format("weight", "NoneType"),
        "weight",
        setup=f"{STATE}; given['weight'] = None",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        VALUES.format("bias", "list"),
        "bias",
        setup=f"{STATE}; given |= dict(weight=7 * W, bias=[1, [2]])",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        VALUES.format("weight", "generator"),
        "weight",
        setup=f"{STATE}; given['weight'] = (value for value in W)",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        "weight: expected a plain array; got numpy.ma.MaskedArray. Convert it with numpy.asarray",
        "weight",
        "Convert it with numpy.asarray",
        f"{STATE}; given['weight'] = np.ma.masked_array(W, W > 2)",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        "bias: expected real numbers; got complex64",
        "bias",
        setup=f"{STATE}; given |= dict(weight=7 * W, bias=W * 1j)",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        "weight: expected real numbers; got str32",
        "weight",
        setup=f"{STATE}; given['weight'] = ['a', 'b', 'c']",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        VALUES.format("weight", "torch.Tensor"),
        "weight",
        setup=f"{STATE}; given['weight'] = torch.ones(3, device='meta')",
        needs="torch",
    ),
    *[
        Bad(
            "layer.load_state_dict(given)",
            TypeError,
            COUNT.format(got),
            "num_batches_tracked",
            setup=f"{STATE}; given |= dict(weight=7 * W, num_batches_tracked={value})",
        )
        for value, got in {
            "1.5": "array(1.5)",
            "-1": "array(-1)",
            "np.nan": "array(nan)",
            "np.inf": "array(inf)",
            "'many'": "array('many', dtype='<U4')",
            "2.0**70": "array(1.18059162e+21)",
        }.items()
    ],
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        COUNT.format("tensor(..., device='meta', size=())"),
        "num_batches_tracked",
        setup=f"{STATE}; given['num_batches_tracked'] = torch.ones((), device='meta')",
        needs="torch",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        "state_dict._metadata: expected a mapping of paths to versions; got 'x'",
        "state_dict._metadata",
        setup=f"{LAYER}; given = layer.state_dict(); given._metadata = 'x'",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        "state_dict._metadata['']: expected {'version': an integer}; got {'version': 'two'}",
        "state_dict._metadata['']",
        setup=f"{LAYER}; given = layer.state_dict(); given._metadata[''] = dict(version='two')",
    ),
    Bad("layer.state_dict(3)", TypeError, "prefix: expected a string; got 3", "prefix", setup=LAYER),
]

MODEL = "model = Sequential(network.Linear(3, 3, rng=RNG), BatchNorm1d(3)); model(X); model.backward(DY); model(X)"
MODULES = [
    Bad("Parameter([1.0])", TypeError, no_array("data", "list"), "data", CONVERT),
    Bad("Parameter(np.ones(2, int))", TypeError, no_float("data", "int64"), "data", ASTYPE),
    Bad(
        "Parameter(W).accumulate(W[:2])",
        ValueError,
        "gradient: expected shape (3,), that of data; got (2,)",
        "gradient",
    ),
    Bad(
        "Parameter(W).accumulate('x')",
        TypeError,
        "gradient: expected an array like data; got str",
        "gradient",
    ),
    Bad("Module()(X)", NotImplementedError, "Module has no forward", "forward"),
    Bad("Module().backward(X)", NotImplementedError, "Module has no backward", "backward"),
    Bad("Sequential(1)", TypeError, "int is not a Module subclass", "int"),
    Bad("Sequential(BatchNorm1d(3), None)", TypeError, "NoneType is not a Module subclass", "NoneType"),
    Bad("Sequential([BatchNorm1d(3)])", TypeError, "list is not a Module subclass", "list"),
    Bad("Sequential(BatchNorm1d)", TypeError, "type is not a Module subclass", "type"),
    Bad("Sequential({'a.b': Module()})", KeyError, "module name can't contain a dot; got 'a.b'", "a.b"),
    Bad("Sequential({1: Module()})", TypeError, "module name should be a string. Got int", "name"),
    Bad("Sequential({'train': Module()})", KeyError, "attribute 'train' already exists", "train"),
    Bad("model[2]", IndexError, "index: expected -2 … 1, for 2 modules; got 2", "index", setup=MODEL),
    Bad("model[-3]", IndexError, "index: expected -2 … 1, for 2 modules; got -3", "index", setup=MODEL),
    Bad("model['0']", TypeError, "index: expected an integer; got '0'", "index", setup=MODEL),
    Bad("model(None)", TypeError, no_array("x", "NoneType"), "x", CONVERT, MODEL),
    Bad("model(X[:, :2])", ValueError, "x: expected shape (N, 3); got (4, 2)", "x", setup=MODEL),
    Bad(
        "model.backward(DY[:2])",
        ValueError,
        "dy: expected shape (4, 3), that of x and y; got (2, 3)",
        "dy",
        setup=MODEL,
    ),
    Bad("model.to(dtype='float16')", TypeError, LOW_DTYPE.format("float16"), "dtype", "Inputs may be of any", MODEL),
    Bad("model.add_module('', None)", KeyError, "module name can't be empty string; got ''", "module", setup=MODEL),
    Bad("model.add_module('x', W)", TypeError, "ndarray is not a Module subclass", "ndarray", setup=MODEL),
    Bad(
        "model.register_buffer('t', [1])",
        TypeError,
        "cannot assign 'list' to buffer 't' (array, int or None expected)",
        "'t'",
        setup=MODEL,
    ),
    Bad("model.register_buffer('train', 1)", KeyError, "attribute 'train' already exists", "train", setup=MODEL),
    Bad(
        "model.register_parameter('p', W)",
        TypeError,
        "cannot assign 'ndarray' to 'p' (Parameter or None expected)",
        "'p'",
        setup=MODEL,
    ),
    Bad(
        "model.register_parameter('a.b', None)",
        KeyError,
        "parameter name can't contain a dot; got 'a.b'",
        "'a.b'",
        setup=MODEL,
    ),
    Bad(
        "setattr(model, '1', 3)",
        TypeError,
        "cannot assign 'int' to '1' (Module or None expected)",
        "'1'",
        setup=MODEL,
    ),
    Bad("del model.nothing", AttributeError, "'Sequential' object has no attribute 'nothing'", "nothing", setup=MODEL),
]

CONV = "conv = network.Conv2d(1, 1, 3, rng=RNG); image = np.ones((1, 1, 4, 4), 'f4'); conv(image)"
NETWORK = [
    Bad("network.Linear(0, 1)", ValueError, "in_features: expected an integer ≥ 1; got 0", "in_features"),
    Bad("network.Linear(2, 1.0)", TypeError, "out_features: expected an integer; got 1.0", "out_features"),
    Bad("network.Linear(2, 1, bias='no')", TypeError, "bias: expected True or False; got 'no'", "bias"),
    Bad(
        "network.Linear(2, 1, rng=0)",
        TypeError,
        "rng: expected a numpy.random.Generator; got 0. Pass numpy.random.default_rng(seed)",
        "rng",
        "Pass numpy.random.default_rng(seed)",
    ),
    Bad("network.Linear(3, 1)(X.tolist())", TypeError, no_array("x", "list"), "x", CONVERT),
    Bad("network.Linear(2, 1)(X)", ValueError, "x: expected shape (N, 2); got (4, 3)", "x"),
    Bad("network.Linear(3, 1)(X.astype(int))", TypeError, no_float("x", "int64"), "x", ASTYPE),
    Bad(
        "network.Linear(3, 1)(torch.ones(4, 3))",
        TypeError,
        other_home("weight", "torch", "numpy"),
        "weight",
        MOVE,
        needs="torch",
    ),
    Bad("network.Linear(3, 1).backward(DY)", RuntimeError, no_forward("Linear"), "backward", "call arraybn.batch_norm"),
    Bad(
        "linear.backward(DY[:, :2])",
        ValueError,
        "dy: expected shape (4, 1), that of y; got (4, 2)",
        "dy",
        setup="linear = network.Linear(3, 1); linear(X)",
    ),
    Bad(
        "linear.backward(DY[:, :1])",
        ValueError,
        "gradient: expected shape (2,), that of data; got (1,)",
        "gradient",
        setup="linear = network.Linear(3, 1); linear(X); linear.bias.data = np.ones(2)",
    ),
    Bad("network.Conv2d(1, 1, (3, 3))", TypeError, "kernel_size: expected an integer; got (3, 3)", "kernel_size"),
    Bad("network.Conv2d(1, 1, 3, -1)", ValueError, "padding: expected an integer ≥ 0; got -1", "padding"),
    Bad("network.Conv2d(1, 1, 3, 3)", ValueError, "padding: expected less than kernel_size = 3; got 3", "padding"),
    Bad("conv(X)", ValueError, "x: expected shape (N, 1, H, W); got (4, 3)", "x", setup=CONV),
    Bad(
        "conv(image[..., :2])",
        ValueError,
        "x: expected at least 3 rows and columns, padding included; got shape (1, 1, 4, 2)",
        "x",
        setup=CONV,
    ),
    Bad(
        "conv.backward(image[..., :1])",
        ValueError,
        "dy: expected shape (1, 1, 2, 2), that of y; got (1, 1, 4, 1)",
        "dy",
        setup=CONV,
    ),
    Bad("network.ReLU()([1.0])", TypeError, no_array("x", "list"), "x", CONVERT),
    Bad("network.ReLU().backward(DY)", RuntimeError, no_forward("ReLU"), "backward", "call arraybn.batch_norm"),
    Bad(
        "relu.backward(DY[:1])",
        ValueError,
        "dy: expected shape (4, 3), that of y; got (1, 3)",
        "dy",
        setup="relu = network.ReLU(); relu(X)",
    ),
    Bad(
        "network.Flatten()(np.float32(1))",
        ValueError,
        "x: expected at least 1 dimension, (N, …); got shape ()",
        "x",
    ),
    Bad(
        "flatten.backward(DY.T)",
        ValueError,
        "dy: expected shape (4, 3), that of y; got (3, 4)",
        "dy",
        setup="flatten = network.Flatten(); flatten(X)",
    ),
    Bad("network.cross_entropy([[0.0]], L)", TypeError, no_array("logits", "list"), "logits", CONVERT),
    Bad(
        "network.cross_entropy(X[0], L)",
        ValueError,
        "logits: expected shape (N, K), neither of them 0; got (3,)",
        "logits",
    ),
    Bad(
        "network.cross_entropy(X[:0], L[:0])",
        ValueError,
        "logits: expected shape (N, K), neither of them 0; got (0, 3)",
        "logits",
    ),
    Bad("network.cross_entropy(X, [0])", TypeError, "labels: expected an array of integers; got list", "labels"),
    Bad(
        "network.cross_entropy(X, X)",
        TypeError,
        "labels: expected an array of integers; got float32",
        "labels",
    ),
    Bad(
        "network.cross_entropy(X, L > 0)",
        TypeError,
        "labels: expected an array of integers; got bool",
        "labels",
    ),
    Bad(
        "network.cross_entropy(X, L[:3])",
        ValueError,
        "labels: expected shape (4,), one per row of logits; got (3,)",
        "labels",
    ),
    Bad(
        "network.cross_entropy(X, L + 1)",
        ValueError,
        "labels: expected 0 … 2, the columns of logits; got 3",
        "labels",
    ),
    Bad(
        "network.cross_entropy(X, L - 1)",
        ValueError,
        "labels: expected 0 … 2, the columns of logits; got -1",
        "labels",
    ),
    Bad(
        "network.SGD(model, 0.1)",
        TypeError,
        "parameters: expected several Parameters, as module.parameters() gives; got arraybn.modules.Parameter",
        "parameters",
        "module.parameters()",
        "model = Parameter(W)",
    ),
    Bad(
        "network.SGD(model.named_parameters(), 0.1)",
        TypeError,
        "parameters[0]: expected a Parameter; got tuple",
        "parameters[0]",
        setup=MODEL,
    ),
    Bad("network.SGD([], 0.1)", ValueError, "parameters: expected at least one; got none", "parameters"),
    Bad("network.SGD([Parameter(W)], 'x')", TypeError, "lr: expected a number; got 'x'", "lr"),
    Bad("network.SGD([Parameter(W)], -1)", ValueError, "lr: expected a number ≥ 0; got -1", "lr"),
    Bad("network.SGD([Parameter(W)], np.nan)", ValueError, "lr: expected a finite number; got nan", "lr"),
    Bad("network.SGD([Parameter(W)], 1, None)", TypeError, "momentum: expected a number; got None", "momentum"),
    Bad(
        "sgd.step()",
        TypeError,
        "lr: expected a number; got '0.1'",
        "lr",
        setup=f"{MODEL}; model.backward(DY); sgd = network.SGD(model.parameters(), 0.1); sgd.lr = '0.1'",
    ),
]

FILES = [
    Bad("save(layer, 'net.pt')", ValueError, r"path: expected .*\.npz.*; got .*net\.pt.*", "path")._replace(
        setup=LAYER, pattern=True
    ),
    Bad("save(layer, 'net')", ValueError, r"path: expected .*\.npz.*; got .*net.*", "path")._replace(
        setup=LAYER, pattern=True
    ),
    Bad("load('net.pkl')", ValueError, r"path: expected .*\.npz.*; got .*net\.pkl.*", "path", pattern=True),
    Bad("save(3, 'net.npz')", TypeError, r"state: expected .*; got int.*", "state", pattern=True),
    Bad("save([layer], 'net.npz')", TypeError, r"state: expected .*; got list.*", "state")._replace(
        setup=LAYER, pattern=True
    ),
    Bad("save({1: W}, 'net.npz')", Exception, r"(?s)state: expected .*; got 1.*", "state", pattern=True),
    Bad(
        "load('missing.npz')", FileNotFoundError, r".*No such file or directory: '?.*missing\.npz'?", "missing.npz"
    )._replace(pattern=True),
    Bad("load('net.npz')", ValueError, r"(?s).*net\.npz: expected .*", "net.npz")._replace(
        setup="Path('net.npz').write_bytes(b'no archive')", pattern=True
    ),
    Bad("load('net.npz')", ValueError, r"(?s).*net\.npz: expected .*", "net.npz")._replace(
        setup="Path('net.npz').write_bytes(b'')", pattern=True
    ),
]

ERROR = r"python -m arraybn(?: demo)?: error: "
COMMANDS = [
    Bad(
        "run('nope')", CommandError, ERROR + r"argument command: invalid choice: 'nope' \(choose from .*\)", "command"
    )._replace(pattern=True),
    Bad("run('--nope')", CommandError, ERROR + "unrecognized arguments: --nope", "--nope", pattern=True),
    Bad("run('info', 'more')", CommandError, ERROR + "unrecognized arguments: more", "more", pattern=True),
    *[
        Bad(
            f"run('demo', '--{option}', '{value}')",
            CommandError,
            f"python -m arraybn demo: error: argument --{option}: expected an integer from {span}; got '{value}'",
            f"--{option}",
        )
        for option, span in {"epochs": "1 to 10000", "seed": "0 to 4294967295"}.items()
        for value in ("-1", "1.5", "many", "99999999999")
    ],
    Bad(
        "run('demo', '--epochs')",
        CommandError,
        "python -m arraybn demo: error: argument --epochs: expected one argument",
        "--epochs",
    ),
    Bad(
        "run('demo', '--no-plot', '--out', 'here')",
        CommandError,
        "demo: --out here: expected a folder; this is a file",
        "--out",
        setup="Path('here').write_text('')",
        needs="sklearn",
    ),
]

COMM = "{}: expected an mpi4py communicator, or None for the world; got {}"
TIMEOUT = (
    f"timeout: expected a number of seconds > 0 and ≤ {threading.TIMEOUT_MAX:g}, or None to wait for ever; got {{}}"
)
SYNC_LAYER = "layer = SyncBatchNorm(3).eval()"
SYNC = [
    Bad("batch_norm(X, comm=3)", TypeError, COMM.format("comm", "int"), "comm"),
    Bad("batch_norm(X, comm=np.zeros(3))", TypeError, COMM.format("comm", "numpy.ndarray"), "comm"),
    Bad("broadcast_state(layer, 'world')", TypeError, COMM.format("comm", "str"), "comm", setup=SYNC_LAYER),
    Bad("broadcast_state(X, None)", TypeError, "model: expected a Module; got ndarray", "model"),
    Bad("average_gradients(layer, 0, weight=1)", TypeError, COMM.format("comm", "int"), "comm", setup=SYNC_LAYER),
    Bad("average_gradients(3, None, weight=1)", TypeError, "model: expected a Module; got int", "model"),
    Bad("SyncBatchNorm(3, process_group='world')", TypeError, COMM.format("process_group", "str"), "process_group"),
    Bad("layer.process_group = 3", TypeError, COMM.format("process_group", "int"), "process_group", setup=SYNC_LAYER),
    Bad("SyncBatchNorm(3, timeout=0)", ValueError, TIMEOUT.format("0"), "timeout"),
    Bad("SyncBatchNorm(3, timeout=1e12)", ValueError, TIMEOUT.format("1000000000000.0"), "timeout"),
    Bad("SyncBatchNorm(3, timeout=-1.5)", ValueError, TIMEOUT.format("-1.5"), "timeout"),
    Bad("SyncBatchNorm(3, timeout='long')", TypeError, "timeout: expected a number; got 'long'", "timeout"),
    Bad(
        "layer.timeout = float('nan')",
        ValueError,
        "timeout: expected a finite number; got nan",
        "timeout",
        setup=SYNC_LAYER,
    ),
    Bad("SyncBatchNorm(0)", ValueError, "num_features: expected an integer ≥ 1; got 0", "num_features"),
    Bad("layer(X[0])", ValueError, "expected at least 2D input (got 1D input)", "input", setup=SYNC_LAYER),
    Bad("layer(X.tolist())", TypeError, no_array("x", "list"), "x", CONVERT, setup=SYNC_LAYER),
    Bad("layer.backward(DY)", RuntimeError, no_forward("SyncBatchNorm"), "backward", setup=SYNC_LAYER),
    Bad(
        "SyncBatchNorm.convert_sync_batchnorm([layer])",
        TypeError,
        "module: expected a Module; got list",
        "module",
        setup=LAYER,
    ),
    Bad(
        "SyncBatchNorm.convert_sync_batchnorm(layer, 3)",
        TypeError,
        COMM.format("process_group", "int"),
        "process_group",
        setup=LAYER,
    ),
    Bad("SyncBatchNorm.revert_sync_batchnorm(None)", TypeError, "module: expected a Module; got NoneType", "module"),
    Bad(
        "SyncBatchNorm.revert_sync_batchnorm(model)",
        ValueError,
        "module: expected layers that convert_sync_batchnorm made; got one at '1' that was built as a SyncBatchNorm."
        " Replace it by a BatchNorm1d, 2d or 3d, as its inputs are",
        "module",
        "Replace it by a BatchNorm1d",
        setup="model = SyncBatchNorm.convert_sync_batchnorm(Sequential(BatchNorm1d(3), SyncBatchNorm(3)))",
    ),
]

TABLE = [*FUNCTIONS, *BACKWARD, *CONSTRUCTORS, *LAYERS, *STATE_DICTS, *MODULES, *NETWORK, *FILES, *COMMANDS, *SYNC]


class Frame:
    """Turns into an array but is none, as a data frame of pandas."""

    shape, ndim = (4, 3), 2

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.ones((4, 3), dtype)


def namespace(row: Bad) -> dict[str, Any]:
    """What the rows may use."""
    x = np.asarray([[1, 2, 3], [3, 5, 1], [0, 1, 2], [7, 1, 1]], "f4")
    frozen = x.copy()
    frozen.flags.writeable = False
    names = {name: getattr(arraybn, name) for name in arraybn.__all__}
    names |= {"arraybn": arraybn, "network": network, "np": np, "Path": Path, "run": run, "Frame": Frame}
    names |= {"_BatchNorm": _BatchNorm, "_NormBase": _NormBase, "RNG": np.random.default_rng(0)}
    names |= {"X": x, "DY": x[::-1].copy(), "W": np.asarray([1, 2, 3], "f4"), "L": np.asarray([0, 2, 1, 0])}
    names |= {"F": frozen, "OUT": np.full((4, 3), 7, "f4"), "LONG": np.ones(12, "f4"), "M": arraybn.moments(x)}
    if row.needs:
        library = need(row.needs)
        names[{"array_api_strict": "strict"}.get(row.needs, row.needs)] = library
        if row.needs == "jax":
            need("jax.numpy")
    return names


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.setup[-30:]} | {row.call}"[-70:])
def test_a_wrong_call_has_this_error_and_changes_nothing(
    row: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = namespace(row)
    exec(row.setup, names)
    before = {name: bits(value) for name, value in names.items() if name != "__builtins__"}
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(row.error) as caught:
        exec(row.call, names)
    text = caught.value.args[0] if isinstance(caught.value, KeyError) else str(caught.value)
    if row.pattern:
        assert re.fullmatch(row.text, text)
    else:
        assert text == row.text
        if row.error is not Exception:
            assert type(caught.value) is row.error
    assert {name: bits(value) for name, value in names.items() if name != "__builtins__"} == before
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


# Texts that are kept as users know them, though they do not say "expected … got …".
FIXED_WORDS = [
    # PyTorch's
    r"cannot assign '\w+' to '\w+' \((Parameter|Module) or None expected\)",
    r"cannot assign '\w+' to buffer '\w+' \(array, int or None expected\)",
    r"attribute '\w+' already exists",
    r"(parameter|buffer|module) name can't (be empty string|contain a dot); got .*",
    r"(parameter|buffer|module) name should be a string\. Got \w+",
    r"\w+ is not a Module subclass",
    r"'\w+' object has no attribute '\w+'",
    r"training mode is expected to be boolean; got .*",
    r"(?s)Error\(s\) in loading state_dict for .*",
    r"Expected more than 1 value per channel when training, got input size .*",
    r"\w+ (has no (forward|backward)|does not say which inputs it takes)",
    # the operating system's, and argparse's
    r".*No such file or directory: .*",
    r"python -m arraybn.*: error: (argument [\w-]+: (invalid choice: '\w+' \(|expected one argument)|unrecog).*",
]


def complaints(row: Bad) -> list[str]:
    """What is wrong with the text of a row."""
    text = row.text.replace("\\", "") if row.pattern else row.text
    found = []
    if not re.search(rf"(?<!\w){re.escape(row.name)}(?!\w)", text):
        found.append("does not name the argument")
    if row.remedy not in text:
        found.append("does not say the remedy")
    if not any(re.fullmatch(words, text) for words in FIXED_WORDS):
        if "expected " not in text:
            found.append("does not say what was expected")
        if not re.search(r"(^|\W)got |this is a |net\.npz: expected", text):  # of a file, only that it is no such file
            found.append("does not say what came")
    if not row.error.__name__.startswith("Command") and re.search(r"0x[0-9a-fA-F]{6}|object at", text):
        found.append("shows an address")
    return found


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.setup[-30:]} | {row.call}"[-70:])
def test_every_text_names_the_argument_what_was_expected_and_what_came(row: Bad) -> None:
    assert complaints(row) == []


def test_the_judge_of_texts_sees_bad_ones() -> None:
    good = Bad("f(x)", ValueError, "x: expected 1; got 2. Pass 1", "x", "Pass 1")
    assert complaints(good) == []
    for text in ("expected 1; got 2. Pass 1", "x: got 2. Pass 1", "x: expected 1. Pass 1", "x: expected 1; got 2"):
        assert len(complaints(good._replace(text=text))) == 1, text
    assert complaints(good._replace(text="operands could not be broadcast"))
    assert complaints(good._replace(text=good.text + " <object at 0x7f0011223344>"))


def test_the_table_is_long_and_has_no_row_twice() -> None:
    assert len({(row.setup, row.call) for row in TABLE}) == len(TABLE)
    everywhere = [row for row in TABLE if not row.needs]
    assert len({row.text for row in everywhere}) >= 150
    rooms = (FUNCTIONS, BACKWARD, CONSTRUCTORS, LAYERS, STATE_DICTS, MODULES, NETWORK, FILES, COMMANDS, SYNC)
    assert all(len(room) >= 8 for room in rooms)

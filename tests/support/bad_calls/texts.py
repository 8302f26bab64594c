"""A wrong call with the error that is promised for it, and the texts that many errors share."""

from __future__ import annotations

from typing import NamedTuple


class Bad(NamedTuple):
    """A wrong call and its promised error."""

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


def no_forward(layer: str) -> str:
    return (
        f"{layer}.backward: expected a forward before it, one for each backward; got none."
        " To use one layer twice in a pass, call arraybn.batch_norm and batch_norm_backward"
    )


CONVERT, ASTYPE, MOVE = (
    "Convert it, for example with numpy.asarray(",
    "Convert it, for example with ",
    "Move one of them (a layer",
)

SHAPE_3 = "{}: expected shape (3,), one value per channel of {}; got {}"

LOW_DTYPE = (
    "dtype: expected float32 or float64, because running averages drift in {0}; got {0}."
    " Inputs may be of any floating dtype whatever the layer's"
)

COUNT = "num_batches_tracked: expected a whole number of batches ≥ 0; got {}"

# Parameters, gradients, buffers, a count and a remembered forward: everything that could be lost.
LAYER = "layer = BatchNorm1d(3); layer(X); layer.backward(DY); layer(X)"

"""Arrays in and results out: memory layouts, dtypes, byte order, `out`, and refused arrays."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from support.libraries import need

import arraybn
from arraybn import reference

RNG = np.random.default_rng(0)
SHAPE = (6, 3, 4, 5)
X = RNG.standard_normal(SHAPE).astype("f4") + 2
DY = RNG.standard_normal(SHAPE).astype("f4")
WEIGHT, BIAS = np.asarray([1.0, -2.0, 0.5], "f4"), np.asarray([0.0, 1.0, -1.0], "f4")


def forward_backward(x: Any, dy: Any, **options: Any) -> tuple[Any, ...]:
    y, saved = arraybn.batch_norm(x, WEIGHT, BIAS, **options)
    return (y, *arraybn.batch_norm_backward(dy, saved))


EXPECTED = forward_backward(X, DY)


def readonly(x: Any) -> Any:
    x = x.copy()
    x.flags.writeable = False
    return x


def unaligned(x: Any) -> Any:
    memory = np.zeros(x.nbytes + 1, "u1")[1:].view(x.dtype).reshape(x.shape)
    memory[...] = x
    assert not memory.flags.aligned
    return memory


def strided(x: Any) -> Any:
    memory = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
    memory[..., ::2] = x
    return memory[..., ::2]


def axes(*order: int) -> Any:
    """Return an array equal to x whose memory has that order of the axes."""
    return lambda x: np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


LAYOUTS = {
    "contiguous": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "channels-last": axes(0, 2, 3, 1),
    "channels-first": axes(1, 0, 2, 3),
    "turned": axes(3, 1, 2, 0),
    "read-only": readonly,
    "unaligned": unaligned,
    "strided": strided,
    "reversed": lambda x: x[::-1, :, ::-1].copy()[::-1, :, ::-1],
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "memmap": lambda x: x.view(np.memmap),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dy_layout", ["contiguous", "channels-last", "byte-swapped"])
def test_any_memory_layout_gives_the_same_values_and_keeps_its_own(layout: str, dy_layout: str) -> None:
    x = LAYOUTS[layout](X)
    assert (x == X).all()
    results = forward_backward(x, LAYOUTS[dy_layout](DY))
    for got, expected in zip(results, EXPECTED, strict=True):
        assert type(got) is np.ndarray
        assert got.dtype == expected.dtype
        assert got.dtype.isnative
        np.testing.assert_allclose(got, expected, rtol=3e-7, atol=1e-6)
    order = sorted(range(4), key=lambda axis: -abs(x.strides[axis]))
    for got in results[:2]:
        assert sorted(range(4), key=lambda axis: -got.strides[axis]) == order
        assert got.transpose(order).flags.c_contiguous


def test_a_transposed_view_of_contiguous_memory_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Watch:
        moments = staticmethod(lambda x: seen.append(x) or reference.moments(x))
        dots, affine, affine2 = (staticmethod(getattr(reference, name)) for name in ("dots", "affine", "affine2"))

    for layout, shape in {"contiguous": (6, 3, 20), "channels-last": (120, 3, 1), "turned": (5, 3, 24)}.items():
        x = LAYOUTS[layout](X)
        arraybn.batch_norm(x, kernels=Watch)
        assert np.shares_memory(seen[-1], x)
        assert seen[-1].shape == shape
        assert seen[-1].flags.c_contiguous
    arraybn.batch_norm(X[..., :4], kernels=Watch)
    assert not np.shares_memory(seen[-1], X)  # the control: rows with gaps have to be copied


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -4])
def test_any_channel_axis_is_that_axis_moved_to_1(axis: int) -> None:
    x, dy = np.moveaxis(X, 1, axis), np.moveaxis(DY, 1, axis)
    for copy in (np.asarray, np.ascontiguousarray):
        y, dx, dweight, dbias = forward_backward(copy(x), copy(dy), channel_axis=axis)
        np.testing.assert_allclose(np.moveaxis(y, axis, 1), EXPECTED[0], rtol=3e-7, atol=1e-6)
        np.testing.assert_allclose(np.moveaxis(dx, axis, 1), EXPECTED[1], rtol=3e-7, atol=1e-6)
        np.testing.assert_allclose([dweight, dbias], EXPECTED[2:], rtol=1e-12, atol=1e-12)


def test_broadcast_input_works() -> None:
    x = np.broadcast_to(X[:1], SHAPE)
    y, saved = arraybn.batch_norm(x, WEIGHT, BIAS)
    np.testing.assert_allclose(y, arraybn.batch_norm(x.copy(), WEIGHT, BIAS)[0], rtol=1e-6)
    dx, _, dbias = arraybn.batch_norm_backward(np.broadcast_to(np.float32(1), SHAPE), saved)
    assert (dbias == 120).all()
    assert abs(dx).max() < 1e-6


def test_a_wider_dy_is_summed_before_anything_is_rounded() -> None:
    _, saved = arraybn.batch_norm(X, WEIGHT, BIAS)
    dx, dweight, _ = arraybn.batch_norm_backward(DY.astype("f8"), saved)
    assert dx.dtype == np.float32
    np.testing.assert_allclose(dx, EXPECTED[1], rtol=3e-7, atol=1e-6)
    np.testing.assert_allclose(dweight, EXPECTED[2], rtol=1e-12)
    _, more, _ = arraybn.batch_norm_backward(DY.astype("f8") * (1 + 1e-9), saved)  # the same dy in float32
    np.testing.assert_allclose(more, dweight * (1 + 1e-9), rtol=1e-12)


def test_a_narrower_dy_is_widened_to_the_same_bits() -> None:
    _, saved = arraybn.batch_norm(X, WEIGHT, BIAS)
    narrow = DY.astype("f2")
    for found, expected in zip(
        arraybn.batch_norm_backward(narrow, saved),
        arraybn.batch_norm_backward(narrow.astype("f4"), saved),
        strict=True,
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided"])
def test_a_wider_dy_in_any_layout_and_with_out_gives_the_same_bits(layout: str) -> None:
    dy, x = DY.astype("f8") * (1 + 1e-9), LAYOUTS[layout](X.copy())
    _, saved = arraybn.batch_norm(x, WEIGHT, BIAS)
    expected = arraybn.batch_norm_backward(dy, saved)
    for out in (LAYOUTS[layout](np.full(SHAPE, 7, "f4")), x):  # over x comes last
        found = arraybn.batch_norm_backward(LAYOUTS[layout](dy), saved, out=out)
        assert found[0] is out
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_weight_and_bias_may_be_of_any_floating_dtype() -> None:
    for dtype in ("f2", "f8", ">f4"):
        y, _ = arraybn.batch_norm(X, WEIGHT.astype(dtype), BIAS.astype(dtype))
        np.testing.assert_array_equal(y, EXPECTED[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided"])
def test_out_takes_the_result_and_is_returned(layout: str) -> None:
    x = X.copy()
    out = LAYOUTS[layout](np.full(SHAPE, 7, "f4"))
    y, saved = arraybn.batch_norm(x, WEIGHT, BIAS, out=out)
    assert y is out
    np.testing.assert_array_equal(out, EXPECTED[0])
    np.testing.assert_array_equal(x, X)
    gradient = LAYOUTS[layout](np.full(SHAPE, 7, "f4"))
    dx, dweight, _ = arraybn.batch_norm_backward(DY, saved, out=gradient)
    assert dx is gradient
    np.testing.assert_array_equal(gradient, EXPECTED[1])
    np.testing.assert_array_equal(dweight, EXPECTED[2])


def test_a_forward_in_place_has_no_backward() -> None:
    x = X.copy()
    y, saved = arraybn.batch_norm(x, WEIGHT, BIAS, out=x[:])
    np.testing.assert_array_equal(x, EXPECTED[0])
    assert np.shares_memory(y, x)
    with pytest.raises(
        RuntimeError, match=r"x is still there; got one without, because the forward wrote y over x \(out=x\)"
    ):
        arraybn.batch_norm_backward(DY, saved)


@pytest.mark.usefixtures("numpy_kernels")
@pytest.mark.parametrize("fixed", [{}, {"mean": np.zeros(3), "var": np.ones(3)}], ids=["batch", "fixed"])
def test_gradients_of_single_values_do_not_lie_in_the_memory_of_dy(fixed: Any) -> None:
    x, dy = np.asarray([[1.0, 2.0, 3.0]]), np.asarray([[4.0, 5.0, 6.0]])
    _, saved = arraybn.batch_norm(x, np.ones(3), np.zeros(3), **fixed)
    _, _, dbias = arraybn.batch_norm_backward(dy, saved, out=dy)
    np.testing.assert_array_equal(dbias, [4.0, 5.0, 6.0])
    mean, m2 = (found := arraybn.moments(x)).mean, found.m2
    assert not any(np.shares_memory(x, vector) for vector in (mean, m2))


def test_a_backward_may_write_over_dy_and_once_over_x() -> None:
    x, dy = X.copy(), DY.copy()
    _, saved = arraybn.batch_norm(x, WEIGHT, BIAS)
    for _ in range(2):
        dy[...] = DY
        dx, _, _ = arraybn.batch_norm_backward(dy, saved, out=dy)
        assert dx is dy
        np.testing.assert_array_equal(dy, EXPECTED[1])
    arraybn.batch_norm_backward(DY, saved, out=x)
    np.testing.assert_array_equal(x, EXPECTED[1])
    with pytest.raises(RuntimeError, match="an earlier backward wrote dx over it"):
        arraybn.batch_norm_backward(DY, saved)


def test_out_that_partly_overlaps_is_refused_and_nothing_is_written() -> None:
    memory = np.zeros(X.size + 60, "f4")
    x = memory[: X.size].reshape(SHAPE)
    x[...] = X
    before = memory.copy()
    with pytest.raises(ValueError, match="out: expected memory disjoint from x, or x itself; got a partial overlap"):
        arraybn.batch_norm(x, out=memory[60:].reshape(SHAPE))
    _, saved = arraybn.batch_norm(x)
    for dy, name in ((DY, "x"), (memory[30:-30].reshape(SHAPE), "dy")):
        with pytest.raises(ValueError, match=f"out: expected memory disjoint from {name}"):
            arraybn.batch_norm_backward(dy, saved, out=memory[60:].reshape(SHAPE))
    with pytest.raises(ValueError, match="out: expected memory disjoint from weight"):
        arraybn.batch_norm(X, memory[:3], out=memory[: X.size].reshape(SHAPE))
    with pytest.raises(ValueError, match="out: expected memory disjoint from x"):
        arraybn.batch_norm(x, out=x[::-1])
    np.testing.assert_array_equal(memory, before)
    twice = np.zeros((*SHAPE, 2), "f4")
    arraybn.batch_norm(twice[..., 0], out=twice[..., 1])  # interleaved but disjoint


def test_axes_of_one_value_do_not_hide_that_out_is_x_itself() -> None:
    memory = X[:, :, 0, 0].copy()
    out = memory.reshape(6, 3, 1)
    x = np.lib.stride_tricks.as_strided(memory, (6, 3, 1), (12, 4, 400))
    y, _ = arraybn.batch_norm(x, out=out)
    assert y is out


def test_changing_the_moments_of_a_forward_does_not_change_its_backward() -> None:
    _, saved = arraybn.batch_norm(X, WEIGHT, BIAS)
    saved.moments.mean[...] = 100
    np.testing.assert_array_equal(arraybn.batch_norm_backward(DY, saved)[0], EXPECTED[1])


def test_torch_memory_is_seen_too() -> None:
    torch = need("torch")
    memory = torch.zeros(X.size + 60)
    x = memory[: X.size].view(SHAPE)
    with pytest.raises(ValueError, match="out: expected memory disjoint from x"):
        arraybn.batch_norm(x, out=memory[60:].view(SHAPE))
    _, saved = arraybn.batch_norm(x, out=x.view(SHAPE))
    with pytest.raises(RuntimeError, match="expected a forward whose x is still there"):
        arraybn.batch_norm_backward(x, saved)
    channels_last = torch.tensor(X).to(memory_format=torch.channels_last)
    y, _ = arraybn.batch_norm(channels_last, torch.tensor(WEIGHT), torch.tensor(BIAS))
    assert y.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(y, EXPECTED[0], rtol=3e-7, atol=1e-6)


def test_jax_arrays_are_no_out() -> None:
    jnp = need("jax.numpy")
    with pytest.raises(TypeError, match="out: expected an array that can be written into; got a JAX array"):
        arraybn.batch_norm(jnp.asarray(X), out=jnp.zeros(SHAPE))


@pytest.mark.parametrize(
    ("out", "error", "text"),
    [
        (
            np.zeros((6, 3, 4, 4), "f4"),
            ValueError,
            r"out: expected shape \(6, 3, 4, 5\) and dtype float32.*got \(6, 3, 4, 4\)",
        ),
        (np.zeros(SHAPE), ValueError, "got .* and <f8"),
        (np.zeros(SHAPE, ">f4"), ValueError, "got .* and >f4"),
        (readonly(X), ValueError, "out: expected a writeable array; got a read-only one"),
        (np.lib.stride_tricks.as_strided(X.copy(), SHAPE, (240, 80, 20, 0)), ValueError, "memory of its own"),
        ([0.0], TypeError, "out: expected a numpy array; got list"),
    ],
)
def test_a_wrong_out_is_refused(out: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        arraybn.batch_norm(X, out=out)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        ([[1.0, 2.0]], r"x: expected an array .*; got list\. Convert it, for example with numpy.asarray\(x, dtype="),
        (None, "x: expected an array .*; got NoneType"),
        (3.0, "x: expected an array .*; got float"),
        (
            np.ma.masked_array(X, X > 2),
            "x: expected a plain array; got MaskedArray, whose mask .*Leave out the samples",
        ),
        (np.zeros((1, 2)).view(np.matrix), "x: expected a plain array; got matrix"),
        (
            X.astype("i4"),
            r"x: expected float16, bfloat16, float32 or float64; got int32\. Convert it.*x.astype\(numpy.float32\)",
        ),
        (X > 0, "got bool"),
        (X.astype("c8"), "got complex64"),
        (X.astype("g"), "got (longdouble|float128)"),
        (X.astype("O"), "got object"),
        (arraybn.Parameter(X), r"got arraybn.modules.Parameter\. Pass x.data"),
    ],
    ids=str,
)
def test_what_is_no_floating_array_is_a_type_error_with_the_remedy(x: Any, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for function in (arraybn.batch_norm, arraybn.moments, arraybn.BatchNorm2d(3)):
            with pytest.raises(TypeError, match=text):
                function(x)


WRONG_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": X[0, 0, 0]}, ValueError, r"x: expected at least 2 dimensions, \(N, C, \*S\); got shape \(5,\)"),
    ({"x": X[:, :0]}, ValueError, r"x: expected at least one channel on axis 1; got shape \(6, 0, 4, 5\)"),
    ({"channel_axis": 4}, ValueError, "channel_axis: expected -4 … 3 for x of 4 dimensions; got 4"),
    ({"channel_axis": 1.0}, TypeError, "channel_axis: expected an integer; got 1.0"),
    ({"channel_axis": True}, TypeError, "channel_axis: expected an integer; got True"),
    ({"weight": WEIGHT[:2]}, ValueError, r"weight: expected shape \(3,\), one value per channel of x; got \(2,\)"),
    ({"bias": BIAS[None]}, ValueError, r"bias: expected shape \(3,\), one value per channel of x; got \(1, 3\)"),
    ({"weight": 1.0}, TypeError, "weight: expected an array .*; got float"),
    ({"weight": WEIGHT.astype(int)}, TypeError, "weight: expected float16, .*; got int64"),
    ({"mean": BIAS}, ValueError, "var: expected an array, because mean is given; got None"),
    ({"var": BIAS}, ValueError, "mean: expected an array, because var is given; got None"),
    ({"eps": -1e-5}, ValueError, "eps: expected a number ≥ 0; got -1e-05"),
    ({"eps": float("nan")}, ValueError, "eps: expected a finite number; got nan"),
    ({"eps": "1e-5"}, TypeError, "eps: expected a number; got '1e-5'"),
    ({"eps": None}, TypeError, "eps: expected a number; got None"),
    ({"kernels": "gpu"}, ValueError, r"kernels: expected one of \['cpu', 'cuda', .* or a kernel module; got 'gpu'"),
    ({"kernels": np}, TypeError, "kernels: expected a module with the sweeps moments, .* without moments, dots"),
]


@pytest.mark.parametrize(("options", "error", "text"), WRONG_CALLS, ids=lambda v: str(v)[:40])
def test_wrong_calls_name_the_argument_and_what_was_expected(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        arraybn.batch_norm(**{"x": X, **options})


def test_wrong_backward_calls_leave_the_forward_usable() -> None:
    _, saved = arraybn.batch_norm(X, WEIGHT, BIAS)
    for dy, error, text in (
        (DY[:3], ValueError, r"dy: expected shape \(6, 3, 4, 5\), that of x and y; got \(3, 3, 4, 5\)"),
        (DY.tolist(), TypeError, "dy: expected an array .*; got list"),
        (DY.astype(int), TypeError, "dy: expected float16"),
    ):
        with pytest.raises(error, match=text):
            arraybn.batch_norm_backward(dy, saved)
    with pytest.raises(TypeError, match="saved: expected what batch_norm returned beside y; got ndarray"):
        arraybn.batch_norm_backward(DY, X)
    np.testing.assert_array_equal(arraybn.batch_norm_backward(DY, saved)[0], EXPECTED[1])


def test_wrong_calls_of_the_other_functions() -> None:
    moments, zeros = arraybn.moments(X), np.zeros(3)
    for call, error, text in (
        (arraybn.pool, TypeError, "moments: expected at least one Moments; got none"),
        (lambda: arraybn.pool(moments, X), TypeError, r"moments\[1\]: expected Moments.*; got ndarray"),
        (
            lambda: arraybn.pool(moments, arraybn.moments(X[:, :2])),
            ValueError,
            r"moments\[1\]: expected 3 channels as moments\[0\] has; got 2",
        ),
        (lambda: arraybn.update_running_stats(zeros, zeros, X, 0.1), TypeError, "moments: expected Moments"),
        (lambda: arraybn.update_running_stats(None, zeros, moments, 0.1), TypeError, "running_mean: expected an array"),
        (lambda: arraybn.update_running_stats(zeros, zeros[:2], moments, 0.1), ValueError, r"running_var: .*\(2,\)"),
        (lambda: arraybn.update_running_stats(zeros, zeros, moments, None), TypeError, "momentum: expected a number"),
        (lambda: arraybn.update_running_stats(zeros, zeros, moments, np.inf), ValueError, "momentum: .* finite"),
        (
            lambda: arraybn.update_running_stats(zeros, zeros, moments, 0.1, correction=-1),
            ValueError,
            "correction: expected an integer ≥ 0; got -1",
        ),
        (
            lambda: arraybn.update_running_stats(zeros, zeros, arraybn.moments(X[:1, :, :1, :1]), 0.1),
            ValueError,
            "moments: expected n > correction = 1, or the variance is not defined; got n = 1",
        ),
    ):
        with pytest.raises(error, match=text):
            call()
    assert not zeros.any()


def test_saved_holds_copies_of_everything_but_x() -> None:
    weight, bias = WEIGHT.astype("f8"), BIAS.astype("f8")
    mean, var = np.full(3, 2.0), np.full(3, 4.0)
    for fixed in ({}, {"mean": mean, "var": var}):
        _, saved = arraybn.batch_norm(X, weight, bias, **fixed)
        before = arraybn.batch_norm_backward(DY, saved)
        for array in (weight, bias, mean, var):
            array *= 3
        after = arraybn.batch_norm_backward(DY, saved)
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)
        changed = arraybn.batch_norm_backward(DY, arraybn.batch_norm(X, weight, bias, **fixed)[1])
        assert (changed[0] != after[0]).any()  # the control: it does depend on them


def test_an_empty_batch_gives_an_empty_y_and_zero_gradients() -> None:
    for shape in ((0, 3), (0, 3, 4), (2, 3, 0)):
        x = np.zeros(shape, "f4")
        y, saved = arraybn.batch_norm(x, WEIGHT, BIAS)
        dx, dweight, dbias = arraybn.batch_norm_backward(x, saved)
        assert y.shape == dx.shape == shape
        assert saved.moments.n == 0
        for array in (saved.moments.mean, saved.moments.m2, dweight, dbias):
            assert array.tolist() == [0, 0, 0]
        assert np.isnan(saved.moments.var()).all()


def test_e1_var_is_nan_without_a_warning_where_it_is_not_defined() -> None:
    moments = arraybn.moments(X[:1, :, :1, :1])
    assert np.isnan(moments.var(1)).all()
    assert moments.var(0).tolist() == [0, 0, 0]


def test_e4_update_running_stats_returns_new_arrays_even_of_nothing() -> None:
    mean, var = np.asarray([1.0, 2.0, 3.0]), np.ones(3)
    for batch in (arraybn.moments(X[:0]), arraybn.moments(X)):
        new_mean, new_var = arraybn.update_running_stats(mean, var, batch, 0.5)
        assert not np.shares_memory(new_mean, mean)
        assert not np.shares_memory(new_var, var)
        assert (new_mean == mean).all() == (batch.n == 0)
    assert mean.tolist() == [1, 2, 3]

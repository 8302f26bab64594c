"""The capabilities: every function, on every namespace, in every dtype, with every kernel module that takes them.

docs/reference/capabilities.md shows these cases as a table, made when the site is built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.homes import HOMES, Home
from support.libraries import need

import arraybn
from arraybn import kernels

DTYPES = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}  # and their eps

# ---- The claims ------------------------------------------------------------------------------------------------------

TAKES = {
    "reference": "",
    "cpu": "numpy",
    "cuda": "cupy-kernels",
}  # how names of homes begin, by the module that serves them
NO_NUMBA = "numpy-reference"
NO_DTYPE = {  # what a namespace, as it is set there, has not
    "strict": {"float16", "bfloat16"},
    "strict-device1": {"float16", "bfloat16"},
    "strict-no_float64": {"float16", "bfloat16", "float64"},
    "jax": {"float64"},
}
NO_OUT = ("jax",)  # arrays that cannot be written into

# The eps of sums: a module may add some values of half precision in float32, before it goes on in float64.
SUMMED = {("float64", dtype): 2.0**-52 if dtype in ("float32", "float64") else 2.0**-23 for dtype in DTYPES}
SUMMED |= {("float32", dtype): 2.0**-23 for dtype in DTYPES}
ROUNDINGS = 64  # of thirty values and of their sums

# ---- The functions: each gives results and what the definition gives -------------------------------------------------

RNG = np.random.default_rng(0)
VALUES = RNG.normal(1, 2, (6, 3, 5)).astype("f2")  # which every dtype but bfloat16 holds exactly
DY = RNG.normal(size=(6, 3, 5)).astype("f2")
WEIGHT, BIAS = np.asarray([1.5, -0.5, 1.0]), np.asarray([0.0, 0.25, 1.0])
EPS = 1e-3
MASK = RNG.random((6, 5)) < 0.7


class Case:
    """One home, dtype and kernel module, and a batch in that home."""

    def __init__(self, home: Home, dtype: str, module: str) -> None:
        self.home, self.dtype, self.options = home, dtype, {"eps": EPS, "kernels": module}
        self.ml_dtypes = home.name.startswith(("numpy", "cupy"))  # where bfloat16 is that of ml_dtypes
        self.x, self.dy = self.make(VALUES), self.make(DY)
        self.weight, self.bias = home.array(WEIGHT, "float32"), home.array(BIAS, "float32")
        x = self.read(self.x)
        self.mean, self.var = x.mean((0, 2)), x.var((0, 2))
        self.xhat = (x - self.mean[:, None]) / np.sqrt(self.var + EPS)[:, None]

    def make(self, values: Any) -> Any:
        if self.dtype != "bfloat16":
            return self.home.array(values, self.dtype)
        if self.ml_dtypes:
            return self.home.array(values, need("ml_dtypes").bfloat16)
        return self.home.xp.astype(self.home.array(values, "float32"), self.home.xp.bfloat16)

    def read(self, array: Any) -> Any:
        if self.dtype == "bfloat16" and not self.ml_dtypes:
            array = self.home.xp.astype(array, self.home.xp.float32)
        return np.asarray(self.home.numpy(array), "f8")

    def mean_of(self, values: Any) -> Any:
        return values.mean((0, 2))[:, None]

    def projected(self, values: Any) -> Any:
        return values - self.mean_of(values) - self.xhat * self.mean_of(values * self.xhat)

    def y(self) -> Any:
        return WEIGHT[:, None] * self.xhat + BIAS[:, None]


def forward(case: Case) -> list[tuple[Any, Any]]:
    y, _ = arraybn.batch_norm(case.x, case.weight, case.bias, **case.options)
    assert y.dtype == case.x.dtype
    return [(y, case.y())]


def forward_out(case: Case) -> list[tuple[Any, Any]]:
    out = case.make(DY)
    y, _ = arraybn.batch_norm(case.x, case.weight, case.bias, out=out, **case.options)
    assert y is out
    return [(y, case.y())]


def fixed(case: Case) -> list[tuple[Any, Any]]:
    mean, var = np.asarray([0.5, 1.0, 1.5]), np.asarray([4.0, 3.0, 2.0])
    here = {"mean": case.home.array(mean, "float32"), "var": case.home.array(var, "float32")}
    y, saved = arraybn.batch_norm(case.x, case.weight, case.bias, **here, **case.options)
    dx, _, _ = arraybn.batch_norm_backward(case.dy, saved)
    a = (WEIGHT / np.sqrt(var + EPS))[:, None]
    return [(y, a * (case.read(case.x) - mean[:, None]) + BIAS[:, None]), (dx, a * case.read(case.dy))]


def backward(case: Case) -> list[tuple[Any, Any]]:
    _, saved = arraybn.batch_norm(case.x, case.weight, case.bias, **case.options)
    dx, dweight, dbias = arraybn.batch_norm_backward(case.dy, saved)
    assert dx.dtype == case.x.dtype
    dy, a = case.read(case.dy), (WEIGHT / np.sqrt(case.var + EPS))[:, None]
    sums = dy.sum((0, 2)), (dy * case.xhat).sum((0, 2))
    return [(dx, a * case.projected(dy)), (dweight, sums[1]), (dbias, sums[0])]


def jvp(case: Case) -> list[tuple[Any, Any]]:
    _, saved = arraybn.batch_norm(case.x, case.weight, case.bias, **case.options)
    got = arraybn.batch_norm_jvp(case.dy, saved, case.bias, case.weight)  # BIAS and WEIGHT as the tangents of both
    assert got.dtype == case.x.dtype
    a = (WEIGHT / np.sqrt(case.var + EPS))[:, None]
    return [(got, a * case.projected(case.read(case.dy)) + BIAS[:, None] * case.xhat + WEIGHT[:, None])]


def double_backward(case: Case) -> list[tuple[Any, Any]]:
    _, saved = arraybn.batch_norm(case.x, case.weight, case.bias, **case.options)
    ddy, ddx, ddweight = arraybn.batch_norm_double_backward(case.x, case.dy, saved, case.bias)
    assert ddy.dtype == ddx.dtype == case.x.dtype
    v, dy, xhat, rstd = case.read(case.x), case.read(case.dy), case.xhat, 1 / np.sqrt(case.var + EPS)[:, None]
    inner = (v * case.projected(dy)).mean((0, 2))[:, None]
    parts = xhat * inner, case.projected(v) * case.mean_of(dy * xhat), case.projected(dy) * case.mean_of(v * xhat)
    by_x = -WEIGHT[:, None] * rstd**2 * sum(parts) + BIAS[:, None] * rstd * case.projected(dy)
    by_dy = WEIGHT[:, None] * rstd * case.projected(v) + BIAS[:, None] * xhat
    return [(ddy, by_dy), (ddx, by_x), (ddweight, v[:, 0].size * (rstd * inner)[:, 0])]


def in_parts(case: Case) -> list[tuple[Any, Any]]:
    whole = arraybn.pool(
        *(arraybn.moments(x, kernels=case.options["kernels"]) for x in (case.x[:2, ...], case.x[2:, ...]))
    )
    results, sums = [], None
    for rows in (slice(0, 2), slice(2, 6)):
        y, saved = arraybn.batch_norm(case.x[rows, ...], case.weight, case.bias, moments=whole, **case.options)
        results.append((y, saved, case.dy[rows, ...]))
        part = arraybn.batch_norm_sums(case.dy[rows, ...], saved)
        sums = part if sums is None else sums + part
    dx = [arraybn.batch_norm_backward(dy, saved, sums=sums)[0] for _, saved, dy in results]
    a = (WEIGHT / np.sqrt(case.var + EPS))[:, None] * case.projected(case.read(case.dy))
    wanted = case.y()
    return [(results[0][0], wanted[:2]), (results[1][0], wanted[2:]), (dx[0], a[:2]), (dx[1], a[2:])]


def moments(case: Case) -> list[tuple[Any, Any]]:
    batch = arraybn.moments(case.x, kernels=case.options["kernels"])
    return [(batch.mean, case.mean), (batch.var(), case.var)]


def with_mask(case: Case) -> list[tuple[Any, Any]]:
    given = {"where": case.home.array(MASK), "eps": EPS, "kernels": case.options["kernels"]}
    y, saved = arraybn.batch_norm(case.x, case.weight, case.bias, **given)
    dx, dweight, _ = arraybn.batch_norm_backward(case.dy, saved)
    x, dy, kept, n = case.read(case.x), case.read(case.dy), MASK[:, None], MASK.sum()
    mean = (x * kept).sum((0, 2)) / n
    rstd = 1 / np.sqrt(((x - mean[:, None]) ** 2 * kept).sum((0, 2)) / n + EPS)
    xhat = (x - mean[:, None]) * rstd[:, None]
    sums = dy.sum((0, 2)), (dy * xhat).sum((0, 2))
    through = kept * (sums[0][:, None] + xhat * sums[1][:, None]) / n
    by_x = (WEIGHT * rstd)[:, None] * (dy - through)
    return [(y, WEIGHT[:, None] * xhat + BIAS[:, None]), (dx, by_x), (dweight, sums[1])]


FUNCTIONS: dict[str, Callable[[Case], list[tuple[Any, Any]]]] = {
    "forward": forward,
    "`out=`": forward_out,
    "fixed statistics": fixed,
    "backward": backward,
    "`moments`": moments,
    "in parts": in_parts,
    "`jvp`": jvp,
    "double backward": double_backward,
    "masks": with_mask,
}

# ---- The cases, and the tests ----------------------------------------------------------------------------------------


def serves(module: str, home: str) -> bool:
    """Return True where the module takes arrays of that home."""
    return home.startswith(TAKES[module.partition("_")[0]]) and not (module != "reference" and home == NO_NUMBA)


def works(home: str, module: str, dtype: str, function: str) -> bool:
    """Return True where the table claims that the case works."""
    there = serves(module, home) and dtype not in NO_DTYPE.get(home, ())
    return there and not (function == "`out=`" and home.startswith(NO_OUT))


CASES = [
    (home, module, dtype, f) for home in HOMES for module in kernels.MODULES for dtype in DTYPES for f in FUNCTIONS
]
WORKS = [case for case in CASES if works(*case)]
REFUSED = [(home, module) for home in HOMES for module in kernels.MODULES if not serves(module, home)]


@pytest.fixture
def there(request: pytest.FixtureRequest) -> Iterator[Home]:
    with contextlib.ExitStack() as stack:
        yield HOMES[request.param](stack)


@pytest.mark.parametrize(("there", "module", "dtype", "function"), WORKS, indirect=["there"])
def test_a_function_gives_what_the_definition_gives(there: Home, module: str, dtype: str, function: str) -> None:
    if module == "cpu":
        need("numba")
    case = Case(there, dtype, module)
    for got, wanted in FUNCTIONS[function](case):
        values = case.read(got) if got.dtype == case.x.dtype else np.asarray(there.numpy(got), "f8")
        bound = (4 * DTYPES[dtype] if got.dtype == case.x.dtype else 0) + ROUNDINGS * SUMMED[there.wide, dtype]
        scale = max(abs(wanted).max(), 1)
        assert values.shape == wanted.shape
        assert (abs(values - wanted) <= bound * scale).all()
        assert not (abs(values + 3 * bound * scale - wanted) <= bound * scale).any()


@pytest.mark.parametrize(("there", "module"), REFUSED, indirect=["there"])
def test_what_is_not_served_is_refused(there: Home, module: str) -> None:
    with pytest.raises((TypeError, ImportError), match="kernels: expected"):
        Case(there, "float32", module).options["kernels"] and arraybn.moments(there.array(VALUES, "f4"), kernels=module)


@pytest.mark.parametrize("there", [home for home in HOMES if home.startswith(NO_OUT)], indirect=True)
def test_arrays_that_cannot_be_written_into_are_no_out(there: Home) -> None:
    with pytest.raises(TypeError, match="out"):
        forward_out(Case(there, "float32", "reference"))


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")  # of JAX, which gives float32 instead
@pytest.mark.parametrize(("home", "dtype"), [(home, dtype) for home in NO_DTYPE for dtype in sorted(NO_DTYPE[home])])
def test_a_dtype_that_is_not_there_is_not_there(home: str, dtype: str) -> None:
    if home not in HOMES:
        pytest.skip(f"no {home} here")
    with contextlib.ExitStack() as stack:
        place = HOMES[home](stack)
        try:
            made = place.array(VALUES, "f4") if dtype == "bfloat16" else place.array(VALUES, dtype)
            made = place.xp.astype(made, getattr(place.xp, dtype))
        except (AttributeError, TypeError, ValueError):
            return
        assert str(made.dtype) != dtype


# ---- The table -------------------------------------------------------------------------------------------------------


def table() -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table in the docs."""
    rows = []
    for home in HOMES:
        for module in kernels.MODULES:
            if not serves(module, home):
                continue
            row = [home, module]
            for dtype in DTYPES:
                found = [function for function in FUNCTIONS if works(home, module, dtype, function)]
                without = [function for function in FUNCTIONS if function not in found]
                row.append("–" if not found else "✓" if not without else f"✓ but {', '.join(without)}")
            rows.append(row)
    return ["namespace", "kernels", *DTYPES], rows


def test_the_table_has_a_mark_for_each_case() -> None:
    head, rows = table()
    assert len(head) == len(rows[0]) == 6
    assert {tuple(row[:2]) for row in rows} == {case[:2] for case in WORKS}
    assert ["numpy", "cpu", "✓", "✓", "✓", "✓"] in rows
    assert ["jax", "reference", *["✓ but `out=`"] * 3, "–"] in rows

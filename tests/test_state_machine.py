"""Layers driven through random valid and invalid calls, beside a model of ten lines in plain NumPy.

`HYPOTHESIS_PROFILE=long` makes at least 10⁵ calls.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.bits import bits

import arraybn

LONG = settings.get_current_profile_name() == "long"
DIMS = {arraybn.BatchNorm1d: (2, 3), arraybn.BatchNorm2d: (4,), arraybn.BatchNorm3d: (5,)}
LARGEST = 5.0  # of what is drawn; multiples of 1/8, so that float16 holds them and sums are exact


class Model:
    """A batch norm in float64. None means the same as for a layer."""

    training, remembered, updates = True, None, 0

    def forward(self, x: Any) -> Any:
        """Return y of x (N, C, S), or raise ValueError."""
        n, fixed = x.shape[0] * x.shape[2], not self.training and self.mean is not None
        if n == 1 and not fixed:
            raise ValueError("one value per channel")
        mean, var = (self.mean, self.var) if fixed else (x.mean((0, 2)), x.var((0, 2))) if n else (0 * self.weight,) * 2
        if self.training and self.track and n:
            self.count = None if self.count is None else self.count + 1
            if self.mean is not None:
                a = self.momentum if self.momentum is not None else 1 / self.count if self.count else 0
                self.mean, self.var = (1 - a) * self.mean + a * mean, (1 - a) * self.var + a * var * n / (n - 1)
        self.rstd = np.divide(1, np.sqrt(var + self.eps), out=np.zeros_like(var), where=var + self.eps > 0)
        return (self.weight * self.rstd)[:, None] * (x - mean[:, None]) + self.bias[:, None]


def numbers(seed: int, *shape: int, low: float = -LARGEST) -> Any:
    """Return multiples of 1/8; with some seeds all the same."""
    rng = np.random.default_rng(seed)
    values = rng.integers(round(8 * low), round(8 * LARGEST) + 1, shape) / 8
    return np.full(shape, low if low > 0 else 1.5) if seed % 6 == 0 else values


seeds = st.integers(0, 10_000)


class Machine(RuleBasedStateMachine):
    """A machine that calls layer and model alike. `call` counts, and asserts that an error changes nothing."""

    classes: ClassVar[dict[type[Any], tuple[int, ...]]] = DIMS
    calls: ClassVar[int] = 0
    errors: ClassVar[int] = 0

    @initialize(
        data=st.data(),
        channels=st.integers(1, 3),
        eps=st.sampled_from([1e-5, 0, 0.5]),
        momentum=st.sampled_from([0.1, None, 0, 0.5, 1]),
        affine=st.booleans(),
        track=st.sampled_from([True, True, False]),
        axis=st.sampled_from([1, -1]),
        dtype=st.sampled_from(["float32", "float64"]),
    )
    def build(
        self, data: Any, channels: int, eps: float, momentum: Any, affine: bool, track: bool, axis: int, dtype: str
    ) -> None:
        kind = data.draw(st.sampled_from(list(self.classes)))
        self.layer = kind(channels, eps, momentum, affine, track, channel_axis=axis, dtype=dtype)
        self.dims, self.channels, self.axis = self.classes[kind], channels, axis
        self.ulp = np.finfo(dtype).eps  # the worst that the layer's arrays have ever been kept in
        model = self.model = Model()
        model.eps, model.momentum, model.track, model.affine = eps, momentum, track, affine
        model.weight, model.bias, model.dbias = np.ones(channels), np.zeros(channels), None
        model.mean, model.var, model.count = (np.zeros(channels), np.ones(channels), 0) if track else (None,) * 3

    # ---- How every call is made ----

    def call(self, function: Callable[[], Any], wrong: bool = False) -> Any:
        """Call `function`; a wrong call has to raise one of three errors, whose text says what was expected."""
        type(self).calls += 1
        before = bits(self.layer)
        result = caught = None
        try:
            result = function()
        except (TypeError, ValueError, RuntimeError) as error:
            caught = error
        if caught is not None:
            assert bits(self.layer) == before, f"changed by a call that raised: {caught}"
            assert wrong, f"refused: {caught}"
            assert any(word in str(caught) for word in ("xpected", "cannot assign", "in loading state_dict"))
            type(self).errors += 1
            return None
        assert not wrong, "accepted"
        return result

    def shape(self, ndim: int, channels: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
        others = sizes[: ndim - 1]
        at = min(1, len(others)) if self.axis == 1 else len(others)
        return (*others[:at], channels, *others[at:])

    def seen(self, x: Any) -> Any:
        """Return `x` in the form of the model: (N, C, S) in float64."""
        x = np.moveaxis(np.asarray(x, "f8"), self.axis, 1)
        return x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))

    # ---- Forward and backward ----

    @rule(
        ndim=st.sampled_from([None] * 8 + [1, 2, 3, 4, 5, 6]),
        channels=st.sampled_from([None] * 8 + [0, 1, 2, 3, 4]),
        sizes=st.sampled_from(
            [(3, 2, 2, 1, 2), (1, 1, 1, 1, 1), (0, 2, 2, 2, 2), (2, 0, 1, 2, 1), (4, 1, 1, 3, 1), (1, 3, 1, 1, 2)]
        ),
        dtype=st.sampled_from(["f4", "f8", "f2", ">f4", "f4", "f8", "i8", "?", "c16", "O", "list", "none"]),
        seed=seeds,
        backward=st.sampled_from(["", "good", "shape", "list"]),
    )
    def forward(self, ndim: Any, channels: Any, sizes: Any, dtype: str, seed: int, backward: str) -> None:
        model, ndim = self.model, self.dims[seed % len(self.dims)] if ndim is None else ndim
        channels = self.channels if channels is None else channels
        if dtype == "f2" and not model.eps:
            dtype = "f4"  # rstd may be beyond float16
        values = numbers(seed, *self.shape(ndim, channels, sizes))
        wrong = ndim not in self.dims or channels != self.channels or dtype in ("i8", "?", "c16", "O", "list", "none")
        x = {"list": values.tolist(), "none": None}[dtype] if dtype in ("list", "none") else values.astype(dtype)
        before = copy.copy(model)
        try:
            expected = None if wrong else model.forward(self.seen(x))
        except ValueError:
            expected = None
        y = self.call(lambda: self.layer(x), expected is None)
        if y is None:
            return
        model.remembered, model.updates = x.shape, before.updates + 1
        assert (y.shape, y.dtype) == (x.shape, x.dtype.newbyteorder("="))
        # Each update of a running average and each step of y rounds once or twice, in units of the terms they add.
        ulps = (2 * model.updates + 8) * max(self.ulp, np.finfo(y.dtype).eps)
        terms = (abs(model.weight) * model.rstd)[:, None] * 2 * LARGEST + abs(model.bias)[:, None] + abs(expected)
        assert (abs(self.seen(y) - expected) <= ulps * terms).all(), "y is not the model's"
        if backward:
            self.backward(backward, "f4", seed)

    @rule(
        kind=st.sampled_from(["good", "good", "shape", "channels", "none", "list"]),
        dtype=st.sampled_from(["f4", "f8", "i4", "c8"]),
        seed=seeds,
    )
    def backward(self, kind: str, dtype: str, seed: int) -> None:
        model = self.model
        shape = model.remembered or (2, self.channels)
        shape = {"shape": (*shape, 1), "channels": tuple(size + 1 for size in shape)}.get(kind, shape)
        dy = numbers(seed, *shape).round()
        dy = {"none": None, "list": dy.tolist()}.get(kind, dy.astype(dtype))
        wrong = model.remembered is None or kind != "good" or dtype in ("i4", "c8")
        dx = self.call(lambda: self.layer.backward(dy), wrong)
        if not wrong:
            assert dx.shape == shape
            assert np.isfinite(dx).all()
            model.remembered = None
            model.dbias = self.seen(dy).sum((0, 2)) + (0 if model.dbias is None else model.dbias)

    # ---- State ----

    @rule(mode=st.sampled_from([True, False, True, False, 1, "eval", None]))
    def train(self, mode: Any) -> None:
        self.call(lambda: self.layer.train(mode), not isinstance(mode, bool))
        self.model.training = mode if isinstance(mode, bool) else self.model.training

    @rule(parameters=st.booleans())
    def reset(self, parameters: bool) -> None:
        model = self.model
        self.call(self.layer.reset_parameters if parameters else self.layer.reset_running_stats)
        if model.track:
            model.count = None if model.count is None else 0
            if model.mean is not None:
                model.mean, model.var = np.zeros(self.channels), np.ones(self.channels)
        if parameters:
            model.weight, model.bias = np.ones(self.channels), np.zeros(self.channels)

    @rule()
    def zero_grad(self) -> None:
        self.call(self.layer.zero_grad)
        self.model.dbias = None

    @rule(seed=seeds, count=st.integers(0, 5))
    def load(self, seed: int, count: int) -> None:
        model, state = self.model, self.call(self.layer.state_dict)
        for index, name in enumerate(state):
            low = 0.125 if name == "running_var" else -2 if name in ("weight", "bias") else -LARGEST
            state[name] = np.asarray(count) if name.startswith("num") else numbers(seed + index, self.channels, low=low)
        self.call(lambda: self.layer.load_state_dict(state))
        names = {"weight": "weight", "bias": "bias", "running_mean": "mean", "running_var": "var"}
        for name in names.keys() & state.keys():
            setattr(model, names[name], state[name])
        model.count = count if "num_batches_tracked" in state else model.count

    @rule(
        fault=st.sampled_from(["missing", "more", "shape", "complex", "text", "count", "none", "strict", "list"]),
        seed=seeds,
    )
    def load_wrongly(self, fault: str, seed: int) -> None:
        state = {name: np.asarray(value) + 1 for name, value in self.layer.state_dict().items()}
        arrays = [name for name, value in state.items() if value.shape]
        if fault == "count" and "num_batches_tracked" in state:
            state["num_batches_tracked"] = [1.5, -1, np.nan, "3", 2.0**64][seed % 5]
        elif arrays and fault in ("missing", "shape", "complex", "text", "none"):
            name = arrays[seed % len(arrays)]
            bad = {
                "shape": np.zeros(self.channels + 1),
                "complex": 1j * state[name],
                "text": state[name].astype(str),
                "none": None,
            }
            state[name] = bad.get(fault)
            if fault == "missing":
                del state[name]
        elif fault not in ("strict", "list"):
            state["more"] = np.zeros(1)
        given = list(state.items()) if fault == "list" else state
        self.call(lambda: self.layer.load_state_dict(given, strict="yes" if fault == "strict" else True), True)

    @rule(how=st.sampled_from([copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]))
    def copied(self, how: Callable[[Any], Any]) -> None:
        clone = self.call(lambda: how(self.layer))
        assert bits(dict(clone.state_dict())) == bits(dict(self.layer.state_dict()))
        self.layer, self.model.remembered = clone, None

    @rule(dtype=st.sampled_from(["float32", "float64", np.float64, "float16", "bfloat16", "int8", 3, None]))
    def to(self, dtype: Any) -> None:
        wrong = dtype in ("float16", "bfloat16", "int8", 3)
        self.call(lambda: self.layer.to(dtype=dtype), wrong)
        if not wrong:
            self.model.remembered = None
            self.ulp = max(self.ulp, np.finfo(dtype or "f8").eps)

    # ---- Attributes ----

    @rule(name=st.sampled_from(["momentum", "eps", "track_running_stats"]), seed=seeds)
    def set(self, name: str, seed: int) -> None:
        values = {
            "momentum": [0.1, None, 0, 0.5, 1],
            "eps": [1e-5, 0.5, np.float32(0.25)],
            "track_running_stats": [True, False],
        }
        value = values[name][seed % len(values[name])]
        self.call(lambda: setattr(self.layer, name, value))
        setattr(self.model, "track" if name.startswith("track") else name, value)

    @rule(kind=st.sampled_from(["none", "new", "no count", "count"]), seed=seeds)
    def set_buffers(self, kind: str, seed: int) -> None:
        model, layer = self.model, self.layer
        if kind in ("none", "new"):
            mean, var = numbers(seed, self.channels), numbers(seed, self.channels, low=0.125)
            mean, var = (None, None) if kind == "none" else (mean, var)
            self.call(lambda: setattr(layer, "running_mean", mean))
            self.call(lambda: setattr(layer, "running_var", var))
            model.mean, model.var = mean, var
        else:
            model.count = None if kind == "no count" else seed % 7
            self.call(lambda: setattr(layer, "num_batches_tracked", model.count))

    @rule(
        name=st.sampled_from(["running_mean", "running_var", "num_batches_tracked", "weight", "bias"]),
        value=st.sampled_from(["x", 1.5, [0.0], True, 2**63]),
    )
    def assign_wrongly(self, name: str, value: Any) -> None:
        self.call(lambda: setattr(self.layer, name, value), True)

    @precondition(lambda self: hasattr(self, "layer"))
    @rule(
        name=st.sampled_from(
            [
                "eps",
                "momentum",
                "training",
                "track_running_stats",
                "channel_axis",
                "num_features",
                "num_batches_tracked",
                "running_mean",
                "running_var",
            ]
        ),
        seed=seeds,
    )
    def forward_with_a_wrong_attribute(self, name: str, seed: int) -> None:
        model, layer, c = self.model, self.layer, self.channels
        values = {
            "eps": [-1, np.nan, "a", None, True],
            "momentum": ["a", np.nan, np.inf, True, np.asarray(0.1)],
            "channel_axis": ["1", None, 1.5, 9, -9],
            "num_features": ["3", None, c + 1, -c],
            "num_batches_tracked": [-1, -5],
            "running_mean": [np.zeros(c + 1), np.zeros(c, int), np.zeros((c, 1))],
            "running_var": [np.ones(c + 1), np.ones(c, bool), np.ones((1, c))],
        }.get(name, ["no", None, 1])
        updating, fixed = model.training and model.track, not model.training
        needed = {
            "momentum": updating and model.mean is not None,
            "num_batches_tracked": updating,
            "running_mean": model.mean is None or updating or fixed,
            "running_var": model.mean is None or updating or fixed,
        }
        x = numbers(seed, *self.shape(self.dims[0], c, (3, 2, 2, 1, 2)))
        good = getattr(layer, name)
        setattr(layer, name, values[seed % len(values)])
        if needed.get(name, True):
            self.call(lambda: layer(x), True)
        setattr(layer, name, good)

    # ---- What always holds ----

    @invariant()
    def the_state_is_the_models(self) -> None:
        if not hasattr(self, "layer"):
            return
        layer, model = self.layer, self.model
        assert layer.training is model.training
        assert (layer._remembered is None) == (model.remembered is None), "the remembered forward is not the model's"
        assert (type(layer.num_batches_tracked), layer.num_batches_tracked) == (type(model.count), model.count), (
            "counter"
        )
        tolerance = (2 * model.updates + 2) * self.ulp
        for mine, theirs, terms in ((layer.running_mean, model.mean, LARGEST), (layer.running_var, model.var, 0)):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert (abs(mine - theirs) <= tolerance * np.maximum(terms, theirs)).all(), "running statistics"
        if model.affine:
            assert (layer.weight.data == model.weight).all()
            assert (layer.bias.grad is None) == (model.dbias is None)
            assert model.dbias is None or (layer.bias.grad == model.dbias).all()


def options(examples: int, steps: int, **others: Any) -> Any:
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        **others,
    )


def test_any_calls_in_any_order_do_what_the_model_does() -> None:
    Machine.calls = Machine.errors = 0
    run_state_machine_as_test(Machine, settings=options(settings.default.max_examples, 60 if LONG else 30))
    print(f"{Machine.calls} calls, {Machine.errors} of them wrong")
    assert Machine.calls >= (100_000 if LONG else 500)
    assert Machine.errors >= Machine.calls / 10


# ---- Controls: layers with one fault each ----------------------------------------------------------------------------


class CountsFirst(arraybn.BatchNorm1d):
    """A faulty layer that counts a batch before the batch is checked."""

    def forward(self, x: Any) -> Any:
        before = self.num_batches_tracked
        try:
            return super().forward(x)
        except ValueError:
            if before is not None:
                self.num_batches_tracked = before + 1
            raise


class Biased(arraybn.BatchNorm1d):
    """A faulty layer that adds the biased variance to the running variance."""

    def _tracked(self, saved: Any, *rest: Any) -> Any:
        commit = super()._tracked(saved, *rest)
        if "running_var" in commit:
            commit["running_var"] = commit["running_var"] * np.float32(0.999)
        return commit


class ForgetsFirst(arraybn.BatchNorm1d):
    """A faulty layer that loses the forward when a backward is refused."""

    def backward(self, dy: Any) -> Any:
        try:
            return super().backward(dy)
        finally:
            self._forget()


class LoadsByHalves(arraybn.BatchNorm1d):
    """A faulty layer that keeps the values loaded before the error."""

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:
        if (
            isinstance(state_dict, dict)
            and self.weight is not None
            and np.shape(state_dict.get("weight")) == (self.num_features,)
        ):
            self.weight.data = np.asarray(state_dict["weight"]).real.astype(self.weight.data.dtype)
        return super().load_state_dict(state_dict, strict)


class CountsEmptyBatches(arraybn.BatchNorm1d):
    """A faulty layer that counts empty batches, as PyTorch does."""

    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        if y.size == 0 and self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
        return y


class TakesAnyWidth(arraybn.BatchNorm1d):
    """A faulty layer that does not check the channels of an empty batch, as PyTorch does."""

    def forward(self, x: Any) -> Any:
        return x if isinstance(x, np.ndarray) and x.size == 0 else super().forward(x)


class Rounds(arraybn.BatchNorm1d):
    """A faulty layer whose y is wrong by 0.1 %."""

    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        return (y * 1.001).astype(y.dtype)


class Crashes(arraybn.BatchNorm1d):
    """A faulty layer that reads x before x is known to be an array."""

    def forward(self, x: Any) -> Any:
        return super().forward(x) if x.ndim else x


FAULTS = {
    CountsFirst: (AssertionError, "changed by a call that raised"),
    Biased: (AssertionError, "running statistics"),
    ForgetsFirst: (AssertionError, "changed by a call that raised"),
    LoadsByHalves: (AssertionError, "changed by a call that raised"),
    CountsEmptyBatches: (AssertionError, "counter"),
    TakesAnyWidth: (AssertionError, "accepted|remembered|refused: (dy|TakesAnyWidth)"),
    Rounds: (AssertionError, "y is not the model's"),
    Crashes: (AttributeError, "'(list|NoneType)' object has no attribute 'ndim'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_catches_a_planted_fault(fault: type[arraybn.BatchNorm1d]) -> None:
    machine: Any = type("Machine", (Machine,), {"classes": {fault: (2, 3)}})
    error, text = FAULTS[fault]
    seeded = options(3000, 40, phases=[Phase.generate], database=None, derandomize=True, report_multiple_bugs=False)
    with pytest.raises(error, match=text):
        run_state_machine_as_test(machine, settings=seeded)

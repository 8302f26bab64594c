"""Faults on one rank, and the error that every rank has to raise. Used by threads and by MPI scripts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

import arraybn

RNG = np.random.default_rng(5)
X = (RNG.standard_normal((7, 3, 4)) + 2).astype("f4")
DY = RNG.standard_normal(X.shape).astype("f4")
BAD = 1  # the rank that is wrong


def part(array: Any, comm: Any) -> Any:
    """Return an uneven part of a batch for each rank."""
    cuts = np.linspace(0, 1, comm.size + 1) ** 2 * len(array)
    return array[round(cuts[comm.rank]) : round(cuts[comm.rank + 1])]


def state(model: Any) -> dict[str, bytes]:
    """Return everything that a call could have changed, to the bit."""
    values = {name: np.asarray(value).tobytes() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        values[f"{name}.grad"] = b"" if parameter.grad is None else parameter.grad.tobytes()
    values["remembered"] = repr([id(module._remembered) for module in model.modules()]).encode()
    return values


def layer_on(comm: Any, num_features: int = 3, **options: Any) -> Any:
    return arraybn.SyncBatchNorm(num_features, process_group=comm, timeout=30, **options)


def good(layer: Any, comm: Any) -> None:
    layer(part(X, comm))
    layer.backward(part(DY, comm))


def with_attribute(name: str, value: Any) -> Callable[[Any, Any], None]:
    """Return a forward that sets a wrong attribute for the time of the call."""

    def run(layer: Any, x: Any) -> None:
        old = getattr(layer, name)
        setattr(layer, name, value)
        try:
            layer(x)
        finally:
            setattr(layer, name, old)

    return run


def without_forward(layer: Any, dy: Any) -> None:
    saved = layer._remembered
    layer._forget()
    try:
        layer.backward(dy)
    finally:
        layer._remember(saved)


def with_other_weight(layer: Any, dy: Any) -> None:
    """Call a backward while the weight has another shape than its gradient."""
    old, layer.weight.data = layer.weight.data, np.ones(4, "f4")
    grad, layer.weight.grad = layer.weight.grad, None
    try:
        layer.backward(dy)
    finally:
        layer.weight.data, layer.weight.grad = old, grad


FORWARD = {  # name: what the rank does instead of layer(x), and its message
    "dimensions": (lambda layer, x: layer(x[0, 0]), r"expected at least 2D input \(got 1D input\)"),
    "channels": (lambda layer, x: layer(x[:, :2]), r"x: expected 3 channels \(num_features\) on axis 1; got 2, .*"),
    "integers": (lambda layer, x: layer(x.astype("i4")), r"x: expected float16, .*; got int32.*"),
    "complex": (lambda layer, x: layer(x.astype("c8")), r"x: expected float16, .*; got complex64.*"),
    "a list": (lambda layer, x: layer([[1.0]]), r"x: expected an array .*; got list.*"),
    "nothing": (lambda layer, x: layer(None), r"x: expected an array .*; got NoneType.*"),
    "momentum": (with_attribute("momentum", "fast"), r"momentum: expected a number; got 'fast'"),
    "eps": (with_attribute("eps", -1.0), r"eps: expected a number ≥ 0; got -1.0"),
    "huge momentum": (with_attribute("momentum", 10**400), r"momentum: expected a finite number; got one .*"),
    "huge eps": (with_attribute("eps", 10**400), r"eps: expected a finite number; got one .*"),
    "running_var": (with_attribute("running_var", np.ones(2, "f4")), r"running_var: expected shape \(3,\), .*"),
    "one buffer": (with_attribute("running_var", None), r"running_mean and running_var: expected either both .*"),
    "counter": (with_attribute("num_batches_tracked", -1), r"num_batches_tracked: expected an integer ≥ 0; got -1"),
    "training": (with_attribute("training", "yes"), r"training: expected True or False; got 'yes'"),
    "no training": (with_attribute("training", None), r"training: expected True or False; got None"),
    "array as training": (with_attribute("training", np.zeros(2)), r"training: expected True or False; got .*"),
    "num_features": (with_attribute("num_features", 10**30), r"x: expected 10+ channels .*"),
}
BACKWARD = {  # the same instead of layer.backward(dy)
    "shape of dy": (lambda layer, dy: layer.backward(dy[..., :2]), r"dy: expected shape \(.*, 3, 4\), .*; got .*"),
    "integers in dy": (lambda layer, dy: layer.backward(dy.astype("i8")), r"dy: expected float16, .*; got int64.*"),
    "dy as a list": (lambda layer, dy: layer.backward(dy.tolist()), r"dy: expected an array .*; got list.*"),
    "another weight": (with_other_weight, r"gradient: expected shape \(4,\), that of data; got \(3,\)"),
    "no forward": (without_forward, r"SyncBatchNorm.backward: expected a forward before it, .*; got none.*"),
}


def run_fault(comm: Any, name: str) -> tuple[str, dict[str, bytes]]:
    """Run a good step, the fault on one rank, a good step; return the message, and the state at the end."""
    forward = name in FORWARD
    wrong, pattern = (FORWARD if forward else BACKWARD)[name]
    layer = layer_on(comm)
    good(layer, comm)
    if not forward:
        layer(part(X, comm))
    before, text = state(layer), ""
    try:
        given = part(X if forward else DY, comm)
        if comm.rank == BAD:
            wrong(layer, given)
        else:
            layer(given) if forward else layer.backward(given)
    except arraybn.SyncError as error:
        text, cause = str(error), error.__cause__
    assert re.fullmatch(f"rank {BAD}: {pattern}", text), f"{name}: {text!r}"
    assert isinstance(cause, ValueError | TypeError | RuntimeError) == (comm.rank == BAD), f"{name}: {cause!r}"
    assert state(layer) == before, f"{name} changed the state"
    if forward:
        good(layer, comm)
    else:
        layer.backward(part(DY, comm))
    return text, {key: value for key, value in state(layer).items() if key != "remembered"}


def run_without(comm: Any) -> dict[str, bytes]:
    """Return the state after the two good steps of `run_fault`."""
    layer = layer_on(comm)
    good(layer, comm)
    good(layer, comm)
    return {key: value for key, value in state(layer).items() if key != "remembered"}


def _named(layer: Any, path: str) -> Any:
    layer._path = path
    return layer


def _counted(layer: Any, batches: int | None) -> Any:
    layer.num_batches_tracked = batches
    return layer


def _eval(layer: Any) -> Any:
    layer.track_running_stats = True
    return layer.eval()


BARE = {"affine": False, "track_running_stats": False}
DISAGREE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = {
    # name: the layer of the good ranks, the layer of the wrong rank, the message to every rank
    "num_features": (layer_on, lambda comm: layer_on(comm, 4), "num_features: 3 on rank"),
    "eps": (layer_on, lambda comm: layer_on(comm, eps=1e-3), "eps: 1e-05 on rank"),
    "momentum": (layer_on, lambda comm: layer_on(comm, momentum=None), "momentum: 0.1 on rank"),
    "dtype": (layer_on, lambda comm: layer_on(comm, dtype="float64"), "dtype: float32 on rank"),
    "affine": (layer_on, lambda comm: layer_on(comm, affine=False), "affine: True on rank"),
    "tracking": (
        layer_on,
        lambda comm: layer_on(comm, track_running_stats=False),
        "track_running_stats: True on rank",
    ),
    "counter": (layer_on, lambda comm: _counted(layer_on(comm), 7), "num_batches_tracked: 0 on rank"),
    "no counter": (layer_on, lambda comm: _counted(layer_on(comm), None), "num_batches_tracked: 0 on rank"),
    "evaluation": (
        lambda comm: layer_on(comm, **BARE),
        lambda comm: layer_on(comm, **BARE).eval(),
        "training: True on rank",
    ),
    "layer": (
        lambda comm: _named(layer_on(comm), "a"),
        lambda comm: _named(layer_on(comm), "b"),
        "layer: layer 'a' on rank",
    ),
}


def run_disagreement(comm: Any, name: str) -> str:
    """Run a call in which one rank differs from the rest, then a good step over the same communicator."""
    make, make_other, told = DISAGREE[name]
    layer, text = (make_other if comm.rank == BAD else make)(comm), ""
    before = state(layer)
    x = np.ones((2, layer.num_features)) + np.arange(2)[:, None]
    try:
        layer(x)
    except arraybn.SyncError as error:
        text = str(error)
    assert text.startswith(f"the ranks are not in the same call; they disagree on {told}"), f"{name}: {text!r}"
    assert len(text.splitlines()) == 2, text
    assert f"on rank {BAD}" in text, text
    assert state(layer) == before
    good(layer_on(comm), comm)
    return text


def run_sequences(comm: Any) -> list[str]:
    """Run ranks out of step: every rank is told, and the next correct step works."""
    texts = []

    def told(action: Callable[[], Any]) -> None:
        try:
            action()
        except arraybn.SyncError as error:
            texts.append(str(error))
        else:
            raise AssertionError("nothing was noticed")

    a, b = _named(layer_on(comm), "a"), _named(layer_on(comm), "b")
    x, dy, wrong = part(X, comm), part(DY, comm), comm.rank == BAD

    a(x)  # one skips a backward: its next forward meets their backward
    told(lambda: a(x) if wrong else a.backward(dy))
    good(a, comm)

    told(lambda: (b if wrong else a)(x))  # A, B on one rank and B, A on all other ranks
    told(lambda: (a if wrong else b)(x))
    good(a, comm)
    good(b, comm)

    a(x)  # one goes back by a forward of an earlier batch
    saved = a._remembered
    a(x)
    if wrong:
        a._remember(saved)
    told(lambda: a.backward(dy))
    a(x)
    a.backward(dy)

    _, saved = arraybn.batch_norm(x, comm=comm)  # one rank calls the function, all other ranks the layer
    arraybn.batch_norm_backward(dy, saved)
    told(lambda: arraybn.batch_norm(x, comm=comm) if wrong else a(x))

    told(lambda: arraybn.broadcast_state(a, comm) if wrong else arraybn.average_gradients(a, comm, weight=1))
    good(a, comm)
    rebuilt = layer_on(comm)  # one rank builds a layer anew
    good(rebuilt, comm)
    if wrong:
        rebuilt = layer_on(comm)
    told(lambda: rebuilt(x))  # and from now on their unnamed layers have other numbers
    return texts

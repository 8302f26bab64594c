"""Who takes part in ``python -m arraybn check``: batch norms of several libraries, called as their users call them.

Each library works in a process of its own, so that none disturbs another, and one that crashes costs its rows alone:
``python -m arraybn.commands._check_contestants FOLDER LIBRARY`` reads the batches and writes the results there.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import to_device

from .. import functional, kernels
from .._arrays.copies import as_numpy
from ..testing.scenarios import Batch

Array = np.ndarray[Any, Any]
Results = dict[str, Any]  # some of mean and var (C,), y and dx (N, C, S)
Call = Callable[[Batch], Results]

TIME_LIMIT = 120.0  # seconds, for one library


@dataclass(frozen=True)
class Contestant:
    """A batch norm: of which library, what it needs, and the function that imports it and returns how to call it."""

    family: str
    name: str
    needs: tuple[str, ...]
    pip: str
    build: Callable[[], Call]
    promise: str | None = None  # of arraybn: "N1–N3" or "float32 only"

    @property
    def library(self) -> str:
        """Whose process it works in."""
        return self.needs[0]

    @property
    def missing(self) -> bool:
        """Whether a package that it needs is not installed; none is imported."""
        return any(importlib.util.find_spec(name) is None for name in self.needs)


def contestants() -> list[Contestant]:
    """All of them, installed or not."""
    return [*_ours(), *_others()]


# ---- arraybn ----

_CPU, _SINGLE = "N1–N3", "float32 only"
_NAMESPACES = (  # label, module, extra (x64 of JAX, device of array-api-strict), pip, promise
    ("NumPy", "numpy", None, "numpy", _CPU),
    ("CuPy", "cupy", None, '"arraybn[cuda12]"', _CPU),
    ("PyTorch", "torch", None, "torch", _CPU),
    ("JAX", "jax.numpy", True, "jax", _CPU),
    ("JAX without float64", "jax.numpy", False, "jax", _SINGLE),
    ("array-api-strict", "array_api_strict", None, "array-api-strict", _CPU),
    ("array-api-strict without float64", "array_api_strict", "no_float64", "array-api-strict", _SINGLE),
)
_KERNELS = {  # its arrays, and what it needs; others take NumPy's
    "cpu": ("NumPy", "numba"),
    "cuda": ("CuPy", "cupy"),
    "cuda_fused": ("CuPy", "cupy"),
}


def _ours() -> list[Contestant]:
    """Every kernel module with every namespace that it takes."""
    found = []
    for kernel, path in kernels.MODULES.items():
        if importlib.util.find_spec(path) is None:
            continue
        takes, needs = _KERNELS.get(kernel, ("NumPy", "numpy"))
        for label, module, extra, pip, promise in _NAMESPACES:
            if kernel in ("reference", *_KERNELS) and (kernel == "reference" or label == takes):
                top = module.partition(".")[0]
                required = (top,) if kernel == "reference" else (top, needs)
                pip = '"arraybn[cpu]"' if kernel == "cpu" else pip  # noqa: PLW2901
                build = _arraybn(kernel, module, extra)
                name = label if kernel == "reference" else f"{label}, {kernel} kernels"
                found.append(Contestant("arraybn", name, required, pip, build, promise))
    return found


def _arraybn(kernel: str, module: str, extra: Any) -> Callable[[], Call]:
    def build() -> Call:
        xp = importlib.import_module(module)
        x64 = importlib.import_module("jax").enable_x64 if module == "jax.numpy" else None
        where = {} if module != "array_api_strict" or extra is None else {"device": xp.Device(extra)}
        xp.asarray(np.zeros(1, "f4"), **where)  # where there is no device, as without a GPU, nothing can be checked

        def host(array: Any) -> Array:
            result: Array = as_numpy("result", to_device(array, xp.Device("CPU_DEVICE")) if where else array)
            return result

        def call(batch: Batch) -> Results:
            with contextlib.nullcontext() if x64 is None else x64(extra):
                x, dy, weight, bias = (xp.asarray(array, **where) for array in batch[:4])
                y, saved = functional.batch_norm(x, weight, bias, eps=batch.eps, kernels=kernel)
                dx, _, _ = functional.batch_norm_backward(dy, saved)
                moments = saved.moments
                assert moments is not None
                mean, var = host(moments.mean).astype("f8"), host(moments.m2).astype("f8") / moments.n
                mean = mean if moments.mean_low is None else mean + host(moments.mean_low)
                return {"mean": mean.astype("f4"), "var": var.astype("f4"), "y": host(y), "dx": host(dx)}

        return call

    return build


# ---- The others ----


def _others() -> list[Contestant]:
    return [
        Contestant("NumPy", "x.mean(), x.var()", ("numpy",), "numpy", lambda: _numpy(np.var)),
        Contestant("NumPy", "E[x²] − E[x]²", ("numpy",), "numpy", lambda: _numpy(_one_pass_variance)),
        Contestant("PyTorch", "batch_norm, channels-first", ("torch",), "torch", lambda: _torch("contiguous_format")),
        Contestant("PyTorch", "batch_norm, channels-last", ("torch",), "torch", lambda: _torch("channels_last")),
        Contestant("JAX", "flax BatchNorm", ("jax", "flax"), "flax", lambda: _flax(True)),
        Contestant("JAX", "flax, use_fast_variance=False", ("jax", "flax"), "flax", lambda: _flax(False)),
        Contestant("JAX", "jax.nn.standardize", ("jax",), "jax", _standardize),
        Contestant("TensorFlow", "fused_batch_norm", ("tensorflow",), "tensorflow", _tensorflow_fused),
        Contestant("TensorFlow", "moments, batch_normalization", ("tensorflow",), "tensorflow", _tensorflow_moments),
        Contestant("ONNX Runtime", "BatchNormalization", ("onnxruntime", "onnx"), "onnxruntime onnx", _onnxruntime),
    ]


def _one_pass_variance(x: Array, **over: Any) -> Array:
    result: Array = (x * x).mean(**over) - x.mean(**over) ** 2
    return result


def _numpy(variance: Callable[..., Array]) -> Call:
    """The formulas in the dtype of x, as they stand in many a notebook."""

    def call(batch: Batch) -> Results:
        x, dy, weight, bias, eps = batch
        over: Any = {"axis": (0, 2), "keepdims": True}
        mean, var = x.mean(**over), variance(x, **over)
        rstd = 1 / np.sqrt(var + np.float32(eps))
        xhat = (x - mean) * rstd
        dx = weight[:, None] * rstd * (dy - dy.mean(**over) - xhat * (dy * xhat).mean(**over))
        return {"mean": mean.ravel(), "var": var.ravel(), "y": weight[:, None] * xhat + bias[:, None], "dx": dx}

    return call


def _image(array: Array) -> Array:
    """(N, C, S) as (N, C, H, W)."""
    height = math.isqrt(array.shape[2])
    return array.reshape(*array.shape[:2], height, -1)


def _channels_last(array: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(_image(array), 1, -1))


def _channels_first(array: Any) -> Array:
    return np.moveaxis(np.asarray(array), -1, 1)


def _torch(memory_format: str) -> Call:
    torch = importlib.import_module("torch")

    def call(batch: Batch) -> Results:
        x, dy = (
            torch.tensor(_image(array)).contiguous(memory_format=getattr(torch, memory_format))
            for array in (batch.x, batch.dy)
        )
        mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])  # momentum 1 puts the batch's in
        affine = torch.tensor(batch.weight), torch.tensor(batch.bias)
        x.requires_grad_()
        y = torch.nn.functional.batch_norm(x, mean, var, *affine, training=True, momentum=1.0, eps=batch.eps)
        (dx,) = torch.autograd.grad(y, x, dy)
        n = x.numel() // x.shape[1]
        return {"mean": mean.numpy(), "var": var.numpy() * (1 - 1 / n), "y": y.detach().numpy(), "dx": dx.numpy()}

    return call


def _flax(use_fast_variance: bool) -> Call:
    linen = importlib.import_module("flax.linen")

    def forward(x: Any, weight: Any, bias: Any, eps: float) -> tuple[Any, Any]:
        layer = linen.BatchNorm(False, momentum=0.0, epsilon=eps, use_fast_variance=use_fast_variance)
        stats = {"mean": bias * 0, "var": bias * 0}  # momentum 0 leaves nothing of them
        variables = {"params": {"scale": weight, "bias": bias}, "batch_stats": stats}
        y, new = layer.apply(variables, x, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return _jax(forward)


def _standardize() -> Call:
    jax = importlib.import_module("jax")

    def forward(x: Any, weight: Any, bias: Any, eps: float) -> tuple[Any, Any]:
        return weight * jax.nn.standardize(x, axis=(0, 1, 2), epsilon=eps) + bias, {}

    return _jax(forward)


def _jax(forward: Callable[..., tuple[Any, Any]]) -> Call:
    """Forward and backward compiled as one, as in a training step."""
    jax = importlib.import_module("jax")

    def step(x: Any, dy: Any, weight: Any, bias: Any, eps: float) -> Any:
        y, pull, stats = jax.vjp(lambda x: forward(x, weight, bias, eps), x, has_aux=True)
        return y, pull(dy)[0], stats

    compiled = jax.jit(step, static_argnums=4)

    def call(batch: Batch) -> Results:
        images = _channels_last(batch.x), _channels_last(batch.dy)
        y, dx, stats = compiled(*images, batch.weight, batch.bias, batch.eps)
        return {"y": _channels_first(y), "dx": _channels_first(dx), **{k: np.asarray(v) for k, v in stats.items()}}

    return call


def _tensorflow_fused() -> Call:
    tf = importlib.import_module("tensorflow")

    def call(batch: Batch) -> Results:
        x, n = tf.constant(_channels_last(batch.x)), batch.x.size // batch.x.shape[1]
        with tf.GradientTape() as tape:
            tape.watch(x)
            fused = tf.compat.v1.nn.fused_batch_norm(x, batch.weight, batch.bias, epsilon=batch.eps)
        dx = tape.gradient(fused[0], x, output_gradients=tf.constant(_channels_last(batch.dy)))
        y, mean, var = (np.asarray(result) for result in fused)  # var unbiased
        return {"mean": mean, "var": var * (1 - 1 / n), "y": _channels_first(y), "dx": _channels_first(dx)}

    return call


def _tensorflow_moments() -> Call:
    tf = importlib.import_module("tensorflow")

    def call(batch: Batch) -> Results:
        x = tf.constant(_channels_last(batch.x))
        with tf.GradientTape() as tape:
            tape.watch(x)
            mean, var = tf.nn.moments(x, axes=[0, 1, 2])
            y = tf.nn.batch_normalization(x, mean, var, batch.bias, batch.weight, batch.eps)
        dx = tape.gradient(y, x, output_gradients=tf.constant(_channels_last(batch.dy)))
        return {"mean": mean.numpy(), "var": var.numpy(), "y": _channels_first(y), "dx": _channels_first(dx)}

    return call


def _onnxruntime() -> Call:
    onnxruntime, helper = (importlib.import_module(name) for name in ("onnxruntime", "onnx.helper"))
    single = importlib.import_module("onnx").TensorProto.FLOAT

    inputs, outputs = ("x", "scale", "bias", "old_mean", "old_var"), ("y", "mean", "var")

    def call(batch: Batch) -> Results:
        options: Any = {"epsilon": batch.eps, "momentum": 0.0, "training_mode": 1}
        node = helper.make_node("BatchNormalization", inputs, outputs, **options)
        declared = [
            [helper.make_tensor_value_info(name, single, None) for name in names] for names in (inputs, outputs)
        ]
        graph = helper.make_graph([node], "batch_norm", *declared)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        old = np.zeros_like(batch.weight), np.ones_like(batch.weight)  # momentum 0 leaves nothing of them
        feed = dict(zip(inputs, (_image(batch.x), batch.weight, batch.bias, *old), strict=True))
        return dict(zip(outputs, session.run(outputs, feed), strict=True))

    return call


# ---- Asking them, each library in a process ----


@dataclass
class Answer:
    """What a contestant gave for each batch; or why not."""

    results: list[Results] = field(default_factory=list)
    unusable: str = ""  # it cannot be started here
    failed: str = ""  # it raised, crashed or took too long


def ask(chosen: Sequence[Contestant], batches: Sequence[Batch], progress: Callable[[], object]) -> list[Answer]:
    """What each of the chosen makes of the batches; all libraries work at the same time.

    `progress` is called for each batch that a contestant is done with, from several threads.
    """
    libraries = list(dict.fromkeys(one.library for one in chosen))
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(libraries)) as pool:
        folder = Path(name)
        arrays = {f"{i} {key}": getattr(batch, key) for i, batch in enumerate(batches) for key in Batch._fields}
        np.savez(folder / "batches.npz", **arrays)
        work = [pool.submit(_ask_library, library, chosen, len(batches), folder, progress) for library in libraries]
        found = {key: answer for future in work for key, answer in future.result().items()}
    return [found[one.name] for one in chosen]


def _ask_library(
    library: str, chosen: Sequence[Contestant], count: int, folder: Path, progress: Callable[[], object]
) -> dict[str, Answer]:
    """The answers from one process, by name."""
    answers = {one.name: Answer() for one in chosen if one.library == library}
    home = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", __name__, str(folder), library]
    with (
        tempfile.TemporaryFile() as err,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err, env=env) as process,
    ):
        timer = threading.Timer(TIME_LIMIT, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            name, key, text = json.loads(line)
            if key == "done":
                progress()
            else:
                setattr(answers[name], key, text)
        status = process.wait()
        late = not timer.is_alive()
        timer.cancel()
        err.seek(0)
        last = (err.read().decode(errors="replace").strip().splitlines() or [f"exit status {status}"])[-1]
    results = folder / f"{library}.npz"
    if status == 0:
        _read(results, answers, count)
        return answers
    ended = f"no answer within {TIME_LIMIT:g} s" if late else last if status > 0 else f"ended by signal {-status}"
    return {key: Answer(unusable=answer.unusable, failed=answer.failed or ended) for key, answer in answers.items()}


def _read(path: Path, answers: dict[str, Answer], count: int) -> None:
    with np.load(path) as found:
        for name, answer in answers.items():
            if not (answer.failed or answer.unusable):
                names = [key for key in ("mean", "var", "y", "dx") if f"{name} 0 {key}" in found]
                answer.results += [{key: found[f"{name} {i} {key}"] for key in names} for i in range(count)]


def _answer(folder: Path, library: str) -> None:
    """In the process of the library: what its contestants make of the batches."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")  # for what we have to say alone
    os.dup2(2, 1)
    with np.load(folder / "batches.npz") as file:
        count = len(file.files) // len(Batch._fields)
        batches = [Batch(*(file[f"{i} {key}"] for key in Batch._fields)) for i in range(count)]
    found: Results = {}
    for one in contestants():
        if one.library == library and not one.missing:
            key, text = _results(one, batches, found, lambda name: print(json.dumps([name, "done", ""]), file=channel))
            print(json.dumps([one.name, key, text]), file=channel, flush=True)
    np.savez(folder / f"{library}.npz", **found)


def _results(
    one: Contestant, batches: Sequence[Batch], found: Results, done: Callable[[str], object]
) -> tuple[str, str]:
    """Put what it makes of each batch into `found`; what went wrong, and ("failed", "") if nothing did."""
    key = "unusable"
    try:
        call = one.build()
        key = "failed"
        for index, batch in enumerate(batches):
            batch = batch._replace(eps=float(batch.eps))  # noqa: PLW2901, a 0-d array from the file
            shapes = {"mean": batch.weight.shape, "var": batch.weight.shape, "y": batch.x.shape, "dx": batch.x.shape}
            with np.errstate(all="ignore"):
                results = call(batch)
            found |= {f"{one.name} {index} {name}": value.reshape(shapes[name]) for name, value in results.items()}
            done(one.name)
    except Exception as error:
        return key, f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return "failed", ""


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _answer(Path(sys.argv[1]), sys.argv[2])

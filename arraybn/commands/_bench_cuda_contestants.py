"""Who takes part in ``bench --device cuda``: batch norms of three libraries, all on the same buffers and one stream.

Each `…_calls(device, buffers)` makes beforehand what the calls need. A call takes the number of a set of buffers, and
returns y, or dx, dweight and dbias.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..functional import batch_norm, batch_norm_backward
from ..kernels import MODULES
from ..layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ._bench_cases import EPS
from ._bench_cuda_cases import TWO_READS, GpuCase
from ._bench_cuda_check import narrowed
from ._bench_cuda_device import Array, Device

BLOCK = 2**22 - 3  # random values on the host; all else repeats them, never beginning at the same place of a channel
SETS = 4  # of buffers, at least


class Slot(NamedTuple):
    """A set of buffers, as they lie in memory."""

    x: Array
    dy: Array
    out: Array


class Buffers(NamedTuple):
    """What all contestants work on."""

    case: GpuCase
    slots: list[Slot]
    vectors: dict[str, Array]  # weight, bias, mean, var
    eps: float = EPS


def sets(case: GpuCase, device: Device) -> int:
    """How many sets of buffers the calls take turns with."""
    together = max(device.together, 4.0 * device.describe()["l2"])
    return max(SETS, -int(-together // case.nbytes))


def memory_needed(case: GpuCase, count: int) -> float:
    """About how many bytes they take, with the results of a library beside ours and the truth in float64."""
    return count * 6.0 * case.nbytes + 20 * 8.0 * case.elements


def make_buffers(device: Device, case: GpuCase, count: int, seed: int) -> Buffers:
    """Fresh random data; each channel has a mean of its own."""
    rng = np.random.default_rng(seed)
    block = device.array(rng.standard_normal(min(BLOCK, 4 * case.elements + 1)).astype(np.float32))
    uniform = {"weight": (0.5, 2), "bias": (-2, 2), "mean": (-2, 2), "var": (0.5, 2), "shift": (-2, 2)}
    vectors = {
        name: device.array(rng.uniform(*ends, case.shape[1]).astype(case.vectors)) for name, ends in uniform.items()
    }
    shift = vectors.pop("shift").reshape(-1, *[1] * (0 if case.channel_axis == -1 else len(case.shape) - 2))
    slots = []
    for _ in range(count):
        x, dy = (_repeated(device, block, case, int(rng.integers(len(block)))) for _ in range(2))
        x += shift.astype("f4")
        x, dy = (narrowed(device.xp, array, case.dtype) for array in (x, dy))
        slots.append(Slot(x, dy, device.xp.empty_like(x)))
    device.synchronize()
    return Buffers(case, slots, vectors)


def _repeated(device: Device, block: Array, case: GpuCase, first: int) -> Array:
    """The values of the block, from `first` on, again and again."""
    array = device.empty((case.elements,), np.float32)
    done = 0
    while done < case.elements:
        part = block[first : first + case.elements - done]
        array[done : done + len(part)] = part
        done, first = done + len(part), 0
    return array.reshape(case.in_memory)


# ---- Contestants -----------------------------------------------------------------------------------------------------


@dataclass
class Calls:
    """What may be timed; what was chosen inside, by what is done; and how to prepare and to read a result."""

    calls: Mapping[str, Callable[[int], Any]]
    poison: Callable[[], object]  # puts NaN where results are going to be
    read: Callable[[Any], Array]  # an array of the device, as x lies in memory; or (C,)
    backend: dict[str, str] = field(default_factory=dict)
    wait: Callable[[Any], object] | None = None  # for a library with a stream of its own: until this result is there


@dataclass(frozen=True)
class Contestant:
    """A row of the table."""

    name: str
    title: str
    library: str  # as --peers has it
    build: Callable[[Device, Buffers], Calls]
    package: str = "arraybn"

    @property
    def ours(self) -> bool:
        """Whether it is held to the promises of arraybn."""
        return self.library in ("arraybn", "reference")

    def absent(self, device: Device) -> str:
        """Why it cannot take part here; '' if it can."""
        kernels = device.kernels.get(self.name)
        if isinstance(kernels, str) and (kernels not in MODULES or importlib.util.find_spec(MODULES[kernels]) is None):
            return f"this arraybn has no kernels {kernels!r}"
        if device.platform != "gpu" or self.library == "reference":
            return ""
        if self.library == "torch" and not importlib.import_module("torch").cuda.is_available():
            return "this PyTorch finds no GPU"
        if self.library == "jax" and importlib.import_module("jax").default_backend() != device.platform:
            return "this JAX finds no GPU"
        return ""


def arraybn_calls(device: Device, buffers: Buffers, *, name: str) -> Calls:
    """The functions, into arrays that are there."""
    case, slots, vectors, eps = buffers
    weight, bias, mean, var = vectors.values()
    options: Any = {"eps": eps, "channel_axis": case.channel_axis, "kernels": device.kernels[name]}
    saved = [batch_norm(slot.x, weight, bias, out=slot.out, **options)[1] for slot in slots]

    def forward(i: int) -> Any:
        return batch_norm(slots[i].x, weight, bias, out=slots[i].out, **options)[0]

    def backward(i: int) -> Any:
        return batch_norm_backward(slots[i].dy, saved[i], out=slots[i].out)

    def evaluate(i: int) -> Any:
        return batch_norm(slots[i].x, weight, bias, mean=mean, var=var, out=slots[i].out, **options)[0]

    def poison() -> None:
        slots[0].out.view(device.xp.uint8)[...] = 0xFF  # NaN in every type
        kept = [device.xp.full(case.shape[1], np.nan) for _ in range(4)]
        kept.clear()  # the pool hands these blocks out next

    return Calls({"forward": forward, "backward": backward, "eval": evaluate}, poison, lambda result: result)


def torch_tensor(torch: Any, array: Array) -> Any:
    """The same memory as a tensor."""
    if "bfloat16" in str(array.dtype):
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def _torch_reader(torch: Any, device: Device, case: GpuCase) -> Callable[[Any], Array]:
    """How to see a tensor as an array that lies like x."""

    def read(tensor: Any) -> Array:
        tensor = tensor.detach()
        if tensor.ndim > 1:
            tensor = tensor.movedim(1, case.channel_axis).contiguous()
        if tensor.dtype == torch.bfloat16:
            import ml_dtypes

            return device.xp.from_dlpack(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
        return device.xp.from_dlpack(tensor)

    return read


def _torch_backend(torch: Any, tensors: Sequence[Any], training: bool, eps: float, native: bool) -> str:
    """Which of its backends PyTorch chooses for x, weight, bias, mean and var."""
    if native:
        return "Native"
    choose = getattr(torch._C, "_select_batch_norm_backend", None)  # nobody has promised it
    if choose is None:
        return "backend unknown"
    with torch.backends.cudnn.flags(enabled=True):
        return str(choose(*tensors, training, eps).name)


def torch_calls(device: Device, buffers: Buffers, *, native: bool = False) -> Calls:
    """The function of PyTorch, and its backward by autograd; `native`: without cuDNN."""
    torch = importlib.import_module("torch")
    device.share_stream(torch)
    case, slots, vectors, eps = buffers
    weight, bias, mean, var = (torch_tensor(torch, vector) for vector in vectors.values())
    xs, dys = (
        [torch_tensor(torch, slot[k]).movedim(case.channel_axis, 1).detach() for slot in slots] for k in range(2)
    )
    function = torch.nn.functional.batch_norm

    def forward(i: int) -> Any:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=not native):
            return function(xs[i], None, None, weight, bias, training=True, eps=eps)

    def evaluate(i: int) -> Any:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=not native):
            return function(xs[i], mean, var, weight, bias, training=False, eps=eps)

    leaves = [tensor.detach().requires_grad_() for tensor in (weight, bias)]
    inputs = [x.detach().requires_grad_() for x in xs]
    with torch.backends.cudnn.flags(enabled=not native):
        ys = [function(x, None, None, *leaves, training=True, eps=eps) for x in inputs]

    def backward(i: int) -> Any:
        return torch.autograd.grad(ys[i], [inputs[i], *leaves], dys[i], retain_graph=True)

    def poison() -> None:
        kept = [torch.full_like(xs[0], float("nan")) for _ in range(3)]
        kept.clear()  # the allocator hands these blocks out next

    arrays = xs[0], weight, bias, mean, var
    backend = {what: _torch_backend(torch, arrays, what != "eval", eps, native) for what in TWO_READS}
    calls = {"forward": forward, "backward": backward, "eval": evaluate}
    return Calls(calls, poison, _torch_reader(torch, device, case), backend)


def _jax_formulas(jax: Any, buffers: Buffers) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A forward and an evaluation in float32, or float64 with x."""
    case, jnp = buffers.case, jax.numpy
    axis = tuple(i for i in range(len(case.shape)) if i != case.channel_axis % len(case.shape))
    line = (-1, *[1] * (len(case.shape) - 2)) if case.channel_axis == 1 else (-1,)
    wide = jnp.float64 if case.dtype == "float64" else jnp.float32

    def evaluate(x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        scale = weight * jax.lax.rsqrt(var + buffers.eps)
        mean, scale, bias = (vector.reshape(line) for vector in (mean, scale, bias))
        return ((x.astype(wide) - mean) * scale + bias).astype(x.dtype)

    def forward(x: Any, weight: Any, bias: Any) -> Any:
        w = x.astype(wide)
        return evaluate(x, weight, bias, w.mean(axis), w.var(axis))

    return forward, evaluate


def _jax_reader(jax: Any, device: Device) -> Callable[[Any], Array]:
    """How to see a result as an array of the device."""

    def read(array: Any) -> Array:
        if array.dtype != jax.numpy.bfloat16:
            return device.xp.from_dlpack(array)
        import ml_dtypes

        bits = jax.block_until_ready(jax.lax.bitcast_convert_type(array, jax.numpy.int16))
        return device.xp.from_dlpack(bits).view(ml_dtypes.bfloat16)

    return read


def jax_calls(device: Device, buffers: Buffers) -> Calls:
    """Formulas of jax.numpy, compiled; the backward of what the forward kept."""
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", buffers.case.dtype == "float64")
    case, slots = buffers.case, buffers.slots

    def shared(array: Array) -> Any:
        if case.dtype != "bfloat16" or array.ndim == 1:
            return jax.dlpack.from_dlpack(array)
        bits = jax.dlpack.from_dlpack(array.view(np.int16))
        return jax.lax.bitcast_convert_type(bits, jax.numpy.bfloat16)  # a copy

    xs, dys = ([shared(slot[k]) for slot in slots] for k in range(2))
    weight, bias, mean, var = map(shared, buffers.vectors.values())
    forward, evaluate = map(jax.jit, _jax_formulas(jax, buffers))
    pulled = jax.jit(lambda *arrays: jax.vjp(forward, *arrays)[1])
    pull = jax.jit(lambda kept, dy: kept(dy))
    kept = [pulled(x, weight, bias) for x in xs]
    calls = {
        "forward": lambda i: forward(xs[i], weight, bias),
        "backward": lambda i: pull(kept[i], dys[i]),
        "eval": lambda i: evaluate(xs[i], weight, bias, mean, var),
    }

    def poison() -> None:
        jax.block_until_ready([jax.numpy.full_like(xs[0], np.nan) for _ in range(3)])

    return Calls(calls, poison, _jax_reader(jax, device), dict.fromkeys(calls, "XLA"), jax.block_until_ready)


CONTESTANTS = (
    Contestant("fused", "arraybn fused", "arraybn", partial(arraybn_calls, name="fused")),
    Contestant("split", "arraybn split", "arraybn", partial(arraybn_calls, name="split")),
    Contestant("reference", "arraybn reference", "reference", partial(arraybn_calls, name="reference")),
    Contestant("torch", "PyTorch", "torch", torch_calls, "torch"),
    Contestant("native", "PyTorch native", "torch", partial(torch_calls, native=True), "torch"),
    Contestant("jax", "JAX", "jax", jax_calls, "jax"),
)
OURS = "arraybn"  # the rows that are always there


# ---- Layers, whose time on the host is taken -------------------------------------------------------------------------


def arraybn_layer(device: Device, buffers: Buffers) -> dict[str, Callable[[], Any]]:
    """The layer in training."""
    case, slots = buffers.case, buffers.slots
    kind = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}[len(case.shape)]
    layer = kind(case.shape[1], eps=buffers.eps, dtype=case.vectors).to(xp=device.xp)
    x, dy, _ = slots[0]

    def step() -> Any:
        layer(x)
        return layer.backward(dy)

    return {"layer": lambda: layer(x), "step": step}


def torch_layer(device: Device, buffers: Buffers) -> dict[str, Callable[[], Any]]:
    """The module in training with gradients enabled, the backward by autograd."""
    torch = importlib.import_module("torch")
    device.share_stream(torch)
    case = buffers.case
    x, dy = (torch_tensor(torch, array) for array in buffers.slots[0][:2])
    x.requires_grad_()
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(case.shape)]
    module = getattr(torch.nn, kind)(case.shape[1], eps=buffers.eps, device=x.device)
    leaves = [x, module.weight, module.bias]
    return {"layer": lambda: module(x), "step": lambda: torch.autograd.grad(module(x), leaves, dy)}


LAYERS = {"arraybn": arraybn_layer, "PyTorch": torch_layer}

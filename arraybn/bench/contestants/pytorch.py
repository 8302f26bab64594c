"""PyTorch: its function and module, the backward by autograd; and the operators that both end in."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ...testing.scenarios import Batch
from ..device import Array, HostDevice
from ..truth import Problem
from . import Call, Calls, Results, image


def _tensor(torch: Any, array: Array) -> Any:
    """Return the same memory as a tensor."""
    if "bfloat16" in str(array.dtype):
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def _tensors(torch: Any, problem: Problem) -> list[Any]:
    """Return x and dy as (N, C, *S), then weight, bias, mean and var."""
    x, dy, *vectors = (_tensor(torch, array) for array in problem.inputs)
    return [*(tensor.movedim(problem.case.channel_axis, 1) for tensor in (x, dy)), *vectors]


def _reader(torch: Any, device: HostDevice, problem: Problem) -> Callable[[Any], Array]:
    def read(tensor: Any) -> Array:
        tensor = tensor.detach()
        if tensor.ndim > 1:
            tensor = tensor.movedim(1, problem.case.channel_axis).contiguous()
        if tensor.dtype == torch.bfloat16:
            import ml_dtypes

            return device.xp.from_dlpack(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
        return device.xp.from_dlpack(tensor)

    return read


def layer_calls(device: HostDevice, problem: Problem) -> dict[str, Call]:
    """Return the calls of the module in training with gradients enabled."""
    torch, case = importlib.import_module("torch"), problem.case
    device.share_stream(torch)
    x, dy, weight, bias, *_ = _tensors(torch, problem)
    x = x.detach().requires_grad_()
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(case.shape)]
    module = getattr(torch.nn, kind)(case.shape[1], eps=problem.eps, dtype=weight.dtype, device=x.device)
    module.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    leaves = [x, module.weight, module.bias]
    return {"layer": lambda: module(x), "step": lambda: torch.autograd.grad(module(x), leaves, dy)}


def host_calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the calls of the function with gradients enabled, and those of the module."""
    found = device_calls(device, problem, name)
    torch, eps = importlib.import_module("torch"), problem.eps
    x, _, weight, bias, mean, var = _tensors(torch, problem)
    function, leaves = torch.nn.functional.batch_norm, [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def evaluate() -> Any:
        with torch.no_grad():
            return function(*leaves[:1], mean, var, *leaves[1:], training=False, eps=eps)

    calls = {"forward": lambda: function(leaves[0], None, None, *leaves[1:], training=True, eps=eps), "eval": evaluate}
    return Calls({**found.operations, **calls, **layer_calls(device, problem)}, found.read)


def operator_calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the calls of the operators of PyTorch's core: no dispatch over devices, no autograd, no module."""
    torch, eps = importlib.import_module("torch"), problem.eps
    x, dy, weight, bias, mean, var = _tensors(torch, problem)
    if flat := x.ndim == 3:  # the fast way for channels-last asks for images
        x, dy = x.unsqueeze(-1), dy.unsqueeze(-1)
    forward, backward = torch.native_batch_norm, torch.ops.aten.native_batch_norm_backward.default
    _, *statistics = forward(x, weight, bias, None, None, True, 0.0, eps)
    fixed, wanted, read = (None, None), [True] * 3, _reader(torch, device, problem)
    calls = {
        "forward": lambda: forward(x, weight, bias, *fixed, True, 0.0, eps)[0],
        "backward": lambda: backward(dy, x, weight, *fixed, *statistics, True, eps, wanted),
        "eval": lambda: forward(x, weight, bias, mean, var, False, 0.0, eps)[0],
    }
    return Calls(calls, lambda tensor: read(tensor.squeeze(-1) if flat and tensor.ndim > 1 else tensor))


def device_calls(device: HostDevice, problem: Problem, name: str) -> Calls:
    """Return the calls of the function without gradients, and its backward by autograd; "native": without cuDNN."""
    torch, eps, native = importlib.import_module("torch"), problem.eps, name == "native"
    device.share_stream(torch)
    x, dy, weight, bias, mean, var = _tensors(torch, problem)
    function, leaves = torch.nn.functional.batch_norm, [t.detach().requires_grad_() for t in (x, weight, bias)]

    def call(*statistics: Any, training: bool) -> Any:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=not native):
            return function(x, *statistics, weight, bias, training=training, eps=eps)

    def poison() -> None:
        kept = [torch.full_like(x, float("nan")) for _ in range(3)]
        kept.clear()  # the allocator hands these blocks out next

    with torch.backends.cudnn.flags(enabled=not native):
        y = function(leaves[0], None, None, *leaves[1:], training=True, eps=eps)
    calls = {
        "forward": lambda: call(None, None, training=True),
        "backward": lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True),
        "eval": lambda: call(mean, var, training=False),
    }
    chosen = (x, weight, bias, mean, var)
    backend = {one: "Native" if native else _backend(torch, *chosen, one != "eval", eps) for one in calls}
    return Calls(calls, _reader(torch, device, problem), poison, backend)


def _backend(torch: Any, *arguments: Any) -> str:
    """Return the name of the backend that PyTorch chooses for x, weight, bias, mean, var, training and eps."""
    choose = getattr(torch._C, "_select_batch_norm_backend", None)  # nobody has promised it
    if choose is None:
        return "backend unknown"
    with torch.backends.cudnn.flags(enabled=True):
        return str(choose(*arguments).name)


def finds_gpu() -> bool:
    return bool(importlib.import_module("torch").cuda.is_available())


def measured(memory_format: str) -> Callable[[Batch], Results]:
    """Return the function on images in a memory format."""
    torch = importlib.import_module("torch")
    options: Any = {"memory_format": getattr(torch, memory_format)}

    def call(batch: Batch) -> Results:
        x, dy = (torch.tensor(image(array)).contiguous(**options) for array in (batch.x, batch.dy))
        mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])  # momentum 1 puts the batch's in
        affine = torch.tensor(batch.weight), torch.tensor(batch.bias)
        x.requires_grad_()
        y = torch.nn.functional.batch_norm(x, mean, var, *affine, training=True, momentum=1.0, eps=batch.eps)
        (dx,) = torch.autograd.grad(y, x, dy)
        n = x.numel() // x.shape[1]
        return {"mean": mean.numpy(), "var": var.numpy() * (1 - 1 / n), "y": y.detach().numpy(), "dx": dx.numpy()}

    return call

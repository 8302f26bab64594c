"""Run every CUDA kernel on small odd shapes, each of them once at least: work for NVIDIA's compute-sanitizer.

    compute-sanitizer --tool racecheck python tests/every_kernel.py [DTYPE ...]

The other tools are memcheck, synccheck and initcheck. Without a DTYPE all four are taken. Without a GPU the kernels run
on the CPU, as in the tests. The exit status is 1 if a kernel that this GPU can run was not launched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(path) for path in (HERE.parent, HERE, HERE / "cuda") if str(path) not in sys.path]

import shim  # noqa: E402
from support import kernels  # noqa: E402
from support.gpu import cupy_here  # noqa: E402

from arraybn._arrays.namespaces import FLOATS  # noqa: E402
from arraybn.kernels import cuda  # noqa: E402
from arraybn.kernels.cuda import cluster, exact, fused, launch, table  # noqa: E402
from arraybn.reference import Mask, Moments  # noqa: E402

HOPPER = 9  # the compute capability from which on there are bulk copies and clusters
MORE = {  # cuts of kernels that differ from others of the tests in a number alone
    f"planes side by side in {blocks} blocks": kernels.FusedCut(
        "cluster", (37, 16, 9), kernels.SMALL, {**kernels.FEW_WARPS, "CLUSTERS": (blocks,)}
    )
    for blocks in table.CLUSTERS
}
MORE["rows of 12 channels"] = kernels.FusedCut("ring", (150, 12, 1), kernels.SMALL, {})


def every_kernel() -> Iterator[launch.Kernel]:
    yield from shim.all_kernels()
    yield from shim.ring_kernels()
    yield from shim.cluster_kernels()
    for way, direction, layout in zip(("rows", "ring"), ("forward", "backward"), ("planes", "rows"), strict=True):
        yield from (*shim.row_kernels(way), *shim.fused_kernels(direction), *shim.exact_kernels(layout))


def runs(gpu: launch.Launcher, kernel: launch.Kernel) -> bool:
    """Return True if this GPU can run the kernel."""
    of_hopper = "_ring" in kernel.name or "_cluster" in kernel.name
    holds = kernel.blocks <= launch.PORTABLE or gpu.holds_cluster(kernel.blocks)
    return holds and gpu.device().capability >= (HOPPER if of_hopper else 0)


def placed(cupy: Any, values: Any, offset: int) -> Any:
    """Return an array of these values on the GPU, `offset` bytes behind a multiple of 16."""
    room = cupy.empty(values.nbytes + 32, "u1")
    start = -room.data.ptr % 16 + offset
    array = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    array[...] = cupy.asarray(values)
    return array


def calls(cupy: Any, ops: Any, shape: tuple[int, int, int], dtype: str, offset: int) -> list[Callable[[], object]]:
    """Return calls of all operations of a kernel module, which share their arrays."""
    x, u, v, y = (placed(cupy, kernels.data(shape, dtype, seed), offset) for seed in range(4))
    vectors = cupy.asarray(kernels.coefficients(shape[1]))
    mean, a, b, c = (vectors[row] for row in range(4))
    where = cupy.asarray(np.random.default_rng(1).random((shape[0], 1, shape[2])) < 0.5)
    n = int(where.sum())
    mask, rstd = Mask(where, n), a * a
    found: list[Callable[[], object]] = [
        lambda: ops.moments(x),
        lambda: ops.dots(u, x, mean),
        lambda: ops.affine(x, mean, a, c, y),
        lambda: ops.affine2(u, x, mean, a, b, c, y),
        lambda: ops.affine3(v, u, x, mean, a, b, c, mean, y),
        lambda: ops.evaluate(x, mean, rstd, a, b, 1e-5, y),
        lambda: ops.forward(x, a, b, 1e-5, y),
        lambda: ops.backward(u, x, mean, rstd, a, y),
        lambda: ops.moments(x, where),
        lambda: ops.dots(u, x, mean, where),
        lambda: ops.dots(u, x, mean, skip_zeros=True),
        lambda: ops.affine2(u, x, mean, a, b, c, y, where),
        lambda: ops.affine3(v, u, x, mean, a, b, c, mean, y, where),
        lambda: ops.masked_forward(x, a, b, 1e-5, y, mask),
        lambda: ops.masked_backward(u, x, Moments(n, mean, rstd), rstd, a, y, where),
        lambda: ops.widened(*(vector.astype(x.dtype) for vector in (mean, a))),
        lambda: ops.update_running_stats(*(a.astype(x.dtype), rstd.astype(x.dtype)), mean, rstd, 0.1),
    ]
    if dtype != "float64":
        found += [lambda: exact.forward(x, a, b, 1e-5, y), lambda: exact.backward(u, x, mean, rstd, a, y)]
    return found


def cuts(gpu: launch.Launcher) -> Iterator[tuple[str, Any, tuple[int, int, int]]]:
    """Let the kernels take each cut of the tests in turn: yield its name, a kernel module and the shape of the data."""
    real = gpu.device()
    given = {name: ("", *cut[:1], shim.H200, cut[1]) for name, cut in kernels.CUDA_CUTS.items()}
    given |= {f"{name}, fused": cut for name, cut in (*kernels.FUSED_CUTS.items(), *MORE.items())}
    for name, (way, shape, has, sizes) in given.items():
        smaller = min(has.shared, real.shared), has.shared_in_all, min(has.capability, real.capability)
        has = launch.Device(*has[:2], *smaller)
        gpu._functions.clear()  # built for another size of shared memory
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu, "device", lambda has=has: has)
            if way:
                kernels.set_way(patch, way, sizes)
            else:
                kernels.set_sizes(patch, cuda, sizes)
            yield name, cluster if way == "cluster" else fused if way else cuda, shape
    kernels.forget_cuts()


def run(cupy: Any, dtypes: tuple[str, ...]) -> list[str]:
    """Run every kernel of these dtypes; return the names of those that were not launched, but could be."""
    gpu, launched, seen, tried = launch.launcher(), set(), set(), []

    def note(kernel: launch.Kernel, *_: Any) -> None:
        tried.append(kernel)

    for name, ops, shape in cuts(gpu):
        for dtype in dtypes:
            for offset in sorted({0, np.dtype(kernels.data((1,), dtype).dtype).itemsize, 8}):
                for call in calls(cupy, ops, shape, dtype, offset):
                    tried.clear()
                    with mock.patch.object(gpu, "launch", note):
                        call()
                    new = {kernel.entry for kernel in tried} | {(kernel.name, name) for kernel in tried}
                    if new - seen:
                        call()
                        seen |= new
                        launched |= {kernel.entry for kernel in tried}
    cupy.cuda.Device().synchronize()
    print(f"{len(launched)} kernels")
    expected = {kernel.entry for kernel in every_kernel() if kernel.dtype in dtypes and runs(gpu, kernel)}
    return sorted(expected - launched)


def main() -> int:
    with cupy_here("cuda") as cupy:
        missing = run(cupy, tuple(sys.argv[1:]) or tuple(FLOATS))
    for name in missing:
        print(f"not launched: {name}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

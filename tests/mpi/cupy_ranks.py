"""The synchronized mode with CuPy's arrays: mpirun -n P python -m mpi4py cupy_ranks.py KERNELS

Each rank takes the GPU of its number on the machine; several may share one. With the fake CuPy on the path, it runs
without a GPU. Every rank ends with status 0, and rank 0 prints "passed" and the kernels.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any
from unittest import mock

import cupy
import numpy as np
from mpi4py import MPI

import arraybn
from arraybn.sync import mpi

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
RNG = np.random.default_rng(11)
X = (RNG.standard_normal((9, 5, 6, 7)) + 3).astype("f4")
DY = RNG.standard_normal(X.shape).astype("f4")


def part(array: Any) -> Any:
    """Return the part of this rank, on its GPU; of three ranks the second has an empty part."""
    cuts = [0, 5, 5, 9] if SIZE == 3 else np.linspace(0, len(array), SIZE + 1).astype(int)
    return cupy.asarray(array[cuts[RANK] : cuts[RANK + 1]])


def the_same_everywhere(*arrays: Any) -> bool:
    return len(set(WORLD.allgather(b"".join(array.get().tobytes() for array in arrays)))) == 1


def trains() -> None:
    """Check that the ranks train as one process does with the whole batch."""
    layer, whole = arraybn.SyncBatchNorm(5, process_group=WORLD, xp=cupy), arraybn.BatchNorm2d(5)
    here = cupy.cuda.Device().id
    for step in range(4):
        y, dx = layer(part(X + step)), layer.backward(part(DY))
        want_y, want_dx = whole(X + step), whole.backward(DY)
        assert {array.device.id for array in (y, dx, layer.running_mean, layer.weight.grad)} == {here}
        for got, want in ((y, want_y), (dx, want_dx)):
            np.testing.assert_allclose(np.concatenate(WORLD.allgather(got.get())), want, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(layer.running_var.get(), whole.running_var, rtol=1e-6)
    np.testing.assert_allclose(sum(WORLD.allgather(layer.weight.grad.get())), whole.weight.grad, rtol=1e-4, atol=1e-4)
    assert the_same_everywhere(layer.running_mean, layer.running_var)


def agrees_on_errors() -> None:
    """Check that the error of one rank is raised on every rank, and changes nothing."""
    layer = arraybn.SyncBatchNorm(5, process_group=WORLD, xp=cupy)
    layer(part(X))
    before = [layer.running_mean.get().tolist(), layer.num_batches_tracked]
    bad = X[:2] if RANK == SIZE - 1 else part(X)  # still on the host
    try:
        layer(bad)
    except arraybn.SyncError as error:
        assert f"rank {SIZE - 1}: x: expected a cupy array as this layer is; got a numpy array" in str(error)
    else:
        raise AssertionError("no error")
    assert before == [layer.running_mean.get().tolist(), layer.num_batches_tracked]
    layer.backward(part(DY))
    layer(part(X))
    assert layer.num_batches_tracked == 2


def starts_and_steps_together() -> None:
    """Check that all ranks start from the parameters of rank 0 and average their gradients."""
    layer = arraybn.BatchNorm2d(5, xp=cupy)
    layer.weight.data = cupy.full(5, RANK + 2.0, dtype="f4")
    arraybn.broadcast_state(layer, WORLD)
    assert layer.weight.data.tolist() == [2.0] * 5
    layer(part(X)), layer.backward(part(DY))
    arraybn.average_gradients(layer, WORLD, weight=len(part(X)))
    assert the_same_everywhere(layer.weight.grad, layer.bias.grad)


def from_the_host() -> contextlib.AbstractContextManager[Any]:
    """Assert that MPI gets nothing but host memory."""
    run = mpi.Reducer._run

    def checked(self: Any, start: Any, deadline: Any, *buffers: Any) -> None:
        assert all(isinstance(buffer, np.ndarray | bytes | bytearray) for buffer in buffers), buffers
        run(self, start, deadline, *buffers)

    return mock.patch.object(mpi.Reducer, "_run", checked)


if __name__ == "__main__":
    KERNELS = sys.argv[1]
    local = WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    cupy.cuda.Device(local.rank % cupy.cuda.runtime.getDeviceCount()).use()
    with contextlib.ExitStack() as stack:
        stack.enter_context(from_the_host())
        if hasattr(cupy, "_fake") and KERNELS == "cuda":
            import fake_gpu

            stack.enter_context(fake_gpu.install())
        stack.enter_context(mock.patch("arraybn.kernels._is_recent", return_value=KERNELS == "cuda"))
        for check in (trains, agrees_on_errors, starts_and_steps_together):
            check()
    if RANK == 0:
        print(f"passed {KERNELS}")

"""Checks that have to pass under every MPI: mpirun -n P python -m mpi4py checks.py PART …

Every rank ends with status 0, and rank 0 prints "passed" and the parts. Run by tests/test_mpi.py.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import threading
import time
from typing import Any

KERNELS = os.environ.get("ARRAYBN_TEST_KERNELS")
ODD = int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0) % 2 == 1
if KERNELS == "reference" or (KERNELS == "mixed" and ODD):
    sys.modules["numba"] = None  # type: ignore[assignment]  # importing it takes longer than the checks

import faults
import numpy as np
import twice
import whole
from mpi4py import MPI

import arraybn
from arraybn import sync
from arraybn.sync import frames, mpi

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
KINDS = {2: arraybn.BatchNorm1d, 3: arraybn.BatchNorm1d, 4: arraybn.BatchNorm2d, 5: arraybn.BatchNorm3d}
CALLS = (
    "Allreduce",
    "Allgather",
    "Barrier",
    "Bcast",
    "Reduce",
    "Gather",
    "Scatter",
    "Alltoall",
    "Scan",
    "Send",
    "Recv",
)


class Counting(MPI.Intracomm):
    """A communicator that notes every call which may communicate, on it and on its duplicates."""

    notes: Any

    def __new__(cls, comm: Any, notes: list[str]) -> Any:
        self = super().__new__(cls, comm)
        self.notes = notes
        return self

    def Idup(self, *arguments: Any) -> Any:  # noqa: N802
        self.notes.append("Idup")
        comm, request = MPI.Intracomm(self).Idup(*arguments)
        return Counting(comm, self.notes), request

    def Free(self) -> None:  # noqa: N802
        self.notes.append("Free")
        super().Free()


def _counted(name: str) -> Any:
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        self.notes.append(name)
        return getattr(MPI.Intracomm, name)(self, *arguments, **options)

    return method


for _name in dir(MPI.Intracomm):
    if any(call.lower() in _name.lower() for call in CALLS) and callable(getattr(MPI.Intracomm, _name)):
        setattr(Counting, _name, _counted(_name))


def exact() -> None:
    """Check N1, N2 and N4 for every shape, layout, dtype and flag, over random cuts."""
    rng = np.random.default_rng(SIZE)
    for index in range(0, 48, 1 if SIZE == 3 else 5):
        case = whole.case(rng, SIZE, index)
        found = WORLD.allgather(whole.step(case, WORLD))
        if index % SIZE == RANK:
            whole.check(case, found)


def control() -> None:
    """Check that layers that are not synchronized fail the same check."""
    rng = np.random.default_rng(0)
    for index in (0, 9, 18):
        case = whole.case(rng, SIZE, index)
        case = whole.without(case, cuts=tuple(np.linspace(0, len(case.x), SIZE + 1).astype(int).tolist()))
        found = WORLD.allgather(whole.step(case, WORLD, kind=KINDS[case.x.ndim]))
        try:
            whole.check(case, found)
        except AssertionError:
            continue
        raise SystemExit("the control passed")


def bits() -> None:
    """(N4) Check that all ranks have the same bits for many channels and cuts, also of NaN and beyond one frame."""
    rng = np.random.default_rng(7)
    for channels in (1, 255, 256, 257, 1000, 9000):
        x = rng.standard_normal((3 * SIZE + 1, channels)) * 10 ** rng.uniform(-6, 6, channels)
        x[:, :1] *= np.where(rng.random(len(x)) < 0.1, np.nan, 1)[:, None]
        for _ in range(4):
            cuts = whole.cut(rng, len(x), SIZE)
            _, saved = arraybn.batch_norm(x[cuts[RANK] : cuts[RANK + 1]], comm=WORLD)
            found = WORLD.allgather((saved.moments.mean.tobytes(), saved.moments.m2.tobytes(), saved.moments.n))
            assert len(set(found)) == 1
            assert saved.moments.n == len(x)


def twins() -> None:
    """Check that MPI calls the compiled reduction on the ranks with Numba, and the one in Python on all others."""
    arraybn.batch_norm(np.ones((2, 3)), comm=WORLD)
    assert len(mpi._kept) == (KERNELS != "mixed" or RANK % 2 == 0)


def derivatives() -> None:
    """Check forward mode and double backward (E8, E9), also beyond one frame, and for one exchange each."""
    for channels in (3, 100, 300):
        case = twice.Case(SIZE, channels)
        found = WORLD.allgather(twice.step(case, WORLD))
        twice.check(case, found)
        try:
            twice.check(case, WORLD.allgather(twice.step(case, WORLD, alone=True)))
        except AssertionError:
            continue
        raise SystemExit("the control passed")
    notes: list[str] = []
    comm, part = Counting(WORLD.Dup(), notes), twice.Case(SIZE, 3).part(RANK)
    _, saved = arraybn.batch_norm(part["x"], comm=comm)
    for call in (
        lambda: arraybn.batch_norm_jvp(part["v"], saved),
        lambda: arraybn.batch_norm_double_backward(part["v"], part["dy"], saved),
    ):
        notes.clear()
        call()
        assert notes == ["Iallreduce"], notes


def counts() -> None:
    """Check for one collective each way up to 256 channels, else two, and for one Idup on the user's communicator."""
    notes: list[str] = []
    comm = Counting(WORLD.Dup(), notes)
    arraybn.batch_norm(np.ones((2, 3)), comm=comm)
    assert notes == ["Idup", "Iallreduce"], notes
    for channels, calls in ((1, 1), (256, 1), (257, 2), (2048, 2)):
        layer = arraybn.SyncBatchNorm(channels, process_group=comm)
        for call in (layer, layer.backward):
            notes.clear()
            call(np.ones((2, channels)) + RANK)
            assert notes == ["Iallreduce"] * calls, notes
    notes.clear()
    comm.Free()
    assert notes == ["Free"] * 2  # the duplicate as well


def patience() -> None:
    """Check that a rank without a time limit waits for the last one, and leaves the processor free meanwhile."""
    layer = faults.layer_on(WORLD)
    faults.good(layer, WORLD)
    layer.timeout = None
    if RANK == 1:
        time.sleep(1.5)
    started, burnt = time.monotonic(), time.process_time()
    layer(faults.part(faults.X, WORLD))
    if RANK != 1:
        assert time.monotonic() - started > 1
        assert time.process_time() - burnt < 0.4


def wrong() -> None:
    """Check every fault on one rank, every disagreement, every sequence."""
    expected = faults.run_without(WORLD)
    for name in (*faults.FORWARD, *faults.BACKWARD):
        text, state = faults.run_fault(WORLD, name)
        assert len(set(WORLD.allgather(text))) == 1
        assert state == expected, name
    for name in faults.DISAGREE:
        assert len(set(WORLD.allgather(faults.run_disagreement(WORLD, name)))) == 1
    assert len(set(WORLD.allgather(tuple(faults.run_sequences(WORLD.Dup()))))) == 1
    sizes = [0] * SIZE
    sizes[1] = 1
    try:
        faults.layer_on(WORLD)(np.ones((sizes[RANK], 3)))
    except ValueError as error:
        assert "Expected more than 1 value per channel" in str(error)
    else:
        raise SystemExit("one value in all was accepted")
    faults.good(faults.layer_on(WORLD), WORLD)


def users() -> None:
    """Check the user's own collectives between ours and beside ours, groups, freed communicators, and two threads."""
    layer, total, one = faults.layer_on(WORLD), np.zeros(1), np.ones(1)
    for step in range(20):
        layer(faults.part(faults.X, WORLD))
        WORLD.Allreduce(np.asarray([float(RANK + step)]), total)
        request = WORLD.Iallreduce(one, total)
        layer.backward(faults.part(faults.DY, WORLD))
        request.Wait()
        assert total[0] == SIZE
    assert layer.num_batches_tracked == 20
    for _ in range(300):  # more than an MPI has contexts for, with those of other tests, if duplicates were not freed
        comm = WORLD.Dup()
        faults.layer_on(comm)(faults.part(faults.X, WORLD))
        comm.Free()
    half = WORLD.Split(RANK % 2)
    _, saved = arraybn.batch_norm(np.ones((2, 1)) * RANK, comm=half)
    assert saved.moments.n == 2 * half.size
    assert abs(saved.moments.mean[0] - np.mean(range(RANK % 2, SIZE, 2))) < 1e-15
    for comm in (MPI.COMM_SELF, WORLD.Split(RANK)):
        x = np.random.default_rng(0).standard_normal((4, 3))
        assert arraybn.batch_norm(x, comm=comm)[0].tobytes() == arraybn.batch_norm(x)[0].tobytes()
    for bad in (MPI.COMM_NULL, intercommunicator()):
        for call in (
            lambda bad=bad: arraybn.SyncBatchNorm(3, process_group=bad),
            lambda bad=bad: arraybn.SyncBatchNorm.convert_sync_batchnorm(arraybn.BatchNorm1d(3), bad),
            lambda bad=bad: arraybn.batch_norm(np.ones((2, 3)), comm=bad),
        ):
            try:
                call()
            except ValueError as error:
                assert "expected an intracommunicator; got " in str(error)
            else:
                raise SystemExit("accepted")
    two_threads()


def intercommunicator() -> Any:
    """Return an intercommunicator between rank 0 and all other ranks."""
    side = WORLD.Split(RANK == 0)
    return side.Create_intercomm(0, WORLD, 1 if RANK == 0 else 0)


def two_threads() -> None:
    """Run two threads at the same time, each with its own communicator."""
    found: dict[int, Any] = {}
    comms = [WORLD.Dup(), WORLD.Dup()]

    def work(index: int) -> None:
        layer = faults.layer_on(comms[index])
        for _ in range(30):
            faults.good(layer, comms[index])
        found[index] = layer.state_dict()

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return
    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[0][name] == found[1][name]).all() for name in found[0])
    assert found[0]["num_batches_tracked"] == 30


def copies() -> None:
    """Check broadcast and average over MPI, that a child of fork is no rank, and that pickles have the world."""
    import copy
    import pickle

    model = arraybn.Sequential(arraybn.network.Linear(3, 2), arraybn.BatchNorm1d(2))
    arraybn.SyncBatchNorm.convert_sync_batchnorm(model, WORLD.Dup())
    model[1].num_batches_tracked = RANK
    model[0].weight.data = model[0].weight.data + np.float32(RANK)
    arraybn.broadcast_state(model, WORLD)
    assert model[1].num_batches_tracked == 0
    assert len(set(WORLD.allgather(model[0].weight.data.tobytes()))) == 1
    model[0].bias.grad = np.full(2, RANK, "f4")
    arraybn.average_gradients(model, WORLD, weight=RANK)
    expected = sum(rank**2 for rank in range(SIZE)) / sum(range(SIZE))
    np.testing.assert_allclose(model[0].bias.grad, expected, rtol=1e-7)
    assert model[1].bias.grad is None
    for other, group in ((copy.deepcopy(model), model[1].process_group), (pickle.loads(pickle.dumps(model)), None)):
        assert other[1].process_group is group
        other(np.ones((RANK + 1, 3), "f4"))
    for comm in (WORLD, WORLD.Dup()):  # of which the second has not been synchronized over
        forked(comm)
    faults.good(faults.layer_on(None), WORLD)


def forked(comm: Any) -> None:
    if not hasattr(os, "fork"):
        return
    child = os.fork()
    if child == 0:
        try:
            arraybn.batch_norm(np.ones((2, 3)), comm=comm)
        except arraybn.SyncError as error:
            os._exit(0 if "forked child" in str(error) else 3)
        os._exit(4)
    assert os.waitpid(child, 0)[1] == 0


def interrupts() -> None:
    """Check that a signal while frames are combined waits until the exchange ends, and then fails that rank alone."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to stop"))
    for number, kind in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)):
        comm = WORLD.Dup()
        layer, x = faults.layer_on(comm), faults.part(faults.X, comm)
        faults.good(layer, comm)

        # in a call that ends as an error on all ranks nothing is lost, and the communicator can be used on
        assert signalled(number, lambda layer=layer, x=x: layer(x[0, 0] if RANK == 1 else x)) in (
            kind,
            arraybn.SyncError,
        )
        faults.good(layer, comm)

        assert signalled(number, lambda layer=layer, x=x: layer(x)) in (kind, None)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        try:
            layer(x)
        except arraybn.SyncError as error:
            assert f"this rank alone failed, so that its state differs: {kind.__name__}" in str(error)
        else:
            raise AssertionError("nobody was told")
    signal.signal(signal.SIGTERM, before)


def signalled(number: int, call: Any) -> Any:
    """Return the error of `call`, with a signal as soon as this rank combines frames."""
    combine, count, raised = frames.combine, 0, None

    def pressed(a: Any, b: Any) -> Any:
        nonlocal count
        count += 1
        if count == 1:
            os.kill(os.getpid(), number)
        return combine(a, b)

    WORLD.Barrier()  # a rank that waits long here is interrupted while it waits
    frames.combine = pressed
    try:
        call()
    except (KeyboardInterrupt, SystemExit, arraybn.SyncError) as error:
        raised = type(error)
    frames.combine = combine
    assert (raised in (KeyboardInterrupt, SystemExit)) == (count > 0)
    assert any(WORLD.allgather(count))  # not every rank has something to combine
    return raised


def begun() -> None:
    """Check that the buffers of MPI are kept, also when Ctrl-C comes at the start of the exchange. The last check."""
    comm = WORLD.Dup()
    layer, x = faults.layer_on(comm), faults.part(faults.X, comm)
    faults.good(layer, comm)
    run, own = mpi.Reducer._run, []

    def pressed(self: Any, start: Any, *rest: Any) -> None:
        def begin() -> None:
            start()
            raise KeyboardInterrupt

        run(self, begin, *rest)

    if RANK == 0:
        mpi.Reducer._run = pressed
        try:
            layer(x)
        except KeyboardInterrupt:
            own = [np.zeros(frames.LENGTH, np.uint8) for _ in range(8)]
        assert own
    WORLD.Barrier()
    if RANK != 0:
        layer(x)
    WORLD.Barrier()
    time.sleep(0.1)
    WORLD.Barrier()
    assert len(mpi._given_up) == (RANK == 0)
    assert not any(array.any() for array in own)
    atexit.unregister(mpi._end_job)  # for no rank waits


def broken() -> None:
    """Check that an error of MPI is a SyncError, and finalized MPI another. The last of all checks."""
    comm = WORLD.Dup()
    layer = faults.layer_on(comm)
    faults.good(layer, comm)

    class Broken:
        def Test(self) -> bool:  # noqa: N802
            raise MPI.Exception(MPI.ERR_OTHER)

    exchange = sync.exchange_over("comm", comm)
    assert exchange is not None
    exchange.reducer._comm = type("Comm", (), {"Iallreduce": lambda self, *_: Broken()})()
    for text in ("the forward of .* failed: ", "Nothing more can be synchronized over this communicator"):
        try:
            layer(faults.part(faults.X, comm))
        except arraybn.SyncError as error:
            assert re.search(text, str(error)), error
        else:
            raise SystemExit("nothing was raised")
    WORLD.Barrier()
    atexit.unregister(mpi._end_job)  # for there is no rank that waits
    if RANK == 0:
        print("passed", *sys.argv[1:], flush=True)
    MPI.Finalize()
    try:
        faults.layer_on(None)(np.ones((2, 3)))
    except arraybn.SyncError as error:
        assert "MPI has been finalized" in str(error)
    else:
        raise SystemExit("nothing was raised")
    os._exit(0)


def integers() -> None:
    """(X2) Check that exact mode has the bits of one rank for any split: y, dx, statistics and gradients."""
    rng = np.random.default_rng(11)
    usual_differs = 0
    for channels in (3, 300):
        x, dy = (rng.standard_normal((2, 4 * SIZE, channels)) * 2.0 ** rng.integers(-30, 9, channels)).astype("f4")
        x[:, 0] += 1e4
        wanted, usual = ([part.tobytes() for part in trained(x, dy, MPI.COMM_SELF, exact)] for exact in (True, False))
        for _ in range(4):
            order, cuts = rng.permutation(len(x)), whole.cut(rng, len(x), SIZE)
            for exact in (True, False):
                y, dx, *shared = trained(x[order], dy[order], WORLD, exact, slice(*cuts[RANK : RANK + 2]))
                y, dx = (np.concatenate(WORLD.allgather(part))[np.argsort(order)] for part in (y, dx))
                found = [part.tobytes() for part in (y, dx, *shared)]
                usual_differs += found != usual and not exact
                assert found == wanted or not exact
    assert usual_differs  # the control
    notes: list[str] = []
    layer = arraybn.SyncBatchNorm(300, exact=True, process_group=Counting(WORLD.Dup(), notes))
    for call in (layer, layer, layer.backward):  # of which the first duplicates the communicator
        notes.clear()
        call(np.ones((2, 300), "f4") + RANK)
    assert notes == ["Iallreduce"] * 2, notes  # the frame and the record


def trained(x: Any, dy: Any, comm: Any, exact: bool, mine: slice = slice(None)) -> list[Any]:
    """Return y, dx, the running statistics and the gradients of the whole batch, after two steps."""
    channels = x.shape[1]
    layer = arraybn.SyncBatchNorm(channels, exact=exact, process_group=comm)
    layer.weight.data = np.linspace(-1, 2, channels).astype("f4")
    for factor in (1, 3):
        y, dx = layer(factor * x[mine]), layer.backward(dy[mine])
    arraybn.average_gradients(layer, comm, weight=None, exact=exact)
    return [y, dx, layer.running_mean, layer.running_var, layer.weight.grad, layer.bias.grad]


def noticed() -> None:
    """(N4) Check that the next call reports different bits on two ranks, where MPI breaks its promise."""
    layer, x = faults.layer_on(WORLD), np.random.default_rng(RANK).standard_normal((5, 3))
    try:
        for _ in range(20):
            layer(x)
    except arraybn.SyncError as error:
        assert "they disagree on checksum of all results" in str(error)
        WORLD.Barrier()
        if RANK == 0:
            print("different bits were noticed", flush=True)


CHECKS = (exact, control, bits, twins, derivatives, counts, wrong, users)
CHECKS += (copies, integers, patience, interrupts, begun, noticed, broken)
PARTS = {function.__name__: function for function in CHECKS}

if __name__ == "__main__":
    for part in sys.argv[1:]:
        PARTS[part]()
    WORLD.Barrier()
    if RANK == 0:
        print("passed", *sys.argv[1:], flush=True)

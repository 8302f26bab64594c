"""Wrong calls of the synchronized mode, on one rank."""

from __future__ import annotations

import threading

from .texts import CONVERT, LAYER, Bad, no_array, no_forward

COMM = "{}: expected an mpi4py communicator, or None for the world; got {}"

TIMEOUT = (
    f"timeout: expected a number of seconds > 0 and ≤ {threading.TIMEOUT_MAX:g}, or None to wait for ever; got {{}}"
)

SYNC_LAYER = "layer = SyncBatchNorm(3).eval()"

SYNC = [
    Bad("batch_norm(X, comm=3)", TypeError, COMM.format("comm", "int"), "comm"),
    Bad("batch_norm(X, comm=np.zeros(3))", TypeError, COMM.format("comm", "numpy.ndarray"), "comm"),
    Bad("broadcast_state(layer, 'world')", TypeError, COMM.format("comm", "str"), "comm", setup=SYNC_LAYER),
    Bad("broadcast_state(X, None)", TypeError, "model: expected a Module; got ndarray", "model"),
    Bad("average_gradients(layer, 0, weight=1)", TypeError, COMM.format("comm", "int"), "comm", setup=SYNC_LAYER),
    Bad("average_gradients(3, None, weight=1)", TypeError, "model: expected a Module; got int", "model"),
    Bad(
        "average_gradients(layer, None, weight=1, exact=None)",
        TypeError,
        "exact: expected True or False; got None",
        "exact",
        setup=SYNC_LAYER,
    ),
    Bad(
        "average_gradients(layer, None, weight=1.5, exact=True)",
        TypeError,
        "weight: expected an integer; got 1.5",
        "weight",
        setup=SYNC_LAYER,
    ),
    Bad(
        "average_gradients(layer, None, weight=2**20 + 1, exact=True)",
        ValueError,
        "weight: expected at most 1,048,576 samples for exact=True; got 1048577",
        "weight",
        setup=SYNC_LAYER,
    ),
    Bad(
        "average_gradients(BatchNorm1d(3, dtype='float64'), None, weight=None, exact=True)",
        TypeError,
        "weight: expected float16, bfloat16 or float32 for exact=True; got float64",
        "weight",
    ),
    Bad("SyncBatchNorm(3, process_group='world')", TypeError, COMM.format("process_group", "str"), "process_group"),
    Bad("layer.process_group = 3", TypeError, COMM.format("process_group", "int"), "process_group", setup=SYNC_LAYER),
    Bad("SyncBatchNorm(3, comm='world')", TypeError, COMM.format("comm", "str"), "comm"),
    Bad(
        "SyncBatchNorm(3, process_group=comm, comm=comm)",
        TypeError,
        "comm: expected process_group or comm, two names for the same communicator; got both",
        "comm",
        setup="from arraybn.testing import ThreadComm; comm = ThreadComm.run(1, lambda comm: comm)[0]",
    ),
    Bad("broadcast_state(layer, None, timeout=0)", ValueError, TIMEOUT.format("0"), "timeout", setup=SYNC_LAYER),
    Bad(
        "average_gradients(layer, None, weight=1, timeout='long')",
        TypeError,
        "timeout: expected a number; got 'long'",
        "timeout",
        setup=SYNC_LAYER,
    ),
    Bad(
        "SyncBatchNorm.convert_sync_batchnorm(layer, timeout=-1)",
        ValueError,
        TIMEOUT.format("-1"),
        "timeout",
        setup=LAYER,
    ),
    Bad("SyncBatchNorm(3, timeout=0)", ValueError, TIMEOUT.format("0"), "timeout"),
    Bad("SyncBatchNorm(3, timeout=1e12)", ValueError, TIMEOUT.format("1000000000000.0"), "timeout"),
    Bad("SyncBatchNorm(3, timeout=-1.5)", ValueError, TIMEOUT.format("-1.5"), "timeout"),
    Bad("SyncBatchNorm(3, timeout='long')", TypeError, "timeout: expected a number; got 'long'", "timeout"),
    Bad(
        "layer.timeout = float('nan')",
        ValueError,
        "timeout: expected a finite number; got nan",
        "timeout",
        setup=SYNC_LAYER,
    ),
    Bad("SyncBatchNorm(0)", ValueError, "num_features: expected an integer ≥ 1; got 0", "num_features"),
    Bad("layer(X[0])", ValueError, "expected at least 2D input (got 1D input)", "input", setup=SYNC_LAYER),
    Bad("layer(X.tolist())", TypeError, no_array("x", "list"), "x", CONVERT, setup=SYNC_LAYER),
    Bad("layer.backward(DY)", RuntimeError, no_forward("SyncBatchNorm"), "backward", setup=SYNC_LAYER),
    Bad(
        "SyncBatchNorm.convert_sync_batchnorm([layer])",
        TypeError,
        "module: expected a Module; got list",
        "module",
        setup=LAYER,
    ),
    Bad(
        "SyncBatchNorm.convert_sync_batchnorm(layer, 3)",
        TypeError,
        COMM.format("process_group", "int"),
        "process_group",
        setup=LAYER,
    ),
    Bad("SyncBatchNorm.revert_sync_batchnorm(None)", TypeError, "module: expected a Module; got NoneType", "module"),
    Bad(
        "SyncBatchNorm.revert_sync_batchnorm(model)",
        ValueError,
        "module: expected layers that convert_sync_batchnorm made; got one at '1' that was built as a SyncBatchNorm."
        " Replace it by a BatchNorm1d, 2d or 3d, as its inputs are",
        "module",
        "Replace it by a BatchNorm1d",
        setup="model = SyncBatchNorm.convert_sync_batchnorm(Sequential(BatchNorm1d(3), SyncBatchNorm(3)))",
    ),
]

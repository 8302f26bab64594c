"""Wrong calls of the batch norm layers: constructors, forward, backward, attributes, moves."""

from __future__ import annotations

from .texts import (
    ASTYPE,
    CONVERT,
    COUNT,
    LAYER,
    LOW_DTYPE,
    MOVE,
    SHAPE_3,
    Bad,
    no_array,
    no_float,
    no_forward,
    other_home,
)


def one_value(shape: str) -> str:
    return (
        f"Expected more than 1 value per channel when training, got input size {shape}."
        " Leave out the last incomplete batch, or use eval()"
    )


NAMESPACE = "xp: expected an array namespace such as numpy, cupy, torch or jax.numpy; got {}"

TRANSFORMED = (
    "{}: expected a tensor with values, which a layer remembers; got one of a transform or a trace."
    " Inside torch.func.vmap, jvp, make_fx and torch.export, call arraybn.batch_norm"
)

BOTH = "running_mean and running_var: expected either both or neither to be None; got None for {} alone"

CONSTRUCTORS = [
    Bad("BatchNorm1d(0)", ValueError, "num_features: expected an integer ≥ 1; got 0", "num_features"),
    Bad("BatchNorm2d(-1)", ValueError, "num_features: expected an integer ≥ 1; got -1", "num_features"),
    Bad("BatchNorm3d(3.0)", TypeError, "num_features: expected an integer; got 3.0", "num_features"),
    Bad("BatchNorm1d('3')", TypeError, "num_features: expected an integer; got '3'", "num_features"),
    Bad("BatchNorm1d(None)", TypeError, "num_features: expected an integer; got None", "num_features"),
    Bad("BatchNorm1d(True)", TypeError, "num_features: expected an integer; got True", "num_features"),
    Bad("BatchNorm1d(3, -1)", ValueError, "eps: expected a number ≥ 0; got -1", "eps"),
    Bad("BatchNorm1d(3, None)", TypeError, "eps: expected a number; got None", "eps"),
    Bad("BatchNorm1d(3, float('inf'))", ValueError, "eps: expected a finite number; got inf", "eps"),
    Bad("BatchNorm1d(3, momentum='0.1')", TypeError, "momentum: expected a number; got '0.1'", "momentum"),
    Bad("BatchNorm1d(3, momentum=True)", TypeError, "momentum: expected a number; got True", "momentum"),
    Bad("BatchNorm1d(3, momentum=np.nan)", ValueError, "momentum: expected a finite number; got nan", "momentum"),
    Bad("BatchNorm1d(3, affine='False')", TypeError, "affine: expected True or False; got 'False'", "affine"),
    Bad("BatchNorm1d(3, affine=1)", TypeError, "affine: expected True or False; got 1", "affine"),
    Bad("BatchNorm1d(3, affine=None)", TypeError, "affine: expected True or False; got None", "affine"),
    Bad(
        "BatchNorm1d(3, affine=X > 0)", TypeError, r"(?s)affine: expected True or False; got array\(.*", "affine"
    )._replace(pattern=True),
    Bad(
        "BatchNorm1d(3, track_running_stats='no')",
        TypeError,
        "track_running_stats: expected True or False; got 'no'",
        "track_running_stats",
    ),
    Bad("BatchNorm1d(3, channel_axis='1')", TypeError, "channel_axis: expected an integer; got '1'", "channel_axis"),
    Bad("BatchNorm1d(3, dtype='float16')", TypeError, LOW_DTYPE.format("float16"), "dtype", "Inputs may be of any"),
    Bad(
        "BatchNorm1d(3, dtype=int)",
        TypeError,
        "dtype: expected a real floating dtype of numpy; got <class 'int'>",
        "dtype",
    ),
    Bad("BatchNorm1d(3, dtype=32)", TypeError, "dtype: expected a real floating dtype of numpy; got 32", "dtype"),
    Bad(
        "BatchNorm1d(3, device='cuda')",
        ValueError,
        "device: expected one that numpy has here; got 'cuda'. For a GPU, use xp=cupy",
        "device",
        "use xp=cupy",
    ),
    Bad(
        "BatchNorm1d(3, device='cpu', xp=strict)",
        ValueError,
        "device: expected one that array_api_strict has here; got 'cpu'",
        "device",
        needs="array_api_strict",
    ),
    Bad(
        "BatchNorm1d(3, device='nowhere', xp=torch)",
        ValueError,
        "device: expected one that torch has here; got 'nowhere'",
        "device",
        needs="torch",
    ),
    Bad("BatchNorm1d(3, xp='numpy')", TypeError, NAMESPACE.format("'numpy'"), "xp", "such as numpy, cupy"),
    Bad("BatchNorm1d(3, xp=1)", TypeError, NAMESPACE.format("1"), "xp", "such as numpy, cupy"),
]

FRESH = "layer = BatchNorm1d(3)"

LAYERS = [
    Bad("layer(X.tolist())", TypeError, no_array("x", "list"), "x", CONVERT, LAYER),
    Bad("layer(X.astype(int))", TypeError, no_float("x", "int64"), "x", ASTYPE, LAYER),
    Bad("layer(X[0])", ValueError, "expected 2D or 3D input (got 1D input)", "input", setup=LAYER),
    Bad(
        "layer(X, where=L[:2] > 0)",
        ValueError,
        "where: expected shape (4,), x without its channels, or one that broadcasts to it; got (2,)",
        "where",
        setup=LAYER,
    ),
    Bad(
        "layer.eval()(X, where=L)",
        TypeError,
        "where: expected bool, True where a value counts; got int64. Compare it, for example where != 0",
        "where",
        "where != 0",
        f"{LAYER}; layer.eval()",
    ),
    Bad(
        "layer(X, where=L == 1)",
        ValueError,
        one_value("(4, 3) with one True in where"),
        "input size",
        "use eval()",
        LAYER,
    ),
    Bad("layer(X[None, None])", ValueError, "expected 2D or 3D input (got 4D input)", "input", setup=LAYER),
    Bad("layer(X)", ValueError, "expected 4D input (got 2D input)", "input", setup="layer = BatchNorm2d(3)"),
    Bad("layer(X)", ValueError, "expected 5D input (got 2D input)", "input", setup="layer = BatchNorm3d(3)"),
    Bad(
        "layer(X[:, :2])",
        ValueError,
        "x: expected 3 channels (num_features) on axis 1; got 2, in shape (4, 2)",
        "x",
        setup=LAYER,
    ),
    Bad(
        "layer(X[:0, :2])",
        ValueError,
        "x: expected 3 channels (num_features) on axis 1; got 2, in shape (0, 2)",
        "x",
        setup=LAYER,
    ),
    Bad(
        "layer(X)",
        ValueError,
        "x: expected 2 channels (num_features) on axis -1; got 3, in shape (4, 3)",
        "x",
        setup="layer = BatchNorm1d(2, affine=False, channel_axis=-1).eval()",
    ),
    Bad(
        "layer(X)",
        ValueError,
        "x: expected an axis 2 (channel_axis); got shape (4, 3)",
        "x",
        setup="layer = BatchNorm1d(3, channel_axis=2)",
    ),
    Bad("layer(X[:1])", ValueError, one_value("(1, 3)"), "input size", "use eval()", LAYER),
    Bad(
        "layer(X[:1, :, None])",
        ValueError,
        one_value("(1, 3, 1)").replace("use eval()", "keep running statistics"),
        "input size",
        "keep running statistics",
        "layer = BatchNorm1d(3, track_running_stats=False).eval()",
    ),
    Bad(
        "layer(strict.ones((4, 3)))",
        TypeError,
        other_home("x", "numpy", "array_api_strict", "this layer"),
        "x",
        MOVE,
        LAYER,
        "array_api_strict",
    ),
    Bad(
        "layer(strict.ones((4, 3)))",
        TypeError,
        other_home("x", "numpy", "array_api_strict", "this layer"),
        "x",
        MOVE,
        "layer = BatchNorm1d(3, affine=False).eval()",
        "array_api_strict",
    ),
    Bad("layer(X)", NotImplementedError, "_BatchNorm does not say which inputs it takes", "inputs")._replace(
        setup="layer = _BatchNorm(3)"
    ),
    Bad("layer(X)", NotImplementedError, "_NormBase has no forward", "forward", setup="layer = _NormBase(3)"),
    # backward
    Bad("layer.backward(DY)", RuntimeError, no_forward("BatchNorm1d"), "backward", "call arraybn.batch_norm", FRESH),
    Bad(
        "layer.backward(DY)",
        RuntimeError,
        no_forward("BatchNorm1d"),
        "backward",
        "call arraybn.batch_norm",
        f"{LAYER}; layer.backward(DY)",
    ),
    Bad("layer.backward(None)", TypeError, no_array("dy", "NoneType"), "dy", CONVERT, LAYER),
    Bad("layer.backward(DY.astype(int))", TypeError, no_float("dy", "int64"), "dy", ASTYPE, LAYER),
    Bad(
        "layer.backward(DY[:, :2])",
        ValueError,
        "dy: expected shape (4, 3), that of x and y; got (4, 2)",
        "dy",
        setup=LAYER,
    ),
    Bad(
        "layer.backward(DY)",
        ValueError,
        "gradient: expected shape (2,), that of data; got (3,)",
        "gradient",
        setup=f"{LAYER}; layer.zero_grad(); layer.bias.data = np.ones(2)",
    ),
    # attributes
    Bad("layer(X)", TypeError, "eps: expected a number; got 'a'", "eps", setup=f"{LAYER}; layer.eps = 'a'"),
    Bad("layer(X)", ValueError, "eps: expected a number ≥ 0; got -1", "eps", setup=f"{LAYER}; layer.eps = -1"),
    Bad(
        "layer(X)",
        TypeError,
        "momentum: expected a number; got 'a'",
        "momentum",
        setup=f"{LAYER}; layer.momentum = 'a'",
    ),
    Bad(
        "layer(X)",
        ValueError,
        "momentum: expected a finite number; got nan",
        "momentum",
        setup=f"{LAYER}; layer.momentum = np.nan",
    ),
    Bad(
        "layer(X)",
        TypeError,
        "training: expected True or False; got 'no'",
        "training",
        setup=f"{LAYER}; layer.training = 'no'",
    ),
    Bad(
        "layer(X)",
        TypeError,
        "training: expected True or False; got None",
        "training",
        setup=f"{LAYER}; layer.training = None",
    ),
    Bad(
        "layer(X)",
        TypeError,
        "track_running_stats: expected True or False; got 'no'",
        "track_running_stats",
        setup=f"{LAYER}; layer.track_running_stats = 'no'",
    ),
    Bad(
        "layer(X)",
        TypeError,
        "num_features: expected an integer; got '3'",
        "num_features",
        setup=f"{LAYER}; layer.num_features = '3'",
    ),
    Bad(
        "layer(X)",
        TypeError,
        "channel_axis: expected an integer; got None",
        "channel_axis",
        setup=f"{LAYER}; layer.channel_axis = None",
    ),
    Bad(
        "layer(X)",
        TypeError,
        "channel_axis: expected an integer; got 1.0",
        "channel_axis",
        setup=f"{LAYER}; layer.channel_axis = 1.0",
    ),
    Bad(
        "layer(X)",
        ValueError,
        "num_batches_tracked: expected an integer ≥ 0; got -5",
        "num_batches_tracked",
        setup=f"{LAYER}; layer.num_batches_tracked = -5",
    ),
    Bad(
        "layer.num_batches_tracked = np.ones(2)",
        TypeError,
        COUNT.format("array([1., 1.])"),
        "num_batches_tracked",
        setup=LAYER,
    ),
    Bad(
        "layer.to(dtype='int8')",
        TypeError,
        "dtype: expected a real floating dtype; got 'int8'",
        "dtype",
        setup="layer = network.ReLU()",
    ),
    Bad(
        "layer.num_batches_tracked = 1.5",
        TypeError,
        "cannot assign 'float' to buffer 'num_batches_tracked' (array, int or None expected)",
        "num_batches_tracked",
        setup=LAYER,
    ),
    Bad(
        "layer.num_batches_tracked = 2**63",
        ValueError,
        "num_batches_tracked: expected an integer of 64 bits; got 9223372036854775808",
        "num_batches_tracked",
        setup=LAYER,
    ),
    Bad(
        "layer.running_mean = [0, 0, 0]",
        TypeError,
        "cannot assign 'list' to buffer 'running_mean' (array, int or None expected)",
        "running_mean",
        setup=LAYER,
    ),
    Bad("layer(X)", ValueError, BOTH.format("running_mean"), "running_mean")._replace(
        setup=f"{LAYER}; layer.running_mean = None"
    ),
    Bad("layer(X)", ValueError, BOTH.format("running_var"), "running_var")._replace(
        setup=f"{LAYER}; layer.eval(); layer.running_var = None"
    ),
    Bad(
        "layer(X)",
        ValueError,
        SHAPE_3.format("running_var", "x", "(2,)"),
        "running_var",
        setup=f"{LAYER}; layer.running_var = np.ones(2)",
    ),
    Bad(
        "layer(X)",
        ValueError,
        SHAPE_3.format("running_var", "x", "(2,)"),
        "running_var",
        setup=f"{LAYER}; layer.eval(); layer.running_var = np.ones(2)",
    ),
    Bad(
        "layer(X)",
        TypeError,
        no_float("running_mean", "int64"),
        "running_mean",
        ASTYPE,
        f"{LAYER}; layer.eval(); layer.running_mean = np.zeros(3, int)",
    ),
    Bad(
        "layer(X)",
        TypeError,
        no_array("running_mean", "int"),
        "running_mean",
        CONVERT,
        f"{LAYER}; layer.eval(); layer.running_mean = 0",
    ),
    Bad(
        "layer.weight = W",
        TypeError,
        "cannot assign 'ndarray' to 'weight' (Parameter or None expected)",
        "weight",
        setup=LAYER,
    ),
    Bad(
        "layer.weight = network.ReLU()",
        TypeError,
        "cannot assign 'ReLU' to 'weight' (Parameter or None expected)",
        "weight",
        setup=LAYER,
    ),
    Bad(
        "layer(X)",
        ValueError,
        SHAPE_3.format("weight", "x", "(2,)"),
        "weight",
        setup=f"{LAYER}; layer.weight = Parameter(np.ones(2))",
    ),
    Bad("layer.weight.data = None", TypeError, no_array("data", "NoneType"), "data", CONVERT, LAYER),
    Bad("layer.weight.data = [1, 1, 1]", TypeError, no_array("data", "list"), "data", CONVERT, LAYER),
    Bad("layer.weight.grad = 'x'", TypeError, "grad: expected an array like data; got str", "grad", setup=LAYER),
    Bad(
        "layer.weight.grad = np.ones((7, 3))",
        ValueError,
        "grad: expected shape (3,), that of data; got (7, 3)",
        "grad",
        setup=LAYER,
    ),
    Bad("layer.weights", AttributeError, "'BatchNorm1d' object has no attribute 'weights'", "weights", setup=LAYER),
    # train, to
    Bad("layer.train('yes')", ValueError, "training mode is expected to be boolean; got 'yes'", "mode", setup=LAYER),
    Bad("layer.train(0)", ValueError, "training mode is expected to be boolean; got 0", "mode", setup=LAYER),
    Bad("layer.to(dtype='bfloat16')", TypeError, LOW_DTYPE.format("bfloat16"), "dtype", "Inputs may be of any", LAYER),
    Bad(
        "layer.to(dtype='int8')",
        TypeError,
        "dtype: expected a real floating dtype of numpy; got 'int8'",
        "dtype",
        setup=LAYER,
    ),
    Bad("layer.to(xp='torch')", TypeError, NAMESPACE.format("'torch'"), "xp", "such as numpy, cupy", LAYER),
    Bad(
        "layer.to(device='cuda')",
        ValueError,
        "device: expected one that numpy has here; got 'cuda'. For a GPU, use xp=cupy",
        "device",
        setup=LAYER,
    ),
    Bad(
        "BatchNorm1d(3, xp=torch, device='meta')",
        TypeError,
        "data: expected a tensor with values; got one on the meta device",
        "data",
        needs="torch",
    ),
    Bad(
        "torch.func.vmap(layer)(torch.ones(2, 4, 3))",
        TypeError,
        TRANSFORMED.format("x"),
        "x",
        "call arraybn.batch_norm",
        "layer = BatchNorm1d(3, xp=torch); layer(torch.asarray(X))",
        "torch",
    ),
    Bad(
        "torch.func.vmap(layer.backward)(torch.ones(2, 4, 3))",
        TypeError,
        TRANSFORMED.format("dy"),
        "dy",
        "call arraybn.batch_norm",
        "layer = BatchNorm1d(3, xp=torch); layer(torch.asarray(X))",
        "torch",
    ),
    Bad(
        "layer(torch.ones((4, 3), device='meta'))",
        TypeError,
        "x: expected a tensor with values; got one on the meta device",
        "x",
        setup="layer = BatchNorm1d(3, xp=torch)",
        needs="torch",
    ),
]

"""Wrong state dicts and files."""

from __future__ import annotations

from .texts import COUNT, LAYER, Bad


def loading(*lines: str) -> str:
    return "Error(s) in loading state_dict for BatchNorm1d:\n\t" + "\n\t".join(lines)


VALUES = "{}: expected what numpy.asarray or DLPack takes; got {}"

SIZE = "size mismatch for {}: copying a param with shape {} from checkpoint, the shape in current model is {}."

STATE = f"{LAYER}; given = dict(layer.state_dict())"

STATE_DICTS = [
    Bad(
        "layer.load_state_dict(None)",
        TypeError,
        "state_dict: expected a mapping of names to arrays; got NoneType",
        "state_dict",
        setup=LAYER,
    ),
    Bad(
        "layer.load_state_dict('net.npz')",
        TypeError,
        "state_dict: expected a mapping of names to arrays; got str",
        "state_dict",
        setup=LAYER,
    ),
    Bad(
        "layer.load_state_dict(BatchNorm1d(3))",
        TypeError,
        "state_dict: expected a mapping of names to arrays; got BatchNorm1d",
        "state_dict",
        setup=LAYER,
    ),
    Bad(
        "layer.load_state_dict({1: W})",
        TypeError,
        "state_dict: expected names as keys; got 1",
        "state_dict",
        setup=LAYER,
    ),
    Bad(
        "layer.load_state_dict(given, strict='no')",
        TypeError,
        "strict: expected True or False; got 'no'",
        "strict",
        setup=STATE,
    ),
    Bad(
        "layer.load_state_dict({})",
        RuntimeError,
        loading('Missing key(s) in state_dict: "weight", "bias", "running_mean", "running_var". '),
        "running_var",
        setup=LAYER,
    ),
    Bad(
        "layer.load_state_dict(given)",
        RuntimeError,
        loading('Unexpected key(s) in state_dict: "more". '),
        "more",
        setup=f"{STATE}; given['more'] = W",
    ),
    Bad(
        "layer.load_state_dict(given)",
        RuntimeError,
        loading(SIZE.format("bias", "(2,)", "(3,)"), SIZE.format("running_var", "()", "(3,)")),
        "running_var",
        setup=f"{STATE}; given |= dict(weight=7 * W, bias=W[:2], running_var=1.0)",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        VALUES.format("weight", "NoneType"),
        "weight",
        setup=f"{STATE}; given['weight'] = None",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        VALUES.format("bias", "list"),
        "bias",
        setup=f"{STATE}; given |= dict(weight=7 * W, bias=[1, [2]])",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        VALUES.format("weight", "generator"),
        "weight",
        setup=f"{STATE}; given['weight'] = (value for value in W)",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        "weight: expected a plain array; got numpy.ma.MaskedArray. Convert it with numpy.asarray",
        "weight",
        "Convert it with numpy.asarray",
        f"{STATE}; given['weight'] = np.ma.masked_array(W, W > 2)",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        "bias: expected real numbers; got complex64",
        "bias",
        setup=f"{STATE}; given |= dict(weight=7 * W, bias=W * 1j)",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        "weight: expected real numbers; got str32",
        "weight",
        setup=f"{STATE}; given['weight'] = ['a', 'b', 'c']",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        VALUES.format("weight", "torch.Tensor"),
        "weight",
        setup=f"{STATE}; given['weight'] = torch.ones(3, device='meta')",
        needs="torch",
    ),
    *[
        Bad(
            "layer.load_state_dict(given)",
            TypeError,
            COUNT.format(got),
            "num_batches_tracked",
            setup=f"{STATE}; given |= dict(weight=7 * W, num_batches_tracked={value})",
        )
        for value, got in {
            "1.5": "array(1.5)",
            "-1": "array(-1)",
            "np.nan": "array(nan)",
            "np.inf": "array(inf)",
            "'many'": "array('many', dtype='<U4')",
            "2.0**70": "array(1.18059162e+21)",
        }.items()
    ],
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        COUNT.format("tensor(..., device='meta', size=())"),
        "num_batches_tracked",
        setup=f"{STATE}; given['num_batches_tracked'] = torch.ones((), device='meta')",
        needs="torch",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        "state_dict._metadata: expected a mapping of paths to versions; got 'x'",
        "state_dict._metadata",
        setup=f"{LAYER}; given = layer.state_dict(); given._metadata = 'x'",
    ),
    Bad(
        "layer.load_state_dict(given)",
        TypeError,
        "state_dict._metadata['']: expected {'version': an integer}; got {'version': 'two'}",
        "state_dict._metadata['']",
        setup=f"{LAYER}; given = layer.state_dict(); given._metadata[''] = dict(version='two')",
    ),
    Bad("layer.state_dict(3)", TypeError, "prefix: expected a string; got 3", "prefix", setup=LAYER),
]

FILES = [
    Bad("save(layer, 'net.pt')", ValueError, r"path: expected .*\.npz.*; got .*net\.pt.*", "path")._replace(
        setup=LAYER, pattern=True
    ),
    Bad("save(layer, 'net')", ValueError, r"path: expected .*\.npz.*; got .*net.*", "path")._replace(
        setup=LAYER, pattern=True
    ),
    Bad("load('net.pkl')", ValueError, r"path: expected .*\.npz.*; got .*net\.pkl.*", "path", pattern=True),
    Bad("save(3, 'net.npz')", TypeError, r"state: expected .*; got int.*", "state", pattern=True),
    Bad("save([layer], 'net.npz')", TypeError, r"state: expected .*; got list.*", "state")._replace(
        setup=LAYER, pattern=True
    ),
    Bad("save({1: W}, 'net.npz')", Exception, r"(?s)state: expected .*; got 1.*", "state", pattern=True),
    Bad(
        "load('missing.npz')", FileNotFoundError, r".*No such file or directory: '?.*missing\.npz'?", "missing.npz"
    )._replace(pattern=True),
    Bad("load('net.npz')", ValueError, r"(?s).*net\.npz: expected .*", "net.npz")._replace(
        setup="Path('net.npz').write_bytes(b'no archive')", pattern=True
    ),
    Bad("load('net.npz')", ValueError, r"(?s).*net\.npz: expected .*", "net.npz")._replace(
        setup="Path('net.npz').write_bytes(b'')", pattern=True
    ),
]

"""State dicts of single batch norms to and from Flax, Keras and ONNX, in mappings, lists and NumPy arrays alone.

========================  ====================  ==========================  ====================
arraybn and PyTorch       Flax                  Keras                       ONNX
========================  ====================  ==========================  ====================
``weight``                ``params/scale``      ``gamma``                   ``scale``
``bias``                  ``params/bias``       ``beta``                    ``B``
``running_mean``          ``batch_stats/mean``  ``moving_mean``             ``input_mean``
``running_var``           ``batch_stats/var``   ``moving_variance``         ``input_var``
``num_batches_tracked``   none                  none                        none
``momentum = 1 - decay``  ``momentum`` (0.99)   ``momentum`` (0.99)         ``momentum`` (0.9)
``eps`` (1e-5)            ``epsilon`` (1e-5)    ``epsilon`` (1e-3)          ``epsilon`` (1e-5)
``running_var``           biased                biased                      biased
========================  ====================  ==========================  ====================

The arguments (defaults in brackets) are not part of a state: pass `eps` and `momentum` to the layer. In Flax, Keras and
ONNX, momentum is the decay, the weight of the old value: `momentum = 1 - decay`, so 0.99 there is 0.01 here.

Those three update the running variance with the biased variance of a batch of n values, m2/n; arraybn and PyTorch
update with m2/(n − 1) (E4). Evaluation needs no conversion, so nothing is rescaled here; only further training
differs, by a factor n/(n − 1) in the variance of new batches. `num_batches_tracked` starts at 0, which matters only for
`momentum=None`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._arrays.copies import as_numpy
from ._arrays.namespaces import FLOATS, class_name, dtype_name
from .modules import StateDict

_OURS = ("weight", "bias", "running_mean", "running_var")
_FLAX = ("params/scale", "params/bias", "batch_stats/mean", "batch_stats/var")
_KERAS = ("gamma", "beta", "moving_mean", "moving_variance")
_ONNX = ("scale", "B", "input_mean", "input_var")


def from_flax(variables: Mapping[str, Any], *, prefix: str = "") -> StateDict:
    """Return the state dict of a Flax (linen) ``BatchNorm`` (biased variance; momentum here is 1 − momentum there).

    Parameters
    ----------
    variables : mapping
        ``{"params": {"scale": (C,), "bias": (C,)}, "batch_stats": {"mean": (C,), "var": (C,)}}``, of one layer. If only
        scale is missing (``use_scale=False``), weight is 1; if only bias is missing (``use_bias=False``), bias is 0. If
        both are missing, the state dict has no weight and no bias.
    prefix : str
        The path of the layer in the state dict, such as ``"bn1"``.

    Returns
    -------
    dict of str to numpy.ndarray
        For `Module.load_state_dict`, with num_batches_tracked 0.

    Raises
    ------
    TypeError, ValueError
        An entry is missing, unexpected, no array or not of shape (C,), or var is negative; the error names the entry.

    Examples
    --------
    >>> import numpy
    >>> from arraybn import interchange
    >>> one = numpy.ones(3)
    >>> list(interchange.from_flax({"params": {"scale": one, "bias": one}, "batch_stats": {"mean": one, "var": one}}))
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    flat: dict[str, Any] = {}
    for group, entries in _mapping("variables", variables).items():
        if group not in ("params", "batch_stats"):
            raise ValueError(f"variables: expected the groups params and batch_stats; got {group!r}")
        flat |= {f"{group}/{name}": value for name, value in _mapping(f"variables[{group!r}]", entries).items()}
    return _incoming(flat, _FLAX, prefix)


def to_flax(
    state_dict: Mapping[str, Any], *, prefix: str = "", scale: bool = True, bias: bool = True
) -> dict[str, dict[str, Any]]:
    """Return the variables of a Flax (linen) ``BatchNorm``, which updates with the biased variance, from a state dict.

    Parameters
    ----------
    state_dict : mapping of str to array
        The state dict of a layer with running statistics, or of a network with such a layer at `prefix`.
    prefix : str
        The path of the layer, such as ``"bn1"``.
    scale, bias : bool
        ``use_scale`` and ``use_bias`` of the Flax layer. False is allowed only if all weights are 1, or all biases 0.

    Returns
    -------
    dict
        ``{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}``; without params for ``affine=False``.

    Raises
    ------
    TypeError, ValueError
        A key is missing, unexpected, no array or not of shape (C,), or cannot be left out; the error names the key.

    Examples
    --------
    >>> import arraybn
    >>> from arraybn import interchange
    >>> interchange.to_flax(arraybn.BatchNorm1d(2, affine=False).state_dict())
    {'batch_stats': {'mean': array([0., 0.], dtype=float32), 'var': array([1., 1.], dtype=float32)}}
    """
    variables: dict[str, dict[str, Any]] = {}
    for path, value in _outgoing(state_dict, _FLAX, prefix, scale, bias).items():
        group, _, name = path.partition("/")
        variables.setdefault(group, {})[name] = value
    return variables


def from_keras(weights: Sequence[Any], *, prefix: str = "", scale: bool = True, center: bool = True) -> StateDict:
    """Return the state dict of a Keras ``BatchNormalization`` (biased variance; momentum here is 1 − momentum there).

    Parameters
    ----------
    weights : sequence of array (C,)
        ``layer.get_weights()`` or ``layer.weights``: gamma, beta, moving_mean, moving_variance.
    prefix : str
        The path of the layer in the state dict, such as ``"bn1"``.
    scale, center : bool
        The arguments of the Keras layer: True if gamma (beta) is among the weights. If only gamma is missing, weight is
        1; if only beta is missing, bias is 0. If both are missing, the state dict has no weight and no bias.

    Returns
    -------
    dict of str to numpy.ndarray
        For `Module.load_state_dict`, with num_batches_tracked 0.

    Raises
    ------
    TypeError, ValueError
        An entry is missing, unexpected, no array or not of shape (C,), moving_variance is negative, or an entry has a
        name (a Keras variable has) that is another one of the four; the error names the entry.

    Notes
    -----
    Keras' default epsilon is 1e-3, and its channels are on the last axis:
    ``BatchNorm2d(c, eps=1e-3, momentum=0.01, channel_axis=-1)``.

    Examples
    --------
    >>> import numpy
    >>> from arraybn import interchange
    >>> list(interchange.from_keras([numpy.zeros(3), numpy.ones(3)], scale=False, center=False, prefix="bn1"))
    ['bn1.running_mean', 'bn1.running_var', 'bn1.num_batches_tracked']
    """
    names = [name for name, there in zip(_KERAS, (scale, center, True, True), strict=True) if there]
    if not isinstance(weights, Sequence) or isinstance(weights, str | bytes):
        raise TypeError(f"weights: expected a list of arrays, {', '.join(names)}; got {class_name(weights)}")
    if len(weights) != len(names):
        raise ValueError(
            f"weights: expected {len(names)} arrays, {', '.join(names)}; got {len(weights)}."
            " scale and center say which of gamma and beta are there"
        )
    for name, value in zip(names, weights, strict=True):
        own = str(getattr(value, "name", name)).rpartition("/")[2].partition(":")[0]  # "bn1/gamma:0" in TensorFlow
        if own != name and own in _KERAS:
            raise ValueError(f"{name}: expected the order {', '.join(names)}; got {own!r} in this place")
    return _incoming(dict(zip(names, weights, strict=True)), _KERAS, prefix)


def to_keras(state_dict: Mapping[str, Any], *, prefix: str = "", scale: bool = True, center: bool = True) -> list[Any]:
    """Return the weights of a Keras ``BatchNormalization``, which updates with the biased variance, from a state dict.

    Parameters
    ----------
    state_dict : mapping of str to array
        The state dict of a layer with running statistics, or of a network with such a layer at `prefix`.
    prefix : str
        The path of the layer, such as ``"bn1"``.
    scale, center : bool
        The arguments of the Keras layer. False is allowed only if all weights are 1, or all biases 0.

    Returns
    -------
    list of numpy.ndarray
        gamma, beta, moving_mean, moving_variance, for ``layer.set_weights``; only the last two for ``affine=False``.

    Raises
    ------
    TypeError, ValueError
        A key is missing, unexpected, no array or not of shape (C,), or cannot be left out; the error names the key.

    Examples
    --------
    >>> import arraybn
    >>> from arraybn import interchange
    >>> interchange.to_keras(arraybn.BatchNorm1d(2).state_dict(), scale=False, center=False)
    [array([0., 0.], dtype=float32), array([1., 1.], dtype=float32)]
    """
    return list(_outgoing(state_dict, _KERAS, prefix, scale, center).values())


def from_onnx(inputs: Mapping[str, Any], *, prefix: str = "") -> StateDict:
    """Return the state dict of an ONNX ``BatchNormalization`` (biased variance; momentum here is 1 − momentum there).

    Parameters
    ----------
    inputs : mapping of str to array (C,)
        ``scale``, ``B``, ``input_mean`` and ``input_var``, as the operator's specification names them; these are
        ``node.input[1:]`` in this order.
    prefix : str
        The path of the layer in the state dict, such as ``"bn1"``.

    Returns
    -------
    dict of str to numpy.ndarray
        For `Module.load_state_dict`, with num_batches_tracked 0.

    Raises
    ------
    TypeError, ValueError
        An input is missing, unexpected, no array or not of shape (C,), or input_var is negative; the error names the
        input.

    Examples
    --------
    >>> import numpy
    >>> from arraybn import interchange
    >>> names = ("scale", "B", "input_mean", "input_var")
    >>> interchange.from_onnx({name: numpy.ones(2) for name in names}, prefix="bn1")["bn1.weight"]
    array([1., 1.])
    """
    inputs = _mapping("inputs", inputs)
    if missing := [name for name in _ONNX if name not in inputs]:
        raise ValueError(f"inputs: expected {', '.join(_ONNX)}; {missing[0]!r} is missing, got {list(inputs)}")
    return _incoming(inputs, _ONNX, prefix)


def to_onnx(state_dict: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Return the inputs of an ONNX ``BatchNormalization`` node, which updates with the biased variance.

    Parameters
    ----------
    state_dict : mapping of str to array
        The state dict of a layer with running statistics, or of a network with such a layer at `prefix`.
    prefix : str
        The path of the layer, such as ``"bn1"``.

    Returns
    -------
    dict of str to numpy.ndarray
        ``scale``, ``B``, ``input_mean``, ``input_var``, in the node's order; scale 1 and B 0 for ``affine=False``.

    Raises
    ------
    TypeError, ValueError
        A key is missing, unexpected, no array or not of shape (C,); the error names the key.

    Examples
    --------
    >>> import arraybn
    >>> from arraybn import interchange
    >>> list(interchange.to_onnx(arraybn.BatchNorm1d(2, affine=False).state_dict()))
    ['scale', 'B', 'input_mean', 'input_var']
    """
    inputs = _outgoing(state_dict, _ONNX, prefix)
    mean = inputs["input_mean"]
    return {"scale": np.ones_like(mean), "B": np.zeros_like(mean), **inputs}


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a mapping of names to arrays; got {class_name(value)}")
    return value


def _incoming(given: Mapping[str, Any], names: Sequence[str], prefix: str) -> StateDict:
    """Return the state dict from entries with the `names` of another library, in the order of `_OURS`."""
    arrays = dict(zip(_OURS, _arrays(given, names, names).values(), strict=True))
    mean, var = arrays["running_mean"], arrays["running_var"]
    with np.errstate(invalid="ignore"):  # NaN in bfloat16
        negative = var[var < 0]
    if negative.size:
        raise ValueError(f"{names[3]}: expected variances ≥ 0, in the order {', '.join(names)}; got {negative[0]}")
    if arrays["weight"] is None and arrays["bias"] is not None:
        arrays["weight"] = np.ones_like(mean)
    if arrays["bias"] is None and arrays["weight"] is not None:
        arrays["bias"] = np.zeros_like(mean)
    state, path = StateDict(), prefix.removesuffix(".")
    state._metadata = OrderedDict({path: {"version": 2}})
    arrays["num_batches_tracked"] = np.asarray(0, dtype=np.int64)
    state.update({f"{path}.{name}" if path else name: array for name, array in arrays.items() if array is not None})
    return state


def _outgoing(
    state_dict: Mapping[str, Any], names: Sequence[str], prefix: str, scale: bool = True, center: bool = True
) -> dict[str, Any]:
    """Return the entries with the `names` of another library, except those that are None or to be left out."""
    start = prefix.removesuffix(".") + "." if prefix else ""
    given = {key: value for key, value in _mapping("state_dict", state_dict).items() if key.startswith(start)}
    given.pop(f"{start}num_batches_tracked", None)
    keys = [start + name for name in _OURS]
    arrays = _arrays(given, keys, names)
    weight, bias = arrays[names[0]], arrays[names[1]]
    if weight is None and bias is not None:
        raise ValueError(f"{keys[0]}: expected a weight beside {keys[1]!r}; got none")
    if weight is not None and bias is None and center:  # of a layer with bias=False
        bias = arrays[names[1]] = np.zeros_like(weight)
    for key, array, wanted, neutral in ((keys[0], weight, scale, 1), (keys[1], bias, center, 0)):
        if array is not None and not wanted and not (array == neutral).all():
            raise ValueError(f"{key}: expected {neutral} in every channel, to be left out; got {array}")
    there = (scale, center, True, True)
    return {
        name: arrays[name] for name, wanted in zip(names, there, strict=True) if wanted and arrays[name] is not None
    }


def _arrays(given: Mapping[str, Any], keys: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Check the entries with these `keys` and return copies by `names`; None for a missing weight or bias."""
    if unexpected := [key for key in given if key not in keys]:
        raise ValueError(f"{unexpected[0]}: expected none but {', '.join(keys)}, of one batch norm; got this one too")
    arrays: dict[str, Any] = {}
    for key, name in reversed(list(zip(keys, names, strict=True))):  # the statistics first, because they define C
        if key in given:
            arrays[name] = _array(key, given[key])
        elif name in names[2:]:
            raise ValueError(f"{key}: expected an array (C,), of a layer with running statistics; got {list(given)}")
        else:
            arrays[name] = None
    shapes = {key: arrays[name].shape for key, name in zip(keys, names, strict=True) if arrays[name] is not None}
    wanted = shapes[keys[2]]
    for key, shape in shapes.items():
        if shape != wanted or len(shape) != 1:
            expected = f"{wanted}, that of {keys[2]}" if len(wanted) == 1 else "(C,)"
            raise ValueError(f"{key}: expected shape {expected}; got {shape}")
    return {name: arrays[name] for name in names}


def _array(key: str, value: Any) -> Any:
    array = np.array(as_numpy(key, value))
    if dtype_name(array.dtype) not in FLOATS:
        raise TypeError(f"{key}: expected an array of real floating numbers; got {class_name(value)} of {array.dtype}")
    return array

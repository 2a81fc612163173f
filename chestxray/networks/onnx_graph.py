"""A model of the study as ONNX, made from its `.keras` file without TensorFlow or Keras.

The repository holds its reference once, as a Keras file, and an answer should come within two seconds of the start.
Keras's own export needs TensorFlow, which takes longer to import than that, and so does every converter built on it.
A `.keras` file is a zip of JSON and HDF5, and the study's networks are made of some twenty kinds of layers, so they are
written out here one by one: batch normalisation is folded into the convolution before it, and a network that an
ensemble calls on the radiograph, on its mirror image and on both enlarged is called once on all.

Every network of the study ends in global average pooling and layers that are linear up to the class scores. There,
Grad-CAM at the last feature map (Selvaraju et al., ICCV 2017) is the class activation map (Zhou et al., CVPR 2016): a
sum of the feature map's channels with constant weights. So the graph gives such maps too, and needs no gradient.

It knows files of Keras models and ONNX, and nothing of radiographs on disk or of what runs the graph.
"""

from __future__ import annotations

import functools
import io
import json
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from chestxray.config import CLASSES, StudyError
from chestxray.networks.class_maps import resizing_matrix

INPUT = "radiograph"
PROBABILITIES, MEMBERS, OPINIONS, CLASS_MAPS = "probabilities", "members", "opinions", "class_maps_"
_OPSET, _IR_VERSION = 18, 8


class UnknownLayer(StudyError):
    """The model has a layer, or a setting of one, that this converter doesn't know; the message names it."""


def convert(path: Path) -> onnx.ModelProto:
    """Convert a model of the study.

    Args:
        path: a `.keras` file: grey values (N, side, side, 1) in 0–255 to seven probabilities.

    Returns:
        A graph with the input `radiograph`, (N, side, side, 1) float32 in 0–255, and these outputs, all float32:

        - `probabilities` (N, 7).
        - `members` (N, members, 7): each member's own answer, the mean of all looks where it is given several; of a
          single network its one answer.
        - `opinions` (N, members, 7): what the whole would answer if all members said what this one says.
        - `class_maps_1`, `class_maps_2` … (N, ways, 7, h, w): of each member, at its last feature map's size, for each
          way that it is asked (turned back where that is the mirror image, left out where it is enlarged), at least 0;
          `class_maps.heat_maps` makes heat-maps of them. Only where each member is a convolutional network that ends
          as the module says.

    Raises:
        UnknownLayer: see there.
        StudyError: there is no such file, it is no Keras model, or it takes or gives something else.
    """
    config, weights = read(path)
    with weights:
        try:
            return _whole(_Net.of(config, weights["layers"]), path)
        except UnknownLayer as error:
            raise UnknownLayer(f"{path}: {error}") from error
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            # What a config.json and weights that are not each other's lead to.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise UnknownLayer(f"{path}: a part cannot be read ({type(error).__name__}: {reason})") from error


def read(path: Path) -> tuple[dict[str, Any], h5py.File]:
    """A `.keras` file's configuration, and its weights opened for reading.

    Raises:
        StudyError: there is no such file, it is no Keras model, or it takes or gives something else than `convert`
            says.
    """
    if not path.is_file():
        raise StudyError(f"{path}: there is no such model; give a model.keras that the study saved")
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            weights = h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r")
    except Exception as error:  # zipfile, zlib, json and h5py each raise their own for a wrong or damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise StudyError(f"{path}: no Keras model ({reason}); give a model.keras that the study saved") from error
    _check(config, path)
    return config, weights


def _check(config: Any, path: Path) -> None:
    if not isinstance(config, dict) or config.get("class_name") != "Functional":
        raise UnknownLayer(f"{path}: is no functional model")
    try:
        parts = {layer["name"]: layer for layer in config["config"]["layers"]}
        inputs = _places(config["config"]["input_layers"])
        takes = tuple(parts[inputs[0].layer]["config"]["batch_shape"])
    except (KeyError, IndexError, TypeError) as error:
        raise UnknownLayer(f"{path}: its inputs cannot be read") from error
    if len(inputs) != 1 or not (len(takes) == 4 and takes[1] and takes[1] == takes[2] and takes[3] == 1):
        raise StudyError(f"{path}: takes {takes}, not grey squares (None, side, side, 1); give a model of this study")


# --- The Keras side -------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a value of a network comes from: which call of which layer."""

    layer: str
    call: int


@dataclass(frozen=True)
class _Layer:
    """A layer with what each of its calls takes: places, and numbers where an operation has a constant."""

    kind: str
    name: str
    config: dict[str, Any]
    calls: list[list[Any]]
    shapes: list[tuple]
    weights: list[np.ndarray]
    net: _Net | None = None


@dataclass(frozen=True)
class _Net:
    """A functional model: its layers by name, its input and its output."""

    name: str
    layers: dict[str, _Layer]
    inputs: list[_Place]
    outputs: list[_Place]

    @classmethod
    def of(cls, config: Mapping[str, Any], weights: h5py.Group) -> _Net:
        """Read a functional model's configuration.

        Args:
            config: of the model, as `config.json` has it.
            weights: the group `layers` of its weights.
        """
        inner = config["config"]
        stored = {group["vars"].attrs.get("name"): group for group in weights.values() if "vars" in group}
        layers = {}
        for entry in inner["layers"]:
            name, kind = entry["config"]["name"], entry["class_name"]
            calls, shapes = [], []
            for node in entry["inbound_nodes"]:
                taken = list(_taken([node["args"], {k: v for k, v in node["kwargs"].items() if k != "mask"}]))
                calls.append([value for value, _ in taken if not isinstance(value, bool)])
                shapes.append(next((shape for _, shape in taken if shape), ()))
            group = stored.get(name)
            if kind == "Functional":
                layers[name] = _Layer(kind, name, {}, calls, shapes, [], cls.of(entry, group["layers"]))
                continue
            arrays = [group["vars"][key][()] for key in sorted(group["vars"], key=int)] if group else []
            layers[name] = _Layer(kind, name, entry["config"], calls, shapes, arrays)
        return cls(inner["name"], layers, _places(inner["input_layers"]), _places(inner["output_layers"]))

    @functools.cached_property
    def takers(self) -> Counter[_Place]:
        """How often each value is used."""
        used = (part for layer in self.layers.values() for call in layer.calls for part in call)
        return Counter(part for part in (*used, *self.outputs) if isinstance(part, _Place))


def _places(entry: Any) -> list[_Place]:
    """Inputs or outputs of a model: `[layer, call, tensor]`, or a list of such."""
    entries = [entry] if entry and isinstance(entry[0], str) else entry
    return [_Place(layer, call) for layer, call, _ in entries]


def _taken(value: Any) -> Iterator[tuple[Any, tuple]]:
    """What a call takes, in order, each with its shape: places, and constants with ()."""
    if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
        layer, call, tensor = value["config"]["keras_history"]
        if tensor:
            raise UnknownLayer(f"layer {layer} gives several values")
        yield _Place(layer, call), tuple(value["config"]["shape"])
    elif isinstance(value, dict) and "class_name" in value:
        raise UnknownLayer(f"a layer takes a constant of the kind {value['class_name']}")
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _taken(part)
    elif isinstance(value, bool | int | float):
        yield value, ()


# --- The ONNX side --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """A value of the graph. Images lie as (N, C, H, W), and `shape` is that without N.

    `folds` are the names of the kernel and bias of the convolution that made it, where nothing came after.
    """

    name: str
    shape: tuple[int, ...]
    folds: tuple[str, str] | None = None


@dataclass
class _Graph:
    """The nodes and constants written so far."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    _number: int = 0

    def name(self, word: str) -> str:
        self._number += 1
        return f"{word}_{self._number}"

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        """Keep an array and give its name."""
        name = self.name("constant")
        self.constants[name] = np.ascontiguousarray(array, dtype=dtype)
        return name

    def add(self, kind: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> Any:
        """Write a node; the name of its output, or a list of names where it has several."""
        names = [self.name(kind.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def needed(self, outputs: Sequence[str]) -> list[onnx.NodeProto]:
        """The nodes that these outputs follow from, in order; the others and their constants are dropped."""
        wanted, kept = set(outputs), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted.update(node.input)
        self.constants = {name: array for name, array in self.constants.items() if name in wanted}
        return kept[::-1]


def _walk(
    graph: _Graph, net: _Net, inputs: Sequence[_Value], known: Mapping[_Place, _Value] | None = None
) -> dict[_Place, _Value]:
    """Write a network's layers, and give the value of every call.

    Args:
        graph: to write to.
        net: the network.
        inputs: what it is called with.
        known: values of calls that are not to be written.
    """
    values = dict(zip(net.inputs, inputs, strict=True)) | dict(known or {})
    left = [layer for layer in net.layers.values() if layer.calls and _Place(layer.name, 0) not in values]
    while left:
        waiting = []
        for layer in left:
            taken = [[values.get(part) if isinstance(part, _Place) else part for part in call] for call in layer.calls]
            if any(part is None for call in taken for part in call):
                waiting.append(layer)
                continue
            for number, value in enumerate(_called(graph, net, layer, taken)):
                values[_Place(layer.name, number)] = value
        if len(waiting) == len(left):
            raise UnknownLayer(f"layer {left[0].name} takes what follows from it")
        left = waiting
    return values


def _called(graph: _Graph, net: _Net, layer: _Layer, taken: list[list[Any]]) -> list[_Value]:
    """What each call of a layer gives."""
    if layer.net is not None:
        inner = layer.net
        joined = _joined(graph, taken)
        return _parted(graph, _walk(graph, inner, joined)[inner.outputs[0]], len(taken))
    write = _LAYERS.get(layer.kind)
    if write is None:
        raise UnknownLayer(f"layer {layer.name} is a {layer.kind}, which has no conversion to ONNX yet")
    if layer.config.get("data_format", "channels_last") != "channels_last":
        raise UnknownLayer(f"layer {layer.name} has its channels first")
    results = []
    for call in taken:
        # A convolution takes up what follows it only where nothing else follows it.
        lone = [net.takers[place] == 1 for place in layer.calls[0] if isinstance(place, _Place)]
        alone = [part if not isinstance(part, _Value) or all(lone) else _plain(part) for part in call]
        results.append(write(graph, layer, alone))
    return results


def _plain(value: _Value) -> _Value:
    return _Value(value.name, value.shape)


def _joined(graph: _Graph, calls: list[list[_Value]]) -> list[_Value]:
    """The inputs of several calls one below the other, so that one call answers all."""
    if len(calls) == 1:
        return [_plain(value) for value in calls[0]]
    return [
        _Value(graph.add("Concat", [value.name for value in values], axis=0), values[0].shape)
        for values in zip(*calls, strict=True)
    ]


def _parted(graph: _Graph, value: _Value, parts: int) -> list[_Value]:
    """The answers of several calls that `_joined` made one."""
    if parts == 1:
        return [_plain(value)]
    names = graph.add("Split", [value.name], outputs=parts, axis=0, num_outputs=parts)
    return [_Value(name, value.shape) for name in names]


# --- The layers -----------------------------------------------------------------------------------------------------


def _wants(layer: _Layer, **settings: Any) -> None:
    """Raise unless these settings are so, or left at what they are not mentioned for.

    Raises:
        UnknownLayer: a setting is another.
    """
    for name, expected in settings.items():
        found = layer.config.get(name, expected)
        if found != expected and list(np.atleast_1d(found)) != list(np.atleast_1d(expected)):
            raise UnknownLayer(f"layer {layer.name} ({layer.kind}) has {name} {found}; only {expected} is converted")


def _same(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    """Layers that do nothing at inference."""
    return taken[0]


def _activated(graph: _Graph, layer: _Layer, value: _Value) -> _Value:
    kind = layer.config.get("activation", "linear")
    if kind in ("linear", None):
        return value
    if kind == "relu6":
        return _clipped(graph, value, 0, 6)
    if kind in ("swish", "silu"):
        gate = graph.add("Sigmoid", [value.name])
        return _Value(graph.add("Mul", [value.name, gate]), value.shape)
    if kind not in _ACTIVATIONS:
        raise UnknownLayer(f"layer {layer.name} has the activation {kind}, which has no conversion to ONNX yet")
    if kind == "softmax":
        if len(value.shape) != 1:
            raise UnknownLayer(f"layer {layer.name} has a softmax over images")
        return _Value(graph.add("Softmax", [value.name], axis=-1), value.shape)
    return _Value(graph.add(_ACTIVATIONS[kind], [value.name]), value.shape)


_ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "softmax": "Softmax"}


def _activation(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    return _activated(graph, layer, taken[0])


def _softmax(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    _wants(layer, axis=-1)
    return _Value(graph.add("Softmax", [taken[0].name], axis=-1), taken[0].shape)


def _clipped(graph: _Graph, value: _Value, low: float | None, high: float | None) -> _Value:
    ends = ["" if end is None else graph.constant(end) for end in (low, high)]
    return _Value(graph.add("Clip", [value.name, *ends]), value.shape)


def _clip(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    return _clipped(graph, taken[0], layer.config["x_min"], layer.config["x_max"])


def _relu(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    _wants(layer, negative_slope=0.0, threshold=0.0)
    return _clipped(graph, taken[0], 0.0, layer.config.get("max_value"))


def _rescaling(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    value = taken[0]
    for kind, name, idle in (("Mul", "scale", 1.0), ("Add", "offset", 0.0)):
        numbers = np.asarray(layer.config[name], np.float32)
        if (numbers == idle).all():
            continue
        if numbers.ndim and len(value.shape) == 3:
            numbers = numbers.reshape(-1, 1, 1)
        value = _Value(graph.add(kind, [value.name, graph.constant(numbers)]), value.shape)
    return value


def _normalisation(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    """Batch normalisation by its running statistics: into the convolution before it, or as a product and a sum."""
    _wants(layer, axis=[-1], renorm=False)
    value = taken[0]
    factor, shift = _factor_and_shift(layer)
    if value.folds is not None:
        kernel, bias = value.folds
        columns = (-1, *[1] * (graph.constants[kernel].ndim - 1))
        graph.constants[kernel] = (graph.constants[kernel] * factor.reshape(columns)).astype(np.float32)
        graph.constants[bias] = (graph.constants[bias] * factor + shift).astype(np.float32)
        return _plain(value)
    columns = (-1, 1, 1) if len(value.shape) == 3 else (-1,)
    product = graph.add("Mul", [value.name, graph.constant(factor.reshape(columns))])
    return _Value(graph.add("Add", [product, graph.constant(shift.reshape(columns))]), value.shape)


def _factor_and_shift(layer: _Layer) -> tuple[np.ndarray, np.ndarray]:
    """What batch normalisation by running statistics multiplies each channel by, and then adds."""
    arrays = [array.astype(np.float64) for array in layer.weights]
    gamma = arrays.pop(0) if layer.config["scale"] else 1.0
    beta = arrays.pop(0) if layer.config["center"] else 0.0
    mean, variance = arrays
    factor = gamma / np.sqrt(variance + layer.config["epsilon"])
    return factor, beta - mean * factor


def _spread(layer: _Layer, size: int, window: int, stride: int) -> tuple[int, int, int]:
    """Padding before and after, and the result's size, of one axis (TensorFlow's rule)."""
    if layer.config["padding"] == "valid":
        return 0, 0, (size - window) // stride + 1
    if layer.config["padding"] != "same":
        raise UnknownLayer(f"layer {layer.name} has padding {layer.config['padding']}")
    result = math.ceil(size / stride)
    missing = max((result - 1) * stride + window - size, 0)
    return missing // 2, missing - missing // 2, result


def _window(layer: _Layer, value: _Value, sides: Sequence[int], strides: Sequence[int]) -> tuple[dict, list[int]]:
    """Attributes of a convolution or pooling, and the height and width that it leaves."""
    first, second = (_spread(layer, value.shape[1 + axis], sides[axis], strides[axis]) for axis in (0, 1))
    pads = [first[0], second[0], first[1], second[1]]
    return {"strides": list(strides), "pads": pads}, [first[2], second[2]]


def _convolution(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    """Ordinary and depthwise convolutions."""
    _wants(layer, dilation_rate=[1, 1])
    value, kernel = taken[0], layer.weights[0].astype(np.float32)
    strides = list(np.broadcast_to(layer.config["strides"], 2).tolist())
    attributes, left = _window(layer, value, kernel.shape[:2], strides)
    if layer.kind == "DepthwiseConv2D":
        groups = kernel.shape[2]
        kernel = kernel.transpose(2, 3, 0, 1).reshape(-1, 1, *kernel.shape[:2])
    else:
        groups = layer.config.get("groups", 1)
        kernel = kernel.transpose(3, 2, 0, 1)
    bias = layer.weights[1] if layer.config["use_bias"] else np.zeros(len(kernel))
    names = graph.constant(kernel), graph.constant(bias)
    made = graph.add("Conv", [value.name, *names], group=groups, kernel_shape=list(kernel.shape[2:]), **attributes)
    shape = (len(kernel), *left)
    activated = _activated(graph, layer, _Value(made, shape))
    return _Value(made, shape, names) if activated.name == made else activated


def _pooling(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    value = taken[0]
    sides, strides = (list(np.broadcast_to(layer.config[name], 2).tolist()) for name in ("pool_size", "strides"))
    attributes, left = _window(layer, value, sides, strides)
    kind = "AveragePool" if layer.kind == "AveragePooling2D" else "MaxPool"
    made = graph.add(kind, [value.name], kernel_shape=sides, **attributes)
    return _Value(made, (value.shape[0], *left))


def _mean_of_places(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    _wants(layer, keepdims=False)
    value = taken[0]
    pooled = graph.add("GlobalAveragePool", [value.name])
    return _Value(graph.add("Flatten", [pooled], axis=1), value.shape[:1])


def _flatten(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    value, name = taken[0], taken[0].name
    if len(value.shape) == 3:
        name = graph.add("Transpose", [name], perm=[0, 2, 3, 1])
    return _Value(graph.add("Flatten", [name], axis=1), (math.prod(value.shape),))


def _dense(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    value, kernel = taken[0], layer.weights[0]
    if len(value.shape) != 1 or kernel.ndim != 2:
        raise UnknownLayer(f"layer {layer.name} is a dense layer of more than vectors")
    inputs = [value.name, graph.constant(kernel)]
    if layer.config["use_bias"]:
        inputs.append(graph.constant(layer.weights[1]))
    return _activated(graph, layer, _Value(graph.add("Gemm", inputs), kernel.shape[1:]))


def _concatenation(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    _wants(layer, axis=-1)
    first = taken[0]
    # The last axis of Keras's images is the second of ONNX's.
    made = graph.add("Concat", [value.name for value in taken], axis=1)
    return _Value(made, (sum(value.shape[0] for value in taken), *first.shape[1:]))


def _average(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    return _Value(graph.add("Mean", [value.name for value in taken]), taken[0].shape)


def _flip(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    if not _mirrors(layer):
        raise UnknownLayer(f"layer {layer.name} turns axis {layer.config['axis']}; only the columns are converted")
    return _turned(graph, taken[0])


def _mirrors(layer: _Layer) -> bool:
    """Whether a layer turns left and right of images."""
    return layer.kind == "Flip" and layer.config["axis"] in (2, [2]) and len(layer.shapes[0]) == 4


def _turned(graph: _Graph, value: _Value) -> _Value:
    """(N, C, H, W) with left and right exchanged."""
    backwards = graph.constant(np.arange(value.shape[-1])[::-1], np.int64)
    return _Value(graph.add("Gather", [value.name, backwards], axis=3), value.shape)


def _log(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    return _Value(graph.add("Log", [taken[0].name]), taken[0].shape)


def _arithmetic(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    """Sums, differences, products and quotients of values of one shape and of numbers."""
    shapes = {part.shape for part in taken if isinstance(part, _Value)}
    if len(shapes) != 1:
        raise UnknownLayer(f"layer {layer.name} ({layer.kind}) takes values of several shapes")
    names = [part.name if isinstance(part, _Value) else graph.constant(part) for part in taken]
    made = names[0]
    for name in names[1:]:
        made = graph.add(_ARITHMETIC[layer.kind], [made, name])
    return _Value(made, shapes.pop())


_ARITHMETIC = {"Add": "Add", "Subtract": "Sub", "Multiply": "Mul", "TrueDivide": "Div", "Divide": "Div"}


def _resizing(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    _wants(layer, interpolation="bilinear", crop_to_aspect_ratio=False, pad_to_aspect_ratio=False)
    sides = layer.config["height"], layer.config["width"]
    return _resized(graph, taken[0], sides, layer.config.get("antialias", False))


def _cropping(graph: _Graph, layer: _Layer, taken: list[Any]) -> _Value:
    """(N, C, H, W) without rows and columns at the edges."""
    edges = np.array(layer.config["cropping"])
    channels, *sides = taken[0].shape
    starts, ends = edges[:, 0], np.array(sides) - edges[:, 1]
    limits = [graph.constant(places, np.int64) for places in (starts, ends, [2, 3])]
    made = graph.add("Slice", [taken[0].name, *limits])
    return _Value(made, (channels, *(ends - starts).tolist()))


def _resized(graph: _Graph, value: _Value, sides: Sequence[int], antialias: bool = False) -> _Value:
    """(N, C, H, W) resized, as a product with a matrix along each axis."""
    rows, columns = (resizing_matrix(size, side, antialias) for size, side in zip(value.shape[1:], sides, strict=True))
    narrow = graph.add("MatMul", [value.name, graph.constant(columns.T)])
    return _Value(graph.add("MatMul", [graph.constant(rows), narrow]), (value.shape[0], *sides))


_LAYERS: dict[str, Callable[[_Graph, _Layer, list[Any]], _Value]] = {
    **dict.fromkeys(("RandomFlip", "RandomRotation", "RandomTranslation", "RandomZoom"), _same),
    **dict.fromkeys(("RandomContrast", "RandomBrightness", "GaussianNoise", "Dropout", "SpatialDropout2D"), _same),
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
    **dict.fromkeys(("Conv2D", "DepthwiseConv2D"), _convolution),
    **dict.fromkeys(("AveragePooling2D", "MaxPooling2D"), _pooling),
    "Activation": _activation,
    "Average": _average,
    "BatchNormalization": _normalisation,
    "Clip": _clip,
    "Concatenate": _concatenation,
    "Cropping2D": _cropping,
    "Dense": _dense,
    "Flatten": _flatten,
    "Flip": _flip,
    "GlobalAveragePooling2D": _mean_of_places,
    "Identity": _same,
    "Log": _log,
    "ReLU": _relu,
    "Rescaling": _rescaling,
    "Resizing": _resizing,
    "Softmax": _softmax,
}
"""What writes each kind of layer."""


# --- The whole: members, opinions, heat-maps ------------------------------------------------------------------------


def _whole(net: _Net, path: Path) -> onnx.ModelProto:
    """The graph with all its outputs."""
    shape = tuple(net.layers[net.inputs[0].layer].config["batch_shape"])
    side, graph = shape[1], _Graph()
    # One channel: only the axes' names change, not the order of the pixels.
    image = graph.add("Reshape", [INPUT, graph.constant([-1, 1, side, side], np.int64)])
    start = _Value(image, (1, side, side))
    members = _members(net)
    values, maps = {}, []
    for member in members:
        values |= _asked(graph, net, member, start, maps)
    everything = _walk(graph, net, [start], values) if members else None
    if everything is None:
        everything = _walk(graph, net, [start])
        maps.append(_maps(graph, net, everything, [_Look(False, False)]))
    answer = everything[net.outputs[0]]
    if answer.shape != (len(CLASSES),) or len(net.outputs) != 1:
        gives = (None, *answer.shape)
        raise StudyError(f"{path}: gives {gives}, not {len(CLASSES)} probabilities; give a model of this study")
    outputs = {PROBABILITIES: answer.name}
    shapes = {PROBABILITIES: answer.shape} | dict.fromkeys((MEMBERS, OPINIONS), (max(1, len(members)), *answer.shape))
    if members:
        outputs |= _each(graph, net, members, start, values)
    else:
        alone = graph.add("Unsqueeze", [answer.name, graph.constant([1], np.int64)])
        outputs |= {MEMBERS: alone, OPINIONS: graph.add("Identity", [alone])}
    if None not in maps:
        outputs |= {f"{CLASS_MAPS}{number}": made.name for number, made in enumerate(maps, start=1)}
        shapes |= {f"{CLASS_MAPS}{number}": made.shape for number, made in enumerate(maps, start=1)}
    return _model(graph, outputs, shapes, side)


class _Look(NamedTuple):
    """How an ensemble shows a radiograph to a member.

    Attributes:
        turned: as its mirror image.
        moved: with its shadows in other places for another reason, so that what is seen there has no heat-map.
    """

    turned: bool
    moved: bool


def _members(net: _Net) -> list[_Layer]:
    """The networks that an ensemble joins: those that take a look at the radiograph and give the classes."""
    found = []
    for layer in net.layers.values():
        if layer.net is None or len(layer.shapes[0]) != 4:
            continue
        if not all(len(call) == 1 and _look(net, call[0]) is not None for call in layer.calls):
            return []
        found.append(layer)
    return found


def _look(net: _Net, place: _Place) -> _Look | None:
    """How a place shows the radiograph; None for anything else."""
    if place in net.inputs:
        return _Look(False, False)
    layer = net.layers[place.layer]
    moves = layer.kind in ("Cropping2D", "Resizing")
    if not (moves or _mirrors(layer)) or len(layer.calls) != 1:
        return None
    before = _look(net, layer.calls[0][0])
    if before is None:
        return None
    return before._replace(moved=True) if moves else before._replace(turned=not before.turned)


def _shown(graph: _Graph, net: _Net, place: _Place, start: _Value) -> _Value:
    """The radiograph as a place of `_look` shows it."""
    if place in net.inputs:
        return start
    layer = net.layers[place.layer]
    return _LAYERS[layer.kind](graph, layer, [_shown(graph, net, layer.calls[0][0], start)])


def _asked(graph: _Graph, net: _Net, member: _Layer, start: _Value, maps: list[_Value | None]) -> dict[_Place, _Value]:
    """Write one member, called once on all that it is asked; its answers, and its heat-maps appended to `maps`."""
    inner = member.net
    looks = [_look(net, call[0]) for call in member.calls]
    views = [[_shown(graph, net, call[0], start)] for call in member.calls]
    values = _walk(graph, inner, _joined(graph, views))
    answers = _parted(graph, values[inner.outputs[0]], len(views))
    maps.append(_maps(graph, inner, values, looks))
    return {_Place(member.name, number): answer for number, answer in enumerate(answers)}


def _each(
    graph: _Graph, net: _Net, members: list[_Layer], start: _Value, values: Mapping[_Place, _Value]
) -> dict[str, str]:
    """The outputs `members` and `opinions`: one below the other they go through what joins the members."""
    own = []
    for member in members:
        answers = [values[_Place(member.name, number)].name for number in range(len(member.calls))]
        own.append(graph.add("Mean", answers) if len(answers) > 1 else answers[0])
    stacked = graph.add("Concat", own, axis=0) if len(own) > 1 else own[0]
    same = _Value(stacked, (len(CLASSES),))
    joined = _walk(graph, net, [start], dict.fromkeys(values, same))[net.outputs[0]].name
    shape = graph.constant([len(members), -1, len(CLASSES)], np.int64)
    return {
        output: graph.add("Transpose", [graph.add("Reshape", [name, shape])], perm=[1, 0, 2])
        for output, name in ((MEMBERS, stacked), (OPINIONS, joined))
    }


def _maps(graph: _Graph, net: _Net, values: Mapping[_Place, _Value], looks: Sequence[_Look]) -> _Value | None:
    """A network's class maps (N, ways, 7, h, w); None where it doesn't end as it must.

    Args:
        graph: to write to.
        net: the network.
        values: of all its calls.
        looks: the ways that it is asked.
    """
    found = _linear_end(net)
    if found is None:
        return None
    place, weights = found
    features = values[place]
    kernel = graph.constant(weights.T.reshape(len(CLASSES), -1, 1, 1))
    # Divided by the number of cells, the weights are the gradient's mean; but maps are scaled anyway.
    maps = graph.add("Relu", [graph.add("Conv", [features.name, kernel], kernel_shape=[1, 1])])
    shape = (len(CLASSES), *features.shape[1:])
    ways = zip(_parted(graph, _Value(maps, shape), len(looks)), looks, strict=True)
    second = graph.constant([1], np.int64)
    straight = [_turned(graph, way) if look.turned else way for way, look in ways if not look.moved]
    apart = [graph.add("Unsqueeze", [way.name, second]) for way in straight]
    return _Value(graph.add("Concat", apart, axis=1), (len(straight), *shape))


def _linear_end(net: _Net) -> tuple[_Place, np.ndarray] | None:
    """The last feature map of a network, and the (C, 7) weights that lead from its mean to the class scores.

    The scores are what the last sigmoid or softmax takes. None where there is none, or another path leads there.
    """
    last = net.layers[net.outputs[0].layer]
    if last.kind == "Dense" and last.config["activation"] in ("sigmoid", "softmax"):
        found = _through(_traced(net, last.calls[0][0]), last)
    elif last.kind == "Softmax" or (last.kind == "Activation" and last.config["activation"] in ("sigmoid", "softmax")):
        found = _traced(net, last.calls[0][0])
    else:
        found = None
    if found is None or found[1] is None:
        return None
    place, layer = found[0], net.layers[found[0].layer]
    if layer.kind == "AveragePooling2D":
        size = layer.shapes[0][1:3]
        pool, strides = (np.broadcast_to(layer.config[name], 2).tolist() for name in ("pool_size", "strides"))
        if pool != strides or any(extent % window for extent, window in zip(size, pool, strict=True)):
            return None
        place = layer.calls[0][0]
    return (place, found[1]) if _convolves(net, place) else None


def _traced(net: _Net, place: _Place) -> tuple[_Place, np.ndarray | None] | None:
    """What is averaged over its places, and by which matrix the average leads here; None where that isn't linear.

    The matrix is None where it is the average itself.
    """
    layer = net.layers[place.layer]
    if not layer.calls:
        return None
    if layer.kind == "GlobalAveragePooling2D":
        return layer.calls[0][0], None
    if layer.kind == "Concatenate":
        parts = [_traced(net, part) for part in layer.calls[0]]
        if any(part is None or part[1] is None for part in parts):
            return _deepest(net, layer, parts)
        if len({place for place, _ in parts}) != 1:
            return None
        return parts[0][0], np.concatenate([matrix for _, matrix in parts], axis=1)
    if layer.kind == "BatchNormalization":
        return _scaled_by(_traced(net, layer.calls[0][0]), layer)
    linear = layer.config.get("activation", "linear") == "linear"
    if layer.kind not in ("Dropout", "Activation", "Dense") or not linear:
        return None
    found = _traced(net, layer.calls[0][0])
    return _through(found, layer) if layer.kind == "Dense" else found


def _deepest(
    net: _Net, concatenation: _Layer, parts: list[tuple[_Place, np.ndarray | None] | None]
) -> tuple[_Place, np.ndarray] | None:
    """Of what was pooled side by side, the average of the map that nothing beside it is computed from.

    That is the deepest map, and a heat-map is of it; what is pooled in front of it adds to a score by another way. None
    where there isn't one such map, or where more than its average is taken of it.

    Args:
        net: the network.
        concatenation: what puts the parts side by side.
        parts: what `_traced` found of each.
    """
    places = concatenation.calls[0]
    widths = [net.layers[place.layer].shapes[0][-1] for place in places]
    found = []
    for number, part in enumerate(parts):
        others = [*places[:number], *places[number + 1 :]]
        if part is not None and part[1] is None and not any(_leads(net, part[0], place) for place in others):
            found.append((part[0], np.eye(sum(widths))[sum(widths[:number]) :][: widths[number]]))
    return found[0] if len(found) == 1 else None


def _leads(net: _Net, start: _Place, end: _Place) -> bool:
    """Whether `end` is computed from `start`."""
    seen, waiting = set(), [end]
    while waiting:
        place = waiting.pop()
        if place == start:
            return True
        if place not in seen:
            seen.add(place)
            waiting += [part for call in net.layers[place.layer].calls for part in call if isinstance(part, _Place)]
    return False


def _through(found: tuple[_Place, np.ndarray | None] | None, dense: _Layer) -> tuple[_Place, np.ndarray] | None:
    """What `_traced` found, and then a dense layer."""
    if found is None:
        return None
    kernel = dense.weights[0].astype(np.float64)
    return found[0], kernel if found[1] is None else found[1] @ kernel


def _scaled_by(
    found: tuple[_Place, np.ndarray | None] | None, layer: _Layer
) -> tuple[_Place, np.ndarray | None] | None:
    """What `_traced` found, and then a batch normalisation."""
    if found is None:
        return None
    factor = _factor_and_shift(layer)[0]
    return found[0], (np.eye(len(factor)) if found[1] is None else found[1]) * factor


def _convolves(net: _Net, place: _Place) -> bool:
    """Whether a convolution lies before this place."""
    layer = net.layers[place.layer]
    if layer.kind in ("Conv2D", "DepthwiseConv2D"):
        return True
    if layer.net is not None and _convolves(layer.net, layer.net.outputs[0]):
        return True
    return any(_convolves(net, part) for call in layer.calls for part in call if isinstance(part, _Place))


def _model(
    graph: _Graph, outputs: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], side: int
) -> onnx.ModelProto:
    """Give the outputs their names and put the file together."""
    for name, source in outputs.items():
        graph.nodes.append(helper.make_node("Identity", [source], [name], name=name))
    nodes = graph.needed(list(outputs))
    image = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", side, side, 1])
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shapes[name]]) for name in outputs]
    constants = [numpy_helper.from_array(array, name) for name, array in graph.constants.items()]
    body = helper.make_graph(nodes, "chestxray", [image], given, constants)
    model = helper.make_model(
        body, producer_name="chestxray", opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )
    helper.set_model_props(model, {"classes": ",".join(CLASSES), "warning": "This is a study, not a medical device."})
    return model

"""ONNX: Keras models of the study as graphs for onnxruntime.

Keras's own export goes through tf2onnx, which is looking for a maintainer. The study's networks are made of some twenty
kinds of layers, written out here one by one in the order in which Keras calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from chestxray.config import ALL_LABELS, CLASSES, SIX_LABELS, StudyError
from chestxray.networks.class_activation import resizing_matrix

INPUT = "radiograph"
_OPSET, _IR_VERSION = 18, 8
_TINY = 1e-7  # the least probability, as in `evaluation.posterior`


class UnknownLayer(StudyError):
    """The model has a layer, or a setting of one, that this converter doesn't know."""


def convert(model: keras.Model) -> onnx.ModelProto:
    """Convert a functional model.

    Args:
        model: grey values (N, side, side, 1) in 0–255 to a dictionary of outputs, as `ensemble.answering` makes it.

    Returns:
        A graph with the input `radiograph` and the model's outputs, by the same names and of the same shapes, float32.

    Raises:
        UnknownLayer: a layer, or a setting of one, has no conversion.
    """
    graph, side = _Graph(), model.input_shape[1]
    # Of one channel only the axes' names change, not the order of the pixels.
    image = graph.add("Reshape", [INPUT, graph.constant([-1, 1, side, side], np.int64)])
    written = keras.tree.pack_sequence_as(model.output, _walk(graph, model, [image]))
    given = []
    for name, tensor in model.output.items():
        value, rank = written[name], len(tensor.shape)
        if rank >= 4:  # the channels behind the image's axes again
            value = graph.add("Transpose", [value], perm=[*range(rank - 3), rank - 2, rank - 1, rank - 3])
        graph.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        given.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *tensor.shape[1:]]))
    taken = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", side, side, 1])
    constants = [numpy_helper.from_array(array, name) for name, array in graph.constants.items()]
    body = helper.make_graph(graph.nodes, "chestxray", [taken], given, constants)
    made = helper.make_model(
        body, producer_name="chestxray", opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )
    names = {"findings": ",".join(ALL_LABELS), "classes": ",".join(CLASSES)}
    helper.set_model_props(made, names | {"warning": "This is a study, not a medical device."})
    return made


def calibrate(
    made: onnx.ModelProto, temperature: float, shares: np.ndarray, temperatures: np.ndarray, biases: np.ndarray
) -> None:
    """Make `classes` of a converted model the posterior at class shares, and add `present`, the findings calibrated.

    Args:
        made: from `convert`; changed in place.
        temperature: of the classes' log-probabilities at equal shares, above 0.
        shares: (7,) of the classes, with sum 1.
        temperatures: (6,) of the log-odds of `SIX_FINDINGS`, above 0.
        biases: (6,) added to the log-odds after that.
    """
    body, graph = made.graph, _Graph(prefix="calibrated_")
    next(node for node in body.node if "classes" in node.output).output[0] = trained = "classes_as_trained"
    least, most, one = (graph.constant(value) for value in (_TINY, 1 - _TINY, 1.0))
    logs = graph.add("Log", [graph.add("Clip", [trained, least, one])])
    with np.errstate(divide="ignore"):  # a class with share 0 has the logarithm minus infinity
        weights = graph.constant(np.log(shares))
    scaled = graph.add("Add", [graph.add("Mul", [logs, graph.constant(1 / temperature)]), weights])
    six = graph.add("Gather", ["findings", graph.constant(SIX_LABELS, np.int64)], axis=1)
    clipped = graph.add("Clip", [six, least, most])
    odds = graph.add("Sub", [graph.add("Log", [clipped]), graph.add("Log", [graph.add("Sub", [one, clipped])])])
    turned = graph.add("Add", [graph.add("Mul", [odds, graph.constant(1 / temperatures)]), graph.constant(biases)])
    graph.nodes.append(helper.make_node("Softmax", [scaled], ["classes"], axis=1))
    graph.nodes.append(helper.make_node("Sigmoid", [turned], ["present"]))
    body.node.extend(graph.nodes)
    body.initializer.extend(numpy_helper.from_array(array, name) for name, array in graph.constants.items())
    body.output.append(helper.make_tensor_value_info("present", TensorProto.FLOAT, ["N", len(SIX_LABELS)]))


@dataclass
class _Graph:
    """The nodes and constants written so far. Images lie in it as (N, C, H, W), where Keras has (N, H, W, C)."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    prefix: str = ""

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        """Add an array and give its name."""
        name = f"{self.prefix}constant_{len(self.constants)}"
        self.constants[name] = np.ascontiguousarray(array, dtype=dtype)
        return name

    def add(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Write a node; the name of its output."""
        name = f"{self.prefix}{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name


@dataclass(frozen=True)
class _Call:
    """One call of a layer or operation: its inputs' names in the graph, and their shapes as Keras has them."""

    layer: Any
    names: list[str]
    shapes: list[tuple]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def rank(self) -> int:
        return len(self.shapes[0])


def _walk(graph: _Graph, model: keras.Model, inputs: Sequence[str]) -> list[str]:
    """Write a model's calls; the names of its outputs in the graph."""
    values = {id(tensor): name for tensor, name in zip(model.inputs, inputs, strict=True)}
    results = []  # references, so that no other tensor takes an id

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        result = layer(*args, **kwargs)
        results.append(keras.tree.flatten(result))
        everything = keras.tree.flatten([args, {name: part for name, part in kwargs.items() if name != "mask"}])
        taken = [part for part in everything if isinstance(part, keras.KerasTensor)]
        names = [values[id(part)] for part in taken]
        if isinstance(layer, keras.Sequential):
            written = names
            for part in layer.layers:
                written = [_write(graph, _Call(part, written, [tuple(part.input.shape)]))]
        elif isinstance(layer, keras.Model):
            written = _walk(graph, layer, names)
        else:
            written = [_write(graph, _Call(layer, names, [tuple(part.shape) for part in taken]))]
        values.update(zip(map(id, results[-1]), written, strict=True))
        return result

    # The public way to walk a model's calls is to rebuild it around the same layers.
    rebuilt = keras.models.clone_model(model, model.input, clone_function=lambda layer: layer, call_function=call)
    return [values[id(tensor)] for tensor in rebuilt.outputs]


def _write(graph: _Graph, call: _Call) -> str:
    """Write one call; the name of its output."""
    kind = type(call.layer).__name__
    if kind not in _LAYERS:
        raise UnknownLayer(f"layer {call.layer.name} is a {kind}, which has no conversion to ONNX yet")
    _expect(call, data_format="channels_last")
    return _LAYERS[kind](graph, call)


def _expect(call: _Call, **settings: Any) -> None:
    """Raise `UnknownLayer` unless these settings of a layer are so, as far as it has them."""
    layer = call.layer
    for name, expected in settings.items():
        found = getattr(layer, name, expected)
        if found != expected and list(np.atleast_1d(found)) != list(np.atleast_1d(expected)):
            what = f"layer {layer.name} ({type(layer).__name__}) has {name} {found}"
            raise UnknownLayer(f"{what}; only {expected} is converted")


# --- The layers -----------------------------------------------------------------------------------------------------


def _activated(graph: _Graph, layer: Any, name: str, rank: int) -> str:
    """A value after the activation of a layer."""
    kind = keras.activations.serialize(layer.activation)
    if kind not in ("linear", "relu", "sigmoid", "softmax") or (kind == "softmax" and rank > 2):
        raise UnknownLayer(f"layer {layer.name} has the activation {kind}, which has no conversion to ONNX yet")
    return name if kind == "linear" else graph.add(kind.capitalize(), [name])


def _relu(graph: _Graph, call: _Call) -> str:
    _expect(call, negative_slope=0.0, threshold=0.0)
    largest = call.layer.max_value
    return graph.add("Clip", [call.name, graph.constant(0.0), "" if largest is None else graph.constant(largest)])


def _rescaling(graph: _Graph, call: _Call) -> str:
    if call.rank != 4:
        raise UnknownLayer(f"layer {call.layer.name} is a Rescaling of something else than images")
    scale, offset = (graph.constant(np.reshape(value, (-1, 1, 1))) for value in (call.layer.scale, call.layer.offset))
    return graph.add("Add", [graph.add("Mul", [call.name, scale]), offset])


def _normalisation(graph: _Graph, call: _Call) -> str:
    """Batch normalisation by its running statistics."""
    layer = call.layer
    _expect(call, axis=[call.rank - 1] if layer.axis != -1 else -1, renorm=False, scale=True, center=True)
    weights = (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
    return graph.add("BatchNormalization", [call.name, *map(graph.constant, weights)], epsilon=layer.epsilon)


_PADDING = {"same": "SAME_UPPER", "valid": "VALID"}


def _convolution(graph: _Graph, call: _Call) -> str:
    """Ordinary and depthwise convolutions."""
    _expect(call, dilation_rate=[1, 1])
    layer = call.layer
    kernel = np.asarray(layer.kernel)
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        groups = kernel.shape[2]
        kernel = kernel.transpose(2, 3, 0, 1).reshape(-1, 1, *kernel.shape[:2])
    else:
        groups, kernel = layer.groups, kernel.transpose(3, 2, 0, 1)
    inputs = [call.name, graph.constant(kernel)]
    if layer.use_bias:
        inputs.append(graph.constant(layer.bias))
    sides = {"kernel_shape": list(kernel.shape[2:]), "strides": np.broadcast_to(layer.strides, 2).tolist()}
    made = graph.add("Conv", inputs, group=groups, auto_pad=_PADDING[layer.padding], **sides)
    return _activated(graph, layer, made, call.rank)


def _pooling(graph: _Graph, call: _Call) -> str:
    layer = call.layer
    kind = "AveragePool" if isinstance(layer, keras.layers.AveragePooling2D) else "MaxPool"
    sides = {"kernel_shape": list(layer.pool_size), "strides": list(layer.strides)}
    return graph.add(kind, [call.name], auto_pad=_PADDING[layer.padding], **sides)


def _global_average(graph: _Graph, call: _Call) -> str:
    _expect(call, keepdims=False)
    return graph.add("Flatten", [graph.add("GlobalAveragePool", [call.name])], axis=1)


def _flatten(graph: _Graph, call: _Call) -> str:
    name = graph.add("Transpose", [call.name], perm=[0, 2, 3, 1]) if call.rank == 4 else call.name
    return graph.add("Flatten", [name], axis=1)


def _dense(graph: _Graph, call: _Call) -> str:
    layer = call.layer
    if call.rank != 2:
        raise UnknownLayer(f"layer {layer.name} is a dense layer of more than vectors")
    weights = [layer.kernel, layer.bias] if layer.use_bias else [layer.kernel]
    made = graph.add("Gemm", [call.name, *map(graph.constant, weights)])
    return _activated(graph, layer, made, call.rank)


def _merged(graph: _Graph, call: _Call) -> str:
    kind = type(call.layer).__name__
    if len(set(call.shapes)) > 1:
        raise UnknownLayer(f"layer {call.layer.name} ({kind}) takes values of several shapes")
    return graph.add({"Add": "Sum", "Average": "Mean"}[kind], call.names)


def _concatenation(graph: _Graph, call: _Call) -> str:
    _expect(call, axis=-1)
    return graph.add("Concat", call.names, axis=1)  # channels are the second axis of the graph's images, and of vectors


def _stack(graph: _Graph, call: _Call) -> str:
    _expect(call, axis=1)
    second = graph.constant([1], np.int64)
    return graph.add("Concat", [graph.add("Unsqueeze", [name, second]) for name in call.names], axis=1)


def _resizing(graph: _Graph, call: _Call) -> str:
    """A product with a matrix along each axis."""
    _expect(call, interpolation="bilinear", crop_to_aspect_ratio=False, pad_to_aspect_ratio=False)
    layer = call.layer
    rows = resizing_matrix(call.shapes[0][1], layer.height, layer.antialias)
    columns = resizing_matrix(call.shapes[0][2], layer.width, layer.antialias)
    narrow = graph.add("MatMul", [call.name, graph.constant(columns.T)])
    return graph.add("MatMul", [graph.constant(rows), narrow])


_IDLE = "RandomFlip", "RandomRotation", "RandomTranslation", "RandomZoom", "RandomContrast", "RandomBrightness"
_IDLE += "GaussianNoise", "Dropout", "SpatialDropout2D", "Identity"  # layers that do nothing in prediction
_LAYERS: dict[str, Callable[[_Graph, _Call], str]] = {
    **dict.fromkeys(_IDLE, lambda graph, call: call.name),
    **dict.fromkeys(("Add", "Average"), _merged),
    **dict.fromkeys(("Conv2D", "DepthwiseConv2D"), _convolution),
    **dict.fromkeys(("AveragePooling2D", "MaxPooling2D"), _pooling),
    "Activation": lambda graph, call: _activated(graph, call.layer, call.name, call.rank),
    "BatchNormalization": _normalisation,
    "Concatenate": _concatenation,
    "Dense": _dense,
    "Flatten": _flatten,
    "GlobalAveragePooling2D": _global_average,
    "ReLU": _relu,
    "Rescaling": _rescaling,
    "Resizing": _resizing,
    "Stack": _stack,
}
"""What writes each kind of layer or operation."""

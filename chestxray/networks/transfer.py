"""Transfer: the dense baseline, the small CNN, and networks on a pretrained backbone.

Every model takes raw 8-bit grey pixels, (N, H, W, 1) in 0–255, and gives seven probabilities in the order of
`CLASSES`: scaling, augmentation, resizing and the three channels are layers inside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import scipy.special
from keras import layers

from chestxray.config import ALL_LABELS, CLASSES, StudyError
from chestxray.networks import efficientnet
from chestxray.networks.layers import BatchNormalization, Identity


def dense(image_size: int, units: Sequence[int] = (256, 128, 64)) -> keras.Model:
    """The baseline without convolutions: flattened pixels through dense layers.

    Args:
        image_size: H = W in pixels.
        units: widths of the hidden layers.
    """
    pixels = layers.Input((image_size, image_size, 1), name="radiograph")
    x = layers.Rescaling(1 / 127.5, offset=-1, name="scale")(pixels)
    x = layers.Flatten()(x)
    for width in units:
        x = layers.Dense(width, activation="relu")(x)
    return keras.Model(pixels, _probabilities(x), name="dense")


def cnn(image_size: int, filters: Sequence[int] = (16, 32, 64, 96, 128, 192), dropout: float = 0.3) -> keras.Model:
    """A convolutional network from scratch: blocks of convolution, BatchNorm, ReLU and average pooling, then dropout.

    Args:
        image_size: H = W in pixels; it is halved by each block down to 2.
        filters: channels of the convolutions.
        dropout: share of the pooled features left out while training, 0 to 1.
    """
    pixels = layers.Input((image_size, image_size, 1), name="radiograph")
    x = layers.Rescaling(1 / 127.5, offset=-1, name="scale")(pixels)
    for channels in filters:
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        # The default momentum of .99 needs hundreds of steps; a small run has fewer.
        x = BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
        if x.shape[1] > 2:
            x = layers.AveragePooling2D(2)(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(dropout)(x)
    return keras.Model(pixels, _probabilities(x), name="cnn")


POOLING: dict[str, str] = {"last": "", "stages": r"block\d+", "blocks": r"block\d+[a-z]+(?=_)"}
"""Where `transfer` can pool, and how the names of the layers of such a part of a backbone begin."""


@dataclass(frozen=True)
class Transfer:
    """A pretrained backbone with two heads on the same pooled features.

    Attributes:
        augment: the augmentation layers, active only while training.
        backbone: the EfficientNet, RGB 0–255 to the last feature map.
        preprocess: radiograph to the backbone's input, (N, H, W, 3); without augmentation when not training.
        features: radiograph to pooled features, (N, C); likewise. Pooled at several stages, they pass through the layer
            `standardised`, which leaves them as they are until `standardise` is called.
        pooled: what these features are, in their order: the name of the layer that pools, and how many it gives.
        findings: radiograph to the labels `ALL_LABELS`, (N, 15) sigmoids: the preliminary stage.
        head: pooled features to seven probabilities: fitted first, on features computed once.
        classifier: radiograph to seven probabilities: what is fine-tuned and saved. Where `transfer` was given
            log-odds, both heads are blended into one sigmoid per class, since findings occur together: .5 says that the
            radiograph makes the class neither more nor less likely. Else they are the class head's and sum to 1.
    """

    augment: tuple[keras.Layer, ...]
    backbone: keras.Model
    preprocess: keras.Model
    features: keras.Model
    pooled: tuple[tuple[str, int], ...]
    findings: keras.Model
    head: keras.Model
    classifier: keras.Model

    def standardise(self, features: np.ndarray) -> np.ndarray:
        """Let each pooled feature have mean 0 and variance 1 over radiographs, within the network from now on.

        Means and variances of maps are of many sizes; a step of an optimizer, which is as long for each weight, would
        be too short for some and too long for others.

        Args:
            features: (N, C) as `features` gives them before the first call.

        Returns:
            (N, C) as it gives them afterwards, float32.

        Raises:
            StudyError: the network was built with `pooling="last"`.
        """
        layer = next((layer for layer in self.features.layers if layer.name == "standardised"), None)
        if layer is None:
            raise StudyError("only what is pooled at several stages is standardised; give pooling='blocks' or 'stages'")
        mean, variance = features.mean(axis=0, dtype="float64"), features.var(axis=0, dtype="float64")
        # A floor, so that a nearly constant feature isn't blown up.
        variance = np.maximum(variance, 1e-4 * np.median(variance))
        layer.set_weights([mean, variance])
        return ((features - mean) / np.sqrt(variance + layer.epsilon)).astype("float32")

    def divide(self, frozen: int) -> tuple[keras.Model, keras.Model]:
        """Cut the network for the findings behind its first blocks, where those are frozen.

        Args:
            frozen: how many of the backbone's blocks come before the cut, 1 to 7.

        Returns:
            Radiographs (N, H, W, 1) to the maps of the last of those blocks (N, h, w, C), without augmentation; and
            such maps to the labels `ALL_LABELS`, (N, 15). They share their layers with `findings`.

        Raises:
            StudyError: the backbone has no such block.
        """
        blocks = [layer for layer in self.backbone.layers if _block(layer) == frozen]
        if not blocks:
            raise StudyError(f"frozen {frozen}: the backbone has blocks 1 to 7; give one of them")
        maps = blocks[-1].output
        first = keras.Model(self.backbone.input, maps, name="frozen_blocks")
        rest = keras.Model(maps, self.backbone.output, name="other_blocks")
        whole = self.findings.get_layer
        augmented = (self.augment[-1] if self.augment else whole("to_float")).output
        between = layers.Input(maps.shape[1:], name="maps")
        outputs = rest(between)
        for name in ("average_pooling", "dropout", "findings"):
            outputs = whole(name)(outputs)
        before = keras.Model(augmented, first(whole("three_channels").output))
        return before, keras.Model(between, _sigmoid(outputs))

    def train_backbone(self, trainable: bool, frozen: int = 0) -> None:
        """Freeze or unfreeze the backbone; BatchNorm follows.

        Args:
            trainable: whether its weights may change.
            frozen: how many of the backbone's seven blocks, from the image on, stay frozen all the same. The first two
                have the largest feature maps: freezing them halves the time of a step, and their filters for edges and
                spots serve photographs and radiographs alike (Raghu et al., Transfusion, NeurIPS 2019).
        """
        self.backbone.trainable = trainable
        early = trainable and frozen > 0
        for layer in self.backbone.layers:
            early = early and _block(layer) <= frozen
            layer.trainable = trainable and not early


def _block(layer: keras.Layer) -> int:
    """The block of an EfficientNet that a layer belongs to, 1 to 7; 0 before the first, as far as names tell."""
    return int(layer.name[len("block")]) if layer.name.startswith("block") else 0


def transfer(
    backbone: str,
    image_size: int,
    member_size: int | None = None,
    augment: Sequence[keras.Layer] = (),
    dropout: float = 0.3,
    weights: str | None = "imagenet",
    drop_connect_rate: float = 0.2,
    bn_momentum: float = 0.9,
    log_odds: np.ndarray | None = None,
    share: float = 0.75,
    pooling: str = "last",
) -> Transfer:
    """Put augmentation, a backbone, global average pooling and heads together.

    Args:
        backbone: a key of `efficientnet.BACKBONES`.
        image_size: H = W of the radiographs, pixels.
        member_size: side of the backbone's input, pixels; the radiograph is resized inside the model.
        augment: layers of `augmentation.layers`, active only while training.
        dropout: share of the pooled features left out while training, 0 to 1.
        weights: `imagenet`, None, or a weights file.
        drop_connect_rate: stochastic depth at the last block (Huang et al., ECCV 2016), 0 to 1.
        bn_momentum: BatchNorm's momentum; the backbones' own .99 adapts too slowly to grey radiographs in few steps.
        log_odds: (7,) of `samples.class_log_odds`: the classifier then blends both heads: the weighted mean of their
            logits, the findings' less these, through one sigmoid per class. None leaves the findings' head out, for it
            was not trained.
        share: weight of the findings' head in that mean, 0 to 1; the class head has the rest.
        pooling: where to pool: `last`, the mean of each channel behind the last layer; `blocks`, behind every block of
            the backbone, or `stages`, behind the last block of each of its seven stages. The features are the mean of
            each channel and, but for the last map, its variance over positions, since a small shadow hardly moves the
            mean. The last map has its mean alone, so that its class map stays a weighted sum of its channels. The last
            convolution, which only mixes the channels of the last block, is left out of both.

    Raises:
        StudyError: the backbone is unknown or its weights cannot be had, or the pooling is unknown.
    """
    if pooling not in POOLING:
        raise StudyError(f"pooling {pooling!r} is unknown; there are: {', '.join(POOLING)}")
    member_size = member_size or image_size
    net = efficientnet.build(backbone, (member_size, member_size, 3), weights, drop_connect_rate, bn_momentum)
    pixels = layers.Input((image_size, image_size, 1), name="radiograph")
    x = layers.Rescaling(1.0, name="to_float")(pixels)
    for layer in augment:
        x = layer(x)
    if member_size != image_size:
        x = layers.Resizing(member_size, member_size, interpolation="bilinear", antialias=True)(x)
    x = channels = layers.Concatenate(name="three_channels")([x, x, x])
    x, parts = _pooled(net, x, pooling)
    width = x.shape[-1]
    drop = layers.Dropout(dropout, dtype="float32", name="dropout")
    dropped = drop(x)
    classes = layers.Dense(len(CLASSES), dtype="float32", name="classes")
    findings = layers.Dense(len(ALL_LABELS), dtype="float32", name="findings")(dropped)
    pooled = layers.Input((width,), name="pooled")
    logits = classes(dropped)
    together = _softmax(logits) if log_odds is None else _sigmoid(_blend(findings, logits, log_odds, share))
    return Transfer(
        augment=tuple(augment),
        backbone=net,
        preprocess=keras.Model(pixels, channels, name="preprocess"),
        features=keras.Model(pixels, x, name="features"),
        pooled=tuple((name, part.shape[-1]) for name, part in parts.items()),
        findings=keras.Model(pixels, _sigmoid(findings), name="all_findings"),
        head=keras.Model(pooled, _softmax(classes(drop(pooled))), name="head"),
        classifier=keras.Model(pixels, together, name="classifier"),
    )


def _pooled(
    net: keras.Model, images: keras.KerasTensor, pooling: str
) -> tuple[keras.KerasTensor, dict[str, keras.KerasTensor]]:
    """The pooled features (N, C) of a backbone, and their parts by the layers that pool."""
    if pooling == "last":
        x = layers.GlobalAveragePooling2D(name="average_pooling")(net(images))
        return x, {"average_pooling": x}
    standardised = BatchNormalization(center=False, scale=False, epsilon=1e-7, dtype="float32", name="standardised")
    standardised.trainable = False
    parts = _pooled_within(net, images, POOLING[pooling])
    # Float32 whatever the compute type, here and beyond: float16 ends at 65,504, and a variance may be above.
    return standardised(layers.Concatenate(name="pooled", dtype="float32")(list(parts.values()))), parts


def _pooled_within(net: keras.Model, images: keras.KerasTensor, ends: str) -> dict[str, keras.KerasTensor]:
    """The means of a backbone's feature maps behind each part that `ends` matches, and all variances but the last."""
    last = {found[0]: layer for layer in net.layers if (found := re.match(ends, layer.name))}
    *inner, deepest = last.values()
    made = {}
    # A map that is pooled and goes on has a branch for each: a gradient summed over three readers isn't repeatable.

    def call(layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:
        maps = made[layer] = layer(*args, **kwargs)
        return Identity(name=f"beyond_{layer.name}")(maps) if layer in inner else maps

    # The same layers around other images: a model called as a layer would hide its feature maps.
    keras.models.clone_model(net, images, clone_function=lambda layer: layer, call_function=call)
    means, variances = {}, {}
    for name, layer in last.items():
        maps = made[layer] if layer is deepest else Identity(name=f"pooled_{name}")(made[layer])
        mean = means[f"average_pooling_{name}"] = _mean(maps, f"average_pooling_{name}")
        if layer is not deepest:
            variances[f"variance_{name}"] = _variance(maps, mean, name)
    return means | variances


def _mean(maps: keras.KerasTensor, name: str) -> keras.KerasTensor:
    # Float32 whatever the compute type: a variance is the small difference of two of them.
    return layers.GlobalAveragePooling2D(name=name, dtype="float32")(maps)


def _variance(maps: keras.KerasTensor, mean: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Each channel's variance over positions, of stock layers: the mean of the squares less the mean's square."""
    maps, mean = Identity(name=f"squared_{name}")(maps), Identity(name=f"less_{name}", dtype="float32")(mean)
    squares = _mean(layers.Multiply(dtype="float32")([maps, maps]), f"squares_{name}")
    square = layers.Multiply(dtype="float32")([mean, mean])
    return layers.Subtract(name=f"variance_{name}", dtype="float32")([squares, square])


def _blend(
    findings: keras.KerasTensor, logits: keras.KerasTensor, log_odds: np.ndarray, share: float
) -> keras.KerasTensor:
    """The weighted mean of two heads' logits: of the findings' less their log-odds, and of the classes'.

    It is a dense layer with fixed weights, so that the saved model is made of stock layers.
    """
    if not 0 <= share <= 1:
        raise StudyError(f"share {share}: give 0 (the class head alone) to 1 (the findings' head alone)")
    kernel = np.zeros((len(ALL_LABELS) + len(CLASSES), len(CLASSES)), "float32")
    for column, name in enumerate(CLASSES):
        kernel[ALL_LABELS.index(name), column] = share
        kernel[len(ALL_LABELS) + column, column] = 1 - share
    blend = layers.Dense(len(CLASSES), dtype="float32", trainable=False, name="blend")
    both = blend(layers.Concatenate(name="both_heads", dtype="float32")([findings, logits]))
    blend.set_weights([kernel, -share * np.asarray(log_odds, "float32")])
    return both


def combine_heads(both: np.ndarray, log_odds: np.ndarray, share: float) -> np.ndarray:
    """The probabilities of the classifier of `transfer` with another weight of its heads.

    Args:
        both: (N, 15 + 7) logits of the findings' head and of the class head: the output of the layer `both_heads`.
        log_odds: (7,) of `samples.class_log_odds`.
        share: weight of the findings' head, 0 to 1.

    Returns:
        (N, 7) probabilities.
    """
    findings = both[:, [ALL_LABELS.index(name) for name in CLASSES]] - log_odds
    return scipy.special.expit(share * findings + (1 - share) * both[:, len(ALL_LABELS) :])


def _sigmoid(logits: keras.KerasTensor) -> keras.KerasTensor:
    return layers.Activation("sigmoid", dtype="float32")(logits)


def _softmax(logits: keras.KerasTensor) -> keras.KerasTensor:
    # Float32 whatever the compute type: float16 softmax loses the small probabilities that AUROC ranks by.
    return layers.Activation("softmax", dtype="float32")(logits)


def _probabilities(x: keras.KerasTensor) -> keras.KerasTensor:
    return _softmax(layers.Dense(len(CLASSES), dtype="float32", name="classes")(x))

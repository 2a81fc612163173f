"""The study's networks: the dense baseline, the small CNN, and transfer from a pretrained backbone.

Every model takes raw 8-bit grey pixels, (N, H, W, 1) in 0–255, and gives seven probabilities in the order of
`CLASSES`: scaling, augmentation, resizing and the three channels are layers inside it. The module knows layers and
nothing of files or of fitting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import keras
from keras import layers

from chestxray import backbones
from chestxray.config import CLASSES, NIH_FINDINGS


def dense(image_size: int, units: Sequence[int] = (256, 128, 64)) -> keras.Model:
    """The baseline that sees no neighbourhood: flattened pixels through dense layers.

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
    """A convolutional network from scratch: a convolution, BatchNorm, ReLU and average pooling a block, then dropout.

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
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
        if x.shape[1] > 2:
            x = layers.AveragePooling2D(2)(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(dropout)(x)
    return keras.Model(pixels, _probabilities(x), name="cnn")


@dataclass(frozen=True)
class Transfer:
    """A pretrained backbone with two heads on the same pooled features.

    Attributes:
        backbone: the EfficientNet, RGB 0–255 to the last feature map.
        features: radiograph to pooled features, (N, C); without augmentation when not training.
        findings: radiograph to the fourteen findings of ChestX-ray14, (N, 14) sigmoids: the preliminary stage.
        head: pooled features to seven probabilities: fitted first, on features computed once.
        classifier: radiograph to seven probabilities: what is saved.
    """

    backbone: keras.Model
    features: keras.Model
    findings: keras.Model
    head: keras.Model
    classifier: keras.Model

    def train_backbone(self, trainable: bool) -> None:
        """Let the backbone's weights change or hold them; BatchNorm follows."""
        self.backbone.trainable = trainable


def transfer(
    backbone: str,
    image_size: int,
    member_size: int | None = None,
    augment: Sequence[keras.Layer] = (),
    dropout: float = 0.3,
    weights: str | None = "imagenet",
    drop_connect_rate: float = 0.2,
    bn_momentum: float = 0.9,
) -> Transfer:
    """Put augmentation, a backbone, global average pooling and heads together.

    Args:
        backbone: a key of `backbones.BACKBONES`.
        image_size: H = W of the radiographs, pixels.
        member_size: side that the backbone sees, pixels; the radiograph is resized inside the model.
        augment: layers of `augmentation.layers`, active only while training.
        dropout: share of the pooled features left out while training, 0 to 1.
        weights: `imagenet`, None, or a weights file.
        drop_connect_rate: stochastic depth at the last block (Huang et al., ECCV 2016), 0 to 1.
        bn_momentum: BatchNorm's momentum; the backbones' own .99 adapts too slowly to grey radiographs in few steps.

    Raises:
        StudyError: the backbone is unknown or its weights cannot be had.
    """
    member_size = member_size or image_size
    net = backbones.build(backbone, (member_size, member_size, 3), weights, drop_connect_rate, bn_momentum)
    pixels = layers.Input((image_size, image_size, 1), name="radiograph")
    x = layers.Rescaling(1.0, name="to_float")(pixels)
    for layer in augment:
        x = layer(x)
    if member_size != image_size:
        x = layers.Resizing(member_size, member_size, interpolation="bilinear", antialias=True)(x)
    x = layers.Concatenate(name="three_channels")([x, x, x])
    x = layers.GlobalAveragePooling2D(name="average_pooling")(net(x))
    width = x.shape[-1]
    drop = layers.Dropout(dropout, name="dropout")
    classes = layers.Dense(len(CLASSES), activation="softmax", dtype="float32", name="classes")
    findings = layers.Dense(len(NIH_FINDINGS), activation="sigmoid", dtype="float32", name="findings")
    pooled = layers.Input((width,), name="pooled")
    return Transfer(
        backbone=net,
        features=keras.Model(pixels, x, name="features"),
        findings=keras.Model(pixels, findings(drop(x)), name="all_findings"),
        head=keras.Model(pooled, classes(drop(pooled)), name="head"),
        classifier=keras.Model(pixels, classes(drop(x)), name="classifier"),
    )


def _probabilities(x: keras.KerasTensor) -> keras.KerasTensor:
    # Float32 whatever the compute type: float16 softmax loses the small probabilities that AUROC ranks by.
    return layers.Dense(len(CLASSES), activation="softmax", dtype="float32", name="classes")(x)

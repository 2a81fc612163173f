"""The study's networks: the dense baseline, the small CNN, and transfer from a pretrained backbone.

Every model takes raw 8-bit grey pixels, (N, H, W, 1) in 0–255, and gives seven probabilities in the order of
`CLASSES`: scaling, augmentation, resizing and the three channels are layers inside it. The module knows layers and
nothing of files or of fitting.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import scipy.special
from keras import layers

from chestxray import backbones
from chestxray.config import CLASSES, QUESTIONS, StudyError
from chestxray.normalization import BatchNormalization


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
        x = BatchNormalization(momentum=0.9)(x)
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
        augment: the layers that vary radiographs while training.
        backbone: the EfficientNet, RGB 0–255 to the last feature map.
        features: radiograph to pooled features, (N, C); without augmentation when not training.
        findings: radiograph to the answers to `QUESTIONS`, (N, 15) sigmoids: the preliminary stage.
        head: pooled features to seven probabilities: fitted first, on features computed once.
        classifier: radiograph to seven probabilities: what is fine-tuned and saved. Where `transfer` was given
            log-odds both heads answer, one class at a time, since findings occur together: .5 says that the radiograph
            makes the class neither more nor less likely. Else the class head alone answers and they sum to 1.
    """

    augment: tuple[keras.Layer, ...]
    backbone: keras.Model
    features: keras.Model
    findings: keras.Model
    head: keras.Model
    classifier: keras.Model

    def divide(self, hold: int) -> tuple[keras.Model, keras.Model]:
        """Cut the network for the findings behind its first blocks, where those are held.

        Args:
            hold: how many of the backbone's blocks come before the cut, 1 to 7.

        Returns:
            Radiographs (N, H, W, 1) to the maps of the last of those blocks (N, h, w, C), without augmentation; and
            such maps to the answers to `QUESTIONS`, (N, 15). They share their layers with `findings`.

        Raises:
            StudyError: the backbone has no such block.
        """
        blocks = [layer for layer in self.backbone.layers if _block(layer) == hold]
        if not blocks:
            raise StudyError(f"hold {hold}: the backbone has blocks 1 to 7; give one of them")
        maps = blocks[-1].output
        first = keras.Model(self.backbone.input, maps, name="held_blocks")
        rest = keras.Model(maps, self.backbone.output, name="other_blocks")
        whole = self.findings.get_layer
        varied = (self.augment[-1] if self.augment else whole("to_float")).output
        between = layers.Input(maps.shape[1:], name="maps")
        answers = rest(between)
        for name in ("average_pooling", "dropout", "findings"):
            answers = whole(name)(answers)
        held = keras.Model(varied, first(whole("three_channels").output))
        return held, keras.Model(between, _sigmoid(answers))

    def train_backbone(self, trainable: bool, hold: int = 0) -> None:
        """Let the backbone's weights change or hold them; BatchNorm follows.

        Args:
            trainable: whether they may change.
            hold: how many of the backbone's seven blocks, from the image on, are held all the same. The first two see
                the largest feature maps: to hold them halves the time of a step, for their edges and spots are those of
                photographs too (Raghu et al., Transfusion, NeurIPS 2019).
        """
        self.backbone.trainable = trainable
        held = 0
        if hold:
            held = len(list(itertools.takewhile(lambda layer: _block(layer) <= hold, self.backbone.layers)))
        for place, layer in enumerate(self.backbone.layers):
            layer.trainable = trainable and place >= held


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
    every_block: bool = False,
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
        log_odds: (7,) of `inputs.log_odds`: the classifier then answers by both heads, with the weighted mean of their
            logits, the findings' less these, through a sigmoid a class. None leaves the findings' head out, for it was
            not trained.
        share: weight of the findings' head in that mean, 0 to 1; the class head has the rest.
        every_block: pool behind every block of the backbone and put the means side by side, for a head that shall
            decide what depth tells most. The last convolution, which only mixes what the last block gives, is left out.

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
    x = _pooled_blocks(net, x) if every_block else layers.GlobalAveragePooling2D(name="average_pooling")(net(x))
    width = x.shape[-1]
    drop = layers.Dropout(dropout, name="dropout")
    dropped = drop(x)
    classes = layers.Dense(len(CLASSES), dtype="float32", name="classes")
    answers = layers.Dense(len(QUESTIONS), dtype="float32", name="findings")(dropped)
    pooled = layers.Input((width,), name="pooled")
    logits = classes(dropped)
    together = _softmax(logits) if log_odds is None else _sigmoid(_blend(answers, logits, log_odds, share))
    return Transfer(
        augment=tuple(augment),
        backbone=net,
        features=keras.Model(pixels, x, name="features"),
        findings=keras.Model(pixels, _sigmoid(answers), name="all_findings"),
        head=keras.Model(pooled, _softmax(classes(drop(pooled))), name="head"),
        classifier=keras.Model(pixels, together, name="classifier"),
    )


def _pooled_blocks(net: keras.Model, images: keras.KerasTensor) -> keras.KerasTensor:
    """The means of a backbone's feature maps behind each of its blocks, side by side, the deepest last."""
    last = {found[0]: layer for layer in net.layers if (found := re.match(r"block\d+[a-z]+(?=_)", layer.name))}
    made = {}

    def call(layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:
        made[layer] = layer(*args, **kwargs)
        return made[layer]

    # The same layers around other images: a model called as a layer would hide its maps from whoever explains it.
    keras.models.clone_model(net, images, clone_function=lambda layer: layer, call_function=call)
    means = [layers.GlobalAveragePooling2D(name=f"average_pooling_{name}")(made[layer]) for name, layer in last.items()]
    return layers.Concatenate(name="pooled_blocks")(means)


def _blend(
    answers: keras.KerasTensor, logits: keras.KerasTensor, log_odds: np.ndarray, share: float
) -> keras.KerasTensor:
    """The weighted mean of two heads' logits: of the findings' answers less their usual log-odds, and of the classes.

    It is a dense layer with given weights, so that the saved model is made of stock layers.
    """
    if not 0 <= share <= 1:
        raise StudyError(f"share {share}: give 0 (the class head alone) to 1 (the findings' head alone)")
    kernel = np.zeros((len(QUESTIONS) + len(CLASSES), len(CLASSES)), "float32")
    for place, name in enumerate(CLASSES):
        kernel[QUESTIONS.index(name), place] = share
        kernel[len(QUESTIONS) + place, place] = 1 - share
    blend = layers.Dense(len(CLASSES), dtype="float32", trainable=False, name="blend")
    both = blend(layers.Concatenate(name="both_heads")([answers, logits]))
    blend.set_weights([kernel, -share * np.asarray(log_odds, "float32")])
    return both


def answer(both: np.ndarray, log_odds: np.ndarray, share: float) -> np.ndarray:
    """What the classifier of `transfer` would say with another weight of its heads.

    Args:
        both: (N, 15 + 7) logits of the findings' head and of the class head: the output of the layer `both_heads`.
        log_odds: (7,) of `inputs.log_odds`.
        share: weight of the findings' head, 0 to 1.

    Returns:
        (N, 7) probabilities.
    """
    asked = both[:, [QUESTIONS.index(name) for name in CLASSES]] - log_odds
    return scipy.special.expit(share * asked + (1 - share) * both[:, len(QUESTIONS) :])


def _sigmoid(logits: keras.KerasTensor) -> keras.KerasTensor:
    return layers.Activation("sigmoid", dtype="float32")(logits)


def _softmax(logits: keras.KerasTensor) -> keras.KerasTensor:
    # Float32 whatever the compute type: float16 softmax loses the small probabilities that AUROC ranks by.
    return layers.Activation("softmax", dtype="float32")(logits)


def _probabilities(x: keras.KerasTensor) -> keras.KerasTensor:
    return _softmax(layers.Dense(len(CLASSES), dtype="float32", name="classes")(x))

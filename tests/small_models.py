"""Small models of the study's form, for tests: `findings` (15 sigmoids) and `classes` (7, softmax) of radiographs."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
from keras import layers

from chestxray.config import ALL_LABELS, CLASSES


def outputs(features: keras.KerasTensor) -> dict[str, keras.KerasTensor]:
    """The two heads of a single network, the findings' behind dropout."""
    dropped = layers.Dropout(0.3)(features)
    findings = layers.Dense(len(ALL_LABELS), activation="sigmoid", dtype="float32", name="findings")(dropped)
    classes = layers.Dense(len(CLASSES), activation="softmax", dtype="float32", name="classes")(features)
    return {"findings": findings, "classes": classes}


def shaken(model: keras.Model, seed: int) -> keras.Model:
    """The same with weights, biases and running statistics that no layer would have at its start."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "seed" not in weight.path:
            values = rng.normal(0, 0.3 / np.sqrt(max(1, np.prod(weight.shape[:-1]))), weight.shape)
            weight.assign(np.abs(values) + 0.5 if "variance" in weight.path else weight.numpy() + values)
    return model


def backbone(side: int) -> keras.Model:
    """Two convolutions, RGB (side, side, 3) in 0–255 to a feature map of a quarter of the side and 8 channels."""
    image = layers.Input((side, side, 3))
    x = layers.Conv2D(6, 3, strides=2, padding="same", use_bias=False)(layers.Rescaling(1 / 128, -1.0)(image))
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    return keras.Model(image, layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(x), name="backbone")


def network(side: int, seed: int = 1, member_side: int | None = None, net: keras.Model | None = None) -> keras.Model:
    """A network on a backbone, as `3a` builds it.

    Args:
        side: of the radiographs, pixels.
        seed: seeds the weights.
        member_side: of the backbone's input, pixels; resized to it within the model, where it is another than `side`.
        net: the backbone; that of `backbone` if None.
    """
    pixels = layers.Input((side, side, 1), name="radiograph")
    turned = [layers.RandomRotation(0.02), layers.RandomContrast(0.1, value_range=(0, 255))]
    x = keras.Sequential(turned, name="augmentation")(pixels)
    if member_side not in (None, side):
        x = layers.Resizing(member_side, member_side, antialias=True)(x)
    net = net or backbone(member_side or side)
    x = net(layers.Concatenate(name="three_channels")([x, x, x]))
    return shaken(keras.Model(pixels, outputs(layers.GlobalAveragePooling2D(name="pooled")(x)), name="network"), seed)


def cnn(side: int, seed: int = 2) -> keras.Model:
    """A small convolutional network without a backbone."""
    pixels = layers.Input((side, side, 1), name="radiograph")
    x = layers.Rescaling(1 / 127.5, offset=-1)(pixels)
    for channels in (4, 8):
        x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)))
        x = layers.AveragePooling2D(2)(x)
    return shaken(keras.Model(pixels, outputs(layers.GlobalAveragePooling2D(name="pooled")(x)), name="cnn"), seed)


def dense(side: int, seed: int = 3) -> keras.Model:
    """A network without convolutions, and so without class maps."""
    pixels = layers.Input((side, side, 1), name="radiograph")
    x = layers.Dense(8, activation="relu")(layers.Flatten()(layers.Rescaling(1 / 127.5, offset=-1)(pixels)))
    return shaken(keras.Model(pixels, outputs(x), name="dense"), seed)


def ensemble(members: Sequence[keras.Model], head: bool = False) -> keras.Model:
    """An ensemble as notebook 4.4 builds it.

    Args:
        members: networks of one input side; they are renamed.
        head: whether a dense layer on all members' classes gives the classes, instead of their mean.
    """
    pixels = layers.Input(members[0].input_shape[1:], name="radiograph")
    for number, member in enumerate(members, start=1):
        member.name = f"member_{number}"
    own = [member(pixels) for member in members]
    findings = layers.Average(name="findings")([each["findings"] for each in own])
    classes = [each["classes"] for each in own]
    if head:
        together = layers.Concatenate(name="concatenated")(classes)
        joined = layers.Dense(len(CLASSES), activation="softmax", name="classes")(together)
    else:
        joined = layers.Average(name="classes")(classes)
    return keras.Model(pixels, {"findings": findings, "classes": joined}, name="ensemble")

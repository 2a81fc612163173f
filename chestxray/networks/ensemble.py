"""The graph of an ensemble: members in one model, their looks at a radiograph, and the head that joins them."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
from keras import layers

from chestxray.config import CLASSES

BORDER = 1 / 32
"""How much of each side of a radiograph is left out where it is looked at enlarged."""

HELD = (1e-6, 1 - 1e-6)
"""How near to 0 and 1 a probability may come before its log-odds are taken."""


def head(members: int, units: int = 32, dropout: float = 0.3) -> keras.Model:
    """The study's head: concatenated probabilities, a dense layer, dropout, softmax.

    Args:
        members: how many models are joined.
        units: width of the dense layer.
        dropout: share of its outputs left out while training, 0 to 1.
    """
    concatenation = layers.Input((members * len(CLASSES),), name="concatenated")
    x = layers.Dense(units, activation="relu", dtype="float32", name="joint")(concatenation)
    x = layers.Dropout(dropout, dtype="float32")(x)
    answer = layers.Dense(len(CLASSES), activation="softmax", dtype="float32", name="classes")(x)
    return keras.Model(concatenation, answer, name="head")


def weighted_mean(weights: Sequence[float]) -> keras.Model:
    """A head that gives each member's probabilities a fixed weight.

    Args:
        weights: one a member, at least 0, with sum 1.
    """
    concatenation = layers.Input((len(weights) * len(CLASSES),), name="concatenated")
    mean = layers.Dense(len(CLASSES), use_bias=False, trainable=False, dtype="float32", name="weighted_mean")
    model = keras.Model(concatenation, mean(concatenation), name="weighted_mean")
    mean.set_weights([np.concatenate([np.eye(len(CLASSES), dtype="float32") * weight for weight in weights])])
    return model


def join(
    members: Sequence[keras.Model],
    fitted_head: keras.Model | None,
    mirrored: bool = False,
    offsets: np.ndarray | None = None,
    enlarged: bool = False,
) -> keras.Model:
    """One model: a radiograph goes to every frozen member, and the head or the plain mean joins their probabilities.

    Args:
        members: models of radiographs (N, H, W, 1) in 0–255 to seven probabilities.
        fitted_head: a fitted `head` or a `weighted_mean`, or None for the plain mean.
        mirrored: test-time augmentation: a member's answer is its mean over the radiograph and its mirror image.
        offsets: (7,) of `fit_offsets`, added to the log-odds at the end; None adds none.
        enlarged: likewise, and over what `enlarge` makes of each of these.

    Returns:
        A model of the same input with seven probabilities. Members compute as they were made to; what joins them is
        float32 whatever the compute type, since float16 loses the small probabilities that AUROC ranks by.
    """
    pixels = layers.Input(members[0].input_shape[1:], name="radiograph")
    looks = _looks(pixels, mirrored, enlarged)
    outputs = []
    for number, member in enumerate(members, start=1):
        # Two members may carry the same name, and a Keras model needs every layer's name once.
        member.name = f"member_{number}"
        member.trainable = False
        answers = [member(look) for look in looks]
        if len(answers) > 1:
            answers = [layers.Average(dtype="float32", name=f"member_{number}_all_looks")(answers)]
        outputs += answers
    if fitted_head is None:
        joined = layers.Average(dtype="float32", name="mean")(outputs)
    else:
        fitted_head.trainable = False
        joined = fitted_head(layers.Concatenate(dtype="float32", name="concatenated")(outputs))
    return keras.Model(pixels, joined if offsets is None else _shift(joined, offsets), name="ensemble")


def look_by_look(member: keras.Model) -> keras.Model:
    """A member's answer at each look, so that it is asked once where several ways to look are compared.

    Args:
        member: a model of radiographs (N, H, W, 1) in 0–255 to seven probabilities.

    Returns:
        A model of the same input with (N, 4, 7) probabilities: of the radiograph as it is, its mirror image, the
        radiograph enlarged and the mirror image of that. What `join` takes the mean of is the first one, the first two
        with `mirrored`, and all with `enlarged` too.
    """
    pixels = layers.Input(member.input_shape[1:], name="radiograph")
    answers = [keras.ops.cast(member(look), "float32") for look in _looks(pixels, mirrored=True, enlarged=True)]
    return keras.Model(pixels, keras.ops.stack(answers, axis=1))


def _looks(pixels: keras.KerasTensor, mirrored: bool, enlarged: bool) -> list[keras.KerasTensor]:
    """The radiographs (N, side, side, 1) themselves first, each one's mirror image behind it."""
    views = [pixels, enlarge(pixels)] if enlarged else [pixels]
    return [look for view in views for look in ([view, keras.ops.flip(view, axis=2)] if mirrored else [view])]


def enlarge(radiographs: keras.KerasTensor) -> keras.KerasTensor:
    """Radiographs (N, side, side, 1) without their outer `BORDER`, resized to the size they had.

    A network's answer depends a little on where shadows lie on the grid of its strides; seen at two sizes, less so
    (multi-scale testing; Simonyan & Zisserman, ICLR 2015).
    """
    side = radiographs.shape[1]
    centre = layers.Cropping2D(max(1, round(side * BORDER)), dtype="float32", name="centre")(radiographs)
    return layers.Resizing(side, side, dtype="float32", name="enlarged")(centre)


def _shift(probabilities: keras.KerasTensor, offsets: np.ndarray) -> keras.KerasTensor:
    """`shifted` as layers of a model."""
    held = keras.ops.clip(probabilities, *HELD)
    logits = keras.ops.log(held / (1.0 - held))
    # A dense layer with given weights: a constant would not be saved with the model.
    layer = layers.Dense(len(CLASSES), activation="sigmoid", trainable=False, dtype="float32", name="offsets")
    answer = layer(logits)
    layer.set_weights([np.eye(len(CLASSES)), offsets])
    return answer

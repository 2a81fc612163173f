"""Ensemble: members in one model, the TTA views that they are given, and the head that joins them.

A member is a layer `member_1`, `member_2` … of the joined model, and what joins them is the layer `mean`, or a head
behind the layer `concatenated`; `members` and `answering` find them by these names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import keras
import numpy as np
from keras import layers

from chestxray.config import CLASSES, StudyError
from chestxray.networks import class_activation

CLIPPED = (1e-6, 1 - 1e-6)
"""Range to which probabilities are clipped before their log-odds are taken."""


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
        weights: one per member, at least 0, with sum 1.
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
        mirrored: test-time augmentation: a member's prediction is its mean over the radiograph and its mirror image.
        offsets: (7,) of `fit_offsets`, added to the log-odds at the end; None adds none.
        enlarged: likewise, and over what `enlarge` makes of each of these.

    Returns:
        A model of the same input with seven probabilities. Members compute as they were made to; what joins them is
        float32 whatever the compute type, since float16 loses the small probabilities that AUROC ranks by.
    """
    pixels = layers.Input(members[0].input_shape[1:], name="radiograph")
    views = tta_views(pixels, mirrored, enlarged)
    outputs = []
    for number, member in enumerate(members, start=1):
        # Two members may carry the same name, and a Keras model needs every layer's name once.
        member.name = f"member_{number}"
        member.trainable = False
        answers = [member(view) for view in views]
        averaged = layers.Average(dtype="float32", name=f"member_{number}_all_looks")
        outputs += [averaged(answers)] if len(answers) > 1 else answers
    if fitted_head is None:
        joined = layers.Average(dtype="float32", name="mean")(outputs)
    else:
        fitted_head.trainable = False
        joined = fitted_head(layers.Concatenate(dtype="float32", name="concatenated")(outputs))
    return keras.Model(pixels, joined if offsets is None else _shift(joined, offsets), name="ensemble")


def members(model: keras.Model) -> list[keras.Model]:
    """The networks that `join` put together, in their order; the model itself where it is a single network."""
    found = {int(name[1]): layer for layer in model.layers if (name := re.fullmatch(r"member_(\d+)", layer.name))}
    return [found[number] for number in sorted(found)] or [model]


def answering(model: keras.Model) -> keras.Model:
    """A model with all that is asked of it when it answers for radiographs.

    Args:
        model: of `join`, or a single network of the study: radiographs (N, side, side, 1) in 0–255 to (N, 7).

    Returns:
        A model of the same input with these outputs, float32:

        - `probabilities` (N, 7).
        - `members` (N, members, 7): each member's predictions, as the whole would give them if all members predicted
          what this one does; of a single network its own probabilities.
        - `class_maps_1`, `class_maps_2` … (N, views, h, w, 7): each member's class maps, of the radiograph and, where
          the members are given it, of its mirror image, flipped back. The enlarged views have none, since positions
          differ in them. Only where every member has class maps.
    """
    networks, kinds = members(model), {type(operation).__name__ for operation in model.operations}
    mirrored, enlarged, tail = False, False, None
    if networks[0] is not model:
        mirrored, enlarged = "Flip" in kinds, any(layer.name == "enlarged" for layer in model.layers)
        joining = next(layer for layer in model.layers if layer.name in ("mean", "concatenated"))
        tail = keras.Model(keras.tree.flatten(joining.input), model.output, name="joined")
    pixels = layers.Input(model.input_shape[1:], name="radiograph")
    views = tta_views(pixels, mirrored, enlarged)
    # One call answers for all views of a batch.
    stacked = keras.ops.concatenate(views, axis=0) if len(views) > 1 else pixels

    def split(outputs: keras.KerasTensor) -> list[keras.KerasTensor]:
        return keras.ops.split(outputs, len(views), axis=0) if len(views) > 1 else [outputs]

    own, maps = [], []
    for network in networks:
        try:
            answers, coarse = class_activation.with_class_maps(network)(stacked)
            straight, *others = split(coarse)
            flipped = [keras.ops.flip(others[0], axis=2)] if mirrored else []
            maps.append(keras.ops.stack([straight, *flipped], axis=1))
        except StudyError:
            answers = network(stacked)
        own.append(layers.Average(dtype="float32")(split(answers)) if len(views) > 1 else answers)
    outputs = {"probabilities": own[0], "members": keras.ops.stack(own, axis=1)}
    if tail is not None:
        each = [tail([answer] * len(own)) for answer in own]
        outputs = {"probabilities": tail(own), "members": keras.ops.stack(each, axis=1)}
    if len(maps) == len(networks):
        outputs |= {f"class_maps_{number}": member for number, member in enumerate(maps, start=1)}
    return keras.Model(pixels, outputs, name="answering")


def view_by_view(member: keras.Model) -> keras.Model:
    """A member's predictions for each TTA view, so that it runs once where several choices of views are compared.

    Args:
        member: a model of radiographs (N, H, W, 1) in 0–255 to seven probabilities.

    Returns:
        A model of the same input with (N, 4, 7) probabilities: of the radiograph as it is, its mirror image, the
        radiograph enlarged and the mirror image of that. What `join` takes the mean of is the first one, the first two
        with `mirrored`, and all with `enlarged` too.
    """
    pixels = layers.Input(member.input_shape[1:], name="radiograph")
    answers = [keras.ops.cast(member(view), "float32") for view in tta_views(pixels, mirrored=True, enlarged=True)]
    return keras.Model(pixels, keras.ops.stack(answers, axis=1))


def tta_views(pixels: keras.KerasTensor, mirrored: bool, enlarged: bool) -> list[keras.KerasTensor]:
    """The views of radiographs that a member's prediction is the mean over.

    Args:
        pixels: (N, side, side, 1) in 0–255.
        mirrored: whether each view's mirror image follows it.
        enlarged: whether the enlarged radiograph is a view too.
    """
    views = [pixels, enlarge(pixels)] if enlarged else [pixels]
    return [each for view in views for each in ([view, keras.ops.flip(view, axis=2)] if mirrored else [view])]


def enlarge(radiographs: keras.KerasTensor) -> keras.KerasTensor:
    """Radiographs (N, side, side, 1) without the outer 1/32 of each side, resized to the size they had.

    A prediction depends a little on where shadows lie on the grid of the network's strides; the mean over two sizes
    depends on it less (multi-scale testing; Simonyan & Zisserman, ICLR 2015).
    """
    side = radiographs.shape[1]
    centre = layers.Cropping2D(max(1, round(side / 32)), dtype="float32", name="centre")(radiographs)
    return layers.Resizing(side, side, dtype="float32", name="enlarged")(centre)


def _shift(probabilities: keras.KerasTensor, offsets: np.ndarray) -> keras.KerasTensor:
    """`shifted` as layers of a model."""
    clipped = keras.ops.clip(probabilities, *CLIPPED)
    logits = keras.ops.log(clipped / (1.0 - clipped))
    # A dense layer with given weights: a constant would not be saved with the model.
    layer = layers.Dense(len(CLASSES), activation="sigmoid", trainable=False, dtype="float32", name="offsets")
    answer = layer(logits)
    layer.set_weights([np.eye(len(CLASSES)), offsets])
    return answer

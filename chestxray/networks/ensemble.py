"""Ensemble: the members of a model, and what it gives for a prediction.

An ensemble is built in the notebook 4.4. Its members are the layers `member_1`, `member_2` … ; `findings` is the mean
of theirs, and `classes` the mean of theirs or a dense layer behind `concatenated`.
"""

from __future__ import annotations

import re

import keras
from keras import layers

from chestxray.config import StudyError
from chestxray.networks import class_activation


def members(model: keras.Model) -> list[keras.Model]:
    """The networks of an ensemble in their order; the model itself where it is a single network."""
    found = {int(name[1]): layer for layer in model.layers if (name := re.fullmatch(r"member_(\d+)", layer.name))}
    return [found[number] for number in sorted(found)] or [model]


def answering(model: keras.Model) -> keras.Model:
    """A model with its members' predictions and class maps as further outputs.

    Args:
        model: an ensemble or a single network: radiographs (N, side, side, 1) in 0–255 to `findings` (N, 15) and
            `classes` (N, 7).

    Returns:
        A model of the same input with the outputs `findings` and `classes`; `member_findings` (N, members, 15) and
        `member_classes` (N, members, 7), of a single network its own; and `maps_1`, `maps_2` … (N, h, w, 15), each
        member's class maps, only where every member has them.
    """
    networks, pixels = members(model), layers.Input(model.input_shape[1:], name="radiograph")
    own = [_with_maps(network)(pixels) for network in networks]
    outputs = {name: own[0][name] for name in ("findings", "classes")}
    if networks[0] is not model:
        named = {layer.name: layer for layer in model.layers}
        joining = [named["findings"], named.get("concatenated", named["classes"])]
        tail = keras.Model([tensor for layer in joining for tensor in layer.input], model.output, name="tail")
        outputs = tail([each[name] for name in outputs for each in own])
    for name in ("findings", "classes"):
        outputs[f"member_{name}"] = keras.ops.stack([each[name] for each in own], axis=1)
    if all("maps" in each for each in own):
        outputs |= {f"maps_{number}": each["maps"] for number, each in enumerate(own, start=1)}
    return keras.Model(pixels, outputs, name="answering")


def _with_maps(network: keras.Model) -> keras.Model:
    try:
        return class_activation.with_class_maps(network)
    except StudyError:
        return network

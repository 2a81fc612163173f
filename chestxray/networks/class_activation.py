"""Class activation maps: which positions of a radiograph raise the logit of a finding.

A network of the study ends in a global average over positions and one dense layer. So the logit of a finding is the
mean over positions of a weighted sum of the last feature map's channels: this sum is the finding's map (Zhou et al.,
CVPR 2016). Maps are resized and averaged with NumPy; Keras is imported only where a network is taken apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from chestxray.config import ALL_LABELS, StudyError

if TYPE_CHECKING:
    import keras


def with_class_maps(network: keras.Model) -> keras.Model:
    """A single network of the study with its class maps beside its other outputs.

    Args:
        network: radiographs (N, side, side, 1) in 0–255 to `findings` (N, 15) and `classes` (N, 7).

    Returns:
        A model of the same input with these outputs and `maps` (N, h, w, 15) float32, at the size of the last feature
        map. The mean of a map over its positions is the logit of its finding, bias included.

    Raises:
        StudyError: the network has no layer `pooled`, or more than dropout lies between it and `findings`.
    """
    from keras import Model, layers

    named = {layer.name: layer for layer in network.layers}
    pooled, findings = named.get("pooled"), named.get("findings")
    if not isinstance(pooled, layers.GlobalAveragePooling2D) or not isinstance(findings, layers.Dense):
        raise StudyError(f"{network.name} has no global average pooling, so no heat-map: choose another model")
    dropped = {id(layer.output): layer.input for layer in network.layers if isinstance(layer, layers.Dropout)}
    if dropped.get(id(findings.input), findings.input) is not pooled.output:
        raise StudyError(f"{network.name} isn't linear behind its pooling, so it has no heat-map: choose another model")
    weigh = layers.Conv2D(len(ALL_LABELS), 1, dtype="float32", name="maps")
    maps = weigh(pooled.input)
    kernel, bias = findings.get_weights()
    weigh.set_weights([kernel[None, None], bias])
    return Model(network.input, {**network.output, "maps": maps})


def finding_maps(class_maps: Sequence[np.ndarray], findings: str | Sequence[str], side: int) -> np.ndarray:
    """A model's map of one finding for each radiograph, as logits: the mean of its members' maps.

    Args:
        class_maps: of each member, (n, h, w, 15).
        findings: a name of `ALL_LABELS`, or n of them: which finding each map is of.
        side: of the result, pixels; the members' maps are resized to it bilinearly.

    Returns:
        (n, side, side) float32.
    """
    number = len(class_maps[0])
    columns = [ALL_LABELS.index(name) for name in ([findings] * number if isinstance(findings, str) else findings)]
    found = []
    for maps in class_maps:
        down, across = (resizing_matrix(size, side) for size in maps.shape[1:3])
        found.append(down @ maps[np.arange(number), :, :, columns] @ across.T)
    return np.mean(found, axis=0)


def scaled(maps: np.ndarray) -> np.ndarray:
    """Maps (…, H, W) of logits as heat, 0 to 1: what lies above a map's mean, with the maximum at 1; 0 where flat."""
    above = np.maximum(maps - maps.mean(axis=(-2, -1), keepdims=True), 0)
    top = above.max(axis=(-2, -1), keepdims=True)
    return np.divide(above, top, out=np.zeros_like(above), where=top > 1e-6)


def resizing_matrix(size: int, side: int, antialias: bool = False) -> np.ndarray:
    """What `tf.image.resize` does along one axis with `bilinear`.

    Args:
        size: pixels before.
        side: pixels after.
        antialias: widen the triangle where the image is made smaller, so that no pixel is passed over.

    Returns:
        (side, size) float32, each row sums to one.
    """
    step = size / side
    width = max(step, 1.0) if antialias else 1.0
    centres = (np.arange(side) + 0.5) * step
    far = np.abs(np.arange(size) + 0.5 - centres[:, None]) / width
    weights = np.clip(1 - far, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)

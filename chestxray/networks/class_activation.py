"""Class activation maps: which positions of a radiograph speak for a class.

The study's convolutional networks end in a global average over positions and layers that are linear up to the class's
logit. So a sum of the last feature map's channels, with constant weights, is a map whose mean over positions is what
the feature map adds to the logit (Zhou et al., CVPR 2016). Grad-CAM at the last feature map (Selvaraju et al., ICCV
2017) gives the same map. Heat-maps are made of it with NumPy alone; Keras is imported only where a network is taken
apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from chestxray.config import CLASSES, StudyError

if TYPE_CHECKING:
    import keras


def with_class_maps(network: keras.Model) -> keras.Model:
    """A network of the study with its class maps beside its probabilities.

    Args:
        network: one network, radiographs (N, side, side, 1) in 0–255 to (N, 7) probabilities.

    Returns:
        A model of the same input and two outputs: the probabilities (N, 7), and the class maps (N, h, w, 7) at the size
        of the last feature map. The mean of a map over its positions is what this feature map adds to the class's
        logit. Where a network pools several stages, the map is of the last stage alone.

    Raises:
        StudyError: the network has no global average pooling, or is not linear from there to its logits.
    """
    from keras import Model, layers

    features, kernel = _last_stage(network)
    weigh = layers.Conv2D(len(CLASSES), 1, use_bias=False, dtype="float32", name="class_maps")
    maps = weigh(features)
    weigh.set_weights([kernel[None, None]])
    return Model(network.input, [network.output, maps])


def _last_stage(network: keras.Model) -> tuple[Any, np.ndarray]:
    """The last feature map (N, h, w, C), and the weights (C, 7) of its mean in the logits."""
    from keras import layers

    means = [layer for layer in network.layers if isinstance(layer, layers.GlobalAveragePooling2D)]
    if not means:
        raise StudyError(f"{network.name} has no convolution, so it has no heat-map: choose another model")
    mean, pooled = means[-1], means[-1].output
    first, width = 0, pooled.shape[-1]
    together = next((layer for layer in network.layers if layer.name == "pooled"), None)
    if together is not None:
        # `transfer` puts the means of n stages before the variances of all but the last: 2n - 1 parts.
        parts, pooled = together.input, together.output
        last = len(parts) // 2
        mean = next(layer for layer in means if layer.output is parts[last])
        first = sum(part.shape[-1] for part in parts[:last])
    kernel = _linear_weights(network, pooled)[first : first + width]
    features = mean.input
    before = next((layer for layer in network.layers if layer.output is features), None)
    if isinstance(before, layers.AveragePooling2D) and before.strides == before.pool_size:
        finer = before.input
        if not any(size % window for size, window in zip(finer.shape[1:3], before.pool_size, strict=True)):
            features = finer  # it has the same mean
    return features, kernel


def _linear_weights(network: keras.Model, pooled: Any) -> np.ndarray:
    """The weights (D, 7) that lead from pooled features (N, D) to the logits, read off their unit vectors."""
    from keras import Model, layers, ops

    refusal = StudyError(f"{network.name} isn't linear behind its pooling: it has no heat-map")
    last = network.layers[-1]
    if not isinstance(last, layers.Activation | layers.Dense):
        raise refusal
    size = 1000.0  # large, so that rounding of the constant part doesn't show
    vectors = np.concatenate([np.zeros((1, pooled.shape[-1])), size * np.eye(pooled.shape[-1])]).astype("float32")
    try:
        # A dense layer with an activation of its own hides its logits.
        tail = Model(pooled, ops.matmul(last.input, last.kernel) if isinstance(last, layers.Dense) else last.input)
        origin, *there = np.asarray(tail(vectors, training=False), dtype="float64")
    except (ValueError, KeyError) as error:  # another path leads around the pooling; Keras 3.13 sees it when called
        raise refusal from error
    kernel = (np.stack(there) - origin) / size
    back = np.asarray(tail(-vectors[1:2], training=False), dtype="float64")[0]
    if not np.allclose(origin - back, size * kernel[0], rtol=1e-3, atol=1e-3):
        raise refusal
    return kernel.astype("float32")


def member_maps(class_maps: Sequence[np.ndarray], classes: np.ndarray | int, side: int) -> np.ndarray:
    """Each member's heat-maps.

    Args:
        class_maps: of each member (n, views, h, w, 7): of the radiograph, and of its mirror image, flipped back.
        classes: (n,) or one index of `CLASSES`: which class each map is for.
        side: of the result, pixels.

    Returns:
        (members, n, side, side) float32, each map 0 to 1 with its maximum at 1; all 0 where nothing speaks for the
        class.
    """
    images = np.arange(len(class_maps[0]))
    found = []
    for maps in class_maps:
        chosen = np.maximum(maps[images, :, :, :, classes], 0)
        rows, columns = (resizing_matrix(size, side) for size in chosen.shape[2:])
        found.append(scaled(scaled(rows @ chosen @ columns.T).mean(axis=1)))
    return np.stack(found)


def joined(maps: np.ndarray) -> np.ndarray:
    """The ensemble's heat-maps, (n, H, W), of its members' (members, n, H, W)."""
    return scaled(maps.mean(axis=0))


def scaled(maps: np.ndarray) -> np.ndarray:
    """Maps (…, H, W) divided by their maxima; 0 where those are 0."""
    top = maps.max(axis=(-2, -1), keepdims=True)
    return np.divide(maps, top, out=np.zeros_like(maps), where=top > 0)


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

"""From the coarse class maps of an ensemble's members to one heat-map at the radiograph's size.

It owns the arithmetic of `explain.Explainer`'s maps where no gradient is needed, with NumPy alone: enlarging, scaling
and joining. It knows nothing of networks or of what ran them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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


def heat_maps(coarse: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Enlarge and join the class maps of one class.

    Args:
        coarse: of each member (n, ways, h, w), at least 0, for the ways that it was asked: the radiograph, and the
            mirror image turned back.
        side: of the result, pixels.

    Returns:
        (n, side, side) float32, 0 to 1 with the maximum at 1; all 0 where nothing speaks for the class.
    """
    joined = []
    for maps in coarse:
        rows, columns = (resizing_matrix(size, side) for size in maps.shape[2:])
        joined.append(scaled(scaled(rows @ maps @ columns.T).mean(axis=1)))
    return scaled(np.mean(joined, axis=0))


def scaled(maps: np.ndarray) -> np.ndarray:
    """Maps (…, H, W) divided by their maxima; 0 where those are 0."""
    top = maps.max(axis=(-2, -1), keepdims=True)
    return np.divide(maps, top, out=np.zeros_like(maps), where=top > 0)

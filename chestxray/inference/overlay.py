"""Overlay: a heat-map in colour over its radiograph."""

from __future__ import annotations

import numpy as np
from PIL import Image

OPACITY = 0.6
"""Of the hottest place of a heat-map over its radiograph, 0 to 1."""


def overlay(pixels: np.ndarray, heat: np.ndarray) -> Image.Image:
    """A radiograph, (H, W) uint8, under its heat-map, (H, W) from 0 to 1, as a colour picture."""
    layer = heat_layer(heat)
    layer[..., 3] = (layer[..., 3] * OPACITY).astype(np.uint8)
    below = Image.fromarray(pixels).convert("RGBA")
    return Image.alpha_composite(below, Image.fromarray(layer)).convert("RGB")


_HEAT = np.array([[130, 20, 60], [230, 70, 30], [255, 180, 40], [255, 245, 150]], dtype=float)
"""Colours of a heat-map from cold to hot: they grow lighter, so that they are told apart without colour vision."""


def heat_layer(heat: np.ndarray) -> np.ndarray:
    """A heat-map as a coloured layer that hides nothing where it is cold.

    Args:
        heat: (H, W), 0 to 1.

    Returns:
        (H, W, 4) uint8: red, green, blue and opacity. Opacity grows with the heat.
    """
    heat = np.clip(np.asarray(heat, dtype=float), 0, 1)
    steps = np.linspace(0, 1, len(_HEAT))
    colours = [np.interp(heat, steps, _HEAT[:, channel]) for channel in range(3)]
    return np.stack([*colours, 255 * heat**0.7], axis=-1).round().astype(np.uint8)

"""Overlays: a heat-map in colour over its radiograph."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

OPACITY = 0.6
"""Opacity of a heat-map's maximum over its radiograph, 0 to 1."""

LARGEST_SIDE = 1024
"""Pixels of the longer side of a radiograph that is shown."""

_COLOURS = np.array([[130, 20, 60], [230, 70, 30], [255, 180, 40], [255, 245, 150]], dtype=float)
"""Colours of a heat-map from 0 to 1: ever lighter, so that they differ without colour vision too."""


def shrink(pixels: np.ndarray) -> np.ndarray:
    """A radiograph (height, width) uint8 with its longer side at most `LARGEST_SIDE`, by means of pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BOX)
    return np.asarray(image)


def heat_layer(heat: np.ndarray) -> np.ndarray:
    """A heat-map, (height, width) from 0 to 1, in colour, more opaque where higher: (height, width, 4) uint8 RGBA."""
    heat = np.clip(np.asarray(heat, dtype=float), 0, 1)
    steps = np.linspace(0, 1, len(_COLOURS))
    colours = [np.interp(heat, steps, _COLOURS[:, channel]) for channel in range(3)]
    return np.stack([*colours, 255 * heat**0.7], axis=-1).round().astype(np.uint8)


def overlay(pixels: np.ndarray, heat: np.ndarray, note: str = "") -> Image.Image:
    """A radiograph under its heat-map, as an RGB picture.

    Args:
        pixels: (height, width) uint8.
        heat: (height, width), 0 to 1.
        note: a line on a white strip above; none where it is empty.
    """
    layer = heat_layer(heat)
    layer[..., 3] = (layer[..., 3] * OPACITY).astype(np.uint8)
    below = Image.fromarray(pixels).convert("RGBA")
    picture = Image.alpha_composite(below, Image.fromarray(layer)).convert("RGB")
    if not note:
        return picture
    size = max(10, picture.width // 40)
    lines = textwrap.wrap(note, max(8, int(picture.width / size / 0.5)))
    strip = round(size * (1.3 * len(lines) + 0.6))
    whole = Image.new("RGB", (picture.width, picture.height + strip), "white")
    whole.paste(picture, (0, strip))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(whole).multiline_text((size // 3, size // 5), "\n".join(lines), "black", font, spacing=size // 5)
    return whole

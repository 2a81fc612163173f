"""Varying the train radiographs, on disk and in graph, within what a radiographer would accept.

It owns the ranges of the transforms and the balanced train set made with them: a plan first (a table: which source,
which parameters, which seed), then the files. It must not know of models, and it must never see a validation or test
image: it draws sources from the manifest's selected train rows alone.

Ranges. Positioning on a chest stand varies by a few degrees and centimetres, and exposure and window by about a tenth:
rotations to ±7°, shifts to ±4 % of the side, zooms 0.93–1.07, brightness ±8 % of full scale, contrast 0.85–1.15.
Horizontal flips are off: the heart lies on the left, and a mirrored radiograph shows dextrocardia and a mirrored side
marker. One switch turns them on, for every class alike.

Borders. What a shift or a rotation uncovers is filled by reflection: at most a tenth of the side, with the local grey
level and texture. Black wedges would mark a picture as transformed, and no validation or test picture has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

ROTATION = 7.0
"""Largest rotation, degrees to either side."""
SHIFT = 0.04
"""Largest shift to either side, share of the side, along each axis."""
ZOOM = 0.07
"""Largest departure of the magnification from 1."""
BRIGHTNESS = 0.08
"""Largest grey level added or taken off, share of full scale (255)."""
CONTRAST = 0.15
"""Largest departure from 1 of the factor by which grey levels spread about the image's mean."""


def layers(strength: float, seed: int, flip: bool = False) -> list[keras.Layer]:
    """Stock Keras layers that vary a batch inside the model, anew in every epoch; at inference they do nothing.

    Args:
        strength: scales every range of this module; 1 gives the ranges of the files on disk, 0 gives no layer.
        seed: seeds the layers, each with its own stream.
        flip: also mirror left and right, half of the images.

    Returns:
        Layers from (N, H, W, 1) float grey levels 0–255 to the same, computed in float32 under any policy.

    Raises:
        ValueError: strength is negative.
    """
    import keras  # TensorFlow takes seconds to load; the data stages do without.

    if strength < 0:
        raise ValueError(f"strength {strength} is negative; give 0 for none, 1 for the ranges of the files on disk")
    if strength == 0:
        return []
    zoom, shift = strength * ZOOM, strength * SHIFT
    grey = {"value_range": (0.0, 255.0), "dtype": "float32"}
    place = {"fill_mode": "reflect", "interpolation": "bilinear", "dtype": "float32"}
    mirror = [keras.layers.RandomFlip("horizontal", seed=seed, dtype="float32", name="flip")] if flip else []
    return [
        *mirror,
        keras.layers.RandomRotation(strength * ROTATION / 360, seed=seed + 1, name="rotation", **place),
        keras.layers.RandomTranslation(shift, shift, seed=seed + 2, name="shift", **place),
        keras.layers.RandomZoom((-zoom, zoom), seed=seed + 3, name="zoom", **place),
        keras.layers.RandomContrast(strength * CONTRAST, seed=seed + 4, name="contrast", **grey),
        keras.layers.RandomBrightness(strength * BRIGHTNESS, seed=seed + 5, name="brightness", **grey),
    ]

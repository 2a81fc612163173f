"""Robustness: AUROC lost to noise, blur, other brightness, rotation, low resolution and inverted greys."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from chestxray.config import CLASSES
from chestxray.evaluation import bootstrap, metrics
from chestxray.evaluation.bootstrap import Draws


class Degradation(NamedTuple):
    """One way in which radiographs get worse.

    Attributes:
        title: what it is called in figures.
        unit: of the strength.
        strengths: from weak to strong.
        apply: (H, W) float32 in 0–255, strength, generator → the same, to be rounded and clipped.
    """

    title: str
    unit: str
    strengths: tuple[float, ...]
    apply: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def _noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return image + rng.normal(0, strength, image.shape)


def _blur(image: np.ndarray, strength: float, _: np.random.Generator) -> np.ndarray:
    # Strength is in shares of the side, so that it means the same at any resolution.
    return ndimage.gaussian_filter(image, strength / 100 * len(image), mode="nearest")


def _brightness(image: np.ndarray, strength: float, _: np.random.Generator) -> np.ndarray:
    return image + strength * 255


def _rotation(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    # Either way round, so that no direction is favoured.
    return ndimage.rotate(image, rng.choice((-1, 1)) * strength, reshape=False, order=1, mode="reflect")


def _resolution(image: np.ndarray, strength: float, _: np.random.Generator) -> np.ndarray:
    size = image.shape[::-1]
    small = [max(1, round(side / strength)) for side in size]
    return np.asarray(
        Image.fromarray(image).resize(small, Image.Resampling.BOX).resize(size, Image.Resampling.BILINEAR)
    )


def _inversion(image: np.ndarray, strength: float, _: np.random.Generator) -> np.ndarray:
    return (1 - strength) * image + strength * (255 - image)


DEGRADATIONS: dict[str, Degradation] = {
    "noise": Degradation("Noise", "standard deviation, grey levels", (8, 16, 32), _noise),
    "blur": Degradation("Blur", "standard deviation, % of the side", (0.5, 1, 2), _blur),
    "darker": Degradation("Darker", "share of full scale", (-0.1, -0.2, -0.4), _brightness),
    "brighter": Degradation("Brighter", "share of full scale", (0.1, 0.2, 0.4), _brightness),
    "rotation": Degradation("Rotation", "degrees", (5, 15, 30), _rotation),
    "resolution": Degradation("Lower resolution", "pixels merged a side", (2, 4, 8), _resolution),
    "inversion": Degradation("Inverted greys", "share of the inverted image", (0.25, 0.75, 1.0), _inversion),
}
"""The degradations and their strengths. Half-inverted greys would be one flat grey."""

STEPS = [(name, float(strength)) for name, kind in DEGRADATIONS.items() for strength in kind.strengths]
"""Each degradation with each of its strengths."""


def degrade(pixels: np.ndarray, name: str, strength: float, seed: int = 0) -> np.ndarray:
    """Degraded radiographs, as `pixels` in shape and type; an image's noise depends on seed and position alone.

    Args:
        pixels: (n, H, W) or (n, H, W, 1) uint8.
        name: a key of `DEGRADATIONS`.
        strength: in its unit.
        seed: seeds noise and the direction of rotations.
    """
    worse = np.empty_like(pixels)
    for position, image in enumerate(pixels.reshape(pixels.shape[:3]).astype(np.float32)):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), position])
        changed = DEGRADATIONS[name].apply(image, strength, rng)
        worse[position] = np.rint(changed).clip(0, 255).astype(np.uint8).reshape(pixels.shape[1:])
    return worse


def predict_degraded(predict: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Predicted classes of radiographs as they are, then degraded in the order of `STEPS`: (1 + steps, n, 7).

    Args:
        predict: (n, H, W, 1) uint8 to (n, 7) probabilities of the classes.
        pixels: (n, H, W, 1) uint8, the radiographs as they are.
        seed: seeds the degradations.
    """
    worse = (degrade(pixels, name, strength, seed) for name, strength in STEPS)
    return np.stack([np.asarray(predict(images)) for images in itertools.chain([pixels], worse)])


def sweep(predicted: np.ndarray, table: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Macro AUROC of single-label radiographs at each strength of each degradation.

    Args:
        predicted: from `predict_degraded`.
        table: n rows in the same order, `image`, `patient` and `label`, one of the seven classes each.
        draws: how many times the patients are drawn; the same draws for all strengths.
        seed: seeds the draws.

    Returns:
        Index (`degradation`, `strength`), strength 0 first in each; columns `estimate`, `low`, `high`, the difference
        to the radiographs as they are as `loss`, `loss_low`, `loss_high` (below 0 is worse), and `draws`.

    Raises:
        StudyError: a class has no image.
    """
    codes = pd.Categorical(table["label"], categories=list(CLASSES)).codes
    metrics.macro_auroc(codes, predicted[0])  # raises where a class is missing
    drawn = Draws.of(table["patient"], draws, seed)

    def macro(scores: np.ndarray) -> np.ndarray:
        return np.mean([metrics.rank_draws(codes == k, scores[:, k], drawn)[0] for k in range(len(CLASSES))], axis=0)

    plain = macro(predicted[0])
    rows: dict[tuple[str, float], dict[str, float]] = {}
    for (name, strength), scores in zip(STEPS, predicted[1:], strict=True):
        rows.setdefault((name, 0.0), _row(plain, plain))
        rows[name, strength] = _row(macro(scores), plain)
    return bootstrap.table(rows, ["degradation", "strength"])


def _row(values: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    low, high, _ = bootstrap.interval(values - plain)
    found = bootstrap.entry(values)
    return found | {"loss": float(values[0] - plain[0]), "loss_low": low, "loss_high": high}

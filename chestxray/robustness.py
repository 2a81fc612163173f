"""What a model loses when radiographs get worse: noise, blur, brightness, rotation, low resolution, inverted greys.

It owns the degradations and their strengths, and the loss that each causes. It knows arrays of grey values and
predictions tables; networks only as a function from pixels to probabilities.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from chestxray import evaluation, resampling
from chestxray.config import CLASSES, StudyError
from chestxray.evaluation import auroc_draws
from chestxray.resampling import Draws


@dataclass(frozen=True)
class Degradation:
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


def _blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    # Strength is in shares of the side, so that it means the same at any resolution.
    return ndimage.gaussian_filter(image, strength / 100 * len(image), mode="nearest")


def _brightness(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return image + strength * 255


def _rotation(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    # Either way round, so that no direction is favoured.
    return ndimage.rotate(image, rng.choice((-1, 1)) * strength, reshape=False, order=1, mode="reflect")


def _resolution(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape
    small = Image.fromarray(image).resize(
        (max(1, round(width / strength)), max(1, round(height / strength))), Image.Resampling.BOX
    )
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def _inversion(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
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
"""What is tried, and how strongly. Half-inverted greys would be one flat grey."""


def degrade(pixels: np.ndarray, name: str, strength: float, seed: int = 0) -> np.ndarray:
    """Make radiographs worse; an image's noise depends on the seed and its place alone.

    Args:
        pixels: (n, H, W) or (n, H, W, 1) uint8.
        name: a key of `DEGRADATIONS`.
        strength: in its unit.
        seed: seeds noise and the direction of rotations.

    Returns:
        The same shape, uint8.

    Raises:
        StudyError: the name is unknown.
    """
    if name not in DEGRADATIONS:
        raise StudyError(f"degradation {name!r} is unknown; there are: {', '.join(DEGRADATIONS)}")
    worse = np.empty_like(pixels)
    for place, image in enumerate(pixels.reshape(pixels.shape[:3]).astype(np.float32)):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), place])
        changed = DEGRADATIONS[name].apply(image, strength, rng)
        worse[place] = np.rint(changed).clip(0, 255).astype(np.uint8).reshape(pixels.shape[1:])
    return worse


def sweep(
    predict: Callable[[np.ndarray], np.ndarray],
    pixels: np.ndarray,
    table: pd.DataFrame,
    names: Sequence[str] = tuple(DEGRADATIONS),
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Macro AUROC of single-label radiographs at each strength of each degradation.

    Args:
        predict: (n, H, W, 1) uint8 to (n, 7) probabilities.
        pixels: (n, H, W, 1) uint8, the radiographs as they are.
        table: n rows in the same order, `image`, `patient` and `label`, one of the seven classes each.
        names: keys of `DEGRADATIONS`.
        draws: how many times the patients are drawn; all strengths meet the same draws.
        seed: seeds the draws and the degradations.

    Returns:
        Index (`degradation`, `strength`), strength 0 first in each; columns `estimate`, `low`, `high`, the difference
        to the radiographs as they are as `loss`, `loss_low`, `loss_high` (below 0 is worse), and `draws`.

    Raises:
        StudyError: a name is unknown, or a class has no image.
    """
    codes = pd.Categorical(table["label"], categories=list(CLASSES)).codes
    evaluation.macro_auroc(codes, np.zeros((len(codes), len(CLASSES))))  # says which class is missing
    drawn = Draws.of(table["patient"], draws, seed)

    def macro(images: np.ndarray) -> np.ndarray:
        scores = np.asarray(predict(images), dtype=float)
        return np.mean([auroc_draws(codes == k, scores[:, k], drawn) for k in range(len(CLASSES))], axis=0)

    plain = macro(pixels)
    rows: dict[tuple[str, float], Mapping[str, float]] = {}
    for name in names:
        rows[name, 0.0] = _row(plain, plain)
        for strength in DEGRADATIONS[name].strengths if name in DEGRADATIONS else (1.0,):
            rows[name, float(strength)] = _row(macro(degrade(pixels, name, strength, seed)), plain)
    found = pd.DataFrame.from_dict(rows, orient="index")
    found.index = pd.MultiIndex.from_tuples(rows, names=["degradation", "strength"])
    return found


def _row(values: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    low, high, _ = resampling.interval(values - plain)
    found = resampling.entry(values)
    return found | {"loss": float(values[0] - plain[0]), "loss_low": low, "loss_high": high}


def sample(table: pd.DataFrame, each: int, seed: int = 0) -> np.ndarray:
    """Positions of a balanced sample of single-label rows, where a table has no balanced test of its own.

    Args:
        table: rows with `label`.
        each: at most so many of each class.
        seed: seeds the choice.
    """
    order = np.random.default_rng(seed).permutation(len(table))
    labels = table["label"].to_numpy()[order]
    chosen = [order[labels == name][:each] for name in CLASSES]
    return np.sort(np.concatenate(chosen))

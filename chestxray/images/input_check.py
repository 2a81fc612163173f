"""Input check: whether an image is a frontal chest radiograph, upright and with black air, as models expect.

A small network checks the pixels (`tests/benchmarks/fit_input_check.py` fits it), and rules check the file's tags.
It depends on no model of findings, and needs NumPy and Pillow alone.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chestxray.config import COMMITTED, StudyError
from chestxray.images import pixels as grey
from chestxray.images.pixels import Facts

FOLDER = COMMITTED / "5_results" / "input_check"
"""Where the committed check lies, with its measured rates."""
WEIGHTS = "check.npz"

SIDE = 32
"""Side of the images that the network takes, in pixels."""
SMALL = 64
"""An image whose longer side is shorter, in pixels, shows too little of a lung."""
COLOURED = 8.0
"""Mean spread of red, green and blue, 0–255, from which an image counts as coloured; scanners leave a faint tint."""

FRONTAL = ("PA", "AP")
CHEST = ("CHEST", "LUNG", "THORAX", "RIB", "RIBS", "RIBCAGE", "HEART")
PROJECTIONS = ("CR", "DX", "RG", "RF", "XA")

_SPREAD = 8.0
"""Components are cut at so many standard deviations from the training data's mean."""

_REMEDY = "restore it, or fit it anew by python -m tests.benchmarks.fit_input_check"


@dataclass(frozen=True)
class Check:
    """A network with one hidden layer that separates frontal chest radiographs from other images."""

    mean: np.ndarray  # (F,) of the features
    components: np.ndarray  # (F, K) from features to components of unit variance
    kernels: tuple[np.ndarray, ...]  # of the layers, (K, H) and (H, 1)
    biases: tuple[np.ndarray, ...]  # (H,) and (1,)
    threshold: float  # log-odds of being something else from which an image is flagged

    @classmethod
    def load(cls, path: Path) -> Check:
        """Read a check.

        Raises:
            StudyError: the file is missing or damaged.
        """
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
                parts = {name: array.astype(np.float32) for name, array in stored.items()}
            kernels, biases = ((parts[f"{kind}_0"], parts[f"{kind}_1"]) for kind in ("kernel", "bias"))
            check = cls(parts["mean"], parts["components"], kernels, biases, float(parts["threshold"]))
            check.scores(np.zeros((1, SIDE, SIDE), np.uint8))
        except OSError as error:
            raise StudyError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
        except Exception as error:  # zipfile, zlib and NumPy each raise their own for a damaged file
            raise StudyError(f"{path}: is damaged ({type(error).__name__}); {_REMEDY}") from error
        return check

    def components_of(self, measured: np.ndarray) -> np.ndarray:
        """The network's inputs, (N, K), from (N, F) features."""
        return ((measured - self.mean) @ self.components).clip(-_SPREAD, _SPREAD)

    def scores(self, small: np.ndarray) -> np.ndarray:
        """Log-odds, (N,), that images, (N, SIDE, SIDE) uint8, are something else than a frontal chest radiograph."""
        hidden = np.maximum(self.components_of(features(small)) @ self.kernels[0] + self.biases[0], 0)
        return (hidden @ self.kernels[1] + self.biases[1])[:, 0]

    def looks_foreign(self, small: np.ndarray) -> np.ndarray:
        """Whether images are to be flagged, (N,) bool; `small` as for `scores`."""
        return self.scores(small) > self.threshold

    def flag(self, small: np.ndarray) -> str:
        """What is wrong with one (SIDE, SIDE) uint8 image, in words; empty if it passes."""
        if small.max() == small.min():
            return "blank: all pixels are alike"
        if not self.looks_foreign(small[np.newaxis])[0]:
            return ""
        scores = self.scores(np.stack([255 - small, small[::-1, ::-1], np.rot90(small), np.rot90(small, -1)]))
        # Named only if that orientation is clearly a radiograph.
        if scores.min() < min(0, self.threshold):
            quarter = "turned by a quarter"
            return f"looks {('inverted (air should be black)', 'upside down', quarter, quarter)[scores.argmin()]}"
        return "does not look like a frontal chest radiograph"


@functools.cache
def committed() -> Check:
    """The committed check; raises as `Check.load`."""
    return Check.load(FOLDER / WEIGHTS)


def reduced(image: np.ndarray) -> np.ndarray:
    """A (height, width) uint8 image padded to a square and shrunk to (SIDE, SIDE), as the network takes it."""
    return grey.prepare_pixels(image, SIDE)


def features(small: np.ndarray) -> np.ndarray:
    """Features of (N, SIDE, SIDE) uint8 images, (N, SIDE² + 2) float32.

    The pixels at mean 0 and standard deviation 1, so that exposure and contrast don't count, then their mean and the
    logarithm of their deviation, which reveal blank images.
    """
    x = small.reshape(len(small), -1).astype(np.float32) / 255
    mean, deviation = x.mean(axis=1, keepdims=True), x.std(axis=1, keepdims=True)
    extremes = [4 * (mean - 0.5), np.log(np.maximum(deviation, 0.01)) + 1.4]
    return np.concatenate([(x - mean) / np.maximum(deviation, 0.02), *extremes], axis=1)


def flags(image: np.ndarray, facts: Facts | None = None, check: Check | None = None) -> list[str]:
    """Why an image may not be a frontal chest radiograph, in short texts.

    Args:
        image: (height, width) uint8.
        facts: from its file; None for pixels without a file.
        check: the committed one if None.
    """
    facts, (height, width) = facts or Facts(""), image.shape
    warning = (check or committed()).flag(reduced(image))
    reasons = {
        f"not a radiograph (modality {facts.modality})": facts.modality not in ("", *PROJECTIONS),
        f"not a chest (body part {facts.body_part})": facts.body_part not in ("", *CHEST),
        f"not an upright frontal view (view {facts.view})": facts.view not in ("", *FRONTAL),
        "raw detector data, not what a reader looks at": facts.raw,
        "coloured, as no radiograph is": facts.colour >= COLOURED,
        f"tiny: {width} × {height} px": max(height, width) < SMALL,
        warning: bool(warning),
    }
    return [reason for reason, applies in reasons.items() if applies]

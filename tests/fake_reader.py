"""A reader that answers from a file's pixels alone, in no time: what the page needs of the real one, and no model."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from chestxray.config import SIX_FINDINGS
from chestxray.evaluation.posterior import EQUAL
from chestxray.images import load
from chestxray.inference.answers import Answer
from chestxray.inference.interpretation import OperatingPoint, uncalibrated

POINT = OperatingPoint(
    threshold=0.3, probability=0.5, sensitivity=0.81, specificity=0.57, n_images=1000, n_positive=100
)
EQUAL_CLASSES = np.array([10, 12, 15, 20, 9, 18, 16]) / 100
"""Mass at equal shares; No finding where that is common."""


class FakeReader:
    """Answers and notes what it was asked.

    Attributes:
        asked: the sources of `examine`, in order.
        flags: what every answer is flagged with.
        error: raised instead of an answer, unless None.
        mapped: the shapes of the radiographs that heat-maps were made of, in order.
        hold: waited for before an answer for pixels rather than a file, unless None.
    """

    def __init__(self) -> None:
        self.interpretation = uncalibrated()
        self.asked: list[object] = []
        self.mapped: list[tuple[int, ...]] = []
        self.flags: list[str] = []
        self.error: Exception | None = None
        self.hold: threading.Event | None = None

    def examine(self, source: Path | np.ndarray) -> Answer:
        self.asked.append(source)
        if self.hold and isinstance(source, np.ndarray):
            self.hold.wait(60)
        if self.error:
            raise self.error
        pixels = source if isinstance(source, np.ndarray) else load.read(source).pixels
        grey = float(pixels.mean()) / 255
        scores = {name: round((0.1 * number + grey) % 1, 4) for number, name in enumerate(SIX_FINDINGS)}
        return Answer(
            pixels,
            EQUAL_CLASSES,
            EQUAL,
            scores,
            {name: 0.8 * score for name, score in scores.items()},
            {name: min(1.0, 1.2 * score) for name, score in scores.items()},
            {name: scores[name] > 0.5 for name in SIX_FINDINGS},
            list(self.flags),
            dict.fromkeys(SIX_FINDINGS, POINT),
        )

    def heat_map(self, source: np.ndarray, finding: str) -> np.ndarray:
        """A hill in the middle of the row that belongs to the finding."""
        rows, columns = np.mgrid[0 : source.shape[0], 0 : source.shape[1]].astype(np.float32)
        top = source.shape[0] * (SIX_FINDINGS.index(finding) + 0.5) / len(SIX_FINDINGS)
        far = (rows - top) ** 2 + (columns - source.shape[1] / 4) ** 2
        self.mapped.append(source.shape)
        return np.exp(-far / (0.02 * source.size)).astype(np.float32)

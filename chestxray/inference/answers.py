"""Answers: what a model predicts for one radiograph, and the row of a table that holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from chestxray.config import CLASSES, SIX_FINDINGS
from chestxray.inference.interpretation import DECIMALS, OperatingPoint

HEAT_MAP = "heat_map"
"""The column that names a radiograph's heat-map."""

SIDES = ("calibrated", "low", "high")
"""Fields of an `Answer`, by class, that follow the model's own scores in a table."""


@dataclass(frozen=True)
class Answer:
    """What a model predicts for one radiograph; the dictionaries are by class name.

    Attributes:
        pixels: (height, width) uint8, the radiograph as it was read.
        probabilities: the model's own seven scores, 0 to 1; they don't sum to one.
        calibrated: calibrated probabilities, 0 to 1: the share of such radiographs that show the class.
        low, high: the lowest and the highest prediction of a single member of the ensemble, calibrated alike. They
            show how far the members differ, and are no confidence interval.
        above: for each finding with an operating point, whether its score reaches it.
        flags: reasons not to trust the answer, in short texts; empty where there are none.
        operating_points: of the findings, chosen on validation.
    """

    pixels: np.ndarray
    probabilities: dict[str, float]
    calibrated: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    above: dict[str, bool]
    flags: list[str]
    operating_points: dict[str, OperatingPoint]

    @property
    def finding(self) -> str:
        """The finding of the highest calibrated probability."""
        return max(SIX_FINDINGS, key=self.calibrated.__getitem__)


def columns(heat_maps: bool = False) -> list[str]:
    """The columns of a table of answers.

    `image`; the model's seven scores, named as `CLASSES`; for each class `…_calibrated`, `…_low` and `…_high`; for each
    finding `…_above`, whether it reaches its operating point (empty where none is known); `flags`, joined by
    semicolons; and `heat_map`, the picture's name, where heat-maps are written.
    """
    further = [f"{name}_{side}" for side in SIDES for name in CLASSES]
    above = [f"{name}_above" for name in SIX_FINDINGS]
    return ["image", *CLASSES, *further, *above, "flags", *([HEAT_MAP] if heat_maps else [])]


def row(name: str, answer: Answer) -> list[Any]:
    """An answer as a row of a table.

    Args:
        name: the image's path or number.
        answer: what is predicted for it.

    Returns:
        Values in the order of `columns`, without a heat-map; numbers to six decimals.
    """
    values = (answer.probabilities, *(getattr(answer, side) for side in SIDES))
    numbers = [round(value[cls], DECIMALS) for value in values for cls in CLASSES]
    above = [answer.above.get(finding) for finding in SIX_FINDINGS]
    return [name, *numbers, *above, "; ".join(answer.flags)]

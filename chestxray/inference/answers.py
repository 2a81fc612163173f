"""Answers: what is predicted of one radiograph, and its row in a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chestxray.config import CLASSES, SIX_FINDINGS
from chestxray.inference.interpretation import DECIMALS, OperatingPoint

if TYPE_CHECKING:
    pass


HEAT_MAP = "heat_map"
SIDES = ("calibrated", "low", "high")


def columns(heat_maps: bool = False) -> list[str]:
    """The columns of a table of answers.

    `image`; the model's seven scores, named as `CLASSES`; of each class `…_calibrated`, `…_low` and `…_high`, where
    validation taught them; of each finding `…_above`, whether it reaches its operating point; `flags`, joined by
    semicolons; and `heat_map`, the picture's name.
    """
    further = [f"{name}_{side}" for side in SIDES for name in CLASSES]
    above = [f"{name}_above" for name in SIX_FINDINGS]
    return ["image", *CLASSES, *further, *above, "flags", *([HEAT_MAP] if heat_maps else [])]


def row(name: str, answer: Answer) -> list[Any]:
    """An answer as `columns` lists it, without a heat-map; numbers to six decimals."""
    values = (answer.probabilities, *(getattr(answer, side) for side in SIDES))
    numbers = [round(value[cls], DECIMALS) for value in values for cls in CLASSES]
    above = [answer.above.get(finding) for finding in SIX_FINDINGS]
    return [name, *numbers, *above, "; ".join(answer.flags)]


@dataclass(frozen=True)
class Answer:
    """What a model says of one radiograph, by class name.

    Attributes:
        pixels: (height, width) uint8, the radiograph as it was read.
        probabilities: the model's own seven scores, 0 to 1; they don't sum to one.
        calibrated: what validation makes of them: the share of such radiographs that show the class.
        low, high: the lowest and the highest that a single member of the ensemble would say, calibrated alike. They
            tell how far the members are apart, and are no confidence interval.
        above: for each finding with an operating point, whether its score reaches it.
        flags: why not to trust the answer, in short texts; empty where nothing speaks against it.
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

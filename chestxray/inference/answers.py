"""Answers: what a model predicts for one radiograph, and the row of a table that holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from chestxray.config import CLASSES, SIX_FINDINGS
from chestxray.inference.interpretation import DECIMALS, OperatingPoint

SIDES = ("present", "calibrated", "low", "high")
"""Fields of an `Answer`, by finding, that follow the classes in a table."""


@dataclass(frozen=True)
class Answer:
    """What a model predicts for one radiograph; the dictionaries are by class or finding.

    Attributes:
        pixels: (height, width) uint8, the radiograph, its longer side at most `overlay.LARGEST_SIDE`.
        classes: the probabilities of the seven classes at equal shares, 0 to 1, with sum 1.
        present: for each of the six findings, the model's own score that it is there, 0 to 1.
        calibrated: these scores calibrated: the share of such radiographs that show the finding.
        low, high: the lowest and the highest prediction of a single member of the ensemble, calibrated alike. They
            show how far the members differ, and are no confidence interval.
        above: for each finding with an operating point, whether its score reaches it.
        flags: reasons not to trust the answer, in short texts; empty where there are none.
        operating_points: of the findings, chosen on validation.
    """

    pixels: np.ndarray
    classes: dict[str, float]
    present: dict[str, float]
    calibrated: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    above: dict[str, bool]
    flags: list[str]
    operating_points: dict[str, OperatingPoint]

    @property
    def order(self) -> list[str]:
        """The six findings by falling calibrated probability."""
        return sorted(SIX_FINDINGS, key=self.calibrated.__getitem__, reverse=True)


def columns(heat_maps: bool = False) -> list[str]:
    """The columns of a table of answers.

    `image`; the seven `CLASSES`; for each finding `…_present`, `…_calibrated`, `…_low`, `…_high`, and `…_above`, if it
    reaches its operating point (empty where none is known); `flags`, joined by semicolons; and `heat_map`, the name of
    the picture, where heat-maps are written.
    """
    further = [f"{name}_{side}" for side in (*SIDES, "above") for name in SIX_FINDINGS]
    return ["image", *CLASSES, *further, "flags", *(["heat_map"] if heat_maps else [])]


def row(name: str, answer: Answer) -> list[Any]:
    """An answer as a row of a table.

    Args:
        name: the image's path or number.
        answer: what is predicted for it.

    Returns:
        Values in the order of `columns`, without a heat-map; numbers to six decimals.
    """
    fields = (getattr(answer, side) for side in ("classes", *SIDES))
    numbers = [value for field in fields for value in field.values()]
    above = [answer.above.get(finding) for finding in SIX_FINDINGS]
    return [name, *(round(number, DECIMALS) for number in numbers), *above, "; ".join(answer.flags)]

"""Answers: what a model predicts for one radiograph, and the row of a table that holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from chestxray.config import CLASSES, SIX_FINDINGS
from chestxray.evaluation import posterior
from chestxray.evaluation.posterior import Shares
from chestxray.inference.interpretation import DECIMALS, OperatingPoint

SIDES = ("present", "low", "high")
"""Fields of an `Answer`, by finding, that follow the classes in a table."""


@dataclass(frozen=True)
class Answer:
    """What a model predicts for one radiograph; the dictionaries are by class or finding.

    `dataclasses.replace(answer, prevalence=…)` re-weights the classes.

    Attributes:
        pixels: (height, width) uint8, the radiograph, its longer side at most `overlay.LARGEST_SIDE`.
        equal: (7,) float64, the probabilities of `CLASSES` at equal shares, calibrated, with sum 1.
        prevalence: the class shares at which `classes` and `named` are.
        present: for each of the six findings, the share of such radiographs in validation that show it, alone or with
            others; whatever `prevalence` is.
        low, high: the lowest and the highest prediction of a single member of the ensemble, calibrated alike. They
            show how far the members differ, and are no confidence interval.
        above: for each finding with an operating point, whether its score reaches it.
        flags: reasons not to trust the answer, in short texts; empty where there are none.
        operating_points: of the findings, chosen on validation.
    """

    pixels: np.ndarray
    equal: np.ndarray
    prevalence: Shares
    present: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    above: dict[str, bool]
    flags: list[str]
    operating_points: dict[str, OperatingPoint]

    @property
    def classes(self) -> dict[str, float]:
        """The probabilities of the seven classes, given that exactly one applies: six decimals, with sum 1."""
        shown = posterior.rounded(posterior.reweighted(self.equal, self.prevalence))
        return dict(zip(CLASSES, shown.tolist(), strict=True))

    @property
    def named(self) -> str:
        """The class with the largest of `classes`."""
        return CLASSES[posterior.named(np.array([*self.classes.values()]))]

    @property
    def order(self) -> list[str]:
        """The six findings by falling probability."""
        return sorted(SIX_FINDINGS, key=self.present.__getitem__, reverse=True)


def columns(heat_maps: bool = False) -> list[str]:
    """The columns of a table of answers.

    `image`; `class`, the one named; the seven `CLASSES`; for each finding `…_present`, `…_low`, `…_high`, and
    `…_above`, if it reaches its operating point (empty where none is known); `flags`, joined by semicolons; and
    `heat_map`, the name of the picture, where heat-maps are written.
    """
    further = [f"{name}_{side}" for side in (*SIDES, "above") for name in SIX_FINDINGS]
    return ["image", "class", *CLASSES, *further, "flags", *(["heat_map"] if heat_maps else [])]


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
    return [name, answer.named, *(round(number, DECIMALS) for number in numbers), *above, "; ".join(answer.flags)]

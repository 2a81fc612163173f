"""Plain words: findings and answers for readers who are no radiologists."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

    from chestxray.inference.answers import Answer

WARNING = (
    "This is a study, not a medical device: never use it for diagnosis, nor for any decision about a person's health."
)
DRAWN = "This is a phantom: a drawing made by a program, not a radiograph of a person."


class Plain(NamedTuple):
    """A finding in everyday words: a short name, and a sentence that explains it."""

    name: str
    sentence: str


PLAIN: dict[str, Plain] = {
    "Atelectasis": Plain("Collapsed part of a lung", "Part of a lung holds too little air and has shrunk."),
    "Effusion": Plain("Fluid around the lung", "Fluid has gathered between a lung and the chest wall."),
    "Infiltration": Plain("Haze in the lung", "Fluid or inflammation fills part of a lung where there should be air."),
    "Mass": Plain("Large spot in the lung", "A rounded shadow more than 3 cm across; it may be harmless or a tumour."),
    "Nodule": Plain("Small spot in the lung", "A rounded shadow up to 3 cm across; many are harmless."),
    "Pneumothorax": Plain(
        "Air around the lung", "Air has got between a lung and the chest wall, and the lung falls in."
    ),
}
"""The six findings in everyday words."""

SHARES: dict[str, str] = {
    "equal": "as common as each other",
    "sample": "as common as in the study's radiographs",
    "nih": "as common as at the NIH",
}
"""How common the seven classes are, in everyday words, by the words of `posterior.SHARES`."""


def table(answer: Answer) -> pd.DataFrame:
    """An answer as a table.

    Returns:
        One row per finding, the most probable first: `in plain words`, its `explanation`, `probability` (0 to
        1), `lowest` and `highest` (of the members), `operating point` (above, below, or – where none is known), its
        `threshold` (a probability), and the `sensitivity` and `specificity` of this point on validation.
    """
    import pandas as pd

    rows = {}
    for name in answer.order:
        rows[name] = {
            "in plain words": PLAIN[name].name,
            "explanation": PLAIN[name].sentence,
            "probability": answer.present[name],
            "lowest": answer.low[name],
            "highest": answer.high[name],
            "operating point": "–",
        }
        if point := answer.operating_points.get(name):
            rows[name] |= {
                "operating point": "above" if answer.above[name] else "below",
                "threshold": point.probability,
                "sensitivity": point.sensitivity,
                "specificity": point.specificity,
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("finding")

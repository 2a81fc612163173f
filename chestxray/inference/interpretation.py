"""Interpretation: calibrated probabilities of classes and findings, and the findings' operating points.

Both come from validation: from the tables of the committed reference, or from the validation predictions beside a
model. NumPy alone applies them; nothing is fitted on test.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from chestxray import config
from chestxray.config import SIX_FINDINGS, StudyError
from chestxray.evaluation import posterior

UNMEASURED = "This model's heat-maps were not compared with lesion boxes; do not take them for the place of a finding."

DECIMALS = 6
"""Of a score in tables: thresholds were chosen among scores so rounded."""


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold chosen on validation so that a set share of the radiographs with a finding reaches it.

    Attributes:
        threshold: of the model's own score; a score at it counts as above.
        probability: the threshold as a calibrated probability, 0 to 1.
        sensitivity: share of validation's radiographs with the finding that are above it.
        specificity: share of those without that are below it.
        n_images: validation's radiographs.
        n_positive: those of them with the finding.
    """

    threshold: float
    probability: float
    sensitivity: float
    specificity: float
    n_images: int
    n_positive: int


@dataclass(frozen=True)
class Interpretation:
    """Calibration and operating points of one model.

    Attributes:
        temperatures: (6,) of the findings' log-odds, above 0.
        biases: (6,) added to the log-odds after that.
        points: the operating point of each of the six findings; empty where none is known.
        class_temperature: of the seven classes' log-probabilities, above 0.
        calibrated: False where there is no validation, and scores stay as they are.
        localisation: a line that stands above every heat-map; empty where the maps are known to localise.
    """

    temperatures: np.ndarray
    biases: np.ndarray
    points: Mapping[str, OperatingPoint]
    class_temperature: float = 1.0
    calibrated: bool = True
    localisation: str = UNMEASURED

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Calibrate (…, 6) scores: the share of such radiographs that show the finding (Platt, 1999); float64.

        It holds where findings are as common as in validation, and is not re-weighted.
        """
        return posterior.platt(scores, self.temperatures, self.biases) if self.calibrated else np.float64(scores)

    def classes(self, scores: np.ndarray) -> np.ndarray:
        """Calibrate (…, 7) probabilities of the classes at equal shares; float64."""
        return posterior.tempered(scores, self.class_temperature)

    def above(self, scores: np.ndarray) -> dict[str, bool]:
        """Whether (6,) scores reach their findings' operating points."""
        rounded = dict(zip(SIX_FINDINGS, np.round(np.asarray(scores, dtype=np.float64), DECIMALS), strict=True))
        return {name: bool(rounded[name] >= point.threshold) for name, point in self.points.items()}


def uncalibrated() -> Interpretation:
    """Scores as they are, without operating points."""
    return Interpretation(np.ones(len(SIX_FINDINGS)), np.zeros(len(SIX_FINDINGS)), {}, calibrated=False)


def of_reference() -> Interpretation:
    """The interpretation in the committed reference's tables; `StudyError` where one is damaged."""
    fitted, points = config.REFERENCE / "calibration_fit.csv", config.REFERENCE / "operating_points.csv"
    meaning = uncalibrated()
    if fitted.is_file() and points.is_file():
        meaning = _from_tables(_rows(fitted), _rows(points), f"{fitted} or {points.name}")
    return replace(meaning, localisation=localisation_note(config.REFERENCE / "localisation.csv"))


def of_model(path: Path) -> Interpretation:
    """The interpretation fitted to the validation predictions beside a model; `StudyError` where they are damaged."""
    table = path.parent / "predictions_valid.csv"
    if not table.is_file():
        return uncalibrated()
    # pandas and SciPy take a second to import, and the reference needs neither.
    from chestxray.evaluation import calibration, operating_points, predictions

    valid = predictions.read_predictions(table)
    fitted, points = calibration.fit(valid), operating_points.choose(valid)
    return _from_tables(fitted.to_dict("index"), points.to_dict("index"), str(table))


def localisation_note(table: Path) -> str:
    """A line on what heat-maps are worth, from the pointing game in `localisation.csv`; empty where they localise.

    They do where their peaks lie in boxes more often than the image's centre and a fixed point of each finding: where
    the 95 % intervals of both differences lie above zero. `UNMEASURED` where there is no table.
    """
    if not table.is_file():
        return UNMEASURED
    with table.open(encoding="utf-8", newline="") as file:
        rows = {row.get("metric"): row for row in csv.DictReader(file) if row.get("finding") == "mean"}
    try:
        share = float(rows["pointing"]["estimate"])
        for rival, gain, name in (
            ("centre_pointing", "pointing_gain", "the image's centre"),
            ("fixed_pointing", "fixed_gain", "one fixed point for each finding"),
        ):
            known = rival == "centre_pointing" or rows.get(rival, {}).get("estimate")
            if known and not float(rows[gain]["low"]) > 0:
                other = float(rows[rival]["estimate"])
                return (
                    f"The heat-maps do not localise: their peak lies in the radiologist's box in {100 * share:.0f} % "
                    f"of the radiographs, {name} in {100 * other:.0f} %."
                )
    except (KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{table}: cannot be read ({type(error).__name__}: {error}); restore it") from error
    return ""


def _from_tables(fitted: Mapping[str, Mapping], points: Mapping[str, Mapping], source: str) -> Interpretation:
    """An interpretation from rows of temperatures and biases, and of operating points, by finding."""
    try:
        keys, names = ("temperature", "bias"), (*SIX_FINDINGS, "classes")
        temperatures, biases = (np.array([float(fitted[name][key]) for name in names]) for key in keys)
        if not (np.isfinite(biases).all() and np.isfinite(temperatures).all() and (temperatures > 0).all()):
            raise ValueError("a temperature that is not above 0")
        thresholds = np.array([float(points[name]["threshold"]) for name in SIX_FINDINGS])
        lines = posterior.platt(thresholds, temperatures[:-1], biases[:-1])
        made = {
            name: OperatingPoint(
                float(threshold),
                float(line),
                *(float(points[name][key]) for key in ("sensitivity", "specificity")),
                *(int(float(points[name][key])) for key in ("n_images", "n_positive")),
            )
            for name, threshold, line in zip(SIX_FINDINGS, thresholds, lines, strict=True)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{source}: cannot be read ({type(error).__name__}: {error}); restore it") from error
    return Interpretation(temperatures[:-1], biases[:-1], made, float(temperatures[-1]))


def _rows(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a small table by its first column."""
    with path.open(encoding="utf-8", newline="") as file:
        return {next(iter(row.values())): row for row in csv.DictReader(file)}

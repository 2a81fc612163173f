"""What a model's scores mean: calibrated probabilities, and whether a score is above its finding's operating point.

It owns the arithmetic of an answer, with NumPy alone, and where what validation taught lies: in the tables of the
committed reference, or in the validation predictions beside a model. Nothing is fitted on test. It knows no images and
no networks.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chestxray import config
from chestxray.config import CLASSES, SIX_FINDINGS, StudyError

CALIBRATION, OPERATING_POINTS = "calibration_fit.csv", "operating_points.csv"
"""The tables of a reference that hold what validation taught."""

VALIDATION = "predictions_valid.csv"
"""A model's predictions for validation, beside its `model.keras`."""

DECIMALS = 6
"""Of a score in tables: thresholds were chosen among scores so rounded."""

_TINY = 1e-7


@dataclass(frozen=True)
class OperatingPoint:
    """A line chosen on validation so that it catches a set share of the radiographs with a finding.

    Attributes:
        threshold: of the model's own score; at it and above counts as above.
        probability: the same line as a calibrated probability, 0 to 1.
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
    """What validation taught about one model's scores.

    Attributes:
        temperatures: (7,) of the classes' log-odds, above 0.
        biases: (7,) added to the log-odds after that.
        points: the operating point of each of the six findings; empty where none is known.
        calibrated: False where validation taught nothing, and scores stay as they are.
    """

    temperatures: np.ndarray
    biases: np.ndarray
    points: Mapping[str, OperatingPoint]
    calibrated: bool = True

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Calibrate (…, 7) scores: the share of such radiographs that show the class (Platt, 1999); float64."""
        scores = np.asarray(scores, dtype=np.float64)
        if not self.calibrated:
            return scores
        held = np.clip(scores, _TINY, 1 - _TINY)
        odds = np.log(held) - np.log1p(-held)
        scaled = np.clip(odds / self.temperatures + self.biases, -500, 500)
        return 1 / (1 + np.exp(-scaled))

    def above(self, scores: np.ndarray) -> dict[str, bool]:
        """Whether (7,) scores reach their findings' operating points."""
        rounded = dict(zip(CLASSES, np.round(np.asarray(scores, dtype=np.float64), DECIMALS), strict=True))
        return {name: bool(rounded[name] >= point.threshold) for name, point in self.points.items()}


def nothing_known() -> Interpretation:
    """Scores as they are, without operating points."""
    return Interpretation(np.ones(len(CLASSES)), np.zeros(len(CLASSES)), {}, calibrated=False)


def of_reference() -> Interpretation:
    """What the committed reference's tables hold; nothing where they are missing.

    Raises:
        StudyError: a table is damaged.
    """
    fitted, points = config.REFERENCE / CALIBRATION, config.REFERENCE / OPERATING_POINTS
    if not fitted.is_file() or not points.is_file():
        return nothing_known()
    return _made(_rows(fitted, "class", CLASSES), _rows(points, "finding", SIX_FINDINGS), fitted)


def of_model(path: Path) -> Interpretation:
    """What the validation predictions beside a model teach; nothing where there are none.

    Raises:
        StudyError: the predictions are damaged, or of radiographs of which none shows one of the findings.
    """
    table = path.parent / VALIDATION
    if not table.is_file():
        return nothing_known()
    from chestxray.evaluation import (
        calibration,
        operating_points,
        predictions,  # pandas and SciPy take a second to import
    )

    valid = predictions.read_predictions(table)
    fitted, points = calibration.fit_findings(valid), operating_points.choose(valid)
    return _made(fitted.to_dict("index"), points.to_dict("index"), table)


def _made(fitted: Mapping[str, Mapping], points: Mapping[str, Mapping], source: Path) -> Interpretation:
    try:
        temperatures, biases = (np.array([float(fitted[name][key]) for name in CLASSES]) for key in _FITTED)
        if not (np.isfinite(biases).all() and np.isfinite(temperatures).all() and (temperatures > 0).all()):
            raise ValueError("a temperature that is not above 0")
        scale = Interpretation(temperatures, biases, {})
        lines = scale.probabilities([float(points[name]["threshold"]) if name in points else 0.5 for name in CLASSES])
        made = {
            name: OperatingPoint(
                threshold=float(points[name]["threshold"]),
                probability=float(lines[CLASSES.index(name)]),
                sensitivity=float(points[name]["sensitivity"]),
                specificity=float(points[name]["specificity"]),
                n_images=int(float(points[name]["n_images"])),
                n_positive=int(float(points[name]["n_positive"])),
            )
            for name in SIX_FINDINGS
        }
    except (KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{source}: cannot be read ({type(error).__name__}: {error}); restore it") from error
    return Interpretation(temperatures, biases, made)


_FITTED = ("temperature", "bias")


def _rows(path: Path, key: str, names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The rows of a small table by one of its columns.

    Raises:
        StudyError: a name has no row.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = {row.get(key, ""): row for row in csv.DictReader(file)}
    for name in names:
        if name not in rows:
            raise StudyError(f"{path}: no row for {name}; restore it")
    return rows

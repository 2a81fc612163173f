"""Operating points: a threshold for each finding, its sensitivity and specificity, and decision curves.

A threshold is chosen on validation and only measured on test.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from chestxray.config import SIX_FINDINGS, StudyError
from chestxray.evaluation import bootstrap, predictions
from chestxray.evaluation.bootstrap import Draws

SENSITIVITY = 0.8
"""Share of the positive validation images that a threshold has to catch, unless another is asked for."""

METRICS: dict[str, str] = {
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "ppv": "Positive predictive value",
    "npv": "Negative predictive value",
}


def threshold(scores: np.ndarray, truth: np.ndarray, sensitivity: float = SENSITIVITY) -> float:
    """The highest threshold at which `score >= threshold` catches at least this share of the positives.

    Args:
        scores: (n,) high for positive.
        truth: (n,) bool.
        sensitivity: above 0, at most 1.

    Raises:
        StudyError: the sensitivity is out of range, or there is no positive.
    """
    if not 0 < sensitivity <= 1:
        raise StudyError(f"sensitivity {sensitivity}: give a share above 0 and at most 1")
    positives = np.sort(np.asarray(scores, dtype=float)[np.asarray(truth, dtype=bool)])[::-1]
    if not len(positives):
        raise StudyError("no positive validation image to choose a threshold on: use a dataset with more images")
    return float(positives[int(np.ceil(sensitivity * len(positives) - 1e-9)) - 1])


def choose(valid: pd.DataFrame, sensitivity: float = SENSITIVITY) -> pd.DataFrame:
    """Choose each finding's threshold on all validation images.

    Args:
        valid: predictions for validation.
        sensitivity: as for `threshold`.

    Returns:
        Index `finding`, the six; columns `threshold`, `target`, the validation images' `sensitivity` and
        `specificity` there, `n_images` and `n_positive`.

    Raises:
        StudyError: as `threshold`.
    """
    valid = predictions.checked(valid)
    rows = {}
    for name in SIX_FINDINGS:
        truth, scores = predictions.finding(valid, name)
        line = threshold(scores, truth, sensitivity)
        above = scores >= line
        rows[name] = {
            "threshold": line,
            "target": sensitivity,
            "sensitivity": float(above[truth].mean()),
            "specificity": float((~above[~truth]).mean()) if (~truth).any() else np.nan,
            "n_images": len(truth),
            "n_positive": int(truth.sum()),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("finding")


def measure(test: pd.DataFrame, points: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """What the thresholds do on test.

    Args:
        test: predictions for test, or the balanced rows of them.
        points: what `choose` returned.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index (`finding`, `metric`), the last finding `mean`; columns `estimate`, `low`, `high`, `draws`, `n_images`,
        `n_positive`. The predictive values hold for the share of positives in this very test.
    """
    test = predictions.checked(test)
    drawn = Draws.of(test["patient"], draws, seed)
    rows, sums = {}, dict.fromkeys(METRICS, 0.0)
    for name, line in points["threshold"].items():
        truth, scores = predictions.finding(test, name)
        above = scores >= line
        found = {
            "sensitivity": drawn.means(above, truth),
            "specificity": drawn.means(~above, ~truth),
            "ppv": drawn.means(truth, above),
            "npv": drawn.means(~truth, ~above),
        }
        for metric, values in found.items():
            rows[name, metric] = bootstrap.entry(values) | {"n_images": len(test), "n_positive": int(truth.sum())}
            sums[metric] = sums[metric] + values / len(points)
    for metric, values in sums.items():
        rows["mean", metric] = bootstrap.entry(values) | {"n_images": len(test), "n_positive": pd.NA}
    return bootstrap.table(rows, ["finding", "metric"]).astype({"n_positive": "Int64"})


def net_benefit(
    probabilities: np.ndarray, truth: np.ndarray, thresholds: Sequence[float], draws: Draws
) -> pd.DataFrame:
    """Decision curve (Vickers & Elkin, Med Decis Making 2006).

    Net benefit counts the true positives among all radiographs, less the false positives, each weighing the odds of
    the threshold: at 10 %, one false alarm costs a ninth of what a caught finding is worth.

    Args:
        probabilities: (n,) calibrated.
        truth: (n,) bool.
        thresholds: (T,) probabilities, above 0 and below 1, at which one would act.
        draws: draws over the same images.

    Returns:
        One row per threshold: `threshold`, `model` with `low` and `high`, and `all` (acting on every radiograph).
        Acting on none has 0.
    """
    lines = np.asarray(thresholds, dtype=float)
    truth = np.asarray(truth, dtype=bool)
    above = np.asarray(probabilities, dtype=float)[:, None] >= lines[None, :]
    odds = lines / (1 - lines)
    images = draws.totals(np.ones(len(truth)))[:, None]
    gain = (draws.totals(above & truth[:, None]) - odds * draws.totals(above & ~truth[:, None])) / images
    everyone = truth.mean() - odds * (~truth).mean()
    low, high, _ = zip(*(bootstrap.interval(column) for column in gain.T), strict=True)
    return pd.DataFrame({"threshold": lines, "model": gain[0], "low": low, "high": high, "all": everyone})


def decision_curves(
    calibrated: pd.DataFrame, thresholds: Sequence[float], draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """`net_benefit` of each of the six findings: its columns, and `finding` before them.

    Args:
        calibrated: predictions for test after `calibration.apply`.
        thresholds: probabilities at which one would act.
        draws: how many times the patients are drawn.
        seed: seeds the draws.
    """
    table = predictions.checked(calibrated)
    drawn = Draws.of(table["patient"], draws, seed)
    parts = []
    for name in SIX_FINDINGS:
        truth, probabilities = predictions.finding(table, name)
        curve = net_benefit(probabilities, truth, thresholds, drawn)
        curve.insert(0, "finding", name)
        parts.append(curve)
    return pd.concat(parts, ignore_index=True)

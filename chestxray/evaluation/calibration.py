"""Calibration: Platt and temperature scaling, reliability diagrams, and the errors of probabilities.

Of a **finding**, over all test images: of the radiographs given 20 %, do 20 % show it? Of the **classes**, over images
with exactly one: is the most probable class right as often as its probability says? Everything is fitted on validation.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import optimize, special

from chestxray.config import CLASSES, SIX_FINDINGS, StudyError
from chestxray.evaluation import bootstrap
from chestxray.evaluation.bootstrap import Draws
from chestxray.evaluation.predictions import checked, classes_and_scores, finding

BINS = 10
TINY = 1e-7
"""Nearest that a probability comes to 0 or 1 before its log-odds are taken."""
_HEAT = np.log(100.0)  # bound of a temperature's logarithm


def _bin_totals(scores: np.ndarray, truth: np.ndarray, draws: Draws, bins: int) -> tuple[np.ndarray, ...]:
    """Images, sum of scores, and positives of each bin in every draw, each (1 + draws, bins).

    Bins hold equally many images, fewer bins where scores coincide.
    """
    scores, truth = np.asarray(scores, dtype=float), np.asarray(truth, dtype=bool)
    edges = np.unique(np.percentile(scores, np.linspace(0, 100, bins + 1)))
    inside = np.searchsorted(edges[1:-1], scores)
    cells = np.eye(max(1, len(edges) - 1))[inside]
    return draws.totals(cells), draws.totals(cells * scores[:, None]), draws.totals(cells * truth[:, None])


def reliability(scores: np.ndarray, truth: np.ndarray, draws: Draws, bins: int = BINS) -> pd.DataFrame:
    """The points of a reliability diagram, in bins of equally many images.

    Args:
        scores: (n,) probabilities.
        truth: (n,) bool.
        draws: draws over the same images.
        bins: how many.

    Returns:
        One row per bin that has images: `predicted` (mean probability), `observed` (share of positives) with its
        interval `low` and `high`, and `images`.
    """
    images, predicted, positive = _bin_totals(scores, truth, draws, bins)
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = positive / images
    rows = []
    for k in np.flatnonzero(images[0]):
        low, high, _ = bootstrap.interval(observed[:, k])
        point = {"predicted": predicted[0, k] / images[0, k], "observed": observed[0, k]}
        rows.append(point | {"low": low, "high": high, "images": int(images[0, k])})
    return pd.DataFrame(rows)


def error_draws(scores: np.ndarray, truth: np.ndarray, draws: Draws, bins: int = BINS) -> np.ndarray:
    """Expected calibration error in every draw: the mean gap of a reliability diagram (Naeini et al., AAAI 2015).

    (1 + draws,), 0 to 1. Even a perfect model shows some error on few images, and a draw shows more; give its interval
    by `bootstrap.interval(…, basic=True)`.

    Args:
        scores: (n,) probabilities.
        truth: (n,) bool.
        draws: draws over the same images.
        bins: how many, of equally many images.
    """
    images, predicted, positive = _bin_totals(scores, truth, draws, bins)
    return np.abs(predicted - positive).sum(axis=1) / images.sum(axis=1)


def brier_draws(scores: np.ndarray, truth: np.ndarray, draws: Draws) -> np.ndarray:
    """Brier score in every draw, (1 + draws,): the mean squared error of probabilities (Brier, Mon Weather Rev 1950).

    Args:
        scores: (n,) probabilities of one finding (a score of 0 to 1), or (n, K) of classes that sum to one (0 to 2).
        truth: the same shape, 0 or 1.
        draws: draws over the same images.
    """
    squares = (np.asarray(scores, dtype=float) - np.asarray(truth, dtype=float)) ** 2
    return draws.means(squares.reshape(len(squares), -1).sum(axis=1))


def fit_findings(valid: pd.DataFrame) -> pd.DataFrame:
    """Platt scaling of each finding on all validation images.

    Args:
        valid: predictions for validation.

    Returns:
        Index `class`; columns `temperature` (above 0, so that no order of images changes), `bias`, `n_images` and
        `n_positive`. A finding that no image, or every image, shows keeps temperature 1 and bias 0.
    """
    valid = checked(valid)
    rows = {}
    for name in SIX_FINDINGS:
        truth, scores = finding(valid, name)
        temperature, bias = fit_finding(scores, truth)
        rows[name] = {"temperature": temperature, "bias": bias, "n_images": len(truth), "n_positive": int(truth.sum())}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def fit_finding(scores: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Temperature and bias of one finding's log-odds by maximum likelihood (Platt, 1999).

    Args:
        scores: (n,) probabilities.
        truth: (n,) bool.
    """
    truth = np.asarray(truth, dtype=bool)
    if truth.all() or not truth.any():
        return 1.0, 0.0
    odds = _log_odds(scores)

    def loss(parameters: np.ndarray) -> float:
        scaled = odds * np.exp(-parameters[0]) + parameters[1]
        return np.logaddexp(0, np.where(truth, -scaled, scaled)).mean()

    heat, bias = optimize.minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=[(-_HEAT, _HEAT), (-20, 20)]).x
    return float(np.exp(heat)), float(bias)


def apply_finding(scores: np.ndarray, temperature: float, bias: float) -> np.ndarray:
    """Calibrated probabilities of one finding.

    Args:
        scores: (n,) probabilities.
        temperature: above 0; divides the log-odds.
        bias: added to them.
    """
    return special.expit(_log_odds(scores) / temperature + bias)


def apply_findings(predictions: pd.DataFrame, fitted: pd.DataFrame) -> pd.DataFrame:
    """Predictions with each finding's probability calibrated.

    Args:
        predictions: a predictions table.
        fitted: from `fit_findings`.
    """
    columns = {f"{name}_present": row for name, row in fitted.iterrows()}
    scaled = {name: apply_finding(predictions[name], row["temperature"], row["bias"]) for name, row in columns.items()}
    return predictions.assign(**scaled)


def _log_odds(scores: np.ndarray) -> np.ndarray:
    return special.logit(np.clip(np.asarray(scores, dtype=float), TINY, 1 - TINY))


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Temperature of the classes by maximum likelihood, all classes weighing the same (Guo et al., ICML 2017).

    Args:
        probabilities: (n, K), each row sums to one.
        labels: (n,) class indices.

    Raises:
        StudyError: no image.
    """
    if not len(labels):
        raise StudyError("calibration: no validation image with a single class; use a dataset with more images")
    weights = 1 / np.bincount(labels)[labels]

    def loss(heat: float) -> float:
        return -weights @ np.log(apply_temperature(probabilities, np.exp(heat))[range(len(labels)), labels])

    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-_HEAT, _HEAT), method="bounded").x))


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Calibrated probabilities of classes, (n, K): above 1, a temperature makes them more even.

    Args:
        probabilities: (n, K), each row sums to one.
        temperature: above 0; divides the log-probabilities.
    """
    return special.softmax(np.log(np.clip(probabilities, TINY, 1)) / temperature, axis=1)


def findings_table(valid: pd.DataFrame, test: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Calibration of each finding over all test images, before and after Platt scaling.

    Args:
        valid: predictions for validation, on which temperature and bias are fitted.
        test: predictions for test.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index (`class`, `stage`, `metric`): stages `as trained` and `temperature and bias`; metrics `ece` (bins of
        equally many images) and `brier`. Columns `estimate`, `low`, `high`, `draws`.
    """
    test = checked(test)
    drawn = Draws.of(test["patient"], draws, seed)
    rows = {}
    for stage, table in {"as trained": test, "temperature and bias": apply_findings(test, fit_findings(valid))}.items():
        for name in SIX_FINDINGS:
            truth, scores = finding(table, name)
            rows[name, stage, "ece"] = _error_entry(scores, truth, drawn)
            rows[name, stage, "brier"] = bootstrap.entry(brier_draws(scores, truth, drawn))
    return bootstrap.table(rows, ["class", "stage", "metric"])


def classes_table(valid: pd.DataFrame, test: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Calibration of the most probable class over the test images with exactly one of the seven.

    The probabilities are meant for classes that are equally common: give the balanced test, if there is one.

    Args:
        valid: predictions for validation, on which the temperature is fitted.
        test: predictions for test.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index (`stage`, `metric`): stages `as trained` and `temperature`; metrics `ece` (of the most probable class),
        `brier` (0 to 2) and `accuracy`. Columns as in `findings_table`.
    """
    valid, test = (table[table["label"].ne("")] for table in (checked(valid), checked(test)))
    (learned, fitted_on), (truth, scores) = classes_and_scores(valid), classes_and_scores(test)
    stages = {"as trained": scores, "temperature": apply_temperature(scores, fit_temperature(fitted_on, learned))}
    drawn = Draws.of(test["patient"], draws, seed)
    rows = {}
    for stage, values in stages.items():
        right = values.argmax(axis=1) == truth
        rows[stage, "ece"] = _error_entry(values.max(axis=1), right, drawn)
        rows[stage, "brier"] = bootstrap.entry(brier_draws(values, np.eye(len(CLASSES))[truth], drawn))
        rows[stage, "accuracy"] = bootstrap.entry(drawn.means(right))
    return bootstrap.table(rows, ["stage", "metric"])


def reliability_table(stages: dict[str, pd.DataFrame], draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Reliability diagrams of each finding over all test images: columns `class`, `stage`, and those of `reliability`.

    Args:
        stages: predictions tables of the same images, such as before and after calibration.
        draws: how many times the patients are drawn.
        seed: seeds the draws.
    """
    parts = []
    for stage, table in stages.items():
        drawn = Draws.of(table["patient"], draws, seed)
        for name in SIX_FINDINGS:
            truth, scores = finding(table, name)
            parts.append(reliability(scores, truth, drawn).assign(stage=stage, **{"class": name}))
    columns = ["class", "stage", "predicted", "observed", "low", "high", "images"]
    return pd.concat(parts, ignore_index=True)[columns]


def _error_entry(scores: np.ndarray, truth: np.ndarray, draws: Draws) -> dict[str, float]:
    """The calibration error with its basic interval, clipped to 0–1 and made to include the estimate."""
    entry = bootstrap.entry(error_draws(scores, truth, draws), basic=True)
    return entry | {"low": max(0.0, entry["low"]), "high": min(1.0, max(entry["high"], entry["estimate"]))}

"""Calibration: temperature scaling, Platt scaling, bias and prior correction, and the errors they leave.

Of a **finding**, over all test images: of the radiographs given 20 %, do 20 % show it? Each has a probability of its
own. Of the **classes**, over the images with exactly one: is the most probable class right as often as its probability
says? There the seven probabilities are first brought to sum to one. Everything is fitted on validation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import optimize, special

from chestxray.config import CLASSES, StudyError
from chestxray.evaluation import bootstrap
from chestxray.evaluation.bootstrap import Draws
from chestxray.evaluation.predictions import TINY, checked, classes_and_scores, one_class, shows

BINS = 10


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


def fit_classes(
    probabilities: np.ndarray, labels: np.ndarray, bias: bool = False, even: bool = False
) -> tuple[float, np.ndarray]:
    """Temperature, and on request a bias for each class, by maximum likelihood (Guo et al., ICML 2017).

    Args:
        probabilities: (n, K) scores of validation images.
        labels: (n,) class indices.
        bias: fit a bias for each class too; they sum to zero.
        even: weigh all classes the same, as if all were equally common.

    Returns:
        Temperature (above 1 makes probabilities more even) and (K,) biases, for `apply_classes`.

    Raises:
        StudyError: no image.
    """
    labels = np.asarray(labels, dtype=int)
    if not len(labels):
        raise StudyError("calibration: no validation image with a single class; use a dataset with more images")
    logits = np.log(one_class(probabilities))
    number = logits.shape[1]
    weights = 1 / np.bincount(labels, minlength=number)[labels] if even else np.ones(len(labels))
    weights = weights / weights.sum()
    truth = np.eye(number)[labels]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scaled = logits * np.exp(-parameters[0]) + (parameters[1:] if bias else 0)
        surprise = special.logsumexp(scaled, axis=1) - scaled[range(len(labels)), labels]
        slope = (special.softmax(scaled, axis=1) - truth) * weights[:, None]
        by_heat = -(slope * logits).sum() * np.exp(-parameters[0])
        return float(weights @ surprise), np.r_[by_heat, slope.sum(axis=0) if bias else []]

    temperature, shifts = _minimise(loss, number if bias else 0)
    return temperature, shifts - shifts.mean() if bias else np.zeros(number)


def apply_classes(probabilities: np.ndarray, temperature: float, bias: np.ndarray) -> np.ndarray:
    """Calibrated probabilities of classes: (n, K), each row sums to one.

    Args:
        probabilities: (n, K) scores, which need not sum to one.
        temperature: above 0; divides the log-probabilities.
        bias: (K,) added to them.
    """
    return special.softmax(np.log(one_class(probabilities)) / temperature + bias, axis=1)


def fit_offsets(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, pull: float = 0.01) -> np.ndarray:
    """Bias correction alone: what to add to each class's log-odds so that classes are named as often as they occur.

    An offset moves all radiographs alike: no AUROC changes, only which class is the most probable. The (K,) offsets
    have mean 0 and minimise the weighted cross-entropy of the softmax of the log-odds (Alexandari et al., ICML 2020).

    Args:
        logits: (n, K) log-odds of images on which nothing else was fitted.
        labels: (n,) class indices.
        weights: (n,) of the images, sum 1; give every class the same sum for classes that are equally common.
        pull: weight of the squared offsets, which keeps those of rare classes small.
    """
    rows = range(len(labels))

    def loss(offsets: np.ndarray) -> float:
        right = special.log_softmax(logits + offsets, axis=1)[rows, labels]
        return float(-(weights * right).sum() + pull * (offsets**2).sum())

    found = optimize.minimize(loss, np.zeros(logits.shape[1]), method="L-BFGS-B").x
    return found - found.mean()


def _minimise(loss: Callable[[np.ndarray], tuple[float, np.ndarray]], biases: int) -> tuple[float, np.ndarray]:
    """Temperature and biases of the smallest loss, a function of the temperature's logarithm and the biases."""
    limits = [(-np.log(100.0), np.log(100.0)), *[(-20, 20)] * biases]
    found = optimize.minimize(loss, np.zeros(1 + biases), jac=True, method="L-BFGS-B", bounds=limits).x
    return float(np.exp(found[0])), found[1:]


def fit_findings(valid: pd.DataFrame) -> pd.DataFrame:
    """Platt scaling of each class on all validation images.

    A rare finding's probability, trained where it was made common, becomes the share of such radiographs that show it.

    Args:
        valid: predictions for validation.

    Returns:
        Index `class`; columns `temperature` (above 0, so that no order of images changes), `bias`, `n_images` and
        `n_positive`. A class that no image, or every image, shows keeps temperature 1 and bias 0.
    """
    valid = checked(valid)
    rows = {}
    for name in CLASSES:
        truth = shows(valid, name)
        temperature, bias = fit_finding(valid[name].to_numpy(dtype=float), truth)
        rows[name] = {"temperature": temperature, "bias": bias, "n_images": len(truth), "n_positive": int(truth.sum())}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def fit_finding(scores: np.ndarray, truth: np.ndarray, bias: bool = True) -> tuple[float, float]:
    """Temperature and bias of one finding's log-odds by maximum likelihood (Platt, 1999).

    Args:
        scores: (n,) probabilities.
        truth: (n,) bool.
        bias: fit a bias too; 0 otherwise.
    """
    truth = np.asarray(truth, dtype=bool)
    if truth.all() or not truth.any():
        return 1.0, 0.0
    odds = _log_odds(scores)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, shift = np.exp(-parameters[0]), parameters[1] if bias else 0.0
        scaled = odds * slope + shift
        surprise = np.logaddexp(0, np.where(truth, -scaled, scaled)).mean()
        gap = (special.expit(scaled) - truth) / len(truth)
        return float(surprise), np.r_[-(gap * odds).sum() * slope, [gap.sum()] if bias else []]

    temperature, shifts = _minimise(loss, int(bias))
    return temperature, float(shifts.sum())


def apply_finding(scores: np.ndarray, temperature: float, bias: float) -> np.ndarray:
    """Calibrated probabilities of one finding.

    Args:
        scores: (n,) probabilities.
        temperature: above 0; divides the log-odds.
        bias: added to them.
    """
    return special.expit(_log_odds(scores) / temperature + bias)


def apply_findings(predictions: pd.DataFrame, fitted: pd.DataFrame) -> pd.DataFrame:
    """Predictions with each class's probability calibrated.

    Args:
        predictions: a predictions table.
        fitted: from `fit_findings`.
    """
    scaled = {
        name: apply_finding(predictions[name].to_numpy(dtype=float), row["temperature"], row["bias"])
        for name, row in fitted.iterrows()
    }
    return predictions.assign(**scaled)


def _log_odds(scores: np.ndarray) -> np.ndarray:
    return special.logit(np.clip(scores, TINY, 1 - TINY))


def shift(probabilities: np.ndarray, trained: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Prior correction for classes commoner or rarer than in training (Saerens, Latinne & Decaestecker, 2002, eq. 2.4).

    It holds where only the classes' shares differ, not the images of a class. (n, K), each row sums to one.

    Args:
        probabilities: (n, K) scores.
        trained: (K,) shares of the classes that the model was trained on.
        there: (K,) shares where it is used.
    """
    moved = one_class(probabilities) * (np.asarray(there, dtype=float) / np.asarray(trained, dtype=float))
    return moved / moved.sum(axis=1, keepdims=True)


def estimate_shares(probabilities: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """(K,) shares, sum 1, of the classes among images without a label, by EM (Saerens et al., 2002, eq. 2.9).

    Args:
        probabilities: (n, K) scores of the images in question; the better calibrated, the better the estimate.
        trained: (K,) shares of the classes that the model was trained on.
    """
    shares = np.asarray(trained, dtype=float)
    for _ in range(1000):
        before, shares = shares, shift(probabilities, trained, shares).mean(axis=0)
        if np.abs(shares - before).max() < 1e-8:
            break
    return shares


def findings_table(valid: pd.DataFrame, test: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Calibration of each class over all test images, before and after scaling.

    Args:
        valid: predictions for validation, on which temperature and bias are fitted.
        test: predictions for test.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index (`class`, `stage`, `metric`): stages `as trained`, `temperature`, `temperature and bias`; metrics `ece`
        (bins of equally many images) and `brier`. Columns `estimate`, `low`, `high`, `draws`.
    """
    valid, test = checked(valid), checked(test)
    drawn = Draws.of(test["patient"], draws, seed)
    rows = {}
    for name in CLASSES:
        truth, scores = shows(test, name), test[name].to_numpy(dtype=float)
        fitted_on = valid[name].to_numpy(dtype=float), shows(valid, name)
        stages = {
            "as trained": scores,
            "temperature": apply_finding(scores, *fit_finding(*fitted_on, bias=False)),
            "temperature and bias": apply_finding(scores, *fit_finding(*fitted_on)),
        }
        for stage, values in stages.items():
            rows[name, stage, "ece"] = _error_entry(values, truth, drawn)
            rows[name, stage, "brier"] = bootstrap.entry(brier_draws(values, truth, drawn))
    return bootstrap.table(rows, ["class", "stage", "metric"])


def classes_table(
    valid: pd.DataFrame, test: pd.DataFrame, draws: int = 2000, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Calibration of the most probable class over the test images with exactly one of the seven.

    Args:
        valid: predictions for validation; temperature and shares come from it.
        test: predictions for test.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Two tables. Calibration: index (`stage`, `metric`), stages `as trained`, `temperature`, `temperature and bias`,
        `shares of validation` and `shares estimated` (prior correction after a temperature and biases fitted with all
        classes weighing the same), metrics `ece` (of the most probable class), `brier` (0 to 2) and `accuracy`.
        Shares: index `class`, columns `training`, `validation`, `estimated` (on test without labels) and `test`.
    """
    valid, test = checked(valid), checked(test)
    learned, fitted_on = classes_and_scores(valid[valid["label"].ne("")])
    truth, scores = classes_and_scores(test[test["label"].ne("")])
    number = len(CLASSES)
    trained = np.full(number, 1 / number)  # the training set is balanced
    there = np.bincount(learned, minlength=number) / max(1, len(learned))
    # Without the biases the estimate goes astray (Alexandari, Kundaje & Shrikumar, ICML 2020).
    even = apply_classes(scores, *fit_classes(fitted_on, learned, bias=True, even=True))
    estimated = estimate_shares(even, trained)
    stages = {
        "as trained": one_class(scores),
        "temperature": apply_classes(scores, *fit_classes(fitted_on, learned)),
        "temperature and bias": apply_classes(scores, *fit_classes(fitted_on, learned, bias=True)),
        "shares of validation": shift(even, trained, there),
        "shares estimated": shift(even, trained, estimated),
    }
    drawn = Draws.of(test.loc[test["label"].ne(""), "patient"], draws, seed)
    rows = {}
    for stage, values in stages.items():
        right = values.argmax(axis=1) == truth
        rows[stage, "ece"] = _error_entry(values.max(axis=1), right, drawn)
        rows[stage, "brier"] = bootstrap.entry(brier_draws(values, np.eye(number)[truth], drawn))
        rows[stage, "accuracy"] = bootstrap.entry(drawn.means(right))
    real = np.bincount(truth, minlength=number) / max(1, len(truth))
    shares = {"training": trained, "validation": there, "estimated": estimated, "test": real}
    return bootstrap.table(rows, ["stage", "metric"]), pd.DataFrame(shares, index=pd.Index(CLASSES, name="class"))


def reliability_table(stages: dict[str, pd.DataFrame], draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Reliability diagrams of each class over all test images: columns `class`, `stage`, and those of `reliability`.

    Args:
        stages: predictions tables of the same images, such as before and after calibration.
        draws: how many times the patients are drawn.
        seed: seeds the draws.
    """
    parts = []
    for stage, predictions in stages.items():
        table = checked(predictions)
        drawn = Draws.of(table["patient"], draws, seed)
        for name in CLASSES:
            points = reliability(table[name], shows(table, name), drawn)
            points.insert(0, "class", name)
            points.insert(1, "stage", stage)
            parts.append(points)
    return pd.concat(parts, ignore_index=True)


def _error_entry(scores: np.ndarray, truth: np.ndarray, draws: Draws) -> dict[str, float]:
    """The calibration error with its basic interval, clipped to 0–1 and made to include the estimate."""
    entry = bootstrap.entry(error_draws(scores, truth, draws), basic=True)
    return entry | {"low": max(0.0, entry["low"]), "high": min(1.0, max(entry["high"], entry["estimate"]))}

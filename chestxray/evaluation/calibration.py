"""Calibration: Platt and temperature scaling, reliability diagrams, and the errors of probabilities.

Of a **finding**, over all test images: of the radiographs given 20 %, do 20 % show it? Of the **classes**, over images
with exactly one, at equal shares: is the most probable class right as often as its probability says? Everything is
fitted on validation.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import optimize, special

from chestxray.config import CLASSES, PRESENT, SIX_FINDINGS, StudyError
from chestxray.evaluation import bootstrap
from chestxray.evaluation.bootstrap import Draws
from chestxray.evaluation.posterior import TINY, platt, tempered
from chestxray.evaluation.predictions import PROBABILITIES, checked, classes_and_scores, finding

BINS = 10
_HEAT = np.log(100.0)  # bound of a temperature's logarithm


def _bin_totals(
    scores: np.ndarray, truth: np.ndarray, draws: Draws, bins: int, weights: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """Images, sum of scores, and positives of each bin in every draw, each (1 + draws, bins), by (n,) weights if any.

    Bins hold equally many images, fewer bins where scores coincide.
    """
    scores, truth = np.asarray(scores, dtype=float), np.asarray(truth, dtype=bool)
    edges = np.unique(np.percentile(scores, np.linspace(0, 100, bins + 1)))
    inside = np.searchsorted(edges[1:-1], scores)
    cells = np.eye(max(1, len(edges) - 1))[inside] * (1 if weights is None else weights[:, None])
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


def error_draws(
    scores: np.ndarray, truth: np.ndarray, draws: Draws, bins: int = BINS, weights: np.ndarray | None = None
) -> np.ndarray:
    """Expected calibration error in every draw: the mean gap of a reliability diagram (Naeini et al., AAAI 2015).

    (1 + draws,), 0 to 1. Even a perfect model shows some error on few images, and a draw shows more; give its interval
    by `bootstrap.interval(…, basic=True)`.

    Args:
        scores: (n,) probabilities.
        truth: (n,) bool.
        draws: draws over the same images.
        bins: how many, of equally many images.
        weights: (n,) how much each image counts; all the same if None.
    """
    images, predicted, positive = _bin_totals(scores, truth, draws, bins, weights)
    return np.abs(predicted - positive).sum(axis=1) / images.sum(axis=1)


def fit(valid: pd.DataFrame) -> pd.DataFrame:
    """Platt scaling of each finding on all validation images, and one temperature of the classes on single-label ones.

    Args:
        valid: predictions for validation.

    Returns:
        Index `class`, the six findings and `classes`; columns `temperature` (above 0, so that no order of images
        changes), `bias` (0 for the classes), `n_images` and `n_positive`. A finding that no image, or every image,
        shows keeps temperature 1 and bias 0, as do the classes where no image has a single one.
    """
    valid = checked(valid)
    rows = {}
    for name in SIX_FINDINGS:
        truth, scores = finding(valid, name)
        temperature, bias = fit_finding(scores, truth)
        rows[name] = {"temperature": temperature, "bias": bias, "n_images": len(truth), "n_positive": int(truth.sum())}
    single = valid[valid["label"].ne("")]
    labels, scores = classes_and_scores(single)
    temperature = fit_temperature(scores, labels) if len(single) else 1.0
    rows["classes"] = {"temperature": temperature, "bias": 0.0, "n_images": len(single), "n_positive": len(single)}
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
    odds = special.logit(np.clip(np.asarray(scores, dtype=float), TINY, 1 - TINY))

    def loss(parameters: np.ndarray) -> float:
        scaled = odds * np.exp(-parameters[0]) + parameters[1]
        return np.logaddexp(0, np.where(truth, -scaled, scaled)).mean()

    heat, bias = optimize.minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=[(-_HEAT, _HEAT), (-20, 20)]).x
    return float(np.exp(heat)), float(bias)


def apply(predictions: pd.DataFrame, fitted: pd.DataFrame) -> pd.DataFrame:
    """Predictions with each finding's probability, and the seven of the classes at equal shares, calibrated.

    Args:
        predictions: a predictions table.
        fitted: from `fit`.
    """
    six = fitted.loc[list(SIX_FINDINGS)]
    findings = platt(predictions[list(PRESENT)].to_numpy(), six["temperature"].to_numpy(), six["bias"].to_numpy())
    classes = tempered(predictions[list(CLASSES)].to_numpy(), fitted.loc["classes", "temperature"])
    return predictions.assign(**dict(zip(PROBABILITIES, np.hstack([classes, findings]).T, strict=True)))


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
    return _fit_classes(probabilities, labels, biased=False)[0]


def _balanced(labels: np.ndarray) -> np.ndarray:
    """(n,) weights with sum 1 by which all classes that occur count the same."""
    weights = 1 / np.bincount(labels)[labels]
    return weights / weights.sum()


def _fit_classes(probabilities: np.ndarray, labels: np.ndarray, biased: bool) -> tuple[float, np.ndarray]:
    """Temperature and (K,) biases of the classes, which are 0 unless `biased`."""
    weights, truth = _balanced(labels)[:, np.newaxis], np.eye(probabilities.shape[1])[labels]
    given = np.log(np.clip(probabilities, TINY, 1))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scaled = given * np.exp(-parameters[0])
        logs = special.log_softmax(scaled + parameters[1:], axis=1)
        errors = weights * (np.exp(logs) - truth)
        return -(weights * logs * truth).sum(), np.append(-(errors * scaled).sum(), errors.sum(axis=0))

    bounds = [(-_HEAT, _HEAT), *[(-20.0, 20.0) if biased else (0.0, 0.0)] * truth.shape[1]]
    fine, start = {"ftol": 1e-14, "gtol": 1e-8}, np.zeros(len(bounds))
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=fine).x
    return float(np.exp(found[0])), found[1:]


def cross_fitted(valid: pd.DataFrame, folds: int = 5, seed: int = 0, draws: int = 2000) -> pd.DataFrame:
    """What calibrating the classes gains at equal shares: fitted on the patients of all folds but one, read on that.

    A bias per class is for comparison alone: `fit` has none.

    Args:
        valid: predictions for validation, of which those with a single class count.
        folds: parts of the patients, at least 2; at most as many as the largest class has images are made.
        seed: seeds folds and draws.
        draws: how many times the patients are drawn.

    Returns:
        Index (`stage`, `metric`): stages `as trained`, `temperature`, `temperature and biases`; metrics `log_loss`, the
        mean of the classes' means; `ece` of the most probable class, all classes weighing the same; and `difference` of
        the log-loss from the stage before, below 0 where it falls. Columns as in `findings_table`.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    single = checked(valid)
    single = single[single["label"].ne("")]
    truth, scores = classes_and_scores(single)
    stages = {name: scores.copy() for name in ("as trained", "temperature", "temperature and biases")}
    folds = max(2, min(folds, np.bincount(truth, minlength=1).max()))  # no more than the largest class has images
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for others, part in parts.split(scores, truth, single["patient"]):
        for name in list(stages)[1:]:
            fitted = _fit_classes(scores[others], truth[others], biased=name.endswith("biases"))
            stages[name][part] = tempered(scores[part], *fitted)
    return _class_rows(stages, truth, Draws.of(single["patient"], draws, seed))


def _class_rows(stages: dict[str, np.ndarray], truth: np.ndarray, drawn: Draws) -> pd.DataFrame:
    """What `cross_fitted` says of each stage's (n, 7) probabilities."""
    rows, before = {}, None
    for stage, values in stages.items():
        each = -np.log(np.clip(values[range(len(truth)), truth], TINY, 1))
        losses = np.mean([drawn.means(each, truth == k) for k in np.unique(truth)], axis=0)
        rows[stage, "log_loss"] = bootstrap.entry(losses)
        rows[stage, "ece"] = _error_entry(values.max(axis=1), values.argmax(axis=1) == truth, drawn, _balanced(truth))
        if before is not None:
            rows[stage, "difference"] = bootstrap.entry(losses - before)
        before = losses
    return bootstrap.table(rows, ["stage", "metric"])


def findings_table(valid: pd.DataFrame, test: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Calibration of each finding over all test images, before and after Platt scaling.

    Args:
        valid: predictions for validation, on which temperature and bias are fitted.
        test: predictions for test.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index (`class`, `stage`, `metric`): stages `as trained` and `temperature and bias`; metrics `ece` (bins of
        equally many images) and `brier`, the mean squared error (Brier, Mon Weather Rev 1950). Columns `estimate`,
        `low`, `high`, `draws`.
    """
    test = checked(test)
    drawn = Draws.of(test["patient"], draws, seed)
    rows = {}
    for stage, table in {"as trained": test, "temperature and bias": apply(test, fit(valid))}.items():
        for name in SIX_FINDINGS:
            truth, scores = finding(table, name)
            rows[name, stage, "ece"] = _error_entry(scores, truth, drawn)
            rows[name, stage, "brier"] = bootstrap.entry(drawn.means((scores - truth) ** 2))
    return bootstrap.table(rows, ["class", "stage", "metric"])


def classes_table(valid: pd.DataFrame, test: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Calibration of the classes at equal shares over the test images with exactly one of the seven.

    Args:
        valid: predictions for validation, on which the temperature is fitted.
        test: predictions for test.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        As `cross_fitted`, without the biases.
    """
    test = checked(test)
    test = test[test["label"].ne("")]
    truth, scores = classes_and_scores(test)
    stages = {"as trained": scores, "temperature": tempered(scores, fit(valid).loc["classes", "temperature"])}
    return _class_rows(stages, truth, Draws.of(test["patient"], draws, seed))


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


def _error_entry(
    scores: np.ndarray, truth: np.ndarray, draws: Draws, weights: np.ndarray | None = None
) -> dict[str, float]:
    """The calibration error with its basic interval, clipped to 0–1 and made to include the estimate."""
    entry = bootstrap.entry(error_draws(scores, truth, draws, weights=weights), basic=True)
    return entry | {"low": max(0.0, entry["low"]), "high": min(1.0, max(entry["high"], entry["estimate"]))}

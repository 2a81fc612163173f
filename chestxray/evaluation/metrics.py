"""Metrics: AUROC, average precision, confusion matrix, ROC curve, and a model's errors."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.metrics import auc, confusion_matrix, roc_auc_score, roc_curve

from chestxray.config import CLASSES, StudyError
from chestxray.evaluation.bootstrap import Draws
from chestxray.evaluation.predictions import checked, classes_and_scores, require_classes

_FLOATS_AT_ONCE = 4_000_000


def mean_auroc(y: np.ndarray, scores: np.ndarray) -> float:
    """Mean one-vs-rest AUROC, 0 to 1, over the columns in which both 0 and 1 occur; NaN where there is none.

    Args:
        y: (N, K) zeros and ones.
        scores: (N, K) scores, higher for 1; only their order within a column matters, and ties count half.
    """
    usable = [k for k in range(y.shape[1]) if 0 < y[:, k].sum() < len(y)]
    return float(roc_auc_score(y[:, usable], scores[:, usable], average="macro")) if usable else float("nan")


def macro_auroc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """`mean_auroc` of images with one class each, where every class must have images.

    Args:
        labels: (n,) class indices, 0 to 6.
        probabilities: (n, 7) scores.

    Raises:
        StudyError: no image, or no other image, of a class; or a score is not a finite number.
    """
    labels = np.asarray(labels).astype(int)
    probabilities = np.asarray(probabilities, dtype=float)
    if not np.isfinite(probabilities).all():
        number = (~np.isfinite(probabilities)).sum()
        raise StudyError(f"{number} predicted probabilities are not finite: train with a lower learning rate")
    for name, count in zip(CLASSES, np.bincount(labels, minlength=len(CLASSES)), strict=True):
        if count in (0, len(labels)):
            raise StudyError(f"{count} of {len(labels)} images are {name}, so it has no AUROC: use more images")
    return mean_auroc(np.eye(len(CLASSES))[labels], probabilities)


def confusion(predictions: pd.DataFrame, normalize: bool = False) -> pd.DataFrame:
    """Confusion matrix of the single-label test images: rows are the true class, columns the most probable one.

    Args:
        predictions: a predictions table.
        normalize: shares of the row (0 to 1, a row sums to 1) instead of counts.

    Raises:
        StudyError: as `comparison.evaluate`.
    """
    predictions = checked(predictions)
    require_classes(predictions)
    truth, scores = classes_and_scores(predictions[predictions["selected"]])
    counts = confusion_matrix(
        truth, scores.argmax(axis=1), labels=range(len(CLASSES)), normalize="true" if normalize else None
    )
    return pd.DataFrame(counts, pd.Index(CLASSES, name="true"), pd.Index(CLASSES, name="predicted"))


def roc_points(predictions: pd.DataFrame) -> pd.DataFrame:
    """The corners of the one-vs-rest ROC curve of each class on the single-label test images.

    Returns:
        Columns `class`, `false_positive_rate`, `true_positive_rate` and `auroc` (the same for all rows of a class).

    Raises:
        StudyError: as `comparison.evaluate`.
    """
    predictions = checked(predictions)
    require_classes(predictions)
    selected = predictions[predictions["selected"]]
    tables = []
    for name in CLASSES:
        false, true, _ = roc_curve(selected["label"] == name, selected[name])
        corners = {"class": name, "false_positive_rate": false, "true_positive_rate": true, "auroc": auc(false, true)}
        tables.append(pd.DataFrame(corners))
    return pd.concat(tables, ignore_index=True)


def confident_errors(predictions: pd.DataFrame) -> pd.DataFrame:
    """Single-label test images whose most probable class is not their label, the most confident first.

    Returns:
        `image`, `patient`, `label`, `predicted`, and `probability` of the predicted class.

    Raises:
        StudyError: as `comparison.evaluate`.
    """
    predictions = checked(predictions)
    selected = predictions[predictions["selected"]]
    truth, scores = classes_and_scores(selected)
    guess = scores.argmax(axis=1)
    table = selected[["image", "patient", "label"]]
    table = table.assign(predicted=np.array(CLASSES)[guess], probability=scores.max(axis=1))[truth != guess]
    return table.sort_values("probability", ascending=False, ignore_index=True)


def rank_draws(truth: np.ndarray, scores: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision in every draw of patients: two (1 + draws,), the estimate first.

    Images are sorted once by score, those with the same score form one step, and a draw only weighs them. Of the
    cumulated weights, only those at steps with a positive image enter: there AUROC counts the negatives below, those of
    the step by half, and the precision is taken at the step's end, as in scikit-learn.

    Args:
        truth: (n,) bool.
        scores: (n,) float, high for positive.
        draws: draws over the same images; the results are NaN where no positive or no negative was drawn.
    """
    truth, scores = np.asarray(truth, dtype=bool), np.asarray(scores, dtype=float)
    columns = draws.weights.shape[1]
    if truth.all() or not truth.any():
        return np.full(columns, np.nan), np.full(columns, np.nan)
    order = np.argsort(-scores, kind="stable")
    truth, scores, codes = truth[order], scores[order], draws.codes[order]
    begins = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])
    ends = np.r_[begins[1:], len(scores)] - 1
    step_of = np.repeat(np.arange(len(begins)), ends - begins + 1)[truth]
    holding, last = np.unique(step_of[::-1], return_index=True)
    begins, ends, last = begins[holding], ends[holding], len(step_of) - 1 - last
    areas, precisions = np.empty(columns), np.empty(columns)
    width = max(1, _FLOATS_AT_ONCE // len(truth))
    for start in range(0, columns, width):
        part = slice(start, start + width)
        # Counts are whole numbers, which single precision holds up to 16 million.
        drawn = draws.weights[:, part].astype(np.float32)[codes]
        found = np.cumsum(drawn[truth], axis=0)[last].astype(float)
        before = drawn[begins]
        np.cumsum(drawn, axis=0, out=drawn)
        passed = drawn[ends].astype(float)
        positive = np.diff(found, axis=0, prepend=0)
        tied = passed - (drawn[begins] - before) - positive
        below = drawn[-1] - found[-1] - (passed - found)
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.divide(found, passed, out=np.zeros_like(found), where=passed > 0)
            areas[part] = np.einsum("sd,sd->d", positive, below + tied / 2) / (found[-1] * (drawn[-1] - found[-1]))
            area = np.einsum("sd,sd->d", positive, precision) / found[-1]
        precisions[part] = np.where((found[-1] > 0) & (drawn[-1] > found[-1]), area, np.nan)
    return areas, precisions

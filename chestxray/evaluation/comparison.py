"""Comparison of models: every metric of several models, by class, in pairs and ranked, with intervals.

Metrics are taken over the single-label test images, or, where their name says `all_images` or `six_finding`, over all
test images. Intervals resample patients, by the same draws for all models. A draw that leaves a metric undefined, since
it has no image of some class, is left out of its interval; the column `draws` counts the rest. The predicted class is
that of the largest of the seven probabilities at equal class shares; `at_shares` compares other shares.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from chestxray.config import CLASSES, SIX_FINDINGS, StudyError
from chestxray.evaluation import bootstrap, posterior
from chestxray.evaluation.bootstrap import Draws
from chestxray.evaluation.metrics import rank_draws
from chestxray.evaluation.predictions import aligned, checked, classes_and_scores, finding, require_classes, shows

METRICS: dict[str, str] = {
    "macro_auroc": "Macro AUROC",
    "macro_average_precision": "Macro average precision",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "six_finding_auroc": "AUROC of six findings, all test images",
}
"""Metrics of a model and how they are shown. All but the last are over the single-label test images."""

_PUBLISHED_COLUMNS = (*SIX_FINDINGS, "Mean")
PUBLISHED_AUROC: dict[str, dict[str, float]] = {
    "Wang 2017": dict(zip(_PUBLISHED_COLUMNS, (0.700, 0.759, 0.661, 0.693, 0.669, 0.799, 0.714), strict=True)),
    "Guendel 2018": dict(zip(_PUBLISHED_COLUMNS, (0.767, 0.828, 0.709, 0.821, 0.758, 0.846, 0.788), strict=True)),
    "SwinCheX 2022": dict(zip(_PUBLISHED_COLUMNS, (0.781, 0.824, 0.701, 0.822, 0.780, 0.871, 0.797), strict=True)),
    "AE-CNN": dict(zip(_PUBLISHED_COLUMNS, (0.782, 0.836, 0.709, 0.838, 0.788, 0.868, 0.803), strict=True)),
}
"""AUROC on the official test list of ChestX-ray14, each finding against all images, several labels per image."""


@dataclass(frozen=True)
class Resampled:
    """Every metric of several models in the same draws of the same patients, computed once for all comparisons.

    Attributes:
        tables: each model's predictions, checked, rows in one order.
        metrics: of each model those of `METRICS`, each (1 + draws,), the estimate first.
        by_class: of each model the metrics of `per_class`, each (7 classes or six findings, 1 + draws).
    """

    tables: dict[str, pd.DataFrame]
    metrics: dict[str, dict[str, np.ndarray]]
    by_class: dict[str, dict[str, np.ndarray]]


def resample(models: Mapping[str, pd.DataFrame], draws: int = 2000, seed: int = 0) -> Resampled:
    """Resample the patients and compute every metric of every model in each draw.

    Args:
        models: predictions tables of the same images.
        draws: how many times the patients are drawn.
        seed: seeds the draws; the same patients and seed give the same draws.

    Raises:
        StudyError: no model; a column, label or probability can't be used; a class has no image in the test; or the
            tables are of different images.
    """
    if not models:
        raise StudyError("no predictions to evaluate: name at least one model")
    first = checked(next(iter(models.values())))
    require_classes(first)
    drawn = Draws.of(first["patient"], draws, seed)
    tables = {name: aligned(checked(table), first) for name, table in models.items()}
    found = Resampled(tables, {}, {})
    for name, table in tables.items():
        found.metrics[name], found.by_class[name] = _draw_metrics(table, drawn)
    return found


def evaluate(predictions: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """All metrics of one model with 95 % percentile intervals from resampled patients.

    Args:
        predictions: a predictions table.
        draws: how many times the patients are drawn.
        seed: seeds the draws; the same patients and seed give the same draws.

    Returns:
        Index `metric` (the keys of `METRICS`); columns `estimate`, `low`, `high` (0 to 1), `n_images`, `n_patients`
        and `draws`, the draws in which the metric is defined.

    Raises:
        StudyError: as `resample`.
    """
    return summary(resample({"": predictions}, draws, seed)).loc[""]


def summary(models: Resampled) -> pd.DataFrame:
    """`evaluate` for several models: index (`model`, `metric`), in the order given to `resample`."""
    tables = {name: _interval_table(metrics, models.tables[name]) for name, metrics in models.metrics.items()}
    return pd.concat(tables, names=["model", "metric"])


def per_class(models: Resampled, model: str = "ensemble") -> pd.DataFrame:
    """Metrics of each class with 95 % intervals from resampled patients.

    `auroc` and `average_precision` (one class against the rest), `sensitivity`, `precision` and `f1` (of the most
    probable class; precision is 0 where a class is never predicted) are over the single-label test images.
    `all_images_auroc` and `all_images_average_precision` are over all test images: those with the finding, alone or
    among others, against the rest. They exist for the six findings only.

    Args:
        models: from `resample`.
        model: which of them.

    Returns:
        Index (`class`, `metric`); columns as in `evaluate`, and `n_positive`, the images that show the class.
    """
    predictions, by_class = models.tables[model], models.by_class[model]
    single = predictions.loc[predictions["selected"], "label"]
    tables = {}
    for name in CLASSES:
        rows, positive = {}, {}
        for metric, values in by_class.items():
            whole = metric.startswith("all_images_")
            classes = SIX_FINDINGS if whole else CLASSES
            if name in classes:
                rows[metric] = values[classes.index(name)]
                positive[metric] = int(shows(predictions, name).sum() if whole else single.eq(name).sum())
        tables[name] = _interval_table(rows, predictions).assign(n_positive=pd.Series(positive))
    return pd.concat(tables, names=["class", "metric"])


def compare_with(
    models: Resampled, first: str, others: Sequence[str], metrics: Sequence[str] = tuple(METRICS)
) -> pd.DataFrame:
    """How much better one model is than others on the same images, paired by patient.

    All models meet the same draws, so what makes a draw easy or hard cancels in the difference.

    Args:
        models: from `resample`.
        first: the one.
        others: the others.
        metrics: keys of `METRICS`.

    Returns:
        Index (`against`, `metric`); columns `first`, `second`, `difference` (first - second) with its 95 % interval
        `low` and `high`, `n_images`, `n_patients`, `draws`.
    """
    ours = models.metrics[first]
    tables = {}
    for second in others:
        theirs = models.metrics[second]
        gaps = {metric: ours[metric] - theirs[metric] for metric in metrics}
        table = _interval_table(gaps, models.tables[first]).rename(columns={"estimate": "difference"})
        table.insert(0, "first", [ours[metric][0] for metric in metrics])
        table.insert(1, "second", [theirs[metric][0] for metric in metrics])
        tables[second] = table
    return pd.concat(tables, names=["against", "metric"])


def compare_all(models: Resampled, metrics: Sequence[str] = ("macro_auroc", "six_finding_auroc")) -> pd.DataFrame:
    """Every pair of models, paired by patient, corrected for the number of pairs.

    Args:
        models: from `resample`.
        metrics: keys of `METRICS`; the pairs under one metric are one family of tests.

    Returns:
        Index (`metric`, `first`, `second`), each pair once and in the order of `models`; columns `difference` (first -
        second) with its interval `low` and `high`, `p` (`bootstrap.p_value`), `p_holm` (Holm's, within the metric) and
        `draws`.
    """
    tables = {}
    for metric in metrics:
        rows = {}
        for first, second in itertools.combinations(models.metrics, 2):
            gap = models.metrics[first][metric] - models.metrics[second][metric]
            rows[first, second] = bootstrap.entry(gap) | {"p": bootstrap.p_value(gap)}
        table = pd.DataFrame.from_dict(rows, orient="index").rename(columns={"estimate": "difference"})
        table.insert(4, "p_holm", bootstrap.holm(table["p"]) if len(table) else [])
        tables[metric] = table.rename_axis(["first", "second"])
    return pd.concat(tables, names=["metric"])[["difference", "low", "high", "p", "p_holm", "draws"]]


def at_shares(predictions: pd.DataFrame, temperature: float, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """What it costs to name the class at other class shares, over the single-label test images.

    The accuracy at class shares is the sum of share times sensitivity: the expected share of images named rightly
    where the classes have these shares. At equal shares it is the balanced accuracy.

    Args:
        predictions: a predictions table, its classes as trained.
        temperature: of the classes, from `calibration.fit`.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index (`shares`, `metric`): the shares at which the class is named, keys of `posterior.SHARES`; the metrics
        `balanced_accuracy`, `accuracy_<shares>` of the others, and `sensitivity_<class>`. Columns `estimate`, `low`,
        `high` (0 to 1), `draws`.

    Raises:
        StudyError: as `resample`.
    """
    predictions = checked(predictions)
    require_classes(predictions)
    selected = predictions["selected"].to_numpy()
    drawn = Draws.of(predictions["patient"], draws, seed).within(selected)
    truth, scores = classes_and_scores(predictions[selected])
    equal, classes = posterior.tempered(scores, temperature), np.eye(len(CLASSES))[truth]
    shares = {name: posterior.read_shares(name) for name in posterior.SHARES}
    rows = {}
    for name, given in shares.items():
        right = posterior.named_at(equal, given) == truth
        sensitivity = drawn.means(np.repeat(right[:, None], len(CLASSES), axis=1), classes)
        for of, weights in shares.items():
            metric = "balanced_accuracy" if of == "equal" else f"accuracy_{of}"
            rows[name, metric] = bootstrap.entry(sensitivity @ weights.values)
        for label, values in zip(CLASSES, sensitivity.T, strict=True):
            rows[name, f"sensitivity_{label}"] = bootstrap.entry(values)
    return bootstrap.table(rows, ["shares", "metric"])


def beside_published(per_class_table: pd.DataFrame, name: str) -> pd.DataFrame:
    """AUROC of each finding on all test images beside `PUBLISHED_AUROC`: a row per model, the six findings and `Mean`.

    Args:
        per_class_table: from `per_class`.
        name: how the model is called in the table.
    """
    ours = per_class_table.xs("all_images_auroc", level="metric")["estimate"].to_dict()
    ours["Mean"] = float(np.mean(list(ours.values())))
    return pd.DataFrame({**PUBLISHED_AUROC, name: ours}).T[list(_PUBLISHED_COLUMNS)]


def _draw_metrics(predictions: pd.DataFrame, draws: Draws) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`Resampled.metrics` and `by_class` of one model; a mean over classes is NaN where any class is undefined."""
    inside = draws.within(predictions["selected"].to_numpy())
    truth, scores = classes_and_scores(predictions[predictions["selected"]])
    number = len(CLASSES)
    single = [rank_draws(truth == k, scores[:, k], inside) for k in range(number)]
    whole = [rank_draws(*finding(predictions, name), draws) for name in SIX_FINDINGS]
    counts = inside.counts(truth * number + scores.argmax(axis=1), number**2).T.reshape(number, number, -1)
    right = counts[range(number), range(number)]
    of_truth, of_guess = counts.sum(axis=1), counts.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        defined = np.where(of_truth > 0, 1.0, np.nan)
        by_class = {
            "auroc": np.stack([area for area, _ in single]),
            "average_precision": np.stack([precision for _, precision in single]),
            "sensitivity": right / of_truth,
            "precision": np.where(of_guess > 0, right / of_guess, 0) * defined,
            "f1": 2 * right / (of_truth + of_guess) * defined,
            "all_images_auroc": np.stack([area for area, _ in whole]),
            "all_images_average_precision": np.stack([precision for _, precision in whole]),
        }
    means = {metric: values.mean(axis=0) for metric, values in by_class.items()}
    metrics = {
        "macro_auroc": means["auroc"],
        "macro_average_precision": means["average_precision"],
        "balanced_accuracy": means["sensitivity"],
        "macro_f1": means["f1"],
        "six_finding_auroc": means["all_images_auroc"],
    }
    return metrics, by_class


def _interval_table(rows: Mapping[str, np.ndarray], predictions: pd.DataFrame) -> pd.DataFrame:
    """Estimate and interval of each metric, with the number of its images and patients."""
    records = {}
    for metric, values in rows.items():
        whole = metric.startswith("all_images_") or metric == "six_finding_auroc"
        images = predictions if whole else predictions[predictions["selected"]]
        size = {"n_images": len(images), "n_patients": images["patient"].nunique()}
        records[metric] = bootstrap.entry(values) | size
    table = pd.DataFrame.from_dict(records, orient="index").rename_axis("metric")
    return table[["estimate", "low", "high", "n_images", "n_patients", "draws"]]

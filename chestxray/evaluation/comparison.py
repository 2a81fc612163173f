"""Metrics and their intervals, computed from tables of predictions and nothing else.

It owns what a number in a results table means: which images it is taken over, which truth it is held against, and how
sure it is. It knows the columns of a predictions table, and nothing of images, networks or figures.

Three tests are taken from one table. The **single-label test** is the rows with `selected`: one of the seven classes
each, truth in `label`. The **balanced test** is those of them with `balanced_test`, as many of each class. The
**natural test** is every row, truth in `findings`: an image may show several findings.

Intervals come from resampling patients (`resampling`); models compared with each other meet the same draws. A metric
that a draw leaves undefined (none of the images of some class was drawn) leaves that draw out of its interval, and the
column `draws` tells how many remain. No function expects the seven probabilities to sum to one: the class is that of
the largest.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from chestxray.config import CLASSES, SIX_FINDINGS, StudyError
from chestxray.evaluation import bootstrap
from chestxray.evaluation.bootstrap import Draws
from chestxray.evaluation.metrics import rank_draws
from chestxray.evaluation.predictions import aligned, checked, require_classes, shows, single_label

METRICS: dict[str, str] = {
    "macro_auroc": "Macro AUROC",
    "macro_average_precision": "Macro average precision",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "accuracy": "Accuracy",
    "six_finding_auroc": "AUROC of six findings, natural test",
}
"""Metrics of a model and how they are shown. All but the last are over the single-label test."""

_PUBLISHED_COLUMNS = (*SIX_FINDINGS, "Mean")
PUBLISHED_AUROC: dict[str, dict[str, float]] = {
    "Wang 2017": dict(zip(_PUBLISHED_COLUMNS, (0.700, 0.759, 0.661, 0.693, 0.669, 0.799, 0.714), strict=True)),
    "Guendel 2018": dict(zip(_PUBLISHED_COLUMNS, (0.767, 0.828, 0.709, 0.821, 0.758, 0.846, 0.788), strict=True)),
    "SwinCheX 2022": dict(zip(_PUBLISHED_COLUMNS, (0.781, 0.824, 0.701, 0.822, 0.780, 0.871, 0.797), strict=True)),
    "AE-CNN": dict(zip(_PUBLISHED_COLUMNS, (0.782, 0.836, 0.709, 0.838, 0.788, 0.868, 0.803), strict=True)),
}
"""AUROC on the official test list of ChestX-ray14, each finding against all images, several labels an image."""


@dataclass(frozen=True)
class Resampled:
    """Every metric of several models on the same draws of the same patients, computed once for all questions.

    Attributes:
        tables: each model's predictions, checked, rows in one order.
        drawn: each model's metrics in every draw.
    """

    tables: dict[str, pd.DataFrame]
    drawn: dict[str, _Drawn]


def resample(models: Mapping[str, pd.DataFrame], draws: int = 2000, seed: int = 0) -> Resampled:
    """Draw the patients and compute every metric of every model in each draw.

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
    taken = Draws.of(first["patient"], draws, seed)
    tables = {name: aligned(checked(table), first) for name, table in models.items()}
    return Resampled(tables, {name: _draw_metrics(table, taken) for name, table in tables.items()})


def _resampled(models: Mapping[str, pd.DataFrame] | Resampled, draws: int, seed: int) -> Resampled:
    return models if isinstance(models, Resampled) else resample(models, draws, seed)


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
    return summary({"": predictions}, draws, seed).loc[""]


def summary(models: Mapping[str, pd.DataFrame] | Resampled, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """`evaluate` for several models, in the order given.

    Args:
        models: predictions tables of the same images, or what `resample` made of them, with its draws and seed.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index (`model`, `metric`), columns as in `evaluate`.

    Raises:
        StudyError: as `resample`.
    """
    found = _resampled(models, draws, seed)
    tables = {name: _interval_table(drawn.metrics, found.tables[name]) for name, drawn in found.drawn.items()}
    return pd.concat(tables, names=["model", "metric"])


def per_class(
    predictions: pd.DataFrame | Resampled, draws: int = 2000, seed: int = 0, model: str = "ensemble"
) -> pd.DataFrame:
    """Metrics of each class with 95 % intervals from resampled patients.

    `auroc` and `average_precision` (one class against the rest), `sensitivity`, `precision` and `f1` (of the most
    probable class; precision is 0 where a class is never predicted) are over the single-label test. `natural_auroc`
    and `natural_average_precision` are over the natural test: images with the finding, alone or among others, against
    all other images. They exist for the six findings only.

    Args:
        predictions: a predictions table, or what `resample` made of several.
        draws: how many times the patients are drawn.
        seed: seeds the draws.
        model: which of several.

    Returns:
        Index (`class`, `metric`); columns as in `evaluate`, and `n_positive`, the images that show the class.

    Raises:
        StudyError: as `resample`.
    """
    found = predictions if isinstance(predictions, Resampled) else resample({model: predictions}, draws, seed)
    predictions, (single, natural) = found.tables[model], found.drawn[model]
    tables = {}
    for index, name in enumerate(CLASSES):
        rows = {metric: values[index] for metric, values in single.items() if metric != "accuracy"}
        table = _interval_table(rows, predictions)
        table["n_positive"] = int((predictions["label"] == name).where(predictions["selected"], False).sum())
        if name in SIX_FINDINGS:
            rows = {metric: values[SIX_FINDINGS.index(name)] for metric, values in natural.items()}
            wide = _interval_table(rows, predictions)
            wide["n_positive"] = int(shows(predictions, name).sum())
            table = pd.concat([table, wide])
        tables[name] = table
    return pd.concat(tables, names=["class", "metric"])


def compare(
    first: pd.DataFrame,
    second: pd.DataFrame,
    metrics: Sequence[str] = tuple(METRICS),
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """How much better the first model is than the second on the same images, paired by patient.

    Both models meet the same draws, so what makes a draw easy or hard cancels in the difference.

    Returns:
        Index `metric`; columns `first`, `second`, `difference` (first - second) with its 95 % interval `low` and
        `high`, `n_images`, `n_patients`, `draws`.

    Raises:
        StudyError: as `resample`; or a metric is unknown.
    """
    found = resample({"first": first, "second": second}, draws, seed)
    return compare_with(found, "first", ["second"], metrics).loc["second"]


def compare_with(
    models: Resampled, first: str, others: Sequence[str], metrics: Sequence[str] = tuple(METRICS)
) -> pd.DataFrame:
    """`compare` of one model with several others.

    Args:
        models: what `resample` made.
        first: the one.
        others: the others.
        metrics: keys of `METRICS`.

    Returns:
        Index (`against`, `metric`); columns as in `compare`.

    Raises:
        StudyError: a metric is unknown.
    """
    _check_metrics(metrics)
    ours = models.drawn[first].metrics
    tables = {}
    for second in others:
        theirs = models.drawn[second].metrics
        gaps = {metric: ours[metric] - theirs[metric] for metric in metrics}
        table = _interval_table(gaps, models.tables[first]).rename(columns={"estimate": "difference"})
        table.insert(0, "first", [ours[metric][0] for metric in metrics])
        table.insert(1, "second", [theirs[metric][0] for metric in metrics])
        tables[second] = table
    return pd.concat(tables, names=["against", "metric"])


def compare_all(
    models: Mapping[str, pd.DataFrame] | Resampled,
    metrics: Sequence[str] = ("macro_auroc", "six_finding_auroc"),
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Every pair of models, paired by patient, corrected for having asked about so many pairs.

    Args:
        models: predictions tables of the same images, or what `resample` made of them.
        metrics: keys of `METRICS`; the pairs under one metric are one family of questions.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index (`metric`, `first`, `second`), each pair once and in the order of `models`; columns `difference` (first -
        second) with its interval `low` and `high`, `p` (`resampling.p_value`), `p_holm` (Holm's, within the metric)
        and `draws`.

    Raises:
        StudyError: as `resample`; or a metric is unknown.
    """
    _check_metrics(metrics)
    drawn = {name: found.metrics for name, found in _resampled(models, draws, seed).drawn.items()}
    tables = {}
    for metric in metrics:
        rows = {}
        for first, second in itertools.combinations(drawn, 2):
            gap = drawn[first][metric] - drawn[second][metric]
            rows[first, second] = bootstrap.entry(gap) | {"p": bootstrap.p_value(gap)}
        table = pd.DataFrame.from_dict(rows, orient="index").rename(columns={"estimate": "difference"})
        table.insert(4, "p_holm", bootstrap.holm(table["p"]) if len(table) else [])
        tables[metric] = table.rename_axis(["first", "second"])
    return pd.concat(tables, names=["metric"])[["difference", "low", "high", "p", "p_holm", "draws"]]


def ranking(
    models: Mapping[str, pd.DataFrame] | Resampled, metric: str = "macro_auroc", draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """How often each model takes each place when the patients are drawn again.

    Args:
        models: predictions tables of the same images, or what `resample` made of them.
        metric: a key of `METRICS`.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index `model`, best estimate first; columns `estimate`, `low`, `high`, `rank` (mean over draws; 1 is the best)
        and its `rank_low`, `rank_high`, then `place_1` to `place_n`, the shares of draws (0 to 1; ties share the
        better place).

    Raises:
        StudyError: as `resample`; or the metric is unknown.
    """
    _check_metrics([metric])
    found = _resampled(models, draws, seed).drawn
    values = np.stack([drawn.metrics[metric] for drawn in found.values()])
    defined = np.isfinite(values).all(axis=0)
    defined[0] = False
    drawn = values[:, defined]
    places = 1 + (drawn[None] > drawn[:, None]).sum(axis=1)
    rows = {}
    for row, name in enumerate(found):
        low, high = np.percentile(places[row], [2.5, 97.5]) if defined.any() else (np.nan, np.nan)
        rank = {"rank": places[row].mean() if defined.any() else np.nan, "rank_low": low, "rank_high": high}
        shares = {f"place_{n}": float(np.mean(places[row] == n)) for n in range(1, len(found) + 1)}
        rows[name] = {key: bootstrap.entry(values[row])[key] for key in ("estimate", "low", "high")} | rank | shares
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    return table.sort_values("estimate", ascending=False, kind="stable")


def _check_metrics(metrics: Sequence[str]) -> None:
    for metric in metrics:
        if metric not in METRICS:
            raise StudyError(f"metric {metric!r} is unknown; there are: {', '.join(METRICS)}")


def beside_published(per_class_table: pd.DataFrame, name: str) -> pd.DataFrame:
    """AUROC of each finding on the natural test beside `PUBLISHED_AUROC`.

    Args:
        per_class_table: what `per_class` returned.
        name: how the model is called in the table.

    Returns:
        One row a model; columns the six findings and `Mean`.
    """
    ours = per_class_table.xs("natural_auroc", level="metric")["estimate"].to_dict()
    ours["Mean"] = float(np.mean(list(ours.values())))
    return pd.DataFrame({**PUBLISHED_AUROC, name: ours}).T[list(_PUBLISHED_COLUMNS)]


class _Drawn(NamedTuple):
    """One model's metrics in every draw.

    Attributes:
        single: of each class on the single-label test, each (classes, 1 + draws), and `accuracy` (1 + draws,).
        natural: of each of the six findings on the natural test, each (6, 1 + draws).
    """

    single: dict[str, np.ndarray]
    natural: dict[str, np.ndarray]

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """Those of `METRICS`, each (1 + draws,). A mean over classes is NaN where any class is undefined."""
        return {
            "macro_auroc": self.single["auroc"].mean(axis=0),
            "macro_average_precision": self.single["average_precision"].mean(axis=0),
            "balanced_accuracy": self.single["sensitivity"].mean(axis=0),
            "macro_f1": self.single["f1"].mean(axis=0),
            "accuracy": self.single["accuracy"],
            "six_finding_auroc": self.natural["natural_auroc"].mean(axis=0),
        }


def _draw_metrics(predictions: pd.DataFrame, draws: Draws) -> _Drawn:
    questions = [(shows(predictions, name), predictions[name].to_numpy(dtype=float)) for name in SIX_FINDINGS]
    areas, precisions = zip(*(rank_draws(truth, scores, draws) for truth, scores in questions), strict=True)
    natural = {"natural_auroc": np.stack(areas), "natural_average_precision": np.stack(precisions)}
    return _Drawn(_single_label_draws(predictions, draws), natural)


def _single_label_draws(predictions: pd.DataFrame, draws: Draws) -> dict[str, np.ndarray]:
    selected = predictions["selected"].to_numpy()
    draws = draws.within(selected)
    truth, guess = single_label(predictions)
    scores = predictions.loc[selected, list(CLASSES)].to_numpy(dtype=float)
    number = len(CLASSES)
    areas, precisions = zip(*(rank_draws(truth == k, scores[:, k], draws) for k in range(number)), strict=True)
    cells = np.zeros((len(truth), number * number))
    cells[range(len(truth)), truth * number + guess] = 1
    counts = draws.totals(cells).T.reshape(number, number, -1)
    right = counts[range(number), range(number)]
    of_truth, of_guess = counts.sum(axis=1), counts.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        defined = np.where(of_truth > 0, 1.0, np.nan)
        return {
            "auroc": np.stack(areas),
            "average_precision": np.stack(precisions),
            "sensitivity": right / of_truth,
            "precision": np.where(of_guess > 0, right / of_guess, 0) * defined,
            "f1": 2 * right / (of_truth + of_guess) * defined,
            "accuracy": right.sum(axis=0) / of_truth.sum(axis=0),
        }


def _interval_table(rows: Mapping[str, np.ndarray], predictions: pd.DataFrame) -> pd.DataFrame:
    """Estimate (entry 0) and interval (the other entries) of each metric, with the images it is over."""
    records = []
    for metric, values in rows.items():
        whole = metric.startswith("natural_") or metric == "six_finding_auroc"
        images = predictions if whole else predictions[predictions["selected"]]
        size = {"n_images": len(images), "n_patients": images["patient"].nunique()}
        found = bootstrap.entry(values)
        defined = found.pop("draws")
        records.append({"metric": metric} | found | size | {"draws": defined})
    return pd.DataFrame(records).set_index("metric")

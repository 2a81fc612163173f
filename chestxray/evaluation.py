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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from chestxray import resampling
from chestxray.config import CLASSES, MODELS, NIH_FINDINGS, NO_FINDING_NIH, SIX_FINDINGS, Study, StudyError
from chestxray.resampling import Draws

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

COLUMNS: tuple[str, ...] = ("image", "patient", "label", "selected", "findings")
_BOOLEANS = ("selected", "balanced_test")
_FLOATS_AT_ONCE = 4_000_000
_TINY = 1e-7
_ROUNDED = 1e-3
"""How far the probabilities of a softmax may be from summing to one when they were rounded."""


def read_predictions(path: Path) -> pd.DataFrame:
    """Read and check one predictions table.

    Args:
        path: a `predictions_valid.csv` or `predictions_test.csv`.

    Returns:
        One row an image, `patient` as text as it stands in the file, `selected` and (where the file has it)
        `balanced_test` as bool, empty text where the file has none, and seven probability columns named as `CLASSES`.

    Raises:
        StudyError: the file is missing or no table, or a column or value in it can't be used.
    """
    source = "/".join(path.parts[-2:])
    try:
        text = dict.fromkeys(("image", "patient", "label", "findings", "view", "sex"), str)
        table = pd.read_csv(path, dtype=text, keep_default_na=False, na_values={name: ["", "nan"] for name in CLASSES})
    except (OSError, ValueError) as error:
        raise StudyError(f"{source} can't be read ({type(error).__name__}): run the model's notebook again") from error
    for column in _BOOLEANS:
        if column in table:
            table[column] = table[column].astype(str).map({"True": True, "False": False})
    table.attrs["source"] = source
    return checked(table)


def read_models(study: Study, split: str) -> dict[str, pd.DataFrame]:
    """Read the predictions of all models for one split, in the order of `MODELS`.

    Raises:
        StageMissing: a model has not been trained yet; the message names its notebook.
        StudyError: a table can't be used, or is of other images than the first model's.
    """
    tables = {}
    for folder, (_, notebook) in MODELS.items():
        path = study.require(study.paths.saved(folder) / f"predictions_{split}.csv", notebook)
        tables[folder] = read_predictions(path)
    first = next(iter(tables.values()))
    return {folder: _aligned(table, first) for folder, table in tables.items()}


def macro_auroc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over the classes of the one-vs-rest AUROC; ties count half. Takes milliseconds.

    Args:
        labels: (n,) class indices, 0 to K - 1.
        probabilities: (n, K) scores; only their order within a column matters.

    Returns:
        0 to 1; 0.5 is chance.

    Raises:
        StudyError: no image, or no other image, of a class; or a score is not a finite number.
    """
    labels = np.asarray(labels).astype(int)
    probabilities = np.asarray(probabilities, dtype=float)
    endless = int((~np.isfinite(probabilities)).sum())
    if endless:
        raise StudyError(f"{endless} predicted probabilities are not finite: train with a lower learning rate")
    number = probabilities.shape[1]
    counts = np.bincount(labels, minlength=number)
    for index, count in enumerate(counts):
        if count in (0, len(labels)):
            name = CLASSES[index] if number == len(CLASSES) else f"class {index}"
            raise StudyError(f"{count} of {len(labels)} images are {name}, so it has no AUROC: use more images")
    once = Draws(np.zeros(len(labels), dtype=int), np.ones((1, 1)))
    return float(np.mean([auroc_draws(labels == k, probabilities[:, k], once)[0] for k in range(number)]))


def balanced(predictions: pd.DataFrame) -> pd.DataFrame | None:
    """The rows of the balanced test, to be evaluated like a whole table; None where the table doesn't tell them.

    Raises:
        StudyError: a column or value can't be used, or a row of the balanced test is not of the single-label test.
    """
    table = checked(predictions)
    if "balanced_test" not in table or not table["balanced_test"].any():
        return None
    stray = table["balanced_test"] & ~table["selected"]
    if stray.any():
        raise StudyError(
            f"{_source(table)}, {table.loc[stray, 'image'].iloc[0]}: in the balanced test without being selected; "
            "run the model's notebook again"
        )
    rows = table[table["balanced_test"]].reset_index(drop=True)
    rows.attrs.update(table.attrs)
    return rows


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
    _require_classes(first)
    taken = Draws.of(first["patient"], draws, seed)
    tables = {name: _aligned(checked(table), first) for name, table in models.items()}
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
            rows[first, second] = resampling.entry(gap) | {"p": resampling.p_value(gap)}
        table = pd.DataFrame.from_dict(rows, orient="index").rename(columns={"estimate": "difference"})
        table.insert(4, "p_holm", resampling.holm(table["p"]) if len(table) else [])
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
        rows[name] = {key: resampling.entry(values[row])[key] for key in ("estimate", "low", "high")} | rank | shares
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    return table.sort_values("estimate", ascending=False, kind="stable")


def _check_metrics(metrics: Sequence[str]) -> None:
    for metric in metrics:
        if metric not in METRICS:
            raise StudyError(f"metric {metric!r} is unknown; there are: {', '.join(METRICS)}")


def confusion(predictions: pd.DataFrame, normalize: bool = False) -> pd.DataFrame:
    """Confusion matrix of the single-label test: rows are the true class, columns the most probable one.

    Args:
        predictions: a predictions table.
        normalize: shares of the row (0 to 1, a row sums to 1) instead of counts.

    Raises:
        StudyError: as in `evaluate`.
    """
    predictions = checked(predictions)
    _require_classes(predictions)
    truth, guess = _single_label(predictions)
    counts = np.zeros((len(CLASSES), len(CLASSES)), dtype=int)
    np.add.at(counts, (truth, guess), 1)
    table = pd.DataFrame(counts, index=pd.Index(CLASSES, name="true"), columns=pd.Index(CLASSES, name="predicted"))
    return table.div(table.sum(axis=1), axis=0) if normalize else table


def roc_points(predictions: pd.DataFrame) -> pd.DataFrame:
    """The corners of the one-vs-rest ROC curve of each class on the single-label test.

    Returns:
        Columns `class`, `false_positive_rate`, `true_positive_rate` and `auroc` (the same for all rows of a class).

    Raises:
        StudyError: as in `evaluate`.
    """
    from sklearn.metrics import auc, roc_curve

    predictions = checked(predictions)
    _require_classes(predictions)
    selected = predictions[predictions["selected"]]
    tables = []
    for name in CLASSES:
        false, true, _ = roc_curve(selected["label"] == name, selected[name])
        corners = {"class": name, "false_positive_rate": false, "true_positive_rate": true, "auroc": auc(false, true)}
        tables.append(pd.DataFrame(corners))
    return pd.concat(tables, ignore_index=True)


def confident_errors(predictions: pd.DataFrame) -> pd.DataFrame:
    """Images of the single-label test that are taken for another class, the most confident first.

    Returns:
        `image`, `patient`, `label`, `predicted`, `probability` of the predicted class among the seven brought to sum to
        one, and `margin`, how far the true class lies behind it.

    Raises:
        StudyError: as in `evaluate`.
    """
    predictions = checked(predictions)
    selected = predictions[predictions["selected"]]
    truth, guess = _single_label(predictions)
    shares = _shares(selected)
    rows = range(len(selected))
    table = selected[["image", "patient", "label"]].assign(
        predicted=[CLASSES[k] for k in guess],
        probability=shares[rows, guess],
        margin=shares[rows, guess] - shares[rows, truth],
    )
    return table[truth != guess].sort_values("margin", ascending=False, ignore_index=True)


def label_suspects(predictions: pd.DataFrame) -> pd.DataFrame:
    """Images of the single-label test whose label may be wrong, by confident learning (Northcutt et al., JAIR 2021).

    An image counts for a class when its probability there is at least the mean that this class's own images have, the
    most probable such class if there are several; it is suspect when that is not its label. The model's own errors
    count too: this is a list to look through, not a verdict.

    Returns:
        `image`, `patient`, `label`, `suggested`, and `margin` as in `confident_errors`; the largest margin first.

    Raises:
        StudyError: as in `evaluate`.
    """
    predictions = checked(predictions)
    _require_classes(predictions)
    selected = predictions[predictions["selected"]]
    truth, _ = _single_label(predictions)
    shares = _shares(selected)
    usual = np.array([shares[truth == k, k].mean() for k in range(len(CLASSES))])
    sure = np.where(shares >= usual, shares, -1)
    counted = sure.argmax(axis=1)
    rows = range(len(selected))
    table = selected[["image", "patient", "label"]].assign(
        suggested=[CLASSES[k] for k in counted], margin=shares[rows, counted] - shares[rows, truth]
    )
    return table[(sure.max(axis=1) >= 0) & (counted != truth)].sort_values("margin", ascending=False, ignore_index=True)


def one_class(scores: np.ndarray) -> np.ndarray:
    """Probabilities of the classes, given that a radiograph has exactly one of them.

    Those of a softmax are that already. Where each class was asked about alone, the chance of one class and no other is
    in proportion to its odds.

    Args:
        scores: (n, K) from 0 to 1.

    Returns:
        (n, K), each row sums to one; the largest stays the largest.
    """
    scores = np.clip(np.asarray(scores, dtype=float), _TINY, 1 - _TINY)
    if np.abs(scores.sum(axis=1) - 1).max(initial=0) > _ROUNDED:
        scores = scores / (1 - scores)
    return scores / scores.sum(axis=1, keepdims=True)


def average(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The plain mean of several models' probabilities: the simplest ensemble, to hold a trained one against.

    Raises:
        StudyError: no table, or tables of different images.
    """
    if not tables:
        raise StudyError("no predictions to average: name at least one model")
    first = checked(tables[0])
    mean = first.copy()
    mean[list(CLASSES)] = np.mean(
        [_aligned(checked(table), first)[list(CLASSES)].to_numpy() for table in tables], axis=0
    )
    return mean


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


def checked(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the table with a plain index, or raise StudyError for the first thing in it that can't be used."""
    source = _source(predictions)
    again = "run the model's notebook again"
    for column in (*COLUMNS, *CLASSES):
        if column not in predictions:
            raise StudyError(f"{source} has no column {column!r}: {again}")
    if predictions.empty:
        raise StudyError(f"{source} has no row: {again}")
    for column in CLASSES:
        values = pd.to_numeric(predictions[column], errors="coerce").to_numpy(dtype=float)
        bad = ~((values >= 0) & (values <= 1))
        if bad.any():
            row = predictions.iloc[int(bad.argmax())]
            raise StudyError(
                f"{source}, {row['image']}: {column} is {row[column]}, not a probability from 0 to 1: {again}"
            )
    twice = predictions["image"].duplicated()
    if twice.any():
        raise StudyError(f"{source} has image {predictions['image'][twice].iloc[0]} twice: {again}")
    checked = predictions.reset_index(drop=True)
    for column in (name for name in _BOOLEANS if name in checked):
        if checked[column].isna().any():
            raise StudyError(f"{source}: column {column!r} holds something else than True and False: {again}")
        checked[column] = checked[column].astype(bool)
    checked["label"] = checked["label"].fillna("").astype(str)
    _check_names(checked, checked.loc[checked["selected"], "label"], CLASSES, "label")
    known = (*NIH_FINDINGS, NO_FINDING_NIH)
    _check_names(checked, checked["findings"].astype(str).str.split("|").explode(), known, "finding")
    return checked


def _check_names(predictions: pd.DataFrame, names: pd.Series, known: Sequence[str], what: str) -> None:
    unknown = names[~names.isin(known)]
    if len(unknown):
        image = predictions["image"].iloc[unknown.index[0]]
        raise StudyError(
            f"{_source(predictions)}, {image}: {what} {unknown.iloc[0]!r} is unknown; there are: {', '.join(known)}"
        )


def _require_classes(predictions: pd.DataFrame) -> None:
    """Raise StudyError where a class has no image, or nothing but its own images, in one of the two tests."""
    labels = predictions.loc[predictions["selected"], "label"]
    for name in CLASSES:
        truths = {"single-label": labels == name}
        if name in SIX_FINDINGS:
            truths["natural"] = shows(predictions, name)
        for test, truth in truths.items():
            if truth.sum() in (0, len(truth)):
                raise StudyError(
                    f"{_source(predictions)}: {truth.sum()} of {len(truth)} images of the {test} test are {name}, "
                    "so nothing can be measured: use a dataset with more images of it"
                )


def _source(predictions: pd.DataFrame) -> str:
    return predictions.attrs.get("source", "predictions")


def _aligned(table: pd.DataFrame, first: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `table` in the order of `first`, or raise StudyError if they are of other images."""
    if set(table["image"]) != set(first["image"]):
        stray = sorted(set(table["image"]) ^ set(first["image"]))[0]
        raise StudyError(
            f"{_source(table)} and {_source(first)} are of different images (only one has {stray}): "
            "run both models' notebooks again"
        )
    return table.set_index("image").loc[first["image"]].reset_index()[list(table.columns)]


def shows(predictions: pd.DataFrame, finding: str) -> np.ndarray:
    """(n,) bool: which images show the class, alone or among others; No_finding stands alone."""
    finding = NO_FINDING_NIH if finding == "No_finding" else finding
    return predictions["findings"].astype(str).str.split("|").map(lambda found: finding in found).to_numpy(dtype=bool)


def _single_label(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Class indices of the single-label test: the truth and the most probable class, each (n,)."""
    selected = predictions[predictions["selected"]]
    truth = pd.Categorical(selected["label"], categories=list(CLASSES)).codes.astype(int)
    return truth, selected[list(CLASSES)].to_numpy(dtype=float).argmax(axis=1)


def auroc_draws(truth: np.ndarray, scores: np.ndarray, draws: Draws) -> np.ndarray:
    """AUROC in every draw of patients: `rank_draws` without the average precision."""
    return rank_draws(truth, scores, draws)[0]


def rank_draws(truth: np.ndarray, scores: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision in every draw of patients.

    Images are sorted once by score, those with the same score form one step, and a draw only weighs them. Of the
    cumulated weights, only those at steps with a positive image enter: there AUROC counts the negatives below, those of
    the step by half, and the precision is taken at the step's end, as in scikit-learn.

    Args:
        truth: (n,) bool.
        scores: (n,) float, high for positive.
        draws: draws over the same images.

    Returns:
        Both (1 + draws,), the estimate first; NaN where no positive or no negative was drawn.
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
    truth, guess = _single_label(predictions)
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
        found = resampling.entry(values)
        defined = found.pop("draws")
        records.append({"metric": metric} | found | size | {"draws": defined})
    return pd.DataFrame(records).set_index("metric")


def _shares(predictions: pd.DataFrame) -> np.ndarray:
    return one_class(predictions[list(CLASSES)].to_numpy(dtype=float))

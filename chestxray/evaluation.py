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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from chestxray import resampling
from chestxray.config import CLASSES, NIH_FINDINGS, NO_FINDING_NIH, SIX_FINDINGS, Study, StudyError
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

MODELS: dict[str, tuple[str, str]] = {
    "dense": ("0 Dense", "4_models/0_Dense_model.ipynb"),
    "cnn": ("1 CNN", "4_models/1_CNN_model.ipynb"),
    "feature_extraction": ("2 Feature extraction", "4_models/2_Feature_extraction_model.ipynb"),
    "fine_tuning_3a": ("3a Fine tuning", "4_models/3a_Fine_tuning_model.ipynb"),
    "fine_tuning_3b": ("3b Fine tuning", "4_models/3b_Fine_tuning_model.ipynb"),
    "fine_tuning_3c": ("3c Fine tuning", "4_models/3c_Fine_tuning_model.ipynb"),
    "fine_tuning_3d": ("3d Fine tuning", "4_models/3d_Fine_tuning_model.ipynb"),
    "ensemble": ("4 Ensemble", "4_models/4_Ensemble_model.ipynb"),
}
"""Folder of each model under `4_models/saved/<dataset>`: its name in tables, and the notebook that writes it."""

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
        StudyError: a column, label or probability can't be used, or a class has no image in the test.
    """
    predictions = checked(predictions)
    _require_classes(predictions)
    return _interval_table(_all_draws(predictions, Draws.of(predictions["patient"], draws, seed)), predictions)


def summary(models: Mapping[str, pd.DataFrame], draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """`evaluate` for several models, in the order given.

    Returns:
        Index (`model`, `metric`), columns as in `evaluate`.

    Raises:
        StudyError: as in `evaluate`.
    """
    tables = {name: evaluate(table, draws, seed) for name, table in models.items()}
    return pd.concat(tables, names=["model", "metric"])


def per_class(predictions: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Metrics of each class with 95 % intervals from resampled patients.

    `auroc` and `average_precision` (one class against the rest), `sensitivity`, `precision` and `f1` (of the most
    probable class; precision is 0 where a class is never predicted) are over the single-label test. `natural_auroc`
    and `natural_average_precision` are over the natural test: images with the finding, alone or among others, against
    all other images. They exist for the six findings only.

    Returns:
        Index (`class`, `metric`); columns as in `evaluate`, and `n_positive`, the images that show the class.

    Raises:
        StudyError: as in `evaluate`.
    """
    predictions = checked(predictions)
    _require_classes(predictions)
    drawn = Draws.of(predictions["patient"], draws, seed)
    single, natural = _single_label_draws(predictions, drawn), _natural_draws(predictions, drawn)
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
        StudyError: as in `evaluate`; a metric is unknown; or the tables are of different images.
    """
    _check_metrics(metrics)
    first = checked(first)
    second = _aligned(checked(second), first)
    _require_classes(first)
    drawn = Draws.of(first["patient"], draws, seed)
    one, other = _all_draws(first, drawn, metrics), _all_draws(second, drawn, metrics)
    table = _interval_table({metric: one[metric] - other[metric] for metric in metrics}, first)
    table = table.rename(columns={"estimate": "difference"})
    table.insert(0, "first", [one[metric][0] for metric in metrics])
    table.insert(1, "second", [other[metric][0] for metric in metrics])
    return table


def compare_all(
    models: Mapping[str, pd.DataFrame],
    metrics: Sequence[str] = ("macro_auroc", "six_finding_auroc"),
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Every pair of models, paired by patient, corrected for having asked about so many pairs.

    Args:
        models: predictions tables of the same images.
        metrics: keys of `METRICS`; the pairs under one metric are one family of questions.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index (`metric`, `first`, `second`), each pair once and in the order of `models`; columns `difference` (first -
        second) with its interval `low` and `high`, `p` (`resampling.p_value`), `p_holm` (Holm's, within the metric)
        and `draws`.

    Raises:
        StudyError: as in `compare`.
    """
    found = _same_draws(models, metrics, draws, seed)
    tables = {}
    for metric in metrics:
        rows = {}
        for place, first in enumerate(models):
            for second in list(models)[place + 1 :]:
                gap = found[first][metric] - found[second][metric]
                rows[first, second] = resampling.entry(gap) | {"p": resampling.p_value(gap)}
        table = pd.DataFrame.from_dict(rows, orient="index").rename(columns={"estimate": "difference"})
        table.insert(4, "p_holm", resampling.holm(table["p"]) if len(table) else [])
        tables[metric] = table.rename_axis(["first", "second"])
    return pd.concat(tables, names=["metric"])[["difference", "low", "high", "p", "p_holm", "draws"]]


def ranking(
    models: Mapping[str, pd.DataFrame], metric: str = "macro_auroc", draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """How often each model takes each place when the patients are drawn again.

    Returns:
        Index `model`, best estimate first; columns `estimate`, `low`, `high`, `rank` (mean over draws; 1 is the best)
        and its `rank_low`, `rank_high`, then `place_1` to `place_n`, the shares of draws (0 to 1; ties share the
        better place).

    Raises:
        StudyError: as in `compare`.
    """
    found = _same_draws(models, [metric], draws, seed)
    values = np.stack([found[name][metric] for name in models])
    defined = np.isfinite(values).all(axis=0)
    defined[0] = False
    drawn = values[:, defined]
    places = 1 + (drawn[None] > drawn[:, None]).sum(axis=1)
    rows = {}
    for row, name in enumerate(models):
        low, high = np.percentile(places[row], [2.5, 97.5]) if defined.any() else (np.nan, np.nan)
        rank = {"rank": places[row].mean() if defined.any() else np.nan, "rank_low": low, "rank_high": high}
        shares = {f"place_{n}": float(np.mean(places[row] == n)) for n in range(1, len(models) + 1)}
        rows[name] = {key: resampling.entry(values[row])[key] for key in ("estimate", "low", "high")} | rank | shares
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    return table.sort_values("estimate", ascending=False, kind="stable")


def _same_draws(
    models: Mapping[str, pd.DataFrame], metrics: Sequence[str], draws: int, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """The draws of each model's metrics, all on the same draws of the same patients."""
    if not models:
        raise StudyError("no predictions to compare: name at least one model")
    _check_metrics(metrics)
    first = checked(next(iter(models.values())))
    _require_classes(first)
    drawn = Draws.of(first["patient"], draws, seed)
    return {name: _all_draws(_aligned(checked(table), first), drawn, metrics) for name, table in models.items()}


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
    """AUROC in every draw of patients.

    Pairs of a positive and a negative image are counted once for each pair of patients, those rightly ordered as 1,
    tied ones as a half; a draw then only weighs the pairs of patients.

    Args:
        truth: (n,) bool.
        scores: (n,) float, high for positive.
        draws: draws over the same images.

    Returns:
        (1 + draws,), the estimate first; NaN where no positive or no negative was drawn.
    """
    truth, scores = np.asarray(truth, dtype=bool), np.asarray(scores, dtype=float)
    if truth.all() or not truth.any():
        return np.full(draws.weights.shape[1], np.nan)
    shown, absent = (_by_patient(scores[side], draws.codes[side]) for side in (truth, ~truth))
    wins = np.zeros((len(shown.patients), len(absent.patients)))
    for row, (start, stop) in enumerate(zip(shown.starts, [*shown.starts[1:], len(shown.scores)], strict=True)):
        above = shown.scores[start:stop, None] - absent.scores[None, :]
        right = ((above > 0) + 0.5 * (above == 0)).sum(axis=0)
        wins[row] = np.add.reduceat(right, absent.starts)
    positive, negative = draws.weights[shown.patients], draws.weights[absent.patients]
    pairs = (shown.counts @ positive) * (absent.counts @ negative)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.einsum("pd,pd->d", positive, wins @ negative) / pairs


class _ByPatient(NamedTuple):
    """Scores sorted by patient: the patients, where each one's scores start, and how many he has."""

    scores: np.ndarray
    patients: np.ndarray
    starts: np.ndarray
    counts: np.ndarray


def _by_patient(scores: np.ndarray, codes: np.ndarray) -> _ByPatient:
    order = np.argsort(codes, kind="stable")
    patients, starts, counts = np.unique(codes[order], return_index=True, return_counts=True)
    return _ByPatient(scores[order], patients, starts, counts)


def precision_draws(truth: np.ndarray, scores: np.ndarray, draws: Draws) -> np.ndarray:
    """Average precision in every draw of patients.

    Images are sorted once by score; those with the same score form one step, whose precision is taken at its end, as
    in scikit-learn.

    Args:
        truth: (n,) bool.
        scores: (n,) float, high for positive.
        draws: draws over the same images.

    Returns:
        (1 + draws,), the estimate first; NaN where no positive or no negative was drawn.
    """
    truth, scores = np.asarray(truth, dtype=bool), np.asarray(scores, dtype=float)
    if truth.all() or not truth.any():
        return np.full(draws.weights.shape[1], np.nan)
    order = np.argsort(-scores, kind="stable")
    truth, scores, codes = truth[order], scores[order], draws.codes[order]
    steps = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])
    results = np.empty(draws.weights.shape[1])
    width = max(1, _FLOATS_AT_ONCE // len(truth))
    for start in range(0, len(results), width):
        drawn = draws.weights[codes, start : start + width]
        positive = drawn * truth[:, None]
        if len(steps) < len(scores):
            drawn, positive = np.add.reduceat(drawn, steps), np.add.reduceat(positive, steps)
        found, passed = np.cumsum(positive, axis=0), np.cumsum(drawn, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.divide(found, passed, out=np.zeros_like(found), where=passed > 0)
            area = np.einsum("nd,nd->d", positive, precision) / found[-1]
        results[start : start + width] = np.where((found[-1] > 0) & (passed[-1] > found[-1]), area, np.nan)
    return results


def _single_label_draws(predictions: pd.DataFrame, draws: Draws, precision: bool = True) -> dict[str, np.ndarray]:
    """Metrics of the single-label test: each (classes, draws), and `accuracy` (draws,)."""
    selected = predictions["selected"].to_numpy()
    draws = draws.within(selected)
    truth, guess = _single_label(predictions)
    scores = predictions.loc[selected, list(CLASSES)].to_numpy(dtype=float)
    number = len(CLASSES)
    rankings = {"auroc": np.stack([auroc_draws(truth == k, scores[:, k], draws) for k in range(number)])}
    if precision:
        rankings["average_precision"] = np.stack(
            [precision_draws(truth == k, scores[:, k], draws) for k in range(number)]
        )
    cells = np.zeros((len(truth), number * number))
    cells[range(len(truth)), truth * number + guess] = 1
    counts = draws.totals(cells).T.reshape(number, number, -1)
    right = counts[range(number), range(number)]
    of_truth, of_guess = counts.sum(axis=1), counts.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        defined = np.where(of_truth > 0, 1.0, np.nan)
        return rankings | {
            "sensitivity": right / of_truth,
            "precision": np.where(of_guess > 0, right / of_guess, 0) * defined,
            "f1": 2 * right / (of_truth + of_guess) * defined,
            "accuracy": right.sum(axis=0) / of_truth.sum(axis=0),
        }


def _natural_draws(predictions: pd.DataFrame, draws: Draws, precision: bool = True) -> dict[str, np.ndarray]:
    """Metrics of the natural test: each (six findings, draws)."""
    pairs = [(shows(predictions, name), predictions[name].to_numpy(dtype=float)) for name in SIX_FINDINGS]
    found = {"natural_auroc": np.stack([auroc_draws(truth, scores, draws) for truth, scores in pairs])}
    if precision:
        found["natural_average_precision"] = np.stack(
            [precision_draws(truth, scores, draws) for truth, scores in pairs]
        )
    return found


def _all_draws(
    predictions: pd.DataFrame, draws: Draws, metrics: Sequence[str] = tuple(METRICS)
) -> dict[str, np.ndarray]:
    """Metrics of `METRICS`, each (draws,). A mean over classes is NaN where any class is undefined."""
    found = {}
    if set(metrics) - {"six_finding_auroc"}:
        single = _single_label_draws(predictions, draws, precision="macro_average_precision" in metrics)
        means = {
            "macro_auroc": "auroc",
            "macro_average_precision": "average_precision",
            "balanced_accuracy": "sensitivity",
            "macro_f1": "f1",
        }
        found = {metric: single[each].mean(axis=0) for metric, each in means.items() if each in single}
        found["accuracy"] = single["accuracy"]
    if "six_finding_auroc" in metrics:
        found["six_finding_auroc"] = _natural_draws(predictions, draws, precision=False)["natural_auroc"].mean(axis=0)
    return found


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

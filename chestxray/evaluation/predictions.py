"""Predictions tables: written, read, checked, and aligned over models.

One row per image of a split. The **single-label test images** are the rows with `selected`: one of the seven classes
each, true class in `label`. The **balanced test images** are those of them with `balanced_test`, as many of each class.
**All test images** are every row, true labels in `findings`: an image may show several findings.

Questions about the single label read the seven columns named as `CLASSES`, which sum to one: the probabilities of
exactly one class each. Questions about a finding among all images read its own probability, `<Finding>_present`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from chestxray.config import (
    CLASSES,
    MODELS,
    NIH_FINDINGS,
    NO_FINDING_NIH,
    PRESENT,
    SIX_FINDINGS,
    SIX_LABELS,
    Study,
    StudyError,
)

COLUMNS = ("image", "patient", "label", "selected", "balanced_test", "findings", "view", "sex", "age", "follow_up")
"""Columns of the study's own tables, before the probabilities."""

PROBABILITIES = (*CLASSES, *PRESENT)

_BOOLEANS = ("selected", "balanced_test")


def prediction_table(table: pd.DataFrame, outputs: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Join the manifest's columns and a model's outputs, rounded to six decimals.

    Args:
        table: N rows with `COLUMNS`.
        outputs: `findings`, (N, 15) in the order of `ALL_LABELS`, and `classes`, (N, 7) in the order of `CLASSES`.
    """
    six = np.asarray(outputs["findings"])[:, SIX_LABELS]
    columns = np.hstack([outputs["classes"], six]).astype(float).round(6)
    return pd.concat([table[list(COLUMNS)], pd.DataFrame(columns, table.index, list(PROBABILITIES))], axis=1)


def read_predictions(path: Path) -> pd.DataFrame:
    """Read and check one predictions table.

    Args:
        path: a `predictions_valid.csv` or `predictions_test.csv`.

    Returns:
        One row per image: `patient` as text, `selected` and `balanced_test` as bool, `PROBABILITIES` as numbers.

    Raises:
        StudyError: the file is missing or no table, or a column or value in it can't be used.
    """
    source = "/".join(path.parts[-2:])
    try:
        text = dict.fromkeys(("image", "patient", "label", "findings", "view", "sex"), str)
        empty = {name: ["", "nan"] for name in PROBABILITIES}
        table = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=empty)
    except (OSError, ValueError) as error:
        raise StudyError(f"{source} can't be read ({type(error).__name__}): run the model's notebook again") from error
    for column in _BOOLEANS:
        if column in table:
            table[column] = table[column].astype(str).map({"True": True, "False": False})
    table.attrs["source"] = source
    return checked(table)


def read_models(study: Study, split: str) -> dict[str, pd.DataFrame]:
    """Read the predictions of all models for one split, in the order of `MODELS`.

    Args:
        study: whose models.
        split: `valid` or `test`.

    Returns:
        Tables of the same images in the same order, by the model's folder.

    Raises:
        StageMissing: a model has not been trained yet; the message names its notebook.
        StudyError: a table can't be used, or is of other images than the first model's.
    """
    tables = {}
    for folder, (_, notebook) in MODELS.items():
        path = study.require(study.paths.saved(folder) / f"predictions_{split}.csv", notebook)
        tables[folder] = read_predictions(path)
    first = next(iter(tables.values()))
    return {folder: aligned(table, first) for folder, table in tables.items()}


def average(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The plain mean of several models' probabilities, from tables of the same images: the simplest ensemble."""
    first = tables[0]
    scores = [aligned(table, first)[list(PROBABILITIES)].to_numpy() for table in tables]
    return first.assign(**pd.DataFrame(np.mean(scores, axis=0), first.index, list(PROBABILITIES)))


def checked(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the table with a plain index, or raise StudyError for the first thing in it that can't be used."""
    source = _source(predictions)
    again = "run the model's notebook again"
    for column in ("image", "patient", "label", "selected", "findings", *PROBABILITIES):
        if column not in predictions:
            raise StudyError(f"{source} has no column {column!r}: {again}")
    if predictions.empty:
        raise StudyError(f"{source} has no row: {again}")
    for column in PROBABILITIES:
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


def require_classes(predictions: pd.DataFrame) -> None:
    """Raise StudyError where no image, or every image, shows a class, so that nothing can be measured."""
    labels = predictions.loc[predictions["selected"], "label"]
    for name in CLASSES:
        truths = {"single-label images": labels == name}
        if name in SIX_FINDINGS:
            truths["images"] = shows(predictions, name)
        for images, truth in truths.items():
            if truth.sum() in (0, len(truth)):
                raise StudyError(
                    f"{_source(predictions)}: {truth.sum()} of {len(truth)} {images} are {name}, so nothing can be "
                    "measured: use a dataset with more images of it"
                )


def _source(predictions: pd.DataFrame) -> str:
    return predictions.attrs.get("source", "predictions")


def aligned(table: pd.DataFrame, first: pd.DataFrame) -> pd.DataFrame:
    """The rows of one table in the order of another.

    Args:
        table: a predictions table.
        first: another one, of the same images.

    Raises:
        StudyError: they are of different images.
    """
    if set(table["image"]) != set(first["image"]):
        stray = sorted(set(table["image"]) ^ set(first["image"]))[0]
        raise StudyError(
            f"{_source(table)} and {_source(first)} are of different images (only one has {stray}): "
            "run both models' notebooks again"
        )
    return table.set_index("image").loc[first["image"]].reset_index()[list(table.columns)]


def shows(predictions: pd.DataFrame, finding: str) -> np.ndarray:
    """Which images show a class, alone or among others: (n,) bool.

    Args:
        predictions: n rows with `findings`.
        finding: one of `CLASSES`.
    """
    finding = NO_FINDING_NIH if finding == "No_finding" else finding
    return predictions["findings"].astype(str).str.split("|").map(lambda found: finding in found).to_numpy(dtype=bool)


def finding(predictions: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Which images show one of the six findings, (n,) bool, and its probabilities `<Finding>_present`, (n,).

    Args:
        predictions: a predictions table of n rows.
        name: one of `SIX_FINDINGS`.
    """
    return shows(predictions, name), predictions[f"{name}_present"].to_numpy(dtype=float)


def classes_and_scores(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Class indices, (n,), and probabilities, (n, 7), of rows that have a `label` each."""
    truth = pd.Categorical(rows["label"], categories=list(CLASSES)).codes.astype(int)
    return truth, rows[list(CLASSES)].to_numpy(dtype=float)

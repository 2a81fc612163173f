"""Labelled folders: a model's metrics on radiographs whose findings are known, with intervals from resampled patients.

Neither all seven classes nor splits are needed: what the folder's labels can't tell stays empty, with the reason. The
scores are those that `batch` writes, and operating points come from the model's validation; nothing is fitted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from chestxray import files
from chestxray.config import CLASSES, SIX_FINDINGS, StudyError
from chestxray.data import nih_tables, own_tables, sources
from chestxray.evaluation import bootstrap, posterior, predictions
from chestxray.evaluation.bootstrap import Draws
from chestxray.evaluation.metrics import rank_draws
from chestxray.evaluation.posterior import EQUAL, Shares
from chestxray.images import pixels
from chestxray.inference import answers
from chestxray.inference.reader import UNCALIBRATED, Reader

METRICS = ("auroc", "average_precision", "sensitivity", "specificity")
"""Metrics of a finding. The last two are at the model's operating point."""
NO_POINT = "no operating point (no predictions_valid.csv beside the model)"

MACRO, SINGLE = "macro", "single-label"
"""Rows that stand for no finding: the mean AUROC of the six, and the images that show one of the seven classes only."""


class Labelled(NamedTuple):
    """Predictions for a labelled folder.

    Attributes:
        table: one row per radiograph: `image`, `patient`, `findings`, `label`, `selected`, and `answers.columns`.
        unreadable: what is wrong with each file that could not be read, as one line.
        lines: what was read, how, and what was left out, to print.
    """

    table: pd.DataFrame
    unreadable: tuple[str, ...]
    lines: tuple[str, ...]


def check(folder: Path, out: Path, labels: Path | None = None) -> None:
    """Check the places of an evaluation, before a model is loaded.

    Args:
        folder: the labelled folder.
        out: the table to write.
        labels: a label map.

    Raises:
        StudyError: one of them can't be used, or would be written over.
    """
    if not folder.is_dir():
        raise StudyError(f"{folder}: no such folder; give one that holds radiographs and their table")
    if out.is_dir() or out.suffix.lower() != ".csv":
        what = "is a folder" if out.is_dir() else "unknown kind of table"
        raise StudyError(f"{out}: {what}; give a name that ends in .csv")
    files.keep_apart(out, [folder, labels])


def predict(folder: Path, reader: Reader, labels: Path | None = None) -> Labelled:
    """Predict for every radiograph of a labelled folder, which is only read.

    Args:
        folder: radiographs and their table in the NIH layout; image, labels and patient are used.
        reader: predicts.
        labels: a label map for own labels, as `own_tables.read_map` reads it.

    Raises:
        StudyError: there is no table or no image, none can be used, or most rows or all of a class can't.
    """
    entries = nih_tables.read_entries(folder, labels)
    present = nih_tables.match_images(entries, sources.find_images(folder))
    greys = pixels.greys(present.paths.values())
    unreadable = [f"{line.file}: {line.value}; {line.remedy}" for line in sources.unusable_files(folder)]
    rows, flagged = [], 0
    with tqdm(total=len(present.paths), unit="image", desc="evaluate", disable=None) as bar:

        def report(error: StudyError) -> None:
            unreadable.append(str(error))
            bar.update()

        for image, answer in reader.stream(present.paths.items(), report=report, bits=greys.bits):
            rows.append(answers.row(image, answer))
            flagged += any(flag != UNCALIBRATED for flag in answer.flags)
            bar.update()
    if not rows:
        raise StudyError(f"{folder}: none of its {len(unreadable)} radiographs can be read, such as {unreadable[0]}")
    labels = present.table[["image", "patient", "findings", "label"]]
    table = labels.assign(selected=labels["label"] != "").merge(pd.DataFrame(rows, columns=answers.columns()))
    table.attrs["source"] = str(folder)
    images, patients = len(table), table["patient"].nunique()
    lines = [
        f"{folder}: {images:,} radiographs of {patients:,} patients",
        f"{flagged:,} of {images:,} flagged by the input check; they count",  # in the metrics
        *entries.notes,
        *greys.notes,
        *own_tables.summary(present.rejected),
    ]
    if unreadable:
        lines += [f"{len(unreadable):,} files can't be read:", *(f"  {line}" for line in unreadable[:3])]
    return Labelled(predictions.checked(table), tuple(unreadable), tuple(lines))


def measure(table: pd.DataFrame, draws: int = 2000, seed: int = 0, prevalence: Shares = EQUAL) -> pd.DataFrame:
    """Every metric that the labels allow, with its 95 % percentile interval.

    Each finding is taken against all other images. An interval needs two patients on each side, or resampling them
    changes nothing. Over the single-label images, classes without an image are left out of the means.

    Args:
        table: as `Labelled.table`.
        draws: how many times the patients are drawn.
        seed: seeds the draws; the same patients and seed give the same draws.
        prevalence: class shares of an accuracy beside the balanced accuracy, where they are not equal.

    Returns:
        Index (`finding`, `metric`): the six findings with `METRICS`, `MACRO` with `macro_auroc`, and `SINGLE` with
        `balanced_accuracy`, `macro_auroc` and, at given shares, `accuracy`. Columns `estimate`, `low`, `high` (0 to 1,
        NaN where it can't be measured), `draws` in which it is defined, `n_images`, `n_patients`, `n_positive`,
        `n_negative`, `prevalence`, and `note`: what a mean is over, at which shares, or why something is empty.

    Raises:
        StudyError: nothing can be measured.
    """
    drawn = Draws.of(table["patient"], draws, seed)
    rows: dict[tuple[str, str], dict] = {}
    areas, sides = {}, {}
    for name in SIX_FINDINGS:
        truth, scores = predictions.finding(table, name)
        area, precision = rank_draws(truth, scores, drawn)
        present, absent = {f"with {name}": truth}, {f"without {name}": ~truth}
        above = table[f"{name}_above"].to_numpy(dtype=float)
        no_point = NO_POINT if np.isnan(above).all() else ""
        found = {
            "auroc": (area, present | absent, ""),
            "average_precision": (precision, present | absent, ""),
            "sensitivity": (drawn.means(above, truth), present, no_point),
            "specificity": (drawn.means(1 - above, ~truth), absent, no_point),
        }
        size = {"n_positive": int(truth.sum()), "n_negative": int((~truth).sum()), "prevalence": truth.mean()}
        rows |= {(name, metric): _entry(table["patient"], *values) | size for metric, values in found.items()}
        if np.isfinite(area[0]):
            areas[name] = area
            sides |= present | absent
    rows[MACRO, "macro_auroc"] = _mean(table["patient"], areas, sides, 1)
    rows |= _single_label(table, drawn, prevalence)
    found = bootstrap.table(rows, ["finding", "metric"])
    if found["estimate"].isna().all():
        raise StudyError(f"{table.attrs.get('source', 'labels')}: nothing can be measured: {'; '.join(reasons(found))}")
    order = ["estimate", "low", "high", "draws", "n_images", "n_patients", "n_positive", "n_negative", "prevalence"]
    return found[[*order, "note"]].astype({"n_positive": "Int64", "n_negative": "Int64"})


def _entry(patients: pd.Series, values: np.ndarray, needed: Mapping[str, np.ndarray], note: str = "") -> dict:
    """A row of the table: `needed` are images, (n,) bool, that it can't do without, by what they are."""
    people = {side: patients[images].nunique() for side, images in needed.items()}
    reasons = [f"no image {side}" for side, number in people.items() if not number]
    reasons = reasons or [f"only one patient {side}" for side, number in people.items() if number == 1]
    row = bootstrap.entry(values) | {"n_images": len(patients), "n_patients": patients.nunique()}
    if reasons:
        row |= {"low": np.nan, "high": np.nan}
    return row | {"note": note or "; ".join(reasons)}


def _mean(patients: pd.Series, values: Mapping[str, np.ndarray], needed: Mapping[str, np.ndarray], least: int) -> dict:
    """The row of a mean over what can be measured, at least so many."""
    if len(values) < least:
        return _entry(patients, np.full(1, np.nan), {}, "too few classes for a mean")
    row = _entry(patients, np.mean(list(values.values()), axis=0), needed)
    return row | {"note": "; ".join(filter(None, (f"mean of {', '.join(values)}", row["note"])))}


def _single_label(table: pd.DataFrame, drawn: Draws, prevalence: Shares) -> dict[tuple[str, str], dict]:
    """Balanced accuracy and macro AUROC over the classes that occur among the images with one class each; accuracy."""
    single = table[table["selected"]]
    inside = drawn.within(table["selected"].to_numpy())
    truth, scores = predictions.classes_and_scores(single)
    guess, right, areas, needed = scores.argmax(axis=1), {}, {}, {}
    for k in np.unique(truth):
        right[CLASSES[k]] = inside.means(guess == k, truth == k)
        areas[CLASSES[k]], _ = rank_draws(truth == k, scores[:, k], inside)
        needed[f"with {CLASSES[k]} alone"] = truth == k
    found = {"balanced_accuracy": right, "macro_auroc": areas}
    rows = {(SINGLE, metric): _mean(single["patient"], values, needed, 2) for metric, values in found.items()}
    if prevalence is not EQUAL:
        hits = inside.means(posterior.named_at(scores, prevalence) == truth)
        rows[SINGLE, "accuracy"] = _entry(single["patient"], hits, needed, f"at class shares {prevalence}")
    return rows


def reasons(measured: pd.DataFrame) -> list[str]:
    """Why something is empty, each reason once."""
    notes = measured.loc[measured["low"].isna(), "note"].str.split("; ").explode()
    return [note for note in notes.unique() if not note.startswith(("mean of", "at class shares"))]


def cells(measured: pd.DataFrame) -> list[list[str]]:
    """The findings as rows of text, the heading first; empty where nothing was measured."""
    metrics = (metric.replace("auroc", "AUROC").replace("_", " ") for metric in METRICS)
    rows = [["finding", "with", "without", "prevalence", *metrics]]
    for name in SIX_FINDINGS:
        row = measured.loc[name, "auroc"]
        counts = [f"{row['n_positive']:,}", f"{row['n_negative']:,}", f"{row['prevalence']:.3f}"]
        rows.append([name.replace("_", " "), *counts, *(shown(measured.loc[name, metric]) for metric in METRICS)])
    return rows


def means(measured: pd.DataFrame) -> list[str]:
    """The means in sentences, each with what it is over, and what to mind in the rows above them."""
    rows = (MACRO, "macro_auroc"), (SINGLE, "balanced_accuracy"), (SINGLE, "macro_auroc")
    macro, accuracy, areas = (measured.loc[row] for row in rows)
    over = measured["note"].str.partition("; ")[0]
    lines = [f"Macro AUROC, {over[rows[0]]}: {shown(macro)}"] if shown(macro) else []
    if shown(accuracy):
        what = f"{accuracy['n_images']:,} images with one class, {over[rows[1]]}"
        lines.append(f"{what}: balanced accuracy at equal class shares {shown(accuracy)}, macro AUROC {shown(areas)}")
    if (SINGLE, "accuracy") in measured.index and shown(row := measured.loc[SINGLE, "accuracy"]):
        lines.append(f"{row['n_images']:,} images with one class: accuracy {shown(row)} {row['note']}")
    lines.append("Average precision depends on the prevalence: compare it only with samples of the same.")
    if empty := reasons(measured):
        lines.append(f"Empty, for there is {'; '.join(empty)}.")
    return [line.replace("No_finding", "No finding") for line in lines]


def shown(row: pd.Series) -> str:
    """An estimate with its interval, as far as there is one: `0.381 (0.328–0.433)`."""
    if pd.isna(row["estimate"]):
        return ""
    return f"{row['estimate']:.3f}" + ("" if pd.isna(row["low"]) else f" ({row['low']:.3f}–{row['high']:.3f})")

"""One page of HTML with a run's results: tables, figures and words in a single file that fetches nothing.

It owns the page. It reads a results folder as `cards` does; every table and figure on the page comes from there. It
must not compute a metric.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from chestxray.config import CLASSES, MODELS
from chestxray.evaluation import operating_points, subgroups
from chestxray.evaluation.comparison import METRICS
from chestxray.pipeline import documents
from chestxray.plots import style

TEMPLATE = "report.html.j2"

FIGURES: dict[str, tuple[str, str]] = {
    "forest": ("Every model", "Dots with 95 % intervals: macro AUROC of each model on the single-label test."),
    "pairs": (
        "Every model",
        "A square for each pair of models: their difference in macro AUROC, starred where it holds.",
    ),
    "ranking": ("Every model", "A row for each model: in how many draws of patients it takes each place."),
    "roc": ("The ensemble, class by class", "Seven ROC curves of the ensemble, one class against the rest."),
    "confusion": ("The ensemble, class by class", "Confusion matrix of the single-label test, counts and row shares."),
    "confusion_balanced": ("The ensemble, class by class", "Confusion matrix of the balanced test."),
    "reliability": ("Calibration", "For each class, predicted probability against the share of images that show it."),
    "decision_curves": (
        "Operating points",
        "For each finding, net benefit of acting on the model, on all, and on none.",
    ),
    "groups": ("Groups of patients", "Mean AUROC and true-positive rate by sex, age, view position and visit."),
    "pointing": (
        "Where it looks",
        "For each finding, how often the heat-map's peak and the image's centre lie in a box.",
    ),
    "heat_maps": (
        "Where it looks",
        "Radiographs under heat-maps with the radiologist's boxes: right, wrong, surely wrong.",
    ),
    "randomisation": (
        "Where it looks",
        "Rank correlation of heat-maps with the first ones as weights are shuffled.",
    ),
    "robustness": ("Worse radiographs", "Macro AUROC against the strength of seven degradations."),
    "errors": ("Errors", "Six radiographs that the ensemble takes for another class with most confidence."),
}
"""Figures of a results folder: the section each belongs to, and its alternative text."""


class Section(NamedTuple):
    """A heading with its tables (caption, table) and figures (alternative text, base64 of the PNG)."""

    title: str
    tables: list[tuple[str, pd.DataFrame]]
    figures: list[tuple[str, str]]


def build(folder: Path) -> str:
    """Make the page.

    Args:
        folder: a results folder, `5_results/<dataset>` or the committed reference.

    Returns:
        HTML that holds all it shows.

    Raises:
        StudyError: the folder lacks a file that every run leaves.
    """
    results = documents.read_results(folder)
    tables = _tables(results)
    sections = []
    for title in dict.fromkeys(section for section, _ in FIGURES.values()):
        figures = [
            (text, base64.b64encode((folder / f"{name}.png").read_bytes()).decode())
            for name, (section, text) in FIGURES.items()
            if section == title and (folder / f"{name}.png").is_file()
        ]
        if figures or tables.get(title):
            sections.append(Section(title, tables.get(title, []), figures))
    page = documents.environment().get_template(TEMPLATE)
    return page.render(sections=sections, **{name: results[name] for name in ("summary", "data", "metrics")})


def _tables(results: dict[str, Any]) -> dict[str, list[tuple[str, pd.DataFrame]]]:
    """The tables of each section, their cells as text."""
    models = {folder: title for folder, (title, _) in MODELS.items()} | {"mean of members": "Mean of members"}
    plain = {name: name.replace("_", " ") for name in CLASSES}
    found: dict[str, list[tuple[str, pd.DataFrame]]] = {}

    def add(section: str, caption: str, name: str, rows: str, names: dict[str, str], columns: dict[str, str]) -> None:
        if name in results:
            table = results[name]
            cells = table.apply(style.interval, axis=1).unstack(table.index.names[-1])
            order = [row for row in dict.fromkeys(table.index.get_level_values(rows)) if row in cells.index]
            kept = {column: shown for column, shown in columns.items() if column in cells}
            cells = cells.loc[order, list(kept)].rename(index=names, columns=kept).fillna("–")
            cells.index.name = cells.columns.name = None
            found.setdefault(section, []).append((caption, cells))

    add("Every model", "Single-label test; the last column is of the natural test", "metrics", "model", models, METRICS)
    single = {name: title for name, title in METRICS.items() if name != "six_finding_auroc"}
    add("Every model", "Balanced test", "metrics_balanced", "model", models, single)
    published = results.get("published")
    if published is not None:
        cells = published.map(style.decimal).rename_axis(None)
        caption = (
            "AUROC on the natural test beside published figures, which were trained and tested on many more images"
        )
        found["Every model"].append((caption, cells))
    columns = {"auroc": "AUROC", "average_precision": "average precision", "sensitivity": "sensitivity", "f1": "F1"}
    columns |= {"natural_auroc": "AUROC, natural test"}
    add("The ensemble, class by class", "One class against the rest", "per_class", "class", plain, columns)
    errors = results["calibration"].xs("ece", level="metric").assign(metric="ECE")
    results = results | {"errors": errors.drop(columns="metric")}
    stages = {stage: stage for stage in ("as trained", "temperature", "temperature and bias")}
    add("Calibration", "Expected calibration error, natural test", "errors", "class", plain, stages)
    add(
        "Calibration",
        "The most probable class, radiographs with one class",
        "calibration_classes",
        "stage",
        {},
        {"ece": "ECE", "brier": "Brier score", "accuracy": "accuracy"},
    )
    target = results["operating_points"]["target"].iloc[0]
    caption = f"Thresholds that catch {target:.0%} on validation, measured on the natural test"
    add("Operating points", caption, "operating_test", "finding", {}, operating_points.METRICS)
    add("Where it looks", "Heat-maps against boxes", "localisation", "finding", {}, LOCALISATION)
    if "localisation_networks" in results:
        finer = results["localisation_networks"].xs(("finer", "ensemble"), level=("map", "network"))
        results = results | {"finer": finer}
    add("Where it looks", "The same with maps of a finer, earlier layer", "finer", "finding", {}, LOCALISATION)
    found["Groups of patients"] = [("Gaps to the largest group", _gaps(results["groups"]))]
    return found


LOCALISATION = {
    "pointing": "pointing",
    "centre_pointing": "centre",
    "reachable": "at most",
    "iou": "IoU",
    "centre_iou": "centre, IoU",
}
"""Columns of the table of heat-maps against boxes."""


def _gaps(table: pd.DataFrame) -> pd.DataFrame:
    rows = {}
    for (column, group, metric), row in table.xs("mean", level="finding").iterrows():
        cell = rows.setdefault(f"{subgroups.COLUMNS[column]}: {group}", {"images": f"{row['n_images']:,.0f}"})
        known = pd.notna(row["gap"])
        cell[metric.upper()] = "too few" if row["too_small"] else style.interval(row)
        cell[f"{metric.upper()} gap"] = style.signed(row["gap"]) if known else "–"
        cell[f"p (Holm), {metric.upper()}"] = style.decimal(row["p_holm"]) if known else "–"
    return pd.DataFrame(rows).T

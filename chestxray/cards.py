"""The model card and the data sheet: what a finished run's files say, in the words that readers expect.

It owns which facts the two documents hold. Every figure in them is read from files that the results notebook wrote,
and none is typed, so that they cannot drift from the results. It must not compute a metric.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from chestxray.config import ACKNOWLEDGEMENT, CLASSES, MODELS, SIX_FINDINGS, SPLITS, StudyError
from chestxray.evaluation import predictions
from chestxray.evaluation.comparison import METRICS
from chestxray.plots import style

TEMPLATES = Path(__file__).parent / "templates"
DOCUMENTS: dict[str, str] = {"MODEL_CARD.md": "model_card.md.j2", "DATA_SHEET.md": "data_sheet.md.j2"}
"""File of each document and its template."""

TABLES: dict[str, tuple[str, ...]] = {
    "metrics.csv": ("model", "metric"),
    "metrics_balanced.csv": ("model", "metric"),
    "per_class.csv": ("class", "metric"),
    "comparison.csv": ("against", "metric"),
    "pairs.csv": ("metric", "first", "second"),
    "ranking.csv": ("model",),
    "published.csv": ("model",),
    "calibration.csv": ("class", "stage", "metric"),
    "calibration_classes.csv": ("stage", "metric"),
    "operating_points.csv": ("finding",),
    "operating_test.csv": ("finding", "metric"),
    "operating_models.csv": ("model", "metric"),
    "groups.csv": ("column", "group", "finding", "metric"),
    "localisation.csv": ("finding", "metric"),
    "localisation_networks.csv": ("map", "network", "finding", "metric"),
    "randomisation.csv": ("share",),
    "robustness.csv": ("degradation", "strength"),
}
"""Tables of a results folder and their index columns."""

NEEDED = (
    "summary.json",
    "data.json",
    "metrics.csv",
    "per_class.csv",
    "operating_test.csv",
    "calibration.csv",
    "groups.csv",
)
"""What a run must have left before a document can be filled."""


def data_facts(manifest: pd.DataFrame, boxes: pd.DataFrame) -> dict[str, Any]:
    """Count what a dataset holds, for the data sheet.

    Args:
        manifest: the manifest.
        boxes: the lesion boxes, empty where there are none.

    Returns:
        Plain numbers and texts, ready for JSON.
    """
    ages = manifest["age"].dropna().astype(int)
    each = manifest.groupby("patient").size()
    here = boxes[boxes["image"].isin(manifest["image"]) & boxes["finding"].isin(SIX_FINDINGS)]
    splits = {}
    for split in SPLITS:
        rows = manifest[manifest["split"] == split]
        chosen = rows[rows["selected"]]
        splits[split] = {
            "images": len(rows),
            "patients": int(rows["patient"].nunique()),
            "selected": {name: int((chosen["label"] == name).sum()) for name in CLASSES},
            "natural": {name: int(predictions.shows(rows, name).sum()) for name in CLASSES},
            "views": {name: int((rows["view"] == name).sum()) for name in ("PA", "AP")},
            "sexes": {name: int((rows["sex"] == name).sum()) for name in ("F", "M")},
        }
    balanced = manifest.get("balanced_test", pd.Series(False, index=manifest.index))
    return {
        "images": len(manifest),
        "patients": int(manifest["patient"].nunique()),
        "images_a_patient": {"median": float(each.median()), "most": int(each.max())},
        "age": {
            "lowest": int(ages.min()),
            "quartiles": [float(ages.quantile(share)) for share in (0.25, 0.5, 0.75)],
            "highest": int(ages.max()),
            "unknown": int(manifest["age"].isna().sum()),
        },
        "balanced_test": int(balanced.sum()),
        "boxes": {name: int((here["finding"] == name).sum()) for name in SIX_FINDINGS},
        "boxed_images": int(here["image"].nunique()),
        "splits": splits,
    }


def read_results(folder: Path) -> dict[str, Any]:
    """Read a results folder: tables by the name of their file without suffix, `summary`, `data`, and the models' runs.

    Raises:
        StudyError: one of `NEEDED` is missing or unreadable.
    """
    for name in NEEDED:
        if not (folder / name).is_file():
            raise StudyError(f"{folder.name}/{name} is missing: run stage 5 again (chestxray run --only 5)")
    found: dict[str, Any] = {}
    try:
        for name, index in TABLES.items():
            if (folder / name).is_file():
                found[Path(name).stem] = pd.read_csv(folder / name).set_index(list(index))
        for name in ("summary", "data"):
            found[name] = json.loads((folder / f"{name}.json").read_text("utf-8"))
    except (ValueError, KeyError) as error:
        raise StudyError(f"{folder.name}/{name}: cannot be read ({error}); run stage 5 again") from error
    return found


def render(folder: Path, runs: Path | None = None) -> dict[str, str]:
    """Fill the model card (Mitchell et al., FAT* 2019) and the data sheet (Gebru et al., CACM 2021).

    Args:
        folder: a results folder.
        runs: where each model's `run.json` lies in a folder of its name; `folder` if None.

    Returns:
        Text of each of `DOCUMENTS`.

    Raises:
        StudyError: as `read_results`, or a `run.json` is missing.
    """
    results = read_results(folder)
    results["runs"] = {}
    for name in MODELS:
        path = (runs or folder) / name / "run.json"
        if not path.is_file():
            raise StudyError(f"{name}/run.json is missing beside the results: run stage 4 for {name}")
        results["runs"][name] = json.loads(path.read_text("utf-8"))
    page = environment()
    return {file: page.get_template(template).render(**results) for file, template in DOCUMENTS.items()}


def environment() -> jinja2.Environment:
    """Templates with the study's words and number formats; a name that is not there is an error."""
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=jinja2.select_autoescape(["html.j2", "html"]),
    )
    page.filters |= {
        "decimal": style.decimal,
        "interval": style.interval,
        "signed": style.signed,
        "number": lambda value: f"{value:,}",
        "share": lambda value: f"{value:.0%}",
        "plain": lambda name: str(name).replace("_", " "),
        "taught": lambda runs: [name for name, run in runs.items() if "other_visits" in run.get("parameters", {})],
    }
    page.globals |= {
        "CLASSES": CLASSES,
        "SIX_FINDINGS": SIX_FINDINGS,
        "METRICS": METRICS,
        "MODELS": {folder: title for folder, (title, _) in MODELS.items()},
        "ACKNOWLEDGEMENT": ACKNOWLEDGEMENT,
    }
    return page

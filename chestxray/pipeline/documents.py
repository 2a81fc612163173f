"""Documents: the table of results, the model card and the data sheet, filled from the files of a results folder.

Importing it is cheap: pandas and templates are imported by the functions that need them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chestxray.config import ACKNOWLEDGEMENT, CLASSES, MODELS, REFERENCE, SIX_FINDINGS, SPLITS, Study, StudyError
from chestxray.files import shown

if TYPE_CHECKING:
    import pandas as pd

RESULTS = "metrics.csv"
"""What the results notebook writes its table of all models to."""

TITLES = {folder: title for folder, (title, _) in MODELS.items()}
"""What each model's folder is called in tables."""

SHOWN = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "macro_auroc": "macro AUROC",
    "six_finding_auroc": "AUROC, six findings",
}
"""The metrics of the short table of results, and their headings."""


def read_metrics(path: Path) -> pd.DataFrame:
    """A results notebook's metrics.csv: by `model` and `metric`, an `estimate` with `low` and `high`.

    Raises:
        StudyError: the file can't be read, or lacks one of these columns.
    """
    import pandas as pd

    index = ["model", "metric"]
    try:
        return pd.read_csv(path, usecols=[*index, "estimate", "low", "high"]).set_index(index)
    except (OSError, ValueError) as error:
        raise StudyError(f"{path.name} can't be read ({error}): run stage 5 again") from error


def results_rows(metrics: pd.DataFrame) -> list[list[str]]:
    """The short table of results from `read_metrics`: a heading and one row a model, with 95 % intervals."""
    cells = {
        key: f"{row.estimate:.3f} ({row.low:.3f}–{row.high:.3f})"
        for key, row in zip(metrics.index, metrics.itertuples(), strict=True)
    }
    models = metrics.index.unique("model")
    rows = [[TITLES.get(model, model), *(cells.get((model, name), "–") for name in SHOWN)] for model in models]
    return [["model", *SHOWN.values()], *rows]


def markdown_table(rows: list[list[str]]) -> str:
    """Rows, the first of them the heading, as a table in Markdown."""
    rule = ["---"] + ["--:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def fill_results(readme: str) -> str:
    """Return the README's text with the table of results of the committed reference between its two markers.

    Raises:
        StudyError: a marker is missing.
    """
    start, end = "<!-- results:start -->", "<!-- results:end -->"
    before, _, rest = readme.partition(start)
    if end not in rest:
        raise StudyError(f"README.md: the markers {start} and {end} are missing; put them where the results belong")
    table = markdown_table(results_rows(read_metrics(REFERENCE / RESULTS)))
    return f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"


def print_outcome(study: Study, pages: Sequence[Path]) -> None:
    """Print the table of results of a run, and where its executed notebooks are.

    Args:
        study: nothing is said of results that aren't there.
        pages: the executed notebooks.
    """
    metrics = study.paths.results / RESULTS
    if metrics.exists():
        print(f"\nOn the test split of {study.data_note}, with 95 % intervals (patients resampled):\n")
        print_rows(results_rows(read_metrics(metrics)))
    if pages:
        print("\nNotebooks, executed:")
    for page in pages:
        print(f"  {shown(page)}")


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells, the first of them the heading: first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        print("  ".join(cells).rstrip())


TEMPLATES = Path(__file__).parent / "templates"
DOCUMENTS: dict[str, str] = {"MODEL_CARD.md": "model_card.md.j2", "DATA_SHEET.md": "data_sheet.md.j2"}
"""File of each document and its template."""

TABLES: dict[str, tuple[str, ...]] = {
    "metrics.csv": ("model", "metric"),
    "metrics_balanced.csv": ("model", "metric"),
    "per_class.csv": ("class", "metric"),
    "shares.csv": ("shares", "metric"),
    "calibration.csv": ("class", "stage", "metric"),
    "operating_points.csv": ("finding",),
    "operating_test.csv": ("finding", "metric"),
    "groups.csv": ("column", "group", "finding", "metric"),
    "localisation.csv": ("finding", "metric"),
    "robustness.csv": ("degradation", "strength"),
}
"""Tables of a results folder that the documents read, and their index columns."""

OPTIONAL = ("metrics_balanced.csv", "operating_points.csv", "localisation.csv", "robustness.csv")
"""Those that not every run leaves."""


def data_facts(manifest: pd.DataFrame, boxes: pd.DataFrame) -> dict[str, Any]:
    """Count what a dataset holds, for the data sheet.

    Args:
        manifest: the manifest.
        boxes: the lesion boxes, empty where there are none.

    Returns:
        Plain numbers and texts, ready for JSON.
    """
    from chestxray.evaluation import predictions

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
            "any_label": {name: int(predictions.shows(rows, name).sum()) for name in CLASSES},
            "views": {name: int((rows["view"] == name).sum()) for name in ("PA", "AP")},
            "sexes": {name: int((rows["sex"] == name).sum()) for name in ("F", "M")},
        }
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
        "balanced_test": int(manifest["balanced_test"].sum()),
        "boxes": {name: int((here["finding"] == name).sum()) for name in SIX_FINDINGS},
        "boxed_images": int(here["image"].nunique()),
        "splits": splits,
    }


def read_results(folder: Path) -> dict[str, Any]:
    """Read a results folder: tables by the name of their file without suffix, `summary`, `data`, and the models' runs.

    Raises:
        StudyError: a file is missing, besides tables that not every run leaves, or unreadable.
    """
    import pandas as pd

    found: dict[str, Any] = {"runs": {}}
    try:
        for name, index in TABLES.items():
            if (folder / name).exists() or name not in OPTIONAL:
                found[Path(name).stem] = pd.read_csv(folder / name).set_index(list(index))
        for name in ("summary.json", "data.json"):
            found[Path(name).stem] = json.loads((folder / name).read_text("utf-8"))
        for model in MODELS:
            name = f"{model}/run.json"
            found["runs"][model] = json.loads((folder / name).read_text("utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise StudyError(f"{folder.name}/{name}: cannot be read ({error}); run stages 4 and 5 again") from error
    return found


def render(folder: Path) -> dict[str, str]:
    """Fill the model card (Mitchell et al., FAT* 2019) and the data sheet (Gebru et al., CACM 2021).

    Args:
        folder: a results folder, with each model's `run.json` in a folder of its name.

    Returns:
        Text of each of `DOCUMENTS`.

    Raises:
        StudyError: as `read_results`.
    """
    import jinja2

    from chestxray.evaluation.comparison import METRICS
    from chestxray.inference.interpretation import localisation_note
    from chestxray.plots import style

    results = read_results(folder) | {"localisation_note": localisation_note(folder / "localisation.csv")}
    # A name that is not there is an error.
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page.filters |= {
        "decimal": style.decimal,
        "interval": style.interval,
        "signed": style.signed,
        "number": lambda value: f"{value:,}",
        "share": lambda value: f"{value:.0%}",
        "plain": lambda name: str(name).replace("_", " "),
    }
    page.globals |= {"CLASSES": CLASSES, "SIX_FINDINGS": SIX_FINDINGS, "METRICS": METRICS, "MODELS": TITLES}
    page.globals["ACKNOWLEDGEMENT"] = ACKNOWLEDGEMENT
    return {file: page.get_template(template).render(**results) for file, template in DOCUMENTS.items()}

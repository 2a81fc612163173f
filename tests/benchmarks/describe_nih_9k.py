"""How nih_9k departs from all of ChestX-ray14: `python -m tests.benchmarks.describe_nih_9k FOLDER`.

It prints the data sheet's table. FOLDER has the NIH's image table, its lesion boxes and its official lists; no image is
read. Each cell is a share of the images of one official list: of those that `1_Datasets/nih_9k.csv` names, and of all.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from chestxray.config import SIX_FINDINGS
from chestxray.data import nih_tables, subset


def shares(raw: Path) -> pd.DataFrame:
    """Shares of images: a row per property; columns (list, `nih_9k` | `all`), the first row the numbers of images."""
    table = nih_tables.read_entries(raw).table.set_index("image")
    findings = table["findings"].str.split("|")
    boxed = set(nih_tables.read_boxes(raw)["image"])
    properties = {name: findings.map(lambda names, name=name: name in names) for name in SIX_FINDINGS}
    properties |= {
        "No finding": table["findings"].eq("No Finding"),
        "several findings": findings.str.len().gt(1),
        "AP view": table["view"].eq("AP"),
        "first visit": table["follow_up"].eq(0),
        "with a lesion box": pd.Series(table.index.isin(boxed), table.index),
    }
    listed = table.index.isin(list(subset.read_list()))
    columns = {}
    for name, images in zip(("train_val", "test"), nih_tables.read_lists(raw), strict=True):
        official = table.index.isin(images)
        for part, rows in (("nih_9k", official & listed), ("all", official)):
            columns[name, part] = {"images": rows.sum()} | {key: has[rows].mean() for key, has in properties.items()}
    return pd.DataFrame(columns)


def markdown(raw: Path) -> str:
    """The table of `shares` in Markdown, shares as percentages."""
    lines = [
        "| share of images | train_val, nih_9k | train_val, all | test, nih_9k | test, all |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name, row in shares(raw).iterrows():
        cells = [f"{value:,.0f}" if name == "images" else f"{value:.1%}" for value in row]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(markdown(Path(sys.argv[1])))

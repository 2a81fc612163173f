"""Hold validation's draw against scikit-learn's StratifiedGroupKFold: `python tests/benchmarks/bench_splits.py FOLDER`.

FOLDER has an image table and the official lists of ChestX-ray14. Both methods hold out a tenth of the train_val images
by patient, stratified by label and view: `splits.hold_out` with five seeds, and the ten folds of scikit-learn's with
one. A departure is how far the share of a class (or of a class in one view) that is held out lies from the tenth, in
percentage points: its mean and its largest over all draws. No patient may be on both sides.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from chestxray.config import CLASSES
from chestxray.data import nih_tables, splits

FOLDS = 10
SEEDS = 5


def ours(table: pd.DataFrame) -> list[np.ndarray]:
    """Which images each draw holds out, (n,) bool."""
    return [table["patient"].isin(splits.hold_out(table, 1 / FOLDS, seed)).to_numpy() for seed in range(SEEDS)]


def theirs(table: pd.DataFrame) -> list[np.ndarray]:
    """The same for the folds of scikit-learn."""
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    drawn = folds.split(table, table["label"] + " " + table["view"], table["patient"])
    return [np.isin(np.arange(len(table)), held) for _, held in drawn]


def departures(table: pd.DataFrame, draws: list[np.ndarray]) -> pd.DataFrame:
    """Departures in points: a row a class, and a class and view; a column a draw."""
    strata = {"all images": np.ones(len(table), bool)}
    for label in CLASSES:
        of_class = table["label"].eq(label).to_numpy()
        strata[label] = of_class
        strata |= {f"{label} {view}": of_class & table["view"].eq(view).to_numpy() for view in ("PA", "AP")}
    return pd.DataFrame(
        {name: [100 * (held[rows].mean() - 1 / FOLDS) for held in draws] for name, rows in strata.items()}
    ).T


def main() -> None:
    """Print departures and seconds of both."""
    raw = Path(sys.argv[1])
    table = nih_tables.read_entries(raw).table
    table = table[table["image"].isin(nih_tables.read_lists(raw)[0])].reset_index(drop=True)
    print(f"{len(table):,} images of {table['patient'].nunique():,} patients, a tenth held out")
    columns = {}
    for name, method in (("hold_out", ours), ("StratifiedGroupKFold", theirs)):
        started = time.process_time()
        draws = method(table)
        seconds = time.process_time() - started
        for held in draws:
            assert not set(table["patient"][held]) & set(table["patient"][~held])
        print(f"{name}: {len(draws)} draws, {seconds / len(draws):.2f} s of processor a draw", end="")
        print(f" ({seconds:.1f} s for a first fold)" if method is theirs else "")
        off = departures(table, draws).abs()
        columns |= {(name, "mean"): off.mean(axis=1), (name, "largest"): off.max(axis=1)}
    print(pd.DataFrame(columns).round(3).to_string())


if __name__ == "__main__":
    main()

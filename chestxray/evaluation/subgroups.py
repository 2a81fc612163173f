"""Subgroups: metrics by sex, age, view position and visit, and the gaps between groups."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from chestxray.config import SIX_FINDINGS, StudyError
from chestxray.evaluation import bootstrap
from chestxray.evaluation.bootstrap import Draws
from chestxray.evaluation.metrics import rank_draws
from chestxray.evaluation.predictions import checked, finding

FEWEST = 10
"""A finding with fewer positive patients, or fewer negative ones, in a group than this is not measured there."""

AGES = (40, 60)
"""Years at which an age band begins."""

COLUMNS: dict[str, str] = {"sex": "Sex", "age_band": "Age", "view": "View position", "visit": "Visit"}
"""What images are grouped by, and how it is shown."""


def with_groups(predictions: pd.DataFrame) -> pd.DataFrame:
    """Add `age_band` and `visit` (first image or follow-up) to a predictions table; empty where the table has no value.

    Raises:
        StudyError: `sex`, `age`, `view` or `follow_up` is missing.
    """
    for column in ("sex", "age", "view", "follow_up"):
        if column not in predictions:
            raise StudyError(f"predictions have no column {column!r}: run the model's notebook again")
    age, visit = (pd.to_numeric(predictions[column], errors="coerce") for column in ("age", "follow_up"))
    low, high = AGES
    bands = np.select(
        [age < low, age < high, age >= high], [f"under {low}", f"{low} to {high - 1}", f"{high} and over"], ""
    )
    visits = np.select([visit == 0, visit > 0], ["first", "follow-up"], "")
    return predictions.assign(age_band=bands, visit=visits)


def measure(predictions: pd.DataFrame, points: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """AUROC and true-positive rate of each finding in each group, over all test images.

    The draws are the same for all groups: a patient with images in two groups is drawn for both.

    Args:
        predictions: predictions for test, with `sex`, `age`, `view` and `follow_up`.
        points: thresholds from `operating_points.choose`, at which the true-positive rate is taken.
        draws: how many times the patients are drawn.
        seed: seeds the draws.

    Returns:
        Index (`column`, `group`, `finding`, `metric`), the last finding `mean` (over the findings that every group of
        the column has enough of); metrics `auroc`, `tpr`. Columns `estimate`, `low`, `high`, `draws`, `n_images`,
        `n_patients`, `n_positive`; the gap to the `reference` group (that with most images) as `gap`, `gap_low`,
        `gap_high` and `p`, empty in that group; `p_holm` over all gaps of `mean`; and `too_small`.
    """
    table = with_groups(checked(predictions))
    drawn = Draws.of(table["patient"], draws, seed)
    parts = [_measure_column(table, column, points, drawn) for column in COLUMNS]
    found = pd.concat([part for part in parts if len(part)])
    family = found.index.get_level_values("finding") == "mean"
    found["p_holm"] = np.nan
    found.loc[family, "p_holm"] = bootstrap.holm(found.loc[family, "p"])
    return found


def _measure_column(table: pd.DataFrame, column: str, points: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    sizes = table.loc[table[column].ne(""), column].value_counts()
    groups = sorted(sizes.index, key=lambda group: (not group.startswith("under"), group))
    if len(groups) < 2:
        return pd.DataFrame()
    reference = sizes.idxmax()
    patients = table.groupby(column)["patient"].nunique()
    values, counts = {}, {}
    for group in groups:
        inside = table[column].eq(group).to_numpy()
        values[group], counts[group] = _group_draws(table[inside], points, draws.within(inside))
    shared = [name for name in SIX_FINDINGS if all(counts[group][name]["enough"] for group in groups)]
    rows = {}
    for group, name, metric in itertools.product(groups, (*SIX_FINDINGS, "mean"), ("auroc", "tpr")):
        count = counts[group].get(name, {"positive": np.nan, "enough": bool(shared)})
        comparable = group != reference and counts[reference].get(name, count)["enough"]
        ours, theirs = (_mean(values[one][metric], name, shared) for one in (group, reference))
        row = bootstrap.entry(ours if count["enough"] else np.full(2, np.nan))
        row |= {"n_images": int(sizes[group]), "n_patients": patients[group], "n_positive": count["positive"]}
        row |= {"reference": reference, "too_small": not count["enough"]}
        rows[column, group, name, metric] = row | (_gap(ours - theirs) if count["enough"] and comparable else {})
    found = bootstrap.table(rows, ["column", "group", "finding", "metric"])
    gap = ["gap", "gap_low", "gap_high", "p"]
    found = found.reindex(columns=[*found.columns.difference(gap, sort=False), *gap])
    return found.astype({"n_positive": "Int64"})


def _group_draws(table: pd.DataFrame, points: pd.DataFrame, draws: Draws) -> tuple[dict, dict]:
    """Each finding's AUROC and true-positive rate in every draw, and how many positives there are."""
    values, counts = {"auroc": {}, "tpr": {}}, {}
    patients = table["patient"].to_numpy()
    for name in SIX_FINDINGS:
        truth, scores = finding(table, name)
        values["auroc"][name] = rank_draws(truth, scores, draws)[0]
        values["tpr"][name] = draws.means(scores >= points.loc[name, "threshold"], truth)
        enough = min(len(set(patients[truth])), len(set(patients[~truth]))) >= FEWEST
        counts[name] = {"positive": int(truth.sum()), "enough": enough}
    return values, counts


def _mean(values: dict[str, np.ndarray], name: str, shared: list[str]) -> np.ndarray:
    if name != "mean":
        return values[name]
    return np.mean([values[one] for one in shared], axis=0) if shared else np.full(2, np.nan)


def _gap(values: np.ndarray) -> dict[str, float]:
    found = bootstrap.entry(values)
    ends = {"gap": found["estimate"], "gap_low": found["low"], "gap_high": found["high"]}
    return ends | {"p": bootstrap.p_value(values)}

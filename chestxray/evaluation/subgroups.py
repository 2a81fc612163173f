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
    values, positive = {}, {}
    for group in groups:
        inside = table[column].eq(group).to_numpy()
        values[group], positive[group] = _group_draws(table[inside], points, draws.within(inside))
    shared = [name for name in SIX_FINDINGS if all(np.isfinite(values[group][name][0, 0]) for group in groups)]
    undefined = np.full((2, 2), np.nan)
    for found in values.values():
        found["mean"] = np.mean([found[name] for name in shared], axis=0) if shared else undefined
    rows = {}
    for group, name in itertools.product(groups, (*SIX_FINDINGS, "mean")):
        ours, theirs = values[group][name], values[reference][name]
        gaps = undefined if group == reference or np.isnan([ours[0, 0], theirs[0, 0]]).any() else ours - theirs
        for metric, value, gap in zip(("auroc", "tpr"), ours, gaps, strict=True):
            size = {"n_images": sizes[group], "n_patients": patients[group], "n_positive": positive[group].get(name)}
            between = bootstrap.entry(gap)
            rows[column, group, name, metric] = {
                **(bootstrap.entry(value) | size | {"reference": reference, "too_small": bool(np.isnan(value[0]))}),
                **{f"gap{end}": between[key] for end, key in (("", "estimate"), ("_low", "low"), ("_high", "high"))},
                "p": bootstrap.p_value(gap),
            }
    return bootstrap.table(rows, ["column", "group", "finding", "metric"]).astype({"n_positive": "Int64"})


def _group_draws(table: pd.DataFrame, points: pd.DataFrame, draws: Draws) -> tuple[dict, dict]:
    """AUROC and true-positive rate of each finding, (2, 1 + draws), NaN where too small; and its positive images."""
    values, positive = {}, {}
    patients = table["patient"]
    for name in SIX_FINDINGS:
        truth, scores = finding(table, name)
        positive[name] = int(truth.sum())
        if min(patients[truth].nunique(), patients[~truth].nunique()) < FEWEST:
            values[name] = np.full((2, 2), np.nan)
        else:
            caught = draws.means(scores >= points.loc[name, "threshold"], truth)
            values[name] = np.stack([rank_draws(truth, scores, draws)[0], caught])
    return values, positive

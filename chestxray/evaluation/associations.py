"""Associations: findings with each other, and with age, sex, view and grey levels.

The statistics of the exploratory analysis, on tables with the manifest's columns and arrays of grey levels. Intervals
and p-values come from resampled patients (`bootstrap`).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from chestxray.config import NIH_FINDINGS
from chestxray.evaluation import bootstrap
from chestxray.evaluation.bootstrap import Draws

FEWEST_PATIENTS = 10
"""A finding in fewer patients than this gets no estimate: its interval would be fiction."""

_COUNTED = ["factor", "finding", "images", "patients"]
_EFFECT = ["effect", "effect_low", "effect_high", "p"]


def findings_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return which image shows which finding: (images, 14) bool, columns in the order of NIH_FINDINGS.

    Args:
        table: the column `findings`, names joined by |.
    """
    names = table["findings"].fillna("").str.get_dummies("|").astype(bool)
    return names.reindex(columns=list(NIH_FINDINGS), fill_value=False)


def co_occurrence(marks: pd.DataFrame) -> pd.DataFrame:
    """Images that show both findings, counted from `findings_of`; the diagonal holds those that show the one."""
    ones = marks.astype(int)
    return ones.T @ ones


def lift(marks: pd.DataFrame) -> pd.DataFrame:
    """How many times as often two findings occur together as they would if they were independent; 1 is chance.

    Observed over expected images, from `findings_of`; empty on the diagonal and for a finding without images.
    """
    both = co_occurrence(marks)
    alone = pd.Series(np.diag(both), index=both.index, dtype=float).replace(0, np.nan)
    ratio = both * len(marks) / np.outer(alone, alone)
    return ratio.mask(np.eye(len(both), dtype=bool))


def binary_effects(
    marks: pd.DataFrame, exposed: pd.Series, draws: Draws, factor: str, strata: pd.Series | None = None
) -> pd.DataFrame:
    """Odds ratio and Cramér's V of each finding with a two-valued factor, the intervals resampled by patient.

    With `strata` the odds ratio is that of Mantel and Haenszel (J Natl Cancer Inst 1959), the common one within the
    strata. The p-value is a Wald test of the log odds ratio with the bootstrap's standard error.

    Args:
        marks: (images, findings) bool.
        exposed: True or False for each image; empty values leave the image out.
        draws: over the same images.
        factor: name of the comparison, for the table.
        strata: a group for each image; empty values leave the image out.

    Returns:
        One row per finding: `factor`, `finding`, `images` and `patients` with it, `rate` (share among the exposed),
        `rate_other`, `odds_ratio` with `odds_low` and `odds_high`, `effect` (Cramér's V, 0 to 1; of the pooled table)
        with `effect_low` and `effect_high`, and `p`; empty for a finding too rare for an estimate.
    """
    known = exposed.notna().to_numpy()
    group = np.zeros(len(marks), dtype=int)
    if strata is not None:
        group, _ = pd.factorize(strata)
        known = known & (group >= 0)
    groups = max(group.max(initial=0), 0) + 1
    cells = 2 * group + exposed.where(exposed.notna(), False).to_numpy(dtype=bool)
    shape = (-1, groups, 2)
    everyone = _counts(draws, cells, known, 2 * groups).reshape(shape)
    rows = []
    for finding in marks.columns:
        where = known & marks[finding].to_numpy()
        with_it = _counts(draws, cells, where, 2 * groups).reshape(shape)
        row = _row(factor, finding, where, draws)
        ratio = _odds_ratio(with_it, everyone)
        with np.errstate(divide="ignore", invalid="ignore"):
            p = bootstrap.p_value(np.log(ratio))
        if row["patients"] >= FEWEST_PATIENTS and not np.isnan(p):
            other, rate = with_it[0].sum(axis=0) / everyone[0].sum(axis=0)
            # V has no sign: an interval of the signed coefficient that includes 0 starts, for V, at 0.
            phi = _phi(with_it.sum(axis=1), everyone.sum(axis=1))
            ends = bootstrap.interval(phi)[:2]
            low, high = sorted(map(abs, ends))
            row |= {"rate": rate, "rate_other": other, **_estimate(ratio, "odds_ratio", "odds"), "p": p}
            row |= {"effect": abs(phi[0]), "effect_low": low if ends[0] * ends[1] > 0 else 0.0, "effect_high": high}
        rows.append(row)
    odds = ["rate", "rate_other", "odds_ratio", "odds_low", "odds_high"]
    return pd.DataFrame(rows, columns=[*_COUNTED, *odds, *_EFFECT])


def ordinal_effects(marks: pd.DataFrame, values: pd.Series, draws: Draws, factor: str) -> pd.DataFrame:
    """Rank-biserial correlation of each finding with whole numbers such as age, the intervals resampled by patient.

    It is the chance that an image with the finding has the larger value, less the chance that it has the smaller one:
    2·AUROC - 1 of the value as a score, ties counted half.

    Args:
        marks: (images, findings) bool.
        values: whole numbers from 0; empty values leave the image out.
        draws: over the same images.
        factor: name of the comparison, for the table.

    Returns:
        One row per finding: `factor`, `finding`, `images`, `patients`, `median` (of the value with the finding),
        `median_other`, `effect` (rank-biserial, -1 to 1) with `effect_low` and `effect_high`, and `p`.
    """
    known = values.notna().to_numpy()
    cells = values.fillna(0).to_numpy(dtype=int)
    size = int(cells.max(initial=0)) + 1
    everyone = _counts(draws, cells, known, size)
    rows = []
    for finding in marks.columns:
        mark = marks[finding].to_numpy()
        where = known & mark
        row = _row(factor, finding, where, draws)
        if row["patients"] >= FEWEST_PATIENTS and (known & ~mark).any():
            with_it = _counts(draws, cells, where, size)
            correlation = _rank_biserial(with_it, everyone - with_it)
            row |= {"median": np.median(cells[where]), "median_other": np.median(cells[known & ~mark])}
            row |= {**_estimate(correlation, "effect", "effect"), "p": bootstrap.p_value(correlation)}
        rows.append(row)
    return pd.DataFrame(rows, columns=[*_COUNTED, "median", "median_other", *_EFFECT])


def association(labels: pd.Series, factor: pd.Series, draws: Draws) -> tuple[float, float, float]:
    """Cramér's V of the class with a factor of any number of values, and its 95 % interval by patients, low and high.

    V is never negative, so its interval cannot hold 0: read it as a size, not as a test.

    Args:
        labels: class of each image; empty values leave the image out.
        factor: value of each image; empty values leave the image out.
        draws: over the same images.
    """
    rows, columns = pd.factorize(labels), pd.factorize(factor)
    known = (rows[0] >= 0) & (columns[0] >= 0)
    shape = (len(rows[1]), len(columns[1]))
    if min(shape) < 2:
        return (np.nan,) * 3
    tables = _counts(draws, rows[0] * shape[1] + columns[0], known, shape[0] * shape[1]).reshape(-1, *shape)
    total = tables.sum(axis=(1, 2), keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = tables.sum(axis=1, keepdims=True) * tables.sum(axis=2, keepdims=True) / total
        squared = np.nansum((tables - expected) ** 2 / expected, axis=(1, 2)) / total[:, 0, 0]
    values = np.sqrt(squared / (min(shape) - 1))
    return float(values[0]), *bootstrap.interval(values)[:2]


def correct(effects: pd.DataFrame) -> pd.DataFrame:
    """Correct `p` of all rows, one family: `p_holm` (`bootstrap.holm`) and `p_bh`, empty where `p` is.

    `p_bh` bounds the share of false claims among those made (Benjamini and Hochberg, J R Stat Soc B 1995).
    """
    tested = effects["p"].dropna()
    found = pd.Series(stats.false_discovery_control(tested), index=tested.index) if len(tested) else tested
    return effects.assign(p_holm=bootstrap.holm(effects["p"]), p_bh=found.reindex(effects.index))


def predictability(
    features: pd.DataFrame, target: pd.Series, groups: pd.Series, seed: int, folds: int = 5
) -> pd.Series:
    """How well a few plain numbers predict a class, cross-validated by group.

    AUROC of each class against the rest, by extremely randomised trees; .5 means that the numbers predict nothing.

    Args:
        features: numbers of each row; empty values are allowed.
        target: class of each row, two or more.
        groups: rows of one group (patient, source image) stay in one fold.
        seed: seeds folds and trees.
        folds: cross-validation folds.

    Returns:
        The AUROC of each class; empty where there is one class, or one of fewer groups than folds.
    """
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    names = sorted(target.unique())
    if len(names) < 2 or groups.groupby(target).nunique().min() < folds:
        return pd.Series(np.nan, index=names)
    trees = ExtraTreesClassifier(60, max_depth=8, min_samples_leaf=10, random_state=seed)
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    numbers = features.astype(float)
    scores = cross_val_predict(trees, numbers, target, groups=groups, cv=parts, method="predict_proba")
    return pd.Series({name: roc_auc_score(target == name, scores[:, k]) for k, name in enumerate(names)})


def pixel_summary(stack: np.ndarray) -> pd.DataFrame:
    """Describe each radiograph of an (N, H, W) uint8 stack in plain numbers, one row each.

    `mean` and `spread` (standard deviation) of the grey levels, `black` and `white` (share of pixels at 0 and at 255),
    `border` (mean of the outermost twentieth of the side) and `border_black` (share of it at 0).
    """
    flat = stack.reshape(len(stack), -1)
    width = max(1, round(stack.shape[1] / 20))
    frame = np.ones(stack.shape[1:], dtype=bool)
    frame[width:-width, width:-width] = False
    edge = stack[:, frame]
    return pd.DataFrame(
        {
            "mean": flat.mean(axis=1),
            "spread": flat.std(axis=1, dtype=np.float32).astype(np.float64),
            "black": (flat == 0).mean(axis=1),
            "white": (flat == 255).mean(axis=1),
            "border": edge.mean(axis=1),
            "border_black": (edge == 0).mean(axis=1),
        }
    )


def _counts(draws: Draws, cells: np.ndarray, where: np.ndarray, size: int) -> np.ndarray:
    """(1 + draws, size) images in each cell, of those `where` is true."""
    return draws.within(where).counts(cells[where], size)


def _row(factor: str, finding: str, where: np.ndarray, draws: Draws) -> dict[str, object]:
    """The images that show a finding, and their patients."""
    patients = len(np.unique(draws.codes[where]))
    return {"factor": factor, "finding": finding, "images": int(where.sum()), "patients": patients}


def _estimate(values: np.ndarray, name: str, ends: str) -> dict[str, float]:
    low, high, _ = bootstrap.interval(values)
    return {name: float(values[0]), f"{ends}_low": low, f"{ends}_high": high}


def _odds_ratio(with_it: np.ndarray, everyone: np.ndarray) -> np.ndarray:
    """Mantel–Haenszel odds ratio of (draws, strata, 2) counts; with one stratum the plain odds ratio."""
    without = everyone - with_it
    total = np.maximum(everyone.sum(axis=2), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        agree = (with_it[..., 1] * without[..., 0] / total).sum(axis=1)
        return agree / (with_it[..., 0] * without[..., 1] / total).sum(axis=1)


def _phi(with_it: np.ndarray, everyone: np.ndarray) -> np.ndarray:
    """Signed correlation of two two-valued variables from (draws, 2) counts."""
    without = everyone - with_it
    sides = with_it.sum(axis=1) * without.sum(axis=1) * everyone[:, 0] * everyone[:, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return (with_it[:, 1] * without[:, 0] - with_it[:, 0] * without[:, 1]) / np.sqrt(sides)


def _rank_biserial(with_it: np.ndarray, without: np.ndarray) -> np.ndarray:
    """Chance of larger less chance of smaller, from (draws, values) histograms."""
    below = np.cumsum(without, axis=1) - without
    above = without.sum(axis=1, keepdims=True) - below - without
    with np.errstate(divide="ignore", invalid="ignore"):
        return (with_it * (below - above)).sum(axis=1) / (with_it.sum(axis=1) * without.sum(axis=1))

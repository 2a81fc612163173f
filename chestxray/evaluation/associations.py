"""Who and what is in the data: findings, how they go together, and what age, sex, view and grey levels tell of them.

It owns the exploratory statistics: counts, co-occurrence, effect sizes, and the question of what can be told without
looking at a lung. It takes tables with the manifest's columns and arrays of grey levels; it must not know files,
figures, splits or models. They are here, not in a notebook, because each needs a test against an independent source,
and because an interval that forgets that a patient has many images is the commonest error in the field.

Every interval resamples patients: one bootstrap draw takes as many patients as there are, with replacement, and all the
images of each. The draws of one `Resample` serve all statistics, so each of them is one sparse product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse, stats

from chestxray.config import NIH_FINDINGS

FEWEST_PATIENTS = 10
"""A finding in fewer patients than this gets no estimate: its interval would be fiction."""


_COUNTED = ["factor", "finding", "images", "patients"]
_EFFECT = ["effect", "effect_low", "effect_high", "p"]


@dataclass(frozen=True)
class Resample:
    """Bootstrap draws of patients.

    Attributes:
        codes: (images,) number of each image's patient.
        times: (draws + 1, patients) float32, how often each draw takes each patient; the first row takes each once, so
            that the first entry of every statistic is its estimate and the rest its bootstrap distribution.
    """

    codes: np.ndarray
    times: np.ndarray

    @classmethod
    def of(cls, patients: pd.Series, draws: int, seed: int) -> Resample:
        """Draw from the patients of a table.

        Args:
            patients: the patient of each image.
            draws: bootstrap draws.
            seed: seeds them.
        """
        codes, names = pd.factorize(patients)
        rng = np.random.default_rng(seed)
        times = np.ones((draws + 1, len(names)), dtype=np.float32)
        for row in times[1:]:
            row[:] = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
        return cls(codes, times)

    def count(self, cells: np.ndarray, size: int, where: np.ndarray) -> np.ndarray:
        """Count images by cell in every draw.

        Args:
            cells: (images,) integers from 0 to size - 1; ignored where `where` is false.
            size: number of cells.
            where: (images,) bool, which images count.

        Returns:
            (draws + 1, size) float64.
        """
        shape = (self.times.shape[1], size)
        counts = sparse.csr_array((np.ones(where.sum(), np.float32), (self.codes[where], cells[where])), shape=shape)
        return np.asarray((counts.T @ self.times.T).T, dtype=np.float64)

    def patients(self, where: np.ndarray) -> int:
        """Return how many patients the images `where` belong to."""
        return len(np.unique(self.codes[where]))


def findings_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return which image shows which finding: (images, 14) bool, columns in the order of NIH_FINDINGS.

    Args:
        table: the column `findings`, names joined by |.
    """
    names = table["findings"].fillna("").str.get_dummies("|").astype(bool)
    return names.reindex(columns=list(NIH_FINDINGS), fill_value=False)


def co_occurrence(marks: pd.DataFrame) -> pd.DataFrame:
    """Count images that show both findings; the diagonal holds those that show the one.

    Args:
        marks: as `findings_of` returns it.
    """
    whole = marks.astype(int)
    return whole.T @ whole


def lift(marks: pd.DataFrame) -> pd.DataFrame:
    """How many times as often two findings go together as they would if they knew nothing of each other.

    Args:
        marks: as `findings_of` returns it.

    Returns:
        Observed over expected images of each pair; 1 is chance; empty on the diagonal and for findings never seen.
    """
    both = co_occurrence(marks)
    alone = pd.Series(np.diag(both), index=both.index, dtype=float).replace(0, np.nan)
    ratio = both * len(marks) / np.outer(alone, alone)
    return ratio.mask(np.eye(len(both), dtype=bool))


def binary_effects(
    marks: pd.DataFrame,
    exposed: pd.Series,
    resample: Resample,
    factor: str,
    strata: pd.Series | None = None,
) -> pd.DataFrame:
    """Odds ratio and Cramér's V of each finding with a two-valued factor, the intervals resampled by patient.

    With `strata` the odds ratio is that of Mantel and Haenszel (J Natl Cancer Inst 1959): the common one within the
    strata, free of what they explain. The p-value is a Wald test of the log odds ratio with the bootstrap's standard
    error, which holds the correlation of a patient's images.

    Args:
        marks: (images, findings) bool.
        exposed: True or False for each image; empty values leave the image out.
        resample: draws over the same images.
        factor: name of the comparison, for the table.
        strata: a group for each image; empty values leave the image out.

    Returns:
        One row a finding: `factor`, `finding`, `images` (that show it), `patients`, `rate` (share among the exposed),
        `rate_other`, `odds_ratio` with `odds_low` and `odds_high`, `effect` (Cramér's V, 0 to 1; of the pooled table)
        with `effect_low` and `effect_high`, and `p`. No estimate for a finding in fewer than FEWEST_PATIENTS patients,
        or so rare that draws leave a cell of its table empty.
    """
    known = exposed.notna().to_numpy()
    group = np.zeros(len(marks), dtype=int)
    if strata is not None:
        group, _ = pd.factorize(strata)
        known = known & (group >= 0)
    size = 2 * (group.max() + 1)
    cells = 2 * group + exposed.where(exposed.notna(), False).to_numpy(dtype=bool)
    everyone = resample.count(cells, size, known).reshape(-1, size // 2, 2)
    rows = []
    for finding in marks.columns:
        where = known & marks[finding].to_numpy()
        with_it = resample.count(cells, size, where).reshape(everyone.shape)
        row = {"factor": factor, "finding": finding, "images": int(where.sum()), "patients": resample.patients(where)}
        total, seen = everyone[0].sum(axis=0), with_it[0].sum(axis=0)
        ratio = _odds_ratio(with_it, everyone)
        with np.errstate(divide="ignore", invalid="ignore"):
            p = _wald(np.log(ratio))
        if row["patients"] >= FEWEST_PATIENTS and not np.isnan(p):
            phi = _phi(with_it.sum(axis=1), everyone.sum(axis=1))
            low, high = _interval(phi)
            row |= {"rate": seen[1] / total[1], "rate_other": seen[0] / total[0], "odds_ratio": ratio[0]}
            row |= dict(zip(("odds_low", "odds_high"), _interval(ratio), strict=True))
            # V has no sign: an interval of the signed coefficient that holds 0 starts, for V, at 0.
            ends = (0.0 if low <= 0 <= high else min(abs(low), abs(high)), max(abs(low), abs(high)))
            row |= {"effect": abs(phi[0]), "effect_low": ends[0], "effect_high": ends[1], "p": p}
        rows.append(row)
    return pd.DataFrame(
        rows, columns=[*_COUNTED, "rate", "rate_other", "odds_ratio", "odds_low", "odds_high", *_EFFECT]
    )


def ordinal_effects(marks: pd.DataFrame, values: pd.Series, resample: Resample, factor: str) -> pd.DataFrame:
    """Rank-biserial correlation of each finding with whole numbers such as age, the intervals resampled by patient.

    It is the chance that an image with the finding has the larger value, less the chance that it has the smaller one:
    2·AUROC - 1 of the value as a score, ties counted half.

    Args:
        marks: (images, findings) bool.
        values: whole numbers from 0; empty values leave the image out.
        resample: draws over the same images.
        factor: name of the comparison, for the table.

    Returns:
        One row a finding: `factor`, `finding`, `images`, `patients`, `median` (of the value with the finding),
        `median_other`, `effect` (rank-biserial, -1 to 1) with `effect_low` and `effect_high`, and `p`.
    """
    known = values.notna().to_numpy()
    cells = values.fillna(0).to_numpy(dtype=int)
    size = int(cells.max(initial=0)) + 1
    everyone = resample.count(cells, size, known)
    rows = []
    for finding in marks.columns:
        mark = marks[finding].to_numpy()
        where = known & mark
        row = {"factor": factor, "finding": finding, "images": int(where.sum()), "patients": resample.patients(where)}
        if row["patients"] >= FEWEST_PATIENTS and (known & ~mark).any():
            with_it = resample.count(cells, size, where)
            correlation = _rank_biserial(with_it, everyone - with_it)
            row |= {"median": np.median(cells[where]), "median_other": np.median(cells[known & ~mark])}
            row |= {"effect": correlation[0], "p": _wald(correlation)}
            row |= dict(zip(("effect_low", "effect_high"), _interval(correlation), strict=True))
        rows.append(row)
    return pd.DataFrame(rows, columns=[*_COUNTED, "median", "median_other", *_EFFECT])


def association(labels: pd.Series, factor: pd.Series, resample: Resample) -> tuple[float, float, float]:
    """Cramér's V of the class with a factor of any number of values, and its 95 % interval by patients.

    Args:
        labels: class of each image; empty values leave the image out.
        factor: value of each image; empty values leave the image out.
        resample: draws over the same images.

    Returns:
        Estimate, low, high. V is never negative, so its interval cannot hold 0: read it as a size, not as a test.
    """
    rows, columns = pd.factorize(labels), pd.factorize(factor)
    known = (rows[0] >= 0) & (columns[0] >= 0)
    shape = (len(rows[1]), len(columns[1]))
    tables = resample.count(rows[0] * shape[1] + columns[0], shape[0] * shape[1], known).reshape(-1, *shape)
    total = tables.sum(axis=(1, 2), keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = tables.sum(axis=1, keepdims=True) * tables.sum(axis=2, keepdims=True) / total
        squared = np.nansum((tables - expected) ** 2 / expected, axis=(1, 2)) / total[:, 0, 0]
    values = np.sqrt(squared / (min(shape) - 1))
    return float(values[0]), *_interval(values)


def correct(effects: pd.DataFrame) -> pd.DataFrame:
    """Correct `p` for having asked many questions at once; the rows given are the family.

    Args:
        effects: rows of `binary_effects` and `ordinal_effects` put together.

    Returns:
        The same with `p_holm` (Holm, Scand J Stat 1979: the chance of one false claim among all) and `p_bh` (Benjamini
        and Hochberg, J R Stat Soc B 1995: the share of false claims among those made). Rows without p stay empty.
    """
    asked = effects["p"].dropna()
    order = asked.sort_values()
    steps = order * np.arange(len(order), 0, -1)
    holm = steps.cummax().clip(upper=1)
    found = pd.Series(stats.false_discovery_control(asked), index=asked.index) if len(asked) else asked
    return effects.assign(p_holm=holm.reindex(effects.index), p_bh=found.reindex(effects.index))


def told_by(features: pd.DataFrame, target: pd.Series, groups: pd.Series, seed: int, folds: int = 5) -> pd.Series:
    """How well a few plain numbers tell a class, on rows of groups that were not learned from.

    Args:
        features: numbers of each row; empty values are allowed.
        target: class of each row, two or more.
        groups: rows of one group (patient, source image) stay in one fold.
        seed: seeds folds and trees.
        folds: cross-validation folds.

    Returns:
        AUROC of each class against the rest, by extremely randomised trees; .5 means that the numbers tell nothing.
    """
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    names = sorted(target.unique())
    trees = ExtraTreesClassifier(60, max_depth=8, min_samples_leaf=10, random_state=seed)
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    numbers = features.astype(float)
    told = cross_val_predict(trees, numbers, target, groups=groups, cv=parts, method="predict_proba")
    return pd.Series({name: roc_auc_score(target == name, told[:, place]) for place, name in enumerate(names)})


def pixel_summary(stack: np.ndarray) -> pd.DataFrame:
    """Describe each radiograph in plain numbers.

    Args:
        stack: (N, H, W) uint8.

    Returns:
        N rows: `mean` and `spread` (standard deviation) of the grey levels, `black` and `white` (share of pixels at 0
        and at 255), `border` (mean of the outermost twentieth of the side) and `border_black` (share of it at 0).
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


def _interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the draws after the first entry, which is the estimate."""
    drawn = values[1:][~np.isnan(values[1:])]
    if not len(drawn):
        return np.nan, np.nan
    low, high = np.quantile(drawn, (0.025, 0.975), method="nearest")
    return float(low), float(high)


def _wald(values: np.ndarray) -> float:
    """Two-sided p of the estimate against 0; NaN where more than 1 in 100 draws has no finite value."""
    drawn = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or len(drawn) < 0.99 * (len(values) - 1) or drawn.std() == 0:
        return np.nan
    return float(2 * stats.norm.sf(abs(values[0]) / drawn.std(ddof=1)))

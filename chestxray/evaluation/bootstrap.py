"""Bootstrap: resampled patients, their intervals and p-values, and Holm's correction.

Patients are resampled, not images: images of one patient resemble each other, and counting them as independent makes
intervals too narrow. A draw is a weight for each patient, how often it takes that patient, so that a statistic is
computed for all draws at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse, stats


@dataclass(frozen=True)
class Draws:
    """Draws of patients for a set of images.

    Attributes:
        codes: (n,) int, each image's patient, a row of `weights`.
        weights: (patients, 1 + draws) float, how often each draw takes each patient. Column 0 is all ones, the data
            themselves, so that estimate and draws come from the same arithmetic.
    """

    codes: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, patients: pd.Series | np.ndarray, draws: int, seed: int) -> Draws:
        """Draw as many patients as there are, with replacement, `draws` times.

        Args:
            patients: (n,) each image's patient; their order doesn't matter.
            draws: how many times.
            seed: the same patients and seed give the same draws.
        """
        codes, names = pd.factorize(np.asarray(patients).astype(str), sort=True)
        number = len(names)
        rng = np.random.default_rng(seed)
        weights = np.ones((number, 1 + draws))
        for draw in weights.T[1:]:
            draw[:] = np.bincount(rng.integers(number, size=number), minlength=number)
        return cls(codes, weights)

    def within(self, images: np.ndarray) -> Draws:
        """The same draws for a subset of the images, (n,) bool or positions."""
        return Draws(self.codes[images], self.weights)

    def totals(self, values: np.ndarray) -> np.ndarray:
        """Sum of the images' values, (n,) or (n, K), in every draw: (1 + draws,) or (1 + draws, K), estimate first."""
        values = np.asarray(values, dtype=float)
        flat = values.reshape(len(values), -1)
        number = len(self.weights)
        each = np.stack([np.bincount(self.codes, column, number) for column in flat.T], axis=1)
        return (self.weights.T @ each).reshape(-1, *values.shape[1:])

    def counts(self, cells: np.ndarray, size: int) -> np.ndarray:
        """Images in each cell of a table in every draw, (1 + draws, size); quick where there are many cells.

        Args:
            cells: (n,) int, the cell of each image, 0 to size - 1.
            size: cells of the table.
        """
        each = sparse.csr_array((np.ones(len(cells)), (self.codes, cells)), shape=(len(self.weights), size))
        return (each.T @ self.weights).T

    def means(self, values: np.ndarray, of: np.ndarray | None = None) -> np.ndarray:
        """Mean of the images' values in every draw, (1 + draws,) or (1 + draws, K), NaN where a draw has no such image.

        Args:
            values: (n,) or (n, K).
            of: (n,) or (n, K) bool, the images that count; all if None.
        """
        values = np.asarray(values, dtype=float)
        of = np.ones(len(values), dtype=bool) if of is None else np.asarray(of, dtype=bool)
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.totals(np.where(of, values, 0)) / self.totals(of)


def interval(values: np.ndarray, basic: bool = False) -> tuple[float, float, int]:
    """The 95 % interval of a statistic: the middle of its draws.

    Args:
        values: (1 + draws,), the estimate first; draws in which the statistic is undefined are NaN and left out.
        basic: the basic interval (Davison & Hinkley 1997, 5.2), percentiles reflected about the estimate. For a
            statistic that is biased upwards, such as a calibration error, draws are biased a second time, and plain
            percentiles would lie above the truth.

    Returns:
        Low, high (NaN where nothing is defined), and how many draws are defined.
    """
    drawn = values[1:][np.isfinite(values[1:])]
    if not len(drawn) or not np.isfinite(values[0]):
        return np.nan, np.nan, len(drawn)
    low, high = np.percentile(drawn, [2.5, 97.5])
    if basic:
        low, high = 2 * values[0] - high, 2 * values[0] - low
    return float(low), float(high), len(drawn)


def entry(values: np.ndarray, basic: bool = False) -> dict[str, float]:
    """A row of a results table: `estimate`, `low`, `high`, `draws`.

    Args:
        values: (1 + draws,), the estimate first.
        basic: as for `interval`.
    """
    low, high, defined = interval(values, basic)
    return {"estimate": float(values[0]), "low": low, "high": high, "draws": defined}


def p_value(values: np.ndarray) -> float:
    """Two-sided p of the estimate against 0, from (1 + draws,) values: a Wald test with the draws' standard deviation.

    NaN where more than 1 draw in 100 is undefined; 1 where estimate and draws are all 0.
    """
    drawn = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or len(drawn) < max(2, 0.99 * (len(values) - 1)):
        return np.nan
    error = drawn.std(ddof=1)
    if error == 0:
        return 1.0 if values[0] == 0 else 0.0
    return float(2 * stats.norm.sf(abs(values[0]) / error))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction of the (n,) p-values of one family of tests, NaN where nothing was tested (Scand J Stat 1979).

    Rejecting what is below .05 after it makes one false claim or more in at most 5 of 100 such families.
    """
    p = np.asarray(p, dtype=float)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return corrected


def table(rows: Mapping[tuple, Mapping[str, object]], names: Sequence[str]) -> pd.DataFrame:
    """A results table of rows such as `entry` makes.

    Args:
        rows: the columns of each row, by its place in the index.
        names: of the index's levels.
    """
    found = pd.DataFrame.from_dict(rows, orient="index")
    found.index = pd.MultiIndex.from_tuples(rows, names=names)
    return found

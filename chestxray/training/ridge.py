"""Linear heads in closed form: what a frozen backbone's features say, without epochs.

This module owns the penalised regression from pooled features to logits. It knows arrays and nothing of networks or
files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.special
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from chestxray.config import StudyError
from chestxray.training.samples import class_weights


class Head(NamedTuple):
    """The weights of a dense layer that gives logits: kernel (C, K) and bias (K,), float32."""

    kernel: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """(N, C) features to (N, K) logits."""
        return features @ self.kernel + self.bias


def fit(features: np.ndarray, y: np.ndarray, penalty: float, balanced: bool = False) -> Head:
    """Fit a head by ridge regression on standardised features (Hoerl & Kennard, Technometrics 12, 1970).

    Many features that go together and few samples make a head fitted in small steps depend on when it was stopped. The
    regression gives shares; a share's distance from the usual one, divided by the usual variance, is one Newton step
    from the usual log-odds towards those of a logistic regression.

    Args:
        features: (N, C) pooled features.
        y: (N, K) targets, 0 to 1.
        penalty: weight of the squared coefficients, in samples: as many as this would be needed to believe a feature
            half as much as the data do, if features were independent. Above 0.
        balanced: let the classes weigh the same; targets are one-hot.

    Returns:
        The head for features as they are given. A target that nobody or everybody has keeps its usual log-odds, of half
        a sample short of that.

    Raises:
        StudyError: a feature is not finite.
    """
    if not np.isfinite(features).all():
        raise StudyError(
            f"{np.mean(~np.isfinite(features)):.1%} of the features are not finite: activations overflow; "
            "set mixed_precision to False, or take BatchNorm's statistics from more radiographs"
        )
    weights = class_weights(y)[y.argmax(axis=1)].astype("float64") if balanced else np.ones(len(y))
    usual = np.average(y, axis=0, weights=weights)
    usual = usual.clip(0.5 / len(y), 1 - 0.5 / len(y))
    scaler = StandardScaler().fit(features)
    ridge = Ridge(alpha=penalty, solver="cholesky").fit(scaler.transform(features), y, sample_weight=weights)
    steps = np.atleast_2d(ridge.coef_) / (usual * (1 - usual))[:, None]
    kernel = (steps / scaler.scale_).T
    centre = np.average(features, axis=0, weights=weights)
    return Head(kernel.astype("float32"), (np.log(usual / (1 - usual)) - centre @ kernel).astype("float32"))


def folds(groups: np.ndarray, most: int = 4) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions to fit on and positions to speak for, fold by fold; no group is in both.

    Args:
        groups: (N,) the patient of each sample.
        most: how many folds, or as many as there are groups.
    """
    return GroupKFold(min(most, len(np.unique(groups)))).split(groups, groups=groups)


def out_of_fold(features: np.ndarray, y: np.ndarray, penalty: float, groups: np.ndarray, most: int = 4) -> np.ndarray:
    """What heads that were fitted on other groups say of each sample.

    Args:
        features: (N, C) pooled features.
        y: (N, K) targets, 0 to 1.
        penalty: as in `fit`.
        groups: (N,) the patient of each sample; all of one patient are in one fold.
        most: how many heads share the samples, as in `folds`.

    Returns:
        (N, K) probabilities, float32.
    """
    told = np.zeros(y.shape, "float32")
    for fitted, judged in folds(groups, most):
        told[judged] = scipy.special.expit(fit(features[fitted], y[fitted], penalty).logits(features[judged]))
    return told

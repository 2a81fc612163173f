"""Ridge regression: linear heads on pooled features, in closed form.

It fits heads of a frozen backbone without epochs, and predicts out of fold. It knows arrays, not networks or files.
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

    With many correlated features and few samples, a head fitted by gradient descent depends on when it was stopped. The
    regression gives shares; a share's distance from the overall one, divided by the overall variance, is one Newton
    step from the overall log-odds towards those of a logistic regression.

    Args:
        features: (N, C) pooled features.
        y: (N, K) targets, 0 to 1.
        penalty: weight of the squared coefficients, in samples: with so many samples a coefficient of independent
            features is half of the unpenalised one. Above 0.
        balanced: give the classes equal weight; targets are one-hot.

    Returns:
        The head for features as they are given. A target that no sample or every sample has gets constant log-odds, as
        if half a sample differed.

    Raises:
        StudyError: a feature is not finite.
    """
    if not np.isfinite(features).all():
        raise StudyError(
            f"{np.mean(~np.isfinite(features)):.1%} of the features are not finite: activations overflow; "
            "set mixed_precision to False, or take BatchNorm's statistics from more radiographs"
        )
    weights = class_weights(y)[y.argmax(axis=1)].astype("float64") if balanced else np.ones(len(y))
    overall = np.average(y, axis=0, weights=weights)
    overall = overall.clip(0.5 / len(y), 1 - 0.5 / len(y))
    scaler = StandardScaler().fit(features)
    ridge = Ridge(alpha=penalty, solver="cholesky").fit(scaler.transform(features), y, sample_weight=weights)
    steps = np.atleast_2d(ridge.coef_) / (overall * (1 - overall))[:, None]
    kernel = (steps / scaler.scale_).T
    centre = np.average(features, axis=0, weights=weights)
    return Head(kernel.astype("float32"), (np.log(overall / (1 - overall)) - centre @ kernel).astype("float32"))


def folds(groups: np.ndarray, max_folds: int = 4) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions to fit on and positions to predict, fold by fold; no group is in both.

    Args:
        groups: (N,) the patient of each sample.
        max_folds: the number of folds; as many as there are groups where these are fewer.
    """
    return GroupKFold(min(max_folds, len(np.unique(groups)))).split(groups, groups=groups)


def out_of_fold(
    features: np.ndarray, y: np.ndarray, penalty: float, groups: np.ndarray, max_folds: int = 4
) -> np.ndarray:
    """Out-of-fold predictions: each sample's by a head that was fitted on other groups.

    Args:
        features: (N, C) pooled features.
        y: (N, K) targets, 0 to 1.
        penalty: as in `fit`.
        groups: (N,) the patient of each sample; all of one patient are in one fold.
        max_folds: the number of folds, as in `folds`.

    Returns:
        (N, K) probabilities, float32.
    """
    probabilities = np.zeros(y.shape, "float32")
    for fitted, predicted in folds(groups, max_folds):
        logits = fit(features[fitted], y[fitted], penalty).logits(features[predicted])
        probabilities[predicted] = scipy.special.expit(logits)
    return probabilities

"""Linear heads in closed form, against equations solved another way."""

import numpy as np
import pytest
import scipy.special
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from chestxray.config import StudyError
from chestxray.training import ridge


def drawn(count=400, width=6, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(3, [1, 2, 0.1, 5, 1, 1], (count, width))
    score = (features - 3) / [1, 2, 0.1, 5, 1, 1] @ np.array([1.0, -1, 0.5, 0, 0, 2])
    y = np.column_stack([score + rng.logistic(size=count) > 1, rng.random(count) < 0.3]).astype("float32")
    return features.astype("float32"), y


def test_it_is_one_newton_step_of_the_penalised_regression():
    features, y = drawn()
    head = ridge.fit(features, y, penalty=50)
    z = (features - features.mean(axis=0)) / features.std(axis=0)
    # Least squares of the samples and, below them, one row a coefficient that pulls it to 0.
    stacked = np.vstack([z, np.sqrt(50) * np.eye(6)])
    overall = y.mean(axis=0)
    solved = np.linalg.lstsq(stacked, np.vstack([y - overall, np.zeros((6, 2))]), rcond=None)[0]
    expected = scipy.special.logit(overall) + z @ solved / (overall * (1 - overall))
    assert np.allclose(head.logits(features), expected, atol=1e-4)


def test_it_ranks_like_a_logistic_regression():
    features, y = drawn(2000)
    head, logistic = ridge.fit(features, y, penalty=20), LogisticRegression(max_iter=1000)
    logistic.fit((features - 3) / features.std(axis=0), y[:, 0])
    ours = roc_auc_score(y[:, 0], head.logits(features)[:, 0])
    theirs = roc_auc_score(y[:, 0], logistic.decision_function((features - 3) / features.std(axis=0)))
    assert abs(ours - theirs) < 0.005 and ours > 0.85


def test_balanced_classes_weigh_the_same():
    features, _ = drawn(300)
    y = np.zeros((300, 2), "float32")
    y[:100, 0], y[100:, 1] = 1, 1
    features[:100] += 0.5
    overall = ridge.fit(features, y, 30, balanced=True).logits(features.mean(axis=0))
    assert abs(overall[0] + overall[1]) < 1e-4  # two classes that weigh the same: what one gains the other loses
    centres = ridge.fit(features, y, 1e12, balanced=True).bias
    assert np.allclose(scipy.special.expit(centres), 0.5, atol=1e-4)


def test_a_label_that_no_sample_has_stays_improbable():
    features, y = drawn()
    y[:, 1] = 0
    logits = ridge.fit(features, y, 50).logits(features)[:, 1]
    assert np.allclose(scipy.special.expit(logits), 0.5 / 400, atol=1e-5)


def test_out_of_fold_predictions_come_from_other_groups():
    features, y = drawn(300)
    groups = np.arange(300) // 3
    predicted = ridge.out_of_fold(features, y, 20, groups, max_folds=3)
    # The first group's predictions don't depend on its own targets.
    turned = y.copy()
    turned[groups == 0] = 1 - turned[groups == 0]
    assert np.array_equal(
        ridge.out_of_fold(features, turned, 20, groups, max_folds=3)[groups == 0], predicted[groups == 0]
    )
    assert predicted.min() > 0 and predicted.max() < 1
    inside = scipy.special.expit(ridge.fit(features, y, 20).logits(features))
    assert roc_auc_score(y[:, 0], predicted[:, 0]) <= roc_auc_score(y[:, 0], inside[:, 0])
    assert roc_auc_score(y[:, 0], predicted[:, 0]) > 0.8


def test_features_that_overflowed_are_reported():
    features, y = drawn()
    features[:4] = np.inf
    with pytest.raises(StudyError, match=r"^1\.0% of the features are not finite: .* mixed_precision to False"):
        ridge.fit(features, y, 20)

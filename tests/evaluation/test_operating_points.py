"""Thresholds and decision curves against scikit-learn and hand counts."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import precision_score, recall_score, roc_curve
from tables import predictions_table

from chestxray.config import SIX_FINDINGS, StudyError
from chestxray.evaluation import operating_points, predictions
from chestxray.evaluation.bootstrap import Draws


@pytest.mark.parametrize("decimals", [6, 1])
def test_threshold_is_the_highest_that_catches_enough(decimals):
    rng = np.random.default_rng(0)
    scores, truth = rng.random(200).round(decimals), rng.random(200) < 0.3
    for target in (0.5, 0.8, 0.9, 1.0):
        line = operating_points.threshold(scores, truth, target)
        _, true, lines = roc_curve(truth, scores, drop_intermediate=False)
        assert line == lines[np.flatnonzero(true >= target)[0]]
    with pytest.raises(StudyError, match=r"sensitivity 1\.2"):
        operating_points.threshold(scores, truth, 1.2)
    with pytest.raises(StudyError, match="no positive validation image"):
        operating_points.threshold(scores, truth & False)


def test_thresholds_of_validation_are_measured_on_test():
    valid, test = predictions_table(seed=1), predictions_table(seed=2)
    points = operating_points.choose(valid, 0.75)
    assert list(points.index) == list(SIX_FINDINGS)
    assert (points["sensitivity"] >= 0.75).all()
    found = operating_points.measure(test, points, draws=50)
    for name in SIX_FINDINGS:
        truth = predictions.shows(test, name)
        above = test[f"{name}_present"] >= points.loc[name, "threshold"]
        expected = {
            "sensitivity": recall_score(truth, above),
            "specificity": recall_score(~truth, ~above),
            "ppv": precision_score(truth, above),
            "npv": precision_score(~truth, ~above),
        }
        for metric, value in expected.items():
            entry = found.loc[(name, metric)]
            assert entry["estimate"] == pytest.approx(value)
            assert entry["low"] <= value <= entry["high"]
        assert found.loc[(name, "ppv"), "n_positive"] == truth.sum()
    every = found["estimate"].xs("specificity", level="metric")
    assert every["mean"] == pytest.approx(every.drop("mean").mean())


def test_a_slow_bootstrap_gives_the_same_interval():
    test = predictions_table(seed=2)
    points = operating_points.choose(predictions_table(seed=1))
    names = sorted(test["patient"].unique())
    by_patient = dict(iter(test.groupby("patient")))
    slow = []
    for draw in np.random.default_rng(4).integers(len(names), size=(20, len(names))):
        repeated = pd.concat([by_patient[names[patient]] for patient in draw])
        truth = predictions.shows(repeated, "Nodule")
        slow.append(recall_score(truth, repeated["Nodule_present"] >= points.loc["Nodule", "threshold"]))
    found = operating_points.measure(test, points, draws=20, seed=4).loc[("Nodule", "sensitivity")]
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(slow, [2.5, 97.5]))


def test_net_benefit_by_hand():
    scores = np.array([0.9, 0.6, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1])
    truth = np.array([True, False, True, *[False] * 7])
    found = operating_points.net_benefit(scores, truth, [0.25, 0.5], Draws.of(np.arange(10), 50, 0))
    # At 25 %: two caught, two false alarms at odds 1/3. At 50 %: one caught, one false alarm at odds 1.
    assert found["model"].tolist() == pytest.approx([0.2 - 0.2 / 3, 0.0])
    assert found["all"].tolist() == pytest.approx([0.2 - 0.8 / 3, 0.2 - 0.8])
    assert (found["low"] <= found["model"]).all() and (found["model"] <= found["high"]).all()


def test_decision_curves_start_at_acting_on_every_radiograph():
    test = predictions_table()
    curves = operating_points.decision_curves(test, [1e-6, 0.1], draws=10)
    assert list(curves["finding"].unique()) == list(SIX_FINDINGS)
    first = curves[curves["threshold"] == 1e-6]
    assert first["model"].to_numpy() == pytest.approx(first["all"].to_numpy(), abs=1e-5)

"""What scores mean: the study's own calibration and thresholds, found beside the model they belong to."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import tables

from chestxray import config
from chestxray.config import PRESENT, SIX_FINDINGS, StudyError
from chestxray.evaluation import calibration, operating_points, predictions
from chestxray.inference import interpretation


@pytest.fixture
def valid(tmp_path, monkeypatch) -> pd.DataFrame:
    """Predictions for validation, and a reference whose tables are fitted to them."""
    valid = tables.predictions_table(2000, 600, decimals=6)
    monkeypatch.setattr(config, "REFERENCE", tmp_path / "reference")
    config.REFERENCE.mkdir()
    calibration.fit(valid).to_csv(config.REFERENCE / "calibration_fit.csv")
    operating_points.choose(valid).to_csv(config.REFERENCE / "operating_points.csv")
    return valid


def test_probabilities_are_those_of_the_study(valid):
    meaning = interpretation.of_reference()
    expected = calibration.apply(valid, calibration.fit(valid))[list(PRESENT)].to_numpy()
    np.testing.assert_allclose(meaning.probabilities(valid[list(PRESENT)].to_numpy()), expected, atol=1e-12)
    # Calibrated on validation: there the mean probability is the share that shows the finding.
    shares = [predictions.shows(valid, name).mean() for name in SIX_FINDINGS]
    np.testing.assert_allclose(expected.mean(axis=0), shares, atol=0.005)
    assert meaning.calibrated


def test_probabilities_stay_within_0_and_1(valid):
    meaning = interpretation.of_reference()
    ends = meaning.probabilities(np.array([np.zeros(6), np.ones(6)]))
    assert np.isfinite(ends).all() and (ends >= 0).all() and (ends <= 1).all() and (ends[0] < ends[1]).all()


def test_operating_points_catch_on_validation_what_they_say(valid):
    meaning = interpretation.of_reference()
    assert tuple(meaning.points) == SIX_FINDINGS
    above = pd.DataFrame([meaning.above(row) for row in valid[list(PRESENT)].to_numpy()])
    calibrated = meaning.probabilities(valid[list(PRESENT)].to_numpy())
    for name, point in meaning.points.items():
        shows = predictions.shows(valid, name)
        assert above[name][shows].mean() == pytest.approx(point.sensitivity, abs=1e-6)
        assert (~above[name][~shows]).mean() == pytest.approx(point.specificity, abs=1e-6)
        assert (len(shows), shows.sum()) == (point.n_images, point.n_positive)
        line = calibrated[:, SIX_FINDINGS.index(name)] >= point.probability - 1e-9
        assert np.array_equal(line, above[name])


def test_a_model_is_calibrated_by_the_validation_predictions_beside_it(tmp_path, valid):
    valid.to_csv(tmp_path / "predictions_valid.csv", index=False)
    meaning = interpretation.of_model(tmp_path / "model.keras")
    scores = valid[list(PRESENT)].to_numpy()[:50]
    expected = calibration.apply(valid, calibration.fit(valid))[list(PRESENT)].to_numpy()[:50]
    np.testing.assert_allclose(meaning.probabilities(scores), expected, atol=1e-12)
    points = operating_points.choose(valid)
    assert {name: point.threshold for name, point in meaning.points.items()} == points["threshold"].to_dict()


def test_without_validation_scores_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "REFERENCE", tmp_path)
    for meaning in (interpretation.of_model(tmp_path / "model.keras"), interpretation.of_reference()):
        scores = np.linspace(0, 1, 6)
        assert np.array_equal(meaning.probabilities(scores), scores)
        assert (meaning.above(scores), meaning.calibrated) == ({}, False)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("pointing,.08,.06\ncentre_pointing,.07,.05\npointing_gain,.01,-.02", "in 8 %.*image's centre in 7 %"),
        ("pointing,.3,.2\ncentre_pointing,.07,.05\npointing_gain,.23,.0", "do not localise.*in 30 %"),
        ("pointing,.3,.2\ncentre_pointing,.07,.05\npointing_gain,.23,.1", "^$"),
        (
            "pointing,.2,.1\ncentre_pointing,.07,.05\nfixed_pointing,.235,.2\npointing_gain,.13,.1\nfixed_gain,-.03,-.05",
            "do not localise.*one fixed point for each finding in 24 %",
        ),
        ("pointing,.3,.2\ncentre_pointing,.07,.05\nfixed_pointing,,\npointing_gain,.23,.1\nfixed_gain,,", "^$"),
    ],
)
def test_heat_maps_are_said_not_to_localise_where_the_table_says_so(tmp_path, rows, words):
    table = tmp_path / "localisation.csv"
    assert interpretation.localisation_note(table) == interpretation.UNMEASURED
    lines = [f"{finding},{row}" for finding in ("Mass", "mean") for row in rows.split("\n")]
    lines[0] = "Mass,pointing,0,0"  # another finding's rows don't count
    table.write_text("\n".join(["finding,metric,estimate,low", *lines]))
    assert re.search(words, interpretation.localisation_note(table))
    table.write_text("finding,metric,estimate,low\nmean,pointing,high,low\n")
    with pytest.raises(StudyError, match=r"localisation.csv: cannot be read .* restore it"):
        interpretation.localisation_note(table)


@pytest.mark.parametrize(
    ("table", "before", "after", "words"),
    [
        ("calibration_fit.csv", "\nMass,", "\nMast,", "cannot be read .*Mass"),
        ("operating_points.csv", "threshold", "line", "cannot be read"),
        ("calibration_fit.csv", "temperature", "heat", "cannot be read"),
        ("calibration_fit.csv", "\nMass,", "\nMass,-", "cannot be read .*temperature that is not above 0"),
    ],
)
def test_damaged_tables_are_named(valid, table, before, after, words):
    text = (config.REFERENCE / table).read_text()
    assert before in text
    (config.REFERENCE / table).write_text(text.replace(before, after))
    with pytest.raises(StudyError, match=words) as error:
        interpretation.of_reference()
    assert str(config.REFERENCE / "calibration_fit.csv") in str(error.value) and "\n" not in str(error.value)

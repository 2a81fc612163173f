"""Calibration against scikit-learn, a slow optimiser, and simulations whose truth is known."""

import numpy as np
import pytest
from scipy import optimize, special
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as log_loss_of
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.utils.class_weight import compute_sample_weight
from tables import predictions_table

from chestxray.config import CLASSES, PRESENT, SIX_FINDINGS, StudyError
from chestxray.evaluation import calibration, posterior, predictions
from chestxray.evaluation.bootstrap import Draws, interval


def sample(images=2000, seed=0, patients=None):
    """Probabilities that mean what they say, their truths, and draws."""
    rng = np.random.default_rng(seed)
    scores = rng.beta(1, 4, images)
    return scores, rng.random(images) < scores, Draws.of(np.arange(images) % (patients or images), 300, seed)


def test_reliability_and_error_agree_with_scikit_learn():
    scores, truth, draws = sample()
    found = calibration.reliability(scores, truth, draws, bins=8)
    observed, predicted = calibration_curve(truth, scores, n_bins=8, strategy="quantile")
    assert found["observed"].to_numpy() == pytest.approx(observed)
    assert found["predicted"].to_numpy() == pytest.approx(predicted)
    assert found["images"].sum() == 2000
    error = (found["images"] * np.abs(observed - predicted)).sum() / 2000
    assert calibration.error_draws(scores, truth, draws, 8)[0] == pytest.approx(error)
    assert (found["low"] <= found["observed"]).all() and (found["observed"] <= found["high"]).all()


def test_interval_of_a_perfect_models_error_reaches_zero():
    plain, turned = [], []
    for seed in range(20):
        errors = calibration.error_draws(*sample(600, seed))
        plain.append(interval(errors)[0])
        turned.append(interval(errors, basic=True)[0])
    assert min(plain) > 0.01  # plain percentiles would always deny that the model is calibrated
    assert np.median(turned) <= 0.001 and np.mean(turned) < 0.2 * np.mean(plain)


def test_hand_count_of_two_bins():
    scores, truth = np.array([0.1, 0.3, 0.6, 0.8]), np.array([False, True, True, True])
    draws = Draws.of(np.arange(4), 3, 0)
    found = calibration.reliability(scores, truth, draws, bins=2)
    assert found["predicted"].tolist() == pytest.approx([0.2, 0.7])
    assert found["observed"].tolist() == [0.5, 1.0]
    assert calibration.error_draws(scores, truth, draws, 2)[0] == pytest.approx((0.3 + 0.3) / 2)


def test_temperature_is_the_one_a_slow_search_finds():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3000, 4))
    labels = np.array([rng.choice(4, p=row) for row in special.softmax(logits, axis=1)])
    kept = (labels > 0) | (rng.random(3000) < 0.3)  # a rarer class weighs as much as the others
    logits, labels = logits[kept], labels[kept]
    sharp = special.softmax(logits * 2.5, axis=1)

    def loss(heat):
        each = special.log_softmax(np.log(sharp) / heat, axis=1)[range(len(labels)), labels]
        return -sum(each[labels == k].mean() for k in range(4))

    slow = optimize.minimize_scalar(loss, bounds=(0.1, 10), method="bounded").x
    temperature = calibration.fit_temperature(sharp, labels)
    assert temperature == pytest.approx(slow, rel=1e-3)
    assert temperature == pytest.approx(2.5, rel=0.1)
    with pytest.raises(StudyError, match="no validation image with a single class"):
        calibration.fit_temperature(sharp[:0], labels[:0])


def test_finding_is_scaled_as_logistic_regression_does():
    scores, truth, _ = sample(3000)
    bent = special.expit(special.logit(scores) * 2 + 1)
    temperature, bias = calibration.fit_finding(bent, truth)
    fitted = LogisticRegression(C=1e10).fit(special.logit(bent)[:, None], truth)
    assert 1 / temperature == pytest.approx(fitted.coef_[0, 0], rel=1e-2)
    assert bias == pytest.approx(fitted.intercept_[0], abs=1e-2)
    assert calibration.fit_finding(scores, np.zeros(3000, bool)) == (1.0, 0.0)


def test_tables_improve_on_an_ill_calibrated_model_and_keep_its_order():
    valid, test = (
        table.assign(**{name: table[name] ** 0.4 for name in PRESENT})
        for table in (predictions_table(images=500, seed=5), predictions_table(images=500, seed=6))
    )
    found = calibration.findings_table(valid, test, draws=20)
    ece = found["estimate"].xs("ece", level="metric").unstack("stage")
    assert ece["temperature and bias"].mean() < 0.6 * ece["as trained"].mean()
    fitted = calibration.fit(valid)
    after = calibration.apply(test, fitted)
    for name in SIX_FINDINGS:
        assert (after[f"{name}_present"].rank() == test[f"{name}_present"].rank()).all()
        assert fitted.loc[name, "n_positive"] == predictions.shows(valid, name).sum()
    truth = predictions.shows(test, "Mass")
    assert found.loc[("Mass", "temperature and bias", "brier"), "estimate"] == pytest.approx(
        brier_score_loss(truth, after["Mass_present"])
    )
    points = calibration.reliability_table({"before": test, "after": after}, draws=5)
    assert points.groupby(["class", "stage"])["images"].sum().eq(len(test)).all()


def test_classes_table_finds_the_temperature_on_validation():
    tables = []
    for seed in (8, 9):
        table = predictions_table(images=900, seed=seed)
        odds = np.log(table[list(CLASSES)].to_numpy()) * 3
        tables.append(table.assign(**dict(zip(CLASSES, special.softmax(odds, axis=1).T, strict=True))))
    found = calibration.classes_table(*tables, draws=20)["estimate"].unstack("stage")
    assert found.loc["ece", "temperature"] < 0.5 * found.loc["ece", "as trained"]
    truth, scores = predictions.classes_and_scores(tables[1][tables[1]["label"] != ""])
    weights = compute_sample_weight("balanced", truth)
    heat = calibration.fit(tables[0]).loc["classes", "temperature"]
    for stage, values in {"as trained": scores, "temperature": posterior.tempered(scores, heat)}.items():
        expected = log_loss_of(truth, values, sample_weight=weights)
        assert found.loc["log_loss", stage] == pytest.approx(expected)
    assert found.loc["difference", "temperature"] < -0.1
    after = calibration.apply(tables[1], calibration.fit(tables[0]))[list(CLASSES)].to_numpy()
    assert after[tables[1]["label"] != ""] == pytest.approx(values)


def test_cross_fitting_reads_each_patient_with_a_fit_of_the_others():
    table = predictions_table(images=900, patients=300, seed=8)
    odds = np.log(table[list(CLASSES)].to_numpy())
    sharp = special.softmax(odds * 3 + np.eye(7)[1] * 1.5, axis=1)
    table = table.assign(**dict(zip(CLASSES, sharp.T, strict=True)))
    found = calibration.cross_fitted(table, seed=3, draws=200)
    log_loss = found["estimate"].unstack()["log_loss"]
    single = table[table["label"].ne("")]
    truth, scores = predictions.classes_and_scores(single)
    weights = compute_sample_weight("balanced", truth)
    assert log_loss["as trained"] == pytest.approx(log_loss_of(truth, scores, sample_weight=weights))
    expected, splits = scores.copy(), StratifiedGroupKFold(5, shuffle=True, random_state=3)
    for others, part in splits.split(scores, truth, single["patient"]):
        expected[part] = posterior.tempered(scores[part], calibration.fit_temperature(scores[others], truth[others]))
        assert not set(single["patient"].iloc[part]) & set(single["patient"].iloc[others])
    assert log_loss["temperature"] == pytest.approx(log_loss_of(truth, expected, sample_weight=weights))
    gains = found.xs("difference", level="metric")
    assert (gains["high"] < 0).all()  # both are wrong here: the temperature, and one class's bias
    assert gains.loc["temperature", "estimate"] == pytest.approx(log_loss["temperature"] - log_loss["as trained"])


def test_cross_fitting_of_two_images_a_class_makes_two_folds():
    found = calibration.cross_fitted(predictions_table(images=14, patients=14), draws=2)
    assert np.isfinite(found["estimate"]).all()


def test_the_classes_are_fitted_beside_the_findings():
    valid = predictions_table(images=400, seed=5)
    single = valid[valid["label"].ne("")]
    truth, scores = predictions.classes_and_scores(single)
    fitted = calibration.fit(valid)
    assert list(fitted.index) == [*SIX_FINDINGS, "classes"] and fitted.index.name == "class"
    assert fitted.loc["classes", "temperature"] == calibration.fit_temperature(scores, truth)
    assert calibration.fit(valid.assign(label="", selected=False)).loc["classes", "temperature"] == 1
    assert fitted["n_images"].tolist() == [400] * 6 + [len(single)]

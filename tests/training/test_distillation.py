"""The prior from other visits, against shares counted by hand and blind to validation, test and the own label."""

import numpy as np
import pandas as pd
import pytest
import scipy.special
from sklearn.metrics import roc_auc_score

from chestxray.config import ALL_LABELS, StudyError
from chestxray.data import nih_tables
from chestxray.training import distillation, samples

EFFUSION, NONE = ALL_LABELS.index("Effusion"), ALL_LABELS.index("No_finding")


def table(patients=120, most=6, seed=0):
    """Patients who have an effusion at nearly every visit or at hardly any; rows in no order of patients."""
    rng, rows = np.random.default_rng(seed), []
    for patient in range(patients):
        share = rng.choice([0.05, 0.9])
        for visit in range(rng.integers(1, most + 1)):
            findings = "Effusion" if rng.random() < share else "No Finding"
            name = f"{patient:08d}_{visit:03d}.png"
            rows.append([name, str(patient), visit, 50 + patient % 9, "MF"[patient % 2], "PA", findings, ""])
    frame = pd.DataFrame(rows, columns=list(nih_tables.TABLE_COLUMNS)).astype({"age": "Int64"})
    return frame.sample(frac=1, random_state=seed).reset_index(drop=True)


def test_a_finding_that_stays_from_visit_to_visit_has_a_high_prior():
    rows = table()
    prior, labels = distillation.fit_prior(rows), samples.finding_targets(rows["findings"])
    several = rows.groupby("patient")["image"].transform("size").gt(1).to_numpy()
    assert roc_auc_score(labels[several, EFFUSION], prior[several, EFFUSION]) > 0.85
    # Nothing of it is known of those who came once.
    assert prior[~several, EFFUSION].std() < 0.5 * prior[several, EFFUSION].std()
    assert np.abs(prior[:, EFFUSION].mean() - labels[:, EFFUSION].mean()) < 0.05
    # Nobody has the other thirteen.
    assert np.all(prior[:, [k for k in range(15) if k not in (EFFUSION, NONE)]] == 0)


def test_the_order_of_rows_and_the_own_label_change_nothing():
    rows = table()
    prior = distillation.fit_prior(rows)
    turned = rows.iloc[::-1]
    assert np.allclose(distillation.fit_prior(turned)[::-1], prior, atol=1e-4)
    # A row's own label is one of many in the overall shares of others' regressions; beyond that it has no effect.
    row = int(rows.groupby("patient")["image"].transform("size").argmax())
    other = rows.copy()
    other.loc[row, "findings"] = "Effusion" if rows.loc[row, "findings"] == "No Finding" else "No Finding"
    assert np.allclose(distillation.fit_prior(other)[row], prior[row], atol=0.01)
    neighbours = (rows["patient"] == rows.loc[row, "patient"]) & (rows.index != row)
    assert np.abs(distillation.fit_prior(other)[neighbours, EFFUSION] - prior[neighbours, EFFUSION]).max() > 0.03


def test_shares_of_other_visits_by_hand():
    rows = table(2, 3, seed=4).sort_values(["patient", "follow_up"]).iloc[:0]
    for patient, labels in (("7", ["Effusion", "No Finding", "Effusion"]), ("9", ["Effusion"])):
        for visit, findings in enumerate(labels):
            rows.loc[len(rows)] = [f"{patient}_{visit}.png", patient, visit, pd.NA, "", "AP", findings, ""]
    covariates = distillation._covariates(rows, samples.finding_targets(rows["findings"]))
    assert covariates.shape == (4, 3 * 15 + 7) and np.isfinite(covariates).all()
    overall, near, far = 3 / 4, np.exp(-1), np.exp(-2)
    shares = [
        (far * 1 + 0.5 * overall) / (near + far + 0.5),
        (2 * near + 0.5 * overall) / (2 * near + 0.5),
        (far * 1 + 0.5 * overall) / (near + far + 0.5),
        overall,
    ]
    log_odds = [scipy.special.logit((share + 0.02) / 1.04) for share in shares]
    assert np.allclose(covariates[:, EFFUSION], log_odds, atol=1e-5)
    # Age (nobody's is known), sex, view, visit, first, last, how many others.
    last = covariates[:, 45:]
    assert np.array_equal(last[:, :4], [[0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 2], [0, 0, 1, 0]])
    assert np.array_equal(last[:, 4:6], [[1, 0], [0, 0], [0, 1], [1, 1]])
    assert np.allclose(last[:, 6], np.log([3, 3, 3, 1]))


def test_validation_and_test_contribute_nothing(prepared_study):
    train = samples.load_findings(prepared_study, "train")
    prior = distillation.load_prior(prepared_study, train)
    assert prior.shape == (len(train), 15) and prior.dtype == np.float32
    raw = nih_tables.read_entries(prepared_study.paths.raw).source
    before = raw.read_text().splitlines()
    mine = set(train.table["image"])
    # The labels of all others are exchanged; the training patients' stay as they were.
    others = [line if line.split(",")[0] in mine or i == 0 else _relabelled(line) for i, line in enumerate(before)]
    assert others != before
    raw.unlink()  # it is a link to the source's
    raw.write_text("\n".join(others) + "\n")
    assert np.array_equal(distillation.load_prior(prepared_study, train), prior)
    with pytest.raises(StudyError, match="no row of a training patient for"):
        distillation.load_prior(prepared_study, samples.load_findings(prepared_study, "valid"))


def _relabelled(line):
    name, _, rest = line.split(",", 2)
    return f"{name},Hernia,{rest}"


def test_the_prior_is_computed_once_for_the_same_table(prepared_study, monkeypatch):
    train = samples.load_findings(prepared_study, "train")
    first = distillation.load_prior(prepared_study, train)
    monkeypatch.setattr(distillation, "fit_prior", None)
    assert np.array_equal(distillation.load_prior(prepared_study, train.take(np.array([3, 1]))), first[[3, 1]])


def test_one_patient_is_too_few():
    with pytest.raises(StudyError, match="fewer than two patients"):
        distillation.fit_prior(table(1))


def samples_of(y, patients):
    return samples.Samples(np.zeros((len(y), 1)), np.arange(len(y)), y, pd.DataFrame({"patient": patients}))


def test_two_predictions_combined_rank_better_than_either():
    rng = np.random.default_rng(0)
    truth = rng.random((600, 15)) < 0.3
    predictions = [scipy.special.expit(1.2 * (2.0 * truth - 1) + rng.logistic(size=truth.shape)) for _ in range(2)]
    y = truth.astype("float32")
    y[:, 3] = 0  # nobody has it
    combined = distillation.combine(*predictions, samples_of(y, [str(i // 3) for i in range(600)]))
    alone = [roc_auc_score(y[:, 0], part[:, 0]) for part in predictions]
    assert roc_auc_score(y[:, 0], combined[:, 0]) > max(alone) + 0.02
    assert np.all(combined[:, 3] == 0) and combined.min() >= 0 and combined.max() <= 1


def test_a_target_between_label_and_prediction():
    y = np.eye(15, dtype="float32")
    samples = samples_of(y, [str(i) for i in range(15)])
    softer = distillation.soften(samples, np.full((15, 15), 0.5, "float32"), 0.6)
    assert np.allclose(np.diag(softer.y), 0.7) and np.isclose(softer.y[0, 1], 0.3) and softer.y.dtype == np.float32
    assert np.array_equal(distillation.soften(samples, softer.y, 0.0).y, y)
    with pytest.raises(StudyError, match=r"weight 1\.5: give 0"):
        distillation.soften(samples, y, 1.5)

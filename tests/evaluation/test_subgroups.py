"""Groups, their metrics against scikit-learn, and groups too small to speak of."""

import numpy as np
import pytest
from sklearn.metrics import recall_score, roc_auc_score
from tables import predictions_table

from chestxray.config import SIX_FINDINGS, StudyError
from chestxray.evaluation import operating_points, predictions, subgroups


def table_with_people(images=900, seed=1):
    table = predictions_table(images=images, patients=300, seed=seed)
    rng = np.random.default_rng(seed)
    patient = table["patient"].astype(int)
    return table.assign(
        sex=np.where(patient % 2, "F", "M"), age=20 + patient % 70, follow_up=rng.integers(0, 4, images)
    )


def test_groups_are_named_by_age_and_visit():
    table = table_with_people().head(4).assign(age=[39, 40, 60, np.nan], follow_up=[0, 3, 0, np.nan])
    found = subgroups.with_groups(table)
    assert found["age_band"].tolist() == ["under 40", "40 to 59", "60 and over", ""]
    assert found["visit"].tolist() == ["first", "follow-up", "first", ""]
    with pytest.raises(StudyError, match="no column 'sex'"):
        subgroups.with_groups(table.drop(columns="sex"))


def test_metrics_and_gaps_agree_with_scikit_learn():
    table = table_with_people()
    points = operating_points.choose(predictions_table(seed=3))
    found = subgroups.measure(table, points, draws=60)
    scores = {}
    for sex in ("F", "M"):
        part = table[table["sex"] == sex]
        for name in SIX_FINDINGS:
            truth = predictions.shows(part, name)
            scores[sex, name] = roc_auc_score(truth, part[f"{name}_present"])
            assert found.loc[("sex", sex, name, "auroc"), "estimate"] == pytest.approx(scores[sex, name])
            caught = recall_score(truth, part[f"{name}_present"] >= points.loc[name, "threshold"])
            assert found.loc[("sex", sex, name, "tpr"), "estimate"] == pytest.approx(caught)
        row = found.loc[("sex", sex, "mean", "auroc")]
        assert row["n_images"] == len(part) and row["n_patients"] == part["patient"].nunique()
        assert row["estimate"] == pytest.approx(np.mean([scores[sex, name] for name in SIX_FINDINGS]))
    reference = table["sex"].value_counts().idxmax()
    other = "M" if reference == "F" else "F"
    row = found.loc[("sex", other, "Mass", "auroc")]
    assert row["gap"] == pytest.approx(scores[other, "Mass"] - scores[reference, "Mass"])
    assert row["gap_low"] <= row["gap"] <= row["gap_high"] and row["reference"] == reference
    assert np.isnan(found.loc[("sex", reference, "Mass", "auroc"), "gap"])
    family = found.xs("mean", level="finding")
    assert family["p_holm"].notna().sum() == 2 * (1 + 2 + 1 + 1)
    assert (family["p_holm"].dropna() >= family["p"].dropna()).all()


def test_a_finding_in_few_patients_of_a_group_is_said_to_be_too_small():
    table = table_with_people()
    young = (table["age"] < 40) & predictions.shows(table, "Mass")
    table = table[~young | (table.index % 9 == 0)]
    found = subgroups.measure(table, operating_points.choose(predictions_table(seed=3)), draws=10)
    small = found.loc[("age_band", "under 40", "Mass", "auroc")]
    assert small["too_small"] and np.isnan(small["estimate"]) and small["n_positive"] > 0
    assert not found.loc[("age_band", "60 and over", "Mass", "auroc"), "too_small"]
    without = [name for name in SIX_FINDINGS if name != "Mass"]
    elsewhere = found["estimate"].xs(("age_band", "60 and over", "auroc"), level=("column", "group", "metric"))
    assert elsewhere["mean"] == pytest.approx(elsewhere[without].mean())
    one_view = subgroups.measure(table.assign(view="PA"), operating_points.choose(predictions_table(seed=3)), draws=5)
    assert "view" not in one_view.index.get_level_values("column")

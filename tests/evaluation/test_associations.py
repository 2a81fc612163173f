"""The exploratory statistics against SciPy, against formulas and against worked examples."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from chestxray.data import nih_tables
from chestxray.evaluation import associations
from chestxray.evaluation.bootstrap import Draws


def made(images: int, per_patient: int, seed: int) -> pd.DataFrame:
    """Return images of patients who keep their sex, age, view and disease: all images of one are the same."""
    rng = np.random.default_rng(seed)
    patients = images // per_patient
    one = pd.DataFrame(
        {
            "patient": np.arange(patients).astype(str),
            "female": rng.random(patients) < 0.4,
            "age": rng.integers(20, 80, patients),
            "ap": rng.random(patients) < 0.5,
        }
    )
    one["Mass"] = rng.random(patients) < 0.1 + 0.1 * one["female"] + 0.002 * (one["age"] - 20)
    return one.loc[one.index.repeat(per_patient)].reset_index(drop=True)


def test_findings_are_read_from_joined_names() -> None:
    marks = associations.findings_of(pd.DataFrame({"findings": ["Mass|Effusion", "No Finding", "Pleural_Thickening"]}))
    assert marks.shape == (3, 14)
    assert marks.sum(axis=1).tolist() == [2, 0, 1]
    assert marks.loc[0, ["Mass", "Effusion"]].all() and marks.loc[2, "Pleural_Thickening"]


def test_co_occurrence_and_lift_by_hand() -> None:
    marks = pd.DataFrame({"Mass": [1, 1, 1, 0, 0, 0, 0, 0], "Effusion": [1, 1, 0, 1, 0, 0, 0, 0]}).astype(bool)
    assert associations.co_occurrence(marks).to_numpy().tolist() == [[3, 2], [2, 3]]
    both = associations.lift(marks)
    assert both.loc["Mass", "Effusion"] == pytest.approx(2 / (3 * 3 / 8))
    assert np.isnan(both.loc["Mass", "Mass"])


def test_estimates_agree_with_scipy() -> None:
    table = made(3000, 3, 1)
    draws = Draws.of(table["patient"], 50, 1)
    sex = associations.binary_effects(table[["Mass"]], table["female"], draws, "sex").iloc[0]
    counts = pd.crosstab(table["Mass"], table["female"]).to_numpy()
    assert sex["odds_ratio"] == pytest.approx(stats.contingency.odds_ratio(counts, kind="sample").statistic)
    assert sex["effect"] == pytest.approx(stats.contingency.association(counts, method="cramer"))
    assert sex["rate"] == pytest.approx(table.query("female")["Mass"].mean())
    v, low, high = associations.association(table["Mass"], table["female"], draws)
    assert v == pytest.approx(sex["effect"]) and low < v < high
    age = associations.ordinal_effects(table[["Mass"]], table["age"], draws, "age").iloc[0]
    ill, well = table.loc[table["Mass"], "age"], table.loc[~table["Mass"], "age"]
    assert age["effect"] == pytest.approx(2 * stats.mannwhitneyu(ill, well).statistic / (len(ill) * len(well)) - 1)
    assert age["median"] == ill.median()


def test_interval_agrees_with_woolf_where_each_patient_has_one_image() -> None:
    table = made(4000, 1, 2)
    draws = Draws.of(table["patient"], 1000, 1)
    row = associations.binary_effects(table[["Mass"]], table["female"], draws, "sex").iloc[0]
    counts = pd.crosstab(table["Mass"], table["female"]).to_numpy()
    spread = 1.96 * np.sqrt((1 / counts).sum())
    assert np.log(row["odds_low"]) == pytest.approx(np.log(row["odds_ratio"]) - spread, abs=0.03)
    assert np.log(row["odds_high"]) == pytest.approx(np.log(row["odds_ratio"]) + spread, abs=0.03)
    assert row["p"] == pytest.approx(stats.chi2_contingency(counts, correction=False).pvalue, abs=0.01)


def test_more_images_of_the_same_patients_narrow_nothing() -> None:
    once, often = made(1000, 1, 3), made(8000, 8, 3)
    widths = []
    for table in (once, often):
        draws = Draws.of(table["patient"], 400, 1)
        row = associations.binary_effects(table[["Mass"]], table["female"], draws, "sex").iloc[0]
        age = associations.ordinal_effects(table[["Mass"]], table["age"], draws, "age").iloc[0]
        widths.append((row["odds_high"] - row["odds_low"], age["effect_high"] - age["effect_low"]))
    np.testing.assert_allclose(widths[0], widths[1], rtol=1e-6)


def test_few_false_alarms_where_patients_are_alike_within() -> None:
    """Sex has nothing to do with the disease; each patient's six images share both. A test by image cries wolf."""
    alarms = {"patients": 0, "images": 0}
    for seed in range(60):
        table = made(1800, 6, seed)
        table["Mass"] = np.random.default_rng(seed + 500).random(300).repeat(6) < 0.2
        draws = Draws.of(table["patient"], 200, seed)
        row = associations.binary_effects(table[["Mass"]], table["female"], draws, "sex").iloc[0]
        alarms["patients"] += row["p"] < 0.05
        alarms["images"] += stats.chi2_contingency(pd.crosstab(table["Mass"], table["female"])).pvalue < 0.05
    assert alarms["patients"] <= 8  # 60 × .05 = 3 expected
    assert alarms["images"] >= 15


def test_mantel_haenszel_sees_through_simpson() -> None:
    """Odds ratio 3 in both strata, though the strata turn the pooled table upside down."""
    cells = {("AP", True): (30, 20), ("AP", False): (200, 400), ("PA", True): (9, 300), ("PA", False): (1, 100)}
    rows = [
        (view, female, ill)
        for (view, female), counts in cells.items()
        for ill, count in zip((True, False), counts, strict=True)
        for _ in range(count)
    ]
    table = pd.DataFrame(rows, columns=["view", "female", "Mass"])
    draws = Draws.of(pd.Series(range(len(table))), 20, 1)
    marks = table[["Mass"]]
    adjusted = associations.binary_effects(marks, table["female"], draws, "sex", strata=table["view"]).iloc[0]
    assert adjusted["odds_ratio"] == pytest.approx(3)
    assert associations.binary_effects(marks, table["female"], draws, "sex").iloc[0]["odds_ratio"] < 1


def test_empty_values_leave_images_out_and_rare_findings_get_no_estimate() -> None:
    table = made(400, 1, 4)
    table["Hernia"] = table.index >= 397
    female = table["female"].astype("boolean").mask(table.index < 100)
    draws = Draws.of(table["patient"], 100, 1)
    rows = associations.binary_effects(table[["Mass", "Hernia"]], female, draws, "sex").set_index("finding")
    counts = pd.crosstab(table["Mass"][100:], table["female"][100:]).to_numpy()
    expected = stats.contingency.odds_ratio(counts, kind="sample").statistic
    assert rows.loc["Mass", "odds_ratio"] == pytest.approx(expected)
    assert rows.loc["Hernia", ["odds_ratio", "effect", "p"]].isna().all()
    ages = associations.ordinal_effects(table[["Hernia"]], table["age"], draws, "age")
    assert ages.loc[0, "patients"] == 3 and ages.loc[0, ["effect", "p"]].isna().all()
    men_only = table["female"] & False
    assert associations.binary_effects(table[["Mass"]], men_only, draws, "sex").loc[0, ["odds_ratio", "p"]].isna().all()


def test_boxes_are_in_pixels_of_the_raw_image_or_of_the_nihs() -> None:
    boxes = pd.DataFrame({"x": [10.0, 225.1], "y": [20.0, 547.0], "width": [30.0, 86.8], "height": [40.0, 79.2]})
    assert nih_tables.box_side(boxes, 128) == 1024
    assert nih_tables.box_side(boxes, 1024) == 1024
    assert nih_tables.box_side(boxes.head(1), 128) == 128


def test_corrections_on_a_worked_example() -> None:
    """Four p-values; worked by hand from Holm's and from Benjamini and Hochberg's steps; the empty one asks nothing."""
    rows = associations.correct(pd.DataFrame({"p": [0.01, 0.04, np.nan, 0.03, 0.005]}))
    np.testing.assert_allclose(rows["p_holm"], [0.03, 0.06, np.nan, 0.06, 0.02])
    np.testing.assert_allclose(rows["p_bh"], [0.02, 0.04, np.nan, 0.04, 0.02])


def test_predictability_finds_what_is_there_and_never_learns_from_the_same_patient() -> None:
    rng = np.random.default_rng(0)
    groups = pd.Series(np.arange(600) // 6)
    target = pd.Series(np.where(rng.random(100) < 0.5, "AP", "PA")).repeat(6).reset_index(drop=True)
    known = pd.DataFrame({"number": (target == "AP") + rng.normal(0, 1, 600)})
    # AUROC of one Gaussian shifted by one standard deviation: Φ(1/√2)
    assert associations.predictability(known, target, groups, seed=1)["AP"] == pytest.approx(
        stats.norm.cdf(1 / np.sqrt(2)), abs=0.05
    )
    fingerprint = pd.DataFrame({"number": groups.map(dict(enumerate(rng.permutation(100))))})
    assert abs(associations.predictability(fingerprint, target, groups, seed=1)["AP"] - 0.5) < 0.15


def test_pixel_summary_by_hand() -> None:
    stack = np.full((2, 40, 40), 100, dtype=np.uint8)
    stack[0, :2] = 0
    stack[1, 20:, :] = 255
    rows = associations.pixel_summary(stack)
    assert rows["mean"].tolist() == [95, 177.5]
    assert rows["spread"].iloc[1] == pytest.approx(77.5)
    assert rows["black"].tolist() == [0.05, 0]
    assert rows["white"].tolist() == [0, 0.5]
    frame = 40 * 40 - 36 * 36
    assert rows["border_black"].iloc[0] == pytest.approx(80 / frame)
    assert rows["border"].iloc[0] == pytest.approx(100 * (frame - 80) / frame)


def test_sex_and_pneumothorax_in_the_whole_nih_table(nih) -> None:
    """The published prevalences (3.20 % in women, 2.09 % in men), and an interval that says they differ."""
    table = nih_tables.read_entries(nih).table
    if len(table) < 112_000:
        pytest.skip("needs the whole image table")
    single = table[table["label"] != ""].reset_index(drop=True)
    draws = Draws.of(single["patient"], 200, 1)
    mark = pd.DataFrame({"Pneumothorax": single["label"] == "Pneumothorax"})
    row = associations.binary_effects(mark, single["sex"] == "F", draws, "sex").iloc[0]
    assert (round(row["rate"], 4), round(row["rate_other"], 4)) == (0.0320, 0.0209)
    assert row["odds_low"] > 1.2 and row["p"] < 0.001


def test_what_cannot_be_measured_is_empty():
    rows = pd.DataFrame({"patient": list("abcdefgh"), "label": ["Mass"] * 4 + ["Nodule"] * 4, "x": range(8)})
    few = associations.predictability(rows[["x"]], rows["label"], rows["patient"], seed=1)
    assert list(few.index) == ["Mass", "Nodule"] and few.isna().all()
    assert associations.predictability(rows[["x"]], rows["label"].str[:0], rows["patient"], seed=1).isna().all()
    draws, unknown = Draws.of(rows["patient"], 20, 1), pd.Series([pd.NA] * 8, dtype="boolean")
    assert np.isnan(associations.association(rows["label"], unknown, draws)).all()
    effects = associations.binary_effects(pd.DataFrame({"Mass": [True, False] * 4}), unknown, draws, "AP", unknown)
    assert effects["odds_ratio"].isna().all() and effects["images"].tolist() == [0]

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from chestxray.config import CLASSES, StudyError
from chestxray.data import nih_tables, preparation, splits


def made_table(patients: int = 400, seed: int = 0) -> pd.DataFrame:
    """An image table with the set's habits: few patients with many images, rare lesions, AP for the ill."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        for follow_up in range(min(1 + int(rng.pareto(1.2)), 40)):
            label = rng.choice([*CLASSES, ""], p=[0.05, 0.05, 0.1, 0.02, 0.5, 0.03, 0.03, 0.22])
            view = "AP" if rng.random() < (0.15 if label == "No_finding" else 0.4) else "PA"
            rows.append((f"{patient:08d}_{follow_up:03d}.png", str(patient), view, label))
    return pd.DataFrame(rows, columns=["image", "patient", "view", "label"])


def crossing(table: pd.DataFrame, split: pd.Series) -> int:
    return int((table.assign(split=split).groupby("patient")["split"].nunique() > 1).sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_lists_patients_stay_together_and_classes_keep_their_share(seed):
    table = made_table(seed=seed)
    split = splits.assign(table, None, 0.15, seed)
    assert crossing(table, split) == 0
    images = pd.crosstab(table["label"], split)
    for held, rest, share in (("test", ["train", "valid", "test"], 0.2), ("valid", ["train", "valid"], 0.15)):
        expected = share * images[rest].sum(axis=1)
        assert ((images[held] - expected).abs() <= np.maximum(2.5, 0.02 * expected)).all()


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_validation_departs_no_more_than_scikit_learns_folds():
    ours, theirs = [], []
    for seed in range(5):
        table = made_table(patients=300, seed=seed)
        stratum = table["label"] + table["view"]

        def departure(held: np.ndarray, stratum=stratum) -> float:
            share = pd.Series(held).groupby(stratum.to_numpy()).mean()
            return float((share - 0.2).abs().mean())

        folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(table, stratum, table["patient"])
        theirs.append(np.mean([departure(np.isin(np.arange(len(table)), held)) for _, held in folds]))
        ours.append(departure(table["patient"].isin(splits.hold_out(table, 0.2, seed)).to_numpy()))
    assert np.mean(ours) <= np.mean(theirs)


def test_the_order_of_rows_does_not_matter_and_the_seed_does():
    table = made_table()
    shuffled = table.sample(frac=1, random_state=1)
    for function in (
        lambda t: splits.assign(t, None, 0.2, 3),
        lambda t: splits.plan(t, None, 0.2, 60, 3)["selected"],
        lambda t: splits.plan(t, None, 0.2, 60, 3)["balanced_test"],
    ):
        pd.testing.assert_series_equal(function(table), function(shuffled).sort_index())
    assert splits.hold_out(table, 0.2, 3) != splits.hold_out(table, 0.2, 4)


def test_official_lists_decide():
    table = made_table(100)
    named = {patient for patient in table["patient"] if int(patient) % 4 == 0}
    test = set(table.loc[table["patient"].isin(named), "image"])
    split = splits.assign(table, (set(table["image"]) - test | {"elsewhere.png"}, test), 0.2, 0)
    assert set(table.loc[split.eq("test"), "patient"]) == named
    assert crossing(table, split) == 0


def test_lists_that_share_a_patient_stop_the_study():
    table = made_table(20)
    patient = table["patient"].value_counts().index[0]
    images = table.loc[table["patient"].eq(patient), "image"].tolist()
    lists = (set(table["image"]) - {images[0]}, {images[0]})
    with pytest.raises(StudyError, match=f"patient {patient} and 0 more"):
        splits.assign(table, lists, 0.2, 0)


def test_lists_that_leave_an_image_or_a_split_out_are_refused():
    table = made_table(100)
    images = table["image"].tolist()
    with pytest.raises(
        StudyError, match=rf"4 of {len(table)} images here are in neither, such as {images[0]}, .*; add"
    ):
        splits.assign(table, (set(images[5:]), {images[4]}), 0.2, 0)
    with pytest.raises(StudyError, match=r"^test_list\.txt: lists none of the .* images here; add"):
        splits.assign(table, (set(images), {"elsewhere.png"}), 0.2, 0)


def test_too_few_patients_to_split():
    with pytest.raises(StudyError, match="images of 4 patients"):
        splits.assign(made_table(4), None, 0.2, 0)


def test_a_class_of_few_patients_is_on_every_side_and_a_lone_patient_in_train():
    table = made_table(200)
    table = table[~table["label"].isin(["Mass", "Nodule"])]
    rare = [(f"m{n}.png", f"m{n}", "PA", "Mass") for n in range(5)] + [("n.png", "n", "AP", "Nodule")]
    table = pd.concat([table, pd.DataFrame(rare, columns=list(table))], ignore_index=True)
    for seed in range(10):
        planned = splits.plan(table.assign(findings=""), None, 0.15, 1000, seed)
        assert set(planned.loc[planned["label"].eq("Mass"), "split"]) == {"train", "valid", "test"}
        assert set(planned.loc[planned["label"].eq("Nodule"), "split"]) == {"train"}
    assert "lacks Nodule (1 patient, none in valid and test); add images" in splits.shortage(planned)
    with pytest.raises(StudyError, match="table: training needs all seven"):
        splits.require_trainable(planned, "table")


def test_selection_thins_no_finding_in_proportion_and_over_patients():
    table = made_table(600)
    planned = splits.plan(table, None, 0.2, 200, 0)
    chosen = planned[planned["selected"]]
    healthy = chosen[chosen["label"].eq("No_finding")]
    everyone = planned[planned["label"].eq("No_finding")]
    assert len(healthy) == 200
    assert not chosen["label"].eq("").any()
    assert planned.loc[planned["label"].isin(set(CLASSES) - {"No_finding"}), "selected"].all()
    expected = everyone["split"].value_counts() * 200 / len(everyone)
    assert (healthy["split"].value_counts() - expected).abs().max() < 1
    # Nobody gives a second image before everyone of the split has given one.
    for split, part in healthy.groupby("split"):
        available = everyone.loc[everyone["split"].eq(split), "patient"].nunique()
        assert part["patient"].nunique() == min(len(part), available)
    # File order is patient order: the first half of the patients must not give more than its half.
    ranks = everyone.drop_duplicates("patient")["patient"].astype(int).rank(pct=True)
    low = set(everyone.drop_duplicates("patient").loc[ranks.le(0.5), "patient"])
    assert 0.4 < healthy["patient"].isin(low).mean() < 0.6


def test_selection_keeps_all_where_there_are_fewer():
    planned = splits.plan(made_table(50), None, 0.2, 10_000, 0)
    assert (planned["selected"] == planned["label"].ne("")).all()


def test_the_balanced_test_is_the_same_of_each_class_over_patients():
    planned = splits.plan(made_table(2000), None, 0.2, 1500, 0)
    balanced = planned[planned["balanced_test"]]
    single = planned[planned["split"].eq("test") & planned["selected"]]
    available = single["label"].value_counts()
    assert set(balanced.index) <= set(single.index)
    assert balanced["label"].value_counts().to_dict() == dict.fromkeys(CLASSES, available.min())
    assert 0 < available.min() < splits.BALANCED_TEST
    # Nobody gives a second image of a class before everyone has given one.
    for label, part in balanced.groupby("label"):
        patients = single.loc[single["label"].eq(label), "patient"].nunique()
        assert part["patient"].nunique() == min(len(part), patients)
    assert not balanced.index.equals(planned.index[splits.balanced_test(planned, 1)])


def test_the_balanced_test_is_no_larger_than_it_should_be_nor_than_its_rarest_class(monkeypatch):
    table = made_table(2000)
    assert splits.BALANCED_TEST == 290, "the published study's"
    monkeypatch.setattr(splits, "BALANCED_TEST", 12)
    assert splits.plan(table, None, 0.2, 100_000, 0)["balanced_test"].sum() == 7 * 12
    monkeypatch.undo()
    few = splits.plan(table, None, 0.2, 100, 0)  # of No_finding, over all splits
    selected = few[few["split"].eq("test") & few["selected"]]["label"].value_counts()
    assert few["balanced_test"].sum() == 7 * selected["No_finding"] == 7 * selected.min() > 0
    none = splits.plan(table[table["label"].ne("Nodule")], None, 0.2, 100, 0)
    assert not none["balanced_test"].any()


def test_both_tests_are_counted():
    table = made_table(600)
    names = {label: label.replace("No_finding", "No Finding") for label in CLASSES} | {"": "Effusion|Mass|Hernia"}
    planned = splits.plan(table.assign(findings=table["label"].map(names)), None, 0.2, 300, 0)
    counts = splits.test_counts(planned)
    test = planned[planned["split"].eq("test")]
    for label in CLASSES:
        shows = test[[names[label] in text.split("|") for text in test["findings"]]]
        assert counts.loc[label, "all"].tolist() == [len(shows), shows["patient"].nunique()]
        balanced = test[test["balanced_test"] & test["label"].eq(label)]
        assert counts.loc[label, "balanced"].tolist() == [len(balanced), balanced["patient"].nunique()]
    assert counts.loc["Total", ("all", "images")] == len(test)
    assert counts.loc["Total", ("all", "patients")] == test["patient"].nunique()
    assert counts.loc["Total", ("balanced", "images")] == planned["balanced_test"].sum()


def test_the_selection_adds_up():
    planned = splits.plan(made_table().assign(sex="F"), None, 0.2, 100, 0)
    table = splits.selection(planned).set_index(["split", "class"])
    assert [name for split, name in table.index if split == "test"] == [*CLASSES, "Total"]
    assert table.xs("Total", level="class")["images"].sum() == planned["selected"].sum()
    test = planned[planned["selected"] & planned["split"].eq("test")]
    assert table.loc[("test", "Total"), "patients"] == test["patient"].nunique()
    assert table.loc[("test", "Mass"), "AP"] == (test["label"].eq("Mass") & test["view"].eq("AP")).sum()


def most_off(planned: pd.DataFrame) -> float:
    """Images by which validation is off its share of train_val, at most over classes and views of classes."""
    part = planned[planned["split"].ne("test") & planned["label"].ne("")]
    held = part["split"].eq("valid")
    share = planned["split"].eq("valid").sum() / planned["split"].ne("test").sum()
    groups = [held.groupby(part["label"]), held[part["view"].ne("")].groupby([part["label"], part["view"]])]
    return max((group.sum() - share * group.size()).abs().max() for group in groups)


def test_the_whole_table_gives_the_published_counts_and_the_studys_selection(nih):
    """Counts of single-label images per official list: STUDY.md; 28,000+ is what the published study selected."""
    table = nih_tables.read_entries(nih).table
    planned = splits.plan(table, nih_tables.read_lists(nih), 0.1, 4000, 2024)
    official = planned["split"].where(planned["split"].eq("test"), "train_val")
    single = pd.crosstab(planned["label"], official).loc[list(CLASSES)]
    assert single["train_val"].tolist() == [3414, 2788, 7327, 1696, 50500, 2248, 1241]
    assert single["test"].tolist() == [801, 1167, 2220, 443, 9861, 457, 953]
    assert official.value_counts().to_dict() == {"train_val": 86_524, "test": 25_596}
    assert crossing(planned, planned["split"]) == 0
    assert planned["selected"].sum() == 28_755
    balanced = planned.loc[planned["balanced_test"], "label"].value_counts()
    assert balanced.to_dict() == dict.fromkeys(CLASSES, 290) and planned["split"].eq("test").sum() == 25_596
    assert most_off(planned) < 3


def test_the_real_radiographs_keep_their_lists(nih, nih_plan):
    table = nih_plan.table
    assert crossing(table, table["split"]) == 0
    train_val, test = nih_tables.read_lists(nih)
    assert set(table.loc[table["split"].eq("test"), "image"]) == set(table["image"]) & test
    assert set(table.loc[table["split"].ne("test"), "image"]) == set(table["image"]) & train_val
    assert most_off(table) < 1
    chosen = table[table["selected"]]
    assert (chosen["label"].eq("No_finding")).sum() == 1000
    assert chosen.loc[chosen["label"].eq("No_finding"), "patient"].is_unique
    assert isinstance(nih_plan, preparation.Plan) and not nih_plan.rejected


def test_the_real_sample_has_the_counts_it_was_published_with(nih_plan):
    table = nih_plan.table
    patients = table.groupby(table["split"].eq("test"))["patient"].agg(["size", "nunique"])
    assert patients.loc[False].tolist() == [7465, 3761] and patients.loc[True].tolist() == [1959, 591]
    single = pd.crosstab(table["label"], table["split"].eq("test")).loc[list(CLASSES)]
    assert single[False].tolist() == [352, 291, 621, 127, 3003, 232, 242]
    assert single[True].tolist() == [54, 80, 118, 26, 513, 40, 76]
    assert table.loc[table["balanced_test"], "label"].value_counts().to_dict() == dict.fromkeys(CLASSES, 26)

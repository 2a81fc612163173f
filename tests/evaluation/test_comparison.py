"""Metrics against scikit-learn, against hand counts, and intervals against a slow bootstrap and DeLong's variance."""

import time

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn import metrics as sk
from tables import NIH_NAMES, predictions_table

from chestxray import config
from chestxray.config import ALL_LABELS, CLASSES, PRESENT, SIX_FINDINGS, StageMissing, StudyError, open_study
from chestxray.evaluation import bootstrap, comparison, metrics, posterior, predictions


def per_class(table, draws, seed=0):
    return comparison.per_class(comparison.resample({"ensemble": table}, draws, seed))


def compare(first, second, metrics=tuple(comparison.METRICS), draws=20, seed=0):
    drawn = comparison.resample({"first": first, "second": second}, draws, seed)
    return comparison.compare_with(drawn, "first", ["second"], metrics).loc["second"]


def sklearn_metrics(table):
    """The same metrics of a table (rows may repeat) by scikit-learn."""
    single = table[table["selected"]]
    guess = np.array(CLASSES)[single[list(CLASSES)].to_numpy().argmax(axis=1)]
    aurocs = [sk.roc_auc_score(single["label"] == name, single[name]) for name in CLASSES]
    precisions = [sk.average_precision_score(single["label"] == name, single[name]) for name in CLASSES]
    shown = {name: [name in text.split("|") for text in table["findings"]] for name in SIX_FINDINGS}
    return {
        "macro_auroc": np.mean(aurocs),
        "macro_average_precision": np.mean(precisions),
        "balanced_accuracy": sk.balanced_accuracy_score(single["label"], guess),
        "macro_f1": sk.f1_score(single["label"], guess, average="macro", labels=CLASSES, zero_division=0),
        "six_finding_auroc": np.mean(
            [sk.roc_auc_score(shown[name], table[f"{name}_present"]) for name in SIX_FINDINGS]
        ),
    }


@pytest.mark.parametrize("decimals", [None, 1])
def test_estimates_agree_with_scikit_learn_with_and_without_ties(decimals):
    table = predictions_table(decimals=decimals)
    found = comparison.evaluate(table, draws=2)
    expected = sklearn_metrics(table)
    assert list(found.index) == list(comparison.METRICS)
    for metric, value in expected.items():
        assert found.loc[metric, "estimate"] == pytest.approx(value, abs=1e-12), metric


@pytest.mark.parametrize("decimals", [None, 1])
def test_interval_equals_a_slow_bootstrap_of_repeated_rows(decimals):
    table, draws, seed = predictions_table(decimals=decimals), 25, 7
    rows = table.groupby("patient").indices
    patients = sorted(rows)
    drawn = np.random.default_rng(seed).integers(len(patients), size=(draws, len(patients)))
    repeated = [np.concatenate([rows[patients[p]] for p in draw]) for draw in drawn]
    slow = pd.DataFrame([sklearn_metrics(table.iloc[taken]) for taken in repeated])
    fast = comparison.evaluate(table, draws=draws, seed=seed)
    for metric in comparison.METRICS:
        expected = np.percentile(slow[metric], [2.5, 97.5])
        assert fast.loc[metric, ["low", "high"]].to_numpy(dtype=float) == pytest.approx(expected, abs=1e-12), metric
        assert fast.loc[metric, "draws"] == draws


def test_interval_of_independent_images_has_the_width_of_delong():
    table = predictions_table(images=700, skill=1.0, seed=3)
    table["patient"] = table["image"]
    found = per_class(table, draws=2000).loc[("Effusion", "all_images_auroc")]
    shown = table["findings"].str.contains("Effusion").to_numpy()
    scores = table["Effusion_present"].to_numpy()
    above = scores[shown][:, None] > scores[~shown][None, :]
    error = np.sqrt(above.mean(axis=1).var(ddof=1) / shown.sum() + above.mean(axis=0).var(ddof=1) / (~shown).sum())
    assert found["estimate"] == pytest.approx(above.mean(), abs=1e-12)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_resampling_patients_widens_the_interval_when_their_images_repeat():
    table = predictions_table(images=200, patients=200)
    copies = [table.assign(image=table["image"] + f"_{copy}") for copy in range(4)]
    repeated = pd.concat(copies, ignore_index=True)
    by_patient = comparison.evaluate(repeated, draws=400).loc["balanced_accuracy"]
    by_image = comparison.evaluate(repeated.assign(patient=repeated["image"]), draws=400).loc["balanced_accuracy"]
    assert (by_patient["high"] - by_patient["low"]) > 1.6 * (by_image["high"] - by_image["low"])


def test_same_seed_gives_the_same_interval_in_any_order_of_rows():
    table = predictions_table()
    first = comparison.evaluate(table, draws=50, seed=5)
    again = comparison.evaluate(table.sample(frac=1, random_state=0), draws=50, seed=5)
    other = comparison.evaluate(table, draws=50, seed=6)
    pd.testing.assert_frame_equal(first, again)
    assert not np.allclose(first["low"], other["low"])


def test_large_tables_are_computed_in_parts_with_the_same_result(monkeypatch):
    table = predictions_table()
    whole = comparison.evaluate(table, draws=40)
    monkeypatch.setattr(metrics, "_FLOATS_AT_ONCE", 3000)
    pd.testing.assert_frame_equal(comparison.evaluate(table, draws=40), whole)


def labelled(labels):
    """One selected image and patient a label, without probabilities."""
    numbers = range(len(labels))
    columns = {"image": [f"{i}.png" for i in numbers], "patient": [str(i) for i in numbers], "label": labels}
    return pd.DataFrame(columns).assign(selected=True, findings=[NIH_NAMES[label] for label in labels])


def test_hand_count():
    """Three classes' worth of images counted by hand; the others are classified perfectly."""
    rows = [("Effusion", "Effusion"), ("Effusion", "Mass"), ("Mass", "Mass"), ("Mass", "Mass"), ("Nodule", "Mass")]
    rows += [(name, name) for name in CLASSES if name not in ("Effusion", "Mass", "Nodule")]
    table = labelled([true for true, _ in rows])
    for name in CLASSES:
        table[name] = [1.0 if guess == name else 0.0 for _, guess in rows]
    table[list(PRESENT)] = 0.5
    counts = metrics.confusion(table)
    assert counts.loc["Effusion", "Mass"] == counts.loc["Nodule", "Mass"] == 1
    assert counts.loc["Mass", "Mass"] == 2
    assert counts.to_numpy().sum() == 9
    assert metrics.confusion(table, normalize=True).loc["Effusion", "Mass"] == 0.5
    found = comparison.evaluate(table, draws=2)["estimate"]
    assert found["balanced_accuracy"] == pytest.approx((0.5 + 1 + 0 + 4) / 7)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 6 + 0 + 4) / 7)
    classes = per_class(table, draws=2)["estimate"]
    assert classes["Mass", "precision"] == 0.5
    assert classes["Nodule", "precision"] == 0
    # Effusion: 2 positives scored 1 and 0, 7 negatives scored 0: one pair in two is won, the other tied.
    assert classes["Effusion", "auroc"] == 0.75
    # Mass: both positives and 2 of 7 negatives scored 1.
    assert classes["Mass", "auroc"] == pytest.approx((5 + 0.5 * 2) / 7)


def test_accuracy_at_shares_is_that_of_a_population_with_these_shares():
    table = predictions_table(images=600, seed=4)
    single = table[table["selected"]]
    labels = single["label"].to_numpy()
    found = comparison.at_shares(table, 1.3, draws=5)["estimate"].unstack("metric")
    for name, counts in posterior.SHARES.items():
        logs = np.log(single[list(CLASSES)].to_numpy()) / 1.3 + np.log(counts)
        guess = np.array(CLASSES)[logs.argmax(axis=1)]
        expected = {"balanced_accuracy": sk.balanced_accuracy_score(labels, guess)}
        for of in ("sample", "nih"):  # every image weighs as its class's share does, by scikit-learn
            weight = dict(zip(CLASSES, posterior.SHARES[of], strict=True))
            weights = [weight[label] / (labels == label).sum() for label in labels]
            expected[f"accuracy_{of}"] = sk.accuracy_score(labels, guess, sample_weight=weights)
        expected["sensitivity_Nodule"] = (guess == labels)[labels == "Nodule"].mean()
        assert found.loc[name, list(expected)].to_dict() == pytest.approx(expected), name
    assert found["balanced_accuracy"].idxmax() == "equal" and found["accuracy_nih"].idxmax() != "equal"
    whole = comparison.evaluate(table, draws=5).loc["balanced_accuracy", ["estimate", "low", "high"]]
    own = comparison.at_shares(table, 1.3, draws=5).loc[("equal", "balanced_accuracy"), ["estimate", "low", "high"]]
    assert own.tolist() == pytest.approx(whole.tolist())  # the same images, patients and draws


def test_metrics_of_all_images_count_images_with_several_findings():
    table = predictions_table()
    found = per_class(table, draws=20)
    shown = table["findings"].str.split("|").map(lambda names: "Mass" in names)
    assert found.loc[("Mass", "all_images_auroc"), "n_images"] == len(table)
    assert found.loc[("Mass", "all_images_auroc"), "n_positive"] == shown.sum()
    assert found.loc[("Mass", "auroc"), "n_images"] == table["selected"].sum()
    assert found.loc[("Mass", "auroc"), "n_positive"] == (table["label"] == "Mass").sum()
    assert found.loc[("Mass", "all_images_average_precision"), "estimate"] == pytest.approx(
        sk.average_precision_score(shown, table["Mass_present"]), abs=1e-12
    )
    assert ("No_finding", "all_images_auroc") not in found.index
    single = table[table["selected"]]
    guess = np.array(CLASSES)[single[list(CLASSES)].to_numpy().argmax(axis=1)]
    for metric, score in {"sensitivity": sk.recall_score, "precision": sk.precision_score, "f1": sk.f1_score}.items():
        expected = score(single["label"], guess, average=None, labels=CLASSES)
        assert found["estimate"].xs(metric, level="metric").to_numpy() == pytest.approx(expected), metric


def test_a_draw_without_a_class_is_left_out_and_counted():
    table = predictions_table(images=300, patients=60)
    mass = table["label"] == "Mass"
    table = table[~table["findings"].str.contains("Mass") | mass].copy()
    table.loc[mass, "patient"] = "one"
    found = comparison.evaluate(table, draws=400)
    # One patient in n is missing from a draw with probability (1 - 1/n)^n, about exp(-1).
    assert found.loc["macro_auroc", "draws"] == pytest.approx(400 * (1 - np.exp(-1)), rel=0.12)
    assert found.loc["six_finding_auroc", "draws"] == found.loc["macro_auroc", "draws"]
    assert found[["low", "high"]].notna().all(axis=None)


def test_a_comparison_is_paired_and_antisymmetric():
    good = predictions_table(skill=1.5, seed=2)
    worse = good.copy()
    rng = np.random.default_rng(0)
    columns = [*CLASSES, *PRESENT]
    worse[columns] = (worse[columns] + 0.15 * rng.random((len(worse), len(columns)))) / 2.05
    one, other = comparison.evaluate(good, draws=300), comparison.evaluate(worse, draws=300)
    found = compare(good, worse.sample(frac=1, random_state=1), draws=300)
    back = compare(worse, good, draws=300)
    assert found["difference"].to_numpy() == pytest.approx((one["estimate"] - other["estimate"]).to_numpy())
    assert found["difference"].to_numpy() == pytest.approx((found["first"] - found["second"]).to_numpy())
    assert found["low"].to_numpy() == pytest.approx(-back["high"].to_numpy())
    width = (found["high"] - found["low"])["macro_auroc"]
    assert width < 0.7 * (one["high"] - one["low"])["macro_auroc"]
    same = compare(good, good, ["macro_f1"], draws=20).loc["macro_f1"]
    assert same["difference"] == same["low"] == same["high"] == 0


def test_summary_holds_each_models_evaluation():
    tables = {"a": predictions_table(), "b": predictions_table(skill=0.5)}
    found = comparison.summary(comparison.resample(tables, draws=10, seed=3))
    assert found.index.names == ["model", "metric"]
    pd.testing.assert_frame_equal(found.loc["b"], comparison.evaluate(tables["b"], draws=10, seed=3))


def test_roc_points_enclose_the_area():
    table = predictions_table(decimals=2)
    points = metrics.roc_points(table)
    found = per_class(table, draws=2)["estimate"].xs("auroc", level="metric")
    for name, curve in points.groupby("class"):
        area = np.trapezoid(curve["true_positive_rate"], curve["false_positive_rate"])
        assert area == pytest.approx(found[name], abs=1e-12)


def test_the_mean_of_models_is_of_both_kinds_of_probabilities():
    first, second = predictions_table(seed=1), predictions_table(seed=1, skill=0.3)
    mean = predictions.average([first, second.sample(frac=1, random_state=0)])
    for name in ("Mass", "Mass_present"):
        assert mean[name].to_numpy() == pytest.approx((first[name] + second[name]).to_numpy() / 2)


def test_published_means_are_those_of_their_findings():
    table = predictions_table()
    beside = comparison.beside_published(per_class(table, draws=2), "ours")
    for paper, row in beside.drop(index="ours").iterrows():
        assert row["Mean"] == pytest.approx(row[list(SIX_FINDINGS)].mean(), abs=1e-3), paper
    assert beside.loc["ours", "Mean"] == pytest.approx(sklearn_metrics(table)["six_finding_auroc"])


def test_a_models_outputs_become_a_table():
    table = predictions_table(images=30).assign(balanced_test=False, sex="F", age=50, follow_up=0)
    rng = np.random.default_rng(0)
    outputs = {"findings": rng.random((30, 15)), "classes": rng.dirichlet(np.ones(7), 30)}
    found = predictions.prediction_table(table, outputs)
    assert list(found) == [*predictions.COLUMNS, *CLASSES, *PRESENT]
    assert found[list(CLASSES)].to_numpy() == pytest.approx(outputs["classes"].round(6), abs=1e-12)
    for name in SIX_FINDINGS:
        truth, scores = predictions.finding(found, name)
        assert scores == pytest.approx(outputs["findings"][:, ALL_LABELS.index(name)].round(6), abs=1e-12)
        assert truth.tolist() == [name in text.split("|") for text in table["findings"]]


def test_macro_auroc_of_arrays():
    rng = np.random.default_rng(4)
    labels, scores = rng.integers(7, size=300), rng.random((300, 7)).round(1)
    expected = np.mean([sk.roc_auc_score(labels == k, scores[:, k]) for k in range(7)])
    assert metrics.macro_auroc(labels, scores) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(StudyError, match="0 of 300 images are Pneumothorax"):
        metrics.macro_auroc(np.minimum(labels, 5), scores)
    with pytest.raises(StudyError, match="1 predicted probabilities are not finite"):
        metrics.macro_auroc(labels, np.where(np.arange(2100).reshape(300, 7) == 7, np.nan, scores))


def broken(change):
    table = predictions_table()
    change(table)
    return table


BAD_TABLES = {
    "Mass is nan, not a probability": lambda t: t.__setitem__("Mass", t["Mass"].where(t.index != 3)),
    "Mass is 1.5, not a probability": lambda t: t.__setitem__("Mass", t["Mass"].where(t.index != 3, 1.5)),
    "00000002_000.png: label 'Masss' is unknown": lambda t: t.__setitem__(
        "label", t["label"].replace("Infiltration", "Masss")
    ),
    "finding 'effusion' is unknown": lambda t: t.__setitem__("findings", t["findings"].replace("Effusion", "effusion")),
    "no column 'Nodule'": lambda t: t.__delitem__("Nodule"),
    "no column 'Mass_present'": lambda t: t.__delitem__("Mass_present"),
    "no column 'patient'": lambda t: t.__delitem__("patient"),
    "has image 00000000_000.png twice": lambda t: t.__setitem__(
        "image", t["image"].replace("00000001_000.png", t["image"][0])
    ),
    "0 of 420 images are Mass": lambda t: t.__setitem__("findings", t["findings"].str.replace("Mass", "Hernia")),
    "single-label images are Nodule": lambda t: t.__setitem__("selected", t["selected"] & (t["label"] != "Nodule")),
}


@pytest.mark.parametrize("message", BAD_TABLES)
def test_bad_tables_are_one_line(message):
    with pytest.raises(StudyError) as caught:
        comparison.evaluate(broken(BAD_TABLES[message]), draws=2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_bad_requests_are_one_line():
    table = predictions_table()
    with pytest.raises(StudyError, match=r"different images \(only one has 00000000_000.png\)"):
        compare(table, table[1:], draws=2)
    with pytest.raises(StudyError, match="predictions has no row"):
        comparison.evaluate(table[:0], draws=2)


def test_reading_back_what_was_written(tmp_path):
    table = predictions_table()
    path = tmp_path / "cnn" / "predictions_test.csv"
    path.parent.mkdir()
    table.to_csv(path, index=False)
    read = predictions.read_predictions(path)
    assert read["patient"].tolist() == table["patient"].tolist()
    assert read["label"].tolist() == table["label"].tolist()
    pd.testing.assert_frame_equal(comparison.evaluate(read, draws=5), comparison.evaluate(table, draws=5))
    table.assign(Mass=table["Mass"].where(table.index != 3)).to_csv(path, index=False)
    with pytest.raises(StudyError, match=r"cnn/predictions_test.csv, 00000003_000.png: Mass is nan"):
        predictions.read_predictions(path)
    table.assign(selected="perhaps").to_csv(path, index=False)
    with pytest.raises(StudyError, match="column 'selected' holds something else than True and False"):
        predictions.read_predictions(path)
    path.write_bytes(b"")
    with pytest.raises(StudyError, match=r"cnn/predictions_test.csv can't be read"):
        predictions.read_predictions(path)


def test_models_are_read_together_or_the_missing_notebook_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path))
    study = open_study("phantom", "quick", 1)
    table = predictions_table()
    for folder in config.MODELS:
        if folder == "ensemble":
            with pytest.raises(
                StageMissing, match=r"ensemble/predictions_test.csv is missing: run 4_models/4_Ensemble"
            ):
                predictions.read_models(study, "test")
        study.paths.saved(folder).mkdir(parents=True)
        table.sample(frac=1, random_state=2).to_csv(study.paths.saved(folder) / "predictions_test.csv", index=False)
    tables = predictions.read_models(study, "test")
    assert list(tables) == list(config.MODELS)
    assert tables["ensemble"]["image"].tolist() == tables["dense"]["image"].tolist()


def delong(first, second, truth):
    """AUROC of both scores, and the z of their difference (DeLong, DeLong & Clarke-Pearson, Biometrics 1988)."""
    parts = []
    for scores in (first, second):
        wins = scores[truth][:, None] > scores[~truth][None, :]
        parts.append((wins.mean(axis=1), wins.mean(axis=0)))
    areas = [by_positive.mean() for by_positive, _ in parts]
    variance = sum(np.cov(np.stack([part[side] for part in parts])) / len(parts[0][side]) for side in (0, 1))
    error = np.sqrt(variance[0, 0] + variance[1, 1] - 2 * variance[0, 1])
    return areas, error, (areas[0] - areas[1]) / error


def test_p_value_of_a_pair_agrees_with_delong():
    one, other = predictions_table(images=600, skill=1.0, seed=3), predictions_table(images=600, skill=0.8, seed=3)
    one["patient"] = other["patient"] = one["image"]
    truth = predictions.shows(one, "Effusion")
    scores = [table["Effusion_present"].to_numpy() for table in (one, other)]
    areas, error, z = delong(*scores, truth)
    draws = bootstrap.Draws.of(one["image"], 2000, seed=0)
    gap = np.subtract(*(metrics.rank_draws(truth, each, draws)[0] for each in scores))
    assert gap[0] == pytest.approx(areas[0] - areas[1], abs=1e-12)
    assert gap[1:].std() == pytest.approx(error, rel=0.06)
    assert bootstrap.p_value(gap) == pytest.approx(2 * norm.sf(abs(z)), rel=0.35)


def test_models_resampled_together_have_the_intervals_they_have_alone():
    tables = {"ensemble": predictions_table(skill=1.4, seed=2), "weak": predictions_table(skill=0.7, seed=2)}
    drawn = comparison.resample(tables, draws=60, seed=4)
    for name, table in tables.items():
        alone = comparison.evaluate(table, draws=60, seed=4)
        pd.testing.assert_frame_equal(comparison.summary(drawn).loc[name], alone)
    pd.testing.assert_frame_equal(comparison.per_class(drawn), per_class(tables["ensemble"], draws=60, seed=4))
    with pytest.raises(StudyError, match="no predictions to evaluate"):
        comparison.resample({})


def test_every_pair_is_compared_once_and_corrected():
    tables = {name: predictions_table(skill=skill, seed=2) for name, skill in (("a", 2.0), ("b", 1.0), ("c", 1.0))}
    tables["c"] = tables["c"].sample(frac=1, random_state=3)
    found = comparison.compare_all(comparison.resample(tables, draws=200, seed=1), ["macro_auroc", "macro_f1"])
    assert list(found.loc["macro_auroc"].index) == [("a", "b"), ("a", "c"), ("b", "c")]
    pair = compare(tables["a"], tables["b"], ["macro_f1"], draws=200, seed=1).loc["macro_f1"]
    assert found.loc[("macro_f1", "a", "b"), ["difference", "low", "high"]].tolist() == pytest.approx(
        pair[["difference", "low", "high"]].tolist()
    )
    assert found.loc[("macro_auroc", "b", "c"), "difference"] == 0
    assert found.loc[("macro_auroc", "b", "c"), "p_holm"] == 1
    same = found.loc["macro_auroc"]
    assert same["p_holm"].to_numpy() == pytest.approx(bootstrap.holm(same["p"].to_numpy()))
    assert same.loc[("a", "b"), "p_holm"] < 0.05


def test_errors_by_hand():
    rows = [(name, {name: 1.0}) for name in CLASSES]
    rows += [("Effusion", {"Mass": 0.52, "Effusion": 0.48}), ("Mass", {"Nodule": 0.99, "Mass": 0.01})]
    table = labelled([label for label, _ in rows])
    for name in CLASSES:
        table[name] = [scores.get(name, 0.0) for _, scores in rows]
    table[list(PRESENT)] = 0.5
    errors = metrics.confident_errors(table)
    assert errors[["label", "predicted"]].to_numpy().tolist() == [["Mass", "Nodule"], ["Effusion", "Mass"]]
    assert errors["probability"].tolist() == [0.99, 0.52]


def test_all_models_of_the_study_take_less_than_a_minute_of_one_core():
    table = predictions_table(images=1727, patients=900)
    started = time.process_time()
    drawn = comparison.resample(dict.fromkeys(range(3), table), draws=2000)
    for ask in (comparison.summary, comparison.compare_all):
        ask(drawn)
    comparison.per_class(drawn, model=0)
    assert 3 * (time.process_time() - started) < 15

"""The model card and the data sheet say what the computed files say, and nothing else."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from benchmarks import describe_nih_9k
from tables import predictions_table

from chestxray.config import CLASSES, MODELS, REFERENCE, StudyError
from chestxray.evaluation import calibration, comparison, operating_points, subgroups
from chestxray.pipeline import documents
from chestxray.plots import style


def people(table):
    patient = table["patient"].astype(int)
    rng = np.random.default_rng(0)
    return table.assign(
        sex=np.where(patient % 2, "F", "M"), age=20 + patient % 70, follow_up=rng.integers(0, 4, len(table))
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder with the files that every run leaves, made by the functions that the notebook calls."""
    folder = tmp_path_factory.mktemp("results")
    valid, test = people(predictions_table(seed=1)), people(predictions_table(seed=2))
    points = operating_points.choose(valid)
    tables = {
        "metrics": comparison.summary(comparison.resample(dict.fromkeys(MODELS, test), draws=10)),
        "per_class": comparison.per_class(comparison.resample({"ensemble": test}, draws=10)),
        "shares": comparison.at_shares(test, 1.0, draws=10),
        "calibration": calibration.findings_table(valid, test, draws=10),
        "operating_points": points,
        "operating_test": operating_points.measure(test, points, draws=10),
        "groups": subgroups.measure(test, points, draws=10),
    }
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", float_format="%.6f")
    manifest = pd.concat([valid.assign(split="train"), valid.assign(split="valid"), test.assign(split="test")])
    manifest["age"] = manifest["age"].astype("Int64")
    manifest["balanced_test"] = manifest["split"].eq("test") & (manifest.index < 70)
    boxes = pd.DataFrame({"image": [test["image"][0], "absent.png"], "finding": ["Mass", "Mass"]})
    sizes = {"images": 123, "patients": 45}
    summary = {"dataset": "nih_9k", "profile": "cpu", "seed": 1, "draws": 10}
    summary |= {"single_label_test": sizes, "all_test_images": {"images": 678, "patients": 90}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "data.json").write_text(json.dumps(documents.data_facts(manifest, boxes)))
    for name in MODELS:
        (folder / name).mkdir()
        run = {
            "weights": 1234567,
            "members": ["cnn", "dense"],
            "classes": "head on the concatenation",
            "key": "k",
            "data_fingerprint": "f",
        }
        run["versions"] = {"tensorflow": "2", "keras": "3"}
        (folder / name / "run.json").write_text(json.dumps(run))
    return folder


def test_the_documents_hold_the_figures_of_the_files(results):
    found = documents.render(results)
    card = found["MODEL_CARD.md"]
    metrics = pd.read_csv(results / "metrics.csv", index_col=["model", "metric"])
    assert style.interval(metrics.loc[("ensemble", "macro_auroc")]) in card
    shares = pd.read_csv(results / "shares.csv", index_col=["shares", "metric"])
    row = [style.interval(shares.loc[("sample", name)]) for name in ("balanced_accuracy", "accuracy_sample")]
    assert f"| `sample` shares | {' | '.join(row)} | " in card
    for phrase in (
        "1,234,567 weights",
        "1 CNN, 0 Dense",
        "123 single-label images of 45 patients",
        "`classes` their head on",
    ):
        assert phrase in card
    groups_table = pd.read_csv(results / "groups.csv", index_col=["column", "group", "finding", "metric"])
    assert style.interval(groups_table.loc[("sex", "F", "mean", "auroc")]) in card
    for heading in ("Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data"):
        assert f"## {heading}" in card
    for text in found.values():
        assert not re.search(r"\bnan\b|[{}]|\n\n\n", text), re.search(r"\bnan\b|[{}]|\n\n\n", text)


def test_the_documents_change_with_the_files(results, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(results, copy)
    facts = json.loads((copy / "data.json").read_text())
    facts["splits"]["train"]["selected"]["Mass"] = 98765
    (copy / "data.json").write_text(json.dumps(facts))
    assert "98,765" in documents.render(copy)["DATA_SHEET.md"]
    (copy / "groups.csv").unlink()
    with pytest.raises(StudyError, match=r"copy/groups\.csv: cannot be read .*; run stages 4 and 5"):
        documents.render(copy)


def test_facts_are_counted(results):
    facts = json.loads((results / "data.json").read_text())
    test = predictions_table(seed=2)
    assert facts["splits"]["test"]["images"] == len(test)
    assert facts["splits"]["test"]["selected"]["Mass"] == (test["label"] == "Mass").sum()
    assert facts["splits"]["test"]["any_label"]["No_finding"] == (test["findings"] == "No Finding").sum()
    assert facts["boxed_images"] == 1
    assert facts["balanced_test"] == 70


@pytest.mark.skipif(not (REFERENCE / "data.json").exists(), reason="the committed reference has no facts yet")
@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_the_committed_documents_follow_from_the_reference(name):
    assert (REFERENCE.parent / name).read_text("utf-8") == documents.render(REFERENCE)[name], (
        "run chestxray maintain stamp"
    )


def test_every_class_has_a_row_in_the_data_sheet(results):
    sheet = documents.render(results)["DATA_SHEET.md"]
    for name in CLASSES:
        assert f"| {name.replace('_', ' ')}, selected | " in sheet


def test_the_data_sheet_says_what_nih_9k_over_represents(nih):
    assert describe_nih_9k.markdown(nih) in (REFERENCE.parent / "DATA_SHEET.md").read_text("utf-8")

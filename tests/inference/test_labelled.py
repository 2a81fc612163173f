"""Metrics of a labelled folder: those of scikit-learn on what `predict` writes, and what labels can't tell, said."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_rows, write_table
from PIL import Image
from sklearn.metrics import average_precision_score, balanced_accuracy_score, confusion_matrix, roc_auc_score

from chestxray.__main__ import main
from chestxray.config import ALL_LABELS, CLASSES, SIX_FINDINGS, StudyError
from chestxray.evaluation import posterior
from chestxray.images import input_check
from chestxray.inference import batch, engines, interpretation, labelled, reader
from chestxray.inference.interpretation import Interpretation, OperatingPoint

POINTS = {name: OperatingPoint(0.5, 0.5, 0.8, 0.5, 9, 3) for name in SIX_FINDINGS}


class Greys(engines.Engine):
    """Scores out of a radiograph's pixels by fixed weights."""

    name, side = "fixed", 16

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        weights = np.random.default_rng(7).normal(0, 0.3, (self.side**2, len(ALL_LABELS) + len(CLASSES)))
        weights -= weights.mean(axis=0)
        logits = (images.reshape(len(images), -1) / 255 - 0.5) @ weights
        scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
        found = {"findings": scores[:, : len(ALL_LABELS)], "classes": scores[:, len(ALL_LABELS) :]}
        return found | {f"member_{name}": values[:, None] for name, values in found.items()}


@pytest.fixture
def model(monkeypatch) -> reader.Reader:
    """What `reader.load` gives here: quick, and with operating points."""
    meaning = Interpretation(np.ones(6), np.zeros(6), POINTS)
    made = reader.Reader(Greys(), meaning, input_check.committed())
    monkeypatch.setattr(reader, "load", lambda *_: made)
    return made


def relabel(raw: Path, finding, images: int = 60, patients: int | None = None) -> Path:
    """Write the table anew: the finding of a row, and fewer patients where asked."""
    rows = tiny_rows(images)
    for number, row in enumerate(rows):
        row[1] = finding(number) if callable(finding) else finding
        row[3] = str(number % patients) if patients else row[3]
    write_table(raw, rows)
    return raw


def independent(table: pd.DataFrame, above: dict[str, np.ndarray]) -> dict[tuple[str, str], float]:
    """Every metric by scikit-learn; `table` is that of `predict` with `Finding Labels`."""
    named = table["Finding Labels"].str.replace("No Finding", "No_finding")
    found = {}
    for name in SIX_FINDINGS:
        truth = named.str.split("|").map(lambda there, name=name: name in there)
        found[name, "auroc"] = roc_auc_score(truth, table[f"{name}_present"])
        found[name, "average_precision"] = average_precision_score(truth, table[f"{name}_present"])
        tn, fp, fn, tp = confusion_matrix(truth, above[name][table.index]).ravel()
        found |= {(name, "sensitivity"): tp / (tp + fn), (name, "specificity"): tn / (tn + fp)}
    found["macro", "macro_auroc"] = np.mean([found[name, "auroc"] for name in SIX_FINDINGS])
    alone = named.isin(CLASSES)
    scores, truth = table.loc[alone, list(CLASSES)], named[alone]
    guess = np.array(CLASSES)[scores.to_numpy().argmax(axis=1)]
    areas = [roc_auc_score(truth == name, scores[name]) for name in CLASSES]
    return found | {
        ("single-label", "balanced_accuracy"): balanced_accuracy_score(truth, guess),
        ("single-label", "macro_auroc"): np.mean(areas),
    }


def compare(folder: Path, model: reader.Reader, points, out: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """`evaluate` against scikit-learn on the table of `predict`; returns both tables and who is above its point."""
    measured = labelled.measure(labelled.predict(folder, model).table)
    batch.predict_files([folder / "images"], out, model)
    named = pd.read_csv(next(folder.glob("Data_Entry*")), index_col=False, dtype={"Patient ID": str})
    predicted = pd.read_csv(out).assign(**{"Image Index": lambda table: table["image"].str.split("/").str[-1]})
    table = predicted.merge(named[["Image Index", "Finding Labels", "Patient ID"]])
    above = {name: (table[f"{name}_present"] >= point.threshold).to_numpy() for name, point in points.items()}
    expected = independent(table, above)
    assert len(table) == len(list((folder / "images").iterdir())) and len(expected) == 27
    for key, value in expected.items():
        assert abs(measured.loc[key, "estimate"] - value) < 1e-9, key
    return measured, table, above


def test_every_metric_and_interval_is_the_independent_one(make_raw, model, tmp_path):
    measured, table, above = compare(make_raw(images=90), model, POINTS, tmp_path / "p.csv")
    patients, names = table["Patient ID"].to_numpy(), table["Patient ID"].unique()
    rows = [np.flatnonzero(patients == name) for name in names]
    truth, scores = table["Finding Labels"].eq("Mass").to_numpy(), table["Mass_present"].to_numpy()
    rng, drawn = np.random.default_rng(11), []
    for _ in range(300):
        taken = np.concatenate([rows[k] for k in rng.integers(len(rows), size=len(rows))])
        t, s, reached = truth[taken], scores[taken], above["Mass"][taken]
        if t.any():
            ranks = roc_auc_score(t, s), average_precision_score(t, s)
            drawn.append([*ranks, reached[t].mean(), 1 - reached[~t].mean()])
    for metric, values in zip(labelled.METRICS, np.transpose(drawn), strict=True):
        interval = measured.loc["Mass", metric][["low", "high"]].astype(float)
        # From 300 draws the 2.5 % point is known to a sixth of their standard deviation.
        np.testing.assert_allclose(interval, np.percentile(values, [2.5, 97.5]), atol=0.5 * values.std())
        assert values.std() > 0.02
    assert measured.loc["Mass", "auroc"][["n_images", "n_patients", "n_positive"]].tolist() == [90, 30, 9]
    assert measured.loc["Effusion", "auroc"][["n_negative", "prevalence"]].tolist() == [72, 0.2]


def test_real_radiographs_give_what_scikit_learn_gives(nih, model, tmp_path):
    listed = (nih / "train_val_list.txt").read_text().split()  # the test list chooses nothing, and tests nothing here
    named = pd.read_csv(nih / "Data_Entry_2017_v2020.csv", index_col=False)
    own = named[
        named["Image Index"].isin(listed) & named["Image Index"].map(lambda name: (nih / "images" / name).exists())
    ]
    own = own.groupby(own["Finding Labels"].where(own["Finding Labels"].isin(("No Finding", *SIX_FINDINGS)))).head(3)
    (tmp_path / "own" / "images").mkdir(parents=True)
    own.to_csv(tmp_path / "own" / "Data_Entry_2017.csv", index=False)
    for name in own["Image Index"]:
        (tmp_path / "own" / "images" / name).symlink_to((nih / "images" / name).resolve())
    compare(tmp_path / "own", model, POINTS, tmp_path / "p.csv")


@pytest.mark.parametrize(
    ("finding", "patients", "empty", "reasons"),
    [
        pytest.param(
            "Mass", None, ["Mass auroc", "Nodule auroc"], ["no image without Mass", "no image with Nodule"], id="one"
        ),
        pytest.param(
            lambda number: "Mass|Nodule" if number % 2 else "Mass",
            None,
            ["Mass specificity"],
            ["no image without Mass"],
            id="all",
        ),
        pytest.param(
            lambda number: "Mass" if number % 2 else "Nodule",
            2,
            [],
            ["only one patient with Mass"],
            id="two",
        ),
    ],
)
def test_what_labels_cannot_tell_is_empty_with_the_reason(tiny_raw, model, finding, patients, empty, reasons):
    measured = labelled.measure(labelled.predict(relabel(tiny_raw, finding, patients=patients), model).table)
    undefined = {" ".join(key) for key in measured.index[measured["estimate"].isna()]}
    assert set(empty) <= undefined and "Mass sensitivity" not in undefined
    assert set(reasons) <= set(labelled.reasons(measured))
    assert measured.loc["Mass", "auroc"][["low", "high"]].isna().all()
    assert (measured["estimate"].notna() | measured["note"].ne("")).all()


def test_a_model_without_operating_points_and_one_class_has_nothing_to_measure(tiny_raw, model):
    model.interpretation = interpretation.uncalibrated()
    some = labelled.measure(labelled.predict(tiny_raw, model).table)
    assert some.loc["Mass", "auroc"]["estimate"] > 0 and labelled.NO_POINT in labelled.reasons(some)
    with pytest.raises(
        StudyError, match=r"nothing can be measured: no image with Atelectasis; .*no image without Mass"
    ):
        labelled.measure(labelled.predict(relabel(tiny_raw, "Mass"), model).table)


def test_tiffs_of_12_bits_measure_as_those_of_8(tiny_raw, model):
    expected = labelled.measure(labelled.predict(tiny_raw, model).table)
    for path in (tiny_raw / "images").iterdir():  # the darkest use 11 bits, and are no brighter for that
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 16 + 8).save(path.with_suffix(".tif"))
        path.unlink()  # the table still names PNGs
    found = labelled.predict(tiny_raw, model)
    assert any("12-bit greys" in line for line in found.lines)
    pd.testing.assert_frame_equal(labelled.measure(found.table), expected)


def test_a_flat_folder_with_own_labels_in_its_one_table(tiny_raw, model, tmp_path, monkeypatch, capsys):
    (flat := tmp_path / "flat").mkdir()
    for path in (tiny_raw / "images").iterdir():
        shutil.copy(path, flat)
    rows = [[row[0], row[1].replace("Effusion", "fluid"), row[3]] for row in tiny_rows()]
    rows += [["other.png", "fracture", "99"]]
    (flat / "mine.csv").write_text("".join(";".join(row) + "\n" for row in [["image", "labels", "patient"], *rows]))
    (tmp_path / "map.csv").write_text("own label,study label\nfluid,Effusion\nfracture,\n")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--dataset", "flat", "--labels", "map.csv", "--out", "own.csv"]) == 0
    assert "map.csv, which leaves out 1 rows" in capsys.readouterr().out
    assert main(["evaluate", "--dataset", str(tiny_raw), "--out", "nih.csv"]) == 0
    assert Path("own.csv").read_text() == Path("nih.csv").read_text()
    capsys.readouterr()
    assert main(["evaluate", "--dataset", str(tiny_raw), "--out", "rare.csv", "--prevalence", "nih"]) == 0
    table = labelled.predict(tiny_raw, model).table.query("selected")
    guess = (table[list(CLASSES)] * posterior.read_shares("nih").values).idxmax(axis=1)
    before, after = (pd.read_csv(name).set_index(["finding", "metric"]) for name in ("nih.csv", "rare.csv"))
    pd.testing.assert_frame_equal(after.drop(("single-label", "accuracy")), before)  # equal shares unless told
    assert after.loc["single-label", "accuracy"]["estimate"] == pytest.approx((guess == table["label"]).mean())
    said = capsys.readouterr().out
    assert "balanced accuracy at equal class shares" in said and "at class shares nih (Atelectasis 0.050, " in said
    assert main(["evaluate", "--dataset", str(tiny_raw), "--prevalence", "folder"]) == 2
    assert main(["evaluate", "--dataset", "flat", "--out", "own.csv"]) == 0
    assert "unknown labels: 'fluid' (12 rows)" in capsys.readouterr().out


def test_the_command_names_what_it_leaves_out_and_only_reads_the_folder(tiny_raw, model, tmp_path, capsys, monkeypatch):
    files = sorted((tiny_raw / "images").iterdir())
    for path in files[:4]:
        path.write_bytes(b"no image")
    files[4].unlink()
    files[4].symlink_to(tmp_path / "nowhere.png")
    shutil.copy(files[9], tiny_raw / "images" / "unlisted.png")
    before = {path: path.lstat().st_mtime_ns for path in tiny_raw.rglob("*")}
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--dataset", str(tiny_raw), "--out", "deep/e.csv"]) == 1
    said = capsys.readouterr().out
    assert "55 radiographs of 19 patients" in said and "5 files can't be read:" in said and "unlisted.png" in said
    assert [name.name in said for name in files[:5]] == [True, True, False, False, True]
    table = pd.read_csv("deep/e.csv").set_index(["finding", "metric"])
    mass = table.loc["Mass", "auroc"]
    assert f"{mass['estimate']:.3f} ({mass['low']:.3f}–{mass['high']:.3f})" in said and mass["n_images"] == 55
    assert {path: path.lstat().st_mtime_ns for path in tiny_raw.rglob("*")} == before
    for path in files:
        path.unlink()
        path.write_bytes(b"no image")
    assert main(["evaluate", "--dataset", str(tiny_raw)]) == 2
    assert "none of its 60 radiographs can be read" in capsys.readouterr().err and not Path("evaluation.csv").exists()


@pytest.mark.parametrize(
    ("dataset", "out", "message"),
    [
        ("nowhere", "e.csv", "nowhere: no such folder"),
        ("tiny", "images", "images: is a folder"),
        ("tiny", "e.xlsx", "give a name that ends in .csv"),
        ("tiny", "tiny/e.csv", "lies in .*tiny, which is only read"),
    ],
)
def test_wrong_places_are_refused_before_a_model_is_loaded(
    tiny_raw, tmp_path, monkeypatch, capsys, dataset, out, message
):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    monkeypatch.setattr(reader, "load", lambda *_: pytest.fail("loaded"))
    assert main(["evaluate", "--dataset", dataset, "--out", out]) == 2
    assert pd.Series(capsys.readouterr().err).str.contains(message).all()

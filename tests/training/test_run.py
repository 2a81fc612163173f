"""Runs: what a model folder holds, when a fit is made anew, and how long its epochs are."""

import json

import keras
import numpy as np
import pandas as pd
import pytest
from fits import fit_plain, plain, start, study_at, with_classes
from sklearn.metrics import roc_auc_score

from chestxray.config import ALL_LABELS, CLASSES, PRESENT, SIX_FINDINGS, StudyError
from chestxray.data import manifest
from chestxray.evaluation.predictions import COLUMNS
from chestxray.training import run as runs
from chestxray.training.callbacks import HISTORY_COLUMNS, Seed
from chestxray.training.run import Run
from chestxray.training.samples import batches, load_findings, predict


def test_a_folder_is_complete(prepared_study):
    run = Run(prepared_study, "small", {"strength": 1.0})
    model = with_classes(fit_plain(run))
    saved = run.finish(model, extra={"classes": "mean"})
    names = ["history.csv", "model.keras", "predictions_test.csv", "predictions_valid.csv", "run.json"]
    left = sorted(path.name for path in run.folder.iterdir() if path.name != "logs")
    assert left == ["checkpoint-1-fit.npz", *names]
    tables = {split: pd.read_csv(run.folder / f"predictions_{split}.csv") for split in ("valid", "test")}
    for split, table in tables.items():
        samples = load_findings(prepared_study, split)
        assert list(table.columns) == [*COLUMNS, *CLASSES, *PRESENT]
        assert table["image"].tolist() == samples.table["image"].tolist()
        outputs = saved.predict_on_batch(samples.x[samples.rows])
        six = outputs["findings"][:, [ALL_LABELS.index(name) for name in SIX_FINDINGS]]
        assert np.allclose(table[list(PRESENT)], six, atol=1e-5)
        assert np.allclose(table[list(CLASSES)], outputs["classes"], atol=1e-5)
    record = json.loads((run.folder / "run.json").read_text())
    areas = [
        roc_auc_score(tables["valid"]["findings"].str.contains(name), tables["valid"][f"{name}_present"])
        for name in SIX_FINDINGS
    ]
    assert record["valid_six_finding_auroc"] == pytest.approx(np.mean(areas), abs=1e-6)
    history = pd.read_csv(run.folder / "history.csv")
    assert list(history.columns) == HISTORY_COLUMNS and history["epoch"].tolist() == [1, 2, 3]
    assert record["best_epoch"] == {"fit": history["val_six_finding_auroc"].idxmax() + 1}
    assert record["data_fingerprint"] == manifest.fingerprint(prepared_study.paths)
    assert record["prepared_fingerprint"] == manifest.prepared_fingerprint(prepared_study.paths)
    known = {"model": "small", "dataset": "tiny", "seed": 2024, "classes": "mean", "weights": model.count_params()}
    assert known.items() <= record.items() and record["versions"] == runs.versions()
    assert record["parameters"] == {"profile": "quick", "strength": 1.0} and list(record["phases"]) == ["fit"]


def test_a_finished_fit_is_not_fitted_again(prepared_study, monkeypatch, capsys):
    run = Run(prepared_study, "small", {})
    model = fit_plain(run)
    run.finish(with_classes(model))
    printed, key = capsys.readouterr().out, json.loads((run.folder / "run.json").read_text())["key"]
    monkeypatch.setattr(keras.Model, "train_step", lambda *_: pytest.fail("a step"))
    again = Run(prepared_study, "small", {})
    loaded = fit_plain(again)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True))
    pd.testing.assert_frame_equal(again.history, run.history)
    assert [line.split(", ")[0] for line in printed.splitlines()] == capsys.readouterr().out.splitlines()
    assert (run.folder / "run.json").exists(), "the folder stays finished"
    again.finish(with_classes(loaded))
    assert json.loads((run.folder / "run.json").read_text())["key"] == key


def test_what_a_fit_depends_on_makes_a_new_one(prepared_study):
    """Each change by itself; nothing but an epoch is fitted."""
    root, other = prepared_study.paths.root, keras.optimizers.AdamW
    fit_plain(Run(prepared_study, "small", {}), epochs=1)

    def first(seed=2024, rate=1e-2, parameters=None, model=plain, change=lambda train: train, epochs=1, **overrides):
        study = study_at(root, **{"steps_per_epoch": 0} | overrides)
        run = Run(runs.Study(study.paths, study.profile, seed), "small", parameters or {})
        net = model()
        net.compile(other(rate), "binary_crossentropy")
        train, valid = (load_findings(study, split) for split in ("train", "valid"))
        return run.phase("fit", net, change(train), valid, epochs).first

    def regularised():
        net = plain()
        net.get_layer("findings").kernel_regularizer = keras.regularizers.L2(0.1)
        return net

    def begun_elsewhere():
        net = plain()
        net.get_layer("findings").bias.assign(np.full(15, 0.5))
        return net

    assert first() == 1
    changed = {
        "rate": {"rate": 1e-3},
        "schedule": {"rate": keras.optimizers.schedules.CosineDecay(1e-2, 10)},
        "units": {"model": lambda: plain(units=9)},
        "a layer's setting": {"model": lambda: plain(factor=1 / 128)},
        "regularizer": {"model": regularised},
        "weights at the start": {"model": begun_elsewhere},
        "seed": {"seed": 7},
        "parameters": {"parameters": {"strength": 2}},
        "batch size": {"batch_size": 4},
        "steps": {"steps_per_epoch": 2},
        "epochs": {"epochs": 2},
        "fewer samples": {"change": lambda train: train.take(np.arange(len(train) - 1))},
        "targets": {"change": lambda train: train.with_targets(1 - train.y)},
        "features": {"change": lambda train: train.with_inputs(255 - train.x[train.rows])},
    }
    assert {name: first(**change) for name, change in changed.items()} == dict.fromkeys(changed, 0)
    assert first() == 1, "the checkpoint stays until an epoch replaces it"
    with prepared_study.paths.augmented_rows.open("a") as rows:
        rows.write("\n")
    assert first() == 0, "prepared data"


def test_another_second_phase_starts_from_the_first(prepared_study, monkeypatch):
    def fit(rate, second="second"):
        run, model = Run(prepared_study, "two", {}), plain()
        train, valid = (load_findings(prepared_study, split) for split in ("train", "valid"))
        for name, rate_here in (("first", 1e-2), (second, rate)):
            model.compile(keras.optimizers.AdamW(rate_here), "binary_crossentropy")
            start(model, run.phase(name, model, train, valid, 1))
        run.finish(with_classes(model))
        return run, model.get_weights()

    _, fresh = fit(1e-3)
    _, other = fit(1e-4)
    _, again = fit(1e-3)
    assert all(np.array_equal(a, b) for a, b in zip(fresh, again, strict=True))
    assert not np.array_equal(fresh[0], other[0])
    run, _ = fit(1e-3, "renamed")
    assert sorted(path.name for path in run.folder.glob("*.npz")) == [
        "checkpoint-1-first.npz",
        "checkpoint-2-renamed.npz",
    ]


def test_a_cell_that_is_run_again_begins_where_it_began(prepared_study):
    run = Run(prepared_study, "cells", {})
    model = fit_plain(run, epochs=2)
    first = model.get_weights()
    slower = fit_plain(run, epochs=2, rate=1e-3, model=model).get_weights()
    assert run.history["epoch"].tolist() == [1, 2] and not np.array_equal(first[0], slower[0])
    again = fit_plain(run, epochs=2, model=model).get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert [path.name for path in run.folder.glob("*.npz")] == ["checkpoint-1-fit.npz"]


def test_epochs_are_passes_or_shorter_and_the_data_go_on(prepared_study):
    train = load_findings(prepared_study, "train")
    assert Run(prepared_study, "whole", {}).steps(train) == len(train) // 8 > 5
    study = study_at(prepared_study.paths.root, steps_per_epoch=5)
    run, model = Run(study, "short", {}), plain()
    model.compile("adam", "binary_crossentropy")
    phase = run.phase("fit", model, train, train, 3)
    assert (phase.steps, phase.first) == (5, 0)
    phase.callbacks.append(keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: 1 / (2 - epoch)))
    with pytest.raises(ZeroDivisionError):  # the third epoch is interrupted
        start(model, phase)
    left = run.phase("fit", model, train, train, 3)  # the cell is run again
    expected = [x.numpy() for x, _ in batches(train, 8, study.seed).take(15)][10:]
    assert left.first == 2
    assert all(np.array_equal(x, y) for (x, _), y in zip(left.batches.take(5), expected, strict=True))
    few = train.take(np.array([0, 1]))
    with pytest.raises(StudyError, match=r"^2 training samples are fewer than one batch of 8; lower batch_size or add"):
        run.phase("fit", model, few, train, 3)


def test_predictions_in_batches_are_those_of_the_model(prepared_study):
    valid, model = load_findings(prepared_study, "valid"), with_classes(plain())
    whole, parts = model.predict_on_batch(valid.x[valid.rows]), predict(model, valid, batch_size=7)
    assert all(np.allclose(parts[name], whole[name], atol=1e-6) for name in ("findings", "classes"))


def test_an_interrupted_fit_is_not_finished(prepared_study, monkeypatch):
    """As Jupyter's stop button interrupts a cell, and the next cells are run."""
    whole = Run(prepared_study, "whole", {})
    whole.finish(with_classes(fit_plain(whole)))
    run = Run(prepared_study, "small", {})
    model = plain()
    epochs = []

    def stop(self, epoch, logs=None):
        epochs.append(epoch)
        if len(epochs) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Seed, "on_epoch_begin", stop)
        fit_plain(run, model=model)
    with pytest.raises(StudyError, match="phase 'fit' ended after epoch 1 of 3; run its cell again"):
        run.finish(with_classes(model))
    assert not (run.folder / "run.json").exists()
    run.finish(with_classes(fit_plain(run, model=model)))
    tables = [pd.read_csv(folder / "predictions_valid.csv")[list(PRESENT)] for folder in (run.folder, whole.folder)]
    assert tables[0].equals(tables[1])


def test_cells_run_without_the_fit_or_after_the_end_lose_nothing(prepared_study):
    run = Run(prepared_study, "small", {})
    finished = run.finish(with_classes(fit_plain(run)))
    held = {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    with pytest.raises(StudyError, match="nothing was fitted here; run the cells that fit first"):
        Run(prepared_study, "small", {}).finish(with_classes(plain()))
    with pytest.raises(StudyError, match="the model's output is no 15 findings"):
        fit_plain(run, model=finished)
    assert {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()} == held


@pytest.mark.parametrize("damage", [b"", b"text", None], ids=["empty", "text", "cut off"])
def test_a_damaged_checkpoint_is_named(prepared_study, damage):
    run = Run(prepared_study, "small", {})
    fit_plain(run)
    path = run.folder / "checkpoint-1-fit.npz"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    again = Run(prepared_study, "small", {})
    with pytest.raises(StudyError, match=r"checkpoint-1-fit\.npz: damaged checkpoint .*; delete it and run again"):
        fit_plain(again)
    path.unlink()
    again.finish(with_classes(fit_plain(again)))

"""The committed reference: complete, small, and the same answers as the run that it comes from."""

import json

import keras
import numpy as np
import pandas as pd
import pytest
import small_models

from chestxray.config import MODELS, REFERENCE, StageMissing, StudyError, open_study
from chestxray.data import manifest
from chestxray.evaluation import comparison, predictions
from chestxray.pipeline import reference
from chestxray.training import model_file


def finish(study):
    """Leave what stages 4 and 5 leave, with a small network in the place of the ensemble."""
    for model in MODELS:
        folder = study.paths.saved(model)
        folder.mkdir(parents=True)
        for name in reference.MODEL_FILES:
            (folder / name).write_text(f"{model} {name}")
    net = small_models.cnn(study.profile.image_size)
    model_file.save_model(net, study.paths.saved("ensemble") / "model.keras")
    study.paths.results.mkdir(parents=True)
    (study.paths.results / "metrics.csv").write_text("model,metric\n")
    (study.paths.results / ".stages.json").write_text("{}")
    return net


def committed_columns():
    """The columns of the committed predictions; none where there is no reference."""
    path = REFERENCE / "ensemble" / "predictions_test.csv"
    return path.open().readline().strip().split(",") if path.exists() else []


def test_it_holds_what_the_run_left(prepared_study, tmp_path):
    net = finish(prepared_study)
    target = tmp_path / "reference"
    target.mkdir()
    (target / "old.csv").write_text("of another run")
    count, size, departure = reference.publish(prepared_study, target)
    written = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    models_files = {f"{model}/{name}" for model in MODELS for name in reference.MODEL_FILES}
    assert written == {"metrics.csv", "ensemble.keras"} | models_files
    assert (count, size) == (len(written), (target / "ensemble.keras").stat().st_size)
    assert (target / "cnn" / "run.json").read_text() == "cnn run.json"
    x = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), dtype=np.uint8)
    loaded = keras.models.load_model(target / "ensemble.keras")
    assert np.allclose(loaded(x, training=False)["classes"], net(x, training=False)["classes"], atol=2e-3)
    assert departure < 2e-3


def test_an_unfinished_run_leaves_the_reference_alone(prepared_study, tmp_path):
    finish(prepared_study)
    (prepared_study.paths.saved("cnn") / "run.json").unlink()
    target = tmp_path / "reference"
    target.mkdir()
    (target / "metrics.csv").write_text("before")
    with pytest.raises(StageMissing, match=r"cnn/run\.json is missing"):
        reference.publish(prepared_study, target)
    assert [path.name for path in target.iterdir()] == ["metrics.csv"]


def made_from(study, folder, fingerprint=None):
    """A reference that says which data it comes from."""
    run = {"dataset": "tiny", "parameters": {"profile": "quick"}, "seed": 1, "key": "k", "members": []}
    run["prepared_fingerprint"] = fingerprint or manifest.prepared_fingerprint(study.paths)
    for model in MODELS:
        (folder / model).mkdir(parents=True)
        for name in reference.MODEL_FILES:
            (folder / model / name).write_text(json.dumps(run) if name == "run.json" else f"{model} {name}")
    (folder / "ensemble.keras").write_text("network")
    return folder


def test_it_can_be_laid_out_again_as_models(prepared_study, tmp_path):
    source = made_from(prepared_study, tmp_path / "reference")
    assert reference.restore(prepared_study, source) == 4 * len(MODELS) + 1
    for model in MODELS:
        for name in reference.MODEL_FILES:
            assert (prepared_study.paths.saved(model) / name).read_bytes() == (source / model / name).read_bytes()
    assert (prepared_study.paths.saved("ensemble") / "model.keras").read_text() == "network"
    assert not (prepared_study.paths.saved("cnn") / "model.keras").exists()
    assert reference.restore(prepared_study, source) == 0


def test_members_are_laid_out_as_the_ensemble_holds_them(prepared_study, tmp_path):
    source = made_from(prepared_study, tmp_path / "reference")
    members = [small_models.cnn(32), small_models.dense(32)]
    model_file.save_model(small_models.ensemble(members), source / "ensemble.keras", half=True)
    run = json.loads((source / "ensemble" / "run.json").read_text())
    (source / "ensemble" / "run.json").write_text(json.dumps(run | {"members": ["cnn", "dense"]}))
    assert reference.restore(prepared_study, source) == 4 * len(MODELS) + 3
    x = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), dtype=np.uint8)
    said = [
        keras.models.load_model(prepared_study.paths.saved(name) / "model.keras", compile=False)(x, training=False)[
            "classes"
        ]
        for name in ("cnn", "dense")
    ]
    whole = keras.models.load_model(source / "ensemble.keras", compile=False)(x, training=False)["classes"]
    assert np.allclose(np.mean(said, axis=0), whole, atol=1e-6)
    assert not np.allclose(said[0], said[1], atol=1e-3)
    assert reference.restore(prepared_study, source) == 0


def test_it_is_not_laid_out_over_other_data_or_models(prepared_study, tmp_path):
    other = made_from(prepared_study, tmp_path / "other", "another")
    with pytest.raises(
        StudyError,
        match=r"reference is of other data, tiny with another; run stages 1 and 2 on tiny with --",
    ):
        reference.restore(prepared_study, other)
    source = made_from(prepared_study, tmp_path / "reference")
    mine = prepared_study.paths.saved("cnn") / "run.json"
    mine.parent.mkdir(parents=True)
    mine.write_text('{"key": "mine"}')
    with pytest.raises(StudyError, match=r"cnn/run\.json: of another fit; move it away"):
        reference.restore(prepared_study, source)
    assert mine.read_text() == '{"key": "mine"}'
    assert not prepared_study.paths.saved("dense").exists()


def test_phantoms_are_no_reference(tmp_path):
    with pytest.raises(StudyError, match="real radiographs"):
        reference.publish(open_study("phantom", "quick", 1), tmp_path)


@pytest.mark.skipif("Mass_present" not in committed_columns(), reason="no reference of models with two outputs")
class TestCommitted:
    """The reference in the repository agrees with itself."""

    def test_metrics_follow_from_the_predictions(self):
        metrics = pd.read_csv(REFERENCE / "metrics.csv", index_col=["model", "metric"])
        for model in MODELS:
            table = predictions.read_predictions(REFERENCE / model / "predictions_test.csv")
            found = comparison.evaluate(table, draws=2)["estimate"]
            for metric in ("macro_auroc", "balanced_accuracy", "macro_f1", "six_finding_auroc"):
                assert found[metric] == pytest.approx(metrics.loc[(model, metric), "estimate"], abs=5e-7)

    def test_members_were_the_best_on_validation(self):
        runs = {model: json.loads((REFERENCE / model / "run.json").read_text()) for model in MODELS}
        scores = {model: run["valid_six_finding_auroc"] for model, run in runs.items() if model != "ensemble"}
        assert set(runs["ensemble"]["members"]) == set(sorted(scores, key=scores.get)[-3:])
        assert len({run["data_fingerprint"] for run in runs.values()}) == 1

    def test_the_ensemble_is_small_and_loads(self):
        path = REFERENCE / "ensemble.keras"
        assert path.stat().st_size <= reference.LARGEST
        model = keras.models.load_model(path)
        assert {name: part.shape[1] for name, part in model.output.items()} == {"findings": 15, "classes": 7}

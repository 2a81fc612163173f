"""Runs: what a model folder holds, which epoch is chosen, and that a killed fit ends as an unbroken one does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from chestxray.training.fitting import predict_batches
from chestxray.training.recipe import Recipe
from sklearn.metrics import roc_auc_score

from chestxray import config, files
from chestxray.config import CLASSES, StudyError, open_study
from chestxray.data import augmentation, manifest
from chestxray.evaluation.metrics import mean_auroc
from chestxray.networks import transfer
from chestxray.training import fitting, model_file
from chestxray.training.run import Run
from chestxray.training.samples import (
    Samples,
    class_targets,
    load_augmented,
    load_findings,
    load_split,
    multilabel_classes,
)

FITTED = """
import os, signal, sys
from chestxray.training import fitting
sys.path += ["tests", "tests/training"]
from test_run import fit_pooled, fit_small

network, where, moment = sys.argv[1:]
go_on, predict = fitting.Fit.after_steps, fitting.predict_batches

def dying_step(self, epoch, before, step, *rest):
    # A checkpoint was written after step 3 of the small one, after each step of the pooled one.
    if (epoch, step) == (1, 5 if network == "small" else 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return go_on(self, epoch, before, step, *rest)

def dying_evaluation(*arguments, calls=[]):
    calls.append(1)
    if len(calls) == 2:  # epoch 2 is fitted and not yet saved
        os.kill(os.getpid(), signal.SIGKILL)
    return predict(*arguments)

if moment == "step":
    fitting.Fit.after_steps = dying_step
if moment == "evaluation":
    fitting.predict_batches = dying_evaluation
if network == "small":
    fit_small(where, checkpoint_steps=1000 if moment == "evaluation" else 3)
else:
    fit_pooled(where)
"""


def fit_apart(network, where, moment):
    """Fit the `small` or the `pooled` network in a process of its own, which dies at the moment."""
    command = [sys.executable, "-c", FITTED, network, str(where), moment]
    return subprocess.run(command, cwd=config.REPOSITORY, capture_output=True, text=True)


def small_net(size):
    """A transfer-like network with everything random in it: augmentation, dropout, BatchNorm."""
    pixels = keras.Input((size, size, 1))
    x = pixels
    for layer in augmentation.layers(1.0, seed=5, flip=True):
        x = layer(x)
    x = keras.layers.Rescaling(1 / 255)(x)
    x = keras.layers.Conv2D(4, 3, strides=2)(x)
    x = keras.layers.BatchNormalization(momentum=0.9)(x)
    x = keras.layers.Dropout(0.3)(keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(x)))
    return keras.Model(pixels, keras.layers.Dense(7, activation="softmax")(x))


def fit_small(dataset, name="small", epochs=4, checkpoint_steps=None, **changes):
    study = open_study(dataset, "quick", 2024, {"image_size": 32, "no_finding": 8, "batch_size": 8})
    run = Run(study, name, {"kind": "small"}, checkpoint_steps)
    model = small_net(32)
    settings = {"learning_rate": 3e-3, "batch_size": 8, "ema": 0.8, "mixup": 0.3, "label_smoothing": 0.1} | changes
    recipe = Recipe("fit", epochs, **settings)
    history = run.fit(model, recipe, load_augmented(study), load_split(study, "valid"))
    return run, history, run.finish(model)


def fit_pooled(folder):
    """Two epochs of four steps of a network as the study's, on noise; a checkpoint after each step."""
    folder = files.make_folder(Path(folder))
    keras.utils.set_random_seed(7)
    rng = np.random.default_rng(7)
    x, y = rng.integers(0, 256, (128, 80, 80, 1), "uint8"), rng.integers(0, 2, (128, 15)).astype("float32")
    samples = Samples(x, np.arange(128), y, None)
    layers = augmentation.layers(2.0, 7, flip=True)
    net = transfer.transfer("EfficientNetLite0", 80, augment=layers, pooling="blocks", weights=None)
    recipe = Recipe("fit", 2, 1e-3, loss="binary", ema=0.9, ema_restart=False)
    paths = fitting.StagePaths(folder / "checkpoint.npz", folder / "log", "", 1)
    fitting.Fit(net.findings, recipe, 128, lambda: (samples, samples), 7, paths).run()
    np.savez(folder / "weights.npz", *net.findings.get_weights())


def test_a_folder_is_complete(prepared_study):
    run, history, model = fit_small(prepared_study.paths.dataset)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "history.csv",
        "logs",
        "model.keras",
        "predictions_test.csv",
        "predictions_valid.csv",
        "run.json",
    ]
    record = json.loads((run.folder / "run.json").read_text())
    valid = pd.read_csv(run.folder / "predictions_valid.csv")
    single = valid[valid["selected"]]
    truth = class_targets(single["label"])
    areas = [roc_auc_score(truth[:, k], single[name]) for k, name in enumerate(CLASSES) if truth[:, k].any()]
    assert record["valid_macro_auroc"] == pytest.approx(np.mean(areas), abs=1e-6)
    assert record["data_fingerprint"] == manifest.fingerprint(prepared_study.paths)
    assert record["prepared_fingerprint"] == manifest.prepared_fingerprint(prepared_study.paths)
    assert record["seed"] == 2024 and record["versions"]["tensorflow"]
    # The kept weights are those of the best epoch.
    assert record["valid_macro_auroc"] == pytest.approx(history["val_macro_auroc"].max(), abs=1e-4)
    assert record["best_epoch"]["fit"] == history["val_macro_auroc"].idxmax() + 1
    test = pd.read_csv(run.folder / "predictions_test.csv")
    samples = load_split(prepared_study, "test", selected=False)
    assert test["image"].tolist() == samples.table["image"].tolist()
    assert test["balanced_test"].tolist() == samples.table["balanced_test"].tolist() and test["balanced_test"].any()
    again = np.concatenate([model(x, training=False) for x in samples.batches(16)])
    assert np.allclose(test[list(CLASSES)], again, atol=1e-5)


def test_a_finished_fit_is_fitted_again_only_if_the_data_are_prepared_otherwise(prepared_study, monkeypatch):
    monkeypatch.setattr(manifest, "fingerprint", lambda paths: "of the dataset")  # the same for each, as nih_9k's is
    _, history, model = fit_small(prepared_study.paths.dataset)
    monkeypatch.setattr(keras.Model, "fit", lambda *a, **k: pytest.fail("fitted again"))
    _, stored, loaded = fit_small(prepared_study.paths.dataset)
    pd.testing.assert_frame_equal(stored, history, check_dtype=False)
    assert all(np.array_equal(a, b) for a, b in zip(model.weights, loaded.weights, strict=True))
    with prepared_study.paths.augmented_rows.open("a") as rows:
        rows.write("\n")
    with pytest.raises(pytest.fail.Exception, match="fitted again"):
        fit_small(prepared_study.paths.dataset)


def test_other_parameters_are_fitted_anew(prepared_study):
    fit_small(prepared_study.paths.dataset)
    _, history, _ = fit_small(prepared_study.paths.dataset, learning_rate=1e-3, epochs=2)
    assert len(history) == 2


def fit_two_stages(dataset, second_rate):
    study = open_study(dataset, "quick", 2024, {"image_size": 32, "no_finding": 8, "batch_size": 8})
    run = Run(study, "two", {})
    model = small_net(32)
    train, valid = load_augmented(study), load_split(study, "valid")
    run.fit(model, Recipe("first", 2, 3e-3, 8), train, valid)
    run.fit(model, Recipe("second", 1, second_rate, 8), train, valid)
    run.finish(model)
    return (run.folder / "predictions_test.csv").read_text(), pd.read_csv(run.folder / "history.csv")


def test_another_second_stage_starts_from_the_first(prepared_study):
    dataset = prepared_study.paths.dataset
    fresh, history = fit_two_stages(dataset, 1e-3)
    fit_two_stages(dataset, 1e-4)
    again, same = fit_two_stages(dataset, 1e-3)
    assert again == fresh
    columns = ["stage", "epoch", "loss", "val_macro_auroc"]
    pd.testing.assert_frame_equal(same[columns], history[columns])


def test_a_run_with_fewer_stages_is_another(prepared_study):
    fit_two_stages(prepared_study.paths.dataset, 1e-3)
    study = open_study(prepared_study.paths.dataset, "quick", 2024, {"image_size": 32})
    run = Run(study, "two", {})
    model = small_net(32)
    train, valid = load_augmented(study), load_split(study, "valid")
    run.fit(model, Recipe("first", 2, 3e-3, 8), train, valid)
    run.finish(model)
    assert set(pd.read_csv(run.folder / "history.csv")["stage"]) == {"first"}


def history_text(folder):
    """`history.csv` without the seconds, which no two runs share."""
    rows = [line.split(",") for line in (folder / "history.csv").read_text().splitlines()]
    return [",".join(row[:-1]) for row in rows]


def test_a_killed_fit_ends_as_an_unbroken_one(prepared_study):
    folder = prepared_study.paths.saved("small")

    def fit(moment):
        return fit_apart("small", prepared_study.paths.dataset, moment)

    unbroken = fit("never")
    assert unbroken.returncode == 0 and "going on" not in unbroken.stdout, unbroken.stderr
    tables = {name: (folder / name).read_text() for name in ("predictions_valid.csv", "predictions_test.csv")}
    history = history_text(folder)
    for moment, where in [("evaluation", "after epoch 1 of 4\n"), ("step", r"after epoch 1 of 4, step 3 of ")]:
        shutil.rmtree(folder)
        killed = fit(moment)
        assert killed.returncode == -9, killed.stderr
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1-fit.npz", "history.csv", "logs"]
        assert history_text(folder) == history[:2]
        resumed = fit("never")
        assert resumed.returncode == 0 and f"fit: going on {where}" in resumed.stdout, resumed.stderr
        assert tables == {name: (folder / name).read_text() for name in tables}
        assert history_text(folder) == history
        assert len(list((folder / "logs" / "1-fit").iterdir())) == 2


@pytest.mark.long
def test_a_killed_fit_of_the_studys_network_ends_as_an_unbroken_one(tmp_path):
    """Large enough that the memory which is free depends on the moment: the gradients of one map may not."""

    def fit(name, moment):
        return fit_apart("pooled", tmp_path / name, moment)

    assert fit("unbroken", "never").returncode == 0
    assert fit("killed", "step").returncode == -9 and not (tmp_path / "killed" / "weights.npz").exists()
    resumed = fit("killed", "never")
    assert resumed.returncode == 0 and "fit: going on after epoch 1 of 2, step 1 of 4" in resumed.stdout, resumed.stderr
    one, other = (np.load(tmp_path / name / "weights.npz") for name in ("unbroken", "killed"))
    assert len(one.files) > 200 and all(np.array_equal(one[name], other[name]) for name in one.files)


@pytest.mark.parametrize("keep_start", [True, False])
def test_a_stage_that_only_spoils_may_leave_its_start(prepared_study, monkeypatch, keep_start):
    scores = iter([0.9, 0.5, 0.6] if keep_start else [0.5, 0.6])
    monkeypatch.setattr(fitting.Fit, "_score", lambda *_: next(scores))
    run = Run(prepared_study, "start", {})
    model = small_net(32)
    before = [w.numpy() for w in model.weights]
    train, valid = load_augmented(prepared_study), load_split(prepared_study, "valid")
    run.fit(model, Recipe("fit", 2, 3e-3, 8), train, valid, keep_start)
    kept = all(np.array_equal(a, b.numpy()) for a, b in zip(before, model.weights, strict=True))
    assert run.best["fit"] == ((0, 0.9) if keep_start else (2, 0.6)) and kept == keep_start


def test_samples_with_several_classes_may_choose_the_epoch(prepared_study):
    run = Run(prepared_study, "judged", {})
    model = small_net(32)
    train, valid = load_augmented(prepared_study), load_split(prepared_study, "valid")
    shown = multilabel_classes(load_findings(prepared_study, "valid"))
    assert len(shown) > len(valid) and shown.y.sum(axis=1).max() > 1
    history = run.fit(model, Recipe("fit", 3, 3e-3, 8), train, valid, judged_on=shown)
    scores = predict_batches(model, shown)
    usable = [k for k in range(len(CLASSES)) if 0 < shown.y[:, k].sum() < len(shown)]
    areas = [roc_auc_score(shown.y[:, k], scores[:, k]) for k in usable]
    assert history["val_macro_auroc"].max() == pytest.approx(np.mean(areas))
    assert run._stages[0]["judged_on"] == len(shown)


def test_a_head_on_cached_features_is_the_head_of_the_model(prepared_study):
    run = Run(prepared_study, "head", {})
    net = transfer.transfer("EfficientNetLite0", 32, weights=None)
    train, valid = load_split(prepared_study, "train"), load_split(prepared_study, "valid")
    before = [w.numpy() for w in net.backbone.weights]
    history = run.fit_head(net.features, net.head, Recipe("head", 3, 1e-2, 8), train, valid)
    assert all(np.array_equal(a, b) for a, b in zip(before, net.backbone.weights, strict=True))
    scores = predict_batches(net.classifier, valid)
    assert mean_auroc(valid.y, scores) == pytest.approx(history["val_macro_auroc"].max(), abs=1e-3)


def test_what_follows_frozen_blocks_is_fitted_on_their_cached_maps(prepared_study):
    def fit(views):
        run = Run(prepared_study, f"maps_{views}", {})
        net = transfer.transfer(
            "EfficientNetLite0", 32, 64, augmentation.layers(1.0, 3), weights=None, log_odds=np.zeros(7)
        )
        train, valid = (load_findings(prepared_study, split) for split in ("train", "valid"))
        net.train_backbone(True, frozen=3)
        first, last = net.divide(3)
        before = [w.numpy() for w in first.weights]
        recipe = Recipe("all_findings", 2, 1e-3, 8, loss="binary", ema=0.9, mixup=0.3)
        history = run.fit_head(first, last, recipe, train, valid, net.augment, views)
        assert all(np.array_equal(a, b) for a, b in zip(before, first.weights, strict=True))
        assert run._stages[0].get("views") == (views if views > 1 else None)
        return history, predict_batches(net.findings, valid), valid

    history, scores, valid = fit(2)
    six = [config.ALL_LABELS.index(name) for name in config.SIX_FINDINGS]
    # What was fitted is the end of the whole network; maps are kept as float16.
    whole = mean_auroc(valid.y[:, six], scores[:, six])
    assert whole == pytest.approx(history["val_macro_auroc"].max(), abs=0.02)
    again, same, _ = fit(2)
    assert history["loss"].tolist() == again["loss"].tolist() and np.array_equal(scores, same)
    once, _, _ = fit(1)
    assert once["loss"].tolist() != history["loss"].tolist()


def test_statistics_taken_anew_are_those_of_radiographs_as_they_are(prepared_study):
    train, valid = (load_findings(prepared_study, split) for split in ("train", "valid"))
    image, maps = keras.Input((32, 32, 1)), keras.Input((4, 4, 1))
    features = keras.Model(image, keras.layers.AveragePooling2D(8)(image))
    norm = keras.layers.BatchNormalization()
    answers = keras.layers.Dense(15, "sigmoid")(keras.layers.Flatten()(norm(maps)))
    brighter = [keras.layers.Rescaling(1.0, 50.0)]
    recipe = Recipe("all_findings", 1, 1e-3, 8, loss="binary", ema=0.9, mixup=0.3, batch_norm="reestimate")
    run = Run(prepared_study, "anew", {})
    run.fit_head(features, keras.Model(maps, answers), recipe, train, valid, brighter, views=2)
    seen = train.x[train.rows].reshape(len(train), 4, 8, 4, 8).mean(axis=(2, 4))
    assert norm.moving_mean.numpy()[0] == pytest.approx(seen.mean(), abs=1)
    assert norm.moving_variance.numpy()[0] == pytest.approx(seen.var(), rel=0.1)
    assert norm.momentum == 0.99


def test_a_fit_that_diverges_stops_and_says_what_to_change(prepared_study):
    run = Run(prepared_study, "nan", {}, checkpoint_steps=1)
    model = small_net(32)
    before = [v.numpy() for v in model.weights]
    train, valid = load_augmented(prepared_study), load_split(prepared_study, "valid")
    with pytest.raises(StudyError, match=r"epoch 1: .* at step \d+; .*Lower learning_rate \(1e\+30\) and run again"):
        run.fit(model, Recipe("fit", 2, 1e30, 8), train, valid)
    assert not (run.folder / "run.json").exists()
    with np.load(run.folder / "checkpoint-1-fit.npz") as kept:
        assert all(np.isfinite(kept[name]).all() for name in kept)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.weights, strict=True))
    history = run.fit(model, Recipe("fit", 2, 1e-3, 8), train, valid)
    run.finish(model)
    assert np.isfinite(history["loss"]).all() and len(json.loads((run.folder / "run.json").read_text())["stages"]) == 1


def test_nan_in_the_data_stops_within_the_epoch(prepared_study):
    run = Run(prepared_study, "nan", {})
    train = load_split(prepared_study, "train")
    poisoned = train.with_targets(np.where(train.y > 0, np.nan, train.y))
    with pytest.raises(StudyError, match=r"epoch 1: the loss is nan at step 1; the model has the weights again"):
        run.fit(small_net(32), Recipe("fit", 2, 1e-3, 8), poisoned, load_split(prepared_study, "valid"))


def test_early_stopping_counts_from_the_best_epoch(prepared_study):
    _, history, _ = fit_small(prepared_study.paths.dataset, epochs=30, patience=1, learning_rate=1e-5)
    assert len(history) == history["val_macro_auroc"].idxmax() + 2 < 30


def test_too_few_samples_for_a_batch(prepared_study):
    run = Run(prepared_study, "few", {})
    train = load_split(prepared_study, "train")
    with pytest.raises(StudyError, match=r"2 training samples are fewer than one batch of 8; lower batch_size"):
        run.fit(small_net(32), Recipe("fit", 1, 1e-3, 8), train.take(np.array([0, 1])), train)


def test_half_precision_halves_the_file_and_not_the_answer(tmp_path):
    net = transfer.transfer("EfficientNetLite0", 32, weights="imagenet").classifier
    model_file.save_model(net, tmp_path / "whole.keras")
    model_file.save_model(net, tmp_path / "half.keras", half=True)
    sizes = [(tmp_path / f"{name}.keras").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.55 * sizes[1]
    x = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), dtype=np.uint8)
    half = keras.models.load_model(tmp_path / "half.keras")
    assert half.weights[0].dtype == "float32"
    assert np.allclose(half(x, training=False), net(x, training=False), atol=2e-3)

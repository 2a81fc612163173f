"""The loop of one stage: losses and weights against hand counts, BatchNorm, the running mean of weights, the log."""

import time

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from sklearn.metrics import roc_auc_score

from chestxray.config import StudyError
from chestxray.evaluation import metrics
from chestxray.training import fitting, samples
from chestxray.training.recipe import BATCH_NORM, Recipe
from chestxray.training.samples import Samples


def test_mean_auroc_against_scikit_learn():
    rng = np.random.default_rng(1)
    y, scores = (rng.random((80, 4)) < 0.3).astype(float), rng.random((80, 4)).round(1)
    assert metrics.mean_auroc(y, scores) == pytest.approx(roc_auc_score(y, scores, average="macro"))
    y[:, 2] = 0
    assert metrics.mean_auroc(y, scores) == pytest.approx(roc_auc_score(y[:, [0, 1, 3]], scores[:, [0, 1, 3]]))


def test_what_a_recipe_may_not_say():
    with pytest.raises(StudyError, match=r"loss 'hinge' is unknown; there are: categorical, .*, binary"):
        Recipe("fit", 1, 1e-3, loss="hinge")
    with pytest.raises(StudyError, match="batch_norm 'off' is unknown; there are: train, freeze, reestimate"):
        Recipe("fit", 1, 1e-3, batch_norm="off")
    with pytest.raises(StudyError, match="class_weight needs one class an image"):
        Recipe("fit", 1, 1e-3, loss="binary", class_weight=True)


def test_unused_parameters_leave_the_description_of_a_fit_alone():
    plain = Recipe("fit", 1, 1e-3).describe()
    assert "class_weight" not in plain and plain["mixup"] == 0.0
    assert Recipe("fit", 1, 1e-3, class_weight=True).describe() == {**plain, "class_weight": True}


def test_logit_adjustment_adds_the_log_of_the_shares():
    rng = np.random.default_rng(0)
    logits, shares = rng.normal(size=(6, 4)), np.array([0.7, 0.1, 0.15, 0.05])
    classes = np.array([0, 1, 2, 3, 3, 0])
    adjusted = logits + np.log(shares)
    expected = np.mean(np.log(np.exp(adjusted).sum(1)) - adjusted[np.arange(6), classes])
    probabilities = tf.nn.softmax(tf.constant(logits, "float32"))
    loss = fitting.LogitAdjusted(shares)(np.eye(4, dtype="float32")[classes], probabilities)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def blobs(count=64, classes=3, features=5, seed=0):
    """Samples of classes that are told apart by one feature each, the first class being the most common."""
    rng = np.random.default_rng(seed)
    kinds = np.minimum(rng.integers(0, classes + 3, count), classes + 2) % (classes + 1) % classes
    x = rng.normal(size=(count, features)).astype("float32")
    x[np.arange(count), kinds] += 1
    table = pd.DataFrame({"image": np.arange(count)})
    return Samples(x, np.arange(count), np.eye(classes, dtype="float32")[kinds], table)


def fitted(tmp_path, recipe, model=None, name="a", key="k"):
    import keras

    keras.utils.set_random_seed(1)
    if model is None:
        inner = [keras.layers.Dense(8), keras.layers.BatchNormalization(momentum=0.5), keras.layers.Dense(3, "softmax")]
        model = keras.Sequential([keras.Input((5,)), *inner])
    train, valid = blobs(), blobs(seed=1)
    paths = fitting.StagePaths(tmp_path / f"{name}.npz", tmp_path / name, key)
    fit = fitting.Fit(model, recipe, len(train), lambda: (train, valid), 7, paths)
    return fit, fit.run(), model


@pytest.mark.parametrize("batch_norm", BATCH_NORM)
def test_what_becomes_of_batch_norm(tmp_path, batch_norm):
    recipe = Recipe("fit", 3, 1e-2, 8, batch_norm=batch_norm, ema=0.5)
    _, _, model = fitted(tmp_path, recipe)
    layer = model.layers[1]
    start = all(np.array_equal(v, np.full(8, i % 2)) for i, v in enumerate([layer.moving_mean, layer.moving_variance]))
    assert start == (batch_norm == "freeze") and layer.trainable
    assert np.array_equal(layer.gamma, np.ones(8)) == (batch_norm == "freeze")
    if batch_norm == "reestimate":
        # The statistics are those of the kept weights over the train samples, not of weights long gone.
        seen = model.layers[0](blobs().x).numpy()
        assert np.allclose(layer.moving_mean, seen.mean(axis=0), atol=0.1)
        assert np.allclose(layer.moving_variance, seen.var(axis=0), rtol=0.3)


def test_class_weights_by_hand(tmp_path):
    fit, _, _ = fitted(tmp_path, Recipe("fit", 1, 1e-3, 8, class_weight=True))
    counts, weights = fit.train.y.sum(axis=0), samples.class_weights(fit.train.y)
    assert np.allclose(weights * counts, len(fit.train) / 3)
    x, y, weight = next(iter(fit._batches(0, 2)))
    order = samples.epoch_order(fit.train.y, 7, 0)[16:24]
    assert np.array_equal(x, fit.train.x[order]) and np.array_equal(y, fit.train.y[order])
    assert np.allclose(weight, len(fit.train) / (3 * counts[y.numpy().argmax(axis=1)]))


@pytest.mark.parametrize("loss", ["categorical_focal", "logit_adjusted"])
def test_every_loss_learns(tmp_path, loss):
    _, history, _ = fitted(tmp_path, Recipe("fit", 10, 3e-2, 8, loss=loss))
    assert history[-1]["val_macro_auroc"] > 0.7 and history[-1]["val_loss"] < history[0]["val_loss"]


def test_the_running_mean_is_kept_and_the_weights_go_on(tmp_path):
    import keras

    def last_two(restart):
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, "softmax", kernel_initializer="zeros")])
        recipe = Recipe("fit", 2, 1e-2, 8, warmup=0.0, ema=0.9, ema_restart=restart)
        return fitted(tmp_path, recipe, model, name=str(restart))[0].history

    mean, plain = last_two(True), last_two(False)
    # The same first epoch; the second starts from the mean, which lags behind, or from the weights themselves.
    assert mean[0]["loss"] == plain[0]["loss"] and mean[0]["val_loss"] == plain[0]["val_loss"]
    assert mean[1]["loss"] > plain[1]["loss"]


def test_a_finished_stage_is_taken_from_its_checkpoint(tmp_path):
    recipe = Recipe("fit", 2, 1e-2, 8)
    _, history, model = fitted(tmp_path, recipe)
    train = blobs()
    paths = fitting.StagePaths(tmp_path / "a.npz", tmp_path / "a", "k")
    expected = [w.numpy() for w in model.weights]
    for weight in model.weights:
        weight.assign(np.zeros(weight.shape))
    again = fitting.Fit(model, recipe, len(train), lambda: pytest.fail("samples were asked for"), 7, paths)
    assert again.run() == history
    assert all(np.array_equal(a, b) for a, b in zip(expected, model.weights, strict=True))


def test_the_making_of_samples_counts_in_the_first_epoch(tmp_path, monkeypatch):
    import keras

    clock, late = time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(late))

    def slow():
        late.append(1000)
        return blobs(), blobs(seed=1)

    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, "softmax")])
    paths = fitting.StagePaths(tmp_path / "a.npz", tmp_path / "a", "k")
    first, second = fitting.Fit(model, Recipe("fit", 2, 1e-2, 8), len(blobs()), slow, 7, paths).run()
    assert first["seconds"] > 1000 > second["seconds"]


def test_the_log_holds_every_epoch(tmp_path):
    _, history, _ = fitted(tmp_path, Recipe("fit", 2, 1e-2, 8))
    (events,) = (tmp_path / "a").iterdir()
    seen = {}
    for record in tf.data.TFRecordDataset(str(events)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            seen[value.tag, event.step] = tf.make_ndarray(value.tensor).item()
    assert seen["epoch/val_macro_auroc", 2] == pytest.approx(history[1]["val_macro_auroc"])
    assert {step for tag, step in seen if tag == "epoch/loss"} == {1, 2}


@pytest.mark.parametrize(("at_once", "kept"), [(1, 3), (2, 4), (3, 3)])
def test_an_epoch_goes_on_at_its_step(tmp_path, monkeypatch, capsys, at_once, kept):
    import keras

    def fit(name, at_once=at_once):
        keras.utils.set_random_seed(1)
        inner = [
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(momentum=0.5),
            keras.layers.Dropout(0.3, seed=3),
        ]
        model = keras.Sequential([keras.Input((5,)), *inner, keras.layers.Dense(3, "softmax")])
        train, valid = blobs(), blobs(seed=1)
        paths = fitting.StagePaths(tmp_path / f"{name}.npz", tmp_path / name, "k", checkpoint_steps=3)
        recipe = Recipe("fit", 2, 1e-2, 8, ema=0.8, mixup=0.3)
        stage = fitting.Fit(model, recipe, len(train), lambda: (train, valid), 7, paths, steps_at_once=at_once)
        history = stage.run()
        for row in history:
            assert row.pop("seconds") > 0
        return history, [w.numpy() for w in model.weights]

    history, weights = fit("unbroken", at_once=1)
    after = fitting.Fit.after_steps

    def interrupted(self, epoch, before, step, *rest):
        if epoch == 1 and step >= 5:
            raise KeyboardInterrupt
        after(self, epoch, before, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fitting.Fit, "after_steps", interrupted)
        fit("broken")
    again, same = fit("broken")
    assert f"going on after epoch 1 of 2, step {kept} of 8" in capsys.readouterr().out
    assert again == history and all(np.array_equal(a, b) for a, b in zip(weights, same, strict=True))


def test_statistics_of_a_backbone_are_taken_from_what_it_is_shown():
    import keras

    samples = blobs(200)
    before = keras.Sequential([keras.Input((5,)), keras.layers.Rescaling(3.0), keras.layers.Dropout(0.9, seed=0)])
    layer = keras.layers.BatchNormalization(momentum=0.9)
    backbone = keras.Sequential([keras.Input((5,)), layer])
    fitting.reestimate_batch_norm(before, backbone, samples, seed=1, batch_size=50)
    # What comes before acts as it does when it isn't trained; here every sample is in one of the batches.
    assert np.allclose(layer.moving_mean, 3 * samples.x.mean(axis=0), atol=1e-4)
    assert np.allclose(layer.moving_variance, 9 * samples.x.var(axis=0), rtol=0.1)
    assert layer.momentum == 0.9
    with pytest.raises(StudyError, match="200 radiographs are fewer than one batch of 500"):
        fitting.reestimate_batch_norm(before, backbone, samples, seed=1, batch_size=500)

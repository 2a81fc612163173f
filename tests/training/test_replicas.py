"""Several devices: the gpu profile's paths on two logical CPU devices, each in a process of its own.

Logical devices have to be set up before TensorFlow starts, so every test is a function of this module that a child
process calls by name.
"""

import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from test_run import FITTED

from chestxray import config

CHILD = """
import sys
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[1]))
sys.path += ["tests", "tests/training"]
import test_replicas

getattr(test_replicas, sys.argv[2])(*sys.argv[3:])
"""


def on_devices(count, function, *arguments):
    """What `function` of this module printed in a process with `count` logical devices."""
    command = [sys.executable, "-c", CHILD, str(count), function, *arguments]
    child = subprocess.run(command, cwd=config.REPOSITORY, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


def plain_net(size):
    """A network without BatchNorm and chance, whose steps don't depend on how a batch is divided.

    Its gradients are too small to be clipped, which Keras does for each device's part.
    """
    import keras

    inner = [keras.layers.Rescaling(1 / 25500), keras.layers.Conv2D(4, 3, strides=4), keras.layers.Flatten()]
    return keras.Sequential([keras.Input((size, size, 1)), *inner, keras.layers.Dense(7, activation="softmax")])


def fit_plain(dataset):
    import tensorflow as tf

    from chestxray.config import open_study
    from chestxray.training import Recipe, Run, load_split

    study = open_study(dataset, "quick", 2024, {"image_size": 32, "no_finding": 8, "batch_size": 8})
    run = Run(study, "plain", {})
    model = plain_net(32)
    recipe = Recipe("fit", 2, 3e-3, 8, ema=0.8, mixup=0.3, class_weight=True)
    run.fit(model, recipe, load_split(study, "train"), load_split(study, "valid"))
    run.finish(model)
    print(tf.distribute.get_strategy().num_replicas_in_sync, "replicas")


def test_two_devices_do_what_one_does(prepared_study):
    folder = prepared_study.paths.saved("plain")
    tables = {}
    for count in (1, 2):
        assert f"{count} replicas" in on_devices(count, "fit_plain", prepared_study.paths.dataset)
        tables[count] = [
            pd.read_csv(folder / name).select_dtypes("number").drop(columns="seconds", errors="ignore")
            for name in ("history.csv", "predictions_test.csv")
        ]
        (folder / "run.json").unlink()
    for one, two in zip(tables[1], tables[2], strict=True):
        assert np.allclose(one, two, atol=1e-3, equal_nan=True)


def overflow_on_one():
    """A step in which the second device's gradient overflows, then one in which none does."""
    import keras
    import tensorflow as tf
    from chestxray.training.fitting import LossScaleOptimizer

    strategy = tf.distribute.MirroredStrategy([device.name for device in tf.config.list_logical_devices("CPU")])
    with strategy.scope():
        weights = keras.Variable([1.0, 2.0])
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=8.0)
        optimizer.build([weights])

    @tf.function
    def step(gradients):
        strategy.run(lambda gradient: optimizer.apply([gradient], [weights]), args=(gradients,))

    def take(first, second):
        step(
            strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant([(first, second)[context.replica_id_in_sync_group], 4.0])
            )
        )
        print(weights.numpy().tolist(), float(optimizer.dynamic_scale.numpy()))

    take(8.0, float("inf"))
    take(8.0, 16.0)


def test_an_overflow_on_one_device_leaves_the_step_out():
    left_out, done = on_devices(2, "overflow_on_one").splitlines()
    assert left_out == "[1.0, 2.0] 4.0"
    # The gradients (2, 1) and (4, 1) added, half of which is one step.
    assert done == "[-2.0, 1.0] 4.0"


def whole_study(dataset, backbone, size, policy, moment):
    """All stages of a fine-tuned model; with `moment` "killed" it dies within the last stage."""
    import os
    import signal

    import keras
    import tensorflow as tf

    from chestxray.config import open_study
    from chestxray.data import augmentation
    from chestxray.networks import transfer
    from chestxray.training import (
        Recipe,
        Run,
        class_log_odds,
        distillation,
        fitting,
        multilabel_classes,
        predict_batches,
        ridge,
    )
    from chestxray.training.samples import load_augmented, load_findings, load_split

    size = int(size)
    study = open_study(dataset, "quick", 2024, {"image_size": size, "no_finding": 8, "batch_size": 8})
    run = Run(study, "whole", {"backbone": backbone}, checkpoint_steps=1)
    keras.config.set_dtype_policy(policy)
    assert tf.distribute.get_strategy().num_replicas_in_sync == 2
    if moment == "killed":
        after = fitting.Fit.after_steps

        def die(self, epoch, before, step, *rest):
            if self.recipe.name == "fine_tune" and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            after(self, epoch, before, step, *rest)

        fitting.Fit.after_steps = die

    def some(samples):
        return samples.take(np.arange(min(24, len(samples))))

    all_train = load_findings(study, "train")
    everyone, everyone_valid = some(all_train), some(load_findings(study, "valid"))
    classes = [some(load_augmented(study)), some(load_split(study, "valid"))]
    augment = augmentation.layers(1.0, seed=5, flip=True)
    settings = {"log_odds": class_log_odds(everyone), "pooling": "stages"}
    # Of random weights, activations of a deep network stay within float16 only while its statistics fit: they are those
    # of all radiographs at once, and neither steps nor the moving means lead far from there.
    net = transfer.transfer(backbone, size, augment=augment, weights=None, bn_momentum=0.99, **settings)
    fitting.reestimate_batch_norm(net.preprocess, net.backbone, all_train, study.seed, batch_size=len(all_train))
    features = net.standardise(predict_batches(net.features, everyone))
    _, softened = distillation.distil(study, everyone, features, 100, 0.7)
    net.findings.get_layer("findings").set_weights(ridge.fit(features, softened.y, 100))
    recipe = Recipe("all_findings", 1, 1e-6, 8, loss="binary", ema=0.5, ema_restart=False)
    run.fit(net.findings, recipe, softened, everyone_valid, keep_start=True)
    tree = predict_batches(net.features, classes[0])
    net.head.get_layer("classes").set_weights(ridge.fit(tree, classes[0].y, 100, balanced=True))
    recipe = Recipe("fine_tune", 1, 1e-6, 8, ema=0.5, batch_norm="reestimate")
    run.fit(net.classifier, recipe, *classes, keep_start=True, judged_on=multilabel_classes(everyone_valid))
    run.finish(net.classifier)


def kill_and_resume(study, backbone, size, policy):
    folder = study.paths.saved("whole")
    settings = (study.paths.dataset, backbone, str(size), policy)
    with pytest.raises(AssertionError):
        on_devices(2, "whole_study", *settings, "killed")
    assert not (folder / "run.json").exists() and (folder / "checkpoint-2-fine_tune.npz").exists()
    printed = on_devices(2, "whole_study", *settings, "not")
    assert "all_findings: going on after epoch 1 of 1" in printed
    assert "fine_tune: going on after epoch 0 of 1, step 1 of 3" in printed
    assert (folder / "run.json").exists()


def test_a_killed_fit_ends_as_an_unbroken_one_on_two_devices(prepared_study):
    folder = prepared_study.paths.saved("small")

    def fit(moment):
        code = CHILD.split("sys.path")[0] + "del sys.argv[1]" + FITTED
        command = [sys.executable, "-c", code, "2", "small", prepared_study.paths.dataset, moment]
        return subprocess.run(command, cwd=config.REPOSITORY, capture_output=True, text=True)

    unbroken = fit("never")
    assert unbroken.returncode == 0, unbroken.stderr
    table, history = (folder / "predictions_test.csv").read_text(), pd.read_csv(folder / "history.csv")
    shutil.rmtree(folder)
    assert fit("step").returncode == -9
    resumed = fit("never")
    assert resumed.returncode == 0 and "after epoch 1 of 4, step 3 of " in resumed.stdout, resumed.stderr
    assert (folder / "predictions_test.csv").read_text() == table
    # Each device sums the loss of an epoch by itself; a checkpoint keeps the total, so its last digit may differ.
    again = pd.read_csv(folder / "history.csv")
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), history.drop(columns="seconds"), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", pytest.param("mixed_float16", marks=pytest.mark.long)])
def test_all_stages_go_on_on_two_devices(prepared_study, policy):
    kill_and_resume(prepared_study, "EfficientNetLite0", 32, policy)


@pytest.mark.long
@pytest.mark.parametrize(
    ("backbone", "policy"),
    # Of random weights, B7 has activations beyond float16 all the same.
    [("EfficientNetB6", "mixed_float16"), ("EfficientNetB7", "float32")],
)
def test_the_gpu_profiles_backbones_on_two_devices(study_of, make_raw, backbone, policy):
    from chestxray.data import augmentation, preparation

    study = study_of(make_raw(images=240), image_size=64)
    manifest = preparation.prepare(study).manifest
    augmentation.write(study, augmentation.plan(manifest, study.seed))
    on_devices(2, "whole_study", study.paths.dataset, backbone, "64", policy, "not")
    assert (study.paths.saved("whole") / "run.json").exists()

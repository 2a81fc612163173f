"""Fits for tests: a network with all that is random in notebook 3a's, small, and its two phases."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
from conftest import PREPARED
from keras import layers

from chestxray.config import ALL_LABELS, CLASSES, PROFILES, REPOSITORY, Paths, Study
from chestxray.training.callbacks import MONITORED, Validate
from chestxray.training.run import Run
from chestxray.training.samples import load_findings

SCORES = {"head": (0.6, 0.7), "fine_tune": (0.6, 0.8, 0.7)}
"""What validation is made to give: the second phase gets worse after its second epoch."""


def study_at(root: str | Path, **overrides: Any) -> Study:
    """The study on the data that `prepared_root` has prepared, with four steps an epoch."""
    settings = PREPARED | {"steps_per_epoch": 4} | overrides
    return Study(Paths("tiny", Path(root)), PROFILES["quick"].override(**settings), 2024)


def network() -> tuple[keras.Model, keras.Model]:
    """Radiographs (N, 32, 32, 1) to 15 sigmoids, and the backbone in it, which has batch normalisation and a branch."""
    image = layers.Input((32, 32, 3))
    x = layers.Conv2D(4, 3, strides=2, use_bias=False)(layers.Rescaling(1 / 128, -1.0)(image))
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    skipped = layers.Dropout(0.3, noise_shape=(None, 1, 1, 1))(layers.Conv2D(4, 3, padding="same")(x))
    backbone = keras.Model(image, layers.Add()([x, skipped]))

    pixels = layers.Input((32, 32, 1), name="radiograph")
    varied = [layers.RandomFlip("horizontal"), layers.RandomBrightness(0.1)]
    x = keras.Sequential(varied, name="augmentation")(layers.Rescaling(1.0)(pixels))
    x = layers.GlobalAveragePooling2D(name="pooled")(backbone(layers.Concatenate()([x, x, x])))
    findings = layers.Dense(len(ALL_LABELS), "sigmoid", name="findings")(layers.Dropout(0.3)(x))
    return keras.Model(pixels, findings), backbone


def plain(factor: float = 1 / 255, units: int = 8) -> keras.Model:
    """A network without batch normalisation and chance, radiographs (N, 32, 32, 1) to 15 sigmoids."""
    pixels = layers.Input((32, 32, 1), name="radiograph")
    x = layers.Conv2D(units, 5, strides=4, activation="relu")(layers.Rescaling(factor)(pixels))
    x = layers.GlobalAveragePooling2D(name="pooled")(x)
    return keras.Model(pixels, layers.Dense(len(ALL_LABELS), "sigmoid", name="findings")(x))


def with_classes(model: keras.Model) -> keras.Model:
    """The model with its second output, from its layer `pooled`."""
    classes = layers.Dense(len(CLASSES), "softmax", name="classes")(model.get_layer("pooled").output)
    return keras.Model(model.input, {"findings": model.output, "classes": classes})


def fit_plain(run: Run, epochs: int = 3, rate: float = 1e-2, model: keras.Model | None = None) -> keras.Model:
    """One phase `fit` of the plain network."""
    model = model or plain()
    model.compile(keras.optimizers.AdamW(rate), "binary_crossentropy")
    train, valid = (load_findings(run.study, split) for split in ("train", "valid"))
    start(model, run.phase("fit", model, train, valid, epochs))
    return model


def start(model: keras.Model, phase: Any) -> None:
    """`model.fit`, as the notebooks call it."""
    listed = {"steps_per_epoch": phase.steps, "initial_epoch": phase.first, "epochs": phase.epochs}
    model.fit(phase.batches, **listed, callbacks=phase.callbacks, shuffle=False, verbose=0)


class Watch(keras.callbacks.Callback):
    """Stands behind `Validate`: sets the scores, saves the last epoch's weights, and dies at its moment."""

    def __init__(self, phase: str, folder: Path, moment: str) -> None:
        super().__init__()
        self.phase, self.folder, self.moment = phase, folder, moment

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.dies = (self.moment, self.phase, epoch) in (("head", "head", 1), ("worse", "fine_tune", 2))
        if (self.moment, self.phase, epoch) == ("writing", "fine_tune", 1):
            Path.replace = lambda *_: die()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if self.dies and batch == 1:
            die()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        logs[MONITORED] = SCORES[self.phase][epoch]
        if epoch + 1 == len(SCORES[self.phase]):
            np.savez(self.folder / f"last-{self.phase}.npz", *self.model.get_weights())


def fit_two_phases(root: str, name: str, moment: str) -> None:
    """Head, then all layers, as notebook 3a fits them, and the run's end; it dies at the moment.

    Args:
        root: as `prepared_root`.
        name: of the model folder; weights at the end of each phase's last epoch are written there.
        moment: `head`, within the head's second epoch; `between` the phases; `writing`, while the checkpoint of the
            second phase's second epoch is being written; `worse`, in the epoch after the best one; or `never`.
    """
    study = study_at(root)
    train, valid = (load_findings(study, split) for split in ("train", "valid"))
    run = Run(study, name, {})
    model, backbone = network()
    falling = keras.optimizers.schedules.CosineDecay(0.0, 8, warmup_target=1e-2, warmup_steps=4)
    for phase_name, trainable, rate in (("head", False, 1e-2), ("fine_tune", True, falling)):
        backbone.trainable = trainable
        model.compile(keras.optimizers.AdamW(rate, weight_decay=0.01), "binary_crossentropy")
        phase = run.phase(phase_name, model, train, valid, len(SCORES[phase_name]))
        at = next(i for i, one in enumerate(phase.callbacks) if isinstance(one, Validate)) + 1
        phase.callbacks.insert(at, Watch(phase_name, run.folder, moment))
        start(model, phase)
        if moment == "between":
            die()
    run.finish(with_classes(model))


def fit_on_devices(root: str, name: str, count: int, moment: str) -> None:
    """Two epochs of the plain network on some logical CPU devices, and the run's end; "killed" in the second epoch."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    run = Run(study_at(root), name, {})
    assert tf.distribute.get_strategy().num_replicas_in_sync == count
    train, valid = (load_findings(run.study, split) for split in ("train", "valid"))
    model = plain()
    model.compile(keras.optimizers.AdamW(1e-2), "binary_crossentropy")
    phase = run.phase("fit", model, train, valid, 2)
    if moment == "killed":
        phase.callbacks.append(keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epoch and die()))
    start(model, phase)
    run.finish(with_classes(model))


def die() -> None:
    """Ends this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_turn(call: str, root: Path, *parts: tuple[str, ...]) -> str:
    """Call a function of this module with each part in turn, each in a process of its own; gives what they print.

    They are forked from one process that has imported TensorFlow and not used it yet. A process that ends otherwise
    than at its end or by `die` fails the test.
    """
    code = (
        f"import sys; sys.path += ['tests', 'tests/training']; import fits; fits.fork({call!r}, {str(root)!r}, {parts})"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def fork(call: str, root: str, parts: tuple[tuple[str, ...], ...]) -> None:
    """What `in_turn` calls: the last word of a part tells the moment at which it has to die."""
    for part in parts:
        child = os.fork()
        if not child:
            globals()[call](root, *part)
            sys.stdout.flush()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (0 if part[-1] == "never" else -signal.SIGKILL), (part, code)

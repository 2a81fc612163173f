"""Measure how fast models are fitted: `python tests/benchmarks/bench_training.py DATASET [step] [head] [epoch]`.

DATASET has been prepared by stages 2.1 and 2.2 (`phantom`, or a folder in the NIH layout). Every figure is a ratio of
two things measured in turns in the same run, so that whatever else the machine does weighs on both. Networks have
random weights, which cost the same.

The comparison with PyTorch needs a Python with torch and efficientnet_lite_pytorch: this one, or the one that the
variable CHESTXRAY_TORCH names. Without it that row is left out.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from chestxray.training.fitting import Fit, StagePaths
from chestxray.training.recipe import Recipe
from keras import layers

from chestxray.config import CLASSES, Paths, Study, open_study
from chestxray.data import augmentation
from chestxray.networks import transfer
from chestxray.networks.layers import BatchNormalization
from chestxray.training import ensembling, fitting, ridge
from chestxray.training.run import Run
from chestxray.training.samples import Samples, load_split

SIZE, BATCH = 128, 32
ROUNDS, STEPS = 5, 12
IMAGES = 768
"""Training images of the comparison of epochs; a quarter as many are for validation."""

TORCH = """
import sys, time
import torch
from efficientnet_lite_pytorch import EfficientNet

size, batch, steps = map(int, sys.argv[1:])
net = EfficientNet.from_name("efficientnet-lite0", num_classes=7, image_size=size)
optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
x, y = torch.rand(batch, 3, size, size), torch.randint(0, 7, (batch,))
net.train()
for _ in sys.stdin:
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    print(steps * batch / (time.perf_counter() - began), flush=True)
"""


def row(what: str, ratio: float, asked: str, seen: str) -> None:
    """Print one line of the table."""
    print(f"{what:<66} {ratio:>6.2f}  {asked:<8} {seen}", flush=True)


class TimedFit(Fit):
    """A fit that notes how long the steps of each epoch take, from the moment the epoch's batches are asked for."""

    def _batches(self, epoch: int, first: int) -> tf.data.Dataset:
        self.asked = time.perf_counter()
        return super()._batches(epoch, first)

    def after_steps(self, epoch: int, before: int, step: int, loss: float, began: float) -> None:
        """Note the time of the epoch's last step."""
        super().after_steps(epoch, before, step, loss, began)
        if step == self.steps:
            self.rate = self.steps * self.recipe.batch_size / (time.perf_counter() - self.asked)


@contextlib.contextmanager
def torch_rate() -> Iterator[Callable[[], float] | None]:
    """A function that gives PyTorch's images a second on one batch in memory, or None where there is no PyTorch."""
    python = os.environ.get("CHESTXRAY_TORCH", sys.executable)
    known = subprocess.run([python, "-c", "import torch, efficientnet_lite_pytorch"], capture_output=True)
    if known.returncode:
        yield None
        return
    command = [python, "-c", TORCH, str(SIZE), str(BATCH), str(STEPS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:

        def rate() -> float:
            child.stdin.write("go\n")
            child.stdin.flush()
            return float(child.stdout.readline())

        rate()
        yield rate
        child.stdin.close()


def measure_steps(study: Study, scratch: Path) -> None:
    """Steps inside `fit`, fed from the memory-mapped cache, against the bare step on a batch held in memory."""
    samples = load_split(study, "train")
    train, valid = samples.take(np.arange(STEPS * BATCH)), samples.take(np.arange(8))
    for augmented in (False, True):
        keras.utils.clear_session()
        measure_step(study, train, valid, augmented, scratch)


def stock(model: keras.Model) -> keras.Model:
    """The same network, with new weights, whose batch normalisation is Keras's own."""

    def adapt(layer: keras.Layer) -> keras.Layer:
        ours = isinstance(layer, BatchNormalization)
        return (layers.BatchNormalization if ours else type(layer)).from_config(layer.get_config())

    return keras.models.clone_model(model, clone_function=adapt, recursive=True)


def measure_step(study: Study, train: Samples, valid: Samples, augmented: bool, scratch: Path) -> None:
    """One network's rates, in turns."""
    augment = augmentation.layers(1.0, 1) if augmented else []
    model = transfer.transfer("EfficientNetLite0", study.profile.image_size, SIZE, augment, weights=None).classifier
    x, y = tf.constant(train.x[train.rows[:BATCH]]), tf.constant(train.y[:BATCH])
    rates: dict[str, list[float]] = {"fit": [], "memory": [], "keras": [], "torch": []}
    plain = stock(model)
    plain.compile(keras.optimizers.AdamW(1e-3, global_clipnorm=1.0), "categorical_crossentropy", jit_compile=False)
    plain.optimizer.build(plain.trainable_variables)
    with torch_rate() as torch:
        steps = {
            name: tf.function(partial(net.train_step, (x, y))) for name, net in (("memory", model), ("keras", plain))
        }

        def between(history: list[dict]) -> None:
            rates["fit"].append(fit.rate)
            for name, step in steps.items():
                if len(history) == 1:
                    step()
                began = time.perf_counter()
                for _ in range(STEPS):
                    step()
                rates[name].append(STEPS * BATCH / (time.perf_counter() - began))
            if torch is not None:
                rates["torch"].append(torch())

        fit = TimedFit(
            model,
            Recipe("fit", ROUNDS + 1, 1e-3, BATCH),
            len(train),
            lambda: (train, valid),
            1,
            StagePaths(scratch / f"{augmented}.npz", scratch / f"log{augmented}", "bench"),
            between,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            fit.run()
    # The first epoch traces the step.
    ours, memory, theirs, other = (np.array(rates[name][1:]) for name in ("fit", "memory", "keras", "torch"))
    what = "with augmentation" if augmented else "without augmentation"
    seen = f"{np.median(ours):.0f} against {np.median(memory):.0f} images/s"
    row(f"fit against its step on one batch in memory, {what}", np.median(ours / memory), ">= .95", seen)
    seen = f"{np.median(memory):.0f} against {np.median(theirs):.0f} images/s"
    row(f"  that step against the one with Keras's batch normalisation, {what}", np.median(memory / theirs), "", seen)
    if len(other):
        seen = f"{np.median(ours):.0f} against {np.median(other):.0f} images/s"
        row(f"fit against PyTorch's step on one batch in memory, {what}", np.median(ours / other), ">= 1.4", seen)
    else:
        print("PyTorch was left out: CHESTXRAY_TORCH names no Python that has it")


def measure_heads(study: Study) -> None:
    """Twenty epochs of a head, the backbone's pass included, against that pass alone."""
    train, valid = load_split(study, "train"), load_split(study, "valid")
    net = transfer.transfer("EfficientNetLite0", study.profile.image_size, SIZE, weights=None)

    def one_pass() -> float:
        began = time.perf_counter()
        step = fitting.compiled(net.features)
        for samples in (train, valid):
            fitting.predict_batches(step, samples)
        return time.perf_counter() - began

    before = one_pass()
    run = Run(study, "bench_head", {})
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        run.fit_head(net.features, net.head, Recipe("head", 20, 1e-3, BATCH), train, valid)
    took = time.perf_counter() - began
    alone = (before + one_pass()) / 2
    row(
        f"head on {len(train)} images, 20 epochs, against one pass of the backbone",
        took / alone,
        "<= 1.3",
        f"{took:.1f} against {alone:.1f} s",
    )

    net = transfer.transfer("EfficientNetLite0", study.profile.image_size, SIZE, weights=None, pooling="blocks")
    began = time.perf_counter()
    features = fitting.predict_batches(net.features, train)
    alone = time.perf_counter() - began
    began = time.perf_counter()
    ridge.fit(features, train.y, 1000)
    took = alone + time.perf_counter() - began
    what = f"head in closed form on {len(train)} images, pooled at every block, against that pass"
    row(what, took / alone, "<= 1.3", f"{took:.1f} against {alone:.1f} s")

    x = np.random.default_rng(0).dirichlet(np.ones(len(CLASSES)), (len(valid), 3)).reshape(len(valid), -1)
    members = [
        transfer.transfer(name, study.profile.image_size, SIZE, weights=None).classifier
        for name in study.profile.backbones[1:]
    ]
    began = time.perf_counter()
    for member in members:
        fitting.predict_batches(member, valid)
    alone = time.perf_counter() - began
    began = time.perf_counter()
    ensembling.fit_head(x.astype("float32"), valid.y, study.profile.ensemble_epochs, 1)
    took = alone + time.perf_counter() - began
    what = (
        f"ensemble head on {len(valid)} images, {study.profile.ensemble_epochs} epochs, against one pass of its members"
    )
    row(what, took / alone, "<= 1.3", f"{took:.1f} against {alone:.1f} s")


def published_batches(study: Study, samples: Samples, split: str, scratch: Path) -> tf.data.Dataset:
    """The published study's way to read: RGB from class folders, decoded anew in every epoch."""
    for image, label in zip(samples.table["image"], samples.table["label"], strict=True):
        place = scratch / split / label / image
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to((study.paths.tree(split) / label / Path(image).with_suffix(".png")).resolve())
    return keras.utils.image_dataset_from_directory(
        scratch / split, label_mode="categorical", image_size=(SIZE, SIZE), batch_size=BATCH, verbose=False
    )


def published_model(backbones: tuple[str, ...], trainable: bool) -> keras.Model:
    """The published study's network: frozen or free backbones, pooled, Dense 64, dropout .5, softmax."""
    pixels = layers.Input((SIZE, SIZE, 3))
    pooled = []
    for name in backbones:
        net = stock(transfer.transfer(name, SIZE, weights=None).backbone)
        net.trainable = trainable
        pooled.append(layers.GlobalAveragePooling2D()(net(pixels)))
    x = layers.Concatenate()(pooled) if len(pooled) > 1 else pooled[0]
    x = layers.Dropout(0.5)(layers.Dense(64, activation="relu")(x))
    model = keras.Model(pixels, layers.Dense(len(CLASSES), activation="softmax")(x))
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"], jit_compile=False)
    return model


def measure_epochs(study: Study, scratch: Path) -> None:
    """An epoch of ours, validation and checkpoint included, against the published study's on the same images."""
    every = {split: load_split(study, split) for split in ("train", "valid")}
    rng = np.random.default_rng(1)
    samples = {
        split: every[split].take(rng.permutation(len(every[split]))[:count])
        for split, count in (("train", IMAGES), ("valid", IMAGES // 4))
    }
    batches = {split: published_batches(study, samples[split], split, scratch) for split in samples}
    images = sum(map(len, samples.values()))

    model = published_model(("EfficientNetLite0",), trainable=True)
    theirs = []

    def published(history: list[dict]) -> None:
        began = time.perf_counter()
        model.fit(batches["train"], validation_data=batches["valid"], verbose=0)
        theirs.append(time.perf_counter() - began)

    ours = transfer.transfer("EfficientNetLite0", study.profile.image_size, SIZE, weights=None).classifier
    paths = StagePaths(scratch / "epoch.npz", scratch / "log", "bench")
    recipe = Recipe("fit", 4, 1e-3, BATCH, ema=0.99)
    fit = Fit(ours, recipe, len(samples["train"]), lambda: (samples["train"], samples["valid"]), 1, paths, published)
    with contextlib.redirect_stdout(io.StringIO()):
        seconds = np.array([line["seconds"] for line in fit.run()])
    ratio = np.median(np.array(theirs[1:]) / seconds[1:])
    row(
        f"published epoch of one backbone against ours, {images} images",
        ratio,
        "",
        f"{np.median(theirs[1:]):.1f} against {np.median(seconds[1:]):.1f} s",
    )

    backbones = study.profile.backbones[1:]
    model = published_model(backbones, trainable=False)
    theirs.clear()
    published([])
    published([])
    began = time.perf_counter()
    features = []
    for name in backbones:
        net = transfer.transfer(name, study.profile.image_size, SIZE, weights=None).features
        features.append([fitting.predict_batches(net, samples[split]) for split in ("train", "valid")])
    passes = time.perf_counter() - began
    x, valid = (np.concatenate(parts, axis=1) for parts in zip(*features, strict=True))
    table = samples["valid"].table
    cached = (
        Samples(x, np.arange(len(x)), samples["train"].y, samples["train"].table),
        Samples(valid, np.arange(len(valid)), samples["valid"].y, table),
    )
    pooled = layers.Input((x.shape[1],))
    dense = layers.Dropout(0.5)(layers.Dense(64, activation="relu")(pooled))
    head = keras.Model(pooled, layers.Dense(len(CLASSES), activation="softmax")(dense))
    paths = StagePaths(scratch / "head.npz", scratch / "loghead", "bench")
    with contextlib.redirect_stdout(io.StringIO()):
        history = Fit(head, Recipe("head", 20, 1e-3, BATCH), len(x), lambda: cached, 1, paths).run()
    published([])
    each = np.median([line["seconds"] for line in history[1:]])
    took, once = passes + sum(line["seconds"] for line in history), np.median(theirs[1:])
    row(
        f"published ensemble epoch against ours on cached features, {images} images",
        once / each,
        "",
        f"{once:.1f} against {each:.2f} s",
    )
    row(
        "  the same over 20 epochs, our passes of the backbones included",
        20 * once / took,
        "",
        f"{20 * once:.0f} against {took:.0f} s",
    )


def main() -> None:
    """Print the table."""
    dataset, *parts = sys.argv[1:] or ["phantom"]
    study = open_study(dataset, "cpu", 2024)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        # Its own root, so that no model folder of the study is touched.
        (scratch / "1_Datasets").symlink_to(study.paths.root / "1_Datasets")
        study = Study(Paths(study.paths.dataset, scratch), study.profile, study.seed)
        print(f"{'':<66} {'ratio':>6}  {'asked':<8} seen")
        if not parts or "step" in parts:
            measure_steps(study, scratch)
        if not parts or "head" in parts:
            measure_heads(study)
        if not parts or "epoch" in parts:
            measure_epochs(study, scratch)


if __name__ == "__main__":
    main()

"""Parts of the recipe, each judged against the plain one on radiographs of patients that no fit has seen.

    python -m tests.benchmarks.parts fit [--images-256 FOLDER] [--minutes M]
    python -m tests.benchmarks.parts table

Needs the prepared radiographs of nih_9k, with the augmented tree, under `CHESTXRAY_ROOT`. The bed: EfficientNet-Lite0
on 128 px, an epoch of the head and three of all layers along a cosine, on four fifths of the patients of train and
validation; the last fifth is predicted. Each fold has a seed of its own, which all parts share. Fold 1 of every part
comes before fold 2 of any; then `FIRST` in all folds, then `LATER`. Each fit has one core and ends at its last epoch.
What it predicts goes to one file of `4_models/ablation/parts/`, and a fit that has its file is not made again. Run the
command twice to work on two fits at a time. `table` writes `4_models/ablation/parts.csv`. Test radiographs are not
read.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

os.environ |= dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"), "1")

import keras
import numpy as np
import pandas as pd
import scipy.special
from keras import layers
from keras.optimizers.schedules import CosineDecay
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold

from chestxray import files
from chestxray.config import ALL_LABELS, CLASSES, PROFILES, SIX_LABELS, Paths, Study
from chestxray.data import nih_tables
from chestxray.evaluation.metrics import mean_auroc
from chestxray.images.pixels import to_128
from chestxray.networks import efficientnet
from chestxray.training import distillation, ridge
from chestxray.training.batch_norm import reestimate_batch_norm
from chestxray.training.callbacks import Seed
from chestxray.training.samples import Samples, batches, load_augmented, load_findings, predict

FOLDER = Path(__file__).parents[2] / "4_models" / "ablation" / "parts"
FOLDS, SEED, EPOCHS, BATCH = 5, 2030, 3, 32
FINDINGS, SINGLE, BALANCED = "six-finding AUROC", "single-label macro AUROC", "balanced accuracy"


class Part(NamedTuple):
    """One part: the fit (`arm`) and what of it is read (`reading`), against the same of `plain` or `against`."""

    arm: str
    reading: str
    metric: str
    against: tuple[str, str] = ("plain", "findings")


PARTS = {
    "soft targets from other visits": Part("soft", "findings", FINDINGS),
    "heads that read every stage": Part("stages", "findings", FINDINGS),
    "heads that read variances": Part("variances", "findings", FINDINGS),
    "head started by ridge regression": Part("ridge", "findings", FINDINGS),
    "EMA of the weights (0.99)": Part("plain", "ema", FINDINGS),
    "test-time mirroring": Part("plain", "mirrored", FINDINGS),
    "augmentation at twice the strength": Part("strong", "findings", FINDINGS),
    "the six findings alone as targets": Part("six", "findings", FINDINGS),
    "seven epochs of all layers in place of three": Part("long", "findings", FINDINGS),
    "Gaussian noise of 4 grey levels": Part("noise", "findings", FINDINGS),
    "Gaussian noise, read from 256 px": Part("noise", "from_256", FINDINGS, ("plain", "from_256")),
    "the augmented tree for the class head": Part("plain", "tree", SINGLE, ("plain", "originals")),
    "an epoch on the seven classes": Part("classes", "softmax", SINGLE, ("plain", "tree")),
    "sharp versions at 224 px, read from enlarged ones": Part("sharp", "findings", FINDINGS, ("enlarged", "findings")),
    "sharp versions at 224 px, read from sharp ones": Part("sharp", "sharp", FINDINGS, ("enlarged", "findings")),
}
"""Each part with its one metric, named before any result; seven epochs and noise while the first fit was at work."""
FIRST = ("plain", "long", "soft", "strong", "stages", "ridge", "variances", "six")
LATER = ("classes", "enlarged", "sharp", "noise")
"""The fits of a fold. `enlarged` and `sharp` are at 224 px: an epoch at 128 px, then one at 224 px."""
ORDER = (
    *((arm, 1) for arm in FIRST + LATER),
    *((arm, fold) for arms in (FIRST, LATER) for fold in range(2, FOLDS + 1) for arm in arms),
)


def pool(study: Study) -> tuple[Samples, np.ndarray]:
    """The radiographs of train and validation with their labels, and the fold of each, from 1."""
    parts = [load_findings(study, split) for split in ("train", "valid")]
    table = pd.concat([part.table for part in parts], ignore_index=True)
    everyone = Samples(
        parts[0].x, np.concatenate([part.rows for part in parts]), np.concatenate([part.y for part in parts]), table
    )
    fold = np.zeros(len(table), int)
    split = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=SEED)
    for number, (_, held) in enumerate(split.split(table, table["label"], table["patient"]), start=1):
        fold[held] = number
    return everyone, fold


def network(arm: str, side: int = 128, given: int = 128) -> tuple[keras.Model, keras.Model, keras.Model]:
    """The network of an arm for radiographs of `given` px: model, backbone, and what comes before it."""
    strength = 2.0 if arm == "strong" else 1.0
    noise = [layers.Rescaling(1 / 255), layers.GaussianNoise(4 / 255), layers.Rescaling(255)]
    augmentation = keras.Sequential(
        [
            layers.RandomFlip("horizontal"),
            layers.RandomRotation(strength * 7 / 360, fill_mode="reflect"),
            layers.RandomTranslation(strength * 0.04, strength * 0.04, fill_mode="reflect"),
            layers.RandomZoom((-strength * 0.07, strength * 0.07), fill_mode="reflect"),
            layers.RandomContrast(strength * 0.15, value_range=(0, 255)),
            layers.RandomBrightness(strength * 0.08, value_range=(0, 255)),
            *(noise if arm == "noise" else []),
        ]
    )
    backbone = efficientnet.build("EfficientNetLite0", (side, side, 3), bn_momentum=0.9)
    pixels = keras.Input((given, given, 1))
    x = augmentation(layers.Rescaling(1.0)(pixels))
    if side != given:
        x = layers.Resizing(side, side, antialias=True)(x)
    rgb = layers.Concatenate()([x, x, x])
    if arm == "stages":
        stages = {layer.name[:6]: layer.output for layer in backbone.layers if layer.name.startswith("block")}
        maps = keras.Model(backbone.input, [*stages.values(), backbone.output])(rgb)
        pooled = layers.Concatenate(name="pooled")([layers.GlobalAveragePooling2D()(one) for one in maps])
    else:
        last = backbone(rgb)
        pooled = layers.GlobalAveragePooling2D(name="pooled")(last)
        if arm == "variances":
            square = layers.GlobalAveragePooling2D()(layers.Multiply()([last, last]))
            variance = layers.Subtract()([square, layers.Multiply()([pooled, pooled])])
            pooled = layers.Concatenate()([pooled, variance])
    x = layers.Dropout(0.3)(pooled)
    labels = len(SIX_LABELS) if arm == "six" else len(ALL_LABELS)
    return keras.Model(pixels, layers.Dense(labels, activation="sigmoid")(x)), backbone, keras.Model(pixels, rgb)


class Last(keras.callbacks.Callback):
    """Keeps the weights of the last step: where there is an EMA, `fit` ends with that."""

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.weights = self.model.get_weights()


def fit(
    model: keras.Model,
    train: Samples,
    epochs: int,
    rate: float | CosineDecay,
    seed: int,
    last: Last | None = None,
) -> None:
    """Fit for some epochs with AdamW; with `last`, the model ends with the EMA of its weights."""
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.01, use_ema=last is not None, ema_momentum=0.99)
    model.compile(optimizer=optimizer, loss="binary_crossentropy")
    data = batches(train, BATCH, seed)
    listed = [Seed(seed), *([last] if last else [])]
    model.fit(data, steps_per_epoch=len(train) // BATCH, epochs=epochs, callbacks=listed, shuffle=False, verbose=2)


def cosine(steps: int, peak: float, rise: int) -> CosineDecay:
    """A rate that rises for some steps and falls to 0 at the end of them all."""
    return CosineDecay(0.0, steps - rise, warmup_target=peak, warmup_steps=rise)


def softened(study: Study, train: Samples, features: np.ndarray) -> Samples:
    """Targets half way between the labels and what other visits and other patients' networks predict for them."""
    entries, _ = nih_tables.read_dataset(study.paths)
    rows = entries.table[entries.table["patient"].isin(train.table["patient"])]
    place = pd.Series(np.arange(len(rows)), index=rows["image"])
    prior = distillation.fit_prior(rows)[place[train.table["image"]].to_numpy()]
    image = ridge.out_of_fold(features, train.y, 4000, train.table["patient"].to_numpy())
    return distillation.soften(train, distillation.combine(prior, image, train), 0.5)


def class_scores(features: keras.Model, chosen: Samples, held: Samples) -> np.ndarray:
    """The class probabilities (N, 7) of the held-out radiographs, by a regression on features of the chosen ones."""
    regression = LogisticRegression(C=1e-3, max_iter=1000, class_weight="balanced")
    regression.fit(predict(features, chosen), chosen.table["label"])
    assert tuple(regression.classes_) == CLASSES
    return regression.predict_proba(predict(features, held))


def flipped(samples: Samples) -> Samples:
    """The same radiographs, mirrored."""
    return samples.with_inputs(samples.x[samples.rows][:, :, ::-1])


def run(
    arm: str, number: int, study: Study, everyone: Samples, fold: np.ndarray, sharp: Path | None
) -> dict[str, np.ndarray]:
    """One fit; what it predicts for the held-out radiographs, by reading: six findings, or seven classes."""
    seed = SEED + number
    keras.utils.set_random_seed(seed)
    train, held = everyone.take(np.flatnonzero(fold != number)), everyone.take(np.flatnonzero(fold == number))
    if arm in ("enlarged", "sharp"):
        return run_224(arm, seed, train, held, sharp)
    if arm == "six":
        train = train.with_targets(train.y[:, SIX_LABELS])
    model, backbone, images = network(arm)
    steps = len(train) // BATCH
    backbone.trainable = False
    if arm in ("soft", "ridge"):
        frozen = predict(keras.Model(model.input, model.get_layer("pooled").output), train)
    if arm == "ridge":
        model.layers[-1].set_weights(list(ridge.fit(frozen, train.y, 4000)))
    else:
        fit(model, train, 1, 1e-3, seed)
    fitted = softened(study, train, frozen) if arm == "soft" else train
    backbone.trainable = True
    last = Last()
    epochs = 7 if arm == "long" else EPOCHS
    fit(model, fitted, epochs, cosine(epochs * steps, 1e-3, steps // 2), seed, last if arm == "plain" else None)
    if arm == "plain":  # `fit` ends with the running mean of the weights
        mean = model.get_weights()
        model.set_weights(last.weights)
    reestimate_batch_norm(images, backbone, train, seed)
    six = list(range(len(SIX_LABELS))) if arm == "six" else SIX_LABELS
    found = {"findings": predict(model, held)[:, six]}
    if arm in ("plain", "noise") and sharp:
        found["from_256"] = predict(model, with_sharp(held, sharp))[:, six]
    if arm in ("plain", "classes"):
        mine = set(train.table["patient"])
        tree = load_augmented(study)
        tree = tree.take(np.flatnonzero(tree.table["patient"].isin(mine)))
    if arm == "plain":
        found["mirrored"] = (found["findings"] + predict(model, flipped(held))[:, six]) / 2
        features = keras.Model(model.input, model.get_layer("pooled").output)
        found["tree"] = class_scores(features, tree, held)
        originals = train.take((train.table["selected"] & train.table["split"].eq("train")).to_numpy())
        found["originals"] = class_scores(features, originals, held)
        model.set_weights(mean)
        reestimate_batch_norm(images, backbone, train, seed)
        found["ema"] = predict(model, held)[:, six]
    if arm == "classes":
        head = layers.Dense(len(CLASSES), activation="softmax")
        classes = keras.Model(model.input, head(layers.Dropout(0.3)(model.get_layer("pooled").output)))
        steps = len(tree) // BATCH
        classes.compile(
            keras.optimizers.AdamW(cosine(steps, 3e-4, steps // 4), weight_decay=0.01), "categorical_crossentropy"
        )
        classes.fit(batches(tree, BATCH, seed), steps_per_epoch=steps, callbacks=[Seed(seed)], shuffle=False, verbose=2)
        reestimate_batch_norm(images, backbone, train, seed)
        found["softmax"] = predict(classes, held)
    return found


def run_224(arm: str, seed: int, train: Samples, held: Samples, sharp: Path | None) -> dict[str, np.ndarray]:
    """Two fits' worth: an epoch of the head and one of all layers at 128 px, then one at 224 px."""
    model, backbone, _ = network(arm)
    steps = len(train) // BATCH
    backbone.trainable = False
    fit(model, train, 1, 1e-3, seed)
    backbone.trainable = True
    fit(model, train, 1, CosineDecay(0.0, steps, alpha=1.0, warmup_target=1e-3, warmup_steps=steps // 2), seed)
    larger, backbone, images = network(arm, 224, 256)
    larger.set_weights(model.get_weights())
    learned, soft = enlarged(train), enlarged(held)
    if arm == "sharp":
        learned = with_sharp(learned, sharp, np.random.default_rng(seed))
    fit(larger, learned, 1, CosineDecay(5e-4, steps), seed)
    reestimate_batch_norm(images, backbone, learned, seed)
    found = {"findings": predict(larger, soft)[:, SIX_LABELS]}
    if arm == "sharp":
        found["sharp"] = predict(larger, with_sharp(soft, sharp))[:, SIX_LABELS]
    return found


def enlarged(samples: Samples) -> Samples:
    """The same radiographs at 256 px, enlarged bilinearly."""
    large = [
        Image.fromarray(samples.x[row, :, :, 0]).resize((256, 256), Image.Resampling.BILINEAR) for row in samples.rows
    ]
    return samples.with_inputs(np.stack(large)[..., None])


def with_sharp(samples: Samples, folder: Path, rng: np.random.Generator | None = None) -> Samples:
    """The same radiographs, made from the folder's originals where there is one: all, or so many that it is no cue.

    Args:
        samples: at 256 px, or at 128 px.
        folder: 256-px originals.
        rng: draws them with probability c / P(there is one | labels), c being the least such P; all of them if None.
    """
    there = np.array([(folder / image).is_file() for image in samples.table["image"]])
    chosen = there
    if rng is not None:
        known = LogisticRegression(max_iter=1000).fit(samples.y, there).predict_proba(samples.y)[:, 1]
        chosen = there & (rng.random(len(there)) < known.min() / known)
    x = samples.x[samples.rows]
    for row in np.flatnonzero(chosen):
        sharp = np.asarray(Image.open(folder / samples.table["image"].iloc[row]).convert("L"))
        x[row, :, :, 0] = sharp if x.shape[1] == 256 else to_128(sharp)
    return samples.with_inputs(x)


def fit_all(sharp: Path | None, minutes: float) -> None:
    """Make the fits that have no file, until the minutes are over."""
    study = Study(Paths("nih_9k"), PROFILES["cpu"], SEED)
    everyone, fold = pool(study)
    files.make_folder(FOLDER)
    ends = time.monotonic() + 60 * minutes
    for arm, number in ORDER:
        path, claim = FOLDER / f"{arm}-{number}.npz", FOLDER / f"{arm}-{number}.claim"
        if time.monotonic() > ends:
            return
        if path.exists() or (arm == "sharp" and not sharp):
            continue
        try:
            with claim.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            if Path(f"/proc/{claim.read_text()}").exists():
                continue  # the other process is at it
            claim.write_text(str(os.getpid()))
        began, cpu = time.perf_counter(), time.process_time()
        found = run(arm, number, study, everyone, fold, sharp)
        auroc = mean_auroc(everyone.y[fold == number][:, SIX_LABELS], found["findings"])
        with files.atomic_file(path) as file:
            seconds = np.array([time.perf_counter() - began, time.process_time() - cpu])
            np.savez_compressed(file, seconds=seconds, **{k: _small(v) for k, v in found.items()})
        claim.unlink()
        print(f"fold {number}, {arm}: {auroc:.4f}, {seconds[1] / 60:.1f} core-minutes", flush=True)
        keras.utils.clear_session()


def _small(scores: np.ndarray) -> np.ndarray:
    """Probabilities as log-odds in half precision, which keep their order to a part in a thousand."""
    return scipy.special.logit(np.clip(scores.astype("float64"), 1e-4, 1 - 1e-4)).astype("float16")


def scores(arm: str, reading: str, number: int) -> np.ndarray | None:
    """What a fit predicted, as log-odds; None where it wasn't made, or without 256-px originals."""
    path = FOLDER / f"{arm}-{number}.npz"
    if not path.exists():
        return None
    with np.load(path) as found:
        return found[reading].astype("float32") if reading in found else None


def table() -> pd.DataFrame:
    """One row per part, metric and fold: the metric without the part and with it, and the fit's core-minutes."""
    study = Study(Paths("nih_9k"), PROFILES["cpu"], SEED)
    everyone, fold = pool(study)
    labels, classes = everyone.table["label"].to_numpy(), np.array(CLASSES)

    def measured(found: np.ndarray, metric: str, number: int) -> float:
        here = fold == number
        if metric == FINDINGS:
            return mean_auroc(everyone.y[here][:, SIX_LABELS], found)
        found, truth = found[labels[here] != ""], labels[here & (labels != "")]
        if metric == SINGLE:
            return mean_auroc((truth[:, None] == classes).astype(int), found)
        return balanced_accuracy_score(truth, classes[found.argmax(1)])

    rows = []
    for name, part in PARTS.items():
        for metric in (part.metric, *([BALANCED] if part.metric == SINGLE else [])):
            for number in range(1, FOLDS + 1):
                both = scores(*part.against, number), scores(part.arm, part.reading, number)
                if all(found is not None for found in both):
                    values = [measured(found, metric, number) for found in both]
                    with np.load(FOLDER / f"{part.arm}-{number}.npz") as found:
                        minutes = found["seconds"][1] / 60
                    rows.append((name, metric, number, *values, minutes))
    columns = ["part", "metric", "fold", "without", "with", "core_minutes"]
    return pd.DataFrame(rows, columns=columns).round({"without": 5, "with": 5, "core_minutes": 1})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("fit", "table"))
    parser.add_argument("--images-256", type=Path, default=os.environ.get("CHESTXRAY_NIH_256"), metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=1e9)
    given = parser.parse_args()
    folder = given.images_256 and Path(given.images_256) / "images"
    if given.what == "fit":
        fit_all(folder, given.minutes)
    else:
        table().to_csv(FOLDER.parent / "parts.csv", index=False)

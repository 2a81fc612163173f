"""Input side: which sides and epochs the fine-tuned networks should have, judged on validation patients alone.

    python -m tests.benchmarks.input_side WORK [ARM …]

Needs the prepared radiographs of nih_9k under `CHESTXRAY_ROOT`, and for the arms that go on from it the model 3a of
the `cpu` profile as it was before this trial (commit 2be84b0: one epoch of the head, four of all layers at 128 px).
Each arm goes on from its weights, or from ImageNet's, and appends one row to `input_side.csv`; an arm that has its
row is not fitted again. `epochs` are those at `side`, and `gain` is against that model 3a, whose mean AUROC was
0.7217. Predictions go to the folder WORK, from which the gains are computed, with 95 % intervals over 2,000 draws of
the validation patients. The committed rows are of one seed, the minutes of two busy cores; two fits of one schedule
and seed, on other threads, had 0.7328 and 0.7279.
"""

import sys
import time
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd
from keras import layers
from keras.optimizers.schedules import CosineDecay

from chestxray.config import ALL_LABELS, PRESENT, PROFILES, SIX_FINDINGS, SIX_LABELS, Paths, Study
from chestxray.evaluation import predictions
from chestxray.evaluation.bootstrap import Draws, interval
from chestxray.evaluation.metrics import rank_draws
from chestxray.networks import efficientnet
from chestxray.networks.layers import flattened
from chestxray.training.batch_norm import reestimate_batch_norm
from chestxray.training.callbacks import Seed
from chestxray.training.samples import Samples, batches, load_findings, predict

TABLE = Path(__file__).with_suffix(".csv")
SEED = 2024


class Arm(NamedTuple):
    """One schedule, after model 3a or from ImageNet's weights.

    Attributes:
        side: input side of the backbone in the last epochs, in pixels.
        epochs: how many, along a cosine from `rate` to 0; after model 3a the rate first rises for half an epoch.
        rate: peak learning rate of these.
        trained: what is trained: everything, or the last blocks and the head (the first blocks stay as they are).
        first: epochs at 128 px from ImageNet's weights, after one of the head, at a constant rate of 0.001; None where
            the arm goes on from model 3a, which has had an epoch of the head and four along a cosine.
    """

    side: int
    epochs: int
    rate: float = 5e-4
    trained: str = "all layers"
    first: int | None = None


ARMS = {
    "224 px, 3 epochs": Arm(224, 3),
    "128 px, 3 epochs": Arm(128, 3),
    "224 px, 3 epochs, lower rate": Arm(224, 3, 2e-4),
    "224 px, 3 epochs, last blocks": Arm(224, 3, trained="last blocks and head"),
    "anew: 128 px, 2 epochs; 224 px, 3 epochs": Arm(224, 3, first=2),
    "anew: 128 px, 3 epochs; 224 px, 2 epochs": Arm(224, 2, first=3),
    "anew: 128 px, 2 epochs; 192 px, 3 epochs": Arm(192, 3, first=2),
    "anew: 128 px, 2 epochs; 160 px, 3 epochs": Arm(160, 3, first=2),
    "anew: 128 px, 5 epochs": Arm(128, 3, first=2),
}


def network(side: int, large: int) -> tuple[keras.Model, keras.Model, keras.Model]:
    """The network of 3a for radiographs of `side` px enlarged to `large`: model, backbone, and what comes before it."""
    augmentation = keras.Sequential(
        [
            layers.RandomFlip("horizontal"),
            layers.RandomRotation(7 / 360, fill_mode="reflect"),
            layers.RandomTranslation(0.04, 0.04, fill_mode="reflect"),
            layers.RandomZoom((-0.07, 0.07), fill_mode="reflect"),
            layers.RandomContrast(0.15, value_range=(0, 255)),
            layers.RandomBrightness(0.08, value_range=(0, 255)),
        ]
    )
    backbone = efficientnet.build("EfficientNetLite0", (large, large, 3), bn_momentum=0.9)
    pixels = keras.Input((side, side, 1))
    x = layers.Resizing(large, large, antialias=True)(augmentation(layers.Rescaling(1.0)(pixels)))
    rgb = layers.Concatenate()([x, x, x])
    x = layers.Dropout(0.3)(layers.GlobalAveragePooling2D()(backbone(rgb)))
    findings = layers.Dense(len(ALL_LABELS), activation="sigmoid")(x)
    return keras.Model(pixels, findings), backbone, keras.Model(pixels, rgb)


def rising(steps: int, epochs: int, peak: float, lasting: float) -> CosineDecay:
    """A rate that rises for half an epoch and falls along a cosine to the share `lasting` of its peak."""
    rise = steps // 2
    return CosineDecay(0.0, steps * epochs - rise, alpha=lasting, warmup_target=peak, warmup_steps=rise)


def fit(model: keras.Model, study: Study, train: Samples, epochs: int, rate: float | CosineDecay) -> None:
    """Fit for some epochs with AdamW."""
    steps = len(train) // study.profile.batch_size
    model.compile(optimizer=keras.optimizers.AdamW(rate, weight_decay=0.01), loss="binary_crossentropy")
    data = batches(train, study.profile.batch_size, SEED)
    model.fit(data, steps_per_epoch=steps, epochs=epochs, callbacks=[Seed(SEED)], shuffle=False, verbose=2)


def run(arm: Arm, study: Study) -> tuple[np.ndarray, float]:
    """The validation predictions of an arm, (N, 15), and the minutes that its fit took."""
    keras.utils.set_random_seed(SEED)
    train, valid = load_findings(study, "train"), load_findings(study, "valid")
    side, steps = study.profile.image_size, len(train) // study.profile.batch_size
    began = time.perf_counter()
    if arm.first is None:
        start = keras.models.load_model(study.paths.saved("fine_tuning_3a") / "model.keras", compile=False)
        source = next(layer for layer in start.layers if isinstance(layer, keras.Model) and layer.trainable_weights)
        weights = [*source.get_weights(), *start.get_layer("findings").get_weights()]
    else:
        model, backbone, _ = network(side, side)
        backbone.trainable = False
        fit(model, study, train, 1, 1e-3)
        backbone.trainable = True
        fit(model, study, train, arm.first, rising(steps, arm.first, 1e-3, 1.0))
        weights = [*backbone.get_weights(), *model.layers[-1].get_weights()]
    model, backbone, images = network(side, arm.side)
    backbone.set_weights(weights[:-2])
    model.layers[-1].set_weights(weights[-2:])
    if arm.trained != "all layers":
        names = [layer.name for layer in flattened(backbone) if layer.weights]
        for layer in flattened(backbone):
            layer.trainable = layer.name in names[len(names) // 2 :]
    falling = CosineDecay(arm.rate, steps * arm.epochs) if arm.first else rising(steps, arm.epochs, arm.rate, 0.0)
    fit(model, study, train, arm.epochs, falling)
    reestimate_batch_norm(images, backbone, train, SEED)
    return predict(model, valid), (time.perf_counter() - began) / 60


def main(work: Path, wanted: list[str]) -> None:
    """Fit the arms that have no row yet."""
    study = Study(Paths("nih_9k"), PROFILES["cpu"], SEED)
    valid = load_findings(study, "valid")
    drawn = Draws.of(valid.table["patient"], 2000, SEED)
    base = predictions.read_predictions(study.paths.saved("fine_tuning_3a") / "predictions_valid.csv")
    assert (base["image"].to_numpy() == valid.table["image"].to_numpy()).all()

    def areas(scores: np.ndarray) -> np.ndarray:
        return np.mean(
            [rank_draws(valid.y[:, k] > 0, s, drawn)[0] for k, s in zip(SIX_LABELS, scores.T, strict=True)], 0
        )

    start = areas(base[list(PRESENT)].to_numpy())
    work.mkdir(parents=True, exist_ok=True)
    for name in wanted or ARMS:
        if TABLE.exists() and name in pd.read_csv(TABLE)["schedule"].to_numpy():
            continue
        arm = ARMS[name]
        scores, minutes = run(arm, study)
        np.save(work / f"{name.replace(' ', '_')}.npy", scores[:, SIX_LABELS].astype("float16"))
        found = areas(scores[:, SIX_LABELS])
        low, high, _ = interval(found - start)
        row = {"schedule": name, "side": arm.side, "epochs": arm.epochs, "rate": arm.rate, "trained": arm.trained}
        row |= {"minutes": round(minutes, 1), "auroc": found[0], "gain": found[0] - start[0], "low": low, "high": high}
        table = pd.DataFrame([row]).round(4)
        table.to_csv(TABLE, mode="a", header=not TABLE.exists(), index=False)
        print(table.to_string(index=False), flush=True)
    print(f"start: {start[0]:.4f}; mean AUROC of {', '.join(SIX_FINDINGS)} over {len(valid)} validation radiographs")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

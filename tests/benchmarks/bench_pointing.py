"""Measure what heat-maps hit on phantoms, where the truth is known: `python -m tests.benchmarks.bench_pointing [px]`.

A network of the study is fitted on phantoms with one finding or none, and explained for the true class of others: for
all, and for those recognised, whose most probable class is the true one.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import joblib
import keras
import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from chestxray.config import CLASSES
from chestxray.data import phantom
from chestxray.evaluation import localisation
from chestxray.inference import engines
from chestxray.networks import transfer

TRAIN, TEST = 1500, 900
EPOCHS = 14
FILTERS = {64: (16, 32, 64, 96), 128: (16, 32, 64, 96, 128)}
ASKED = ("Mass", "Nodule", "Effusion", "Pneumothorax", "Infiltration", "Atelectasis")


def _drawn(indices: range, px: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[list[tuple[float, ...]]]]:
    """Grey values, class indices and boxes (in shares of the side) of the phantoms with exactly one class."""
    scenes = [phantom.compose(index, seed) for index in indices]
    kept = [one for one in scenes if len(one.slot.findings) <= 1 and set(one.slot.findings) <= set(CLASSES)]
    images = joblib.Parallel(n_jobs=2, batch_size=32)(joblib.delayed(phantom.render)(one, px) for one in kept)
    labels = [CLASSES.index([*one.slot.findings, "No_finding"][0]) for one in kept]
    boxes = [
        [
            (b.x / px, b.y / px, (b.x + b.width) / px, (b.y + b.height) / px)
            for b in phantom.boxes(one, px)
            if b.finding in CLASSES
        ]
        for one in kept
    ]
    return np.stack(images)[..., None], np.array(labels), boxes


def main() -> None:
    """Print the share of maps whose peak lies in a box, beside the image's centre and the most that can be hit."""
    px = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    keras.utils.set_random_seed(2024)
    x, y, _ = _drawn(range(TRAIN), px, 1)
    shown, truth, boxes = _drawn(range(TRAIN, TRAIN + TEST), px, 1)
    model = transfer.cnn(px, FILTERS[px], dropout=0.2)
    rate = keras.optimizers.schedules.CosineDecay(3e-3, EPOCHS * -(-len(x) // 32))
    model.compile(keras.optimizers.AdamW(rate), "sparse_categorical_crossentropy", jit_compile=False)
    model.fit(x.astype("float32"), y, 32, EPOCHS, verbose=0)
    scores = model.predict(shown.astype("float32"), 64, verbose=0)
    areas = [roc_auc_score(truth == CLASSES.index(name), scores[:, CLASSES.index(name)]) for name in ASKED]
    print(f"{len(x)} phantoms at {px} px to learn from, {len(shown)} to look at")
    print(f"{'':24}" + "".join(f"{name[:9]:>11}" for name in ASKED))
    print(f"{'AUROC':24}" + "".join(f"{area:11.3f}" for area in areas))
    right = scores.argmax(axis=1) == truth
    found = [right[truth == CLASSES.index(name)].mean() for name in ASKED]
    print(f"{'recognised':24}" + "".join(f"{share:11.3f}" for share in found))
    targets = pd.DataFrame({"finding": [CLASSES[k] for k in truth], "boxes": boxes})
    asked = targets["finding"].isin(ASKED) & targets["boxes"].map(len).gt(0)
    place = np.flatnonzero(asked)
    engine = engines.KerasEngine(model)
    rows, columns = engine.cells()
    scored = localisation.hits(
        engine.heat_maps(shown[place][..., 0], truth[place]), targets.iloc[place], (rows, columns)
    )
    by = scored.groupby("finding")[["pointing", "centre_pointing", "reachable"]].mean().loc[list(ASKED)]
    known = scored[right[place]].groupby("finding")["pointing"].mean().reindex(list(ASKED))
    titles = {"centre_pointing": "centre", "reachable": "at most", "pointing": "class map"}
    for title, values in {**{title: by[column] for column, title in titles.items()}, "recognised": known}.items():
        print(f"{rows:3} × {columns:<3} {title:13}" + "".join(f"{value:11.3f}" for value in values))


if __name__ == "__main__":
    main()

"""How fast `fit` trains, as ratios of one run: `python -m tests.benchmarks.bench_training`.

The network is EfficientNet-Lite0 at 128 px with 15 sigmoids and random weights, which cost the same, and without
augmentation; a batch has 32 images. Pixels are noise in a memory-mapped file, as the study's cache is one. Three things
run in turns, so that whatever else the machine does slows all of them: the steps of an epoch within `model.fit`, with
the study's batches and callbacks; the same step on one batch in memory; and PyTorch's step on one batch in memory.

PyTorch's row needs a Python with torch and efficientnet_lite_pytorch: this one, or the one that the variable
CHESTXRAY_TORCH names. Without it that row is left out.
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
import pandas as pd
import tensorflow as tf
from keras import layers

from chestxray.config import ALL_LABELS
from chestxray.networks import efficientnet
from chestxray.training.callbacks import Checkpoint, callbacks
from chestxray.training.samples import Samples, batches

SIDE, BATCH, STEPS, ROUNDS = 128, 32, 12, 7

TORCH = """
import sys, time
import torch
from efficientnet_lite_pytorch import EfficientNet

side, batch, steps, labels = map(int, sys.argv[1:])
net = EfficientNet.from_name("efficientnet-lite0", num_classes=labels, image_size=side)
optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
x, y = torch.rand(batch, 3, side, side), torch.randint(0, 2, (batch, labels)).float()
net.train()
for _ in sys.stdin:
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(net(x), y).backward()
        optimizer.step()
    print(steps * batch / (time.perf_counter() - began), flush=True)
"""


@contextlib.contextmanager
def torch_rate() -> Iterator[Callable[[], float] | None]:
    """A function that gives PyTorch's images a second, or None where there is no PyTorch."""
    python = os.environ.get("CHESTXRAY_TORCH", sys.executable)
    if subprocess.run([python, "-c", "import torch, efficientnet_lite_pytorch"], capture_output=True).returncode:
        yield None
        return
    command = [python, "-c", TORCH, *map(str, (SIDE, BATCH, STEPS, len(ALL_LABELS)))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:

        def rate() -> float:
            child.stdin.write("go\n")
            child.stdin.flush()
            return float(child.stdout.readline())

        yield rate
        child.stdin.close()


def noise(folder: Path, count: int) -> Samples:
    """Radiographs of noise in a memory-mapped file, with random targets."""
    rng = np.random.default_rng(1)
    path = folder / f"{count}.npy"
    np.save(path, rng.integers(0, 256, (count, SIDE, SIDE, 1), "uint8"))
    y = rng.integers(0, 2, (count, len(ALL_LABELS))).astype("float32")
    return Samples(np.load(path, mmap_mode="r"), np.arange(count), y, pd.DataFrame(index=range(count)))


def network() -> keras.Model:
    """Notebook 3a's without augmentation."""
    pixels = keras.Input((SIDE, SIDE, 1))
    backbone = efficientnet.build("EfficientNetLite0", (SIDE, SIDE, 3), weights=None, bn_momentum=0.9)
    x = layers.GlobalAveragePooling2D()(backbone(layers.Concatenate()([pixels] * 3)))
    model = keras.Model(pixels, layers.Dense(len(ALL_LABELS), "sigmoid")(layers.Dropout(0.3)(x)))
    model.compile(keras.optimizers.AdamW(1e-4, weight_decay=0.01), "binary_crossentropy")
    return model


class Turns(keras.callbacks.Callback):
    """Times the steps of each epoch, and after it the other ways to train. It stands first among the callbacks."""

    def __init__(self, others: dict[str, Callable[[], float]]) -> None:
        super().__init__()
        self.others = others
        self.rates: dict[str, list[float]] = {"fit": [], **{name: [] for name in others}}

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.took = time.perf_counter() - self.began

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.rates["fit"].append(STEPS * BATCH / self.took)
        for name, rate in self.others.items():
            self.rates[name].append(rate())


def main() -> None:
    """Measure, and print the table."""
    keras.utils.set_random_seed(1)
    model = network()
    with tempfile.TemporaryDirectory() as place, torch_rate() as torch:
        folder = Path(place)
        train, valid = noise(folder, 2 * STEPS * BATCH), noise(folder, BATCH)
        step = tf.function(partial(model.train_step, (tf.constant(train.x[:BATCH]), tf.constant(train.y[:BATCH]))))

        def memory() -> float:
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            return STEPS * BATCH / (time.perf_counter() - began)

        turns = Turns({"memory": memory, **({"PyTorch": torch} if torch else {})})
        checkpoint = Checkpoint(model, folder / "checkpoint.npz", "bench", "fit", ROUNDS + 1)
        listed = [turns, *callbacks(checkpoint, valid, 1, STEPS, folder / "logs")]
        settings = {"steps_per_epoch": STEPS, "epochs": ROUNDS + 1, "verbose": 0}
        with contextlib.redirect_stdout(io.StringIO()):
            model.fit(batches(train, BATCH, 1), callbacks=listed, shuffle=False, **settings)
    rates = {name: np.array(seen[1:]) for name, seen in turns.rates.items()}  # the first epoch traces the step
    print(f"{'fit against':<42} {'ratio':>6}  {'bar':<8} images/s")
    for name, what, bar in (
        ("memory", "its step on one batch in memory", ">= 0.95"),
        ("PyTorch", "PyTorch's step on one batch in memory", ">= 2.3"),
    ):
        if name in rates:
            ratio, ours, theirs = (np.median(v) for v in (rates["fit"] / rates[name], rates["fit"], rates[name]))
            print(f"{what:<42} {ratio:>6.2f}  {bar:<8} {ours:.0f} against {theirs:.0f}")
    if not torch:
        print("PyTorch is left out: CHESTXRAY_TORCH names no Python that has it")


if __name__ == "__main__":
    main()

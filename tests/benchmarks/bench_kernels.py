"""What TensorFlow's oneDNN kernels are worth on this machine's CPU: `python -m tests.benchmarks.bench_kernels`.

EfficientNet-Lite0 with random weights is trained for a few steps and passes over images, in processes
with and without the kernels in turn, since TensorFlow asks for them once. It needs no data.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

STEPS, BATCH, PASSED = 6, 32, 256


def main() -> None:
    """Print images a second with and without the kernels, and the ratios."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--size", type=int, default=128, help="side that the backbone sees, pixels")
    arguments.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    arguments.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.once:
        print(json.dumps(measure(chosen.size)))
        return
    command = [sys.executable, "-m", "tests.benchmarks.bench_kernels", "--size", str(chosen.size), "--once"]
    runs = []
    for _ in range(chosen.rounds):
        for kernels in ("0", "1"):
            environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": kernels, "TF_CPP_MIN_LOG_LEVEL": "3"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            runs.append({"kernels": "with" if kernels == "1" else "without", **json.loads(done.stdout)})
    rates = pd.DataFrame(runs).groupby("kernels").median().T
    print("images a second, medians")
    print(rates.assign(ratio=rates["with"] / rates["without"]).round(2).to_string())


def measure(size: int) -> dict[str, float]:
    """Images a second of a training step, and of a pass of the backbone."""
    import keras

    from chestxray.networks import efficientnet
    from chestxray.training.samples import Samples, compiled, predict

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (PASSED, 128, 128, 1), dtype="uint8"), rng.random((PASSED, 15)).astype("float32")
    pixels = keras.Input((128, 128, 1))
    resized = keras.layers.Resizing(size, size)(pixels)
    rgb = keras.layers.Concatenate()([resized, resized, resized])
    maps = efficientnet.build("EfficientNetLite0", (size, size, 3), weights=None)(rgb)
    pooled = keras.layers.GlobalAveragePooling2D()(maps)
    model = keras.Model(pixels, keras.layers.Dense(15, activation="sigmoid")(pooled))
    model.compile(keras.optimizers.AdamW(1e-4), "binary_crossentropy", jit_compile=False)
    trained = seconds(lambda: [model.train_on_batch(x[:BATCH], y[:BATCH]) for _ in range(STEPS)])
    forward, samples = compiled(model), Samples(x, np.arange(PASSED), y, pd.DataFrame())
    return {"training": BATCH * STEPS / trained, "pass": PASSED / seconds(predict, forward, samples)}


def seconds(work: Callable, *given: object) -> float:
    """How long a call takes that was made once before."""
    work(*given)
    began = time.perf_counter()
    work(*given)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

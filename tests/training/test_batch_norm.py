"""Batch normalisation: after the re-estimate, the statistics held are those that other radiographs meet."""

import os
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from conftest import tiny_pixels
from keras import layers
from PIL import Image

from chestxray.networks import efficientnet
from chestxray.networks.layers import flattened
from chestxray.training.batch_norm import reestimate_batch_norm
from chestxray.training.samples import Samples

SIDE, EACH = 64, 1024


def radiographs() -> np.ndarray:
    """(2 × EACH, SIDE, SIDE, 1) uint8: real ones where there are any, else drawn waves."""
    if folder := os.environ.get("CHESTXRAY_NIH"):
        files = sorted(Path(folder).rglob("*.png"))
        files = [files[i] for i in np.random.default_rng(0).permutation(len(files))[: 2 * EACH]]
        pictures = [np.asarray(Image.open(file).convert("L").reduce(2)) for file in files]
    else:
        pictures = [tiny_pixels(index, SIDE) for index in range(2 * EACH)]
    return np.stack(pictures)[..., None]


def variances_met(backbone: keras.Model, norms: list[keras.Layer], rgb: np.ndarray) -> list[np.ndarray]:
    """Each layer's variance per channel over the images and positions that enter it in prediction, by NumPy."""
    entering = keras.Model(backbone.input, [norm.input for norm in norms])
    sums = [np.zeros((3, norm.gamma.shape[0])) for norm in norms]
    for start in range(0, len(rgb), 128):
        for total, values in zip(sums, entering.predict_on_batch(rgb[start : start + 128]), strict=True):
            values = values.reshape(-1, values.shape[-1]).astype(float)
            total += [np.full(values.shape[1], len(values)), values.sum(0), (values**2).sum(0)]
    return [total[2] / total[0] - (total[1] / total[0]) ** 2 for total in sums]


def test_the_variance_held_is_the_one_that_other_images_meet():
    x = radiographs()
    pixels = keras.Input((SIDE, SIDE, 1))
    images = keras.Model(
        pixels, layers.Concatenate()([layers.RandomBrightness(0.5)(layers.Rescaling(1.0)(pixels))] * 3)
    )
    backbone = efficientnet.build("EfficientNetLite0", (SIDE, SIDE, 3), drop_connect_rate=0.5, bn_momentum=0.9)
    norms = [layer for layer in flattened(backbone) if isinstance(layer, keras.layers.BatchNormalization)]
    dropouts = [layer for layer in flattened(backbone) if isinstance(layer, keras.layers.Dropout)]
    before = [layer.rate for layer in dropouts], [layer.momentum for layer in norms]
    kernels = [w.numpy() for w in backbone.trainable_weights]

    samples = Samples(x, np.arange(EACH), np.zeros((EACH, 15), "float32"), pd.DataFrame(index=range(EACH)))
    reestimate_batch_norm(images, backbone, samples, seed=3)

    met = variances_met(backbone, norms, np.repeat(x[EACH:], 3, axis=-1).astype("float32"))
    held = [norm.moving_variance.numpy() for norm in norms]
    # ImageNet's weights leave some channels constant: they have no variance, held or met.
    ratios = [np.median(there[own > 0] / own[own > 0]) for there, own in zip(met, held, strict=True)]
    assert all(np.allclose(there[own == 0], 0, atol=1e-6) for there, own in zip(met, held, strict=True))
    print(f"variance met / held: median over layers {np.median(ratios):.3f}")
    assert len(ratios) > 40 and abs(np.median(ratios) - 1) <= 0.02, np.round(ratios, 3)
    assert dropouts and before == ([layer.rate for layer in dropouts], [layer.momentum for layer in norms])
    assert all(np.array_equal(a, b) for a, b in zip(kernels, backbone.trainable_weights, strict=True))

"""Batch normalisation: mean and variance re-estimated for the network as it predicts.

While training, running statistics are taken with dropout, stochastic depth and augmentation on, and from earlier
weights; the activations that a network meets when it predicts have others.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from chestxray.networks.layers import flattened
from chestxray.training.samples import Samples, batches

STEPS = 60
"""Batches over which mean and variance are taken."""


def reestimate_batch_norm(images: keras.Model, backbone: keras.Model, samples: Samples, seed: int) -> None:
    """Set the backbone's BatchNorm statistics to those of radiographs without augmentation or dropout.

    Args:
        images: radiographs (N, H, W, 1) to the backbone's input; what is in it acts as in prediction.
        backbone: the network to re-estimate, in place.
        samples: training radiographs, of which up to `STEPS` batches are drawn.
        seed: of the draw.
    """
    size = min(64, len(samples))
    layers = flattened(backbone)
    norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
    dropouts = [layer for layer in layers if isinstance(layer, keras.layers.Dropout)]
    before = [layer.momentum for layer in norms], [layer.rate for layer in dropouts]
    taken = [([], []) for _ in norms]
    try:
        for layer in norms:
            layer.momentum = 0.0  # the running statistics are then those of the batch alone
        for layer in dropouts:
            layer.rate = 0.0
        update = tf.function(lambda x: backbone(images(x, training=False), training=True))
        for x, _ in batches(samples, size, seed).take(min(STEPS, len(samples) // size)):
            update(x)
            for layer, (means, variances) in zip(norms, taken, strict=True):
                means.append(layer.moving_mean.numpy())
                variances.append(layer.moving_variance.numpy())
    finally:
        for layer, momentum in zip(norms, before[0], strict=True):
            layer.momentum = momentum
        for layer, rate in zip(dropouts, before[1], strict=True):
            layer.rate = rate
    for layer, (means, variances) in zip(norms, taken, strict=True):
        layer.moving_mean.assign(np.mean(means, axis=0))
        layer.moving_variance.assign(np.mean(variances, axis=0) + np.var(means, axis=0))

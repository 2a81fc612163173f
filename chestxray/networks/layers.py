"""Layers: batch normalisation by TensorFlow's fused kernel.

Keras 3 computes batch normalisation from elementary operations, each a pass over the whole feature map, forwards and
backwards. In a small EfficientNet on a CPU they take as long as its convolutions. The fused kernel gives the same
numbers in a fraction of the time.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers


@keras.saving.register_keras_serializable("chestxray")
class BatchNormalization(layers.BatchNormalization):
    """`keras.layers.BatchNormalization` of images, (N, H, W, C), computed by one kernel instead of a dozen operations.

    Weights, arguments, running statistics and results are those of Keras's layer (Ioffe & Szegedy, ICML 2015); a model
    that `training.save_model` wrote holds Keras's layer in its place and loads without this class, for which it has the
    same name. What Keras's own `save` wrote loads wherever this module was imported. Inputs of another rank, a mask and
    batch renormalisation go Keras's way.
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None) -> tf.Tensor:
        """Normalise (N, H, W, C) by the batch's statistics while training, else by the running ones.

        Args:
            inputs: (N, H, W, C).
            training: whether this is a training step.
            mask: which inputs count, as Keras passes it.
        """
        if mask is not None or not self._can_fuse(inputs):
            return super().call(inputs, training=training, mask=mask)
        learning = bool(training) and self.trainable
        given = {} if learning else {"mean": self.moving_mean.value, "variance": self.moving_variance.value}
        x, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            # Float32 as in Keras's layer: statistics overflow in float16.
            tf.cast(inputs, "float32"),
            self.gamma.value,
            self.beta.value,
            epsilon=self.epsilon,
            is_training=learning,
            **given,
        )
        if learning:
            # The kernel divides by one less than the number of pixels; Keras divides by their number.
            count = tf.cast(tf.size(inputs) // tf.shape(inputs)[-1], "float32")
            variance *= (count - 1) / count
            for running, now in ((self.moving_mean, mean), (self.moving_variance, variance)):
                running.assign(running * self.momentum + now * (1 - self.momentum))
        return tf.cast(x, self.compute_dtype)

    def _can_fuse(self, inputs: Any) -> bool:
        special = self.synchronized or getattr(self, "renorm", False)
        return len(inputs.shape) == 4 and self.axis in (-1, 3) and self.scale and self.center and not special


def flattened(model: keras.Model) -> list[keras.Layer]:
    """The layers of a model and of the models within it, in order, without these models themselves."""
    inner = ([layer] if not isinstance(layer, keras.Model) else flattened(layer) for layer in model.layers)
    return [layer for layers_ in inner for layer in layers_]

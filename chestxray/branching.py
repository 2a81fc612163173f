"""A branch of a network whose gradient is the same each time that a step is traced.

TensorFlow adds the gradients of a feature map that several layers read in one operation. From three on, the order of
its terms depends on which memory is free when it runs, and with it the last digit of the sum: two fits from one seed
part after a few steps. Where no map has more than two readers, there is one order only. It knows layers and nothing of
networks.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf
from keras import layers


@tf.custom_gradient
def _branch(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    # Without an operation of its own between them, TensorFlow would join two sums into one of three terms.
    return tf.identity(x), lambda gradient: tf.raw_ops.Snapshot(input=gradient)


@keras.saving.register_keras_serializable("chestxray")
class Identity(layers.Identity):
    """`keras.layers.Identity` that keeps the sum of its readers' gradients apart from other sums.

    A model that `training.save_model` wrote holds Keras's layer in its place, for which it has the same name, and loads
    without this class.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Give what it was given."""
        return _branch(inputs)

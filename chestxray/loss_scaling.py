"""Loss scaling for float16 on several GPUs.

Gradients of float16 underflow unless the loss is scaled up, and overflow where it is scaled too far; an optimizer then
leaves out the step and scales less (Micikevicius et al., ICLR 2018). Keras's own, 3.13 to 3.15, asks the first GPU
alone whether its part of the gradient overflowed, and adds the parts afterwards: an overflow on another one reaches
every weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf


class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Keras's loss scaling, with a step left out wherever the gradient overflowed.

    On one device it is Keras's own.
    """

    def check_finite(self, grads: Sequence[tf.Tensor | None]) -> tf.Tensor:
        """Whether every gradient is finite on every device: a bool scalar, the same on all of them."""
        finite = super().check_finite(grads)
        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            return finite
        overflows = tf.cast(tf.logical_not(finite), "int32")
        return tf.equal(replica.all_reduce(tf.distribute.ReduceOp.SUM, overflows), 0)

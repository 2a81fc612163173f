"""Fused batch normalisation against Keras's own layer, and the file of a model that was trained with it."""

import json
import zipfile

import keras
import numpy as np
import pytest
import small_models
import tensorflow as tf
from keras import layers

from chestxray.networks.layers import BatchNormalization
from chestxray.training import model_file


def twins(**arguments):
    """Keras's layer and the fused one with the same weights, none of them at its initial value."""
    rng = np.random.default_rng(1)
    pair = [kind(momentum=0.9, epsilon=1e-3, **arguments) for kind in (layers.BatchNormalization, BatchNormalization)]
    for layer in pair:
        layer.build((None, 6, 5, 4))
    weights = [rng.uniform(0.5, 1.5, w.shape) for w in pair[0].get_weights()]
    for layer in pair:
        layer.set_weights(weights)
    return pair


@pytest.mark.parametrize("training_mode", [True, False])
def test_outputs_gradients_and_statistics_are_those_of_keras(training_mode):
    images = tf.constant(np.random.default_rng(2).normal(3, 2, (7, 6, 5, 4)), "float32")
    seen = []
    for layer in twins():
        with tf.GradientTape() as tape:
            tape.watch(images)
            out = layer(images, training=training_mode)
            loss = tf.reduce_sum(out**3)
        slopes = tape.gradient(loss, [images, *layer.trainable_variables])
        seen.append([out, *slopes, *layer.get_weights()])
    for theirs, ours in zip(*seen, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


def test_a_frozen_layer_keeps_its_statistics():
    _, fused = twins()
    fused.trainable = False
    before = fused.get_weights()
    fused(np.random.default_rng(3).normal(5, 1, (4, 6, 5, 4)).astype("float32"), training=True)
    for kept, was in zip(fused.get_weights(), before, strict=True):
        np.testing.assert_array_equal(kept, was)


@pytest.mark.parametrize("shape", [(8, 4), (8, 5, 4)])
def test_inputs_that_are_no_images_go_the_way_of_keras(shape):
    x = np.random.default_rng(4).normal(size=shape).astype("float32")
    theirs, ours = layers.BatchNormalization()(x, training=True), BatchNormalization()(x, training=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_float16_is_normalised_in_float32():
    layer = BatchNormalization(dtype="mixed_float16")
    images = np.random.default_rng(5).normal(20_000, 9_000, (4, 6, 5, 4)).astype("float16")
    out = layer(images, training=True)
    assert out.dtype == "float16"
    # Their squares are beyond float16.
    assert np.isfinite(out).all() and np.isfinite(layer.moving_variance).all()


def test_a_saved_model_holds_the_layer_of_keras_and_predicts_the_same(tmp_path):
    pixels = keras.Input((32, 32, 1))
    x = BatchNormalization(momentum=0.9)(layers.Conv2D(4, 3)(pixels))
    model = small_models.shaken(keras.Model(pixels, layers.GlobalAveragePooling2D()(x)), 1)
    radiographs = np.random.default_rng(6).integers(0, 256, (3, 32, 32, 1)).astype("uint8")
    predicted = model(radiographs, training=False).numpy()
    model_file.save_model(model, tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        config = archive.read("config.json").decode()
    assert "chestxray" not in config
    assert sum(layer["class_name"] == "BatchNormalization" for layer in json.loads(config)["config"]["layers"]) == 1
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_allclose(loaded(radiographs, training=False), predicted, atol=1e-4)

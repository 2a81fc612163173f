"""Class activation maps against a computation by hand, and what a map must be: its mean is the logit."""

import keras
import numpy as np
import pytest
from keras import layers
from PIL import Image

from chestxray.config import CLASSES, StudyError
from chestxray.networks import class_activation, ensemble, transfer

SIDE = 16


def tiny(seed=0, activation="softmax", pools=False):
    """A network that ends in global average pooling and a dense layer, its convolutions in a network of their own."""
    keras.utils.set_random_seed(seed)
    pixels, inner = layers.Input((SIDE, SIDE, 1)), layers.Input((SIDE, SIDE, 1))
    x = layers.RandomFlip("horizontal", seed=1)(layers.Rescaling(1 / 255)(pixels))
    y = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(inner)
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(5, 3, strides=2, padding="same")(y)))
    x = keras.Model(inner, y, name="backbone")(x)
    x = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(layers.AveragePooling2D(2)(x) if pools else x))
    last = None if activation == "layer" else activation
    x = layers.Dense(len(CLASSES), activation=last, bias_initializer="random_normal", name="classes")(x)
    return keras.Model(pixels, x if last else layers.Activation("softmax")(x), name=f"tiny{seed}")


def radiographs(number=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, SIDE, SIDE, 1)).astype("float32")


def maps_of(model, pixels):
    outputs = ensemble.answering(model).predict_on_batch(pixels)
    return [np.asarray(outputs[name]) for name in sorted(outputs) if name.startswith("class_maps")]


def heat_maps(model, pixels, classes):
    return class_activation.joined(class_activation.member_maps(maps_of(model, pixels), classes, SIDE))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "layer"])
@pytest.mark.parametrize("pools", [False, True])
def test_the_map_is_the_dense_layers_weights_over_the_last_feature_map(activation, pools):
    """CAM (Zhou et al., CVPR 2016) by numpy; Pillow enlarges."""
    model, pixels, classes = tiny(1, activation, pools), radiographs(), np.array([0, 1, 2, 3, 6])
    model.trainable = False
    features = np.asarray(model.get_layer("backbone")(pixels / 255, training=False))
    kernel = np.asarray(model.get_layer("classes").kernel)
    maps = np.maximum(np.einsum("nhwk,kn->nhw", features, kernel[:, classes]), 0)
    large = [np.asarray(Image.fromarray(heat).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for heat in maps]
    expected = np.stack([heat / (heat.max() or 1) for heat in large])
    found = heat_maps(model, pixels, classes)
    assert found.shape == (5, SIDE, SIDE) and found.dtype == np.float32
    assert found == pytest.approx(expected, abs=1e-4) and found.max() == pytest.approx(1)


@pytest.mark.parametrize("blended", [False, True])
def test_the_mean_of_a_map_is_the_logit_without_its_constant(blended):
    keras.utils.set_random_seed(2)
    odds = np.linspace(-2, 0, 7) if blended else None
    network = transfer.transfer("EfficientNetLite0", 32, 64, weights=None, log_odds=odds).classifier
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1)).astype("float32")
    logits = keras.Model(network.input, network.layers[-1].input)(pixels, training=False)
    (maps,) = maps_of(network, pixels)
    constant = np.asarray(logits) - maps[:, 0].mean(axis=(1, 2))
    assert np.ptp(constant, axis=0) == pytest.approx(np.zeros(7), abs=1e-5)


def test_an_ensembles_map_is_the_mean_of_its_members_maps():
    members, pixels, classes = [tiny(3), tiny(4, "sigmoid")], radiographs(3), np.array([0, 3, 5])
    alone = [heat_maps(member, pixels, classes) for member in members]
    for head in (None, ensemble.head(2)):
        joined = ensemble.join(members, head)
        assert ensemble.members(joined) == members
        found = class_activation.member_maps(maps_of(joined, pixels), classes, SIDE)
        assert found == pytest.approx(np.stack(alone), abs=1e-5)
        mean = np.mean(alone, axis=0)
        expected = mean / mean.max(axis=(1, 2), keepdims=True)
        assert heat_maps(joined, pixels, classes) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("enlarged", [False, True])
def test_a_mirrored_ensembles_map_is_the_mean_of_both_views(enlarged):
    member, pixels = tiny(7), radiographs(3)
    mean = (heat_maps(member, pixels, 2) + heat_maps(member, pixels[:, :, ::-1], 2)[..., ::-1]) / 2
    joined = ensemble.join([member], None, mirrored=True, enlarged=enlarged)
    expected = mean / mean.max(axis=(1, 2), keepdims=True)
    assert heat_maps(joined, pixels, 2) == pytest.approx(expected, abs=1e-5)


def test_networks_without_class_maps_are_named():
    with pytest.raises(StudyError, match="dense has no convolution"):
        class_activation.with_class_maps(transfer.dense(32, (4,)))
    pixels = layers.Input((SIDE, SIDE, 1))
    pooled = layers.GlobalAveragePooling2D()(layers.Conv2D(3, 3)(pixels))
    bent = layers.Activation("softmax")(layers.Dense(7)(layers.Dense(9, activation="relu")(pooled)))
    around = layers.Dense(7)(layers.Concatenate()([pooled, layers.Flatten()(pixels)]))
    for output in (bent, layers.Activation("softmax")(around)):
        with pytest.raises(StudyError, match="isn't linear behind its pooling"):
            class_activation.with_class_maps(keras.Model(pixels, output))

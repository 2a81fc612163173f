"""Class activation maps add up to the finding's logit; an ensemble's are its members' mean."""

import keras
import numpy as np
import pytest
import small_models
from keras import layers
from PIL import Image
from scipy.special import logit

from chestxray.config import ALL_LABELS, StudyError
from chestxray.networks import class_activation, efficientnet, ensemble

SIDE = 32


def radiographs(number=5):
    return np.random.default_rng(0).integers(0, 256, (number, SIDE, SIDE, 1)).astype("float32")


def predicted(model, pixels):
    return {name: np.asarray(values) for name, values in model(pixels, training=False).items()}


def lite():
    return small_models.network(SIDE, 4, net=efficientnet.build("EfficientNetLite0", (SIDE, SIDE, 3), None))


@pytest.mark.parametrize(
    "make", [lite, lambda: small_models.network(SIDE, member_side=48), lambda: small_models.cnn(SIDE)]
)
def test_a_map_adds_up_to_the_logit_of_its_finding(make):
    model, pixels = make(), radiographs()
    own, found = predicted(model, pixels), predicted(class_activation.with_class_maps(model), pixels)
    assert found["maps"].ndim == 4 and found["maps"].shape[-1] == len(ALL_LABELS)
    np.testing.assert_allclose(found["maps"].mean(axis=(1, 2)), logit(own["findings"]), atol=2e-3)
    for name, values in own.items():
        np.testing.assert_array_equal(found[name], values)


def test_maps_are_enlarged_as_pillow_does_and_chosen_by_finding():
    maps = np.random.default_rng(1).normal(size=(2, 4, 4, 15)).astype("float32")
    found = class_activation.finding_maps([maps], ["Mass", "Effusion"], SIDE)
    for row, name in enumerate(("Mass", "Effusion")):
        own = Image.fromarray(maps[row, :, :, ALL_LABELS.index(name)])
        np.testing.assert_allclose(found[row], own.resize((SIDE, SIDE), Image.Resampling.BILINEAR), atol=1e-5)
    assert np.array_equal(class_activation.finding_maps([maps], "Mass", SIDE)[0], found[0])


@pytest.mark.parametrize("head", [False, True])
def test_an_ensemble_gives_its_members_predictions_and_maps(head):
    parts, pixels = [small_models.network(SIDE, member_side=48), small_models.cnn(SIDE)], radiographs(3)
    joined = small_models.ensemble(parts, head)
    assert ensemble.members(joined) == parts
    found, whole = predicted(ensemble.answering(joined), pixels), predicted(joined, pixels)
    for name in ("findings", "classes"):
        np.testing.assert_allclose(found[name], whole[name], atol=1e-6)
        own = [predicted(part, pixels)[name] for part in parts]
        np.testing.assert_allclose(found[f"member_{name}"], np.stack(own, axis=1), atol=1e-6)
    each = [predicted(class_activation.with_class_maps(part), pixels)["maps"] for part in parts]
    maps = class_activation.finding_maps([found["maps_1"], found["maps_2"]], "Nodule", SIDE)
    own = [class_activation.finding_maps([part], "Nodule", SIDE) for part in each]
    np.testing.assert_allclose(maps, (own[0] + own[1]) / 2, atol=1e-4)


def test_heat_is_what_lies_above_the_mean():
    maps = np.array([[[-4.0, -2.0], [-2.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]], np.float32)
    assert class_activation.scaled(maps).tolist() == [[[0, 0], [0, 1]], [[0, 0], [0, 0]]]


def test_networks_without_class_maps_are_named():
    with pytest.raises(StudyError, match="dense has no global average pooling, so no heat-map"):
        class_activation.with_class_maps(small_models.dense(SIDE))
    pixels = layers.Input((SIDE, SIDE, 1))
    pooled = layers.GlobalAveragePooling2D(name="pooled")(layers.Conv2D(3, 3)(pixels))
    for bent in (layers.Dense(9, activation="relu")(pooled), layers.Concatenate()([pooled, layers.Flatten()(pixels)])):
        with pytest.raises(StudyError, match="isn't linear behind its pooling"):
            class_activation.with_class_maps(keras.Model(pixels, small_models.outputs(bent)))
    assert (
        "maps_1"
        not in ensemble.answering(small_models.ensemble([small_models.cnn(SIDE), small_models.dense(SIDE)])).output
    )

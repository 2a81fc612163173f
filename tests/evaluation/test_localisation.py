"""Heat-maps against a hand computation, class activation maps, and boxes whose answer is known."""

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers

from chestxray.config import CLASSES, SIX_FINDINGS, StudyError
from chestxray.evaluation import localisation
from chestxray.networks import class_activation, ensemble, transfer

SIDE = 16


def tiny(seed=0, activation="softmax", nested=False):
    """A network that ends in global average pooling and a dense layer, its convolutions in a network of their own."""
    keras.utils.set_random_seed(seed)
    pixels = layers.Input((SIDE, SIDE, 1))
    x = layers.Rescaling(1 / 255)(pixels)
    x = layers.RandomFlip("horizontal", seed=1)(x)
    inner = layers.Input((SIDE, SIDE, 1))
    y = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(inner)
    y = layers.BatchNormalization()(layers.Conv2D(5, 3, strides=2, padding="same")(y))
    if nested == "pooled":
        x = keras.Model(inner, layers.GlobalAveragePooling2D()(layers.ReLU()(y)), name="features")(x)
    else:
        x = layers.GlobalAveragePooling2D()(keras.Model(inner, layers.ReLU()(y), name="backbone")(x))
    x = layers.Dropout(0.5)(x)
    last = None if activation == "layer" else activation
    x = layers.Dense(len(CLASSES), activation=last, name="classes")(x)
    x = layers.Activation("softmax")(x) if activation == "layer" else x
    return keras.Model(pixels, x, name=f"tiny{seed}")


def radiographs(number=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, SIDE, SIDE, 1), dtype=np.uint8)


def class_activation_maps(model, pixels, classes):
    """CAM (Zhou et al., CVPR 2016) by numpy: the dense layer's weights over the last feature map, Pillow enlarges."""
    from PIL import Image

    backbone = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    net = keras.Model(
        backbone.inputs, next(layer for layer in backbone.layers if isinstance(layer, layers.ReLU)).output
    )
    features = net(pixels.astype("float32") / 255, training=False).numpy()
    kernel = model.get_layer("classes").kernel.numpy()
    maps = np.maximum(np.einsum("nhwk,kn->nhw", features, kernel[:, classes]), 0)
    large = [np.asarray(Image.fromarray(heat).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for heat in maps]
    tops = np.array([heat.max() or 1 for heat in large])[:, None, None]
    return np.stack(large) / tops


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "layer"])
@pytest.mark.parametrize("nested", [False, "pooled"])
def test_grad_cam_is_the_class_activation_map_where_a_network_pools_its_last_feature_map(activation, nested):
    model, pixels = tiny(1, activation, nested), radiographs()
    model.trainable = False
    classes = np.array([0, 1, 2, 3, 6])
    found = class_activation.Explainer(model, batch_size=2).maps(pixels, classes)
    assert found.shape == (5, SIDE, SIDE) and found.dtype == np.float32
    assert found == pytest.approx(class_activation_maps(model, pixels, classes), abs=1e-4)
    assert found.max() == pytest.approx(1)


def test_grad_cam_by_finite_differences():
    """The weight of a channel is the mean slope of the score: add a little to a channel and see the score change."""
    model, pixels = tiny(2), radiographs(1)
    backbone = model.get_layer("backbone")
    features = backbone(pixels.astype("float32") / 255, training=False).numpy()
    dense = model.get_layer("classes")

    def score(maps):
        return (maps.mean(axis=(1, 2)) @ dense.kernel.numpy() + dense.bias.numpy())[0, 4]

    slopes = []
    for channel in range(features.shape[-1]):
        more = features.copy()
        more[..., channel] += 0.5
        slopes.append((score(more) - score(features)) / 0.5)
    by_hand = np.maximum((features[0] * slopes).sum(axis=-1), 0)
    found = class_activation.Explainer(model, batch_size=1).maps(pixels, np.array([4]))[0]
    # Enlarging keeps the order of the four cells' middles.
    cells = found[2::4, 2::4]
    assert np.corrcoef(cells.ravel(), by_hand.ravel())[0, 1] > 0.97


def test_an_ensembles_map_is_the_mean_of_its_members_maps():
    members = [tiny(3), tiny(4, "sigmoid")]
    pixels, classes = radiographs(3), np.array([0, 3, 5])
    alone = [class_activation.Explainer(member, 4).maps(pixels, classes) for member in members]
    for head in (None, ensemble.head(2)):
        joined = class_activation.Explainer(ensemble.join(members, head), 4)
        assert len(joined.members) == 2
        assert joined.member_maps(pixels, classes) == pytest.approx(np.stack(alone), abs=1e-5)
        mean = np.mean(alone, axis=0)
        assert joined.maps(pixels, classes) == pytest.approx(mean / mean.max(axis=(1, 2), keepdims=True), abs=1e-5)


@pytest.mark.parametrize("enlarged", [False, True])
def test_a_mirrored_ensembles_map_is_the_mean_of_both_views(enlarged):
    member, pixels = tiny(7), radiographs(3)
    alone = class_activation.Explainer(member, 4)
    assert not alone.mirrored
    there, back = alone.maps(pixels, 2), alone.maps(pixels[:, :, ::-1], 2)[..., ::-1]
    mean = (there + back) / 2
    joined = class_activation.Explainer(ensemble.join([member], None, mirrored=True, enlarged=enlarged), 4)
    assert joined.mirrored
    assert joined.maps(pixels, 2) == pytest.approx(mean / mean.max(axis=(1, 2), keepdims=True), abs=1e-5)


def test_the_studys_cnn_has_maps_and_the_dense_network_none():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8)
    explainer = class_activation.Explainer(transfer.cnn(32, (4, 8)), 2, [class_activation.Way(20)])
    assert explainer.maps(pixels, 0).shape == (2, 32, 32)
    with pytest.raises(StudyError, match="dense has no convolution"):
        class_activation.Explainer(transfer.dense(32, (4,)))
    with pytest.raises(StudyError, match="no feature map of 64 cells"):
        class_activation.Explainer(transfer.cnn(32, (4, 8)), ways=[class_activation.Way(64)])
    with pytest.raises(StudyError, match="method 'saliency' is unknown; there are: gradcam, hirescam, layercam"):
        class_activation.Explainer(transfer.cnn(32, (4, 8)), ways=[class_activation.Way(1, "saliency")])


def test_other_ways_weigh_each_place_by_its_slope():
    """Flattened features before a dense layer: the slope of the score at each place is the dense layer's weight."""
    keras.utils.set_random_seed(3)
    pixels_in = layers.Input((SIDE, SIDE, 1))
    fine = layers.Conv2D(3, 3, padding="same", activation="relu", name="fine")(layers.Rescaling(1 / 255)(pixels_in))
    model = keras.Model(pixels_in, layers.Dense(len(CLASSES), activation="softmax", name="out")(layers.Flatten()(fine)))
    pixels = radiographs(2)
    features = keras.Model(pixels_in, fine)(pixels.astype("float32"), training=False).numpy()
    every = model.get_layer("out").kernel.numpy().reshape(SIDE, SIDE, 3, len(CLASSES))
    asked = int(every.mean(axis=(0, 1)).min(axis=0).argmax())  # a class for which something speaks in every way
    slopes = every[..., asked]
    ways = [
        class_activation.Way(1, "gradcam"),
        class_activation.Way(1, "hirescam"),
        class_activation.Way(SIDE, "layercam"),
    ]
    explainer = class_activation.Explainer(model, 2, ways)
    assert explainer.cells == [(SIDE, SIDE)] * 3
    weights = [slopes.mean(axis=(0, 1)), slopes, np.maximum(slopes, 0)]
    for place, weight in enumerate(weights):
        heat = np.maximum((features * weight).sum(axis=-1), 0)
        expected = heat / heat.max(axis=(1, 2), keepdims=True)
        assert explainer.maps(pixels, asked, place) == pytest.approx(expected, abs=1e-4)


def test_the_scores_of_an_ensemble_and_its_members_are_those_of_their_maps():
    members = [tiny(3), tiny(4)]
    explainer = class_activation.Explainer(
        ensemble.join(members, None), 2, [class_activation.LAST, class_activation.Way(8, "layercam")]
    )
    found = localisation.targets(
        boxes_table(), pd.DataFrame({"image": ["a.png", "b.png"], "patient": ["1", "2"]}), 1024
    )
    found = pd.concat([found, found.iloc[:1]], ignore_index=True)
    pixels, classes = radiographs(3), found["finding"].map(CLASSES.index).to_numpy()
    scores = localisation.network_scores(explainer, pixels, found)
    assert scores.shape == (2, 3, 3, len(localisation.SCORES))
    for way in (0, 1):
        networks = [explainer.maps(pixels, classes, way), *explainer.member_maps(pixels, classes, way)]
        for heat, row in zip(networks, scores[way], strict=True):
            pd.testing.assert_frame_equal(
                localisation.as_hits(found, row), localisation.hits(heat, found, explainer.cells[way]), check_like=True
            )


def test_one_graph_serves_every_batch():
    explainer = class_activation.Explainer(tiny(5), 4)
    first = explainer.maps(radiographs(9), 1)
    assert first[4:] == pytest.approx(explainer.maps(radiographs(9)[4:], 1), abs=1e-5)


def test_shuffled_weights_change_the_maps_and_come_back():
    model = tiny(6)
    before = [weights.copy() for weights in model.get_weights()]
    explainer = class_activation.Explainer(model, 8)
    found = localisation.randomisation(explainer, radiographs(8), np.zeros(8, int), (0, 0.5, 1), seed=1)
    assert found["layers"].tolist() == sorted(found["layers"]) and found["layers"].iloc[0] == 1
    assert found["layers"].iloc[-1] == 4  # two convolutions, one normalisation, one dense layer
    assert found["correlation"].iloc[-1] < 0.9
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        assert np.array_equal(ours, theirs)


def boxes_table():
    rows = [
        ("a.png", "Mass", 0, 0, 512, 512),
        ("a.png", "Mass", 768, 768, 256, 256),
        ("b.png", "Nodule", 512, 0, 512, 1024),
    ]
    rows += [("b.png", "Cardiomegaly", 0, 0, 9, 9), ("z.png", "Mass", 0, 0, 9, 9)]
    return pd.DataFrame(rows, columns=["image", "finding", "x", "y", "width", "height"])


def test_boxes_become_shares_of_the_side():
    predictions = pd.DataFrame({"image": ["a.png", "b.png"], "patient": ["1", "2"]})
    found = localisation.targets(boxes_table(), predictions, 1024)
    assert found[["image", "patient", "finding"]].to_numpy().tolist() == [
        ["a.png", "1", "Mass"],
        ["b.png", "2", "Nodule"],
    ]
    assert found["boxes"][0] == [(0, 0, 0.5, 0.5), (0.75, 0.75, 1, 1)]
    mask = localisation.box_mask(found["boxes"][0], 8, 8)
    assert mask.sum() == 16 + 4 and mask[:4, :4].all() and mask[6:, 6:].all()


def test_hits_by_hand():
    predictions = pd.DataFrame({"image": ["a.png", "b.png"], "patient": ["1", "2"]})
    found = localisation.targets(boxes_table(), predictions, 1024)
    maps = np.zeros((2, 8, 8), np.float32)
    maps[0, 1:3, 1:3] = 1
    maps[0, 7, 0] = 0.6
    scored = localisation.hits(maps, found)
    assert scored["pointing"].tolist() == [True, False]
    assert scored["flat"].tolist() == [False, True]
    # Four pixels of the peak and one outside, boxes of twenty pixels.
    assert scored["iou"].tolist() == pytest.approx([4 / 21, 0])
    assert scored["centre_pointing"].tolist() == [False, True]
    assert scored["reachable"].all()
    # Of four by four cells the last one's middle lies in this box, of two by two none.
    corner = [(0.8, 0.8, 1.0, 1.0)]
    assert localisation.reachable(corner, 4, 4) and not localisation.reachable(corner, 2, 2)
    assert localisation.hits(maps, found.assign(boxes=[corner, corner]), (2, 2))["reachable"].tolist() == [False, False]
    assert localisation.point(np.ones((4, 4))) is None
    plateau = np.zeros((8, 8))
    plateau[:4, :4] = 1
    assert localisation.point(plateau) == (2, 2)
    assert localisation.centred_square(16, 8, 8).sum() == 16


def test_localisation_counts_findings_alike_and_resamples_patients():
    rng = np.random.default_rng(0)
    scored = pd.DataFrame(
        {
            "patient": rng.integers(30, size=90).astype(str),
            "finding": np.array(SIX_FINDINGS)[rng.integers(2, 5, size=90)],
            "pointing": rng.random(90) < 0.6,
            "centre_pointing": rng.random(90) < 0.2,
            "iou": rng.random(90),
            "centre_iou": rng.random(90),
            "reachable": True,
        }
    )
    found = localisation.localisation(scored, draws=200)
    each = scored.groupby("finding")[["pointing", "iou"]].mean()
    for finding, row in each.iterrows():
        assert found.loc[(finding, "pointing"), "estimate"] == pytest.approx(row["pointing"])
        assert found.loc[(finding, "iou"), "estimate"] == pytest.approx(row["iou"])
    assert found.loc[("mean", "pointing"), "estimate"] == pytest.approx(each["pointing"].mean())
    gain = found.loc[("mean", "pointing_gain")]
    assert gain["low"] < gain["estimate"] < gain["high"] and gain["low"] > 0
    with pytest.raises(StudyError, match="no lesion box"):
        localisation.localisation(scored[:0])

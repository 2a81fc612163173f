"""Boxes whose answer is known, the pointing game by hand, and what shuffled weights do to maps."""

import numpy as np
import pandas as pd
import pytest

from chestxray.config import CLASSES, SIX_FINDINGS, StudyError
from chestxray.evaluation import localisation
from chestxray.networks import class_activation


def test_hits_of_an_ensemble_and_its_members_are_those_of_their_maps():
    rng = np.random.default_rng(0)
    members = rng.random((2, 3, 8, 8)).astype("float32")
    found = localisation.targets(
        boxes_table(), pd.DataFrame({"image": ["a.png", "b.png"], "patient": ["1", "2"]}), 1024
    )
    found = pd.concat([found, found.iloc[:1]], ignore_index=True)
    asked = []

    def explain(pixels, classes):
        asked.extend(classes)
        return members[:, pixels[:, 0, 0]]

    pixels = np.broadcast_to(np.arange(3)[:, None, None], (3, 8, 8))
    tables = localisation.network_hits(explain, pixels, found, (8, 8), batch_size=2)
    assert asked == [CLASSES.index(finding) for finding in found["finding"]]
    for maps, table in zip((class_activation.joined(members), *members), tables, strict=True):
        pd.testing.assert_frame_equal(table, localisation.hits(maps, found, (8, 8)))


class Layer:
    """As much of a Keras layer as weights are shuffled in."""

    def __init__(self, *weights, layers=None):
        self.weights = list(weights)
        if layers is not None:
            self.layers = layers

    def get_weights(self):
        return [weight.copy() for weight in self.weights]

    def set_weights(self, weights):
        self.weights = weights


def test_shuffled_weights_change_the_maps_and_come_back():
    rng = np.random.default_rng(0)
    first, second, last = (Layer(rng.normal(size=(40, 40))) for _ in range(3))
    network = Layer(layers=[Layer(layers=[first, Layer(), second]), last])
    before = [layer.weights[0].copy() for layer in (first, second, last)]
    found = localisation.randomisation(
        [network], lambda: np.stack([first.weights[0] + second.weights[0]]), (0, 0.5, 1), seed=1
    )
    assert found["layers"].tolist() == [1, 2, 3]
    # The map depends on both convolutions alike, and on the last layer not at all.
    one, half, all_of_it = found["correlation"]
    assert one == pytest.approx(1) and 0.4 < half < 0.6 and abs(all_of_it) < 0.1
    for layer, weights in zip((first, second, last), before, strict=True):
        assert np.array_equal(layer.weights[0], weights)


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
    # Squares of 4 pixels, one of them in a box of 20 pixels, and of 36, 18 of them in a box of 32.
    assert scored["centre_iou"].tolist() == pytest.approx([1 / 23, 18 / 50])
    assert scored["centre_pointing"].tolist() == [False, True]
    assert scored["reachable"].all()
    # Of four by four cells the last one's middle lies in this box, of two by two none.
    corner = [(0.8, 0.8, 1.0, 1.0)]
    in_corner = found.assign(boxes=[corner, corner])
    assert [localisation.hits(maps, in_corner, cells)["reachable"].all() for cells in ((4, 4), (2, 2))] == [True, False]
    assert localisation.point(np.ones((4, 4))) is None
    plateau = np.zeros((8, 8))
    plateau[:4, :4] = 1
    assert localisation.point(plateau) == (2, 2)


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

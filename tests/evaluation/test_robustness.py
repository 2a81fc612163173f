"""Degradations do what they say, and their cost is measured on the same draws."""

import numpy as np
import pandas as pd
import pytest

from chestxray.config import CLASSES, StudyError
from chestxray.evaluation import metrics, robustness


def pixels(number=3, side=128, seed=0):
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:side, 0:side] / side
    smooth = np.stack([100 + 60 * np.sin(3 * rows + k) + 40 * columns for k in range(number)])
    return (smooth + rng.normal(0, 3, smooth.shape))[..., None].astype(np.uint8)


def test_each_degradation_keeps_shape_and_kind_and_grows_with_strength():
    plain = pixels()
    for name, degradation in robustness.DEGRADATIONS.items():
        changes = []
        for strength in degradation.strengths:
            worse = robustness.degrade(plain, name, strength, seed=1)
            assert worse.shape == plain.shape and worse.dtype == np.uint8
            assert np.array_equal(worse, robustness.degrade(plain, name, strength, seed=1))
            changes.append(np.abs(worse.astype(float) - plain).mean())
        assert changes == sorted(changes) and changes[0] > 0, name


def test_degradations_by_hand():
    plain = pixels(2)
    grey = np.full((1, 64, 64, 1), 128, np.uint8)
    assert np.array_equal(robustness.degrade(plain, "inversion", 1.0), 255 - plain)
    assert (robustness.degrade(plain, "inversion", 0.5) == 127.5).sum() == 0
    assert np.ptp(robustness.degrade(plain, "inversion", 0.5)) <= 1
    assert robustness.degrade(grey, "noise", 16).std() == pytest.approx(16, rel=0.05)
    assert robustness.degrade(grey, "brighter", 0.2).max() == 128 + 51
    assert np.array_equal(robustness.degrade(grey, "blur", 2), grey)
    dot = np.zeros((1, 64, 64, 1), np.uint8)
    dot[0, 20, 40] = 200
    halved = robustness.degrade(dot, "resolution", 2)[0, :, :, 0]
    assert halved.max() <= 50 and np.unravel_index(halved.argmax(), halved.shape)[0] in (20, 21)
    spot = np.zeros((1, 65, 65, 1), np.uint8)
    spot[0, 32, 60] = 200
    turned = np.argwhere(robustness.degrade(spot, "rotation", 30)[0, :, :, 0] > 40)[0] - 32
    assert np.degrees(np.arctan2(abs(turned[0]), turned[1])) == pytest.approx(30, abs=3)


def test_sweep_measures_what_brightness_costs_a_model_that_reads_brightness():
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(len(CLASSES)), 12)
    images = (labels[:, None, None, None] * 20 + 60 + rng.normal(0, 2, (84, 8, 8, 1))).astype(np.uint8)
    table = pd.DataFrame(
        {"image": [f"{k}.png" for k in range(84)], "patient": np.arange(84) // 2, "label": np.array(CLASSES)[labels]}
    )

    def predict(batch):
        grey = batch.astype(float).mean(axis=(1, 2, 3))
        return 1 / (1 + np.abs(grey[:, None] - (np.arange(len(CLASSES)) * 20 + 60)))

    predicted = robustness.predict_degraded(predict, images)
    assert predicted.shape == (1 + 7 * 3, 84, len(CLASSES))
    found = robustness.sweep(predicted, table, draws=50)
    assert found.loc[("brighter", 0), "estimate"] == pytest.approx(1)
    strong = robustness.degrade(images, "brighter", 0.4)
    assert found.loc[("brighter", 0.4), "estimate"] == pytest.approx(metrics.macro_auroc(labels, predict(strong)))
    assert found.loc[("brighter", 0.4), "loss_high"] < 0
    assert found.loc[("blur", 2.0), "loss"] == pytest.approx(0, abs=0.02)
    with pytest.raises(StudyError, match="images are Pneumothorax"):
        robustness.sweep(predicted[:, labels < 6], table[labels < 6], draws=5)

"""The transforms on disk and in graph: their ranges, their balance, and that they tell nothing of the class."""

from __future__ import annotations

import numpy as np
import pytest

from chestxray import augmentation


@pytest.fixture(scope="module")
def ramp() -> np.ndarray:
    """(48, 32, 32, 1) float32: a horizontal ramp of grey levels."""
    row = np.linspace(60, 190, 32, dtype=np.float32)
    return np.tile(row[None, None, :, None], (48, 32, 1, 1))


def test_layers_do_nothing_at_inference_and_vary_in_training(ramp: np.ndarray) -> None:
    import keras

    model = keras.Sequential([keras.Input(ramp.shape[1:]), *augmentation.layers(1.0, seed=5)])
    np.testing.assert_array_equal(np.asarray(model(ramp, training=False)), ramp)
    varied = np.asarray(model(ramp, training=True))
    assert varied.dtype == np.float32
    assert varied.min() >= 0 and varied.max() <= 255
    assert len(np.unique(varied.mean(axis=(1, 2, 3)).round(3))) > 40  # one draw an image, not one a batch


def test_layers_keep_to_their_ranges(ramp: np.ndarray) -> None:
    made = {layer.name: layer for layer in augmentation.layers(1.0, seed=5)}
    brightness = np.asarray(made["brightness"](ramp, training=True)) - ramp
    assert np.abs(brightness).max() <= 255 * augmentation.BRIGHTNESS + 1e-3
    assert np.abs(brightness).max() > 255 * augmentation.BRIGHTNESS / 2
    spread = np.asarray(made["contrast"](ramp, training=True)).std(axis=(1, 2, 3)) / ramp[0].std()
    assert 1 - augmentation.CONTRAST - 1e-3 <= spread.min() < spread.max() <= 1 + augmentation.CONTRAST + 1e-3
    shifted = np.asarray(made["shift"](ramp, training=True))[:, :, 8:24, 0] - ramp[:, :, 8:24, 0]
    grey_per_side = (190 - 60) * 32 / 31
    assert np.abs(shifted).max() <= grey_per_side * augmentation.SHIFT + 0.1


def test_layers_switch_off_and_flip() -> None:
    assert augmentation.layers(0.0, seed=1) == []
    assert "flip" not in [layer.name for layer in augmentation.layers(1.0, seed=1)]
    assert "flip" in [layer.name for layer in augmentation.layers(0.5, seed=1, flip=True)]
    with pytest.raises(ValueError, match="strength -1"):
        augmentation.layers(-1.0, seed=1)

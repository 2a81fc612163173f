"""EfficientNets: the weights against PyTorch, and what a user reads when they cannot be had."""

from __future__ import annotations

import numpy as np
import pytest
from lite_reference import LOGITS, SIZES, pictures, torch_logits

from chestxray import backbones

LITE = [f"EfficientNetLite{k}" for k in (0, 1, 2)]


@pytest.mark.parametrize("name", LITE)
def test_lite_gives_pytorchs_logits(name):
    reference = np.load(LOGITS)
    for size in SIZES:
        model = backbones.build_classifier(name, (size, size, 3))
        ours = model.predict(pictures(size), verbose=0)
        theirs = reference[f"lite{name[-1]}_{size}"]
        assert np.abs(ours - theirs).max() <= 1e-4
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("name", LITE)
def test_lite_agrees_with_pytorch_live(name):
    pytest.importorskip("torch", reason="PyTorch is needed for this comparison only")
    pytest.importorskip("efficientnet_lite_pytorch", reason="PyTorch's EfficientNet-Lite is needed")
    for size in SIZES:
        ours = backbones.build_classifier(name, (size, size, 3)).predict(pictures(size), verbose=0)
        assert np.abs(ours - torch_logits(int(name[-1]), size)).max() <= 1e-4

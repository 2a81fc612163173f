"""Model files: `.keras` files that older versions of Keras can load, with kernels at half precision if asked for."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from chestxray import files
from chestxray.networks import layers

_NEWER = {"input_axes": None, "output_axes": None, "renorm": False, "renorm_clipping": None, "renorm_momentum": 0.99}
"""What Keras 3.15 writes for initializers and BatchNorm left at their defaults, and Keras 3.13 refuses."""


def save_model(model: keras.Model, path: Path, half: bool = False) -> None:
    """Save a model without its optimizer; the file is complete or absent.

    Args:
        model: the model.
        path: ends in `.keras`.
        half: store kernels as float16, half the size. The file stays an ordinary Keras file: loading casts them back.
    """
    # Without an optimizer, whose slots are twice the weights, the file is smaller and loads without a warning.
    model.compile(optimizer=None)
    model.compiled = False
    files.remove_leftovers(path)
    with files.atomic_path(path) as beside:
        model.save(beside)
        _rewrite(beside, half)


def _rewrite(path: Path, half: bool) -> None:
    """Let every Keras that the study allows load the file and, with `half`, store its kernels as float16.

    Vectors (BatchNorm, biases) need float32's range and keep it.
    """
    beside = path.with_name(f"{path.name}-rewritten")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as rewritten:
        for item in whole.infolist():
            data = whole.read(item.filename)
            if item.filename == "config.json":
                data = json.dumps(_portable(json.loads(data))).encode()
            elif half and item.filename == "model.weights.h5":
                with h5py.File(io.BytesIO(data), "r+") as weights:
                    data = _halved_weights(weights)
            rewritten.writestr(item.filename, data)
    shutil.move(beside, path)


def _portable(config: Any) -> Any:
    """A model's configuration in stock layers, without default entries that older versions refuse."""
    if isinstance(config, list):
        return [_portable(entry) for entry in config]
    if not isinstance(config, dict):
        return config
    if config.get("module") == layers.__name__:
        config = config | {"module": "keras.layers", "registered_name": None}
    return {name: _portable(entry) for name, entry in config.items() if name not in _NEWER or entry != _NEWER[name]}


def _halved_weights(weights: h5py.File) -> bytes:
    """The bytes of a copy of an HDF5 weights file whose arrays of two or more dimensions are float16."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as copy:

        def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Dataset):
                array = item[()]
                kernel = array.ndim > 1 and array.dtype == np.float32
                copied = copy.create_dataset(name, data=array.astype(np.float16) if kernel else array)
            else:
                copied = copy.require_group(name)
            copied.attrs.update(item.attrs)

        weights.visititems(visit)
        copy.attrs.update(weights.attrs)
    return buffer.getvalue()

"""Samples: prepared radiographs as memory-mapped 8-bit arrays, their targets, and the batches of each epoch.

Pixels are decoded once, so that nine notebooks don't decode the same PNGs again. The order of the batches depends on
the seed alone, so that an interrupted fit goes on with the batch at which it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from chestxray import files
from chestxray.config import CLASSES, NIH_FINDINGS, Paths, Study, StudyError
from chestxray.data import splits
from chestxray.data.manifest import read_manifest, store_path
from chestxray.images.pixels import decode


@dataclass(frozen=True)
class Samples:
    """Inputs and targets of a set of images.

    Attributes:
        x: (M, …) array, in memory or memory-mapped; radiographs are (M, H, W, 1) uint8 in 0–255.
        rows: (N,) int, the rows of `x` that belong to this set, in the order of `table`.
        y: (N, K) float32 targets: one-hot classes, or findings as 0 and 1.
        table: N rows with the image, patient and label of each, and what else the manifest has.
    """

    x: np.ndarray
    rows: np.ndarray
    y: np.ndarray
    table: pd.DataFrame

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: np.ndarray) -> Samples:
        """The samples at some positions, (M,) int, or where a mask, (N,) bool, is true."""
        table = self.table.iloc[chosen].reset_index(drop=True)
        return dataclasses.replace(self, rows=self.rows[chosen], y=self.y[chosen], table=table)

    def with_targets(self, y: np.ndarray) -> Samples:
        """The same samples with other targets, (N, K)."""
        return dataclasses.replace(self, y=np.asarray(y, "float32"))

    def with_inputs(self, x: np.ndarray) -> Samples:
        """The same samples with other inputs, (N, …), such as features."""
        return dataclasses.replace(self, x=x, rows=np.arange(len(x)))

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """The samples in order, `batch_size` at a time; the last batch may be shorter."""
        for start in range(0, len(self), batch_size):
            yield self.x[self.rows[start : start + batch_size]]


def class_targets(labels: pd.Series) -> np.ndarray:
    """One-hot targets, (N, 7) float32; all zeros where an image has no single label among the seven classes."""
    return (labels.to_numpy(dtype=object)[:, None] == np.array(CLASSES, dtype=object)).astype("float32")


def finding_targets(findings: pd.Series) -> np.ndarray:
    """The labels `ALL_LABELS` as 0 and 1, (N, 15) float32, from the findings of the NIH table, joined by `|`."""
    present = findings.str.get_dummies("|").reindex(columns=list(NIH_FINDINGS), fill_value=0).to_numpy("float32")
    return np.column_stack([present, ~present.any(axis=1)]).astype("float32")


def class_weights(y: np.ndarray) -> np.ndarray:
    """(K,) float32 weights that give the classes equal total weight and samples a mean weight of 1.

    Args:
        y: (N, K) one-hot classes.
    """
    present = y.sum(axis=0)
    return (present.sum() / (np.count_nonzero(present) * np.maximum(present, 1))).astype("float32")


def load_split(study: Study, split: str, selected: bool = True) -> Samples:
    """The prepared radiographs of one split, with one-hot class targets.

    Args:
        study: the study.
        split: `train`, `valid` or `test`.
        selected: only the single-label images in the class trees; otherwise all images of the split.

    Raises:
        StageMissing: stage 2.1 has not been run.
        StudyError: the split has no image; or it is `train`, and the dataset cannot train a model.
    """
    manifest = read_manifest(study.paths)
    if split == "train":
        splits.require_trainable(manifest, study.paths.relative(study.paths.manifest))
    keep = (manifest["split"] == split).to_numpy()
    if selected:
        keep = keep & manifest["selected"].to_numpy()
    if not keep.any():
        raise StudyError(
            f"{study.paths.relative(study.paths.manifest)}: no image in split {split!r}; run stage 2.1 again"
        )
    sources = [store_path(study.paths.store, image) for image in manifest["image"]]
    pixels = _pixel_cache(study.paths, "images", sources, study.paths.manifest)
    table = manifest[keep].reset_index(drop=True)
    return Samples(pixels, np.flatnonzero(keep), class_targets(table["label"]), table)


def load_findings(study: Study, split: str) -> Samples:
    """All radiographs of one split, also those with several labels, with `ALL_LABELS` as targets (N, 15).

    Args:
        study: the study.
        split: `train`, `valid` or `test`.

    Raises:
        StageMissing: stage 2.1 has not been run.
        StudyError: the split has no image.
    """
    samples = load_split(study, split, selected=False)
    return samples.with_targets(finding_targets(samples.table["findings"]))


def load_augmented(study: Study) -> Samples:
    """The balanced, augmented training radiographs that stage 2.2 wrote, with one-hot class targets.

    Raises:
        StageMissing: stage 2.2 has not been run.
        StudyError: the dataset cannot train a model.
    """
    splits.require_trainable(read_manifest(study.paths), study.paths.relative(study.paths.manifest))
    path = study.require(study.paths.augmented_rows, "stage 2.2, Creating augmented train data")
    table = pd.read_csv(path, dtype={"patient": str})
    sources = [study.paths.tree("train_augmented") / file for file in table["file"]]
    pixels = _pixel_cache(study.paths, "train_augmented", sources, path)
    return Samples(pixels, np.arange(len(table)), class_targets(table["label"]), table)


def batches(samples: Samples, batch_size: int, seed: int, first: int = 0) -> tf.data.Dataset:
    """Endless batches of (x, y) as a `tf.data.Dataset`, each pass over the samples in another order.

    Args:
        samples: the samples to draw from; the last ones of a pass that fill no batch are left out.
        batch_size: samples a step.
        seed: with the number of the pass it decides the order.
        first: number of the first batch, counted from the start of the fit: where an interrupted fit goes on.
    """
    steps = len(samples) // batch_size
    orders: dict[int, np.ndarray] = {}

    def gather(number: int) -> tuple[np.ndarray, np.ndarray]:
        number, step = divmod(int(number), steps)
        if number not in orders:
            orders.clear()
            orders[number] = np.random.default_rng([seed, number]).permutation(len(samples))
        positions = orders[number][step * batch_size : (step + 1) * batch_size]
        return samples.x[samples.rows[positions]], samples.y[positions]

    def load(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x, y = tf.numpy_function(gather, [number], [samples.x.dtype, tf.float32])
        shapes = (batch_size, *samples.x.shape[1:]), (batch_size, *samples.y.shape[1:])
        return tf.ensure_shape(x, shapes[0]), tf.ensure_shape(y, shapes[1])

    return tf.data.Dataset.counter(first).map(load).prefetch(tf.data.AUTOTUNE)


def compiled(model: keras.Model) -> Callable[[tf.Tensor], Any]:
    """The model's forward pass as one graph, to call many times: `Model.predict` would copy a memory-mapped set."""
    return tf.function(lambda x: model(x, training=False))


def predict(model: keras.Model | Callable[[tf.Tensor], Any], samples: Samples, batch_size: int = 128) -> Any:
    """The outputs for the samples in order, each (N, …) float32: an array, or a dictionary of arrays.

    Args:
        model: a model, or what `compiled` made of it, to predict more than once.
        samples: (N, …) inputs.
        batch_size: samples at a time; the last batch is padded, so that one graph serves all.
    """
    forward = compiled(model) if isinstance(model, keras.Model) else model
    outputs = []
    for batch in samples.batches(batch_size):
        padded = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
        outputs.append(keras.tree.map_structure(lambda part: part.numpy(), forward(tf.constant(padded))))
    count = len(samples)
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts)[:count].astype("float32"), *outputs)


def _pixel_cache(paths: Paths, name: str, sources: list[Path], table: Path) -> np.ndarray:
    """The sources' pixels as one memory-mapped (N, H, W, 1) uint8 array, made when `table` has changed."""
    stamp = hashlib.sha256(table.read_bytes()).hexdigest()[:12]
    target = paths.cache / f"{name}-{stamp}.npy"
    with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # missing or cut off: it is made again
        return np.load(target, mmap_mode="r")
    height, width = decode(sources[0]).shape
    with files.atomic_path(target) as beside:
        shape = (len(sources), height, width, 1)
        pixels = np.lib.format.open_memmap(beside, mode="w+", dtype=np.uint8, shape=shape)
        for row, source in enumerate(sources):
            pixels[row, :, :, 0] = decode(source)
        pixels.flush()
        del pixels
    for old in paths.cache.glob(f"{name}-*.npy"):
        if old != target:
            old.unlink(missing_ok=True)
    return np.load(target, mmap_mode="r")

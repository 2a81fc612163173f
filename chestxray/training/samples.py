"""Samples: prepared radiographs as memory-mapped 8-bit arrays, their targets, and the batches of each epoch.

Pixels are decoded once, so that nine notebooks don't decode the same PNGs again. An epoch's order depends on the seed
and the epoch alone, so that an interrupted fit resumes at the step where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from chestxray import files
from chestxray.config import ALL_LABELS, CLASSES, NIH_FINDINGS, Paths, Study, StudyError
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

    def in_epoch(self, seed: int, epoch: int) -> Samples:
        """The samples of an epoch: these.

        Args:
            seed: the run's seed.
            epoch: epoch number from 0.
        """
        return self

    def mirrored(self) -> Samples:
        """The same radiographs, left and right exchanged; a view, nothing is copied."""
        return dataclasses.replace(self, x=self.x[:, :, ::-1])

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """The samples in order, `batch_size` at a time; the last batch may be shorter."""
        for start in range(0, len(self), batch_size):
            yield self.x[self.rows[start : start + batch_size]]


@dataclass(frozen=True)
class Views(Samples):
    """Samples with several precomputed versions in `x`; each epoch draws one version of each sample.

    Attributes:
        views: how many versions there are: version v of the sample in row r is `x[v * (len(x) // views) + r]`.
    """

    views: int

    def in_epoch(self, seed: int, epoch: int) -> Samples:
        """The samples with one version each.

        Args:
            seed: the run's seed.
            epoch: epoch number from 0; with the seed it decides the versions.
        """
        drawn = np.random.default_rng([seed, epoch, 2]).integers(0, self.views, len(self))
        return Samples(self.x, drawn * (len(self.x) // self.views) + self.rows, self.y, self.table)


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


def multilabel_classes(samples: Samples) -> Samples:
    """The samples of `load_findings` with the seven classes as multi-label targets, (N, 7) of 0 and 1."""
    return samples.with_targets(samples.y[:, [ALL_LABELS.index(name) for name in CLASSES]])


def class_log_odds(samples: Samples) -> np.ndarray:
    """The log-odds of each of the seven classes among samples of `load_findings`, (7,) float32.

    A class that none or all of them have counts as half an image short of that.
    """
    count = multilabel_classes(samples).y.sum(axis=0).clip(0.5, len(samples) - 0.5)
    return np.log(count / (len(samples) - count)).astype("float32")


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


def epoch_order(y: np.ndarray, seed: int, epoch: int, balanced: bool = False) -> np.ndarray:
    """The positions of one epoch's samples, which depend on the seed and the epoch alone.

    Args:
        y: (N, K) targets.
        seed: the run's seed.
        epoch: epoch number from 0.
        balanced: draw each of the K one-hot classes equally often, the rare ones repeatedly.

    Returns:
        (N,) int positions: a permutation, or with `balanced` a draw of N positions.
    """
    rng = np.random.default_rng([seed, epoch])
    if not balanced:
        return rng.permutation(len(y))
    shares = []
    members = [np.flatnonzero(column > 0) for column in y.T if column.any()]
    quota = -(-len(y) // len(members))
    for positions in members:
        rounds = [rng.permutation(positions) for _ in range(-(-quota // len(positions)))]
        shares.append(np.concatenate(rounds)[:quota])
    return rng.permutation(np.concatenate(shares))[: len(y)]


def mixing_shares(mixup: float, seed: int, epoch: int, steps: int) -> np.ndarray:
    """Mixup's share of each batch, the rest being the batch reversed: (steps,) in 0.5–1.

    Args:
        mixup: parameter of the Beta distribution (Zhang et al., ICLR 2018); 0 mixes nothing.
        seed: the run's seed.
        epoch: epoch number from 0.
        steps: batches in the epoch.
    """
    if mixup == 0:
        return np.ones(steps, "float32")
    share = np.random.default_rng([seed, epoch, 1]).beta(mixup, mixup, steps)
    return np.maximum(share, 1 - share).astype("float32")


def dataset(
    samples: Samples,
    order: np.ndarray,
    batch_size: int,
    shares: np.ndarray | None = None,
    class_weights: np.ndarray | None = None,
):
    """Batches of (x, y) in the given order as a `tf.data.Dataset`; an incomplete last batch is left out.

    Args:
        samples: the samples to draw from.
        order: positions in `samples`.
        batch_size: samples a step.
        shares: of `mixing_shares`, one per batch; None mixes nothing and leaves the pixels uint8.
        class_weights: (K,) weights of the classes; with them the batches are (x, y, weight of each sample).

    Returns:
        A dataset of `len(order) // batch_size` batches with static shapes.
    """
    import tensorflow as tf

    steps = len(order) // batch_size
    rows = samples.rows
    kind = samples.x.dtype if shares is None else np.dtype("float32")

    def gather(positions: np.ndarray, share: np.ndarray | None) -> tuple[np.ndarray, ...]:
        x, y = samples.x[rows[positions]], samples.y[positions]
        if shares is not None:
            x = x.astype("float32")
            x, y = share * x + (1 - share) * x[::-1], share * y + (1 - share) * y[::-1]
        return (x, y) if class_weights is None else (x, y, y @ class_weights)

    shapes = [samples.x.shape[1:], samples.y.shape[1:], ()]
    kinds = [tf.as_dtype(kind), tf.float32, tf.float32]
    parts = 2 if class_weights is None else 3

    def load(positions, share):
        batch = tf.numpy_function(gather, [positions, share], kinds[:parts])
        return tuple(tf.ensure_shape(part, (batch_size, *shape)) for part, shape in zip(batch, shapes, strict=False))

    positions = np.asarray(order[: steps * batch_size], "int64").reshape(steps, batch_size)
    if samples.x.ndim == 2 and shares is None:
        # Pooled features are few, and a call into Python for each batch would cost more than the step it feeds.
        return tf.data.Dataset.from_tensor_slices(gather(positions, None)).prefetch(tf.data.AUTOTUNE)
    mixed = np.ones(steps, "float32") if shares is None else np.asarray(shares[:steps], "float32")
    return tf.data.Dataset.from_tensor_slices((positions, mixed)).map(load).prefetch(tf.data.AUTOTUNE)


def _pixel_cache(paths: Paths, name: str, sources: list[Path], table: Path) -> np.ndarray:
    """The sources' pixels as one memory-mapped (N, H, W, 1) uint8 array, made when `table` has changed."""
    stamp = hashlib.sha256(table.read_bytes()).hexdigest()[:12]
    target = paths.cache / f"{name}-{stamp}.npy"
    if not target.exists():
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

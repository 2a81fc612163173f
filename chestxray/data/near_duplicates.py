"""Near-duplicates: prepared radiographs of different patients that are one and the same radiograph.

Two radiographs are near-duplicates if their perceptual hashes are within a Hamming distance and their fine detail
correlates. The check reports and changes nothing.

Chests look alike, so the hash alone does not decide: of 44 million pairs of different patients among 9,424 radiographs
of ChestX-ray14 none is within 40 of 256 bits, but 673 are within 60, where a radiograph moved by two of its 128 pixels
still is. Without all that is smooth, and at the best of 49 positions, 99 % of copies correlate with their original by
0.73 or more, and the most alike of those 673 pairs by 0.54 (`tests/benchmarks/bench_near_duplicates.py`). Copies that
were compressed, scaled, brightened or moved a little are found; turned, mirrored, inverted or cropped ones are
not.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from chestxray import files
from chestxray.config import Study
from chestxray.data.manifest import store_path
from chestxray.images.pixels import decode, prepare_pixels

HASH_SIDE = 16
"""A hash has this many bits squared. The usual 8 (64 bits) puts thousands of different chests within 6 bits."""
DISTANCE = 60
"""Pairs of hashes that differ in more bits are not compared further."""
LIKENESS = 0.7
"""Pairs of images that are at least this alike are near-duplicates."""
STRICT_DISTANCE, STRICT_LIKENESS = 40, 0.9
"""The same for images of less than 128 px and for phantoms. With little detail left different chests become more alike,
at 64 px up to 0.65; and phantoms are drawn after one pattern, so that different ones reach 0.75 at 128 px and 0.85 at
64 px."""
MOST_PAIRS = 200_000
"""No more pairs than this, the closest, are compared by their pixels. The whole set should have about 110,000."""

_SIDE, _BLUR, _MARGIN, _SHIFT = 128, 2.0, 8, 3
"""Pixels: side at which images are compared, spread of what counts as slow, edge left out, farthest move tried."""
_TILE = 4096


class Check(NamedTuple):
    """What the check has found.

    Attributes:
        pairs: one row per pair of images of different patients within `most_bits`, the most alike first: `image`,
            `patient`, `split`, the same of the other as `other_image` …, `distance` in bits, `likeness` -1 to 1, and
            `near_duplicate` where that is `threshold` or more.
        images: how many images were compared, each with each.
        most_bits: the distance within which pairs were compared.
        threshold: the likeness that makes a near-duplicate.
        close: pairs within `most_bits`; `pairs` has the closest `MOST_PAIRS` of them.
    """

    pairs: pd.DataFrame
    images: int
    most_bits: int
    threshold: float
    close: int

    @property
    def crossing(self) -> pd.DataFrame:
        """The pairs whose two images are in different splits."""
        return self.pairs[self.pairs["split"].ne(self.pairs["other_split"])]


def perceptual_hash(pixels: np.ndarray) -> np.ndarray:
    """The pHash of a radiograph: which of its lowest cosine frequencies are above their median.

    Zauner (2010), *Implementation and Benchmarking of Perceptual Image Hash Functions*; bit for bit that of the
    `imagehash` package, on an image four times as wide as the block of frequencies.

    Args:
        pixels: (height, width) uint8.

    Returns:
        (256,) bool.
    """
    small = Image.fromarray(pixels).resize((4 * HASH_SIDE, 4 * HASH_SIDE), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(small, dtype=float))[:HASH_SIDE, :HASH_SIDE]
    return (low > np.median(low)).ravel()


def perceptual_hashes(paths: Sequence[Path], workers: int = -1) -> np.ndarray:
    """Hash image files in threads.

    Args:
        paths: the n files.
        workers: threads; as many as cores where -1.

    Returns:
        (n, 256) bool.
    """
    hashes = files.in_threads(lambda path: perceptual_hash(decode(path)), paths, workers, batch=16)
    return np.array(list(tqdm(hashes, "Hashing radiographs", len(paths), unit="image", disable=None)))


def close_pairs(
    hashes: np.ndarray, patients: np.ndarray, most_bits: int = DISTANCE, most: int = MOST_PAIRS
) -> tuple[pd.DataFrame, int]:
    """Find all pairs of images of different patients whose hashes are close.

    Every pair is compared, tile by tile: the product of two vectors of +1 and -1 counts their equal bits. A search tree
    is no faster in so many dimensions.

    Args:
        hashes: (n, bits) bool.
        patients: (n,) whose image it is.
        most_bits: in how many bits the hashes may differ.
        most: keep only this many pairs, the closest.

    Returns:
        The pairs as positions `first` < `second` with their `distance`, closest first, and how many there are.
    """
    bits = hashes.shape[1]
    signs = np.where(hashes, np.float32(1), np.float32(-1))
    found, total, best = [], 0, pd.DataFrame(columns=["distance", "first", "second"], dtype=np.int64)

    def closest() -> pd.DataFrame:
        return pd.concat([best, *found]).sort_values(["distance", "first", "second"], ignore_index=True).head(most)

    for top in range(0, len(signs), _TILE):
        for left in range(top, len(signs), _TILE):
            equal = signs[top : top + _TILE] @ signs[left : left + _TILE].T
            row, column = np.nonzero(equal >= bits - 2 * most_bits)
            distance = ((bits - equal[row, column]) / 2).astype(np.int64)
            pairs = pd.DataFrame({"distance": distance, "first": row + top, "second": column + left})
            pairs = pairs[(pairs["first"] < pairs["second"]) & (patients[pairs["first"]] != patients[pairs["second"]])]
            total += len(pairs)
            found.append(pairs)
            if sum(map(len, found)) > most:
                best, found = closest(), []
    return closest(), total


def detail(pixels: np.ndarray) -> np.ndarray:
    """A radiograph's fine detail: at 128 px, with what is smooth over 2 px taken away.

    Returns:
        (128, 128) float32.
    """
    grey = prepare_pixels(pixels, _SIDE).astype(np.float32)
    return grey - gaussian_filter(grey, _BLUR)


def likeness(first: np.ndarray, second: np.ndarray) -> float:
    """How alike two radiographs are: the best correlation of their fine detail, moved by up to 3 px.

    Args:
        first: as `detail` gives; an edge of 8 px is left out.
        second: the same of the other.

    Returns:
        -1 to 1. Without any detail on either side 1 where both are equal, else 0.
    """
    inner = first[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    inner = inner - inner.mean()
    edge = _MARGIN - _SHIFT
    windows = np.lib.stride_tricks.sliding_window_view(second[edge:-edge, edge:-edge], inner.shape)
    sums = windows.sum(axis=(2, 3), dtype=float)
    squares = np.einsum("ijkl,ijkl->ij", windows, windows, dtype=float)
    spread = np.sqrt((inner**2).sum() * np.maximum(squares - sums**2 / inner.size, 0))
    products = np.einsum("ijkl,kl->ij", windows, inner)
    if not (spread > 1e-3).any():
        return float(np.array_equal(first, second))
    return float(np.divide(products, spread, out=np.zeros_like(spread), where=spread > 1e-3).max())


def check(study: Study, manifest: pd.DataFrame, workers: int = -1) -> Check:
    """Compare every prepared radiograph with those of other patients, and write `near_duplicates.csv`.

    Args:
        study: a study whose stage 2.1 has been run.
        manifest: its manifest.
        workers: threads that hash; as many as cores where -1.

    Raises:
        StudyError: a prepared image cannot be read.
    """
    paths = [store_path(study.paths.store, image) for image in manifest["image"]]
    patients = pd.factorize(manifest["patient"])[0]
    strict = study.profile.image_size < _SIDE or study.is_phantom
    most_bits, threshold = (STRICT_DISTANCE, STRICT_LIKENESS) if strict else (DISTANCE, LIKENESS)
    positions, close = close_pairs(perceptual_hashes(paths, workers), patients, most_bits)
    positions = positions.sort_values(["first", "second"], ignore_index=True)  # so that few images are decoded twice
    details = functools.lru_cache(maxsize=1024)(lambda place: detail(decode(paths[place])))
    both = positions[["first", "second"]].itertuples(index=False)
    bar = tqdm(both, "Comparing pairs", len(positions), unit="pair", disable=None)
    alike = np.array([likeness(details(first), details(second)) for first, second in bar])
    rows = manifest[["image", "patient", "split"]]
    first, second = (rows.iloc[positions[side]].reset_index(drop=True) for side in ("first", "second"))
    pairs = first.join(second.add_prefix("other_")).assign(
        distance=positions["distance"], likeness=alike.round(4), near_duplicate=alike >= threshold
    )
    pairs = pairs.sort_values(["likeness", "image", "other_image"], ascending=[False, True, True], ignore_index=True)
    files.atomic_write(study.paths.near_duplicates, pairs.to_csv(index=False, lineterminator="\n").encode())
    return Check(pairs, len(manifest), most_bits, threshold, close)


def by_distance(found: Check) -> pd.DataFrame:
    """Pairs by Hamming distance of their hashes.

    Returns:
        Index: ranges of ten bits. Columns: `in two splits` and `in one split`, each with all `pairs` and
        `near-duplicates`.
    """
    edges = [-1, *range(10, found.most_bits + 1, 10)]
    names = [f"{low + 1} to {high}" for low, high in itertools.pairwise(edges)]
    pairs = found.pairs
    crossing = pairs["split"].ne(pairs["other_split"])
    bits = pd.cut(pairs["distance"], edges, labels=names)
    columns = {}
    for title, side in (("in two splits", crossing), ("in one split", ~crossing)):
        columns[title, "pairs"] = bits[side].value_counts().reindex(names)
        columns[title, "near-duplicates"] = bits[side & pairs["near_duplicate"]].value_counts().reindex(names)
    return pd.DataFrame(columns).rename_axis("bits that differ")

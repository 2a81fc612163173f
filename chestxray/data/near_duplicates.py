"""Near-duplicates: prepared radiographs of different patients that are one and the same radiograph.

Two radiographs are near-duplicates if their perceptual hashes are within a Hamming distance and their fine detail
correlates. The check reports and changes nothing.

Chests look alike, so the hash alone does not decide: the rates that the limits follow from stand in 2_preprocessing's
README. Copies that were compressed, scaled, brightened or moved a little are found; turned, mirrored, inverted or
cropped ones are not.
"""

from __future__ import annotations

import functools
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
DISTANCE, LIKENESS = 60, 0.7
"""Pairs whose hashes differ in more bits are not compared further; of the others, those at least this alike are
near-duplicates."""
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
    """What the check has found."""

    # One row per pair of images of different patients within `most_bits`, the most alike first: `image`, `patient`,
    # `split`, the same of the other as `other_image` …, `distance` in bits, `likeness` -1 to 1, `near_duplicate`.
    pairs: pd.DataFrame
    most_bits: int  # the distance within which pairs were compared
    threshold: float  # the likeness that makes a near-duplicate
    close: int  # pairs within `most_bits`; `pairs` has the closest `MOST_PAIRS` of them


def perceptual_hash(pixels: np.ndarray) -> np.ndarray:
    """The pHash of a radiograph, (256,) bool: which of its lowest cosine frequencies are above their median.

    Zauner (2010), *Implementation and Benchmarking of Perceptual Image Hash Functions*; bit for bit that of the
    `imagehash` package, on an image four times as wide as the block of frequencies.
    """
    small = Image.fromarray(pixels).resize((4 * HASH_SIDE, 4 * HASH_SIDE), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(small, dtype=float))[:HASH_SIDE, :HASH_SIDE]
    return (low > np.median(low)).ravel()


def perceptual_hashes(paths: Sequence[Path]) -> np.ndarray:
    """Hash n image files in threads: (n, 256) bool."""
    hashes = files.in_threads(lambda path: perceptual_hash(decode(path)), paths, -1, batch=16)
    return np.array(list(tqdm(hashes, "Hashing radiographs", len(paths), unit="image", disable=None)))


def close_pairs(hashes: np.ndarray, patients: np.ndarray, most_bits: int = DISTANCE) -> pd.DataFrame:
    """Find all pairs of images of different patients whose hashes are close: positions `first` < `second`, `distance`.

    Every pair is compared, tile by tile: the product of two vectors of +1 and -1 counts their equal bits. A search tree
    is no faster in so many dimensions.

    Args:
        hashes: (n, bits) bool.
        patients: (n,) whose image it is.
        most_bits: in how many bits the hashes may differ.
    """
    bits = hashes.shape[1]
    signs = np.where(hashes, np.float32(1), np.float32(-1))
    found = []
    for top in range(0, len(signs), _TILE):
        for left in range(top, len(signs), _TILE):
            equal = signs[top : top + _TILE] @ signs[left : left + _TILE].T
            row, column = np.nonzero(equal >= bits - 2 * most_bits)
            distance = ((bits - equal[row, column]) / 2).astype(np.int64)
            pairs = pd.DataFrame({"distance": distance, "first": row + top, "second": column + left})
            wanted = (pairs["first"] < pairs["second"]) & (patients[pairs["first"]] != patients[pairs["second"]])
            found.append(pairs[wanted])
    return pd.concat(found).sort_values(["distance", "first", "second"], ignore_index=True)


def detail(pixels: np.ndarray) -> np.ndarray:
    """A radiograph's fine detail, (128, 128) float32: at 128 px, with what is smooth over 2 px taken away."""
    grey = prepare_pixels(pixels, _SIDE).astype(np.float32)
    return grey - gaussian_filter(grey, _BLUR)


def likeness(first: np.ndarray, second: np.ndarray) -> float:
    """How alike two radiographs are, -1 to 1: the best correlation of their fine detail, moved by up to 3 px.

    Args:
        first: as `detail` gives; an edge of 8 px is left out.
        second: the same of the other; 0 where one of them has no detail.
    """
    inner, moves = slice(_MARGIN, -_MARGIN), range(-_SHIFT, _SHIFT + 1)
    moved = [np.roll(second, (down, right), (0, 1))[inner, inner].ravel() for down in moves for right in moves]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.corrcoef(first[inner, inner].ravel(), moved)[0, 1:]
    return float(np.nan_to_num(found).max())


def check(study: Study, manifest: pd.DataFrame) -> Check:
    """Compare every prepared radiograph with those of other patients, and write `near_duplicates.csv`.

    Args:
        study: a study whose stage 2.1 has been run.
        manifest: its manifest.
    """
    paths = [store_path(study.paths.store, image) for image in manifest["image"]]
    patients = pd.factorize(manifest["patient"])[0]
    strict = study.profile.image_size < _SIDE or study.is_phantom
    most_bits, threshold = (STRICT_DISTANCE, STRICT_LIKENESS) if strict else (DISTANCE, LIKENESS)
    close = close_pairs(perceptual_hashes(paths), patients, most_bits)
    positions = close.head(MOST_PAIRS).sort_values(["first", "second"], ignore_index=True)  # few are decoded twice
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
    return Check(pairs, most_bits, threshold, len(close))

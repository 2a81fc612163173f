"""Manifest: one row per readable image, written by stage 2.1 and read by all later ones.

It owns the columns of `manifest.csv`, where the prepared image of a row lies, and the fingerprints of the data.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd

from chestxray.config import NIH_9K, Paths, StudyError
from chestxray.data import sources, subset
from chestxray.data.nih_tables import TABLE_COLUMNS
from chestxray.images.pixels import decode

_BOOLEANS = ("selected", "balanced_test")
MANIFEST_COLUMNS = (*TABLE_COLUMNS, "split", *_BOOLEANS, "sha256")


def store_path(store: Path, image: str) -> Path:
    """Where the prepared PNG of an image lies.

    Args:
        store: the folder of prepared images, `Paths.store`.
        image: the image's name, such as `00000001_000.png`.
    """
    return store / f"{Path(image).stem}.png"


def read_manifest(paths: Paths) -> pd.DataFrame:
    """Read `manifest.csv`: `patient` and texts as str (empty: ""), `age` as Int64, `selected` and the tests as bool.

    Raises:
        StageMissing: stage 2.1 has not been run.
        StudyError: a column is missing, as in the manifest of an earlier version.
    """
    path = paths.require(paths.manifest, "stage 2.1")
    types = dict.fromkeys(MANIFEST_COLUMNS, "str") | {"follow_up": "int64", "age": "Int64"}
    types |= dict.fromkeys(_BOOLEANS, "bool")
    table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values={"age": [""]})
    for column in MANIFEST_COLUMNS:
        if column not in table:
            raise StudyError(f"{path}: lacks the column {column!r}; run stage 2.1 again")
    return table[list(MANIFEST_COLUMNS)]


def fingerprint(paths: Paths) -> str:
    """Twelve hexadecimal digits for the dataset, by which results name their data.

    For nih_9k they are those of its list, the same in every profile and with every seed: stage 2.1 has compared the
    pixels with the list, images and splits are compared here. Any other dataset has those of `prepared_fingerprint`.
    """
    if paths.dataset == NIH_9K:
        planned = read_manifest(paths)
        if subset.splits() == dict(zip(planned["image"], planned["split"], strict=True)):
            return subset.fingerprint()
    return prepared_fingerprint(paths)


def prepared_fingerprint(paths: Paths) -> str:
    """Twelve hexadecimal digits that change when any prepared image, split, selection or augmented file changes.

    What is trained or restored goes by it: one dataset prepared in two ways gives two models. It is the SHA-256 of the
    manifest, which holds the SHA-256 of every prepared image, and of the augmentation plan.
    """
    digest = hashlib.sha256(paths.require(paths.manifest, "stage 2.1").read_bytes())
    if paths.augmented_rows.exists():
        digest.update(paths.augmented_rows.read_bytes())
    return digest.hexdigest()[:12]


def raw_side(paths: Paths) -> int:
    """Side in pixels of a dataset's raw radiographs: of the first one, or as recorded in the archive it came from."""
    if (record := sources.unpacked(paths)) is not None:
        return record["raw_side"]
    return max(decode(next(iter(sources.find_images(paths.require(paths.raw, "stage 1")).values()))).shape)

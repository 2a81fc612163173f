"""The manifest: one row an image, written by stage 2.1 and read by all later ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd

from chestxray.config import Paths, Study
from chestxray.data import sources, splits
from chestxray.images.pixels import decode

MANIFEST_COLUMNS = (*splits.PLAN_COLUMNS, "sha256")


_BOOLEANS = ("selected", "natural_test", "balanced_test")


def raw_side(paths: Paths) -> int:
    """Side in pixels of a dataset's raw radiographs: of the first one, or as told by the archive that it came in.

    Raises:
        StudyError: there is no raw radiograph and no archive, or it cannot be read.
    """
    record = sources.unpacked(paths)
    if record is not None:
        return record["raw_side"]
    return max(decode(next(iter(sources.find_images(paths.raw).values()))).shape)


def store_path(store: Path, image: str) -> Path:
    """Where the prepared PNG of an image lies."""
    return store / f"{Path(image).stem}.png"


def read_manifest(study: Study) -> pd.DataFrame:
    """Read `manifest.csv`: `patient` and texts as str (empty: ""), `age` as Int64, `selected` and the tests as bool.

    Raises:
        StageMissing: stage 2.1 has not been run.
    """
    path = study.require(study.paths.manifest, "stage 2.1")
    types = dict.fromkeys(MANIFEST_COLUMNS, "str") | {"follow_up": "int64", "age": "Int64"}
    types |= dict.fromkeys(_BOOLEANS, "bool")
    table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values={"age": [""]})
    if "balanced_test" not in table:  # of a dataset prepared before the manifest told the tests
        table = table.join(splits.test_sets(table, study.seed))
    return table[list(MANIFEST_COLUMNS)]


def fingerprint(study: Study) -> str:
    """Twelve hexadecimal digits that change when any image, split or augmented file changes.

    It is the SHA-256 of the manifest, which holds the SHA-256 of every prepared image, and of the augmentation plan.
    """
    digest = hashlib.sha256(study.paths.manifest.read_bytes())
    if study.paths.augmented_rows.exists():
        digest.update(study.paths.augmented_rows.read_bytes())
    return digest.hexdigest()[:12]

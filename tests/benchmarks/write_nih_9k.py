"""Writing the list of nih_9k: `python -m tests.benchmarks.write_nih_9k FOLDER_128 FOLDER_256`.

It was run once; `chestxray.data.subset` says what the columns are. The first folder holds the radiographs at 128 px in
the NIH layout, with the corrected image table and the official lists, the second some of them at 256 px. The split is
what `splits.plan` draws in the `cpu` profile with seed 2024: the official test list is test, and 15 % of the train_val
images are validation, by patient.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from chestxray import files
from chestxray.config import PROFILES
from chestxray.data import nih_tables, sources, splits, subset

SEED = 2024


def digests(folder: Path, side: int) -> dict[str, str]:
    """The digest of the pixels of every image of a folder, all of which are grey and of this side in pixels."""
    found = {}
    for name, path in sources.find_images(folder).items():
        with Image.open(path) as image:
            assert image.mode == "L" and image.size == (side, side), f"{path}: {image.mode}, {image.size}"
            found[name] = subset.digest(np.asarray(image))
    return found


def main(folder_128: Path, folder_256: Path) -> None:
    """Write the list."""
    small, large = digests(folder_128, 128), digests(folder_256, 256)
    present = nih_tables.match_images(nih_tables.read_entries(folder_128), sources.find_images(folder_128))
    lists = nih_tables.read_lists(folder_128)
    profile = PROFILES["cpu"]
    planned = splits.plan(present.table, lists, profile.valid_share, profile.no_finding, SEED)
    split = dict(zip(planned["image"], planned["split"], strict=True))
    assert lists is not None and split.keys() == small.keys() >= large.keys()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(subset.COLUMNS)
    for name in sorted(small):
        official = "test" if name in lists[1] else "train_val"
        writer.writerow(subset.Row(name, official, split[name], small[name], large.get(name, "")))
    files.atomic_write(subset.LIST, text.getvalue().encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

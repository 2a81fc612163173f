"""Phantom datasets: radiographs of patients who do not exist, written with their tables in the NIH layout.

Everything follows from the seed and the number of an image, so the files are the same whichever process draws them and
however often. The module knows no class folder, no model, and no split beyond the official lists that it writes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from joblib import Parallel, cpu_count, delayed
from PIL import Image
from tqdm import tqdm

from chestxray import files
from chestxray.config import NO_FINDING_NIH, StudyError
from chestxray.data.nih_tables import BOX_SPELLING, BOXES_HEADER, BOXES_NAME, LIST_NAMES, TABLE_HEADER, TABLE_NAMES
from chestxray.data.phantom.anatomy import SIZES
from chestxray.data.phantom.patients import slot
from chestxray.data.phantom.radiograph import boxes, compose, render

RECIPE = 2
"""Raised whenever the drawing changes, so that images of an older recipe are drawn again."""

STATE = "phantom.json"
"""Records what is drawn; where the tables are beside it, it is complete."""


def write_dataset(raw: Path, images: int, size: int, seed: int, workers: int | None = None) -> None:
    """Draw a dataset into `raw`, in the NIH layout.

    Writes `images/<patient>_<follow-up>.png` (8-bit grey), the image table and box list with the NIH's own headers,
    the two official lists (no patient in both), and `phantom.json`, which records what is drawn. The tables come last:
    where the image table is, the images are complete. Boxes and pixel spacing are those of the image as written.

    An interrupted run is continued: images that are there under the same parameters stay. Images drawn under other
    parameters are replaced.

    Args:
        raw: folder to write, made if need be.
        images: how many images, from 1.
        size: side of an image, 64 to 1024 pixels.
        seed: seeds everything; the result doesn't depend on `workers`.
        workers: processes; all processors if None.

    Raises:
        StudyError: a number is out of range, `raw` holds data that is not a phantom's, or the disk takes no more.
    """
    if images < 1:
        raise StudyError(f"phantom images {images}: give a number from 1")
    if not SIZES[0] <= size <= SIZES[1]:
        raise StudyError(f"phantom size {size} px is out of range; give {SIZES[0]} to {SIZES[1]}")
    slots = [slot(index, seed) for index in range(images)]
    parameters = {"recipe": RECIPE, "images": images, "size": size, "seed": seed}
    if not _prepare_folder(raw, parameters, {place.file for place in slots}):
        return
    processes = min(workers or cpu_count(), images)
    tasks = (delayed(_write_image)(raw / "images", place.index, size, seed) for place in slots)
    drawn = Parallel(n_jobs=processes, return_as="generator", batch_size="auto")(tasks)
    rows = list(tqdm(drawn, total=images, desc=f"phantom radiographs, {size} px", unit="image", disable=None))
    files.atomic_write(raw / BOXES_NAME, _csv(BOXES_HEADER, [box for _, found in rows for box in found]))
    for name, test in zip(LIST_NAMES, (False, True), strict=True):
        files.atomic_write(raw / name, "".join(f"{place.file}\n" for place in slots if place.test == test).encode())
    files.atomic_write(raw / TABLE_NAMES[0], _csv(TABLE_HEADER, [entry for entry, _ in rows]))


def _prepare_folder(raw: Path, parameters: dict[str, int], names: set[str]) -> bool:
    """Clear `raw` of all but the images that can stay; False where it holds this dataset, complete.

    Raises:
        StudyError: `raw` is a link, or holds images that no phantom run recorded.
    """
    state, folder = {}, raw / "images"
    with contextlib.suppress(OSError, ValueError):
        state = json.loads((raw / STATE).read_text())
    with files.explained(folder):
        present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if raw.is_symlink() or (present and not state):
        raise StudyError(f"{raw}: holds images that are not phantoms; move them away or choose another dataset name")
    tables = [raw / name for name in (TABLE_NAMES[0], BOXES_NAME, *LIST_NAMES)]
    if state == parameters and present == names and all(path.exists() for path in tables):
        return False
    for path in tables:
        files.remove(path)
    same = all(state.get(key) == parameters[key] for key in ("recipe", "size", "seed"))
    files.keep_only(folder, names if same else set())
    files.make_folder(folder)
    files.atomic_write(raw / STATE, json.dumps(parameters, indent=1).encode())
    return True


def _write_image(folder: Path, index: int, size: int, seed: int) -> tuple[list[Any], list[list[Any]]]:
    """Draw one image unless it is there, and return its row of the image table and its rows of the box list."""
    scene = compose(index, seed)
    place = scene.slot
    path = folder / place.file
    if not path.exists():
        buffer = io.BytesIO()
        Image.fromarray(render(scene, size)).save(buffer, "PNG", compress_level=1)
        files.atomic_write(path, buffer.getvalue())
    spacing = round(scene.width / size, 6)
    labels = "|".join(place.findings) or NO_FINDING_NIH
    entry = [place.file, labels, place.follow_up, place.patient, scene.age, scene.sex, scene.view]
    entry += [size, size, spacing, spacing]
    spelling = {ours: theirs for theirs, ours in BOX_SPELLING.items()}
    found = boxes(scene, size)
    return entry, [[place.file, spelling.get(box[0], box[0]), *(round(end, 3) for end in box[1:])] for box in found]


def _csv(header: str, rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    text.write(f"{header}\n")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()

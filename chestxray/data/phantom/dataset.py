"""Draws chest radiographs of patients who do not exist, and writes them as a data set in the NIH layout.

It owns the whole phantom: who the patients are, their anatomy in millimetres, the textbook sign of each finding, the
X-ray physics (attenuation along the ray, scatter, quantum noise), and the raw folder with its tables. Everything
follows from `(seed, index)`, so an image is the same whichever process draws it and however often. It must know
nothing of the study: no split beyond the official lists it writes, no class folder, no model.

Lengths are millimetres in the plane of the detector: x grows to the right of the image (the patient's left) from the
middle of the image, y grows downwards from its top edge. Thicknesses are millimetres of water along the ray.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from joblib import Parallel, cpu_count, delayed
from PIL import Image
from tqdm import tqdm

from chestxray.config import NO_FINDING_NIH, StudyError
from chestxray.data.phantom.patients import slot
from chestxray.data.phantom.radiograph import boxes, check, compose, render

RECIPE = 2
"""Raised whenever the drawing changes, so that images of an older recipe are drawn again."""


DATA_ENTRY = "Data_Entry_2017_v2020.csv"
BBOX_LIST = "BBox_List_2017.csv"
TRAIN_VAL_LIST = "train_val_list.txt"
TEST_LIST = "test_list.txt"
STATE = "phantom.json"

DATA_ENTRY_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
"""The header of the NIH's own file, character by character (two brackets hold a comma, so it counts eleven columns)."""

BBOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
"""The header of the NIH's own file: four numbers under one name, and three columns without a name."""

_BBOX_SPELLING = {"Infiltration": "Infiltrate"}  # the NIH's box list spells this finding in its own way


# --- the data set ----------------------------------------------------------------------------------------------------


def write_dataset(raw: Path, images: int, size: int, seed: int, workers: int | None = None) -> None:
    """Draw a data set into `raw`, in the NIH layout.

    Writes `images/<patient>_<follow-up>.png` (8-bit grey), the data entries and box list with the NIH's own headers,
    the two official lists (no patient in both), and `phantom.json`, which records what was drawn. The tables come
    last: where the data entries are, the images are complete. Boxes are in pixels of the image as written (the NIH's
    are in pixels of its 1024-px images); pixel spacing is true at that size, so boxes times spacing are millimetres.

    An interrupted run is continued: images already there under the same parameters are kept. Images drawn under
    other parameters are replaced.

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
    check(images - 1, size)
    try:
        _write_dataset(Path(raw), images, size, seed, workers)
    except OSError as error:
        reason = f"{error.strerror or error}"
        raise StudyError(f"{raw}: phantoms cannot be written there ({reason}); free space or choose another") from error


def _write_dataset(raw: Path, images: int, size: int, seed: int, workers: int | None) -> None:
    parameters = {"recipe": RECIPE, "images": images, "size": size, "seed": seed}
    if _claim(raw, parameters):
        return
    folder = raw / "images"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {slot(index, seed).file for index in range(images)}
    for path in sorted(folder.iterdir()):
        if path.name not in wanted:  # left by a larger set, or half-written when a run was killed
            path.unlink()

    processes = min(workers or cpu_count(), images)
    tasks = (delayed(_write_image)(folder, index, size, seed) for index in range(images))
    drawn = Parallel(n_jobs=processes, return_as="generator", batch_size="auto")(tasks)
    rows = list(tqdm(drawn, total=images, desc=f"phantom radiographs, {size} px", unit="image", disable=None))

    _write(raw / BBOX_LIST, _table(BBOX_HEADER, [box for _, found in rows for box in found]))
    for name, test in ((TRAIN_VAL_LIST, False), (TEST_LIST, True)):
        files = [slot(index, seed).file for index in range(images) if slot(index, seed).test == test]
        _write(raw / name, "".join(f"{file}\n" for file in files).encode())
    _write(raw / DATA_ENTRY, _table(DATA_ENTRY_HEADER, [entry for entry, _ in rows]))
    _write(raw / STATE, json.dumps({**parameters, "complete": True}, indent=1).encode())


def _claim(raw: Path, parameters: dict[str, Any]) -> bool:
    """Make `raw` ready for these parameters; True where it already holds exactly this data set, complete.

    Raises:
        StudyError: `raw` is a link, or holds images that no phantom run recorded.
    """
    state = _read_state(raw)
    if raw.is_symlink() or (state is None and (raw / "images").exists() and any((raw / "images").iterdir())):
        raise StudyError(f"{raw}: holds images that are not phantoms; move them away or choose another dataset name")
    tables = [raw / name for name in (DATA_ENTRY, BBOX_LIST, TRAIN_VAL_LIST, TEST_LIST)]
    if state == {**parameters, "complete": True} and all(path.exists() for path in tables):
        present = sum(1 for _ in (raw / "images").glob("*.png"))
        if present == parameters["images"]:
            return True
    for path in tables:
        path.unlink(missing_ok=True)
    same = state is not None and all(state.get(key) == parameters[key] for key in ("recipe", "size", "seed"))
    if state is not None and not same:
        for path in (raw / "images").glob("*"):
            path.unlink()
    raw.mkdir(parents=True, exist_ok=True)
    _write(raw / STATE, json.dumps({**parameters, "complete": False}, indent=1).encode())
    return False


def _read_state(raw: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((raw / STATE).read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def _write_image(folder: Path, index: int, size: int, seed: int) -> tuple[list[Any], list[list[Any]]]:
    """Draw one image unless it is there, and return its row of the data entries and its rows of the box list."""
    scene = compose(index, seed)
    place = scene.slot
    path = folder / place.file
    if not path.exists():
        buffer = io.BytesIO()
        Image.fromarray(render(scene, size)).save(buffer, "PNG", compress_level=1)
        _write(path, buffer.getvalue())
    spacing = round(scene.width / size, 6)
    labels = "|".join(place.findings) or NO_FINDING_NIH
    entry = [place.file, labels, place.follow_up, place.patient, scene.age, scene.sex, scene.view]
    entry += [size, size, spacing, spacing]
    found = [
        [place.file, _BBOX_SPELLING.get(b.finding, b.finding), *(round(v, 3) for v in (b.x, b.y, b.width, b.height))]
        for b in boxes(scene, size)
    ]
    return entry, found


def _table(header: str, rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    text.write(header + "\n")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _write(path: Path, data: bytes) -> None:
    """Write a file complete or not at all; `atomic_write` lies above this module, which may not import it."""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)

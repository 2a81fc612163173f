"""Subset nih_9k: the reference's radiographs, listed in `1_Datasets/nih_9k.csv`, taken from folders or made anew.

The list has an image's name, official list and split, and the SHA-256 of its pixels at 128 px, and at 256 px where it
has such a version: of the grey values as bytes, row by row (`pixels.tobytes()` of a C-ordered uint8 array), not of the
PNG file, whose bytes depend on who compressed it.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from chestxray import files
from chestxray.config import NIH_9K, NIH_9K_LIST, Rejection, StudyError
from chestxray.data import sources
from chestxray.images.pixels import decode, to_128

NAME, LIST = NIH_9K, NIH_9K_LIST
COLUMNS = ("image", "list", "split", "sha256_128", "sha256_256")
NATIVE = 1024
"""Side in pixels of the NIH's originals."""

FOLDERS = {128: "images", 256: sources.LARGER}
"""Side of the radiographs in pixels → their folder."""

_REMEDY = "take the NIH's original (remove this one, if it is in kagglehub's cache)"


class Row(NamedTuple):
    """One image of the list: `list` is `train_val` or `test`; `sha256_256` is empty where there is no such version."""

    image: str
    list: str
    split: str
    sha256_128: str
    sha256_256: str

    def digest(self, side: int) -> str:
        """SHA-256 of its pixels at 128 or 256 px; empty where there is no such version."""
        return self.sha256_128 if side == 128 else self.sha256_256


def read_list() -> dict[str, Row]:
    """Read the committed list: image name → its row, sorted by name.

    Raises:
        StudyError: it is missing, as in an installed wheel, or not as it was committed.
    """
    try:
        with LIST.open(encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file)
        if tuple(header) != COLUMNS:
            raise ValueError(f"columns {', '.join(header)}")
        return {line[0]: Row(*line) for line in lines}
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        remedy = "take the file from the repository, such as by git checkout 1_Datasets"
        raise StudyError(f"{LIST}: cannot be read ({reason}); {remedy}") from error


def splits() -> dict[str, str]:
    """The split of each image of the list: `train`, `valid` or `test`."""
    return {row.image: row.split for row in read_list().values()}


def fingerprint() -> str:
    """Twelve hexadecimal digits of the list: its images, their splits, and their pixels at 128 px."""
    rows = [f"{row.image},{row.split},{row.sha256_128}\n" for row in read_list().values()]
    return hashlib.sha256("".join(rows).encode()).hexdigest()[:12]


def digest(pixels: np.ndarray) -> str:
    """SHA-256 of an image's grey values, (height, width) uint8, row by row, in hexadecimal: what the list compares."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def reduce(pixels: np.ndarray) -> np.ndarray:
    """Bring an original, (1024, 1024) uint8, to 128 px as nih_9k was made; `StudyError` for another shape or type.

    Twice a mean of four, rounded half up: first to 256 px the pixels 1 and 2 of every four in both directions, then
    each 2 × 2.
    """
    return to_128(_original(pixels))


def reduce_256(pixels: np.ndarray) -> np.ndarray:
    """Bring an original to 256 px as nih_9k was made: the mean of each 4 × 4 pixels, halves to the even number.

    (It is OpenCV's resizing by area.) Shape, type and errors are as of `reduce`.
    """
    blocks = _original(pixels).reshape(NATIVE // 4, 4, NATIVE // 4, 4)
    return np.rint(blocks.sum(axis=(1, 3), dtype=np.uint16) / 16).astype(np.uint8)


def _original(pixels: np.ndarray) -> np.ndarray:
    if pixels.shape != (NATIVE, NATIVE) or pixels.dtype != np.uint8:
        raise StudyError(
            f"an image of shape {pixels.shape} and type {pixels.dtype}: is no original of the NIH's; "
            f"give one of shape ({NATIVE}, {NATIVE}) and type uint8"
        )
    return pixels


_RECIPES: dict[int, Callable[[np.ndarray], np.ndarray]] = {128: reduce, 256: reduce_256}


def provide(raw: Path, folders: Sequence[Path] = ()) -> None:
    """Make `raw` hold nih_9k: `images/` at 128 px, `images_256/` as far as they can be had, its lists, and tables.

    Every file is compared with the list by its pixels. One at 128 or 256 px is linked (copied where the file system
    has no links), an original is brought to both sizes. A run that was stopped goes on where it was.

    Args:
        raw: the folder; it appears when it has all radiographs at 128 px.
        folders: with radiographs or originals, and one of them with the image table: as an NIH download, or images
            alone. Without, mounted copies and kagglehub's cache are looked through, and Kaggle is asked for the rest.

    Raises:
        StudyError: a folder has nothing of the list, there is no image table, or a radiograph is missing at 128 px.
    """
    from chestxray.data import kaggle  # here, because it imports pandas, which reading the list doesn't need

    rows, nih = read_list(), kaggle.DATASETS["nih"]
    place = raw if raw.exists() else raw.with_name("raw.unfinished")
    lacking = _lacking(rows, place)
    if raw.exists() and not (lacking if folders else _missing(lacking)):
        return
    for link in (raw, *(raw / name for name in FOLDERS.values())):
        if link.is_symlink():
            raise StudyError(f"{link}: links to another folder, which lacks radiographs; remove {raw} and run it again")
    # Not from what stage 2.1 makes of it, which changes with the profile.
    own = raw.parents[1].resolve()
    mounted = (folder for folder in kaggle.candidates(nih) if own not in folder.resolve().parents)
    places, candidates = _find(folders or mounted, rows, bool(folders))
    _add_tables(place, [place, *places], rows, ask=not folders)
    for leftover in place.glob(f"images*/.*{files.TEMPORARY}*"):
        files.remove(leftover)
    refused: list[str] = []

    def make(image: str, *paths: Path) -> None:
        refused.extend(_make(rows[image], paths or candidates[image], lacking[image]))

    jobs = [image for image in lacking if image in candidates]
    made = files.in_threads(make, jobs, -1, batch=4)
    try:
        for _ in tqdm(made, "Radiographs", len(jobs), unit="image", disable=None):
            pass
        if not folders and (missing := _missing(lacking)):
            kaggle.fetch_images(nih, missing, make)
    finally:
        if refused:
            print(f"Files refused: {len(refused):,}, such as", *sorted(refused)[:3], sep="\n  ")
    if missing := _missing(lacking):
        raise StudyError(
            f"{NAME}: {len(missing):,} of {len(rows):,} radiographs missing at 128 px, such as "
            f"{', '.join(missing[:3])}; give a folder that has them, or a full copy of ChestX-ray14, by --from"
        )
    larger = sum(bool(row.sha256_256) for row in rows.values())
    if absent := sum(256 in paths for paths in lacking.values()):
        print(f"{larger - absent:,} of {larger:,} radiographs at 256 px are here; --from a folder adds the others.")
    if place != raw:
        with files.explained(raw):
            place.rename(raw)


def is_here() -> bool:
    """Whether mounted copies and kagglehub's cache have files of all listed names, and an image table."""
    from chestxray.data import kaggle

    rows, nih = read_list(), kaggle.DATASETS["nih"]
    places, candidates = _find(kaggle.candidates(nih), rows, False)
    return candidates.keys() >= rows.keys() and _first(places, nih.tables) is not None


def _lacking(rows: Mapping[str, Row], place: Path) -> dict[str, dict[int, Path]]:
    """Image → side → path of each file that `place` should have and hasn't; without images that lack nothing."""
    lacking = defaultdict(dict)
    for row in rows.values():
        for side, folder in FOLDERS.items():
            path = place / folder / row.image
            if row.digest(side) and not path.is_file():
                lacking[row.image][side] = path
    return lacking


def _missing(lacking: Mapping[str, Mapping[int, Path]]) -> list[str]:
    """The images that are lacking at 128 px."""
    return [image for image, paths in lacking.items() if 128 in paths]


def _find(folders: Iterable[Path], names: Iterable[str], given: bool) -> tuple[list[Path], dict[str, list[Path]]]:
    """The folders that have files of listed names, and name → its files: in a folder, or anywhere below its `images*`.

    Raises:
        StudyError: a folder that the user has `given` is none, or has none.
    """
    places, found, names = [], defaultdict(list), set(names)
    for folder in folders:
        paths = [*folder.glob("*.png"), *folder.glob("images*/**/*.png")]
        paths = [path for path in paths if path.name in names and path.is_file()]
        if given and not paths:
            reason = f"has none of the radiographs of {LIST.name}" if folder.is_dir() else "is no folder"
            raise StudyError(f"{folder}: {reason}; --from takes a folder of them, or a full copy of ChestX-ray14")
        for path in paths:
            found[path.name].append(path)
        places += [folder] if paths else []
    return places, found


def _first(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """The file of the first of these names that any of the folders has."""
    found = [folder / name for name in names for folder in folders if (folder / name).is_file()]
    return found[0] if found else None


def _add_tables(place: Path, folders: Sequence[Path], rows: Mapping[str, Row], ask: bool) -> None:
    """Copy the folders' best image table and boxes into `place`, and write the lists; `ask` Kaggle where none has any.

    Raises:
        StudyError: there is no image table, or it lacks listed images.
    """
    from chestxray.data import kaggle, nih_tables

    best = nih_tables.TABLE_NAMES[0]
    table, boxes = _first(folders, nih_tables.TABLE_NAMES), _first(folders, [nih_tables.BOXES_NAME])
    if table is None and ask:
        table, boxes = kaggle.fetch_tables(kaggle.DATASETS["nih"])
    if table is None:
        raise StudyError(f"{NAME}: no folder has the image table; put {best} beside the images")
    if absent := rows.keys() - set(nih_tables.read_entries(table).table["image"]):
        raise StudyError(
            f"{table}: lacks {len(absent):,} of the {len(rows):,} images of {LIST.name}, such as {min(absent)}; "
            "take the NIH's own table"
        )
    if table.name != best:
        print(f"{table.name}: the first edition; the NIH has corrected ages and labels since, in {best}.")
    for path in (table, boxes):
        if path and path.parent != place:
            files.atomic_write(place / path.name, path.read_bytes())
    for name in ("train_val", "test", "valid"):
        names = [row.image for row in rows.values() if name in (row.list, row.split)]
        files.atomic_write(place / f"{name}_list.txt", "".join(f"{image}\n" for image in names).encode())


def _make(row: Row, candidates: Iterable[Path], lacking: dict[int, Path]) -> list[str]:
    """Make the lacking files of one listed image, and take them off `lacking`; say which candidates are refused."""
    refused = []
    for path in candidates:
        try:
            made = _versions(path, row, lacking) if lacking else {}
        except StudyError as error:
            refused.append(str(error))
            continue
        for side, png in made.items():
            if png is None:
                files.symlink(path, lacking.pop(side))
            else:
                files.atomic_write(lacking.pop(side), png)
    return refused


def _versions(path: Path, row: Row, wanted: Iterable[int]) -> dict[int, bytes | None]:
    """What a file gives of the wanted sides: out of an original PNG files, else None for the file itself."""
    pixels, made = decode(path), {}
    height, width = pixels.shape
    if height != width or width not in (*FOLDERS, NATIVE):
        sides = f"{', '.join(map(str, FOLDERS))} or {NATIVE} px"
        raise StudyError(f"{path}: {width} × {height} px, not square of {sides}; {_REMEDY}")
    for side in wanted:
        if width not in (side, NATIVE):
            continue
        version = _RECIPES[side](pixels) if width == NATIVE else pixels
        brought = f", brought to {side} px," if width == NATIVE else ""
        if digest(version) != row.digest(side):
            raise StudyError(f"{path}: its pixels{brought} differ from {LIST.name}; {_REMEDY}")
        made[side] = None
        if width == NATIVE:
            Image.fromarray(version).save(png := io.BytesIO(), "PNG")
            made[side] = png.getvalue()
    return made


def require_equal(raw: Path, images: Mapping[str, Path]) -> None:
    """Refuse a raw folder of nih_9k whose radiographs are not those of the list any more.

    Args:
        raw: the folder.
        images: as `compare` takes them.

    Raises:
        StudyError: the first that is missing, unexpected or has other pixels.
    """
    if faults := compare(images)[0]:
        more = f" ({len(faults) - 1:,} more: chestxray verify {NAME})" if faults[1:] else ""
        raise StudyError(f"{raw}: {faults[0].file}: {faults[0].value}{more}; {faults[0].remedy}")


def compare(images: Mapping[str, Path], larger: Path | None = None) -> tuple[list[Rejection], str]:
    """Compare every radiograph with the list: what is missing, unexpected or different, and what was compared.

    Args:
        images: file name → path of those at 128 px.
        larger: the folder of those at 256 px, if they are compared too; that it has none at all is no fault.
    """
    rows, prefix = read_list().values(), f"{FOLDERS[256]}/"
    at_256 = {prefix + path.name: path for path in larger.glob("[!.]*")} if larger else {}
    listed = {row.image: row.sha256_128 for row in rows}
    listed |= {prefix + row.image: row.sha256_256 for row in rows if row.sha256_256 and at_256}
    present = {**images, **at_256}

    def fault(name: str) -> str:
        if name not in listed or name not in present:
            return "is not there" if name in listed else f"is not in {LIST.name}"
        try:
            return "" if digest(decode(present[name])) == listed[name] else f"its pixels differ from {LIST.name}"
        except StudyError as error:
            return str(error).removeprefix(f"{present[name]}: ").rpartition("; ")[0]

    names = sorted(present.keys() | listed.keys())
    results = zip(names, files.in_threads(fault, names, -1, batch=64), strict=True)
    remedy = "remove it, if it is there, and run stage 1 again with --from"
    faults = [Rejection(name, value, remedy) for name, value in results if value]
    return faults, f"compared with {LIST.name}: {len(images):,} images of 128 px, {len(at_256):,} of 256 px"

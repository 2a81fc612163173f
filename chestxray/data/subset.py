"""Subset nih_9k: the reference's radiographs, listed in `1_Datasets/nih_9k.csv`, taken from folders or made anew.

The list has an image's name, official list and split, and the SHA-256 of its pixels at 128 px, and at 256 px where it
has such a version: of the grey values as bytes, row by row (`pixels.tobytes()` of a C-ordered uint8 array), not of the
PNG file, whose bytes depend on who compressed it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from chestxray import files
from chestxray.config import NIH_9K, NIH_9K_LIST, StudyError
from chestxray.data import sources
from chestxray.images.pixels import decode

if TYPE_CHECKING:  # it imports pandas, which reading the list doesn't need
    from chestxray.data.nih_tables import Rejection

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
        if tuple(header) == COLUMNS:
            return {line[0]: Row(*line) for line in lines}
        reason = f"has the columns {', '.join(header)}"
    except (OSError, ValueError, TypeError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    raise StudyError(f"{LIST}: {reason}; take the file from the repository, such as by git checkout 1_Datasets")


def splits() -> dict[str, str]:
    """The split of each image of the list: `train`, `valid` or `test`."""
    return {row.image: row.split for row in read_list().values()}


def fingerprint() -> str:
    """Twelve hexadecimal digits of the list: its images, their splits, and their pixels at 128 px."""
    rows = [f"{row.image},{row.split},{row.sha256_128}\n" for row in read_list().values()]
    return hashlib.sha256("".join(rows).encode()).hexdigest()[:12]


def digest(pixels: np.ndarray) -> str:
    """SHA-256 of an image's grey values, row by row, in hexadecimal: what the list compares.

    Args:
        pixels: (height, width) uint8.
    """
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def reduce(pixels: np.ndarray) -> np.ndarray:
    """Bring an original to 128 px as nih_9k was made: twice a mean of four pixels, rounded half up.

    First to 256 px the pixels 1 and 2 of every four in both directions, then each 2 × 2. (It is OpenCV's bilinear
    resizing to 256 px and on to 128 px.)

    Args:
        pixels: (1024, 1024) uint8.

    Returns:
        (128, 128) uint8.

    Raises:
        StudyError: it has another shape or type.
    """
    wide = _original(pixels).astype(np.uint16)
    for first, step in ((1, 4), (0, 2)):
        corners = (wide[first + row :: step, first + column :: step] for row in (0, 1) for column in (0, 1))
        wide = (sum(corners, np.uint16(2))) >> 2
    return wide.astype(np.uint8)


def reduce_256(pixels: np.ndarray) -> np.ndarray:
    """Bring an original to 256 px as nih_9k was made: the mean of each 4 × 4 pixels, halves to the even number.

    (It is OpenCV's resizing by area.)

    Args:
        pixels: (1024, 1024) uint8.

    Returns:
        (256, 256) uint8.

    Raises:
        StudyError: it has another shape or type.
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
        StudyError: a folder has nothing of the list or there is no image table; a radiograph is missing at 128 px;
            Kaggle cannot be reached; or the file system refuses.
    """
    from chestxray.data import kaggle

    rows, nih = read_list(), kaggle.DATASETS["nih"]
    place = raw if raw.exists() else raw.with_name("raw.unfinished")
    lacking = [row for row in rows.values() if _lacking(row, place)]
    if raw.exists() and not (folders and lacking) and not any(128 in _lacking(row, place) for row in lacking):
        return
    for link in (raw, *(raw / name for name in FOLDERS.values())):
        if link.is_symlink():
            raise StudyError(f"{link}: links to another folder, which lacks radiographs; remove {raw} and run it again")
    # Not from what stage 2.1 makes of it, which changes with the profile.
    own = raw.parents[1].resolve()
    mounted = (folder for folder in kaggle.candidates(nih) if own not in folder.resolve().parents)
    found = _find(folders or mounted, rows, bool(folders))
    tables = _tables([place, *(folders or found)])
    if not folders and not tables.keys() & {*nih.tables}:
        tables = kaggle.fetch_tables(nih) | tables
    _check_table(tables, rows)
    for leftover in place.glob(f"images*/.*{files.TEMPORARY}*"):
        files.remove(leftover)
    for name, path in tables.items():
        if path.parent != place:
            files.atomic_write(place / name, path.read_bytes())
    for name in ("train_val", "test", "valid"):
        names = [row.image for row in rows.values() if name in (row.list, row.split)]
        files.atomic_write(place / f"{name}_list.txt", "".join(f"{image}\n" for image in names).encode())
    refused: list[Rejection] = []
    paths = defaultdict(list)
    for path in itertools.chain.from_iterable(found.values()):
        paths[path.name].append(path)
    jobs = [row for row in lacking if row.image in paths]
    made = files.in_threads(lambda row: _make(row, paths[row.image], place), jobs, -1, batch=4)
    for lines in tqdm(made, "Radiographs", len(jobs), unit="image", disable=None):
        refused += lines
    try:
        missing = [row.image for row in lacking if 128 in _lacking(row, place)]
        if missing and not folders:
            kaggle.fetch_images(nih, missing, lambda image, path: refused.extend(_make(rows[image], [path], place)))
    finally:
        _tell(refused, raw)
    _finish(place, raw, rows)


def is_here() -> bool:
    """Whether mounted copies and kagglehub's cache have files of all listed names, and an image table."""
    from chestxray.data import kaggle

    rows, nih = read_list(), kaggle.DATASETS["nih"]
    found = _find(kaggle.candidates(nih), rows, False)
    names = {path.name for path in itertools.chain.from_iterable(found.values())}
    return names >= rows.keys() and bool(_tables(found).keys() & {*nih.tables})


def _lacking(row: Row, place: Path) -> dict[int, Path]:
    """Side → path of each file that a listed image should have in `place` and hasn't."""
    paths = {side: place / folder / row.image for side, folder in FOLDERS.items() if row.digest(side)}
    return {side: path for side, path in paths.items() if not path.is_file()}


def _find(folders: Iterable[Path], names: Iterable[str], given: bool) -> dict[Path, list[Path]]:
    """Find files of listed names: directly in each folder, and anywhere below its `images*`.

    Raises:
        StudyError: a folder that the user has `given` is none, or has none.
    """
    found, names = {}, set(names)
    for folder in folders:
        walks = [files.walk(place) for place in sorted(folder.glob("images*")) if place.is_dir()]
        directly = ((path, "file") for path in folder.glob("*.png") if path.is_file())
        paths = [path for path, kind in itertools.chain(directly, *walks) if kind == "file" and path.name in names]
        if paths:
            found[folder] = paths
        elif given:
            reason = f"has none of the radiographs of {LIST.name}" if folder.is_dir() else "is no folder"
            raise StudyError(f"{folder}: {reason}; --from takes a folder of them, or a full copy of ChestX-ray14")
    return found


def _tables(folders: Iterable[Path]) -> dict[str, Path]:
    """File name → path of the best image table and of the boxes, as far as the folders have them."""
    from chestxray.data.nih_tables import BOXES_NAME, TABLE_NAMES

    folders = list(folders)
    found = {}
    for names in (TABLE_NAMES, (BOXES_NAME,)):
        paths = [folder / name for name in names for folder in folders if (folder / name).is_file()]
        found |= {path.name: path for path in paths[:1]}
    return found


def _check_table(tables: Mapping[str, Path], rows: Mapping[str, Row]) -> None:
    """Make sure of an image table that has every listed image, and say where it is the first edition.

    Raises:
        StudyError: there is none, or it lacks images.
    """
    from chestxray.data import nih_tables

    table = next((tables[name] for name in nih_tables.TABLE_NAMES if name in tables), None)
    if table is None:
        raise StudyError(f"{NAME}: no folder has the image table; put {nih_tables.TABLE_NAMES[0]} beside the images")
    if absent := rows.keys() - set(nih_tables.read_entries(table).table["image"]):
        raise StudyError(
            f"{table}: lacks {len(absent):,} of the {len(rows):,} images of {LIST.name}, such as {min(absent)}; "
            "take the NIH's own table"
        )
    if table.name != nih_tables.TABLE_NAMES[0]:
        best = nih_tables.TABLE_NAMES[0]
        print(f"{table.name}: the first edition; the NIH has corrected ages and labels since, in {best}.")


def _side(path: Path) -> int:
    """Side in pixels of a square image, as its header says; 0 where it is none."""
    try:
        with Image.open(path) as image:
            return image.width if image.width == image.height else 0
    except Exception:  # of a broken file; `decode` says what is wrong with it
        return 0


def _make(row: Row, candidates: Iterable[Path], place: Path) -> list[Rejection]:
    """Put the files that `place` lacks of one listed image there; say which candidates are not what the list says."""
    from chestxray.data.nih_tables import Rejection

    lacking, refused = _lacking(row, place), []
    for side, path in sorted((_side(path), path) for path in candidates):
        if not lacking or (side in FOLDERS and side not in lacking):
            continue
        try:
            made = _versions(path, side, row, lacking)
        except StudyError as error:
            value, _, remedy = str(error).removeprefix(f"{path}: ").rpartition("; ")
            refused.append(Rejection(str(path), value, remedy))
            continue
        for wanted, pixels in made.items():
            if wanted == side:
                _link(path, lacking.pop(wanted))
            else:
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                files.atomic_write(lacking.pop(wanted), png.getvalue())
    return refused


def _versions(path: Path, side: int, row: Row, wanted: Iterable[int]) -> dict[int, np.ndarray]:
    """Pixels of the wanted sides that a file has or gives.

    Raises:
        StudyError: it is broken, of another size, or its pixels are not those of the list.
    """
    pixels = decode(path)
    if side == NATIVE:
        made = {other: _RECIPES[other](pixels) for other in wanted}
    elif side in FOLDERS:
        made = {side: pixels}
    else:
        shape = f"{pixels.shape[1]} × {pixels.shape[0]} px"
        raise StudyError(f"{path}: {shape}, not square of {', '.join(map(str, FOLDERS))} or {NATIVE} px; {_REMEDY}")
    for other, version in made.items():
        if digest(version) != row.digest(other):
            brought = f", brought to {other} px," if other != side else ""
            raise StudyError(f"{path}: its pixels{brought} differ from {LIST.name}; {_REMEDY}")
    return made


def _link(target: Path, place: Path) -> None:
    """Make `place` a link to a file that is never written; a copy where the file system has no links."""
    with files.atomic_path(place) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(target.resolve())
        except OSError:
            shutil.copyfile(target, temporary)


def _tell(refused: Sequence[Rejection], raw: Path) -> None:
    """Name the files that are not what the list says: the first three here, all in `refused.csv` beside `raw`."""
    from chestxray.data.nih_tables import rejections_frame

    report = raw.with_name("refused.csv")
    if not refused:
        files.remove(report)
        return
    files.atomic_write(report, rejections_frame(refused).to_csv(index=False, lineterminator="\n").encode())
    print(f"Files refused: {len(refused):,}; {report} names all, the first are")
    print(*(f"  {line.file}: {line.value}; {line.remedy}" for line in refused[:3]), sep="\n")


def _finish(place: Path, raw: Path, rows: Mapping[str, Row]) -> None:
    """Let `raw` appear if all 128-px radiographs are there; say how many 256-px ones are.

    Raises:
        StudyError: some are missing.
    """
    lacking = {row.image: _lacking(row, place) for row in rows.values()}
    if missing := [image for image, sides in lacking.items() if 128 in sides]:
        raise StudyError(
            f"{NAME}: {len(missing):,} of {len(rows):,} radiographs missing at 128 px, such as "
            f"{', '.join(missing[:3])}; give a folder that has them, or a full copy of ChestX-ray14, by --from"
        )
    larger = sum(bool(row.sha256_256) for row in rows.values())
    if absent := sum(256 in sides for sides in lacking.values()):
        print(f"{larger - absent:,} of {larger:,} radiographs at 256 px are here; --from a folder adds the others.")
    if place != raw:
        with files.explained(raw):
            place.rename(raw)


def require_equal(raw: Path, images: Mapping[str, Path]) -> None:
    """Refuse a raw folder of nih_9k whose radiographs are not those of the list any more.

    Args:
        raw: the folder.
        images: as `compare` takes them.

    Raises:
        StudyError: the first that is missing, unexpected or has other pixels.
    """
    faults, _ = compare(images)
    if faults:
        more = f" ({len(faults) - 1:,} more: chestxray verify {NAME})" if faults[1:] else ""
        raise StudyError(f"{raw}: {faults[0].file}: {faults[0].value}{more}; {faults[0].remedy}")


def compare(images: Mapping[str, Path], larger: Path | None = None) -> tuple[list[Rejection], str]:
    """Compare every radiograph with the list.

    Args:
        images: file name → path of those at 128 px.
        larger: the folder of those at 256 px, if they are compared too; that it has none at all is no fault.

    Returns:
        What is missing, unexpected or has other pixels; and what was compared, in words.
    """
    from chestxray.data.nih_tables import Rejection

    at_256 = {path.name: path for path in sorted(larger.glob("[!.]*"))} if larger else {}
    present = {(side, name): path for side, found in ((128, images), (256, at_256)) for name, path in found.items()}
    sides = (128, 256) if at_256 else (128,)
    listed = {(side, row.image): row.digest(side) for row in read_list().values() for side in sides if row.digest(side)}

    def fault(key: tuple[int, str]) -> str:
        if key not in listed or key not in present:
            return "is not there" if key in listed else f"is not in {LIST.name}"
        try:
            return "" if digest(decode(present[key])) == listed[key] else f"its pixels differ from {LIST.name}"
        except StudyError as error:
            return str(error).removeprefix(f"{present[key]}: ").rpartition("; ")[0]

    keys, remedy = (
        sorted(present.keys() | listed.keys()),
        "remove it, if it is there, and run stage 1 again with --from",
    )
    results = zip(keys, files.in_threads(fault, keys, -1, batch=64), strict=True)
    names = {128: "", 256: f"{FOLDERS[256]}/"}
    faults = [Rejection(names[side] + name, value, remedy) for (side, name), value in results if value]
    return faults, f"compared with {LIST.name}: {len(images):,} images of 128 px, {len(at_256):,} of 256 px"

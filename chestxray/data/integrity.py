"""Integrity: which files of a raw folder are missing, broken or at odds with its tables.

Everything is read and nothing changed. Each fault names its file and the remedy.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from chestxray import files
from chestxray.config import Rejection, StudyError, printable
from chestxray.data import kaggle, nih_tables, own_tables, sources, splits, subset
from chestxray.data.kaggle import Published
from chestxray.images import pixels
from chestxray.images.pixels import MOST_PIXELS, PNG, SIGNATURES, decode

SAMPLE = 200
"""Images that are decoded unless all are."""

SHOWN = 20
"""Faults that are printed, at most."""

_END = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
_AGAIN = "download it again"


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    images: int  # image files
    size: int  # their bytes
    sides: dict[tuple[int, int], int]  # pixel size of the images, (width, height) → how many
    absent: tuple[str, ...]  # images of the table that have no file; a fault only in a dataset that is to be whole
    decoded: int  # images decoded
    faults: tuple[Rejection, ...]  # what is wrong; `file` is a name
    notes: tuple[str, ...]  # what was read and what a reader should know besides, one line each

    def lines(self) -> list[str]:
        """The report as lines to read, faults last."""
        if not self.faults:
            return [*self.notes, "Nothing is wrong."]
        lines = [*self.notes, f"{len(self.faults):,} wrong:"]
        lines += [f"  {fault.file}: {fault.value}; {fault.remedy}" for fault in self.faults[:SHOWN]]
        if len(self.faults) > SHOWN:
            lines.append(f"  … and {len(self.faults) - SHOWN:,} more; --report FILE lists all")
        return lines


def verify(
    raw: Path,
    dataset: Published | None = None,
    full: bool = False,
    seed: int = 0,
    reference: bool = False,
    labels: Path | None = None,
) -> Report:
    """Check a folder of raw data: its tables, every image's header and end, and the pixels of some.

    Every file is opened and its beginning and end are read: signature, width and height, end mark. A random sample is
    read whole, with the checksum of every PNG chunk, and decoded.

    Args:
        raw: a folder in the NIH layout.
        dataset: what it has to be; without, an image of the table that is not here is no fault.
        full: read and decode all images instead of a sample.
        seed: of the sample.
        reference: it is nih_9k: every file's pixels are compared with the committed list.
        labels: a label map for own labels.

    Raises:
        StudyError: there is no table or no image, or the table can't be used.
    """
    entries = nih_tables.read_entries(raw, labels, strict=False)
    images = sources.find_images(raw)
    present = nih_tables.match_images(entries, images)
    absent = tuple(image for image in entries.table["image"] if image not in present.paths)  # sorted by image
    faults = [*_list_faults(raw, entries, present, dataset), *sources.unusable_files(raw)]
    faults += [entries.fault] if entries.fault else []
    faults += _absences(dataset, entries, absent) if dataset else []
    names = list(images)
    rng = np.random.default_rng(seed)
    chosen = set(names if full or len(names) <= SAMPLE else rng.choice(names, SAMPLE, replace=False))
    side = nih_tables.NIH_SIDE if dataset else None
    jobs = files.in_threads(lambda name: check_image(images[name], name in chosen, side), names, -1, batch=64)
    checked = list(tqdm(jobs, total=len(names), desc="Verifying", unit="image", disable=None))
    results = zip(names, checked, strict=True)
    faults += [Rejection(name, image.fault, image.remedy) for name, image in results if image.fault]
    notes = [*entries.notes]
    if reference:
        known = {fault.file for fault in faults}
        others, compared = subset.compare(images, raw / sources.LARGER)
        faults += [fault for fault in others if fault.file not in known]
        notes.append(compared)
    greys = pixels.greys(images.values())
    faults += greys.darker
    notes += [*greys.notes, *splits.no_model(present.table)]
    size, sides = sum(image.size for image in checked), Counter(image.shape for image in checked if image.shape)
    decoded = len(images if reference else chosen)
    part = " (a part of the dataset: no fault)" if absent and not dataset else ""
    shapes = [f"{count:,} of {width} × {height} px" for (width, height), count in sides.most_common(3)] or ["no size"]
    more = f" and {len(sides) - 3} other sizes" if len(sides) > 3 else ""
    unlisted = sum(line.value == nih_tables.UNLISTED for line in present.rejected)
    read = [
        f"{raw}: {len(images):,} images, {files.gigabytes(size)}: {', '.join(shapes)}{more}",
        f"{entries.source.name}: {len(entries.table):,} images listed, {len(absent):,} of them not here{part}; "
        f"{unlisted:,} images here without a row",
        *own_tables.summary(present.rejected),
        f"decoded: {decoded:,}" + ("" if decoded == len(images) else "; all with --verify full"),
    ]
    return Report(len(images), size, dict(sides), absent, decoded, tuple(sorted(set(faults))), (*read, *notes))


def _absences(dataset: Published, entries: nih_tables.Entries, absent: Sequence[str]) -> list[Rejection]:
    """The images that a published dataset has and this copy lacks."""
    positions = {image: number for number, image in enumerate(entries.table["image"])}  # sorted by image
    complete = len(positions) == dataset.images
    faults = []
    for image in absent:
        folder = kaggle.folder_on_kaggle(positions[image]) if complete and dataset.name == "nih" else ""
        remedy = f"fetch {folder}/{image} of Kaggle's {dataset.handle}" if folder else f"fetch {dataset.handle} again"
        faults.append(Rejection(image, "is not there", remedy))
    if not complete:
        remedy = f"{dataset.name} has {dataset.images:,}: fetch the table again"
        faults.append(Rejection(entries.source.name, f"{len(positions):,} images listed", remedy))
    return faults


def _list_faults(
    raw: Path, entries: nih_tables.Entries, present: nih_tables.Present, dataset: Published | None
) -> list[Rejection]:
    """What is wrong with the official lists and the boxes."""
    listed = set(entries.table["image"])
    try:
        lists = nih_tables.read_lists(raw, entries)
        splits.check_lists(present.table, lists)
        nih_tables.read_boxes(raw)
    except StudyError as error:
        name, _, value = str(error).removeprefix(f"{raw}{os.sep}").partition(": ")
        value, _, remedy = value.rpartition("; ")
        return [Rejection(name, value, remedy)]
    value = ""
    if dataset and lists:
        nowhere = (lists[0] | lists[1]) - listed
        unknown = listed - lists[0] - lists[1]
        if nowhere or unknown:
            value = f"{len(nowhere):,} names without a row, {len(unknown):,} rows in no list"
        remedy = "fetch the lists that belong to the table"
    elif dataset and dataset.name == "nih":
        value, remedy = "is not there", "or test is split by patient and not comparable: fetch it"
    return [Rejection(name, value, remedy) for name in nih_tables.LIST_NAMES] if value else []


@dataclass(frozen=True)
class CheckedImage:
    """One image file: its bytes, (width, height) in pixels, and what is wrong with it; texts are empty if nothing."""

    size: int
    shape: tuple[int, int] | None = None
    fault: str = ""
    remedy: str = ""


def check_image(path: Path, whole: bool, side: int | None = None) -> CheckedImage:
    """Check one image file.

    Args:
        path: the file.
        whole: read all of it, check each PNG chunk and decode the pixels; else its beginning and end.
        side: width and height that it has to have, in pixels; any where None.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            file.seek(max(0, size - len(_END)))
            end = file.read()
    except OSError as error:
        return CheckedImage(0, None, f"cannot be read ({error.strerror})", "check the disk, or download it again")
    if not size:
        return CheckedImage(0, None, "0 bytes", _AGAIN)
    if not head.startswith(SIGNATURES):
        return CheckedImage(size, None, f"begins with {head!r}, no PNG, JPEG or TIFF", _AGAIN)
    is_png = head == PNG
    shape = None
    try:
        with Image.open(path) as image:
            shape = image.size
            if is_png and end != _END:
                return CheckedImage(size, shape, f"{size:,} bytes, does not end as a PNG does", _AGAIN)
            if side and shape != (side, side):
                return CheckedImage(size, shape, f"{shape[0]} × {shape[1]} px, not {side} × {side}", _AGAIN)
            if whole:
                image.verify()  # the checksum of each chunk of a PNG, which decoding does not compare
        if whole:
            decode(path)
    except Image.DecompressionBombError:
        return CheckedImage(size, None, f"more than {MOST_PIXELS:,} pixels", "save it smaller")
    except StudyError as error:
        value, _, remedy = str(error).removeprefix(printable(f"{path}: ")).rpartition("; ")
        return CheckedImage(size, shape, value, remedy)
    except Exception as error:  # on broken data Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        reason = "its header" if isinstance(error, Image.UnidentifiedImageError) else error
        fault = "broken PNG header" if is_png and shape is None else f"broken ({reason})"
        return CheckedImage(size, shape, f"{size:,} bytes, {fault}", _AGAIN)
    return CheckedImage(size, shape)

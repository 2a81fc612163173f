"""Integrity: which files of a raw folder are missing, broken or at odds with its tables.

Everything is read and nothing changed. Each fault names its file and the remedy.
"""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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


class Report(NamedTuple):
    """What `verify` found."""

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
        reference: it is nih_9k: every file's pixels are compared with the committed list.
        labels: a label map for own labels.

    Raises:
        StudyError: there is no table or no image, or the table can't be used.
    """
    entries = nih_tables.read_entries(raw, labels, strict=False)
    images = sources.find_images(raw)
    present = nih_tables.match_images(entries, images)
    absent = [image for image in entries.table["image"] if image not in present.paths]  # sorted by image
    faults = [*_list_faults(raw, entries, present, dataset), *sources.unusable_files(raw)]
    faults += [entries.fault] if entries.fault else []
    faults += _absences(dataset, entries, absent) if dataset else []
    names = list(images)
    chosen = set(names if full or len(names) <= SAMPLE else random.Random(0).sample(names, SAMPLE))
    side = nih_tables.NIH_SIDE if dataset else None
    jobs = files.in_threads(lambda name: _check_image(images[name], name in chosen, side), names, -1, batch=64)
    bar = tqdm(jobs, total=len(names), desc="Verifying", unit="image", disable=None)
    sizes, shapes, wrong = zip(*bar, strict=True)
    faults += [fault for fault in wrong if fault]
    notes = [*entries.notes]
    if reference:
        known = {fault.file for fault in faults}
        others, compared = subset.compare(images, raw / sources.LARGER)
        faults += [fault for fault in others if fault.file not in known]
        notes.append(compared)
    greys = pixels.greys(images.values())
    faults += greys.darker
    notes += [*greys.notes, *splits.no_model(present.table)]
    sides = Counter(filter(None, shapes))
    decoded = len(images if reference else chosen)
    part = " (a part of the dataset: no fault)" if absent and not dataset else ""
    common = [f"{count:,} of {width} × {height} px" for (width, height), count in sides.most_common(3)] or ["no size"]
    more = f" and {len(sides) - 3} other sizes" if len(sides) > 3 else ""
    unlisted = sum(line.value == nih_tables.UNLISTED for line in present.rejected)
    read = [
        f"{raw}: {len(images):,} images, {files.gigabytes(sum(sizes))}: {', '.join(common)}{more}",
        f"{entries.source.name}: {len(entries.table):,} images listed, {len(absent):,} of them not here{part}; "
        f"{unlisted:,} images here without a row",
        *own_tables.summary(present.rejected),
        f"decoded: {decoded:,}" + ("" if decoded == len(images) else "; all with --verify full"),
    ]
    return Report(tuple(sorted(set(faults))), (*read, *notes))


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


def _check_image(path: Path, whole: bool, side: int | None) -> tuple[int, tuple[int, int] | None, Rejection | None]:
    """Check an image file: its bytes, its (width, height) in pixels, and what is wrong with it.

    Its beginning and end are read, or, where `whole`, all of it: each PNG chunk is checked and the pixels are decoded.
    Width and height have to be `side`, if there is one.
    """
    size, shape = 0, None

    def wrong(value: object, remedy: str = "download it again") -> tuple:
        return size, shape, Rejection(path.name, str(value), remedy)

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            file.seek(max(0, size - len(_END)))
            end = file.read()
    except OSError as error:
        return wrong(f"cannot be read ({error.strerror})", "check the disk, or download it again")
    if not size:
        return wrong("0 bytes")
    if not head.startswith(SIGNATURES):
        return wrong(f"begins with {head!r}, no PNG, JPEG or TIFF")
    try:
        with Image.open(path) as image:
            shape = image.size
            if head == PNG and end != _END:
                return wrong(f"{size:,} bytes, does not end as a PNG does")
            if side and shape != (side, side):
                return wrong(f"{shape[0]} × {shape[1]} px, not {side} × {side}")
            if whole:
                image.verify()  # the checksum of each chunk of a PNG, which decoding does not compare
        if whole:
            decode(path)
    except Image.DecompressionBombError:
        return wrong(f"more than {MOST_PIXELS:,} pixels", "save it smaller")
    except StudyError as error:
        value, _, remedy = str(error).removeprefix(printable(f"{path}: ")).rpartition("; ")
        return wrong(value, remedy)
    except Exception as error:  # on broken data Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        reason = "its header" if isinstance(error, Image.UnidentifiedImageError) else error
        fault = "broken PNG header" if head == PNG and shape is None else f"broken ({reason})"
        return wrong(f"{size:,} bytes, {fault}")
    return size, shape, None

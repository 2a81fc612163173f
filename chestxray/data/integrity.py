"""What lies in a folder of raw data, and what of it is missing or broken.

It owns the check of a dataset against its own tables, and the tables that show what it has. It reads all and changes
nothing; fetching again what is broken is for `published`.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from chestxray.config import NIH_FINDINGS, NO_FINDING_NIH, SPLITS, Paths, StudyError
from chestxray.data import downloads, kaggle, nih_tables, sources
from chestxray.data.kaggle import Published
from chestxray.data.nih_tables import Rejection
from chestxray.files import in_threads
from chestxray.images.pixels import decode

SAMPLE = 200
"""Images that are decoded unless all are."""

SHOWN = 20
"""Faults that are printed, at most."""

_PNG = b"\x89PNG\r\n\x1a\n"
_END = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
_BATCH = 64


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        raw: the folder.
        table: the image table's name.
        images: image files.
        size: their bytes.
        sides: pixel size of the images, (width, height) → how many.
        listed: image names of the table.
        absent: those of them that have no file here; a fault only in a dataset that is to be whole.
        unlisted: image files without a row.
        unusable: rows and values of the table that stage 2.1 leaves out, as the NIH's own table has some.
        decoded: images decoded.
        faults: what is wrong; `file` is a name.
    """

    raw: Path
    table: str
    images: int
    size: int
    sides: dict[tuple[int, int], int]
    listed: tuple[str, ...]
    absent: tuple[str, ...]
    unlisted: int
    unusable: int
    decoded: int
    faults: tuple[Rejection, ...]


def verify(raw: Path, dataset: Published | None = None, full: bool = False, seed: int = 0) -> Report:
    """Check a folder of raw data: its tables, every image's signature and size, and the pixels of some.

    Every file is opened and its beginning and end are read: PNG or JPEG signature, width and height, end mark. A random
    sample is read whole, with the checksum of every PNG chunk, and decoded.

    Args:
        raw: a folder in the NIH layout.
        dataset: what it has to be; without, an image of the table that is not here is no fault.
        full: read and decode all images instead of a sample.
        seed: of the sample.

    Raises:
        StudyError: there is no table or no image, or the table can't be used.
    """
    entries = nih_tables.read_entries(raw)
    images = sources.find_images(raw)
    present = nih_tables.match_images(entries, images)
    listed = tuple(entries.table["image"])
    absent = tuple(sorted(set(listed) - set(present.paths)))
    faults = _list_faults(raw, set(listed), dataset)
    unlisted = sum(line.value == "without a row" for line in present.rejected)
    unusable = len(present.rejected) - unlisted
    if dataset:
        remedy = f"fetch it: chestxray fetch {dataset.name} --mend"
        faults += [Rejection(name, "is not there", remedy) for name in absent]
        if len(listed) != dataset.images:
            remedy = f"{dataset.name} has {dataset.images:,}: fetch the table again"
            faults.append(Rejection(entries.source.name, f"{len(listed):,} images listed", remedy))
    rng = np.random.default_rng(seed)
    names = list(images)
    chosen = set(names if full or len(names) <= SAMPLE else rng.choice(names, SAMPLE, replace=False))
    side = kaggle.SIDE if dataset else None
    jobs = [(images[name], name in chosen, side) for name in names]
    seen = _look_at(jobs)
    faults += [
        Rejection(path.name, look.fault, look.remedy)
        for (path, _, _), look in zip(jobs, seen, strict=True)
        if look.fault
    ]
    sides: dict[tuple[int, int], int] = {}
    for look in seen:
        if look.shape:
            sides[look.shape] = sides.get(look.shape, 0) + 1
    size = sum(look.size for look in seen)
    table = entries.source.name
    return Report(
        raw,
        table,
        len(images),
        size,
        sides,
        listed,
        absent,
        unlisted,
        unusable,
        len(chosen),
        tuple(sorted(set(faults))),
    )


def _list_faults(raw: Path, listed: set[str], dataset: Published | None) -> list[Rejection]:
    """What is wrong with the official lists and the boxes."""
    try:
        lists = nih_tables.read_lists(raw)
        nih_tables.read_boxes(raw)
    except StudyError as error:
        name, _, value = str(error).removeprefix(f"{raw}{os.sep}").partition(": ")
        value, _, remedy = value.rpartition("; ")
        return [Rejection(name, value, remedy)]
    if dataset and lists:
        nowhere = (lists[0] | lists[1]) - listed
        unknown = listed - lists[0] - lists[1]
        if nowhere or unknown:
            value = f"{len(nowhere):,} names without a row, {len(unknown):,} rows in no list"
            return [
                Rejection(name, value, "fetch the lists that belong to the table") for name in nih_tables.LIST_NAMES
            ]
    elif dataset and dataset.name == "nih":
        remedy = "or test is split by patient and not comparable: fetch it"
        return [Rejection(name, "is not there", remedy) for name in nih_tables.LIST_NAMES]
    return []


def to_mend(raw: Path, dataset: Published, full: bool = False) -> tuple[set[str], tuple[str, ...]]:
    """Names of the files to fetch again, and all image names of the table.

    Without a readable table nothing else can be told, so then it is the table alone.

    Raises:
        StudyError: nothing has been fetched yet.
    """
    if not raw.exists():
        raise StudyError(f"{raw}: nothing to mend there; run: chestxray fetch {dataset.name}")
    try:
        report = verify(raw, dataset, full)
    except StudyError:
        names = [name for name in dataset.tables if (raw / name).is_file()]
        try:
            nih_tables.read_entries(raw)
        except StudyError:
            return {(names or dataset.tables)[0]}, ()
        raise
    return {fault.file for fault in report.faults}, report.listed


def describe(report: Report, dataset: Published | None = None) -> list[str]:
    """A report as lines to read, faults last."""
    sides = sorted(report.sides.items(), key=lambda item: -item[1])
    shapes = ", ".join(f"{count:,} of {width} × {height} px" for (width, height), count in sides[:3])
    more = f" and {len(sides) - 3} other sizes" if len(sides) > 3 else ""
    part = "" if dataset or not report.absent else " (a part of the dataset: no fault)"
    lines = [
        f"{report.raw}: {report.images:,} images, {downloads.gigabytes(report.size)}: {shapes or 'no size'}{more}",
        f"{report.table}: {len(report.listed):,} images listed, {len(report.absent):,} of them not here{part}; "
        f"{report.unlisted:,} images here without a row",
        f"decoded: {report.decoded:,}" + ("" if report.decoded == report.images else "; all with --verify full"),
    ]
    if report.unusable:
        lines.insert(2, f"{report.unusable:,} rows or values of the table that stage 2.1 leaves out")
    if not report.faults:
        return [*lines, "Nothing is wrong."]
    lines.append(f"{len(report.faults):,} wrong:")
    lines += [f"  {fault.file}: {fault.value}; {fault.remedy}" for fault in report.faults[:SHOWN]]
    if len(report.faults) > SHOWN:
        lines.append(f"  … and {len(report.faults) - SHOWN:,} more; --report FILE lists all")
    return lines


@dataclass(frozen=True)
class _Look:
    """What one file is: bytes, (width, height), and what is wrong with it."""

    size: int
    shape: tuple[int, int] | None = None
    fault: str = ""
    remedy: str = ""


_AGAIN = "download it again"


def _look_at(jobs: Sequence[tuple[Path, bool, int | None]]) -> list[_Look]:
    batches = [jobs[start : start + _BATCH] for start in range(0, len(jobs), _BATCH)]
    looks: list[_Look] = []
    with tqdm(total=len(jobs), desc="Verifying", unit="image", disable=None) as bar:
        for found in in_threads(lambda batch: [look(*job) for job in batch], batches, -1):
            looks += found
            bar.update(len(found))
    return looks


def look(path: Path, whole: bool, side: int | None = None) -> _Look:
    """Check one image file.

    Args:
        path: the file.
        whole: read all of it, check each PNG chunk and decode the pixels; else its beginning and end.
        side: width and height that it has to have, in pixels.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(33)
            file.seek(max(0, size - len(_END)))
            end = file.read()
            if whole:
                file.seek(0)
                data = file.read()
    except OSError as error:
        return _Look(0, None, f"cannot be read ({error.strerror})", "check the disk, or download it again")
    if not size:
        return _Look(0, None, "0 bytes", _AGAIN)
    shape = None
    if head.startswith(_PNG):
        if len(head) < 33 or head[12:16] != b"IHDR" or zlib.crc32(head[12:29]) != int.from_bytes(head[29:33], "big"):
            return _Look(size, None, f"{size:,} bytes, broken PNG header", _AGAIN)
        shape = struct.unpack(">II", head[16:24])
        if end != _END:
            return _Look(size, shape, f"{size:,} bytes, does not end as a PNG does", _AGAIN)
        if side and shape != (side, side):
            return _Look(size, shape, f"{shape[0]} × {shape[1]} px, not {side} × {side}", _AGAIN)
        if whole and (chunk := _broken_chunk(data)):
            return _Look(size, shape, f"{size:,} bytes, {chunk}", _AGAIN)
    elif not head.startswith(b"\xff\xd8\xff"):
        return _Look(size, None, f"begins with {head[:8]!r}, no PNG or JPEG", _AGAIN)
    if whole:
        try:
            pixels = decode(path)
        except StudyError as error:
            value, _, remedy = str(error).removeprefix(f"{path}: ").rpartition("; ")
            return _Look(size, shape, value, remedy)
        shape = shape or pixels.shape[::-1]
    return _Look(size, shape)


def _broken_chunk(data: bytes) -> str:
    """The first chunk of a PNG whose checksum is wrong, in words; Pillow does not look at those of the pixels."""
    place = len(_PNG)
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        body = data[place + 4 : place + 8 + length]
        if zlib.crc32(body) != int.from_bytes(data[place + 8 + length : place + 12 + length], "big"):
            return f"wrong checksum at byte {place:,}"
        place += 12 + length
    return "" if place == len(data) else "bytes after its end"


def contents(raw: Path, paths: Paths | None = None) -> list[tuple[str, pd.DataFrame]]:
    """Tables of what a dataset has.

    Args:
        raw: a folder in the NIH layout.
        paths: of the dataset, where it has been prepared or is about to be.

    Returns:
        Titles and tables: the whole, findings, views and sexes, splits, bytes on disk.

    Raises:
        StudyError: there is no table or no image, or the table can't be used.
    """
    entries = nih_tables.read_entries(raw)
    images = sources.find_images(raw)
    present = nih_tables.match_images(entries, images)
    here, listed = present.table, entries.table
    return [
        ("", _whole(entries, present, images)),
        ("Findings", _findings(here, listed)),
        ("View and sex", _cells(here)),
        ("Splits", _splits(raw, here, paths)),
        ("On disk", _sizes(raw, images, paths)),
    ]


def _whole(entries: nih_tables.Entries, present: nih_tables.Present, images: dict[str, Path]) -> pd.DataFrame:
    here = present.table
    follow_ups = here.groupby("patient").size()
    ages = here["age"].dropna()
    rows = {
        "table": entries.source.name,
        "images": f"{len(images):,}",
        "of them with a row": f"{len(here):,}",
        "rows without an image here": f"{present.absent:,}",
        "patients": f"{here['patient'].nunique():,}",
        "images of a patient": f"{follow_ups.min()} to {follow_ups.max()}, {follow_ups.mean():.1f} in the mean",
        "ages": f"{ages.min()} to {ages.max()}, median {ages.median():.0f}" if len(ages) else "none",
    }
    return pd.DataFrame({"what": rows.keys(), "value": rows.values()})


def _findings(here: pd.DataFrame, listed: pd.DataFrame) -> pd.DataFrame:
    """Images and patients that have each finding, and images that have it alone."""
    rows = []
    sets = here["findings"].str.split("|")
    all_sets = listed["findings"].str.split("|").explode().value_counts()
    each = here.assign(finding=sets).explode("finding")
    for finding in [NO_FINDING_NIH, *NIH_FINDINGS]:
        having = each[each["finding"].eq(finding)]
        alone = int(here["findings"].eq(finding).sum())
        counts = (len(having), alone, having["patient"].nunique(), int(all_sets.get(finding, 0)))
        rows.append((finding, *(f"{count:,}" for count in counts)))
    return pd.DataFrame(rows, columns=["finding", "images", "it alone", "patients", "in the table"])


def _cells(here: pd.DataFrame) -> pd.DataFrame:
    named = here.replace({"view": {"": "unknown"}, "sex": {"": "unknown"}})
    rows = [
        (view, sex, f"{len(group):,}", f"{group['patient'].nunique():,}")
        for (view, sex), group in named.groupby(["view", "sex"])
    ]
    return pd.DataFrame(rows, columns=["view", "sex", "images", "patients"])


def _splits(raw: Path, here: pd.DataFrame, paths: Paths | None) -> pd.DataFrame:
    """The official lists, and the study's splits where it has been prepared."""
    rows = []

    def add(name: str, part: pd.DataFrame) -> None:
        rows.append((name, f"{len(part):,}", f"{part['patient'].nunique():,}", f"{part['label'].ne('').sum():,}"))

    lists = nih_tables.read_lists(raw)
    if lists:
        for name, names in zip(nih_tables.LIST_NAMES, lists, strict=True):
            add(name, here[here["image"].isin(names)])
        rest = here[~here["image"].isin(lists[0] | lists[1])]
        if len(rest):
            add("in neither list", rest)
    if paths and paths.manifest.exists():
        text = dict.fromkeys(("image", "patient", "label", "split"), "str")
        manifest = pd.read_csv(paths.manifest, dtype=text, keep_default_na=False)
        for split in SPLITS:
            add(f"prepared: {split}", manifest[manifest["split"].eq(split)])
    if not rows:
        rows = [("no official lists; stage 2.1 splits by patient", "", "", "")]
    return pd.DataFrame(rows, columns=["split", "images", "patients", "one of seven classes"])


def _sizes(raw: Path, images: dict[str, Path], paths: Paths | None) -> pd.DataFrame:
    """Bytes; a file that several folders link to counts once, where it comes first."""
    tables = [path for path in raw.iterdir() if path.is_file()]
    groups: list[tuple[str, Iterable[Path]]] = [("raw images", images.values()), ("raw tables", tables)]
    if paths and paths.data.is_dir():
        others = sorted(path for path in paths.data.iterdir() if path != paths.raw)
        for path in others:
            groups.append((path.name, path.rglob("*") if path.is_dir() else [path]))
    rows = []
    counted: set[tuple[int, int]] = set()
    for name, members in groups:
        number = size = 0
        for path in members:
            status = path.stat()
            if path.is_dir() or (status.st_dev, status.st_ino) in counted:
                continue
            counted.add((status.st_dev, status.st_ino))
            number, size = number + 1, size + status.st_size
        if number:
            rows.append((name, f"{number:,}", f"{size / 1e6:,.1f} MB"))
    return pd.DataFrame(rows, columns=["what", "files", "size"])

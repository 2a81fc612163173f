"""Archives: a prepared dataset in one tar file, to carry to another machine.

`pack` and `unpack` own its layout: an uncompressed tar (PNGs don't shrink) that begins with an index of all files with
their SHA-256. It holds what stages 2.2 to 5 read: each prepared radiograph once, the augmented files, the tables, and
of the raw data the tables alone. `unpack` writes nothing before the whole archive is found to be what its index lists,
and the index to list nothing but files of a prepared dataset.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from chestxray import files
from chestxray.config import CLASSES, SOURCES, Paths, StudyError, taken
from chestxray.data import manifest as data_manifest
from chestxray.data import nih_tables, own_tables, preparation, sources
from chestxray.images import pixels

INDEX = "chestxray.json"
"""The first file in an archive: what it is, its own SHA-256, and name and SHA-256 of each further file."""
FORMAT = 2
TABLES = ("labels.csv", "rejected.csv", "near_duplicates.csv", "train_augmented.csv", "manifest.csv")
"""Files beside the images, where there are any; the manifest comes last: where it is, the rest is complete."""

_NAMES = re.compile(
    rf"(images|train_augmented/({'|'.join(CLASSES)}))/(?![.])[^/\\:]{{1,250}}\.png"
    rf"|raw/(?![.])[^/\\:]{{1,250}}\.(csv|txt)|{'|'.join(map(re.escape, TABLES))}"
)
"""Every name that a file of a prepared dataset may have; none leads out of the dataset's folder."""
_BROKEN = (tarfile.TarError, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError)
"""What the standard library raises on a damaged archive or index."""


class Summary(NamedTuple):
    """What a prepared dataset holds."""

    image_size: int  # side of the prepared radiographs in pixels
    images: int
    augmented: int  # files of the augmented train set
    fingerprint: str  # as `manifest.fingerprint` gives


class _Index(NamedTuple):
    """What an archive holds: the dataset's name, side of its raw radiographs in pixels, and name → SHA-256 of files."""

    dataset: str
    raw_side: int
    files: dict[str, str]

    def encode(self) -> bytes:
        """The bytes of `INDEX`, which carry the SHA-256 of the rest."""
        fields = {"format": FORMAT} | self._asdict()
        return _json(fields | {"sha256": hashlib.sha256(_json(fields)).hexdigest()})

    def fault(self) -> str:
        """Why no prepared dataset has this index; empty where one can."""
        plain = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", self.dataset)
        if not plain or not isinstance(self.raw_side, int) or self.raw_side <= 0:
            return f"its index names dataset {self.dataset!r} with raw images of {self.raw_side!r} px"
        if self.dataset not in SOURCES and (reason := taken(self.dataset)):
            return f"its dataset's name {self.dataset} {reason}"
        for name in self.files:
            if not _NAMES.fullmatch(name) or not name.isprintable():
                return f"its index lists {name[:80]!r}, which no prepared dataset has"
        return "" if list(self.files)[-1:] == [TABLES[-1]] else "its index does not end with manifest.csv"


def summary(paths: Paths) -> Summary:
    """Say what a prepared dataset holds; raises as `read_manifest`."""
    images = data_manifest.read_manifest(paths)["image"]
    side = pixels.decode(data_manifest.store_path(paths.store, images.iloc[0])).shape[0]
    augmented = len(pd.read_csv(paths.augmented_rows, usecols=["file"])) if paths.augmented_rows.exists() else 0
    return Summary(side, len(images), augmented, data_manifest.fingerprint(paths))


def pack(paths: Paths, target: Path | None = None) -> Path:
    """Write a prepared dataset to one archive, the same bytes for the same dataset, and return its path.

    Args:
        paths: where the dataset lies; stage 2.1 has run, 2.2 may have.
        target: the archive; `1_Datasets/<dataset>.tar` where None. It appears when it is complete.

    Raises:
        StudyError: a file is missing or is not the one that the manifest lists, the archive would lie in the dataset,
            or there is no space.
    """
    target = target or paths.data.with_name(f"{paths.dataset}.tar")
    if target.is_dir():
        raise StudyError(f"{target}: is a folder; give the name of a file")
    files.keep_apart(target, [paths.data, paths.raw])
    places = _places(paths)
    index = _index(paths, places)
    needed = sum(2 * tarfile.BLOCKSIZE + path.stat().st_size for path in places.values())
    files.require_space(target.parent, needed + len(index.encode()), "write it to another disk by --out")
    files.remove_leftovers(target)
    with files.atomic_file(target) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        _add(archive, INDEX, index.encode())
        for name, path in tqdm(places.items(), desc=f"Packing {target.name}", unit="file", disable=None):
            data = _read(path)
            if hashlib.sha256(data).hexdigest() != index.files[name]:
                raise StudyError(f"{path}: changed while it was packed; pack again when no stage runs")
            _add(archive, name, data)
    return target


def unpack(path: Path, root: Path | None = None) -> tuple[Paths, int]:
    """Unpack an archive into `1_Datasets/<dataset>`, which appears when it is complete.

    An interrupted unpacking resumes: files that are there and right stay, and are counted. Unpacking the same archive
    once more replaces what has changed.

    Args:
        path: an archive of `pack`.
        root: the folder that holds `1_Datasets`; as `Paths` has it where None.

    Raises:
        StudyError: it is no archive of `pack`, or damaged; another dataset of this name is there; or there is no space.
    """
    index = _read_index(path)
    for _ in _contents(path, index, "Checking"):
        pass
    identity = hashlib.sha256(index.encode()).hexdigest()
    paths = Paths(index.dataset) if root is None else Paths(index.dataset, root.resolve())
    again = paths.data.exists()
    if again and ((sources.unpacked(paths) or {}).get("archive") != identity or paths.raw.is_symlink()):
        raise StudyError(f"{paths.data}: is there already, and not from this archive; remove it or rename it")
    here = paths if again else Paths(f".{paths.dataset}{files.TEMPORARY}unpack", paths.root)
    there = {name: here.data / name for name in index.files if (here.data / name).is_file()}
    present = {name for name, file in there.items() if files.digest(file) == index.files[name]}
    needed = path.stat().st_size - sum(there[name].stat().st_size for name in present)
    if len(present) < len(index.files):
        files.require_space(paths.data, needed, "set CHESTXRAY_ROOT or --root to another disk")
    for name in index.files.keys() & set(TABLES) - present:  # written anew below, after the rest
        files.remove(here.data / name)
    if not again:  # in a dataset in use, what lies beside the archive's own folders stays
        files.keep_only(here.data, {name.partition("/")[0] for name in index.files})
    for parent in {name.rpartition("/")[0] for name in index.files} - {""}:
        files.keep_only(here.data / parent, {Path(name).name for name in index.files if name.startswith(f"{parent}/")})
    for name, data in _contents(path, index, "Unpacking"):
        if name not in present:
            files.atomic_write(here.data / name, data)
    preparation.link_trees(here, data_manifest.read_manifest(here))
    record = {"archive": identity, "manifest": index.files[TABLES[-1]], "raw_side": index.raw_side}
    files.atomic_write(here.data / sources.UNPACKED, _json(record | {"image_size": summary(here).image_size}))
    if not again:
        with files.explained(paths.data):
            here.data.replace(paths.data)
    return paths, len(present)


def _json(value: Any) -> bytes:
    return (json.dumps(value, separators=(",", ":")) + "\n").encode()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file with nothing in its header that differs between machines: a new `TarInfo` has no owner and no time."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _places(paths: Paths) -> dict[str, Path]:
    """Name in the archive → file on disk, in the archive's order."""
    manifest = data_manifest.read_manifest(paths)
    stored = [data_manifest.store_path(paths.store, image) for image in manifest["image"]]
    places = {f"images/{path.name}": path for path in sorted(stored)}
    if paths.augmented_rows.exists():
        for file in sorted(pd.read_csv(paths.augmented_rows, usecols=["file"])["file"]):
            places[f"train_augmented/{file}"] = paths.tree("train_augmented") / file
    lists = (*nih_tables.LIST_NAMES, nih_tables.VALID_NAME)
    tables = [nih_tables.find_table(paths.raw).name, nih_tables.BOXES_NAME, *lists]
    there = {f"raw/{name}": own_tables.in_any_case(paths.raw, name) for name in sorted(tables)}
    places |= {name: path for name, path in there.items() if path.is_file()}
    return places | {name: paths.data / name for name in TABLES if (paths.data / name).is_file()}


def _index(paths: Paths, places: dict[str, Path]) -> _Index:
    """Read all files once, hold the images to the manifest, and list them."""
    bar = tqdm(places.items(), desc="Reading the dataset", unit="file", disable=None)
    listed = {name: hashlib.sha256(_read(path)).hexdigest() for name, path in bar}
    for image, sha256 in data_manifest.read_manifest(paths)[["image", "sha256"]].itertuples(index=False):
        path = data_manifest.store_path(paths.store, image)
        if listed[f"images/{path.name}"] != sha256:
            raise StudyError(f"{path}: is not the image that manifest.csv lists; run stage 2.1 again")
    index = _Index(paths.dataset, data_manifest.raw_side(paths), listed)
    if fault := index.fault():
        raise StudyError(f"{paths.data}: {fault}; rename the file in the raw data, and run stage 2.1 again")
    return index


def _read(path: Path) -> bytes:
    """The bytes of a file of the dataset, or a StudyError that names the stage to run again."""
    try:
        return path.read_bytes()
    except OSError as error:
        stage = "2.2" if "train_augmented" in path.parts else "2.1"
        raise StudyError(f"{path}: cannot be read ({error.strerror}); run stage {stage} again") from error


def _refused(path: Path, reason: str) -> StudyError:
    return StudyError(f"{path}: {reason}; nothing was unpacked: copy it here again, or pack the dataset again")


def _read_index(path: Path) -> _Index:
    """The index of an archive, found to be whole and that of a prepared dataset; else a StudyError."""
    try:
        with tarfile.open(path, "r:") as archive:
            first = archive.next()
            if first is None or first.name != INDEX:
                raise _refused(path, "no archive of a prepared dataset, which chestxray pack writes")
            data = archive.extractfile(first).read()
        fields = json.loads(data)
        if fields["format"] != FORMAT:
            raise _refused(path, f"an archive of format {fields['format']!r}, not {FORMAT}")
        index = _Index(fields["dataset"], fields["raw_side"], dict(fields["files"]))
        fault = index.fault() or ("" if index.encode() == data else "its index has not the SHA-256 that it lists")
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except _BROKEN as error:
        raise _refused(path, f"its index cannot be used ({type(error).__name__}: {error})") from error
    if fault:
        raise _refused(path, fault)
    return index


def _contents(path: Path, index: _Index, doing: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file of an archive, found to be as listed; `doing` is the word for the progress bar."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            archive.next()  # the index
            for name, sha256 in tqdm(index.files.items(), f"{doing} {path.name}", unit="file", disable=None):
                member = archive.next()
                archive.members.clear()  # or it keeps one for each of 100,000 images
                if member is None or not member.isreg() or member.sparse is not None or member.name != name:
                    raise _refused(path, f"has not the file {name!r} where its index lists it")
                data = archive.extractfile(member).read()
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise _refused(path, f"{name!r} has not the SHA-256 that its index lists")
                yield name, data
            more = archive.next() is not None
            file.seek(archive.offset)
            if more or file.read().strip(b"\0") or file.tell() % tarfile.RECORDSIZE:
                raise _refused(path, "does not end after the files that its index lists")
    except _BROKEN as error:
        raise _refused(path, f"broken off or damaged ({error or type(error).__name__})") from error

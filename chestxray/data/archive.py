"""A prepared dataset as one file, to carry to another machine: packed, and unpacked with every byte checked.

It owns the archive's layout: an uncompressed tar (PNGs don't shrink) that begins with an index of all files with their
SHA-256 and ends with the SHA-256 of all bytes before. It holds what stages 2.2 to 5 read: each prepared radiograph
once, the augmented files, the tables, and of the raw data the tables alone. It must not know how any of it was made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from chestxray import files
from chestxray.config import CLASSES, Paths, StudyError
from chestxray.data import archives, nih_tables, preparation, sources
from chestxray.data import manifest as data_manifest
from chestxray.images import pixels

INDEX = "chestxray.json"
"""The first file in an archive: what it is, and name, size and SHA-256 of each further file."""

SEAL = "SHA256"
"""The last file: SHA-256 of all bytes before it."""

FORMAT = 1
TABLES = ("rejected.csv", "near_duplicates.csv", "train_augmented.csv", "manifest.csv")
"""Files beside the images, where there are any; the manifest comes last, as everywhere: with it, all is there."""

MOST_FILES = 800_000
"""Files of an archive, at most: all images of ChestX-ray14, and seven classes as large as No_finding augmented."""

_BLOCK = 512
_CLUSTER = 4096
"""Bytes that a file system gives out at a time."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_PLACES = {"images": ".png", "raw": (".csv", ".txt"), **{f"train_augmented/{label}": ".png" for label in CLASSES}}


class Entry(NamedTuple):
    """A file in an archive."""

    name: str
    size: int
    sha256: str


class Index(NamedTuple):
    """What an archive holds.

    Attributes:
        dataset: its name.
        image_size: side of the prepared radiographs in pixels.
        raw_side: side of the raw radiographs in pixels, which lesion boxes may be measured in.
        images: how many prepared radiographs.
        fingerprint: of the data, as `inputs.fingerprint` gives.
        entries: the files in their order.
    """

    dataset: str
    image_size: int
    raw_side: int
    images: int
    fingerprint: str
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.entries)

    @property
    def augmented(self) -> int:
        """How many augmented files."""
        return sum(entry.name.startswith("train_augmented/") for entry in self.entries)


class Packed(NamedTuple):
    """An archive that was written: the file, its SHA-256, and what it holds."""

    path: Path
    sha256: str
    index: Index


class Unpacked(NamedTuple):
    """A dataset that was unpacked: its folder, how many files were there already, and what the archive holds."""

    folder: Path
    kept: int
    index: Index


def pack(paths: Paths, target: Path | None = None) -> Packed:
    """Write a prepared dataset to one archive, the same bytes for the same dataset.

    The archive appears under its name when it is whole.

    Args:
        paths: where the dataset lies; stage 2.1 has run, 2.2 may have.
        target: the archive; `1_Datasets/<dataset>.tar` where None.

    Raises:
        StageMissing: stage 2.1 has not been run.
        StudyError: a file is missing or is not the one that the manifest tells, or there is no space.
    """
    target = target or paths.data.with_name(f"{paths.dataset}.tar")
    if target.is_dir():
        raise StudyError(f"{target}: is a folder; give the name of a file")
    places = _places(paths)
    index = _index(paths, places)
    head = _member(INDEX, _as_json(index._asdict() | {"format": FORMAT}))
    whole = len(head) + sum(2 * _BLOCK + entry.size for entry in index.entries)
    files.require_space(target.parent, whole, "write it to another disk by --out")
    files.remove_leftovers(target)
    digest = hashlib.sha256(head)
    with files.atomic_file(target) as file, _bar(index, f"Packing {target.name}") as bar:
        file.write(head)
        for entry in index.entries:
            block = _member(entry.name, _read(places[entry.name], entry))
            digest.update(block)
            file.write(block)
            bar.update(entry.size)
        seal = _seal(digest.hexdigest())
        digest.update(seal)
        file.write(seal)
    return Packed(target, digest.hexdigest(), index)


def unpack(path: Path, root: Path | None = None) -> Unpacked:
    """Unpack an archive into `1_Datasets/<dataset>`, which appears when it is complete.

    An unpacking that was killed goes on: files that are there and right are kept. So does unpacking once more where
    the same archive was unpacked before, which mends what has changed.

    Args:
        path: an archive of `pack`.
        root: the folder that holds `1_Datasets`; as `Paths` has it where None.

    Raises:
        StudyError: it is no archive of `pack`, or damaged; another dataset of this name is there; or there is no space.
    """
    seal = _check(path)
    index = _read_index(path)
    paths = Paths(index.dataset) if root is None else Paths(index.dataset, root.resolve())
    mending = paths.data.exists()
    if mending and ((sources.unpacked(paths) or {}).get("archive") != seal or paths.raw.is_symlink()):
        raise StudyError(f"{paths.data}: is there already, and not from this archive; remove it or rename it")
    here = paths if mending else Paths(f".{paths.dataset}{files.TEMPORARY}unpack", paths.root)
    files.require_space(paths.data, _missing(index, here.data), "set CHESTXRAY_ROOT or --root to another disk")
    _remove_strangers(index, here.data, mending)
    try:
        kept = _take(path, index, here.data)
    except (archives.Refused, *archives.BROKEN) as error:
        if not mending:
            files.remove(here.data)
        raise StudyError(f"{path}: {_words(error)}; nothing was unpacked: pack the dataset again") from error
    preparation.link_trees(here, data_manifest.read_manifest(here))
    record = {"archive": seal, "image_size": index.image_size, "raw_side": index.raw_side}
    record["manifest"] = next(entry.sha256 for entry in index.entries if entry.name == "manifest.csv")
    files.atomic_write(here.data / sources.UNPACKED, _as_json(record))
    if not mending:
        with files.explained(paths.data):
            here.data.replace(paths.data)
    return Unpacked(paths.data, kept, index)


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode()


def _bar(index: Index, doing: str) -> tqdm:
    return tqdm(total=index.size, desc=doing, unit="B", unit_scale=True, disable=None)


def _places(paths: Paths) -> dict[str, Path]:
    """Name in the archive → file on disk, in the archive's order."""
    manifest = data_manifest.read_manifest(paths)
    stored = [data_manifest.store_path(paths.store, image) for image in manifest["image"]]
    places = {f"images/{path.name}": path for path in sorted(stored)}
    if paths.augmented_rows.exists():
        tree = paths.tree("train_augmented")
        for file in sorted(pd.read_csv(paths.augmented_rows, usecols=["file"])["file"]):
            places[f"train_augmented/{file}"] = tree / file
    tables = [nih_tables.find_table(paths.raw).name, nih_tables.BOXES_NAME, *nih_tables.LIST_NAMES]
    places |= {f"raw/{name}": paths.raw / name for name in sorted(tables) if (paths.raw / name).is_file()}
    return places | {name: paths.data / name for name in TABLES if (paths.data / name).is_file()}


def _index(paths: Paths, places: dict[str, Path]) -> Index:
    """Read all files once and list them.

    Raises:
        StudyError: one is missing or has a name that not every system allows; or an image is not the one that the
            manifest tells.
    """
    manifest = data_manifest.read_manifest(paths)
    told = dict(zip(manifest["image"].map(lambda image: f"{Path(image).stem}.png"), manifest["sha256"], strict=True))
    entries = []
    for name, path in tqdm(places.items(), desc="Reading the dataset", unit="file", disable=None):
        data = _read(path)
        entries.append(Entry(name, len(data), hashlib.sha256(data).hexdigest()))
        folder, _, file = name.rpartition("/")
        if folder == "images" and entries[-1].sha256 != told[file]:
            raise StudyError(f"{path}: is not the image that manifest.csv tells; run stage 2.1 again")
    side = pixels.decode(places[entries[0].name]).shape[0]
    stamp = data_manifest.fingerprint(paths)
    index = Index(paths.dataset, side, data_manifest.raw_side(paths), len(manifest), stamp, tuple(entries))
    try:
        _judge(index)
    except archives.Refused as error:
        raise StudyError(f"{paths.data}: {error}; rename the file in the raw data, and run stage 2.1 again") from error
    return index


def _read(path: Path, entry: Entry | None = None) -> bytes:
    """The bytes of a file of the dataset.

    Raises:
        StudyError: it cannot be read, or is not as listed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        stage = "2.2" if "train_augmented" in path.parts else "2.1"
        raise StudyError(f"{path}: cannot be read ({error.strerror}); run stage {stage} again") from error
    if entry and (len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256):
        raise StudyError(f"{path}: changed while it was packed; pack again when no stage runs")
    return data


def _member(name: str, data: bytes) -> bytes:
    """A file as it stands in a tar, with nothing in its header that differs between machines."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), 0, 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict") + data + bytes(-len(data) % _BLOCK)


def _seal(sha256: str) -> bytes:
    """The end of an archive: its last file, and the mark that ends a tar."""
    return _member(SEAL, f"{sha256}\n".encode()) + bytes(2 * _BLOCK)


def _check(path: Path) -> str:
    """Make sure that a file is an archive of `pack`, to its last byte.

    Returns:
        The SHA-256 in its seal.

    Raises:
        StudyError: it is not.
    """
    length = len(_seal("0" * 64))
    try:
        with path.open("rb") as file, _reading(path) as bar:
            head = file.read(len(INDEX) + 1)
            if head != f"{INDEX}\0".encode():
                raise StudyError(
                    f"{path}: begins with {head!r}, no archive of a prepared dataset; give one that "
                    "chestxray pack wrote"
                )
            left = path.stat().st_size - length - len(head)
            digest = hashlib.sha256(head)
            while left > 0 and (part := file.read(min(left, 1 << 20))):
                digest.update(part)
                bar.update(len(part))
                left -= len(part)
            end = file.read()
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if end != _seal(digest.hexdigest()):
        size = path.stat().st_size
        raise StudyError(
            f"{path}: {size:,} bytes, broken off or damaged: its end has not the SHA-256 of the rest; "
            "nothing was unpacked: copy it here again"
        )
    return digest.hexdigest()


def _reading(path: Path) -> tqdm:
    size = path.stat().st_size
    return tqdm(total=size, desc=f"Checking {path.name}", unit="B", unit_scale=True, disable=None)


def _read_index(path: Path) -> Index:
    """The index of a sealed archive.

    Raises:
        StudyError: it has none that can be used.
    """
    try:
        with contextlib.closing(archives.members(path, MOST_FILES)) as members:
            said = json.loads(next(members).read())
        if said["format"] != FORMAT:
            raise StudyError(
                f"{path}: an archive of format {said['format']!r}, not {FORMAT}; unpack it with the version of this "
                "repository that packed it"
            )
        entries = tuple(Entry(*entry) for entry in said["entries"])
        index = Index(**{name: said[name] for name in Index._fields} | {"entries": entries})
        _judge(index)
    except archives.Refused as error:
        raise StudyError(f"{path}: {error}; nothing was unpacked: pack the dataset again") from error
    except (*archives.BROKEN, KeyError, TypeError, StopIteration) as error:
        raise StudyError(
            f"{path}: its index cannot be used ({type(error).__name__}: {error}); nothing was unpacked: "
            "pack the dataset again"
        ) from error
    return index


def _judge(index: Index) -> None:
    """Make sure that an index lists what a prepared dataset has, and nothing else.

    Raises:
        Refused: it does not.
        TypeError: a value is of another kind.
    """
    sizes = (index.image_size, index.raw_side, index.images)
    if not _NAME.fullmatch(index.dataset) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise archives.Refused(f"its index names dataset {index.dataset!r} with {sizes}")
    if len({entry.name for entry in index.entries}) != len(index.entries):
        raise archives.Refused("its index lists a file twice")
    for entry in index.entries:
        plausible = isinstance(entry.size, int) and re.fullmatch("[0-9a-f]{64}", entry.sha256)
        if not plausible or not _belongs(entry.name):
            raise archives.Refused(f"its index lists {entry.name[:80]!r}, which no prepared dataset has")
    if not index.entries or index.entries[-1].name != TABLES[-1]:
        raise archives.Refused("its index does not end with the manifest")


def _belongs(name: str) -> bool:
    """Whether a name is one that `pack` gives.

    Raises:
        Refused: it leads elsewhere.
    """
    path = archives.safe(name)
    folder = path.parent.as_posix()
    if str(path) != name or path.name.startswith("."):
        return False
    return name in TABLES if folder == "." else folder in _PLACES and name.endswith(_PLACES[folder])


def _words(error: Exception) -> str:
    if isinstance(error, archives.Refused):
        return str(error)
    return f"broken ({(str(error) or type(error).__name__).splitlines()[0]})"


def _missing(index: Index, folder: Path) -> int:
    """Bytes of disk that the files of an archive need which are not there yet."""
    needed = 0
    for entry in index.entries:
        path = folder / entry.name
        if not path.is_file() or path.stat().st_size != entry.size:
            needed += -(-entry.size // _CLUSTER) * _CLUSTER
    return needed


def _right(path: Path, entry: Entry) -> bool:
    """Whether a file is there with the bytes that the index tells."""
    try:
        return path.stat().st_size == entry.size and files.digest(path) == entry.sha256
    except OSError:
        return False


def _remove_strangers(index: Index, folder: Path, mending: bool) -> None:
    """Remove what lies among the files of an archive and is none of them, and tables that differ from its tables.

    A table goes before the files that it speaks of are touched, and comes after them.
    """
    held: dict[str, set[str]] = {}
    for entry in index.entries:
        place, _, file = entry.name.rpartition("/")
        held.setdefault(place, set()).add(file)
        if not place and not _right(folder / file, entry):
            files.remove(folder / file)
    if not mending:
        held[""] |= {place.partition("/")[0] for place in held}
        for place in _PLACES:
            held.setdefault(place, set())
    else:
        held.pop("")
    for place, names in held.items():
        files.keep_only(folder / place, names)


def _take(path: Path, index: Index, folder: Path) -> int:
    """Write the files of an archive, each checked and complete or absent; return how many were there already.

    Raises:
        Refused: what it holds is not what its index lists.
        Exception: one of `archives.BROKEN`.
        StudyError: the disk is full or read-only.
    """
    kept = 0
    listed: Iterable[Entry] = iter(index.entries)
    with _bar(index, f"Unpacking {path.name}") as bar:
        for member in archives.members(path, MOST_FILES):
            name = str(member.name)
            if name in (INDEX, SEAL):
                continue
            entry = next(listed, None)
            if entry is None or (entry.name, entry.size) != (name, member.size):
                listed_there = repr(entry.name) if entry else "nothing more"
                raise archives.Refused(f"holds {name!r} where its index lists {listed_there}")
            target = folder / entry.name
            if _right(target, entry):
                kept += 1
            else:
                data = member.read()
                if hashlib.sha256(data).hexdigest() != entry.sha256:
                    raise archives.Refused(f"{name!r} has not the SHA-256 that its index lists")
                files.atomic_write(target, data)
            bar.update(entry.size)
    if (entry := next(listed, None)) is not None:
        raise archives.Refused(f"lacks {entry.name!r}, which its index lists")
    return kept

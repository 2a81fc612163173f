"""The published datasets, ChestX-ray14 and its sample: copies that are here already, Kaggle's, and the NIH's archives.

It owns which datasets there are, where copies of them lie, and the record of what was fetched from where, which is what
mending goes by. It must not know what is in a table or an image.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import requests

from chestxray import files
from chestxray.config import IMAGE_SUFFIXES, Paths, StudyError
from chestxray.data import archives, downloads
from chestxray.data.downloads import PATIENCE, Patience

SIDE = 1024
"""Side in pixels of every image that the NIH published."""

MOUNTS = ("/kaggle/input", "/content/drive/MyDrive", "/content")
"""Where Kaggle and Colab mount data; the variable CHESTXRAY_MOUNTS names other folders, joined as in PATH."""

_DEPTH = 3
"""Folders below a mount that are looked into: Kaggle mounts at <slug>, or at datasets/<owner>/<slug>."""

_FOLDERS = 2000
"""Folders looked into, at most: a Google Drive lists some ten a second."""

_ENOUGH = 0.9
"""A copy with this share of the images is the dataset, damaged; one with fewer is a part of it, under another name."""

_RECORD = "fetch.json"
_OTHER_FILES = ("BBox_List_2017.csv", "train_val_list.txt", "test_list.txt")
_FIRST_FOLDER, _OTHER_FOLDERS = 4999, 10_000
"""Images in `images_001` and in each of `images_002` …, in the order of their names."""


@dataclass(frozen=True)
class Published:
    """A dataset that can be fetched.

    Attributes:
        name: what `--dataset` calls it.
        handle: Kaggle's name for it.
        images: how many it has.
        size: bytes that it has on disk.
        tables: names of its image table, the best first.
    """

    name: str
    handle: str
    images: int
    size: int
    tables: tuple[str, ...]


DATASETS = {
    "nih": Published(
        "nih", "nih-chest-xrays/data", 112_120, 45_100_000_000, ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    ),
    "nih-sample": Published("nih-sample", "nih-chest-xrays/sample", 5_606, 4_510_000_000, ("sample_labels.csv",)),
}


class Copy(NamedTuple):
    """Where a copy of a dataset lies: its image table, and the folder that holds `images*`."""

    table: Path
    images: Path


def provide(dataset: Published, paths: Paths) -> str:
    """Make `paths.raw` hold a dataset: what is there, a mounted copy used in place, kagglehub's cache, or a download.

    Returns:
        What was done, in words.

    Raises:
        StudyError: an unfinished fetch from URLs is there; there is no space, or Kaggle can't be had.
    """
    if paths.raw.exists():
        pending = [part["name"] for part in _read_record(paths) if not part["done"]]
        if pending:
            raise StudyError(
                f"{paths.raw}: {len(pending)} archives are still missing, such as {pending[0]}; "
                f"run: chestxray fetch {dataset.name} --urls FILE"
            )
        return f"{paths.raw} is there already"
    copy = find_copy(dataset)
    done = "used in place"
    if copy is None:
        copy, done = _from_kaggle(dataset), "fetched from Kaggle"
    link(copy, paths.raw)
    return f"{copy.images} {done}"


def find_copy(dataset: Published) -> Copy | None:
    """Find a copy that is mounted here or in kagglehub's cache, whole but for a tenth at most."""
    for folder in _candidates(dataset):
        copy = _copy_in(dataset, folder)
        if copy is not None and count_images(copy.images) >= _ENOUGH * dataset.images:
            return copy
    return None


def _candidates(dataset: Published) -> Iterator[Path]:
    """Folders that may hold the image table of a dataset, the likeliest first."""
    named = os.environ.get("CHESTXRAY_MOUNTS")
    mounts = MOUNTS if named is None else [place for place in named.split(os.pathsep) if place]
    looked = 0
    for mount in mounts:
        level = [Path(mount)]
        for _ in range(_DEPTH + 1):
            below = []
            for folder in level:
                looked += 1
                if looked > _FOLDERS:
                    break
                names = _listed(folder)
                if any(table in names for table in dataset.tables):
                    yield folder
                below += [Path(folder, name) for name in names if _worth_a_look(folder, name)]
            level = below
    yield from cached(dataset)


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _worth_a_look(folder: Path, name: str) -> bool:
    hidden = name.startswith((".", "images")) or Path(name).suffix
    return not hidden and Path(folder, name).is_dir()


def cached(dataset: Published) -> list[Path]:
    """Complete versions of a dataset in kagglehub's cache, the newest first."""
    cache = Path(os.environ.get("KAGGLEHUB_CACHE") or Path.home() / ".cache" / "kagglehub")
    folder = cache / "datasets" / dataset.handle
    versions = [int(mark.stem) for mark in folder.glob("*.complete") if mark.stem.isdecimal()]
    return [folder / "versions" / str(version) for version in sorted(versions, reverse=True)]


def _copy_in(dataset: Published, folder: Path) -> Copy | None:
    """The image table in `folder`, and the images beside it or up to two folders below (Kaggle's `sample/sample/`)."""
    tables = [Path(folder, name) for name in dataset.tables if Path(folder, name).is_file()]
    if not tables:
        return None
    for pattern in ("images*", "*/images*", "*/*/images*"):
        for images in sorted(folder.glob(pattern)):
            if images.is_dir():
                beside = [images.parent / name for name in dataset.tables if (images.parent / name).is_file()]
                return Copy((beside or tables)[0], images.parent)
    return None


def count_images(folder: Path) -> int:
    """How many image files lie under `folder/images*/`."""
    found = 0
    for images in folder.glob("images*"):
        for _, _, names in os.walk(images, followlinks=True):
            found += sum(name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") for name in names)
    return found


def link(copy: Copy, raw: Path) -> None:
    """Make `raw` stand for a copy that lies elsewhere and is not written: one link, or a folder of links.

    Raises:
        StudyError: the file system refuses.
    """
    files.make_folder(raw.parent)
    files.remove(raw)
    with files.explained(raw):
        if copy.table.parent == copy.images:
            raw.symlink_to(copy.images.resolve(), target_is_directory=True)
            return
        temporary = raw.with_name(f".{raw.name}{files.TEMPORARY}{os.getpid()}")
        files.remove(temporary)
        temporary.mkdir()
        others = [path for path in copy.table.parent.iterdir() if path.suffix in (".csv", ".txt") and path.is_file()]
        for path in [*copy.images.glob("images*"), *others]:
            (temporary / path.name).symlink_to(path.resolve(), target_is_directory=path.is_dir())
        temporary.replace(raw)


def _from_kaggle(dataset: Published) -> Copy:
    """Download a dataset into kagglehub's cache, which resumes by itself.

    Raises:
        StudyError: there is no space, or Kaggle can't be had.
    """
    cache = Path(os.environ.get("KAGGLEHUB_CACHE") or Path.home() / ".cache" / "kagglehub")
    # The archive and what is unpacked from it lie on the disk together for a while.
    downloads.require_space(cache, 2 * dataset.size, "set KAGGLEHUB_CACHE to a folder on a larger disk")
    folder = Path(_ask_kaggle(dataset.handle))
    copy = _copy_in(dataset, folder)
    if copy is None:
        raise StudyError(
            f"{folder}: what Kaggle gave for {dataset.handle} has no {dataset.tables[-1]} beside images; "
            "remove it and fetch it again"
        )
    return copy


def _ask_kaggle(handle: str, **details: Any) -> str:
    """Call kagglehub.

    Raises:
        StudyError: it fails; it has many kinds of errors for that.
    """
    import kagglehub  # here, because only this one call needs it and it takes a second to import

    try:
        return kagglehub.dataset_download(handle, **details)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        if isinstance(error, requests.ConnectionError):  # whose words fill a screen
            reason = "no connection"
        what = f"{handle} {details['path']}" if "path" in details else handle
        raise StudyError(
            f"Kaggle's {what}: not to be had ({reason}); check the network, run it again to go on, "
            "or use --urls with the NIH's archives"
        ) from error


def read_list(path: Path) -> list[dict[str, Any]]:
    """Read a list of URLs: a line each, `URL [NAME] [SHA256]`; empty lines and those that begin with # are left out.

    NAME is the file's, where the URL doesn't end in it: tables are known by it.

    Raises:
        StudyError: the file can't be read, or a line is something else.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read ({error}); give a text file with a URL in each line") from error
    parts: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        url, rest = words[0], words[1:]
        sha256 = next(
            (word.lower() for word in rest if len(word) == 64 and not set(word.lower()) - set("0123456789abcdef")), ""
        )
        names = [word for word in rest if word.lower() != sha256]
        name = names[0] if names else PurePosixPath(unquote(urlsplit(url).path)).name
        good = url.startswith(("http://", "https://")) and name and len(names) < 2
        if not good or not name.isprintable() or set(name) & set('/\\:*?"<>|') or name.startswith("."):
            raise StudyError(
                f"{path}, line {number}: {line.strip()[:80]!r}; write URL [NAME] [SHA256], the URL with https://"
            )
        if any(part["name"] == name for part in parts):
            raise StudyError(f"{path}, line {number}: a second {name!r}; give each URL a NAME of its own after it")
        parts.append({"url": url, "name": name, "sha256": sha256, "done": False, "files": []})
    if not parts:
        raise StudyError(f"{path}: no URL in it; write one in each line")
    return parts


def fetch_urls(paths: Paths, parts: Sequence[dict[str, Any]], patience: Patience = PATIENCE) -> list[str]:
    """Fetch archives and tables into `paths.raw`; what was fetched by an earlier call is not fetched again.

    Archives are unpacked one by one and removed, so that the disk holds one of them at a time.

    Args:
        paths: of the dataset.
        parts: as `read_list` gives.
        patience: how long a server is waited for.

    Returns:
        What failed, a line each; the rest is done and kept.

    Raises:
        StudyError: there is no space for all of it, or `paths.raw` is a link to another place.
    """
    if paths.raw.is_symlink():
        raise StudyError(
            f"{paths.raw}: is a link to {paths.raw.resolve()}, which is not written; remove the link to fetch"
        )
    before = {part["url"]: part for part in _read_record(paths)} | {part["name"]: part for part in _read_record(paths)}
    merged = []
    for part in parts:
        known = before.get(part["url"]) or before.get(part["name"])
        merged.append(part | {"done": known["done"], "files": known["files"]} if known else dict(part))
    todo = [part for part in merged if not part["done"]]
    sizes = [size for part in todo if (size := downloads.length(part["url"], patience)) is not None]
    if sizes:  # PNGs unpack to about the bytes of their archive
        downloads.require_space(paths.raw, sum(sizes) + max(sizes), "set CHESTXRAY_ROOT to a folder on a larger disk")
    files.make_folder(paths.raw)
    _write_record(paths, merged)
    failed = []
    for part in todo:
        try:
            taken = _fetch_part(paths, part, None, patience)
        except StudyError as error:
            failed.append(str(error))
            continue
        part.update(done=True, files=taken)
        _write_record(paths, merged)
    return failed


def _fetch_part(paths: Paths, part: dict[str, Any], only: Collection[str] | None, patience: Patience) -> list[str]:
    """Fetch an archive or a table and put what is in it into `paths.raw`.

    Args:
        paths: of the dataset.
        part: the address.
        only: names of files to take; all of the dataset where None.
        patience: how long the server is waited for.

    Returns:
        Names of the files taken.
    """
    folder = paths.data / "downloads"
    target = folder / part["name"]
    downloads.fetch(part["url"], target, part["sha256"], patience)
    try:
        if archives.kind(target):
            place = _place(paths.raw, only)
            return [path.name for path in archives.extract(target, place, part["url"])]
        _check_table(target, part)
        with files.explained(paths.raw / part["name"]):
            target.replace(paths.raw / part["name"])
        return [part["name"]]
    finally:  # a broken archive too: it would be taken for good by the next run
        files.remove(target)
        if not any(folder.iterdir()):
            files.remove(folder)


def _check_table(path: Path, part: dict[str, Any]) -> None:
    with path.open("rb") as file:
        head = file.read(64).lstrip(b"\xef\xbb\xbf")
    wanted = b"Image Index" if part["name"].endswith(".csv") else b"0"
    if not _is_table(part["name"]) or not head.startswith(wanted):
        raise StudyError(
            f"{part['url']}: begins with {head[:24]!r}, neither tar.gz nor zip nor a table of the NIH by its name; "
            "check the address, and write the table's name after it"
        )


def _is_table(name: str) -> bool:
    tables = {table for dataset in DATASETS.values() for table in dataset.tables}
    return name in tables or name in _OTHER_FILES


def _place(raw: Path, only: Collection[str] | None) -> archives.Place:
    """Where members of an archive go: images below `images*/` as they are in it, tables into `raw` itself."""

    def place(member: PurePosixPath) -> Path | None:
        name = member.name
        if name.startswith(".") or "__MACOSX" in member.parts or (only is not None and name not in only):
            return None
        if _is_table(name):
            return raw / name
        if not name.lower().endswith(IMAGE_SUFFIXES):
            return None
        inside = [number for number, part in enumerate(member.parts[:-1]) if part.startswith("images")]
        return raw.joinpath(*member.parts[inside[0] :]) if inside else raw / "images" / name

    return place


def _read_record(paths: Paths) -> list[dict[str, Any]]:
    """What was asked for by URL; nothing where the dataset comes from elsewhere or the record is unreadable."""
    try:
        record = json.loads((paths.data / _RECORD).read_text("utf-8"))
        return [part for part in record if {"url", "name", "sha256", "done", "files"} <= set(part)]
    except (OSError, ValueError, TypeError):
        return []


def _write_record(paths: Paths, parts: Sequence[dict[str, Any]]) -> None:
    files.atomic_write(paths.data / _RECORD, json.dumps(list(parts)).encode())


def mend(
    dataset: Published,
    paths: Paths,
    broken: Collection[str],
    listed: Sequence[str] = (),
    patience: Patience = PATIENCE,
) -> list[str]:
    """Fetch again only the files that are missing or broken.

    From URLs, the archives that hold them are fetched again and nothing but these files is taken; from Kaggle, each
    file by itself.

    Args:
        dataset: which it is.
        paths: its places.
        broken: file names.
        listed: all image names of the table, which tell the folder of a missing image of the whole dataset.
        patience: how long a server is waited for.

    Returns:
        What could not be mended, a line each.

    Raises:
        StudyError: the dataset lies where it can't be written.
    """
    if not broken:
        return []
    record = _read_record(paths)
    if record:
        return _mend_from_urls(paths, record, set(broken), patience)
    return _mend_from_kaggle(dataset, paths, sorted(broken), listed)


def _mend_from_urls(paths: Paths, record: list[dict[str, Any]], broken: set[str], patience: Patience) -> list[str]:
    failed = []
    for part in record:
        wanted = broken & set(part["files"])
        if part["done"] and not wanted:
            continue
        try:
            taken = _fetch_part(paths, part, wanted if part["done"] else None, patience)
            if not part["done"]:
                part.update(done=True, files=taken)
                _write_record(paths, record)
            broken = broken - set(taken)
        except StudyError as error:
            failed.append(str(error))
            broken = broken - wanted
    remedy = "add the URL of the archive that has it to the list and fetch"
    return failed + [f"{name}: in none of the {len(record)} archives fetched; {remedy}" for name in sorted(broken)]


def _mend_from_kaggle(dataset: Published, paths: Paths, broken: Sequence[str], listed: Sequence[str]) -> list[str]:
    version = next((v for v in cached(dataset) if _inside(paths.raw, v)), None)
    if version is None:
        raise StudyError(
            f"{paths.raw}: its files lie in {paths.raw.resolve()}, which is not written from here; "
            f"mend them there, or remove {paths.raw} and fetch {dataset.name} again"
        )
    copy = _copy_in(dataset, version)
    # Kaggle's sample holds its images twice; those that `raw` stands for count.
    walks = [os.walk(folder) for folder in ([version, *copy.images.glob("images*")] if copy else [version])]
    here = {name: Path(place, name) for walk in walks for place, _, names in walk for name in names}
    places = {name: number for number, name in enumerate(sorted(listed))}
    failed: list[str] = []
    in_a_row = 0
    for name in broken:
        target = here.get(name) or _kaggle_place(dataset, version, name, places)
        inner = target.relative_to(version).as_posix()
        try:
            with tempfile.TemporaryDirectory(prefix=".mend", dir=version.parent) as temporary:
                details = {"path": inner, "output_dir": temporary, "force_download": True}
                came = Path(_ask_kaggle(f"{dataset.handle}/versions/{version.name}", **details))
                files.atomic_write(target, came.read_bytes())
            in_a_row = 0
        except (StudyError, OSError) as error:
            failed.append(str(error).splitlines()[0])
            in_a_row += 1
            if in_a_row == 3:
                failed.append(f"{len(broken) - len(failed)} files were not tried after three failures; run it again")
                break
    return failed


def _inside(raw: Path, version: Path) -> bool:
    """Whether `raw` is a link, or a folder of links, to a folder below `version`."""
    places = [raw.resolve(), *(path.resolve() for path in raw.glob("images*"))]
    return any(place.is_relative_to(version.resolve()) for place in places)


def _kaggle_place(dataset: Published, version: Path, name: str, places: dict[str, int]) -> Path:
    """Where in Kaggle's dataset a file lies that is missing here."""
    copy = _copy_in(dataset, version)
    images = copy.images if copy else version
    if not name.lower().endswith(IMAGE_SUFFIXES):
        return (copy.table.parent if copy else version) / name
    if dataset.name == "nih" and name in places and len(places) == DATASETS["nih"].images:
        before = places[name] - _FIRST_FOLDER
        return images / f"images_{before // _OTHER_FOLDERS + 2 if before >= 0 else 1:03d}" / "images" / name
    folder = next((path for path in sorted(images.glob("images*")) if path.is_dir()), images / "images")
    return folder / name

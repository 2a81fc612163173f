"""Published datasets: copies of ChestX-ray14 and its sample that lie on this machine, and Kaggle's download.

A copy is used where it lies and never written: mounted by Kaggle or Colab, or in kagglehub's cache, which a download
fills. `folder_on_kaggle` says where on Kaggle a missing image lies.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from chestxray import files
from chestxray.config import StudyError
from chestxray.data import nih_tables, sources

MOUNTS = ("/kaggle/input", "/content/drive/MyDrive", "/content")
"""Where Kaggle and Colab mount data; the variable CHESTXRAY_MOUNTS names other folders, joined as in PATH."""

_DEPTH = 3
"""Folders below a mount that are looked into: Kaggle mounts at <slug>, or at datasets/<owner>/<slug>."""

_FOLDERS = 2000
"""Folders looked into, at most: a Google Drive lists some ten a second."""

_ENOUGH = 0.9
"""A copy with this share of the images is the dataset, damaged; one with fewer is a part of it, under another name."""

_FIRST_FOLDER, _OTHER_FOLDERS = 4999, 10_000
"""Images in `images_001`, and in each of `images_002` …, in alphabetical order."""


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
    "nih": Published("nih", "nih-chest-xrays/data", 112_120, 45_100_000_000, nih_tables.TABLE_NAMES),
    "nih-sample": Published(
        "nih-sample", "nih-chest-xrays/sample", 5_606, 4_510_000_000, (nih_tables.SAMPLE_TABLE_NAME,)
    ),
}


class Copy(NamedTuple):
    """Where a copy of a dataset lies: the folder of its tables, and the folder that holds `images*`."""

    tables: Path
    images: Path


def provide(dataset: Published, raw: Path) -> None:
    """Make `raw` hold a dataset: what is there, a mounted copy, kagglehub's cache, or a download.

    A copy is used where it lies and not written: `raw` is a link to it, or a folder of links.

    Args:
        dataset: which.
        raw: the folder, made if it is not there.

    Raises:
        StudyError: there is no space, Kaggle cannot be reached, or the file system refuses.
    """
    if raw.exists():
        return
    copy = find_copy(dataset) or _download(dataset)
    files.remove(raw)
    with files.atomic_path(raw) as temporary:
        if copy.tables == copy.images:
            temporary.symlink_to(copy.images.resolve(), target_is_directory=True)
            return
        temporary.mkdir()
        others = [path for path in copy.tables.iterdir() if path.suffix in (".csv", ".txt") and path.is_file()]
        for path in [*copy.images.glob("images*"), *others]:
            (temporary / path.name).symlink_to(path.resolve(), target_is_directory=path.is_dir())


def find_copy(dataset: Published) -> Copy | None:
    """Find a copy that is mounted here or in kagglehub's cache, whole but for a tenth at most."""
    for folder in _candidates(dataset):
        copy = _copy_in(dataset, folder)
        if copy and sum(1 for _ in sources.image_files(copy.images)) >= _ENOUGH * dataset.images:
            return copy
    return None


def _candidates(dataset: Published) -> Iterator[Path]:
    """Folders that may hold the image table: below the mounts, the least deep first; then in the cache, the newest."""
    named = os.environ.get("CHESTXRAY_MOUNTS")
    mounts = MOUNTS if named is None else [place for place in named.split(os.pathsep) if place]
    queue = deque((Path(mount), 0) for mount in mounts)
    looked = 0
    while queue and looked < _FOLDERS:
        folder, depth = queue.popleft()
        looked += 1
        try:
            paths = sorted(folder.iterdir())
        except OSError:
            continue
        if any(path.name in dataset.tables for path in paths):
            yield folder
        if depth < _DEPTH:
            below = [path for path in paths if not path.name.startswith((".", "images")) and not path.suffix]
            queue.extend((path, depth + 1) for path in below if path.is_dir())
    complete = _cache() / "datasets" / dataset.handle
    versions = [int(mark.stem) for mark in complete.glob("*.complete") if mark.stem.isdecimal()]
    yield from (complete / "versions" / str(version) for version in sorted(versions, reverse=True))


def _cache() -> Path:
    return Path(os.environ.get("KAGGLEHUB_CACHE") or Path.home() / ".cache" / "kagglehub")


def _copy_in(dataset: Published, folder: Path) -> Copy | None:
    """The image table in `folder`, and the images beside it or up to two folders below (Kaggle's `sample/sample/`)."""

    def has_table(place: Path) -> bool:
        return any((place / name).is_file() for name in dataset.tables)

    if has_table(folder):
        for pattern in ("images*", "*/images*", "*/*/images*"):
            for images in sorted(folder.glob(pattern)):
                if images.is_dir():
                    return Copy(images.parent if has_table(images.parent) else folder, images.parent)
    return None


def _download(dataset: Published) -> Copy:
    """Download a dataset into kagglehub's cache, which resumes by itself.

    Raises:
        StudyError: there is no space, or Kaggle cannot be reached; kagglehub has many kinds of errors for that.
    """
    import kagglehub  # here, because only a download needs it and it takes a second to import

    # The archive and what is unpacked from it lie on the disk together for a while.
    files.require_space(_cache(), 2 * dataset.size, "set KAGGLEHUB_CACHE to a folder on a larger disk")
    try:
        folder = Path(kagglehub.dataset_download(dataset.handle))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        if any(kind.__name__ == "ConnectionError" for kind in type(error).__mro__):  # its message fills a screen
            reason = "no connection"
        raise StudyError(
            f"Kaggle's {dataset.handle}: cannot be fetched ({reason}); check the network, run it again to go on, or "
            "fill a folder with the NIH's own script and give that as --dataset (see 1_Datasets/README.md)"
        ) from error
    copy = _copy_in(dataset, folder)
    if copy is None:
        raise StudyError(
            f"{folder}: what Kaggle gave for {dataset.handle} has no {dataset.tables[-1]} beside images; "
            "remove it and fetch it again"
        )
    return copy


def folder_on_kaggle(position: int) -> str:
    """Say which folder of Kaggle's `nih-chest-xrays/data` holds an image; the NIH's archives are numbered alike.

    Args:
        position: of the image among all 112,120 image names in alphabetical order, from 0.
    """
    return f"images_{(position - _FIRST_FOLDER) // _OTHER_FOLDERS + 2:03d}/images"

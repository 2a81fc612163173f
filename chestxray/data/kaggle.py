"""Published datasets: copies of ChestX-ray14 and its sample that lie on this machine, and Kaggle's download.

A copy is used where it lies and never written: mounted by Kaggle or Colab, or in kagglehub's cache, which a download
fills. `folder_on_kaggle` says where on Kaggle a missing image lies.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

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

_AT_A_TIME, _MEASURED, _PATIENCE = 8, 16, 8
"""Files that are fetched at a time; after how many the time is told; after how many failures no more are asked for."""

_FIRST_FOLDER, _OTHER_FOLDERS = 4999, 10_000
"""Images in `images_001`, and in each of `images_002` …, in alphabetical order."""


@dataclass(frozen=True)
class Published:
    """A dataset that can be fetched."""

    name: str  # what `--dataset` calls it
    handle: str  # Kaggle's name for it
    images: int
    size: int  # bytes that it has on disk
    tables: tuple[str, ...]  # names of its image table, the best first


DATASETS = {
    "nih": Published("nih", "nih-chest-xrays/data", 112_120, 45_100_000_000, nih_tables.TABLE_NAMES),
    "nih-sample": Published(
        "nih-sample", "nih-chest-xrays/sample", 5_606, 4_510_000_000, (nih_tables.SAMPLE_TABLE_NAME,)
    ),
}


def provide(dataset: Published, raw: Path) -> None:
    """Make `raw` hold a dataset: what is there, a mounted copy, kagglehub's cache, or a download.

    A copy is used where it lies and not written: `raw` is a folder of links.

    Args:
        dataset: which.
        raw: the folder, made if it is not there.

    Raises:
        StudyError: there is no space, or Kaggle cannot be reached.
    """
    if raw.exists():
        return
    parts = find_copy(dataset) or _download(dataset)
    files.remove(raw)
    with files.atomic_path(raw) as temporary:
        temporary.mkdir()
        for path in parts:
            (temporary / path.name).symlink_to(path.resolve(), target_is_directory=path.is_dir())


def may_ask() -> bool:
    """Whether this machine is Kaggle's own, or has an account there."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return True
    from kagglehub import config  # here, because it takes a second to import

    try:
        return config.get_kaggle_credentials() is not None
    except ValueError:  # a damaged kaggle.json
        return False


def find_copy(dataset: Published) -> list[Path]:
    """The parts of a copy that is mounted here or in kagglehub's cache, whole but for a tenth at most; none without."""
    for folder in candidates(dataset):
        parts = _parts(dataset, folder)
        if parts and sum(1 for _ in sources.image_files(parts[0].parent)) >= _ENOUGH * dataset.images:
            return parts
    return []


def candidates(dataset: Published) -> Iterator[Path]:
    """Folders with the image table or images: below the mounts, the least deep first; then in the cache, the newest."""
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
        if any(path.name in dataset.tables or path.name.startswith("images") for path in paths):
            yield folder
        if depth < _DEPTH:
            below = [path for path in paths if not path.name.startswith((".", "images")) and not path.suffix]
            queue.extend((path, depth + 1) for path in below if path.is_dir())
    complete = cache() / "datasets" / dataset.handle
    versions = [int(mark.stem) for mark in complete.glob("*.complete") if mark.stem.isdecimal()]
    yield from (complete / "versions" / str(version) for version in sorted(versions, reverse=True))


def cache() -> Path:
    """The folder in which kagglehub keeps what it fetched."""
    return Path(os.environ.get("KAGGLEHUB_CACHE") or Path.home() / ".cache" / "kagglehub")


def _parts(dataset: Published, folder: Path) -> list[Path]:
    """Folders of images and tables of a copy in `folder`: beside its image table or up to two folders below it."""
    if any((folder / name).is_file() for name in dataset.tables):
        tables = [path for path in folder.iterdir() if path.suffix in (".csv", ".txt") and path.is_file()]
        for pattern in ("images*", "*/images*", "*/*/images*"):  # Kaggle's sample/sample/
            if images := [path for path in sorted(folder.glob(pattern)) if path.is_dir()]:
                return [*(path for path in images if path.parent == images[0].parent), *tables]
    return []


def _download(dataset: Published) -> list[Path]:
    """Download a dataset into kagglehub's cache, which resumes by itself."""
    # The archive and what is unpacked from it lie on the disk together for a while.
    files.require_space(cache(), 2 * dataset.size, "set KAGGLEHUB_CACHE to a folder on a larger disk")
    folder = _fetch(dataset.handle)
    if parts := _parts(dataset, folder):
        return parts
    what = f"what Kaggle gave for {dataset.handle} has no {dataset.tables[-1]} beside images"
    raise StudyError(f"{folder}: {what}; remove it and fetch it again")


def _fetch(handle: str, *path: str) -> Path:
    """Fetch a dataset, or one file of it, into kagglehub's cache, unless it is there; say where it lies."""
    import kagglehub  # here, because only a download needs it and it takes a second to import

    try:
        return Path(kagglehub.dataset_download(handle, *path))
    except Exception as error:  # kagglehub has many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        if any(kind.__name__ == "ConnectionError" for kind in type(error).__mro__):  # its message fills a screen
            reason = "no connection"
        own = "give a folder by --from" if path else "fill a folder with the NIH's own script, for --dataset"
        remedy = f"check the network, run it again to go on, or {own} (see 1_Datasets/README.md)"
        what = " ".join((*path, f"cannot be fetched ({reason})"))
        raise StudyError(f"Kaggle's {handle}: {what}; {remedy}") from error


def fetch_tables(dataset: Published) -> list[Path]:
    """Fetch the first edition of the image table and the boxes, and say where they lie in the cache."""
    with _quiet():
        return [_fetch(dataset.handle, name) for name in (dataset.tables[-1], nih_tables.BOXES_NAME)]


def fetch_images(dataset: Published, images: Sequence[str], use: Callable[[str, Path], object]) -> None:
    """Fetch some images one by one, several at a time; after the first few, say how long the rest takes.

    kagglehub's cache keeps what came, so that the next call goes on.

    Args:
        dataset: `nih`.
        images: their names.
        use: called in a thread with each name and the path of its file in the cache.

    Raises:
        StudyError: there is no space, Kaggle cannot be reached, or files cannot be fetched; the others were used.
    """
    needed = dataset.size // dataset.images * len(images)
    files.require_space(cache(), needed, "set KAGGLEHUB_CACHE to a larger disk")
    table, _ = fetch_tables(dataset)
    names = nih_tables.read_entries(table).table["image"].tolist()  # sorted
    position = {name: number for number, name in enumerate(names)}
    if len(names) != dataset.images or not position.keys() >= set(images):
        raise StudyError(f"{table}: is not the table of {dataset.images:,} images; remove it and run it again")
    version = re.search(r"/versions/\d+(?=/)", table.as_posix())
    handle = dataset.handle + (version[0] if version else "")  # else kagglehub asks for the newest before each file
    failures: list[StudyError] = []

    def fetch(image: str) -> None:
        if len(failures) < _PATIENCE:
            try:
                path = _fetch(handle, f"{folder_on_kaggle(position[image])}/{image}")
            except StudyError as error:
                failures.append(error)
            else:
                use(image, path)

    print(
        f"{len(images):,} images, about {files.gigabytes(needed)}, are fetched from Kaggle's {dataset.handle}, "
        f"{_AT_A_TIME} at a time. Stopped, it goes on when it is run again."
    )
    bar, started = tqdm(total=len(images), desc="Fetching", unit="image", disable=None), time.monotonic()
    with bar, _quiet():
        for done, _ in enumerate(files.in_threads(fetch, images, _AT_A_TIME, ordered=False), 1):
            bar.update()
            if done == _MEASURED and not failures:
                rest, seconds = len(images) - done, time.monotonic() - started
                minutes = seconds * rest / done / 60
                print(f"The first {done} took {seconds:.0f} s: the other {rest:,} are about {minutes:,.0f} min.")
    if failures:
        raise StudyError(f"{len(failures):,} of {len(images):,} files failed, the first: {failures[0]}")


def _quiet() -> contextlib.AbstractContextManager:
    """Hold back what kagglehub prints of every file: a line, and a bar on the error stream."""
    import kagglehub  # here, as above; it sets the level of its logger when it is imported

    logging.getLogger(kagglehub.__name__).setLevel(logging.WARNING)
    return contextlib.redirect_stderr(io.StringIO())


def folder_on_kaggle(position: int) -> str:
    """Say which folder of Kaggle's `nih-chest-xrays/data` holds an image; the NIH's archives are numbered alike.

    Args:
        position: of the image among all 112,120 image names in alphabetical order, from 0.
    """
    return f"images_{(position - _FIRST_FOLDER) // _OTHER_FOLDERS + 2:03d}/images"

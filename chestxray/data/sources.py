"""Sources: phantoms, a folder in the NIH layout, or a published dataset; each becomes the `raw` folder of a dataset.

Datasets that were unpacked from an archive have no raw images and are recognised by `unpacked.json`.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chestxray import files
from chestxray.config import IMAGE_SUFFIXES, NIH_9K, Paths, Rejection, Study, StudyError, source_folder

UNPACKED = "unpacked.json"
"""What `archive.unpack` leaves beside the files: a dataset that has this has raw tables, but no raw images."""

LARGER = "images_256"
"""Folder of larger versions of some radiographs, beside `images` (see `subset`): not other files of the same names."""

PHANTOM_OVERSIZE = 2
"""Phantoms are drawn this many times larger than the prepared radiographs, so that they too are resized once."""


def image_files(raw: Path) -> Iterator[Path]:
    """The image files under `raw/images*/`, or `raw` where it has no such folder; by folder, each sorted by name.

    Hidden files are left out: they are leftovers of unfinished writes, or what macOS adds to archives. So are the
    larger versions in `images_256/`, where `images/` is beside it.
    """
    return (path for path, kind in _listing(raw) if kind == "file")


def _listing(raw: Path) -> Iterator[tuple[Path, str]]:
    """Image files, folders that are named as such, and whatever is neither file nor folder, as `files.walk` does."""
    for folder in sorted(path for path in raw.glob("images*") if not path.is_file()) or [raw]:
        if folder.name == LARGER and (raw / "images").is_dir():
            continue
        for path, kind in files.walk(folder):
            wanted = path.name.lower().endswith(IMAGE_SUFFIXES) or kind not in ("file", "folder")
            if wanted and not path.name.startswith("."):
                yield path, kind


def unusable_files(raw: Path) -> list[Rejection]:
    """What lies where images do and is no file: links to nothing, pipes, folders named as an image or that are closed.

    Whether a file can be decoded isn't looked at.
    """
    remedy = "it is left out; mend or remove it"
    others = ((path, "is a folder" if kind == "folder" else kind) for path, kind in _listing(raw) if kind != "file")
    return [Rejection(path.name, value, remedy) for path, value in others]


def find_images(raw: Path) -> dict[str, Path]:
    """Find the `image_files` of a folder, sorted: name → path. One that lies there twice, the same, counts once.

    Raises:
        StudyError: there are none, or one name stands for two different files.
    """
    found: dict[str, Path] = {}
    for path in image_files(raw):
        other = found.setdefault(path.name, path)
        with contextlib.suppress(OSError):  # of one that cannot be read, decoding tells
            if other is not path and not filecmp.cmp(other, path, shallow=False):
                raise StudyError(f"{path}: differs from {other}, which has the same name; remove one of them")
    if not found:
        from chestxray.data import nih_tables  # here, because it imports pandas, which the runner waits for otherwise

        others = "".join(f" ({other.file}: {other.value})" for other in unusable_files(raw)[:1])
        raise StudyError(f"{raw}: no image there{others}; {nih_tables.LAYOUT}")
    return dict(sorted(found.items()))


def unpacked(paths: Paths) -> dict[str, Any] | None:
    """Read the record of a dataset that was unpacked from an archive, as `archive.unpack` writes it; None without."""
    try:
        record = json.loads((paths.data / UNPACKED).read_text("utf-8"))
        return {name: record[name] for name in ("archive", "manifest", "image_size", "raw_side")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_unpacked(paths: Paths) -> bool:
    """Whether a dataset was unpacked from an archive and its manifest is still the one that came in it."""
    record = unpacked(paths)
    return record is not None and paths.manifest.exists() and files.digest(paths.manifest) == record["manifest"]


def prepare_raw(source: str, study: Study, folders: Sequence[str | Path] = ()) -> None:
    """Make `study.paths.raw` hold the raw data of `source`. What is there already is not made again.

    Args:
        source: `phantom`; the path of a folder in the NIH layout; `nih_9k`, `nih` or `nih-sample`, which are looked for
            on this machine and fetched from Kaggle if they are not there; or a dataset already under `1_Datasets`.
        study: gives the place, and for phantoms their number, size and seed.
        folders: where the radiographs of nih_9k are taken from; they are looked for where there are none.

    Raises:
        StudyError: the folder is missing, empty or not in the NIH layout; Kaggle cannot be had; or the dataset was
            unpacked from an archive.
    """
    if unpacked(study.paths) is not None:
        raise StudyError(
            f"{study.paths.relative(study.paths.data)}: was unpacked from an archive, which has no raw images; leave "
            "out stages 1 and 2.1 by --only, or remove that folder to begin with a source"
        )
    from chestxray.data import kaggle, nih_tables, subset  # here, because they import pandas, as above

    folder = source_folder(source)
    if study.is_phantom:
        from chestxray.data.phantom import anatomy, dataset  # here, because it imports SciPy, as no other source does

        size = min(max(anatomy.SIZES[0], PHANTOM_OVERSIZE * study.profile.image_size), anatomy.SIZES[1])
        dataset.write_dataset(study.paths.raw, images=study.profile.phantom_images, size=size, seed=study.seed)
    elif study.paths.dataset == NIH_9K:
        subset.provide(study.paths.raw, [Path(place) for place in (*filter(None, [folder]), *folders)])
    elif folder is not None:
        folder = folder.resolve()
        nih_tables.find_table(folder)  # before anything is written
        find_images(folder)
        refuse_other(folder, study.paths.raw)
        if not study.paths.raw.is_dir():  # else it is linked, or was copied earlier
            files.remove(study.paths.raw)
            files.symlink(folder, study.paths.raw)
    elif source in kaggle.DATASETS:
        kaggle.provide(kaggle.DATASETS[source], study.paths.raw)
    elif not study.paths.raw.exists():
        raise StudyError(
            f"dataset {source!r}: no such folder, and none of this name under 1_Datasets; {nih_tables.LAYOUT}"
        )
    nih_tables.find_table(study.paths.raw)
    find_images(study.paths.raw)


def refuse_other(folder: Path, raw: Path) -> None:
    """Refuse a folder whose name gives the place of another one's data.

    Args:
        folder: the source.
        raw: where its dataset has the raw data.

    Raises:
        StudyError: `raw` is a link to another folder.
    """
    if raw.is_symlink() and raw.exists() and not raw.samefile(folder):
        raise StudyError(f"{raw}: holds another folder, {raw.resolve()}; rename {folder.name} or remove {raw.parent}")

"""Preparation: bring each radiograph to the working size once, store it, and link the class trees.

Stage 2.1: `make_plan` reads the raw tables and decides every image's split and selection, `prepare` writes the prepared
images, the trees and the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from PIL import PngImagePlugin
from tqdm import tqdm

from chestxray import files
from chestxray.config import CLASSES, NIH_9K, SPLITS, Paths, Rejection, Study, StudyError
from chestxray.data import nih_tables, own_tables, sources, splits, subset
from chestxray.data.manifest import MANIFEST_COLUMNS, store_path
from chestxray.files import atomic_write, in_threads
from chestxray.images import pixels

_RECIPE = "2"
"""Changes when the same source would be prepared to other bytes: stored images of another recipe are made anew."""
_NOTE = "Prepared"


def _store_one(image: str, source: Path, target: Path, size: int, bits: int | None) -> tuple[str | Rejection, bool]:
    """Prepare one image: the SHA-256 of its PNG, or why it cannot be read; and whether it was made just now."""
    try:
        # What a prepared PNG records of how it was made: enough to know whether it is up to date.
        depth = "" if bits in (None, pixels.DEPTHS[-1]) else f"{bits} bits, "
        note = f"recipe {_RECIPE}, {size} px, {depth}from {source.stat().st_size} bytes"
        data = _still_right(target, source, note)
        made = data is None
        if made:
            buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
            info.add_text(_NOTE, note)
            # Pillow's images all the way: going through arrays would copy each radiograph twice under Python's lock.
            prepared = pixels.square(pixels.decode_bytes(pixels.read_bytes(source), source, bits=bits)[0], size)
            # zlib's level 3 takes half the time of Pillow's 6 for files an eighth larger.
            prepared.save(buffer, "PNG", pnginfo=info, compress_level=3)
            data = buffer.getvalue()
    except OSError as error:
        remedy = "the image is left out; check the path and its permissions"
        return Rejection(image, f"cannot be read ({error.strerror})", remedy), False
    except StudyError as error:  # one line: file: value; remedy
        value, _, remedy = str(error).partition(": ")[2].rpartition("; ")
        return Rejection(image, value, f"the image is left out; {remedy}"), False
    if made:
        atomic_write(target, data)  # a full disk is no fault of this image: it ends the run
    return hashlib.sha256(data).hexdigest(), made


def _still_right(target: Path, source: Path, note: str) -> bytes | None:
    """The bytes of a PNG prepared earlier, if it was made from this source in this way; else None."""
    try:
        if target.stat().st_mtime < source.stat().st_mtime:
            return None
        data = target.read_bytes()
    except OSError:
        return None
    # The note is the first chunk after the header of a PNG that we wrote, 33 bytes in.
    return data if f"{_NOTE}\0{note}".encode() in data[:256] else None


def store_images(
    paths: Mapping[str, Path], store: Path, size: int, workers: int | None = None, greys: pixels.Greys | None = None
) -> tuple[pd.Series, list[Rejection], int]:
    """Prepare every readable image into the store; what is there and still right is not made again.

    It gives the SHA-256 of each prepared PNG, the unreadable images, and how many were made just now. Each file is
    complete or absent and depends on its source alone: interruptions and the number of workers change no byte.

    Args:
        paths: image → its source file.
        store: the folder; files in it that belong to none of the images are removed.
        size: side of the prepared images in pixels.
        workers: threads; as many as cores where None.
        greys: how files of 16 bits are read; each by its own largest value if None.
    """
    files.make_folder(store)
    depths = dict.fromkeys(greys.files, greys.bits) if greys else {}
    jobs = [(name, path, store_path(store, name), size, depths.get(path)) for name, path in sorted(paths.items())]
    stored = in_threads(lambda job: _store_one(*job), jobs, workers or -1, batch=8)
    outcomes = list(tqdm(stored, "Preparing radiographs", len(jobs), unit="image", disable=None))
    rejected = [outcome for outcome, _ in outcomes if isinstance(outcome, Rejection)]
    good = {job[0]: outcome for job, (outcome, _) in zip(jobs, outcomes, strict=True) if isinstance(outcome, str)}
    files.keep_only(store, {store_path(store, image).name for image in good})
    return pd.Series(good, name="sha256", dtype="str"), rejected, sum(made for _, made in outcomes)


def link_trees(paths: Paths, manifest: pd.DataFrame) -> None:
    """Make the class folders of train, valid and test hold links to the selected images, and nothing else.

    Args:
        paths: where the dataset lies.
        manifest: as `read_manifest` gives.
    """
    chosen = manifest[manifest["selected"]]
    for split in SPLITS:
        files.keep_only(paths.tree(split), set(CLASSES))
        for label in CLASSES:
            folder = files.make_folder(paths.tree(split) / label)
            images = chosen.loc[chosen["split"].eq(split) & chosen["label"].eq(label), "image"]
            targets = [store_path(paths.store, image) for image in images]
            files.keep_only(folder, {target.name for target in targets})
            for target in targets:
                files.link(target, folder / target.name)


class Plan(NamedTuple):
    """What stage 2.1 is going to make, known before any pixel is read."""

    table: pd.DataFrame  # one row per image that is there, with what `splits.plan` adds
    paths: dict[str, Path]  # image → its source file
    rejected: tuple[Rejection, ...]  # rows, values and files that cannot be used
    notes: tuple[str, ...]  # what a reader should know, one line each


class Preparation(NamedTuple):
    """What stage 2.1 has made."""

    manifest: pd.DataFrame  # as `manifest.csv`
    rejected: pd.DataFrame  # as `rejected.csv`: `file`, `value`, `remedy`
    notes: tuple[str, ...]  # what a reader should know, one line each
    made: int  # prepared images written by this run; the others were there already


def make_plan(study: Study, raw: Path | None = None, labels: Path | None = None) -> Plan:
    """Read the raw tables and decide every image's split and selection. Writes nothing.

    Args:
        study: the dataset and its parameters.
        raw: a folder in the NIH layout, where stage 1 has not been run yet; else the dataset's.
        labels: a label map to use in place of the dataset's.

    Raises:
        StageMissing: there is no raw data yet.
        StudyError: the tables or lists cannot be used.
    """
    raw = raw or study.require(study.paths.raw, "stage 1")
    entries, lists = nih_tables.read_dataset(study.paths, raw, labels)
    present = _one_stem_each(nih_tables.match_images(entries, sources.find_images(raw)))
    table = splits.plan(present.table, lists, study.profile.valid_share, study.profile.no_finding, study.seed)
    notes = [
        f"{entries.source.name}: {entries.rows:,} rows; images of {len(table):,} are here, of {present.absent:,} not.",
        *entries.notes,
        "Test is the official test list." if lists else "No official lists: test is held out here, by patient.",
    ]
    if lists and len(lists) > 2:
        notes.append(f"Validation is that of {nih_tables.VALID_NAME}, whatever valid_share and seed are.")
    notes += splits.no_model(table)
    return Plan(table, present.paths, (*present.rejected, *sources.unusable_files(raw)), tuple(notes))


def _one_stem_each(present: nih_tables.Present) -> nih_tables.Present:
    """Leave out images that would be stored under the name of another (`a.jpg` beside `a.png`)."""
    stem = present.table["image"].str.rsplit(".", n=1).str[0]
    twins = present.table.loc[stem.duplicated(), "image"]
    remedy = "the image is left out: another has this name with another suffix; rename one of them"
    rejected = (*present.rejected, *(Rejection(image, "name used twice", remedy) for image in twins))
    table = present.table.drop(index=twins.index).reset_index(drop=True)
    paths = {image: present.paths[image] for image in table["image"]}
    return dataclasses.replace(present, table=table, paths=paths, rejected=rejected)


def prepare(study: Study, workers: int | None = None) -> Preparation:
    """Run stage 2.1: store every readable image, link the class trees, write `manifest.csv` and `rejected.csv`.

    The manifest goes first and comes last: while it is there, the trees agree with it. A dataset prepared with other
    parameters is made anew where it differs, and what stage 2.2 or the models' cache made from it is removed.

    Args:
        study: the dataset and its parameters.
        workers: threads; as many as cores where None.

    Raises:
        StudyError: nothing can be prepared, or an image of nih_9k is not the list's.
    """
    plan = make_plan(study)
    paths = study.paths
    if paths.dataset == NIH_9K:
        subset.require_equal(paths.raw, plan.paths)
    before = paths.manifest.read_bytes() if paths.manifest.exists() else None
    files.remove(paths.manifest)
    for table in (paths.manifest, paths.rejected):
        files.remove_leftovers(table)
    greys = pixels.greys(plan.paths.values())
    hashes, unreadable, made = store_images(plan.paths, paths.store, study.profile.image_size, workers, greys)
    if hashes.empty:
        raise StudyError(
            f"{paths.raw}: none of the {len(plan.paths)} images can be read, e.g. {unreadable[0].file}: "
            f"{unreadable[0].value}; download them again"
        )
    manifest = plan.table.assign(sha256=plan.table["image"].map(hashes))
    manifest = manifest[manifest["sha256"].notna()].reset_index(drop=True)[list(MANIFEST_COLUMNS)]
    after = manifest.to_csv(index=False, lineterminator="\n").encode()
    if after != before:
        for outdated in (paths.augmented_rows, paths.tree("train_augmented"), paths.near_duplicates, paths.cache):
            files.remove(outdated)
    link_trees(paths, manifest)
    rejected = own_tables.rejections_frame([*plan.rejected, *unreadable])
    atomic_write(paths.rejected, rejected.to_csv(index=False, lineterminator="\n").encode())
    atomic_write(paths.manifest, after)
    return Preparation(manifest, rejected, (*plan.notes, *greys.notes), made)

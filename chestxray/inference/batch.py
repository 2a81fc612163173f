"""Batch prediction: answers for many files as a CSV table or a JSON document, with heat-maps as pictures.

Each answer is written as it comes, so that memory doesn't grow with the number of files. A file that cannot be used is
reported, and the others are answered. Only a file's path and what is computed from its pixels are written, nothing of
its header.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from chestxray import files
from chestxray.config import CLASSES, StudyError, printable
from chestxray.images import load
from chestxray.inference import overlay, plain_words
from chestxray.inference.answers import HEAT_MAP, SIDES, Answer, columns, row
from chestxray.inference.interpretation import DECIMALS
from chestxray.inference.reader import BATCH, Reader

FORMATS = (".csv", ".json")


def predict_files(
    paths: Iterable[Path],
    out: Path,
    reader: Reader,
    batch_size: int = BATCH,
    report: Callable[[StudyError], None] | None = None,
    heat_maps: Path | None = None,
    finding: str | None = None,
    others: list[Path] | None = None,
) -> int:
    """Answer for radiographs and folders of them, and write a table or a document.

    Args:
        paths: PNG, JPEG, TIFF or DICOM files, or folders that are searched with their subfolders, in order of names.
        out: the file to write: CSV as `answers.columns` lists, or JSON, by its suffix. It is written when all are
            answered, and not at all where none can be.
        reader: predicts.
        batch_size: radiographs in one call of the model, from 1.
        report: called with the error, one line that names the file, of every file that cannot be used and every folder
            without images; printed on standard error if None.
        heat_maps: a folder for a picture of each radiograph under its heat-map, as PNG.
        finding: the class of the heat-maps; if None, each radiograph's most probable finding.
        others: a list to which files of folders are added that aren't looked at.

    Returns:
        How many were answered.

    Raises:
        StudyError: as `check`; `out` cannot be written, the folder for heat-maps holds radiographs, or the model has no
            heat-maps.
    """
    check(out, batch_size, finding)
    report = report or (lambda error: tqdm.write(str(error), file=sys.stderr))
    found = list(find_files(paths, report, others))
    if heat_maps and heat_maps.resolve() in {place.resolve() for place in {path.parent for path in found}}:
        raise StudyError(f"{heat_maps}: holds radiographs that are read; give --heat-maps another folder")
    pictures = None if heat_maps is None else _Pictures(heat_maps, reader, finding)
    with tqdm(total=len(found), unit="image", desc="predict", disable=None) as bar:

        def unusable(error: StudyError) -> None:
            bar.update()
            report(error)

        named = ((printable(path.as_posix()), path) for path in found)
        answers = reader.stream(named, batch_size, unusable, keep=overlay.LARGEST_SIDE if pictures else 1)
        first = next(answers, None)
        if first is None:
            return 0
        answered = 0
        with files.atomic_path(out) as beside, beside.open("w", encoding="utf-8", newline="") as file:
            table = (_Table if out.suffix.lower() == ".csv" else _Document)(file, reader, pictures is not None)
            for name, answer in itertools.chain([first], answers):
                table.add(name, answer, pictures.add(name, answer) if pictures else "")
                bar.update()
                answered += 1
            table.end()
    return answered


def check(out: Path, batch_size: int = BATCH, finding: str | None = None) -> None:
    """Check the arguments of `predict_files`, before a model is loaded.

    Args:
        out: the file to write.
        batch_size: radiographs in one call of the model.
        finding: the class of the heat-maps, or None.

    Raises:
        StudyError: `out` is a folder, has another suffix or is another table, the batch size is below 1, or the finding
            is unknown.
    """
    if out.is_dir():
        raise StudyError(f"{out}: is a folder; give the name of a file")
    if out.suffix.lower() not in FORMATS:
        raise StudyError(f"{out}: unknown kind of table; give a name that ends in {' or '.join(FORMATS)}")
    if out.suffix.lower() == ".csv" and out.is_file():
        header = ",".join(columns()[:2]).encode()
        with out.open("rb") as file:
            if not header.startswith(file.read(len(header))):  # such as the labels of a folder, which would be lost
                raise StudyError(f"{out}: is there and holds no predictions; give --out another name")
    if batch_size < 1:
        raise StudyError(f"batch size {batch_size}: give 1 or more")
    if finding is not None and finding not in CLASSES:
        raise StudyError(f"finding {finding!r} is unknown; there are: {', '.join(CLASSES)}")


def find_files(
    paths: Iterable[Path], report: Callable[[StudyError], None], others: list[Path] | None = None
) -> Iterator[Path]:
    """Yield files as they are, and the radiographs below folders in order of names; hidden ones are left out.

    Args:
        paths: files or folders.
        report: called with one error for every folder that has no image, or cannot be searched.
        others: a list to which the files below folders are added that are neither hidden nor, by their names, images.
    """

    def unreadable(error: OSError) -> None:
        report(StudyError(f"{error.filename}: cannot be searched ({error.strerror}); check its permissions"))

    for given in paths:
        if not given.is_dir():
            yield given
            continue
        empty = True
        for place, folders, names in os.walk(given, onerror=unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in (Path(place, name) for name in sorted(names) if not name.startswith(".")):
                if load.is_predictable(path):
                    empty = False
                    yield path
                elif others is not None:
                    others.append(path)
        if empty:
            suffixes = ", ".join(load.PREDICTABLE_SUFFIXES)
            report(StudyError(f"{given}: no image in this folder ({suffixes}); give a folder that holds some"))


class _Table:
    """A CSV file to which answers are added."""

    def __init__(self, file: TextIO, reader: Reader, heat_maps: bool) -> None:
        self._writer = csv.writer(file, lineterminator="\n")
        self._writer.writerow(columns(heat_maps))
        self._heat_maps = heat_maps

    def add(self, name: str, answer: Answer, picture: str) -> None:
        self._writer.writerow([*row(name, answer), *([picture] if self._heat_maps else [])])

    def end(self) -> None:
        """Write what follows the last answer: nothing."""


class _Document:
    """A JSON file to which answers are added, each on a line of its own."""

    def __init__(self, file: TextIO, reader: Reader, heat_maps: bool) -> None:
        points = {name: dataclasses.asdict(point) for name, point in reader.interpretation.points.items()}
        for point in points.values():
            point["probability"] = round(point["probability"], DECIMALS)
        file.write(
            f'{{"warning": {json.dumps(plain_words.WARNING)},\n"operating_points": {json.dumps(points)},\n"images": ['
        )
        self._file, self._heat_maps, self._comma = file, heat_maps, ""

    def add(self, name: str, answer: Answer, picture: str) -> None:
        entry: dict[str, Any] = {"image": name}
        for part in ("probabilities", *SIDES):
            entry[part] = {cls: round(value, DECIMALS) for cls, value in getattr(answer, part).items()}
        entry |= {"above": answer.above, "flags": answer.flags}
        if self._heat_maps:
            entry[HEAT_MAP] = picture
        self._file.write(f"{self._comma}\n{json.dumps(entry, ensure_ascii=False)}")
        self._comma = ","

    def end(self) -> None:
        self._file.write("\n]}\n")


class _Pictures:
    """A folder to which radiographs under their heat-maps are added as pictures."""

    def __init__(self, folder: Path, reader: Reader, finding: str | None) -> None:
        self._folder = files.make_folder(folder)
        self._reader, self._finding = reader, finding
        self._taken: set[str] = set()

    def add(self, name: str, answer: Answer) -> str:
        """Write the picture; returns its name."""
        finding = self._finding or answer.finding
        target = self._free_name(Path(name), finding)
        buffer = io.BytesIO()
        heat, note = self._reader.heat_map(answer.pixels, finding), self._reader.interpretation.localisation
        overlay.overlay(answer.pixels, heat, note).save(buffer, "PNG")
        files.atomic_write(self._folder / target, buffer.getvalue())
        return target

    def _free_name(self, source: Path, finding: str) -> str:
        """A name after the file's, with a number where another folder's file has the same."""
        # "1.2.840.113619" is a usual name of a DICOM file, and no suffix.
        stem = source.stem if source.suffix.lower() in load.PREDICTABLE_SUFFIXES else source.name
        name, number = f"{stem}_{finding}.png", 1
        while name.casefold() in self._taken:
            number += 1
            name = f"{stem}_{number}_{finding}.png"
        self._taken.add(name.casefold())
        return name

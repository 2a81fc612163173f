"""Batch prediction: answers for many files as a CSV table or a JSON document, with heat-maps as pictures.

Each answer is written as it comes. A file that cannot be used is reported, and the others are answered. Only a file's
path and what is computed from its pixels are written, nothing of its header.
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

from tqdm import tqdm

from chestxray import files
from chestxray.config import SIX_FINDINGS, StudyError, printable
from chestxray.images import load
from chestxray.inference import answers, overlay, plain_words
from chestxray.inference.reader import BATCH, Reader


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
        out: the file to write: CSV or JSON by its suffix, with `answers.columns`. It is written when all are
            answered, and not at all where none can be.
        reader: predicts.
        batch_size: radiographs in one call of the model, from 1.
        report: called with the error of every file that cannot be used and every folder without images; printed on
            standard error if None.
        heat_maps: a folder for a picture of each radiograph under its heat-map, as PNG.
        finding: the finding of the heat-maps; if None, each radiograph's most probable finding.
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
    if heat_maps:
        files.make_folder(heat_maps)
    taken: set[str] = set()
    with tqdm(total=len(found), unit="image", desc="predict", disable=None) as bar:

        def unusable(error: StudyError) -> None:
            bar.update()
            report(error)

        def rows() -> Iterator[list]:
            named = ((printable(path.as_posix()), path) for path in found)
            for name, answer in reader.stream(named, batch_size, unusable):
                row = answers.row(name, answer)
                if heat_maps:
                    heat_map_of = finding or answer.order[0]
                    row.append(_free_name(taken, Path(name), heat_map_of))
                    heat, note = reader.heat_map(answer.pixels, heat_map_of), reader.interpretation.localisation
                    picture = overlay.overlay(answer.pixels, heat, note)
                    buffer = io.BytesIO()
                    picture.save(buffer, "PNG")
                    files.atomic_write(heat_maps / row[-1], buffer.getvalue())
                bar.update()
                yield row

        return _write(rows(), out, answers.columns(heat_maps is not None), reader)


def check(out: Path, batch_size: int = BATCH, finding: str | None = None) -> None:
    """Check the arguments of `predict_files`, before a model is loaded.

    Args:
        out: the file to write.
        batch_size: radiographs in one call of the model.
        finding: of the heat-maps, or None.

    Raises:
        StudyError: one of them can't be used, or `out` is another table.
    """
    if out.is_dir():
        raise StudyError(f"{out}: is a folder; give the name of a file")
    if out.suffix.lower() not in (".csv", ".json"):
        raise StudyError(f"{out}: unknown kind of table; give a name that ends in .csv or .json")
    if out.suffix.lower() == ".csv" and out.is_file():
        header = ",".join(answers.columns()[:3]).encode()
        with out.open("rb") as file:
            if not header.startswith(file.read(len(header))):  # such as the labels of a folder, which would be lost
                raise StudyError(f"{out}: is there and holds no predictions; give --out another name")
    if batch_size < 1:
        raise StudyError(f"batch size {batch_size}: give 1 or more")
    if finding is not None and finding not in SIX_FINDINGS:
        raise StudyError(f"finding {finding!r} is unknown; there are: {', '.join(SIX_FINDINGS)}")


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


def _write(rows: Iterator[list], out: Path, columns: list[str], reader: Reader) -> int:
    """Write rows as they come, as CSV or JSON; returns how many. Nothing is written where there is none."""
    first = next(rows, None)
    if first is None:
        return 0
    number = 0
    with files.atomic_path(out) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n") if out.suffix.lower() == ".csv" else None
        if table:
            table.writerow(columns)
        else:
            points = {name: dataclasses.asdict(point) for name, point in reader.interpretation.points.items()}
            shares = {"name": reader.prevalence.name, "shares": reader.prevalence.by_class}
            head = {"warning": plain_words.WARNING, "prevalence": shares, "operating_points": points}
            file.write(json.dumps(head).removesuffix("}") + ', "images": [')
        for number, row in enumerate(itertools.chain([first], rows), start=1):
            if table:
                table.writerow(row)
            else:
                entry = json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False)
                file.write(f"{',' if number > 1 else ''}\n{entry}")
        if not table:
            file.write("\n]}\n")
    return number


def _free_name(taken: set[str], source: Path, finding: str) -> str:
    """A heat-map's name after the file's, with a number where another folder's file has the same."""
    # "1.2.840.113619" is a usual name of a DICOM file, and no suffix.
    stem = source.stem if source.suffix.lower() in load.PREDICTABLE_SUFFIXES else source.name
    names = (f"{stem}{'' if number == 1 else f'_{number}'}_{finding}.png" for number in itertools.count(1))
    name = next(name for name in names if name.casefold() not in taken)
    taken.add(name.casefold())
    return name

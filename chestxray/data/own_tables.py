"""Own tables: text, separators, image names and labels as people write them, and the label map.

What is meant without doubt is read as the NIH would write it. `nih_tables` says what of it cannot be used.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from chestxray.config import CLASSES, IMAGE_SUFFIXES, NIH_FINDINGS, NO_FINDING_NIH, Rejection, StudyError, printable

BOX_SPELLING = {"Infiltrate": "Infiltration"}
"""The NIH's box list's spelling of a finding → its image table's."""

MAP_HEADER = ("own label", "study label")
"""Columns of a label map; an empty study label leaves the own label out. The header may be another, or missing."""

OLDEST = 120
"""Ages above this many years are not believed: the first edition of the table has ages up to 414."""

_YEARS_PER_UNIT = {"": 1.0, "Y": 1.0, "M": 1 / 12, "D": 1 / 365.25}
_NEEDED = ("image", "findings", "patient")
_SHORT = {"findings": ("Labels", "Label"), "sex": ("Gender",)}
"""Further names of columns, beside the editions' names and ours."""


def key(text: str) -> str:
    """A label or a column's name in small letters, without `_`, and without blanks and `-` between words."""
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", "", text.strip()).replace("_", "").casefold()


_SPELLINGS = {key(name): name for name in (*NIH_FINDINGS, NO_FINDING_NIH)}
_SPELLINGS |= {key(name): meant for name, meant in BOX_SPELLING.items()}
_UNLABELLED = ("", "nan", "na", "n/a", "null")


def read_text(path: Path) -> tuple[str, list[str]]:
    """Read a text in UTF-8, in UTF-16 that is marked as such, or else in Latin-1; with a note if it is not UTF-8.

    Raises:
        StudyError: the file cannot be read or is no text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding, name in [("utf-16", "UTF-16")] if marked else [("utf-8-sig", ""), ("cp1252", "Latin-1 (cp1252)")]:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            note = f"{path.name}: is not UTF-8 and was read as {name}; save it as UTF-8 if names look wrong"
            return text, [note] if name else []
    raise StudyError(f"{path}: no text in UTF-8, UTF-16 or Latin-1; save the table as CSV in UTF-8")


def _separator(text: str) -> str:
    """The comma, semicolon or tab that parts the columns of a table's header."""
    return max(",;\t", key=text.partition("\n")[0].count)


def read_csv(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read a table, its columns parted by commas, semicolons or tabs, as text; empty cells are "". With notes.

    Empty rows are left out; the index counts the file's rows below the header from 0.

    Raises:
        StudyError: it is no table.
    """
    text, notes = read_text(path)
    try:
        with warnings.catch_warnings():
            # index_col=False: rows that end in a comma which the header lacks must not shift the columns.
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            as_text = {"dtype": str, "keep_default_na": False, "skip_blank_lines": False, "skipinitialspace": True}
            table = pd.read_csv(io.StringIO(text), sep=_separator(text), index_col=False, **as_text)
    except ValueError as error:  # pandas' parser errors
        reason = f"cannot be read as a CSV table ({str(error).splitlines()[0]})"
        raise StudyError(f"{path}: {reason}; correct it or download it again") from error
    table.columns = [str(name).strip() for name in table.columns]
    table = table.fillna("")
    return table[table.ne("").any(axis=1)], notes


def by_value(column: pd.Series, function: Callable[[str], Any]) -> pd.Series:
    """Apply `function` once to each different value: columns have few of them in very many rows.

    Args:
        column: any values.
        function: takes one value.
    """
    return column.map({value: function(value) for value in column.unique().tolist()})  # pandas' own loop is slow


def pick_columns(
    table: pd.DataFrame, columns: Mapping[str, Sequence[str]], path: Path
) -> tuple[pd.DataFrame, list[str]]:
    """Pick the columns of an image table under our names, whatever the case, blanks and `_` of theirs; cells stripped.

    A missing one is empty, which the note says.

    Args:
        table: as `read_csv` gives.
        columns: our name of each column → the names that editions give it.
        path: the table's file, for messages.

    Raises:
        StudyError: the column of images, labels or patients is missing, two columns that differ are meant by one name,
            or there are no rows.
    """
    chosen, absent = {}, []
    # pandas numbers the repetitions of a column's name: "Finding Labels.1".
    plain = {name: key(re.sub(r"\.\d+$", "", name)).rstrip(" #") for name in table.columns}
    for ours, theirs in columns.items():
        names = {key(name).rstrip(" #") for name in (*theirs, ours, *_SHORT.get(ours, ()))}
        found = {name: by_value(table[name], str.strip) for name in table.columns if plain[name] in names}
        first = next(iter(found.values()), "")
        if differing := [name for name, column in found.items() if not column.equals(first)]:
            both = f"columns {next(iter(found))!r} and {differing[0]!r} differ"
            raise StudyError(f"{path}: {both}, and each may be {theirs[0]!r}; keep one")
        chosen[ours] = first
        absent += [] if found else [ours]
    if needed := [columns[ours][0] for ours in absent if ours in _NEEDED]:
        own = [name for name in table.columns if findings(name, {})]
        remedy = "rename or add it" if len(needed) == 1 else "rename or add them"
        if own and "findings" in absent:
            remedy = f"write the labels in {own[0]} and the like into one column, joined by |"
        elif len(table.columns) == 1 or "|" in table.columns[0]:
            remedy = "part the columns by commas, semicolons or tabs"
        what = f"column {needed[0]!r} is" if len(needed) == 1 else f"columns {', '.join(map(repr, needed))} are"
        raise StudyError(f"{path}: {what} missing among {', '.join(table.columns)}; {remedy}")
    if table.empty:
        raise StudyError(f"{path}: has no row to use; add rows")
    missing = ", ".join(columns[ours][0] for ours in absent)
    note = f"{path.name}: no column {missing}: empty, so nothing can be said by it"
    if "follow_up" in absent:
        note += "; each image counts as visit 0, in no order"
    return pd.DataFrame(chosen, index=table.index), [note] if absent else []


def years(text: str) -> int | None:
    """An age in whole years of `58`, `45.5`, `058Y`, `58 years`, `013M` or `005D`; None where not plausible."""
    parts = re.fullmatch(r"(\d{1,6})(?:[.,]\d+)?\s*(Y|YRS?|YEARS?|M|MONTHS?|D|DAYS?|)", text.upper())
    age = int(int(parts[1]) * _YEARS_PER_UNIT[parts[2][:1]]) if parts else OLDEST + 1
    return age if age <= OLDEST else None


def as_one(patients: pd.Series) -> tuple[pd.Series, list[str]]:
    """Write each patient one way: letter case, and zeros before a number, part nobody. A note says how many it joined.

    Args:
        patients: as the table has them, none empty.
    """
    spellings: dict[str, str] = {}
    for name in sorted(patients.dropna().unique().tolist()):
        spellings.setdefault(_patient(name), name)
    one = by_value(patients, lambda name: spellings[_patient(name)])
    joined = [f"{name!r} and {kept!r}" for name, kept in zip(patients, one, strict=True) if name != kept]
    return one, [f"{len(set(joined)):,} spellings of patients are joined, such as {joined[0]}"] if joined else []


def not_frontal(views: pd.Series) -> list[str]:
    """A note on views that are neither PA nor AP; without the empty ones."""
    odd = views[views.ne("")].tolist()
    if not odd:
        return []
    said = f"{len(odd):,} images are of another view than PA or AP, such as {odd[0]!r}"
    return [f"{said}: the study is of frontal radiographs; leave the others out"]


def _patient(name: str) -> str:
    return name.lstrip("0") or "0" if name.isdecimal() else name.casefold()


def image_name(text: str) -> str | None:
    """The file name in an image's name or path; `.png` is added where it has no suffix. None if it is no image."""
    name = text.replace("\\", "/").rpartition("/")[2].strip()
    if not name.lower().endswith(IMAGE_SUFFIXES):
        name = "" if re.search(r"\.[A-Za-z]\w{1,4}$", name) or not name else f"{name}.png"
    return None if name.startswith(".") else name or None


def stem(image: str) -> str:
    """An image's name without suffix and case."""
    return image.rpartition(".")[0].casefold()


def refuse_links_to_nothing(raw: Path) -> None:
    """Refuse a folder where a table or list is a link to nothing: another, or none, would be taken in its place.

    Raises:
        StudyError: there is such a link.
    """
    for path in sorted((*raw.glob("*.csv"), *raw.glob("*.txt"))):
        if not path.exists():
            raise StudyError(f"{path}: is a link to nothing; mend or remove it")


def in_any_case(folder: Path, name: str) -> Path:
    """Find a file by its name in a folder, in other letters if there is none in these; neither need be there.

    Args:
        folder: where to look.
        name: the file's name.
    """
    if (path := folder / name).is_file() or not folder.is_dir():
        return path
    return min((other for other in folder.iterdir() if other.name.casefold() == name.casefold()), default=path)


def read_list(path: Path, images: Iterable[str]) -> set[str]:
    """Read a list of images, one a line.

    Args:
        path: the list.
        images: the names to use: an image of the list is found by its file name, whatever its case and suffix.

    Raises:
        StudyError: the file cannot be read.
    """
    there = {image: stem(image) for image in images}
    known = set(there.values())
    lines = [name for line in read_text(path)[0].splitlines() if (name := line.strip(" \t,;\"'"))]
    if lines and re.fullmatch(r"[A-Za-z_\s]+", lines[0]) and lines[0].casefold() not in known:
        del lines[0]  # the name of the column
    names = {name: stem(name) for line in lines if (name := image_name(line) or line)}
    listed = set(names.values())
    found = {image for image, own in there.items() if own in listed}
    return found | {name for name, own in names.items() if own not in known}


def findings(text: str, own: Mapping[str, str]) -> str | None:
    """The findings of a cell as the NIH spells them, joined by |: "" where the map leaves all of them out.

    None unless all are known, and *No Finding* alone.

    Args:
        text: one label, or several parted by `|`, or else by `;` or `,` where all parts are labels.
        own: a label map, of `read_map`.
    """
    for mark in ("\n", "|", ";", ","):  # first the cell as it is, which an own label with a comma may be
        parts = [key(part) for part in text.split(mark) if part.strip()]
        names = [own.get(part, _SPELLINGS.get(part)) for part in parts]
        if parts and None not in names:
            found = list(dict.fromkeys(name for name in names if name))
            return "|".join(found) if len(found) == 1 or NO_FINDING_NIH not in found else None
    return None


def unlabelled(cell: str) -> bool:
    """Whether a cell says that there is no label, which does not mean that nothing was found."""
    return key(cell) in _UNLABELLED


def unused(cells: Sequence[str], own: Mapping[str, str]) -> list[str]:
    """How many cells have no label, and which labels are neither the study's nor in the map, the most frequent named.

    Args:
        cells: labels of the rows that were left out, joined by |.
        own: a label map, of `read_map`.
    """
    known = {*own, *_SPELLINGS, *_UNLABELLED}
    found = Counter(part.strip() for cell in cells for part in cell.split("|") if key(part) not in known)
    named = ", ".join(f"{label!r} ({count:,} rows)" for label, count in found.most_common(3))
    lines = [f"{len(found):,} unknown labels: {named}{' …' if len(found) > 3 else ''}"] if found else []
    empty = sum(map(unlabelled, cells))
    why = f"{empty:,} rows have no label and are left out; write {NO_FINDING_NIH} where nothing was found"
    return [*lines, why] if empty else lines


def _resembled(label: str) -> str:
    """Which of the seven classes an unknown label looks like, as the NIH spells it; "" if none."""
    if key(label) in ("normal", "healthy", "none"):
        return NO_FINDING_NIH
    names = [key(name) for name in CLASSES]
    close = [name for name in names if name in key(label)] or difflib.get_close_matches(key(label), names, 1, 0.75)
    return _SPELLINGS[close[0]] if close else ""


def class_lost(cells: Iterable[str], there: Iterable[str], own: Mapping[str, str]) -> tuple[str, str]:
    """The first of the seven classes that only rows which were left out show or resemble, and its label there; or "".

    Args:
        cells: labels of the rows that were left out.
        there: findings of the others, joined by |.
        own: a label map, of `read_map`.
    """
    named = set("|".join(there).split("|"))
    for part in dict.fromkeys(part for cell in cells for part in re.split("[|;,]", cell)):
        known = findings(part, own)
        label = _resembled(part) if known is None else known
        if key(label) in map(key, CLASSES) and label not in named:
            return label, part.strip()
    return "", ""


def _is_header(cells: Sequence[str]) -> bool:
    """Whether a label map's first row, of two cells and more, names the columns: nothing in it is like a label."""
    names = [cell for cell in cells if not re.search("(?<!no)findings?$", key(cell))]  # "finding" is like No Finding
    return bool(cells[1]) and not any(_resembled(cell) or key(cell) in _SPELLINGS for cell in names)


def read_map(path: Path) -> dict[str, str]:
    """Read a label map: `key` of the own label → study label as the NIH spells it, or "" where it is left out.

    Raises:
        StudyError: the file cannot be read, a row has not two columns or a label in a third, a study label is unknown,
            or an own label is mapped to two.
    """
    text = read_text(path)[0]
    lines = enumerate(csv.reader(text.splitlines(), delimiter=_separator(text)), 1)
    rows = [(number, [cell.strip() for cell in cells]) for number, cells in lines if any(map(str.strip, cells))]
    found: dict[str, str] = {}
    for number, cells in rows:
        own, *study = cells
        # Alone, such a row is a mistake, which is told below.
        if number == rows[0][0] and study and _is_header(cells) and len(rows) > 1:
            continue
        if not own or not study or any(key(cell) in _SPELLINGS for cell in study[1:]):
            raise StudyError(f"{path}: row {number} {','.join(cells)!r}; write two columns: {', '.join(MAP_HEADER)}")
        label = _SPELLINGS.get(key(study[0])) if study[0] else ""
        if label is None:
            good = ", ".join((*NIH_FINDINGS, NO_FINDING_NIH))
            raise StudyError(f"{path}: row {number}: {study[0]!r} is no study label; give {good}, or leave it empty")
        if found.setdefault(key(own), label) != label:
            raise StudyError(f"{path}: row {number}: {own!r} is mapped to different labels; remove one of the rows")
    if not found:
        raise StudyError(f"{path}: maps no label; write two columns: {', '.join(MAP_HEADER)}")
    return found


def summary(rejected: Sequence[tuple[str, str, str]]) -> list[str]:
    """How many rows, values and images cannot be used, and the first three of them, to print; each `Rejection`'s."""
    if not rejected:
        return []
    first = ", the first three" if len(rejected) > 3 else ""
    lines = [printable(f"  {file}: {value}; {remedy}") for file, value, remedy in rejected[:3]]
    return [f"{len(rejected):,} rows, values or images cannot be used{first}:", *lines]


def rejections_frame(lines: Iterable[Rejection]) -> pd.DataFrame:
    """Rejections as a table: `file`, `value`, `remedy`, sorted by file."""
    table = pd.DataFrame([map(printable, line) for line in lines], columns=list(Rejection._fields))
    return table.sort_values(list(Rejection._fields), ignore_index=True)

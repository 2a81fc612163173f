"""The tables of ChestX-ray14 as validated frames: the images, the lesion boxes, and the official lists.

It owns the tables' oddities (the 2017 and the corrected 2020 edition, ages such as 060Y, *Infiltrate*, trailing empty
columns) and says which rows cannot be used. It must not know pixels, nor who is in which split.
"""

from __future__ import annotations

import csv
import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from chestxray.config import CLASSES, IMAGE_SUFFIXES, NIH_FINDINGS, NO_FINDING_NIH, StudyError

if TYPE_CHECKING:
    import pandera.pandas as pandera


TABLE_NAMES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
"""The image table: the NIH's corrected edition, and its first one."""

SAMPLE_TABLE_NAME = "sample_labels.csv"
"""The image table of Kaggle's sample."""

LAYOUT = "the NIH layout has Data_Entry_2017*.csv, and PNG or JPEG files in images/ or images_001/images/ …"
BOXES_NAME = "BBox_List_2017.csv"
LIST_NAMES = ("train_val_list.txt", "test_list.txt")
OLDEST = 120
"""Ages above this many years are not believed: the first edition of the table has ages up to 414."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("Image Index",),
    "findings": ("Finding Labels",),
    "follow_up": ("Follow-up #",),
    "patient": ("Patient ID",),
    "age": ("Patient Age",),
    "sex": ("Patient Gender", "Patient Sex"),
    "view": ("View Position",),
}
"""Our name of each column and the names that the editions of the table give it."""

TABLE_COLUMNS = ("image", "patient", "follow_up", "age", "sex", "view", "findings", "label")
LABELS: dict[str, str] = {(NO_FINDING_NIH if name == "No_finding" else name): name for name in CLASSES}
"""Finding Labels that equal one class → the class as its folder is named."""

UNLISTED = "without a row"
"""What a rejected image is that has no row in the table."""

_SEXES = {"M": "M", "F": "F", "MALE": "M", "FEMALE": "F"}
_VIEWS = ("PA", "AP")
_YEARS_PER_UNIT = {"": 1.0, "Y": 1.0, "M": 1 / 12, "D": 1 / 365.25}


class Rejection(NamedTuple):
    """One thing that could not be used, as the user reads it."""

    file: str
    value: str
    remedy: str


@dataclass(frozen=True)
class Entries:
    """The image table.

    Attributes:
        source: the file it was read from.
        table: one row an image, sorted by image, with the columns `TABLE_COLUMNS`: `patient` as text, `follow_up`
            int64, `age` Int64 (years, empty where not plausible), `sex` M, F or empty, `view` PA, AP or empty,
            `findings` joined by |, `label` one of the seven classes or empty. Empty texts are "".
        rejected: rows that were left out and values that were emptied, in the table's order.
        rows: rows of the file.
    """

    source: Path
    table: pd.DataFrame
    rejected: tuple[Rejection, ...]
    rows: int


@dataclass(frozen=True)
class Present:
    """The part of the image table whose images are there.

    Attributes:
        table: as `Entries.table`.
        paths: image → its file.
        rejected: images and values that cannot be used, images without a row among them.
        absent: rows of the table that have no image here, which is normal for a part of the dataset.
    """

    table: pd.DataFrame
    paths: dict[str, Path]
    rejected: tuple[Rejection, ...]
    absent: int


def find_table(raw: Path) -> Path:
    """Return the table that lists the images of a folder in the NIH layout.

    Raises:
        StudyError: there is none.
    """
    for name in (*TABLE_NAMES, SAMPLE_TABLE_NAME):
        if (raw / name).is_file():
            return raw / name
    others = sorted(raw.glob("Data_Entry_2017*.csv"))
    if others:
        return others[0]
    raise StudyError(f"{raw}: no Data_Entry_2017*.csv there; {LAYOUT}")


def _read_csv(path: Path) -> pd.DataFrame:
    """Read a table as text; empty cells are "".

    Raises:
        StudyError: it is no CSV table.
    """
    try:
        with warnings.catch_warnings():
            # index_col=False: rows that end in a comma which the header lacks must not shift the columns.
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
    except (ValueError, OSError) as error:  # ValueError covers pandas' parser errors and bad UTF-8
        reason = str(error).splitlines()[0]
        raise StudyError(f"{path}: cannot be read as a CSV table ({reason}); download it again") from error
    table.columns = [str(name).strip() for name in table.columns]
    return table.fillna("")


def _rename(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Pick our columns under our names.

    Raises:
        StudyError: a column is missing.
    """
    chosen = {}
    for ours, theirs in COLUMNS.items():
        known = [name for name in theirs if name in table.columns]
        if not known:
            raise StudyError(
                f"{path}: column {theirs[0]!r} is missing among {', '.join(table.columns)}; "
                "restore the header of the NIH table"
            )
        chosen[ours] = _by_value(table[known[0]], str.strip)
    return pd.DataFrame(chosen)


def _by_value(column: pd.Series, function: Callable[[str], Any]) -> pd.Series:
    """Apply `function` once to each different value: these columns have few of them in very many rows."""
    return column.map({value: function(value) for value in column.unique().tolist()})  # pandas' own loop is slow


def _years(age: pd.Series) -> pd.Series:
    """Ages as whole years, Int64: `58`, `058Y`, `013M` or `005D`; empty where unreadable or not plausible."""

    def years(text: str) -> int | None:
        parts = re.fullmatch(r"(\d{1,6})(?:\.0+)?([YMD]?)", text.upper())
        whole = int(int(parts[1]) * _YEARS_PER_UNIT[parts[2]]) if parts else OLDEST + 1
        return whole if whole <= OLDEST else None

    return _by_value(age, years).astype("Int64")


def _findings_known(findings: pd.Series) -> pd.Series:
    """Whether each cell names only known findings, none twice, and *No Finding* only alone."""

    def known(text: str) -> bool:
        names = text.split("|")
        return text == NO_FINDING_NIH or (set(names) <= set(NIH_FINDINGS) and len(set(names)) == len(names))

    return _by_value(findings, known)


_REMEDIES = {
    "image": "not an image file name: the row is left out; put a PNG or JPEG name there",
    "patient": "no Patient ID, so it cannot be kept out of the other splits: the image is left out; fill it in",
    "follow_up": "not a whole number: the image is left out; correct the table",
    "findings": f"not {NO_FINDING_NIH}, nor findings of ChestX-ray14 joined by |: the image is left out; "
    "use the NIH's spelling",
    "age": f"not an age from 0 to {OLDEST} years: emptied, the image is kept; correct the table to use it",
    "sex": "neither M nor F: emptied, the image is kept; correct the table to use it",
    "view": "neither PA nor AP: emptied, the image is kept; correct the table to use it",
}
_KEEPS_ROW = ("age", "sex", "view")


_CHECKS: dict[str, Callable[[pd.Series], pd.Series]] = {
    "image": lambda s: s.str.fullmatch(r"[^/\\]+\.(?:png|jpe?g)", case=False),
    "patient": lambda s: s.ne(""),
    "follow_up": lambda s: _by_value(s, lambda text: text.isdecimal() and len(text) < 10),
    "findings": _findings_known,
    "age": lambda s: s.eq("") | _years(s).notna(),
    "sex": lambda s: _by_value(s, lambda text: not text or text.upper() in _SEXES),
    "view": lambda s: _by_value(s, lambda text: not text or text.upper() in _VIEWS),
}


@functools.cache
def entries_schema() -> pandera.DataFrameSchema:
    """Schema of the image table as text, under our column names.

    A failure in `age`, `sex` or `view` empties the value; a failure elsewhere leaves the row out.
    """
    import pandera.pandas as pandera  # here, because importing it costs up to a second that `predict` need not pay

    return pandera.DataFrameSchema(
        {name: pandera.Column(None, pandera.Check(check)) for name, check in _CHECKS.items()}
    )


def _failures(table: pd.DataFrame) -> pd.DataFrame:
    """Rows and columns of `table` that break the schema: columns `index`, `column`."""
    none = pd.DataFrame({"index": [], "column": []})
    if all(check(table[name]).all() for name, check in _CHECKS.items()):
        return none  # a sound table, as the NIH's is, need not wait for pandera
    import pandera.errors

    try:
        entries_schema().validate(table, lazy=True)
    except pandera.errors.SchemaErrors as errors:
        return errors.failure_cases[["index", "column"]].sort_values(["index", "column"])
    return none


def _repeated(table: pd.DataFrame) -> tuple[pd.Series, list[Rejection]]:
    """Which rows to leave out because another has the same image, and the lines that say so.

    Equal rows are one row. Rows that contradict each other are all left out: which of them is right cannot be known.
    """
    repeated = table["image"].duplicated(keep=False)
    if not repeated.any():
        return repeated, []
    copies = table[repeated]
    drop = repeated & False
    lines = []
    for image, group in copies.groupby("image", sort=False):
        if len(group.drop_duplicates()) == 1:
            drop[group.index[1:]] = True
            remedy = "the rows are equal: one is kept; remove the others"
        else:
            drop[group.index] = True
            remedy = "the rows contradict each other: the image is left out; keep the right one"
        lines.append(Rejection(image, f"Image Index in {len(group)} rows", remedy))
    return drop, lines


def read_entries(raw: Path) -> Entries:
    """Read and validate the image table of a folder in the NIH layout.

    Args:
        raw: the folder, or the table itself.

    Raises:
        StudyError: there is no table, it lacks a column, or no row of it can be used.
    """
    path = raw if raw.is_file() else find_table(raw)
    text = _rename(_read_csv(path), path)
    rows = len(text)
    drop, lines = _repeated(text)
    text = text[~drop]
    left_out: set[int] = set()
    for index, column in _failures(text).itertuples(index=False):
        row = text.loc[index]
        lines.append(
            Rejection(
                row["image"] or f"{path.name} row {index + 2}",
                f"{COLUMNS[column][0]} {row[column]!r}",
                _REMEDIES[column],
            )
        )
        if column not in _KEEPS_ROW:
            left_out.add(index)
    text = text.drop(index=list(left_out))
    if text.empty:
        raise StudyError(f"{path}: none of its {rows} rows can be used; compare it with the NIH's table")
    table = pd.DataFrame(
        {
            "image": text["image"],
            "patient": text["patient"],
            "follow_up": text["follow_up"].astype("int64"),
            "age": _years(text["age"]),
            "sex": _by_value(text["sex"], lambda sex: _SEXES.get(sex.upper(), "")),
            "view": _by_value(text["view"], lambda view: view.upper() if view.upper() in _VIEWS else ""),
            "findings": text["findings"],
            "label": text["findings"].map(LABELS).fillna(""),
        }
    )
    return Entries(path, table.sort_values("image", ignore_index=True), tuple(lines), rows)


def match_images(entries: Entries, images: Mapping[str, Path]) -> Present:
    """Keep the rows whose image is there.

    An image is found by its name in the table, or by the same name with another image suffix (`.jpg` for `.png`).

    Args:
        entries: the image table.
        images: file name → path, as `sources.find_images` gives.

    Raises:
        StudyError: no image has a row.
    """
    by_stem: dict[str, str] = {}
    for name in sorted(images, reverse=True):  # of a.jpg and a.png, the PNG wins
        by_stem[Path(name).stem] = name

    def file_of(image: str) -> str | None:
        return image if image in images else by_stem.get(image.rsplit(".", 1)[0])

    found = {image: file for image in entries.table["image"] if (file := file_of(image)) is not None}
    if not found:
        example = next(iter(images))
        raise StudyError(
            f"{entries.source}: no row for any of the {len(images)} images, such as {example}; "
            "use the table that belongs to them"
        )
    table = entries.table[entries.table["image"].isin(found)].reset_index(drop=True)
    lines = [  # what is wrong with images that are not here concerns nobody
        line
        for line in entries.rejected
        if not line.file.lower().endswith(IMAGE_SUFFIXES) or file_of(line.file) is not None
    ]
    used = set(found.values()) | {file for line in lines if (file := file_of(line.file)) is not None}
    remedy = f"no row in {entries.source.name}: the image is left out; add a row to use it"
    lines += [Rejection(name, UNLISTED, remedy) for name in images if name not in used]
    absent = len(entries.table) - len(table)
    return Present(table, {image: images[file] for image, file in found.items()}, tuple(lines), absent)


def read_boxes(raw: Path) -> pd.DataFrame:
    """Read the lesion boxes.

    Returns:
        Columns `image`, `finding` (spelt as in the image table), `x`, `y`, `width`, `height` in pixels of the original
        image (1024 px for the NIH's), sorted by image; empty where the source has no boxes. Rows without a usable box
        are left out.

    Raises:
        StudyError: the file is no CSV table or has too few columns.
    """
    names = ["image", "finding", "x", "y", "width", "height"]
    path = raw / BOXES_NAME
    if not path.is_file():
        return pd.DataFrame({name: pd.Series(dtype="str" if name in names[:2] else "float64") for name in names})
    table = _read_csv(path)
    if table.shape[1] < len(names):
        raise StudyError(f"{path}: has {table.shape[1]} columns, not image, finding, x, y, w, h; download it again")
    table = table.iloc[:, : len(names)].set_axis(names, axis=1)
    table["finding"] = table["finding"].str.strip().replace({"Infiltrate": "Infiltration"})
    table["image"] = table["image"].str.strip()
    table[names[2:]] = table[names[2:]].apply(pd.to_numeric, errors="coerce")
    usable = (
        table["finding"].isin(NIH_FINDINGS)
        & table["image"].ne("")
        & table[["x", "y"]].ge(0).all(axis=1)
        & table[["width", "height"]].gt(0).all(axis=1)
    )
    return table[usable].sort_values(["image", "finding", "x", "y"], ignore_index=True)


def read_lists(raw: Path) -> tuple[set[str], set[str]] | None:
    """Read the official lists: the image names of train_val and of test, or None where the source has none.

    Raises:
        StudyError: one of the two files is missing, or an image stands in both.
    """
    paths = [raw / name for name in LIST_NAMES]
    there = [path.is_file() for path in paths]
    if not any(there):
        return None
    if not all(there):
        missing, other = paths if not there[0] else paths[::-1]
        raise StudyError(
            f"{missing}: missing, though {other.name} is there; add it, or remove that one to split by patient"
        )
    return _read_lists(*paths)


def read_lists_for(entries: Entries, train_val: Path, test: Path) -> tuple[set[str], set[str]]:
    """Read two lists that are meant for a table, wherever they lie, as `read_lists` does.

    Raises:
        StudyError: a file is missing or names no image, an image stands in both, or the table lacks one.
    """
    for path in (train_val, test):
        if not path.is_file():
            raise StudyError(f"{path}: no such file; give a list of image names, one a line")
    lists = _read_lists(train_val, test)
    known = {*entries.table["image"].tolist(), *(line.file for line in entries.rejected)}
    for path, names in zip((train_val, test), lists, strict=True):
        if not names:
            raise StudyError(f"{path}: names no image; give a list of image names, one a line")
        if lacking := names - known:
            raise StudyError(
                f"{path}: {entries.source.name} lacks {len(lacking):,} of its {len(names):,} images, such as "
                f"{min(lacking)}; use the list that belongs to the table"
            )
    return lists


def _read_lists(train_val: Path, test: Path) -> tuple[set[str], set[str]]:
    try:
        lists = [set(path.read_text(encoding="utf-8-sig").split()) for path in (train_val, test)]
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{train_val} or {test.name}: no readable text ({error}); download it again") from error
    if both := lists[0] & lists[1]:
        raise StudyError(
            f"{test}: {min(both)} and {len(both) - 1:,} more stand in {train_val.name} too; remove them from one list"
        )
    return lists[0], lists[1]


def oddities(raw: Path) -> pd.DataFrame:
    """Count what the NIH's tables are known to have and reading puts right, in the files as they are.

    Returns:
        One row an oddity, also those that are not there: `file`, `oddity`, `count`, `read as`.

    Raises:
        StudyError: as `read_entries` and `read_boxes`.
    """
    path = find_table(raw)
    table = _read_csv(path)
    text = _rename(table, path)
    age = text["age"].str.upper()
    unit, years = age.str.fullmatch(r"\d+[YMD]"), _years(text["age"])
    number = age.str.fullmatch(r"\d+(?:\.0+)?[YMD]?")
    renamed = sum(any(name in table.columns for name in names[1:]) for names in COLUMNS.values())
    rows = [
        ("columns without a name", _nameless_columns(path), "left out"),
        ("columns under another edition's name", renamed, "the same column"),
        ("ages with a unit, such as 060Y", int(unit.sum()), "whole years"),
        (f"ages above {OLDEST} years", int((number & years.isna()).sum()), "empty"),
        ("ages that are no number", int((~number & text["age"].ne("")).sum()), "empty"),
        (
            "sexes but M and F",
            int((~text["sex"].isin(["M", "F", ""])).sum()),
            "M or F where it can be told, else empty",
        ),
        ("views but PA and AP", int((~text["view"].isin([*_VIEWS, ""])).sum()), "PA or AP in capitals, else empty"),
        ("rows of an image that has another row", int(text["image"].duplicated().sum()), "one, if they are equal"),
    ]
    found = [(path.name, *row) for row in rows]
    if (boxes := raw / BOXES_NAME).is_file():
        table = _read_csv(boxes)
        usable = len(read_boxes(raw))
        named = int(table.iloc[:, 1].str.strip().eq("Infiltrate").sum())
        found += [
            (boxes.name, "columns without a name", _nameless_columns(boxes), "left out"),
            (boxes.name, "boxes of an Infiltrate", named, "Infiltration"),
            (boxes.name, "rows without a usable box", len(table) - usable, "left out"),
        ]
    return pd.DataFrame(found, columns=["file", "oddity", "count", "read as"])


def _nameless_columns(path: Path) -> int:
    """Columns that a trailing comma makes: in the header, or in the rows beyond the header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header, *first = itertools.islice(csv.reader(file), 2)
    beyond = len(first[0]) - len(header) if first else 0
    return sum(not name.strip() for name in header) + max(beyond, 0)


def rejections_frame(lines: Iterable[Rejection]) -> pd.DataFrame:
    """Rejections as a table: `file`, `value`, `remedy`, sorted by file."""
    table = pd.DataFrame(list(lines), columns=list(Rejection._fields))
    return table.sort_values(list(Rejection._fields), ignore_index=True)


NIH_SIDE = 1024
"""Side in pixels of the images that the NIH published, in which its lesion boxes are given."""


def box_side(boxes: pd.DataFrame, image_side: int) -> int:
    """Say in pixels of which image the lesion boxes are.

    The NIH's are in pixels of its 1024-px images, whatever size the images here have been brought to; those of other
    sources are in pixels of the images they came with.

    Args:
        boxes: `x`, `y`, `width`, `height`.
        image_side: side of the raw images here, in pixels.

    Returns:
        `image_side` where all boxes lie inside such an image, else NIH_SIDE.
    """
    ends = max((boxes["x"] + boxes["width"]).max(), (boxes["y"] + boxes["height"]).max())
    return NIH_SIDE if ends > image_side + 1 else image_side

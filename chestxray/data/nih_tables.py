"""NIH tables: the images of ChestX-ray14, its lesion boxes and its official lists, read and checked.

Every file and column name of the NIH stands here. Its oddities (two editions, ages such as 060Y, *Infiltrate*, trailing
empty columns) are put right on reading, and each row or value that cannot be used is listed with the remedy.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from chestxray.config import CLASSES, IMAGE_SUFFIXES, NIH_FINDINGS, NO_FINDING_NIH, Paths, Rejection, StudyError
from chestxray.data import own_tables
from chestxray.data.own_tables import BOX_SPELLING, OLDEST, by_value, read_csv

TABLE_NAMES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
"""The image table: the NIH's corrected edition, and its first one."""

SAMPLE_TABLE_NAME = "sample_labels.csv"
"""The image table of Kaggle's sample."""

LAYOUT = "the NIH layout has Data_Entry_2017*.csv, and PNG, JPEG or TIFF files in images/ or images_001/images/ …"
BOXES_NAME = "BBox_List_2017.csv"
LIST_NAMES = ("train_val_list.txt", "test_list.txt")
VALID_NAME = "valid_list.txt"
Lists = tuple[set[str], ...]
"""Image names of train_val and of test, and where the source says so those of train_val that are validation's."""
NIH_SIDE = 1024
"""Side in pixels of the images that the NIH published, in which its lesion boxes are given."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("Image Index",),
    "findings": ("Finding Labels",),
    "follow_up": ("Follow-up #",),
    "patient": ("Patient ID",),
    "age": ("Patient Age",),
    "sex": ("Patient Gender", "Patient Sex"),
    "view": ("View Position",),
}
"""Our name of each column of the image table and the names that the editions give it, in the order of the file."""

TABLE_HEADER = (
    f"{','.join(names[0] for names in COLUMNS.values())},OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
"""The corrected edition's header, character by character: two brackets hold a comma, so it counts eleven columns."""

BOXES_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
"""The box list's header: four numbers under one name, and three columns without a name."""

TABLE_COLUMNS = ("image", "patient", "follow_up", "age", "sex", "view", "findings", "label")
LABELS: dict[str, str] = {(NO_FINDING_NIH if name == "No_finding" else name): name for name in CLASSES}
"""Finding Labels that equal one class → the class as its folder is named."""

UNLISTED = "without a row"  # the value of the rejection of an image that the table lacks
_SEXES = {"M": "M", "F": "F", "MALE": "M", "FEMALE": "F"}
_VIEWS = {"PA": "PA", "AP": "AP"}


@dataclass(frozen=True)
class Entries:
    """The image table, one row an image, sorted by image, with the columns `TABLE_COLUMNS`.

    `patient` is text, `follow_up` int64, `age` Int64 (empty where not plausible), `sex` M, F or empty, `view` PA,
    AP or empty, `findings` joined by |, `label` one of the seven classes or empty. Empty texts are "".
    """

    source: Path  # the file it was read from
    table: pd.DataFrame
    rejected: tuple[Rejection, ...]  # rows that were left out and values that were emptied, in the file's order
    rows: int  # of the file
    notes: tuple[str, ...] = ()  # what a reader should know, one line each
    fault: Rejection | None = None  # that most rows or all rows of a class are lost, if they are


@dataclass(frozen=True)
class Present:
    """The part of the image table whose images are there."""

    table: pd.DataFrame  # as `Entries.table`
    paths: dict[str, Path]  # image → its file
    rejected: tuple[Rejection, ...]  # images and values that cannot be used, images without a row among them
    absent: int  # rows of the table that have no image here, which is normal for a part of the dataset


def find_table(raw: Path) -> Path:
    """Return the table that lists the images of a folder: by its name in the NIH layout, or the only CSV file there.

    Raises:
        StudyError: there is none, or several; or a table or list is a link to nothing.
    """
    own_tables.refuse_links_to_nothing(raw)
    known = [raw / name for name in (*TABLE_NAMES, SAMPLE_TABLE_NAME)]
    found = [path for path in (*known, *sorted(raw.glob("Data_Entry_2017*.csv"))) if path.is_file()]
    others = [path for path in raw.glob("*.csv") if path.name != BOXES_NAME]
    if found or len(others) == 1:
        return (found or others)[0]
    raise StudyError(f"{raw}: no Data_Entry_2017*.csv there, and {len(others) or 'no'} other CSV files; {LAYOUT}")


class _Rule(NamedTuple):
    """How a cell becomes a value, or None where it cannot be used, and the remedy that is reported then."""

    parse: Callable[[str], Any]
    remedy: str
    keeps_row: bool = False


_EMPTIED = "emptied, the image is kept; correct the table to use it"
_RULES = {
    "image": _Rule(
        own_tables.image_name,
        "not an image file name: the row is left out; put a PNG, JPEG or TIFF name there",
    ),
    "patient": _Rule(
        lambda text: re.sub(r"^(\d+)\.0+$", r"\1", text) or None,  # 9001.0 is patient 9001
        "no Patient ID, so it cannot be kept out of the other splits: the image is left out; fill it in",
    ),
    "follow_up": _Rule(
        lambda text: int(float(text or 0)) if re.fullmatch(r"(\d{1,9}(\.0+)?)?", text) else None,
        "not a whole number: it counts as visit 0, the image is kept; correct the table to use it",
        keeps_row=True,
    ),
    "age": _Rule(own_tables.years, f"not an age from 0 to {OLDEST} years: {_EMPTIED}", keeps_row=True),
    "sex": _Rule(lambda text: _SEXES.get(text.upper()), f"neither M nor F: {_EMPTIED}", keeps_row=True),
    "view": _Rule(
        lambda text: _VIEWS.get(re.split(r"[\W_]", text.upper())[0]), f"neither PA nor AP: {_EMPTIED}", keeps_row=True
    ),
    "findings": _Rule(
        partial(own_tables.findings, own={}),
        f"not {NO_FINDING_NIH}, nor findings of ChestX-ray14 joined by |: the image is left out; "
        "use the NIH's spelling, or map own labels to it (--labels, see README)",
    ),
}


def _without_repeated(text: pd.DataFrame) -> tuple[pd.DataFrame, list[Rejection], int]:
    """The rows less those whose image stands in another row, the report on those, and how many rows are lost.

    Equal rows are one row. Rows that contradict each other are all left out: which of them is right cannot be known.
    """
    names = by_value(text["image"], own_tables.image_name)
    text = text.assign(image=names.where(names.notna(), text["image"]).astype(str))
    names = text["image"].str.casefold()
    drop, lines, lost = [], [], 0
    for _, group in text[names.duplicated(keep=False)].groupby(names, sort=False):
        equal = group.drop(columns="image").duplicated().iloc[1:].all()
        drop += group.index[int(equal) :].tolist()
        remedy = "the rows contradict each other: the image is left out; keep the right one"
        if equal:
            remedy = "the rows are equal: one is kept; remove the others"
        lost += 0 if equal else len(group)
        image = group["image"].iloc[0]
        lines.append(Rejection(image, f"{COLUMNS['image'][0]} in {len(group)} rows", remedy))
    return text.drop(index=drop), lines, lost


def _reject(text: pd.DataFrame, table: pd.DataFrame, file: str) -> tuple[list[Rejection], dict[int, Rejection]]:
    """The cells of `text` that are no value of `table`, and the first one of each row that is lost by it."""
    required = [name for name, rule in _RULES.items() if not rule.keeps_row]
    failed = (table.isna() & (text.ne("") | text.columns.isin(required)))[sorted(_RULES)]
    failed = failed[failed.any(axis=1)].stack()
    lines, lost = [], {}
    for index, column in failed.index[failed]:
        row = f"row {index + 2}: " if column in required else ""
        value = f"{row}{COLUMNS[column][0]} {text.at[index, column]!r}"
        remedy = _RULES[column].remedy
        if column == "findings" and own_tables.unlabelled(text.at[index, column]):
            remedy = f"no label: the image is left out; write {NO_FINDING_NIH} where nothing was found"
        lines.append(Rejection(text.at[index, "image"] or file, value, remedy))
        if row:
            lost.setdefault(index, lines[-1])
    return lines, lost


def read_entries(raw: Path, labels: Path | None = None, strict: bool = True) -> Entries:
    """Read and validate the image table of a folder in the NIH layout.

    Args:
        raw: the folder, or the table itself.
        labels: a label map for own labels, as `own_tables.read_map` reads it.
        strict: whether the loss of most rows or of a whole class is an error; else it is `Entries.fault`.

    Raises:
        StudyError: there is no table, it lacks a column, or no row of it can be used; with `strict`, most rows cannot,
            or none of a class.
    """
    path = raw if raw.is_file() else find_table(raw)
    own = own_tables.read_map(labels) if labels else {}
    sheet, notes = read_csv(path)
    text, absent = own_tables.pick_columns(sheet, COLUMNS, path)
    notes, rows = [*notes, *absent], len(text)
    others = sorted(raw.glob("Data_Entry_2017*.csv"))  # none where the table itself was given
    others = [other.name for other in others if not filecmp.cmp(path, other, shallow=False)]
    notes += [f"{path.name} is read, and {other}, which differs, is not" for other in others]
    text, lines, contradicting = _without_repeated(text)
    parsers = {name: rule.parse for name, rule in _RULES.items()} | {"findings": partial(own_tables.findings, own=own)}
    table = pd.DataFrame({name: by_value(text[name], parse) for name, parse in parsers.items()})
    if labels:
        kept = table["findings"].ne("")
        text, table = text[kept], table[kept]
        notes.append(f"{path.name}: labels are read by {labels.name}, which leaves out {(~kept).sum():,} rows")
    if table.empty:
        raise StudyError(f"{path}: has no row to use; add rows, or map a label to one of the study's")
    more, lost = _reject(text, table, path.name)
    table = table.drop(index=list(lost))
    cells = text.loc[list(lost), "findings"].tolist()
    table["patient"], joined = own_tables.as_one(table["patient"])
    views = text.loc[table.index[table["view"].isna()], "view"]
    more_notes = (*own_tables.unused(cells, own), *joined, *own_tables.not_frontal(views))
    notes += [f"{path.name}: {line}" for line in more_notes]
    count, fault = len(lost) + contradicting, None
    what = f"{count:,} of its {rows:,} rows cannot be used" if 2 * count > rows or table.empty else ""
    label, part = ("", "") if what else own_tables.class_lost(cells, table["findings"].unique(), own)
    if what or label:
        left_out = [*lost.values(), *(line for line in lines if "contradict" in line.remedy)]
        left_out.sort(key=lambda line: part not in line.value)
        examples = ", ".join(f"{line.file} ({line.value})" for line in left_out[:3])
        what = what or f"no row of {label} can be used"
        fault = Rejection(path.name, f"{what}, such as {examples}", left_out[0].remedy.rpartition("; ")[2])
        if strict or table.empty:
            raise StudyError(f"{path}: {fault.value}; {fault.remedy}")
    table = table.fillna({"follow_up": 0, "sex": "", "view": ""}).astype({"follow_up": "int64", "age": "Int64"})
    table["label"] = table["findings"].map(LABELS).fillna("")
    table = table.sort_values("image", ignore_index=True)
    return Entries(path, table, (*lines, *more), rows, tuple(notes), fault)


def read_dataset(paths: Paths, raw: Path | None = None, labels: Path | None = None) -> tuple[Entries, Lists | None]:
    """Read the image table of a dataset, by its label map if it has one, and its official lists.

    Args:
        paths: where the dataset lies.
        raw: a folder to read in place of the dataset's.
        labels: a label map to use in place of the dataset's.
    """
    entries = read_entries(raw or paths.raw, labels or paths.label_map)
    return entries, read_lists(raw or paths.raw, entries)


def match_images(entries: Entries, images: Mapping[str, Path]) -> Present:
    """Keep the rows whose image is there.

    An image is found by its name in the table, or by the same name in other letters or with another image suffix.

    Args:
        entries: the image table.
        images: file name → path, as `sources.find_images` gives.

    Raises:
        StudyError: no image has a row.
    """
    # Of a.jpg and a.png, the PNG wins, and of a.png and a.tif the TIFF: it comes last.
    by_stem = {own_tables.stem(name): name for name in sorted(images)}

    def file_of(image: str) -> str | None:
        return image if image in images else by_stem.get(own_tables.stem(image))

    found = {image: file for image in entries.table["image"] if (file := file_of(image)) is not None}
    if not found:
        raise StudyError(
            f"{entries.source}: no row for any of the {len(images)} images, such as {next(iter(images))}; "
            "use the table that belongs to them"
        )
    table = entries.table[entries.table["image"].isin(found)].reset_index(drop=True)
    rejected = [(line, file_of(line.file)) for line in entries.rejected]
    # Errors of images that are not here are of no use.
    lines = [line for line, file in rejected if file or not line.file.lower().endswith(IMAGE_SUFFIXES)]
    used = {*found.values(), *(file for _, file in rejected)}
    remedy = f"no row in {entries.source.name}: the image is left out; add a row to use it"
    lines += [Rejection(name, UNLISTED, remedy) for name in images if name not in used]
    absent = len(entries.table) - len(table)
    return Present(table, {image: images[file] for image, file in found.items()}, tuple(lines), absent)


def read_boxes(raw: Path) -> pd.DataFrame:
    """Read the lesion boxes, sorted by image: `image`, `finding`, `x`, `y`, `width`, `height` in the original's pixels.

    Rows without a usable box are left out; where the source has no boxes there are none.

    Raises:
        StudyError: the file is no CSV table or has too few columns.
    """
    names = ["image", "finding", "x", "y", "width", "height"]
    if not (path := raw / BOXES_NAME).is_file():
        return pd.DataFrame({name: pd.Series(dtype="str" if name in names[:2] else "float64") for name in names})
    table, _ = read_csv(path)
    if table.shape[1] < len(names):
        raise StudyError(f"{path}: has {table.shape[1]} columns, not image, finding, x, y, w, h; download it again")
    table = table.iloc[:, : len(names)].set_axis(names, axis=1)
    table["finding"] = table["finding"].str.strip().replace(BOX_SPELLING)
    table["image"] = table["image"].str.strip()
    table[names[2:]] = table[names[2:]].apply(pd.to_numeric, errors="coerce")
    usable = table["finding"].isin(NIH_FINDINGS) & table["image"].ne("")
    usable &= table[["x", "y"]].ge(0).all(axis=1) & table[["width", "height"]].gt(0).all(axis=1)
    return table[usable].sort_values(["image", "finding", "x", "y"], ignore_index=True)


def read_lists(raw: Path, entries: Entries | None = None) -> Lists | None:
    """Read the lists: image names of train_val and test, and where there is such a list validation's; None without.

    Args:
        raw: the folder.
        entries: its image table, whose spelling of the names is used.

    Raises:
        StudyError: one of the first two is missing beside another list, an image stands in both, or one of validation
            not in train_val.
    """
    *paths, chosen = [own_tables.in_any_case(raw, name) for name in (*LIST_NAMES, VALID_NAME)]
    there = [path for path in (*paths, chosen) if path.is_file()]
    if not there:
        return None
    if missing := [path for path in paths if path not in there]:
        remedy = "add it, or remove that one to split by patient"
        raise StudyError(f"{missing[0]}: missing, though {there[0].name} is there; {remedy}")
    lists = _read_lists(*paths, entries)
    if chosen not in there:
        return lists
    valid = own_tables.read_list(chosen, lists[0])
    if others := valid - lists[0]:
        raise StudyError(f"{chosen}: {min(others)} is not in {LIST_NAMES[0]}; add it there or remove it here")
    return *lists, valid


def read_lists_for(entries: Entries, train_val: Path, test: Path) -> Lists:
    """Read two lists that are meant for a table, wherever they lie, as `read_lists` does.

    Args:
        entries: the image table as read.
        train_val: the official list of train and validation images.
        test: the official list of test images.

    Raises:
        StudyError: a file cannot be read or names no image, an image stands in both, or the table lacks one.
    """
    lists = _read_lists(train_val, test, entries)
    known = {*entries.table["image"].tolist(), *(line.file for line in entries.rejected)}
    for path, names in zip((train_val, test), lists, strict=True):
        lacking = sorted(names - known)
        some = f"{len(lacking):,} of its {len(names):,} images, such as {', '.join(lacking[:3])}"
        fault = f"{entries.source.name} lacks {some}" if lacking else "" if names else "names no image"
        if fault:
            raise StudyError(f"{path}: {fault}; use the list that belongs to the table, one image name a line")
    return lists


def _read_lists(train_val: Path, test: Path, entries: Entries | None) -> Lists:
    known = [*entries.table["image"], *(line.file for line in entries.rejected)] if entries else []
    lists = own_tables.read_list(train_val, known), own_tables.read_list(test, known)
    if both := lists[0] & lists[1]:
        raise StudyError(
            f"{test}: {min(both)} and {len(both) - 1:,} more stand in {train_val.name} too; remove them from one list"
        )
    return lists


def box_side(boxes: pd.DataFrame, image_side: int) -> int:
    """Side of the image in whose pixels lesion boxes are: `image_side` where all lie inside such an image, else 1024.

    The NIH's are in pixels of its 1024-px images, whatever size these have here; others' in pixels of their own.

    Args:
        boxes: `x`, `y`, `width`, `height`.
        image_side: side of the raw images here, in pixels.
    """
    ends = max((boxes["x"] + boxes["width"]).max(), (boxes["y"] + boxes["height"]).max())
    return NIH_SIDE if ends > image_side + 1 else image_side

from __future__ import annotations

import pandas as pd
import pytest
from conftest import HEADER_2020, tiny_rows, write_table

from chestxray.config import NIH_FINDINGS, StudyError
from chestxray.data import nih_tables, sources

HEADER_2017 = HEADER_2020 + ","
HEADER_SAMPLE = HEADER_2020.replace("[Width,Height]", "Width,OriginalImageHeight").replace(
    "[x,y]", "_x,OriginalImagePixelSpacing_y"
)


def edit(raw, **changes):
    """Rewrite the table of `raw` with the first row's cells changed."""
    names = ["image", "findings", "follow_up", "patient", "age", "sex", "view"]
    rows = tiny_rows()
    for name, value in changes.items():
        rows[0][names.index(name)] = value
    return write_table(raw, rows)


@pytest.mark.parametrize("header", [HEADER_2020, HEADER_2017, HEADER_SAMPLE, HEADER_2020.replace("Gender", "Sex")])
def test_every_edition_reads_the_same(tiny_raw, header):
    expected = nih_tables.read_entries(tiny_raw).table
    rows = [[*row, ""] if header is HEADER_2017 else row for row in tiny_rows()]
    for row in rows:
        row[4] = f"{int(row[4]):03d}Y"
    write_table(tiny_raw, rows, header)
    pd.testing.assert_frame_equal(nih_tables.read_entries(tiny_raw).table, expected)


def test_rows_with_a_comma_that_the_header_lacks_are_not_shifted(tiny_raw):
    write_table(tiny_raw, [[*row, ""] for row in tiny_rows()])
    assert nih_tables.read_entries(tiny_raw).table["patient"].iloc[0] == "1"


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("060Y", 60),
        ("58", 58),
        ("058Y", 58),
        ("013M", 1),
        ("005D", 0),
        ("0", 0),
        ("120", 120),
        ("58.0", 58),
        ("45.5", 45),
        ("58 years", 58),
        ("58 y", 58),
        ("18 months", 1),
        ("", None),
    ],
)
def test_ages(tiny_raw, text, years):
    edit(tiny_raw, age=text)
    entries = nih_tables.read_entries(tiny_raw)
    age = entries.table["age"].iloc[0]
    assert (age is pd.NA) if years is None else (age == years)
    assert entries.rejected == ()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("age", "414"),
        ("age", "411Y"),
        ("age", "old"),
        ("age", "-3"),
        ("sex", "X"),
        ("view", "LL"),
        ("follow_up", "first"),
        ("follow_up", "-1"),
        ("follow_up", "1.5"),
    ],
)
def test_an_implausible_value_is_emptied_and_the_image_kept(tiny_raw, column, value):
    edit(tiny_raw, **{column: value})
    entries = nih_tables.read_entries(tiny_raw)
    assert len(entries.table) == 60
    emptied = entries.table[column].iloc[0]
    assert pd.isna(emptied) if column == "age" else emptied == (0 if column == "follow_up" else "")
    assert len(entries.notes) == (column == "view")
    (line,) = entries.rejected
    assert line.file == "00000001_000.png" and value in line.value and "the image is kept" in line.remedy


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("patient", ""),
        ("findings", "Efusion"),
        ("findings", ""),
        ("findings", "No Finding|Mass"),
        ("findings", "NaN"),
        ("image", "notes.txt"),
        ("image", "a.dcm"),
        ("image", ""),
    ],
)
def test_a_row_that_cannot_be_trusted_is_left_out(tiny_raw, column, value):
    edit(tiny_raw, **{column: value})
    entries = nih_tables.read_entries(tiny_raw)
    assert len(entries.table) == 59 and entries.rows == 60
    (line,) = entries.rejected
    assert line.file and repr(value) in line.value and "left out" in line.remedy


def test_equal_rows_count_once_and_contradicting_rows_not_at_all(tiny_raw):
    rows = tiny_rows()
    other = [rows[5][0], "Mass", *rows[5][2:]] if rows[5][1] != "Mass" else [rows[5][0], "Nodule", *rows[5][2:]]
    write_table(tiny_raw, [*rows, rows[3], other])
    entries = nih_tables.read_entries(tiny_raw)
    assert entries.table["image"].is_unique
    assert {row[0] for row in rows} - set(entries.table["image"]) == {rows[5][0]}
    kept, dropped = entries.rejected
    assert kept.file == rows[3][0] and "one is kept" in kept.remedy
    assert dropped.file == rows[5][0] and "contradict" in dropped.remedy


@pytest.mark.parametrize("column", ["Image Index", "Finding Labels", "Patient ID"])
def test_a_missing_column_is_named(tiny_raw, column):
    write_table(tiny_raw, tiny_rows(), HEADER_2020.replace(column, "Something"))
    with pytest.raises(
        StudyError, match=rf"Data_Entry_2017_v2020\.csv: column '{column}' is missing.*; rename or add it"
    ):
        nih_tables.read_entries(tiny_raw)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00bad", b'Image Index,Finding Labels\n"broken', b"\x89PNG\r\n"])
def test_what_is_no_table_is_one_line(tiny_raw, content):
    (tiny_raw / "Data_Entry_2017_v2020.csv").write_bytes(content)
    with pytest.raises(StudyError) as error:
        nih_tables.read_entries(tiny_raw)
    assert "Data_Entry_2017_v2020.csv" in str(error.value) and "\n" not in str(error.value)


def test_labels_are_single_findings_of_the_seven_classes(tiny_raw):
    table = nih_tables.read_entries(tiny_raw).table.set_index("findings")["label"].groupby(level=0).first()
    assert table["No Finding"] == "No_finding" and table["Mass"] == "Mass"
    assert table["Cardiomegaly"] == "" and table["Effusion|Infiltration"] == ""


def test_absent_images_are_counted_and_images_without_a_row_listed(tiny_raw):
    for name in ("00000001_000.png", "00000002_001.png"):
        (tiny_raw / "images" / name).unlink()
    (tiny_raw / "images" / "00000003_000.png").rename(tiny_raw / "images" / "99.png")
    edit(tiny_raw, age="414")  # of an image that is not there: nobody's concern
    present = nih_tables.match_images(nih_tables.read_entries(tiny_raw), sources.find_images(tiny_raw))
    assert present.absent == 3 and len(present.table) == len(present.paths) == 57
    assert [(line.file, line.value) for line in present.rejected] == [("99.png", "without a row")]


def test_an_image_is_found_under_another_suffix(tiny_raw):
    (tiny_raw / "images" / "00000001_000.png").rename(tiny_raw / "images" / "00000001_000.JPG")
    present = nih_tables.match_images(nih_tables.read_entries(tiny_raw), sources.find_images(tiny_raw))
    assert present.paths["00000001_000.png"].name == "00000001_000.JPG"
    assert present.rejected == () and present.absent == 0


def test_a_table_of_other_images_is_one_line(tiny_raw):
    with pytest.raises(StudyError, match="no row for any of the 1 images"):
        nih_tables.match_images(nih_tables.read_entries(tiny_raw), {"elsewhere.png": tiny_raw / "elsewhere.png"})


def test_boxes(tmp_path):
    (tmp_path / nih_tables.BOXES_NAME).write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "b.png,Infiltrate,10.5,20,30,40,,,\n"
        "a.png,Mass,1,2,3,4,,,\n"
        "a.png,Mass,1,2,-3,4,,,\n"
        "a.png,Unheard of,1,2,3,4,,,\n"
    )
    boxes = nih_tables.read_boxes(tmp_path)
    assert boxes.values.tolist() == [["a.png", "Mass", 1, 2, 3, 4], ["b.png", "Infiltration", 10.5, 20, 30, 40]]
    assert list(boxes) == ["image", "finding", "x", "y", "width", "height"]
    (tmp_path / nih_tables.BOXES_NAME).unlink()
    assert nih_tables.read_boxes(tmp_path).empty


def test_lists(tiny_raw):
    train_val, test = nih_tables.read_lists(tiny_raw)
    assert len(train_val) == 45 and len(test) == 15
    (tiny_raw / "test_list.txt").write_text("00000001_000.png\r\n\r\n00000001_001.png\r\n")
    with pytest.raises(StudyError, match=r"test_list\.txt: 00000001_000\.png and 1 more"):
        nih_tables.read_lists(tiny_raw)
    (tiny_raw / "test_list.txt").unlink()
    with pytest.raises(StudyError, match=r"test_list\.txt: missing"):
        nih_tables.read_lists(tiny_raw)
    valid = (tiny_raw / "train_val_list.txt").rename(tiny_raw / "valid_list.txt")
    with pytest.raises(StudyError, match=r"train_val_list\.txt: missing, though valid_list\.txt is there"):
        nih_tables.read_lists(tiny_raw)
    valid.unlink()
    assert nih_tables.read_lists(tiny_raw) is None


def test_the_whole_table_of_chestxray14(nih):
    """Published counts of the dataset: Wang et al., CVPR 2017, and the NIH's README."""
    entries = nih_tables.read_entries(nih)
    table = entries.table
    assert (len(table), table["patient"].nunique(), len(entries.rejected)) == (112_120, 30_805, 0)
    assert table["label"].value_counts().to_dict() == {
        "": 27_004,
        "No_finding": 60_361,
        "Infiltration": 9_547,
        "Atelectasis": 4_215,
        "Effusion": 3_955,
        "Nodule": 2_705,
        "Pneumothorax": 2_194,
        "Mass": 2_139,
    }
    assert set(table["findings"].str.split("|").explode()) == {*NIH_FINDINGS, "No Finding"}
    train_val, test = nih_tables.read_lists(nih)
    assert (len(train_val), len(test)) == (86_524, 25_596)
    boxes = nih_tables.read_boxes(nih)
    assert len(boxes) == 984 and boxes["finding"].nunique() == 8
    assert ((boxes["x"] + boxes["width"]).max() <= 1024 + 1) and boxes["image"].isin(table["image"]).all()

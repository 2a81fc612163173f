from __future__ import annotations

import re
import shutil

import pandas as pd
import pytest
from conftest import HEADER_2020, tiny_rows, write_table

from chestxray.config import NIH_FINDINGS, StudyError
from chestxray.data import integrity, nih_tables, own_tables, preparation

TABLE = "Data_Entry_2017_v2020.csv"


def rewrite(raw, change):
    """Rewrite the table's text."""
    path = raw / TABLE
    path.write_bytes(change(path.read_text()).encode())


def quoted(text):
    head, *rows = text.splitlines()
    return "\n".join([head, *('"' + row.replace(",", '","') + '"' for row in rows)])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(
            HEADER_2020, HEADER_2020.replace("[Width,Height]", "W,H").replace("[x,y]", "x,y")
        ).replace(",", ";"),
        lambda text: text.replace("[Width,Height]", "").replace("[x,y]", "").replace(",", "\t"),
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        lambda text: text.replace("No Finding", "No_finding"),
        lambda text: text.replace("No Finding", " no finding ").replace("Mass", "MASS").replace("|", " | "),
        lambda text: text.replace("|", ";"),
        lambda text: text.replace("Mass", "Mass|mass").replace("No Finding", "No Finding|No Finding"),
        lambda text: re.sub(r"^(?=0)", "images/", text, flags=re.MULTILINE),
        lambda text: re.sub(r"^(?=0)", r"C:\\data\\images\\", text, flags=re.MULTILINE),
        lambda text: text.replace(".png", ""),
        lambda text: re.sub(r"^(0\d+_\d+\.png,[^,]+,\d)", r" \1.0", text, flags=re.MULTILINE),
        lambda text: text.replace("Image Index", "image_index").replace("Patient ID", "PATIENT  ID"),
        lambda text: text.replace("Image Index", "Image").replace("Finding Labels", "labels"),
        lambda text: text.replace(",PA,", ",pa erect,").replace(",AP,", ",AP_supine,"),
        lambda text: text.replace("\n", "\n\n"),
        quoted,
    ],
)
def test_what_is_meant_without_doubt_is_read_as_the_nih_writes_it(tiny_raw, change):
    expected = nih_tables.read_entries(tiny_raw).table
    rewrite(tiny_raw, change)
    entries = nih_tables.read_entries(tiny_raw)
    pd.testing.assert_frame_equal(entries.table, expected)
    assert entries.rejected == () and entries.notes == ()


@pytest.mark.parametrize(("encoding", "name"), [("latin-1", "Latin-1 (cp1252)"), ("utf-16", "UTF-16")])
def test_an_encoding_that_is_not_utf_8_is_named(tiny_raw, encoding, name):
    path = write_table(tiny_raw, [["é.png", *tiny_rows()[0][1:]], *tiny_rows()[1:]])
    path.write_bytes(path.read_text("utf-8").encode(encoding))
    entries = nih_tables.read_entries(tiny_raw)
    assert "é.png" in entries.table["image"].tolist()
    assert entries.notes == (f"{TABLE}: is not UTF-8 and was read as {name}; save it as UTF-8 if names look wrong",)


def test_only_images_labels_and_patients_are_needed(tiny_raw):
    rows = [[row[0], row[1], row[3]] for row in tiny_rows()]
    write_table(tiny_raw, rows, "Image Index,Finding Labels,Patient ID")
    entries = nih_tables.read_entries(tiny_raw)
    (note,) = entries.notes
    assert "no column Follow-up #, Patient Age, Patient Gender, View Position" in note and "visit 0" in note
    assert len(entries.table) == 60 and entries.table["follow_up"].eq(0).all() and entries.table["age"].isna().all()


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (
            "Image Index,Mass,Effusion,Patient ID",
            "'Finding Labels' is missing .*; write the labels in Mass and the like",
        ),
        (
            "file,finding,Patient ID,Age",
            "columns 'Image Index', 'Finding Labels' are missing among file, .*; rename or add",
        ),
        ("Image Index|Finding Labels", "are missing among .*; part the columns by commas, semicolons or tabs"),
        (
            "Image Index,Finding Labels,Finding Labels,Patient ID",
            "'Finding Labels' and 'Finding Labels.1' differ, .*one",
        ),
        ("Image,Label,Patient ID,patient", "columns 'Patient ID' and 'patient' differ, and each may be 'Patient ID'"),
    ],
)
def test_a_header_that_is_not_understood_says_what_is_needed(tiny_raw, header, said):
    write_table(tiny_raw, [["a.png", "Mass", "Nodule", "1"]], header)
    with pytest.raises(StudyError, match=said):
        nih_tables.read_entries(tiny_raw)


def test_a_patient_written_in_several_ways_is_one(tiny_raw):
    rows, names = tiny_rows(), ["7", "7.0", " 7", "0007", "P7", "p7", "0"]
    for row, name in zip(rows, names, strict=False):
        row[3] = name
    write_table(tiny_raw, rows)
    entries = nih_tables.read_entries(tiny_raw)
    table = entries.table.set_index("image")["patient"]
    assert [table[row[0]] for row in rows[: len(names)]] == ["0007"] * 4 + ["P7"] * 2 + ["0"]
    assert len(entries.notes) == 1 and "2 spellings of patients are joined, such as '7' and '0007'" in entries.notes[0]


def test_the_table_that_is_read_is_named_where_another_differs(tiny_raw):
    other = shutil.copy(tiny_raw / TABLE, tiny_raw / "Data_Entry_2017.csv")
    assert nih_tables.read_entries(tiny_raw).notes == ()
    other.write_text(other.read_text() + "\n")
    assert nih_tables.read_entries(tiny_raw).notes == (
        f"{TABLE} is read, and Data_Entry_2017.csv, which differs, is not",
    )


def test_rows_that_become_one_image_are_repeated_rows(tiny_raw):
    rows = tiny_rows()
    write_table(
        tiny_raw, [*rows, [f"images/{rows[3][0].upper()}", *rows[3][1:]], [rows[4][0][:-4], "Hernia", *rows[5][2:]]]
    )
    entries = nih_tables.read_entries(tiny_raw)
    assert {row[0] for row in rows} - set(entries.table["image"]) == {rows[4][0]}
    assert [line.value for line in entries.rejected] == ["Image Index in 2 rows"] * 2


def test_a_lost_row_is_named_by_file_row_value_and_remedy(tiny_raw):
    rows = tiny_rows()
    for number, label in {3: "Sarcoidosis", 8: "Sarcoidosis", 20: "n/a", 30: ""}.items():
        rows[number][1] = label
    write_table(tiny_raw, rows)
    entries = nih_tables.read_entries(tiny_raw)
    head, first, *_, last = own_tables.summary(entries.rejected)
    assert head == "4 rows, values or images cannot be used, the first three:"
    assert first.startswith(f"  {rows[3][0]}: row 5: Finding Labels 'Sarcoidosis'; ") and "--labels" in first
    assert "row 22" in last and last.endswith(
        "no label: the image is left out; write No Finding where nothing was found"
    )
    assert entries.notes == (
        f"{TABLE}: 1 unknown labels: 'Sarcoidosis' (2 rows)",
        f"{TABLE}: 2 rows have no label and are left out; write No Finding where nothing was found",
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "Mass",
            "Masses",
            r"no row of Mass can be used, such as \S+ \(row 5: Finding Labels 'Masses'\), .*; use the NIH",
        ),
        ("Effusion", "pleural effusion", "no row of Effusion can be used"),
        ("n", "x", r"\d+ of its 60 rows cannot be used, such as 00000001_001\.png \(row 3: .*\), .*; use the NIH"),
    ],
)
def test_a_class_or_most_rows_lost_is_an_error_everywhere(tiny_raw, study_of, old, new, said):
    study = study_of(tiny_raw)
    rows = [[row[0], row[1].replace(old, new), *row[2:]] for row in tiny_rows()]
    write_table(tiny_raw, rows)
    with pytest.raises(StudyError, match=said):
        nih_tables.read_entries(tiny_raw)
    with pytest.raises(StudyError, match=said):
        preparation.make_plan(study)
    report = integrity.verify(tiny_raw)
    (fault,) = report.faults
    assert re.search(said, f"{fault.value}; {fault.remedy}")
    assert any(line.startswith("  ") and "row " in line for line in report.lines())


def test_lists_are_matched_by_the_files_name(tiny_raw, study_of):
    expected = nih_tables.read_lists(tiny_raw)
    entries = nih_tables.read_entries(tiny_raw)
    train_val, test = (tiny_raw / name for name in nih_tables.LIST_NAMES)
    other = test.with_name("Test_List.TXT")
    train_val.write_bytes(train_val.read_text().replace("\n", "\r\n").replace(".png", "").encode())
    other.write_text("Image Index\n" + "".join(f" images/{line.upper()} \n" for line in test.read_text().splitlines()))
    test.unlink()
    assert nih_tables.read_lists(tiny_raw, entries) == expected
    lines = train_val.read_text().splitlines()
    train_val.write_text("\n".join(lines[4:]))
    with pytest.raises(StudyError, match=rf"4 of 60 images here are in neither, such as {lines[0]}\.png, .*; add them"):
        preparation.make_plan(study_of(tiny_raw))
    assert [fault.file for fault in integrity.verify(tiny_raw).faults] == ["the official lists"]


def test_a_label_map_reads_own_labels(tiny_raw, tmp_path, study_of):
    expected = nih_tables.read_entries(tiny_raw).table
    own = {"No Finding": "Normal", "Mass": "Tumour, large", "Cardiomegaly": "Text"}
    rows = [[row[0], f'"{own.get(row[1], row[1])}"', *row[2:]] for row in tiny_rows()]
    write_table(tiny_raw, rows)
    labels = tmp_path / "map.csv"
    labels.write_text('label;class;seen by\nnormal;no_finding;X, Y\n"Tumour, large";MASS\nText;;Z\n')
    entries = nih_tables.read_entries(tiny_raw, labels)
    kept = expected[expected["findings"].ne("Cardiomegaly")].reset_index(drop=True)
    pd.testing.assert_frame_equal(entries.table, kept)
    assert entries.rejected == () and "labels are read by map.csv, which leaves out 6 rows" in entries.notes[0]
    study = study_of(tiny_raw)
    with pytest.raises(StudyError, match=r"no row of No Finding can be used, such as \S+ \(row 6: .*'Normal'\)"):
        preparation.make_plan(study)
    shutil.copy(labels, study.paths.labels)
    assert set(preparation.make_plan(study).table["image"]) == set(kept["image"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Normal,No Findng\n", r"row 1: 'No Findng' is no study label; give Atelectasis, "),
        ("own label,study label\nNormal,Mass\nnormal,Nodule\n", "row 3: 'normal' is mapped to different"),
        ("Normal\n", r"row 1 'Normal'; write two columns: own label, study label"),
        ("Tumour, large,Mass\na,Mass\n", "row 1 'Tumour,large,Mass'; write two columns"),
        ("own,study\n", "'study' is no study label"),
        ("Normal,Healthy\na,Mass\n", "row 1: 'Healthy' is no study label"),
        ("Nodul,Nodules\na,Mass\n", "row 1: 'Nodules' is no study label"),
        ("\n", "maps no label; write two columns"),
    ],
)
def test_a_map_that_cannot_be_used_is_one_line(tmp_path, text, said):
    path = tmp_path / "map.csv"
    path.write_text(text)
    with pytest.raises(StudyError, match=said) as error:
        own_tables.read_map(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_table_without_a_row_to_use_is_one_line(tiny_raw, tmp_path):
    labels = tmp_path / "map.csv"
    labels.write_text("Normal,\n")
    contradicting = [["a.png", "Mass", "1"], ["a.png", "Nodule", "1"]]
    for rows, own in (([], None), ([], labels), ([["a.png", "Normal", "1"]], labels), (contradicting, labels)):
        write_table(tiny_raw, rows, "Image Index,Finding Labels,Patient ID")
        with pytest.raises(StudyError, match=rf"{TABLE}: has no row to use; add rows"):
            nih_tables.read_entries(tiny_raw, own)


def test_every_label_of_the_study_is_a_study_label(tmp_path):
    path = tmp_path / "map.csv"
    path.write_text("".join(f"own {name},{name}\n" for name in (*NIH_FINDINGS, "No Finding")))
    assert list(own_tables.read_map(path).values()) == [*NIH_FINDINGS, "No Finding"]

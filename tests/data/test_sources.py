from __future__ import annotations

import csv

import pytest
from PIL import Image

from chestxray.config import StudyError, open_study
from chestxray.data import nih_tables, sources


def test_a_folder_is_linked_and_not_written(tiny_raw, study_of):
    before = sorted(path.stat().st_mtime_ns for path in tiny_raw.rglob("*"))
    study = study_of(tiny_raw)
    assert study.paths.raw.is_symlink() and study.paths.raw.samefile(tiny_raw)
    assert study.paths.dataset == "tiny"
    sources.prepare_raw(str(tiny_raw), study)
    sources.prepare_raw("tiny", study)  # by name, now that it is there
    assert sorted(path.stat().st_mtime_ns for path in tiny_raw.rglob("*")) == before


def test_a_folder_is_copied_where_links_fail(tiny_raw, study_of, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    study = study_of(tiny_raw)
    assert not study.paths.raw.is_symlink()
    assert len(sources.find_images(study.paths.raw)) == 60
    sources.prepare_raw(str(tiny_raw), study)
    assert sorted(path.name for path in study.paths.data.iterdir()) == ["raw"]


def test_two_folders_of_one_name_are_not_mixed(make_raw, study_of):
    study = study_of(make_raw("a/same", images=20))
    with pytest.raises(StudyError, match="holds another folder"):
        study_of(make_raw("b/same", images=20))
    assert study.paths.raw.resolve().parent.name == "a"


def test_images_are_found_in_the_archives_folders(tmp_path):
    for folder, name in (("images_001/images", "b.png"), ("images_002/images", "a.PNG"), ("images", "c.jpeg")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_bytes(b"x")
    (tmp_path / "images" / "._c.png").write_bytes(b"x")
    (tmp_path / "images" / "notes.txt").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.png").write_bytes(b"x")
    assert list(sources.find_images(tmp_path)) == ["a.PNG", "b.png", "c.jpeg"]


def test_one_name_for_two_files(tmp_path):
    for folder in ("images_001", "images_002"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"same")
    assert len(sources.find_images(tmp_path)) == 1
    (tmp_path / "images_002" / "a.png").write_bytes(b"other")
    with pytest.raises(StudyError, match="same name"):
        sources.find_images(tmp_path)


@pytest.mark.parametrize("missing", ["folder", "images", "table"])
def test_what_is_no_dataset_is_one_line_and_leaves_nothing(tmp_path, study_of, missing):
    folder = tmp_path / "bad"
    if missing != "folder":
        (folder / "images").mkdir(parents=True)
    if missing == "table":
        Image.new("L", (32, 32)).save(folder / "images" / "a.png")
    if missing == "images":
        (folder / "Data_Entry_2017.csv").write_text("Image Index\n")
    with pytest.raises(StudyError) as error:
        study_of(folder)
    assert "bad" in str(error.value) and "NIH layout" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "root").exists()


def test_phantoms_are_drawn_once_in_the_nih_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path))
    study = open_study("phantom", "quick", 5, {"phantom_images": 24, "image_size": 32})
    sources.prepare_raw("phantom", study)
    images = sources.find_images(study.paths.raw)
    with nih_tables.find_table(study.paths.raw).open() as table:
        assert {row["Image Index"] for row in csv.DictReader(table)} == set(images)
    first = {path: path.stat().st_mtime_ns for path in images.values()}
    assert Image.open(next(iter(first))).size == (64, 64)
    sources.prepare_raw("phantom", study)
    assert {path: path.stat().st_mtime_ns for path in images.values()} == first
    fewer = open_study("phantom", "quick", 5, {"phantom_images": 12, "image_size": 32})
    sources.prepare_raw("phantom", fewer)
    assert len(sources.find_images(study.paths.raw)) == 12


def test_the_corrected_edition_of_the_table_is_preferred(tmp_path):
    for name in ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"):
        (tmp_path / name).write_text("")
    assert nih_tables.find_table(tmp_path).name == "Data_Entry_2017_v2020.csv"


def test_real_radiographs_are_all_found(nih):
    assert len(sources.find_images(nih)) == sum(1 for _ in (nih / "images").iterdir())

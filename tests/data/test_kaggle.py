"""Published datasets: mounted copies, kagglehub's cache, and Kaggle itself (a stand-in)."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import types
from pathlib import Path

import pytest
from conftest import write_raw
from faults import note

from chestxray import __main__
from chestxray.config import Paths, StudyError, open_study
from chestxray.data import kaggle as data_kaggle
from chestxray.data import nih_tables, sources

IMAGES = 20


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine of its own: nothing mounted, an empty cache, and datasets of 20 images of 48 px."""
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("CHESTXRAY_MOUNTS", str(tmp_path / "mounts"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nih_tables, "NIH_SIDE", 48)
    small = {
        name: dataclasses.replace(dataset, images=IMAGES, size=100_000)
        for name, dataset in data_kaggle.DATASETS.items()
    }
    monkeypatch.setattr(data_kaggle, "DATASETS", small)


def lay_out(folder: Path, name: str, nested: bool = True) -> Path:
    """Write a copy of a dataset as Kaggle gives it, with the first edition's ages."""
    flat = write_raw(folder.with_name(f"{folder.name}.flat"), images=IMAGES, lists=name == "nih")
    folder.mkdir(parents=True)
    text = (flat / "Data_Entry_2017_v2020.csv").read_text()
    if name == "nih":
        (folder / "Data_Entry_2017.csv").write_text(text)
        for number, image in enumerate(sorted((flat / "images").iterdir())):
            place = folder / f"images_{number // 8 + 1:03d}" / "images"
            place.mkdir(parents=True, exist_ok=True)
            image.rename(place / image.name)
        for path in flat.glob("*.txt"):
            path.rename(folder / path.name)
    else:
        header, *rows = text.splitlines()
        header = header.split("OriginalImage[")[0] + (
            "OriginalImageWidth,OriginalImageHeight,OriginalImagePixelSpacing_x,OriginalImagePixelSpacing_y"
        )
        cells = [row.split(",") for row in rows]
        rows = [",".join([*row[:4], f"{int(row[4]):03d}Y", *row[5:]]) for row in cells]
        (folder / "sample_labels.csv").write_text("\n".join([header, *rows]) + "\n")
        inner = folder / "sample" if nested else folder
        inner.mkdir(exist_ok=True)
        (flat / "images").rename(inner / "images")
    shutil.rmtree(flat)
    return folder


@pytest.mark.parametrize("place", ["data", "nih-chest-xrays-data", "datasets/nih-chest-xrays/data"])
def test_a_mounted_copy_is_used_in_place(tmp_path, place):
    mounted = lay_out(tmp_path / "mounts" / place, "nih")
    study = open_study("nih", "quick", 1)
    sources.prepare_raw("nih", study)
    assert (study.paths.raw / "images_001").resolve() == mounted / "images_001"
    assert len(sources.find_images(study.paths.raw)) == IMAGES
    sources.prepare_raw("nih", study)


@pytest.mark.parametrize("nested", [True, False])
def test_the_sample_as_kaggle_lays_it_out(tmp_path, nested, capsys):
    lay_out(tmp_path / "mounts" / "sample", "nih-sample", nested)
    study = open_study("nih-sample", "quick", 1)
    sources.prepare_raw("nih-sample", study)
    assert nih_tables.find_table(study.paths.raw).name == "sample_labels.csv"
    assert len(sources.find_images(study.paths.raw)) == IMAGES
    assert __main__.main(["verify", "nih-sample"]) == 0
    assert "Nothing is wrong" in capsys.readouterr().out


def test_the_sample_is_prepared(tmp_path):
    from chestxray.data import preparation

    lay_out(tmp_path / "mounts" / "sample", "nih-sample")
    study = open_study("nih-sample", "quick", 1, {"image_size": 32, "no_finding": 8})
    sources.prepare_raw("nih-sample", study)
    manifest = preparation.prepare(study, workers=1).manifest
    assert len(manifest) == IMAGES and manifest["age"].between(20, 80).all()


def test_the_two_datasets_and_parts_are_told_apart(tmp_path):
    lay_out(tmp_path / "mounts" / "sample", "nih-sample")
    assert not data_kaggle.find_copy(data_kaggle.DATASETS["nih"])
    part = lay_out(tmp_path / "mounts" / "data", "nih")
    shutil.rmtree(part / "images_001")
    assert not data_kaggle.find_copy(data_kaggle.DATASETS["nih"])


def test_kagglehubs_cache_is_used(tmp_path):
    folder = tmp_path / "cache" / "datasets" / "nih-chest-xrays" / "data"
    lay_out(folder / "versions" / "3", "nih")
    lay_out(folder / "versions" / "4", "nih")
    assert not data_kaggle.find_copy(data_kaggle.DATASETS["nih"])  # neither is complete
    (folder / "3.complete").touch()
    study = open_study("nih", "quick", 1)
    sources.prepare_raw("nih", study)
    assert (study.paths.raw / "images_001").resolve() == folder / "versions" / "3" / "images_001"


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A stand-in for kagglehub that serves `tmp_path/kaggle`; set `error` to make it fail."""
    hub = types.ModuleType("kagglehub")
    hub.error, hub.asked = None, []

    def dataset_download(handle):
        hub.asked.append(handle)
        if hub.error:
            raise hub.error
        folder = tmp_path / "cache" / "datasets" / "nih-chest-xrays" / "data"
        shutil.copytree(tmp_path / "kaggle", folder / "versions" / "3")
        (folder / "3.complete").touch()
        return str(folder / "versions" / "3")

    hub.dataset_download = dataset_download
    monkeypatch.setitem(sys.modules, "kagglehub", hub)
    lay_out(tmp_path / "kaggle", "nih")
    return hub


def test_a_download_is_verified_and_what_is_broken_is_named_with_its_place_on_kaggle(kaggle, monkeypatch, capsys):
    sources.prepare_raw("nih", open_study("nih", "quick", 1))
    assert kaggle.asked == ["nih-chest-xrays/data"]
    assert __main__.main(["verify", "nih"]) == 0
    assert "Nothing is wrong" in capsys.readouterr().out
    raw = Paths("nih").raw
    images = list(sources.find_images(raw).values())
    images[0].write_bytes(images[0].read_bytes()[:-30])
    images[9].unlink()
    (raw / "test_list.txt").unlink()
    monkeypatch.setattr(data_kaggle, "_FIRST_FOLDER", 8)
    assert __main__.main(["verify", "nih"]) == 1
    said = capsys.readouterr().out
    assert f"{images[0].name}: " in said and "does not end as a PNG does" in said and "test_list.txt" in said
    missing = f"{images[9].name}: is not there; fetch images_002/images/{images[9].name} of Kaggle's"
    assert f"{missing} nih-chest-xrays/data" in said


def test_kaggle_that_cannot_be_reached_is_one_line(tmp_path, kaggle, capsys):
    kaggle.error = RuntimeError("403 Client Error.\n\nYou don't have permission")
    with pytest.raises(StudyError) as error:
        sources.prepare_raw("nih", open_study("nih", "quick", 1))
    assert "cannot be fetched (403 Client Error.)" in str(error.value) and "--dataset" in str(error.value)
    assert not (tmp_path / "root").exists()
    note("Kaggle refuses", error.value, tmp_path / "root")
    kaggle.error = type("ConnectTimeout", (type("ConnectionError", (OSError,), {}),), {})("HTTPSConnectionPool(…" * 50)
    with pytest.raises(StudyError, match=r"\(no connection\)"):
        sources.prepare_raw("nih", open_study("nih", "quick", 1))


def test_space_is_checked_before_kaggle_is_asked(kaggle, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=150_000))
    with pytest.raises(StudyError, match="KAGGLEHUB_CACHE"):
        sources.prepare_raw("nih", open_study("nih", "quick", 1))
    assert kaggle.asked == []


def test_the_folder_of_an_image_follows_the_nihs_counts():
    places = [1, 4_999, 5_000, 14_999, 15_000, 104_999, 105_000, 112_120]
    folders = [1, 1, 2, 2, 3, 11, 12, 12]
    for place, folder in zip(places, folders, strict=True):
        assert data_kaggle.folder_on_kaggle(place - 1) == f"images_{folder:03d}/images"

"""The reference's radiographs: the committed list, and how an original becomes one of them."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import types
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_rows, write_table
from faults import note
from PIL import Image

from chestxray import __main__
from chestxray.config import Paths, StudyError, open_study
from chestxray.data import kaggle, sources, subset

NAMES = [row[0] for row in tiny_rows(12)]
LISTED, LARGER = NAMES[:10], NAMES[2:8]
"""Of a full copy with twelve originals ten are listed, and six of these at 256 px too."""


def test_the_list_has_every_image_of_the_reference():
    rows = subset.read_list()
    assert list(rows) == sorted(rows) and len(rows) == 9424
    assert Counter(row.list for row in rows.values()) == {"train_val": 7465, "test": 1959}
    assert {row.list == "test" for row in rows.values() if row.split == "test"} == {True}
    assert sum(bool(row.sha256_256) for row in rows.values()) == 3315
    split_of = {}
    for row in rows.values():
        assert split_of.setdefault(row.image[:8], row.split) == row.split  # a patient's images stay together


def test_an_original_is_reduced_by_these_rules():
    pixels = np.random.default_rng(3).integers(0, 256, (1024, 1024), np.uint8)
    small, large = subset.reduce(pixels), subset.reduce_256(pixels)
    assert small.shape == (128, 128) and large.shape == (256, 256) and small.dtype == large.dtype == np.uint8

    def mean(values: list[int]) -> int:  # halves up
        return (2 * sum(values) + len(values)) // (2 * len(values))

    for row, column in np.random.default_rng(4).integers(0, 128, (200, 2)).tolist():
        block = pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].tolist()
        means = [mean([block[y + i][x + j] for i in (1, 2) for j in (1, 2)]) for y in (0, 4) for x in (0, 4)]
        assert small[row, column] == mean(means)
        sixteen = [value for line in block[:4] for value in line[:4]]
        assert large[2 * row, 2 * column] == round(Fraction(sum(sixteen), 16))  # halves to even
    with pytest.raises(StudyError, match=r"\(512, 512\)"):
        subset.reduce(pixels[:512, :512])
    with pytest.raises(StudyError, match="int64"):
        subset.reduce_256(pixels.astype(np.int64))


def test_the_natives_become_the_radiographs_to_the_bit(nih_native):
    rows, seen = subset.read_list(), [0, 0]
    for path in sorted(nih_native.rglob("*.png")):
        pixels, row = np.asarray(Image.open(path)), rows[path.name]
        assert hashlib.sha256(subset.reduce(pixels).tobytes()).hexdigest() == row.sha256_128
        seen[0] += 1
        if row.sha256_256:
            assert hashlib.sha256(subset.reduce_256(pixels).tobytes()).hexdigest() == row.sha256_256
            seen[1] += 1
    assert seen == [22, 20]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A machine of its own with `full` (originals as on Kaggle), `small` (128 px) and `larger` (256 px), and a list."""
    for name, place in {"CHESTXRAY_ROOT": "root", "CHESTXRAY_MOUNTS": "mounts", "KAGGLEHUB_CACHE": "cache"}.items():
        monkeypatch.setenv(name, str(tmp_path / place))
    rng, rows = np.random.default_rng(5), [subset.COLUMNS]
    for number, name in enumerate(NAMES):
        pixels = np.kron(rng.integers(0, 256, (256, 256), np.uint8), np.ones((4, 4), np.uint8))
        save(tmp_path / "full" / f"images_{number // 5 + 1:03d}" / "images" / name, pixels)
        small, larger = subset.reduce(pixels), subset.reduce_256(pixels)
        if name in LISTED:
            save(tmp_path / "small" / "images" / name, small)
            official, split = ("test", "test") if number < 3 else ("train_val", "valid" if number < 6 else "train")
            rows.append((name, official, split, hashlib.sha256(small.tobytes()).hexdigest(), ""))
        if name in LARGER:
            save(tmp_path / "larger" / name, larger)
            rows[-1] = (*rows[-1][:4], hashlib.sha256(larger.tobytes()).hexdigest())
    write_table(tmp_path / "full", tiny_rows(12)).rename(tmp_path / "full" / "Data_Entry_2017.csv")
    write_table(tmp_path / "small", tiny_rows(12))
    (tmp_path / "list.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    monkeypatch.setattr(subset, "LIST", tmp_path / "list.csv")
    monkeypatch.setitem(kaggle.DATASETS, "nih", dataclasses.replace(kaggle.DATASETS["nih"], images=12, size=12_000))
    monkeypatch.setattr(kaggle, "_FIRST_FOLDER", 5)
    monkeypatch.setattr(kaggle, "_OTHER_FOLDERS", 5)
    return tmp_path


def provide(*folders: Path) -> Path:
    study = open_study("nih_9k", "quick", 1)
    sources.prepare_raw("nih_9k", study, folders)
    return study.paths.raw


def test_radiographs_are_taken_from_folders_and_verified(world, capsys):
    before = {path: path.read_bytes() for path in world.rglob("*.png")}
    raw = provide(world / "small")
    assert "0 of 6 radiographs at 256 px are here" in capsys.readouterr().out
    assert (raw / "images" / NAMES[0]).resolve() == world / "small" / "images" / NAMES[0]
    assert sorted(sources.find_images(raw)) == LISTED
    for name, names in {"test": LISTED[:3], "train_val": LISTED[3:], "valid": LISTED[3:6]}.items():
        assert (raw / f"{name}_list.txt").read_text().split() == names
    provide(world / "larger")  # adds to what is there
    assert sorted(path.name for path in (raw / "images_256").iterdir()) == LARGER
    assert sorted(sources.find_images(raw)) == LISTED  # not two files of one name
    assert {path: path.read_bytes() for path in before} == before
    assert __main__.main(["verify", "nih_9k"]) == 0
    assert "10 images of 128 px, 6 of 256 px" in capsys.readouterr().out
    (raw / "images" / NAMES[0]).unlink()
    save(raw / "images" / NAMES[11], np.zeros((128, 128), np.uint8))
    for place in (raw / "images" / NAMES[1], raw / "images_256" / NAMES[2]):
        pixels = np.asarray(Image.open(place)).copy()
        pixels[5, 5] ^= 1
        place.unlink()
        save(place, pixels)
    (raw / "images_256" / NAMES[3]).unlink()
    assert __main__.main(["verify", "nih_9k"]) == 1
    said = capsys.readouterr().out
    assert "6 wrong" in said  # the sixth: the unexpected one is in neither list
    for name, fault in {
        NAMES[0]: "is not there",
        NAMES[1]: "its pixels differ",
        NAMES[11]: "is not in",
        f"images_256/{NAMES[2]}": "its pixels differ",
        f"images_256/{NAMES[3]}": "is not there",
    }.items():
        assert f"  {name}: {fault}" in said


def test_a_full_copy_is_reduced_and_goes_on_where_it_was_stopped(world, capsys):
    full = world / "full"
    save(full / "images_001" / "images" / NAMES[1], np.zeros((1024, 1024), np.uint8))
    (full / "images_002" / "images" / NAMES[6]).write_bytes(b"no image")
    raw = Paths("nih_9k").raw
    with pytest.raises(StudyError, match=f"2 of 10 radiographs missing at 128 px, such as {NAMES[1]}, {NAMES[6]};"):
        provide(full)
    assert not raw.exists()
    said = capsys.readouterr().out
    assert "Files refused: 2, such as" in said and "no PNG" in said
    assert f"{NAMES[1]}: its pixels, brought to 128 px, differ from list.csv" in said
    made = {path: path.stat().st_mtime_ns for path in raw.with_name("raw.unfinished").rglob("*.png")}
    assert len(made) == 8 + 5
    (raw.with_name("raw.unfinished") / "images" / f".{NAMES[1][:-4]}.tmp-1.png").write_bytes(b"of a killed run")
    provide(world / "small")
    assert sorted(path.name for path in (raw / "images").iterdir()) == LISTED
    for path, time in made.items():
        moved = raw / path.relative_to(raw.with_name("raw.unfinished"))
        assert not moved.is_symlink() and moved.stat().st_mtime_ns == time
    assert "5 of 6 radiographs at 256 px are here" in capsys.readouterr().out
    subset.require_equal(raw, sources.find_images(raw))  # stage 2.1 needs those at 128 px only
    assert __main__.main(["verify", "nih_9k"]) == 1
    assert f"images_256/{NAMES[6]}: is not there" in capsys.readouterr().out
    for folder, names in ((raw / "images", LISTED), (raw / "images_256", set(LARGER) - {NAMES[6]})):
        place = world / ("small/images" if folder.name == "images" else "larger")
        for name in names:
            assert np.array_equal(Image.open(folder / name), Image.open(place / name))


def test_a_mounted_copy_is_found_and_copied_where_there_are_no_links(world, monkeypatch):
    def symlink_to(*_: object, **__: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    (world / "mounts").mkdir()
    (world / "full").rename(world / "mounts" / "data")
    (world / "small").rename(world / "mounts" / "data" / "small")
    raw = provide()
    assert not any(path.is_symlink() for path in raw.rglob("*"))
    assert len(list((raw / "images").iterdir())) == 10 and len(list((raw / "images_256").iterdir())) == 6


def test_folders_that_cannot_serve_are_named(world):
    (world / "empty").mkdir()
    (world / "lacks" / "images").mkdir(parents=True)
    (world / "small" / "images" / NAMES[0]).rename(world / "lacks" / "images" / NAMES[0])
    write_table(world / "lacks", tiny_rows(3))
    for place, name in {
        "nowhere": "a folder that is not there",
        "empty": "a folder without listed radiographs",
        "larger": "radiographs without the image table",
        "lacks": "a table of other images",
        "small": "a listed radiograph is missing",
    }.items():
        with pytest.raises(StudyError) as error:
            provide(world / place)
        note(name, str(error.value).replace(str(world), "…"), world / "root")
        assert not Paths("nih_9k").raw.exists()


@pytest.fixture
def hub(world, monkeypatch):
    """A stand-in for kagglehub that serves `full` file by file; `broken` are names that it refuses."""
    hub = types.ModuleType("kagglehub")
    hub.asked, hub.broken = [], {}
    cache = world / "cache" / "datasets" / "nih-chest-xrays" / "data" / "versions" / "3"

    def dataset_download(handle, path):
        assert handle == "nih-chest-xrays/data" + "/versions/3" * path.startswith("images")
        hub.asked.append(Path(path).name)
        if error := hub.broken.get(Path(path).name):
            raise error
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        (cache / path).write_bytes((world / "full" / path).read_bytes())
        return str(cache / path)

    hub.dataset_download = dataset_download
    monkeypatch.setitem(sys.modules, "kagglehub", hub)
    (world / "full" / "BBox_List_2017.csv").write_text("Image Index,Finding Label,Bbox [x,y,w,h],,,\n")
    return hub


def test_listed_files_are_fetched_from_kaggle_and_only_those_that_are_lacking(world, hub, monkeypatch, capsys):
    monkeypatch.setattr(kaggle, "_MEASURED", 4)
    hub.broken = {NAMES[4]: RuntimeError("404 Client Error.\n\nResource not found")}
    with pytest.raises(StudyError) as error:
        provide()
    assert NAMES[4] in str(error.value) and "(404 Client Error.)" in str(error.value)
    assert "1 of 10 files failed" in str(error.value)
    note("Kaggle refuses a file", error.value, world / "root")
    assert not Paths("nih_9k").raw.exists() and not set(NAMES[10:]) & set(hub.asked)
    said = capsys.readouterr().out
    assert "first edition" in said and "10 images, about 10 kB, are fetched" in said
    hub.asked.clear()
    hub.broken = {}
    raw = provide()
    assert [name for name in hub.asked if name.endswith(".png")] == [NAMES[4]]
    (world / "cache").rename(world / "removed")  # nothing hangs on it
    assert len(sources.find_images(raw)) == 10 and len(list((raw / "images_256").iterdir())) == 6
    assert __main__.main(["verify", "nih_9k"]) == 0


def test_the_time_is_told_and_a_lost_connection_ends_it(world, hub, monkeypatch, capsys):
    monkeypatch.setattr(kaggle, "_MEASURED", 4)
    provide()
    assert "the other 6 are about" in capsys.readouterr().out
    (world / "root").rename(world / "before")
    monkeypatch.setattr(kaggle, "_PATIENCE", 3)
    monkeypatch.setattr(kaggle, "_AT_A_TIME", 1)
    lost = type("ConnectionError", (OSError,), {})("HTTPSConnectionPool(…")
    hub.broken, hub.asked = dict.fromkeys(NAMES, lost), []
    with pytest.raises(StudyError, match=r"\(no connection\)"):
        provide()
    assert sum(name.endswith(".png") for name in hub.asked) == 3

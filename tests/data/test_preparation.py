from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_pixels, tiny_rows, write_table
from faults import note
from killing import killed
from PIL import Image

from chestxray import files
from chestxray.config import CLASSES, SPLITS, Paths, StageMissing, StudyError
from chestxray.data import integrity, preparation, sources
from chestxray.data.manifest import MANIFEST_COLUMNS, prepared_fingerprint, raw_side, read_manifest, store_path
from chestxray.images import pixels
from chestxray.images.pixels import decode, prepare_pixels
from chestxray.pipeline.staleness import raw_fingerprint


def fingerprint(folder: Path) -> dict[str, str]:
    """Relative path → hash of every file of a dataset, raw left out."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "raw" not in path.relative_to(folder).parts
    }


def save_16_bit(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels.astype(np.uint16) * 257).save(path)


def save_palette(pixels: np.ndarray, path: Path) -> None:
    image = Image.fromarray(255 - pixels).convert("P")
    image.putpalette([grey for value in range(255, -1, -1) for grey in (value,) * 3])
    image.save(path)


def raw_png(samples: np.ndarray, depth: int, colour: int) -> bytes:
    """A PNG in a form that Pillow reads but does not write: (H, W) or (H, W, channels) samples of 1 to 16 bits."""
    rows = samples.reshape(len(samples), -1)
    if depth == 16:
        lines = rows.astype(">u2").view(np.uint8)
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        lines = np.packbits(bits.reshape(len(rows), -1), axis=1)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def save_deep(channels: int, opaque: bool, colour: int) -> Callable[[np.ndarray, Path], object]:
    """A writer of 16-bit PNGs with some equal channels, and an opaque one after them if wanted."""

    def save(pixels: np.ndarray, path: Path) -> None:
        layers = [pixels.astype(np.uint16) * 257] * channels + [np.full(pixels.shape, 65535, np.uint16)] * opaque
        path.write_bytes(raw_png(np.stack(layers, axis=2), 16, colour))

    return save


WRITERS = {
    "8-bit.png": lambda pixels, path: Image.fromarray(pixels).save(path),
    "16-bit.png": save_16_bit,
    "rgb.png": lambda pixels, path: Image.fromarray(pixels).convert("RGB").save(path),
    "rgba.png": lambda pixels, path: Image.fromarray(pixels).convert("RGBA").save(path),
    "grey-alpha.png": lambda pixels, path: Image.fromarray(pixels).convert("LA").save(path),
    "palette.png": save_palette,
    "16-bit-rgb.png": save_deep(3, False, 2),
    "16-bit-rgba.png": save_deep(3, True, 6),
    "16-bit-grey-alpha.png": save_deep(1, True, 4),
    "interlaced.png": lambda pixels, path: Image.fromarray(pixels).save(path, interlace=1),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_depth_and_colour_gives_the_same_grey_values(tmp_path, name):
    pixels = np.arange(256, dtype=np.uint8).repeat(16).reshape(64, 64)
    WRITERS[name](pixels, tmp_path / name)
    read = decode(tmp_path / name)
    assert read.dtype == np.uint8 and read.shape == (64, 64)
    assert np.abs(read.astype(int) - pixels).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_grey_values_are_spread_over_the_whole_range(tmp_path, depth):
    values = np.arange(32 * 32).reshape(32, 32) % 2**depth
    (tmp_path / "a.png").write_bytes(raw_png(values, depth, 0))
    assert np.array_equal(decode(tmp_path / "a.png"), values * (255 // (2**depth - 1)))


JPEGS = {
    "grey.jpg": lambda pixels, path: Image.fromarray(pixels).save(path, quality=100),
    "colour.jpg": lambda pixels, path: Image.fromarray(pixels).convert("RGB").save(path, quality=100),
}


@pytest.mark.parametrize("name", [*WRITERS, *JPEGS])
def test_real_radiographs_have_the_same_grey_values_in_every_form(nih, tmp_path, name):
    writers = WRITERS | JPEGS
    paths = list(sources.find_images(nih).values())
    for source in paths[:: max(1, len(paths) // 20)][:20]:
        pixels = decode(source)
        writers[name](pixels, tmp_path / name)
        read = decode(tmp_path / name)
        if name in JPEGS:
            with Image.open(tmp_path / name) as image:  # each channel of the file holds the grey values
                held = np.asarray(image).reshape(*pixels.shape, -1)
            assert (read[..., None] == held).all(), source.name
            # What the file holds isn't quite the radiograph: quality 100 rounds the cosine coefficients of 8 × 8 blocks
            # to whole numbers. Each moves by 0.5 at most, hence the pixels, before they are rounded too, by no more in
            # the root mean square; 0.3 is usual. A lone 2 in a black block has no frequency of 0.5 and becomes 0.
            apart = read.astype(int) - pixels
            assert np.sqrt(np.mean(apart**2)) <= 0.5 and np.abs(apart).max() <= 2, source.name
        else:
            assert np.array_equal(read, pixels), source.name
        prepared = [prepare_pixels(one, 64).astype(int) for one in (read, pixels)]
        assert np.abs(prepared[0] - prepared[1]).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_gives_the_same_grey_values_on_the_average(tmp_path, mode):
    # A JPEG itself departs by a few grey values from pixel to pixel; a smooth image shows what decoding adds.
    pixels = np.tile(np.linspace(20, 230, 64), (64, 1)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(decode(tmp_path / "a.jpg").astype(int) - pixels).max() <= 1


def test_a_true_16_bit_radiograph_keeps_its_range(tmp_path):
    deep = np.linspace(0, 65535, 1024).round().astype(np.uint16).reshape(32, 32)
    Image.fromarray(deep).save(tmp_path / "a.png")
    assert np.abs(decode(tmp_path / "a.png") - deep / 65535 * 255).max() <= 0.5


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_greys_of_fewer_bits_are_read_by_the_range_that_they_use(tmp_path, bits):
    eight = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)
    Image.fromarray(np.rint(eight / 255 * (2**bits - 1)).astype(np.uint16)).save(tmp_path / "a.png")
    assert np.array_equal(decode(tmp_path / "a.png"), eight)
    assert pixels.largest_value(tmp_path / "a.png") == 2**bits - 1
    assert np.array_equal(decode(tmp_path / "a.png", 16), np.rint(eight / 255 * (2**bits - 1) / 257))


def test_12_bits_in_16_bit_colour_are_refused(tmp_path):
    grey = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    (tmp_path / "a.png").write_bytes(raw_png(np.stack([grey] * 3, axis=2), 16, 2))
    with pytest.raises(StudyError, match="at most 14 are used; save it as 16-bit grey"):
        decode(tmp_path / "a.png")


def test_a_dataset_has_one_depth_and_what_it_changes_is_made_anew(tiny_raw, study_of):
    def save(name: str, bits: int, index: int, brightest: int) -> np.ndarray:
        eight = np.minimum(tiny_pixels(index), brightest)
        Image.fromarray(np.rint(eight / 255 * (2**bits - 1)).astype(np.uint16)).save(tiny_raw / "images" / name)
        return prepare_pixels(eight, 32).astype(int)

    names = [row[0] for row in tiny_rows()]
    dark, bright = save(names[0], 12, 0, 50), save(names[1], 12, 1, 255)  # the dark one alone would use 10 bits
    study = study_of(tiny_raw)
    stored = [store_path(study.paths.store, name) for name in names[:2]]
    before = preparation.prepare(study)
    assert before.notes[-1] == (
        "16-bit files hold 12-bit greys (largest value 3,212 in 2 files): read as such; 1 of 2 stay within 10 bits, "
        f"such as {names[0]}: if these are 10-bit files, put them into a folder of their own."
    )
    for path, wanted in zip(stored, (dark, bright), strict=True):
        assert np.abs(np.asarray(Image.open(path)) - wanted).max() <= 1
    assert preparation.prepare(study).made == 0
    save(names[2], 16, 2, 255)
    after = preparation.prepare(study)
    assert after.made == 3 and "16-bit greys (largest value" in after.notes[-1]
    assert f"; 2 of 3 stay within 12 bits, such as {names[0]}, {names[1]}: if" in after.notes[-1]
    assert [line.file for line in integrity.verify(tiny_raw).faults] == names[:2]
    assert np.abs(np.asarray(Image.open(stored[1])) - bright / 16).max() < 1.5
    same = before.manifest["sha256"].eq(after.manifest["sha256"])
    assert same.tolist() == [False] * 3 + [True] * 57


def test_transparent_pixels_are_black_and_a_turned_jpeg_stands_upright(tmp_path):
    layers = np.full((32, 32, 4), 200, np.uint8)
    layers[:16, :, 3] = 0
    layers[16:, :, 3] = 255
    Image.fromarray(layers).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png")[[0, 31], 0].tolist() == [0, 200]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((32, 48), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert decode(tmp_path / "a.jpg").shape == (48, 32)


def broken_files(folder: Path) -> dict[str, str]:
    """Write one file of every kind of damage; return name → what the message must say of it."""
    whole = folder / "whole.png"
    Image.fromarray(tiny_pixels(0)).save(whole)
    data = whole.read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"not an image, but a note")
    (folder / "flipped.png").write_bytes(data[:60] + bytes([data[60] ^ 255]) + data[61:])
    Image.new("L", (8, 8)).save(folder / "small.png")
    Image.fromarray(tiny_pixels(0)).save(folder / "really a.gif")
    (folder / "really a.gif").rename(folder / "gif.png")
    return {
        "truncated.png": "broken",
        "empty.png": "0 bytes",
        "text.png": "no PNG, JPEG or TIFF",
        "flipped.png": "broken",
        "small.png": "8 × 8 px",
        "gif.png": "no PNG, JPEG or TIFF",
        "absent.png": "cannot be read",
    }


def test_every_broken_file_is_one_line_with_file_value_and_remedy(tmp_path):
    for name, words in broken_files(tmp_path).items():
        with pytest.raises(StudyError) as error:
            decode(tmp_path / name)
        message = str(error.value)
        assert name in message and words in message and "; " in message and "\n" not in message


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("image: cut off", "truncated.png"),
        ("image: 0 bytes", "empty.png"),
        ("image: a text called PNG", "text.png"),
        ("image: a bit flipped in the pixels", "flipped.png"),
        ("image: 8 × 8 px", "small.png"),
        ("image: a GIF called PNG", "gif.png"),
        ("image: 30,000 × 30,000 px promised", "bomb.png"),
        ("image: gone since it was listed", "absent.png"),
        ("image: a folder called PNG", "folder.png"),
    ],
)
def test_a_broken_image_is_left_out_and_the_others_are_stored(tmp_path, fault, name):
    from test_integrity import bomb

    broken_files(tmp_path)
    (tmp_path / "bomb.png").write_bytes(bomb())
    (tmp_path / "folder.png").mkdir()
    store = tmp_path / "images"
    paths = {one: tmp_path / one for one in ("whole.png", name)}
    hashes, rejected, made = preparation.store_images(paths, store, 32)
    assert list(hashes.index) == ["whole.png"] and made == 1
    assert [path.name for path in store.iterdir()] == ["whole.png"]
    (line,) = rejected
    assert line.file == name and line.value and line.remedy.startswith("the image is left out; ")
    note(fault, ", ".join(line), store)


@pytest.mark.parametrize(
    ("fault", "form", "said"),
    [
        ("image: 16 bits a pixel", "16-bit.png", "no message: used, scaled to 8 bits"),
        ("image: colour", "rgb.png", "no message: used, as luma"),
        ("image: transparency", "grey-alpha.png", "no message: used, transparent pixels black"),
        ("image: a palette", "palette.png", "no message: used, as luma"),
        ("image: a JPEG called PNG", "jpeg.jpg", "no message: used, told by its first bytes"),
        ("image: not square", "wide.png", "no message: used, padded with black to a square"),
    ],
)
def test_an_unusual_image_is_used(tmp_path, fault, form, said):
    writers = WRITERS | {
        "jpeg.jpg": lambda pixels, path: Image.fromarray(pixels).save(path),
        "wide.png": lambda pixels, path: Image.fromarray(pixels[:20]).save(path),
    }
    writers[form](tiny_pixels(0), tmp_path / form)
    (tmp_path / form).rename(tmp_path / "a.png")
    hashes, rejected, _ = preparation.store_images({"a.png": tmp_path / "a.png"}, tmp_path / "images", 32)
    assert list(hashes.index) == ["a.png"] and rejected == []
    assert Image.open(tmp_path / "images" / "a.png").size == (32, 32)
    note(fault, said, tmp_path / "images")


def test_a_huge_image_is_refused(tmp_path, monkeypatch):
    Image.new("L", (400, 400)).save(tmp_path / "a.png")
    monkeypatch.setattr(pixels, "MOST_PIXELS", 10_000)
    with pytest.raises(StudyError, match="more than 10,000 pixels"):
        decode(tmp_path / "a.png")


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(tiny_pixels(1)).save(path)
        data = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 4):
                damaged[place] = rng.integers(256)
            path.write_bytes(bytes(damaged))
            try:
                assert decode(path).dtype == np.uint8
            except StudyError as error:
                assert "\n" not in str(error)


def test_resizing_is_by_area(tmp_path):
    pixels = tiny_pixels(3, 64)
    blocks = pixels.reshape(16, 4, 16, 4).mean(axis=(1, 3))
    assert np.abs(prepare_pixels(pixels, 16) - blocks).max() <= 1
    assert np.array_equal(prepare_pixels(pixels, 64), pixels)
    assert prepare_pixels(pixels, 100).shape == (100, 100)


def test_a_radiograph_is_padded_not_squeezed():
    prepared = prepare_pixels(np.full((40, 80), 100, np.uint8), 20)
    assert prepared.shape == (20, 20)
    assert (prepared[:5] == 0).all() and (prepared[5:15] == 100).all() and (prepared[15:] == 0).all()


def test_stage_2_1_writes_store_trees_and_manifest(tiny_study):
    done = preparation.prepare(tiny_study)
    paths, manifest = tiny_study.paths, read_manifest(tiny_study.paths)
    assert tuple(manifest) == MANIFEST_COLUMNS
    assert len(manifest) == 60 and manifest["image"].is_monotonic_increasing and set(manifest["split"]) == set(SPLITS)
    assert manifest.groupby("patient")["split"].nunique().max() == 1
    pd.testing.assert_frame_equal(manifest, done.manifest, check_dtype=False)
    assert manifest["balanced_test"].dtype == bool and manifest["balanced_test"].sum() % len(CLASSES) == 0
    for row in manifest.itertuples():
        stored = store_path(paths.store, row.image)
        assert hashlib.sha256(stored.read_bytes()).hexdigest() == row.sha256
        place = paths.tree(row.split) / row.label / stored.name
        assert place.exists() == row.selected
        if row.selected:
            assert place.samefile(stored)
    image = Image.open(stored)
    assert image.mode == "L" and image.size == (32, 32)
    source = decode(paths.raw / "images" / row.image)
    assert np.array_equal(np.asarray(image), prepare_pixels(source, 32))
    files_of_trees = [path for split in SPLITS for path in paths.tree(split).rglob("*.png")]
    assert len(files_of_trees) == manifest["selected"].sum()
    assert all((paths.tree(split) / label).is_dir() for split in SPLITS for label in CLASSES)
    assert done.rejected.empty and paths.rejected.read_text() == "file,value,remedy\n"


def test_a_manifest_without_a_column_is_one_line(prepared_study):
    path = prepared_study.paths.manifest
    pd.read_csv(path, dtype=str).drop(columns=["balanced_test"]).to_csv(path, index=False)
    with pytest.raises(StudyError, match=r"manifest\.csv: lacks the column 'balanced_test'; run stage 2.1 again"):
        read_manifest(prepared_study.paths)


def test_a_second_run_makes_nothing_and_threads_do_not_matter(tiny_study):
    preparation.prepare(tiny_study, workers=3)
    data = tiny_study.paths.data
    first, times = fingerprint(data), {path: path.stat().st_mtime_ns for path in tiny_study.paths.store.iterdir()}
    again = preparation.prepare(tiny_study, workers=1)
    assert again.made == 0 and fingerprint(data) == first
    assert {path: path.stat().st_mtime_ns for path in tiny_study.paths.store.iterdir()} == times
    files.remove(tiny_study.paths.store)
    assert preparation.prepare(tiny_study, workers=1).made == 60
    assert fingerprint(data) == first


def test_two_runs_in_two_places_give_the_same_bytes(tiny_study, tiny_raw, tmp_path):
    from chestxray.data import augmentation

    other = dataclasses.replace(tiny_study, paths=Paths("tiny", tmp_path / "other"))
    sources.prepare_raw(str(tiny_raw), other)
    for study, workers in ((tiny_study, 2), (other, 1)):
        manifest = preparation.prepare(study, workers=workers).manifest
        augmentation.write(study, augmentation.plan(manifest, study.seed), workers)
    found = fingerprint(other.paths.data)
    assert found == fingerprint(tiny_study.paths.data) and any("train_augmented/" in name for name in found)


PREPARES = """
from chestxray import config
from chestxray.data import preparation
study = config.open_study(sys.argv[1], "quick", 2024, {"image_size": 32, "no_finding": 8})
preparation.prepare(study)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("moves", [20, 75, 105])
def test_a_killed_and_resumed_run_ends_in_the_same_bytes(tiny_study, moves):
    """Killed while storing (60 moves), while linking (after them), and before the manifest."""
    whole = preparation.prepare(tiny_study)
    expected, data = fingerprint(tiny_study.paths.data), tiny_study.paths.data
    assert 60 + whole.manifest["selected"].sum() + 2 >= moves, "the run must be alive when it is killed"
    for place in list(data.iterdir()):
        if place.name != "raw":
            files.remove(place)
    killed(PREPARES, moves, tiny_study.paths.dataset)
    assert not tiny_study.paths.manifest.exists()
    assert any(files.TEMPORARY in path.name for path in data.rglob(".*"))
    resumed = preparation.prepare(tiny_study)
    assert 0 < resumed.made < 60 or moves > 60
    assert fingerprint(data) == expected


def test_other_parameters_make_the_dataset_anew(tiny_raw, study_of):
    preparation.prepare(study_of(tiny_raw))
    changed = study_of(tiny_raw, seed=7, image_size=40, no_finding=3)
    paths = changed.paths
    for stranger in ("train/Mass/stranger.png", "train/Unknown/a.png", "images/old.png", "train_augmented/Mass/a.png"):
        files.atomic_write(paths.data / stranger, b"left over")
    files.atomic_write(paths.augmented_rows, b"file\n")
    assert preparation.prepare(changed).made == 60
    reached = fingerprint(paths.data)
    for place in list(paths.data.iterdir()):
        if place.name != "raw":
            files.remove(place)
    preparation.prepare(changed)
    assert fingerprint(paths.data) == reached


def test_a_source_that_changed_is_prepared_again(tiny_study):
    preparation.prepare(tiny_study)
    source = tiny_study.paths.raw / "images" / "00000001_000.png"
    Image.fromarray(tiny_pixels(99)).save(source)
    assert preparation.prepare(tiny_study).made == 1
    stored = np.asarray(Image.open(store_path(tiny_study.paths.store, source.name)))
    assert np.array_equal(stored, prepare_pixels(tiny_pixels(99), 32))


def test_one_bad_run_of_everything_keeps_the_good_rest(tiny_raw, study_of):
    images = tiny_raw / "images"
    names = [row[0] for row in tiny_rows()]
    broken = {"truncated.png": 0, "empty.png": 1, "text.png": 2, "flipped.png": 3}
    broken_files(tiny_raw)
    for name, index in broken.items():
        (tiny_raw / name).replace(images / names[index])
    save_16_bit(tiny_pixels(4), images / names[4])
    (images / "unlisted.png").write_bytes((images / names[5]).read_bytes())
    rows = tiny_rows()
    rows[6][4], rows[7][5] = "414", "X"
    write_table(tiny_raw, [*rows, rows[8], [rows[9][0], "Hernia", *rows[9][2:]]])
    study = study_of(tiny_raw)
    done = preparation.prepare(study)
    assert set(done.manifest["image"]) == set(names) - {names[index] for index in (0, 1, 2, 3, 9)}
    rejected = pd.read_csv(study.paths.rejected)
    assert list(rejected) == ["file", "value", "remedy"] and rejected.notna().all(axis=None)
    assert sorted(rejected["file"]) == sorted([*(names[i] for i in (0, 1, 2, 3, 6, 7, 8, 9)), "unlisted.png"])
    stored = {path.name for path in study.paths.store.iterdir()}
    assert stored == set(done.manifest["image"])
    table = done.manifest.set_index("image")
    assert pd.isna(table.loc[names[6], "age"]) and table.loc[names[7], "sex"] == ""
    assert fingerprint(study.paths.data) == fingerprint(preparation.prepare(study) and study.paths.data)


def no_files(images: Path) -> dict[str, str]:
    """Put what is no image file in the place of images; return name → what is said of each."""
    said = {}
    for name, value in (
        ("00000001_000.png", "is a link to nothing"),
        ("00000001_001.png", "cannot be read (Too many levels of symbolic links)"),
        ("00000001_002.png", "is a folder"),
        ("00000002_000.png", "is a folder"),
        ("00000002_001.png", "is a pipe, socket or device"),
    ):
        said[name] = value
        (images / name).unlink()
    nothing, loop, folder, link, pipe = said
    (images / nothing).symlink_to("nowhere")
    (images / loop).symlink_to(loop)
    (images / folder).mkdir()
    (images / link).symlink_to(images, target_is_directory=True)
    os.mkfifo(images / pipe)
    return said


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_what_is_no_file_is_named_left_out_and_counted(tiny_raw, study_of):
    said = no_files(tiny_raw / "images")
    study = study_of(tiny_raw)
    done = preparation.prepare(study)
    assert len(done.manifest) == 55
    assert dict(zip(done.rejected["file"], done.rejected["value"], strict=True)) == said
    names = ("image: is a link to nothing", "image: is a pipe, socket or device")
    for name, row in zip(names, done.rejected.iloc[[0, 4]].itertuples(index=False), strict=True):
        note(name, ", ".join(row), study.paths.store / row.file)
    faults = integrity.verify(tiny_raw).faults
    assert {fault.file: fault.value for fault in faults} == said
    before = raw_fingerprint(tiny_raw)
    (tiny_raw / "images" / "00000001_000.png").unlink()
    assert raw_fingerprint(tiny_raw) != before
    (tiny_raw / "test_list.txt").unlink()
    (tiny_raw / "test_list.txt").symlink_to("nowhere")
    with pytest.raises(StudyError, match=r"test_list\.txt: is a link to nothing; mend or remove it"):
        preparation.prepare(study)


def test_a_mended_image_moves_nobody_else(tiny_raw, study_of):
    source = tiny_raw / "images" / "00000001_000.png"
    whole = source.read_bytes()
    source.write_bytes(whole[:100])
    before = preparation.prepare(study_of(tiny_raw)).manifest
    source.write_bytes(whole)
    after = preparation.prepare(study_of(tiny_raw)).manifest
    assert len(before) == 59 and len(after) == 60
    pd.testing.assert_frame_equal(after.iloc[1:].reset_index(drop=True), before)


def test_no_readable_image_at_all(tiny_raw, study_of):
    for path in (tiny_raw / "images").iterdir():
        path.write_bytes(b"")
    study = study_of(tiny_raw)
    with pytest.raises(StudyError, match=r"none of the 60 images can be read, e\.g\. 00000001_000\.png: 0 bytes"):
        preparation.prepare(study)
    assert not study.paths.manifest.exists()


def test_a_class_with_few_patients_is_told(tiny_raw, study_of):
    rows = [row for row in tiny_rows() if row[1] != "Mass" or int(row[3]) < 8]
    write_table(tiny_raw, rows)
    done = preparation.prepare(study_of(tiny_raw))
    assert any("No model: training needs" in note and "lacks Mass (2 patients" in note for note in done.notes)


def test_a_full_disk_is_one_line_and_leaves_no_manifest(tiny_study, monkeypatch):
    preparation.prepare(tiny_study)
    files.remove(tiny_study.paths.store)
    moves, replace = [], Path.replace

    def full(self, target):
        moves.append(target)
        if len(moves) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StudyError, match="No space left on device") as error:
        preparation.prepare(tiny_study)
    assert "\n" not in str(error.value)
    assert not tiny_study.paths.manifest.exists()
    assert not [path for path in tiny_study.paths.data.rglob(".*") if files.TEMPORARY in path.name]
    assert all(decode(path).shape == (32, 32) for path in tiny_study.paths.store.iterdir())


def test_an_error_in_the_tables_leaves_the_prepared_dataset(tiny_study):
    preparation.prepare(tiny_study)
    before = fingerprint(tiny_study.paths.data)
    table = tiny_study.paths.raw / "Data_Entry_2017_v2020.csv"
    table.write_text(table.read_text().replace("Patient ID", "Person"))
    with pytest.raises(StudyError, match="'Patient ID' is missing"):
        preparation.prepare(tiny_study)
    assert fingerprint(tiny_study.paths.data) == before


def test_two_suffixes_of_one_name(tiny_raw, study_of):
    Image.fromarray(tiny_pixels(70)).save(tiny_raw / "images" / "00000002_000.jpg")
    rows = tiny_rows()
    write_table(tiny_raw, [*rows, ["00000002_000.jpg", "Mass", *rows[3][2:]]])
    done = preparation.prepare(study_of(tiny_raw))
    assert len(done.manifest) == 60
    assert done.rejected["value"].tolist() == ["name used twice"]


def test_earlier_stages_are_asked_for(tmp_path, monkeypatch, tiny_study):
    with pytest.raises(StageMissing, match=r"manifest\.csv is missing: run stage 2\.1 first"):
        read_manifest(tiny_study.paths)
    with pytest.raises(StageMissing, match=r"manifest\.csv is missing: run stage 2\.1 first"):
        prepared_fingerprint(tiny_study.paths)
    tiny_study.paths.raw.unlink()
    for read in (preparation.make_plan, lambda study: raw_side(study.paths)):
        with pytest.raises(StageMissing, match="run stage 1 first"):
            read(tiny_study)

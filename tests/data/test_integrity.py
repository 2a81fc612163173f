"""Verification finds what is wrong with each file and table, and nothing where nothing is."""

from __future__ import annotations

import io
import struct
import zlib

import pandas as pd
import pytest
from faults import note
from PIL import Image

from chestxray import __main__, files
from chestxray.data import integrity, nih_tables, sources

NAME = "00000003_001.png"


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


def rechecked(data: bytes) -> bytes:
    """Destroy pixels of a PNG but keep its checksums right, as a fault before writing does."""
    place = data.index(b"IDAT")
    length = struct.unpack(">I", data[place - 4 : place])[0]
    body = b"IDAT" + b"\x55" * length
    return data[:place] + body + struct.pack(">I", zlib.crc32(body)) + data[place + 8 + length :]


def as_gif(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, "GIF")
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 8 × 8 pixels whose header says 30,000 × 30,000, with its checksum."""
    data = png(8, 8)
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


BREAKS = {
    "image: 0 bytes": (lambda data: b"", "0 bytes"),
    "image: cut off": (lambda data: data[:-40], "does not end as a PNG does"),
    "image: cut off in its header": (lambda data: data[:20], "broken PNG header"),
    "image: header damaged": (lambda data: flipped(data, 18), "broken PNG header"),
    "image: a web page": (lambda data: b"<html>no</html>", "no PNG, JPEG or TIFF"),
    "image: a bit flipped in the pixels": (lambda data: flipped(data, len(data) // 2), "bad header checksum in"),
    "image: pixels destroyed before it was written": (rechecked, "broken ("),
    "image: bytes after its end": (lambda data: data + b"more", "does not end as a PNG does"),
    "image: a GIF called PNG": (lambda data: as_gif(data), "no PNG, JPEG or TIFF"),
    "image: 8 × 8 px": (lambda data: png(8, 8), "too small for a radiograph"),
    "image: 30,000 × 30,000 px promised": (lambda data: bomb(), "pixels; save it smaller"),
    "image: JPEG header damaged": (lambda data: b"\xff\xd8\xff\xe0" + bytes(90), "broken (its header)"),
    "image: JPEG cut off": (lambda data: b"\xff\xd8\xff\xe0" + data[:90], "broken ("),
}


def test_a_dataset_of_tiffs(tiny_raw):
    for path in (tiny_raw / "images").iterdir():
        Image.open(path).save(path.with_suffix(".tif"), compression="tiff_lzw")
        path.unlink()
    report = integrity.verify(tiny_raw, full=True)
    assert report.notes[0].startswith(f"{tiny_raw}: 60 images, ") and report.faults == ()
    bad = tiny_raw / "images" / "00000001_000.tif"
    with Image.open(bad) as image:
        pages, floats = [image.copy()] * 2, image.convert("F")
    pages[0].save(bad, save_all=True, append_images=pages[1:])
    assert "several pages" in integrity.verify(tiny_raw, full=True).faults[0].value
    floats.save(bad)
    assert "another kind than 8- or 16-bit" in integrity.verify(tiny_raw, full=True).faults[0].value


def test_nothing_is_wrong_with_a_good_folder(tiny_raw, capsys):
    report = integrity.verify(tiny_raw)
    size = files.gigabytes(sum(path.stat().st_size for path in (tiny_raw / "images").iterdir()))
    table = "Data_Entry_2017_v2020.csv: 60 images listed, 0 of them not here; 0 images here without a row"
    assert report == ((), (f"{tiny_raw}: 60 images, {size}: 60 of 48 × 48 px", table, "decoded: 60"))
    assert __main__.main(["verify", str(tiny_raw)]) == 0
    assert "Nothing is wrong." in capsys.readouterr().out


def test_a_patient_in_both_lists_is_a_fault(tiny_raw):
    rows = pd.read_csv(tiny_raw / "Data_Entry_2017_v2020.csv", index_col=False)
    train_val = set((tiny_raw / "train_val_list.txt").read_text().split())
    moved = next(
        group for _, group in rows.groupby("Patient ID") if len(group) > 1 and {*group["Image Index"]} <= train_val
    )
    name = moved["Image Index"].iloc[0]
    (tiny_raw / "train_val_list.txt").write_text("\n".join(train_val - {name}))
    with (tiny_raw / "test_list.txt").open("a") as file:
        file.write(f"\n{name}\n")
    (fault,) = integrity.verify(tiny_raw).faults
    assert fault.value.startswith(f"patient {moved['Patient ID'].iloc[0]} and 0 more have images in")
    assert fault.file == "the test list" and fault.remedy == "move all of a patient's images to one list"


@pytest.mark.parametrize("fault", BREAKS)
def test_each_broken_image_is_named(tiny_raw, fault, capsys, tmp_path):
    destroy, said = BREAKS[fault]
    path = tiny_raw / "images" / NAME
    path.write_bytes(destroy(path.read_bytes()))
    assert __main__.main(["verify", str(tiny_raw), "--verify", "full", "--report", str(tmp_path / "r.csv")]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(lines) == 1 and NAME in lines[0] and said in lines[0]
    assert list(pd.read_csv(tmp_path / "r.csv")["file"]) == [NAME]
    note(fault, lines[0].strip(), path)


def test_a_part_of_the_dataset_is_no_fault_unless_it_has_to_be_whole(tiny_raw, monkeypatch):
    from dataclasses import replace

    from chestxray.data import kaggle

    (tiny_raw / "images" / NAME).unlink()
    report = integrity.verify(tiny_raw)
    assert "1 of them not here (a part of the dataset: no fault)" in report.notes[1] and report.faults == ()
    said = "no fault: it is counted among the images that are not here"
    note("image: missing in a part of the dataset", said, tiny_raw / "images" / NAME)
    monkeypatch.setattr(nih_tables, "NIH_SIDE", 48)
    whole = replace(kaggle.DATASETS["nih"], images=60)
    (fault,) = integrity.verify(tiny_raw, whole).faults
    assert (fault.file, fault.value) == (NAME, "is not there")
    note(
        "image: missing in the whole dataset",
        f"{fault.file}: {fault.value}; {fault.remedy}",
        tiny_raw / "images" / NAME,
    )
    (tiny_raw / "test_list.txt").unlink()
    (tiny_raw / "train_val_list.txt").unlink()
    Image.new("L", (50, 48)).save(tiny_raw / "images" / NAME)
    faults = {fault.file: fault for fault in integrity.verify(tiny_raw, whole).faults}
    said = {file: fault.value for file, fault in faults.items()}
    assert said[NAME] == "50 × 48 px, not 48 × 48" and "test_list.txt" in said
    for name, path in (
        ("image: another size than the NIH's", tiny_raw / "images" / NAME),
        ("an official list is missing", tiny_raw / "test_list.txt"),
    ):
        note(name, f"{path.name}: {faults[path.name].value}; {faults[path.name].remedy}", path)
    more = replace(whole, images=61)
    assert "60 images listed" in {f.value for f in integrity.verify(tiny_raw, more).faults}


def test_a_sample_is_decoded_and_every_file_is_opened(make_raw, monkeypatch):
    monkeypatch.setattr(integrity, "SAMPLE", 10)
    raw = make_raw(images=40)
    assert "decoded: 10; all with --verify full" in integrity.verify(raw).notes
    for path in (raw / "images").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert len(integrity.verify(raw).faults) == 40


def test_no_dataset_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path / "root"))
    for name in ("nih", "nowhere", str(tmp_path)):
        assert __main__.main(["verify", name]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_real_radiographs(nih):
    report = integrity.verify(nih)
    assert report.faults == () and f": {len(sources.find_images(nih)):,} images, " in report.notes[0]

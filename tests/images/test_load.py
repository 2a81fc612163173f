"""What users bring: TIFF beside PNG and JPEG, told by content, bounded in size, and named in one line if refused."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import tiny_pixels
from dicom_files import write
from PIL import Image

from chestxray.config import IMAGE_SUFFIXES, StudyError
from chestxray.images import load, pixels
from chestxray.images.load import PREDICTABLE_SUFFIXES


def raw_tiff(
    samples: np.ndarray, photometric: int, tags: dict[int, int] | None = None, order: str = "<", pages: int = 1
) -> bytes:
    """An uncompressed TIFF in a form that Pillow reads but may not write: (H, W) samples of 8, 16 or 32 bits."""
    height, width = samples.shape
    bits = 8 * samples.dtype.itemsize
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    entries |= {279: len(data)} | (tags or {})
    body = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data)) + data
    for page in range(pages):
        body += struct.pack(f"{order}H", len(entries))
        body += b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
        body += struct.pack(f"{order}I", len(body) + 4 if page + 1 < pages else 0)
    return body


def saved(image: Image.Image, kind: str = "TIFF", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GREY = tiny_pixels(3, 64)[:, :50]
TIFFS = {
    "grey": lambda: saved(Image.fromarray(GREY)),
    "LZW": lambda: saved(Image.fromarray(GREY), compression="tiff_lzw"),
    "deflate": lambda: saved(Image.fromarray(GREY), compression="tiff_adobe_deflate"),
    "packbits": lambda: saved(Image.fromarray(GREY), compression="packbits"),
    "RGB": lambda: saved(Image.fromarray(GREY).convert("RGB"), compression="tiff_lzw"),
    "RGBA": lambda: saved(Image.fromarray(GREY).convert("RGBA")),
    "16 bits": lambda: saved(Image.fromarray(GREY.astype(np.uint16) * 257), compression="tiff_lzw"),
    "16 bits, big-endian": lambda: raw_tiff(GREY.astype(np.uint16) * 257, 1, order=">"),
    "12 bits, white is 0": lambda: raw_tiff(4095 - np.rint(GREY / 255 * 4095).astype(np.uint16), 0),
    "14 bits, big-endian": lambda: raw_tiff(np.rint(GREY / 255 * 16383).astype(np.uint16), 1, order=">"),
    "8 bits, white is 0": lambda: raw_tiff(255 - GREY, 0),
    "16 bits, white is 0": lambda: raw_tiff((255 - GREY).astype(np.uint16) * 257, 0),
    "turned by its tag": lambda: raw_tiff(GREY[::-1, ::-1], 1, {274: 3}),
}


@pytest.mark.parametrize("form", TIFFS)
def test_every_tiff_gives_the_same_grey_values(tmp_path, form):
    path = tmp_path / "a.png"  # the content tells, not the name
    path.write_bytes(TIFFS[form]())
    found = load.read(path)
    assert np.array_equal(found.pixels, GREY) and found.pixels.dtype == np.uint8
    assert found.facts == pixels.Facts("TIFF")


def test_a_compressed_photo_is_near_and_its_colour_told(tmp_path):
    rng = np.random.default_rng(0)
    colour = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    image = Image.fromarray(colour)
    for kind, options in (("TIFF", {"compression": "jpeg", "quality": 95}), ("JPEG", {"quality": 95}), ("PNG", {})):
        (tmp_path / "a").write_bytes(saved(image, kind, **options))
        found = load.read(tmp_path / "a")
        assert np.abs(found.pixels - colour @ [0.299, 0.587, 0.114]).mean() < 3
        spread = np.mean(colour.max(axis=2).astype(int) - colour.min(axis=2))
        # JPEG halves the resolution of colour, and each version of its library smooths it differently.
        assert found.facts.format == kind and found.facts.colour == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_datasets_are_read_alike_by_content(tmp_path, kind):
    path = tmp_path / "a.dcm"
    path.write_bytes(saved(Image.fromarray(GREY), kind))
    assert np.array_equal(load.read(path).pixels, pixels.decode(path))


def test_datasets_hold_no_dicom(tmp_path):
    write(tmp_path / "a.png", GREY, 8)
    assert np.array_equal(load.read(tmp_path / "a.png").pixels, GREY)
    with pytest.raises(StudyError, match="no PNG, JPEG or TIFF"):
        pixels.decode(tmp_path / "a.png")


REFUSED = {
    "several pages": (lambda: raw_tiff(GREY, 1, pages=3), "several pages; save the radiograph's page alone"),
    "pages in a circle": (lambda: circle(), "several pages"),
    "32 bits": (lambda: raw_tiff(GREY.astype(np.uint32), 1), "another kind than 8- or 16-bit grey"),
    "floating point": (lambda: saved(Image.fromarray(GREY.astype(np.float32))), "another kind"),
    "too many pixels": (lambda: raw_tiff(GREY, 1, {256: 60_000, 257: 2_000}), "more than 89,478,485 pixels"),
    "far too many pixels": (lambda: raw_tiff(GREY, 1, {256: 60_000, 257: 60_000}), "more than 89,478,485 pixels"),
    "a huge tile": (lambda: raw_tiff(GREY, 1, {322: 65_536, 323: 65_536, 324: 8, 325: 3200}), "more than 89,478,485"),
    "broken off": (lambda: TIFFS["LZW"]()[:-300], "broken"),
    "a text": (lambda: b"not an image, but a note", "no PNG, JPEG, TIFF or DICOM"),
    "a GIF": (lambda: saved(Image.fromarray(GREY), "GIF"), "no PNG, JPEG, TIFF or DICOM"),
    "empty": (lambda: b"", "0 bytes"),
    "tiny": (lambda: saved(Image.fromarray(GREY[:10])), "50 × 10 px, too small"),
}


def circle() -> bytes:
    data = bytearray(raw_tiff(GREY, 1, pages=2))
    data[-4:] = data[4:8]
    return bytes(data)


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused_is_one_line_with_file_value_and_remedy(tmp_path, fault):
    make, words = REFUSED[fault]
    path = tmp_path / "a.tif"
    path.write_bytes(make())
    with pytest.raises(StudyError) as error:
        load.read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and words in message and "; " in message and "\n" not in message


def test_files_and_folders_that_cannot_be_opened(tmp_path):
    for path in (tmp_path, tmp_path / "absent.tif"):
        with pytest.raises(StudyError, match="cannot be read"):
            load.read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(StudyError, match="is a pipe, socket or device"):
        load.read(tmp_path / "a.png")
    assert pixels.largest_value(tmp_path / "a.png") is None


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "a.tif"
    with path.open("wb") as file:
        os.truncate(file.fileno(), pixels.MOST_BYTES + 1)
    with pytest.raises(StudyError, match="400,000,001 bytes, more than 400,000,000; save it smaller"):
        load.read(path)


def test_which_files_of_a_folder_are_taken(tmp_path):
    assert set(IMAGE_SUFFIXES) < set(PREDICTABLE_SUFFIXES)
    for name in ("a", "b.7", "1.2.840.4711", "c.DCM", "d.txt", "e.tmp"):
        write(tmp_path / name, GREY, 8)
    (tmp_path / "note").write_text("no image")
    (tmp_path / "scan.TIFF").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    taken = {path.name for path in tmp_path.iterdir() if load.is_predictable(path)}
    assert taken == {"a", "b.7", "1.2.840.4711", "c.DCM", "scan.TIFF"}
    assert not load.is_predictable(tmp_path / "absent")


def test_reading_needs_neither_tensorflow_nor_tables():
    code = "import sys; from chestxray.images import dicom, input_check, load; "
    code += "print(sorted({'tensorflow', 'pandas', 'scipy', 'pydicom'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

"""DICOM files give the grey values of the PNGs that they were made from, and nothing of their patients."""

from __future__ import annotations

import dataclasses
import io
import struct
import time
import warnings
from pathlib import Path

import dicom_files
import numpy as np
import pydicom
import pydicom.data
import pytest
from dicom_files import LOSSLESS, SYNTAXES, dataset, encoded, write
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_windowing

from chestxray.config import StudyError
from chestxray.data import phantom, sources
from chestxray.images import load, pixels


def read(path: Path) -> np.ndarray:
    return load.read(path).pixels


def lut(first: int, entries: np.ndarray, bits: int, signed: bool = False) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if signed else "US", [len(entries) % 65536, first, bits])
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return item


# How a (H, W) 8-bit image is stored → stored values, bits, elements. Each gets the image's grey values back exactly:
# every step is a line through whole numbers, worked out by hand.
FORMS = {
    "8 bits": lambda p: (p, 8, {}),
    "8 bits, MONOCHROME1": lambda p: (255 - p, 8, {"PhotometricInterpretation": "MONOCHROME1"}),
    "8 bits, inverse presentation": lambda p: (255 - p, 8, {"PresentationLUTShape": "INVERSE"}),
    # LINEAR: 0 at c - 0.5 - (w - 1) / 2 = 0, 1 at c - 0.5 + (w - 1) / 2 = 4080.
    "12 bits, window": lambda p: (p * 16, 12, {"WindowCenter": 2040.5, "WindowWidth": 4081}),
    "12 bits, MONOCHROME1, window": lambda p: (
        4080 - p * 16,
        12,
        {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 2040.5, "WindowWidth": 4081},
    ),
    "12 bits, two windows": lambda p: (p * 16, 12, {"WindowCenter": [2040.5, 99], "WindowWidth": [4081, 7]}),
    # LINEAR_EXACT: 0 at c - w / 2 = 0, 1 at c + w / 2 = 65535.
    "16 bits, exact window": lambda p: (
        p * 257,
        16,
        {"WindowCenter": 32767.5, "WindowWidth": 65535, "VOILUTFunction": "LINEAR_EXACT"},
    ),
    # Physical values 0.5 (8 p - 1000) + 500 = 4 p, from 0 to 1020.
    "16 bits signed, rescale, window": lambda p: (
        p * 8 - 1000,
        16,
        {"RescaleSlope": 0.5, "RescaleIntercept": 500, "WindowCenter": 510.5, "WindowWidth": 1021},
    ),
    "12 bits signed, window": lambda p: (p * 8 - 1000, 12, {"WindowCenter": 20.5, "WindowWidth": 2041}),
    # A negative slope is what makes dark bright here: physical 4080 - 16 p stored as 16 p.
    "12 bits, falling rescale, MONOCHROME1": lambda p: (
        p * 16,
        12,
        {
            "PhotometricInterpretation": "MONOCHROME1",
            "RescaleSlope": -1,
            "RescaleIntercept": 4080,
            "WindowCenter": 2040.5,
            "WindowWidth": 4081,
        },
    ),
    "12 bits in the upper part of 16": lambda p: (
        p * 256,
        12,
        {"HighBit": 15, "WindowCenter": 2040.5, "WindowWidth": 4081},
    ),
    "VOI LUT": lambda p: (p + 100, 10, {"VOILUTSequence": [lut(100, np.arange(256), 8)]}),
    "VOI LUT of 16 bits, falling": lambda p: (
        255 - p,
        10,
        {"VOILUTSequence": [lut(0, np.arange(255, -1, -1) * 257, 16)]},
    ),
    "modality LUT, window": lambda p: (
        p,
        8,
        {
            "ModalityLUTSequence": [lut(0, np.arange(256) * 3, 16)],
            "WindowCenter": 383,
            "WindowWidth": 766,
        },
    ),
}


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "deflated"])
def test_luts_of_the_depths_and_lengths_of_the_standard(tmp_path, drawn, syntax):
    """Packed entries of 8 bits, more than 256 of them (PS3.3 C.11.1.1.1), and 12 bits as some devices write them."""
    packed = lut(0, np.arange(4096) // 16, 8)
    packed.LUTData = (np.arange(4096) // 16).astype(np.uint8).tobytes()
    path = write(tmp_path / "a.dcm", drawn * np.int64(16), 12, syntax, VOILUTSequence=[packed])
    assert np.array_equal(read(path), drawn)
    window = {"WindowCenter": 2040.5, "WindowWidth": 4081}
    modality = lut(0, np.arange(256) * 16, 12)
    path = write(tmp_path / "b.dcm", drawn, 8, syntax, ModalityLUTSequence=[modality], **window)
    assert np.array_equal(read(path), drawn)


def originals(folder: Path) -> list[np.ndarray]:
    """Real radiographs, three of them."""
    paths = list(sources.find_images(folder).values())
    return [pixels.decode(path) for path in paths[:: len(paths) // 3][:3]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> np.ndarray:
    """A phantom, cut so that height and width differ."""
    folder = tmp_path_factory.mktemp("phantom")
    phantom.write_dataset(folder, 1, 128, 3)
    (path,) = sources.find_images(folder).values()
    return pixels.decode(path)[:, 4:-5]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_a_phantom_comes_back_exactly(tmp_path, drawn, form, syntax):
    stored, bits, elements = FORMS[form](drawn.astype(np.int64))
    if elements.get("HighBit") == 15 and syntax.startswith("jpeg"):
        pytest.skip("JPEG streams have no bits below the stored ones")
    path = write(tmp_path / "a.dcm", stored, bits, syntax, **elements)
    assert np.array_equal(read(path), drawn)


@pytest.mark.parametrize("form", FORMS)
def test_real_radiographs_come_back_exactly(tmp_path, nih, form):
    for place, original in enumerate(originals(nih)):
        stored, bits, elements = FORMS[form](original.astype(np.int64))
        for syntax in ("explicit", "jpeg-lossless", "jpeg-2000", "rle"):
            if elements.get("HighBit") == 15 and syntax.startswith("jpeg"):
                continue
            path = write(tmp_path / f"{place}.dcm", stored, bits, syntax, **elements)
            assert np.array_equal(read(path), original), syntax


def test_a_real_radiograph_in_baseline_jpeg_is_what_another_decoder_makes_of_it(tmp_path, nih):
    for original in originals(nih):
        path = write(tmp_path / "a.dcm", original, 8, "jpeg")
        found = read(path)
        assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(dicom_files.jpeg(original)))))
        assert np.abs(found.astype(int) - original).mean() < 1.5


def test_without_a_window_deep_values_are_spread_between_the_smallest_and_the_largest(tmp_path):
    stored = np.linspace(700, 2230, 40 * 40).round().astype(np.int64).reshape(40, 40)
    path = write(tmp_path / "a.dcm", stored, 12)
    assert np.abs(read(path) - (stored - 700) / 1530 * 255).max() <= 0.5


def test_without_a_window_8_bits_stay_as_they_are(tmp_path):
    stored = np.full((40, 40), 90)
    stored[20:] = 120
    assert set(np.unique(read(write(tmp_path / "a.dcm", stored, 8)))) == {90, 120}


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("seed", range(6))
def test_windows_are_those_of_pydicom(tmp_path, function, seed):
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 4096, (48, 40))
    elements = {
        "WindowCenter": round(float(rng.uniform(500, 3500)), 2),
        "WindowWidth": [1.0, 2.0, 37.5, 800.0, 4000.25, 9000.0][seed],
        "VOILUTFunction": function,
        "RescaleSlope": [1, 0.25, 2, 1.5, 3, 1][seed],
        "RescaleIntercept": [0, -100, -6000, 7, 0, -1024][seed],
    }
    made = dataset(stored, 12, **elements)
    path = tmp_path / "a.dcm"
    path.write_bytes(encoded(made))
    physical = apply_modality_lut(stored.astype(np.int16), made)
    shown = apply_windowing(physical, made).astype(float)
    # pydicom's output runs over all that the stored values could be after rescale.
    ends = sorted(np.array([0, 4095]) * float(made.RescaleSlope) + float(made.RescaleIntercept))
    expected = (shown - ends[0]) / (ends[1] - ends[0]) * 255
    assert np.abs(read(path) - expected).max() <= 0.51


def test_bits_above_the_stored_ones_do_not_count(tmp_path, drawn):
    overlay = np.zeros(drawn.shape, dtype=np.int64)
    overlay[10:20, 10:20] = 1 << 14
    made = dataset(drawn * np.int64(16) + overlay, 12, WindowCenter=2040.5, WindowWidth=4081)
    (tmp_path / "a.dcm").write_bytes(encoded(made))
    assert np.array_equal(read(tmp_path / "a.dcm"), drawn)


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("ends", [(4095,), (4000, 4095), (4095, 4000)])
def test_padding_is_black_and_not_part_of_the_range(tmp_path, drawn, kind, ends):
    grey = drawn.copy()
    grey[0, :2] = 0, 255
    stored = (255 - grey.astype(np.int64) if kind == "MONOCHROME1" else grey.astype(np.int64)) * 5 + 300
    stored[-12:] = 4095
    elements = dict(zip(("PixelPaddingValue", "PixelPaddingRangeLimit"), ends, strict=False))
    path = write(tmp_path / "a.dcm", stored, 12, PhotometricInterpretation=kind, **elements)
    expected = grey.copy()
    expected[-12:] = 0
    assert np.array_equal(read(path), expected)


def test_padding_of_signed_pixels_written_as_unsigned(tmp_path, drawn):
    stored = drawn.astype(np.int64) * 4 - 500
    stored[:5] = -2000
    made = dataset(stored, 16, WindowCenter=10.5, WindowWidth=1021)
    made.add_new("PixelPaddingValue", "US", 65536 - 2000)
    (tmp_path / "a.dcm").write_bytes(encoded(made))
    expected = drawn.copy()
    expected[:5] = 0
    assert np.array_equal(read(tmp_path / "a.dcm"), expected)


@pytest.mark.parametrize("syntax", ["explicit", "jpeg-2000", "rle"])
def test_colour_goes_to_luma(tmp_path, syntax):
    rng = np.random.default_rng(1)
    colour = rng.integers(0, 256, (40, 36, 3)).astype(np.uint8)
    found = load.read(write(tmp_path / "a.dcm", colour, 8, syntax))
    assert np.abs(found.pixels - colour @ [0.299, 0.587, 0.114]).max() <= 0.51
    assert found.facts.colour > 10


def bundled(name: str) -> Path:
    return Path(pydicom.data.get_testdata_file(name, download=False))


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_bigendian.dcm",
        "MR_small_expb.dcm",
        "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_padded.dcm",
        "MR_small_RLE.dcm",
    ],
)
def test_files_of_pydicom_in_several_encodings_are_one_image(name):
    plain = read(bundled("MR_small.dcm"))
    assert np.array_equal(read(bundled(name)), plain) and plain.std() > 20


def test_the_window_of_a_file_of_pydicom():
    made = pydicom.dcmread(bundled("MR_small.dcm"))
    centre, width = float(made.WindowCenter), float(made.WindowWidth)
    expected = ((made.pixel_array - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1) * 255
    assert np.abs(read(bundled("MR_small.dcm")) - expected).max() <= 0.5


def test_jpeg_of_12_bits_is_nearly_its_jpeg_2000():
    lossy, better = read(bundled("JPGExtended.dcm")), read(bundled("JPEG2000.dcm"))
    assert lossy.shape == better.shape == (1024, 256)
    assert np.corrcoef(lossy.ravel(), better.ravel())[0, 1] > 0.9


def test_a_deflated_file_of_pydicom_is_inflated():
    made = pydicom.dcmread(bundled("image_dfl.dcm"))
    assert np.array_equal(read(bundled("image_dfl.dcm")), made.pixel_array)


def jpeg_2000_of(rows: int, columns: int) -> bytes:
    """The beginning of a codestream that promises so many pixels."""
    size = struct.pack(">HH8IH", 41, 0, columns, rows, 0, 0, columns, rows, 0, 0, 1) + b"\x07\1\1"
    return b"\xff\x4f\xff\x51" + size + bytes(64)


def jpeg_of(rows: int, columns: int) -> bytes:
    return b"\xff\xd8\xff\xc3" + struct.pack(">HBHHB", 11, 8, rows, columns, 1) + b"\1\x11\0" + bytes(64)


def compressed(frame: bytes, syntax: str) -> Dataset:
    made = dataset(np.zeros((32, 32), np.uint8), 8)
    made.file_meta.TransferSyntaxUID = SYNTAXES[syntax]
    made.PixelData = encapsulate([frame])
    return made


def report() -> bytes:
    made = dataset(np.zeros((32, 32), np.uint8), 8, Rows=None, Columns=None)
    made.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    del made.PixelData
    return encoded(made)


def floating() -> bytes:
    made = dataset(np.zeros((32, 32), np.uint8), 8)
    del made.PixelData
    made.FloatPixelData = bytes(32 * 32 * 4)
    return encoded(made)


def of(bits: int = 8, syntax: str = "explicit", **elements: object) -> bytes:
    return encoded(dataset(np.zeros((32, 32), np.uint8), bits, syntax, **elements))


def crowded() -> bytes:
    made = dataset(np.zeros((32, 32), np.uint8), 8)
    for place in range(20_000):
        made.add_new((0x0011 + 2 * (place // 200), 0x1000 + place % 200), "LO", "")
    return encoded(made)


BYTES = 4_000_000
"""Largest file in these tests."""

REFUSED = {
    "several frames": (lambda: of(NumberOfFrames=12), "12 frames; export the frame"),
    "a report": (report, "without an image (Basic Text SR Storage)"),
    "no rows": (lambda: of(Rows=0), "without an image"),
    "floating point": (floating, "without an image"),
    "a palette": (lambda: of(PhotometricInterpretation="PALETTE COLOR"), "PALETTE COLOR pixels of 1 samples"),
    "a patient as colour": (lambda: of(PhotometricInterpretation=dicom_files.NUMBER), "unknown pixels of 1 samples"),
    "1 bit": (lambda: of(BitsAllocated=1, BitsStored=1, HighBit=0), "1 of 1 bits a sample"),
    "32 bits": (lambda: of(BitsAllocated=32, BitsStored=32, HighBit=31), "32 of 32 bits a sample"),
    "more stored than allocated": (lambda: of(BitsStored=12, HighBit=11), "12 of 8 bits a sample"),
    "tiny": (lambda: encoded(dataset(np.zeros((8, 32), np.uint8), 8)), "32 × 8 px, too small"),
    "too many pixels": (lambda: of(Rows=60_000, Columns=60_000), "more than 89,478,485 pixels"),
    "fewer pixels than told": (lambda: of(Rows=64), "broken DICOM"),
    "broken off": (lambda: of()[:-700], "broken DICOM"),
    "deflated bomb": (lambda: dicom_files.deflated_bomb(3 * BYTES), "when inflated"),
    "JPEG 2000 bomb": (
        lambda: encoded(compressed(jpeg_2000_of(60_000, 60_000), "jpeg-2000")),
        "not of the size in the DICOM header",
    ),
    "JPEG bomb": (lambda: encoded(compressed(jpeg_of(60_000, 60_000), "jpeg-lossless")), "not of the size"),
    "no JPEG at all": (lambda: encoded(compressed(bytes(200), "jpeg")), "not of the size"),
    "no slope": (lambda: of(RescaleSlope=0, RescaleIntercept=1), "broken DICOM"),
    "MPEG": (lambda: video(), "encoded as MPEG2 Main Profile / Main Level, which can't be read"),
    "an endless header": (crowded, "more than 20,000 elements"),
}


def video() -> bytes:
    made = compressed(bytes(64), "jpeg")
    made.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"
    return encoded(made)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pixels, "MOST_BYTES", BYTES)


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused_is_one_line_with_file_value_and_remedy(tmp_path, small, fault):
    make, words = REFUSED[fault]
    path = tmp_path / "a.dcm"
    path.write_bytes(make())
    started = time.perf_counter()
    with pytest.raises(StudyError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and words in message and "; " in message and "\n" not in message
    assert time.perf_counter() - started < 20


def test_nothing_of_a_patient_is_said_logged_or_returned(tmp_path, small, caplog, capfd):
    caplog.set_level(0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for fault, (make, _) in REFUSED.items():
            path = tmp_path / "a.dcm"
            path.write_bytes(make())
            with pytest.raises(StudyError) as error:
                read(path)
            chain, link = [], error.value
            while link is not None:
                chain.append(str(link))
                link = link.__cause__ or link.__context__
            assert not any(_secret(text) for text in chain), fault
        data = of(BodyPartExamined=dicom_files.NUMBER, ViewPosition="CANARY", Modality="CANARY")
        path.write_bytes(data.replace(b"19010203", b"1901\xff-03").replace(b"DX", b"D\xff"))
        facts = load.read(path).facts
    assert dataclasses.astuple(facts) == ("DICOM", 0.0, "", "", "", False)
    out = capfd.readouterr()
    for text in (caplog.text, out.out, out.err, *(str(one.message) for one in warned)):
        assert not _secret(text)


def _secret(text: str) -> bool:
    return any(word.lower() in text.lower() for word in ("canary", "4711", "1901"))


def test_what_the_header_says_of_the_image(tmp_path):
    facts = load.read(write(tmp_path / "a.dcm", np.zeros((32, 32), np.uint8), 8)).facts
    assert (facts.format, facts.view, facts.body_part) == ("DICOM", "PA", "CHEST")
    assert (facts.modality, facts.raw) == ("DX", False)
    elements = {"ViewPosition": "LL", "BodyPartExamined": "HAND", "PresentationIntentType": "FOR PROCESSING"}
    facts = load.read(write(tmp_path / "a.dcm", np.zeros((32, 32), np.uint8), 8, **elements)).facts
    assert (facts.view, facts.body_part, facts.raw) == ("LL", "HAND", True)

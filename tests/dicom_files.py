"""DICOM files of radiographs, written for tests: any depth, photometric interpretation, window and encoding."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
)

NAME, NUMBER, DATE = "Canary^Patient", "CANARY-4711", "19010203"
"""What stands for patient data in every file; none of it may ever be seen."""

SYNTAXES = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "big-endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "jpeg": JPEGBaseline8Bit,
    "jpeg-lossless": JPEGLosslessSV1,
    "jpeg-2000": JPEG2000Lossless,
    "rle": RLELossless,
}
LOSSLESS = tuple(name for name in SYNTAXES if name != "jpeg")


def dataset(stored: np.ndarray, bits: int, syntax: str = "explicit", **elements: object) -> Dataset:
    """A digital radiograph with patient data in its header.

    Args:
        stored: (rows, columns) integers as they are stored, or (rows, columns, 3) uint8.
        bits: bits stored.
        syntax: a key of `SYNTAXES`.
        elements: other elements by keyword; None removes one.
    """
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    made.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4711"
    made.file_meta.TransferSyntaxUID = SYNTAXES[syntax]
    made.SOPClassUID = DigitalXRayImageStorageForPresentation
    made.SOPInstanceUID = "1.2.3.4711"
    made.StudyDate, made.PatientBirthDate = DATE, DATE
    made.PatientName, made.PatientID, made.InstitutionName = NAME, NUMBER, f"{NAME} Hospital"
    made.Modality, made.BodyPartExamined, made.ViewPosition = "DX", "CHEST", "PA"
    made.Rows, made.Columns = stored.shape[:2]
    made.SamplesPerPixel = 1 if stored.ndim == 2 else 3
    made.PhotometricInterpretation = "MONOCHROME2" if stored.ndim == 2 else "RGB"
    if stored.ndim == 3:
        made.PlanarConfiguration = 0
    wide = 8 if bits <= 8 else 16
    made.BitsAllocated, made.BitsStored, made.HighBit = wide, bits, bits - 1
    made.PixelRepresentation = int(stored.min() < 0)
    for name, value in elements.items():
        if syntax == "big-endian" and name.endswith("LUTSequence"):
            for item in value:
                item.LUTData = np.frombuffer(item.LUTData, "<u2").byteswap().tobytes()
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    values = stored.astype(f"{'>' if syntax == 'big-endian' else '<'}{'i' if stored.min() < 0 else 'u'}{wide // 8}")
    if syntax in ("jpeg-2000", "rle"):
        told = made.BitsStored, made.HighBit
        if syntax == "rle":  # keeps all bits; pydicom refuses to encode those that aren't stored ones
            made.BitsStored, made.HighBit = wide, wide - 1
        made.compress(SYNTAXES[syntax], values, generate_instance_uid=False)
        made.BitsStored, made.HighBit = told
    elif syntax.startswith("jpeg"):
        frame = jpeg(stored) if syntax == "jpeg" else lossless_jpeg(stored & ((1 << bits) - 1), bits)
        made.PixelData = encapsulate([frame])
        made["PixelData"].VR = "OB"
    else:
        data = values.tobytes()
        made.PixelData = data + b"\0" * (len(data) % 2)
        made["PixelData"].VR = "OB" if wide == 8 and syntax != "implicit" else "OW"
    return made


def encoded(made: Dataset) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def write(path: Path, stored: np.ndarray, bits: int, syntax: str = "explicit", **elements: object) -> Path:
    """Write a file of `dataset`, and return its path."""
    path.write_bytes(encoded(dataset(stored, bits, syntax, **elements)))
    return path


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def lossless_jpeg(samples: np.ndarray, bits: int) -> bytes:
    """Lossless JPEG with predictor 1 (ITU-T T.81 annex H), all codes of five bits.

    Args:
        samples: (rows, columns), 0 to 2**bits - 1.
        bits: precision.
    """
    samples = samples.astype(np.int64)
    predicted = np.empty_like(samples)
    predicted[:, 1:] = samples[:, :-1]
    predicted[1:, 0] = samples[:-1, 0]
    predicted[0, 0] = 1 << (bits - 1)
    difference = ((samples - predicted + (1 << 15)) % (1 << 16) - (1 << 15)).reshape(-1)
    category = np.zeros(len(difference), dtype=np.int64)
    for power in range(16):
        category[np.abs(difference) >= 1 << power] = power + 1
    extra = np.where(category == 16, 0, category)
    low = np.where(difference < 0, difference - 1, difference) & ((1 << extra) - 1)
    code, length = (category << extra) | low, 5 + extra
    place = np.arange(20, -1, -1)
    stream = ((code[:, None] >> place) & 1)[place < length[:, None]].astype(np.uint8)
    stream = np.append(stream, np.ones(-len(stream) % 8, dtype=np.uint8))
    rows, columns = samples.shape
    table = bytes([0, 0, 0, 0, 0, 17, *([0] * 11)]) + bytes(range(17))
    parts = [
        b"\xff\xd8",
        b"\xff\xc3" + struct.pack(">HBHHB", 11, bits, rows, columns, 1) + b"\1\x11\0",
        b"\xff\xc4" + struct.pack(">H", 2 + len(table)) + table,
        b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\1\0" + b"\1\0\0",
        np.packbits(stream).tobytes().replace(b"\xff", b"\xff\0"),
        b"\xff\xd9",
    ]
    return b"".join(parts)


def deflated_bomb(size: int) -> bytes:
    """A DICOM file in the deflated syntax that inflates to `size` bytes more than a plain one has."""
    whole = encoded(dataset(np.zeros((32, 32), np.uint8), 8, "deflated"))
    end = 128 + 4 + 12 + struct.unpack_from("<I", whole, 140)[0]
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    block = bytes(1 << 20)
    data = deflater.compress(zlib.decompress(whole[end:], -zlib.MAX_WBITS))
    data += b"".join(deflater.compress(block) for _ in range(size >> 20)) + deflater.flush()
    return whole[:end] + data

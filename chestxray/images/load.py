"""Loading a user's radiograph: PNG, JPEG, TIFF or DICOM, recognised by content, not by name.

Files are bounded in size before they are read. Datasets hold no DICOM and are read by `pixels.decode`.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from chestxray.config import IMAGE_SUFFIXES
from chestxray.images import pixels
from chestxray.images.pixels import Facts

PREDICTABLE_SUFFIXES = (*IMAGE_SUFFIXES, ".dcm", ".dicom")
"""Lower-case suffixes of files that `read` takes. DICOM files often have none: see `is_predictable`."""

_HEAD = 132
"""Bytes by which a DICOM file is recognised."""


class Radiograph(NamedTuple):
    """An image, (height, width) uint8 grey as large as in the file, with what its file says of it."""

    pixels: np.ndarray
    facts: Facts


def is_predictable(path: Path) -> bool:
    """Whether a file of a folder is to be read: it has one of the suffixes, or none and begins as DICOM does.

    False where it cannot be opened.
    """
    if path.suffix:
        # "1.2.840.113619" is a common name of a DICOM file, without a suffix.
        if path.suffix.lower() in PREDICTABLE_SUFFIXES:
            return True
        if not path.suffix[1:].isdigit():
            return False
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return _is_dicom(file.read(_HEAD))
    except OSError:
        return False


def read(path: Path, bits: int | None = None) -> Radiograph:
    """Read a radiograph of a user: PNG, JPEG, TIFF (one page of 8 or 16 bits) or DICOM (one frame), by its content.

    Grey values are as `pixels.decode` and `dicom.decode` give them.

    Args:
        path: the file.
        bits: as for `pixels.decode`; DICOM has its own.

    Raises:
        StudyError: the file cannot be read, is larger than `pixels.MOST_BYTES` or has more pixels than
            `pixels.MOST_PIXELS`, is of another format, or broken; one line with file, value and remedy.
    """
    data = pixels.read_bytes(path)
    if _is_dicom(data):
        from chestxray.images import dicom  # pydicom takes a tenth of a second to import

        return Radiograph(*dicom.decode(data, path))
    image, facts = pixels.decode_bytes(data, path, bits, "PNG, JPEG, TIFF or DICOM")
    return Radiograph(np.asarray(image), facts)


def _is_dicom(head: bytes) -> bool:
    """Whether a file that begins so is DICOM (PS3.10 7.1): four letters after a preamble of 128 bytes."""
    return head[_HEAD - 4 : _HEAD] == b"DICM"

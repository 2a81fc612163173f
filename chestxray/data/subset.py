"""Subset nih_9k: the reference's radiographs, listed in `1_Datasets/nih_9k.csv` and made from the NIH's originals.

The list has an image's name, official list and split, and the SHA-256 of its pixels at 128 px, and at 256 px where it
has such a version: of the grey values as bytes, row by row (`pixels.tobytes()` of a C-ordered uint8 array), not of the
PNG file, whose bytes depend on who compressed it.
"""

from __future__ import annotations

import csv
import hashlib
from typing import NamedTuple

import numpy as np

from chestxray.config import REPOSITORY, StudyError

NAME = "nih_9k"
LIST = REPOSITORY / "1_Datasets" / f"{NAME}.csv"
COLUMNS = ("image", "list", "split", "sha256_128", "sha256_256")
NATIVE = 1024
"""Side in pixels of the NIH's originals."""


class Row(NamedTuple):
    """One image of the list: `list` is `train_val` or `test`; `sha256_256` is empty where there is no such version."""

    image: str
    list: str
    split: str
    sha256_128: str
    sha256_256: str


def read_list() -> dict[str, Row]:
    """Read the committed list: image name → its row, sorted by name.

    Raises:
        StudyError: it is missing, as in an installed wheel, or not as it was committed.
    """
    try:
        with LIST.open(encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file)
        if tuple(header) == COLUMNS:
            return {line[0]: Row(*line) for line in lines}
        reason = f"has the columns {', '.join(header)}"
    except (OSError, ValueError, TypeError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    raise StudyError(f"{LIST}: {reason}; take the file from the repository, such as by git checkout 1_Datasets")


def digest(pixels: np.ndarray) -> str:
    """SHA-256 of an image's grey values, row by row, in hexadecimal: what the list compares.

    Args:
        pixels: (height, width) uint8.
    """
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def reduce(pixels: np.ndarray) -> np.ndarray:
    """Bring an original to 128 px as nih_9k was made: twice a mean of four pixels, rounded half up.

    First to 256 px the pixels 1 and 2 of every four in both directions, then each 2 × 2. (It is OpenCV's bilinear
    resizing to 256 px and on to 128 px.)

    Args:
        pixels: (1024, 1024) uint8.

    Returns:
        (128, 128) uint8.

    Raises:
        StudyError: it has another shape or type.
    """
    wide = _original(pixels).astype(np.uint16)
    for first, step in ((1, 4), (0, 2)):
        corners = (wide[first + row :: step, first + column :: step] for row in (0, 1) for column in (0, 1))
        wide = (sum(corners, np.uint16(2))) >> 2
    return wide.astype(np.uint8)


def reduce_256(pixels: np.ndarray) -> np.ndarray:
    """Bring an original to 256 px as nih_9k was made: the mean of each 4 × 4 pixels, halves to the even number.

    (It is OpenCV's resizing by area.)

    Args:
        pixels: (1024, 1024) uint8.

    Returns:
        (256, 256) uint8.

    Raises:
        StudyError: it has another shape or type.
    """
    blocks = _original(pixels).reshape(NATIVE // 4, 4, NATIVE // 4, 4)
    return np.rint(blocks.sum(axis=(1, 3), dtype=np.uint16) / 16).astype(np.uint8)


def _original(pixels: np.ndarray) -> np.ndarray:
    if pixels.shape != (NATIVE, NATIVE) or pixels.dtype != np.uint8:
        raise StudyError(
            f"an image of shape {pixels.shape} and type {pixels.dtype}: is no original of the NIH's; "
            f"give one of shape ({NATIVE}, {NATIVE}) and type uint8"
        )
    return pixels

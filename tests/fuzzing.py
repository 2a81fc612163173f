"""Mutated image and DICOM files, each made from its number alone, and a process that reads them under limits.

`python fuzzing.py FOLDER FIRST LAST` reads the files with these numbers one after the other and prints a line of JSON.
It ends at once, with a traceback on standard error, where one takes longer than `SECONDS`.
"""

from __future__ import annotations

import faulthandler
import functools
import io
import json
import sys
import time
from collections import Counter
from pathlib import Path

import dicom_files
import numpy as np
from conftest import tiny_pixels
from PIL import Image

from chestxray.config import StudyError
from chestxray.images import load

SECONDS = 30
"""No file may take longer, on a machine that is busy besides."""
ADDRESSES = 4 << 30
"""Bytes of address space; libraries take 1 to 2 of them before any file is read."""
MEMORY = 900 << 20
"""Bytes that reading may add: an image of the most pixels that are taken, in 32 bits and in 8."""

_VALUES = (0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF)
_GREY = tiny_pixels(3, 64)[:, :50]


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def whole() -> dict[str, bytes]:
    """Sound files of each kind, by name."""
    grey, deep = Image.fromarray(_GREY), Image.fromarray(_GREY.astype(np.uint16) * 257)
    colour = Image.merge("RGB", [grey, grey.rotate(180), grey])
    made = {
        "png": _saved(grey, "PNG"),
        "png16": _saved(deep, "PNG"),
        "png palette": _saved(colour.quantize(16), "PNG"),
        "png transparent": _saved(colour.convert("RGBA"), "PNG"),
        "png text": _saved(grey, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
        "jpeg": _saved(grey, "JPEG"),
        "jpeg progressive": _saved(colour, "JPEG", progressive=True),
        "jpeg turned": _saved(grey, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"),
        "jpeg cmyk": _saved(colour.convert("CMYK"), "JPEG"),
        "tiff": _saved(grey, "TIFF"),
        "tiff16": _saved(deep, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": _saved(colour, "TIFF", compression="jpeg"),
        "tiff bits": _saved(grey.convert("1"), "TIFF", compression="group4"),
        "tiff bytes": _saved(grey, "TIFF", compression="packbits"),
        "tiff deflate": _saved(colour, "TIFF", compression="tiff_adobe_deflate"),
    }
    for syntax in dicom_files.SYNTAXES:
        made[f"dicom {syntax}"] = dicom_files.encoded(dicom_files.dataset(_GREY, 8, syntax))
    window = {"WindowCenter": 2000, "WindowWidth": 3000, "RescaleSlope": 1.5, "RescaleIntercept": -100}
    made["dicom 12 bits"] = dicom_files.encoded(dicom_files.dataset(_GREY.astype(np.uint16) * 16, 12, **window))
    return made


def mutated(number: int) -> tuple[str, bytes]:
    """The kind and bytes of one file; one in fifty is whole, so that a reader that refuses all is found out."""
    rng = np.random.default_rng([4711, number])
    kinds = sorted(whole())
    kind = kinds[number % len(kinds)]
    data = bytearray(whole()[kind])
    if number % 50 == 49:
        return kind, bytes(data)
    # What tells sizes and kinds stands in front, in TIFF also behind.
    reach = len(data) if rng.random() < 0.4 else min(len(data), 700)
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(max(1, min(reach, len(data)))))
        if kind.startswith("tiff") and rng.random() < 0.5:
            place = max(0, len(data) - 1 - place % 200)
        match rng.integers(7):
            case 0:
                data[place] ^= 1 << int(rng.integers(8))
            case 1:
                data[place] = _VALUES[rng.integers(len(_VALUES))]
            case 2:
                data[place : place + 4] = bytes(_VALUES[rng.integers(len(_VALUES))] for _ in range(4))
            case 3:
                data[place : place + 2] = rng.integers(0, 256, 2, dtype=np.uint8).tobytes()
            case 4:
                del data[place : place + int(rng.integers(1, 60))]
            case 5:
                data[place:place] = data[place : place + int(rng.integers(1, 60))]
            case 6:
                del data[max(1, len(data) - int(rng.integers(1, len(data)))) :]
        if not data:
            break
    return kind, bytes(data)


def main(folder: Path, first: int, last: int) -> None:
    """Read the files, and print how many were read or refused, the longest time, and the memory that it took."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    path = folder / "file"
    for data in whole().values():  # libraries are loaded, and their memory taken
        path.write_bytes(data)
        load.read(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, last):
        kind, data = mutated(number)
        path.write_bytes(data)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        started = time.perf_counter()
        try:
            found = load.read(path).pixels
        except StudyError as error:
            message = str(error)
            if "\n" in message or not message.startswith(f"{path}: "):
                raise AssertionError(f"{number}, {kind}: {message!r}") from error
            if isinstance(error.__cause__, MemoryError):
                raise AssertionError(f"{number}, {kind}: out of memory") from error
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{number}, {kind}: {type(error).__name__}") from error
        else:
            if found.dtype != np.uint8 or found.ndim != 2 or min(found.shape) < 16:
                raise AssertionError(f"{number}, {kind}: {found.dtype} {found.shape}")
            outcomes["read"] += 1
        slowest = max(slowest, time.perf_counter() - started)
        faulthandler.cancel_dump_traceback_later()
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    print(json.dumps(dict(outcomes) | {"slowest_seconds": round(slowest, 3), "added_bytes": added}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

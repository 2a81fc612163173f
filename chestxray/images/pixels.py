"""Pixels: image files decoded to 8-bit grey, padded to a square and resized.

Only what Pillow reads is decoded here: PNG, JPEG and TIFF. Greys of 10, 12 or 14 bits come stored in 16: files of 16
bits are read by the range that they use.
"""

from __future__ import annotations

import dataclasses
import io
import os
import stat
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin
from tqdm import tqdm

from chestxray.config import Rejection, StudyError
from chestxray.files import in_threads

SMALLEST_SIDE = 16
"""An image with a shorter side, in pixels, is no radiograph."""

MOST_PIXELS = 89_478_485
"""More pixels (samples, in DICOM) are refused before memory is taken for them. It is Pillow's own bound; a film of
35 × 43 cm at 50 µm has 60 million."""

MOST_BYTES = 400_000_000
"""Larger files are refused: twice `MOST_PIXELS` of 16 bits."""

DEPTHS = (8, 10, 12, 14, 16)
"""Bits that the greys of a 16-bit file may use; the smallest that holds its largest value is taken."""

FORMATS = ("PNG", "JPEG", "TIFF")
"""Pillow's names of the formats that are read."""

PNG = b"\x89PNG\r\n\x1a\n"
SIGNATURES = (PNG, b"\xff\xd8\xff", *TiffImagePlugin.PREFIXES)
"""How files of these formats begin."""

_TIFF_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B")

# A header that promises too much is refused below, and a broken file is one error: Pillow need not warn besides.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\b")


@dataclass(frozen=True)
class Facts:
    """What a file says of its image besides the pixels, as far as it helps to recognise a radiograph.

    It holds nothing of a patient: texts are empty unless they are on a list of `dicom`.
    """

    format: str  # PNG, JPEG, TIFF or DICOM
    colour: float = 0.0  # mean spread of red, green and blue, 0–255, after shrinking to 64 px; 0 for grey images
    view: str = ""  # DICOM's view position, such as PA or LL
    body_part: str = ""  # DICOM's body part examined, such as CHEST
    modality: str = ""  # DICOM's modality, such as DX
    raw: bool = False  # DICOM's presentation intent is FOR PROCESSING: raw detector data, not an image for reading

    def of_colour(self, image: Image.Image) -> Facts:
        """The same with the colour of an image, of any mode."""
        if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
            return self
        small = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BOX)).astype(np.int64)
        return dataclasses.replace(self, colour=float(np.mean(small.max(axis=2) - small.min(axis=2))))


def decode(path: Path, bits: int | None = None) -> np.ndarray:
    """Read a PNG, JPEG or TIFF radiograph (one page of 8 or 16 bits) as 8-bit grey, (height, width).

    16-bit values are scaled by 255/(2^bits - 1), colour and palettes go to luma (ITU-R 601), transparent pixels are
    black, and a JPEG's orientation tag is obeyed.

    Args:
        path: the file.
        bits: one of `DEPTHS`, by which a 16-bit file is read, as a dataset's all are; by its own largest value if None.

    Raises:
        StudyError: the file is missing, empty, of another format, broken off or too large or small to be a radiograph.
    """
    return np.asarray(decode_bytes(read_bytes(path), path, bits=bits)[0])


def used_bits(largest: int) -> int:
    """The smallest of `DEPTHS` that holds a value from 0 to 65,535."""
    return next(bits for bits in DEPTHS if largest < 1 << bits)


def largest_value(path: Path) -> int | None:
    """The largest value of a 16-bit grey file; None for every other file, and for one that cannot be read."""
    try:
        if path.is_file():
            with Image.open(path, formats=FORMATS) as image:
                _check_header(image, path)
                return int(np.asarray(image).max()) if image.mode.startswith("I") else None
    except Exception:  # `decode` says what it is
        pass
    return None


class Greys(NamedTuple):
    """How a dataset's 16-bit files are read."""

    bits: int | None  # those by which all are read; None where there are none
    files: frozenset[Path]  # which they are
    notes: tuple[str, ...]  # what a user should know of it, one line each
    darker: tuple[Rejection, ...] = ()  # files that use fewer bits: dark ones, or of another depth and then too dark


def greys(paths: Iterable[Path]) -> Greys:
    """Find the 16-bit files of a dataset, and the bits that they use: one for all, so that a dark one stays dark."""
    paths = list(paths)
    values = in_threads(largest_value, paths, -1, batch=64)
    counted = tqdm(values, "Looking for 16-bit files", len(paths), unit="image", disable=None, delay=2)
    found = {path: value for path, value in zip(paths, counted, strict=True) if value is not None}
    if not found:
        return Greys(None, frozenset(), ())
    largest = max(found.values())
    bits = used_bits(largest)
    note = f"16-bit files hold {bits}-bit greys (largest value {largest:,} in {len(found):,} files): read as such"
    low = {path.name: value for path, value in sorted(found.items()) if used_bits(value) < bits}  # at most a quarter
    darker: tuple[Rejection, ...] = ()
    if low:
        few = used_bits(max(low.values()))
        remedy = f"if these are {few}-bit files, put them into a folder of their own"
        note += f"; {len(low):,} of {len(found):,} stay within {few} bits, such as {', '.join([*low][:3])}: {remedy}"
        darker = tuple(Rejection(name, f"stays within {few} bits, but is read by {bits}", remedy) for name in low)
    return Greys(bits, frozenset(found), (f"{note}.",), darker)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        StudyError: it cannot be read, is no file, or has more than `MOST_BYTES`.
    """
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a pipe would wait until somebody writes to it
            raise StudyError(f"{path}: is a pipe, socket or device; give an image file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_BYTES:
                raise StudyError(f"{path}: {size:,} bytes, more than {MOST_BYTES:,}; save it smaller")
            return file.read()
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def decode_bytes(
    data: bytes, path: Path, bits: int | None = None, known: str = "PNG, JPEG or TIFF"
) -> tuple[Image.Image, Facts]:
    """Decode the bytes of `path` to a grey image of mode `L` with facts; grey values as `decode` says.

    Args:
        data: the file.
        path: named in errors.
        bits: as for `decode`.
        known: the formats as errors name them.

    Raises:
        StudyError: the file is empty, of none of these formats, broken off, of several pages, or too large or small.
    """
    if not data:
        raise StudyError(f"{path}: 0 bytes; download it again")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image, path)
            halved = ";16" in str(image.tile)  # 16 bits a sample, of which Pillow keeps the upper 8 but in grey images
            image.load()
            grey, facts = _grey(image, bits), Facts(image.format or "").of_colour(image)
    except StudyError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_many(path) from error
    except Exception as error:  # on broken data Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        reason: object = error
        if isinstance(error, Image.UnidentifiedImageError):
            if not data.startswith(SIGNATURES):
                first = repr(data[:8])
                raise StudyError(f"{path}: begins with {first}, no {known}; replace it or save it as PNG") from error
            reason = "its header"  # too broken for Pillow to recognise
        raise StudyError(f"{path}: {len(data):,} bytes, broken ({reason}); download it again") from error
    if halved and not image.mode.startswith("I") and grey.getextrema()[1] < 64:
        what = "16 bits in colour or with transparency, of which at most 14 are used"
        raise StudyError(f"{path}: {what}; save it as 16-bit grey")
    if min(grey.size) < SMALLEST_SIDE:
        raise too_small(path, *grey.size)
    return grey, facts


def too_small(path: Path, width: int, height: int) -> StudyError:
    """The error for an image with a side below `SMALLEST_SIDE`.

    Args:
        path: of the image.
        width: in pixels.
        height: in pixels.
    """
    return StudyError(f"{path}: {width} × {height} px, too small for a radiograph; replace it")


def _too_many(path: Path) -> StudyError:
    return StudyError(f"{path}: more than {MOST_PIXELS:,} pixels; save it smaller")


def _check_header(image: Image.Image, path: Path) -> None:
    """Refuse what would take too much memory, before any is taken, and TIFFs that are not one picture."""
    if image.width * image.height > MOST_PIXELS:
        raise _too_many(path)
    if image.format != "TIFF":
        return
    tile = [_tag(image, TiffImagePlugin.TILEWIDTH), _tag(image, TiffImagePlugin.TILELENGTH)]
    if tile[0] * tile[1] > MOST_PIXELS:
        raise _too_many(path)
    if image.mode not in _TIFF_MODES:
        raise StudyError(f"{path}: a TIFF of another kind than 8- or 16-bit grey or 8-bit colour; save it as PNG")
    try:
        image.seek(1)
    except EOFError:
        image.seek(0)
        return
    raise StudyError(f"{path}: a TIFF of several pages; save the radiograph's page alone")


def _tag(image: Image.Image, tag: int) -> int:
    value = image.tag_v2.get(tag, 0)
    return int(value[0] if isinstance(value, tuple) else value)


def _grey(image: Image.Image, bits: int | None = None) -> Image.Image:
    if image.format == "JPEG":
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey
        deep = np.asarray(image).astype(np.int32)
        top = (1 << (bits or used_bits(int(deep.max())))) - 1
        np.clip(deep, 0, top, out=deep)
        if image.format == "TIFF" and _tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
            np.subtract(top, deep, out=deep)  # white is 0; Pillow inverts 8 bits, but not 16
        deep *= 255
        deep += top // 2
        deep //= top
        return Image.fromarray(deep.astype(np.uint8))
    if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, (0, 0, 0, 255)), layers).convert("RGB")
    return image if image.mode == "L" else image.convert("L")


def prepare_pixels(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bring a radiograph to (size, size) uint8: padded with black to a square, then resized by area.

    The aspect is kept, so that a heart's width means the same in every image. A smaller image is enlarged bilinearly.
    A square of 256 px or more is brought to 128 px as nih_9k was made, as `to_128` says.

    Args:
        pixels: (height, width) uint8.
        size: side of the result in pixels.
    """
    return np.asarray(square(Image.fromarray(pixels), size))


def square(image: Image.Image, size: int) -> Image.Image:
    """Pad and resize as `prepare_pixels` says.

    Args:
        image: of mode `L`.
        size: side of the result in pixels.
    """
    side = max(image.size)
    if image.width != image.height:
        padded = Image.new("L", (side, side))
        padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = padded
    if size == 128 and side >= 256:
        if side > 1024:
            image = image.resize((1024, 1024), Image.Resampling.BOX)
        return Image.fromarray(to_128(np.asarray(image)))
    return image.resize((size, size), Image.Resampling.BOX if side > size else Image.Resampling.BILINEAR)


def to_128(pixels: np.ndarray) -> np.ndarray:
    """Bring a square, (side, side) uint8 of 256 px or more, to 128 px as nih_9k was made from 1024 px.

    First to 256 px by bilinear interpolation between the pixels nearest to each new pixel's centre, then the mean of
    each 2 × 2, both rounded half up. (It is OpenCV's bilinear resizing, twice.) Means over whole areas are smoother.
    """
    centres = (np.arange(256) + 0.5) * (len(pixels) / 256) - 0.5
    before = centres.astype(int)
    after, share = np.minimum(before + 1, len(pixels) - 1), (centres - before).astype(np.float32)[:, np.newaxis]
    wide = pixels
    for _ in range(2):  # rows, then columns
        wide = (wide[before] * (1 - share) + wide[after] * share).T
    wide = np.floor(wide + 0.5).astype(np.uint16)
    return ((wide[::2, ::2] + wide[::2, 1::2] + wide[1::2, ::2] + wide[1::2, 1::2] + 2) >> 2).astype(np.uint8)

"""From an image file to the grey pixels that models take: decode it to 8 bits, pad it to a square, resize it.

It knows file formats and nothing of tables, datasets or models, and imports little: answering for a radiograph starts
here.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from chestxray.config import StudyError

SMALLEST_SIDE = 16
"""An image with a shorter side, in pixels, is no radiograph."""


def decode(path: Path) -> np.ndarray:
    """Read a PNG or JPEG radiograph as 8-bit grey.

    16-bit values are scaled by 255/65535, colour and palettes go to luma (ITU-R 601), transparent pixels are black,
    and a JPEG's orientation tag is obeyed.

    Returns:
        (height, width) uint8.

    Raises:
        StudyError: the file is missing, empty, no PNG or JPEG, broken off or too large or small to be a radiograph.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    return np.asarray(decode_bytes(data, path))


def decode_bytes(data: bytes, path: Path) -> Image.Image:
    """Decode the bytes of `path` to a grey image (mode `L`), as `decode` says; raises as it does."""
    if not data:
        raise StudyError(f"{path}: 0 bytes; download it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                image.load()
                grey = _grey(image)
    except Image.UnidentifiedImageError as error:
        raise StudyError(f"{path}: begins with {data[:8]!r}, no PNG or JPEG; replace it or save it as PNG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise StudyError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; save it smaller") from error
    except Exception as error:  # on broken data Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        raise StudyError(f"{path}: {len(data):,} bytes, broken ({error}); download it again") from error
    if min(grey.size) < SMALLEST_SIDE:
        raise StudyError(f"{path}: {grey.width} × {grey.height} px, too small for a radiograph; replace it")
    return grey


def _grey(image: Image.Image) -> Image.Image:
    if image.format == "JPEG":
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; 257 = 65535 / 255
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, (0, 0, 0, 255)), layers).convert("RGB")
    return image if image.mode == "L" else image.convert("L")


def prepare_pixels(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bring a radiograph to the working size: padded with black to a square, then resized by area.

    The aspect is kept, so that a heart's width means the same in every image. A smaller image is enlarged bilinearly.

    Args:
        pixels: (height, width) uint8.
        size: side of the result in pixels.

    Returns:
        (size, size) uint8.
    """
    return np.asarray(square(Image.fromarray(pixels), size))


def square(image: Image.Image, size: int) -> Image.Image:
    """Pad and resize an image of mode `L`, as `prepare_pixels` says."""
    side = max(image.size)
    if image.width != image.height:
        square = Image.new("L", (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if side == size:
        return image
    return image.resize((size, size), Image.Resampling.BOX if side > size else Image.Resampling.BILINEAR)

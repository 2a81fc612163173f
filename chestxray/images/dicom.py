"""From a DICOM file to the grey values of its radiograph, made as the study's PNGs were made from theirs.

It owns pydicom: compressed pixels, bit depths, modality LUT, VOI LUT or window, and which files are refused. The NIH's
PNGs are DICOM files "rescaled using the default window settings stored in the DICOM header" (Wang et al., CVPR 2017);
so the first window or VOI LUT is applied here. Only the elements of `_KEYWORDS` are read, none of which tells of a
patient, and of their texts only those on a list are passed on: no name, number, date or UID of a header can be written,
logged or be part of a message. Values of the header and pixel sizes are checked before memory is taken for them.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from chestxray.config import StudyError
from chestxray.images import pixels
from chestxray.images.pixels import Facts

if TYPE_CHECKING:
    import pydicom


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LARGEST_BITS = 16
MOST_ELEMENTS = 20_000
"""Elements of a header: a radiograph has a hundred or two. More are no radiograph, and take long to read."""

VIEWS = _words("PA AP LL RL LAT LATERAL LLAT RLAT LLD RLD LLO RLO LAO RAO LPO RPO OBL OBLIQUE")
"""View positions that are passed on (PS3.3 C.8.11.5.1.1 and what devices write)."""

BODY_PARTS = _words(
    "ABDOMEN ABDOMENPELVIS ANKLE ARM BREAST CALCANEUS CERVIX CHEST CLAVICLE COCCYX CSPINE ELBOW EXTREMITY FEMUR "
    "FINGER FOOT FOREARM HAND HEAD HEART HIP HUMERUS JAW KNEE LEG LSPINE LUNG MANDIBLE MAXILLA NECK ORBIT PATELLA "
    "PELVIS RIB RIBS RIBCAGE SACRUM SCAPULA SHOULDER SINUS SKULL SPINE SSPINE STERNUM TEETH THIGH THORAX THUMB "
    "TIBIA TOE TSPINE WHOLEBODY WRIST"
)
"""Body parts that are passed on (PS3.16 annex L)."""

MODALITIES = _words("CR DX RG RF XA PX IO MG CT MR US NM PT BMD OT SC XC ES GM SM ECG SR KO PR SEG DOC")
"""Modalities that are passed on (PS3.3 C.7.3.1.1.1)."""

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_KEYWORDS = [
    "SOPClassUID",
    "Modality",
    "PresentationIntentType",
    "BodyPartExamined",
    "ViewPosition",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "RescaleIntercept",
    "RescaleSlope",
    "ModalityLUTSequence",
    "VOILUTSequence",
    "PresentationLUTShape",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "PixelData",
]
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_EXPLICIT = b"1.2.840.10008.1.2.1\0\0\0"
_PREAMBLE = 128
_BLOCK = 1 << 20
"""Pixels looked up at a time: NumPy makes 64-bit indices of them."""

_EXPORT = "export the image again, or save it as PNG"


def decode(data: bytes, path: Path) -> tuple[np.ndarray, Facts]:
    """Decode a DICOM file as 8-bit grey, black air and white bone.

    Stored values go through modality LUT or rescale, then through the first VOI LUT or the first window (LINEAR,
    LINEAR_EXACT, SIGMOID; PS3.3 C.11.2). Without either, 8-bit values stay, and deeper ones are spread between the
    smallest and the largest in the image. MONOCHROME1, or a presentation LUT of shape INVERSE, is inverted. Pixel
    padding is black. Colour goes to luma (ITU-R 601).

    Args:
        data: the file.
        path: named in errors.

    Returns:
        (Rows, Columns) uint8, and what the header says of the image.

    Raises:
        StudyError: the file is damaged, has no pixels or several frames, or they are too many, too large or of a kind
            that no radiograph has; one line, with nothing of the header but sizes, kinds and encodings.
    """
    _hush()
    # The error is raised outside of `except`: pydicom's own may quote the header, and must not be chained to it.
    try:
        return _decode(data, path)
    except StudyError:
        raise
    except Exception:  # on broken data pydicom and the decoders raise errors of many kinds
        pass
    raise StudyError(f"{path}: {len(data):,} bytes, broken DICOM; {_EXPORT}")


def _hush() -> None:
    """Keep pydicom and its decoders from printing or logging: their warnings may quote the header.

    Not `warnings.catch_warnings`, which threads undo for each other; the filter stays.
    """
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"pydicom|pylibjpeg|libjpeg|openjpeg|rle\b|chestxray\.images\.dicom")


def _decode(data: bytes, path: Path) -> tuple[np.ndarray, Facts]:
    dataset = _read(data, path)
    shape = _Shape.of(dataset, path)
    facts = Facts(
        format="DICOM",
        view=_listed(dataset, "ViewPosition", VIEWS),
        body_part=_listed(dataset, "BodyPartExamined", BODY_PARTS),
        modality=_listed(dataset, "Modality", MODALITIES),
        raw=_text(dataset, "PresentationIntentType") == "FOR PROCESSING",
    )
    if shape.samples == 3:
        colour = Image.fromarray(_stored(dataset, shape, path))
        return np.asarray(colour.convert("L")), facts.of_colour(colour)
    stored = _stored(dataset, shape, path)
    stored = np.ascontiguousarray(stored).view(f"u{stored.dtype.itemsize}")
    table = _grey_table(dataset, shape, stored)
    return _look_up(table, stored), facts


def _read(data: bytes, path: Path) -> pydicom.FileDataset:
    """Read the elements of `_KEYWORDS`, and skip all others."""
    from pydicom.filereader import read_partial
    from pydicom.tag import Tag

    elements = 0

    def too_many(*_: object) -> bool:
        nonlocal elements
        elements += 1
        return elements > MOST_ELEMENTS

    tags = [Tag(name) for name in _KEYWORDS]
    dataset = read_partial(io.BytesIO(_inflate(data, path)), too_many, specific_tags=tags)
    if elements > MOST_ELEMENTS:
        raise StudyError(f"{path}: more than {MOST_ELEMENTS:,} elements in the DICOM header; {_EXPORT}")
    return dataset


def _inflate(data: bytes, path: Path) -> bytes:
    """Undo the deflated transfer syntax, within bounds; pydicom would take as much memory as the file asks for."""
    if _DEFLATED not in data[: _PREAMBLE + 1024]:
        if _DEFLATED in data:
            raise StudyError(f"{path}: a deflated DICOM with a long beginning; {_EXPORT}")
        return data
    (length,) = struct.unpack_from("<I", data, _PREAMBLE + 12)  # of the group that ends with the transfer syntax
    end = _PREAMBLE + 16 + length
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    rest = inflater.decompress(data[end:], pixels.MOST_BYTES + 1)
    if len(rest) > pixels.MOST_BYTES:
        raise StudyError(f"{path}: more than {pixels.MOST_BYTES:,} bytes when inflated; {_EXPORT}")
    return data[:end].replace(_DEFLATED, _EXPLICIT) + rest


@dataclass(frozen=True)
class _Shape:
    """Size and kind of the stored pixels, as the header gives them and as they may be.

    Attributes:
        rows, columns: of the image.
        samples: 1 grey, 3 colour.
        allocated, stored: bits a sample takes, and has.
        shift: bits below the stored ones.
        signed: two's complement.
    """

    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    shift: int
    signed: bool

    @classmethod
    def of(cls, dataset: pydicom.Dataset, path: Path) -> _Shape:
        """Read and check it.

        Raises:
            StudyError: no pixels, several frames, or too many, too large or unusual ones.
        """
        if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
            raise StudyError(f"{path}: floating-point pixels; {_EXPORT}")
        rows, columns = (_whole(dataset, name) for name in ("Rows", "Columns"))
        if "PixelData" not in dataset or not rows or not columns:
            raise StudyError(f"{path}: a DICOM without an image{_sop_class(dataset)}; give the file of the radiograph")
        if (frames := _whole(dataset, "NumberOfFrames", 1)) > 1:
            raise StudyError(f"{path}: {frames} frames; export the frame of the radiograph alone")
        samples = _whole(dataset, "SamplesPerPixel", 1)
        if rows * columns * samples > pixels.MOST_PIXELS:
            raise StudyError(f"{path}: more than {pixels.MOST_PIXELS:,} pixels; save it smaller")
        if min(rows, columns) < pixels.SMALLEST_SIDE:
            raise pixels.too_small(path, columns, rows)
        kind = _text(dataset, "PhotometricInterpretation")
        wanted = {1: _GREY, 3: _COLOUR}.get(samples, ())
        if kind not in wanted:
            named = kind if kind in (*_GREY, *_COLOUR, "PALETTE COLOR") else "unknown"
            raise StudyError(f"{path}: {named} pixels of {samples} samples; save it as grey, or as PNG")
        allocated = _whole(dataset, "BitsAllocated")
        stored = _whole(dataset, "BitsStored", allocated)
        high = _whole(dataset, "HighBit", stored - 1)
        most = LARGEST_BITS if samples == 1 else 8
        if allocated not in (8, 16) or not 8 <= stored <= min(allocated, most) or not stored - 1 <= high < allocated:
            bits = f"{stored} of {allocated} bits a sample, the highest {high}"
            raise StudyError(f"{path}: {bits}; save it with 8{'' if most == 8 else f' to {most}'} bits")
        signed = _whole(dataset, "PixelRepresentation", 0) == 1
        return cls(rows, columns, samples, allocated, stored, high + 1 - stored, signed)


def _stored(dataset: pydicom.Dataset, shape: _Shape, path: Path) -> np.ndarray:
    """The pixels as they are stored, (rows, columns) of 8 or 16 bits, or (rows, columns, 3) uint8 as RGB.

    Raises:
        StudyError: the encoding is unknown, or the pixels are more or less than the header says.
    """
    from pydicom.pixels import get_decoder
    from pydicom.uid import JPEGBaseline8Bit, RLELossless

    syntax = dataset.file_meta.TransferSyntaxUID
    # One decoder each: another one's try at broken pixels only costs time. Pillow's is the usual one for JPEG.
    plugin = ("pillow" if syntax == JPEGBaseline8Bit else "pylibjpeg") if syntax.is_encapsulated else ""
    try:
        decoder = get_decoder(syntax)
        readable = not plugin or plugin in decoder.available_plugins
    except NotImplementedError:
        readable = False
    if not readable:
        raise StudyError(f"{path}: pixels are encoded as {_syntax_name(syntax)}, which can't be read here; {_EXPORT}")
    if syntax.is_encapsulated:
        _check_frame(dataset, shape, syntax == RLELossless, path)
    array, _ = decoder.as_array(dataset, index=0, decoding_plugin=plugin, correct_unused_bits=False)
    expected = (shape.rows, shape.columns) if shape.samples == 1 else (shape.rows, shape.columns, 3)
    if array.shape != expected or array.dtype.itemsize > 2 or (shape.samples == 3 and array.dtype != np.uint8):
        raise StudyError(f"{path}: pixels are not those that the DICOM header describes; {_EXPORT}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _check_frame(dataset: pydicom.Dataset, shape: _Shape, rle: bool, path: Path) -> None:
    """Hold the size that a compressed frame gives against the header, before a decoder takes memory for it.

    Raises:
        StudyError: they differ.
    """
    from pydicom.encaps import get_frame

    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if rle:
        segments = struct.unpack_from("<I", frame)[0]
        found = (shape.rows, shape.columns, segments / (shape.allocated // 8))
    else:
        found = _jpeg_size(frame) or _jpeg_2000_size(frame)
    if found != (shape.rows, shape.columns, shape.samples):
        raise StudyError(f"{path}: compressed pixels are not of the size in the DICOM header; {_EXPORT}")


def _jpeg_size(frame: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and components of a JPEG or JPEG-LS stream (ITU-T T.81 B.2.2, T.87 C.2.2); None if it is none."""
    if frame[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 10 <= len(frame) and frame[place] == 0xFF:
        kind = frame[place + 1]
        if kind == 0xFF:  # fill
            place += 1
        elif kind == 0xF7 or (0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">HHB", frame, place + 5)
        else:
            place += 2 + struct.unpack_from(">H", frame, place + 2)[0]
    return None


def _jpeg_2000_size(frame: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and components of a JPEG 2000 codestream (ITU-T T.800 A.5.1), its parts all of one size.

    None if it is none, or if components are sampled or stored differently, or tiles are many or larger than the image.
    """
    place = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if place < 0:
        return None
    right, bottom, left, top, width, height, *_, components = struct.unpack_from(">8IH", frame, place + 8)
    each = frame[place + 42 : place + 42 + 3 * components]
    alike = len(set(zip(each[0::3], each[1::3], each[2::3], strict=False))) == 1 and each[1:3] == b"\1\1"
    if not alike or right <= left or bottom <= top or not width or not height:
        return None
    tiles = -(-right // width) * -(-bottom // height)
    return (bottom - top, right - left, components) if tiles <= 4096 else None


def _grey_table(dataset: pydicom.Dataset, shape: _Shape, stored: np.ndarray) -> np.ndarray:
    """The grey value of every pattern of bits that a stored sample can have: (256,) or (65536,) uint8.

    At most 16 bits a sample make all arithmetic one of a table, exact and of a fixed cost.
    """
    patterns = np.arange(1 << (8 * stored.dtype.itemsize))
    shift = 0 if _is_jpeg(dataset) else shape.shift
    values = (patterns >> shift) & ((1 << shape.stored) - 1)
    if shape.signed:
        values = values - ((values >> (shape.stored - 1)) << shape.stored)
    padding = _padding(dataset, shape, values)
    physical, linear = _modality(dataset, values)
    window = _window(dataset)
    if lut := _lut(dataset, "VOILUTSequence"):
        share = lut.apply(physical) / lut.top
    elif window:
        share = window.apply(physical)
    else:
        used = np.ones(len(patterns), dtype=bool)
        if shape.stored > 8 or not linear:
            used = _used(stored, len(patterns)) & ~padding
        low, high = (physical[used].min(), physical[used].max()) if used.any() else (0, 0)
        share = (physical - low) / (high - low) if high > low else np.zeros(len(patterns))
    grey = np.rint(share.clip(0, 1) * 255).astype(np.uint8)
    inverse = _text(dataset, "PresentationLUTShape") == "INVERSE"
    if inverse or _text(dataset, "PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey
    grey[padding] = 0
    return grey


def _is_jpeg(dataset: pydicom.Dataset) -> bool:
    """Whether a decoder has put the samples right: in any JPEG they begin at bit 0, whatever HighBit says."""
    from pydicom.uid import RLELossless

    syntax = dataset.file_meta.TransferSyntaxUID
    return syntax.is_encapsulated and syntax != RLELossless


def _padding(dataset: pydicom.Dataset, shape: _Shape, values: np.ndarray) -> np.ndarray:
    """Which stored values are pixel padding (PS3.3 C.7.5.1.1.2), bool of the shape of `values`."""
    first = _whole(dataset, "PixelPaddingValue", None)
    if first is None:
        return np.zeros(len(values), dtype=bool)
    ends = [first, _whole(dataset, "PixelPaddingRangeLimit", first)]
    # Written as unsigned where pixels are signed, or the other way round.
    span = 1 << shape.allocated
    ends = [(end + (span >> 1)) % span - (span >> 1) if shape.signed else end % span for end in ends]
    return (values >= min(ends)) & (values <= max(ends))


def _modality(dataset: pydicom.Dataset, values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Stored values as what the device means by them, float64, and whether that is a line (PS3.3 C.11.1)."""
    if lut := _lut(dataset, "ModalityLUTSequence"):
        return lut.apply(values), False
    slope, intercept = _number(dataset, "RescaleSlope", 1.0), _number(dataset, "RescaleIntercept", 0.0)
    if not slope or not np.isfinite((slope, intercept)).all():
        raise ValueError("no slope")
    return values * slope + intercept, True


@dataclass(frozen=True)
class _Lut:
    """A table of the header (PS3.3 C.11.1.1): the first value that it maps, its entries, and the largest possible."""

    first: int
    entries: np.ndarray
    top: int

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Values below the first map to the first entry, above the last to the last; float64."""
        return self.entries[(np.rint(values).astype(np.int64) - self.first).clip(0, len(self.entries) - 1)]


def _lut(dataset: pydicom.Dataset, keyword: str) -> _Lut | None:
    if not dataset.get(keyword):
        return None
    item = dataset[keyword].value[0]
    length, first, bits = (int(value) for value in item.LUTDescriptor)
    length = (length & 0xFFFF) or 1 << 16  # 0 stands for 65,536
    if item["LUTDescriptor"].VR == "US" and first >= 1 << 15 and keyword == "ModalityLUTSequence":
        first -= (1 << 16) * (_whole(dataset, "PixelRepresentation", 0) == 1)
    data = item.LUTData
    if isinstance(data, bytes):
        wide = len(data) >= 2 * length
        little = dataset.original_encoding[1]
        entries = np.frombuffer(data, ("<u2" if little else ">u2") if wide else np.uint8)[:length]
    else:
        entries = np.atleast_1d(np.asarray(data, dtype=np.int64))[:length] & 0xFFFF
    if len(entries) < length or not 8 <= bits <= LARGEST_BITS:
        raise ValueError("no table")
    return _Lut(first, entries.astype(np.float64), (1 << bits) - 1)


@dataclass(frozen=True)
class _Window:
    """The VOI window of the header (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""

    centre: float
    width: float
    function: str

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Values as shares of the output's range; those outside of 0–1 are to be clipped."""
        if self.function == "SIGMOID":
            return 1 / (1 + np.exp((-4 * (values - self.centre) / self.width).clip(-700, 700)))
        if self.function == "LINEAR_EXACT":
            return (values - self.centre) / self.width + 0.5
        if self.width == 1:
            return (values > self.centre - 0.5).astype(np.float64)
        return (values - (self.centre - 0.5)) / (self.width - 1) + 0.5


def _window(dataset: pydicom.Dataset) -> _Window | None:
    """The first window; None where there is none, or one that shows nothing."""
    centre, width = _number(dataset, "WindowCenter", np.nan), _number(dataset, "WindowWidth", np.nan)
    function = _text(dataset, "VOILUTFunction") or "LINEAR"
    if not np.isfinite((centre, width)).all() or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    return _Window(centre, width, function)


def _used(stored: np.ndarray, patterns: int) -> np.ndarray:
    """Which patterns occur, (patterns,) bool."""
    used = np.zeros(patterns, dtype=bool)
    flat = stored.reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        used[flat[start : start + _BLOCK]] = True
    return used


def _look_up(table: np.ndarray, stored: np.ndarray) -> np.ndarray:
    grey = np.empty(stored.shape, dtype=np.uint8)
    source, target = stored.reshape(-1), grey.reshape(-1)
    for start in range(0, len(source), _BLOCK):
        target[start : start + _BLOCK] = table[source[start : start + _BLOCK]]
    return grey


def _first(dataset: pydicom.Dataset, keyword: str) -> Any:
    """The first value of an element, None if it is missing or empty."""
    value = dataset.get(keyword)
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    return value[0] if len(value) else None


def _number(dataset: pydicom.Dataset, keyword: str, default: float) -> float:
    value = _first(dataset, keyword)
    return default if value is None or value == "" else float(value)


def _whole(dataset: pydicom.Dataset, keyword: str, default: int | None = 0) -> int | None:
    value = _first(dataset, keyword)
    return default if value is None or value == "" else int(value)


def _text(dataset: pydicom.Dataset, keyword: str) -> str:
    value = _first(dataset, keyword)
    return value.strip().upper() if isinstance(value, str) else ""


def _listed(dataset: pydicom.Dataset, keyword: str, known: frozenset[str]) -> str:
    """A text of the header if it is one of those that may be passed on, else nothing."""
    value = _text(dataset, keyword).replace(" ", "")
    return value if value in known else ""


def _sop_class(dataset: pydicom.Dataset) -> str:
    """What the file is instead of an image, in parentheses, where DICOM has a name for it."""
    from pydicom.uid import UID

    name = UID(str(_first(dataset, "SOPClassUID") or "")).name
    return f" ({name})" if name.endswith("Storage") else ""


def _syntax_name(syntax: pydicom.uid.UID) -> str:
    return syntax.name if syntax.is_transfer_syntax and not syntax.is_private else "something unknown"

"""DICOM: the grey values of a radiograph, made as the study's PNGs were made from theirs.

The NIH's PNGs are DICOM files "rescaled using the default window settings stored in the DICOM header" (Wang et al.,
CVPR 2017); so the first window or VOI LUT is applied here. Only the elements of `_KEYWORDS` are read, none of which
says anything of a patient, and of their texts only those on a list are passed on: no name, number, date or UID of a
header can be written, logged or be part of a message. Values of the header and pixel sizes are checked before memory
is taken for them.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
from collections.abc import MutableSequence
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
_KEYWORDS = _words(
    "SOPClassUID Modality PresentationIntentType BodyPartExamined ViewPosition SamplesPerPixel "
    "PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns BitsAllocated BitsStored HighBit "
    "PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit WindowCenter WindowWidth VOILUTFunction "
    "RescaleIntercept RescaleSlope ModalityLUTSequence VOILUTSequence PresentationLUTShape ExtendedOffsetTable "
    "ExtendedOffsetTableLengths PixelData"
)

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_MOST_INFLATED = 1032
"""No deflated byte stands for more bytes than this (zlib's technical details)."""

_BLOCK = 1 << 20
"""Pixels looked up at a time: NumPy makes 64-bit indices of them."""

_EXPORT = "export the image again, or save it as PNG"


def decode(data: bytes, path: Path) -> tuple[np.ndarray, Facts]:
    """Decode a DICOM file as 8-bit grey, (Rows, Columns), black air and white bone, and what its header says of it.

    Stored values go through modality LUT or rescale, then through the first VOI LUT or the first window (LINEAR,
    LINEAR_EXACT, SIGMOID; PS3.3 C.11.2). Without either, 8-bit values stay, and deeper ones are spread between the
    smallest and the largest in the image. MONOCHROME1, or a presentation LUT of shape INVERSE, is inverted. Pixel
    padding is black. Colour goes to luma (ITU-R 601).

    Args:
        data: the file.
        path: named in errors.

    Raises:
        StudyError: the file is damaged, has no pixels or several frames, or they are too many, too large or of a kind
            that no radiograph has; or it might inflate to more than `pixels.MOST_BYTES`. Of the header it names only
            sizes, kinds and encodings.
    """
    # Warnings may quote the header. `warnings.catch_warnings` is no help: threads undo it for each other.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"pydicom|pylibjpeg|libjpeg|openjpeg|rle\b|chestxray\.images\.dicom")
    # The error is raised outside of `except`: pydicom's own may quote the header, and must not be chained to it.
    try:
        dataset = _read(data, path)
        shape = _Shape.of(dataset, path)
        facts = Facts(
            format="DICOM",
            view=_listed(dataset, "ViewPosition", VIEWS),
            body_part=_listed(dataset, "BodyPartExamined", BODY_PARTS),
            modality=_listed(dataset, "Modality", MODALITIES),
            raw=_text(dataset, "PresentationIntentType") == "FOR PROCESSING",
        )
        stored = _stored(dataset, shape, path)
        if shape.samples == 3:
            colour = Image.fromarray(stored)
            return np.asarray(colour.convert("L")), facts.of_colour(colour)
        stored = np.ascontiguousarray(stored).view(f"u{stored.dtype.itemsize}")
        table, grey = _grey_table(dataset, shape, stored), np.empty(stored.shape, dtype=np.uint8)
        for source, target in zip(_blocks(stored), _blocks(grey), strict=True):
            target[:] = table[source]
        return grey, facts
    except StudyError:
        raise
    except Exception:  # on broken data pydicom and the decoders raise errors of many kinds
        pass
    raise StudyError(f"{path}: {len(data):,} bytes, broken DICOM; {_EXPORT}")


def _read(data: bytes, path: Path) -> pydicom.FileDataset:
    """Read the elements of `_KEYWORDS` that have a value, and skip all others, in bounded memory."""
    from pydicom.filereader import read_partial
    from pydicom.tag import Tag

    if _DEFLATED in data and len(data) * _MOST_INFLATED > pixels.MOST_BYTES:
        raise StudyError(
            f"{path}: a deflated DICOM of {len(data):,} bytes, which may be more than {pixels.MOST_BYTES:,} when "
            "inflated; export the image in another encoding, or save it as PNG"
        )
    elements = 0

    def too_many(*_: object) -> bool:
        nonlocal elements
        elements += 1
        return elements > MOST_ELEMENTS

    dataset = read_partial(io.BytesIO(data), too_many, specific_tags=[Tag(name) for name in _KEYWORDS])
    if elements > MOST_ELEMENTS:
        raise StudyError(f"{path}: more than {MOST_ELEMENTS:,} elements in the DICOM header; {_EXPORT}")
    for keyword in _KEYWORDS:
        if keyword in dataset and dataset[keyword].is_empty:
            del dataset[keyword]
    return dataset


@dataclass(frozen=True)
class _Shape:
    """Size and kind of the stored pixels, as the header gives them and as they may be."""

    rows: int
    columns: int
    samples: int  # 1 grey, 3 colour
    allocated: int  # bits that a sample takes
    stored: int  # bits that it has
    shift: int  # bits below the stored ones
    signed: bool  # two's complement

    @classmethod
    def of(cls, dataset: pydicom.Dataset, path: Path) -> _Shape:
        """Read it; a StudyError for no pixels, several frames, or too many, too large or unusual ones."""
        from pydicom.uid import UID

        rows, columns = (_whole(dataset, name) for name in ("Rows", "Columns"))
        if "PixelData" not in dataset or not rows or not columns:
            name = UID(str(_first(dataset, "SOPClassUID") or "")).name
            found = f" ({name})" if name.endswith("Storage") else ""  # what the file is instead
            raise StudyError(f"{path}: a DICOM without an image{found}; give the file of the radiograph")
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
    """The pixels as they are stored, (rows, columns) of 8 or 16 bits, or (rows, columns, 3) uint8 as RGB."""
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
        name = syntax.name if syntax.is_transfer_syntax and not syntax.is_private else "something unknown"
        raise StudyError(f"{path}: pixels are encoded as {name}, which can't be read here; {_EXPORT}")
    if syntax.is_encapsulated:
        _check_frame(dataset, shape, syntax == RLELossless, path)
    array, _ = decoder.as_array(dataset, index=0, decoding_plugin=plugin, correct_unused_bits=False)
    expected = (shape.rows, shape.columns) if shape.samples == 1 else (shape.rows, shape.columns, 3)
    if array.shape != expected or array.dtype.itemsize > 2 or (shape.samples == 3 and array.dtype != np.uint8):
        raise StudyError(f"{path}: pixels are not those that the DICOM header describes; {_EXPORT}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _check_frame(dataset: pydicom.Dataset, shape: _Shape, rle: bool, path: Path) -> None:
    """Compare the size that a compressed frame gives with the header's, before a decoder takes memory for it."""
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
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    from pydicom.uid import RLELossless

    patterns = np.arange(1 << (8 * stored.dtype.itemsize))
    syntax = dataset.file_meta.TransferSyntaxUID
    # A JPEG's decoder has put the samples right: they begin at bit 0, whatever HighBit says.
    shift = 0 if syntax.is_encapsulated and syntax != RLELossless else shape.shift
    values = (patterns >> shift) & ((1 << shape.stored) - 1)
    if shape.signed:
        values = values - ((values >> (shape.stored - 1)) << shape.stored)
    padding = _padding(dataset, shape, values)
    modality_top, voi_top = (_repair_lut(dataset, f"{kind}LUTSequence") for kind in ("Modality", "VOI"))
    for keyword, default in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
        setattr(dataset, keyword, _first(dataset, keyword, default))
    physical = apply_modality_lut(values, dataset).astype(np.float64)
    if not np.isfinite(physical).all() or np.ptp(physical) == 0:
        raise ValueError("no slope")
    if voi_top:
        length, first, _ = dataset.VOILUTSequence[0].LUTDescriptor
        mapped = np.rint(physical).clip(first, first + length - 1).astype(np.int64)  # pydicom counts in 16 bits
        grey = apply_voi_lut(mapped, dataset) / voi_top * 255
    elif window := _window(dataset):
        grey = apply_voi_lut(physical, window)
    else:
        used = np.full(len(patterns), shape.stored <= 8 and not modality_top)
        if not used[0]:
            for block in _blocks(stored):
                used[block] = True
            used &= ~padding
        low, high = (physical[used].min(), physical[used].max()) if used.any() else (0, 0)
        grey = (physical - low) / (high - low) * 255 if high > low else np.zeros(len(patterns))
    grey = np.rint(grey.clip(0, 255)).astype(np.uint8)
    inverse = _text(dataset, "PresentationLUTShape") == "INVERSE"
    if inverse or _text(dataset, "PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey
    grey[padding] = 0
    return grey


def _padding(dataset: pydicom.Dataset, shape: _Shape, values: np.ndarray) -> np.ndarray:
    """Which stored values are pixel padding (PS3.3 C.7.5.1.1.2), bool of the shape of `values`."""
    if "PixelPaddingValue" not in dataset:
        return np.zeros(len(values), dtype=bool)
    first = _whole(dataset, "PixelPaddingValue")
    ends = [first, _whole(dataset, "PixelPaddingRangeLimit", first)]
    # Written as unsigned where pixels are signed, or the other way round.
    span = 1 << shape.allocated
    ends = [(end + (span >> 1)) % span - (span >> 1) if shape.signed else end % span for end in ends]
    return (values >= min(ends)) & (values <= max(ends))


def _repair_lut(dataset: pydicom.Dataset, keyword: str) -> int:
    """Rewrite a LUT so that pydicom applies it as PS3.3 C.11.1.1 says, and return its largest possible entry.

    pydicom 3.0 takes packed entries of 8 bits for 16, counts more than 256 of them in 8 bits, and refuses depths
    between the two in a modality LUT. Entries of 16 bits are right. 0 where there is no LUT.
    """
    if not dataset.get(keyword):
        return 0
    item = dataset[keyword].value[0]
    (length, first, bits), data = item.LUTDescriptor, item.LUTData
    length = length or 1 << 16
    if keyword == "ModalityLUTSequence" and _whole(dataset, "PixelRepresentation") == 1 and first >= 1 << 15:
        first -= 1 << 16  # written as unsigned
    order = "><"[dataset.original_encoding[1]]
    if isinstance(data, bytes):
        data = np.frombuffer(data, f"{order}u2" if len(data) >= 2 * length else np.uint8)
    entries = np.atleast_1d(data)[:length]
    if len(entries) < length or not 8 <= bits <= LARGEST_BITS:
        raise ValueError("no table")
    item.add_new("LUTDescriptor", "SL", [length, first, 16])
    item.add_new("LUTData", "OW", entries.astype(f"{order}u2").tobytes())
    return (1 << bits) - 1


def _window(dataset: pydicom.Dataset) -> pydicom.Dataset | None:
    """The first window as pydicom applies it, to grey values from 0 to 255; None where there is none of any use."""
    from pydicom import Dataset

    centre, width = _first(dataset, "WindowCenter", np.nan), _first(dataset, "WindowWidth", np.nan)
    function = _text(dataset, "VOILUTFunction")
    function = function if function in ("LINEAR_EXACT", "SIGMOID") else "LINEAR"
    if not np.isfinite((centre, width)).all() or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    window = Dataset()
    window.WindowCenter, window.WindowWidth, window.VOILUTFunction = centre, width, function
    # The output's range is that of the stored values.
    window.PhotometricInterpretation, window.BitsStored, window.PixelRepresentation = "MONOCHROME2", 8, 0
    return window


def _blocks(values: np.ndarray) -> list[np.ndarray]:
    """Views on all values, a block each."""
    return np.array_split(values.reshape(-1), values.size // _BLOCK + 1)


def _first(dataset: pydicom.Dataset, keyword: str, default: Any = None) -> Any:
    """The first value of an element, `default` if it is missing."""
    value = dataset.get(keyword, default)
    return value[0] if isinstance(value, MutableSequence) else value


def _whole(dataset: pydicom.Dataset, keyword: str, default: int = 0) -> int:
    return int(_first(dataset, keyword, default))


def _text(dataset: pydicom.Dataset, keyword: str) -> str:
    value = _first(dataset, keyword)
    return value.strip().upper() if isinstance(value, str) else ""


def _listed(dataset: pydicom.Dataset, keyword: str, known: frozenset[str]) -> str:
    """A text of the header if it is one of those that may be passed on, else nothing."""
    value = _text(dataset, keyword).replace(" ", "")
    return value if value in known else ""

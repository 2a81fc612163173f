"""Archives (tar.gz, tar, zip) taken apart without trust: an archive is wholly sound and harmless, or nothing is taken.

It owns what an archive may do: no path outside the target, no links or devices, no more members and bytes than a part
of the dataset has. It must not know which files matter: the caller says where each goes.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from chestxray import files
from chestxray.config import StudyError

Place = Callable[[PurePosixPath], Path | None]

MEMBERS = 250_000
"""Members of an archive, at most: the whole dataset has 112,120 images."""

MEMBER_BYTES = 128 << 20
"""Bytes of a member, at most: the largest radiograph has less than 2 MB, the largest table 10 MB."""

RATIO = 20
ROOM = 64 << 20
"""An archive may hold `RATIO` times its own bytes, and `ROOM`: PNGs don't shrink, tables do by about 8."""

_SIGNATURES = {b"\x1f\x8b": "tar.gz", b"PK\x03\x04": "zip", b"PK\x05\x06": "zip"}
_BLOCK = 512
BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    OverflowError,
)
"""What the standard library raises on damaged archives."""


class Refused(Exception):
    """An archive does what none of ours does."""


class Member(NamedTuple):
    """A file in an archive: its name, how many bytes it says it has, and a function that reads them."""

    name: PurePosixPath
    size: int
    read: Callable[[], bytes]


def kind(path: Path) -> str:
    """`tar.gz`, `zip`, `tar`, or empty for what is no archive, told by its first bytes and not by its name."""
    with path.open("rb") as file:
        head = file.read(262)
    if head[257:262] == b"ustar":
        return "tar"
    return next((name for signature, name in _SIGNATURES.items() if head.startswith(signature)), "")


def extract(path: Path, place: Place, source: str = "") -> list[Path]:
    """Take files out of an archive, each complete or absent, after the whole archive was found sound and harmless.

    Args:
        path: a tar.gz, tar or zip.
        place: where a member goes, by its name in the archive; None leaves it. A file that is there already with the
            same bytes is not written again.
        source: what the archive is called in errors, such as its URL; `path` where empty.

    Returns:
        The files, written now or there already.

    Raises:
        StudyError: it is no archive, damaged or hostile, and nothing was taken out of it; or the disk is full.
    """
    called = source or str(path)
    with _judged(path, called):
        _inspect(path, place)
    written = []
    with _judged(path, called):
        for member in tqdm(members(path), desc=f"Extracting {path.name}", unit="file", disable=None):
            if (target := place(member.name)) is not None:
                data = member.read()
                if not (target.is_file() and target.stat().st_size == len(data) and target.read_bytes() == data):
                    files.atomic_write(target, data)
                written.append(target)
    return written


@contextlib.contextmanager
def _judged(path: Path, called: str) -> Iterator[None]:
    """Turn what is wrong with an archive into one line."""
    try:
        yield
    except Refused as error:
        raise StudyError(
            f"{called}: {error}; nothing was taken out of it: get the archive from its publisher"
        ) from error
    except BROKEN as error:
        size = path.stat().st_size if path.exists() else 0
        raise StudyError(
            f"{called}: broken archive of {size:,} bytes ({_first_line(error)}); nothing was taken out of it: "
            "fetch it again"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _inspect(path: Path, place: Place) -> None:
    """Read all of an archive and judge it."""
    seen: set[PurePosixPath] = set()
    taken = 0
    for member in members(path):
        if member.name in seen:
            raise Refused(f"holds {str(member.name)!r} twice")
        seen.add(member.name)
        if len(member.read()) != member.size:
            raise EOFError(f"{member.name} is shorter than its {member.size:,} bytes")
        taken += place(member.name) is not None
    if not taken:
        raise Refused(f"holds no file of the dataset among its {len(seen)}")


def members(path: Path, most: int = 0) -> Iterator[Member]:
    """The files of an archive in its order, each with a safe name and within bounds; folders are left out.

    Args:
        path: a tar.gz, tar or zip.
        most: members it may have; MEMBERS where 0.

    Raises:
        Refused: it does what it must not.
        Exception: one of `BROKEN`; it is damaged.
    """
    archive = kind(path)
    if not archive:
        with path.open("rb") as file:
            raise Refused(f"begins with {file.read(16)!r}, no tar.gz or zip")
    bound = RATIO * path.stat().st_size + ROOM
    count = total = 0
    for member in (_of_zip if archive == "zip" else _of_tar)(path, bound):
        count, total = count + 1, total + member.size
        if count > (most or MEMBERS):
            raise Refused(f"holds more than {most or MEMBERS:,} files")
        if member.size > MEMBER_BYTES:
            raise Refused(f"{str(member.name)!r} has {member.size:,} bytes, more than any file of the dataset")
        if total > bound:
            raise Refused(f"unpacks to more than {bound:,} bytes, {RATIO} times its size")
        yield member


def safe(name: str) -> PurePosixPath:
    """A member's name as a path that stays below the target.

    Raises:
        Refused: it does not.
    """
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
    if outside or not path.parts or not name.isprintable() or len(name) > 1000:
        raise Refused(f"holds the path {name[:80]!r}, which leads out of the folder")
    return path


def _of_zip(path: Path, bound: int) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > MEMBERS:
            raise Refused(f"holds {len(entries):,} files, more than the dataset has")
        if sum(entry.file_size for entry in entries) > bound:
            raise Refused(f"unpacks to more than {bound:,} bytes, {RATIO} times its size")
        for entry in entries:
            mode = entry.external_attr >> 16
            if entry.is_dir():
                continue
            name = safe(entry.filename)
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise Refused(f"{entry.filename!r} is a link or device")
            if entry.flag_bits & 1:
                raise Refused(f"{entry.filename!r} is encrypted")

            def read(entry: zipfile.ZipInfo = entry) -> bytes:
                with archive.open(entry) as file:  # checks the CRC at the end, and stops at the promised size
                    return file.read(entry.file_size + 1)

            yield Member(name, entry.file_size, read)


def _of_tar(path: Path, bound: int) -> Iterator[Member]:
    with path.open("rb") as file:
        stream = gzip.GzipFile(fileobj=file) if kind(path) == "tar.gz" else file
        bounded = _Bounded(stream, bound)
        with tarfile.open(fileobj=bounded, mode="r:", errors="strict") as archive:
            while (entry := archive.next()) is not None:
                archive.members.clear()  # or it keeps one for each of 100,000 images
                if entry.isdir():
                    continue
                name = safe(entry.name)
                if not entry.isreg() or entry.sparse is not None:
                    raise Refused(f"{entry.name!r} is a link, a device or has holes")

                def read(entry: tarfile.TarInfo = entry) -> bytes:
                    return archive.extractfile(entry).read(entry.size + 1)

                yield Member(name, entry.size, read)
            # tarfile takes a damaged header for the end; the true end is a block of zeros.
            if bounded.last.count(0) != _BLOCK:
                raise EOFError("it ends in the middle")
        while bounded.read(1 << 20):  # to the checksum at the end of the gzip stream
            pass


class _Bounded:
    """A stream to read and skip forward in, which refuses to give more than `bound` bytes in all."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile, bound: int) -> None:
        self._stream, self._bound = stream, bound
        self.last = b""

    def read(self, size: int) -> bytes:
        self._check(size, self._stream.tell() if size > _BLOCK else 0)
        self.last = self._stream.read(size)
        self._check(0, self._stream.tell())
        return self.last

    def seek(self, position: int, whence: int = 0) -> int:
        self._check(0, position)
        return self._stream.seek(position, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self, size: int, position: int) -> None:
        if size > MEMBER_BYTES:
            raise Refused(f"promises a part of {size:,} bytes, more than any file of the dataset")
        if position > self._bound:
            raise Refused(f"unpacks to more than {self._bound:,} bytes, {RATIO} times its size")

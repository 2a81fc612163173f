"""Archives that break out, explode or are half there give nothing; good ones give all."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
from faults import note
from tarballs import tar

from chestxray.config import StudyError
from chestxray.data import archives

NOISE = np.random.default_rng(1).bytes(30_000)


def zipped(*members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name used twice
        for name, content, *mode in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (mode[0] if mode else 0o100644) << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def damaged_header(members) -> bytes:
    """A tar.gz with sound gzip checksums whose second header is overwritten: tarfile takes it for the end."""
    plain = bytearray(gzip.decompress(tar(*members)))
    second = 512 + -(-len(members[0][1]) // 512) * 512
    plain[second : second + 100] = b"\xff" * 100
    return gzip.compress(bytes(plain))


def sparse() -> bytes:
    info = tarfile.TarInfo("images/a.png")
    info.type = tarfile.GNUTYPE_SPARSE
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)


def encrypted(data: bytes) -> bytes:
    """A zip whose headers say that its members are encrypted."""
    data = data.replace(b"PK\x03\x04\x14\0\0\0", b"PK\x03\x04\x14\0\1\0")
    return data.replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0")


def belittled(data: bytes, size: int) -> bytes:
    """A zip whose headers give a member of `size` bytes a thousandth of them."""
    return data.replace(struct.pack("<I", size), struct.pack("<I", size // 1000))


def promising() -> bytes:
    """A tar.gz whose first header promises more names than memory holds."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 6 << 30
    return gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 20))


GOOD = [("images/a.png", NOISE), ("images/b.png", NOISE[::-1])]
HOSTILE = {
    "tar.gz: path with ..": tar(*GOOD, ("images/../../escaped.png", NOISE)),
    "tar.gz: absolute path": tar(*GOOD, ("/tmp/escaped.png", NOISE)),
    "tar.gz: path with a backslash": tar(*GOOD, ("images\\..\\..\\escaped.png", NOISE)),
    "tar.gz: symbolic link": tar(*GOOD, ("images/c.png", tarfile.SYMTYPE, "/etc/passwd")),
    "tar.gz: hard link": tar(*GOOD, ("images/c.png", tarfile.LNKTYPE, "/etc/passwd")),
    "tar.gz: link to a folder, then a file through it": tar(
        ("images", tarfile.SYMTYPE, "/tmp"), ("images/escaped.png", NOISE)
    ),
    "tar.gz: device": tar(*GOOD, ("images/c.png", tarfile.CHRTYPE, "")),
    "tar.gz: file with holes": sparse(),
    "tar.gz: one name twice": tar(*GOOD, ("images/a.png", NOISE[:9])),
    "tar.gz: bomb": tar(("images/a.png", bytes(100_000_000))),
    "tar.gz: bomb in a member that is left": tar(*GOOD, ("other.bin", bytes(100_000_000))),
    "tar.gz: member larger than any radiograph": tar(("images/a.png", bytes(archives.MEMBER_BYTES + 1))),
    "tar.gz: nothing of the dataset": tar(("notes.md", NOISE)),
    "zip: path with ..": zipped(*GOOD, ("../escaped.png", NOISE)),
    "zip: absolute path": zipped(*GOOD, ("/tmp/escaped.png", NOISE)),
    "zip: symbolic link": zipped(*GOOD, ("images/c.png", b"/etc/passwd", 0o120777)),
    "zip: bomb": zipped(("images/a.png", bytes(100_000_000))),
    "zip: one name twice": zipped(*GOOD, ("images/a.png", NOISE[:9])),
    "zip: encrypted": encrypted(zipped(*GOOD)),
    "zip: device": zipped(*GOOD, ("images/c.png", b"", 0o020666)),
    "a web page instead of an archive": b"<!DOCTYPE html><title>Sign in</title>",
    "empty file": b"",
}
BROKEN = {
    "tar.gz: cut off": tar(*GOOD)[:-20_000],
    "tar.gz: last byte missing": tar(*GOOD)[:-1],
    "tar.gz: a byte flipped": bytes(b ^ (255 * (i == 20_000)) for i, b in enumerate(tar(*GOOD))),
    "tar.gz: header damaged": damaged_header(GOOD),
    "tar.gz: end of the tar missing": gzip.compress(gzip.decompress(tar(*GOOD))[: 512 + 30_208]),
    "tar.gz: gzip of something else": gzip.compress(NOISE),
    "tar.gz: garbage after the end": tar(*GOOD) + b"garbage",
    "zip: bomb that belittles itself": belittled(zipped(("images/a.png", bytes(100_000_000))), 100_000_000),
    "zip: cut off": zipped(*GOOD)[:-5_000],
    "zip: a byte flipped": bytes(b ^ (255 * (i == 20_000)) for i, b in enumerate(zipped(*GOOD))),
}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "below" / "raw"


def take(data, target, place=None):
    archive = target.parent.parent / "archive"
    archive.write_bytes(data)
    return archives.extract(archive, place or (lambda name: target / name if name.suffix == ".png" else None))


@pytest.mark.parametrize("data", [tar(*GOOD), zipped(*GOOD), gzip.decompress(tar(*GOOD))], ids=["tar.gz", "zip", "tar"])
def test_good_archives_are_taken_whole(target, data):
    written = take(data, target)
    assert written == [target / "images" / "a.png", target / "images" / "b.png"]
    assert [path.read_bytes() for path in written] == [NOISE, NOISE[::-1]]
    assert sorted(path.name for path in target.rglob("*")) == ["a.png", "b.png", "images"]


def test_folders_and_other_files_are_left(target):
    data = tar(("./", tarfile.DIRTYPE, ""), ("./images/a.png", NOISE), ("README.pdf", NOISE))
    assert take(data, target) == [target / "images" / "a.png"]


def test_files_here_already_are_not_written_again(target):
    first = take(tar(*GOOD), target)
    before = [path.stat().st_mtime_ns for path in first]
    first[1].write_bytes(b"x" * len(NOISE))
    assert take(tar(*GOOD), target) == first
    assert first[0].stat().st_mtime_ns == before[0]
    assert first[1].read_bytes() == NOISE[::-1]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(tmp_path, target, name):
    with pytest.raises(StudyError, match="nothing was taken out of it") as error:
        take(HOSTILE[name], target)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]
    (tmp_path / "archive").unlink()
    note(name, error.value, tmp_path)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_archives_give_nothing(tmp_path, target, name):
    with pytest.raises(StudyError, match=r"broken archive of .*fetch it again") as error:
        take(BROKEN[name], target)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]
    (tmp_path / "archive").unlink()
    note(name, error.value, tmp_path)


@pytest.mark.parametrize(
    ("fault", "data"),
    [("tar.gz: more files than the dataset", tar(*GOOD)), ("zip: more files than the dataset", zipped(*GOOD))],
)
def test_too_many_members(monkeypatch, tmp_path, target, fault, data):
    monkeypatch.setattr(archives, "MEMBERS", 1)
    with pytest.raises(StudyError, match="nothing was taken out") as error:
        take(data, target)
    assert not target.exists()
    (tmp_path / "archive").unlink()
    note(fault, error.value, tmp_path)


def test_a_header_that_promises_gigabytes_is_not_read_into_memory(tmp_path, target):
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(StudyError, match="promises a part of") as error:
        take(promising(), target)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    (tmp_path / "archive").unlink()
    note("tar.gz: header that promises 6 GB", error.value, tmp_path)

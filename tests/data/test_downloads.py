"""Downloads from a server that does everything wrong: what arrives is right, or nothing counts as arrived."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from faults import note
from loopback import Resource, serve

from chestxray.config import StudyError
from chestxray.data import downloads
from chestxray.data.downloads import Patience

QUICK = Patience(connect=2, stall=0.25, slowest=1000, attempts=3, pause=0.01)
DATA = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server():
    with serve() as (resources, url):
        yield resources, url


def get(server, resource, target, sha256="", patience=QUICK):
    resources, url = server
    resources["/file"] = resource
    return downloads.fetch(url("/file"), target, sha256, patience)


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_file_arrives_and_nothing_else_is_left(server, tmp_path):
    resource = Resource(DATA)
    assert get(server, resource, tmp_path / "new" / "file", SHA256).read_bytes() == DATA
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    get(server, resource, tmp_path / "new" / "file", SHA256)
    assert resource.asked == [None]


def test_broken_off_twice_goes_on_where_it_ended(server, tmp_path):
    resource = Resource(DATA, breaks=[100_000, 50_000])
    assert get(server, resource, tmp_path / "file").read_bytes() == DATA
    assert resource.asked == [None, "bytes=100000-", "bytes=150000-"]
    note("connection breaks off twice", "no message: resumed by Range", tmp_path)


def test_a_later_run_goes_on(server, tmp_path):
    resource = Resource(DATA, breaks=[100_000, 0, 0, 0])
    with pytest.raises(StudyError, match=r"broke off after 100,000 of 300,000 bytes.*go on") as error:
        get(server, resource, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    note("connection breaks off for good", error.value, tmp_path)
    resource.breaks.clear()
    resource.asked.clear()
    assert get(server, resource, tmp_path / "file").read_bytes() == DATA
    assert resource.asked == ["bytes=100000-"]
    assert hidden(tmp_path) == []


def test_a_file_that_changed_meanwhile_is_begun_anew(server, tmp_path):
    resource = Resource(DATA, breaks=[100_000, 0, 0, 0])
    with pytest.raises(StudyError):
        get(server, resource, tmp_path / "file")
    other = DATA[::-1]
    assert get(server, Resource(other, etag='"two"'), tmp_path / "file").read_bytes() == other
    note("file changes between two runs", "no message: begun anew by If-Range", tmp_path)


@pytest.mark.parametrize("sha256", ["", SHA256])
def test_without_a_validator_only_a_checksum_lets_it_go_on(server, tmp_path, sha256):
    resource = Resource(DATA, etag="", breaks=[100_000, 0, 0, 0])
    with pytest.raises(StudyError):
        get(server, resource, tmp_path / "file", sha256)
    resource.breaks.clear()
    resource.asked.clear()
    assert get(server, resource, tmp_path / "file", sha256).read_bytes() == DATA
    assert resource.asked == (["bytes=100000-"] if sha256 else [None])


def test_a_server_without_ranges_is_begun_anew(server, tmp_path):
    resource = Resource(DATA, ranges=False, breaks=[100_000])
    assert get(server, resource, tmp_path / "file").read_bytes() == DATA
    note("server knows no Range", "no message: begun anew", tmp_path)


def test_another_part_than_asked_is_not_appended(server, tmp_path):
    resource = Resource(DATA, breaks=[100_000], shift=7)
    assert get(server, resource, tmp_path / "file").read_bytes() == DATA
    note("server sends another part than asked", "no message: begun anew", tmp_path)


def test_stalls(server, tmp_path):
    resource = Resource(DATA, stalls=[1.0])
    assert get(server, resource, tmp_path / "file").read_bytes() == DATA
    with pytest.raises(StudyError, match=r"no byte for 0.25 s, 3 times in a row") as error:
        get(server, Resource(DATA, stalls=[1.0] * 3), tmp_path / "other" / "file")
    assert not (tmp_path / "other" / "file").exists()
    note("server stalls", error.value, tmp_path / "other")


def test_a_trickle_is_a_stall(server, tmp_path):
    with pytest.raises(StudyError, match="fewer than 1000 bytes a second") as error:
        get(server, Resource(DATA, trickle=0.02), tmp_path / "file", patience=Patience(2, 0.25, 1000, 1, 0.01))
    note("server trickles a byte at a time", error.value, tmp_path)


def test_a_length_too_long(server, tmp_path):
    with pytest.raises(StudyError, match=r"300,000|bytes after") as error:
        get(server, Resource(DATA, claims=400_000), tmp_path / "file")
    assert not (tmp_path / "file").exists()
    note("Content-Length is too long", error.value, tmp_path)


def test_a_length_too_short(server, tmp_path):
    with pytest.raises(StudyError, match="SHA-256") as error:
        get(server, Resource(DATA, claims=200_000), tmp_path / "file", SHA256)
    assert list(tmp_path.iterdir()) == []
    note("Content-Length is too short (with a checksum)", error.value, tmp_path)


def test_a_length_too_short_that_nothing_contradicts(server, tmp_path):
    """A client reads as many bytes as it was told of; that they are not all is found by who unpacks them."""
    from test_archives import GOOD, tar

    from chestxray.data import archives

    data = tar(*GOOD)
    target = get(server, Resource(data, claims=len(data) // 2), tmp_path / "file")
    assert target.read_bytes() == data[: len(data) // 2]
    with pytest.raises(StudyError, match="broken archive") as error:
        archives.extract(target, lambda name: tmp_path / "images" / name)
    note("Content-Length is too short (an archive, no checksum)", error.value, tmp_path)


def test_wrong_bytes(server, tmp_path):
    with pytest.raises(StudyError, match="nothing of it is kept") as error:
        get(server, Resource(DATA[:-1] + b"x"), tmp_path / "file", SHA256)
    assert list(tmp_path.iterdir()) == []
    note("other bytes than the checksum says", error.value, tmp_path)


def test_chunks_without_a_length(server, tmp_path):
    assert get(server, Resource(DATA, chunked=True), tmp_path / "file").read_bytes() == DATA
    with pytest.raises(StudyError, match="3 times in a row") as error:
        get(server, Resource(DATA, chunked=True, breaks=[9, 9, 9], etag=""), tmp_path / "other" / "file")
    assert not (tmp_path / "other" / "file").exists()
    note("chunked transfer breaks off", error.value, tmp_path / "other")


def test_busy_servers_are_asked_again(server, tmp_path):
    assert get(server, Resource(DATA, statuses=[503, 429]), tmp_path / "file").read_bytes() == DATA
    with pytest.raises(StudyError, match=r"HTTP 503 Service Unavailable, 3 times") as error:
        get(server, Resource(DATA, statuses=[503] * 3), tmp_path / "other" / "file")
    note("HTTP 503 for good", error.value, tmp_path / "other")


@pytest.mark.parametrize(("fault", "status"), [("HTTP 404", 404), ("HTTP 403", 403)])
def test_refusals_are_not_asked_again(server, tmp_path, fault, status):
    resource = Resource(DATA, statuses=[status] * 9)
    with pytest.raises(StudyError, match=fault) as error:
        get(server, resource, tmp_path / "file")
    assert len(resource.asked) == 1
    note(fault, error.value, tmp_path)


def test_an_address_that_leads_to_itself(server, tmp_path):
    with pytest.raises(StudyError, match="leads in circles; check the address") as error:
        get(server, Resource(DATA, statuses=[302] * 99, leads_to="/file"), tmp_path / "file")
    note("address leads in circles", error.value, tmp_path)


def test_an_empty_answer(server, tmp_path):
    with pytest.raises(StudyError, match=r"sent nothing, 3 times in a row; try it later") as error:
        get(server, Resource(b"", chunked=True), tmp_path / "file")
    assert not (tmp_path / "file").exists()
    note("server sends nothing", error.value, tmp_path)


def test_a_file_that_became_shorter_is_begun_anew(server, tmp_path):
    with pytest.raises(StudyError):
        get(server, Resource(DATA, breaks=[100_000, 0, 0, 0]), tmp_path / "file")
    short = Resource(DATA[:50_000])
    assert get(server, short, tmp_path / "file").read_bytes() == DATA[:50_000]
    assert short.asked == ["bytes=100000-", None]
    note("file has become shorter between two runs", "no message: begun anew after HTTP 416", tmp_path)


def test_no_server_and_no_address(tmp_path):
    with pytest.raises(StudyError, match="no connection, 3 times in a row") as error:
        downloads.fetch("http://127.0.0.1:9/file", tmp_path / "file", patience=QUICK)
    note("no server there", str(error.value).replace(":9", ""), tmp_path)
    for url in ("file:///etc/hostname", "nonsense", "http://"):
        with pytest.raises(StudyError, match="no address of a file"):
            downloads.fetch(url, tmp_path / "file", patience=QUICK)


def test_space_is_checked_before_the_first_byte(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 100_000, 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StudyError, match=r"300 kB, 100 kB are free; free space, or choose") as error:
        get(server, Resource(DATA), tmp_path / "file")
    assert not list(tmp_path.iterdir())
    note("disk too small", error.value, tmp_path)


def test_a_full_disk_is_one_line_and_goes_on_later(server, tmp_path, monkeypatch):
    whole = Path.open

    def full(path, mode="r", **rest):
        file = whole(path, mode, **rest)
        if path.name != ".file.part" or mode != "ab":
            return file

        class Full(io.RawIOBase):
            def write(self, data):
                if file.tell() > 100_000:
                    raise OSError(28, "No space left on device")
                return file.write(data)

            def close(self):
                file.close()

        return Full()

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StudyError, match="No space left on device") as error:
        get(server, Resource(DATA), tmp_path / "file")
    note("disk fills up meanwhile", error.value, tmp_path)
    monkeypatch.setattr(Path, "open", whole)
    resource = Resource(DATA)
    assert get(server, resource, tmp_path / "file").read_bytes() == DATA
    assert resource.asked[0].startswith("bytes=")


def test_two_runs_do_not_write_one_file(server, tmp_path):
    with (
        downloads._alone(tmp_path / "file"),
        pytest.raises(StudyError, match="another run is fetching it") as error,
    ):
        get(server, Resource(DATA), tmp_path / "file")
    note("two runs fetch the same file", error.value, tmp_path)


def test_damaged_notes_of_an_earlier_run_are_not_trusted(server, tmp_path):
    (tmp_path / ".file.part").write_bytes(b"something else")
    for text in ("", "[]", "{}", '{"url": 3}'):
        (tmp_path / ".file.part.json").write_text(text)
        assert get(server, Resource(DATA), tmp_path / "file").read_bytes() == DATA
        (tmp_path / "file").unlink()
        (tmp_path / ".file.part").write_bytes(b"something else")


def test_lengths_are_asked_for(server):
    resources, url = server
    resources["/file"] = Resource(DATA)
    assert downloads.length(url("/file"), QUICK) == len(DATA)
    resources["/file"] = Resource(DATA, chunked=True)
    assert downloads.length(url("/file"), QUICK) is None
    assert downloads.length("http://127.0.0.1:9/file", QUICK) is None

"""Files over HTTP that arrive whole: resumed after a break, retried with growing pauses, checked before they count.

It owns the protocol (Range, If-Range, lengths, checksums, stalls) and the unfinished bytes beside a target. It must not
know datasets or what is inside the files. A server is not trusted: every length it claims is compared with what came.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
import urllib3
from tqdm import tqdm

from chestxray import files
from chestxray.config import StudyError

_CHUNK = 1 << 16
LARGEST = 64 << 30
"""No file of the study has more bytes than this; a server that sends more is stopped."""

RESERVE = 256 << 20
"""Bytes of the disk that downloads leave free."""

_PASSING = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    Attributes:
        connect: seconds until a connection stands.
        stall: seconds without a byte after which the connection is given up.
        slowest: bytes a second; a connection that stays below it for `stall` seconds is given up too.
        attempts: failures in a row, without a new byte between them, until the download is given up.
        pause: seconds before the second attempt; doubled before each further one.
        longest_pause: seconds, also for what a server asks by Retry-After.
    """

    connect: float = 20.0
    stall: float = 60.0
    slowest: int = 256
    attempts: int = 6
    pause: float = 2.0
    longest_pause: float = 120.0


PATIENCE = Patience()


class _Passing(Exception):
    """A failure that another attempt may not meet."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass
class _Unfinished:
    """What has come of a file: its bytes, and what the server said of the whole."""

    data: Path
    note: Path
    size: int | None = None
    validator: str = ""

    @classmethod
    def beside(cls, target: Path, url: str, checked: bool) -> _Unfinished:
        """What an earlier attempt left, if it can be gone on with: the same address, and a means to tell a change."""
        part = cls(target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.part.json"))
        try:
            said = json.loads(part.note.read_text("utf-8"))
            if said["url"] == url and (said["validator"] or checked):
                part.size, part.validator = said["size"], said["validator"]
                return part
        except (OSError, ValueError, KeyError, TypeError):
            pass
        part.clear()
        return part

    def have(self) -> int:
        return self.data.stat().st_size if self.data.exists() else 0

    def clear(self) -> None:
        files.remove(self.data)
        files.remove(self.note)
        self.size, self.validator = None, ""

    def begin(self, url: str, response: requests.Response) -> None:
        """Note what the server says of a file that begins now."""
        self.clear()
        length = response.headers.get("Content-Length", "")
        self.size = int(length) if length.isdecimal() else None
        etag = response.headers.get("ETag", "")
        self.validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
        said = {"url": url, "size": self.size, "validator": self.validator}
        files.atomic_write(self.note, json.dumps(said).encode())


def require_space(folder: Path, needed: int, remedy: str) -> None:
    """Make sure of free space before the first byte.

    Args:
        folder: where the bytes will go; it need not exist yet.
        needed: bytes.
        remedy: what the user can do, besides freeing space.

    Raises:
        StudyError: there is less.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed + RESERVE > free:
        spare = f" beside {gigabytes(RESERVE)} to spare" if needed <= free else ""
        raise StudyError(
            f"{folder}: needs {gigabytes(needed)}{spare}, {gigabytes(free)} are free; free space, or {remedy}"
        )


def gigabytes(size: int) -> str:
    """Bytes as people read them: `45.1 GB`, `3.2 MB`, `12 kB`, `14 bytes`."""
    for unit, worth in (("GB", 10**9), ("MB", 10**6)):
        if size >= worth:
            return f"{size / worth:,.1f} {unit}"
    return f"{size / 1000:,.0f} kB" if size >= 1000 else f"{size} bytes"


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def length(url: str, patience: Patience = PATIENCE) -> int | None:
    """How many bytes a server says a file has; None where it does not tell."""
    try:
        timeout = (patience.connect, patience.stall)
        plain = {"Accept-Encoding": "identity"}
        with requests.head(url, headers=plain, timeout=timeout, allow_redirects=True) as response:
            said = response.headers.get("Content-Length", "")
            return int(said) if response.ok and said.isdecimal() else None
    except requests.RequestException:
        return None


def fetch(url: str, target: Path, sha256: str = "", patience: Patience = PATIENCE) -> Path:
    """Download a file; `target` is absent until all of it is there and right.

    Unfinished bytes stay beside it, hidden, and the next call goes on where they end if the server still has the same
    file: it must confirm that by its ETag or date (If-Range), or `sha256` must be there to tell at the end.

    Args:
        url: http or https.
        target: a file here already is taken as it is, if it has the checksum.
        sha256: of the whole file, in hexadecimal; not checked where empty.
        patience: how long the server is waited for.

    Returns:
        `target`.

    Raises:
        StudyError: the server refuses, keeps failing or sends something else; or the disk is full.
    """
    if target.is_file() and (not sha256 or digest(target) == sha256):
        return target
    files.make_folder(target.parent)
    with _alone(target), requests.Session() as session:
        part = _Unfinished.beside(target, url, bool(sha256))
        failures, best = 0, part.have()
        while True:
            try:
                _attempt(session, url, part, bool(sha256), patience)
                break
            except _Passing as error:
                failures = 1 if part.have() > best else failures + 1
                best = max(best, part.have())
                if failures >= patience.attempts:
                    have = part.have()
                    again = (
                        f"{gigabytes(have)} are kept: run the same command again to go on" if have else "try it later"
                    )
                    raise StudyError(f"{url}: {error}, {failures} times in a row; {again}") from error
                pause = max(patience.pause * 2 ** (failures - 1), error.wait)
                time.sleep(min(pause, patience.longest_pause))
        if sha256 and (came := digest(part.data)) != sha256.lower():
            part.clear()
            raise StudyError(
                f"{url}: has SHA-256 {came[:12]}…, not {sha256[:12]}…; nothing of it is kept: "
                "fetch it again, or correct the checksum"
            )
        with files.explained(target):
            part.data.replace(target)
        files.remove(part.note)
    return target


def _attempt(session: requests.Session, url: str, part: _Unfinished, checked: bool, patience: Patience) -> None:
    """One connection: ask for what is missing, and append what comes.

    Raises:
        _Passing: it ended before the file did.
        StudyError: there is no sense in another attempt.
    """
    have = part.have()
    if have and part.size == have:
        return
    headers = {"Accept-Encoding": "identity"}  # a compressed transfer has neither the length nor the ranges of the file
    if have:
        headers["Range"] = f"bytes={have}-"
        if part.validator:
            headers["If-Range"] = part.validator
    try:
        with session.get(url, headers=headers, stream=True, timeout=(patience.connect, patience.stall)) as response:
            _check_status(url, response, part)
            if response.status_code == 200:
                part.begin(url, response)
            _receive(url, response, part, patience)
    except (
        requests.exceptions.InvalidURL,
        requests.exceptions.MissingSchema,
        requests.exceptions.InvalidSchema,
    ) as error:
        raise StudyError(f"{url}: no address of a file; write one that begins with https://") from error
    except requests.exceptions.SSLError as error:
        raise StudyError(
            f"{url}: its certificate is not trusted here; check the address and this machine's clock"
        ) from error
    except requests.exceptions.TooManyRedirects as error:
        raise StudyError(f"{url}: leads in circles; check the address") from error
    except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise _Passing(f"no byte for {patience.stall:g} s") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        if isinstance(error, requests.exceptions.ConnectionError) and part.have() == have:
            raise _Passing("no connection") from error
        raise _Passing(_broke_off(part)) from error
    if part.size is not None and part.have() < part.size:
        raise _Passing(_broke_off(part))
    if part.size is None and not part.have():
        raise _Passing("sent nothing")


def _broke_off(part: _Unfinished) -> str:
    whole = "" if part.size is None else f" of {part.size:,}"
    return f"broke off after {part.have():,}{whole} bytes"


def _check_status(url: str, response: requests.Response, part: _Unfinished) -> None:
    """Make sure that what follows are the bytes asked for."""
    status, have = response.status_code, part.have()
    if status in _PASSING:
        said = response.headers.get("Retry-After", "")
        raise _Passing(f"HTTP {status} {response.reason}", float(said) if said.isdecimal() else 0.0)
    if status == 416:  # it has fewer bytes than came, or than it said before
        whole = part.size
        part.clear()
        raise _Passing(f"has no bytes after {have:,}, though it promised {whole or 'more'}")
    if status == 206:
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        same = span and int(span[1]) == have and (span[3] == "*" or part.size in (None, int(span[3])))
        if not same:
            part.clear()
            raise _Passing("sent another part than asked for")
    elif status != 200:
        raise StudyError(f"{url}: HTTP {status} {response.reason}; check the address, or fetch its list of URLs anew")
    if response.headers.get("Content-Encoding", "identity") not in ("identity", "") and status == 206:
        part.clear()
        raise _Passing("sent a part in another encoding")


def _receive(url: str, response: requests.Response, part: _Unfinished, patience: Patience) -> None:
    """Append the body to the unfinished file."""
    have = part.have()
    if part.size is not None and part.size > LARGEST:
        raise StudyError(f"{url}: {gigabytes(part.size)}, more than any file of the study has; check the address")
    try:
        require_space(part.data.parent, (part.size or have) - have, "choose another folder by CHESTXRAY_ROOT")
    except StudyError:
        if not have:
            part.clear()
        raise
    since, window, unchecked = time.monotonic(), 0, 0
    bar = tqdm(total=part.size, initial=have, unit="B", unit_scale=True, desc=part.data.name[1:-5], disable=None)
    with files.explained(part.data):
        file = part.data.open("ab", buffering=0)
    with bar, file:
        # read1 returns what one call of the system gives, so that a server that trickles is noticed.
        while chunk := response.raw.read1(_CHUNK, decode_content=False):
            with files.explained(part.data):
                remaining = memoryview(chunk)
                while remaining:
                    remaining = remaining[file.write(remaining) :]
            have, window, unchecked = have + len(chunk), window + len(chunk), unchecked + len(chunk)
            bar.update(len(chunk))
            if have > (LARGEST if part.size is None else part.size):
                raise StudyError(f"{url}: sends more bytes than it said ({part.size}); check the address")
            if part.size is None and unchecked > RESERVE // 4:
                require_space(part.data.parent, 0, "choose another folder by CHESTXRAY_ROOT")
                unchecked = 0
            if (passed := time.monotonic() - since) > patience.stall:
                if window < patience.slowest * passed:
                    raise _Passing(f"fewer than {patience.slowest} bytes a second for {passed:.1f} s")
                since, window = time.monotonic(), 0


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keep a second download away from the same file; the system lifts the lock when this process ends, however."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    place = target.with_name(f".{target.name}.lock")
    with files.explained(place):
        lock = place.open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(f"{target}: another run is fetching it; wait for its end, or end it") from error
        except OSError:  # a file system without locks, such as some network shares
            pass
        try:
            yield
        finally:
            files.remove(place)

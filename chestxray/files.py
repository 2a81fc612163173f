"""Files: written complete or not at all, linked, removed, digested, worked on in threads; and sizes, times in words.

A disk that is full or read-only becomes the one-line error that users see.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import joblib

from chestxray.config import StudyError

TEMPORARY = ".tmp-"
"""Part of every unfinished file's name, by which leftovers of a killed run differ from results."""


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into one line about `path`, with the remedy.

    Raises:
        StudyError: the block raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StudyError(
            f"{path}: cannot be written ({reason}); free space or allow writing there, "
            "or set CHESTXRAY_ROOT to another folder"
        ) from error


def make_folder(path: Path) -> Path:
    """Create a folder and those above it, if they are missing, and return it.

    Raises:
        StudyError: the file system refuses.
    """
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def keep_apart(out: Path, read: Iterable[Path | None], option: str = "--out") -> None:
    """Make sure that what is to be written neither replaces nor lies in what is only read.

    Args:
        out: the file or folder to write.
        read: files and folders; None, and what is not there, is passed over.
        option: of the command line, by which `out` was chosen.

    Raises:
        StudyError: `out` is one of the files, or is or lies in one of the folders.
    """
    for path in read:
        if path and path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise StudyError(f"{out}: lies in {path}, which is only read; give {option} another place")
        if path and path.is_file() and out.exists() and out.samefile(path):
            raise StudyError(f"{out}: is only read here; give {option} another name")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a path to write to, so that a reader of `path` sees the old file or the whole new one, never a part.

    It is a hidden file beside `path`, renamed over it when the block ends. The folder is created if missing.

    Raises:
        StudyError: the disk is full or read-only; `path` is as it was and nothing is left beside it.
    """
    make_folder(path.parent)
    # The suffix stays last: some libraries choose a format by it.
    temporary = path.with_name(f".{path.stem}{TEMPORARY}{os.getpid()}{path.suffix}")
    with explained(path):
        try:
            yield temporary
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(StudyError):
                remove(temporary)
            raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing, as `atomic_path` does, with its errors."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` as `atomic_path` does, with its errors.

    Args:
        path: the file.
        data: all its bytes.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def remove_leftovers(path: Path) -> None:
    """Remove what runs that were killed while writing `path` have left beside it."""
    for leftover in path.parent.glob(f".{path.stem}{TEMPORARY}*{path.suffix}"):
        remove(leftover)


def link(target: Path, place: Path) -> None:
    """Make `place` a hard link to `target`; a copy where the file system has no links.

    Args:
        target: the file.
        place: where the link goes. Nothing is done where it holds the same bytes already.

    Raises:
        StudyError: the disk is full or read-only.
    """
    with contextlib.suppress(FileNotFoundError):
        if target.samefile(place) or filecmp.cmp(target, place, shallow=False):
            return
    with atomic_path(place) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(target, temporary)
        except FileNotFoundError:
            raise
        except OSError:  # FAT, some network shares and Google Drive have no hard links
            shutil.copyfile(target, temporary)


def symlink(target: Path, place: Path) -> None:
    """Make `place` a link to a file or folder that is never written; a copy where the file system has no links.

    Args:
        target: the file or folder.
        place: where the link goes.

    Raises:
        StudyError: the disk is full or read-only.
    """
    with atomic_path(place) as temporary:
        remove(temporary)
        try:
            temporary.symlink_to(target.resolve(), target_is_directory=target.is_dir())
        except OSError:
            if target.is_dir():
                shutil.copytree(target, temporary, ignore_dangling_symlinks=True)
            else:
                shutil.copyfile(target, temporary)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all it holds; nothing is done where there is none.

    Raises:
        StudyError: the file system refuses.
    """
    with explained(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def keep_only(folder: Path, names: set[str]) -> None:
    """Remove the entries of a folder that are not expected.

    Args:
        folder: nothing is done where there is none.
        names: the expected names.

    Raises:
        StudyError: the file system refuses.
    """
    with explained(folder):
        unexpected = [path for path in folder.iterdir() if path.name not in names] if folder.is_dir() else []
    for path in unexpected:
        remove(path)


def walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """All that lies below a folder, links followed, each folder once, its files by name before its subfolders.

    Yields:
        Each path with `file`, `folder`, or what else is there: a link to nothing, a pipe, a folder that is closed.
    """
    seen, waiting = set(), [folder]
    while waiting:
        place = waiting.pop()
        try:
            status = place.stat()
            again = (status.st_dev, status.st_ino) in seen  # a link to a folder above or beside
            seen.add((status.st_dev, status.st_ino))
            found = [] if again else sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            yield place, f"cannot be searched ({error.strerror})"
            continue
        entries = [(Path(entry.path), _kind(entry)) for entry in found]
        yield from entries
        waiting += [path for path, kind in reversed(entries) if kind == "folder"]


def _kind(entry: os.DirEntry) -> str:
    try:
        if entry.is_dir() or entry.is_file():
            return "folder" if entry.is_dir() else "file"
        entry.stat()
    except FileNotFoundError:
        return "is a link to nothing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "is a pipe, socket or device"


def require_space(folder: Path, needed: int, remedy: str) -> None:
    """Make sure, before the first byte, of free space and of 256 MiB besides.

    Args:
        folder: where the bytes will go; it need not exist yet.
        needed: bytes.
        remedy: what the user can do, besides freeing space.

    Raises:
        StudyError: there is less.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free, reserve = shutil.disk_usage(place).free, 256 << 20
    if needed + reserve > free:
        raise StudyError(
            f"{folder}: needs {gigabytes(needed)} beside {gigabytes(reserve)} to spare, {gigabytes(free)} are free; "
            f"free space, or {remedy}"
        )


def gigabytes(size: int) -> str:
    """Bytes as people read them: `45.1 GB`, `3.2 MB`, `12 kB`, `14 bytes`."""
    for unit, worth, digits in (("GB", 10**9, 1), ("MB", 10**6, 1), ("kB", 1000, 0)):
        if size >= worth:
            return f"{size / worth:,.{digits}f} {unit}"
    return f"{size} bytes"


def shown(path: Path) -> str:
    """A path as it can be typed where the user is."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def duration(seconds: float) -> str:
    """Seconds in words: `42 s`, `3 min 07 s`, `1 h 02 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, ordered: bool = True, batch: int = 1
) -> Iterator[Result]:
    """What `work` gives for each item, as it is done.

    Args:
        work: called with an item, in a thread.
        items: taken as threads become free.
        workers: threads, 1 or more; -1 takes all cores.
        ordered: give the results in the order of the items; else whichever is done first.
        batch: items that a thread takes at a time; more than 1 where each is done in a millisecond or less.

    Raises:
        Exception: the first error of `work`. No item is begun after it, and those that had begun are done: joblib
            itself raises while other threads are still writing.
    """
    failed: list[Exception] = []

    def attempt(item: Item) -> Result | None:
        if not failed:
            try:
                return work(item)
            except Exception as error:
                failed.append(error)
        return None

    parallel = joblib.Parallel(
        n_jobs=workers,
        prefer="threads",
        return_as="generator" if ordered else "generator_unordered",
        batch_size=batch,
        pre_dispatch=f"{2 * batch}*n_jobs",
    )
    for result in parallel(joblib.delayed(attempt)(item) for item in items):
        if not failed:
            yield result
    if failed:
        raise failed[0]

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chestxray import files
from chestxray.config import StudyError


def test_a_file_is_written_whole(tmp_path):
    files.atomic_write(tmp_path / "new" / "a.csv", b"x" * 100_000)
    assert (tmp_path / "new" / "a.csv").read_bytes() == b"x" * 100_000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.csv"]


def test_a_full_disk_leaves_the_old_file_and_one_line(tmp_path, monkeypatch):
    target = tmp_path / "a.csv"
    target.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StudyError, match=r"a\.csv: cannot be written \(No space left on device\); free space") as error:
        files.atomic_write(target, b"new")
    assert "\n" not in str(error.value)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_disk_that_fills_in_the_middle_of_a_file_leaves_nothing(tmp_path):
    code = (
        "import resource, signal, sys; from pathlib import Path; from chestxray import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "files.atomic_write(Path(sys.argv[1]), b'x' * 5000)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a.bin"], capture_output=True, text=True)
    assert run.stderr.strip().splitlines()[-1].startswith("chestxray.config.StudyError: ")
    assert "File too large" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StudyError, match="CHESTXRAY_ROOT"):
        files.atomic_write(tmp_path / "file" / "a.csv", b"")


def test_bytes_lie_on_disk_once(tmp_path):
    (tmp_path / "store.png").write_bytes(b"pixels")
    files.link(tmp_path / "store.png", tmp_path / "tree.png")
    assert (tmp_path / "tree.png").samefile(tmp_path / "store.png")


def test_without_hard_links_a_copy_is_made_and_kept(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store, tree = tmp_path / "store.png", tmp_path / "tree.png"
    store.write_bytes(b"pixels")
    files.link(store, tree)
    assert tree.read_bytes() == b"pixels" and not tree.samefile(store)
    made = tree.stat().st_ino
    files.link(store, tree)
    assert tree.stat().st_ino == made, "an equal copy is not written again"
    store.write_bytes(b"others")
    files.link(store, tree)
    assert tree.read_bytes() == b"others"


def test_unexpected_files_are_removed_and_the_others_stay(tmp_path):
    for name in ("keep.png", "unexpected.png", ".half.png.tmp-12"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "in it.png").write_text("")
    files.keep_only(tmp_path, {"keep.png", "absent.png"})
    assert [path.name for path in tmp_path.iterdir()] == ["keep.png"]
    files.keep_only(tmp_path / "nowhere", set())


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("ordered", [True, False])
def test_every_item_is_worked_on(ordered, batch):
    done = list(files.in_threads(lambda number: number**2, range(50), 4, ordered, batch))
    expected = [number**2 for number in range(50)]
    assert (done if ordered else sorted(done)) == expected


@pytest.mark.parametrize("ordered", [True, False])
def test_an_error_is_raised_when_every_thread_is_done(ordered):
    begun, ended, broken = [], [], threading.Event()

    def work(number):
        begun.append(number)
        if number == 0:
            broken.set()
            raise StudyError("the disk is full")
        broken.wait()
        threading.Event().wait(0.2)  # still writing when the other one fails
        ended.append(number)

    with pytest.raises(StudyError, match="the disk is full"):
        list(files.in_threads(work, range(100), 2, ordered))
    assert ended == [number for number in begun if number] and len(begun) < 5

"""A packed dataset is the same dataset on another machine, and an archive that is not whole leaves nothing there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pandas as pd
import pytest
from conftest import write_raw
from faults import note
from killing import killed
from tarballs import tar

from chestxray import __main__, config, files
from chestxray.config import CLASSES, REPOSITORY, SPLITS, Paths, StageMissing, StudyError
from chestxray.data import archive as data_archive
from chestxray.data import augmentation, preparation, sources
from chestxray.data import manifest as data_manifest
from chestxray.data.manifest import raw_side, read_manifest, store_path
from chestxray.pipeline import runner, stages
from chestxray.training import samples


def hashes(folder: Path) -> dict[str, str]:
    """Relative path → SHA-256 of every file; behind a link, as raw data is at home, only of the tables."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    if (folder / "raw").is_symlink():
        paths += [path for path in (folder / "raw").iterdir() if path.suffix in (".csv", ".txt")]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def packed(prepared_study, tmp_path):
    """The study, with its archive `tmp_path/tiny.tar`."""
    return prepared_study, data_archive.pack(prepared_study.paths, tmp_path / "tiny.tar")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An archive of 60 images without augmented files, as bytes."""
    folder = tmp_path_factory.mktemp("packed")
    study = of_tiny(folder / "root")
    sources.prepare_raw(str(write_raw(folder / "tiny")), study)
    preparation.prepare(study)
    return data_archive.pack(study.paths).read_bytes()


@pytest.fixture
def archive(tmp_path, whole):
    """A file with that archive."""
    path = tmp_path / "tiny.tar"
    path.write_bytes(whole)
    return path


@pytest.fixture
def elsewhere(tmp_path):
    """The root of another machine."""
    return tmp_path / "elsewhere"


def of_tiny(root: Path) -> config.Study:
    return config.Study(Paths("tiny", root), config.PROFILES["quick"].override(image_size=32), 2024)


def test_what_comes_out_is_what_went_in(packed, elsewhere):
    study, archive = packed
    (study.paths.raw / "README.pdf").write_bytes(b"not asked for")
    there = of_tiny(elsewhere)
    assert data_archive.unpack(archive, elsewhere) == (there.paths, 0)
    unpacked = hashes(there.paths.data)
    del unpacked[sources.UNPACKED]
    assert unpacked == hashes(study.paths.data)
    assert not (there.paths.raw / "images").exists() and not there.paths.raw.is_symlink()
    assert data_manifest.fingerprint(there.paths) == data_manifest.fingerprint(study.paths)
    assert data_archive.summary(there.paths) == data_archive.summary(study.paths)
    manifest = read_manifest(there.paths)
    chosen = manifest[manifest["selected"]]
    for row in chosen.itertuples():
        stored = store_path(there.paths.store, row.image)
        assert (there.paths.tree(row.split) / row.label / stored.name).samefile(stored)
    assert sum(len(list(there.paths.tree(split).rglob("*.png"))) for split in SPLITS) == len(chosen)
    pd.testing.assert_frame_equal(samples.load_augmented(there).table, samples.load_augmented(study).table)


def test_any_tar_program_can_list_it_and_each_image_is_in_it_once(packed):
    study, archive = packed
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        index = json.loads(tar.extractfile(data_archive.INDEX).read())
        content = {member.name: tar.extractfile(member).read() for member in members}
    names = [member.name for member in members]
    assert names[0] == data_archive.INDEX and names[-1] == "manifest.csv" and len(set(names)) == len(names)
    assert sum(name.startswith("images/") for name in names) == 240
    assert {"raw/Data_Entry_2017_v2020.csv", "raw/test_list.txt", "raw/train_val_list.txt"} <= set(names)
    assert all(member.isreg() and (member.mtime, member.uid, member.gid, member.uname) == (0,) * 3 + ("",)
               for member in members)  # fmt: skip
    assert list(index["files"]) == names[1:]
    assert all(sha256 == hashlib.sha256(content[name]).hexdigest() for name, sha256 in index["files"].items())
    assert data_archive.summary(study.paths)._asdict() == {
        "image_size": 32,
        "images": 240,
        "augmented": sum(name.startswith("train_augmented/") for name in names),
        "fingerprint": data_manifest.fingerprint(study.paths),
    }


def test_the_same_dataset_gives_the_same_bytes(packed, elsewhere, tmp_path):
    study, archive = packed
    for path in study.paths.store.iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    again = data_archive.pack(study.paths, tmp_path / "again.tar")
    assert again.read_bytes() == archive.read_bytes()
    data_archive.unpack(archive, elsewhere)
    carried = data_archive.pack(Paths("tiny", elsewhere))
    assert carried == elsewhere / "1_Datasets" / "tiny.tar"
    assert carried.read_bytes() == archive.read_bytes()


def test_a_dataset_without_augmented_files_lists_or_boxes(make_raw, study_of, elsewhere):
    study = study_of(make_raw(lists=False))
    preparation.prepare(study)
    paths, _ = data_archive.unpack(data_archive.pack(study.paths), elsewhere)
    assert data_archive.summary(paths).augmented == 0
    assert sorted(path.name for path in paths.data.iterdir()) == sorted(
        ["images", "manifest.csv", "raw", "rejected.csv", "unpacked.json", *SPLITS]
    )
    assert [path.name for path in paths.raw.iterdir()] == ["Data_Entry_2017_v2020.csv"]
    assert data_manifest.fingerprint(of_tiny(elsewhere).paths) == data_manifest.fingerprint(study.paths)


def test_boxes_near_duplicates_and_odd_names_come_along(make_raw, study_of, elsewhere):
    raw = make_raw()
    long = "a very long name ä " * 8 + ".png"
    (raw / "images" / "00000001_000.png").rename(raw / "images" / long)
    for table in raw.glob("*.*"):
        table.write_text(table.read_text().replace("00000001_000.png", long))
    boxes = "Image Index,Finding Label,Bbox [x,y,w,h],,,,,,\n00000002_000.png,Infiltrate,1.5,2,3,4,,,\n"
    (raw / "BBox_List_2017.csv").write_text(boxes)
    study = study_of(raw)
    preparation.prepare(study)
    (study.paths.data / "near_duplicates.csv").write_text("image,other\n")
    data_archive.unpack(data_archive.pack(study.paths), elsewhere)
    there = Paths("tiny", elsewhere)
    assert (there.raw / "BBox_List_2017.csv").read_text() == boxes
    assert (there.data / "near_duplicates.csv").exists()
    assert (there.store / long).exists()
    assert raw_side(there) == raw_side(study.paths) == 48


PACKS = """
from chestxray import config
from chestxray.data import archive
archive.pack(config.Paths("tiny"), Path(sys.argv[1]))
"""
UNPACKS = """
from chestxray.data import archive
archive.unpack(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("point", ["images", "links", "folder"])
def test_a_killed_unpacking_goes_on(packed, elsewhere, point):
    """Killed among the images, among the links to them, and before the folder gets its name."""
    study, archive = packed
    manifest = read_manifest(study.paths)
    entries, links = len(data_archive._read_index(archive).files), int(manifest["selected"].sum())
    moves = {"images": 100, "links": entries + 20, "folder": entries + links + 2}[point]
    killed(UNPACKS, moves, archive, elsewhere)
    place = elsewhere / "1_Datasets"
    assert [path.name for path in place.iterdir()] == [".tiny.tmp-unpack"]
    torn = place / ".tiny.tmp-unpack" / "images" / "00000001_000.png"
    torn.write_bytes(torn.read_bytes()[:-1])
    (place / ".tiny.tmp-unpack" / "images" / "stranger.png").write_bytes(b"of another archive")
    (place / ".tiny.tmp-unpack" / "near_duplicates.csv").write_bytes(b"of another archive")
    paths, kept = data_archive.unpack(archive, elsewhere)
    assert kept == min(moves - 1, entries) - 1
    assert [path.name for path in place.iterdir()] == ["tiny"]
    unpacked = hashes(paths.data)
    del unpacked[sources.UNPACKED]
    assert unpacked == hashes(study.paths.data)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_packing_leaves_no_archive(packed, tmp_path):
    study, archive = packed
    target = tmp_path / "new" / "tiny.tar"
    killed(PACKS, 1, target)
    assert not target.exists() and len(list(target.parent.iterdir())) == 1
    assert data_archive.pack(study.paths, target).read_bytes() == archive.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["tiny.tar"]


def cut(size: float):
    return lambda data: data[: int(len(data) * size)]


def flipped(share: float):
    def flip(data: bytes) -> bytes:
        place = int(len(data) * share)
        return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]

    return flip


def flipped_in_image(data: bytes) -> bytes:
    return flipped((data.index(b"IDAT", len(data) // 2) + 30) / len(data))(data)


def flipped_in_header(data: bytes) -> bytes:
    return flipped((data.index(b"ustar", len(data) // 2) - 100) / len(data))(data)


def cut_between(data: bytes) -> bytes:
    """The same, ending at a block of zeros instead of a file in the middle."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        place = archive.getmembers()[30].offset
    return data[:place] + bytes(-place % tarfile.RECORDSIZE + tarfile.RECORDSIZE)


DAMAGED = {
    "packed dataset: 0 bytes": (lambda data: b"", "its index cannot be used"),
    "packed dataset: a web page": (lambda data: b"<!DOCTYPE html><title>Sign in", "its index cannot be used"),
    "packed dataset: another tar": (
        lambda data: tar(("images/a.png", b"x" * 5000)), "no archive of a prepared dataset"
    ),
    "packed dataset: cut off in its index": (cut(0.01), "its index cannot be used"),
    "packed dataset: cut off": (cut(0.6), "has not the file"),
    "packed dataset: cut off between two files": (cut_between, "has not the file"),
    "packed dataset: last byte missing": (lambda data: data[:-1], "does not end"),
    "packed dataset: a bit flipped in its index": (flipped(0.01), "its index"),
    "packed dataset: a bit flipped in an image": (flipped_in_image, "has not the SHA-256 that its index lists"),
    "packed dataset: a bit flipped in a header": (flipped_in_header, "has not the file"),
    "packed dataset: a bit flipped in its end": (lambda data: flipped(1 - 500 / len(data))(data), "does not end"),
    "packed dataset: bytes after its end": (lambda data: data + b"more", "does not end"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_archive_is_one_line_and_leaves_nothing(archive, elsewhere, capsys, fault):
    damage, said = DAMAGED[fault]
    archive.write_bytes(damage(archive.read_bytes()))
    refused(archive, elsewhere, capsys, fault, said)


def refused(archive, elsewhere, capsys, fault, said):
    capsys.readouterr()
    assert __main__.main(["unpack", str(archive), "--root", str(elsewhere)]) == 2
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("chestxray: ")]
    assert len(printed) == 1 and said in printed[0] and archive.name in printed[0]
    assert not [path for path in elsewhere.rglob("*") if path.is_file()]
    assert not list((elsewhere / "1_Datasets").iterdir()) if (elsewhere / "1_Datasets").exists() else True
    assert not (elsewhere.parent / "escaped.png").exists()
    note(fault, printed[0].removeprefix("chestxray: ").replace(str(archive.parent), "…"), elsewhere)


def forge(archive: Path, change) -> None:
    """Write an archive anew, with a right SHA-256, after `change(index, members)` has had its way with it."""
    with tarfile.open(archive) as old:
        members = [(member.name, old.extractfile(member).read()) for member in old.getmembers()]
    index = json.loads(members[0][1])
    members = members[1:]
    change(index, members)
    index.pop("sha256", None)
    index |= {"sha256": hashlib.sha256(as_json(index)).hexdigest()} if index else {}
    archive.write_bytes(tar((data_archive.INDEX, as_json(index)), *members))


def as_json(value) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def renamed(name: str):
    def change(index, members):
        index["files"] = {name: index["files"].pop(members[0][0])} | index["files"]
        members[0] = (name, members[0][1])

    return change


def as_link(index, members):
    members[0] = (members[0][0], tarfile.SYMTYPE, "/etc/passwd")


def other_pixels(index, members):
    members[5] = (members[5][0], members[5][1][:-1] + b"?")


def one_twice(index, members):
    members.insert(1, members[0])


def without_manifest(index, members):
    index["files"].pop(members.pop()[0])


FORGED = {
    "packed dataset: path with ..": (renamed("images/../../../escaped.png"), "no prepared dataset has"),
    "packed dataset: absolute path": (renamed("/tmp/escaped.png"), "no prepared dataset has"),
    "packed dataset: a file that no dataset has": (renamed("train/Mass/escaped.sh"), "no prepared dataset has"),
    "packed dataset: dataset of a bad name": (lambda i, m: i.update(dataset="../../escaped"), "names dataset"),
    "packed dataset: dataset of a committed name": (lambda i, m: i.update(dataset="Reference"), "that is committed"),
    "packed dataset: link": (as_link, "has not the file"),
    "packed dataset: other pixels than listed": (other_pixels, "has not the SHA-256"),
    "packed dataset: a file twice": (one_twice, "where its index lists it"),
    "packed dataset: a file less than listed": (lambda i, m: m.pop(3) and None, "where its index lists it"),
    "packed dataset: a file more than listed": (
        lambda i, m: m.append(("images/z.png", b"x")),
        "does not end after the files",
    ),
    "packed dataset: last file missing": (lambda i, m: m.pop() and None, "has not the file 'manifest.csv'"),
    "packed dataset: no manifest": (without_manifest, "end with manifest.csv"),
    "packed dataset: of a later format": (lambda i, m: i.update(format=3), "format 3, not 2"),
    "packed dataset: index of another shape": (lambda i, m: i.update(files=["manifest.csv"]), "its index cannot"),
    "packed dataset: index that is none": (lambda i, m: i.clear(), "its index cannot be used"),
}


@pytest.mark.parametrize("fault", FORGED)
def test_a_forged_archive_is_one_line_and_leaves_nothing(archive, elsewhere, capsys, fault):
    change, said = FORGED[fault]
    forge(archive, change)
    refused(archive, elsewhere, capsys, fault, said)


def test_forging_alone_is_no_fault(archive, elsewhere):
    forge(archive, lambda index, members: None)
    assert data_archive.unpack(archive, elsewhere) == (of_tiny(elsewhere).paths, 0)


def test_no_archive_at_all(tmp_path, elsewhere, capsys):
    for name in ("nowhere.tar", "."):
        assert __main__.main(["unpack", str(tmp_path / name), "--root", str(elsewhere)]) == 2
        said = capsys.readouterr().err
        assert "cannot be read" in said and said.count("\n") == 1
    assert not elsewhere.exists()


def test_space_is_checked_before_the_first_byte(packed, tmp_path, elsewhere, monkeypatch):
    study, archive = packed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=300 << 20))
    data_archive.unpack(archive, elsewhere)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=256 << 20))
    with pytest.raises(StudyError, match=r"to spare, .* are free; free space, or write it to another disk by"):
        data_archive.pack(study.paths, tmp_path / "new" / "b.tar")
    assert not (tmp_path / "new").exists()
    with pytest.raises(StudyError, match=r"are free; free space, or set CHESTXRAY_ROOT") as error:
        data_archive.unpack(archive, tmp_path / "third")
    assert not (tmp_path / "third").exists()
    note("packed dataset: disk too small", error.value, tmp_path / "third")
    data_archive.unpack(archive, elsewhere)  # all is there: nothing is needed


def test_a_full_disk_keeps_what_is_right_for_the_next_call(packed, elsewhere, monkeypatch):
    study, archive = packed
    moves, replace = [], Path.replace

    def full(self, target):
        moves.append(target)
        if len(moves) > 50:
            raise OSError(28, os.strerror(28))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StudyError, match="No space left on device"):
        data_archive.unpack(archive, elsewhere)
    assert not (elsewhere / "1_Datasets" / "tiny").exists()
    monkeypatch.setattr(Path, "replace", replace)
    assert data_archive.unpack(archive, elsewhere)[1] == 50
    assert data_manifest.fingerprint(of_tiny(elsewhere).paths) == data_manifest.fingerprint(study.paths)


def test_unpacking_again_mends_and_leaves_alone_what_is_not_its(packed, elsewhere):
    _, archive = packed
    paths = Paths("tiny", elsewhere)
    data_archive.unpack(archive, elsewhere)
    before = hashes(paths.data)
    samples.load_split(of_tiny(elsewhere), "train")
    names = sorted(path.name for path in paths.store.iterdir())
    (paths.store / names[0]).unlink()
    (paths.store / names[1]).write_bytes(b"damaged")
    (paths.store / "stranger.png").write_bytes(b"left over")
    paths.augmented_rows.write_text("file\n")
    _, kept = data_archive.unpack(archive, elsewhere)
    assert kept == len(data_archive._read_index(archive).files) - 3
    after = hashes(paths.data)
    assert {name: sha256 for name, sha256 in after.items() if not name.startswith("cache/")} == before
    assert any(name.startswith("cache/") for name in after)


def test_another_dataset_of_the_name_is_not_touched(packed, elsewhere, capsys):
    study, archive = packed
    mine = elsewhere / "1_Datasets" / "tiny" / "manifest.csv"
    files.atomic_write(mine, b"mine\n")
    for root in (elsewhere, study.paths.root):  # one that is not ours, and the very one that was packed
        before = hashes(root / "1_Datasets" / "tiny")
        assert __main__.main(["unpack", str(archive), "--root", str(root)]) == 2
        assert "is there already, and not from this archive; remove it or rename it" in capsys.readouterr().err
        assert hashes(root / "1_Datasets" / "tiny") == before


def test_what_cannot_be_packed(packed, tmp_path, capsys):
    study, _ = packed
    target = tmp_path / "new" / "b.tar"
    stored = sorted(study.paths.store.iterdir())[7]
    data = stored.read_bytes()
    augmented = next((study.paths.tree("train_augmented") / CLASSES[0]).iterdir())

    def fails(match):
        with pytest.raises(StudyError, match=match) as error:
            data_archive.pack(study.paths, target)
        assert "\n" not in str(error.value) and not target.parent.exists()

    stored.write_bytes(data[:-1] + b"?")
    fails("is not the image that manifest.csv lists; run stage 2.1 again")
    stored.unlink()
    fails(r"cannot be read \(No such file or directory\); run stage 2.1 again")
    stored.write_bytes(data)
    augmented.unlink()
    fails(r"cannot be read .*; run stage 2.2 again")
    with pytest.raises(StudyError, match="is a folder"):
        data_archive.pack(study.paths, tmp_path)
    study.paths.manifest.unlink()
    with pytest.raises(StageMissing, match=r"run stage 2\.1"):
        data_archive.pack(study.paths, target)
    assert __main__.main(["pack", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_changes_meanwhile_is_noticed(packed, tmp_path, monkeypatch):
    study, _ = packed
    index = data_archive._index(study.paths, data_archive._places(study.paths))
    monkeypatch.setattr(data_archive, "_index", lambda *_: index)
    study.paths.rejected.write_text("file,value,remedy\nx,y,z\n")
    with pytest.raises(StudyError, match="changed while it was packed"):
        data_archive.pack(study.paths, tmp_path / "new" / "b.tar")
    assert list((tmp_path / "new").iterdir()) == []


def line_of(study, source="tiny", **overrides):
    stream = io.StringIO()
    return runner.Pipeline(study, source, overrides, 1, stream=stream), stream


def test_stages_1_and_2_1_count_as_run_while_the_manifest_is_the_one_unpacked(archive, elsewhere, monkeypatch):
    data_archive.unpack(archive, elsewhere)
    before = hashes(elsewhere)
    monkeypatch.setenv("CHESTXRAY_ROOT", str(elsewhere))
    study = of_tiny(elsewhere)
    for _ in range(2):
        line, stream = line_of(study)
        assert line.run(stages.choose(["1", "2.1"])) and line.executed == []
        assert "2.1 Train and test directories: unpacked, run elsewhere" in stream.getvalue()
    assert {name: sha256 for name, sha256 in hashes(elsewhere).items() if ".stages." not in name} == before
    line, stream = line_of(study)
    assert not line.run(stages.choose(["1", "2.1"]), force=True)
    assert "1_Datasets/tiny: was unpacked from an archive, which has no raw images" in stream.getvalue()
    study.paths.manifest.write_text(study.paths.manifest.read_text().replace("train", "valid"))
    line, stream = line_of(study)
    assert not line.run(stages.choose(["1"]))
    assert "has no raw images; leave out stages 1 and 2.1 by --only" in stream.getvalue()


def test_another_image_size_is_told_before_anything_runs(archive, elsewhere, capsys):
    assert __main__.main(["unpack", str(archive), "--root", str(elsewhere)]) == 0
    said = capsys.readouterr().out
    assert "60 radiographs of 32 px, no augmented files (run stage 2.2)" in said and "--set image_size=32" in said
    assert __main__.main(["run", "--dataset", "tiny", "--root", str(elsewhere), "--only", "4.0"]) == 2
    said = capsys.readouterr().err
    assert "was unpacked with images of 32 px, not the 64 px asked for; use --set image_size=32" in said
    assert not (elsewhere / "5_results").exists()


def test_a_damaged_record_counts_as_none(tiny_study):
    for text in ("", "[]", "{}"):
        files.atomic_write(tiny_study.paths.data / sources.UNPACKED, text.encode())
        assert sources.unpacked(tiny_study.paths) is None and not sources.is_unpacked(tiny_study.paths)


@pytest.mark.slow
def test_later_stages_run_from_the_archive_alone(tmp_path, monkeypatch):
    """Phantoms are prepared, packed, unpacked under another root, and the first model is fitted there."""
    home, away, archive = tmp_path / "home", tmp_path / "away", tmp_path / "phantom.tar"
    small = {"image_size": 32, "phantom_images": 210, "no_finding": 30, "dense_epochs": 1}
    monkeypatch.setenv("CHESTXRAY_ROOT", str(home))
    study = config.open_study("phantom", "quick", 2024, small)
    sources.prepare_raw("phantom", study)
    augmentation.write(study, augmentation.plan(preparation.prepare(study).manifest, study.seed))
    fingerprint = data_manifest.fingerprint(study.paths)
    assert __main__.main(["pack", "phantom", "--out", str(archive)]) == 0
    shutil.rmtree(home)
    assert __main__.main(["unpack", str(archive), "--root", str(away)]) == 0
    before = hashes(away / "1_Datasets")
    command = [sys.executable, "-m", "chestxray", "run", "--root", str(away), "--only", "1", "2", "3", "4.0"]
    command += ["--set", *(f"{name}={value}" for name, value in small.items())]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2.1 Train and test directories: unpacked" in done.stderr and "3 of 5 stages run" in done.stdout
    paths = Paths("phantom", away)
    assert {name: sha256 for name, sha256 in hashes(away / "1_Datasets").items() if "/cache/" not in name} == before
    assert not (paths.raw / "images").exists()
    run = json.loads((paths.saved("dense") / "run.json").read_text())
    assert fingerprint in run.values()
    predictions = pd.read_csv(paths.saved("dense") / "predictions_test.csv")
    assert len(predictions) == (pd.read_csv(paths.manifest)["split"] == "test").sum()

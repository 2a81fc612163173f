"""Published datasets: mounted copies, kagglehub's cache, Kaggle itself (a stand-in), and archives by URL."""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
import tarfile
import types
from pathlib import Path

import pytest
from conftest import write_raw
from faults import note
from loopback import Resource, serve

from chestxray import __main__
from chestxray.config import Paths, StudyError, open_study
from chestxray.data import kaggle as data_kaggle
from chestxray.data import sources
from chestxray.data.downloads import Patience

QUICK = Patience(connect=2, stall=0.5, slowest=10, attempts=2, pause=0.01)
IMAGES = 20


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine of its own: nothing mounted, an empty cache, and datasets of 20 images of 48 px."""
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("CHESTXRAY_MOUNTS", str(tmp_path / "mounts"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data_kaggle, "SIDE", 48)
    monkeypatch.setattr("chestxray.data.kaggle.PATIENCE", QUICK)
    for name in ("fetch_urls", "mend"):
        monkeypatch.setattr(data_kaggle, name, with_patience(getattr(data_kaggle, name)))
    small = {
        name: dataclasses.replace(dataset, images=IMAGES, size=100_000)
        for name, dataset in data_kaggle.DATASETS.items()
    }
    monkeypatch.setattr(data_kaggle, "DATASETS", small)


def with_patience(function):
    return lambda *arguments: function(*arguments, patience=QUICK)


def lay_out(folder: Path, name: str, nested: bool = True) -> Path:
    """Write a copy of a dataset as Kaggle gives it, with the first edition's ages."""
    flat = write_raw(folder.with_name(f"{folder.name}.flat"), images=IMAGES, lists=name == "nih")
    folder.mkdir(parents=True)
    text = (flat / "Data_Entry_2017_v2020.csv").read_text()
    if name == "nih":
        (folder / "Data_Entry_2017.csv").write_text(text)
        for number, image in enumerate(sorted((flat / "images").iterdir())):
            place = folder / f"images_{number // 8 + 1:03d}" / "images"
            place.mkdir(parents=True, exist_ok=True)
            image.rename(place / image.name)
        for path in flat.glob("*.txt"):
            path.rename(folder / path.name)
    else:
        header, *rows = text.splitlines()
        header = header.split("OriginalImage[")[0] + (
            "OriginalImageWidth,OriginalImageHeight,OriginalImagePixelSpacing_x,OriginalImagePixelSpacing_y"
        )
        cells = [row.split(",") for row in rows]
        rows = [",".join([*row[:4], f"{int(row[4]):03d}Y", *row[5:]]) for row in cells]
        (folder / "sample_labels.csv").write_text("\n".join([header, *rows]) + "\n")
        inner = folder / "sample" if nested else folder
        inner.mkdir(exist_ok=True)
        (flat / "images").rename(inner / "images")
    shutil.rmtree(flat)
    return folder


def archive(*paths: Path, inside: str = "images") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path in paths:
            tar.add(path, f"{inside}/{path.name}")
    return buffer.getvalue()


@pytest.mark.parametrize("place", ["data", "nih-chest-xrays-data", "datasets/nih-chest-xrays/data"])
def test_a_mounted_copy_is_used_in_place(tmp_path, place):
    mounted = lay_out(tmp_path / "mounts" / place, "nih")
    study = open_study("nih", "quick", 1)
    sources.prepare_raw("nih", study)
    assert study.paths.raw.is_symlink() and study.paths.raw.resolve() == mounted
    assert len(sources.find_images(study.paths.raw)) == IMAGES
    sources.prepare_raw("nih", study)


@pytest.mark.parametrize("nested", [True, False])
def test_the_sample_as_kaggle_lays_it_out(tmp_path, nested, capsys):
    lay_out(tmp_path / "mounts" / "sample", "nih-sample", nested)
    study = open_study("nih-sample", "quick", 1)
    sources.prepare_raw("nih-sample", study)
    assert sources.find_table(study.paths.raw).name == "sample_labels.csv"
    assert len(sources.find_images(study.paths.raw)) == IMAGES
    assert __main__.main(["verify", "nih-sample"]) == 0
    assert "Nothing is wrong" in capsys.readouterr().out
    assert __main__.main(["show", "nih-sample"]) == 0
    assert "20 to" not in capsys.readouterr().out.split("ages")[0]


def test_the_sample_is_prepared(tmp_path):
    from chestxray.data import preparation

    lay_out(tmp_path / "mounts" / "sample", "nih-sample")
    study = open_study("nih-sample", "quick", 1, {"image_size": 32, "no_finding": 8})
    sources.prepare_raw("nih-sample", study)
    manifest = preparation.prepare(study, workers=1).manifest
    assert len(manifest) == IMAGES and manifest["age"].between(20, 80).all()


def test_the_two_datasets_and_parts_are_told_apart(tmp_path):
    lay_out(tmp_path / "mounts" / "sample", "nih-sample")
    assert data_kaggle.find_copy(data_kaggle.DATASETS["nih"]) is None
    part = lay_out(tmp_path / "mounts" / "data", "nih")
    shutil.rmtree(part / "images_001")
    assert data_kaggle.find_copy(data_kaggle.DATASETS["nih"]) is None


def test_kagglehubs_cache_is_used(tmp_path):
    folder = tmp_path / "cache" / "datasets" / "nih-chest-xrays" / "data"
    lay_out(folder / "versions" / "3", "nih")
    lay_out(folder / "versions" / "4", "nih")
    assert data_kaggle.find_copy(data_kaggle.DATASETS["nih"]) is None  # neither is complete
    (folder / "3.complete").touch()
    study = open_study("nih", "quick", 1)
    sources.prepare_raw("nih", study)
    assert study.paths.raw.resolve() == folder / "versions" / "3"


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A stand-in for kagglehub that serves `tmp_path/kaggle`; set `error` to make it fail."""
    hub = types.ModuleType("kagglehub")
    hub.error, hub.asked = None, []

    def dataset_download(handle, path=None, *, force_download=False, output_dir=None):
        hub.asked.append((handle, path))
        if hub.error:
            raise hub.error
        origin, folder = tmp_path / "kaggle", tmp_path / "cache" / "datasets" / "nih-chest-xrays" / "data"
        if path is None:
            shutil.copytree(origin, folder / "versions" / "3")
            (folder / "3.complete").touch()
            return str(folder / "versions" / "3")
        target = Path(output_dir, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin / path, target)
        return str(target)

    hub.dataset_download = dataset_download
    monkeypatch.setitem(sys.modules, "kagglehub", hub)
    lay_out(tmp_path / "kaggle", "nih")
    return hub


def test_fetch_verifies_and_mend_fetches_only_what_is_broken(tmp_path, kaggle, capsys):
    assert __main__.main(["fetch", "nih"]) == 0
    assert "Nothing is wrong" in capsys.readouterr().out
    raw = Paths("nih").raw
    images = list(sources.find_images(raw).values())
    before = {path: path.read_bytes() for path in images}
    images[0].write_bytes(before[images[0]][:-30])
    images[9].write_bytes(b"<html>")
    (raw / "test_list.txt").unlink()
    assert __main__.main(["verify", "nih"]) == 1
    said = capsys.readouterr().out
    assert f"{images[0].name}: " in said and "does not end as a PNG does" in said and "test_list.txt" in said
    kaggle.asked.clear()
    assert __main__.main(["fetch", "nih", "--mend"]) == 0
    assert len(kaggle.asked) == 3 and all(handle.endswith("/versions/3") for handle, _ in kaggle.asked)
    assert {path: path.read_bytes() for path in images} == before


def test_kaggle_that_cannot_be_had_is_one_line(tmp_path, kaggle, capsys):
    kaggle.error = RuntimeError("403 Client Error.\n\nYou don't have permission")
    assert __main__.main(["fetch", "nih"]) == 2
    said = capsys.readouterr().err.removeprefix("chestxray: ").rstrip("\n")
    assert "not to be had (403 Client Error.)" in said and "--urls" in said
    assert not (tmp_path / "root").exists()
    note("Kaggle refuses", said, tmp_path / "root")


def test_space_is_checked_before_kaggle_is_asked(kaggle, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=150_000))
    with pytest.raises(StudyError, match="KAGGLEHUB_CACHE"):
        sources.prepare_raw("nih", open_study("nih", "quick", 1))
    assert kaggle.asked == []


def test_the_folder_of_a_missing_image_follows_the_nihs_counts(tmp_path, monkeypatch):
    monkeypatch.setitem(data_kaggle.DATASETS, "nih", dataclasses.replace(data_kaggle.DATASETS["nih"], images=112_120))
    names = [f"{number:08d}_000.png" for number in range(112_120)]
    places = {name: number for number, name in enumerate(names)}
    nih = data_kaggle.DATASETS["nih"]

    def folder(number: int) -> str:
        return data_kaggle._kaggle_place(nih, tmp_path, names[number - 1], places).parent.parent.name

    assert [folder(number) for number in (1, 4_999, 5_000, 14_999, 15_000)] == [
        *["images_001"] * 2,
        *["images_002"] * 2,
        "images_003",
    ]
    assert [folder(number) for number in (104_999, 105_000, 112_120)] == ["images_011", "images_012", "images_012"]


@pytest.fixture
def nihs(tmp_path):
    """A web server with the NIH's archives and tables, and the list of their URLs."""
    origin = lay_out(tmp_path / "origin", "nih")
    with serve() as (resources, url):
        lines = ["# the NIH's", ""]
        for number in (1, 2, 3):
            images = sorted((origin / f"images_{number:03d}" / "images").iterdir())
            resources[f"/static/{number}.gz"] = Resource(archive(*images))
            lines.append(f"{url(f'/static/{number}.gz')} images_{number:02d}.tar.gz")
        for name in ("Data_Entry_2017.csv", "train_val_list.txt", "test_list.txt"):
            resources[f"/{name}"] = Resource((origin / name).read_bytes())
            lines.append(url(f"/{name}"))
        (tmp_path / "urls.txt").write_text("\n".join(lines))
        yield resources, origin


def fetch(*more):
    return __main__.main(["fetch", "nih", "--urls", "urls.txt", *more])


def test_archives_by_url(tmp_path, nihs, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    resources, origin = nihs
    assert fetch() == 0
    assert "Nothing is wrong" in capsys.readouterr().out
    paths = Paths("nih")
    assert sorted(path.name for path in paths.data.iterdir()) == ["fetch.json", "raw"]
    assert {name: path.read_bytes() for name, path in sources.find_images(paths.raw).items()} == {
        path.name: path.read_bytes() for path in origin.rglob("*.png")
    }
    asked = [len(resource.asked) for resource in resources.values()]
    assert fetch() == 0
    assert [len(resource.asked) for resource in resources.values()] == asked
    sources.prepare_raw("nih", open_study("nih", "quick", 1))


def test_one_bad_archive_leaves_the_rest_and_is_fetched_by_the_next_run(tmp_path, nihs, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    resources, _ = nihs
    good = resources["/static/2.gz"]
    resources["/static/2.gz"] = Resource(good.data[:-500], etag='"bad"')
    assert fetch() == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "broken archive" in said[0]
    note("one corrupt archive of a list", said[0], Paths("nih").data)
    with pytest.raises(StudyError, match=r"1 archives are still missing, such as images_02\.tar\.gz"):
        sources.prepare_raw("nih", open_study("nih", "quick", 1))
    resources["/static/2.gz"] = good
    assert fetch() == 0
    assert [len(resources[f"/static/{n}.gz"].asked) for n in (1, 2, 3)] == [1, 1, 1]


def test_mend_takes_only_what_is_broken_from_only_its_archive(tmp_path, nihs, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    resources, origin = nihs
    assert fetch() == 0
    images = list(sources.find_images(Paths("nih").raw).values())
    images[0].unlink()
    images[1].write_bytes(images[1].read_bytes()[:100])
    changed = images[2].stat().st_mtime_ns
    assert __main__.main(["fetch", "nih", "--mend"]) == 0
    assert "2 files to mend" in capsys.readouterr().out
    assert [len(resources[f"/static/{n}.gz"].asked) for n in (1, 2, 3)] == [2, 1, 1]
    assert images[2].stat().st_mtime_ns == changed
    assert images[0].read_bytes() == next(origin.rglob(images[0].name)).read_bytes()


def test_a_broken_table_is_mended(tmp_path, nihs, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fetch() == 0
    table = Paths("nih").raw / "Data_Entry_2017.csv"
    table.write_bytes(b"\xff\xfe nothing")
    assert __main__.main(["verify", "nih"]) == 2
    assert __main__.main(["fetch", "nih", "--mend"]) == 0


def test_pages_instead_of_files_are_refused(tmp_path, nihs, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    resources, _ = nihs
    resources["/test_list.txt"] = Resource(b"<!DOCTYPE html>")
    assert fetch() == 1
    said = capsys.readouterr().err.splitlines()[0]
    assert "begins with b'<!DOCTYPE" in said
    assert not (Paths("nih").raw / "test_list.txt").exists()
    note("a web page instead of a table", said, Paths("nih").data)


def test_space_for_all_archives_is_checked_first(tmp_path, nihs, monkeypatch):
    resources, _ = nihs
    monkeypatch.setattr("chestxray.data.downloads.RESERVE", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=20_000))
    with pytest.raises(StudyError, match=r"needs \d+ kB, 20 kB are free.*CHESTXRAY_ROOT"):
        data_kaggle.fetch_urls(Paths("nih"), data_kaggle.read_list(tmp_path / "urls.txt"))
    assert not (tmp_path / "root").exists() and not resources["/static/1.gz"].asked


def test_a_mounted_copy_is_never_written(tmp_path, nihs, monkeypatch):
    lay_out(tmp_path / "mounts" / "data", "nih")
    sources.prepare_raw("nih", open_study("nih", "quick", 1))
    with pytest.raises(StudyError, match="is a link to"):
        data_kaggle.fetch_urls(Paths("nih"), data_kaggle.read_list(tmp_path / "urls.txt"))
    with pytest.raises(StudyError, match="not written from here"):
        data_kaggle.mend(data_kaggle.DATASETS["nih"], Paths("nih"), {"a.png"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no URL in it"),
        ("ftp://x/y.gz", "line 1: 'ftp://x/y.gz'; write URL"),
        ("https://x/a.gz ../../a.gz", "line 1"),
        ("https://x/a.gz\nhttps://y/a.gz", "line 2: a second 'a.gz'"),
        ("https://x/", "line 1"),
    ],
)
def test_lists_of_urls_that_are_none(tmp_path, text, said):
    (tmp_path / "urls.txt").write_text(text)
    with pytest.raises(StudyError) as error:
        data_kaggle.read_list(tmp_path / "urls.txt")
    assert said in str(error.value) and "urls.txt" in str(error.value)
    with pytest.raises(StudyError, match="cannot be read"):
        data_kaggle.read_list(tmp_path / "none.txt")


def test_a_line_of_a_list(tmp_path):
    (tmp_path / "urls.txt").write_text(f"https://x/a%20b.gz\nhttps://y/z images_02.tar.gz {'AB' * 32}\n")
    first, second = data_kaggle.read_list(tmp_path / "urls.txt")
    assert first["name"] == "a b.gz" and first["sha256"] == ""
    assert second["name"] == "images_02.tar.gz" and second["sha256"] == "ab" * 32

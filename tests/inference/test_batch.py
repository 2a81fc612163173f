"""Answers for loose files: those that the model gives by hand, whatever else lies there, and nothing of a header."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import dicom_files
import keras
import numpy as np
import pandas as pd
import pytest
import small_models
from conftest import tiny_pixels
from PIL import Image

from chestxray import config
from chestxray.config import CLASSES, PRESENT, SIX_FINDINGS, StudyError
from chestxray.inference import answers, batch, reader

SIDE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CHESTXRAY_CACHE", str(tmp_path_factory.getbasetemp() / "graphs"))


@pytest.fixture(scope="module")
def model() -> keras.Model:
    """A network of known arithmetic: softmax of seven sums over the pixels."""
    inputs = keras.Input((SIDE, SIDE, 1))
    outputs = small_models.outputs(keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs)))
    return small_models.shaken(keras.Model(inputs, outputs), 1)


@pytest.fixture(scope="module")
def model_path(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.keras"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def mapped_path(tmp_path_factory) -> Path:
    """A model with heat-maps."""
    path = tmp_path_factory.mktemp("mapped") / "model.keras"
    small_models.cnn(SIDE).save(path)
    return path


def draw(path: Path, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def predict(paths, model_path, out: Path, **options) -> pd.DataFrame:
    """The table that is written; empty where none is."""
    answered = batch.predict_files(paths, out, reader.load(model_path), **options)
    table = pd.read_csv(out, keep_default_na=False) if out.exists() else pd.DataFrame(columns=answers.columns())
    assert len(table) == answered
    return table


def expected(model: keras.Model, pixels: list[np.ndarray]) -> np.ndarray:
    kernel, bias = (w.astype(float) for w in model.get_layer("classes").get_weights())
    logits = np.stack(pixels).reshape(len(pixels), -1) / 255 @ kernel + bias
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_table_is_that_of_the_model_in_order(model, model_path, tmp_path, batch_size):
    pixels = [draw(tmp_path / f"{name}.png", seed) for seed, name in enumerate("cabde")]
    files = [tmp_path / f"{name}.png" for name in "cabde"]
    table = predict(files, model_path, tmp_path / "p.csv", batch_size=batch_size)
    assert list(table.columns) == [
        *("image", "class", *CLASSES, *PRESENT),
        *(f"{name}_{side}" for side in ("low", "high", "above") for name in SIX_FINDINGS),
        "flags",
    ]
    assert list(table["image"]) == [path.as_posix() for path in files]
    np.testing.assert_allclose(table[list(CLASSES)], expected(model, pixels), atol=2e-6)
    assert (table[list(CLASSES)] * 1_000_000).round().sum(axis=1).eq(1_000_000).all()
    assert table["class"].eq(table[list(CLASSES)].idxmax(axis=1)).all()


def test_a_larger_image_is_averaged_down_to_the_models_size(model, model_path, tmp_path):
    pixels = draw(tmp_path / "large.png", 3, (4 * SIDE, 4 * SIDE))
    means = pixels.reshape(SIDE, 4, SIDE, 4).mean(axis=(1, 3)).round()
    table = predict([tmp_path / "large.png"], model_path, tmp_path / "p.csv")
    # a mean that ends in one half may round either way
    np.testing.assert_allclose(table[list(CLASSES)], expected(model, [means]), atol=2e-3)


def test_folders_are_searched_and_same_names_told_apart(model_path, tmp_path, monkeypatch):
    for name in ("one/b.png", "one/a.jpeg", "one/deep/a.JPG", "two/b.png", "two/.hidden.png", "two/.cache/c.png"):
        draw(tmp_path / name, len(name))
    for name in ("notes.txt", "noext"):
        (tmp_path / "one" / name).write_text("no suffix of an image")
    dicom_files.write(tmp_path / "one" / "1.2.840.1", tiny_pixels(1), 8)
    Image.fromarray(tiny_pixels(1)).save(tmp_path / "one" / "c.tif")
    monkeypatch.chdir(tmp_path)
    others = []
    table = predict([Path("two"), Path("one"), Path("two/b.png")], model_path, tmp_path / "p.csv", others=others)
    named = ["two/b.png", "one/1.2.840.1", "one/a.jpeg", "one/b.png", "one/c.tif", "one/deep/a.JPG", "two/b.png"]
    assert list(table["image"]) == named and others == [Path("one/noext"), Path("one/notes.txt")]


def test_bad_files_are_reported_and_the_rest_answered(model, model_path, tmp_path, capsys):
    folder = tmp_path / "mixed"
    good = [draw(folder / "good1.png", 1), draw(folder / "good2.png", 2)]
    whole = (folder / "good1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    (tmp_path / "barren").mkdir()
    failures = []
    places = [folder, tmp_path / "absent.png", tmp_path / "barren"]
    table = predict(places, model_path, tmp_path / "p.csv", report=failures.append)
    assert [Path(image).name for image in table["image"]] == ["good1.png", "good2.png"]
    np.testing.assert_allclose(table[list(CLASSES)], expected(model, good), atol=2e-6)
    lines = sorted(str(failure) for failure in failures)
    assert [line.split(": ")[0] for line in lines] == sorted(
        str(path) for path in (*(folder / f"{n}.png" for n in ("cut", "empty", "text")), *places[1:])
    )
    assert not any("\n" in line for line in lines)

    predict(places, model_path, tmp_path / "p.csv")
    assert sorted(capsys.readouterr().err.splitlines()) == lines


def test_nothing_usable_writes_nothing(model_path, tmp_path):
    failures = []
    table = predict([tmp_path / "absent.png"], model_path, tmp_path / "p.csv", report=failures.append)
    assert (len(table), len(failures), list(tmp_path.iterdir())) == (0, 1, [])


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_folder_that_may_not_be_read_is_reported(model_path, tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    failures = []
    predict([tmp_path / "locked"], model_path, tmp_path / "p.csv", report=failures.append)
    assert "locked" in str(failures[0])


def test_memory_does_not_grow_with_the_number_of_files(model_path, tmp_path):
    draw(tmp_path / "large.png", 1, (256, 256))
    asked = reader.load(model_path)
    peaks = []
    for copies in (40, 400):
        tracemalloc.start()
        batch.predict_files([tmp_path / "large.png"] * copies, tmp_path / "p.csv", asked)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1_000_000  # 360 more decoded images would be 24 MB


def test_json_says_the_same_as_the_table(mapped_path, tmp_path):
    for name in "ab":
        draw(tmp_path / f"{name}.png", ord(name))
    table = predict([tmp_path], mapped_path, tmp_path / "out" / "p.csv")
    asked = reader.load(mapped_path)
    assert batch.predict_files([tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "p.json", asked) == 2
    document = json.loads((tmp_path / "p.json").read_text("utf-8"))
    assert "not a medical device" in document["warning"]
    assert document["prevalence"] == {"name": "equal", "shares": dict.fromkeys(CLASSES, pytest.approx(1 / 7))}
    for (_, row), entry in zip(table.iterrows(), document["images"], strict=True):
        assert entry["image"] == row["image"]
        assert entry == {name: None if value == "" else value for name, value in row.items()}


def test_heat_maps_are_pictures_of_their_own_names(mapped_path, tmp_path):
    wide = draw(tmp_path / "one" / "a.png", 1, (40, 60))
    draw(tmp_path / "two" / "a.png", 2)
    dicom_files.write(tmp_path / "two" / "1.2.840.1", tiny_pixels(1), 8)
    maps = tmp_path / "maps"
    places = [tmp_path / "one", tmp_path / "two"]
    table = predict(places, mapped_path, tmp_path / "p.csv", heat_maps=maps, finding="Mass")
    assert list(table["heat_map"]) == ["a_Mass.png", "1.2.840.1_Mass.png", "a_2_Mass.png"]
    assert sorted(path.name for path in maps.iterdir()) == sorted(table["heat_map"])
    with Image.open(maps / "a_Mass.png") as picture:
        # The radiograph, below a strip that says what heat-maps are worth.
        assert (picture.width, picture.mode, picture.info) == (60, "RGB", {}) and picture.height > 60
        strip, picture = np.asarray(picture)[:-40], picture.crop((0, picture.height - 40, 60, picture.height))
        assert strip[0].min() == 255 and strip.min() < 128 and np.ptp(strip, axis=2).max() == 0
        heat = reader.load(mapped_path).heat_map(tmp_path / "one" / "a.png", "Mass")
        colour = np.ptp(np.asarray(picture).astype(int), axis=2)
        assert heat.shape == wide.shape and (colour[heat > 0.5] > 20).mean() > 0.9

    table = predict(places, mapped_path, tmp_path / "p.csv", heat_maps=tmp_path / "each")
    for _, row in table.iterrows():
        top = max(SIX_FINDINGS, key=lambda name: row[f"{name}_present"])
        assert row["heat_map"].endswith(f"_{top}.png") and (tmp_path / "each" / row["heat_map"]).exists()


def test_a_model_without_places_has_no_heat_maps(model_path, tmp_path):
    draw(tmp_path / "a.png", 1)
    with pytest.raises(StudyError, match="the model has no heat-map"):
        predict([tmp_path / "a.png"], model_path, tmp_path / "p.csv", heat_maps=tmp_path / "maps")
    assert not (tmp_path / "p.csv").exists()


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_nothing_of_a_patient_is_written_logged_or_printed(mapped_path, tmp_path, suffix, capfd, caplog):
    caplog.set_level(0)
    path = dicom_files.write(
        tmp_path / "a.dcm", tiny_pixels(1, 64), 8, ViewPosition="CANARY", BodyPartExamined=dicom_files.NUMBER
    )
    broken = tmp_path / "broken.dcm"
    broken.write_bytes(path.read_bytes()[:-900])
    out = tmp_path / f"p.{suffix}"
    answered = batch.predict_files([path, broken], out, reader.load(mapped_path), heat_maps=tmp_path / "maps")
    assert answered == 1
    said = [caplog.text.encode(), *(text.encode() for text in capfd.readouterr())]
    said += [file.read_bytes() for file in (out, *(tmp_path / "maps").iterdir())]
    assert b"broken.dcm" in said[2] and b"a.dcm" in said[3]
    assert dicom_files.NUMBER.encode() in path.read_bytes() and b"CANARY" in path.read_bytes().upper()
    for text in said:
        assert not any(word in text.lower() for word in (b"canary", b"4711", b"1901"))


def test_default_is_the_reference_model(model, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "REFERENCE", tmp_path / "5_results" / "reference")
    pixels = draw(tmp_path / "a.png", 1)
    with pytest.raises(StudyError, match=r"5_results/reference/ensemble\.keras: the reference model is missing"):
        predict([tmp_path / "a.png"], None, tmp_path / "p.csv")
    config.REFERENCE.mkdir(parents=True)
    model.save(config.REFERENCE / "ensemble.keras")
    table = predict([tmp_path / "a.png"], None, tmp_path / "p.csv")
    np.testing.assert_allclose(table[list(CLASSES)], expected(model, [pixels]), atol=2e-6)


def saved(inputs: tuple, path: Path, old: bool = False) -> Path:
    x = keras.Input(inputs)
    outputs = small_models.outputs(keras.layers.GlobalAveragePooling2D()(x))
    keras.Model(x, outputs["classes"] if old else outputs).save(path)
    return path


@pytest.mark.parametrize("engine", ["onnx", "keras"])
def test_models_of_something_else_are_refused(tmp_path, engine):
    (tmp_path / "text.keras").write_text("no model")
    cases = {
        saved(
            (SIDE, SIDE, 1), tmp_path / "old.keras", old=True
        ): r"gives \(None, 7\), not findings \(None, 15\) and cl",
        saved((SIDE, SIDE, 3), tmp_path / "colour.keras"): r"takes \(None, 16, 16, 3\)",
        saved((SIDE, 8, 1), tmp_path / "oblong.keras"): r"takes \(None, 16, 8, 1\)",
        saved((None, None, 1), tmp_path / "any.keras"): r"takes \(None, None, None, 1\)",
        tmp_path / "text.keras": "no Keras model",
        tmp_path / "absent.keras": "no such model",
        tmp_path: "no such model",
    }
    for path, reason in cases.items():
        with pytest.raises(StudyError, match=reason) as error:
            reader.load(path, engine)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"finding": "Cough"}, "finding 'Cough' is unknown; there are: Atelectasis"),
        ({"out": "p.xlsx"}, "p.xlsx: unknown kind of table; give a name that ends in .csv or .json"),
        ({"out": "folder.csv"}, "is a folder"),
    ],
)
def test_wrong_use_is_told_before_anything_is_done(model_path, tmp_path, options, line):
    (tmp_path / "folder.csv").mkdir()
    out = tmp_path / options.pop("out", "p.csv")
    with pytest.raises(StudyError, match=line):
        batch.predict_files([], out, reader.load(model_path), **options)


def test_radiographs_are_not_written_over(mapped_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(Path("in/a.png"), 1)
    shutil.copy("in/a.png", "scan.csv")
    before = {path: path.read_bytes() for path in (Path("in/a.png"), Path("scan.csv"))}
    model = reader.load(mapped_path)
    with pytest.raises(StudyError, match=r"scan\.csv: is there and holds no predictions; give --out another name"):
        batch.predict_files([Path("scan.csv")], tmp_path / "scan.csv", model)
    for given in ("in", "in/a.png"):
        with pytest.raises(StudyError, match="in: holds radiographs that are read; give --heat-maps another folder"):
            batch.predict_files([Path(given)], Path("p.csv"), model, heat_maps=tmp_path / "in")
    assert {path: path.read_bytes() for path in Path().rglob("*.*")} == before
    assert batch.predict_files([Path("in")], Path("in/p.csv"), model, heat_maps=Path("in/maps")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are not UTF-8")
def test_names_that_are_not_utf8_are_escaped(mapped_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(Path("a.png"), 1)
    Path("a.png").rename(os.fsdecode(b"R\xf6.png"))
    Path(os.fsdecode(b"b\xf6d.png")).write_bytes(b"text")
    model, maps = reader.load(mapped_path), Path("maps")
    given = [Path(os.fsdecode(b"b\xf6d.png")), Path(os.fsdecode(b"R\xf6.png"))]
    for name in ("p.csv", "p.json"):
        assert batch.predict_files(given, Path(name), model, heat_maps=maps, finding="Mass") == 1
        assert capsys.readouterr().err.startswith(r"b\xf6d.png: begins with")
    assert [path.name for path in maps.iterdir()] == [r"R\xf6_Mass.png"]
    assert pd.read_csv("p.csv").loc[0, ["image", "heat_map"]].tolist() == [r"R\xf6.png", r"R\xf6_Mass.png"]
    assert json.loads(Path("p.json").read_text())["images"][0]["image"] == r"R\xf6.png"


def test_predict_and_serve_need_neither_tensorflow_nor_pandas(mapped_path, tmp_path):
    """The command's process, and the page's own modules."""
    draw(tmp_path / "a.png", 1)
    code = (
        "import sys; from chestxray import __main__; from chestxray.inference import page, web\n"
        "print(__main__.main(['predict', *sys.argv[1:]]), "
        "sorted({'tensorflow', 'keras', 'pandas', 'scipy', 'sklearn', 'matplotlib'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.png"), "--out", str(tmp_path / "p.csv")]
    command += ["--model", str(mapped_path)]
    done = subprocess.run(command, cwd=config.REPOSITORY, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr

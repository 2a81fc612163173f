"""Answers for loose files: the same as the model gives by hand, whatever else lies beside them."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from chestxray import config, prediction
from chestxray.config import CLASSES, StudyError

SIDE = 16


@pytest.fixture(scope="module")
def model() -> keras.Model:
    """A network of known arithmetic: softmax of seven sums over the pixels."""
    inputs = keras.Input((SIDE, SIDE, 1))
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    outputs = keras.layers.Dense(7, activation="softmax", kernel_initializer=keras.initializers.RandomNormal(seed=1))(x)
    return keras.Model(inputs, outputs)


@pytest.fixture(scope="module")
def model_path(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.keras"
    model.save(path)
    return path


def draw(path: Path, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def expected(model: keras.Model, pixels: list[np.ndarray]) -> np.ndarray:
    kernel, bias = (w.astype(float) for w in model.layers[-1].get_weights())
    logits = np.stack(pixels).reshape(len(pixels), -1) / 255 @ kernel + bias
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_table_is_that_of_the_model_in_order(model, model_path, tmp_path, batch_size):
    pixels = [draw(tmp_path / f"{name}.png", seed) for seed, name in enumerate("cabde")]
    files = [tmp_path / f"{name}.png" for name in "cabde"]
    table = prediction.predict_files(files, model_path, batch_size)
    assert list(table.columns) == ["image", *CLASSES]
    assert list(table["image"]) == [path.as_posix() for path in files]
    np.testing.assert_allclose(table[list(CLASSES)], expected(model, pixels), atol=2e-6)
    np.testing.assert_allclose(table[list(CLASSES)].sum(axis=1), 1, atol=1e-5)


def test_a_larger_image_is_averaged_down_to_the_models_size(model, model_path, tmp_path):
    pixels = draw(tmp_path / "large.png", 3, (4 * SIDE, 4 * SIDE))
    means = pixels.reshape(SIDE, 4, SIDE, 4).mean(axis=(1, 3)).round()
    table = prediction.predict_files([tmp_path / "large.png"], model_path)
    # a mean that ends in one half may round either way
    np.testing.assert_allclose(table[list(CLASSES)], expected(model, [means]), atol=2e-3)


def test_folders_are_searched_and_same_names_told_apart(model_path, tmp_path, monkeypatch):
    for name in ("one/b.png", "one/a.jpeg", "one/deep/a.JPG", "two/b.png", "two/.hidden.png", "two/.cache/c.png"):
        draw(tmp_path / name, len(name))
    (tmp_path / "one" / "notes.txt").write_text("not an image")
    monkeypatch.chdir(tmp_path)
    table = prediction.predict_files([Path("two"), Path("one"), Path("two/b.png")], model_path)
    assert list(table["image"]) == ["two/b.png", "one/a.jpeg", "one/b.png", "one/deep/a.JPG", "two/b.png"]


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
    table = prediction.predict_files(places, model_path, report=failures.append)
    assert [Path(image).name for image in table["image"]] == ["good1.png", "good2.png"]
    np.testing.assert_allclose(table[list(CLASSES)], expected(model, good), atol=2e-6)
    lines = sorted(str(failure) for failure in failures)
    assert [line.split(": ")[0] for line in lines] == sorted(
        str(path) for path in (*(folder / f"{n}.png" for n in ("cut", "empty", "text")), *places[1:])
    )
    assert not any("\n" in line for line in lines)

    prediction.predict_files(places, model_path)
    assert sorted(capsys.readouterr().err.splitlines()) == lines


def test_nothing_usable_is_an_empty_table(model_path, tmp_path):
    failures = []
    table = prediction.predict_files([tmp_path / "absent.png"], model_path, report=failures.append)
    assert (len(table), list(table.columns), len(failures)) == (0, ["image", *CLASSES], 1)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_folder_that_may_not_be_read_is_reported(model_path, tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    failures = []
    prediction.predict_files([tmp_path / "locked"], model_path, report=failures.append)
    assert "locked" in str(failures[0])


def test_memory_does_not_grow_with_the_number_of_files(model_path, tmp_path):
    draw(tmp_path / "large.png", 1, (256, 256))
    peaks = []
    for copies in (40, 400):
        tracemalloc.start()
        prediction.predict_files([tmp_path / "large.png"] * copies, model_path, batch_size=8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1_000_000  # 360 more decoded images would be 24 MB


def test_default_is_the_reference_model(model, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "REFERENCE", tmp_path / "5_results" / "reference")
    pixels = draw(tmp_path / "a.png", 1)
    with pytest.raises(StudyError, match=r"5_results/reference/ensemble\.keras: the reference model is missing"):
        prediction.predict_files([tmp_path / "a.png"])
    config.REFERENCE.mkdir(parents=True)
    model.save(config.REFERENCE / "ensemble.keras")
    table = prediction.predict_files([tmp_path / "a.png"])
    np.testing.assert_allclose(table[list(CLASSES)], expected(model, [pixels]), atol=2e-6)


def saved(inputs: tuple, units: int, path: Path) -> Path:
    x = keras.Input(inputs)
    keras.Model(x, keras.layers.Dense(units)(keras.layers.GlobalAveragePooling2D()(x))).save(path)
    return path


def test_models_of_something_else_are_refused(tmp_path):
    (tmp_path / "text.keras").write_text("no model")
    cases = {
        saved((SIDE, SIDE, 1), 6, tmp_path / "six.keras"): r"gives \(None, 6\), not 7",
        saved((SIDE, SIDE, 3), 7, tmp_path / "colour.keras"): r"takes \(None, 16, 16, 3\)",
        saved((SIDE, 8, 1), 7, tmp_path / "oblong.keras"): r"takes \(None, 16, 8, 1\)",
        saved((None, None, 1), 7, tmp_path / "any.keras"): r"takes \(None, None, None, 1\)",
        tmp_path / "text.keras": "no Keras model",
        tmp_path / "absent.keras": "no such model",
        tmp_path: "no such model",
    }
    for path, reason in cases.items():
        with pytest.raises(StudyError, match=reason) as error:
            prediction.predict_files([], path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_batch_size_below_one_is_refused(model_path):
    with pytest.raises(StudyError, match="batch size 0"):
        prediction.predict_files([], model_path, batch_size=0)

"""Converted graphs give what Keras gives: probabilities, members' predictions and heat-maps; and are made once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import onnxruntime
import pytest
import small_models
import tables
from conftest import tiny_pixels
from keras import layers

from chestxray import config
from chestxray.config import ALL_LABELS, CLASSES, SIX_LABELS, StudyError
from chestxray.evaluation import posterior
from chestxray.images import pixels
from chestxray.inference import engines, interpretation
from chestxray.networks import efficientnet, onnx_graph

SIDE = 32


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of the tests' own."""
    folder = tmp_path_factory.getbasetemp() / "graphs"
    monkeypatch.setenv(engines.CACHE_VARIABLE, str(folder))
    return folder


def lite() -> keras.Model:
    return small_models.network(SIDE, 4, 48, efficientnet.build("EfficientNetLite0", (48, 48, 3), None))


def every_layer() -> keras.Model:
    """A network of the kinds of layers that the others lack."""
    image = layers.Input((SIDE, SIDE, 1))
    x = layers.Resizing(20, 24, antialias=True)(layers.Rescaling(1 / 127.5, -1.0)(image))
    x = layers.Conv2D(8, 3, padding="valid", strides=2)(layers.GaussianNoise(0.1)(x))
    x = layers.ReLU(6.0)(layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)))
    y = layers.Conv2D(8, 5, padding="same", groups=2, activation="relu")(layers.MaxPooling2D(3, 1, padding="same")(x))
    x = layers.Add()([x, layers.SpatialDropout2D(0.2)(y)])
    wide = layers.GlobalAveragePooling2D()(layers.AveragePooling2D(2)(x))
    x = layers.Concatenate()([wide, layers.Flatten()(layers.Conv2D(2, 1)(x))])
    x = layers.Activation("sigmoid")(layers.Dense(9)(x))
    return small_models.shaken(keras.Model(image, small_models.outputs(x)), 5)


MADE = {
    "dense": lambda: small_models.dense(SIDE),
    "CNN": lambda: small_models.cnn(SIDE),
    "EfficientNet-Lite0, another size inside": lite,
    "every layer": every_layer,
    "mean": lambda: small_models.ensemble([small_models.network(SIDE, 1, 48), small_models.network(SIDE, 2)]),
    "head": lambda: small_models.ensemble([small_models.network(SIDE, 1, 48), small_models.cnn(SIDE)], head=True),
    "one without maps": lambda: small_models.ensemble([small_models.cnn(SIDE), small_models.dense(SIDE)]),
}


@pytest.fixture(scope="module", params=MADE)
def saved(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.keras"
    MADE[request.param]().save(path)
    return path


def radiographs(number: int = 5, side: int = SIDE) -> np.ndarray:
    return np.stack([tiny_pixels(index, side) // (1 + index % 3) for index in range(number)])


def test_both_engines_give_the_same(saved):
    keras_engine, onnx = engines.start(saved, "keras"), engines.start(saved, "onnx")
    assert (keras_engine.name, keras_engine.side, onnx.name, onnx.side) == ("keras", SIDE, "onnx", SIDE)
    expected, found = keras_engine.scores(radiographs()), onnx.scores(radiographs())
    plain = engines.load_keras(saved).predict_on_batch(radiographs()[..., None].astype(np.float32))
    for name, values in expected._asdict().items():
        spread = values.std(axis=0).max()  # by how much the answers on these radiographs differ
        assert values.dtype == np.float32 and spread > 3e-4
        np.testing.assert_allclose(getattr(found, name), values, atol=min(1e-4, spread / 10))
        if name in plain:
            np.testing.assert_allclose(values, plain[name], atol=1e-6)
    assert found.findings.shape == (5, len(ALL_LABELS)) and found.classes.shape == (5, len(CLASSES))
    np.testing.assert_allclose(found.classes.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found.member_findings.mean(axis=1), found.findings, atol=1e-5)
    try:
        maps = keras_engine.class_maps(radiographs())
    except StudyError as error:
        with pytest.raises(StudyError, match="the model has no heat-map") as other:
            onnx.heat_maps(radiographs(), "Mass")
        assert str(other.value) == str(error)
    else:
        for one, other in zip(onnx.class_maps(radiographs()), maps, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-3)
        heat = onnx.heat_maps(radiographs(), ["Mass", "Nodule", "Mass", "Mass", "Mass"])
        assert heat.shape == (5, SIDE, SIDE) and heat.min() == 0 and heat.max() == 1


def test_a_graph_is_made_once_and_again_for_another_model(tmp_path, monkeypatch):
    monkeypatch.setenv(engines.CACHE_VARIABLE, str(tmp_path / "cache"))
    path = tmp_path / "model.keras"
    small_models.dense(SIDE, 1).save(path)
    first = engines.start(path).scores(radiographs())
    (cached,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(onnx_graph, "convert", lambda model: pytest.fail("converted twice"))
    assert np.array_equal(engines.start(path).scores(radiographs()).findings, first.findings)
    monkeypatch.undo()

    monkeypatch.setenv(engines.CACHE_VARIABLE, str(tmp_path / "cache"))
    cached.write_bytes(cached.read_bytes()[:-100])  # as nobody's atomic writing leaves it
    assert np.array_equal(engines.start(path).scores(radiographs()).findings, first.findings)
    for seed in range(2, 8):
        small_models.dense(SIDE, seed).save(path)
        assert not np.array_equal(engines.start(path).scores(radiographs()).findings, first.findings)
    assert len(list((tmp_path / "cache").iterdir())) == engines.CACHED


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(engines.CACHE_VARIABLE, str(tmp_path / "file"))
    path = tmp_path / "model.keras"
    small_models.dense(SIDE, 1).save(path)
    assert engines.start(path).name == "onnx"
    assert engines.start(path).scores(radiographs()).classes.shape == (5, 7)


def test_layers_without_conversion_are_left_to_keras(tmp_path):
    image = layers.Input((SIDE, SIDE, 1))
    x = layers.UpSampling2D(2)(layers.Conv2D(3, 3)(image))
    path = tmp_path / "model.keras"
    keras.Model(image, small_models.outputs(layers.GlobalMaxPooling2D()(x))).save(path)
    engine = engines.start(path)
    with pytest.raises(StudyError, match=r"model\.keras: layer .* is a UpSampling2D, which has no conv"):
        engines.start(path, "onnx")
    assert engine.name == "keras" and engine.scores(radiographs()).member_classes.shape == (5, 1, 7)
    with pytest.raises(StudyError, match="no heat-map"):
        engine.heat_maps(radiographs(), "Mass")
    with pytest.raises(StudyError, match="engine 'torch' is unknown; there are: onnx, keras"):
        engines.start(path, "torch")


def test_the_reference_agrees_on_real_radiographs(nih):
    path = engines.reference_model()
    onnx, original = engines.start(path, "onnx"), engines.start(path, "keras")
    files = sorted((nih / "images").glob("*.png"))[::200][:40]
    stack = np.stack([pixels.prepare_pixels(pixels.decode(file), onnx.side) for file in files])
    assert len(stack) == 40
    for one, other in zip(onnx.scores(stack), original.scores(stack), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_an_exported_file_gives_what_keras_gives(tmp_path):
    path, out = tmp_path / "model.keras", tmp_path / "model.onnx"
    MADE["mean"]().save(path)
    batch = radiographs()[..., None].astype(np.float32)
    expected = engines.load_keras(path).predict_on_batch(batch)
    tables.predictions_table(400, 150, decimals=6).to_csv(tmp_path / "predictions_valid.csv", index=False)
    meaning = interpretation.of_model(path)
    assert meaning.class_temperature != 1
    no_mass = tmp_path / "no mass.csv"
    no_mass.write_text("class,share\n" + "".join(f"{name},{int(name != 'Mass')}\n" for name in CLASSES))
    for given in ("equal", "nih", str(no_mass)):
        shares = posterior.read_shares(given)
        assert engines.export(out, path, shares) == out.stat().st_size
        session = onnxruntime.InferenceSession(out)
        about = session.get_modelmeta().custom_metadata_map
        assert about["prevalence"] == Path(given).name and about["calibrated"] == "on validation"
        assert [float(value) for value in about["shares"].split(",")] == shares.values.tolist()
        classes, present = session.run(["classes", "present"], {"radiograph": batch})
        due = posterior.reweighted(meaning.classes(expected["classes"]), shares)
        np.testing.assert_allclose(classes, due, atol=1e-5)
        np.testing.assert_allclose(present, meaning.probabilities(expected["findings"][:, SIX_LABELS]), atol=1e-5)
    del expected["classes"]
    assert session.get_modelmeta().custom_metadata_map["classes"].split(",") == list(CLASSES)
    assert session.get_modelmeta().custom_metadata_map["findings"].split(",") == list(ALL_LABELS)
    for name, values in expected.items():
        np.testing.assert_allclose(session.run([name], {"radiograph": batch})[0], values, atol=1e-4)


def test_an_answer_imports_neither_tensorflow_nor_tables(tmp_path):
    """From nothing: a process of its own converts the model."""
    MADE["mean"]().save(tmp_path / "model.keras")
    code = (
        f"import sys, numpy, chestxray; reader = chestxray.load({str(tmp_path / 'model.keras')!r}); "
        "answer = reader.examine(numpy.zeros((64, 64), numpy.uint8)); "
        "reader.heat_map(numpy.zeros((64, 64), numpy.uint8), 'Mass'); "
        "print(reader.engine.name, len(answer.classes), "
        "sorted({'tensorflow', 'keras', 'pandas', 'sklearn', 'scipy', 'matplotlib'} & {*sys.modules}))"
    )
    environment = os.environ | {engines.CACHE_VARIABLE: str(tmp_path / "cache")}
    for _ in ("converted", "from the cache"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=config.REPOSITORY,
        )
        assert (done.stdout, done.stderr) == ("onnx 7 []\n", "")


def test_every_augmentation_layer_is_known_to_the_converter():
    """One that isn't would cost a trained model its ONNX graph."""
    kinds = ("Flip", "Rotation", "Translation", "Zoom", "Contrast", "Brightness")  # as the notebooks use them
    assert {f"Random{kind}" for kind in kinds} <= set(onnx_graph._LAYERS)

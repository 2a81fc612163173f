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
from conftest import tiny_pixels
from keras import layers

from chestxray import config
from chestxray.config import CLASSES, StudyError
from chestxray.data import augmentation
from chestxray.images import pixels
from chestxray.inference import engines
from chestxray.networks import ensemble, onnx_graph, transfer
from chestxray.training import ensembling

SIDE = 32
LOG_ODDS = np.linspace(-2, 0, 7).astype(np.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of the tests' own."""
    folder = tmp_path_factory.getbasetemp() / "graphs"
    monkeypatch.setenv(engines.CACHE_VARIABLE, str(folder))
    return folder


def shaken(model: keras.Model, seed: int) -> keras.Model:
    """The same with weights and running statistics that no layer would have at its start."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "seed" not in weight.path:
            values = rng.normal(0, 0.3 / np.sqrt(max(1, np.prod(weight.shape[:-1]))), weight.shape)
            weight.assign(np.abs(values) + 0.5 if "variance" in weight.path else weight.numpy() + values)
    return model


def transferred(seed: int, member_size: int, blended: bool) -> keras.Model:
    given = {"weights": None, "log_odds": LOG_ODDS if blended else None}
    return shaken(transfer.transfer("EfficientNetLite0", SIDE, member_size, **given).classifier, seed)


def pooled_at_every_block() -> keras.Model:
    settings = {"weights": None, "log_odds": LOG_ODDS, "pooling": "blocks"}
    net = transfer.transfer("EfficientNetLite0", SIDE, 48, **settings)
    shaken(net.classifier, 6)
    # As in the study, what is pooled is brought to one scale: variances of shaken maps are of any size.
    layer = net.classifier.get_layer("standardised")
    layer.set_weights([np.zeros(layer.moving_mean.shape), np.ones(layer.moving_variance.shape)])
    net.standardise(np.asarray(net.features(radiographs()[..., None].astype(np.float32), training=False)))
    return net.classifier


def joined(mirrored: bool, offsets: bool, enlarged: bool = False) -> keras.Model:
    members = [transferred(1, 48, True), transferred(2, SIDE, False)]
    return ensemble.join(members, None, mirrored, np.linspace(-0.5, 0.5, 7) if offsets else None, enlarged)


def every_layer() -> keras.Model:
    """A network of the kinds of layers that the others lack, among them pooling at two scales."""
    image = layers.Input((SIDE, SIDE, 1))
    x = layers.Resizing(20, 24, antialias=True)(layers.Rescaling(1 / 127.5, -1.0)(image))
    x = layers.GaussianNoise(0.1)(layers.RandomContrast(0.1)(x))
    x = layers.Conv2D(8, 3, padding="valid", strides=2, activation="swish")(x)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)))
    y = layers.Conv2D(8, 5, padding="same", groups=2, activation="tanh")(layers.MaxPooling2D(3, 1, padding="same")(x))
    x = layers.Add()([x, layers.SpatialDropout2D(0.2)(y)])
    wide = layers.GlobalAveragePooling2D()(layers.AveragePooling2D(2)(x))
    x = layers.Concatenate()([wide, layers.Flatten()(layers.Conv2D(2, 1)(x))])
    x = layers.Dense(9, activation="relu6")(layers.Dropout(0.5)(x))
    return shaken(keras.Model(image, layers.Dense(7, activation="sigmoid")(x)), 5)


MADE = {
    "dense": lambda: shaken(transfer.dense(SIDE), 3),
    "CNN": lambda: shaken(transfer.cnn(SIDE, filters=(4, 8, 8)), 4),
    "fine tuned, another size inside": lambda: transferred(1, 48, True),
    "every layer": every_layer,
    "pooled at every block": pooled_at_every_block,
    "mean, one pooled at every block": lambda: ensemble.join([transferred(1, 48, True), pooled_at_every_block()], None),
    "mean": lambda: joined(False, False),
    "mirrored, with offsets": lambda: joined(True, True),
    "enlarged": lambda: joined(False, False, True),
    "mirrored and enlarged, with offsets": lambda: joined(True, True, True),
}


@pytest.fixture(scope="module", params=MADE)
def saved(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.keras"
    keras.utils.set_random_seed(1)
    MADE[request.param]().save(path)
    return path


def radiographs(number: int = 5, side: int = SIDE) -> np.ndarray:
    return np.stack([tiny_pixels(index, side) // (1 + index % 3) for index in range(number)])


def test_both_engines_give_the_same(saved):
    keras_engine, onnx = engines.start(saved, "keras"), engines.start(saved, "onnx")
    assert (keras_engine.name, keras_engine.side, onnx.name, onnx.side) == ("keras", SIDE, "onnx", SIDE)
    expected, found = keras_engine.scores(radiographs()), onnx.scores(radiographs())
    assert found.probabilities.std(axis=0).max() > 1e-3  # the radiographs differ
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=1e-4)
    plain = np.asarray(engines.load_keras(saved).predict_on_batch(radiographs()[..., None].astype(np.float32)))
    np.testing.assert_allclose(found.probabilities, plain, atol=1e-4)
    try:
        maps = keras_engine.heat_maps(radiographs(), 3)
    except StudyError as error:
        with pytest.raises(StudyError, match="no heat-map") as other:
            onnx.heat_maps(radiographs(), 3)
        assert str(other.value) == str(error)
    else:
        # A map's maximum is 1 however little speaks for the class, and rounding grows with it. A wrong channel or
        # member moves a map by tenths.
        np.testing.assert_allclose(onnx.heat_maps(radiographs(), 3), maps, atol=5e-3)


def test_a_members_predictions_are_the_wholes_if_all_members_agreed(tmp_path):
    alone = transferred(1, SIDE, True)
    offsets = np.linspace(-0.5, 0.5, 7)
    ensemble.join([alone, transferred(2, SIDE, False)], None, True, offsets).save(tmp_path / "model.keras")
    batch = radiographs()[..., None].astype(np.float32)
    own = (alone.predict_on_batch(batch) + alone.predict_on_batch(batch[:, :, ::-1])) / 2
    for name in engines.ENGINES:
        members = engines.start(tmp_path / "model.keras", name).scores(radiographs()).members
        np.testing.assert_allclose(members[:, 0], ensembling.shifted(own, offsets), atol=1e-4)
        assert members.shape == (5, 2, 7) and np.abs(members[:, 0] - members[:, 1]).max() > 1e-3


def test_a_graph_is_made_once_and_again_for_another_model(tmp_path, monkeypatch):
    monkeypatch.setenv(engines.CACHE_VARIABLE, str(tmp_path / "cache"))
    path = tmp_path / "model.keras"
    shaken(transfer.dense(SIDE), 1).save(path)
    first = engines.start(path).scores(radiographs())
    (cached,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(onnx_graph, "convert", lambda model: pytest.fail("converted twice"))
    assert np.array_equal(engines.start(path).scores(radiographs()).probabilities, first.probabilities)
    monkeypatch.undo()

    monkeypatch.setenv(engines.CACHE_VARIABLE, str(tmp_path / "cache"))
    cached.write_bytes(cached.read_bytes()[:-100])  # as nobody's atomic writing leaves it
    assert np.array_equal(engines.start(path).scores(radiographs()).probabilities, first.probabilities)
    for seed in range(2, 8):
        shaken(transfer.dense(SIDE), seed).save(path)
        assert not np.array_equal(engines.start(path).scores(radiographs()).probabilities, first.probabilities)
    assert len(list((tmp_path / "cache").iterdir())) == engines.CACHED


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(engines.CACHE_VARIABLE, str(tmp_path / "file"))
    path = tmp_path / "model.keras"
    shaken(transfer.dense(SIDE), 1).save(path)
    assert engines.start(path).name == "onnx"
    assert engines.start(path).scores(radiographs()).probabilities.shape == (5, 7)


def test_layers_without_conversion_are_left_to_keras(tmp_path, monkeypatch):
    image = layers.Input((SIDE, SIDE, 1))
    x = layers.UpSampling2D(2)(layers.Conv2D(3, 3)(image))
    path = tmp_path / "model.keras"
    keras.Model(image, layers.Dense(7, activation="sigmoid")(layers.GlobalMaxPooling2D()(x))).save(path)
    assert engines.start(path).name == "keras"
    with monkeypatch.context() as patched:
        patched.setattr(onnx_graph, "convert", lambda model: pytest.fail("tried again"))
        engine = engines.start(path)
    with pytest.raises(StudyError, match=r"model\.keras: layer .* is a UpSampling2D, which has no conv"):
        engines.start(path, "onnx")
    assert engine.name == "keras" and engine.scores(radiographs()).members.shape == (5, 1, 7)
    with pytest.raises(StudyError, match="no heat-map"):
        engine.heat_maps(radiographs(), 0)
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
    joined(True, True).save(path)
    batch = radiographs()[..., None].astype(np.float32)
    expected = np.asarray(engines.load_keras(path).predict_on_batch(batch))
    assert engines.export(out, path) == out.stat().st_size
    session = onnxruntime.InferenceSession(out)
    assert session.get_modelmeta().custom_metadata_map["classes"].split(",") == list(CLASSES)
    np.testing.assert_allclose(session.run(["probabilities"], {"radiograph": batch})[0], expected, atol=1e-4)


def test_an_answer_imports_neither_tensorflow_nor_tables(tmp_path):
    """From nothing: a process of its own converts the model."""
    code = (
        "import sys, numpy, chestxray; reader = chestxray.load(); "
        "answer = reader.examine(numpy.zeros((64, 64), numpy.uint8)); "
        "reader.heat_map(numpy.zeros((64, 64), numpy.uint8), 'Mass'); "
        "print(reader.engine.name, len(answer.calibrated), "
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
    assert {type(layer).__name__ for layer in augmentation.layers(1.0, 0, flip=True)} <= set(onnx_graph._LAYERS)

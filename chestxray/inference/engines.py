"""Engines: a model of the study run by onnxruntime or by Keras.

Both run the same model, `ensemble.answering`, on arrays of grey pixels. A model is converted in a process of its own:
TensorFlow takes a gigabyte that onnxruntime doesn't need.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from chestxray import config, files
from chestxray.config import ALL_LABELS, CLASSES, SIX_FINDINGS, StudyError
from chestxray.evaluation.posterior import EQUAL, Shares
from chestxray.inference import interpretation
from chestxray.networks import class_activation

if TYPE_CHECKING:
    import keras
    import onnx

ENGINES = ("onnx", "keras")

CACHE_VARIABLE = "CHESTXRAY_CACHE"
"""Environment variable that names another folder for converted graphs."""
CACHED = 4
"""Converted graphs that stay in the cache; the oldest leave first."""


class Unconvertible(StudyError):
    """A model of the study can't be turned into an ONNX graph; Keras can run it."""


class Scores(NamedTuple):
    """A model's predictions for N radiographs, float32.

    Attributes:
        findings: (N, 15), one sigmoid per label of `ALL_LABELS`.
        classes: (N, 7), the probabilities of `CLASSES`, with sum 1.
        member_findings: (N, members, 15), each member's `findings`; of a single network its own.
        member_classes: (N, members, 7), likewise.
    """

    findings: np.ndarray
    classes: np.ndarray
    member_findings: np.ndarray
    member_classes: np.ndarray


class Engine(abc.ABC):
    """A model that is ready to predict. Several threads may use it at once.

    Attributes:
        name: one of `ENGINES`.
        side: height and width of the radiographs that it takes, in pixels.
    """

    name: str
    side: int

    @abc.abstractmethod
    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of `ensemble.answering` for (N, side, side, 1) float32."""

    def scores(self, pixels: np.ndarray) -> Scores:
        """Predictions for (N, side, side) uint8."""
        found = self._run(pixels[..., np.newaxis].astype(np.float32))
        return Scores(*(found[name] for name in Scores._fields))

    def class_maps(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Each member's class maps (N, h, w, 15) float32 of (N, side, side) uint8; `StudyError` where one has none."""
        found = self._run(pixels[..., np.newaxis].astype(np.float32))
        if "maps_1" not in found:
            raise StudyError("the model has no heat-map: a network in it doesn't end in pooling and one dense layer")
        return [found[f"maps_{number}"] for number in range(1, found["member_classes"].shape[1] + 1)]

    def heat_maps(self, pixels: np.ndarray, findings: str | Sequence[str]) -> np.ndarray:
        """The model's heat-maps (N, side, side) float32, 0 to 1, each of one finding.

        Args:
            pixels: (N, side, side) uint8.
            findings: a name of `ALL_LABELS`, or N of them.

        Raises:
            StudyError: as `class_maps`.
        """
        return class_activation.scaled(class_activation.finding_maps(self.class_maps(pixels), findings, self.side))


def reference_model() -> Path:
    """The committed reference ensemble; `StudyError` where it is missing."""
    path = config.REFERENCE / "ensemble.keras"
    if not path.is_file():
        place = "/".join(path.parts[-3:])
        raise StudyError(f"{place}: the reference model is missing; restore it from the repository, or give a model")
    return path


def start(path: Path, engine: str | None = None) -> Engine:
    """Open a model of the study.

    Args:
        path: a `.keras` file of the study.
        engine: `onnx`, `keras`, or None: onnx, and keras for a model with layers that have no conversion.

    Raises:
        StudyError: as `load_keras`; the engine is unknown; or it is `onnx` and a layer has no conversion.
    """
    if engine not in (None, *ENGINES):
        raise StudyError(f"engine {engine!r} is unknown; there are: {', '.join(ENGINES)}")
    if engine != "keras":
        with contextlib.suppress(Exception):  # a cache that fails must only cost time, whatever is wrong with it
            return OnnxEngine(_cached(path))
        try:
            graph = _converted(path)
        except Unconvertible:
            if engine == "onnx":
                raise
        else:
            with contextlib.suppress(StudyError, OSError):
                files.atomic_write(place := _cached(path), graph)
                for old in sorted(place.parent.glob("*.onnx"), key=lambda file: file.stat().st_mtime)[:-CACHED]:
                    old.unlink(missing_ok=True)
            return OnnxEngine(graph)
    return KerasEngine(load_keras(path))


def _cached(path: Path) -> Path:
    """Where the converted graph of a model lies: named by what the model is, and by what converts it."""
    digest = hashlib.sha256(path.read_bytes())
    for module in ("onnx_graph.py", "ensemble.py", "class_activation.py"):
        digest.update(Path(__file__).parents[1].joinpath("networks", module).read_bytes())
    folder = os.environ.get(CACHE_VARIABLE)
    if not folder:
        import platformdirs

        folder = platformdirs.user_cache_path("chestxray", appauthor=False)
    return Path(folder) / f"{digest.hexdigest()}.onnx"


def _converted(path: Path) -> bytes:
    """The graph of a model file, made in another process unless Keras is imported in this one already."""
    if "keras" in sys.modules:
        return convert(path).SerializeToString()
    code = (
        "import sys, pathlib; from chestxray.inference import engines; out, model = map(pathlib.Path, sys.argv[1:]); "
        "out.write_bytes(engines.convert(model).SerializeToString())"
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.onnx"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", code, str(out), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            *_, reason = f"{path}: its conversion was stopped\n{done.stderr}".strip().splitlines()
            if reason != (line := reason.removeprefix("chestxray.config.StudyError: ")):
                raise StudyError(line)
            raise Unconvertible(reason.removeprefix(f"{__name__}.Unconvertible: "))
        return out.read_bytes()


def convert(path: Path) -> onnx.ModelProto:
    """A model file of the study as an ONNX graph of `ensemble.answering`; `StudyError` where a layer can't be."""
    from chestxray.networks import ensemble, onnx_graph

    try:
        return onnx_graph.convert(ensemble.answering(load_keras(path)))
    except onnx_graph.UnknownLayer as error:
        raise Unconvertible(f"{path}: {error}") from error


def export(out: Path, model: Path | None = None, shares: Shares = EQUAL) -> int:
    """Write a model as one ONNX file for other programs; returns its size in bytes.

    Beside the outputs of `ensemble.answering` it gives `present` (N, 6), the findings calibrated, and its `classes`
    (N, 7) are so too, at the given shares.

    Args:
        out: the file to write.
        model: a `.keras` file of the study; the reference ensemble if None.
        shares: of the classes.

    Raises:
        StudyError: as `convert`, what the model is calibrated by is damaged, or `out` cannot be written.
    """
    meaning = interpretation.of_model(model) if model else interpretation.of_reference()
    made = convert(model or reference_model())
    from onnx import helper

    from chestxray.networks import onnx_graph

    onnx_graph.calibrate(made, meaning.class_temperature, shares.values, meaning.temperatures, meaning.biases)
    named = {
        "prevalence": shares.name,
        "shares": ",".join(map(str, shares.values.tolist())),
        "present": ",".join(SIX_FINDINGS),
        "present is": "the probability of each finding, alone or with others; not re-weighted by the shares",
        "calibrated": "on validation" if meaning.calibrated else "no",
    }
    helper.set_model_props(made, {prop.key: prop.value for prop in made.metadata_props} | named)
    data = made.SerializeToString()
    files.atomic_write(out, data)
    return len(data)


class OnnxEngine(Engine):
    """A converted model, run by onnxruntime."""

    name = "onnx"

    def __init__(self, graph: bytes | Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Threads that wait by spinning take time from those that read files, and from everything else on the machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        given = str(graph) if isinstance(graph, Path) else graph
        self._session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.side = int(self._session.get_inputs()[0].shape[1])

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(self._outputs, {"radiograph": images}), strict=True))


class KerasEngine(Engine):
    """A model run by Keras."""

    name = "keras"

    def __init__(self, model: keras.Model) -> None:
        from chestxray.networks import ensemble

        self._model = ensemble.answering(model)
        self.side = int(model.input_shape[1])

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(values) for name, values in self._model.predict_on_batch(images).items()}


def load_keras(path: Path) -> keras.Model:
    """Load a model of the study with Keras; `StudyError` where the file is missing or none of this study's."""
    if not path.is_file():
        raise StudyError(f"{path}: there is no such model; give a model.keras that the study saved")
    import keras

    try:
        model = keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras, zipfile, h5py and json each raise their own for a wrong or damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise StudyError(f"{path}: no Keras model ({reason}); give a model.keras that the study saved") from error
    takes, gives = model.input_shape, keras.tree.map_structure(lambda tensor: tensor.shape, model.output)
    if not (isinstance(takes, tuple) and len(takes) == 4 and takes[1] and takes[1] == takes[2] and takes[3] == 1):
        raise StudyError(f"{path}: takes {takes}, not grey squares (None, side, side, 1); give a model of this study")
    if gives != {"findings": (None, len(ALL_LABELS)), "classes": (None, len(CLASSES))}:
        raise StudyError(
            f"{path}: gives {gives}, not findings (None, {len(ALL_LABELS)}) and classes (None, {len(CLASSES)}); give a "
            "model of this study, or train it anew"
        )
    return model

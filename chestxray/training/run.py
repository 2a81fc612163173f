"""Runs: the phases of one model's fit, and the model folder that they leave.

The folder holds `model.keras`, `history.csv`, `predictions_valid.csv`, `predictions_test.csv`, `run.json` and a
checkpoint of each phase. An interrupted run goes on at the last whole epoch; a finished one is loaded. Test images are
read once, after the last choice is made.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from chestxray import files
from chestxray.config import PRESENT, SIX_LABELS, Study, StudyError
from chestxray.data import manifest
from chestxray.evaluation.metrics import mean_auroc
from chestxray.evaluation.predictions import prediction_table
from chestxray.networks.layers import flattened
from chestxray.training import callbacks
from chestxray.training.callbacks import HISTORY_COLUMNS, Checkpoint
from chestxray.training.model_file import save_model
from chestxray.training.samples import Samples, batches, finding_targets, load_findings, predict

_VERSIONED = ("tensorflow", "keras", "numpy", "pandas", "scikit-learn", "pillow")


def start(study: Study) -> None:
    """Seed Python, NumPy and Keras, so that layers made after this call have the same initial weights.

    Where the profile asks for it and a GPU is present, layers made after this call compute in float16 with float32
    weights (Micikevicius et al., ICLR 2018). Where there are several GPUs, layers made after this call are mirrored on
    each, and every batch is divided among them. Keras's seed generators give each GPU the same numbers: the first image
    of each part of a batch is augmented in the same way, and so on.
    """
    keras.utils.clear_session()
    # A global strategy rather than a scope: a notebook's cell that builds a model then needs no `with`. It belongs to
    # the session that was cleared, so it is set again for every fit.
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) > 1:
        tf.distribute.experimental_set_strategy(_mirrored(tuple(device.name for device in devices)))
    keras.utils.set_random_seed(study.seed)
    mixed = study.profile.mixed_precision and bool(tf.config.list_physical_devices("GPU"))
    keras.config.set_dtype_policy("mixed_float16" if mixed else "float32")


@functools.cache
def _mirrored(devices: tuple[str, ...]) -> tf.distribute.Strategy:
    """One strategy for the whole process: models of two could not be joined."""
    return tf.distribute.MirroredStrategy(list(devices))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a number may depend on."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _VERSIONED}}


def describe_run(study: Study) -> str:
    """Data, profile, seed, device and versions in four lines, for the top of a notebook."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        device = f"{len(gpus)} GPU(s)"
    elif study.profile.name == "gpu":
        device = (
            "no GPU found: the gpu profile would take days on a CPU. On Colab choose Runtime > Change runtime type > "
            "GPU; elsewhere set profile = 'cpu'"
        )
    else:
        device = f"CPU, {os.cpu_count()} cores; no GPU is needed for the {study.profile.name} profile"
    listed = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"data     {study.data_note}, fingerprint {manifest.fingerprint(study.paths)}\n"
        f"profile  {study.profile.name}, seed {study.seed}\n"
        f"device   {device}\n"
        f"versions {listed}"
    )


@dataclass(frozen=True)
class Phase:
    """What one `model.fit` is given, at its start or where an interrupted one goes on.

    Attributes:
        batches: endless batches of (x, y), from the first one that is left.
        steps: batches per epoch.
        epochs: of the whole phase.
        first: epochs that are done already.
        callbacks: of `callbacks.callbacks`, in their order.
    """

    batches: tf.data.Dataset
    steps: int
    epochs: int
    first: int
    callbacks: list[keras.callbacks.Callback]


class Run:
    """One model's fit, from its parameters to its folder.

    A phase with the layers, weights at its start, optimizer, loss, parameters, seed and data of one that is done is not
    fitted again: its weights are loaded.
    """

    def __init__(self, study: Study, name: str, parameters: dict[str, Any]) -> None:
        """Seed Keras and open the model folder: build the model after this.

        Args:
            study: the study.
            name: the folder under `4_models/saved/<dataset>/`.
            parameters: what defines this run beside model, optimizer and epochs; JSON values.
        """
        self.study, self.name = study, name
        self.folder = study.paths.saved(name)
        self.parameters = {"profile": study.profile.name, **parameters}
        self.data = manifest.prepared_fingerprint(study.paths)
        self._phases: dict[str, dict[str, Any]] = {}
        self._checkpoints: dict[str, Checkpoint] = {}
        start(study)

    def steps(self, train: Samples) -> int:
        """Batches per epoch: a pass over the samples, or fewer where the profile shortens its epochs.

        Args:
            train: the training samples.

        Raises:
            StudyError: there are fewer samples than one batch.
        """
        profile = self.study.profile
        steps = len(train) // profile.batch_size
        if not steps:
            raise StudyError(
                f"{len(train)} training samples are fewer than one batch of {profile.batch_size}; lower batch_size "
                "or add images"
            )
        return min(steps, profile.steps_per_epoch or steps)

    def phase(self, name: str, model: keras.Model, train: Samples, valid: Samples, epochs: int) -> Phase:
        """Prepare one `model.fit`: a checkpoint of the same phase is restored into the model and its optimizer.

        A fit ends with the weights of its best epoch, by the mean validation AUROC of the six findings. One that is
        killed goes on at the last whole epoch, and on a CPU ends with the same weights. Where a notebook's cell is run
        again, the phase begins again from the weights of the first time.

        Args:
            name: of the phase in the history: `head`, `fine_tune`, `fit`.
            model: compiled, with outputs (N, 15).
            train: samples with targets (N, 15).
            valid: samples of other patients, with targets (N, 15).
            epochs: of the whole phase.

        Raises:
            StudyError: fewer samples than one batch, a model with other outputs, or a damaged checkpoint.
        """
        steps, seed = self.steps(train), self.study.seed
        if getattr(model, "output_shape", None) != (None, train.y.shape[1]):
            raise StudyError(
                f"phase {name!r}: the model's output is no {train.y.shape[1]} findings; run the cells from the first on"
            )
        if name in self._phases:  # its cell is run again: what followed it is void
            self._checkpoints[name].rewind(model)
            before = [*self._phases][: [*self._phases].index(name)]
            self._phases = {phase: self._phases[phase] for phase in before}
            self._checkpoints = {phase: self._checkpoints[phase] for phase in before}
        phase = {
            "layers": _digest([(layer.compute_dtype, _unnamed(layer.get_config())) for layer in flattened(model)]),
            "start": _digest(*model.get_weights()),
            "compiled": _unnamed(model.get_compile_config()),
            "samples": len(train),
            "data": _digest(train.y, train.x[train.rows[:: len(train) // 64 + 1]]),
            "batch_size": self.study.profile.batch_size,
            "steps": steps,
            "epochs": epochs,
        }
        files.make_folder(self.folder)
        number = len(self._phases) + 1
        path = self.folder / f"checkpoint-{number}-{name}.npz"
        checkpoint = Checkpoint(model, path, self._key(self._phases | {name: phase}), name, epochs)
        self._phases[name] = phase
        if not checkpoint.epoch:
            (self.folder / "run.json").unlink(missing_ok=True)
        self._checkpoints[name] = checkpoint
        listed = callbacks.callbacks(checkpoint, valid, seed, steps, self.folder / "logs" / f"{number}-{name}")
        left = batches(train, self.study.profile.batch_size, seed, checkpoint.epoch * steps)
        return Phase(left, steps, epochs, checkpoint.epoch, listed)

    @property
    def history(self) -> pd.DataFrame:
        """All phases so far, one row per epoch: `HISTORY_COLUMNS`."""
        rows = [row for checkpoint in self._checkpoints.values() for row in checkpoint.history]
        return pd.DataFrame(rows, columns=HISTORY_COLUMNS)

    def finish(
        self, model: keras.Model, valid: pd.DataFrame | None = None, extra: dict[str, Any] | None = None
    ) -> keras.Model:
        """Save the model, its history and its predictions on valid and test; `run.json` is written last.

        Args:
            model: radiographs (N, H, W, 1) in 0–255 to `findings` (N, 15) and `classes` (N, 7).
            valid: the prediction table for validation where a part of the model was fitted on these patients: its
                out-of-fold predictions. None lets the model predict them.
            extra: further entries for `run.json`.

        Returns:
            The saved model, loaded from its file.

        Raises:
            StudyError: a phase was interrupted; or none was fitted here, and the folder holds those of another fit.
        """
        for name, checkpoint in self._checkpoints.items():
            if checkpoint.epoch < checkpoint.epochs:
                done = f"ended after epoch {checkpoint.epoch} of {checkpoint.epochs}"
                raise StudyError(f"{checkpoint.path}: phase {name!r} {done}; run its cell again")
        kept = {checkpoint.path for checkpoint in self._checkpoints.values()}
        others = {*self.folder.glob("checkpoint-*.npz")} - kept
        if others and not kept:
            raise StudyError(f"{self.folder}: holds a fit, and nothing was fitted here; run the cells that fit first")
        (self.folder / "run.json").unlink(missing_ok=True)
        save_model(model, self.folder / "model.keras")
        write_csv(self.history, self.folder / "history.csv")
        saved = keras.models.load_model(self.folder / "model.keras", compile=False)
        valid = self._predictions(saved, "valid") if valid is None else valid
        write_csv(valid, self.folder / "predictions_valid.csv")
        write_csv(self._predictions(saved, "test"), self.folder / "predictions_test.csv")
        self._write_run(model.count_params(), valid, extra)
        for path in others:
            path.unlink()  # of phases that the run no longer has
        return saved

    def _predictions(self, model: keras.Model, split: str) -> pd.DataFrame:
        everyone = load_findings(self.study, split)
        return prediction_table(everyone.table, predict(model, everyone))

    def _write_run(self, weights: int, valid: pd.DataFrame, extra: dict[str, Any] | None) -> None:
        """Write the last file of a model folder; with it the folder is finished."""
        score = mean_auroc(finding_targets(valid["findings"])[:, SIX_LABELS], valid[list(PRESENT)].to_numpy())
        record = {
            "model": self.name,
            "dataset": self.study.paths.dataset,
            "parameters": self.parameters,
            "phases": self._phases,
            "seed": self.study.seed,
            "versions": versions(),
            "data_fingerprint": manifest.fingerprint(self.study.paths),
            "prepared_fingerprint": self.data,
            "key": self._key(self._phases),
            "weights": weights,
            "seconds": round(self.history["seconds"].sum(), 1),
            "best_epoch": {name: checkpoint.best_epoch for name, checkpoint in self._checkpoints.items()},
            "valid_six_finding_auroc": round(score, 6),
            **(extra or {}),
        }
        files.atomic_write(self.folder / "run.json", (json.dumps(record, indent=2, default=str) + "\n").encode())

    def _key(self, phases: dict[str, dict[str, Any]]) -> str:
        return _digest([self.parameters, phases, self.study.seed, self.data])


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table; the file is complete or absent.

    Args:
        table: the table; its index is left out.
        path: the CSV file.

    Raises:
        StudyError: the file system refuses.
    """
    files.atomic_write(path, table.to_csv(index=False, quoting=csv.QUOTE_MINIMAL, lineterminator="\n").encode())


def _unnamed(config: Any) -> Any:
    """A layer's or an optimizer's configuration without names and seeds, which differ between runs of a cell."""
    if isinstance(config, dict):
        return {key: _unnamed(value) for key, value in config.items() if key not in ("name", "seed")}
    return [_unnamed(value) for value in config] if isinstance(config, list | tuple) else config


def _digest(*values: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of arrays, or of what JSON can hold."""
    sha = hashlib.sha256()
    for value in values:
        array = isinstance(value, np.ndarray)
        sha.update(value.tobytes() if array else json.dumps(value, sort_keys=True, default=str).encode())
    return sha.hexdigest()[:16]

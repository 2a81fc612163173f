"""Callbacks: validation, checkpoint, log and progress of one `model.fit`, and how a killed one goes on.

Keras's own are used where they keep the promise that a killed fit, on a CPU, ends with the weights of an unbroken one.
`BackupAndRestore` and `ModelCheckpoint` don't: they write weights and epoch one after the other and forget the best
score. So one file holds weights, optimizer, epoch, best weights and history; it is written beside and renamed.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from tqdm import tqdm

from chestxray import files
from chestxray.config import SIX_LABELS, StudyError
from chestxray.evaluation.metrics import mean_auroc
from chestxray.training.samples import Samples, compiled, predict

HISTORY_COLUMNS = ["phase", "epoch", "loss", "val_loss", "val_six_finding_auroc", "learning_rate", "seconds"]
"""Of `history.csv`, one row per epoch."""
MONITORED = "val_six_finding_auroc"


class Seed(keras.callbacks.Callback):
    """Sets the state of every seed generator at the start of an epoch, from the seed and the epoch alone.

    Augmentation, dropout and stochastic depth then draw the same numbers in an epoch whether or not the fit was
    interrupted before it. Keras saves no such state with the weights.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        states = [variable for variable in self.model.variables if variable.name == "seed_generator_state"]
        words = np.random.SeedSequence([self.seed, epoch]).generate_state(len(states)) >> 1
        for state, word in zip(states, words, strict=True):
            state.assign([word, 0])


class Validate(keras.callbacks.Callback):
    """Adds `val_loss` and `val_six_finding_auroc`, over all validation radiographs, to an epoch's logs.

    Keras's `AUC` metric is an approximation over thresholds, and the study's score is of six labels of fifteen.
    """

    def __init__(self, valid: Samples) -> None:
        super().__init__()
        self.valid, self.forward = valid, None

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.forward = self.forward or compiled(self.model)
        scores, y = predict(self.forward, self.valid), self.valid.y
        logs["val_loss"] = float(np.mean(keras.losses.binary_crossentropy(y, scores)))
        logs[MONITORED] = (
            mean_auroc(y[:, SIX_LABELS], scores[:, SIX_LABELS]) if np.isfinite(scores).all() else float("nan")
        )


class Checkpoint(keras.callbacks.Callback):
    """Writes after each epoch what the next one depends on; the fit ends with the weights of its best epoch.

    Attributes:
        history: one row per epoch, `HISTORY_COLUMNS`.
        epoch: finished epochs; `fit` has to begin at this one.
        best_epoch: the epoch with the highest `val_six_finding_auroc`, from 1; 0 before the first.
        best_score: its score.
        best: its weights; those at the start before the first epoch.
    """

    def __init__(self, model: keras.Model, path: Path, key: str, phase: str, epochs: int) -> None:
        """Restore the model and its optimizer where the file holds the same fit.

        Args:
            model: a compiled model.
            path: of the file, `.npz`.
            key: a digest of the fit; a file with another key is not used.
            phase: name in the history.
            epochs: of the whole fit.

        Raises:
            StudyError: the file is damaged.
        """
        super().__init__()
        self.path, self.key, self.phase, self.epochs = path, key, phase, epochs
        self.history: list[dict[str, Any]] = []
        self.epoch = self.best_epoch = 0
        self.best_score = -np.inf
        self.start = self.best = [v.numpy() for v in _weights(model)]
        self.set_model(model)
        model.optimizer.build(model.trainable_variables)
        files.remove_leftovers(path)
        if stored := _stored(path, key):
            vars(self).update(stored["progress"])
            self.best = stored["best"]
            _assign(_weights(model), stored["model"] or self.best)
            _assign(model.optimizer.variables, stored["optimizer"] or model.optimizer.variables)
        self.began = time.perf_counter()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        weights = [v.numpy() for v in _weights(self.model)]
        if not np.isfinite(logs["loss"]) or not all(np.isfinite(w).all() for w in weights):
            kept = f"{self.path.name} keeps epoch {self.epoch}" if self.epoch else "nothing was saved"
            _assign(_weights(self.model), self.best)
            raise StudyError(
                f"phase {self.phase!r}, epoch {epoch + 1}: the loss or a weight is no longer finite; {kept}. "
                "Lower the learning rate, of the notebook or by --set learning_rate, and run again"
            )
        if not logs[MONITORED] <= self.best_score:  # without a score, NaN, it is the last epoch
            self.best_epoch, self.best_score, self.best = epoch + 1, logs[MONITORED], weights
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        row = {"phase": self.phase, "epoch": epoch + 1, **logs, "learning_rate": rate}
        self.history.append({**row, "seconds": time.perf_counter() - self.began})
        self.epoch = epoch + 1
        done = self.epoch == self.epochs
        self._write(
            {} if done else {"model": weights, "optimizer": [v.numpy() for v in self.model.optimizer.variables]}
        )

    def _write(self, further: dict[str, list[np.ndarray]]) -> None:
        names = ("key", "history", "epoch", "best_epoch", "best_score")
        progress = json.dumps({name: getattr(self, name) for name in names}).encode()
        groups = {"best": self.best, **further}
        arrays = {f"{name}-{i}": value for name, values in groups.items() for i, value in enumerate(values)}
        with files.atomic_file(self.path) as file:
            np.savez(file, progress=np.frombuffer(progress, np.uint8), **arrays)

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        _assign(_weights(self.model), self.best)

    def rewind(self, model: keras.Model) -> None:
        """Give the model the weights that it had before this fit, unless it is another model."""
        if model is self.model:
            _assign(_weights(model), self.start)


class Progress(keras.callbacks.Callback):
    """Prints one line per epoch with the time left, those of an interrupted fit first, and a bar in a terminal."""

    def __init__(self, checkpoint: Checkpoint, steps: int) -> None:
        super().__init__()
        self.checkpoint, self.steps = checkpoint, steps

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        for row in self.checkpoint.history:
            print(self._line(row))
        if 0 < self.checkpoint.epoch < self.checkpoint.epochs:
            print(f"{self.checkpoint.phase}: going on after epoch {self.checkpoint.epoch}", flush=True)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        self.bar = tqdm(total=self.steps, desc=f"epoch {epoch + 1}", unit="step", leave=False, disable=None)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        self.bar.update(batch + 1 - self.bar.n)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        self.bar.close()
        row = self.checkpoint.history[-1]
        left = row["seconds"] * (self.checkpoint.epochs - epoch - 1) / 60
        tqdm.write(f"{self._line(row)}, {left:.1f} min left")

    def _line(self, row: Mapping[str, Any]) -> str:
        return (
            f"{row['phase']:>10} {row['epoch']:>3}/{self.checkpoint.epochs}  loss {row['loss']:.4f}  valid loss "
            f"{row['val_loss']:.4f}  valid AUROC of six findings {row[MONITORED]:.4f}  {row['seconds']:.0f} s"
        )


def callbacks(
    checkpoint: Checkpoint, valid: Samples, seed: int, steps: int, log: Path
) -> list[keras.callbacks.Callback]:
    """The callbacks of one `model.fit`, in the order in which they must stand.

    `TerminateOnNaN` ends an epoch at once, which `Checkpoint` then refuses; `Validate` adds the score that `Checkpoint`
    and the log read; `Progress` prints what `Checkpoint` has written.

    Args:
        checkpoint: of this fit.
        valid: radiographs of other patients, with `ALL_LABELS` as targets (N, 15).
        seed: of augmentation and dropout.
        steps: batches per epoch.
        log: folder for TensorBoard, written where that package is installed.
    """
    board = []
    if importlib.util.find_spec("tensorboard"):
        if not checkpoint.epoch:
            shutil.rmtree(log, ignore_errors=True)
        board = [keras.callbacks.TensorBoard(log, write_graph=False)]
    stop = keras.callbacks.TerminateOnNaN()
    return [Seed(seed), stop, Validate(valid), checkpoint, *board, Progress(checkpoint, steps)]


def _weights(model: keras.Model) -> list[keras.Variable]:
    """Weights and BatchNorm's statistics, without the state of seed generators."""
    return [v for v in model.weights if v.name != "seed_generator_state"]


def _assign(variables: list[keras.Variable], values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _stored(path: Path, key: str) -> dict[str, Any]:
    """What a checkpoint of this key holds; empty where there is none. `StudyError` where it is damaged."""
    if not path.exists():
        return {}
    try:
        with np.load(path) as file:
            progress = json.loads(file["progress"].tobytes())
            if progress.pop("key", None) != key:
                return {}
            return {"progress": progress, **{name: _group(file, name) for name in ("best", "model", "optimizer")}}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise StudyError(f"{path}: damaged checkpoint ({type(error).__name__}); delete it and run again") from error


def _group(stored: Mapping[str, np.ndarray], name: str) -> list[np.ndarray]:
    count = sum(key.startswith(f"{name}-") for key in stored)
    return [stored[f"{name}-{i}"] for i in range(count)]

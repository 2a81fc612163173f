"""Runs: the stages of one model's fit, and the model folder that they leave.

The folder holds `model.keras`, `history.csv`, `predictions_valid.csv`, `predictions_test.csv`, `run.json` and `logs/`.
An interrupted run resumes where it stopped; a finished one is loaded. Test images are read once, after the last choice
is made. How one stage is fitted is in `fitting`.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from chestxray import files
from chestxray.config import CLASSES, Study, StudyError
from chestxray.data import manifest
from chestxray.evaluation.metrics import mean_auroc
from chestxray.evaluation.predictions import prediction_table
from chestxray.training import fitting
from chestxray.training.fitting import HISTORY_COLUMNS, compiled, predict_batches
from chestxray.training.model_file import save_model
from chestxray.training.recipe import Recipe
from chestxray.training.samples import Samples, Views, class_targets, epoch_order, load_split

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


class Run:
    """One model's fit, from its parameters to its folder.

    A folder whose `run.json` has the same parameters, architecture and prepared data is finished: `fit` then returns
    the stored history and `finish` the stored model, and nothing is trained again.
    """

    def __init__(
        self, study: Study, name: str, parameters: dict[str, Any], checkpoint_steps: int | None = None
    ) -> None:
        """Open the model folder and seed Keras: build the model after this.

        Args:
            study: the study.
            name: the folder under `4_models/saved/<dataset>/`.
            parameters: what defines this run beside the recipes; JSON values.
            checkpoint_steps: steps between two checkpoints within an epoch; None writes one every few minutes.
        """
        self.study = study
        self.name = name
        self.folder = study.paths.saved(name)
        self.checkpoint_steps = checkpoint_steps
        self.parameters = {"profile": study.profile.name, **parameters}
        self.data = manifest.prepared_fingerprint(study.paths)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.best: dict[str, tuple[int, float]] = {}
        self._stages: list[dict[str, Any]] = []
        self._skipped: list[Callable[[], pd.DataFrame]] = []
        # A folder that `reference.restore` laid out has predictions, but not always the model.
        finished = self.folder / "run.json"
        is_finished = all((self.folder / name).exists() for name in ("run.json", "model.keras", "history.csv"))
        self._finished: dict[str, Any] | None = json.loads(finished.read_text()) if is_finished else None
        start(study)

    def fit(
        self,
        model: keras.Model,
        recipe: Recipe,
        train: Samples,
        valid: Samples,
        keep_start: bool = False,
        judged_on: Samples | None = None,
    ) -> pd.DataFrame:
        """Fit the model's trainable layers; it ends with the weights of its best epoch.

        The best epoch has the highest validation macro-AUROC: of the seven classes, or with `ALL_LABELS` as targets of
        the six findings; or that of `judged_on`. A checkpoint is written every few minutes and after every epoch; when
        the same fit is started again it resumes at that step, and on a CPU ends with the same weights.

        Args:
            model: a built model with outputs (N, K) matching the targets.
            recipe: the hyperparameters.
            train: samples with targets (N, K).
            valid: samples of other patients, with targets (N, K).
            keep_start: choose among the initial weights too, as epoch 0.
            judged_on: samples whose macro-AUROC chooses the epoch in place of `valid`'s; targets (N, K), where a sample
                may have several of the K classes.

        Returns:
            The stage's history, one row per epoch (`HISTORY_COLUMNS`).

        Raises:
            StudyError: the loss became NaN or infinite. The checkpoint holds the last finite weights and the model has
                its initial ones again.
        """
        return self._stage(model, recipe, len(train), lambda: (train, valid), keep_start, judged_on)

    def fit_head(
        self,
        features: keras.Model,
        head: keras.Model,
        recipe: Recipe,
        train: Samples,
        valid: Samples,
        augment: Sequence[keras.Layer] = (),
        views: int = 1,
    ) -> pd.DataFrame:
        """Fit the last layers of a network on cached outputs of its frozen first layers.

        These cost `views` passes over the data, however many the epochs. Feature maps are cached in memory as float16,
        and mixup then mixes them rather than pixels (Verma et al., Manifold mixup, ICML 2019).

        Args:
            features: the frozen layers: radiographs (N, H, W, 1) to pooled features (N, C) or maps (N, h, w, C).
            head: the layers to fit: those to (N, K).
            recipe: as in `fit`.
            train: radiographs with targets (N, K).
            valid: radiographs of other patients, with targets (N, K).
            augment: augmentation layers before `features`, for the training radiographs.
            views: how many augmented versions of each are cached, 1 or more; an epoch draws one of them.

        Returns:
            The stage's history, as in `fit`.
        """

        def samples() -> tuple[Samples, ...]:
            plain = compiled(features)
            augmented = _augmented(features, augment) if augment else plain
            cached = _as_features(augmented, train, views), _as_features(plain, valid)
            if recipe.batch_norm != "reestimate":
                return cached
            order = epoch_order(train.y, self.study.seed, 0)[: fitting.REESTIMATE_STEPS * recipe.batch_size]
            return *cached, _as_features(plain, train.take(np.sort(order)))

        # A step on pooled features costs less than Keras's overhead.
        at_once = fitting.LOG_STEPS if len(head.input_shape) == 2 else 1
        return self._stage(head, recipe, len(train), samples, views=views, steps_at_once=at_once)

    def _stage(
        self,
        model: keras.Model,
        recipe: Recipe,
        count: int,
        samples: Callable[[], tuple[Samples, ...]],
        keep_start: bool = False,
        judged_on: Samples | None = None,
        views: int = 1,
        steps_at_once: int = 1,
    ) -> pd.DataFrame:
        """Fit one stage, or take its history from the finished run if that has the same stages so far."""
        described = {**recipe.describe(), "model": _architecture(model), "samples": count}
        judges = 0 if judged_on is None else len(judged_on)
        chosen = {"keep_start": keep_start, "judged_on": judges, "views": views if views > 1 else 0}
        self._stages.append(described | {name: value for name, value in chosen.items() if value})
        number = len(self._stages)
        paths = fitting.StagePaths(
            self.folder / f"checkpoint-{number}-{recipe.name}.npz",
            self.folder / "logs" / f"{number}-{recipe.name}",
            self._key(),
            self.checkpoint_steps,
        )

        def fit() -> pd.DataFrame:
            write, seed = self._write_history, self.study.seed
            stage = fitting.Fit(model, recipe, count, samples, seed, paths, write, judged_on, steps_at_once)
            files.make_folder(self.folder)
            (self.folder / "run.json").unlink(missing_ok=True)
            self._finished = None
            rows = stage.run(keep_start)
            self.history += rows
            self.best[recipe.name] = (stage.best_epoch, stage.best_score)
            self.seconds += sum(row["seconds"] for row in rows)
            return pd.DataFrame(rows, columns=HISTORY_COLUMNS)

        if not self._is_finished(number):
            self._fit_skipped()
            try:
                return fit()
            except StudyError:
                # A notebook may call again with another recipe.
                del self._stages[number - 1 :]
                raise
        self._skipped.append(fit)
        history = pd.read_csv(self.folder / "history.csv")
        rows = history[history["stage"] == recipe.name].reset_index(drop=True)
        for row in rows.to_dict("records"):
            print(fitting.epoch_line(row, recipe.epochs))
        self.history += rows.to_dict("records")
        return rows

    def _fit_skipped(self) -> None:
        """Fit the stages whose histories were taken from the folder, since this run differs from the finished one."""
        if self._skipped:
            print("A later stage differs from the finished run: the stages above are fitted anew.")
            skipped, self._skipped, self.history = self._skipped, [], []
            for fit in skipped:
                fit()

    def _write_history(self, running: list[dict[str, Any]]) -> None:
        """Write `history.csv`, with the rows of the running stage."""
        write_csv(pd.DataFrame([*self.history, *running], columns=HISTORY_COLUMNS), self.folder / "history.csv")

    def note(self, history: pd.DataFrame) -> None:
        """Add the history of a fit done elsewhere, such as the mean over folds of an ensemble's head."""
        self.history += history.reindex(columns=HISTORY_COLUMNS).to_dict("records")

    def finish(
        self, model: keras.Model, valid: pd.DataFrame | None = None, extra: dict[str, Any] | None = None
    ) -> keras.Model:
        """Save the model, its history and its predictions on valid and test; `run.json` is written last.

        Args:
            model: radiographs (N, H, W, 1) in 0–255 to seven probabilities.
            valid: the prediction table for validation where the model was fitted on these patients: the out-of-fold
                predictions of an ensemble's head. None lets the model predict them.
            extra: further entries for `run.json`.

        Returns:
            The saved model, loaded from its file.
        """
        if self._skipped and len(self._skipped) == len(self._finished["stages"]):
            folder = self.study.paths.relative(self.folder)
            print(f"Trained before from the same parameters and data: loaded from {folder}.")
            return keras.models.load_model(self.folder / "model.keras", compile=False)
        self._fit_skipped()
        save_model(model, self.folder / "model.keras")
        self._write_history([])
        saved = keras.models.load_model(self.folder / "model.keras", compile=False)
        if valid is None:
            valid = predict(saved, load_split(self.study, "valid", selected=False))
        write_csv(valid, self.folder / "predictions_valid.csv")
        test = predict(saved, load_split(self.study, "test", selected=False))
        write_csv(test, self.folder / "predictions_test.csv")
        self._write_run(model.count_params(), valid, extra)
        for checkpoint in self.folder.glob("checkpoint-*.npz"):
            checkpoint.unlink()
        files.keep_only(self.folder / "logs", {f"{i}-{stage['name']}" for i, stage in enumerate(self._stages, 1)})
        return saved

    def _write_run(self, weights: int, valid: pd.DataFrame, extra: dict[str, Any] | None) -> None:
        """Write the last file of a model folder; with it the folder is finished."""
        single = valid[valid["selected"]]
        record = {
            "model": self.name,
            "dataset": self.study.paths.dataset,
            "parameters": self.parameters,
            "stages": self._stages,
            "seed": self.study.seed,
            "versions": versions(),
            "data_fingerprint": manifest.fingerprint(self.study.paths),
            "prepared_fingerprint": self.data,
            "key": self._key(),
            "weights": weights,
            "seconds": round(self.seconds, 1),
            "epochs": len(self.history),
            "best_epoch": {stage: epoch for stage, (epoch, _) in self.best.items()},
            "valid_macro_auroc": round(mean_auroc(class_targets(single["label"]), single[list(CLASSES)].to_numpy()), 6),
            **(extra or {}),
        }
        files.atomic_write(self.folder / "run.json", (json.dumps(record, indent=2) + "\n").encode())

    def _key(self) -> str:
        described = {"p": self.parameters, "s": self._stages, "seed": self.study.seed, "data": self.data}
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _is_finished(self, stages: int) -> bool:
        """Whether the stored run has the same parameters, seed and data, and the same first stages."""
        stored = self._finished
        return (
            stored is not None
            and (stored["parameters"], stored["seed"], stored.get("prepared_fingerprint"))
            == (json.loads(json.dumps(self.parameters)), self.study.seed, self.data)
            and stored["stages"][:stages] == json.loads(json.dumps(self._stages))
        )


def predict(model: keras.Model, samples: Samples) -> pd.DataFrame:
    """The prediction table of one split.

    Args:
        model: radiographs (N, H, W, 1) in 0–255 to seven probabilities.
        samples: N radiographs.

    Returns:
        N rows: the columns `predictions.PREDICTION_COLUMNS`, and one column per class.
    """
    return prediction_table(samples.table, predict_batches(model, samples))


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table; the file is complete or absent.

    Args:
        table: the table; its index is left out.
        path: the CSV file.

    Raises:
        StudyError: the file system refuses.
    """
    files.atomic_write(path, table.to_csv(index=False, quoting=csv.QUOTE_MINIMAL, lineterminator="\n").encode())


def _augmented(features: keras.Model, augment: Sequence[keras.Layer]) -> Callable[[tf.Tensor], tf.Tensor]:
    """The model's forward pass on augmented radiographs, as one graph."""

    @tf.function
    def forward(x: tf.Tensor) -> tf.Tensor:
        x = tf.cast(x, "float32")
        for layer in augment:
            x = layer(x, training=True)
        return features(x, training=False)

    return forward


def _as_features(forward: Callable[[tf.Tensor], tf.Tensor], samples: Samples, views: int = 1) -> Samples:
    """The same samples with pooled features or maps in place of pixels, in `views` versions."""
    # Maps are large; float16 is precise enough for a network that is trained with noise.
    versions = (predict_batches(forward, samples) for _ in range(views))
    x = np.concatenate([made.astype("float16" if made.ndim == 4 else "float32") for made in versions])
    return Views(x, np.arange(len(samples)), samples.y, samples.table, views)


def _architecture(model: keras.Model) -> str:
    """A digest of the layers and their settings, without names and seeds."""
    shapes = [(tuple(v.shape), v.trainable) for v in model.weights]
    layers = [
        {
            k: v
            for k, v in layer.get_config().items()
            if isinstance(v, (int, float, str, tuple, list)) and k not in ("name", "seed")
        }
        for layer in model._flatten_layers(include_self=False, recursive=True)
        if not isinstance(layer, keras.Model)
    ]
    return hashlib.sha256(json.dumps([shapes, layers], sort_keys=True, default=str).encode()).hexdigest()[:16]

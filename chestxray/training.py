"""One fit becomes one model folder, and a killed fit goes on where it stopped.

This module owns the fit loop, the choice of the epoch by validation macro-AUROC, the checkpoints and the model folder
(`model.keras`, `history.csv`, `predictions_valid.csv`, `predictions_test.csv`, `run.json`). It takes any Keras model
and any `Samples`, and knows nothing of architectures. Test images are read once, after the last choice is made.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import platform
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from sklearn.metrics import roc_auc_score

from chestxray import files, inputs
from chestxray.config import CLASSES, NIH_FINDINGS, SIX_FINDINGS, Study, StudyError
from chestxray.files import atomic_write
from chestxray.inputs import Samples

PREDICTION_COLUMNS = ["image", "patient", "label", "selected", "balanced_test"]
PREDICTION_COLUMNS += ["findings", "view", "sex", "age", "follow_up"]
HISTORY_COLUMNS = [
    "stage",
    "epoch",
    "loss",
    "accuracy",
    "val_loss",
    "val_accuracy",
    "val_macro_auroc",
    "learning_rate",
    "seconds",
]
_NEWER = {"input_axes": None, "output_axes": None, "renorm": False, "renorm_clipping": None, "renorm_momentum": 0.99}
"""What Keras 3.15 writes for initializers and BatchNorm left at their defaults, and Keras 3.13 refuses."""
_VERSIONED = ("tensorflow", "keras", "numpy", "pandas", "scikit-learn", "pillow")


@dataclass(frozen=True)
class Recipe:
    """How one stage of a fit is done.

    Attributes:
        name: the stage's name in `history.csv`: `all_findings`, `head`, `fine_tune`, `fit`.
        epochs: passes over the training samples.
        learning_rate: peak learning rate of AdamW (Loshchilov & Hutter, ICLR 2019).
        batch_size: samples a step.
        loss: `categorical` (softmax over the seven classes) or `binary` (one sigmoid a finding).
        warmup: share of all steps in which the learning rate rises linearly, 0 to 1; it then falls along a cosine.
        weight_decay: AdamW's decay; biases and BatchNorm parameters are left out.
        label_smoothing: share of each target spread over all classes, 0 to 1 (Szegedy et al., CVPR 2016).
        ema: momentum of the running mean of the weights that is evaluated and kept; 0 evaluates the weights themselves.
        balanced: draw every class equally often.
        mixup: parameter of the Beta distribution by which two images are mixed (Zhang et al., ICLR 2018); 0 mixes none.
        patience: stop after this many epochs without a better validation macro-AUROC; None never stops early.
    """

    name: str
    epochs: int
    learning_rate: float
    batch_size: int = 32
    loss: str = "categorical"
    warmup: float = 0.1
    weight_decay: float = 1e-2
    label_smoothing: float = 0.0
    ema: float = 0.0
    balanced: bool = False
    mixup: float = 0.0
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.loss not in ("categorical", "binary"):
            raise StudyError(f"recipe {self.name!r}: loss {self.loss!r} is unknown; there are: categorical, binary")
        if self.epochs < 1 or self.batch_size < 1 or not 0 <= self.warmup < 1:
            raise StudyError(f"recipe {self.name!r}: epochs and batch_size are at least 1, warmup is in [0, 1)")


def start(study: Study) -> None:
    """Seed Python, NumPy and Keras, so that the layers made after this call begin from the same weights.

    Where the profile asks for it and a GPU is present, layers made after this call compute in float16 and keep their
    weights in float32 (Micikevicius et al., ICLR 2018).
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(study.seed)
    mixed = study.profile.mixed_precision and bool(tf.config.list_physical_devices("GPU"))
    keras.config.set_dtype_policy("mixed_float16" if mixed else "float32")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a number may depend on."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _VERSIONED}}


def describe_run(study: Study) -> str:
    """Data, profile, seed, versions and device in a few lines; advice where there is no GPU.

    Returns:
        Text for the top of a notebook.
    """
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
        f"data     {study.data_note}, fingerprint {inputs.fingerprint(study)}\n"
        f"profile  {study.profile.name}, seed {study.seed}\n"
        f"device   {device}\n"
        f"versions {listed}"
    )


def mean_auroc(y: np.ndarray, scores: np.ndarray) -> float:
    """Mean one-vs-rest AUROC over the columns in which both 0 and 1 occur, by scikit-learn.

    Args:
        y: (N, K) zeros and ones.
        scores: (N, K) scores, higher for 1.

    Returns:
        The mean in 0–1; NaN where no column has both values.
    """
    usable = [k for k in range(y.shape[1]) if 0 < y[:, k].sum() < len(y)]
    return float(np.mean([roc_auc_score(y[:, k], scores[:, k]) for k in usable])) if usable else float("nan")


class Run:
    """One model's fit, from its parameters to its folder.

    A folder whose `run.json` was written from the same parameters, architecture and data is finished: `fit` then
    returns the stored history and `finish` the stored model, and nothing is trained again.
    """

    def __init__(self, study: Study, name: str, parameters: dict[str, Any]) -> None:
        """Open the model folder and seed Keras: build the model after this.

        Args:
            study: the study.
            name: the folder under `4_models/saved/<dataset>/`.
            parameters: what defines this fit beside the recipes; JSON values.
        """
        self.study = study
        self.name = name
        self.folder = study.paths.saved(name)
        self.parameters = {"profile": study.profile.name, **parameters}
        self.data = inputs.fingerprint(study)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.best: dict[str, tuple[int, float]] = {}
        self._stages: list[dict[str, Any]] = []
        self._taken: list[Callable[[], pd.DataFrame]] = []
        self._finished = _read_json(self.folder / "run.json")
        start(study)

    def fit(
        self, model: keras.Model, recipe: Recipe, train: Samples, valid: Samples, keep_start: bool = False
    ) -> pd.DataFrame:
        """Fit the model's trainable layers; it ends with the weights of its best epoch.

        The best epoch is the one with the highest validation macro-AUROC: of the seven classes, or with the `binary`
        loss of the six findings. A checkpoint is written after every epoch; when the same fit is started again after
        a kill it goes on from there and ends with the same weights on a CPU.

        Args:
            model: a built model with outputs (N, K) matching the targets.
            recipe: how.
            train: samples with targets (N, K).
            valid: samples of other patients, with targets (N, K).
            keep_start: let the weights that the stage begins with compete with those of its epochs.

        Returns:
            The stage's history, one row an epoch (`HISTORY_COLUMNS`).

        Raises:
            StudyError: the loss became NaN or infinite; the last good weights are kept in the checkpoint.
        """
        more = {"keep_start": True} if keep_start else {}
        return self._stage(model, recipe, len(train), lambda: (train, valid), **more)

    def fit_head(
        self, features: keras.Model, head: keras.Model, recipe: Recipe, train: Samples, valid: Samples
    ) -> pd.DataFrame:
        """Fit a head on features that the backbone computes once, so that its epochs cost no backbone.

        Args:
            features: radiographs (N, H, W, 1) to pooled features (N, C).
            head: pooled features (N, C) to (N, K).
            recipe: how, as in `fit`.
            train: radiographs with targets (N, K).
            valid: radiographs of other patients, with targets (N, K).

        Returns:
            The stage's history, as in `fit`.
        """
        return self._stage(
            head, recipe, len(train), lambda: (_as_features(features, train), _as_features(features, valid))
        )

    def _stage(
        self,
        model: keras.Model,
        recipe: Recipe,
        count: int,
        samples: Callable[[], tuple[Samples, Samples]],
        keep_start: bool = False,
    ) -> pd.DataFrame:
        """Fit one stage, or take its history from the finished run as long as that began in the same way."""
        described = {**dataclasses.asdict(recipe), "model": _architecture(model), "samples": count}
        self._stages.append({**described, "keep_start": True} if keep_start else described)
        number, key = len(self._stages), self._key()

        def fit() -> pd.DataFrame:
            return self._fit(
                _Fit(model, recipe, *samples(), self.study.seed, self._checkpoint(number), key), keep_start
            )

        if not self._is_finished(number):
            self._fit_taken()
            return fit()
        self._taken.append(fit)
        history = pd.read_csv(self.folder / "history.csv")
        rows = history[history["stage"] == recipe.name].reset_index(drop=True)
        for row in rows.to_dict("records"):
            print(_epoch_line(row, recipe.epochs))
        self.history += rows.to_dict("records")
        return rows

    def _fit_taken(self) -> None:
        """Fit the stages whose histories were taken from the folder, now that this run turns out to be another."""
        if self._taken:
            print("A later stage differs from the finished run: the stages above are fitted anew.")
            taken, self._taken, self.history = self._taken, [], []
            for fit in taken:
                fit()

    def _fit(self, fit: _Fit, keep_start: bool) -> pd.DataFrame:
        files.make_folder(self.folder)
        (self.folder / "run.json").unlink(missing_ok=True)
        self._finished = None
        rows = fit.run(keep_start)
        self.history += rows
        self.best[fit.recipe.name] = (fit.best_epoch, fit.best_score)
        self.seconds += sum(row["seconds"] for row in rows)
        return pd.DataFrame(rows, columns=HISTORY_COLUMNS)

    def _checkpoint(self, number: int) -> Path:
        return self.folder / f"checkpoint-{number}-{self._stages[number - 1]['name']}.npz"

    def note(self, history: pd.DataFrame) -> None:
        """Take the history of a fit that was done elsewhere, such as the mean over folds of an ensemble's head."""
        self.history += history.reindex(columns=HISTORY_COLUMNS).to_dict("records")

    def finish(
        self, model: keras.Model, valid: pd.DataFrame | None = None, extra: dict[str, Any] | None = None
    ) -> keras.Model:
        """Save the model, its history and its predictions on valid and test; `run.json` is written last.

        Args:
            model: radiographs (N, H, W, 1) in 0–255 to seven probabilities.
            valid: the prediction table for validation where the model itself may not make it, since it was fitted on
                these patients: out-of-fold predictions of an ensemble's head.
            extra: further entries for `run.json`.

        Returns:
            The saved model, loaded from its file.
        """
        if self._taken and len(self._taken) == len(self._finished["stages"]):
            print(f"Trained before from the same parameters and data: loaded from {self._where()}.")
            return keras.models.load_model(self.folder / "model.keras", compile=False)
        self._fit_taken()
        save_model(model, self.folder / "model.keras")
        history = pd.DataFrame(self.history, columns=HISTORY_COLUMNS)
        write_csv(history, self.folder / "history.csv")
        saved = keras.models.load_model(self.folder / "model.keras", compile=False)
        if valid is None:
            valid = predict(saved, inputs.load_split(self.study, "valid", selected=False))
        write_csv(valid, self.folder / "predictions_valid.csv")
        test = predict(saved, inputs.load_split(self.study, "test", selected=False))
        write_csv(test, self.folder / "predictions_test.csv")
        self._write_run(model.count_params(), valid, extra)
        for checkpoint in self.folder.glob("checkpoint-*.npz"):
            checkpoint.unlink()
        return saved

    def _write_run(self, weights: int, valid: pd.DataFrame, extra: dict[str, Any] | None) -> None:
        """Write the last file of a model folder; with it the folder is finished."""
        chosen = valid[valid["selected"]]
        record = {
            "model": self.name,
            "dataset": self.study.paths.dataset,
            "parameters": self.parameters,
            "stages": self._stages,
            "seed": self.study.seed,
            "versions": versions(),
            "data_fingerprint": self.data,
            "key": self._key(),
            "weights": weights,
            "seconds": round(self.seconds, 1),
            "epochs": len(self.history),
            "best_epoch": {stage: epoch for stage, (epoch, _) in self.best.items()},
            "valid_macro_auroc": round(
                mean_auroc(inputs.class_targets(chosen["label"]), chosen[list(CLASSES)].to_numpy()), 6
            ),
            **(extra or {}),
        }
        atomic_write(self.folder / "run.json", (json.dumps(record, indent=2) + "\n").encode())

    def _key(self) -> str:
        described = {"p": self.parameters, "s": self._stages, "seed": self.study.seed, "data": self.data}
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _is_finished(self, stages: int) -> bool:
        """Whether the stored run began with the same stages, parameters, seed and data."""
        stored = self._finished
        return (
            stored is not None
            and (stored["parameters"], stored["seed"], stored["data_fingerprint"])
            == (json.loads(json.dumps(self.parameters)), self.study.seed, self.data)
            and stored["stages"][:stages] == json.loads(json.dumps(self._stages))
        )

    def _where(self) -> str:
        return self.study.paths.relative(self.folder)


class _Fit:
    """The loop behind `Run.fit`: epochs, evaluation, checkpoints."""

    def __init__(
        self, model: keras.Model, recipe: Recipe, train: Samples, valid: Samples, seed: int, checkpoint: Path, key: str
    ) -> None:
        self.model, self.recipe, self.train, self.valid = model, recipe, train, valid
        self.seed, self.checkpoint, self.key = seed, checkpoint, key
        self.steps = len(train) // recipe.batch_size
        if self.steps == 0:
            raise StudyError(
                f"recipe {recipe.name!r}: {len(train)} training samples are fewer than one batch of "
                f"{recipe.batch_size}; lower batch_size or add images"
            )
        self.history: list[dict[str, Any]] = []
        self.best_epoch, self.best_score = 0, -np.inf
        self.best_weights: list[np.ndarray] = []
        self.done = False
        self._compile()
        self.forward = compiled(model)

    def run(self, keep_start: bool) -> list[dict[str, Any]]:
        first = self._resume()
        if keep_start and first == 0:
            self.best_score = self._score(predict_batches(self.forward, self.valid))
            self.best_weights = [w.numpy() for w in self.model.weights]
        for epoch in range(first, self.recipe.epochs):
            if self.done:
                break
            self._epoch(epoch)
        _assign(self.model.weights, self.best_weights)
        return self.history

    def _compile(self) -> None:
        recipe, total = self.recipe, self.steps * self.recipe.epochs
        warmup = int(total * recipe.warmup)
        rate = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup else recipe.learning_rate,
            decay_steps=max(total - warmup, 1),
            warmup_target=recipe.learning_rate if warmup else None,
            warmup_steps=warmup,
        )
        averaged = {"use_ema": True, "ema_momentum": recipe.ema} if recipe.ema else {}
        optimizer = keras.optimizers.AdamW(rate, weight_decay=recipe.weight_decay, global_clipnorm=1.0, **averaged)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        if recipe.loss == "binary":
            loss: keras.Loss = keras.losses.BinaryCrossentropy(label_smoothing=recipe.label_smoothing)
        else:
            loss = keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing)
        # XLA is slower than plain TensorFlow on the CPUs that this study is planned for.
        self.model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"], jit_compile=False)
        # Not the optimizer above: in mixed precision Keras wraps it in one that scales the loss.
        self.model.optimizer.build(self.model.trainable_variables)

    def _epoch(self, epoch: int) -> None:
        recipe, began = self.recipe, time.perf_counter()
        order = inputs.epoch_order(self.train.y, self.seed, epoch, recipe.balanced)
        shares = inputs.mixing_shares(recipe.mixup, self.seed, epoch, self.steps) if recipe.mixup else None
        batches = inputs.dataset(self.train, order, recipe.batch_size, shares)
        fitted = self.model.fit(batches, initial_epoch=epoch, epochs=epoch + 1, shuffle=False, verbose=0).history
        if not np.isfinite(fitted["loss"][0]):
            raise StudyError(
                f"stage {recipe.name!r}, epoch {epoch + 1}: the loss is {fitted['loss'][0]}; the weights of epoch "
                f"{epoch} are kept in {self.checkpoint.name}. Lower learning_rate ({recipe.learning_rate:g}) and "
                "run again"
            )
        live = [w.numpy() for w in self.model.weights]
        if recipe.ema:
            self.model.optimizer.finalize_variable_values(self.model.trainable_variables)
        scores = predict_batches(self.forward, self.valid)
        score = self._score(scores)
        if score > self.best_score or not self.best_weights:
            self.best_epoch, self.best_score = epoch + 1, score
            self.best_weights = [w.numpy() for w in self.model.weights]
        if recipe.ema:
            _assign(self.model.weights, live)
        self.history.append(
            {
                "stage": recipe.name,
                "epoch": epoch + 1,
                "loss": float(fitted["loss"][0]),
                "accuracy": float(fitted["accuracy"][0]),
                "val_loss": float(self.model.loss(self.valid.y, scores)),
                "val_accuracy": _accuracy(self.valid.y, scores, recipe.loss),
                "val_macro_auroc": score,
                "learning_rate": float(self.model.optimizer.learning_rate),
                "seconds": time.perf_counter() - began,
            }
        )
        self.done = recipe.patience is not None and epoch + 1 - self.best_epoch >= recipe.patience
        self._save(epoch + 1)
        self._report(epoch)

    def _score(self, scores: np.ndarray) -> float:
        """The validation macro-AUROC that chooses the epoch."""
        if self.recipe.loss == "binary" and self.valid.y.shape[1] == len(NIH_FINDINGS):
            six = [NIH_FINDINGS.index(name) for name in SIX_FINDINGS]
            return mean_auroc(self.valid.y[:, six], scores[:, six])
        return mean_auroc(self.valid.y, scores)

    def _report(self, epoch: int) -> None:
        left = (self.recipe.epochs - epoch - 1) * np.mean([row["seconds"] for row in self.history])
        print(f"{_epoch_line(self.history[-1], self.recipe.epochs)}, {left / 60:.1f} min left", flush=True)

    def _save(self, epoch: int) -> None:
        """Everything that the next step depends on, in one file: weights, seeds' states, optimizer, best so far."""
        state = {
            "progress": {
                "key": self.key,
                "epoch": epoch,
                "best_epoch": self.best_epoch,
                "best_score": self.best_score,
                "done": self.done,
                "history": self.history,
            }
        }
        buffer = io.BytesIO()
        np.savez(
            buffer,
            state=np.frombuffer(json.dumps(state).encode(), np.uint8),
            **{f"m{i}": v.numpy() for i, v in enumerate(self._model_variables())},
            **{f"o{i}": v.numpy() for i, v in enumerate(self.model.optimizer.variables)},
            **{f"b{i}": v for i, v in enumerate(self.best_weights)},
        )
        atomic_write(self.checkpoint, buffer.getvalue())

    def _resume(self) -> int:
        """Load the checkpoint of the same fit; returns the first epoch that is still to do."""
        if not self.checkpoint.exists():
            return 0
        with np.load(self.checkpoint) as arrays:
            progress = json.loads(arrays["state"].tobytes())["progress"]
            if progress["key"] != self.key:
                return 0
            _assign(self._model_variables(), [arrays[f"m{i}"] for i in range(len(self._model_variables()))])
            _assign(
                self.model.optimizer.variables,
                [arrays[f"o{i}"] for i in range(len(self.model.optimizer.variables))],
            )
            self.best_weights = [arrays[f"b{i}"] for i in range(len(self.model.weights))]
        self.best_epoch, self.best_score = progress["best_epoch"], progress["best_score"]
        self.history, self.done = progress["history"], progress["done"]
        print(f"{self.recipe.name}: going on after epoch {progress['epoch']} of {self.recipe.epochs}")
        return progress["epoch"]

    def _model_variables(self) -> list[keras.Variable]:
        """The weights and the states of the seed generators, without the metrics."""
        skip = {id(v) for v in self.model.metrics_variables}
        return [v for v in self.model.variables if id(v) not in skip]


def compiled(model: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """The model's forward pass as one graph, to call many times: `Model.predict` would copy a memory-mapped set."""
    return tf.function(lambda x: model(x, training=False))


def predict_batches(
    model: keras.Model | Callable[[tf.Tensor], tf.Tensor], samples: Samples, batch_size: int = 128
) -> np.ndarray:
    """The outputs for the samples in order, (N, K) float32.

    Args:
        model: a model, or what `compiled` made of it, where it is asked more than once.
        samples: (N, …) inputs.
        batch_size: samples at a time; the last batch is filled up, so that one graph serves all.
    """
    step = compiled(model) if isinstance(model, keras.Model) else model
    outputs = []
    for batch in samples.batches(batch_size):
        short = batch_size - len(batch)
        padded = np.concatenate([batch, np.repeat(batch[-1:], short, axis=0)]) if short else batch
        outputs.append(step(tf.constant(padded)).numpy()[: len(batch)])
    return np.concatenate(outputs).astype("float32")


def predict(model: keras.Model, samples: Samples) -> pd.DataFrame:
    """The prediction table of one split: who each image is, and seven probabilities."""
    return prediction_table(samples.table, predict_batches(model, samples))


def prediction_table(table: pd.DataFrame, probabilities: np.ndarray) -> pd.DataFrame:
    """Join the manifest's columns and (N, 7) probabilities."""
    columns = pd.DataFrame(probabilities, columns=list(CLASSES), index=table.index).round(6)
    return pd.concat([table[PREDICTION_COLUMNS], columns], axis=1)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table; the file is complete or absent."""
    atomic_write(path, table.to_csv(index=False, quoting=csv.QUOTE_MINIMAL, lineterminator="\n").encode())


def save_model(model: keras.Model, path: Path, half: bool = False) -> None:
    """Save a model without its optimizer; the file is complete or absent.

    Args:
        model: the model.
        path: ends in `.keras`.
        half: store kernels as float16, half the size. The file stays an ordinary Keras file: loading casts them back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".tmp-{os.getpid()}-{path.name}"
    # Without an optimizer, whose slots are twice the weights, the file is smaller and loads without a word.
    model.compile(optimizer=None)
    model.compiled = False
    model.save(beside)
    _rewrite(beside, half)
    beside.replace(path)


def _rewrite(path: Path, half: bool) -> None:
    """Let every Keras that the study allows load the file and, with `half`, store its kernels as float16.

    Vectors (BatchNorm, biases) need float32's range and keep it.
    """
    beside = path.with_name(f"{path.name}-rewritten")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as rewritten:
        for item in whole.infolist():
            data = whole.read(item.filename)
            if item.filename == "config.json":
                data = json.dumps(_portable(json.loads(data))).encode()
            elif half and item.filename == "model.weights.h5":
                with h5py.File(io.BytesIO(data), "r+") as weights:
                    data = _halved_weights(weights)
            rewritten.writestr(item.filename, data)
    shutil.move(beside, path)


def _portable(config: Any) -> Any:
    """A model's configuration without entries that say nothing and that older Keras versions refuse."""
    if isinstance(config, list):
        return [_portable(entry) for entry in config]
    if not isinstance(config, dict):
        return config
    return {name: _portable(entry) for name, entry in config.items() if name not in _NEWER or entry != _NEWER[name]}


def _halved_weights(weights: h5py.File) -> bytes:
    """The bytes of a copy of an HDF5 weights file whose arrays of two or more dimensions are float16."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as copy:

        def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Dataset):
                array = item[()]
                kernel = array.ndim > 1 and array.dtype == np.float32
                copied = copy.create_dataset(name, data=array.astype(np.float16) if kernel else array)
            else:
                copied = copy.require_group(name)
            copied.attrs.update(item.attrs)

        weights.visititems(visit)
        copy.attrs.update(weights.attrs)
    return buffer.getvalue()


def _epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    return (
        f"{row['stage']:>12} {row['epoch']:>3}/{epochs}  loss {row['loss']:.4f}  valid loss {row['val_loss']:.4f}  "
        f"valid macro-AUROC {row['val_macro_auroc']:.4f}  {row['seconds']:.0f} s"
    )


def _as_features(features: keras.Model, samples: Samples) -> Samples:
    """The same samples with pooled features in the place of pixels."""
    x = predict_batches(features, samples)
    return Samples(x, np.arange(len(samples)), samples.y, samples.table)


def _accuracy(y: np.ndarray, scores: np.ndarray, loss: str) -> float:
    if loss == "binary":
        return float(np.mean((scores > 0.5) == (y > 0.5)))
    return float(np.mean(scores.argmax(1) == y.argmax(1)))


def _architecture(model: keras.Model) -> str:
    """A digest of the layers and their settings, whatever names and seeds Keras gave them."""
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


def _assign(variables: list[keras.Variable], values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None

"""Fitting: the epochs of one stage, the choice of the best one, and checkpoints to resume from at any step.

It knows any Keras model and any `Samples`, and nothing of architectures, of other stages or of model folders.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from chestxray import files
from chestxray.config import ALL_LABELS, SIX_FINDINGS, StudyError
from chestxray.evaluation.metrics import mean_auroc
from chestxray.training.recipe import LOSSES, Recipe
from chestxray.training.samples import Samples, class_weights, dataset, epoch_order, mixing_shares

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

CHECKPOINT_SECONDS = 300.0
"""Seconds between two checkpoints within an epoch."""
CHECKPOINT_SHARE = 1 / 60
"""The largest share of the time spent on checkpoints; the last one of a stage is always written."""
LOG_STEPS = 50
"""Steps between two entries of the loss in the TensorBoard log."""
REESTIMATE_STEPS = 60
"""Batches over which BatchNorm's mean and variance are re-estimated."""


class LogitAdjusted(keras.Loss):
    """Cross-entropy of the probabilities multiplied by the classes' shares among the training samples.

    The network's own probabilities are then those at equal class shares (Menon et al., Long-tail learning via logit
    adjustment, ICLR 2021).
    """

    def __init__(
        self, shares: np.ndarray, label_smoothing: float = 0.0, reduction: str | None = "sum_over_batch_size"
    ) -> None:
        super().__init__(name="logit_adjusted", reduction=reduction)
        self.shares, self.label_smoothing = np.asarray(shares, "float32"), label_smoothing

    def call(self, y: tf.Tensor, probabilities: tf.Tensor) -> tf.Tensor:
        """The loss, reduced over the batch by Keras.

        Args:
            y: (N, K) one-hot classes.
            probabilities: (N, K), 0 to 1, rows of sum 1.
        """
        # Keras divides probabilities by their sum, which makes this the softmax of the adjusted logits.
        adjusted = probabilities * self.shares
        return keras.losses.categorical_crossentropy(y, adjusted, label_smoothing=self.label_smoothing)


LOSSES |= {
    "categorical": keras.losses.CategoricalCrossentropy,
    "categorical_focal": keras.losses.CategoricalFocalCrossentropy,
    "logit_adjusted": LogitAdjusted,
    "binary": keras.losses.BinaryCrossentropy,
    "binary_focal": keras.losses.BinaryFocalCrossentropy,
}


def compiled(model: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """The model's forward pass as one graph, to call many times: `Model.predict` would copy a memory-mapped set."""
    return tf.function(lambda x: model(x, training=False))


def predict_batches(
    model: keras.Model | Callable[[tf.Tensor], tf.Tensor], samples: Samples, batch_size: int = 128
) -> np.ndarray:
    """The outputs for the samples in order, (N, K) float32.

    Args:
        model: a model, or what `compiled` made of it, to predict more than once.
        samples: (N, …) inputs.
        batch_size: samples at a time; the last batch is padded, so that one graph serves all.
    """
    step = compiled(model) if isinstance(model, keras.Model) else model
    outputs = []
    for batch in samples.batches(batch_size):
        short = batch_size - len(batch)
        padded = np.concatenate([batch, np.repeat(batch[-1:], short, axis=0)]) if short else batch
        outputs.append(step(tf.constant(padded)).numpy()[: len(batch)])
    return np.concatenate(outputs).astype("float32")


@dataclass(frozen=True)
class StagePaths:
    """The files that a stage writes while it runs, and their key.

    Attributes:
        checkpoint: the file to resume from.
        log: folder of the TensorBoard log.
        key: a digest of the fit; a checkpoint with another key is not used.
        checkpoint_steps: steps between two checkpoints; None goes by time.
    """

    checkpoint: Path
    log: Path
    key: str
    checkpoint_steps: int | None = None


class Fit:
    """The loop over the epochs of one stage.

    Attributes:
        history: one row per epoch, `HISTORY_COLUMNS`.
        best_epoch: the epoch whose weights are saved, from 1; 0 is the start.
        best_score: its validation macro-AUROC.
    """

    def __init__(
        self,
        model: keras.Model,
        recipe: Recipe,
        count: int,
        samples: Callable[[], tuple[Samples, ...]],
        seed: int,
        paths: StagePaths,
        after_epoch: Callable[[list[dict[str, Any]]], None] = lambda history: None,
        judged_on: Samples | None = None,
        steps_at_once: int = 1,
    ) -> None:
        """Prepare a stage.

        Args:
            model: a built model with outputs (N, K) matching the targets.
            recipe: the hyperparameters.
            count: number of training samples.
            samples: returns the training and the validation samples and, where these are not the training samples,
                those from which BatchNorm is re-estimated; not called for a finished stage.
            seed: of the order of the samples and of mixup.
            paths: of checkpoint and log.
            after_epoch: called with the history after each epoch.
            judged_on: the samples whose macro-AUROC chooses the epoch, where they are not the validation samples.
            steps_at_once: steps between two checks of the loss, where a checkpoint may be written; more than one saves
                time where a step costs less than Keras's overhead.

        Raises:
            StudyError: there are fewer samples than one batch.
        """
        self.model, self.recipe, self.samples, self.seed, self.paths = model, recipe, samples, seed, paths
        self.after_epoch, self.judged_on = after_epoch, judged_on
        self.steps = count // recipe.batch_size
        if self.steps == 0:
            raise StudyError(
                f"recipe {recipe.name!r}: {count} training samples are fewer than one batch of "
                f"{recipe.batch_size}; lower batch_size or add images"
            )
        self.steps_at_once = min(steps_at_once, self.steps)
        self.history: list[dict[str, Any]] = []
        self.best_epoch, self.best_score = 0, -np.inf
        self.best_weights: list[np.ndarray] = []
        self.done = False
        self.began_with = [v.numpy() for v in self._model_variables()]
        self.metrics: list[Any] = []
        """Running metrics of an interrupted epoch, to resume from."""
        self.elapsed = 0.0
        """Seconds already spent on the next epoch, before an interruption and to make its samples."""
        self.update: Callable[[tf.Tensor], tf.Tensor] | None = None
        """The forward pass that re-estimates BatchNorm, traced once."""
        self.saved_at, self.saving = time.perf_counter(), 0.0
        """When the last checkpoint was written, and how many seconds that took."""

    def run(self, keep_start: bool = False) -> list[dict[str, Any]]:
        """Fit the model; it ends with the weights of its best epoch.

        Args:
            keep_start: choose among the initial weights too, as epoch 0.

        Returns:
            The history.

        Raises:
            StudyError: the loss became NaN or infinite; the model has its initial weights again, and the checkpoint
                holds the last finite ones.
        """
        with self._stored() as stored:
            if stored is not None:
                self._take_over(stored)
            if not self.done:
                with self._batch_norm_frozen():
                    self._resume(stored, keep_start)
        _assign(self.model.weights, self.best_weights)
        return self.history

    def _resume(self, stored: Mapping[str, np.ndarray] | None, keep_start: bool) -> None:
        """Do the epochs that are left."""
        began = time.perf_counter()
        self.train, self.valid, *plain = self.samples()
        self.plain = plain[0] if plain else self.train
        prepared = time.perf_counter() - began
        self.forward = compiled(self.model)
        self._compile()
        epoch = step = 0
        if stored is None:
            shutil.rmtree(self.paths.log, ignore_errors=True)
            self.paths.checkpoint.unlink(missing_ok=True)
            if keep_start:
                self.best_score = self._score(predict_batches(self.forward, self.valid))
                self.best_weights = [w.numpy() for w in self.model.weights]
        else:
            epoch, step = self._restore(stored)
        self.elapsed += prepared
        self.first, self.began = epoch * self.steps + step, time.perf_counter()
        total = self.recipe.epochs * self.steps
        with (
            tqdm(
                total=total, initial=self.first, desc=self.recipe.name, unit="step", leave=False, disable=None
            ) as self.bar,
            contextlib.closing(_Log(self.paths.log)) as self.log,
        ):
            while epoch < self.recipe.epochs and not self.done:
                self._epoch(epoch, step)
                epoch, step = epoch + 1, 0

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
        # Keras clips each GPU's part of the gradient, before they are added.
        clip = 1 / tf.distribute.get_strategy().num_replicas_in_sync
        optimizer = keras.optimizers.AdamW(rate, weight_decay=recipe.weight_decay, global_clipnorm=clip, **averaged)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        if self.model.dtype_policy.name == "mixed_float16":
            optimizer = LossScaleOptimizer(optimizer)
        # XLA is slower than plain TensorFlow on the CPUs that this study is planned for.
        self.model.compile(
            optimizer=optimizer,
            loss=self._loss(),
            metrics=["accuracy"],
            jit_compile=False,
            steps_per_execution=self.steps_at_once,
        )
        self.model.optimizer.build(self.model.trainable_variables)
        # Keras makes the variables of the accuracy at its first step: TensorFlow would then trace that step twice, and
        # an interrupted epoch could not resume with their values.
        some = self.train.y[:1]
        self.model.compute_metrics(None, some, some)

    def _loss(self, **reduction: str | None) -> keras.Loss:
        recipe = self.recipe
        if recipe.loss == "logit_adjusted":
            shares = self.train.y[epoch_order(self.train.y, self.seed, 0, recipe.balanced)].mean(axis=0)
            return LogitAdjusted(shares, recipe.label_smoothing, **reduction)
        return LOSSES[recipe.loss](label_smoothing=recipe.label_smoothing, **reduction)

    @contextlib.contextmanager
    def _batch_norm_frozen(self) -> Iterator[None]:
        """Freeze BatchNorm's statistics and parameters where the recipe asks for it, for this stage alone."""
        frozen = [layer for layer in _batch_norms(self.model) if layer.trainable and self.recipe.batch_norm == "freeze"]
        try:
            for layer in frozen:
                layer.trainable = False
            yield
        finally:
            for layer in frozen:
                layer.trainable = True

    def _batches(self, epoch: int, first: int) -> tf.data.Dataset:
        """The batches of an epoch from step `first` on; they depend on the seed and the epoch alone."""
        recipe = self.recipe
        order = epoch_order(self.train.y, self.seed, epoch, recipe.balanced)[first * recipe.batch_size :]
        shares = None
        if recipe.mixup:
            shares = mixing_shares(recipe.mixup, self.seed, epoch, self.steps)[first:]
        weights = class_weights(self.train.y) if recipe.class_weight else None
        return dataset(self.train.in_epoch(self.seed, epoch), order, recipe.batch_size, shares, weights)

    def _epoch(self, epoch: int, first: int) -> None:
        began = time.perf_counter() - self.elapsed
        self.elapsed = 0.0
        steps = _Steps(self, epoch, first, began)
        fitted = self.model.fit(
            self._batches(epoch, first),
            initial_epoch=epoch,
            epochs=epoch + 1,
            shuffle=False,
            verbose=0,
            callbacks=[steps],
        ).history
        # At its end Keras's fit has replaced the weights by their running mean.
        live = self._values() if self.recipe.ema_restart else steps.values
        self._check_finite(epoch, self.steps, fitted["loss"][0], live)
        if self.recipe.ema:
            self.model.optimizer.finalize_variable_values(self.model.trainable_variables)
        if self.recipe.batch_norm == "reestimate":
            self._reestimate_batch_norm(epoch)
        scores = predict_batches(self.forward, self.valid)
        score = self._score(scores)
        if score > self.best_score or not self.best_weights:
            self.best_epoch, self.best_score = epoch + 1, score
            self.best_weights = [w.numpy() for w in self.model.weights]
        _assign(self._model_variables(), live)
        row = {
            "stage": self.recipe.name,
            "epoch": epoch + 1,
            "loss": float(fitted["loss"][0]),
            "accuracy": float(fitted["accuracy"][0]),
            # With a reduction, Keras would divide it by the number of GPUs.
            "val_loss": float(np.mean(self._loss(reduction=None)(self.valid.y, scores))),
            "val_accuracy": _accuracy(self.valid.y, scores, self.recipe.is_binary),
            "val_macro_auroc": score,
            "learning_rate": float(self.model.optimizer.learning_rate),
            "seconds": time.perf_counter() - began,
        }
        self.history.append(row)
        patience = self.recipe.patience
        self.done = epoch + 1 == self.recipe.epochs or (
            patience is not None and epoch + 1 - self.best_epoch >= patience
        )
        self.log.write(epoch + 1, {name: row[name] for name in HISTORY_COLUMNS[2:]}, "epoch/")
        self.after_epoch(self.history)
        if self.done or self._is_due(0.0):
            self.save(epoch + 1, 0)
        self._print(f"{epoch_line(row, self.recipe.epochs)}{self._time_left(epoch + 1, 0)}")

    def _reestimate_batch_norm(self, epoch: int) -> None:
        """Re-estimate BatchNorm's mean and variance with the present weights, over batches that are not mixed.

        The running ones come from earlier weights and from augmented images, with mixup from means of two images, whose
        variance is smaller.
        """
        if self.update is None:
            self.update = tf.function(lambda x: self.model(x, training=True))
        order = epoch_order(self.plain.y, self.seed, epoch)
        batches = dataset(self.plain.in_epoch(self.seed, epoch), order, self.recipe.batch_size)
        _take_statistics(_batch_norms(self.model), self.update, (x for x, *_ in batches.take(REESTIMATE_STEPS)))

    def _score(self, scores: np.ndarray) -> float:
        """The validation macro-AUROC that chooses the epoch, from the validation samples' `scores` or anew."""
        if self.judged_on is not None:
            return mean_auroc(self.judged_on.y, predict_batches(self.forward, self.judged_on))
        if self.recipe.is_binary and self.valid.y.shape[1] == len(ALL_LABELS):
            six = [ALL_LABELS.index(name) for name in SIX_FINDINGS]
            return mean_auroc(self.valid.y[:, six], scores[:, six])
        return mean_auroc(self.valid.y, scores)

    def after_steps(self, epoch: int, before: int, step: int, loss: float, began: float) -> None:
        """Check the loss, log it, and write a checkpoint where one is due.

        Args:
            epoch: epoch number from 0.
            before: steps that had been done in this epoch when this was last called.
            step: steps done in it now.
            loss: its mean over the epoch so far.
            began: when the epoch began, in seconds of `time.perf_counter`.
        """
        self.bar.update(step - before)
        self._check_finite(epoch, step, loss)
        if step // LOG_STEPS > before // LOG_STEPS:
            self.log.write(epoch * self.steps + step, {"loss": loss}, "step/")
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        every = self.paths.checkpoint_steps
        due = self._is_due(CHECKPOINT_SECONDS) if every is None else step // every > before // every
        if due and step < self.steps:
            self.elapsed = time.perf_counter() - began
            self.save(epoch, step)
            self.elapsed = 0.0
            done = f"{self.recipe.name:>12} {epoch + 1:>3}/{self.recipe.epochs}  step {step}/{self.steps}"
            self._print(f"{done}  loss {loss:.4f}{self._time_left(epoch, step)}")

    def _is_due(self, seconds: float) -> bool:
        """Whether the last checkpoint is old enough for another."""
        age = time.perf_counter() - self.saved_at
        return self.paths.checkpoint_steps is not None or age >= max(seconds, self.saving / CHECKPOINT_SHARE)

    def _check_finite(self, epoch: int, step: int, loss: float, weights: list[np.ndarray] | None = None) -> None:
        if np.isfinite(loss) and all(np.isfinite(weight).all() for weight in weights or []):
            return
        _assign(self._model_variables(), self.began_with)
        what = f"the loss is {loss:g}" if not np.isfinite(loss) else "a weight is no longer finite"
        saved = f"the last good weights are kept in {self.paths.checkpoint.name}"
        if not self.paths.checkpoint.exists():
            saved = "the model has the weights again that it began the stage with"
        raise StudyError(
            f"stage {self.recipe.name!r}, epoch {epoch + 1}: {what} at step {step}; {saved}. Lower learning_rate "
            f"({self.recipe.learning_rate:g}) and run again"
        )

    def _print(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        tqdm.write(line)
        sys.stdout.flush()

    def _time_left(self, epoch: int, step: int) -> str:
        """The time left after `epoch` epochs and `step` steps of the next one, in words."""
        done = epoch * self.steps + step
        pace = (time.perf_counter() - self.began) / (done - self.first)
        return f", {pace * (self.recipe.epochs * self.steps - done) / 60:.1f} min left"

    def _values(self) -> list[np.ndarray]:
        return [v.numpy() for v in self._model_variables()]

    def save(self, epoch: int, step: int) -> None:
        """Write what the next step depends on: weights, seeds, optimizer, running metrics and the best weights.

        Args:
            epoch: finished epochs.
            step: steps done in the next one.

        Raises:
            StudyError: a weight is not finite, or the disk is full.
        """
        began = time.perf_counter()
        progress = {
            "key": self.paths.key,
            "epoch": epoch,
            "step": step,
            "elapsed": self.elapsed,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
            "done": self.done,
            "history": self.history,
        }
        groups = {
            "model": self._values(),
            "optimizer": [v.numpy() for v in self.model.optimizer.variables],
            "metric": [v.numpy() for v in self.model.metrics_variables] if step else [],
            "best": self.best_weights,
        }
        self._check_finite(epoch, step, 0.0, groups["model"])
        arrays = {f"{name}-{i}": value for name, values in groups.items() for i, value in enumerate(values)}
        with files.atomic_file(self.paths.checkpoint) as file:
            np.savez(file, progress=np.frombuffer(json.dumps(progress).encode(), np.uint8), **arrays)
        self.saved_at = time.perf_counter()
        self.saving = self.saved_at - began

    @contextlib.contextmanager
    def _stored(self) -> Iterator[Mapping[str, np.ndarray] | None]:
        """The checkpoint of the same fit, if there is one."""
        if not self.paths.checkpoint.exists():
            yield None
            return
        with np.load(self.paths.checkpoint) as arrays:
            same = "progress" in arrays and self._progress(arrays)["key"] == self.paths.key
            yield arrays if same else None

    @staticmethod
    def _progress(stored: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return json.loads(stored["progress"].tobytes())

    def _take_over(self, stored: Mapping[str, np.ndarray]) -> None:
        """Restore history and best weights of the finished epochs, and print them."""
        progress = self._progress(stored)
        self.best_epoch, self.best_score = progress["best_epoch"], progress["best_score"]
        self.history, self.done, self.elapsed = progress["history"], progress["done"], progress["elapsed"]
        self.best_weights = _group(stored, "best")
        for row in self.history:
            print(epoch_line(row, self.recipe.epochs))
        step = f", step {progress['step']} of {self.steps}" if progress["step"] else ""
        print(f"{self.recipe.name}: going on after epoch {progress['epoch']} of {self.recipe.epochs}{step}", flush=True)

    def _restore(self, stored: Mapping[str, np.ndarray]) -> tuple[int, int]:
        """Restore weights, seeds and optimizer; returns the finished epochs and the steps done in the next one."""
        progress = self._progress(stored)
        _assign(self._model_variables(), _group(stored, "model"))
        _assign(self.model.optimizer.variables, _group(stored, "optimizer"))
        self.metrics = _group(stored, "metric")
        return progress["epoch"], progress["step"]

    def restore_metrics(self) -> None:
        """Restore the running metrics of an interrupted epoch."""
        if self.metrics:
            _assign(self.model.metrics_variables, self.metrics)
            self.metrics = []

    def _model_variables(self) -> list[keras.Variable]:
        """The weights and the states of the seed generators, without the metrics."""
        skip = {id(v) for v in self.model.metrics_variables}
        return [v for v in self.model.variables if id(v) not in skip]


class _Steps(keras.callbacks.Callback):
    """Checks, logs and checkpoints between the steps of one epoch."""

    def __init__(self, fit: Fit, epoch: int, first: int, began: float) -> None:
        super().__init__()
        self.fit, self.epoch, self.step, self.began = fit, epoch, first, began
        self.values: list[np.ndarray] = []
        """The model's variables after the last step."""

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        self.fit.restore_metrics()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        before, self.step = self.step, min(self.step + self.fit.steps_at_once, self.fit.steps)
        self.fit.after_steps(self.epoch, before, self.step, logs["loss"], self.began)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        if not self.fit.recipe.ema_restart:
            self.values = self.fit._values()


class _Log:
    """Event files for TensorBoard, which need not be installed; a resumed fit adds to the same folder."""

    def __init__(self, folder: Path) -> None:
        files.make_folder(folder)
        self._writer = tf.summary.create_file_writer(str(folder))
        plugin = tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
        self._metadata = tf.compat.v1.SummaryMetadata(plugin_data=plugin)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        with self._writer.as_default():
            for name, value in values.items():
                tf.summary.write(prefix + name, np.float32(value), step=step, metadata=self._metadata)

    def close(self) -> None:
        self._writer.close()


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """One epoch in one line.

    Args:
        row: of the history, with `HISTORY_COLUMNS`.
        epochs: of the whole stage.
    """
    return (
        f"{row['stage']:>12} {row['epoch']:>3}/{epochs}  loss {row['loss']:.4f}  valid loss {row['val_loss']:.4f}  "
        f"valid macro-AUROC {row['val_macro_auroc']:.4f}  {row['seconds']:.0f} s"
    )


def reestimate_batch_norm(
    before: keras.Model, model: keras.Model, samples: Samples, seed: int, batch_size: int = 64
) -> None:
    """Re-estimate BatchNorm's mean and variance from radiographs, for ImageNet's are of photographs; weights stay.

    Args:
        before: radiographs (N, H, W, 1) to the model's inputs.
        model: the model to re-estimate, such as a backbone.
        samples: radiographs, at least one batch; up to `REESTIMATE_STEPS` batches are drawn.
        seed: of the draw.
        batch_size: radiographs per batch.

    Raises:
        StudyError: there are fewer radiographs than one batch.
    """
    if len(samples) < batch_size:
        raise StudyError(f"{len(samples)} radiographs are fewer than one batch of {batch_size}; lower batch_size")
    order = epoch_order(samples.y, seed, 0)[: REESTIMATE_STEPS * batch_size]
    update = tf.function(lambda x: model(before(tf.cast(x, "float32"), training=False), training=True))
    _take_statistics(_batch_norms(model), update, (x for x, *_ in dataset(samples, order, batch_size)))


def _batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    layers = model._flatten_layers(include_self=False, recursive=True)
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]


def _take_statistics(
    norms: list[keras.layers.BatchNormalization],
    update: Callable[[tf.Tensor], tf.Tensor],
    batches: Iterator[tf.Tensor],
) -> None:
    """Set layers' statistics to the mean over batches of the batch's own; `update` runs the layers in training."""
    statistics = [v for layer in norms for v in (layer.moving_mean, layer.moving_variance)]
    sums = [np.zeros(v.shape, "float64") for v in statistics]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0  # the statistics are then those of the batch alone
    taken = 0
    try:
        for batch in batches:
            update(batch)
            taken += 1
            for total, variable in zip(sums, statistics, strict=True):
                total += variable.numpy()
    finally:  # an interrupted cell may be run again with the same model
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
    _assign(statistics, [total / taken for total in sums])


def _accuracy(y: np.ndarray, scores: np.ndarray, binary: bool) -> float:
    if binary:
        return float(np.mean((scores > 0.5) == (y > 0.5)))
    return float(np.mean(scores.argmax(1) == y.argmax(1)))


def _assign(variables: list[keras.Variable], values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _group(stored: Mapping[str, np.ndarray], name: str) -> list[np.ndarray]:
    """The arrays of a checkpoint under `name`, in order."""
    count = sum(key.startswith(f"{name}-") for key in stored)
    return [stored[f"{name}-{i}"] for i in range(count)]


class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Keras's loss scaling, which on several devices skips a step where the gradient overflowed on any of them."""

    def check_finite(self, grads: Sequence[tf.Tensor | None]) -> tf.Tensor:
        """Whether every gradient is finite on every device: a bool scalar, the same on all of them."""
        finite = super().check_finite(grads)
        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            return finite
        overflows = tf.cast(tf.logical_not(finite), "int32")
        return tf.equal(replica.all_reduce(tf.distribute.ReduceOp.SUM, overflows), 0)

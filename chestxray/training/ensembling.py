"""Choosing three members, and joining them into one model with one image input.

Members are chosen by validation macro-AUROC. What joins them (a dense head, or weights of a mean) is fitted on their
predictions for validation patients, whom no member was trained on, and is judged by patient-grouped cross-validation
against the plain mean; the better one ships. It knows model folders and prediction tables, and nothing of how members
were trained.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import pandas as pd
import scipy.optimize
import scipy.special
import tensorflow as tf
from sklearn.model_selection import StratifiedGroupKFold

from chestxray.config import CLASSES, Study, StudyError
from chestxray.evaluation import calibration, predictions
from chestxray.networks.ensemble import HELD, head
from chestxray.training import samples

CANDIDATES: tuple[str, ...] = (
    "dense",
    "cnn",
    "feature_extraction",
    "fine_tuning_3a",
    "fine_tuning_3b",
    "fine_tuning_3c",
    "fine_tuning_3d",
)


def rank(study: Study, candidates: Sequence[str] = CANDIDATES) -> pd.DataFrame:
    """The trained models, best validation macro-AUROC first.

    Returns:
        Columns `model`, `valid_macro_auroc`, `key` (of the fit), one row a candidate.

    Raises:
        StageMissing: a candidate has not been trained.
    """
    rows = []
    for name in candidates:
        path = study.require(study.paths.saved(name) / "run.json", f"stage 4 for {name}")
        run = json.loads(path.read_text())
        rows.append({"model": name, "valid_macro_auroc": run["valid_macro_auroc"], "key": run["key"]})
    return pd.DataFrame(rows).sort_values("valid_macro_auroc", ascending=False, ignore_index=True)


def concatenated(tables: Sequence[pd.DataFrame]) -> np.ndarray:
    """The members' probabilities side by side, (N, 7 × members) float32.

    Args:
        tables: prediction tables of the same images in the same order.

    Raises:
        StudyError: the tables are not of the same images.
    """
    for table in tables[1:]:
        if not table["image"].equals(tables[0]["image"]):
            raise StudyError("the members' prediction tables list different images; train all members on the same data")
    return np.concatenate([table[list(CLASSES)].to_numpy("float32") for table in tables], axis=1)


def mean_of(probabilities: np.ndarray) -> np.ndarray:
    """The plain mean of the members' probabilities: (N, 7 × members) to (N, 7)."""
    return probabilities.reshape(len(probabilities), -1, len(CLASSES)).mean(axis=1)


def trios(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """What every three of the models give together, joined by the plain mean.

    Args:
        tables: prediction tables of the same images, by the model's name.

    Returns:
        Prediction tables by the names of the three, in the order given, joined by ` + `.

    Raises:
        StudyError: as `predictions.average`.
    """
    return {
        " + ".join(names): predictions.average([tables[name] for name in names])
        for names in itertools.combinations(tables, 3)
    }


def fit_head(
    x: np.ndarray, y: np.ndarray, epochs: int, seed: int, held_out: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[keras.Model, pd.DataFrame]:
    """Fit the head for a fixed number of epochs, every class weighing the same.

    Args:
        x: (N, 7 × members) the members' probabilities for patients they were not trained on.
        y: (N, 7) one-hot classes.
        epochs: passes over `x`.
        seed: seeds the weights, the dropout and the order.
        held_out: (x, y) of other patients, measured after each epoch and never fitted.

    Returns:
        The head, and its history: `loss`, `accuracy` and, with `held_out`, `val_loss` and `val_accuracy`.
    """
    keras.utils.set_random_seed(seed)
    model = head(x.shape[1] // len(CLASSES))
    batches = tf.data.Dataset.from_tensor_slices((x, y, _row_weights(y))).shuffle(len(x), seed).batch(128)
    judged = None if held_out is None else tf.data.Dataset.from_tensors(held_out)
    # An epoch of such a head costs less than what Keras does around a step, hence all its steps at once.
    model.compile(
        keras.optimizers.Adam(3e-3),
        "categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,
        steps_per_execution=len(batches),
    )
    fitted = model.fit(batches, epochs=epochs, validation_data=judged, verbose=0, shuffle=False)
    return model, pd.DataFrame(fitted.history)


def _row_weights(y: np.ndarray) -> np.ndarray:
    """(N,) weights under which the classes weigh the same and a row weighs 1 on average."""
    return samples.class_weights(y)[y.argmax(axis=1)]


def fit_weights(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The weights of the members' mean with the smallest cross-entropy, every class weighing the same.

    Args:
        x: (N, 7 × members) the members' probabilities for patients they were not trained on.
        y: (N, 7) one-hot classes.

    Returns:
        (members,) weights, at least 0, with sum 1 (the linear opinion pool).
    """
    share = _row_weights(y) / len(y)
    each = x.reshape(len(x), -1, len(CLASSES))
    right, total = (each * y[:, None]).sum(axis=2), each.sum(axis=2)
    members = right.shape[1]

    def loss(weights: np.ndarray) -> float:
        # Probabilities of a class at a time are brought to sum 1; those of a softmax do already.
        return float(-(share * np.log((right @ weights + 1e-9) / (total @ weights + 1e-9))).sum())

    whole = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
    found = scipy.optimize.minimize(
        loss, np.full(members, 1 / members), bounds=[(0, 1)] * members, constraints=whole, method="SLSQP"
    )
    return (found.x.clip(0) / found.x.clip(0).sum()).astype("float32")


def fit_offsets(probabilities: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bias correction of the classes' log-odds, every class weighing the same (`calibration.fit_offsets`).

    Args:
        probabilities: (N, 7) for patients on whom nothing else was fitted.
        y: (N, 7) one-hot classes.

    Returns:
        (7,) float32 offsets with mean 0.
    """
    weights = _row_weights(y) / len(y)
    return calibration.fit_offsets(_log_odds(probabilities), y.argmax(axis=1), weights).astype("float32")


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    """The logits of probabilities, held within what float32 can tell from 0 and 1."""
    return scipy.special.logit(np.clip(probabilities.astype("float64"), *HELD))


def shifted(probabilities: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Probabilities after `offsets` were added to their log-odds: (N, 7)."""
    return scipy.special.expit(_log_odds(probabilities) + offsets).astype("float32")


def cross_validate_offsets(
    probabilities: np.ndarray, y: np.ndarray, single: np.ndarray, patients: np.ndarray, seed: int, folds: int = 5
) -> np.ndarray:
    """Probabilities shifted by offsets that were fitted on other patients: (N, 7).

    Args:
        probabilities: (N, 7).
        y: (N, 7) one-hot classes; zeros where an image has several labels.
        single: (N,) bool, the images that offsets may be fitted on.
        patients: (N,) patient of each row.
        seed: seeds the folds.
        folds: how many times offsets are fitted.
    """

    def answer(fit_on: np.ndarray, judge_on: np.ndarray) -> np.ndarray:
        return shifted(probabilities[judge_on], fit_offsets(probabilities[fit_on], y[fit_on]))

    return _out_of_fold(answer, folds_of(y, single, patients, seed, folds))


def folds_of(
    y: np.ndarray, single: np.ndarray, patients: np.ndarray, seed: int, folds: int = 5
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which rows each fold fits on (single-label ones) and which it judges; no patient is on both sides.

    Args:
        y: (N, 7) one-hot classes; zeros where an image has several labels.
        single: (N,) bool, the images that may be fitted on; the others are only predicted.
        patients: (N,) patient of each row.
        seed: seeds the folds.
        folds: how many.

    Returns:
        For each fold the positions to fit on and those to judge; every row is judged once.
    """
    strata = np.where(single, y.argmax(axis=1), len(CLASSES))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return [(fit_on[single[fit_on]], judge_on) for fit_on, judge_on in splitter.split(y, strata, patients)]


def _out_of_fold(
    answer: Callable[[np.ndarray, np.ndarray], np.ndarray], folds: Sequence[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """What `answer(fit_on, judge_on)` gives for the rows that each fold judges, put together: (N, 7) float32."""
    out = np.zeros((sum(len(judge_on) for _, judge_on in folds), len(CLASSES)), "float32")
    for fit_on, judge_on in folds:
        out[judge_on] = answer(fit_on, judge_on)
    return out


def cross_validate(
    x: np.ndarray, y: np.ndarray, single: np.ndarray, patients: np.ndarray, epochs: int, seed: int, folds: int = 5
) -> tuple[np.ndarray, pd.DataFrame]:
    """The head's predictions for patients that it was not fitted on.

    Args:
        x: (N, 7 × members) the members' probabilities.
        y: (N, 7) one-hot classes; zeros where an image has several labels.
        single: (N,) bool, the images that a head may be fitted on.
        patients: (N,) patient of each row.
        epochs: passes of each fit.
        seed: seeds folds and fits.
        folds: how many heads are fitted.

    Returns:
        Out-of-fold probabilities (N, 7), and the mean history over folds, one row an epoch.
    """
    histories = []

    def answer(fit_on: np.ndarray, judge_on: np.ndarray) -> np.ndarray:
        judged = judge_on[single[judge_on]]
        model, history = fit_head(x[fit_on], y[fit_on], epochs, seed, held_out=(x[judged], y[judged]))
        histories.append(history)
        return model(x[judge_on], training=False).numpy()

    out = _out_of_fold(answer, folds_of(y, single, patients, seed, folds))
    mean = pd.concat(histories).groupby(level=0).mean()
    return out, mean.assign(epoch=mean.index + 1)


def cross_validate_weights(
    x: np.ndarray, y: np.ndarray, single: np.ndarray, patients: np.ndarray, seed: int, folds: int = 5
) -> np.ndarray:
    """The weighted mean's predictions for patients on whom its weights were not fitted: (N, 7).

    Args:
        x: (N, 7 × members) the members' probabilities.
        y: (N, 7) one-hot classes; zeros where an image has several labels.
        single: (N,) bool, the images that weights may be fitted on.
        patients: (N,) patient of each row.
        seed: seeds the folds.
        folds: how many times weights are fitted.
    """

    def answer(fit_on: np.ndarray, judge_on: np.ndarray) -> np.ndarray:
        weights = fit_weights(x[fit_on], y[fit_on])
        return np.einsum("m,nmk->nk", weights, x[judge_on].reshape(len(judge_on), -1, len(CLASSES)))

    return _out_of_fold(answer, folds_of(y, single, patients, seed, folds))

"""Ensembling: ranking of candidates, and the head, weights and offsets that join the members.

Members are chosen by validation macro-AUROC. What joins them is fitted on their predictions for validation patients,
whom no member was trained on, and is judged by patient-grouped cross-validation against the plain mean.
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

from chestxray.config import CLASSES, MODELS, Study, StudyError
from chestxray.evaluation import calibration, predictions
from chestxray.networks.ensemble import CLIPPED, head
from chestxray.training import samples

CANDIDATES = tuple(name for name in MODELS if name != "ensemble")


def rank(study: Study) -> pd.DataFrame:
    """The trained models, best validation macro-AUROC first.

    Returns:
        Columns `model`, `valid_macro_auroc`, `key` (of the fit), one row per candidate.

    Raises:
        StageMissing: a candidate has not been trained.
    """
    rows = []
    for name in CANDIDATES:
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
    """Predictions of every three of the models, joined by the plain mean.

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
    """Fit the head for a fixed number of epochs, with the same total weight for every class.

    Args:
        x: (N, 7 × members) the members' probabilities for patients they were not trained on.
        y: (N, 7) one-hot classes.
        epochs: passes over `x`.
        seed: seeds the weights, the dropout and the order.
        held_out: (x, y) of other patients, evaluated after each epoch and never fitted.

    Returns:
        The head, and its history: `loss`, `accuracy` and, with `held_out`, `val_loss` and `val_accuracy`.
    """
    keras.utils.set_random_seed(seed)
    model = head(x.shape[1] // len(CLASSES))
    batches = tf.data.Dataset.from_tensor_slices((x, y, _row_weights(y))).shuffle(len(x), seed).batch(128)
    judged = None if held_out is None else tf.data.Dataset.from_tensors(held_out)
    # An epoch of such a head costs less than Keras's overhead of a step, hence all its steps at once.
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
    """(N,) weights with mean 1 and the same sum for every class."""
    return samples.class_weights(y)[y.argmax(axis=1)]


def fit_weights(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The weights of the members' mean with the smallest cross-entropy, with the same total weight for every class.

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
        # One sigmoid per class: probabilities are normalised to sum 1, which a softmax's are already.
        return float(-(share * np.log((right @ weights + 1e-9) / (total @ weights + 1e-9))).sum())

    whole = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
    found = scipy.optimize.minimize(
        loss, np.full(members, 1 / members), bounds=[(0, 1)] * members, constraints=whole, method="SLSQP"
    )
    return (found.x.clip(0) / found.x.clip(0).sum()).astype("float32")


def fit_offsets(probabilities: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bias correction of the classes' log-odds, with the same total weight for every class (`calibration.fit_offsets`).

    Args:
        probabilities: (N, 7) for patients on whom nothing else was fitted.
        y: (N, 7) one-hot classes.

    Returns:
        (7,) float32 offsets with mean 0.
    """
    weights = _row_weights(y) / len(y)
    return calibration.fit_offsets(_log_odds(probabilities), y.argmax(axis=1), weights).astype("float32")


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    """The logits of probabilities, clipped to what float32 distinguishes from 0 and 1."""
    return scipy.special.logit(np.clip(probabilities.astype("float64"), *CLIPPED))


def shifted(probabilities: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Probabilities after `offsets` were added to their log-odds: (N, 7).

    Args:
        probabilities: (N, 7), 0 to 1.
        offsets: (7,), one per class.
    """
    return scipy.special.expit(_log_odds(probabilities) + offsets).astype("float32")


Folds = Sequence[tuple[np.ndarray, np.ndarray]]
"""For each fold the rows to fit on and the rows to predict."""


def folds_of(y: np.ndarray, single: np.ndarray, patients: np.ndarray, seed: int, folds: int = 5) -> Folds:
    """Folds of patients: none is on both sides, and every row is predicted once.

    Args:
        y: (N, 7) one-hot classes; zeros where an image has several labels.
        single: (N,) bool, the images that may be fitted on; the others are only predicted.
        patients: (N,) patient of each row.
        seed: seeds the folds.
        folds: how many.
    """
    strata = np.where(single, y.argmax(axis=1), len(CLASSES))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return [(fit_on[single[fit_on]], judge_on) for fit_on, judge_on in splitter.split(y, strata, patients)]


def _out_of_fold(predict: Callable[[np.ndarray, np.ndarray], np.ndarray], folds: Folds) -> np.ndarray:
    """What `predict(fit_on, judge_on)` returns for each fold, put together: (N, 7) float32."""
    out = np.zeros((sum(len(judge_on) for _, judge_on in folds), len(CLASSES)), "float32")
    for fit_on, judge_on in folds:
        out[judge_on] = predict(fit_on, judge_on)
    return out


def cross_validate(
    x: np.ndarray, y: np.ndarray, single: np.ndarray, folds: Folds, epochs: int, seed: int
) -> tuple[np.ndarray, pd.DataFrame]:
    """The head's predictions for patients that it was not fitted on.

    Args:
        x: (N, 7 × members) the members' probabilities.
        y: (N, 7) one-hot classes; zeros where an image has several labels.
        single: (N,) bool, the images that the history is of.
        folds: of `folds_of`.
        epochs: passes of each fit.
        seed: seeds the fits.

    Returns:
        Out-of-fold probabilities (N, 7), and the mean history over folds, one row per epoch.
    """
    histories = []

    def predict(fit_on: np.ndarray, judge_on: np.ndarray) -> np.ndarray:
        judged = judge_on[single[judge_on]]
        model, history = fit_head(x[fit_on], y[fit_on], epochs, seed, held_out=(x[judged], y[judged]))
        histories.append(history)
        return model(x[judge_on], training=False).numpy()

    out = _out_of_fold(predict, folds)
    mean = pd.concat(histories).groupby(level=0).mean()
    return out, mean.assign(epoch=mean.index + 1)


def cross_validate_weights(x: np.ndarray, y: np.ndarray, folds: Folds) -> np.ndarray:
    """The weighted mean's predictions for patients on whom its weights were not fitted: (N, 7).

    Args:
        x: (N, 7 × members) the members' probabilities.
        y: (N, 7) one-hot classes; zeros where an image has several labels.
        folds: of `folds_of`.
    """

    def predict(fit_on: np.ndarray, judge_on: np.ndarray) -> np.ndarray:
        weights = fit_weights(x[fit_on], y[fit_on])
        return np.einsum("m,nmk->nk", weights, x[judge_on].reshape(len(judge_on), -1, len(CLASSES)))

    return _out_of_fold(predict, folds)


def cross_validate_offsets(probabilities: np.ndarray, y: np.ndarray, folds: Folds) -> np.ndarray:
    """Probabilities shifted by offsets that were fitted on other patients: (N, 7).

    Args:
        probabilities: (N, 7).
        y: (N, 7) one-hot classes; zeros where an image has several labels.
        folds: of `folds_of`.
    """

    def predict(fit_on: np.ndarray, judge_on: np.ndarray) -> np.ndarray:
        return shifted(probabilities[judge_on], fit_offsets(probabilities[fit_on], y[fit_on]))

    return _out_of_fold(predict, folds)

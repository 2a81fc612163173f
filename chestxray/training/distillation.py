"""Generalized distillation: training labels softened by the patient's other visits and by out-of-fold predictions.

A label of ChestX-ray14 was mined from one report. The patient's other visits give a prior for it, image features give
a prediction by models fitted on other patients, and a network learns from the label mixed with both: generalized
distillation (Lopez-Paz et al., ICLR 2016) of privileged information (Vapnik & Vashist, Neural Networks 22, 2009).
Patients of validation and test contribute neither rows nor labels.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
import scipy.special
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from chestxray.config import Study, StudyError
from chestxray.data import nih_tables, own_tables
from chestxray.data.manifest import read_manifest
from chestxray.training import ridge
from chestxray.training.samples import Samples, finding_targets

REACH: tuple[float, ...] = (1.0, 4.0, 1000.0)
"""Over how many visits another visit's weight falls to 1/e: the nearest ones, a few, and all visits alike."""

_PRIOR_WEIGHT = 0.5
"""Weight of a finding's overall share beside the other visits; an adjacent visit weighs 1/e to 1."""

_FLOOR = 0.02
"""Added to shares before their log-odds are taken."""

_CLIP = (0.003, 0.997)
"""Range to which probabilities are clipped before their log-odds are taken."""


class SoftLabels(NamedTuple):
    """Probabilities that soften the labels of training radiographs; each (N, 15) float32 in 0–1, as `ALL_LABELS`.

    Attributes:
        prior: from the patient's other visits.
        image: from the radiograph's features, by a regression fitted on other patients.
        combined: from both.
    """

    prior: np.ndarray
    image: np.ndarray
    combined: np.ndarray


def distil(
    study: Study, samples: Samples, features: np.ndarray, penalty: float, weight: float
) -> tuple[SoftLabels, Samples]:
    """Predict the labels of training radiographs from both sources, and soften the labels by the predictions.

    Args:
        study: the study; stage 2.1 has run.
        samples: radiographs of the training split, with labels (N, 15) as 0 and 1.
        features: (V × N, C) their features in V versions, such as the radiographs and then their mirror images.
        penalty: of the regression on features, as `ridge.fit` takes it; above 0.
        weight: of the predictions beside the labels, 0 to 1, as `soften` takes it.

    Returns:
        The predictions, and the same radiographs with softer targets.

    Raises:
        StageMissing, StudyError: as `load_prior`.
    """
    prior = load_prior(study, samples)
    versions = len(features) // len(samples)
    targets = np.tile(soften(samples, prior, weight).y, (versions, 1))
    patients = np.tile(samples.table["patient"].to_numpy(), versions)
    predicted = ridge.out_of_fold(features, targets, penalty, patients)
    image = predicted.reshape(versions, *samples.y.shape).mean(axis=0)
    combined = combine(prior, image, samples)
    return SoftLabels(prior, image, combined), soften(samples, combined, weight)


def fingerprint(study: Study) -> str:
    """Twelve hexadecimal digits that change with the image table, its label map, the lists and the split."""
    raw = study.paths.raw
    more = [*(own_tables.in_any_case(raw, name) for name in nih_tables.LIST_NAMES), study.paths.labels]
    return _digest(nih_tables.find_table(raw), *(path for path in more if path.is_file()), study.paths.manifest)[:12]


def load_prior(study: Study, samples: Samples) -> np.ndarray:
    """The prior from other visits for training radiographs, computed once and cached under the dataset's folder.

    Rows of the image table whose image is not here contribute too, as far as their patients are neither in validation
    nor in test, nor on the official test list.

    Args:
        study: the study; stage 2.1 has run.
        samples: radiographs of the training split.

    Returns:
        (N, 15) float32 in 0–1, in the order of `samples` and of `ALL_LABELS`.

    Raises:
        StageMissing: stage 2.1 has not been run.
        StudyError: a sample is of a patient in validation or test, or the table lacks its row.
    """
    manifest = read_manifest(study.paths)
    entries, lists = nih_tables.read_dataset(study.paths)
    tested = entries.table["patient"][entries.table["image"].isin(lists[1] if lists else set())]
    excluded = {*manifest["patient"][manifest["split"].isin(("valid", "test"))], *tested}
    contributed = entries.table[~entries.table["patient"].isin(excluded)]
    positions = pd.Series(np.arange(len(contributed)), index=contributed["image"]).reindex(samples.table["image"])
    if positions.isna().any():
        image = positions.index[positions.isna()][0]
        raise StudyError(
            f"{entries.source}: no row of a training patient for {image!r}; run stage 2.1 again with this table"
        )
    cached = joblib.Memory(study.paths.cache, verbose=0).cache(_fit_prior, ignore=["table"])
    code = _digest(Path(__file__), Path(ridge.__file__))
    return cached(contributed, fingerprint(study), code)[positions.to_numpy("int64")]


def _fit_prior(table: pd.DataFrame, source: str, code: str) -> np.ndarray:
    """`fit_prior`, to be cached under the digests of the files that the table follows from and of the code."""
    return fit_prior(table)


def fit_prior(table: pd.DataFrame) -> np.ndarray:
    """The probability of each label of each row of an image table, without the row's own labels.

    One logistic regression per label, on the labels of the patient's other visits, near and far, and on age, sex, view
    position and the number of the visit. The regressions that predict for a patient were fitted on other patients.

    Args:
        table: rows with the columns `nih_tables.TABLE_COLUMNS`, of patients of the training split, with a unique index.

    Returns:
        (N, 15) float32 in 0–1, in the table's order and that of `ALL_LABELS`. A label that no row or every row has
        stays 0 or 1.

    Raises:
        StudyError: the rows are of fewer than two patients.
    """
    ordered = table.sort_values(["patient", "follow_up", "image"])
    if ordered["patient"].nunique() < 2:
        raise StudyError("the image table has fewer than two patients to train on; add images of others")
    labels = finding_targets(ordered["findings"])
    covariates = _covariates(ordered, labels)
    prior = np.zeros_like(labels)
    for fitted, predicted in ridge.folds(ordered["patient"].to_numpy()):
        prior[predicted] = _regress(covariates[fitted], labels[fitted], covariates[predicted], penalty=10)
    return prior[np.argsort(table.index.get_indexer(ordered.index))]


def combine(prior: np.ndarray, image: np.ndarray, samples: Samples) -> np.ndarray:
    """Combine the prior from other visits with the out-of-fold predictions from image features.

    Args:
        prior: (N, 15) of `load_prior`, 0 to 1.
        image: (N, 15) probabilities by models fitted on other patients than each radiograph's own, as
            `ridge.out_of_fold` gives them.
        samples: the radiographs, with labels (N, 15) as 0 and 1.

    Returns:
        (N, 15) float32 in 0–1, by one logistic regression per label on both log-odds, again fitted on other patients.
    """
    log_odds = np.column_stack([scipy.special.logit(part.clip(*_CLIP)) for part in (prior, image)])
    combined = np.zeros_like(prior)
    for fitted, predicted in ridge.folds(samples.table["patient"].to_numpy()):
        combined[predicted] = _regress(log_odds[fitted], samples.y[fitted], log_odds[predicted], penalty=100)
    return combined


def soften(samples: Samples, predicted: np.ndarray, weight: float) -> Samples:
    """The same radiographs with targets between their labels and predicted probabilities.

    Args:
        samples: radiographs with labels (N, 15) as 0 and 1.
        predicted: (N, 15) in 0–1.
        weight: of the predictions, 0 (the labels alone) to 1.

    Raises:
        StudyError: the weight is not in 0 to 1.
    """
    if not 0 <= weight <= 1:
        raise StudyError(f"weight {weight}: give 0 (the labels alone) to 1 (the predictions alone)")
    return samples.with_targets((1 - weight) * samples.y + weight * predicted)


def _regress(features: np.ndarray, labels: np.ndarray, others: np.ndarray, penalty: float) -> np.ndarray:
    """Probabilities of the labels for other rows, by penalised logistic regressions; constant labels stay so."""
    predicted = np.zeros((len(others), labels.shape[1]), "float32")
    for column, present in enumerate(labels.T > 0):
        if present.all() or not present.any():
            predicted[:, column] = present[0]
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=300))
        predicted[:, column] = model.fit(features, present).predict_proba(others)[:, 1]
    return predicted


def _covariates(table: pd.DataFrame, labels: np.ndarray) -> np.ndarray:
    """What is known of each row without its own labels, (N, 3 × 15 + 7) float32.

    Args:
        table: rows sorted by patient and visit.
        labels: (N, 15) zeros and ones.
    """
    patients = table["patient"].to_numpy()
    first = np.flatnonzero(np.r_[True, patients[1:] != patients[:-1]])
    visits = np.diff([*first, len(table)])
    overall = labels.mean(axis=0)
    shares = np.tile(overall, (len(REACH), len(table), 1))
    for start, count in zip(first[visits > 1], visits[visits > 1], strict=True):
        rows = slice(start, start + count)
        distance = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
        for k, reach in enumerate(REACH):
            weights = np.exp(-distance / reach) * (distance > 0)
            present = weights @ labels[rows] + _PRIOR_WEIGHT * overall
            shares[k, rows] = present / (weights.sum(axis=1, keepdims=True) + _PRIOR_WEIGHT)
    others = np.repeat(visits - 1, visits)
    visit = np.arange(len(table)) - np.repeat(first, visits)
    age = table["age"].astype("Float64").to_numpy("float64", na_value=np.nan)
    log_odds = scipy.special.logit((shares + _FLOOR) / (1 + 2 * _FLOOR))
    return np.column_stack(
        [
            *log_odds,
            np.where(np.isnan(age), np.nanmean(age) if np.isfinite(age).any() else 0.0, age),
            table["sex"].eq("M"),
            table["view"].eq("AP"),
            table["follow_up"].clip(upper=20),
            visit == 0,
            visit == others,
            np.log1p(others),
        ]
    ).astype("float32")


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()

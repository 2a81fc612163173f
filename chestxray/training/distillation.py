"""What a patient's other visits say of a radiograph, as softer targets than the words of one report.

The labels of ChestX-ray14 were mined from one report a radiograph, and say what that report mentions. The same
patient's other visits tell more: a heart that was large last month is large today. A network that learns from that
expectation, mixed with the label, is taught by what it will not be shown: generalized distillation (Lopez-Paz et al.,
ICLR 2016) of privileged information (Vapnik & Vashist, Neural Networks 22, 2009).

This module owns that expectation. It reads the image table, also the rows whose image is not here, and knows no pixels.
Patients of validation and test lend it nothing, neither rows nor labels.
"""

from __future__ import annotations

import hashlib
import sys
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.special
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from chestxray import kept
from chestxray.config import Study, StudyError
from chestxray.data import nih_tables
from chestxray.data.manifest import read_manifest
from chestxray.training import ridge
from chestxray.training.samples import Samples, finding_targets

REACH: tuple[float, ...] = (1.0, 4.0, 1000.0)
"""Over how many visits another visit's weight falls to 1/e: the neighbours, the season, and all visits alike."""

_PRIOR_WEIGHT = 0.5
"""What the usual share of a finding weighs beside the other visits; a visit next door weighs 1/e to 1."""

_FLOOR = 0.02
"""Added to shares before their log-odds are taken."""

_HELD = (0.003, 0.997)
"""How near to 0 and 1 an expectation may come before its log-odds are taken."""


class Teacher(NamedTuple):
    """What softens the labels of training radiographs; each (N, 15) float32 in 0–1, in the order of `ALL_LABELS`.

    Attributes:
        expected: what the other visits let expect.
        seen: what a regression on features, fitted on other patients, sees in the radiograph.
        joined: both together.
    """

    expected: np.ndarray
    seen: np.ndarray
    joined: np.ndarray


def teach(
    study: Study, samples: Samples, features: np.ndarray, penalty: float, weight: float
) -> tuple[Teacher, Samples]:
    """Ask both witnesses about the training radiographs, and soften the labels by what they say.

    Args:
        study: the study; stage 2.1 has run.
        samples: radiographs of the training split, with answers (N, 15) as 0 and 1.
        features: (V × N, C) their features in V versions, such as the radiographs and then their mirror images.
        penalty: of the regression on features, as `linear.fit` takes it.
        weight: of the witnesses beside the labels, as `soften` takes it.

    Returns:
        The witnesses, and the same radiographs with softer targets.

    Raises:
        StageMissing, StudyError: as `expect`.
    """
    expected = expect(study, samples)
    versions = len(features) // len(samples)
    targets = np.tile(soften(samples, expected, weight).y, (versions, 1))
    patients = np.tile(samples.table["patient"].to_numpy(), versions)
    told = ridge.out_of_fold(features, targets, penalty, patients)
    seen = told.reshape(versions, *samples.y.shape).mean(axis=0)
    joined = join(expected, seen, samples)
    return Teacher(expected, seen, joined), soften(samples, joined, weight)


def fingerprint(study: Study) -> str:
    """Twelve hexadecimal digits that change when the image table or the official lists do, or who is in which split."""
    digest = hashlib.sha256()
    raw = study.paths.raw
    lists = [raw / name for name in nih_tables.LIST_NAMES]
    for path in (nih_tables.find_table(raw), *(path for path in lists if path.is_file()), study.paths.manifest):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def expect(study: Study, samples: Samples) -> np.ndarray:
    """How probable each answer is for training radiographs, before the radiograph and its report are seen.

    The table's rows of images that are not here teach too, as far as their patients are neither in validation nor in
    test, nor on the official test list. It is computed once and kept in the dataset's cache.

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
    entries, lists = nih_tables.read_entries(study.paths.raw), nih_tables.read_lists(study.paths.raw)
    tested = entries.table["patient"][entries.table["image"].isin(lists[1] if lists else set())]
    elsewhere = {*manifest["patient"][manifest["split"].isin(("valid", "test"))], *tested}
    lent = entries.table[~entries.table["patient"].isin(elsewhere)]
    places = pd.Series(np.arange(len(lent)), index=lent["image"]).reindex(samples.table["image"])
    if places.isna().any():
        image = places.index[places.isna()][0]
        raise StudyError(
            f"{entries.source}: no row of a training patient for {image!r}; run stage 2.1 again with this table"
        )
    made_from = [entries.source, sys.modules[__name__], sorted(elsewhere)]
    expected = kept.array(study.paths.cache, "other_visits", made_from, lambda: expectation(lent))
    return expected[places.to_numpy("int64")]


def expectation(table: pd.DataFrame) -> np.ndarray:
    """How probable each answer is for each row of an image table, were its own label not known.

    A logistic regression an answer, from the labels of the patient's other visits, near and far, and from age, sex,
    view position and the number of the visit. The regressions that speak for a patient were fitted on other patients.

    Args:
        table: rows with the columns `metadata.TABLE_COLUMNS`, of patients who may teach, with an index that tells the
            rows apart.

    Returns:
        (N, 15) float32 in 0–1, in the table's order and that of `ALL_LABELS`. An answer that nobody or everybody gives
        stays 0 or 1.

    Raises:
        StudyError: the rows are of fewer than two patients.
    """
    ordered = table.sort_values(["patient", "follow_up", "image"])
    if ordered["patient"].nunique() < 2:
        raise StudyError("the image table has fewer than two patients to train on; add images of others")
    answers = finding_targets(ordered["findings"])
    described = _describe(ordered, answers)
    expected = np.zeros_like(answers)
    for fitted, judged in ridge.folds(ordered["patient"].to_numpy()):
        expected[judged] = _regress(described[fitted], answers[fitted], described[judged], penalty=10)
    return expected[np.argsort(table.index.get_indexer(ordered.index))]


def join(expected: np.ndarray, seen: np.ndarray, samples: Samples) -> np.ndarray:
    """Join what the other visits let expect with what networks fitted on other patients see in the radiograph.

    Args:
        expected: (N, 15) of `expect`.
        seen: (N, 15) probabilities by models that were fitted on other patients than each radiograph's own, as
            `linear.out_of_fold` gives them.
        samples: the radiographs, with answers (N, 15) as 0 and 1.

    Returns:
        (N, 15) float32 in 0–1, by a logistic regression an answer, again fitted on other patients.
    """
    both = np.column_stack([scipy.special.logit(part.clip(*_HELD)) for part in (expected, seen)])
    joined = np.zeros_like(expected)
    for fitted, judged in ridge.folds(samples.table["patient"].to_numpy()):
        joined[judged] = _regress(both[fitted], samples.y[fitted], both[judged], penalty=100)
    return joined


def soften(samples: Samples, expected: np.ndarray, weight: float) -> Samples:
    """The same radiographs with targets between their labels and what was expected.

    Args:
        samples: radiographs with answers (N, 15) as 0 and 1.
        expected: (N, 15) in 0–1.
        weight: of what was expected, 0 (the labels alone) to 1.

    Raises:
        StudyError: the weight is not in 0 to 1.
    """
    if not 0 <= weight <= 1:
        raise StudyError(f"weight {weight}: give 0 (the labels alone) to 1 (what was expected alone)")
    return samples.with_targets((1 - weight) * samples.y + weight * expected)


def _regress(described: np.ndarray, answers: np.ndarray, others: np.ndarray, penalty: float) -> np.ndarray:
    """Probabilities of the answers for other rows, by penalised logistic regressions; constant answers stay so."""
    told = np.zeros((len(others), answers.shape[1]), "float32")
    for place, said in enumerate(answers.T > 0):
        if said.all() or not said.any():
            told[:, place] = said[0]
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=300))
        told[:, place] = model.fit(described, said).predict_proba(others)[:, 1]
    return told


def _describe(table: pd.DataFrame, answers: np.ndarray) -> np.ndarray:
    """What is known of each row without its own label, (N, 3 × 15 + 7) float32.

    Args:
        table: rows sorted by patient and visit.
        answers: (N, 15) zeros and ones.
    """
    patients = table["patient"].to_numpy()
    first = np.flatnonzero(np.r_[True, patients[1:] != patients[:-1]])
    visits = np.diff([*first, len(table)])
    usual = answers.mean(axis=0)
    shares = np.tile(usual, (len(REACH), len(table), 1))
    for start, count in zip(first[visits > 1], visits[visits > 1], strict=True):
        rows = slice(start, start + count)
        apart = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
        for near, reach in enumerate(REACH):
            weights = np.exp(-apart / reach) * (apart > 0)
            told = weights @ answers[rows] + _PRIOR_WEIGHT * usual
            shares[near, rows] = told / (weights.sum(axis=1, keepdims=True) + _PRIOR_WEIGHT)
    others = np.repeat(visits - 1, visits)
    place = np.arange(len(table)) - np.repeat(first, visits)
    age = table["age"].astype("Float64").to_numpy("float64", na_value=np.nan)
    log_odds = scipy.special.logit((shares + _FLOOR) / (1 + 2 * _FLOOR))
    return np.column_stack(
        [
            *log_odds,
            np.where(np.isnan(age), np.nanmean(age) if np.isfinite(age).any() else 0.0, age),
            table["sex"].eq("M"),
            table["view"].eq("AP"),
            table["follow_up"].clip(upper=20),
            place == 0,
            place == others,
            np.log1p(others),
        ]
    ).astype("float32")

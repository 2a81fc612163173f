"""The committed reference: what a finished run on real radiographs leaves for readers of the repository.

It owns which files of a run are committed under `5_results/reference/`, and the small form of the ensemble there. It
trains and evaluates nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from chestxray import files, inputs, training
from chestxray.config import REFERENCE, Study, StudyError
from chestxray.evaluation import MODELS

LARGEST = 40_000_000
"""Bytes that the committed ensemble may have."""

MODEL_FILES = ("run.json", "history.csv", "predictions_valid.csv", "predictions_test.csv")
RESULT_SUFFIXES = {".csv", ".json", ".png"}


@dataclass(frozen=True)
class Published:
    """What was written.

    Attributes:
        files: how many files.
        ensemble_bytes: size of the committed ensemble.
        departure: largest absolute difference of a probability between it and the ensemble as trained, on validation.
    """

    files: int
    ensemble_bytes: int
    departure: float


def publish(study: Study, target: Path = REFERENCE) -> Published:
    """Copy a finished run's numbers and figures, and its ensemble with kernels in float16, to the reference.

    Args:
        study: the study whose stages 4 and 5 have been run.
        target: the folder to fill; what another run left there is replaced.

    Raises:
        StageMissing: a model or the results are missing.
        StudyError: the run is one on phantoms, or the ensemble is larger than `LARGEST`.
    """
    if study.is_phantom:
        raise StudyError("dataset 'phantom': the reference is of real radiographs; give --dataset a folder of them")
    results = study.paths.results
    study.require(results / "metrics.csv", "stage 5")
    copies = {path.name: path for path in sorted(results.iterdir()) if path.suffix in RESULT_SUFFIXES}
    copies = {name: path for name, path in copies.items() if not name.startswith(".")}
    for model in MODELS:
        for name in MODEL_FILES:
            copies[f"{model}/{name}"] = study.require(study.paths.saved(model) / name, f"stage 4 for {model}")
    whole = keras.models.load_model(
        study.require(study.paths.saved("ensemble") / "model.keras", "stage 4.4"), compile=False
    )
    ensemble = target / "ensemble.keras"
    beside = target.with_name(f".{target.name}.tmp-ensemble.keras")
    try:
        training.save_model(whole, beside, half=True)
        size = beside.stat().st_size
        if size > LARGEST:
            raise StudyError(
                f"{ensemble.name}: {size / 1e6:.0f} MB, more than {LARGEST / 1e6:.0f} MB; join smaller members"
            )
        departure = _departure(whole, keras.models.load_model(beside, compile=False), study)
        if target.exists():
            shutil.rmtree(target)
        for name, source in copies.items():
            files.make_folder((target / name).parent)
            files.atomic_write(target / name, source.read_bytes())
        beside.replace(ensemble)
    finally:
        beside.unlink(missing_ok=True)
    return Published(len(copies) + 1, size, departure)


def _departure(whole: keras.Model, small: keras.Model, study: Study) -> float:
    samples = inputs.load_split(study, "valid")
    scores = [training.predict_batches(model, samples) for model in (whole, small)]
    return float(np.abs(scores[0] - scores[1]).max())

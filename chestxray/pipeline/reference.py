"""The committed reference: what a finished run on real radiographs leaves for readers of the repository.

It owns which files of a run are committed under `5_results/reference/`, and the small form of the ensemble there. It
trains and evaluates nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import keras
import numpy as np

from chestxray import files
from chestxray.config import MODELS, REFERENCE, Study, StudyError
from chestxray.data import manifest
from chestxray.training import model_file
from chestxray.training.samples import load_split, predict

LARGEST = 40_000_000
"""Bytes that the committed ensemble may have."""

MODEL_FILES = ("run.json", "history.csv", "predictions_valid.csv", "predictions_test.csv")


def publish(study: Study, target: Path = REFERENCE) -> tuple[int, int, float]:
    """Copy a finished run's numbers and figures, and its ensemble with kernels in float16, to the reference.

    Args:
        study: the study whose stages 4 and 5 have been run.
        target: the folder to fill; what another run left there is replaced.

    Returns:
        How many files were written; bytes of the committed ensemble; and the largest absolute difference of a
        probability between it and the ensemble as trained, on validation.

    Raises:
        StageMissing: a model or the results are missing.
        StudyError: the run is one on phantoms, or the ensemble is larger than `LARGEST`.
    """
    if study.is_phantom:
        raise StudyError("dataset 'phantom': the reference is of real radiographs; give --dataset a folder of them")
    results = study.paths.results
    study.require(results / "metrics.csv", "stage 5")
    copies = {path.name: path for path in results.glob("[!.]*") if path.suffix in {".csv", ".json", ".png"}}
    for model in MODELS:
        for name in MODEL_FILES:
            copies[f"{model}/{name}"] = study.require(study.paths.saved(model) / name, f"stage 4 for {model}")
    trained = study.require(study.paths.saved("ensemble") / "model.keras", "stage 4.4")
    whole = keras.models.load_model(trained, compile=False)
    ensemble = target / "ensemble.keras"
    beside = target.with_name(f".{target.name}.tmp-ensemble.keras")
    try:
        model_file.save_model(whole, beside, half=True)
        size = beside.stat().st_size
        if size > LARGEST:
            raise StudyError(
                f"{ensemble.name}: {size / 1e6:.0f} MB, more than {LARGEST / 1e6:.0f} MB; join smaller members"
            )
        samples = load_split(study, "valid")
        small = keras.models.load_model(beside, compile=False)
        exact, rounded = (predict(net, samples) for net in (whole, small))
        departure = max(np.abs(exact[name] - rounded[name]).max() for name in exact)
        if target.exists():
            shutil.rmtree(target)
        for name, source in copies.items():
            files.make_folder((target / name).parent)
            files.atomic_write(target / name, source.read_bytes())
        beside.replace(ensemble)
    finally:
        beside.unlink(missing_ok=True)
    return len(copies) + 1, size, float(departure)


def restore(study: Study, source: Path = REFERENCE) -> int:
    """Lay the reference out as stage 4 leaves its models, so that stage 5 can evaluate it again without training.

    Of the networks only the ensemble's is committed, in float16; its members are parts of it, and are laid out so. Of
    the other models there are predictions.

    Args:
        study: a study whose data were prepared as the reference's were.
        source: the reference.

    Returns:
        How many files were written.

    Raises:
        StageMissing: stage 2.1 has not been run.
        StudyError: the data are others than the reference's, or a model of another fit is there.
    """
    study.require(study.paths.manifest, "stages 1 and 2")
    prepared = manifest.prepared_fingerprint(study.paths)
    copies = {}
    for model in MODELS:
        run, there = json.loads((source / model / "run.json").read_text()), study.paths.saved(model) / "run.json"
        if run.get("prepared_fingerprint") != prepared:
            name, options = run["dataset"], f"--profile {run['parameters']['profile']} --seed {run['seed']}"
            raise StudyError(
                f"{study.paths.relative(study.paths.manifest)}: data with fingerprint {prepared}, the committed "
                f"reference is of other data, {name} with {run.get('prepared_fingerprint')}; run stages 1 and 2 on "
                f"{name} with {options}, or train anew"
            )
        if there.exists() and json.loads(there.read_text())["key"] != run["key"]:
            raise StudyError(f"{study.paths.relative(there)}: of another fit; move it away, or give another --root")
        copies |= {there.with_name(name): source / model / name for name in MODEL_FILES}
    copies[study.paths.saved("ensemble") / "model.keras"] = source / "ensemble.keras"
    written = {target: path for target, path in copies.items() if not target.exists()}
    members = json.loads((source / "ensemble" / "run.json").read_text())["members"]
    places = {study.paths.saved(member) / "model.keras": f"member_{n}" for n, member in enumerate(members, 1)}
    if missing := [place for place in places if not place.exists()]:
        whole = keras.models.load_model(source / "ensemble.keras", compile=False)
        for place in missing:
            files.make_folder(place.parent)
            model_file.save_model(whole.get_layer(places[place]), place)
    # The file that says that a folder is finished comes last.
    for target in sorted(written, key=lambda target: target.name == "run.json"):
        files.make_folder(target.parent)
        files.atomic_write(target, written[target].read_bytes())
    return len(written) + len(missing)

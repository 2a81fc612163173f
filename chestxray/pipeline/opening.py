"""Opening: what a notebook calls first, so that *Run all* finishes on any machine, with or without the data.

It decides which data and which profile a notebook works with, and has the runner execute what is missing of earlier
stages. Where the runner executes the notebook itself, the study is opened as its parameters say.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from chestxray.config import (
    NIH_9K,
    PROFILES,
    SOURCES,
    Paths,
    Profile,
    Study,
    StudyError,
    no_such_dataset,
    open_study,
    source_folder,
)
from chestxray.data import kaggle, sources, subset
from chestxray.images import pixels
from chestxray.pipeline import runner
from chestxray.pipeline.stages import STAGES, Stage

_DATA_FIELDS = ("image_size", "no_finding", "valid_share", "phantom_images")
"""The fields of a profile that the prepared data follow from."""

_SECONDS = 20
"""What a stage adds to a run of `quick` on phantoms, on average, on two cores, where two notebooks run at a time."""


def begin(number: str, dataset: str, profile: str, seed: int, overrides: dict[str, Any] | None = None) -> Study:
    """Open the study for a notebook, after running in the `quick` profile what is missing of earlier stages.

    Where the dataset is not to be had, phantoms take its place. What is prepared already is used as it is. Each of
    these is said in one line.

    Args:
        number: the notebook's stage, such as `4.1`.
        dataset: as in `open_study`.
        profile: as in `open_study`.
        seed: as in `open_study`.
        overrides: as in `open_study`; they hold in the `quick` profile too.

    Raises:
        StudyError: the profile or an override is unknown, `dataset` is a path where nothing is, or an earlier stage
            failed.
    """
    asked = open_study(dataset, profile, seed, overrides)
    if runner.STAGE_VARIABLE in os.environ:
        return asked
    reason, source = _reason_against(dataset, asked), dataset
    if reason:
        source = "phantom"
        print(f"{reason} Phantoms in the quick profile take its place; how to get it: 1_Datasets/README.md.")
    prepared = _prepared(asked.paths if source == dataset else Paths(source), asked.profile)
    changes = {**(overrides or {}), **prepared}
    quick = open_study(source, "quick", seed, changes)
    line = runner.Pipeline(quick, source, changes, runner.default_jobs("quick"), stream=sys.stdout)
    stage = next(one for one in STAGES if one.number == number)
    reads = set() if number == "2.1" else stage.inputs(quick.paths)  # 2.1 gets the raw data itself
    needed = [one for one in STAGES if reads & {*one.writes(quick.paths)}]
    missing = _missing(reads, quick.paths)
    other_size = bool(needed) and prepared.get("image_size", asked.profile.image_size) != asked.profile.image_size
    if source == dataset and not missing and not other_size and not any(map(line.ran, needed)):
        return asked
    if missing:
        line.look_ahead([*missing, stage])  # stops here where these radiographs cannot train what is to be trained
        size = "" if quick.is_phantom else " with phantoms, longer with more radiographs"
        print(
            f"Missing of earlier stages: {', '.join(one.number for one in missing)}. They are run now in the quick "
            f"profile, about {-(-_SECONDS * len(missing) // 60)} min on two cores{size}."
        )
        if not line.run(missing):
            failed = ", ".join(one.label for one in line.failed)
            raise StudyError(f"{failed} failed, as said above; mend it and run this cell again: it goes on there")
    if quick != asked:
        published = f"python -m chestxray run --dataset {dataset} --profile {profile}"
        print(f"Profile quick, {quick.data_note}. What the parameters say is run by: {published}")
    return quick


def _reason_against(dataset: str, study: Study) -> str:
    """Why the dataset is not to be had; empty where it is here. A published one is fetched where it can be.

    Raises:
        StudyError: it is a path, and nothing is there.
    """
    if study.is_phantom or study.paths.manifest.exists() or study.paths.raw.exists() or source_folder(dataset):
        return ""
    if os.sep in dataset or "/" in dataset:
        raise no_such_dataset(dataset)
    if dataset not in SOURCES:
        return f"{dataset}: there is no such dataset here."
    copy = subset.is_here() if dataset == NIH_9K else kaggle.find_copy(kaggle.DATASETS[dataset])
    if not copy and not kaggle.may_ask():
        return f"{dataset}: not here, not mounted, and no Kaggle account is known."
    try:
        sources.prepare_raw(dataset, study)
    except StudyError as error:
        return f"{error}."
    return ""


def _prepared(paths: Paths, asked: Profile) -> dict[str, Any]:
    """The fields that the data are prepared with, told by the images' side; none where they are not prepared.

    Args:
        paths: of the dataset.
        asked: the profile of the notebook's parameters, which is looked at before the others.
    """
    image = next(paths.store.glob("*.png"), None) if paths.manifest.exists() else None
    if image is None:
        return {}
    side = pixels.decode(image).shape[0]
    like = next((one for one in (asked, *PROFILES.values()) if one.image_size == side), None)
    return {"image_size": side} if like is None else {name: getattr(like, name) for name in _DATA_FIELDS}


def _missing(reads: set[Path], paths: Paths) -> list[Stage]:
    """The stages that have to be run for these files, in the order of the study."""
    wanted, found = {*reads}, []
    for one in reversed(STAGES):
        if any(path in wanted and not path.exists() for path in one.writes(paths)):
            found.insert(0, one)
            wanted |= one.inputs(paths)
    return found

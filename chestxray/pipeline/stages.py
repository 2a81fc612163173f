"""The stages of the study: their numbers and names, their notebooks, and the files that each takes and leaves.

It owns the order of the study and nothing else: it knows neither how a stage is run nor what happens inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from chestxray.config import MODELS, Paths, StudyError

Files = Callable[[Paths], list[Path]]

MODEL_FILES = ("model.keras", "history.csv", "predictions_valid.csv", "predictions_test.csv", "run.json")
"""What a model's notebook leaves in the model's folder."""


@dataclass(frozen=True)
class Stage:
    """One step of the study.

    Attributes:
        number: what it is called on the command line: `2.1`, `4.3a`.
        name: its other name there: `trees`, `cnn`.
        title: what it is called in progress and messages.
        notebook: its notebook's path in the repository; empty for stage 1, which has none.
        reads: the files it takes from earlier stages.
        writes: the files it leaves for later ones.
        reads_raw: whether it reads the raw data as well.
        alongside: whether it may run while others of this kind run.
        unpackable: whether an archive of the prepared dataset, unpacked, stands for having run it.
    """

    number: str
    name: str
    title: str
    notebook: str = ""
    reads: Files = lambda paths: []
    writes: Files = lambda paths: []
    reads_raw: bool = False
    alongside: bool = False
    unpackable: bool = False

    @property
    def trains(self) -> bool:
        """Whether it trains a model or prepares training."""
        return self.number == "2.2" or self.number.startswith("4.")

    def inputs(self, paths: Paths) -> set[Path]:
        """What it reads, the raw data included."""
        return {*self.reads(paths), *([paths.raw] if self.reads_raw else [])}

    @property
    def label(self) -> str:
        return f"{self.number} {self.title}"


def _predictions(paths: Paths, models: Sequence[str]) -> list[Path]:
    return [paths.saved(model) / f"predictions_{split}.csv" for model in models for split in ("valid", "test")]


def _model(folder: str, title: str, notebook: str) -> Stage:
    """A model's stage: numbered as its notebook is, titled as in the tables of results, without the number."""
    members = [other for other in MODELS if other != "ensemble"]
    ensemble = folder == "ensemble"
    return Stage(
        number="4." + Path(notebook).name.partition("_")[0],
        name=folder,
        title=title.partition(" ")[2],
        notebook=notebook,
        reads=lambda p: [p.manifest, *(_predictions(p, members) if ensemble else [p.augmented_rows])],
        writes=lambda p: [p.saved(folder) / file for file in MODEL_FILES],
        alongside=not ensemble,
    )


STAGES: tuple[Stage, ...] = (
    Stage("1", "data", "Raw data", writes=lambda p: [p.raw], unpackable=True),
    Stage(
        "2.1",
        "trees",
        "Train and test directories",
        "2_preprocessing/1_Creating_train_test_directories.ipynb",
        writes=lambda p: [p.manifest],
        reads_raw=True,
        unpackable=True,
    ),
    Stage(
        "2.2",
        "augment",
        "Augmented train data",
        "2_preprocessing/2_Creating_augmented_train_data.ipynb",
        reads=lambda p: [p.manifest],
        writes=lambda p: [p.augmented_rows],
    ),
    Stage(
        "3",
        "eda",
        "Exploratory data analysis",
        "3_EDA/Exploratory_data_analysis.ipynb",
        reads=lambda p: [p.manifest],
        reads_raw=True,
        alongside=True,
    ),
    *(_model(folder, title, notebook) for folder, (title, notebook) in MODELS.items()),
    Stage(
        "5",
        "results",
        "Results",
        "5_results/results_evaluation.ipynb",
        reads=lambda p: [
            p.manifest,
            *_predictions(p, list(MODELS)),
            *(p.saved(model) / "run.json" for model in MODELS),
            p.saved("ensemble") / "model.keras",
        ],
        writes=lambda p: [p.results / "metrics.csv"],
        reads_raw=True,
    ),
)

BESIDE: tuple[str, ...] = ("5_results/own_radiographs.ipynb",)
"""Notebooks of no stage, which read the committed reference alone; `chestxray maintain demonstrate` executes them."""


def choose(words: Sequence[str]) -> list[Stage]:
    """The stages meant on the command line, in the order of the study.

    Args:
        words: numbers (`2.1`; `4` means all of stage 4, `4.3` the four fine-tuned models) or names (`cnn`, `4.cnn`).
            No word means all stages.

    Raises:
        StudyError: a word means no stage.
    """
    for word in words:
        if not any(_means(word, stage) for stage in STAGES):
            good = ", ".join(f"{stage.number} ({stage.name})" for stage in STAGES)
            raise StudyError(f"stage {word!r} is unknown; there are {good}; and 2, 4 and 4.3 mean all of theirs")
    return [stage for stage in STAGES if not words or any(_means(word, stage) for word in words)]


def _means(word: str, stage: Stage) -> bool:
    group = stage.number.partition(".")[0]
    letterless = stage.number.rstrip("abcd")
    return word.lower() in (stage.number, group, letterless, stage.name, f"{group}.{stage.name}")

"""Configuration: classes, labels, models, profiles, where files lie, and the error that users see.

It imports only the standard library, so that every other module may import it.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import site
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent

IS_CLONE = (REPOSITORY / "requirements.txt").is_file()
"""Whether the package lies in the repository; else it was installed, and only answers for radiographs."""


def _committed() -> Path:
    """The folder that holds `5_results`: the repository, or where pip has put what the package brings."""
    bases = [Path(base) / "share" / "chestxray" for base in (sys.prefix, site.getuserbase(), REPOSITORY)]
    return next((base for base in bases if base.is_dir() and not IS_CLONE), REPOSITORY)


COMMITTED = _committed()

CLASSES = ("Atelectasis", "Effusion", "Infiltration", "Mass", "No_finding", "Nodule", "Pneumothorax")
"""The seven classes as their folders are named, in the order of every table, array and output column."""

SIX_FINDINGS: tuple[str, ...] = tuple(name for name in CLASSES if name != "No_finding")
"""The classes that are findings: what one-vs-rest AUROC is averaged over beside published figures."""
PRESENT: tuple[str, ...] = tuple(f"{name}_present" for name in SIX_FINDINGS)
"""Columns of the six findings' own probabilities, whatever else a radiograph shows, after the seven classes."""

_OTHER_FINDINGS = "Cardiomegaly", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Hernia"
NIH_FINDINGS: tuple[str, ...] = tuple(sorted((*SIX_FINDINGS, *_OTHER_FINDINGS, "Pleural_Thickening", "Pneumonia")))
"""The fourteen findings of ChestX-ray14, spelt as in the NIH table (Wang et al., CVPR 2017)."""

NO_FINDING_NIH = "No Finding"
ALL_LABELS: tuple[str, ...] = (*NIH_FINDINGS, "No_finding")
"""The fifteen labels of a model's output `findings`, one sigmoid per label: the fourteen findings, and none."""
SIX_LABELS: list[int] = [ALL_LABELS.index(name) for name in SIX_FINDINGS]
"""Columns of the six findings among `ALL_LABELS`."""
MODELS: dict[str, tuple[str, str]] = {
    "dense": ("0 Dense", "4_models/0_Dense_model.ipynb"),
    "cnn": ("1 CNN", "4_models/1_CNN_model.ipynb"),
    "feature_extraction": ("2 Feature extraction", "4_models/2_Feature_extraction_model.ipynb"),
    "fine_tuning_3a": ("3a Fine tuning", "4_models/3a_Fine_tuning_model.ipynb"),
    "fine_tuning_3b": ("3b Fine tuning", "4_models/3b_Fine_tuning_model.ipynb"),
    "fine_tuning_3c": ("3c Fine tuning", "4_models/3c_Fine_tuning_model.ipynb"),
    "fine_tuning_3d": ("3d Fine tuning", "4_models/3d_Fine_tuning_model.ipynb"),
    "ensemble": ("4 Ensemble", "4_models/4_Ensemble_model.ipynb"),
}
"""Folder of each model under `4_models/saved/<dataset>`: its name in tables, and the notebook that writes it."""
SPLITS: tuple[str, ...] = ("train", "valid", "test")
NIH_9K = "nih_9k"
NIH_9K_LIST = REPOSITORY / "1_Datasets" / f"{NIH_9K}.csv"
"""The committed list of the reference's radiographs, which `data.subset` reads."""
SOURCES = ("phantom", "nih", "nih-sample", NIH_9K)
"""The words of `--dataset` that mean a source; any other is a folder, or the name of a dataset under `1_Datasets`."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
ACKNOWLEDGEMENT = (
    "Radiographs: NIH Clinical Center, ChestX-ray14 (https://nihcc.app.box.com/v/ChestXray-NIHCC); "
    "Wang et al., ChestX-ray8, CVPR 2017."
)


def printable(text: str) -> str:
    r"""A text with the bytes of file names that aren't UTF-8 escaped: `R\xf6ntgen.png`."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class StudyError(Exception):
    """Something the user can put right. The message is one line: the file, the value and the remedy."""

    def __str__(self) -> str:
        return printable(super().__str__())

    def _render_traceback_(self) -> list[str]:
        """Show the one line, and no stack, in Jupyter."""
        return [f"{type(self).__name__}: {self}"]


class Rejection(NamedTuple):
    """One thing that could not be used, as the user reads it."""

    file: str
    value: str
    remedy: str


class StageMissing(StudyError):
    """An earlier stage has not been run yet; the message names it."""


@dataclass(frozen=True)
class Profile:
    """Sizes and epochs of a run, by default those of `quick`. A notebook's `parameters` cell may override any field.

    Attributes:
        name: `quick`, `cpu` or `gpu`.
        image_size: side of the prepared square radiographs, in pixels.
        phantom_images: how many phantom radiographs are drawn where the dataset is `phantom`.
        no_finding: at most this many single-label No_finding images are selected, over all splits.
        valid_share: share of the train_val patients' images held out for validation, 0 to 1.
        backbones: of the fine-tuned models 3a, 3b, 3c and 3d, in this order.
        first_size: side in pixels to which these resize inside the model in their first epochs.
        member_sizes: side to which each of the four resizes in its last epochs and in prediction.
        feature_backbone: backbone of the feature-extraction model.
        feature_size: side in pixels to which it resizes inside the model; ImageNet's photographs had 224.
        batch_size: images per step.
        steps_per_epoch: steps after which an epoch ends and a checkpoint is written; 0: a pass over the images.
        dense_epochs, cnn_epochs: epochs of the models trained from scratch.
        feature_epochs: epochs of the feature-extraction model's head.
        head_epochs: epochs of a fine-tuned model's head, with the backbone frozen.
        fine_tune_epochs: epochs with all layers trainable, after those of the head.
        large_epochs: epochs at the member's own side, after these.
        learning_rate: peak learning rate with all layers trainable; from half of it to 0 at the member's own side.
        mixed_precision: compute in float16 where a GPU is present.
    """

    name: str = "quick"
    image_size: int = 64
    phantom_images: int = 900
    no_finding: int = 300
    valid_share: float = 0.2
    backbones: tuple[str, ...] = ("EfficientNetLite0", "EfficientNetLite0", "EfficientNetLite1", "EfficientNetLite2")
    first_size: int = 64
    member_sizes: tuple[int, int, int, int] = (80, 80, 80, 72)
    feature_backbone: str = "EfficientNetLite0"
    feature_size: int = 64
    batch_size: int = 32
    steps_per_epoch: int = 0
    dense_epochs: int = 5
    cnn_epochs: int = 5
    feature_epochs: int = 20
    head_epochs: int = 1
    fine_tune_epochs: int = 1
    large_epochs: int = 1
    learning_rate: float = 1e-3
    mixed_precision: bool = False

    def override(self, **changes: Any) -> Profile:
        """Return a copy with some fields changed.

        Args:
            **changes: new values by field name.

        Raises:
            StudyError: a name is no field of a profile, or a value is of another kind, length or range.
        """
        known = sorted(one.name for one in dataclasses.fields(self))
        for name in changes:
            if name not in known:
                raise StudyError(f"profile {self.name!r} has no parameter {name!r}; there are: {', '.join(known)}")
            now, new = getattr(self, name), changes[name]
            if not _possible(name, now, new):
                shown, one = (list(now), now[0]) if isinstance(now, tuple) else (now, now)
                least = f", {_LEAST.get(name, 1)} or more" if type(one) is int else ""
                raise StudyError(f"{name}={new!r}: give a value such as {shown!r}{least}")
        return dataclasses.replace(self, **changes)


_LEAST = {"no_finding": 0, "steps_per_epoch": 0} | dict.fromkeys(
    ("image_size", "first_size", "member_sizes", "feature_size"), 32
)
"""The least value of the whole numbers of a profile that may not be any from 1; EfficientNet takes 32 pixels."""


def _possible(name: str, now: Any, new: Any) -> bool:
    """Whether a profile's field may have a value, of the kind that it has now."""
    if isinstance(now, tuple):
        alike = isinstance(new, tuple | list) and len(new) == len(now)
        return alike and all(_possible(name, *pair) for pair in zip(now, new, strict=True))
    if isinstance(now, float):
        return type(new) in (int, float) and 0 <= new < (1 if name == "valid_share" else float("inf"))
    return type(new) is type(now) and (type(now) is not int or new >= _LEAST.get(name, 1))


_CPU = Profile().override(
    name="cpu",
    image_size=128,
    phantom_images=6000,
    no_finding=1000,
    valid_share=0.15,
    first_size=128,
    member_sizes=(224, 224, 224, 192),
    feature_size=224,
    dense_epochs=10,
    cnn_epochs=10,
    feature_epochs=40,
    fine_tune_epochs=3,
    large_epochs=2,
)
_GPU = _CPU.override(
    name="gpu",
    image_size=256,
    phantom_images=20000,
    no_finding=4000,
    valid_share=0.1,
    backbones=("EfficientNetB6", "EfficientNetB6", "EfficientNetB6", "EfficientNetB7"),
    member_sizes=(224, 256, 256, 224),
    feature_backbone="EfficientNetB6",
    feature_size=256,
    steps_per_epoch=800,
    dense_epochs=20,
    cnn_epochs=20,
    fine_tune_epochs=16,
    large_epochs=4,
    learning_rate=5e-4,
    mixed_precision=True,
)
PROFILES = {profile.name: profile for profile in (Profile(), _CPU, _GPU)}
"""`quick`: minutes on two cores. `cpu`: nih_9k on two cores, in two hours. `gpu`: the study itself."""


@dataclass(frozen=True)
class Paths:
    """Where the files of one dataset lie: what the stages read and write, and nothing else.

    Attributes:
        dataset: the dataset's name, as `dataset_name` gives.
        root: the folder that holds `1_Datasets` to `5_results`; the repository unless `CHESTXRAY_ROOT` names another
            (a folder on Google Drive, a temporary folder of a test), or the current folder where there is no clone.
    """

    dataset: str
    root: Path = field(
        default_factory=lambda: Path(os.environ.get("CHESTXRAY_ROOT") or (REPOSITORY if IS_CLONE else ".")).resolve()
    )

    @property
    def data(self) -> Path:
        return self.root / "1_Datasets" / self.dataset

    @property
    def raw(self) -> Path:
        return self.data / "raw"

    @property
    def manifest(self) -> Path:
        return self.data / "manifest.csv"

    @property
    def labels(self) -> Path:
        """The label map of a dataset with own labels, copied by `run --labels`."""
        return self.data / "labels.csv"

    @property
    def label_map(self) -> Path | None:
        """`labels` where there is one."""
        return self.labels if self.labels.exists() else None

    @property
    def rejected(self) -> Path:
        """Images that could not be used: file, value, remedy."""
        return self.data / "rejected.csv"

    @property
    def store(self) -> Path:
        """Every readable image once, resized: `<image stem>.png`. The class folders link here."""
        return self.data / "images"

    def tree(self, split: str) -> Path:
        """The class folders of `train`, `valid`, `test` or `train_augmented`."""
        return self.data / split

    @property
    def augmented_rows(self) -> Path:
        return self.data / "train_augmented.csv"

    @property
    def near_duplicates(self) -> Path:
        """Radiographs of different patients that resemble each other; a report that no stage reads."""
        return self.data / "near_duplicates.csv"

    @property
    def cache(self) -> Path:
        """Arrays made from the trees to feed models faster; safe to delete."""
        return self.data / "cache"

    def saved(self, model: str) -> Path:
        return self.root / "4_models" / "saved" / self.dataset / model

    @property
    def results(self) -> Path:
        return self.root / "5_results" / self.dataset

    def relative(self, path: Path) -> str:
        """`path` as it is shown to a reader: relative to the root, with forward slashes."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.name

    def require(self, path: Path, stage: str, options: str = "") -> Path:
        """Return `path`, or say which earlier stage writes it.

        Args:
            path: a file or folder of this dataset.
            stage: the stage that writes it, such as `stage 2.1`.
            options: what the command of the message has besides the dataset, such as ` --profile cpu`.

        Raises:
            StageMissing: `path` does not exist.
        """
        if not path.exists():
            raise StageMissing(
                f"{self.relative(path)} is missing: run {stage} first (chestxray run --dataset {self.dataset}{options})"
            )
        return path


REFERENCE = COMMITTED / "5_results" / "reference"
"""The committed numbers, figures and ensemble, made from real radiographs."""


@dataclass(frozen=True)
class Study:
    """What a notebook works with: the dataset's paths, the profile and the seed."""

    paths: Paths
    profile: Profile
    seed: int

    @property
    def is_phantom(self) -> bool:
        return self.paths.dataset == "phantom"

    @property
    def data_note(self) -> str:
        """The words that go into every figure's title or caption: which data it comes from."""
        return "phantom images" if self.is_phantom else f"{self.paths.dataset} radiographs"

    def require(self, path: Path, stage: str) -> Path:
        """`Paths.require`, with the profile in the command that the message names.

        Args:
            path: as there.
            stage: as there.
        """
        return self.paths.require(path, stage, f" --profile {self.profile.name}")


def source_folder(source: str) -> Path | None:
    """The folder that `--dataset` means; None where it is the word of a source, or no such folder is there."""
    return Path(source) if source and source not in SOURCES and Path(source).is_dir() else None


def no_such_dataset(source: str) -> StudyError:
    """The error for a `--dataset` that is no source, no folder and no dataset that is there already."""
    return StudyError(f"dataset {source!r}: no such folder; give {', '.join(SOURCES)}, or a folder in the NIH layout")


def dataset_name(source: str) -> str:
    """The dataset's name for `--dataset`: a source's word as it is, a folder by its own name.

    A folder is nih_9k, whatever it is called, if its images are those of the committed list and have 128 px.

    Raises:
        StudyError: no name can be made of it, or the name is `taken`.
    """
    if source in SOURCES:
        return source
    folder = source_folder(source)
    if folder is not None and _holds_nih_9k(folder):
        return NIH_9K
    is_path = folder is not None or os.sep in source or "/" in source
    # A link by its own name, too: `link` and `./link` are one dataset.
    name = Path(os.path.abspath(source)).name if is_path else source  # noqa: PTH100
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")
    if not name.strip("._-"):
        raise StudyError(f"dataset {source!r}: no name can be made of it; give a folder with a name")
    if reason := taken(name):
        word = name.lower()
        remedy = f", or give {word} for the source" if word in SOURCES else ""
        remedy += " and the folder by --from, to have it compared with the list" if word == NIH_9K else ""
        raise StudyError(f"dataset {source!r}: {name} {reason}; rename the folder{remedy}")
    return name


def taken(name: str) -> str:
    """Why no folder's or archive's dataset may have this name; empty where one may. Letter case does not matter."""
    places = (path for place in ("1_Datasets", "5_results") for path in (REPOSITORY / place).glob("*"))
    if name.lower() in SOURCES:
        return "is the name of a source"
    committed = {REFERENCE.name, "input_check", *(path.name.lower() for path in places if path.is_file())}
    return "is the name of something that is committed" if name.lower() in committed else ""


def _holds_nih_9k(folder: Path) -> bool:
    """Whether the images under `folder` have the names of the committed list, and the first one has 128 px."""
    try:
        listed = {line.partition(",")[0] for line in NIH_9K_LIST.read_text("utf-8").splitlines()[1:]}
        found: dict[str, Path] = {}
        for path in (path for place in sorted(folder.glob("images*")) for path in place.rglob("[!.]*")):
            if path.name.lower().endswith(IMAGE_SUFFIXES):
                found.setdefault(path.name, path)
                if path.name not in listed:
                    return False
        if found.keys() != listed:
            return False
        with next(iter(found.values())).open("rb") as file:
            return struct.unpack(">16x2I", file.read(24)) == (128, 128)  # width and height in a PNG's header
    except (OSError, struct.error):
        return False


def open_study(dataset: str, profile: str, seed: int, overrides: dict[str, Any] | None = None) -> Study:
    """Open the study for one dataset and profile.

    Args:
        dataset: one of `SOURCES`, or a folder in the NIH layout, or the name of a dataset already under `1_Datasets`.
        profile: a key of `PROFILES`.
        seed: seeds every random choice, 0 to 2**32 - 1.
        overrides: fields of the profile to change.

    Raises:
        StudyError: the profile or an override is unknown, or as `dataset_name`.
    """
    if profile not in PROFILES:
        raise StudyError(f"profile {profile!r} is unknown; there are: {', '.join(PROFILES)}")
    return Study(Paths(dataset_name(dataset)), PROFILES[profile].override(**(overrides or {})), seed)


def lazy(package: str, modules: dict[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a sub-package that offers names of its modules, each imported when it is first used.

    Args:
        package: the sub-package's `__name__`.
        modules: each module, and the names that it defines and the sub-package offers, parted by spaces.
    """
    owners = {name: module for module, names in modules.items() for name in names.split()}

    def find(name: str) -> Any:
        if name in owners:
            return getattr(importlib.import_module(f"{package}.{owners[name]}"), name)
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find

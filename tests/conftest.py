"""Fixtures that several test modules share: tiny datasets in the NIH layout, studies on them, the real radiographs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chestxray.config import PROFILES, Paths, Study, open_study

HEADER_2020 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
FINDINGS = (
    "Atelectasis",
    "Effusion",
    "Infiltration",
    "Mass",
    "No Finding",
    "Nodule",
    "Pneumothorax",
    "No Finding",
    "Cardiomegaly",
    "Effusion|Infiltration",
)
"""What the images of a tiny dataset show, in turn."""

PREPARED = {"image_size": 32, "no_finding": 8, "batch_size": 8}
"""What `prepared_study` sets of the quick profile."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests marked `long`, saying how to run them."""
    if not os.environ.get("CHESTXRAY_LONG"):
        skip = pytest.mark.skip(reason="takes many minutes; set CHESTXRAY_LONG=1 to run it")
        for item in items:
            if "long" in item.keywords:
                item.add_marker(skip)


def tiny_pixels(index: int, side: int = 48) -> np.ndarray:
    """A (side, side) uint8 image with smooth areas and some noise, another for every index."""
    rng = np.random.default_rng([7, index])
    rows, columns = np.mgrid[0:side, 0:side] / side
    waves = np.sin(2 * np.pi * (rows * (1 + index % 3) + columns * (index % 5))) * 60
    return np.clip(120 + waves + rng.normal(0, 8, (side, side)), 0, 255).astype(np.uint8)


def tiny_rows(images: int = 60, each: int = 3) -> list[list[str]]:
    """Rows of the NIH's image table: `each` images a patient, findings in turn, both views and sexes."""
    rows = []
    for index in range(images):
        patient, follow_up = index // each + 1, index % each
        view, sex = ("AP" if index % 4 == 0 else "PA"), ("F" if patient % 2 else "M")
        name = f"{patient:08d}_{follow_up:03d}.png"
        finding = FINDINGS[index % len(FINDINGS)]
        age = str(20 + patient % 60)
        rows.append([name, finding, str(follow_up), str(patient), age, sex, view, "48", "48", "0.5", "0.5"])
    return rows


def write_table(raw: Path, rows: list[list[str]], header: str = HEADER_2020) -> Path:
    path = raw / "Data_Entry_2017_v2020.csv"
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return path


def write_raw(raw: Path, images: int = 60, each: int = 3, lists: bool = True) -> Path:
    """Write a dataset in the NIH layout: the image table, the official lists, and 48-px images in `images/`."""
    (raw / "images").mkdir(parents=True)
    rows = tiny_rows(images, each)
    write_table(raw, rows)
    for index, row in enumerate(rows):
        Image.fromarray(tiny_pixels(index)).save(raw / "images" / row[0])
    if lists:
        test = {row[0] for row in rows if int(row[3]) % 4 == 0}  # every class is among them
        (raw / "test_list.txt").write_text("".join(f"{row[0]}\n" for row in rows if row[0] in test))
        (raw / "train_val_list.txt").write_text("".join(f"{row[0]}\n" for row in rows if row[0] not in test))
    return raw


def texts(notebook):
    """What a reader sees of a notebook's outputs, as text."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text", ""))
            found += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(found)


@pytest.fixture
def make_raw(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a tiny dataset: `make_raw(name="tiny", images=60, each=3, lists=True)`."""

    def make(name: str = "tiny", **shape: int | bool) -> Path:
        return write_raw(tmp_path / name, **shape)

    return make


@pytest.fixture
def tiny_raw(make_raw: Callable[..., Path]) -> Path:
    """A dataset in the NIH layout: 60 images at 48 px of 20 patients, with official lists."""
    return make_raw()


@pytest.fixture
def study_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Study]:
    """A function that opens a study on a raw folder, which it links: `study_of(raw, image_size=32, no_finding=8)`."""
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path / "root"))

    def of(raw: Path, seed: int = 2024, **overrides: object) -> Study:
        from chestxray.data import sources

        settings = {"image_size": 32, "no_finding": 8} | overrides
        study = open_study(str(raw), "quick", seed, settings)
        sources.prepare_raw(str(raw), study)
        return study

    return of


@pytest.fixture
def tiny_study(study_of: Callable[..., Study], tiny_raw: Path) -> Study:
    """A study on `tiny_raw` with raw linked and nothing prepared."""
    return study_of(tiny_raw)


def _real(variable: str, what: str) -> Path:
    """The folder that a variable names; skips without it."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"needs {what}: set {variable}")
    return Path(folder)


@pytest.fixture(scope="session")
def nih() -> Path:
    """The radiographs of nih_9k at 128 px, with the NIH's own tables and lists, laid out as an NIH download."""
    return _real("CHESTXRAY_NIH", "real radiographs, a folder with nih_9k in the NIH layout")


@pytest.fixture(scope="session")
def nih_256() -> Path:
    """Those of nih_9k at 256 px, in `images/`."""
    return _real("CHESTXRAY_NIH_256", "a folder with the radiographs of nih_9k at 256 px")


@pytest.fixture(scope="session")
def nih_native() -> Path:
    """Some of the NIH's originals, at 1024 px."""
    return _real("CHESTXRAY_NIH_NATIVE", "a folder with the NIH's originals of some radiographs of nih_9k")


@pytest.fixture(scope="session")
def cases() -> Path:
    """Inputs that once failed: `files/` and `own_data/`."""
    return _real("CHESTXRAY_CASES", "a folder of inputs that once failed")


@pytest.fixture(scope="session")
def others() -> Path:
    """Images that are not from the NIH, with `index.csv`."""
    return _real("CHESTXRAY_OTHERS", "a folder of images that are not from the NIH")


@pytest.fixture(scope="session")
def nih_study(nih: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The study on nih_9k in the `cpu` profile: raw is linked, with the list's validation, and nothing prepared."""
    from chestxray.data import subset

    study = Study(Paths("nih_9k", tmp_path_factory.mktemp("nih")), PROFILES["cpu"], 2024)
    study.paths.raw.mkdir(parents=True)
    for path in nih.iterdir():
        (study.paths.raw / path.name).symlink_to(path.resolve())
    valid = [image for image, split in subset.splits().items() if split == "valid"]
    (study.paths.raw / "valid_list.txt").write_text("\n".join(valid))
    return study


@pytest.fixture(scope="session")
def nih_plan(nih_study: Study):
    """The plan of stage 2.1 for nih_9k in the `cpu` profile."""
    from chestxray.data import preparation

    return preparation.make_plan(nih_study)


@pytest.fixture(scope="session")
def prepared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root where stages 2.1 and 2.2 are done for 240 tiny images; `prepared_study` copies it."""
    from chestxray.data import augmentation, preparation, sources

    folder = tmp_path_factory.mktemp("prepared")
    raw = write_raw(folder / "tiny", images=240)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHESTXRAY_ROOT", str(folder / "root"))
        study = open_study(str(raw), "quick", 2024, PREPARED)
        sources.prepare_raw(str(raw), study)
        augmentation.write(study, augmentation.plan(preparation.prepare(study).manifest, study.seed))
    return folder / "root"


@pytest.fixture
def prepared_study(prepared_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of 240 tiny images with stages 2.1 and 2.2 done, small enough to fit models on in seconds."""
    root = tmp_path / "root"
    shutil.copytree(prepared_root, root, symlinks=True)
    monkeypatch.setenv("CHESTXRAY_ROOT", str(root))
    return open_study("tiny", "quick", 2024, PREPARED)


def pytest_sessionfinish() -> None:
    """Write what users saw of each fault to the file that CHESTXRAY_FAULTS names."""
    import sys

    place, faults = os.environ.get("CHESTXRAY_FAULTS"), sys.modules.get("faults")
    if place and faults:
        faults.write(Path(place))

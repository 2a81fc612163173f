"""The transforms on disk and in graph: their ranges, their balance, and that they tell nothing of the class."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from killing import killed
from PIL import Image
from scipy import ndimage

from chestxray.config import CLASSES, PROFILES, Paths, Study, StudyError
from chestxray.data import augmentation
from chestxray.evaluation import associations

SIZES = {
    "Atelectasis": 17,
    "Effusion": 9,
    "Infiltration": 40,
    "Mass": 6,
    "No_finding": 31,
    "Nodule": 7,
    "Pneumothorax": 5,
}


def made_manifest(sizes: dict[str, int]) -> pd.DataFrame:
    """Return train rows by class, two images a patient, among rows of other splits and rows that were not selected."""
    rows = []
    for label, count in sizes.items():
        for index in range(count):
            patient = f"{CLASSES.index(label)}{index // 2:05d}"
            image = f"{patient}_{index % 2:03d}.png"
            rows.append({"image": image, "patient": patient, "label": label, "split": "train", "selected": True})
        for split, selected in (("valid", True), ("test", True), ("train", False)):
            image = f"{split}{selected}{label}.png"
            rows.append({"image": image, "patient": image, "label": label, "split": split, "selected": selected})
    rows.append({"image": "several.png", "patient": "several", "label": None, "split": "train", "selected": False})
    return pd.DataFrame(rows)


@pytest.fixture
def manifest() -> pd.DataFrame:
    return made_manifest(SIZES)


@pytest.fixture
def study(tmp_path: Path, manifest: pd.DataFrame) -> Study:
    """A study whose train tree holds 24-px noise."""
    study = Study(Paths("made", tmp_path), PROFILES["quick"], 3)
    rng = np.random.default_rng(0)
    for row in manifest[(manifest["split"] == "train") & manifest["selected"]].itertuples():
        path = study.paths.tree("train") / row.label / row.image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24), dtype=np.uint8)).save(path)
    return study


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_plan_balances_classes_with_sources_used_evenly(manifest: pd.DataFrame) -> None:
    rows = augmentation.plan(manifest, seed=11)
    assert list(rows.columns) == list(augmentation.PLAN_COLUMNS)
    assert rows["label"].value_counts().to_dict() == dict.fromkeys(CLASSES, 40)
    assert rows["file"].is_unique
    uses = rows.groupby(["label", "image"]).size().groupby("label")
    assert (uses.max() - uses.min()).max() == 1
    assert uses.size().to_dict() == SIZES
    assert set(rows.query("label == 'Infiltration'")["image"].value_counts()) == {1}


def test_plan_draws_from_selected_train_images_alone(manifest: pd.DataFrame) -> None:
    train = manifest[(manifest["split"] == "train") & manifest["selected"]]
    rows = augmentation.plan(manifest, seed=11)
    assert set(rows["image"]) == set(train["image"])
    assert not set(rows["patient"]) & set(manifest.query("split != 'train'")["patient"])


def test_plan_depends_on_names_and_seed_not_on_order_or_on_other_images(manifest: pd.DataFrame) -> None:
    rows = augmentation.plan(manifest, seed=11)
    shuffled = augmentation.plan(manifest.sample(frac=1, random_state=1), seed=11)
    pd.testing.assert_frame_equal(rows, shuffled)
    fewer = augmentation.plan(manifest[manifest["image"] != "500000_000.png"], seed=11)
    both = rows.merge(fewer, on="file", suffixes=("", "_fewer"))
    assert len(both) > 250
    assert (both["seed"] == both["seed_fewer"]).all() and (both["rotation"] == both["rotation_fewer"]).all()
    assert (rows["rotation"] != augmentation.plan(manifest, seed=12)["rotation"]).mean() > 0.99


def test_every_file_is_transformed_within_the_ranges(manifest: pd.DataFrame) -> None:
    rows = augmentation.plan(manifest, seed=11)
    reach = {"rotation": (0, 7), "shift_x": (0, 0.04), "shift_y": (0, 0.04), "zoom": (1, 0.07)}
    for name, (centre, width) in {**reach, "brightness": (0, 0.08), "contrast": (1, 0.15)}.items():
        away = (rows[name] - centre).abs()
        assert away.max() <= width + 1e-9
        assert away.max() > 0.9 * width
        assert (away > 0).mean() > 0.99


def auroc_from_transform(rows: pd.DataFrame) -> float:
    """Macro AUROC of the class predicted from the transform alone, without any image; .5: it cannot be."""
    rows = rows.sample(min(6000, len(rows)), random_state=1)
    features = rows[[name for name in (*augmentation.PARAMETERS, "flip") if name in rows]]
    return associations.predictability(features, rows["label"], rows["image"], seed=1).mean()


def test_class_cannot_be_told_from_the_transform() -> None:
    sizes = dict.fromkeys(CLASSES, 60) | {"Infiltration": 700, "No_finding": 400}
    assert abs(auroc_from_transform(augmentation.plan(made_manifest(sizes), seed=11)) - 0.5) < 0.03


def test_the_check_finds_flips_given_to_rare_classes_only() -> None:
    """The published study's fault: the check would have caught it."""
    rows = augmentation.plan(made_manifest(dict.fromkeys(CLASSES, 60) | {"Infiltration": 300}), seed=11)
    coins = np.random.default_rng(0).integers(0, 2, len(rows))
    rows["flip"] = coins * ~rows["label"].isin(["Infiltration", "No_finding"])
    assert auroc_from_transform(rows) > 0.6


def test_plan_names_the_class_that_has_no_source() -> None:
    with pytest.raises(StudyError, match=r"lacks Mass \(0 patients\); add images"):
        augmentation.plan(made_manifest({name: 30 for name in CLASSES if name != "Mass"}), seed=1)


@pytest.fixture
def picture() -> np.ndarray:
    """(61, 61) uint8: a smooth field with nothing symmetric about it, clear of black and white."""
    noise = ndimage.gaussian_filter(np.random.default_rng(4).normal(size=(61, 61)), 4)
    return np.rint(130 + 60 * noise / np.abs(noise).max()).astype(np.uint8)


def middle(pixels: np.ndarray) -> np.ndarray:
    return pixels[15:-15, 15:-15].astype(int)


def test_transform_of_nothing_changes_nothing(picture: np.ndarray) -> None:
    np.testing.assert_array_equal(augmentation.transform(picture), picture)


def test_transform_moves_as_scipy_and_pillow_do(picture: np.ndarray) -> None:
    """Directions and amounts against other routines: Pillow rotates anticlockwise, SciPy shifts (down, right)."""
    rotated = np.asarray(Image.fromarray(picture).rotate(6.5, Image.Resampling.BICUBIC))
    assert np.abs(middle(augmentation.transform(picture, rotation=6.5)) - middle(rotated)).max() <= 2
    spline = ndimage.rotate(picture.astype(float), 6.5, reshape=False)
    assert np.abs(middle(augmentation.transform(picture, rotation=6.5)) - middle(spline)).max() <= 2
    moved = augmentation.transform(picture, shift_x=2.5 / 61, shift_y=-1.25 / 61)
    assert np.abs(middle(moved) - middle(ndimage.shift(picture.astype(float), (-1.25, 2.5)))).max() <= 2
    larger = ndimage.zoom(picture.astype(float), 67 / 61, grid_mode=True, mode="nearest")[3:-3, 3:-3]
    assert np.abs(middle(augmentation.transform(picture, zoom=67 / 61)) - middle(larger)).max() <= 2


def test_transform_keeps_the_sharpness_that_fine_lines_need() -> None:
    """A pleural line, one pixel wide, keeps more of its height than linear interpolation leaves it."""
    line = np.full((41, 41), 100, dtype=np.uint8)
    line[:, 20] = 200
    half = augmentation.transform(line, shift_x=0.5 / 41)
    assert half[20].max() > 150  # linear: (100 + 200) / 2


def test_oblong_radiographs_keep_their_shape_and_middle() -> None:
    oblong = np.zeros((40, 60), dtype=np.uint8)
    oblong[18:22, 28:32] = 200
    for done in ({"rotation": 7.0}, {"zoom": 1.07}, {"zoom": 0.93}):
        moved = augmentation.transform(oblong, **done)
        assert moved.shape == (40, 60)
        assert ndimage.center_of_mass(moved.astype(float)) == pytest.approx((19.5, 29.5), abs=0.1)


def test_transform_changes_grey_levels_as_said(picture: np.ndarray) -> None:
    changed = augmentation.transform(picture, brightness=0.05, contrast=0.9).astype(float)
    assert changed.mean() == pytest.approx(picture.mean() + 0.05 * 255, abs=0.1)
    assert changed.std() == pytest.approx(picture.std() * 0.9, rel=0.01)


def test_borders_are_filled_with_anatomy_not_with_black() -> None:
    bright = np.full((40, 40), 180, dtype=np.uint8)
    filled = augmentation.transform(bright, rotation=7.0, shift_x=0.04, shift_y=-0.04, zoom=0.93)
    np.testing.assert_array_equal(filled, bright)


def test_write_makes_what_the_plan_says(study: Study, manifest: pd.DataFrame) -> None:
    rows = augmentation.plan(manifest, study.seed)
    assert augmentation.write(study, rows, workers=1) == 280
    tree = study.paths.tree("train_augmented")
    assert set(contents(tree)) == set(rows["file"])
    pd.testing.assert_frame_equal(pd.read_csv(study.paths.augmented_rows, dtype={"patient": str}), rows)
    row = rows.iloc[100]
    source = np.asarray(Image.open(study.paths.tree("train") / row["label"] / row["image"]))
    made = np.asarray(Image.open(tree / row["file"]))
    done = {name: row[name] for name in augmentation.PARAMETERS}
    np.testing.assert_array_equal(made, augmentation.transform(source, **done))
    assert not np.array_equal(made, source)


def test_write_resumes_and_is_the_same_for_any_number_of_workers(study: Study, manifest: pd.DataFrame) -> None:
    rows = augmentation.plan(manifest, study.seed)
    augmentation.write(study, rows, workers=2)
    tree = study.paths.tree("train_augmented")
    whole = contents(tree)
    gone = sorted(whole)[:25]
    for name in gone:
        (tree / name).unlink()
    (tree / "Mass" / ".left.png.tmp-123").write_bytes(b"half")
    (tree / sorted(whole)[30]).write_bytes(b"not a PNG")
    study.paths.augmented_rows.unlink()
    assert augmentation.write(study, rows, workers=1) == 26
    assert contents(tree) == whole
    assert augmentation.write(study, rows, workers=1) == 0


WRITES = """
import pandas as pd
from chestxray.data import augmentation
from chestxray.evaluation import associations
from chestxray.config import PROFILES, Paths, Study
study = Study(Paths("made", Path(sys.argv[1])), PROFILES["quick"], 3)
augmentation.write(study, pd.read_csv(sys.argv[2], dtype={"patient": str}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_write_goes_on_to_the_same_bytes(study: Study, manifest: pd.DataFrame, tmp_path: Path) -> None:
    rows = augmentation.plan(manifest, study.seed)
    augmentation.write(study, rows)
    tree = study.paths.tree("train_augmented")
    whole, table = contents(tree), study.paths.augmented_rows.read_bytes()
    shutil.rmtree(tree)
    study.paths.augmented_rows.replace(tmp_path / "plan.csv")
    killed(WRITES, 100, tmp_path, tmp_path / "plan.csv")
    assert not study.paths.augmented_rows.exists()
    assert augmentation.write(study, rows) == len(rows) - 99
    assert contents(tree) == whole and study.paths.augmented_rows.read_bytes() == table


def test_write_follows_a_changed_plan_and_a_changed_source(study: Study, manifest: pd.DataFrame) -> None:
    augmentation.write(study, augmentation.plan(manifest, 1), workers=1)
    second = augmentation.plan(manifest, 2)
    augmentation.write(study, second, workers=1)
    tree = study.paths.tree("train_augmented")
    assert set(contents(tree)) == set(second["file"])
    row = second.iloc[0]
    Image.new("L", (24, 24), 90).save(study.paths.tree("train") / row["label"] / row["image"])
    assert augmentation.write(study, second, workers=1) == (second["image"] == row["image"]).sum()
    assert np.ptp(np.asarray(Image.open(tree / row["file"]))) == 0


def test_write_names_a_source_that_is_missing_or_broken(study: Study, manifest: pd.DataFrame) -> None:
    rows = augmentation.plan(manifest, study.seed)
    source = study.paths.tree("train") / rows.iloc[0]["label"] / rows.iloc[0]["image"]
    source.write_bytes(source.read_bytes()[:60])
    with pytest.raises(StudyError, match=f"{source.name} cannot be read as an image; run 2_preprocessing/1"):
        augmentation.write(study, rows, workers=1)
    source.unlink()
    with pytest.raises(StudyError, match=f"{source.name} is missing"):
        augmentation.write(study, rows, workers=1)
    assert not study.paths.augmented_rows.exists()


def test_no_patient_of_valid_or_test_is_augmented_on_the_real_radiographs(nih_plan) -> None:
    table = nih_plan.table
    rows = augmentation.plan(table, seed=2024)
    assert rows["label"].value_counts().nunique() == 1
    assert not set(rows["patient"]) & set(table.loc[table["split"] != "train", "patient"])
    assert rows.groupby("image")["label"].nunique().max() == 1
    assert abs(auroc_from_transform(rows) - 0.5) < 0.03

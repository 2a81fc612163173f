"""Augmentation: transforms of the train radiographs, on disk, that a radiographer would accept.

`plan` lists the files of a balanced train set (source, parameters, seed), and `write` makes them. Sources are the
selected train images alone, never validation or test.

Ranges. Positioning on a chest stand varies by a few degrees and centimetres, and exposure and window by about a tenth:
rotations to ±7°, shifts to ±4 % of the side, zooms 0.93–1.07, brightness ±8 % of full scale, contrast 0.85–1.15.
No file is mirrored: the heart lies on the left, and a mirrored radiograph shows dextrocardia and a mirrored side
marker. What a shift or a rotation uncovers is filled by reflection: black wedges would mark an image as transformed,
and no validation or test image has them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, PngImagePlugin
from scipy import ndimage
from tqdm import tqdm

from chestxray import files
from chestxray.config import CLASSES, Study, StudyError
from chestxray.data import splits

ROTATION = 7.0
"""Largest rotation, degrees to either side."""
SHIFT = 0.04
"""Largest shift to either side, share of the side, along each axis."""
ZOOM = 0.07
"""Largest departure of the magnification from 1."""
BRIGHTNESS = 0.08
"""Largest grey level added or taken off, share of full scale (255)."""
CONTRAST = 0.15
"""Largest departure from 1 of the factor by which grey levels spread about the image's mean."""

PARAMETERS: tuple[str, ...] = ("rotation", "shift_x", "shift_y", "zoom", "brightness", "contrast")
"""Columns of a plan: the transform of the source."""
PLAN_COLUMNS: tuple[str, ...] = ("file", "label", "image", "patient", *PARAMETERS, "seed")

_RECIPE = "2"
"""Changes when the same parameters would give other pixels: files of another recipe are made anew."""


def draw_parameters(seed: int) -> dict[str, float]:
    """Draw one transform, from the same distribution for every class: what `transform` takes.

    All are uniform in this module's ranges, rounded to 4 digits so that the CSV holds exactly what was done. The
    file's own seed alone decides the draw.
    """
    rng = np.random.default_rng(seed)
    centre = np.array([0, 0, 0, 1, 0, 1])
    reach = np.array([ROTATION, SHIFT, SHIFT, ZOOM, BRIGHTNESS, CONTRAST])
    drawn = np.round(rng.uniform(centre - reach, centre + reach), 4)
    return dict(zip(PARAMETERS, drawn.tolist(), strict=True))


def plan(manifest: pd.DataFrame, seed: int) -> pd.DataFrame:
    """List the files of the balanced train set, before any is written: `PLAN_COLUMNS`, in the order of CLASSES.

    Every class gets as many files as the largest class has train images. Within a class each source is used equally
    often, give or take one; which are used once more is drawn at random. Each file's transform depends on nothing but
    the seed, the source's name and the number of the copy, and no file is untransformed: the transform says nothing of
    the class, whether its sources are used once or six times.

    Args:
        manifest: as `read_manifest` gives; only the selected train images count.
        seed: the study's seed.
    """
    splits.require_trainable(manifest, "manifest.csv")
    train = manifest[(manifest["split"] == "train") & manifest["selected"].astype(bool)]
    sources = {name: rows.sort_values("image") for name, rows in train.groupby("label") if name in CLASSES}
    largest = max(len(rows) for rows in sources.values())
    parts = [_copies(sources[name], largest, [seed, place]).assign(label=name) for place, name in enumerate(CLASSES)]
    rows = pd.concat(parts, ignore_index=True)
    stems = rows["image"].map(lambda image: Path(image).stem)
    rows["file"] = rows["label"] + "/" + stems + "_" + rows["copy"].astype(str) + ".png"
    names = [f"{seed}/{image}/{copy}" for image, copy in zip(rows["image"], rows["copy"], strict=True)]
    rows["seed"] = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") for name in names]
    drawn = pd.DataFrame([draw_parameters(file_seed) for file_seed in rows["seed"]])
    return pd.concat([rows, drawn], axis=1)[list(PLAN_COLUMNS)]


def _copies(sources: pd.DataFrame, files: int, seed: Sequence[int]) -> pd.DataFrame:
    """Repeat `sources` to `files` rows, as evenly as can be; `copy` counts the uses of one source from 0."""
    whole, extra = divmod(files, len(sources))
    uses = np.full(len(sources), whole)
    uses[np.random.default_rng(seed).permutation(len(sources))[:extra]] += 1
    rows = sources[["image", "patient"]].loc[sources.index.repeat(uses)].reset_index(drop=True)
    return rows.assign(copy=rows.groupby("image").cumcount())


def transform(
    pixels: np.ndarray,
    rotation: float = 0.0,
    shift_x: float = 0.0,
    shift_y: float = 0.0,
    zoom: float = 1.0,
    brightness: float = 0.0,
    contrast: float = 1.0,
) -> np.ndarray:
    """Zoom, rotate about the centre and shift in one cubic interpolation, then change contrast and brightness.

    Linear interpolation would blur the fine pleural lines and vessels by which a pneumothorax or a nodule is read.

    Args:
        pixels: (H, W) uint8 grey levels, as the result.
        rotation: degrees, anticlockwise.
        shift_x: to the right, share of the width.
        shift_y: down, share of the height.
        zoom: magnification about the centre.
        brightness: added, share of full scale.
        contrast: factor by which grey levels spread about the image's mean.
    """
    middle = np.array(pixels.shape) / 2 - 0.5
    angle = np.deg2rad(rotation)
    # From a place (y, x) in the result back to the place in the source: undo shift, rotation, zoom.
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / zoom
    offset = middle - back @ (middle + np.array([shift_y, shift_x]) * pixels.shape)
    moved = ndimage.affine_transform(pixels.astype(np.float32), back, offset, mode="reflect")
    toned = (moved - moved.mean()) * contrast + moved.mean() + brightness * 255
    return np.rint(toned).clip(0, 255).astype(np.uint8)


def write(study: Study, plan: pd.DataFrame, workers: int | None = None) -> int:
    """Make `train_augmented/` hold exactly the files of `plan`, then write the plan; say how many files were written.

    A file is complete or absent, and carries the digest of its source and of its transform: after an interruption the
    next call makes only what is missing. The bytes do not depend on the number of workers.

    Args:
        study: where the prepared train images lie and the result goes.
        plan: as `plan` returns it.
        workers: threads; None takes all cores that this process may use.

    Raises:
        StudyError: a source is missing or cannot be read.
    """
    train = study.require(study.paths.tree("train"), "2_preprocessing/1_Creating_train_test_directories")
    target = study.paths.tree("train_augmented")
    planned = {name: {Path(file).name for file in rows["file"]} for name, rows in plan.groupby("label")}
    for name in CLASSES:
        # What an earlier plan or a broken-off write left would unbalance the classes.
        files.keep_only(files.make_folder(target / name), planned.get(name, set()))
    rows = plan.to_dict("records")
    done = files.in_threads(partial(_write_one, train, target), rows, workers or -1, ordered=False, batch=16)
    written = sum(tqdm(done, "train_augmented", len(rows), unit="file", disable=None))
    files.atomic_write(study.paths.augmented_rows, plan.to_csv(index=False, lineterminator="\n").encode())
    return written


def _write_one(train: Path, target: Path, row: dict) -> bool:
    """Write the file of one row of a plan, unless it is there as it should be; return whether it was written."""
    source = train / row["label"] / f"{Path(row['image']).stem}.png"
    path = target / row["file"]
    parameters = {name: row[name] for name in PARAMETERS}
    try:
        data = source.read_bytes()
        done = " ".join(f"{name}={float(value):.4f}" for name, value in parameters.items())
        digest = hashlib.sha256(data + f"{_RECIPE} {done}".encode()).hexdigest()
        with contextlib.suppress(OSError):
            if digest.encode() in path.read_bytes()[:256]:  # the text is the first chunk after a PNG's header
                return False
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    except (OSError, SyntaxError) as error:
        fault = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read as an image"
        remedy = "run 2_preprocessing/1_Creating_train_test_directories again"
        raise StudyError(f"train/{row['label']}/{source.name} {fault}; {remedy}") from None
    text = PngImagePlugin.PngInfo()
    text.add_text("chestxray", digest)
    with files.atomic_file(path) as file:
        Image.fromarray(transform(pixels, **parameters)).save(file, "PNG", pnginfo=text)
    return True

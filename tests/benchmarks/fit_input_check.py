"""Fitting the input check: `python -m tests.benchmarks.fit_input_check DATASET [--seed N]`.

The network is fitted on the train split of a prepared dataset (stage 2.1), with images made from it that are to be
flagged; its threshold is chosen on validation for a stated rate of false alarms, and its rates are measured on test.
The result is `images.input_check.Check`, which inference reads without this module.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
from PIL import Image, ImageDraw
from scipy import ndimage, stats
from sklearn.datasets import load_sample_images
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from tqdm import tqdm

from chestxray import files
from chestxray.config import Study, StudyError, open_study
from chestxray.data.manifest import read_manifest, store_path
from chestxray.evaluation import bootstrap
from chestxray.evaluation.bootstrap import Draws
from chestxray.images import input_check, pixels
from chestxray.images.input_check import SIDE, Check

FALSE_ALARMS = 0.01
"""Share of validation's radiographs that are flagged; the threshold is chosen so."""

RATES, FACTS = "rates.csv", "check.json"
"""What is written beside the check: the rates measured on test, and what it was fitted on."""

COMPONENTS, UNITS, EPOCHS = 100, 64, 15
_POSITIVES, _NEGATIVES = 3, 4
"""Images made from each radiograph of the train split: itself with changed copies, and ones that are to be flagged."""
_DRAWN = 128
"""Side of drawn images, in pixels."""

Maker = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""Makes an image that is to be flagged from a radiograph, or draws one without looking at it; (side, side) uint8."""


def moved(image: np.ndarray, rng: np.random.Generator, tilt: float = 7.0) -> np.ndarray:
    """A radiograph with another position and exposure.

    Args:
        image: (side, side) uint8.
        rng: random numbers.
        tilt: largest rotation in degrees.
    """
    side = len(image)
    angle, scale = np.deg2rad(rng.uniform(-tilt, tilt)), 1 / rng.uniform(0.9, 1.15)
    right, down = rng.uniform(-0.05, 0.05, 2) * side
    cosine, sine, middle = np.cos(angle) * scale, np.sin(angle) * scale, side / 2
    matrix = (
        *(cosine, -sine, middle * (1 - cosine + sine) + right),
        *(sine, cosine, middle * (1 - sine - cosine) + down),
    )
    turned = Image.fromarray(image).transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    exposed = (np.asarray(turned) / 255.0) ** np.exp(rng.uniform(-0.35, 0.35))
    return (255 * exposed).astype(np.uint8)


def inverted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A radiograph with air white and bone black."""
    return 255 - image


def upside_down(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A radiograph with head and belly exchanged."""
    return image[::-1]


def sideways(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A radiograph turned by a quarter, either way."""
    return np.rot90(image, rng.choice([1, -1]))


def tilted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A radiograph turned by 30 to 80 degrees, either way."""
    angle = float(rng.choice([-1, 1]) * rng.uniform(30, 80))
    return np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR))


def part(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A square of a fifth to half of the side, from anywhere."""
    side = len(image)
    size = int(side * rng.uniform(0.2, 0.5))
    row, column = rng.integers(0, side - size + 1, 2)
    cut = Image.fromarray(image[row : row + size, column : column + size])
    return np.asarray(cut.resize((side, side), Image.Resampling.BILINEAR))


def part_inverted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same, inverted."""
    return 255 - part(image, rng)


def clouds(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Noise whose power falls with frequency, as that of photographs does."""
    across = np.fft.fftfreq(_DRAWN)
    frequency = np.hypot(across[:, None], across[None])
    frequency[0, 0] = 1
    waves = np.fft.fft2(rng.normal(size=(_DRAWN, _DRAWN))) / frequency ** rng.uniform(0.5, 2.5)
    drawn = np.fft.ifft2(waves).real
    drawn = (drawn - drawn.mean()) / drawn.std()
    return np.clip(128 + drawn * rng.uniform(15, 70), 0, 255).astype(np.uint8)


def shapes(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ellipses, boxes and four-sided figures, sharp or blurred."""
    canvas = Image.new("L", (_DRAWN, _DRAWN), int(rng.integers(256)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(1, 25)):
        left, top = rng.integers(-30, _DRAWN, 2).tolist()
        width, height = rng.integers(5, 100, 2).tolist()
        grey, kind = int(rng.integers(256)), rng.integers(3)
        if kind == 0:
            draw.ellipse([left, top, left + width, top + height], fill=grey)
        elif kind == 1:
            draw.rectangle([left, top, left + width, top + height], fill=grey)
        else:
            draw.polygon([tuple(point) for point in rng.integers(0, _DRAWN, (4, 2)).tolist()], fill=grey)
    drawn = ndimage.gaussian_filter(np.asarray(canvas, dtype=float), rng.uniform(0, 4))
    if rng.random() < 0.5:
        drawn = 0.6 * drawn + 0.4 * clouds(image, rng)
    return np.clip(drawn, 0, 255).astype(np.uint8)


def text(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A page of text, black on white or white on black."""
    page = Image.new("L", (2 * _DRAWN, 2 * _DRAWN), 255)
    draw = ImageDraw.Draw(page)
    lines, columns = rng.integers(8, 21), rng.integers(15, 36)
    for line in range(lines):
        letters = "".join(chr(97 + code) if code < 26 else " " for code in rng.integers(0, 32, columns))
        draw.text((16, 10 + line * 240 // lines), letters, fill=0)
    drawn = np.asarray(page.resize((_DRAWN, _DRAWN), Image.Resampling.BOX))
    return drawn if rng.random() < 0.5 else 255 - drawn


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Independent pixels."""
    return rng.integers(0, 256, (_DRAWN, _DRAWN), dtype=np.uint8)


def blank(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One grey value, with a little noise or none."""
    grain = rng.normal(0, rng.choice([0, 3]), (_DRAWN, _DRAWN))
    return np.clip(rng.integers(256) + grain, 0, 255).astype(np.uint8)


def gradient(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One grey value fading into another."""
    first, last = rng.integers(0, 256, 2)
    ramp = np.tile(np.linspace(first, last, _DRAWN), (_DRAWN, 1))
    return np.rot90(ramp, rng.integers(4)).astype(np.uint8)


def photograph(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A square of one of scikit-learn's two photographs, a temple and a flower."""
    photos = load_sample_images().images
    photo = np.asarray(Image.fromarray(photos[rng.integers(len(photos))]).convert("L"))
    size = rng.integers(120, min(photo.shape) + 1)
    row, column = (rng.integers(0, extent - size + 1) for extent in photo.shape)
    cut = Image.fromarray(photo[row : row + size, column : column + size])
    return np.asarray(cut.resize((_DRAWN, _DRAWN), Image.Resampling.BOX))


TRAINED: dict[str, Maker] = {
    "inverted": inverted,
    "upside down": upside_down,
    "sideways": sideways,
    "tilted 30–80°": tilted,
    "a fifth to half of the side": part,
    "part, inverted": part_inverted,
    "clouds": clouds,
    "shapes": shapes,
    "text": text,
}
"""What the check is fitted to flag, by name."""

UNSEEN: dict[str, Maker] = {"photographs": photograph, "noise": noise, "blank": blank, "gradient": gradient}
"""What it is measured on besides, and was not fitted to."""


@dataclass(frozen=True)
class Split:
    """The radiographs of a split, (N, side, side) uint8, and the patient of each, (N,)."""

    pixels: np.ndarray
    patients: np.ndarray


def read_split(study: Study, split: str) -> Split:
    """Read all prepared radiographs of a split, whatever they show.

    Args:
        study: of the prepared dataset.
        split: `train`, `valid` or `test`.

    Raises:
        StageMissing: stage 2.1 has not been run.
        StudyError: the split has no image.
    """
    manifest = read_manifest(study.paths)
    table = manifest[manifest["split"] == split]
    if table.empty:
        raise StudyError(f"{study.paths.relative(study.paths.manifest)}: no image in split {split!r}; prepare it again")
    images = [pixels.decode(store_path(study.paths.store, image)) for image in table["image"]]
    return Split(np.stack(images), table["patient"].to_numpy())


def fit(train: np.ndarray, valid: np.ndarray, seed: int, false_alarms: float = FALSE_ALARMS) -> Check:
    """Fit the check on radiographs of the train split, and choose its threshold on those of validation.

    A principal component analysis of radiographs and of images made to be flagged, and a network of one hidden layer
    that separates them. Half of the radiographs are mirrored, which leaves them radiographs.

    Args:
        train: (N, side, side) uint8.
        valid: (M, side, side) uint8.
        seed: seeds all that is drawn.
        false_alarms: share of validation that may be flagged, 0 to 1.
    """
    rng = np.random.default_rng(seed)
    makers = list(TRAINED.values())
    radiograph, other = [], []
    for image in tqdm(train, desc="images to separate", unit="radiograph", disable=None):
        radiograph.append(input_check.reduced(image))
        for number in range(_POSITIVES - 1):
            radiograph.append(input_check.reduced(moved(image[:, ::-1] if number % 2 else image, rng)))
        for _ in range(_NEGATIVES):
            start = moved(image[:, ::-1] if rng.random() < 0.5 else image, rng)
            made = makers[rng.integers(len(makers))](start, rng)
            other.append(input_check.reduced(np.ascontiguousarray(made)))
    measured = input_check.features(np.stack(radiograph + other))
    foreign = np.arange(len(measured)) >= len(radiograph)
    parts = min(COMPONENTS, *measured.shape)
    analysis = PCA(parts, svd_solver="randomized", random_state=seed).fit(measured)
    components = analysis.components_.T / np.sqrt(analysis.explained_variance_)
    open_check = Check(analysis.mean_, components, (), (), np.inf)
    network = MLPClassifier((UNITS,), alpha=1e-3, batch_size=256, max_iter=EPOCHS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopped early on purpose
        network.fit(open_check.components_of(measured), foreign)
    arrays = (analysis.mean_, components, *network.coefs_, *network.intercepts_)
    # The threshold fits the weights as they are stored.
    mean, components, *weights = (array.astype(np.float16).astype(np.float32) for array in arrays)
    check = Check(mean, components, tuple(weights[:2]), tuple(weights[2:]), np.inf)
    scores = np.sort(check.scores(_reduced(valid)))
    place = len(scores) - 1 - int(false_alarms * len(scores))
    return dataclasses.replace(check, threshold=float(scores[place]))


def saved(check: Check) -> bytes:
    """The bytes of the file that `Check.load` reads, with weights of 16 bits."""
    buffer = io.BytesIO()
    names = ("mean", "components", "kernel_0", "kernel_1", "bias_0", "bias_1")
    arrays = zip(names, (check.mean, check.components, *check.kernels, *check.biases), strict=True)
    halves = {name: array.astype(np.float16) for name, array in arrays}
    np.savez_compressed(buffer, **halves, threshold=np.float32(check.threshold))
    return buffer.getvalue()


def _reduced(images: np.ndarray) -> np.ndarray:
    return np.stack([input_check.reduced(np.ascontiguousarray(image)) for image in images])


def rates(check: Check, valid: Split, test: Split, seed: int, draws: int = 2000) -> pd.DataFrame:
    """How many radiographs are flagged by mistake, and how many other images are found.

    Args:
        check: what `fit` gave.
        valid: the split that its threshold was chosen on.
        test: the split to measure on; images that are to be flagged are made from its radiographs.
        seed: seeds what is drawn; others than in training come of it.
        draws: how many times the patients are drawn for the intervals of false alarms.

    Returns:
        One row a kind: `kind`, `fitted` (whether such images were fitted to), `images`, `flagged`, `rate`, `low` and
        `high`: 95 % intervals from resampled patients for radiographs, Wilson's for made images.
    """
    rows = []
    for name, split in (("radiographs of validation", valid), ("radiographs of test", test)):
        found = check.looks_foreign(_reduced(split.pixels))
        low, high, _ = bootstrap.interval(Draws.of(split.patients, draws, seed).means(found))
        rows.append((name, True, len(found), int(found.sum()), low, high))
    rng = np.random.default_rng([seed, 1])
    chosen = rng.permutation(len(test.pixels))[:500]
    for name, make in (TRAINED | UNSEEN).items():
        made = _reduced(np.stack([make(test.pixels[row], rng) for row in chosen]))
        found = int(check.looks_foreign(made).sum())
        interval = stats.binomtest(found, len(made)).proportion_ci(method="wilson")
        rows.append((name, name in TRAINED, len(made), found, interval.low, interval.high))
    table = pd.DataFrame(rows, columns=["kind", "fitted", "images", "flagged", "low", "high"])
    table.insert(4, "rate", table["flagged"] / table["images"])
    return table


def write(study: Study, seed: int, folder: Path = input_check.FOLDER) -> pd.DataFrame:
    """Fit the check on a prepared dataset, measure it, and write it with both.

    Args:
        study: of the dataset.
        seed: seeds all that is drawn.
        folder: where to write.

    Returns:
        What `rates` returned.

    Raises:
        StageMissing: stage 2.1 has not been run.
        StudyError: a split has no image, or the folder cannot be written.
    """
    train, valid, test = (read_split(study, split) for split in ("train", "valid", "test"))
    check = fit(train.pixels, valid.pixels, seed)
    measured = rates(check, valid, test, seed)
    facts = {
        "dataset": study.paths.dataset,
        "manifest_sha256": hashlib.sha256(study.paths.manifest.read_bytes()).hexdigest(),
        "images": {"train": len(train.pixels), "valid": len(valid.pixels), "test": len(test.pixels)},
        "seed": seed,
        "side": SIDE,
        "components": COMPONENTS,
        "units": UNITS,
        "epochs": EPOCHS,
        "threshold": round(check.threshold, 4),
        "false_alarms_allowed_on_validation": FALSE_ALARMS,
        "versions": {"numpy": np.__version__, "scikit-learn": sklearn.__version__, "pillow": Image.__version__},
    }
    files.make_folder(folder)
    table = measured.to_csv(index=False, float_format="%.4f", lineterminator="\n")
    files.atomic_write(folder / RATES, table.encode())
    files.atomic_write(folder / FACTS, (json.dumps(facts, indent=2) + "\n").encode())
    files.atomic_write(folder / input_check.WEIGHTS, saved(check))
    return measured


def main() -> int:
    """Fit the check on the dataset of the command line and print its rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", help="a dataset that stage 2.1 has prepared")
    parser.add_argument("--seed", type=int, default=2024, help="seeds every random choice (default: %(default)s)")
    chosen = parser.parse_args()
    try:
        measured = write(open_study(chosen.dataset, "cpu", chosen.seed), chosen.seed)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    print("Images flagged, with 95 % intervals\n")
    print(measured.to_string(index=False, float_format="{:.1%}".format))
    return 0


if __name__ == "__main__":
    sys.exit(main())

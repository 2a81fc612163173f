"""A saved model's answers for image files that are in no dataset.

It owns finding the files, bringing them to the model's input, and the table of answers. A file that cannot be used is
reported and the rest is answered. It must not know datasets, splits, training or the command line.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm import tqdm

from chestxray import config, radiographs
from chestxray.config import CLASSES, IMAGE_SUFFIXES, StudyError

if TYPE_CHECKING:
    import keras

REFERENCE_MODEL = "ensemble.keras"
"""The file of the default model, in `config.REFERENCE`."""


def predict_files(
    paths: Iterable[Path],
    model_path: Path | None = None,
    batch_size: int = 32,
    report: Callable[[StudyError], None] | None = None,
) -> pd.DataFrame:
    """Answer for image files and folders of them.

    Files are read and answered a batch at a time, so memory does not grow with their number.

    Args:
        paths: PNG or JPEG files, or folders that are searched with their subfolders, in order of names.
        model_path: a model that takes (N, side, side, 1) grey values in 0–255 and gives seven probabilities; the
            reference ensemble if None.
        batch_size: images a step, from 1.
        report: called with the error, one line that names the file, of every file that cannot be used and every folder
            without images; printed on standard error if None.

    Returns:
        One row for every file that could be used, in order: `image`, the path as it was given (below a folder: the
        folder as given and the way from there), and seven probabilities named as `CLASSES`, to six decimals.

    Raises:
        StudyError: the model is missing or is no such model, or the batch size is below 1.
    """
    if batch_size < 1:
        raise StudyError(f"batch size {batch_size}: give 1 or more")
    report = report or _print
    files = list(find_files(paths, report))
    model = load_model(model_path)
    size = model.input_shape[1]
    step = min(batch_size, max(len(files), 1))
    images, answers = [], [np.empty((0, len(CLASSES)), np.float32)]
    with tqdm(total=len(files), unit="image", desc="predict", disable=None) as bar:
        for batch in _batches(_prepared(files, size, report, bar), step):
            images += [path.as_posix() for path, _ in batch]
            pixels = np.stack([array for _, array in batch])[..., np.newaxis].astype(np.float32)
            # Every step has the same shape, so that the graph is traced once.
            padded = np.pad(pixels, ((0, step - len(batch)), (0, 0), (0, 0), (0, 0)))
            answers.append(np.asarray(model.predict_on_batch(padded))[: len(batch)])
    table = pd.DataFrame(np.concatenate(answers).astype(float).round(6), columns=list(CLASSES))
    table.insert(0, "image", pd.Series(images, dtype=str))
    return table


def find_files(paths: Iterable[Path], report: Callable[[StudyError], None]) -> Iterator[Path]:
    """Yield files as they are, and the image files below folders in order of names; hidden ones are left out.

    Args:
        paths: files or folders.
        report: called with one error for every folder that has no image, or cannot be searched.
    """
    for given in paths:
        if not given.is_dir():
            yield given
            continue
        empty = True
        for place, folders, names in os.walk(given, onerror=lambda error: report(_unreadable(error))):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                    empty = False
                    yield Path(place, name)
        if empty:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            report(StudyError(f"{given}: no image in this folder ({suffixes}); give a folder that holds some"))


def load_model(path: Path | None = None) -> keras.Model:
    """Load a model of radiographs, the reference ensemble if `path` is None.

    Raises:
        StudyError: there is no such file, it is no Keras model, or it takes or gives something else.
    """
    if path is None:
        path = config.REFERENCE / REFERENCE_MODEL
        if not path.is_file():
            place = "/".join(path.parts[-3:])
            raise StudyError(
                f"{place}: the reference model is missing; restore it from the repository, or give a model"
            )
    elif not path.is_file():
        raise StudyError(f"{path}: there is no such model; give a model.keras that the study saved")
    import keras

    try:
        model = keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras, zipfile, h5py and json each raise their own for a wrong or damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise StudyError(f"{path}: no Keras model ({reason}); give a model.keras that the study saved") from error
    takes, gives = model.input_shape, model.output_shape
    if not (isinstance(takes, tuple) and len(takes) == 4 and takes[1] and takes[1] == takes[2] and takes[3] == 1):
        raise StudyError(f"{path}: takes {takes}, not grey squares (None, side, side, 1); give a model of this study")
    if gives != (None, len(CLASSES)):
        raise StudyError(f"{path}: gives {gives}, not {len(CLASSES)} probabilities; give a model of this study")
    return model


def _prepared(
    files: list[Path], size: int, report: Callable[[StudyError], None], bar: tqdm
) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield each usable file with its pixels, (size, size) uint8, in order; a few files ahead are read by threads."""

    def read(path: Path) -> tuple[Path, np.ndarray | StudyError]:
        try:
            return path, radiographs.prepare_pixels(radiographs.decode(path), size)
        except StudyError as error:
            return path, error

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        # Pillow decodes outside the interpreter's lock. Groups bound how many images wait in memory.
        for group in _batches(iter(files), 4 * workers):
            for path, result in pool.map(read, group):
                bar.update()
                if isinstance(result, StudyError):
                    report(result)
                else:
                    yield path, result


def _batches(items: Iterator, size: int) -> Iterator[list]:
    """Lists of `size` items; the last may be shorter."""
    # itertools.batched came with Python 3.12.
    while batch := list(itertools.islice(items, size)):
        yield batch


def _unreadable(error: OSError) -> StudyError:
    return StudyError(f"{error.filename}: cannot be searched ({error.strerror}); check its permissions")


def _print(error: StudyError) -> None:
    tqdm.write(str(error), file=sys.stderr)

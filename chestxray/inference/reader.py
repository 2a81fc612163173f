"""The short way from a radiograph to an answer: `chestxray.load()` gives a reader, and that answers and explains.

It owns what an answer holds, and the stream that reads files ahead in threads and asks the model in batches, so that
memory doesn't grow with the number of files. It must not know the command line, the page, tables on disk or how a model
is run, and imports neither TensorFlow nor pandas.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from chestxray.config import CLASSES, StudyError
from chestxray.images import input_check
from chestxray.images import pixels as grey
from chestxray.images.input_check import Check
from chestxray.images.load import read
from chestxray.inference import engines, interpretation
from chestxray.inference.engines import Engine, Scores
from chestxray.inference.interpretation import Interpretation
from chestxray.networks import class_maps

if TYPE_CHECKING:
    import pandas as pd
from chestxray.inference.answers import Answer

Source = str | os.PathLike | np.ndarray
"""A file, or (height, width) uint8 grey pixels, black air."""

BATCH = 8
"""Radiographs that the model is asked about at a time; more take more memory and hardly less time on a CPU."""

UNCALIBRATED = "not calibrated: no validation predictions beside the model"


class Prepared(NamedTuple):
    """A source that was read: its pixels, those pixels at the model's size, and what speaks against it."""

    pixels: np.ndarray
    square: np.ndarray
    flags: list[str]


class Reader:
    """A model that is ready to answer. Several threads may ask it at once.

    Attributes:
        engine: what runs the model.
        interpretation: what validation taught about its scores.
        check: tells frontal chest radiographs from other images.
    """

    def __init__(self, engine: Engine, meaning: Interpretation, check: Check) -> None:
        self.engine = engine
        self.interpretation = meaning
        self.check = check

    def examine(self, source: Source) -> Answer:
        """Answer for one radiograph.

        Args:
            source: a PNG, JPEG, TIFF or DICOM file, or (height, width) uint8 grey pixels.

        Raises:
            StudyError: the file cannot be used, or the pixels are none of a radiograph.
        """
        prepared = self.prepare(source)
        return self.answers([prepared])[0]

    def predict(self, sources: Source | Iterable[Source]) -> pd.DataFrame:
        """Answer for radiographs, as many as you like.

        Args:
            sources: files or arrays, as for `examine`, or one of them.

        Returns:
            One row a source in their order: `image` (its path; the number of an array), the seven scores named as
            `CLASSES`, and further columns as `prediction.columns` lists them.

        Raises:
            StudyError: the first file that cannot be used; `chestxray predict` names it and goes on.
        """
        import pandas as pd

        from chestxray.inference import answers

        alone = isinstance(sources, str | os.PathLike) or (isinstance(sources, np.ndarray) and sources.ndim == 2)
        numbered = enumerate([sources] if alone else sources)
        named = ((str(number) if isinstance(part, np.ndarray) else str(part), part) for number, part in numbered)
        rows = [answers.row(name, answer) for name, answer in self.stream(named)]
        return pd.DataFrame(rows, columns=answers.columns())

    def heat_map(self, source: Source, finding: str) -> np.ndarray:
        """Where the model looked for one class (Grad-CAM; Selvaraju et al., ICCV 2017).

        Args:
            source: as for `examine`.
            finding: one of `CLASSES`.

        Returns:
            (height, width) float32 of the radiograph's size, 0 to 1 with the maximum at 1 within the radiograph or its
            black border; all 0 where nothing speaks for the class.

        Raises:
            StudyError: as `examine`; the class is unknown; or the model has no convolution, and so no place.
        """
        if finding not in CLASSES:
            raise StudyError(f"finding {finding!r} is unknown; there are: {', '.join(CLASSES)}")
        pixels = _pixels_of(source)
        small = grey.prepare_pixels(pixels, self.engine.side)
        heat = self.engine.heat_maps(small[np.newaxis], CLASSES.index(finding))[0]
        return _unsquared(heat, *pixels.shape)

    def prepare(self, source: Source) -> Prepared:
        """Read a source and bring it to the model's size; raises as `examine`."""
        if isinstance(source, np.ndarray):
            pixels, facts = _pixels_of(source), None
        else:
            pixels, facts = _read(source)
        flags = input_check.flags(pixels, facts, self.check)
        return Prepared(pixels, grey.prepare_pixels(pixels, self.engine.side), flags)

    def answers(self, batch: list[Prepared]) -> list[Answer]:
        """Answer for radiographs that were prepared, all at once."""
        scores = self.engine.scores(np.stack([prepared.square for prepared in batch]))
        return [self._answer(batch[row], Scores(*(part[row] for part in scores))) for row in range(len(batch))]

    def stream(
        self,
        sources: Iterable[tuple[str, Source]],
        batch_size: int = BATCH,
        report: Callable[[StudyError], None] | None = None,
        keep: int = 0,
    ) -> Iterator[tuple[str, Answer]]:
        """Answer for any number of radiographs in one stream: threads read ahead while the model works.

        Args:
            sources: names and what they name; taken as they are needed.
            batch_size: radiographs that the model is asked about at a time, from 1.
            report: called with the error of every source that cannot be used; if None, the first one is raised.
            keep: the longer side, in pixels, to which an answer's `pixels` are shrunk, for what waits takes memory; 0
                keeps them as they are.

        Yields:
            Each name with its answer, in order.

        Raises:
            StudyError: the batch size is below 1; or, without `report`, a source cannot be used.
        """
        if batch_size < 1:
            raise StudyError(f"batch size {batch_size}: give 1 or more")
        ready = self._read_ahead(sources, keep)
        while batch := list(itertools.islice(_usable(ready, report), batch_size)):
            answers = self.answers([prepared for _, prepared in batch])
            for (name, _), answer in zip(batch, answers, strict=True):
                yield name, answer

    def _read_ahead(
        self, sources: Iterable[tuple[str, Source]], keep: int
    ) -> Iterator[tuple[str, Prepared | StudyError]]:
        """Sources with what was read of them, in order; threads are a few ahead, so that few wait in memory."""

        def prepare(source: Source) -> Prepared | StudyError:
            try:
                prepared = self.prepare(source)
                return prepared._replace(pixels=_shrunk(prepared.pixels, keep)) if keep else prepared
            except StudyError as error:
                return error

        workers = os.cpu_count() or 1
        waiting: deque[tuple[str, Future]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for name, source in sources:
                    waiting.append((name, pool.submit(prepare, source)))
                    if len(waiting) > 2 * workers:
                        first, future = waiting.popleft()
                        yield first, future.result()
                while waiting:
                    first, future = waiting.popleft()
                    yield first, future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _answer(self, prepared: Prepared, scores: Scores) -> Answer:
        """One answer, from (7,) probabilities and (members, 7) opinions."""
        meaning = self.interpretation
        calibrated = meaning.probabilities(scores.probabilities)
        opinions = np.vstack([meaning.probabilities(scores.opinions), calibrated])
        return Answer(
            pixels=prepared.pixels,
            probabilities=_named(scores.probabilities),
            calibrated=_named(calibrated),
            low=_named(opinions.min(axis=0)),
            high=_named(opinions.max(axis=0)),
            above=meaning.above(scores.probabilities),
            flags=prepared.flags if meaning.calibrated else [*prepared.flags, UNCALIBRATED],
            operating_points=dict(meaning.points),
        )


def load(model: str | os.PathLike | None = None, engine: str | None = None) -> Reader:
    """Load a model that answers.

    Args:
        model: a `model.keras` of the study; the committed reference ensemble if None.
        engine: `onnx`, `keras`, or None for the faster one that can run it.

    Raises:
        StudyError: the model is missing or none of this study's, or what belongs to it is damaged.
    """
    path = engines.reference_model() if model is None else Path(model)
    running = engines.start(path, engine)
    meaning = interpretation.of_reference() if model is None else interpretation.of_model(path)
    return Reader(running, meaning, input_check.committed())


def _usable(
    ready: Iterator[tuple[str, Prepared | StudyError]], report: Callable[[StudyError], None] | None
) -> Iterator[tuple[str, Prepared]]:
    for name, result in ready:
        if not isinstance(result, StudyError):
            yield name, result
        elif report is None:
            raise result
        else:
            report(result)


def _read(source: str | os.PathLike) -> tuple[np.ndarray, grey.Facts]:
    found = read(Path(source))
    return found.pixels, found.facts


def _pixels_of(source: Source) -> np.ndarray:
    """The pixels of a source, (height, width) uint8.

    Raises:
        StudyError: an array has another shape or type, or is too small or large; or the file cannot be used.
    """
    if not isinstance(source, np.ndarray):
        return _read(source)[0]
    if source.ndim != 2 or source.dtype != np.uint8:
        shape = " × ".join(map(str, source.shape))
        raise StudyError(f"array of {shape or 'no'} {source.dtype}: give (height, width) uint8 grey pixels, black air")
    if min(source.shape) < grey.SMALLEST_SIDE or source.size > grey.MOST_PIXELS:
        height, width = source.shape
        raise StudyError(
            f"array of {width} × {height} px: give {grey.SMALLEST_SIDE} px or more a side, and fewer than "
            f"{grey.MOST_PIXELS:,} in all"
        )
    return source


def _named(values: np.ndarray) -> dict[str, float]:
    return dict(zip(CLASSES, map(float, values), strict=True))


def _shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    """Pixels with their longer side at most `side`, of memory of their own."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.BOX)
    return np.asarray(image)


def _unsquared(heat: np.ndarray, height: int, width: int) -> np.ndarray:
    """A heat-map of a padded square as one of the radiograph in it: enlarged, and the padding cut off."""
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    rows, columns = (
        class_maps.resizing_matrix(len(heat), side)[at : at + size] for at, size in ((top, height), (left, width))
    )
    return rows @ heat @ columns.T

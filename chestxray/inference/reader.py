"""Reader: answers and heat-maps for radiographs, from files or arrays.

`chestxray.load()` gives a `Reader`. Many files go through `Reader.stream`: threads read ahead, and the model predicts
in batches, so that memory doesn't grow with their number. Neither TensorFlow nor pandas is imported here.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from chestxray.config import SIX_FINDINGS, SIX_LABELS, StudyError
from chestxray.evaluation import posterior
from chestxray.evaluation.posterior import Shares
from chestxray.images import input_check
from chestxray.images import pixels as grey
from chestxray.images.input_check import Check
from chestxray.images.load import read
from chestxray.inference import answers, engines, interpretation, overlay
from chestxray.inference.answers import Answer
from chestxray.inference.engines import Engine
from chestxray.inference.interpretation import Interpretation
from chestxray.networks.class_activation import resizing_matrix

if TYPE_CHECKING:
    import pandas as pd

Source = str | os.PathLike | np.ndarray
"""A file, or (height, width) uint8 grey pixels, air black."""

BATCH = 8
"""Radiographs in one call of the model; more take more memory and hardly less time on a CPU."""

UNCALIBRATED = "not calibrated: no validation predictions beside the model"


class Prepared(NamedTuple):
    """A radiograph that was read.

    Attributes:
        pixels: (height, width) uint8, shrunk as `overlay.shrink` does.
        square: (side, side) uint8, padded and resized for the model.
        flags: what the input check objects to.
    """

    pixels: np.ndarray
    square: np.ndarray
    flags: list[str]


@dataclass
class Reader:
    """A model that predicts from radiographs. Several threads may call it at once.

    Attributes:
        engine: runs the model.
        interpretation: calibration and operating points of its scores.
        check: the input check, which tells frontal chest radiographs from other images.
        prevalence: the class shares at which a class is named.
    """

    engine: Engine
    interpretation: Interpretation
    check: Check
    prevalence: Shares = posterior.EQUAL

    def examine(self, source: Source) -> Answer:
        """Answer for a PNG, JPEG, TIFF or DICOM file, or (height, width) uint8; `StudyError` where it can't be used."""
        return self.answers([self.prepare(source)])[0]

    def predict(self, sources: Source | Iterable[Source]) -> pd.DataFrame:
        """Answer for files or arrays, as for `examine`, or one of them; raises for the first that can't be used.

        Returns:
            One row per source in their order, with the columns of `answers.columns`; `image` is the path of a file, or
            the number of an array.
        """
        import pandas as pd

        alone = isinstance(sources, str | os.PathLike) or (isinstance(sources, np.ndarray) and sources.ndim == 2)
        numbered = enumerate([sources] if alone else sources)
        named = ((str(number) if isinstance(part, np.ndarray) else str(part), part) for number, part in numbered)
        rows = [answers.row(name, answer) for name, answer in self.stream(named)]
        return pd.DataFrame(rows, columns=answers.columns())

    def heat_map(self, source: Source, finding: str) -> np.ndarray:
        """The class activation map of one finding (Zhou et al., CVPR 2016).

        Args:
            source: as for `examine`.
            finding: one of `SIX_FINDINGS`.

        Returns:
            (height, width) float32 of the radiograph's size, 0 to 1 with the maximum at 1 within the radiograph or its
            black border: how far a position raises the finding's logit above its mean over positions.

        Raises:
            StudyError: as `examine`; the finding is unknown; or the model has no class maps.
        """
        if finding not in SIX_FINDINGS:
            raise StudyError(f"finding {finding!r} is unknown; there are: {', '.join(SIX_FINDINGS)}")
        pixels, _ = _read(source)
        square = grey.prepare_pixels(pixels, self.engine.side)
        heat = self.engine.heat_maps(square[np.newaxis], finding)[0]
        return _without_padding(heat, *pixels.shape)

    def prepare(self, source: Source, bits: int | None = None) -> Prepared:
        """Read a radiograph and resize it for the model.

        Args:
            source: as for `examine`.
            bits: by which a 16-bit file is read, as `images.pixels.greys` finds them for a dataset; by its own if None.
        """
        pixels, facts = _read(source, bits)
        flags = input_check.flags(pixels, facts, self.check)
        return Prepared(overlay.shrink(pixels), grey.prepare_pixels(pixels, self.engine.side), flags)

    def answers(self, batch: list[Prepared]) -> list[Answer]:
        """Answer for radiographs that were read, in one call of the model."""
        scores = self.engine.scores(np.stack([prepared.square for prepared in batch]))
        meaning = self.interpretation
        members = meaning.probabilities(scores.member_findings[:, :, SIX_LABELS])
        own = scores.findings[:, SIX_LABELS]
        present, equal = meaning.probabilities(own), meaning.classes(scores.classes)
        # The members' mean may lie outside their range once calibrated.
        reach = np.concatenate([members, present[:, None]], axis=1)
        return [
            Answer(
                pixels=prepared.pixels,
                equal=equal[row],
                prevalence=self.prevalence,
                present=_named(present[row]),
                low=_named(reach[row].min(axis=0)),
                high=_named(reach[row].max(axis=0)),
                above=meaning.above(own[row]),
                flags=prepared.flags if meaning.calibrated else [*prepared.flags, UNCALIBRATED],
                operating_points=dict(meaning.points),
            )
            for row, prepared in enumerate(batch)
        ]

    def stream(
        self,
        sources: Iterable[tuple[str, Source]],
        batch_size: int = BATCH,
        report: Callable[[StudyError], None] | None = None,
        bits: int | None = None,
    ) -> Iterator[tuple[str, Answer]]:
        """Answer for any number of radiographs in one stream: threads read ahead while the model predicts.

        Args:
            sources: names with their radiographs; taken as they are needed.
            batch_size: radiographs in one call of the model, from 1.
            report: called with the error of every source that cannot be used; if None, the first one is raised.
            bits: as for `prepare`.

        Yields:
            Each name with its answer, in order.

        Raises:
            StudyError: the batch size is below 1; or, without `report`, a source cannot be used.
        """
        if batch_size < 1:
            raise StudyError(f"batch size {batch_size}: give 1 or more")
        ready = self._read_ahead(sources, report, functools.partial(self.prepare, bits=bits))
        while batch := list(itertools.islice(ready, batch_size)):
            names, prepared = zip(*batch, strict=True)
            yield from zip(names, self.answers(list(prepared)), strict=True)

    def _read_ahead(
        self,
        sources: Iterable[tuple[str, Source]],
        report: Callable[[StudyError], None] | None,
        prepare: Callable[[Source], Prepared],
    ) -> Iterator[tuple[str, Prepared]]:
        """Radiographs in order, read by threads that are a few ahead, so that few wait in memory."""
        workers, named, waiting = os.cpu_count() or 1, iter(sources), deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                while True:
                    for name, source in itertools.islice(named, 2 * workers + 1 - len(waiting)):
                        waiting.append((name, pool.submit(prepare, source)))
                    if not waiting:
                        return
                    name, future = waiting.popleft()
                    try:
                        yield name, future.result()
                    except StudyError as error:
                        if report is None:
                            raise
                        report(error)
            finally:
                pool.shutdown(cancel_futures=True)


def load(
    model: str | os.PathLike | None = None, engine: str | None = None, prevalence: str | os.PathLike = "equal"
) -> Reader:
    """Load a model for prediction.

    Args:
        model: a `model.keras` of the study; the committed reference ensemble if None.
        engine: `onnx`, `keras`, or None for the faster one that can run it.
        prevalence: the class shares at which a class is named: `equal`, `sample`, `nih`, or a CSV file as
            `posterior.read_shares` reads it.

    Raises:
        StudyError: the model is missing or none of this study's, what belongs to it is damaged, or there are no such
            shares.
    """
    shares = posterior.read_shares(os.fspath(prevalence))
    path = engines.reference_model() if model is None else Path(model)
    running = engines.start(path, engine)
    meaning = interpretation.of_reference() if model is None else interpretation.of_model(path)
    return Reader(running, meaning, input_check.committed(), shares)


def _read(source: Source, bits: int | None = None) -> tuple[np.ndarray, grey.Facts | None]:
    """The (height, width) uint8 pixels of a source, and a file's facts; `bits` as for `Reader.prepare`."""
    if not isinstance(source, np.ndarray):
        found = read(Path(source), bits)
        return found.pixels, found.facts
    shape = " × ".join(map(str, source.shape))
    if source.ndim != 2 or source.dtype != np.uint8:
        raise StudyError(f"array of {shape or 'no'} {source.dtype}: give (height, width) uint8 grey pixels, black air")
    if min(source.shape) < grey.SMALLEST_SIDE or source.size > grey.MOST_PIXELS:
        limits = f"{grey.SMALLEST_SIDE} px or more a side, and fewer than {grey.MOST_PIXELS:,} in all"
        raise StudyError(f"array of {shape} px: give {limits}")
    return source, None


def _named(values: np.ndarray) -> dict[str, float]:
    return dict(zip(SIX_FINDINGS, values.tolist(), strict=True))


def _without_padding(heat: np.ndarray, height: int, width: int) -> np.ndarray:
    """A heat-map of a padded square as one of the radiograph in it: enlarged, and the padding cut off."""
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    rows, columns = (resizing_matrix(len(heat), side)[at : at + size] for at, size in ((top, height), (left, width)))
    return rows @ heat @ columns.T

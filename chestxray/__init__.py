"""Chest X-rays image classification: the code that the study's notebooks share, and `load`, the short way to an answer.

Importing this package is cheap and pulls in neither TensorFlow nor pandas; each module imports what it needs.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chestxray.inference.reader import Reader

__version__ = "0.1.0"

# TensorFlow reads this once, when it is imported. By itself it leaves oneDNN's kernels out on a CPU with AVX2 alone,
# where `tests/benchmarks/bench_kernels.py` found them faster.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def load(
    model: str | os.PathLike | None = None, engine: str | None = None, prevalence: str | os.PathLike = "equal"
) -> Reader:
    """Load a model that answers for radiographs: `load().predict("chest.png")`.

    Args:
        model: a `model.keras` of the study; the committed reference ensemble if None.
        engine: `onnx`, `keras`, or None for the faster one that can run it.
        prevalence: the class shares at which a class is named: `equal`, `sample`, `nih`, or a CSV file `class,share`.

    Raises:
        StudyError: the model is missing or none of this study's, or what belongs to it is damaged.
    """
    from chestxray.inference import reader

    return reader.load(model, engine, prevalence)

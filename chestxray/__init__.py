"""Chest X-rays image classification: the code that the study's notebooks share, and `load`, the short way to an answer.

Importing this package is cheap and pulls in neither TensorFlow nor pandas; each module imports what it needs.
"""

from __future__ import annotations

import os

from chestxray.config import lazy

__version__ = "0.1.0"

# TensorFlow reads this once, when it is imported. By itself it leaves oneDNN's kernels out on a CPU with AVX2 alone,
# where `tests/benchmarks/bench_kernels.py` found them faster.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

__getattr__ = lazy(__name__, {"inference.reader": "load"})

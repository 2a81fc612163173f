"""Posterior: the probabilities of the seven classes at given class shares, and the class named by them.

They are probabilities given that exactly one of the seven labels applies. NumPy alone is imported.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from chestxray.config import CLASSES, StudyError

SHARES: Mapping[str, tuple[int, ...]] = {
    "equal": (1, 1, 1, 1, 1, 1, 1),
    "sample": (352, 291, 621, 127, 3003, 232, 242),
    "nih": (4215, 3955, 9547, 2139, 60361, 2705, 2194),
}
"""Radiographs with exactly one label, of the seven `CLASSES`: none (`equal`); the 4,868 such radiographs that
1_Datasets/nih_9k.csv lists as train_val, selected or not (`sample`); the 85,116 in the NIH's table
Data_Entry_2017_v2020.csv (`nih`)."""

TINY = 1e-7
"""The least probability whose logarithm is taken, or that is re-weighted."""
_MILLION = 1_000_000


class Shares(NamedTuple):
    """Class shares: a word of `SHARES` or a file's name, and (7,) float64 of `CLASSES`, 0 to 1, with sum 1."""

    name: str
    values: np.ndarray

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{name} {value:.3f}' for name, value in self.by_class.items())})"

    @property
    def by_class(self) -> dict[str, float]:
        return dict(zip(CLASSES, self.values.tolist(), strict=True))


EQUAL = Shares("equal", np.full(len(CLASSES), 1 / len(CLASSES)))


def read_shares(given: str) -> Shares:
    """Class shares by name, or from a file.

    Args:
        given: a word of `SHARES`; or a CSV file with the header `class,share` and one row per class in any order. Its
            shares need not sum to 1. They may be zero, but not all: a class with share zero is never named.

    Raises:
        StudyError: it is neither a word nor such a file.
    """
    if given == "equal":
        return EQUAL
    values = SHARES.get(given) or _read(Path(given))
    scaled = np.asarray(values, dtype=np.float64) / max(values)  # so that no sum overflows
    return Shares(Path(given).name, scaled / scaled.sum())


def _read(path: Path) -> list[float]:
    """The seven shares of a file as they stand there."""
    words = f"give one of {', '.join(SHARES)}, or a CSV file with the columns class,share"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(row)] or [[]]
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); {words}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise StudyError(f"{path}: no CSV table in UTF-8; {words}") from error
    if header != ["class", "share"]:
        raise StudyError(f"{path}: header {','.join(header)[:80]!r}; write class,share")
    found: dict[str, float] = {}
    for row in rows:
        name, cell = row if len(row) == 2 else (",".join(row), "")
        if name not in CLASSES or name in found:
            what = "is there twice; keep one" if name in found else f"is unknown; write {', '.join(CLASSES)}"
            raise StudyError(f"{path}: class {name[:80]!r} {what}")
        try:
            found[name] = float(cell.replace("_", " "))  # Python alone reads 1_000 as a number
        except ValueError:
            found[name] = np.nan
        if not 0 <= found[name] < np.inf:
            raise StudyError(f"{path}: {name} has share {cell[:80]!r}; write a number from 0")
    if missing := [name for name in CLASSES if name not in found]:
        raise StudyError(f"{path}: lacks {', '.join(missing)}; add a row, with share 0 if it never occurs")
    if not any(found.values()):
        raise StudyError(f"{path}: all shares are 0; write one above 0")
    return [found[name] for name in CLASSES]


def tempered(probabilities: np.ndarray, temperature: float, biases: np.ndarray | float = 0.0) -> np.ndarray:
    r"""Temperature scaling (Guo et al., ICML 2017): :math:`\mathrm{softmax}(\log p / T + b)`, of the same shape.

    Args:
        probabilities: (…, K) with sum 1.
        temperature: T, above 0; above 1 it makes the probabilities more even.
        biases: b, (K,).
    """
    logits = np.log(np.clip(np.asarray(probabilities, dtype=np.float64), TINY, 1)) / temperature + biases
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def platt(scores: np.ndarray, temperatures: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Platt scaling (Platt, 1999) of findings' scores: sigmoid of log-odds / temperature + bias, of the same shape.

    Args:
        scores: (…, K), 0 to 1.
        temperatures: (K,), above 0.
        biases: (K,).
    """
    clipped = np.clip(np.asarray(scores, dtype=np.float64), TINY, 1 - TINY)
    log_odds = np.log(clipped) - np.log1p(-clipped)
    return 1 / (1 + np.exp(-np.clip(log_odds / temperatures + biases, -500, 500)))


def reweighted(equal: np.ndarray, shares: Shares) -> np.ndarray:
    r"""Probabilities at other class shares (Saerens et al., Neural Computation 2002), (…, 7).

    :math:`p(k \mid x, \pi) \propto p(k \mid x, \text{equal shares}) \, \pi_k`. This assumes prior shift: radiographs of
    one class look alike wherever they come from, and only the shares of the classes differ.

    Args:
        equal: (…, 7) at equal shares, with sum 1.
        shares: the shares :math:`\pi`.
    """
    weighted = np.clip(np.asarray(equal, dtype=np.float64), TINY, 1) * shares.values
    return weighted / weighted.sum(axis=-1, keepdims=True)


def rounded(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities to six decimals whose sum is exactly 1,000,000 millionths, in the same order of size.

    What rounding down leaves goes to the largest remainders, one millionth each.

    Args:
        probabilities: (…, K) with sum 1.
    """
    exact = np.asarray(probabilities, dtype=np.float64) * _MILLION
    whole = np.floor(exact)
    rank = np.argsort(np.argsort(whole - exact, axis=-1, kind="stable"), axis=-1)
    return (whole + (rank < _MILLION - whole.sum(axis=-1, keepdims=True))) / _MILLION


def named(rounded: np.ndarray) -> np.ndarray:
    """The index of the largest of (…, K) rounded probabilities: the class named; of equal ones the first."""
    return np.argmax(rounded, axis=-1)


def named_at(equal: np.ndarray, shares: Shares) -> np.ndarray:
    """The index of the class named at class shares.

    Args:
        equal: (…, 7) probabilities at equal shares.
        shares: The seven class shares.
    """
    return named(rounded(reweighted(equal, shares)))

"""The reference's radiographs: the committed list, and how an original becomes one of them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chestxray.config import StudyError
from chestxray.data import subset


def folder_of(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"set {variable} to a folder of real radiographs to run this")
    return Path(os.environ[variable]) / "images"


def test_the_list_has_every_image_of_the_reference():
    rows = subset.read_list()
    assert list(rows) == sorted(rows) and len(rows) == 9424
    assert Counter(row.list for row in rows.values()) == {"train_val": 7465, "test": 1959}
    assert {row.list == "test" for row in rows.values() if row.split == "test"} == {True}
    assert sum(bool(row.sha256_256) for row in rows.values()) == 3315
    split_of = {}
    for row in rows.values():
        assert split_of.setdefault(row.image[:8], row.split) == row.split  # a patient's images stay together


def test_an_original_is_reduced_by_these_rules():
    pixels = np.random.default_rng(3).integers(0, 256, (1024, 1024), np.uint8)
    small, large = subset.reduce(pixels), subset.reduce_256(pixels)
    assert small.shape == (128, 128) and large.shape == (256, 256) and small.dtype == large.dtype == np.uint8

    def mean(values: list[int]) -> int:  # halves up
        return (2 * sum(values) + len(values)) // (2 * len(values))

    for row, column in np.random.default_rng(4).integers(0, 128, (200, 2)).tolist():
        block = pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].tolist()
        means = [mean([block[y + i][x + j] for i in (1, 2) for j in (1, 2)]) for y in (0, 4) for x in (0, 4)]
        assert small[row, column] == mean(means)
        sixteen = [value for line in block[:4] for value in line[:4]]
        assert large[2 * row, 2 * column] == round(Fraction(sum(sixteen), 16))  # halves to even
    with pytest.raises(StudyError, match=r"\(512, 512\)"):
        subset.reduce(pixels[:512, :512])
    with pytest.raises(StudyError, match="int64"):
        subset.reduce_256(pixels.astype(np.int64))


def test_the_natives_become_the_radiographs_to_the_bit():
    rows, seen = subset.read_list(), [0, 0]
    for path in sorted(folder_of("CHESTXRAY_NIH_NATIVE").iterdir()):
        pixels, row = np.asarray(Image.open(path)), rows[path.name]
        assert hashlib.sha256(subset.reduce(pixels).tobytes()).hexdigest() == row.sha256_128
        seen[0] += 1
        if row.sha256_256:
            assert hashlib.sha256(subset.reduce_256(pixels).tobytes()).hexdigest() == row.sha256_256
            seen[1] += 1
    assert seen == [22, 20]

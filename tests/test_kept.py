"""An array is made once, and again as soon as anything that it was made from has changed."""

import numpy as np
import pytest

from chestxray import files, kept


@pytest.fixture
def made(tmp_path):
    """A function that asks for the array `maps`, and how often it had to be made."""
    count = []

    def ask(*made_from, name="maps"):
        def make():
            count.append(name)
            return np.full((2, 3), len(count), np.float32)

        return kept.array(tmp_path / "kept", name, made_from, make)

    ask.count = count
    return ask


def test_it_is_made_once_and_given_back_exactly(made):
    first = made("a", 1)
    again = made("a", 1)
    assert len(made.count) == 1
    assert again.dtype == np.float32 and np.array_equal(first, again)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["a", "b"], ["ab"]),
        ([1], [2]),
        ([np.zeros(4, np.uint8)], [np.zeros((2, 2), np.uint8)]),
        ([np.zeros(8, np.uint8)], [np.zeros(1, np.float64)]),
        ([kept], [files]),
    ],
    ids=["parts", "value", "shape", "type", "module"],
)
def test_it_is_made_again_when_something_differs(made, tmp_path, before, after):
    made(*before)
    made(*after)
    assert len(made.count) == 2
    assert len(list((tmp_path / "kept").iterdir())) == 1, "what was made from other things is gone"


def test_a_file_counts_by_its_content(made, tmp_path):
    weights = tmp_path / "model.keras"
    weights.write_bytes(b"one")
    made(weights)
    weights.write_bytes(b"one")
    made(weights)
    assert len(made.count) == 1
    weights.write_bytes(b"two")
    made(weights)
    assert len(made.count) == 2


def test_names_are_apart_and_a_damaged_file_is_made_again(made, tmp_path):
    made("a", name="maps")
    made("a", name="maps-of-errors")
    made("a", name="maps")
    assert made.count == ["maps", "maps-of-errors"]
    for path in (tmp_path / "kept").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert made("a", name="maps").shape == (2, 3)
    assert len(made.count) == 3

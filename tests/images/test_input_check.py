"""Which images are flagged: by what their file says, by their size, and by the check that was fitted on radiographs."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from benchmarks import fit_input_check
from PIL import Image

from chestxray.config import StudyError
from chestxray.data import phantom
from chestxray.images import input_check, pixels
from chestxray.images.pixels import Facts


@pytest.fixture(scope="module")
def real(nih) -> np.ndarray:
    """Real radiographs, (40, side, side)."""
    files = sorted((nih / "images").glob("*.png"))[::200][:40]
    return np.stack([pixels.prepare_pixels(pixels.decode(file), 128) for file in files])


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return phantom.render(phantom.compose(1, seed=0, findings=(), view="PA"), 256)


def test_real_radiographs_pass_and_made_images_do_not(real):
    assert sum(bool(input_check.flags(image, Facts("PNG"))) for image in real) <= 2
    rng = np.random.default_rng(5)
    for name, make in (fit_input_check.TRAINED | fit_input_check.UNSEEN).items():
        made = [np.ascontiguousarray(make(image, rng)) for image in real]
        assert sum(bool(input_check.flags(image)) for image in made) >= 24, name


def test_how_a_radiograph_is_held_is_told(real):
    turned = {
        "looks inverted (air should be black)": 255 - real,
        "looks upside down": real[:, ::-1],
        "looks turned by a quarter": np.rot90(real, axes=(1, 2)),
    }
    for words, images in turned.items():
        said = [input_check.flags(np.ascontiguousarray(image)) for image in images]
        assert sum(flags == [words] for flags in said) >= 34, words


def test_the_committed_rates_are_those_of_the_committed_check():
    facts = json.loads((input_check.FOLDER / fit_input_check.FACTS).read_text("utf-8"))
    rates = pd.read_csv(input_check.FOLDER / fit_input_check.RATES, index_col="kind")
    assert input_check.committed().threshold == pytest.approx(facts["threshold"], abs=1e-4)
    on_validation = rates.loc["radiographs of validation"]
    assert on_validation["flagged"] <= facts["false_alarms_allowed_on_validation"] * facts["images"]["valid"]
    assert rates.loc["radiographs of test", "images"] == facts["images"]["test"]
    assert rates.loc["radiographs of test", "high"] < 0.03
    assert set(rates.index[2:]) == {*fit_input_check.TRAINED, *fit_input_check.UNSEEN}
    assert ((rates["low"] <= rates["rate"] + 1e-4) & (rates["rate"] <= rates["high"] + 1e-4)).all()


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (Facts("DICOM", view="LL", body_part="CHEST", modality="DX"), "not an upright frontal view (view LL)"),
        (Facts("DICOM", view="PA", body_part="HAND"), "not a chest (body part HAND)"),
        (Facts("DICOM", modality="CT"), "not a radiograph (modality CT)"),
        (Facts("DICOM", raw=True), "raw detector data, not what a reader looks at"),
        (Facts("JPEG", colour=60.0), "coloured, as no radiograph is"),
    ],
)
def test_what_the_file_says_flags_directly(drawn, facts, words):
    assert words in input_check.flags(drawn, facts)
    assert words not in input_check.flags(drawn, Facts("DICOM", view="PA", body_part="CHEST", modality="DX"))


def test_tiny_and_blank_images_are_flagged(drawn):
    small = pixels.prepare_pixels(drawn, 48)
    assert "tiny: 48 × 48 px" in input_check.flags(small)
    assert "tiny" not in " ".join(input_check.flags(pixels.prepare_pixels(drawn, 64)))
    assert input_check.flags(np.full((200, 200), 7, np.uint8)) == ["blank: all pixels are alike"]


def test_a_check_is_fitted_and_stored_as_it_is_read_again(tmp_path):
    images = np.stack([phantom.render(phantom.compose(number, seed=1), 64) for number in range(60)])
    check = fit_input_check.fit(images[:40], images[40:], seed=3, false_alarms=0.1)
    again = fit_input_check.fit(images[:40], images[40:], seed=3, false_alarms=0.1)
    small = np.stack([input_check.reduced(image) for image in images])
    assert np.array_equal(check.scores(small), again.scores(small))
    assert check.looks_foreign(small[40:]).sum() == 2  # a tenth of validation, exactly
    (tmp_path / "check.npz").write_bytes(fit_input_check.saved(check))
    stored = input_check.Check.load(tmp_path / "check.npz")
    assert np.array_equal(stored.scores(small), check.scores(small)) and stored.threshold == check.threshold
    patients = np.repeat(np.arange(10), 2).astype(str)
    split = fit_input_check.Split(images[40:], patients)
    rates = fit_input_check.rates(check, split, split, seed=3, draws=50).set_index("kind")
    assert rates.loc["radiographs of test", ["images", "flagged"]].tolist() == [20, 2]
    assert rates.loc["inverted", "rate"] > 0.5


def test_a_damaged_check_is_named(tmp_path):
    path = tmp_path / "check.npz"
    with pytest.raises(StudyError, match=r"check\.npz: cannot be read"):
        input_check.Check.load(path)
    whole = (input_check.FOLDER / input_check.WEIGHTS).read_bytes()
    for data in (b"", whole[:-500], whole[:3000]):
        path.write_bytes(data)
        with pytest.raises(StudyError, match=r"check\.npz: is damaged"):
            input_check.Check.load(path)


def test_another_photograph_is_flagged():
    """One that nothing was fitted to or measured on: matplotlib's."""
    from matplotlib import cbook

    with cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        grey = np.asarray(image.convert("L"))
    assert input_check.flags(grey)

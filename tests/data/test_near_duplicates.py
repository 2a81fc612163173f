"""Near-duplicates: hashes against the formula, pairs against a loop, likeness against a correlation, copies found."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from chestxray.data import near_duplicates, phantom, preparation

BITS = near_duplicates.HASH_SIDE**2


@pytest.fixture(scope="module")
def chests() -> list[np.ndarray]:
    """Twelve phantoms of 128 px, each of another patient."""
    scenes = [phantom.compose(index, 5) for index in range(40)]
    drawn = {scene.slot.patient: phantom.render(scene, 128) for scene in scenes}
    return list(drawn.values())[:12]


def jpeg(pixels: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


COPIES = {
    "the same": lambda pixels: pixels,
    "JPEG": jpeg,
    "darker": lambda pixels: (pixels * 0.85).astype(np.uint8),
    "brighter": lambda pixels: np.clip(pixels * 1.15, 0, 255).astype(np.uint8),
    "moved": lambda pixels: np.pad(pixels, ((0, 0), (2, 0)))[:, :-2],
}


def test_the_hash_is_the_median_of_the_lowest_frequencies(chests):
    place = np.arange(64)
    waves = np.cos(np.pi * place[:, None] * (2 * place + 1) / 128)  # the discrete cosine transform of type II
    for pixels in chests[:3]:
        small = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.LANCZOS), float)
        low = (waves @ small @ waves.T)[:16, :16]
        expected = (low > np.median(low)).ravel()
        assert (near_duplicates.perceptual_hash(pixels) == expected).all()


@pytest.mark.parametrize("tile", [7, 64, 4096])
def test_close_pairs_are_those_of_a_plain_loop(monkeypatch, tile):
    monkeypatch.setattr(near_duplicates, "_TILE", tile)
    random = np.random.default_rng(0)
    hashes = random.random((100, BITS)) < 0.5
    for copy in range(50, 90):  # some within the distance, some beyond, some of the same patient
        hashes[copy] = hashes[copy - 50] ^ (random.random(BITS) < random.uniform(0, 0.4))
    patients = random.integers(0, 60, 100)
    expected = [
        (int((hashes[a] ^ hashes[b]).sum()), a, b)
        for a in range(100)
        for b in range(a + 1, 100)
        if patients[a] != patients[b]
    ]
    expected = sorted(pair for pair in expected if pair[0] <= near_duplicates.DISTANCE)
    found = near_duplicates.close_pairs(hashes, patients)
    assert len(expected) > 10
    assert list(found[["distance", "first", "second"]].itertuples(index=False, name=None)) == expected


def test_no_close_pair_is_an_empty_table():
    found = near_duplicates.close_pairs(np.eye(3, BITS) > 0, np.zeros(3, int))
    assert found.empty and set(found) == {"distance", "first", "second"}


def test_likeness_is_the_best_correlation(chests):
    random = np.random.default_rng(1)
    first, second = (random.normal(size=(128, 128)).astype(np.float32) for _ in range(2))
    second[10:120, 10:120] += first[12:122, 9:119]
    inner = first[8:-8, 8:-8].ravel()
    every = [
        np.corrcoef(inner, second[8 + down : 120 + down, 8 + right : 120 + right].ravel())[0, 1]
        for down in range(-3, 4)
        for right in range(-3, 4)
    ]
    assert near_duplicates.likeness(first, second) == pytest.approx(max(every), abs=1e-4) and max(every) > 0.6
    flat = np.zeros((128, 128), np.float32)
    assert near_duplicates.likeness(flat, flat) == near_duplicates.likeness(first, flat) == 0


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_close_and_alike_and_another_patient_is_not(chests, name):
    details = [near_duplicates.detail(pixels) for pixels in chests]
    for pixels, fine in zip(chests[:4], details, strict=False):
        copy = np.ascontiguousarray(COPIES[name](pixels))
        bits = near_duplicates.perceptual_hash(pixels) ^ near_duplicates.perceptual_hash(copy)
        assert bits.sum() <= near_duplicates.DISTANCE
        assert near_duplicates.likeness(fine, near_duplicates.detail(copy)) >= near_duplicates.LIKENESS
    others = [near_duplicates.likeness(a, b) for k, a in enumerate(details) for b in details[:k]]
    assert max(others) < near_duplicates.LIKENESS


def test_the_check_finds_what_was_copied_across_splits(study_of, make_raw, chests):
    raw = make_raw("copied", images=36)
    images = sorted((raw / "images").iterdir())
    for place, path in enumerate(images):  # patients 1 to 12, three images each, all alike: their own are no finding
        Image.fromarray(chests[place // 3]).save(path)
    test_patients = {"00000004", "00000008", "00000012"}
    copied = {
        ("00000001_000.png", "00000004_001.png"): jpeg,
        ("00000002_001.png", "00000003_002.png"): COPIES["darker"],
    }
    for (source, target), alter in copied.items():
        Image.fromarray(alter(np.asarray(Image.open(raw / "images" / source)))).save(raw / "images" / target)
    study = study_of(raw, image_size=128)
    manifest = preparation.prepare(study, workers=1).manifest
    found = near_duplicates.check(study, manifest)
    duplicates = found.pairs[found.pairs["near_duplicate"]]
    assert (duplicates["patient"] != duplicates["other_patient"]).all()
    # The copy is alike to all three of the images of the patient that it was taken from.
    expected = {(f"{source[:8]}_{follow_up:03d}.png", target) for source, target in copied for follow_up in range(3)}
    assert set(zip(duplicates["image"], duplicates["other_image"], strict=True)) == expected
    crossing = duplicates[duplicates["split"].ne(duplicates["other_split"])]
    split = manifest.set_index("image")["split"]
    assert set(crossing["other_image"]) >= {"00000004_001.png"} and split["00000004_001.png"] == "test"
    assert set(manifest.loc[manifest["split"].eq("test"), "image"].str[:8]) == test_patients
    written = pd.read_csv(study.paths.near_duplicates, dtype={"patient": str, "other_patient": str})
    pd.testing.assert_frame_equal(written, found.pairs, check_dtype=False)
    assert len(found.pairs) == found.close
    again = near_duplicates.check(study, manifest.sample(frac=1, random_state=0))
    assert set(map(frozenset, zip(again.pairs["image"], again.pairs["other_image"], strict=True))) == set(
        map(frozenset, zip(found.pairs["image"], found.pairs["other_image"], strict=True))
    )


def test_small_images_must_be_more_alike(study_of, make_raw):
    study = study_of(make_raw(images=36))
    manifest = preparation.prepare(study, workers=1).manifest
    found = near_duplicates.check(study, manifest)
    assert found.threshold == near_duplicates.STRICT_LIKENESS > near_duplicates.LIKENESS
    assert found.most_bits == near_duplicates.STRICT_DISTANCE < near_duplicates.DISTANCE
    assert (found.pairs["distance"] <= found.most_bits).all()


def test_another_preparation_removes_the_old_report(tiny_raw, study_of):
    study = study_of(tiny_raw)
    preparation.prepare(study, workers=1)
    study.paths.near_duplicates.write_text("old")
    preparation.prepare(study, workers=1)
    assert study.paths.near_duplicates.exists()
    changed = study_of(tiny_raw, image_size=40)
    preparation.prepare(changed, workers=1)
    assert not changed.paths.near_duplicates.exists()


def test_real_radiographs_have_no_near_duplicate_among_other_patients(nih_study):
    found = near_duplicates.check(nih_study, preparation.prepare(nih_study).manifest)
    assert found.close == 673 and found.pairs["likeness"].max() < near_duplicates.LIKENESS

"""From trees to batches: the right pixels with the right targets, in an order that can be repeated."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from chestxray.config import ALL_LABELS, CLASSES, StageMissing
from chestxray.data.manifest import fingerprint, read_manifest
from chestxray.training.samples import (
    Samples,
    Views,
    class_log_odds,
    class_targets,
    dataset,
    epoch_order,
    finding_targets,
    load_augmented,
    load_findings,
    load_split,
    mixing_shares,
)


def test_targets_by_hand():
    labels = pd.Series(["Mass", "", "No_finding"])
    assert class_targets(labels).tolist() == [[0, 0, 0, 1, 0, 0, 0], [0] * 7, [0, 0, 0, 0, 1, 0, 0]]
    findings = finding_targets(pd.Series(["Effusion|Mass", "No Finding", "Hernia"]))
    shown = [[ALL_LABELS[k] for k in np.flatnonzero(row)] for row in findings]
    assert shown == [["Effusion", "Mass"], ["No_finding"], ["Hernia"]]


def test_log_odds_by_hand():
    y = finding_targets(pd.Series(["Effusion|Mass", "No Finding", "Hernia", "Effusion"]))
    samples = Samples(np.zeros((4, 2, 2, 1), np.uint8), np.arange(4), y, pd.DataFrame(index=range(4)))
    odds = dict(zip(CLASSES, np.exp(class_log_odds(samples)), strict=True))
    assert odds["Effusion"] == pytest.approx(1) and odds["Mass"] == odds["No_finding"] == pytest.approx(1 / 3)
    assert odds["Nodule"] == pytest.approx(0.5 / 3.5), "half an image where there is none"


def test_mirrored_samples_change_sides_and_nothing_else():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3, 1)
    samples = Samples(pixels, np.array([1]), np.ones((1, 7), "float32"), pd.DataFrame(index=range(1)))
    (batch,) = samples.mirrored().batches(4)
    assert batch[0, :, :, 0].tolist() == [[8, 7, 6], [11, 10, 9]]


def test_an_epoch_draws_one_version_of_each_sample():
    versions, count = 3, 40
    x = np.arange(versions * count)
    views = Views(x, np.arange(count), np.ones((count, 7), "float32"), pd.DataFrame(index=range(count)), versions)
    epochs = [views.in_epoch(7, epoch) for epoch in range(6)]
    for samples in epochs:
        (drawn,) = samples.batches(count)
        assert (drawn % count == np.arange(count)).all() and set(drawn // count) == {0, 1, 2}
    assert len({samples.rows.tobytes() for samples in epochs}) == 6
    assert np.array_equal(views.in_epoch(7, 2).rows, epochs[2].rows)
    plain = Samples(x, np.arange(count), views.y, views.table)
    assert plain.in_epoch(7, 2) is plain


def test_a_split_holds_its_own_images(prepared_study):
    study = prepared_study
    for split in ("train", "valid", "test"):
        samples = load_split(study, split)
        files = sorted(study.paths.tree(split).glob("*/*.png"))
        assert len(samples) == len(files) > 0
        assert {f"{file.parent.name}/{file.stem}" for file in files} == {
            f"{row.label}/{row.image[:-4]}" for row in samples.table.itertuples()
        }
        for position in (0, len(samples) - 1):
            row = samples.table.iloc[position]
            stored = np.asarray(Image.open(study.paths.tree(split) / row.label / f"{row.image[:-4]}.png"))
            assert np.array_equal(samples.x[samples.rows[position], :, :, 0], stored)
            assert CLASSES[samples.y[position].argmax()] == row.label


def test_all_images_of_a_split_have_finding_targets(prepared_study):
    samples = load_findings(prepared_study, "train")
    manifest = read_manifest(prepared_study.paths)
    assert len(samples) == (manifest["split"] == "train").sum() > manifest["selected"].sum() / 3
    several = samples.table["findings"].eq("Effusion|Infiltration").to_numpy()
    assert several.any() and (samples.y[several].sum(axis=1) == 2).all()


def test_augmented_files_are_read_as_planned(prepared_study):
    samples = load_augmented(prepared_study)
    row = samples.table.iloc[5]
    stored = np.asarray(Image.open(prepared_study.paths.tree("train_augmented") / row["file"]))
    assert np.array_equal(samples.x[samples.rows[5], :, :, 0], stored)
    assert len(set(samples.y.sum(axis=0)) - {0.0}) == 1


def test_an_order_can_be_repeated_and_is_complete():
    y = np.eye(7, dtype="float32")[np.repeat(np.arange(7), [40, 3, 9, 1, 70, 5, 12])]
    first, again, other = (epoch_order(y, 1, epoch) for epoch in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(np.sort(first), np.arange(len(y)))


def test_balanced_draws_every_class_equally_often():
    y = np.eye(7, dtype="float32")[np.repeat(np.arange(7), [40, 3, 9, 1, 70, 5, 12])]
    counts = y[epoch_order(y, 1, 0, balanced=True)].sum(axis=0)
    assert counts.sum() == len(y) and counts.max() - counts.min() <= 1


def test_batches_follow_the_order(prepared_study):
    samples = load_split(prepared_study, "train")
    order = epoch_order(samples.y, 3, 0)
    batches = list(dataset(samples, order, 4))
    assert len(batches) == len(samples) // 4
    x, y = (part.numpy() for part in batches[1])
    assert x.dtype == np.uint8
    assert np.array_equal(x, samples.x[samples.rows[order[4:8]]]) and np.array_equal(y, samples.y[order[4:8]])


def test_mixup_mixes_a_batch_with_itself_reversed(prepared_study):
    samples = load_split(prepared_study, "train")
    order = epoch_order(samples.y, 3, 0)
    steps = len(order) // 4
    shares = mixing_shares(0.3, seed=3, epoch=0, steps=steps)
    assert (shares >= 0.5).all() and np.array_equal(shares, mixing_shares(0.3, 3, 0, steps))
    plain = next(iter(dataset(samples, order, 4)))[0].numpy().astype(float)
    mixed, targets = (part.numpy() for part in next(iter(dataset(samples, order, 4, shares))))
    assert np.allclose(mixed, shares[0] * plain + (1 - shares[0]) * plain[::-1], atol=1e-3)
    assert np.allclose(targets.sum(axis=1), 1)


def test_the_fingerprint_follows_the_data(prepared_study):
    before = fingerprint(prepared_study.paths)
    manifest = prepared_study.paths.manifest
    manifest.write_text(manifest.read_text().replace("valid", "train", 1))
    assert fingerprint(prepared_study.paths) != before


def test_missing_stages_are_named(tiny_study):
    with pytest.raises(StageMissing, match=r"manifest\.csv is missing: run stage 2\.1"):
        load_split(tiny_study, "train")
    with pytest.raises(StageMissing, match=r"manifest\.csv is missing: run stage 2\.1"):
        load_augmented(tiny_study)


def test_augmented_radiographs_that_are_missing_are_named(prepared_study):
    prepared_study.paths.augmented_rows.unlink()
    with pytest.raises(StageMissing, match=r"train_augmented\.csv is missing: run stage 2\.2"):
        load_augmented(prepared_study)

"""From trees to batches: the right pixels with the right targets, in an order that can be repeated."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from chestxray.config import ALL_LABELS, CLASSES, StageMissing
from chestxray.data.manifest import fingerprint, read_manifest
from chestxray.training.samples import (
    Samples,
    batches,
    class_targets,
    finding_targets,
    load_augmented,
    load_findings,
    load_split,
)


def test_targets_by_hand():
    labels = pd.Series(["Mass", "", "No_finding"])
    assert class_targets(labels).tolist() == [[0, 0, 0, 1, 0, 0, 0], [0] * 7, [0, 0, 0, 0, 1, 0, 0]]
    findings = finding_targets(pd.Series(["Effusion|Mass", "No Finding", "Hernia"]))
    shown = [[ALL_LABELS[k] for k in np.flatnonzero(row)] for row in findings]
    assert shown == [["Effusion", "Mass"], ["No_finding"], ["Hernia"]]


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


def test_each_pass_has_every_sample_once_in_an_order_of_its_own():
    x = np.arange(22)[:, None]
    samples = Samples(x, np.arange(22), np.eye(22, dtype="float32"), pd.DataFrame(index=range(22)))
    listed = [(x.numpy().ravel(), y.numpy().argmax(1)) for x, y in batches(samples, 4, seed=7).take(10)]
    assert all(np.array_equal(x, y) for x, y in listed), "targets stay with their inputs"
    first, second = (np.concatenate([x for x, _ in part]) for part in (listed[:5], listed[5:]))
    assert len(set(first)) == len(set(second)) == 20 and not np.array_equal(first, second)
    later = [x.numpy().ravel() for x, _ in batches(samples, 4, seed=7, first=3).take(4)]
    assert all(np.array_equal(x, y) for x, (y, _) in zip(later, listed[3:7], strict=True))
    assert not np.array_equal(next(iter(batches(samples, 4, seed=8)))[0].numpy().ravel(), listed[0][0])


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

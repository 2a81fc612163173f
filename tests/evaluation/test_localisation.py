"""The pointing game on boxes counted by hand, and its intervals against draws made image by image."""

import numpy as np
import pandas as pd
import pytest

from chestxray.config import SIX_FINDINGS, StudyError
from chestxray.data import nih_tables, subset
from chestxray.evaluation import localisation


def boxes_table():
    rows = [
        ("a.png", "Mass", 0, 0, 512, 512),
        ("a.png", "Mass", 768, 768, 256, 256),
        ("b.png", "Nodule", 512, 0, 600, 1024),
        ("b.png", "Cardiomegaly", 0, 0, 9, 9),
        ("z.png", "Mass", 0, 0, 9, 9),
    ]
    return pd.DataFrame(rows, columns=["image", "finding", "x", "y", "width", "height"])


def found(side=1024):
    images = pd.DataFrame({"image": ["a.png", "b.png"], "patient": ["1", "2"]})
    return localisation.targets(boxes_table(), images, side)


def fixed(mass, nodule):
    table = pd.DataFrame({"x": np.nan, "y": np.nan}, index=list(SIX_FINDINGS))
    table.loc["Mass"], table.loc["Nodule"] = mass, nodule
    return table


def test_boxes_become_shares_of_the_side():
    assert found()[["image", "patient", "finding"]].to_numpy().tolist() == [
        ["a.png", "1", "Mass"],
        ["b.png", "2", "Nodule"],
    ]
    assert found()["boxes"].tolist() == [[(0, 0, 0.5, 0.5), (0.75, 0.75, 1, 1)], [(0.5, 0, 1, 1)]]


def test_hits_by_hand():
    maps = np.zeros((2, 8, 8)) - 3
    maps[0, 7, 6] = -1  # logits may all be negative; this pixel's middle is (6.5 / 8, 7.5 / 8), in the second box
    scored = localisation.hits([localisation.peak(heat) for heat in maps], found(), fixed((0.6, 0.6), (np.nan, np.nan)))
    assert scored[["x", "y"]].iloc[0].tolist() == [0.8125, 0.9375]
    assert scored["pointing"].tolist() == [1, 0] and scored[["x", "y"]].iloc[1].isna().all()  # flat: no hit
    assert scored["centre_pointing"].tolist() == [1, 1]  # on the border of either
    assert scored["fixed_pointing"].iloc[0] == 0 and np.isnan(scored["fixed_pointing"].iloc[1])


def test_a_peak_is_one_of_the_largest_pixels():
    plateau = np.zeros((8, 8))
    plateau[:3, :3] = 1
    assert localisation.peak(plateau) == (1.5 / 8, 1.5 / 8)
    apart = np.zeros((4, 8))
    apart[0, 0] = apart[3, 7] = 1
    assert localisation.peak(apart) in {(0.5 / 8, 0.5 / 4), (7.5 / 8, 3.5 / 4)}
    assert np.isnan(localisation.peak(np.ones((4, 4)))).all()


def test_the_fixed_point_lies_in_the_boxes_of_most_images():
    def rows(count, finding, *boxes):
        return pd.DataFrame({"image": "x", "patient": "9", "finding": finding, "boxes": [list(boxes)] * count})

    left, right, both = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0.25, 0.25, 0.75, 0.5)
    # Two boxes of one image count once: else the right half of `far` would win with 2 × 6 against 11.
    far = pd.concat([rows(11, "Nodule", left), rows(6, "Nodule", right, right)])
    train = pd.concat([rows(12, "Mass", left), rows(1, "Mass", both), rows(9, "Nodule", right)])
    points = localisation.fixed_points(train, far)
    assert points.loc["Mass", ["images", "source"]].tolist() == [13, "train"]
    assert points.loc["Mass", ["x", "y"]].tolist() == pytest.approx([0.375, 0.375], abs=1 / localisation.GRID)
    assert points.loc["Nodule", ["images", "source"]].tolist() == [17, "other patients"]
    assert points.loc["Nodule", ["x", "y"]].tolist() == pytest.approx([0.25, 0.5], abs=1 / localisation.GRID)
    assert points.loc["Effusion", ["x", "y"]].isna().all()
    counts = localisation.density(train[train["finding"] == "Mass"])
    assert counts.max() == 13 and counts[0, 0] == 12 and counts[0, -1] == 0 and (counts == 13).mean() == 1 / 16


def scored_table(count=90):
    rng = np.random.default_rng(0)
    finding = np.array(SIX_FINDINGS)[rng.integers(2, 5, size=count)]
    table = pd.DataFrame({"patient": rng.integers(30, size=count).astype(str), "finding": finding})
    for name, share in (("pointing", 0.6), ("centre_pointing", 0.2), ("fixed_pointing", 0.55)):
        table[name] = (rng.random(count) < share).astype(float)
    return table


def test_localisation_counts_findings_alike_and_resamples_patients():
    scored = scored_table()
    table = localisation.localisation(scored, draws=100, seed=3)
    each = scored.groupby("finding")[list(localisation.POINTS)].mean()
    for (finding, metric), value in each.stack().items():
        assert table.loc[(finding, metric), "estimate"] == pytest.approx(value)
        assert table.loc[("mean", metric), "estimate"] == pytest.approx(each[metric].mean())
    # Draws of whole patients, written out: each drawn patient's rows as often as it is drawn.
    rows_of = {patient: np.flatnonzero(scored["patient"] == patient) for patient in set(scored["patient"])}
    patients, rng, gains = sorted(set(scored["patient"])), np.random.default_rng(3), []
    for _ in range(100):
        drawn = [patients[k] for k in rng.integers(len(patients), size=len(patients))]
        rows = scored.iloc[np.concatenate([rows_of[patient] for patient in drawn])]
        means = rows.groupby("finding")[list(localisation.POINTS)].mean().mean()
        gains.append([means["pointing"] - means["centre_pointing"], means["pointing"] - means["fixed_pointing"]])
    for metric, values in zip(("pointing_gain", "fixed_gain"), np.transpose(gains), strict=True):
        row = table.loc[("mean", metric)]
        assert [row["low"], row["high"]] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist())
    assert localisation.better(table).loc["mean"].tolist() == [True, False]
    with pytest.raises(StudyError, match="no lesion box"):
        localisation.localisation(scored[:0])


def test_findings_without_a_fixed_point_have_no_gain_over_it():
    scored = scored_table()
    scored.loc[scored["finding"] == SIX_FINDINGS[2], "fixed_pointing"] = np.nan
    table = localisation.localisation(scored, draws=50)["estimate"].unstack("metric")
    assert table["fixed_gain"].isna().to_dict() == {
        name: name in (SIX_FINDINGS[2], "mean") for name in (*SIX_FINDINGS[2:5], "mean")
    }
    assert table["pointing_gain"].notna().all()


def test_no_patient_of_nih_9k_has_a_part_in_the_fixed_points(nih):
    boxes, splits = nih_tables.read_boxes(nih), subset.splits()
    listed = nih_tables.read_entries(nih).table
    ours = set(listed.loc[listed["image"].isin(splits), "patient"])
    train = localisation.targets(boxes, listed[listed["image"].map(splits) == "train"], nih_tables.NIH_SIDE)
    others = localisation.targets(boxes, listed[~listed["patient"].isin(ours)], nih_tables.NIH_SIDE)
    assert train.empty and set(boxes["image"].map(splits).dropna()) == {"test"}
    points = localisation.fixed_points(train, others)
    assert points["images"].to_dict() == others["finding"].value_counts().to_dict()
    assert points["images"].min() >= 40 and set(points["source"]) == {"other patients"}
    # Counted at the boxes' own pixels: no pixel lies in more boxes by more than the grid's coarseness.
    mass = others[others["finding"] == "Mass"]["boxes"]
    x, y = points.loc["Mass", ["x", "y"]]
    rng = np.random.default_rng(0)
    best = max(
        sum(any(a <= u <= c and b <= v <= d for a, b, c, d in row) for row in mass) for u, v in rng.random((4000, 2))
    )
    assert sum(any(a <= x <= c and b <= y <= d for a, b, c, d in row) for row in mass) >= best

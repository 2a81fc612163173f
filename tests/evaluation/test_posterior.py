"""The one rule: shares, re-weighting, rounding, and the class named."""

import csv
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from faults import note

from chestxray.config import CLASSES, NIH_9K_LIST, StudyError
from chestxray.evaluation import posterior
from chestxray.evaluation.posterior import Shares

NIH = os.environ.get("CHESTXRAY_NIH", "")


def random_probabilities(rng, rows):
    """Sharp, even and nearly tied probabilities, (rows, 7)."""
    found = rng.dirichlet(np.full(7, 0.1), rows)
    found[::3] = rng.dirichlet(np.full(7, 50.0), len(found[::3]))
    ties = found[1::3]
    ties[:, 1] = ties[:, 4] = ties.max(axis=1)
    ties[:, 4] += rng.choice([-4e-7, -1e-16, 0, 1e-16, 4e-7], len(ties))
    found[1::3] = ties
    return found / found.sum(axis=1, keepdims=True)


def test_the_class_named_is_always_the_largest_of_the_probabilities_shown():
    rng = np.random.default_rng(0)
    for _ in range(100):
        values = rng.dirichlet(np.full(7, rng.choice([0.05, 1.0, 30.0])))
        values[rng.random(7) < 0.2] = 0
        shares = Shares("drawn", values / values.sum()) if values.any() else posterior.read_shares("nih")
        exact = posterior.reweighted(random_probabilities(rng, 300), shares)
        shown = posterior.rounded(exact)
        millionths = np.rint(shown * 1e6).astype(int)
        assert (millionths.sum(axis=1) == 1_000_000).all() and (np.abs(shown - exact) < 1e-6).all()
        chosen = posterior.named(shown)
        assert (millionths[range(300), chosen] == millionths.max(axis=1)).all()
        assert (chosen == millionths.argmax(axis=1)).all()  # of equal ones the first
        assert (exact[range(300), chosen] >= exact.max(axis=1) - 1e-6).all()
        assert not millionths[:, shares.values == 0].any()
        assert [float(f"{value:.6f}") for value in shown[0]] == shown[0].tolist()


def test_reweighting_is_bayes_rule_in_fractions():
    rng = np.random.default_rng(1)
    likelihood = rng.integers(1, 1000, (20, 7))
    for name, counts in posterior.SHARES.items():
        equal = likelihood / likelihood.sum(axis=1, keepdims=True)
        found = posterior.reweighted(equal, posterior.read_shares(name))
        for row, given in zip(found, likelihood.tolist(), strict=True):
            joint = [Fraction(p) * n for p, n in zip(given, counts, strict=True)]
            assert row == pytest.approx([float(part / sum(joint)) for part in joint], rel=1e-12)
    assert posterior.reweighted(equal, posterior.read_shares("equal")) == pytest.approx(equal, rel=1e-12)
    assert posterior.tempered(equal, 2.0)[0] == pytest.approx(equal[0] ** 0.5 / (equal[0] ** 0.5).sum(), rel=1e-12)
    sure = np.eye(7)[:1]
    assert np.isfinite(posterior.tempered(sure, 0.01)).all()
    alone = posterior.reweighted(sure, Shares("drawn", np.eye(7)[3]))  # the share rules out what the model is sure of
    assert alone[0].tolist() == np.eye(7)[3].tolist()


@pytest.mark.skipif(not NIH, reason="CHESTXRAY_NIH names no folder with the NIH's table")
def test_the_shares_are_counted_in_the_nih_table_and_the_list():
    with NIH_9K_LIST.open(newline="") as file:
        listed = {row["image"] for row in csv.DictReader(file) if row["list"] == "train_val"}
    counts = {"nih": dict.fromkeys(CLASSES, 0), "sample": dict.fromkeys(CLASSES, 0)}
    with (Path(NIH) / "Data_Entry_2017_v2020.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            label = row["Finding Labels"].replace("No Finding", "No_finding")
            if label in CLASSES:
                counts["nih"][label] += 1
                counts["sample"][label] += row["Image Index"] in listed
    assert {name: tuple(found.values()) for name, found in counts.items()} == {
        name: posterior.SHARES[name] for name in counts
    }


def test_shares_are_read_from_a_file(tmp_path):
    path = tmp_path / "clinic.csv"
    rows = [f"{name}, {number}" for number, name in enumerate(CLASSES)]
    path.write_text("\ufeffclass,share\r\n" + "\r\n".join(reversed(rows)) + "\r\n\r\n,\r\n", "utf-8")
    name, values = posterior.read_shares(str(path))
    assert name == "clinic.csv" and values == pytest.approx(np.arange(7) / 21)
    path.write_text("class,share\n" + "".join(f"{name},1e308\n" for name in CLASSES))
    assert posterior.read_shares(str(path)).values == pytest.approx(np.full(7, 1 / 7))


WHOLE = "class,share\n" + "".join(f"{name},1\n" for name in CLASSES)


UNKNOWN = f"is unknown; write {', '.join(CLASSES)}"
NO_SHARE = "; write a number from 0"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a class is missing", WHOLE.replace("Mass,1\n", ""), "lacks Mass; add a row, with share 0 if it never occurs"),
        ("a class is unknown", WHOLE + "Hernia,1\n", f"class 'Hernia' {UNKNOWN}"),
        ("a class is there twice", WHOLE + "Mass,1\n", "class 'Mass' is there twice; keep one"),
        ("a row of three cells", WHOLE.replace("Mass,1", "Mass,1,2"), f"class 'Mass,1,2' {UNKNOWN}"),
        ("a share is empty", WHOLE.replace("Mass,1", "Mass,"), "Mass has share ''" + NO_SHARE),
        ("a share is no number", WHOLE.replace("Mass,1", "Mass,5%"), "Mass has share '5%'" + NO_SHARE),
        ("a share has an underscore", WHOLE.replace("Mass,1", "Mass,1_000"), "Mass has share '1_000'" + NO_SHARE),
        ("a share is negative", WHOLE.replace("Mass,1", "Mass,-0.1"), "Mass has share '-0.1'" + NO_SHARE),
        ("a share is not a number", WHOLE.replace("Mass,1", "Mass,nan"), "Mass has share 'nan'" + NO_SHARE),
        ("a share is infinite", WHOLE.replace("Mass,1", "Mass,1e999"), "Mass has share '1e999'" + NO_SHARE),
        ("all shares are 0", WHOLE.replace(",1", ",0"), "all shares are 0; write one above 0"),
        ("another header", WHOLE.replace("class,share", "class,count"), "header 'class,count'; write class,share"),
        ("semicolons", WHOLE.replace(",", ";"), "header 'class;share'; write class,share"),
        ("an empty file", "", "header ''; write class,share"),
        ("not UTF-8", b"\xff\xfe\x00", "no CSV table in UTF-8; give one of equal, sample, nih, or a CSV file"),
        ("a folder", Path(), "cannot be read (Is a directory); give one of equal, sample, nih, or a CSV file"),
        ("no such file", None, "cannot be read (No such file or directory); give one of equal, sample, nih, or a CSV"),
    ],
)
def test_other_shares_are_refused_in_one_line(tmp_path, name, content, said):
    path = tmp_path / "shares.csv"
    if isinstance(content, Path):
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StudyError) as caught:
        posterior.read_shares(str(path))
    assert str(caught.value).startswith(f"{path}: {said}")
    note(name, caught.value, tmp_path)

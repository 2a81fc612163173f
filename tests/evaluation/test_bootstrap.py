"""Draws of patients against repeated rows, and p-values and Holm's correction against scipy and a hand count."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from chestxray.evaluation import bootstrap
from chestxray.evaluation.bootstrap import Draws


def test_totals_and_means_equal_repeated_rows():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"patient": rng.integers(8, size=30), "value": rng.normal(size=30)})
    draws = Draws.of(table["patient"], 6, seed=3)
    drawn = np.random.default_rng(3).integers(8, size=(6, 8))
    names = sorted(table["patient"].astype(str).unique())
    by_name = dict(iter(table.groupby(table["patient"].astype(str))))
    for draw, row in enumerate(drawn, start=1):
        repeated = pd.concat([by_name[names[patient]] for patient in row])
        assert draws.totals(table["value"])[draw] == pytest.approx(repeated["value"].sum())
        assert draws.means(table["value"])[draw] == pytest.approx(repeated["value"].mean())
        positive = repeated[repeated["value"] > 0]
        assert draws.means(table["value"], table["value"] > 0)[draw] == pytest.approx(positive["value"].mean())
    assert draws.totals(table["value"])[0] == pytest.approx(table["value"].sum())
    both = draws.totals(np.stack([table["value"], table["value"] * 2], axis=1))
    assert both.shape == (7, 2) and both[:, 1] == pytest.approx(2 * both[:, 0])


def test_counts_equal_the_totals_of_each_cell():
    rng = np.random.default_rng(4)
    draws, cells = Draws.of(rng.integers(9, size=40), 7, seed=2), rng.integers(3, size=40)
    assert np.array_equal(draws.counts(cells, 4), draws.totals(np.eye(4)[cells]))


def test_a_subset_meets_the_same_draws():
    draws = Draws.of(np.array(["a", "a", "b", "c"]), 50, seed=1)
    part = draws.within(np.array([True, False, True, False]))
    assert part.totals(np.ones(2)) == pytest.approx(draws.totals(np.array([1, 0, 1, 0])))


def test_interval_of_a_mean_has_the_width_of_theory_and_turns_about_the_estimate():
    values = np.random.default_rng(1).normal(size=400)
    drawn = Draws.of(np.arange(400), 2000, seed=0).means(values)
    low, high, defined = bootstrap.interval(drawn)
    assert defined == 2000
    assert high - low == pytest.approx(2 * 1.96 * values.std(ddof=1) / 20, rel=0.08)
    turned = bootstrap.interval(drawn, basic=True)
    assert turned[0] == pytest.approx(2 * drawn[0] - high) and turned[1] == pytest.approx(2 * drawn[0] - low)
    assert np.isnan(bootstrap.interval(np.array([0.5, np.nan]))[0])


def test_p_value_is_that_of_a_z_test():
    values = np.random.default_rng(2).normal(0.1, 1, size=500)
    p = bootstrap.p_value(Draws.of(np.arange(500), 4000, seed=0).means(values))
    z = values.mean() / (values.std() / np.sqrt(500))
    assert p == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.01)
    assert bootstrap.p_value(np.zeros(10)) == 1.0
    assert np.isnan(bootstrap.p_value(np.r_[0.1, np.full(9, np.nan)]))


def test_holm_by_hand():
    assert bootstrap.holm(np.array([0.01, np.nan, 0.04, 0.03])) == pytest.approx(
        [0.03, np.nan, 0.06, 0.06], nan_ok=True
    )
    assert bootstrap.holm(np.array([0.5, 0.9])) == pytest.approx([1.0, 1.0])

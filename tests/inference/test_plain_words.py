"""What an answer says in everyday words, and a heat-map's colours."""

import numpy as np
import pytest
from fake_reader import FakeReader

from chestxray.config import CLASSES, SIX_FINDINGS
from chestxray.inference import overlay, plain_words


@pytest.fixture
def answer():
    return FakeReader().examine(np.full((32, 24), 130, np.uint8))


def test_every_class_has_words_of_its_own():
    assert list(plain_words.PLAIN) == list(CLASSES) or set(plain_words.PLAIN) == set(CLASSES)
    assert len({plain.name for plain in plain_words.PLAIN.values()}) == len(CLASSES)
    for name, plain in plain_words.PLAIN.items():
        assert plain.sentence.endswith(".") and name.lower() not in plain.name.lower()


def test_the_likeliest_finding_comes_first_and_no_finding_last(answer):
    order = plain_words.order(answer)
    assert order[-1] == "No_finding" and sorted(order[:-1]) == sorted(SIX_FINDINGS)
    probabilities = [answer.calibrated[name] for name in order[:-1]]
    assert probabilities == sorted(probabilities, reverse=True)


def test_the_table_says_what_the_answer_says(answer):
    table = plain_words.table(answer)
    assert list(table.index) == [name.replace("_", " ") for name in plain_words.order(answer)]
    for name in CLASSES:
        row = table.loc[name.replace("_", " ")]
        assert (row["probability"], row["lowest"], row["highest"]) == (
            answer.calibrated[name],
            answer.low[name],
            answer.high[name],
        )
        if name in SIX_FINDINGS:
            assert row["operating point"] == ("above" if answer.above[name] else "below")
            assert row["sensitivity"] == answer.operating_points[name].sensitivity
    assert table.loc["No finding", "operating point"] == "–" and np.isnan(table.loc["No finding", "sensitivity"])
    assert {"above", "below"} <= set(table["operating point"])


def test_a_heat_layer_hides_nothing_where_it_is_cold_and_grows_lighter():
    layer = overlay.heat_layer(np.linspace(-0.1, 1.1, 60, dtype=np.float32).reshape(2, 30)).reshape(60, 4).astype(int)
    assert layer[0, 3] == 0 and layer[-1, 3] == 255
    assert (np.diff(layer[:, 3]) >= 0).all()
    luma = layer[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(luma) >= 0).all() and luma[-1] - luma[0] > 120

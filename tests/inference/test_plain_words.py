"""What an answer says in everyday words, and a heat-map's colours."""

import numpy as np
import pytest
from fake_reader import FakeReader

from chestxray.config import SIX_FINDINGS
from chestxray.inference import overlay, plain_words


@pytest.fixture
def answer():
    return FakeReader().examine(np.full((32, 24), 130, np.uint8))


def test_every_finding_has_words_of_its_own():
    assert set(plain_words.PLAIN) == set(SIX_FINDINGS)
    assert len({plain.name for plain in plain_words.PLAIN.values()}) == len(SIX_FINDINGS)
    for name, plain in plain_words.PLAIN.items():
        assert plain.sentence.endswith(".") and name.lower() not in plain.name.lower()


def test_the_table_says_what_the_answer_says(answer):
    table = plain_words.table(answer)
    assert list(table.index) == sorted(SIX_FINDINGS, key=lambda name: -answer.present[name])
    for name in SIX_FINDINGS:
        row = table.loc[name]
        assert (row["probability"], row["lowest"], row["highest"]) == (
            answer.present[name],
            answer.low[name],
            answer.high[name],
        )
        assert row["operating point"] == ("above" if answer.above[name] else "below")
        assert row["sensitivity"] == answer.operating_points[name].sensitivity
    assert {"above", "below"} <= set(table["operating point"])


def test_a_heat_layer_hides_nothing_where_it_is_cold_and_grows_lighter():
    layer = overlay.heat_layer(np.linspace(-0.1, 1.1, 60, dtype=np.float32).reshape(2, 30)).reshape(60, 4).astype(int)
    assert layer[0, 3] == 0 and layer[-1, 3] == 255
    assert (np.diff(layer[:, 3]) >= 0).all()
    luma = layer[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(luma) >= 0).all() and luma[-1] - luma[0] > 120

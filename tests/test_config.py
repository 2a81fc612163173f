"""Profiles: sizes and epochs of a run."""

import pytest

from chestxray.config import PROFILES, StudyError


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_the_four_fine_tuned_models_are_four(profile):
    """From one seed, two members of the same backbone and size would be the same to the last bit."""
    assert len(set(zip(profile.backbones, profile.member_sizes, strict=True))) == 4


@pytest.mark.parametrize(
    "change",
    [{"cnn_epochs": "x"}, {"cnn_epochs": -1}, {"cnn_epochs": 1.5}, {"mixed_precision": 1}, {"member_sizes": 64}],
)
def test_a_value_of_another_kind_or_a_negative_one_is_refused_at_once(change):
    (name,) = change
    with pytest.raises(StudyError, match=f"^{name}=.*: give a value such as "):
        PROFILES["quick"].override(**change)


def test_whole_numbers_do_for_shares_and_lists_for_tuples():
    changed = PROFILES["quick"].override(valid_share=0, member_sizes=[64, 80, 64, 56])
    assert (changed.valid_share, changed.member_sizes) == (0, [64, 80, 64, 56])

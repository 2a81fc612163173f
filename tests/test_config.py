"""Profiles: sizes and epochs of a run."""

import pytest

from chestxray.config import PROFILES


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_the_four_fine_tuned_models_are_four(profile):
    """From one seed, two members of the same backbone and size would be the same to the last bit."""
    assert len(set(zip(profile.backbones, profile.member_sizes, strict=True))) == 4

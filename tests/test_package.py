"""What importing the package does, and what it must not do."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from chestxray import config

KERNELS = "TF_ENABLE_ONEDNN_OPTS"


def python(code: str, **variables: str) -> str:
    """What a new Python says, in which the variable that chooses kernels is set only if it is given."""
    environment = {name: value for name, value in os.environ.items() if name != KERNELS} | variables
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=config.REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_choice_of_kernels_is_left_to_who_made_one():
    ask = f"import os, sys, chestxray; print(os.environ['{KERNELS}'], 'tensorflow' in sys.modules)"
    assert python(ask) == "1 False"
    assert python(ask, **{KERNELS: "0"}) == "0 False"


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's kernels are for x86")
def test_tensorflow_takes_onednn_kernels():
    port = "tensorflow.python.util._pywrap_util_port"
    assert python(f"import chestxray, importlib; print(importlib.import_module('{port}').IsMklEnabled())") == "True"


LIGHT = {
    "images": ["chestxray.images", "chestxray.images.dicom", "chestxray.images.input_check", "chestxray.images.load"],
    "networks.class_activation": ["chestxray.networks.class_activation"],
    "inference": [f"chestxray.inference.{name}" for name in ("reader", "answers", "engines", "interpretation")],
}
"""What answers for a radiograph, or reads one, without the packages that take seconds to import."""

HEAVY = "print(sorted({'tensorflow', 'keras', 'pandas', 'sklearn', 'matplotlib'} & set(sys.modules)))"


@pytest.mark.parametrize("group", LIGHT)
def test_importing_what_answers_is_light(group):
    assert python(f"import sys, {', '.join(LIGHT[group])}; {HEAVY}") == "[]"

"""Thousands of damaged files: each is read or refused in one line, soon and in bounded memory; nothing crashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest

from chestxray.config import REPOSITORY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are set and measured as on Linux")


def read_all(folder: Path, first: int, last: int) -> dict[str, float]:
    command = [sys.executable, fuzzing.__file__, str(folder), str(first), str(last)]
    # The package need not be installed: it is found where it lies.
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(found: dict[str, float], number: int) -> None:
    assert found["read"] + found["refused"] == number
    assert found["read"] > number / 50  # more than the whole ones
    assert found["refused"] > number / 4
    assert found["slowest_seconds"] < fuzzing.SECONDS
    assert found["added_bytes"] < fuzzing.MEMORY


def test_whole_files_of_every_kind_are_read_before_they_are_damaged():
    assert len({data[:2] for data in fuzzing.whole().values()}) >= 4
    assert fuzzing.mutated(7) == fuzzing.mutated(7) != fuzzing.mutated(8)


def test_hundreds_of_damaged_files(tmp_path):
    check(read_all(tmp_path, 0, 600), 600)


@pytest.mark.long
@pytest.mark.parametrize("first", range(10_000, 20_000, 2_500))
def test_thousands_of_damaged_files(tmp_path, first):
    check(read_all(tmp_path, first, first + 2_500), 2_500)

"""Runs a piece of the study in a process of its own and kills it in the middle, as a power cut would."""

import signal
import subprocess
import sys

_KILLER = """
import os, signal, sys
from pathlib import Path
moves, replace = 0, Path.replace
def counted(self, target):
    global moves
    moves += 1
    if moves == {limit}:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = counted
"""


def killed(code: str, limit: int, *arguments: object) -> None:
    """Run `code`, which is killed before its `limit`th file takes its name; `sys.argv[1:]` holds the arguments."""
    command = [sys.executable, "-c", _KILLER.format(limit=limit) + code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr

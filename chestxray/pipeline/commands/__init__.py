"""Commands: the command line, its words and its exit codes; a command's work is done by the other sub-packages.

Codes: 0 done, 1 something failed and the rest is there, 2 wrong use or nothing done. Heavy packages are imported by the
command that needs them, so that help and a run with nothing to do start at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from chestxray import __version__
from chestxray.pipeline.commands import data, inference, maintain, study


def main(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns:
        The exit code.

    Raises:
        StudyError: the user can put it right; the message says how.
    """
    chosen = parser().parse_args(arguments)
    if chosen.command is None:
        parser().print_help()
        return 2
    # What TensorFlow says of missing GPUs would stand before the line that a command has to say.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if getattr(chosen, "root", None):
        os.environ["CHESTXRAY_ROOT"] = str(chosen.root.resolve())
    return chosen.command(chosen)


def parser() -> argparse.ArgumentParser:
    """The command line: users' commands, then `maintain` with the maintainers'."""
    top = argparse.ArgumentParser(
        prog="chestxray", description="Chest X-rays image classification, from data to results."
    )
    top.add_argument("--version", action="version", version=__version__)
    top.set_defaults(command=None)
    commands = top.add_subparsers(title="commands", metavar="COMMAND")
    for part in (study, inference, data, maintain):
        part.add_commands(commands)
    return top

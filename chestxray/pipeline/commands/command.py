"""The command line's common parts: how a command is added, and the checks that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from chestxray.config import Paths, StudyError, dataset_name

Commands = argparse._SubParsersAction
"""What `add_subparsers` returns."""

Run = Callable[[argparse.Namespace], int]


def add_command(commands: Commands, name: str, run: Run, root: bool = False) -> argparse.ArgumentParser:
    """Add one command, with the docstring of the function that runs it as its help.

    Args:
        commands: what it is added to.
        name: what the user types.
        run: takes the parsed arguments and returns the exit code.
        root: whether it has the option `--root`.
    """
    words, _, more = inspect.getdoc(run).partition("\n\n")
    command = commands.add_parser(name, help=words[0].lower() + words[1:].rstrip("."), description=more or words)
    command.set_defaults(command=run)
    if root:
        command.add_argument("--root", type=Path, help="folder for data, models and results (default: the repository)")
    return command


def check_seed(seed: int) -> None:
    """Check `--seed` before anything runs.

    Raises:
        StudyError: it is negative or has more than 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise StudyError(f"--seed {seed}: give a number from 0 to {2**32 - 1}")


def known(dataset: str) -> str:
    """Check `--dataset` before anything runs.

    Raises:
        StudyError: it is neither `phantom`, nor a published dataset, nor a folder, nor a dataset that is there already.
    """
    named = dataset in ("phantom", "nih", "nih-sample")
    if not named and not Path(dataset).is_dir() and not Paths(dataset_name(dataset)).raw.exists():
        raise StudyError(
            f"dataset {dataset!r}: no such folder; give phantom, nih, nih-sample, or a folder in the NIH layout"
        )
    return dataset


@contextlib.contextmanager
def without_greetings() -> Iterator[None]:
    """Drop what TensorFlow's C++ side prints at its start; no setting of its own stops that."""
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)

"""The command line's common parts: how a command is added, and the checks that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from chestxray.config import NIH_9K, SOURCES, Paths, StudyError, dataset_name, no_such_dataset, source_folder

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


def known(dataset: str, folders: Sequence[str] = ()) -> str:
    """Check `--dataset` and `--from` before anything runs, and say what is meant where a folder's name could mislead.

    Args:
        dataset: one of `SOURCES`, a folder, or the name of a dataset that is there already.
        folders: where the radiographs of nih_9k lie.

    Raises:
        StudyError: there is no such dataset or folder, its name is refused, another folder has it, or it would be
            written into a folder that is only read.
    """
    name, folder = dataset_name(dataset), source_folder(dataset)
    if dataset in SOURCES:
        if Path(dataset).is_dir():
            remedy = f"give --from {dataset}" if dataset == NIH_9K else "rename it"
            print(f"dataset {dataset}: means the source, not the folder of this name here; {remedy} to use that")
    elif folder is None and not Paths(name).raw.exists():
        raise no_such_dataset(dataset)
    elif name == NIH_9K:
        print(f"{dataset}: holds the images of {NIH_9K}'s list and is read as --dataset {NIH_9K} --from {dataset}")
    elif folder is not None:
        from chestxray.data import sources  # here, because help needs nothing installed

        sources.refuse_other(folder, Paths(name).raw)
    if folders and name != NIH_9K:
        raise StudyError(f"--from: is for --dataset {NIH_9K} alone; leave it out for {dataset}")
    for place in folders:
        if not Path(place).is_dir():
            raise StudyError(f"--from {place}: no such folder; give one that holds the radiographs of {NIH_9K}'s list")
    from chestxray import files  # as above

    files.keep_apart(Paths(name).root, [folder, *map(Path, folders)], "--root")
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

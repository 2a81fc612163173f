"""`python -m chestxray`: makes sure that the study's packages are there, then starts the command."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from chestxray.config import StudyError, printable
from chestxray.pipeline import environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, in the repository's own environment where this interpreter lacks packages.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with contextlib.redirect_stdout(_Output(sys.stdout)):
            if arguments[:1] == ["colab"] and not {"-h", "--help"} & set(arguments):
                environment.prepare_kernel(arguments[1:])
                return 0
            if arguments and not {"-h", "--help", "--version"} & set(arguments):
                environment.require_clone(arguments[0])
                extras = {"test": ["test"], "serve": ["web"]}  # of pyproject.toml, by the command that needs them
                environment.ensure(extras.get(arguments[0], []), arguments)
            from chestxray.pipeline import commands

            return commands.main(arguments)
    except StudyError as error:
        print(f"chestxray: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("chestxray: stopped; run the same command again to go on", file=sys.stderr)
        return 130


class _Output:
    """Standard output whose reader may go, as `head` does: the rest is dropped, and the command does its work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str = "") -> int:
        try:
            self._stream.write(printable(text))
            self._stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        return len(text)

    flush = write

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


if __name__ == "__main__":
    sys.exit(main())

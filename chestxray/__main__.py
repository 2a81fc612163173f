"""`python -m chestxray`: makes sure that the study's packages are there, then hands over to the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from chestxray.config import StudyError
from chestxray.pipeline import environment

EXTRAS: dict[str, list[str]] = {"test": ["test"], "serve": ["web"]}
"""The extras of pyproject.toml that a command needs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, in the repository's own environment where this interpreter lacks packages.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["colab"]:
            return environment.install_on_colab(arguments[1:])
        if arguments and not {"-h", "--help", "--version"} & set(arguments):
            environment.ensure(EXTRAS.get(arguments[0], []), arguments)
        from chestxray.pipeline.commands import user

        return user.main(arguments)
    except StudyError as error:
        print(f"chestxray: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("chestxray: stopped; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

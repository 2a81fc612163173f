"""Progress: the lines that a run prints while notebooks execute.

It knows labels, cells and seconds, and nothing of notebooks or stages. Several threads may report at the same time.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TextIO

EVERY = 30.0
"""Seconds between two lines about the same notebook."""


class Progress:
    """Prints which notebooks run, at which cell, for how long. Use it as a context.

    Args:
        stream: where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._began: dict[str, float] = {}
        self._at: dict[str, str] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> Progress:
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    def say(self, line: str) -> None:
        """Print a line."""
        with self._lock:
            print(line, file=self._stream, flush=True)

    def start(self, label: str, reason: str = "") -> None:
        """A notebook starts.

        Args:
            label: what it is called in all that is printed.
            reason: why it must run again.
        """
        self._began[label] = time.monotonic()
        self.say(f"{label}: started{f' ({reason})' if reason else ''}")

    def cell(self, label: str, cell: int, cells: int) -> None:
        """A notebook begins a cell.

        Args:
            label: of the notebook, which has started.
            cell: number of the cell, from 1.
            cells: how many cells it has.
        """
        self._at[label] = f"cell {cell}/{cells}"

    def end(self, label: str, words: str) -> None:
        """A notebook ended.

        Args:
            label: of the notebook.
            words: how it ended; the time that it took is added.
        """
        self._at.pop(label, None)
        self.say(f"{label}: {words} ({duration(time.monotonic() - self._began[label])})")

    def _tick(self) -> None:
        """Tell of the time going by in a cell that takes long."""
        while not self._ended.wait(EVERY):
            for label, place in list(self._at.items()):
                self.say(f"{label}: {place}, {duration(time.monotonic() - self._began[label])}")


def shown(path: Path) -> str:
    """A path as it can be typed where the user is."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def duration(seconds: float) -> str:
    """Seconds in words: `42 s`, `3 min 07 s`, `1 h 02 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

"""Progress: what a run shows while notebooks execute, bars on a terminal and plain lines elsewhere.

It knows labels, cells and seconds, and nothing of notebooks or stages. Several threads may report at the same time.
"""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

PLAIN_EVERY = 15.0
"""Seconds between two lines about the same notebook where the output is no terminal."""


class Progress:
    """Shows which notebooks run, at which cell, for how long. Use it as a context.

    Args:
        stream: where to; a terminal gets bars.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._running: dict[str, tqdm] = {}
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self._clock.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._clock.join()
        with self._lock:
            for bar in self._running.values():
                bar.close()

    def say(self, line: str) -> None:
        """Print a line, above the bars."""
        with self._lock:
            tqdm.write(line, file=self._stream)
            self._stream.flush()

    def start(self, label: str, reason: str = "") -> None:
        """A notebook starts.

        Args:
            label: what it is called in all that is shown.
            reason: why it must run again; nothing is printed for an empty one.
        """
        place = self._stream if self._terminal else io.StringIO()
        form = "{desc}  cell {n_fmt}/{total_fmt} |{bar:20}| {elapsed}"
        with self._lock:
            self._running[label] = tqdm(desc=label, total=0, file=place, bar_format=form, leave=False)
        if reason or not self._terminal:
            self.say(f"{label}: started{f' ({reason})' if reason else ''}")

    def cell(self, label: str, cell: int, cells: int) -> None:
        """A notebook begins a cell.

        Args:
            label: of the notebook, which has started.
            cell: number of the cell, from 1.
            cells: how many cells it has.
        """
        with self._lock:
            bar = self._running[label]
            bar.n, bar.total = cell, cells
            bar.refresh()

    def end(self, label: str, words: str) -> None:
        """A notebook ended.

        Args:
            label: of the notebook.
            words: how it ended; the time that it took is added.
        """
        with self._lock:
            bar = self._running.pop(label)
            seconds = bar.format_dict["elapsed"]
            bar.close()
        self.say(f"{label}: {words} ({duration(seconds)})")

    def _tick(self) -> None:
        """Show the time going by in a cell that takes long."""
        while not self._ended.wait(1.0 if self._terminal else PLAIN_EVERY):
            with self._lock:
                for label, bar in self._running.items():
                    if self._terminal:
                        bar.refresh()
                    elif bar.total:
                        self.say(f"{label}: cell {bar.n}/{bar.total}, {duration(bar.format_dict['elapsed'])}")


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

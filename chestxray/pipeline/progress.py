"""Progress: what a run shows while notebooks execute, bars on a terminal and plain lines elsewhere.

It knows labels, cells and seconds, and nothing of notebooks or stages. Several threads may report at the same time.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

PLAIN_EVERY = 15.0
"""Seconds between two lines about the same notebook where the output is no terminal."""


@dataclass
class _Running:
    started: float = field(default_factory=time.monotonic)
    reported: float = field(default_factory=time.monotonic)
    cell: int = 0
    cells: int = 0
    bar: tqdm | None = None


class Progress:
    """Shows which notebooks run, at which cell, for how long. Use it as a context.

    Args:
        stream: where to; a terminal gets bars.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._running: dict[str, _Running] = {}
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
            for label in list(self._running):
                self._close(label)

    def say(self, line: str) -> None:
        """Print a line, above the bars."""
        with self._lock:
            if self._terminal:
                tqdm.write(line, file=self._stream)
            else:
                print(line, file=self._stream, flush=True)

    def start(self, label: str, reason: str = "") -> None:
        """A notebook starts.

        Args:
            label: what it is called in all that is shown.
            reason: why it must run again; nothing is printed for an empty one.
        """
        with self._lock:
            running = self._running[label] = _Running()
            if self._terminal:
                form = "{desc}  cell {n_fmt}/{total_fmt} |{bar:20}| {elapsed}"
                running.bar = tqdm(desc=label, total=0, file=self._stream, bar_format=form, leave=False)
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
            running = self._running[label]
            running.cell, running.cells = cell, cells
            if running.bar is not None:
                running.bar.n, running.bar.total = cell, cells
                running.bar.refresh()

    def end(self, label: str, words: str) -> None:
        """A notebook ended.

        Args:
            label: of the notebook.
            words: how it ended; the time that it took is added.
        """
        with self._lock:
            seconds = time.monotonic() - self._running[label].started
            self._close(label)
        self.say(f"{label}: {words} ({duration(seconds)})")

    def _close(self, label: str) -> None:
        running = self._running.pop(label)
        if running.bar is not None:
            running.bar.close()

    def _tick(self) -> None:
        """Show the time going by in a cell that takes long."""
        while not self._ended.wait(1.0):
            with self._lock:
                now = time.monotonic()
                for label, running in self._running.items():
                    if running.bar is not None:
                        running.bar.refresh()
                    elif running.cells and now - running.reported >= PLAIN_EVERY:
                        running.reported = now
                        self.say(f"{label}: cell {running.cell}/{running.cells}, {duration(now - running.started)}")


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

"""Words: paths and durations as users read them."""

from __future__ import annotations

import os
from pathlib import Path


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

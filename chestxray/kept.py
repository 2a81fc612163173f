"""Arrays that took long to make, kept in files so that they are made once.

It owns the files and the digest that tells whether one still holds: of everything that the array was made from. It
knows neither networks nor radiographs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from chestxray import files


def array(folder: Path, name: str, made_from: Sequence[object], make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return an array as it was made before from the same things, or make and keep it.

    Args:
        folder: where it is kept, as `<name>-<digest>.npy`; what was made under that name from other things goes.
        name: what it is.
        made_from: all that decides what it holds: files (by content), modules (by their source), arrays, and values
            whose `repr` tells them apart.
        make: makes it.
    """
    path = folder / f"{name}-{_digest(made_from)}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # absent, or damaged
        pass
    made = np.asarray(make())
    buffer = io.BytesIO()
    np.save(buffer, made, allow_pickle=False)
    files.make_folder(folder)
    files.atomic_write(path, buffer.getvalue())
    for old in folder.glob(f"{name}-{'?' * _DIGITS}.npy"):
        if old != path:
            old.unlink(missing_ok=True)
    return made


_DIGITS = 16


def _digest(things: Sequence[object]) -> str:
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, ModuleType):
            thing = Path(str(thing.__file__))
        if isinstance(thing, Path):
            content = thing.read_bytes()
        elif isinstance(thing, np.ndarray):
            digest.update(f"{thing.dtype.str} {thing.shape} ".encode())
            content = np.ascontiguousarray(thing).tobytes()
        else:
            content = repr(thing).encode()
        digest.update(f"{len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()[:_DIGITS]

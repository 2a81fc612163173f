"""Staleness: which stage must run again, by the content of what it reads, of its notebook and of the code it imports.

Each of these has a fingerprint (SHA-256 of its content). The record keeps those of each stage's last run; one that
differs makes the stage stale.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

from chestxray import files
from chestxray.pipeline.notebooks import without_stamps

PACKAGE = "chestxray"

Fingerprints = dict[str, str]
"""What a stage runs with: a fingerprint by kind (`parameters`, `notebook`, `code` …), and by path for each file."""


def read_record(path: Path) -> dict[str, Fingerprints]:
    """What each stage last ran with, by its number; an unreadable record counts as empty."""
    try:
        return {number: dict(run) for number, run in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def text_fingerprint(*texts: str) -> str:
    """The fingerprint of some texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:".encode() + text.encode(errors="surrogateescape"))
    return digest.hexdigest()


def raw_fingerprint(raw: Path) -> str:
    """Of a folder of raw data: the tables by content; images, too many to read, by name, size and time of change."""
    lines = []
    for path, state in files.walk(raw):
        with contextlib.suppress(OSError):  # a file that may not be read counts by its name
            if state == "file":
                is_table, status = path.suffix in (".csv", ".txt"), path.stat()
                state = files.digest(path) if is_table else f"{status.st_size} {status.st_mtime_ns}"
        if not path.name.startswith("."):
            lines.append(f"{path.relative_to(raw).as_posix()} {state}")
    return text_fingerprint(*lines)


def notebook_fingerprint(notebook: NotebookNode) -> str:
    """Of a notebook's cells without their outputs. What `chestxray maintain stamp` writes doesn't count."""
    return text_fingerprint(*(f"{cell.cell_type}\n{cell.source}" for cell in without_stamps(notebook).cells))


class Modules:
    """Fingerprints of modules of the package, each with all that it imports from the package.

    Args:
        folder: the package's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._trees: dict[str, ast.Module] = {}
        self._files: dict[str, Path] = {}
        for path in folder.rglob("*.py"):
            place = (PACKAGE, *path.relative_to(folder).with_suffix("").parts)
            self._files[".".join(place).removesuffix(".__init__")] = path

    def of_notebook(self, notebook: NotebookNode) -> str:
        """Of what the notebook's cells import."""
        python = TransformerManager()  # makes calls of magics
        code = "\n".join(python.transform_cell(cell.source) for cell in notebook.cells if cell.cell_type == "code")
        # How a notebook opens decides which data it works with, which is compared by itself, not what it makes of them.
        return self.of(self._imported(ast.parse(code)) - {f"{PACKAGE}.pipeline", f"{PACKAGE}.pipeline.opening"})

    def of(self, names: Iterable[str]) -> str:
        """Of these modules, such as `chestxray.data.splits`, and what they import."""
        reached: set[str] = set()
        waiting = set(names)
        while waiting:
            name = waiting.pop()
            reached.add(name)
            waiting |= self._imported(self._tree(name)) - reached
        return text_fingerprint(*(f"{name}\n{ast.dump(self._tree(name))}" for name in sorted(reached)))

    def _tree(self, name: str) -> ast.Module:
        """A module's code without docstrings and the words below attributes."""
        if name not in self._trees:
            self._trees[name] = ast.parse(self._files[name].read_text("utf-8"))
            for node in ast.walk(self._trees[name]):
                if isinstance(body := getattr(node, "body", None), list):
                    body[:] = [line for line in body if not _is_text(line)]
        return self._trees[name]

    def _imported(self, tree: ast.Module) -> set[str]:
        """The modules that the code imports, at its top or inside functions."""
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {name for alias in node.names for name in self._meant(alias.name)}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    found |= self._meant(name if name in self._files else node.module)
        return found

    def _meant(self, name: str) -> set[str]:
        """A module with the sub-packages that it lies in, or a sub-package with all its modules."""
        if name not in self._files or name == PACKAGE:
            return set()
        is_package = self._files[name].stem == "__init__"
        below = {other for other in self._files if other.startswith(f"{name}.")} if is_package else set()
        above = name.split(".")[1:-1]
        return {name, *below, *(".".join((PACKAGE, *above[: n + 1])) for n in range(len(above)))}


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)

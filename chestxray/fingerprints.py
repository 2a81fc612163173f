"""Fingerprints of what a stage's outcome depends on besides the files it reads: raw data, notebook, package code.

It owns what counts as a change: a comment or docstring in the package doesn't, a changed value or a changed word in a
notebook does. It must not know what is done about one.
"""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from nbformat import NotebookNode

PACKAGE = "chestxray"


def of_text(*texts: str) -> str:
    """A digest of some texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:".encode() + text.encode())
    return digest.hexdigest()


def of_raw(raw: Path) -> str:
    """Of a folder of raw data: the tables by content; images, too many to read, by name, size and time of change."""
    lines = []
    for folder, subfolders, names in os.walk(raw, followlinks=True):
        subfolders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            place = path.relative_to(raw).as_posix()
            if name.endswith((".csv", ".txt")):
                lines.append(f"{place} {hashlib.sha256(path.read_bytes()).hexdigest()}")
            elif not name.startswith("."):
                status = path.stat()
                lines.append(f"{place} {status.st_size} {status.st_mtime_ns}")
    return of_text(*lines)


def of_notebook(notebook: NotebookNode) -> str:
    """Of a notebook's cells without their outputs. What `chestxray stamp` writes doesn't count."""
    from chestxray.notebooks import without_stamps

    return of_text(*(f"{cell.cell_type}\n{cell.source}" for cell in without_stamps(notebook).cells))


class Modules:
    """Fingerprints of modules of the package, each with all that it imports from the package."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._trees: dict[str, ast.Module] = {}

    def of_notebook(self, notebook: NotebookNode) -> str:
        """Of what the notebook's cells import."""
        code = "\n".join(_python(cell.source) for cell in notebook.cells if cell.cell_type == "code")
        return self.of(_imported(ast.parse(code), self._names()))

    def of(self, names: Iterable[str]) -> str:
        """Of these modules and what they import."""
        reached: set[str] = set()
        waiting = set(names)
        while waiting:
            name = waiting.pop()
            reached.add(name)
            waiting |= _imported(self._tree(name), self._names()) - reached
        return of_text(*(f"{name}\n{ast.dump(self._tree(name))}" for name in sorted(reached)))

    def _names(self) -> set[str]:
        return {path.stem for path in self._folder.glob("*.py")}

    def _tree(self, name: str) -> ast.Module:
        if name not in self._trees:
            tree = ast.parse((self._folder / f"{name}.py").read_text("utf-8"))
            self._trees[name] = _without_docstrings(tree)
        return self._trees[name]


def _imported(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of the package that the code imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith(f"{PACKAGE}.")}
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
            found.add(node.module.partition(".")[2])
    return found & known


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        for body in _bodies(node):
            body[:] = [statement for statement in body if not _is_text(statement)]
    return tree


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.body


def _is_text(statement: ast.stmt) -> bool:
    """A docstring, or the words below an attribute."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _python(source: str) -> str:
    """A cell's code as Python, its magics as the calls that they stand for."""
    try:
        ast.parse(source)
        return source
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager

        return TransformerManager().transform_cell(source)

"""Staleness: which stage must run again, by the content of what it reads, of its notebook and of the code it imports.

A stage's outcome is described by fingerprints (SHA-256 of contents). The record keeps the description of each stage's
last run; what differs from it makes the stage stale.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from chestxray import files

PACKAGE = "chestxray"

Entry = dict[str, Any]
"""One run of a stage: `description`, a fingerprint for each kind of thing, and `inputs`, a state for each file."""


class Record:
    """What each stage last ran with, as one JSON file; an unreadable one counts as empty.

    Args:
        path: the file, written whole after each stage, so that a killed run loses none of the stages that ended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            stages = json.loads(path.read_text("utf-8"))["stages"]
            parts = [entry[part] for entry in stages.values() for part in ("description", "inputs")]
            whole = all(isinstance(part, dict) for part in parts)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            whole = False
        self._stages: dict[str, Entry] = stages if whole else {}

    def entry(self, stage: str, description: dict[str, str], inputs: Iterable[Path]) -> Entry:
        """Describe a run that starts now.

        Args:
            stage: its number.
            description: fingerprints by kind: parameters, notebook, code …
            inputs: the files that it reads; a missing one has no state.
        """
        before = self._stages.get(stage, {}).get("inputs", {})
        states = {str(path): _state(path, before.get(str(path))) for path in inputs if path.is_file()}
        return {"description": description, "inputs": states}

    def described(self, stage: str) -> dict[str, str]:
        """The description of a stage's last run; empty where it never ran."""
        return self._stages.get(stage, {}).get("description", {})

    def changes(self, stage: str, entry: Entry) -> list[str] | None:
        """What differs from the stage's last run, in words: kinds of the description, else names of input files.

        Args:
            stage: its number.
            entry: the run that would start now.

        Returns:
            Nothing where all is the same; None where the stage never ran.
        """
        before = self._stages.get(stage)
        if before is None:
            return None
        now, then = entry["description"], before["description"]
        changed = [name for name in now if then.get(name) != now[name]]
        if changed or now.keys() != then.keys():
            return changed or sorted(then.keys() - now.keys())
        digests = [{path: state["sha256"] for path, state in one["inputs"].items()} for one in (entry, before)]
        differing = {path for path, _ in set(digests[0].items()) ^ set(digests[1].items())}
        return sorted(Path(path).name for path in differing)

    def write(self, stage: str, entry: Entry) -> None:
        """Note that a stage ran to its end.

        Args:
            stage: its number.
            entry: what it ran with.

        Raises:
            StudyError: the file can't be written.
        """
        self._stages[stage] = entry
        files.atomic_write(self._path, json.dumps({"stages": self._stages}, indent=1).encode())


def _state(path: Path, before: dict[str, Any] | None) -> dict[str, Any]:
    """Size, time of change and SHA-256 of a file; it isn't read again while the first two are as before."""
    status = path.stat()
    state = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if before is not None and state.items() <= before.items():
        return before
    return state | {"sha256": files.digest(path)}


def text_fingerprint(*texts: str) -> str:
    """The fingerprint of some texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:".encode() + text.encode(errors="surrogateescape"))
    return digest.hexdigest()


def raw_fingerprint(raw: Path) -> str:
    """Of a folder of raw data: the tables by content; images, too many to read, by name, size and time of change."""
    lines = []
    for path, kind in files.walk(raw):
        place = path.relative_to(raw).as_posix()
        try:
            if kind != "file":
                lines.append(f"{place} {kind}")
            elif path.suffix in (".csv", ".txt"):
                lines.append(f"{place} {files.digest(path)}")
            elif not path.name.startswith("."):
                status = path.stat()
                lines.append(f"{place} {status.st_size} {status.st_mtime_ns}")
        except OSError as error:
            lines.append(f"{place} {error.strerror}")
    return text_fingerprint(*lines)


def notebook_fingerprint(notebook: NotebookNode) -> str:
    """Of a notebook's cells without their outputs. What `chestxray maintain stamp` writes doesn't count."""
    from chestxray.pipeline.notebooks import without_stamps

    return text_fingerprint(*(f"{cell.cell_type}\n{cell.source}" for cell in without_stamps(notebook).cells))


class Modules:
    """Fingerprints of modules of the package, each with all that it imports from the package.

    Modules are named from the package on: `config`, `data.manifest`; a sub-package by its folder, `data`.

    Args:
        folder: the package's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._trees: dict[str, ast.Module] = {}
        self._files: dict[str, Path] = {}
        for path in folder.rglob("*.py"):
            place = path.relative_to(folder).with_suffix("").parts
            self._files[".".join(place[:-1] if place[-1] == "__init__" else place)] = path

    def of_notebook(self, notebook: NotebookNode) -> str:
        """Of what the notebook's cells import."""
        code = "\n".join(_python(cell.source) for cell in notebook.cells if cell.cell_type == "code")
        # How a notebook opens decides which data it works with, which is compared by itself, not what it makes of them.
        return self.of(self._imported(ast.parse(code), "") - {"pipeline.opening"})

    def of(self, names: Iterable[str]) -> str:
        """Of these modules and what they import."""
        reached: set[str] = set()
        waiting = set(names)
        while waiting:
            name = waiting.pop()
            reached.add(name)
            waiting |= self._imported(self._tree(name), name) - reached
        return text_fingerprint(*(f"{name}\n{ast.dump(self._tree(name))}" for name in sorted(reached)))

    def _tree(self, name: str) -> ast.Module:
        if name not in self._trees:
            self._trees[name] = _without_docstrings(ast.parse(self._files[name].read_text("utf-8")))
        return self._trees[name]

    def _imported(self, tree: ast.Module, importer: str) -> set[str]:
        """The modules that the code imports, at its top or inside functions, with the sub-packages above them."""
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith(f"{PACKAGE}.")}
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node, importer)
                for alias in node.names if base is not None else ():
                    found |= self._named(base, alias, tree)
        above = {name.rpartition(".")[0] for name in found} | {name.partition(".")[0] for name in found}
        return (found | above) & self._files.keys() - {""}

    def _base(self, node: ast.ImportFrom, importer: str) -> str | None:
        """The module named after `from`; None if it isn't of the package."""
        is_package = self._files.get(importer, Path()).stem == "__init__"
        package = f"{PACKAGE}.{importer if is_package else importer.rpartition('.')[0]}".rstrip(".")
        head, _, rest = resolve_name("." * node.level + (node.module or ""), package).partition(".")
        return rest if head == PACKAGE else None

    def _named(self, base: str, alias: ast.alias, tree: ast.Module) -> set[str]:
        """The modules that `from base import alias` reaches in this code."""
        name = f"{base}.{alias.name}".lstrip(".")
        if name not in self._files:
            return {base, self._owner(base, alias.name)}
        if self._files[name].stem != "__init__":
            return {name}
        # A whole sub-package: what is taken from it by name, or all of it where it is passed on as it is.
        bound = alias.asname or alias.name
        taken = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_name(node.value, bound)]
        if len(taken) < sum(_is_name(node, bound) for node in ast.walk(tree)):
            return {name, *(other for other in self._files if other.startswith(f"{name}."))}
        return {name}.union(*(self._named(name, ast.alias(node.attr), tree) for node in taken))

    def _owner(self, base: str, name: str) -> str:
        """The module that defines what a sub-package hands on under this name by its `_OWNERS`."""
        for node in ast.walk(self._tree(base)) if base in self._files else ():
            if isinstance(node, ast.Assign) and _is_name(node.targets[0], "_OWNERS"):
                owners = ast.literal_eval(node.value).items()
                return f"{base}.{next((module for module, names in owners if name in names.split()), '')}".lstrip(".")
        return base


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body[:] = [statement for statement in node.body if not _is_text(statement)]
    return tree


def _is_text(statement: ast.stmt) -> bool:
    """A docstring, or the words below an attribute."""
    match statement:
        case ast.Expr(ast.Constant(str())):
            return True
    return False


def _python(source: str) -> str:
    """A cell's code as Python, its magics as the calls that they stand for."""
    try:
        ast.parse(source)
        return source
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager

        return TransformerManager().transform_cell(source)

"""Notebooks: the form in which they are committed, and the cells that are the same in all of them.

It owns the buttons of Colab and Kaggle, the set-up cell and the normal form. It must not know what a notebook computes,
nor run one.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from chestxray import files
from chestxray.config import REPOSITORY, StudyError

PARAMETERS = ("dataset", "profile", "seed", "overrides")
"""The names that a run sets in the cell tagged `parameters`."""

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}

COLAB_LINE = "<!-- colab -->"
"""Where the buttons go in a new notebook."""

_BUTTON = re.compile(r"\[!\[Open [Ii]n (?:Colab|Kaggle)\]\([^)]*\)\]\([^)]*\)")
_GREETINGS = re.compile(
    r"^(?:WARNING: All log messages before absl|[IW]\d{4} [\d:.]+ |E\d{4} [\d:.]+ .*failed call to cuInit).*\n?",
    re.MULTILINE,
)
_SETUP = """\
import os  # setup: find the repository here or above, else fetch it; it installs what is lacking, and says what it did
import runpy

at = next((p for p in (".", "..", "../..") if os.access(f"{{p}}/chestxray", os.R_OK)), "{folder}")
fetch = f"git clone --quiet --depth=1 {owner}/{{at}}"
assert os.access(at, os.R_OK) or os.system(fetch) == 0, "not fetched: check git and network, then run this cell again"
_ = runpy.run_path(f"{{at}}/chestxray/pipeline/setup.py")"""


def find() -> list[Path]:
    """The study's notebooks, sorted: those in the numbered folders, not what a run wrote beside its results."""
    return sorted(REPOSITORY.glob("[1-5]_*/[!.]*.ipynb"))


def address() -> str:
    """Where the repository is published, on GitHub, from pyproject.toml."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    return project["urls"]["Repository"].rstrip("/")


def read(path: Path) -> NotebookNode:
    """Read a notebook.

    Raises:
        StudyError: the file is no notebook.
    """
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, AttributeError, nbformat.ValidationError) as error:
        raise StudyError(f"{path.name} is no notebook ({type(error).__name__}): restore it from git") from error


def write(path: Path, notebook: NotebookNode) -> None:
    """Write a notebook.

    Args:
        path: the file; complete or as it was.
        notebook: as nbformat has it.

    Raises:
        StudyError: the file can't be written.
    """
    files.atomic_write(path, (nbformat.writes(notebook) + "\n").encode())


def tagged(notebook: NotebookNode, tag: str) -> NotebookNode | None:
    """The first cell with a tag.

    Args:
        notebook: to look in.
        tag: such as `parameters` or `setup`.
    """
    return next((cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])), None)


def buttons(path: str) -> str:
    """The buttons that open the notebook with this path in the repository in Colab and in Kaggle, in Markdown."""
    file = f"{address()}/blob/main/{path}"
    on_colab = file.replace("https://github.com/", "https://colab.research.google.com/github/")
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({on_colab}) "
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src={file})"
    )


def setup_source() -> str:
    """The set-up cell, the same in every notebook."""
    owner, _, folder = address().rpartition("/")
    return _SETUP.format(owner=owner, folder=folder)


def stamp(notebook: NotebookNode, path: str) -> NotebookNode:
    """Return a copy with the buttons of its path and the set-up cell of its repository.

    Args:
        notebook: to copy.
        path: the notebook's path in the repository, with forward slashes.

    Raises:
        StudyError: the first cell has no place for the buttons, or no cell is tagged `setup`.
    """
    notebook = copy.deepcopy(notebook)
    if not notebook.cells or notebook.cells[0].cell_type != "markdown":
        raise StudyError(f"{path}: the first cell is no Markdown; it must hold the line {COLAB_LINE} and the title")
    lines = notebook.cells[0].source.split("\n")
    place = next((i for i, line in enumerate(lines) if _is_button(line)), None)
    if place is None:
        raise StudyError(f"{path}: the first cell has no line {COLAB_LINE} to put the buttons in")
    lines[place] = buttons(path)
    notebook.cells[0].source = "\n".join(lines)
    setup = tagged(notebook, "setup")
    if setup is None:
        raise StudyError(f"{path}: no cell is tagged setup; add an empty one with this tag")
    setup.source = setup_source()
    return notebook


def without_stamps(notebook: NotebookNode) -> NotebookNode:
    """Return a copy without what `stamp` writes: the line of the buttons, and the set-up cell."""
    notebook = copy.deepcopy(notebook)
    notebook.cells = [cell for cell in notebook.cells if "setup" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells[:1]:
        cell.source = "\n".join(line for line in cell.source.split("\n") if not _is_button(line))
    return notebook


def set_parameters(notebook: NotebookNode, values: Mapping[str, Any]) -> NotebookNode:
    """Return a copy whose cell tagged `parameters` assigns these values; its other lines stay as they are.

    Args:
        notebook: to copy.
        values: name → value: numbers, texts, lists and dictionaries of them.

    Raises:
        StudyError: no cell is tagged `parameters`, or it doesn't assign one of the names on a line of its own.
    """
    notebook = copy.deepcopy(notebook)
    cell = tagged(notebook, "parameters")
    if cell is None:
        raise StudyError("no cell is tagged parameters: tag the one that assigns dataset, profile, seed and overrides")
    lines = cell.source.split("\n")
    for statement in reversed(ast.parse(cell.source).body):
        name = _assigned(statement)
        if name in values:
            # A text in double quotes, as ruff formats the sources.
            value = json.dumps(values[name], ensure_ascii=False) if isinstance(values[name], str) else values[name]
            new = f"{name} = {value}"
            comment = re.search(r"\s+#[^'\"]*$", lines[statement.end_lineno - 1][statement.end_col_offset :])
            lines[statement.lineno - 1 : statement.end_lineno] = [new + (comment[0] if comment else "")]
    cell.source = "\n".join(lines)
    absent = set(values) - {_assigned(statement) for statement in ast.parse(cell.source).body}
    if absent:
        raise StudyError(f"the cell tagged parameters doesn't assign {', '.join(sorted(absent))}: add the line there")
    return notebook


def normalise(notebook: NotebookNode, keep_stderr: bool = False) -> NotebookNode:
    """Return a copy in the form that is committed: nothing in it tells when, where or with which tool it ran.

    Args:
        notebook: executed or not.
        keep_stderr: keep what cells wrote to stderr.
    """
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    join_streams = CoalesceStreamsPreprocessor()
    cells, count = [], 0
    for cell in copy.deepcopy(notebook).cells:
        tags = cell.metadata.get("tags", [])
        fresh = {"cell_type": cell.cell_type, "id": _identifier(cell, cells), "source": cell.source}
        fresh["metadata"] = {"tags": list(tags)} if tags else {}
        if cell.cell_type == "code":
            if cell.source.strip():
                count += 1
            fresh["execution_count"] = count if cell.execution_count is not None else None
            for output in filter(_is_stderr, cell.outputs):
                # What TensorFlow's C++ side prints at its start; no setting of its own stops that.
                output.text = _GREETINGS.sub("", output.text).lstrip("\n")
            cell.outputs = [o for o in cell.outputs if not _is_stderr(o) or (keep_stderr and o.text)]
            join_streams.preprocess_cell(cell, {}, 0)  # what was printed slowly comes in many pieces
            fresh["outputs"] = [_output(output, fresh["execution_count"]) for output in cell.outputs]
        cells.append(fresh)
    metadata = {"kernelspec": dict(KERNEL), "language_info": {"name": "python"}}
    return nbformat.from_dict({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def _is_button(line: str) -> bool:
    return line.strip() == COLAB_LINE or bool(_BUTTON.match(line.strip()))


def _identifier(cell: NotebookNode, before: list[dict[str, Any]]) -> str:
    """An identifier made of the source: git shows no change for cells that didn't change, wherever they moved."""
    name = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
    twins = sum(other["id"].startswith(name) for other in before)
    return f"{name}-{twins}" if twins else name


def _assigned(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None


def _is_stderr(output: NotebookNode) -> bool:
    return output.output_type == "stream" and output.name == "stderr"


def _output(output: NotebookNode, count: int | None) -> dict[str, Any]:
    fresh = {key: output[key] for key in output if key not in ("metadata", "execution_count")}
    if output.output_type in ("display_data", "execute_result"):
        fresh["metadata"] = {}
    if output.output_type == "execute_result":
        fresh["execution_count"] = count
    return fresh

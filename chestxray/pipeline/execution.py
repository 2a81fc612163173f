"""Execution: runs one notebook in a process of its own and reports how far it is, in lines of JSON.

It owns the kernel and the conversion to HTML. It must not know which notebook comes before or after, nor what is
stale. The parent process is `runner`; when that dies, this process and its kernel end too.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from chestxray import files
from chestxray.config import REPOSITORY, StudyError
from chestxray.pipeline import notebooks

Failure = dict[str, Any]
"""What ended a notebook: its `cell` (from 1; or None), the error's `name` and `value`, the lines of its `traceback`."""

Report = Callable[[int, int], None]
"""Called when a cell begins, with its number, from 1, and how many there are."""

START_SECONDS = 300
"""A kernel on a busy machine may take this long to answer."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def execute(source: Path, target: Path, parameters: dict[str, Any], report: Report) -> Failure | None:
    """Execute `source` with these parameters; write `target` and, beside it, the same as HTML.

    After a failure nothing is written to `target`: what was executed is saved as `<name>.failed.ipynb` beside it.

    Args:
        source: the notebook as committed, in whose folder its cells run; it is not written.
        target: where the executed notebook goes.
        parameters: names and values for the cell tagged `parameters`.
        report: called when a cell begins.

    Returns:
        What failed; None where all cells ran.

    Raises:
        StudyError: `source` is no notebook or has no cell tagged `parameters`; or `target` can't be written.
    """
    notebook = notebooks.set_parameters(notebooks.read(source), parameters)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    failed = target.with_suffix(".failed.ipynb")
    files.remove_leftovers(target)
    failure = _run(notebook, source.parent, report)
    executed = notebooks.normalise(notebook, keep_stderr=True)
    if failure is not None:
        notebooks.write(failed, executed)
        return failure
    title = {"metadata": {"name": target.stem.replace("_", " ")}}
    page, _ = HTMLExporter(template_name="lab").from_notebook_node(executed, resources=title)
    files.atomic_write(target.with_suffix(".html"), page.encode())
    notebooks.write(target, executed)
    failed.unlink(missing_ok=True)
    return None


def refresh(notebook: Path) -> None:
    """Execute a notebook with the parameters that it has, and write it back in the form that is committed.

    Raises:
        StudyError: a cell failed, or what it wrote keeps the notebook from being committed; the file is as it was.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / notebook.name
        failed = execute(notebook, target, {}, lambda cell, cells: None)
        if failed is not None:
            where = f"{notebook.name}, cell {failed['cell']}"
            raise StudyError(f"{where}: {failed['name']}: {failed['value']}; mend it and run the command again")
        executed, size = notebooks.read(target), target.stat().st_size
    place = notebook.relative_to(REPOSITORY).as_posix()
    for problem in notebooks.check(executed, place, notebooks.address(), size):
        raise StudyError(f"{problem}; mend it and run the command again")
    notebooks.write(notebook, executed)


def _run(notebook: NotebookNode, folder: Path, report: Report) -> Failure | None:
    """Execute the notebook's cells, which keep their outputs."""
    reached = 0

    def start(cell: NotebookNode, cell_index: int) -> None:
        nonlocal reached
        reached = cell_index + 1
        report(reached, len(notebook.cells))

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        timeout=None,
        startup_timeout=START_SECONDS,
        iopub_timeout=START_SECONDS,
        raise_on_iopub_timeout=True,
        on_cell_start=start,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        outputs = notebook.cells[reached - 1].outputs
        shown = [line for output in outputs if output.output_type == "error" for line in output.traceback]
        lines = _COLOURS.sub("", "\n".join(shown)).split("\n")
        return {"cell": reached, "name": error.ename, "value": error.evalue, "traceback": lines}
    except RuntimeError as error:  # the kernel died, or never started
        value = f"{error} (a kernel that dies without a word ran out of memory: try --jobs 1 or a smaller profile)"
        return {"cell": None, "name": type(error).__name__, "value": value, "traceback": []}
    return None


def main(job: str) -> int:
    """Execute one job: source, target and parameters, as JSON.

    Messages go to stdout, whatever else is printed to stderr. One has the `cell` that begins and the number of `cells`,
    or what failed.
    """
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=messages, flush=True)

    source, target, parameters = json.loads(job)
    try:
        failure = execute(
            Path(source), Path(target), parameters, lambda cell, cells: send({"cell": cell, "cells": cells})
        )
    except StudyError as error:
        failure = {"cell": None, "name": "StudyError", "value": str(error), "traceback": []}
    if failure is not None:
        send(failure)
    return int(failure is not None)


def _end_with_parent() -> None:
    """Wait for the end of stdin, which the parent holds open, then end; the kernel sees that and ends too."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

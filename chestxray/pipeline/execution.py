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
from nbformat import NotebookNode

from chestxray import files
from chestxray.config import REPOSITORY, StudyError
from chestxray.pipeline import notebooks

Report = Callable[..., None]
"""Takes the fields of one message to the parent: `event` (`cell` or `failed`) and what belongs to it."""

START_SECONDS = 300
"""A kernel on a busy machine may take this long to answer."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def execute(source: Path, target: Path, parameters: dict[str, Any], folder: Path, report: Report) -> bool:
    """Execute `source` with these parameters; write `target` and, beside it, the same as HTML.

    After a failure nothing is written to `target`: what was executed is saved as `<name>.failed.ipynb` beside it.

    Args:
        source: the notebook as committed; it is not written.
        target: where the executed notebook goes.
        parameters: names and values for the cell tagged `parameters`.
        folder: where its cells run.
        report: called with the fields of each message.

    Returns:
        Whether all cells ran.

    Raises:
        StudyError: `source` is no notebook or has no cell tagged `parameters`; or `target` can't be written.
    """
    notebook = notebooks.set_parameters(notebooks.read(source), parameters)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    failed = target.with_suffix(".failed.ipynb")
    files.remove_leftovers(target)
    failure = _run(notebook, folder, report)
    executed = notebooks.normalise(notebook, keep_stderr=True)
    if failure is not None:
        notebooks.write(failed, executed)
        report(**failure)
        return False
    files.atomic_write(target.with_suffix(".html"), as_html(executed, target.stem).encode())
    notebooks.write(target, executed)
    failed.unlink(missing_ok=True)
    return True


def refresh(notebook: Path) -> None:
    """Execute a notebook with the parameters that it has, and write it back in the form that is committed.

    Raises:
        StudyError: a cell failed, or what it wrote keeps the notebook from being committed; the file is as it was.
    """
    failures: list[dict[str, Any]] = []

    def report(**message: Any) -> None:
        if message["event"] == "failed":
            failures.append(message)

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / notebook.name
        if not execute(notebook, target, {}, notebook.parent, report):
            failed = failures[-1]
            where = f"{notebook.name}, cell {failed['cell']}"
            raise StudyError(f"{where}: {failed['name']}: {failed['value']}; mend it and run the command again")
        executed, size = notebooks.read(target), target.stat().st_size
    place = notebook.relative_to(REPOSITORY).as_posix()
    for problem in notebooks.check(executed, place, notebooks.address(), size):
        raise StudyError(f"{problem}; mend it and run the command again")
    notebooks.write(notebook, executed)


def _run(notebook: NotebookNode, folder: Path, report: Report) -> dict[str, Any] | None:
    """Execute the notebook's cells, which keep their outputs; return the message that tells of a failure."""
    reached = 0

    def start(cell: NotebookNode, cell_index: int) -> None:
        nonlocal reached
        reached = cell_index + 1
        report(event="cell", cell=reached, cells=len(notebook.cells))

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
        return {"event": "failed", "cell": reached, "name": error.ename, "value": error.evalue, "traceback": lines}
    except RuntimeError as error:  # the kernel died, or never started
        value = f"{error} (a kernel that dies without a word ran out of memory: try --jobs 1 or a smaller profile)"
        return {"event": "failed", "cell": None, "name": type(error).__name__, "value": value, "traceback": []}
    return None


def as_html(notebook: NotebookNode, title: str) -> str:
    """The notebook as one HTML page.

    Args:
        notebook: executed.
        title: the page's, with underscores for spaces.
    """
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter(template_name="lab").from_notebook_node(
        notebook, resources={"metadata": {"name": title.replace("_", " ")}}
    )
    return body


def main(job: str) -> int:
    """Execute one job, given as JSON; messages go to stdout, whatever else is printed goes to stderr."""
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(**message: Any) -> None:
        print(json.dumps(message), file=messages, flush=True)

    wanted = json.loads(job)
    try:
        source, target, folder = (Path(wanted[name]) for name in ("source", "target", "folder"))
        return 0 if execute(source, target, wanted["parameters"], folder, report) else 1
    except StudyError as error:
        report(event="failed", cell=None, name="StudyError", value=str(error), traceback=[])
        return 1


def _end_with_parent() -> None:
    """Wait for the end of stdin, which the parent holds open, then end; the kernel sees that and ends too."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""Execution: runs the cells of one notebook in a kernel, reports how far it is, and writes the notebook with its page.

It must not know which notebook comes before or after, nor what is stale. Several threads may each execute a notebook.
A kernel ends by itself when this process does, even if that is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from chestxray import files
from chestxray.config import StageMissing, StudyError
from chestxray.pipeline import notebooks

Report = Callable[[int, int], None]
"""Called when a cell begins, with its number, from 1, and how many there are."""

START_SECONDS = 300
"""A kernel on a busy machine may take this long to answer."""

ERROR_LINES = 15
"""Lines of a cell's traceback that are shown; the whole of it is in the notebook that is saved."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Execution:
    """One notebook's cells, executed in the notebook's folder.

    Attributes:
        source: the notebook as committed; it is not written.
        parameters: names and values for the cell tagged `parameters`.
        report: called when a cell begins; an error that it raises ends the execution.
        variables: the kernel's environment variables.
        notebook: the cells, with their outputs as they come.
    """

    def __init__(
        self,
        source: Path,
        parameters: dict[str, Any],
        report: Report = lambda cell, cells: None,
        variables: Mapping[str, str] = os.environ,
    ) -> None:
        self.source, self.report, self.variables = source, report, variables
        self.notebook = notebooks.set_parameters(notebooks.read(source), parameters)
        for cell in self.notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        self._cell = 0
        self._client = NotebookClient(
            self.notebook,
            kernel_name="python3",
            resources={"metadata": {"path": str(source.parent)}},
            timeout=None,
            startup_timeout=START_SECONDS,
            iopub_timeout=START_SECONDS,
            raise_on_iopub_timeout=True,
            on_cell_start=self._begin,
        )

    def run(self) -> None:
        """Execute the cells.

        Raises:
            StudyError: a cell failed, or the kernel died; the message has the notebook, the cell and the error.
        """
        try:
            # What the kernel itself says at its start concerns nobody; what cells print comes with their outputs.
            self._client.execute(env=dict(self.variables), stderr=subprocess.DEVNULL)
        except CellExecutionError as error:
            lines = [f"{error.ename}: {error.evalue}"]
            if error.ename not in (StudyError.__name__, StageMissing.__name__):
                outputs = self.notebook.cells[self._cell - 1].outputs
                text = "\n".join(line for output in outputs for line in output.get("traceback", []))
                lines = _COLOURS.sub("", text).split("\n")[-ERROR_LINES:]
            raise self._failure(f", cell {self._cell}", *lines) from error
        except StudyError:  # of `report`
            raise
        except Exception as error:  # the kernel died, never started, or doesn't answer
            remedy = "a kernel that dies without a word ran out of memory: try --jobs 1 or a smaller profile"
            raise self._failure("", f"{type(error).__name__}: {error} ({remedy})") from error

    def write(self, target: Path) -> None:
        """Execute the cells and write the notebook to `target`, with a page of HTML beside it.

        After a failure nothing is written to `target`: what was executed is saved as `<name>.failed.ipynb` beside it.

        Raises:
            StudyError: as `run`, or `target` can't be written.
        """
        failed = target.with_suffix(".failed.ipynb")
        files.remove_leftovers(target)
        try:
            self.run()
        except StudyError as error:
            notebooks.write(failed, notebooks.normalise(self.notebook, keep_stderr=True))
            raise StudyError(f"{error}\nWhat ran is kept in {files.shown(failed)}") from error
        executed = notebooks.normalise(self.notebook, keep_stderr=True)
        title = {"metadata": {"name": target.stem.replace("_", " ")}}
        page, _ = HTMLExporter(template_name="lab").from_notebook_node(executed, resources=title)
        files.atomic_write(target.with_suffix(".html"), page.encode())
        notebooks.write(target, executed)
        failed.unlink(missing_ok=True)

    def kill(self) -> None:
        """End the kernel at once, from another thread; `run` then fails."""
        if self._client.km is not None and self._client.km.has_kernel:
            with contextlib.suppress(OSError):
                os.kill(self._client.km.provisioner.pid, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)

    def _begin(self, cell: NotebookNode, cell_index: int) -> None:
        self._cell = cell_index + 1
        self.report(self._cell, len(self.notebook.cells))

    def _failure(self, place: str, *lines: str) -> StudyError:
        return StudyError("\n".join([f"{files.shown(self.source)}{place}:", *(f"    {line}" for line in lines)]))

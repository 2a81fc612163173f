"""The form of committed notebooks, which readers and GitHub rely on."""

import re

from chestxray.pipeline import notebooks

LARGEST = 1_500_000
"""Bytes above which GitHub may not render a notebook."""

_ABSOLUTE = re.compile(r"(?<![\w.])(?:/(?:work|home|root|tmp|Users|content|mnt|private|var)/|[A-Za-z]:\\\\?[A-Za-z])")


def problems(notebook, path, size=0):
    """What keeps a notebook from being committed, one line each; `path` is its place in the repository."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    outputs = [output for cell in code for output in cell.outputs]
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    titles = re.findall(r"^# ", re.sub(r"```.*?```", "", prose, flags=re.DOTALL), re.MULTILINE)
    setup = notebooks.tagged(notebook, "setup")
    found = {
        "its cells are not executed in order 1..n": [c.execution_count for c in code] != list(range(1, len(code) + 1)),
        "a cell ended in an error": any(o.output_type == "error" for o in outputs),
        "a cell wrote to stderr": any(o.output_type == "stream" and o.name == "stderr" for o in outputs),
        f"it has {size / 1e6:.1f} MB": size > LARGEST,
        "it holds the state of widgets": "widgets" in notebook.metadata
        or any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in outputs),
        "it holds an absolute path": bool(_ABSOLUTE.search(_everything(notebook, outputs))),
        "no cell is tagged parameters": notebooks.tagged(notebook, "parameters") is None,
        "its buttons don't lead to it; run chestxray maintain stamp": notebooks.buttons(path)
        not in notebook.cells[0].source.split("\n"),
        "its set-up cell is not the common one; run chestxray maintain stamp": setup is None
        or setup.source != notebooks.setup_source(),
        "its kernel is not python3": notebook.metadata.get("kernelspec", {}).get("name") != "python3",
        f"it has {len(titles)} titles of the first level, not one": len(titles) != 1,
        "it is not in normal form; run chestxray maintain stamp": notebooks.normalise(notebook, keep_stderr=True)
        != notebook,
    }
    return [f"{path}: {problem}" for problem, is_so in found.items() if is_so]


def _everything(notebook, outputs):
    """All text of a notebook, without the pictures' bytes."""
    parts = [cell.source for cell in notebook.cells]
    for output in outputs:
        parts += [output.get("text", ""), *output.get("traceback", [])]
        parts += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(parts)

"""What users see of broken downloads, images, packed datasets, class shares: recorded by tests, held to `faults.md`."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("faults.md")
SECTIONS = {
    "data/test_kaggle": "Datasets from Kaggle",
    "data/test_subset": "The reference's radiographs",
    "data/test_integrity": "Images, as chestxray verify tells of them",
    "data/test_preparation": "Images, as stage 2.1 tells of them in rejected.csv",
    "data/test_archive": "Packed datasets",
    "evaluation/test_posterior": "Class shares",
}
"""Test module → heading, in the order of the table."""

HEADER = """# What goes wrong, what is said, what is left

Written by the tests that cause each fault, and compared with what they see in every run, but for numbers and what
stands in parentheses, where libraries speak. To write it anew:

```
CHESTXRAY_FAULTS=tests/faults.md python3 -m chestxray test -- {modules}
```

`…` stands for a folder of the test. `chestxray verify` writes nothing, so what it found is what is left; stage 2.1
leaves raw data alone too, and what is shown is its store of prepared images, where the others are.
"""


class Fault(NamedTuple):
    """What was broken, what the user saw, which files were left on disk."""

    section: str
    name: str
    said: str
    left: str

    def plain(self) -> Fault:
        """The same without what differs between machines: numbers, and the words of libraries in parentheses."""
        return Fault(*map(plain, self))


SEEN: list[Fault] = []


def note(name: str, said: object, folder: Path) -> None:
    """Record a fault, and compare it with the table.

    Args:
        name: of the fault, unique in its test module.
        said: what the user saw.
        folder: where things could have been left; or the file that is broken, where nothing is written.
    """
    assert "\n" not in str(said)
    paths = [path for path in (folder, *sorted(folder.rglob("*"))) if path.is_file()]
    images = [path for path in paths if path.suffix == ".png"]
    if len(images) > 3:
        paths = [path for path in paths if path not in images]
    left = [f"{path.name} ({path.stat().st_size:,} B)" for path in paths]
    left += [f"{len(images)} images"] if len(images) > 3 else []
    text = str(said).replace(str(folder), "…")
    module = (
        Path(os.environ["PYTEST_CURRENT_TEST"].partition("::")[0]).with_suffix("").as_posix().removeprefix("tests/")
    )
    fault = Fault(SECTIONS[module], name, text, ", ".join(left) or "nothing")
    assert "pytest-of" not in text, "a place on this machine: give the folder that it lies in"
    SEEN.append(fault)
    if "CHESTXRAY_FAULTS" not in os.environ:
        written = {(other.section, other.name): other for other in read()}
        assert (fault.section, name) in written, f"{name!r} is not in {TABLE.name}: write it anew, as it says"
        assert written[fault.section, name].plain() == fault.plain(), f"{TABLE.name} is out of date: write it anew"


def plain(text: str) -> str:
    """A text without numbers and parentheses."""
    before = ""
    while before != text:
        before, text = text, re.sub(r"\([^()]*\)", "", text)
    return re.sub(r"\d[\d,.]*", "#", text)


@cache
def read() -> tuple[Fault, ...]:
    """The rows of the table."""
    faults, section = [], ""
    for line in TABLE.read_text("utf-8").splitlines() if TABLE.exists() else ():
        if line.startswith("## "):
            section = line[3:]
        elif section and line.startswith("| ") and line != _COLUMNS:
            cells = [cell.replace("\\|", "|") for cell in re.split(r"(?<!\\) \| ", line[2:-2])]
            faults.append(Fault(section, *cells))
    return tuple(faults)


_COLUMNS = "| fault | what the user saw | what was left on disk |"


def write(path: Path) -> None:
    """Write the table of what was seen."""
    lines = [HEADER.format(modules=" ".join(f"tests/{module}.py" for module in SECTIONS))]
    for section in SECTIONS.values():
        rows = [fault for fault in SEEN if fault.section == section]
        lines += [f"## {section}\n", _COLUMNS, "|---|---|---|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in fault[1:]) + " |" for fault in rows]
        lines.append("")
    path.write_text("\n".join(lines), "utf-8")

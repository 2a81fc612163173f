"""The house's rules: which rooms import which, how large they may be, what functions say, what a wheel has."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from chestxray.config import REPOSITORY

PACKAGE = REPOSITORY / "chestxray"
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_FILES, MOST_LINES, LONGEST_FUNCTION = 12, 450, 70


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.fixture(scope="module")
def functions() -> list[tuple[str, ast.FunctionDef, bool]]:
    """Every function with the place it stands in, and whether it is public: no underscore in front, nor around it."""
    found = []
    for path in MODULES:
        waiting = [(ast.parse(path.read_text("utf-8")), named(path), True)]
        while waiting:
            parent, place, public = waiting.pop()
            for node in ast.iter_child_nodes(parent):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    inside = f"{place}:{node.name}" if place.endswith(".py") else f"{place}.{node.name}"
                    open_to_all = public and not node.name.startswith("_")
                    if isinstance(node, ast.ClassDef):
                        waiting.append((node, inside, open_to_all))
                    else:
                        found.append((inside, node, open_to_all))
                        waiting.append((node, inside, False))
                else:
                    waiting.append((node, place, public))
    return found


def test_a_room_has_few_files_and_a_file_few_lines():
    rooms = Counter(path.parent for path in MODULES if path.name != "__init__.py")
    assert {named(room): count for room, count in rooms.items() if count > MOST_FILES} == {}
    lengths = {named(path): len(path.read_text("utf-8").splitlines()) for path in MODULES}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


def test_a_function_can_be_read_at_once(functions):
    lengths = {place: node.end_lineno - node.lineno + 1 for place, node, _ in functions}
    assert {place: length for place, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_public_functions_say_what_they_take(functions):
    """`Args:` for two parameters or more; a class's are its attributes, which its own docstring tells."""
    silent = []
    for place, node, public in functions:
        given = node.args
        names = [one.arg for one in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
        names = [name for name in names if name not in ("self", "cls")]
        keras_names_them = place.rpartition(".")[2].startswith("on_")
        if public and not keras_names_them and len(names) >= 2 and "Args:" not in (ast.get_docstring(node) or ""):
            silent.append(place)
    assert silent == []


def test_every_module_says_what_it_is():
    missing = [named(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert missing == []


def test_rooms_import_downwards_only():
    lint = Path(sys.executable).with_name("lint-imports.exe" if os.name == "nt" else "lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wheel_has_every_room_its_templates_and_no_tests(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    beside = [name for names in project["tool"]["setuptools"]["data-files"].values() for name in names]
    for name in beside:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)
    for name in ("chestxray", "tests"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("chestxray-*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = {path.relative_to(source).as_posix() for path in (source / "chestxray").rglob("*") if path.is_file()}
    brought = {name.partition("/data/share/chestxray/")[2] for name in shipped - there}
    assert there <= shipped and brought == set(beside)
    assert {"chestxray/pipeline/commands/study.py", "chestxray/inference/templates/answer.html.j2"} <= shipped
    installed_alone(wheel, tmp_path)


def installed_alone(wheel: Path, folder: Path) -> None:
    """A wheel as `pip install --target` lays it out has its model; what needs the repository says where that is."""
    site = folder / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (data,) = site.glob("*.data/data")
    (data / "share").rename(site / "share")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import chestxray
from chestxray import __main__, config
from chestxray.images import input_check
from chestxray.inference import engines, interpretation, web
print(chestxray.__file__, engines.reference_model(), config.IS_CLONE, interpretation.of_reference().calibrated)
input_check.committed()
assert "Model card" in web.model_card()
sys.exit(__main__.main(["run"]))
"""
    command = [sys.executable, "-c", code, str(site)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.stdout.split()[2:] == ["False", "True"] and done.stdout.count(str(site)) == 2
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "git clone https://" in done.stderr

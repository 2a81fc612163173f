"""The house's rules: which rooms import which, how large they may be, what functions say, what a wheel has."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from chestxray.config import REPOSITORY

PACKAGE = REPOSITORY / "chestxray"
MODULES = sorted(PACKAGE.rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


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
    for name in ("chestxray", "tests"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("chestxray-*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = {path.relative_to(source).as_posix() for path in (source / "chestxray").rglob("*") if path.is_file()}
    assert shipped == there
    assert {"chestxray/pipeline/commands/user.py", "chestxray/inference/templates/answer.html.j2"} <= shipped

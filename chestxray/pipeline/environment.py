"""Environment: from a bare Python to one that can run the study: the repository's `.venv`, or a notebook's kernel.

It runs before anything is installed, so it imports the standard library only, and `packaging` where that is there. It
must not know what a command does: it makes the interpreter ready and starts the command in it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from chestxray.config import IS_CLONE, REPOSITORY, StudyError

PYTHONS = ((3, 11), (3, 13))
"""The oldest and the newest Python that every required package has wheels for."""

HOSTS_KEEP = ("tensorflow", "keras", "numpy")
"""Colab and Kaggle build these against their GPUs' drivers; another build would take the GPU away."""

_STAMP = ".chestxray.json"
"""File in the environment that tells whether it is complete, with which extras, for which requirements."""

_STARTED_AGAIN = "CHESTXRAY_STARTED_AGAIN"


OF_THE_CLONE = ("run", "restore", "pack", "unpack", "test", "maintain")
"""The commands that need the notebooks, tests or committed results, which an installed package lacks."""


def require_clone(command: str) -> None:
    """Refuse a command that needs the repository where only the package is installed.

    Raises:
        StudyError: it does; the message says where the repository is.
    """
    if not IS_CLONE and command in OF_THE_CLONE:
        address = next((line.partition(", ")[2] for line in _metadata("Project-URL")), "the repository")
        raise StudyError(
            f"{command}: works in the repository alone, and here the package is installed without it; "
            f"git clone {address} and run it there"
        )


def _metadata(field: str) -> list[str]:
    """What the installed package says of itself; nothing where it was copied."""
    try:
        return metadata.metadata("chestxray").get_all(field) or []
    except metadata.PackageNotFoundError:
        return []


def requirements(extras: Sequence[str] = ()) -> list[str]:
    """The lines of requirements.txt, and those of these extras of pyproject.toml; without a clone, the metadata's.

    Raises:
        StudyError: an extra is unknown.
    """
    if not IS_CLONE:
        lines = _metadata("Requires-Dist")
        wanted = [line for line in lines if any(f'extra == "{extra}"' in line for extra in extras)]
        return [line.partition(";")[0] for line in wanted] + [line for line in lines if "extra ==" not in line]
    import tomllib  # not in Python 3.10, for which `check_python` has its message

    lines = [line.split("#")[0].strip() for line in (REPOSITORY / "requirements.txt").read_text("utf-8").splitlines()]
    known = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for extra in extras:
        if extra not in known:
            raise StudyError(f"extra {extra!r} is unknown; there are: {', '.join(known)}")
        lines += known[extra]
    return [line for line in lines if line]


def satisfied(requirement: str) -> bool:
    """Whether what is installed here meets one requirement; never where `packaging` is missing, on a bare Python."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return False
    wanted = Requirement(requirement)
    if wanted.marker is not None and not wanted.marker.evaluate():
        return True
    if wanted.name == "jupyter":  # Colab has the parts that the study needs of this bundle, but not the bundle
        return all(map(_installed, ("ipykernel", "nbconvert")))
    version = _installed(wanted.name)
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def missing(extras: Sequence[str] = ()) -> list[str]:
    """The requirements, with those of the extras, that this interpreter doesn't meet."""
    return [line for line in requirements(extras) if not satisfied(line)]


def host() -> str:
    """`Colab` or `Kaggle` where this is one of their machines; else empty."""
    if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules:
        return "Colab"
    return "Kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else ""


def ensure(extras: Sequence[str], arguments: Sequence[str]) -> None:
    """Return if this interpreter can run the study; else make the repository's `.venv` and start again in it.

    Starting again replaces this process, so the call does not return then.

    Args:
        extras: extras of pyproject.toml needed besides requirements.txt.
        arguments: of `python -m chestxray`, for the new start.

    Raises:
        StudyError: the environment can't be made; the message says what to do.
    """
    if sys.version_info[:2] < PYTHONS[0]:
        check_python()
    again = os.environ.pop(_STARTED_AGAIN, None)
    lacking = [line for line in missing(extras) if _name(line) not in _kept()]
    if not lacking:
        return
    if host():
        command = " ".join(["python -m chestxray colab", *extras])
        raise StudyError(f"not installed on {host()}: {', '.join(lacking)}; run `{command}` first")
    if not IS_CLONE:
        raise StudyError(f"not installed: {', '.join(lacking)}; run pip install {' '.join(map(repr, lacking))}")
    environment = REPOSITORY / ".venv"
    if again:
        raise StudyError(f"{environment} still lacks {', '.join(lacking)}: remove that folder and run it again")
    stamp, python = _read_stamp(environment), environment_python(environment)
    complete = bool(stamp.get("complete")) and stamp["digest"] == _digest() and set(extras) <= set(stamp["extras"])
    inside = Path(sys.prefix).resolve() == environment.resolve()
    # Inside it, something is missing whatever the stamp says: a package was removed by hand.
    if inside or not complete or not python.exists():
        set_up(environment, extras, rebuild=not inside)
    _start_again(python, arguments)


def environment_python(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def set_up(environment: Path, extras: Sequence[str], rebuild: bool = True) -> None:
    """Make, complete or repair a virtual environment with what uv.lock pins; a stamp in it tells that it is complete.

    Args:
        environment: its folder.
        extras: extras of pyproject.toml to install besides requirements.txt.
        rebuild: whether what an interrupted set-up left may be thrown away.

    Raises:
        StudyError: Python is too old or too new, has no ensurepip, or the installation failed.
    """
    import venv

    started = time.monotonic()
    check_python()
    stamp = _read_stamp(environment)
    extras = sorted({*stamp.get("extras", []), *extras})
    _say(f"Setting up {environment.name} for the study, once: 2.6 GB on disk. Interrupted? Run it again.")
    try:
        new = rebuild and not _usable(environment, stamp)
        if new:
            if environment.exists():
                shutil.rmtree(environment)
            environment.mkdir()
        _write_stamp(environment, extras, complete=False)  # first of all, so that a broken one is known as ours
        if new:
            venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt").create(environment)
    except (OSError, subprocess.CalledProcessError) as error:
        raise StudyError(f"{environment}: {error}; free disk space or rights are missing, then run it again") from error
    _say(f"Installing {len(requirements(extras))} packages and what they need …")
    python = environment_python(environment)
    if not _install_locked(python, environment, extras):
        _say("uv could not do it; installing with pip, newest allowed versions instead of the locked ones.")
        _install_with_pip(python, extras)
    _write_stamp(environment, extras, complete=True)
    _say(f"Environment ready after {time.monotonic() - started:.0f} s.")


def check_python(version: Sequence[int] = sys.version_info) -> None:
    """Raise if the environment can't be made with this Python.

    Raises:
        StudyError: the version is outside `PYTHONS`, or ensurepip is missing.
    """
    _check_version(version, "start it with one of these, for example python{newest} -m chestxray run")
    try:
        import ensurepip  # noqa: F401
    except ImportError as error:
        raise StudyError(
            f"{sys.executable} has no ensurepip, so no environment can be made: install it "
            f"(Debian, Ubuntu: apt install python{version[0]}.{version[1]}-venv) and run it again"
        ) from error


def prepare_kernel(extras: Sequence[str] = ()) -> None:
    """Make this interpreter ready for a notebook, and print in one line where it runs and what was installed.

    Raises:
        StudyError: Python is too old or too new, or the installation failed.
    """
    _check_version(sys.version_info, "choose a kernel with one of these")
    installed = install_here(extras)
    here = Path.cwd().resolve()
    fetched = "the repository fetched beside the notebook" if REPOSITORY.parent == here else "the repository"
    done = f"{len(installed)} packages installed" if installed else "nothing to install"
    versions = f"Python {platform.python_version()}, TensorFlow {_installed('tensorflow')}, Keras {_installed('keras')}"
    print(f"Set up: {fetched}{f' on {host()}' if host() else ''}; {done}; {versions}.")


def install_here(extras: Sequence[str] = ()) -> list[str]:
    """Install what this interpreter lacks; what it has in a fitting version stays as it is.

    Returns:
        The names of the packages installed.

    Raises:
        StudyError: an extra is unknown, or the installation failed.
    """
    wanted = {_name(line): line for line in missing(extras)}
    for name in sorted(wanted.keys() & _kept()):
        _say(f"{host()} has {name} {_installed(name)}, the study was made for {wanted.pop(name)}: trying it as it is.")
    if not wanted:
        return []
    _say(f"Installing {', '.join(wanted)} …")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins(extras)) + "\n", "utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--constraint", str(constraints), *wanted.values()]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        reason = next((line for line in lines if line.lower().startswith("error")), lines[-1])
        raise StudyError(
            f"{sys.executable}: pip could not install the {len(wanted)} packages ({reason}); check the network and run "
            "it again, or run `python3 -m chestxray run --only 1` in the repository once and choose its .venv as kernel"
        )
    importlib.invalidate_caches()
    return list(wanted)


def pins(extras: Sequence[str] = ()) -> list[str]:
    """What an installation must leave as it is, as `name==version`, for a constraints file of pip.

    It is what the study needs and has here in a fitting version; on Colab and Kaggle also what they build themselves.
    Other packages are free: to hold all of them would leave nothing that fits.
    """
    names = {_name(line) for line in requirements(extras) if satisfied(line)} | _kept()
    return sorted(f"{name}=={version}" for name in names if (version := _installed(name)))


def _usable(environment: Path, stamp: dict) -> bool:
    """Whether there is an environment to build on: one that was completed once, or one that the user made.

    Raises:
        StudyError: the user's own has another Python, or no pip.
    """
    if not environment.exists() or stamp.get("complete") is False:
        return False
    works = _works(environment_python(environment))
    if not works and not stamp:
        raise StudyError(
            f"{environment} is no environment that the study can use: remove it, or rename it, and run it again"
        )
    return works


def _install_locked(python: Path, environment: Path, extras: Sequence[str]) -> bool:
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv>=0.9,<1"]
    sync = [python, "-m", "uv", "sync", "--frozen", "--inexact", "--python", python, "--project", REPOSITORY]
    sync += [f"--extra={extra}" for extra in extras]
    if not sys.stderr.isatty():
        sync.append("--quiet")  # without a terminal it shows no progress, only a list of all packages
    # uv must keep to this environment and to this Python, whatever the user's shell has activated.
    variables = {**os.environ, "UV_PROJECT_ENVIRONMENT": str(environment), "UV_PYTHON_DOWNLOADS": "never"}
    variables.pop("VIRTUAL_ENV", None)
    return all(subprocess.run(command, env=variables, check=False).returncode == 0 for command in (pip, sync))


def _install_with_pip(python: Path, extras: Sequence[str]) -> None:
    target = f"{REPOSITORY}[{','.join(extras)}]" if extras else str(REPOSITORY)
    if subprocess.run([python, "-m", "pip", "install", "--editable", target], check=False).returncode:
        raise StudyError(
            "the packages could not be installed (pip's message is above): check the network, run it again"
        )


def _start_again(python: Path, arguments: Sequence[str]) -> None:
    command = [str(python), "-m", "chestxray", *arguments]
    # The package is found where it is now, whatever folder the command was given in.
    search = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": search, _STARTED_AGAIN: "1"}
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":
        sys.exit(subprocess.run(command, env=variables, check=False).returncode)
    os.execve(python, command, variables)


def _digest() -> str:
    content = b"".join((REPOSITORY / name).read_bytes() for name in ("requirements.txt", "pyproject.toml", "uv.lock"))
    return hashlib.sha256(content).hexdigest()


def _read_stamp(environment: Path) -> dict:
    try:
        return json.loads((environment / _STAMP).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _write_stamp(environment: Path, extras: Sequence[str], complete: bool) -> None:
    beside = environment / f"{_STAMP}.tmp-{os.getpid()}"
    beside.write_text(json.dumps({"complete": complete, "digest": _digest(), "extras": list(extras)}), "utf-8")
    beside.replace(environment / _STAMP)


def _works(python: Path) -> bool:
    """Whether an interpreter runs, is neither too old nor too new, and has pip."""
    if not python.exists():
        return False
    probe = f"import sys, pip; sys.exit(not {PYTHONS[0]} <= sys.version_info[:2] <= {PYTHONS[1]})"
    return subprocess.run([python, "-c", probe], check=False, capture_output=True).returncode == 0


def _kept() -> set[str]:
    """What a host has built itself."""
    return {name for name in HOSTS_KEEP if host() and _installed(name)}


def _check_version(version: Sequence[int], remedy: str) -> None:
    oldest, newest = (".".join(map(str, pair)) for pair in PYTHONS)
    if not PYTHONS[0] <= tuple(version[:2]) <= PYTHONS[1]:
        remedy = remedy.format(newest=newest)
        raise StudyError(
            f"Python {version[0]}.{version[1]} ({sys.executable}): the study needs {oldest} to {newest}; {remedy}"
        )


def _name(requirement: str) -> str:
    """The package that a requirement names; `packaging` may still be missing."""
    return re.match(r"[\w.-]+", requirement)[0]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

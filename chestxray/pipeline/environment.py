"""Environment: from a bare Python to one that can run the study: the repository's `.venv`, or a notebook's kernel.

It runs before anything is installed, so it imports the standard library only, and `packaging` where that is there. It
must not know what a command does: it makes the interpreter ready and starts the command in it.
"""

from __future__ import annotations

import importlib
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

OF_THE_CLONE = ("run", "restore", "pack", "unpack", "test", "maintain")
"""The commands that need the notebooks, tests or committed results, which an installed package lacks."""

_UNFINISHED = ".chestxray-unfinished"
"""File in an environment that is being made or completed."""

_STARTED_AGAIN = "CHESTXRAY_STARTED_AGAIN"
"""Environment variable of a new start: `at once`, or `after set-up`."""


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
    import tomllib  # not in Python 3.10, which is refused in one line

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
    """Return if this interpreter can run the study; else start again in the repository's `.venv`, made where missing.

    In there, what is still missing is installed, as after a change of the requirements. Starting again replaces this
    process, so the call does not return then.

    Args:
        extras: extras of pyproject.toml needed besides requirements.txt.
        arguments: of `python -m chestxray`, for the new start.

    Raises:
        StudyError: the environment can't be made; the message says what to do.
    """
    if sys.version_info[:2] < PYTHONS[0]:
        check_version()
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
    inside = Path(sys.prefix).resolve() == environment.resolve()
    if again == "after set-up" or (again and not inside):
        raise StudyError(f"{environment} still lacks {', '.join(lacking)}: remove that folder and run it again")
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    unready = inside or not python.exists() or (environment / _UNFINISHED).exists()
    if unready:
        _set_up(environment, python, extras, new=not inside)
    _start_again(python, arguments, "after set-up" if unready else "at once")


def _set_up(environment: Path, python: Path, extras: Sequence[str], new: bool) -> None:
    """Make or complete a virtual environment; what an interrupted set-up left there is thrown away, nothing else."""
    import venv

    started = time.monotonic()
    check_version()
    unfinished = environment / _UNFINISHED
    if new and environment.exists() and not unfinished.exists():
        raise StudyError(f"{environment} is no environment with a Python: remove it, or rename it, and run it again")
    _say(f"Setting up {environment.name} for the study, once: 2.6 GB on disk. Interrupted? Run it again.")
    try:
        if new:
            import ensurepip  # noqa: F401

            shutil.rmtree(environment, ignore_errors=True)
            environment.mkdir()
        unfinished.touch()  # first of all, so that a broken one is known as ours
        if new:
            venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt").create(environment)
    except ImportError as error:
        raise StudyError(
            f"{sys.executable} has no ensurepip, so no environment can be made: install it (Debian, Ubuntu: "
            f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv) and run it again"
        ) from error
    except (OSError, subprocess.CalledProcessError) as error:
        raise StudyError(f"{environment}: {error}; free disk space or rights are missing, then run it again") from error
    _say(f"Installing {len(requirements(extras))} packages and what they need …")
    _install(python, environment, extras)
    unfinished.unlink()
    _say(f"Environment ready after {time.monotonic() - started:.0f} s.")


def check_version(
    remedy: str = "start it with one of these, for example python{newest} -m chestxray run, and no .venv of another",
) -> None:
    """Raise if the study can't run with this Python.

    Raises:
        StudyError: the version is outside `PYTHONS`.
    """
    version = sys.version_info[:2]
    oldest, newest = (".".join(map(str, pair)) for pair in PYTHONS)
    if not PYTHONS[0] <= version <= PYTHONS[1]:
        raise StudyError(
            f"Python {version[0]}.{version[1]} ({sys.executable}): the study needs {oldest} to {newest}; "
            + remedy.format(newest=newest)
        )


def prepare_kernel(extras: Sequence[str] = ()) -> None:
    """Make this interpreter ready for a notebook, and print in one line where it runs and what was installed.

    Raises:
        StudyError: Python is too old or too new, or the installation failed.
    """
    check_version("choose a kernel with one of these")
    installed = install_here(extras)
    fetched = "the repository fetched beside the notebook" if REPOSITORY.parent == Path.cwd() else "the repository"
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
    # Other packages than these are free: to hold all of them would leave nothing that fits.
    stays = {_name(line) for line in requirements(extras) if satisfied(line)} | _kept()
    pins = sorted(f"{name}=={version}" for name in stays if (version := _installed(name)))
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins) + "\n", "utf-8")
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


def _install(python: Path, environment: Path, extras: Sequence[str]) -> None:
    """Install by uv, which pip brings, what uv.lock pins; by pip alone where uv can't."""
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    sync = [python, "-m", "uv", "sync", "--frozen", "--inexact", "--python", python, "--project", REPOSITORY]
    sync += [f"--extra={extra}" for extra in extras]
    if not sys.stderr.isatty():
        sync.append("--quiet")  # without a terminal it shows no progress, only a list of all packages
    # uv must keep to this environment and to this Python, whatever the user's shell has activated.
    variables = {**os.environ, "UV_PROJECT_ENVIRONMENT": str(environment), "UV_PYTHON_DOWNLOADS": "never"}
    variables.pop("VIRTUAL_ENV", None)

    def works(command: Sequence[str | Path]) -> bool:
        return subprocess.run(command, env=variables, check=False).returncode == 0

    if works([*pip, "uv>=0.9,<1"]) and works(sync):
        return
    _say("uv could not do it; installing with pip, newest allowed versions instead of the locked ones.")
    if not works([*pip, "--editable", f"{REPOSITORY}[{','.join(extras)}]" if extras else REPOSITORY]):
        raise StudyError(
            "the packages could not be installed (pip's message is above): check the network, run it again; "
            f"if that doesn't help, remove {environment} first"
        )


def _start_again(python: Path, arguments: Sequence[str], when: str) -> None:
    command = [str(python), "-m", "chestxray", *arguments]
    # The package is found where it is now, whatever folder the command was given in.
    search = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": search, _STARTED_AGAIN: when}
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":
        sys.exit(subprocess.run(command, env=variables, check=False).returncode)
    os.execve(python, command, variables)


def _kept() -> set[str]:
    """What a host has built itself."""
    return {name for name in HOSTS_KEEP if host() and _installed(name)}


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

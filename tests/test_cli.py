"""The command line: what it understands, what it prints, which exit code it ends with."""

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from chestxray import __main__, cli, pipeline
from chestxray.config import CLASSES, REPOSITORY, StudyError


@pytest.fixture
def predictor(monkeypatch):
    """A stand-in for the module that predicts: answers all files but those named bad, and notes how it was called."""
    module = types.ModuleType("chestxray.prediction")

    def predict_files(paths, model_path, batch_size, report):
        module.called = (paths, model_path, batch_size)
        for path in paths:
            if "bad" in path.name:
                report(StudyError(f"{path}: no image; give another"))
        good = [path.name for path in paths if "bad" not in path.name]
        return pd.DataFrame(np.full((len(good), 7), 1 / 7), columns=list(CLASSES)).assign(image=good)

    module.predict_files = predict_files
    monkeypatch.setitem(sys.modules, "chestxray.prediction", module)
    return module


def test_predict_writes_the_table(predictor, tmp_path, capsys):
    out = tmp_path / "new" / "predictions.csv"
    assert cli.main(["predict", "folder", "one.png", "--out", str(out), "--batch-size", "3", "--model", "m.keras"]) == 0
    table = pd.read_csv(out)
    assert list(table.columns) == ["image", *CLASSES]
    assert list(table["image"]) == ["folder", "one.png"]
    assert predictor.called == ([Path("folder"), Path("one.png")], Path("m.keras"), 3)
    assert capsys.readouterr().out == f"{out}: 2 images answered, 0 files or folders not usable\n"


def test_predict_tells_by_its_exit_code_what_failed(predictor, tmp_path, capsys):
    out = tmp_path / "p.csv"
    assert cli.main(["predict", "good.png", "bad.png", "--out", str(out)]) == 1
    assert len(pd.read_csv(out)) == 1
    assert capsys.readouterr().err == "bad.png: no image; give another\n"
    out.unlink()
    assert cli.main(["predict", "bad.png", "--out", str(out)]) == 2
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["predict", "a.png", "--out", "EMPTY"], "is a folder"),
        (["run", "--dataset", "nowhere/at/all"], "'nowhere/at/all': no such folder"),
        (["run", "--only", "9"], "stage '9' is unknown"),
        (["run", "--jobs", "0"], "--jobs 0: give 1 or more"),
        (["run", "--seed", "-1"], "--seed -1"),
        (["run", "--set", "cnn_epochs"], "NAME=VALUE"),
        (["run", "--set", "epochs=3"], "no parameter 'epochs'; there are: "),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(predictor, tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path / "root"))
    arguments = [str(tmp_path) if argument == "EMPTY" else argument for argument in arguments]
    assert __main__.main(arguments) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert not (tmp_path / "root").exists()


def test_usage_errors_of_the_parser_have_exit_code_2(capsys):
    for arguments in (["run", "--profile", "huge"], ["nothing"], ["predict", "a.png"]):
        with pytest.raises(SystemExit) as ended:
            __main__.main(arguments)
        assert ended.value.code == 2
    assert __main__.main([]) == 2
    assert "commands" in capsys.readouterr().out


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The pipeline replaced by a note of how it was called."""
    notes = []
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path))

    def run(self, chosen, force=False):
        notes.append((self, [stage.number for stage in chosen], force))
        return "fail" not in self.overrides

    monkeypatch.setattr(pipeline.Pipeline, "run", run)
    return notes


def test_run_passes_on_what_was_asked(runs, tmp_path, capsys):
    data = tmp_path / "some data"
    data.mkdir()
    arguments = ["run", "--dataset", str(data), "--profile", "cpu", "--seed", "5", "--jobs", "3", "--force"]
    arguments += ["--only", "5", "cnn", "--set", "cnn_epochs=3", "--root", str(tmp_path / "root")]
    assert cli.main(arguments) == 0
    line, chosen, force = runs[0]
    assert (line.study.paths.dataset, line.study.profile.name, line.study.profile.cnn_epochs) == ("some_data", "cpu", 3)
    assert (line.study.seed, line.jobs, line.overrides) == (5, 3, {"cnn_epochs": 3})
    assert (chosen, force) == (["4.1", "5"], True)
    assert line.study.paths.root == tmp_path / "root"


def test_run_ends_with_the_table_and_the_pages(runs, tmp_path, capsys):
    results = tmp_path / "5_results" / "phantom"
    results.mkdir(parents=True)
    rows = [f"{model},{metric},0.5,0.4,0.6" for model in ("cnn", "ensemble") for metric in ("macro_auroc", "macro_f1")]
    (results / "metrics.csv").write_text("\n".join(["model,metric,estimate,low,high", *rows]))
    assert cli.main(["run"]) == 0
    said = capsys.readouterr().out
    assert "phantom images" in said
    assert "1 CNN" in said and "0.500 (0.400–0.600)" in said
    assert said.count(".html") == 12
    assert "5_results/phantom/notebooks/4_models/1_CNN_model.html" in said


def test_failed_run_has_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path))
    monkeypatch.setattr(pipeline.Pipeline, "run", lambda self, chosen, force: False)
    assert cli.main(["run"]) == 1
    assert "run the same command again" in capsys.readouterr().err


def test_test_hands_its_arguments_to_pytest(monkeypatch):
    called = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: called.append(command) or types.SimpleNamespace(returncode=5)
    )
    assert cli.main(["test", "--", "-k", "cli"]) == 5
    assert called[0][1:] == ["-m", "pytest", "-k", "cli"]


def test_nothing_to_do_needs_no_tensorflow():
    code = "import sys, chestxray.cli, chestxray.pipeline, chestxray.notebooks; print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr

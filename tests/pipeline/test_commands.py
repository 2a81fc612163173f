"""The command line: what it understands, what it prints, which exit code it ends with."""

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pandas as pd
import pytest
from conftest import tiny_rows, write_table

from chestxray import __main__, config
from chestxray.config import CLASSES, REPOSITORY, StudyError
from chestxray.data import preparation
from chestxray.pipeline import commands, runner


@pytest.fixture
def predictor(monkeypatch):
    """Stand-ins for the model and for what asks it: all files are answered but those named bad; notes the calls."""
    from chestxray.inference import batch, reader

    called = types.SimpleNamespace()

    read = types.SimpleNamespace(prevalence="nih (…)")

    def load(model, engine, prevalence):
        called.load = (model, engine, prevalence)
        return read

    def predict_files(paths, out, asked, batch_size, report, heat_maps, finding, others):
        assert asked is read
        called.predict = (paths, batch_size, heat_maps, finding)
        for path in paths:
            if not path.suffix:
                others += [path / "note.txt", path / "b.bmp"]
            if "bad" in path.name:
                report(StudyError(f"{path}: no image; give another"))
        good = [path.name for path in paths if "bad" not in path.name]
        if good:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("\n".join(["image", *good]))
        return len(good)

    monkeypatch.setattr(reader, "load", load)
    monkeypatch.setattr(batch, "predict_files", predict_files)
    return called


def test_predict_hands_on_what_was_asked(predictor, tmp_path, capsys):
    out = tmp_path / "new" / "predictions.csv"
    options = [
        "--batch-size",
        "3",
        "--model",
        "m.keras",
        "--heat-maps",
        "maps",
        "--finding",
        "Mass",
        "--engine",
        "onnx",
        "--prevalence",
        "nih",
    ]
    assert commands.main(["predict", "folder", "one.png", "--out", str(out), *options]) == 0
    assert predictor.load == (Path("m.keras"), "onnx", "nih")
    assert predictor.predict == ([Path("folder"), Path("one.png")], 3, Path("maps"), "Mass")
    others = "2 other files not looked at, such as note.txt, b.bmp"
    shares = "class and its probabilities: at class shares nih (…)"
    assert capsys.readouterr().out == f"{out}: 2 images answered, 0 files or folders not usable, {others}\n{shares}\n"

    assert commands.main(["predict", "one.png", "--out", str(out.with_name("other.csv"))]) == 0
    assert predictor.load == (None, None, "equal")
    assert predictor.predict == ([Path("one.png")], 8, None, None)


def test_export_hands_on_what_was_asked(monkeypatch, tmp_path, capsys):
    from chestxray.inference import engines

    called = []
    monkeypatch.setattr(engines, "export", lambda *given: called.append(given) or 12_345_678)
    out = tmp_path / "m.onnx"
    assert commands.main(["export", str(out), "--model", "m.keras", "--prevalence", "sample"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 12.3 MB\nclasses: at class shares sample (Atelectasis 0.072,")
    assert commands.main(["export", str(out)]) == 0
    assert [(*given[:2], given[2].name) for given in called] == [(out, Path("m.keras"), "sample"), (out, None, "equal")]
    with pytest.raises(StudyError, match="is a folder"):
        commands.main(["export", str(tmp_path)])


def test_predict_tells_by_its_exit_code_what_failed(predictor, tmp_path, capsys):
    out = tmp_path / "p.csv"
    assert commands.main(["predict", "good.png", "bad.png", "--out", str(out)]) == 1
    assert out.read_text() == "image\ngood.png"
    assert capsys.readouterr().err == "bad.png: no image; give another\n"
    out.unlink()
    assert commands.main(["predict", "bad.png", "--out", str(out)]) == 2
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


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("plan --metadata F/T.csv --out F/T.csv", "F/T.csv: is only read here; give --out another name"),
        ("plan --metadata F/T.csv --out link.csv", "link.csv: is only read here; give --out another name"),
        ("plan --metadata F/T.csv --out F/test_list.txt", "F/test_list.txt: is only read here"),
        ("plan --metadata F/T.csv --labels map.csv --out map.csv", "map.csv: is only read here"),
        ("verify F --report F/T.csv", "F/T.csv: lies in F, which is only read; give --report another place"),
        ("verify F --labels map.csv --report map.csv", "map.csv: is only read here; give --report another name"),
        ("run --dataset F --root F", "F: lies in F, which is only read; give --root another place"),
        ("run --dataset F --root F/deep/root", "root: lies in F, which is only read; give --root another place"),
        ("evaluate --dataset F --labels map.csv --out map.csv", "map.csv: is only read here; give --out"),
        ("export m.keras --model m.keras", "m.keras: is only read here; give OUT another name"),
        ("pack D --out 1_Datasets/D/raw/D.tar", "D.tar: lies in 1_Datasets/D, which is only read; give --out"),
    ],
)
def test_nothing_that_is_read_is_written_over(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHESTXRAY_ROOT", "")
    monkeypatch.setattr(config, "IS_CLONE", False)
    names = ("F/T.csv", "F/test_list.txt", "F/images/a.png", "map.csv", "m.keras", "1_Datasets/D/raw/T.csv")
    for path in map(Path, names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("data")
    Path("link.csv").symlink_to("F/T.csv")
    assert __main__.main(arguments.split()) == 2
    said = capsys.readouterr().err.replace(f"{tmp_path}/", "")
    assert line in said and said.count("\n") == 1
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {*names, "link.csv"}
    assert {path.read_text() for path in map(Path, names)} == {"data"}


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

    monkeypatch.setattr(runner.Pipeline, "run", run)
    return notes


def test_run_passes_on_what_was_asked(runs, make_raw, tmp_path, capsys):
    data = make_raw("some data")
    arguments = ["run", "--dataset", str(data), "--profile", "cpu", "--seed", "5", "--jobs", "3", "--force"]
    arguments += ["--only", "5", "cnn", "--set", "cnn_epochs=3", "--root", str(tmp_path / "root")]
    arguments += ["--set", "dense_epochs=2", "--only", "dense"]  # what is given again is added
    assert commands.main(arguments) == 0
    line, chosen, force = runs[0]
    assert (line.study.paths.dataset, line.study.profile.name, line.study.profile.cnn_epochs) == ("some_data", "cpu", 3)
    assert (line.study.seed, line.jobs, line.overrides) == (5, 3, {"cnn_epochs": 3, "dense_epochs": 2})
    assert (chosen, force) == (["4.0", "4.1", "5"], True)
    assert line.study.paths.root == tmp_path / "root"


def test_run_says_what_training_lacks_before_any_work(runs, make_raw, tmp_path, capsys):
    data, root = make_raw("data"), tmp_path / "root"
    write_table(data, [row for row in tiny_rows() if row[1] != "Mass"])
    command = ["run", "--dataset", str(data), "--root", str(root), "--only", "1", "2.1", "3"]
    for stage in ("2.2", "4.1"):
        assert __main__.main([*command, stage]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "training needs all seven classes" in line and "lacks Mass (0 patients); add images, or" in line
    assert not root.exists() and not runs
    assert __main__.main(command) == 0
    said = capsys.readouterr().err
    assert "No model: training needs" in said and "6 rows, values or images cannot be used, the first three:" in said
    assert __main__.main(["verify", str(data)]) == 0
    assert "No model: training needs" in capsys.readouterr().out
    plan = ["plan", "--metadata", str(data / "Data_Entry_2017_v2020.csv"), "--out", str(tmp_path / "p.csv")]
    assert __main__.main(plan) == 0 and (tmp_path / "p.csv").exists()
    assert "No model: training needs" in capsys.readouterr().out


def test_run_ends_with_the_table_and_the_pages(runs, tmp_path, capsys):
    results = tmp_path / "5_results" / "phantom"
    results.mkdir(parents=True)
    rows = [f"{model},{metric},0.5,0.4,0.6" for model in ("cnn", "ensemble") for metric in ("macro_auroc", "macro_f1")]
    (results / "metrics.csv").write_text("\n".join(["model,metric,estimate,low,high", *rows]))
    assert commands.main(["run"]) == 0
    said = capsys.readouterr().out
    assert "phantom images" in said
    assert "1 CNN" in said and "0.500 (0.400–0.600)" in said
    assert said.count(".html") == 12
    assert "5_results/phantom/notebooks/4_models/1_CNN_model.html" in said


def test_failed_run_has_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path))
    monkeypatch.setattr(runner.Pipeline, "run", lambda self, chosen, force: False)
    assert commands.main(["run"]) == 1
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "environment", "given"),
    [
        ([], {}, ["-n", "2", "--dist", "loadfile"]),
        (["--", "-k", "dicom"], {}, ["-n", "2", "--dist", "loadfile", "-k", "dicom"]),
        (["--", "-n0", "tests/test_files.py"], {}, ["-n0", "tests/test_files.py"]),
        (["--", "tests/test_files.py"], {"CHESTXRAY_FAULTS": "faults.md"}, ["tests/test_files.py"]),
    ],
)
def test_test_hands_its_arguments_to_pytest_in_two_processes_unless_told_otherwise(
    monkeypatch, arguments, environment, given
):
    monkeypatch.delenv("CHESTXRAY_FAULTS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: started.append(command) or types.SimpleNamespace(returncode=5)
    )
    assert commands.main(["test", *arguments]) == 5
    assert started == [[sys.executable, "-m", "pytest", *given]]


def test_nothing_to_do_needs_neither_tensorflow_nor_scikit_learn():
    code = "import sys, chestxray.pipeline.commands, chestxray.pipeline.runner, chestxray.pipeline.notebooks; "
    code += "print(bool({'tensorflow', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_what_tensorflow_says_of_missing_gpus_is_not_shown(monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    with pytest.raises(StudyError, match="nowhere"):
        commands.main(["verify", "nowhere"])
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"


@pytest.fixture
def plan_of(tiny_raw, tmp_path):
    """A function that runs `chestxray plan` on a tiny table: `plan_of(*more, lists=True)` gives the exit code."""

    def of(*more, lists=True):
        arguments = [
            "plan",
            "--metadata",
            str(tiny_raw / "Data_Entry_2017_v2020.csv"),
            "--out",
            str(tmp_path / "p.csv"),
        ]
        if lists:
            arguments += [
                "--train-val",
                str(tiny_raw / "train_val_list.txt"),
                "--test",
                str(tiny_raw / "test_list.txt"),
            ]
        else:
            for name in ("train_val_list.txt", "test_list.txt"):
                (tiny_raw / name).unlink(missing_ok=True)
        return __main__.main([*arguments, *more])

    return of


def printed_table(said: str, title: str) -> pd.DataFrame:
    """A table that was printed under a title, as numbers where they are numbers."""
    lines = said[said.index(title) :].split("\n\n")[0].splitlines()[1:]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    return pd.DataFrame(rows[1:], columns=rows[0]).map(lambda cell: int(cell) if cell.isdecimal() else cell)


def test_plan_gives_the_manifest_of_stage_2_1_without_images(plan_of, tiny_study, tmp_path, capsys):
    manifest = preparation.prepare(tiny_study, workers=1).manifest
    raw, out = tiny_study.paths.raw.resolve(), tmp_path / "beside.csv"
    shutil.rmtree(raw / "images")
    share = str(tiny_study.profile.valid_share)
    options = ["--no-finding", "8", "--valid-share", share, "--seed", str(tiny_study.seed), "--out", str(out)]
    assert __main__.main(["plan", "--metadata", str(raw / "Data_Entry_2017_v2020.csv"), *options]) == 0
    assert "Taken from beside the table: train_val_list.txt, test_list.txt\n" in capsys.readouterr().out
    assert plan_of("--no-finding", "8", "--valid-share", share, "--seed", str(tiny_study.seed)) == 0
    assert (tmp_path / "p.csv").read_text() == manifest.drop(columns="sha256").to_csv(index=False, lineterminator="\n")
    said = capsys.readouterr().out
    assert "Taken" not in said and out.read_bytes() == (tmp_path / "p.csv").read_bytes()
    (raw / "test_list.txt").unlink()
    assert __main__.main(["plan", "--metadata", str(raw / "Data_Entry_2017_v2020.csv"), *options]) == 2
    assert "test_list.txt: missing, though train_val_list.txt is there" in capsys.readouterr().err
    (raw / "test_list.txt").symlink_to("nothing")
    assert __main__.main(["plan", "--metadata", str(raw / "Data_Entry_2017_v2020.csv"), *options]) == 2
    assert "test_list.txt: is a link to nothing" in capsys.readouterr().err
    assert "60 rows, 60 images of 20 patients, 0 things left out" in said
    assert "Official lists: 45 and 15 images" in said
    assert f"{manifest['selected'].sum()} images selected; 0 patients in two splits" in said
    chosen = manifest[manifest["selected"]]
    selected = printed_table(said, "Selected images").set_index(["split", "class"])
    for split, part in chosen.groupby("split"):
        total = [len(part), part["patient"].nunique()]
        total += [part["view"].eq(view).sum() for view in ("PA", "AP")] + [part["sex"].eq(sex).sum() for sex in "FM"]
        assert selected.loc[(split, "Total")].tolist() == total
        mass = part[part["label"].eq("Mass")]
        assert selected.loc[(split, "Mass"), "images"] == len(mass)
        assert selected.loc[(split, "Mass"), "F"] == mass["sex"].eq("F").sum()
    single = printed_table(said, "Images with one of the seven labels").set_index("class")
    everyone = manifest[manifest["label"].ne("")]
    assert single.loc["Total", "test images"] == everyone["split"].eq("test").sum()
    assert (
        single.loc["No_finding", "train_val images"]
        == (everyone["label"].eq("No_finding") & everyone["split"].ne("test")).sum()
    )
    tests = printed_table(said, "All test images, each counted").set_index("class")
    assert tests.loc["Total", "all images"] == 15
    assert tests.loc["Total", "balanced images"] == manifest["balanced_test"].sum()


def test_plan_without_lists_splits_by_patient(plan_of, tmp_path, capsys):
    assert plan_of(lists=False) == 0
    assert "No lists given or beside the table: test is held out here, by patient" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "p.csv")
    assert set(table["split"]) == {"train", "valid", "test"}
    assert table.groupby("patient")["split"].nunique().max() == 1


def test_plan_repeats_itself_and_obeys_its_seed(plan_of, tmp_path, capsys):
    written = []
    for seed in ("1", "1", "2"):
        assert plan_of("--seed", seed, lists=False) == 0
        written.append((tmp_path / "p.csv").read_bytes())
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize(
    ("arguments", "lists", "line"),
    [
        (["--metadata", "absent.csv"], True, "absent.csv: no such file"),
        (
            ["--metadata", "LISTS/test_list.txt"],
            True,
            "columns 'Image Index', 'Finding Labels', 'Patient ID' are missing",
        ),
        (["--train-val", "LISTS/train_val_list.txt"], False, "only one of them is given; give both"),
        (["--test", "LISTS/test_list.txt"], False, "only one of them is given; give both"),
        (["--test", "absent.txt"], True, "absent.txt: cannot be read (No such file or directory)"),
        (["--test", "LISTS/train_val_list.txt"], True, "stand in train_val_list.txt too"),
        (["--test", "LISTS/empty.txt"], True, "empty.txt: names no image"),
        (["--test", "LISTS/strange.txt"], True, "lacks 2 of its 3 images, such as 9_0.png"),
        (["--test", "LISTS/binary.txt"], True, "no text in UTF-8"),
        (["--test", "LISTS/half.txt", "--train-val", "LISTS/other.txt"], True, "1 and 0 more have images in"),
        (["--valid-share", "1"], True, "--valid-share 1.0: give"),
        (["--no-finding", "-1"], True, "--no-finding -1: give 0 or more"),
        (["--seed", "-1"], True, "--seed -1: give"),
        (["--out", "LISTS"], True, "is a folder"),
    ],
)
def test_plan_tells_bad_input_in_one_line(plan_of, tiny_raw, tmp_path, capsys, arguments, lists, line):
    (tiny_raw / "empty.txt").write_text("\n")
    (tiny_raw / "strange.txt").write_text("00000004_000.png\n9_0.png\n9_1.png\n")
    (tiny_raw / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tiny_raw / "half.txt").write_text("00000001_000.png\n")
    everyone = [path.name for path in sorted((tiny_raw / "images").iterdir())]
    (tiny_raw / "other.txt").write_text("\n".join(everyone[1:]))
    assert plan_of(*(word.replace("LISTS", str(tiny_raw)) for word in arguments), lists=lists) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert not (tmp_path / "p.csv").exists()


def test_plan_on_the_whole_table(nih, tmp_path, capsys):
    """Counts of single-label images per official list, as the NIH's lists have them; the study's 28,000 and more."""
    lists = ["--train-val", str(nih / "train_val_list.txt"), "--test", str(nih / "test_list.txt")]
    out = tmp_path / "manifest.csv"
    assert commands.main(["plan", "--metadata", str(nih / "Data_Entry_2017_v2020.csv"), *lists, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    single = printed_table(said.replace(",", ""), "Images with one of the seven labels").set_index("class")
    assert single["train_val images"].tolist()[:-1] == [3414, 2788, 7327, 1696, 50500, 2248, 1241]
    assert single["test images"].tolist()[:-1] == [801, 1167, 2220, 443, 9861, 457, 953]
    table = pd.read_csv(out, dtype={"patient": str}, keep_default_na=False)
    assert len(table) == 112_120 and table["selected"].sum() > 28_000
    assert table.loc[table["balanced_test"], "label"].value_counts().to_dict() == dict.fromkeys(CLASSES, 290)
    assert table["split"].eq("test").sum() == 25_596


@pytest.mark.parametrize("lists", [True, False], ids=["lists", "no lists"])
def test_a_reader_who_goes_away_stops_nothing(tiny_raw, tmp_path, lists):
    """As in `chestxray plan … | head -1`, with output that is written at once and with output that waits."""
    out = tmp_path / "p.csv"
    arguments = ["plan", "--metadata", str(tiny_raw / "Data_Entry_2017_v2020.csv"), "--out", str(out)]
    if lists:
        arguments += ["--train-val", f"{tiny_raw}/train_val_list.txt", "--test", f"{tiny_raw}/test_list.txt"]
    command = [sys.executable, *([] if lists else ["-u"]), "-m", "chestxray", *arguments]
    code, said = unread(command)
    assert (code, said) == (0, "")
    assert len(pd.read_csv(out)) == 60


def test_verify_and_help_are_not_stopped_either(tiny_raw, tmp_path):
    (tiny_raw / "images" / "00000001_000.png").write_bytes(b"")
    report = tmp_path / "faults.csv"
    chestxray = [sys.executable, "-u", "-m", "chestxray"]
    assert unread([*chestxray, "verify", str(tiny_raw), "--report", str(report)]) == (1, "")
    assert len(pd.read_csv(report)) == 1
    assert unread([*chestxray, "--help"]) == (0, "")


def unread(command):
    """The exit code of a command whose output nobody reads, and what it says on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    return done.returncode, done.stderr

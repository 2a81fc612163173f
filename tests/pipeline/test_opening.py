"""What a notebook opens with: the data and the profile that it works with, and what is run before it."""

import json
import shutil

import numpy as np
import pytest
from conftest import tiny_rows, write_table
from PIL import Image

from chestxray.config import PROFILES, StudyError, open_study
from chestxray.data import subset
from chestxray.pipeline import opening, runner, staleness
from chestxray.pipeline.opening import begin
from chestxray.pipeline.stages import STAGES

DATA = ["1", "2.1", "2.2"]
MEMBERS = ["4.0", "4.1", "4.2", "4.3a", "4.3b", "4.3c", "4.3d"]


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """An empty root on a machine without data or account; the runner writes empty files and notes what it was asked."""
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("CHESTXRAY_MOUNTS", str(tmp_path / "mounts"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "account"))
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_KERNEL_RUN_TYPE", runner.STAGE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    runs = []

    def run(line, chosen):
        runs.append((line.source, line.study.profile, [stage.number for stage in chosen]))
        for stage in chosen:
            write(stage, line.study.paths, line.study.profile.image_size)
        done = {stage.number: {"parameters": line._chosen()} for stage in chosen}
        line.state.parent.mkdir(parents=True, exist_ok=True)
        line.state.write_text(json.dumps(staleness.read_record(line.state) | done))
        return True

    monkeypatch.setattr(runner.Pipeline, "run", run)
    monkeypatch.setattr(runner.Pipeline, "look_ahead", lambda line, chosen: [])
    monkeypatch.setattr(opening.sources, "prepare_raw", lambda source, study: study.paths.raw.mkdir(parents=True))
    return runs


def write(stage, paths, side):
    for path in stage.writes(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if stage.number == "2.1":
        paths.store.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((side, side), np.uint8)).save(paths.store / "a.png")


def prepare(dataset, profile, *numbers):
    study = open_study(dataset, profile, 1)
    for stage in STAGES:
        if stage.number in numbers:
            write(stage, study.paths, study.profile.image_size)
    return study


def test_phantoms_take_the_place_of_data_that_cannot_be_had(ran, capsys):
    study = begin("4.1", "nih_9k", "cpu", 7, {"cnn_epochs": 2})
    quick = PROFILES["quick"].override(cnn_epochs=2)
    assert (study.data_note, study.profile, study.seed) == ("phantom images", quick, 7)
    assert ran == [("phantom", quick, ["1", "2.1", "2.2"])]
    said = capsys.readouterr().out.strip().split("\n")
    assert [line.split(":")[0] for line in said[:2]] == ["nih_9k", "Missing of earlier stages"] and len(said) == 3
    assert "about 1 min on two cores" in said[1]
    assert said[2].endswith("python -m chestxray run --dataset nih_9k --profile cpu")
    assert begin("4.1", "nih_9k", "cpu", 7, {"cnn_epochs": 2}) == study and len(ran) == 1


@pytest.mark.parametrize(
    ("number", "missing"),
    [
        ("2.1", []),
        ("2.2", ["1", "2.1"]),
        ("3", ["1", "2.1"]),
        ("4.4", ["1", "2.1", "2.2", *MEMBERS]),
        ("5", ["1", "2.1", "2.2", *MEMBERS, "4.4"]),
    ],
)
def test_what_each_stage_needs_is_run(ran, number, missing):
    assert begin(number, "phantom", "quick", 1).profile == PROFILES["quick"]
    assert [numbers for _, _, numbers in ran] == ([missing] if missing else [])


def test_what_is_prepared_is_kept_when_members_are_missing(ran, capsys):
    """They are quick ones on the data as they are; run again, the notebook is still of the quick profile."""
    asked = prepare("mine", "cpu", "1", "2.1", "2.2", "4.0")
    study = begin("4.4", "mine", "cpu", 1)
    cpu = PROFILES["cpu"]
    kept = {name: getattr(cpu, name) for name in ("image_size", "no_finding", "valid_share", "phantom_images")}
    assert study.paths == asked.paths and study.profile == PROFILES["quick"].override(**kept)
    assert ran == [("mine", study.profile, MEMBERS[1:])]
    assert begin("4.4", "mine", "cpu", 1) == study and len(ran) == 1
    assert capsys.readouterr().out.count("Profile quick, mine radiographs.") == 2


def test_data_of_another_size_are_used_as_they_are(ran, capsys):
    prepare("mine", "quick", "1", "2.1", "2.2")
    assert begin("4.1", "mine", "cpu", 1).profile == PROFILES["quick"]
    assert begin("2.1", "mine", "cpu", 1).profile == PROFILES["cpu"] and ran == []


def test_where_all_is_there_the_parameters_hold_without_a_word(ran, capsys, monkeypatch):
    asked = prepare("mine", "cpu", *(stage.number for stage in STAGES))
    assert begin("5", "mine", "cpu", 1) == asked
    monkeypatch.setenv(runner.STAGE_VARIABLE, "5")  # the runner itself has seen to what is missing
    assert begin("5", "elsewhere", "cpu", 1) == open_study("elsewhere", "cpu", 1)
    assert ran == [] and capsys.readouterr().out == ""


def test_an_account_or_a_folder_gives_the_data(ran, tmp_path, monkeypatch):
    assert begin("2.2", "nih", "cpu", 1).is_phantom
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    (tmp_path / "kaggle.json").write_text("{")
    assert begin("2.2", "nih", "cpu", 1).is_phantom
    (tmp_path / "kaggle.json").write_text(json.dumps({"username": "a", "key": "b"}))
    assert begin("2.2", "nih", "cpu", 1).data_note == "nih radiographs"
    (tmp_path / "mine").mkdir()
    assert begin("2.2", str(tmp_path / "mine"), "cpu", 1).data_note == "mine radiographs"
    assert [(source, numbers) for source, _, numbers in ran[1:]] == [
        ("nih", ["2.1"]),
        (str(tmp_path / "mine"), ["1", "2.1"]),
    ]
    with pytest.raises(StudyError, match="no such folder"):
        begin("2.2", str(tmp_path / "none"), "cpu", 1)


def test_a_mount_or_from_gives_nih_9k(ran, tmp_path):
    images = tmp_path / "mounts" / "x-rays" / "images"
    images.mkdir(parents=True)
    (images.parent / "Data_Entry_2017_v2020.csv").touch()
    *names, last = subset.read_list()
    for name in names:
        (images / name).touch()
    assert begin("2.2", "nih_9k", "cpu", 1).is_phantom
    (images / last).touch()
    assert begin("2.2", "nih_9k", "cpu", 1).data_note == "nih_9k radiographs"
    assert [(source, numbers) for source, _, numbers in ran] == [("phantom", DATA[:2]), ("nih_9k", ["2.1"])]
    shutil.rmtree(images.parent)  # what stage 1 has made, from a mount or from `--from`, is enough
    assert begin("4.1", "nih_9k", "cpu", 1).data_note == "nih_9k radiographs"


def test_phantoms_take_the_place_of_data_that_kaggle_does_not_give(ran, monkeypatch, capsys):
    def fails(source, study):
        raise StudyError("Kaggle's nih: cannot be fetched (no connection); check the network")

    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(opening.sources, "prepare_raw", fails)
    assert begin("2.1", "nih_9k", "cpu", 1).is_phantom
    assert "(no connection); check the network. Phantoms in the quick profile take" in capsys.readouterr().out


def test_a_failure_before_is_one_line(ran, monkeypatch):
    def fails(line, chosen):
        line.failed.append(chosen[0])
        return False

    monkeypatch.setattr(runner.Pipeline, "run", fails)
    with pytest.raises(StudyError, match="1 Raw data failed, as said above; mend it"):
        begin("4.1", "phantom", "quick", 1)


def test_a_dataset_that_cannot_train_is_refused_before_anything_runs(make_raw, tmp_path, monkeypatch):
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path / "root"))
    monkeypatch.delenv(runner.STAGE_VARIABLE, raising=False)
    raw = make_raw("data")
    write_table(raw, [row for row in tiny_rows() if row[1] != "Mass"])
    with pytest.raises(StudyError, match=r"training needs all seven classes, .* lacks Mass \(0 patients\); add"):
        begin("4.1", str(raw), "quick", 1)
    assert not (tmp_path / "root").exists()

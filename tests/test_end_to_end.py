"""The whole study as a newcomer runs it, on phantoms in the quick profile: every stage, every file, and the outcome."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import texts
from notebook_form import problems
from PIL import Image
from sklearn.metrics import roc_auc_score

from chestxray import config
from chestxray.config import CLASSES, REPOSITORY, SIX_FINDINGS, Paths
from chestxray.evaluation import predictions
from chestxray.inference.page import EXAMPLES, example_pixels
from chestxray.pipeline import notebooks
from chestxray.pipeline.execution import Execution
from chestxray.pipeline.stages import BESIDE, STAGES

pytestmark = pytest.mark.slow


def chestxray(root, *arguments):
    started = time.monotonic()
    command = [sys.executable, "-m", "chestxray", "run", "--root", str(root), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return done, time.monotonic() - started


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The root of a finished run, and what it printed."""
    root = tmp_path_factory.mktemp("study")
    done, _ = chestxray(root)
    assert done.returncode == 0, done.stdout + done.stderr
    return Paths("phantom", root), done.stdout


def test_every_stage_leaves_its_files(study):
    paths, _ = study
    for stage in STAGES:
        for path in stage.writes(paths):
            assert path.exists(), path
    assert not [path for path in paths.root.rglob("*.tmp-*") if path.is_file()]


def test_it_ends_with_the_table_and_the_notebooks(study):
    paths, printed = study
    table = re.findall(r"^(\d\w? [\w ]+?)  +0\.\d{3} \(0\.\d{3}–[01]\.\d{3}\)", printed, flags=re.MULTILINE)
    assert {title for title, _ in config.MODELS.values()} <= set(table)
    pages = re.findall(r"^  (\S+\.html)$", printed, flags=re.MULTILINE)
    assert len(pages) == 12 and all((paths.root / page).exists() for page in pages)


def test_the_ensemble_has_learnt(study):
    metrics = pd.read_csv(study[0].results / "metrics.csv", index_col=["model", "metric"])
    assert metrics.loc[("ensemble", "macro_auroc"), "estimate"] >= 0.85


def test_rendered_notebooks_are_in_good_form(study):
    paths, _ = study
    for stage in STAGES:
        if stage.notebook:
            rendered = paths.results / "notebooks" / stage.notebook
            notebook = notebooks.read(rendered)
            size = rendered.stat().st_size
            assert problems(notebook, stage.notebook, size) == []
            assert str(paths.root) not in rendered.read_text()


def test_no_patient_is_in_two_splits(study):
    paths, _ = study
    manifest = pd.read_csv(paths.manifest, dtype={"patient": str})
    assert (manifest.groupby("patient")["split"].nunique() == 1).all()
    assert set(manifest["split"]) == set(config.SPLITS)
    augmented = pd.read_csv(paths.augmented_rows, dtype={"patient": str})
    others = manifest[manifest["split"] != "train"]
    assert not set(augmented["patient"]) & set(others["patient"])
    assert not set(augmented["image"]) & set(others["image"])


def test_predictions_are_probabilities_for_the_images_of_the_split(study):
    paths, _ = study
    manifest = pd.read_csv(paths.manifest)
    for model in config.MODELS:
        for split in ("valid", "test"):
            table = pd.read_csv(paths.saved(model) / f"predictions_{split}.csv")
            assert sorted(table["image"]) == sorted(manifest.loc[manifest["split"] == split, "image"])
            probabilities = table[list(CLASSES)]
            assert probabilities.to_numpy().min() >= 0 and probabilities.to_numpy().max() <= 1
            assert (probabilities.sum(axis=1) - 1).abs().max() < 1e-3


def test_the_record_of_each_model_agrees_with_its_files(study):
    paths, _ = study
    for model in config.MODELS:
        record = json.loads((paths.saved(model) / "run.json").read_text())
        assert record["model"] == model
        valid = predictions.read_predictions(paths.saved(model) / "predictions_valid.csv")
        shown = [valid["findings"].str.split("|").map(lambda found, name=name: name in found) for name in SIX_FINDINGS]
        scores = [roc_auc_score(truth, valid[name]) for truth, name in zip(shown, config.PRESENT, strict=True)]
        assert record["valid_six_finding_auroc"] == pytest.approx(np.mean(scores), abs=1e-6)


def test_a_second_run_does_nothing(study):
    paths, _ = study
    before = {path: path.stat().st_mtime_ns for path in paths.root.rglob("*") if path.is_file()}
    done, seconds = chestxray(paths.root)
    assert done.returncode == 0 and "0 of 13 stages run" in done.stdout
    assert seconds <= 15
    after = {path: path.stat().st_mtime_ns for path in paths.root.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {
        paths.results / ".stages.json",
        paths.results / ".stages.lock",
    }


def test_a_notebook_runs_alone_and_tells_what_is_missing(study, tmp_path):
    paths, _ = study
    done, _ = chestxray(paths.root, "--only", "5", "--force")
    assert done.returncode == 0 and "1 of 1 stages run" in done.stdout
    done, _ = chestxray(tmp_path, "--only", "cnn")
    assert done.returncode == 1
    assert "manifest.csv is missing: run stage 2.1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("own", [False, True], ids=["drawn", "own file"])
@pytest.mark.parametrize("name", BESIDE)
def test_notebooks_beside_the_study_run_from_the_committed_reference(name, own, tmp_path, monkeypatch):
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path))
    source, target = REPOSITORY / name, tmp_path / "executed.ipynb"
    Image.fromarray(example_pixels("Effusion")).save(tmp_path / "chest.png")
    files = [Path(os.path.relpath(tmp_path / "chest.png", source.parent)).as_posix()] if own else []
    Execution(source, {"files": files}).write(target)
    notebook = notebooks.read(target)
    assert problems(notebook, name, target.stat().st_size) == []
    assert ("phantom" in texts(notebook)) != own
    answers = pd.read_csv(tmp_path / "5_results" / "own" / "answers.csv")
    assert len(answers) == (1 if own else len(EXAMPLES)) and answers[list(CLASSES)].notna().all(axis=None)

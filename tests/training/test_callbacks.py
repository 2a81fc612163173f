"""Callbacks: a killed fit ends as an unbroken one, the best epoch is chosen, and a fit that diverges says so."""

import re
import shutil

import keras
import numpy as np
import pandas as pd
import pytest
from fits import SCORES, fit_plain, in_turn, plain, start, study_at
from sklearn.metrics import log_loss, roc_auc_score

from chestxray.config import ALL_LABELS, SIX_FINDINGS, StudyError
from chestxray.training import callbacks
from chestxray.training.run import Run
from chestxray.training.samples import load_findings, predict


def arrays(path):
    with np.load(path) as stored:
        return [stored[name] for name in stored.files]


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_fit_killed_again_and_again_ends_as_an_unbroken_one(prepared_root, tmp_path):
    """In the head phase, between the phases, while a checkpoint is written, and after the best epoch."""
    root = shutil.copytree(prepared_root, tmp_path / "root", symlinks=True)
    moments = ("head", "between", "writing", "worse", "never")
    printed = in_turn("fit_two_phases", root, ("unbroken", "never"), *(("killed", moment) for moment in moments))
    assert re.findall(r"(\w+): going on after epoch (\d)", printed) == [
        ("head", "1"),
        ("fine_tune", "1"),
        ("fine_tune", "2"),
    ]

    folders = [study_at(root).paths.saved(name) for name in ("unbroken", "killed")]
    for phase in SCORES:
        assert same(*(arrays(folder / f"last-{phase}.npz") for folder in folders)), f"last weights of {phase}"
    chosen = [keras.models.load_model(folder / "model.keras") for folder in folders]
    assert same(*(model.get_weights() for model in chosen)), "chosen weights"
    assert not same(arrays(folders[0] / "last-fine_tune.npz"), chosen[0].get_weights()[:-2]), "the best is not the last"
    histories = [pd.read_csv(folder / "history.csv").drop(columns="seconds") for folder in folders]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    assert histories[0]["val_six_finding_auroc"].tolist() == [*SCORES["head"], *SCORES["fine_tune"]]
    for name in ("predictions_valid.csv", "predictions_test.csv"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert not [path.name for path in folders[1].iterdir() if ".tmp-" in path.name], "the file that was cut short"


def test_the_best_epoch_is_chosen_by_the_score_of_six_findings(prepared_study):
    run = Run(prepared_study, "best", {})
    model = fit_plain(run, epochs=4, rate=0.03)
    valid = load_findings(prepared_study, "valid")
    scores = predict(model, valid)
    areas = [roc_auc_score(valid.y[:, k], scores[:, k]) for k in map(ALL_LABELS.index, SIX_FINDINGS)]
    best = run.history["val_six_finding_auroc"].idxmax()
    assert run.history["val_six_finding_auroc"][best] == pytest.approx(np.mean(areas), abs=1e-9)
    losses = [log_loss(valid.y[:, k], scores[:, k].astype(float), labels=[0, 1]) for k in range(len(ALL_LABELS))]
    assert run.history["val_loss"][best] == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize("spoilt", [1, 2], ids=["first epoch", "second epoch"])
def test_a_fit_that_diverges_stops_and_leaves_the_last_good_epoch(prepared_study, spoilt):
    train, valid = (load_findings(prepared_study, split) for split in ("train", "valid"))
    run, model = Run(prepared_study, "nan", {}), plain()
    before = model.get_weights()
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([(spoilt - 1) * run.steps(train)], [1e-3, 1e30])
    model.compile(keras.optimizers.AdamW(rate), "binary_crossentropy")
    phase = run.phase("fit", model, train, valid, 3)
    kept = "nothing was saved" if spoilt == 1 else "checkpoint-1-fit.npz keeps epoch 1"
    with pytest.raises(StudyError, match=rf"^phase 'fit', epoch {spoilt}: .*; {kept}. Lower the learning rate, of the"):
        start(model, phase)
    assert all(np.isfinite(values).all() for values in model.get_weights())
    assert same(before, model.get_weights()) == (spoilt == 1)
    path = run.folder / "checkpoint-1-fit.npz"
    assert path.exists() == (spoilt == 2) and (spoilt == 1 or all(np.isfinite(a).all() for a in arrays(path)))
    assert len(run.history) == spoilt - 1 and not (run.folder / "run.json").exists()


def test_tensorboard_is_written_only_where_it_is_installed(prepared_study, monkeypatch):
    monkeypatch.setattr(callbacks.importlib.util, "find_spec", lambda name: None)
    run = Run(prepared_study, "without", {})
    fit_plain(run, epochs=1)
    assert [path.name for path in run.folder.iterdir()] == ["checkpoint-1-fit.npz"]
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    fit_plain(run, epochs=1)
    assert list((run.folder / "logs" / "1-fit").rglob("events*"))

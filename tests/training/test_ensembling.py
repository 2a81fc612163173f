"""The ensemble: who is chosen, what the head may see, and that the joined model is the sum of its parts."""

import json

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from chestxray.config import CLASSES, StageMissing, StudyError
from chestxray.networks import ensemble, transfer
from chestxray.training import ensembling, model_file


def probabilities(rows=60, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(7), rows).astype("float32")


def table(values, images=None):
    images = images if images is not None else [f"{i}.png" for i in range(len(values))]
    return pd.DataFrame(values, columns=list(CLASSES)).assign(image=images)


def test_members_are_ranked_by_validation(tiny_study):
    for name, score in zip(ensembling.CANDIDATES, (0.5, 0.6, 0.65, 0.7, 0.62, 0.71, 0.69), strict=True):
        folder = tiny_study.paths.saved(name)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"valid_macro_auroc": score, "key": name}))
    ranked = ensembling.rank(tiny_study)["model"].tolist()
    assert ranked[:3] == ["fine_tuning_3c", "fine_tuning_3a", "fine_tuning_3d"]


def test_a_missing_member_is_named(tiny_study):
    with pytest.raises(StageMissing, match=r"dense/run\.json is missing: run stage 4 for dense first"):
        ensembling.rank(tiny_study)


def test_tables_of_other_images_are_refused():
    with pytest.raises(StudyError, match="list different images"):
        ensembling.concatenated([table(probabilities()), table(probabilities(), [f"x{i}.png" for i in range(60)])])


def test_the_mean_by_hand():
    one, other = probabilities(seed=1), probabilities(seed=2)
    joined = ensembling.concatenated([table(one), table(other)])
    assert joined.shape == (60, 14)
    assert np.allclose(ensembling.mean_of(joined), (one + other) / 2)


def test_every_trio_once_with_its_mean():
    described = {"patient": "1", "label": CLASSES[0], "selected": True, "findings": CLASSES[0]}
    alone = {name: table(probabilities(seed=seed)).assign(**described) for seed, name in enumerate("abcd")}
    found = ensembling.trios(alone)
    assert list(found) == ["a + b + c", "a + b + d", "a + c + d", "b + c + d"]
    mean = (probabilities(seed=0) + probabilities(seed=2) + probabilities(seed=3)) / 3
    assert np.allclose(found["a + c + d"][list(CLASSES)], mean)
    assert found["a + c + d"]["image"].tolist() == alone["a"]["image"].tolist()


def test_no_head_predicts_a_patient_it_was_fitted_on(monkeypatch):
    patients = np.repeat([f"p{i}" for i in range(30)], 4)
    x = np.concatenate([probabilities(120, 1), probabilities(120, 2)], axis=1)
    y = np.eye(7, dtype="float32")[np.arange(120) % 7]
    single = np.arange(120) % 5 > 0
    y[~single] = 0
    seen = []
    fit = ensembling.fit_head

    def watched(x_fit, y_fit, *rest, held_out):
        # Rows are told apart by their values, which are all different.
        rows = {row.tobytes() for row in x_fit}
        fitted = np.array([row.tobytes() in rows for row in x])
        judged = np.array([row.tobytes() in {r.tobytes() for r in held_out[0]} for row in x])
        seen.append((set(patients[fitted]), set(patients[judged]), single[fitted].all()))
        return fit(x_fit, y_fit, *rest, held_out=held_out)

    monkeypatch.setattr(ensembling, "fit_head", watched)
    out, history = ensembling.cross_validate(
        x, y, single, ensembling.folds_of(y, single, patients, 0), epochs=2, seed=0
    )
    assert len(seen) == 5 and all(not fitted & judged and only_single for fitted, judged, only_single in seen)
    assert np.allclose(out.sum(axis=1), 1, atol=1e-5), "every image is predicted, also those with several labels"
    assert history["epoch"].tolist() == [1, 2] and {"loss", "val_loss"} <= set(history)


def test_a_head_learns_whom_to_trust():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 600)
    y = np.eye(7, dtype="float32")[labels]
    good = 0.6 * y + 0.4 * probabilities(600, 3)
    x = np.concatenate([good, probabilities(600, 4), probabilities(600, 5)], axis=1).astype("float32")
    head, history = ensembling.fit_head(x[:400], y[:400], 60, 0, held_out=(x[400:], y[400:]))
    right = head(x[400:], training=False).numpy().argmax(axis=1) == labels[400:]
    assert right.mean() > 0.9 and history["loss"].iloc[-1] < history["loss"].iloc[0]


def test_weights_find_the_one_who_knows():
    rng = np.random.default_rng(0)
    y = np.eye(7, dtype="float32")[rng.integers(0, 7, 400)]
    good = 0.5 * y + 0.5 * probabilities(400, 1)
    weights = ensembling.fit_weights(np.concatenate([probabilities(400, 2), good], axis=1), y)
    assert weights[1] > 0.95 and weights.sum() == pytest.approx(1)
    alike = ensembling.fit_weights(np.concatenate([good, good], axis=1), y)
    assert np.allclose(alike, 0.5, atol=1e-3), "members that say the same keep equal weights"


def test_weights_are_the_best_on_a_grid():
    y = np.eye(7, dtype="float32")[np.random.default_rng(0).integers(0, 3, 300)]
    x = np.concatenate([0.3 * y + 0.7 * probabilities(300, 1), 0.2 * y + 0.8 * probabilities(300, 2)], axis=1)
    classes = y.argmax(axis=1)

    def loss(share):
        mixed = share * x[:, :7] + (1 - share) * x[:, 7:]
        return -np.mean([np.log(mixed[classes == k, k]).mean() for k in range(3)])

    grid = np.linspace(0, 1, 501)
    assert ensembling.fit_weights(x, y)[0] == pytest.approx(grid[np.argmin([loss(share) for share in grid])], abs=0.01)


def test_weights_are_judged_on_other_patients(monkeypatch):
    patients = np.repeat([f"p{i}" for i in range(30)], 4)
    x = np.concatenate([probabilities(120, 1), probabilities(120, 2)], axis=1)
    y = np.eye(7, dtype="float32")[np.arange(120) % 7]
    fitted = []
    monkeypatch.setattr(
        ensembling, "fit_weights", lambda x, y: fitted.append({r.tobytes() for r in x}) or np.ones(2) / 2
    )
    out = ensembling.cross_validate_weights(x, y, ensembling.folds_of(y, np.ones(120, bool), patients, 0))
    assert np.allclose(out, ensembling.mean_of(x), atol=1e-6)
    for rows in fitted:
        seen = np.array([row.tobytes() in rows for row in x])
        assert not set(patients[seen]) & set(patients[~seen])


def test_offsets_name_a_class_that_is_held_back_and_move_no_auroc():
    rng = np.random.default_rng(0)
    y = np.eye(7, dtype="float32")[rng.integers(0, 7, 700)]
    logits = 2 * y + rng.normal(size=(700, 7))
    held_back = np.array([0, 0, -3, 0, 2, 0, 0])
    given = 1 / (1 + np.exp(-(logits + held_back)))
    offsets = ensembling.fit_offsets(given, y)
    assert np.allclose(offsets, held_back.mean() - held_back, atol=0.5) and offsets.mean() == pytest.approx(0, abs=1e-6)
    mended = ensembling.shifted(given, offsets)
    recalls = [[(p[y[:, k] > 0].argmax(1) == k).mean() for k in range(7)] for p in (given, mended)]
    assert np.mean(recalls[1]) > np.mean(recalls[0]) + 0.1
    for k in range(7):
        assert roc_auc_score(y[:, k], mended[:, k]) == pytest.approx(roc_auc_score(y[:, k], given[:, k]), abs=1e-6)


def test_offsets_by_hand():
    assert ensembling.shifted(np.full((1, 7), 0.5), np.log(np.array([3.0] * 7))) == pytest.approx(0.75)


def test_offsets_are_a_part_of_the_model(tmp_path):
    members = [transfer.dense(16), transfer.dense(16, units=(8,))]
    offsets = np.linspace(-1, 1, 7).astype("float32")
    model_file.save_model(ensemble.join(members, None, offsets=offsets), tmp_path / "ensemble.keras")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), dtype=np.uint8)
    mean = np.mean([member(pixels, training=False) for member in members], axis=0)
    loaded = keras.models.load_model(tmp_path / "ensemble.keras")
    assert np.allclose(loaded(pixels, training=False), ensembling.shifted(mean, offsets), atol=1e-6)
    assert not loaded.trainable_variables


def test_offsets_are_judged_on_other_patients(monkeypatch):
    patients = np.repeat([f"p{i}" for i in range(30)], 4)
    x, y = probabilities(120, 1), np.eye(7, dtype="float32")[np.arange(120) % 7]
    fitted = []
    monkeypatch.setattr(ensembling, "fit_offsets", lambda x, y: fitted.append({r.tobytes() for r in x}) or np.zeros(7))
    out = ensembling.cross_validate_offsets(x, y, ensembling.folds_of(y, np.ones(120, bool), patients, 0))
    assert np.allclose(out, x, atol=1e-5) and len(fitted) == 5
    for rows in fitted:
        seen = np.array([row.tobytes() in rows for row in x])
        assert not set(patients[seen]) & set(patients[~seen])


def test_mirrored_answers_are_those_of_both_ways():
    members = [transfer.dense(16), transfer.dense(16, units=(8,))]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), dtype=np.uint8)
    joined = ensemble.join(members, ensemble.weighted_mean([0.25, 0.75]), mirrored=True)
    one, other = (
        (member(pixels, training=False) + member(pixels[:, :, ::-1], training=False)) / 2 for member in members
    )
    assert np.allclose(joined(pixels, training=False), 0.25 * one + 0.75 * other, atol=1e-6)
    assert np.allclose(joined(pixels[:, :, ::-1], training=False), joined(pixels, training=False), atol=1e-6)


@pytest.mark.parametrize("mirrored", [False, True])
def test_an_enlarged_look_is_at_the_centre(mirrored):
    member = transfer.dense(64)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 1), dtype=np.uint8)
    # Two of 64 pixels are cut off on each side; Pillow, another program, resizes what is left.
    centres = [Image.fromarray(picture[2:-2, 2:-2, 0].astype("float32")) for picture in pixels]
    grown = [np.asarray(centre.resize((64, 64), Image.Resampling.BILINEAR)) for centre in centres]
    enlarged = np.stack(grown)[..., None]
    looks = [pixels.astype("float32"), enlarged]
    if mirrored:
        looks += [look[:, :, ::-1] for look in looks]
    expected = np.mean([member(look, training=False) for look in looks], axis=0)
    joined = ensemble.join([member], None, mirrored=mirrored, enlarged=True)
    assert np.allclose(joined(pixels, training=False), expected, atol=1e-4)


@pytest.mark.parametrize(("mirrored", "enlarged", "asked"), [(False, False, 1), (True, False, 2), (True, True, 4)])
def test_every_way_to_look_is_had_from_asking_once_at_each(mirrored, enlarged, asked):
    member = transfer.dense(64)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 1), dtype=np.uint8)
    answers = ensemble.view_by_view(member)(pixels, training=False).numpy()
    assert answers.shape == (3, 4, 7)
    joined = ensemble.join([member], None, mirrored=mirrored, enlarged=enlarged)
    assert np.allclose(answers[:, :asked].mean(axis=1), joined(pixels, training=False), atol=1e-6)


def test_a_mirrored_ensemble_is_saved_and_loaded(tmp_path):
    members = [transfer.dense(16), transfer.dense(16, units=(8,))]
    joined = ensemble.join(members, None, mirrored=True, enlarged=True)
    model_file.save_model(joined, tmp_path / "ensemble.keras")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), dtype=np.uint8)
    loaded = keras.models.load_model(tmp_path / "ensemble.keras")
    assert np.allclose(loaded(pixels, training=False), joined(pixels, training=False), atol=1e-6)


@pytest.mark.parametrize("with_head", [True, False])
def test_the_joined_model_is_its_members_and_their_join(with_head):
    members = [transfer.dense(16), transfer.cnn(16, filters=(4, 8)), transfer.dense(16, units=(8,))]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), dtype=np.uint8)
    parts = np.concatenate([member(pixels, training=False) for member in members], axis=1)
    head = ensemble.head(3) if with_head else None
    joined = ensemble.join(members, head)
    expected = head(parts, training=False).numpy() if with_head else ensembling.mean_of(parts)
    assert np.allclose(joined(pixels, training=False), expected, atol=1e-5)
    assert len(joined.inputs) == 1 and not joined.trainable_variables


@pytest.mark.parametrize("kind", ["mean", "head", "weights"])
def test_members_are_joined_in_single_precision(kind):
    members = [transfer.dense(16), transfer.cnn(16, filters=(4, 8)), transfer.dense(16, units=(8,))]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), dtype=np.uint8)
    made = {
        "mean": lambda: None,
        "head": lambda: ensemble.head(3),
        "weights": lambda: ensemble.weighted_mean([0.2, 0.3, 0.5]),
    }
    answers = []
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        try:
            keras.utils.set_random_seed(1)
            joined = ensemble.join(members, made[kind](), mirrored=True, offsets=np.linspace(-0.3, 0.3, 7))
            answers.append(joined(pixels, training=False).numpy())
        finally:
            keras.config.set_dtype_policy("float32")
    assert np.allclose(*answers, atol=1e-7)

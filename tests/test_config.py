"""Profiles: sizes and epochs of a run; and the names of datasets."""

import hashlib
import re

import numpy as np
import pytest
from PIL import Image

from chestxray import __main__, config
from chestxray.config import PROFILES, REPOSITORY, Paths, StudyError, dataset_name, open_study
from chestxray.data import manifest, preparation, sources, subset


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_the_four_fine_tuned_models_are_four(profile):
    """From one seed, members of the same backbone, side and augmentation would be the same to the last bit."""
    notebooks = (REPOSITORY / "4_models" / f"3{letter}_Fine_tuning_model.ipynb" for letter in "abcd")
    strengths = [re.search(r"strength = ([0-9.]+)", notebook.read_text("utf-8"))[1] for notebook in notebooks]
    assert len(set(zip(profile.backbones, profile.member_sizes, strengths, strict=True))) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"cnn_epochs": "x"},
        {"cnn_epochs": 0},
        {"cnn_epochs": 1.5},
        {"mixed_precision": 1},
        {"batch_size": 0},
        {"image_size": 16},
        {"valid_share": 1},
        {"learning_rate": float("inf")},
        {"member_sizes": 64},
        {"member_sizes": [64, 80]},
        {"member_sizes": [64, 80, 64, "x"]},
        {"member_sizes": [64, 80, 64, 16]},
        {"backbones": ["EfficientNetLite0"]},
    ],
    ids=str,
)
def test_a_value_of_another_kind_length_or_range_is_refused_at_once(change):
    (name,) = change
    with pytest.raises(StudyError, match=f"^{name}=.*: give a value such as "):
        PROFILES["quick"].override(**change)


def test_whole_numbers_do_for_shares_and_lists_for_tuples():
    changed = PROFILES["quick"].override(valid_share=0, member_sizes=[64, 80, 64, 56])
    assert (changed.valid_share, changed.member_sizes) == (0, [64, 80, 64, 56])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, beside an empty root."""
    monkeypatch.setenv("CHESTXRAY_ROOT", str(tmp_path / "root"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    "name",
    ["phantom", "NIH", "Nih-Sample", "nih_9k", "reference", "Reference", "input_check", "nih_9k.csv", "readme.md"],
)
def test_a_folder_with_the_name_of_a_source_or_of_something_committed_is_refused(here, make_raw, capsys, name):
    folder = make_raw(f"a/{name}", images=20)
    (here / "link").symlink_to(folder)
    for given in (str(folder), f"{folder}/", f"../a/{name}"):
        assert __main__.main(["run", "--dataset", given, "--only", "1"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{name} is the name of" in said and "; rename the folder" in said
    assert not Paths("x").root.exists()
    assert dataset_name("link") == dataset_name("./link") == "link"  # a link is read by its own name
    (here / name).symlink_to(folder)
    if name in config.SOURCES:
        assert dataset_name(name) == name and config.source_folder(name) is None
    else:
        with pytest.raises(StudyError, match="is the name of"):
            dataset_name(name)


def test_names_that_become_equal_are_told_apart(here, make_raw, capsys):
    first, second = make_raw("my data", images=20), make_raw("my_data", images=20)
    assert __main__.main(["run", "--dataset", str(first), "--only", "1"]) == 0
    assert __main__.main(["run", "--dataset", str(second), "--only", "3"]) == 2
    assert "holds another folder" in capsys.readouterr().err
    assert Paths("my_data").raw.samefile(first)


def test_a_word_means_the_source_and_says_so(here, make_raw, capsys):
    (here / "phantom").symlink_to(make_raw("a", images=20))
    command = ["run", "--dataset", "phantom", "--set", "phantom_images=20", "--only", "1"]
    assert __main__.main(command) == 0
    assert "means the source, not the folder of this name here" in capsys.readouterr().out
    assert (Paths("phantom").raw / "phantom.json").exists()
    assert __main__.main([*command, "--from", "phantom"]) == 2
    assert "--from: is for --dataset nih_9k alone" in capsys.readouterr().err


@pytest.fixture
def listed(here, make_raw, monkeypatch):
    """A folder whose images are those of the list, which puts every fourth patient into test and into validation."""
    folder, lines = make_raw("elsewhere"), [",".join(subset.COLUMNS)]
    test = (folder / "test_list.txt").read_text().split()
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        pixels = np.random.default_rng(number).integers(0, 256, (128, 128), np.uint8)
        Image.fromarray(pixels).save(path)
        part = "test" if path.name in test else "train_val"
        split = "valid" if int(path.name[:8]) % 4 == 1 else part.removesuffix("_val")
        lines.append(f"{path.name},{part},{split},{hashlib.sha256(pixels.tobytes()).hexdigest()},")
    (here / "list.csv").write_text("\n".join(lines) + "\n")
    for owner, name in ((config, "NIH_9K_LIST"), (subset, "LIST")):
        monkeypatch.setattr(owner, name, here / "list.csv")
    return folder


def test_a_folder_with_the_lists_radiographs_is_nih_9k_however_it_is_prepared(listed):
    seen = []
    for seed, changes in ((1, {"image_size": 32}), (1, {"image_size": 32, "no_finding": 5}), (2, {"valid_share": 0.5})):
        study = open_study(str(listed), "quick", seed, changes)
        assert study.paths.dataset == "nih_9k"
        sources.prepare_raw(str(listed), study)
        done = preparation.prepare(study)
        assert dict(zip(done.manifest["image"], done.manifest["split"], strict=True)) == subset.splits()
        assert any("valid_list.txt, whatever valid_share and seed" in note for note in done.notes)
        assert "Test is the official test list." in done.notes
        seen.append((manifest.fingerprint(study.paths), manifest.prepared_fingerprint(study.paths)))
    data, prepared = map(set, zip(*seen, strict=True))
    assert len(data) == 1 and len(prepared) == 3 and not data & prepared


def test_radiographs_that_have_changed_since_are_refused_by_name(listed):
    study = open_study("nih_9k", "quick", 1, {"image_size": 32})
    sources.prepare_raw("nih_9k", study, [listed])
    preparation.prepare(study)
    before = study.paths.manifest.read_bytes()
    path = sorted((listed / "images").iterdir())[7]
    pixels = np.asarray(Image.open(path)).copy()
    pixels[3, 4] ^= 1
    Image.fromarray(pixels).save(path)
    with pytest.raises(StudyError, match=f"{path.name}: its pixels differ"):
        preparation.prepare(study)
    assert study.paths.manifest.read_bytes() == before
    assert dataset_name(str(listed)) == "nih_9k"  # stage 1 compares, the name does not
    path.unlink()
    assert dataset_name(str(listed)) == "elsewhere"

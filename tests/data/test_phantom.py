"""The phantom against what can be derived by hand from radiology, geometry and the NIH's own files."""

import csv
import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chestxray.config import SIX_FINDINGS, StudyError
from chestxray.data import phantom

# Copied from the files that the NIH distributes.
NIH_DATA_ENTRY = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
NIH_BBOX = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
SEED = 5


def digests(raw: Path) -> dict[str, str]:
    """SHA-256 of every file of a data set."""
    return {
        path.relative_to(raw).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(raw.rglob("*"))
        if path.is_file()
    }


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def write(raw: Path, images: int = 40, size: int = 64, seed: int = SEED, workers: int = 1) -> Path:
    phantom.write_dataset(raw, images, size, seed, workers)
    return raw


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("phantom") / "raw")


def quiet_pair(index: int, finding: str, size: int = 256) -> tuple[np.ndarray, phantom.Scene]:
    """Difference in grey, without noise, that the finding's own shadow makes; volume loss is in both images."""
    scene = phantom.compose(index, SEED, findings=[finding])
    sound = dataclasses.replace(scene, lesions=())
    change = phantom.render(scene, size, noise=False).astype(int) - phantom.render(sound, size, noise=False)
    return change, scene


def test_headers_are_the_nih_ones(raw):
    assert (raw / "Data_Entry_2017_v2020.csv").read_text().splitlines()[0] == NIH_DATA_ENTRY
    assert (raw / "BBox_List_2017.csv").read_text().splitlines()[0] == NIH_BBOX


def test_headers_equal_the_distributed_files(nih, raw):
    for name in ("Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"):
        with (Path(nih) / name).open() as real, (raw / name).open() as drawn:
            assert drawn.readline() == real.readline()


def test_tables_describe_the_images(raw):
    entries = rows(raw / "Data_Entry_2017_v2020.csv")
    assert sorted(entry[0] for entry in entries) == sorted(path.name for path in (raw / "images").iterdir())
    for name, labels, follow_up, patient, age, sex, view, width, height, spacing_x, spacing_y in entries:
        assert name == f"{int(patient):08d}_{int(follow_up):03d}.png"
        assert labels == "No Finding" or labels.split("|") == sorted(set(labels.split("|")))
        assert 18 <= int(age) <= 95 and sex in "MF" and view in ("PA", "AP")
        assert width == height == "64" and spacing_x == spacing_y
        assert 330 < 64 * float(spacing_x) < 400  # a chest cassette is 35 x 43 cm
    with Image.open(raw / "images" / entries[0][0]) as image:
        assert (image.mode, image.size) == ("L", (64, 64))


def test_box_list_names_boxed_findings_inside_the_image(raw):
    labels = {entry[0]: entry[1].split("|") for entry in rows(raw / "Data_Entry_2017_v2020.csv")}
    boxes = rows(raw / "BBox_List_2017.csv")
    assert {box[1] for box in boxes} <= set(SIX_FINDINGS) - {"Infiltration"} | {"Infiltrate"}
    assert {name for name, found in labels.items() if set(found) & set(SIX_FINDINGS)} == {box[0] for box in boxes}
    for name, finding, *numbers in boxes:
        x, y, width, height = map(float, numbers)
        assert finding.replace("Infiltrate", "Infiltration") in labels[name]
        assert 0 <= x < x + width <= 64 and 0 <= y < y + height <= 64


def test_no_patient_is_in_both_lists(raw):
    train, test = ((raw / name).read_text().split() for name in ("train_val_list.txt", "test_list.txt"))
    assert not {name[:8] for name in train} & {name[:8] for name in test}
    assert sorted(train + test) == sorted(path.name for path in (raw / "images").iterdir())


def test_sixteen_hundred_images_are_balanced():
    slots = [phantom.slot(index, SEED) for index in range(1600)]
    assert len({place.file for place in slots}) == 1600
    assert {p.patient for p in slots if p.test}.isdisjoint(p.patient for p in slots if not p.test)
    assert 0.23 <= np.mean([p.test for p in slots]) <= 0.27
    assert 0.44 <= np.mean([not p.findings for p in slots]) <= 0.52
    for finding in SIX_FINDINGS:
        assert sum(p.findings == (finding,) for p in slots if p.test) >= 30
    assert sum(len(p.findings) == 2 for p in slots) >= 16
    assert {f for p in slots for f in p.findings} > set(SIX_FINDINGS)
    images = np.bincount([p.patient for p in slots])[1:]
    assert images.min() == 1 and images.max() >= 4


def test_findings_are_independent_of_view_sex_and_age():
    """A chi-squared test for each of view, sex and old age against the label, at p = .001."""
    from scipy.stats import chi2_contingency

    scenes = [phantom.compose(index, 1) for index in range(700)]
    label = ["|".join(s.slot.findings) if len(s.slot.findings) < 2 else "two" for s in scenes]
    for trait in ([s.view for s in scenes], [s.sex for s in scenes], [s.age > 48 for s in scenes]):
        table = np.zeros((len(set(label)), 2))
        for row, name in enumerate(sorted(set(label))):
            for column, value in enumerate(sorted(set(trait))):
                table[row, column] = sum(a == name and b == value for a, b in zip(label, trait, strict=True))
        assert chi2_contingency(table[table.sum(axis=1) >= 20]).pvalue > 0.001


def test_the_same_images_whatever_the_workers(raw, tmp_path):
    assert digests(write(tmp_path / "two", workers=2)) == digests(raw)


def test_another_seed_draws_other_images():
    one, other = (phantom.render(phantom.compose(3, seed), 64) for seed in (1, 2))
    assert not np.array_equal(one, other)


def test_render_gives_what_write_dataset_wrote(raw):
    scene = phantom.compose(7, SEED)
    drawn = phantom.render(scene, 64)
    with Image.open(raw / "images" / scene.slot.file) as image:
        np.testing.assert_array_equal(np.asarray(image), drawn)
    assert drawn.shape == (64, 64) and drawn.dtype == np.uint8


def test_a_killed_run_continues_to_the_same_data_set(raw, tmp_path):
    """Kill -9 once some images are there; the next run keeps those and ends as an unbroken run does."""
    broken = tmp_path / "raw"
    code = "import sys; from pathlib import Path; from chestxray.data import phantom; "
    code += f"phantom.write_dataset(Path(sys.argv[1]), 40, 64, {SEED}, 1)"
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(broken)], stderr=subprocess.DEVNULL, env={**os.environ, "TQDM_DISABLE": "1"}
    )
    deadline = time.monotonic() + 60
    while len(list(broken.glob("images/0*.png"))) < 5 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    (broken / "images" / ".00000001_000.png.tmp-1").write_bytes(b"half")
    kept = {path: path.stat().st_mtime_ns for path in broken.glob("images/0*.png")}
    assert len(kept) >= 5
    write(broken)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert digests(broken) == digests(raw)


def test_a_complete_data_set_is_left_alone(raw):
    before = {path: path.stat().st_mtime_ns for path in raw.rglob("*")}
    write(raw)
    assert {path: path.stat().st_mtime_ns for path in raw.rglob("*")} == before


def test_other_parameters_replace_and_fewer_images_shrink(tmp_path):
    raw = write(tmp_path / "raw", images=8, seed=1)
    assert digests(write(raw, images=8, seed=2)) == digests(write(tmp_path / "fresh", images=8, seed=2))
    assert digests(write(raw, images=5, seed=2)) == digests(write(tmp_path / "five", images=5, seed=2))


@pytest.mark.parametrize("linked", [False, True])
def test_radiographs_that_are_no_phantoms_are_never_touched(tmp_path, linked):
    real = tmp_path / "real"
    (real / "images").mkdir(parents=True)
    (real / "images" / "00000001_000.png").write_bytes(b"real")
    raw = real
    if linked:
        raw = tmp_path / "raw"
        raw.symlink_to(real, target_is_directory=True)
    with pytest.raises(StudyError, match="not phantoms"):
        write(raw)
    assert digests(real) == {"images/00000001_000.png": hashlib.sha256(b"real").hexdigest()}


def test_a_folder_that_takes_no_files_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=r"raw.*: cannot be written \(.+\); free space"):
        write(tmp_path / "file" / "raw", images=1)


def test_no_images_are_refused(tmp_path):
    with pytest.raises(StudyError, match="images 0"):
        write(tmp_path, images=0)


@pytest.mark.parametrize("size", [63, 1025])
def test_a_size_out_of_range_is_refused(tmp_path, size):
    with pytest.raises(StudyError, match=f"phantom size {size} px is out of range; give 64 to 1024"):
        write(tmp_path / "raw", size=size)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("finding", SIX_FINDINGS)
@pytest.mark.parametrize("index", [2, 11])
def test_the_box_holds_the_changed_pixels(finding, index):
    """Draw with and without: what changes clearly is in the boxes (scatter changes all else by a grey or two)."""
    change, scene = quiet_pair(index, finding)
    inside = np.zeros(change.shape, dtype=bool)
    for box in phantom.boxes(scene, 256):
        inside[int(box.y) : int(box.y + box.height) + 1, int(box.x) : int(box.x + box.width) + 1] = True
    clear = np.abs(change) > 12
    assert clear.sum() > 30
    assert not (clear & ~inside).any()


def test_a_box_is_tight():
    """On every side, a tenth of the box's width away from its edge something has changed."""
    for finding in ("Mass", "Nodule"):
        change, scene = quiet_pair(4, finding, 512)
        (box,) = phantom.boxes(scene, 512)
        rows_, columns = np.nonzero(np.abs(change) > 6)
        assert abs(np.ptp(columns) + 1 - box.width) < 0.2 * box.width
        assert abs(np.ptp(rows_) + 1 - box.height) < 0.2 * box.height


def test_nodules_are_at_most_thirty_millimetres_and_masses_more():
    """The Fleischner Society's border between a nodule and a mass is 30 mm."""
    for index in range(60):
        for finding in ("Nodule", "Mass"):
            scene = phantom.compose(index, SEED, findings=[finding])
            (box,) = phantom.boxes(scene, 128)
            sides = np.array([box.width, box.height]) * scene.width / 128
            assert (sides <= 30).all() if finding == "Nodule" else (sides > 30).all()


def test_an_ap_heart_is_wider_and_the_diaphragm_higher_than_pa():
    """Measured in the image: heart from its shadow's change of width, dome from the brightest step in a lung column."""
    for index in (0, 9, 30):
        widths, domes = [], []
        for view in ("PA", "AP"):
            scene = phantom.compose(index, SEED, findings=(), view=view)
            bare = dataclasses.replace(scene.anatomy, heart=1.0)
            change = phantom.render(scene, 256, noise=False).astype(int) - phantom.render(
                dataclasses.replace(scene, anatomy=bare), 256, noise=False
            )
            widths.append(np.ptp(np.nonzero(change > 10)[1]))
            lung = phantom.render(scene, 256, noise=False)[
                128:230, 256 // 2 - round(0.55 * scene.anatomy.lung * 256 / scene.width)
            ]
            domes.append(int(np.argmax(np.diff(lung.astype(int)))))
        assert widths[1] > widths[0]
        assert domes[1] < domes[0]


def test_a_pneumothorax_is_darker_and_has_no_markings():
    change, scene = quiet_pair(6, "Pneumothorax")
    (lesion,) = scene.lesions
    (box,) = phantom.boxes(scene, 256)
    assert (change < -12).sum() > 200
    assert (change > 4).sum() > 20  # the pleural line, and the denser lung beside it
    rows_, columns = np.nonzero(change < -12)
    assert rows_.min() < box.y + 0.2 * box.height  # air rises to the apex
    middle = 128 + scene.anatomy.middle * 256 / scene.width
    assert (np.sign(columns - middle) == lesion.side).all()


def test_an_effusion_is_highest_at_the_chest_wall():
    """The meniscus: in the columns near the wall, the white begins higher than in those towards the middle."""
    for index in (1, 8, 14):
        change, scene = quiet_pair(index, "Effusion")
        columns = np.flatnonzero((change > 20).sum(axis=0) > 3)
        begins = np.array([np.argmax(change[:, c] > 20) for c in columns])
        outward = np.argsort(scene.lesions[0].side * columns)
        near, far = begins[outward][: len(columns) // 4], begins[outward][-len(columns) // 4 : -3]
        assert far.mean() < near.mean() - 5


def test_atelectasis_raises_the_dome_of_its_side():
    for index in range(20):
        sound = phantom.compose(index, SEED, findings=())
        ill = phantom.compose(index, SEED, findings=["Atelectasis"])
        side = ill.lesions[0].side
        assert ill.anatomy.dome(side) < sound.anatomy.dome(side) - 10  # y grows downwards
        assert ill.anatomy.dome(-side) == sound.anatomy.dome(-side)
        assert side * (ill.anatomy.shift - sound.anatomy.shift) > 5


def test_attenuation_follows_beer_and_lambert():
    """Twice the quanta leave the picture as it is, and make its noise smaller by the square root of two."""
    scene = phantom.compose(0, SEED, findings=())
    double = dataclasses.replace(scene, quanta=2 * scene.quanta)
    quiet = phantom.render(scene, 256, noise=False).astype(float)
    assert np.abs(quiet - phantom.render(double, 256, noise=False)).max() <= 1
    lung = np.s_[90:160, 60:200]
    rough = [np.std((phantom.render(s, 256) - quiet)[lung]) for s in (scene, double)]
    assert rough[0] / rough[1] == pytest.approx(np.sqrt(2), rel=0.12)


def test_anatomy_does_not_depend_on_the_size():
    scene = phantom.compose(3, SEED)
    large, small = (phantom.render(scene, size, noise=False).astype(float) for size in (512, 64))
    assert np.abs(large.reshape(64, 8, 64, 8).mean(axis=(1, 3)) - small).mean() < 4


@pytest.mark.parametrize("size", [65, 80, 96, 100, 112, 127, 160, 192, 224, 255, 257, 448, 999])
def test_every_side_shows_the_same_scene(size):
    """Shrunk to 32 px, an image of any side is that of 512 px; its boxes lie at the same shares of the side."""
    scene = phantom.compose(3, SEED, findings=["Mass"])

    def shrunk(side: int) -> np.ndarray:
        image = phantom.render(scene, side, noise=False)
        assert image.shape == (side, side) and image.dtype == np.uint8
        return np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX), dtype=float)

    assert np.abs(shrunk(size) - shrunk(512)).mean() < 3
    (box,), (large,) = phantom.boxes(scene, size), phantom.boxes(scene, 512)
    assert box.x / size == pytest.approx(large.x / 512) and box.width / size == pytest.approx(large.width / 512)


@pytest.mark.slow
def test_every_tenth_side_is_drawn():
    for size in (*range(64, 1024, 10), 1024):
        assert phantom.render(phantom.compose(size, SEED), size).shape == (size, size)

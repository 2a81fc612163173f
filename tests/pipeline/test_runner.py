"""The runner, held to its promises on tiny notebooks: what runs when, what is left behind, what is said."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest
from notebook_form import problems

from chestxray import config
from chestxray.config import Rejection
from chestxray.data import own_tables
from chestxray.pipeline import notebooks, runner, stages, staleness
from chestxray.pipeline.stages import Stage

PARAMETERS = 'dataset = "none"\nprofile = "none"\nseed = 0\noverrides = {}\nextra = 1'


def notebook(*code):
    cells = [
        nbformat.v4.new_markdown_cell("<!-- colab -->\n# A title"),
        nbformat.v4.new_code_cell("# setup", metadata={"tags": ["setup"]}),
        nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(textwrap.dedent(source)) for source in code),
    ]
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": notebooks.KERNEL})


FIRST = """
from chestxray.config import open_study
study = open_study(dataset, profile, seed, overrides)
(study.paths.data / "first.csv").write_text(f"{dataset} {profile} {seed} {extra}")
print(study.paths.relative(study.paths.data))
"""
SECOND = """
from chestxray.config import open_study
paths = open_study(dataset, profile, seed, overrides).paths
text = (paths.data / "first.csv").read_text()
paths.manifest.write_text(text)
"""


@pytest.fixture
def at_once(monkeypatch):
    """Notebooks executed in this process, for tests of what runs when rather than of how it is executed."""

    def execute(line, stage):
        executed = notebooks.set_parameters(notebooks.read(line.repository / stage.notebook), line._parameters())
        for path in stage.reads(line.study.paths):
            line.study.require(path, "an earlier stage")
        names = {}
        for cell in executed.cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
        notebooks.write(line.rendered(stage), executed)

    monkeypatch.setattr(runner.Pipeline, "_execute_notebook", execute)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A root with a dataset of one table; a repository of two notebooks, the second reading what the first wrote."""
    root, repository = tmp_path / "root", tmp_path / "repository"
    monkeypatch.setenv("CHESTXRAY_ROOT", str(root))
    raw = root / "1_Datasets" / "tiny" / "raw"
    raw.mkdir(parents=True)
    (raw / "Data_Entry_2017.csv").write_text("Image Index\n")
    notebooks.write(repository / "first.ipynb", notebook(FIRST))
    notebooks.write(repository / "folder" / "second.ipynb", notebook(SECOND))
    return repository


STAGES = (
    Stage("2.1", "one", "One", "first.ipynb", writes=lambda p: [p.data / "first.csv"], reads_raw=True),
    Stage("2.2", "two", "Two", "folder/second.ipynb", lambda p: [p.data / "first.csv"], lambda p: [p.manifest]),
)


def run(repository, chosen=STAGES, seed=7, force=False, all_stages=STAGES, jobs=1):
    stream = io.StringIO()
    study = config.open_study("tiny", "quick", seed, {"cnn_epochs": 1})
    line = runner.Pipeline(study, "tiny", {"cnn_epochs": 1}, jobs, repository, all_stages, stream)
    complete = line.run(chosen, force)
    return complete, [stage.number for stage in line.executed], stream.getvalue(), line


def test_runs_in_order_and_nothing_again(place, at_once):
    complete, executed, said, line = run(place)
    assert complete and executed == ["2.1", "2.2"]
    assert line.study.paths.manifest.read_text() == "tiny quick 7 1"
    assert "2.1 One: done" in said
    assert run(place)[1] == []
    assert "2.2 Two: up to date" in run(place)[2]
    assert run(place, force=True)[1] == ["2.1", "2.2"]


def test_what_cannot_be_used_is_told_after_stage_2_1(place, at_once):
    data = config.Paths("tiny").data
    name = os.fsdecode(b"R\xf6.png") if sys.platform == "linux" else "R.png"
    (data / "raw" / name).write_text("")  # a name that is not UTF-8 does no harm
    rows = [Rejection(file, "0 bytes", "it is left out") for file in (name, "a.png", "b.png", "c.png")]
    (data / "rejected.csv").write_text(own_tables.rejections_frame(rows).to_csv(index=False), "utf-8")
    complete, executed, said, _ = run(place)
    assert complete and executed == ["2.1", "2.2"]
    first = [f"  {config.printable(file)}: 0 bytes; it is left out\n" for file in (name, "a.png", "b.png")]
    head = "4 rows, values or images cannot be used, the first three:\n"
    assert "2.1 One: done (0 s)\n" + head + "".join(first) in said
    assert said.count("cannot be used") == 1 and f"{Path('1_Datasets', 'tiny', 'rejected.csv')}: 4 rows\n" in said


def test_rendered_notebook_lies_beside_the_results(place):
    *_, line = run(place)
    rendered = line.study.paths.results / "notebooks" / "folder" / "second.ipynb"
    executed = notebooks.read(rendered)
    assert [cell.execution_count for cell in executed.cells if cell.cell_type == "code"] == [1, 2, 3]
    parameters = notebooks.tagged(executed, "parameters").source.split("\n")
    assert parameters == [
        'dataset = "tiny"',
        'profile = "quick"',
        "seed = 7",
        "overrides = {'cnn_epochs': 1}",
        "extra = 1",
    ]
    assert '"execution"' not in rendered.read_text()  # when each cell ran
    assert "<h1" in rendered.with_suffix(".html").read_text()
    assert not list(rendered.parent.glob(".*"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("seed", ["2.1", "2.2"]),
        ("raw table", ["2.1"]),
        ("label map", ["2.1"]),
        ("prose", ["2.1"]),
        ("stamp", []),
        ("outputs", []),
        ("own parameter", ["2.1", "2.2"]),
        ("target removed", ["2.1"]),
        ("input edited", ["2.1", "2.2"]),
    ],
)
def test_what_makes_a_stage_stale(place, at_once, change, expected):
    run(place)
    paths = config.open_study("tiny", "quick", 7).paths
    source = place / "first.ipynb"
    changed = notebooks.read(source)
    if change == "raw table":
        (paths.raw / "Data_Entry_2017.csv").write_text("Image Index,Finding Labels\n")
    elif change == "label map":
        paths.labels.write_text("Normal,No Finding\n")
    elif change == "prose":
        changed.cells[0].source += "\nMore words."
    elif change == "stamp":
        changed = notebooks.stamp(changed, "first.ipynb")
    elif change == "outputs":
        changed.cells[2].outputs = [nbformat.v4.new_output("stream", text="old")]
    elif change == "own parameter":
        changed.cells[2].source = PARAMETERS.replace("extra = 1", "extra = 2")
    elif change == "target removed":
        (paths.data / "first.csv").unlink()
    elif change == "input edited":
        (paths.data / "first.csv").write_text("by hand")
    if change in ("prose", "stamp", "outputs", "own parameter"):
        notebooks.write(source, changed)
    if change == "input edited":
        assert run(place, STAGES[1:], seed=7)[1] == ["2.2"]
        assert paths.manifest.read_text() == "by hand"
        return
    assert run(place, seed=8 if change == "seed" else 7)[1] == expected


def test_only_takes_earlier_files_as_they_are(place):
    complete, executed, said, _ = run(place, STAGES[1:])
    assert not complete and executed == []
    assert "1_Datasets/tiny/first.csv is missing: run stage 2.1 One first" in said
    assert "Traceback" not in said


def test_failure_names_notebook_and_cell_and_the_next_run_goes_on_there(place):
    notebooks.write(place / "folder" / "second.ipynb", notebook("print('before')", "1 / 0"))
    complete, executed, said, line = run(place)
    assert not complete and executed == ["2.1"]
    assert "folder/second.ipynb, cell 5:" in said
    assert "ZeroDivisionError: division by zero" in said
    assert "\x1b" not in said
    kept = line.rendered(STAGES[1]).with_suffix(".failed.ipynb")
    assert f"What ran is kept in {kept}" in said
    assert notebooks.read(kept).cells[3].outputs[0].text == "before\n"
    assert not line.rendered(STAGES[1]).exists()

    notebooks.write(place / "folder" / "second.ipynb", notebook(SECOND))
    assert run(place)[1] == ["2.2"]
    assert not kept.exists()


def test_what_does_not_need_a_failed_stage_runs_all_the_same(place, at_once, monkeypatch):
    notebooks.write(place / "other.ipynb", notebook("done = True"))
    every = [*STAGES, Stage("3", "three", "Three", "other.ipynb")]
    execute = runner.Pipeline._execute_notebook

    def failing(line, stage):
        if stage.number == "2.1":
            raise config.StudyError("first.ipynb: broken")
        execute(line, stage)

    monkeypatch.setattr(runner.Pipeline, "_execute_notebook", failing)
    complete, executed, said, line = run(place, every, all_stages=every)
    assert not complete and executed == ["3"] and [stage.number for stage in line.failed] == ["2.1"]
    assert "2.2 Two: not run, it needs a stage that failed" in said
    monkeypatch.setattr(runner.Pipeline, "_execute_notebook", execute)
    assert run(place, every, all_stages=every)[1] == ["2.1", "2.2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda place, paths: paths.manifest.unlink(), "2.2 Two: started\n"),
        (lambda place, paths: (paths.data / "first.csv").write_text("x"), "2.2 Two: started (changed: first.csv)"),
        (
            lambda place, paths: notebooks.write(place / "folder" / "second.ipynb", notebook(SECOND + "\n1 + 1")),
            "2.2 Two: started (changed: notebook)",
        ),
    ],
)
def test_it_says_why_a_stage_runs_again(place, at_once, change, words):
    run(place)
    change(place, config.open_study("tiny", "quick", 7).paths)
    assert words in run(place, STAGES[1:])[2]


def test_an_input_with_the_same_content_makes_nothing_stale(place, at_once):
    *_, line = run(place)
    first = line.study.paths.data / "first.csv"
    first.write_bytes(first.read_bytes())
    os.utime(first, (1, 1))
    assert run(place)[1] == []


def test_users_errors_are_one_line(place):
    code = "from chestxray.config import StageMissing\nraise StageMissing('manifest.csv is missing: run 2.1 first')"
    notebooks.write(place / "first.ipynb", notebook(code))
    said = run(place)[2].split("\n")
    assert "    StageMissing: manifest.csv is missing: run 2.1 first" in said
    assert not any("raise" in line for line in said)


def test_a_dead_kernel_is_reported(place):
    notebooks.write(place / "first.ipynb", notebook("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"))
    complete, _, said, line = run(place)
    assert not complete
    assert "first.ipynb:" in said and "--jobs 1" in said
    assert line.rendered(STAGES[0]).with_suffix(".failed.ipynb").exists()


def test_notebooks_alongside_share_the_cores(place):
    """Each waits until the other is there: one after the other, neither would see two."""
    show = """
    import os, pathlib, time
    pathlib.Path(f"{os.getpid()}.here").touch()
    deadline = time.monotonic() + 60
    while (running := len(list(pathlib.Path().glob("*.here")))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    print(os.environ["OMP_NUM_THREADS"], running)
    """
    both = []
    for name in ("a", "b"):
        notebooks.write(place / f"{name}.ipynb", notebook(show))
        both.append(Stage(f"4.{name}", name, name, f"{name}.ipynb", alongside=True))
    complete, _, _, line = run(place, both, all_stages=both, jobs=2)
    assert complete
    for stage in both:
        threads, running = notebooks.read(line.rendered(stage)).cells[3].outputs[0].text.split()
        assert (int(threads), int(running)) == (max(1, os.cpu_count() // 2), 2)


def test_stages_that_become_ready_together_run_in_order(place, at_once):
    numbers = [f"4.{i}" for i in range(12)]
    for number in numbers:
        notebooks.write(place / f"{number}.ipynb", notebook("done = True"))
    after = [Stage(n, n, n, f"{n}.ipynb", reads=lambda p: [p.data / "first.csv"]) for n in numbers]
    assert run(place, [STAGES[0], *after])[1] == ["2.1", *numbers]


def test_in_place_refreshes_what_is_committed(place):
    (place / "chestxray").symlink_to(config.REPOSITORY / "chestxray")  # for the set-up cell
    before = notebooks.stamp(notebooks.read(place / "first.ipynb"), "first.ipynb")
    notebooks.write(place / "first.ipynb", before)
    *_, line = run(place)
    assert line.refresh(STAGES[:1]) == [place / "first.ipynb"]
    text = (place / "first.ipynb").read_text()
    after = notebooks.read(place / "first.ipynb")
    assert problems(after, "first.ipynb", len(text)) == []
    assert str(line.study.paths.root) not in text
    assert after.cells[3].outputs[0].text == "1_Datasets/tiny\n"
    assert run(place)[1] == []
    line.refresh(STAGES[:1])
    assert (place / "first.ipynb").read_text() == text


def test_a_killed_run_leaves_no_process_and_goes_on(place):
    waiting = "import os, time, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(120)"
    notebooks.write(place / "folder" / "second.ipynb", notebook(waiting))
    code = f"""
        import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
        import test_runner, pathlib
        test_runner.run(pathlib.Path({str(place)!r}))
    """
    runner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=config.REPOSITORY)
    pid = place / "folder" / "pid"
    assert _within(180, lambda: pid.exists() and pid.read_text())
    with pytest.raises(config.StudyError, match="another run works on it"):
        run(place)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert _within(20, lambda: not _alive(int(pid.read_text())))
    notebooks.write(place / "folder" / "second.ipynb", notebook(SECOND))
    _, executed, _, line = run(place)
    assert executed == ["2.2"]
    assert not list(line.rendered(STAGES[1]).parent.glob(".*"))


def _within(seconds, condition):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False


def _alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return (
        Path(f"/proc/{process}/stat").read_text().split(")")[-1].split()[0] != "Z" if Path("/proc").exists() else True
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"2.1": 1}', '{"2.1": [], "2.2": {"code": 1}}'])
def test_unreadable_record_only_costs_a_run(place, at_once, content):
    *_, line = run(place)
    line.state.write_text(content)
    assert run(place)[1] == ["2.1", "2.2"]
    json.loads(line.state.read_text())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [stage.number for stage in stages.STAGES]),
        (["2"], ["2.1", "2.2"]),
        (["4.3"], ["4.3a", "4.3b", "4.3c", "4.3d"]),
        (["5", "2.1"], ["2.1", "5"]),
        (["4.3a", "4.ensemble"], ["4.3a", "4.4"]),
        (["CNN", "eda", "1"], ["1", "3", "4.1"]),
    ],
)
def test_choose(words, expected):
    assert [stage.number for stage in stages.choose(words)] == expected


def test_choose_names_the_good_ones():
    with pytest.raises(config.StudyError, match=r"'4.9' is unknown; there are 1 \(data\), .*4.3a \(fine_tuning_3a\)"):
        stages.choose(["4.9"])


def test_every_stage_reads_what_an_earlier_one_writes(tmp_path):
    paths = config.Paths("phantom", tmp_path)
    written = set()
    for stage in stages.STAGES:
        assert set(stage.reads(paths)) <= written
        written |= set(stage.writes(paths))
    numbers = " ".join(stage.number for stage in stages.STAGES)
    assert numbers == "1 2.1 2.2 3 4.0 4.1 4.2 4.3a 4.3b 4.3c 4.3d 4.4 5"


def test_code_fingerprint_follows_imports_and_ignores_words(tmp_path):
    def fingerprint(top, below):
        (tmp_path / "top.py").write_text(top)
        (tmp_path / "below.py").write_text(below)
        (tmp_path / "other.py").write_text("VALUE = 1")
        cell = nbformat.v4.new_code_cell("%matplotlib inline\nfrom chestxray import top")
        return staleness.Modules(tmp_path).of_notebook(nbformat.v4.new_notebook(cells=[cell]))

    lazy = "def f():\n    from chestxray.below import g\n    return g()"
    base = fingerprint(lazy, '"""Words."""\nA = 1\n"""What A is."""')
    assert fingerprint(lazy, "# other words\nA = 1") == base
    assert fingerprint('"""New."""\n' + lazy, "A = 1") == base
    assert fingerprint(lazy, "A = 2") != base
    assert fingerprint("def f(): pass", "A = 1") != base


ROOMS = {
    "data/__init__.py": "from chestxray.config import lazy",
    "data/tables.py": "from chestxray.data.units import MM\ndef read(): return MM",
    "data/units.py": "MM = 1",
    "data/other.py": "B = 1",
    "data/phantom/__init__.py": "",
    "data/phantom/anatomy.py": "from chestxray.data import units",
    "plots/__init__.py": "",
    "plots/style.py": "WIDTH = 9",
}
DATA = {name for name in ROOMS if name.startswith("data/")}


@pytest.mark.parametrize(
    ("cell", "depends_on"),
    [
        ("from chestxray.data import tables", {"data/__init__.py", "data/tables.py", "data/units.py"}),
        ("from chestxray.data.tables import read", {"data/__init__.py", "data/tables.py", "data/units.py"}),
        ("import chestxray.data.tables", {"data/__init__.py", "data/tables.py", "data/units.py"}),
        ("from chestxray.data import read", DATA),
        ("from chestxray import data", DATA),
        (
            "from chestxray.data.phantom import anatomy",
            {"data/__init__.py", "data/phantom/__init__.py", "data/phantom/anatomy.py", "data/units.py"},
        ),
        ("from chestxray.plots import style as s", {"plots/__init__.py", "plots/style.py"}),
    ],
)
def test_code_fingerprint_enters_rooms(tmp_path, cell, depends_on):
    """An edit to a file of a room changes the fingerprint of just those notebooks whose imports reach the file."""
    for name, code in ROOMS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    top = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    base = staleness.Modules(tmp_path).of_notebook(top)
    changing = set()
    for name, code in ROOMS.items():
        (tmp_path / name).write_text(code + "\nADDED = 1")
        if staleness.Modules(tmp_path).of_notebook(top) != base:
            changing.add(name)
        (tmp_path / name).write_text(code)
    assert changing == depends_on


def test_a_label_map_of_an_earlier_run_is_told_before_it_is_used_or_replaced(tiny_raw, study_of, tmp_path):
    study = study_of(tiny_raw)
    kept, other = study.paths.labels, tmp_path / "other.csv"
    kept.write_text("from,to\nTB,Mass\n")
    other.write_text("TB,Nodule\n")

    def first(labels):
        return runner.Pipeline(study, str(tiny_raw), labels=labels).look_ahead([])[0]

    assert re.search(r"labels\.csv: .* of an earlier run is used; delete this file", first(None))
    assert re.search(r"labels\.csv: .*, which .*other\.csv replaces: stage 2\.1 is stale", first(other))
    assert first(tmp_path / shutil.copy(kept, tmp_path / "same.csv")).startswith("Data_Entry_2017_v2020.csv: 60 rows")

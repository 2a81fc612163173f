"""Every committed notebook, held to the form of `notebook_form`; and the tools that bring it there."""

import ast
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import texts
from notebook_form import problems

from chestxray.config import REFERENCE, REPOSITORY, StudyError
from chestxray.pipeline import documents, notebooks, staleness
from chestxray.pipeline.stages import BESIDE, STAGES

COMMITTED = notebooks.find()
NAMES = [path.relative_to(REPOSITORY).as_posix() for path in COMMITTED]
OF_STAGES = [path for path, name in zip(COMMITTED, NAMES, strict=True) if name not in BESIDE]


def parameters(notebook):
    """The values that the cell tagged parameters assigns."""
    body = ast.parse(notebooks.tagged(notebook, "parameters").source).body
    return {line.targets[0].id: ast.literal_eval(line.value) for line in body if isinstance(line, ast.Assign)}


def test_the_notebooks_are_those_of_the_stages_and_those_beside():
    assert sorted([*BESIDE, *(stage.notebook for stage in STAGES if stage.notebook)]) == NAMES


@pytest.mark.parametrize("path", COMMITTED, ids=NAMES)
def test_committed_notebook(path):
    name = path.relative_to(REPOSITORY).as_posix()
    assert problems(notebooks.read(path), name, path.stat().st_size) == []


@pytest.mark.parametrize("path", OF_STAGES, ids=[path.stem for path in OF_STAGES])
def test_outputs_are_of_the_parameters_shown(path):
    """The data, profile and seed that the outputs name are the ones in the parameters cell."""
    notebook = notebooks.read(path)
    values, said = parameters(notebook), texts(notebook)
    assert set(re.findall(r"\bprofile +'?(quick|cpu|gpu)\b", said)) == {values["profile"]}
    assert set(re.findall(r"\bprofile +\w+, seed (\d+)", said)) == {str(values["seed"])}
    assert ("phantom images" in said) == (values["dataset"] == "phantom")


def test_a_stages_notebook_opens_as_that_stage():
    for stage in filter(lambda stage: stage.notebook, STAGES):
        sources = "\n".join(cell.source for cell in notebooks.read(REPOSITORY / stage.notebook).cells)
        assert f'study = begin("{stage.number}", dataset, profile, seed, overrides)' in sources


def test_how_a_notebook_opens_makes_no_stage_stale():
    opens, other = (
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        for source in ("from chestxray.pipeline.opening import begin", "")
    )
    modules = staleness.Modules(REPOSITORY / staleness.PACKAGE)
    assert modules.of_notebook(opens) == modules.of_notebook(other)


def test_all_committed_notebooks_are_of_one_run():
    runs = {tuple(str(parameters(notebooks.read(path))[name]) for name in notebooks.PARAMETERS) for path in OF_STAGES}
    assert len(runs) == 1


@pytest.mark.parametrize("name", BESIDE)
def test_notebooks_beside_the_study_are_of_the_committed_reference(name):
    key = json.loads((REFERENCE / "ensemble" / "run.json").read_text("utf-8"))["key"]
    said = re.findall(r"key of the fit (\w+)", texts(notebooks.read(REPOSITORY / name)))
    assert said == [key], "run chestxray maintain demonstrate"


def test_readme_shows_the_reference_results():
    readme = (REPOSITORY / "README.md").read_text()
    assert documents.fill_results(readme) == readme, "run chestxray maintain stamp"


def good():
    """A notebook with nothing to object to."""
    cells = [
        nbformat.v4.new_markdown_cell("<!-- colab -->\n# A title\n\n```python\n# no title\n```"),
        nbformat.v4.new_code_cell("# setup", metadata={"tags": ["setup"]}),
        nbformat.v4.new_code_cell("dataset = 'a'  # which\nseed = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print(1)", outputs=[nbformat.v4.new_output("stream", text="1\n")]),
    ]
    for count, cell in enumerate(cells[1:], 1):
        cell.execution_count = count
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": notebooks.KERNEL})
    return notebooks.normalise(notebooks.stamp(notebook, "4_models/x.ipynb"))


def objections(notebook, path="4_models/x.ipynb", size=1000):
    return problems(notebook, path, size)


def test_check_has_nothing_against_a_good_one():
    assert objections(good()) == []


PLACE = "/".join(("", "home", "someone"))
"""A path as some machine has it, made here so that the repository holds none."""


@pytest.mark.parametrize(
    ("change", "objection"),
    [
        (lambda n: n.cells[3].update(execution_count=5), "not executed in order"),
        (lambda n: n.cells[3].outputs.append(nbformat.v4.new_output("stream", text=f"in {PLACE}/x")), "absolute path"),
        (lambda n: n.cells[3].update(source=r"open('C:\\Users\\x')"), "absolute path"),
        (lambda n: n.metadata.update(collapsed={}), "not in normal form"),
        (lambda n: n.cells[0].update(source=n.cells[0].source.replace("welcome?src=", "welcome?")), "buttons"),
        (lambda n: n.cells[1].update(source="import os"), "set-up cell"),
        (lambda n: n.cells[0].update(source=n.cells[0].source + "\n# Another"), "2 titles"),
    ],
)
def test_check_objects(change, objection):
    notebook = good()
    change(notebook)
    assert any(objection in line for line in objections(notebook))


def test_check_objects_to_size_and_to_another_files_buttons():
    assert "1.6 MB" in objections(good(), size=1_600_000)[0]
    assert "buttons" in objections(good(), path="4_models/y.ipynb")[0]


def test_buttons_lead_to_the_file(monkeypatch):
    monkeypatch.setattr(notebooks, "address", lambda: "https://github.com/someone/a-study")
    line = good().cells[0].source.split("\n")[0]
    assert "(https://colab.research.google.com/github/someone/a-study/blob/main/4_models/x.ipynb)" in line
    assert (
        "(https://kaggle.com/kernels/welcome?src=https://github.com/someone/a-study/blob/main/4_models/x.ipynb)" in line
    )
    before = good()
    monkeypatch.setattr(notebooks, "address", lambda: "https://github.com/other/fork")
    moved = notebooks.stamp(before, "5_results/y.ipynb")
    assert moved.cells[0].source.count("/other/fork/blob/main/5_results/y.ipynb") == 2
    assert "a-study" not in moved.cells[0].source + moved.cells[1].source
    with pytest.raises(StudyError, match="no line <!-- colab -->"):
        notebooks.stamp(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# T")]), "x.ipynb")


def test_set_parameters_changes_these_lines_only():
    cell = nbformat.v4.new_code_cell(
        "# Which data.\ndataset = 'a'  # a name\nseed = (\n    1\n)\nother = 2", metadata={"tags": ["parameters"]}
    )
    notebook = nbformat.v4.new_notebook(cells=[cell])
    changed = notebooks.set_parameters(notebook, {"dataset": 'b"c', "seed": 3}).cells[0].source
    assert changed == '# Which data.\ndataset = "b\\"c"  # a name\nseed = 3\nother = 2'
    with pytest.raises(StudyError, match="doesn't assign profile"):
        notebooks.set_parameters(notebook, {"profile": "quick"})


def test_normalise_leaves_no_trace_of_the_run():
    notebook = good()
    notebook.cells[3].execution_count = 9
    notebook.cells[3].metadata["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    notebook.cells[3].id = "random"
    notebook.cells[3].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="noise"))
    notebook.metadata["collapsed"] = {"input_path": PLACE}
    notebook.metadata["language_info"] = {"version": "3.11.7"}
    assert notebooks.normalise(notebook) == good()
    assert notebooks.normalise(good()) == good()


def test_normalise_keeps_stderr_on_demand_but_for_the_greetings():
    greetings = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
    greetings += "I0000 00:00:1795384984.283568   18411 port.cc:153] oneDNN custom operations are on.\n"
    greetings += "E0000 00:00:1795385420.394978   21156 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA\n"
    notebook = good()
    for text in (greetings, greetings + "UserWarning: mind this\n" + greetings):
        notebook.cells[3].outputs.append(nbformat.v4.new_output("stream", name="stderr", text=text))
    kept = notebooks.normalise(notebook, keep_stderr=True).cells[3].outputs
    assert [output.text for output in kept] == ["1\n", "UserWarning: mind this\n"]
    assert notebooks.normalise(notebook) == good()


def test_normalise_joins_what_a_cell_printed_bit_by_bit():
    notebook = good()
    more = [("stdout", "2\n"), ("stderr", "noise"), ("stdout", "3\n")]
    notebook.cells[3].outputs += [nbformat.v4.new_output("stream", name=name, text=text) for name, text in more]
    notebook.cells[3].outputs.append(nbformat.v4.new_output("display_data", data={"text/plain": "a figure"}))
    notebook.cells[3].outputs.append(nbformat.v4.new_output("stream", text="4\n"))
    first, figure, last = notebooks.normalise(notebook).cells[3].outputs
    assert (first.text, last.text) == ("1\n2\n3\n", "4\n") and figure.data == {"text/plain": "a figure"}
    first, noise, *_ = notebooks.normalise(notebook, keep_stderr=True).cells[3].outputs
    assert (first.text, noise.text) == ("1\n2\n", "noise")


def test_cells_keep_their_identifiers_when_others_are_added():
    more = good()
    more.cells.insert(2, nbformat.v4.new_markdown_cell("words"))
    more.cells.append(nbformat.v4.new_code_cell("print(1)"))
    ids = [cell.id for cell in notebooks.normalise(more).cells]
    assert [ids[i] for i in (0, 1, 3, 4)] == [cell.id for cell in good().cells]
    assert len(set(ids)) == len(ids)


def run_setup(cwd, times=1):
    """Run the set-up cell in a bare process, as in a notebook of this folder."""
    code = [notebooks.setup_source()] * times + ["import os; print(os.getcwd())"]
    command = [sys.executable, "-I", "-S", "-c", "\n".join(code)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def origin(tmp_path):
    """A small repository whose set-up prints where it is."""
    folder = tmp_path / "published" / "a-study"
    (folder / "chestxray" / "pipeline").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    (folder / "chestxray" / "pipeline" / "setup.py").write_text("print('set up')")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


def test_setup_cell_is_short():
    assert len([line for line in notebooks.setup_source().split("\n") if line.strip()]) <= 6


def test_setup_cell_finds_the_repository_or_fetches_it_once(origin, tmp_path, monkeypatch):
    """In a clone, from its root and a notebook's folder; alone, fetched beside the notebook; twice, without harm."""
    monkeypatch.setattr(notebooks, "address", origin.as_uri)
    for cwd in (origin, origin / "notebooks"):
        done = run_setup(cwd)
        assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["set up", str(cwd)]), done.stderr
    alone = tmp_path / "alone"
    alone.mkdir()
    done = run_setup(alone, times=2)
    assert (done.returncode, done.stdout.split("\n")[:3]) == (0, ["set up", "set up", str(alone)]), done.stderr
    assert (alone / "a-study" / "chestxray").is_dir()


def test_setup_cell_that_cannot_fetch_ends_in_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "address", (tmp_path / "none" / "nowhere").as_uri)
    done = run_setup(tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().endswith("AssertionError: not fetched: check git and network, then run this cell again")


def test_setup_makes_the_package_importable_and_says_so(tmp_path):
    code = (
        notebooks.setup_source()
        + "\nimport os; from chestxray import config\nprint(config.REPOSITORY, os.environ['PYTHONPATH'])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=REPOSITORY / "4_models", capture_output=True, text=True
    )
    said, where = done.stdout.strip().split("\n")
    assert said.startswith("Set up: the repository; nothing to install; Python 3."), done.stderr
    assert where.split()[0] == str(REPOSITORY) and where.split()[1].split(os.pathsep)[0] == str(REPOSITORY)


def test_results_table(tmp_path):
    table = tmp_path / "metrics.csv"
    table.write_text(
        "model,metric,estimate,low,high,n_images\n"
        "cnn,macro_auroc,0.9004,0.85,0.95,10\ncnn,accuracy,0.5,0.4,0.6,10\nmean,macro_f1,0.5,0.4,0.6,10\n"
    )
    rows = documents.results_rows(documents.read_metrics(table))
    assert rows == [
        ["model", "balanced accuracy", "macro-F1", "macro AUROC", "AUROC, six findings"],
        ["1 CNN", "–", "–", "0.900 (0.850–0.950)", "–"],
        ["mean", "–", "0.500 (0.400–0.600)", "–", "–"],
    ]
    assert documents.markdown_table(rows).split("\n")[1] == "| --- | --: | --: | --: | --: |"
    table.write_text("model,metric\ncnn,macro_f1\n")
    with pytest.raises(StudyError, match=r"metrics.csv can't be read .*'estimate'"):
        documents.read_metrics(table)


def test_readme_without_markers_is_refused():
    filled = documents.fill_results("a\n<!-- results:start -->\nold\n<!-- results:end -->\nb")
    assert filled.startswith("a\n<!-- results:start -->\n| model | ") and filled.endswith(" |\n<!-- results:end -->\nb")
    with pytest.raises(StudyError, match="markers"):
        documents.fill_results("a")


def test_what_is_no_notebook_is_named(tmp_path):
    (tmp_path / "x.ipynb").write_text("{")
    with pytest.raises(StudyError, match=r"x.ipynb is no notebook"):
        notebooks.read(tmp_path / "x.ipynb")

"""The study as tasks: finds what is stale, executes it in order, and tells what failed and where.

It owns the record of what ran with what, and the processes that execute notebooks. It must not know what happens
inside a notebook; which files a stage takes and leaves stands in `stages`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from doit.control import ExecNode, TaskControl, TaskDispatcher
from doit.dependency import Dependency, JsonDB
from doit.exceptions import BaseFail, TaskFailed
from doit.reporter import ZeroReporter
from doit.runner import MThreadRunner
from doit.task import Task
from nbformat import NotebookNode

from chestxray import files
from chestxray.config import PROFILES, REPOSITORY, StageMissing, Study, StudyError
from chestxray.data import sources
from chestxray.pipeline import notebooks
from chestxray.pipeline.progress import Progress
from chestxray.pipeline.stages import STAGES, Stage

ERROR_LINES = 15
"""Lines of a cell's traceback that are shown; the whole of it is in the notebook that is kept."""


def default_jobs(profile: str) -> int:
    """How many notebooks run at a time: two on CPUs, where two fits of one thread outrun one of two; one on a GPU."""
    return 1 if profile == "gpu" else min(2, os.cpu_count() or 1)


def shown(path: Path) -> str:
    """A path as it can be typed where the user is."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


class Failure(Exception):
    """A stage that did not run to its end; the message may have several lines."""


@dataclass
class Pipeline:
    """One run of the study.

    Attributes:
        study: dataset, profile and seed.
        source: `phantom`, a folder in the NIH layout, or the name of a dataset that is there already.
        overrides: the fields of the profile that differ, as the notebooks are told.
        jobs: how many notebooks may run at a time.
        repository: where the notebooks are.
        stages: all stages that there are.
        stream: where progress goes.
    """

    study: Study
    source: str = "phantom"
    overrides: dict[str, Any] = field(default_factory=dict)
    jobs: int = 1
    repository: Path = REPOSITORY
    stages: Sequence[Stage] = STAGES
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    executed: list[Stage] = field(default_factory=list, init=False)
    failed: list[Stage] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._progress = Progress(self.stream)
        self._modules = Modules(REPOSITORY / PACKAGE)
        self._workers: set[subprocess.Popen[str]] = set()

    @property
    def state(self) -> Path:
        """The record of which stage ran with what."""
        return self.study.paths.results / ".doit.db.json"

    def rendered(self, stage: Stage) -> Path:
        """Where the executed notebook of a stage goes."""
        return self.study.paths.results / "notebooks" / stage.notebook

    def run(self, chosen: Sequence[Stage], force: bool = False) -> bool:
        """Run what is stale of these stages, in order.

        Args:
            chosen: the stages to run; what others leave is taken as it is.
            force: run all of them, stale or not.

        Returns:
            Whether all of them are up to date now. What failed was said on the stream.

        Raises:
            StudyError: another run works on this dataset, it was unpacked with images of another size than the profile
                has, or the record can't be written.
        """
        self._check_size()
        with self._alone(), self._progress:
            tasks = [self._task(stage, chosen) for stage in chosen]
            control = TaskControl(tasks)
            control.process([task.name for task in tasks])
            record = Dependency(_Record, str(self.state))
            threads = MThreadRunner(record, _Reporter(self, record), always_execute=force, num_process=self.jobs)
            try:
                complete = threads.run_all(_InOrder(control.tasks, control.targets, control.selected_tasks)) == 0
            finally:
                for worker in list(self._workers):
                    worker.kill()
        return complete

    def refresh(self, chosen: Sequence[Stage]) -> list[Path]:
        """Write the executed notebooks of these stages where they are committed, in the form that is committed.

        Returns:
            The notebooks written.
        """
        targets = []
        for stage in chosen:
            if stage.notebook:
                target = self.repository / stage.notebook
                executed = notebooks.with_stamps_of(notebooks.read(target), notebooks.read(self.rendered(stage)))
                notebooks.write(target, notebooks.normalise(executed))
                targets.append(target)
        return targets

    def unpacked(self, stage: Stage) -> bool:
        """Whether this stage was run where the dataset was packed: there is nothing here to run it again with."""
        return stage.unpackable and sources.is_unpacked(self.study.paths)

    def _check_size(self) -> None:
        record, size = sources.unpacked(self.study.paths), self.study.profile.image_size
        if record is not None and record["image_size"] != size:
            there = record["image_size"]
            ways = [f"--profile {name}" for name, one in PROFILES.items() if one.image_size == there]
            raise StudyError(
                f"dataset {self.study.paths.dataset!r}: was unpacked with images of {there} px, not the {size} px "
                f"asked for; use {' or '.join([*ways, f'--set image_size={there}'])}"
            )

    def _task(self, stage: Stage, chosen: Sequence[Stage]) -> Task:
        paths = self.study.paths
        made_here = bool(stage.notebook) and not self.unpacked(stage)
        writes = stage.writes(paths) + ([self.rendered(stage)] if made_here else [])
        unchanged = _Unchanged(lambda: self._describe(stage), self.unpacked(stage))
        return Task(
            stage.number,
            [self._execute],
            file_dep=[str(path) for path in stage.reads(paths)],
            # Raw data is a folder, which doit can't compare, so what reads it is put after stage 1 by name.
            task_dep=[other.number for other in chosen if other.number == "1" and stage.reads_raw],
            targets=[str(path) for path in writes],
            uptodate=[unchanged],
            io={"capture": False},  # doit would redirect stdout for all threads at once
            meta={"stage": stage, "unchanged": unchanged},
        )

    def _describe(self, stage: Stage) -> dict[str, str]:
        """What a stage's outcome depends on besides the files it reads: a fingerprint for each kind of thing."""
        profile = json.dumps(dataclasses.asdict(self.study.profile), sort_keys=True)
        described = {"parameters": of_text(self.study.paths.dataset, profile, str(self.study.seed))}
        if not stage.notebook:
            place = str(Path(self.source).resolve()) if Path(self.source).is_dir() else self.source
            return described | {"source": of_text(place), "code": self._modules.of(["data.sources"])}
        if stage.reads_raw:
            described["raw data"] = of_raw(self.study.paths.raw)
        notebook = notebooks.set_parameters(notebooks.read(self.repository / stage.notebook), self._parameters())
        notebook_is, code_is = of_notebook(notebook), self._modules.of_notebook(notebook)
        return described | {"notebook": notebook_is, "code": code_is}

    def _parameters(self) -> dict[str, Any]:
        study = self.study
        values = (study.paths.dataset, study.profile.name, study.seed, self.overrides)
        return dict(zip(notebooks.PARAMETERS, values, strict=True))

    def _execute(self, task: Task) -> TaskFailed | None:
        """Run one stage; called by doit, in a thread, with the task."""
        stage = task.meta["stage"]
        self._progress.start(stage.label, task.meta["unchanged"].reason(task))
        try:
            if stage.notebook:
                self._execute_notebook(stage)
            else:
                sources.prepare_raw(self.source, self.study)
        except (StudyError, Failure) as error:
            self.failed.append(stage)
            self._progress.end(stage.label, "failed")
            self._progress.say(str(error))
            return TaskFailed("failed", report=False)
        self.executed.append(stage)
        self._progress.end(stage.label, "done")
        return None

    def _execute_notebook(self, stage: Stage) -> None:
        source, target = self.repository / stage.notebook, self.rendered(stage)
        for path in stage.reads(self.study.paths):
            self.study.require(path, f"stage {self._writer(path)}")
        places = {"source": str(source), "target": str(target), "folder": str(source.parent)}
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise:
            worker = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "chestxray.pipeline.execution",
                    json.dumps(places | {"parameters": self._parameters()}),
                ],
                stdin=subprocess.PIPE,  # held open: the worker ends when this process does, even if that is killed
                stdout=subprocess.PIPE,
                stderr=noise,
                env=self._environment(stage),
                text=True,
                start_new_session=True,
            )
            self._workers.add(worker)
            failure = self._follow(stage, worker)
            code = worker.wait()
            self._workers.discard(worker)
            if failure is None and code:
                noise.seek(0)
                lines = noise.read().strip().split("\n")[-ERROR_LINES:]
                failure = {"cell": None, "name": f"exit code {code}", "value": "", "traceback": lines}
        if failure is not None:
            raise Failure(self._explain(stage, failure))

    def _follow(self, stage: Stage, worker: subprocess.Popen[str]) -> dict[str, Any] | None:
        """Show what the worker reports until it ends; return its report of a failure."""
        failure = None
        for line in worker.stdout:
            message = json.loads(line)
            if message["event"] == "cell":
                self._progress.cell(stage.label, message["cell"], message["cells"])
            else:
                failure = message
        worker.stdout.close()
        return failure

    def _explain(self, stage: Stage, failure: dict[str, Any]) -> str:
        at = f", cell {failure['cell']}" if failure["cell"] else ""
        if failure["name"] in (StudyError.__name__, StageMissing.__name__) or not failure["traceback"]:
            lines = [f"{failure['name']}: {failure['value']}"]
        else:
            lines = failure["traceback"][-ERROR_LINES:]
        kept = self.rendered(stage).with_suffix(".failed.ipynb")
        where = [f"What ran is kept in {shown(kept)}"] if kept.exists() else []
        return "\n".join([f"{stage.notebook}{at}:", *(f"    {line}" for line in lines), *where])

    def _writer(self, path: Path) -> str:
        return next(stage.label for stage in self.stages if path in stage.writes(self.study.paths))

    def _environment(self, stage: Stage) -> dict[str, str]:
        search = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        variables = {
            **os.environ,
            "PYTHONPATH": search,
            "CHESTXRAY_ROOT": str(self.study.paths.root),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        variables.pop("MPLBACKEND", None)  # notebooks draw inline, whatever the shell has set
        if stage.alongside and self.jobs > 1:
            threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
            names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS", "LOKY_MAX_CPU_COUNT")
            variables |= dict.fromkeys(names, threads)
        return variables

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep a second run away from this dataset; the system lifts the lock when this process ends, however."""
        place = files.make_folder(self.study.paths.results) / ".doit.db.lock"
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with place.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                name = self.study.paths.dataset
                raise StudyError(f"dataset {name!r}: another run works on it; wait for its end, or end it") from error
            yield


class _Unchanged:
    """Tells doit whether a stage's description is the one of its last run, and keeps why not.

    A stage that was run elsewhere, and whose outcome was unpacked, is not asked.
    """

    def __init__(self, describe: Callable[[], dict[str, str]], elsewhere: bool) -> None:
        self._describe = describe
        self._elsewhere = elsewhere
        self._changed: list[str] = []

    def __call__(self, task: Task, values: dict[str, Any]) -> bool:
        if self._elsewhere:
            return True
        now = self._describe()
        before = values.get("description")
        task.value_savers.append(lambda: {"description": now})
        if before is not None:
            self._changed = [name for name in now if before.get(name) != now[name]]
        return before == now

    def reason(self, task: Task) -> str:
        """Why the stage runs again, in words; nothing when it runs for the first time."""
        missing = [Path(path).name for path in task.targets if not Path(path).exists()]
        changed = self._changed or ([] if missing else sorted(Path(path).name for path in task.dep_changed))
        return f"changed: {', '.join(changed)}" if changed else ""


class _InOrder(TaskDispatcher):
    """doit's dispatcher, which takes stages that become ready together in the order of the study."""

    def _update_waiting(self, processed: ExecNode | None) -> None:
        super()._update_waiting(processed)
        self.ready = deque(sorted(self.ready, key=lambda node: self.selected_tasks.index(node.task.name)))


class _Record(JsonDB):
    """doit's record as one file that is never half-written; an unreadable one counts as empty."""

    def _load(self) -> dict[str, Any]:
        try:
            return json.loads(Path(self.name).read_text("utf-8"))
        except (OSError, ValueError):
            return {}

    def dump(self) -> None:
        """Write the record."""
        files.atomic_write(Path(self.name), self.codec.encode(self._db).encode())


class _Reporter(ZeroReporter):
    """Says what doit decided, and keeps the record after every stage, so that a killed run loses none."""

    def __init__(self, pipeline: Pipeline, record: Dependency) -> None:
        super().__init__(pipeline.stream, {})
        self._pipeline = pipeline
        self._record = record

    def add_success(self, task: Task) -> None:
        """A stage ran to its end."""
        self._record.backend.dump()

    def skip_uptodate(self, task: Task) -> None:
        """A stage needn't run."""
        stage = task.meta["stage"]
        why = "unpacked, run elsewhere" if self._pipeline.unpacked(stage) else "up to date"
        self._pipeline._progress.say(f"{stage.label}: {why}")

    def add_failure(self, task: Task, fail: BaseFail) -> None:
        """A stage failed; what doit itself found wrong has not been said yet."""
        if fail.report:
            self._pipeline.failed.append(task.meta["stage"])
            self._pipeline._progress.say(f"{task.meta['stage'].label}: {fail.get_msg().strip()}")


PACKAGE = "chestxray"


def of_text(*texts: str) -> str:
    """A digest of some texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:".encode() + text.encode())
    return digest.hexdigest()


def of_raw(raw: Path) -> str:
    """Of a folder of raw data: the tables by content; images, too many to read, by name, size and time of change."""
    lines = []
    for folder, subfolders, names in os.walk(raw, followlinks=True):
        subfolders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            place = path.relative_to(raw).as_posix()
            if name.endswith((".csv", ".txt")):
                lines.append(f"{place} {hashlib.sha256(path.read_bytes()).hexdigest()}")
            elif not name.startswith("."):
                status = path.stat()
                lines.append(f"{place} {status.st_size} {status.st_mtime_ns}")
    return of_text(*lines)


def of_notebook(notebook: NotebookNode) -> str:
    """Of a notebook's cells without their outputs. What `chestxray stamp` writes doesn't count."""
    from chestxray.pipeline.notebooks import without_stamps

    return of_text(*(f"{cell.cell_type}\n{cell.source}" for cell in without_stamps(notebook).cells))


class Modules:
    """Fingerprints of modules of the package, each with all that it imports from the package.

    Modules are named from the package on: `config`, `data.manifest`; a sub-package by its folder, `data`.
    """

    def __init__(self, folder: Path) -> None:
        self._trees: dict[str, ast.Module] = {}
        self._files: dict[str, Path] = {}
        for path in folder.rglob("*.py"):
            place = path.relative_to(folder).with_suffix("").parts
            self._files[".".join(place[:-1] if place[-1] == "__init__" else place)] = path

    def of_notebook(self, notebook: NotebookNode) -> str:
        """Of what the notebook's cells import."""
        code = "\n".join(_python(cell.source) for cell in notebook.cells if cell.cell_type == "code")
        return self.of(self._imported(ast.parse(code), ""))

    def of(self, names: Iterable[str]) -> str:
        """Of these modules and what they import."""
        reached: set[str] = set()
        waiting = set(names)
        while waiting:
            name = waiting.pop()
            reached.add(name)
            waiting |= self._imported(self._tree(name), name) - reached
        return of_text(*(f"{name}\n{ast.dump(self._tree(name))}" for name in sorted(reached)))

    def _tree(self, name: str) -> ast.Module:
        if name not in self._trees:
            self._trees[name] = _without_docstrings(ast.parse(self._files[name].read_text("utf-8")))
        return self._trees[name]

    def _imported(self, tree: ast.Module, importer: str) -> set[str]:
        """The modules that the code imports, at its top or inside functions, with the sub-packages above them."""
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith(f"{PACKAGE}.")}
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node, importer)
                for alias in node.names if base is not None else ():
                    found |= self._named(base, alias, tree)
        above = {name.rpartition(".")[0] for name in found} | {name.partition(".")[0] for name in found}
        return (found | above) & self._files.keys() - {""}

    def _base(self, node: ast.ImportFrom, importer: str) -> str | None:
        """The module named after `from`; None if it isn't of the package."""
        if node.level:
            is_package = self._files.get(importer, Path()).stem == "__init__"
            parts = importer.split(".")
            parts = parts[: len(parts) - node.level + is_package]
            return ".".join([*parts, *filter(None, [node.module])])
        head, _, rest = (node.module or "").partition(".")
        return rest if head == PACKAGE else None

    def _named(self, base: str, alias: ast.alias, tree: ast.Module) -> set[str]:
        """The modules that `from base import alias` reaches in this code."""
        name = f"{base}.{alias.name}".lstrip(".")
        if name not in self._files:
            return {base, self._owner(base, alias.name)}
        if self._files[name].stem != "__init__":
            return {name}
        # A whole sub-package: what is taken from it by name, or all of it where it is passed on as it is.
        bound = alias.asname or alias.name
        taken = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_name(node.value, bound)]
        if len(taken) < sum(_is_name(node, bound) for node in ast.walk(tree)):
            return {name, *(other for other in self._files if other.startswith(f"{name}."))}
        return {name}.union(*(self._named(name, ast.alias(node.attr), tree) for node in taken))

    def _owner(self, base: str, name: str) -> str:
        """The module that defines what a sub-package hands on under this name by its `_OWNERS`."""
        for node in ast.walk(self._tree(base)) if base in self._files else ():
            if isinstance(node, ast.Assign) and _is_name(node.targets[0], "_OWNERS"):
                return f"{base}.{ast.literal_eval(node.value).get(name, '')}".lstrip(".")
        return base


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        for body in _bodies(node):
            body[:] = [statement for statement in body if not _is_text(statement)]
    return tree


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.body


def _is_text(statement: ast.stmt) -> bool:
    """A docstring, or the words below an attribute."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _python(source: str) -> str:
    """A cell's code as Python, its magics as the calls that they stand for."""
    try:
        ast.parse(source)
        return source
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager

        return TransformerManager().transform_cell(source)

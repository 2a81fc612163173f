"""Runner: finds the stages that are stale, executes them in order, and says what failed and where.

It owns the processes that execute notebooks. It must not know what happens inside a notebook; which files a stage
reads and writes stands in `stages`, what makes it stale in `staleness`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from chestxray import files
from chestxray.config import (
    NIH_9K,
    NIH_9K_LIST,
    PROFILES,
    REPOSITORY,
    StageMissing,
    Study,
    StudyError,
    printable,
    source_folder,
)
from chestxray.data import sources
from chestxray.pipeline import notebooks, staleness
from chestxray.pipeline.progress import Progress, shown
from chestxray.pipeline.stages import STAGES, Stage

ERROR_LINES = 15
"""Lines of a cell's traceback that are shown; the whole of it is in the notebook that is saved."""

STAGE_VARIABLE = "CHESTXRAY_STAGE"
"""Environment variable of a notebook that a run executes: the number of its stage."""


def default_jobs(profile: str) -> int:
    """How many notebooks run at a time: two on CPUs, where two fits of one thread outrun one of two; one on a GPU."""
    return 1 if profile == "gpu" else min(2, os.cpu_count() or 1)


@dataclass
class Pipeline:
    """One run of the study.

    Attributes:
        study: dataset, profile and seed.
        source: as `sources.prepare_raw` takes it.
        overrides: the fields of the profile that differ, as they are passed to the notebooks.
        jobs: how many notebooks may run at a time.
        repository: where the notebooks are.
        stages: all stages that there are.
        stream: where progress goes.
        folders: where the radiographs of nih_9k lie.
        labels: a label map, which is copied to the dataset.
    """

    study: Study
    source: str = "phantom"
    overrides: dict[str, Any] = field(default_factory=dict)
    jobs: int = 1
    repository: Path = REPOSITORY
    stages: Sequence[Stage] = STAGES
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    folders: Sequence[str] = ()
    labels: Path | None = None
    executed: list[Stage] = field(default_factory=list, init=False)
    failed: list[Stage] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._progress = Progress(self.stream)
        self._modules = staleness.Modules(REPOSITORY / staleness.PACKAGE)
        self._workers: set[subprocess.Popen[str]] = set()
        self._stopped = False
        self._told: set[tuple[str, ...]] = set()

    @property
    def state(self) -> Path:
        """The record of which stage ran with what."""
        return self.study.paths.results / ".stages.json"

    def rendered(self, stage: Stage) -> Path:
        """Where the executed notebook of a stage goes."""
        return self.study.paths.results / "notebooks" / stage.notebook

    def run(self, chosen: Sequence[Stage], force: bool = False) -> bool:
        """Run what is stale of these stages, in order.

        Args:
            chosen: the stages to run, in the order of the study; what others wrote is taken as it is.
            force: run all of them, stale or not.

        Returns:
            Whether all of them are up to date now. Failures were printed to the stream.

        Raises:
            StudyError: another run works on this dataset, it was unpacked with images of another size than the profile
                has, or the record can't be written.
        """
        self._check_size()
        with self._alone(), self._progress:
            if self.labels:
                files.atomic_write(self.study.paths.labels, self.labels.read_bytes())
            return self._run_stale(chosen, force)

    def refresh(self, chosen: Sequence[Stage]) -> list[Path]:
        """Write the executed notebooks of these stages where they are committed, in the form that is committed.

        Returns:
            The notebooks written.
        """
        targets, published = [], notebooks.address()
        for stage in chosen:
            if stage.notebook:
                executed = notebooks.stamp(notebooks.read(self.rendered(stage)), stage.notebook, published)
                targets.append(self.repository / stage.notebook)
                notebooks.write(targets[-1], notebooks.normalise(executed))
        return targets

    def ran(self, stage: Stage) -> bool:
        """Whether a stage's last run had this study's parameters."""
        return staleness.Record(self.state).described(stage.number).get("parameters") == self._chosen()

    def unpacked(self, stage: Stage) -> bool:
        """Whether this stage was run where the dataset was packed: there is nothing here to run it again with."""
        return stage.unpackable and sources.is_unpacked(self.study.paths)

    def look_ahead(self, chosen: Sequence[Stage]) -> list[str]:
        """What the tables of radiographs that are here say before any work: notes to print.

        Raises:
            StudyError: they cannot be used; or a chosen stage trains, and they cannot train a model.
        """
        paths = self.study.paths
        if self.study.is_phantom or sources.unpacked(paths) is not None:
            if self.labels:
                raise StudyError(f"--labels {self.labels}: dataset {paths.dataset!r} has its labels; leave it out")
            return []
        raw = source_folder(self.source) or paths.raw
        if not raw.exists():
            return []
        from chestxray.data import nih_tables, own_tables, preparation, splits  # here, because they import pandas
        from chestxray.images import pixels

        plan = preparation.make_plan(self.study, raw, self.labels)
        if any(stage.trains for stage in chosen):
            splits.require_trainable(plan.table, nih_tables.find_table(raw).name)
        self._told = {tuple(map(printable, line)) for line in plan.rejected}
        greys = () if paths.manifest.exists() else pixels.greys(plan.paths.values()).notes  # else stage 2.1 has told it
        return [*self._kept_map(), *plan.notes, *greys, *own_tables.summary(plan.rejected)]

    def _kept_map(self) -> list[str]:
        """That the label map of an earlier run is used, or that another replaces it."""
        kept = self.study.paths.label_map
        if not kept or (self.labels and self.labels.read_bytes() == kept.read_bytes()):
            return []
        if self.labels:
            return [f"{shown(kept)}: the label map of an earlier run, which {self.labels} replaces: stage 2.1 is stale"]
        return [f"{shown(kept)}: the label map of an earlier run is used; delete this file to read labels without it"]

    def _check_size(self) -> None:
        record, size = sources.unpacked(self.study.paths), self.study.profile.image_size
        if record is not None and record["image_size"] != size:
            there = record["image_size"]
            ways = [f"--profile {name}" for name, one in PROFILES.items() if one.image_size == there]
            raise StudyError(
                f"dataset {self.study.paths.dataset!r}: was unpacked with images of {there} px, not the {size} px "
                f"asked for; use {' or '.join([*ways, f'--set image_size={there}'])}"
            )

    def _run_stale(self, chosen: Sequence[Stage], force: bool) -> bool:
        """Start each stage, in the order of the study, once the stages that it needs are up to date."""
        record = staleness.Record(self.state)
        needs = {stage.number: self._needed(stage, chosen) for stage in chosen}
        waiting, done, lost = list(chosen), set(), set()
        running: dict[Future[bool], tuple[Stage, staleness.Entry]] = {}
        with ThreadPoolExecutor(self.jobs) as threads:
            try:
                while waiting or running:
                    for stage in [stage for stage in waiting if needs[stage.number] & lost]:
                        waiting.remove(stage)
                        lost.add(stage.number)
                        self._progress.say(f"{stage.label}: not run, it needs a stage that failed")
                    ready = next((stage for stage in waiting if needs[stage.number] <= done), None)
                    if ready is not None and len(running) < self.jobs:
                        waiting.remove(ready)
                        entry = self._entry(ready, record)
                        reason = self._stale(ready, record, entry, force)
                        if reason is None:
                            done.add(ready.number)
                        else:
                            running[self._start(ready, reason, threads)] = ready, entry
                    elif running:
                        for future in wait(running, return_when=FIRST_COMPLETED).done:
                            stage, entry = running.pop(future)
                            (done if future.result() else lost).add(stage.number)
                            if future.result():
                                record.write(stage.number, entry)
            finally:
                self._stopped = True
                for worker in list(self._workers):
                    worker.kill()
        return not lost

    def _needed(self, stage: Stage, chosen: Sequence[Stage]) -> set[str]:
        """The numbers of the chosen stages that write what this one reads; raw data is of stage 1."""
        paths = self.study.paths
        return {other.number for other in chosen if stage.inputs(paths) & set(other.writes(paths))}

    def _entry(self, stage: Stage, record: staleness.Record) -> staleness.Entry:
        """What the stage would run with now; for an unpacked one, which isn't compared, nothing."""
        if self.unpacked(stage):
            return {"description": {}, "inputs": {}}
        return record.entry(stage.number, self._describe(stage), stage.reads(self.study.paths))

    def _stale(self, stage: Stage, record: staleness.Record, entry: staleness.Entry, force: bool) -> str | None:
        """Why the stage must run, in words ("" where it is plain); None, printed to the stream, where it needn't."""
        unpacked = self.unpacked(stage)
        made_here = [self.rendered(stage)] if stage.notebook and not unpacked else []
        missing = [path for path in [*stage.writes(self.study.paths), *made_here] if not path.exists()]
        changed = [] if unpacked else record.changes(stage.number, entry)
        if changed == [] and not missing and not force:
            self._progress.say(f"{stage.label}: {'unpacked, run elsewhere' if unpacked else 'up to date'}")
            return None
        return f"changed: {', '.join(changed)}" if changed else ""

    def _describe(self, stage: Stage) -> dict[str, str]:
        """What a stage's outcome depends on besides the files it reads: a fingerprint for each kind of thing."""
        described = {"parameters": self._chosen()}
        if not stage.notebook:
            folder = source_folder(self.source)
            places = [str(Path(place).resolve()) for place in (folder, *self.folders) if place] or [self.source]
            if self.study.paths.dataset == NIH_9K:
                places.append(files.digest(NIH_9K_LIST))
            source = staleness.text_fingerprint(*places)
            return described | {"source": source, "code": self._modules.of(["data.sources"])}
        if stage.reads_raw:
            described["raw data"] = staleness.raw_fingerprint(self.study.paths.raw)
            if labels := self.study.paths.label_map:
                described["label map"] = files.digest(labels)
        notebook = notebooks.set_parameters(notebooks.read(self.repository / stage.notebook), self._parameters())
        described["notebook"] = staleness.notebook_fingerprint(notebook)
        return described | {"code": self._modules.of_notebook(notebook)}

    def _chosen(self) -> str:
        """The fingerprint of what the user chooses: dataset, profile with all its fields, and seed."""
        profile = json.dumps(dataclasses.asdict(self.study.profile), sort_keys=True)
        return staleness.text_fingerprint(self.study.paths.dataset, profile, str(self.study.seed))

    def _parameters(self) -> dict[str, Any]:
        study = self.study
        values = (study.paths.dataset, study.profile.name, study.seed, self.overrides)
        return dict(zip(notebooks.PARAMETERS, values, strict=True))

    def _start(self, stage: Stage, reason: str, threads: ThreadPoolExecutor) -> Future[bool]:
        """Execute a notebook's stage in a thread; stage 1 in this one, where Ctrl-C ends it."""
        if stage.notebook:
            return threads.submit(self._execute, stage, reason)
        ended: Future[bool] = Future()
        ended.set_result(self._execute(stage, reason))
        return ended

    def _execute(self, stage: Stage, reason: str) -> bool:
        """Run one stage; return whether it ran to its end."""
        self._progress.start(stage.label, reason)
        try:
            if stage.notebook:
                self._execute_notebook(stage)
            else:
                sources.prepare_raw(self.source, self.study, self.folders)
        except StudyError as error:
            if not self._stopped:
                self.failed.append(stage)
                self._progress.end(stage.label, "failed")
                self._progress.say(str(error))
            return False
        self.executed.append(stage)
        self._progress.end(stage.label, "done")
        if stage.number == "2.1":
            self._tell_of_unreadable()
        return True

    def _tell_of_unreadable(self) -> None:
        """Say which images stage 2.1 found unusable when it read them; what the tables tell was said before."""
        from chestxray.data import own_tables  # as above

        if (table := self.study.paths.rejected).exists():
            rows = list(csv.reader(table.read_text("utf-8").splitlines()))[1:]
            new = own_tables.summary([tuple(row) for row in rows if tuple(row) not in self._told])
            for line in [*new, f"{shown(table)}: {len(rows):,} rows"] if new else []:
                self._progress.say(line)

    def _execute_notebook(self, stage: Stage) -> None:
        source, target = self.repository / stage.notebook, self.rendered(stage)
        for path in stage.reads(self.study.paths):
            writer = next(other.label for other in self.stages if path in other.writes(self.study.paths))
            self.study.require(path, f"stage {writer}")
        job = json.dumps([str(source), str(target), self._parameters()])
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise:
            worker = subprocess.Popen(
                [sys.executable, "-m", "chestxray.pipeline.execution", job],
                stdin=subprocess.PIPE,  # held open: the worker ends when this process does, even if that is killed
                stdout=subprocess.PIPE,
                stderr=noise,
                env=self._environment(stage),
                text=True,
                start_new_session=True,
            )
            self._workers.add(worker)
            if self._stopped:
                worker.kill()
            failure = None
            for line in worker.stdout:
                message = json.loads(line)
                if "cells" in message:
                    self._progress.cell(stage.label, message["cell"], message["cells"])
                else:
                    failure = message
            worker.stdout.close()
            code = worker.wait()
            self._workers.discard(worker)
            if failure is None and code:
                noise.seek(0)
                lines = noise.read().strip().split("\n")
                failure = {"cell": None, "name": f"exit code {code}", "value": "", "traceback": lines}
        if failure is not None:
            raise StudyError(self._explain(stage, failure))

    def _explain(self, stage: Stage, failure: dict[str, Any]) -> str:
        at = f", cell {failure['cell']}" if failure["cell"] else ""
        lines = failure["traceback"][-ERROR_LINES:]
        if failure["name"] in (StudyError.__name__, StageMissing.__name__) or not lines:
            lines = [f"{failure['name']}: {failure['value']}"]
        failed = self.rendered(stage).with_suffix(".failed.ipynb")
        where = [f"What ran is kept in {shown(failed)}"] if failed.exists() else []
        return "\n".join([f"{stage.notebook}{at}:", *(f"    {line}" for line in lines), *where])

    def _environment(self, stage: Stage) -> dict[str, str]:
        search = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        variables = {
            **os.environ,
            "PYTHONPATH": search,
            "CHESTXRAY_ROOT": str(self.study.paths.root),
            STAGE_VARIABLE: stage.number,
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
        with (files.make_folder(self.study.paths.results) / ".stages.lock").open("w") as lock:
            try:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # Windows
                pass
            except BlockingIOError as error:
                name = self.study.paths.dataset
                raise StudyError(f"dataset {name!r}: another run works on it; wait for its end, or end it") from error
            yield

"""Runner: finds the stages that are stale, executes them in order, and says what failed and where.

It must not know what happens inside a notebook; which files a stage reads and writes stands in `stages`, what makes it
stale in `staleness`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from chestxray import files
from chestxray.config import NIH_9K, NIH_9K_LIST, PROFILES, REPOSITORY, Study, StudyError, printable, source_folder
from chestxray.data import sources
from chestxray.pipeline import notebooks, staleness
from chestxray.pipeline.stages import STAGES, Stage

if TYPE_CHECKING:
    from chestxray.pipeline.execution import Execution

EVERY = 30.0
"""Seconds between two lines about a notebook that runs."""

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
        stream: where lines on progress go.
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
        self._lock = threading.Lock()
        self._at: dict[str, tuple[str, float]] = {}  # where the running notebooks are, and when they began
        self._modules = staleness.Modules(REPOSITORY / staleness.PACKAGE)
        self._executions: set[Execution] = set()
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
        with self._alone(), self._telling():
            if self.labels:
                files.atomic_write(self.study.paths.labels, self.labels.read_bytes())
            return self._run_stale(chosen, force)

    def refresh(self, chosen: Sequence[Stage]) -> list[Path]:
        """Write the executed notebooks of these stages where they are committed, in the form that is committed.

        Returns:
            The notebooks written.
        """
        targets = []
        for stage in chosen:
            if stage.notebook:
                executed = notebooks.stamp(notebooks.read(self.rendered(stage)), stage.notebook)
                targets.append(self.repository / stage.notebook)
                notebooks.write(targets[-1], notebooks.normalise(executed))
        return targets

    def ran(self, stage: Stage) -> bool:
        """Whether a stage's last run had this study's parameters."""
        return staleness.read_record(self.state).get(stage.number, {}).get("parameters") == self._chosen()

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
        said = f"{files.shown(kept)}: the label map of an earlier run"
        if self.labels:
            return [f"{said}, which {self.labels} replaces: stage 2.1 is stale"]
        return [f"{said} is used; delete this file to read labels without it"]

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
        record = staleness.read_record(self.state)
        order = TopologicalSorter({stage: self._needed(stage, chosen) for stage in chosen})
        order.prepare()
        fresh: set[Stage] = set()
        running: dict[Future[bool], tuple[Stage, staleness.Fingerprints]] = {}
        threads = ThreadPoolExecutor(self.jobs)
        try:
            while (ready := sorted(order.get_ready(), key=chosen.index)) or running:
                for stage in ready:
                    now = self._fingerprints(stage)
                    reason = self._stale(stage, record.get(stage.number), now, force)
                    if reason is None:
                        fresh.add(stage)
                        order.done(stage)
                    else:
                        running[self._start(stage, reason, threads)] = stage, now
                for future in wait(running, return_when=FIRST_COMPLETED).done if not ready else ():
                    stage, now = running.pop(future)
                    if future.result():
                        record[stage.number] = now
                        files.atomic_write(self.state, json.dumps(record, indent=1).encode())
                        fresh.add(stage)
                        order.done(stage)
        finally:
            self._stopped = True
            for execution in list(self._executions):
                execution.kill()
            threads.shutdown(cancel_futures=True)
        for stage in chosen:
            if stage not in fresh and stage not in self.failed:
                self._say(f"{stage.label}: not run, it needs a stage that failed")
        return len(fresh) == len(chosen)

    def _needed(self, stage: Stage, chosen: Sequence[Stage]) -> set[Stage]:
        """The chosen stages that write what this one reads; raw data is of stage 1."""
        paths = self.study.paths
        return {other for other in chosen if stage.inputs(paths) & set(other.writes(paths))}

    def _stale(
        self, stage: Stage, then: staleness.Fingerprints | None, now: staleness.Fingerprints, force: bool
    ) -> str | None:
        """Why the stage must run, in words ("" where it is plain); None, printed to the stream, where it needn't."""
        unpacked = self.unpacked(stage)
        made_here = [self.rendered(stage)] if stage.notebook and not unpacked else []
        missing = [path for path in [*stage.writes(self.study.paths), *made_here] if not path.exists()]
        if (unpacked or then == now) and not missing and not force:
            self._say(f"{stage.label}: {'unpacked, run elsewhere' if unpacked else 'up to date'}")
            return None
        if unpacked or then is None or then == now:
            return ""
        changed = {Path(name).name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}
        return f"changed: {', '.join(sorted(changed))}"

    def _fingerprints(self, stage: Stage) -> staleness.Fingerprints:
        """What the stage would run with now."""
        paths = self.study.paths
        if self.unpacked(stage):
            return {}
        described = {"parameters": self._chosen()}
        if not stage.notebook:
            folder = source_folder(self.source)
            places = [str(Path(place).resolve()) for place in (folder, *self.folders) if place] or [self.source]
            if paths.dataset == NIH_9K:
                places.append(files.digest(NIH_9K_LIST))
            source = staleness.text_fingerprint(*places)
            return described | {"source": source, "code": self._modules.of(["chestxray.data.sources"])}
        described |= {paths.relative(path): files.digest(path) for path in stage.reads(paths) if path.is_file()}
        if stage.reads_raw:
            described["raw data"] = staleness.raw_fingerprint(paths.raw)
            if labels := paths.label_map:
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
        began = time.monotonic()
        self._say(f"{stage.label}: started{f' ({reason})' if reason else ''}")
        try:
            if stage.notebook:
                self._execute_notebook(stage)
            else:
                sources.prepare_raw(self.source, self.study, self.folders)
        except StudyError as error:
            if not self._stopped:
                self.failed.append(stage)
                self._say(f"{stage.label}: failed ({files.duration(time.monotonic() - began)})\n{error}")
            return False
        finally:
            self._at.pop(stage.label, None)
        self.executed.append(stage)
        self._say(f"{stage.label}: done ({files.duration(time.monotonic() - began)})")
        if stage.number == "2.1":
            self._tell_of_unreadable()
        return True

    def _tell_of_unreadable(self) -> None:
        """Say which images stage 2.1 found unusable when it read them; what the tables tell was said before."""
        from chestxray.data import own_tables  # as above

        if (table := self.study.paths.rejected).exists():
            rows = list(csv.reader(table.read_text("utf-8").splitlines()))[1:]
            new = own_tables.summary([tuple(row) for row in rows if tuple(row) not in self._told])
            for line in [*new, f"{files.shown(table)}: {len(rows):,} rows"] if new else []:
                self._say(line)

    def _execute_notebook(self, stage: Stage) -> None:
        from chestxray.pipeline.execution import Execution  # here, because a run with nothing to do needs no Jupyter

        for path in stage.reads(self.study.paths):
            writer = next(other.label for other in self.stages if path in other.writes(self.study.paths))
            self.study.require(path, f"stage {writer}")

        def report(cell: int, cells: int) -> None:
            if self._stopped:
                raise StudyError("stopped")
            self._at[stage.label] = f"cell {cell}/{cells}", began

        began = time.monotonic()
        source, variables = self.repository / stage.notebook, self._environment(stage)
        execution = Execution(source, self._parameters(), report, variables)
        self._executions.add(execution)
        execution.write(self.rendered(stage))
        self._executions.discard(execution)

    def _environment(self, stage: Stage) -> dict[str, str]:
        search = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        variables = {
            **os.environ,
            "PYTHONPATH": search,
            "CHESTXRAY_ROOT": str(self.study.paths.root),
            STAGE_VARIABLE: stage.number,
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        variables.pop("MPLBACKEND", None)  # notebooks draw inline, whatever the shell has set
        if stage.alongside and self.jobs > 1:
            threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
            names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS", "LOKY_MAX_CPU_COUNT")
            variables |= dict.fromkeys(names, threads)
        return variables

    def _say(self, line: str) -> None:
        with self._lock:
            print(line, file=self.stream, flush=True)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell of the time going by in cells that take long."""
        ended = threading.Event()

        def tell() -> None:
            while not ended.wait(EVERY):
                for label, (place, began) in list(self._at.items()):
                    self._say(f"{label}: {place}, {files.duration(time.monotonic() - began)}")

        threading.Thread(target=tell, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

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

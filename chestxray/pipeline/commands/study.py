"""Commands of the study: run, restore, colab, test."""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from chestxray.config import NIH_9K, PROFILES, REPOSITORY, SOURCES, StudyError, open_study
from chestxray.pipeline.commands.command import Commands, add_command, check_seed, known, without_greetings


def add_commands(commands: Commands) -> None:
    """Add the commands of the study to the command line."""
    run = add_command(commands, "run", run_study, root=True)
    source = "phantom; nih, nih-sample, nih_9k, fetched from Kaggle if not here; or a folder in the NIH layout"
    run.add_argument("--dataset", default="phantom", metavar=f"{'|'.join(SOURCES)}|DIR", help=source)
    own = "a table of two columns that maps own labels to the study's; kept with the dataset"
    run.add_argument("--labels", type=Path, metavar="FILE", help=own)
    run.add_argument("--profile", default="quick", choices=PROFILES, help="how large the run is (default: quick)")
    several = {"action": "extend", "nargs": "+", "default": []}
    place = "where nih_9k's radiographs lie, at 128 and 256 px or as the NIH's originals; may be given twice"
    run.add_argument("--from", **several, metavar="DIR", dest="folders", help=place)
    numbers = "numbers: 1, 2.1, 2.2, 3, 4.0, 4.1, 4.2, 4.3a … 4.3d, 4.4, 5; or names: data, trees, eda, cnn, ensemble …"
    run.add_argument("--only", **several, metavar="STAGE", help=numbers)
    run.add_argument("--force", action="store_true", help="run also what is up to date")
    run.add_argument("--in-place", action="store_true", help="write the executed notebooks over the committed ones")
    run.add_argument("--seed", type=int, default=2024, help="seeds every random choice (default: %(default)s)")
    run.add_argument("--jobs", type=int, help="notebooks at a time (default: 2, in the gpu profile 1)")
    changes = "change parameters of the profile, for example cnn_epochs=3"
    run.add_argument("--set", **several, metavar="NAME=VALUE", dest="overrides", help=changes)
    restore = add_command(commands, "restore", run_restore, root=True)
    restore.add_argument("--dataset", required=True, metavar="DIR", help="the dataset of the reference, prepared")
    commands.add_parser("colab", help="install on Colab or Kaggle what it lacks, and leave alone what it has")
    test = add_command(commands, "test", run_tests)
    test.add_argument("pytest", nargs="*", metavar="ARGUMENT", help="passed to pytest, after --")


def run_study(chosen: argparse.Namespace) -> int:
    """Run the study, or what is stale of it."""
    from chestxray import files
    from chestxray.pipeline import documents, runner, stages

    started = time.monotonic()
    check_seed(chosen.seed)
    overrides = dict(_override(text) for text in chosen.overrides)
    study = open_study(known(chosen.dataset, chosen.folders), chosen.profile, chosen.seed, overrides)
    wanted = stages.choose(chosen.only)
    jobs = runner.default_jobs(chosen.profile) if chosen.jobs is None else chosen.jobs
    if jobs < 1:
        raise StudyError(f"--jobs {jobs}: give 1 or more")
    source, folders = chosen.dataset, chosen.folders
    if study.paths.dataset == NIH_9K and source != NIH_9K:
        source, folders = NIH_9K, [source, *folders]
    line = runner.Pipeline(study, source, overrides, jobs, folders=folders, labels=chosen.labels)
    for note in line.look_ahead(wanted):
        print(note, file=sys.stderr)
    if not line.run(wanted, chosen.force):
        again = "Mend it and run the same command again: it goes on there."
        print(f"Failed: {', '.join(stage.label for stage in line.failed)}. {again}", file=sys.stderr)
        return 1
    if chosen.in_place:
        for path in line.refresh(wanted):
            print(f"refreshed {path.relative_to(REPOSITORY).as_posix()}")
    rendered = [stage for stage in wanted if stage.notebook and not line.unpacked(stage)]
    documents.print_outcome(study, [line.rendered(stage).with_suffix(".html") for stage in rendered])
    print(f"\n{len(line.executed)} of {len(wanted)} stages run, {files.duration(time.monotonic() - started)}.")
    return 0


def run_restore(chosen: argparse.Namespace) -> int:
    """Lay the committed reference out as trained models, to evaluate it again without training.

    Copy 5_results/reference to the places where stage 4 leaves models; then `run --only 5` makes the results anew. The
    dataset has to be prepared as the reference's was (stages 1 and 2).
    """
    with without_greetings():
        from chestxray.pipeline import reference

    study = open_study(known(chosen.dataset), "cpu", seed=0)
    written = reference.restore(study)
    again = f"chestxray run --dataset {chosen.dataset} --profile cpu --only 5"
    print(f"4_models/saved/{study.paths.dataset}: {written} files written; evaluate them by {again}")
    return 0


def run_tests(chosen: argparse.Namespace) -> int:
    """Run the tests.

    Run the tests, in two processes; arguments after -- go to pytest (-n 0 for one process).
    """
    arguments = [argument for argument in chosen.pytest if argument != "--"]
    # The table of faults is written at the end by the process that saw them all.
    if not any(argument.startswith("-n") for argument in arguments) and "CHESTXRAY_FAULTS" not in os.environ:
        arguments = ["-n", "2", "--dist", "loadfile", *arguments]
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=REPOSITORY, check=False).returncode


def _override(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise StudyError(f"--set {text}: write it as NAME=VALUE, for example cnn_epochs=3")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value

"""Users' commands: run, predict, serve, export, plan, verify, pack, unpack, restore, colab, test.

`add_commands` adds them to the command line; each has a function that calls what does the work and prints the outcome.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chestxray.config import CLASSES, PROFILES, REPOSITORY, Paths, StudyError, dataset_name, open_study

Commands = argparse._SubParsersAction
"""What `add_subparsers` returns."""

Run = Callable[[argparse.Namespace], int]


def add_commands(commands: Commands) -> None:
    """Add the users' commands to the command line."""
    _add_study(commands)
    _add_inference(commands)
    _add_data(commands)
    commands.add_parser("colab", help="install on Google Colab what it lacks, and leave alone what it has")
    test = add_command(commands, "test", run_tests)
    test.add_argument("pytest", nargs="*", metavar="ARGUMENT", help="passed to pytest, after --")


def add_command(commands: Commands, name: str, run: Run, root: bool = False) -> argparse.ArgumentParser:
    """Add one command, with the docstring of the function that runs it as its help.

    Args:
        commands: what it is added to.
        name: what the user types.
        run: takes the parsed arguments and returns the exit code.
        root: whether it has the option `--root`.
    """
    words, _, more = inspect.getdoc(run).partition("\n\n")
    command = commands.add_parser(name, help=words[0].lower() + words[1:].rstrip("."), description=more or words)
    command.set_defaults(command=run)
    if root:
        command.add_argument("--root", type=Path, help="folder for data, models and results (default: the repository)")
    return command


def _add_study(commands: Commands) -> None:
    run = add_command(commands, "run", run_study, root=True)
    run.add_argument(
        "--dataset",
        default="phantom",
        metavar="phantom|nih|nih-sample|DIR",
        help="phantom; nih or nih-sample, fetched from Kaggle unless they are here; or a folder in the NIH layout",
    )
    run.add_argument("--profile", default="quick", choices=PROFILES, help="how large the run is (default: quick)")
    several = {"action": "extend", "nargs": "+", "default": []}
    run.add_argument(
        "--only",
        **several,
        metavar="STAGE",
        help="numbers: 1, 2.1, 2.2, 3, 4.0, 4.1, 4.2, 4.3a … 4.3d, 4.4, 5; or names: data, trees, eda, cnn, ensemble …",
    )
    run.add_argument("--force", action="store_true", help="run also what is up to date")
    run.add_argument("--in-place", action="store_true", help="write the executed notebooks over the committed ones")
    run.add_argument("--seed", type=int, default=2024, help="seeds every random choice (default: %(default)s)")
    run.add_argument("--jobs", type=int, help="notebooks at a time (default: 2, in the gpu profile 1)")
    changes = "change parameters of the profile, for example cnn_epochs=3"
    run.add_argument("--set", **several, metavar="NAME=VALUE", dest="overrides", help=changes)
    restore = add_command(commands, "restore", run_restore, root=True)
    restore.add_argument("--dataset", required=True, metavar="DIR", help="the dataset of the reference, prepared")


def _add_inference(commands: Commands) -> None:
    predict = add_command(commands, "predict", run_predict)
    predict.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="PNG, JPEG, TIFF or DICOM files, or folders of them"
    )
    predict.add_argument("--out", type=Path, required=True, help="the table to write: CSV or JSON, by its suffix")
    predict.add_argument("--heat-maps", type=Path, metavar="FOLDER", help="write each radiograph under its heat-map")
    shown = "what heat-maps are of (default: each one's most probable finding)"
    predict.add_argument("--finding", choices=CLASSES, help=shown)
    predict.add_argument("--batch-size", type=int, default=8, help="images at a time (default: %(default)s)")
    engine = "what runs the model (default: onnx, where it can)"
    predict.add_argument("--engine", choices=("onnx", "keras"), help=engine)
    serve = add_command(commands, "serve", run_serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    serve.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    serve.add_argument("--share", action="store_true", help="ask Gradio's servers for a public address as well")
    export = add_command(commands, "export", run_export)
    export.add_argument("out", type=Path, metavar="OUT", help="the file to write, such as ensemble.onnx")
    for command in (predict, export):
        command.add_argument("--model", type=Path, help="a model.keras (default: the reference ensemble)")


def _add_data(commands: Commands) -> None:
    plan = add_command(commands, "plan", run_plan)
    size = PROFILES["gpu"]
    plan.add_argument("--metadata", type=Path, required=True, metavar="FILE", help="the image table, Data_Entry_2017*")
    plan.add_argument("--train-val", type=Path, metavar="LIST", help="the official list of train and validation images")
    plan.add_argument("--test", type=Path, metavar="LIST", help="the official list of test images")
    plan.add_argument(
        "--out",
        type=Path,
        default=Path("manifest.csv"),
        metavar="FILE",
        help="the table to write (default: %(default)s)",
    )
    plan.add_argument(
        "--no-finding",
        type=int,
        default=size.no_finding,
        metavar="N",
        help="at most this many No_finding images are selected (default: %(default)s, as in the gpu profile)",
    )
    plan.add_argument(
        "--valid-share",
        type=float,
        default=size.valid_share,
        metavar="S",
        help="share of train_val held out for validation, 0 to 1 (default: %(default)s, as in the gpu profile)",
    )
    plan.add_argument("--seed", type=int, default=2024, help="seeds every random choice (default: %(default)s)")
    verify = add_command(commands, "verify", run_verify, root=True)
    verify.add_argument("dataset", metavar="DATASET|DIR", help="a dataset, or a folder in the NIH layout")
    verify.add_argument(
        "--verify", choices=("sample", "full"), default="sample", help="decode a random sample, or every image"
    )
    verify.add_argument("--report", type=Path, metavar="FILE", help="write all that is wrong to a CSV table")
    pack = add_command(commands, "pack", run_pack, root=True)
    pack.add_argument("dataset", metavar="DATASET", help="a dataset that stage 2.1 has prepared")
    pack.add_argument("--out", type=Path, metavar="FILE", help="the archive (default: 1_Datasets/DATASET.tar)")
    unpack = add_command(commands, "unpack", run_unpack, root=True)
    unpack.add_argument("archive", type=Path, metavar="FILE", help="an archive that pack wrote")


def run_study(chosen: argparse.Namespace) -> int:
    """Run the study, or what is stale of it."""
    from chestxray.pipeline import documents, runner, stages
    from chestxray.pipeline.progress import duration

    started = time.monotonic()
    _check_seed(chosen.seed)
    overrides = dict(_override(text) for text in chosen.overrides)
    study = open_study(known(chosen.dataset), chosen.profile, chosen.seed, overrides)
    wanted = stages.choose(chosen.only)
    jobs = runner.default_jobs(chosen.profile) if chosen.jobs is None else chosen.jobs
    if jobs < 1:
        raise StudyError(f"--jobs {jobs}: give 1 or more")
    line = runner.Pipeline(study, chosen.dataset, overrides, jobs)
    if not line.run(wanted, chosen.force):
        again = "Mend it and run the same command again: it goes on there."
        print(f"Failed: {', '.join(stage.label for stage in line.failed)}. {again}", file=sys.stderr)
        return 1
    if chosen.in_place:
        for path in line.refresh(wanted):
            print(f"refreshed {path.relative_to(REPOSITORY).as_posix()}")
    rendered = [stage for stage in wanted if stage.notebook and not line.unpacked(stage)]
    documents.print_outcome(study.paths, [line.rendered(stage).with_suffix(".html") for stage in rendered])
    print(f"\n{len(line.executed)} of {len(wanted)} stages run, {duration(time.monotonic() - started)}.")
    return 0


def run_predict(chosen: argparse.Namespace) -> int:
    """Give probabilities of the seven classes for radiographs.

    Answer for frontal chest radiographs. A study, not a medical device: not for diagnosis.
    """
    from tqdm import tqdm

    from chestxray.inference import batch, reader

    batch.check(chosen.out, chosen.batch_size, chosen.finding)
    failed = 0

    def report(error: StudyError) -> None:
        nonlocal failed
        failed += 1
        tqdm.write(str(error), file=sys.stderr)

    with without_greetings() if chosen.engine == "keras" else contextlib.nullcontext():
        model = reader.load(chosen.model, chosen.engine)
    answered = batch.predict_files(
        chosen.images, chosen.out, model, chosen.batch_size, report, chosen.heat_maps, chosen.finding
    )
    if answered:
        print(f"{chosen.out}: {answered} images answered, {failed} files or folders not usable")
        return 1 if failed else 0
    print(f"nothing answered, {failed} files or folders not usable", file=sys.stderr)
    return 2


def run_serve(chosen: argparse.Namespace) -> int:
    """Open a web page that answers for a radiograph.

    Serve a page on this machine: upload a radiograph or take a drawn one. Ctrl-C stops it.
    """
    if chosen.port is not None and not 1 <= chosen.port <= 65535:
        raise StudyError(f"--port {chosen.port}: give a number from 1 to 65535")
    from chestxray.inference import web

    web.serve(chosen.host, chosen.port, chosen.share)
    return 0


def run_export(chosen: argparse.Namespace) -> int:
    """Write a model as ONNX, for other programs.

    Write a model as one ONNX file that takes grey values (N, side, side, 1) in 0-255 and gives seven probabilities.
    """
    from chestxray.inference import engines

    if chosen.out.is_dir():
        raise StudyError(f"{chosen.out}: is a folder; give the name of a file")
    with without_greetings():
        size = engines.export(chosen.out, chosen.model)
    print(f"{chosen.out}: {size / 1e6:.1f} MB")
    return 0


def run_plan(chosen: argparse.Namespace) -> int:
    """Show who would be in train, validation and test; needs no images.

    Split and select a table's images as stage 2.1 does, show the counts, and write the manifest.
    """
    _check_seed(chosen.seed)
    if (chosen.train_val is None) != (chosen.test is None):
        raise StudyError("--train-val and --test: only one of them is given; give both, or neither to split by patient")
    if not 0 <= chosen.valid_share < 1:
        raise StudyError(f"--valid-share {chosen.valid_share}: give a number from 0 to below 1")
    if chosen.no_finding < 0:
        raise StudyError(f"--no-finding {chosen.no_finding}: give 0 or more")
    if not chosen.metadata.is_file():
        what = "is a folder" if chosen.metadata.is_dir() else "no such file"
        raise StudyError(f"{chosen.metadata}: {what}; give the image table, such as Data_Entry_2017_v2020.csv")
    if chosen.out.is_dir():
        raise StudyError(f"{chosen.out}: is a folder; --out takes the name of a file")
    from chestxray import files
    from chestxray.data import nih_tables, splits
    from chestxray.pipeline import documents

    entries = nih_tables.read_entries(chosen.metadata)
    lists = nih_tables.read_lists_for(entries, chosen.train_val, chosen.test) if chosen.test else None
    planned = splits.plan(entries.table, lists, chosen.valid_share, chosen.no_finding, chosen.seed)
    files.atomic_write(chosen.out, planned.to_csv(index=False, lineterminator="\n").encode())
    print(*splits.describe(entries, planned, lists), sep="\n")
    for title, table in splits.tables(planned).items():
        cells = table.map(lambda value: value if isinstance(value, str) else f"{value:,}").values.tolist()
        print(f"\n{title}")
        documents.print_rows([list(table.columns), *cells])
    print(f"\n{chosen.out}: {len(planned):,} rows")
    return 0


def run_verify(chosen: argparse.Namespace) -> int:
    """Check a dataset: all there, nothing broken.

    Compare the raw images with their table, and name each that is missing or broken.
    """
    from chestxray import files
    from chestxray.data import integrity, kaggle, nih_tables

    raw, whole = Path(chosen.dataset), None
    if not raw.is_dir():
        raw, whole = Paths(dataset_name(chosen.dataset)).raw, kaggle.DATASETS.get(chosen.dataset)
        if not raw.exists():
            raise StudyError(
                f"dataset {chosen.dataset!r}: no such folder, and none of this name under 1_Datasets; give a folder, "
                "or run stage 1 of a dataset first"
            )
    report = integrity.verify(raw, whole, chosen.verify == "full")
    print(*report.lines(), sep="\n")
    if chosen.report:
        table = nih_tables.rejections_frame(report.faults)
        files.atomic_write(chosen.report, table.to_csv(index=False, lineterminator="\n").encode())
        print(f"{chosen.report}: {len(table):,} lines")
    return 1 if report.faults else 0


def run_pack(chosen: argparse.Namespace) -> int:
    """Pack a prepared dataset into one file.

    Write what stages 2.2 to 5 need of a prepared dataset to one archive, with checksums.
    """
    from chestxray import files
    from chestxray.data import archive
    from chestxray.pipeline.progress import shown

    paths = Paths(dataset_name(chosen.dataset))
    packed = archive.pack(paths, chosen.out)
    print(f"{shown(packed)}: {files.gigabytes(packed.stat().st_size)}, {_contents(archive.summary(paths))}")
    print(f"SHA-256 {files.digest(packed)}")
    return 0


def run_unpack(chosen: argparse.Namespace) -> int:
    """Unpack it on another machine.

    Check an archive and unpack it into 1_Datasets. Goes on where an earlier call was stopped.
    """
    from chestxray.data import archive
    from chestxray.pipeline.progress import shown

    paths, kept = archive.unpack(chosen.archive)
    done = archive.summary(paths)
    print(f"{shown(paths.data)}: {_contents(done)}" + (f"; {kept:,} files were there already" if kept else ""))
    fitting = [name for name, profile in PROFILES.items() if profile.image_size == done.image_size]
    size = f"--profile {fitting[0]}" if fitting else f"--set image_size={done.image_size}"
    print(f"Go on with: chestxray run --dataset {paths.dataset} {size}")
    return 0


def _contents(done: Any) -> str:
    """What a dataset holds, in words; `done` is an `archive.Summary`."""
    augmented = f"{done.augmented:,} augmented files" if done.augmented else "no augmented files (run stage 2.2)"
    return f"{done.images:,} radiographs of {done.image_size} px, {augmented}, data fingerprint {done.fingerprint}"


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


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise StudyError(f"--seed {seed}: give a number from 0 to {2**32 - 1}")


def known(dataset: str) -> str:
    """Check `--dataset` before anything runs.

    Raises:
        StudyError: it is neither `phantom`, nor a published dataset, nor a folder, nor a dataset that is there already.
    """
    named = dataset in ("phantom", "nih", "nih-sample")
    if not named and not Path(dataset).is_dir() and not Paths(dataset_name(dataset)).raw.exists():
        raise StudyError(
            f"dataset {dataset!r}: no such folder; give phantom, nih, nih-sample, or a folder in the NIH layout"
        )
    return dataset


def _override(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise StudyError(f"--set {text}: write it as NAME=VALUE, for example cnn_epochs=3")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


@contextlib.contextmanager
def without_greetings() -> Iterator[None]:
    """Drop what TensorFlow's C++ side prints at its start; no setting of its own stops that."""
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)

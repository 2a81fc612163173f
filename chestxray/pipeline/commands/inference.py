"""Commands for one's own radiographs: predict, evaluate, serve, export."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from chestxray.config import SIX_FINDINGS, StudyError
from chestxray.pipeline.commands.command import Commands, add_command, without_greetings


def add_commands(commands: Commands) -> None:
    """Add the commands that need a model to the command line."""
    predict = add_command(commands, "predict", run_predict)
    images = "PNG, JPEG, TIFF or DICOM files, or folders of them"
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help=images)
    predict.add_argument("--out", type=Path, required=True, help="the table to write: CSV or JSON, by its suffix")
    predict.add_argument("--heat-maps", type=Path, metavar="FOLDER", help="write each radiograph under its heat-map")
    shown = "what heat-maps are of (default: each one's most probable finding)"
    predict.add_argument("--finding", choices=SIX_FINDINGS, help=shown)
    predict.add_argument("--batch-size", type=int, default=8, help="images at a time (default: %(default)s)")
    evaluate = add_command(commands, "evaluate", run_evaluate)
    evaluate.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="radiographs and their table")
    evaluate.add_argument("--labels", type=Path, metavar="MAP", help="a table: own label, study label")
    where = "the CSV table to write (default: %(default)s)"
    evaluate.add_argument("--out", type=Path, default=Path("evaluation.csv"), metavar="FILE", help=where)
    serve = add_command(commands, "serve", run_serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    serve.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    serve.add_argument("--share", action="store_true", help="ask Gradio's servers for a public address as well")
    export = add_command(commands, "export", run_export)
    export.add_argument("out", type=Path, metavar="OUT", help="the file to write, such as ensemble.onnx")
    engine = "what runs the model (default: onnx, where it can)"
    for command in (predict, evaluate):
        command.add_argument("--engine", choices=("onnx", "keras"), help=engine)
    shares = "class shares: equal, sample, nih, or a CSV file of class,share (default: %(default)s)"
    for command in (predict, evaluate, export):
        command.add_argument("--model", type=Path, help="a model.keras (default: the reference ensemble)")
        command.add_argument("--prevalence", default="equal", metavar="SHARES", help=shares)


def run_predict(chosen: argparse.Namespace) -> int:
    """Predict findings and classes of radiographs.

    Answer for frontal chest radiographs. A study, not a medical device: not for diagnosis.
    """
    from tqdm import tqdm

    from chestxray.inference import batch, reader

    batch.check(chosen.out, chosen.batch_size, chosen.finding)
    failed = 0
    others: list[Path] = []

    def report(error: StudyError) -> None:
        nonlocal failed
        failed += 1
        tqdm.write(str(error), file=sys.stderr)

    with without_greetings() if chosen.engine == "keras" else contextlib.nullcontext():
        model = reader.load(chosen.model, chosen.engine, chosen.prevalence)
    answered = batch.predict_files(
        chosen.images, chosen.out, model, chosen.batch_size, report, chosen.heat_maps, chosen.finding, others
    )
    rest = f"{failed} files or folders not usable"
    if others:
        rest += f", {len(others)} other files not looked at, such as {', '.join(path.name for path in others[:3])}"
    if answered:
        print(f"{chosen.out}: {answered} images answered, {rest}")
        print(f"class and its probabilities: at class shares {model.prevalence}")
        return 1 if failed else 0
    print(f"nothing answered, {rest}", file=sys.stderr)
    return 2


def run_evaluate(chosen: argparse.Namespace) -> int:
    """Measure a model on labelled radiographs.

    Print and write AUROC, average precision, sensitivity and specificity with 95 % intervals from resampled patients,
    for the findings that occur with and without. DIR is in the NIH layout, and only read: its table needs image, labels
    and patient. What can't be measured is empty. Balanced accuracy is at equal class shares; --prevalence adds accuracy
    at others.
    """
    from chestxray import files
    from chestxray.evaluation import posterior
    from chestxray.inference import engines, labelled, reader
    from chestxray.pipeline import documents

    labelled.check(chosen.dataset, chosen.out, chosen.labels)
    shares = posterior.read_shares(chosen.prevalence)
    with without_greetings():
        model = reader.load(chosen.model, chosen.engine)
    with files.atomic_file(chosen.out) as file:  # a place that can't be written is known before the work
        found = labelled.predict(chosen.dataset, model, chosen.labels)
        measured = labelled.measure(found.table, prevalence=shares)
        file.write(measured.to_csv(lineterminator="\n").encode())
    path = chosen.model or engines.reference_model()
    print(f"{files.shown(path)}: SHA-256 {files.digest(path)}")
    print(*found.lines, "", sep="\n")
    documents.print_rows(labelled.cells(measured))
    print(*labelled.means(measured), sep="\n")
    print(f"\n{chosen.out}: {len(measured)} rows")
    return 1 if found.unreadable else 0


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

    Write a model as one ONNX file that takes grey values (N, side, side, 1) in 0-255 and gives calibrated classes at
    --prevalence and findings.
    """
    from chestxray import files
    from chestxray.evaluation import posterior
    from chestxray.inference import engines

    if chosen.out.is_dir():
        raise StudyError(f"{chosen.out}: is a folder; give the name of a file")
    files.keep_apart(chosen.out, [chosen.model or engines.reference_model()], "OUT")
    shares = posterior.read_shares(chosen.prevalence)
    with without_greetings():
        size = engines.export(chosen.out, chosen.model, shares)
    print(f"{chosen.out}: {size / 1e6:.1f} MB")
    print(f"classes: at class shares {shares}")
    return 0
